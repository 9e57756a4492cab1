"""Stability: the matching is the best of all, found from candidates; consensus is what every seed has."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from msae.base.errors import ConfigError, RunError
from msae.cli import main
from msae.concepts.names import Concept, ConceptNames
from msae.concepts.stability import match, stability
from msae.data.arrays import unit_rows
from msae.sae.model import SAE, SAEConfig
from msae.sae.train import train


def rows(n, d_in=16, seed=0):
    """Unit rows with a few strong directions, as decoders have."""
    rng = np.random.default_rng(seed)
    return unit_rows((rng.normal(size=(n, d_in)) * np.linspace(1, 0.1, d_in)).astype(np.float32))


def noisy(a, noise, seed):
    """The same rows in another order, each off by a random amount up to `noise`."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(a))
    off = rng.normal(size=a.shape) * rng.random((len(a), 1)) * noise
    return unit_rows((a[order] + off).astype(np.float32)), order


def best_total(a, b):
    """The largest sum of cosines by the dense Hungarian method."""
    cosines = (a @ b.T).astype(np.float64)
    i, j = linear_sum_assignment(cosines, maximize=True)
    return cosines[i, j].sum()


def make_sae(W_dec, **options):
    sae = SAE(SAEConfig(W_dec.shape[1], len(W_dec), kind="relu", **options))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(W_dec))
        sae.W_enc.copy_(torch.from_numpy(W_dec.T.copy()))
    return sae


@pytest.mark.parametrize("noise", [0.05, 0.5, 10.0], ids=["near", "half", "unrelated"])
@pytest.mark.parametrize("n", [1, 7, 300, 1200])
def test_matching_of_candidates_is_as_good_as_the_dense_one(n, noise):
    a = rows(n)
    b, _ = noisy(a, noise, seed=1)
    found = match(a, b)
    assert sorted(found.partner.tolist()) == list(range(n))
    np.testing.assert_allclose(found.cosine, (a * b[found.partner]).sum(1), atol=1e-6)
    assert found.cosine.sum() == pytest.approx(best_total(a, b), abs=1e-5)
    assert found.gap < 1e-6


def test_few_candidates_are_enlarged_until_the_answer_is_proven(monkeypatch):
    monkeypatch.setattr("msae.concepts.stability.CANDIDATES", 2)
    a, b = rows(400, 4), rows(400, 4, seed=5)  # crowded: many rows want the same partner
    found = match(a, b)
    assert found.cosine.sum() == pytest.approx(best_total(a, b), abs=1e-5) and found.gap < 1e-6


@pytest.mark.parametrize("block", [1, 100, 301])
def test_size_of_blocks_does_not_change_the_total(monkeypatch, block):
    a, b = rows(301), rows(301, seed=1)
    monkeypatch.setattr("msae.concepts.stability._BLOCK", block)
    assert match(a, b).cosine.sum() == pytest.approx(best_total(a, b), abs=1e-5)


def test_dead_rows_that_are_all_alike_are_matched_too():
    a, b = rows(200), rows(200, seed=1)
    a[50:120], b[100:180] = a[50], 0.0
    found = match(a, b)
    assert found.cosine.sum() == pytest.approx(best_total(a, b), abs=1e-5) and found.gap < 1e-6


def test_shuffled_dictionary_is_recognised_row_by_row():
    a = rows(500)
    order = np.random.default_rng(2).permutation(500)
    found = match(a, a[order])
    assert np.array_equal(order[found.partner], np.arange(500)) and found.mean == pytest.approx(1, abs=1e-6)


def test_matching_is_the_same_from_both_sides():
    a = rows(200)
    b, _ = noisy(a, 0.3, seed=1)
    there, back = match(a, b), match(b, a)
    assert np.array_equal(back.partner[there.partner], np.arange(200))
    assert there.mean == pytest.approx(back.mean, abs=1e-6)


def test_consensus_is_what_every_seed_found():
    """Of 60 latents the first 20 are in all three seeds, the next 20 in two, the others in one."""
    shared, seeds = rows(60, 32, seed=0), []
    orders = []
    for seed in range(3):
        own = rows(60, 32, seed=10 + seed)
        own[:20] = shared[:20]
        if seed < 2:
            own[20:40] = shared[20:40]
        order = np.random.default_rng(seed).permutation(60)
        orders.append(np.argsort(order))  # where each original row went
        seeds.append(make_sae(own[order]))
    found = stability(seeds, threshold=0.95)
    assert {c.latents for c in found.consensus} == {tuple(int(o[i]) for o in orders) for i in range(20)}
    assert len(stability(seeds[:2], threshold=0.95).consensus) == 40
    assert [(p.a, p.b) for p in found.pairs] == [("run 0", "run 1"), ("run 0", "run 2"), ("run 1", "run 2")]


