import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msae.base.errors import ConfigError
from msae.measure import metrics
from tests.oracles import metrics as oracle


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(n=60, d_in=8, d_sae=24, seed=0):
    """Embeddings in a few directions, a lossy reconstruction, and activations that keep some neighbourhoods."""
    x = normal(n, 3, seed=seed) @ normal(3, d_in, seed=seed + 1) + 0.3 * normal(n, d_in, seed=seed + 2) + 0.5
    z = (x @ normal(d_in, d_sae, seed=seed + 3) - 1).relu()
    return x, x + 0.4 * normal(n, d_in, seed=seed + 4), z


def numpy(*tensors):
    return tuple(t.double().numpy() for t in tensors)


# --- Against the formulas, in numpy float64

PER_ROW = ["fvu_per_sample", "fvu_authors", "cosine"]
POOLED = ["fvu", "mae"]


@pytest.mark.parametrize("name", PER_ROW + POOLED)
def test_reconstruction_metric_equals_its_formula(name):
    x, x_hat, _ = related()
    found = np.asarray(getattr(metrics, name)(x, x_hat))
    # float64 throughout from the same float32 inputs: only the order of sums differs
    np.testing.assert_allclose(found, getattr(oracle, name)(*numpy(x, x_hat)), rtol=1e-12)


def test_sparsity_l0_and_dead_equal_their_formulas():
    _, _, z = related()
    z[:, 3] = 0
    np.testing.assert_allclose(metrics.sparsity(z).numpy(), oracle.sparsity(z.numpy()), rtol=1e-12)
    np.testing.assert_array_equal(metrics.l0(z).numpy(), (z.numpy() != 0).sum(1))
    assert metrics.dead(z) == oracle.dead(z.numpy()) >= 1


def test_decoder_metrics_equal_their_formulas():
    W_dec = normal(30, 7) * torch.rand(30, 1)
    np.testing.assert_allclose(
        metrics.decoder_orthogonality(W_dec), oracle.decoder_orthogonality(*numpy(W_dec)), rtol=1e-12
    )
    for block in (1, 7, 1024):  # float32 products of unit rows
        found = metrics.max_decoder_cosine(W_dec, block=block)
        np.testing.assert_allclose(found, oracle.max_decoder_cosine(*numpy(W_dec)), rtol=1e-6)


def test_probe_metrics_equal_their_formulas():
    logits, logits_hat = 3 * normal(20, 5), 3 * normal(20, 5, seed=1)
    kl = metrics.probe_kl(logits.double().log_softmax(1), logits_hat.double().log_softmax(1))
    np.testing.assert_allclose(kl.numpy(), oracle.probe_kl(*numpy(logits, logits_hat)), rtol=1e-10)
    same = logits.numpy().argmax(1) == logits_hat.numpy().argmax(1)
    assert metrics.probe_agreement(logits, logits_hat).tolist() == same.tolist()
    assert metrics.probe_accuracy(logits, logits.argmax(1)).all()


@pytest.mark.parametrize(("n", "k", "seed"), [(60, 10, 0), (60, 2, 1), (25, 10, 2), (12, 11, 3), (300, 10, 4)])
def test_cknna_equals_the_dense_formula(n, k, seed):
    x, _, z = related(n, seed=seed)
    # neighbours are those of float64; their products are float32, of relative error below 1e-6
    assert metrics.cknna(x, z, k) == pytest.approx(oracle.cknna(*numpy(x, z), k), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(5, 40), k=st.integers(1, 10), block=st.integers(1, 50), seed=st.integers(0, 99))
@pytest.mark.parametrize("lowest", [-2, 0])
def test_neighbours_are_those_of_float64_with_ties_to_the_smallest_index(lowest, n, k, block, seed):
    rows = torch.randint(-2, 3, (n, 4), generator=torch.Generator().manual_seed(seed)).clamp(lowest).float()
    k = min(k, n - 1)
    products = rows.numpy() @ rows.numpy().T
    found = metrics.nearest_neighbors(rows, k, block=block)
    for i in range(n):
        wanted = [j for j in np.argsort(-products[i], kind="stable") if j != i][:k]
        assert sorted(found.indices[i].tolist()) == sorted(wanted)
        np.testing.assert_array_equal(found.products[i].numpy(), products[i, found.indices[i].numpy()])


