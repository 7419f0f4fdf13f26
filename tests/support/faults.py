"""Faults of processes, disks and files: what the tests and ``scripts/faults`` do to snapshots.

A campaign does one kind of harm many times and notes in a `Report` what came of it. Whatever is not allowed is a
violation; nothing else about an outcome is an error of the campaign.
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
# No child of a campaign takes longer; one that does is a violation.
PATIENCE = 60.0
# As many bytes are written at a time, that small files are of several parts, too.
PART = 1024


@dataclass
class Report:
    """What came of a campaign."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    progress: Callable[[Report], None] = field(default=lambda report: None, repr=False)

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def note(self, outcome: str, allowed: Iterable[str], what: str) -> bool:
        """Count an outcome; whether it is one of those that are allowed."""
        fine = outcome in allowed
        if not fine:
            self.violations.append(f"{what}: {outcome}, not {' or '.join(allowed)}")
        self.outcomes[outcome if len(outcome) < 40 else outcome[:36] + " ..."] += 1
        self.progress(self)
        return fine

    def check(self, condition: bool, what: str) -> None:
        if not condition:
            self.violations.append(what)


# -- stores ----------------------------------------------------------------------------------------------


def make(number: float = 1.0, rows: int = 12, width: int = 4, **options: Any) -> SoftKVStore:
    """A store that ``number`` tells from others; their files are of the same sizes."""
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(width, 3, fields=("time",), **options)
    keys = torch.randn(rows, width, generator=generator)
    store.add(keys, torch.full((rows, 3), float(number)), fields={"time": torch.arange(rows)})
    return store


def contents(store: SoftKVStore) -> dict[str, Any]:
    """All that there is to know of a store; two with equal contents are equal."""
    used = store.rows.used
    found: dict[str, Any] = {"options": store.extra_repr(), "index": asdict(store._index.config)}
    for name, tensor in store.state_dict().items():
        part = (tensor[:used] if tensor.dim() else tensor).detach().cpu().contiguous()
        found[name] = (part.dtype, tuple(part.shape), part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def which(path: Path, stores: Mapping[str, SoftKVStore]) -> str:
    """Which of the stores is in the directory; or "corrupt", "missing", or what else came of loading it."""
    try:
        found = contents(SoftKVStore.load(path))
    except CorruptSnapshotError:
        return "corrupt"
    except FileNotFoundError:
        return "missing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return next((name for name, store in stores.items() if contents(store) == found), "a store of nobody's")


def content_of(path: Path) -> dict[str, bytes]:
    """The bytes of every regular file in a directory, unless it is huge, and what others are."""
    found = {}
    for file in sorted(path.iterdir()):
        state = file.lstat()
        readable = stat.S_ISREG(state.st_mode) and state.st_size < 2**26
        found[file.name] = file.read_bytes() if readable else b"mode %o, size %d" % (state.st_mode, state.st_size)
    return found


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def names_of_one(path: Path) -> list[str]:
    """What belongs to the snapshot in the directory."""
    listed = json.loads((path / "manifest.json").read_bytes())["snapshot"]["tensors"]
    return sorted([".lock", "manifest.json", *(one["file"] for one in listed)])


def fill(path: Path, content: Mapping[str, bytes] | None) -> None:
    """Make the directory hold these files and no other; None for no directory."""
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
    """Whatever has happened, the next save works, is loaded, and leaves nothing behind."""
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
    """One operation on files."""

    kind: str  # "mkdir", "create", "open", "write", "fsync", "rename" or "unlink"
    path: Path
    content: bytes = b""
    target: Path | None = None
    start: int = 0  # where in the file the content goes

    def __str__(self) -> str:
        return f"{self.kind} {self.path.name}"


# Is told of a step before it is taken, and may raise, or end the process. Of a write it may return how many bytes are
# written: the system may always write fewer.
Before = Callable[[Step], "int | None"]


class _Hooks:
    """Stand between `softdb.snapshot` and the system, for ``root``, what is in it, and what it is in."""

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
        step = Step("write", self.paths[descriptor], bytes(content[:PART]), start=start)
        if self.lost(step):
            return len(step.content)
        limit = self.before(step)
        written: int = self.pwrite(descriptor, step.content[: PART if limit is None else limit], start)
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
            self.mkdir(path, mode, **options)  # is no step: it fails
        self.around(Step("mkdir", Path(path)), lambda: self.mkdir(path, mode, **options))


@contextmanager
def hooks(
    root: Path,
    before: Before = lambda step: None,
    after: Callable[[Step], None] = lambda step: None,
    lost: Callable[[Step], bool] = lambda step: False,
) -> Iterator[None]:
    """Tell of every operation on files that a save does; ``lost`` ones are left out as if nobody had asked for them."""
    made = _Hooks(root, before, after, lost)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(writer, "open", made.hooked_file, create=True))
        for name, function in {
            "open": made.hooked_open,
            "pwrite": made.hooked_write,
            "fsync": made.hooked_fsync,
            "replace": made.hooked_rename,
            "rename": made.hooked_rename,
            "unlink": made.hooked_unlink,
            "remove": made.hooked_unlink,
            "mkdir": made.hooked_mkdir,
        }.items():
            stack.enter_context(mock.patch.object(os, name, function))
        if sys.version_info < (3, 11):  # whose pathlib has got hold of the functions themselves
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
    """Save, and list the operations."""
    steps: list[Step] = []
    with hooks(path, after=steps.append, lost=lost):
        store.save(path)
    return steps


