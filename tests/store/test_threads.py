"""Concurrent readers and writers, interrupted writes, failed builds and memory shortage."""

from __future__ import annotations

import copy
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faults import Report
from support.programs import check_exit
from support.races import WIDTH, race, run_together
from torch import Tensor

import softdb
from softdb import IndexBuildError, IndexConfig, SoftKVStore, snapshot
from softdb.table.locks import SharedLock

# -- the lock --------------------------------------------------------------------------------------------


def test_readers_share_the_lock_and_a_writer_excludes_them() -> None:
    lock, together = SharedLock(), threading.Barrier(3, timeout=30)
    inside, seen = [0], []

    def read() -> None:
        with lock.reading():
            together.wait()  # until all three hold the lock
        for _ in range(300):
            with lock.reading():
                seen.append(inside[0])

    def write() -> None:
        for _ in range(300):
            with lock.writing():
                inside[0] = 1
                time.sleep(0)
                inside[0] = 0

    run_together([read, read, read, write])
    assert not any(seen)


@pytest.mark.slow
def test_a_writer_can_lock_more_readers_than_the_recursion_limit() -> None:
    lock, done = SharedLock(), threading.Event()
    count = sys.getrecursionlimit() + 1
    together = threading.Barrier(count + 1, timeout=60)

    def read() -> None:
        with lock.reading():
            pass
        together.wait()
        done.wait()

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    together.wait()
    try:
        with lock.writing():
            assert lock.is_written
        assert not lock.is_written
        assert not lock.is_read
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_the_lock_is_reentrant() -> None:
    lock = SharedLock()
    with lock.writing(), lock.reading(), lock.writing(), lock.reading():
        assert lock.is_read
        assert lock.is_written
    with lock.reading(), lock.writing():  # no other thread reads
        pass
    assert not lock.is_read
    assert not lock.is_written
    held = threading.Event()
    thread = threading.Thread(target=lambda: held.set() if lock.writing().__enter__() is None else None)
    thread.start()
    assert held.wait(30)


def test_a_nested_read_does_not_deadlock_with_a_waiting_writer() -> None:
    lock, reading, wants_to_write = SharedLock(), threading.Event(), threading.Event()

    def read() -> None:
        with lock.reading():
            reading.set()
            assert wants_to_write.wait(30)
            time.sleep(0.05)  # until the writer holds the gate
            with lock.reading():
                pass

    def write() -> None:
        assert reading.wait(30)
        wants_to_write.set()
        with lock.writing():
            pass

    run_together([read, write])


def test_a_copy_of_a_held_lock_is_free() -> None:
    lock = SharedLock()
    with lock.writing():
        copied = copy.deepcopy(lock)
        assert not copied.is_written


# -- concurrent readers and a writer ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"background": True}, {"factory": "HNSW8"}, {"factory": "Flat"}])
def test_each_read_sees_exactly_one_version(options: dict[str, Any]) -> None:
    report = Report("race")
    race(report, None, seconds=2.0, **options)
    assert report.violations == []


def small_store(**options: Any) -> tuple[SoftKVStore, Tensor]:
    store = SoftKVStore(WIDTH, 2, **options)
    keys = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0))
    return store, store.add(keys, keys[:, :2])


@pytest.mark.slow
def test_a_block_of_writes_is_atomic_for_readers() -> None:
    store, ids = small_store()
    stop = threading.Event()

    def write() -> None:
        for number in range(100):
            with store.writing():
                store.values.fill_(0.0)
                time.sleep(0.001)
                store.values.fill_(float(number))
                store.delete(ids[number : number + 1])
                store.add(torch.ones(1, WIDTH), torch.full((1, 2), float(number)))
        stop.set()

    def read() -> None:
        while not stop.is_set():
            answer = store.read(torch.ones(1, WIDTH), k=2)
            assert torch.allclose(answer.values, answer.values.round(), atol=1e-4)  # all rows hold the same value

    with store.writing():
        store.values.fill_(0.0)
    run_together([write, read, read])


