"""Exact read on CUDA, by kernels in Triton or by blocks in torch.

The kernels support all metrics in float32, over float32, bfloat16 and float16 tables of up to `MAX_WIDTH` columns, with
all rows or one mask of rows for each group. Reads with other filters, noise, a bias, best rows, or float64 take the
blocks in torch. The choice depends on the arguments only, so it needs no synchronization with the device.

The l2 metric needs the queries themselves, since the kernels subtract keys from them. They are recovered from the
prepared queries, in float64, by differentiable operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.blocks import exact as blocks
from softdb.kernels.blocks.backward import forbid_double_backward
from softdb.kernels.cuda import operators
from softdb.kernels.cuda.backward import Needs
from softdb.kernels.cuda.launch import MAX_WIDTH, choose_precision
from softdb.kernels.cuda.library import choose_attention, read_by_attention
from softdb.kernels.spec import BestRows, ReadSpec, check_scores, disable_autocast
from softdb.table.kept_rows import RowCopies
from softdb.transforms import check_not_batched

__all__ = ["exact_read", "is_supported", "recover_l2_query"]

TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The kernels number rows in 32 bits, and the rows after the last of a split or tile, too.
MAX_ROWS = 2**30


class _ExactRead(torch.autograd.Function):
    """Exact read in Triton; backward recomputes the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rate: Tensor | None,
        spec: ReadSpec,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        operand, options = _collect_operands(query, keys, rate, spec, groups)
        result = operators.read(operand, keys, values, _can_round(spec, values), *options)
        ctx.spec, ctx.options = spec, options[3:]
        ctx.save_for_backward(operand, keys, values, *options[:3], result.values, result.maximum, result.total)
        ctx.set_materialize_grads(False)
        return result.values, result.lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        operand, keys, values, mask, center, rate, blend, *softmax = ctx.saved_tensors
        grad_blend, grad_lse = grads
        results: list[Tensor | None] = [None, None, None, None]
        if grad_blend is not None or grad_lse is not None:
            needs = Needs(*ctx.needs_input_grad[:4])

            def compute(spec: ReadSpec, copies: RowCopies | None) -> list[Tensor | None]:
                tables = [keys, values]
                if copies is not None:  # a copy of the tables, since kernels read each from one place
                    everything = slice(0, len(keys))
                    tables = [
                        copies.restore_rows(n, t, everything) for n, t in zip(("keys", "values"), tables, strict=True)
                    ]
                delta = torch.zeros_like(softmax[0]) if grad_lse is None else -grad_lse
                upstream = grad_blend
                if grad_blend is not None:
                    delta = delta + (grad_blend * blend).sum(-1)
                    upstream = grad_blend.to(values.dtype) if _can_round_gradients(spec, keys, values) else grad_blend
                options = mask, center, rate, *ctx.options
                return list(
                    operators.differentiate_read(operand, *tables, tuple(softmax), delta, upstream, needs, *options)
                )

            with torch.no_grad(), disable_autocast(keys.device):
                results = ctx.spec.compute_at_read(compute, keys, values)
        inputs = operand, keys, values, rate
        return *forbid_double_backward(results, *inputs, *grads), None, None


def exact_read(
    query: Tensor,  # (G B, operand width)
    keys: Tensor,  # (G N, d)
    values: Tensor,  # (G N, dv)
    spec: ReadSpec,
    groups: int = 1,
    k: int = 0,
) -> tuple[Tensor, Tensor, BestRows | None]:  # (G B, dv), (G B,)
    """Compute ``softmax(query @ keys.T) @ values`` and its log-sum-exp.

    Neither scores nor weights, (B, N), are allocated, forward or backward.

    Args:
        query: Prepared queries.
        keys: The keys as stored.
        values: The values as stored.
        spec: The metric, filters, dtype, bias and noise.
        groups: Number of groups, G.
        k: Number of best rows to return as well; 0 for none.

    Returns:
        The blend and the log-sum-exp, both differentiable; the best rows, or None if k is 0. A query with NaN
        gives NaN.
    """
    if not is_supported(query, keys, values, spec, groups, k):
        return blocks.exact_read(query, keys, values, spec, groups, k)
    rate = None
    if spec.metric == "l2":
        query, rate = recover_l2_query(query)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, keys, values)):
        blend, lse = _ExactRead.apply(query, keys, values, rate, spec, groups)
    else:
        operand, options = _collect_operands(query, keys, rate, spec, groups)
        blend, lse = _read_without_gradient(operand, keys, values, _can_round(spec, values), options)
    check_scores(lse, spec.pending_checks, empty=True)
    return blend, lse, None


