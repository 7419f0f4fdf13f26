"""Pure functions of tensors: `soft_read`, `topk_read`, `merge`, `class_weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from softdb._checks import (
    check_choice,
    check_finite,
    check_float_tensor,
    check_ids,
    check_positive,
    check_temperature,
    describe,
    is_broadcastable,
    is_finite,
    list_ids,
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
from softdb.kernels.bias import ScoreBias
from softdb.kernels.gather import score_rows, weighted_sum
from softdb.kernels.hidden import zero_hidden_keys
from softdb.kernels.spec import ReadSpec, check_scores, disable_autocast, enumerate_queries
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import is_deferred
from softdb.processes import note_openmp
from softdb.reading.attention import check_causal_size, is_causal_mask, make_causal_mask, read_by_attention
from softdb.reading.batches import BatchFold
from softdb.reading.bias import check_mask, check_mask_type, split_mask
from softdb.reading.classes import class_weights
from softdb.reading.exact import read_exactly
from softdb.reading.result import (
    Read,
    answer_dtype,
    cast_values,
    keep_best,
    make_answer,
    make_leaves,
    make_read,
    merge,
    transform,
)
from softdb.reading.tables import Tables
from softdb.reading.topk import read_candidates
from softdb.scoring.gumbel import GumbelNoise, draw_noise
from softdb.scoring.metrics import METRICS, Metric, compute_center, compute_dtype, find_exact_divisor, prepare_query
from softdb.scoring.normalizers import (
    SPARSE_NORMALIZERS,
    check_normalizer,
    is_hard,
    is_random,
    is_sparse,
    softmax,
    straight_through,
)
from softdb.transforms import (
    Answer,
    Operands,
    check_no_tangent,
    check_randomness,
    disable_compile,
    is_active,
    is_forward_mode,
    is_traced,
    is_wrapped,
    move_samples_first,
    read_opaquely,
    suspend_transforms,
)

__all__ = ["Read", "class_weights", "merge", "soft_read", "topk_read"]


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
        values = softmax(scores.masked_fill(~mask, -inf)) @ values            # or softmax(scores + mask), if floating

    without allocating the (B, N) scores and weights: forward and backward hold a few megabytes of them at a time. A
    query that may see no row gets zeros instead of NaN. The result includes the log-sum-exp. Gradients reach every
    floating-point input. Second derivatives raise `SecondDerivativeError`. A sparse normalizer gathers the rows with
    weight above 0, separately for each query.

    On CUDA, the numbers are not checked, so as not to wait for the device: NaN in a query gives NaN for that query, and
    NaN in a visible row for all queries of its table. Softmax reads of several tables or with a mask run the kernels of
    `torch.nn.functional.scaled_dot_product_attention`, if they can compute them: metric "dot" or "scaled_dot", no
    ``k``, widths of at most 256, no float64, no gradient of the mask, no deterministic mode. Causal masks are fastest
    as `torch.nn.attention.bias.causal_upper_left`.

    `torch.func.vmap`, ``grad``, ``vjp`` and ``jacrev`` work and can be nested; under vmap, one read answers all
    samples. Forward mode (``jvp``, ``jacfwd``, ``hessian``) and torch.export raise `TransformError`.

    Batch dimensions broadcast: pass the tensors of a multi-head layer as (batch, heads, n, d), and keys that all heads
    share as (batch, 1, n, d). For grouped-query heads, as ``enable_gqa`` of
    `torch.nn.functional.scaled_dot_product_attention` has them, give the query one more dimension: (batch, kv_heads,
    group, n, d) and (batch, kv_heads, 1, n, d). The rows are not copied, and the queries of a group are read at once.

    Args:
        query: Queries, (*batch, B, d), floating point.
        keys: Keys of the rows, (*batch, N, d).
        values: Values of the rows, (*batch, N, dv).
        metric: "dot", "scaled_dot", "cosine" or "l2"; see `softdb.scoring.metrics`.
        temperature: Divisor of the scores: a number above 0, or a tensor broadcastable to (*batch, B).
        mask: Broadcastable to (*batch, B, N). Bool: True where a query may see a row. Floating point: numbers that are
            added to the scores after the division by the temperature, -inf where a query may not see a row; it gets a
            gradient, and is not supported with sparse normalizers. A row that no query may see has no effect, even if
            it holds NaN or infinity. A `torch.nn.attention.bias.CausalBias` of B queries and N rows is accepted, too.
        k: Number of best rows to report in ``ids``, ``weights``, ``scores`` and ``mass``.
        normalizer: Function from scores to weights; see `softdb.scoring.normalizers`:

            - "softmax".
            - "straight_through": forward returns the value of the best row; backward is that of softmax.
            - "gumbel": straight-through with Gumbel noise added to the scores, so that a row is drawn with its softmax
              probability. ``scores`` and ``lse`` include the noise.
            - A sparse normalizer, such as "sparsemax" or "entmax15": weights that are 0 except for some best rows.
        generator: Generator for the noise of "gumbel". If None, the default generator of torch.

    Returns:
        A `Read` whose ids are row numbers.

    Raises:
        ShapeError, DtypeError, DeviceError, NonFiniteError, ArgumentError: An argument is invalid. On a GPU, where
            a check of numbers would have to wait for the device, NaN or infinity gives NaN instead of NonFiniteError.
        TransformError: In forward mode; under torch.export; for "gumbel" in a vmap whose ``randomness`` is "error".

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1; computed as FlashAttention (arXiv 2205.14135).

    Example:
        >>> import torch
        >>> from softdb.functional import soft_read
        >>> heads = torch.randn(2, 4, 10, 8)                          # (batch, heads, n, d)
        >>> causal = torch.ones(10, 10, dtype=torch.bool).tril()
        >>> soft_read(heads, heads, heads, mask=causal).values.shape
        torch.Size([2, 4, 10, 8])
        >>> distance = -torch.arange(10.0).unsqueeze(1).sub(torch.arange(10.0)).abs()   # prefers rows that are near
        >>> soft_read(heads, heads, heads, mask=distance.masked_fill(~causal, -torch.inf)).values.shape
        torch.Size([2, 4, 10, 8])
        >>> query = torch.randn(2, 12, 10, 8)                         # 12 query heads, 4 heads of keys and values
        >>> grouped = query.unflatten(-3, (4, -1))                    # (2, 4, 3, 10, 8)
        >>> soft_read(grouped, heads.unsqueeze(-3), heads.unsqueeze(-3)).values.flatten(-4, -3).shape
        torch.Size([2, 12, 10, 8])
    """
    if torch.compiler.is_dynamo_compiling() or is_traced(query):
        options: dict[str, Any] = {"metric": metric, "k": k, "normalizer": normalizer, "generator": generator}
        return _soft_read_eagerly(query, keys, values, temperature=temperature, mask=mask, **options)
    if is_active():
        options = {"metric": metric, "k": k, "normalizer": normalizer, "generator": generator}
        # A random read must pass through vmap, because randomness="different" draws different noise for each sample.
        if is_random(normalizer) or is_wrapped(query, keys, values, temperature, mask):
            return _soft_read_under_transform(query, keys, values, temperature, mask, options)
        with suspend_transforms():
            return soft_read(query, keys, values, temperature=temperature, mask=mask, **options)
    if is_forward_mode():
        check_no_tangent(query, keys, values, temperature, mask)
    batch, temperature = _check_operands(query, keys, values, metric, temperature, normalizer, generator)
    if k is not None:
        k = check_positive("k", k)
    is_causal, checks = is_causal_mask(mask), not is_deferred(query)
    if is_causal:
        check_causal_size(mask, query, keys)
    elif mask is not None:
        check_mask(mask, normalizer, (*batch, query.shape[-2], keys.shape[-2]), query.device)
    if not checks and k is None and normalizer == "softmax":
        attended = read_by_attention(query, keys, values, batch, metric=metric, temperature=temperature, mask=mask)
        if attended is not None:
            return cast_values(attended, query)
    dtype = compute_dtype(query, keys, values)
    numbers, visible = split_mask(make_causal_mask(mask, query.device) if is_causal else mask, dtype)
    tiling = Tiling.for_device(query.device)
    output_dtype = answer_dtype(query)
    narrow = tiling.can_use_bf16_matmul(values, output_dtype)
    with disable_autocast(query.device):
        center = compute_center(query, metric)
        operand = prepare_query(query, metric, temperature, center, dtype)
        fold = BatchFold(batch, query.shape[-2], keys, values)
        selection = Selection(keys.shape[-2], mask=None if visible is None else fold.fold_mask(visible))
        if checks and (not selection.is_never_empty or is_random(normalizer)):
            check_finite("query", query)  # otherwise the check of the scores detects a query with NaN
        bias = None if numbers is None else ScoreBias(fold.fold_mask(numbers))
        noise = draw_noise(normalizer, generator)
        spec = ReadSpec(
            metric,
            center,
            selection,
            dtype,
            bf16_matmul=narrow,
            noise=noise,
            bias=bias,
            tiling=tiling,
            output_dtype=output_dtype,
            query_divisor=find_exact_divisor(query, keys, metric, temperature),
        )
        tables = Tables(fold.fold_table(keys), fold.fold_table(values), fold.groups)
        queries_per_group = fold.shared_size * query.shape[-2]
        try:
            read = read_exactly(fold.fold_queries(operand), tables, spec, k, normalizer)
        except NonFiniteError:
            check_finite("query", query)  # its message is more precise than that of the scores
            check_finite(
                "keys", keys if visible is None else zero_hidden_keys(tables.keys, spec, fold.groups, queries_per_group)
            )
            raise
    if checks and not is_finite(read.values):
        check_finite("values", values)
    read = keep_best(read, k)
    return cast_values(transform(read, fold.unfold) if batch else read, query)


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
    """Read only the candidate rows of each query.

    Equal to::

        scores = (query[..., None, :] * keys[candidates]).sum(-1) / sqrt(d) / temperature
        values = softmax(scores) @ values[candidates]

    The candidates may come from any search: scores are computed from ``keys``. Gradients reach every floating-point
    input and are twice differentiable, in reverse and in forward mode. Every transform of torch.func except
    ``functionalize`` works. The gathered rows are allocated: (*batch, B, k, d) and (*batch, B, k, dv).

    Args:
        query: Queries, (*batch, B, d), floating point.
        keys: Keys of the rows, (*batch, N, d).
        values: Values of the rows, (*batch, N, dv).
        candidates: Row numbers, (*batch, B, k) int64, each at most once per query; -1 is padding.
        metric: "dot", "scaled_dot", "cosine" or "l2".
        temperature: Divisor of the scores: a number above 0, or a tensor broadcastable to (*batch, B).
        normalizer: As for `soft_read`.
        generator: As for `soft_read`.

    Returns:
        A `Read` over the candidates, best first. ``mass`` is 1 where every row is a candidate. Otherwise it is NaN,
        since the scores of the other rows are unknown; for a query without candidates it is 0.

    Raises:
        ShapeError, DtypeError, DeviceError, NonFiniteError, DuplicateIdError, ArgumentError: An argument is invalid.

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
        return _topk_read_eagerly(query, keys, values, candidates, temperature=temperature, **options)
    if is_active() or is_forward_mode():
        options = {"metric": metric, "normalizer": normalizer, "generator": generator}
        tensors = query, keys, values, candidates, temperature
        if is_random(normalizer) or is_forward_mode() or is_wrapped(*tensors):
            return _topk_read_under_transform(query, keys, values, candidates, temperature, **options)
        with suspend_transforms():
            return topk_read(query, keys, values, candidates, temperature=temperature, **options)
    batch, temperature = _check_operands(query, keys, values, metric, temperature, normalizer, generator)
    check_finite("query", query)
    candidates = _check_candidates(candidates, (*batch, query.shape[-2]), keys.shape[-2], query.device)
    with disable_autocast(query.device):
        dtype = compute_dtype(query, keys, values)
        center = compute_center(query, metric)
        operand = prepare_query(query, metric, temperature, center, dtype)
        fold = BatchFold(batch, query.shape[-2], keys, values)
        noise = draw_noise(normalizer, generator)
        spec = ReadSpec(
            metric, center, Selection(keys.shape[-2]), dtype, noise=noise, tiling=Tiling.for_device(query.device)
        )
        tables = Tables(fold.fold_table(keys), fold.fold_table(values), fold.groups)
        rows = fold.fold_queries(candidates)
        complete = (rows >= 0).sum(-1) == keys.shape[-2]
        try:
            read = read_candidates(fold.fold_queries(operand), tables, spec, rows, normalizer, complete=complete)
        except NonFiniteError:
            check_finite("keys", keys)  # its message is more precise than that of the scores
            raise
    if not is_finite(read.values):
        check_finite("values", values)
    return cast_values(transform(read, fold.unfold) if batch else read, query)


TRACING_MESSAGE = (
    "softdb: functional: expected to run outside of graphs of torch.compile and torch.export, since {name} checks the "
    "elements of its arguments; export a module that reads a SoftKVStore, or leave out fullgraph=True"
)


def _run_eagerly(function: Callable[..., Read]) -> Callable[..., Read]:
    """Wrap ``function`` to break graphs of torch.compile.

    The wrapper raises `TransformError` where torch.export traces it.
    """
    message = TRACING_MESSAGE.format(name=function.__name__)

    @disable_compile(message)
    def run(query: Tensor, *args: Any, **options: Any) -> Read:
        if is_traced(query):
            raise TransformError(message)
        return function(query, *args, **options)

    return run


_soft_read_eagerly, _topk_read_eagerly = _run_eagerly(soft_read), _run_eagerly(topk_read)


def _soft_read_under_transform(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Read:
    """Run `soft_read` on tensors that a transform of torch.func wraps."""
    check_normalizer(options["normalizer"], options["generator"])
    _check_tables(query, keys, values)
    if is_causal_mask(mask):
        check_causal_size(mask, query, keys)
        mask = make_causal_mask(mask, query.device)
    elif mask is not None:
        check_mask_type(mask, options["normalizer"])
    divisor = temperature if isinstance(temperature, Tensor) else None

    def run(operands: Operands, needs_grad: list[bool]) -> Answer:
        leaves = make_leaves(operands, needs_grad)
        query_leaf, keys_leaf, values_leaf, divisor_leaf, mask_leaf, _ = leaves
        read = soft_read(
            cast(Tensor, query_leaf),
            cast(Tensor, keys_leaf),
            cast(Tensor, values_leaf),
            temperature=temperature if divisor_leaf is None else divisor_leaf,
            mask=mask_leaf,
            **options,
        )
        return make_answer(read, leaves)

    random = "queries" if is_random(options["normalizer"]) else ""
    operands = [query, keys, values, divisor, mask]
    return make_read(*read_opaquely(run, _fold_samples, operands, random=random, generator=options["generator"]))


def _fold_samples(operands: Operands, batched: list[bool], size: int) -> Operands:
    """Fold the samples of a vmap into a batch dimension of `soft_read`.

    The batch dimensions of the arguments broadcast, so the new dimension comes before all others.
    """
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
    """Run `topk_read` with operations that every transform of torch.func supports.

    Apart from the checks of arguments, no Python code depends on the elements of a tensor.
    """
    check_choice("metric", metric, METRICS)
    check_normalizer(normalizer, generator)
    batch = _check_tables(query, keys, values)
    query_count, count = query.shape[-2], keys.shape[-2]
    with suspend_transforms():
        check_finite("query", move_samples_first(query))
        if isinstance(temperature, Tensor):
            numbers = move_samples_first(temperature)
            check_temperature(numbers, numbers.shape)
        if isinstance(candidates, Tensor):
            numbers = move_samples_first(candidates)
            _check_candidates(numbers, numbers.shape[:-1], count, query.device)
    temperature = _check_temperature_shape(temperature, (*batch, query_count), query.device)
    if candidates.dim() == 0 or not is_broadcastable(candidates.shape[:-1], (*batch, query_count)):
        _check_candidates(torch.zeros(candidates.shape, dtype=torch.int64), (*batch, query_count), 1, query.device)
    if is_random(normalizer):
        check_randomness()
    with disable_autocast(query.device):
        dtype = compute_dtype(query, keys, values)
        center = compute_center(query, metric)
        operand = prepare_query(query, metric, temperature, center, dtype)
        fold = BatchFold(batch, query_count, keys, values)
        tables = Tables(fold.fold_table(keys), fold.fold_table(values), fold.groups)
        rows = fold.fold_queries(candidates.to(torch.int64).expand(*batch, query_count, candidates.shape[-1]))  # (M, k)
        missing = rows < 0
        places = tables.place(rows).clamp(min=0)
        spec = ReadSpec(metric, center, Selection(count), dtype, tiling=Tiling.for_device(query.device))
        scores = score_rows(fold.fold_queries(operand), _gather_all(tables.keys, places, missing, dtype), spec)
        if is_random(normalizer):
            device = "cpu" if generator is None else generator.device
            noise = GumbelNoise(torch.randint(2**62, (), generator=generator, device=device).to(rows.device))
            numbers = enumerate_queries(range(len(rows) // max(1, fold.groups)), range(fold.groups), rows.device)
            scores = scores + noise.at(numbers.flatten().unsqueeze(-1), rows, dtype).squeeze(-2)
        finite = scores.masked_fill(missing, 0.0)
        with suspend_transforms():
            check_scores(move_samples_first(finite))
        scores = scores.masked_fill(missing, -torch.inf)
        by_row = rows.sort(dim=-1).indices
        by_score = scores.detach().gather(-1, by_row).sort(dim=-1, descending=True, stable=True).indices
        order = by_row.gather(-1, by_score)
        rows, scores = rows.gather(-1, order), scores.gather(-1, order)
        places, missing = places.gather(-1, order), missing.gather(-1, order)
        weights, lse = softmax(scores)
        if is_sparse(normalizer):
            weights = SPARSE_NORMALIZERS[normalizer](scores)
        gathered = _gather_all(tables.values, places, missing, dtype)  # (M, k, dv)
        blend = weighted_sum(weights, gathered)
        if is_hard(normalizer):
            blend = straight_through(gathered[:, 0], blend)
            first = torch.nn.functional.pad((~missing[:, :1]).to(dtype), (0, rows.shape[-1] - 1))
            weights = straight_through(first, weights)
        complete = (rows >= 0).sum(-1) == count
        mass = torch.where(complete, 1.0, torch.nan).to(dtype).masked_fill(lse == -torch.inf, 0.0)
        read = Read(blend, rows, weights, scores, lse, mass, normalizer=normalizer)
    with suspend_transforms():
        if not is_finite(move_samples_first(read.values)):
            check_finite("values", move_samples_first(values))
    return cast_values(transform(read, fold.unfold) if batch else read, query)


def _gather_all(table: Tensor, places: Tensor, missing: Tensor, dtype: torch.dtype) -> Tensor:  # -> (M, k, x)
    """Gather rows; zeros where they are missing."""
    if len(table) == 0:
        return table.new_zeros(*places.shape, table.shape[-1], dtype=dtype)
    rows = table.index_select(0, places.flatten()).reshape(*places.shape, table.shape[-1]).to(dtype)
    return rows.masked_fill(missing.unsqueeze(-1), 0.0)


def _check_temperature_shape(
    temperature: float | Tensor, shape: tuple[int, ...], device: torch.device
) -> float | Tensor:
    """Check type, shape and device of a temperature whose elements were checked."""
    if not isinstance(temperature, Tensor):
        return check_temperature(temperature, shape, device)
    if not temperature.is_floating_point():
        return temperature.to(torch.float32)
    check_temperature(torch.ones(temperature.shape, dtype=temperature.dtype, device=temperature.device), shape, device)
    return temperature


def _check_operands(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    metric: str,
    temperature: float | Tensor,
    normalizer: str,
    generator: torch.Generator | None,
) -> tuple[tuple[int, ...], float | Tensor]:
    """Check the operands.

    Returns:
        Their batch shape, and the temperature as a float or a tensor.
    """
    note_openmp()
    check_choice("metric", metric, METRICS)
    check_normalizer(normalizer, generator)
    batch = _check_tables(query, keys, values)
    return batch, check_temperature(temperature, (*batch, query.shape[-2]), query.device)


def _check_tables(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Check dtypes, shapes and devices, but not elements; return the batch shape."""
    check_float_tensor("query", query, (-1, None, None))
    check_float_tensor("keys", keys, (-1, None, query.shape[-1]), query.device)
    check_float_tensor("values", values, (-1, keys.shape[-2], None), query.device)
    if query.is_meta:
        raise DeviceError("query: expected a tensor with data, got one on the meta device; pass one with data")
    if query.shape[-1] == 0:
        raise ShapeError("query: expected a width of at least 1, got 0; pass queries of shape (..., d)")
    return _broadcast_batch(query, keys, values)


