"""The staleness check: whether the rows that a read used are unchanged when its gradients come back."""

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
    """What a read saw, to be checked again before its backward.

    Args:
        table: The rows that were read.
        used: Which slots the read may have used: a bool mask over the first slots, a tensor of slots (-1 is
            padding), or None for every slot that held a row.
        lent: Tensors that were read in the place of the table's own, which no change to its rows concerns.
        own: Whether tensors of the table's own were read.
    """

    def __init__(
        self, table: RowStorage, used: Tensor | None, lent: Sequence[Tensor] = (), *, own: bool = True
    ) -> None:
        self._table = table if own else None
        self._version = table.version
        self._first = table.used
        self._used = table.live_mask() if used is None else used
        self._lent = [(tensor, version_of(tensor)) for tensor in lent]

    def check(self) -> None:
        """Raise `StaleReadError` if a row that the read used has changed since."""
        if any(version_of(tensor) != version for tensor, version in self._lent):
            raise StaleReadError(
                "keys or values that were put in the place of the store's own were written to between this read and "
                "its backward, so its gradients would be wrong; call backward() before writing to them"
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
                f"{len(changed)} of the rows that this read used (slots {list_ids(changed)}) were changed, deleted or "
                "moved by an optimiser before its backward, so their gradients would be wrong; call backward() "
                "before writing to the store, or read again"
            )


class OpenReads:
    """The reads that wait for their backward: each checks then that its rows are unchanged, and growth asks for any."""

    def __init__(self) -> None:
        self._tokens: list[weakref.ref[Tensor]] = []
        self._stamp: tuple[int, Tensor | None] = (-1, None)  # a version, and the same as reads hold it

    def __bool__(self) -> bool:
        return any(token() is not None for token in self._tokens)

    def __reduce__(self) -> tuple[type[OpenReads], tuple[()]]:
        return OpenReads, ()  # no read of a copy is open

    def attach(self, read: Read, rows: RowStorage, used: Tensor | None, lent: Sequence[Tensor] = ()) -> Read:
        """Return ``read``, such that its backward first checks the rows it used.

        Args:
            read: A read.
            rows: The rows that it read.
            used: As for `StalenessCheck`.
            lent: As for `StalenessCheck`.
        """
        if not torch.is_grad_enabled():
            return read
        members = {name: getattr(read, name) for name in ("values", "weights", "scores", "lse", "mass")}
        pending = {name: tensor for name, tensor in members.items() if tensor is not None and tensor.requires_grad}
        if not pending:
            return read
        version, stamp = self._stamp
        if version != rows.version or stamp is None:
            stamp = torch.tensor(rows.version, device="cpu")
            self._stamp = (rows.version, stamp)
        token = stamp.detach()  # an object of its own
        life = self._note(token, rows)
        check = StalenessCheck(rows, used, lent, own=len(lent) < 2)
        checked = _CheckedRead.apply(check, token, *pending.values())  # type: ignore[no-untyped-call]
        del token
        if life() is None:  # a saved-tensor hook keeps another tensor in its place
            checked[0].grad_fn.token = again = stamp.detach()
            self._note(again, rows)
        return replace(read, **dict(zip(pending, checked, strict=True)))

    def _note(self, token: Tensor, rows: RowStorage) -> weakref.ref[Tensor]:
        """Count a read as open as long as ``token`` lives."""
        life = weakref.ref(token)
        with rows.access.counter_lock:
            self._tokens = [reference for reference in self._tokens if reference() is not None]
            self._tokens.append(life)
        return life


class _CheckedRead(torch.autograd.Function):
    """The identity on a read's tensors; before gradients pass back, it checks that the rows are still those read."""

    @staticmethod
    def forward(ctx: Any, check: StalenessCheck, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.check, ctx.version = check, int(token)
        ctx.save_for_backward(token)  # lives until the graph is freed, which is how growth knows that it may
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)  # views could not be written to in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (token,) = ctx.saved_tensors
        ctx.token = None
        if int(token) != ctx.version:
            raise StaleReadError(
                "activation checkpointing repeated this read after rows had been written, so its gradients would be "
                "those of another read; call backward() before writing to the store"
            )
        ctx.check.check()
        return None, None, *grads
