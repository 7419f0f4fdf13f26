"""The table and the charts of the page, from what `softdb.lab.comparison` measured."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softdb.scoring.normalizers import NORMALIZERS

__all__ = ["DASHES", "MODES", "Setting", "figures", "measured_table"]

MOST_TICKS = 6


MODES = ("exact", "topk", "hard")


DRAWN_DASHES = {"solid": "none", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "14 5"}


DASHES = dict(zip(NORMALIZERS, itertools.cycle(DRAWN_DASHES), strict=False))


HARD_COLOUR, EXACT_COLOUR, NEUTRAL_COLOUR = "#d55e00", "#000000", "#56616d"


# Viridis without its bright end, which white paper swallows: in order also for who does not see colours.
SCALE = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#6ece58")


MEANINGS = {
    "distance": "how far an answer lies from the exact blend, relative to it",
    "agreement": "the share of queries whose row of most weight is the best of all",
    "mass": "the fraction of the exact softmax that the rows with weight hold",
    "entropy": "of the weights",
    "effective_rows": "exp of the entropy",
    "time": "of a read, relative to the exact one",
}


class Setting(NamedTuple):
    """One measured setting."""

    mode: str
    normalizer: str
    temperature: float | None
    k: int | None
    distance: float | None
    score: float | None  # in the metric


def measured_table(columns: Mapping[str, Sequence[Any]], settings: list[Setting], metric: str, rows: int) -> str:
    """The part of the page about measurements."""
    notes = [f"<b>{html.escape(name)}</b>: {MEANINGS[name]}" for name in columns if name in MEANINGS]
    others = {setting.normalizer for setting in settings} - {"softmax"}
    dashes = "Normalizers other than softmax have lines of another dash." if others else ""
    header = "".join(f"<th{_alignment(columns[name])}>{html.escape(str(name))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{_alignment(column)}>{_cell(column[row])}</td>" for column in columns.values()) + "</tr>"
        for row in range(len(settings))
    )
    shown = html.escape(metric)
    return f"""<h2>Measured</h2>
