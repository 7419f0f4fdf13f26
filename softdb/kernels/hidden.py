"""Rows that queries may not see, in passes that go through them: they take no part, whatever they hold.

A hidden row has weight 0, but 0 times NaN is NaN: a value that is not finite would spoil the blend, and a key that is
not finite the gradient of the query. Looking for such rows costs as much as a read, so it is done only where a number
that is there anyway says that there may be some; then the read goes through a copy with zeros in their place.
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

__all__ = ["finite_or_zero", "finite_values", "hidden_keys_zeroed", "spoil"]


def hidden_keys_zeroed(keys: Tensor, spec: ReadSpec, groups: int, queries: int) -> Tensor:  # (G N, d) -> (G N, d)
    """``keys``, with zeros in rows that are not finite and that no query may see.

    A row that some query sees stays: its score is the error that it has to be.

    Args:
        keys: Keys as stored.
        spec: How queries meet them.
        groups: G.
        queries: How many queries each group has.
    """
    given = keys.detach()
    norm = torch.linalg.vector_norm(given, dtype=spec.dtype) if spec.key_norm is None else spec.key_norm()
    if math.isfinite(norm) or groups * queries == 0:
        return keys
    # By their norms: what l2 squares may overflow where the key does not.
    finite = torch.linalg.vector_norm(given, dim=-1, dtype=spec.dtype).isfinite().view(groups, -1)
    hidden = ~finite
    for slots, visible in _visible(spec.selection, (~finite).any(0), groups, queries):
        hidden[:, slots] &= ~visible.any(1)
    hidden = hidden.view(-1, 1)
    return straight_through(given.masked_fill(hidden, 0.0), keys) if bool(hidden.any()) else keys


def finite_values(  # (G N, dv) -> (G N, dv), (G B, dv)
    values: Tensor, selection: Selection, groups: int, queries: int
) -> tuple[Tensor, Tensor] | None:
    """``values`` with zeros for numbers that are not finite, and which numbers of which answers those are to spoil.

    Gradients of the values are as they would be without. None where all is finite.

    Args:
        values: Values as stored.
        selection: Which of them each query may see.
        groups: G.
        queries: How many queries each group has.
    """
    given, width = values.detach(), values.shape[-1]
    wrong = ~given.isfinite()
    if not bool(wrong.any()) or groups * queries == 0:
        return None
    grouped = wrong.view(groups, -1, width)
    spoilt = torch.zeros(groups, queries, width, dtype=torch.bool, device=values.device)
    for slots, visible in _visible(selection, grouped.any(-1).any(0), groups, queries):
        spoilt |= torch.bmm(visible.float(), grouped[:, slots].float()) > 0
    return finite_or_zero(values), spoilt.flatten(0, 1)


def finite_or_zero(values: Tensor) -> Tensor:
    """``values`` with zeros for numbers that are not finite; gradients of the values are as they would be without."""
    given = values.detach()
    return straight_through(given.masked_fill(~given.isfinite(), 0.0), values)


def _visible(
    selection: Selection,
    wanted: Tensor,  # (N,) bool
    groups: int,
    queries: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # (c,), (G, B, c)
    """Which query of each group may see which of the ``wanted`` rows, a few of those at a time."""
    wanted = wanted[: selection.size]
    if selection.shared is not None:
        wanted = wanted & selection.shared
    slots = wanted.nonzero().squeeze(-1)
    if selection.visit is not None:
        slots = slots[torch.isin(slots, selection.visit)]
    for some in (
        slots.split(max(1, Tiling.for_device(slots.device).elements // (groups * queries))) if len(slots) else ()
    ):
        visible = torch.ones(groups, queries, len(some), dtype=torch.bool, device=some.device)
        block = replace(selection, shared=None, visit=some).block(0, len(some))
        if block is not None:
            block.hide(visible, slice(0, groups), slice(0, queries), False)
            yield some, visible


class _Spoil(torch.autograd.Function):
    """Its first argument with NaN where the second says so; there, a gradient that is not 0 is NaN in turn."""

    @staticmethod
    def forward(ctx: Any, blend: Tensor, spoilt: Tensor) -> Tensor:
        ctx.save_for_backward(spoilt)
        return blend.masked_fill(spoilt, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (spoilt,) = ctx.saved_tensors
        return grads[0].masked_fill(spoilt & (grads[0] != 0), torch.nan), None


def spoil(blend: Tensor, spoilt: Tensor) -> Tensor:  # (M, dv), (M, dv)
    """``blend`` with NaN where it is spoilt: NaN passes back from there, and only from there."""
    if not bool(spoilt.any()):
        return blend
    result: Tensor = _Spoil.apply(blend, spoilt)  # type: ignore[no-untyped-call]
    return result
