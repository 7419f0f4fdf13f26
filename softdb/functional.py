"""Reads as pure functions of tensors: `soft_read`, `topk_read`, and `merge` of what they return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from softdb._checks import (
    broadcasts,
    check_choice,
    check_finite,
    check_float_tensor,
    check_ids,
    check_positive,
    check_temperature,
    describe,
    is_finite,
    list_ids,
)
from softdb.blockwise import (
    BestRows,
    Places,
    Scan,
    blend_at,
    check_scores,
    exact_read,
    full_precision,
    gather_rows,
    gathered_scores,
    is_narrow,
    query_numbers,
    scores_at,
    weighted_sum,
)
from softdb.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    NonFiniteError,
    ShapeError,
    TransformError,
)
from softdb.filters import Selection
from softdb.hidden import finite_or_zero, finite_values, hidden_keys_zeroed, spoil
from softdb.processes import note_openmp
from softdb.scoring.gumbel import GumbelNoise, noise_for
from softdb.scoring.metrics import METRICS, Metric, centre_of, compute_dtype, prepare_query
from softdb.scoring.normalizers import SPARSE, check_normalizer, is_hard, softmax, straight_through
from softdb.transforms import (
    Answer,
    Operands,
    check_no_tangent,
    check_randomness,
    is_active,
    is_forward_mode,
    is_traced,
    is_wrapped,
    outside_of_graphs,
    outside_of_transforms,
    read_opaquely,
    samples_first,
)

__all__ = ["Read", "merge", "soft_read", "topk_read"]

# How many of the best rows are looked at for those that a sparse normalizer gives weight, and how many times as many
# where that was not enough.
FIRST_REACH, FURTHER = 32, 8
# As many numbers of such rows are gathered: a GiB of float32.
GATHERED_NUMBERS = 2**28
# From one of so many rows on, a sample is the start of a permutation of all.
MANY_DRAWS = 8


@dataclass(frozen=True, eq=False)
class Read:
    """One answered batch of queries; the leading shape is the query's.

    ``values``, ``weights``, ``scores``, ``lse`` and ``mass`` are differentiable.

    Attributes:
        values: The answer, (..., value_dim), in the query's dtype (under autocast: its dtype).
        ids: The rows behind it, (..., k) int64, best first; -1 where fewer than k rows could be seen. None for an
            exact read, or one to a tolerance, without ``k``. A top-k read with a sparse normalizer may double k.
        weights: The rows' weights, (..., k); 0 at padding. None where ``ids`` is.
        scores: The rows' scores, divided by the temperature, (..., k); -inf at padding. None where ``ids`` is.
        lse: log of the sum of exp(score) over the rows considered, (...,); -inf where there were none.
        mass: The fraction of the weight of all allowed rows that the rows in ``ids`` hold, (...,): by ``normalizer``
            if it is sparse, else by softmax. 1 for an exact read without ``k``, what the candidates hold for a read to
            a tolerance without it, 0 where there was nothing to read, NaN when unknown.
        error: The estimated relative error of ``values``, (...,), where a tail or a tolerance was asked for.
        normalizer: How scores became weights; "hard" for a hard read.
    """

    values: Tensor
    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None
    lse: Tensor
    mass: Tensor
    error: Tensor | None = None
    normalizer: str = "softmax"


def transform(read: Read, function: Callable[[Tensor], Tensor]) -> Read:
    """The same read with ``function`` applied to every tensor."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return Read(
        function(read.values),
        changed(read.ids),
        changed(read.weights),
        changed(read.scores),
        function(read.lse),
        function(read.mass),
        changed(read.error),
        read.normalizer,
    )


