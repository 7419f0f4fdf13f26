"""Optimizer hooks that check gradients and record which rows a step has updated."""

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
from softdb.pending_checks import is_deferred
from softdb.table.changes import TensorState, state_of
from softdb.table.gradients import coalesce
from softdb.table.layouts import check_before_step
from softdb.table.storage import RowStorage

__all__ = [
    "find_optimizers",
    "follows_rows",
    "is_row_embedding",
    "pause_watching",
    "record_update",
    "record_write",
    "register_row_embedding",
    "register_row_optimizer",
    "table_of",
    "tables_of",
    "track_optimizer",
    "watch",
]


# For each Parameter, weak references to its tables, and whether it holds their "keys" or "values". Several stores may
# share a Parameter.
_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Handles of the hooks that keep the gradients of Parameters coalesced.
_coalescing: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Embeddings whose weights are rows of a layer.
_row_embeddings: weakref.WeakSet[nn.Embedding] = weakref.WeakSet()

# Whether the optimizer hooks are registered, which happens with the first trainable table or row embedding. The hooks
# are needed because fused optimizers do not increment version counters.
_hooked = False

# Optimizers, besides those of torch, that update only the rows of a row-sparse gradient and resize their state.
_row_optimizers: set[type[torch.optim.Optimizer]] = set()

# Optimizers that may have state for a Parameter of a table, by ``id()``: row optimizers, and others that have updated
# one.
_optimizers: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()

# Updates of steps in progress, by optimizer. They are recorded before the step, which may free the gradients.
_pending_updates: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[_Update]] = weakref.WeakKeyDictionary()


class _Update(NamedTuple):
    """Update of a Parameter by an optimizer step.

    Attributes:
        parameter: The Parameter.
        table: A table whose rows the Parameter holds.
        name: "keys" or "values".
        slots: The updated slots, which may contain duplicates; None for all, or if the optimizer records them itself.
        state: State of the Parameter at the time of recording.
    """

    parameter: nn.Parameter
    table: RowStorage
    name: str
    slots: Tensor | None
    state: TensorState

    @property
    def key(self) -> tuple[int, int, str]:
        """Hashable identity of Parameter, table and name."""
        return id(self.parameter), id(self.table), self.name


def table_of(parameter: Tensor) -> RowStorage | None:
    """Return the first table whose keys or values ``parameter`` holds, if any."""
    return next((table for table, _ in _owners(parameter)), None)


def register_row_embedding(module: nn.Embedding) -> None:
    """Register an embedding whose ``weight`` is a table of rows that no store owns.

    The module is registered instead of its Parameter, which conversions and loading may replace.
    """
    _row_embeddings.add(module)
    _register_step_hooks()


def is_row_embedding(module: nn.Module) -> bool:
    """Return whether ``module`` is an embedding that was registered."""
    return module in _row_embeddings


def _holds_rows(parameter: Tensor) -> bool:
    """Return whether a Parameter is a table of rows, of a store or a layer."""
    return table_of(parameter) is not None or any(module.weight is parameter for module in list(_row_embeddings))


def tables_of(tensor: Tensor) -> list[RowStorage]:
    """Return the tables whose keys or values ``tensor`` holds."""
    return [table for table, _ in _owners(tensor)]


def _owners(parameter: Tensor) -> Iterator[tuple[RowStorage, str]]:
    """Yield each table whose rows ``parameter`` holds, with "keys" or "values"."""
    for reference, name in _tables.get(parameter, ()):
        table = reference()
        if table is not None:
            yield table, name


def record_update(parameter: Tensor, slots: Tensor | None) -> None:
    """Record an update of a Parameter in its tables.

    Args:
        parameter: The Parameter that was updated.
        slots: The updated slots; None for all.
    """
    for table, name in _owners(parameter):
        with table.access.writing():
            table.mark_updated(slots, keys=name == "keys")


def record_write(tensor: Tensor, writer: RowStorage, name: str) -> None:
    """Record a write of one table to a shared tensor in the other tables.

    Args:
        tensor: The tensor that was written to.
        writer: The table that wrote to it.
        name: "keys" or "values", as which the writer holds the tensor.
    """
    for table, what in list(_owners(tensor)):
        if table is not writer or what != name:
            table.mark_updated(keys=what == "keys")


