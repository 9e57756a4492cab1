"""Sparse codes: what is in the files and in Qdrant is what the SAE gives, and a query by concepts is brute force's."""

import json

import numpy as np
import pytest
import torch

import msae
from msae.base.errors import ConfigError, StoreError
from msae.concepts.names import Concept, ConceptNames
from msae.sae.formats import as_onnx
from msae.sae.model import SAE, SAEConfig, weights_hash
from msae.sae.standardize import Standardizer, fit_statistics
from msae.use import codes as codes_module
from tests.test_formats import D_IN, error_of, make_sae, rows

pytest.importorskip("pyarrow")
N = 300


@pytest.fixture
def world(tmp_path):
    """A run with names, and a store with ids and captions."""
    x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(11))
    np.save(tmp_path / "photos.npy", x.numpy())
    lines = [f"p{i},a caption of {i}\n" for i in range(N)]
    (tmp_path / "photos.csv").write_text("id,caption\n" + "".join(lines))
    sae = make_sae().with_l0(6, x)
    sae.save(tmp_path / "run")
    busiest = (sae.encode(x) > 0).sum(0).argsort(descending=True)[:4].tolist()
    named = tuple(
        sorted(
            # "shore" is a name here and a synonym there: a query by it means both
            (
                Concept(i, name, 0.5, 0.1, synonyms=("shore",) if name == "beach" else ())
                for i, name in zip(busiest, ("beach", "shore", "people", "tree"), strict=True)
            ),
            key=lambda one: one.latent,
        )
    )
    ConceptNames("evidence", sae.d_sae, named, {}, (), {"sae": weights_hash(sae)}).save(tmp_path / "run")
    return tmp_path


def dense_of(world, **how):
    return SAE.load(world / "run").encode(world / "photos.npy", **how)


