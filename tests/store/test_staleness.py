"""Test writes between a read and its backward: an error exactly if they change a row that the read used."""

from __future__ import annotations

import copy
from random import Random
from threading import Thread
from typing import Any

import pytest
import torch
from support import reference
from support.contract import METRICS, Problem, force_dispatch
from support.tolerances import allclose, assert_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import softdb
from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam
from softdb.scoring.normalizers import SPARSE_NORMALIZERS

pytestmark = pytest.mark.each_device

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
        assert allclose(mine, wanted)


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
@pytest.mark.parametrize(("mode", "how"), MODES, ids=str)
def test_changing_a_trainable_row_that_was_read_is_an_error_in_backward(mode: Any, how: Any, change: str) -> None:
    problem = Problem.random(rows=30)
    store = store_of(problem, trainable=True)
    read = store.read(problem.query, mode, **how)
    CHANGES[change](store, 0 if read.ids is None else int(read.ids[0, 0]))
    with pytest.raises(softdb.StaleReadError, match=r"call backward\(\) before writing"):
        read.values.sum().backward()


@pytest.mark.parametrize("change", ["touch", "load", "shared", "touch and write", "in place and write"])
@pytest.mark.parametrize(("mode", "how"), MODES, ids=str)
def test_a_write_that_bypasses_a_store_without_gradients_is_an_error_in_backward(
    mode: Any, how: Any, change: str
) -> None:
    problem = Problem.random(rows=30)
    store, other = store_of(problem), store_of(problem)
    if change == "shared":
        other.keys = store.keys
    read = store.read(problem.query, mode, **how)
    used = 0 if read.ids is None else int(read.ids[0, 0])
    if change == "shared":
        other.update([used], keys=torch.zeros(1, 8))
    elif "write" in change:  # The copy that the update makes is not the row that was read.
        if "touch" in change:
            store.keys.data[used] = 0.0
            store.touch([used])
        else:
            store.keys.zero_()
        store.update(store.ids, keys=torch.ones(30, 8))
    else:
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


@pytest.mark.parametrize("evict", ["lru", "oldest"])
def test_backward_raises_after_a_trainable_row_that_was_read_is_evicted(evict: str) -> None:
    store = SoftKVStore(2, 1, capacity=4, evict=evict, trainable=True)
    store.add(torch.randn(4, 2), torch.randn(4, 1))
    query = torch.ones(1, 2, requires_grad=True)
    stale = store.read(query, where=torch.tensor([0, 1]))
    good = store.read(query, where=torch.tensor([1, 2]))
    store.add(torch.randn(1, 2), torch.randn(1, 1))
    good.values.sum().backward()
    with pytest.raises(softdb.StaleReadError, match="slots 0"):
        stale.values.sum().backward()


@pytest.mark.slow
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


# -- copies of rows without gradient ---------------------------------------------------------------------


def answer(read: softdb.Read) -> Tensor:
    """Sum up all differentiable members of a read."""
    total = read.values.sin().sum() + read.lse.masked_fill(read.lse == -torch.inf, 0.0).sum()
    for member in (read.weights, read.scores, read.mass):
        if member is not None and member.requires_grad:
            total = total + member.masked_fill(member.isinf(), 0.0).cos().sum()
    return total


