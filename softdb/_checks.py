"""Checks of arguments. Errors name the argument, the expected and the given value."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softdb.errors import ArgumentError, DeviceError, DtypeError, DuplicateIdError, NonFiniteError, ShapeError
from softdb.pending_checks import PendingChecks, is_deferred

__all__ = [
    "FLOAT_DTYPES",
    "FLOAT_DTYPE_NAMES",
    "INTEGER_DTYPES",
    "Ids",
    "check_above_zero",
    "check_choice",
    "check_dense",
    "check_device",
    "check_dtype",
    "check_finite",
    "check_flag",
    "check_float_tensor",
    "check_ids",
    "check_int",
    "check_keywords",
    "check_not_meta",
    "check_number",
    "check_placement",
    "check_positive",
    "check_real",
    "check_shape",
    "check_temperature",
    "check_unique",
    "check_vector",
    "convert_ids",
    "describe",
    "is_broadcastable",
    "is_finite",
    "is_out_of_memory",
    "list_ids",
    "refuse_unknown_keywords",
]

T = TypeVar("T")
# Ids in a tensor, an array, a list (which may be nested), or one id.
Ids = Tensor | npt.NDArray[Any] | Sequence[Any] | int

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


FLOAT_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch or a device means lack of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "out of memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: object) -> bool:
    """Convert a bool of Python or NumPy to a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise DtypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def _as_scalar(value: object) -> object:
    """Convert a 0-d NumPy array or a tensor with one element to a Python number."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad and not value.is_meta:
        return value.item()
    return value


def check_int(name: str, value: object, *, least: int = 1) -> int:
    """Convert an integer to an int of at least ``least``.

    Integers of Python and NumPy, and 0-d arrays and tensors of integers are accepted.
    """
    value = _as_scalar(value)
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise DtypeError(f"{name}: expected an integer, got {describe(value)}")
    if number < least:
        raise ArgumentError(f"{name}: expected an integer of at least {least}, got {_format_number(number)}")
    if number >= 2**63:
        raise ArgumentError(f"{name}: expected an integer of at most {2**63 - 1}, got {_format_number(number)}")
    return number


def check_positive(name: str, value: object) -> int:
    """Convert any integer to an int of at least 1."""
    return check_int(name, value)


def check_real(name: str, value: object) -> float:
    """Convert a real number to a float, which may be NaN or infinite.

    Numbers of Python and NumPy, and 0-d arrays and tensors are accepted.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise DtypeError(f"{name}: expected a number, got a tensor that requires grad; pass tensor.detach()")
    value = _as_scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DtypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        return float(value)
    except OverflowError:  # An int or a Fraction may exceed the largest float.
        return -math.inf if value < 0 else math.inf


def check_number(name: str, value: object, *, below: float = math.inf) -> float:
    """Convert a real number to a float in [0, ``below``)."""
    number = check_real(name, value)
    if not 0 <= number < below:
        wanted = "a finite number of at least 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ArgumentError(f"{name}: expected {wanted}, got {number}")
    return number


def check_above_zero(name: str, value: object, *, most: float = sys.float_info.max) -> float:
    """Convert a real number to a float in (0, ``most``]."""
    number = check_real(name, value)
    if not 0 < number <= most:
        wanted = "a finite number above 0" if most == sys.float_info.max else f"a number above 0 and at most {most:g}"
        raise ArgumentError(f"{name}: expected {wanted}, got {_format_number(value)}")
    return number


def _format_number(number: object) -> str:
    """Format a number for a message."""
    try:
        return str(number)
    except ValueError:  # Python refuses to print an int of more than 4,300 digits.
        return "a number with too many digits to print"


