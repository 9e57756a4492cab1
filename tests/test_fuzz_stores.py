"""Stores as they should not be: whatever lies there ends in a result with all rows accounted for, or in one line."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from msae.base.errors import MsaeError
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.measure.evaluate import evaluate
from msae.sae.model import SAE, SAEConfig
from msae.use.audit.subjects import refused_columns, target_columns

ODD_TEXT = [
    "",
    " ",
    "a",
    "b",
    "nan",
    "<NA>",
    "001",
    "1",
    "1E5",
    "é",
    "a\nb",
    "a,b",
    '"',
    "\u2028",
    "=1",
    "../x",
    "\x00",
    "🦊",
]
NAMES = [
    *("id", "key", "label", "caption", "text", "image_path", "path", "image", "embedding", "image_embeds", "emb"),
    *("", " ", "a b", "Label", "é", "#1", "row", "class", "constructor"),
]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # the failing example is small enough without shrinking
TABLE_SHAPES = st.tuples(st.sampled_from([24, 24, 23, 20, 2, 1]), st.sampled_from([4, 5, 2, 1]))
ANY_SPEED = {"deadline": None, "phases": PHASES, "suppress_health_check": list(HealthCheck)}


def column_values(n: int) -> st.SearchStrategy[pa.Array]:
    """A metadata column of one of the types that tables have; every other one is of a few classes with gaps."""

    def of(values: st.SearchStrategy[Any], kind: pa.DataType | None = None) -> st.SearchStrategy[pa.Array]:
        rows = st.lists(st.none() | values, min_size=n, max_size=n)
        return rows.map(lambda found: pa.array(found, kind) if kind else pa.array(found))

    text = st.sampled_from(ODD_TEXT)
    few = st.integers(0, 9).map(lambda seed: classes(n, seed))
    other = st.one_of(
        of(text, pa.string()),
        of(text, pa.large_string()),
        of(text, pa.string()).map(lambda column: column.dictionary_encode()),
        of(st.integers(-(2**63), 2**63 - 1), pa.int64()),
        of(st.sampled_from([0, 1]), pa.int8()),
        of(st.floats(width=32), pa.float64()),
        of(st.booleans(), pa.bool_()),
        of(st.dates(datetime.date(1, 1, 1)), pa.date32()),
        of(st.datetimes(), pa.timestamp("us")),
        of(st.decimals(-1000, 1000, places=2).map(decimal.Decimal), pa.decimal128(12, 2)),
        of(st.binary(max_size=4), pa.binary()),
        of(st.lists(text, max_size=2), pa.list_(pa.string())),
        of(st.lists(st.floats(width=32), min_size=2, max_size=2), pa.list_(pa.float32())),
        of(st.fixed_dictionaries({"path": text}), pa.struct([("path", pa.string())])),
        st.just(pa.nulls(n)),
    )
    return st.one_of(few, other)


def classes(n: int, seed: int) -> pa.Array:
    """A column of two to four classes in which some rows have none, of a type that the seed chooses."""
    rng = np.random.default_rng(seed)
    values, gap = [
        (["a", "é", "001", "a,b"], " "),
        (["1", "1E5", "=1", '"'], None),
        ([0, 1, 2, 3], None),
        ([0.0, 0.5, 1.0, 2.0], float("nan")),
    ][seed % 4]
    return pa.array([values[rng.integers(2 + seed % 3)] if rng.random() < 0.8 else gap for _ in range(n)])


@st.composite
def tables(draw: st.DrawFn, n: int) -> pa.Table:
    """Metadata of `n` rows, or now and then of another number."""
    n += draw(st.sampled_from([0] * 10 + [1, -1]))
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    return pa.table({name: draw(column_values(n)) for name in names})


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Rows of numbers, some of them zero, huge, NaN, or no floats at all."""
    shape = draw(TABLE_SHAPES)
    dtype = draw(st.sampled_from(["float32"] * 12 + ["float16", "float64", ">f4", "int64", "bool", "complex64"]))
    x = np.random.default_rng(draw(st.integers(0, 9))).normal(size=shape)
    odd = draw(st.sampled_from([None] * 10 + [0.0, np.nan, np.inf, 1e30, 1e-30, 1e300]))
    if odd is not None:
        x[draw(st.integers(0, shape[0] - 1))] = odd
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    return draw(st.sampled_from([x] * 12 + [x[:, 0], x[:, :0], x[None], np.asfortranarray(x)]))


