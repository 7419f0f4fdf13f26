"""Explanation of the result of a read by its rows and their weights."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softdb._checks import (
    check_above_zero,
    check_choice,
    check_finite,
    check_float_tensor,
    check_positive,
    describe,
)
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.lab.choices import resolve_temperatures
from softdb.lab.comparison import Reference, read_support
from softdb.lab.plotting import create_figure, escape_label, sample_color, set_temperature_axis
from softdb.lab.tables import TextResult, format_range, shorten
from softdb.layers.head_rows import Layer, find_head_rows
from softdb.layers.memory import MemoryLayer
from softdb.reading.result import Read
from softdb.scoring.normalizers import NORMALIZERS, is_hard, is_sparse

__all__ = ["Explanation", "explain"]


Labels = Sequence[str] | Mapping[int, str]


LINE_CHARACTERS = 79


BAR_CHARACTERS = 12


MIN_LABEL_CHARACTERS = 20


MAX_BARS, MAX_CURVES = 8, 5  # rows of each query in the bar chart and in the plot against temperature


@dataclass(frozen=True, eq=False)
class Explanation(TextResult):
    """Result of `explain`: the k rows with the highest scores, for each of Q queries.

    Attributes:
        queries: Labels of the queries.
        labels: Labels of the rows, by id.
        ids: Ids of the rows, (Q, k), highest score first; -1 is padding.
        scores: Their scores, (Q, k).
        weights: Their weights, (Q, k).
        contributions: ``weight * value`` of each row, (Q, k, value_dim).
        values: Result of the read, blended from all rows, (Q, value_dim).
        rest: Weight of all other rows, (Q,).
        effective_rows: exp(entropy of all weights), (Q,).
        temperature: Divisor of the scores.
        temperatures: Temperatures of the weights in ``cooling``, highest first.
        cooling: Weights of the same rows at each of ``temperatures``, (Q, temperatures, k).
        normalizer: Name of the normalizer; "straight_through" for "gumbel" in eval mode.
    """

    queries: tuple[str, ...]
    labels: Mapping[int, str]
    ids: Tensor
    scores: Tensor
    weights: Tensor
    contributions: Tensor
    values: Tensor
    rest: Tensor
    effective_rows: Tensor
    temperature: float
    temperatures: tuple[float, ...]
    cooling: Tensor
    normalizer: str = "softmax"

    def __str__(self) -> str:
        return "\n\n".join("\n".join(self._lines(query)) for query in range(len(self.queries)))

    def _lines(self, query: int) -> Iterator[str]:
        normalizer = "" if self.normalizer == "softmax" else f", {self.normalizer}"
        yield f"{self.queries[query]}  (temperature {self.temperature:.4g}{normalizer})"
        places = [place for place, row in enumerate(self.ids[query].tolist()) if row >= 0]
        for line, equal in itertools.groupby(self._line(query, place) for place in places):
            count = len(list(equal))
            yield line if count == 1 else f"{line}  ({count} equal rows)"
        rest, effective = 100 * float(self.rest[query]), float(self.effective_rows[query])
        yield f"  {rest:5.1f} %  in all other rows; {effective:,.1f} effective rows"
        weights = [f"{100 * weight:.0f} %" for weight in self.cooling[query, :, 0].tolist()]
        steps = [
            f"{weight} at {format_range([temperature for _, temperature in group], 3)}"
            for weight, group in itertools.groupby(
                zip(weights, self.temperatures, strict=True), key=lambda step: step[0]
            )
        ]
        text = f"weight of the best row: {', '.join(steps)}"
        yield from textwrap.wrap(text, LINE_CHARACTERS, initial_indent="  ", subsequent_indent="  ")

    def _line(self, query: int, place: int) -> str:
        weight = float(self.weights[query, place])
        bar = "#" * round(BAR_CHARACTERS * weight)
        start = f"  {100 * weight:5.1f} %  {bar:<{BAR_CHARACTERS}}  {self._describe_contribution(query, place)}  "
        label = self.labels[int(self.ids[query, place])]
        return start + shorten(label, max(MIN_LABEL_CHARACTERS, LINE_CHARACTERS - len(start)))

    def _describe_contribution(self, query: int, place: int) -> str:
        contribution = self.contributions[query, place]
        if contribution.numel() == 1:
            return f"adds {float(contribution):9.3g}"
        return f"adds a vector of norm {float(contribution.norm()):.3g}" if contribution.numel() else "adds nothing"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the weights of each query, as bars and against temperature.

        With several queries, a heat map of the weights of all reported rows comes first.

        Args:
            path: Image file to write. Its suffix selects the format.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: matplotlib does not support the suffix.
        """
        count, shown = len(self.queries), min(self.ids.shape[1], MAX_BARS)
        lines = count + (count > 1)
        heat = 0.3 * len(self._reported_rows(shown)) + 1.4 if count > 1 else 0.0
        figure = create_figure(path, (13, heat + 3.0 * count))
        grid = figure.add_gridspec(lines, 2, height_ratios=[heat] * (count > 1) + [3.0] * count, width_ratios=[3, 2])
        if count > 1:
            self._plot_heat_map(figure.add_subplot(grid[0, :]), shown)
        for query in range(count):
            self._plot_bars(figure.add_subplot(grid[query + (count > 1), 0]), query, shown)
            self._plot_against_temperature(
                figure.add_subplot(grid[query + (count > 1), 1]), query, min(shown, MAX_CURVES)
            )
        figure.savefig(path, dpi=120)

    def _reported_rows(self, shown: int) -> list[int]:
        return [row for row in dict.fromkeys(self.ids[:, :shown].flatten().tolist()) if row >= 0]

    def _plot_heat_map(self, axes: Any, shown: int) -> None:
        rows = self._reported_rows(shown)
        weights = torch.zeros(len(rows), len(self.queries), device="cpu")
        for query, ids in enumerate(self.ids.tolist()):
            for place, row in enumerate(ids):
                if row in rows:
                    weights[rows.index(row), query] = self.weights[query, place]
        image = axes.imshow(weights.tolist(), aspect="auto", cmap="Blues", vmin=0, vmax=float(weights.max()) or 1.0)
        axes.set_xticks(range(len(self.queries)), [escape_label(query, 40) for query in self.queries])
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), [escape_label(self.labels[row], 60) for row in rows], fontsize="small")
        for (line, column), weight in zip(
            itertools.product(range(len(rows)), range(len(self.queries))), weights.flatten().tolist(), strict=True
        ):
            if weight >= 0.005:
                color = "white" if weight > 0.6 * float(weights.max()) else "black"
                axes.text(
                    column, line, f"{100 * weight:.0f} %", ha="center", va="center", fontsize="small", color=color
                )
        axes.figure.colorbar(image, ax=axes, label="weight", fraction=0.03, pad=0.01)

    def _plot_bars(self, axes: Any, query: int, shown: int) -> None:
        rows = [(row, place) for place, row in enumerate(self.ids[query, :shown].tolist()) if row >= 0]
        names = [escape_label(self.labels[row], 50) for row, _ in rows] + ["all other rows"]
        held = [float(self.weights[query, place]) for _, place in rows]
        held.append(max(0.0, 1.0 - sum(held)))
        colors = ["#d55e00", *["#0072b2"] * (len(rows) - 1), "#999999"][-len(names) :]
        axes.barh(range(len(names)), held, color=colors)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight; a hard read returns the first row only", fontsize="small")
        effective = float(self.effective_rows[query])
        axes.set_title(
            f"“{escape_label(self.queries[query], 80)}”: {effective:,.1f} effective rows", fontsize="medium", loc="left"
        )

    def _plot_against_temperature(self, axes: Any, query: int, shown: int) -> None:
        for place, row in enumerate(self.ids[query, :shown].tolist()):
            if row >= 0:
                color = "#d55e00" if place == 0 else sample_color(place, shown)
                weights = self.cooling[query, :, place].tolist()
                label = escape_label(self.labels[row], 28)
                axes.plot(self.temperatures, weights, ".-", label=label, color=color, clip_on=False)
        axes.axvline(self.temperature, color="#999999", linestyle=":")
        set_temperature_axis(axes, self.temperatures)
        axes.set_ylim(0, 1)
        axes.set_ylabel("weight", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper left")


@torch.no_grad()
def explain(
    store: Any,
    query: Tensor,  # (key_dim,) or (Q, key_dim)
    labels: Labels | None = None,
    k: int = 10,
    *,
    query_labels: Sequence[str] | None = None,
    temperature: float | None = None,
    temperatures: Sequence[float] | None = None,
    normalizer: str | None = None,
    generator: torch.Generator | None = None,
    head: int | None = None,
    sequence: int | None = None,
) -> Explanation:
    """List the rows that an exact read blends, with their weights and contributions.

    The read is ``store.read(query, temperature=temperature, normalizer=normalizer)``. The contribution of a row is its
    weight times its value, so the values of the read are the sum of the contributions of all rows. The result lists the
    k rows with the highest scores, and their weights at several temperatures.

    Instead of a store, pass a layer of `softdb.layers` and its inputs, (dim,) or (Q, dim). The result explains the read
    of each head, before the output projection:

    - A `softdb.layers.MemoryLayer` reads its rows with its own temperature and normalizer; "hard" is explained as
      "straight_through". In topk mode, the k candidates have all the weight. With ``tolerance``, the layer's read is an
      estimate of the exact read, and the result explains the exact read.
    - A `softdb.layers.ProductKeyMemory` reads its k rows of ``store.weight``. The weights at other temperatures are
      computed over the same k rows.
    - A `softdb.layers.ContextMemory` reads tokens. ``query`` holds the next tokens, (n, dim), of one sequence; they are
      not stored. Ids are positions: tokens are counted from 0 at the last ``reset``, and the first token of ``query``
      has the number ``layer.length``. Tokens have document 0, as in a call without ``documents``.

    Batch normalization of queries uses its running statistics. Layers and their pasts do not change, except that a
    store that tracks usage counts the reads. The cost is that of a few exact reads of the rows or, in topk mode, of one
    search and a few reads of the candidates.

    Args:
        store: A `softdb.SoftKVStore`, or a layer.
        query: One query or several, floating point; with a layer its inputs, (dim,) or (Q, dim).
        labels: Labels of the rows: a sequence in the order of ``store.ids``, or a mapping from ids. By default
            "row 17" for id 17. With a `softdb.layers.ContextMemory`, a sequence has the labels of all tokens since
            ``reset``, followed by those of ``query``.
        k: Number of rows to list for each query.
        query_labels: Labels of the queries. By default "query 0", "query 1" and so on.
        temperature: Divisor of the scores; by default the store's or the layer's own temperature.
        temperatures: Temperatures to list weights at; by default 8, 4, 2, 1, 0.5 and 0.25 times the store's own.
        normalizer: Name of the normalizer, as in `softdb.SoftKVStore.read`; by default that of the layer, or "softmax".
            With "gumbel", each temperature draws its own noise, and ``scores`` include the noise.
        generator: Generator for the noise of "gumbel". If None, the default generator of torch.
        head: Number of the head of a layer, from 0. If None, all heads are listed, one after another for each query.
            It is required if the heads of the layer have different rows or temperatures.
        sequence: With a `softdb.layers.ContextMemory`, index of the sequence in the batch; by default the first.

    Returns:
        An `Explanation`. ``print(found.table())`` prints it, ``found.plot(path)`` plots it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is invalid: there is no such head, or the
            argument does not apply to the store or layer.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> query, labels = torch.tensor([1.0, 0.0]), ["east", "north"]
        >>> print(lab.explain(store, query, labels, query_labels=["where to?"]).table())
        where to?  (temperature 1)
           94.4 %  ###########   adds    0.944  east
            5.6 %  #             adds    0.112  north
            0.0 %  in all other rows; 1.2 effective rows
          weight of the best row: 59 % at 8, 67 % at 4, 80 % at 2, 94 % at 1, 100 % at
          0.5 to 0.25
        >>> print(lab.explain(store, query, labels, normalizer="sparsemax").table())
        query 0  (temperature 1, sparsemax)
          100.0 %  ############  adds        1  east
            0.0 %                adds        0  north
            0.0 %  in all other rows; 1.0 effective rows
          weight of the best row: 68 % at 8, 85 % at 4, 100 % at 2 to 0.25

        Tokens of a sequence that a head attends to:

        >>> from softdb.layers import ContextMemory
        >>> layer = ContextMemory(16, rows=100, heads=2).eval()
        >>> tokens = torch.randn(1, 6, 16)
        >>> _ = layer(tokens[:, :5])
        >>> found = lab.explain(layer, tokens[0, 5], ["the", "river", "bank", "was", "so", "steep"], head=1)
        >>> sorted(found.labels)                                 # the token attends to itself, too
        [0, 1, 2, 3, 4, 5]
    """
    check_float_tensor("query", query, (-1, None))
    if query.dim() > 2 or query.numel() == 0:
        raise ShapeError(
            f"query: expected shape (key_dim,) or (Q, key_dim), or (dim,) or (Q, dim) with a layer, at least one, got "
            f"{tuple(query.shape)}"
        )
    check_finite("query", query)
    queries = query.reshape(-1, query.shape[-1])
    names = _name_queries(query_labels, len(queries))
    options: dict[str, Any] = {"k": k, "temperature": temperature, "temperatures": temperatures, "generator": generator}
    if not isinstance(store, Layer):
        for name, value in (("head", head), ("sequence", sequence)):
            if value is not None:
                raise ArgumentError(f"{name}: expected no value with a store, which has none; leave it out")
        normalizer = "softmax" if normalizer is None else normalizer
        return _explain(store, queries, names, labels, store.ids, "row", normalizer=normalizer, **options)
    check_float_tensor("query", query, (-1, store.dim))
    explanations = []
    for number in range(store.heads) if head is None else [head]:
        rows = find_head_rows(store, queries, number, sequence)
        head_names = (
            names if head is not None or store.heads == 1 else tuple(f"{name}, head {number}" for name in names)
        )
        chosen = rows.normalizer if normalizer is None else normalizer
        explanations.append(
            _explain(rows, rows.queries, head_names, labels, rows.ids, rows.noun, normalizer=chosen, **options)
        )
    _check_heads(store, explanations)
    return _interleave(explanations)


def _name_queries(labels: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Return the labels of the queries; by default "query 0"."""
    if isinstance(labels, str):
        raise DtypeError(f"query_labels: expected a sequence of strings, got {describe(labels)}; pass [{labels!r}]")
    names = tuple(f"query {number}" for number in range(count)) if labels is None else tuple(map(str, labels))
    if len(names) != count:
        raise ShapeError(f"query_labels: expected one for each of {count} queries, got {len(names)}")
    return names


def _check_heads(layer: Layer, explanations: Sequence[Explanation]) -> None:
    """Raise if the rows or temperatures of several heads differ."""
    if len(explanations) == 1:
        return
    problem = None
    if isinstance(layer, MemoryLayer) and len(layer.stores) > 1:
        problem = "its own rows"
    elif len({(one.temperature, one.temperatures) for one in explanations}) > 1:
        problem = "its own temperature"
    if problem is not None:
        raise ArgumentError(
            f"head: expected a number from 0 to {layer.heads - 1}, since each head of this {type(layer).__name__} has "
            f"{problem}, got None; pass head=..."
        )


def _interleave(explanations: Sequence[Explanation]) -> Explanation:
    """Join the explanations of several heads: all heads of query 0 come first."""
    first = explanations[0]
    joined: dict[str, Any] = {}
    for name in ("ids", "scores", "weights", "contributions", "values", "rest", "effective_rows", "cooling"):
        joined[name] = torch.stack([getattr(one, name) for one in explanations], dim=1).flatten(0, 1)
    labels = {row: label for one in explanations for row, label in one.labels.items()}
    queries = tuple(itertools.chain(*zip(*(one.queries for one in explanations), strict=True)))
    return replace(first, queries=queries, labels=labels, **joined)


def _explain(
    store: Any,
    queries: Tensor,
    names: tuple[str, ...],
    labels: Labels | None,
    ids: Tensor,
    noun: str,
    *,
    k: int,
    temperature: float | None,
    temperatures: Sequence[float] | None,
    normalizer: str,
    generator: torch.Generator | None,
) -> Explanation:
    """Explain the reads of a store, or of the rows of a head.

    Args:
        store: Object with the ``read``, ``get`` and ``temperature`` of a store.
        queries: (Q, key_dim).
        names: Labels of the queries.
        labels: Labels of the rows, as for `explain`.
        ids: Ids of all rows that labels name.
        noun: Name of a row in default labels.
        k: As for `explain`.
        temperature: As for `explain`.
        temperatures: As for `explain`.
        normalizer: As for `explain`.
        generator: As for `explain`.
    """
    check_choice("normalizer", normalizer, NORMALIZERS)
    count = check_positive("k", k)
    resolved = resolve_temperatures(store, temperatures)
    own = float(store.temperature) if temperature is None else check_above_zero("temperature", temperature)
    options = {"normalizer": normalizer, "generator": generator}
    reference = Reference(store, [queries], own)
    read = store.read(queries.double(), k=count, temperature=own, **options)
    known = read.ids >= 0
    rows, places = read.ids[known].unique(return_inverse=True)
    values = torch.zeros(*read.ids.shape, reference.values.shape[-1], dtype=torch.float64, device=queries.device)
    values[known] = store.get(rows).values.double()[places]
    others = [store.read(queries.double(), k=count, temperature=step, **options) for step in resolved]
    return Explanation(
        queries=names,
        labels=_resolve_labels(ids, labels, rows.tolist(), noun),
        ids=read.ids,
        scores=read.scores,
        weights=read.weights,
        contributions=read.weights.unsqueeze(-1) * values,
        values=reference.values if normalizer == "softmax" else read.values.to(queries.dtype),
        rest=(1 - read.weights.sum(-1)).clamp(min=0),
        effective_rows=_effective_rows(store, queries, reference, read),
        temperature=own,
        temperatures=tuple(resolved),
        cooling=torch.stack([_weights_at(other, read.ids) for other in others], dim=1),
        normalizer=read.normalizer,
    )


def _effective_rows(store: Any, queries: Tensor, reference: Reference, read: Read) -> Tensor:  # -> (Q,)
    """Compute exp(entropy of all weights) of each query."""
    if is_hard(read.normalizer):
        return torch.ones_like(reference.entropy)
    if not is_sparse(read.normalizer):
        return reference.entropy.exp()
    options = {"normalizer": read.normalizer, "temperature": reference.temperature}
    weights = read_support(store, queries.double(), options).weights
    if weights is None:
        raise DtypeError("store: expected read(query, k=...) to report weights, got none")
    entropy: Tensor = torch.special.entr(weights).sum(-1)
    return entropy.exp()


def _weights_at(read: Read, ids: Tensor) -> Tensor:  # (Q, k) -> (Q, k)
    """Return the weights of ``ids`` in ``read``; 0 for rows that it does not report."""
    if read.ids is None or read.weights is None:
        raise DtypeError("store: expected read(query, k=...) to report ids and weights, got none")
    ordered, order = read.ids.sort(dim=-1)
    places = torch.searchsorted(ordered, ids).clamp(max=ordered.shape[-1] - 1)
    is_reported = (ordered.gather(-1, places) == ids) & (ids >= 0)
    return torch.where(is_reported, read.weights.gather(-1, order).gather(-1, places), 0.0)


def _resolve_labels(known: Tensor, labels: Labels | None, ids: list[int], noun: str) -> dict[int, str]:
    """Return the label of each row; "row 17" for a row without one.

    Args:
        known: Ids that a sequence of labels names, in its order.
        labels: The labels.
        ids: The rows.
        noun: Name of a row.
    """
    if labels is None:
        return {row: f"{noun} {row}" for row in ids}
    if isinstance(labels, Mapping):
        given = {row: labels.get(row) for row in ids}
    else:
        if isinstance(labels, (str, Tensor)):
            raise DtypeError(f"labels: expected a sequence of strings, or a mapping from ids, got {describe(labels)}")
        if len(labels) != len(known):
            order = "of store.ids" if noun == "row" else f"of the {noun}s"
            raise ShapeError(
                f"labels: expected one for each of {len(known):,} {noun}s, in the order {order}, got {len(labels):,}"
            )
        places = {row: place for place, row in enumerate(known.tolist())}
        given = {row: labels[places[row]] for row in ids}
    return {row: f"{noun} {row}" if label is None else str(label) for row, label in given.items()}
