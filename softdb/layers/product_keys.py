"""`ProductKeyMemory`: a layer with a learned value for every pair of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from softdb._checks import check_float_tensor, check_positive, describe, refuse_unknown_keywords
from softdb.attributes import ModuleWithProperties
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.interop.blend import blend
from softdb.interop.ddp import is_called_by_ddp, make_stand_in
from softdb.kernels.spec import disable_autocast
from softdb.layers.product_search import PairSearch, find_best_pairs
from softdb.layers.queries import Queries, QueryNorm, reset_output
from softdb.layers.temperature import LayerWithTemperature, Temperature
from softdb.reading.hints import CostHints
from softdb.reading.result import Read, answer_dtype
from softdb.scoring.metrics import compute_dtype
from softdb.scoring.normalizers import softmax
from softdb.table.hooks import register_row_embedding
from softdb.table.usage import Usage, check_tracking, count_reads, keep_sum_dtype, new_counters, reset_counters
from softdb.transforms import is_active, move_samples_first, suspend_transforms, unwrap_tensors

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self from Python 3.11

__all__ = ["ProductKeyMemory", "ValueTable"]


class ValueTable(ModuleWithProperties, nn.Embedding):
    """Values of a `ProductKeyMemory`, and counters of their reads.

    The values are ``weight``, (rows, value_dim). The base class is `torch.nn.Embedding`, since DistributedDataParallel
    uses that class to detect Parameters with row-sparse gradients.
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
        self.track_usage, self._hints = False, CostHints()
        register_row_embedding(self)
        self.track_usage_(track_usage)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_row_embedding(self)

    def reset_parameters(self) -> None:
        """Draw new values of norm about 1, and set the counters of reads to 0."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        if getattr(self, "track_usage", False):  # nn.Embedding.__init__ calls this method first.
            self.reset_usage()

    def _apply(self, fn: Any, recurse: bool = True) -> ValueTable:
        total = self.total if self.track_usage else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if total is not None:
            self.total = keep_sum_dtype(total, self.total)
        return self

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield modules by name; hide the counters from DistributedDataParallel.

        Otherwise DDP would overwrite the counters of every rank with those of rank 0.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name, make_stand_in(self, sparse=self.sparse) if module is self and is_called_by_ddp() else module

    @property
    def usage(self) -> Usage:
        """Number of reads of each row, and the sum of its weights.

        Counting starts when the layer is made, and starts again after `reset_usage`.

        Raises:
            NotApplicableError: The values do not track usage.
        """
        check_tracking(self.track_usage, "layer")
        return Usage(self.reads.clone(), self.total.clone())

    def reset_usage(self) -> None:
        """Set the counters of reads to 0.

        Raises:
            NotApplicableError: The values do not track usage.
        """
        check_tracking(self.track_usage, "layer")
        reset_counters(self.reads, self.total)

    @torch.inference_mode(False)
    def track_usage_(self, enabled: bool = True) -> Self:
        """Start counters at 0, or drop them; without effect if already done."""
        enabled = bool(enabled)
        if enabled and not self.track_usage:
            reads, total = new_counters(self.num_embeddings, self.weight.device)
            self.register_buffer("reads", reads)
            self.register_buffer("total", total)
        elif self.track_usage and not enabled:
            del self.reads, self.total
        self.track_usage = enabled
        return self

    def blend(self, weights: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k) -> (M, value_dim)
        """Return ``(weights[..., None] * weight[rows]).sum(1)``, and count the reads."""
        if not self.sparse:
            self._hints.check_gradient("layer", [self.weight])
        values = blend(weights, self.weight, rows, sparse=self.sparse)
        if self.track_usage:
            if is_active():
                # Broadcast rows and weights to the samples of torch.vmap.
                rows, weights = rows + torch.zeros_like(weights).to(rows.dtype), weights + torch.zeros_like(rows)
                reads, total = unwrap_tensors("reads", self.reads), unwrap_tensors("total", self.total)
                with suspend_transforms():
                    count_reads(reads, total, move_samples_first(rows), move_samples_first(weights))
            else:
                count_reads(self.reads, self.total, rows, weights)
        return values


@refuse_unknown_keywords
class ProductKeyMemory(LayerWithTemperature):
    r"""Memory of n² learned values, whose keys are all pairs of two lists of n keys.

    Row ``i * n + j`` has the key ``cat([K1[i], K2[j]])``; each head has its own K1 and K2. The query of a head has two
    halves, q1 and q2. Equal to::

        q1, q2 = norm((x @ W_Q.T).unflatten(-1, (heads, 2, key_dim / 2)))
        scores = (q1 @ K1.T)[..., :, None] + (q2 @ K2.T)[..., None, :]     # (..., heads, n, n)
        best, rows = topk(scores.flatten(-2), k)
        y = (softmax(best / temperature)[..., None] * values[rows]).sum((-3, -2))        # over heads and candidates

    The search is exact, and scores only the 2 n keys of the two lists. The k best sums are among the pairs of the k
    best keys of each half. Only pairs with ``(rank1 + 1) * (rank2 + 1) <= k`` are compared, with ranks counted from 0.
    Neither the n² scores nor a tensor of shape (..., heads, k, value_dim) is allocated. The order of rows with equal
    scores is undefined.

    The gradient of the values is dense: any optimizer trains the layer, but each step processes all values. For many
    values pass ``sparse_grad=True``, and train the values with `softdb.optim.RowAdam`, `softdb.optim.RowAdagrad` or
    `torch.optim.SparseAdam`, whose step updates only the rows that were read, and the other Parameters with any
    optimizer, as in the example.

    Args:
        dim: Width of input and output.
        rows: Number of values, n * n.
        heads: Number of heads. Each computes one query per input.
        k: Number of rows that each query reads.
        key_dim: Width of queries, both halves together.
        value_dim: Width of values; default: ``dim``. If it differs from ``dim``, the output is projected to ``dim``.
        query_norm: "layer" applies layer normalization to each half of a query, "batch" applies batch normalization to
            each feature of the queries, None applies neither.
        temperature: Number above 0 that divides the scores, or "learnable": one number per head, which is the
            exponential of the Parameter ``log_temperature``, (heads,), and starts at 1.
        store: Another layer's ``store``, to share its values. It keeps its own ``sparse_grad`` and ``track_usage``.
        sparse_grad: Whether the gradient of the values is row-sparse. A dense gradient has the size of all values.
        track_usage: Whether ``store.usage`` counts the reads of each row and sums their weights.
        device, dtype: Device and dtype of the parameters, as for any module.

    Attributes:
        keys: The keys, (heads, 2, n, key_dim / 2).
        store: The values, ``store.weight`` (rows, value_dim), and their ``usage``, a `softdb.Usage` that counts the
            reads of all layers that share the store.

    Raises:
        ArgumentError, DtypeError, ShapeError: An argument is invalid.

    Source: Lample et al. 2019 (arXiv 1907.05242); values shared between layers: Berges et al. 2024 (arXiv 2412.09764).

    Example:
        >>> import torch
        >>> from softdb.layers import ProductKeyMemory
        >>> from softdb.optim import RowAdam
        >>> layer = ProductKeyMemory(64, rows=128 * 128, key_dim=32, k=8, sparse_grad=True, track_usage=True)
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

    search = PairSearch()  # The sizes affect the speed and memory of a read, not its result.

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
        temperature: Temperature = 1.0,
        store: ValueTable | None = None,
        sparse_grad: bool = False,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layer; ``help(ProductKeyMemory)`` describes the arguments."""
        super().__init__()
        self.dim, self.rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.k = check_positive("k", k)
        self.value_dim = self.dim if value_dim is None else check_positive("value_dim", value_dim)
        self.count = math.isqrt(self.rows)  # n
        if self.count**2 != self.rows:
            raise ArgumentError(
                f"rows: expected a square number, since every pair of keys has a row, got {rows}; use "
                f"{self.count**2} or {(self.count + 1) ** 2}"
            )
        if self.key_dim % 2:
            raise ArgumentError(f"key_dim: expected an even number, the width of both halves together, got {key_dim}")
        if self.k > self.rows:
            raise ArgumentError(f"k: expected at most the number of rows, {rows}, got {k}")
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        half = self.key_dim // 2
        self.queries = Queries(self.dim, self.heads, half, query_norm, parts=2, **factory_kwargs)
        self.keys = nn.Parameter(torch.empty(self.heads, 2, self.count, half, **factory_kwargs))
        self._make_temperature(temperature, self.heads, **factory_kwargs)
        self._own = store is None
        if store is None:
            store = ValueTable(
                self.rows,
                self.value_dim,
                sparse_grad=bool(sparse_grad),
                track_usage=bool(track_usage),
                **factory_kwargs,
            )
        elif not isinstance(store, ValueTable):
            raise DtypeError(f"store: expected the store of another ProductKeyMemory, got {describe(store)}")
        elif tuple(store.weight.shape) != (self.rows, self.value_dim):
            raise ShapeError(
                f"store: expected {rows} values of width {self.value_dim}, got {tuple(store.weight.shape)}"
            )
        self.store = store
        self.output = None
        if self.value_dim != self.dim:
            self.output = nn.Linear(self.value_dim, self.dim, bias=False, **factory_kwargs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new Parameters; keep the values of a store that was passed."""
        self.queries.reset_parameters()
        nn.init.normal_(self.keys, std=(self.key_dim // 2) ** -0.5)
        if self._own:
            self.store.reset_parameters()
        if self.output is not None:
            reset_output(self.output)
        self._reset_temperature()

    @property
    def usage(self) -> Usage:
        """Usage counters of the values: reads and sum of weights of each row.

        Equal to ``store.usage``. The counters are sums over the heads: an input counts once for each head that reads
        the row. The reads of other layers that share the store count too. Restart the counters with
        ``store.reset_usage()``. `softdb.lab.summarize_usage` shows them.

        Raises:
            NotApplicableError: The layer does not track usage: see `track_usage_`.
        """
        return self.store.usage

    def track_usage_(self, enabled: bool = True) -> Self:
        """Start counting reads for `usage`, or stop and drop the counters.

        The counters start at 0; if the store counts already, they continue. While the store counts, they are part of
        ``state_dict``. Layers that share the store count together.

        Args:
            enabled: Whether to count.

        Returns:
            The layer.

        Example:
            >>> import torch
            >>> from softdb.layers import ProductKeyMemory
            >>> layer = ProductKeyMemory(64, rows=128 * 128, heads=4, k=8, key_dim=32).track_usage_()
            >>> y = layer(torch.randn(10, 64))
            >>> int(layer.usage.reads.sum())                     # 10 inputs, 4 heads, 8 rows each
            320
        """
        self.store.track_usage_(enabled)
        return self

    @overload
    def forward(self, x: Tensor, *, return_read: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, return_read: Literal[True]) -> tuple[Tensor, Read]: ...

    @overload
    def forward(self, x: Tensor, *, return_read: bool) -> Tensor | tuple[Tensor, Read]: ...

    def forward(self, x: Tensor, *, return_read: bool = False) -> Tensor | tuple[Tensor, Read]:
        """Read the k best rows with each query of ``x``.

        Args:
            x: The input, (..., dim).
            return_read: Whether to return the read as well. Its leading shape is (..., heads). ``ids`` are rows of
                ``store.weight``; ``mass`` is NaN, since the scores of the other rows are unknown.

        Returns:
            The output, (..., dim); with ``return_read`` a tuple of the output and a `softdb.Read`.

        Raises:
            ShapeError, DtypeError: ``x`` has the wrong shape or dtype.
            NonFiniteError: ``x`` or a Parameter contains NaN or infinity; on a GPU the output is NaN instead.
        """
        check_float_tensor("x", x, (-1, self.dim))
        queries = self.queries(x)  # (..., heads, 2, half)
        leading = queries.shape[:-2]
        with disable_autocast(x.device):
            dtype = compute_dtype(queries, self.keys)
            queries = self._divide_by_temperature(queries.reshape(-1, *queries.shape[-3:]).to(dtype), 2)
            scores, rows = find_best_pairs(queries, self.keys.to(dtype), self.k, self.search)
            weights, lse = softmax(scores)  # (M, heads, k)
            values = self.store.blend(weights.flatten(0, 1), rows.flatten(0, 1))  # (M heads, value_dim)
        values = values.view(*leading, self.value_dim).to(answer_dtype(x))
        y = values.sum(-2)
        if self.output is not None:
            y = self.output(y)
        if not return_read:
            return y
        scores, rows, weights = (tensor.view(*leading, self.k) for tensor in (scores, rows, weights))
        mass = torch.full(leading, torch.nan if self.k < self.rows else 1.0, dtype=lse.dtype, device=lse.device)
        return y, Read(values, rows, weights, scores, lse.view(leading), mass)

    if TYPE_CHECKING:
        __call__ = forward  # torch.nn.Module types it as Callable[..., Any]

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        return f"dim={self.dim}, rows={self.rows}, heads={self.heads}, k={self.k}, key_dim={self.key_dim}"
