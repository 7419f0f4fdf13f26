"""Layers that give a model a memory: `MemoryLayer`, `ContextMemory` and `ProductKeyMemory`.

Each projects its input to queries, one a head, looks them up in rows of keys and values, and adds up what the heads
were told. They differ in where the rows come from: a `MemoryLayer` learns them; a `ContextMemory` writes them as the
model runs; a `ProductKeyMemory` learns a value for every pair of two short lists of keys, so that a million rows are
searched at the cost of two thousand.

They are modules like any other: ``device`` and ``dtype``, construction on the meta device, ``reset_parameters``,
``state_dict``, ``deepcopy``, autocast and torch.compile behave as for torch's own.
"""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdb.attributes import ModuleWithProperties
from softdb.blockwise import full_precision
from softdb.compiled import blend
from softdb.errors import (
    INTEGERS,
    ArgumentError,
    DeviceError,
    DtypeError,
    NotApplicableError,
    ShapeError,
    SoftDBError,
    StaleReadError,
    TransformError,
    check_choice,
    check_dtype,
    check_float_tensor,
    check_ids,
    check_not_meta,
    check_positive,
    check_shape,
    describe,
    is_out_of_memory,
)
from softdb.filters import Where
from softdb.functional import Read, answer_dtype, merge, soft_read, widened
from softdb.normalizers import softmax
from softdb.scores import compute_dtype
from softdb.store import Mode, SoftKVStore, Usage, check_options, is_asked_by_ddp, stand_in
from softdb.transforms import (
    check_no_tangent,
    is_active,
    is_batched,
    is_exporting,
    is_forward_mode,
    is_traced,
    is_wrapped,
    outside_of_graphs,
    outside_of_transforms,
    plain,
    samples_first,
)

__all__ = ["ContextMemory", "MemoryLayer", "ProductKeyMemory"]

QueryNorm = Literal["layer", "batch"]
QUERY_NORMS = ("layer", "batch")
Segment = tuple[Tensor, Tensor, Tensor]  # keys, values and documents, (batch, n, ...)
SEGMENT = ("keys", "values", "documents")
MEMBERS = [field.name for field in fields(Read)]
# From so many tokens a sequence on, the k best are found by an index.
INDEXED_ROWS = 4096
# With so many columns for each that is wanted, the best are sought by the maxima of groups, of so many columns each.
COLUMNS_PER_BEST, GROUP = 8, 4
# As many scores of product keys are held at a time.
SCORES = 2**22
# The options of its stores that a `MemoryLayer` takes, and those of stores and reads that it does not: why, and what to
# do instead.
STORE_OPTIONS = ("metric", "temperature", "index", "sparse_grad", "track_usage")
REFUSED_OPTIONS = {
    "trainable": "the rows of a MemoryLayer are learned; freeze them with layer.stores.requires_grad_(False), or pass "
    "store=...",
    **dict.fromkeys(
        ("fields", "capacity", "evict"), "a MemoryLayer makes stores without it; pass store=..., one that has it"
    ),
    **dict.fromkeys(
        ("exclude", "tail_samples", "tolerance", "generator"),
        "a MemoryLayer does not pass it to its reads; read one of layer.stores yourself",
    ),
    "where": "a MemoryLayer is made for all rows; pass it to the layer's call",
}
UNTRACED = (
    "softdb: a ContextMemory writes to itself as it runs, which cannot be part of a compiled or exported graph; leave "
    "out fullgraph=True"
)


class _Queries(nn.Module):
    """A query for each head: ``norm(x @ W.T)``, (..., dim) -> (..., heads, parts, width)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        norm: QueryNorm | None,
        *,
        parts: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        if norm is not None:
            check_choice("query_norm", norm, QUERY_NORMS)
        self.shape = (heads, parts, width)
        self.projection = nn.Linear(dim, heads * parts * width, bias=False, device=device, dtype=dtype)
        self.norm: nn.Module | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(heads * parts * width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Start anew: each number of a query has variance 1 where those of x have."""
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        if isinstance(self.norm, (nn.LayerNorm, nn.BatchNorm1d)):
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        is_meta = getattr(self.projection.weight, "is_meta", False)  # a quantised layer has a method there
        if is_meta and "forward" not in vars(self.projection):  # accelerate brings the weights
            check_not_meta("layer", self.projection.weight)
        queries: Tensor = self.projection(x)
        if isinstance(self.norm, nn.BatchNorm1d):
            queries = self.norm(queries.reshape(-1, queries.shape[-1])).view_as(queries)
        queries = queries.unflatten(-1, self.shape)
        return self.norm(queries) if isinstance(self.norm, nn.LayerNorm) else queries


def _output(heads: int, value_dim: int, dim: int, device: Any, dtype: Any) -> nn.Linear:
    return nn.Linear(heads * value_dim, dim, bias=False, device=device, dtype=dtype)


def _reset_output(output: nn.Linear) -> None:
    nn.init.normal_(output.weight, std=output.in_features**-0.5)


def _stack(reads: Sequence[Read], dimension: int) -> Read:
    """Reads of several stores as one, along a new dimension."""
    widths = {0 if read.ids is None else read.ids.shape[-1] for read in reads}
    if len(widths) > 1:  # a sparse normalizer doubles k where one store needs it
        reads = [widened(read, max(widths)) for read in reads]
    members: dict[str, Any] = {}
    for name in MEMBERS:
        given = [getattr(read, name) for read in reads]
        members[name] = torch.stack(given, dim=dimension) if isinstance(given[0], Tensor) else given[0]
    return Read(**members)


# -- rows that are learned -------------------------------------------------------------------------------


