"""Tolerances of tests by device and dtype.

Tests state the tolerances of the CPU. The comparisons in this module multiply them by the factor of the device and
dtype of the tensors: a GPU adds in another order, and its exponential function is less accurate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Tolerance", "allclose", "assert_close", "largest_error", "tolerance_of"]


@dataclass(frozen=True)
class Tolerance:
    """Allowed errors on a device.

    Attributes:
        read: Error of a read and its gradients, relative to the largest number of the result.
        factor: Allowed error, in tolerances of the CPU.
    """

    read: float
    factor: float = 1.0


# 16-bit numbers are read in float32. The tests add the rounding errors of 16-bit results.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("cpu", torch.float64): Tolerance(1e-10),
    ("cpu", torch.float32): Tolerance(1e-5),
    ("cpu", torch.bfloat16): Tolerance(1e-5),
    ("cpu", torch.float16): Tolerance(1e-5),
    ("cuda", torch.float64): Tolerance(1e-10, factor=2),
    ("cuda", torch.float32): Tolerance(2e-5, factor=4),
    ("cuda", torch.bfloat16): Tolerance(2e-5, factor=2),
    ("cuda", torch.float16): Tolerance(2e-5, factor=2),
}


def tolerance_of(*operands: Any) -> Tolerance:
    """Return the tolerance for tensors, of the floating-point dtype with the fewest digits."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor) and operand.is_floating_point()]
    if not tensors:
        return Tolerance(0.0)
    widest = max(tensors, key=lambda tensor: torch.finfo(tensor.dtype).eps)
    return TOLERANCES[widest.device.type, widest.dtype]


def allclose(found: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 1e-8, *, equal_nan: bool = False) -> bool:
    """`torch.allclose` with tolerances of the CPU."""
    factor = tolerance_of(found, wanted).factor
    return torch.allclose(found, wanted, rtol=factor * rtol, atol=factor * atol, equal_nan=equal_nan)


def assert_close(found: Any, wanted: Any, rtol: float | None = None, atol: float | None = None, **options: Any) -> None:
    """`torch.testing.assert_close` with tolerances of the CPU, and its defaults."""
    factor = tolerance_of(found, wanted).factor
    if rtol is None and atol is None and factor > 1:
        rtol, atol = (1e-7, 1e-7) if found.dtype == torch.float64 else (1.3e-6, 1e-5)
    if rtol is not None and atol is not None:
        rtol, atol = factor * rtol, factor * atol
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, **options)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute error, divided by the factor of the device and dtype."""
    found, expected = found.detach(), expected.detach()
    if not found.numel():
        return 0.0
    same = found == expected  # covers -inf, whose difference is NaN
    error = (found.double() - expected.double()).masked_fill(same, 0.0).abs().max()
    return float(error) / tolerance_of(found, expected).factor