def check_float_tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    device: torch.device | None = None,
    *,
    for_integers: str = "",
) -> Tensor:
    """Return ``value``; raise unless it is a floating-point tensor of ``shape``.

    Args:
        name: Name of the argument.
        value: The argument.
        shape: As in `check_shape`.
        device: Device that the tensor must be on; None for any device.
        for_integers: Alternative to a conversion of integers, for the message.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"{name}: expected a floating-point torch.Tensor, got {describe(value)}; convert it with torch.as_tensor"
        )
    if value.dtype not in FLOAT_DTYPES:
        wanted = f"one of {FLOAT_DTYPE_NAMES}" if value.is_floating_point() else "a floating-point tensor"
        otherwise = for_integers if value.dtype in INTEGER_DTYPES else ""
        raise DtypeError(f"{name}: expected {wanted}, got {value.dtype}; convert it with .float(){otherwise}")
    check_dense(name, value)
    check_shape(name, value, shape)
    if device is not None:
        check_device(name, value, device)
    return value


def check_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None, or a dtype that keys and values may have."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise DtypeError(f"dtype: expected one of {FLOAT_DTYPE_NAMES}, got {describe(dtype)}")


def check_placement(device: torch.device | str | None) -> torch.device:
    """Return the device, or torch's default; raise if it is not available."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise DeviceError(f"device: expected an available device, got {device!r}: {error}") from error