class MemoryLayer(ModuleWithProperties):
    r"""A lookup in learned rows: every head asks, and the answers are projected back.

    With the store's ``keys`` and ``values``, equal for the mode "exact" to::

        q = (x @ W_Q.T).unflatten(-1, (heads, key_dim))          # what each head looks for
        a = softmax(q @ keys.T / sqrt(key_dim)) @ values         # what it is told, (..., heads, value_dim)
        y = a.flatten(-2) @ W_O.T

    and with ``gate`` to ``y = (silu(x @ W_G.T) * a.flatten(-2)) @ W_O.T``. Memory is that of the store's reads: the
    weights over all rows are never held.

    Queries have a projection of their own, so that what a token looks for and what a row advertises need not be alike:
    with one for both, every token would match itself best.

    At the start answers have a norm of at most about 1, where that of x is about √dim, so that ``x + layer(x)`` is
    nearly x.

    Args:
        dim: Width of input and output.
        rows: How many rows; random at the start.
        heads: How many queries are made of each input.
        key_dim: Width of queries and keys.
        value_dim: Width of values; ``key_dim`` unless given.
        mode: "exact", "topk" or "hard", as in `softdb.SoftKVStore.read`. A hard read trains values only: for queries
            and keys too take ``normalizer="straight_through"`` with another mode.
        k: In topk mode the number of candidates; in exact mode how many of the best rows ``return_read`` reports.
        normalizer: As in `softdb.SoftKVStore.read`; "gumbel" draws in training mode only.
        shared: Whether the heads read one store; else each has its own, of ``rows`` rows.
        query_norm: "layer" normalises each query by itself, "batch" each of its numbers over the batch; None neither.
        gate: Whether x decides, number by number, what is let through.
        store: Rows to read instead of new ones: another layer's ``store``, to share it, or one of yours, whatever is
            written to it. It has ``rows`` rows when the layer is made and keeps its own options.
        device, dtype: Of the parameters, as for any module.
        **store_options: For the new stores: ``metric``, ``temperature``, ``index``, ``sparse_grad``, ``track_usage``,
            as for `softdb.SoftKVStore`. In topk and hard mode gradients of the rows are row-sparse unless
            ``sparse_grad=False``: train them with `softdb.optim.RowAdam`. ``track_usage`` counts the rows that reads
            are known to use; a softmax over all rows names none, so with the mode "exact" it needs ``k`` or another
            normalizer.

    Attributes:
        stores: The store that all heads read, or one for each.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is not as above.
        TypeError: There is no argument of this name.

    Source: Vaswani et al. 2017 (arXiv 1706.03762) for heads and projections; learned rows in place of a context as in
    Sukhbaatar et al. 2019 (arXiv 1907.01470); the gate is that of Berges et al. 2024 (arXiv 2412.09764).

    Example:
        >>> import torch
        >>> from softdb.layers import MemoryLayer
        >>> layer = MemoryLayer(32, rows=1000, heads=4, key_dim=16)
        >>> x = torch.randn(2, 10, 32)
        >>> y = x + layer(x)
        >>> y, read = layer(x, return_read=True)
        >>> read.lse.shape
        torch.Size([2, 10, 4])
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        *,
        heads: int = 4,
        key_dim: int = 64,
        value_dim: int | None = None,
        mode: Mode = "exact",
        k: int | None = None,
        normalizer: str = "softmax",
        shared: bool = True,
        query_norm: QueryNorm | None = None,
        gate: bool = False,
        store: SoftKVStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        _check_store_options(store_options)
        self.dim, rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else check_positive("value_dim", value_dim)
        self.mode, self.normalizer = mode, normalizer
        self.k, _, _ = check_options(mode, k, normalizer)
        if store is not None:
            self._check_store(store, rows, shared, store_options)
        if mode == "exact" and self.k is None and normalizer == "softmax":
            _check_untracked(store, store_options)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = _Queries(self.dim, self.heads, self.key_dim, query_norm, **made)
        if store is None:
            number = 1 if shared else self.heads
            self.stores = nn.ModuleList(
                SoftKVStore(self.key_dim, self.value_dim, trainable=True, **made, **store_options)
                for _ in range(number)
            )
            for own in self.stores:
                own.reserve(rows)  # type: ignore[operator]
        else:
            self.stores = nn.ModuleList([store])
        self._own = store is None
        width = self.heads * self.value_dim
        self.gate = nn.Linear(self.dim, width, bias=False, **made) if gate else None
        self.output = _output(self.heads, self.value_dim, self.dim, **made)
        self.reset_parameters()

    def _check_store(self, store: object, rows: int, shared: bool, options: Mapping[str, Any]) -> None:
        if not isinstance(store, SoftKVStore):
            raise DtypeError(f"store: expected a SoftKVStore, got {describe(store)}")
        if not shared:
            raise ArgumentError("shared: expected True, since the heads share the store that was given")
        if options:
            raise ArgumentError(f"{next(iter(options))}: expected nothing, since the store has options of its own")
        count = store.rows.capacity if store.keys.is_meta else len(store)  # on meta it has yet to be filled
        wanted, found = (rows, self.key_dim, self.value_dim), (count, store.key_dim, store.value_dim)
        if wanted != found:
            raise ShapeError(
                f"store: expected {rows} rows with key_dim={self.key_dim} and value_dim={self.value_dim}, got "
                f"{found[0]} with key_dim={found[1]} and value_dim={found[2]}"
            )

    @property
    def store(self) -> SoftKVStore:
        """The store that all heads read.

        Raises:
            NotApplicableError: Each head has its own; see ``stores``.
        """
        if len(self.stores) > 1:
            raise NotApplicableError(
                f"shared: expected heads that share a store, got {len(self.stores)}; see layer.stores"
            )
        (store,) = self.stores
        return store  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, with random rows; a store that was given stays as it is."""
        self.queries.reset_parameters()
        for store in self.stores if self._own else []:
            _fill(store, self.dim**-0.5)  # type: ignore[arg-type]
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=self.dim**-0.5)
        _reset_output(self.output)

    def forward(
        self, x: Tensor, *, where: Where | None = None, return_read: bool = False
    ) -> Tensor | tuple[Tensor, Read]:
        """Look up what ``x`` asks for.

        Args:
            x: (..., dim).
            where: Which rows may be seen, as in `softdb.SoftKVStore.read`. A callable meets the queries of all heads,
                flattened: B is the number of inputs times ``heads``, or that of inputs where each head has a store.
            return_read: Whether to return the read as well, its leading shape (..., heads).

        Returns:
            (..., dim), or that and a `softdb.Read`.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: An argument is not as above.
        """
        check_float_tensor("x", x, (-1, self.dim))
        queries = self.queries(x).squeeze(-2)  # (..., heads, key_dim)
        options: dict[str, Any] = {"mode": self.mode, "k": self.k, "where": where, "normalizer": self.normalizer}
        if len(self.stores) == 1:
            read = self.stores[0].read(queries, **options)  # type: ignore[operator]
        else:
            heads = zip(self.stores, queries.unbind(-2), strict=True)
            read = _stack([store.read(query, **options) for store, query in heads], queries.dim() - 2)  # type: ignore[operator]
        answer = read.values.flatten(-2)
        if self.gate is not None:
            answer = F.silu(self.gate(x)) * answer
        y: Tensor = self.output(answer)
        return (y, read) if return_read else y

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        k = "" if self.k is None else f", k={self.k}"
        return f"dim={self.dim}, heads={self.heads}, mode={self.mode!r}{k}"


