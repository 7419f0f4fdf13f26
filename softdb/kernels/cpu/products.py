"""Products of tiles, in memory that is used again, and sums over few enough rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.filters import Block
from softdb.kernels.tiling import GROUP, Tiling
from softdb.transforms import check_not_batched

__all__ = [
    "SMALLEST_WEIGHT",
    "BlockRows",
    "Product",
    "add_product",
    "cut_weights",
    "exponentials",
    "grouped",
    "product_in_runs",
    "put_product",
    "repeated_queries",
    "split_rows",
    "zero_for_hidden",
]

# Below as many multiplications torch leaves a product to a kernel of its own.
SMALL_PRODUCT = 512


# Weights below are taken for 0.
SMALLEST_WEIGHT = {dtype: 2.0**26 * torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


class Memory:
    """Memory for one thing at a time: allocating it anew for every block would cost as much as a product."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of a shape, not filled; what was taken before is lost."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = like.new_empty(size, dtype=dtype)
        return self._memory[:size].view(shape)


class BlockRows:
    """A table, (G, N, d), as blocks of rows in one dtype; what has to be copied is lost with the next block."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self._table, self._dtype = table, dtype
        self._gathered, self._converted = Memory(), Memory()

    def block(self, groups: slice, block: Block) -> Tensor:  # -> (g, C, d)
        """The rows of a block."""
        table = self._table
        if isinstance(block.rows, slice):
            rows = table[groups, block.rows]
        elif len(table) == 1:
            memory = self._gathered.take(table, (block.count, table.shape[-1]), table.dtype)
            rows = torch.index_select(table[0], 0, block.rows, out=memory).unsqueeze(0)
        else:
            rows = table[groups].index_select(1, block.rows)
        if rows.dtype == self._dtype:
            return rows
        return self._converted.take(rows, rows.shape, self._dtype).copy_(rows)


class Product:
    """Tiles of products, in memory that is used again for the next.

    Args:
        tall: Whether a tile lies with its rows along the longer stride, (g, C, b), as the product ``keys @ query.T``
            leaves it. For a few dozen queries that product is up to three times as fast as ``query @ keys.T``.
        even: Whether equal rows of the right operand give equal numbers. The libraries behind a product have other
            kernels, which round otherwise, for its last columns and for small products: then it is padded. Blocks that
            are not a multiple of 32 rows are short, see `ReadSpec.tiles`.
    """

    def __init__(self, tall: bool = False, even: bool = False) -> None:
        self._tall, self._even = tall, even
        self._memory = Memory()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:  # (g, b, d), (g, C, d) -> (g, b, C)
        """``left @ right.mT``."""
        groups, height, width = left.shape
        count = wanted = right.shape[1]
        if self._even:
            wanted = max(count, -(-SMALL_PRODUCT // (height * width)))
            wanted += -wanted % GROUP
        if wanted > count:
            right = F.pad(right, (0, 0, 0, wanted - count))
        if self._tall:
            tile = self._memory.take(left, (groups, wanted, height), left.dtype)
            return torch.bmm(right, left.mT, out=tile).mT[..., :count]
        tile = self._memory.take(left, (groups, height, wanted), left.dtype)
        return torch.bmm(left, right.mT, out=tile)[..., :count]


def add_product(total: Tensor, left: Tensor, right: Tensor, run: int) -> None:  # (g, b, x), (n, b, C), (n, C, x)
    """Add ``left @ right`` to ``total``, in sums over at most ``run`` rows.

    With one group there may be n > 1 partitions of its rows. Not by `torch.baddbmm`, which may add each term to what is
    there.
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


def put_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:  # (n, c, x), (n, c, b), (n, b, x)
    """Write ``left @ right`` to ``total`` if it is the first product there, else add it."""
    if first:
        total.baddbmm_(left, right, beta=0.0)
    else:
        total += torch.bmm(left, right)


def product_in_runs(left: Tensor, right: Tensor, tiling: Tiling) -> Tensor:  # (*G, b, C), (*G, C, x) -> (*G, b, x)
    """``left @ right``, in sums over few rows."""
    if right.shape[-2] <= tiling.small_sum:
        return left @ right
    check_not_batched([left, right])
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    flat = [tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in (total, left, right)]
    add_product(flat[0], flat[1], flat[2], tiling.sum_rows)
    return total


def exponentials(scores: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:  # (g, b, C), (g, b)
    """exp(scores − shift), in place where the dtype allows; no shift is 0.

    What is close to underflow, as most weights are when the softmax is peaked, becomes 0: torch's exp is a hundred
    times slower where its result underflows, and a product with denormal numbers is slow, too. Scores that need no
    shift cannot underflow.
    """
    if shift is None:
        return scores.to(dtype).exp_()
    exponents = scores.sub_(shift.unsqueeze(-1)).to(dtype)
    return cut_weights(exponents.clamp_(min=math.log(SMALLEST_WEIGHT[dtype]) - 1).exp_())


def cut_weights(weights: Tensor) -> Tensor:
    """``weights`` with 0 for what is close to underflow, in place."""
    return torch.threshold_(weights, SMALLEST_WEIGHT[weights.dtype], 0.0)


def zero_for_hidden(largest: Tensor) -> Tensor:
    """``largest`` with 0 for -inf: subtracting it from scores that are all -inf leaves them so."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def split_rows(rows: Tensor, parts: int) -> Tensor:  # (g, C, d) -> (parts, C / parts, d)
    """The rows of a block, as partitions if there is more than one."""
    return rows.view(parts, -1, rows.shape[-1]) if parts > 1 else rows


def repeated_queries(queries: Tensor, parts: int) -> Tensor:  # (g, b, d) -> (parts, b, d)
    """Queries, to meet every partition of the rows."""
    return queries.expand(parts, -1, -1) if parts > 1 else queries


def grouped(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x)
    """Return a view with a dimension for the groups."""
    if groups == 1:
        return tensor.unsqueeze(0)
    return tensor.reshape(groups, len(tensor) // max(1, groups), *tensor.shape[1:])
