"""Concepts from examples: what is learnt, kept, refused, and used."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from msae import find, learn_concept, search
from msae.base.errors import ConfigError, RunError, StoreError
from msae.concepts.concept import BLOCK_ROWS, ConceptSet
from msae.concepts.examples import MIN_EXAMPLES, best_thresholds, f1, from_rows, learn, load_examples
from msae.concepts.names import Concept, names_of
from msae.data.parts import read_part
from msae.data.store import StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, Statistics
from msae.sae.view import View
from msae.use.edits import Edit, edit_activations, parse_change

N = 600


def activations(seed=0):
    """Rows whose first ten latents fire at random, and what they mean."""
    rng = np.random.default_rng(seed)
    fires = rng.random((N, 10)) < 0.3
    return (fires * rng.uniform(0.5, 1.5, fires.shape)).astype(np.float32), fires


@pytest.fixture
def world(tmp_path):
    """An SAE that reads each coordinate by a latent of its own, and rows whose column says what latents mean."""
    z, fires = activations()
    sae = SAE(
        SAEConfig(d_in=10, d_sae=10, kind="relu"), Standardizer({"image": Statistics(torch.zeros(10), 1.0)}), seed=0
    )
    with torch.no_grad():
        for matrix in (sae.W_enc, sae.W_dec):
            matrix.copy_(torch.eye(10))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.save(tmp_path / "run")
    kind = np.where(fires[:, 3] & ~fires[:, 7], "yes", "no").astype(object)
    kind[:5] = None
    table = pa.table({
        "id": [f"r{i}" for i in range(N)],
        "kind": kind.tolist(),
        "one": np.where(fires[:, 2], "yes", "no"),
        "none": np.where(~fires[:, 1] & ~fires[:, 4], "yes", "no"),
    })  # fmt: skip
    z[~z.any(1), 0] = 0.1  # a store refuses rows of zeros in a search
    return tmp_path / "run", write_store(tmp_path / "rows.store", [StorePart({"image": z}, table)])


def test_thresholds_agree_with_trying_every_one():
    z, fires = activations()
    wanted = fires[:80, 3]
    found, thresholds = best_thresholds(z[:80], wanted)
    for column in range(10):
        cuts = np.unique(z[:80, column])
        tried = [f1(z[:80, column] > cut, wanted) for cut in cuts[:-1]]
        assert found[column] == pytest.approx(max(tried))
        assert f1(z[:80, column] > thresholds[column], wanted) == pytest.approx(max(tried))


def test_one_latent_is_taken_where_it_does_as_well(world):
    one = learn_concept(world[0], "two", f"{world[1].path}:one=yes")
    assert (one.latents, one.against, one.weights) == ((2,), (), (1.0,))
    assert one.judged.f1 == one.judged.f1_single == 1.0


def test_what_speaks_against_a_concept_is_found(world):
    one = learn_concept(world[0], "three without seven", f"{world[1].path}:kind=yes")
    assert one.latents == (3,) and one.against == (7,)
    assert one.judged.f1 > one.judged.f1_single + 0.05
    assert one.left_out == {"of neither kind": 5}


def test_a_concept_may_be_that_latents_are_silent():
    z, fires = activations()
    found = learn(z, ~fires[:, 1] & ~fires[:, 4])
    assert {1, 4} <= set(found.latents[found.weights < 0].tolist())
    assert f1(found.fires(activations(1)[0]), ~activations(1)[1][:, [1, 4]].any(1)) > 0.9


def test_shuffled_labels_give_no_concept_that_beats_one_latent():
    z, fires = activations()
    rng = np.random.default_rng(3)
    sizes = [len(learn(z[:100], rng.permutation(fires[:100, 3]), seed=i).latents) for i in range(10)]
    assert sum(size == 1 for size in sizes) >= 8


def test_what_is_kept_is_what_was_found_and_is_a_concept_everywhere(world):
    run, store = world
    made = learn_concept(run, "Three", f"{store.path}:kind=yes")
    assert load_examples(run) == {"three": made}
    names = names_of(run)
    assert names["THREE"] == [3] and names.by_name == {"Three": [3]} and names.shown_name("three") == "three"
    with_a_latent = replace(names, concepts=(Concept(2, "three", 0.5, None), Concept(1, "one", 0.5, None)))
    assert with_a_latent.by_name == {"one": [1], "Three": [3]}  # it goes before a latent's own name
    group = ConceptSet(View(run, store, block_rows=BLOCK_ROWS), names)["three"]
    z = torch.from_numpy(View(run, store).table(np.arange(N)))
    assert (group.is_present(group.strength(z)).numpy() == made.fires(z.numpy())).all()


def test_an_edit_gives_the_strength_that_is_asked_for(world):
    run, store = world
    learn_concept(run, "three", f"{store.path}:kind=yes")
    group = ConceptSet(View(run, store, block_rows=BLOCK_ROWS), names_of(run), strict=True)["three"]
    z = torch.from_numpy(View(run, store).table(np.arange(50)))
    edited = edit_activations(z, [Edit(group, parse_change(2.0))])
    low = group.strength(z) < 2
    assert torch.allclose(group.strength(edited)[low], torch.tensor(2.0), atol=1e-5)
    assert torch.equal(edited[:, 7], z[:, 7])


def test_a_value_of_a_column_is_a_concept_at_once(world):
    run, store = world
    found = search(run, store, like="r9", set={"one:yes": "p99"})
    assert found.edits[0].latents == (2,) and not (run / "examples.json").exists()


def test_an_edit_that_changes_little_says_what_would_change_more(world):
    run, store = world
    row = str(np.flatnonzero([kind == "yes" for kind in store.column("one")])[0])
    little = search(run, store, like=f"r{row}", set={"#2": "+0.0001"})
    assert any("brought 0 new of 20 rows; --set '#2=" in warning for warning in little.warnings)
    absent = store.column("one").index("no")
    nothing = search(run, store, like=f"r{absent}", set={"#2": 0})
    assert any("the query has no #2" in warning for warning in nothing.warnings)


def test_rows_that_were_picked_and_random_others(world):
    run, store = world
    with_two = [f"r{i}" for i in range(N) if store.column("one")[i] == "yes"]
    made = learn_concept(run, "picked", store.path, like=with_two[:50])
    assert made.latents == (2,) and "50 rows against 200 random others" in made.examples
    both = learn_concept(
        run,
        "picked",
        store.path,
        like=with_two[:30],
        unlike=[f"r{i}" for i in range(30, 90) if f"r{i}" not in with_two],
    )
    assert both.latents == (2,) and list(load_examples(run)) == ["picked"]


def test_what_cannot_be_learnt_is_refused(world):
    run, store = world
    with pytest.raises(StoreError, match="kind = 'yess'; did you mean 'yes'"):
        learn_concept(run, "x", f"{store.path}:kind=yess")
    with pytest.raises(ConfigError, match=f"3 rows with it; give at least {MIN_EXAMPLES}"):
        learn_concept(run, "x", store, like=["r1", "r2", "r3"])
    with pytest.raises(ConfigError, match="'r1' is given both as like and as unlike"):
        learn_concept(run, "x", store, like=["r1"], unlike=["r1"])
    with pytest.raises(ConfigError, match="by --from STORE:column=value"):
        learn_concept(run, "x", store)
    with pytest.raises(ConfigError, match="no name for a concept"):
        learn_concept(run, "#3", f"{store.path}:kind=yes")
    assert not (run / "examples.json").exists()


def test_concepts_of_other_weights_are_refused(world):
    run, store = world
    learn_concept(run, "three", f"{store.path}:kind=yes")
    file = run / "examples.json"
    data = json.loads(file.read_text())
    data["concepts"][0]["origin"]["sae"] = "other"
    file.write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"'three' in .* was learnt from other weights"):
        names_of(run)


def test_finding_says_which_latent_goes_with_a_value(world):
    run, store = world
    found = find(run, store, "one", value="yes", n=2)
    assert [one.value for one in found.values] == ["yes"] and found.n_rows == N
    best = found.values[0].latents[0]
    assert (best.latent, best.auroc, best.fires_with, best.fires_without) == (2, 1.0, 1.0, 0.0)
    assert best.low < 1.0 == best.high and found.to_json()["values"][0]["latents"][0]["latent"] == 2
    assert found.too_few == 0  # one value was asked for: no other was left out
    assert {one.value for one in find(run, store, "kind").values} == {"yes", "no"}
    with pytest.raises(StoreError, match="did you mean 'yes'"):
        find(run, store, "one", value="yess")
    with pytest.raises(ConfigError, match="no value of 'id' has not"):
        find(run, store, "id")


def test_a_part_is_read_with_any_sign_in_its_value(tmp_path):
    table = pa.table({"id": ["a", "b", "c"], "size": ["1:2=3", "x", None]})
    store = write_store(tmp_path / "a.store", [StorePart({"image": np.ones((3, 2), np.float32)}, table)])
    part = read_part(f"{store.path}:size=1:2=3")
    assert part.rows.tolist() == [0] and part.others.tolist() == [1] and part.shown == "a.store:size=1:2=3"
    assert read_part(store.path).rows.tolist() == [0, 1, 2]


def test_the_latents_do_not_depend_on_the_order_of_the_rows(world):
    run, store = world
    view, labels = View(run, store), np.array(store.labels("kind"), object)
    yes, no = np.flatnonzero(labels == "yes"), np.flatnonzero(labels == "no")
    assert from_rows(view, "a", yes, no, shown="") == from_rows(view, "a", yes[::-1], no[::-1], shown="")
