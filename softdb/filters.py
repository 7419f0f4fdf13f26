"""Which rows each query may see.

A `Selection` gathers everything that hides a row (the row is deleted, ``where`` refuses it, ``exclude`` names it, a
mask covers it) behind two questions: what may be seen in this block of rows (`Selection.block`), and which of these
candidates may be seen (`Selection.allows`). Neither makes a (B, N) mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softdb._checks import check_dense, check_device, check_ids, check_vector, describe, is_broadcastable
from softdb.attributes import lock_free_cached_property
from softdb.errors import DeviceError, DtypeError, ShapeError
from softdb.table.storage import RowStorage

__all__ = ["Block", "Rule", "Selection", "Where", "places_in", "select"]

Rule = Callable[[Mapping[str, Tensor]], Tensor]
Where = Tensor | Rule


@dataclass(frozen=True)
class Block:
    """The rows of a block that some query may see.

    Attributes:
        start: The place of the first in the pass.
        rows: Their slots: a slice, or a tensor (C,).
        mask: Which query may see which of them, broadcastable to (G, B, C); None where all may see all.
        hidden: Pairs (query numbers, columns) that may not be seen, beside what the mask hides; None where none.
    """

    start: int
    rows: slice | Tensor
    mask: Tensor | None
    hidden: tuple[Tensor, Tensor] | None

    @property
    def hides(self) -> bool:
        """Whether some query may not see some of the rows."""
        return self.mask is not None or self.hidden is not None

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def slots(self, columns: Tensor) -> Tensor:
        """The slots that these columns stand for."""
        return columns + self.rows.start if isinstance(self.rows, slice) else self.rows[columns]

    def hide(self, scores: Tensor, groups: slice, queries: slice, value: float) -> None:  # (g, b, C)
        """Write ``value`` over what `queries` of `groups` may not see."""
        if self.mask is not None:
            mask = self.mask
            if mask.dim() >= 2 and mask.shape[-2] != 1:
                mask = mask[..., queries, :]
            if mask.dim() == 3 and mask.shape[0] != 1:
                mask = mask[groups]
            if mask.shape == scores.shape[-1:]:
                scores.index_fill_(-1, (~mask).nonzero().squeeze(-1), value)
            else:
                torch.where(mask, scores, scores.new_full((), value), out=scores)
        if self.hidden is not None:
            query, column = self.hidden
            inside = (query >= queries.start) & (query < queries.stop)
            scores[:, query[inside] - queries.start, column[inside]] = value

    def fingerprint(self) -> Tensor:  # (B,) or (), int64
        """A number that another mask is most unlikely to have, exact whatever the order of its sum."""
        mask, rows = self.mask, self.rows
        device = "cpu" if mask is None else mask.device
        slots = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        marks = slots * 2654435761 % 2**20 + 1  # whole numbers whose sums are exact
        return (marks if mask is None else mask * marks).sum(-1)


@dataclass(frozen=True)
class Selection:
    """Which of the rows in slots 0 … size−1 each of B queries may see.

    Attributes:
        size: How many slots there are, hidden ones included.
        shared: Slots that some query may see, (size,) bool; None for all.
        visit: The slots worth looking at, ascending, where they are few beside ``size``; None for all.
        mask: A mask given whole, broadcastable to (G, B, size).
        rule: A rule on slots, (C,) or (B, C) -> bool broadcastable to (B, C).
        excluded: Slots that a query may not see, (B, m), ascending; -1 is padding.
    """

    size: int
    shared: Tensor | None = None
    visit: Tensor | None = None
    mask: Tensor | None = None
    rule: _RuleOnSlots | _RuleForSome | None = None
    excluded: Tensor | None = None

    @property
    def count(self) -> int:
        """How many rows a pass over this selection goes through."""
        return self.size if self.visit is None else len(self.visit)

    @lock_free_cached_property
    def shared_count(self) -> int:
        """How many rows some query may see, as far as ``rule`` and ``excluded`` do not tell."""
        if self.visit is not None:
            return len(self.visit)
        return self.size if self.shared is None else int(self.shared.sum())

    @lock_free_cached_property
    def shows_some_to_all(self) -> bool:
        """Whether it is known that every query sees some row."""
        return self.is_shared and self.shared_count > 0

    @property
    def shared_slots(self) -> Tensor:
        """The slots that `shared_count` counts, ascending."""
        if self.visit is not None:
            return self.visit
        return torch.arange(self.size, device="cpu") if self.shared is None else self.shared.nonzero().squeeze(-1)

    @property
    def is_shared(self) -> bool:
        """Whether every query sees the same rows."""
        return self.mask is None and self.rule is None and self.excluded is None

    @property
    def hides_some(self) -> bool:
        """Whether a pass may go through rows that some query may not see."""
        return not self.is_shared or (self.shared is not None and self.visit is None)

    def block(self, start: int, stop: int) -> Block | None:
        """What may be seen of the rows that come in places [start, stop) of a pass; None if nothing."""
        rows = slice(start, stop) if self.visit is None else self.visit[start:stop]
        masks = []
        if self.shared is not None and self.visit is None:
            part = self.shared[start:stop]
            seen = int(part.sum())
            if seen == 0:
                return None
            if seen < stop - start:
                masks.append(part)
        if self.mask is not None:
            # A mask of one column stands for every row.
            masks.append(self.mask if self.mask.shape[-1] == 1 else self.mask[..., rows])
        if self.rule is not None:
            masks.append(self.rule(rows))
        mask = None
        for part in masks:
            mask = part if mask is None else mask & part
        return Block(start, rows, mask, self._hidden(rows))

    def _hidden(self, rows: slice | Tensor) -> tuple[Tensor, Tensor] | None:
        if self.excluded is None:
            return None
        if isinstance(rows, slice):
            query, place = ((self.excluded >= rows.start) & (self.excluded < rows.stop)).nonzero(as_tuple=True)
            return (query, self.excluded[query, place] - rows.start) if len(query) else None
        column = places_in(rows, self.excluded)
        query, place = (column >= 0).nonzero(as_tuple=True)
        return (query, column[query, place]) if len(query) else None

    def among(self, slots: Tensor) -> Selection:  # (m,) ascending
        """The same, with every slot outside ``slots`` hidden."""
        return replace(self, visit=slots if self.shared is None else slots[self.shared[slots]])

    def allows(self, slots: Tensor) -> Tensor:  # (B, c) -> (B, c)
        """Which candidates each query may see; -1 is never allowed. For selections without a whole mask."""
        allowed = slots >= 0
        if self.shared is not None:
            allowed &= self.shared[slots.clamp(min=0)]
        if self.rule is not None:
            allowed = allowed & self.rule(slots)
        if self.excluded is not None:
            place = torch.searchsorted(self.excluded, slots).clamp_(max=self.excluded.shape[1] - 1)
            allowed = allowed & (self.excluded.gather(1, place) != slots)
        return allowed

    def take(self, queries: Tensor) -> Selection:  # (b,)
        """The same for some of the queries."""
        excluded = None if self.excluded is None else self.excluded[queries]
        rule = None if self.rule is None else _RuleForSome(self.rule, queries)
        return replace(self, rule=rule, excluded=excluded)


def places_in(slots: Tensor, numbers: Tensor) -> Tensor:  # (m,) ascending, (B, c) -> (B, c)
    """Where ``numbers`` stand in ``slots``, -1 for those that do not."""
    if len(slots) == 0:
        return torch.full_like(numbers, -1)
    places = torch.searchsorted(slots, numbers).clamp_(max=len(slots) - 1)
    return torch.where(slots[places] == numbers, places, -1)


def select(
    rows: RowStorage,
    queries: tuple[int, ...],  # the query's leading shape
    where: Where | None,
    exclude: Tensor | None,
) -> Selection:
    """What ``where`` and ``exclude`` leave visible of the live rows, for queries of leading shape ``queries``."""
    batch = math.prod(queries)
    shared, rule = rows.live_mask(), None
    if isinstance(where, Tensor):
        shared = _mask_of_tensor(rows, where)
    elif callable(where):
        rule = _RuleOnSlots(rows, where, batch)
    elif where is not None:
        raise DtypeError(
            "where: expected a bool tensor in the order of store.ids, an int64 tensor of ids, or a callable "
            f"where(row) -> bool tensor, got {describe(where)}"
        )
    excluded = None if exclude is None else _excluded_slots(rows, exclude, queries, batch)
    if excluded is not None and excluded.shape[1] == 0:
        excluded = None
    selection = Selection(rows.used, shared=shared, rule=rule, excluded=excluded)
    if shared is not None and 2 * selection.shared_count <= rows.used:
        # Where most rows are hidden, collecting the others is cheaper than computing scores to hide.
        return replace(selection, visit=shared.nonzero().squeeze(-1))
    return selection


def _mask_of_tensor(rows: RowStorage, where: Tensor) -> Tensor:  # -> (used,) bool
    device = rows.ids.device
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
        slots = rows.live_slots()[where]
    else:
        ids = check_ids("where", where, repeats=True)
        check_vector("where", ids)
        slots = rows.slots.slots_of("where", ids).to(device)
    mask = torch.zeros(rows.used, dtype=torch.bool, device=device)
    mask[slots] = True
    return mask


@dataclass(frozen=True)
class _RuleOnSlots:
    """A user's ``where`` callable, asked about slots."""

    rows: RowStorage
    where: Rule
    batch: int

    def __call__(self, slots: slice | Tensor) -> Tensor:
        row = self.rows.view(slots)
        allowed = self.where(row)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise DtypeError(f"where: expected the callable to return a bool tensor, got {describe(allowed)}")
        if allowed.device != row["id"].device:
            raise DeviceError(f"where: expected the callable to return a tensor on {row['id'].device}")
        shape = (self.batch, row["id"].shape[-1])
        if not is_broadcastable(allowed.shape, shape):
            raise ShapeError(
                f"where: expected the callable to return a tensor broadcastable to {shape} (queries, rows), "
                f"got {tuple(allowed.shape)}"
            )
        return allowed


