"""Summary of usage counters: which rows reads use, and which are dead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_positive, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.lab.plotting import create_figure, escape_label
from softdb.lab.tables import Tabular, format_table, shorten
from softdb.layers import MemoryLayer, ProductKeyMemory
from softdb.store import SoftKVStore
from softdb.table.usage import Usage

__all__ = ["UsageSummary", "summarize_usage"]


BAR_CHARACTERS = 40


LABEL_CHARACTERS = 48


@dataclass(frozen=True, eq=False)
class UsageSummary(Tabular):
    """Result of `summarize_usage`: counters of n rows, most reads first.

    Rows with equal counts are in the order of their ids. A row that no read has reported is dead.

    Attributes:
        ids: Ids of the rows, (n,) int64.
        reads: Number of reads of each row, (n,) int64.
        weight: Sum of the weights of each row, (n,) float64.
        heads: Head whose store has the row, (n,) int64; None if there is one store.
        labels: Labels of some rows, by id.
        k: Number of rows that the table lists.
    """

    ids: Tensor
    reads: Tensor
    weight: Tensor
    heads: Tensor | None
    labels: Mapping[int, str]
    k: int = 5

    @property
    def dead(self) -> Tensor:
        """Ids of the rows that no read has reported, (m,) int64."""
        return self.ids[self.reads == 0]

    @property
    def effective_rows(self) -> float:
        """Effective number of rows: exp(entropy of ``reads / reads.sum()``).

        It is n if all n rows have equal counts, and 0 without reads.
        """
        total = int(self.reads.sum())
        return float(torch.special.entr(self.reads.double() / total).sum().exp()) if total else 0.0

    def to_dict(self) -> dict[str, list[Any]]:
        """Return a list for each column."""
        columns: dict[str, Any] = {} if self.heads is None else {"head": self.heads.tolist()}
        columns |= {"id": self.ids.tolist(), "label": [self._name(place) for place in range(len(self.ids))]}
        return columns | {"reads": self.reads.tolist(), "weight": self.weight.tolist()}

    def _name(self, place: int) -> str:
        row = int(self.ids[place])
        start = "" if self.heads is None else f"head {int(self.heads[place])}, "
        return start + self.labels.get(row, f"row {row}")

    def _bins(self) -> Iterator[tuple[str, int]]:
        """Yield ranges of reads, doubling in size, and the number of rows in each."""
        yield "0 (dead)", len(self.dead)
        low = 1
        while low <= int(self.reads[0]):
            rows = int(((self.reads >= low) & (self.reads < 2 * low)).sum())
            yield (f"{low:,}" if low == 1 else f"{low:,} to {2 * low - 1:,}"), rows
            low *= 2

    def __str__(self) -> str:
        count, dead, total = len(self.ids), len(self.dead), int(self.reads.sum())
        lines = [
            f"{count:,} rows, {total:,} reads: {dead:,} dead rows ({100 * dead / count:.1f} %), "
            f"{self.effective_rows:,.1f} effective rows"
        ]
        bins = list(self._bins())
        most = max(rows for _, rows in bins)
        cells = [[name, f"{rows:,}", _draw_bar(rows, most)] for name, rows in bins]
        width = max(len(bar) for _, _, bar in cells)
        lines.append(format_table(["reads", "rows", ""], [[name, rows, bar.ljust(width)] for name, rows, bar in cells]))
        listed = min(self.k, count - dead)
        if listed:
            best = [
                [shorten(self._name(place), LABEL_CHARACTERS), f"{int(self.reads[place]):,}", f"{weight:,.4g}"]
                for place, weight in enumerate(self.weight[:listed].tolist())
            ]
            lines.append(format_table(["most reads", "reads", "weight"], best))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the reads by row, most first, and the number of rows by reads.

        Dead rows are marked in both plots.

        Args:
            path: Image file to write. Its suffix selects the format.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: matplotlib does not support the suffix.
        """
        figure = create_figure(path, (13, 4.2))
        count, used = len(self.ids), len(self.ids) - len(self.dead)
        ranked, binned = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        ranked.fill_between(range(used), self.reads[:used].tolist(), step="mid", color="#0072b2")
        if used < count:
            ranked.axvspan(used - 0.5, count - 0.5, color="#d55e00", alpha=0.4, label=f"{count - used:,} dead rows")
            ranked.legend(fontsize="small", loc="upper right")
        ranked.set_xlim(-0.5, count - 0.5)
        ranked.set_yscale("symlog", linthresh=1)
        ranked.set_ylim(bottom=0)
        ranked.set_xlabel("rows, most reads first", fontsize="small")
        ranked.set_ylabel("reads", fontsize="small")
        title = f"{count:,} rows, {self.effective_rows:,.1f} effective rows"
        if used:
            title += f"; most reads: {self._name(0)}"
        ranked.set_title(escape_label(title, 80), fontsize="medium", loc="left")
        names, rows = zip(*self._bins(), strict=True)
        binned.bar(range(len(rows)), rows, color=["#d55e00"] + ["#0072b2"] * (len(rows) - 1))
        binned.set_xticks(range(len(rows)), names, fontsize="small", rotation=30, ha="right")
        binned.set_xlabel("reads", fontsize="small")
        binned.set_ylabel("rows", fontsize="small")
        figure.savefig(path, dpi=120)


