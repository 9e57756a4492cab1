"""Search: plain CLIP search when nothing is edited, and the right movement when something is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from msae import search
from msae.base.errors import ConfigError, EmbedderError, RunError, SourceError, StoreError
from msae.cli import main
from msae.concepts.names import Concept, ConceptNames
from msae.data.embedder import Embedder
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from tests.oracles import edits as edits_oracle
from tests.oracles import neighbours as oracle
from tests.tiny_clip import make_encoder

pytest.importorskip("faiss")
COLOURS = ("red", "green", "blue", "black")
PLACES = ("sky", "sand")
D, N = 16, 1200


def plant(seed=0):
    """Rows with one colour and one place each along orthogonal directions, and an SAE that reads them perfectly.

    `red` is split into two latents, each of which sees it in one place only.
    """
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(D, D)))[0].astype(np.float32)
    colour, place = random.integers(4, size=N), random.integers(2, size=N)
    strength = random.uniform(1, 2, size=(N, 1)).astype(np.float32)
    images = strength * (basis[colour] + basis[4 + place]) + 0.1 * random.normal(size=(N, D)).astype(np.float32)
    texts = images + 3 * basis[10] + 0.1 * random.normal(size=(N, D)).astype(np.float32)
    labels = {"colour": [COLOURS[i] for i in colour], "place": [PLACES[i] for i in place]}
    return basis, images + basis[9], texts, labels


BASIS, IMAGES, TEXTS, LABELS = plant()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    import pyarrow as pa

    columns = {"id": [f"row{i}" for i in range(N)], "image_path": [f"{i}.png" for i in range(N)], **LABELS}
    part = StorePart({"image": IMAGES, "text": TEXTS}, pa.table(columns))
    return write_store(tmp_path_factory.mktemp("world") / "rows.store", [part])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    both = {m: fit_statistics(lambda x=x: [torch.from_numpy(x)]) for m, x in (("image", IMAGES), ("text", TEXTS))}
    directions = torch.from_numpy(BASIS[[0, 0, 1, 2, 3, 4, 5]])
    sae = SAE(SAEConfig(d_in=D, d_sae=7, levels=(2, 7)), Standardizer(both))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        sae.W_enc[:, 0] -= 3 * directions[6]  # red in the sky alone
        sae.W_enc[:, 1] -= 3 * directions[5]  # red on the sand alone
        # Where there is no sand its coordinate is not 0 but below the mean, always by as much.
        means = torch.from_numpy((IMAGES @ BASIS[[5, 4]].T).mean(0) * both["image"].scale)
        sae.b_enc[:2] = -3 * means
    names = ("red", "red", "green", "blue", "black", "sky", "sand")
    concepts = tuple(Concept(i, name, 0.9, 0.5) for i, name in enumerate(names))
    folder = tmp_path_factory.mktemp("runs") / "run"
    sae.save(folder)
    ConceptNames("evidence", 7, concepts).save(folder)
    return folder


def share(result, name, column="colour"):
    return np.mean([hit.columns[column] == name for hit in result.hits])


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("n", [1, 20, 5000])
def test_an_unedited_search_is_float32_brute_force(run, store, modality, n):
    x = store.take(np.arange(N), modality)
    keep = np.arange(N) != 7
    rows, scores = oracle.nearest(x, x[7], n, keep)
    found = search(run, store, like="row7", n=n, modality=modality)
    assert [hit.row for hit in found.hits] == rows.tolist()
    np.testing.assert_allclose([hit.score for hit in found.hits], scores, atol=1e-6)
    assert [hit.rank for hit in found.hits] == [hit.rank_before for hit in found.hits] == list(range(1, len(rows) + 1))
    assert found.before == ()


@pytest.mark.parametrize("value", ["x1", "+0"])
def test_an_edit_that_changes_nothing_changes_nothing(run, store, value):
    plain, edited = search(run, store, like="row7"), search(run, store, like="row7", set={"red": value})
    assert [(hit.id, hit.score) for hit in plain.hits] == [(hit.id, hit.score) for hit in edited.hits]


def test_an_edit_of_one_latent_is_the_oracles_followed_by_brute_force(run, store):
    sae, x = SAE.load(run), store.take(np.arange(N), "image")
    known = sae.standardizer.statistics["image"]
    weights = [w.detach().double().numpy() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    for keep_residual in (True, False):
        found = search(run, store, like="row3", set={"#4": 6.0}, keep_residual=keep_residual)
        query = edits_oracle.set_latent(
            x[3], known.mean.numpy(), known.scale, *weights, 4, 6.0, keep_residual=keep_residual
        )
        rows, scores = oracle.nearest(x, query, 20, np.arange(N) != 3)
        assert [hit.row for hit in found.hits] == rows.tolist()
        np.testing.assert_allclose([hit.score for hit in found.hits], scores, atol=1e-5)


def test_ranks_and_scores_before_are_those_of_the_unedited_search(run, store):
    everything = {hit.id: hit for hit in search(run, store, like="row7", n=N).hits}
    found = search(run, store, like="row7", set={"green": "p99"})
    for hit in (*found.hits, *found.before):
        assert hit.score_before == pytest.approx(everything[hit.id].score, abs=1e-6)
        # Beyond the first n, ranks are counted in float16: close rows may swap places.
        assert abs(hit.rank_before - everything[hit.id].rank) <= 3
    assert [hit.rank_before for hit in found.before] == list(range(1, 21))
    assert [hit.id for hit in found.before] == list(everything)[:20]


def test_raising_and_removing_a_concept_do_what_they_say(run, store):
    blue = next(i for i in range(N) if LABELS["colour"][i] == "blue")
    query = {"like": f"row{blue}"}
    assert share(search(run, store, **query), "blue") == 1
    assert share(search(run, store, **query, set={"red": "p99"}), "red") >= 0.5
    assert share(search(run, store, **query, set={"red": "2xp99"}), "red") == 1
    assert share(search(run, store, **query, set={"red": "p99"}, exclusive=True), "red") == 1
    ten = [f"row{i}" for i in range(N) if LABELS["colour"][i] == "blue"][:10]
    left = [share(search(run, store, like=id, set={"blue": 0}), "blue") for id in ten]
    assert np.mean(left) <= 0.5  # a quarter of all rows are blue
    kept = LABELS["place"][blue]
    assert share(search(run, store, **query, set={"red": "p99"}), kept, "place") >= 0.9


def test_rivals_are_the_concepts_of_the_same_kind(run, store):
    for colour in COLOURS:
        edit = search(run, store, like="row7", set={colour: "2xp99"}, exclusive=True).edits[0]
        assert set(edit.rivals) == set(COLOURS) - {colour}
    assert search(run, store, like="row7", set={"red": 0}, exclusive=True).edits[0].rivals == ()


def test_a_text_finds_its_image_and_the_reverse(run, store):
    """Texts lie apart from images; the nearest of the other modality is still one of the same colour and place."""
    for query_modality, modality in (("text", "image"), ("image", "text")):
        found = search(run, store, like="row7", query_modality=query_modality, modality=modality)
        assert share(found, LABELS["colour"][7]) >= 0.8 and share(found, LABELS["place"][7], "place") >= 0.8
        other = next(colour for colour in COLOURS if colour != LABELS["colour"][7])
        moved = search(
            run,
            store,
            like="row7",
            query_modality=query_modality,
            modality=modality,
            set={other: "p99"},
            exclusive=True,
        )
        assert share(moved, other) >= 0.8


def test_latent_space_is_l1_brute_force(run, store):
    z = SAE.load(run).encode(torch.from_numpy(store.take(np.arange(N), "image")), "image").numpy()
    edited = z[7].copy()
    edited[2] = 5.0
    for query, options in ((z[7], {}), (edited, {"set": {"#2": 5.0}})):
        distances = np.abs(z - query).sum(1)
        distances[7] = np.inf
        order = np.argsort(distances, kind="stable")[:20]
        found = search(run, store, like="row7", space="latent", **options)
        np.testing.assert_allclose([-hit.score for hit in found.hits], distances[order], atol=1e-4)
        assert [hit.row for hit in found.hits] == order.tolist()
    places = np.argsort(np.argsort(np.where(np.arange(N) == 7, np.inf, np.abs(z - z[7]).sum(1)), kind="stable"))
    assert [hit.rank_before for hit in found.hits] == (places[order] + 1).tolist()


def test_a_filter_and_a_row_limit_what_is_found(run, store):
    found = search(run, store, like="row7", where="colour == 'red' and place != 'sky'", n=5)
    assert len(found.hits) == 5
    assert {(hit.columns["colour"], hit.columns["place"]) for hit in found.hits} == {("red", "sand")}
    assert search(run, store, like="row7", where="id == 'row7'").hits == ()


def test_hits_share_what_both_have_above_the_usual_strength(run, store):
    """By the oracle: the median of the rows that have it, summed over a name's latents; or nothing."""
    z = SAE.load(run).encode(torch.from_numpy(IMAGES)).numpy()
    groups = {"red": [0, 1], "green": [2], "blue": [3], "black": [4], "sky": [5], "sand": [6]}
    every = np.linspace(0, N - 1, 2000).round().astype(int) if N > 2000 else np.arange(N)
    some = 0
    for row in (7, 8, 9, 10):
        for hit in search(run, store, like=f"row{row}").hits:
            wanted = {}
            for name, latents in groups.items():
                strength = z[:, latents].sum(1)
                fires = strength[every] > 0
                usual = np.median(strength[every][fires])
                if fires.mean() <= 0.5 and min(strength[row], strength[hit.row]) > usual:
                    wanted[f"nearest word: {name}"] = (strength[row], strength[hit.row])
            found = {shared.concept: (shared.query, shared.hit) for shared in hit.shared}
            assert found.keys() == wanted.keys()
            some += len(found)
            assert all(found[name] == pytest.approx(wanted[name], rel=1e-3) for name in found)
    assert some > 10


