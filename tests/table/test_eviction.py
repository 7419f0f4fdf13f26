"""Stores of fixed capacity: evicted rows, usage counters, and revived rows."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from support.contract import rotate
from support.tolerances import allclose
from torch import Tensor

import softdb
from softdb import SoftKVStore
from softdb.index.manager import IndexManager
from softdb.index.policy import IndexPolicy
from softdb.scoring.normalizers import NORMALIZERS, is_random, reports_rows
from softdb.table.eviction import EvictionClock, QueueSampling

pytestmark = pytest.mark.each_device

EVICTIONS = ["lru", "oldest"]


def rows_of(count: int, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return keys and values that contain the number of their row."""
    numbers = start + torch.arange(float(count))[:, None]
    return torch.cat([numbers, torch.ones(count, 1)], dim=-1), numbers


def full(evict: str | None, capacity: int = 4, **options: object) -> SoftKVStore:
    store = SoftKVStore(2, 1, capacity=capacity, evict=evict, **options)  # type: ignore[arg-type]
    store.add(*rows_of(capacity))
    return store


# -- a store against plain Python ------------------------------------------------------------------------


class Model:
    """Plain Python model of a store with ``evict``: a list of slots, and the ids in eviction order."""

    def __init__(self, capacity: int, evict: str) -> None:
        self.slots: list[int | None] = [None] * capacity
        self.order: OrderedDict[int, None] = OrderedDict()
        self.evict = evict
        self.rows: dict[int, tuple[list[float], float]] = {}
        self.reads: Counter[int] = Counter()
        self.weight: Counter[int] = Counter()
        self.next = 0

    def put(self, ids: list[int], keys: Tensor, values: Tensor) -> None:
        new = [number for number in ids if number not in self.rows]
        for number in [number for number in self.order if number not in ids]:
            if len(self.rows) + len(new) <= len(self.slots):
                break
            self.delete(number)
        for number in new:
            self.slots[self.slots.index(None)] = number
            self.order[number] = None
        self.write(ids, keys, values)
        self.next = max([self.next, *(number + 1 for number in ids)])

    def write(self, ids: list[int], keys: Tensor, values: Tensor) -> None:
        for number, key, value in zip(ids, keys.tolist(), values.flatten().tolist(), strict=True):
            self.rows[number] = (key, value)
        self.use(ids)

    def use(self, ids: list[int]) -> None:
        if self.evict == "lru":
            for number in sorted(set(ids), key=self.slots.index):
                self.order.move_to_end(number)

    def read(self, ids: list[int], weights: list[float]) -> None:
        for number, weight in zip(ids, weights, strict=True):
            if number >= 0:
                self.reads[number] += 1
                self.weight[number] += weight
        self.use([number for number in ids if number >= 0])

    def forget(self, number: int) -> None:
        del self.reads[number], self.weight[number]

    def delete(self, number: int) -> None:
        self.slots[self.slots.index(number)] = None
        del self.rows[number], self.order[number]
        self.forget(number)

    def check(self, store: SoftKVStore) -> None:
        ids = [number for number in self.slots if number is not None]
        assert store.ids.tolist() == ids
        stored, usage = store.get(ids), store.usage
        assert stored.keys.tolist() == [self.rows[number][0] for number in ids]
        assert stored.values.flatten().tolist() == [self.rows[number][1] for number in ids]
        assert usage.reads.tolist() == [self.reads[number] for number in ids]
        assert usage.weight.tolist() == pytest.approx([self.weight[number] for number in ids])


