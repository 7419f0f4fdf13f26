"""Call torch's attention kernels: one by one, or over parts merged by lse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["list_kernels", "list_part_kernels", "read_in_parts", "run_sdpa"]

# Name of each kernel in reports, and torch's constant.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PartKernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run_sdpa(
    query: Tensor,  # (B, d), or (batch, heads, B, d)
    keys: Tensor,
    values: Tensor,
    kernel: str | None = None,
    **options: Any,
) -> Tensor:
    """Run scaled_dot_product_attention, by the given kernel or by torch's choice."""
    if query.dim() == 2:
        query, keys, values = query[None, None], keys[None, None], values[None, None]
    chosen: AbstractContextManager[Any] = nullcontext() if kernel is None else sdpa_kernel(KERNELS[kernel])
    with chosen:
        return F.scaled_dot_product_attention(query, keys, values, **options)


def list_kernels(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> list[str]:
    """List the kernels of a GPU that accept these operands."""
    if query.device.type != "cuda":
        return []
    accepted = []
    for name in KERNELS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A kernel that refuses its operands gives the reasons as warnings.
            try:
                run_sdpa(query, keys[..., :128, :], values[..., :128, :], name, **options)
            except RuntimeError:
                continue
        accepted.append(name)
    return accepted


def list_part_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, PartKernel]:
    """Return the kernels that return lse too.

    They are functions of query, keys and values of S parts, (S, 1, ·, width).
    """
    if device.type == "cpu":
        return {"flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]}

    def efficient(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(query, keys, values, None, True)
        return output, lse

    if dtype == torch.float32:
        return {"efficient": efficient}
    return {
        "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2],
        "efficient": efficient,
        "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2],
    }


def read_in_parts(
    kernel: PartKernel,
    query: Tensor,  # (B, d)
    keys: Tensor,  # (N, d)
    values: Tensor,  # (N, dv)
    parts: int,
) -> Tensor:  # (B, dv)
    """Read equal parts of the rows as a batch, and merge the parts by their lse.

    Equal to ``softmax(query @ keys.T / sqrt(d)) @ values``. The number of rows must be a multiple of ``parts``.
    """
    queries = len(query)
    output, lse = kernel(
        query.expand(parts, 1, -1, -1).contiguous(),
        keys.view(parts, 1, -1, keys.shape[-1]),
        values.view(parts, 1, -1, values.shape[-1]),
    )
    # Kernels pad the queries of lse, or add a dimension.
    lse = lse.reshape(parts, -1)[:, :queries]
    weights = torch.softmax(lse.float(), 0)  # (parts, B)
    return torch.einsum("sb,sbd->bd", weights, output[:, 0].float()).to(values.dtype)
