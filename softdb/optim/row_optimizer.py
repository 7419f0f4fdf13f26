"""The step that all optimisers of rows share: of the rows that a gradient names, and of no others."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from softdb._checks import (
    FLOATS,
    INTEGERS,
    check_dense,
    check_float_tensor,
    check_number,
    check_real,
    check_shape,
    check_whole,
    describe,
)
from softdb.errors import ArgumentError, DtypeError
from softdb.optim.gradients import check_gradient
from softdb.scoring.gumbel import splitmix64
from softdb.table.gradients import coalesced, is_sharded
from softdb.table.hooks import note_move, of
from softdb.table.storage import RowStorage

__all__ = ["RowOptimizer"]


# As many numbers of a table are worked on at a time. On a CPU they stay in its cache, and are enough for two threads.
CHUNK, CHUNK_ELSEWHERE = 2**16, 2**24


NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


# Half precision is rounded at random: bfloat16 drops 16 bits of a float32, float16 up to 24 that count.
NOISE_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int32}


State = dict[str, Any]


class RowOptimizer(Optimizer):
    """What optimisers of rows share: which rows a step moves, and what is remembered of each.

    State of a Parameter: ``step``, the number of its steps; a tensor for each name of `_initial`; for a store's also
    ``generation`` (n,), which row of each slot is known, and ``born`` (n,), the step after which it began; once there
    was weight decay also ``log_decay``, the logarithm of the product of all factors so far, and ``decayed`` (n,), what
    that was when each row was last moved; for rows of half precision also ``seed``, which its noise is drawn by.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, self._checked_options(defaults))

    # -- what an optimiser adds ------------------------------------------------------------------------------

    @abstractmethod
    def _initial(self, options: dict[str, Any]) -> dict[str, float]:
        """What is remembered of every row, and what a new row begins with."""

    @abstractmethod
    def _state_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of each of them, for a Parameter of ``shape``."""

    @abstractmethod
    def _step_size(self, age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
        """By what a step is multiplied when a row takes its ``age``-th."""

    @abstractmethod
    def _direction(
        self, block: Rows, gradient: Tensor, moments: list[Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Remember the gradient of a block of rows; where to move them, as numerator and denominator."""

    def _checked_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a group as plain numbers; raise unless they are in range."""
        lr = options["lr"]
        number = check_number("lr", lr)
        return {
            # Schedulers write into a tensor, and the group has to keep it.
            "lr": lr if isinstance(lr, Tensor) and lr.is_floating_point() else number,
            "eps": check_number("eps", options["eps"]),
            "weight_decay": check_number("weight_decay", options["weight_decay"]),
        }

    # -- as every optimiser ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of Parameters with options of its own, as in torch."""
        # torch refuses what is no dictionary.
        options = self._checked_options({**self.defaults, **param_group}) if isinstance(param_group, dict) else {}
        super().add_param_group(param_group)
        param_group.update(options)
        for parameter in param_group["params"]:
            if is_sharded(parameter):
                self.param_groups.pop()
                raise DtypeError(
                    "params: expected whole Parameters, got the shard of a DTensor; take an optimiser of torch, or "
                    "pass the rows to fully_shard as ignored_params"
                )
            if parameter.dtype not in FLOATS or parameter.layout != torch.strided:
                self.param_groups.pop()
                raise DtypeError(
                    f"params: expected dense floating-point Parameters, got {parameter.dtype}, {parameter.layout}; "
                    "give others to an optimiser of torch"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the rows that the gradients name.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            ArgumentError: ``lr * weight_decay`` is 1 or more.
            DtypeError, ShapeError: A gradient is neither dense nor row-sparse, or has another shape than its Parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due: list[tuple[Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                check_gradient(parameter)
            group.update(self._checked_options(group))
            options = group | {"lr": float(group["lr"])}
            if options["lr"] * options["weight_decay"] >= 1:
                raise ArgumentError(
                    f"weight_decay: expected lr * weight_decay below 1, got {options['lr']} * "
                    f"{options['weight_decay']}, which turns rows around; lower one of them"
                )
            due += [(parameter, options) for parameter in parameters]
        tables = {id(table): table for parameter, _ in due if (table := of(parameter)) is not None}
        with ExitStack() as held:
            for number in sorted(tables):  # so that two of these never wait for each other
                held.enter_context(tables[number].access.writing())
            for parameter, options in due:
                self._update(parameter, options)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, as in torch; load the store before the next step.

        Tensors are copied. Moments of any floating dtype keep their values, in at least float32. State of
        `torch.optim.SparseAdam` or `torch.optim.AdamW` is a state of `RowAdam`; options that it lacks keep this
        optimiser's defaults.

        Raises:
            ArgumentError, DtypeError, ShapeError: The state or an option does not fit; nothing has changed.
        """
        loaded: dict[Tensor, State] = {}

        def convert(_: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
            groups = given["param_groups"]
            if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
                return None  # which torch refuses
            groups = [group | self._checked_options({**self.defaults, **group}) for group in groups]
            others = dict(given["state"])
            for group, own in zip(groups, self.param_groups, strict=True):
                for number, parameter in zip(group["params"], own["params"], strict=True):
                    if number in others:
                        loaded[parameter] = self._converted_state(others.pop(number), parameter, group)
            return {**given, "param_groups": groups, "state": others}

        # torch would cast every tensor to the Parameter's dtype, which rounds moments and counts. The first hook runs
        # after all other hooks that edit the dictionary, the second before all that look at the loaded state.
        hooks = (
            self.register_load_state_dict_pre_hook(convert),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _converted_state(self, given: State, parameter: Tensor, options: dict[str, Any]) -> State:
        """Copy the state of ``parameter`` that ``given`` holds, in the types that a step continues from."""
        moments = self._initial(options)
        groups = ("step", *moments), ("generation", "born"), ("log_decay", "decayed"), ("seed",)
        known = [name for names in groups for name in names]
        for name in given:
            if name not in known:
                expected = ", ".join(map(repr, known))
                raise ArgumentError(
                    f"state: expected the names {expected}, got {name!r}; load the state of a {type(self).__name__}"
                )
        for names in groups:
            missing = [name for name in names if name not in given]
            if given and missing and ("step" in names or len(missing) < len(names)):
                raise ArgumentError(
                    f"state: expected {', '.join(map(repr, names))} together, {missing[0]!r} is missing; "
                    "load a complete state"
                )
        shape = parameter.shape or torch.Size([1])
        # State of a store's rows may be longer or shorter: the store is loaded, or grows, later.
        count: int | None = shape[0] if of(parameter) is None else None
        state: State = {}
        for name, value in given.items():
            label = f"state[{name!r}]"
            if name in ("step", "seed"):
                state[name] = check_whole_state(label, value)
                continue
            if name == "log_decay":
                state[name] = _check_log(label, value)
                continue
            wanted = (count, *(self._state_shape(shape)[1:] if name in moments else ()))
            if name in ("generation", "born"):
                _check_integers(label, value, wanted)
                dtype = torch.int64
            else:
                check_float_tensor(label, value, wanted)
                dtype = torch.float64 if name == "decayed" or value.dtype == torch.float64 else torch.float32
            count = len(value)
            state[name] = _filled(value.shape, 0, dtype, parameter.device).copy_(value.detach())
        return state

    # -- a step ----------------------------------------------------------------------------------------------

    def _update(self, parameter: Tensor, options: dict[str, Any]) -> None:
        table = of(parameter)
        # torch need not count a write to a store's rows: the hooks of `rows` note which rows moved, where a count
        # would say that any may have.
        rows = parameter if table is None else parameter.data
        gradient = parameter.grad
        if gradient is None:
            return
        if rows.dim() == 0:
            rows, gradient = rows.view(1), gradient.view(1)
        state = self._fitted_state(parameter, rows, table, options)
        slots: Tensor | None = None  # None: every row
        values = gradient
        if gradient.layout == torch.sparse_coo:
            gradient = coalesced(gradient)
            slots, values = gradient._indices()[0], gradient._values()
            if table is not None:
                live = table.ids.index_select(0, slots) >= 0
                if not bool(live.all()):
                    slots, values = slots[live], values[live]
        state["step"] += 1
        if table is not None:
            self._welcome(state, table, table.live_slots() if slots is None else slots, options)
        size = self._step_size(_ages(state, slots), options)
        factor = _decay(state, slots, options)

        moments = [state[name] for name in self._initial(options)]
        count = max(1, (CHUNK if rows.device.type == "cpu" else CHUNK_ELSEWHERE) // max(1, rows[:1].numel()))
        count = min(count, len(rows) if slots is None else len(slots))
        dtype = _state_dtype(rows.dtype)
        buffers: dict[int, Tensor] = {}
        streams = _random_streams(state, rows) if rows.dtype in NOISE_DTYPES else None
        try:
            for part, place in _parts(slots, table, len(rows), count):
                block = Rows(part, count, buffers)
                numerator, denominator = self._direction(block, values[place].to(dtype), moments, options)
                stored = block.take(rows)
                working = stored.to(dtype)  # itself, unless it is of low precision
                if factor is not None:
                    working.mul_(_column(factor, place, working))
                if isinstance(size, float):
                    working.addcdiv_(numerator, denominator, value=-size)
                else:  # rounded as the line above would
                    working.addcdiv_(numerator * _column(size, place, working), denominator, value=-1)
                if streams is not None:
                    stored.copy_(_round_at_random(working, stored.dtype, _noise(streams, part, stored)))
                block.put(rows, stored)
        finally:  # whatever happens: some rows may have moved
            note_move(parameter, slots)

    def _fitted_state(
        self, parameter: Tensor, rows: Tensor, table: RowStorage | None, options: dict[str, Any]
    ) -> State:
        """What is remembered of ``parameter``, for as many rows as it now has."""
        state: State = self.state[parameter]
        count, device, dtype = len(rows), rows.device, _state_dtype(rows.dtype)
        initial = self._initial(options)
        state.setdefault("step", 0)
        for name, start in initial.items():
            if name not in state:
                state[name] = _filled(self._state_shape(rows.shape), start, dtype, device)
        if rows.dtype in NOISE_DTYPES and "seed" not in state:
            state["seed"] = self._new_seed(parameter)
        if table is not None and "generation" not in state:
            state["generation"] = table.generation.clone()
            state["born"] = torch.zeros(count, dtype=torch.int64, device=device)
        if options["weight_decay"] != 0 and "decayed" not in state:
            state["log_decay"] = 0.0
            state["decayed"] = torch.zeros(count, dtype=torch.float64, device=device)
        # No row has been in a slot -1 times, so that one that comes into the new slots is not known.
        fills = initial | {"generation": -1, "born": 0, "decayed": state.get("log_decay", 0.0)}
        for name, fill in fills.items():
            if name not in state:
                continue
            if len(state[name]) != count:
                state[name] = _resized(state[name], count, fill)
            if name in initial and state[name].dtype != dtype:  # the Parameter was converted
                state[name] = state[name].to(dtype)
            if state[name].device != device:
                state[name] = state[name].to(device)
        return state

    def _new_seed(self, parameter: Tensor) -> int:
        """Draw the seed of the noise that rounds ``parameter``."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Replicas on several ranks must round alike, and their generators may differ.
            every = [other for group in self.param_groups for other in group["params"]]
            return next(place for place, other in enumerate(every) if other is parameter)
        return int(torch.randint(2**62, (), device="cpu"))

    def _welcome(self, state: State, table: RowStorage, slots: Tensor, options: dict[str, Any]) -> None:
        """Start those of the rows at ``slots`` afresh that are not the ones known."""
        generation = table.generation.index_select(0, slots)
        new = state["generation"].index_select(0, slots) != generation
        if not bool(new.any()):
            return
        slots = slots[new]
        for name, start in self._initial(options).items():
            state[name].index_fill_(0, slots, start)
        state["generation"].index_copy_(0, slots, generation[new])
        state["born"].index_fill_(0, slots, state["step"] - 1)
        if "decayed" in state:
            state["decayed"].index_fill_(0, slots, state["log_decay"])


def check_whole_state(name: str, value: object) -> int:
    """Return ``value`` as an int that is at least 0; it may be a float, as other optimisers keep their step."""
    with suppress(DtypeError):
        return check_whole(name, value, least=0)
    number = check_real(name, value)
    if not 0 <= number < 2**63 or not number.is_integer():
        raise ArgumentError(f"{name}: expected a whole number of at least 0, got {number}")
    return int(number)


def _check_log(name: str, value: object) -> float:
    """Return ``value`` as the logarithm of a factor that is above 0 and at most 1."""
    number = check_real(name, value)
    if not -math.inf < number <= 0:
        raise ArgumentError(f"{name}: expected a finite number of at most 0, got {number}")
    return number


def _check_integers(name: str, value: object, shape: Sequence[int | None]) -> None:
    """Raise unless ``value`` is an integer tensor of ``shape``."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name}: expected an integer tensor, got {describe(value)}")
    if value.dtype not in INTEGERS:
        raise DtypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    check_dense(name, value)
    check_shape(name, value, shape)


def _parts(
    slots: Tensor | None, table: RowStorage | None, length: int, count: int
) -> Iterator[tuple[slice | Tensor, slice | Tensor]]:
    """The rows to move, ``count`` at a time: where they lie in the Parameter, and where in what belongs to the step."""
    if slots is not None:
        for first in range(0, len(slots), max(1, count)):
            place = slice(first, first + count)
            yield slots[place], place
        return
    live = None if table is None else table.live()
    used = length if table is None else table.used
    for first in range(0, used, max(1, count)):
        block = slice(first, min(first + count, used))
        if live is None or bool(live[block].all()):
            yield block, block
        else:
            some = live[block].nonzero().squeeze(-1) + first
            yield some, some


class Rows:
    """Some rows, which are taken out of tables to be worked on, and put back.

    Put back a table's rows before the next table's are taken: their memory is at hand as long as little else is used.
    """

    def __init__(self, part: slice | Tensor, count: int, buffers: dict[int, Tensor]) -> None:
        self._part = part
        self._count = count
        # By table. Each block uses the same, since new memory would first have to be mapped.
        self._buffers = buffers

    def take(self, table: Tensor) -> Tensor:
        """The rows themselves where they lie together, else a copy of them."""
        if isinstance(self._part, slice):
            return table[self._part]
        return torch.index_select(table, 0, self._part, out=self._buffer(id(table), table, len(self._part)))

    def put(self, table: Tensor, rows: Tensor) -> None:
        """Write the rows that were taken from ``table``."""
        if not isinstance(self._part, slice):
            table.index_copy_(0, self._part, rows)

    def spare(self, rows: Tensor) -> Tensor:
        """Memory to work in, as large as ``rows``, which were taken and put back: theirs, where they are a copy."""
        return self._buffer(0, rows, len(rows)) if isinstance(self._part, slice) else rows

    def _buffer(self, key: int, like: Tensor, length: int) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(self._count, *like.shape[1:])
        return self._buffers[key][:length]


def _ages(state: State, slots: Tensor | None) -> int | Tensor:
    """Which step of its life each row takes: one number where all are equally old."""
    step: int = state["step"]
    if "born" not in state:
        return step
    born = state["born"] if slots is None else state["born"].index_select(0, slots)
    if len(born) == 0:
        return step
    lowest, highest = (int(number) for number in born.aminmax())
    return step - lowest if lowest == highest else step - born


def _decay(state: State, slots: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """By what each row is multiplied to make up for the decay since it last moved, this step's included."""
    if "decayed" not in state:
        return None
    state["log_decay"] += math.log1p(-options["lr"] * options["weight_decay"])
    decayed: Tensor = state["decayed"]
    before = decayed if slots is None else decayed.index_select(0, slots)
    factor: Tensor = (state["log_decay"] - before).exp_()
    if slots is None:
        decayed.fill_(state["log_decay"])
    else:
        decayed.index_fill_(0, slots, state["log_decay"])
    return factor


def _random_streams(state: State, rows: Tensor) -> Tensor:
    """Start a random stream for this step and each column of ``rows``; a number serves as many columns as it holds."""
    key = int(splitmix64(state["seed"], torch.tensor(state["step"], device="cpu")))
    columns_per_number = 64 // torch.iinfo(NOISE_DTYPES[rows.dtype]).bits
    streams = -(-math.prod(rows.shape[1:]) // columns_per_number)
    return splitmix64(key, torch.arange(streams, device=rows.device))


def _noise(streams: Tensor, part: slice | Tensor, rows: Tensor) -> Tensor:
    """Draw a random integer for each entry of ``rows``, which lie at ``part``, by its row and column alone."""
    slots = torch.arange(part.start, part.stop, device=rows.device) if isinstance(part, slice) else part
    numbers = splitmix64(streams, slots.unsqueeze(-1)).view(NOISE_DTYPES[rows.dtype])
    return numbers[:, : math.prod(rows.shape[1:])].reshape(rows.shape)


def _round_at_random(numbers: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 numbers to one of the two nearest of ``dtype``, with odds that keep their mean; in float32."""
    largest = torch.finfo(dtype).max
    within = numbers.clamp(-largest, largest)
    bits = within.view(torch.int32)
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32. Random bits in the lower half carry over with the right odds.
        bits = bits.add(noise).add_(2**15).bitwise_and_(-(2**16))
        rounded = bits.view(torch.float32)
    else:
        # Neighbours in float16 are 2^-10 of the number's power of two apart, at least 2^-24: all steps are exact.
        spacing = bits.bitwise_and(0xFF << 23).clamp_(min=(127 - 14) << 23).sub_(10 << 23).view(torch.float32)
        odds = within.abs().div_(spacing)
        rounded = odds.floor()
        odds -= rounded
        uniform = noise.bitwise_and(2**24 - 1).to(torch.float32).mul_(2.0**-24)
        rounded.add_(uniform < odds).mul_(spacing).copysign_(within)
    # What lies beyond the largest number, is infinite or NaN is left to the conversion. The difference is 0 elsewhere,
    # and subtracted, since adding it would turn -0 into 0.
    return rounded.sub_(within.sub_(numbers))


def _column(numbers: Tensor, place: slice | Tensor, rows: Tensor) -> Tensor:
    """One number for each of ``rows``, shaped to multiply them."""
    return numbers[place].to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))


def _filled(shape: Iterable[int], fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor full of ``fill``."""
    if device.type != "cpu" or dtype not in NUMPY_DTYPES:
        return torch.full(tuple(shape), fill, dtype=dtype, device=device)
    # numpy asks Linux for huge pages, torch does not: a step in rows all over a large table is then a tenth faster.
    tensor = torch.from_numpy(np.zeros(tuple(shape), dtype=NUMPY_DTYPES[dtype]))
    return tensor if fill == 0 else tensor.fill_(fill)


def _resized(tensor: Tensor, count: int, fill: float) -> Tensor:
    """A copy of ``tensor`` for ``count`` rows: cut, or filled up."""
    kept = min(len(tensor), count)
    larger = _filled((count, *tensor.shape[1:]), fill, tensor.dtype, tensor.device)
    larger[:kept] = tensor[:kept]
    return larger


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
