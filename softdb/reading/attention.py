"""Pure reads by the attention kernels of torch, on CUDA devices."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ShapeError
from softdb.kernels.attention import attend, choose_kernels
from softdb.kernels.spec import disable_autocast
from softdb.reading.result import Read

__all__ = ["check_causal_size", "is_causal_mask", "make_causal_mask", "read_by_attention"]

# Maximum number of elements of keys and values that are expanded over batch dimensions, whose gradients are allocated.
MAX_EXPANDED_ELEMENTS = 2**28
# The kernels launch a CUDA grid with a dimension for each of the two batch dimensions (pytorch#142228).
MAX_GRID = 2**16 - 1


def is_causal_mask(mask: object) -> bool:
    """Return whether ``mask`` is a `torch.nn.attention.bias.CausalBias`."""
    # Without the module there is no such object. Its import takes seconds, since it imports torch._dynamo.
    module: Any = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def check_causal_size(mask: Any, query: Tensor, keys: Tensor) -> None:
    """Raise unless a causal mask has the numbers of queries and rows of a read."""
    found, wanted = (mask.seq_len_q, mask.seq_len_kv), (query.shape[-2], keys.shape[-2])
    if found != wanted:
        raise ShapeError(
            f"mask: expected a CausalBias of {wanted[0]} queries and {wanted[1]} rows, got one of {found[0]} and "
            f"{found[1]}"
        )


def make_causal_mask(mask: Any, device: torch.device) -> Tensor:
    """Convert a `torch.nn.attention.bias.CausalBias` to a bool mask, (B, N)."""
    offset = 0 if _is_upper_left(mask) else mask.seq_len_kv - mask.seq_len_q
    return torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=device).tril(offset)


def _is_upper_left(mask: Any) -> bool:
    """Return whether query i sees the rows up to i, not those up to N - B + i."""
    return bool(mask.variant.name == "UPPER_LEFT" or mask.seq_len_q == mask.seq_len_kv)


def read_by_attention(
    query: Tensor,  # (*batch, B, d)
    keys: Tensor,  # (*batch, N, d)
    values: Tensor,  # (*batch, N, dv)
    batch: tuple[int, ...],
    *,
    metric: str,
    temperature: float | Tensor,
    mask: Any,
) -> Read | None:
    """Read with the softmax normalizer by the attention kernels of torch.

    The arguments are those of `softdb.functional.soft_read`, and have been checked, except for the mask. No number is
    checked, since a check would wait for the device.

    Returns:
        The read; None if torch has no kernels for it, or if there is one table and no mask, which other kernels split
        over the device.
    """
    is_causal = is_causal_mask(mask)
    if metric not in ("dot", "scaled_dot"):
        return None
    if isinstance(mask, Tensor) and not is_causal and (mask.requires_grad or mask.dtype == torch.float64):
        return None  # The kernels give no exact gradient of a bias that broadcasts.
    if max([math.prod(batch[:-1]), *batch[-1:]]) > MAX_GRID:
        return None
    tables = keys.shape[:-2].numel(), values.shape[:-2].numel()
    if mask is None and tables == (1, 1):
        return None
    groups, count = math.prod(batch), keys.shape[-2]
    is_expanded = tables != (groups, groups)
    if is_expanded and groups * count * (keys.shape[-1] + values.shape[-1]) > MAX_EXPANDED_ELEMENTS:
        return None
    if is_causal and not _is_upper_left(mask):
        mask, is_causal = make_causal_mask(mask, query.device), False
    dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), values.dtype)
    if isinstance(temperature, Tensor):
        dtype = torch.promote_types(dtype, torch.float32)
    if mask is not None and not is_causal and mask.is_floating_point():
        dtype = torch.promote_types(dtype, mask.dtype)
    masked = mask is not None and not is_causal
    kernels = choose_kernels(
        query.device,
        dtype,
        (groups, query.shape[-2], min(count, query.shape[-2]) if is_causal else count),
        (keys.shape[-1], values.shape[-1]),
        masked=masked,
        is_causal=is_causal,
    )
    if kernels is None:
        return None
    scale = 1.0 / math.sqrt(query.shape[-1]) if metric == "scaled_dot" else 1.0
    with disable_autocast(query.device):
        query, keys, values = (t if t.dtype == dtype else t.to(dtype) for t in (query, keys, values))
        if isinstance(temperature, Tensor):
            query = query / temperature.to(dtype).unsqueeze(-1)
        else:
            scale /= temperature
        query, keys, values = (_to_heads(tensor, batch) for tensor in (query, keys, values))
        shown = _fold_mask(mask, batch) if masked else None
        out, lse = attend(query, keys, values, shown, scale, is_causal=is_causal, kernels=kernels)
        lse_only = lse.detach()
        mass = torch.ones_like(lse_only) if shown is None else (lse_only != -torch.inf).to(lse.dtype)
    if len(batch) != 2:
        out, lse, mass = out.reshape(*batch, *out.shape[-2:]), lse.reshape(*batch, -1), mass.reshape(*batch, -1)
    return Read(out, None, None, None, lse, mass)


def _to_heads(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:  # (*batch, n, x) -> (b, h, n, x)
    """Expand the batch dimensions of an operand, and convert them to two."""
    if tensor.shape[:-2] != batch:
        tensor = tensor.expand(*batch, *tensor.shape[-2:])
    if len(batch) == 2:
        return tensor
    if len(batch) < 2:
        return tensor.reshape(*[1] * (2 - len(batch)), *tensor.shape)
    return tensor.flatten(0, len(batch) - 2)


def _fold_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:  # broadcastable to (*batch, B, N) -> (b, h, B, N)
    """Convert the batch dimensions of a mask to two; size 1 is kept where possible."""
    count = max(2, len(batch))
    mask = mask.reshape(*[1] * (count + 2 - mask.dim()), *mask.shape)
    if count > 2 and any(size != 1 for size in mask.shape[: count - 1]):
        mask = mask.expand(*batch[:-1], *mask.shape[-3:])
    return mask.flatten(0, count - 2)
