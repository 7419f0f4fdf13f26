"""The kernels: an exact read and an exact top-k, over blocks of rows.

Both make the scores of one block of rows at a time, (b, C) for a few queries, use them and forget them. A block adds
to three running numbers per query, the largest score m, the sum l of exp(score − m) and the blend o of the values;
when a block brings a larger score, l and o are scaled down by exp(m_old − m_new). This is the online softmax of
Milakov & Gimelshein 2018 (arXiv 1805.02867) and the tiling of FlashAttention (Dao et al. 2022, arXiv 2205.14135);
backward makes the scores again, and from them and the saved m and l the weights.

Where the time goes: two products a block forward, and every pass over its scores costs a tenth to a third of one.
So there is no maximum and no shift (m = 0) as long as a bound on the scores says that exp is safe without; a block is
multiplied in *partitions*, at least one for each thread; products are made the way round that is faster; memory is used
again. Few rows are read at once, and keep their weights for backward.

What holds on every processor: libraries round a product differently for other shapes and memory layouts, and some add
up its terms one after the other. So backward makes the scores by the same calls as forward, as the read's `Tiles` say
(otherwise the weights would not sum to 1), and no product over a block sums over more than ``Tiling.sum_rows`` rows.
Where all scores make one small tile it may be ``Tiling.small_sum`` rows; a row's gradient sums over at most
``Tiling.queries`` queries.

Shapes: G groups of B queries, each group over its own N rows. A store is one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdb.kernels.cpu.backward import Saved, gradients_in_blocks, once_only
from softdb.kernels.cpu.dense import DenseRead, read_densely
from softdb.kernels.cpu.forward import read_in_blocks
from softdb.kernels.cpu.products import grouped
from softdb.kernels.cpu.topk import small_block
from softdb.kernels.spec import BestRows, ReadSpec, full_precision
from softdb.scoring.metrics import widest_dtype
from softdb.transforms import check_not_batched

__all__ = ["exact_read"]


# Sums of exponentials up to this, and down to its inverse, may divide gradients.
COMFORTABLE_TOTAL = 2.0**40


class _ExactRead(torch.autograd.Function):
    """softmax(query @ keys.T) @ values and its log-sum-exp, with the best rows beside them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        # Gradients of rows take memory too, where they cannot be written in place.
        copied = spec.copied(keys, values) * (1 + any(ctx.needs_input_grad[1:3]))
        if k:  # wide blocks with their gradients would leave the cache between two slices of queries
            copied = max(copied, (keys.shape[-1] + values.shape[-1]) // 2)
        tiles = spec.tiles_of(grouped(groups, query), copied, k)
        read = read_in_blocks(query, keys, values, spec, groups, k, tiles)
        total, shift = read.total, read.shift
        if total.numel():
            # Backward divides the gradients by the total: a large one would drive small gradients to underflow.
            smallest, largest = total.aminmax()
            if float(smallest) < 1 / COMFORTABLE_TOTAL or float(largest) > COMFORTABLE_TOTAL:
                more = total.log()
                wide = widest_dtype(total.device)
                total = (total.to(wide) * more.to(wide).neg().exp()).to(total.dtype)
                shift = more if shift is None else shift + more
        ctx.spec, ctx.groups, ctx.tiles = spec, groups, tiles
        ctx.save_for_backward(*Saved(query, keys, values, read.values, total, shift, read.seen, spec.selection.mask))
        ctx.set_materialize_grads(False)
        return read.values, read.lse, read.best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        saved = Saved(*ctx.saved_tensors)  # once: activation checkpointing allows no second look
        results: list[Tensor | None] = [None, None, None]
        if grads[0] is not None or grads[1] is not None:
            with torch.no_grad(), full_precision(saved.query.device):
                results = gradients_in_blocks(
                    saved, ctx.spec, ctx.groups, ctx.tiles, grads[0], grads[1], ctx.needs_input_grad
                )
        return *once_only(results, *saved[:3], *grads), None, None, None


def exact_read(
    query: Tensor,  # (G B, operand width)
    keys: Tensor,  # (G N, d)
    values: Tensor,  # (G N, dv)
    spec: ReadSpec,
    groups: int = 1,
    k: int = 0,
) -> tuple[Tensor, Tensor, BestRows | None]:  # (G B, dv), (G B,)
    """``softmax(query @ keys.T) @ values`` and ``logsumexp(query @ keys.T)``, and the best k rows, for each group.

    Neither the (B, N) scores nor the weights are held, forward or backward, unless they are few.

    Args:
        query: Prepared queries.
        keys: Keys as stored.
        values: Values as stored.
        spec: How they meet.
        groups: G.
        k: How many of the best rows to report too; 0 for none.

    Returns:
        The blend and the log-sum-exp, both differentiable; the best rows, or None if k is 0.

    Raises:
        NonFiniteError: A score overflowed, or keys hold NaN.
    """
    wanted = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)
    block = small_block(len(query), spec, spec.copied(keys, values), k)
    result: tuple[Tensor, Tensor, BestRows | None]
    if block is not None:
        if not wanted:
            return read_densely(query, keys, values, spec, groups, block, k)[:3]
        result = DenseRead.apply(query, keys, values, spec, groups, block, k)  # type: ignore[no-untyped-call]
    else:
        if not wanted:
            tiles = spec.tiles_of(grouped(groups, query), spec.copied(keys, values), k)
            read = read_in_blocks(query, keys, values, spec, groups, k, tiles)
            return read.values, read.lse, read.best
        result = _ExactRead.apply(query, keys, values, spec, groups, k)  # type: ignore[no-untyped-call]
    return result