def oracle(store: SoftKVStore, query: Tensor, temperature: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute `answer` by plain autograd over copies of all live rows."""
    ids = store.ids
    rows = store.get(ids)
    visible = torch.ones(len(query), len(ids), dtype=torch.bool)
    where, exclude = options.get("where"), options.get("exclude")
    if where is not None:
        visible = visible & (where({"id": ids, **rows.fields}) if callable(where) else torch.isin(ids, where))
    if exclude is not None:
        visible = visible & (ids != exclude.unsqueeze(-1)).all(-2)

    def read(visible: Tensor) -> reference.Answer:
        metric = store.metric
        return reference.read(query, rows.keys, rows.values, metric=metric, temperature=temperature, visible=visible)

    full = read(visible)
    mode, k, normalizer = options.get("mode", "exact"), options.get("k"), options.get("normalizer")
    columns = reference.best(full.scores.detach(), k or 1)
    padding = columns < 0
    columns = columns.clamp(min=0)
    if mode != "exact":
        full = read(visible & torch.zeros_like(visible).scatter(1, columns, True))
    weights = full.weights if normalizer is None else SPARSE_NORMALIZERS[normalizer](full.scores)
    values = weights @ rows.values
    if mode == "exact" and k is None:
        return answer(softdb.Read(values, None, None, None, full.lse, torch.zeros(())))
    weights = weights.gather(1, columns).masked_fill(padding, 0.0)
    scores = full.scores.gather(1, columns).masked_fill(padding, -torch.inf)
    mass = weights.sum(-1) if mode == "exact" else torch.zeros(())
    return answer(softdb.Read(values, None, weights, scores, full.lse, mass))


def draw_options(random: Random, store: SoftKVStore, queries: int) -> dict[str, Any]:
    """Draw the options of a read."""
    k = random.randint(1, 5)
    modes: list[dict[str, Any]] = [
        {}, {}, {"k": k}, {"mode": "topk", "k": k}, {"mode": "hard"}, {"normalizer": "sparsemax", "k": k}
    ]  # fmt: skip
    limit, ids = torch.randint(0, 60, (queries, 1)), store.ids
    filters: list[dict[str, Any]] = [
        {},
        {"where": ids[torch.randperm(len(ids))[: len(ids) // 2 + 1]]},
        {"where": lambda row: row["time"] < limit},
        {"exclude": torch.randint(0, 30, (queries, 2))},
    ]
    return random.choice(modes) | random.choice(filters)


def write(random: Random, store: SoftKVStore, time: int) -> None:
    """Write random rows by a random method."""
    known = store.ids[torch.randperm(len(store))[: random.randint(1, 4)]]
    method = random.choice(["add", "add", "put", "keys", "values", "fields", "delete", "revive", "delete all"])
    count = len(known) if method != "add" else random.randint(1, 4)
    keys, values = torch.randn(count, 3, dtype=torch.float64), torch.randn(count, 2, dtype=torch.float64)
    match method:
        case "add":
            store.add(keys, values, fields={"time": time})
        case "put":
            store.put(known, keys, values, fields={"time": time})
        case "keys":
            store.update(known, keys=keys)
        case "values":
            store.update(known, values=values)
        case "fields":
            store.update(known, fields={"time": time})
        case "revive":
            store.revive(known, keys, values)
        case "delete":
            store.delete(known)
        case "delete all" if random.random() < 0.2:
            store.delete(store.ids)


@pytest.mark.parametrize("kind", ["capacity", "growing", "frozen", "tiny tiles"])
@pytest.mark.parametrize("seed", range(2))
def test_backward_uses_rows_without_gradient_as_they_were_at_the_read(
    seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "tiny tiles":
        force_dispatch("tiny tiles", monkeypatch)
    random = Random(seed)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"growing": {}, "frozen": {"capacity": 200, "trainable": True}}
    size = sizes.get(kind, {"capacity": 12, "evict": random.choice(["lru", "oldest"])})
    store = SoftKVStore(3, 2, metric=random.choice(METRICS), dtype=torch.float64, fields=("time",), **size)
    store.requires_grad_(False)
    store.add(torch.randn(10, 3).double(), torch.randn(10, 2).double(), fields={"time": 0})
    pending: list[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]] = []
    compared = stale = 0
    for time in range(80):
        action = random.choice(["read", "read", "read", "write", "write", "backward", "backward", "drop"])
        if action == "read" and len(store):
            queries = random.randint(1, 3)
            leaves = (
                torch.randn(queries, 3, dtype=torch.float64, requires_grad=True),
                torch.rand(queries, dtype=torch.float64).add(0.5).requires_grad_(),
            )
            options = draw_options(random, store, queries)
            wanted = torch.autograd.grad(oracle(store, *leaves, options), leaves)
            loss = answer(store.read(leaves[0], temperature=leaves[1], **options))
            pending.append((loss, leaves, wanted))
            del loss
        elif action == "write":
            write(random, store, time)
        elif pending:
            loss, leaves, wanted = pending.pop(random.randrange(len(pending)))
            if action == "backward":
                try:
                    found = torch.autograd.grad(loss, leaves)
                except softdb.StaleReadError as error:
                    assert "rows for all of them" in str(error)  # noqa: PT017
                    stale += 1
                else:
                    compared += 1
                    for mine, other in zip(found, wanted, strict=True):
                        assert_close(mine, other, rtol=1e-9, atol=1e-9)
            del loss
    assert compared > stale
    pending.clear()
    assert not store._open_reads


READS: dict[str, dict[str, Any]] = {
    "exact": {},
    "entmax15": {"normalizer": "entmax15"},
    "gumbel": {"normalizer": "gumbel"},
    "straight_through": {"normalizer": "straight_through", "k": 4},
    "tail": {"mode": "topk", "k": 3, "tail_samples": 40},
    "topk sparsemax": {"mode": "topk", "k": 2, "normalizer": "sparsemax"},
    "tolerance": {"mode": "topk", "tolerance": 0.1},
    "bias": {"bias": torch.linspace(-1, 1, 60), "k": 3},
    "rule": {"where": lambda row: row["time"] < torch.arange(4).unsqueeze(-1) + 55},
    "few rows": {"where": torch.arange(60) % 3 == 0},
}


def overwrite(store: SoftKVStore) -> None:
    """Overwrite all rows of a full store in three writes, some rows twice."""
    count = len(store)
    store.update(store.ids[: count // 2], keys=torch.randn(count // 2, 8), fields={"time": 99})
    store.delete(store.ids[::3])
    store.add(torch.randn(count, 8), torch.randn(count, 3), fields={"time": 99})


def make_queue(dtype: torch.dtype = torch.float32, rows: int = 60) -> SoftKVStore:
    store = SoftKVStore(8, 3, capacity=rows, evict="oldest", fields=("time",), dtype=dtype)
    store.add(torch.randn(rows, 8), torch.randn(rows, 3), fields={"time": torch.arange(rows)})
    return store


def differentiate(store: SoftKVStore, read: Any, *, overwrites: bool) -> tuple[Tensor, ...]:
    """Compute gradients of a query and a temperature, with or without a write before the backward."""
    torch.manual_seed(1)
    query, temperature = torch.randn(4, 8, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    total = read(query, temperature)
    if overwrites:
        overwrite(store)
    return torch.autograd.grad(total, (query, temperature))


def check_overwritten(store: SoftKVStore, read: Any) -> None:
    """Check that gradients after a write are those before it, bit for bit."""
    wanted = differentiate(store, read, overwrites=False)
    for mine, other in zip(differentiate(store, read, overwrites=True), wanted, strict=True):
        assert other.count_nonzero() > 0
        assert torch.equal(mine, other)
    changed = differentiate(store, read, overwrites=False)
    assert not torch.allclose(changed[0], wanted[0], rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", READS.values(), ids=READS)
def test_overwritten_rows_give_the_same_bits_in_backward(how: dict[str, Any], dtype: torch.dtype) -> None:
    store = make_queue(dtype)
    how = {name: entry.to(store.device) if isinstance(entry, Tensor) else entry for name, entry in how.items()}
    check_overwritten(store, lambda query, temperature: answer(store.read(query, temperature=temperature, **how)))


@pytest.mark.parametrize("how", [{}, {"mode": "topk", "k": 3}], ids=["exact", "topk"])
@pytest.mark.parametrize("kind", ["compiled", "vmap", "saved on the CPU", "retained"])
def test_overwritten_rows_give_right_gradients_in_frameworks(kind: str, how: dict[str, Any]) -> None:
    store = make_queue()

    def read(query: Tensor, temperature: Tensor) -> Tensor:
        return store.read(query, temperature=temperature, **how).values.sin().sum()

    def save_on_cpu(query: Tensor, temperature: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return read(query, temperature)

    def retain(query: Tensor, temperature: Tensor) -> Tensor:
        total = read(query, temperature)
        torch.autograd.grad(total, query, retain_graph=True)
        return total

    runs = {
        "compiled": torch.compile(read, backend="aot_eager", fullgraph=True),
        "vmap": lambda query, temperature: torch.func.vmap(read, (0, None))(query, temperature).sum(),
        "saved on the CPU": save_on_cpu,
        "retained": retain,
    }
    check_overwritten(store, runs[kind])


def test_a_checkpointed_read_is_repeated_from_the_present_rows_so_a_write_before_is_an_error() -> None:
    store = make_queue()
    query = torch.randn(4, 8, requires_grad=True)
    total = checkpoint(lambda x: store(x).sin().sum(), query, use_reentrant=False)
    overwrite(store)
    with pytest.raises(softdb.StaleReadError, match="activation checkpointing"):
        total.backward()


def test_hidden_rows_with_nan_stay_hidden_after_they_are_overwritten() -> None:
    store = make_queue()
    store.keys[5], store.values[5] = torch.nan, torch.inf
    visible = torch.arange(60) != 5

    def read(query: Tensor, temperature: Tensor) -> Tensor:
        return store.read(query, temperature=temperature, where=lambda row: row["id"] % 60 != 5).values.sin().sum()

    store.read(torch.randn(1, 8), where=visible)
    check_overwritten(store, read)


def count_copies(store: SoftKVStore) -> int:
    """Count the rows that are kept for open reads."""
    kept = {id(part): len(part) for _, at_read in store._open_reads._open if at_read() for part in at_read().copies}
    return sum(kept.values())


def test_at_most_capacity_rows_are_kept_and_the_oldest_reads_become_stale() -> None:
    store = make_queue(rows=20)
    query = torch.randn(4, 8, requires_grad=True)
    wanted, reads = [], []
    for _ in range(4):
        wanted.append(torch.autograd.grad(store(query).sin().sum(), query)[0])
        reads.append(store(query).sin().sum())
        store.add(torch.randn(8, 8), torch.randn(8, 3), fields={"time": 0})
        assert count_copies(store) <= 20
    for read in reads[:2]:
        with pytest.raises(softdb.StaleReadError, match="more than 20 rows for all of them"):
            read.backward()
    for read, gradient in zip(reads[2:], wanted[2:], strict=True):
        assert torch.equal(torch.autograd.grad(read, query)[0], gradient)
    assert count_copies(store) == 0  # Backward has freed them, although `reads` is alive.


def test_copies_are_made_for_open_reads_of_the_written_rows_only() -> None:
    store = make_queue()
    query = torch.randn(4, 8, requires_grad=True)
    rows = torch.randn(1, 8), torch.randn(1, 3)
    with torch.no_grad():
        store(query)
    store.read(query).values.sum().backward()
    ids = store.ids
    read = store.read(query, where=ids[:10])
    store.put(ids[20:21], *rows, fields={"time": 0})
    assert count_copies(store) == 0
    for _ in range(3):
        store.put(ids[5:6], *rows, fields={"time": 0})
    assert count_copies(store) == 1
    del read
    assert count_copies(store) == 0
    assert not store._open_reads


def test_a_copy_for_a_later_read_is_not_used_by_an_earlier_one() -> None:
    store = make_queue()
    query = torch.randn(4, 8, requires_grad=True)
    stale = store(query).sin().sum()
    store.touch([0])
    (wanted,) = torch.autograd.grad(store(query).sin().sum(), query)
    good = store(query).sin().sum()
    store.update([0, 1], keys=torch.zeros(2, 8))  # copies row 1 for both reads, row 0 for the later one
    assert torch.equal(torch.autograd.grad(good, query)[0], wanted)
    with pytest.raises(softdb.StaleReadError, match=r"got 1 changed or deleted rows \(slots 0\)"):
        stale.backward()


@pytest.mark.cpu_only
@pytest.mark.parametrize("writes_first", [False, True])
def test_a_write_of_another_thread_during_backward_repeats_the_backward(writes_first: bool) -> None:
    store = make_queue()
    query = torch.randn(4, 8, requires_grad=True)
    calls = []

    def where(row: Any) -> Tensor:
        calls.append(row["id"] % 7 != 0)
        if len(calls) == 3:  # in the backward of the second read
            thread = Thread(target=overwrite, args=(store,))
            thread.start()
            thread.join()
        return (row["id"] % 7 != 0 if writes_first else calls[-1]).expand(4, -1)

    def gradient() -> Tensor:
        return torch.autograd.grad(store.read(query, where=where).values.sin().sum(), query)[0]

    wanted = torch.autograd.grad(store.read(query, where=store.ids % 7 != 0).values.sin().sum(), query)[0]
    assert_close(gradient(), wanted)
    del calls[1:]
    assert_close(gradient(), wanted)
    assert len(calls) > 3


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
