"""Rows that a head of a layer reads, for explanations of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import check_int
from softdb.errors import ArgumentError
from softdb.layers.context import ContextMemory
from softdb.layers.memory import MemoryLayer
from softdb.layers.product_keys import ProductKeyMemory
from softdb.layers.product_search import find_best_pairs
from softdb.reading.result import Read
from softdb.scoring.normalizers import is_sparse
from softdb.store import SoftKVStore
from softdb.table.rows import Rows

__all__ = ["HeadRows", "Layer", "find_head_rows"]


Layer = MemoryLayer | ContextMemory | ProductKeyMemory


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Rows that a head reads for Q inputs, and its queries.

    `read` weighs the rows as the layer does.

    Attributes:
        store: Store with the rows.
        queries: Queries of the head, (Q, key_dim).
        temperature: Divisor of the scores.
        normalizer: Name of the normalizer.
        ids: Ids of all rows of the layer, (n,), of which ``store`` may have only some.
        seen: Whether each query sees each row, (Q, rows of the store), indexed by the field "place"; None if each query
            sees all rows.
        noun: Name of a row in default labels.
    """

    store: SoftKVStore
    queries: Tensor
    temperature: float
    normalizer: str
    ids: Tensor
    seen: Tensor | None = None
    noun: str = "row"

    def read(self, query: Tensor, **options: Any) -> Read:  # (Q, key_dim)
        """Read the rows that the queries see, as `softdb.SoftKVStore.read` does."""
        return self.store.read(query, where=None if self.seen is None else _is_seen(self.seen), **options)

    def get(self, ids: Tensor) -> Rows:
        """Return copies of rows, as `softdb.SoftKVStore.get` does."""
        return self.store.get(ids)


