"""Tests of metrics: prepared operands, their gradients and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import reference
from support.contract import METRICS
from support.tolerances import allclose
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softdb
from softdb import SoftKVStore
from softdb.functional import soft_read
from softdb.scoring.metrics import Precision, compute_center, prepare_keys, prepare_keys_backward, prepare_query

pytestmark = pytest.mark.each_device


@pytest.mark.parametrize("metric", METRICS)
def test_the_product_of_prepared_operands_is_the_score(metric: str) -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(3, 4, 6).double(), torch.randn(3, 9, 6).double()
    center = compute_center(query, metric)
    operands = prepare_query(query, metric, 0.7, center, query.dtype), prepare_keys(keys, metric, center, keys.dtype)
    assert allclose(operands[0] @ operands[1].mT, reference.scores(query, keys, metric, 0.7))


@pytest.mark.parametrize("metric", METRICS)
def test_prepare_keys_backward_matches_autograd(metric: str) -> None:
    torch.manual_seed(0)
    keys = torch.randn(9, 6).double()
    keys[3] = 0
    keys.requires_grad_()
    center = compute_center(torch.randn(5, 6), metric)
    operand = prepare_keys(keys, metric, center, keys.dtype)
    grad = torch.randn_like(operand)
    (expected,) = torch.autograd.grad(operand, keys, grad)
    assert allclose(prepare_keys_backward(grad, keys.detach(), metric, center), expected)


def test_l2_is_computed_in_float64() -> None:
    query, keys = torch.randn(5, 6) + 1000, torch.randn(9, 6) + 1000
    center = compute_center(query, "l2")
    operands = prepare_query(query, "l2", 1.0, center, query.dtype), prepare_keys(keys, "l2", center, keys.dtype)
    assert operands[0].dtype == torch.float64
    assert allclose(operands[0] @ operands[1].T, reference.scores(query.double(), keys.double(), "l2"), atol=1e-9)


class NoFloat64(TorchDispatchMode):
    """Simulation of a device without float64, such as MPS: operations that return float64 raise."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("float64 is not supported on this device")
        return result


@pytest.mark.parametrize("rows", [20, 9000])
@pytest.mark.parametrize("metric", ["dot", "scaled_dot", "cosine"])
def test_reads_need_no_float64_except_l2(metric: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(40, 8, requires_grad=True), torch.randn(rows, 8), torch.randn(rows, 3)
    mask = torch.rand(40, rows) < 0.5
    expected = soft_read(query, keys, values, metric=metric, mask=mask, k=3)
    (gradient,) = torch.autograd.grad(expected.values.sum() + expected.lse.sum(), query)
    monkeypatch.setattr(Precision, "for_device", lambda device: Precision(has_float64=False))
    with NoFloat64():
        read = soft_read(query, keys, values, metric=metric, mask=mask, k=3)
        (actual,) = torch.autograd.grad(read.values.sum() + read.lse.sum(), query)
    assert allclose(read.values, expected.values, atol=1e-6)
    assert allclose(actual, gradient, atol=1e-5)


@pytest.mark.cpu_only
def test_l2_without_float64_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Precision, "for_device", lambda device: Precision(has_float64=False))
    store = SoftKVStore(8, 3, metric="l2")
    store.add(torch.randn(5, 8), torch.randn(5, 3))
    with pytest.raises(softdb.DeviceError, match="metric: expected a device with float64 for 'l2', got cpu"):
        store.read(torch.randn(2, 8))
    with pytest.raises(softdb.DeviceError, match="metric: expected a device with float64 for 'l2'"):
        soft_read(torch.randn(2, 8), torch.randn(5, 8), torch.randn(5, 3), metric="l2")
