"""Averages of keys and values alone: slots in which they mix two rows of the store that was copied."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from softdb.table.slots import NO_SLOTS
from softdb.table.tenants import Tenants
from softdb.transforms import is_wrapped

__all__ = ["MixedRows", "SourceWatch", "Tensors"]

# Rows that one observation looks at.
SAMPLE_ROWS = 64
# Largest deviation from an average that is rounding: relative to the step, and in units of the dtype's precision.
STEP_TOLERANCE, ROUNDING_UNITS = 0.01, 2


class Tensors(Protocol):
    """Keys, values, rows and settings: of a `Table`."""

    rows: Any
    config: Any

    @property
    def keys(self) -> Tensor:
        """The keys."""

    @property
    def values(self) -> Tensor:
        """The values."""


class MixedRows(NamedTuple):
    """What an average has mixed.

    Attributes:
        ids: Of rows that are mixed with the row that was in their slot before.
        started: The number of rows whose average began with zeros.
    """

    ids: Tensor = NO_SLOTS
    started: int = 0


class _Sample(NamedTuple):
    """Rows of slots that hold other rows in the source than at the last update, as both tables had them."""

    slots: Tensor
    own: Tensor
    source: Tensor
    tenants: Tenants


class SourceWatch:
    """Finds slots in which an average of keys and values alone mixes two rows.

    Such an average (of ``parameters()`` or of a ``state_dict()``) begins as a deep copy and is updated in place::

        average += rate * (source - average)        # slot by slot, 0 < rate < 1

    Nothing says so, but the tensors of the copy are listed right before. `observe`, which is called then, keeps a
    sample of the slots that hold other rows in the source than at the last update. If their rows have moved towards
    those of the source by one rate when it is called again, this was an update of an average.

    Args:
        source: The table that was copied.
        tenants: Its rows at that time.
    """

    def __init__(self, source: Tensors, tenants: Tenants | None) -> None:
        self._source = weakref.ref(source)
        self._updated: Tenants | None = tenants  # which rows the last update averaged
        self._seen: tuple[int, int] | None = None
        self._sample: _Sample | None = None

    def restart(self) -> SourceWatch:
        """Return a watch that takes the rows at the next observation for those of the last update."""
        watch = SourceWatch.__new__(SourceWatch)
        watch._source, watch._updated, watch._seen, watch._sample = self._source, None, None, None
        return watch

    @torch.no_grad()
    def observe(self, own: Tensors) -> MixedRows:
        """Return what the last update of an average mixed; keep a sample for the next."""
        source = self._source()
        if source is None or not _are_comparable(own, source):
            self._sample = None
            return MixedRows()
        mixed = self._compare(own)
        ids = source.rows.ids
        if self._updated is None or len(self._updated.ids) != len(ids):
            self._updated, self._sample = source.rows.tenants, None
        elif self._sample is not None or self._seen != (source.rows.writes, source.rows.id_hash):
            self._keep_sample(own, source, self._updated)
        self._seen = source.rows.writes, source.rows.id_hash
        return mixed

    def _compare(self, own: Tensors) -> MixedRows:
        """Return what has been mixed since the sample was kept."""
        sample, known = self._sample, self._updated
        if sample is None or known is None or len(own.rows.ids) != len(sample.tenants.ids):
            return MixedRows()
        rate = _find_rate(sample.own, sample.source, _rows_at(own, sample.slots), own.keys.dtype)
        if rate == 0:
            return MixedRows()
        self._updated = sample.tenants
        if rate is None or rate == 1:  # something else, or a copy
            return MixedRows()
        slots = _changed_slots(known, sample.tenants)
        held = known.ids[slots] >= 0
        return MixedRows(sample.tenants.ids[slots[held]].cpu(), int((~held).sum()))

    def _keep_sample(self, own: Tensors, source: Tensors, known: Tenants) -> None:
        now: Tenants = source.rows.tenants
        slots = _changed_slots(known, now)
        if len(slots) == 0:
            self._sample = None
            return
        # A slot that has become free still holds what remains of its row.
        now = now._replace(ids=torch.where((now.ids < 0) & (known.ids >= 0), known.ids, now.ids))
        taken = slots[:SAMPLE_ROWS]
        self._sample = _Sample(taken, _rows_at(own, taken), _rows_at(source, taken), now)


def _are_comparable(own: Tensors, source: Tensors) -> bool:
    """Whether both have plain tensors of the same shapes."""
    pairs = (own.keys, source.keys), (own.values, source.values)
    for tensor in (*pairs[0], *pairs[1]):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or is_wrapped(tensor):
            return False
    return all(a.shape == b.shape for a, b in pairs) and len(source.rows.ids) == len(source.keys)


def _changed_slots(before: Tenants, now: Tenants) -> Tensor:
    """Return the slots that hold a row which was not there before."""
    if before.ids.device != now.ids.device:
        before = Tenants(before.ids.to(now.ids.device), before.generation.to(now.ids.device), before.version)
    new = (now.ids >= 0) & ((before.ids < 0) | (before.generation != now.generation))
    return new.nonzero().squeeze(-1)


def _rows_at(table: Tensors, slots: Tensor) -> Tensor:
    """Copy the rows at ``slots``, keys and values side by side."""  # (n, key_dim + value_dim)
    parts = [t.index_select(0, slots.to(t.device)).to("cpu", torch.float64) for t in (table.keys, table.values)]
    return torch.cat(parts, 1)


def _find_rate(before: Tensor, source: Tensor, after: Tensor, dtype: torch.dtype) -> float | None:
    """Return the rate of ``after = before + rate * (source - before)`` from 0 to 1; None if there is none."""
    step, way = after - before, source - before
    rounding = ROUNDING_UNITS * torch.finfo(dtype).eps * torch.maximum(before.abs(), source.abs())
    if not step.any():
        return 0.0
    if bool(((after - source).abs() <= rounding).all()):
        return 1.0
    rate = float((step * way).sum() / way.square().sum())
    deviation = (step - rate * way).norm()
    is_average = deviation <= STEP_TOLERANCE * step.norm() + rounding.norm() and step.norm() > 3 * rounding.norm()
    return rate if is_average and 0 < rate < 1 else None
