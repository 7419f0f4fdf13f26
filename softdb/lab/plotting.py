"""Functions that all plots of the lab use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from softdb.errors import ArgumentError, MissingPackageError
from softdb.lab.tables import shorten

__all__ = ["FRACTION_COLUMNS", "create_figure", "escape_label", "is_fraction", "sample_color", "set_temperature_axis"]

FRACTION_COLUMNS = ("accuracy", "agreement", "mass")  # columns whose values lie in [0, 1]


def is_fraction(name: str, values: Iterable[float | None]) -> bool:
    """Return whether an axis of this column runs from 0 to 1.

    The values are checked too, because a metric of the caller with the name "accuracy" may be in percent.
    """
    return name in FRACTION_COLUMNS and all(value is None or 0 <= value <= 1 for value in values)


def create_figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Any:
    """Create a matplotlib figure of a size in inches; check the suffix of the file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"matplotlib: expected an installed package to plot {os.fspath(path)!r}, got none; run pip install "
            "'softdb[plot]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    suffixes = figure.canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in suffixes:
        raise ArgumentError(
            f"path: expected an image file with one of the suffixes {', '.join(sorted(suffixes))}, got "
            f"{os.fspath(path)!r}"
        )
    return figure


def sample_color(place: int, count: int) -> Any:
    """Return one of ``count`` viridis colors, which also differ in lightness."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * place / max(1, count - 1))


def set_temperature_axis(axes: Any, temperatures: Iterable[float]) -> None:
    """Set a logarithmic x axis of temperatures, which decrease from left to right."""
    ticks = sorted(set(temperatures))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks[:: max(1, len(ticks) // 7)], [f"{tick:.3g}" for tick in ticks[:: max(1, len(ticks) // 7)]])
    axes.minorticks_off()
    axes.set_xlabel("temperature: soft to hard", fontsize="small")


def escape_label(text: str, width: int) -> str:
    """Return a label for matplotlib, shortened and escaped.

    matplotlib reads text between dollar signs as a formula, and omits labels with a leading underscore from legends.
    """
    text = shorten(text, width).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
