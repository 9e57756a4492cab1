"""Laws of `EmbeddingStore`: every kind of STORE holds the same rows; a damaged one says so in one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from msae.base.errors import MissingDependencyError, StoreError
from msae.data.rows import find_picture
from msae.data.store import EmbeddingStore, StorePart, as_store, write_store

N, D = 25, 6


def embeddings(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, D)).astype(np.float16)


IMAGE, TEXT = embeddings(1), embeddings(2)
TABLE = pa.table(
    {
        "id": [f"row/{i}" for i in range(N)],
        "image_path": [f"{i}.png" for i in range(N)],
        "caption": [f"a line\nand another, {i}" for i in range(N)],
        "label": [i % 3 for i in range(N)],
    }
)


def part(start: int = 0, stop: int = N) -> StorePart:
    return StorePart({"image": IMAGE[start:stop], "text": TEXT[start:stop]}, TABLE[start:stop])


def own_store(folder: Path) -> Path:
    path = folder / "own.store"
    write_store(path, [part()], shard_rows=10, record={"encoder": "tiny", "encoder_revision": "r1"})
    return path


def clip_retrieval(folder: Path) -> Path:
    """Written as clip-retrieval writes it, with more than ten shards so that the order of numbers matters."""
    path = folder / "clip-retrieval"
    for name, array in [("img_emb", IMAGE), ("text_emb", TEXT)]:
        (path / name).mkdir(parents=True)
        for number in range(13):
            np.save(path / name / f"{name}_{number}.npy", array[2 * number : 2 * number + 2])
    (path / "metadata").mkdir()
    for number in range(13):
        pq.write_table(TABLE[2 * number : 2 * number + 2], path / "metadata" / f"metadata_{number}.parquet")
    return path


def npy_with_csv(folder: Path) -> Path:
    np.save(folder / "plain.npy", IMAGE)
    pyarrow.csv.write_csv(TABLE, folder / "plain.csv")
    return folder / "plain.npy"


def npy_with_parquet(folder: Path) -> Path:
    np.save(folder / "plain2.npy", IMAGE)
    pq.write_table(TABLE, folder / "plain2.parquet")
    return folder / "plain2.npy"


def parquet(folder: Path) -> Path:
    path = folder / "columns.parquet"
    columns = {"image_embedding": list(IMAGE), "text_embedding": list(TEXT)}
    table = TABLE
    for name, rows in columns.items():
        table = table.append_column(name, pa.array(rows, pa.list_(pa.float16())))
    pq.write_table(table, path)
    return path


def safetensors(folder: Path) -> Path:
    save_file({"image": IMAGE, "text": TEXT}, folder / "both.safetensors")
    pyarrow.csv.write_csv(TABLE, folder / "both.csv")
    return folder / "both.safetensors"


def npz(folder: Path) -> Path:
    """Embeddings and columns in one archive, as `numpy.savez` writes them."""
    columns = {name: np.array(TABLE[name].to_pylist()) for name in TABLE.column_names}
    np.savez(folder / "archive.npz", image=IMAGE, text=TEXT, **columns)
    return folder / "archive.npz"


def npz_with_csv(folder: Path) -> Path:
    np.savez_compressed(folder / "beside.npz", embeddings=IMAGE, label=np.zeros(N))
    pyarrow.csv.write_csv(TABLE, folder / "beside.csv")
    return folder / "beside.npz"


KINDS = [own_store, clip_retrieval, npy_with_csv, npy_with_parquet, parquet, safetensors, npz, npz_with_csv]


@pytest.mark.parametrize("make", KINDS)
def test_every_kind_of_store_holds_the_same_rows_ids_and_columns(make, tmp_path):
    store = EmbeddingStore.open(make(tmp_path))
    assert (len(store), store.d_in, store.modalities[0]) == (N, D, "image")
    for modality in store.modalities:
        wanted = {"image": IMAGE, "text": TEXT}[modality].astype(np.float32)
        assert np.array_equal(np.concatenate(list(store.batches(modality, 7))), wanted)
        rows = np.array([24, 0, 0, 11, 10, 9], dtype=np.int64)
        taken = store.take(rows, modality)
        assert taken.dtype == np.float32
        assert np.array_equal(taken, wanted[rows])
    assert list(store.ids) == TABLE["id"].to_pylist()
    assert store.ids[-1] == "row/24"
    assert store.ids.row_of("row/7") == 7
    assert store.column("label") == TABLE["label"].to_pylist()
    assert store.metadata.select(TABLE.column_names).to_pylist() == TABLE.to_pylist()
    assert as_store(store) is store


def test_the_fingerprint_is_of_the_rows_and_not_of_their_files(tmp_path):
    kinds = [own_store, clip_retrieval, parquet, safetensors, npz]
    assert len({EmbeddingStore.open(make(tmp_path)).fingerprint for make in kinds}) == 1
    changed = IMAGE.copy()
    changed[N // 2, 3] += 1
    save_file({"image": changed, "text": TEXT}, tmp_path / "changed.safetensors")
    assert as_store(tmp_path / "changed.safetensors").fingerprint != as_store(safetensors(tmp_path)).fingerprint


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(0, N), max_size=4),
    shard_rows=st.integers(1, N + 3),
    batch_size=st.integers(1, N + 3),
    start=st.integers(0, N - 1),
)
def test_neither_parts_nor_shards_nor_batches_change_a_row(tmp_path_factory, cuts, shard_rows, batch_size, start):
    path = tmp_path_factory.mktemp("store") / "s.store"
    edges = [0, *sorted(cuts), N]
    parts = [part(first, last) for first, last in itertools.pairwise(edges)]
    store = write_store(path, parts, shard_rows=shard_rows)
    assert np.array_equal(np.concatenate(list(store.batches("text", batch_size, start=start))), TEXT[start:])
    assert store.metadata.to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_of_every_float_type_read_as_torch_reads_them(dtype, tmp_path):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch_file({"embeddings": x, "scale": torch.ones(3)}, tmp_path / "x.safetensors")
    store = as_store(tmp_path / "x.safetensors")
    assert np.array_equal(store.take(np.arange(N), "image"), x.float().numpy())
    assert store.describe()["dtype"] == str(dtype).removeprefix("torch.")


def test_big_endian_and_column_major_arrays_read_like_any_other(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(IMAGE.astype(">f4")))
    store = as_store(tmp_path / "x.npy")
    assert np.array_equal(store.take(np.arange(N), "image"), IMAGE.astype(np.float32))
    np.save(tmp_path / "y.npy", IMAGE.astype("<f4"))
    assert store.fingerprint == as_store(tmp_path / "y.npy").fingerprint


def test_embeddings_stay_on_disk(tmp_path):
    for make in (own_store, clip_retrieval, npy_with_csv, safetensors):
        for rows in EmbeddingStore.open(make(tmp_path)).rows.values():
            assert all(isinstance(shard.values, np.memmap) for shard in rows.shards)


@pytest.mark.parametrize(
    ("columns", "modality"),
    [
        ("id,text", "text"),
        ("caption", "text"),
        ("caption,label", "image"),
        ("text,image_path", "image"),
        ("id", "image"),
    ],
)
def test_a_plain_file_is_text_where_it_has_captions_and_neither_images_nor_labels(columns, modality, tmp_path):
    np.save(tmp_path / "x.npy", IMAGE[:1])
    (tmp_path / "x.csv").write_text(f"{columns}\n{','.join('a' for _ in columns.split(','))}\n")
    assert as_store(tmp_path / "x.npy").modalities == (modality,)
    other = {"text": "image", "image": "text"}[modality]
    assert as_store(tmp_path / "x.npy", other).modalities == (other,)


def captioned(path: Path, columns: str = "id,caption") -> Path:
    np.save(path, IMAGE)
    rows = "".join(f"{i}," + ",".join("a cat" for _ in columns.split(",")[1:]) + "\n" for i in range(N))
    path.with_suffix(".csv").write_text(f"{columns}\n{rows}")
    return path


def test_a_guess_from_captions_is_said_in_one_line_and_the_option_settles_it(tmp_path, caplog):
    path = captioned(tmp_path / "captioned.npy")
    assert as_store(path).modalities == ("text",)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: its rows are taken for text embeddings (column 'caption', no image paths, no labels); "
        f"if they are not, give --modality image or write 'image' into the file's name"
    ]
    caplog.clear()
    assert as_store(path, "image").modalities == ("image",)
    assert as_store(captioned(tmp_path / "x.npy", "id,image_path,caption")).modalities == ("image",)
    assert not caplog.records
    assert as_store(captioned(tmp_path / "y.npy", "id,caption,label")).modalities == ("image",)
    assert "taken for image embeddings" in caplog.text and "--modality text" in caplog.text


def test_what_the_caller_knows_of_unnamed_rows_comes_before_the_guess_and_after_the_name(tmp_path, caplog):
    assert as_store(captioned(tmp_path / "x.npy"), unnamed="image").modalities == ("image",)
    assert as_store(captioned(tmp_path / "texts.npy"), unnamed="image").modalities == ("text",)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("image", "image"),
        ("my_img-2", "image"),
        ("coco.images.train", "image"),
        ("trainImages", "image"),
        ("text", "text"),
        ("TXT_emb", "text"),
        ("clip_text_embeddings", "text"),
    ],
)
def test_the_file_name_counts_before_a_guess(name, modality, tmp_path, caplog):
    path = captioned(tmp_path / f"{name}.npy")
    assert as_store(path).modalities == (modality,) and not caplog.records
    other = {"text": "image", "image": "text"}[modality]
    assert as_store(path, other).modalities == (other,)


@pytest.mark.parametrize("name", ["context", "imagenet", "image_text", "captioned"])
def test_a_file_name_that_names_no_modality_or_both_leaves_the_guess(name, tmp_path, caplog):
    assert as_store(captioned(tmp_path / f"{name}.npy")).modalities == ("text",)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("key", ["embeddings", "image_embeds", "image_embeddings", "arr_0", "anything"])
def test_an_archive_is_opened_by_known_names_or_by_its_only_table(key, tmp_path):
    np.savez(tmp_path / "a.npz", **{key: IMAGE, "mask": np.ones((N, 2), bool), "scale": np.ones(3)})
    store = as_store(tmp_path / "a.npz")
    assert np.array_equal(store.take(np.arange(N), "image"), IMAGE.astype(np.float32))
    assert (store.kind, store.modalities, store.columns) == ("npz", ("image",), ())


def test_the_metadata_of_an_archive_have_a_fingerprint_of_their_own(tmp_path):
    found = []
    for label in ("a", "b"):
        np.savez(tmp_path / "a.npz", embeddings=IMAGE, label=np.full(N, label))
        store = as_store(tmp_path / "a.npz")
        assert store.labels("label") == [label] * N
        found.append((store.fingerprint, store.metadata_fingerprint))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_the_names_of_transformers_are_the_two_modalities(tmp_path):
    columns = {"image_embeds": list(IMAGE), "text_embeds": list(TEXT)}
    lists = {name: pa.array(rows, pa.list_(pa.float16())) for name, rows in columns.items()}
    pq.write_table(pa.table(lists), tmp_path / "a.parquet")
    save_file({"image_embeds": IMAGE, "text_embeds": TEXT}, tmp_path / "b.safetensors")
    np.savez(tmp_path / "c.npz", image_embeds=IMAGE, text_embeds=TEXT)
    for name in ("a.parquet", "b.safetensors", "c.npz"):
        store = as_store(tmp_path / name)
        assert store.modalities == ("image", "text") and not store.columns
        assert np.array_equal(store.take(np.arange(N), "text"), TEXT.astype(np.float32))


def test_rows_of_zeros_are_counted_in_one_line(tmp_path, caplog):
    x = IMAGE.copy()
    x[5::10] = 0
    x[3, 0] = 0
    np.save(tmp_path / "x.npy", x)
    store = as_store(tmp_path / "x.npy")
    for _ in range(2):
        assert np.array_equal(np.concatenate(list(store.batches("image", 7))), x.astype(np.float32))
    (record,) = caplog.records
    assert "2 of 25 image rows are all zeros, the first is row 5 (id '5')" in record.getMessage()
    caplog.clear()
    np.save(tmp_path / "y.npy", IMAGE)
    list(as_store(tmp_path / "y.npy").batches("image", 7))
    assert not caplog.records


def test_labels_are_text_in_every_kind_of_file_and_blank_ones_are_missing(tmp_path):
    written = ["001", "1", "1E5", "100000", "", " ", "NaN", "nan", "None"]
    wanted = ["001", "1", "1E5", "100000", None, None, None, None, "None"]
    x = IMAGE[: len(written)]
    pq.write_table(
        pa.table({"embedding": pa.array(list(x), pa.list_(pa.float16())), "label": written}), tmp_path / "a.parquet"
    )
    np.savez(tmp_path / "a.npz", embeddings=x, label=np.array(written))
    for suffix in ("parquet", "npz"):
        assert as_store(tmp_path / f"a.{suffix}").labels("label") == wanted
    numbers = pa.array([1, 2, None, 1, 2, 1, 2, 1, 2])
    floats = pa.array([0.5, float("nan"), None, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    lists = pa.array([[1]] * 9)
    pq.write_table(pa.table({"n": numbers, "f": floats, "tags": lists}), tmp_path / "b.parquet")
    np.save(tmp_path / "b.npy", x)
    store = as_store(tmp_path / "b.npy")
    assert store.labels("n")[:4] == ["1", "2", None, "1"] and store.column("n")[0] == 1
    assert store.labels("f")[:4] == ["0.5", None, None, "1.0"]
    with pytest.raises(StoreError, match=r"column 'tags' of .* holds lists"):
        store.labels("tags")


def test_a_store_gives_its_rows_one_by_one(tmp_path):
    store = EmbeddingStore.open(own_store(tmp_path))
    row = store[3]
    assert (row.id, row.path, row.caption, row.columns) == ("row/3", "3.png", "a line\nand another, 3", {"label": 0})
    assert repr(row) == "Row(3, id='row/3', image_path='3.png', caption='a line\\nand another, 3', label=0)"
    assert store[-1].id == "row/24" and [row.id for row in store[20:22]] == ["row/20", "row/21"]
    assert [row.row for row in store] == list(range(N))
    with pytest.raises(IndexError):
        store[N]
    assert repr(store) == (
        f"EmbeddingStore('{store.path}': 25 rows of 6 numbers (float16) for image and text; "
        f"columns id, image_path, caption, label; embedded by tiny)"
    )


def test_a_row_whose_values_are_missing_shows_none_of_them(tmp_path):
    table = pa.table({"caption": [float("nan"), 1.5], "label": [float("nan"), 2.0], "note": ["x" * 300, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    np.save(tmp_path / "x.npy", IMAGE[:2])
    row = as_store(tmp_path / "x.npy")[0]
    assert (row.caption, row.columns["label"], row.words) == (None, None, "0")
    assert len(repr(row)) < 150 and "nan" not in repr(row)


def test_the_metadata_are_a_pandas_table(tmp_path):
    pytest.importorskip("pandas")
    table = EmbeddingStore.open(own_store(tmp_path)).to_pandas()
    assert list(table.columns) == TABLE.column_names and table["id"][3] == "row/3" and len(table) == N


def test_without_pandas_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="type: pip install pandas"):
        EmbeddingStore.open(own_store(tmp_path)).to_pandas()


def test_without_metadata_a_row_is_named_by_its_number(tmp_path):
    np.save(tmp_path / "x.npy", IMAGE)
    store = as_store(tmp_path / "x.npy")
    assert list(store.ids) == [str(i) for i in range(N)]
    assert store.metadata.column_names == ["id"]
    assert store.column("id")[3] == "3"


def test_ids_are_text_and_a_repeated_one_is_numbered(tmp_path):
    np.save(tmp_path / "x.npy", IMAGE[:4])
    (tmp_path / "x.csv").write_text("id,label\n007,a\n007,b\n8,c\n007,d\n")
    store = as_store(tmp_path / "x.npy")
    assert list(store.ids) == ["007", "007#2", "8", "007#3"] == store.column("id")
    assert store.ids.row_of("007#3") == 3


def test_a_row_that_is_not_finite_is_named_when_it_is_read(tmp_path):
    for bad in (np.nan, np.inf):
        x = IMAGE.copy()
        x[17, 2] = bad
        np.save(tmp_path / "x.npy", x)
        store = as_store(tmp_path / "x.npy")
        assert np.array_equal(store.take(np.arange(17), "image"), IMAGE[:17])
        with pytest.raises(StoreError, match=r"row 17 \(id '17'\) of the image embeddings"):
            store.take(np.array([3, 17, 2]), "image")
        with pytest.raises(StoreError, match="row 17 "):
            list(store.batches("image", 5, start=2))


def damaged(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = own_store(folder)
        change(path)
        return path

    return make


def file(name: str, write: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name

    return make


def edit_json(path: Path, **changes: object) -> None:
    record = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**record, **changes}))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(size)


def two_shards(path: Path, a: np.ndarray, b: np.ndarray, folder: str = "img_emb") -> None:
    (path / "img_emb").mkdir(parents=True)
    (path / folder).mkdir(exist_ok=True)
    np.save(path / "img_emb" / "img_emb_0.npy", a)
    np.save(path / folder / f"{folder}_{int(folder == 'img_emb')}.npy", b)


def with_csv(text: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        np.save(path, IMAGE)
        path.with_suffix(".csv").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def unfinished(path: Path) -> None:
    (path / ".partial").mkdir(parents=True)
    (path / ".partial" / "state.json").write_text('{"command": "msae embed photos --out x.store"}')


def swap_rows(path: Path) -> None:
    shard = path / "img_emb" / "img_emb_0.npy"
    np.save(shard, np.load(shard)[::-1])


def ragged(path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [3.0]]}), path)


BAD = {
    "does not exist; did you mean 'own.store'": lambda folder: own_store(folder).parent / "own.stor",
    "is no store: neither img_emb/ nor text_emb/": file("empty", Path.mkdir),
    "unfinished: embedding was interrupted; to go on, type: msae embed photos": file("x.store", unfinished),
    "is an empty store": file("e", lambda p: (p / "img_emb").mkdir(parents=True)),
    "store.json is not readable JSON": damaged(lambda p: (p / "store.json").write_text("{")),
    "has schema version 9": damaged(lambda p: edit_json(p, schema_version=9)),
    "is damaged: its d_in is 6 where store.json says 7": damaged(lambda p: edit_json(p, d_in=7)),
    "is damaged: its fingerprint": damaged(swap_rows),
    "img_emb_1.npy is truncated": damaged(lambda p: truncate(p / "img_emb" / "img_emb_1.npy", 200)),
    "img_emb_2.npy is empty (0 bytes)": damaged(lambda p: truncate(p / "img_emb" / "img_emb_2.npy", 0)),
    "25 image rows but 15 metadata rows": damaged(lambda p: (p / "metadata" / "metadata_1.parquet").unlink()),
    "25 image rows but 15 text rows": damaged(lambda p: (p / "text_emb" / "text_emb_1.npy").unlink()),
    "metadata_0.parquet is no readable parquet": damaged(lambda p: truncate(p / "metadata" / "metadata_0.parquet", 99)),
    "is 5 wide (float16) but img_emb_0.npy is 6 wide": file("w", lambda p: two_shards(p, IMAGE, IMAGE[:, :5])),
    "different widths: 6 (image) and 5 (text)": file("v", lambda p: two_shards(p, IMAGE, IMAGE[:, :5], "text_emb")),
    "shape (25,); wanted two dimensions": file("a.npy", lambda p: np.save(p, IMAGE[:, 0])),
    "holds int64; wanted float16": file("b.npy", lambda p: np.save(p, IMAGE.astype(np.int64))),
    "object: pickled, never opened": file("c.npy", lambda p: np.save(p, np.array([[{}]]), allow_pickle=True)),
    "is a Python pickle": file("d.npy", lambda p: p.write_bytes(pickle.dumps([1]))),
    "is a zip archive": file("d2.npy", lambda p: p.write_bytes(b"PK\x03\x04")),
    "has no NumPy header": file("raw_25_6.npy", lambda p: IMAGE.astype(np.float32).tofile(p)),
    "reshape(25, 6)": file("two_25_6.npy", lambda p: IMAGE.astype(np.float32).tofile(p)),
    "is empty: an array of shape (0, 6)": file("e.npy", lambda p: np.save(p, IMAGE[:0])),
    "cannot be read as .npy": file("f.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x20\x00garbage")),
    "25 image rows but 2 metadata rows": file("g.npy", with_csv("id\na\nb\n")),
    "is not UTF-8": file("h.npy", with_csv(b"label\n" + b"\xea\xee\xf2\n" * N)),
    "cannot be read as csv": file("i.npy", with_csv("a,b\n1\n")),
    "the file is empty": file("j.npy", with_csv("")),
    "two columns of one name": file("k.npy", with_csv("a,a\n" + "1,2\n" * N)),
    "bytes hold no whole header": file("a.safetensors", lambda p: p.write_bytes(b"\x00")),
    "no readable safetensors file": file("b.safetensors", lambda p: p.write_bytes(b"\x02" + b"\x00" * 7 + b"[]")),
    "tensor 'x' ends beyond the file": file(
        "c.safetensors", lambda p: (save_file({"x": IMAGE}, p), truncate(p, p.stat().st_size - 1))
    ),
    "wanted 'embeddings', or 'image' and 'text'": file(
        "d.safetensors", lambda p: save_file({"x": IMAGE, "y": TEXT}, p)
    ),
    "has 0 columns of float lists": file("a.parquet", lambda p: pq.write_table(TABLE, p)),
    "rows of different lengths": file("b.parquet", ragged),
    "is no readable parquet file": file("c.parquet", lambda p: p.write_bytes(b"PAR1")),
    "a.npz cannot be read as .npz": file("a.npz", lambda p: p.write_bytes(b"PK\x03\x04garbage")),
    "b.npz cannot be read as .npz": file("b.npz", lambda p: p.write_bytes(pickle.dumps([1]))),
    "cannot be read as .npz (Object arrays cannot be loaded": file(
        "c.npz", lambda p: np.savez(p, embeddings=np.array([[{}]], dtype=object))
    ),
    "has 2 two-dimensional arrays: x, y": file("d.npz", lambda p: np.savez(p, x=IMAGE, y=TEXT)),
    "holds int64": file("e.npz", lambda p: np.savez(p, embeddings=IMAGE.astype(np.int64))),
    "e2.npz is empty": file("e2.npz", lambda p: np.savez(p, embeddings=IMAGE[:0])),
    "f.npz has 0 two-dimensional arrays": file("f.npz", lambda p: zipfile.ZipFile(p, "w").close()),
    "column 'embedding' of": file("j.parquet", lambda p: pq.write_table(pa.table({"embedding": ["[1, 2]"]}), p)),
    "widths: 6 (image) and 5 (text)": file("g.npz", lambda p: np.savez(p, image=IMAGE, text=TEXT[:, :5])),
    "25 image rows but 24 text rows": file("h.npz", lambda p: np.savez(p, image=IMAGE, text=TEXT[:-1])),
    "has the unknown suffix '.pt'": file("x.pt", lambda p: p.write_bytes(b"x")),
}


@pytest.mark.parametrize("message", BAD)
def test_a_damaged_store_is_one_line_that_says_what_was_found_and_wanted(message, tmp_path):
    path = BAD[message](tmp_path)
    with pytest.raises(StoreError) as caught:
        assert EmbeddingStore.open(path).fingerprint
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_row_enters_the_fingerprint(tmp_path):
    x = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    before = as_store(tmp_path / "x.npy").fingerprint
    for row in (0, 5, 1230, 2999):
        changed = x.copy()
        changed[row, 2] += 1
        np.save(tmp_path / "x.npy", changed)
        assert as_store(tmp_path / "x.npy").fingerprint != before, row
    np.save(tmp_path / "x.npy", x)
    assert as_store(tmp_path / "x.npy").fingerprint == before


def test_the_fingerprint_is_the_hash_that_the_format_defines(tmp_path):
    digest = hashlib.blake2b(b"image:25:6:float16;" + IMAGE.tobytes(), digest_size=20)
    digest.update(b"text:25:6:float16;" + TEXT.tobytes())
    assert as_store(own_store(tmp_path)).fingerprint == digest.hexdigest()


def test_metadata_have_a_fingerprint_of_their_own(tmp_path):
    np.save(tmp_path / "x.npy", IMAGE)
    (tmp_path / "x.csv").write_text("label\n" + "a\n" * N)
    before = as_store(tmp_path / "x.npy")
    found = before.fingerprint, before.metadata_fingerprint
    (tmp_path / "x.csv").write_text("label\n" + "b\n" * N)  # as long as before
    after = as_store(tmp_path / "x.npy")
    assert after.fingerprint == found[0]
    assert after.metadata_fingerprint != found[1]


def test_a_store_with_the_fingerprint_of_256_rows_opens_and_is_hashed_anew(tmp_path):
    path = own_store(tmp_path)
    wanted = as_store(path).fingerprint
    edit_json(path, fingerprint="f" * 32)
    assert as_store(path).fingerprint == wanted


def test_what_a_store_lacks_is_named_with_what_it_has(tmp_path):
    store = as_store(npy_with_csv(tmp_path))
    with pytest.raises(StoreError, match="has no text embeddings, only image"):
        next(store.batches("text", 4))
    with pytest.raises(StoreError, match="has no text embeddings"):
        as_store(own_store_of_images(tmp_path), "text")
    with pytest.raises(StoreError, match="has no column 'labl'; did you mean 'label'"):
        store.column("labl")
    with pytest.raises(StoreError, match=r"row 25 is asked of .* rows 0 to 24"):
        store.take(np.array([25]), "image")
    with pytest.raises(StoreError, match="no row with the id 'row/99'; did you mean"):
        store.ids.row_of("row/99")
    with pytest.raises((StoreError, TypeError), match="txt"):  # a TypeError where types are checked
        EmbeddingStore.open(store.path, modality="txt")


def own_store_of_images(folder: Path) -> EmbeddingStore:
    return write_store(folder / "images.store", [StorePart({"image": IMAGE}, TABLE)])


def test_an_empty_store_is_not_written(tmp_path):
    with pytest.raises(StoreError, match="empty"):
        write_store(tmp_path / "none.store", [part(0, 0)])
    assert not (tmp_path / "none.store" / "store.json").exists()


def test_rows_are_described_with_picture_caption_and_the_rest(tmp_path):
    rows = EmbeddingStore.open(own_store(tmp_path)).describe_rows([20, 3])
    assert [(row.row, row.id, row.path) for row in rows] == [(20, "row/20", "20.png"), (3, "row/3", "3.png")]
    assert rows[1].caption == "a line\nand another, 3"
    assert rows[1].columns == {"label": 0}


def test_a_picture_is_found_in_the_first_folder_that_has_it_and_never_above(tmp_path):
    inside = tmp_path / "photos"
    inside.mkdir()
    for file in (inside / "a.png", tmp_path / "secret.png"):
        file.touch()
    roots = (tmp_path / "nowhere", inside)
    assert find_picture("a.png", roots) == inside / "a.png"
    assert find_picture(str(inside / "a.png"), roots) == inside / "a.png"
    for path in (None, "b.png", "../secret.png", "x/../../secret.png", "."):
        assert find_picture(path, roots) is None


def test_an_error_is_one_line_whatever_the_names_in_a_file(tmp_path):
    np.save(tmp_path / "x.npy", IMAGE)
    pq.write_table(pa.table({"a\nb": ["x"] * N}), tmp_path / "x.parquet")
    with pytest.raises(StoreError) as caught:
        as_store(tmp_path / "x.npy").column("zzzzzz")
    assert "it has a b" in str(caught.value)