def summarize_usage(
    source: SoftKVStore | MemoryLayer | ProductKeyMemory | Usage,
    labels: Mapping[int, str] | None = None,
    k: int = 5,
) -> UsageSummary:
    """Summarize how often reads use each row, and which rows are dead.

    Equal to sorting the rows by ``source.usage.reads``, most reads first. If the heads of a layer read one store, its
    counters are sums over the heads: an input counts once for each head that reports the row. If each head has its own
    store, the summary lists the rows of all heads, with the number of the head. Restart dead rows with
    `softdb.SoftKVStore.revive`.

    Args:
        source: A store or layer that tracks usage (``track_usage=True`` or ``track_usage_()``), or a `softdb.Usage`,
            whose rows have the ids 0, 1, ...
        labels: Labels of rows, by id. By default "row 17".
        k: Number of rows that the table lists: those with the most reads.

    Returns:
        A `UsageSummary`. ``print(found.table())`` prints it, ``found.plot(path)`` plots it, ``found.dead`` are the dead
        rows, and ``found.to_csv(path)`` writes all counters.

    Raises:
        NotApplicableError: The store or layer does not track usage.
        ArgumentError: There are no rows.
        DtypeError: ``source`` or ``labels`` has the wrong type.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1, track_usage=True)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0]]), torch.zeros(3, 1))
        >>> read = store.read(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), mode="hard")
        >>> found = lab.summarize_usage(store)
        >>> print(found.table())
        3 rows, 3 reads: 1 dead rows (33.3 %), 1.9 effective rows
        reads     rows
        0 (dead)     1  ########################################
        1            1  ########################################
        2 to 3       1  ########################################
        most reads  reads  weight
        row 0           2       2
        row 1           1       1
        >>> found.dead
        tensor([2])
    """
    k = check_positive("k", k)
    if labels is not None and not isinstance(labels, Mapping):
        raise DtypeError(f"labels: expected a mapping from ids to strings, got {describe(labels)}")
    ids, heads, usage = _read_counters(source)
    if not len(ids):
        raise ArgumentError("source: expected at least one row, got none; add rows first")
    order = usage.reads.cpu().argsort(descending=True, stable=True)
    return UsageSummary(
        ids=ids[order],
        reads=usage.reads.cpu()[order],
        weight=usage.weight.cpu()[order],
        heads=None if heads is None else heads[order],
        labels={row: str(label) for row, label in (labels or {}).items() if label is not None},
        k=k,
    )


def _read_counters(source: Any) -> tuple[Tensor, Tensor | None, Usage]:
    """Return ids, heads and counters of all rows."""
    if isinstance(source, Usage):
        return torch.arange(len(source.reads), device="cpu"), None, source
    if isinstance(source, ProductKeyMemory):
        return _read_counters(source.usage)
    if not isinstance(source, (SoftKVStore, MemoryLayer)):
        raise DtypeError(
            "source: expected a store, a MemoryLayer, a ProductKeyMemory or a Usage, got "
            f"{describe(source)}; the rows of a ContextMemory are tokens that are replaced, and have no usage"
        )
    stores: list[Any] = [source] if isinstance(source, SoftKVStore) else list(source.stores)
    with ExitStack() as stack:  # Otherwise another thread could add rows between reading the ids and the counters.
        for store in stores:
            stack.enter_context(store.writing())
        lists, usage = [store.ids.cpu() for store in stores], source.usage
    heads = None
    if len(stores) > 1:
        heads = torch.cat([torch.full_like(ids, head) for head, ids in enumerate(lists)])
    return torch.cat(lists), heads, usage


def _draw_bar(rows: int, most: int) -> str:
    """Draw a bar of characters; at least one for a number above 0."""
    return "#" * (max(1, round(BAR_CHARACTERS * rows / most)) if rows else 0)
