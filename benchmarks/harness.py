"""Measure softdb beside its peers: in one process, by turns, as ratios of medians.

A script describes its `Case`s and hands them to `main`; that is all it has to do. What is reported for each:

- the median time of a call, for every contestant. Rounds go on until the time for a case is spent; in each round
  every contestant has one turn, and the order rotates, so that a slow spell of the machine hits all of them;
- the ratio of softdb's median to each peer's;
- two floors, measured in the same rounds: the time that the arithmetic takes at the rate of a matrix product, and the
  time that the bytes take at the rate of reading memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Case", "Work", "compare", "main", "peak_memory", "without_graph"]

RESULTS = Path(__file__).parent / "results"
THREADS = 2
MINIMUM_ROUNDS = 5
# A turn that would be shorter repeats its call: the clock and the loop must not show.
TURN_SECONDS = 0.005
# Well beyond any cache.
BANDWIDTH_BYTES = 2**28

Contestant = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


# -- what a script describes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The least that any way of doing a case has to do: what its floors are made of.

    Attributes:
        operations: Floating-point operations; a multiplication and an addition are two.
        bytes: Bytes that have to come from memory.
        product: The sizes of the matrix product, (m, k) @ (k, n), whose rate stands for the machine's.
        dtype: What the product is computed in.
        device: Where both rates are measured.
    """

    operations: float
    bytes: float
    product: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """A piece of work and those who do it.

    Attributes:
        label: What is done, at which sizes.
        softdb: softdb's ways to do it, by name; each becomes a line of the table.
        peers: What they are compared with, by name. One that the machine cannot hold is left out.
        work: What the floors are made of; None for no floors.
        claims: The ratio that is promised, by (name among softdb's ways, name of the peer); the floors may be named as
            "product floor" and "memory floor".
        facts: What else to find out, once the times are taken: an error, a recall, a peak of memory, by name.
    """

    label: str
    softdb: Mapping[str, Contestant]
    peers: Mapping[str, Contestant]
    work: Work | None = None
    claims: Mapping[tuple[str, str], float] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, float]] | None = None


# -- what is done with it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds that a call takes: the median over the turns, and the quartiles about it."""

    median: float
    lower: float
    upper: float
    turns: int
    calls_per_turn: int


@dataclass(frozen=True)
class Line:
    """One line of the table, and of the JSON: one of softdb's ways to do one case.

    Attributes:
        label, way: Which case, and which way.
        time: What it took.
        peers: What the peers took.
        ratios: The way's median over each peer's, and over the floors.
        claims: The ratios that are promised.
        floors: Seconds that the arithmetic ("product") and the bytes ("memory") take at the machine's own rates.
        facts: What else was found out.
    """

    label: str
    way: str
    time: Timing
    peers: dict[str, Timing]
    ratios: dict[str, float]
    claims: dict[str, float]
    floors: dict[str, float]
    facts: dict[str, float]


