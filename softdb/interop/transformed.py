"""Reads of a store under transforms of torch.func: how samples become more queries, and what a callable may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from softdb.errors import TransformError
from softdb.transforms import Operands, is_wrapped

CAPTURED = (
    "expected a callable that uses no tensors which a transform of torch.func wraps, since it runs outside of the "
    "transform; pass where or exclude as a tensor"
)


def fold_queries(operands: Operands, batched: list[bool], size: int) -> Operands | None:
    """Make more queries of one read of the samples of `SoftKVStore.read`, unless each has its own rows."""
    query, keys, values, temperature, where, exclude, salt = operands
    if query is None or batched[1] or batched[2] or batched[4]:
        return None
    leading = query.dim() - 1 - batched[0]
    if not batched[0]:
        query = query.unsqueeze(0).expand(size, *query.shape)
    if temperature is not None and batched[3]:
        temperature = temperature.reshape(size, *[1] * (leading + 1 - temperature.dim()), *temperature.shape[1:])
    if exclude is not None and not batched[5]:
        exclude = exclude.unsqueeze(0).expand(size, *exclude.shape)
    return [query, keys, values, temperature, where, exclude, salt]


def fold_no_samples(operands: Operands, batched: list[bool], size: int) -> None:
    """Make no single read of the samples: a callable is written for the queries of one."""


def without_wrapped_tensors(
    where: Callable[[Mapping[str, Tensor]], Tensor],
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Guard a callable ``where``, which runs outside of the transforms around its read."""

    def guarded(row: Mapping[str, Tensor]) -> Tensor:
        try:
            allowed = where(row)
        except RuntimeError as error:
            raise TransformError(f"where: {CAPTURED}; the callable raised {type(error).__name__}") from error
        if is_wrapped(allowed):
            raise TransformError(f"where: {CAPTURED}")
        return allowed

    return guarded