<p>Each point is one setting, measured over many queries: above the distance from the exact blend, below
<b>{shown}</b>. The hard read and the exact one are the two ends. A distance of 0 is drawn at the lower edge.
{dashes}</p>
<div class="figures">
<div><div id="by-temperature" class="plot" role="img" aria-label="Distance and {shown} against temperature"></div>
{_key(_lines_by_temperature(settings))}</div>
<div><div id="by-k" class="plot" role="img" aria-label="Distance and {shown} against k"></div>
{_key(_lines_by_k(settings, rows))}</div>
</div>
<p class="quiet">{"; ".join(notes)}.</p>
<div class="table" tabindex="0" role="region" aria-label="All measurements">
<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>
</div>"""


def _key(lines: list[Line]) -> str:
    """What colours and dashes mean; an entry for each line would be their product."""
    entries = {line.name: (line.colour, "solid") for line in lines}
    normalizers = list(dict.fromkeys(line.normalizer for line in lines))
    if normalizers != ["softmax"]:
        entries |= {normalizer: (NEUTRAL_COLOUR, DASHES[normalizer]) for normalizer in normalizers}
    drawn = [
        '<li><svg width="30" height="10" aria-hidden="true"><line x1="0" y1="5" x2="30" y2="5" stroke-width="2.5" '
        f'stroke="{colour}" stroke-dasharray="{DRAWN_DASHES[dash]}"/></svg>{name}</li>'
        for name, (colour, dash) in entries.items()
    ]
    return f'<ul class="key">{"".join(drawn)}</ul>'


def _alignment(column: Sequence[Any]) -> str:
    return ' class="word"' if any(isinstance(entry, str) for entry in column) else ""


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    try:
        number = float(value if not isinstance(value, (str, bool)) else "")
    except (TypeError, ValueError):
        return html.escape(str(value))
    if not math.isfinite(number):
        return "–"
    return f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"


def figures(settings: list[Setting], metric: str, rows: int) -> dict[str, Any]:
    """Two plots, by temperature and by k, each with a panel for the distance and one for the metric."""
    if not settings:
        return {}
    return {
        "by-temperature": _figure(_lines_by_temperature(settings), "temperature, soft to hard", metric, {}),
        "by-k": _figure(_lines_by_k(settings, rows), "k, the rows that count", metric, _ticks_of_k(settings, rows)),
    }


class Line(NamedTuple):
    """Settings that one line joins, and where they lie on it."""

    name: str
    normalizer: str
    colour: str
    points: list[tuple[float, Setting]]


def _lines_by_temperature(settings: list[Setting]) -> list[Line]:
    heats = sorted({setting.temperature for setting in settings if setting.temperature})
    ks = sorted({setting.k for setting in settings if setting.k is not None})
    colours = dict(zip(ks, _scale(len(ks)), strict=True))
    kinds: list[tuple[str, int | None, str, str]] = [("hard", None, "hard", HARD_COLOUR)]
    kinds += [("topk", k, f"k = {k:,}", colours[k]) for k in ks]
    kinds += [("exact", None, "exact", EXACT_COLOUR)]
    lines = []
    for normalizer in _normalizers(settings):
        for mode, k, name, colour in kinds:
            of_line = [s for s in settings if (s.normalizer, s.mode, s.k) == (normalizer, mode, k)]
            points = [(setting.temperature, setting) for setting in of_line if setting.temperature]
            if mode == "hard" and len(of_line) == 1 and heats:  # the same at every temperature
                points = [(heat, of_line[0]) for heat in sorted({heats[0], heats[-1]})]
            if points:
                lines.append(Line(name, normalizer, colour, sorted(points, key=lambda point: point[0])))
    return lines


def _lines_by_k(settings: list[Setting], rows: int) -> list[Line]:
    heats = sorted({setting.temperature for setting in settings if setting.temperature and setting.mode != "hard"})
    lines = []
    for normalizer in _normalizers(settings):
        of_normalizer = [setting for setting in settings if setting.normalizer == normalizer]
        hard = [setting for setting in of_normalizer if setting.mode == "hard"]
        for heat, colour in zip(heats, _scale(len(heats)), strict=True):
            points: list[tuple[float, Setting]] = []
            for setting in of_normalizer:
                if setting.mode == "hard":
                    if setting.temperature == heat or len(hard) == 1:
                        points.append((1, setting))
                elif setting.temperature == heat:
                    points.append((rows if setting.k is None else min(setting.k, rows), setting))
            if any(setting.mode != "hard" for _, setting in points):
                name = f"temperature {heat:g}"
                lines.append(Line(name, normalizer, colour, sorted(points, key=lambda point: point[0])))
    return lines


def _normalizers(settings: list[Setting]) -> list[str]:
    found = {setting.normalizer for setting in settings}
    return [normalizer for normalizer in DASHES if normalizer in found]


def _scale(count: int) -> list[str]:
    """``count`` colours, dark to bright, mixed from those of `SCALE`."""
    colours = []
    for place in range(count):
        position = place / max(count - 1, 1) * (len(SCALE) - 1)
        first = min(int(position), len(SCALE) - 2)
        low, high = (bytes.fromhex(colour[1:]) for colour in SCALE[first : first + 2])
        mixed = [round(a + (b - a) * (position - first)) for a, b in zip(low, high, strict=True)]
        colours.append("#" + bytes(mixed).hex())
    return colours


def _ticks_of_k(settings: list[Setting], rows: int) -> dict[str, Any]:
    ks = [min(setting.k, rows) for setting in settings if setting.k is not None]
    shown = [k for k in _spread(sorted({1, *ks, rows})) if k != rows]
    return {"tickvals": [*shown, rows], "ticktext": [*(f"{k:,}" for k in shown), "all"]}


def _spread(stops: Sequence[float]) -> list[float]:
    """Those of the ascending ``stops`` that leave each other room on a logarithmic axis; both ends are among them."""
    room = 0.99 * math.log(stops[-1] / stops[0]) / MOST_TICKS
    shown = list(stops[:1])
    for stop in stops[1:-1]:
        if min(math.log(stop / shown[-1]), math.log(stops[-1] / stop)) >= room:
            shown.append(stop)
    return [*shown, *stops[1:][-1:]]


def _figure(lines: list[Line], across: str, metric: str, ticks: dict[str, Any]) -> dict[str, Any]:
    distances = [s.distance for line in lines for _, s in line.points if s.distance]
    floor = 10.0 ** math.floor(math.log10(min(distances)) - 0.5) if distances else 1e-3
    shown = html.escape(metric)
    traces = []
    for line in lines:
        for panel in ("distance", "score"):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{line.name}, {line.normalizer}",
                    "x": [x for x, _ in line.points],
                    # A logarithmic axis has no place for 0, the distance of the exact read from itself.
                    "y": [
                        s.score if panel == "score" else None if s.distance is None else max(s.distance, floor)
                        for _, s in line.points
                    ],
                    "yaxis": "y" if panel == "distance" else "y2",
                    "line": {"color": line.colour, "dash": DASHES[line.normalizer], "width": 2},
                    "marker": {"size": 6},
                    "hoverinfo": "text",
                    "hovertext": [_hover(s, shown) for _, s in line.points],
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
        heats = _spread(sorted({x for line in lines for x, _ in line.points}))
        ticks = {"tickvals": heats, "ticktext": [f"{heat:g}" for heat in heats], "autorange": "reversed"}
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
        "yaxis2": {"title": {"text": shown}, "domain": [0, 0.46], "fixedrange": True},
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "font": {"color": "#1d2733"}},
    }
    return {"data": traces, "layout": layout}


def _hover(setting: Setting, metric: str) -> str:
    which = f"k = {setting.k:,}" if setting.mode == "topk" else setting.mode
    heat = "" if setting.temperature is None else f", temperature {setting.temperature:g}"
    return (
        f"{which}{heat}, {setting.normalizer}<br>distance {_cell(setting.distance)}<br>{metric} {_cell(setting.score)}"
    )
