"""Detection of averages of keys and values that mix two rows in one slot."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from softdb.table.slots import NO_SLOTS, resize
from softdb.transforms import is_active

__all__ = ["MixedRows", "SourceWatch", "Tensors"]

# Maximum number of rows that one observation compares, and maximum number of rows from which it chooses them.
SAMPLE_ROWS, INSPECTED_ROWS = 64, 1024
# A step may deviate from the step of an average by this fraction of its length, plus rounding errors of this many times
# the dtype's machine epsilon.
STEP_TOLERANCE, ROUNDING_UNITS = 0.01, 2
# Minimum cosine between a step of an average and the difference from the average to the source.
STEP_COSINE = 0.9
# Minimum number of elements that must differ from the source, so that a step of an average can be recognized.
STEP_NUMBERS = 3


class Tensors(Protocol):
    """Keys, values, row storage and settings of a `Table`."""

    rows: Any
    config: Any

    @property
    def module(self) -> Any:
        """Module that owns keys and values; a ReferenceError if it was freed."""

    @property
    def keys(self) -> Tensor:
        """Keys, (capacity, key_dim)."""

    @property
    def values(self) -> Tensor:
        """Values, (capacity, value_dim)."""


class MixedRows(NamedTuple):
    """Rows that an average has mixed.

    Attributes:
        ids: Ids of rows that are mixed with the row that was in their slot before.
        zero_started: Number of rows whose average started from zeros.
    """

    ids: Tensor = NO_SLOTS
    zero_started: int = 0


class _Version(NamedTuple):
    """Rows in the slots of a source at one time.

    Attributes:
        writes: Number of writes by the source so far, and hash of its pairs of slot and id.
        rows: Id and generation of the row in each slot, (capacity, 2); -1 where it holds no row.
    """

    writes: tuple[int, int]
    rows: Tensor

    @classmethod
    def of(cls, source: Tensors) -> _Version | None:
        """Copy ids and generations; None for meta tensors, or if another thread writes."""
        if source.rows.ids.is_meta:
            return None
        writes = _writes_of(source)
        ids, generations = source.rows.ids.cpu(), source.rows.generation.cpu()
        if len(ids) != len(generations):
            return None
        version = cls(writes, _pair(ids, generations))
        return version if writes == _writes_of(source) else None


class _Sample(NamedTuple):
    """Sample of the slots whose row in the source has changed since the last update.

    Attributes:
        slots: The slots, (n,).
        own: Keys and values of the average at these slots.
        source: Keys and values of the source at these slots.
        version: Rows of the source.
    """

    slots: Tensor
    own: tuple[Tensor, Tensor]
    source: tuple[Tensor, Tensor]
    version: _Version


class SourceWatch:
    """Detector of averages of keys and values that mix two rows in one slot.

    Such an average of ``parameters()`` or of a ``state_dict()`` starts as a deep copy and is updated in place::

        average += rate * (source - average)        # slot by slot, 0 < rate < 1

    No hook reports an update, but the tensors of the copy are listed right before it, and `observe` is called then. It
    samples slots whose row in the source has changed since the last update. If the sampled rows have moved toward the
    rows of the source at a common rate when `observe` is called next, an average has been updated in between.

    Args:
        source: Table that was copied.

    Attributes:
        mixed: Ids of the rows that an average has mixed.
    """

    def __init__(self, source: Tensors) -> None:
        self.mixed = NO_SLOTS
        self._source = weakref.ref(source)
        version = _Version.of(source)
        self._updated = None if version is None else version.rows  # at the last update
        self._sample: _Sample | None = None
        self._changed: tuple[_Version, Tensor] | None = None  # source version, slots changed since the update

    def restart(self, ids: Tensor, generation: Tensor) -> SourceWatch | None:
        """Return a watch for a copy into which rows have been loaded.

        If the loaded rows are those of the source, changes of rows are recorded from now on. Otherwise they are
        recorded from the next observation on.
        """
        source = self._live_source()
        if source is None:
            return None
        watch = SourceWatch(source)
        if watch._updated is None or not torch.equal(_pair(ids.cpu(), generation.cpu()), watch._updated):
            watch._updated = None
        return watch

    @torch.no_grad()
    def observe(self, own: Tensors) -> MixedRows:
        """Return the rows that the last update of an average has mixed.

        A sample is kept for the next call.
        """
        source = self._live_source()
        if source is None or is_active() or _get_current_dispatch_mode() is not None or torch.compiler.is_compiling():
            return MixedRows()
        if not _are_comparable(own, source):
            self._sample = None
            return MixedRows()
        found = self._compare(own)
        self._keep_sample(own, source)
        return found

    def _live_source(self) -> Tensors | None:
        """Return the source while its module is in use."""
        source = self._source()
        try:
            return source if source is not None and source.module is not None else None
        except ReferenceError:
            return None

    def _compare(self, own: Tensors) -> MixedRows:
        """Return the rows that have been mixed since the sample was kept."""
        sample, known = self._sample, self._updated
        if sample is None or known is None or len(own.keys) != len(sample.version.rows):
            return MixedRows()
        rates = _find_rates(sample, _rows_at(own, sample.slots), own.keys.dtype)
        if None in rates or not any(rates):
            return MixedRows()  # not updated, or not by an average
        present = sample.version.rows
        if all(rate == 1 for rate in rates):  # a copy of the source
            self._updated, self._changed = present, None
            return MixedRows()
        if not any(rate is not None and 0 < rate < 1 for rate in rates):
            return MixedRows()  # only keys or only values are copied so far
        slots = _changed_slots(known, present)
        # The average of a slot that became free still contains its last row.
        self._updated, self._changed = torch.where(present < 0, known, present), None
        is_empty = ~torch.cat(sample.own, 1).any(1)  # all zeros, as in the copy of an empty slot
        held = (known[slots, 0] >= 0) & ~torch.isin(slots, sample.slots[is_empty])
        source = self._live_source()
        ids = slots[held] if source is None else source.rows.ids.cpu()[slots[held]]
        self.mixed = torch.cat([self.mixed, ids]).unique()
        return MixedRows(ids, int((~held).sum()))

    def _keep_sample(self, own: Tensors, source: Tensors) -> None:
        """Keep a sample of the slots whose row has changed since the last update."""
        self._sample = None
        if self._changed is None or self._changed[0].writes != _writes_of(source):
            self._changed = self._find_changed(source)
        if self._changed is None or len(self._changed[0].rows) != len(own.keys):
            return
        version, slots = self._changed
        if len(slots) == 0:
            return
        slots = slots[:: -(-len(slots) // INSPECTED_ROWS)]
        mine, theirs = _rows_at(own, slots), _rows_at(source, slots)
        if version.writes != _writes_of(source):
            return  # another thread writes
        differ = torch.cat([a != b for a, b in zip(mine, theirs, strict=True)], 1).any(1)
        finite = torch.cat([a.isfinite() & b.isfinite() for a, b in zip(mine, theirs, strict=True)], 1).all(1)
        chosen = (differ & finite).nonzero().squeeze(-1)[:SAMPLE_ROWS]
        own_rows, source_rows = (mine[0][chosen], mine[1][chosen]), (theirs[0][chosen], theirs[1][chosen])
        self._sample = _Sample(slots[chosen], own_rows, source_rows, version)

    def _find_changed(self, source: Tensors) -> tuple[_Version, Tensor] | None:
        """Find the slots whose row has changed since the last update.

        Returns them with the version of the source.
        """
        version = _Version.of(source)
        if version is None:
            return None
        present = version.rows
        if self._updated is None:
            self._updated = present
        if len(self._updated) != len(present):  # both were resized; the remaining rows keep their slots
            self._updated = resize(self._updated, len(present), fill=-1)
        return version, _changed_slots(self._updated, present)


def _writes_of(source: Tensors) -> tuple[int, int]:
    """Return the number of writes so far, and the hash of all slots and ids."""
    return source.rows.writes, source.rows.id_hash


def _are_comparable(own: Tensors, source: Tensors) -> bool:
    """Return whether both tables have plain tensors of the same shapes."""
    pairs = (own.keys, source.keys), (own.values, source.values)
    for tensor in (*pairs[0], *pairs[1]):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            return False
    return all(a.shape == b.shape for a, b in pairs)


def _pair(ids: Tensor, generations: Tensor) -> Tensor:  # (capacity,), (capacity,) -> (capacity, 2)
    """Pair ids and generations of slots; -1 at free slots.

    Both are needed: a new row may have the same id, but has another generation; after compaction, a slot may hold a row
    with another id.
    """
    return torch.stack([ids, torch.where(ids >= 0, generations, -1)], 1)


def _changed_slots(before: Tensor, now: Tensor) -> Tensor:  # (capacity, 2), (capacity, 2)
    """Return the slots that hold a new row."""
    return ((now[:, 0] >= 0) & (before != now).any(1)).nonzero().squeeze(-1)


def _rows_at(table: Tensors, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values at ``slots``, in float64 on the CPU."""
    keys, values = table.keys, table.values
    return (
        keys.index_select(0, slots.to(keys.device)).to("cpu", torch.float64),
        values.index_select(0, slots.to(values.device)).to("cpu", torch.float64),
    )


