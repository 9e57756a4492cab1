"""Every kernel is the formula: it agrees with float64 autograd, with an obvious numpy selection and with the others."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from msae.base.errors import ConfigError, MissingDependencyError, TrainingError
from msae.sae import activations, kernels, losses
from msae.sae.kernels import Selection, adamw_step_, loading, reference, sae_loss
from msae.sae.kernels.selection import Objective, Parameters
from tests.conftest import needs_posix

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
FUSED = [pytest.param("cpu", marks=needs_numba)]
EVERY = ["reference", *FUSED]
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

MATRYOSHKA = {"selection": Selection(levels=(8, 16, 64, 200)), "weights": (4, 3, 2, 1)}
KINDS = {
    "matryoshka": MATRYOSHKA,
    "topk": {"selection": Selection(levels=(12,))},
    "batchtopk": {"selection": Selection(batch_k=12)},
    "relu": {"selection": Selection(), "l1": 0.03},
    "relu with a soft cap": {"selection": Selection(), "l1": 0.01, "soft_cap": 1.5},
    "jumprelu": {"selection": Selection(bandwidth=0.1), "l0": 0.1, "l0_target": 5},
    "widths": {"selection": Selection(widths=(20, 100, 200)), "weights": (1, 1, 1)},
    "soft cap": {**MATRYOSHKA, "soft_cap": 1.5},
    "batchtopk in widths": {"selection": Selection(widths=(20, 100), batch_k=9), "weights": (1, 2)},
    "jumprelu in widths": {"selection": Selection(widths=(20, 100), bandwidth=0.2), "weights": (1, 2), "l1": 0.01},
    "batchtopk in levels": {"selection": Selection(levels=(4, 9, 30), batch_k=8), "weights": (3, 0, 1)},
}


@pytest.fixture(autouse=True)
def _no_kernel_was_given_up():
    """A kernel that fails is left for the reference, which would then be compared with itself."""
    yield
    assert not loading._given_up


def parameters(d_in: int, d_sae: int, *, with_threshold: bool, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    b_enc = 0.1 * torch.randn(d_sae, generator=generator)
    b_dec = 0.1 * torch.randn(d_in, generator=generator)
    threshold = 0.1 + 0.3 * torch.rand(d_sae, generator=generator)
    tensors = [0.3 * rows.T, b_enc, rows, b_dec, *([threshold] if with_threshold else [])]
    return [nn.Parameter(tensor) for tensor in tensors]


def rows_of(n: int, d_in: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def run(kernel, x, parameters, *, dtype=torch.float32, **options):
    """The loss and the gradients of the four (or five) parameters."""
    parameters = [nn.Parameter(p.detach().to(dtype)) for p in parameters]
    threshold = parameters[4] if len(parameters) == 5 else None
    loss = sae_loss(x, *parameters[:4], threshold=threshold, kernel=kernel, **options)
    loss.total.backward()
    return loss, [p.grad for p in parameters]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("shape", [(96, 200, 40), (64, 256, 33), (100, 300, 17), (7, 33, 9), (128, 250, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_float64_autograd(kind, shape, kernel):
    d_in, d_sae, n = shape
    options = KINDS[kind]
    weights = parameters(d_in, d_sae, with_threshold=options["selection"].bandwidth is not None)
    x = rows_of(n, d_in)
    wanted, wanted_gradients = run("reference", x, weights, dtype=torch.float64, **options)
    found, gradients = run(kernel, x, weights, **options)
    assert float(found.total.detach()) == pytest.approx(float(wanted.total.detach()), rel=1e-6)
    assert torch.allclose(found.errors.double(), wanted.errors, rtol=1e-6)
    assert torch.allclose(found.residual.double(), wanted.residual, atol=1e-5)
    assert torch.equal(found.fired, wanted.fired)
    assert (float(found.l0), float(found.l1)) == pytest.approx((float(wanted.l0), float(wanted.l1)), rel=1e-6)
    assert float(found.smallest_kept) == pytest.approx(float(wanted.smallest_kept), rel=1e-3, abs=1e-6)
    # So few terms hardly average out: float32 autograd itself is off by up to 1.4e-6 here.
    for name, gradient, exact in zip(NAMES, gradients, wanted_gradients, strict=False):
        assert relative_error(gradient, exact) < 3e-6, name


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_real_size_are_exact_to_one_part_in_a_million(kind, kernel):
    options = KINDS[kind]
    weights = parameters(512, 1024, with_threshold=options["selection"].bandwidth is not None)
    x = rows_of(64, 512)
    _, wanted = run("reference", x, weights, dtype=torch.float64, **options)
    _, gradients = run(kernel, x, weights, **options)
    # b_dec's gradient is a difference of two nearly equal sums.
    for name, gradient, exact in zip(NAMES, gradients, wanted, strict=False):
        assert relative_error(gradient, exact) < (2e-6 if name == "b_dec" else 1e-6), name


@pytest.mark.parametrize("kernel", EVERY)
def test_matryoshka_is_the_loss_of_the_losses_module(kernel):
    weights = parameters(48, 160, with_threshold=False)
    x = rows_of(20, 48)
    W_enc, b_enc, W_dec, b_dec = weights
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    wanted = losses.matryoshka_loss(x, h, W_dec, b_dec, levels=(4, 32, 160), weights=(3.0, 2.0, 1.0))
    found = sae_loss(x, *weights, selection=Selection(levels=(4, 32, 160)), weights=(3.0, 2.0, 1.0), kernel=kernel)
    assert torch.allclose(found.total, wanted, rtol=1e-6)


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_one_level_is_the_activation_function_of_the_activations_module(kind, kernel):
    weights = parameters(48, 160, with_threshold=kind == "jumprelu")
    W_enc, b_enc, W_dec, b_dec, *threshold = weights
    x = rows_of(20, 48)
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    selection, z = {
        "topk": lambda: (Selection(levels=(12,)), activations.topk(h, 12)),
        "batchtopk": lambda: (Selection(batch_k=12), activations.batchtopk(h, 12)),
        "jumprelu": lambda: (Selection(bandwidth=0.1), activations.jumprelu(h, threshold[0], bandwidth=0.1)),
    }[kind]()
    wanted = losses.reconstruction_loss(x, torch.addmm(b_dec, z, W_dec))
    wanted.backward()
    exact = [p.grad for p in weights]
    _, gradients = run(kernel, x, weights, selection=selection)
    for gradient, other in zip(gradients, exact, strict=True):
        assert relative_error(gradient, other) < 2e-6


def selected_by_numpy(h: np.ndarray, levels: tuple[int, ...]) -> list[np.ndarray]:
    """Number of entries kept at each level and their values, sorted: the slow and obvious way."""
    kept = []
    for k in levels:
        rows = np.sort(h, axis=1)[:, ::-1][:, :k]
        kept.append(np.where(rows > 0, rows, 0))
    return kept


def one_hot_loss(h: torch.Tensor, kernel: str, selection: Selection) -> kernels.SAELoss:
    """The loss where `h` are the pre-activations and the decoder shows the activations themselves."""
    d_sae = h.shape[1]
    eye = torch.eye(d_sae)
    weights = [eye, torch.zeros(d_sae), eye, torch.zeros(d_sae)]
    return sae_loss(h, *weights, selection=selection, weights=(1.0,) * selection.n_levels, kernel=kernel)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 0.5, 1e-40, 3e-45, -1e-40, 1e30, 0.25, 0.75, 3.0])


def drawn_pre_activations(data):
    n, d_sae = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    h = torch.tensor(data.draw(st.lists(NUMBERS, min_size=n * d_sae, max_size=n * d_sae))).view(n, d_sae)
    h[h.abs() > 1e20] = 4.0
    return h


@pytest.mark.parametrize("kernel", EVERY)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_selection_is_that_of_numpy_with_ties_zeros_denormals_and_negative_rows(kernel, data):
    h = drawn_pre_activations(data)
    n, d_sae = h.shape
    levels = tuple(sorted(data.draw(st.sets(st.integers(1, d_sae + 3), min_size=1, max_size=5))))
    loss = one_hot_loss(h, kernel, Selection(levels=levels))
    kept = selected_by_numpy(h.double().numpy(), levels)
    assert float(loss.l0) == pytest.approx((kept[-1] > 0).sum() / n)
    assert bool(loss.fired.any()) == bool((kept[-1] > 0).any())
    for error, rows in zip(loss.errors, kept, strict=True):  # what is kept is reconstructed, the rest is the error
        wanted = ((h.double().numpy() ** 2).sum() - (rows**2).sum()) / h.numel()
        assert float(error) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    reconstructed = h - loss.residual
    assert torch.equal(
        reconstructed.sort(dim=1, descending=True).values[:, : kept[-1].shape[1]], torch.tensor(kept[-1]).float()
    )


@pytest.mark.parametrize("kernel", EVERY)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_batch_selection_keeps_exactly_the_largest_of_the_batch(kernel, data):
    h = drawn_pre_activations(data)
    n, d_sae = h.shape
    k = data.draw(st.integers(1, d_sae + 2))
    loss = one_hot_loss(h, kernel, Selection(batch_k=k))
    kept = np.sort(h.numpy().ravel())[::-1][: n * k]
    kept = kept[kept > 0]
    reconstructed = (h - loss.residual).numpy().ravel()
    assert np.array_equal(np.sort(reconstructed[reconstructed > 0])[::-1], kept)
    assert loss.smallest_kept == (kept[-1] if len(kept) else 0.0)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kernel", FUSED)
def test_fused_kernels_agree_with_the_reference_on_any_shape_and_kind(kernel, data):
    d_in, d_sae, n = (data.draw(st.integers(1, limit)) for limit in (140, 90, 70))
    options = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    weights = parameters(d_in, d_sae, with_threshold=options["selection"].bandwidth is not None, seed=d_sae)
    x = rows_of(n, d_in, seed=d_in)
    W_enc, b_enc, _, b_dec = (p.detach().double() for p in weights[:4])
    assume(float(((x - b_dec) @ W_enc + b_enc).abs().min()) > 1e-6)  # else rounding decides what is positive
    wanted, exact = run("reference", x, weights, dtype=torch.float64, **options)
    found, gradients = run(kernel, x, weights, **options)
    assert torch.equal(found.fired, wanted.fired)
    for gradient, other in zip(gradients, exact, strict=True):
        scale = max(float(other.abs().max()), 1e-6)
        assert float((gradient - other).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc", "W_dec"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_nan_and_infinity_are_an_error_not_silence(kernel, where, value):
    weights = parameters(16, 40, with_threshold=False)
    x = rows_of(5, 16)
    with torch.no_grad():
        {"x": x, **dict(zip(NAMES, weights, strict=False))}[where][-1:].fill_(value)
        if value == float("inf") and where == "b_enc":
            weights[1][-1] = value
    with pytest.raises(TrainingError, match="the loss is"):
        sae_loss(x, *weights, **MATRYOSHKA, kernel=kernel)


@pytest.mark.parametrize("kernel", EVERY)
def test_one_level_is_plain_topk_and_many_equal_levels_change_nothing(kernel):
    weights = parameters(32, 64, with_threshold=False)
    x = rows_of(9, 32)
    _, one = run(kernel, x, weights, selection=Selection(levels=(64,)))
    _, relu = run(kernel, x, weights, selection=Selection())
    _, many = run(kernel, x, weights, selection=Selection(levels=(64, 65, 70)), weights=(1, 2, 3))
    for a, b, c in zip(one, relu, many, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
        assert torch.allclose(a, c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", FUSED)
def test_same_input_gives_the_same_bytes_at_any_number_of_threads(kernel):
    weights = parameters(96, 700, with_threshold=False)
    x = rows_of(300, 96)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, x, weights, **MATRYOSHKA)[1])
    finally:
        torch.set_num_threads(before)
    for other in results[2:3]:
        assert all(torch.equal(a, b) for a, b in zip(results[1], other, strict=True))
    for other in results[1:]:  # the dense encoder product is torch's, which may add in another order
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(results[0], other, strict=True))


@needs_numba
@pytest.mark.parametrize(("bias", "is_dense"), [(0.5, True), (-0.8, False)])
def test_relu_is_the_reference_s_whether_few_or_most_latents_are_active(bias, is_dense):
    from msae.sae.kernels import dense

    weights = parameters(96, 700, with_threshold=False)
    x = rows_of(300, 96)
    with torch.no_grad():
        h = (x - weights[3]) @ weights[0]
        weights[1] += bias * h.std() - weights[1]
        h = (h + weights[1]).numpy()
    assert dense.is_worthwhile(h, Selection()) == is_dense
    assert not dense.is_worthwhile(h, Selection(levels=(700,)))
    options = {"selection": Selection(), "l1": 0.03}
    wanted, exact = run("reference", x, weights, dtype=torch.float64, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found, gradients = run("cpu", x, weights, **options)
            assert float(found.l1) == pytest.approx(float(wanted.l1), rel=1e-6)
            assert torch.equal(found.fired, wanted.fired)
            for name, gradient, truth in zip(NAMES, gradients, exact, strict=False):
                assert relative_error(gradient, truth) < 2e-6, name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", EVERY)
def test_gradients_scale_with_the_gradient_of_the_loss_and_add_up(kernel):
    weights = parameters(24, 60, with_threshold=False)
    x = rows_of(11, 24)
    _, single = run(kernel, x, weights, **MATRYOSHKA)
    for half in x[:5], x[5:]:
        loss = sae_loss(half, *weights, **MATRYOSHKA, kernel=kernel).total
        (loss * len(half) / len(x)).backward()
    for parameter, gradient in zip(weights, single, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kernel", EVERY)
def test_without_gradients_the_loss_is_the_same(kernel):
    weights = parameters(24, 60, with_threshold=False)
    x = rows_of(11, 24)
    with torch.no_grad():
        silent = sae_loss(x, *weights, **MATRYOSHKA, kernel=kernel)
    loss = sae_loss(x, *weights, **MATRYOSHKA, kernel=kernel)
    assert not silent.total.requires_grad
    assert torch.equal(silent.total, loss.total.detach())


@pytest.mark.parametrize("kernel", EVERY)
def test_gradients_arrive_whatever_the_layout_of_the_encoder(kernel):
    weights = parameters(24, 60, with_threshold=False)
    x = rows_of(11, 24)
    _, transposed = run(kernel, x, weights, **MATRYOSHKA)
    weights[0] = nn.Parameter(weights[0].detach().contiguous())
    _, contiguous = run(kernel, x, weights, **MATRYOSHKA)
    for a, b in zip(transposed, contiguous, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_rows_are_computed_in_float32_and_such_parameters_refused(kernel, dtype):
    weights = parameters(24, 60, with_threshold=False)
    x = rows_of(11, 24).to(dtype)
    rounded = sae_loss(x, *weights, **MATRYOSHKA, kernel=kernel).total
    assert torch.equal(rounded, sae_loss(x.float(), *weights, **MATRYOSHKA, kernel=kernel).total)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rounded, sae_loss(x, *weights, **MATRYOSHKA, kernel=kernel).total)
    with pytest.raises(ConfigError, match="float32"):
        sae_loss(x, *(p.detach().to(dtype) for p in weights), **MATRYOSHKA, kernel=kernel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1, 2)}, "4 levels with 2 weights"),
        ({"weights": (0, 0, 0, 0)}, "not all zero"),
        ({"soft_cap": 0.0}, "not positive"),
        ({"l0": 1.0}, "JumpReLU"),
        ({"kernel": "gpu"}, "not known"),
        (
            {
                "soft_cap": 9.0,
                "selection": Selection(bandwidth=0.1),
                "weights": (1,),
                "kernel": "cpu",
                "threshold": torch.ones(60),
            },
            "does not do JumpReLU with a soft cap",
        ),
        ({"threshold": torch.ones(60)}, "without a bandwidth"),
    ],
)
def test_contradicting_settings_are_refused(change, message):
    weights = parameters(24, 60, with_threshold=False)
    with pytest.raises(ConfigError, match=message):
        sae_loss(rows_of(3, 24), *weights, **(MATRYOSHKA | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (4, 4)}, "strictly increase"),
        ({"widths": (0, 4)}, "strictly increase"),
        ({"levels": (4,), "widths": (4,)}, "two different"),
        ({"batch_k": 0}, "not positive"),
        ({"bandwidth": 0.1, "levels": (4,)}, "thresholds"),
    ],
)
def test_contradicting_selections_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Selection(**options)


def test_shapes_that_do_not_fit_are_refused():
    W_enc, b_enc, W_dec, b_dec = parameters(24, 60, with_threshold=False)
    with pytest.raises(ConfigError, match=r"x is \(3, 25\), wanted \(3, 24\)"):
        sae_loss(rows_of(3, 25), W_enc, b_enc, W_dec, b_dec, **MATRYOSHKA)
    with pytest.raises(ConfigError, match="empty"):
        sae_loss(rows_of(3, 24)[:0], W_enc, b_enc, W_dec, b_dec, **MATRYOSHKA)


def test_without_numba_the_reference_goes_on_with_one_line_in_the_log():
    program = (
        "import logging, sys; logging.basicConfig(); sys.modules['numba'] = None\n"
        "import torch; from msae import kernels\n"
        "W = torch.ones(3, 2)\n"
        "for _ in range(2):\n"
        "    weights = W.T, torch.zeros(3), W, torch.zeros(2)\n"
        "    kernels.sae_loss(torch.ones(4, 2), *weights, selection=kernels.Selection())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert "going on in plain torch" in done.stderr


@needs_numba
def test_a_kernel_that_fails_leaves_the_loss_to_the_reference_with_one_warning(monkeypatch, caplog):
    from msae.sae.kernels import cpu

    def fails(*_arguments, **_options):
        raise RuntimeError("cannot allocate executable memory\nat line 3")

    monkeypatch.setattr(loading, "_given_up", set())
    monkeypatch.setattr(cpu, "evaluate", fails)
    weights = parameters(8, 20, with_threshold=False)
    levels = {"selection": Selection(levels=(2,))}
    wanted = sae_loss(rows_of(3, 8), *weights, **levels, kernel="reference").total
    for _ in range(2):
        assert torch.equal(sae_loss(rows_of(3, 8), *weights, **levels).total, wanted)
    (record,) = caplog.records
    assert "cpu kernel cannot be used (RuntimeError: cannot allocate executable memory), going" in record.getMessage()
    loading._given_up.clear()


def test_a_named_kernel_whose_package_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="kernel cpu needs numba, which is not installed"):
        sae_loss(rows_of(3, 8), *parameters(8, 20, with_threshold=False), selection=Selection(), kernel="cpu")


@pytest.mark.parametrize("kernel", ["reference", pytest.param("cpu", marks=needs_numba)])
@pytest.mark.parametrize("levels", [(4, 16, 60), (4, 16), (8,)])
def test_level_scales_are_the_formula_and_have_its_gradient(kernel, levels):
    x, weights = rows_of(37, 20), parameters(20, 60, with_threshold=False)
    scales = torch.tensor([1.5, 1.2, 0.9][: len(levels)])
    shares = [1.0, 2.0, 4.0][: len(levels)]

    def gradients(dtype, loss_of):
        leaves = [nn.Parameter(p.detach().to(dtype)) for p in (*weights, scales)]
        loss = loss_of(x.to(dtype), *leaves)
        loss.backward()
        return loss, [leaf.grad for leaf in leaves]

    def formula(x, W_enc, b_enc, W_dec, b_dec, scales):
        h = (x - b_dec) @ W_enc + b_enc
        total = 0
        for k, share, scale in zip(levels, shares, scales, strict=True):
            z = torch.where(h >= h.sort(1, descending=True).values[:, k - 1 : k], h, 0).relu()
            total = total + share * (x - b_dec - scale * z @ W_dec).square().mean()
        return total / sum(shares)

    def ours(x, *leaves):
        return sae_loss(
            x, *leaves[:4], selection=Selection(levels=levels), weights=shares, level_scales=leaves[4], kernel=kernel
        ).total

    wanted, found = gradients(torch.float64, formula), gradients(torch.float32, ours)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=0)
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@needs_numba
def test_level_scales_of_one_change_nothing():
    x, weights = rows_of(50, 24), parameters(24, 200, with_threshold=False)
    plain, gradients = run("cpu", x, weights, **MATRYOSHKA)
    scaled, others = run("cpu", x, weights, **MATRYOSHKA, level_scales=torch.ones(4))
    torch.testing.assert_close(scaled.errors, plain.errors, rtol=1e-6, atol=0)
    for one, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_as_many_level_scales_as_levels_are_wanted():
    weights = parameters(8, 20, with_threshold=False)
    levels = {"selection": Selection(levels=(1, 2, 3)), "weights": (1, 1, 1)}
    with pytest.raises(ConfigError, match=r"level_scales is \(2,\), wanted \(3,\)"):
        sae_loss(rows_of(3, 8), *weights, **levels, level_scales=torch.ones(2))


def test_a_gpu_gets_the_reference():
    on_gpu = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))  # all that the choice asks of rows
    assert kernels._choose("auto", on_gpu, Objective(Selection(), (1.0,))) is reference


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_never_asks_a_device_for_a_value(kind):
    """Tensors on the meta device have no values: whatever would wait for a GPU fails here."""
    options = KINDS[kind]
    weights = parameters(30, 200, with_threshold=options["selection"].bandwidth is not None)
    weights = [nn.Parameter(p.detach().to("meta")) for p in weights]
    threshold = weights[4] if len(weights) == 5 else None
    objective = Objective(**{"weights": (1.0,), **options})
    loss = reference.evaluate(rows_of(7, 30).to("meta"), Parameters(*weights[:4], threshold), objective)
    loss.total.backward()
    assert all(p.grad.shape == p.shape for p in weights) and loss.smallest_kept.shape == ()


def test_msae_kernels_losses_and_metrics_are_there_after_import_msae():
    program = "import msae; msae.kernels.sae_loss; msae.losses.level_weights; msae.metrics.decoder_orthogonality"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_msae_kernels_does_not_import_numba():
    program = "import sys, msae.sae.kernels; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_numba
@pytest.mark.parametrize("is_transposed", [True, False])
def test_the_fused_optimizer_step_is_the_one_of_torch_and_shares_its_state(is_transposed):
    weights = parameters(40, 90, with_threshold=False)
    if not is_transposed:
        weights[0] = nn.Parameter(weights[0].detach().contiguous())
    twins = copy.deepcopy(weights)
    options = {"lr": 1e-2, "weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    ours, theirs = (torch.optim.AdamW(p, **options) for p in (weights, twins))
    for step in range(6):
        if step == 3:  # a checkpoint of one goes on in the other
            state = copy.deepcopy(ours.state_dict())
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(state)
        for parameter, twin in zip(weights, twins, strict=True):
            parameter.grad = torch.randn(parameter.shape).to(parameter) * torch.ones_like(parameter)
            twin.grad = parameter.grad.clone()
        norm = adamw_step_(ours, unit_rows=weights[2], max_grad_norm=1.0)
        twins[2].grad -= (twins[2].grad * twins[2].detach()).sum(1, keepdim=True) * twins[2].detach()
        wanted = nn.utils.clip_grad_norm_(twins, 1.0)
        theirs.step()
        with torch.no_grad():
            twins[2].div_(twins[2].norm(dim=1, keepdim=True))
        assert norm == pytest.approx(float(wanted), rel=1e-4)
        for parameter, twin in zip(weights, twins, strict=True):
            assert torch.allclose(parameter, twin, rtol=1e-5, atol=1e-6)
    assert torch.allclose(weights[2].norm(dim=1), torch.ones(90), atol=1e-6)


def test_the_optimizer_step_falls_back_to_torch_in_other_precisions():
    weights = [nn.Parameter(p.detach().double()) for p in parameters(8, 20, with_threshold=False)]
    for parameter in weights:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(weights)
    adamw_step_(optimizer, unit_rows=weights[2], max_grad_norm=1.0)
    assert torch.allclose(weights[2].norm(dim=1), torch.ones(20, dtype=torch.float64))


@needs_numba
@needs_posix
def test_a_forked_process_computes_too():
    program = (
        "import os, torch; torch.set_num_threads(2); from msae.sae.kernels import sae_loss, Selection\n"
        "W = torch.ones(64, 32)\n"
        "weights = W.T, torch.zeros(64), W, torch.zeros(32)\n"
        "f = lambda: sae_loss(torch.ones(64, 32), *weights, selection=Selection(), kernel='cpu')\n"
        "f(); torch.set_num_threads(1); pid = os.fork()\n"
        "f()\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("selection", [Selection(batch_k=9), Selection()], ids=["batchtopk", "relu"])
def test_a_soft_cap_changes_neither_what_is_kept_nor_the_threshold(kernel, selection):
    weights = parameters(48, 160, with_threshold=False)
    x = 8 * rows_of(20, 48)
    plain = sae_loss(x, *weights, selection=selection, kernel=kernel)
    capped = sae_loss(x, *weights, selection=selection, soft_cap=0.5, kernel=kernel)
    assert capped.smallest_kept == plain.smallest_kept > 0
    assert torch.equal(capped.fired, plain.fired) and capped.l0 == plain.l0
