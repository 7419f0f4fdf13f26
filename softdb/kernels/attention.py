"""Reads of many small tables by the attention kernels of torch.

They are those of `torch.nn.functional.scaled_dot_product_attention`.

The kernels compute each table in one pass over its rows, in their own memory. Two facts make them an exact read:

- They return the log-sum-exp, but take no gradient of it. With an additional value column of ones, the gradient of the
  column's output is a gradient of the scores times the weights, which is that of the log-sum-exp. Backward adds the
  column, forward does not need it.
- Their result is undefined for a query that sees no row. Forward replaces it, and backward passes a log-sum-exp of
  infinity, so that all weights are 0.

Hidden rows get a bias of -inf. The order of sums in backward is not fixed, so gradients may differ in the last bits
from one run to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb.kernels.blocks.backward import forbid_double_backward
from softdb.kernels.spec import disable_autocast
from softdb.transforms import check_not_batched

__all__ = ["AttentionKernels", "attend", "choose_kernels"]

aten = torch.ops.aten

# The memory-efficient kernel is wrong beyond this number of rows or queries with a mask (pytorch#162588).
MAX_MASKED_SIZE = 2**16 - 1
# The kernels compute some offsets in int32.
MAX_ELEMENTS = 2**31 - 1
MAX_WIDTH, MAX_FLASH_WIDTH = 256, 128
# 16 bytes of a half-precision dtype: the fast kernels load this number of elements at once.
ALIGNMENT = 8
# The memory-efficient kernel requires rows of the bias to be aligned to this number of elements.
BIAS_ALIGNMENT = 16


class AttentionKernels(NamedTuple):
    """Forward and backward of one implementation of attention.

    Attributes:
        forward: A function (query, keys, values, bias, is_causal, scale) -> (values, log-sum-exp, state). The
            log-sum-exp may have more entries than there are queries.
        backward: A function (gradient, query, keys, values, bias, output, lse, state, is_causal, scale) -> (gradients
            of query, keys and values).
        needs_equal_widths: Whether keys and values must have the same width.
    """

    forward: Callable[..., tuple[Tensor, Tensor, tuple[Any, ...]]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    needs_equal_widths: bool


def _efficient(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    out, lse, *state = aten._scaled_dot_product_efficient_attention.default(
        query, keys, values, bias, True, 0.0, is_causal, scale=scale
    )
    return out, lse, tuple(state)


def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: tuple[Any, ...],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = [True, True, True, False]
    tensors = gradient, query, keys, values, bias, out, lse, *state
    results = aten._scaled_dot_product_efficient_attention_backward.default(
        *tensors, 0.0, needs, is_causal, scale=scale
    )
    return results[0], results[1], results[2]


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    out, lse, *state, _ = aten._scaled_dot_product_flash_attention.default(
        query, keys, values, 0.0, is_causal, False, scale=scale
    )
    return out, lse, tuple(state)


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: tuple[Any, ...],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, seed, offset = state
    tensors = gradient, query, keys, values, out, lse, *lengths
    results = aten._scaled_dot_product_flash_attention_backward.default(
        *tensors, 0.0, is_causal, seed, offset, scale=scale
    )
    return results[0], results[1], results[2]


EFFICIENT = AttentionKernels(_efficient, _efficient_backward, needs_equal_widths=False)


FLASH = AttentionKernels(_flash, _flash_backward, needs_equal_widths=True)


@lru_cache(maxsize=8)
def _find_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device; that of fake tensors is 8.0."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    widths: tuple[int, int],
    *,
    masked: bool,
    is_causal: bool,
) -> AttentionKernels | None:
    """Choose the kernels for a read, by its shape and by the settings of torch.

    Args:
        device: Device of the operands.
        dtype: Common dtype of the operands.
        shape: Numbers of tables, of queries for each table, and of rows in each table.
        widths: Width of keys and of values.
        masked: Whether there is a mask.
        is_causal: Whether query i sees the rows up to i.

    Returns:
        The kernels; None if torch has none that are correct for the read, if `torch.nn.attention.sdpa_kernel` disables
        them, or if torch must be deterministic.
    """
    groups, queries, rows = shape
    if device.type != "cuda" or torch.version.hip is not None or torch.are_deterministic_algorithms_enabled():
        return None
    is_narrow, capability = dtype in (torch.float16, torch.bfloat16), _find_capability(device)
    if not (dtype == torch.float32 or (is_narrow and capability >= (8, 0))):
        return None
    is_large = max(queries, rows) > MAX_MASKED_SIZE and (masked or is_causal)
    padded = max(widths) + 2 * ALIGNMENT
    elements = groups * max(queries, rows) * padded
    if is_large or min(groups, queries, rows, *widths) == 0 or max(widths) > MAX_WIDTH or elements > MAX_ELEMENTS:
        return None
    if masked and queries * (rows + BIAS_ALIGNMENT) > MAX_ELEMENTS:
        return None
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    is_square = queries == rows or not is_causal
    if flash and is_narrow and not masked and is_square and widths[0] == widths[1] <= MAX_FLASH_WIDTH:
        return FLASH
    return EFFICIENT if torch.backends.cuda.mem_efficient_sdp_enabled() else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (b, h, B, d)
        keys: Tensor,  # (b, h, N, d)
        values: Tensor,  # (b, h, N, dv)
        bias: Tensor | None,  # (b, h, B, N)
        visible: Tensor | None,  # broadcastable to (b, h, B, N)
        kernels: AttentionKernels,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        count, sees_any = query.shape[-2], None
        if visible is not None:
            # Weight 0 times NaN is NaN. The gradient of a hidden row is 0 without a masked fill in backward.
            is_seen, sees_any = visible.any(-2).unsqueeze(-1), visible.any(-1)
            keys, values = torch.where(is_seen, keys, 0.0), torch.where(is_seen, values, 0.0)
        out, saved_lse, ctx.state = kernels.forward(query, keys, values, bias, is_causal, scale)
        lse = saved_lse.narrow(-1, 0, count)
        if sees_any is None:
            lse = lse.clone()  # Outputs that are views cannot be written to in place.
        else:
            out = torch.where(sees_any.unsqueeze(-1), out, 0.0)
            lse = torch.where(sees_any, lse, -torch.inf)
        ctx.kernels, ctx.is_causal, ctx.scale = kernels, is_causal, scale
        ctx.save_for_backward(query, keys, values, bias, out, saved_lse, sees_any)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        check_not_batched(grads)
        query, keys, values, bias, out, lse, sees_any = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_out is None and grad_lse is None:
            return (None,) * 8
        operands: tuple[Tensor, ...] = (query, keys, values)
        with torch.no_grad(), disable_autocast(query.device):
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            if sees_any is not None:
                missing = lse.shape[-1] - query.shape[-2]
                sees_any = F.pad(sees_any.expand(out.shape[:-1]), (0, missing)) if missing else sees_any
                lse = torch.where(sees_any, lse, torch.inf)
            if grad_lse is not None:
                operands, out, grad_out = _add_lse_column(ctx.kernels, operands, out, grad_out, grad_lse)
            results: Any = ctx.kernels.backward(
                grad_out.contiguous(), *operands, bias, out, lse, ctx.state, ctx.is_causal, ctx.scale
            )
            widths = [tensor.shape[-1] for tensor in (query, keys, values)]
            results = [result.narrow(-1, 0, width) for result, width in zip(results, widths, strict=True)]
        results = [result if needed else None for result, needed in zip(results, ctx.needs_input_grad, strict=False)]
        return *forbid_double_backward(results, query, keys, values, *grads), None, None, None, None, None


def _add_lse_column(
    kernels: AttentionKernels, operands: tuple[Tensor, ...], out: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Add a value column of ones, whose output has the gradient of the log-sum-exp.

    The gradient of a score is ``weight * (grad_out @ value - grad_out @ out)``. With a 1 appended to the value, the
    gradient of the log-sum-exp to ``grad_out`` and a 0 to ``out``, it is ``weight * (grad_out @ value - grad_out @ out
    + grad_lse)``.
    """
    query, keys, values = operands
    column = (0, ALIGNMENT)
    ones = F.pad(values.new_ones(()).expand(*values.shape[:-1], 1), (0, ALIGNMENT - 1))
    given = F.pad(grad_lse.to(grad_out.dtype).unsqueeze(-1), (0, ALIGNMENT - 1))
    if kernels.needs_equal_widths:
        query, keys = F.pad(query, column), F.pad(keys, column)
    return (query, keys, torch.cat([values, ones], -1)), F.pad(out, column), torch.cat([grad_out, given], -1)