def _check_store_options(options: Mapping[str, Any]) -> None:
    """Raise for options that a `MemoryLayer` does not have, or does not take."""
    for name in options:
        if name in REFUSED_OPTIONS:
            raise ArgumentError(f"{name}: expected nothing, since {REFUSED_OPTIONS[name]}")
        if name not in STORE_OPTIONS:
            known = [*inspect.signature(MemoryLayer).parameters, *STORE_OPTIONS]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}=...?" if close else f"its stores take {', '.join(STORE_OPTIONS)}"
            raise TypeError(f"{name}: MemoryLayer has no such argument; {hint}")


def _check_untracked(store: SoftKVStore | None, options: Mapping[str, Any]) -> None:
    """Raise where `usage` is to be counted, but reads name no row: every one would seem unused."""
    tracked = options.get("track_usage", False) if store is None else store.rows.track_usage
    if tracked:
        name = "track_usage: expected False" if store is None else "store: expected one without track_usage=True"
        raise ArgumentError(
            f"{name}, since a softmax over all rows names none to count; pass k=... for the best rows to count, "
            "mode='topk', or another normalizer"
        )


def _fill(store: SoftKVStore, deviation: float) -> None:
    """Random rows in place of whatever is there, values of that standard deviation."""
    if store.keys.is_meta:
        return
    if len(store) == 0:
        count = store.rows.capacity
        store.add(
            store.keys.new_zeros(1, 1).expand(count, store.key_dim), store.values.new_zeros(count, store.value_dim)
        )
    else:
        # Not the rows that were: nothing is to be remembered of those.
        rows = store.get(store.ids)
        store.revive(store.ids, rows.keys, rows.values)
    store.keys.normal_()
    store.values.normal_(std=deviation)


# -- rows that are written as the model runs -------------------------------------------------------------


