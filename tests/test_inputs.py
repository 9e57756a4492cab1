"""Laws of inputs as people have them: each is embedded, or counted and listed with its reason.

Each input stands for a kind: img2dataset's outputs, Hugging Face's imagefolder, open_clip's and pandas' tables,
shards made by hand, folders with something beside the pictures.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msae.base.errors import Interrupted, SourceError
from msae.cli import main
from msae.data.embed import embed
from msae.data.embedder import Embedder
from msae.data.images import read_picture
from msae.data.sources import Source, SourceItem, open_source
from msae.data.store import EmbeddingStore
from msae.data.tables import read_table
from msae.use.filters import Filter
from tests.tiny_clip import make_encoder

WORDS = [f"picture number {i}" for i in range(6)]


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Embedder:
    return Embedder.load(make_encoder(tmp_path_factory.mktemp("encoders") / "clip"), dtype="float32")


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def encoded(seed: int = 0, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [encoded(i) for i in range(6)]


def items(source: str | Path) -> list[SourceItem]:
    return list(open_source(source).items(0))


def skipped(store: EmbeddingStore) -> dict[str, str]:
    counts = store.record["counts"]
    assert counts["inputs"] == counts["rows"] + counts["skipped"] == len(store) + len(store.skipped)
    return {entry.id: entry.reason for entry in store.skipped}


# shards


def tar(path: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def jpg(*numbers: int) -> list[tuple[str, bytes]]:
    return [(f"{i:04}.jpg", PICTURES[i]) for i in numbers]


def txt(*numbers: int) -> list[tuple[str, bytes]]:
    return [(f"{i:04}.txt", WORDS[i].encode()) for i in numbers]


@pytest.mark.parametrize("missing", [0, 2, 5])
def test_captions_are_kept_whichever_sample_lacks_one(missing, clip, tmp_path):
    others = [i for i in range(6) if i != missing]
    members = sorted(jpg(*range(6)) + txt(*others))
    store = embed(tar(tmp_path / "x.tar", members), encoder=clip, out=tmp_path / "x.store")
    assert store.column("caption") == [WORDS[i] for i in others]
    assert store.modalities == ("image", "text")
    assert skipped(store) == {f"{missing:04}": "no caption"}
    assert "1 of the first 6 images have no caption" in store.record["notes"][0]


def test_a_few_captions_are_a_column_and_cost_no_image(clip, tmp_path):
    store = embed(tar(tmp_path / "x.tar", sorted(jpg(*range(6)) + txt(3, 4))), encoder=clip, out=tmp_path / "x.store")
    assert (store.modalities, len(store), skipped(store)) == (("image",), 6, {})
    assert store.column("caption") == [None, None, None, WORDS[3], WORDS[4], None]
    assert "only 2 of the first 6 images have a caption" in store.record["notes"][0]


def test_members_of_one_key_are_one_sample_in_any_order(tmp_path):
    found = items(tar(tmp_path / "x.tar", jpg(*range(6)) + txt(*reversed(range(6)))))
    assert [(item.id, item.image, item.caption) for item in found] == [
        (f"{i:04}", PICTURES[i], WORDS[i]) for i in range(6)
    ]


def test_an_unsorted_compressed_shard_is_one_line_with_the_remedy(tmp_path):
    ordered = sorted(jpg(0, 1) + txt(0, 1))
    assert [item.caption for item in items(tar(tmp_path / "a.tar.gz", ordered, "w:gz"))] == WORDS[:2]
    with pytest.raises(SourceError, match="tar --sort=name"):
        open_source(tar(tmp_path / "b.tar.gz", jpg(0, 1) + txt(0, 1), "w:gz"))


def test_dots_in_a_name_are_part_of_it(tmp_path):
    names = ["holiday", *(f"IMG_2024.05.{i:02}" for i in range(1, 6))]
    members = [(f"{name}.jpg", data) for name, data in zip(names, PICTURES, strict=True)]
    assert [(item.id, item.image) for item in items(tar(tmp_path / "x.tar", members))] == list(
        zip(names, PICTURES, strict=True)
    )


def test_a_member_that_is_there_twice_is_named_and_the_later_one_read(clip, tmp_path):
    members = [*jpg(0, 1), ("0001.jpg", PICTURES[2]), *jpg(2, 3, 4, 5)]
    path = tar(tmp_path / "x.tar", members)
    assert [item.image for item in items(path)[:2]] == [PICTURES[0], PICTURES[2]]
    store = embed(path, encoder=clip, out=tmp_path / "x.store")
    assert list(store.ids) == [f"{i:04}" for i in range(6)]
    assert skipped(store) == {"0001": "the member 0001.jpg is there twice; the later one is read"}


def test_pictures_of_one_key_are_samples_of_their_own(tmp_path):
    found = items(
        tar(tmp_path / "x.tar", [("a.jpg", PICTURES[0]), ("a.png", encoded(1, "PNG")), ("a.JPG", PICTURES[2])])
    )
    assert [(item.id, item.image) for item in found] == [
        ("a", PICTURES[0]),
        ("a.png", encoded(1, "PNG")),
        ("a.JPG", PICTURES[2]),
    ]


def test_a_cls_member_is_the_label_as_written(clip, tmp_path):
    labels = ["001", "1", "cat", "007", "0", "1"]
    members = [m for i in range(6) for m in (*jpg(i), (f"{i:04}.cls", f"{labels[i]}\n".encode()))]
    store = embed(tar(tmp_path / "x.tar", members), encoder=clip, out=tmp_path / "x.store")
    assert store.column("label") == labels


def test_of_several_captions_the_first_is_embedded_and_all_are_kept(clip, tmp_path):
    all_captions = [[f"one {i}", f"two {i}"] for i in range(6)]
    members = [
        m for i in range(6) for m in (*jpg(i), (f"{i:04}.json", json.dumps({"caption": all_captions[i]}).encode()))
    ]
    store = embed(tar(tmp_path / "x.tar", members), encoder=clip, out=tmp_path / "x.store")
    assert store.column("caption") == [f"one {i}" for i in range(6)]
    assert store.column("captions") == all_captions
    assert "several captions" in store.record["notes"][0]
    assert np.allclose(
        store.take(np.arange(6), "text"), clip.embed_texts([f"one {i}" for i in range(6)]), atol=5e-4
    )  # float16


def test_members_that_are_neither_images_nor_text_are_counted(tmp_path):
    found = items(tar(tmp_path / "x.tar", [*jpg(0), ("0000.pkl", b"x"), ("0001.npy", b"x"), ("0002", PICTURES[2])]))
    assert [(item.id, item.damage) for item in found] == [
        ("0000", None),
        ("0002", None),
        ("0001", "not read: .npy is no image and no text"),
    ]
    assert found[1].image == PICTURES[2]


@pytest.mark.parametrize("damage", ["header", "joined"])
def test_what_follows_a_damaged_header_or_a_second_tar_is_not_lost_in_silence(damage, tmp_path):
    data = bytearray(tar(tmp_path / "x.tar", jpg(*range(6))).read_bytes())
    if damage == "header":
        data[data.index(b"0003.jpg") + 2] ^= 1
    else:
        data = data + data
    (tmp_path / "x.tar").write_bytes(data)
    found = items(tmp_path / "x.tar")
    n = 3 if damage == "header" else 6
    assert [item.id for item in found] == [f"{i:04}" for i in range(n)] + ["x.tar"]
    assert "cannot be read as members" in found[-1].damage


# img2dataset


def test_img2dataset_files_are_pictures_with_their_captions(clip, tmp_path):
    out = tmp_path / "laion" / "00000"
    out.mkdir(parents=True)
    for i in range(4):
        (out / f"{i:09}.jpg").write_bytes(PICTURES[i])
        (out / f"{i:09}.txt").write_text(WORDS[i])
        (out / f"{i:09}.json").write_text(json.dumps({"caption": WORDS[i], "key": f"{i:09}", "status": "success"}))
    (tmp_path / "laion" / "00000_stats.json").write_text("{}")
    store = embed(tmp_path / "laion", encoder=clip, out=tmp_path / "x.store")
    assert list(store.ids) == [f"00000/{i:09}.jpg" for i in range(4)]
    assert store.column("caption") == WORDS[:4]
    assert store.column("key") == [f"{i:09}" for i in range(4)]
    assert skipped(store) == {"00000_stats.json": "no image has the name of this .json file"}


def test_img2dataset_parquet_says_why_a_picture_is_not_there(clip, tmp_path):
    table = pa.table(
        {
            "url": [f"u{i}" for i in range(4)],
            "key": [f"{i:09}" for i in range(4)],
            "status": ["success", "success", "failed_to_download", "success"],
            "error_message": [None, None, "HTTP Error 404", None],
            "caption": WORDS[:4],
            "jpg": pa.array([None if i == 2 else PICTURES[i] for i in range(4)], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "00000.parquet")
    store = embed(tmp_path / "00000.parquet", encoder=clip, out=tmp_path / "x.store")
    assert store.modalities == ("image", "text")
    assert store.column("caption") == [WORDS[i] for i in (0, 1, 3)]
    assert skipped(store) == {"000000002": "failed_to_download: HTTP Error 404"}


def test_a_folder_of_parquet_files_is_read_in_their_order_from_any_row(tmp_path):
    numbers = [[0, 1], [], [2], [3, 4, 5]]
    for shard, own in enumerate(numbers):
        columns = {"key": [str(i) for i in own], "caption": [WORDS[i] for i in own]}
        if shard:  # a column that the first file lacks
            columns["width"] = own
        jpgs = pa.array([PICTURES[i] for i in own], pa.binary())
        pq.write_table(pa.table({**columns, "jpg": jpgs}), tmp_path / f"{shard:05}.parquet", row_group_size=2)
    (tmp_path / "00000_stats.json").write_text("{}")
    source = open_source(tmp_path)
    assert source.total == 6 and source.has_images and source.has_captions
    for start in range(7):
        assert [item.caption for item in source.items(start)] == WORDS[start:6]
    assert [item.columns.get("width") for item in source.items(0)] == [None, None, 2, 3, 4, 5]
    assert source.notes == ("not read beside the .parquet files: 00000_stats.json",)


def test_img2dataset_shards_are_read_and_what_lies_beside_them_is_named(tmp_path):
    tar(tmp_path / "00000.tar", sorted(jpg(*range(6)) + txt(*range(6))))
    (tmp_path / "00000.parquet").write_bytes(b"x")
    source = open_source(tmp_path)
    assert [item.caption for item in source.items(0)] == WORDS
    assert source.notes == ("not read beside the shards: 00000.parquet",)


# folders


def test_an_archive_beside_pictures_is_named(clip, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(PICTURES[i])
    tar(folder / "backup.tar", jpg(0))
    tar(folder / "renamed.bak", jpg(0))
    store = embed(folder, encoder=clip, out=tmp_path / "x.store")
    assert list(store.ids) == [f"{i}.jpg" for i in range(5)]
    reason = "an archive, not an image; give it as a source of its own"
    assert skipped(store) == {"backup.tar": reason, "renamed.bak": reason}


def test_the_folder_of_a_picture_is_its_label_also_behind_a_link(clip, tmp_path):
    for place, label in ((tmp_path / "classes", "cat"), (tmp_path / "classes", "dog"), (tmp_path / "elsewhere", "fox")):
        (place / label).mkdir(parents=True)
        for i in range(3):
            (place / label / f"{i}.jpg").write_bytes(PICTURES[i])
    (tmp_path / "classes" / "fox").symlink_to(tmp_path / "elsewhere" / "fox")
    (tmp_path / "classes" / "cat" / "loop").symlink_to(tmp_path / "classes")
    store = embed(tmp_path / "classes", encoder=clip, out=tmp_path / "x.store")
    assert list(store.ids) == [f"{label}/{i}.jpg" for label in ("cat", "dog", "fox") for i in range(3)]
    assert store.column("label") == ["cat"] * 3 + ["dog"] * 3 + ["fox"] * 3
    assert skipped(store) == {}


def test_numbered_folders_of_a_download_are_no_labels(tmp_path):
    for shard in ("00000", "00001"):
        (tmp_path / shard).mkdir()
        (tmp_path / shard / "0.jpg").write_bytes(PICTURES[0])
    assert [dict(item.columns) for item in items(tmp_path)] == [{}, {}]


def test_a_picture_is_known_by_its_content(clip, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    names = ["phone.heic", "phone.HEIF", "scan.jp2", "scan.ppm", "new.jxl", "noextension", "b.jpg_large", "c.JPE"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(PICTURES[i % 6])
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    store = embed(folder, encoder=clip, out=tmp_path / "x.store")
    assert sorted(store.ids) == sorted(names)
    assert skipped(store) == {"film.mp4": "not an image, or of an unknown kind"}


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_pictures_that_a_plug_in_of_pillow_reads_are_read(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed").register_heif_opener()
    elif not Image.registered_extensions().get(".avif"):
        pytest.skip("this Pillow reads no AVIF")
    found = read_picture(encoded(1, kind, quality=95)).image
    assert np.abs(np.asarray(found, float) - np.asarray(picture(1), float)).mean() < 20  # chroma is halved


def test_a_heic_picture_without_the_plug_in_is_one_line_with_the_remedy(monkeypatch):
    import sys

    from msae.data import images

    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    images._register_plugins.cache_clear()
    try:
        with pytest.raises(SourceError, match="pip install pillow-heif"):
            read_picture(struct.pack(">I", 24) + b"ftypheic" + bytes(64))
    finally:
        images._register_plugins.cache_clear()


def test_a_folder_that_datasets_saved_is_that_dataset(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    columns = {"image": [{"bytes": data, "path": None} for data in PICTURES], "text": WORDS, "label": [0, 1] * 3}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    assert [(item.image, item.caption, item.columns["label"]) for item in items(tmp_path / "saved")] == [
        (PICTURES[i], WORDS[i], "ab"[i % 2]) for i in range(6)
    ]
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    for source in (str(tmp_path / "splits"), f"hf://{tmp_path}/splits", f"hf://{tmp_path}/splits?caption=text"):
        with pytest.raises(SourceError, match="has the splits train, test; give one, such as hf://") as told:
            open_source(source)
        asked = str(told.value).split("such as ")[1]
        assert [item.caption for item in items(asked)] == WORDS  # what the message says works


def test_a_picture_replaced_under_its_name_is_another_source(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(0, "PNG"))
    before = open_source(tmp_path).signature
    assert open_source(tmp_path).signature == before
    (tmp_path / "0.png").write_bytes(encoded(1, "PNG"))
    assert open_source(tmp_path).signature != before


# pictures that viewers show


def with_exif(kind: str) -> bytes:
    """A JPEG that says "turn me" and has a rational tag -1/0 or two values where one belongs."""
    entries, extra, base = [(0x0112, 3, 1, struct.pack("<HH", 6, 0))], b"", 8 + 2 + 12 * 2 + 4
    if kind == "rational":
        entries.append((0x011A, 10, 1, struct.pack("<I", base)))
        extra = struct.pack("<ii", -1, 0)
    else:
        entries.append((0x011A, 5, 2, struct.pack("<I", base)))
        extra = struct.pack("<IIII", 72, 1, 72, 0)
    body = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    for tag, type_, count, value in entries:
        body += struct.pack("<HHI", tag, type_, count) + value
    segment = b"Exif\0\0" + body + struct.pack("<I", 0) + extra
    data = encoded(2)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize("kind", ["rational", "count"])
def test_damaged_exif_data_costs_no_picture_and_no_turn(kind):
    wanted = picture_of(encoded(2)).transpose(Image.Transpose.ROTATE_270)
    found = read_picture(with_exif(kind))
    assert np.array_equal(np.asarray(found.image), np.asarray(wanted))
    assert found.conversions == ("turned upright",)


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_as_pillow_does(orientation):
    import PIL.ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(3, exif=exif)
    wanted = PIL.ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(read_picture(data).image), np.asarray(wanted))


def test_a_long_text_in_a_png_costs_no_picture():
    data = encoded(3, "PNG")
    text = b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    place = data.index(b"IDAT") - 4
    found = read_picture(data[:place] + chunk + data[place:])
    assert np.array_equal(np.asarray(found.image), np.asarray(picture_of(data)))


# tables


def table(
    path: Path, head: Sequence[str], rows: Sequence[Sequence[object]], sep: str = ",", encoding: str = "utf-8"
) -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=sep)
        writer.writerow(head)
        writer.writerows(rows)
    return path


ROWS = [(f"{i}.jpg", f"{WORDS[i]}, café") for i in range(4)]

TABLES: dict[str, Callable[[Path], Path]] = {
    "imagefolder": lambda p: table(p / "metadata.csv", ("file_name", "text"), ROWS),
    "open_clip": lambda p: table(p / "t.csv", ("filepath", "title"), ROWS, "\t"),
    "tsv": lambda p: table(p / "t.tsv", ("image", "caption"), ROWS, "\t"),
    "semicolon": lambda p: table(p / "t.csv", ("image_path", "caption"), ROWS, ";"),
    "byte order mark": lambda p: table(p / "t.csv", ("image_path", "caption"), ROWS, encoding="utf-8-sig"),
    "utf-16": lambda p: table(p / "t.csv", ("image_path", "caption"), ROWS, encoding="utf-16"),
    "windows-1252": lambda p: table(p / "t.csv", ("image_path", "caption"), ROWS, ";", "cp1252"),
    "pandas' index": lambda p: table(p / "t.csv", ("", "image_path", "caption"), [(i, *r) for i, r in enumerate(ROWS)]),
    "upper case": lambda p: table(p / "t.csv", ("Image_Path", "Caption"), ROWS),
    "spaces in the header": lambda p: table(p / "t.csv", ("Image Path", " caption"), ROWS),
    "backslashes": lambda p: table(p / "t.csv", ("image_path", "caption"), [("..\\d\\" + a, b) for a, b in ROWS]),
    "file addresses": lambda p: table(p / "t.csv", ("image_path", "caption"), [((p / a).as_uri(), b) for a, b in ROWS]),
    "a name of its own": lambda p: table(p / "t.csv", ("photo", "caption"), ROWS),
    "an array": lambda p: write_json(p / "t.json", json.dumps([{"image": a, "caption": b} for a, b in ROWS])),
    "several captions": lambda p: write_json(
        p / "t.jsonl", "\n".join(json.dumps({"image": a, "captions": [b, b + "!"]}) for a, b in ROWS)
    ),
    "mixed": lambda p: jsonl(p / "t.jsonl", [{"score": 0}, {"score": 1}, {"score": "high"}, {"score": "high"}]),
    "a long line": lambda p: jsonl(p / "t.jsonl", [{"x": "A" * (1_200_000 if i == 2 else 9)} for i in range(4)]),
    "categories": lambda p: categorical(p / "t.parquet"),
}  # fmt: skip


def write_json(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def jsonl(path: Path, more: Sequence[dict[str, object]]) -> Path:
    rows = [{"image": a, "caption": b, **other} for (a, b), other in zip(ROWS, more, strict=True)]
    return write_json(path, "\n".join(map(json.dumps, rows)))


def categorical(path: Path) -> Path:
    columns = {
        "image_path": pa.array([a for a, _ in ROWS]).dictionary_encode(),
        "caption": pa.array([b for _, b in ROWS]).dictionary_encode(),
        "label": pa.array(["cat", "dog", "cat", "dog"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_other_tools_give_pictures_with_captions(kind, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(PICTURES[i])
    source = open_source(TABLES[kind](folder))
    assert (source.has_images, source.has_captions, source.total) == (True, True, 4)
    found = list(source.items(0))
    assert [item.caption for item in found] == [caption for _, caption in ROWS]
    assert [item.image.read_bytes() for item in found] == PICTURES[:4]  # type: ignore[union-attr]
    columns = {
        "several captions": {"captions": ["picture number 3, café", "picture number 3, café!"]},
        "mixed": {"score": "high"},
        "a long line": {"x": "A" * 9},
        "categories": {"label": "dog"},
    }
    assert dict(found[3].columns) == columns.get(kind, {})
    assert any("Windows-1252" in note for note in source.notes) == (kind == "windows-1252")


def test_a_categorical_table_is_embedded_with_its_labels(clip, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(PICTURES[i])
    store = embed(categorical(tmp_path / "t.parquet"), encoder=clip, out=tmp_path / "x.store")
    assert store.column("label") == ["cat", "dog", "cat", "dog"]
    assert store.column("caption") == [caption for _, caption in ROWS]


def test_what_comes_late_in_a_column_changes_no_value(tmp_path):
    rows = [
        (f"{i % 4}.jpg", "long " * 30, "unknown" if i == 19_000 else i % 7, "seen" if i == 19_000 else "")
        for i in range(20_000)
    ]
    found = read_table(table(tmp_path / "t.csv", ("image_path", "caption", "score", "note"), rows), SourceError)
    assert found.column("score").to_pylist() == [str(row[2]) for row in rows]
    assert found.column("note").to_pylist() == [row[3] for row in rows]


def test_columns_that_are_not_kept_are_named(tmp_path):
    columns = {"text": ["a"], "vector": [[0.5]], "url": ["http://x.org/page"], "raw": [b"x"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    assert source.notes == (
        "columns not kept: vector (list<element: double>), raw (binary)",
        "column url is kept; nothing is downloaded from it",
    )
    assert [dict(item.columns) for item in source.items(0)] == [{"url": "http://x.org/page"}]


def test_a_blank_caption_in_a_table_of_one_column_is_counted(clip, tmp_path):
    (tmp_path / "t.csv").write_text("text\na red cat\n\ntwo\n\n")
    store = embed(tmp_path / "t.csv", encoder=clip, out=tmp_path / "x.store")
    assert (list(store.ids), skipped(store)) == (["0", "2"], {"1": "empty caption"})


# text as written


def test_codes_in_a_csv_stay_as_written(tmp_path):
    codes = ["001", "1", "1E5", "100000", "1e10", "0.10", "True", "nan", ""]
    path = table(tmp_path / "t.csv", ("id", "label"), [(f"{i:03}", code) for i, code in enumerate(codes)])
    found = read_table(path, SourceError)
    assert found.column("label").to_pylist() == codes
    assert found.column("id").to_pylist() == [f"{i:03}" for i in range(len(codes))]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["3", "-20", "", "0"], [3, -20, None, 0]),
        (["0.5", "1.0", "nan", "-3.25"], [0.5, 1.0, None, -3.25]),
        (["True", "False", ""], [True, False, None]),
        (["true", "false"], ["true", "false"]),
        (["9.50", "10.00"], ["9.50", "10.00"]),
        (["1", "2.0"], ["1", "2.0"]),
        (["-0", "0"], ["-0", "0"]),
        (["12345678901234567890"], ["12345678901234567890"]),
        (["1_000"], ["1_000"]),
        (["inf"], ["inf"]),
    ],
)
def test_a_column_is_of_numbers_only_where_writing_them_gives_its_text(written, read, tmp_path):
    path = table(tmp_path / "t.csv", ("id", "x"), list(enumerate(written)))
    assert read_table(path, SourceError).column("x").to_pylist() == read


def test_filters_compare_text_of_a_csv_with_numbers_and_truth_values(tmp_path):
    rows = [("a", "9.50", "true", "001"), ("b", "10.00", "false", "1"), ("c", "", "", "100000")]
    found = read_table(table(tmp_path / "t.csv", ("id", "price", "sold", "code"), rows), SourceError)

    def kept(text: str) -> list[str]:
        return np.array(found["id"])[Filter.parse(text).mask(found)].tolist()

    assert kept("price < 10") == ["a"]
    assert kept("10 <= price") == ["b"]
    assert (kept("sold"), kept("not sold"), kept("sold == False")) == (["a"], ["b"], ["b"])
    assert (kept("code == '1'"), kept("code == '001'")) == (["b"], ["a"])


def test_the_labels_of_vectors_are_as_written(tmp_path):
    codes = ["001", "1", "1E5", "100000"] * 3
    np.save(tmp_path / "codes.npy", np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32))
    table(tmp_path / "codes.csv", ("id", "label"), list(enumerate(codes)))
    assert EmbeddingStore.open(tmp_path / "codes.npy").column("label") == codes


# while it is embedded


def test_the_resume_line_is_a_command_that_exists(clip, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(PICTURES[i])
    source = open_source(tmp_path / "photos")

    def stops(start: int) -> Iterator[SourceItem]:
        yield from list(source.items(start))[:5]
        raise KeyboardInterrupt

    stopped = Source(source.name, True, False, source.signature, stops, 6, is_reopenable=True)
    options = {"out": tmp_path / "a b.store", "batch_size": 1, "workers": 1}
    with pytest.raises(Interrupted, match="to go on, type: msae embed ") as told:
        embed(stopped, encoder=clip, **options)
    command = str(told.value).split("type: msae ")[1]
    with pytest.raises(SystemExit, match="0"):
        main(shlex.split(command))
    assert len(EmbeddingStore.open(tmp_path / "a b.store")) == 6
    with pytest.raises(Interrupted, match=r"type: msae\.embed\('.*photos', encoder=.*, shard_rows=4\)$") as told:
        embed(stopped, encoder=clip, shard_rows=4, **{**options, "out": tmp_path / "b.store"})
    call = str(told.value).split("type: ")[1]
    import msae

    assert len(eval(call, {"msae": msae})) == 6
    assert capsys.readouterr().out.count("6 rows") == 1


class Raw(bytes):
    """Bytes of a picture of which it is counted how many exist."""

    alive = most = 0

    def __init__(self, _: bytes) -> None:
        Raw.alive += 1
        Raw.most = max(Raw.most, Raw.alive)

    def __del__(self) -> None:
        Raw.alive -= 1


def test_pictures_that_wait_are_bounded_by_their_bytes(clip, monkeypatch, tmp_path):
    from msae.data import embed as module

    size = 1 << 16
    monkeypatch.setattr(module, "_BYTES_AHEAD", 8 * size)
    monkeypatch.setattr(module, "_PIECE", 4)

    def read(start: int) -> Iterator[SourceItem]:
        for i in range(start, 96):
            yield SourceItem(str(i), Raw(encoded(i % 6, "PNG") + bytes(size)))

    source = Source("s", True, False, "s", read, 96)
    store = embed(source, encoder=clip, out=tmp_path / "x.store", batch_size=32, workers=2)
    assert len(store) == 96
    assert Raw.most <= 8 + 3 * 4  # what waits, what two threads have just done, and what is being read


NOT_IN_PYTHON = {
    "a year of five digits": (pa.array([10**15, None], pa.timestamp("ms")), "<value out of range: 1000000000000000>"),
    "too long": (pa.array([2**62, None], pa.duration("s")), str(2**62)),
    "in a list": (pa.array([[2**62, 5], None], pa.list_(pa.duration("s"))), f"[ {2**62}, 5 ]"),
    "no such time zone": (pa.array([0, None], pa.timestamp("ms", tz="Nowhere/Land")), "1970-01-01 00:00:00"),
}


@pytest.mark.parametrize("kind", NOT_IN_PYTHON)
def test_what_python_cannot_hold_is_the_text_that_arrow_writes(kind, clip, tmp_path):
    when, text = NOT_IN_PYTHON[kind]
    vectors = pa.array(np.eye(2, 8, dtype=np.float32).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": vectors, "when": when}), tmp_path / "vectors.parquet")
    stores = [EmbeddingStore.open(tmp_path / "vectors.parquet")]
    if kind != "in a list":  # embed keeps no lists
        captions = tmp_path / "captions.parquet"
        pq.write_table(pa.table({"caption": ["a red circle", "a blue star"], "when": when}), captions)
        stores.append(embed(captions, encoder=clip, out=tmp_path / "captions.store"))
    for store in stores:
        found, missing = store.column("when")
        assert found.startswith(text) and missing is None
        assert store.describe_rows([0])[0].columns["when"] == found and repr(store) and store._repr_html_()
        if kind != "in a list":
            assert store.labels("when") == [found, None]
            numbers, names = store.coded_labels("when")
            assert (list(numbers), names) == ([0, -1], [found])
