"""Fault injection for snapshots: killed processes, failing disks, power failures.

The tests and ``scripts/faults`` run it. A campaign injects one kind of fault many times and counts the outcomes in a
`Report`. An outcome that is not allowed is a violation.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar
from unittest import mock

import torch

from softdb import CorruptSnapshotError, SoftKVStore
from softdb.snapshot import writer

Arguments, Returned = ParamSpec("Arguments"), TypeVar("Returned")
FORK = multiprocessing.get_context("fork")
# Time limit of a child process; exceeding it is a violation.
CHILD_TIMEOUT_SECONDS = 60.0
# Bytes per write. It is small, so that small files are written in several parts too.
WRITE_BYTES = 1024


@dataclass
class Report:
    """Outcomes and violations of a campaign."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    progress: Callable[[Report], None] = field(default=lambda report: None, repr=False)

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def note(self, outcome: str, allowed: Iterable[str], what: str) -> bool:
        """Count an outcome; return whether it is allowed."""
        is_allowed = outcome in allowed
        if not is_allowed:
            self.violations.append(f"{what}: {outcome}, not {' or '.join(allowed)}")
        self.outcomes[outcome if len(outcome) < 40 else outcome[:36] + " ..."] += 1
        self.progress(self)
        return is_allowed

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            self.violations.append(what)


# -- stores ----------------------------------------------------------------------------------------------


def make(number: float = 1.0, rows: int = 12, width: int = 4, **options: Any) -> SoftKVStore:
    """Create a store with values equal to ``number``; file sizes do not depend on it."""
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(width, 3, fields=("time",), **options)
    keys = torch.randn(rows, width, generator=generator)
    store.add(keys, torch.full((rows, 3), float(number)), fields={"time": torch.arange(rows)})
    return store


def contents(store: SoftKVStore) -> dict[str, Any]:
    """Return the complete contents of a store, for comparison."""
    used = store.rows.used
    found: dict[str, Any] = {"options": store.extra_repr(), "index": asdict(store._index.config)}
    for name, tensor in store.state_dict().items():
        part = (tensor[:used] if tensor.dim() else tensor).detach().cpu().contiguous()
        found[name] = (part.dtype, tuple(part.shape), part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


@functools.lru_cache(maxsize=16)
def contents_at_first(store: SoftKVStore) -> dict[str, Any]:
    """Return the contents of a store at the first call; campaigns compare the same stores many times."""
    return contents(store)


def which(path: Path, stores: Mapping[str, SoftKVStore]) -> str:
    """Load a directory; return the name of the equal store, or "corrupt", "missing" or another error."""
    try:
        found = contents(SoftKVStore.load(path))
    except CorruptSnapshotError:
        return "corrupt"
    except FileNotFoundError:
        return "missing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((name for name, store in stores.items() if contents_at_first(store) == found), "an unknown store")


def content_of(path: Path) -> dict[str, bytes]:
    """Return the bytes of regular files in a directory, and mode and size of huge and other files."""
    found = {}
    for file in sorted(path.iterdir()):
        state = file.lstat()
        readable = stat.S_ISREG(state.st_mode) and state.st_size < 2**26
        found[file.name] = file.read_bytes() if readable else b"mode %o, size %d" % (state.st_mode, state.st_size)
    return found


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def names_of_one(path: Path) -> list[str]:
    """Return the names of the files of the snapshot in a directory."""
    listed = json.loads((path / "manifest.json").read_bytes())["snapshot"]["tensors"]
    return sorted([".lock", "manifest.json", *(one["file"] for one in listed)])


def fill(path: Path, content: Mapping[str, bytes] | None) -> None:
    """Make a directory contain exactly these files; None removes the directory."""
    if content is None:
        shutil.rmtree(path, ignore_errors=True)
        return
    path.mkdir(exist_ok=True)
    for file in list(path.iterdir()):
        if file.name not in content:
            file.unlink()
    for name, data in content.items():
        file = path / name
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)


