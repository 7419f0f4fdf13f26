"""Exact reads by kernels in Triton, against the float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import reference
from support.triton_kernels import DEVICE, MAX_SHARED, compile_for_hopper, record_launches
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import softdb
from softdb import SoftKVStore
from softdb.filters import Selection
from softdb.kernels import backend
from softdb.kernels.bias import ScoreBias
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.gumbel import draw_noise
from softdb.scoring.metrics import compute_center, find_exact_divisor, prepare_query

pytest.importorskip("triton")

from softdb.kernels.cuda import backward, backward_queries, exact, forward, operators
from softdb.kernels.cuda.backward import Needs, read_backward
from softdb.kernels.cuda.forward import Softmax, read_forward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Largest error relative to the largest number of the result. The interpreter truncates to bfloat16.
TOLERANCE = {F32: 2e-5, F16: 2e-3, BF16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Operands of a kernel.

    Attributes:
        metric: Name of the metric.
        queries: Number of queries of a group.
        rows: Number of rows of a group.
        key_dim: Width of the keys.
        value_dim: Width of the values.
        splits: Number of splits of the rows.
        dtype: Dtype of keys and values.
        groups: Number of groups.
        visible: Fraction of the rows that are visible; None for no mask.
        low: Whether queries and outputs have the dtype of the table, too.
        mean: Mean of keys and queries.
    """

    metric: str
    queries: int
    rows: int
    key_dim: int
    value_dim: int
    splits: int
    dtype: torch.dtype = F32
    groups: int = 1
    visible: float | None = None
    low: bool = False
    mean: float = 0.0


CASES = [
    Case("dot", 1, 1, 1, 1, 1),
    Case("dot", 1, 70, 7, 33, 2),
    Case("scaled_dot", 3, 200, 33, 7, 3),
    Case("scaled_dot", 17, 129, 64, 96, 2, visible=0.5),
    Case("scaled_dot", 65, 66, 96, 64, 1),
    Case("dot", 2, 300, 128, 128, 4, visible=0.1),
    Case("scaled_dot", 2, 100, 256, 1, 2),
    Case("scaled_dot", 2, 65, 1, 256, 2),
    Case("scaled_dot", 5, 130, 16, 16, 7, groups=3),
    Case("scaled_dot", 3, 31, 5, 6, 1, groups=4, visible=0.6),
    Case("cosine", 1, 1, 1, 7, 1),
    Case("cosine", 4, 150, 33, 64, 3, groups=2),
    Case("cosine", 18, 70, 96, 7, 1, visible=0.5),
    Case("cosine", 3, 64, 64, 64, 1, F16),
    Case("cosine", 3, 64, 64, 64, 1, BF16),
    Case("l2", 1, 1, 1, 1, 1),
    Case("l2", 3, 130, 7, 33, 2, groups=2),
    Case("l2", 17, 80, 10, 3, 1, visible=0.5),
    Case("l2", 3, 100, 8, 8, 2, mean=100.0),
    Case("l2", 3, 70, 7, 5, 2, F16),
    Case("l2", 3, 70, 7, 5, 1, BF16),
    Case("scaled_dot", 3, 200, 64, 33, 2, F16),
    Case("scaled_dot", 3, 200, 64, 33, 2, F16, low=True),
    Case("scaled_dot", 66, 140, 33, 64, 1, F16, low=True, visible=0.5),
    Case("scaled_dot", 3, 140, 64, 33, 2, BF16, groups=2, visible=0.7),
    Case("scaled_dot", 3, 140, 64, 33, 1, BF16, low=True),
]


