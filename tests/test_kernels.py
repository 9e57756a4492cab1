"""Every kernel is the formula: it agrees with float64 autograd, with an obvious numpy selection and with the others."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from msae import activations, losses
from msae.kernels import Selection, sae_loss

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
    "jumprelu": {"selection": Selection(bandwidth=0.1), "l0": 0.1, "l0_target": 5},
    "widths": {"selection": Selection(widths=(20, 100, 200)), "weights": (1, 1, 1)},
    "soft cap": {**MATRYOSHKA, "soft_cap": 1.5},
    "batchtopk in widths": {"selection": Selection(widths=(20, 100), batch_k=9), "weights": (1, 2)},
    "jumprelu in widths": {"selection": Selection(widths=(20, 100), bandwidth=0.2), "weights": (1, 2), "l1": 0.01},
    "batchtopk in levels": {"selection": Selection(levels=(4, 9, 30), batch_k=8), "weights": (3, 0, 1)},
}


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
    assert (found.l0, found.l1) == pytest.approx((wanted.l0, wanted.l1), rel=1e-6)
    assert found.smallest_kept == pytest.approx(wanted.smallest_kept, rel=1e-3, abs=1e-6)
    # So few terms hardly average out: float32 autograd itself is off by up to 1.4e-6 here.
    for name, gradient, exact in zip(NAMES, gradients, wanted_gradients, strict=False):
        assert relative_error(gradient, exact) < 3e-6, name


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_real_size_are_exact_to_one_part_in_a_million(kind, kernel):
    options = KINDS[kind]
    weights = parameters(512, 2048, with_threshold=options["selection"].bandwidth is not None)
    x = rows_of(128, 512)
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
    wanted = losses.matryoshka_loss(x, h, W_dec, b_dec, levels=(4, 32, 160), weights=(3, 2, 1))
    found = sae_loss(x, *weights, selection=Selection(levels=(4, 32, 160)), weights=(3, 2, 1), kernel=kernel)
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
