"""Tests that hidden rows have no effect: a read equals the read of a table without them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.contract import DISPATCH, METRICS, Problem, force_dispatch, rotate
from support.tolerances import assert_close
from torch import Tensor

import softdb
from softdb import SoftKVStore
from softdb.functional import Read, soft_read
from softdb.scoring.normalizers import NORMALIZERS, is_random

pytestmark = pytest.mark.each_device

ROWS, INVALID_ROWS = 40, (3, 17, 39)


def make_problem(metric: str, rows: int = ROWS) -> Problem:
    return Problem.random(rows=rows, metric=metric, seed=2).to(torch.float64)


def with_invalid_rows(table: Tensor, invalid: float, rows: tuple[int, ...] = INVALID_ROWS) -> Tensor:
    """Return a copy of ``table`` as a leaf, with some rows that are not finite in all or some columns."""
    changed = table.detach().clone()
    for place, row in enumerate(rows):
        changed[row, place % table.shape[1] :] = invalid
    return changed.requires_grad_()


def visible_rows() -> Tensor:
    shown = torch.ones(ROWS, dtype=torch.bool)
    shown[[*INVALID_ROWS, 5, 9]] = False
    return shown


def collect_results(read: Read, leaves: list[Tensor], queries: Tensor | None = None) -> list[Tensor]:
    """Return all members of a read for some queries and the gradients of a weighted sum; assert that none is NaN."""
    members = [read.values, read.lse] + [x for x in (read.weights, read.scores) if x is not None]
    members += [] if read.mass.isnan().any() else [read.mass]
    chosen = [
        member if queries is None else member[..., queries, :] if member.dim() > 1 else member[queries]
        for member in members
    ]
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=torch.float64)
    for member in chosen:
        if member.requires_grad:
            weigh = torch.randn(member.shape, generator=generator, dtype=torch.float64)
            loss = loss + (member.masked_fill(member == -math.inf, 0.0) * weigh).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    dense = [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(leaves, grads, strict=True)]
    result = [member.detach() for member in chosen] + dense
    assert not any(tensor.isnan().any() for tensor in result)
    return result


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-10)


class Case:
    """Rows of a problem, some of which are not finite, and the options of a read of the visible ones."""

    def __init__(self, metric: str, read_options: dict[str, Any], where: str, keys: float, values: float) -> None:
        self.problem, self.read_options, self.where, self.metric = (
            make_problem(metric),
            read_options,
            where,
            metric,
        )
        self.keys = with_invalid_rows(self.problem.keys, keys)
        self.values = with_invalid_rows(self.problem.values, values)
        self.temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def store(self, keys: Tensor, values: Tensor) -> SoftKVStore:
        """Make a trainable store with these rows, as diverged training may leave them."""
        store = SoftKVStore(8, 3, metric=self.metric, trainable=True, sparse_grad=False, dtype=torch.float64)
        store.add(torch.zeros(len(keys), 8), torch.zeros(len(keys), 3))
        with torch.no_grad():
            store.keys.copy_(keys)
            store.values.copy_(values)
        return store

    def read(self, keys: Tensor, values: Tensor, options: dict[str, Any]) -> tuple[Read, list[Tensor]]:
        store = self.store(keys, values)
        if self.is_random:
            options["generator"] = torch.Generator().manual_seed(3)
        if "free" in options:
            store.delete(options.pop("free"))
            with torch.no_grad():  # an optimizer with momentum may write to free slots
                store.keys[~visible_rows()] = math.nan
                store.values[~visible_rows()] = math.nan
        read = store.read(self.problem.query, temperature=self.temperature, **self.read_options, **options)
        return read, [self.problem.query, self.temperature, store.keys, store.values]

    @property
    def is_random(self) -> bool:
        """Whether the read draws random numbers that depend on the slots."""
        return (
            is_random(self.read_options.get("normalizer", "softmax"))
            or self.read_options.get("tail_samples", ROWS) < ROWS
        )

    def options(self) -> dict[str, Any]:
        shown = visible_rows()
        return {
            "mask": lambda: {"where": shown},
            "ids": lambda: {"where": shown.nonzero().squeeze(-1)},
            "callable": lambda: {"where": lambda row: shown[row["id"]]},
            "callable a query": lambda: {"where": lambda row: shown[row["id"]].expand(5, *row["id"].shape[-1:])},
            "exclude": lambda: {"exclude": (~shown).nonzero().squeeze(-1).expand(5, -1)},
            "free slots": lambda: {"free": (~shown).nonzero().squeeze(-1)},
        }[self.where]()

    def check(self) -> None:
        actual = collect_results(*self.read(self.keys, self.values, self.options()))
        finite = self.read(self.problem.keys, self.problem.values, self.options())
        expected = collect_results(*finite)
        assert_same(actual, expected)
        for gradient in actual[-2:]:
            assert (gradient[list(INVALID_ROWS)] == 0).all()
        if self.is_random:
            return
        shown = visible_rows()
        read, leaves = self.read(self.problem.keys[shown], self.problem.values[shown], {})
        without = collect_results(read, leaves)
        assert_same(actual[:-2], without[:-2])
        assert_same([gradient[shown] for gradient in actual[-2:]], without[-2:])
        if self.read_options == {}:
            answer = reference.read(
                self.problem.query,
                self.problem.keys[shown],
                self.problem.values[shown],
                metric=self.metric,
                temperature=self.temperature,
            )
            assert_same(actual[:2], [answer.values.detach(), answer.lse.detach()])


FILTER_KINDS = ["mask", "ids", "callable", "callable a query", "exclude", "free slots"]
READ_OPTIONS: list[dict[str, Any]] = [
    *({"normalizer": name, **k} for name in NORMALIZERS for k in ({}, {"k": 4})),
    {},
    {"mode": "topk", "k": 4},
    {"mode": "topk", "k": 4, "normalizer": "sparsemax"},
    {"mode": "hard"},
    {"mode": "topk", "k": 4, "tail_samples": ROWS},
    {"mode": "topk", "k": 4, "tail_samples": 20},
    {"mode": "topk", "tolerance": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "where", "read_options"), rotate(METRICS, FILTER_KINDS, READ_OPTIONS), ids=str)
def test_hidden_rows_of_a_store_have_no_effect(metric: str, where: str, read_options: dict[str, Any]) -> None:
    for keys, values in ((math.nan, math.nan), (math.inf, 1.0), (1.0, -math.inf)):
        Case(metric, read_options, where, keys, values).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "where", "dispatch"), rotate(["scaled_dot", "l2"], FILTER_KINDS, list(DISPATCH)), ids=str
)
def test_hidden_rows_have_no_effect_in_tiles(
    metric: str, where: str, dispatch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_dispatch(dispatch, monkeypatch)
    for read_options in ({}, {"k": 4, "normalizer": "straight_through"}, {"normalizer": "sparsemax"}):
        Case(metric, read_options, where, math.nan, math.inf).check()


# -- hidden from some queries only -----------------------------------------------------------------------

# Which of five queries see the rows that are not finite.
SEES_INVALID_ROWS = torch.tensor([False, True, False, False, True])


def make_filter(kind: str, store: SoftKVStore) -> dict[str, Any]:
    """Make a filter with which only some queries see the invalid rows."""
    invalid = torch.zeros(ROWS, dtype=torch.bool)
    invalid[list(INVALID_ROWS)] = True
    if kind == "callable":
        return {"where": lambda row: ~invalid[row["id"]] | SEES_INVALID_ROWS[:, None]}
    return {"exclude": torch.where(SEES_INVALID_ROWS[:, None], -1, torch.tensor(INVALID_ROWS))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "read_options", "kind", "dispatch"),
    rotate(
        METRICS,
        [*({"normalizer": name} for name in NORMALIZERS), {"k": 4}, {"mode": "topk", "k": 4, "tail_samples": ROWS}],
        ["callable", "exclude"],
        [None, "small tiles, rows first", "two partitions"],
    ),
    ids=str,
)
def test_values_hidden_from_some_queries_do_not_affect_them(
    metric: str, read_options: dict[str, Any], kind: str, dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    case = Case(metric, read_options, "", 1.0, math.nan)
    others = (~SEES_INVALID_ROWS).nonzero().squeeze(-1)
    results = []
    for values in (case.values, case.problem.values):
        store = case.store(case.problem.keys, values)
        read, leaves = case.read(case.problem.keys, values, make_filter(kind, store))
        if "mode" in read_options:  # gradients of keys and values sum over all queries: check the query's only
            (gradient,) = torch.autograd.grad(read.values[others].sum(), leaves[0])
            results.append([read.values[others].detach(), read.lse[others].detach(), gradient[others]])
        else:
            results.append(collect_results(read, leaves, others))
    assert_same(*results)


@pytest.mark.cpu_only
@pytest.mark.parametrize("read_options", [{}, {"normalizer": "straight_through"}], ids=str)
def test_a_query_that_sees_nan_gets_nan_and_so_does_its_gradient(read_options: dict[str, Any]) -> None:
    case = Case("scaled_dot", read_options, "", 1.0, math.nan)
    store = case.store(case.problem.keys, case.values)
    read, (query, *_) = case.read(case.problem.keys, case.values, make_filter("callable", store))
    if not read_options:
        assert (read.values.isnan().any(-1) == SEES_INVALID_ROWS).all()
        assert not read.values[:, 0].isnan().all()
    (gradient,) = torch.autograd.grad(read.values.nansum() if read_options else read.values[:, -1].sum(), query)
    assert (gradient.isnan().any(-1) == SEES_INVALID_ROWS).all()


@pytest.mark.cpu_only
def test_an_invalid_key_that_some_query_sees_raises() -> None:
    case = Case("scaled_dot", {}, "", math.nan, math.nan)
    store = case.store(case.keys, case.problem.values)
    with pytest.raises(softdb.NonFiniteError, match="query, keys, temperature: expected finite scores"):
        store.read(case.problem.query, **make_filter("callable", store))
    mask = torch.ones(5, ROWS, dtype=torch.bool)
    mask[:, list(INVALID_ROWS)] = SEES_INVALID_ROWS[:, None]
    with pytest.raises(softdb.NonFiniteError, match="keys: expected finite numbers"):
        soft_read(case.problem.query, case.keys, case.problem.values, mask=mask)
    for table, name in ((case.values, "values"), (case.keys, "keys")):
        tables = {"keys": case.problem.keys, "values": case.problem.values} | {name: table}
        with pytest.raises(softdb.NonFiniteError, match=f"{name}: expected finite numbers"):
            soft_read(case.problem.query, **tables)


# -- soft_read ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "k", "normalizer", "dispatch"),
    rotate(METRICS, [None, 3], list(NORMALIZERS), [None, "small tiles, rows first", "three partitions, rows first"]),
    ids=str,
)
def test_rows_hidden_by_a_mask_have_no_effect(
    metric: str, k: int | None, normalizer: str, dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    case = Case(metric, {}, "", math.nan, math.inf)
    shown = visible_rows()
    several = torch.rand(5, ROWS, generator=torch.Generator().manual_seed(1)) < 0.7
    several[:, list(INVALID_ROWS)] = False
    for mask in (shown, shown[None], several):
        results = []
        for keys, values in ((case.keys, case.values), (case.problem.keys, case.problem.values)):
            leaves = [case.problem.query, case.temperature, keys, values]
            read = soft_read(
                case.problem.query,
                keys,
                values,
                metric=metric,  # type: ignore[arg-type]
                temperature=case.temperature,
                mask=mask,
                k=k,
                normalizer=normalizer,
                generator=torch.Generator().manual_seed(3) if is_random(normalizer) else None,
            )
            results.append(collect_results(read, leaves))
        assert_same(*results)


@pytest.mark.parametrize("shape", [(1, ROWS), (5, ROWS), (2, 1, 5, ROWS), (2, 3, 5, ROWS), (3, 1, ROWS)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_rows_hidden_by_a_mask_have_no_effect_in_batches(shape: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    batch = (2, 1) if shared else (2, 3)
    finite = [torch.randn(*batch, ROWS, width, dtype=torch.float64, requires_grad=True) for width in (8, 3)]
    mask = torch.rand(shape) < 0.8
    mask[..., list(INVALID_ROWS)] = False
    invalid = [table.detach().clone() for table in finite]
    for table in invalid:
        table[..., list(INVALID_ROWS), 1:] = math.nan
        table.requires_grad_()
    results = []
    for keys, values in (invalid, finite):
        read = soft_read(query, keys, values, mask=mask, k=3)
        loss = read.values.square().sum() + read.lse.sum() + read.scores.exp().sum()
        results.append([read.values.detach(), read.lse.detach(), *torch.autograd.grad(loss, [query, keys, values])])
    assert_same(*results)
    # Each group has its own invalid rows, which other groups may see.
    if not shared and len(shape) == 4 and shape[1] == 3:
        mask = torch.ones(2, 3, 1, ROWS, dtype=torch.bool)
        keys, values = (table.detach().clone() for table in finite)
        for group in range(3):
            keys[:, group, group] = values[:, group, group] = math.nan
            mask[:, group, :, group] = False
        read = soft_read(query, keys.requires_grad_(), values.requires_grad_(), mask=mask)
        other = soft_read(query, *finite, mask=mask)
        assert_same(
            [read.values.detach(), *torch.autograd.grad(read.values.sum(), [query, keys, values])],
            [other.values.detach(), *torch.autograd.grad(other.values.sum(), [query, *finite])],
        )


def test_a_hidden_key_whose_square_overflows_has_no_effect() -> None:
    """The key is finite, but its l2 operand is not."""
    query = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    keys[2] = 1e200
    shown = torch.arange(6) != 2
    actual = soft_read(query, keys, values, metric="l2", mask=shown)
    expected = soft_read(query, keys[shown], values[shown], metric="l2")
    assert_same(collect_results(actual, [query]), collect_results(expected, [query]))


# -- cost ---------------------------------------------------------------------------------------


def test_norms_are_computed_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("scaled_dot", {}, "", math.nan, 1.0)
    store = case.store(case.keys, case.problem.values)
    norm_calls = 0
    norm = torch.linalg.vector_norm

    def counted(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal norm_calls
        norm_calls += x.shape == store.keys.shape
        return norm(x, *arguments, **options)

    with torch.no_grad():
        store.read(case.problem.query, where=visible_rows())
        monkeypatch.setattr(torch.linalg, "vector_norm", counted)
        store.read(case.problem.query, where=visible_rows())
    assert norm_calls == 0
    store.update(list(INVALID_ROWS), keys=torch.zeros(3, 8, dtype=torch.float64))
    store.read(case.problem.query)  # the norm of NaN is not cached
    assert math.isfinite(store._reader.largest_key_norm(store.rows, store.keys))
