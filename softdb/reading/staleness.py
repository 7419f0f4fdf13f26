"""Staleness check: backward raises if rows of a read have changed without a copy."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdb.errors import StaleReadError
from softdb.reading.result import Read
from softdb.table.changes import version_of
from softdb.table.kept_rows import RowsAtRead, keep_rows
from softdb.table.storage import RowStorage

__all__ = ["OpenReads", "StalenessCheck"]


class StalenessCheck:
    """Staleness check of a read.

    Backward needs the rows as they were at the read: unchanged, or copied before they changed.

    Args:
        at_read: The rows that were read; None if none of the table's own tensors were.
        substitutes: Tensors that were read instead of the table's own. They are checked by their own versions, since
            writes to the table do not affect them.
    """

    def __init__(self, at_read: RowsAtRead | None, substitutes: Sequence[Tensor] = ()) -> None:
        self._at_read = at_read
        self._substitutes = [(tensor, version_of(tensor)) for tensor in substitutes]

    def check(self) -> None:
        """Raise `StaleReadError` if a row that the read used has changed without a copy."""
        if any(version_of(tensor) != version for tensor, version in self._substitutes):
            raise StaleReadError(
                "keys, values: expected the tensors that are substituted for the store's own to be unchanged between "
                "this read and its backward, got a write to them, so the gradients would be wrong; call backward() "
                "before writing to them"
            )
        if self._at_read is not None:
            self._at_read.check()


class OpenReads:
    """Open reads: reads whose backward may still run.

    The backward of a read checks that its rows are unchanged. Writes copy rows without gradient before they change
    them, as long as a read of them is open. Growth of a table with gradients is refused while a read is open.

    A read is open as long as its *token* is alive: a tensor that its graph saves for backward.
    """

    def __init__(self) -> None:
        self._open: list[tuple[weakref.ref[Tensor], weakref.ref[RowsAtRead]]] = []  # the oldest first
        self._version_tensor: tuple[int, Tensor | None] = (-1, None)  # a version, and a tensor that holds it

    def __bool__(self) -> bool:
        return any(token() is not None for token, _ in self._open)

    def __reduce__(self) -> tuple[type[OpenReads], tuple[()]]:
        return OpenReads, ()  # a copy has no open reads

    def keep_rows(self, rows: RowStorage, tables: Mapping[str, Tensor], changing: Tensor) -> None:
        """Copy the rows that a write will change for the open reads that used them.

        Args:
            rows: The rows of the table.
            tables: Keys and values by name.
            changing: The slots that the write will change.
        """
        pairs = [(token(), at_read()) for token, at_read in self._open]
        reads = [at_read for token, at_read in pairs if token is not None and at_read is not None and at_read.keeps]
        if reads:
            keep_rows(reads, rows, tables, changing)

    def attach(
        self, read: Read, at_read: RowsAtRead | None, used: Tensor | None, substitutes: Sequence[Tensor] = ()
    ) -> Read:
        """Attach the staleness check to a read.

        Args:
            read: A read.
            at_read: The rows that it read, as they were before it; None if gradients are disabled.
            used: Slots that the read may have used, as for `RowsAtRead`.
            substitutes: As for `StalenessCheck`.
        """
        if at_read is None:
            return read
        members = {name: getattr(read, name) for name in ("values", "weights", "scores", "lse", "mass")}
        pending = {name: tensor for name, tensor in members.items() if tensor is not None and tensor.requires_grad}
        if not pending:
            return read
        if used is not None:
            at_read.used = used
        version, version_tensor = self._version_tensor
        if version != at_read.version or version_tensor is None:
            version_tensor = torch.tensor(at_read.version, device="cpu")
            self._version_tensor = (at_read.version, version_tensor)
        token = version_tensor.detach()  # a new tensor object, which lives as long as the graph
        reference = self._register(token, at_read)
        check = StalenessCheck(at_read if len(substitutes) < 2 else None, substitutes)
        checked = _CheckedRead.apply(check, token, *pending.values())  # type: ignore[no-untyped-call]
        del token
        if reference() is None:  # a saved-tensor hook replaced the token
            checked[0].grad_fn.token = replacement = version_tensor.detach()
            self._register(replacement, at_read)
        return replace(read, **dict(zip(pending, checked, strict=True)))

    def _register(self, token: Tensor, at_read: RowsAtRead) -> weakref.ref[Tensor]:
        """Register a read as open for as long as ``token`` is alive."""
        held = weakref.ref(at_read)
        reference = weakref.ref(token, lambda _: _drop_copies(held))
        with at_read.access.counter_lock:
            self._open = [other for other in self._open if other[0]() is not None]
            self._open.append((reference, held))
        return reference


def _drop_copies(at_read: weakref.ref[RowsAtRead]) -> None:
    """Free the copies of a read that is no longer open."""
    rows = at_read()
    if rows is not None:
        rows.copies = []


class _CheckedRead(torch.autograd.Function):
    """Identity on the tensors of a read; backward runs the staleness check first."""

    @staticmethod
    def forward(ctx: Any, check: StalenessCheck, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.check, ctx.version, ctx.token = check, int(token), None
        ctx.save_for_backward(token)  # lives until the graph is freed; growth waits for that
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)  # in-place writes to views of a custom function raise

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        # torch frees the token after this node, but nodes behind it still need the copies of rows. The callback holds
        # the token until the backward pass has ended.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(_Hold(token, ctx.token))
        ctx.token = None
        if int(token) != ctx.version:
            raise StaleReadError(
                "backward: expected activation checkpointing to repeat the read with unchanged rows, got rows that "
                "were written since, so the gradients would be wrong; call backward() before writing to the store"
            )
        ctx.check.check()
        return None, None, *grads


class _Hold:
    """Callback that holds tokens until it is called.

    The thread that runs the nodes of a GPU destroys the callback some time after backward has returned.
    """

    def __init__(self, *tokens: Tensor | None) -> None:
        self._tokens = tokens

    def __call__(self) -> None:
        self._tokens = ()
