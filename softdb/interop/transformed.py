"""Reads of a store under transforms of torch.func.

Samples of vmap become queries of one read where possible. A callable ``where`` must not use wrapped tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from softdb._checks import check_float_tensor
from softdb.errors import TransformError
from softdb.filters import convert_list
from softdb.interop.pruning import recompute_pruned
from softdb.reading.options import ReadOptions
from softdb.reading.result import Read, make_answer, make_leaves, make_read
from softdb.scoring.normalizers import is_random
from softdb.transforms import Answer, Operands, is_wrapped, read_opaquely, suspend_transforms

__all__ = ["read_under_transform"]

WRAPPED_MESSAGE = (
    "expected a callable that uses no tensors which a transform of torch.func wraps, because it runs outside of the "
    "transform; pass where or exclude as a tensor"
)

# Options of a read that may be tensors, in the order of the operands after query, keys and values.
TENSOR_OPTIONS = ("temperature", "where", "exclude", "bias")


def read_under_transform(store: Any, query: Tensor, **options: Any) -> Read:
    """Run ``store.read(query, **options)`` while a transform of torch.func is active."""
    normalizer, generator = options["normalizer"], options["generator"]
    keys, values = store.keys, store.values
    for name in ("where", "exclude"):
        options[name] = convert_list(name, options[name], keys.device)
    ReadOptions(**options)
    check_float_tensor("query", query, (-1, store.key_dim), keys.device)
    if is_wrapped(*store.rows.buffers()):
        raise TransformError(
            "rows: expected the store's own buffers, got buffers that a transform of torch.func wraps; pass only "
            "Parameters to functional_call"
        )
    if callable(options["where"]):
        options["where"] = forbid_wrapped_tensors(options["where"])
    random = "batch" if options["tail_samples"] or options["tolerance"] is not None else ""
    if is_random(normalizer) and store.training:
        random = "queries"
    names = [name for name in TENSOR_OPTIONS if isinstance(options[name], Tensor)]
    given = [options[name] if name in names else None for name in TENSOR_OPTIONS]
    if not random and not is_wrapped(query, keys, values, *given):
        with suspend_transforms():
            plain: Read = store.read(query, **options)
            return plain
    is_replaced = is_wrapped(keys, values)

    def run(operands: Operands, wanted: list[bool]) -> Answer:
        needs_grad = [want and (is_replaced or place not in (1, 2)) for place, want in enumerate(wanted)]
        own = make_leaves(operands, needs_grad)
        own_query, own_keys, own_values, *rest = cast("list[Tensor]", own)
        arguments = dict(zip(TENSOR_OPTIONS, rest, strict=False))
        chosen = options | {name: arguments[name] for name in names}
        if not is_replaced:
            recompute_pruned(store)
        replacements = {"keys": own_keys, "values": own_values} if is_replaced else None
        read = store._reader.run(own_query, ReadOptions(**chosen), replacements)
        return make_answer(read, own)

    fold = refuse_to_fold if callable(options["where"]) else fold_queries
    operands = [query, keys, values, *given]
    return make_read(*read_opaquely(run, fold, operands, random=random, generator=generator, sparse=not is_replaced))


def fold_queries(operands: Operands, batched: list[bool], size: int) -> Operands | None:
    """Return the operands of one read of all samples; None if that is not possible.

    It is not possible if samples have their own keys, values or ``where``.
    """
    query, keys, values, temperature, where, exclude, bias, salt = operands
    if query is None or batched[1] or batched[2] or batched[4]:
        return None
    leading = query.dim() - 1 - batched[0]
    if not batched[0]:
        query = query.unsqueeze(0).expand(size, *query.shape)
    if temperature is not None and batched[3]:
        temperature = temperature.reshape(size, *[1] * (leading + 1 - temperature.dim()), *temperature.shape[1:])
    if exclude is not None and not batched[5]:
        exclude = exclude.unsqueeze(0).expand(size, *exclude.shape)
    if bias is not None and batched[6]:
        bias = bias.reshape(size, *[1] * (leading + 2 - bias.dim()), *bias.shape[1:])
    return [query, keys, values, temperature, where, exclude, bias, salt]


def refuse_to_fold(operands: Operands, batched: list[bool], size: int) -> None:
    """Return None, because a callable ``where`` expects the queries of one sample."""


def forbid_wrapped_tensors(
    where: Callable[[Mapping[str, Tensor]], Tensor],
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Wrap a callable ``where`` to raise if it uses tensors that a transform wraps.

    The callable runs outside of the transforms, where such tensors are not valid.
    """

    def checked_where(row: Mapping[str, Tensor]) -> Tensor:
        try:
            allowed = where(row)
        except RuntimeError as error:
            raise TransformError(f"where: {WRAPPED_MESSAGE}; the callable raised {type(error).__name__}") from error
        if is_wrapped(allowed):
            raise TransformError(f"where: {WRAPPED_MESSAGE}")
        return allowed

    return checked_where
