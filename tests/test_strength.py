"""A concept has one strength: search, audits, comparisons and fixes read the same number from the same rows."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from msae import audit, compare, learn_concept
from msae.base.statistics import cliffs_delta, net_wins
from msae.concepts.concept import ConceptSet, make_group
from msae.concepts.names import names_of
from msae.concepts.strength import readers
from msae.data.store import StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, Statistics
from msae.sae.view import View
from msae.use.audit import Sweeper, fix
from msae.use.classifier import LinearClassifier
from tests.oracles import audits as oracle

N, D = 600, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strength")


@pytest.fixture(scope="module")
def run(folder):
    """An SAE that reads each coordinate by a latent of its own; decoder rows stand aslant to each other."""
    sae = SAE(SAEConfig(d_in=D, d_sae=D, kind="relu"), Standardizer({"image": Statistics(torch.zeros(D), 1.0)}), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.eye(D) + 0.3, dim=1))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.save(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def store(folder):
    """Rows in which latents 2 and 3 speak for `kind` k, latent 4 against it."""
    rng = np.random.default_rng(0)
    kind = rng.random(N) < 0.4
    z = (rng.random((N, D)) < 0.4) * rng.uniform(0.5, 1.5, (N, D))
    z[:, 2] = rng.uniform(0.5, 1.5, N) * (rng.random(N) < np.where(kind, 0.8, 0.15))
    z[:, 3] = rng.uniform(0.5, 1.5, N) * (rng.random(N) < np.where(kind, 0.8, 0.15))
    z[:, 4] = rng.uniform(0.5, 1.5, N) * (rng.random(N) < np.where(kind, 0.1, 0.8))
    table = {"id": [f"r{i}" for i in range(N)], "kind": np.where(kind, "k", "other"), "side": ["a", "b"] * (N // 2)}
    return write_store(folder / "rows.store", [StorePart({"image": z.astype(np.float32)}, pa.table(table))])


@pytest.fixture(scope="module")
def learnt(run, store):
    found = learn_concept(run, "mine", f"{store.path}:kind=k")
    assert len(found.latents) > 1 and found.against
    return found


@pytest.fixture(scope="module")
def classifier():
    weight = torch.zeros(2, D)
    weight[1] = torch.linspace(-1, 1, D)
    return LinearClassifier(("k", "other"), weight, torch.zeros(2), torch.zeros(D), torch.ones(D), False, "test")


def test_the_strength_of_a_group_is_the_length_along_its_common_direction_and_of_one_latent_its_activation():
    rng = torch.Generator().manual_seed(0)
    z = torch.rand(50, 4, generator=rng) * (torch.rand(50, 4, generator=rng) < 0.5)
    rows = torch.nn.functional.normalize(torch.randn(4, 6, generator=rng), dim=1)
    read = readers([(0, 1, 2), (3,)], z.mean(0), rows)
    wanted = oracle.group_strength(z, [0, 1, 2], rows)
    assert torch.allclose(read(z)[:, 0], wanted, atol=1e-6) and torch.equal(read(z)[:, 1], z[:, 3])
    # its pattern has strength one
    assert read(read.pattern[None])[0].tolist() == pytest.approx([1, 1])


def test_search_audit_fix_and_compare_read_one_strength(run, store, classifier, monkeypatch):
    view = View(run, store, "image")
    z = torch.from_numpy(view.table(np.arange(N)))
    wanted = oracle.group_strength(z, [2, 5], view.sae.W_dec.detach())
    of_search = make_group("pair", (2, 5), z[:, [2, 5]], view.sae.W_dec).strength(z)
    found = audit(run, store, classifier=classifier, names={"pair": [2, 5]}, n_permutations=20)
    of_audit = torch.from_numpy(found.sample.strengths[:, 0])
    from msae.use import compare as module

    read = module._strengths([view], [np.arange(N)], [module._Column((2, 5), "pair"), module._Column((1,), None)])
    seen = []
    monkeypatch.setattr(fix, "otsu_border", lambda strength: seen.append(strength) or 0.0)
    fix.clearly_present(view, (2, 5), z[:, [2, 5]].numpy())
    for strength in (of_search, of_audit, torch.from_numpy(read[:, 0]), torch.from_numpy(seen[0]).float()):
        assert torch.allclose(strength, wanted, atol=1e-5)  # float32 sums
    assert np.array_equal(read[:, 1], z[:, 1].numpy())


def test_an_audit_of_a_concept_from_examples_uses_its_weights_and_its_threshold(run, store, learnt, classifier):
    view = View(run, store, "image")
    z = view.table(np.arange(N))
    fires = learnt.fires(z)
    strength = z[:, list(learnt.latents)] @ learnt.weights - (z[:, list(learnt.against)] @ learnt.against_weights)
    assert np.array_equal(fires, strength > learnt.threshold) and 0.2 < fires.mean() < 0.6
    found = audit(run, store, classifier=classifier, concept=["mine"], n_permutations=20)
    one = found["mine"]
    assert one.latents == learnt.latents and one.remove.n == fires.sum() and one.set_p50.n == (~fires).sum()
    assert one.firing_rate == pytest.approx(fires.mean())
    above = np.where(fires, strength - learnt.threshold, 0)
    assert found.sample.strengths[:, 0] == pytest.approx(above, abs=1e-5)
    # it is set to what is usual where it is present, in the proportions that its latents have
    assert one.set_p50.strength == pytest.approx(np.median(strength[fires]), rel=1e-5)
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    edited = torch.from_numpy(z.copy())
    edited[np.ix_(fires, learnt.latents)] = 0
    after = oracle.edited_probabilities(view.sae, classifier, x, torch.from_numpy(z), edited)
    change, _ = oracle.mean_change(classifier.logits(x).softmax(1), after, torch.from_numpy(fires), 1)
    assert one.remove.change == pytest.approx(change, abs=1e-5)
    predicted = classifier.logits(x).argmax(1).numpy()
    wins = net_wins(above[:, None].astype(np.float32), np.zeros(N, int))
    wanted = cliffs_delta(wins, predicted == 1, np.zeros(N, int))[0]
    assert one.by_predicted.effect_size == pytest.approx(wanted, abs=1e-6)


def test_a_comparison_and_a_fix_take_a_concept_from_examples_where_it_fires(run, store, learnt, classifier):
    view = View(run, store, "image")
    z = view.table(np.arange(N))
    one = {own.name: own for own in compare(run, f"{store.path}:side=a", f"{store.path}:side=b").concepts}["mine"]
    is_a = np.arange(N) % 2 == 0
    assert (one.share_a, one.share_b) == (learnt.fires(z[is_a]).mean(), learnt.fires(z[~is_a]).mean())
    group = ConceptSet(view, names_of(view.run), strict=True)["mine"]
    present = group.is_present(group.strength(torch.from_numpy(z)))
    assert np.array_equal(present.numpy(), learnt.fires(z))
    from msae.use.audit.subjects import make_subject

    subject = make_subject(view, target="kind", classifier=classifier, class_texts=None, train_store=None, seed=0)
    rows = fix._rows(subject, learnt.latents, None, learnt)
    assert np.array_equal(rows.has, learnt.fires(z))


def test_a_sweep_of_a_concept_from_examples_raises_its_latents_as_the_audit_does(run, store, learnt):
    found = audit(run, store, "kind", concept=["mine"], n_permutations=20)["mine"]
    again = Sweeper(run, store, "kind").of(found, found.sweep.id)
    assert again.probabilities == pytest.approx(found.sweep.probabilities, abs=1e-6)
