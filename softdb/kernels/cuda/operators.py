"""Operators of the exact read in Triton, with fake implementations for tracing.

An operator hides a launch from ``torch.compile`` and from ``FakeTensorMode``, under which its fake implementation gives
the shapes of the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.kernels.cuda.backward import Gradients, Needs, read_backward
from softdb.kernels.cuda.forward import Softmax, read_forward
from softdb.kernels.cuda.launch import on_device

__all__ = ["differentiate_read", "read"]

OPTIONS = (
    "Tensor? mask, Tensor? center, Tensor? rate, str metric, int groups, int rows, float divisor, str precision, "
    "int multiprocessors"
)

torch.library.define(
    "softdb::triton_exact_read",
    f"(Tensor query, Tensor keys, Tensor values, bool round_weights, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "softdb::triton_exact_read_backward",
    "(Tensor query, Tensor keys, Tensor values, Tensor maximum, Tensor total, Tensor delta, Tensor? grad_blend, "
    f"bool[] needs, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("softdb::triton_exact_read", "default")
def _read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    round_weights: bool,
    mask: Tensor | None,
    center: Tensor | None,
    rate: Tensor | None,
    metric: str,
    groups: int,
    rows: int,
    divisor: float,
    precision: str,
    multiprocessors: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device(query):
        return read_forward(
            query,
            keys,
            values,
            metric,
            groups=groups,
            rows=rows,
            mask=mask,
            center=center,
            rate=rate,
            divisor=divisor,
            precision=precision,
            round_weights=round_weights,
            multiprocessors=multiprocessors,
        )


def _fake_read(query: Tensor, keys: Tensor, values: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = query.shape[0]
    shapes: list[tuple[int, ...]] = [(count, values.shape[-1]), (count,), (count,), (count,)]
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


@torch.library.impl("softdb::triton_exact_read_backward", "default")
def _read_backward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    maximum: Tensor,
    total: Tensor,
    delta: Tensor,
    grad_blend: Tensor | None,
    needs: list[bool],
    mask: Tensor | None,
    center: Tensor | None,
    rate: Tensor | None,
    metric: str,
    groups: int,
    rows: int,
    divisor: float,
    precision: str,
    multiprocessors: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device(query):
        gradients = read_backward(
            query,
            keys,
            values,
            metric,
            maximum,
            total,
            delta,
            grad_blend,
            Needs(*needs),
            groups=groups,
            rows=rows,
            mask=mask,
            center=center,
            rate=rate,
            divisor=divisor,
            precision=precision,
            multiprocessors=multiprocessors,
        )
    # An operator cannot return None.
    results = [query.new_empty(0) if gradient is None else gradient for gradient in gradients]
    return tuple(results)  # type: ignore[return-value]


def _fake_read_backward(
    query: Tensor, keys: Tensor, values: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs = Needs(*options[4])  # type: ignore[misc]
    results = [
        query.new_empty(query.shape if needs.query else 0, dtype=torch.float32),
        keys.new_empty(keys.shape if needs.keys else 0),
        values.new_empty(values.shape if needs.values else 0),
        query.new_empty(query.shape[:1] if needs.rate else 0, dtype=torch.float32),
    ]
    return tuple(results)  # type: ignore[return-value]


torch.library.register_fake("softdb::triton_exact_read", _fake_read)
torch.library.register_fake("softdb::triton_exact_read_backward", _fake_read_backward)


def read(query: Tensor, keys: Tensor, values: Tensor, round_weights: bool, *options: object) -> Softmax:
    """Call `softdb.kernels.cuda.forward.read_forward` as an operator.

    Args:
        query: The queries of the kernel.
        keys: The keys as stored.
        values: The values as stored.
        round_weights: As for the kernel.
        options: Mask, center, rate, metric, groups, rows, divisor, precision and
            multiprocessors.
    """
    return Softmax(*torch.ops.softdb.triton_exact_read(query, keys, values, round_weights, *options))


def differentiate_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: tuple[Tensor, Tensor],
    delta: Tensor,
    grad_blend: Tensor | None,
    needs: Needs,
    *options: object,
) -> Gradients:
    """Call `softdb.kernels.cuda.backward.read_backward` as an operator.

    Args:
        query: The queries of the kernel.
        keys: The keys as stored.
        values: The values as stored.
        softmax: Maximum and total of forward.
        delta: As for the kernel.
        grad_blend: As for the kernel.
        needs: As for the kernel.
        options: As for `read`.
    """
    needs = needs._replace(values=needs.values and grad_blend is not None)
    results = torch.ops.softdb.triton_exact_read_backward(
        query, keys, values, *softmax, delta, grad_blend, list(needs), *options
    )
    return Gradients(*(result if need else None for result, need in zip(results, needs, strict=True)))