@pytest.mark.slow
def test_usage_counts_of_concurrent_readers_are_complete() -> None:
    store, _ = small_store(track_usage=True)

    def read() -> None:
        for _ in range(20):
            store.read(torch.ones(128, WIDTH), "topk", k=300)

    run_together([read] * 4)
    assert int(store.usage.reads.sum()) == 4 * 20 * 128 * 300
    assert float(store.usage.weight.sum()) == pytest.approx(4 * 20 * 128, rel=1e-4)


@pytest.mark.slow
def test_a_copy_during_writes_contains_one_version() -> None:
    store = SoftKVStore(4, 1)
    store.add(torch.zeros(20, 4), torch.zeros(20, 1))
    done = threading.Event()

    def write() -> None:
        number = 0.0
        while not done.is_set():
            number += 1
            with store.writing():
                count = len(store) + 20 if len(store) < 2000 else 20
                store.delete(store.ids)
                store.add(torch.full((count, 4), number), torch.full((count, 1), number))

    def check() -> None:
        try:
            for _ in range(60):
                copied = copy.deepcopy(store)
                copied._check()
                rows = copied.get(copied.ids)
                assert len(rows.values) % 20 == 0
                assert len(torch.cat([rows.keys, rows.values], dim=1).unique()) == 1
        finally:
            done.set()

    run_together([write, check])


def test_a_save_during_reads_and_writes_contains_one_version(tmp_path: Path) -> None:
    store, ids = small_store(track_usage=True)
    stop = threading.Event()

    def write() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            store.update(ids, values=torch.full((400, 2), float(number)))

    def read() -> None:
        while not stop.is_set():
            store.read(torch.ones(8, WIDTH), "topk", k=50)

    def save() -> None:
        try:
            for number in range(15):
                store.save(tmp_path / str(number % 2))
                assert len(SoftKVStore.load(tmp_path / str(number % 2)).values.unique()) == 1
        finally:
            stop.set()

    store.update(ids, values=torch.zeros(400, 2))
    run_together([write, read, save])


@pytest.mark.slow
def test_a_save_during_unreported_writes_can_be_loaded(tmp_path: Path) -> None:
    store = SoftKVStore(64, 64)
    store.add(torch.zeros(20_000, 64), torch.zeros(20_000, 64))
    stop = threading.Event()

    def write() -> None:
        values = store.values.data
        for number in itertools.count():
            if stop.is_set():
                return
            values.fill_(float(number))

    def save() -> None:
        try:
            for _ in range(5):
                store.save(tmp_path)
                SoftKVStore.load(tmp_path)  # may mix several writes, but must match its hashes
        finally:
            stop.set()

    run_together([write, save])


def test_a_save_that_waits_for_the_directory_lock_does_not_block_writes(tmp_path: Path) -> None:
    store, ids = small_store()
    waiting = threading.Thread(target=lambda: store.save(tmp_path, timeout=60))
    with snapshot.lock_directory(tmp_path, 0.0):
        waiting.start()
        for _ in range(20):
            time.sleep(0.005)
            store.update(ids, values=torch.ones(400, 2))
        assert waiting.is_alive()
    waiting.join(60)
    assert bool((SoftKVStore.load(tmp_path).values == 1).all())


# -- failed builds ---------------------------------------------------------------------------------------


def recall(store: SoftKVStore) -> float:
    queries = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    return store.audit(queries, k=3).mean_recall