def register_row_optimizer(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Register an optimizer class that resizes its state and records its updates."""
    _row_optimizers.add(kind)
    return kind


def track_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let `find_optimizers` find an optimizer before its first step, too."""
    _optimizers[id(optimizer)] = optimizer


def follows_rows(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer resizes its state, and can move it to other slots."""
    return isinstance(optimizer, tuple(_row_optimizers))


def find_optimizers(parameter: Tensor) -> list[Any]:
    """Return the optimizers with state for a Parameter of a table."""
    optimizers = [reference() for reference in _optimizers.valuerefs()]  # Other threads may add more meanwhile.
    return [optimizer for optimizer in optimizers if optimizer is not None and optimizer.state.get(parameter)]


def watch(parameter: Tensor, table: RowStorage, name: str) -> None:
    """Record optimizer steps and writes of other stores to ``parameter`` in ``table``.

    Args:
        parameter: The keys or values of the table.
        table: The table.
        name: "keys" or "values".
    """
    if parameter.requires_grad and parameter not in _coalescing:
        _coalescing[parameter] = parameter.register_post_accumulate_grad_hook(_keep_coalesced)
    others = [
        (reference, what)
        for reference, what in _tables.get(parameter, ())
        if reference() is not None and (reference() is not table or what != name)
    ]
    _tables[parameter] = [*others, (weakref.ref(table), name)]
    if isinstance(parameter, nn.Parameter):
        _register_step_hooks()


def _register_step_hooks() -> None:
    """Register the hooks of optimizer steps, once."""
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


@contextmanager
def pause_watching(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Drop weak references to ``parameters`` within the block.

    torch refuses to swap tensors that have weak references.
    """
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
    """Restore the flag "coalesced" of a sparse gradient, which accumulation drops.

    Without the flag, the next call of `coalesce` would sort the gradient. A gradient on a GPU stays as it is, since
    neither its order nor the number of distinct rows is known without waiting for the device.
    """
    gradient = parameter.grad
    if gradient is not None and gradient.layout == torch.sparse_coo and not is_deferred(gradient):
        whole = coalesce(gradient)
        if whole is not gradient:
            parameter.grad = whole


def _find_updates(optimizer: torch.optim.Optimizer) -> Iterator[_Update]:
    records_itself = type(optimizer) in _row_optimizers
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owners = [] if parameter.grad is None else list(_owners(parameter))
            if owners:
                sparse = not records_itself and parameter.grad.layout == torch.sparse_coo
                named = sparse and _updates_only_named_rows(optimizer, group)
                slots = parameter.grad._indices()[0].clone() if named else None
                for table, name in owners:
                    yield _Update(parameter, table, name, slots, state_of(parameter))


def _updates_only_named_rows(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether a step updates only the rows that a sparse gradient contains."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    global_hooks = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    hooks: list[object] = [hook for hooks in (*own, *global_hooks) for hook in hooks.values()]
    if any(hook not in (_before_step, _after_step) for hook in hooks):
        return False  # Hooks of other code may write to any row.
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return bool(group["momentum"] == 0)
    return kind in (torch.optim.SparseAdam, torch.optim.Adagrad) or kind in _row_optimizers


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    hooks = (*_global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values())
    # Pre-hooks of other code run later, and may convert the gradients.
    is_last = all(hook is _before_step for hook in hooks)
    arguments = check_before_step(optimizer, args, kwargs, _holds_rows) if is_last else None
    updates = list(_find_updates(optimizer))
    if updates:
        track_optimizer(optimizer)
    if not follows_rows(optimizer):
        for update in updates:
            _check_state(update.parameter, optimizer.state.get(update.parameter, {}))
    _pending_updates[optimizer] = updates
    return arguments


def _check_state(parameter: nn.Parameter, states: Mapping[str, Any]) -> None:
    for name, state in states.items():
        # A fused step would access a state of the old size out of bounds. Only states with one entry per row are
        # checked; Adafactor's "col_var" is excluded by name, because its shape is similar.
        if not isinstance(state, Tensor) or state.dim() != parameter.dim() or name == "col_var":
            continue
        if state.shape[1:] == parameter.shape[1:] and len(state) != len(parameter):
            grown = len(parameter) > len(state)
            remedy = "call store.reserve() before constructing the optimizer, construct" if grown else "construct"
            raise GrowthError(
                f"optimizer: expected {len(parameter)} rows in its state {name!r}, since the storage has "
                f"{'grown' if grown else 'shrunk'}, got shape {tuple(state.shape)}; {remedy} a new optimizer, or use "
                "softdb.optim.RowAdam, which resizes its state"
            )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Registered row optimizers record their updates themselves.
    is_recorded = type(optimizer) in _row_optimizers and _updates_only_named_rows(optimizer, {})
    before = {update.key: update for update in _pending_updates.pop(optimizer, [])}
    # Updates are determined again, since a closure may have computed the gradients during the step.
    after = {update.key: update for update in _find_updates(optimizer)}
    for key, update in (before | after).items():
        if not is_recorded:
            # If the gradient is gone after the step, it is unknown which rows the step used: all count as updated.
            first, last = before.get(key, update).slots, after[key].slots if key in after else None
            if first is not None and last is not None and (is_deferred(last) or not torch.equal(first, last)):
                last = torch.cat([first, last])  # The log of changes accepts duplicates.
            with update.table.access.writing():
                update.table.mark_updated(None if first is None else last, keys=update.name == "keys")
        update.table.average.source = None  # A copy that an optimizer trains is no average.
        if key in before:
            update.table.recorded.record_step(update.name, before[key].state, update.parameter)
