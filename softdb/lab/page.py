"""HTML page that shows hard, top-k and soft reads of a store, with sliders."""

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
from typing import Any

from torch import Tensor

from softdb._checks import check_choice, check_float_tensor, check_number, check_positive, check_real, describe
from softdb.errors import ArgumentError, DtypeError, MissingPackageError, ShapeError
from softdb.lab.comparison import MODES, Comparison
from softdb.lab.page_charts import NORMALIZER_DASHES, Measurement, build_figures, render_measurements
from softdb.lab.page_explorer import HISTOGRAM_BINS, PageSizes, build_explorer
from softdb.store import SoftKVStore

__all__ = ["write_page"]


MAX_VALUE_ENTRIES = 12  # number of entries of a value that the bar chart has room for


MAX_QUERIES = 1000


def write_page(
    path: str | os.PathLike[str],
    store: SoftKVStore,
    queries: Tensor,  # (Q, key_dim) or (key_dim,)
    *,
    labels: Sequence[str] | Mapping[int, str] | None = None,
    query_labels: Sequence[str] | None = None,
    value_labels: Sequence[str] | None = None,
    columns: Comparison | Mapping[str, Sequence[Any]] | None = None,
    metric: str | None = None,
    title: str = "Hard or soft?",
) -> None:
    """Write an HTML page with the weights and answers of a store.

    The page shows ``softmax(scores / temperature)`` over the k best rows, or over all rows. Sliders select the
    temperature and k; a list selects the query. The page is one file of 5 to 7 MB, mostly plotly, and needs no network.
    It contains the score of every row for every query if there are at most about 200,000 scores. Otherwise it contains
    the scores of the best rows, and a histogram of the other scores. Requires plotly: ``pip install 'softdb[page]'``.

    The store is read once for each query, by an exact read that reports all rows. If the store has ``track_usage``, it
    counts these reads.

    Args:
        path: File to write, in an existing directory. An existing file is replaced atomically.
        store: A store, or an object with the ``read``, ``get``, ``ids``, ``temperature`` and ``metric`` of a store.
        queries: (Q, key_dim) or (key_dim,), floating point; at most 1,000.
        labels: Labels of the rows: a sequence in the order of ``store.ids``, or a mapping from ids. By default
            "row 17" for id 17.
        query_labels: Labels of the queries. By default "query 1", "query 2" and so on.
        value_labels: Labels of the entries of a value. By default "value 1", "value 2" and so on. Values with more than
            12 entries are not shown.
        columns: Measurements to plot: a `softdb.lab.Comparison`, or a mapping from column names to lists with one entry
            per setting. Required are the columns "mode" ("exact", "topk" or "hard"), "normalizer", "temperature" (may
            be None for hard), "k" (None unless topk), "distance" (from the exact read), and that of the metric. Other
            columns are shown in the table only.
        metric: Column to plot next to the distance, such as "accuracy". By default the metric of the
            `softdb.lab.Comparison`, or "mass".
        title: Heading of the page.

    Raises:
        ArgumentError: The store is empty, the directory does not exist, or labels or columns do not match the rows.
        DtypeError, ShapeError, DeviceError, NonFiniteError: An argument is invalid.
        MissingPackageError: plotly is not installed.

    If an error is raised, no file has been written.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> queries = torch.tensor([[2.0, 1.0]])
        >>> found = lab.compare(store, queries, ks=(1,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_page(Path(folder) / "page.html", store, queries, labels=["east", "north"], columns=found)
        ...     "east" in (Path(folder) / "page.html").read_text(encoding="utf-8")
        True
    """
    target = _check_path(path)
    ids = store.ids
    if len(ids) == 0:
        raise ArgumentError("store: expected at least one row, got none; add rows first")
    first = store.get(ids[:1])
    queries = _check_queries(queries, first.keys)
    names = _check_labels(labels, ids.tolist())
    query_names = _check_names("query_labels", query_labels, len(queries), "query")
    if not isinstance(title, str):
        raise DtypeError(f"title: expected a string, got {describe(title)}")
    if isinstance(columns, Comparison):
        metric = columns.metric if metric is None else metric
        columns = columns.to_dict()
    measurements, metric = _check_columns(columns, metric)
    width = first.values.shape[-1]
    shown_width = width if width <= MAX_VALUE_ENTRIES else 0
    entries = _check_names("value_labels", value_labels, width, "value")[:shown_width]
    script = _load_plotly()

    data = build_explorer(store, queries, names, entries, PageSizes.usual())
    data["figures"] = build_figures(measurements, metric, len(ids))
    kept = len(data["queries"][0]["gaps"])
    parts = {
        "title": html.escape(title),
        "rows": "one row" if len(ids) == 1 else f"{len(ids):,} rows",
        "queries": "".join(
            f'<option value="{place}">{html.escape(name)}</option>' for place, name in enumerate(query_names)
        ),
        "metric": html.escape(str(store.metric)),
        "temperature": f"{float(store.temperature):g}",
        "accuracy": ""
        if kept == len(ids)
        else f" The page has the scores of the {kept:,} best rows, and a histogram of the other scores with "
        f"{HISTOGRAM_BINS} bins.",
        "measured": "" if columns is None else render_measurements(columns, measurements, metric, len(ids)),
        "data": _embed(data),
        "plotly": script,
    }
    template = (resources.files("softdb") / "data" / "page.html").read_text(encoding="utf-8")
    # One pass, so that a label that looks like a placeholder is not replaced.
    _write(target, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def _check_path(path: str | os.PathLike[str]) -> Path:
    try:
        target = Path(path)
    except TypeError as error:
        raise DtypeError(f"path: expected the name of a file, got {describe(path)}") from error
    if not target.parent.is_dir():
        raise ArgumentError(
            f"path: expected a file in an existing directory, got {str(target)!r}; create the directory first"
        )
    if target.is_dir():
        raise ArgumentError(f"path: expected the name of a file, got the directory {str(target)!r}; append a file name")
    return target


def _check_queries(queries: Tensor, keys: Tensor) -> Tensor:
    single = isinstance(queries, Tensor) and queries.dim() == 1
    width = keys.shape[-1]
    queries = check_float_tensor("queries", queries, (width,) if single else (None, width), keys.device)
    queries = queries.detach().reshape(-1, width)
    if not 1 <= len(queries) <= MAX_QUERIES:
        raise ShapeError(f"queries: expected 1 to {MAX_QUERIES:,} queries, got {len(queries):,}; pass fewer")
    return queries


def _check_labels(labels: Sequence[str] | Mapping[int, str] | None, ids: list[int]) -> Mapping[int, str]:
    """Return the given labels by id."""
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        for label in labels.values():
            if not isinstance(label, str):
                raise DtypeError(f"labels: expected a string for each id, got {describe(label)}")
        return labels
    return dict(zip(ids, _check_names("labels", labels, len(ids), "row"), strict=True))


def _check_names(name: str, given: Sequence[str] | None, count: int, default: str) -> list[str]:
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


def _check_columns(columns: Mapping[str, Sequence[Any]] | None, metric: str | None) -> tuple[list[Measurement], str]:
    if columns is None:
        if metric is not None:
            raise ArgumentError(f"metric: expected None without columns, got {metric!r}; pass columns too")
        return [], "mass"
    if not isinstance(columns, Mapping):
        raise DtypeError(f"columns: expected a Comparison or a mapping from names to lists, got {describe(columns)}")
    chosen = "mass" if metric is None else metric
    needed = ("mode", "normalizer", "temperature", "k", "distance", chosen)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ArgumentError(f"columns: expected {', '.join(map(repr, needed))}, got none named {missing[0]!r}; add it")
    for name, column in columns.items():
        if isinstance(column, str) or not hasattr(column, "__len__") or not hasattr(column, "__getitem__"):
            raise DtypeError(f"columns[{name!r}]: expected a list, got {describe(column)}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"columns: expected lists of one length, got {lengths}")
    if not lengths[chosen]:
        raise ArgumentError("columns: expected at least one entry in each, got none; omit columns")
    measurements = []
    for mode, normalizer, temperature, k, distance, score in zip(*(columns[name] for name in needed), strict=True):
        check_choice("columns['mode']", mode, MODES)
        check_choice("columns['normalizer']", normalizer, tuple(NORMALIZER_DASHES))
        number = _check_measurement("temperature", temperature)
        if mode != "hard" and not (number is not None and number > 0):
            raise ArgumentError(
                f"columns['temperature']: expected numbers above 0, except for hard reads, got {temperature!r}"
            )
        measurements.append(
            Measurement(
                mode,
                normalizer,
                number,
                check_positive("columns['k']", k) if mode == "topk" else None,
                None
                if _check_measurement("distance", distance) is None
                else check_number("columns['distance']", distance),
                _check_measurement(chosen, score),
            )
        )
    return measurements, chosen


def _check_measurement(name: str, value: Any) -> float | None:
    """Return a measurement as a float, or None if it is missing or not finite."""
    if value is None:
        return None
    number = check_real(f"columns[{name!r}]", value)
    return number if math.isfinite(number) else None


def _load_plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError(
            "plotly: expected an installed package to write a page, got none; run pip install 'softdb[page]'"
        ) from error
    # The HTML parser would end the script at "</script"; JavaScript reads the escaped string as the same one.
    return re.sub("</(?=script)", r"<\\/", str(get_plotlyjs()), flags=re.IGNORECASE)


def _embed(data: dict[str, Any]) -> str:
    """Encode data as JSON without characters that HTML interprets."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _write(target: Path, text: str) -> None:
    """Write a file atomically: readers see the old text or the new one."""
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
