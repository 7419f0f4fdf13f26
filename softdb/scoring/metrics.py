"""Metrics: scores of keys for queries.

Every metric is a dot product of *prepared* operands::

    scores = prepare_query(query) @ prepare_keys(keys).T          # (B, N), already divided by the temperature

so the kernels need only one product for all metrics:

===========  ==========================  =====================================  ======================
metric       score, before temperature   prepared query                         prepared key
===========  ==========================  =====================================  ======================
dot          q·k                         q / T                                  k
scaled_dot   q·k / √key_dim              q / (√key_dim T)                       k
cosine       q·k / (‖q‖ ‖k‖)             q / (‖q‖ T)                            k / ‖k‖
l2           −‖q − k‖²                   [2(q−c), −1, −‖q−c‖²] / T              [k−c, ‖k−c‖², 1]
===========  ==========================  =====================================  ======================

The l2 expansion suffers from cancellation: it subtracts numbers of size ‖k−c‖² to get distances that may be much
smaller. Two measures keep it accurate. The center c is the mean query (every c gives the same exact score), and the
operands are float64. Preparation consists of differentiable torch operations, so autograd computes the gradients of the
query and the temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.errors import DeviceError
from softdb.pending_checks import is_deferred

__all__ = [
    "METRICS",
    "Metric",
    "Precision",
    "compute_center",
    "compute_dtype",
    "find_exact_divisor",
    "operand_dtype",
    "prepare_keys",
    "prepare_keys_backward",
    "prepare_query",
    "widest_dtype",
]


Metric = Literal["dot", "scaled_dot", "cosine", "l2"]


METRICS: tuple[str, ...] = get_args(Metric)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which a read of ``tensors`` is computed.

    The dtype is float32, or float64 if any of the tensors is float64.
    """
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True)
class Precision:
    """Floating-point types that a device supports in addition to float32.

    Attributes:
        has_float64: Whether the device supports float64.
    """

    has_float64: bool = True

    @classmethod
    def for_device(cls, device: torch.device) -> Precision:
        """Return the precision of a device."""
        return _for_kind(device.type)


@lru_cache(maxsize=8)
def _for_kind(kind: str) -> Precision:
    return Precision(has_float64=kind != "mps")


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device does not support float64."""
    return torch.float64 if Precision.for_device(device).has_float64 else torch.float32


def operand_dtype(metric: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype of prepared operands for a read in ``dtype``.

    Raises:
        DeviceError: The metric is l2, whose expansion needs float64, and the device does not support float64.
    """
    if metric != "l2":
        return dtype
    if widest_dtype(device) != torch.float64:
        raise DeviceError(
            f"metric: expected a device with float64 for 'l2', got {device.type}; use another metric, or read on the "
            "CPU"
        )
    return torch.float64


def compute_center(query: Tensor, metric: str) -> Tensor | None:  # (..., d) -> (d,)
    """Compute the center of the l2 expansion; None for other metrics."""
    if metric != "l2" or query.numel() == 0:
        return None
    target_dtype, queries = operand_dtype(metric, torch.float64, query.device), query.detach()
    if is_deferred(query):  # The query may hold NaN, which must not reach the scores of other queries.
        queries = queries.masked_fill(~queries.isfinite(), 0.0)
    return queries.reshape(-1, query.shape[-1]).mean(dim=0, dtype=target_dtype)


def find_exact_divisor(
    query: Tensor, keys: Tensor, metric: str, temperature: float | Tensor
) -> float | None:  # (..., d), (N, d)
    """Return the number by which `prepare_query` divides a query of 16 bits.

    The prepared query times this number is exact in the dtype of the query, in which a GPU multiplies it fastest.

    Returns:
        The number; None if the query and the keys do not share a dtype of 16 bits, or if it is not one number.
    """
    if query.dtype != keys.dtype or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    if metric not in ("dot", "scaled_dot") or isinstance(temperature, Tensor):
        return None
    return temperature * (math.sqrt(query.shape[-1]) if metric == "scaled_dot" else 1.0)


def prepare_query(
    query: Tensor,  # (..., d)
    metric: str,
    temperature: float | Tensor,  # a number, or broadcastable to (...,)
    center: Tensor | None,  # (d,)
    dtype: torch.dtype,
) -> Tensor:  # (..., operand width)
    """Prepare the left operand of the product that gives the scores."""
    target_dtype = operand_dtype(metric, dtype, query.device)
    divisor = math.sqrt(query.shape[-1]) if metric == "scaled_dot" else 1.0
    if isinstance(temperature, float):
        divisor *= temperature
    # Use float64 for cosine: the quotient of a unit vector and a small temperature is then rounded only once, and its
    # gradient, a difference of large numbers, is rounded only after the subtraction.
    operand = query
    if metric == "cosine" or query.dtype != target_dtype:
        operand = query.to(widest_dtype(query.device) if metric == "cosine" else target_dtype)
    if metric == "l2":
        if center is not None:
            operand = operand - center
        squared = operand.square().sum(-1, keepdim=True)
        operand = torch.cat([2 * operand, -torch.ones_like(squared), -squared], dim=-1)
    elif metric == "cosine":
        operand = F.normalize(operand, dim=-1)
    if isinstance(temperature, Tensor):
        operand = operand / (temperature.to(operand.dtype).unsqueeze(-1) * divisor)
    elif divisor != 1.0:
        operand = operand / divisor
    return operand if operand.dtype == target_dtype else operand.to(target_dtype)


def prepare_keys(
    keys: Tensor,  # (..., d)
    metric: str,
    center: Tensor | None,  # (d,)
    dtype: torch.dtype,
) -> Tensor:  # (..., operand width)
    """Prepare the right operand of the product that gives the scores.

    Returns ``keys`` itself where the metric and the dtype need no preparation.
    """
    target_dtype = operand_dtype(metric, dtype, keys.device)
    operand = keys if keys.dtype == target_dtype else keys.to(target_dtype)
    if metric == "cosine":
        return F.normalize(operand, dim=-1)
    if metric == "l2":
        if center is not None:
            operand = operand - center
        squared = operand.square().sum(-1, keepdim=True)
        return torch.cat([operand, squared, torch.ones_like(squared)], dim=-1)
    return operand


def prepare_keys_backward(
    grad: Tensor,  # (..., operand width)
    keys: Tensor,  # (..., d)
    metric: str,
    center: Tensor | None,  # (d,)
) -> Tensor:  # (..., d)
    """Compute the gradient of the keys from the gradient of the prepared keys."""
    if metric == "cosine":
        keys = keys.to(grad.dtype)
        norm: Tensor = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
        unit = keys / norm.clamp(min=1e-12)  # the clamp of F.normalize
        along = (grad * unit).sum(-1, keepdim=True) * unit
        return (grad - along.masked_fill(norm < 1e-12, 0.0)) / norm.clamp(min=1e-12)
    if metric == "l2":
        keys = keys.to(grad.dtype)
        shifted = keys if center is None else keys - center
        return grad[..., :-2] + 2 * shifted * grad[..., -2:-1]
    return grad