def _read_without_gradient(
    query: Tensor, keys: Tensor, values: Tensor, round_weights: bool, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Read by an operator of torch where that is as fast as the kernels."""
    mask, _, _, metric, groups, rows, divisor, precision, _ = options
    if mask is None and groups == 1 and metric in ("dot", "scaled_dot") and rows and len(query):
        choice = choose_attention(query, keys, values, rows, round_weights=round_weights, precision=precision)
        if choice is not None:
            return read_by_attention(query, keys, values, rows, 1 / divisor, *choice)
    return operators.read(query, keys, values, round_weights, *options)[:2]


def is_supported(query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int = 1, k: int = 0) -> bool:
    """Return whether the kernels can run a read."""
    selection = spec.selection
    return (
        k == 0
        and groups > 0
        and spec.dtype == torch.float32
        and spec.noise is None
        and spec.bias is None
        and selection.rule is None
        and selection.excluded is None
        and selection.size <= MAX_ROWS
        and (selection.mask is None or selection.mask.dim() < 2 or selection.mask.shape[-2] == 1)
        and keys.dtype in TABLE_DTYPES
        and values.dtype in TABLE_DTYPES
        and 0 < keys.shape[-1] <= MAX_WIDTH
        and 0 < values.shape[-1] <= MAX_WIDTH
    )


def recover_l2_query(query: Tensor) -> tuple[Tensor, Tensor]:  # (M, d + 2) -> (M, d), (M,)
    """Recover centered queries and 1 / temperature from queries prepared for l2.

    Preparation of a query q gives [2 (q − c), −1, −‖q − c‖²] / T. The results are float32,
    and differentiable.
    """
    width = query.shape[-1] - 2
    rate = -query.select(-1, width)
    return (query.narrow(-1, 0, width) / (2 * rate).unsqueeze(-1)).float(), rate.float()


def _collect_operands(
    query: Tensor, keys: Tensor, rate: Tensor | None, spec: ReadSpec, groups: int
) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the queries and options of the operators."""
    divisor = 1.0
    if spec.query_divisor is not None:
        # The query had the dtype of the keys, so the product is exact.
        divisor = spec.query_divisor
        query = (query * divisor).to(keys.dtype)
    center = None
    if spec.metric == "l2":
        center = keys.new_zeros(keys.shape[-1], dtype=torch.float32) if spec.center is None else spec.center.float()
    selection = spec.selection
    precision = choose_precision(spec.tiling.float32_precision)
    numbers = groups, selection.size, divisor, precision, spec.tiling.multiprocessors
    return query, (_combine_masks(selection), center, rate, spec.metric, *numbers)


def _combine_masks(selection: Selection) -> Tensor | None:  # -> (size,) or (G, size)
    """Return which rows each group may see; None for all."""
    shared, mask = selection.shared, selection.mask
    if selection.visited is not None:
        shared = torch.zeros(selection.size, dtype=torch.bool, device=selection.visited.device)
        shared = shared.index_fill(0, selection.visited, True)
    if mask is None:
        return shared
    mask = mask.flatten(0, -2) if mask.dim() > 1 else mask
    if mask.dim() > 1 and len(mask) == 1:  # one mask for all groups
        mask = mask[0]
    mask = mask.expand(*mask.shape[:-1], selection.size)
    return mask if shared is None else mask & shared


def _can_round(spec: ReadSpec, values: Tensor) -> bool:
    """Return whether weights may be rounded to the dtype of the values.

    Weights are rounded if the output is rounded to the same dtype.
    """
    return spec.output_dtype == values.dtype or (spec.bf16_matmul and values.dtype == torch.bfloat16)


def _can_round_gradients(spec: ReadSpec, keys: Tensor, values: Tensor) -> bool:
    """Return whether backward may round weights and gradients of scores."""
    return spec.output_dtype == values.dtype == keys.dtype