def through_state_dict(store: SoftKVStore) -> SoftKVStore:
    other = SoftKVStore(2, 1, capacity=store.capacity, evict=store.evict, track_usage=True, trainable=store.trainable)
    if len(store) % 2:  # the previous content of the other store must not matter
        other.add(*rows_of(store.capacity))
        other.read(torch.ones(3, 2), "topk", k=2)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = [
    through_state_dict,
    copy.deepcopy,
    lambda store: pickle.loads(pickle.dumps(store)),
    lambda store: store.to(store.device),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queue_share", "evict", "capacity", "trainable"),
    rotate([0.0, 1 / 8, 0.9], EVICTIONS, [1, 7, 40], [False, True]),
)
def test_evicted_rows_match_a_plain_python_model(
    evict: str, capacity: int, trainable: bool, queue_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvictionClock, "sampling", QueueSampling(share=queue_share, rows=10))
    chance = random.Random(capacity)
    torch.manual_seed(capacity)
    store = SoftKVStore(2, 1, capacity=capacity, evict=evict, track_usage=True, trainable=trainable)  # type: ignore[arg-type]
    model = Model(capacity, evict)
    for _ in range(150):
        some = chance.sample(sorted(model.rows), chance.randint(0, min(5, len(model.rows))))
        count = chance.randint(0, min(5, capacity))
        keys, values = torch.randn(count, 2), torch.randn(count, 1)
        action = chance.choice(["add", "add", "put", "update", "delete", "read", "read", "read", "revive", "copy"])
        if action == "add":
            ids = store.add(keys, values).tolist()
            assert ids == list(range(model.next, model.next + count))
            model.put(ids, keys, values)
        elif action == "put":
            ids = (some + chance.sample(range(10**6, 10**6 + 99), count) if chance.random() < 0.2 else some)[:count]
            ids += [model.next + 1 + number for number in range(count - len(ids))]
            ids = list(dict.fromkeys(ids))
            store.put(ids, keys[: len(ids)], values[: len(ids)])
            model.put(ids, keys[: len(ids)], values[: len(ids)])
        elif action == "delete" and chance.random() < 0.5:
            store.delete(some)
            for number in some:
                model.delete(number)
        elif action in ("update", "revive"):
            keys, values = torch.randn(len(some), 2), torch.randn(len(some), 1)
            if action == "revive":
                store.revive(some, keys, values)
                for number in some:
                    model.forget(number)
            else:
                store.update(some, values=values)
                store.update(some, keys=keys)
            model.write(some, keys, values)
        elif action == "read":
            shape = chance.choice([(2,), (3, 2), (0, 2)])
            how = chance.choice([{"k": 3}, {}, {"mode": "topk", "k": 2}, {"mode": "topk", "k": 50}, {"mode": "hard"}])
            where = torch.tensor(some) if some and chance.random() < 0.3 else None
            with chance.choice([torch.enable_grad, torch.no_grad, torch.inference_mode])():
                read = store.read(torch.randn(shape, requires_grad=True), where=where, **how)  # type: ignore[arg-type]
            if read.ids is not None:
                model.read(read.ids.flatten().tolist(), read.weights.flatten().tolist())
        elif action == "copy":
            store = chance.choice(COPIES)(store)
        model.check(store)
    assert store.rows.capacity == capacity


@pytest.mark.slow
@pytest.mark.parametrize("used", [3, 50], ids=["half-filled", "filled"])
@pytest.mark.parametrize("evict", EVICTIONS)
def test_a_loaded_store_evicts_and_reads_like_the_saved_one(evict: str, used: int) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(2, 1, capacity=20, evict=evict, track_usage=True)  # type: ignore[arg-type]

    def run(store: SoftKVStore, seed: int, steps: int) -> list[object]:
        generator = torch.Generator().manual_seed(seed)
        seen: list[object] = []
        for _ in range(steps):
            store.add(torch.randn(3, 2, generator=generator), torch.randn(3, 1, generator=generator))
            read = store.read(torch.randn(2, 2, generator=generator), "topk", k=2)
            usage = store.usage
            seen.append([tensor.tolist() for tensor in (store.ids, read.ids, read.values, usage.reads, usage.weight)])
        return seen

    run(store, 0, used)
    other = SoftKVStore(2, 1, capacity=20, evict=evict, track_usage=True)  # type: ignore[arg-type]
    other.load_state_dict(store.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, store.state_dict()[name])
    assert run(store, 1, 30) == run(other, 1, 30)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, store.state_dict()[name])


# -- which rows are evicted ------------------------------------------------------------------------------