def save_again(path: Path, report: Report, what: str) -> None:
    """Check that the next save succeeds, can be loaded, and leaves no other files."""
    third = make(3.0)
    try:
        third.save(path)
    except Exception as error:
        report.violations.append(f"{what}: the next save: {type(error).__name__}: {error}")
        return
    found = which(path, {"third": third})
    report.check(found == "third", f"{what}: after the next save: {found}")
    report.check(names(path) == names_of_one(path), f"{what}: the next save leaves {names(path)}")


# -- every operation on files ----------------------------------------------------------------------------


class Step(NamedTuple):
    """Operation on a file or directory."""

    kind: str  # "mkdir", "create", "open", "write", "fsync", "rename" or "unlink"
    path: Path
    content: bytes = b""
    target: Path | None = None
    start: int = 0  # offset of the content in the file

    def __str__(self) -> str:
        return f"{self.kind} {self.path.name}"


# Callback before a step, which may raise or end the process. For a write, it may return the number of bytes to write,
# since the system may write fewer than requested.
Before = Callable[[Step], "int | None"]


class _Hooks:
    """Wrappers of the system calls of `softdb.snapshot` for ``root``, its files and its parent."""

    def __init__(self, root: Path, before: Before, after: Callable[[Step], None], lost: Callable[[Step], bool]) -> None:
        self.root, self.before, self.after, self.lost = root, before, after, lost
        self.paths: dict[int, Path] = {}
        self.open_descriptor, self.open_file = os.open, open
        self.pwrite = os.pwrite
        self.fsync, self.rename, self.unlink, self.mkdir = os.fsync, os.replace, os.unlink, os.mkdir

    def around(self, step: Step, act: Callable[[], Any]) -> Any:
        if step.path not in (self.root, self.root.parent) and self.root not in step.path.parents:
            return act()
        if self.lost(step):
            return None
        self.before(step)
        result = act()
        self.after(step)
        return result

    def hooked_open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        kind = "create" if flags & os.O_CREAT and not os.path.lexists(path) else "open"
        step = Step(kind, Path(path))
        descriptor: int = self.around(step, lambda: self.open_descriptor(path, flags, mode, **options))
        self.paths[descriptor] = step.path
        return descriptor

    def hooked_file(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "x" not in mode:
            return self.open_file(path, mode, *args, **options)
        file = self.around(Step("create", Path(path)), lambda: self.open_file(path, mode, *args, **options))
        self.paths[file.fileno()] = Path(path)
        return file

    def hooked_write(self, descriptor: int, content: Any, start: int) -> int:
        step = Step("write", self.paths[descriptor], bytes(content[:WRITE_BYTES]), start=start)
        if self.lost(step):
            return len(step.content)
        limit = self.before(step)
        written: int = self.pwrite(descriptor, step.content[: WRITE_BYTES if limit is None else limit], start)
        self.after(step._replace(content=step.content[:written]))
        return written

    def hooked_fsync(self, descriptor: int) -> None:
        self.around(Step("fsync", self.paths.get(descriptor, Path())), lambda: self.fsync(descriptor))

    def hooked_rename(self, source: Any, target: Any, **options: Any) -> None:
        step = Step("rename", Path(source), target=Path(target))
        self.around(step, lambda: self.rename(source, target, **options))

    def hooked_unlink(self, path: Any, **options: Any) -> None:
        self.around(Step("unlink", Path(path)), lambda: self.unlink(path, **options))

    def hooked_mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        if os.path.exists(path):
            self.mkdir(path, mode, **options)  # fails, so it is not a step
        self.around(Step("mkdir", Path(path)), lambda: self.mkdir(path, mode, **options))


@contextmanager
def hooks(
    root: Path,
    before: Before = lambda step: None,
    after: Callable[[Step], None] = lambda step: None,
    lost: Callable[[Step], bool] = lambda step: False,
) -> Iterator[None]:
    """Call ``before`` and ``after`` around each file operation of a save; skip ``lost`` ones."""
    wrappers = _Hooks(root, before, after, lost)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(writer, "open", wrappers.hooked_file, create=True))
        for name, function in {
            "open": wrappers.hooked_open,
            "pwrite": wrappers.hooked_write,
            "fsync": wrappers.hooked_fsync,
            "replace": wrappers.hooked_rename,
            "rename": wrappers.hooked_rename,
            "unlink": wrappers.hooked_unlink,
            "remove": wrappers.hooked_unlink,
            "mkdir": wrappers.hooked_mkdir,
        }.items():
            stack.enter_context(mock.patch.object(os, name, function))
        if sys.version_info < (3, 11):  # its pathlib holds references to the functions
            stack.enter_context(mock.patch.object(Path, "unlink", lambda path: os.unlink(path)))
            stack.enter_context(mock.patch.object(Path, "mkdir", _mkdir))
        yield


