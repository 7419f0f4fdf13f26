"""Tests of soft_read, topk_read and merge."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import reference
from support.contract import (
    DISPATCH,
    METRICS,
    Problem,
    ReadContract,
    RoundingNoise,
    TiledReadContract,
    force_dispatch,
    force_tiling,
)
from support.tolerances import allclose, largest_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softdb
from softdb.functional import merge, soft_read, topk_read
from softdb.kernels.tiling import Tiling
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.normalizers import SPARSE_NORMALIZERS

pytestmark = pytest.mark.each_device


def read_problem(problem: Problem, k: int | None = None) -> softdb.Read:
    return soft_read(
        problem.query,
        problem.keys,
        problem.values,
        metric=problem.metric,
        temperature=problem.temperature,
        mask=problem.visible,
        k=k,
    )


class TestSoftRead(ReadContract):
    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        return read_problem(problem), problem.leaves


@pytest.mark.slow
class TestSoftReadInSmallTiles(TiledReadContract, TestSoftRead):
    """Reads in tiles, with each setting of the dispatcher."""

    @pytest.fixture(autouse=True, params=DISPATCH)
    def _dispatch(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        force_dispatch(request.param, monkeypatch)


@pytest.mark.slow
@pytest.mark.cpu_only
class TestSoftReadRowsFirst(TestSoftRead):
    """Reads in one tile, with rows as its first dimension."""

    @pytest.fixture(autouse=True)
    def _tall(self, monkeypatch: pytest.MonkeyPatch) -> None:
        force_tiling(Tiling(transposed=True), monkeypatch)


@pytest.mark.slow
class TestSoftReadWithBestRows(ReadContract):
    """Reporting the best rows changes no result; the weights of all rows give the values."""

    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        read = read_problem(problem, k=max(1, len(problem.keys)))
        assert read.ids is not None
        assert read.weights is not None
        if len(problem.keys):
            rows = problem.values[read.ids.clamp(min=0)].to(read.weights.dtype)
            again = (read.weights.unsqueeze(-1) * rows).sum(-2)
            assert allclose(again, read.values.to(again.dtype), atol=2e-2 if rows.dtype != read.values.dtype else 1e-2)
        return read, problem.leaves


@pytest.mark.slow
class TestSoftReadWithBestRowsInSmallTiles(TiledReadContract, TestSoftReadWithBestRows):
    @pytest.fixture(
        autouse=True,
        params=["small tiles, rows first", "small tiles, always shifted", "two partitions", "one tile, short sums"],
    )
    def _dispatch(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        force_dispatch(request.param, monkeypatch)


@pytest.mark.slow
@pytest.mark.cpu_only
class TestRoundingNoise:
    """Gradients stay accurate if products round differently for other shapes and layouts."""

    @pytest.mark.parametrize("dispatch", [None, "two partitions", "five partitions, always shifted, rows first"])
    @pytest.mark.parametrize("reader", [TestSoftRead, TestSoftReadWithBestRows])
    @pytest.mark.parametrize("scale", [1.0, 1e4])
    @pytest.mark.parametrize("metric", METRICS)
    def test_gradients_agree(
        self,
        metric: str,
        scale: float,
        reader: type[ReadContract],
        dispatch: str | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if dispatch is not None:
            force_dispatch(dispatch, monkeypatch)
        contract = reader()
        contract.rounding = RoundingNoise
        for key_dim in (1, 33):
            contract.check(Problem.random(rows=507, key_dim=key_dim, metric=metric, scale=scale), scale)


@pytest.mark.slow
class TestTopkReadOfAllRows(ReadContract):
    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        count = len(problem.keys)
        candidates = torch.arange(count).expand(len(problem.query), count)
        if problem.visible is not None:
            candidates = candidates.masked_fill(~problem.visible, -1)
        if count == 0:
            candidates = torch.full((len(problem.query), 1), -1)
        read = topk_read(
            problem.query,
            problem.keys,
            problem.values,
            candidates,
            metric=problem.metric,
            temperature=problem.temperature,
        )
        return read, problem.leaves

    # topk_read has no mask: if some rows are no candidates, their mass is unknown.
    def test_a_query_that_sees_nothing_gets_zeros(self) -> None:
        read = topk_read(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 1), torch.tensor([[-1, -1], [2, -1]]))
        assert read.values.tolist() == [[0.0], [1.0]]
        assert read.mass[0] == 0
        assert read.mass[1].isnan()


@pytest.mark.slow
class TestMergeOfThreeParts(ReadContract):
    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        count = len(problem.keys)
        cuts = [0, count // 3, count // 2, count]
        reads = []
        for start, stop in itertools.pairwise(cuts):
            part = slice(start, stop)
            mask = None if problem.visible is None else problem.visible[:, part]
            reads.append(
                soft_read(
                    problem.query,
                    problem.keys[part],
                    problem.values[part],
                    metric=problem.metric,
                    temperature=problem.temperature,
                    mask=mask,
                )
            )
        return merge(reads), problem.leaves

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes_are_read_in_float32(self, dtype: torch.dtype) -> None:
        problem = Problem.random(rows=300, key_dim=32).to(dtype)
        read, _ = self.read(problem)
        assert read.values.dtype == dtype
        answer = problem.to(torch.float64).answer()
        # Each part is rounded to the query's dtype once before the merge.
        assert largest_error(read.values, answer.values) < 3 * torch.finfo(dtype).eps

    def test_scores_that_overflow_float16(self) -> None:
        problem = Problem.random(rows=20, key_dim=64)
        big = replace(problem, query=torch.full((5, 64), 300.0), keys=torch.full((20, 64), 300.0)).to(torch.float16)
        read, _ = self.read(big)
        # The merge uses the log-sum-exp of the parts; near 720,000 the spacing of float32 is 1/16.
        assert allclose(read.values.float(), problem.values.mean(0).expand(5, 3), atol=0.05)


# -- soft_read -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(metric: str, k: int | None) -> None:
    problem = Problem.random(4, 11, 3, 2, metric=metric, dtype=torch.float64)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False

    def read(*leaves: Tensor) -> tuple[Tensor, ...]:
        query, keys, values, temperature = leaves
        found = soft_read(query, keys, values, metric=metric, temperature=temperature, mask=mask, k=k)
        tensors = [found.values, found.lse[[0, 2, 3]]]
        if found.weights is not None and found.scores is not None:
            tensors += [found.weights, found.mass, found.scores[[0, 2, 3]]]
        return tuple(tensors)

    assert torch.autograd.gradcheck(read, tuple(problem.leaves.values()))


@pytest.mark.parametrize("wanted", [("query",), ("keys",), ("values",), ("query", "values"), ("keys", "values")])
def test_only_tensors_that_require_grad_get_a_gradient(wanted: tuple[str, ...]) -> None:
    problem = Problem.random()
    expected = torch.autograd.grad(problem.answer().values.sum(), [problem.leaves[name] for name in wanted])
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(name in wanted)
    soft_read(problem.query, problem.keys, problem.values).values.sum().backward()
    for name, grad in zip(wanted, expected, strict=True):
        assert allclose(problem.leaves[name].grad, grad, atol=1e-6)
    for name, leaf in problem.leaves.items():
        assert (leaf.grad is None) == (name not in wanted)


def test_a_second_derivative_raises() -> None:
    problem = Problem.random()
    read = soft_read(problem.query, problem.keys, problem.values)
    (grad,) = torch.autograd.grad(read.values.sum(), problem.query, create_graph=True)
    with pytest.raises(softdb.SecondDerivativeError, match="no second derivative"):
        grad.square().sum().backward()


def test_a_mask_that_changes_before_backward_raises() -> None:
    problem = Problem.random()
    mask = torch.rand(5, 123) < 0.5
    read = soft_read(problem.query, problem.keys, problem.values, mask=mask)
    mask.copy_(~mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.values.sum().backward()


def test_a_temperature_for_each_batch_entry() -> None:
    query, keys, values = torch.randn(3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    temperature = torch.rand(2, 3) + 0.5
    wanted = reference.read(query, keys, values, temperature=temperature)
    assert allclose(soft_read(query, keys, values, temperature=temperature).values, wanted.values, atol=1e-6)
    candidates = torch.arange(5).expand(2, 3, 5)
    found = topk_read(query, keys, values, candidates, temperature=temperature)
    assert allclose(found.values, wanted.values, atol=1e-6)


def test_weights_of_equal_huge_scores_are_equal() -> None:
    keys = torch.full((3, 1), 1e4)
    read = soft_read(torch.ones(1, 1), keys, torch.eye(3), k=3)
    assert allclose(read.weights, torch.full((1, 3), 1 / 3), atol=1e-7)
    assert allclose(read.mass, torch.ones(1), atol=1e-6)


def test_topk_read_has_second_derivatives() -> None:
    problem = Problem.random(3, 6, 4, 2, dtype=torch.float64)
    candidates = torch.tensor([[0, 1, 2], [5, -1, 3], [4, 2, 0]])

    def read(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return topk_read(query, keys, values, candidates).values

    assert torch.autograd.gradgradcheck(read, (problem.query, problem.keys, problem.values))


BATCHES = [
    ((2, 3), (2, 3), (2, 3)),
    ((2, 3), (), ()),
    ((2, 3), (2, 1), (2, 1)),
    ((2, 3), (1, 3), (2, 3)),
    ((), (4,), (4,)),
    ((3,), (2, 1), (2, 3)),
    ((2, 1, 3), (1, 4, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("shapes", BATCHES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_batches_broadcast(shapes: tuple[tuple[int, ...], ...], masked: bool) -> None:
    torch.manual_seed(0)
    leaves = [
        torch.randn(*shape, *size, dtype=torch.float64, requires_grad=True)
        for shape, size in zip(shapes, [(5, 4), (7, 4), (7, 2)], strict=True)
    ]
    query, keys, values = leaves
    batch = torch.broadcast_shapes(*shapes)
    partial = [batch[:i] + (1,) * (len(batch) - i) for i in range(len(batch) + 1)]
    shapes_of_mask = [(*some, *size) for some in [(), *partial] for size in ((5, 7), (1, 7))]
    for shape in shapes_of_mask if masked else [None]:
        mask = None if shape is None else torch.rand(shape) < 0.7
        read = soft_read(query, keys, values, mask=mask, k=2)
        answer = reference.read(query, keys, values, visible=mask)
        assert read.values.shape == (*batch, 5, 2)
        assert allclose(read.values, answer.values)
        assert allclose(read.lse, answer.lse.expand(read.lse.shape))
        assert (read.ids == reference.best(answer.scores, 2)).all()
        ours = torch.autograd.grad(read.values.sum(), leaves)
        theirs = torch.autograd.grad(answer.values.sum(), leaves)
        for mine, wanted in zip(ours, theirs, strict=True):
            assert allclose(mine, wanted, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (5, 7)], ids=str)
def test_a_mask_broadcasts_over_queries_and_rows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 5, 4), torch.randn(3, 7, 4), torch.randn(3, 7, 2)
    mask = torch.rand(3, *shape) < 0.6
    wanted = reference.read(query.double(), keys.double(), values.double(), visible=mask.expand(3, 5, 7))
    assert largest_error(soft_read(query, keys, values, mask=mask).values, wanted.values) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_multihead_attention(causal: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True, bias=False)
    x = torch.randn(2, 10, 32, requires_grad=True)
    mask = torch.ones(10, 10, dtype=torch.bool).tril() if causal else None
    wanted, _ = layer(x, x, x, attn_mask=None if mask is None else ~mask, need_weights=False)
    weights = list(layer.parameters())
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [x, *weights])

    projections = layer.in_proj_weight.detach().clone().requires_grad_()
    output = layer.out_proj.weight.detach().clone().requires_grad_()

    def heads(projected: Tensor) -> Tensor:  # (batch, n, dim) -> (batch, heads, n, dim / heads)
        return projected.unflatten(-1, (4, 8)).transpose(1, 2)

    query, key, value = (heads(x @ part.T) for part in projections.chunk(3))
    found = soft_read(query, key, value, mask=mask).values.transpose(1, 2).flatten(-2) @ output.T
    assert allclose(found, wanted, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), [x, projections, output])
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert allclose(grad, wanted_grad, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_best_rows_are_reported_with_their_mass(k: int) -> None:
    problem = Problem.random(rows=20)
    read = soft_read(problem.query, problem.keys, problem.values, k=k)
    answer = problem.to(torch.float64).answer()
    ids = reference.best(answer.scores, k)
    assert (read.ids == ids).all()
    held = answer.weights.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0)
    assert largest_error(read.weights, held) < 1e-6
    assert largest_error(read.mass, held.sum(-1)) < 1e-6
    assert (read.mass <= 1).all()
    assert (read.scores[ids < 0] == -math.inf).all()


def test_weights_sum_to_the_mass_when_scores_are_huge() -> None:
    problem = Problem.random(rows=50, scale=1e4)
    read = soft_read(problem.query, problem.keys, problem.values, k=50)
    assert allclose(read.weights.sum(-1), torch.ones(5), atol=1e-6)


def test_ties_go_to_the_lowest_row() -> None:
    query = torch.zeros(3, 4)
    read = soft_read(query, torch.randn(3000, 4), torch.randn(3000, 2), k=40)
    assert (read.ids == torch.arange(40)).all()


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    problem = Problem.random(dtype=torch.float64)
    read = soft_read(problem.query, problem.keys, problem.values, k=3, normalizer="straight_through")
    answer = problem.answer()
    best = reference.best(answer.scores, 3)
    assert (read.values == problem.values[best[:, 0]]).all()
    assert (read.weights == torch.tensor([1.0, 0.0, 0.0])).all()
    leaves = [problem.query, problem.keys, problem.values]
    ours = torch.autograd.grad(read.values.sum() + read.weights[:, 1].sum(), leaves)
    wanted = torch.autograd.grad(answer.values.sum() + answer.weights.gather(1, best)[:, 1].sum(), leaves)
    for mine, other in zip(ours, wanted, strict=True):
        assert allclose(mine, other)


# -- other normalizers -----------------------------------------------------------------------------------


def read_densely(problem: Problem, normalizer: str) -> tuple[Tensor, Tensor]:
    """Compute values and weights of a sparse normalizer over all rows."""
    found = reference.scores(problem.query, problem.keys, problem.metric, problem.temperature)
    if problem.visible is not None:
        found = found.masked_fill(~problem.visible, -math.inf)
    weights = SPARSE_NORMALIZERS[normalizer](found)
    return weights @ problem.values, weights


@pytest.mark.parametrize("normalizer", sorted(SPARSE_NORMALIZERS))
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("rows", [1, 31, 123, 1000])
@pytest.mark.parametrize("metric", METRICS)
def test_sparse_reads_equal_the_dense_ones(metric: str, rows: int, scale: float, normalizer: str) -> None:
    problem = Problem.random(rows=rows, metric=metric, scale=scale, dtype=torch.float64)
    torch.manual_seed(0)
    problem.visible = torch.rand(5, rows) < 0.7
    problem.visible[1] = False
    how = {"metric": metric, "temperature": problem.temperature, "mask": problem.visible, "normalizer": normalizer}
    read = soft_read(problem.query, problem.keys, problem.values, **how)
    values, weights = read_densely(problem, normalizer)
    leaves = [problem.query, problem.keys, problem.values, problem.temperature]
    upstream = torch.randn_like(values)
    assert largest_error(read.values, values) < 1e-8
    assert largest_error(read.lse, problem.answer().lse) < 1e-8
    ours = torch.autograd.grad((read.values * upstream).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((values * upstream).sum(), leaves, allow_unused=True)
    for mine, other in zip(ours, wanted, strict=True):
        assert largest_error(mine, other) < 1e-6 * max(1.0, float(other.abs().max()))
    assert read.ids is read.weights is None
    some = soft_read(problem.query, problem.keys, problem.values, k=4, **how)
    assert largest_error(some.values, values) < 1e-8
    assert some.ids.shape == some.weights.shape == some.scores.shape == (5, 4)
    picked = weights.gather(1, some.ids.clamp(min=0)).masked_fill(some.ids < 0, 0.0)
    assert largest_error(some.weights, picked) < 1e-8
    assert largest_error(some.mass, weights.sort(-1, descending=True).values[:, :4].sum(-1)) < 1e-8
    assert some.values[1].abs().max() == some.mass[1] == 0
    assert some.lse[1] == -math.inf


@pytest.mark.parametrize("normalizer", sorted(SPARSE_NORMALIZERS))
def test_sparse_reads_of_groups(normalizer: str) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 300, 8), torch.randn(2, 1, 300, 2)
    weights = SPARSE_NORMALIZERS[normalizer](3 * query @ keys.mT / math.sqrt(8))
    read = soft_read(query, keys, values, temperature=1 / 3, normalizer=normalizer, k=2)
    assert largest_error(read.values, weights @ values) < 1e-5
    assert largest_error(read.weights, weights.topk(2).values) < 1e-5


@pytest.mark.parametrize("normalizer", sorted(SPARSE_NORMALIZERS))
def test_a_support_too_large_to_gather_raises(normalizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_tiling(Tiling(max_sparse_elements=10_500), monkeypatch)
    problem = Problem.random(rows=2000, scale=0.01)  # weight on all rows
    with pytest.raises(softdb.ArgumentError, match=f"normalizer: expected '{normalizer}' .* lower the temperature"):
        soft_read(problem.query, problem.keys, problem.values, normalizer=normalizer)
    with torch.no_grad():  # without gradients, keys and values are not gathered
        soft_read(problem.query, problem.keys, problem.values, normalizer=normalizer)
    soft_read(problem.query, problem.keys, problem.values, normalizer=normalizer, temperature=1e-3)


def test_topk_read_has_the_mass_of_sparse_weights_only_if_all_rows_are_candidates() -> None:
    problem = Problem.random(rows=50, scale=100.0)
    best = reference.best(problem.answer().scores, 20)
    some = topk_read(problem.query, problem.keys, problem.values, best, normalizer="sparsemax")
    assert some.mass.isnan().all()
    wanted, _ = read_densely(problem, "sparsemax")
    assert largest_error(some.values, wanted) < 1e-5
    every = torch.arange(50).expand(5, -1)
    assert (topk_read(problem.query, problem.keys, problem.values, every, normalizer="entmax15").mass == 1).all()


@pytest.mark.parametrize("rows", [7, 5001])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_gumbel_is_straight_through_of_scores_with_noise(metric: str, k: int | None, rows: int) -> None:
    problem = Problem.random(queries=40, rows=rows, metric=metric, dtype=torch.float64)
    operands = problem.query, problem.keys, problem.values
    how = {"metric": metric, "normalizer": "gumbel", "k": k}
    read = soft_read(*operands, generator=torch.Generator().manual_seed(1), **how)
    noise = GumbelNoise.draw(torch.Generator().manual_seed(1)).at(torch.arange(40), torch.arange(rows), torch.float64)
    found = reference.scores(problem.query, problem.keys, metric) + noise
    soft = torch.softmax(found, -1)
    assert torch.equal(read.values, problem.values[found.argmax(-1)])
    assert largest_error(read.lse, found.logsumexp(-1)) < 1e-9
    wanted = torch.autograd.grad((soft @ problem.values).sin().sum() + found.logsumexp(-1).sum(), operands)
    upstream = (soft @ problem.values).cos().detach()
    ours = torch.autograd.grad((read.values * upstream).sum() + read.lse.sum(), operands)
    for mine, other in zip(ours, wanted, strict=True):
        assert largest_error(mine, other) < 1e-8
    if k is not None:
        assert torch.equal(read.ids, reference.best(found, k))
        assert largest_error(read.scores, found.gather(1, read.ids)) < 1e-9
        assert torch.equal(read.weights[:, 0], torch.ones(40))
        assert largest_error(read.mass, soft.gather(1, read.ids).sum(-1)) < 1e-9
    candidates = torch.arange(rows).expand(40, -1)
    same = topk_read(
        *operands, candidates, metric=metric, normalizer="gumbel", generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(same.values, read.values)
    again = torch.autograd.grad((same.values * upstream).sum() + same.lse.sum(), operands)
    for mine, other in zip(again, wanted, strict=True):
        assert largest_error(mine, other) < 1e-8
    other = soft_read(*operands, generator=torch.Generator().manual_seed(2), **how)
    assert not torch.equal(other.values, read.values)


def test_gumbel_in_groups_draws_independently_for_each_query() -> None:
    keys, values = torch.zeros(3, 2, 50, 4), torch.arange(50.0).expand(3, 2, -1).unsqueeze(-1)
    drawn = soft_read(torch.zeros(3, 2, 9, 4), keys, values, normalizer="gumbel").values.flatten()
    assert drawn.unique().numel() > 20
    assert not torch.equal(drawn[:9], drawn[9:18])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [11, 1003])
def test_gumbel_draws_rows_by_their_softmax_weights(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_tiling(Tiling(tile_elements=2**16), monkeypatch)
    torch.manual_seed(0)
    query, keys = torch.randn(1, 8), torch.randn(rows, 8)
    wanted = 100_000 * torch.softmax(2 * query @ keys.mT / math.sqrt(8), -1)[0].double()
    generator = torch.Generator().manual_seed(5)
    counts = torch.zeros(rows, dtype=torch.float64)
    for _ in range(10):
        drawn = soft_read(
            query.expand(10_000, -1),
            keys,
            torch.arange(rows, dtype=torch.float32).unsqueeze(-1),
            temperature=0.5,
            normalizer="gumbel",
            generator=generator,
        ).values
        counts += torch.bincount(drawn.flatten().long(), minlength=rows)
    often = wanted >= 5
    observed, expected = counts[often], wanted[often]
    if not bool(often.all()):
        observed = torch.cat([observed, counts[~often].sum()[None]])
        expected = torch.cat([expected, wanted[~often].sum()[None]])
    chi_squared, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation allocates."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_no_score_matrix_is_allocated() -> None:
    query, keys, values = (torch.randn(n, 8, requires_grad=True) for n in (300, 20_000, 20_000))
    with LargestTensor() as largest:
        soft_read(query, keys, values).values.sum().backward()
    assert 0 < largest.numel <= Tiling().tile_elements < 300 * 20_000


# -- topk_read -------------------------------------------------------------------------------------------


def test_topk_read_reads_only_its_candidates() -> None:
    problem = Problem.random(2, 10, dtype=torch.float64)
    candidates = torch.tensor([[7, 3, -1], [0, 9, 4]])
    visible = torch.zeros(2, 10, dtype=torch.bool)
    visible[0, [7, 3]] = visible[1, [0, 9, 4]] = True
    read = topk_read(problem.query, problem.keys, problem.values, candidates)
    answer = reference.read(problem.query, problem.keys, problem.values, visible=visible)
    assert allclose(read.values, answer.values)
    assert allclose(read.lse, answer.lse)
    assert (read.ids == reference.best(answer.scores, 3)).all()
    assert read.mass.isnan().all()
    assert read.scores[0, 2] == -math.inf
    assert read.weights[0, 2] == 0


def test_topk_read_of_batches() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 2)
    candidates = torch.stack([torch.randperm(9)[:4] for _ in range(30)]).view(2, 3, 5, 4)
    visible = torch.zeros(2, 3, 5, 9, dtype=torch.bool).scatter_(-1, candidates, True)
    answer = reference.read(query, keys, values, visible=visible)
    read = topk_read(query, keys, values, candidates)
    assert allclose(read.values, answer.values, atol=1e-6)
    assert (read.ids == reference.best(answer.scores, 4)).all()


# -- merge -----------------------------------------------------------------------------------------------


def test_merge_with_a_store_is_the_dense_expression_over_both() -> None:
    torch.manual_seed(0)
    store = softdb.SoftKVStore(6, 2, trainable=True, dtype=torch.float64)
    store.add(torch.randn(40, 6).double(), torch.randn(40, 2).double())
    encoder = torch.nn.Linear(6, 6).double()
    context = torch.randn(7, 6).double()
    values = torch.randn(7, 2).double().requires_grad_()
    query = torch.randn(3, 6).double().requires_grad_()
    leaves = [query, store.keys, store.values, values, *encoder.parameters()]

    merged = merge([store.read(query), soft_read(query, encoder(context), values)])
    dense = reference.read(query, torch.cat([store.keys, encoder(context)]), torch.cat([store.values, values]))
    assert allclose(merged.values, dense.values)
    assert allclose(merged.lse, dense.lse)
    ours = torch.autograd.grad(merged.values.square().sum() + merged.lse.sum(), leaves)
    wanted = torch.autograd.grad(dense.values.square().sum() + dense.lse.sum(), leaves)
    for mine, other in zip(ours, wanted, strict=True):
        assert allclose(mine, other)


def test_merge_sorts_the_best_rows_of_all_reads() -> None:
    problem = Problem.random(rows=60, dtype=torch.float64)
    first = soft_read(problem.query, problem.keys[:25], problem.values[:25], k=4)
    second = soft_read(problem.query, problem.keys[25:], problem.values[25:], k=4)
    merged = merge([first, second])
    answer = problem.answer()
    assert merged.ids.shape == (5, 8)
    assert (merged.scores.diff(dim=-1) <= 0).all()
    assert allclose(merged.scores[:, :4], answer.scores.sort(descending=True).values[:, :4])
    assert allclose(merged.weights, (merged.scores - answer.lse[:, None]).exp())
    assert allclose(merged.mass, merged.weights.sum(-1))


def test_merge_has_a_nan_mass_if_a_read_has_one() -> None:
    problem = Problem.random(rows=10)
    whole = soft_read(problem.query, problem.keys, problem.values)
    best = soft_read(problem.query, problem.keys, problem.values, k=2)
    some = topk_read(problem.query, problem.keys, problem.values, torch.tensor([[1, 2]]).expand(5, 2))
    assert merge([whole, whole]).ids is None
    assert (merge([whole, best]).mass == 1).all()
    assert merge([best, some]).mass.isnan().all()
    assert merge([whole, some]).mass.isnan().all()


# -- bad input -------------------------------------------------------------------------------------------

Q, K, V = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 5)
BAD_READS = [
    (dict(query=Q.long()), softdb.DtypeError, "query: expected a floating-point tensor, got torch.int64"),
    (dict(query=[[1.0]]), softdb.DtypeError, "query: expected a floating-point torch.Tensor, got list"),
    (dict(query=Q[0]), softdb.ShapeError, r"query: expected shape \(..., any, any\), got \(3,\)"),
    (dict(keys=torch.ones(4, 2)), softdb.ShapeError, r"keys: expected shape \(..., any, 3\), got \(4, 2\)"),
    (dict(values=torch.ones(3, 5)), softdb.ShapeError, r"values: expected shape \(..., 4, any\), got \(3, 5\)"),
    (
        dict(keys=torch.ones(2, 4, 3), values=torch.ones(3, 4, 5)),
        softdb.ShapeError,
        "leading dimensions that broadcast",
    ),
    (dict(query=Q * math.nan), softdb.NonFiniteError, "query: expected finite numbers"),
    (dict(keys=K * math.inf), softdb.NonFiniteError, "keys: expected finite numbers"),
    (dict(values=V * math.nan), softdb.NonFiniteError, "values: expected finite numbers"),
    (dict(query=Q * 1e30, keys=K * 1e30), softdb.NonFiniteError, "expected finite scores"),
    (dict(metric="manhattan"), softdb.ArgumentError, "metric: expected one of 'dot', 'scaled_dot', 'cosine', 'l2'"),
    (dict(temperature=0.0), softdb.ArgumentError, "temperature: expected a finite number above 0, got 0.0"),
    (dict(temperature=math.nan), softdb.ArgumentError, "temperature: expected a finite number above 0, got nan"),
    (dict(temperature=torch.tensor(-1.0)), softdb.ArgumentError, "temperature: expected finite numbers above 0"),
    (dict(temperature=torch.ones(3)), softdb.ShapeError, r"temperature: .* broadcastable .* \(2,\), got shape \(3,\)"),
    (dict(temperature=torch.ones((), device="meta")), softdb.DeviceError, "temperature: expected a tensor on cpu"),
    (dict(temperature="warm"), softdb.DtypeError, "temperature: expected a number, got str 'warm'"),
    (dict(mask=torch.ones(2, 4).long()), softdb.DtypeError, "mask: expected a bool tensor"),
    (dict(mask=torch.ones(3, 4) > 0), softdb.ShapeError, r"mask: expected a shape broadcastable to \(2, 4\)"),
    (dict(k=0), softdb.ArgumentError, "k: expected an integer of at least 1, got 0"),
    (dict(k=1.5), softdb.DtypeError, "k: expected an integer, got float 1.5"),
    (dict(normalizer="relu"), softdb.ArgumentError, "normalizer: expected one of 'softmax'"),
    (dict(normalizer="entmax15", generator=torch.Generator()), softdb.ArgumentError, "generator: expected no value"),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("change", "error", "message"), BAD_READS, ids=[message[:30] for _, _, message in BAD_READS])
def test_bad_input_of_soft_read(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_read(**({"query": Q, "keys": K, "values": V} | change))  # type: ignore[arg-type]


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        (torch.ones(2, 2), softdb.DtypeError, "candidates: expected int64 ids, got torch.float32"),
        ([[0, 1]], softdb.DtypeError, "candidates: expected an int64 tensor, got list"),
        (torch.tensor([[0, 4], [0, 1]]), softdb.ArgumentError, "row numbers below 4, got 4"),
        (torch.tensor([[0, -2], [0, 1]]), softdb.ArgumentError, "or -1 for padding, got -2"),
        (torch.tensor([[0, 0], [0, 1]]), softdb.DuplicateIdError, "each row at most once per query, got 0 more"),
        (torch.zeros(3, 2, dtype=torch.int64), softdb.ShapeError, r"candidates: expected shape \(2, k\)"),
        (torch.zeros(2, 0, dtype=torch.int64), softdb.ArgumentError, "at least one column"),
    ],
)
def test_bad_candidates(candidates: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk_read(Q, K, V, candidates)


def test_bad_reads_to_merge() -> None:
    soft = soft_read(Q, K, V)
    with pytest.raises(softdb.ArgumentError, match="at least one Read"):
        merge([])
    with pytest.raises(softdb.DtypeError, match="expected Read objects, got a "):
        merge([soft, Q])  # type: ignore[list-item]
    with pytest.raises(softdb.ShapeError, match="values of one shape"):
        merge([soft, soft_read(Q[:1], K, V)])
    with pytest.raises(softdb.ArgumentError, match="reads with softmax weights, got one with 'straight_through'"):
        merge([soft, soft_read(Q, K, V, normalizer="straight_through")])
    with pytest.raises(softdb.DtypeError, match="got one Read"):
        merge(soft)  # type: ignore[arg-type]


# -- edge cases ----------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [((0, 16), (300, 16)), ((2, 0, 4), (2, 5, 4)), ((2, 0, 4), (5, 4))], ids=str)
def test_no_queries_give_no_gradient(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    query, keys = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    torch.full((10_000,), math.nan)  # fills memory with NaN that a later allocation may reuse
    soft_read(query, keys, keys).values.sum().backward()
    assert keys.grad is not None
    assert (keys.grad == 0).all()


@pytest.mark.parametrize(
    ("query", "keys", "wanted"),
    [((0, 3, 4), (0, 5, 4), (0, 3, 2)), ((0, 3, 4), (5, 4), (0, 3, 2)), ((2, 0, 3, 4), (2, 1, 5, 4), (2, 0, 3, 2))],
    ids=str,
)
def test_empty_batches_keep_their_shape(query: tuple[int, ...], keys: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert soft_read(torch.zeros(query), torch.zeros(keys), torch.zeros(*keys[:-1], 2)).values.shape == wanted


@pytest.mark.parametrize(("height", "size"), [(39.9, 1e17), (-39.9, 1e-30), (10.0, 1e33)])
def test_huge_and_tiny_values_neither_overflow_nor_underflow(height: float, size: float) -> None:
    """Products of values and exponentials without a shift would overflow or underflow."""
    query, keys, values = torch.ones(2, 1), torch.full((70_000, 1), height), torch.full((70_000, 1), size)
    read = soft_read(query, keys, values, metric="dot").values
    assert allclose(read, values[:2], rtol=1e-5, atol=0)


def test_small_gradients_do_not_underflow_after_a_late_shift() -> None:
    torch.manual_seed(0)
    query = torch.ones(4, 1, requires_grad=True)
    keys = torch.cat([torch.rand(2**17, 1) * 0.5 + 39, torch.full((5000, 1), -1000.0)]).requires_grad_()
    values = torch.randn(len(keys), 2, requires_grad=True)
    leaves = (query, keys, values)

    def gradients(upstream: float) -> tuple[Tensor, ...]:
        read = soft_read(*leaves, metric="dot").values
        return torch.autograd.grad(read, leaves[1:], torch.full((4, 2), upstream))

    for large, tiny in zip(gradients(1.0), gradients(1e-22), strict=True):
        assert largest_error(tiny.double() * 1e22, large) <= 1e-5 * large.abs().max()


@pytest.mark.cpu_only
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_topk_read_raises_for_candidates_that_are_not_finite(bad: float) -> None:
    query, rows, candidates = torch.ones(1, 4), torch.randn(60, 4), torch.tensor([[0, 1]])
    invalid = rows.clone()
    invalid[0] = bad
    with pytest.raises(softdb.NonFiniteError, match="keys: expected finite"):
        topk_read(query, invalid, rows, candidates, metric="dot")
    with pytest.raises(softdb.NonFiniteError, match="values: expected finite"):
        topk_read(query, rows, invalid, candidates)
    assert (
        topk_read(query, invalid, invalid, candidates + 1).values.isfinite().all()
    )  # rows that are no candidates are not checked


def test_topk_read_of_values_without_width() -> None:
    read = topk_read(torch.zeros(2, 4), torch.randn(60, 4), torch.zeros(60, 0), torch.tensor([[0, 1], [2, 3]]))
    assert read.values.shape == (2, 0)


# -- sums over many rows ---------------------------------------------------------------------------------


def check_equal_summands(found: Tensor, rows: int) -> None:
    """Assert that the mean of ``rows`` numbers 0.1 has the rounding error of sums over short blocks."""
    error = float((found.double() / torch.tensor(0.1).double() - 1).abs().max())
    assert error <= 1e-6 * max(1.0, math.sqrt(rows / Tiling().max_sum_rows))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.parametrize("queries", [1, 3, 64])
@pytest.mark.parametrize("k", [None, 2])
def test_the_mean_of_a_million_equal_rows_is_accurate(queries: int, width: int, k: int | None) -> None:
    rows = 10**6
    query, keys, values = torch.ones(queries, 2), torch.zeros(1, 2), torch.full((1, 1), 0.1)
    read = soft_read(query, keys.expand(rows, 2), values.expand(rows, width), k=k)
    check_equal_summands(read.values, rows)
    assert allclose(read.lse.double(), torch.tensor(float(rows), dtype=torch.float64).log(), rtol=1e-6)


@pytest.mark.parametrize("queries", [1, 2, 13])
def test_the_mean_of_equal_rows_in_one_small_tile_is_accurate(queries: int) -> None:
    """All weights but one are equal, and differ from 1 before normalization."""
    rows = Tiling().max_dense_scores // queries
    query, keys = torch.ones(queries, 1), torch.cat([torch.zeros(1, 1), torch.full((rows - 1, 1), -0.1)])
    check_equal_summands(soft_read(query, keys, torch.full((rows, 3), 0.1), metric="dot").values, rows)


@pytest.mark.parametrize("heads", [2, 8])
def test_the_mean_of_equal_rows_for_several_heads_is_accurate(heads: int) -> None:
    rows = 200_000
    query, keys, values = torch.ones(heads, 1, 2), torch.zeros(heads, 1, 2), torch.full((heads, 1, 1), 0.1)
    mask = torch.arange(rows) % 7 != 0
    for visible in (None, mask.expand(1, rows)):
        read = soft_read(query, keys.expand(-1, rows, 2), values.expand(-1, rows, 3), mask=visible)
        check_equal_summands(read.values, rows)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_equal_candidates_is_accurate(dtype: torch.dtype, wanted: bool) -> None:
    rows = 150_000
    query, keys, values = torch.ones(2, 2), torch.zeros(rows, 2), torch.full((rows, 3), 0.1)
    query = query.to(dtype).requires_grad_(wanted)  # gradients and dtype conversion each have their own code path
    read = topk_read(query, keys, values, torch.arange(rows).expand(2, rows))
    check_equal_summands(read.values.detach(), rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [100_000, 10**6])
@pytest.mark.parametrize("queries", [1, 64])
def test_sums_of_gradients_over_many_equal_rows_are_accurate(queries: int, rows: int) -> None:
    query = torch.ones(queries, 1, requires_grad=True)
    keys, values = torch.zeros(rows, 1), torch.zeros(rows, 1)
    keys[::2], values[::2] = 0.1, 0.1  # d output / d query is the covariance of keys and values, 0.0025
    read = soft_read(query, keys.requires_grad_(), values.requires_grad_(), metric="dot")
    grads = torch.autograd.grad(read.values.sum(), [query, keys, values])
    weights = torch.softmax(keys.detach().double() @ torch.ones(1, 1, dtype=torch.float64), 0)
    mean = (weights * values.double()).sum()
    covariance = (weights * (keys.double() - (weights * keys.double()).sum()) * (values.double() - mean)).sum()
    assert allclose(grads[0].double(), covariance.detach(), rtol=1e-4)
    assert allclose(grads[2].double(), queries * weights, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_sums_of_gradients_over_many_queries_are_accurate(rows: int) -> None:
    queries = Tiling().max_dense_scores // rows
    values = torch.zeros(rows, 3, requires_grad=True)
    read = soft_read(torch.ones(queries, 1), torch.zeros(rows, 1), values)
    (grad,) = torch.autograd.grad(read.values, values, torch.full((queries, 3), 0.1))
    check_equal_summands(grad * rows / queries, queries)


@pytest.mark.cpu_only
def test_memory_does_not_grow_with_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has (threads, B, value_dim) elements, in forward or backward."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    queries, width = 16_384, 64
    query = torch.randn(queries, 8, requires_grad=True)
    keys, values = torch.randn(100, 8, requires_grad=True), torch.randn(100, width, requires_grad=True)
    with LargestTensor() as largest:
        soft_read(query, keys, values).values.sum().backward()
    assert 0 < largest.numel <= max(Tiling().tile_elements, queries * width)
