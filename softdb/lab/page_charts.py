"""Table and charts of the measurements on the page."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softdb.lab.plotting import is_fraction
from softdb.scoring.normalizers import NORMALIZERS

__all__ = ["NORMALIZER_DASHES", "Measurement", "build_figures", "render_measurements"]

MAX_TICKS = 6


SVG_DASHES = {"solid": "none", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "14 5"}

# Line style of each normalizer, by its name in Plotly.
NORMALIZER_DASHES = dict(zip(NORMALIZERS, itertools.cycle(SVG_DASHES), strict=False))


HARD_COLOR, EXACT_COLOR, NEUTRAL_COLOR = "#d55e00", "#000000", "#56616d"


# Viridis without its bright end, which is hard to see on white. Its lightness is monotonic, for color-blind readers.
COLOR_SCALE = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#6ece58")


COLUMN_DESCRIPTIONS = {
    "distance": "relative distance of the answers from the exact blend",
    "agreement": "fraction of queries whose row with the highest weight has the highest score",
    "mass": "fraction of the exact softmax held by the rows with weight",
    "entropy": "entropy of the weights, in nats",
    "effective_rows": "exp of the entropy",
    "time": "duration relative to the exact read",
}


class Measurement(NamedTuple):
    """Setting of reads, with the measured distance and metric.

    Attributes:
        mode: "exact", "topk" or "hard".
        normalizer: Function from scores to weights.
        temperature: Divides the scores; None if it makes no difference.
        k: Number of candidates of a top-k read; None in other modes.
        distance: Relative distance from the exact blend; None if missing.
        metric: Value of the chosen metric; None if missing.
    """

    mode: str
    normalizer: str
    temperature: float | None
    k: int | None
    distance: float | None
    metric: float | None


def render_measurements(
    columns: Mapping[str, Sequence[Any]], measurements: list[Measurement], metric: str, rows: int
) -> str:
    """Render the HTML of the measurements: charts, legends and the table."""
    notes = [
        f"<b>{html.escape(name)}</b>: {COLUMN_DESCRIPTIONS[name]}" for name in columns if name in COLUMN_DESCRIPTIONS
    ]
    others = {measurement.normalizer for measurement in measurements} - {"softmax"}
    dashes = "Normalizers other than softmax have dashed lines." if others else ""
    header = "".join(f"<th{_format_class(columns[name])}>{html.escape(str(name))}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{_format_class(column)}>{_format_cell(column[row])}</td>" for column in columns.values())
        + "</tr>"
        for row in range(len(measurements))
    )
    shown = html.escape(metric)
    return f"""<h2>Measurements</h2>