def test_a_row_at_the_origin_has_the_smallest_indices_as_neighbours():
    rows = normal(12, 3)
    rows[4] = 0
    assert metrics.nearest_neighbors(rows, 5).indices[4].tolist() == [0, 1, 2, 3, 5]
    assert metrics.nearest_neighbors(rows.abs(), 5).indices[4].tolist() == [0, 1, 2, 3, 5]


def test_neighbours_too_close_for_float32_are_told_apart():
    rows = torch.zeros(6, 3)
    rows[:, 0] = 1
    rows[1:, 1] = torch.tensor([1, 3, 5, 2, 4]) * 1e-5
    rows[0, 1] = 1e-4  # products with row 0 differ by 1e-9, below the spacing of float32 at 1
    assert metrics.nearest_neighbors(rows, 2).indices[0].tolist() == [3, 5]


# --- Cases whose answer is known


def test_cknna_of_equal_spaces_is_one():
    x, _, _ = related(200)
    assert metrics.cknna(x, x) == pytest.approx(1, abs=1e-12)
    assert metrics.cknna(x, 7 * x) == pytest.approx(1, abs=1e-6)


def test_cknna_of_a_rotated_space_is_one():
    x, _, _ = related(200)
    rotation = torch.linalg.qr(normal(8, 8).double()).Q
    assert metrics.cknna(x, (x.double() @ rotation).float()) == pytest.approx(1, abs=1e-4)


def test_cknna_of_unrelated_spaces_is_about_zero():
    # of n * k neighbours, k / n are shared by chance: 10 / 1000
    assert abs(metrics.cknna(normal(1000, 16), normal(1000, 16, seed=1))) < 0.02


def test_cknna_of_four_points_by_hand():
    # Nearest other points with k = 1. x: 0-1 and 2-3 are mutual. z: 0-1 mutual, and 2 and 3 both point at 0.
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    z = torch.tensor([[2.0, 1, 1], [2, 0, 0], [0, 1, 0], [0, 0, 1]])

    # K = mask(x x'): 1 at (0,1), (1,0), (2,3), (3,2).      tr KK = 4, sum 4, 1'KK1 = 4
    # L = mask(z z'): 4 at (0,1), (1,0), 1 at (2,0), (3,0). tr LL = 32, sum 10, 1'LL1 = (6, 4, 0, 0).(4, 4, 1, 1) = 40
    # shared: (0,1), (1,0).  tr = 2 * 1 * 4 = 8, sums 2 and 8, 1'KL1 = (1, 1).(4, 4) = 8
    def hsic(trace, sums, cross):
        return trace + sums / 6 - 2 * cross / 2

    wanted = hsic(8, 2 * 8, 8) / math.sqrt(hsic(4, 4 * 4, 4) * hsic(32, 10 * 10, 40))
    assert metrics.cknna(x, z, 1) == pytest.approx(wanted, rel=1e-12)


def test_cknna_of_a_space_without_structure_is_zero():
    assert metrics.cknna(normal(30, 4), torch.zeros(30, 9)) == 0


def test_predicting_the_mean_has_fvu_one():
    x, _, _ = related()
    mean = x.double().mean(0)
    assert metrics.fvu(x, mean.expand_as(x)) == pytest.approx(1, rel=1e-12)
    centred = (x.double() - mean).float()
    assert metrics.fvu_per_sample(centred, torch.zeros_like(x)).allclose(torch.ones(len(x)).double())


def test_a_perfect_reconstruction_scores_perfectly():
    x, _, _ = related()
    assert metrics.fvu(x, x) == metrics.mae(x, x) == 0
    assert not metrics.fvu_per_sample(x, x).any() and not metrics.fvu_authors(x, x).any()
    assert metrics.cosine(x, x).allclose(torch.ones(len(x)).double())


def test_a_common_direction_flatters_the_authors_fvu_only():
    # Raw embeddings lie in a narrow cone: predicting its axis explains nothing of how the rows differ.
    axis = normal(8)
    x = 5 * axis + normal(500, 8, seed=1)
    mean = x.mean(0).expand_as(x)
    assert metrics.fvu(x, mean) == pytest.approx(1, rel=1e-6)
    assert metrics.fvu_authors(x, mean).mean() < 0.2


def test_orthogonal_decoders_score_zero_and_random_ones_one_over_d_in():
    assert metrics.decoder_orthogonality(torch.eye(8)) == metrics.max_decoder_cosine(torch.eye(8)) == 0
    assert metrics.decoder_orthogonality(normal(2000, 50)) == pytest.approx(1 / 50, rel=0.02)
    twins = torch.cat([torch.eye(4), -torch.eye(4)])
    assert metrics.max_decoder_cosine(twins) == pytest.approx(1, rel=1e-6)
    assert metrics.max_decoder_cosine(torch.ones(1, 3)) == 0


