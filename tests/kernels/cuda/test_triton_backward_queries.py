"""Gradients of queries by programs that own them, against the float64 reference and programs that own rows."""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.triton_kernels import DEVICE
from torch import Tensor

pytest.importorskip("triton")

from softdb.kernels.cuda.backward import Gradients, Needs, choose_splits, read_backward
from softdb.kernels.cuda.forward import read_forward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Compare with a tolerance relative to the largest number."""
    scale = float(wanted.abs().max())
    assert scale > 0
    torch.testing.assert_close(found.cpu().double(), wanted.cpu().double(), rtol=0, atol=tolerance * scale)


def draw(*shape: int, seed: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "dtype", "low", "groups", "visible", "with_blend", "needs"),
    [
        ("dot", F32, False, 1, False, True, (True, True, True)),
        ("scaled_dot", F32, False, 2, True, True, (True, False, False)),
        ("scaled_dot", BF16, True, 1, True, True, (True, True, True)),
        ("scaled_dot", BF16, False, 2, False, True, (True, False, True)),
        ("dot", F16, True, 2, False, True, (True, True, False)),
        ("dot", F16, False, 1, True, False, (True, False, False)),
        ("cosine", F32, False, 2, True, True, (True, True, True)),
        ("cosine", BF16, False, 1, False, False, (True, True, False)),
        ("l2", F32, False, 2, True, True, (True, True, True)),
        ("l2", F16, False, 1, False, True, (False, False, False)),
        ("l2", F32, False, 1, True, False, (True, False, False)),
    ],
)
def test_triton_gradients_of_programs_that_own_queries_equal_those_of_rows(
    metric: str,
    dtype: torch.dtype,
    low: bool,
    groups: int,
    visible: bool,
    with_blend: bool,
    needs: tuple[bool, bool, bool],
) -> None:
    # Several blocks of queries and of rows, the last of them incomplete, and storage with free rows that hold NaN.
    queries, rows, storage, key_width, value_width = 67 if low else 35, 70, 75, 7, 19
    keys = draw(groups, storage, key_width, seed=0)
    values = draw(groups, storage, value_width, seed=1)
    keys[:, rows:] = values[:, rows:] = torch.nan
    keys, values = keys.flatten(0, 1).to(dtype).to(DEVICE), values.flatten(0, 1).to(dtype).to(DEVICE)
    query = draw(groups * queries, key_width, seed=2).to(dtype if low else F32).to(DEVICE)
    options: dict[str, object] = {"groups": groups, "rows": rows}
    if visible:
        options["mask"] = (draw(groups, storage, seed=3) < 0.5).to(DEVICE)
    if metric == "l2":
        options |= {"center": draw(key_width, seed=4).to(DEVICE), "rate": draw(len(query), seed=5).abs().to(DEVICE)}
    elif low:
        options["divisor"] = 1.5
    result = read_forward(query, keys, values, metric, round_weights=low, **options)
    upstream = draw(len(query), value_width, seed=6).to(query.dtype).to(DEVICE) if with_blend else None
    delta = -draw(len(query), seed=7).to(DEVICE)
    if upstream is not None:
        delta += (upstream.float() * result.values).sum(-1)
    wanted, found = (
        read_backward(
            query,
            keys,
            values,
            metric,
            result.maximum,
            result.total,
            delta,
            upstream,
            Needs(*needs, metric == "l2"),
            owns_queries=owns_queries,
            **options,
        )
        for owns_queries in (False, True)
    )
    # Products of bfloat16 differ between tiles in the interpreter, which truncates.
    tolerance = 1e-2 if low and dtype == BF16 else 1e-5
    compared = 0
    for name in Gradients._fields:
        gradient, other = getattr(found, name), getattr(wanted, name)
        assert (gradient is None) == (other is None)
        if gradient is not None and name in ("query", "rate"):
            assert_close(gradient, other, tolerance)
            compared += 1
        elif gradient is not None:
            assert torch.equal(gradient, other)
    assert compared == needs[0] + (metric == "l2")


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_triton_gradients_of_programs_that_own_queries_equal_the_reference(metric: str) -> None:
    query, keys, values = draw(5, 6, seed=0), draw(70, 6, seed=1), draw(70, 3, seed=2)
    rate, center = draw(5, seed=3).abs() + 0.5, draw(6, seed=4)
    leaves = [tensor.double().requires_grad_() for tensor in (query, rate)]
    temperature = 1 / leaves[1] if metric == "l2" else 1.0
    answer = reference.read(leaves[0], keys.double(), values.double(), metric=metric, temperature=temperature)
    upstream = [draw(5, 3, seed=5), draw(5, seed=6)]
    wanted = torch.autograd.grad(
        [answer.values, answer.lse], leaves, [tensor.double() for tensor in upstream], allow_unused=True
    )
    options: dict[str, Tensor] = {}
    if metric == "l2":
        query, options = query - center, {"center": center.to(DEVICE), "rate": rate.to(DEVICE)}
    query, keys, values, blend, lse = (tensor.to(DEVICE) for tensor in (query, keys, values, *upstream))
    result = read_forward(query, keys, values, metric, **options)
    delta = (blend * result.values).sum(-1) - lse
    softmax = result.maximum, result.total
    needs = Needs(True, False, False, metric == "l2")
    found = read_backward(query, keys, values, metric, *softmax, delta, blend, needs, owns_queries=True, **options)
    assert found.query is not None
    assert_close(found.query, wanted[0], 2e-5)
    if metric == "l2":
        assert found.rate is not None
        assert_close(found.rate, wanted[1], 2e-5)


ALL, QUERY, TABLE = Needs(True, True, True, False), Needs(True, False, False, False), Needs(False, True, True, False)


@pytest.mark.parametrize(
    ("needs", "queries", "rows", "groups", "chosen"),
    [
        (ALL, 1024, 1_000_000, 1, (132, False)),
        (ALL, 4096, 1_000_000, 1, (40, False)),  # too few blocks of queries
        (ALL, 32_768, 1_000_000, 1, (132, True)),
        (ALL, 32_768, 128, 1, (2, False)),  # all parts fit
        (QUERY, 32_768, 128, 1, (2, True)),
        (QUERY, 64, 128, 1, (2, False)),
        (TABLE, 32_768, 1_000_000, 1, (132, False)),
        (ALL, 4096, 65_536, 8, (16, True)),
        (ALL, 512, 65_536, 64, (2, False)),
    ],
)
def test_triton_programs_own_queries_where_parts_leave_multiprocessors_idle(
    needs: Needs, queries: int, rows: int, groups: int, chosen: tuple[int, bool]
) -> None:
    assert choose_splits(needs, groups * queries, 64, -(-rows // 64), -(-queries // 64), groups, 132) == chosen