@pytest.mark.parametrize("failure", [RuntimeError("no luck"), MemoryError("none left"), ValueError("odd")])
def test_a_failed_background_build_is_reported(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = small_store(index=IndexConfig("IVF8,Flat", background=True))

    def fail(*args: object) -> object:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("softdb.index.builder.build_base", fail)
        assert recall(store) == 1.0
        with pytest.raises(IndexBuildError, match=str(failure)):
            store.refresh(wait=True)
    store.refresh()  # the error is raised only once
    assert str(failure) in (store.index_stats().error or "")
    assert recall(store) == 1.0
    store.build_index()
    assert store.index_stats().error is None
    store.refresh()
    assert recall(store) > 0.8


def test_build_index_raises_if_the_build_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = small_store(index="IVF8(PQ4x5),Flat")  # training 32 PQ centroids needs more than 8 points
    assert recall(store) == 1.0
    with pytest.raises(IndexBuildError, match="training"):
        store.build_index()
    assert recall(store) == 1.0


def test_a_failed_rebuild_falls_back_to_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids = small_store(index=IndexConfig("IVF8,Flat", background=True, garbage=0.1))
    store.build_index()
    with monkeypatch.context() as patch:
        patch.setattr("softdb.index.builder.build_base", lambda plan: 1 / 0)
        store.delete(ids[:200])
        assert recall(store) > 0.8  # starts a background build
        with pytest.raises(IndexBuildError, match="ZeroDivisionError"):
            store.refresh(wait=True)
    assert recall(store) == 1.0


# -- interrupted writes ----------------------------------------------------------------------------------

WRITES: dict[str, Callable[[SoftKVStore], object]] = {
    "add": lambda store: store.add(torch.ones(9, 4), torch.ones(9, 2), fields={"time": 9}),
    "put": lambda store: store.put([3, 1000, 5, 77], torch.ones(4, 4), torch.ones(4, 2), fields={"time": 9}),
    "update": lambda store: store.update([3, 8, 5], torch.ones(3, 4), torch.ones(3, 2), fields={"time": 9}),
    "revive": lambda store: store.revive([3, 8, 5], torch.ones(3, 4), torch.ones(3, 2)),
    "delete": lambda store: store.delete([3, 8, 15, 16]),
    "clear": lambda store: store.clear(),
    "compact": lambda store: store.compact(),
    "reserve": lambda store: store.reserve(100),
    "load_state_dict": lambda store: store.load_state_dict(table(store, rows=7).state_dict()),
    "build_index": lambda store: store.build_index(),
    "refresh": lambda store: store.refresh(),
    "read": lambda store: store.read(torch.ones(2, 4), "topk", k=2),
    "materialize": lambda store: store.materialize(),
}
# Operations whose interruption does not depend on the eviction rule.
EVICTION_INDEPENDENT = ("reserve", "build_index", "refresh", "read", "materialize")
# Number of lines of each write at which it is interrupted: many for one kind of store, fewer for the others.
INTERRUPTED_LINES, FEWER_LINES = 16, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "trainable": {"trainable": True},
    "oldest": {"capacity": 18, "evict": "oldest", "track_usage": True},
    "lru": {"capacity": 18, "evict": "lru"},
    "graph": {"index": IndexConfig("HNSW8", garbage=1.0)},
}
KINDS_WITHOUT_EVICTION = ("plain", "trainable", "graph")


def table(like: SoftKVStore | None = None, rows: int = 16, **options: Any) -> SoftKVStore:
    if like is not None:
        options = {"capacity": like.capacity, "evict": like.evict, "track_usage": like.rows.track_usage}
        options |= {"trainable": like.trainable, "index": like._index.config}
    options.setdefault("index", IndexConfig("IVF2,Flat"))
    store = SoftKVStore(4, 2, fields=("time",), **options)
    keys = torch.randn(rows + 1, 4, generator=torch.Generator().manual_seed(rows))
    store.add(keys, keys[:, :2], fields={"time": 1})
    store.delete([1])
    return store


def contents(store: SoftKVStore) -> tuple[dict[int, list[float]], int]:
    """Return the rows by id, and the next id."""
    rows, ids = store.get(store.ids), store.ids.tolist()
    numbers = torch.cat([rows.keys, rows.values, rows.fields["time"].unsqueeze(-1).float()], dim=-1)
    return dict(zip(ids, numbers.tolist(), strict=True)), int(store.rows.next_id)


def lines_of(kind: str) -> int:
    return INTERRUPTED_LINES if kind == "plain" else FEWER_LINES


def interrupt() -> None:
    raise KeyboardInterrupt


