"""Partition the Parameters of a model into tables of rows and others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from softdb._checks import describe
from softdb.errors import DtypeError
from softdb.store import SoftKVStore
from softdb.table.hooks import is_row_embedding

__all__ = ["other_parameters", "row_parameters"]


def row_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the Parameters of ``model`` that are tables of rows.

    They are ``keys`` and ``values`` of each trainable `softdb.SoftKVStore`, the values of each
    `softdb.layers.ProductKeyMemory`, and the weight of each ``nn.Embedding(sparse=True)`` and
    ``nn.EmbeddingBag(sparse=True)``. Each Parameter of the model is yielded once, either by this function or by
    `other_parameters`.

    Use both functions to give rows and the rest of the model different options: weight decay and small learning rates
    rarely suit rows.

    Args:
        model: A module, a store or a layer.

    Returns:
        An iterator in the order of ``model.parameters()``. Its cost depends on the number of modules, not on the number
        of rows.

    Raises:
        DtypeError: ``model`` is no module.

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
    rows = _find_rows(model)
    return (parameter for parameter in model.parameters() if id(parameter) in rows)


def other_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the Parameters of ``model`` that `row_parameters` does not yield.

    Args:
        model: A module, a store or a layer.

    Returns:
        An iterator in the order of ``model.parameters()``.

    Raises:
        DtypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> from softdb.layers import ProductKeyMemory
        >>> from softdb.optim import RowAdam, other_parameters, row_parameters
        >>> layer = ProductKeyMemory(64, rows=128 * 128, key_dim=32, k=8, sparse_grad=True)
        >>> optimizers = RowAdam(row_parameters(layer), lr=1e-2), torch.optim.AdamW(other_parameters(layer))
    """
    rows = _find_rows(model)
    return (parameter for parameter in model.parameters() if id(parameter) not in rows)


def _find_rows(model: nn.Module) -> set[int]:
    """Return the ids of the tensors of ``model`` that are tables of rows."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: expected a module, got {describe(model)}")
    return {id(tensor) for module in model.modules() for tensor in _tables_of(module)}


def _tables_of(module: nn.Module) -> Iterator[Tensor]:
    if isinstance(module, SoftKVStore):
        yield from (tensor for name, tensor in module.named_parameters(recurse=False) if name in ("keys", "values"))
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (module.sparse or is_row_embedding(module)):
        yield module.weight