def test_result_is_json_with_the_promised_keys():
    saes = [make_sae(rows(30, seed=seed)) for seed in range(2)]
    data = json.loads(json.dumps(stability(saes, threshold=0.0).to_json(), allow_nan=False))
    (pair,) = data["pairs"]
    assert {"a", "b", "decoder", "encoder"} <= set(pair) and isinstance(pair["decoder"], float)
    assert pair["decoder_quantiles"]["p5"] <= pair["decoder_quantiles"]["p95"]
    assert data["consensus"] and len(data["consensus"][0]["latents"]) == 2


def test_runs_from_the_same_initial_weights_are_no_measure_of_stability(tmp_path, capsys):
    """Two kinds from one seed stay near their common start and are matched number by number; other seeds are not."""
    x = torch.from_numpy(rows(400, 16, seed=5))
    np.save(tmp_path / "x.npy", x.numpy())
    options = {"d_sae": 64, "epochs": 2, "batch_size": 64, "device": "cpu"}
    for name, seed, kind in (("a", 0, "relu"), ("b", 0, "topk"), ("c", 1, "relu")):
        train(tmp_path / "x.npy", out=tmp_path / name, seed=seed, kind=kind, **options)
    found = stability([tmp_path / name for name in "abc"])
    assert [pair.same_start for pair in found.pairs] == [True, False, False]
    pairs = found.to_json()["pairs"]
    assert [pair["same_start"] for pair in pairs] == [True, False, False]
    assert pairs[0]["matched_in_place"] > 0.5 > 8 / 64 > pairs[1]["matched_in_place"]
    with pytest.raises(SystemExit):
        main(["stability", str(tmp_path / "a"), str(tmp_path / "b")])
    assert re.search(
        "NOT A MEASURE OF STABILITY: .*a and .*b began from the same weights .* another --seed", capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        main(["stability", str(tmp_path / "a"), str(tmp_path / "c")])
    assert "NOT A MEASURE" not in capsys.readouterr().out


def test_means_are_those_of_decoder_and_encoder_each_matched_by_itself():
    one, other = make_sae(rows(40)), make_sae(rows(40, seed=1))
    with torch.no_grad():
        other.W_enc.copy_(one.W_enc.flip(1) * 7)  # the same encoder, in another order and scale
    (pair,) = stability([one, other]).pairs
    assert pair.encoder.mean == pytest.approx(1, abs=1e-6)
    assert pair.decoder.mean == pytest.approx(best_total(rows(40), rows(40, seed=1)) / 40, abs=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "words"),
    [
        ([], {}, ConfigError, "at least two runs"),
        ([(8, 4)], {}, ConfigError, "only one run"),
        ([(8, 4), (9, 4)], {}, RunError, "run 1 is an SAE 4 -> 9, but run 0 is one 4 -> 8"),
        ([(8, 4), (8, 5)], {}, RunError, "run 1 is an SAE 5 -> 8, but run 0 is one 4 -> 8"),
        ([(8, 4), (8, 4)], {"threshold": 1.5}, ConfigError, "threshold 1.5 is no cosine"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_line(shapes, options, error, words):
    saes = [make_sae(rows(*shape)) for shape in shapes]
    with pytest.raises(error, match=words) as caught:
        stability(saes, **options)
    assert "\n" not in str(caught.value)


def test_consensus_concepts_carry_the_names_of_the_runs(tmp_path, capsys):
    for seed, names in enumerate([("dog", "cat"), ("dog", "kitten"), (None, "kitten")]):
        make_sae(rows(30)).save(tmp_path / str(seed))
        found = [Concept(i, name, 0.5, 0.1) for i, name in enumerate(names) if name]
        ConceptNames("evidence", 30, tuple(found)).save(tmp_path / str(seed))
    folders = [tmp_path / str(seed) for seed in range(3)]
    by_latent = {concept.latents[0]: concept for concept in stability(folders).consensus}
    assert (by_latent[0].name, by_latent[0].names) == ("dog", ("dog", "dog", None))
    assert (by_latent[1].name, by_latent[2].name) == ("kitten", None)
    with pytest.raises(SystemExit) as left:
        main(["stability", *map(str, folders)])
    assert left.value.code == 0 and "30 of 30 latents come back in all 3 runs" in capsys.readouterr().out


def test_command_line_refuses_one_run_in_one_line(tmp_path, capsys):
    make_sae(rows(30)).save(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["stability", str(tmp_path)])
    assert left.value.code == 1 and capsys.readouterr().err.count("\n") == 1
