"""Recorded versions of tensors, which reveal writes by code outside of softdb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from softdb.table.changes import TensorState, state_of, version_of

__all__ = ["Differences", "RecordedVersions"]

Tensors = Mapping[str, Tensor | None]


class Differences(NamedTuple):
    """Names of tensors that other code has written to, or replaced by other tensors."""

    written: frozenset[str]
    replaced: frozenset[str]


class RecordedVersions:
    """Recorded states of tensors, by name.

    All writes to a tensor before its recorded state have been processed.
    """

    def __init__(self) -> None:
        self._recorded: dict[str, TensorState] = {}

    def record(self, tensors: Mapping[str, Tensor], substituted: frozenset[str] = frozenset()) -> None:
        """Record the states of ``tensors``; keep the records of ``substituted`` names."""
        kept = {name: state for name, state in self._recorded.items() if name in substituted}
        self._recorded = kept | {name: state_of(tensor) for name, tensor in tensors.items() if name not in substituted}

    def record_step(self, name: str, before: TensorState, tensor: Tensor) -> None:
        """Record an optimizer step as processed, if no other write preceded it.

        Args:
            name: The name of the tensor.
            before: The state of the tensor before the step.
            tensor: The tensor after the step.
        """
        if before.equals(self._recorded.get(name)):
            self._recorded[name] = state_of(tensor)

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Drop all weak references to tensors; the caller records the tensors again."""
        self._recorded = {}
        yield

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor recorded under ``name``, if it still exists."""
        recorded = self._recorded.get(name)
        return None if recorded is None else recorded.tensor()

    def is_own(self, name: str, tensor: Tensor) -> bool:
        """Return whether ``tensor`` is the one recorded under ``name``, not a substitute."""
        return self.tensor(name) is tensor

    def are_current(self, tables: Tensors, buffers: Tensors, count: int) -> bool:
        """Return whether ``count`` tensors are recorded, and all are unchanged since."""
        for name, (reference, data_ptr, version) in self._recorded.items():
            tensor = tables.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None or reference() is not tensor or tensor.data_ptr() != data_ptr:
                return False
            if version != version_of(tensor):
                return False
        return len(self._recorded) == count

    def compare(self, tensors: Mapping[str, Tensor]) -> Differences:
        """Return which ``tensors`` were written to or replaced since they were recorded."""
        written, replaced = set[str](), set[str]()
        for name, tensor in tensors.items():
            recorded = self._recorded.get(name)
            if recorded is None or recorded.tensor() is not tensor:
                replaced.add(name)
            elif not state_of(tensor).equals(recorded):
                written.add(name)
        return Differences(frozenset(written), frozenset(replaced))
