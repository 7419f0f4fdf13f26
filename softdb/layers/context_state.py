"""What a `ContextMemory` remembers: the segments it has seen, in a ring of tensors or in a store a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_shape
from softdb.errors import ArgumentError, DtypeError, ShapeError, StaleReadError
from softdb.functional import soft_read
from softdb.layers.queries import stack_reads
from softdb.reading.result import Read
from softdb.store import SoftKVStore
from softdb.transforms import is_active

__all__ = ["Past", "Ring", "Stores"]


Segment = tuple[Tensor, Tensor, Tensor]  # keys, values and documents, (batch, n, ...)


SEGMENT = ("keys", "values", "documents")


# From so many tokens a sequence on, the k best are found by an index.
INDEXED_ROWS = 4096


class Past:
    """What a `ContextMemory` remembers: the tokens of every sequence, and the segment that enters next.

    Attributes:
        tokens: Those that have entered.
        recent: Keys, values and documents, (batch, n, ...), of the segment that waits. Were it to enter at once, it
            would take the place of rows that the backward of its own forward still needs.
        mixed: Whether some token may be of another document than 0.
        version: How often what has entered has changed.
        is_loaded: Whether it all comes from a state dict, so that it may be of other sequences than those to come.
        asked: The keys of the last segment, and the version that it met.
    """

    is_loaded = False  # of one that was pickled before there was this

    def __init__(self, tokens: Ring | Stores) -> None:
        self.tokens = tokens
        self.version = 0
        self.asked: tuple[Tensor, int] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.version += 1
        self.tokens.clear()
        self.recent: Segment | None = None
        self.mixed = self.is_loaded = False

    @property
    def batch(self) -> int:
        """How many sequences there are; 0 before the first segment."""
        return self.tokens.batch if self.recent is None else len(self.recent[0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget(self, places: Tensor) -> None:
        """Forget what some sequences of the batch have seen."""
        self.settle()
        self.version += 1
        self.tokens.forget(places)
        self.mixed = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, keys: Tensor, values: Tensor, documents: Tensor | None, dtype: torch.dtype) -> None:
        """Keep a segment for later, cut from the graph."""
        batch, count = keys.shape[:2]
        last = slice(max(0, count - self.tokens.rows), count)
        if documents is None:
            documents = torch.zeros(batch, 1, dtype=torch.int64, device=keys.device)
        else:
            self.mixed = self.mixed or bool((documents != 0).any())
        documents = documents.expand(batch, count)[:, last].clone()
        self.recent = keys[:, last].to(dtype, copy=True), values[:, last].to(dtype, copy=True), documents
        self.is_loaded = False

    def note(self, keys: Tensor) -> None:
        """Know the segment of these keys again, as long as the past is what it is now."""
        self.asked = keys.detach(), self.version

    def knows_again(self, keys: Tensor) -> bool:
        """Whether these are the keys of the last segment, and nothing has entered since."""
        return self.asked is not None and self.asked[1] == self.version and torch.equal(self.asked[0], keys)

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self) -> None:
        """Let the segment that waits enter."""
        if self.recent is not None:
            self.version += 1
            self.tokens.write(self.recent)
            self.recent = None

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """What the tokens tell queries (batch, heads, n, key_dim), each of its own document; None if there are none."""
        if documents is None and self.mixed:
            documents = torch.zeros(len(queries), 1, dtype=torch.int64, device=queries.device)
        return self.tokens.read(queries, documents)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor by a function."""
        self.tokens.apply(function)
        if self.recent is not None:
            self.recent = _each(function, self.recent)
        if self.asked is not None:
            self.asked = function(self.asked[0]), self.asked[1]

    @property
    def needed(self) -> set[str]:
        """What every `state` has."""
        return {f"recent_{name}" for name in SEGMENT} | self.tokens.needed

    def knows(self, name: str) -> bool:
        """Whether a `state` may have this."""
        return name in self.needed or self.tokens.knows(name)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Everything, as tensors; ``like`` says of which dtype and where if there is nothing."""
        recent = self.recent or _segment(self.tokens.batch, 0, self.tokens.widths, like)
        found = {f"recent_{name}": part for name, part in zip(SEGMENT, recent, strict=True)}
        return found | self.tokens.state(like)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> None:
        """Take over copies of a `state`, which errors call ``name``."""
        given = {part: state[f"recent_{part}"] for part in SEGMENT}
        _check_segment(given, f"{name}recent_", None, self.tokens.widths)
        rest = {key: tensor for key, tensor in state.items() if not key.startswith("recent_")}
        tokens, recent = self.tokens.like(), _copied(given, like)
        mixed = tokens.load(rest, name, like)
        if recent[2].numel() and tokens.batch not in (0, len(recent[0])):
            raise ShapeError(
                f"state_dict[{name + 'recent_documents'!r}]: expected {tokens.batch} sequences, as in the rest, got "
                f"{len(recent[0])}"
            )
        self.tokens, self.version = tokens, self.version + 1
        self.recent = recent if recent[2].numel() else None
        self.mixed = mixed or bool((recent[2] != 0).any())
        self.is_loaded = True


class Ring:
    """The last tokens of every sequence, all of which are read. Token number t, from 0, lies in row ``t % rows``.

    Attributes:
        tables: Keys, values and documents, (batch, rows, ...); of document -1 is what is not to be seen.
        written: How many tokens of each sequence have entered.
    """

    needed = frozenset((*SEGMENT, "written"))

    def __init__(self, rows: int, key_dim: int, value_dim: int) -> None:
        self.rows, self.widths = rows, (key_dim, value_dim)
        self.clear()

    def like(self) -> Ring:
        """An empty one of the same shape."""
        return Ring(self.rows, *self.widths)

    def knows(self, name: str) -> bool:
        """Whether a state holds an entry of this name."""
        return name in self.needed

    def clear(self) -> None:
        """Forget everything."""
        self.tables: Segment | None = None
        self.written = 0

    @property
    def batch(self) -> int:
        """How many sequences are remembered; 0 if none has been seen."""
        return 0 if self.tables is None else len(self.tables[0])

    def forget(self, places: Tensor) -> None:
        """Forget what some sequences of the batch have seen."""
        if self.tables is not None:
            self.tables[2][places.to(self.tables[2].device)] = -1

    def write(self, segment: Segment) -> None:
        """Add a segment."""
        batch, count = segment[2].shape
        if self.tables is None:
            self.tables = _segment(batch, self.rows, self.widths, segment[0])
        first = self.written % self.rows
        before_end = min(count, self.rows - first)
        for table, part in zip(self.tables, segment, strict=True):
            # By .data, which torch does not count: `_Intact` knows better which backward it concerns.
            table.data[:, first : first + before_end] = part[:, :before_end]
            table.data[:, : count - before_end] = part[:, before_end:]
        self.written += count

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read what is remembered; None if that is nothing."""
        if self.tables is None or self.written == 0:
            return None
        tables = _each(torch.clone, self.tables) if is_active() else self.tables
        keys, values, stored = (table[:, None, : self.written] for table in tables)
        mask = None
        if documents is not None:
            mask = (stored.unsqueeze(-2) == documents[:, None, :, None]) & (stored.unsqueeze(-2) >= 0)
        read = soft_read(queries, keys, values, mask=mask)
        if not read.lse.requires_grad:
            return read
        if is_active():
            return read  # of copies
        guarded = _Intact.apply(self, self.tables, read.values, read.lse)  # type: ignore[no-untyped-call]
        return replace(read, values=guarded[0], lse=guarded[1])

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor by a function."""
        if self.tables is not None:
            self.tables = _each(function, self.tables)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save, on the device and in the dtype of ``like``."""
        tables = self.tables or _segment(0, self.rows, self.widths, like)
        found = dict(zip(SEGMENT, tables, strict=True))
        return found | {"written": torch.tensor(self.written, dtype=torch.int64, device=tables[0].device)}

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Whether some token is of another document than 0."""
        check_shape(f"state_dict[{name + 'written'!r}]", state["written"], ())
        _check_segment(state, name, self.rows if len(state["documents"]) else None, self.widths)
        written = int(state["written"])
        if written < 0:
            raise ArgumentError(f"state_dict[{name + 'written'!r}]: expected at least 0, got {written}")
        tables = _copied(state, like)
        self.written = written
        self.tables = tables if len(tables[0]) else None
        return bool((tables[2] != 0).any())


class _Intact(torch.autograd.Function):
    """The identity on a read's tensors; in backward, rows that it used must not have been overwritten."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, tables: Segment, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ring, ctx.tables, ctx.limit = ring, tables, max(ring.written, ring.rows)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tables = ctx.ring.tables
        # A move makes new tables, and leaves those that were read alone; one that changes nothing makes none.
        same = tables is not None and tables[2].data_ptr() == ctx.tables[2].data_ptr()
        if same and ctx.ring.written > ctx.limit:
            raise StaleReadError(
                "tokens that this read used have been evicted since, and its gradients need them; call backward() "
                "before the next segment, or make the layer with more rows"
            )
        return None, None, *grads


