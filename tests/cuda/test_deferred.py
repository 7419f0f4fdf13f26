"""Reads whose checks are deferred, as on a GPU; here the CPU runs them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference

from softdb import SoftKVStore
from softdb.errors import ArgumentError, NonFiniteError
from softdb.index.recent_queries import RecentQueries
from softdb.kernels.gather import GatherIndex, gather_rows
from softdb.pending_checks import PendingChecks, defer_checks
from softdb.table.eviction import mark_used
from softdb.table.usage import count_reads, new_counters

ROWS = 300


@pytest.fixture
def deferred() -> Iterator[None]:
    """Defer the checks of tensors on the CPU."""
    with defer_checks("cpu"):
        yield


def make_store(**options: Any) -> SoftKVStore:
    torch.manual_seed(0)
    store = SoftKVStore(8, 5, dtype=torch.float64, **options)
    keys = torch.randn(ROWS, 8, dtype=torch.float64)
    keys[7] = keys[4]  # a tie
    store.add(keys, torch.randn(ROWS, 5, dtype=torch.float64))
    return store


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "row-sparse"])
@pytest.mark.parametrize(("deleted", "metric"), [(0, "scaled_dot"), (20, "l2"), (200, "cosine")])
@pytest.mark.parametrize("is_masked", [False, True], ids=["all rows", "mask"])
@pytest.mark.parametrize(("mode", "k"), [("exact", None), ("exact", 4), ("topk", 4), ("topk", 400), ("hard", None)])
def test_results_are_those_of_the_definition(
    mode: str, k: int | None, is_masked: bool, deleted: int, sparse_grad: bool, metric: str
) -> None:
    store = make_store(trainable=True, sparse_grad=sparse_grad, metric=metric)
    keys, values = store.keys.detach().clone(), store.values.detach().clone()
    store.delete(store.ids[:deleted])
    where = torch.rand(len(store)) < 0.6 if is_masked else None
    visible = torch.zeros(ROWS, dtype=torch.bool)
    visible[store.ids] = True if where is None else where
    query = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    query.data[0] = keys[7]
    read = store.read(query, mode, k=k, where=where)  # type: ignore[arg-type]
    weight = torch.randn(6, 5, dtype=torch.float64)
    ((read.values * weight).sum() + (read.lse.sum() if mode != "hard" else 0)).backward()

    own_query, keys, values = query.detach().requires_grad_(), keys.requires_grad_(), values.requires_grad_()
    shown = visible.expand(6, -1)
    if mode != "exact":
        scores = reference.scores(own_query, keys, metric).detach().masked_fill(~visible, -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, : min(k or 1, int(visible.sum()))]
        shown = torch.zeros_like(shown).scatter(1, best, True)
    expected = reference.read(own_query, keys, values, metric=metric, visible=shown)
    if mode == "hard":
        (expected.values.detach() * 0 + values[best[:, 0]] * weight).sum().backward()
    else:
        ((expected.values * weight).sum() + expected.lse.sum()).backward()
        torch.testing.assert_close(query.grad, own_query.grad)
        torch.testing.assert_close(store.keys.grad.to_dense(), keys.grad)
    torch.testing.assert_close(read.values, expected.values)
    torch.testing.assert_close(read.lse, expected.lse)
    torch.testing.assert_close(store.values.grad.to_dense(), values.grad)
    if mode == "topk":
        count = best.shape[1]
        assert read.ids is not None
        assert torch.equal(read.ids[:, :count], best)
        assert bool((read.ids[:, count:] == -1).all())
        assert torch.equal(read.mass == 1, torch.full((6,), count < 4 or k == 400))


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"k": 3}, {"mode": "topk", "k": 3}], ids=["exact", "exact with k", "topk"])
@pytest.mark.parametrize("metric", ["scaled_dot", "cosine", "l2"])
def test_a_query_with_nan_gives_nan_for_that_query_only(metric: str, options: dict[str, Any], bad: float) -> None:
    store = make_store(metric=metric)
    query = torch.randn(4, 8, dtype=torch.float64)
    clean = store.read(query, **options)
    query[1, 2] = bad
    read = store.read(query, **options)
    others = [0, 2, 3]
    torch.testing.assert_close(read.values[others], clean.values[others])
    torch.testing.assert_close(read.lse[others], clean.lse[others])
    assert bool(read.values[1].isnan().all())
    assert bool(read.lse[1].isnan())
    if read.weights is not None and clean.weights is not None:
        torch.testing.assert_close(read.weights[others], clean.weights[others])
        assert bool(read.weights[1].isnan().all())
    with pytest.raises(NonFiniteError, match="query: expected finite numbers in each read since the last check"):
        store.check()
    store.check()  # raised once


@pytest.mark.usefixtures("deferred")
def test_the_next_write_save_and_index_stats_raise_the_pending_error(tmp_path: Path) -> None:
    store = make_store()
    bad = torch.full((1, 8), math.nan, dtype=torch.float64)
    row = torch.ones(1, 8, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    calls = (
        lambda: store.add(*row),
        lambda: store.put([3], *row),
        lambda: store.update([3], keys=row[0]),
        lambda: store.delete([3]),
        lambda: store.save(tmp_path / "saved"),
        store.index_stats,
    )
    before = store.keys.clone()
    for call in calls:
        store.read(bad)
        with pytest.raises(NonFiniteError, match=r"^query: "):
            call()
        assert len(store) == ROWS
        assert torch.equal(store.keys, before)
    assert not (tmp_path / "saved").exists()
    store.save(tmp_path / "saved")  # the error was raised once
    assert len(store.add(*row)) == 1


@pytest.mark.usefixtures("deferred")
def test_scores_temperatures_and_biases_are_checked_later() -> None:
    store = make_store()
    query = torch.randn(2, 8, dtype=torch.float64)
    store.read(query * 1e300, temperature=1e-300)
    with pytest.raises(NonFiniteError, match="expected finite scores in each read"):
        store.check()
    for bad in (0.0, -1.0, math.inf, math.nan):
        store.read(query, temperature=torch.tensor([1.0, bad], dtype=torch.float64))
        with pytest.raises(ArgumentError, match="temperature: expected finite numbers above 0"):
            store.check()
    store.read(query, temperature=torch.tensor([1e-9, 1e9], dtype=torch.float64))
    bias = torch.zeros(ROWS, dtype=torch.float64)
    store.read(query, bias=bias.index_fill(0, torch.tensor(3), -math.inf))
    store.check()
    store.read(query, bias=bias.index_fill(0, torch.tensor(3), math.nan))
    with pytest.raises(NonFiniteError, match="bias: expected finite numbers, or -inf"):
        store.check()
    store.read(query)
    store.check()


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("rows", [40, ROWS])
def test_nan_in_rows_that_a_mask_hides_has_no_effect(rows: int) -> None:
    store = SoftKVStore(8, 5, trainable=True)
    store.add(torch.randn(rows, 8), torch.randn(rows, 5))
    query = torch.randn(4, 8, requires_grad=True)
    where = torch.ones(rows, dtype=torch.bool)
    where[[3, 9]] = False
    expected = store.read(query, where=where)
    expected.values.square().sum().backward()
    assert query.grad is not None
    wanted, query.grad = query.grad, None
    with torch.no_grad():
        store.keys[3], store.values[9] = math.nan, math.inf
    read = store.read(query, where=where)
    read.values.square().sum().backward()
    torch.testing.assert_close(read.values, expected.values)
    torch.testing.assert_close(query.grad, wanted)
    store.check()


@pytest.mark.usefixtures("deferred")
def test_pending_checks_belong_to_one_store() -> None:
    store = make_store()
    store.read(torch.full((8,), math.nan, dtype=torch.float64))
    copy.deepcopy(store).check()
    with pytest.raises(NonFiniteError):
        store.check()


def test_checks_of_the_cpu_are_not_deferred() -> None:
    store = make_store()
    with pytest.raises(NonFiniteError, match=r"query: expected finite numbers in torch\.float64, got 8 NaN"):
        store.read(torch.full((8,), math.nan, dtype=torch.float64))
    store.check()


def test_flags_hold_failures_until_they_are_raised() -> None:
    checks, cpu = PendingChecks(), torch.device("cpu")
    checks.raise_failed()  # nothing has been checked
    checks.check_finite("query", torch.tensor([1.0, -3.0]))
    checks.check_below_infinity("scores", torch.tensor([-math.inf, 2.0]))
    checks.check_finite("bias", torch.empty(0))
    checks.raise_failed()
    flag = checks.flag("gradient", cpu)
    flag.fill_(math.inf)  # as a kernel does
    checks.check_finite("scores", torch.tensor([math.nan]))
    with pytest.raises(NonFiniteError, match=r"^query, keys, temperature: "):
        checks.raise_failed()
    assert flag == 0  # the memory of the flag stays the same
    flag.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"^gradient: "):
        checks.raise_failed()
    checks.check_below_infinity("scores", torch.tensor([0.0, math.inf]))
    with pytest.raises(NonFiniteError, match=r"^query, keys, temperature: "):
        checks.raise_failed()


@pytest.mark.parametrize("slots", [[[3, 1], [-1, -1], [3, -1]], [[-1, -1]], []])
def test_usage_is_counted_as_on_the_cpu(slots: list[list[int]]) -> None:
    places = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)
    weights = torch.rand(places.shape)
    results = []
    for context in (nullcontext(), defer_checks("cpu")):
        with context:
            (reads, weight), readings = new_counters(5), torch.arange(5)
            count_reads(reads, weight, places, weights, has_padding=True)
            mark_used(readings, places, 9)
        results.append((reads, weight, readings))
    for own, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(own, expected)


@pytest.mark.usefixtures("deferred")
def test_a_query_with_nan_is_not_counted() -> None:
    store = make_store(track_usage=True)
    store.read(torch.full((2, 8), math.nan, dtype=torch.float64), mode="topk", k=3)
    assert int(store.usage.reads.sum()) == 0
    assert float(store.usage.weight.sum()) == 0


@pytest.mark.usefixtures("deferred")
def test_an_index_is_not_tuned_with_a_query_with_nan() -> None:
    queries, recent = torch.randn(10, 4), RecentQueries()
    bad = queries.clone()
    bad[3, 1] = math.nan
    recent.record(bad, 5)
    assert recent.latest is not None
    assert torch.equal(recent.latest, queries[[0, 1, 2, 4, 5, 6, 7, 8, 9]])


@pytest.mark.usefixtures("deferred")
def test_gradients_of_gathered_rows_name_only_rows_that_were_gathered() -> None:
    table = torch.randn(6, 3, requires_grad=True)
    index = torch.tensor([[4, -1], [2, 4]])
    upstream = torch.randn(2, 2, 3)
    gather_rows(table, GatherIndex(index), torch.float32, sparse=True).backward(upstream)
    gradient = table.grad
    assert gradient is not None
    assert not gradient.is_coalesced()
    assert set(gradient._indices()[0].tolist()) == {2, 4}
    expected = torch.zeros(6, 3)
    expected[4] = upstream[0, 0] + upstream[1, 1]
    expected[2] = upstream[1, 0]
    torch.testing.assert_close(gradient.to_dense(), expected)


@pytest.mark.usefixtures("deferred")
def test_live_slots_are_found_without_the_device() -> None:
    store = make_store()
    store.delete(store.ids[::3])
    assert torch.equal(store.rows.live_slots(), (store.rows.ids[:ROWS] >= 0).nonzero().squeeze(-1))
