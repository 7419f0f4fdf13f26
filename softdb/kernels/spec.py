"""`ReadSpec`: how queries meet rows in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import NonFiniteError
from softdb.filters import Block, Selection
from softdb.kernels.tiling import Tiles, Tiling
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.metrics import prepare_keys, prepare_keys_backward

__all__ = ["BestRows", "ReadSpec", "check_scores", "full_precision", "query_numbers"]

NOTHING: AbstractContextManager[Any] = nullcontext()


@dataclass(frozen=True)
class ReadSpec:
    """How queries meet rows: everything about an exact pass but the operands.

    Attributes:
        metric: Which metric the query was prepared for.
        centre: The point that l2 is expanded around, (d,).
        selection: Which rows each query may see.
        dtype: The dtype to compute in.
        key_norm: Tells the largest norm of a key, for a bound on scores; None where it is to be found block by block.
        narrow: Whether the blend, not the scores, may be multiplied in the dtype of the values: see `is_narrow`.
        noise: What is added to the scores.
        tiling: How passes are cut.
    """

    metric: str
    centre: Tensor | None
    selection: Selection
    dtype: torch.dtype
    key_norm: Callable[[], float] | None = None
    narrow: bool = False
    noise: GumbelNoise | None = None
    tiling: Tiling = field(default_factory=lambda: Tiling.for_device(torch.device("cpu")))

    def tiles_of(self, query: Tensor, copied: int, k: int = 0) -> Tiles:  # (G, B, w)
        """Choose the tiles of a pass: see `Tiling.tiles`."""
        threads = torch.get_num_threads() if query.device.type == "cpu" else 1
        return self.tiling.tiles(query.shape[1], query.shape[2], copied, k, threads=threads)

    def visit(self, tiles: Tiles, groups: int, queries: int) -> Iterator[tuple[slice, Block, list[slice]]]:
        """Groups × block of rows × slices of queries, such that a tile of scores fits in cache.

        Args:
            tiles: How large they are.
            groups: G.
            queries: B.
        """
        count = self.selection.count
        if groups == 0 or queries == 0 or count == 0:
            return
        height, width = tiles.queries, tiles.rows
        depth = max(1, self.tiling.elements // (height * min(width, count)))
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

    def partitions(self, tiles: Tiles, groups: slice, block: Block) -> int:
        """Into how many parts the rows of a block are split to be multiplied; 1 where its tile has to be one piece."""
        whole = tiles.even or block.hides or self.noise is not None or groups.stop - groups.start > 1
        return 1 if whole or block.count % tiles.partition else block.count // tiles.partition

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


class BestRows(NamedTuple):
    """The k best rows of each query, best first; (G B, k), without gradient.

    Attributes:
        scores: Their scores, -inf where there were fewer.
        weights: Their weights, 0 where there were fewer.
        rows: Their numbers, -1 where there were fewer.
    """

    scores: Tensor
    weights: Tensor
    rows: Tensor


def query_numbers(queries: range, groups: range, device: torch.device) -> Tensor:  # -> (g, b)
    """A number for each query of each group, by which its noise is told from that of others."""
    within = torch.arange(queries.start, queries.stop, device=device)
    return torch.arange(groups.start, groups.stop, device=device).unsqueeze(-1) * 2**40 + within


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast lowers nothing: scores and softmax need float32."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return NOTHING


def check_scores(scores: Tensor, *, empty: bool = False) -> None:
    """Raise if a score is NaN or infinite; with ``empty``, -inf passes: the log-sum-exp of nothing."""
    if is_finite(scores) or (empty and bool((scores < torch.inf).all())):
        return
    raise NonFiniteError(
        "query, keys, temperature: expected finite scores, got NaN or infinity; the rows hold NaN (did training "
        "diverge?), or query times key divided by temperature overflows: rescale them"
    )