def test_kl_is_finite_where_a_softmax_underflows():
    log_p = torch.tensor([[0.0, -2000.0]]).log_softmax(1)
    assert metrics.probe_kl(log_p, log_p.flip(1)).tolist() == [2000.0]
    assert metrics.probe_kl(log_p, log_p).tolist() == [0.0]


# --- Undefined values


def test_rows_at_the_origin_have_no_ratio_and_are_left_out():
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    x_hat = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    score = metrics.ReconstructionScore()
    score.update(x, x_hat)
    assert metrics.fvu_per_sample(x, x_hat)[0].isnan()
    assert score.fvu_per_sample() == metrics.Summary(0.5, 0.0, 1)
    assert score.cosine().n == 2 and metrics.cosine(x, x_hat)[0] == 0


def test_nothing_seen_is_nan_not_zero():
    empty = metrics.ReconstructionScore()
    assert math.isnan(empty.fvu()) and math.isnan(empty.mae()) and math.isnan(empty.cosine().mean)
    same = torch.ones(4, 2)
    assert math.isnan(metrics.fvu(same, 0 * same))


@pytest.mark.parametrize("call", [
    lambda x: metrics.cknna(x, x, 10),
    lambda x: metrics.cknna(x[:3], x[:3], 1),
    lambda x: metrics.nearest_neighbors(x, 0),
])  # fmt: skip
def test_too_few_rows_for_neighbours_are_refused(call):
    with pytest.raises(ConfigError, match="rows"):
        call(normal(10, 3))


# --- Invariances


def batched(x, x_hat, z, sizes):
    score, use = metrics.ReconstructionScore(), metrics.LatentUse(z.shape[1])
    for a, b, c in zip(x.split(sizes), x_hat.split(sizes), z.split(sizes), strict=True):
        score.update(a, b)
        use.update(c)
    return [score.fvu(), score.mae(), *score.fvu_per_sample(), *score.cosine(), *use.sparsity(), use.l0(), use.dead()]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 50), offset=st.sampled_from([0.0, 1000.0]))
def test_streaming_in_any_batches_and_order_gives_the_same_figures(cuts, seed, offset):
    x, x_hat, z = related(seed=seed)
    x, x_hat = x.double() + offset, x_hat.double() + offset
    edges = [0, *sorted(cuts), 60]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    whole = batched(x, x_hat, z, [60])
    pieces = batched(x[order], x_hat[order], z[order], [b - a for a, b in itertools.pairwise(edges)])
    np.testing.assert_allclose(pieces, whole, rtol=1e-9, atol=1e-12)  # float64 sums in another order


def test_cknna_does_not_depend_on_the_order_of_rows_or_latents():
    x, _, z = related(80)
    rows, latents = torch.randperm(80), torch.randperm(24)
    assert metrics.cknna(x[rows], z[rows][:, latents]) == pytest.approx(metrics.cknna(x, z), rel=1e-6)


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_cknna_does_not_depend_on_the_block_size(block):
    x, _, z = related(80)
    found = metrics.cknna_of(metrics.nearest_neighbors(x, block=block), metrics.nearest_neighbors(z, block=block))
    assert found == pytest.approx(metrics.cknna(x, z), rel=1e-6)


def test_cknna_ignores_scale():
    x, _, z = related(80)
    assert metrics.cknna(1000 * x, 0.001 * z) == pytest.approx(metrics.cknna(x, z), rel=1e-5)


# --- Recovery


def recovery(z, W_dec, b_dec, x, ks, batch=None):
    found = metrics.Recovery(ks, W_dec, b_dec)
    for a, b in zip(x.split(batch or len(x)), z.split(batch or len(x)), strict=True):
        found.update(a, b)
    return found