def attend(
    query: Tensor,  # (b, h, B, d)
    keys: Tensor,  # (b, h, N, d)
    values: Tensor,  # (b, h, N, dv)
    mask: Tensor | None,  # broadcastable to (b, h, B, N)
    scale: float,
    *,
    is_causal: bool,
    kernels: AttentionKernels,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp; both are differentiable.

    Equal to::

        scores = scale * query @ keys.mT                          # hidden rows: -inf; a floating-point mask is added
        values = softmax(scores) @ values; lse = logsumexp(scores)

    without allocating the scores. Nothing is copied to the CPU: NaN or infinity in an operand makes the results of its
    table NaN. A row that no query may see has no effect, even if it holds NaN.

    Args:
        query: Queries, in the dtype of keys and values.
        keys: Keys of each table.
        values: Values of each table.
        mask: As for `softdb.functional.soft_read`, without gradient; None for none.
        scale: Factor of the scores.
        is_causal: Whether query i sees the rows up to i; then there is no mask.
        kernels: The kernels: see `choose_kernels`.

    Returns:
        The values, (b, h, B, dv), in the dtype of the operands; the log-sum-exp, (b, h, B), in float32.
    """
    width = values.shape[-1]
    bias = visible = None
    if is_causal:  # No query sees the rows beyond the number of queries.
        count = min(query.shape[-2], keys.shape[-2])
        keys, values = keys.narrow(-2, 0, count), values.narrow(-2, 0, count)
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask.detach() > -torch.inf
        visible = visible.expand(*visible.shape[:-1], keys.shape[-2])
        bias = _make_bias(mask, visible, query)
    query, keys, values = (_align(tensor) for tensor in (query, keys, values))
    out, lse = _Attention.apply(query, keys, values, bias, visible, kernels, is_causal, scale)  # type: ignore[no-untyped-call]
    return (out if out.shape[-1] == width else out.narrow(-1, 0, width)), lse


# Lowest bias of a visible row. The kernels multiply biases by log2(e), which must not overflow.
LOWEST_BIAS = -(2.0**120)


def _make_bias(mask: Tensor, visible: Tensor, query: Tensor) -> Tensor:  # -> (b, h, B, N)
    """Convert a mask to numbers to add to the scores, in aligned memory."""
    if mask.dtype == torch.bool:
        numbers = query.new_zeros(())
    else:
        numbers = mask.detach().to(query.dtype).clamp(min=max(LOWEST_BIAS, torch.finfo(query.dtype).min))
    bias = torch.where(visible, numbers, -torch.inf)
    rows = bias.shape[-1]
    if rows % BIAS_ALIGNMENT:
        bias = F.pad(bias, (0, -rows % BIAS_ALIGNMENT)).narrow(-1, 0, rows)
    return bias.expand(*query.shape[:-1], rows)


def _align(tensor: Tensor) -> Tensor:
    """Pad a width by zeros to a multiple of `ALIGNMENT`, and copy unaligned memory."""
    missing = -tensor.shape[-1] % ALIGNMENT
    if missing:
        return F.pad(tensor, (0, missing))
    is_aligned = tensor.stride(-1) == 1 and tensor.storage_offset() % ALIGNMENT == 0
    if is_aligned and all(step % ALIGNMENT == 0 for step in tensor.stride()[:-1]):
        return tensor
    return tensor.contiguous()