def replaced(read: Read, queries: Tensor, other: Read) -> Read:
    """``read`` of M queries with the answers to some of them, (b,), from ``other``."""

    def put(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        return None if mine is None or theirs is None else mine.index_copy(0, queries, theirs)

    return Read(
        read.values.index_copy(0, queries, other.values),
        put(read.ids, other.ids),
        put(read.weights, other.weights),
        put(read.scores, other.scores),
        read.lse.index_copy(0, queries, other.lse),
        read.mass.index_copy(0, queries, other.mass),
        put(read.error, other.error),
        read.normalizer,
    )


def widened(read: Read, k: int) -> Read:
    """The same read with padding, up to k candidates."""
    if read.ids is None or read.weights is None or read.scores is None:
        return read
    room = (0, k - read.ids.shape[-1])
    ids, weights = torch.nn.functional.pad(read.ids, room, value=-1), torch.nn.functional.pad(read.weights, room)
    return replace(read, ids=ids, weights=weights, scores=torch.nn.functional.pad(read.scores, room, value=-torch.inf))


def best_of(read: Read, k: int | None) -> Read:
    """The same read, of which only the k best candidates are reported, or none."""
    if k is None:
        return replace(read, ids=None, weights=None, scores=None)
    if read.ids is None or read.weights is None or read.scores is None or read.ids.shape[-1] <= k:
        return read
    weights = read.weights[:, :k]
    return replace(read, ids=read.ids[:, :k], weights=weights, scores=read.scores[:, :k], mass=share_of(weights))


def completed(read: Read, queries: Tensor, exact: Read) -> Read:
    """Of some of the queries, (b,), the candidates of ``read`` as parts of an exact one of those queries."""
    scores = cast(Tensor, read.scores)[queries]
    total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
    weights = (scores - total).exp()
    return replace(
        exact,
        ids=cast(Tensor, read.ids)[queries],
        weights=weights,
        scores=scores,
        mass=share_of(weights),
        error=torch.zeros_like(exact.lse),
    )


# -- the two kinds of read, of M = G B queries in G groups ------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """Keys and values to read from, N rows for each of G groups of queries; row n of group g lies at ``g * N + n``.

    Attributes:
        keys, values: (G N, width).
        groups: G.
        sparse: Whether gathered rows get row-sparse gradients.
    """

    keys: Tensor
    values: Tensor
    groups: int = 1
    sparse: bool = False

    def place(self, rows: Tensor) -> Tensor:  # (M, k) row numbers -> (M, k) places in the tables
        if self.groups <= 1:
            return rows
        first = torch.arange(self.groups, device=rows.device) * (len(self.keys) // self.groups)
        first = first.repeat_interleave(len(rows) // self.groups).unsqueeze(-1)
        return torch.where(rows < 0, rows, rows + first)

    def gather_keys(self, places: Places, dtype: torch.dtype) -> Tensor:
        return gather_rows(self.keys, places, dtype, sparse=self.sparse)

    def gather_values(self, places: Places, dtype: torch.dtype) -> Tensor:
        return gather_rows(self.values, places, dtype, sparse=self.sparse)


def read_exactly(query: Tensor, tables: Tables, scan: Scan, k: int | None, normalizer: str) -> Read:
    """An exact read of prepared queries (M, w); everything in ``scan.dtype``.

    Without ``k`` it reports the rows that a sparse or hard normalizer gives weight all the same, without gradients:
    whoever has counted them drops them by `best_of`.
    """
    selection, groups = scan.selection, tables.groups
    height = len(query) // max(1, groups)
    if selection.hides_some and torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad):
        tables = replace(tables, keys=hidden_keys_zeroed(tables.keys, scan, groups, height))
    if normalizer in SPARSE:
        return _read_support(query, tables, scan, k, normalizer)
    hard = is_hard(normalizer)
    values, lse, best = exact_read(query, tables.keys, tables.values, scan, groups, k or int(hard))
    if selection.hides_some and not is_finite(values):
        mended = finite_values(tables.values, selection, groups, height)
        if mended is not None:
            values, lse, best = exact_read(query, tables.keys, mended[0], scan, groups, k or int(hard))
            values = spoil(values, mended[1])
    mass = torch.ones_like(lse) if scan.selection.shows_some_to_all else (lse > -torch.inf).to(lse.dtype)
    if best is None:
        return Read(values, None, None, None, lse, mass)
    scores, weights, rows = best
    places = Places(tables.place(rows))
    if hard:
        values = straight_through(_choose(tables, places, scan.dtype), values)
    if k is None:
        return Read(values, rows, _one_hot_first(rows, weights.dtype), scores, lse, mass, normalizer=normalizer)
    if torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad) and len(tables.keys):
        # Once more with a graph; forward, the kernel's own numbers stand, since they agree with its log-sum-exp.
        again = gathered_scores(query, tables.gather_keys(places, scan.dtype), scan)  # noise has no gradient
        scores = straight_through(scores, again.masked_fill(places.missing, -torch.inf))
        exponents = scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
        weights = straight_through(weights, exponents.exp())
    mass = share_of(weights)
    if hard:
        weights = straight_through(_one_hot_first(rows, weights.dtype), weights)
    return Read(values, rows, weights, scores, lse, mass, normalizer=normalizer)


def _read_support(query: Tensor, tables: Tables, scan: Scan, k: int | None, normalizer: str) -> Read:
    """An exact read that gives weight to some of the best rows only: they are found first, and then gathered."""
    count = scan.selection.count
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, tables.keys, tables.values))
    width = tables.keys.shape[-1] + tables.values.shape[-1] if wanted else 1
    most = GATHERED_NUMBERS // max(1, len(query) * width)
    reach = max(k or 1, min(FIRST_REACH, count))
    lse, scores, rows = _best_rows(query, tables, scan, reach)
    while True:
        support = int((SPARSE[normalizer](scores) > 0).sum(-1).max()) if len(query) else 0
        if support > most:
            raise ArgumentError(
                f"normalizer: expected {normalizer!r} to give weight to no more rows than can be gathered, "
                f"{GATHERED_NUMBERS:,} numbers in all, got {len(query):,} queries with at least {support:,} rows of "
                f"{width:,} numbers; lower the temperature, or read fewer queries at once"
            )
        # No row that was not found scores better than the last that was: if that has no weight, they have none.
        if support < reach or reach >= count:
            break
        reach = min(FURTHER * reach, count, most + 1)
        with torch.no_grad():
            _, scores, rows = _best_rows(query, tables, scan, reach)
    rows = rows[:, : max(k or 1, support)]
    everything = torch.ones(len(query), dtype=torch.bool, device=query.device)
    tables = replace(tables, sparse=False)  # as of every exact read, gradients of the rows are dense
    read = read_candidates(query, tables, scan, rows, normalizer, complete=everything)
    if scan.selection.hides_some and wanted and not is_finite(read.values):
        # Gradients of the keys are sums over queries, of which those that see no such value give theirs as ever.
        wrong, tables = ~read.values.detach().isfinite(), replace(tables, values=finite_or_zero(tables.values))
        read = read_candidates(query, tables, scan, rows, normalizer, complete=everything)
        read = replace(read, values=spoil(read.values, wrong))
    ids, weights, scores = cast(Tensor, read.ids), cast(Tensor, read.weights), cast(Tensor, read.scores)
    if k is None:
        ids = ids.masked_fill(weights == 0, -1)
        return replace(read, ids=ids, weights=weights.detach(), scores=scores.detach(), lse=lse)
    ids, weights, scores = ids[:, :k], weights[:, :k], scores[:, :k]
    return Read(read.values, ids, weights, scores, lse, share_of(weights), normalizer=normalizer)


def _best_rows(query: Tensor, tables: Tables, scan: Scan, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp over all rows, and scores and numbers of the k best."""
    _, lse, best = exact_read(query, tables.keys, tables.values.detach()[:, :0], scan, tables.groups, k)
    scores, _, rows = cast(BestRows, best)
    return lse, scores, rows


def share_of(weights: Tensor) -> Tensor:  # (M, k) -> (M,)
    """What weights come to, no more than 1."""
    total = weights.sum(-1)
    return straight_through(total.clamp(max=1.0), total)


def read_candidates(
    query: Tensor,
    tables: Tables,
    scan: Scan,
    rows: Tensor,
    normalizer: str,
    *,
    complete: Tensor,
    best: bool = False,
) -> Read:
    """A read of prepared queries (M, w) over candidates (M, k), -1 at padding; everything in ``scan.dtype``.

    ``complete`` (M,) says for which queries the candidates are known to be all rows that may be seen, ``best`` whether
    they are taken to be the best of those: then no row with weight is missing where one of them has none.
    """
    places = Places(tables.place(rows))
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, tables.keys, tables.values))
    lean = not wanted and not places.padded and tables.values.dtype == scan.dtype and tables.values.shape[-1] > 0
    if len(tables.keys) == 0:
        nothing = 0.0 * query.sum(-1, keepdim=True)  # part of the graph, as an answer has to be
        scores = nothing.to(scan.dtype).expand(rows.shape).masked_fill(places.missing, -torch.inf)
    elif wanted:
        scores = gathered_scores(query, tables.gather_keys(places, scan.dtype), scan)
        scores = scores.masked_fill(places.missing, -torch.inf) if places.padded else scores
    else:
        scores = scores_at(query, tables.keys, places.numbers, scan)
    if scan.noise is not None:
        numbers = query_numbers(range(len(rows) // tables.groups), range(tables.groups), rows.device)
        scores = scores + scan.noise.at(numbers.flatten().unsqueeze(-1), rows, scan.dtype).squeeze(-2)
    weights, lse = softmax(scores)
    check_scores(scores.detach().masked_fill(places.missing, 0.0) if places.padded else scores)
    if normalizer in SPARSE:
        weights = SPARSE[normalizer](scores)
        if best:
            complete = complete | (weights.detach() == 0).any(-1)
    order = _best_first(scores.detach(), rows)
    if is_hard(normalizer):
        blend = _choose(tables, Places(places.numbers.gather(-1, order[:, :1])), scan.dtype)
        if wanted:
            blend = straight_through(blend, _blend(weights, tables, places, scan.dtype))
    elif lean:
        blend = blend_at(weights, tables.values, places.numbers)
    else:
        blend = _blend(weights, tables, places, scan.dtype)
    rows = rows.gather(-1, order)
    weights, scores = weights.gather(-1, order), scores.gather(-1, order)
    if is_hard(normalizer):
        weights = straight_through(_one_hot_first(rows, weights.dtype), weights)
    mass = torch.where(complete, 1.0, torch.nan).to(lse.dtype).masked_fill(lse == -torch.inf, 0.0)
    return Read(blend, rows, weights, scores, lse, mass, normalizer=normalizer)


def _best_first(scores: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k) -> (M, k)
    """The order of candidates by score, the lowest row first among equals, padding last."""
    ordered, order = scores.sort(dim=-1, descending=True)
    tied = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > -torch.inf)
    if bool(tied.any()):
        by_row = rows.sort(dim=-1).indices
        order = by_row.gather(-1, scores.gather(-1, by_row).sort(dim=-1, descending=True, stable=True).indices)
    return order


def _blend(weights: Tensor, tables: Tables, places: Places, dtype: torch.dtype) -> Tensor:  # (M, k) -> (M, dv)
    """The weighted sum of the values at ``places``."""
    width = tables.values.shape[-1]
    if len(tables.values) == 0:
        values = weights.new_zeros(*weights.shape, width, dtype=dtype)
    else:
        values = tables.gather_values(places, dtype)
    return weighted_sum(weights, values)


def _choose(tables: Tables, places: Places, dtype: torch.dtype) -> Tensor:  # (M, k) -> (M, dv)
    """The value of each query's best row, 0 where there is none."""
    first = places.numbers[:, :1]
    if len(tables.values) == 0:
        return tables.values.new_zeros(len(first), tables.values.shape[-1], dtype=dtype)
    return gather_rows(tables.values.detach(), Places(first), dtype, sparse=False).squeeze(1)


def _one_hot_first(rows: Tensor, dtype: torch.dtype) -> Tensor:
    weights = torch.zeros_like(rows, dtype=dtype)
    weights[..., 0] = (rows[..., 0] >= 0).to(dtype)
    return weights


def answer_dtype(query: Tensor) -> torch.dtype:
    """The dtype that ``read.values`` comes in: the query's, or autocast's where it is on."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


# -- public ----------------------------------------------------------------------------------------------


def soft_read(
    query: Tensor,  # (*batch, B, d)
    keys: Tensor,  # (*batch, N, d)
    values: Tensor,  # (*batch, N, dv)
    *,
    metric: Metric = "scaled_dot",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # (*batch, B, N)
    k: int | None = None,
    normalizer: str = "softmax",
    generator: torch.Generator | None = None,
) -> Read:
    """Read in-graph keys and values exactly.

    Equal to::

        scores = query @ keys.mT / sqrt(d) / temperature          # for the metric "scaled_dot"
        values = softmax(scores.masked_fill(~mask, -inf)) @ values

    but no more than a few megabytes of the (B, N) scores and weights are held, forward or backward, a query that may
    see no row gets zeros instead of NaN, and the log-sum-exp comes with it. Gradients reach every floating-point input.
    There are no second derivatives: asking for one is a `SecondDerivativeError`. With a sparse normalizer, the rows
    with weight are held, for every query its own.

    `torch.func.vmap`, ``grad``, ``vjp`` and ``jacrev`` go through, nested as you like: vmap makes one read of all
    samples. Forward mode (``jvp``, ``jacfwd``, ``hessian``) and torch.export are a `TransformError`.

    Batch dimensions broadcast: tensors of a multi-head layer, (batch, heads, n, d), are read as they are, and so are
    keys that several heads share, (batch, 1, n, d).

    Args:
        query: What is looked for, (*batch, B, d), floating point.
        keys: What the rows advertise, (*batch, N, d).
        values: What the rows deliver, (*batch, N, dv).
        metric: "dot", "scaled_dot", "cosine" or "l2"; see `softdb.scoring.metrics`.
        temperature: Divides the scores: a number above 0, or a tensor broadcastable to (*batch, B).
        mask: Which query may see which row, bool, broadcastable to (*batch, B, N); True: may be seen. A row that no
            query may see takes no part, whatever it holds, NaN and infinity included.
        k: How many of the best rows to report in ``ids``, ``weights``, ``scores`` and ``mass``.
        normalizer: "softmax"; "straight_through": the best row's value forward, the blend's gradient backward;
            "gumbel": the same for scores with noise, so that a row is drawn by its weight, and ``scores`` and ``lse``
            are those with noise; "sparsemax" or "entmax15": weights that are 0 for all but some of the best rows, which
            are gathered. See `softdb.scoring.normalizers`.
        generator: What "gumbel" draws from; torch's own if None.

    Returns:
        A `Read` whose ids are row numbers.

    Raises:
        ShapeError, DtypeError, DeviceError, NonFiniteError, ArgumentError: An argument is not as above.
        TransformError: In forward mode, or where torch.export traces it; and for "gumbel" in a vmap whose
            ``randomness`` is "error".

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; computed as FlashAttention (arXiv 2205.14135).

    Example:
        >>> import torch
        >>> from softdb.functional import soft_read
        >>> heads = torch.randn(2, 4, 10, 8)                          # (batch, heads, n, d)
        >>> causal = torch.ones(10, 10, dtype=torch.bool).tril()
        >>> soft_read(heads, heads, heads, mask=causal).values.shape
        torch.Size([2, 4, 10, 8])
    """
    if torch.compiler.is_dynamo_compiling() or is_traced(query):
        options: dict[str, Any] = {"metric": metric, "k": k, "normalizer": normalizer, "generator": generator}
        return _soft_read_outside(query, keys, values, temperature=temperature, mask=mask, **options)
    if is_active():
        options = {"metric": metric, "k": k, "normalizer": normalizer, "generator": generator}
        # vmap may want another draw for each sample.
        if normalizer == "gumbel" or is_wrapped(query, keys, values, temperature, mask):
            return _soft_read_under_transform(query, keys, values, temperature, mask, options)
        with outside_of_transforms():
            return soft_read(query, keys, values, temperature=temperature, mask=mask, **options)
    if is_forward_mode():
        check_no_tangent(query, keys, values, temperature)
    batch, temperature = _check_operands(query, keys, values, metric, temperature, normalizer, generator)
    if k is not None:
        k = check_positive("k", k)
    if mask is not None:
        _check_mask(mask, (*batch, query.shape[-2], keys.shape[-2]), query.device)
    narrow = is_narrow(values, answer_dtype(query))
    with full_precision(query.device):
        dtype = compute_dtype(query, keys, values)
        centre = centre_of(query, metric)
        operand = prepare_query(query, metric, temperature, centre, dtype)
        fold = _Fold(batch, query.shape[-2], keys, values)
        selection = Selection(keys.shape[-2], mask=None if mask is None else fold.mask(mask))
        scan = Scan(metric, centre, selection, dtype, narrow=narrow, noise=noise_for(normalizer, generator))
        tables = Tables(fold.table(keys), fold.table(values), fold.groups)
        height = fold.shared_size * query.shape[-2]
        if not selection.shows_some_to_all:
            check_finite("query", query)  # else scores tell
        try:
            read = read_exactly(fold.queries(operand), tables, scan, k, normalizer)
        except NonFiniteError:
            check_finite("query", query)  # it may be their fault: say so
            check_finite("keys", keys if mask is None else hidden_keys_zeroed(tables.keys, scan, fold.groups, height))
            raise
    if not is_finite(read.values):
        check_finite("values", values)
    read = best_of(read, k)
    return finish(transform(read, fold.unfold) if batch else read, query)


def topk_read(
    query: Tensor,  # (*batch, B, d)
    keys: Tensor,  # (*batch, N, d)
    values: Tensor,  # (*batch, N, dv)
    candidates: Tensor,  # (*batch, B, k)
    *,
    metric: Metric = "scaled_dot",
    temperature: float | Tensor = 1.0,
    normalizer: str = "softmax",
    generator: torch.Generator | None = None,
) -> Read:
    """Read, for each query, only its own candidate rows.

    Equal to::

        scores = (query[..., None, :] * keys[candidates]).sum(-1) / sqrt(d) / temperature
        values = softmax(scores) @ values[candidates]

    whatever found the candidates; scores come from the keys given here. Gradients reach every floating-point input,
    twice differentiable, in reverse and in forward mode, and every transform of torch.func but ``functionalize`` goes
    through. Holds the gathered rows, (*batch, B, k, d) and (*batch, B, k, dv).

    Args:
        query: What is looked for, (*batch, B, d), floating point.
        keys: What the rows advertise, (*batch, N, d).
        values: What the rows deliver, (*batch, N, dv).
        candidates: Row numbers, (*batch, B, k) int64, each at most once per query; -1 is padding.
        metric: "dot", "scaled_dot", "cosine" or "l2".
        temperature: Divides the scores: a number above 0, or a tensor broadcastable to (*batch, B).
        normalizer: As for `soft_read`.
        generator: What "gumbel" draws from; torch's own if None.

    Returns:
        A `Read` over the candidates, best first. ``mass`` is 1 where every row is a candidate, else NaN: what the
        other rows hold is unknown.

    Raises:
        ShapeError, DtypeError, DeviceError, NonFiniteError, DuplicateIdError, ArgumentError: An argument is not as
            above.

    Example:
        >>> import torch
        >>> from softdb.functional import topk_read
        >>> keys = torch.eye(4)
        >>> read = topk_read(keys[:1], keys, torch.arange(4.)[:, None], torch.tensor([[2, 0, -1]]))
        >>> read.ids
        tensor([[ 0,  2, -1]])
    """
    if torch.compiler.is_dynamo_compiling() or is_traced(query):
        options: dict[str, Any] = {"metric": metric, "normalizer": normalizer, "generator": generator}
        return _topk_read_outside(query, keys, values, candidates, temperature=temperature, **options)
    if is_active() or is_forward_mode():
        options = {"metric": metric, "normalizer": normalizer, "generator": generator}
        tensors = query, keys, values, candidates, temperature
        if normalizer == "gumbel" or is_forward_mode() or is_wrapped(*tensors):
            return _topk_read_under_transform(query, keys, values, candidates, temperature, **options)
        with outside_of_transforms():
            return topk_read(query, keys, values, candidates, temperature=temperature, **options)
    batch, temperature = _check_operands(query, keys, values, metric, temperature, normalizer, generator)
    check_finite("query", query)
    candidates = _check_candidates(candidates, (*batch, query.shape[-2]), keys.shape[-2], query.device)
    with full_precision(query.device):
        dtype = compute_dtype(query, keys, values)
        centre = centre_of(query, metric)
        operand = prepare_query(query, metric, temperature, centre, dtype)
        fold = _Fold(batch, query.shape[-2], keys, values)
        noise = noise_for(normalizer, generator)
        scan = Scan(metric, centre, Selection(keys.shape[-2]), dtype, noise=noise)
        tables = Tables(fold.table(keys), fold.table(values), fold.groups)
        rows = fold.queries(candidates)
        complete = (rows >= 0).sum(-1) == keys.shape[-2]
        try:
            read = read_candidates(fold.queries(operand), tables, scan, rows, normalizer, complete=complete)
        except NonFiniteError:
            check_finite("keys", keys)  # it may be their fault: say so
            raise
    if not is_finite(read.values):
        check_finite("values", values)
    return finish(transform(read, fold.unfold) if batch else read, query)


UNTRACED = (
    "softdb: functional: expected to run outside of graphs of torch.compile and torch.export, since {name} checks the "
    "numbers in its arguments; export a module that reads a SoftKVStore, or leave out fullgraph=True"
)


def _refuse_tracing(function: Callable[..., Read]) -> Callable[..., Read]:
    """Have ``function`` run outside of graphs of torch.compile, and raise where torch.export traces it."""
    message = UNTRACED.format(name=function.__name__)

    @outside_of_graphs(message)
    def run(query: Tensor, *args: Any, **options: Any) -> Read:
        if is_traced(query):
            raise TransformError(message)
        return function(query, *args, **options)

    return run


_soft_read_outside, _topk_read_outside = _refuse_tracing(soft_read), _refuse_tracing(topk_read)


def merge(reads: Sequence[Read]) -> Read:
    """Join reads of disjoint sets of rows, for the same queries, into the read of all of them.

    Equal to the softmax over the union of the rows: with shares s_i = softmax over i of lse_i::

        values = sum_i s_i values_i,   lse = logsumexp_i lse_i

    so a read over a local, in-graph context and a read of a store make one read, and so do the reads of shards.
    Differentiable: gradients reach whatever each read's gradients reach.

    Args:
        reads: At least one `Read`, all with softmax weights and of one leading shape and value width. That their rows
            are disjoint is the caller's word.

    Returns:
        A `Read`. Where all reads carry ids, the merged one carries them all, best first; ids of different sources
        stand side by side, and telling them apart is the caller's part. Its ``mass`` counts what each read considered:
        NaN if one of them does not know its own. It has no ``error``, whatever theirs were.

    Raises:
        ArgumentError: No reads, or one whose weights are not a softmax's.
        ShapeError: Shapes differ.

    Example:
        >>> import torch
        >>> from softdb.functional import merge, soft_read
        >>> q, keys, values = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20, 2)
        >>> halves = [soft_read(q, keys[:9], values[:9]), soft_read(q, keys[9:], values[9:])]
        >>> torch.allclose(merge(halves).values, soft_read(q, keys, values).values, atol=1e-6)
        True
    """
    if isinstance(reads, Read):
        raise DtypeError("reads: expected a sequence of Read objects, got one Read; pass [first, second]")
    reads = list(reads)
    _check_mergeable(reads)
    dtype = compute_dtype(*[read.lse for read in reads], *[read.values for read in reads])
    with full_precision(reads[0].lse.device):
        shares, lse = softmax(torch.stack([read.lse.to(dtype) for read in reads], dim=-1))
        parts = torch.stack([read.values.to(dtype) for read in reads], dim=-1)  # (..., dv, reads)
        values = (parts * shares.unsqueeze(-2)).sum(-1).to(reads[0].values.dtype)
        masses = torch.stack([read.mass.to(dtype) for read in reads], dim=-1)
        scored = [read for read in reads if read.ids is not None]
        if len(scored) < len(reads):
            held = torch.where(masses > 0, masses.detach().ceil(), masses)
            mass = (shares.detach() * held).sum(-1).clamp(max=1.0)
            return Read(values, None, None, None, lse, mass)
        ids = torch.cat([read.ids for read in reads if read.ids is not None], dim=-1)
        scores = torch.cat([read.scores.to(dtype) for read in reads if read.scores is not None], dim=-1)
        weights = torch.cat(
            [
                read.weights.to(dtype) * shares[..., i : i + 1]
                for i, read in enumerate(reads)
                if read.weights is not None
            ],
            dim=-1,
        )
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
        total = (shares * masses).sum(-1)
        mass = straight_through(total.clamp(max=1.0), total)
        return Read(values, ids.gather(-1, order), weights.gather(-1, order), scores.gather(-1, order), lse, mass)


# -- under transforms of torch.func ----------------------------------------------------------------------


def answer_of(read: Read, leaves: Operands) -> Answer:
    """Return a read as `softdb.transforms` takes it."""
    members = {field.name: tensor for field in fields(Read) if isinstance(tensor := getattr(read, field.name), Tensor)}
    return Answer(members, read.normalizer, leaves)


def read_of(members: dict[str, Tensor], normalizer: str) -> Read:
    """Return the read that has these members."""
    named = {field.name: members.get(field.name) for field in fields(Read)}
    return Read(**named | {"normalizer": normalizer})  # type: ignore[arg-type]


def leaves_of(operands: Operands, wanted: Sequence[bool]) -> Operands:
    """Return the same tensors, those whose gradients are wanted as leaves of a graph."""
    return [
        value.detach().requires_grad_() if want and value is not None else value
        for value, want in zip(operands, wanted, strict=True)
    ]


def _soft_read_under_transform(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Read:
    """`soft_read` of tensors that a transform wraps."""
    check_normalizer(options["normalizer"], options["generator"])
    _check_tables(query, keys, values)
    if mask is not None and not isinstance(mask, Tensor):
        raise DtypeError(f"mask: expected a bool tensor, True where a row may be seen, got {describe(mask)}")
    divisor = temperature if isinstance(temperature, Tensor) else None

    def run(operands: Operands, wanted: list[bool]) -> Answer:
        leaves = leaves_of(operands, wanted)
        own_query, own_keys, own_values, own_divisor, own_mask, _ = leaves
        read = soft_read(
            cast(Tensor, own_query),
            cast(Tensor, own_keys),
            cast(Tensor, own_values),
            temperature=temperature if own_divisor is None else own_divisor,
            mask=own_mask,
            **options,
        )
        return answer_of(read, leaves)

    random = "queries" if options["normalizer"] == "gumbel" else ""
    operands = [query, keys, values, divisor, mask]
    return read_of(*read_opaquely(run, _fold_samples, operands, random=random, generator=options["generator"]))


def _fold_samples(operands: Operands, batched: list[bool], size: int) -> Operands:
    """Make a batch dimension of `soft_read` of the samples: batch dimensions broadcast, so it comes before all."""
    tables = zip(operands[:3], batched[:3], strict=True)
    count = max(cast(Tensor, table).dim() - 2 - has for table, has in tables)
    if not any(batched[:3]):
        query = cast(Tensor, operands[0])
        operands = [query.unsqueeze(0).expand(size, *query.shape), *operands[1:]]
        batched = [True, *batched[1:]]
    ranks = (count + 2, count + 2, count + 2, count + 1, count + 2, 0)
    return [
        value.reshape(size, *[1] * (rank + 1 - value.dim()), *value.shape[1:]) if has and value is not None else value
        for value, has, rank in zip(operands, batched, ranks, strict=True)
    ]


def _topk_read_under_transform(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    candidates: Tensor,
    temperature: float | Tensor,
    *,
    metric: Metric,
    normalizer: str,
    generator: torch.Generator | None,
) -> Read:
    """`topk_read` by operations that every transform goes through: none depends on numbers."""
    check_choice("metric", metric, METRICS)
    check_normalizer(normalizer, generator)
    batch = _check_tables(query, keys, values)
    height, count = query.shape[-2], keys.shape[-2]
    with outside_of_transforms():
        check_finite("query", samples_first(query))
        if isinstance(temperature, Tensor):
            numbers = samples_first(temperature)
            check_temperature(numbers, numbers.shape)
        if isinstance(candidates, Tensor):
            numbers = samples_first(candidates)
            _check_candidates(numbers, numbers.shape[:-1], count, query.device)
    temperature = _check_temperature_shape(temperature, (*batch, height), query.device)
    if candidates.dim() == 0 or not broadcasts(candidates.shape[:-1], (*batch, height)):
        _check_candidates(torch.zeros(candidates.shape, dtype=torch.int64), (*batch, height), 1, query.device)
    if normalizer == "gumbel":
        check_randomness()
    with full_precision(query.device):
        dtype = compute_dtype(query, keys, values)
        centre = centre_of(query, metric)
        operand = prepare_query(query, metric, temperature, centre, dtype)
        fold = _Fold(batch, height, keys, values)
        tables = Tables(fold.table(keys), fold.table(values), fold.groups)
        rows = fold.queries(candidates.to(torch.int64).expand(*batch, height, candidates.shape[-1]))  # (M, k)
        missing = rows < 0
        places = tables.place(rows).clamp(min=0)
        scan = Scan(metric, centre, Selection(count), dtype)
        scores = gathered_scores(fold.queries(operand), _gather_all(tables.keys, places, missing, dtype), scan)
        if normalizer == "gumbel":
            device = "cpu" if generator is None else generator.device
            noise = GumbelNoise(torch.randint(2**62, (), generator=generator, device=device).to(rows.device))
            numbers = query_numbers(range(len(rows) // max(1, fold.groups)), range(fold.groups), rows.device)
            scores = scores + noise.at(numbers.flatten().unsqueeze(-1), rows, dtype).squeeze(-2)
        finite = scores.masked_fill(missing, 0.0)
        with outside_of_transforms():
            check_scores(samples_first(finite))
        scores = scores.masked_fill(missing, -torch.inf)
        by_row = rows.sort(dim=-1).indices
        by_score = scores.detach().gather(-1, by_row).sort(dim=-1, descending=True, stable=True).indices
        order = by_row.gather(-1, by_score)
        rows, scores = rows.gather(-1, order), scores.gather(-1, order)
        places, missing = places.gather(-1, order), missing.gather(-1, order)
        weights, lse = softmax(scores)
        if normalizer in SPARSE:
            weights = SPARSE[normalizer](scores)
        gathered = _gather_all(tables.values, places, missing, dtype)  # (M, k, dv)
        blend = weighted_sum(weights, gathered)
        if is_hard(normalizer):
            blend = straight_through(gathered[:, 0], blend)
            first = torch.nn.functional.pad((~missing[:, :1]).to(dtype), (0, rows.shape[-1] - 1))
            weights = straight_through(first, weights)
        complete = (rows >= 0).sum(-1) == count
        mass = torch.where(complete, 1.0, torch.nan).to(dtype).masked_fill(lse == -torch.inf, 0.0)
        read = Read(blend, rows, weights, scores, lse, mass, normalizer=normalizer)
    with outside_of_transforms():
        if not is_finite(samples_first(read.values)):
            check_finite("values", samples_first(values))
    return finish(transform(read, fold.unfold) if batch else read, query)


def _gather_all(table: Tensor, places: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:  # -> (M, k, x)
    """Gather rows, 0 where they are missing."""
    if len(table) == 0:
        return table.new_zeros(*places.shape, table.shape[-1], dtype=dtype)
    rows = table.index_select(0, places.flatten()).reshape(*places.shape, table.shape[-1]).to(dtype)
    return rows.masked_fill(missing.unsqueeze(-1), 0.0)


def _check_temperature_shape(
    temperature: float | Tensor, shape: tuple[int, ...], device: torch.device
) -> float | Tensor:
    """Check a temperature whose numbers have been checked."""
    if not isinstance(temperature, Tensor):
        return check_temperature(temperature, shape, device)
    if not temperature.is_floating_point():
        return temperature.to(torch.float32)
    check_temperature(torch.ones(temperature.shape, dtype=temperature.dtype, device=temperature.device), shape, device)
    return temperature


# -- shapes ----------------------------------------------------------------------------------------------


class _Fold:
    """Batch dimensions brought to G groups of queries, each group with its own rows, and back.

    Batch dimensions along which all keys and values are shared become more queries of one group, so that shared rows
    are never copied.
    """

    def __init__(self, batch: tuple[int, ...], height: int, keys: Tensor, values: Tensor) -> None:
        self.batch, self.height = batch, height

        def size(table: Tensor, dimension: int) -> int:
            missing = len(batch) - (table.dim() - 2)
            return 1 if dimension < missing else table.shape[dimension - missing]

        dimensions = range(len(batch))
        self.own = [i for i in dimensions if size(keys, i) != 1 or size(values, i) != 1]
        self.shared = [i for i in dimensions if i not in self.own]
        self.groups = math.prod(batch[i] for i in self.own)
        self.shared_size = math.prod(batch[i] for i in self.shared)

    def queries(self, tensor: Tensor) -> Tensor:  # (*batch, B, x) -> (G S B, x)
        if not self.batch:
            return tensor
        count = len(self.batch)
        full = tensor.expand(*self.batch, *tensor.shape[-2:])
        full = full.permute(*self.own, *self.shared, count, count + 1)
        return full.reshape(self.groups * self.shared_size * tensor.shape[-2], tensor.shape[-1])

    def table(self, tensor: Tensor) -> Tensor:  # (*batch, N, x) -> (G N, x)
        if not self.batch:
            return tensor
        sizes = [self.batch[i] if i in self.own else 1 for i in range(len(self.batch))]
        return tensor.expand(*sizes, *tensor.shape[-2:]).reshape(self.groups * tensor.shape[-2], tensor.shape[-1])

    def mask(self, mask: Tensor) -> Tensor:  # broadcastable to (*batch, B, N) -> to (G, S B, N)
        count = len(self.batch)
        mask = mask.reshape(*[1] * (count + 2 - mask.dim()), *mask.shape)
        sizes = list(mask.shape)
        # Dimensions that become one have to be given whole if the mask differs along any of them.
        if any(sizes[i] != 1 for i in self.own):
            for i in self.own:
                sizes[i] = self.batch[i]
        if any(sizes[i] != 1 for i in (*self.shared, count)):
            sizes[count] = self.height
            for i in self.shared:
                sizes[i] = self.batch[i]
        groups = math.prod(sizes[i] for i in self.own)
        queries = math.prod(sizes[i] for i in (*self.shared, count))
        mask = mask.expand(sizes).permute(*self.own, *self.shared, count, count + 1)
        return mask.reshape(groups, queries, sizes[-1])

    def unfold(self, tensor: Tensor) -> Tensor:  # (G S B, *x) -> (*batch, B, *x)
        if not self.batch:
            return tensor
        rest = tensor.shape[1:]
        order = [*self.own, *self.shared]
        tensor = tensor.reshape(*[self.batch[i] for i in order], self.height, *rest)
        back = [order.index(i) for i in range(len(order))]
        return tensor.permute(*back, *range(len(order), tensor.dim()))


def finish(read: Read, query: Tensor) -> Read:
    """``read``, its values in the dtype they are answered in."""
    dtype = answer_dtype(query)
    return read if read.values.dtype == dtype else replace(read, values=read.values.to(dtype))


# -- checks ----------------------------------------------------------------------------------------------


def _check_operands(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    metric: str,
    temperature: float | Tensor,
    normalizer: str,
    generator: torch.Generator | None,
) -> tuple[tuple[int, ...], float | Tensor]:
    """Check the operands; return their batch shape, and the temperature as a float or a tensor."""
    note_openmp()
    check_choice("metric", metric, METRICS)
    check_normalizer(normalizer, generator)
    batch = _check_tables(query, keys, values)
    return batch, check_temperature(temperature, (*batch, query.shape[-2]), query.device)


def _check_tables(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Check everything but the numbers; return the batch shape."""
    check_float_tensor("query", query, (-1, None, None))
    check_float_tensor("keys", keys, (-1, None, query.shape[-1]), query.device)
    check_float_tensor("values", values, (-1, keys.shape[-2], None), query.device)
    if query.is_meta:
        raise DeviceError("query: expected a tensor that holds numbers, got one on meta, which holds none")
    if query.shape[-1] == 0:
        raise ShapeError("query: expected at least one number per query, got width 0")
    return _batch_shape(query, keys, values)


