import pytest
import torch

from msae.base.errors import ConfigError
from msae.sae import activations, losses
from tests.oracles import losses as oracle

N, D_IN, D_SAE = 24, 10, 48


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W_dec = make(D_SAE, D_IN)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    tensors = [make(N, D_IN), 0.5 * W_dec.T.contiguous(), 0.1 * make(D_SAE), W_dec, 0.1 * make(D_IN)]
    return [t.to(dtype).requires_grad_(i > 0) for i, t in enumerate(tensors)]


def both_gradients(formula, reference, dtype):
    """Values and gradients of the code under test in `dtype` and of the float64 oracle on the same numbers."""
    x, *parameters = problem(dtype)
    value = formula(x, *parameters)
    mine = torch.autograd.grad(value, parameters)
    exact = [x.double(), *(p.detach().double().requires_grad_() for p in parameters)]
    wanted = reference(*exact)
    theirs = torch.autograd.grad(wanted, exact[1:])
    return (value.detach(), *mine), (wanted.detach(), *theirs)


def assert_close(mine, theirs, dtype):
    limit = {torch.float64: 1e-6, torch.float32: 1e-5}[dtype]  # the bars of the issue; rank ties do not occur here
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (4.0, 3.0, 2.0, 1.0), (1.0, 0.0, 0.0, 5.0)])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
def test_matryoshka_loss_and_gradient_are_those_of_the_formula(dtype, weights, soft_cap):
    levels = (2, 5, 20, D_SAE)

    def formula(x, W_enc, b_enc, W_dec, b_dec):
        h = torch.addmm(b_enc, x - b_dec, W_enc)
        return losses.matryoshka_loss(x, h, W_dec, b_dec, levels=levels, weights=weights, soft_cap=soft_cap)

    def reference(*tensors):
        return oracle.matryoshka(*tensors, levels, weights, soft_cap)

    assert_close(*both_gradients(formula, reference, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relu_l1_loss_and_gradient_are_those_of_the_formula(dtype):
    def formula(x, W_enc, b_enc, W_dec, b_dec):
        z = torch.addmm(b_enc, x - b_dec, W_enc).relu()
        return losses.reconstruction_loss(x, torch.addmm(b_dec, z, W_dec)) + 0.03 * losses.l1_penalty(x, z)

    assert_close(*both_gradients(formula, lambda *t: oracle.relu_l1(*t, 0.03), dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batchtopk_loss_and_gradient_are_those_of_the_formula(dtype):
    def formula(x, W_enc, b_enc, W_dec, b_dec):
        z = activations.batchtopk(torch.addmm(b_enc, x - b_dec, W_enc), 4)
        return losses.reconstruction_loss(x, torch.addmm(b_dec, z, W_dec))

    assert_close(*both_gradients(formula, lambda *t: oracle.batchtopk(*t, 4), dtype), dtype)


def loss_at(levels, weights=None, seed=0):
    x, W_enc, b_enc, W_dec, b_dec = problem(torch.float64, seed)
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    return losses.matryoshka_loss(x, h, W_dec, b_dec, levels=levels, weights=weights or (1.0,) * len(levels))


def test_one_level_is_plain_topk():
    x, W_enc, b_enc, W_dec, b_dec = problem(torch.float64)
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    plain = losses.reconstruction_loss(x, torch.addmm(b_dec, activations.topk(h, 6), W_dec))
    assert loss_at((6,)).item() == pytest.approx(plain.item(), rel=1e-12)


def test_levels_at_or_above_the_number_of_positives_change_nothing():
    x, W_enc, b_enc, _, b_dec = problem(torch.float64)
    most = int((torch.addmm(b_enc, x - b_dec, W_enc) > 0).sum(1).max())
    assert most < D_SAE - 1, "the problem must leave room above"
    full = loss_at((D_SAE,)).item()
    for k in (most, most + 1, D_SAE - 1):
        assert loss_at((k,)).item() == pytest.approx(full, rel=1e-12)


def test_only_ratios_of_weights_matter():
    a, b = loss_at((2, 8), (1.0, 3.0)), loss_at((2, 8), (10.0, 30.0))
    assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_one_width_is_the_plain_reconstruction_and_no_width_is_the_bias():
    x, _, _, W_dec, b_dec = problem(torch.float64)
    z = torch.rand(N, D_SAE, dtype=torch.float64)
    whole = losses.nested_widths_loss(x, z, W_dec, b_dec, widths=(D_SAE,), weights=(1.0,))
    assert whole.item() == pytest.approx(losses.reconstruction_loss(x, z @ W_dec + b_dec).item(), rel=1e-12)
    two = losses.nested_widths_loss(x, z, W_dec, b_dec, widths=(8, D_SAE), weights=(1.0, 1.0))
    half = losses.reconstruction_loss(x, z[:, :8] @ W_dec[:8] + b_dec)
    assert two.item() == pytest.approx((whole.item() + half.item()) / 2, rel=1e-12)


def test_auxiliary_loss_reaches_dead_latents_alone():
    x, W_enc, b_enc, W_dec, b_dec = problem(torch.float64)
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 30]] = True
    loss = losses.auxiliary_loss(x - b_dec, h[:, dead], W_dec[dead], k=5)
    grad = torch.autograd.grad(loss, W_dec)[0].norm(dim=1)
    assert (grad[dead] > 0).all() and not grad[~dead].any()
    assert losses.auxiliary_loss(x, h[:, :0], W_dec[:0], k=5).item() == 0


@pytest.mark.parametrize("k", [1, 5])
def test_latents_at_minus_infinity_take_no_part_in_the_auxiliary_loss(k):
    x, *weights = problem(torch.float64)
    W_enc, b_enc, W_dec, b_dec = weights
    h = torch.addmm(b_enc, x - b_dec, W_enc)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 30]] = True
    some = losses.auxiliary_loss(x, h[:, dead], W_dec[dead], k=k)
    of_all = losses.auxiliary_loss(x, h.masked_fill(~dead, -torch.inf), W_dec, k=k)
    assert of_all.item() == pytest.approx(some.item(), rel=1e-12)
    for one, other in zip(
        *(torch.autograd.grad(loss, weights, retain_graph=True) for loss in (some, of_all)), strict=True
    ):
        torch.testing.assert_close(one, other)
    none = losses.auxiliary_loss(x, h.masked_fill(h < torch.inf, -torch.inf), W_dec, k=k)
    assert none.item() == 0 and not torch.autograd.grad(none, W_dec)[0].any()