def test_the_oldest_rows_are_evicted_in_insertion_order() -> None:
    store = full("oldest")
    store.update([0], keys=torch.ones(1, 2))
    store.put([1], *rows_of(1))
    store.read(torch.ones(1, 2), "topk", k=1, where=torch.tensor([2]))
    evicted = []
    for number in range(4):
        before = set(store.ids.tolist())
        assert store.add(*rows_of(1)).tolist() == [4 + number]
        evicted += before - set(store.ids.tolist())
    assert evicted == [0, 1, 2, 3]
    store.put([30, 20, 10], *rows_of(3))  # into slots 0, 1, 2, in the order given
    store.delete([7])
    store.add(*rows_of(3), ids=[50, 60, 70])
    assert sorted(store.ids.tolist()) == [10, 50, 60, 70]


def test_the_least_recently_used_rows_are_evicted() -> None:
    store = full("lru")
    query = torch.tensor([[1.0, 0.0]])
    assert store.read(query, "hard").ids.tolist() == [[3]]
    store.read(query)  # reports no rows, so it is not a use
    store.update([0], values=torch.ones(1, 1))
    store.add(*rows_of(2))
    assert sorted(store.ids.tolist()) == [0, 3, 4, 5]
    store.read(query, "topk", k=9, where=torch.tensor([3]))  # row 3 and padding
    store.add(*rows_of(1))
    assert sorted(store.ids.tolist()) == [3, 4, 5, 6]
    store.touch([4])
    store.add(*rows_of(1))
    assert sorted(store.ids.tolist()) == [3, 5, 6, 7]


def test_an_update_of_fields_is_not_a_use() -> None:
    store = SoftKVStore(2, 1, fields=("time",), capacity=2, evict="lru")
    store.add(*rows_of(1), fields={"time": 0})
    store.add(*rows_of(1), fields={"time": 0})
    store.update([0], fields={"time": 1})
    store.add(*rows_of(1), fields={"time": 2})
    assert sorted(store.ids.tolist()) == [1, 2]
    assert store.get([1, 2]).fields["time"].tolist() == [0, 2]


@pytest.mark.parametrize("evict", EVICTIONS)
def test_rows_of_one_call_do_not_evict_each_other(evict: str) -> None:
    store = full(evict)
    store.put([0, 1, 20, 21], *rows_of(4, 10.0))
    assert store.get([0, 1, 20, 21]).values.flatten().tolist() == [10, 11, 12, 13]
    store.add(*rows_of(4))
    assert sorted(store.ids.tolist()) == [22, 23, 24, 25]
    store.put([25, 24, 30], *rows_of(3))
    assert sorted(store.ids.tolist()) == [23, 24, 25, 30]
    store.add(*rows_of(0))
    assert len(store) == 4


