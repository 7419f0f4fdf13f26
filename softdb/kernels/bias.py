"""Biases: numbers that are added to the scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.attributes import lock_free_cached_property
from softdb.errors import NonFiniteError
from softdb.filters import Block
from softdb.pending_checks import PendingChecks, is_deferred

__all__ = ["ScoreBias", "separate_hidden_rows"]


@dataclass(frozen=True)
class ScoreBias:
    """Finite numbers that are added to the scores of G groups of B queries and N rows.

    A dimension of the numbers may also have size 1, which broadcasts. Neither the numbers nor their gradient are
    expanded to (G, B, N).

    Attributes:
        numbers: Numbers in slot order, (G, B, N), in the dtype of the read.
    """

    numbers: Tensor

    @lock_free_cached_property
    def bound(self) -> float:
        """Largest absolute value of a number."""
        if self.numbers.numel() == 0:
            return 0.0
        lowest, highest = self.numbers.detach().aminmax()
        return max(-float(lowest), float(highest))

    def add_(self, scores: Tensor, block: Block, groups: slice, queries: slice) -> None:  # (n, b, c)
        """Add the numbers of a tile to its scores, in place.

        Args:
            scores: Scores of slices of groups and queries: (g, b, C), or (parts, b, C / parts) where the rows of one
                group are split into partitions.
            block: The rows of the tile.
            groups: Groups of queries.
            queries: Queries of each group.
        """
        scores += _select_tile(self.numbers, block, groups, queries, scores.shape[-1])

    def add_gradient_(  # (G, B, N), (n, b, c)
        self, total: Tensor, grad_scores: Tensor, block: Block, groups: slice, queries: slice
    ) -> None:
        """Add the gradient of a tile of scores to the gradient of the numbers.

        Args:
            total: Gradient of the numbers, in their shape.
            grad_scores: Gradient of the scores of the tile; see `add_`.
            block: As for `add_`.
            groups: As for `add_`.
            queries: As for `add_`.
        """
        if isinstance(block.rows, slice) or total.shape[-1] == 1:
            tile = _select_tile(total, block, groups, queries, grad_scores.shape[-1])
            tile += grad_scores.sum_to_size(tile.shape)
            return
        part = _select_queries(total, groups, queries)
        if part.shape[1] == 1:
            grad_scores = grad_scores.sum(1, keepdim=True)
        if grad_scores.shape[-1] != block.count:  # partitions of one group
            grad_scores = grad_scores.transpose(0, 1).flatten(1).unsqueeze(0)
        part.index_add_(-1, block.rows, grad_scores.sum_to_size(*part.shape[:2], block.count))

    def at(self, rows: Tensor, groups: int) -> Tensor:  # (G B, k) -> (G B, k)
        """Return the numbers of listed rows of each query; differentiable.

        Args:
            rows: Slots in the group of the query; the number at -1 is arbitrary.
            groups: Number of groups, G.
        """
        own_groups, own_queries, count = self.numbers.shape
        queries = len(rows) // max(1, groups)
        if count == 1:  # by a sum of pairs in backward, where index_select would add one after another
            return self.numbers.expand(groups, queries, rows.shape[-1]).reshape(rows.shape)
        place = rows.clamp(0, count - 1)
        if own_groups != 1 or own_queries != 1:
            query = torch.arange(len(rows), device=rows.device)
            first = (query // max(1, queries)).clamp(max=own_groups - 1) * own_queries
            place = place + ((first + (query % max(1, queries)).clamp(max=own_queries - 1)) * count).unsqueeze(-1)
        return self.numbers.flatten().index_select(0, place.flatten()).view_as(rows)


def _select_queries(numbers: Tensor, groups: slice, queries: slice) -> Tensor:  # (G, B, N) -> (g, b, N)
    """Return a view of the numbers of slices of groups and queries; size 1 is kept."""
    numbers = numbers if numbers.shape[0] == 1 else numbers[groups]
    return numbers if numbers.shape[1] == 1 else numbers[:, queries]


def _select_tile(numbers: Tensor, block: Block, groups: slice, queries: slice, columns: int) -> Tensor:
    """Return the numbers of a tile, split into partitions like its scores.

    Returns:
        (g, b, C), or (parts, b, columns) where ``columns`` is less than C; size 1 is kept. If the rows of the block are
        a slice, the result is a view.
    """
    part = _select_queries(numbers, groups, queries)
    if part.shape[-1] == 1:
        return part
    part = part[..., block.rows]
    return part if part.shape[-1] == columns else part[0].unflatten(-1, (-1, columns)).transpose(0, 1)


def separate_hidden_rows(
    name: str, bias: Tensor, dtype: torch.dtype, pending_checks: PendingChecks | None = None
) -> tuple[Tensor, Tensor | None]:
    """Split a bias into finite numbers and a mask.

    Args:
        name: Name of the argument, for the message.
        bias: Numbers; -inf hides a row.
        dtype: Dtype of the read.
        pending_checks: Checks to which the check of numbers on a GPU is added; if None, it is left out.

    Returns:
        The numbers in ``dtype`` with 0 in place of -inf, differentiable; and a bool tensor that is False where a number
        was -inf. Unless the numbers are on a GPU, the tensor is None if no number was -inf.

    Raises:
        NonFiniteError: A number is NaN or +inf, or overflows in ``dtype``. On a GPU, the results are NaN instead.
    """
    if bias.numel() == 0:
        return bias.to(dtype), None
    if is_deferred(bias):
        is_hidden = bias.detach() == -math.inf
        numbers = bias.masked_fill(is_hidden, 0.0).to(dtype)
        if pending_checks is not None:
            pending_checks.check_finite("bias", numbers)
        return numbers, ~is_hidden
    lowest, highest = (float(number) for number in bias.detach().aminmax())
    if not highest < math.inf:
        raise NonFiniteError(
            f"{name}: expected finite numbers, or -inf to hide a row, got NaN or infinity; replace them"
        )
    hidden = None if lowest > -math.inf else bias.detach() == -math.inf
    finite = bias if hidden is None else bias.masked_fill(hidden, 0.0)
    numbers = finite.to(dtype)
    if torch.finfo(bias.dtype).max > torch.finfo(dtype).max and not is_finite(numbers):
        largest = float(finite.detach().abs().max())
        raise NonFiniteError(
            f"{name}: expected numbers of at most {torch.finfo(dtype).max:.2g}, since the read computes in {dtype}, or "
            f"-inf to hide a row, got an absolute value of {largest:.2g}; replace it"
        )
    return numbers, None if hidden is None else ~hidden