def test_default_levels_double_and_end_with_d_sae():
    assert losses.default_levels(4096) == (64, 128, 256, 512, 1024, 2048, 4096)
    assert len(losses.default_levels(6144)) == 8
    assert losses.level_weights("reverse", 3) == (3.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("levels", "weights", "message"),
    [
        ((4, 4), (1.0, 1.0), "do not strictly increase"),
        ((8, 4), (1.0, 1.0), "do not strictly increase"),
        ((0, 4), (1.0, 1.0), "from at least 1"),
        ((4, 8), (1.0,), "one weight for each"),
        ((), (), "one weight for each"),
        ((4, 8), (1.0, -1.0), "non-negative"),
        ((4, 8), (0.0, 0.0), "not all zero"),
    ],
)
def test_wrong_levels_are_refused(levels, weights, message):
    with pytest.raises(ConfigError, match=message):
        losses.check_levels(levels, weights)


def test_a_soft_cap_also_caps_dead_latents_as_they_are_revived():
    W_dec, h = torch.eye(3), torch.full((4, 3), 50.0)
    residual = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]).repeat(2, 1)
    # cap 1: every latent gives 1 * tanh(50) = 1, so half of the rows have error 0 and half have 2^2; the variance is 1.
    assert losses.auxiliary_loss(residual, h, W_dec, k=3, cap=1.0).item() == pytest.approx(2.0)
