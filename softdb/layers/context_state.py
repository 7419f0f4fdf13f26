"""State of a `ContextMemory`: past tokens, in a ring of tensors or in stores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from softdb.errors import ShapeError
from softdb.layers.context_ring import Ring
from softdb.layers.context_stores import Stores
from softdb.layers.segments import (
    SEGMENT_NAMES,
    Segment,
    check_segment,
    copy_segment,
    map_segment,
    new_segment,
    select_sequences,
)
from softdb.pending_checks import is_deferred
from softdb.reading.result import Read

__all__ = ["ContextState", "Ring", "Stores"]


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

    @property
    def length(self) -> int:
        """Number of tokens of each sequence since everything was forgotten."""
        return self.tokens.written + (0 if self.recent is None else self.recent[2].shape[1])

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
        """Forget the tokens of the sequences at ``indices`` in the batch.

        The last segment is hidden without writing it, since a write would replace tokens of the other sequences.
        """
        self.version += 1
        self.tokens.forget(indices)
        if self.recent is not None:
            keys, values, documents = self.recent
            documents = documents.clone()
            documents[indices.to(documents.device)] = -1
            self.recent = keys, values, documents
        self.mixed = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def remember(self, keys: Tensor, values: Tensor, documents: Tensor | None, dtype: torch.dtype) -> None:
        """Keep a segment, detached from the graph, until `flush_segment`."""
        if documents is None:
            documents = torch.zeros(1, 1, dtype=torch.int64, device=keys.device)
        else:
            # On a GPU the host does not wait for the numbers: reads then compare documents even if all are 0.
            self.mixed = self.mixed or is_deferred(documents) or bool((documents != 0).any())
        # Keep the whole segment, even if it is longer than the memory, because `crop` may drop its end.
        self.recent = keys.to(dtype, copy=True), values.to(dtype, copy=True), documents.expand(keys.shape[:2]).clone()
        self.is_loaded = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, indices: Tensor) -> None:
        """Replace the sequences by those at ``indices``, (m,) int64 on the CPU."""
        self.version += 1
        self.tokens.select(indices)
        if self.recent is not None:
            self.recent = select_sequences(self.recent, indices)
        self.is_loaded = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, length: int) -> None:
        """Forget all tokens but the first ``length`` of every sequence.

        The last segment is cropped without writing it, since a write would replace tokens that remain.
        """
        self.is_loaded = False
        if length == 0:
            self.clear()
            return
        kept = length - self.tokens.written
        if self.recent is not None:
            self.recent = map_segment(lambda part: part[:, :kept], self.recent) if kept > 0 else None
        if kept < 0:
            self.version += 1
            self.mixed = self.tokens.crop(length) or self.mixed

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy_sequence(self, index: int) -> ContextState:
        """Return a copy of the past of one sequence, with its last segment written."""
        past = copy.copy(self)
        past.tokens = copy.copy(self.tokens)
        if self.batch:
            past.select(torch.tensor([index]))
        past = copy.deepcopy(past)
        past.flush_segment()
        return past

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
            self.recent = map_segment(function, self.recent)
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
        recent = self.recent or new_segment(self.tokens.batch, 0, self.tokens.widths, like)
        saved = {f"recent_{name}": part for name, part in zip(SEGMENT_NAMES, recent, strict=True)}
        return saved | self.tokens.state(like)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], name: str, like: Tensor) -> None:
        """Load copies of the tensors of a `state`.

        Error messages name each key with the prefix ``name``.
        """
        given = {part: state[f"recent_{part}"] for part in SEGMENT_NAMES}
        check_segment(given, f"{name}recent_", None, self.tokens.widths)
        rest = {key: tensor for key, tensor in state.items() if not key.startswith("recent_")}
        tokens, recent = self.tokens.new_empty(), copy_segment(given, like)
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