class ContextMemory(nn.Module):
    r"""Causal attention that remembers: over the segment at hand, and over past segments of the same sequence.

    Each call is taken for the next segment of the sequences of the last one, place by place in the batch. Call `reset`
    before other sequences come, at every new batch of them: otherwise they attend to the tokens of those before, which
    nothing can notice. See the second example. Training and evaluation have a past each: after ``eval()`` the layer
    reads and writes the one, which starts empty, after ``train()`` it goes on with the other, and `reset` clears that
    of the present mode. So call it at the start of every validation, too.

    A sequence comes in segments, one call each. With K and V the keys and values of the last ``rows`` tokens before
    this segment, and k, v those of the tokens of this one::

        q = (x @ W_Q.T).unflatten(-1, (heads, key_dim));  k = x @ W_K.T;  v = x @ W_V.T
        a[t] = softmax(q[t] @ cat([K, k[: t + 1]]).T / sqrt(key_dim)) @ cat([V, v[: t + 1]])
        y = a.flatten(-2) @ W_O.T

    So a sequence that fits gives, in whatever segments it comes, what full causal attention gives. All heads share one
    key and one value a token, which are normalised as the queries are (with learned gains), so that those stored some
    steps ago still fit queries of today. There is no notion of place: give x one if it matters within a segment.

    What is stored is cut from the graph: gradients reach W_Q through both parts, and W_K and W_V through the segment.
    Nothing is wiped or built anew: when the memory is full, each new token takes the place of the oldest. Tokens enter
    at the next call, so that ``backward`` may come after the segment's forward; after another one it raises
    `softdb.StaleReadError` where rows it needs are gone. The weights over all tokens are never held.

    The memory is part of ``state_dict`` (a run that is resumed goes on exactly) and follows ``.to``; it is no buffer,
    since DistributedDataParallel would overwrite each process's with the first one's. In ``state_dict`` the past of
    training is under ``past.``, whatever the mode, and that of evaluation, unless it is empty, under
    ``evaluation_past.``. A past that was loaded is dropped, with a warning, if another number of sequences comes first.

    Args:
        dim: Width of input and output.
        rows: How many past tokens each sequence remembers. Storage for them is laid out at the first call:
            ``rows * (key_dim + value_dim)`` numbers a sequence, for each of the two modes when it is first used.
        heads: How many queries are made of each token.
        key_dim: Width of queries and keys.
        value_dim: Width of values; ``key_dim`` unless given.
        k: How many of the past tokens each query sees, the best, found by an index for each sequence; all unless given.
            With all of them a segment costs as much as the memory is long: up to some ten thousand tokens that is
            the faster of the two.
        device, dtype: Of the parameters and of what is stored, as for any module.

    Raises:
        ArgumentError, DtypeError: An argument is not as above.

    Source: Wu et al. 2022 (arXiv 2203.08913); one key for all heads: Shazeer 2019 (arXiv 1911.02150); normalised
    queries and keys: Henry et al. 2020 (arXiv 2010.04245); the parts are merged by log-sum-exp, as in FlashAttention
    (Dao et al. 2022, arXiv 2205.14135).

    Example:
        >>> import torch
        >>> from softdb.layers import ContextMemory
        >>> layer = ContextMemory(32, rows=512, heads=2, key_dim=16)
        >>> text = torch.randn(3, 100, 32)                       # three sequences
        >>> parts = [layer(segment) for segment in text.split(25, dim=1)]
        >>> layer.reset()
        >>> torch.allclose(torch.cat(parts, dim=1), layer(text), atol=1e-5)
        True

        A loop over batches of sequences, each of which comes in segments, and a validation in between:

        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> validation = torch.randn(5, 100, 32)                 # of another number of sequences
        >>> for batch in torch.randn(2, 3, 100, 32):
        ...     layer.reset()                                    # other sequences than those before
        ...     for segment in batch.split(25, dim=1):           # the next tokens of the same sequences
        ...         layer(segment).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     layer.eval().reset()                             # training's past stays
        ...     with torch.no_grad():
        ...         losses = [layer(segment).square().mean() for segment in validation.split(25, dim=1)]
        ...     _ = layer.train()
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        *,
        heads: int = 4,
        key_dim: int = 64,
        value_dim: int | None = None,
        k: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else check_positive("value_dim", value_dim)
        self.k = None if k is None else check_positive("k", k)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = _Queries(self.dim, self.heads, self.key_dim, "layer", **made)
        self.keys = _Queries(self.dim, 1, self.key_dim, "layer", **made)
        self.values = nn.Linear(self.dim, self.value_dim, bias=False, **made)
        self.output = _output(self.heads, self.value_dim, self.dim, **made)
        self._past, self._evaluation_past = self._new_past(), self._new_past()
        self.reset_parameters()

    def _new_past(self) -> _Past:
        shape = self.rows, self.key_dim, self.value_dim
        return _Past(_Ring(*shape) if self.k is None else _Stores(*shape, self.k))

    @property
    def _current_past(self) -> _Past:
        """The past of the present mode."""
        return self._past if self.training else self._evaluation_past

    def reset_parameters(self) -> None:
        """Start anew, with an empty memory in training and evaluation."""
        self.queries.reset_parameters()
        self.keys.reset_parameters()
        nn.init.normal_(self.values.weight, std=self.dim**-0.5)
        _reset_output(self.output)
        self._past.clear()
        self._evaluation_past.clear()

    def reset(self, sequences: Tensor | Sequence[int] | None = None) -> None:
        """Forget: all sequences, after which another number of them may come, or those at some places in the batch.

        Call it before the first segment of other sequences. It clears the past of the present mode: in training mode
        that of training, after ``eval()`` that of evaluation.

        Args:
            sequences: Their places, (m,) int64, or a mask of them, (batch,) bool; None for all.

        Raises:
            ArgumentError: There is no such sequence.
            DtypeError, ShapeError: ``sequences`` is not as above.
        """
        past = self._current_past
        if sequences is None:
            past.clear()
            return
        if isinstance(sequences, Tensor) and sequences.dtype == torch.bool:
            check_shape("sequences", sequences, (past.batch,))
            sequences = sequences.nonzero().squeeze(-1)
        places = check_ids("sequences", sequences, repeats=True).reshape(-1)
        if len(places) and int(places.max()) >= past.batch:
            raise ArgumentError(f"sequences: expected places in a batch of {past.batch}, got {places.tolist()[:5]}")
        past.forget(places)

    def forward(
        self, x: Tensor, *, documents: Tensor | None = None, write: bool = True, return_read: bool = False
    ) -> Tensor | tuple[Tensor, Read]:
        """Attend to the segment so far and to the past of the present mode, and remember the segment there.

        Args:
            x: The next segment of every sequence, (batch, n, dim); the first one after `reset`.
            documents: Which document each sequence, or each token, belongs to: whole numbers, (batch,) or (batch, n).
                Tokens see only those of their own document; -1 is padding, which sees nothing and is never seen. All
                are of document 0 unless given. Padding takes the room of tokens, but in a memory with ``k``.
            write: Whether to remember the segment. If none ever is, this is causal attention within segments alone.
            return_read: Whether to return the read as well, its leading shape (batch, heads, n).

        Returns:
            (batch, n, dim), or that and a `softdb.Read`.

        Raises:
            ShapeError: Among others, ``x`` has another number of sequences than the memory: call `reset` first. Where
                the memory was loaded, and nothing has been remembered since, it is dropped instead, with a warning.
            DtypeError, DeviceError, NonFiniteError: An argument is not as above.
            StaleReadError: In backward, where tokens that were seen have been evicted since; and where activation
                checkpointing repeats another segment than the last.
            TransformError: ``write`` under torch.vmap.
        """
        if is_active() and not is_wrapped(x, documents, *self.parameters()):
            with outside_of_transforms():
                return self.forward(x, documents=documents, write=write, return_read=return_read)
        if is_traced(x) and not torch.compiler.is_dynamo_compiling():
            raise TransformError(UNTRACED)
        check_float_tensor("x", x, (None, None, self.dim))
        queries = self.queries(x).squeeze(-2).transpose(1, 2)  # (batch, heads, n, key_dim)
        keys = self.keys(x)[..., 0, 0, :]  # (batch, n, key_dim)
        values = self.values(x)
        dtype = self.values.weight.dtype if write else None
        attend = _attend_outside if torch.compiler.is_dynamo_compiling() else _attend
        read: Read = attend(self._current_past, queries, keys, values, documents, dtype)
        y: Tensor = self.output(read.values.transpose(1, 2).flatten(-2))
        return (y, read) if return_read else y

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        k = "" if self.k is None else f", k={self.k}"
        return f"dim={self.dim}, rows={self.rows}, heads={self.heads}{k}, sequences={self._current_past.batch}"

    # -- module conventions ----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> ContextMemory:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._past.apply(fn)
        self._evaluation_past.apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_evaluation_past" not in self.__dict__:  # pickled when there was one past for both modes
            self._evaluation_past = self._new_past()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        pasts = {"past.": self._past}
        if self._evaluation_past.batch:
            pasts["evaluation_past."] = self._evaluation_past
        for start, past in pasts.items():
            for name, tensor in past.state(self.values.weight).items():
                # A copy: what goes on is written over the same rows, and half of that would be in what was saved.
                destination[f"{prefix}{start}{name}"] = tensor.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        starts = (f"{prefix}past.", f"{prefix}evaluation_past.")
        rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(starts)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # What torch assigns it assigns after this, so that the parameter to go by may still be the old one.
        like = self.values.weight
        if local_metadata.get("assign_to_params_buffers", False):
            like = state_dict.get(f"{prefix}values.weight", like)
        complete = True
        for start, past in zip(starts, (self._past, self._evaluation_past), strict=True):
            given = {name[len(start) :]: tensor for name, tensor in state_dict.items() if name.startswith(start)}
            unexpected = {name for name in given if not past.knows(name)}
            unexpected_keys += [start + name for name in sorted(unexpected)]
            if past is self._evaluation_past and not given:  # it was empty, if the other one is there
                if complete:
                    past.clear()
                continue
            missing = past.needed - given.keys()
            missing_keys += [start + name for name in sorted(missing)]
            complete = complete and not missing
            if missing:
                continue
            try:
                past.load({name: given[name] for name in given if name not in unexpected}, start, like)
            except (SoftDBError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                error_msgs.append(
                    f"{error}; to load weights alone, leave out what starts with {start!r}, with strict=False"
                )


class _Past:
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

    def __init__(self, tokens: _Ring | _Stores) -> None:
        self.tokens = tokens
        self.version = 0
        self.asked: tuple[Tensor, int] | None = None
        self.clear()

    def clear(self) -> None:
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


class _Ring:
    """The last tokens of every sequence, all of which are read. Token number t, from 0, lies in row ``t % rows``.

    Attributes:
        tables: Keys, values and documents, (batch, rows, ...); of document -1 is what is not to be seen.
        written: How many tokens of each sequence have entered.
    """

    needed = frozenset((*SEGMENT, "written"))

    def __init__(self, rows: int, key_dim: int, value_dim: int) -> None:
        self.rows, self.widths = rows, (key_dim, value_dim)
        self.clear()

    def like(self) -> _Ring:
        """An empty one of the same shape."""
        return _Ring(self.rows, *self.widths)

    def knows(self, name: str) -> bool:
        return name in self.needed

    def clear(self) -> None:
        self.tables: Segment | None = None
        self.written = 0

    @property
    def batch(self) -> int:
        return 0 if self.tables is None else len(self.tables[0])

    def forget(self, places: Tensor) -> None:
        if self.tables is not None:
            self.tables[2][places.to(self.tables[2].device)] = -1

    def write(self, segment: Segment) -> None:
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
        if self.tables is not None:
            self.tables = _each(function, self.tables)

    def state(self, like: Tensor) -> dict[str, Tensor]:
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
    def forward(ctx: Any, ring: _Ring, tables: Segment, *tensors: Tensor) -> tuple[Tensor, ...]:
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


class _Stores:
    """The last tokens of every sequence in a store of its own, whose index finds the k best.

    Tokens of document -1 do not enter: what is not to be seen takes no place.
    """

    needed: frozenset[str] = frozenset()

    def __init__(self, rows: int, key_dim: int, value_dim: int, k: int) -> None:
        self.rows, self.widths, self.k = rows, (key_dim, value_dim), k
        self.clear()

    def like(self) -> _Stores:
        """An empty one of the same shape."""
        return _Stores(self.rows, *self.widths, self.k)

    def knows(self, name: str) -> bool:
        return name.split(".")[0].isdigit()

    def clear(self) -> None:
        self.stores: list[SoftKVStore] = []

    @property
    def batch(self) -> int:
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
        for place in places.unique().tolist():
            if self.stores:
                self.stores[place].delete(self.stores[place].ids)

    def write(self, segment: Segment) -> None:
        if not self.stores:
            self.stores = self._made(len(segment[0]), segment[0])
        for store, keys, values, documents in zip(self.stores, *segment, strict=True):
            seen = documents >= 0
            store.add(keys[seen], values[seen], fields={"document": documents[seen]})

    def read(self, queries: Tensor, documents: Tensor | None) -> Read | None:
        if not any(map(len, self.stores)):
            return None
        reads = []
        for number, store in enumerate(self.stores):
            where = None
            if documents is not None:
                wanted = documents[number].expand(queries.shape[2]).repeat(queries.shape[1]).unsqueeze(-1)
                where = _of_document(wanted)
            reads.append(store.read(queries[number], "topk", k=self.k, where=where))
        return _stack(reads, 0)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store._apply(function)

    def state(self, like: Tensor) -> dict[str, Tensor]:
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
        return any(bool((store.rows.field("document")[store.rows.live_slots()] != 0).any()) for store in stores)


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


def _attend(
    past: _Past,
    queries: Tensor,  # (batch, heads, n, key_dim)
    keys: Tensor,  # (batch, n, key_dim)
    values: Tensor,  # (batch, n, value_dim)
    documents: Tensor | None,
    dtype: torch.dtype | None,
) -> Read:
    """What a segment and the past tell its queries; with ``dtype``, remember it in that."""
    if is_forward_mode():
        check_no_tangent(queries, keys, values)
    if is_active():
        return _attend_under_transform(past, queries, keys, values, documents, dtype)
    batch, count = keys.shape[:2]
    repeats = torch._C._current_graph_task_id() != -1  # within a backward: activation checkpointing
    documents = _check_documents(documents, batch, count, keys.device)
    if past.batch not in (0, batch):
        if not past.is_loaded or repeats or batch == 0:
            _check_batch(past, batch)
        warnings.warn(
            f"a ContextMemory that was loaded with the past of {past.batch} sequences got {batch} others, so it drops "
            "that past; call reset() after load_state_dict() where other sequences come",
            UserWarning,
            stacklevel=2,
        )
        past.clear()
    if repeats and not past.knows_again(keys):
        raise StaleReadError(
            "activation checkpointing repeats a segment that is not the last one the memory has seen, so its read "
            "would be another; call backward() before the next segment"
        )
    if not repeats:
        past.settle()
        past.note(keys)
    read = _attend_to_segment(queries, keys, values, documents)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and not repeats and batch:
        past.remember(keys, values, documents, dtype)
    return read


def _attend_under_transform(
    past: _Past, queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, dtype: torch.dtype | None
) -> Read:
    """`_attend` while a transform of torch.func is active; plain numbers are remembered, cut from it."""
    if dtype is not None and any(map(is_batched, (keys, values))):
        raise TransformError(
            "write: expected False under torch.vmap, since a ContextMemory cannot remember a segment for each sample; "
            "pass write=False, or more sequences in x"
        )
    if is_wrapped(documents):
        raise TransformError(
            "documents: expected a tensor that no transform of torch.func wraps; pass documents from outside of the "
            "transformed function"
        )
    batch, count = keys.shape[:2]
    with outside_of_transforms():
        _check_batch(past, batch)
        documents = _check_documents(documents, batch, count, keys.device)
        past.settle()
    read = _attend_to_segment(queries, keys, values, documents)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and batch:
        kept = plain("keys", keys), plain("values", values)
        with outside_of_transforms():
            past.remember(*kept, documents, dtype)
    return read


def _check_batch(past: _Past, batch: int) -> None:
    if past.batch not in (0, batch):
        raise ShapeError(
            f"x: expected {past.batch} sequences, as the memory holds, got {batch}; call reset() before others come"
        )


def _attend_to_segment(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None) -> Read:
    """Read, for each token, those of its segment up to itself, (batch, heads, n)."""
    count = keys.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril()
    if documents is not None:
        own = documents[:, None, :, None]
        mask = mask & (own == documents[:, None, None, :]) & (own >= 0)
    return soft_read(queries, keys.unsqueeze(1), values.unsqueeze(1), mask=mask)


_attend_outside = outside_of_graphs(UNTRACED)(_attend)


def _check_documents(documents: object, batch: int, count: int, device: torch.device) -> Tensor | None:
    """``documents`` as (batch, 1 or n)."""
    if documents is None:
        return None
    if not isinstance(documents, Tensor) or documents.dtype not in INTEGERS:
        raise DtypeError(f"documents: expected an int64 tensor, got {describe(documents)}")
    if documents.is_meta:
        raise DeviceError("documents: expected numbers that can be read, got a tensor on meta, which holds none")
    if documents.shape not in ((batch,), (batch, count)):
        raise ShapeError(
            f"documents: expected shape ({batch},) or ({batch}, {count}), a number for each sequence or each token, "
            f"got {tuple(documents.shape)}"
        )
    given = documents.to(device, torch.int64).reshape(batch, -1)
    if given.numel() and int(given.min()) < -1:
        raise ArgumentError(f"documents: expected numbers of at least 0, or -1 for padding, got {int(given.min())}")
    return given


# -- values for pairs of keys ----------------------------------------------------------------------------


class ValueTable(ModuleWithProperties, nn.Embedding):
    """The values of a `ProductKeyMemory`, ``weight`` (rows, value_dim), and how they have been used.

    An embedding, so that torch knows that its gradient is row-sparse: DistributedDataParallel asks for that.
    """

    reads: Tensor
    total: Tensor

    def __init__(
        self,
        rows: int,
        value_dim: int,
        *,
        sparse_grad: bool,
        track_usage: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rows, value_dim, sparse=sparse_grad, device=device, dtype=dtype)
        self.track_usage = track_usage
        if track_usage:
            self.register_buffer("reads", torch.zeros(rows, dtype=torch.int64, device=device))
            self.register_buffer("total", torch.zeros(rows, dtype=torch.float64, device=device))

    def reset_parameters(self) -> None:
        """Start anew, with values of norm about 1 and nothing counted."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        if getattr(self, "track_usage", False):  # not within the constructor of an embedding
            self.reset_usage()

    def _apply(self, fn: Any, recurse: bool = True) -> ValueTable:
        total = self.total if self.track_usage else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if total is not None and self.total.dtype != total.dtype:
            self.total = total.to(self.total.device)  # a sum over many reads: narrow numbers would stop rising
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; DistributedDataParallel finds no counters, which it would overwrite."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name, stand_in(self, sparse=self.sparse) if module is self and is_asked_by_ddp() else module

    @property
    def usage(self) -> Usage:
        """How often, and with which weight, each row has been read since the start, or since `reset_usage`.

        Raises:
            NotApplicableError: The layer was made without ``track_usage=True``.
        """
        self._check_tracking()
        return Usage(self.reads.clone(), self.total.clone())

    def reset_usage(self) -> None:
        """Count from 0 again.

        Raises:
            NotApplicableError: The layer was made without ``track_usage=True``.
        """
        self._check_tracking()
        self.reads.zero_()
        self.total.zero_()

    def _check_tracking(self) -> None:
        if not self.track_usage:
            raise NotApplicableError(
                "track_usage: expected True to know how rows are used, got False; make the layer with track_usage=True"
            )

    def blend(self, weights: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k) -> (M, value_dim)
        """``(weights[..., None] * weight[rows]).sum(1)``."""
        values = blend(weights, self.weight, rows, sparse=self.sparse)
        if self.track_usage:
            if is_active():
                # Of both, each sample's.
                rows, weights = rows + torch.zeros_like(weights).to(rows.dtype), weights + torch.zeros_like(rows)
                reads, total = plain("reads", self.reads), plain("total", self.total)
                with outside_of_transforms():
                    _count(reads, total, samples_first(rows), samples_first(weights))
            else:
                _count(self.reads, self.total, rows, weights)
        return values