@dataclass
class Operands:
    """Operands of a case, and the results of the reference.

    Attributes:
        query: Queries of the kernel.
        keys: The keys.
        values: The values.
        options: Options of the kernel.
        inputs: Float64 leaves of the reference: prepared or centered query, keys, values, rate.
        expected: Values and log-sum-exp of the reference.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    options: dict[str, object]
    inputs: list[Tensor]
    expected: list[Tensor]


def make(case: Case) -> Operands:
    """Draw the operands of a case."""
    random = torch.Generator().manual_seed(0)
    groups, count, rows = case.groups, case.groups * case.queries, case.groups * case.rows
    raw = torch.randn(count, case.key_dim, generator=random) + case.mean
    keys = (torch.randn(rows, case.key_dim, generator=random) + case.mean).to(case.dtype)
    values = torch.randn(rows, case.value_dim, generator=random).to(case.dtype)
    visible = None if case.visible is None else torch.rand(case.rows, generator=random) < case.visible
    center, rate, divisor = torch.zeros(case.key_dim), torch.rand(count, generator=random) + 0.5, 1.0
    query = raw
    if case.metric == "cosine":
        query = F.normalize(raw, dim=-1) / 0.5
    elif case.metric == "l2":
        center = raw.mean(0)
        query = raw - center
    elif case.low:
        query, divisor = raw.to(case.dtype), 1.5
    else:
        query = raw / math.sqrt(case.key_dim)
    leaves = [query.double() / divisor, keys.double(), values.double(), rate.double()]
    inputs = [leaf.requires_grad_() for leaf in leaves]
    shaped = [leaf.view(groups, -1, *leaf.shape[1:]) for leaf in inputs]
    metric, temperature = "dot", 1.0
    if case.metric == "l2":
        metric, shaped[0], temperature = "l2", shaped[0] + center.double(), 1 / shaped[3]
    elif case.metric == "cosine":  # the query is normalized and divided by the temperature
        shaped[1] = F.normalize(shaped[1], dim=-1)
    answer = reference.read(shaped[0], shaped[1], shaped[2], metric=metric, temperature=temperature, visible=visible)
    options: dict[str, object] = {"groups": groups, "splits": case.splits, "divisor": divisor}
    if visible is not None:
        options["mask"] = visible.to(DEVICE)
    if case.metric == "l2":
        options |= {"center": center.to(DEVICE), "rate": rate.to(DEVICE)}
    tables = [tensor.to(DEVICE) for tensor in (query, keys, values)]
    return Operands(*tables, options, inputs, [answer.values.flatten(0, 1), answer.lse.flatten()])


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Compare with a tolerance relative to the largest number."""
    wanted = wanted.detach()
    scale = max(1e-3, float(wanted[wanted.isfinite()].abs().max())) if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=tolerance * scale, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_reads_equal_the_reference_forward_and_backward(case: Case) -> None:
    operands = make(case)
    query, keys, values = operands.query, operands.keys, operands.values
    extra = {"round_weights": case.low}
    result = read_forward(query, keys, values, case.metric, **operands.options, **extra)
    # Float32 queries and outputs keep float32 accuracy over tables of 16 bits.
    tolerance = TOLERANCE[case.dtype if case.low else F32]
    assert_close(result.values, operands.expected[0], tolerance)
    assert_close(result.lse, operands.expected[1], 2e-5)
    random = torch.Generator().manual_seed(1)
    grad_blend = torch.randn(result.values.shape, generator=random)
    grad_lse = torch.randn(result.lse.shape, generator=random)
    if case.low:
        grad_blend = grad_blend.to(case.dtype)
    wanted = torch.autograd.grad(
        operands.expected, operands.inputs, [grad_blend.double(), grad_lse.double()], allow_unused=True
    )
    upstream = grad_blend.to(DEVICE)
    delta = (upstream.float() * result.values).sum(-1) - grad_lse.to(DEVICE)
    needs = Needs(True, True, True, case.metric == "l2")
    gradients = read_backward(
        query, keys, values, case.metric, result.maximum, result.total, delta, upstream, needs, **operands.options
    )
    for name, found, expected in zip(Needs._fields, gradients, wanted, strict=True):
        rounded = case.low or name in ("keys", "values")
        if found is None or expected is None:
            assert name == "rate"
        else:
            assert_close(found, expected, 2 * TOLERANCE[case.dtype if rounded else F32])


