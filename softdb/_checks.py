"""Checks of arguments: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdb.errors import ArgumentError, DeviceError, DtypeError, DuplicateIdError, NonFiniteError, ShapeError

__all__ = [
    "FLOATS",
    "FLOAT_NAMES",
    "INTEGERS",
    "broadcasts",
    "check_above_zero",
    "check_choice",
    "check_dense",
    "check_device",
    "check_dtype",
    "check_finite",
    "check_float_tensor",
    "check_ids",
    "check_not_meta",
    "check_number",
    "check_positive",
    "check_real",
    "check_shape",
    "check_temperature",
    "check_unique",
    "check_vector",
    "check_whole",
    "describe",
    "is_finite",
    "is_out_of_memory",
    "list_ids",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


FLOAT_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's error, a device's, or torch's RuntimeError of the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _as_scalar(value: object) -> object:
    """Convert a 0-d NumPy array, or a tensor of one element, to the Python number that it holds."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad and not value.is_meta:
        return value.item()
    return value


def check_whole(name: str, value: object, *, least: int = 1) -> int:
    """Convert any integer (Python's, NumPy's, a 0-d array or tensor) to an int of at least ``least``."""
    value = _as_scalar(value)
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise DtypeError(f"{name}: expected an integer, got {describe(value)}")
    if number < least:
        raise ArgumentError(f"{name}: expected an integer of at least {least}, got {_printed(number)}")
    if number >= 2**63:
        raise ArgumentError(f"{name}: expected an integer that int64 holds, got {_printed(number)}")
    return number


def check_positive(name: str, value: object) -> int:
    """Convert any integer to an int of at least 1."""
    return check_whole(name, value)


def check_real(name: str, value: object) -> float:
    """Convert any real number (Python's, NumPy's, a 0-d array or tensor) to a float, which may be NaN or infinite."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise DtypeError(f"{name}: expected a number, got a tensor that requires grad; pass it detached")
    value = _as_scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DtypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:  # of an int or a Fraction beyond every float
        return -math.inf if value < 0 else math.inf


def check_number(name: str, value: object, *, below: float = math.inf) -> float:
    """Convert any real number to a float that is at least 0 and under ``below``."""
    number = check_real(name, value)
    if not 0 <= number < below:
        wanted = "a finite number of at least 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ArgumentError(f"{name}: expected {wanted}, got {number}")
    return number


def check_above_zero(name: str, value: object, *, most: float = sys.float_info.max) -> float:
    """Convert any real number to a float that is above 0 and at most ``most``."""
    number = check_real(name, value)
    if not 0 < number <= most:
        wanted = "a finite number above 0" if most == sys.float_info.max else f"a number above 0 and at most {most:g}"
        raise ArgumentError(f"{name}: expected {wanted}, got {_printed(value)}")
    return number


def _printed(number: object) -> str:
    """Print a number for a message."""
    try:
        return str(number)
    except ValueError:  # Python prints no int of more than 4,300 digits
        return "a number with too many digits to print"


def check_float_tensor(
    name: str, value: object, shape: Sequence[int | None], device: torch.device | None = None
) -> Tensor:
    """``value`` if it is a floating tensor of ``shape``, as in `check_shape`."""
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"{name}: expected a floating-point torch.Tensor, got {describe(value)}; convert it with torch.as_tensor"
        )
    if value.dtype not in FLOATS:
        wanted = f"one of {FLOAT_NAMES}" if value.is_floating_point() else "a floating-point tensor"
        raise DtypeError(f"{name}: expected {wanted}, got {value.dtype}; convert it with .float()")
    check_dense(name, value)
    check_shape(name, value, shape)
    if device is not None:
        check_device(name, value, device)
    return value


def check_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is one that keys, values and queries may have, or None for torch's default."""
    if dtype is not None and dtype not in FLOATS:
        raise DtypeError(f"dtype: expected one of {FLOAT_NAMES}, got {describe(dtype)}")


