"""Multiply tiles of scores, in reused memory and in short sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.filters import Block
from softdb.kernels.tiling import GROUP_COLUMNS, Tiling
from softdb.pending_checks import is_deferred
from softdb.table.kept_rows import RowCopies
from softdb.transforms import check_not_batched

__all__ = [
    "MIN_WEIGHT",
    "BlockLoader",
    "TileProduct",
    "add_product",
    "exponentiate",
    "matmul_in_runs",
    "repeat_queries",
    "split_groups",
    "split_rows",
    "write_or_add_product",
    "zero_hidden_rows",
    "zero_tiny_weights_",
    "zero_where_hidden",
]

# Products with fewer multiplications use another kernel of torch, which may round differently.
MIN_PRODUCT_MULTIPLICATIONS = 512

# Weights below these are set to 0.
MIN_WEIGHT = {dtype: 2.0**26 * torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


class ScratchBuffer:
    """Memory for one tensor at a time, reused for the next.

    Allocating memory for each block would take as long as a product.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor; it overwrites the previous one."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = like.new_empty(size, dtype=dtype)
        return self._memory[:size].view(shape)


class BlockLoader:
    """Loader of blocks of rows of a table, (G, N, d), in one dtype.

    Args:
        table: The table.
        dtype: The dtype of the rows.
        name: "keys" or "values".
        copies: Copies of rows to load in place of changed ones, or None.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype, name: str = "keys", copies: RowCopies | None = None) -> None:
        self._table, self._dtype, self._name, self._copies = table, dtype, name, copies
        self._gathered, self._converted = ScratchBuffer(), ScratchBuffer()

    def load(self, groups: slice, block: Block) -> Tensor:  # -> (g, C, d)
        """Return the rows of a block: a view, or a copy that the next call overwrites.

        On a GPU, rows that the block hides from all queries are 0; see `zero_hidden_rows`.
        """
        table = self._table
        if isinstance(block.rows, slice):
            rows = table[groups, block.rows]
        elif len(table) == 1:
            memory = self._gathered.take(table, (block.count, table.shape[-1]), table.dtype)
            rows = torch.index_select(table[0], 0, block.rows, out=memory).unsqueeze(0)
        else:
            rows = table[groups].index_select(1, block.rows)
        if self._copies is not None:
            rows = self._copies.restore_rows(self._name, rows, block.rows)
        rows = zero_hidden_rows(rows, block)
        if rows.dtype == self._dtype:
            return rows
        return self._converted.take(rows, rows.shape, self._dtype).copy_(rows)


def zero_hidden_rows(rows: Tensor, block: Block) -> Tensor:  # (..., C, d)
    """Replace the rows that a block hides from all queries by 0, on a GPU.

    A hidden row has weight 0, but 0 times NaN is NaN. On the CPU, `softdb.kernels.hidden` searches for NaN where a
    result is NaN; on a GPU, the host would have to wait for the results.
    """
    mask = block.mask
    if mask is None or mask.dim() != 1 or not is_deferred(rows):
        return rows
    return rows.masked_fill(~mask.unsqueeze(-1), 0.0)


class TileProduct:
    """Products of tiles, each of which overwrites the previous one.

    Args:
        transposed: Whether a tile is stored as (g, C, b), the layout of ``keys @ query.T``. That product is up to three
            times as fast as ``query @ keys.T`` for a few dozen queries.
        exact_ties: Whether equal rows of the right operand give bitwise equal results. BLAS libraries use other
            kernels for small products and for the last columns, and these kernels round differently. Therefore the
            operand is padded to a multiple of 32 rows. The padding copies little, because only short blocks have
            another number of rows: see `ReadSpec.iterate_tiles`.
    """

    def __init__(self, transposed: bool = False, exact_ties: bool = False) -> None:
        self._transposed, self._exact_ties = transposed, exact_ties
        self._memory = ScratchBuffer()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:  # (g, b, d), (g, C, d) -> (g, b, C)
        """Compute ``left @ right.mT``."""
        groups, height, width = left.shape
        count = padded_count = right.shape[1]
        if self._exact_ties:
            padded_count = max(count, -(-MIN_PRODUCT_MULTIPLICATIONS // (height * width)))
            padded_count += -padded_count % GROUP_COLUMNS
        if padded_count > count:
            right = F.pad(right, (0, 0, 0, padded_count - count))
        if self._transposed:
            tile = self._memory.take(left, (groups, padded_count, height), left.dtype)
            return torch.bmm(right, left.mT, out=tile).mT[..., :count]
        tile = self._memory.take(left, (groups, height, padded_count), left.dtype)
        return torch.bmm(left, right.mT, out=tile)[..., :count]


def add_product(total: Tensor, left: Tensor, right: Tensor, run: int) -> None:  # (g, b, x), (n, b, C), (n, C, x)
    """Add ``left @ right`` to ``total``, in sums over at most ``run`` rows.

    Where n > g = 1, the operands are n partitions of the rows of one group. `torch.baddbmm` is not used, because it may
    add the terms to the total one by one, which accumulates rounding errors.
    """
    if len(left) > len(total):
        total += torch.bmm(left, right).sum(0, keepdim=True, dtype=total.dtype)
        return
    count = right.shape[1]
    if count <= run:
        total += torch.bmm(left, right)
        return
    whole = count - count % run
    for into, weights, rows in zip(total, left, right, strict=True):
        if whole:
            runs = weights[:, :whole].unflatten(-1, (-1, run)).transpose(0, 1)  # (runs, b, run)
            into += torch.bmm(runs, rows[:whole].unflatten(0, (-1, run))).sum(0, dtype=into.dtype)
        if whole < count:
            into += weights[:, whole:] @ rows[whole:]


def write_or_add_product(  # (n, c, x), (n, c, b), (n, b, x)
    total: Tensor, left: Tensor, right: Tensor, first: bool
) -> None:
    """Write ``left @ right`` to ``total`` if ``first``, else add it."""
    if first:
        total.baddbmm_(left, right, beta=0.0)
    else:
        total += torch.bmm(left, right)


def matmul_in_runs(left: Tensor, right: Tensor, tiling: Tiling) -> Tensor:  # (*G, b, C), (*G, C, x) -> (*G, b, x)
    """Compute ``left @ right`` in sums over few rows."""
    if right.shape[-2] <= tiling.max_dense_sum_rows:
        return left @ right
    check_not_batched([left, right])
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    flat = [tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in (total, left, right)]
    add_product(flat[0], flat[1], flat[2], tiling.max_sum_rows)
    return total


def exponentiate(scores: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:  # (g, b, C), (g, b)
    """Compute exp(scores − shift), in place where the dtype allows.

    If the shift is None, it is 0. Results close to underflow become 0, because torch's exp is a hundred times slower
    where its result underflows, and products with denormal numbers are slow, too. Most weights of a peaked softmax are
    close to underflow. Without a shift, the absolute scores are at most `Tiling.max_unshifted_score`, so no result
    underflows.
    """
    if shift is None:
        return scores.to(dtype).exp_()
    exponents = scores.sub_(shift.unsqueeze(-1)).to(dtype)
    return zero_tiny_weights_(exponents.clamp_(min=math.log(MIN_WEIGHT[dtype]) - 1).exp_())


def zero_tiny_weights_(weights: Tensor) -> Tensor:
    """Set weights close to underflow to 0, in place."""
    return torch.threshold_(weights, MIN_WEIGHT[weights.dtype], 0.0)


def zero_where_hidden(largest: Tensor) -> Tensor:
    """Replace -inf by 0 in the largest scores.

    A query whose scores are all hidden has the largest score -inf. Subtracting 0 instead leaves its scores at -inf.
    """
    return largest.masked_fill(largest == -torch.inf, 0.0)


def split_rows(rows: Tensor, parts: int) -> Tensor:  # (g, C, d) -> (parts, C / parts, d)
    """Split the rows of a block into partitions, if there is more than one."""
    return rows.view(parts, rows.shape[1] // parts, rows.shape[-1]) if parts > 1 else rows


def repeat_queries(queries: Tensor, parts: int) -> Tensor:  # (g, b, d) -> (parts, b, d)
    """Expand queries to every partition of the rows, if there is more than one."""
    return queries.expand(parts, -1, -1) if parts > 1 else queries


def split_groups(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x)
    """Return a view with a dimension for the groups."""
    if groups == 1:
        return tensor.unsqueeze(0)
    return tensor.reshape(groups, len(tensor) // max(1, groups), *tensor.shape[1:])
