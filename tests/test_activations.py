import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msae.sae import activations

H = torch.randn(32, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_topk_keeps_the_k_largest_and_then_their_positive_part():
    z = activations.topk(H, 5)
    for row, kept in zip(H.tolist(), z.tolist(), strict=True):
        expected = sorted(row, reverse=True)[:5]
        assert sorted(kept, reverse=True)[:5] == [max(0.0, value) for value in expected]
        assert sum(value > 0 for value in kept) <= 5


def test_topk_of_all_is_relu():
    assert torch.equal(activations.topk(H, 40), H.relu())
    assert torch.equal(activations.topk(H, 99), H.relu())


def test_topk_of_negative_rows_is_zero():
    assert not activations.topk(-H.abs(), 3).any()


@given(k=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_batchtopk_keeps_n_k_entries_of_the_batch(k):
    positive = H.abs() + 0.1
    z = activations.batchtopk(positive, k)
    assert int((z > 0).sum()) == 32 * k
    assert z[z > 0].min() >= torch.where(z > 0, -torch.inf, positive).max()


def test_batchtopk_of_one_row_is_topk():
    assert torch.equal(activations.batchtopk(H[:1], 7), activations.topk(H[:1], 7))


def test_jumprelu_is_zero_up_to_its_threshold():
    h = torch.tensor([[0.5, 1.0, 1.5, -2.0]])
    z = activations.jumprelu(h, torch.full((4,), 1.0), bandwidth=0.1)
    assert z.tolist() == [[0.0, 0.0, 1.5, 0.0]]
    assert torch.equal(z, activations.threshold_relu(h, torch.full((4,), 1.0)))


def test_jumprelu_threshold_gradient_is_the_rectangle_estimate():
    threshold = torch.full((3,), 1.0, requires_grad=True)
    h = torch.tensor([[1.04, 1.2, 0.98], [0.97, 5.0, 0.0]], requires_grad=True)
    activations.jumprelu(h, threshold, bandwidth=0.1).sum().backward()
    # -(threshold / bandwidth) for each entry within half a bandwidth: two, none, one.
    assert threshold.grad is not None and threshold.grad.tolist() == pytest.approx([-20.0, 0.0, -10.0])
    assert h.grad is not None and h.grad.tolist() == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]


def test_count_above_counts_and_pushes_thresholds_up_to_count_less():
    threshold = torch.full((3,), 1.0, requires_grad=True)
    h = torch.tensor([[1.04, 1.2, 0.98]])
    count = activations.count_above(h, threshold, bandwidth=0.1)
    assert count.tolist() == [2.0]
    count.sum().backward()
    assert threshold.grad is not None and threshold.grad.tolist() == pytest.approx([-10.0, 0.0, -10.0])


def test_soft_cap_is_the_identity_for_small_and_bounded_for_large():
    z = torch.tensor([[0.0, 1e-3, 1e6]], dtype=torch.float64)
    capped = activations.soft_cap(z, 5.0)
    assert capped[0, 0] == 0 and capped[0, 1] == pytest.approx(1e-3, rel=1e-6) and capped[0, 2] == 5.0