def test_a_search_without_names_takes_latents_and_names_what_it_can(run, store):
    sae = SAE.load(run)
    found = search(sae, store, like="row7", set={"#2": "p99"}, n=3)
    assert found.hits[0].shared[0].concept == "#2"
    with pytest.raises(ConfigError, match="has no names"):
        search(sae, store, like="row7", set={"red": 0})
    with pytest.raises(ConfigError, match="--exclusive needs the names"):
        search(sae, store, like="row7", set={"#2": "2xp99"}, exclusive=True)
    assert search(sae, store, like="row7", set={"red": 0}, names=run, n=3).edits[0].latents == (0, 1)


def test_groups_and_synonyms_are_one_handle(run, store):
    edit = search(run, store, like="row7", set=["red|#2=p99"]).edits[0]
    assert edit.latents == (0, 1, 2) and edit.after == pytest.approx(edit.natural["p99"])


def test_leaving_the_natural_range_is_warned_of(run, store):
    found = search(run, store, like="row7", set={"red": 500})
    assert len(found.warnings) == 1 and "beyond the natural range" in found.warnings[0]
    assert found.edits[0].warning == found.warnings[0]
    assert search(run, store, like="row7", set={"red": "p90"}).warnings == ()


def test_a_vector_file_with_a_damaged_header_is_one_line(run, store, tmp_path):
    header = b"{'descr': ('<f4', 'shape': (3,), ".ljust(117) + b"\n"  # a bracket is never closed
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(StoreError, match=r"bad\.npy cannot be read as \.npy") as caught:
        search(run, store, embedding=tmp_path / "bad.npy")
    assert "\n" not in str(caught.value)


