"""Filters: the rows that each query may see.

A `Selection` combines everything that hides a row: the row is deleted, ``where`` rejects it, ``exclude`` lists it, or a
mask hides it. `Selection.block` gives the visible rows of a block, `Selection.is_visible` the visible candidates.
Neither allocates a (B, N) mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softdb._checks import (
    Ids,
    check_dense,
    check_device,
    check_ids,
    check_vector,
    convert_ids,
    describe,
    is_broadcastable,
)
from softdb.attributes import lock_free_cached_property
from softdb.errors import DeviceError, DtypeError, ShapeError
from softdb.pending_checks import is_deferred
from softdb.table.storage import RowStorage

__all__ = ["Block", "Rule", "Selection", "Where", "convert_list", "find_ids", "find_places", "select"]

Rule = Callable[[Mapping[str, Tensor]], Tensor]
Where = Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[bool] | Rule


@dataclass(frozen=True)
class Block:
    """Rows of a block, and the queries that may see them.

    Attributes:
        start: Position of the first row in the pass over the selection.
        rows: Slots of the rows: a slice, or a tensor (C,).
        mask: True where a query may see a row, bool, broadcastable to (G, B, C); None where all queries see all rows.
        hidden: Pairs (query numbers, columns) that are hidden in addition to the mask; None for no pairs.
    """

    start: int
    rows: slice | Tensor
    mask: Tensor | None
    hidden: tuple[Tensor, Tensor] | None

    @property
    def has_hidden(self) -> bool:
        """Whether some row is hidden from some query."""
        return self.mask is not None or self.hidden is not None

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def slots(self, columns: Tensor) -> Tensor:
        """Return the slots of columns of the block."""
        return columns + self.rows.start if isinstance(self.rows, slice) else self.rows[columns]

    def hide(self, scores: Tensor, groups: slice, queries: slice, value: float) -> None:  # (g, b, C)
        """Overwrite, in place, the scores of rows that a query may not see.

        Args:
            scores: Scores of ``queries`` of ``groups``, (g, b, C).
            groups: Groups of queries.
            queries: Queries of each group.
            value: The number to write.
        """
        if self.mask is not None:
            mask = self.mask
            if mask.dim() >= 2 and mask.shape[-2] != 1:
                mask = mask[..., queries, :]
            if mask.dim() == 3 and mask.shape[0] != 1:
                mask = mask[groups]
            if mask.shape == scores.shape[-1:] and not is_deferred(mask):
                scores.index_fill_(-1, (~mask).nonzero().squeeze(-1), value)
            else:
                torch.where(mask, scores, scores.new_full((), value), out=scores)
        if self.hidden is not None:
            query, column = self.hidden
            inside = (query >= queries.start) & (query < queries.stop)
            scores[:, query[inside] - queries.start, column[inside]] = value

    def fingerprint(self) -> Tensor:  # (B,) or (1,), int64
        """Compute a hash of the visible slots of each query.

        Backward compares its hash with that of forward, to detect a rule that returned another mask. Two different
        masks are unlikely to have the same hash. The hash is a sum of integers, so it does not depend on the order of
        summation.
        """
        mask, rows = self.mask, self.rows
        device = "cpu" if mask is None else mask.device
        slots = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        slot_hashes = slots * 2654435761 % 2**20 + 1  # sums of integers are exact
        # A mask of several dimensions belongs to one group.
        return (slot_hashes if mask is None else mask * slot_hashes).sum(-1).flatten()


@dataclass(frozen=True)
class Selection:
    """Rows in slots 0 ... size-1 that each of B queries may see.

    Attributes:
        size: Number of slots, including hidden ones.
        shared: True for slots that some query may see, (size,) bool; None for all slots.
        visited: Slots that a pass visits, ascending. Used if at most half of the slots are visible, or for a part of
            the slots; None for all slots.
        mask: A mask for all rows, broadcastable to (G, B, size); None for no mask.
        rule: A function from slots, (C,) or (B, C), to a bool tensor broadcastable to (B, C); None for no rule.
        excluded: Slots that a query may not see, (B, m), ascending; -1 is padding. None for no such slots.
        given_count: Number of slots that ``shared`` leaves visible; None if it has to be counted.
    """

    size: int
    shared: Tensor | None = None
    visited: Tensor | None = None
    mask: Tensor | None = None
    rule: _RuleOnSlots | _RuleForQueries | None = None
    excluded: Tensor | None = None
    given_count: int | None = None

    @property
    def count(self) -> int:
        """Number of rows in a pass over the selection."""
        return self.size if self.visited is None else len(self.visited)

    @lock_free_cached_property
    def shared_count(self) -> int:
        """Number of rows that ``shared`` and ``visited`` leave visible."""
        if self.visited is not None:
            return len(self.visited)
        if self.shared is None:
            return self.size
        return int(self.shared.sum()) if self.given_count is None else self.given_count

    @property
    def known_count(self) -> int | None:
        """The same number; None if the host would have to wait for a GPU to count."""
        has_to_wait = self.visited is None and self.shared is not None and self.given_count is None
        return None if has_to_wait and is_deferred(cast(Tensor, self.shared)) else self.shared_count

    @property
    def has_few_rows(self) -> bool:
        """Whether most rows are known to be hidden.

        Gathering the visible rows is then cheaper than scoring all rows.
        """
        count = self.known_count
        return self.shared is not None and count is not None and 2 * count <= self.size

    @lock_free_cached_property
    def is_never_empty(self) -> bool:
        """Whether every query is known to see at least one row."""
        return self.is_shared and bool(self.known_count)

    @property
    def shared_slots(self) -> Tensor:
        """Slots that `shared_count` counts, ascending."""
        if self.visited is not None:
            return self.visited
        return torch.arange(self.size, device="cpu") if self.shared is None else self.shared.nonzero().squeeze(-1)

    @property
    def is_shared(self) -> bool:
        """Whether every query sees the same rows."""
        return self.mask is None and self.rule is None and self.excluded is None

    @property
    def has_hidden_rows(self) -> bool:
        """Whether a pass may visit rows that some query may not see."""
        return not self.is_shared or (self.shared is not None and self.visited is None)

    def block(self, start: int, stop: int) -> Block | None:
        """Return the visible rows at positions [start, stop) of a pass.

        Returns:
            The block, or None if ``shared`` hides all of its rows, except on a GPU.
        """
        rows = slice(start, stop) if self.visited is None else self.visited[start:stop]
        masks = []
        if self.shared is not None and self.visited is None:
            part = self.shared[start:stop]
            seen = -1 if is_deferred(part) else int(part.sum())
            if seen == 0:
                return None
            if seen < stop - start:
                masks.append(part)
        if self.mask is not None:
            # A mask with one column applies to every row.
            masks.append(self.mask if self.mask.shape[-1] == 1 else self.mask[..., rows])
        if self.rule is not None:
            masks.append(self.rule(rows))
        mask = None
        for part in masks:
            mask = part if mask is None else mask & part
        return Block(start, rows, mask, self._find_hidden(rows))

    def _find_hidden(self, rows: slice | Tensor) -> tuple[Tensor, Tensor] | None:
        """Find the pairs (query, column) of a block that ``excluded`` hides."""
        if self.excluded is None:
            return None
        if isinstance(rows, slice):
            query, place = ((self.excluded >= rows.start) & (self.excluded < rows.stop)).nonzero(as_tuple=True)
            return (query, self.excluded[query, place] - rows.start) if len(query) else None
        column = find_places(rows, self.excluded)
        query, place = (column >= 0).nonzero(as_tuple=True)
        return (query, column[query, place]) if len(query) else None

    def restrict_to(self, slots: Tensor) -> Selection:  # (m,) ascending
        """Return a selection that also hides every slot that is not in ``slots``."""
        return replace(self, visited=slots if self.shared is None else slots[self.shared[slots]])

    def hide(self, visible: Tensor) -> Selection:  # broadcastable to (G, B, size)
        """Return a selection that also hides rows.

        Args:
            visible: False for rows to hide; a bool tensor of 3 dimensions.
        """
        if visible.shape[:-1] != (1, 1) or self.mask is not None:
            return replace(self, mask=visible if self.mask is None else self.mask & visible)
        shared = visible[0, 0].expand(self.size)
        shared = shared if self.shared is None else self.shared & shared
        if self.visited is not None:
            return replace(self, shared=shared, visited=self.visited[shared[self.visited]])
        return _visit_few(replace(self, shared=shared, given_count=None))

    def is_visible(self, slots: Tensor) -> Tensor:  # (B, c) -> (B, c)
        """Return which candidates each query may see; False for padding (-1).

        A ``mask`` must be that of one group.
        """
        allowed = slots >= 0
        if self.mask is not None and allowed.numel():
            mask = self.mask.flatten(0, -2).expand(len(slots), self.size)
            allowed &= mask.gather(1, slots.clamp(min=0))
        if self.shared is not None:
            allowed &= self.shared[slots.clamp(min=0)]
        if self.rule is not None:
            allowed = allowed & self.rule(slots)
        if self.excluded is not None:
            place = torch.searchsorted(self.excluded, slots).clamp_(max=self.excluded.shape[1] - 1)
            allowed = allowed & (self.excluded.gather(1, place) != slots)
        return allowed

    def take(self, queries: Tensor) -> Selection:  # (b,)
        """Return the selection of some of the queries."""
        excluded = None if self.excluded is None else self.excluded[queries]
        rule = None if self.rule is None else _RuleForQueries(self.rule, queries)
        return replace(self, rule=rule, excluded=excluded)

    def with_rows(self, rows: RowSource) -> Selection:
        """Return a selection whose rule uses other ids and fields."""
        return self if self.rule is None else replace(self, rule=self.rule.with_rows(rows))


class RowSource(Protocol):
    """Source of ids and fields of rows, such as `softdb.table.storage.RowStorage`."""

    def view(self, slots: slice | Tensor) -> Mapping[str, Tensor]:
        """Return ids and fields of the rows at ``slots``, by name."""


def find_places(slots: Tensor, numbers: Tensor) -> Tensor:  # (m,) ascending, (B, c) -> (B, c)
    """Find the positions of ``numbers`` in ``slots``; -1 if they are absent."""
    if len(slots) == 0:
        return torch.full_like(numbers, -1)
    places = torch.searchsorted(slots, numbers).clamp_(max=len(slots) - 1)
    return torch.where(slots[places] == numbers, places, -1)


def select(
    rows: RowStorage,
    queries: tuple[int, ...],  # the query's leading shape
    where: Where | None,
    exclude: Ids | None,
) -> Selection:
    """Select the live rows that ``where`` and ``exclude`` leave visible.

    Args:
        rows: The rows of a table.
        queries: Leading shape of the query.
        where: As for `softdb.SoftKVStore.read`.
        exclude: As for `softdb.SoftKVStore.read`.
    """
    batch = math.prod(queries)
    shared, rule, count = rows.live_mask(), None, None
    if callable(where):
        rule = _RuleOnSlots(rows, where, batch)
    elif where is not None:
        shared = _mask_from_tensor(rows, where)
    if shared is rows.live_mask():
        count = len(rows)
    excluded = None if exclude is None else _find_excluded_slots(rows, exclude, queries, batch)
    if excluded is not None and excluded.shape[1] == 0:
        excluded = None
    selection = Selection(rows.used, shared=shared, rule=rule, excluded=excluded, given_count=count)
    if selection.has_few_rows and count is not None:
        return replace(selection, visited=rows.live_slots())
    return _visit_few(selection)


def _visit_few(selection: Selection) -> Selection:
    """Restrict passes to the visible rows if that is cheaper."""
    if selection.shared is None or not selection.has_few_rows:
        return selection
    return replace(selection, visited=selection.shared.nonzero().squeeze(-1))


def find_ids(rows: RowStorage, where: Where) -> Tensor:  # -> (m,) int64, on the CPU
    """Return the ids of the rows that ``where`` selects, without queries."""
    if callable(where):
        slots = rows.live_slots()
        ids = rows.ids[slots]  # A copy made first: the rule may write to the store.
        return ids[_RuleOnSlots(rows, where, 1)(slots).expand(1, len(slots))[0]].cpu()
    mask = _mask_from_tensor(rows, where)
    return rows.ids[: rows.used][mask].cpu()


def convert_list(name: str, value: Any, device: torch.device) -> Any:
    """Convert a list or an array to a tensor on ``device``; return other values."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return convert_ids(name, value).to(device)
    return value


