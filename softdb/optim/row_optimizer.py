"""Base class of row optimizers, whose step updates only rows with a gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from softdb._checks import FLOAT_DTYPES, check_flag, check_float_tensor, check_number
from softdb.errors import ArgumentError, DtypeError
from softdb.optim.blocks import BlockSizes, RowBlock, iterate_blocks
from softdb.optim.gradients import check_gradient, select_gradients
from softdb.optim.rounding import NOISE_DTYPES, draw_noise, round_stochastically, start_streams
from softdb.optim.row_state import (
    State,
    advance_decay,
    check_integers,
    check_log_factor,
    check_state_names,
    check_whole_state,
    count_row_steps,
    reset_new_rows,
    resize_state,
    state_dtype,
)
from softdb.pending_checks import is_deferred
from softdb.table.gradients import is_sharded
from softdb.table.hooks import record_update, table_of, track_optimizer
from softdb.table.storage import RowStorage

__all__ = ["RowOptimizer"]

# Options of torch's optimizers that must be False here, and the reasons. Two other options, ``foreach`` and ``fused``,
# choose an implementation in torch. They have no effect here.
UNSUPPORTED_OPTIONS = {
    "capturable": "the step of a row optimizer cannot be captured in a CUDA graph",
    "differentiable": "autograd does not run through the step of a row optimizer",
}


class RowOptimizer(Optimizer):
    """Base class of optimizers that update only rows with a gradient.

    A subclass defines the moments of a row and the direction of its step. See `softdb.optim.row_state` for the state of
    a Parameter.

    Attributes:
        block_sizes: Block sizes of a step.
        optional_moments: Names of the moments that exist only with some options.
    """

    block_sizes = BlockSizes()
    optional_moments: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, self._check_options(defaults))
        track_optimizer(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        track_optimizer(self)

    # -- defined by subclasses -------------------------------------------------------------------------------

    @abstractmethod
    def _initial_moments(self, options: dict[str, Any]) -> dict[str, float]:
        """Return the initial value of each moment of a row, by name."""

    @abstractmethod
    def _state_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of a moment for a Parameter of ``shape``."""

    @abstractmethod
    def _step_size(self, age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
        """Return the step size of a row in its ``age``-th step, counted from 1."""

    @abstractmethod
    def _update_moments(
        self, block: RowBlock, gradient: Tensor, moments: list[Tensor], eps: float | Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Update the moments of a block; return the direction's numerator and denominator.

        The denominator includes ``eps``, which is a number, or a tensor that broadcasts to the rows of the block.
        """

    def _epsilon(self, age: int | Tensor, is_dense: bool, options: dict[str, Any]) -> float | Tensor:
        """Return the term that is added to the denominator in a row's ``age``-th step."""
        eps: float = options["eps"]
        return eps

    def _has_kernel(self, rows: Tensor, moments: list[Tensor]) -> bool:
        """Return whether `_run_kernel` supports a step on a GPU."""
        return False

    def _run_kernel(
        self,
        rows: Tensor,
        gradient: Tensor,
        moments: list[Tensor],
        state: State,
        table: RowStorage | None,
        options: dict[str, Any],
    ) -> None:
        """Update rows, moments and state in one kernel."""
        raise NotImplementedError

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Check the options of a group; return them as Python numbers."""
        lr = options["lr"]
        number = check_number("lr", lr)
        for name, reason in UNSUPPORTED_OPTIONS.items():
            if check_flag(name, options.get(name, False)):
                raise ArgumentError(f"{name}: expected False, since {reason}, got True; leave it out")
        chosen = [name for name in ("foreach", "fused") if options.get(name) is not None]
        if sum(check_flag(name, options[name]) for name in chosen) == 2:
            raise ArgumentError("fused: expected at most one of foreach and fused to be True, got both; leave them out")
        return {
            # Keep a tensor, since schedulers write to it in place.
            "lr": lr if isinstance(lr, Tensor) and lr.is_floating_point() else number,
            "eps": check_number("eps", options["eps"]),
            "maximize": check_flag("maximize", options.get("maximize", False)),
            "weight_decay": check_number("weight_decay", options["weight_decay"]),
        }

    # -- the interface of torch.optim.Optimizer --------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group with its own options, as in torch."""
        # torch raises for anything but a dictionary.
        options = self._check_options({**self.defaults, **param_group}) if isinstance(param_group, dict) else {}
        super().add_param_group(param_group)
        param_group.update(options)
        for parameter in param_group["params"]:
            if is_sharded(parameter):
                self.param_groups.pop()
                raise DtypeError(
                    "params: expected whole Parameters, got the shard of a DTensor; use an optimizer of torch.optim, "
                    "or pass the Parameters to fully_shard as ignored_params"
                )
            if parameter.dtype not in FLOAT_DTYPES or parameter.layout != torch.strided:
                self.param_groups.pop()
                raise DtypeError(
                    f"params: expected dense floating-point Parameters, got {parameter.dtype}, {parameter.layout}; "
                    "use an optimizer of torch.optim for others"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows with a gradient.

        Args:
            closure: Function that computes the gradients and returns the loss.

        Returns:
            The result of ``closure``; None without it.

        Raises:
            ArgumentError: ``lr * weight_decay`` is 1 or more.
            DtypeError: A gradient is neither dense nor row-sparse, or an option has the wrong type.
            ShapeError: A gradient has another shape than its Parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                check_gradient(parameter)
            group.update(self._check_options(group))
            options = group | {"lr": float(group["lr"])}
            if options["lr"] * options["weight_decay"] >= 1:
                raise ArgumentError(
                    f"weight_decay: expected lr * weight_decay below 1, got {options['lr']} * "
                    f"{options['weight_decay']}, which would flip the sign of rows; decrease one of them"
                )
            updates += [(parameter, options) for parameter in parameters]
        owners = [table_of(parameter) for parameter, _ in updates]
        tables = {id(table): table for table in owners if table is not None}
        with ExitStack() as locks:
            for number in sorted(tables):  # All steps take locks in the same order, which prevents a deadlock.
                locks.enter_context(tables[number].access.writing())
            for (parameter, options), table in zip(updates, owners, strict=True):
                self._update(parameter, table, options)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer, as in torch.

        Load the state of the store, too, before the next step. Tensors are copied; moments are stored in float32, or in
        float64 if they are float64. `RowAdam` also loads the state of `torch.optim.SparseAdam` and
        `torch.optim.AdamW`. Options that the loaded state lacks keep the defaults of this optimizer.

        Raises:
            ArgumentError, DtypeError, ShapeError: The state or an option is invalid. Nothing has changed.
        """
        loaded: dict[Tensor, State] = {}

        def convert(_: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
            groups = given["param_groups"]
            if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
                return None  # torch raises an error.
            groups = [group | self._check_options({**self.defaults, **group}) for group in groups]
            others = dict(given["state"])
            for group, own in zip(groups, self.param_groups, strict=True):
                for number, parameter in zip(group["params"], own["params"], strict=True):
                    if number in others:
                        loaded[parameter] = self._convert_state(others.pop(number), parameter, group)
            return {**given, "param_groups": groups, "state": others}

        # torch would cast every tensor to the Parameter's dtype, which rounds moments and counts. The pre-hook runs
        # after all other pre-hooks, which may edit the dictionary. The post-hook runs before all other post-hooks,
        # which may read the loaded state.
        hooks = (
            self.register_load_state_dict_pre_hook(convert),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _convert_state(self, given: State, parameter: Tensor, options: dict[str, Any]) -> State:
        """Copy a loaded state of ``parameter``, in the dtypes that a step needs."""
        moments = self._initial_moments(options)
        moments |= dict.fromkeys(self.optional_moments, 0.0)
        check_state_names(given, moments, self.optional_moments, type(self).__name__)
        shape = parameter.shape
        # The state of a store's rows may have another length: the store may be loaded later, or grow.
        count: int | None = (shape[0] if shape else 1) if table_of(parameter) is None else None
        state: State = {}
        for name, value in given.items():
            label = f"state[{name!r}]"
            if name in ("step", "seed"):
                state[name] = check_whole_state(label, value)
                continue
            if name == "log_decay":
                state[name] = check_log_factor(label, value)
                continue
            if not shape and name in moments:  # Earlier versions saved one entry.
                value = value.squeeze() if isinstance(value, Tensor) and value.shape == (1,) else value
                wanted: tuple[int | None, ...] = ()
            else:
                wanted = (count, *(self._state_shape(shape)[1:] if name in moments else ()))
            if name in ("generation", "born"):
                check_integers(label, value, wanted)
                dtype = torch.int64
            else:
                check_float_tensor(label, value, wanted)
                dtype = torch.float64 if name == "decayed" or value.dtype == torch.float64 else torch.float32
            count = len(value) if wanted else count
            state[name] = torch.empty(value.shape, dtype=dtype, device=parameter.device).copy_(value.detach())
        return state

    # -- a step ----------------------------------------------------------------------------------------------

    def _update(self, parameter: Tensor, table: RowStorage | None, options: dict[str, Any]) -> None:
        """Update the rows of ``parameter`` with a gradient; ``table`` owns them, if any."""
        # Write to a store's rows through .data, so that torch's version counter does not change: a changed counter
        # would mean that any row may have changed, whereas `record_update` records which rows have changed.
        rows = parameter if table is None else parameter.data
        gradient = parameter.grad
        if gradient is None:
            return
        is_scalar = rows.dim() == 0
        if is_scalar:
            rows, gradient = rows.view(1), gradient.view(1)
        state = self._fit_state(parameter, rows, table, options)
        moments = [state[name] for name in self._initial_moments(options)]
        if is_scalar:  # Their shape in the state is that of torch's optimizers.
            moments = [moment.view(1) for moment in moments]
        if is_deferred(rows) and self._has_kernel(rows, moments):
            state["step"] += 1
            try:
                self._run_kernel(rows, gradient, moments, state, table, options)
            finally:
                record_update(parameter, gradient._indices()[0] if gradient.layout == torch.sparse_coo else None)
            return
        slots, gradients, active = select_gradients(gradient, table)
        state["step"] += 1
        if table is not None:
            present = _find_slots(table) if slots is None else slots
            reset_new_rows(state, self._initial_moments(options), present, table.generation.index_select(0, present))
        age = count_row_steps(state, slots)
        size, eps = self._step_size(age, options), self._epsilon(age, slots is None, options)
        factor = advance_decay(state, slots, options, active)
        count = min(self.block_sizes.rows_per_block(rows), len(rows) if slots is None else len(slots))
        dtype = state_dtype(rows.dtype)
        buffers: dict[int, Tensor] = {}
        streams = start_streams(state["seed"], state["step"], rows) if rows.dtype in NOISE_DTYPES else None
        try:
            for part, place in iterate_blocks(slots, table, len(rows), count):
                block = RowBlock(part, count, buffers, None if active is None else active[place])
                part_gradient = gradients[place].to(dtype)
                if options["maximize"]:
                    part_gradient = part_gradient.neg()
                block_eps = _broadcast_to_rows(eps, place, part_gradient) if isinstance(eps, Tensor) else eps
                numerator, denominator = self._update_moments(block, part_gradient, moments, block_eps, options)
                stored = block.take(rows)
                working = stored.to(dtype)  # The same tensor, unless it has half precision.
                if factor is not None:
                    working.mul_(_broadcast_to_rows(factor, place, working))
                if isinstance(size, float):
                    working.addcdiv_(numerator, denominator, value=-size)
                else:  # This order of operations rounds as the line above does.
                    working.addcdiv_(numerator * _broadcast_to_rows(size, place, working), denominator, value=-1)
                if streams is not None:
                    stored.copy_(round_stochastically(working, stored.dtype, draw_noise(streams, part, stored)))
                block.put(rows, stored)
        finally:  # Some rows may have changed before an error, too.
            record_update(parameter, slots)

    def _fit_state(self, parameter: Tensor, rows: Tensor, table: RowStorage | None, options: dict[str, Any]) -> State:
        """Return the state of ``parameter``, resized to its current number of rows."""
        state: State = self.state[parameter]
        count, device, dtype = len(rows), rows.device, state_dtype(rows.dtype)
        initial = self._initial_moments(options)
        state.setdefault("step", 0)
        for name in self.optional_moments:
            if name not in initial:
                state.pop(name, None)
        for name, start in initial.items():
            if name not in state:
                state[name] = torch.full(self._state_shape(parameter.shape), start, dtype=dtype, device=device)
        if rows.dtype in NOISE_DTYPES and "seed" not in state:
            state["seed"] = self._new_seed(parameter)
        if table is not None and "generation" not in state:
            state["generation"] = table.generation.clone()
            state["born"] = torch.zeros(count, dtype=torch.int64, device=device)
        if options["weight_decay"] != 0 and "decayed" not in state:
            state["log_decay"] = 0.0
            state["decayed"] = torch.zeros(count, dtype=torch.float64, device=device)
        # No slot has the generation -1, so a row in a slot that growth has added counts as new.
        fills = initial | {"generation": -1, "born": 0, "decayed": state.get("log_decay", 0.0)}
        for name, fill in fills.items():
            if name not in state:
                continue
            if state[name].dim() > 0 and len(state[name]) != count:
                state[name] = resize_state(state[name], count, fill)
            if name in initial and state[name].dtype != dtype:  # The Parameter has been converted.
                state[name] = state[name].to(dtype)
            if state[name].device != device:
                state[name] = state[name].to(device)
        return state

    def _select_state(self, parameter: Tensor, slots: Tensor) -> State:
        """Copy the state of the rows at ``slots`` of a store's Parameter, in their order."""
        groups = [group for group in self.param_groups if any(own is parameter for own in group["params"])]
        options = groups[0] if groups else self.defaults
        options = options | self._check_options(options)
        state = self._fit_state(parameter, parameter.data, table_of(parameter), options)
        is_tensor = {name: isinstance(value, Tensor) for name, value in state.items()}
        return {name: value.index_select(0, slots) if is_tensor[name] else value for name, value in state.items()}

    def _new_seed(self, parameter: Tensor) -> int:
        """Draw the seed of the stochastic rounding of ``parameter``."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Replicas on all ranks must round equally, but their generators may differ.
            parameters = [other for group in self.param_groups for other in group["params"]]
            return next(place for place, other in enumerate(parameters) if other is parameter)
        return int(torch.randint(2**62, (), device="cpu"))


def _find_slots(table: RowStorage) -> Tensor:
    """Return the live slots; on a GPU also the free slots.

    The host would have to wait for the number of live slots.
    """
    return torch.arange(table.used, device=table.ids.device) if is_deferred(table.ids) else table.live_slots()


def _broadcast_to_rows(numbers: Tensor, place: slice | Tensor, rows: Tensor) -> Tensor:
    """Return the numbers at ``place`` in a shape that broadcasts to ``rows``."""
    return numbers[place].to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))
