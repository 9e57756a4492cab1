"""Hierarchy: edges equal the definition, the tree keeps the most specific parent, known nestings are found."""

import json

import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError
from msae.cli import main
from msae.concepts.names import Concept, ConceptNames
from msae.concepts.tree import Activity, Edge, concept_tree, counted, find_hierarchy, score_pairs
from msae.data.store import EmbeddingStore
from msae.sae.model import SAE, SAEConfig
from msae.sae.view import View
from tests.oracles import galleries as oracle


def activity_of(fires, block=33):
    activity = Activity(fires.shape[1])
    for first in range(0, len(fires), block):
        activity.add(fires[first : first + block])
    return activity


def nested(n_rows=400, seed=0):
    """Latents 0 to 4: a dog, a poodle within it, a black poodle within that, something unrelated, and everywhere."""
    rng = np.random.default_rng(seed)
    dog = rng.random(n_rows) < 0.4
    poodle = dog & (rng.random(n_rows) < 0.5)
    black = poodle & (rng.random(n_rows) < 0.5)
    return np.stack([dog, poodle, black, rng.random(n_rows) < 0.3, np.ones(n_rows, bool)], axis=1)


def as_set(found):
    return {(edge.child, edge.parent, edge.together) for edge in found.edges}


@pytest.mark.parametrize("sparse_below", [0.0, 1.1], ids=["dense", "sparse"])
@pytest.mark.parametrize("block", [1, 33, 1000])
def test_edges_equal_the_definition(monkeypatch, block, sparse_below):
    monkeypatch.setattr("msae.concepts.tree.SPARSE_BELOW", sparse_below)
    rng = np.random.default_rng(1)
    fires = np.concatenate([nested(300), rng.random((300, 40)) < rng.random(40)], axis=1)
    fires[:, 10] = fires[:, 0]  # a twin is no parent: it fires as often
    found = find_hierarchy(activity_of(fires, block), min_share=0.6, min_lift=1.2, min_fired=5)
    assert as_set(found) == oracle.edges(fires, min_share=0.6, min_lift=1.2, min_fired=5) != set()


def test_more_latents_than_a_block_are_compared_across_blocks(monkeypatch):
    fires = np.concatenate([np.random.default_rng(2).random((200, 30)) < 0.5, nested(200)], axis=1)
    whole = as_set(find_hierarchy(activity_of(fires)))
    monkeypatch.setattr("msae.concepts.tree._BLOCK", 4)
    assert as_set(find_hierarchy(activity_of(fires))) == whole != set()


def test_order_of_latents_and_rows_changes_only_their_numbers():
    fires = nested()
    rng = np.random.default_rng(3)
    latents, rows = rng.permutation(5), rng.permutation(len(fires))
    moved = find_hierarchy(activity_of(fires[rows][:, latents]))
    renamed = {(int(latents[child]), int(latents[parent]), n) for child, parent, n in as_set(moved)}
    assert renamed == as_set(find_hierarchy(activity_of(fires)))


def test_known_nesting_is_found_and_the_most_specific_parent_is_the_trees():
    found = find_hierarchy(activity_of(nested()))
    assert {(edge.child, edge.parent) for edge in found.edges} == {(1, 0), (2, 1), (2, 0)}
    assert {child: edge.parent for child, edge in found.parent.items()} == {1: 0, 2: 1}
    assert list(found.walk()) == [(0, 0), (1, 1), (2, 2)]
    assert found.roots == [0] and found.children == {0: [1], 1: [2]}
    edge = found.parent[2]
    assert edge.share == 1 and edge.share_low > 0.85 and edge.lift == pytest.approx(400 / found.fired[1])


def test_latent_that_fires_everywhere_is_no_parent_and_a_rare_one_no_child():
    fires = nested()
    fires[:, 2] = False
    fires[np.flatnonzero(fires[:, 1])[:19], 2] = True
    pairs = {(edge.child, edge.parent) for edge in find_hierarchy(activity_of(fires)).edges}
    assert pairs == {(1, 0)}


def test_unrelated_latents_have_no_parents():
    fires = np.random.default_rng(4).random((2000, 60)) < np.linspace(0.01, 0.6, 60)
    assert find_hierarchy(activity_of(fires)).edges == ()


def test_tree_as_json_has_names_levels_and_edges():
    found = find_hierarchy(activity_of(nested()))
    data = found.to_json({0: "dog"}, {1: {"64": 0.5}})
    assert [(node["latent"], node["name"], node["depth"]) for node in data["nodes"]] == [
        (0, "dog", 0), (1, None, 1), (2, None, 2),
    ]  # fmt: skip
    assert data["nodes"][1]["parent"]["parent"] == 0 and data["nodes"][1]["levels"] == {"64": 0.5}


def edge(child, parent):
    return Edge(child, parent, 20, 1.0, 0.9, 3.0, 2.7)


def test_edges_are_scored_against_known_pairs_and_what_follows_from_them():
    names = {0: "dog", 1: "poodle", 2: "animal", 3: "poodle", 4: "cat", 5: "nowhere"}
    pairs = {("poodle", "dog"), ("dog", "animal"), ("cat", "animal"), ("oak", "tree")}
    edges = [edge(1, 0), edge(1, 2), edge(3, 1), edge(0, 4), edge(5, 2), edge(6, 0)]
    score = score_pairs(edges, names, pairs)
    # (poodle, dog), (poodle, animal) are right and (dog, cat) is wrong; poodle under poodle and the others say nothing.
    assert (score.predicted, score.precision) == (3, pytest.approx(2 / 3))
    # of (poodle, dog), (poodle, animal), (dog, animal), (cat, animal) two were found
    assert (score.wanted, score.recall) == (4, 0.5)
    # ordered pairs of the five latents with known words, the two of poodle-poodle left out; six are known pairs
    assert score.chance == pytest.approx(6 / 18)
    assert score_pairs([], {}, pairs).precision is None


def test_hierarchy_of_a_store_counts_the_k_strongest(tmp_path):
    x = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    store = EmbeddingStore.open(tmp_path / "x.npy", modality="image")
    sae = SAE(SAEConfig(8, 32, kind="matryoshka", levels=(2, 4, 32))).eval()
    h = sae.pre_activations(torch.cat(list(View(sae, store).rows())))
    fired = {k: (sae.activate(h, inference="topk", k=k) > 0).sum(0).numpy() for k in (4, 9)}
    np.testing.assert_array_equal(concept_tree(sae, store).hierarchy.fired, fired[4])  # the last level
    np.testing.assert_array_equal(concept_tree(sae, store, k=9).hierarchy.fired, fired[9])
    assert concept_tree(sae, store, max_rows=100).hierarchy.n_rows == 100
    with pytest.raises(ConfigError, match="at least 1"):
        concept_tree(sae, store, k=0)


@pytest.mark.parametrize(
    ("levels", "k"), [((8, 16, 32, 64), 16), ((64, 128, 4096), 64), ((2, 4, 8), 8), ((2, 4, 4096), 4), ((4096,), None)]
)
def test_a_tree_counts_at_the_first_level_from_16_on(levels, k):
    assert counted(SAE(SAEConfig(4, 4096, kind="matryoshka", levels=levels))) == k
    assert counted(SAE(SAEConfig(4, 8, kind="topk", k=4))) is None


@pytest.fixture
def named_run(tmp_path):
    """A run whose latents fire as `nested` says, with names, and the store of the rows."""
    np.save(tmp_path / "x.npy", nested().astype(np.float32))
    sae = SAE(SAEConfig(5, 5, kind="relu"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(5))
        sae.W_enc.copy_(torch.eye(5))
    sae.save(tmp_path / "run")
    names = (("Dog", ()), ("poodle", ()), ("night dog", ("black poodle",)), ("oak", ()))
    concepts = tuple(Concept(i, name, 0.9, 0.5, synonyms=same) for i, (name, same) in enumerate(names))
    ConceptNames("evidence", 5, concepts).save(tmp_path / "run")
    return str(tmp_path / "run"), str(tmp_path / "x.npy")


def code_of(*argv):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in argv])
    return left.value.code


def test_tree_is_scored_against_a_table_of_pairs(named_run, tmp_path, capsys):
    run, store = named_run
    pairs, out = tmp_path / "pairs.csv", tmp_path / "tree.json"
    pairs.write_text("parent,child\ndog,Poodle\npoodle,black_poodle\ntree,oak\n,lone\n")
    assert code_of("gallery", run, "--on", store, "--tree", "--pairs", pairs, "--json", out) == 0
    found = json.loads(out.read_text())["score"]
    # poodle under dog, black poodle (a synonym) under poodle and so under dog; with oak four latents, twelve pairs
    assert found == {"predicted": 3, "precision": 1.0, "chance": 3 / 12, "wanted": 3, "recall": 1.0}
    assert (
        "3 edges join two latents that the pairs name: 100.0% of them are known pairs, 25.0%" in capsys.readouterr().out
    )
    wrong = concept_tree(run, store, pairs=[("dog", "poodle"), ("poodle", "animal")]).score
    assert (wrong.predicted, wrong.precision, wrong.recall) == (1, 0, 0)
    assert "no edge joins" in concept_tree(run, store, pairs=[("cat", "animal")]).to_text()
    assert concept_tree(run, store).score is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("word,parent\na,b\n", "has the columns word, parent, but no child; give a table with child and parent"),
        ("child,parent\na,\n", "has no row with both a child and a parent"),
        (None, "cannot be read as csv"),
    ],
)
def test_pairs_that_are_none_are_refused_in_one_line(named_run, tmp_path, capsys, text, line):
    pairs = tmp_path / "pairs.csv"
    if text is not None:
        pairs.write_text(text)
    assert code_of("gallery", named_run[0], "--on", named_run[1], "--tree", "--pairs", pairs) == 1
    assert line in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_pairs_need_a_tree_and_names(named_run, tmp_path, capsys):
    run, store = named_run
    assert code_of("gallery", run, "--on", store, "--latent", "1", "--pairs", "p.csv") == 1
    assert "add --tree" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"p\.txt is no table; give --pairs a file ending in"):
        concept_tree(run, store, pairs="p.txt")
    with pytest.raises(ConfigError, match=r"no names\.json.*type msae name RUN"):
        concept_tree(SAE.load(run), store, pairs=[("a", "b")])
