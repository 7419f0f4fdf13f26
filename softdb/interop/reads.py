"""Dispatch of a read: eager, as an operator of a graph, or under torch.func."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdb._checks import Ids
from softdb.errors import TransformError
from softdb.filters import Where
from softdb.interop.compile import read_in_graph
from softdb.interop.pruning import recompute_pruned
from softdb.interop.transformed import read_under_transform
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.result import Read
from softdb.transforms import check_no_tangent, is_active, is_forward_mode, is_traced

__all__ = ["read"]


def read(
    store: Any,
    query: Tensor,
    mode: Mode,
    k: int | None,
    where: Where | None,
    exclude: Ids | None,
    temperature: float | Tensor | None,
    normalizer: str,
    tail_samples: int,
    tolerance: float | None,
    generator: torch.Generator | None,
    bias: Tensor | None,
) -> Read:
    """Run ``store.read`` eagerly, as an operator of a graph, or under transforms."""
    keys = store.keys
    if keys.is_meta or store.rows.ids.is_meta:
        store._table.check_not_meta()
    if torch._C._get_tracing_state() is not None:
        raise TransformError(
            "query: expected no torch.jit.trace around a read, because it would record the present rows as constants; "
            "use torch.compile or torch.export"
        )
    is_compiling = torch.compiler.is_dynamo_compiling() or is_traced(query)
    if is_compiling or is_active():
        run = read_in_graph if is_compiling else read_under_transform
        return run(
            store,
            query,
            mode=mode,
            k=k,
            where=where,
            exclude=exclude,
            temperature=temperature,
            normalizer=normalizer,
            tail_samples=tail_samples,
            tolerance=tolerance,
            generator=generator,
            bias=bias,
        )
    if is_forward_mode():
        check_no_tangent(query, keys, store.values, temperature, bias)
    options = ReadOptions(mode, k, where, exclude, temperature, normalizer, tail_samples, tolerance, generator, bias)
    recompute_pruned(store)
    answer: Read = store._reader.run(query, options)
    return answer
