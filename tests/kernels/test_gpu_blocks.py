"""Test the blocks in torch as they run on a GPU, where the host does not wait for results; here they run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import reference
from torch import Tensor

from softdb import IndexConfig, NonFiniteError, SoftKVStore
from softdb.filters import Selection
from softdb.index.policy import IndexPolicy
from softdb.kernels.bias import ScoreBias, separate_hidden_rows
from softdb.kernels.blocks.exact import exact_read
from softdb.kernels.blocks.topk import exact_top_k, top_k, two_stage_top_k
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import PendingChecks, defer_checks
from softdb.scoring.metrics import compute_center, prepare_query

GPU = Tiling.for_device(torch.device("cuda"))
TILINGS = {
    "one dense tile": GPU,
    "one tile": replace(GPU, max_dense_scores=0),
    "small tiles": replace(GPU, max_dense_scores=0, tile_elements=256, max_queries=3, max_sum_rows=32),
    "partitions": replace(GPU, max_dense_scores=0, tile_elements=1024, max_queries=4, max_sum_rows=64),
}
QUERIES, ROWS, WIDTH, VALUE_WIDTH = 7, 301, 5, 3


@pytest.fixture(autouse=True)
def _defer_checks() -> Iterator[None]:
    with defer_checks("cpu"):
        yield


def make_tensors(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (QUERIES, WIDTH), (ROWS, WIDTH), (ROWS, VALUE_WIDTH)
    query, keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return scale * query, keys, values


def make_selection(kind: str) -> Selection:
    shared = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) < 0.7
    shared[:40] = False  # whole tiles of hidden rows, first and last
    shared[-70:] = False
    if kind == "all rows":
        return Selection(ROWS)
    if kind == "no rows":
        return Selection(ROWS, shared=torch.zeros(ROWS, dtype=torch.bool))
    if kind == "listed rows":
        return Selection(ROWS, shared=shared, visited=shared.nonzero().squeeze(-1))
    if kind == "rows by query":
        return Selection(ROWS, mask=torch.rand(1, QUERIES, ROWS, generator=torch.Generator().manual_seed(2)) < 0.5)
    return Selection(ROWS, shared=shared)


def visible_rows(selection: Selection) -> Tensor:
    """Return which query sees which row, (B, N) bool."""
    visible = torch.ones(QUERIES, ROWS, dtype=torch.bool)
    visible = visible if selection.shared is None else visible & selection.shared
    return visible if selection.mask is None else visible & selection.mask[0]


def check_read(
    tiling: Tiling,
    selection: Selection,
    *,
    metric: str = "dot",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    value_scale: float = 1.0,
    bias: Tensor | None = None,
    k: int = 0,
) -> None:
    """Compare a read and its gradients with the float64 reference.

    Rows that are hidden from all queries hold NaN and infinity in the read, but not in the reference.
    """
    tensors = make_tensors(scale)
    tensors = (*tensors[:2], value_scale * tensors[2])
    visible = visible_rows(selection)
    hidden = ~visible.any(0)
    upstream, upstream_lse = make_tensors()[2][:QUERIES] / value_scale, make_tensors()[0][:, 0]

    exact = [tensor.clone().requires_grad_() for tensor in tensors]
    wanted = reference.read(*exact, metric=metric, visible=visible, bias=bias)
    lse = torch.where(visible.any(-1), wanted.lse, 0.0)
    wanted_grads = torch.autograd.grad((wanted.values * upstream).sum() + (lse * upstream_lse).sum(), exact)

    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    poisoned = [
        leaves[0],
        *(
            leaf.masked_fill(hidden.unsqueeze(-1), bad)
            for leaf, bad in zip(leaves[1:], (math.nan, math.inf), strict=True)
        ),
    ]
    center = compute_center(leaves[0], metric)
    numbers = None if bias is None else ScoreBias(bias.to(dtype)[None])
    spec = ReadSpec(metric, center, selection, dtype, tiling=tiling, bias=numbers)
    operand = prepare_query(poisoned[0], metric, 1.0, center, dtype)
    with torch.no_grad():
        plain = exact_read(operand, poisoned[1], poisoned[2], spec, k=k)
    values, found_lse, best = exact_read(operand, poisoned[1], poisoned[2], spec, k=k)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    # The error of a float32 score grows with the score, and that of a weight with the score, too.
    tolerance *= max(1.0, scale / 10)
    torch.testing.assert_close(
        values.double() / value_scale, wanted.values / value_scale, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(found_lse.double(), wanted.lse, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(plain[0], values.detach(), rtol=1e-5, atol=1e-5 * value_scale)
    torch.testing.assert_close(plain[1], found_lse.detach(), rtol=1e-5, atol=1e-5)
    finite = torch.where(found_lse == -math.inf, 0.0, found_lse)
    loss = (values * upstream.to(dtype)).sum() + (finite * upstream_lse.to(dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    for name, grad, wanted_grad in zip(("query", "keys", "values"), grads, wanted_grads, strict=True):
        size = max(float(wanted_grad.abs().max()), 1e-30)
        torch.testing.assert_close(grad.double() / size, wanted_grad / size, rtol=tolerance, atol=tolerance, msg=name)
    if k:
        assert best is not None
        columns = reference.best(wanted.scores, k)
        assert torch.equal(best.rows, columns)
        weights = wanted.weights.gather(-1, columns.clamp(min=0)).masked_fill(columns < 0, 0.0)
        torch.testing.assert_close(best.weights.double(), weights, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["all rows", "shared mask", "listed rows", "no rows", "rows by query"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_a_read_equals_the_reference(tiling: str, kind: str) -> None:
    check_read(TILINGS[tiling], make_selection(kind))


@pytest.mark.parametrize("metric", ["scaled_dot", "cosine", "l2"])
@pytest.mark.parametrize("tiling", ["one dense tile", "small tiles"])
def test_hidden_rows_that_are_not_finite_have_no_effect_with_any_metric(tiling: str, metric: str) -> None:
    check_read(TILINGS[tiling], make_selection("shared mask"), metric=metric)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(("scale", "value_scale"), [(200.0, 1.0), (1e-5, 1e30), (200.0, 1e-30)])
def test_large_and_small_numbers_neither_overflow_nor_underflow(tiling: str, scale: float, value_scale: float) -> None:
    check_read(TILINGS[tiling], make_selection("shared mask"), scale=scale, value_scale=value_scale)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_read_reports_the_best_rows_and_adds_a_bias(tiling: str) -> None:
    bias = torch.randn(QUERIES, ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for kind in ("all rows", "shared mask", "no rows"):
        check_read(TILINGS[tiling], make_selection(kind), bias=bias, k=9, dtype=torch.float64)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("shape", [(0, ROWS), (QUERIES, 0)], ids=str)
def test_nothing_to_read_gives_zeros(tiling: str, shape: tuple[int, int]) -> None:
    queries, rows = shape
    query, keys, values = (tensor.float() for tensor in make_tensors())
    leaves = [query[:queries].requires_grad_(), keys[:rows].requires_grad_(), values[:rows].requires_grad_()]
    spec = ReadSpec("dot", None, Selection(rows), torch.float32, tiling=TILINGS[tiling])
    blend, lse, best = exact_read(*leaves, spec, k=2)
    assert best is not None
    assert torch.equal(blend, torch.zeros(queries, VALUE_WIDTH))
    assert torch.equal(lse, torch.full((queries,), -math.inf))
    assert torch.equal(best.rows, torch.full((queries, 2), -1))
    for leaf, grad in zip(leaves, torch.autograd.grad(blend.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("kind", ["all rows", "shared mask"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_makes_only_its_own_results_nan(tiling: str, kind: str, bad: float) -> None:
    query, keys, values = (tensor.float() for tensor in make_tensors())
    broken = query.clone()
    broken[2, 1] = bad
    checks = PendingChecks()
    spec = ReadSpec("dot", None, make_selection(kind), torch.float32, tiling=TILINGS[tiling], pending_checks=checks)
    wanted, wanted_lse, _ = exact_read(query, keys, values, spec)
    checks.raise_failed()
    found, found_lse, _ = exact_read(broken, keys, values, spec)
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(found[others], wanted[others])
    torch.testing.assert_close(found_lse[others], wanted_lse[others])
    assert found[2].isnan().all()
    assert found_lse[2].isnan()
    with pytest.raises(NonFiniteError, match="scores"):
        checks.raise_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 5, 400])
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (3, 5, 300), generator=generator).to(dtype)
    scores[0, 0] = -math.inf
    scores[0, 1, 3:] = -math.inf
    scores[0, 2] = -0.0
    scores[0, 2, 7] = 0.0
    scores[1] = (torch.randn(5, 300, generator=generator) * 1e30).to(dtype)
    scores[2, 0, 9] = math.inf
    ordered = scores.sort(dim=-1, descending=True, stable=True)
    for search in (top_k, two_stage_top_k):
        values, index = search(scores, k)
        assert torch.equal(index, ordered.indices[..., :k])
        assert torch.equal(values, scores.gather(-1, index))


def test_nan_is_the_largest_score() -> None:
    negative_nan = torch.tensor(math.nan).view(torch.int32).bitwise_or(-(2**31)).view(torch.float32)
    for nan in (torch.tensor(math.nan), negative_nan):
        index = top_k(torch.stack([torch.tensor(1.0), nan, torch.tensor(math.inf)]), 2)[1]
        assert index.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["all rows", "shared mask", "listed rows", "no rows"])
@pytest.mark.parametrize("few", [1, 10**9], ids=["two passes", "one pass"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_exact_top_k_equals_the_reference(tiling: str, few: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randint(-2, 3, (count, 3), generator=generator).float() for count in (QUERIES, ROWS))
    selection = make_selection(kind)
    visible = visible_rows(selection)
    scores = (query @ keys.T).double().masked_fill(~visible, -math.inf)
    keys[~visible.any(0)] = math.nan
    spec = ReadSpec("dot", None, selection, torch.float32, tiling=replace(TILINGS[tiling], one_pass_groups=few))
    for k in (1, 6, 50):
        found_scores, found = exact_top_k(query, keys, spec, k)
        assert torch.equal(found, reference.best(scores, k))
        assert torch.equal(found_scores == -math.inf, found < 0)


def test_a_bias_of_minus_infinity_hides_rows_and_nan_is_reported_later() -> None:
    bias = torch.tensor([[0.5, -math.inf, 2.0]], requires_grad=True)
    checks = PendingChecks()
    numbers, visible = separate_hidden_rows("bias", bias, torch.float32, checks)
    assert torch.equal(numbers.detach(), torch.tensor([[0.5, 0.0, 2.0]]))
    assert visible is not None
    assert torch.equal(visible, torch.tensor([[True, False, True]]))
    numbers.sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.tensor([[1.0, 0.0, 1.0]]))
    checks.raise_failed()
    separate_hidden_rows("bias", torch.tensor([math.nan, 1.0]), torch.float32, checks)
    with pytest.raises(NonFiniteError, match="bias: expected finite"):
        checks.raise_failed()


def test_properties_of_a_gpu_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device, reads = torch.device("cuda", 57), []

    def get_properties(index: int) -> SimpleNamespace:
        reads.append(index)
        return SimpleNamespace(multi_processor_count=40, major=7)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", get_properties)
    first, second = Tiling.for_device(device), Tiling.for_device(device)
    assert first == second == replace(GPU, multiprocessors=40, has_fast_bf16_matmul=False)
    assert reads == [57]


def test_auto_searches_exactly_up_to_a_higher_number_of_rows_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = IndexPolicy(exact_rows=100, gpu_exact_rows=400)
    monkeypatch.setattr("softdb.index.manager.IndexManager.policy", policy)
    store = SoftKVStore(4, 2)
    keys, query = torch.randn(450, 4), torch.randn(9, 4)
    store.add(keys[:390], torch.randn(390, 2))
    store.read(query, "topk", k=3)
    assert store.index_stats().factory == "Flat"
    assert store._index.recent_queries is None
    store.add(keys[390:], torch.randn(60, 2))
    store.read(query, "topk", k=3)
    assert store.index_stats().factory.startswith("IVF")
    assert store._index.recent_queries is not None


def test_another_index_than_auto_is_built_at_any_number_of_rows_on_a_gpu() -> None:
    store = SoftKVStore(4, 2, index=IndexConfig("HNSW8"))
    keys, values, query = torch.randn(300, 4), torch.randn(300, 2), torch.randn(9, 4)
    store.add(keys, values)
    read = store.read(query, "topk", k=3)
    assert store.index_stats().factory == "HNSW8"
    assert read.values.shape == (9, 2)
