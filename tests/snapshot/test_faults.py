"""Faults of processes, disks and power during a save, which leave the old snapshot or the new one.

The campaigns are in `faults`; ``scripts/faults`` runs them at length.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import faults
from support.faults import FORK, Report, Step, make, names, names_of_one, which
from support.programs import check_exit

import softdb
from softdb import LockedError, SoftKVStore, snapshot
from softdb.optim import RowAdam
from softdb.snapshot import examine as snapshot_examine
from softdb.snapshot import lock as snapshot_lock
from softdb.snapshot import reader as snapshot_reader
from softdb.snapshot.format import Sizes
from softdb.table.changes import ChangeLog
from softdb.table.slots import SlotTable
from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.table.versions import RecordedVersions

OLD_NEW = {"old": make(1.0), "new": make(2.0)}


def holds(campaign: Callable[..., Any], folder: Path, least: dict[str, int], **options: Any) -> None:
    """Assert that a campaign finds no violation, and each outcome at least the given number of times."""
    report = Report(campaign.__name__)
    campaign(report, folder, **options)
    assert report.violations == []
    for outcome, count in least.items():
        assert report.outcomes[outcome] >= count, report.outcomes


@pytest.fixture(params=["whole", "in chunks"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether files consist of several chunks, which threads write and sync."""
    name: str = request.param
    if name == "in chunks":
        monkeypatch.setattr(Sizes, "default", lambda: Sizes(chunk=64, part=24, sync=64))
    return name


# -- processes that are killed ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_at_any_operation_leaves_the_old_snapshot_or_the_new_one(size: str, tmp_path: Path) -> None:
    holds(faults.kills_at_every_step, tmp_path, {"old": 10, "new": 2}, every=3)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_snapshot_or_the_new_one(tmp_path: Path) -> None:
    holds(faults.random_kills, tmp_path, {"the old store": 1}, kills=8, seed=0, rows=5000)


@pytest.mark.parametrize("kind", ["rename", "write", "fsync"])
def test_an_interrupt_right_after_an_operation_leaves_a_whole_snapshot(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before_test))
    path, before, stores, steps = faults.start(tmp_path)
    for number in range(sum(step.kind == kind for step in steps)):
        faults.fill(path, before)
        left = [number]

        def interrupt(step: Step, left: list[int] = left) -> None:
            if step.kind == kind:
                if left[0] == 0:
                    signal.raise_signal(signal.SIGINT)  # as if Ctrl-C had come during the operation
                left[0] -= 1

        with pytest.raises(KeyboardInterrupt), faults.hooks(path, after=interrupt):
            stores["new"].save(path)
        assert which(path, stores) in ("old", "new")
        stores["new"].save(path)
        assert which(path, stores) == "new"
        assert names(path) == names_of_one(path)


