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
from typing import Any

from torch import Tensor

from softdb._checks import check_choice, check_float_tensor, check_number, check_positive, check_real, describe
from softdb.errors import ArgumentError, DtypeError, MissingPackageError, ShapeError
from softdb.lab.page_charts import DASHES, MODES, Setting, figures, measured_table
from softdb.lab.page_explorer import BINS, PageSizes, explorer_of
from softdb.store import SoftKVStore

__all__ = ["write_page"]


WIDEST_VALUE = 12  # entries of a value that bars can show


MOST_QUERIES = 1000


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
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from softdb import SoftKVStore
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

    data = explorer_of(store, queries, names, entries, PageSizes.usual())
    data["figures"] = figures(settings, metric, len(ids))
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
        "measured": "" if columns is None else measured_table(columns, settings, metric, len(ids)),
        "data": _embedded(data),
        "plotly": script,
    }
    template = (resources.files("softdb") / "data" / "page.html").read_text(encoding="utf-8")
    # In one pass: what looks like a placeholder in a label stays as it is.
    _write(target, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


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
