"""Results of `gpu`, saved one by one; cases that break or never end."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import align_table, format_seconds

__all__ = [
    "NAN",
    "Report",
    "Result",
    "Seconds",
    "continue_in_new_process",
    "format_results",
    "from_json",
    "judge",
    "limit_time",
    "to_json",
]

NAN = float("nan")
Seconds = dict[str, float]  # by contestant


@dataclass(frozen=True)
class Result:
    """Result of a measurement.

    Attributes:
        row: Row of the table of bounds, or name of another table.
        work: The task and its sizes.
        quantity: What was measured, with its unit if it has one.
        bound: The bound, such as "≤ 1.5"; empty if there is none.
        value: The measured value.
        outcome: "held", "missed", "measured" (without bound) or "error".
        seconds: Seconds of each contestant.
        message: Error, with its place.
    """

    row: str
    work: str
    quantity: str = ""
    bound: str = ""
    value: float = NAN
    outcome: str = "measured"
    seconds: Seconds = field(default_factory=dict)
    message: str = ""


def judge(row: str, work: str, quantity: str, value: float, bound: str = "", seconds: Seconds | None = None) -> Result:
    """Compare a value with its bound, "≤ x" or "≥ x"; NaN is an error."""
    failed = ", ".join(name for name, time in (seconds or {}).items() if math.isnan(time))
    if math.isnan(value):
        outcome = "error"
    elif bound:
        relation, limit = bound.split()
        outcome = "held" if (value <= float(limit) if relation == "≤" else value >= float(limit)) else "missed"
    else:
        outcome = "measured"
    message = f"failed, see the log: {failed}" if failed else ""
    return Result(row, work, quantity, bound, value, outcome, seconds or {}, message)


def to_json(result: Result) -> dict[str, object]:
    """Return a result for a report, in which null replaces NaN."""
    seconds = {name: None if math.isnan(time) else time for name, time in result.seconds.items()}
    return {**asdict(result), "value": None if math.isnan(result.value) else result.value, "seconds": seconds}


def from_json(entry: dict[str, Any]) -> Result:
    """Return a result of a report."""
    seconds = {name: NAN if time is None else time for name, time in entry["seconds"].items()}
    return Result(**{**entry, "value": NAN if entry["value"] is None else entry["value"], "seconds": seconds})


@dataclass
class Report:
    """Results of a run, which are saved one by one.

    Attributes:
        path: File of the report; None for none.
        lines: File to which each result is appended as a line of JSON; None for none.
        head: What to write in addition to the results.
        results: The results.
    """

    path: Path | None
    lines: Path | None
    head: Mapping[str, object]
    results: list[Result] = field(default_factory=list)

    def load(self) -> None:
        """Load the results of the process that began this run."""
        if self.path is not None:
            self.results = list(map(from_json, json.loads(self.path.read_text(encoding="utf-8"))["results"]))

    def add(self, result: Result) -> None:
        """Print and save a result."""
        self.results.append(result)
        print(f"{result.row:<10}{result.work}: {result.quantity} {result.value:.3g} {result.bound}", end="")
        print(f"  {result.outcome} {result.message}", flush=True)
        if self.lines is not None:
            with self.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": result.work, **to_json(result)}) + "\n")
        if self.path is not None:
            temporary = self.path.with_suffix(".tmp")
            report = {**self.head, "results": [to_json(entry) for entry in self.results]}
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)


def continue_in_new_process(number: int, reason: str) -> None:
    """Replace this process by one that runs the cases after case ``number``.

    The process group stays the same, so that a caller can end it.
    """
    print(f"{reason}; a new process runs the other cases", flush=True)
    arguments = [argument for argument in sys.argv if not argument.startswith("--after=")]
    os.execv(sys.executable, [sys.executable, *arguments, f"--after={number}"])


@contextmanager
def limit_time(report: Report, number: int, row: str, work: str, seconds: float) -> Iterator[None]:
    """Give up a case that takes too long, such as one whose kernel never ends."""

    def give_up() -> None:  # in a thread: the main thread waits for the device
        report.add(Result(row, work, outcome="error", message=f"did not end within {seconds:g} s"))
        continue_in_new_process(number, "a case did not end")

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def format_results(results: Iterable[Result]) -> str:
    """Return the results as a table in Markdown."""
    cells = [["row", "work", "measured", "value", "bound", "outcome", "times"]]
    for result in results:
        value = "–" if math.isnan(result.value) else f"{result.value:.3g}"
        times = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in result.seconds.items())
        cells.append(
            [
                result.row,
                result.work,
                result.quantity,
                value,
                result.bound or "–",
                result.outcome,
                "; ".join(filter(None, [times, result.message])),
            ]
        )
    return align_table(cells, words=7)