def run(case: Case, operands: Operands, **options: object) -> Softmax:
    """Run the forward pass of a case."""
    return read_forward(operands.query, operands.keys, operands.values, case.metric, **operands.options | options)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_triton_forward_of_many_rows_equals_the_reference_for_all_splits(splits: int) -> None:
    case = Case("scaled_dot", 2, 5000, 16, 16, splits)
    operands = make(case)
    result = run(case, operands)
    assert_close(result.values, operands.expected[0], 2e-5)
    assert_close(result.lse, operands.expected[1], 2e-5)


def test_triton_splits_follow_from_the_number_of_multiprocessors() -> None:
    case = Case("scaled_dot", 2, 300, 8, 8, 1)
    operands = make(case)
    for multiprocessors in (1, 2):
        result = run(case, operands, splits=None, multiprocessors=multiprocessors)
        assert_close(result.values, operands.expected[0], 2e-5)


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False, False, False)]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("with_blend", [True, False])
def test_triton_backward_computes_only_the_gradients_that_are_needed(
    needs: tuple[bool, bool, bool], with_blend: bool
) -> None:
    case = Case("cosine", 3, 40, 5, 7, 1)
    operands = make(case)
    result = run(case, operands)
    grad_lse = torch.ones(3)
    grad_blend = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) if with_blend else None
    outputs, upstream = operands.expected[1:], [grad_lse.double()]
    delta = -grad_lse.to(DEVICE)
    if grad_blend is not None:
        outputs, upstream = operands.expected, [grad_blend.double(), grad_lse.double()]
        delta = delta + (grad_blend.to(DEVICE) * result.values).sum(-1)
    wanted = torch.autograd.grad(outputs, operands.inputs[:3], upstream, allow_unused=True)
    gradients = read_backward(
        operands.query,
        operands.keys,
        operands.values,
        case.metric,
        result.maximum,
        result.total,
        delta,
        None if grad_blend is None else grad_blend.to(DEVICE),
        Needs(*needs, False),
        **operands.options,
    )
    for need, found, expected in zip(needs, gradients, wanted, strict=False):
        if need and expected is not None:
            assert found is not None
            assert_close(found, expected, 2e-5)
        else:
            assert found is None


def test_triton_reads_of_free_rows_leave_them_out() -> None:
    case = Case("scaled_dot", 3, 50, 4, 4, 2)
    operands = make(case)
    keys = torch.cat([operands.keys, torch.full((30, 4), torch.nan, device=DEVICE)])
    values = torch.cat([operands.values, torch.full((30, 4), torch.nan, device=DEVICE)])
    result = read_forward(operands.query, keys, values, case.metric, rows=50, splits=2)
    assert_close(result.values, operands.expected[0], 2e-5)
    zeros = torch.zeros(3, device=DEVICE)
    gradients = read_backward(
        operands.query,
        keys,
        values,
        case.metric,
        result.maximum,
        result.total,
        zeros,
        torch.ones(3, 4, device=DEVICE),
        Needs(True, True, True, False),
        rows=50,
    )
    assert gradients.keys is not None
    assert gradients.values is not None
    assert not gradients.keys[50:].any()
    assert not gradients.values[50:].any()
    assert gradients.keys.isfinite().all()
    assert gradients.values[:50].sum().item() == pytest.approx(12.0, rel=1e-5)


@pytest.mark.parametrize("metric", ["scaled_dot", "cosine", "l2"])
def test_triton_reads_ignore_nan_in_hidden_rows(metric: str) -> None:
    case = Case(metric, 3, 50, 4, 4, 2, visible=0.5)
    operands = make(case)
    hidden = ~operands.options["mask"]
    operands.keys[hidden] = torch.nan
    operands.values[hidden] = torch.nan
    result = run(case, operands)
    assert_close(result.values, operands.expected[0], 2e-5)
    gradients = read_backward(
        operands.query,
        operands.keys,
        operands.values,
        metric,
        result.maximum,
        result.total,
        torch.ones(3, device=DEVICE),
        torch.ones(3, 4, device=DEVICE),
        Needs(True, True, True, metric == "l2"),
        **operands.options,
    )
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert not gradients.keys[hidden].any()
    assert not gradients.values[hidden].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("splits", [1, 3])
