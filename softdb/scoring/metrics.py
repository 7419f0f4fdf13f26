"""Metrics: how well a query matches a key.

Every metric is brought to one form, a dot product of *prepared* operands::

    scores = prepare_query(query) @ prepare_keys(keys).T          # (B, N), already divided by the temperature

so that the kernels know one product and no metric:

===========  ==========================  =====================================  ======================
metric       score, before temperature   prepared query                         prepared key
===========  ==========================  =====================================  ======================
dot          q·k                         q / T                                  k
scaled_dot   q·k / √key_dim              q / (√key_dim T)                       k
cosine       q·k / (‖q‖ ‖k‖)             q / (‖q‖ T)                            k / ‖k‖
l2           −‖q − k‖²                   [2(q−c), −1, −‖q−c‖²] / T              [k−c, ‖k−c‖², 1]
===========  ==========================  =====================================  ======================

The l2 expansion subtracts numbers of the size of ‖k−c‖² to find distances that may be far smaller. Two things keep
it accurate: the centre c (the mean query; any c gives the same score), and float64 operands where float32 was given.
Preparation is made of differentiable torch operations, so gradients to the query and the temperature need no formula
of their own.
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

__all__ = [
    "METRICS",
    "Metric",
    "Precision",
    "centre_of",
    "compute_dtype",
    "operand_dtype",
    "prepare_keys",
    "prepare_keys_backward",
    "prepare_query",
    "widest_dtype",
]


Metric = Literal["dot", "scaled_dot", "cosine", "l2"]


METRICS: tuple[str, ...] = get_args(Metric)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which a read over ``tensors`` is computed: at least float32, float64 if any of them is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True)
class Precision:
    """The floating-point types that a device has, beside float32.

    Attributes:
        has_float64: Whether its tensors can be float64.
    """

    has_float64: bool = True

    @classmethod
    def for_device(cls, device: torch.device) -> Precision:
        """Return the types of a device."""
        return _for_kind(device.type)


@lru_cache(maxsize=8)
def _for_kind(kind: str) -> Precision:
    return Precision(has_float64=kind != "mps")


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float64 if Precision.for_device(device).has_float64 else torch.float32


def operand_dtype(metric: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype of the prepared operands of a read that is computed in ``dtype``.

    Raises:
        DeviceError: The metric is l2, whose expansion needs float64, and the device has none.
    """
    if metric != "l2":
        return dtype
    if widest_dtype(device) != torch.float64:
        raise DeviceError(
            f"metric: 'l2' is computed in float64, which {device.type} devices do not have; use another metric, or "
            "read on the CPU"
        )
    return torch.float64


def centre_of(query: Tensor, metric: str) -> Tensor | None:  # (..., d) -> (d,)
    """The point that l2 is expanded around; None for the other metrics."""
    if metric != "l2" or query.numel() == 0:
        return None
    wanted = operand_dtype(metric, torch.float64, query.device)
    return query.detach().reshape(-1, query.shape[-1]).mean(dim=0, dtype=wanted)


def prepare_query(
    query: Tensor,  # (..., d)
    metric: str,
    temperature: float | Tensor,  # a number, or broadcastable to (...,)
    centre: Tensor | None,  # (d,)
    dtype: torch.dtype,
) -> Tensor:  # (..., operand width)
    """The left operand of the product that gives the scores."""
    wanted = operand_dtype(metric, dtype, query.device)
    divisor = math.sqrt(query.shape[-1]) if metric == "scaled_dot" else 1.0
    if isinstance(temperature, float):
        divisor *= temperature
    # A unit vector divided by a small temperature is rounded once, and its gradient, a difference of large numbers, not
    # before it is taken.
    operand = query
    if metric == "cosine" or query.dtype != wanted:
        operand = query.to(widest_dtype(query.device) if metric == "cosine" else wanted)
    if metric == "l2":
        if centre is not None:
            operand = operand - centre
        squared = operand.square().sum(-1, keepdim=True)
        operand = torch.cat([2 * operand, -torch.ones_like(squared), -squared], dim=-1)
    elif metric == "cosine":
        operand = F.normalize(operand, dim=-1)
    if isinstance(temperature, Tensor):
        operand = operand / (temperature.to(operand.dtype).unsqueeze(-1) * divisor)
    elif divisor != 1.0:
        operand = operand / divisor
    return operand if operand.dtype == wanted else operand.to(wanted)


def prepare_keys(
    keys: Tensor,  # (..., d)
    metric: str,
    centre: Tensor | None,  # (d,)
    dtype: torch.dtype,
) -> Tensor:  # (..., operand width)
    """The right operand of the product that gives the scores; ``keys`` itself where nothing is to be done."""
    wanted = operand_dtype(metric, dtype, keys.device)
    operand = keys if keys.dtype == wanted else keys.to(wanted)
    if metric == "cosine":
        return F.normalize(operand, dim=-1)
    if metric == "l2":
        if centre is not None:
            operand = operand - centre
        squared = operand.square().sum(-1, keepdim=True)
        return torch.cat([operand, squared, torch.ones_like(squared)], dim=-1)
    return operand


def prepare_keys_backward(
    grad: Tensor,  # (..., operand width)
    keys: Tensor,  # (..., d)
    metric: str,
    centre: Tensor | None,  # (d,)
) -> Tensor:  # (..., d)
    """The gradient of the keys, from that of what `prepare_keys` made of them."""
    if metric == "cosine":
        keys = keys.to(grad.dtype)
        norm: Tensor = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
        unit = keys / norm.clamp(min=1e-12)  # as F.normalize does it
        along = (grad * unit).sum(-1, keepdim=True) * unit
        return (grad - along.masked_fill(norm < 1e-12, 0.0)) / norm.clamp(min=1e-12)
    if metric == "l2":
        keys = keys.to(grad.dtype)
        shifted = keys if centre is None else keys - centre
        return grad[..., :-2] + 2 * shifted * grad[..., -2:-1]
    return grad
