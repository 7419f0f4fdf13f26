"""Results that print themselves as a table, and go to a dictionary or a CSV file."""

from __future__ import annotations

import csv
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TextIO

__all__ = ["Columns", "Printed", "aligned", "shortened"]


class Printed:
    """What prints itself."""

    def table(self, file: TextIO | None = None) -> None:
        """Print it, to ``file`` or the standard output."""
        (sys.stdout if file is None else file).write(f"{self}\n")


class Columns(Printed, ABC):
    """What goes to a dictionary, and to a file."""

    @abstractmethod
    def to_dict(self) -> dict[str, list[Any]]:
        """A list for each column."""

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns to a file."""
        columns = self.to_dict()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def aligned(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table of cells as text, its columns aligned."""
    lines = [headings, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shortened(text: str, width: int) -> str:
    """``text`` in one line, and no longer than ``width``."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else text[: width - 1] + "…"