def test_triton_nan_in_one_query_gives_nan_for_that_query_only(splits: int) -> None:
    case = Case("scaled_dot", 4, 200, 4, 4, splits)
    operands = make(case)
    operands.query[2, 1] = torch.nan
    result = run(case, operands)
    others = [0, 1, 3]
    assert result.values[2].isnan().all()
    assert result.lse[2].isnan()
    assert_close(result.values[others], operands.expected[0][others], 2e-5)


@pytest.mark.parametrize("splits", [1, 2])
def test_triton_reads_without_visible_rows_are_zero(splits: int) -> None:
    case = Case("scaled_dot", 3, 200, 4, 5, splits, groups=2, visible=0.5)
    operands = make(case)
    mask = torch.ones(2, 200, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    options = operands.options | {"mask": mask}
    result = read_forward(operands.query, operands.keys, operands.values, case.metric, **options)
    assert not result.values[3:].any()
    assert (result.lse[3:] == -math.inf).all()
    assert result.lse[:3].isfinite().all()
    gradients = read_backward(
        operands.query,
        operands.keys,
        operands.values,
        case.metric,
        result.maximum,
        result.total,
        torch.ones(6, device=DEVICE),
        torch.ones(6, 5, device=DEVICE),
        Needs(True, True, True, False),
        **options,
    )
    assert all(gradient.isfinite().all() for gradient in gradients[:3])
    assert not gradients.query[3:].any()
    assert not gradients.keys[200:].any()


@pytest.mark.parametrize(("queries", "rows"), [(0, 5), (3, 0)])
def test_triton_reads_of_nothing_are_zero(queries: int, rows: int) -> None:
    query, keys, values = (torch.ones(n, w, device=DEVICE) for n, w in ((queries, 4), (rows, 4), (rows, 2)))
    result = read_forward(query, keys, values, "dot")
    assert result.values.shape == (queries, 2)
    assert not result.values.any()
    assert (result.lse == -math.inf).all()
    gradients = read_backward(
        query,
        keys,
        values,
        "dot",
        result.maximum,
        result.total,
        result.total,
        result.values,
        Needs(True, True, True, True),
    )
    assert [gradient.shape for gradient in gradients] == [(queries, 4), (rows, 4), (rows, 2), (queries,)]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_triton_weights_sum_to_one_at_extreme_scales(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    query = scale * torch.randn(3, 8, generator=random).to(DEVICE)
    keys, values = torch.randn(150, 8, generator=random).to(DEVICE), torch.ones(150, 2, device=DEVICE)
    result = read_forward(query, keys, values, "dot", splits=2)
    assert_close(result.values, torch.ones(3, 2, dtype=torch.float64), 1e-6)
    ones = torch.ones(3, 2, device=DEVICE)
    delta = torch.zeros(3, device=DEVICE)
    needs = Needs(False, False, True, False)
    gradients = read_backward(query, keys, values, "dot", result.maximum, result.total, delta, ones, needs)
    assert gradients.values is not None
    # Backward has other tiles than forward. A GPU sums each score in one order in both, the interpreter does not.
    assert gradients.values.sum().item() == pytest.approx(6.0, rel=1e-5 if DEVICE == "cuda" else 2e-2)


@pytest.mark.parametrize(("query_scale", "key_scale"), [(1e5, 1e-5), (1e-6, 1e4), (1e-38, 1.0), (0.0, 1.0)])
def test_triton_queries_beyond_the_range_of_float16_read_tables_in_float16(
    query_scale: float, key_scale: float
) -> None:
    random = torch.Generator().manual_seed(0)
    query = query_scale * torch.randn(3, 16, generator=random)
    keys, values = (key_scale * torch.randn(50, 16, generator=random)).to(F16), torch.randn(50, 4, generator=random)
    wanted = reference.read(query.double(), keys.double(), values.double(), metric="dot")
    result = read_forward(query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), "dot")
    assert_close(result.values, wanted.values, 2e-5)
    assert_close(result.lse, wanted.lse, 2e-5)


@pytest.mark.parametrize("round_weights", [False, True])
def test_triton_weights_in_float16_do_not_vanish(round_weights: bool) -> None:
    keys, values = torch.full((3000, 1), -17.5, dtype=F16), torch.ones(3000, 1, dtype=F16)
    keys[0] = values[0] = 0  # the other weights are below half of the smallest number of float16
    query = torch.ones(1, 1)
    wanted = reference.read(query.double(), keys.double(), values.double(), metric="dot")
    tensors = (tensor.to(DEVICE) for tensor in (query, keys, values))
    result = read_forward(*tensors, "dot", round_weights=round_weights, splits=1)
    assert_close(result.values, wanted.values, 1e-3)


def test_triton_offsets_exceed_32_bits(tmp_path: Path) -> None:
    stride = 2**30 + 16
    if DEVICE == "cuda":
        memory = torch.empty(3 * stride + 16, dtype=F16, device=DEVICE)
    else:  # a sparse file, of which four pages are used
        memory = torch.from_numpy(np.memmap(tmp_path / "rows", np.float16, "w+", shape=(3 * stride + 16,)))
    table = memory.as_strided((4, 16), (stride, 1))
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(F16)
    table.copy_(rows)
    query = torch.ones(1, 16, device=DEVICE)
    result = read_forward(query, table, table, "scaled_dot")
    wanted = reference.read(query.cpu().double(), rows.double(), rows.double(), metric="dot")
    assert_close(result.values, wanted.values, 2e-5)
    grads = read_backward(
        query,
        table,
        table,
        "scaled_dot",
        result.maximum,
        result.total,
        torch.zeros(1, device=DEVICE),
        torch.ones(1, 16, device=DEVICE),
        Needs(False, False, True, False),
    )
    assert grads.values is not None
    assert_close(grads.values[:, 0], wanted.weights[0], 2e-3)


def make_spec(
    query: Tensor, keys: Tensor, metric: str, selection: Selection, **options: object
) -> tuple[Tensor, ReadSpec]:
    """Prepare a query, and make the spec of its read."""
    center = compute_center(query, metric)
    spec = ReadSpec(metric, center, selection, F32, **options)
    return prepare_query(query, metric, 0.5, center, F32), spec


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_triton_exact_read_equals_blocks_in_torch(metric: str) -> None:
    random = torch.Generator().manual_seed(0)
    shared = torch.rand(60, generator=random) < 0.7
    selection = Selection(60, shared=shared.to(DEVICE))
    results = []
    for read in (backend.TORCH_BLOCKS.exact_read, exact.exact_read):
        random = torch.Generator().manual_seed(1)
        leaves = [
            torch.randn(n, w, generator=random).to(DEVICE).requires_grad_() for n, w in ((3, 6), (64, 6), (64, 5))
        ]
        operand, spec = make_spec(leaves[0], leaves[1], metric, selection)
        values, lse, best = read(operand, leaves[1], leaves[2], spec)
        assert best is None
        (values.square().sum() + lse.sum()).backward()
        results.append([values, lse, *(leaf.grad for leaf in leaves)])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_close(found.detach(), wanted.cpu().double(), 2e-5)


def test_triton_reads_of_few_visited_rows_see_no_others() -> None:
    random = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(n, 4, generator=random).to(DEVICE) for n in (2, 40, 40))
    visited = torch.tensor([3, 7, 31], device=DEVICE)
    shared = torch.zeros(40, dtype=torch.bool, device=DEVICE).index_fill(0, visited, True)
    operand, spec = make_spec(query, keys, "dot", Selection(40, shared=shared, visited=visited))
    found, _, _ = exact.exact_read(operand, keys, values, spec)
    wanted = reference.read(
        *(t.cpu().double() for t in (query, keys[visited], values[visited])), metric="dot", temperature=0.5
    )
    assert_close(found, wanted.values, 2e-5)