def write_npy(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    np.save(path / "x.npy", x)
    return path / "x.npy"


def write_npz(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    columns = {}
    for number, column in enumerate(table.columns):
        if not pa.types.is_nested(column.type):
            columns[f"column_{number}"] = np.array([str(value) for value in column.to_pylist()])
    np.savez(path / "x.npz", embeddings=x, mask=np.ones(3), **columns)
    return path / "x.npz"


def write_safetensors(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    native = np.ascontiguousarray(x.astype(x.dtype.newbyteorder("=")))
    save_file({"image_embeds": native}, path / "x.safetensors")
    return path / "x.safetensors"


def write_parquet(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    lists = pa.array([row.tolist() for row in np.atleast_2d(np.squeeze(x.real)).astype(float)], pa.list_(pa.float32()))
    if "image_embeds" not in table.column_names and (table.num_rows == len(lists) or not table.num_columns):
        columns = dict(zip(table.column_names, table.columns, strict=True))
        table = pa.table({**columns, "image_embeds": lists})
    pq.write_table(table, path / "x.parquet")
    return path / "x.parquet"


def write_folder(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    for name in ("img_emb", "metadata"):
        (path / "x" / name).mkdir(parents=True)
    np.save(path / "x" / "img_emb" / "img_emb_0.npy", x)
    pq.write_table(table, path / "x" / "metadata" / "metadata_0.parquet")
    return path / "x"


def write_own(path: Path, x: np.ndarray, table: pa.Table) -> Path:
    if x.ndim == 2 and x.dtype.kind == "f" and table.num_rows == len(x):
        write_store(path / "x", [StorePart({"image": x}, table)], shard_rows=3)
    else:
        (path / "x").mkdir()
    return path / "x"


WRITERS: list[Callable[[Path, np.ndarray, pa.Table], Path]] = [
    *(write_npy, write_npz, write_safetensors, write_parquet, write_folder, write_own)
]


def write_beside(store: Path, table: pa.Table, kind: str) -> None:
    if kind == "csv":
        plain = [
            pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
            for column in table.columns
        ]
        pyarrow.csv.write_csv(pa.table(plain, table.column_names), store.with_suffix(".csv"))
    elif kind == "parquet":
        pq.write_table(table, store.with_suffix(".parquet"))


def look_at_everything(path: Path) -> None:
    """What every verb does with a store before anything else; each row must be there once."""
    store = EmbeddingStore.open(path)
    n = len(store)
    modality = store.modalities[0]
    assert n == store.metadata.num_rows == len(list(store)) and str(n) in repr(store)
    assert len(set(store.ids)) == n and [row.row for row in store] == list(range(n))
    assert all("\n" not in repr(row) for row in store[:3])
    json.dumps(store.describe(), allow_nan=False)
    json.dumps([row.columns for row in store], allow_nan=False)
    assert set(target_columns(store)) | set(refused_columns(store)) == set(store.columns)
    x = np.concatenate(list(store.batches(modality, 4)))
    assert x.shape == (n, store.d_in)
    for name in store.columns:
        try:
            labels = store.labels(name)
        except MsaeError as err:
            assert_is_one_line(err)
            continue
        assert len(labels) == n and all(label is None or label.strip() for label in labels)
        try:
            found = evaluate(tiny_sae(store.d_in), store, modality=modality, labels=name, probe_train=store)
        except MsaeError as err:
            assert_is_one_line(err)
            continue
        assert found.probe_n is not None and found.probe_left_out is not None
        assert found.probe_n + found.probe_left_out == n and found.probe_n > 0
        assert found.probe_n <= n - labels.count(None)
        json.dumps(found.to_json(), allow_nan=False)


def tiny_sae(d_in: int) -> SAE:
    return SAE(SAEConfig(d_in=d_in, d_sae=6, kind="relu"), seed=0)


def assert_is_one_line(err: MsaeError) -> None:
    assert str(err) and "\n" not in str(err) and "Traceback" not in str(err)


@settings(**ANY_SPEED, max_examples=150)
@given(st.data())
def test_a_store_is_read_whole_or_refused_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    x = data.draw(arrays())
    table = data.draw(tables(x.shape[0]))
    write, beside = data.draw(st.sampled_from(WRITERS)), data.draw(st.sampled_from(["csv", "parquet", "none"]))
    try:
        path = write(folder, x, table)
        if path.suffix in (".npy", ".npz", ".safetensors"):
            write_beside(path, table, beside)
        look_at_everything(path)
    except MsaeError as err:
        assert_is_one_line(err)


@settings(**ANY_SPEED, max_examples=100)
@given(st.data())
def test_a_damaged_store_is_read_whole_or_refused_in_one_line(tmp_path_factory, data):
    """A valid store of every kind, of which one file is cut off or has a few bytes changed."""
    folder = tmp_path_factory.mktemp("damaged")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    table = pa.table({"id": [f"r{i}" for i in range(8)], "label": list("aabbaabb")})
    path = data.draw(st.sampled_from(WRITERS))(folder, x, table)
    if path.suffix in (".npy", ".npz", ".safetensors"):
        write_beside(path, table, data.draw(st.sampled_from(["csv", "parquet"])))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    try:
        look_at_everything(path)
    except MsaeError as err:
        assert_is_one_line(err)