def check_dense(name: str, value: Tensor) -> None:
    """Raise if ``value`` is sparse or of another layout that is not every operation's."""
    if value.layout != torch.strided:
        raise DtypeError(f"{name}: expected a dense tensor, got {value.layout}; convert it with .to_dense()")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless ``value`` lies on ``device``."""
    if value.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, got one on {value.device}; move it with .to()")


def check_not_meta(name: str, tensor: Tensor, fill: str = "reset_parameters() or load_state_dict()") -> None:
    """Raise if ``tensor``, which the module ``name`` holds, lies on the meta device; ``fill`` gives it numbers."""
    if tensor.is_meta:
        raise DeviceError(
            f"{name}: expected tensors that hold numbers, got tensors on meta, which hold none; call "
            f"{name}.to_empty(device=...) and then {fill}, or load_state_dict(..., assign=True) at once"
        )


def check_shape(name: str, value: Tensor, shape: Sequence[int | None]) -> None:
    """Raise unless ``value`` has ``shape``, in which None is any size and a leading -1 any number of dimensions."""
    leading = bool(shape) and shape[0] == -1
    wanted = shape[1:] if leading else shape
    found = value.shape
    missing = len(wanted) - len(found)
    if missing == 0 or (leading and missing < 0):
        for want, have in zip(wanted, found[-missing:] if missing else found, strict=True):
            if want is not None and want != have:
                break
        else:
            return
    sizes = ["..."] * leading + ["any" if want is None else str(want) for want in wanted]
    raise ShapeError(f"{name}: expected shape ({', '.join(sizes)}{',' * (len(sizes) == 1)}), got {tuple(found)}")


def is_finite(value: Tensor) -> bool:
    """Whether no entry of ``value`` is NaN or infinite, in one pass that allocates nothing."""
    # A sum is finite when every term is; when it is not, the terms may merely have overflowed together.
    return math.isfinite(value.detach().sum().item()) or bool(torch.isfinite(value).all())


def check_finite(name: str, value: Tensor) -> None:
    """Raise if an entry of ``value`` is NaN or infinite."""
    if not is_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise NonFiniteError(
            f"{name}: expected finite numbers in {value.dtype}, got {bad} that are NaN or infinite; "
            "remove or rescale these rows"
        )


def check_ids(name: str, value: object, *, repeats: bool = False, padding: bool = False) -> Tensor:
    """``value`` as int64 ids on the CPU, in its own shape.

    ``repeats`` allows an id twice; ``padding`` allows -1.
    """
    if isinstance(value, Tensor):
        ids = value.detach()
    else:
        if isinstance(value, (list, tuple)) and any(isinstance(number, bool) for number in value):
            raise DtypeError(f"{name}: expected int64 ids, got torch.bool among them; ids are whole numbers")
        try:
            ids = torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise DtypeError(f"{name}: expected int64 ids, got {describe(value)}") from error
        if ids.numel() == 0:
            ids = ids.to(torch.int64)
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise DtypeError(f"{name}: expected int64 ids, got {ids.dtype}; ids are whole numbers")
    check_dense(name, ids)
    if ids.is_meta:
        raise DeviceError(f"{name}: expected ids that can be read, got a tensor on meta, which holds none")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if ids.numel():
        lowest = int(ids.min())
        if lowest < (-1 if padding else 0):
            wanted = "of at least 0, or -1 for padding" if padding else "of at least 0"
            raise ArgumentError(f"{name}: expected ids {wanted}, got {lowest}")
    if not repeats:
        check_vector(name, ids)
        check_unique(name, ids)
    return ids


def check_vector(name: str, ids: Tensor) -> None:
    """Raise unless ``ids`` has one dimension."""
    if ids.dim() != 1:
        raise ShapeError(f"{name}: expected a 1-dimensional list of ids, got shape {tuple(ids.shape)}")


def check_unique(name: str, ids: Tensor) -> None:
    """Raise if an id occurs twice."""
    ordered = ids.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DuplicateIdError(f"{name}: expected each id once, got {list_ids(twice.unique())} more than once")


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` broadcasts to ``target`` without widening it."""
    try:
        return tuple(torch.broadcast_shapes(tuple(shape), tuple(target))) == tuple(target)
    except RuntimeError:
        return False


def check_temperature(
    value: float | Tensor, shape: Sequence[int], device: torch.device | None = None
) -> float | Tensor:
    """Convert a positive finite number to a float; a floating tensor of them on ``device`` broadcasts to ``shape``."""
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.dtype in INTEGERS):
        return check_above_zero("temperature", value)
    if value.dtype not in FLOATS:
        raise DtypeError(f"temperature: expected a number or a floating-point tensor, got {describe(value)}")
    check_dense("temperature", value)
    if device is not None:
        check_device("temperature", value, device)
    if not broadcasts(value.shape, shape):
        raise ShapeError(
            f"temperature: expected a scalar or a tensor broadcastable to the query's leading shape "
            f"{tuple(shape)}, got shape {tuple(value.shape)}"
        )
    if not bool(((value > 0) & (value < math.inf)).all()):
        raise ArgumentError("temperature: expected finite numbers above 0, got a tensor with others")
    return value


def list_ids(ids: Tensor) -> str:
    """A few of ``ids``, for a message."""
    shown = ", ".join(str(number) for number in ids[:5].tolist())
    return shown if len(ids) <= 5 else f"{shown} and {len(ids) - 5} more"


def describe(value: Any) -> str:
    """What ``value`` is, for a message."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = repr(value) if not isinstance(value, int) else _printed(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else f"a {type(value).__name__}"
