"""`MemoryLayer`: a layer with learned rows."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdb._checks import check_float_tensor, check_positive, describe
from softdb.attributes import ModuleWithProperties
from softdb.errors import ArgumentError, DtypeError, NotApplicableError, ShapeError
from softdb.filters import Where
from softdb.layers.queries import Queries, QueryNorm, output_of, reset_output, stack_reads
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.result import Read
from softdb.scoring.normalizers import reports_rows
from softdb.store import SoftKVStore

__all__ = ["MemoryLayer"]


# The options of its stores that a `MemoryLayer` takes.
STORE_OPTIONS = ("metric", "temperature", "index", "sparse_grad", "track_usage")


# The options of stores and reads that a `MemoryLayer` refuses: the reason, and the remedy.
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


class MemoryLayer(ModuleWithProperties):
    r"""Look up learned rows with a query for each head, and project the answers back.

    With the store's ``keys`` and ``values``, equal for the mode "exact" to::

        q = (x @ W_Q.T).unflatten(-1, (heads, key_dim))          # a query for each head
        a = softmax(q @ keys.T / sqrt(key_dim)) @ values         # its answer, (..., heads, value_dim)
        y = a.flatten(-2) @ W_O.T

    and with ``gate`` to ``y = (silu(x @ W_G.T) * a.flatten(-2)) @ W_O.T``. Memory is that of the store's reads: the
    weights over all rows are never held.

    Queries have a projection of their own, so that a token's query may differ from a row's key: with one projection
    for both, every token would match itself best.

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
        query_norm: "layer" normalises each query, "batch" each of its numbers over the batch; None neither.
        gate: Whether to multiply the answers, number by number, by a gate that is computed from x.
        store: A store to read instead of new rows: another layer's ``store``, to share it, or one of yours, which you
            may write to. It has ``rows`` rows when the layer is made and keeps its own options.
        device, dtype: Of the parameters, as for any module.
        **store_options: For the new stores: ``metric``, ``temperature``, ``index``, ``sparse_grad``, ``track_usage``,
            as for `softdb.SoftKVStore`. In topk and hard mode gradients of the rows are row-sparse unless
            ``sparse_grad=False``: train them with `softdb.optim.RowAdam`. ``track_usage`` counts the rows that reads
            report; a softmax over all rows reports none, so with the mode "exact" it needs ``k`` or another normalizer.

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
        self.k = ReadOptions(mode, k, normalizer=normalizer).k
        if store is not None:
            self._check_store(store, rows, shared, store_options)
        if mode == "exact" and self.k is None and not reports_rows(normalizer):
            _check_untracked(store, store_options)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = Queries(self.dim, self.heads, self.key_dim, query_norm, **made)
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
        self.output = output_of(self.heads, self.value_dim, self.dim, **made)
        self.reset_parameters()

    def _check_store(self, store: object, rows: int, shared: bool, options: Mapping[str, Any]) -> None:
        """Raise unless a store that was given fits the layer."""
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
        """Return the store that all heads read.

        Raises:
            NotApplicableError: Each head has a store of its own; see ``stores``.
        """
        if len(self.stores) > 1:
            raise NotApplicableError(
                f"shared: expected heads that share a store, got {len(self.stores)}; see layer.stores"
            )
        (store,) = self.stores
        return store  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights and rows; a store that was given stays as it is."""
        self.queries.reset_parameters()
        for store in self.stores if self._own else []:
            _fill(store, self.dim**-0.5)  # type: ignore[arg-type]
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=self.dim**-0.5)
        reset_output(self.output)

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: Literal[True]) -> tuple[Tensor, Read]: ...

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: bool) -> Tensor | tuple[Tensor, Read]: ...

    def forward(
        self, x: Tensor, *, where: Where | None = None, return_read: bool = False
    ) -> Tensor | tuple[Tensor, Read]:
        """Look up the rows for ``x``.

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
            read = stack_reads([store.read(query, **options) for store, query in heads], queries.dim() - 2)  # type: ignore[operator]
        answer = read.values.flatten(-2)
        if self.gate is not None:
            answer = F.silu(self.gate(x)) * answer
        y: Tensor = self.output(answer)
        return (y, read) if return_read else y

    if TYPE_CHECKING:
        __call__ = forward  # of torch.nn.Module it takes and returns anything

    def extra_repr(self) -> str:
        """Return the text that ``repr`` shows between the brackets."""
        k = "" if self.k is None else f", k={self.k}"
        return f"dim={self.dim}, heads={self.heads}, mode={self.mode!r}{k}"


def _check_store_options(options: Mapping[str, Any]) -> None:
    """Raise for options that a `MemoryLayer` does not have or refuses."""
    for name in options:
        if name in REFUSED_OPTIONS:
            raise ArgumentError(f"{name}: expected nothing, since {REFUSED_OPTIONS[name]}")
        if name not in STORE_OPTIONS:
            known = [*inspect.signature(MemoryLayer).parameters, *STORE_OPTIONS]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}=...?" if close else f"its stores take {', '.join(STORE_OPTIONS)}"
            raise TypeError(f"{name}: MemoryLayer has no such argument; {hint}")


def _check_untracked(store: SoftKVStore | None, options: Mapping[str, Any]) -> None:
    """Raise if usage is to be tracked, but reads report no rows to count."""
    tracked = options.get("track_usage", False) if store is None else store.rows.track_usage
    if tracked:
        name = "track_usage: expected False" if store is None else "store: expected one without track_usage=True"
        raise ArgumentError(
            f"{name}, since a softmax over all rows names none to count; pass k=... for the best rows to count, "
            "mode='topk', or another normalizer"
        )


def _fill(store: SoftKVStore, deviation: float) -> None:
    """Fill a store with random rows, whose values have a standard deviation."""
    if store.keys.is_meta:
        return
    if len(store) == 0:
        count = store.rows.capacity
        store.add(
            store.keys.new_zeros(1, 1).expand(count, store.key_dim), store.values.new_zeros(count, store.value_dim)
        )
    else:
        # These are other rows than before: optimisers must reset their state.
        rows = store.get(store.ids)
        store.revive(store.ids, rows.keys, rows.values)
    store.keys.normal_()
    store.values.normal_(std=deviation)
