"""Test reads in each dtype and width against float64, and tables of more than 2^31 elements.

On a GPU these tests run the compiled kernels, where the interpreter of Triton computes bfloat16 products in float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import reference
from torch import Tensor

from softdb import SoftKVStore
from softdb.functional import soft_read

# Error relative to the largest entry: of a product and a sum in float32; of weights and outputs in the dtype.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
GRADIENT_FACTOR = 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max()
    assert error <= tolerance, f"expected an error of at most {tolerance}, got {float(error):.3g}"


def make_operands(
    place: str, dtype: torch.dtype, queries: int, rows: int, width: int, value_width: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    shapes = ((queries, width), (rows, width), (rows, value_width))
    return [torch.randn(shape, generator=generator).to(place, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "rows", "width", "value_width"),
    [
        (1, 4099, 64, 64),
        (7, 1000, 33, 7),
        (64, 3000, 128, 256),
        (130, 517, 256, 96),
        (5, 1, 1, 1),
        (1024, 2048, 64, 64),
    ],
)
def test_reads_and_gradients_are_as_accurate_as_their_dtype(
    place: str, dtype: torch.dtype, queries: int, rows: int, width: int, value_width: int
) -> None:
    operands = make_operands(place, dtype, queries, rows, width, value_width)
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    expected = reference.read(*wide)
    found = soft_read(*operands)
    tolerance = TOLERANCES[dtype]
    check_close(found.values, expected.values, tolerance)
    # Scores and sums are in float32 in every dtype.
    check_close(found.lse, expected.lse, TOLERANCES[torch.float32])

    upstream = torch.randn(queries, value_width, generator=torch.Generator().manual_seed(9)).to(place, dtype)
    for read, own in ((expected, upstream.double()), (found, upstream)):
        ((read.values * own).sum() + read.lse.sum()).backward()
    for operand, other in zip(operands, wide, strict=True):
        if other.grad.abs().max() > 1e-9:  # The query has no gradient from values where there is one row.
            check_close(operand.grad, other.grad, GRADIENT_FACTOR * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_keep_their_accuracy(place: str, dtype: torch.dtype) -> None:
    """Scores of some hundreds, where an error of a score is an error of its weight."""
    query, keys, values = (operand.detach() for operand in make_operands(place, dtype, 64, 2000, 64, 64))
    query = query * 32
    expected = reference.read(query.double(), keys.double(), values.double())
    found = soft_read(query, keys, values)
    assert expected.scores.abs().max() > 100
    check_close(found.lse, expected.lse, 3e-6)
    check_close(found.values, expected.values, TOLERANCES[dtype] + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_top_k_finds_the_best_rows_and_the_lowest_slots_of_equal_ones(
    place: str, metric: str, dtype: torch.dtype
) -> None:
    query, keys, values = (operand.detach() for operand in make_operands(place, dtype, 33, 5000, 64, 16))
    keys[3000:] = keys[:2000]  # Equal rows have equal scores.
    store = SoftKVStore.from_tensors(keys, values, metric=metric, index="Flat")
    read = store.read(query, "topk", k=32)
    scores = reference.scores(query.double(), keys.double(), metric)
    expected = scores.sort(dim=-1, descending=True, stable=True)
    check_close(read.scores, expected.values[:, :32], 2e-5)
    assert (read.scores.diff(dim=-1) <= 0).all()
    # The first of two equal rows is found in front of the second.
    second = read.ids >= 3000
    first = (read.ids[:, :, None] - 3000 == read.ids[:, None, :]).float()
    position = torch.arange(32, device=place)
    assert (first.sum(-1)[second] == 1).all()
    assert ((first * position).sum(-1)[second] < position.expand_as(second)[second]).all()


@pytest.mark.parametrize(
    ("place", "rows"), [("cpu", 40_000), pytest.param("cuda", 40_000_000, marks=[pytest.mark.gpu, pytest.mark.slow])]
)
@torch.no_grad()
def test_tables_of_more_than_2_31_elements_are_read_and_have_gradients(place: str, rows: int) -> None:
    """Blend rows at the end of a table, whose elements have offsets beyond 32 bits."""
    width, dtype = 64, torch.bfloat16
    if place == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        needed = 7 * rows * width * dtype.itemsize  # operands, gradients, copies, and what the reference needs
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory")
    torch.manual_seed(0)
    keys = torch.randn(rows, width, device=place, dtype=dtype)
    values = torch.randn(rows, width, device=place, dtype=dtype)
    picked = torch.tensor([0, rows // 2, rows - 3, rows - 1], device=place)
    query = keys[picked] * 4  # The score of the own row is about 32, so it has most of the weight.

    lse, blend = torch.full((4,), -math.inf, device=place, dtype=torch.float64), torch.zeros(4, width, device=place)
    blend = blend.double()
    for start in range(0, rows, 2**20):
        block = slice(start, start + 2**20)
        scores = query.double() @ keys[block].double().T / math.sqrt(width)
        part = scores.logsumexp(-1)
        total = torch.logaddexp(lse, part)
        blend = blend * (lse - total).exp()[:, None] + (scores - total[:, None]).exp() @ values[block].double()
        lse = total
    weight = ((query.double() * keys[picked].double()).sum(-1) / math.sqrt(width) - lse).exp()

    with torch.enable_grad():
        operands = [query.requires_grad_(), keys.requires_grad_(), values.requires_grad_()]
        found = soft_read(*operands)
        found.values.sum().backward()
    check_close(found.values, blend, TOLERANCES[dtype])
    check_close(found.lse, lse, TOLERANCES[torch.float32])
    check_close(values.grad[picked].mean(-1), weight, TOLERANCES[dtype])
    for tensor in operands:
        assert all(part.isfinite().all() for part in tensor.grad.split(2**22))
    top = soft_read(query.detach(), keys.detach(), values.detach(), k=1)
    assert torch.equal(top.ids[:, 0], picked)