def _mkdir(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not exist_ok:
            raise


def record(path: Path, store: SoftKVStore, lost: Callable[[Step], bool] = lambda step: False) -> list[Step]:
    """Save a store; return its file operations."""
    steps: list[Step] = []
    with hooks(path, after=steps.append, lost=lost):
        store.save(path)
    return steps


def swap_of(steps: Sequence[Step]) -> int:
    """Return the number of the step that replaces the old manifest by the new one."""
    return next(number for number, step in enumerate(steps) if step.kind == "rename")


def start(folder: Path, name: str = "store") -> tuple[Path, dict[str, bytes], dict[str, SoftKVStore], list[Step]]:
    """Save an old store; return path, files, old and new store, and the steps of a save of the new one."""
    path, stores = folder / name, {"old": make(1.0), "new": make(2.0)}
    fill(path, None)
    stores["old"].save(path)
    before = content_of(path)
    steps = record(path, stores["new"])
    fill(path, before)
    return path, before, stores, steps


# -- killed processes ------------------------------------------------------------------------------------


def join_or_kill(child: Any) -> int | None:
    """Return the exit code of a child; kill it after a timeout and return None."""
    child.join(CHILD_TIMEOUT_SECONDS)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return int(child.exitcode)


def _skip(descriptor: int) -> None:
    """Do nothing, instead of fsync."""


def skip_fsync() -> Any:
    """Return a context manager within which fsync does nothing."""
    return mock.patch.object(os, "fsync", _skip)


def skips_fsync(campaign: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Decorate a campaign that runs without fsync, which is slow and does not affect its outcomes."""

    @functools.wraps(campaign)
    def without_fsync(*args: Arguments.args, **options: Arguments.kwargs) -> Returned:
        with skip_fsync():
            return campaign(*args, **options)

    return without_fsync


@skips_fsync
def kills_at_every_step(report: Report, folder: Path, *, every: int = 1) -> None:
    """Kill a saving process before each operation, and in the middle of each write."""
    path, before, stores, steps = start(folder)
    swap = swap_of(steps)
    cases = [(number, False) for number in range(len(steps))]
    cases += [(number, True) for number, step in enumerate(steps) if step.kind == "write"]
    for number, halfway in cases[::every]:

        def saving(number: int = number, halfway: bool = halfway) -> None:
            seen = itertools.count()

            def kill(step: Step) -> int | None:
                now = next(seen)
                if now == number and halfway:
                    return len(step.content) // 2
                if now == number + halfway:
                    os.kill(os.getpid(), signal.SIGKILL)
                return None

            with hooks(path, kill):
                stores["new"].save(path)

        fill(path, before)
        child = FORK.Process(target=saving, daemon=True)
        child.start()
        what = f"killed {'in' if halfway else 'before'} step {number}, {steps[number]}"
        report.check(join_or_kill(child) == -signal.SIGKILL, f"{what}: the child ended by {child.exitcode}")
        report.note(which(path, stores), ["old" if number <= swap else "new"], what)
        save_again(path, report, what)


class Saver:
    """Process that saves stores repeatedly to one path, and reports when a save starts and ends.

    The stores have ``rows`` rows with keys of width 64. All their values are the number of the save.
    """

    def __init__(self, path: Path, rows: int, first: int = 0) -> None:
        self.path, self.keys = path, torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
        self.begun = self.done = first
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.process = FORK.Process(target=self._run, args=(writer,), daemon=True)
        self.process.start()
        os.close(writer)

    def store(self, number: int) -> SoftKVStore:
        store = SoftKVStore(64, 3)
        store.add(self.keys, torch.full((len(self.keys), 3), float(number)))
        return store

    def _run(self, writer: int) -> None:
        store = self.store(self.done)
        for number in itertools.count(self.done + 1):
            store.values.fill_(float(number))
            os.write(writer, struct.pack("<?q", False, number))
            store.save(self.path, timeout=CHILD_TIMEOUT_SECONDS)
            os.write(writer, struct.pack("<?q", True, number))

    def listen(self) -> None:
        """Process the reports of the child so far."""
        size = struct.calcsize("<?q")
        while True:
            try:
                said = os.read(self._reader, size)
            except BlockingIOError:
                return
            if not said:
                return
            done, number = struct.unpack("<?q", said)
            self.begun, self.done = (self.begun, number) if done else (number, self.done)

    def wait(self, number: int) -> bool:
        """Wait until save ``number`` is complete; return whether it is."""
        end = time.monotonic() + CHILD_TIMEOUT_SECONDS
        while self.done < number and time.monotonic() < end and self.process.is_alive():
            self.listen()
            time.sleep(0.001)
        return self.done >= number

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.listen()
        os.close(self._reader)

    def number_of(self, loaded: SoftKVStore) -> int | None:
        """Return the number of the save that a store comes from; None if it is inconsistent."""
        number = int(loaded.values[0, 0])
        whole = torch.equal(loaded.keys, self.keys) and bool((loaded.values == number).all())
        whole = (
            whole and torch.equal(loaded.ids, torch.arange(len(self.keys))) and loaded.rows.first_new_id == len(loaded)
        )
        return number if whole else None


def random_kills(report: Report, folder: Path, *, kills: int, seed: int, rows: int = 20_000) -> None:
    """Kill a process that saves some megabytes, at random times."""
    chance, path, last, lasts = random.Random(seed), folder / "store", 0, 0.05
    fill(path, None)
    for number in range(kills):
        saver = Saver(path, rows, last)
        what = f"random kill {number}"
        if not saver.wait(last + 1):
            report.violations.append(f"{what}: saving after the last kill does not work")
            saver.kill()
            return
        began = time.monotonic()
        if number % 20 == 0 and saver.wait(last + 2):  # measures the duration of a save
            lasts = time.monotonic() - began
        time.sleep(chance.uniform(0.0, 2.0 * lasts))
        saver.kill()
        within = saver.begun > saver.done
        try:
            found = saver.number_of(SoftKVStore.load(path))
        except Exception as error:
            report.note(f"{type(error).__name__}: {error}", ["the old store", "the new store"], what)
            last = saver.begun
            continue
        outcome = (
            {saver.done: "the old store", saver.begun: "the new store"} if within else {saver.done: "between saves"}
        )
        report.note(outcome.get(found if found is not None else -1, f"store {found}"), list(outcome.values()), what)
        last = saver.begun
        if number % 10 == 9:
            saver.store(last).save(path)
            report.check(names(path) == names_of_one(path), f"{what}: the next save leaves {names(path)}")


# -- failing disks ---------------------------------------------------------------------------------------


@skips_fsync
def errors_at_every_step(report: Report, folder: Path, *, codes: Sequence[int], sticky: bool) -> None:
    """Let each operation fail, alone or with all later ones, with alternating error codes."""
    path, before, stores, steps = start(folder)
    swap, new = swap_of(steps), contents(stores["new"])
    for number in range(len(steps)):
        code = codes[number % len(codes)]
        what = f"{errno.errorcode[code]} at step {number}, {steps[number]}{', and all later steps' if sticky else ''}"
        seen = itertools.count()

        def fail(step: Step, number: int = number, code: int = code, seen: Iterator[int] = seen) -> None:
            now = next(seen)
            if now == number or (sticky and now > number):
                raise OSError(code, "no")

        fill(path, before)
        try:
            with hooks(path, fail):
                stores["new"].save(path)
            said = "saved"
        except OSError as error:
            said = f"error {error.errno}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        # Old files are opened only to advise the system to drop its cache, which may fail without effect.
        declined = steps[number].kind == "open" and steps[number].path.suffix == ".safetensors" and not sticky
        harmless = declined or steps[number].kind == "unlink"
        report.check(said == ("saved" if harmless else f"error {code}"), f"{what}: {said}")
        found = which(path, stores)
        report.note(found, ["old"] if number <= swap and not declined else ["new"], what)
        if number <= swap and not sticky and not declined:
            report.check(content_of(path) == before, f"{what}: leaves {names(path)}")
        report.check(contents(stores["new"]) == new, f"{what}: the store in memory has changed")
        save_again(path, report, what)


# -- power failures --------------------------------------------------------------------------------------


class _Inode:
    """Bytes of a file, independent of its name, and the number of durable ones."""

    def __init__(self, content: bytes, durable: int) -> None:
        self.content, self.durable = content, durable

    def versions(self, chance: random.Random) -> list[bytes]:
        """Return possible contents after a power failure: complete, only durable, zero-padded, or cut."""
        if self.durable == len(self.content):
            return [self.content]
        kept, left = self.content[: self.durable], len(self.content) - self.durable
        cut = self.content[: self.durable + chance.randrange(left)]
        torn = self.content[: self.durable + left // 2] + bytes(left - left // 2)
        return [self.content, kept, kept + bytes(left), cut, torn]


class _Entry(NamedTuple):
    """Change to a directory: ``removed`` is unlinked, and ``added`` links to the inode."""

    removed: str | None
    added: str | None
    inode: _Inode | None


def states_after(
    before: Mapping[str, bytes] | None, steps: Sequence[Step], root: Path, chance: random.Random, subsets: int = 6
) -> Iterator[dict[str, bytes] | None]:
    """Yield the directories that a power failure after these steps may leave; None for no directory.

    The data of a file are durable once the file is synced; its name is durable once the directory is synced. Until
    then, any subset of the changes may have reached the disk.
    """
    present = {name: _Inode(content, len(content)) for name, content in (before or {}).items()}
    lasting, pending = dict(present), list[_Entry]()
    is_durable = before is not None
    for step in steps:
        name = step.path.name
        if step.kind == "create":
            present[name] = _Inode(b"", 0)
            pending.append(_Entry(None, name, present[name]))
        elif step.kind == "write":
            content, end = present[name].content.ljust(step.start, b"\0"), step.start + len(step.content)
            present[name].content = content[: step.start] + step.content + content[end:]
        elif step.kind == "fsync" and step.path == root.parent:
            is_durable = True
        elif step.kind == "fsync" and step.path == root:
            lasting, pending = dict(present), []
        elif step.kind == "fsync":
            present[name].durable = len(present[name].content)
        elif step.kind == "unlink":
            present.pop(name)
            pending.append(_Entry(name, None, None))
        elif step.kind == "rename" and step.target is not None:
            present[step.target.name] = present.pop(name)
            pending.append(_Entry(name, step.target.name, present[step.target.name]))
    if not is_durable:
        yield None
    numbers = range(len(pending))
    chosen = [set[int](), set(numbers), *({number} for number in numbers), *(set(numbers) - {n} for n in numbers)]
    chosen += [set(range(number)) for number in numbers]  # prefixes, as a journaling file system leaves
    chosen += [{number for number in numbers if chance.random() < 0.5} for _ in range(subsets if pending else 0)]
    for subset in {frozenset(one) for one in chosen}:
        listed = dict(lasting)
        for number in sorted(subset):
            removed, added, inode = pending[number]
            if removed is not None:
                listed.pop(removed, None)
            if added is not None and inode is not None:
                listed[added] = inode
        versions = {name: inode.versions(chance) for name, inode in sorted(listed.items())}
        for number in range(5):  # the same kind of content for all files
            yield {name: options[min(number, len(options) - 1)] for name, options in versions.items()}
        unsure = [name for name, options in versions.items() if len(options) > 1]
        for name in unsure if len(unsure) > 1 else ():  # only one file differs
            for option in versions[name][1:]:
                yield {other: options[0] for other, options in versions.items()} | {name: option}
        for _ in range(subsets if len(unsure) > 1 else 0):
            yield {name: chance.choice(options) for name, options in versions.items()}


@skips_fsync
def power_failures(
    report: Report,
    folder: Path,
    *,
    place: str = "a snapshot",
    lost: Callable[[Step], bool] = lambda step: False,
    seed: int = 0,
    again: int = 1,
    subsets: int = 6,
    stop_at_first: bool = False,
) -> list[Step]:
    """Simulate a power failure after each operation of a save.

    Each possible state of the disk is loaded. It must be the old store before the manifest is swapped, the old or the
    new store after the swap, and the new store once the save has returned.

    Args:
        report: The report.
        folder: An empty folder.
        place: The content of the path: "a snapshot", "nothing", or "a directory", which is empty and not durable.
        lost: Which operations to skip, to test that they are necessary.
        seed: The seed of the sampled states.
        again: The interval of states after which the store is saved again.
        subsets: The number of random states per step.
        stop_at_first: Whether to return at the first violation.

    Returns:
        The steps of the save.
    """
    chance = random.Random(seed)
    work = folder / "disk"
    work.mkdir()
    path, before, stores, _ = start(work)
    initial = before if place == "a snapshot" else None
    fill(path, initial if place != "a directory" else {})
    steps = record(path, stores["new"], lost)
    after = content_of(path)
    complete = any(state == after for state in states_after(initial, steps, path, random.Random(0)))
    report.check(complete, f"the recorded operations do not explain the directory {names(path)}")
    swap, old = swap_of(steps), "missing" if initial is None else "old"
    tried: set[tuple[Any, ...]] = set()
    for count in reversed(range(len(steps) + 1)):
        allowed = ["new"] if count == len(steps) else [old, "new"] if count > swap else [old]
        for state in states_after(initial, steps[:count], path, chance, subsets):
            key = (*allowed, None if state is None else tuple(sorted(state.items())))
            if key in tried:
                continue
            tried.add(key)
            fill(path, state)
            what = f"no power after {count} of {len(steps)} steps, {steps[count - 1] if count else 'none'}"
            report.note(
                which(path, stores), allowed, f"{what}, with {'no directory' if state is None else names(path)}"
            )
            if len(tried) % again == 0:
                save_again(path, report, what)
            if report.violations and stop_at_first:
                return steps
    return steps


# -- several processes -----------------------------------------------------------------------------------


def load_during_saves(report: Report, folder: Path, *, seconds: float, rows: int = 500) -> None:
    """Load repeatedly while another process saves: each load is consistent, and not older than the last save."""
    path = folder / "store"
    saver = Saver(path, rows)
    try:
        report.check(saver.wait(1), "the other process does not save")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            saver.listen()
            least = saver.done
            try:
                found = saver.number_of(SoftKVStore.load(path))
                saver.listen()
                whole = found is not None and least <= found <= saver.begun
                outcome = "a whole store" if whole else f"store {found} of {least} to {saver.begun}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            report.note(outcome, ["a whole store"], "a load during saves")
        report.check(saver.done > 1, "the other process did not save during the loads")
    finally:
        saver.kill()
