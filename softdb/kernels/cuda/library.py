"""Plain exact reads by the attention operators of torch.

These operators do not split the rows, so few queries leave most of the GPU idle. Here the splits of the rows become the
batch of an attention, and the log-sum-exp of each split merges them. The thresholds follow from measurements on an H200
(``benchmarks/results/nvidia_h200.json``) of the operators; for all other reads the kernels in Triton are assumed to be
as fast, which has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softdb.kernels.cuda.launch import count_blocks

__all__ = ["attend_by_flash", "attend_by_memory_efficient", "choose_attention", "read_by_attention"]

# Attention of (S, 1, B, d) queries over (S, 1, n, d) keys with a scale: (S, 1, B, dv) values and (S, 1, B) log-sum-exp.
Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]

# Smallest number of queries for which an operator is used.
MIN_FLOAT32_QUERIES = 64
MIN_LOW_QUERIES = 512

# Number of programs of an operator, each of a split and a block of queries, and the size of such a block.
FLOAT32_PROGRAMS, FLOAT32_BLOCK = 250, 64
LOW_PROGRAMS, LOW_BLOCK = 512, 128

# Smallest number of rows in a split.
MIN_SPLIT_ROWS = 1024

# The operators compute offsets within a table in 32 bits.
MAX_ELEMENTS = 2**31 - 1


def attend_by_memory_efficient(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention by torch's memory-efficient kernel."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
    blend, lse = attend(query, keys, values, None, True, 0.0, False, scale=scale)[:2]
    return blend, lse.narrow(-1, 0, query.shape[-2])  # the kernel pads the number of queries


def attend_by_flash(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention by torch's flash attention, in 16 bits."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    blend, lse = attend(query, keys, values, 0.0, False, False, scale=scale)[:2]
    return blend, lse


def choose_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: int, *, round_weights: bool, precision: str
) -> tuple[Attention, int] | None:
    """Choose an operator and the number of splits for a plain read.

    Args:
        query: The queries of the kernels, (B, d).
        keys: The keys, (N, d).
        values: The values, (N, dv).
        rows: Number of rows to read.
        round_weights: Whether weights may be rounded to the dtype of the values.
        precision: ``input_precision`` of products of float32.

    Returns:
        The operator and the number of splits; None for the kernels in Triton.
    """
    widths = {keys.shape[-1], values.shape[-1]}
    if not query.dtype == keys.dtype == values.dtype or any(width % 8 for width in widths):
        return None
    if max(keys.numel(), values.numel()) > MAX_ELEMENTS:
        return None
    if not (keys.is_contiguous() and values.is_contiguous() and all(map(_is_aligned, (query, keys, values)))):
        return None
    queries, max_splits = len(query), max(1, rows // MIN_SPLIT_ROWS)
    if query.dtype == torch.float32:
        if queries < MIN_FLOAT32_QUERIES or precision != "ieee":
            return None
        splits = FLOAT32_PROGRAMS // count_blocks(queries, FLOAT32_BLOCK)
        return attend_by_memory_efficient, min(max(1, splits), max_splits)
    if queries < MIN_LOW_QUERIES or not round_weights or len(widths) > 1:
        return None
    return attend_by_flash, min(max(1, LOW_PROGRAMS // count_blocks(queries, LOW_BLOCK)), max_splits)


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether a tensor starts at a multiple of 16 bytes of its storage.

    The operators load 16 bytes at once.
    """
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def read_by_attention(
    query: Tensor,  # (B, d)
    keys: Tensor,  # (N, d)
    values: Tensor,  # (N, dv)
    rows: int,
    scale: float,
    attend: Attention,
    splits: int,
) -> tuple[Tensor, Tensor]:  # (B, dv), (B,)
    """Compute ``softmax(scale * query @ keys.T) @ values`` and its log-sum-exp.

    Both results are float32.

    Args:
        query: The queries.
        keys: The keys.
        values: The values.
        rows: Number of rows to read, at least ``splits``; the rest are free.
        scale: Factor of the scores.
        attend: An attention operator.
        splits: Number of splits. Rows that are left over are one more split.
    """
    size = rows // splits
    parts = []
    for start, count, length in ((0, splits, size), (splits * size, 1, rows - splits * size)):
        if length:
            batch = query.contiguous().expand(count, 1, *query.shape)
            tables = [table.narrow(0, start, count * length).view(count, 1, length, -1) for table in (keys, values)]
            parts.append(attend(batch, tables[0], tables[1], scale))
    lse = torch.cat([part_lse for _, part_lse in parts]).squeeze(1).float()  # (S, B)
    merged = lse.logsumexp(0)
    weights = (lse - merged).exp().unsqueeze(-1)
    blend = torch.cat([part for part, _ in parts]).squeeze(1)  # (S, B, dv)
    return (weights * blend).sum(0), merged