def _find_rates(sample: _Sample, after: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[float | None]:
    """Estimate the rate of an update of keys and that of values.

    If one of them differs from the source in too few elements, estimate one rate for both together. Return an empty
    list if both together differ in too few.
    """
    parts = list(zip(sample.own, sample.source, after, strict=True))
    if any((before != source).sum() < STEP_NUMBERS for before, source, _ in parts):
        before, source, after_both = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        parts = [(before, source, after_both)] if (before != source).sum() >= STEP_NUMBERS else []
    return [_find_rate(*part, dtype) for part in parts]


def _find_rate(before: Tensor, source: Tensor, after: Tensor, dtype: torch.dtype) -> float | None:
    """Estimate the rate from 0 to 1 of ``after = before + rate * (source - before)``.

    Returns None if there is no such rate.
    """
    step, way = after - before, source - before
    if not step.any():
        return 0.0
    rounding = ROUNDING_UNITS * torch.finfo(dtype).eps * torch.maximum(before.abs(), source.abs())
    if bool(((after - source).abs() <= rounding).all()):
        return 1.0
    product, length = float((step * way).sum()), step.norm()
    rate = product / float(way.square().sum())
    deviation = (step - rate * way).norm()
    is_average = (
        deviation <= STEP_TOLERANCE * length + rounding.norm()
        and product >= STEP_COSINE * float(length * way.norm())
        and length > rounding.norm() / 4
    )
    return rate if is_average and 0 < rate < 1 else None
