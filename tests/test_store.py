"""Laws of `EmbeddingStore`: every kind of STORE holds the same rows; a damaged one says so in one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
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

from msae.base.errors import StoreError
from msae.data.store import EmbeddingStore, StorePart, as_store, find_picture, write_store

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


KINDS = [own_store, clip_retrieval, npy_with_csv, npy_with_parquet, parquet, safetensors]


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
    kinds = [own_store, clip_retrieval, parquet, safetensors]
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
    "is not UTF-8": file("h.npy", with_csv(b"label\n" + b"\xff\xfe\n" * N)),
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
    for row in (0, 5, 1234, 2999):
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