def main(name: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """The command line of a benchmark script.

    Args:
        name: What the result is called.
        cases: Makes the cases; is told whether they shall be small.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=sys.modules["__main__"].__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; kept only with --out")
    parser.add_argument("--seconds", type=float, help="how long to measure each case (default: 10; small: 0.05)")
    parser.add_argument("--out", type=Path, help=f"the folder for {name}.json (default: benchmarks/results)")
    options = parser.parse_args()
    seconds = options.seconds or (0.05 if options.small else 10.0)
    out = options.out or (None if options.small else RESULTS)
    print(compare(name, cases(options.small), seconds=seconds, out=out))


def compare(name: str, cases: Iterable[Case], *, seconds: float = 10.0, out: Path | None = None) -> str:
    """Measure the cases one after the other; return the table, as aligned Markdown.

    Args:
        name: What the result is called.
        cases: May be a generator, so that only one case's tensors are held at a time.
        seconds: How long to measure each case; `MINIMUM_ROUNDS` rounds are made however long they take.
        out: The folder that NAME.json is written to; None writes nothing.
    """
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    machine = _machine()
    lines: list[Line] = []
    for case in cases:
        print(f"{name}: {case.label}", file=sys.stderr, flush=True)
        lines += _lines(case, seconds)
        del case  # its tensors make room for the next one's
        gc.collect()
    if out is not None:
        date = datetime.now(timezone.utc).date().isoformat()
        report = {"name": name, "date": date, "machine": machine, "lines": [asdict(line) for line in lines]}
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return _table(lines)


def without_graph(run: Contestant) -> Contestant:
    """The same, building no graph."""

    def call() -> object:
        with torch.no_grad():
            return run()

    return call


def peak_memory(run: Contestant) -> int:
    """How many bytes the process grows by while ``run`` runs, at the highest: resident memory, counted by the kernel.

    What ``run`` returns is part of it: subtract what is meant to be kept. So are libraries and buffers that a first
    call brings in: call ``run`` once before, unless they shall count. Linux only.
    """
    gc.collect()
    # Memory that was freed but is still held by the allocator would hide that it is needed again.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(counter: str) -> int:
    """A counter of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{counter}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {counter}")


# -- time --------------------------------------------------------------------------------------------------------------


def _lines(case: Case, seconds: float) -> list[Line]:
    contestants: dict[tuple[str, str], Contestant] = {}
    contestants.update({("softdb", name): run for name, run in case.softdb.items()})
    contestants.update({("peer", name): run for name, run in case.peers.items()})
    if case.work is not None:
        contestants["floor", "product"] = _product(case.work)
        contestants["floor", "memory"] = _memory(case.work)
    times = _measure(contestants, seconds)
    peers = {name: times["peer", name] for name in case.peers}
    floors = {}
    if case.work is not None:
        operations = 2 * math.prod(case.work.product)
        floors["product"] = case.work.operations / operations * times["floor", "product"].median
        floors["memory"] = case.work.bytes / BANDWIDTH_BYTES * times["floor", "memory"].median
    facts = {} if case.facts is None else dict(case.facts())
    lines = []
    for way in case.softdb:
        own = times["softdb", way]
        ratios = {name: own.median / peer.median for name, peer in peers.items()}
        ratios.update({f"{name} floor": own.median / floor for name, floor in floors.items()})
        claims = {name: limit for (claimed, name), limit in case.claims.items() if claimed == way}
        lines.append(Line(case.label, way, own, peers, ratios, claims, floors, facts))
    return lines


def _measure(contestants: Mapping[Name, Contestant], seconds: float) -> dict[Name, Timing]:
    """Time the contestants by turns."""
    calls: dict[Name, int] = {}
    for name, run in contestants.items():
        run()  # a first call brings in what it needs; the second tells how long one takes
        calls[name] = math.ceil(TURN_SECONDS / max(_turn(run, 1), 1e-7))
    turns: dict[Name, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MINIMUM_ROUNDS or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(_turn(contestants[name], calls[name]))
        rounds += 1
    return {name: _timing(turns[name], calls[name]) for name in names}


def _turn(run: Contestant, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _timing(turns: list[float], calls: int) -> Timing:
    lower, median, upper = statistics.quantiles(turns, n=4, method="inclusive")
    return Timing(median, lower, upper, len(turns), calls)


def _product(work: Work) -> Contestant:
    """One matrix product, of queries with a block of rows as they lie in memory."""
    m, k, n = work.product
    left = torch.randn(m, k, dtype=work.dtype, device=work.device)
    right = torch.randn(n, k, dtype=work.dtype, device=work.device)
    result = torch.empty(m, n, dtype=work.dtype, device=work.device)
    return lambda: torch.mm(left, right.mT, out=result)


def _memory(work: Work) -> Contestant:
    """Reading `BANDWIDTH_BYTES` once: of all reductions the sum is bound by memory alone."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, device=work.device)
    return numbers.sum


# -- report ------------------------------------------------------------------------------------------------------------


def _machine() -> dict[str, str | int | float]:
    """What the figures depend on."""
    machine: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    with suppress(OSError, AttributeError):
        # Whether others were at work before this: figures from a busy machine mean little.
        machine["load_before"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    machine["torch"] = torch.__version__  # which says what it was built for
    for package in ("softdb", "faiss-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            machine[package] = importlib.metadata.version(package)
    return machine


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _table(lines: list[Line]) -> str:
    peers = list(dict.fromkeys(peer for line in lines for peer in line.peers))
    floors = list(dict.fromkeys(floor for line in lines for floor in line.floors))
    facts = list(dict.fromkeys(fact for line in lines for fact in line.facts))
    head = ["work", "softdb", "time"]
    for other in [*peers, *(f"{floor} floor" for floor in floors)]:
        head += [other, "ratio"]
    cells = [[*head, *facts]]
    for line in lines:
        row = [line.label, line.way, _seconds(line.time.median)]
        for peer in peers:
            row += [_seconds(line.peers[peer].median), _ratio(line, peer)] if peer in line.peers else ["–", "–"]
        for floor in floors:
            known = line.floors.get(floor)
            row += [_seconds(known), _ratio(line, f"{floor} floor")] if known else ["–", "–"]
        cells.append(row + [f"{line.facts[fact]:.3g}" if fact in line.facts else "–" for fact in facts])
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    # The first two columns are words, the others numbers.
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in aligned)


def _ratio(line: Line, peer: str) -> str:
    ratio = line.ratios[peer]
    if peer not in line.claims:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} {'≤' if ratio <= line.claims[peer] else 'NOT ≤'} {line.claims[peer]:.2f}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds / 1e-6:#.3g} µs".replace(". ", " ")