def _broadcast_batch(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Broadcast the leading dimensions of the operands."""
    shapes = [tensor.shape[:-2] for tensor in (query, keys, values)]
    if shapes[0] == shapes[1] == shapes[2]:
        return tuple(shapes[0])  # torch.broadcast_shapes imports sympy, which takes a second
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ShapeError(
            "query, keys, values: expected leading dimensions that broadcast, got "
            + ", ".join(str(tuple(shape)) for shape in shapes)
        ) from None


def _check_candidates(candidates: Tensor, shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    if not isinstance(candidates, Tensor):
        raise DtypeError(f"candidates: expected an int64 tensor, got {describe(candidates)}")
    if candidates.device != device:
        raise DeviceError(
            f"candidates: expected a tensor on {device}, got one on {candidates.device}; move it with .to()"
        )
    ids = check_ids("candidates", candidates, repeats=True, padding=True)
    if ids.dim() == 0 or not is_broadcastable(ids.shape[:-1], shape):
        raise ShapeError(
            f"candidates: expected shape ({', '.join([*map(str, shape), 'k'])}), row numbers for each query, "
            f"got {tuple(candidates.shape)}"
        )
    if ids.shape[-1] == 0:
        raise ArgumentError("candidates: expected at least one column, got 0; use -1 for padding")
    if ids.numel() and int(ids.max()) >= count:
        raise ArgumentError(f"candidates: expected row numbers below {count}, got {int(ids.max())}")
    ordered = ids.sort(-1).values
    repeated = ordered[..., 1:][(ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)]
    if len(repeated):
        raise DuplicateIdError(
            f"candidates: expected each row at most once per query, got {list_ids(repeated.unique())} more than once"
        )
    return ids.expand(*shape, -1).to(device)
