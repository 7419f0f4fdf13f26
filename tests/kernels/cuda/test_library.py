"""Exact reads by attention operators of torch, over splits of the rows."""

from __future__ import annotations

import pytest
import torch
from support import reference
from torch import Tensor
from torch._subclasses import FakeTensorMode

from softdb.kernels.cuda import library
from softdb.kernels.cuda.library import choose_attention, read_by_attention

F32, BF16 = torch.float32, torch.bfloat16


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by the plain formula."""
    scores = scale * query @ keys.mT
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (30, 1), (30, 3), (31, 3), (37, 7)])
def test_splits_and_left_over_rows_are_merged(rows: int, splits: int) -> None:
    random = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(n, w, generator=random) for n, w in ((5, 4), (40, 4), (40, 3)))
    keys[rows:] = torch.nan
    blend, lse = read_by_attention(query, keys, values, rows, 0.5, attend, splits)
    wanted = reference.read(query.double(), keys[:rows].double(), values[:rows].double(), metric="dot", temperature=2.0)
    torch.testing.assert_close(blend.double(), wanted.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "rows", "dtype", "widths", "name", "splits"),
    [
        (64, 1_000_000, F32, (64, 64), "attend_by_memory_efficient", 250),
        (1024, 1_000_000, F32, (64, 32), "attend_by_memory_efficient", 15),
        (1024, 1_000_000, BF16, (128, 128), "attend_by_flash", 64),
        (64, 3000, F32, (64, 64), "attend_by_memory_efficient", 2),
        (8, 1_000_000, F32, (64, 64), None, 0),  # bound by memory
        (64, 1_000_000, BF16, (64, 64), None, 0),
        (1024, 1_000_000, BF16, (128, 64), None, 0),  # flash attention has one width
        (1024, 1_000_000, F32, (63, 64), None, 0),
        (1024, 40_000_000, F32, (64, 64), None, 0),  # offsets exceed 32 bits
    ],
)
def test_operators_are_chosen_by_shape_and_dtype(
    queries: int, rows: int, dtype: torch.dtype, widths: tuple[int, int], name: str | None, splits: int
) -> None:
    query = torch.empty(queries, widths[0], dtype=dtype, device="meta")
    keys, values = (torch.empty(rows, width, dtype=dtype, device="meta") for width in widths)
    choice = choose_attention(query, keys, values, rows, round_weights=True, precision="ieee")
    assert choice == (None if name is None else (getattr(library, name), splits))


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_operators_are_not_chosen_for_tensors_that_start_between_multiples_of_16_bytes(operand: int) -> None:
    shapes = [(64, 8), (5000, 8), (5000, 8)]
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    assert choose_attention(*tensors, 5000, round_weights=True, precision="ieee") is not None
    memory = torch.empty(shapes[operand][0] * 8 + 4, device="meta")
    tensors[operand] = memory[4:].view(shapes[operand])
    assert choose_attention(*tensors, 5000, round_weights=True, precision="ieee") is not None
    tensors[operand] = memory[1:-3].view(shapes[operand])
    assert choose_attention(*tensors, 5000, round_weights=True, precision="ieee") is None


def test_operators_get_queries_whose_elements_are_adjacent() -> None:
    query, keys, values = torch.randn(4, 5).T, torch.randn(6, 4), torch.randn(6, 3)
    strides = []

    def attend_and_record(query: Tensor, *others: Tensor | float) -> tuple[Tensor, Tensor]:
        strides.append(query.stride()[-2:])
        return attend(query, *others)  # type: ignore[arg-type]

    read_by_attention(query, keys, values, 6, 1.0, attend_and_record, 2)
    assert strides == [(4, 1)]


@pytest.mark.parametrize(("dtype", "queries"), [(F32, 70), (BF16, 512)])
def test_operators_accept_fake_cuda_tensors(dtype: torch.dtype, queries: int) -> None:
    with FakeTensorMode():
        query, keys, values = (torch.empty(n, 64, dtype=dtype, device="cuda") for n in (queries, 5000, 5000))
        choice = choose_attention(query, keys, values, 4999, round_weights=True, precision="ieee")
        assert choice is not None
        blend, lse = read_by_attention(query, keys, values, 4999, 0.125, *choice)
    assert (blend.shape, lse.shape) == ((queries, 64), (queries,))
    assert blend.dtype == lse.dtype == F32