# -- disks that fail -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sticky", [False, True])
def test_an_error_at_any_operation_leaves_the_old_snapshot_or_the_new_one(
    sticky: bool, size: str, tmp_path: Path
) -> None:
    codes = (errno.ENOSPC, errno.EIO) if sticky else (errno.EIO, errno.ENOSPC)
    holds(faults.errors_at_every_step, tmp_path, {"old": 20, "new": 2}, codes=codes, sticky=sticky)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    script = (
        "import resource, signal, sys, torch\nfrom softdb import SoftKVStore\n"
        "store = SoftKVStore(64, 64)\nstore.add(torch.zeros(4000, 64), torch.zeros(4000, 64))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))\n"
        "try:\n    store.save(sys.argv[1])\nexcept OSError as error:\n    print('refused', error.errno, len(store))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    check_exit(done)
    assert done.stdout.strip() == f"refused {errno.EFBIG} 4000"
    assert which(tmp_path, OLD_NEW) == "old"
    assert names(tmp_path) == names_of_one(tmp_path)


def test_a_disk_that_takes_few_bytes_at_a_time(tmp_path: Path) -> None:
    store = make(2.0)
    with faults.hooks(tmp_path, lambda step: 7):
        store.save(tmp_path)
    assert which(tmp_path, OLD_NEW) == "new"


# -- power that fails ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a snapshot", "a directory", "nothing"])
def test_a_power_failure_at_any_operation_leaves_the_old_snapshot_or_the_new_one(
    place: str, size: str, tmp_path: Path
) -> None:
    holds(faults.power_failures, tmp_path, {"new": 1}, place=place, again=40, subsets=6 if size == "whole" else 2)


@pytest.mark.slow
def test_a_missing_fsync_is_detected_by_simulated_power_failures(tmp_path: Path) -> None:
    """Omit each fsync in turn; every time, some state of the disk reveals it."""
    for place, least in (("a snapshot", 9), ("nothing", 10)):
        (tmp_path / place).mkdir()
        report = Report("")
        steps = faults.power_failures(report, tmp_path / place, place=place, again=10**9)
        syncs = [step for step in steps if step.kind == "fsync"]
        assert len(syncs) >= least
        assert not report.violations
        for number in range(len(syncs)):
            (folder := tmp_path / f"{place} {number}").mkdir()
            seen: list[Step] = []

            def lost(step: Step, seen: list[Step] = seen, number: int = number) -> bool:
                if step.kind == "fsync":
                    seen.append(step)
                return step.kind == "fsync" and len(seen) == number + 1

            report = Report("")
            faults.power_failures(report, folder, place=place, lost=lost, again=10**9, stop_at_first=True)
            assert report.violations, f"{syncs[number]} is of no use in a save to {place}"


# -- several processes -----------------------------------------------------------------------------------


def holding(path: Path) -> tuple[Any, Any]:
    """Start a process that holds the lock until an event is set; return both."""
    ready, go = FORK.Event(), FORK.Event()

    def hold() -> None:
        with snapshot.lock_directory(path, 0.0):
            ready.set()
            go.wait(faults.CHILD_TIMEOUT_SECONDS)

    child = FORK.Process(target=hold, daemon=True)
    child.start()
    assert ready.wait(faults.CHILD_TIMEOUT_SECONDS)
    return child, go


def test_one_process_saves_at_a_time(tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    child, _ = holding(tmp_path)
    with pytest.raises(LockedError, match="is locked by another save; pass timeout"):
        make(2.0).save(tmp_path)
    with pytest.raises(LockedError):
        make(2.0).save(tmp_path, timeout=0.1)
    assert which(tmp_path, OLD_NEW) == "old"  # readers need no lock
    os.kill(child.pid, signal.SIGKILL)
    make(2.0).save(tmp_path, timeout=30.0)
    child.join(30)
    assert which(tmp_path, OLD_NEW) == "new"


def test_a_save_waits_for_another_save(tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    child, go = holding(tmp_path)
    timer = threading.Timer(0.2, go.set)
    timer.start()
    make(2.0).save(tmp_path, timeout=faults.CHILD_TIMEOUT_SECONDS)
    timer.join()
    assert faults.join_or_kill(child) == 0
    assert which(tmp_path, OLD_NEW) == "new"


@pytest.mark.slow
def test_concurrent_first_saves_run_one_after_the_other(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / str(number)
        barrier = FORK.Barrier(2)

        def saving(store: SoftKVStore, path: Path = path, barrier: Any = barrier) -> None:
            barrier.wait(faults.CHILD_TIMEOUT_SECONDS)
            store.save(path, timeout=faults.CHILD_TIMEOUT_SECONDS)

        children = [FORK.Process(target=saving, args=(store,), daemon=True) for store in OLD_NEW.values()]
        for child in children:
            child.start()
        assert [faults.join_or_kill(child) for child in children] == [0, 0]
        assert which(path, OLD_NEW) in ("old", "new")
        assert names(path) == names_of_one(path)


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    with snapshot.lock_directory(tmp_path, 0.0):
        child = FORK.Process(target=time.sleep, args=(faults.CHILD_TIMEOUT_SECONDS,), daemon=True)
        child.start()
    make(2.0).save(tmp_path)
    child.kill()
    child.join()


def test_a_lock_is_released_while_a_forked_child_has_a_copy_of_it(tmp_path: Path) -> None:
    with snapshot.lock_directory(tmp_path, 0.0):
        copies = [os.dup(descriptor) for descriptor in snapshot_lock._lock_descriptors]
    assert copies
    make(2.0).save(tmp_path)
    for descriptor in copies:
        os.close(descriptor)


@pytest.mark.slow
def test_loads_during_saves_return_complete_stores(tmp_path: Path) -> None:
    holds(faults.load_during_saves, tmp_path, {"a whole store": 10}, seconds=1.0)


def loaded_whole(path: Path) -> bool:
    return which(path, OLD_NEW) == "new"


def examined_whole(path: Path) -> bool:
    return snapshot.examine_snapshot(path).is_whole


@pytest.mark.parametrize("look_at", [loaded_whole, examined_whole])
def test_a_load_retries_if_a_save_replaces_the_manifest(
    look_at: Callable[[Path], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1.0).save(tmp_path)
    look, left = snapshot_reader.read_manifest, [2]

    def slow_look(file: Path) -> Any:
        found = look(file)
        if left[0]:
            left[0] -= 1
            make(2.0).save(tmp_path)
        return found

    for module in (snapshot_reader, snapshot_examine):
        monkeypatch.setattr(module, "read_manifest", slow_look)
    assert look_at(tmp_path)
    assert left == [0]


def test_saving_does_not_need_to_read_the_parent_directory(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def refuse(step: Step) -> None:
        if step.path == tmp_path:
            raise PermissionError(errno.EACCES, "no")

    path.mkdir()
    with faults.hooks(path, refuse):
        make(2.0).save(path)
    assert which(path, OLD_NEW) == "new"


# -- names -----------------------------------------------------------------------------------------------


def test_the_next_save_removes_files_left_by_a_crash(tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    (tmp_path / "keys-9.safetensors").write_bytes(b"half")
    (tmp_path / "manifest.json-9").write_bytes(b"half")
    (tmp_path / "manifest.json-mine").write_bytes(b"another program's")
    assert which(tmp_path, OLD_NEW) == "old"
    make(2.0).save(tmp_path)
    assert which(tmp_path, OLD_NEW) == "new"
    assert names(tmp_path) == sorted([*names_of_one(tmp_path), "manifest.json-mine"])


@pytest.mark.parametrize("name", ["manifest.json-2", f"keys-{10**18 - 1}.safetensors", "keys-2.safetensors"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_a_save_avoids_the_names_of_existing_files(name: str, kind: str, tmp_path: Path) -> None:
    make(1.0).save(tmp_path)
    if kind == "directory":
        (tmp_path / name).mkdir()
    elif kind == "link":
        (tmp_path / name).symlink_to("nowhere")
    else:
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        make(2.0).save(tmp_path)
        assert which(tmp_path, OLD_NEW) == "new"
    assert names(tmp_path) == sorted({*names_of_one(tmp_path), *([name] if kind == "directory" else [])})


def test_fields_with_any_identifier_can_be_saved(tmp_path: Path) -> None:
    fields = ("größe", "time", "Time", "TIME", "время", "Größe", "f" * 300, "F" * 300)
    store = SoftKVStore(4, 3, fields=fields)
    store.add(torch.ones(2, 4), torch.ones(2, 3), fields={name: [n, 7] for n, name in enumerate(fields)})
    for _ in range(2):
        store.save(tmp_path)
    loaded = SoftKVStore.load(tmp_path)
    assert faults.contents(loaded) == faults.contents(store)
    assert names(tmp_path) == names_of_one(tmp_path)
    assert len({name.lower() for name in names(tmp_path)}) == len(names(tmp_path))
    assert all(name.isascii() and len(name) < 128 for name in names(tmp_path))


def test_a_store_that_could_not_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(1.0).save(tmp_path)
    before = faults.content_of(tmp_path)
    largest = len(before["manifest.json"]) + 10
    monkeypatch.setattr(Sizes, "default", lambda: Sizes(manifest=largest))
    with pytest.raises(softdb.ArgumentError, match="a manifest of at most"):
        SoftKVStore(4, 3, fields=tuple(f"f{n}" for n in range(9))).save(tmp_path)
    assert faults.content_of(tmp_path) == before


# -- writes that memory or an interrupt breaks off --------------------------------------------------------

FULL: dict[str, Any] = {"trainable": True, "capacity": 6, "evict": "oldest", "track_usage": True}
OTHERS = {options.get("evict"): make(3.0, rows=5, **options).state_dict() for options in ({}, FULL)}
ROWS = (torch.full((3, 4), 5.0), torch.full((3, 3), 6.0))
CHANGES: dict[str, Callable[[SoftKVStore], object]] = {
    "add": lambda store: store.add(*ROWS, fields={"time": 9}),
    "put": lambda store: store.put([0, 50, 2], *ROWS, fields={"time": 9}),
    "update": lambda store: store.update([0, 1, 2], *ROWS, fields={"time": 9}),
    "revive": lambda store: store.revive([0, 1, 2], *ROWS),
    "delete": lambda store: store.delete([0, 1, 2]),
    "clear": lambda store: store.clear(),
    "touch": lambda store: store.touch([0, 1]),
    "load_state_dict": lambda store: store.load_state_dict(OTHERS[store.evict]),
}
# What a write does once it is recorded; each is made to fail, at one call after the other.
STEPS: tuple[tuple[Any, str], ...] = (
    (SlotTable, "remove"),
    (SlotTable, "put"),
    (RowStorage, "writable_buffer"),
    (RowStorage, "reset_usage"),
    (RowStorage, "mark_written"),
    (RowStorage, "apply_plan"),
    (RowStorage, "derive"),
    (ChangeLog, "record"),
    (RecordedVersions, "record"),
    (Table, "install"),
    (Table, "clear"),
    (Table, "_put"),
    (Table, "_drop_gradients"),
    (softdb.interop.state_dict, "_load_rows"),
)
SHORTAGES: dict[str, type[BaseException]] = {"memory": MemoryError, "interrupt": KeyboardInterrupt}


def state_of(store: SoftKVStore) -> dict[str, Any]:
    """Return everything that a write may change, except the clocks."""
    rows = store.get(store.ids)
    numbers = torch.cat([rows.keys, rows.values, rows.fields["time"].unsqueeze(-1)], dim=-1)
    found = dict(zip(store.ids.tolist(), numbers.tolist(), strict=True))
    return {"rows": found, "next id": int(store.rows.next_id)}


class Failing:
    """Step of a write whose calls fail: ``times`` calls, starting with call number ``at``."""

    def __init__(
        self, patch: pytest.MonkeyPatch, step: tuple[Any, str], at: int, times: int, failure: type[BaseException]
    ) -> None:
        self.calls, self.at, self.times = 0, at, times
        original = getattr(*step)

        def failing(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.at <= self.calls < self.at + self.times:
                raise failure
            return original(*args, **options)

        patch.setattr(*step, failing)


@pytest.mark.slow
@pytest.mark.parametrize("shortage", SHORTAGES)
@pytest.mark.parametrize("options", [{}, FULL], ids=["growing", "full"])
@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupted_write_is_completed_or_changes_nothing(
    name: str, options: dict[str, Any], shortage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one failure, the call returns with all rows written, or raises an error that describes the state."""
    change, outcomes = CHANGES[name], set()
    whole = make(1.0, rows=6, **options)
    change(whole)
    for step in STEPS:
        for at in range(1, 4):
            store = make(1.0, rows=6, **options)
            before, completed = state_of(store), False
            with monkeypatch.context() as patch:
                failing = Failing(patch, step, at, 1, SHORTAGES[shortage])
                try:
                    change(store)
                    completed = True
                except MemoryError:
                    assert shortage == "memory"
                except KeyboardInterrupt as error:
                    completed = "has been completed" in str(error)
            if failing.calls < at:
                break
            assert state_of(store) == (state_of(whole) if completed else before), f"{step}, call {at}"
            store._check()
            store.delete(store.ids[:1])
            store._check()
            outcomes.add(completed)
    if name != "touch":
        assert True in outcomes


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FULL], ids=["growing", "full"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_error_of_an_unfinished_write_says_that_it_is_recorded(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every later call fails too, the error says what the next use of the store does, and the store does it."""
    change, recorded = CHANGES[name], 0
    whole = make(1.0, rows=6, **options)
    change(whole)
    for step in STEPS:
        for failure in (MemoryError, KeyboardInterrupt):
            store = make(1.0, rows=6, **options)
            before = state_of(store)
            with monkeypatch.context() as patch:
                failing = Failing(patch, step, 1, 100, failure)
                try:
                    change(store)
                    said = None
                except (softdb.UnfinishedWriteError, MemoryError, KeyboardInterrupt) as error:
                    said = str(error)
            failing.times = 0  # the write that is recorded may refer to it
            if not failing.calls:
                continue
            is_written = said is None or "the next use of the store completes" in said
            recorded += is_written and said is not None
            is_written = is_written or "the write has been completed" in str(said)
            assert state_of(store) == (state_of(whole) if is_written else before), step
            store._check()
    if name != "touch":
        assert recorded


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_interrupted_growth_adds_no_rows(failure: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage may be larger at the next use; the rows of the failed call are never added."""
    many = torch.ones(90, 4), torch.ones(90, 3)
    calls: list[Callable[[SoftKVStore], object]] = [
        lambda store: store.add(*many, fields={"time": 9}),
        lambda store: store.put(torch.arange(3, 93), *many, fields={"time": 9}),
        lambda store: store.reserve(100),
    ]
    for call in calls:
        store = make(1.0, rows=6)
        before = state_of(store)
        with monkeypatch.context() as patch:
            Failing(patch, (Table, "install"), 1, 100, failure)
            with pytest.raises(failure) as caught:
                call(store)
        if failure is KeyboardInterrupt:
            assert "the next use of the store resizes the storage" in str(caught.value)
        assert state_of(store) == before
        assert store.rows.capacity >= 90
        store._check()
        call(store)
        store._check()


def test_reserve_retries_after_one_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    for failure in (MemoryError, KeyboardInterrupt):
        store = make(1.0, rows=6)
        with monkeypatch.context() as patch:
            Failing(patch, (Table, "install"), 1, 1, failure)
            try:
                store.reserve(100)
                said = "the storage has been resized"
            except KeyboardInterrupt as error:
                said = str(error)
        assert "the storage has been resized" in said
        assert store.keys.shape[0] == 100
        store._check()


@pytest.mark.parametrize("options", [{"trainable": True}, FULL], ids=["free", "full"])
@pytest.mark.parametrize("step", [(Table, "install"), (RowStorage, "derive"), (RecordedVersions, "record")], ids=str)
@pytest.mark.parametrize("times", [1, 100])
def test_an_interrupted_compaction_is_completed(
    step: tuple[Any, str], options: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure in (MemoryError, KeyboardInterrupt):
        store = make(1.0, rows=6, **options)
        optimizer = RowAdam(store.parameters(), lr=0.1)
        store.read(torch.ones(4)).values.sum().backward()
        optimizer.step()
        store.delete(store.ids[1:3])
        rows, moments = state_of(store), optimizer.state[store.values]["exp_avg"][store.rows.live_slots()]
        gradient = store.values.grad[store.rows.live_slots()]
        with monkeypatch.context() as patch:
            Failing(patch, step, 1 if step[0] is Table else 2, times, failure)
            with suppress(MemoryError, KeyboardInterrupt):
                store.compact()
        assert state_of(store) == rows
        store._check()
        assert store.rows.used == len(store) == 4
        assert torch.equal(store.values.grad[:4], gradient)
        assert torch.equal(optimizer.state[store.values]["exp_avg"][:4], moments)


def test_materialize_can_be_repeated_after_it_runs_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1.0).save(tmp_path)
    store = SoftKVStore.load(tmp_path, mmap=True)
    with monkeypatch.context() as patch:
        Failing(patch, (Table, "install"), 1, 1, MemoryError)
        store.materialize()
    store.add(torch.ones(1, 4), torch.ones(1, 3), fields={"time": 9})
    store = SoftKVStore.load(tmp_path, mmap=True)
    with monkeypatch.context() as patch:
        Failing(patch, (Table, "install"), 1, 100, MemoryError)
        with pytest.raises(MemoryError):
            store.materialize()
    store.materialize()
    store.add(torch.ones(1, 4), torch.ones(1, 3), fields={"time": 9})
    store._check()
