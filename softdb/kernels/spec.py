"""Specify one pass over the rows, and the tiles that it visits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import NonFiniteError
from softdb.filters import Block, Selection
from softdb.kernels.bias import ScoreBias
from softdb.kernels.tiling import Tiles, Tiling
from softdb.pending_checks import PendingChecks, is_deferred
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.metrics import prepare_keys, prepare_keys_backward
from softdb.table.kept_rows import RowCopies, RowsAtRead

__all__ = ["BestRows", "ReadSpec", "check_scores", "disable_autocast", "enumerate_queries"]

T = TypeVar("T")

NULL_CONTEXT: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True)
class ReadSpec:
    """All parameters of one pass except its tensors: metric, filters, bias and noise.

    Attributes:
        metric: The metric for which the query was prepared.
        center: The point around which l2 is expanded, (d,); None for the other metrics.
        selection: The rows that each query may see.
        dtype: The dtype to compute in.
        max_key_norm: A function that returns an upper bound of the norms of all keys, which bounds the scores. If None,
            the largest norm of each block is computed.
        bf16_matmul: Whether to multiply weights and values in bfloat16: see `Tiling.can_use_bf16_matmul`. Scores are
            computed in ``dtype``.
        noise: The Gumbel noise that is added to the scores, or None.
        bias: Numbers that are added to the scores, or None.
        tiling: The tile sizes and thresholds.
        at_read: The rows of a store at this read; None if backward uses the tables as they are.
        pending_checks: Checks of the store to which the checks of a read on a GPU are added, or None.
        output_dtype: The dtype to which the caller converts the output.
        query_divisor: The number by which preparation divided the query, if the query has the dtype of the keys and
            that has 16 bits; None otherwise. See `softdb.scoring.metrics.find_exact_divisor`.
    """

    metric: str
    center: Tensor | None
    selection: Selection
    dtype: torch.dtype
    max_key_norm: Callable[[], float] | None = None
    bf16_matmul: bool = False
    noise: GumbelNoise | None = None
    bias: ScoreBias | None = None
    tiling: Tiling = field(default_factory=lambda: Tiling.for_device(torch.device("cpu")))
    at_read: RowsAtRead | None = None
    pending_checks: PendingChecks | None = None
    output_dtype: torch.dtype = torch.float32
    query_divisor: float | None = None

    def compute_at_read(self, function: Callable[[ReadSpec, RowCopies | None], T], keys: Tensor, values: Tensor) -> T:
        """Call ``function`` on the rows as they were at the read.

        Args:
            function: A function of a spec and the copies of the rows that have changed since, or None.
            keys: The keys that backward uses.
            values: The values that backward uses.

        Raises:
            StaleReadError: A row has changed without a copy.
        """
        at_read = self.at_read
        if at_read is None:
            return function(self, None)

        def run(copies: RowCopies | None) -> T:
            if copies is None:
                return function(self, None)
            selection = self.selection.with_rows(at_read.view(copies))
            own = at_read.select_own(copies, keys=keys, values=values)
            return function(replace(self, selection=selection), own)

        return at_read.compute(run)

    def choose_tiles(self, query: Tensor, copied_per_row: int, k: int = 0) -> Tiles:  # (G, B, w)
        """Choose the tiles of a pass: see `Tiling.choose_tiles`."""
        threads = torch.get_num_threads() if query.device.type == "cpu" else 1
        return self.tiling.choose_tiles(query.shape[1], query.shape[2], copied_per_row, k, threads=threads)

    def iterate_tiles(self, tiles: Tiles, groups: int, queries: int) -> Iterator[tuple[slice, Block, list[slice]]]:
        """Yield a slice of groups, a block of rows, and slices of queries.

        Together they make one tile of scores, which fits in cache. Blocks without visible rows are skipped.

        Args:
            tiles: The tile shape.
            groups: Number of groups, G.
            queries: Number of queries in each group, B.
        """
        count = self.selection.count
        if groups == 0 or queries == 0 or count == 0:
            return
        height, width = tiles.queries, tiles.rows
        depth = max(1, self.tiling.tile_elements // (height * min(width, count)))
        slices = [slice(start, min(start + height, queries)) for start in range(0, queries, height)]
        edges = list(range(0, count, width))
        if count - edges[-1] > tiles.partition and count % tiles.partition:
            edges.append(count - count % tiles.partition)
        edges.append(count)
        for first in range(0, groups, depth):
            for start, stop in itertools.pairwise(edges):
                block = self.selection.block(start, stop)
                if block is not None:
                    yield slice(first, min(first + depth, groups)), block, slices

    def count_partitions(self, tiles: Tiles, groups: slice, block: Block) -> int:
        """Return the number of partitions into which a block is split.

        The number is 1 where the scores of a block have to be one tensor.
        """
        whole = tiles.exact_ties or block.has_hidden or self.noise is not None or groups.stop - groups.start > 1
        return 1 if whole or block.count % tiles.partition else block.count // tiles.partition

    def make_score_bound(self, query: Tensor) -> Callable[[Tensor], float]:  # (G, B, w)
        """Make a function that bounds the absolute scores of a block.

        The function takes the prepared keys of the block, (g, C, w). The bound is the largest norm of a query times the
        largest norm of a key, by the Cauchy-Schwarz inequality, plus the largest bias. It is infinity where computing
        the norms would cost more than the bound saves, and on a GPU, where the host would wait for the bound.
        """
        is_known = self.metric == "cosine" or self.max_key_norm is not None
        if (
            self.noise is not None
            or self.metric == "l2"
            or not (is_known or 4 * query.shape[1] >= query.shape[2])
            or query.numel() == 0
            or is_deferred(query)
        ):
            return lambda operand: math.inf
        norm = 1.001 * float(torch.linalg.vector_norm(query, dim=-1).amax())
        offset = 0.0 if self.bias is None else self.bias.bound
        if self.metric == "cosine":
            return lambda operand: offset + norm
        if self.max_key_norm is not None:
            bound = offset + norm * self.max_key_norm()
            return lambda operand: bound
        return lambda operand: offset + norm * float(torch.linalg.vector_norm(operand, dim=-1).amax())

    def count_copied_elements(self, keys: Tensor, values: Tensor | None = None) -> int:
        """Count the elements of each row that are copied before they are used.

        Rows are copied where they are gathered, converted or prepared.
        """
        elements = 0
        if self.selection.visited is not None or self.metric in ("cosine", "l2") or keys.dtype != self.dtype:
            elements += keys.shape[-1] * (2 if self.metric == "l2" else 1)
        if values is not None and (self.selection.visited is not None or values.dtype != self.dtype):
            elements += values.shape[-1]
        return elements

    def prepare_keys(self, rows: Tensor) -> Tensor:  # (g, C, d) -> (g, C, operand width)
        """Prepare the keys of a block for the metric."""
        return prepare_keys(rows, self.metric, self.center, self.dtype)

    def add_bias_(self, scores: Tensor, block: Block, groups: slice, queries: slice) -> None:  # (n, b, c)
        """Add the bias, if any, in place to the scores of a tile."""
        if self.bias is not None:
            self.bias.add_(scores, block, groups, queries)

    def add_offsets_(self, scores: Tensor, block: Block, groups: slice, queries: slice) -> None:  # (n, b, c)
        """Add bias and noise, if any, in place to the scores of a tile.

        Scores with noise are not split into partitions; see `count_partitions`.
        """
        self.add_bias_(scores, block, groups, queries)
        if self.noise is not None:
            device = scores.device
            numbers = enumerate_queries(range(queries.start, queries.stop), range(groups.start, groups.stop), device)
            slots = block.slots(torch.arange(block.count, device=device))
            scores += self.noise.at(numbers, slots, scores.dtype)

    def prepare_keys_backward(self, grad: Tensor, rows: Tensor) -> Tensor:  # (g, C, operand width) -> (g, C, d)
        """Compute the gradient of keys from the gradient of the prepared keys."""
        return prepare_keys_backward(grad, rows, self.metric, self.center)


class BestRows(NamedTuple):
    """Top k rows of each query, best first, without gradient.

    If a query may see fewer than k rows, its remaining entries are padding.

    Attributes:
        scores: (G B, k), -inf at padding.
        weights: (G B, k), 0 at padding.
        rows: Positions of the rows in their group, (G B, k), -1 at padding.
    """

    scores: Tensor
    weights: Tensor
    rows: Tensor


def enumerate_queries(queries: range, groups: range, device: torch.device) -> Tensor:  # -> (g, b)
    """Return a unique number for each query of each group, from which noise is drawn."""
    within = torch.arange(queries.start, queries.stop, device=device)
    return torch.arange(groups.start, groups.stop, device=device).unsqueeze(-1) * 2**40 + within


def disable_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on a device.

    Scores and softmax need at least float32.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return NULL_CONTEXT


def check_scores(scores: Tensor, pending_checks: PendingChecks | None = None, *, empty: bool = False) -> None:
    """Raise if a score is NaN or infinite; on a GPU, defer the check.

    Args:
        scores: The scores.
        pending_checks: Checks to which the check of scores on a GPU is added; if None, it is left out.
        empty: Whether -inf is accepted: the log-sum-exp of a query that sees no row is -inf.

    Raises:
        NonFiniteError: A score is not finite.
    """
    if is_deferred(scores):
        if pending_checks is not None:
            (pending_checks.check_below_infinity if empty else pending_checks.check_finite)("scores", scores)
        return
    if is_finite(scores) or (empty and bool((scores < torch.inf).all())):
        return
    raise NonFiniteError(
        "query, keys, temperature: expected finite scores, got NaN or infinity; if the query or the keys contain NaN, "
        "training may have diverged; if query times key divided by temperature overflows, rescale query or keys, or "
        "raise the temperature"
    )