class Stores:
    """The last tokens of every sequence in a store of its own, whose index finds the k best.

    Tokens of document -1 do not enter: what is not to be seen takes no place.
    """

    needed: frozenset[str] = frozenset()

    def __init__(self, rows: int, key_dim: int, value_dim: int, k: int) -> None:
        self.rows, self.widths, self.k = rows, (key_dim, value_dim), k
        self.clear()

    def like(self) -> Stores:
        """An empty one of the same shape."""
        return Stores(self.rows, *self.widths, self.k)

    def knows(self, name: str) -> bool:
        """Whether a state holds an entry of this name."""
        return name.split(".")[0].isdigit()

    def clear(self) -> None:
        """Forget everything."""
        self.stores: list[SoftKVStore] = []

    @property
    def batch(self) -> int:
        """How many sequences are remembered; 0 if none has been seen."""
        return len(self.stores)

    def _made(self, batch: int, like: Tensor) -> list[SoftKVStore]:
        # An index that is built while a sequence goes on has to be cheap; it pays early, for it is asked at once.
        lists = 2 ** round(math.log2(2 * self.rows) / 2)
        index = f"IVF{lists},Flat" if self.rows >= INDEXED_ROWS else "Flat"
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

    def forget(self, places: Tensor) -> None:
        """Forget what some sequences of the batch have seen."""
        for place in places.unique().tolist():
            if self.stores:
                self.stores[place].delete(self.stores[place].ids)

    def write(self, segment: Segment) -> None:
        """Add a segment."""
        if not self.stores:
            self.stores = self._made(len(segment[0]), segment[0])
        for store, keys, values, documents in zip(self.stores, *segment, strict=True):
            seen = documents >= 0
            store.add(keys[seen], values[seen], fields={"document": documents[seen]})

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        """Read what is remembered; None if that is nothing."""
        if not any(map(len, self.stores)):
            return None
        reads = []
        for number, store in enumerate(self.stores):
            where = None
            if documents is not None:
                wanted = documents[number].expand(queries.shape[2]).repeat(queries.shape[1]).unsqueeze(-1)
                where = _of_document(wanted)
            reads.append(store.read(queries[number], "topk", k=self.k, where=where))
        return stack_reads(reads, 0)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Convert every tensor by a function."""
        for store in self.stores:
            store._apply(function)

    def state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the tensors to save, on the device and in the dtype of ``like``."""
        found: dict[str, Tensor] = {}
        for number, store in enumerate(self.stores):
            store.state_dict(destination=found, prefix=f"{number}.")
        return found

    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> bool:
        """Whether some token is of another document than 0."""
        numbers = {int(key.split(".")[0]) for key in state}
        stores = self._made(len(numbers), like)
        for number, store in enumerate(stores):
            start = f"{number}."
            store.load_state_dict({key[len(start) :]: state[key] for key in state if key.startswith(start)})
        self.stores = stores
        return any(bool((store.rows.view(store.rows.live_slots())["document"] != 0).any()) for store in stores)


