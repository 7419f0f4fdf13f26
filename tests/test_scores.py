"""Metrics as prepared operands."""

from __future__ import annotations

import pytest
import reference
import torch
from contract import METRICS

from softdb.scores import centre_of, prepare_keys, prepare_keys_backward, prepare_query


@pytest.mark.parametrize("metric", METRICS)
def test_the_product_of_prepared_operands_is_the_score(metric: str) -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(3, 4, 6).double(), torch.randn(3, 9, 6).double()
    centre = centre_of(query, metric)
    operands = prepare_query(query, metric, 0.7, centre, query.dtype), prepare_keys(keys, metric, centre, keys.dtype)
    assert torch.allclose(operands[0] @ operands[1].mT, reference.scores(query, keys, metric, 0.7))


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_of_prepared_keys(metric: str) -> None:
    torch.manual_seed(0)
    keys = torch.randn(9, 6).double()
    keys[3] = 0
    keys.requires_grad_()
    centre = centre_of(torch.randn(5, 6), metric)
    operand = prepare_keys(keys, metric, centre, keys.dtype)
    grad = torch.randn_like(operand)
    (wanted,) = torch.autograd.grad(operand, keys, grad)
    assert torch.allclose(prepare_keys_backward(grad, keys.detach(), metric, centre), wanted)


def test_l2_is_computed_in_float64() -> None:
    query, keys = torch.randn(5, 6) + 1000, torch.randn(9, 6) + 1000
    centre = centre_of(query, "l2")
    operands = prepare_query(query, "l2", 1.0, centre, query.dtype), prepare_keys(keys, "l2", centre, keys.dtype)
    assert operands[0].dtype == torch.float64
    assert torch.allclose(operands[0] @ operands[1].T, reference.scores(query.double(), keys.double(), "l2"), atol=1e-9)
