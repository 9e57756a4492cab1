"""Laws of sources: the same samples each time, from any position on; what is wrong is said in one line."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msae.base.errors import SourceError
from msae.data.images import read_picture
from msae.data.sources import Source, SourceItem, open_source
from tests.conftest import needs_posix

N = 9


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 20, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path) -> str:
    for number in range(N):
        file = path / "photos" / f"{'b' if number % 2 else 'a'}" / f"{number}.PNG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    (path / "photos" / "notes.md").write_text("no image")
    (path / "photos" / ".hidden.png").write_bytes(png())
    (path / "photos" / ".thumbnails").mkdir()
    (path / "photos" / ".thumbnails" / "0.png").write_bytes(png())
    return str(path / "photos")


def txt(path: Path) -> str:
    (path / "c.txt").write_bytes("\ufeffa café\r\nline\u2028still the same\n\nlast".encode())
    return str(path / "c.txt")


ROWS = [
    {"id": f"{i:03}", "image_path": f"photos/{i}.png", "caption": f"one\ntwo, {i}", "label": i % 3} for i in range(N)
]


def csv(path: Path) -> str:
    lines = [f'{r["id"]},{r["image_path"]},"{r["caption"]}",{r["label"]}' for r in ROWS]
    (path / "t.csv").write_text("\n".join(["id,image_path,caption,label", *lines]))
    return str(path / "t.csv")


def jsonl(path: Path) -> str:
    (path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path / "t.jsonl")


def parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), path / "t.parquet", row_group_size=4)
    return str(path / "t.parquet")


def tar(path: Path, start: int = 0, stop: int = N) -> Path:
    with tarfile.open(path, "w") as archive:
        for number in range(start, stop):
            record = json.dumps({"label": number % 3, "caption": "not this one", "nested": {"a": 1}})
            members = {"png": png(number), "txt": f"caption {number}".encode(), "json": record.encode()}
            for suffix, data in {**members, "pkl": b"\x80\x04never read."}.items():
                info = tarfile.TarInfo(f"sub/{number:04}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def tar_folder(path: Path) -> str:
    (path / "shards").mkdir()
    tar(path / "shards" / "0.tar", 0, 4)
    tar(path / "shards" / "1.tar", 4, N)
    return str(path / "shards")


def tar_pattern(path: Path) -> str:
    return tar_folder(path) + "/{0..1}.tar"


def dataset(path: Path):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["ant", "bee", "cow"]),
            "vector": datasets.Sequence(datasets.Value("float32")),
        }
    )
    images = [{"bytes": png(i), "path": None} for i in range(N)]
    texts = [f"caption {i}" for i in range(N)]
    columns = {"image": images, "text": texts, "label": [i % 3 for i in range(N)], "vector": [[0.5]] * N}
    return datasets.Dataset.from_dict(columns, features=features)


def hf_saved(path: Path) -> str:
    dataset(path).save_to_disk(path / "saved")
    return f"hf://{path}/saved"


def hf_splits(path: Path) -> str:
    import datasets

    datasets.DatasetDict({"train": dataset(path), "test": dataset(path)}).save_to_disk(path / "splits")
    return f"hf://{path}/splits?split=test"


def hf_streamed(path: Path) -> str:
    (path / "streamed").mkdir()
    dataset(path).to_parquet(path / "streamed" / "part.parquet")
    return f"hf://{path}/streamed?split=train&streaming=1"


KINDS = [folder, txt, csv, jsonl, parquet, tar_folder, tar_pattern, hf_saved, hf_splits, hf_streamed]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(source: Source, start: int = 0) -> list[SourceItem]:
    return list(source.items(start))


@pytest.mark.parametrize("make", KINDS)
def test_a_source_is_the_same_each_time_and_from_any_position(make, tmp_path):
    name = make(tmp_path)
    source, again = open_source(name), open_source(name)
    items = read(source)
    assert source.signature == again.signature
    assert source.total in (None, len(items))
    for start in range(len(items) + 2):
        assert read(again, start) == items[start:]


def test_a_folder_gives_its_images_by_sorted_relative_path(tmp_path):
    items = read(open_source(folder(tmp_path)))
    pictures = [f"a/{i}.PNG" for i in (0, 2, 4, 6, 8)] + [f"b/{i}.PNG" for i in (1, 3, 5, 7)]
    assert [item.id for item in items] == [*pictures, "notes.md"]
    assert all(isinstance(item.image, Path) and item.image.is_file() for item in items)
    with pytest.raises(SourceError, match="not an image"):
        read_picture(items[-1].image)


@needs_posix
def test_linked_folders_are_read_once_and_pipes_are_not_opened(tmp_path):
    root = Path(folder(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(png())
    (root / "0link").symlink_to(tmp_path / "elsewhere")
    (root / "0again").symlink_to(root / "b")  # sorts before the folder itself
    (root / "b" / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "pipe")
    source = open_source(root)
    items = {item.id: item for item in read(source)}
    assert {id.split("/")[0] for id in items} == {"0link", "a", "b", "notes.md", "pipe", "pipe.png"}
    assert len(items) == N + 4
    assert "0again leads to a folder that is read already" in "; ".join(source.notes)
    for pipe in ("pipe.png", "pipe"):
        with pytest.raises(SourceError, match="not an ordinary file"):
            read_picture(items[pipe].image)


def test_a_line_of_text_is_a_caption_and_only_a_newline_ends_it(tmp_path):
    items = read(open_source(txt(tmp_path)))
    assert [(item.id, item.caption) for item in items] == [
        ("0", "a café"),
        ("1", "line\u2028still the same"),
        ("2", ""),
        ("3", "last"),
    ]


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
def test_tables_of_every_kind_give_the_same_samples(make, tmp_path):
    source = open_source(make(tmp_path))
    assert (source.has_images, source.has_captions, source.total) == (True, True, N)
    assert [
        {
            "id": item.id,
            "image_path": str(item.image.relative_to(tmp_path)),
            "caption": item.caption,
            **item.columns,
        }
        for item in read(source)
    ] == ROWS


@pytest.mark.parametrize("make", [tar_folder, tar_pattern])
def test_tar_members_of_one_key_are_one_sample(make, tmp_path):
    source = open_source(make(tmp_path))
    assert (source.has_images, source.has_captions) == (True, True)
    for number, item in enumerate(read(source)):
        wanted = SourceItem(f"sub/{number:04}", png(number), f"caption {number}", {"label": number % 3})
        assert item == wanted


@pytest.mark.parametrize("make", [hf_saved, hf_splits, hf_streamed])
def test_a_dataset_gives_undecoded_images_and_named_labels(make, tmp_path):
    for number, item in enumerate(read(open_source(make(tmp_path)))):
        label = ["ant", "bee", "cow"][number % 3]
        assert item == SourceItem(str(number), png(number), f"caption {number}", {"label": label})


@pytest.mark.parametrize("size", [12_288, 12_800, 12_900, 13_000])  # between, in and after a member's header
def test_a_damaged_shard_costs_its_own_rest_and_no_other_shard(size, tmp_path):
    shards = Path(tar_folder(tmp_path))
    (shards / "0.tar").write_bytes((shards / "0.tar").read_bytes()[:size])
    items = read(open_source(shards))
    damaged = [item for item in items if item.damage]
    assert [item.id for item in damaged] == ["0.tar"]
    assert "damaged shard" in damaged[0].damage
    assert [item.id for item in items[-5:]] == [f"sub/{i:04}" for i in range(4, N)]


def test_ids_come_from_the_id_column_the_path_or_the_row(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\nx.png,1\nx.png,2\n")
    assert [item.id for item in read(open_source(tmp_path / "a.csv"))] == ["x.png", "x.png"]
    (tmp_path / "b.csv").write_text("text\nx\ny\n")
    assert [item.id for item in read(open_source(tmp_path / "b.csv"))] == ["0", "1"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_signature_changes_when_a_picture_that_a_table_lists_is_replaced(suffix, tmp_path):
    (tmp_path / "pictures").mkdir()
    names = [f"pictures/{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png(number))
    table = tmp_path / f"listed.{suffix}"
    if suffix == "csv":
        table.write_text("image_path\n" + "\n".join(names) + "\n")
    elif suffix == "jsonl":
        table.write_text("".join(json.dumps({"image_path": name}) + "\n" for name in names))
    else:
        pq.write_table(pa.table({"image_path": names}), table)
    before = open_source(str(table)).signature
    assert open_source(str(table)).signature == before
    (tmp_path / names[1]).write_bytes(png(7))
    assert open_source(str(table)).signature != before


def test_the_signature_changes_when_samples_do(tmp_path):
    name = folder(tmp_path)
    before = open_source(name).signature
    (Path(name) / "z.png").write_bytes(png())
    assert open_source(name).signature != before
    (tmp_path / "c.txt").write_text("a\nb\n")
    one = open_source(tmp_path / "c.txt").signature
    (tmp_path / "c.txt").write_text("b\na\n")
    assert open_source(tmp_path / "c.txt").signature != one


def write(name: str, content: str | bytes):
    def make(path: Path) -> str:
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path / name)

    return make


def empty_tar(path: Path) -> str:
    return str(tar(path / "x.tar", 0, 0))


BAD = {
    "does not exist; did you mean 'photos'": lambda path: folder(path)[:-1],
    "has no images in it; wanted": lambda path: path,
    "has no images in it but x.csv; give one such file": lambda path: Path(write("x.csv", "text\na\n")(path)).parent,
    "00000.parquet is no readable parquet file": lambda path: Path(write("00000.parquet", b"x")(path)).parent,
    "is no source; give the folder that it is in": write("x.jpg", b"x"),
    "is no source; wanted a folder of images": write("x.docx", b"x"),
    "is empty; wanted one caption a line": write("x.txt", ""),
    "is not UTF-8 (byte 2)": write("x.txt", b"ab\xff"),
    "is not UTF-8; save the file as UTF-8": write("x.csv", b"text,label\n\xea\xee\xf2,1\n"),
    "x.csv is not UTF-8": write("x.csv", b"text\na \x81\n"),
    "cannot be read as csv (CSV parse error: Row #3: Expected 2": write("x.csv", "text,label\na,1\nb\n"),
    "is opened and never closed": write("x.csv", 'text,label\n"a,1\nb,2\n'),
    "two columns of one name": write("x.csv", "text,a, a\na,1,2\n"),
    "column 'image' of": write("x.csv", "image,text\nhttp://x.org/1.jpg,a\n"),
    "holds web addresses": write("x.csv", "URL,TEXT\nhttp://x.org/1.jpg?a=1,a\n"),
    "several columns of images: left, right": write("x.csv", "left,right,text\na.png,b.png,a\n"),
    "line 2: Expecting": write("x.jsonl", '{"text": "a"}\n{"text": \n'),
    "record 2 is a list; wanted objects": write("x.jsonl", '{"text": "a"}\n[1]\n'),
    "the file is empty": write("y.csv", ""),
    "has no rows": write("z.csv", "text\n"),
    "wanted one of image_path, path, image, file, file_name": write("x.csv", "a,b\n1,2\n"),
    "did you mean 'caption'": write("x.csv", "captoin\nx\n"),
    "cannot be read as jsonl": write("x.jsonl", "{not json}"),
    "is no readable parquet file": write("x.parquet", b"PAR1"),
    "holds no samples": empty_tar,
    "0.tar does not exist": lambda path: str(path / "{0..2}.tar"),
    "cannot be loaded": lambda path: f"hf://{path}?split=train",
    "does not exist; wanted a dataset": lambda path: f"hf://{path}/nothing",
    "unknown option 'splt'; did you mean 'split'": lambda path: hf_saved(path) + "?splt=train",
    "has the splits train, test; give one, such as hf:///": lambda path: hf_splits(path).split("?")[0],
    "has no column 'img'; did you mean 'image'?": lambda path: hf_saved(path) + "?image=img",
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_source_is_one_line_that_says_what_was_found_and_wanted(message, tmp_path):
    source = BAD[message](tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(SourceError) as caught:
        open_source(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before