def _of_document(wanted: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:  # (B, 1)
    return lambda row: row["document"] == wanted


def _segment(batch: int, count: int, widths: tuple[int, int], like: Tensor) -> Segment:
    """Keys, values and documents of nothing yet."""
    keys, values = (torch.zeros(batch, count, width, dtype=like.dtype, device=like.device) for width in widths)
    return keys, values, torch.zeros(batch, count, dtype=torch.int64, device=like.device)


def _each(function: Callable[[Tensor], Tensor], segment: Segment) -> Segment:
    keys, values, documents = segment
    return function(keys), function(values), function(documents)


def _copied(state: Mapping[str, Tensor], like: Tensor) -> Segment:
    keys, values = (state[name].to(like.device, like.dtype, copy=True) for name in SEGMENT[:2])
    return keys, values, state["documents"].to(like.device, torch.int64, copy=True)


def _check_segment(state: Mapping[str, Tensor], name: str, count: int | None, widths: tuple[int, int]) -> None:
    documents = state["documents"]
    if documents.dtype != torch.int64:
        raise DtypeError(f"state_dict[{name + 'documents'!r}]: expected int64, got {documents.dtype}")
    check_shape(f"state_dict[{name + 'documents'!r}]", documents, (None, count))
    for part, width in zip(SEGMENT, widths, strict=False):
        check_shape(f"state_dict[{name + part!r}]", state[part], (*documents.shape, width))