class Interrupts:
    """Tracer that calls `act`, which raises by default, at the n-th executed line of softdb."""

    def __init__(self, at: int | None, act: Callable[[], None] = interrupt) -> None:
        self.count, self.at, self.act = 0, at, act

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("softdb") or name == "softdb.table.locks":
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.act()
        return self.trace

    @contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in WRITES
        for kind in KINDS
        if (kind in KINDS_WITHOUT_EVICTION if name in EVICTION_INDEPENDENT else kind != "graph")
    ],
)
def test_an_interrupt_at_any_line_leaves_a_write_complete_or_undone(name: str, kind: str) -> None:
    write = WRITES[name]
    original = table(**KINDS[kind])
    copied = copy.deepcopy
    if name == "refresh":

        def copied(store: SoftKVStore) -> SoftKVStore:  # copies contain no index, so build one
            store = copy.deepcopy(store)
            store.build_index()
            store.update([4, 7, 9], torch.ones(3, 4))
            store.add(torch.ones(2, 4), torch.ones(2, 2), fields={"time": 2})
            return store

    whole = copied(original)
    write(whole)
    counter = Interrupts(None)
    tried = copied(original)
    with counter.on():
        write(tried)
    assert counter.count > 10
    step = max(1, counter.count // lines_of(kind))
    outcomes = set()
    for at in range(1 + len(name) % step, counter.count + 1, step):
        store = copied(original)
        before = contents(store)
        interrupts = Interrupts(at)
        try:
            with interrupts.on():
                write(store)
        except KeyboardInterrupt:
            pass
        else:  # the write had fewer lines this time
            assert interrupts.count < at
        found = contents(store)
        store._check()
        assert found in (before, contents(whole)), f"line {at} of {counter.count}"
        outcomes.add(found == before)
        store.add(torch.zeros(1, 4), torch.zeros(1, 2), fields={"time": 0})
        store.delete(store.ids[:1])
        store._check()
        if name in EVICTION_INDEPENDENT:
            assert recall_of(store) >= (0.8 if kind == "graph" else 1.0)
    if name in ("add", "delete", "update"):
        assert outcomes == {True, False}  # interrupts before and after the commit


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in WRITES if name not in EVICTION_INDEPENDENT])
def test_a_signal_handler_can_save_during_a_write(name: str, kind: str, tmp_path: Path) -> None:
    write = WRITES[name]
    original = table(**KINDS[kind])
    whole = copy.deepcopy(original)
    counter = Interrupts(None)
    with counter.on():
        write(whole)
    step = max(1, counter.count // lines_of(kind))
    for at in range(1 + len(name) % step, counter.count, step):
        store = copy.deepcopy(original)
        before = contents(store)

        def save(store: SoftKVStore = store) -> None:
            with torch.no_grad():
                store.save(tmp_path)

        with Interrupts(at, save).on():
            write(store)
        store._check()
        assert contents(store) == contents(whole)
        assert contents(SoftKVStore.load(tmp_path)) in (before, contents(whole))


@pytest.mark.slow
def test_a_signal_handler_can_search_during_a_search() -> None:
    queries = torch.randn(20, 4, generator=torch.Generator().manual_seed(5))

    def search(store: SoftKVStore) -> list[list[int]]:
        ids = store.read(queries, "topk", k=2).ids
        assert ids is not None
        return ids.tolist()

    def search_within_searches() -> None:
        original = table(rows=64)
        original.build_index()
        original.update(torch.arange(2, 12), torch.ones(10, 4))
        counter, tried = Interrupts(None), copy.deepcopy(original)
        with counter.on():
            expected = search(tried)
        for at in range(1, counter.count, max(1, counter.count // (8 * INTERRUPTED_LINES))):
            store, found = copy.deepcopy(original), list[list[list[int]]]()

            def handle(store: SoftKVStore = store, found: list[list[list[int]]] = found) -> None:
                found.append(search(store))

            with Interrupts(at, handle).on():
                found.append(search(store))
            assert found == [expected, expected]
            store._check()
            assert recall_of(store) == 1.0

    run_together([search_within_searches])


def recall_of(store: SoftKVStore) -> float:
    """Measure the recall of reads through the present index; all of its lists are visited."""
    queries = torch.randn(20, 4, generator=torch.Generator().manual_seed(5))
    return store.audit(queries, k=1).mean_recall


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from a file that was just opened
def test_an_interrupted_save_leaves_a_valid_snapshot(tmp_path: Path) -> None:
    store = table()
    store.save(tmp_path)
    counter = Interrupts(None)
    with counter.on():
        store.save(tmp_path)
    store.add(torch.zeros(1, 4), torch.zeros(1, 2), fields={"time": 0})
    for at in range(1, counter.count, max(1, counter.count // 60)):
        with pytest.raises(KeyboardInterrupt), Interrupts(at).on():
            store.save(tmp_path)
        store._check()
        assert len(SoftKVStore.load(tmp_path)) in (16, 17)
    store.save(tmp_path)
    assert len({file.name.rpartition("-")[2] for file in tmp_path.glob("*.safetensors")}) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from Ctrl-C within a gc callback
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.slow
def test_ctrl_c_at_random_times_leaves_a_consistent_store() -> None:
    store = table()
    chance = random.Random(0)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have set it to ignore
    interrupted, deadline = 0, time.monotonic() + 20
    try:
        while interrupted < 100 and time.monotonic() < deadline:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 2e-3))
                for _ in range(1000):  # Python drops an interrupt that arrives in a finalizer
                    ids = store.add(torch.ones(5, 4), torch.ones(5, 2), fields={"time": 1})
                    store.read(torch.ones(1, 4), "topk", k=1)
                    store.delete(ids[:4])
                    if len(store) > 200:
                        store.delete(store.ids[:150])
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            store._check()
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, ctrl_c)
    assert interrupted > 20


# -- out of memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "trainable"])
@pytest.mark.parametrize("name", ["add", "put", "reserve", "load_state_dict"])
def test_failed_allocations_in_growth_leave_the_store_unchanged(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing: dict[str, Callable[[SoftKVStore], object]] = {
        **WRITES,
        "add": lambda store: store.add(torch.ones(90, 4), torch.ones(90, 2), fields={"time": 9}),
        "put": lambda store: store.put(range(90), torch.ones(90, 4), torch.ones(90, 2), fields={"time": 9}),
    }
    resize = softdb.table.slots.resize
    for number in range(1, 40):
        store = table(**KINDS[kind])
        if kind == "trainable":
            store.read(torch.ones(1, 4), "topk", k=1).values.sum().backward()
        before, gradient = contents(store), store.keys.grad
        calls = [0]

        def fail_once(*args: Any, number: int = number, calls: list[int] = calls, **options: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == number:
                raise MemoryError("none left")
            return resize(*args, **options)

        with monkeypatch.context() as patch:
            for module in (softdb.table.growth, softdb.table.slots, softdb.table.table, softdb.table.gradients):
                patch.setattr(module, "resize", fail_once)
            try:
                growing[name](store)
                break
            except MemoryError:
                pass
        found = contents(store)
        store._check()
        if name == "load_state_dict" and found != before:  # the load was committed before the failure
            assert found == contents(table(rows=7))
            continue
        assert found == before
        assert store.keys.grad is gradient
        growing[name](store)
        store._check()
    assert number > 5


FILL_MEMORY = """
import resource, sys
import torch
from softdb import SoftKVStore
torch.set_num_threads(1)
store = SoftKVStore(64, 64, trainable=sys.argv[1] == "trainable")
rows = torch.ones(20_000, 64)
store.add(rows, rows)
store.read(rows[:2], k=3)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**27
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, most))
added = 1
while True:
    before = len(store), int(store.rows.next_id), store.rows.version, store.rows.capacity
    try:
        store.add(rows, rows + added)
    except (MemoryError, RuntimeError) as error:
        break
    added += 1
assert before == (len(store), int(store.rows.next_id), store.rows.version, store.rows.capacity), before
resource.setrlimit(resource.RLIMIT_AS, (most, most))
store._check()
expected = torch.arange(added).repeat_interleave(20_000).float() + 1
expected[:20_000] = 1
assert torch.equal(store.values[:len(store), 5].detach(), expected)
assert store.add(rows, rows)[0] == before[1]
store._check()
print("enough", added)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["plain", "trainable"])
def test_a_store_is_unchanged_when_memory_runs_out(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL_MEMORY, kind], capture_output=True, text=True, timeout=120, check=False
    )
    check_exit(done)
    assert done.stdout.startswith("enough ")
    assert int(done.stdout.split()[1]) > 1
