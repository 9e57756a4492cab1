"""Laws of sources under generated input: no traceback, only one-line errors, and no input that is not counted."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tarfile
import tempfile
from collections import Counter
from pathlib import Path, PurePosixPath

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from msae.base.errors import MsaeError
from msae.data.embed import _decode
from msae.data.images import SUFFIXES as IMAGE_SUFFIXES
from msae.data.images import read_picture
from msae.data.sources import SourceItem, open_source
from msae.data.sources.members import SUFFIXES, TEXTS

FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


class Pixels:
    """What `_decode` needs of an embedder."""

    def pixels(self, images: list[Image.Image]) -> dict[str, Image.Image]:
        return {"pixel_values": images[0]}


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(source: Path) -> list[SourceItem] | None:
    """The samples, each of which is decoded or skipped; None where the source is refused in one line."""
    try:
        opened = open_source(source)
        items = list(opened.items(0))
    except MsaeError as err:
        assert "\n" not in str(err)
        return None
    assert opened.total in (None, len(items))
    middle = len(items) // 2
    assert list(opened.items(middle)) == items[middle:]
    batch = _decode(opened, Pixels(), items)  # type: ignore[arg-type]
    assert len(batch.items) + len(batch.skipped) == batch.n_items == len(items)
    return items


# tables

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)
CELL = TEXT | st.sampled_from(
    ["", "0.png", "a,b", 'say "x"', "two\nlines", "001", "1E5", "NA", "c:\\x.png", "http://x/y.png"]
)
NAMES = st.sampled_from(["id", "image_path", "file_name", "caption", "text", " Title", "label", "", "price", "url"])


@FUZZ
@given(
    names=st.lists(NAMES, min_size=1, max_size=5, unique=True),
    cells=st.lists(st.lists(CELL, min_size=6, max_size=6), max_size=6),
    separator=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_every_row_of_a_csv_is_a_sample_with_its_text(names, cells, separator, encoding):
    names = ["caption", *(name for name in names if name not in ("caption", "text", " Title"))]
    rows = [row[: len(names)] for row in cells]
    with folder() as path:
        with (path / "t.csv").open("w", newline="", encoding=encoding) as file:
            writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(rows)
        items = read(path / "t.csv")
    if items is None:  # no rows, or pictures that are on the web, or two columns of pictures
        assert not rows or any(".png" in cell.lower() for row in rows for cell in row[1:])
        return
    assert [item.caption for item in items] == [row[0] for row in rows]
    for name in ("label", "price"):
        if name in names:
            written = [row[names.index(name)] for row in rows]
            if any(cell.lower().endswith(".png") for cell in written) and name not in items[0].columns:
                continue  # the column of pictures
            for value, text in zip([item.columns[name] for item in items], written, strict=True):
                assert str(value) == text or (value is None and text in ("", "NA"))


@FUZZ
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"]))
def test_a_table_of_any_bytes_is_read_or_refused_in_one_line(data, suffix):
    with folder() as path:
        for start in (b"", b"caption,label\n", b'{"caption": "a", "label": 1}\n', b'[{"caption": "a"}'):
            (path / f"t{suffix}").write_bytes(start + data)
            read(path / f"t{suffix}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RECORD = st.dictionaries(st.sampled_from(["caption", "captions", "image", "id", "label", "x"]), JSON, max_size=5)


@FUZZ
@given(records=st.lists(RECORD, min_size=1, max_size=6), is_array=st.booleans())
def test_every_record_of_a_json_table_is_a_sample(records, is_array):
    records = [{"text": "a"}, *records]
    with folder() as path:
        text = json.dumps(records) if is_array else "\n".join(map(json.dumps, records))
        (path / "t.jsonl").write_text(text)
        items = read(path / "t.jsonl")
    assert items is None or len(items) == len(records)


# tars

STEMS = st.sampled_from(["0", "1", "a.b", "sub/0", "./2", "IMG.1", "é", ".hidden"])
ENDINGS = st.sampled_from([".png", ".JPG", ".txt", ".json", ".cls", ".npy", "", ".seg.png"])
CONTENT = st.sampled_from([PNG, b"", b"words", b"{}", b'{"caption": ["a", "b"], "n": 1}', b"[", b"\xff", b"7"])


@FUZZ
@given(
    members=st.lists(st.tuples(STEMS, ENDINGS, CONTENT), max_size=10),
    mode=st.sampled_from(["w", "w", "w:gz"]),
    cut=st.none() | st.floats(0, 1),
    flip=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_every_member_of_a_tar_is_in_a_sample_or_the_tar_is_said_to_be_damaged(members, mode, cut, flip):
    with folder() as path:
        with tarfile.open(path / "x.tar", mode) as archive:  # type: ignore[call-overload]
            for stem, ending, content in members:
                info = tarfile.TarInfo(stem + ending)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        data = bytearray((path / "x.tar").read_bytes())
        if cut is not None:
            del data[int(cut * len(data)) :]
        if flip is not None and data:
            data[int(flip * len(data))] ^= 0x55
        (path / "x.tar").write_bytes(data)
        items = read(path / "x.tar")
    if items is None or cut is not None or flip is not None:
        return
    found = Counter(item.id for item in items)
    for stem, ending, _ in members:
        name = PurePosixPath(stem + ending)
        if not name.name.startswith("."):
            first = str(name.with_name(name.name.split(".")[0]))
            assert found[str(name)] or found[str(name.with_suffix(""))] or found[first], name
    pictures = Counter(str(PurePosixPath(s + e)) for s, e, _ in members if e.lower() in IMAGE_SUFFIXES)
    shown = sum(n for name, n in pictures.items() if not PurePosixPath(name).name.startswith("."))
    assert len([item for item in items if item.image is not None or item.damage]) >= shown


# folders

PLACES = st.lists(st.sampled_from(["cat", "dog", "00000", ".git", "a b"]), max_size=2).map("/".join)


@FUZZ
@given(
    files=st.dictionaries(
        st.tuples(PLACES, st.sampled_from(["0", "1", "x.y", "ü", ".dot"]), ENDINGS | st.sampled_from([".csv", ".tar"])),
        CONTENT,
        max_size=10,
    ),
    links=st.lists(st.tuples(PLACES, PLACES), max_size=2),
)
def test_every_file_of_a_folder_is_a_sample_or_describes_one(files, links):
    with folder() as path:
        names = []
        for (place, stem, ending), content in files.items():
            file = path / place / (stem + ending)
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                names.append(file.relative_to(path).as_posix())
        for number, (place, target) in enumerate(links):
            if (path / place).is_dir():
                (path / place / f"link{number}").symlink_to(path / target, target_is_directory=True)
        items = read(path)
    shown = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    pictures = [name for name in shown if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if items is None:
        assert not pictures
        return
    if not pictures and any(name.endswith(".tar") for name in shown):
        return  # these are shards
    found = {item.id for item in items}
    keys = {str(PurePosixPath(name).with_suffix("")) for name in pictures}
    for name in shown:
        file = PurePosixPath(name)
        describes = file.suffix in (*TEXTS, ".cls", ".json") and str(file.with_suffix("")) in keys
        assert name in found or describes, name


@FUZZ
@given(
    cut=st.integers(0, len(PNG)),
    flips=st.lists(st.tuples(st.integers(0, len(PNG) - 1), st.integers(1, 255)), max_size=3),
)
def test_a_damaged_picture_is_read_or_refused_in_one_line(cut, flips):
    data = bytearray(PNG)
    for place, mask in flips:
        data[place] ^= mask
    try:
        assert read_picture(bytes(data[:cut])).image.mode == "RGB"
    except MsaeError as err:
        assert "\n" not in str(err)


def test_the_endings_of_these_tests_are_all_known_or_none():
    assert {".png", ".jpg", ".txt", ".json", ".cls"} <= SUFFIXES
    assert not {".npy", ""} & SUFFIXES
