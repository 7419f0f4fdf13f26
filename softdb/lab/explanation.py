"""`explain`: which rows an answer is made of."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_above_zero, check_finite, check_float_tensor, check_positive, describe
from softdb.errors import DtypeError, ShapeError
from softdb.lab.choices import temperatures_of
from softdb.lab.comparison import Reference
from softdb.lab.plotting import cooling_axis, drawn_name, figure_of, shade
from softdb.lab.tables import Printed, shortened

__all__ = ["Explanation", "explain"]


Labels = Sequence[str] | Mapping[int, str]


WIDTH = 79


BAR_WIDTH = 12


@dataclass(frozen=True, eq=False)
class Explanation(Printed):
    """What `explain` found, for each of Q queries, about the k best rows.

    Attributes:
        queries: What the queries are called.
        labels: What each row is called, by its id.
        ids: The k best rows of each query, (Q, k), best first; -1 where there were fewer.
        scores: Their scores, (Q, k).
        weights: Their weights, (Q, k).
        contributions: What each adds to the answer, ``weight * value``, (Q, k, value_dim).
        values: The answers, of all rows, (Q, value_dim).
        rest: The weight of all other rows, (Q,).
        effective_rows: exp(entropy of all weights), (Q,).
        temperature: What the scores are divided by.
        temperatures: Those of ``cooling``, the softest first.
        cooling: The weights of the same rows at each temperature, (Q, temperatures, k).
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

    def __str__(self) -> str:
        return "\n\n".join("\n".join(self._lines(query)) for query in range(len(self.queries)))

    def _lines(self, query: int) -> Iterator[str]:
        yield f"{self.queries[query]}  (temperature {self.temperature:.4g})"
        for place, row in enumerate(self.ids[query].tolist()):
            if row < 0:
                continue
            weight = float(self.weights[query, place])
            bar = "#" * round(BAR_WIDTH * weight)
            start = f"  {100 * weight:5.1f} %  {bar:<{BAR_WIDTH}}  {self._added(query, place)}  "
            yield start + shortened(self.labels[row], max(20, WIDTH - len(start)))
        rest, effective = 100 * float(self.rest[query]), float(self.effective_rows[query])
        yield f"  {rest:5.1f} %  in all other rows; {effective:,.1f} rows answer"
        shown = self.cooling[query, :, 0].tolist()
        steps = ", ".join(
            f"{100 * weight:.0f} % at {t:.3g}" for t, weight in zip(self.temperatures, shown, strict=True)
        )
        yield from textwrap.wrap(f"the best row's weight: {steps}", WIDTH, initial_indent="  ", subsequent_indent="  ")

    def _added(self, query: int, place: int) -> str:
        contribution = self.contributions[query, place]
        if contribution.numel() == 1:
            return f"adds {float(contribution):9.3g}"
        return f"adds a vector of norm {float(contribution.norm()):.3g}" if contribution.numel() else "adds nothing"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the weights: of several queries a heat map of all rows seen; of each query bars, and how they move.

        Args:
            path: The picture to write; its ending says of which kind.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: Pictures of that kind are not known.
        """
        count, shown = len(self.queries), min(self.ids.shape[1], 8)
        lines = count + (count > 1)
        heat = 0.3 * len(self._rows_seen(shown)) + 1.4 if count > 1 else 0.0
        figure = figure_of(path, (13, heat + 3.0 * count))
        grid = figure.add_gridspec(lines, 2, height_ratios=[heat] * (count > 1) + [3.0] * count, width_ratios=[3, 2])
        if count > 1:
            self._heat_map(figure.add_subplot(grid[0, :]), shown)
        for query in range(count):
            self._bars(figure.add_subplot(grid[query + (count > 1), 0]), query, shown)
            self._moving(figure.add_subplot(grid[query + (count > 1), 1]), query, min(shown, 5))
        figure.savefig(path, dpi=120)

    def _rows_seen(self, shown: int) -> list[int]:
        return [row for row in dict.fromkeys(self.ids[:, :shown].flatten().tolist()) if row >= 0]

    def _heat_map(self, axes: Any, shown: int) -> None:
        rows = self._rows_seen(shown)
        weights = torch.zeros(len(rows), len(self.queries), device="cpu")
        for query, ids in enumerate(self.ids.tolist()):
            for place, row in enumerate(ids):
                if row in rows:
                    weights[rows.index(row), query] = self.weights[query, place]
        image = axes.imshow(weights.tolist(), aspect="auto", cmap="Blues", vmin=0, vmax=float(weights.max()) or 1.0)
        axes.set_xticks(range(len(self.queries)), [drawn_name(query, 40) for query in self.queries])
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), [drawn_name(self.labels[row], 60) for row in rows], fontsize="small")
        for (line, column), weight in zip(
            itertools.product(range(len(rows)), range(len(self.queries))), weights.flatten().tolist(), strict=True
        ):
            if weight >= 0.005:
                color = "white" if weight > 0.6 * float(weights.max()) else "black"
                axes.text(
                    column, line, f"{100 * weight:.0f} %", ha="center", va="center", fontsize="small", color=color
                )
        axes.figure.colorbar(image, ax=axes, label="weight", fraction=0.03, pad=0.01)

    def _bars(self, axes: Any, query: int, shown: int) -> None:
        rows = [(row, place) for place, row in enumerate(self.ids[query, :shown].tolist()) if row >= 0]
        names = [drawn_name(self.labels[row], 50) for row, _ in rows] + ["all other rows"]
        held = [float(self.weights[query, place]) for _, place in rows]
        held.append(max(0.0, 1.0 - sum(held)))
        colors = ["#d55e00", *["#0072b2"] * (len(rows) - 1), "#999999"][-len(names) :]
        axes.barh(range(len(names)), held, color=colors)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight; a hard lookup takes the first row alone", fontsize="small")
        effective = float(self.effective_rows[query])
        axes.set_title(
            f"“{drawn_name(self.queries[query], 80)}”: {effective:,.1f} rows answer", fontsize="medium", loc="left"
        )

    def _moving(self, axes: Any, query: int, shown: int) -> None:
        for place, row in enumerate(self.ids[query, :shown].tolist()):
            if row >= 0:
                color = "#d55e00" if place == 0 else shade(place, shown)
                weights = self.cooling[query, :, place].tolist()
                axes.plot(self.temperatures, weights, ".-", label=drawn_name(self.labels[row], 28), color=color)
        axes.axvline(self.temperature, color="#999999", linestyle=":")
        cooling_axis(axes, self.temperatures)
        axes.set_ylim(0, 1.02)
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
) -> Explanation:
    """Which rows a soft answer is made of, what each adds, and how their weights move with the temperature.

    Of the exact read; ``values = sum of contributions`` over all rows, of which the k best are told.

    Args:
        store: A `softdb.SoftKVStore`.
        query: What is looked for, once or several times.
        labels: What rows are called: one for each, in the order of ``store.ids``, or by id.
        k: How many of the best rows to tell.
        query_labels: What the queries are called.
        temperature: What the scores are divided by; the store's own unless given.
        temperatures: For the weights' movement; from 8 times to a quarter of the store's own unless given.

    Returns:
        An `Explanation`: ``.table()`` prints it, ``.plot(path)`` draws it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is not as above.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> told = lab.explain(store, torch.tensor([1.0, 0.0]), ["east", "north"], query_labels=["where to?"])
        >>> print(told)
        where to?  (temperature 1)
           94.4 %  ###########   adds    0.944  east
            5.6 %  #             adds    0.112  north
            0.0 %  in all other rows; 1.2 rows answer
          the best row's weight: 59 % at 8, 67 % at 4, 80 % at 2, 94 % at 1, 100 % at
          0.5, 100 % at 0.25
    """
    check_float_tensor("query", query, (-1, None))
    if query.dim() > 2 or query.numel() == 0:
        raise ShapeError(f"query: expected shape (key_dim,) or (Q, key_dim), at least one, got {tuple(query.shape)}")
    check_finite("query", query)
    queries = query.reshape(-1, query.shape[-1])
    count = check_positive("k", k)
    cooling = temperatures_of(store, temperatures)
    own = float(store.temperature) if temperature is None else check_above_zero("temperature", temperature)
    names = (
        tuple(f"query {number}" for number in range(len(queries)))
        if query_labels is None
        else tuple(map(str, query_labels))
    )
    if isinstance(query_labels, str) or len(names) != len(queries):
        raise ShapeError(f"query_labels: expected one for each of {len(queries)} queries, got {len(names)}")
    reference = Reference(store, [queries], own)
    read = store.read(queries.double(), k=count, temperature=own)
    known = read.ids >= 0
    rows, places = read.ids[known].unique(return_inverse=True)
    values = torch.zeros(*read.ids.shape, reference.values.shape[-1], dtype=torch.float64, device=queries.device)
    values[known] = store.get(rows).values.double()[places]
    moved = [store.read(queries.double(), k=count, temperature=step).weights for step in cooling]
    return Explanation(
        queries=names,
        labels=_labels(store, labels, rows.tolist()),
        ids=read.ids,
        scores=read.scores,
        weights=read.weights,
        contributions=read.weights.unsqueeze(-1) * values,
        values=reference.values,
        rest=(1 - read.weights.sum(-1)).clamp(min=0),
        effective_rows=reference.entropy.exp(),
        temperature=own,
        temperatures=tuple(cooling),
        cooling=torch.stack(moved, dim=1),
    )


def _labels(store: Any, labels: Labels | None, wanted: list[int]) -> dict[int, str]:
    """What the rows of the ids ``wanted`` are called."""
    if labels is None:
        return {row: f"row {row}" for row in wanted}
    if isinstance(labels, Mapping):
        return {row: str(labels.get(row, f"row {row}")) for row in wanted}
    if isinstance(labels, (str, Tensor)):
        raise DtypeError(f"labels: expected a sequence of strings, or a mapping from ids, got {describe(labels)}")
    if len(labels) != len(store):
        raise ShapeError(
            f"labels: expected one for each of {len(store):,} rows, in the order of store.ids, got {len(labels):,}"
        )
    places = {row: place for place, row in enumerate(store.ids.tolist())}
    return {row: str(labels[places[row]]) for row in wanted}