def _is_seen(seen: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:  # (Q, n)
    """Make a filter that allows each query the rows that it sees."""

    def where(row: Mapping[str, Tensor]) -> Tensor:
        places = row["place"]  # (C,) or (Q, C)
        return seen[:, places] if places.dim() == 1 else seen.gather(1, places)

    return where


def find_head_rows(layer: Layer, x: Tensor, head: int, sequence: int | None) -> HeadRows:
    """Find the rows that a head reads for inputs, and its queries.

    If a store tracks usage, these reads count. Batch normalization uses its running statistics, as in eval mode.

    Args:
        layer: A `MemoryLayer`, `ContextMemory` or `ProductKeyMemory`.
        x: (Q, dim). For a `ContextMemory` the next tokens of one sequence, which are not stored.
        head: Number of the head.
        sequence: For a `ContextMemory`, index of the sequence in the batch; None for the first.

    Raises:
        ArgumentError: There is no such head or sequence.
        DtypeError: ``head`` or ``sequence`` is no integer.
    """
    head = _check_head(head, layer.heads)
    if isinstance(layer, ContextMemory):
        return _find_tokens(layer, x, head, 0 if sequence is None else sequence)
    if sequence is not None:
        raise ArgumentError(
            f"sequence: expected no value with a {type(layer).__name__}, which has no sequences; leave it out"
        )
    return _find_pairs(layer, x, head) if isinstance(layer, ProductKeyMemory) else _find_rows(layer, x, head)


def _check_head(head: object, heads: int) -> int:
    """Return the number of a head as an int."""
    number = check_int("head", head, least=0)
    if number >= heads:
        raise ArgumentError(f"head: expected a number from 0 to {heads - 1}, got {number}")
    return number


def _find_rows(layer: MemoryLayer, x: Tensor, head: int) -> HeadRows:
    """Find the rows that a head of a `MemoryLayer` reads."""
    store: Any = layer.stores[head if len(layer.stores) > 1 else 0]
    with _in_eval_mode(layer.queries):
        queries = layer.queries(x)[:, head, 0]
    uses_own = layer.log_temperature is None and len(layer.stores) > 1
    temperature = float(store.temperature) if uses_own else _temperature_of(layer, head)
    # A hard read is the forward of straight_through.
    normalizer = "straight_through" if layer.mode == "hard" else layer.normalizer
    if layer.mode != "topk" or layer.tolerance is not None:
        return HeadRows(store, queries, temperature, normalizer, store.ids)
    weighing = normalizer if is_sparse(normalizer) else "softmax"  # A sparse normalizer may need more than k rows.
    found = store.read(queries, "topk", k=layer.k, temperature=temperature, normalizer=weighing).ids
    ids, seen = _list_rows(found)
    rows = store.get(ids)
    copied = _make_store(ids, rows.keys, rows.values, store.metric, layer.training)
    return HeadRows(copied, queries, temperature, normalizer, store.ids, seen)


def _find_pairs(layer: ProductKeyMemory, x: Tensor, head: int) -> HeadRows:
    """Find the rows that a head of a `ProductKeyMemory` reads."""
    with _in_eval_mode(layer.queries):
        halves = layer.queries(x)[:, head]  # (Q, 2, half)
    keys = layer.keys[head]
    _, found = find_best_pairs(halves.unsqueeze(1).to(keys.dtype), keys.unsqueeze(0), layer.k, layer.search)
    ids, seen = _list_rows(found[:, 0])
    pairs = torch.cat([keys[0, ids // layer.count], keys[1, ids % layer.count]], -1)
    store = _make_store(ids, pairs, layer.store.weight[ids], "dot", layer.training)
    all_ids = torch.arange(layer.rows, device=ids.device)
    return HeadRows(store, halves.flatten(-2), _temperature_of(layer, head), "softmax", all_ids, seen)


def _find_tokens(layer: ContextMemory, x: Tensor, head: int, sequence: int) -> HeadRows:
    """Find the tokens that a head of a `ContextMemory` attends to.

    The id of a token is its number since `ContextMemory.reset`.
    """
    past = layer._current_past
    index = check_int("sequence", sequence, least=0)
    if index >= max(1, past.batch):
        raise ArgumentError(f"sequence: expected an index into a batch of {past.batch}, got {index}")
    past = past.copy_sequence(index)
    queries = layer.queries(x)[:, head, 0]
    numbers, keys, values = past.tokens.list_tokens()
    count, temperature = len(x), _temperature_of(layer, head)
    own = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
    seen = torch.ones(count, len(numbers), dtype=torch.bool, device=x.device)
    if layer.k is not None and len(numbers):
        found = past.read((queries / temperature)[None, None], None)
        seen = torch.zeros_like(seen) if found is None or found.ids is None else _is_listed(found.ids[0, 0], numbers)
    ids = torch.cat([numbers.to(x.device), past.length + torch.arange(count, device=x.device)])
    keys = torch.cat([keys.to(x.device), layer.keys(x)[:, 0, 0]])
    values = torch.cat([values.to(x.device), layer.values(x)])
    store = _make_store(ids, keys, values, "scaled_dot", layer.training)
    all_ids = torch.arange(past.length + count, device=x.device)
    visible = torch.cat([seen, own], -1)
    return HeadRows(store, queries, temperature, "softmax", all_ids, visible, noun="token")


def _temperature_of(layer: Layer, head: int) -> float:
    """Return the temperature of a head."""
    temperature = layer.temperature
    return float(temperature[head] if isinstance(temperature, Tensor) else temperature)


def _list_rows(found: Tensor) -> tuple[Tensor, Tensor]:  # (Q, k) -> (n,), (Q, n)
    """List the distinct ids of the rows found, and mark the ids that each query found."""
    ids = found[found >= 0].unique()
    return ids, _is_listed(found, ids)


def _is_listed(found: Tensor, ids: Tensor) -> Tensor:  # (Q, k), (n,) -> (Q, n)
    """Return which of ``ids`` each query found; -1 is padding."""
    ordered, order = ids.sort()
    listed = torch.zeros(len(found), len(ids), dtype=torch.bool, device=ids.device)
    query, place = (found >= 0).nonzero(as_tuple=True)
    listed[query, order[torch.searchsorted(ordered, found[query, place])]] = True
    return listed


def _make_store(ids: Tensor, keys: Tensor, values: Tensor, metric: Any, training: bool) -> SoftKVStore:
    """Make a store of rows, whose field "place" is their place in ``ids``."""
    places = {"place": torch.arange(len(ids), device=ids.device)}
    store = SoftKVStore.from_tensors(keys, values, ids=ids, fields=places, metric=metric, index="Flat")
    return store.train(training)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Set a module and its parts to eval mode until the block ends."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # A part may have another mode than the module, for example a frozen normalization.
        for part, was_training in modes:
            part.training = was_training
