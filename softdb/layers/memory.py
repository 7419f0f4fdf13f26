"""`MemoryLayer`: a layer with learned rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdb._checks import check_float_tensor, check_keywords, check_positive, describe
from softdb.errors import ArgumentError, DtypeError, NotApplicableError, ShapeError
from softdb.filters import Where
from softdb.layers.queries import Queries, QueryNorm, make_output, reset_output, stack_reads
from softdb.layers.temperature import LayerWithTemperature, Temperature
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.result import Read
from softdb.scoring.normalizers import reports_rows
from softdb.store import SoftKVStore
from softdb.table.usage import Usage, check_tracking

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self from Python 3.11

__all__ = ["MemoryLayer"]


# Options of stores that a `MemoryLayer` passes to its own stores.
STORE_OPTIONS = ("metric", "index", "sparse_grad", "track_usage")


# Options of stores and reads that a `MemoryLayer` refuses, with the reason and the alternative.
REFUSED_OPTIONS = {
    "trainable": "the rows of a MemoryLayer are learned; freeze them with layer.stores.requires_grad_(False), or pass "
    "store=... with your own store",
    **dict.fromkeys(
        ("fields", "capacity", "evict"),
        "a MemoryLayer makes stores without it; pass store=... with your own store",
    ),
    **dict.fromkeys(
        ("exclude", "tail_samples", "generator"),
        "a MemoryLayer does not pass it to its reads; read one of layer.stores yourself",
    ),
    "where": "a MemoryLayer takes it at each call; pass it to the layer's call",
}


class MemoryLayer(LayerWithTemperature):
    r"""Multi-head attention over learned rows.

    In mode "exact", with the ``keys`` and ``values`` of the store, equal to::

        q = (x @ W_Q.T).unflatten(-1, (heads, key_dim))          # one query per head
        a = softmax(q @ keys.T / sqrt(key_dim) / temperature) @ values     # (..., heads, value_dim)
        y = a.flatten(-2) @ W_O.T

    and with ``gate`` to ``y = (silu(x @ W_G.T) * a.flatten(-2)) @ W_O.T``. The weights over all rows are computed in
    blocks and never allocated, as in `softdb.SoftKVStore.read`.

    Queries and keys are independent: keys are Parameters, and queries have their own projection.

    At initialization the output of a read has a norm of at most about 1, while x has a norm of about √dim, so that
    ``x + layer(x)`` is close to x.

    Args:
        dim: Width of input and output.
        rows: Number of rows, which are initialized randomly.
        heads: Number of heads. Each computes one query per input.
        key_dim: Width of queries and keys.
        value_dim: Width of values; default: ``key_dim``.
        mode: "exact", "topk" or "hard", as in `softdb.SoftKVStore.read`. A hard read trains the values only; to train
            queries and keys too, use ``normalizer="straight_through"`` with another mode.
        k: In topk mode, the number of candidates; in exact mode, the number of best rows in the `softdb.Read` that
            ``return_read`` returns.
        normalizer: As in `softdb.SoftKVStore.read`; "gumbel" adds noise in training mode only.
        temperature: Number above 0 that divides the scores, or "learnable": one number per head, which is the
            exponential of the Parameter ``log_temperature``, (heads,), and starts at 1. Default: that of ``store``, or
            1. If the layer has its own stores, a number is also their temperature.
        tolerance: In topk mode, the maximum error of each read, as in `softdb.SoftKVStore.read`: the read chooses the
            number of candidates. It reports rows only if ``k`` is given. The rows get dense gradients.
        shared: Whether all heads read one store; otherwise each head has its own store of ``rows`` rows.
        query_norm: "layer" applies layer normalization to each query, "batch" applies batch normalization to each
            feature of the queries, None applies no normalization.
        gate: Whether to multiply the outputs of the heads elementwise by a gate, ``silu(x @ W_G.T)``.
        store: Store to read instead of a new one: the ``store`` of another layer, to share its rows, or your own store,
            which you may write to. It must have ``rows`` rows when the layer is constructed, and keeps its own options.
        device, dtype: Device and dtype of the parameters, as for any module.
        **store_options: Options of the new stores: ``metric``, ``index``, ``sparse_grad``, ``track_usage``, as for
            `softdb.SoftKVStore`. With ``sparse_grad=True``, gradients of the rows are row-sparse in topk and hard mode:
            train the rows with `softdb.optim.RowAdam`. ``track_usage`` counts the rows that reads report, for `usage`.
            An exact softmax read and a read with ``tolerance`` report none without ``k``.

    Attributes:
        stores: List of the one store that all heads read, or of one store per head.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is invalid or unknown.

    Source: Vaswani et al. 2017 (arXiv 1706.03762) for heads and projections; Sukhbaatar et al. 2019 (arXiv 1907.01470)
    for learned rows instead of a context; Berges et al. 2024 (arXiv 2412.09764) for the gate.

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

    tolerance: float | None = None

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
        temperature: Temperature | None = None,
        tolerance: float | None = None,
        shared: bool = True,
        query_norm: QueryNorm | None = None,
        gate: bool = False,
        store: SoftKVStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **store_options: Any,
    ) -> None:
        """Create the layer; ``help(MemoryLayer)`` describes the arguments."""
        super().__init__()
        _check_store_options(type(self).__name__, store_options)
        self.dim, rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else check_positive("value_dim", value_dim)
        self.mode, self.normalizer = mode, normalizer
        if tolerance is not None and mode != "topk":
            raise ArgumentError(
                f"tolerance: expected no value in a MemoryLayer with mode={mode!r}, which does not approximate; leave "
                "it out, or pass mode='topk'"
            )
        options = ReadOptions(mode, k, normalizer=normalizer, tolerance=tolerance)
        self.k, self.tolerance = options.k, options.tolerance
        if store is not None:
            self._check_store(store, rows, shared, store_options)
        self._check_tracking(
            store_options.get("track_usage", False) if store is None else store.rows.track_usage,
            "track_usage: expected False" if store is None else "store: expected one without track_usage=True",
        )
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_temperature(temperature, self.heads, **factory_kwargs)
        if store is None and self._temperature is not None:  # The stores have the number, and read as the layer does.
            store_options["temperature"], self._temperature = self._temperature, None
        self.queries = Queries(self.dim, self.heads, self.key_dim, query_norm, **factory_kwargs)
        if store is None:
            number = 1 if shared else self.heads
            self.stores = nn.ModuleList(
                SoftKVStore(self.key_dim, self.value_dim, trainable=True, **factory_kwargs, **store_options)
                for _ in range(number)
            )
            for own in self.stores:
                own.reserve(rows)  # type: ignore[operator]
        else:
            self.stores = nn.ModuleList([store])
        self._own = store is None
        width = self.heads * self.value_dim
        self.gate = nn.Linear(self.dim, width, bias=False, **factory_kwargs) if gate else None
        self.output = make_output(self.heads, self.value_dim, self.dim, **factory_kwargs)
        self.reset_parameters()

    def _check_store(self, store: object, rows: int, shared: bool, options: Mapping[str, Any]) -> None:
        """Raise unless the ``store`` argument matches the layer."""
        if not isinstance(store, SoftKVStore):
            raise DtypeError(f"store: expected a SoftKVStore, got {describe(store)}")
        if not shared:
            raise ArgumentError("shared: expected True with store=..., which all heads share, got False; leave it out")
        if options:
            raise ArgumentError(
                f"{next(iter(options))}: expected no value with store=..., which has its own options; leave it out"
            )
        count = store.rows.capacity if store.keys.is_meta else len(store)  # A meta store gets its rows later.
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
            NotApplicableError: Each head has its own store; see ``stores``.
        """
        if len(self.stores) > 1:
            raise NotApplicableError(
                f"store: expected one store that all heads share, got {len(self.stores)} stores; use layer.stores"
            )
        (store,) = self.stores
        return store  # type: ignore[return-value]

    def _check_tracking(self, is_tracked: bool, problem: str) -> None:
        """Raise if usage is tracked by reads that report no rows to count."""
        is_estimate = self.tolerance is not None
        is_reporting = self.k is not None or self.mode == "hard" or reports_rows(self.normalizer)
        if is_tracked and not is_reporting:
            reads, others = "an exact softmax read", ", mode='topk', or another normalizer"
            if is_estimate:
                reads, others = "a read with tolerance", ""
            raise ArgumentError(
                f"{problem}, since {reads} without k reports no rows to count; pass k=... to count the k best "
                f"rows{others}"
            )

    @property
    def usage(self) -> Usage:
        """Usage counters of the rows, as of `softdb.SoftKVStore.usage`.

        If the heads share a store, the counters are sums over the heads: an input counts once for each head that
        reports the row. With ``shared=False`` they are concatenated in the order of ``stores``: if the layer has its
        own rows, ``usage.reads.view(heads, rows)`` are the counters of each head. The reads of other layers of a shared
        store count too. Restart the counters with ``reset_usage`` of the stores. `softdb.lab.summarize_usage` shows
        them.

        Raises:
            NotApplicableError: The stores do not track usage: see `track_usage_`.
        """
        for one in self.stores:
            check_tracking(one.rows.track_usage, "layer")  # type: ignore[union-attr, arg-type]
        counters: list[Any] = [store.usage for store in self.stores]
        return Usage(torch.cat([one.reads for one in counters]), torch.cat([one.weight for one in counters]))

    def track_usage_(self, enabled: bool = True) -> Self:
        """Start counting reads for `usage`, or stop and drop the counters.

        Equal to ``store.track_usage_(enabled)`` for every store of the layer; see `softdb.SoftKVStore.track_usage_`.

        Args:
            enabled: Whether to count.

        Returns:
            The layer.

        Raises:
            ArgumentError: The reads of the layer report no rows to count: exact softmax reads, or reads with
                ``tolerance``, without ``k``.

        Example:
            >>> import torch
            >>> from softdb.layers import MemoryLayer
            >>> layer = MemoryLayer(32, rows=1000, heads=4, mode="topk", k=8).track_usage_()
            >>> y = layer(torch.randn(10, 32))
            >>> layer.usage.reads.shape, int(layer.usage.reads.sum())  # 10 inputs, 4 heads, 8 rows each
            (torch.Size([1000]), 320)
        """
        self._check_tracking(bool(enabled), "enabled: expected False")
        for store in self.stores:
            store.track_usage_(enabled)  # type: ignore[operator]
        return self

    @property
    def temperature(self) -> float | Tensor:
        """Divisor of the scores: a number, or learned ones for the heads, (heads,).

        Assign a number to change it, as a schedule does. If the layer has its own stores, the number is their
        temperature, and an assignment changes it.

        Raises:
            ArgumentError: In an assignment, if the temperature is learned, or the number is not above 0.
            NotApplicableError: Stores of the layer have different temperatures.
        """
        own = self._own_temperature
        if own is not None:
            return own
        first, *others = {float(store.temperature) for store in self.stores}  # type: ignore[arg-type]
        if others:
            raise NotApplicableError(
                "temperature: expected stores with one temperature, got several; use store.temperature of layer.stores"
            )
        return first

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._assign_temperature(value)
        if self._own:
            for store in self.stores:
                store.temperature = self._temperature  # type: ignore[assignment]
            self._temperature = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights and rows; keep the rows of a store that was passed."""
        self.queries.reset_parameters()
        for store in self.stores if self._own else []:
            _fill_randomly(store, self.dim**-0.5)  # type: ignore[arg-type]
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=self.dim**-0.5)
        reset_output(self.output)
        self._reset_temperature()

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: Literal[True]) -> tuple[Tensor, Read]: ...

    @overload
    def forward(self, x: Tensor, *, where: Where | None = None, return_read: bool) -> Tensor | tuple[Tensor, Read]: ...

    def forward(
        self, x: Tensor, *, where: Where | None = None, return_read: bool = False
    ) -> Tensor | tuple[Tensor, Read]:
        """Read the rows with the queries of ``x``.

        Args:
            x: The input, (..., dim).
            where: Rows that may be read, as in `softdb.SoftKVStore.read`. For a callable, B is the number of queries
                that one store answers: the number of inputs times ``heads``, or the number of inputs if each head has
                its own store.
            return_read: Whether to return the read as well. Its leading shape is (..., heads).

        Returns:
            The output, (..., dim); with ``return_read`` a tuple of the output and a `softdb.Read`.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: An argument is invalid.
        """
        check_float_tensor("x", x, (-1, self.dim))
        queries = self.queries(x).squeeze(-2)  # (..., heads, key_dim)
        options: dict[str, Any] = {"mode": self.mode, "k": self.k, "where": where, "normalizer": self.normalizer}
        options["tolerance"] = self.tolerance
        temperature = self._own_temperature
        if len(self.stores) == 1:
            read = self.stores[0].read(queries, temperature=temperature, **options)  # type: ignore[operator]
        else:
            divisors = temperature if isinstance(temperature, Tensor) else [temperature] * self.heads
            heads = zip(self.stores, queries.unbind(-2), divisors, strict=True)
            reads = [store.read(query, temperature=divisor, **options) for store, query, divisor in heads]  # type: ignore[operator]
            read = stack_reads(reads, queries.dim() - 2)
        heads_output = read.values.flatten(-2)
        if self.gate is not None:
            heads_output = F.silu(self.gate(x)) * heads_output
        y: Tensor = self.output(heads_output)
        return (y, read) if return_read else y

    if TYPE_CHECKING:
        __call__ = forward  # torch.nn.Module types it as Callable[..., Any]

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        k = "" if self.k is None else f", k={self.k}"
        return f"dim={self.dim}, heads={self.heads}, mode={self.mode!r}{k}"


def _check_store_options(owner: str, options: Mapping[str, Any]) -> None:
    """Raise for options that the class ``owner`` refuses or does not have."""
    for name in options:
        if name in REFUSED_OPTIONS:
            raise ArgumentError(f"{name}: expected no value, since {REFUSED_OPTIONS[name]}")
    own = [name for name in inspect.signature(MemoryLayer).parameters if name != "store_options"]
    check_keywords(owner, options, [*own, *STORE_OPTIONS])


def _fill_randomly(store: SoftKVStore, std: float) -> None:
    """Fill a store with normally distributed keys (std 1) and values (std ``std``)."""
    if store.keys.is_meta:
        return
    if len(store) == 0:
        count = store.rows.capacity
        store.add(
            store.keys.new_zeros(1, 1).expand(count, store.key_dim), store.values.new_zeros(count, store.value_dim)
        )
    else:
        # `revive` marks the rows as new, so that optimizers reset their state.
        rows = store.get(store.ids)
        store.revive(store.ids, rows.keys, rows.values)
    store.keys.normal_()
    store.values.normal_(std=std)