def test_triton_multiplies_queries_of_16_bits_without_rounding() -> None:
    query, keys = torch.randn(5, 48).to(F16), torch.randn(6, 48).to(F16)
    divisor = find_exact_divisor(query, keys, "scaled_dot", 0.3)
    prepared = prepare_query(query, "scaled_dot", 0.3, None, F32)
    assert divisor is not None
    assert torch.equal((prepared * divisor).to(F16), query)
    assert find_exact_divisor(query.float(), keys, "dot", 0.3) is None
    assert find_exact_divisor(query, keys.float(), "dot", 0.3) is None
    assert find_exact_divisor(query, keys, "l2", 0.3) is None
    assert find_exact_divisor(query, keys, "dot", torch.ones(5)) is None


def test_triton_kernels_leave_what_they_do_not_support_to_torch() -> None:
    query, keys, values = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9, 3)
    operand, spec = make_spec(query, keys, "dot", Selection(9))
    mask = torch.ones(1, 2, 9, dtype=torch.bool)
    assert exact.is_supported(operand, keys, values, spec)
    assert exact.is_supported(operand, keys, values, replace(spec, selection=Selection(9, mask=mask[:, :1])))
    assert not exact.is_supported(operand, keys, values, spec, k=1)
    assert not exact.is_supported(operand, keys, values.double(), spec)
    assert not exact.is_supported(operand, torch.randn(9, 257), values, spec)
    assert not exact.is_supported(operand, keys, values[:, :0], spec)
    for other in (
        replace(spec, dtype=torch.float64),
        replace(spec, selection=Selection(9, mask=mask)),
        replace(spec, selection=Selection(2**30 + 1)),
        replace(spec, selection=Selection(9, excluded=torch.zeros(2, 1, dtype=torch.int64))),
        replace(spec, noise=draw_noise("gumbel", None)),
        replace(spec, bias=ScoreBias(torch.zeros(1, 1, 9))),
    ):
        assert not exact.is_supported(operand, keys, values, other)
    best = exact.exact_read(operand, keys, values, spec, k=2)[2]
    assert best is not None
    assert best.rows.shape == (2, 2)


