"""A store as one HTML page: hard, soft and top-k answers side by side, moved by sliders, without any network."""

from __future__ import annotations

import html
import json
import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb.errors import (
    ArgumentError,
    DtypeError,
    MissingPackageError,
    ShapeError,
    check_choice,
    check_float_tensor,
    check_number,
    check_positive,
    check_real,
    describe,
)
from softdb.store import SoftKVStore

__all__ = ["write_page"]

SHOWN = 12  # rows with a bar of their own
WIDEST_VALUE = 12  # entries of a value that bars can show
MOST_QUERIES = 1000
DIGITS = 5
# So many numbers a page may hold before scores are left out: about 2 MB, less than plotly itself.
BUDGET = 200_000
FEWEST_KEPT = 256
BINS = 512
TEMPERATURES = 61
MOST_TICKS = 6

MODES = ("exact", "topk", "hard")
DASHES = {
    "softmax": "solid",
    "straight_through": "dash",
    "gumbel": "dot",
    "sparsemax": "dashdot",
    "entmax15": "longdash",
}
DRAWN_DASHES = {"solid": "none", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "14 5"}
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


def write_page(
    path: str | os.PathLike[str],
    store: SoftKVStore,
    queries: Tensor,  # (Q, key_dim) or (key_dim,)
    *,
    labels: Sequence[str] | Mapping[int, str] | None = None,
    query_labels: Sequence[str] | None = None,
    value_labels: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    metric: str | None = None,
    title: str = "Hard or soft?",
) -> None:
    """Write a page on which one sees how a store answers, from hard to soft and from one row to all.

    The page shows ``softmax(scores / temperature)`` over the k best rows, or over all, for any of ``queries``, a
    temperature and a k that sliders choose. It is one file that loads nothing, of 5 to 7 MB, most of which is plotly.
    Every row's score is in it where there are at most some 200,000 numbers in all; else the best rows' scores, and the
    others' as a histogram. Needs plotly: ``pip install 'softdb[page]'``.

    The store is read exactly, once for each query, reporting all rows: with ``track_usage`` these reads count.

    Args:
        path: The file to write, in a folder that exists. What was there is replaced, at once.
        store: The store, or anything with its ``read``, ``get``, ``ids``, ``temperature`` and ``metric``.
        queries: What to ask, (Q, key_dim) or (key_dim,), floating point; at most 1,000.
        labels: What to call the rows: a string for each in the order of ``store.ids``, or by id. Else "row 17".
        query_labels: What to call the queries, a string each. Else "query 1".
        value_labels: What to call the entries of a value, a string each. Else "value 1". Values wider than 12 are not
            shown.
        columns: Measurements to draw besides, lists of one entry per measured setting: "mode" ("exact", "topk",
            "hard"), "normalizer", "temperature" (may be None for hard), "k" (None but for topk), "distance" from the
            exact blend, and the metric or "mass". Any other column goes into the table alone.
        metric: The column to draw beside the distance, such as "accuracy"; "mass" if None.
        title: The page's heading.

    Raises:
        ArgumentError: The store is empty, the folder does not exist, or labels or columns do not fit.
        DtypeError, ShapeError, DeviceError, NonFiniteError: An argument is not as above.
        MissingPackageError: plotly is not installed.

    After an error nothing has been written.

    Example:
        >>> import tempfile
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(Path(folder) / "page.html", store, torch.tensor([2.0, 1.0]), labels=["east", "north"])
        ...     "east" in (Path(folder) / "page.html").read_text(encoding="utf-8")
        True
    """
    target = _checked_path(path)
    ids = store.ids
    if len(ids) == 0:
        raise ArgumentError("store: expected at least one row, got none; add rows first")
    first = store.get(ids[:1])
    queries = _checked_queries(queries, first.keys)
    names = _checked_labels(labels, ids.tolist())
    questions = _checked_names("query_labels", query_labels, len(queries), "query")
    if not isinstance(title, str):
        raise DtypeError(f"title: expected a string, got {describe(title)}")
    settings, metric = _checked_columns(columns, metric)
    width = first.values.shape[-1]
    shown_width = width if width <= WIDEST_VALUE else 0
    entries = _checked_names("value_labels", value_labels, width, "value")[:shown_width]
    script = _plotly_script()

    data = _explorer(store, queries, names, entries)
    data["figures"] = _figures(settings, metric, len(ids))
    kept = len(data["queries"][0]["gaps"])
    parts = {
        "title": html.escape(title),
        "rows": "one row" if len(ids) == 1 else f"{len(ids):,} rows",
        "queries": "".join(
            f'<option value="{place}">{html.escape(question)}</option>' for place, question in enumerate(questions)
        ),
        "metric": html.escape(str(store.metric)),
        "temperature": f"{float(store.temperature):g}",
        "accuracy": ""
        if kept == len(ids)
        else f" The {kept:,} best rows are on this page one by one, the others summed up in {BINS} groups.",
        "measured": "" if columns is None else _measured(columns, settings, metric, len(ids)),
        "data": _embedded(data),
        "plotly": script,
    }
    template = (resources.files("softdb") / "data" / "page.html").read_text(encoding="utf-8")
    # In one pass: what looks like a placeholder in a label stays as it is.
    _write(target, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


# -- arguments -------------------------------------------------------------------------------------------


def _checked_path(path: str | os.PathLike[str]) -> Path:
    try:
        target = Path(path)
    except TypeError as error:
        raise DtypeError(f"path: expected the name of a file, got {describe(path)}") from error
    if not target.parent.is_dir():
        raise ArgumentError(
            f"path: expected a file in a folder that exists, got {str(target)!r}; make the folder first"
        )
    if target.is_dir():
        raise ArgumentError(f"path: expected the name of a file, got the folder {str(target)!r}; add a name")
    return target


def _checked_queries(queries: Tensor, keys: Tensor) -> Tensor:
    single = isinstance(queries, Tensor) and queries.dim() == 1
    width = keys.shape[-1]
    queries = check_float_tensor("queries", queries, (width,) if single else (None, width), keys.device)
    queries = queries.detach().reshape(-1, width)
    if not 1 <= len(queries) <= MOST_QUERIES:
        raise ShapeError(f"queries: expected 1 to {MOST_QUERIES:,} queries, got {len(queries):,}; choose some of them")
    return queries


def _checked_labels(labels: Sequence[str] | Mapping[int, str] | None, ids: list[int]) -> Mapping[int, str]:
    """Labels by id; ids without one are called "row 17"."""
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        for label in labels.values():
            if not isinstance(label, str):
                raise DtypeError(f"labels: expected a string for each id, got {describe(label)}")
        return labels
    return dict(zip(ids, _checked_names("labels", labels, len(ids), "row"), strict=True))


def _checked_names(name: str, given: Sequence[str] | None, count: int, default: str) -> list[str]:
    if given is None:
        return [f"{default} {number}" for number in range(1, count + 1)]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DtypeError(f"{name}: expected a list of strings, got {describe(given)}")
    for label in given:
        if not isinstance(label, str):
            raise DtypeError(f"{name}: expected strings, got {describe(label)} among them; convert it with str()")
    if len(given) != count:
        raise ArgumentError(f"{name}: expected {count:,} strings, one for each {default}, got {len(given):,}")
    return list(given)


class Setting(NamedTuple):
    """One measured setting."""

    mode: str
    normalizer: str
    temperature: float | None
    k: int | None
    distance: float | None
    score: float | None  # in the metric


def _checked_columns(columns: Mapping[str, Sequence[Any]] | None, metric: str | None) -> tuple[list[Setting], str]:
    if columns is None:
        if metric is not None:
            raise ArgumentError(f"metric: expected None without columns, got {metric!r}; give the columns, too")
        return [], "mass"
    if not isinstance(columns, Mapping):
        raise DtypeError(f"columns: expected a mapping from names to lists, got {describe(columns)}")
    chosen = "mass" if metric is None else metric
    needed = ("mode", "normalizer", "temperature", "k", "distance", chosen)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ArgumentError(f"columns: expected {', '.join(map(repr, needed))}, got none named {missing[0]!r}")
    for name, column in columns.items():
        if isinstance(column, str) or not hasattr(column, "__len__") or not hasattr(column, "__getitem__"):
            raise DtypeError(f"columns[{name!r}]: expected a list, got {describe(column)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"columns: expected lists of one length, got {lengths}")
    if not lengths[chosen]:
        raise ArgumentError("columns: expected at least one entry in each, got none; leave columns out instead")
    settings = []
    for mode, normalizer, temperature, k, distance, score in zip(*(columns[name] for name in needed), strict=True):
        check_choice("columns['mode']", mode, MODES)
        check_choice("columns['normalizer']", normalizer, tuple(DASHES))
        heat = _measurement("temperature", temperature)
        if mode != "hard" and not (heat is not None and heat > 0):
            raise ArgumentError(
                f"columns['temperature']: expected numbers above 0 but for hard reads, got {temperature!r}"
            )
        settings.append(
            Setting(
                mode,
                normalizer,
                heat,
                check_positive("columns['k']", k) if mode == "topk" else None,
                None if _measurement("distance", distance) is None else check_number("columns['distance']", distance),
                _measurement(chosen, score),
            )
        )
    return settings, chosen


def _measurement(name: str, value: Any) -> float | None:
    """``value`` as a float; None for what was not measured, None or not finite."""
    if value is None:
        return None
    number = check_real(f"columns[{name!r}]", value)
    return number if math.isfinite(number) else None


# -- what the sliders move -------------------------------------------------------------------------------


def _explorer(store: SoftKVStore, queries: Tensor, names: Mapping[int, str], entries: list[str]) -> dict[str, Any]:
    """What the page's script knows.

    Scores are kept as gaps, best score - score, before any temperature. Rounded to five digits, at most 5e-5 of a gap,
    they give weights exp(-x) / sum, x = gap / T, that are wrong by 5e-5 x of themselves: next to nothing where a row
    weighs much, at any temperature and however large the scores are.
    """
    ids = store.ids
    count, width = len(ids), len(entries)
    kept = count
    if count * (len(queries) + width) > BUDGET:
        kept = min(max(BUDGET // (len(queries) * (1 + width)), FEWEST_KEPT), count)

    found: list[dict[str, Any]] = []
    places: dict[int, int] = {}  # of the rows whose values are needed, by id
    widest, seconds = 0.0, []
    for query in queries:
        order, best, gaps = _ranked(store, query, count)
        widest = max(widest, float(gaps[-1]))
        seconds.append(float(gaps[1]) if count > 1 else 0.0)
        top = order[:kept].tolist()
        rest = store.get(order[kept:]).values.cpu() if width else torch.zeros(count - kept, 0, device="cpu")
        found.append(
            {
                "best": best,
                "gaps": _rounded(gaps[:kept]),
                "rows": [places.setdefault(row, len(places)) for row in top] if width else [],
                "labels": [" ".join(names.get(row, f"row {row}").split()) for row in top[:SHOWN]],
                "tail": _histogram(gaps[kept:], rest),
            }
        )
    values = store.get(list(places)).values.cpu() if places else torch.zeros(0, width, device="cpu")
    temperature = float(store.temperature)
    return {
        "rows": count,
        "queries": found,
        "values": _rounded(values),
        "value_labels": entries,
        "temperature": temperature,
        "temperatures": [*_temperatures(temperature, widest, seconds), 0],
        "ks": [*_ks(min(kept, count - 1)), None],
    }


def _ranked(store: SoftKVStore, query: Tensor, count: int) -> tuple[Tensor, float, Tensor]:
    """All ids best first, the best score, and how far below it each score lies; scores without the temperature."""
    with torch.no_grad():
        read = store.read(query, "exact", k=count)
    if read.ids is None or read.scores is None:
        raise ArgumentError("store: expected reads with k to report ids and scores, got one that does not")
    scores = read.scores.detach().cpu().double().flatten() * float(store.temperature)
    return read.ids.cpu().flatten(), float(scores[0]), scores[0] - scores


def _histogram(gaps: Tensor, values: Tensor) -> dict[str, Any]:  # (n,) ascending, (n, width)
    """The rows that are left out, as bins: how many, their mean gap, their mean value.

    A bin of n rows counts n * exp(-mean gap / T), for any temperature T. The error of that is of second order in the
    bin's width: less by at most (r x)² / 8 of itself, where r is the bin's width relative to its gaps, x = gap / T, and
    rows with an x far beyond log n have no weight left to be wrong about. Bins are equally wide in the logarithm, so r
    is the same for all: with gaps of 0.1 to 1 it is 0.0045, and the sum over all rows is right to 1e-3 at every
    temperature; where gaps differ by a factor of a million, to a few percent at the worst.
    """
    if len(gaps) == 0:
        return {"counts": [], "gaps": [], "values": []}
    high = float(gaps[-1])
    low = max(float(gaps[0]), high * 1e-6)
    if low < high:
        bins = ((gaps.clamp(min=low) / low).log() * (BINS / math.log(high / low))).long().clamp(max=BINS - 1)
    else:
        bins = torch.zeros_like(gaps, dtype=torch.int64)
    counts = torch.bincount(bins, minlength=BINS)
    filled = counts > 0
    totals = counts[filled].double()
    gap_sums = gaps.new_zeros(BINS).index_add_(0, bins, gaps)
    value_sums = gaps.new_zeros(BINS, values.shape[1]).index_add_(0, bins, values.double())
    return {
        "counts": counts[filled].tolist(),
        "gaps": _rounded(gap_sums[filled] / totals),
        "values": _rounded(value_sums[filled] / totals.unsqueeze(1)),
    }


def _temperatures(own: float, widest: float, seconds: list[float]) -> list[float]:
    """The slider's stops, soft to hard, with the store's own temperature among them.

    At the softest even the worst row weighs half as much as the best; at the hardest the best row of most queries
    outweighs the second by far.
    """
    if widest > 0:
        positive = sorted(second for second in seconds if second > 0)
        gap = positive[len(positive) // 2] if positive else widest
        softest, hardest = widest / math.log(2), min(max(gap / 10, widest / 1e5), widest / 100)
    else:
        softest, hardest = own * 100, own / 100
    softest, hardest = max(softest, own), min(hardest, own)
    step = math.log(hardest / softest) / (TEMPERATURES - 1)
    stops = [float(f"{softest * math.exp(step * place):.3g}") for place in range(TEMPERATURES)]
    stops[min(max(round(math.log(own / softest) / step), 0), TEMPERATURES - 1)] = own
    return stops


def _ks(most: int) -> list[int]:
    """1, 2, ... 16, and then four stops to each doubling."""
    stops = list(range(1, 17))
    while stops[-1] < most:
        stops += [stops[-1] // 4 * quarters for quarters in (5, 6, 7, 8)]
    return [stop for stop in stops if stop <= most]


def _rounded(numbers: Tensor) -> Any:
    def shorten(nested: Any) -> Any:
        return [shorten(entry) for entry in nested] if isinstance(nested, list) else float(f"{nested:.{DIGITS}g}")

    return shorten(numbers.tolist())


# -- what was measured -----------------------------------------------------------------------------------


def _measured(columns: Mapping[str, Sequence[Any]], settings: list[Setting], metric: str, rows: int) -> str:
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


def _figures(settings: list[Setting], metric: str, rows: int) -> dict[str, Any]:
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


# -- the file --------------------------------------------------------------------------------------------


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError(
            "write_page: expected plotly, got no such package; pip install 'softdb[page]'"
        ) from error
    # The same string to JavaScript; to HTML it would be the end of the script.
    return re.sub("</(?=script)", r"<\\/", str(get_plotlyjs()), flags=re.IGNORECASE)


def _embedded(data: dict[str, Any]) -> str:
    """``data`` as JSON in which nothing can end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _write(target: Path, text: str) -> None:
    """Write all or nothing: whoever opens the file sees the old one or the new one."""
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