@torch.no_grad()
def _count(reads: Tensor, total: Tensor, rows: Tensor, weights: Tensor) -> None:
    reads.index_add_(0, rows.flatten(), torch.ones_like(rows).flatten())
    total.index_add_(0, rows.flatten(), weights.detach().flatten().to(total.dtype))


class ProductKeyMemory(nn.Module):
    r"""A lookup in n² learned values whose keys are all pairs of two lists of n.

    Row ``i * n + j`` has the key ``cat([K1[i], K2[j]])``, for each head its own K1 and K2. With q1 and q2 the halves
    of a head's query, equal to::

        q1, q2 = norm((x @ W_Q.T).unflatten(-1, (heads, 2, key_dim / 2)))
        scores = (q1 @ K1.T)[..., :, None] + (q2 @ K2.T)[..., None, :]     # (..., heads, n, n)
        best, rows = topk(scores.flatten(-2), k)
        y = (softmax(best)[..., None] * values[rows]).sum((-3, -2))        # over heads and candidates

    but exact with two searches among n: the k best sums lie among the pairs of the k best of either half, and of those
    pairs only where ``(rank1 + 1) * (rank2 + 1) <= k``. Neither the n² scores nor the (..., heads, k, value_dim) rows
    are held. Which rows are read among equal scores is undefined.

    The gradient of the values is row-sparse: train them with `softdb.optim.RowAdam` (or `RowAdagrad`, or SparseAdam),
    whose step touches only the rows that were read, and the rest with any optimiser. See the example. For clipping
    there is `softdb.optim.clip_row_grad_norm_`; torch's own takes no sparse gradients.

    Args:
        dim: Width of input and output.
        rows: How many values: n * n.
        heads: How many queries are made of each input.
        k: How many rows each query reads.
        key_dim: Width of queries, both halves together.
        value_dim: Width of values; ``dim`` unless given. If it is not ``dim``, a projection comes after.
        query_norm: "layer" normalises each half of a query by itself, "batch" each of its numbers over the batch;
            None neither.
        store: Another layer's ``store``, to share its values; ``sparse_grad`` and ``track_usage`` are its own.
        sparse_grad: Whether the gradient of the values is row-sparse; a dense one is as large as the values.
        track_usage: Whether to count, for ``store.usage``, how often and with which weight each row is read.
        device, dtype: Of the parameters, as for any module.

    Attributes:
        keys: (heads, 2, n, key_dim / 2).
        store: The values, ``store.weight`` (rows, value_dim), and their ``usage``, a `softdb.Usage`: that of all the
            layers which share it.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is not as above.

    Source: Lample et al. 2019 (arXiv 1907.05242); values shared between layers: Berges et al. 2024 (arXiv 2412.09764).

    Example:
        >>> import torch
        >>> from softdb.layers import ProductKeyMemory
        >>> from softdb.optim import RowAdam
        >>> layer = ProductKeyMemory(64, rows=128 * 128, key_dim=32, k=8, track_usage=True)
        >>> values = set(layer.store.parameters())
        >>> rest = [parameter for parameter in layer.parameters() if parameter not in values]
        >>> optimizers = RowAdam(values, lr=1e-2), torch.optim.AdamW(rest)
        >>> layer(torch.randn(2, 10, 64)).square().sum().backward()
        >>> for optimizer in optimizers:
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> int(layer.store.usage.reads.sum())                   # 20 inputs, 4 heads, 8 rows each
        640
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        *,
        heads: int = 4,
        k: int = 32,
        key_dim: int = 256,
        value_dim: int | None = None,
        query_norm: QueryNorm | None = "layer",
        store: ValueTable | None = None,
        sparse_grad: bool = True,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.k = check_positive("k", k)
        self.value_dim = self.dim if value_dim is None else check_positive("value_dim", value_dim)
        self.count = math.isqrt(self.rows)  # n
        if self.count**2 != self.rows:
            raise ArgumentError(
                f"rows: expected a square number, since every pair of keys has a row, got {rows}; take "
                f"{self.count**2} or {(self.count + 1) ** 2}"
            )
        if self.key_dim % 2:
            raise ArgumentError(f"key_dim: expected an even number, both halves together, got {key_dim}")
        if self.k > self.rows:
            raise ArgumentError(f"k: expected at most the {rows} rows, got {k}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        half = self.key_dim // 2
        self.queries = _Queries(self.dim, self.heads, half, query_norm, parts=2, **made)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, self.count, half, **made))
        self._own = store is None
        if store is None:
            store = ValueTable(
                self.rows, self.value_dim, sparse_grad=bool(sparse_grad), track_usage=bool(track_usage), **made
            )
        elif not isinstance(store, ValueTable):
            raise DtypeError(f"store: expected the store of another ProductKeyMemory, got {describe(store)}")
        elif tuple(store.weight.shape) != (self.rows, self.value_dim):
            raise ShapeError(
                f"store: expected {rows} values of width {self.value_dim}, got {tuple(store.weight.shape)}"
            )
        self.store = store
        self.output = None if self.value_dim == self.dim else nn.Linear(self.value_dim, self.dim, bias=False, **made)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew; a store that was given stays as it is."""
        self.queries.reset_parameters()
        nn.init.normal_(self.keys, std=(self.key_dim // 2) ** -0.5)
        if self._own:
            self.store.reset_parameters()
        if self.output is not None:
            _reset_output(self.output)

    def forward(self, x: Tensor, *, return_read: bool = False) -> Tensor | tuple[Tensor, Read]:
        """Look up what ``x`` asks for.

        Args:
            x: (..., dim).
            return_read: Whether to return the read as well, its leading shape (..., heads); ``ids`` are rows of
                ``store.weight``, ``mass`` is NaN: what the other rows hold is unknown.

        Returns:
            (..., dim), or that and a `softdb.Read`.

        Raises:
            ShapeError, DtypeError: ``x`` is not as above.
            NonFiniteError: ``x`` holds NaN or infinity, or the parameters do.
        """
        check_float_tensor("x", x, (-1, self.dim))
        queries = self.queries(x)  # (..., heads, 2, half)
        leading = queries.shape[:-2]
        with full_precision(x.device):
            dtype = compute_dtype(queries, self.keys)
            scores, rows = _best_pairs(queries.reshape(-1, *queries.shape[-3:]).to(dtype), self.keys.to(dtype), self.k)
            weights, lse = softmax(scores)  # (M, heads, k)
            values = self.store.blend(weights.flatten(0, 1), rows.flatten(0, 1))  # (M heads, value_dim)
        values = values.view(*leading, self.value_dim).to(answer_dtype(x))
        y = values.sum(-2)
        if self.output is not None:
            y = self.output(y)
        if not return_read:
            return y
        scores, rows, weights = (tensor.view(*leading, self.k) for tensor in (scores, rows, weights))
        unknown = torch.full(leading, torch.nan if self.k < self.rows else 1.0, dtype=lse.dtype, device=lse.device)
        return y, Read(values, rows, weights, scores, lse.view(leading), unknown)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return f"dim={self.dim}, rows={self.rows}, heads={self.heads}, k={self.k}, key_dim={self.key_dim}"


def _best_pairs(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums of two products, and the rows i * n + j that they belong to.

    Args:
        queries: (M, heads, 2, half).
        keys: (heads, 2, n, half).
        k: How many, at most n².

    Returns:
        (M, heads, k) and (M, heads, k), best first.
    """
    heads, n = queries.shape[1], keys.shape[2]
    first, second = _ranks(k, min(k, n), queries.device)
    found = []
    # An exported graph may be for batches of any size, not for any number of parts.
    for part in [queries] if is_exporting() else queries.split(max(1, SCORES // (2 * heads * n))):
        # Products of these queries with a list at a time, (2 heads, m, n).
        halves = torch.bmm(part.flatten(1, 2).transpose(0, 1), keys.flatten(0, 1).mT).unflatten(0, (heads, 2))
        with torch.no_grad():
            best, columns = _best(halves, min(k, n))  # (heads, 2, m, k)
            place = (best[:, 0, :, first] + best[:, 1, :, second]).topk(k).indices  # (heads, m, k)
            columns = columns.gather(-1, torch.stack([first[place], second[place]], dim=1))
            rows = columns[:, 0] * n + columns[:, 1]
        scores = halves.gather(-1, columns).sum(1)
        found.append((scores.transpose(0, 1), rows.transpose(0, 1)))
    scores, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, rows


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., C) -> (..., k)
    """``topk(scores, k)``: the k groups with the best maxima hold the k best columns."""
    width = scores.shape[-1]
    groups = width // GROUP
    if width % GROUP or width < COLUMNS_PER_BEST * k:
        values, columns = scores.topk(k)
        return values, columns
    # Column c is in group c % groups: maxima of whole slices are faster than those of neighbours.
    chosen = scores.unflatten(-1, (GROUP, groups)).amax(-2).topk(k, sorted=False).indices
    columns = (chosen.unsqueeze(-1) + torch.arange(0, width, groups, device=scores.device)).flatten(-2)
    values, place = scores.gather(-1, columns).topk(k)
    return values, columns.gather(-1, place)


def _ranks(k: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs of ranks, each below ``most``, that can be among the k best sums.

    A pair of ranks (i, j), from 0, has (i + 1)(j + 1) - 1 others that are at least as good.
    """
    pairs = [(i, j) for i in range(most) for j in range(min(most, k // (i + 1)))]
    first, second = torch.tensor(pairs, device=device).unbind(-1)
    return first, second