@pytest.mark.parametrize("narrow", [0, 2, 64])
@pytest.mark.parametrize("batch", [None, 13])
def test_recovery_equals_encoding_again_at_each_k(narrow, batch, monkeypatch):
    monkeypatch.setattr(metrics.Recovery, "NARROW", narrow)
    x, _, z = related()
    z[:, 5] = 0
    W_dec, b_dec = normal(24, 8), normal(8, seed=9)
    ks = metrics.recovery_ks(24)
    found = recovery(z, W_dec, b_dec, x, ks, batch)
    for k in ks:
        z_k = oracle.keep_strongest(z.double().numpy(), k)
        x_hat = z_k @ W_dec.double().numpy() + b_dec.double().numpy()
        score = found.score(k)
        # x_hat is float32
        assert score.fvu() == pytest.approx(oracle.fvu(x.double().numpy(), x_hat), rel=1e-5)
        wanted = oracle.fvu_per_sample(x.double().numpy(), x_hat)
        assert score.fvu_per_sample()[:2] == pytest.approx((wanted.mean(), wanted.std()), rel=1e-5)
        assert score.cosine().mean == pytest.approx(oracle.cosine(x.double().numpy(), x_hat).mean(), rel=1e-5)
        assert found.dead(k) == oracle.dead(z_k)


def test_recovery_of_silent_rows_is_the_bias():
    x, b_dec = normal(5, 8), normal(8, seed=1)
    found = recovery(torch.zeros(5, 24), normal(24, 8), b_dec, x, (1, 24))
    assert found.score(24).fvu() == pytest.approx(metrics.fvu(x, b_dec.expand_as(x)), rel=1e-12)
    assert found.dead(1) == found.dead(24) == 24


@pytest.mark.parametrize(("d_sae", "wanted"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_recovery_doubles_up_to_d_sae(d_sae, wanted):
    assert metrics.recovery_ks(d_sae) == wanted


@pytest.mark.parametrize("ks", [(), (0, 1), (2, 2), (4, 1), (1, 25)])
def test_recovery_refuses_what_does_not_increase_within_d_sae(ks):
    with pytest.raises(ConfigError, match="increasing"):
        metrics.Recovery(ks, normal(24, 8), normal(8))


# --- Real vectors


def test_cknna_of_real_vectors_equals_the_dense_formula(real_vectors):
    x = torch.from_numpy(np.load(real_vectors / "image_test.npy", mmap_mode="r")[:600].astype(np.float32))
    z = ((x - x.mean(0)) @ normal(512, 1024)).relu()
    assert metrics.cknna(x, z) == pytest.approx(oracle.cknna(*numpy(x, z)), rel=1e-6)


# --- Classes


@pytest.mark.parametrize("block", [1, 7, 60])
def test_class_f1_is_the_mean_over_classes_of_the_best_latents_f1(block):
    rng = np.random.default_rng(0)
    sides = []
    for n in (80, 60):
        labels = rng.integers(5 if n == 80 else 6, size=n)  # class 5 is not in training
        z = np.maximum(rng.normal(size=(n, 9)) + 2 * (labels[:, None] == np.arange(9)) - 0.8, 0)
        z[:, 4] = 0  # what would fit class 4 never fires
        targets = np.where(rng.random(n) < 0.1, -1, labels)  # some rows are left out
        sides.append((torch.from_numpy(z), torch.from_numpy(targets)))
    counts = []
    for z, targets in sides:
        counts.append(metrics.ClassFiring(6, 9))
        for rows in torch.arange(len(z)).split(block):
            counts[-1].update(z[rows], targets[rows])
    flat = [values[targets >= 0].numpy() for z, targets in sides for values in (z, targets)]
    found = metrics.class_f1(*counts)
    assert found == pytest.approx(oracle.class_f1(*flat), abs=1e-6)
    assert 0.3 < found < 0.9


def test_class_f1_by_hand():
    train, on = metrics.ClassFiring(3, 2), metrics.ClassFiring(3, 2)
    train.update(torch.tensor([[1.0, 0], [2, 0], [0, 1], [1, 1]]), torch.tensor([0, 0, 1, 1]))
    on.update(torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 3], [0, 0]]), torch.tensor([0, 0, 1, 1, 2]))
    # class 0 by latent 0: 1 hit, 1 missed, 1 false; class 1 by latent 1: the same; class 2 is not in training
    assert metrics.class_f1(train, on) == pytest.approx(0.5)


def test_a_class_that_no_latent_fires_for_scores_zero_and_none_at_all_is_nan():
    silent, on = metrics.ClassFiring(1, 2), metrics.ClassFiring(1, 2)
    silent.update(torch.zeros(3, 2), torch.tensor([0, 0, 0]))
    on.update(torch.ones(3, 2), torch.tensor([0, 0, 0]))
    assert metrics.class_f1(silent, on) == 0 and metrics.class_f1(on, on) == 1
    assert math.isnan(metrics.class_f1(on, metrics.ClassFiring(1, 2)))