def swap_of(steps: Sequence[Step]) -> int:
    """At which step the old snapshot gives way to the new one."""
    return next(number for number, step in enumerate(steps) if step.kind == "rename")


def start(folder: Path, name: str = "store") -> tuple[Path, dict[str, bytes], dict[str, SoftKVStore], list[Step]]:
    """A path with a snapshot, its files, the old store and the new one, and what a save of the new one does."""
    path, stores = folder / name, {"old": make(1.0), "new": make(2.0)}
    fill(path, None)
    stores["old"].save(path)
    before = content_of(path)
    steps = record(path, stores["new"])
    fill(path, before)
    return path, before, stores, steps


# -- processes that are killed ---------------------------------------------------------------------------


def ends(child: Any) -> int | None:
    """The exit code of a child; None if it does not end by itself."""
    child.join(PATIENCE)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return int(child.exitcode)


def _at_once(descriptor: int) -> None:
    """In the place of fsync."""


def no_waiting() -> Any:
    """While it lasts, fsync does nothing."""
    return mock.patch.object(os, "fsync", _at_once)


def unsynced(campaign: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """A campaign for which it is no matter what is on the disk and what in the system's memory, but fsync is slow."""

    @functools.wraps(campaign)
    def quick(*args: Arguments.args, **options: Arguments.kwargs) -> Returned:
        with no_waiting():
            return campaign(*args, **options)

    return quick


@unsynced
def kills_at_every_step(report: Report, folder: Path, *, every: int = 1) -> None:
    """End the process that saves before each operation, and in the middle of each write."""
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
        report.check(ends(child) == -signal.SIGKILL, f"{what}: the child ended by {child.exitcode}")
        report.note(which(path, stores), ["old" if number <= swap else "new"], what)
        save_again(path, report, what)


class Saver:
    """A process that saves store after store to one path, and says which it begins and which it has done.

    The stores have ``rows`` rows of 64 numbers, and the number of the save in all their values.
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
            store.save(self.path, timeout=PATIENCE)
            os.write(writer, struct.pack("<?q", True, number))

    def listen(self) -> None:
        """Learn what it has said so far."""
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
        """Until it has saved ``number`` times; whether it has."""
        end = time.monotonic() + PATIENCE
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
        """Which save this is; None if it is no whole one."""
        number = int(loaded.values[0, 0])
        whole = torch.equal(loaded.keys, self.keys) and bool((loaded.values == number).all())
        whole = (
            whole and torch.equal(loaded.ids, torch.arange(len(self.keys))) and loaded.rows.first_new_id == len(loaded)
        )
        return number if whole else None


def random_kills(report: Report, folder: Path, *, kills: int, seed: int, rows: int = 20_000) -> None:
    """End a process that saves some megabytes, at any moment."""
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
        if number % 20 == 0 and saver.wait(last + 2):  # how long a save takes here
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


# -- disks that fail -------------------------------------------------------------------------------------


@unsynced
def errors_at_every_step(report: Report, folder: Path, *, codes: Sequence[int], sticky: bool) -> None:
    """Let each operation fail, once, or with all that follow; the codes take turns."""
    path, before, stores, steps = start(folder)
    swap, new = swap_of(steps), contents(stores["new"])
    for number in range(len(steps)):
        code = codes[number % len(codes)]
        what = f"{errno.errorcode[code]} at step {number}, {steps[number]}{', and ever after' if sticky else ''}"
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
        # Old files are opened to say that the system need not remember them: it may decline.
        declined = steps[number].kind == "open" and steps[number].path.suffix == ".safetensors" and not sticky
        harmless = declined or steps[number].kind == "unlink"
        report.check(said == ("saved" if harmless else f"error {code}"), f"{what}: {said}")
        found = which(path, stores)
        report.note(found, ["old"] if number <= swap and not declined else ["new"], what)
        if number <= swap and not sticky and not declined:
            report.check(content_of(path) == before, f"{what}: leaves {names(path)}")
        report.check(contents(stores["new"]) == new, f"{what}: the store in memory has changed")
        save_again(path, report, what)


# -- power that fails ------------------------------------------------------------------------------------


class _Inode:
    """A file's bytes, whatever its name, and how many of them are durable."""

    def __init__(self, content: bytes, durable: int) -> None:
        self.content, self.durable = content, durable

    def versions(self, chance: random.Random) -> list[bytes]:
        """What may be left of it: all, what is durable, zeros for the rest, or a part of it."""
        if self.durable == len(self.content):
            return [self.content]
        kept, left = self.content[: self.durable], len(self.content) - self.durable
        cut = self.content[: self.durable + chance.randrange(left)]
        torn = self.content[: self.durable + left // 2] + bytes(left - left // 2)
        return [self.content, kept, kept + bytes(left), cut, torn]


class _Entry(NamedTuple):
    """A change to a directory: the name ``gone`` goes, and the name ``come`` leads to the inode."""

    gone: str | None
    come: str | None
    inode: _Inode | None


def states_after(
    before: Mapping[str, bytes] | None, steps: Sequence[Step], root: Path, chance: random.Random, subsets: int = 6
) -> Iterator[dict[str, bytes] | None]:
    """The directories that a power failure after these steps may leave; None for no directory.

    The data of a file last once it is synced, its name once the directory is. Until then any of the changes may have
    come to the disk, and the others not.
    """
    there = {name: _Inode(content, len(content)) for name, content in (before or {}).items()}
    lasting, pending = dict(there), list[_Entry]()
    made = before is not None
    for step in steps:
        name = step.path.name
        if step.kind == "create":
            there[name] = _Inode(b"", 0)
            pending.append(_Entry(None, name, there[name]))
        elif step.kind == "write":
            content, end = there[name].content.ljust(step.start, b"\0"), step.start + len(step.content)
            there[name].content = content[: step.start] + step.content + content[end:]
        elif step.kind == "fsync" and step.path == root.parent:
            made = True
        elif step.kind == "fsync" and step.path == root:
            lasting, pending = dict(there), []
        elif step.kind == "fsync":
            there[name].durable = len(there[name].content)
        elif step.kind == "unlink":
            there.pop(name)
            pending.append(_Entry(name, None, None))
        elif step.kind == "rename" and step.target is not None:
            there[step.target.name] = there.pop(name)
            pending.append(_Entry(name, step.target.name, there[step.target.name]))
    if not made:
        yield None
    numbers = range(len(pending))
    chosen = [set[int](), set(numbers), *({number} for number in numbers), *(set(numbers) - {n} for n in numbers)]
    chosen += [set(range(number)) for number in numbers]  # in order, as a journal has them
    chosen += [{number for number in numbers if chance.random() < 0.5} for _ in range(subsets if pending else 0)]
    for subset in {frozenset(one) for one in chosen}:
        listed = dict(lasting)
        for number in sorted(subset):
            gone, come, inode = pending[number]
            if gone is not None:
                listed.pop(gone, None)
            if come is not None and inode is not None:
                listed[come] = inode
        versions = {name: inode.versions(chance) for name, inode in sorted(listed.items())}
        for number in range(5):  # all files alike
            yield {name: options[min(number, len(options) - 1)] for name, options in versions.items()}
        unsure = [name for name, options in versions.items() if len(options) > 1]
        for name in unsure if len(unsure) > 1 else ():  # one alone
            for option in versions[name][1:]:
                yield {other: options[0] for other, options in versions.items()} | {name: option}
        for _ in range(subsets if len(unsure) > 1 else 0):
            yield {name: chance.choice(options) for name, options in versions.items()}


@unsynced
def power_failures(
    report: Report,
    folder: Path,
    *,
    place: str = "a snapshot",
    lost: Callable[[Step], bool] = lambda step: False,
    seed: int = 0,
    again: int = 1,
    subsets: int = 6,
    patient: bool = True,
) -> list[Step]:
    """Cut the power after each operation of a save to a ``place`` with "a snapshot", "nothing", or "a directory".

    Such a directory is empty, and nobody has made its name durable. Each state of the disk is loaded: it is the old
    store until the manifest is swapped, then the old or the new one, and the new one once the save has returned.
    ``lost`` operations are left out of the save, which shows what they are good for. In one of ``again`` states there
    is saved once more. Unless ``patient``, ends with the first violation.
    """
    chance = random.Random(seed)
    work = folder / "disk"
    work.mkdir()
    path, before, stores, _ = start(work)
    there = before if place == "a snapshot" else None
    fill(path, there if place != "a directory" else {})
    steps = record(path, stores["new"], lost)
    after = content_of(path)
    complete = any(state == after for state in states_after(there, steps, path, random.Random(0)))
    report.check(complete, f"the operations that were seen do not explain the directory {names(path)}")
    swap, old = swap_of(steps), "missing" if there is None else "old"
    tried: set[tuple[Any, ...]] = set()
    for count in reversed(range(len(steps) + 1)):
        allowed = ["new"] if count == len(steps) else [old, "new"] if count > swap else [old]
        for state in states_after(there, steps[:count], path, chance, subsets):
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
            if report.violations and not patient:
                return steps
    return steps


# -- several processes -----------------------------------------------------------------------------------


def loads_beside_saves(report: Report, folder: Path, *, seconds: float, rows: int = 500) -> None:
    """Load again and again while another process saves: each is a whole store, and none goes back in time."""
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
            report.note(outcome, ["a whole store"], "a load beside saves")
        report.check(saver.done > 1, "the other process did not save meanwhile")
    finally:
        saver.kill()
