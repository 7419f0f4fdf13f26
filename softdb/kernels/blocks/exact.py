"""Exact read over blocks of rows.

Algorithm. The read computes the scores of one block of rows at a time, (b, C) for a few queries, and discards them. It
keeps three running values per query: the largest score m, the sum l of exp(score − m), and the sum o of the values
weighted by exp(score − m). When a block has a larger score, l and o are multiplied by exp(m_old − m_new). This is the
online softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867) with the tiling of FlashAttention (Dao et al. 2022,
arXiv 2205.14135). Backward recomputes the scores, and the weights from the scores and the saved m and l.

Cost. Forward takes two products for each block. Each elementwise pass over its scores takes a tenth to a third of the
time of a product, so:

- Forward computes no maximum and subtracts no shift (m = 0) as long as an upper bound of the scores shows that exp
  neither overflows nor underflows.
- A block is multiplied in *partitions*, at least one for each thread.
- Each product uses the faster of two layouts: see `TileProduct`.
- Blocks reuse memory.
- Few rows are read at once, and their weights are saved for backward: see `DenseRead`.

On a GPU, a number that the host needs is waited for, while the device idles. There forward always subtracts the shift,
rows that are hidden from all queries are read as 0, and errors are raised later: see `softdb.pending_checks`.

Rounding. BLAS libraries round a product differently for another shape or memory layout, and some sum its terms
sequentially. Therefore backward recomputes the scores by the same calls as forward, from the same `Tiles`; otherwise
the weights would not sum to 1. A product sums over at most ``Tiling.max_sum_rows`` rows, or
``Tiling.max_dense_sum_rows`` where all scores make one small tile. The gradient of a row sums over at most
``Tiling.max_queries`` queries.

Shapes. There are G groups of B queries, and each group reads N rows of its own. A store is one group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdb.kernels.blocks.backward import SavedTensors, backward_in_blocks, forbid_double_backward
from softdb.kernels.blocks.dense import DenseRead, read_dense
from softdb.kernels.blocks.forward import read_in_blocks
from softdb.kernels.blocks.products import split_groups
from softdb.kernels.blocks.topk import select_dense_block
from softdb.kernels.spec import BestRows, ReadSpec, disable_autocast
from softdb.pending_checks import is_deferred
from softdb.scoring.metrics import widest_dtype
from softdb.table.kept_rows import RowCopies
from softdb.transforms import check_not_batched

__all__ = ["exact_read"]


# Backward divides gradients by sums of exponentials between 1 / MAX_TOTAL and MAX_TOTAL.
MAX_TOTAL = 2.0**40


class _ExactRead(torch.autograd.Function):
    """Exact read in blocks; backward recomputes the scores."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, spec: ReadSpec, groups: int, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        # If rows are copied, their gradients are copied, too, so blocks have to be smaller.
        copied_per_row = spec.count_copied_elements(keys, values) * (1 + any(ctx.needs_input_grad[1:3]))
        if k:  # keeps the wide blocks of a top-k and their gradients in cache for all slices of queries
            copied_per_row = max(copied_per_row, (keys.shape[-1] + values.shape[-1]) // 2)
        tiles = spec.choose_tiles(split_groups(groups, query), copied_per_row, k)
        read = read_in_blocks(query, keys, values, spec, groups, k, tiles)
        total, shift = read.total, read.shift
        if total.numel() and not is_deferred(total):  # on a GPU, the shift is the largest score: total is 1 to N
            # Backward divides the gradients by the total: they would underflow if it were large, and overflow if it
            # were small. Therefore move the total into the shift, which leaves a total of about 1.
            smallest, largest = total.aminmax()
            if float(smallest) < 1 / MAX_TOTAL or float(largest) > MAX_TOTAL:
                log_total = total.log()
                wide = widest_dtype(total.device)
                total = (total.to(wide) * log_total.to(wide).neg().exp()).to(total.dtype)
                shift = log_total if shift is None else shift + log_total
        ctx.spec, ctx.groups, ctx.tiles = spec if bias is None else replace(spec, bias=None), groups, tiles
        mask = spec.selection.mask
        ctx.save_for_backward(*SavedTensors(query, keys, values, bias, read.values, total, shift, read.seen, mask))
        ctx.set_materialize_grads(False)
        return read.values, read.lse, read.best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        saved = SavedTensors(*ctx.saved_tensors)  # activation checkpointing allows one access only
        results: list[Tensor | None] = [None, None, None, None]
        if grads[0] is not None or grads[1] is not None:
            groups, tiles, needs = ctx.groups, ctx.tiles, ctx.needs_input_grad

            def compute(spec: ReadSpec, copies: RowCopies | None) -> list[Tensor | None]:
                return backward_in_blocks(saved, spec, groups, tiles, grads[0], grads[1], needs, copies)

            with torch.no_grad(), disable_autocast(saved.query.device):
                results = ctx.spec.compute_at_read(compute, saved.keys, saved.values)
        return *forbid_double_backward(results, *saved[:4], *grads), None, None, None


def exact_read(
    query: Tensor,  # (G B, operand width)
    keys: Tensor,  # (G N, d)
    values: Tensor,  # (G N, dv)
    spec: ReadSpec,
    groups: int = 1,
    k: int = 0,
) -> tuple[Tensor, Tensor, BestRows | None]:  # (G B, dv), (G B,)
    """Compute ``softmax(query @ keys.T) @ values`` and its log-sum-exp.

    The scores and weights, (B, N), are never allocated as a whole, forward or backward, except where they make one
    small tile.

    Args:
        query: Prepared queries.
        keys: The keys as stored.
        values: The values as stored.
        spec: The metric, filters, dtype, bias and noise.
        groups: Number of groups, G.
        k: Number of best rows to return as well; 0 for none.

    Returns:
        The blend and the log-sum-exp, both differentiable; the best rows, or None if k is 0.

    Raises:
        NonFiniteError: A score overflows, or a key is NaN. On a GPU, the results of the query are NaN instead, and a
            row whose score is -inf has weight 0.
    """
    bias = None if spec.bias is None else spec.bias.numbers
    operands = query, keys, values, bias
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad or keys.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    )
    block = select_dense_block(len(query), spec, spec.count_copied_elements(keys, values), k)
    result: tuple[Tensor, Tensor, BestRows | None]
    if block is not None:
        if not needs_grad:
            return read_dense(query, keys, values, spec, groups, block, k)[:3]
        result = DenseRead.apply(*operands, spec, groups, block, k)  # type: ignore[no-untyped-call]
    else:
        if not needs_grad:
            tiles = spec.choose_tiles(split_groups(groups, query), spec.count_copied_elements(keys, values), k)
            read = read_in_blocks(query, keys, values, spec, groups, k, tiles)
            return read.values, read.lse, read.best
        result = _ExactRead.apply(*operands, spec, groups, k)  # type: ignore[no-untyped-call]
    return result