def test_a_vector_in_a_file_is_searched_for(run, store, tmp_path):
    np.save(tmp_path / "v.npy", store.take(np.array([7]), "image")[0])
    found = search(run, store, embedding=tmp_path / "v.npy", n=3)
    assert found.hits[0].id == "row7" and found.hits[0].score == pytest.approx(1)
    again = search(run, store, embedding=np.load(tmp_path / "v.npy")[None], n=3)
    assert [hit.id for hit in again.hits] == [hit.id for hit in found.hits]


def test_texts_and_pictures_are_embedded_by_the_encoder_of_the_store(run, tmp_path):
    from PIL import Image

    encoder = make_encoder(tmp_path / "clip")
    embedder = Embedder.load(encoder, device="cpu", dtype="float32")
    words = ["a red cat", "two blue dog", "photo of the green dog"]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    import pyarrow as pa

    rows = {"image": embedder.embed_images(pictures), "text": embedder.embed_texts(words)}
    small = write_store(
        tmp_path / "small.store", [StorePart(rows, pa.table({"id": ["a", "b", "c"], "caption": words}))],
        record={"encoder": str(encoder)},
    )  # fmt: skip
    for i, word in enumerate(words):
        found = search(run, small, text=word, modality="text", n=1)
        assert found.hits[0].caption == word and found.hits[0].score == pytest.approx(1, abs=1e-3)
        assert found.query_modality == "text"
        assert search(run, small, image=tmp_path / f"{i}.png", n=1).hits[0].row == i
    with pytest.raises(SourceError, match=r"none\.png cannot be searched for: no such file"):
        search(run, small, image=tmp_path / "none.png")
    with pytest.raises(EmbedderError, match="does not exist"):
        search(run, small, text="a cat", encoder=str(tmp_path / "nothing"))


