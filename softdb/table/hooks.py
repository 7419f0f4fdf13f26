"""Hooks of optimisers: which rows a step has moved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from softdb.errors import GrowthError
from softdb.table.changes import TensorState, state_of
from softdb.table.gradients import coalesced
from softdb.table.storage import RowStorage

__all__ = ["note_move", "note_write", "of", "trust", "unwatched", "watch"]


# Which tables' rows a Parameter holds, and what of them: "keys" or "values". Several stores may share a Parameter.
# Written tensors' version counters do not betray fused optimisers, whose step hooks do fire; the hooks are registered
# with the first trainable table.
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


_coalescing: WeakIdKeyDictionary = WeakIdKeyDictionary()  # The hooks of Parameters whose gradients are kept coalesced


_hooked = False


# Optimisers, beside torch's own, that move only the rows of a row-sparse gradient, and whose state grows with the rows.
_row_optimizers: set[type[torch.optim.Optimizer]] = set()


# What the steps under way will move, by optimiser: a gradient may be gone when the step has ended.
_moving: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[_Move]] = weakref.WeakKeyDictionary()


class _Move(NamedTuple):
    """A Parameter that a step moves: whose rows it holds, which of them a trusted optimiser moves (None: all)."""

    parameter: nn.Parameter
    table: RowStorage
    name: str
    slots: Tensor | None
    state: TensorState


def of(parameter: Tensor) -> RowStorage | None:
    """The table whose keys or values ``parameter`` holds; the first of several."""
    return next((table for table, _ in _owners(parameter)), None)


def _owners(parameter: Tensor) -> Iterator[tuple[RowStorage, str]]:
    """Yield the tables whose rows ``parameter`` holds, and what of them."""
    for reference, name in _tables.get(parameter, ()):
        table = reference()
        if table is not None:
            yield table, name


def note_move(parameter: Tensor, slots: Tensor | None) -> None:
    """Have the tables of ``parameter`` note that the rows at ``slots``, or all, have been moved."""
    for table, name in _owners(parameter):
        with table.access.writing():
            table.mark_moved(slots, keys=name == "keys")


def note_write(tensor: Tensor, writer: RowStorage, name: str) -> None:
    """Have the other tables whose rows ``tensor`` holds note that a store has written to it as its ``name``."""
    for table, what in list(_owners(tensor)):
        if table is not writer or what != name:
            table.mark_moved(keys=what == "keys")


def trust(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Take the word of an optimiser class that it follows growth and notes by itself which rows it moves."""
    _row_optimizers.add(kind)
    return kind


def watch(parameter: Tensor, table: RowStorage, name: str) -> None:
    """Have ``table`` note every step, and write of another store, to ``parameter``: its "keys" or its "values"."""
    global _hooked
    if parameter.requires_grad and parameter not in _coalescing:
        _coalescing[parameter] = parameter.register_post_accumulate_grad_hook(_keep_coalesced)
    others = [
        (reference, what)
        for reference, what in _tables.get(parameter, ())
        if reference() is not None and (reference() is not table or what != name)
    ]
    _tables[parameter] = [*others, (weakref.ref(table), name)]
    if not _hooked and isinstance(parameter, nn.Parameter):
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


@contextmanager
def unwatched(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep no weak reference to ``parameters`` meanwhile: torch refuses to swap tensors that have one."""
    watching = [(parameter, _tables.pop(parameter, None)) for parameter in parameters]
    for parameter, _ in watching:
        hook = _coalescing.pop(parameter, None)
        if hook is not None:
            hook.remove()
    try:
        yield
    finally:
        for parameter, owners in watching:
            for reference, name in owners or ():
                table = reference()
                if table is not None:
                    watch(parameter, table, name)


def _keep_coalesced(parameter: Tensor) -> None:
    """Say again that a sparse gradient is coalesced: on its way to ``.grad`` it forgets, and its reader would sort."""
    gradient = parameter.grad
    if gradient is not None and gradient.layout == torch.sparse_coo:
        whole = coalesced(gradient)
        if whole is not gradient:
            parameter.grad = whole


def _moved_by(optimizer: torch.optim.Optimizer) -> Iterator[_Move]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owners = list(_owners(parameter))
            if owners and parameter.grad is not None:
                sparse = parameter.grad.layout == torch.sparse_coo and _moves_no_other_row(optimizer, group)
                slots = parameter.grad._indices()[0].clone() if sparse else None
                for table, name in owners:
                    yield _Move(parameter, table, name, slots, state_of(parameter))


def _moves_no_other_row(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether a step leaves every row alone that a sparse gradient does not name."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    everybodys = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    hooks: list[object] = [hook for hooks in (*own, *everybodys) for hook in hooks.values()]
    if any(hook not in (_before_step, _after_step) for hook in hooks):
        return False  # they may write to anything
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return bool(group["momentum"] == 0)
    return kind in (torch.optim.SparseAdam, torch.optim.Adagrad) or kind in _row_optimizers


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    moves = list(_moved_by(optimizer))
    if not isinstance(optimizer, tuple(_row_optimizers)):
        for move in moves:
            _check_state(move.parameter, optimizer.state.get(move.parameter, {}))
    _moving[optimizer] = moves


def _check_state(parameter: nn.Parameter, states: Mapping[str, Any]) -> None:
    for name, state in states.items():
        # A fused step over a state of the old size would read and write past its end. Other states have shapes of
        # their own; Adafactor's, of one row for all, looks like one of these.
        if not isinstance(state, Tensor) or state.dim() != parameter.dim() or name == "col_var":
            continue
        if state.shape[1:] == parameter.shape[1:] and len(state) != len(parameter):
            grown = len(parameter) > len(state)
            remedy = "call store.reserve() before building an optimiser, or build" if grown else "build"
            raise GrowthError(
                f"the storage has {'grown' if grown else 'shrunk'} to {len(parameter)} rows, but the optimiser's "
                f"{name!r} has shape {tuple(state.shape)}: {remedy} a new one; softdb.optim.RowAdam follows "
                f"{'growth' if grown else 'such changes'}"
            )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    noted = type(optimizer) in _row_optimizers and _moves_no_other_row(optimizer, {})  # by the optimiser itself
    before = {(id(move.parameter), id(move.table), move.name): move for move in _moving.pop(optimizer, [])}
    # A closure may have made the gradients.
    after = {(id(move.parameter), id(move.table), move.name): move for move in _moved_by(optimizer)}
    for number, move in (before | after).items():
        if not noted:
            # Only what was there on both sides of the step, or came with it, is known to be what the step used.
            first, last = before.get(number, move).slots, after[number].slots if number in after else None
            if first is not None and last is not None and not torch.equal(first, last):
                last = torch.cat([first, last]).unique()
            with move.table.access.writing():
                move.table.mark_moved(None if first is None else last, keys=move.name == "keys")
        move.table.average.source = None  # a copy that is trained is no average
        if number in before:
            move.table.recorded.record_step(move.name, before[number].state, move.parameter)
