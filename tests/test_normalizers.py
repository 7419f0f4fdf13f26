"""From scores to weights."""

from __future__ import annotations

import math

import pytest
import torch

from softdb.normalizers import check_normalizer, softmax, straight_through


def test_softmax_is_torch_softmax() -> None:
    scores = torch.randn(4, 7).double().requires_grad_()
    weights, lse = softmax(scores)
    assert torch.allclose(weights, torch.softmax(scores, -1))
    assert torch.allclose(lse, torch.logsumexp(scores, -1))
    assert torch.autograd.gradcheck(softmax, (scores,))
    assert torch.autograd.gradgradcheck(softmax, (scores,))


def test_masking_equals_deleting_and_nothing_is_zero() -> None:
    raw = torch.randn(3, 5, requires_grad=True)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 3:] = True
    hidden[1] = True
    weights, lse = softmax(raw.masked_fill(hidden, -math.inf))
    kept, kept_lse = softmax(raw[[0, 2], :3])
    assert torch.equal(weights[[0, 2], :3], kept)
    assert torch.equal(lse[[0, 2]], kept_lse)
    assert (weights[1] == 0).all()
    assert lse[1] == -math.inf
    (weights.square().sum() + lse[[0, 2]].sum()).backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[hidden] == 0).all()


def test_softmax_of_no_columns() -> None:
    weights, lse = softmax(torch.zeros(3, 0))
    assert weights.shape == (3, 0)
    assert (lse == -math.inf).all()


def test_straight_through_passes_the_value_of_one_and_the_gradient_of_the_other() -> None:
    hard, soft = torch.tensor([1e30, 1.0], requires_grad=True), torch.tensor([0.1, 0.2], requires_grad=True)
    result = straight_through(hard, soft)
    assert torch.equal(result, hard)
    (result * torch.tensor([3.0, 4.0])).sum().backward()
    assert hard.grad is None
    assert soft.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("name", ["gumbel", "sparsemax", "entmax15"])
def test_planned_normalizers_say_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"normalizer: '{name}' is planned"):
        check_normalizer(name)