def _batch_shape(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    shapes = [tensor.shape[:-2] for tensor in (query, keys, values)]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ShapeError(
            "query, keys, values: expected leading dimensions that broadcast, got "
            + ", ".join(str(tuple(shape)) for shape in shapes)
        ) from None


def _check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise DtypeError(f"mask: expected a bool tensor, True where a row may be seen, got {describe(mask)}")
    if mask.device != device:
        raise DeviceError(f"mask: expected a tensor on {device}, got one on {mask.device}; move it with .to()")
    if not broadcasts(mask.shape, shape):
        raise ShapeError(f"mask: expected a shape broadcastable to {shape}, got {tuple(mask.shape)}")


def _check_candidates(candidates: Tensor, shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    if not isinstance(candidates, Tensor):
        raise DtypeError(f"candidates: expected an int64 tensor, got {describe(candidates)}")
    if candidates.device != device:
        raise DeviceError(f"candidates: expected a tensor on {device}, got one on {candidates.device}")
    ids = check_ids("candidates", candidates, repeats=True, padding=True)
    if ids.dim() == 0 or not broadcasts(ids.shape[:-1], shape):
        raise ShapeError(
            f"candidates: expected shape ({', '.join([*map(str, shape), 'k'])}), row numbers for each query, "
            f"got {tuple(candidates.shape)}"
        )
    if ids.shape[-1] == 0:
        raise ArgumentError("candidates: expected at least one column, got 0; use -1 for padding")
    if ids.numel() and int(ids.max()) >= count:
        raise ArgumentError(f"candidates: expected row numbers below {count}, got {int(ids.max())}")
    ordered = ids.sort(-1).values
    twice = ordered[..., 1:][(ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)]
    if len(twice):
        raise DuplicateIdError(
            f"candidates: expected each row at most once per query, got {list_ids(twice.unique())} more than once"
        )
    return ids.expand(*shape, -1).to(device)


def _check_mergeable(reads: list[Read]) -> None:
    if not reads:
        raise ArgumentError("reads: expected at least one Read, got none")
    for read in reads:
        if not isinstance(read, Read):
            raise DtypeError(f"reads: expected Read objects, got {describe(read)}")
        if read.normalizer != "softmax":
            raise ArgumentError(
                f"reads: expected reads with softmax weights, got one with {read.normalizer!r}; "
                "only a softmax can be put together from its parts"
            )
        if read.values.shape != reads[0].values.shape:
            raise ShapeError(
                "reads: expected values of one shape, "
                f"got {tuple(reads[0].values.shape)} and {tuple(read.values.shape)}"
            )
