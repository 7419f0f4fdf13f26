"""The kernels: an exact read and an exact top-k, over blocks of rows.

Both make the scores of one block of rows at a time, (b, C) for a few queries, use them and forget them. A block adds
to three running numbers per query, the largest score m, the sum l of exp(score − m) and the blend o of the values;
when a block brings a larger score, l and o are scaled down by exp(m_old − m_new). This is the online softmax of
Milakov & Gimelshein 2018 (arXiv 1805.02867) and the tiling of FlashAttention (Dao et al. 2022, arXiv 2205.14135);
backward makes the scores again, and from them and the saved m and l the weights.

Shapes: G groups of B queries, each group over its own N rows. A store is one group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.errors import NonFiniteError, SecondDerivativeError, StaleReadError
from softdb.filters import Block, Selection
from softdb.scores import prepare_keys, prepare_keys_backward

__all__ = [
    "Scan",
    "check_scores",
    "exact_read",
    "exact_top_k",
    "full_precision",
    "gather_rows",
    "gathered_scores",
    "top_k",
]

# A tile of scores stays in the second-level cache beside the operands that made it.
TILE_ELEMENTS = 2**20
TILE_QUERIES = 256
# As many numbers of a block's rows are copied at a time, where they have to be: 8 MiB of float32.
COPIED_ELEMENTS = 2**21
# Few enough rows to be padded by a copy.
FEW_ROWS = 4096
# Below as many multiplications torch leaves a product to a kernel of its own.
SMALL_PRODUCT = 512
LOG2_E = math.log2(math.e)
# Two-stage top-k: the columns whose maximum stands for them.
GROUP = 32
# Up to this many groups for each row wanted, one pass is faster than two.
FEW_GROUPS = 32
# The group maxima of a pass, and the rows scored again, for as many queries at a time: 32 and 64 MiB.
MAXIMA_ELEMENTS, GATHER_ELEMENTS = 2**23, 2**24


@dataclass(frozen=True)
class Scan:
    """How queries meet rows: everything about an exact pass but the operands.

    Attributes:
        metric: Which metric the query was prepared for.
        centre: The point that l2 is expanded around, (d,).
        selection: Which rows each query may see.
        dtype: The dtype to compute in.
    """

    metric: str
    centre: Tensor | None
    selection: Selection
    dtype: torch.dtype

    def tiles(self, groups: int, queries: int, copied: int, k: int = 0) -> Iterator[tuple[slice, Block, list[slice]]]:
        """Groups × block of rows × slices of queries, such that a tile of scores fits in cache.

        Args:
            groups: G.
            queries: B.
            copied: How many numbers of each row of a block are copied: where they are, blocks are smaller.
            k: How many of the best rows are looked for in each tile: a tile for many is wide.
        """
        count = self.selection.count
        if groups == 0 or queries == 0 or count == 0:
            return
        height = min(queries, TILE_QUERIES if k == 0 else max(16, TILE_ELEMENTS // (8 * GROUP * k)))
        width = min(TILE_ELEMENTS // height, COPIED_ELEMENTS // max(1, copied))
        width = max(width // GROUP, 1) * GROUP
        depth = max(1, TILE_ELEMENTS // (height * min(width, count)))
        slices = [slice(start, min(start + height, queries)) for start in range(0, queries, height)]
        edges = list(range(0, count, width))
        if count % GROUP and count - edges[-1] > FEW_ROWS:
            edges.append(count - count % GROUP)  # a small last block, cheap to pad: see `_Buffer.product`
        edges.append(count)
        for first in range(0, groups, depth):
            for start, stop in itertools.pairwise(edges):
                block = self.selection.block(start, stop)
                if block is not None:
                    yield slice(first, min(first + depth, groups)), block, slices

    def copied(self, keys: Tensor, values: Tensor | None = None) -> int:
        """How many numbers of each row of a block are copied, since they are not used as they lie."""
        numbers = 0
        if self.selection.visit is not None or self.metric in ("cosine", "l2") or keys.dtype != self.dtype:
            numbers += keys.shape[-1] * (2 if self.metric == "l2" else 1)
        if values is not None and (self.selection.visit is not None or values.dtype != self.dtype):
            numbers += values.shape[-1]
        return numbers

    def keys(self, keys: Tensor, groups: slice, block: Block) -> Tensor:  # -> (g, C, operand width)
        """The prepared keys of a block."""
        return prepare_keys(rows_of(keys, groups, block), self.metric, self.centre, self.dtype)

    def keys_backward(self, grad: Tensor, keys: Tensor, groups: slice, block: Block) -> Tensor:  # -> (g, C, d)
        """The gradient of a block's keys, from that of its prepared keys."""
        return prepare_keys_backward(grad, rows_of(keys, groups, block), self.metric, self.centre)


def rows_of(table: Tensor, groups: slice, block: Block) -> Tensor:  # (G, N, d) -> (g, C, d)
    if isinstance(block.rows, slice):
        return table[groups, block.rows]
    return table[groups].index_select(1, block.rows)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast lowers nothing: scores and softmax need float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# -- exact top-k -----------------------------------------------------------------------------------------


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """``torch.topk(scores, k)``, except that among equal scores the lowest index wins and comes first."""
    width = scores.shape[-1]
    k = min(k, width)
    values, index = scores.topk(min(k + 1, width), dim=-1)
    if k < width:
        # Where the first score left out equals the last one kept, topk chose between them as it liked.
        cut = ((values[..., k - 1] == values[..., k]) & (values[..., k] > -torch.inf)).nonzero(as_tuple=True)
        values, index = values[..., :k], index[..., :k]
        if len(cut[0]):
            index = index.contiguous()
            index[cut] = scores[cut].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if k > 1:
        index = index.sort(dim=-1).values
        values = scores.gather(-1, index)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
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

    def add(self, scores: Tensor, groups: slice, queries: slice, rows: slice | Tensor) -> None:
        """Take in the scores of a block whose rows come after all that were taken in before."""
        values, columns = top_of_block(scores, self.k)
        found = columns + rows.start if isinstance(rows, slice) else rows[columns]
        found.masked_fill_(values == -torch.inf, -1)
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
        if scan.selection.count <= FEW_GROUPS * GROUP * k:
            return _top_k_in_one_pass(query, keys, scan, k)
        return _top_k_in_two_passes(query, keys, scan, k)


def _top_k_in_one_pass(query: Tensor, keys: Tensor, scan: Scan, k: int) -> tuple[Tensor, Tensor]:
    """The best of each tile, joined to the best so far."""
    batch = query.shape[1]
    best = _Best(1, batch, k, scan.dtype, query.device)
    buffer = _Buffer()
    for groups, block, slices in scan.tiles(1, batch, scan.copied(keys), k):
        operand = scan.keys(keys, groups, block)
        for queries in slices:
            scores = buffer.product(query[:, queries], operand, even=True)
            block.hide(scores, groups, queries)
            # Scores are compared as they are reported: two that round to one are a tie.
            best.add(scores.to(scan.dtype), groups, queries, block.rows)
    return best.scores[0], best.rows[0]


def _top_k_in_two_passes(query: Tensor, keys: Tensor, scan: Scan, k: int) -> tuple[Tensor, Tensor]:
    """The best score of every group of 32 rows, (B, N / 32); then the rows of the k best groups once more.

    Those hold the k best rows, as `top_of_block` argues. Worth while where these 32 k rows are few.
    """
    batch, count = query.shape[1], scan.selection.count
    height = max(1, MAXIMA_ELEMENTS * GROUP // count)
    parts = [slice(start, min(start + height, batch)) for start in range(0, batch, height)]
    scores = torch.full((batch, k), -torch.inf, dtype=scan.dtype, device=query.device)
    slots = torch.full((batch, k), -1, dtype=torch.int64, device=query.device)
    if batch == 0:
        return scores, slots
    found = torch.cat([_columns_of_best_groups(query, keys, scan, part, k) for part in parts])  # (B, 32 k)
    if scan.selection.visit is not None:
        found = torch.where(found < 0, found, scan.selection.visit[found.clamp(min=0)])
    found.masked_fill_(~scan.selection.allows(found), -1)
    step = max(1, GATHER_ELEMENTS // (found.shape[1] * keys.shape[-1]))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        again = gathered_scores(query[0, part], _gather(keys[0], found[part]), scan)
        scores[part], place = top_k(again.masked_fill_(found[part] < 0, -torch.inf), k)
        slots[part] = found[part].gather(-1, place).masked_fill_(scores[part] == -torch.inf, -1)
    return scores, slots


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
    buffer = _Buffer()
    for chunk, block, slices in scan.tiles(1, len(maxima), scan.copied(keys)):
        operand = scan.keys(keys, chunk, block)
        for queries in slices:
            whole = slice(part.start + queries.start, part.start + queries.stop)
            scores = buffer.product(query[:, whole], operand, even=True)
            block.hide(scores, chunk, whole)
            scores = scores[0].to(scan.dtype)
            first, even = block.start // GROUP, scores.shape[1] // GROUP
            maxima[queries, first : first + even] = scores[:, : even * GROUP].unflatten(1, (even, GROUP)).amax(-1)
            if even * GROUP < scores.shape[1]:
                maxima[queries, first + even] = scores[:, even * GROUP :].amax(-1)
    chosen = top_k(maxima, k)[1].sort(dim=-1).values
    columns = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=query.device)).flatten(1)
    return columns.masked_fill_(columns >= count, -1)


# -- exact read ------------------------------------------------------------------------------------------


class _Buffer:
    """Memory for one tile, used again for the next."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(
        self, left: Tensor, right: Tensor, *, even: bool = False
    ) -> Tensor:  # (g, b, d), (g, C, d) -> (g, b, C)
        """``left @ right.mT``; with ``even``, equal rows of ``right`` give equal numbers.

        The libraries behind a product have other kernels, which round otherwise, for its last columns and for small
        products: then it is padded. Blocks that are not a multiple of 32 rows are short, see `Scan.tiles`.
        """
        count = wanted = right.shape[1]
        if even:
            wanted = max(count, -(-SMALL_PRODUCT // (left.shape[1] * left.shape[2])))
            wanted += -wanted % GROUP
        if wanted > count:
            right = F.pad(right, (0, 0, 0, wanted - count))
        shape = (left.shape[0], left.shape[1], right.shape[1])
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = left.new_empty(size)
        return torch.bmm(left, right.mT, out=self._memory[:size].view(shape))[..., :count]


def _exponentials(scores: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:  # (g, b, C), (g, b)
    """exp(scores − shift), in place where the dtype allows.

    By exp2, since torch's exp is up to thirty times slower where its result underflows, as it does for most rows when
    the softmax is peaked. What is under 2^-100 becomes 0: a product with denormal numbers is slower still.
    """
    exponents = scores.sub_(shift.unsqueeze(-1)).to(dtype)
    return F.threshold(exponents.mul_(LOG2_E).exp2_(), 2.0**-100, 0.0, inplace=True)


def _finite_or_zero(largest: Tensor) -> Tensor:
    """``largest`` with 0 for -inf: subtracting it from scores that are all -inf leaves them so."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


class BestRows(NamedTuple):
    """The k best rows of each query, best first; (G, B, k), without gradient.

    Attributes:
        scores: Their scores, -inf where there were fewer.
        weights: Their share of the softmax, 0 where there were fewer.
        rows: Their numbers, -1 where there were fewer.
    """

    scores: Tensor
    weights: Tensor
    rows: Tensor


class _ExactRead(torch.autograd.Function):
    """softmax(query @ keys.T) @ values and its log-sum-exp, with the best rows beside them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, scan: Scan, k: int
    ) -> tuple[Tensor, Tensor, BestRows | None]:
        count, height = query.shape[:2]
        largest = query.new_full((count, height), -torch.inf)  # (G, B)
        total = query.new_zeros((count, height), dtype=scan.dtype)  # (G, B)
        blend = query.new_zeros((count, height, values.shape[-1]), dtype=scan.dtype)  # (G, B, dv)
        best = _Best(count, height, k, scan.dtype, query.device) if k else None
        buffer = _Buffer()
        # What a rule showed each query, to be compared in backward.
        seen = None if scan.selection.rule is None else query.new_zeros(height, dtype=torch.float64)
        for groups, block, slices in scan.tiles(count, height, scan.copied(keys, values), k):
            operand = scan.keys(keys, groups, block)  # (g, C, w)
            block_values = rows_of(values, groups, block).to(scan.dtype)  # (g, C, dv)
            if seen is not None:
                seen += block.fingerprint()
            for queries in slices:
                scores = buffer.product(query[groups, queries], operand, even=best is not None)  # (g, b, C)
                block.hide(scores, groups, queries)
                if best is not None:
                    best.add(scores.to(scan.dtype), groups, queries, block.rows)
                before = largest[groups, queries]
                after = torch.maximum(before, scores.amax(-1))
                shift = _finite_or_zero(after)
                weights = _exponentials(scores, shift, scan.dtype)
                scale = (before - shift).to(scan.dtype).exp_()
                largest[groups, queries] = after
                total[groups, queries] = total[groups, queries] * scale + weights.sum(-1)
                part = blend[groups, queries]
                part.mul_(scale.unsqueeze(-1))
                part += torch.bmm(weights, block_values)
        largest = _finite_or_zero(largest)
        lse = (largest + total.log()).to(scan.dtype)
        total.masked_fill_(total == 0, 1.0)
        blend /= total.unsqueeze(-1)
        ctx.scan = scan
        # Not the log-sum-exp: beside a score of 10,000 it has lost the digits that make the weights sum to 1. The mask
        # is saved for torch to notice when it is written to.
        ctx.save_for_backward(query, keys, values, blend, largest, total, seen, scan.selection.mask)
        ctx.set_materialize_grads(False)
        if best is None:
            return blend, lse, None
        weights = (best.scores - largest.to(scan.dtype).unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))
        return blend, lse, BestRows(best.scores, weights, best.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[:3]
        query, keys, values, blend, largest, total, seen, _ = ctx.saved_tensors
        with torch.no_grad(), full_precision(query.device):
            results = list(
                _exact_read_backward(
                    query, keys, values, blend, largest, total, seen, grads[0], grads[1], ctx.scan, needs
                )
            )
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in (query, keys, values, *grads) if tensor is not None]
            results = [result if result is None else _once_only(result, inputs) for result in results]
        return *results, None, None


def _exact_read_backward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blend: Tensor,
    largest: Tensor,
    total: Tensor,
    seen: Tensor | None,
    grad_blend: Tensor | None,
    grad_lse: Tensor | None,
    scan: Scan,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad_blend is None and grad_lse is None:
        return None, None, None
    needs_query, needs_keys, needs_values = needs
    grad_query = torch.zeros_like(query) if needs_query else None
    grad_keys = torch.zeros_like(keys) if needs_keys else None
    grad_values = torch.zeros_like(values) if needs_values and grad_blend is not None else None
    # d score = exp(score − largest) / total * (grad_blend · value − delta); the division is done to the small factors.
    delta = torch.zeros_like(total) if grad_lse is None else -grad_lse
    if grad_blend is not None:
        delta = (delta + (grad_blend * blend).sum(-1)) / total
        grad_blend = grad_blend / total.unsqueeze(-1)
    else:
        delta = delta / total
    buffer, value_buffer = _Buffer(), _Buffer()
    again = None if seen is None else torch.zeros_like(seen)
    copied = scan.copied(keys, values)
    copied += query.shape[-1] * needs_keys + values.shape[-1] * (grad_values is not None)
    for groups, block, slices in scan.tiles(query.shape[0], query.shape[1], copied):
        operand = scan.keys(keys, groups, block)  # (g, C, w)
        block_values = rows_of(values, groups, block).to(scan.dtype)  # (g, C, dv)
        if again is not None:
            again += block.fingerprint()
        grad_operand = torch.zeros_like(operand) if needs_keys else None
        grad_block_values = torch.zeros_like(block_values) if grad_values is not None else None
        for queries in slices:
            part = query[groups, queries]
            scores = buffer.product(part, operand)  # (g, b, C)
            block.hide(scores, groups, queries)
            weights = _exponentials(scores, largest[groups, queries], scan.dtype)
            if grad_block_values is not None and grad_blend is not None:
                grad_block_values.baddbmm_(weights.mT, grad_blend[groups, queries])
            if not (needs_query or needs_keys):
                continue
            minus_delta = -delta[groups, queries].unsqueeze(-1)
            if grad_blend is None:
                grad_scores = weights.mul_(minus_delta)
            else:
                grad_scores = value_buffer.product(grad_blend[groups, queries], block_values)
                grad_scores.add_(minus_delta).mul_(weights)
            grad_scores = grad_scores.to(query.dtype)
            if grad_query is not None:
                grad_query[groups, queries] += torch.bmm(grad_scores, operand)
            if grad_operand is not None:
                grad_operand.baddbmm_(grad_scores.mT, part)
        if grad_keys is not None and grad_operand is not None:
            _write(grad_keys, groups, block, scan.keys_backward(grad_operand, keys, groups, block))
        if grad_values is not None and grad_block_values is not None:
            _write(grad_values, groups, block, grad_block_values)
    if seen is not None and again is not None and not torch.equal(seen, again):
        raise StaleReadError(
            "where: the callable gives another answer in backward than it gave in forward, so gradients would be "
            "wrong; do not change the tensors it uses between a read and its backward"
        )
    return grad_query, grad_keys, grad_values


def _write(table: Tensor, groups: slice, block: Block, part: Tensor) -> None:
    if isinstance(block.rows, slice):
        table[groups, block.rows] = part
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
            "an exact read has no second derivative, since it keeps no weights to differentiate again; for a few rows "
            "use softdb.functional.topk_read with all of them as candidates, which has"
        )


def _once_only(result: Tensor, inputs: list[Tensor]) -> Tensor:
    refusing: Tensor = _OnceOnly.apply(result, *inputs)  # type: ignore[no-untyped-call]
    return refusing


def exact_read(
    query: Tensor, keys: Tensor, values: Tensor, scan: Scan, k: int = 0
) -> tuple[Tensor, Tensor, BestRows | None]:
    """``softmax(query @ keys.T) @ values`` and ``logsumexp(query @ keys.T)``, and the best k rows.

    Neither the (B, N) scores nor the weights are held, forward or backward.

    Args:
        query: Prepared queries, (G, B, operand width).
        keys: Keys as stored, (G, N, d).
        values: Values as stored, (G, N, dv).
        scan: How they meet.
        k: How many of the best rows to report too; 0 for none.

    Returns:
        The blend (G, B, dv) and the log-sum-exp (G, B), both differentiable; the best rows, or None if k is 0.

    Raises:
        NonFiniteError: A score overflowed, or keys hold NaN.
    """
    with full_precision(query.device):
        result: tuple[Tensor, Tensor, BestRows | None]
        result = _ExactRead.apply(query, keys, values, scan, k)  # type: ignore[no-untyped-call]
    everywhere = scan.selection.is_shared and scan.selection.shared_count > 0
    check_scores(result[1], some=everywhere)
    return result


def check_scores(lse: Tensor, *, some: bool = False) -> None:
    """Raise if a log-sum-exp says that a score was NaN or infinite; with ``some``, that all scores were."""
    lse = lse.detach()
    finite = lse < torch.inf
    if some:
        finite &= lse > -torch.inf
    if not bool(finite.all()):
        raise NonFiniteError(
            "query, keys, temperature: expected finite scores, got NaN or infinity; the rows hold NaN (did training "
            "diverge?), or query times key divided by temperature overflows: rescale them"
        )


# -- reads of a few rows ---------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        return _gather(table, slots).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slots,) = ctx.saved_tensors
        flat = slots.flatten()
        taken = flat >= 0
        rows, place = flat[taken].unique(return_inverse=True)
        summed = grads[0].new_zeros(len(rows), ctx.table_shape[-1])
        summed = summed.index_add(0, place, grads[0].flatten(0, -2)[taken])
        grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0),
            summed.to(ctx.table_dtype),
            ctx.table_shape,
            is_coalesced=True,  # unique() sorts
            check_invariants=False,
        )
        return grad, None, None


def _gather(table: Tensor, slots: Tensor) -> Tensor:  # (N, d), (*shape) -> (*shape, d)
    """``table[slots]``, 0 at -1: nothing that stands in some row there may come through, be it NaN."""
    rows = table.index_select(0, slots.clamp(min=0).flatten()).view(*slots.shape, table.shape[-1])
    missing = slots < 0
    return rows.masked_fill(missing.unsqueeze(-1), 0.0) if bool(missing.any()) else rows


def gather_rows(table: Tensor, slots: Tensor, dtype: torch.dtype, *, sparse: bool) -> Tensor:
    """``table[slots].to(dtype)``, 0 at -1; with ``sparse`` the gradient is a coalesced COO of the rows read."""
    if sparse and table.requires_grad and torch.is_grad_enabled():
        rows: Tensor = _GatherRows.apply(table, slots, dtype)  # type: ignore[no-untyped-call]
        return rows
    return _gather(table, slots).to(dtype)


def gathered_scores(query: Tensor, keys: Tensor, scan: Scan) -> Tensor:  # (M, w), (M, k, d) -> (M, k)
    """Scores of prepared queries with each its own k keys, differentiable."""
    operand = prepare_keys(keys, scan.metric, scan.centre, scan.dtype)
    return torch.bmm(operand, query.unsqueeze(-1)).squeeze(-1).to(scan.dtype)
