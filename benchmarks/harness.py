"""Compare softdb with its peers in one process, in alternating turns.

A script defines its `Case`s and passes them to `main`. The report contains for each case:

- the median time of a call, for every contestant. Rounds are repeated until the time of the case has passed. In each
  round every contestant has one turn, and the order rotates, so that a temporary slowdown of the machine affects all
  contestants;
- the ratio of softdb's median to the median of each peer;
- two lower bounds ("floors"), measured in the same rounds: the time of the operations at the rate of a matrix product,
  and the time of the bytes at the rate of reading memory.
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
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "Case",
    "Work",
    "align_table",
    "compare",
    "describe_machine",
    "format_seconds",
    "main",
    "measure_peak_memory",
    "wrap_no_grad",
]

RESULTS = Path(__file__).parent / "results"
THREADS = 2
MIN_ROUNDS = 5
# A call is repeated until its turn takes this time, so that the cost of the clock and of the loop is negligible.
MIN_TURN_SECONDS = 0.005
# Bytes that are read to measure the rate of memory: larger than any cache.
BANDWIDTH_BYTES = 2**28

Contestant = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


# -- definition of a benchmark -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Minimum work of a case, from which its floors are computed.

    Attributes:
        operations: Number of floating-point operations; a multiplication and an addition are two.
        bytes: Number of bytes that must be read from memory.
        product: Sizes of the matrix product, (m, k) @ (k, n), that measures the rate of the machine.
        dtype: The dtype of the product.
        device: The device on which both rates are measured.
    """

    operations: float
    bytes: float
    product: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """Task at one size, and the contestants that run it.

    Attributes:
        label: The task and its sizes.
        softdb: Contestants of softdb, by name; each becomes a line of the table.
        peers: Contestants to compare with, by name. Leave out a peer that does not fit in memory.
        work: The minimum work, for the floors; None for no floors.
        claims: Upper limits of ratios, by (name of softdb's contestant, name of the peer); "product floor" and
            "memory floor" name the floors.
        facts: Function that measures other numbers after the timing: an error, a recall, a memory peak, by name.
    """

    label: str
    softdb: Mapping[str, Contestant]
    peers: Mapping[str, Contestant]
    work: Work | None = None
    claims: Mapping[tuple[str, str], float] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, float]] | None = None


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the turns."""

    median: float
    lower: float
    upper: float
    turns: int
    calls_per_turn: int


@dataclass(frozen=True)
class Line:
    """Line of the table and of the JSON file: one contestant of softdb in one case.

    Attributes:
        label, way: Names of the case and of the contestant.
        time: Time of the contestant.
        peers: Times of the peers.
        ratios: The contestant's median divided by the median of each peer, and by the floors.
        claims: Upper limits of ratios.
        floors: Seconds of the operations ("product") and of the bytes ("memory") at the rates of the machine.
        facts: Other measured numbers.
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
    """Run the command line of a benchmark script.

    Args:
        name: Name of the result.
        cases: Function that yields the cases; its argument is whether to use small sizes.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=sys.modules["__main__"].__doc__)
    parser.add_argument("--small", action="store_true", help="use tiny sizes, as a smoke test; saved only with --out")
    parser.add_argument("--seconds", type=float, help="seconds of measurement per case (default: 10; small: 0.05)")
    parser.add_argument("--out", type=Path, help=f"folder of {name}.json (default: benchmarks/results)")
    options = parser.parse_args()
    seconds = options.seconds or (0.05 if options.small else 10.0)
    out = options.out or (None if options.small else RESULTS)
    min_rounds = 2 if options.small else MIN_ROUNDS
    print(compare(name, cases(options.small), seconds=seconds, out=out, min_rounds=min_rounds))


def compare(
    name: str, cases: Iterable[Case], *, seconds: float = 10.0, out: Path | None = None, min_rounds: int = MIN_ROUNDS
) -> str:
    """Measure the cases one by one; return the table as aligned Markdown.

    Args:
        name: Name of the result.
        cases: The cases. A generator holds the tensors of one case at a time.
        seconds: Seconds of measurement per case.
        out: Folder to write NAME.json to; None writes nothing.
        min_rounds: Minimum number of rounds, whatever their duration; at least 2.
    """
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", THREADS))))
    machine = describe_machine()
    lines: list[Line] = []
    for case in cases:
        print(f"{name}: {case.label}", file=sys.stderr, flush=True)
        lines += _measure_case(case, seconds, min_rounds)
        del case  # Free its tensors before the next case is made.
        gc.collect()
    if out is not None:
        date = datetime.now(timezone.utc).date().isoformat()
        report = {"name": name, "date": date, "machine": machine, "lines": [asdict(line) for line in lines]}
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return _format_table(lines)


def wrap_no_grad(run: Contestant) -> Contestant:
    """Return a function that calls ``run`` under `torch.no_grad`."""

    def call() -> object:
        with torch.no_grad():
            return run()

    return call


def measure_peak_memory(run: Contestant) -> int:
    """Measure the peak increase of resident memory during ``run``, in bytes.

    The result of ``run`` is included; subtract its size if needed. Libraries and buffers that a first call loads are
    included, too; call ``run`` once before to exclude them. Linux only.
    """
    gc.collect()
    # Return freed memory to the system: otherwise the allocator would reuse it, and resident memory would not grow.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Resets the peak, VmHWM (see man 5 proc).
    before = _read_memory_counter("VmRSS")
    result = run()
    peak = _read_memory_counter("VmHWM")
    del result
    return max(0, peak - before)


def _read_memory_counter(counter: str) -> int:
    """Return a memory counter of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{counter}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {counter}")