def check_dense(name: str, value: Tensor) -> None:
    """Raise unless ``value`` has the strided layout."""
    if value.layout != torch.strided:
        raise DtypeError(f"{name}: expected a dense tensor, got {value.layout}; convert it with .to_dense()")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless ``value`` is on ``device``."""
    if value.device != device:
        raise DeviceError(f"{name}: expected a tensor on {device}, got one on {value.device}; move it with .to()")


def check_not_meta(name: str, tensor: Tensor, fill: str = "reset_parameters() or load_state_dict()") -> None:
    """Raise if a tensor of the module ``name`` is on the meta device.

    Args:
        name: Name of the module.
        tensor: Tensor of the module.
        fill: Calls that initialize the tensors after ``to_empty``, for the message.
    """
    if tensor.is_meta:
        raise DeviceError(
            f"{name}: expected tensors with data, got tensors on the meta device; call "
            f"{name}.to_empty(device=...) and then {fill}, or call load_state_dict(..., assign=True)"
        )


def check_shape(name: str, value: Tensor, shape: Sequence[int | None]) -> None:
    """Raise unless ``value`` has ``shape``.

    None stands for any size. A leading -1 stands for any number of leading dimensions.
    """
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
    """Return whether every element of ``value`` is finite; usually allocate nothing."""
    # A finite sum has finite terms only. If the sum is not finite, it may have overflowed: all terms are tested.
    return math.isfinite(value.detach().sum().item()) or bool(torch.isfinite(value).all())


def check_finite(name: str, value: Tensor) -> None:
    """Raise if an element of ``value`` is NaN or infinite."""
    if not is_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise NonFiniteError(
            f"{name}: expected finite numbers in {value.dtype}, got {bad} NaN or infinite elements; "
            "remove or rescale those rows"
        )


def convert_ids(name: str, value: object) -> Tensor:
    """Convert a tensor, an array, a list or a number to a tensor of the same shape.

    Arrays, lists and numbers become tensors on the CPU. The dtype is not checked.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.integer):
        value = int(value)
    try:
        # A copy, since torch takes no array with negative strides, and warns of arrays that are not writable.
        ids = torch.as_tensor(np.array(value, order="C") if isinstance(value, np.ndarray) else value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise DtypeError(f"{name}: expected int64 ids, got {describe(value)}") from error
    return ids.to(torch.int64) if ids.numel() == 0 else ids


def _has_bool(value: object) -> bool:
    """Return whether a list, which may be nested, contains a bool."""
    if not isinstance(value, (list, tuple)):
        return False
    return any(isinstance(entry, (bool, np.bool_)) or _has_bool(entry) for entry in value)


def check_ids(
    name: str, value: object, *, repeats: bool = False, padding: bool = False, scalar: bool = False
) -> Tensor:
    """Convert ids to an int64 tensor on the CPU, of the same shape.

    Args:
        name: Name of the argument.
        value: Ids: a tensor, an array, a list or an integer.
        repeats: Whether duplicates and any number of dimensions are allowed.
        padding: Whether -1 is allowed.
        scalar: Whether one id may have no dimension; it becomes a vector.
    """
    ids = convert_ids(name, value)
    if _has_bool(value):  # torch would convert the bools to integers.
        raise DtypeError(f"{name}: expected int64 ids, got torch.bool in a list; pass integers")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise DtypeError(f"{name}: expected int64 ids, got {ids.dtype}; pass integers")
    check_dense(name, ids)
    if ids.is_meta:
        raise DeviceError(f"{name}: expected ids with data, got a tensor on the meta device")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if ids.numel():
        lowest = int(ids.min())
        if lowest < (-1 if padding else 0):
            wanted = "of at least 0, or -1 for padding" if padding else "of at least 0"
            raise ArgumentError(f"{name}: expected ids {wanted}, got {lowest}")
    if scalar and ids.dim() == 0:
        ids = ids.reshape(1)
    if not repeats:
        check_vector(name, ids)
        check_unique(name, ids)
    return ids


def check_vector(name: str, ids: Tensor) -> None:
    """Raise unless ``ids`` has one dimension."""
    if ids.dim() != 1:
        raise ShapeError(f"{name}: expected a 1-dimensional list of ids, got shape {tuple(ids.shape)}")


def check_unique(name: str, ids: Tensor) -> None:
    """Raise if ``ids`` has duplicates."""
    ordered = ids.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DuplicateIdError(f"{name}: expected each id once, got repeated ids {list_ids(twice.unique())}")


def is_broadcastable(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Return whether ``shape`` broadcasts to ``target`` without enlarging it."""
    # torch.broadcast_shapes imports sympy at its first call, which takes a second.
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)


def check_temperature(
    value: float | Tensor,
    shape: Sequence[int],
    device: torch.device | None = None,
    pending_checks: PendingChecks | None = None,
) -> float | Tensor:
    """Return a valid temperature: a float, or a tensor broadcastable to ``shape``.

    Args:
        value: A positive finite number, or a floating-point tensor of such numbers.
        shape: Leading shape of the query.
        device: Device that the tensor must be on.
        pending_checks: Checks to which the check of a tensor on a GPU is added; if None, it is left out.
    """
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.dtype in INTEGER_DTYPES):
        return check_above_zero("temperature", value)
    if value.dtype not in FLOAT_DTYPES:
        raise DtypeError(f"temperature: expected a number or a floating-point tensor, got {describe(value)}")
    check_dense("temperature", value)
    if device is not None:
        check_device("temperature", value, device)
    if not is_broadcastable(value.shape, shape):
        raise ShapeError(
            f"temperature: expected a scalar or a tensor broadcastable to the query's leading shape "
            f"{tuple(shape)}, got shape {tuple(value.shape)}"
        )
    if is_deferred(value):
        if pending_checks is not None:
            pending_checks.check_finite("temperature", value.log())  # which is finite for finite numbers above 0
    elif not bool(((value > 0) & (value < math.inf)).all()):
        raise ArgumentError("temperature: expected finite numbers above 0, got a tensor with other values")
    return value


def list_ids(ids: Tensor) -> str:
    """Format at most five ids for a message."""
    shown = ", ".join(str(number) for number in ids[:5].tolist())
    return shown if len(ids) <= 5 else f"{shown} and {len(ids) - 5} more"


def describe(value: Any) -> str:
    """Describe the type and value of ``value`` for a message."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = repr(value) if not isinstance(value, int) else _format_number(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else f"a {type(value).__name__}"


def check_keywords(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise if a keyword argument has an unknown name, and suggest a similar one.

    Args:
        owner: Name of the class or function that was called.
        given: Names of the given arguments.
        known: Names that the class or function accepts.
    """
    for name in given:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {similar[0]}=...?" if similar else f"it has {', '.join(known)}"
            raise DtypeError(f"{name}: {owner} has no such argument; {hint}")


def refuse_unknown_keywords(cls: type[T]) -> type[T]:
    """Decorate a class so that an unknown keyword argument raises `DtypeError`.

    Python would name ``__init__`` of the class or of a base class; the error names the class that was called.
    """
    initialize: Any = cls.__init__
    known = list(inspect.signature(initialize).parameters)[1:]

    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        check_keywords(type(self).__name__, options, known)
        initialize(self, *args, **options)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls
