"""Exact top-k in two passes over the rows, in Triton.

The first pass computes all scores, and keeps only the maximum of each group of 64 rows, (B, N / 64). The k groups with
the best maxima contain the k best rows: see `softdb.kernels.blocks.topk.two_stage_top_k`. The second pass scores the
rows of the k groups again, and the best k of their 64 k scores are the result. The scores, (B, N), are never allocated.

Ties. Both passes combine a score and an index into one int64 number, the *rank*: the upper 32 bits are an integer with
the order of the score, the lower 32 bits are the index, counted down. All ranks of a query differ, so `torch.topk`,
which orders equal numbers arbitrarily, has one possible result, and ties go to the lowest index. Score and index are
recovered from the rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.blocks import topk as blocks
from softdb.kernels.cuda.launch import (
    MIN_BLOCK,
    choose_chunk,
    choose_precision,
    count_blocks,
    count_splits,
    is_interpreted,
    on_device,
    pad_width,
    with_unit_stride,
)
from softdb.kernels.cuda.metric import can_score, restore_query, score_rows
from softdb.kernels.spec import ReadSpec, disable_autocast

__all__ = ["exact_top_k", "find_best_rows"]

# Number of rows in a group.
GROUP_ROWS = 64

# Largest number of columns of float32 that tensor cores multiply at once: more do not fit in shared memory.
TENSOR_CORE_COLUMNS = 64

# Rows are numbered in 32 bits.
MAX_ROWS = 2**31 - 1


@triton.jit
def _rank(scores, index):  # float32, int64 -> int64
    """Combine scores and indices into ranks; NaN ranks first."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index)


@triton.jit
def _load_positions(slots, visible, positions, count, HAS_SLOTS: tl.constexpr, HAS_VISIBLE: tl.constexpr):
    """Return the slots at positions of a pass, and whether they are visible."""
    shown = positions < count
    rows = positions
    if HAS_SLOTS:
        rows = tl.load(slots + positions, mask=shown, other=0)
    if HAS_VISIBLE:
        shown = shown & (tl.load(visible + rows, mask=shown, other=0) != 0)
    return rows, shown


@triton.jit
def _rank_groups_kernel(
    query,  # (B, d) float32, or its upper half in the dtype of the keys
    low,  # (B, d) lower half
    scale,  # (B,)
    keys,  # (N, d)
    slots,  # (count,)
    visible,  # (N,)
    ranks,  # (B, groups)
    batch,
    count,
    groups,
    query_tiles,
    key_stride,
    WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rank some groups of rows by their best scores for a tile of queries."""
    program = tl.program_id(0)
    numbers = (program % query_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_query = numbers < batch
    numbers = numbers.to(tl.int64)
    first = (program // query_tiles) * GROUPS_PER_PROGRAM
    columns = tl.arange(0, BLOCK_D)
    if METRIC == "l2":
        scales = tl.load(scale + numbers, mask=is_query, other=0.0)
    elif BLOCK_COLUMNS == BLOCK_D:
        is_element = is_query[:, None] & (columns < WIDTH)[None, :]
        whole = tl.load(query + numbers[:, None] * WIDTH + columns[None, :], mask=is_element, other=0.0)
        if IS_SPLIT:
            rest = tl.load(low + numbers[:, None] * WIDTH + columns[None, :], mask=is_element, other=0.0)
    for step in range(tl.minimum(GROUPS_PER_PROGRAM, groups - first)):
        group = (first + step).to(tl.int64)
        positions = group * GROUP + tl.arange(0, GROUP)
        rows, shown = _load_positions(slots, visible, positions, count, HAS_SLOTS, HAS_VISIBLE)
        starts = keys + rows * key_stride
        scores = tl.zeros((BLOCK_Q, GROUP), tl.float32)
        if METRIC == "l2":
            for column in range(WIDTH):
                left = tl.load(query + numbers * WIDTH + column, mask=is_query, other=0.0)
                right = tl.load(starts + column, mask=shown, other=0.0).to(tl.float32)
                difference = left[:, None] - right[None, :]
                scores += difference * difference
            scores = -scales[:, None] * scores
        else:
            squares = tl.zeros((GROUP,), tl.float32)
            for start in range(0, BLOCK_D, BLOCK_COLUMNS):
                part = start + tl.arange(0, BLOCK_COLUMNS)
                is_column = part < WIDTH
                block = tl.load(starts[:, None] + part[None, :], mask=shown[:, None] & is_column[None, :], other=0.0)
                if UPCAST:  # the interpreter multiplies float32 and float16 only
                    block = block.to(tl.float32)
                if BLOCK_COLUMNS == BLOCK_D:
                    left = whole
                else:
                    left = tl.load(
                        query + numbers[:, None] * WIDTH + part[None, :],
                        mask=is_query[:, None] & is_column[None, :],
                        other=0.0,
                    )
                scores = tl.dot(left, tl.trans(block), scores, input_precision=PRECISION)
                if IS_SPLIT:
                    scores = tl.dot(rest, tl.trans(block), scores, input_precision=PRECISION)
                if METRIC == "cosine":
                    block = block.to(tl.float32)
                    squares += tl.sum(block * block, 1)
            if METRIC == "cosine":
                scores = scores / tl.maximum(tl.sqrt(squares), 1e-12)[None, :]
        scores = tl.where(scores != scores, float("inf"), scores)  # a maximum would drop NaN
        best = tl.max(tl.where(shown[None, :], scores, float("-inf")), 1)
        tl.store(ranks + numbers * groups + group, _rank(best, group), mask=is_query)


@triton.jit
def _rank_rows_kernel(
    query,  # (B, d) float32
    scale,  # (B,)
    keys,  # (N, d)
    slots,  # (count,)
    visible,  # (N,)
    chosen,  # (B, chosen_count) ranks of groups
    ranks,  # (B, chosen_count, GROUP)
    count,
    chosen_count,
    key_stride,
    WIDTH: tl.constexpr,
    METRIC: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_CHOSEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rank the rows of one group for one query."""
    program = tl.program_id(0).to(tl.int64)
    number = program // chosen_count
    group = program % chosen_count
    if HAS_CHOSEN:
        group = 0xFFFFFFFF - (tl.load(chosen + program) & 0xFFFFFFFF)
    positions = group * GROUP + tl.arange(0, GROUP)
    rows, shown = _load_positions(slots, visible, positions, count, HAS_SLOTS, HAS_VISIBLE)
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < WIDTH
    vector = tl.load(query + number * WIDTH + columns, mask=is_column, other=0.0)
    factor = 1.0
    if METRIC == "l2":
        factor = tl.load(scale + number)
    block = tl.load(
        keys + rows[:, None] * key_stride + columns[None, :], mask=shown[:, None] & is_column[None, :], other=0.0
    )
    scores = score_rows(vector, factor, block.to(tl.float32), METRIC)
    scores = tl.where(shown, scores, float("-inf"))
    tl.store(ranks + program * GROUP + tl.arange(0, GROUP), _rank(scores, rows))


def _split_query(query: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (B, d) -> (B, d), (B, d)
    """Split float32 queries into two halves in a narrow dtype.

    Their sum has at least 16 bits. Each query is scaled by a power of two first, which keeps the order of its scores,
    and the range of float16.
    """
    largest = query.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(min=-100)
    query = query * torch.exp2(-exponent.to(query.dtype))
    high = query.to(dtype)
    return high, (query - high.to(query.dtype)).to(dtype)


def _recover(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Recover scores and rows from their ranks; -inf and -1 at hidden rows."""
    ordered = (ranks >> 32).to(torch.int32)
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores, (0xFFFFFFFF - (ranks & 0xFFFFFFFF)).masked_fill_(scores == -torch.inf, -1)


@torch.library.custom_op("softdb::cuda_top_k", mutates_args=())
def find_best_rows(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    slots: Tensor | None,
    visible: Tensor | None,
    count: int,
    k: int,
    metric: str,
    max_ranks: int,
    multiprocessors: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Find the k best rows of each query.

    Args:
        query: Queries, (B, d) float32; see `softdb.kernels.cuda.metric`.
        scale: Scales, (B,), for l2.
        keys: Keys as stored, (N, d).
        slots: Slots to search, ascending, (count,) int64; None for the first ``count`` slots.
        visible: Whether a slot may be found, (N,) bool; None for all slots.
        count: Number of rows to search.
        k: Number of rows to find.
        metric: Name of the metric.
        max_ranks: Maximum number of ranks that are held at once, where one query needs fewer.
        multiprocessors: See `softdb.kernels.tiling.Tiling`.
        precision: ``input_precision`` of products of float32.

    Returns:
        Scores and slots, (B, k), best first; -inf and -1 where a query may see fewer than k rows.
    """
    batch = len(query)
    scores = query.new_full((batch, k), -torch.inf)
    found = torch.full((batch, k), -1, dtype=torch.int64, device=query.device)
    if batch == 0 or count == 0:
        return scores, found
    keys, query = with_unit_stride(keys), query.contiguous()
    groups = count_blocks(count, GROUP_ROWS)
    height = max(1, max_ranks // max(groups, min(k, groups) * GROUP_ROWS))
    for start in range(0, batch, height):
        part = slice(start, min(start + height, batch))
        factors = None if scale is None else scale[part].contiguous()
        arguments = query[part], factors, keys, slots, visible, count
        chosen = None
        with on_device(query):
            if k < groups:
                chosen = _rank_groups(*arguments, metric, multiprocessors, precision).topk(k, sorted=False).values
            best = _rank_rows(*arguments, chosen, metric).topk(min(k, count), dim=-1).values
        scores[part, : best.shape[1]], found[part, : best.shape[1]] = _recover(best)
    return scores, found


@find_best_rows.register_fake
def _(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    slots: Tensor | None,
    visible: Tensor | None,
    count: int,
    k: int,
    metric: str,
    max_ranks: int,
    multiprocessors: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(len(query), k), query.new_empty(len(query), k, dtype=torch.int64)


def _rank_groups(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    slots: Tensor | None,
    visible: Tensor | None,
    count: int,
    metric: str,
    multiprocessors: int,
    precision: str,
) -> Tensor:  # (B, groups)
    """Rank the groups of rows by their best scores."""
    batch, width = query.shape
    groups, columns = count_blocks(count, GROUP_ROWS), pad_width(width)
    is_narrow = keys.dtype != torch.float32 and metric != "l2"
    upcast = is_interpreted() and keys.dtype == torch.bfloat16
    is_split = is_narrow and not upcast
    high, low = _split_query(query, keys.dtype) if is_split else (query, query)
    height = min(128 if is_narrow and columns <= 128 else 64, max(MIN_BLOCK, triton.next_power_of_2(batch)))
    tiles = count_blocks(batch, height)
    splits = count_splits(groups, tiles, multiprocessors, per_multiprocessor=8)
    per_program = triton.next_power_of_2(count_blocks(groups, splits))
    ranks = torch.empty(batch, groups, dtype=torch.int64, device=query.device)
    _rank_groups_kernel[(tiles * count_blocks(groups, per_program),)](
        high,
        low,
        query if scale is None else scale,
        keys,
        keys if slots is None else slots,
        keys if visible is None else visible,
        ranks,
        batch,
        count,
        groups,
        tiles,
        keys.stride(0),
        WIDTH=width,
        METRIC=metric,
        HAS_SLOTS=slots is not None,
        HAS_VISIBLE=visible is not None,
        IS_SPLIT=is_split,
        PRECISION=precision,
        GROUPS_PER_PROGRAM=per_program,
        BLOCK_Q=height,
        BLOCK_D=columns,
        BLOCK_COLUMNS=columns if is_narrow else min(columns, choose_chunk(precision) or TENSOR_CORE_COLUMNS),
        GROUP=GROUP_ROWS,
        UPCAST=upcast,
        num_warps=8 if height == 128 else 4,
    )
    return ranks


def _rank_rows(
    query: Tensor,
    scale: Tensor | None,
    keys: Tensor,
    slots: Tensor | None,
    visible: Tensor | None,
    count: int,
    chosen: Tensor | None,
    metric: str,
) -> Tensor:  # (B, rows)
    """Rank the rows of the chosen groups, or of all groups."""
    batch, width = query.shape
    chosen_count = count_blocks(count, GROUP_ROWS) if chosen is None else chosen.shape[1]
    ranks = torch.empty(batch, chosen_count * GROUP_ROWS, dtype=torch.int64, device=query.device)
    columns = pad_width(width)
    _rank_rows_kernel[(batch * chosen_count,)](
        query,
        query if scale is None else scale,
        keys,
        keys if slots is None else slots,
        keys if visible is None else visible,
        ranks if chosen is None else chosen,
        ranks,
        count,
        chosen_count,
        keys.stride(0),
        WIDTH=width,
        METRIC=metric,
        HAS_SLOTS=slots is not None,
        HAS_VISIBLE=visible is not None,
        HAS_CHOSEN=chosen is not None,
        BLOCK_D=columns,
        GROUP=GROUP_ROWS,
        num_warps=8 if columns > 128 else 4,
    )
    return ranks


def exact_top_k(
    query: Tensor,  # (B, w)
    keys: Tensor,  # (N, d)
    spec: ReadSpec,
    k: int,
) -> tuple[Tensor, Tensor]:  # (B, k), (B, k)
    """Compute ``topk(query @ keys.T, k)`` with ties broken by the lowest row.

    See `softdb.kernels.blocks.topk.exact_top_k`, which searches where the kernels do not support a filter, bias, dtype
    or width.
    """
    selection = spec.selection
    if not (selection.is_shared and spec.bias is None and can_score(spec, keys) and selection.size <= MAX_ROWS):
        return blocks.exact_top_k(query, keys, spec, k)
    with torch.no_grad(), disable_autocast(query.device):
        points, scale = restore_query(query.detach(), spec)
        found: tuple[Tensor, Tensor] = find_best_rows(
            points,
            scale,
            keys.detach(),
            selection.visited,
            selection.shared if selection.visited is None else None,
            selection.count,
            k,
            spec.metric,
            spec.tiling.max_group_maxima,
            spec.tiling.multiprocessors,
            choose_precision(spec.tiling.float32_precision),
        )
    return found