def test_parquet_holds_the_activations_in_row_groups(world, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(codes_module, "ROW_GROUP", 128)
    monkeypatch.setattr("msae.sae.view.BLOCK_ENTRIES", 40 * 64)
    found = msae.encode(world / "run", world / "photos.npy", out=world / "codes.parquet")
    file = pq.ParquetFile(world / "codes.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [128, 128, 44]
    table, z = file.read(), dense_of(world)
    assert table.column("id").to_pylist() == [f"p{i}" for i in range(N)]
    for row, latents, values in zip(z, *(table.column(c).to_pylist() for c in ("indices", "values")), strict=True):
        assert latents == np.flatnonzero(row).tolist()
        assert np.array_equal(np.float32(values), row[latents])
    assert json.loads(table.schema.metadata[b"msae"])["d_sae"] == 40
    assert found.n == N and found.l0 == pytest.approx((z > 0).sum() / N)


@pytest.mark.parametrize("how", [{}, {"k": 3}, {"inference": "relu"}])
def test_scipy_reads_the_npz(world, monkeypatch, how):
    from scipy import sparse

    monkeypatch.setattr(codes_module, "ROW_GROUP", 100)
    monkeypatch.setattr("msae.sae.view.BLOCK_ENTRIES", 40 * 64)
    msae.encode(world / "run", world / "photos.npy", out=world / "codes.npz", **how)
    matrix = sparse.load_npz(world / "codes.npz")
    assert matrix.shape == (N, 40) and matrix.has_canonical_format
    assert np.array_equal(matrix.toarray(), dense_of(world, **how))
    assert np.load(world / "codes.npz")["ids"].tolist() == [f"p{i}" for i in range(N)]


def test_where_to_write_is_checked_before_anything_is_made(world):
    run, store = world / "run", world / "photos.npy"
    before = set(world.rglob("*"))
    for given, word in (
        ({}, "--out"),
        ({"out": "x.csv"}, ".npz"),
        ({"out": "x.npz", "to": "qdrant://h/c"}, "either"),
    ):
        assert word in error_of(lambda given=given: msae.encode(run, store, **given))
    pytest.importorskip("qdrant_client")
    for bad in (
        "qdrant://host",
        "qdrant://host/",
        "http://host/c",
        "qdrant://host/a/b",
        "qdrant://host:x/c",
        "qdrant:c",
        "",
    ):
        assert "qdrant://HOST:6333/COLLECTION" in error_of(lambda bad=bad: msae.encode(run, store, to=bad))
    assert set(world.rglob("*")) == before


# --- Qdrant


@pytest.fixture
def client():
    qdrant = pytest.importorskip("qdrant_client")
    made = qdrant.QdrantClient(":memory:")
    yield made
    made.close()


def test_every_row_is_a_point_with_its_code_and_its_names(world, client):
    msae.encode(world / "run", world / "photos.npy", to="photos", client=client)
    assert client.count("photos").count == N
    z = dense_of(world)
    names = ConceptNames.load(world / "run")
    by_name = {name: names[name] for name in ("beach", "people", "shore", "tree")}
    points = client.retrieve("photos", list(range(N)), with_vectors=True)
    for point, row in zip(points, z, strict=True):
        code = point.vector["concepts"]
        assert code.indices == np.flatnonzero(row).tolist()
        np.testing.assert_allclose(code.values, row[code.indices], rtol=1e-6)
        fires = sorted(name for name, latents in by_name.items() if (row[latents] > 0).any())
        assert point.payload["concepts"] == fires and point.payload["id"] == f"p{point.id}"
    assert points[7].payload["caption"] == "a caption of 7"


@pytest.mark.parametrize("word", ["beach", "shore"])
def test_beach_and_no_people_is_what_brute_force_finds(world, client, word):
    """The example of docs/formats.md."""
    from qdrant_client import models

    msae.encode(world / "run", world / "photos.npy", to="photos", client=client)
    beach = ConceptNames.load(world / "run")[word]
    chosen = models.Filter(
        must=[models.FieldCondition(key="concepts", match=models.MatchValue(value=word))],
        must_not=[models.FieldCondition(key="concepts", match=models.MatchValue(value="people"))],
    )
    strongest = models.SparseVector(indices=beach, values=[1.0] * len(beach))
    found = client.query_points("photos", query=strongest, using="concepts", query_filter=chosen, limit=N).points
    z = dense_of(world)
    people = ConceptNames.load(world / "run")["people"]
    rows_of = np.flatnonzero((z[:, beach] > 0).any(1) & ~(z[:, people] > 0).any(1))
    expected = rows_of[np.argsort(-z[rows_of][:, beach].sum(1), kind="stable")]
    assert 10 < len(expected) < N
    assert [point.id for point in found] == expected.tolist()


def test_twenty_thousand_real_rows_answer_as_brute_force_does(real_vectors, tmp_path, client):
    from qdrant_client import models

    x = torch.from_numpy(np.load(real_vectors / "image_train.npy", mmap_mode="r")[20_000:40_000].astype(np.float32))
    np.save(tmp_path / "rows.npy", x.numpy())
    config = SAEConfig(512, 1024, kind="relu", encoder="x")
    sae = SAE(config, Standardizer({"image": fit_statistics(lambda: [x])}), seed=50).with_l0(16, x[::9])
    sae.save(tmp_path / "run")
    z = sae.encode(x).numpy()
    busiest = np.argsort(-(z > 0).sum(0))[:30].tolist()
    # Two names of two latents each, one that is a synonym of the other's, and one of a single latent.
    latents = {"a": busiest[0:4:2], "b": busiest[1:4:2], "c": busiest[9:10]}
    named = sorted(((i, name) for name, own in latents.items() for i in own))
    concepts = tuple(Concept(i, name, 0.5, 0.1, synonyms=("d",) if name == "a" else ()) for i, name in named)
    ConceptNames("evidence", sae.d_sae, concepts, {}, (), {"sae": weights_hash(sae)}).save(tmp_path / "run")
    encoded = msae.encode(tmp_path / "run", tmp_path / "rows.npy", to="rows", client=client)
    assert encoded.n == 20_000 == client.count("rows").count and encoded.l0 == (z > 0).sum() / 20_000
    for with_, without in (("a", "b"), ("c", "a"), ("d", "c")):
        own, others = ((z[:, latents[{"d": "a"}.get(name, name)]] > 0).any(1) for name in (with_, without))
        has = {
            name: models.FieldCondition(key="concepts", match=models.MatchValue(value=name))
            for name in (with_, without)
        }
        query = ConceptNames.load(tmp_path / "run")[with_]
        found = client.query_points(
            "rows", query=models.SparseVector(indices=query, values=[1.0] * len(query)), using="concepts", limit=20_000,
            query_filter=models.Filter(must=[has[with_]], must_not=[has[without]]),
        ).points  # fmt: skip
        score = z[:, query].sum(1, dtype=np.float64)
        rows_of = [point.id for point in found]
        assert set(rows_of) == set(np.flatnonzero(own & ~others).tolist()) and len(rows_of) > 100
        assert (np.diff(score[rows_of]) < 1e-4).all(), "of equal scores either may come first"


def test_a_hybrid_search_keeps_to_the_filter(world, client):
    from qdrant_client import models

    msae.encode(world / "run", world / "photos.npy", to="photos", client=client)
    x, beach = np.load(world / "photos.npy"), ConceptNames.load(world / "run")["beach"]
    without = models.Filter(must_not=[models.FieldCondition(key="concepts", match=models.MatchValue(value="people"))])
    found = client.query_points(
        "photos",
        prefetch=[
            models.Prefetch(query=x[5].tolist(), using="embedding", filter=without, limit=50),
            models.Prefetch(
                query=models.SparseVector(indices=beach, values=[1.0] * len(beach)),
                using="concepts",
                filter=without,
                limit=50,
            ),
        ],
        query=models.FusionQuery(fusion=models.Fusion.RRF),
        limit=20,
    ).points
    assert len(found) == 20 and not any("people" in point.payload["concepts"] for point in found)


def test_a_collection_is_never_written_over(world, client):
    msae.encode(world / "run", world / "photos.npy", to="photos", client=client)
    with pytest.raises(StoreError, match="already"):
        msae.encode(world / "run", world / "photos.npy", to="photos", client=client)


def test_a_folder_without_a_server_keeps_the_points(world):
    qdrant = pytest.importorskip("qdrant_client")
    msae.encode(world / "run", world / "photos.npy", to=f"qdrant://{world}/qdrant/photos", k=3)
    again = qdrant.QdrantClient(path=str(world / "qdrant"))
    assert again.count("photos").count == N
    again.close()
    with pytest.raises(ConfigError, match="not empty"):  # Qdrant's files are pickles, and none is opened
        msae.encode(world / "run", world / "photos.npy", to=f"qdrant://{world}/qdrant/others", k=3)


def test_a_server_that_is_not_there_is_one_line(world):
    pytest.importorskip("qdrant_client")
    with pytest.raises(StoreError, match="check its address"):
        msae.encode(world / "run", world / "photos.npy", to="qdrant://127.0.0.1:1/photos")


# --- ONNX and embedding-atlas


@pytest.mark.parametrize("how", [{}, {"inference": "relu"}, {"k": 5}])
@pytest.mark.parametrize("config", [{}, {"soft_cap": 2.0, "level_scales": True}])
def test_onnx_gives_what_torch_gives_for_any_batch(tmp_path, how, config):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    sae = make_sae(modalities=("image", "text"), **config).with_l0(6, rows())
    sae.save(tmp_path / "run")
    msae.export(tmp_path / "run", to="onnx", out=tmp_path / "out", modality="text", **how)
    session = runtime.InferenceSession(tmp_path / "out" / "encoder.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 2, 64):
        x = rows(n)[:n]
        (z,) = session.run(None, {"embeddings": x.numpy()})
        expected = sae.encode(x, "text", how.get("k"), inference=how.get("inference", "trained")).numpy()
        np.testing.assert_allclose(z, expected, atol=1e-4)
        assert z.shape == (n, 40) and ((z > 0) == (expected > 0)).all()


def test_an_encoder_too_large_for_one_onnx_file_lies_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    make_sae(level_scales=True).with_l0(6, rows()).save(tmp_path / "run")
    msae.export(tmp_path / "run", to="onnx", out=tmp_path / "one", k=5)
    monkeypatch.setattr(as_onnx, "LARGEST", 4 * 12 * 40)  # as many bytes as W_enc alone
    exported = msae.export(tmp_path / "run", to="onnx", out=tmp_path / "two", k=5)
    assert exported.files == ("encoder.onnx", "encoder.onnx.data")
    W_enc = SAE.load(tmp_path / "run").W_enc.detach().numpy()
    assert np.array_equal(np.fromfile(tmp_path / "two/encoder.onnx.data", np.float32), W_enc.ravel())
    answers = [
        runtime.InferenceSession(tmp_path / one / "encoder.onnx", providers=["CPUExecutionProvider"]).run(
            None, {"embeddings": rows(4).numpy()}
        )[0]
        for one in ("one", "two")
    ]
    assert np.array_equal(*answers)


def test_the_atlas_has_a_picture_and_the_strongest_concepts_of_each_row(world):
    import pyarrow.parquet as pq
    from PIL import Image

    (world / "pictures").mkdir()
    for i in range(0, N, 2):
        Image.new("RGB", (300, 200), (i % 256, 0, 0)).save(world / "pictures" / f"{i}.png")
    lines = [f"p{i},pictures/{i}.png,{i % 3}\n" for i in range(N)]
    (world / "photos.csv").write_text("id,image_path,label\n" + "".join(lines))
    exported = msae.export(world / "run", to="embedding-atlas", on=world / "photos.npy", out=world / "atlas")
    assert f"{N // 2} of {N} rows have no picture" in exported.notes[0]
    table = pq.read_table(world / "atlas" / "rows.parquet").to_pylist()
    z, names = dense_of(world), ConceptNames.load(world / "run")
    for i, row in enumerate(table):
        assert row["id"] == f"p{i}" and row["label"] == i % 3 and (row["image"] is None) == bool(i % 2)
        latents = [feature["index"] for feature in row["features"]]
        assert sorted(latents) == np.flatnonzero(z[i]).tolist()
        assert (np.diff(z[i][latents]) <= 0).all()
        assert [feature["feature"] for feature in row["features"]] == [names.shown(j) or f"#{j}" for j in latents]
        np.testing.assert_array_equal(np.float32(row["embedding"]), np.load(world / "photos.npy")[i])
    assert table[0]["image"]["bytes"][:2] == b"\xff\xd8"


def test_the_atlas_does_not_hide_a_column_of_the_store(world):
    (world / "photos.csv").write_text("id,features\n" + "".join(f"p{i},x\n" for i in range(N)))
    with pytest.raises(ConfigError, match="'features'"):
        msae.export(world / "run", to="embedding-atlas", on=world / "photos.npy", out=world / "atlas")
    assert not (world / "atlas").exists()
    assert "--on STORE" in error_of(lambda: msae.export(world / "run", to="embedding-atlas", out=world / "atlas"))
    with pytest.raises(ConfigError, match="holds no rows"):
        msae.export(world / "run", to="saelens", on=world / "photos.npy", out=world / "atlas")