# -- time --------------------------------------------------------------------------------------------------------------


def _measure_case(case: Case, seconds: float, min_rounds: int) -> list[Line]:
    contestants: dict[tuple[str, str], Contestant] = {}
    contestants.update({("softdb", name): run for name, run in case.softdb.items()})
    contestants.update({("peer", name): run for name, run in case.peers.items()})
    if case.work is not None:
        contestants["floor", "product"] = _make_matrix_product(case.work)
        contestants["floor", "memory"] = _make_memory_read(case.work)
    times = _time_contestants(contestants, seconds, min_rounds)
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


def _time_contestants(contestants: Mapping[Name, Contestant], seconds: float, min_rounds: int) -> dict[Name, Timing]:
    """Time the contestants in alternating turns."""
    calls: dict[Name, int] = {}
    for name, run in contestants.items():
        run()  # Warm up: the first call loads libraries and allocates memory.
        calls[name] = math.ceil(MIN_TURN_SECONDS / max(_time_turn(run, 1), 1e-7))
    turns: dict[Name, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            turns[name].append(_time_turn(contestants[name], calls[name]))
        rounds += 1
    return {name: _summarize_turns(turns[name], calls[name]) for name in names}


def _time_turn(run: Contestant, calls: int) -> float:
    """Return the seconds per call of one turn."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _summarize_turns(turns: list[float], calls: int) -> Timing:
    lower, median, upper = statistics.quantiles(turns, n=4, method="inclusive")
    return Timing(median, lower, upper, len(turns), calls)


def _make_matrix_product(work: Work) -> Contestant:
    """Make a function that multiplies queries with a block of contiguous rows."""
    m, k, n = work.product
    left = torch.randn(m, k, dtype=work.dtype, device=work.device)
    right = torch.randn(n, k, dtype=work.dtype, device=work.device)
    result = torch.empty(m, n, dtype=work.dtype, device=work.device)
    return lambda: torch.mm(left, right.mT, out=result)


def _make_memory_read(work: Work) -> Contestant:
    """Make a function that sums `BANDWIDTH_BYTES`, which is bound by memory bandwidth."""
    return _allocate_numbers(work.device).sum


@lru_cache(maxsize=1)
def _allocate_numbers(device: str) -> Tensor:
    """Allocate `BANDWIDTH_BYTES`, once for all cases."""
    return torch.ones(BANDWIDTH_BYTES // 4, device=device)


# -- report ------------------------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, str | int | float]:
    """Describe the hardware and the versions that the results depend on."""
    machine: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _find_processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    with suppress(OSError, AttributeError):
        # Results of a machine with other load are not reliable.
        machine["load_before"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    machine["torch"] = torch.__version__  # Includes the build, such as "+cpu".
    for package in ("softdb", "faiss-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            machine[package] = importlib.metadata.version(package)
    return machine


def _find_processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _format_table(lines: list[Line]) -> str:
    peers = list(dict.fromkeys(peer for line in lines for peer in line.peers))
    floors = list(dict.fromkeys(floor for line in lines for floor in line.floors))
    facts = list(dict.fromkeys(fact for line in lines for fact in line.facts))
    head = ["work", "softdb", "time"]
    for other in [*peers, *(f"{floor} floor" for floor in floors)]:
        head += [other, "ratio"]
    cells = [[*head, *facts]]
    for line in lines:
        row = [line.label, line.way, format_seconds(line.time.median)]
        for peer in peers:
            row += (
                [format_seconds(line.peers[peer].median), _format_ratio(line, peer)]
                if peer in line.peers
                else ["–", "–"]
            )
        for floor in floors:
            known = line.floors.get(floor)
            row += [format_seconds(known), _format_ratio(line, f"{floor} floor")] if known else ["–", "–"]
        cells.append(row + [f"{line.facts[fact]:.3g}" if fact in line.facts else "–" for fact in facts])
    return align_table(cells, words=2)


def align_table(cells: Sequence[Sequence[str]], *, words: int) -> str:
    """Return a table as Markdown; the first ``words`` columns are aligned left."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in aligned)


def _format_ratio(line: Line, peer: str) -> str:
    ratio = line.ratios[peer]
    if peer not in line.claims:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} {'≤' if ratio <= line.claims[peer] else 'NOT ≤'} {line.claims[peer]:.2f}"


def format_seconds(seconds: float) -> str:
    """Return a time with its unit, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds / 1e-6:#.3g} µs".replace(". ", " ")
