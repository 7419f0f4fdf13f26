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
up its terms one after the other. So backward makes the scores by the same calls as forward, as the read's `Tiling` says
(otherwise the weights would not sum to 1), and no product over a block sums over more than `SUM_ROWS` rows. Where all
scores make one small tile it may be `SMALL_SUM` rows; a row's gradient sums over at most `TILE_QUERIES` queries.

Shapes: G groups of B queries, each group over its own N rows. A store is one group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb._checks import is_finite
from softdb.attributes import kept_property
from softdb.errors import NonFiniteError, SecondDerivativeError, StaleReadError
from softdb.filters import Block, Selection
from softdb.rows import row_sparse
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.metrics import prepare_keys, prepare_keys_backward, widest_dtype
from softdb.transforms import check_not_batched

__all__ = [
    "BestRows",
    "Places",
    "Scan",
    "Tiling",
    "blend_at",
    "blend_back",
    "check_scores",
    "exact_read",
    "exact_top_k",
    "full_precision",
    "gather_rows",
    "gathered_scores",
    "is_narrow",
    "products_at",
    "query_numbers",
    "scores_at",
    "top_k",
    "weighted_sum",
]

# A tile of scores stays in the second-level cache beside the operands that made it.
TILE_ELEMENTS = 2**20
TILE_QUERIES = 1024
TILE_ROWS = 2**18
# As many numbers of a block's rows are copied at a time, where they have to be: 4 MiB of float32.
COPIED_ELEMENTS = 2**20
# The most rows whose weighted values one product sums up, and the fewest that are worth a product of their own. Over
# 70,000 equal summands one float32 product was off by 6e-4 (AMD EPYC, Zen 3); the error grows with their number.
SUM_ROWS, LEAST_SUM_ROWS = 512, 256
# Where all scores make one small tile, products and torch's softmax may sum over so many, as three lines of torch do.
SMALL_SUM = 2048
# Few enough rows to be padded by a copy; no fewer than a group.
FEW_ROWS = 4096
# Below as many multiplications torch leaves a product to a kernel of its own.
SMALL_PRODUCT = 512
# Where no score can be larger than this, in absolute value, exponentials neither overflow nor underflow as they are.
UNSHIFTED = 40.0
# Where no score can be as large as this, none overflows.
LARGEST = 1e38
# Sums of exponentials up to this, and down to its inverse, may divide gradients.
COMFORTABLE_TOTAL = 2.0**40
# As many weights are held all at once, and kept for backward: half a MiB of float32.
SMALL_SCORES = 2**17
NOTHING: AbstractContextManager[Any] = nullcontext()
# Weights below are taken for 0.
SMALLEST_WEIGHT = {dtype: 2.0**26 * torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
# Two-stage top-k: the columns whose maximum stands for them.
GROUP = 32
# Up to this many groups for each row wanted, one pass is faster than two.
FEW_GROUPS = 32
# The group maxima of a pass, for as many queries at a time, and rows that are gathered: 32 and 4 MiB.
MAXIMA_ELEMENTS, GATHER_ELEMENTS = 2**23, 2**20


@dataclass(frozen=True)
class Tiling:
    """How a pass over the rows is cut into products. Backward cuts as forward did, so that it makes the same scores.

    Attributes:
        queries: The queries of a tile.
        rows: The rows of a block, a multiple of ``partition``.
        partition: The rows that one product takes where a block is split.
        tall: Whether tiles lie with their rows along the longer stride: see `_Product`.
        even: Whether equal rows give equal scores: see `_Product`.
    """

    queries: int
    rows: int
    partition: int
    tall: bool
    even: bool


@dataclass(frozen=True)
class Scan:
    """How queries meet rows: everything about an exact pass but the operands.

    Attributes:
        metric: Which metric the query was prepared for.
        centre: The point that l2 is expanded around, (d,).
        selection: Which rows each query may see.
        dtype: The dtype to compute in.
        key_norm: Tells the largest norm of a key, for a bound on scores; None where it is to be found block by block.
        narrow: Whether the blend, not the scores, may be multiplied in the dtype of the values: see `is_narrow`.
        noise: What is added to the scores.
    """

    metric: str
    centre: Tensor | None
    selection: Selection
    dtype: torch.dtype
    key_norm: Callable[[], float] | None = None
    narrow: bool = False
    noise: GumbelNoise | None = None

    def tiling(self, query: Tensor, copied: int, k: int = 0) -> Tiling:  # (G, B, w)
        """Choose the tiles of a pass.

        Args:
            query: Prepared queries.
            copied: How many numbers of each row of a block are copied: where they are, blocks are smaller.
            k: How many of the best rows are looked for in each tile: a tile for many is wide.
        """
        queries, width = query.shape[1:]
        if k:
            wide = min(8 * GROUP * k, COPIED_ELEMENTS // max(1, copied))
            height = min(queries, max(16, TILE_ELEMENTS // max(1, wide)))
        else:
            height = -(-queries // max(1, -(-queries // TILE_QUERIES)))
        rows = min(TILE_ELEMENTS // max(1, height), COPIED_ELEMENTS // max(1, copied), TILE_ROWS)
        rows = max(rows // GROUP, 1) * GROUP
        partition = min(SUM_ROWS, rows)
        if query.device.type == "cpu":
            # A thread that multiplies a part of the rows by itself shares no operand and no result with the others.
            share = rows // torch.get_num_threads() // GROUP * GROUP
            partition = share if min(LEAST_SUM_ROWS, partition) <= share < partition else partition
        tall = k == 0 and _is_tall(height, width)
        return Tiling(height, rows // partition * partition, partition, tall, even=k > 0)

    def tiles(self, tiling: Tiling, groups: int, queries: int) -> Iterator[tuple[slice, Block, list[slice]]]:
        """Groups × block of rows × slices of queries, such that a tile of scores fits in cache.

        Args:
            tiling: How large they are.
            groups: G.
            queries: B.
        """
        count = self.selection.count
        if groups == 0 or queries == 0 or count == 0:
            return
        height, width = tiling.queries, tiling.rows
        depth = max(1, TILE_ELEMENTS // (height * min(width, count)))
        slices = [slice(start, min(start + height, queries)) for start in range(0, queries, height)]
        edges = list(range(0, count, width))
        if count - edges[-1] > tiling.partition and count % tiling.partition:
            edges.append(count - count % tiling.partition)
        edges.append(count)
        for first in range(0, groups, depth):
            for start, stop in itertools.pairwise(edges):
                block = self.selection.block(start, stop)
                if block is not None:
                    yield slice(first, min(first + depth, groups)), block, slices

    def partitions(self, tiling: Tiling, groups: slice, block: Block) -> int:
        """Into how many parts the rows of a block are split to be multiplied; 1 where its tile has to be one piece."""
        whole = tiling.even or block.hides or self.noise is not None or groups.stop - groups.start > 1
        return 1 if whole or block.count % tiling.partition else block.count // tiling.partition

    def bound(self, query: Tensor) -> Callable[[Tensor], float]:  # (G, B, w)
        """A function that tells how large a score with the prepared keys of a block (g, C, w) can be.

        By Cauchy and Schwarz, so it is the product of the largest norms; infinity where looking for it does not pay.
        """
        known = self.metric == "cosine" or self.key_norm is not None
        if (
            self.noise is not None
            or self.metric == "l2"
            or not (known or 4 * query.shape[1] >= query.shape[2])
            or query.numel() == 0
        ):
            return lambda operand: math.inf
        norm = 1.001 * float(torch.linalg.vector_norm(query, dim=-1).amax())
        if self.metric == "cosine":
            return lambda operand: norm
        if self.key_norm is not None:
            whole = norm * self.key_norm()
            return lambda operand: whole
        return lambda operand: norm * float(torch.linalg.vector_norm(operand, dim=-1).amax())

    def copied(self, keys: Tensor, values: Tensor | None = None) -> int:
        """How many numbers of each row of a block are copied, since they are not used as they lie."""
        numbers = 0
        if self.selection.visit is not None or self.metric in ("cosine", "l2") or keys.dtype != self.dtype:
            numbers += keys.shape[-1] * (2 if self.metric == "l2" else 1)
        if values is not None and (self.selection.visit is not None or values.dtype != self.dtype):
            numbers += values.shape[-1]
        return numbers

    def operand(self, rows: Tensor) -> Tensor:  # (g, C, d) -> (g, C, operand width)
        """The prepared keys of a block."""
        return prepare_keys(rows, self.metric, self.centre, self.dtype)

    def disturb(self, scores: Tensor, block: Block, groups: slice, queries: slice) -> None:  # (g, b, C)
        """Add the noise, if there is any, to scores of the ``queries`` of each of ``groups`` with a block's rows."""
        if self.noise is not None:
            device = scores.device
            numbers = query_numbers(range(queries.start, queries.stop), range(groups.start, groups.stop), device)
            slots = block.slots(torch.arange(block.count, device=device))
            scores += self.noise.at(numbers, slots, scores.dtype)

    def operand_backward(self, grad: Tensor, rows: Tensor) -> Tensor:  # (g, C, operand width) -> (g, C, d)
        """The gradient of a block's keys, from that of its prepared keys."""
        return prepare_keys_backward(grad, rows, self.metric, self.centre)


def query_numbers(queries: range, groups: range, device: torch.device) -> Tensor:  # -> (g, b)
    """A number for each query of each group, by which its noise is told from that of others."""
    within = torch.arange(queries.start, queries.stop, device=device)
    return torch.arange(groups.start, groups.stop, device=device).unsqueeze(-1) * 2**40 + within


class _Memory:
    """Memory for one thing at a time: allocating it anew for every block would cost as much as a product."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of a shape, not filled; what was taken before is lost."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = like.new_empty(size, dtype=dtype)
        return self._memory[:size].view(shape)


class _Rows:
    """A table, (G, N, d), as blocks of rows in one dtype; what has to be copied is lost with the next block."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self._table, self._dtype = table, dtype
        self._gathered, self._converted = _Memory(), _Memory()

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


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast lowers nothing: scores and softmax need float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return NOTHING


# -- exact top-k -----------------------------------------------------------------------------------------


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """``torch.topk(scores, k)``, except that among equal scores the lowest index wins and comes first."""
    width = scores.shape[-1]
    k = min(k, width)
    values, index = scores.topk(min(k + 1, width), dim=-1)
    equal = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)
    values, index = values[..., :k], index[..., :k]
    if bool(equal.any()):
        index = index.contiguous()
        # topk orders equal scores as it likes; and where the first one left out equals the last one kept, it chose.
        tied = equal[..., : k - 1].any(-1).nonzero(as_tuple=True)
        ascending = index[tied].sort(dim=-1).values
        order = scores[tied].gather(-1, ascending).sort(dim=-1, descending=True, stable=True).indices
        index[tied] = ascending.gather(-1, order)
        if k < width:
            cut = equal[..., k - 1].nonzero(as_tuple=True)
            index[cut] = scores[cut].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return values, index


def top_of_block(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (g, b, C) -> (g, b, min(k, C))
    """`top_k` in two stages: the k best groups of 32 columns hold the k best columns.

    Suppose a column of the k best lay in none of the k best groups (by maximum, then lowest index). Each of those
    groups has a maximum that is larger, or as large and further left: k columns that come before it.
    """
    width = scores.shape[-1]
    groups = width // GROUP
    if groups <= 2 * k:
        return top_k(scores, k)
    even = scores[..., : groups * GROUP]
    blocks = even.unflatten(-1, (groups, GROUP))
    chosen = top_k(blocks.amax(-1), k)[1].sort(dim=-1).values  # (g, b, k), ascending so that columns are too
    columns = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=scores.device)).flatten(-2)
    if groups * GROUP < width:
        rest = torch.arange(groups * GROUP, width, device=scores.device)
        columns = torch.cat([columns, rest.expand(*columns.shape[:-1], -1)], dim=-1)
    values, place = top_k(scores.gather(-1, columns), k)
    return values, columns.gather(-1, place)


class _Best:
    """The best k rows of each query so far, best first; (G, B, up to k)."""

    def __init__(self, groups: int, queries: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = k
        self.scores = torch.full((groups, queries, k), -torch.inf, dtype=dtype, device=device)
        self.rows = torch.full((groups, queries, k), -1, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, groups: slice, queries: slice, block: Block) -> None:
        """Take in the scores of a block whose rows come after all that were taken in before."""
        values, _, found = _best_of_block(scores, block, self.k)
        if not bool((self.rows[groups, queries, 0] >= 0).any()):  # the first rows that these queries see
            self.scores[groups, queries], self.rows[groups, queries] = values, found
            return
        # Earlier rows stand first, so that the lowest row wins a tie.
        values = torch.cat([self.scores[groups, queries], values.to(self.scores.dtype)], dim=-1)
        found = torch.cat([self.rows[groups, queries], found], dim=-1)
        values, order = top_k(values, self.k)
        self.scores[groups, queries] = values
        self.rows[groups, queries] = found.gather(-1, order)


def exact_top_k(
    query: Tensor,  # (B, w)
    keys: Tensor,  # (N, d)
    scan: Scan,
    k: int,
) -> tuple[Tensor, Tensor]:  # (B, k), (B, k)
    """The k best rows of every query: ``topk(query @ keys.T, k)``, ties to the lowest row; no gradient.

    The (B, N) scores are never held.

    Args:
        query: Prepared queries.
        keys: Keys as stored.
        scan: How they meet; its selection has no whole mask.
        k: How many rows to find.

    Returns:
        Scores and slots, best first; -inf and -1 where fewer than k rows may be seen.
    """
    with torch.no_grad(), full_precision(query.device):
        query, keys = query.detach()[None], keys.detach()[None]
        block = _small_block(query.shape[1], scan, scan.copied(keys), k)
        if block is not None:
            everyone, queries = slice(0, 1), slice(0, query.shape[1])
            scores = _Product(even=True)(query, scan.operand(_Rows(keys, scan.dtype).block(everyone, block)))
            block.hide(scores, everyone, queries, -torch.inf)
            found, _, rows = _best_of_block(scores[0].to(scan.dtype), block, k)
            return found, rows
        if scan.selection.count <= FEW_GROUPS * GROUP * k:
            return _top_k_in_one_pass(query, keys, scan, k)
        return _top_k_in_two_passes(query, keys, scan, k)


def _top_k_in_one_pass(query: Tensor, keys: Tensor, scan: Scan, k: int) -> tuple[Tensor, Tensor]:
    """The best of each tile, joined to the best so far."""
    batch = query.shape[1]
    best = _Best(1, batch, k, scan.dtype, query.device)
    product = _Product(even=True)
    key_rows = _Rows(keys, scan.dtype)
    for groups, block, slices in scan.tiles(scan.tiling(query, scan.copied(keys), k), 1, batch):
        operand = scan.operand(key_rows.block(groups, block))
        for queries in slices:
            scores = product(query[:, queries], operand)
            block.hide(scores, groups, queries, -torch.inf)
            # Scores are compared as they are reported: two that round to one are a tie.
            best.add(scores.to(scan.dtype), groups, queries, block)
    return best.scores[0], best.rows[0]


def _top_k_in_two_passes(query: Tensor, keys: Tensor, scan: Scan, k: int) -> tuple[Tensor, Tensor]:
    """The best score of every group of 32 rows, (B, N / 32); then the rows of the k best groups once more.

    Those hold the k best rows, as `top_of_block` argues. Worth while where these 32 k rows are few.
    """
    batch, count = query.shape[1], scan.selection.count
    height = max(1, MAXIMA_ELEMENTS * GROUP // count)
    parts = [slice(start, min(start + height, batch)) for start in range(0, batch, height)]
    if batch == 0:
        return query.new_empty(0, k, dtype=scan.dtype), torch.empty(0, k, dtype=torch.int64, device=query.device)
    found = torch.cat([_columns_of_best_groups(query, keys, scan, part, k) for part in parts])  # (B, 32 k)
    if scan.selection.visit is not None:
        found = torch.where(found < 0, found, scan.selection.visit[found.clamp(min=0)])
    found.masked_fill_(~scan.selection.allows(found), -1)
    scores, place = top_k(scores_at(query[0], keys[0], found, scan), k)
    return scores, found.gather(-1, place).masked_fill_(scores == -torch.inf, -1)


def _columns_of_best_groups(
    query: Tensor,  # (1, B, w)
    keys: Tensor,  # (1, N, d)
    scan: Scan,
    part: slice,
    k: int,
) -> Tensor:  # (b, 32 k), ascending
    """For some queries, the places in the pass of the rows of the k groups with the best maxima; -1 past the end."""
    count = scan.selection.count
    groups = -(-count // GROUP)
    maxima = torch.full((part.stop - part.start, groups), -torch.inf, dtype=scan.dtype, device=query.device)
    product = _Product(even=True)
    key_rows = _Rows(keys, scan.dtype)
    for chunk, block, slices in scan.tiles(scan.tiling(query[:, part], scan.copied(keys)), 1, len(maxima)):
        operand = scan.operand(key_rows.block(chunk, block))
        for queries in slices:
            whole = slice(part.start + queries.start, part.start + queries.stop)
            scores = product(query[:, whole], operand)
            block.hide(scores, chunk, whole, -torch.inf)
            scores = scores[0].to(scan.dtype)
            first, even = block.start // GROUP, scores.shape[1] // GROUP
            maxima[queries, first : first + even] = scores[:, : even * GROUP].unflatten(1, (even, GROUP)).amax(-1)
            if even * GROUP < scores.shape[1]:
                maxima[queries, first + even] = scores[:, even * GROUP :].amax(-1)
    chosen = top_k(maxima, k)[1].sort(dim=-1).values
    columns = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=query.device)).flatten(1)
    return columns.masked_fill_(columns >= count, -1)


# -- exact read ------------------------------------------------------------------------------------------


class _Product:
    """Tiles of products, in memory that is used again for the next.

    Args:
        tall: Whether a tile lies with its rows along the longer stride, (g, C, b), as the product ``keys @ query.T``
            leaves it. For a few dozen queries that product is up to three times as fast as ``query @ keys.T``.
        even: Whether equal rows of the right operand give equal numbers. The libraries behind a product have other
            kernels, which round otherwise, for its last columns and for small products: then it is padded. Blocks that
            are not a multiple of 32 rows are short, see `Scan.tiles`.
    """

    def __init__(self, tall: bool = False, even: bool = False) -> None:
        self._tall, self._even = tall, even
        self._memory = _Memory()

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


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:  # (g, b, x), (n, b, C), (n, C, x)
    """Add ``left @ right`` to ``total``, in sums over at most `SUM_ROWS` rows.

    With one group there may be n > 1 partitions of its rows. Not by `torch.baddbmm`, which may add each term to what is
    there.
    """
    if len(left) > len(total):
        total += torch.bmm(left, right).sum(0, keepdim=True, dtype=total.dtype)
        return
    count = right.shape[1]
    if count <= SUM_ROWS:
        total += torch.bmm(left, right)
        return
    whole = count - count % SUM_ROWS
    for into, weights, rows in zip(total, left, right, strict=True):
        if whole:
            runs = weights[:, :whole].unflatten(-1, (-1, SUM_ROWS)).transpose(0, 1)  # (runs, b, SUM_ROWS)
            into += torch.bmm(runs, rows[:whole].unflatten(0, (-1, SUM_ROWS))).sum(0, dtype=into.dtype)
        if whole < count:
            into += weights[:, whole:] @ rows[whole:]


def _put_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:  # (n, c, x), (n, c, b), (n, b, x)
    """Write ``left @ right`` to ``total`` if it is the first product there, else add it."""
    if first:
        total.baddbmm_(left, right, beta=0.0)
    else:
        total += torch.bmm(left, right)


def _product_in_runs(left: Tensor, right: Tensor) -> Tensor:  # (*G, b, C), (*G, C, x) -> (*G, b, x)
    """``left @ right``, in sums over at most `SUM_ROWS` rows."""
    if right.shape[-2] <= SMALL_SUM:
        return left @ right
    check_not_batched([left, right])
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    _add_product(*(tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in (total, left, right)))
    return total


def _is_tall(queries: int, width: int) -> bool:
    """Which way round the product of so many queries of a width is faster; measured on CPUs."""
    return 12 <= queries <= 48 or (width >= 256 and 4 <= queries <= 48)


def _exponentials(scores: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:  # (g, b, C), (g, b)
    """exp(scores − shift), in place where the dtype allows; no shift is 0.

    What is close to underflow, as most weights are when the softmax is peaked, becomes 0: torch's exp is a hundred
    times slower where its result underflows, and a product with denormal numbers is slow, too. Scores that need no
    shift cannot underflow.
    """
    if shift is None:
        return scores.to(dtype).exp_()
    exponents = scores.sub_(shift.unsqueeze(-1)).to(dtype)
    return _cut(exponents.clamp_(min=math.log(SMALLEST_WEIGHT[dtype]) - 1).exp_())


def _cut(weights: Tensor) -> Tensor:
    """``weights`` with 0 for what is close to underflow, in place."""
    return torch.threshold_(weights, SMALLEST_WEIGHT[weights.dtype], 0.0)


def is_narrow(values: Tensor, answer: torch.dtype) -> bool:
    """Whether a blend of ``values`` may be multiplied as they are, for an answer in a dtype; the scores never are.

    For bfloat16 both times, on a processor that multiplies it faster than float32: two to four times. The weights are
    rounded then, each by up to 2^-9, beside an answer that is rounded by as much; so no gradient should depend on it.
    """
    both = values.dtype == answer == torch.bfloat16 and values.device.type == "cpu" and not torch.is_grad_enabled()
    return both and _multiplies_bfloat16()


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _finite_or_zero(largest: Tensor) -> Tensor:
    """``largest`` with 0 for -inf: subtracting it from scores that are all -inf leaves them so."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


class BestRows(NamedTuple):
    """The k best rows of each query, best first; (G B, k), without gradient.

    Attributes:
        scores: Their scores, -inf where there were fewer.
        weights: Their share of the softmax, 0 where there were fewer.
        rows: Their numbers, -1 where there were fewer.
    """

    scores: Tensor
    weights: Tensor
    rows: Tensor


class _Blend(NamedTuple):
    """What an exact read comes to.

    Attributes:
        values: The weighted mean of the values, (G B, dv).
        lse: The log-sum-exp, (G B,).
        total: The sum of exp(score − shift), 1 where there was nothing, (G, B).
        shift: (G, B); None for 0.
        best: The best rows, if they were asked for.
        seen: What a rule showed each query, as one number.
    """

    values: Tensor
    lse: Tensor
    total: Tensor
    shift: Tensor | None
    best: BestRows | None
    seen: Tensor | None


def _read_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, scan: Scan, k: int, tiling: Tiling, *, shifted: bool = False
) -> _Blend:
    """One block of rows after the other, in tiles that fit in cache; with a shift once needed, or from the start."""
    count, height = query.shape[:2]
    shape = (count, height)
    total = query.new_zeros(shape, dtype=scan.dtype)
    blend = query.new_zeros((*shape, values.shape[-1]), dtype=scan.dtype)
    shift: Tensor | None = None  # a running maximum, once it is needed
    lowest = query.new_zeros(())
    best = _Best(count, height, k, scan.dtype, query.device) if k else None
    product = _Product(tiling.tall, tiling.even)
    key_rows, value_rows = _Rows(keys, scan.dtype), _Rows(values, values.dtype if scan.narrow else scan.dtype)
    bound_of = scan.bound(query)
    # What a rule showed each query, to be compared in backward.
    seen = None if scan.selection.rule is None else query.new_zeros(height, dtype=torch.int64)
    for groups, block, slices in scan.tiles(tiling, count, height):
        rows = key_rows.block(groups, block)  # (g, C, d)
        operand = scan.operand(rows)  # (g, C, w)
        block_values = value_rows.block(groups, block)  # (g, C, dv)
        if seen is not None:
            seen += block.fingerprint()
        bound = bound_of(operand)
        if shift is None and (shifted or not bound <= UNSHIFTED):  # nor if it is NaN
            shift = query.new_zeros(shape).masked_fill_(total == 0, -torch.inf)
        parts = scan.partitions(tiling, groups, block)
        operand, block_values = _split(operand, parts), _split(block_values, parts)
        for queries in slices:
            scores = product(_repeated(query[groups, queries], parts), operand)  # (n, b, c), n groups or partitions
            scan.disturb(scores, block, groups, queries)
            if not bound < LARGEST:  # an infinite key may give a score of -inf, which would pass for hidden
                block.hide(scores, groups, queries, torch.inf)
                lowest = torch.minimum(lowest, scores.amin())
            if best is not None or shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            if best is not None:
                best.add(scores.to(scan.dtype), groups, queries, block)
            if shift is None:
                weights = _exponentials(scores, None, scan.dtype)
                block.hide(weights, groups, queries, 0.0)
            else:
                before, highest = shift[groups, queries], scores.amax(-1)
                after = torch.maximum(before, highest.amax(0, keepdim=True) if parts > 1 else highest)
                finite = _finite_or_zero(after)
                weights = _exponentials(scores, finite, scan.dtype)
                scale = (before - finite).to(scan.dtype).exp_()
                before.copy_(after)
                total[groups, queries] *= scale
                blend[groups, queries] *= scale.unsqueeze(-1)
            sums = weights.sum(-1)
            total[groups, queries] += sums.sum(0, keepdim=True) if parts > 1 else sums
            _add_product(blend[groups, queries], weights.to(block_values.dtype), block_values)
    shift = None if shift is None else _finite_or_zero(shift)
    lse = total.flatten().log()
    if shift is not None:
        lse = (lse + shift.flatten()).to(lse.dtype)
    check_scores(torch.where(lowest == -torch.inf, torch.nan, lse), empty=True)
    total.masked_fill_(total == 0, 1.0)
    found = None
    if best is not None:
        relative = None if shift is None else shift.to(scan.dtype)
        shares = _exponentials(best.scores.clone(), relative, scan.dtype).div_(total.unsqueeze(-1))
        found = BestRows(*(tensor.flatten(0, 1) for tensor in (best.scores, shares, best.rows)))
    return _Blend(blend.flatten(0, 1) / total.flatten().unsqueeze(-1), lse, total, shift, found, seen)


def _split(rows: Tensor, parts: int) -> Tensor:  # (g, C, d) -> (parts, C / parts, d)
    """The rows of a block, as partitions if there is more than one."""
    return rows.view(parts, -1, rows.shape[-1]) if parts > 1 else rows


def _repeated(queries: Tensor, parts: int) -> Tensor:  # (g, b, d) -> (parts, b, d)
    """Queries, to meet every partition of the rows."""
    return queries.expand(parts, -1, -1) if parts > 1 else queries


def _read_surely(
    query: Tensor, keys: Tensor, values: Tensor, scan: Scan, groups: int, k: int, tiling: Tiling
) -> _Blend:
    """`_read_in_blocks`, again with a shift where it cannot be trusted without."""
    query, keys, values = _grouped(groups, query), _grouped(groups, keys), _grouped(groups, values)
    with suppress(NonFiniteError):
        read = _read_in_blocks(query, keys, values, scan, k, tiling)
        if read.shift is not None or (_is_plausible(read.lse, scan.selection) and _is_sizable(read)):
            return read
    # Somebody wrote to the keys and did not say so, or they are not finite indeed, or values are huge or tiny.
    return _read_in_blocks(query, keys, values, replace(scan, key_norm=None), k, tiling, shifted=True)


def _is_sizable(read: _Blend) -> bool:
    """Whether the products of exponentials and values neither overflowed nor came close to underflow."""
    if read.values.numel() == 0:
        return True
    sums = (read.values.abs().amax(-1) * read.total.flatten()).masked_fill(read.lse == -torch.inf, 1.0)
    return bool((sums >= 2**17 * SMALLEST_WEIGHT[sums.dtype]).all()) and is_finite(read.values)


def _is_plausible(lse: Tensor, selection: Selection) -> bool:
    """Whether the log-sum-exp of scores that need no shift is one."""
    if lse.numel() == 0 or selection.count == 0:
        return True
    lowest, highest = -UNSHIFTED - 1, UNSHIFTED + math.log(selection.count) + 1
    fits = (lse >= lowest) & (lse <= highest)
    if not selection.shows_some_to_all:
        fits |= lse == -torch.inf
    return bool(fits.all())


class _ExactRead(torch.autograd.Function):
    """softmax(query @ keys.T) @ values and its log-sum-exp, with the best rows beside them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scan: Scan, groups: int, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        # Gradients of rows take memory too, where they cannot be written in place.
        copied = scan.copied(keys, values) * (1 + any(ctx.needs_input_grad[1:3]))
        if k:  # wide blocks with their gradients would leave the cache between two slices of queries
            copied = max(copied, (keys.shape[-1] + values.shape[-1]) // 2)
        tiling = scan.tiling(_grouped(groups, query), copied, k)
        read = _read_surely(query, keys, values, scan, groups, k, tiling)
        total, shift = read.total, read.shift
        if total.numel():
            # Backward divides the gradients by the total: a large one would drive small gradients to underflow.
            smallest, largest = total.aminmax()
            if float(smallest) < 1 / COMFORTABLE_TOTAL or float(largest) > COMFORTABLE_TOTAL:
                more = total.log()
                wide = widest_dtype(total.device)
                total = (total.to(wide) * more.to(wide).neg().exp()).to(total.dtype)
                shift = more if shift is None else shift + more
        ctx.scan, ctx.groups, ctx.tiling = scan, groups, tiling
        ctx.save_for_backward(*_Saved(query, keys, values, read.values, total, shift, read.seen, scan.selection.mask))
        ctx.set_materialize_grads(False)
        return read.values, read.lse, read.best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        saved = _Saved(*ctx.saved_tensors)  # once: activation checkpointing allows no second look
        results: list[Tensor | None] = [None, None, None]
        if grads[0] is not None or grads[1] is not None:
            with torch.no_grad(), full_precision(saved.query.device):
                results = _gradients_in_blocks(
                    saved, ctx.scan, ctx.groups, ctx.tiling, grads[0], grads[1], ctx.needs_input_grad
                )
        return *_once_only(results, *saved[:3], *grads), None, None, None


def _grouped(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x)
    if groups == 1:
        return tensor.unsqueeze(0)
    return tensor.reshape(groups, len(tensor) // max(1, groups), *tensor.shape[1:])


class _Saved(NamedTuple):
    """What backward needs, as in `_Blend`.

    Not the log-sum-exp: beside a score of 10,000 it has lost the digits that make the weights sum to 1. The mask is
    among it for torch to notice when it is written to.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    blend: Tensor
    total: Tensor
    shift: Tensor | None
    seen: Tensor | None
    mask: Tensor | None


def _gradients_in_blocks(
    saved: _Saved,
    scan: Scan,
    group_count: int,
    tiling: Tiling,
    grad_blend: Tensor | None,
    grad_lse: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of query, keys and values: d score = weight · (grad_blend · value − grad_blend · blend + grad_lse)."""
    query, keys, values, blend = (_grouped(group_count, tensor) for tensor in saved[:4])
    total, shift, seen = saved.total, saved.shift, saved.seen
    grad_blend = None if grad_blend is None else _grouped(group_count, grad_blend)
    grad_lse = None if grad_lse is None else _grouped(group_count, grad_lse)
    needs_query, needs_keys, needs_values = needs[:3]
    needs_values = needs_values and grad_blend is not None
    count, height = query.shape[:2]
    grad_query = torch.zeros_like(query) if needs_query else None
    grad_keys = _empty_gradient(keys, scan, height) if needs_keys else None
    grad_values = _empty_gradient(values, scan, height) if needs_values else None
    # The division by the total is done to the small factors.
    delta = torch.zeros_like(total) if grad_lse is None else -grad_lse
    if grad_blend is not None:
        delta = (delta + (grad_blend * blend).sum(-1)) / total
        grad_blend = grad_blend / total.unsqueeze(-1)
    else:
        delta = delta / total
    product, value_product = _Product(tiling.tall, tiling.even), _Product(tiling.tall)
    key_rows, value_rows = _Rows(keys, scan.dtype), _Rows(values, scan.dtype)
    again = None if seen is None else torch.zeros_like(seen)
    for groups, block, slices in scan.tiles(tiling, count, height):
        rows = key_rows.block(groups, block)  # (g, C, d)
        operand = scan.operand(rows)  # (g, C, w)
        block_values = value_rows.block(groups, block)  # (g, C, dv)
        if again is not None:
            again += block.fingerprint()
        parts = scan.partitions(tiling, groups, block)
        operand, block_values = _split(operand, parts), _split(block_values, parts)
        grad_operand = None if grad_keys is None else _room(grad_keys, groups, block, operand)
        grad_block_values = None if grad_values is None else _room(grad_values, groups, block, block_values)
        for queries in slices:
            first = queries.start == 0
            part = _repeated(query[groups, queries], parts)
            scores = product(part, operand)  # (n, b, c), as forward made them
            scan.disturb(scores, block, groups, queries)
            if shift is not None:
                block.hide(scores, groups, queries, -torch.inf)
            weights = _exponentials(scores, None if shift is None else shift[groups, queries], scan.dtype)
            if shift is None:
                block.hide(weights, groups, queries, 0.0)
            upstream = None if grad_blend is None else _repeated(grad_blend[groups, queries], parts)
            if grad_block_values is not None and upstream is not None:
                _put_product(grad_block_values, weights.mT, upstream, first)
            if not (needs_query or needs_keys):
                continue
            minus = delta[groups, queries].unsqueeze(-1)
            if upstream is None:
                grad_scores = weights.mul_(-minus)
            else:
                grad_scores = value_product(upstream, block_values).sub_(minus).mul_(weights)
            grad_scores = grad_scores.to(query.dtype)
            if grad_query is not None:
                _add_product(grad_query[groups, queries], grad_scores, operand)
            if grad_operand is not None:
                _put_product(grad_operand, grad_scores.mT, part, first)
        if grad_keys is not None and grad_operand is not None:
            grad_operand = grad_operand.view(-1, block.count, grad_operand.shape[-1])
            _write(grad_keys, groups, block, scan.operand_backward(grad_operand, rows))
        if grad_values is not None and grad_block_values is not None:
            _write(grad_values, groups, block, grad_block_values.view(-1, block.count, values.shape[-1]))
    if seen is not None and again is not None:
        _check_again(seen, again)
    return [None if grad is None else grad.flatten(0, 1) for grad in (grad_query, grad_keys, grad_values)]


def _check_again(seen: Tensor, again: Tensor) -> None:
    if not torch.equal(seen, again):
        raise StaleReadError(
            "where: the callable gives another answer in backward than it gave in forward, so gradients would be "
            "wrong; do not change the tensors it uses between a read and its backward"
        )


def _empty_gradient(table: Tensor, scan: Scan, queries: int) -> Tensor:
    """Memory for a gradient; 0 for every row that no block covers."""
    selection = scan.selection
    if queries == 0 or selection.shared is not None or selection.visit is not None:
        return torch.zeros_like(table)
    gradient = torch.empty_like(table)
    gradient[:, selection.count :] = 0.0
    return gradient


def _room(table: Tensor, groups: slice, block: Block, like: Tensor) -> Tensor:
    """Memory like ``like``, not filled: where a block lies in ``table`` if that is possible."""
    if (
        isinstance(block.rows, slice)
        and len(table) == 1
        and (table.dtype, table.shape[-1]) == (like.dtype, like.shape[-1])
    ):
        return table[groups, block.rows].view_as(like)
    return torch.empty_like(like)


def _write(table: Tensor, groups: slice, block: Block, part: Tensor) -> None:
    if isinstance(block.rows, slice):
        place = table[groups, block.rows]
        if place.data_ptr() != part.data_ptr():
            place.copy_(part)
    else:
        table[groups].index_copy_(1, block.rows, part.to(table.dtype))


class _OnceOnly(torch.autograd.Function):
    """Its first argument, with a graph in which a second derivative is an error rather than silently zero."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise SecondDerivativeError(
            "an exact read has no second derivative; for a few rows, use softdb.functional.topk_read with all of them "
            "as candidates, which has"
        )


def _once_only(results: list[Tensor | None], *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of a read, in a graph that refuses a second derivative if one is being made."""
    if not torch.is_grad_enabled():
        return results
    given = [tensor for tensor in inputs if tensor is not None]
    return [None if result is None else _OnceOnly.apply(result, *given) for result in results]  # type: ignore[no-untyped-call]


# -- exact read of few rows ------------------------------------------------------------------------------


class _DenseRead(torch.autograd.Function):
    """The same as `_ExactRead`, where all scores make one small tile: made at once, and the weights are kept.

    For one group the tensors have no dimension for groups.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scan: Scan, groups: int, block: Block, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        blend, lse, best, weights = _read_densely(query, keys, values, scan, groups, block, k)
        ctx.scan, ctx.groups, ctx.block = scan, groups, block
        ctx.seen = None if scan.selection.rule is None else block.fingerprint()
        # Not with the rest: to activation checkpointing, weights of another size would be an error of its own, though
        # appending rows between a read and its backward is fine.
        ctx.weights = weights
        ctx.save_for_backward(query, keys, values, blend, scan.selection.mask)
        ctx.set_materialize_grads(False)
        return blend, lse, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        query, keys, values, blend, _ = ctx.saved_tensors
        grad_blend, grad_lse = grads[:2]
        scan, block, weights, groups = ctx.scan, ctx.block, ctx.weights, ctx.groups
        needs_query, needs_keys, needs_values = ctx.needs_input_grad[:3]
        grad_query = grad_keys = grad_values = None
        if grad_blend is None and grad_lse is None:
            return (None,) * 7
        if ctx.seen is not None:
            _check_again(ctx.seen, scan.selection.block(0, scan.selection.count).fingerprint())
        with torch.no_grad(), full_precision(query.device):
            if needs_values and grad_blend is not None:
                grad_rows = _product_in_runs(weights.mT, _by_group(groups, grad_blend))
                grad_values = _spread(values, groups, block, grad_rows)
            if needs_query or needs_keys:
                grad_scores = weights
                if grad_blend is not None:
                    delta = (grad_blend * blend).sum(-1, keepdim=True)
                    if grad_lse is not None:
                        delta -= grad_lse.unsqueeze(-1)
                    block_values = _cast(_rows(values, groups, block), scan.dtype)
                    grad_scores = _pairwise(_by_group(groups, grad_blend), block_values)
                    grad_scores = grad_scores.sub_(_by_group(groups, delta)).mul_(weights)
                elif grad_lse is not None:
                    grad_scores = weights * _by_group(groups, grad_lse.unsqueeze(-1))
                grad_scores = _cast(grad_scores, query.dtype)
                rows = _rows(keys, groups, block)
                if needs_query:
                    grad_query = _flat(groups, _product_in_runs(grad_scores, scan.operand(rows)))
                if needs_keys:
                    grad_operand = _product_in_runs(grad_scores.mT, _by_group(groups, query))
                    grad_keys = _spread(keys, groups, block, scan.operand_backward(grad_operand, rows))
        results = _once_only([grad_query, grad_keys, grad_values], query, keys, values, *grads)
        return *results, None, None, None, None


def _read_densely(
    query: Tensor, keys: Tensor, values: Tensor, scan: Scan, groups: int, block: Block, k: int
) -> tuple[Tensor, Tensor, BestRows | None, Tensor]:
    """Blend, log-sum-exp, best rows and weights."""
    operand = scan.operand(_rows(keys, groups, block))
    query = _by_group(groups, query)
    if k:
        scores = _Product(even=True)(*((query[None], operand[None]) if groups == 1 else (query, operand)))
        scores = scores[0] if groups == 1 else scores
    else:
        scores = _pairwise(query, operand)
    if scan.noise is not None:
        tiles = scores if groups > 1 else scores.unsqueeze(0)
        scan.disturb(tiles, block, slice(0, groups), slice(0, tiles.shape[1]))
    if not is_finite(scores):
        _hide_all(scores, block, 0.0)
        check_scores(scores)
    if block.hides:
        _hide_all(scores, block, -torch.inf)
    # Along whichever dimension lies that way in memory.
    weights = torch.softmax(scores, -1) if scores.is_contiguous() else torch.softmax(scores.mT, -2).mT
    if block.count > SMALL_SUM:  # torch adds up the exponentials of a row one after the other
        weights /= weights.sum(-1, keepdim=True)
    lse = scores.amax(-1) - weights.amax(-1).log()
    if block.hides:
        nothing = lse.isnan()
        weights.masked_fill_(nothing.unsqueeze(-1), 0.0)
        lse.masked_fill_(nothing, -torch.inf)
    if scores.dtype != scan.dtype:
        lse, weights = lse.to(scan.dtype), weights.to(scan.dtype)
    weights = _cut(weights)
    blend = _flat(groups, _product_in_runs(weights, _cast(_rows(values, groups, block), scan.dtype)))
    lse = _flat(groups, lse)
    if k == 0:
        return blend, lse, None, weights
    found, columns, rows = _best_of_block(_cast(scores, scan.dtype), block, k)
    shares = F.pad(weights.gather(-1, columns), (0, k - columns.shape[-1]))
    best = BestRows(_flat(groups, found), _flat(groups, shares), _flat(groups, rows))
    return blend, lse, best, weights


def _best_of_block(scores: Tensor, block: Block, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (..., k) of the best rows, their columns (..., up to k), and their slots (..., k)."""
    found, columns = top_of_block(scores, k)
    rows = block.slots(columns).masked_fill_(found == -torch.inf, -1)
    missing = (0, k - columns.shape[-1])
    if missing[1]:
        found, rows = F.pad(found, missing, value=-torch.inf), F.pad(rows, missing, value=-1)
    return found, columns, rows


def _pairwise(left: Tensor, right: Tensor) -> Tensor:  # (..., b, d), (..., C, d) -> (..., b, C)
    """``left @ right.mT``, whichever way round is faster."""
    return (right @ left.mT).mT if _is_tall(left.shape[-2], left.shape[-1]) else left @ right.mT


def _by_group(groups: int, tensor: Tensor) -> Tensor:  # (G n, *x) -> (G, n, *x), or (n, *x) for one group
    return tensor if groups == 1 else _grouped(groups, tensor)


def _flat(groups: int, tensor: Tensor) -> Tensor:
    """The inverse of `_by_group`; not a view, since those cannot be written to in place."""
    return tensor if groups == 1 else tensor.flatten(0, 1).clone()


def _rows(table: Tensor, groups: int, block: Block) -> Tensor:  # (G N, d) -> (G, C, d)
    table = _by_group(groups, table)
    if isinstance(block.rows, Tensor):
        return table.index_select(-2, block.rows)
    return table if block.count == table.shape[-2] else table.narrow(-2, block.rows.start, block.count)


def _spread(table: Tensor, groups: int, block: Block, part: Tensor) -> Tensor:  # (G, C, d) -> (G N, d)
    """The gradient of a table, from that of the rows of a block."""
    part = _cast(part, table.dtype)
    if isinstance(block.rows, slice) and part.numel() == table.numel():
        return _flat(groups, part)
    gradient = torch.zeros_like(table)
    rows = _by_group(groups, gradient)
    if isinstance(block.rows, slice):
        rows.narrow(-2, block.rows.start, block.count).copy_(part)
    else:
        rows.index_copy_(-2, block.rows, part)
    return gradient


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _hide_all(scores: Tensor, block: Block, value: float) -> None:
    grouped = scores if scores.dim() == 3 else scores.unsqueeze(0)
    block.hide(grouped, slice(0, grouped.shape[0]), slice(0, grouped.shape[1]), value)


# -- exact read, of any size -----------------------------------------------------------------------------


def exact_read(
    query: Tensor,  # (G B, operand width)
    keys: Tensor,  # (G N, d)
    values: Tensor,  # (G N, dv)
    scan: Scan,
    groups: int = 1,
    k: int = 0,
) -> tuple[Tensor, Tensor, BestRows | None]:  # (G B, dv), (G B,)
    """``softmax(query @ keys.T) @ values`` and ``logsumexp(query @ keys.T)``, and the best k rows, for each group.

    Neither the (B, N) scores nor the weights are held, forward or backward, unless they are few.

    Args:
        query: Prepared queries.
        keys: Keys as stored.
        values: Values as stored.
        scan: How they meet.
        groups: G.
        k: How many of the best rows to report too; 0 for none.

    Returns:
        The blend and the log-sum-exp, both differentiable; the best rows, or None if k is 0.

    Raises:
        NonFiniteError: A score overflowed, or keys hold NaN.
    """
    wanted = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad)
    block = _small_block(len(query), scan, scan.copied(keys, values), k)
    result: tuple[Tensor, Tensor, BestRows | None]
    if block is not None:
        if not wanted:
            return _read_densely(query, keys, values, scan, groups, block, k)[:3]
        result = _DenseRead.apply(query, keys, values, scan, groups, block, k)  # type: ignore[no-untyped-call]
    else:
        if not wanted:
            tiling = scan.tiling(_grouped(groups, query), scan.copied(keys, values), k)
            read = _read_surely(query, keys, values, scan, groups, k, tiling)
            return read.values, read.lse, read.best
        result = _ExactRead.apply(query, keys, values, scan, groups, k)  # type: ignore[no-untyped-call]
    return result


def _small_block(queries: int, scan: Scan, copied: int, k: int) -> Block | None:
    """All rows as one block, if that makes a small tile for so many queries and little has to be copied."""
    count = scan.selection.count
    if not 0 < queries * count <= SMALL_SCORES or count * copied > COPIED_ELEMENTS:
        return None
    if k and count % GROUP and count > FEW_ROWS:  # it would have to be padded
        return None
    return scan.selection.block(0, count)


def check_scores(scores: Tensor, *, empty: bool = False) -> None:
    """Raise if a score is NaN or infinite; with ``empty``, -inf passes: the log-sum-exp of nothing."""
    if is_finite(scores) or (empty and bool((scores < torch.inf).all())):
        return
    raise NonFiniteError(
        "query, keys, temperature: expected finite scores, got NaN or infinity; the rows hold NaN (did training "
        "diverge?), or query times key divided by temperature overflows: rescale them"
    )


# -- reads of a few rows ---------------------------------------------------------------------------------


class Places:
    """Rows of a table, by number, -1 at padding: (M, k), to be gathered from one table or several."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.missing = numbers < 0
        self.padded = bool(self.missing.any())

    @property
    def valid(self) -> Tensor:
        """Numbers that can be looked up, 0 at padding."""
        return self.numbers.clamp(min=0) if self.padded else self.numbers

    @kept_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """Each number once, ascending, and which of them each entry is; without padding, flat."""
        rows, place = self.numbers[~self.missing].unique(return_inverse=True)
        return rows, place


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        ctx.places = places
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        return _gather(table, places, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        places = ctx.places
        rows, place = places.distinct
        grad = grads[0][~places.missing] if places.padded else grads[0].flatten(0, -2)
        summed = grad.new_zeros(len(rows), ctx.table_shape[-1]).index_add(0, place, grad)
        return row_sparse(rows, summed.to(ctx.table_dtype), ctx.table_shape), None, None


def _gather(table: Tensor, places: Places, dtype: torch.dtype) -> Tensor:  # (N, d), (M, k) -> (M, k, d)
    """``table[places]``, 0 at padding: nothing that stands in some row there may come through, be it NaN."""
    rows = table.index_select(0, places.valid.flatten()).view(*places.numbers.shape, table.shape[-1]).to(dtype)
    return rows.masked_fill(places.missing.unsqueeze(-1), 0.0) if places.padded else rows


def gather_rows(table: Tensor, places: Places, dtype: torch.dtype, *, sparse: bool) -> Tensor:
    """``table[places].to(dtype)``, 0 at padding; with ``sparse`` the gradient is a coalesced COO of the rows read."""
    if sparse and table.requires_grad and torch.is_grad_enabled():
        rows: Tensor = _GatherRows.apply(table, places, dtype)  # type: ignore[no-untyped-call]
        return rows
    return _gather(table, places, dtype)


def gathered_scores(query: Tensor, keys: Tensor, scan: Scan) -> Tensor:  # (M, w), (M, k, d) -> (M, k)
    """Scores of prepared queries with each its own k keys, differentiable; equal keys have equal scores."""
    return _row_products(scan.operand(keys), query).to(scan.dtype)


def scores_at(query: Tensor, keys: Tensor, numbers: Tensor, scan: Scan) -> Tensor:  # (M, w), (N, d) -> (M, k)
    """Scores of prepared queries with the keys at (M, k) ``numbers``, -inf at -1; no gradient, and no (M, k, d)."""
    scores = query.new_empty(numbers.shape, dtype=scan.dtype)
    for part, rows in _gathered(keys, numbers.clamp(min=0)):
        scores[part] = gathered_scores(query[part], rows, scan)
    return scores.masked_fill_(numbers < 0, -torch.inf)


def products_at(query: Tensor, table: Tensor, numbers: Tensor) -> Tensor:  # (M, d), (N, d), (M, k) -> (M, k)
    """Products of queries with the rows at ``numbers``, none of them -1; no gradient, and no (M, k, d)."""
    products = query.new_empty(numbers.shape)
    for part, rows in _gathered(table, numbers):
        products[part] = _row_products(rows.to(query.dtype), query[part])
    return products


def _row_products(rows: Tensor, query: Tensor) -> Tensor:  # (M, k, d), (M, d) -> (M, k)
    """Products of queries with each its own rows.

    Not by `torch.bmm`, which may round the last of an odd number of rows differently, so that equal rows would not tie.
    The bits of this sum depend on the width alone.
    """
    return (rows * query.unsqueeze(1)).sum(-1)


def _gathered(table: Tensor, numbers: Tensor) -> Iterator[tuple[slice, Tensor]]:  # (N, d), (M, k)
    """``table[numbers]``, a few queries' (m, k, d) at a time, in memory that is used again."""
    count, k = numbers.shape
    step = max(1, GATHER_ELEMENTS // max(1, k * table.shape[-1]))
    buffer = table.new_empty(min(step, count) * k, table.shape[-1])
    for start in range(0, count, step):
        part = slice(start, start + step)
        wanted = numbers[part].flatten()
        rows = torch.index_select(table, 0, wanted, out=buffer[: len(wanted)])
        yield part, rows.view(-1, k, table.shape[-1])


def blend_at(weights: Tensor, values: Tensor, numbers: Tensor) -> Tensor:  # (M, k), (N, dv), (M, k) -> (M, dv)
    """The weighted sum of the values at ``numbers``, none of them -1; no gradient, and no (M, k, dv)."""
    count, k = numbers.shape
    if values.dtype == weights.dtype and k <= SUM_ROWS:
        return F.embedding_bag(numbers, values, per_sample_weights=weights, mode="sum")
    if values.dtype == weights.dtype:
        starts = torch.arange(0, k, SUM_ROWS, device=numbers.device)
        bags = (torch.arange(count, device=numbers.device).unsqueeze(-1) * k + starts).flatten()
        flat = weights.flatten()
        sums = F.embedding_bag(numbers.flatten(), values, bags, per_sample_weights=flat, mode="sum")
        return sums.view(count, len(starts), values.shape[-1]).sum(1)
    blend = weights.new_empty(count, values.shape[-1])
    for part, rows in _gathered(values, numbers):
        blend[part] = weighted_sum(weights[part], rows.to(weights.dtype))
    return blend


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k, dv) -> (M, dv)
    """``(weights[..., None] * rows).sum(1)``, in sums over at most `SUM_ROWS` rows; differentiable."""
    sums = torch.bmm(weights[:, :SUM_ROWS].unsqueeze(1), rows[:, :SUM_ROWS]).squeeze(1)
    for start in range(SUM_ROWS, weights.shape[1], SUM_ROWS):
        run = slice(start, start + SUM_ROWS)
        sums = sums + torch.bmm(weights[:, run].unsqueeze(1), rows[:, run]).squeeze(1)
    return sums


def blend_back(
    gradient: Tensor,  # (M, dv)
    weights: Tensor,  # (M, k)
    values: Tensor,  # (N, dv)
    numbers: Tensor,  # (M, k)
    *,
    sparse: bool,
) -> Tensor:
    """The gradient of ``values`` in `blend_at`; no (M, k, dv). With ``sparse``, of the rows in ``numbers`` alone."""
    ordered, order = numbers.flatten().sort()
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    # Each row's gradient is a blend in turn, of what has come back to the queries that saw it.
    summed = F.embedding_bag(
        order // numbers.shape[1],
        gradient.contiguous(),
        counts.cumsum(0) - counts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    ).to(values.dtype)
    if sparse:
        return row_sparse(rows, summed, values.shape)
    return torch.zeros_like(values, memory_format=torch.contiguous_format).index_copy_(0, rows, summed)