def test_a_query_is_embedded_by_the_weights_that_made_the_store_wherever_they_lie(run, tmp_path):
    import shutil

    import pyarrow as pa
    from PIL import Image

    encoder = make_encoder(tmp_path / "clip")
    embedder = Embedder.load(encoder, device="cpu", dtype="float32")
    part = StorePart({"text": embedder.embed_texts(["a cat"])}, pa.table({"id": ["a"], "caption": ["a cat"]}))
    made_by = {"encoder": str(encoder), "encoder_revision": embedder.revision}
    store = write_store(tmp_path / "a.store", [part], record=made_by)
    shutil.copytree(encoder, tmp_path / "moved")
    assert search(run, store, text="a cat", encoder=str(tmp_path / "moved")).hits[0].id == "a"

    make_encoder(tmp_path / "other", seed=1)  # of the same width: nothing but the revision tells
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    for kind, query in (("text", "a cat"), ("image", tmp_path / "x.png")):
        line = rf"--{kind} would be embedded by .*other at \w+, but .*a\.store was embedded by .*clip at \w+; give"
        with pytest.raises(StoreError, match=line):
            search(run, store, **{kind: query}, encoder=str(tmp_path / "other"))
    with pytest.raises(StoreError, match="would be embedded by"):  # a loaded one is no exception
        search(run, store, text="a cat", embedder=Embedder.load(tmp_path / "other", device="cpu", dtype="float32"))

    shutil.copytree(tmp_path / "other", encoder, dirs_exist_ok=True)  # the folder has other weights by now
    with pytest.raises(StoreError, match="would be embedded by"):
        search(run, store, text="a cat")
    unknown = write_store(tmp_path / "b.store", [part], record={})
    assert search(run, unknown, text="a cat", encoder=str(tmp_path / "other")).hits[0].id == "a"


