"""A row that a query may not see takes no part, whatever it holds: the read is that without the row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.contract import DISPATCH, METRICS, Problem, force_dispatch
from torch import Tensor

import softdb
from softdb import SoftKVStore
from softdb.functional import Read, soft_read
from softdb.scoring.normalizers import NORMALIZERS, is_random

ROWS, BAD = 40, (3, 17, 39)


def problem_of(metric: str, rows: int = ROWS) -> Problem:
    return Problem.random(rows=rows, metric=metric, seed=2).to(torch.float64)


def spoilt(table: Tensor, bad: float, rows: tuple[int, ...] = BAD) -> Tensor:
    """A leaf like ``table`` with some rows that are not finite, or only partly so."""
    changed = table.detach().clone()
    for place, row in enumerate(rows):
        changed[row, place % table.shape[1] :] = bad
    return changed.requires_grad_()


def visible_rows() -> Tensor:
    shown = torch.ones(ROWS, dtype=torch.bool)
    shown[[*BAD, 5, 9]] = False
    return shown


def outcome(read: Read, leaves: list[Tensor], queries: Tensor | None = None) -> list[Tensor]:
    """All that a user may look at of some queries, and the gradients of a weighted sum of it; no NaN."""
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


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


class Case:
    """The rows of a problem, some of which are not finite, and a way to read all that may be seen."""

    def __init__(self, metric: str, how: dict[str, Any], where: str, keys: float, values: float) -> None:
        self.problem, self.how, self.where, self.metric = problem_of(metric), how, where, metric
        self.keys = spoilt(self.problem.keys, keys)
        self.values = spoilt(self.problem.values, values)
        self.temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def store(self, keys: Tensor, values: Tensor) -> SoftKVStore:
        """A trainable store with these rows, as a training that diverged may have left them."""
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
            with torch.no_grad():  # an optimiser with momentum may write there
                store.keys[~visible_rows()] = math.nan
                store.values[~visible_rows()] = math.nan
        read = store.read(self.problem.query, temperature=self.temperature, **self.how, **options)
        return read, [self.problem.query, self.temperature, store.keys, store.values]

    @property
    def is_random(self) -> bool:
        """Whether numbers are drawn for rows by their slots."""
        return is_random(self.how.get("normalizer", "softmax")) or self.how.get("tail_samples", ROWS) < ROWS

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
        found = outcome(*self.read(self.keys, self.values, self.options()))
        finite = self.read(self.problem.keys, self.problem.values, self.options())
        wanted = outcome(*finite)
        assert_same(found, wanted)
        for gradient in found[-2:]:
            assert (gradient[list(BAD)] == 0).all()
        if self.is_random:
            return
        shown = visible_rows()
        read, leaves = self.read(self.problem.keys[shown], self.problem.values[shown], {})
        without = outcome(read, leaves)
        assert_same(found[:-2], without[:-2])
        assert_same([gradient[shown] for gradient in found[-2:]], without[-2:])
        if self.how == {}:
            answer = reference.read(
                self.problem.query,
                self.problem.keys[shown],
                self.problem.values[shown],
                metric=self.metric,
                temperature=self.temperature,
            )
            assert_same(found[:2], [answer.values.detach(), answer.lse.detach()])


WHERES = ["mask", "ids", "callable", "callable a query", "exclude", "free slots"]
HOWS: list[dict[str, Any]] = [
    *({"normalizer": name, **k} for name in NORMALIZERS for k in ({}, {"k": 4})),
    {},
    {"mode": "topk", "k": 4},
    {"mode": "topk", "k": 4, "normalizer": "sparsemax"},
    {"mode": "hard"},
    {"mode": "topk", "k": 4, "tail_samples": ROWS},
    {"mode": "topk", "k": 4, "tail_samples": 20},
    {"mode": "topk", "tolerance": 0.1},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("metric", METRICS)
def test_hidden_rows_of_a_store(metric: str, where: str, how: dict[str, Any]) -> None:
    for keys, values in ((math.nan, math.nan), (math.inf, 1.0), (1.0, -math.inf)):
        Case(metric, how, where, keys, values).check()


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("metric", ["scaled_dot", "l2"])
def test_hidden_rows_in_blocks(metric: str, where: str, dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_dispatch(dispatch, monkeypatch)
    for how in ({}, {"k": 4, "normalizer": "straight_through"}, {"normalizer": "sparsemax"}):
        Case(metric, how, where, math.nan, math.inf).check()


# -- hidden from some queries only -----------------------------------------------------------------------

SEES = torch.tensor([False, True, False, False, True])  # which of five queries sees the rows that are not finite


def filter_of(kind: str, store: SoftKVStore) -> dict[str, Any]:
    """A filter by which only some queries see the bad rows."""
    bad = torch.zeros(ROWS, dtype=torch.bool)
    bad[list(BAD)] = True
    if kind == "callable":
        return {"where": lambda row: ~bad[row["id"]] | SEES[:, None]}
    return {"exclude": torch.where(SEES[:, None], -1, torch.tensor(BAD))}


@pytest.mark.parametrize("dispatch", [None, "small tiles, rows first", "two partitions"])
@pytest.mark.parametrize("kind", ["callable", "exclude"])
@pytest.mark.parametrize(
    "how",
    [*({"normalizer": name} for name in NORMALIZERS), {"k": 4}, {"mode": "topk", "k": 4, "tail_samples": ROWS}],
    ids=str,
)
@pytest.mark.parametrize("metric", METRICS)
def test_values_hidden_from_some_queries(
    metric: str, how: dict[str, Any], kind: str, dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    case = Case(metric, how, "", 1.0, math.nan)
    others = (~SEES).nonzero().squeeze(-1)
    results = []
    for values in (case.values, case.problem.values):
        store = case.store(case.problem.keys, values)
        read, leaves = case.read(case.problem.keys, values, filter_of(kind, store))
        if "mode" in how:  # whose candidates' graph is that of a top-k read: only the query's gradient is not summed up
            (gradient,) = torch.autograd.grad(read.values[others].sum(), leaves[0])
            results.append([read.values[others].detach(), read.lse[others].detach(), gradient[others]])
        else:
            results.append(outcome(read, leaves, others))
    assert_same(*results)


@pytest.mark.parametrize("how", [{}, {"normalizer": "straight_through"}], ids=str)
def test_a_query_that_sees_nan_gets_nan_and_so_does_its_gradient(how: dict[str, Any]) -> None:
    case = Case("scaled_dot", how, "", 1.0, math.nan)
    store = case.store(case.problem.keys, case.values)
    read, (query, *_) = case.read(case.problem.keys, case.values, filter_of("callable", store))
    if not how:
        assert (read.values.isnan().any(-1) == SEES).all()
        assert not read.values[:, 0].isnan().all()
    (gradient,) = torch.autograd.grad(read.values.nansum() if how else read.values[:, -1].sum(), query)
    assert (gradient.isnan().any(-1) == SEES).all()


def test_a_key_that_some_query_sees_is_an_error() -> None:
    case = Case("scaled_dot", {}, "", math.nan, math.nan)
    store = case.store(case.keys, case.problem.values)
    with pytest.raises(softdb.NonFiniteError, match="query, keys, temperature: expected finite scores"):
        store.read(case.problem.query, **filter_of("callable", store))
    mask = torch.ones(5, ROWS, dtype=torch.bool)
    mask[:, list(BAD)] = SEES[:, None]
    with pytest.raises(softdb.NonFiniteError, match="keys: expected finite numbers"):
        soft_read(case.problem.query, case.keys, case.problem.values, mask=mask)
    for table, name in ((case.values, "values"), (case.keys, "keys")):
        tables = {"keys": case.problem.keys, "values": case.problem.values} | {name: table}
        with pytest.raises(softdb.NonFiniteError, match=f"{name}: expected finite numbers"):
            soft_read(case.problem.query, **tables)


# -- of tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", [None, "small tiles, rows first", "three partitions, rows first"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_a_mask_hides(
    metric: str, k: int | None, normalizer: str, dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    case = Case(metric, {}, "", math.nan, math.inf)
    shown = visible_rows()
    several = torch.rand(5, ROWS, generator=torch.Generator().manual_seed(1)) < 0.7
    several[:, list(BAD)] = False
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
            results.append(outcome(read, leaves))
        assert_same(*results)


@pytest.mark.parametrize("shape", [(1, ROWS), (5, ROWS), (2, 1, 5, ROWS), (2, 3, 5, ROWS), (3, 1, ROWS)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_a_mask_hides_in_batches(shape: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    batch = (2, 1) if shared else (2, 3)
    finite = [torch.randn(*batch, ROWS, width, dtype=torch.float64, requires_grad=True) for width in (8, 3)]
    mask = torch.rand(shape) < 0.8
    mask[..., list(BAD)] = False
    bad = [table.detach().clone() for table in finite]
    for table in bad:
        table[..., list(BAD), 1:] = math.nan
        table.requires_grad_()
    results = []
    for keys, values in (bad, finite):
        read = soft_read(query, keys, values, mask=mask, k=3)
        loss = read.values.square().sum() + read.lse.sum() + read.scores.exp().sum()
        results.append([read.values.detach(), read.lse.detach(), *torch.autograd.grad(loss, [query, keys, values])])
    assert_same(*results)
    # Each group has bad rows of its own, which the others may see.
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


def test_a_key_whose_square_overflows() -> None:
    """Finite, but not what l2 makes of it."""
    query = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    keys[2] = 1e200
    shown = torch.arange(6) != 2
    found = soft_read(query, keys, values, metric="l2", mask=shown)
    wanted = soft_read(query, keys[shown], values[shown], metric="l2")
    assert_same(outcome(found, [query]), outcome(wanted, [query]))


# -- what it costs ---------------------------------------------------------------------------------------


def test_a_store_looks_at_norms_once_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("scaled_dot", {}, "", math.nan, 1.0)
    store = case.store(case.keys, case.problem.values)
    looks = 0
    norm = torch.linalg.vector_norm

    def counted(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal looks
        looks += x.shape == store.keys.shape
        return norm(x, *arguments, **options)

    with torch.no_grad():
        store.read(case.problem.query, where=visible_rows())
        monkeypatch.setattr(torch.linalg, "vector_norm", counted)
        store.read(case.problem.query, where=visible_rows())
    assert looks == 0
    store.update(list(BAD), keys=torch.zeros(3, 8, dtype=torch.float64))
    store.read(case.problem.query)  # it has forgotten the NaN
    assert math.isfinite(store._reader.largest_key_norm(store.rows, store.keys))