def _mask_from_tensor(rows: RowStorage, where: object) -> Tensor:  # -> (used,) bool
    device = rows.ids.device
    where = convert_list("where", where, device)
    if not isinstance(where, Tensor):
        raise DtypeError(
            "where: expected a bool tensor in the order of store.ids, an int64 tensor of ids, or a callable "
            f"where(row) -> bool tensor, got {describe(where)}"
        )
    if where.dtype == torch.bool:
        if where.shape != (len(rows),):
            raise ShapeError(
                f"where: expected a bool tensor of shape ({len(rows)},), one entry per row in the order of store.ids, "
                f"got {tuple(where.shape)}"
            )
        check_dense("where", where)
        check_device("where", where, device)
        if rows.live_mask() is None:
            return where.clone()
        return torch.zeros(rows.used, dtype=torch.bool, device=device).index_copy_(0, rows.live_slots(), where)
    ids = check_ids("where", where, repeats=True)
    check_vector("where", ids)
    mask = torch.zeros(rows.used, dtype=torch.bool, device=device)
    mask[rows.slots.slots_of("where", ids).to(device)] = True
    return mask


@dataclass(frozen=True)
class _RuleOnSlots:
    """Rule on slots that calls a user's ``where(row)``."""

    rows: RowSource
    where: Rule
    batch: int

    def with_rows(self, rows: RowSource) -> _RuleOnSlots:
        """Return a rule that uses other ids and fields."""
        return replace(self, rows=rows)

    def __call__(self, slots: slice | Tensor) -> Tensor:
        row = self.rows.view(slots)
        allowed = self.where(row)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise DtypeError(f"where: expected the callable to return a bool tensor, got {describe(allowed)}")
        if allowed.device != row["id"].device:
            raise DeviceError(
                f"where: expected the callable to return a tensor on {row['id'].device}, got one on {allowed.device}; "
                "compare with tensors on that device"
            )
        shape = (self.batch, row["id"].shape[-1])
        if not is_broadcastable(allowed.shape, shape):
            raise ShapeError(
                f"where: expected the callable to return a tensor broadcastable to {shape} (queries, rows), "
                f"got {tuple(allowed.shape)}"
            )
        return allowed


