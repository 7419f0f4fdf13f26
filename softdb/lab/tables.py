"""Text tables, dictionaries and CSV files of results."""

from __future__ import annotations

import csv
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TextIO

__all__ = [
    "Line",
    "TableText",
    "Tabular",
    "TextResult",
    "format_range",
    "format_table",
    "join_names",
    "merge_equal_lines",
    "shorten",
]


class TableText(str):
    """Text of a table, shown without quotes and escapes by an interactive session."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class TextResult:
    """Base class of results that ``str`` converts to a table."""

    def table(self, file: TextIO | None = None) -> TableText:
        """Return the result as a table.

        Args:
            file: A text file to which the table is also written, such as ``sys.stdout``.

        Returns:
            The text, without a line break at the end: ``print(found.table())`` prints it.
        """
        text = TableText(self)
        if file is not None:
            file.write(f"{text}\n")
        return text


class Tabular(TextResult, ABC):
    """Base class of results that have columns."""

    @abstractmethod
    def to_dict(self) -> dict[str, list[Any]]:
        """Return a list for each column."""

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns to a CSV file."""
        columns = self.to_dict()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


class Line(NamedTuple):
    """Line of a table of settings.

    Attributes:
        name: The setting, without its temperature.
        temperature: Divisor of the scores.
        figures: Cells of the line. Lines are equal if these cells are equal.
        time: Relative duration, which may differ between equal lines; None if the table has no such column.
    """

    name: str
    temperature: float
    figures: tuple[str, ...]
    time: float | None = None


def merge_equal_lines(lines: Iterable[Line]) -> list[list[str]]:
    """Merge the lines whose figures are equal; return the cells of the table.

    Settings of one temperature with equal figures become one line, named "exact = topk 64, 256", with the range of
    their times. The same settings with equal figures at consecutive temperatures become one line, with the temperatures
    "8 to 0.25".

    Args:
        lines: The lines, grouped by temperature.

    Returns:
        For each line of the table: name, temperature, figures, and the time if the lines have one.
    """
    merged: list[tuple[str, list[float], tuple[str, ...], str | None]] = []
    previous: list[int] = []  # places in `merged` of the lines of the previous temperature
    for temperature, group in itertools.groupby(lines, key=lambda line: line.temperature):
        equal: dict[tuple[str, ...], list[Line]] = {}
        for line in group:
            equal.setdefault(line.figures, []).append(line)
        current = []
        for figures, members in equal.items():
            name = join_names(line.name for line in members)
            times = [line.time for line in members if line.time is not None]
            time = " to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(times), max(times)))) if times else None
            for place in previous:
                if (merged[place][0], *merged[place][2:]) == (name, figures, time):
                    merged[place][1].append(temperature)
                    break
            else:
                place = len(merged)
                merged.append((name, [temperature], figures, time))
            current.append(place)
        previous = current
    return [
        [name, format_range(temperatures), *figures, *([] if time is None else [time])]
        for name, temperatures, figures, time in merged
    ]


def join_names(names: Iterable[str]) -> str:
    """Join the names of equal settings; list the k of top-k reads together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        mode, _, rest = name.partition(" ")
        k, _, normalizer = rest.partition(" ")
        if mode == "topk":
            groups.setdefault((mode, normalizer), []).append(k)
        else:
            groups[name, ""] = []
    return " = ".join(
        " ".join(filter(None, (mode, ", ".join(ks), normalizer))) for (mode, normalizer), ks in groups.items()
    )


def format_range(temperatures: Sequence[float], digits: int = 4) -> str:
    """Format consecutive temperatures as their first and last one."""
    first, last = (f"{temperature:.{digits}g}" for temperature in (temperatures[0], temperatures[-1]))
    return first if len(temperatures) == 1 else f"{first} to {last}"


def format_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table as text, with the first column left-aligned."""
    lines = [headings, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shorten(text: str, width: int) -> str:
    """Return a text as one line of at most ``width`` characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else text[: width - 1] + "…"
