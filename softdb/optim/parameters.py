"""Partition the Parameters of a model into tables of rows and others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from softdb.table.hooks import holds_rows

__all__ = ["other_parameters", "row_parameters"]


def row_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the Parameters of ``model`` that are tables of rows.

    They are ``keys`` and ``values`` of each trainable `softdb.SoftKVStore`, the values of each
    `softdb.layers.ProductKeyMemory`, and the weight of each ``nn.Embedding(sparse=True)`` and
    ``nn.EmbeddingBag(sparse=True)``. Each Parameter of the model is yielded once, by either this function or
    `other_parameters`.

    Use both functions to give rows other options than the rest of the model: weight decay and small learning rates
    rarely suit rows.

    Example:
        >>> import torch
        >>> from softdb.layers import MemoryLayer
        >>> from softdb.optim import RowAdam, other_parameters, row_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), MemoryLayer(8, rows=100))
        >>> rows = {"params": row_parameters(model), "lr": 1e-2}
        >>> others = {"params": other_parameters(model), "lr": 1e-3, "weight_decay": 0.01}
        >>> optimizer = RowAdam([rows, others])
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [2, 4]
    """
    sparse = _sparse_embeddings(model)
    return (parameter for parameter in model.parameters() if holds_rows(parameter) or id(parameter) in sparse)


def other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the Parameters of ``model`` that `row_parameters` does not yield."""
    rows = {id(parameter) for parameter in row_parameters(model)}
    return (parameter for parameter in model.parameters() if id(parameter) not in rows)


def _sparse_embeddings(model: nn.Module) -> set[int]:
    embeddings = (module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
    return {id(embedding.weight) for embedding in embeddings if embedding.sparse}