def test_triton_backward_has_no_second_derivative() -> None:
    query = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    keys, values = torch.randn(9, 4, device=DEVICE), torch.randn(9, 3, device=DEVICE)
    operand, spec = make_spec(query, keys, "dot", Selection(9))
    blend, _, _ = exact.exact_read(operand, keys, values, spec)
    (gradient,) = torch.autograd.grad(blend.square().sum(), query, create_graph=True)
    with pytest.raises(softdb.SecondDerivativeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.fixture
def read_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tensors on the CPU by the kernels for CUDA."""
    blocks = backend.TORCH_BLOCKS
    monkeypatch.setattr("softdb.reading.exact.backend_for", lambda tensor: replace(blocks, exact_read=exact.exact_read))


@pytest.mark.usefixtures("read_by_triton")
@pytest.mark.parametrize("shape", [(9,), (1, 9), (3, 1, 9), (1, 1, 1)])
def test_triton_reads_share_a_mask_between_groups(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(3, n, 4, generator=random) for n in (2, 9, 9))
    mask = torch.rand(shape, generator=random) < 0.5
    found = softdb.functional.soft_read(*(t.to(DEVICE) for t in (query, keys, values)), mask=mask.to(DEVICE))
    scores = query.double() @ keys.double().mT / 2
    hidden = ~mask.expand(3, 2, 9)
    wanted = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num() @ values.double()
    assert_close(found.values, wanted, 2e-5)


@pytest.mark.usefixtures("read_by_triton")
def test_triton_backward_uses_the_rows_as_they_were_at_the_read() -> None:
    store = SoftKVStore(4, 3, device=DEVICE)
    random = torch.Generator().manual_seed(0)
    ids = store.add(torch.randn(20, 4, generator=random).to(DEVICE), torch.randn(20, 3, generator=random).to(DEVICE))
    query = torch.randn(2, 4, generator=random).to(DEVICE)
    gradients = []
    for overwrite in (False, True):
        leaf = query.clone().requires_grad_()
        loss = store.read(leaf).values.square().sum()
        if overwrite:
            store.update(ids[3:9], keys=torch.ones(6, 4, device=DEVICE), values=torch.ones(6, 3, device=DEVICE))
        loss.backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0].cpu().double(), 1e-6)


@pytest.mark.usefixtures("read_by_triton")
def test_triton_backward_refuses_rows_that_changed_without_a_copy() -> None:
    store = SoftKVStore(4, 3, device=DEVICE, trainable=True)
    ids = store.add(torch.randn(20, 4, device=DEVICE), torch.randn(20, 3, device=DEVICE))
    loss = store.read(torch.randn(2, 4, device=DEVICE)).values.sum()
    store.update(ids[:2], values=torch.zeros(2, 3, device=DEVICE))
    with pytest.raises(softdb.StaleReadError):
        loss.backward()


@pytest.mark.parametrize("metric", ["scaled_dot", "l2"])
def test_triton_reads_of_fake_cuda_tensors_need_no_synchronization(metric: str) -> None:
    with FakeTensorMode():
        query, keys, values = (torch.empty(n, w, device="cuda") for n, w in ((3, 6), (64, 6), (64, 5)))
        shared, numbers = torch.empty(60, dtype=torch.bool, device="cuda"), torch.empty(3, device="cuda")
        width, center = (8, torch.empty(6, device="cuda")) if metric == "l2" else (6, None)
        operand = torch.empty(3, width, device="cuda")
        spec = ReadSpec(metric, center, Selection(60, shared=shared), F32, tiling=Tiling())
        blend, lse, _ = exact.exact_read(operand, keys, values, spec)
        assert (blend.shape, lse.shape, blend.device.type) == ((3, 5), (3,), "cuda")
        # torch built for CPUs cannot run autograd on fake tensors of "cuda"
        options = shared, None, None, metric, 1, 60, 1.0, "ieee", 132
        needs = Needs(True, True, False, True)
        gradients = operators.differentiate_read(query, keys, values, (lse, lse), numbers, blend, needs, *options)
        assert [None if gradient is None else gradient.shape for gradient in gradients] == [(3, 6), (64, 6), None, (3,)]


@pytest.mark.slow
def test_triton_kernels_compile_for_hopper() -> None:
    query, keys, numbers = torch.empty(16, 32, dtype=F16), torch.empty(100_000, 32, dtype=F16), torch.empty(16)
    with record_launches(forward, "_read", "_merge") as launches:
        read_forward(query, keys, keys, "dot", divisor=8.0, round_weights=True)
    assert [launch.kernel for launch in launches] == ["_read", "_merge"]
    with record_launches(backward, "_differentiate") as more:
        needs = Needs(True, True, True, False)
        read_backward(query, keys, keys, "cosine", numbers, numbers, numbers, keys[:16], needs)
    with record_launches(backward_queries, "_differentiate_queries") as others:
        needs = Needs(True, False, False, False)
        read_backward(query, keys, keys, "cosine", numbers, numbers, numbers, keys[:16], needs, owns_queries=True)
    assert len(others) == 1
    for compiled in compile_for_hopper([*launches, *more, *others]):
        assert compiled.shared <= MAX_SHARED
        assert compiled.stack <= 256