@dataclass(frozen=True)
class _RuleForSome:
    """A rule for some of the queries: it is written for all of them, so it is asked for all and cut."""

    rule: _RuleOnSlots | _RuleForSome
    queries: Tensor

    @property
    def batch(self) -> int:
        return len(self.queries)

    def __call__(self, slots: slice | Tensor) -> Tensor:
        if isinstance(slots, Tensor) and slots.dim() == 2:
            whole = slots.new_full((self.rule.batch, slots.shape[1]), -1)
            whole[self.queries] = slots
            slots = whole
        allowed = self.rule(slots)
        return allowed[self.queries] if allowed.dim() == 2 and allowed.shape[0] != 1 else allowed


def _excluded_slots(rows: RowStorage, exclude: Tensor, queries: tuple[int, ...], batch: int) -> Tensor:  # -> (B, m)
    ids = check_ids("exclude", exclude, repeats=True, padding=True)
    if ids.dim() == 0 or tuple(ids.shape[:-1]) != queries:
        raise ShapeError(
            f"exclude: expected shape ({', '.join([*map(str, queries), 'm'])}), ids for each query of the read, "
            f"got {tuple(ids.shape)}"
        )
    flat = ids.reshape(batch, ids.shape[-1])
    slots = torch.full_like(flat, -1)
    given = flat >= 0
    slots[given] = rows.slots.find(flat[given])  # an id that is gone is hidden already
    return slots.sort(dim=-1).values.to(rows.ids.device)
