"""Contract tests that every kind of read must pass, against the float64 reference.

A test class inherits `ReadContract` and defines how to read a `Problem`. The contract tests values, log-sum-exp and
gradients over metrics, shapes and score scales, as well as filters, ties and empty reads.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softdb
from softdb.kernels.tiling import Tiling
from support import reference
from support.tolerances import allclose, largest_error, tolerance_of

METRICS = ["dot", "scaled_dot", "cosine", "l2"]

# Tilings that exact reads may use, scaled down to sizes that the reference can compute: elements and queries of a tile,
# rows per summed product, whether tiles have their rows first, and the largest score that needs no shift.
DISPATCH = {
    "tiny tiles": (64, 2, 1024, False, 40.0),
    "small tiles, rows first": (512, 3, 1024, True, 40.0),
    "small tiles, always shifted": (512, 3, 1024, False, -1.0),
    "two partitions": (1024, 4, 128, False, 40.0),
    "three partitions, rows first": (1024, 1024, 64, True, 40.0),
    "five partitions, always shifted, rows first": (512, 3, 32, True, -1.0),
    "one tile": (2**20, 1024, 1024, False, 40.0),
    "one tile, short sums": (2**20, 1024, 32, False, 40.0),
}


def force_dispatch(choice: str, patch: pytest.MonkeyPatch) -> None:
    """Make every exact read use a tiling of `DISPATCH`."""
    elements, queries, sum_rows, transposed, unshifted = DISPATCH[choice]
    tiling = Tiling(
        max_dense_scores=0,
        tile_elements=elements,
        max_queries=queries,
        max_sum_rows=sum_rows,
        max_unshifted_score=unshifted,
        transposed=transposed,
    )
    force_tiling(tiling, patch)


def force_tiling(tiling: Tiling, patch: pytest.MonkeyPatch) -> None:
    """Make every backend use a tiling."""
    patch.setattr(Tiling, "for_device", lambda device: tiling)


def rotate(first: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combine all entries of the other sequences, each combination with one entry of the first, in turn.

    With long enough sequences each pair of entries of two sequences is combined at least once, at a fraction of the
    cost of all combinations.
    """
    places = itertools.product(*(range(len(other)) for other in others))
    return [
        (first[sum(place) % len(first)], *(other[at] for other, at in zip(others, place, strict=True)))
        for place in places
    ]


class RoundingNoise(TorchDispatchMode):
    """Dispatch mode that adds noise of up to ±2 units in the last place to every matrix product.

    The noise depends on the shapes and strides of the operands. It exaggerates processors whose matrix products round
    differently for other shapes or memory layouts.
    """

    products = frozenset(
        {"mm", "bmm", "mv", "dot", "addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "addbmm", "addbmm_"}
    )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.overloadpacket.__name__ in self.products and result.is_floating_point():
            operands = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)]
            layout = [(tuple(tensor.shape), tensor.stride()) for tensor in operands]
            generator = torch.Generator().manual_seed(zlib.crc32(repr((str(function), layout)).encode()))
            units = 4 * torch.rand(result.shape, generator=generator, dtype=result.dtype) - 2
            unit = torch.finfo(result.dtype).eps * (result.frexp().exponent - 1).to(result.dtype).exp2()
            result.add_(torch.where(result == 0, 0.0, units * unit))
        return result


