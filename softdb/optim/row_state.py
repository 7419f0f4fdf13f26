"""State of row optimizers: resize, check and read it.

The state of a Parameter is a dictionary, which is part of ``state_dict``:

- ``step``: the number of steps of the Parameter.
- A tensor for each moment of the optimizer, with one entry per row.
- ``generation`` (n,), for the rows of a store: for each slot, the generation whose state is kept.
- ``born`` (n,), for the rows of a store: the Parameter's step count before the row's first step.
- ``log_decay``, with weight decay: the logarithm of the product of all decay factors so far.
- ``decayed`` (n,), with weight decay: the value of ``log_decay`` at the row's last step.
- ``seed``, for rows in half precision: the seed of stochastic rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from softdb._checks import INTEGER_DTYPES, check_dense, check_int, check_real, check_shape, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.pending_checks import is_deferred

__all__ = [
    "State",
    "advance_decay",
    "advance_log_decay",
    "check_integers",
    "check_log_factor",
    "check_state_names",
    "check_whole_state",
    "count_row_steps",
    "reset_new_rows",
    "resize_state",
    "state_dtype",
]


State = dict[str, Any]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments of rows in ``dtype``: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def resize_state(tensor: Tensor, count: int, fill: float) -> Tensor:
    """Copy ``tensor`` to a tensor of ``count`` rows; fill new rows with ``fill``."""
    kept = min(len(tensor), count)
    resized = tensor.new_full((count, *tensor.shape[1:]), fill)
    resized[:kept] = tensor[:kept]
    return resized


def count_row_steps(state: State, slots: Tensor | None) -> int | Tensor:
    """Return each row's own step count; an int if all rows have the same."""
    step: int = state["step"]
    if "born" not in state:
        return step
    steps_before: Tensor = state["born"] if slots is None else state["born"].index_select(0, slots)
    if len(steps_before) == 0:
        return step
    if is_deferred(steps_before):  # To compare them would wait for the device.
        return step - steps_before
    lowest, highest = (int(number) for number in steps_before.aminmax())
    return step - lowest if lowest == highest else step - steps_before


def reset_new_rows(state: State, moments: Mapping[str, float], slots: Tensor, generation: Tensor) -> None:
    """Reset the state of the rows at ``slots`` whose generation has changed.

    Args:
        state: The state of a Parameter of a store, in its present step.
        moments: The initial value of each moment, by name.
        slots: Slots of rows, (m,). On a GPU they may contain duplicates.
        generation: Generations of the rows of the store, (m,).
    """
    new = state["generation"].index_select(0, slots) != generation
    starts = {**moments, "born": state["step"] - 1}
    if "decayed" in state:
        starts["decayed"] = state["log_decay"]
    if is_deferred(new):  # The host would have to wait for the number of new rows.
        for name, start in starts.items():
            rows = state[name].index_select(0, slots)
            state[name].index_copy_(0, slots, rows.masked_fill_(new.view(-1, *[1] * (rows.dim() - 1)), start))
        state["generation"].index_copy_(0, slots, generation)
    elif bool(new.any()):
        slots = slots[new]
        for name, start in starts.items():
            state[name].index_fill_(0, slots, start)
        state["generation"].index_copy_(0, slots, generation[new])


def advance_log_decay(state: State, options: dict[str, Any]) -> None:
    """Add the weight decay of a step to that of all steps."""
    if "decayed" in state:
        state["log_decay"] += math.log1p(-options["lr"] * options["weight_decay"])


def advance_decay(
    state: State, slots: Tensor | None, options: dict[str, Any], active: Tensor | None = None
) -> Tensor | None:
    """Return the decay factor of each row since its last step; record it as applied.

    The factor includes the decay of this step. Without weight decay it is None. Only that of ``active`` rows is
    recorded, or of all rows if it is None.
    """
    if "decayed" not in state:
        return None
    advance_log_decay(state, options)
    last_log_decay: Tensor = state["decayed"]
    before = last_log_decay if slots is None else last_log_decay.index_select(0, slots)
    factor: Tensor = (state["log_decay"] - before).exp_()
    if active is not None:
        after = before.masked_fill(active, state["log_decay"])
        if slots is None:
            last_log_decay.copy_(after)
        else:
            last_log_decay.index_copy_(0, slots, after)
    elif slots is None:
        last_log_decay.fill_(state["log_decay"])
    else:
        last_log_decay.index_fill_(0, slots, state["log_decay"])
    return factor


# -- checks of a loaded state ----------------------------------------------------------------------------


def check_state_names(given: State, moments: Iterable[str], optional: Sequence[str], optimizer: str) -> None:
    """Raise unless ``given`` has the entries of a state of ``optimizer``.

    Args:
        given: The state.
        moments: Names of the moments.
        optional: Names of moments that may be missing.
        optimizer: Name of the class, for the message.
    """
    required = [name for name in moments if name not in optional]
    groups = ("step", *required), ("generation", "born"), ("log_decay", "decayed"), ("seed",), *zip(optional)
    known = [name for names in groups for name in names]
    for name in given:
        if name not in known:
            expected = ", ".join(map(repr, known))
            raise ArgumentError(f"state: expected the entries {expected}, got {name!r}; load a state of {optimizer}")
    for names in groups:
        missing = [name for name in names if name not in given]
        if given and missing and ("step" in names or len(missing) < len(names)):
            raise ArgumentError(
                f"state: expected all of {', '.join(map(repr, names))}, got none named {missing[0]!r}; load a complete "
                "state"
            )


def check_whole_state(name: str, value: object) -> int:
    """Convert ``value``, an int or a whole float of at least 0, to an int."""
    with suppress(DtypeError):
        return check_int(name, value, least=0)
    number = check_real(name, value)
    if not 0 <= number < 2**63 or not number.is_integer():
        raise ArgumentError(f"{name}: expected a whole number of at least 0, got {number}")
    return int(number)


def check_log_factor(name: str, value: object) -> float:
    """Check that ``value`` is the logarithm of a factor above 0 and at most 1."""
    number = check_real(name, value)
    if not -math.inf < number <= 0:
        raise ArgumentError(f"{name}: expected a finite number of at most 0, got {number}")
    return number


def check_integers(name: str, value: object, shape: Sequence[int | None]) -> None:
    """Raise unless ``value`` is an integer tensor of ``shape``."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name}: expected an integer tensor, got {describe(value)}")
    if value.dtype not in INTEGER_DTYPES:
        raise DtypeError(f"{name}: expected an integer tensor, got {value.dtype}")
    check_dense(name, value)
    check_shape(name, value, shape)
