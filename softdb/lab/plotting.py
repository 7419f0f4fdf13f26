"""What the pictures have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from softdb.errors import ArgumentError, MissingPackageError
from softdb.lab.tables import shortened

__all__ = ["cooling_axis", "drawn_name", "figure_of", "shade"]


def figure_of(path: str | os.PathLike[str], size: tuple[float, float]) -> Any:
    """Return a matplotlib figure of a size in inches, for a file of the path's kind."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"matplotlib: expected it to be installed, to draw {os.fspath(path)!r}; pip install 'softdb[plot]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in known:
        raise ArgumentError(
            f"path: expected the ending of a picture, one of {', '.join(sorted(known))}, got {os.fspath(path)!r}"
        )
    return figure


def shade(place: int, count: int) -> Any:
    """One of a row of colours that are told apart by their lightness too."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * place / max(1, count - 1))


def cooling_axis(axes: Any, temperatures: Iterable[float]) -> None:
    """Let temperatures fall from left to right."""
    ticks = sorted(set(temperatures))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks[:: max(1, len(ticks) // 7)], [f"{tick:.3g}" for tick in ticks[:: max(1, len(ticks) // 7)]])
    axes.minorticks_off()
    axes.set_xlabel("temperature: soft to hard", fontsize="small")


def drawn_name(text: str, width: int) -> str:
    """`shortened` for matplotlib, which takes dollars for formulas and leaves out of legends what begins with a bar."""
    text = shortened(text, width).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
