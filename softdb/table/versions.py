"""Recorded tensor versions: which writes to tensors are accounted for, and which something else has made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from softdb.table.changes import TensorState, state_of, version_of

__all__ = ["Differences", "RecordedVersions"]

Tensors = Mapping[str, Tensor | None]


class Differences(NamedTuple):
    """Names of tensors that something else has written to, and of those that another tensor replaces."""

    written: frozenset[str]
    replaced: frozenset[str]


class RecordedVersions:
    """The state of tensors, by name, at which every write to them is accounted for."""

    def __init__(self) -> None:
        self._recorded: dict[str, TensorState] = {}

    def record(self, tensors: Mapping[str, Tensor], lent: frozenset[str] = frozenset()) -> None:
        """Record the present state of ``tensors``, and keep that of the tensors that ``lent`` ones replace."""
        kept = {name: state for name, state in self._recorded.items() if name in lent}
        self._recorded = kept | {name: state_of(tensor) for name, tensor in tensors.items() if name not in lent}

    def record_step(self, name: str, before: TensorState, table: Tensor) -> None:
        """Record that an optimiser's step from state ``before`` on is accounted for, if it was the only write."""
        if before.equals(self._recorded.get(name)):
            self._recorded[name] = state_of(table)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Keep no weak reference to tensors meanwhile; the caller records them again."""
        self._recorded = {}
        yield

    def own(self, name: str) -> Tensor | None:
        """Return the tensor recorded under ``name``, if it still exists."""
        recorded = self._recorded.get(name)
        return None if recorded is None else recorded.table()

    def is_own(self, name: str, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the one recorded under ``name``, not another in its place."""
        return self.own(name) is tensor

    def are_current(self, tables: Tensors, buffers: Tensors, count: int) -> bool:
        """Whether ``count`` tensors are recorded, and none is written to or replaced since."""
        for name, (reference, place, version) in self._recorded.items():
            tensor = tables.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None or reference() is not tensor or tensor.data_ptr() != place:
                return False
            if version != version_of(tensor):
                return False
        return len(self._recorded) == count

    def compare(self, tensors: Mapping[str, Tensor]) -> Differences:
        """Return what something else has done to ``tensors`` since they were recorded."""
        written, replaced = set[str](), set[str]()
        for name, tensor in tensors.items():
            recorded = self._recorded.get(name)
            if recorded is None or recorded.table() is not tensor:
                replaced.add(name)
            elif not state_of(tensor).equals(recorded):
                written.add(name)
        return Differences(frozenset(written), frozenset(replaced))