@dataclass(frozen=True)
class _RuleForQueries:
    """Rule for some of the queries.

    A user's rule broadcasts over all queries of the read, so it is evaluated for all of them and indexed afterwards.
    """

    rule: _RuleOnSlots | _RuleForQueries
    queries: Tensor

    @property
    def batch(self) -> int:
        """Number of queries."""
        return len(self.queries)

    def with_rows(self, rows: RowSource) -> _RuleForQueries:
        """Return a rule that uses other ids and fields."""
        return replace(self, rule=self.rule.with_rows(rows))

    def __call__(self, slots: slice | Tensor) -> Tensor:
        if isinstance(slots, Tensor) and slots.dim() == 2:
            whole = slots.new_full((self.rule.batch, slots.shape[1]), -1)
            whole[self.queries] = slots
            slots = whole
        allowed = self.rule(slots)
        return allowed[self.queries] if allowed.dim() == 2 and allowed.shape[0] != 1 else allowed


def _find_excluded_slots(rows: RowStorage, exclude: Ids, queries: tuple[int, ...], batch: int) -> Tensor:  # -> (B, m)
    ids = check_ids("exclude", exclude, repeats=True, padding=True)
    if ids.dim() == 0 or tuple(ids.shape[:-1]) != queries:
        raise ShapeError(
            f"exclude: expected shape ({', '.join([*map(str, queries), 'm'])}), ids for each query of the read, "
            f"got {tuple(ids.shape)}"
        )
    slots = rows.slots.find_padded(ids.reshape(batch, ids.shape[-1]))  # Unknown ids have no row to hide.
    return slots.sort(dim=-1).values.to(rows.ids.device)
