"""`Stores`: the past tokens of a `ContextMemory` with ``k``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from softdb.layers.queries import stack_reads
from softdb.layers.segments import Segment, load_count, no_tokens
from softdb.reading.result import Read
from softdb.store import SoftKVStore

__all__ = ["Stores"]


# Minimum number of rows per sequence for which an index finds the k best.
MIN_INDEXED_ROWS = 4096


class Stores:
    """Last tokens of every sequence, in one store each; reads attend to the k best.

    The id of a row is the number of its token, counted from 0. If there are at least `MIN_INDEXED_ROWS` rows, an index
    finds the k best. Tokens of document -1 are counted, but not stored.

    Attributes:
        written: Number of tokens of each sequence that have been written.
    """

    required_names: frozenset[str] = frozenset()

    def __init__(self, rows: int, key_dim: int, value_dim: int, k: int) -> None:
        self.rows, self.widths, self.k = rows, (key_dim, value_dim), k
        self.clear()

    def new_empty(self) -> Stores:
        """Return a memory of the same shape without tokens."""
        return Stores(self.rows, *self.widths, self.k)

    def accepts_name(self, name: str) -> bool:
        """Return whether a state may have an entry of this name."""
        return name == "written" or name.split(".")[0].isdigit()

    def clear(self) -> None:
        """Forget everything."""
        self.stores: list[SoftKVStore] = []
        self.written = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "written" not in state:  # Older pickles count no tokens.
            self.written = self._count_numbers()

    def _count_numbers(self) -> int:
        """Return the lowest number above those of all tokens in the stores."""
        return max((int(store.ids.max()) + 1 for store in self.stores if len(store)), default=0)

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first segment."""
        return len(self.stores)

    def _new_stores(self, batch: int, like: Tensor) -> list[SoftKVStore]:
        # The index is built while a sequence is processed, so choose one that is cheap to build.
        lists = 2 ** round(math.log2(2 * self.rows) / 2)
        index = f"IVF{lists},Flat" if self.rows >= MIN_INDEXED_ROWS else "Flat"
        return [
            SoftKVStore(
                *self.widths,
                fields=("document",),
                index=index,
                capacity=self.rows,
                evict="oldest",
                device=like.device,
                dtype=like.dtype,
            )
            for _ in range(batch)
        ]

    def forget(self, indices: Tensor) -> None:
        """Forget the tokens of the sequences at ``indices`` in the batch."""
        for index in indices.unique().tolist():
            if self.stores:
                self.stores[index].clear()

    def select(self, indices: Tensor) -> None:
        """Replace the sequences by those at ``indices``; copy a store that is repeated."""
        if self.stores:
            repeated = [index in indices[:place] for place, index in enumerate(indices)]
            chosen = [self.stores[index] for index in indices.tolist()]
            self.stores = [copy.deepcopy(s) if copied else s for s, copied in zip(chosen, repeated, strict=True)]

    def crop(self, length: int) -> bool:
        """Forget all tokens but the first ``length``.

        Returns:
            False, since dropped tokens are deleted, not hidden.
        """
        for store in self.stores:
            store.delete(where=store.ids >= length)
        self.written = length
        return False

    def list_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers, keys and values of the tokens of document 0 of sequence 0."""
        if not self.stores:
            return no_tokens(self.widths)
        ids = self.stores[0].ids
        rows = self.stores[0].get(ids)
        is_shown = rows.fields["document"] == 0
        return ids[is_shown], rows.keys[is_shown], rows.values[is_shown]

    def write(self, segment: Segment) -> None:
        """Write the tokens of a segment over the oldest ones."""
        if not self.stores:
            self.stores = self._new_stores(len(segment[0]), segment[0])
        for store, keys, values, documents in zip(self.stores, *segment, strict=True):
            places = (documents >= 0).nonzero().squeeze(-1)[-self.rows :]
            fields = {"document": documents[places]}
            store.add(keys[places], values[places], ids=self.written + places, fields=fields)
        self.written += segment[2].shape[1]

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read the tokens of each query's document; None if there are no tokens."""
        if not any(map(len, self.stores)):
            return None
        reads = []
        for number, store in enumerate(self.stores):
            where = None
            if documents is not None:
                wanted = documents[number].expand(queries.shape[2]).repeat(queries.shape[1]).unsqueeze(-1)
                where = _is_of_document(wanted)
            reads.append(store.read(queries[number], "topk", k=self.k, where=where))
        return stack_reads(reads, 0)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor with a function."""
        for store in self.stores:
            store._apply(function)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save; empty ones have the dtype and device of ``like``."""
        saved: dict[str, Tensor] = {}
        for number, store in enumerate(self.stores):
            store.state_dict(destination=saved, prefix=f"{number}.")
        return saved | {"written": torch.tensor(self.written, dtype=torch.int64, device=like.device)}

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Load a state; return whether a token may have a document other than 0."""
        numbers = {int(key.split(".")[0]) for key in state if key != "written"}
        stores = self._new_stores(len(numbers), like)
        for number, store in enumerate(stores):
            start = f"{number}."
            store.load_state_dict({key[len(start) :]: state[key] for key in state if key.startswith(start)})
        self.stores = stores
        least = self._count_numbers()
        self.written = load_count(state, name, least) if "written" in state else least
        return any(bool((store.rows.view(store.rows.live_slots())["document"] != 0).any()) for store in stores)


def _is_of_document(wanted: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:  # (B, 1)
    """Make a filter that allows each query the rows of its document."""
    return lambda row: row["document"] == wanted
