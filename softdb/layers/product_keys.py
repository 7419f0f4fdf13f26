"""`ProductKeyMemory`: a learned value for every pair of two short lists of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import check_float_tensor, check_positive, describe
from softdb.attributes import ModuleWithProperties
from softdb.errors import ArgumentError, DtypeError, NotApplicableError, ShapeError
from softdb.interop.blend import blend
from softdb.interop.ddp import is_asked_by_ddp, stand_in
from softdb.kernels.spec import full_precision
from softdb.layers.queries import Queries, QueryNorm, reset_output
from softdb.reading.result import Read, answer_dtype
from softdb.scoring.metrics import compute_dtype
from softdb.scoring.normalizers import softmax
from softdb.table.usage import Usage
from softdb.transforms import is_active, is_exporting, outside_of_transforms, plain, samples_first

__all__ = ["ProductKeyMemory", "ValueTable"]


# With so many columns for each that is wanted, the best are sought by the maxima of groups, of so many columns each.
COLUMNS_PER_BEST, GROUP = 8, 4


# As many scores of product keys are held at a time.
SCORES = 2**22


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
        self.queries = Queries(self.dim, self.heads, half, query_norm, parts=2, **made)
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
            reset_output(self.output)

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