def test_a_query_is_embedded_by_the_encoder_of_the_sae_where_the_store_does_not_say_its_own(run, tmp_path):
    import pyarrow as pa

    embedder = Embedder.load(make_encoder(tmp_path / "clip"), device="cpu", dtype="float32")
    part = StorePart({"text": embedder.embed_texts(["a cat"])}, pa.table({"id": ["a"]}))
    store = write_store(tmp_path / "a.store", [part], record={})
    sae = SAE.load(run)
    known = replace(sae.config, encoder="clip", encoder_revision="abc")
    theirs = SAE(known, sae.standardizer)
    with pytest.raises(StoreError, match="but the SAE reads embeddings of clip at abc; give --encoder"):
        search(theirs, store, text="a cat", embedder=embedder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "nothing is given to search for"),
        ({"like": "row7", "text": "x"}, ConfigError, "--like and --text are given"),
        ({"like": "row7777"}, StoreError, "did you mean 'row77"),
        ({"like": "row7", "n": 0}, ConfigError, "n is 0"),
        ({"like": "row7", "set": ["rde=3"]}, ConfigError, "did you mean 'red'"),
        ({"like": "row7", "set": ["#7=3"]}, ConfigError, "has #0 to #6"),
        ({"like": "row7", "set": ["red=lots"]}, ConfigError, "cannot be set to 'lots'"),
        ({"like": "row7", "set": ["red"]}, ConfigError, "not CONCEPT=VALUE"),
        ({"like": "row7", "where": "colour = 'red'"}, ConfigError, "at character 8"),
        ({"like": "row7", "where": "colur == 'red'"}, ConfigError, "did you mean 'colour'"),
        ({"like": "row7", "space": "moon"}, ConfigError, "give embedding or latent"),
        ({"text": "  "}, ConfigError, "is empty"),
        ({"text": "a cat"}, ConfigError, "give --encoder ID"),
        ({"embedding": "missing.npy"}, StoreError, "does not exist"),
        ({"embedding": np.zeros(D)}, ConfigError, "all zero"),
        ({"embedding": np.full(D, np.nan)}, ConfigError, "not finite"),
        ({"embedding": np.ones(3)}, ConfigError, "3 wide"),
        ({"embedding": np.ones((2, D))}, ConfigError, "one vector"),
    ],
)
def test_what_cannot_be_searched_for_is_said_in_one_line(run, store, options, error, message):
    with pytest.raises(error) as caught:
        search(run, store, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_that_does_not_fit_is_refused(run, store, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((5, 20), np.float32))
    with pytest.raises(StoreError, match=r"20-dim embeddings, but .* reads 16-dim"):
        search(run, tmp_path / "wide.npy", like="0")
    np.save(tmp_path / "images.npy", IMAGES)
    with pytest.raises(StoreError, match="has no text embeddings"):
        search(run, EmbeddingStore.open(tmp_path / "images.npy"), like="0", modality="text")
    with pytest.raises(RunError, match="does not exist"):
        search(tmp_path / "no-run", store, like="row7")


def test_an_sae_without_the_modality_searches_but_does_not_edit(store):
    sae = SAE(
        SAEConfig(d_in=D, d_sae=7, levels=(2, 7)),
        Standardizer({"image": fit_statistics(lambda: [torch.from_numpy(IMAGES)])}),
    )
    found = search(sae, store, like="row7", modality="text")
    assert len(found.hits) == 20 and "no statistics of text" in found.warnings[0]
    for options in ({"set": {"#1": 3}}, {"space": "latent"}):
        with pytest.raises(ConfigError, match="no text statistics"):
            search(sae, store, like="row7", modality="text", **options)


def test_where_the_store_lacks_the_querys_modality_the_other_tells_what_is_natural(run, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    found = search(run, tmp_path / "images.npy", embedding=TEXTS[7], query_modality="text", set={"red": "p99"})
    assert "natural strengths are those of its image rows" in found.warnings[0]


def test_the_index_lies_beside_the_run_and_is_rebuilt_when_the_store_changes(run, tmp_path, caplog):
    np.save(tmp_path / "x.npy", IMAGES)
    search(run, tmp_path / "x.npy", like="7")
    assert len(list((run / "index").glob("x.npy-image-*.faiss"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    np.save(tmp_path / "x.npy", IMAGES[::-1])
    found = search(run, tmp_path / "x.npy", like="7")
    rows, _ = oracle.nearest(IMAGES[::-1], IMAGES[::-1][7], 20, np.arange(N) != 7)
    assert [hit.row for hit in found.hits] == rows.tolist()
    assert "built from other rows" in caplog.text


def test_a_search_writes_nothing_into_the_store_and_uses_no_index_of_an_earlier_version(run, store, caplog):
    old = store.path / "index"
    old.mkdir()
    for name in ("image.faiss", "image.json"):
        (old / name).write_text("an earlier msae built its index here")
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    found = search(run, store.path, like="row7")
    rows, _ = oracle.nearest(IMAGES, IMAGES[7], 20, np.arange(N) != 7)
    assert [hit.row for hit in found.hits] == rows.tolist() and not caplog.text
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == before
    assert (run / "index").is_dir()


def test_json_and_table_hold_the_answer(run, store):
    result = search(run, store, like="row7", set={"green": "p99"}, exclusive=True)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["query"] == {"kind": "like", "value": "row7", "modality": "image"}
    assert data["edits"][0]["concept"] == "green" and data["edits"][0]["value"] == "p99"
    assert [hit["rank"] for hit in data["hits"]] == list(range(1, 21))
    assert {"id", "score", "rank_before", "score_before", "path", "caption", "shared"} <= set(data["hits"][0])
    lines = result.to_text().splitlines()
    assert len(lines) == 4 + 20 and all(hit.id in line for hit, line in zip(result.hits, lines[4:], strict=True))


def test_real_vectors_are_searched_exactly(real_vectors, tmp_path):
    x = np.load(real_vectors / "image_train.npy", mmap_mode="r")
    (tmp_path / "real.npy").symlink_to(real_vectors / "image_train.npy")
    sae = SAE(SAEConfig(d_in=x.shape[1], d_sae=8, levels=(8,)))
    rows = x.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for query in (5, 20_000, 48_000):
        scores = rows @ rows[query]
        scores[query] = -1
        found = search(sae, tmp_path / "real.npy", embedding=rows[query], n=21)
        found_rows = [hit.row for hit in found.hits if hit.row != query][:20]
        wanted = np.sort(scores)[::-1][:20]
        np.testing.assert_allclose(scores[found_rows], wanted, atol=1e-6)


def test_the_command_line_searches(run, store, capsys):
    def msae(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["search", str(run), "--on", str(store.path), *arguments])
        return left.value.code, capsys.readouterr()

    options = ("--like", "row7", "--set", "red=p99", "--set", "sky=0", "--n", "3", "--exclusive", "--json", "-")
    code, said = msae(*options)
    data = json.loads(said.out)
    assert code == 0 and len(data["hits"]) == 3 and [edit["concept"] for edit in data["edits"]] == ["red", "sky"]
    code, said = msae("--like", "no")
    assert code == 1 and said.err.count("\n") == 1 and "no row with the id" in said.err


def test_one_searcher_for_many_searches_answers_as_a_new_one_does(run, store):
    """Whatever it remembers of the searches before, by several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    from msae.use.edits import parse_edit
    from msae.use.search import Ask, How, Searcher

    asked = [("row3", "red=x2"), ("row3", "sky=p99"), ("row7", "red=0"), ("row9", "blue=+1"), ("row7", "#2=1.5")] * 3
    searcher = Searcher.open(run, store, remember=True)

    def one(pair):
        id, edit = pair
        how = How([parse_edit(edit)], 8, "embedding", True, False, False, None)
        return searcher.search(Ask(like=id), how).to_json()

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(one, asked))
    assert found == [search(run, store, like=id, set=[edit], n=8).to_json() for id, edit in asked]
    assert set(searcher.concepts("image")._made) == {"red", "sky", "blue", "#2"}
