"""Test writes between a read and its backward: an error exactly if they change a row that the read used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.contract import Problem
from torch import Tensor

import softdb
from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam

MODES = [("exact", {}), ("exact", {"k": 4}), ("topk", {"k": 4}), ("hard", {})]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def store_of(problem: Problem, **options: Any) -> SoftKVStore:
    """Create a store of the rows of a problem, with their positions as ids."""
    store = SoftKVStore(
        problem.keys.shape[1], problem.values.shape[1], metric=problem.metric, dtype=problem.keys.dtype, **options
    )
    store.add(problem.keys, problem.values)
    return store


def make_trainable_store(*, sparse_grad: bool = True) -> SoftKVStore:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(8, 4, trainable=True, sparse_grad=sparse_grad, index=IndexConfig("IVF8,Flat", recall=1.0))
    store.add(torch.randn(300, 8, generator=generator), torch.randn(300, 4, generator=generator))
    return store


def make_queries(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


# -- writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("mode", "how"), MODES, ids=str)
def test_appending_between_read_and_backward_gives_right_gradients(mode: str, how: dict, trainable: bool) -> None:  # type: ignore[type-arg]
    problem = Problem.random(rows=30)

    def gradients(append: bool) -> list[Tensor]:
        store = store_of(problem, trainable=trainable)
        store.delete([3, 4])
        store.reserve(40)
        problem.query.grad = None
        read = store.read(problem.query, mode, **how)
        if append:
            store.add(100 * torch.randn(8, 8), torch.randn(8, 3))  # fills the holes 3 and 4 first
        (read.values.sum() + read.lse.sum()).backward()
        tables = [store.keys.grad.to_dense(), store.values.grad.to_dense()] if trainable else []
        return [problem.query.grad.clone(), *tables]

    for mine, wanted in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(mine, wanted)


CHANGES = {
    "update": lambda s, slot: s.update([slot], keys=torch.zeros(1, 8)),
    "put": lambda s, slot: s.put([slot], torch.zeros(1, 8), torch.zeros(1, 3)),
    "delete": lambda s, slot: s.delete([slot]),
    "touch": lambda s, slot: s.touch([slot]),
    "optimizer": lambda s, slot: step(s),
    "load": lambda s, slot: s.load_state_dict(copy.deepcopy(s.state_dict())),
}


def step(store: SoftKVStore) -> None:
    for table in (store.keys, store.values):
        table.grad = torch.ones_like(table)
    torch.optim.SGD(store.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(("mode", "how"), MODES, ids=str)
def test_changing_a_row_that_was_read_is_an_error_in_backward(mode, how, trainable: bool, change: str) -> None:  # type: ignore[no-untyped-def]
    if change == "optimizer" and not trainable:
        return
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=trainable)
    read = store.read(problem.query, mode, **how)
    used = 0 if read.ids is None else int(read.ids[0, 0])
    CHANGES[change](store, used)
    with pytest.raises(softdb.StaleReadError, match=r"call backward\(\) before writing"):
        read.values.sum().backward()


def test_changing_a_row_that_was_not_read_is_fine() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True, sparse_grad=True)
    read = store.read(problem.query, "topk", k=3)
    filtered = store.read(problem.query, where=store.ids < 20)
    unread = sorted(set(range(20, 30)) - set(read.ids.flatten().tolist()))
    store.update(unread, keys=torch.zeros(len(unread), 8))
    (read.values.sum() + filtered.values.sum()).backward()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("evict", ["lru", "oldest"])
def test_backward_raises_after_a_row_that_was_read_is_evicted(evict: str, trainable: bool) -> None:
    store = SoftKVStore(2, 1, capacity=4, evict=evict, trainable=trainable)
    store.add(torch.randn(4, 2), torch.randn(4, 1))
    query = torch.ones(1, 2, requires_grad=True)
    stale = store.read(query, where=torch.tensor([0, 1]))
    good = store.read(query, where=torch.tensor([1, 2]))
    store.add(torch.randn(1, 2), torch.randn(1, 1))
    good.values.sum().backward()
    with pytest.raises(softdb.StaleReadError, match="slots 0"):
        stale.values.sum().backward()


@pytest.mark.parametrize("how", [{}, {"mode": "topk", "k": 3}], ids=["exact", "topk"])
def test_stale_compiled_reads_raise(how: dict[str, Any]) -> None:
    store = SoftKVStore(8, 3, trainable=True, sparse_grad=True)
    store.reserve(64)
    store.add(torch.randn(30, 8), torch.randn(30, 3))
    run = torch.compile(lambda x: store(x, **how).sum(), backend="aot_eager", fullgraph=True)
    answer = run(torch.randn(4, 8))
    store.update(torch.arange(30), values=torch.randn(30, 3))
    with pytest.raises(softdb.StaleReadError, match="rows that this read used"):
        answer.backward()
    del answer
    answer = run(torch.randn(4, 8))
    store.add(torch.randn(1, 8), torch.randn(1, 3))  # appending is fine
    answer.backward()


# -- callables -------------------------------------------------------------------------------------------


def test_a_callable_whose_answer_changes_before_backward_is_an_error() -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True, sparse_grad=True)
    now = torch.full((5, 1), 20)
    read = store.read(problem.query, where=lambda row: row["id"] < now)
    now += 5
    with pytest.raises(softdb.StaleReadError, match="where: expected the callable to return the same rows"):
        read.values.sum().backward()


@pytest.mark.parametrize(("modulus", "before", "after"), [(10**6, 10, 0), (2, 1, 2)], ids=["to none", "to others"])
def test_a_callable_whose_new_answer_hides_in_rounding_is_an_error(modulus: int, before: int, after: int) -> None:
    problem = Problem.random(rows=2000)
    store = store_of(problem, trainable=True, sparse_grad=True)
    limit = torch.tensor([before])
    read = store.read(
        1e-3 * problem.query,
        where=lambda row: (row["id"] + (modulus == 2) * limit) % modulus < (limit if modulus > 2 else 1),
    )
    limit[0] = after
    with pytest.raises(softdb.StaleReadError, match="where: expected the callable to return the same rows"):
        read.values.sum().backward()


# -- steps of optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RowAdam", "SparseAdam", "AdamW fused"])
def test_a_step_between_a_read_and_its_backward_is_an_error_only_for_rows_that_it_moved(kind: str) -> None:
    store = make_trainable_store(sparse_grad=kind != "AdamW fused")
    makers: dict[str, Any] = {
        "RowAdam": lambda: RowAdam(store.parameters(), lr=0.1),
        "SparseAdam": lambda: torch.optim.SparseAdam(list(store.parameters()), lr=0.1),
        "AdamW fused": lambda: torch.optim.AdamW(store.parameters(), lr=0.1, fused=True),
    }
    optimizer = makers[kind]()
    one, other = store.get([3]).keys, store.get([8]).keys
    stale, fine = (store.read(4 * query, "topk", k=1) for query in (one, other))
    assert stale.ids is not None
    assert fine.ids is not None
    assert stale.ids.tolist() != fine.ids.tolist()
    store.read(4 * one, "topk", k=1).values.sum().backward()
    store.keys.grad = None
    optimizer.step()
    store.read(make_queries(), "topk", k=2)
    with pytest.raises(softdb.StaleReadError):
        stale.values.sum().backward()
    if kind != "AdamW fused":
        fine.values.sum().backward()


@pytest.mark.parametrize("fails", ["step", "hook"])
def test_a_step_that_fails_half_way_leaves_no_read_that_goes_backward(fails: str) -> None:
    store = make_trainable_store()
    optimizer = RowAdam([{"params": [store.keys]}, {"params": [store.values]}], lr=0.1)
    store.read(make_queries(), "topk", k=3).values.sum().backward()
    read = store.read(make_queries(), "topk", k=3)
    keys = store.keys.detach().clone()
    if fails == "hook":
        optimizer.register_step_post_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert not torch.equal(store.keys, keys)
        with pytest.raises(softdb.StaleReadError):
            read.values.sum().backward()
    else:
        optimizer.param_groups[1]["betas"] = (0.9,)
        with pytest.raises(softdb.DtypeError, match="betas: expected two numbers"):
            optimizer.step()
        assert torch.equal(store.keys, keys)
        read.values.sum().backward()


def test_step_makes_only_the_updated_rows_stale() -> None:
    store = SoftKVStore(4, 3, trainable=True, sparse_grad=True)
    store.add(torch.eye(4), torch.ones(4, 3))
    optimizer = RowAdam(store.parameters(), lr=0.1)
    first = store.read(torch.tensor([9.0, 9, 0, 0]), "topk", k=2)
    second = store.read(torch.tensor([0.0, 0, 9, 9]), "topk", k=2)
    first.values.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    store.read(torch.ones(4), "topk", k=1)  # A read detects writes that bypass the store.
    second.values.sum().backward()
    optimizer.step()
    assert store.rows.all_changed_at == 0 or store.rows.all_changed_at < store.rows.version - 1

    third = store.read(torch.tensor([0.0, 0, 9, 9]), "topk", k=2)
    optimizer.step()  # Updates the rows of the second read again.
    with pytest.raises(softdb.StaleReadError):
        third.values.sum().backward()
