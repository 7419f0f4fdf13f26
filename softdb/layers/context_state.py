"""State of a `ContextMemory`: past tokens, in a ring of tensors or in stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from softdb._checks import check_shape
from softdb.errors import ArgumentError, DtypeError, ShapeError, StaleReadError
from softdb.functional import soft_read
from softdb.layers.queries import stack_reads
from softdb.reading.result import Read
from softdb.store import SoftKVStore
from softdb.transforms import is_active

__all__ = ["ContextState", "Ring", "Stores"]


Segment = tuple[Tensor, Tensor, Tensor]  # keys, values and documents, (batch, n, ...)


SEGMENT_NAMES = ("keys", "values", "documents")


# Number of rows per sequence from which an index finds the k best.
MIN_INDEXED_ROWS = 4096


class ContextState:
    """Past tokens of every sequence, and the last segment, which is written later.

    The last segment is written to the past tokens at the next call. If it were written immediately, it would overwrite
    rows that its own backward still needs.

    Attributes:
        tokens: The past tokens without the last segment.
        recent: The last segment, not written yet: keys, values and documents, (batch, n, ...).
        mixed: Whether a token may belong to a document other than 0.
        version: Counter of changes to ``tokens``.
        is_loaded: Whether all tokens come from a state dict. The next segment may then belong to new sequences.
        last_keys: Keys of the last segment that was read.
        last_version: Version of ``tokens`` when that segment was read.
    """

    # Defaults for objects of older pickles, which lack these attributes.
    is_loaded = False
    last_keys: Tensor | None = None
    last_version = -1

    def __init__(self, tokens: Ring | Stores) -> None:
        self.tokens = tokens
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.version += 1
        self.tokens.clear()
        self.recent: Segment | None = None
        self.mixed = self.is_loaded = False

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first segment."""
        return self.tokens.batch if self.recent is None else len(self.recent[0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget(self, indices: Tensor) -> None:
        """Forget the tokens of the sequences at ``indices`` in the batch."""
        self.flush_segment()
        self.version += 1
        self.tokens.forget(indices)
        self.mixed = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, keys: Tensor, values: Tensor, documents: Tensor | None, dtype: torch.dtype) -> None:
        """Keep a segment, detached from the graph, until `flush_segment`."""
        batch, count = keys.shape[:2]
        last = slice(max(0, count - self.tokens.rows), count)
        if documents is None:
            documents = torch.zeros(batch, 1, dtype=torch.int64, device=keys.device)
        else:
            self.mixed = self.mixed or bool((documents != 0).any())
        documents = documents.expand(batch, count)[:, last].clone()
        self.recent = keys[:, last].to(dtype, copy=True), values[:, last].to(dtype, copy=True), documents
        self.is_loaded = False

    def record_segment(self, keys: Tensor) -> None:
        """Record the keys of a segment before it is read, for `is_recompute`."""
        self.last_keys, self.last_version = keys.detach(), self.version

    def is_recompute(self, keys: Tensor) -> bool:
        """Return whether ``keys`` are the last segment's, with ``tokens`` unchanged."""
        return self.last_keys is not None and self.last_version == self.version and torch.equal(self.last_keys, keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush_segment(self) -> None:
        """Write the last segment to the past tokens."""
        if self.recent is not None:
            self.version += 1
            self.tokens.write(self.recent)
            self.recent = None

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read, with each query, the tokens of its document.

        Args:
            queries: (batch, heads, n, key_dim).
            documents: (batch, 1 or n); None for document 0.

        Returns:
            A read of leading shape (batch, heads, n); None if there are no tokens.
        """
        if documents is None and self.mixed:
            documents = torch.zeros(len(queries), 1, dtype=torch.int64, device=queries.device)
        return self.tokens.read(queries, documents)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor with a function."""
        self.tokens.apply(function)
        if self.recent is not None:
            self.recent = _map_segment(function, self.recent)
        if self.last_keys is not None:
            self.last_keys = function(self.last_keys)

    @property
    def required_names(self) -> set[str]:
        """Names of the entries that every `state` has."""
        return {f"recent_{name}" for name in SEGMENT_NAMES} | self.tokens.required_names

    def accepts_name(self, name: str) -> bool:
        """Return whether a `state` may have an entry of this name."""
        return name in self.required_names or self.tokens.accepts_name(name)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save; empty ones have the dtype and device of ``like``."""
        recent = self.recent or _new_segment(self.tokens.batch, 0, self.tokens.widths, like)
        saved = {f"recent_{name}": part for name, part in zip(SEGMENT_NAMES, recent, strict=True)}
        return saved | self.tokens.state(like)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> None:
        """Load copies of the tensors of a `state`.

        Error messages name each key with the prefix ``name``.
        """
        given = {part: state[f"recent_{part}"] for part in SEGMENT_NAMES}
        _check_segment(given, f"{name}recent_", None, self.tokens.widths)
        rest = {key: tensor for key, tensor in state.items() if not key.startswith("recent_")}
        tokens, recent = self.tokens.new_empty(), _copy_segment(given, like)
        mixed = tokens.load(rest, name, like)
        if recent[2].numel() and tokens.batch not in (0, len(recent[0])):
            raise ShapeError(
                f"state_dict[{name + 'recent_documents'!r}]: expected {tokens.batch} sequences, as in the other "
                f"entries, got {len(recent[0])}"
            )
        self.tokens, self.version = tokens, self.version + 1
        self.recent = recent if recent[2].numel() else None
        self.mixed = mixed or bool((recent[2] != 0).any())
        self.is_loaded = True


class Ring:
    """Ring buffer of the last tokens of every sequence; reads attend to all of them.

    Token t of a sequence, counted from 0, is stored in row ``t % rows``.

    Attributes:
        tables: Keys, values and documents, (batch, rows, ...). Tokens of document -1 are hidden.
        written: Number of tokens of each sequence that have been written.
    """

    required_names = frozenset((*SEGMENT_NAMES, "written"))

    def __init__(self, rows: int, key_dim: int, value_dim: int) -> None:
        self.rows, self.widths = rows, (key_dim, value_dim)
        self.clear()

    def new_empty(self) -> Ring:
        """Return an empty ring of the same shape."""
        return Ring(self.rows, *self.widths)

    def accepts_name(self, name: str) -> bool:
        """Return whether a state may have an entry of this name."""
        return name in self.required_names

    def clear(self) -> None:
        """Forget everything."""
        self.tables: Segment | None = None
        self.written = 0

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first segment."""
        return 0 if self.tables is None else len(self.tables[0])

    def forget(self, indices: Tensor) -> None:
        """Forget the tokens of the sequences at ``indices`` in the batch."""
        if self.tables is not None:
            self.tables[2][indices.to(self.tables[2].device)] = -1

    def write(self, segment: Segment) -> None:
        """Write the tokens of a segment over the oldest ones."""
        batch, count = segment[2].shape
        if self.tables is None:
            self.tables = _new_segment(batch, self.rows, self.widths, segment[0])
        first = self.written % self.rows
        before_end = min(count, self.rows - first)
        for table, part in zip(self.tables, segment, strict=True):
            # Write through .data, which torch does not detect. Otherwise backward of an earlier read would raise after
            # any write. That backward needs only the rows that it read, and `_check_unchanged` checks exactly those.
            table.data[:, first : first + before_end] = part[:, :before_end]
            table.data[:, : count - before_end] = part[:, before_end:]
        self.written += count

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read the tokens of each query's document; None if there are no tokens."""
        if self.tables is None or self.written == 0:
            return None
        tables = _map_segment(torch.clone, self.tables) if is_active() else self.tables
        keys, values, stored = (table[:, None, : self.written] for table in tables)
        mask = None
        if documents is not None:
            mask = (stored.unsqueeze(-2) == documents[:, None, :, None]) & (stored.unsqueeze(-2) >= 0)
        read = soft_read(queries, keys, values, mask=mask)
        if is_active():  # The tables are copies, so no write changes them.
            return read
        check = partial(self._check_unchanged, self.tables, max(self.written, self.rows))
        for tensor in (read.values, read.lse):
            if tensor.requires_grad:
                tensor.register_hook(check)
        return read

    def _check_unchanged(self, tables: Segment, limit: int, gradient: Tensor) -> None:
        """Raise if tokens that a read of ``tables`` used have been overwritten.

        The oldest token of the read is overwritten once more than ``limit`` tokens have been written in total.
        """
        # If the layer was moved to another device or dtype, it has new tables, and the tables of the read are
        # unchanged.
        is_same_storage = self.tables is not None and self.tables[2].data_ptr() == tables[2].data_ptr()
        if is_same_storage and self.written > limit:
            raise StaleReadError(
                "backward: expected the tokens that the read used, got tokens that later segments have overwritten; "
                "call backward() before the next segment, or make the layer with more rows"
            )

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor with a function."""
        if self.tables is not None:
            self.tables = _map_segment(function, self.tables)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save; empty ones have the dtype and device of ``like``."""
        tables = self.tables or _new_segment(0, self.rows, self.widths, like)
        saved = dict(zip(SEGMENT_NAMES, tables, strict=True))
        return saved | {"written": torch.tensor(self.written, dtype=torch.int64, device=tables[0].device)}

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Load a state; return whether a token may have a document other than 0."""
        check_shape(f"state_dict[{name + 'written'!r}]", state["written"], ())
        _check_segment(state, name, self.rows if len(state["documents"]) else None, self.widths)
        written = int(state["written"])
        if written < 0:
            raise ArgumentError(f"state_dict[{name + 'written'!r}]: expected at least 0, got {written}")
        tables = _copy_segment(state, like)
        self.written = written
        self.tables = tables if len(tables[0]) else None
        return bool((tables[2] != 0).any())


class Stores:
    """Last tokens of every sequence, in one store each; reads attend to the k best.

    If there are at least `MIN_INDEXED_ROWS` rows, an index finds the k best. Tokens of document -1 are not stored.
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
        return name.split(".")[0].isdigit()

    def clear(self) -> None:
        """Forget everything."""
        self.stores: list[SoftKVStore] = []

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
                self.stores[index].delete(self.stores[index].ids)

    def write(self, segment: Segment) -> None:
        """Write the tokens of a segment over the oldest ones."""
        if not self.stores:
            self.stores = self._new_stores(len(segment[0]), segment[0])
        for store, keys, values, documents in zip(self.stores, *segment, strict=True):
            visible = documents >= 0
            store.add(keys[visible], values[visible], fields={"document": documents[visible]})

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
        return saved

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Load a state; return whether a token may have a document other than 0."""
        numbers = {int(key.split(".")[0]) for key in state}
        stores = self._new_stores(len(numbers), like)
        for number, store in enumerate(stores):
            start = f"{number}."
            store.load_state_dict({key[len(start) :]: state[key] for key in state if key.startswith(start)})
        self.stores = stores
        return any(bool((store.rows.view(store.rows.live_slots())["document"] != 0).any()) for store in stores)


def _is_of_document(wanted: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:  # (B, 1)
    """Make a filter that allows each query the rows of its document."""
    return lambda row: row["document"] == wanted


def _new_segment(batch: int, count: int, widths: tuple[int, int], like: Tensor) -> Segment:
    """Create keys, values and documents of zeros."""
    keys, values = (torch.zeros(batch, count, width, dtype=like.dtype, device=like.device) for width in widths)
    return keys, values, torch.zeros(batch, count, dtype=torch.int64, device=like.device)


def _map_segment(function: Callable[[Tensor], Tensor], segment: Segment) -> Segment:
    """Apply a function to keys, values and documents."""
    keys, values, documents = segment
    return function(keys), function(values), function(documents)


def _copy_segment(state: Mapping[str, Tensor], like: Tensor) -> Segment:
    """Copy a segment from a state, in the dtype and to the device of ``like``."""
    keys, values = (state[name].to(like.device, like.dtype, copy=True) for name in SEGMENT_NAMES[:2])
    return keys, values, state["documents"].to(like.device, torch.int64, copy=True)


def _check_segment(state: Mapping[str, Tensor], name: str, count: int | None, widths: tuple[int, int]) -> None:
    """Raise unless a state holds a segment of ``count`` tokens and ``widths``."""
    documents = state["documents"]
    if documents.dtype != torch.int64:
        raise DtypeError(f"state_dict[{name + 'documents'!r}]: expected int64, got {documents.dtype}")
    check_shape(f"state_dict[{name + 'documents'!r}]", documents, (None, count))
    for part, width in zip(SEGMENT_NAMES, widths, strict=False):
        check_shape(f"state_dict[{name + part!r}]", state[part], (*documents.shape, width))