@dataclass
class Problem:
    """Queries, rows and the options of a read. The tensors are leaves that require gradients."""

    query: Tensor  # (B, d)
    keys: Tensor  # (N, d)
    values: Tensor  # (N, dv)
    metric: str = "scaled_dot"
    temperature: Tensor | float = 1.0
    visible: Tensor | None = None  # (B, N) bool

    @classmethod
    def random(
        cls,
        queries: int = 5,
        rows: int = 123,
        key_dim: int = 8,
        value_dim: int = 3,
        *,
        metric: str = "scaled_dot",
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Problem:
        """Create random queries and rows whose scores have the magnitude ``scale``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        size = 1.0 if metric == "cosine" else math.sqrt(scale)
        temperature = torch.tensor(1 / scale if metric == "cosine" else 1.0)
        problem = cls(
            size * normal(queries, key_dim), size * normal(rows, key_dim), normal(rows, value_dim), metric, temperature
        )
        return problem.to(torch.float32).to(dtype)

    def to(self, dtype: torch.dtype) -> Problem:
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        return replace(
            self,
            query=leaf(self.query),
            keys=leaf(self.keys),
            values=leaf(self.values),
            temperature=leaf(torch.as_tensor(self.temperature)),
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"query": self.query, "keys": self.keys, "values": self.values, "temperature": self.temperature}

    def answer(self) -> reference.Answer:
        return reference.read(
            self.query,
            self.keys,
            self.values,
            metric=self.metric,
            temperature=self.temperature,
            visible=self.visible,
        )


def outcome(
    values: Tensor, lse: Tensor, leaves: dict[str, Tensor], weights: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return values, log-sum-exp, and the gradients of a weighted sum of both."""
    loss = (values * weights[0].to(values.dtype)).sum()
    finite = lse > -math.inf
    loss = loss + (lse[finite] * weights[1].to(lse.dtype)[finite]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    result = {"values": values.detach(), "lse": lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        dense = torch.zeros_like(leaf) if grad is None else grad.to_dense()
        result[f"gradient of {name}"] = dense
    return result


class ReadContract:
    """Base class of contract tests. A subclass defines `read`, and overrides what it does not support."""

    gradients: tuple[str, ...] = ("query", "keys", "values", "temperature")
    rounding: Callable[[], AbstractContextManager[Any]] = nullcontext  # context of reads by softdb

    def read(self, problem: Problem) -> tuple[softdb.Read, dict[str, Tensor]]:
        """Read ``problem``; return the read, and the tensors that receive gradients, by name."""
        raise NotImplementedError

    # -- agreement with the reference ------------------------------------------------------------------------

    def check(self, problem: Problem, scale: float = 1.0) -> None:
        """Compare values, lse and gradients with the reference.

        The relative tolerance is that of `TOLERANCES`. In dtypes other than float64 it is twice the error of the naive
        formula if that is larger.
        """
        generator = torch.Generator().manual_seed(1)
        queries, width = len(problem.query), problem.values.shape[-1]
        weights = (torch.randn(queries, width, generator=generator), torch.randn(queries, generator=generator))

        def run(reader: Callable[[Problem], tuple[Tensor, Tensor, dict[str, Tensor]]], p: Problem) -> dict[str, Tensor]:
            values, lse, leaves = reader(p)
            expected = {name: leaf for name, leaf in leaves.items() if name in self.gradients}
            return outcome(values, lse, expected, weights)

        def naive(p: Problem) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            answer = p.answer()
            return answer.values, answer.lse, p.leaves

        def softdb_read(p: Problem) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            read, leaves = self.read(p)
            return read.values, read.lse, leaves

        expected = run(naive, problem.to(torch.float64))
        plain = run(naive, problem)
        with self.rounding():
            found = run(softdb_read, problem)
        for name, tensor in expected.items():
            finite = tensor[tensor.isfinite()]
            size = max(1.0, scale, float(finite.abs().max()) if finite.numel() else 0.0)
            allowed = tolerance_of(problem.query).read * size
            if problem.query.dtype != torch.float64:
                allowed = max(allowed, 2 * largest_error(plain[name], tensor))
            assert found[name].shape == tensor.shape, name
            assert not found[name].isnan().any(), name
            assert largest_error(found[name], tensor) <= allowed, name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("metric", METRICS)
    def test_agrees_for_every_metric(self, metric: str, dtype: torch.dtype) -> None:
        self.check(Problem.random(metric=metric, dtype=dtype))

    @pytest.mark.parametrize("rows", [1, 7, 123, 507])
    @pytest.mark.parametrize("key_dim", [1, 3, 33])
    @pytest.mark.parametrize("metric", METRICS)
    def test_agrees_for_odd_shapes(self, metric: str, key_dim: int, rows: int) -> None:
        for dtype in (torch.float32, torch.float64):
            for queries, value_dim in ((1, 5), (9, 1)):
                self.check(Problem.random(queries, rows, key_dim, value_dim, metric=metric, dtype=dtype))

    @pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e2, 1e4])
    @pytest.mark.parametrize("metric", METRICS)
    def test_agrees_for_every_score_scale(self, metric: str, scale: float) -> None:
        for dtype in (torch.float32, torch.float64):
            for key_dim in (1, 33):
                problem = Problem.random(rows=507, key_dim=key_dim, metric=metric, scale=scale, dtype=dtype)
                self.check(problem, scale)

    def test_l2_is_accurate_far_from_the_origin(self) -> None:
        problem = Problem.random(rows=200, key_dim=16, metric="l2")
        far = replace(problem, query=problem.query + 100, keys=problem.keys + 100)
        self.check(far.to(torch.float32))
        self.check(far.to(torch.float64))

    def test_l2_is_accurate_within_clusters_far_from_each_other(self) -> None:
        problem = Problem.random(rows=200, key_dim=16, metric="l2")
        side = torch.where(torch.arange(200) % 2 == 0, 300.0, -300.0)[:, None]
        self.check(replace(problem, query=problem.query + 300, keys=problem.keys + side).to(torch.float32))

    def test_temperature_can_differ_by_query(self) -> None:
        problem = Problem.random()
        self.check(replace(problem, temperature=torch.linspace(0.1, 3, 5)).to(torch.float32))

    def test_cosine_score_of_a_zero_vector_is_0(self) -> None:
        problem = Problem.random(rows=9, metric="cosine")
        keys = problem.keys.detach().clone()
        keys[4] = 0
        problem = replace(problem, keys=keys)
        read, _ = self.read(problem.to(torch.float32))
        answer = problem.to(torch.float64).answer()
        assert answer.scores[0, 4] == 0
        assert largest_error(read.values, answer.values) < 1e-5

    # -- filters ---------------------------------------------------------------------------------------------

    def test_a_hidden_row_has_no_weight_and_no_gradient(self) -> None:
        problem = Problem.random(rows=200)
        visible = torch.rand(5, 200, generator=torch.Generator().manual_seed(3)) < 0.4
        visible[:, 17] = False
        problem = replace(problem, visible=visible)
        self.check(problem)
        read, leaves = self.read(problem)
        for name in ("keys", "values"):
            if name in self.gradients:
                (grad,) = torch.autograd.grad(read.values.sum(), leaves[name], retain_graph=True)
                assert (grad.to_dense()[17] == 0).all()

    def test_hiding_rows_equals_deleting_them(self) -> None:
        problem = Problem.random(rows=90)
        kept = torch.rand(90, generator=torch.Generator().manual_seed(4)) < 0.5
        hidden, _ = self.read(replace(problem, visible=kept.expand(5, 90)))
        deleted, _ = self.read(replace(problem, keys=problem.keys[kept], values=problem.values[kept]))
        assert allclose(hidden.values, deleted.values, atol=1e-6)
        assert allclose(hidden.lse, deleted.lse, atol=1e-5)

    def test_a_query_that_sees_nothing_gets_zeros(self) -> None:
        visible = torch.ones(5, 123, dtype=torch.bool)
        visible[2] = False
        problem = replace(Problem.random(), visible=visible)
        self.check(problem)
        read, leaves = self.read(problem)
        assert (read.values[2] == 0).all()
        assert read.lse[2] == -math.inf
        assert read.mass[2] == 0
        assert read.mass[3] > 0
        (read.values.sum() + read.lse[[0, 1, 3, 4]].sum() + read.mass.sum()).backward()
        for name in self.gradients:
            grad = leaves[name].grad
            assert grad is None or grad.to_dense().isfinite().all()

    def test_reads_without_any_visible_row_are_zero(self) -> None:
        problem = replace(Problem.random(), visible=torch.zeros(5, 123, dtype=torch.bool))
        read, leaves = self.read(problem)
        assert (read.values == 0).all()
        assert (read.lse == -math.inf).all()
        assert (read.mass == 0).all()
        read.values.sum().backward()
        for name in self.gradients:
            grad = leaves[name].grad
            assert grad is None or (grad.to_dense() == 0).all()

    # -- empty reads -----------------------------------------------------------------------------------------

    def test_a_read_of_no_rows_is_zero(self) -> None:
        problem = Problem.random(rows=0)
        read, _ = self.read(problem)
        assert read.values.shape == (5, 3)
        assert (read.values == 0).all()
        assert (read.lse == -math.inf).all()
        assert (read.mass == 0).all()
        read.values.sum().backward()

    def test_a_read_without_queries_is_empty(self) -> None:
        problem = Problem.random(queries=0)
        read, _ = self.read(problem)
        assert read.values.shape == (0, 3)
        assert read.lse.shape == (0,)
        if read.values.requires_grad:
            read.values.sum().backward()

    # -- numbers ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_dtypes_are_read_in_float32(self, dtype: torch.dtype) -> None:
        problem = Problem.random(rows=300, key_dim=32).to(dtype)
        read, _ = self.read(problem)
        assert read.values.dtype == dtype
        assert read.lse.dtype == torch.float32
        answer = problem.to(torch.float64).answer()
        step = torch.finfo(dtype).eps
        assert largest_error(read.lse, answer.lse) < 1e-4
        assert largest_error(read.values, answer.values) < step

    def test_scores_that_overflow_float16(self) -> None:
        problem = Problem.random(rows=20, key_dim=64)
        big = replace(problem, query=torch.full((5, 64), 300.0), keys=torch.full((20, 64), 300.0)).to(torch.float16)
        read, _ = self.read(big)
        mean = problem.values.mean(0).expand(5, 3)
        assert allclose(read.values.float(), mean, atol=1e-3)

    def test_autocast_changes_only_the_dtype_of_values(self) -> None:
        problem = Problem.random(rows=300, key_dim=32)
        plain, _ = self.read(problem)
        with torch.autocast(problem.query.device.type, dtype=torch.bfloat16):
            read, leaves = self.read(problem)
            read.values.float().sum().backward()
        assert read.values.dtype == torch.bfloat16
        assert read.lse.dtype == torch.float32
        assert allclose(read.lse, plain.lse, atol=1e-6)
        assert allclose(read.values.float(), plain.values, atol=1e-2)
        assert leaves["query"].grad is not None
        assert leaves["query"].grad.dtype == torch.float32


@pytest.mark.cpu_only
class TiledReadContract(ReadContract):
    """Contract with fewer shapes and scales, for subclasses that repeat it with several tilings of the CPU.

    Of three shapes, one fits into a tile of rows and two are divided; scores of the smaller scale need no shift.
    """

    @pytest.mark.parametrize(("key_dim", "rows"), [(33, 7), (3, 123), (1, 507)])
    @pytest.mark.parametrize("metric", METRICS)
    def test_agrees_for_odd_shapes(self, metric: str, key_dim: int, rows: int) -> None:
        super().test_agrees_for_odd_shapes(metric, key_dim, rows)

    @pytest.mark.parametrize("scale", [1e-5, 1e4])
    @pytest.mark.parametrize("metric", METRICS)
    def test_agrees_for_every_score_scale(self, metric: str, scale: float) -> None:
        super().test_agrees_for_every_score_scale(metric, scale)