<p>Each point is one setting, measured over many queries. The upper charts show the distance from the exact blend, the
lower charts <b>{shown}</b>. A distance of 0 is drawn at the lower edge. {dashes}</p>
<div class="figures">
<div><div id="by-temperature" class="plot" role="img" aria-label="Distance and {shown} against temperature"></div>
{_render_legend(_build_lines_by_temperature(measurements))}</div>
<div><div id="by-k" class="plot" role="img" aria-label="Distance and {shown} against k"></div>
{_render_legend(_build_lines_by_k(measurements, rows))}</div>
</div>
<p class="quiet">{"; ".join(notes)}.</p>
<div class="table" tabindex="0" role="region" aria-label="All measurements">
<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>
</div>"""


def _render_legend(lines: list[Line]) -> str:
    """Render the legend of the colors and the legend of the dashes."""
    entries = {line.name: (line.color, "solid") for line in lines}
    normalizers = list(dict.fromkeys(line.normalizer for line in lines))
    if normalizers != ["softmax"]:
        entries |= {normalizer: (NEUTRAL_COLOR, NORMALIZER_DASHES[normalizer]) for normalizer in normalizers}
    drawn = [
        '<li><svg width="30" height="10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke-width="2.5" '
        f'stroke="{color}" stroke-dasharray="{SVG_DASHES[dash]}"/></svg>{name}</li>'
        for name, (color, dash) in entries.items()
    ]
    return f'<ul class="key">{"".join(drawn)}</ul>'


def _format_class(column: Sequence[Any]) -> str:
    return ' class="word"' if any(isinstance(entry, str) for entry in column) else ""


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    try:
        number = float(value if not isinstance(value, (str, bool)) else "")
    except (TypeError, ValueError):
        return html.escape(str(value))
    if not math.isfinite(number):
        return "–"
    return f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"


def build_figures(measurements: list[Measurement], metric: str, rows: int) -> dict[str, Any]:
    """Build the plotly figures against temperature and against k.

    Each has a panel of the distance and one of the metric.
    """
    if not measurements:
        return {}
    return {
        "by-temperature": _build_figure(
            _build_lines_by_temperature(measurements), "temperature, soft to hard", metric, {}
        ),
        "by-k": _build_figure(
            _build_lines_by_k(measurements, rows),
            "k, number of rows with weight",
            metric,
            _choose_k_ticks(measurements, rows),
        ),
    }


class Line(NamedTuple):
    """Line of a chart.

    Attributes:
        name: Name in the legend of the colors.
        normalizer: Normalizer of the settings, which selects the dash.
        color: Of the line and its markers.
        points: Position on the x axis and measurement of each point.
    """

    name: str
    normalizer: str
    color: str
    points: list[tuple[float, Measurement]]


def _build_lines_by_temperature(measurements: list[Measurement]) -> list[Line]:
    temperatures = sorted({measurement.temperature for measurement in measurements if measurement.temperature})
    ks = sorted({measurement.k for measurement in measurements if measurement.k is not None})
    colors = dict(zip(ks, _sample_scale(len(ks)), strict=True))
    kinds: list[tuple[str, int | None, str, str]] = [("hard", None, "hard", HARD_COLOR)]
    kinds += [("topk", k, f"k = {k:,}", colors[k]) for k in ks]
    kinds += [("exact", None, "exact", EXACT_COLOR)]
    lines = []
    for normalizer in _list_normalizers(measurements):
        for mode, k, name, color in kinds:
            of_line = [s for s in measurements if (s.normalizer, s.mode, s.k) == (normalizer, mode, k)]
            points = [(measurement.temperature, measurement) for measurement in of_line if measurement.temperature]
            if mode == "hard" and len(of_line) == 1 and temperatures:  # A hard read does not depend on the temperature.
                points = [(temperature, of_line[0]) for temperature in sorted({temperatures[0], temperatures[-1]})]
            if points:
                lines.append(Line(name, normalizer, color, sorted(points, key=lambda point: point[0])))
    return lines


def _build_lines_by_k(measurements: list[Measurement], rows: int) -> list[Line]:
    temperatures = sorted(
        {
            measurement.temperature
            for measurement in measurements
            if measurement.temperature and measurement.mode != "hard"
        }
    )
    lines = []
    for normalizer in _list_normalizers(measurements):
        of_normalizer = [measurement for measurement in measurements if measurement.normalizer == normalizer]
        hard = [measurement for measurement in of_normalizer if measurement.mode == "hard"]
        for temperature, color in zip(temperatures, _sample_scale(len(temperatures)), strict=True):
            points: list[tuple[float, Measurement]] = []
            for measurement in of_normalizer:
                if measurement.mode == "hard":
                    if measurement.temperature == temperature or len(hard) == 1:
                        points.append((1, measurement))
                elif measurement.temperature == temperature:
                    points.append((rows if measurement.k is None else min(measurement.k, rows), measurement))
            if any(measurement.mode != "hard" for _, measurement in points):
                name = f"temperature {temperature:g}"
                lines.append(Line(name, normalizer, color, sorted(points, key=lambda point: point[0])))
    return lines


def _list_normalizers(measurements: list[Measurement]) -> list[str]:
    found = {measurement.normalizer for measurement in measurements}
    return [normalizer for normalizer in NORMALIZER_DASHES if normalizer in found]


def _sample_scale(count: int) -> list[str]:
    """Sample ``count`` colors from `COLOR_SCALE`, dark to bright."""
    colors = []
    for place in range(count):
        position = place / max(count - 1, 1) * (len(COLOR_SCALE) - 1)
        first = min(int(position), len(COLOR_SCALE) - 2)
        low, high = (bytes.fromhex(color[1:]) for color in COLOR_SCALE[first : first + 2])
        mixed = [round(a + (b - a) * (position - first)) for a, b in zip(low, high, strict=True)]
        colors.append("#" + bytes(mixed).hex())
    return colors


def _choose_k_ticks(measurements: list[Measurement], rows: int) -> dict[str, Any]:
    ks = [min(measurement.k, rows) for measurement in measurements if measurement.k is not None]
    shown = [k for k in _select_ticks(sorted({1, *ks, rows})) if k != rows]
    return {"tickvals": [*shown, rows], "ticktext": [*(f"{k:,}" for k in shown), "all"]}


def _select_ticks(stops: Sequence[float]) -> list[float]:
    """Select ticks of a logarithmic axis that do not overlap.

    Args:
        stops: Candidates in ascending order; the first and the last one are always selected.
    """
    room = 0.99 * math.log(stops[-1] / stops[0]) / MAX_TICKS
    shown = list(stops[:1])
    for stop in stops[1:-1]:
        if min(math.log(stop / shown[-1]), math.log(stops[-1] / stop)) >= room:
            shown.append(stop)
    return [*shown, *stops[1:][-1:]]


def _build_figure(lines: list[Line], across: str, metric: str, ticks: dict[str, Any]) -> dict[str, Any]:
    distances = [s.distance for line in lines for _, s in line.points if s.distance]
    floor = 10.0 ** math.floor(math.log10(min(distances)) - 0.5) if distances else 1e-3
    shown = html.escape(metric)
    is_bounded = is_fraction(metric, [s.metric for line in lines for _, s in line.points])
    fixed_range = {"range": [0, 1]} if is_bounded else {}
    traces = []
    for line in lines:
        for panel in ("distance", "metric"):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{line.name}, {line.normalizer}",
                    "x": [x for x, _ in line.points],
                    # A logarithmic axis cannot show 0, the distance of the exact read from itself.
                    "y": [
                        s.metric if panel == "metric" else None if s.distance is None else max(s.distance, floor)
                        for _, s in line.points
                    ],
                    "yaxis": "y" if panel == "distance" else "y2",
                    "line": {"color": line.color, "dash": NORMALIZER_DASHES[line.normalizer], "width": 2},
                    "marker": {"size": 6},
                    "hoverinfo": "text",
                    "hovertext": [_format_hover(s, shown) for _, s in line.points],
                    "cliponaxis": panel == "distance",  # no marker of a fraction is cut at 0 or 1
                }
            )
    bottom = {
        "title": {"text": across, "standoff": 8},
        "type": "log",
        "fixedrange": True,
        "anchor": "y2",
        "domain": [0, 1],
    }
    if not ticks and lines:
        temperatures = _select_ticks(sorted({x for line in lines for x, _ in line.points}))
        ticks = {
            "tickvals": temperatures,
            "ticktext": [f"{temperature:g}" for temperature in temperatures],
            "autorange": "reversed",
        }
    layout = {
        "height": 520,
        "margin": {"l": 64, "r": 12, "t": 8, "b": 48},
        "showlegend": False,
        "xaxis": {**bottom, **ticks, "tickangle": 0},
        "yaxis": {
            "title": {"text": "distance from exact"},
            "type": "log",
            "domain": [0.54, 1],
            "fixedrange": True,
            "exponentformat": "power",
            "dtick": 1,
        },
        "yaxis2": {"title": {"text": shown}, "domain": [0, 0.46], "fixedrange": True, **fixed_range},
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "font": {"color": "#1d2733"}},
    }
    return {"data": traces, "layout": layout}


def _format_hover(measurement: Measurement, metric: str) -> str:
    which = f"k = {measurement.k:,}" if measurement.mode == "topk" else measurement.mode
    temperature = "" if measurement.temperature is None else f", temperature {measurement.temperature:g}"
    return (
        f"{which}{temperature}, {measurement.normalizer}<br>distance {_format_cell(measurement.distance)}<br>"
        f"{metric} {_format_cell(measurement.metric)}"
    )
