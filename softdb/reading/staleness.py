"""Staleness check: backward raises if the rows that a read used have changed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdb._checks import list_ids
from softdb.errors import StaleReadError
from softdb.reading.result import Read
from softdb.table.changes import version_of
from softdb.table.storage import RowStorage

__all__ = ["OpenReads", "StalenessCheck"]


class StalenessCheck:
    """Versions of the rows that a read used.

    Backward compares them with the current versions.

    Args:
        table: The rows that were read.
        used: Slots that the read may have used: a bool mask over the first slots, a tensor of slots (-1 is padding), or
            None for every slot that held a row.
        substitutes: Tensors that were read instead of the table's own. They are checked by their own versions, since
            writes to the table do not affect them.
        own: Whether the table's own tensors were read.
    """

    def __init__(
        self, table: RowStorage, used: Tensor | None, substitutes: Sequence[Tensor] = (), *, own: bool = True
    ) -> None:
        self._table = table if own else None
        self._version = table.version
        self._first = table.used
        self._used = table.live_mask() if used is None else used
        self._substitutes = [(tensor, version_of(tensor)) for tensor in substitutes]

    def check(self) -> None:
        """Raise `StaleReadError` if a row that the read used has changed since."""
        if any(version_of(tensor) != version for tensor, version in self._substitutes):
            raise StaleReadError(
                "keys, values: expected the tensors that are substituted for the store's own to be unchanged between "
                "this read and its backward, got a write to them, so the gradients would be wrong; call backward() "
                "before writing to them"
            )
        if self._table is None or self._table.version == self._version:
            return
        changed = self._table.changed_since(self._version)
        changed = changed[changed < self._first]
        if self._used is not None:
            if self._used.dtype == torch.bool:
                changed = changed[self._used[changed]]
            else:
                changed = changed[torch.isin(changed, self._used)]
        if len(changed):
            raise StaleReadError(
                f"backward: expected the rows that this read used to be unchanged, got {len(changed)} changed or "
                f"deleted rows (slots {list_ids(changed)}), so the gradients would be wrong; call backward() before "
                "writing to the store or stepping an optimizer, or read again"
            )


class OpenReads:
    """Open reads: reads whose backward may still run.

    The backward of a read checks that its rows are unchanged. Growth of the table is refused while a read is open.
    """

    def __init__(self) -> None:
        self._tokens: list[weakref.ref[Tensor]] = []
        self._version_tensor: tuple[int, Tensor | None] = (-1, None)  # a version, and a tensor that holds it

    def __bool__(self) -> bool:
        return any(token() is not None for token in self._tokens)

    def __reduce__(self) -> tuple[type[OpenReads], tuple[()]]:
        return OpenReads, ()  # a copy has no open reads

    def attach(self, read: Read, rows: RowStorage, used: Tensor | None, substitutes: Sequence[Tensor] = ()) -> Read:
        """Attach the staleness check to a read.

        Args:
            read: A read.
            rows: The rows that it read.
            used: As for `StalenessCheck`.
            substitutes: As for `StalenessCheck`.
        """
        if not torch.is_grad_enabled():
            return read
        members = {name: getattr(read, name) for name in ("values", "weights", "scores", "lse", "mass")}
        pending = {name: tensor for name, tensor in members.items() if tensor is not None and tensor.requires_grad}
        if not pending:
            return read
        version, version_tensor = self._version_tensor
        if version != rows.version or version_tensor is None:
            version_tensor = torch.tensor(rows.version, device="cpu")
            self._version_tensor = (rows.version, version_tensor)
        token = version_tensor.detach()  # a new tensor object, which lives as long as the graph
        reference = self._register(token, rows)
        check = StalenessCheck(rows, used, substitutes, own=len(substitutes) < 2)
        checked = _CheckedRead.apply(check, token, *pending.values())  # type: ignore[no-untyped-call]
        del token
        if reference() is None:  # a saved-tensor hook replaced the token
            checked[0].grad_fn.token = replacement = version_tensor.detach()
            self._register(replacement, rows)
        return replace(read, **dict(zip(pending, checked, strict=True)))

    def _register(self, token: Tensor, rows: RowStorage) -> weakref.ref[Tensor]:
        """Register a read as open for as long as ``token`` is alive."""
        reference = weakref.ref(token)
        with rows.access.counter_lock:
            self._tokens = [other for other in self._tokens if other() is not None]
            self._tokens.append(reference)
        return reference


class _CheckedRead(torch.autograd.Function):
    """Identity on the tensors of a read; backward runs the staleness check first."""

    @staticmethod
    def forward(ctx: Any, check: StalenessCheck, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.check, ctx.version = check, int(token)
        ctx.save_for_backward(token)  # lives until the graph is freed; growth waits for that
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)  # in-place writes to views of a custom function raise

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        ctx.token = None
        if int(token) != ctx.version:
            raise StaleReadError(
                "backward: expected activation checkpointing to repeat the read with unchanged rows, got rows that "
                "were written since, so the gradients would be wrong; call backward() before writing to the store"
            )
        ctx.check.check()
        return None, None, *grads
