"""Exclude non-finite rows that queries may not see from exact reads.

A hidden row has weight 0, but 0 times NaN is NaN. So a non-finite value in a hidden row would make the output NaN, and
a non-finite key would make the gradient of the query NaN. Finding such rows costs as much as a read. The read therefore
searches for them only if a cheaper check finds a non-finite number: in its output, or as the norm of all keys. It then
uses a copy of the table in which the hidden non-finite rows are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.normalizers import straight_through

__all__ = ["propagate_nan", "replace_nonfinite", "separate_nonfinite_values", "zero_hidden_keys"]


def zero_hidden_keys(keys: Tensor, spec: ReadSpec, groups: int, queries: int) -> Tensor:  # (G N, d) -> (G N, d)
    """Return ``keys`` with zeros in non-finite rows that no query may see.

    A non-finite row that some query may see is unchanged: its score raises `NonFiniteError`.

    Args:
        keys: The keys as stored.
        spec: The metric and filters of the read.
        groups: Number of groups, G.
        queries: Number of queries in each group.
    """
    detached = keys.detach()
    norm = torch.linalg.vector_norm(detached, dtype=spec.dtype) if spec.max_key_norm is None else spec.max_key_norm()
    if math.isfinite(norm) or groups * queries == 0:
        return keys
    # A finite key has an infinite norm, too, if its sum of squares overflows.
    finite = torch.linalg.vector_norm(detached, dim=-1, dtype=spec.dtype).isfinite().view(groups, -1)
    hidden = ~finite
    for slots, visible in _iterate_visible(spec.selection, (~finite).any(0), groups, queries):
        hidden[:, slots] &= ~visible.any(1)
    hidden = hidden.view(-1, 1)
    return straight_through(detached.masked_fill(hidden, 0.0), keys) if bool(hidden.any()) else keys


def separate_nonfinite_values(  # (G N, dv) -> (G N, dv), (G B, dv)
    values: Tensor, selection: Selection, groups: int, queries: int
) -> tuple[Tensor, Tensor] | None:
    """Replace non-finite values by zero; return which outputs have to be NaN.

    Gradients of the values are unchanged.

    Args:
        values: The values as stored.
        selection: The rows that each query may see.
        groups: Number of groups, G.
        queries: Number of queries in each group.

    Returns:
        The values with zeros, and a bool mask of the output elements of queries that see a non-finite element; None if
        all values are finite.
    """
    width = values.shape[-1]
    nonfinite = ~values.detach().isfinite()
    if not bool(nonfinite.any()) or groups * queries == 0:
        return None
    grouped = nonfinite.view(groups, -1, width)
    is_nan = torch.zeros(groups, queries, width, dtype=torch.bool, device=values.device)
    for slots, visible in _iterate_visible(selection, grouped.any(-1).any(0), groups, queries):
        is_nan |= torch.bmm(visible.float(), grouped[:, slots].float()) > 0
    return replace_nonfinite(values), is_nan.flatten(0, 1)


def replace_nonfinite(values: Tensor) -> Tensor:
    """Replace non-finite elements by zero, without effect on gradients."""
    detached = values.detach()
    return straight_through(detached.masked_fill(~detached.isfinite(), 0.0), values)


def _iterate_visible(
    selection: Selection,
    wanted: Tensor,  # (N,) bool
    groups: int,
    queries: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # (c,), (G, B, c)
    """Yield some of the ``wanted`` slots at a time, and which queries may see them.

    Slots that ``shared`` or ``visited`` hides from all queries are left out.
    """
    wanted = wanted[: selection.size]
    if selection.shared is not None:
        wanted = wanted & selection.shared
    slots = wanted.nonzero().squeeze(-1)
    if selection.visited is not None:
        slots = slots[torch.isin(slots, selection.visited)]
    if len(slots) == 0:
        return
    for part in slots.split(max(1, Tiling.for_device(slots.device).tile_elements // (groups * queries))):
        visible = torch.ones(groups, queries, len(part), dtype=torch.bool, device=part.device)
        block = replace(selection, shared=None, visited=part).block(0, len(part))
        if block is not None:
            block.hide(visible, slice(0, groups), slice(0, queries), False)
            yield part, visible


class _PropagateNaN(torch.autograd.Function):
    """Masked fill with NaN whose backward is NaN where a masked gradient is not 0."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, is_nan: Tensor) -> Tensor:
        ctx.save_for_backward(is_nan)
        return outputs.masked_fill(is_nan, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (is_nan,) = ctx.saved_tensors
        return grads[0].masked_fill(is_nan & (grads[0] != 0), torch.nan), None


def propagate_nan(outputs: Tensor, is_nan: Tensor) -> Tensor:  # (M, dv), (M, dv)
    """Fill masked outputs with NaN; only their nonzero gradients become NaN."""
    if not bool(is_nan.any()):
        return outputs
    result: Tensor = _PropagateNaN.apply(outputs, is_nan)  # type: ignore[no-untyped-call]
    return result