def test_free_slots_are_filled_before_rows_are_evicted() -> None:
    store = full("lru", capacity=6)
    store.delete([1, 4])
    store.add(*rows_of(2))
    assert sorted(store.ids.tolist()) == [0, 2, 3, 5, 6, 7]
    store.delete([3])
    store.add(*rows_of(2))
    assert sorted(store.ids.tolist()) == [2, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("evict", [None, *EVICTIONS])
def test_storage_of_a_fixed_capacity_is_allocated_once(evict: str | None) -> None:
    store = SoftKVStore(2, 1, capacity=4, evict=evict, trainable=True, sparse_grad=True)  # type: ignore[arg-type]
    keys, data = store.keys, store.keys.data_ptr()
    assert keys.shape == (4, 2)
    assert len(store) == 0
    assert (store.read(torch.ones(1, 2), k=2).ids == -1).all()
    store.reserve(4)
    optimizer = torch.optim.Adam(store.parameters())
    for _ in range(4 if evict is None else 9):
        store.add(*rows_of(1))
        store.read(torch.ones(1, 2)).values.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert store.keys is keys
    assert keys.data_ptr() == data
    assert len(store) == 4


@pytest.mark.slow
def test_a_large_store_rarely_scans_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    store = full("lru", capacity=4000)
    scans = 0
    fill_queue = EvictionClock._fill_queue

    def counted(clock: EvictionClock, readings: torch.Tensor, ids: torch.Tensor, least: int) -> None:
        nonlocal scans
        scans += 1
        fill_queue(clock, readings, ids, least)

    monkeypatch.setattr(EvictionClock, "_fill_queue", counted)
    for step in range(200):
        store.add(*rows_of(10))
        store.read(torch.randn(8, 2), "topk", k=4)
        assert store.get([4000 + 10 * step]).values.item() == 0
    assert len(store) == 4000
    assert 0 < scans < 10


# -- effects of eviction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"mode": "topk", "k": 4}], ids=["dense", "sparse"])
@pytest.mark.parametrize("write", ["add", "revive"])
def test_gradients_of_evicted_and_revived_rows_are_dropped(how: dict[str, object], write: str) -> None:
    store = full("oldest", trainable=True, sparse_grad=True)
    store.read(torch.randn(3, 2), **how).values.square().sum().backward()  # type: ignore[arg-type]
    before = store.values.grad.to_dense().clone()
    generation = store.rows.generation.clone()
    assert (before != 0).all()
    if write == "add":
        store.add(*rows_of(2))
    else:
        assert store.revive([0, 1], *rows_of(2)) is None
    after = store.values.grad.to_dense()
    assert (after[:2] == 0).all()
    assert (after[2:] == before[2:]).all()
    assert (store.rows.generation - generation).tolist() == [1, 1, 0, 0]
    assert (store.keys.grad.to_dense()[:2] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("evict", EVICTIONS)
def test_an_index_never_finds_an_evicted_row(evict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = IndexPolicy(exact_rows=100, pending_rows=40, pending_fraction=0.0)
    monkeypatch.setattr(IndexManager, "policy", policy)
    torch.manual_seed(0)
    store = SoftKVStore(8, 1, index="IVF8,Flat", capacity=400, evict=evict)  # type: ignore[arg-type]
    for step in range(60):
        new = store.add(torch.randn(25, 8), torch.randn(25, 1))
        query = torch.cat([torch.randn(10, 8), 3 * store.get(new[:2]).keys])
        read = store.read(query, "topk", k=5)
        live = set(store.ids.tolist())
        assert set(read.ids.flatten().tolist()) <= live
        if step > 20:
            stored = store.get(read.ids.flatten())
            assert allclose(read.scores, torch.einsum("bd,bkd->bk", query, stored.keys.view(12, 5, 8)) / 8**0.5,
                                  atol=1e-5)  # fmt: skip
        if step % 7 == 0:
            store.refresh()
    assert store.index_stats().builds >= 1
    assert len(store) == 400


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evict", "write", "error", "message"),
    [
        (
            "lru",
            lambda s: s.add(*rows_of(5)),
            softdb.ArgumentError,
            "keys: expected at most 4 rows, .* capacity, got 5",
        ),
        (None, lambda s: s.add(*rows_of(5)), softdb.ArgumentError, "keys: expected at most 4 rows"),
        (
            "oldest",
            lambda s: s.put([0, 1, 7, 8, 9], *rows_of(5)),
            softdb.ArgumentError,
            "keys: expected at most 4 rows",
        ),
        (
            None,
            lambda s: s.add(*rows_of(1)),
            softdb.GrowthError,
            "rows: expected at most 4, the store's capacity, got 5; delete rows",
        ),
        (None, lambda s: s.put([0, 7], *rows_of(2)), softdb.GrowthError, "evict='lru' or evict='oldest'"),
        (None, lambda s: s.reserve(5), softdb.GrowthError, "expected at most 4, the store's capacity, got 5"),
        ("lru", lambda s: s.reserve(5), softdb.GrowthError, "larger capacity"),
        ("lru", lambda s: s.add(*rows_of(2), ids=[9, 0]), softdb.DuplicateIdError, "existing 0"),
        ("lru", lambda s: s.add(rows_of(1)[0] * torch.nan, rows_of(1)[1]), softdb.NonFiniteError, "keys"),
        ("lru", lambda s: s.put([9, 9], *rows_of(2)), softdb.DuplicateIdError, "got repeated ids 9"),
        ("lru", lambda s: s.revive([9], *rows_of(1)), softdb.UnknownIdError, "ids: .* unknown 9"),
        ("lru", lambda s: s.revive([1, 1], *rows_of(2)), softdb.DuplicateIdError, "got repeated ids 1"),
        ("lru", lambda s: s.revive([1], *rows_of(2)), softdb.ShapeError, "ids: expected 2 ids"),
        ("lru", lambda s: s.revive([1, 2], rows_of(2)[0], rows_of(1)[1]), softdb.ShapeError, "values: expected 2 rows"),
        ("lru", lambda s: s.revive([1], rows_of(1)[0] * torch.inf, rows_of(1)[1]), softdb.NonFiniteError, "keys"),
        ("lru", lambda s: s.read(torch.ones(1, 2), "topk"), softdb.ArgumentError, "k: expected"),
    ],
)
def test_errors_change_nothing(evict, write, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    store = full(evict, track_usage=True)
    store.read(torch.ones(1, 2), "topk", k=2)
    before, version = copy.deepcopy(store.state_dict()), store.rows.version
    with pytest.raises(error, match=message):
        write(store)
    assert all(torch.equal(before[name], tensor) for name, tensor in store.state_dict().items())
    assert store.rows.version == version
    other = SoftKVStore(2, 1, capacity=4, evict=evict, track_usage=True)
    other.load_state_dict(before)
    assert store.rows.clock.now == other.rows.clock.now


def test_optional_buffers_are_saved_only_with_their_option() -> None:
    expected = {"keys", "values", "rows.ids", "rows.next_id", "rows.generation"}
    assert set(SoftKVStore(2, 1).state_dict()) == expected
    assert set(SoftKVStore(2, 1, capacity=3).state_dict()) == expected
    assert set(SoftKVStore(2, 1, capacity=3, evict="lru").state_dict()) == expected | {"rows.used_at"}
    assert set(SoftKVStore(2, 1, track_usage=True).state_dict()) == expected | {"rows.reads", "rows.weight"}


def test_a_state_of_another_capacity_or_eviction_rule_is_rejected() -> None:
    store = full("lru")
    with pytest.raises(softdb.ShapeError, match=r"state_dict\['rows.ids'\]: expected shape \(4,\), got \(5,\)"):
        store.load_state_dict(full("lru", capacity=5).state_dict())
    with pytest.raises(RuntimeError, match=r"rows\.used_at"):
        store.load_state_dict(full("oldest").state_dict())
    state = store.state_dict()
    state["rows.used_at"] = state["rows.used_at"][:3]
    with pytest.raises(softdb.ShapeError, match=r"rows.used_at'\]: expected shape \(4,\), got \(3,\)"):
        store.load_state_dict(state)
    ordinary = SoftKVStore(2, 1)
    ordinary.load_state_dict(full(None).state_dict())
    ordinary.add(*rows_of(3))
    assert len(ordinary) == 7


def test_repr_shows_capacity_and_eviction_rule() -> None:
    assert "capacity=4, evict='lru', trainable=False" in repr(full("lru"))
    assert "capacity" not in SoftKVStore(2, 1).extra_repr()


# -- usage -----------------------------------------------------------------------------------------------


def test_usage_counts_the_rows_that_reads_report() -> None:
    store = SoftKVStore(2, 1, track_usage=True, trainable=True, sparse_grad=True)
    store.read(torch.ones(3, 2), "topk", k=2)  # the store is empty
    store.add(*rows_of(5))
    store.delete([1])
    query = torch.randn(6, 2)
    reads, weight = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.float64)
    query = query.requires_grad_()
    for how in ({"k": 2}, {"mode": "topk", "k": 3}, {"mode": "hard"}, {"k": 1, "normalizer": "straight_through"}):
        read = store.read(query, **how)  # type: ignore[arg-type]
        for number, share in zip(read.ids.flatten().tolist(), read.weights.flatten().tolist(), strict=True):
            reads[number] += 1
            weight[number] += share
    store.read(query)
    kept = [0, 2, 3, 4]
    assert store.ids.tolist() == kept
    usage = store.usage
    assert usage.reads.tolist() == reads[kept].tolist()
    assert allclose(usage.weight, weight[kept])
    assert usage.weight.dtype == torch.float64
    assert not usage.weight.requires_grad
    usage.reads.zero_()
    assert store.usage.reads.sum() == reads.sum()  # usage is a copy
    del read
    store.add(*rows_of(20))  # grows the storage, and fills the free slot
    assert store.usage.reads[:5].tolist() == [reads[0], 0, *reads[2:]]
    store.to(torch.bfloat16)
    assert store.usage.weight.dtype == torch.float64
    assert allclose(store.usage.weight[[0, 2, 3, 4]], weight[kept])
    store.revive([3], *(table.bfloat16() for table in rows_of(1)))
    assert store.usage.reads[:5].tolist() == [reads[0], 0, reads[2], 0, reads[4]]
    store.reset_usage()
    assert store.usage.reads.sum() == store.usage.weight.sum() == 0


@pytest.mark.cpu_only
@pytest.mark.parametrize("evict", [None, *EVICTIONS])
@pytest.mark.parametrize("mmap", [False, True])
def test_track_usage_starts_and_stops_the_counters(evict: str | None, mmap: bool, tmp_path: Path) -> None:
    store, tracked = (full(evict, trainable=True, track_usage=flag) for flag in (False, True))
    plain = list(store.state_dict())
    query = torch.randn(5, 2, requires_grad=True)
    before = store.read(query, "topk", k=2)
    assert store.track_usage_() is store
    assert list(store.state_dict()) == list(tracked.state_dict())
    assert store.usage.reads.tolist() == [0] * 4
    before.values.sum().backward()  # An open read stays valid.
    for one in (store, tracked):
        one.read(query, "topk", k=2)
    assert torch.equal(store.usage.reads, tracked.usage.reads)
    assert torch.equal(store.track_usage_().usage.weight, tracked.usage.weight)  # The counters continue.
    store.save(tmp_path / "store")
    loaded = SoftKVStore.load(tmp_path / "store", mmap=mmap)
    tracked.load_state_dict(store.state_dict())
    for one in (loaded, tracked, copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert torch.equal(one.usage.reads, store.usage.reads)
        assert list(one.track_usage_(False).state_dict()) == plain
        with pytest.raises(softdb.NotApplicableError, match=r"call store\.track_usage_\(\)"):
            _ = one.usage
        one._check()
    loaded.save(tmp_path / "plain")
    again = SoftKVStore.load(tmp_path / "plain")
    again.read(query, "topk", k=2)
    assert again.track_usage_().usage.reads.tolist() == [0] * 4
    if evict is not None:
        store.add(*rows_of(2, 9.0))  # Evicts rows; the counters of the new ones are 0.
        assert store.usage.reads[torch.isin(store.ids, torch.tensor([4, 5]))].tolist() == [0, 0]
    store._check()


@pytest.mark.parametrize("normalizer", list(filter(reports_rows, NORMALIZERS)))
def test_exact_reads_without_k_count_the_rows_that_have_weight(normalizer: str) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(2, 1, track_usage=True)
    store.add(torch.randn(60, 2), torch.randn(60, 1))
    store.delete([3])
    query = 8 * torch.randn(4, 5, 2)

    def read(**options: object) -> softdb.Read:
        if is_random(normalizer):
            options["generator"] = torch.Generator().manual_seed(1)
        return store.read(query, normalizer=normalizer, **options)  # type: ignore[arg-type]

    found = read()
    assert found.ids is found.weights is found.scores is None
    usage = store.usage
    named = read(k=59)
    assert torch.equal(found.values, named.values)
    assert torch.equal(found.mass, torch.ones(4, 5))
    held = named.weights > 0
    reads = torch.zeros(60, dtype=torch.int64).index_add_(
        0, named.ids[held], torch.ones(int(held.sum()), dtype=torch.int64)
    )
    weight = torch.zeros(60).index_add_(0, named.ids[held], named.weights[held])
    assert usage.reads.tolist() == reads[store.ids].tolist()
    assert allclose(usage.weight.float(), weight[store.ids])
    assert 0 < int((usage.reads > 0).sum()) < 59


def test_exact_softmax_reads_without_k_are_not_counted() -> None:
    store = full("lru", track_usage=True)
    store.read(torch.ones(3, 2))
    assert store.usage.reads.tolist() == [0] * 4
    assert store.add(*rows_of(1)).tolist() == [4]
    assert store.ids.tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize("normalizer", [name for name in NORMALIZERS if reports_rows(name) and not is_random(name)])
def test_rows_with_weight_in_an_exact_read_are_evicted_last(normalizer: str) -> None:
    store = full("lru", trainable=True, sparse_grad=True)
    query = torch.tensor([[-9.0, 0.0]], requires_grad=True)
    store.read(query, normalizer=normalizer).values.sum().backward()  # only row 0 has weight
    store.add(*rows_of(1))
    assert store.ids.tolist() == [0, 4, 2, 3]


def test_usage_requires_track_usage() -> None:
    store = SoftKVStore(2, 1)
    for ask in (lambda: store.usage, store.reset_usage):
        with pytest.raises(softdb.ArgumentError, match="make the store with track_usage=True"):
            ask()


def test_counting_reads_does_not_change_gradients() -> None:
    torch.manual_seed(0)
    stores = [
        SoftKVStore(2, 1, trainable=True, sparse_grad=True, capacity=9, **options) for options in ({}, {"evict": "lru"})
    ]  # type: ignore[arg-type]
    stores.append(SoftKVStore(2, 1, trainable=True, sparse_grad=True, capacity=9, evict="lru", track_usage=True))
    query = torch.randn(4, 2, requires_grad=True)
    table = torch.randn(9, 2), torch.randn(9, 1)
    answers = []
    for store in stores:
        store.add(*table)
        read = store.read(query, "topk", k=3)
        store.read(query, "topk", k=2)  # this read is counted between another read and its backward
        (read.values.sum() + read.weights.square().sum() + read.lse.sum()).backward()
        answers.append([query.grad.clone(), store.keys.grad.to_dense(), store.values.grad.to_dense()])
        query.grad = None
    for answer in answers[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(answer, answers[0], strict=True))


def test_reads_do_not_change_the_version() -> None:
    store = full("lru", track_usage=True, trainable=True, sparse_grad=True)
    version = store.rows.version
    first = store.read(torch.ones(1, 2), "topk", k=2)
    store.read(torch.ones(1, 2), k=2)
    assert store.rows.version == version
    first.values.sum().backward()


def test_a_store_filled_and_read_in_inference_mode() -> None:
    with torch.inference_mode():
        store = full("lru", track_usage=True)
        store.read(torch.ones(2, 2), "topk", k=2)
        store.add(*rows_of(3))
        store.reset_usage()
        store.revive([6], *rows_of(1))
    read = store.read(torch.ones(2, 2, requires_grad=True), "topk", k=2)
    read.values.sum().backward()
    store.add(*rows_of(1))
    assert store.usage.reads.sum() <= 4


# -- revive ----------------------------------------------------------------------------------------------


def test_revived_rows_keep_ids_and_fields_and_make_reads_stale() -> None:
    store = SoftKVStore(2, 1, fields=("time",), track_usage=True, trainable=True, sparse_grad=True)
    store.add(*rows_of(4), ids=[5, 6, 7, 8], fields={"time": [1, 2, 3, 4]})
    query = torch.ones(1, 2)
    stale, good = (store.read(query, where=torch.tensor(ids)) for ids in ([5, 6], [6, 8]))
    store.revive(torch.tensor([7, 5]), *rows_of(2, 100.0))
    rows = store.get([5, 6, 7, 8])
    assert rows.values.flatten().tolist() == [101, 1, 100, 3]
    assert rows.keys[:, 0].tolist() == [101, 1, 100, 3]
    assert rows.fields["time"].tolist() == [1, 2, 3, 4]
    assert store.ids.tolist() == [5, 6, 7, 8]
    assert store.read(query, "hard").ids.tolist() == [[5]]
    good.values.sum().backward()
    with pytest.raises(softdb.StaleReadError):
        stale.values.sum().backward()
    before = store.rows.version
    store.revive([], *rows_of(0))
    assert store.rows.version == before


@pytest.mark.parametrize(("evict", "evicted"), [("lru", 1), ("oldest", 0)])
def test_revive_counts_as_a_use_but_not_as_an_addition(evict: str, evicted: int) -> None:
    store = full(evict)
    store.revive([0], *rows_of(1))
    store.add(*rows_of(1))
    assert evicted not in store
    assert len(store) == 4
