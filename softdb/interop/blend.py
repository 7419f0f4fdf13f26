"""An operator of torch.compile graphs that computes weighted sums of table rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import NonFiniteError
from softdb.interop.graphs import EAGER_OPTIONS, EAGER_TAGS, count_read_in_graph, refuse_second_derivative
from softdb.kernels.backend import backend_for
from softdb.kernels.gather import weighted_sum
from softdb.pending_checks import is_deferred
from softdb.processes import note_openmp
from softdb.transforms import has_batched, is_active, is_forward_mode, move_samples_first, suspend_transforms

__all__ = ["blend"]


@torch.library.custom_op("softdb::blend", mutates_args=(), **EAGER_OPTIONS)
def _blend(weights: Tensor, values: Tensor, numbers: Tensor, sparse: bool) -> Tensor:
    note_openmp()
    _check_weights(weights)
    return backend_for(weights).blend_at(weights, values, numbers)


def _check_weights(weights: Tensor) -> None:
    """Raise if a weight is not finite; on a GPU the result is NaN instead."""
    if not is_deferred(weights) and not is_finite(weights):
        raise NonFiniteError(
            "x: expected finite numbers, got NaN or infinite weights; x or the parameters contain NaN or infinity, so "
            "training may have diverged"
        )


@_blend.register_fake
def _(weights: Tensor, values: Tensor, numbers: Tensor, sparse: bool) -> Tensor:
    return weights.new_empty(weights.shape[0], values.shape[1])


torch.library.define(
    "softdb::blend_backward",
    "(Tensor gradient, Tensor weights, Tensor values, Tensor numbers, bool[] wanted, bool sparse) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, *EAGER_TAGS),
)


@torch.library.impl("softdb::blend_backward", "default")
def _blend_backward(
    gradient: Tensor,  # (M, dv)
    weights: Tensor,  # (M, k)
    values: Tensor,  # (N, dv)
    numbers: Tensor,  # (M, k)
    wanted: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of weights and values."""
    nothing, backend = weights.new_empty(0), backend_for(weights)
    products = backend.dot_at(gradient, values, numbers) if wanted[0] else nothing
    if not wanted[1]:
        return products, nothing.clone()
    return products, backend.blend_at_backward(gradient, weights, values, numbers, sparse=sparse)


def _fake_blend_backward(
    gradient: Tensor, weights: Tensor, values: Tensor, numbers: Tensor, wanted: Sequence[bool], sparse: bool
) -> tuple[Tensor, Tensor]:
    layout = torch.sparse_coo if sparse else torch.strided
    return (
        torch.empty_like(weights, memory_format=torch.contiguous_format) if wanted[0] else weights.new_empty(0),
        torch.empty(values.shape, dtype=values.dtype, device=values.device, layout=layout)
        if wanted[1]
        else weights.new_empty(0),
    )


torch.library.register_fake("softdb::blend_backward", _fake_blend_backward)


torch.library.register_autograd("softdb::blend_backward", refuse_second_derivative)


def _save_blend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, values, numbers, sparse = inputs
    ctx.save_for_backward(weights, values, numbers)
    ctx.sparse, ctx.reads = sparse, count_read_in_graph(values)


def _differentiate_blend(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weights, values, numbers = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    # torch.vmap over backward (torch.autograd.functional.jacobian(vectorize=True)) supports dense tensors only.
    sparse = ctx.sparse and ctx.reads.count == 1 and not has_batched([gradient])
    results = torch.ops.softdb.blend_backward.default(gradient, weights, values, numbers, wanted, sparse)
    return *(result if want else None for result, want in zip(results, wanted, strict=True)), None, None


_blend.register_autograd(_differentiate_blend, setup_context=_save_blend)


def blend(weights: Tensor, values: Tensor, numbers: Tensor, *, sparse: bool) -> Tensor:  # (M, k), (N, dv), (M, k)
    """Compute ``(weights[..., None] * values[numbers]).sum(1)``, (M, dv).

    The result has the dtype of the weights. The (M, k, dv) rows are not allocated, in forward or backward.

    Args:
        weights: (M, k).
        values: (N, dv).
        numbers: Row numbers, (M, k) int64.
        sparse: Whether the gradient of ``values`` is a COO tensor of the rows in ``numbers``, coalesced except on a
            GPU. The numbers must not contain -1.
    """
    if is_active() or (is_forward_mode() and not torch.compiler.is_compiling()):
        return _blend_under_transform(weights, values, numbers)
    result: Tensor = torch.ops.softdb.blend.default(weights, values, numbers, sparse)
    return result


def _blend_under_transform(weights: Tensor, values: Tensor, numbers: Tensor) -> Tensor:
    """Compute `blend` with operations that every transform supports.

    It allocates the (M, k, dv) rows.
    """
    if not torch.compiler.is_compiling():
        with suspend_transforms():
            _check_weights(move_samples_first(weights))
    rows = values.index_select(0, numbers.flatten()).reshape(*numbers.shape, values.shape[-1])
    return weighted_sum(weights, rows.to(weights.dtype))
