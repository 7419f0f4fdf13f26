"""Exact reads, over all visible rows."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from softdb._checks import is_finite
from softdb.errors import ArgumentError
from softdb.kernels.backend import backend_for
from softdb.kernels.gather import GatherIndex, score_rows
from softdb.kernels.hidden import propagate_nan, replace_nonfinite, separate_nonfinite_values, zero_hidden_keys
from softdb.kernels.spec import BestRows, ReadSpec
from softdb.pending_checks import is_deferred
from softdb.reading.result import Read, compute_mass
from softdb.reading.tables import Tables, gather_best_value, one_hot_first
from softdb.reading.topk import read_candidates
from softdb.scoring.normalizers import SPARSE_NORMALIZERS, is_hard, is_sparse, straight_through

__all__ = ["read_exactly"]

# A sparse normalizer gives weight to an unknown number of rows. The first search finds this number of best rows. While
# all rows found have weight, the number is multiplied by the growth factor.
FIRST_SUPPORT_ROWS, SUPPORT_ROWS_GROWTH = 32, 8


def read_exactly(query: Tensor, tables: Tables, spec: ReadSpec, k: int | None, normalizer: str) -> Read:
    """Read all visible rows for prepared queries, in ``spec.dtype``.

    Without ``k``, a read with a sparse or hard normalizer still reports the rows with weight, without gradients. The
    caller counts these rows and then drops them with `keep_best`.

    Args:
        query: Prepared queries, (M, w).
        tables: Keys and values.
        spec: Metric, filters, dtype, bias and noise. A sparse normalizer supports no bias.
        k: Number of best rows to report; None for none.
        normalizer: Name of the normalizer.
    """
    selection, groups = spec.selection, tables.groups
    height = len(query) // max(1, groups)
    # On a GPU, the kernels load the rows that a shared selection hides as zeros.
    repairs = selection.has_hidden_rows and not (is_deferred(query) and selection.is_shared)
    if repairs and torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad):
        tables = replace(tables, keys=zero_hidden_keys(tables.keys, spec, groups, height))
    if is_sparse(normalizer):
        return _read_support(query, tables, spec, k, normalizer)
    hard, exact_read = is_hard(normalizer), backend_for(query).exact_read
    values, lse, best = exact_read(query, tables.keys, tables.values, spec, groups, k or int(hard))
    if repairs and not is_finite(values):
        repaired = separate_nonfinite_values(tables.values, selection, groups, height)
        if repaired is not None:
            values, lse, best = exact_read(query, tables.keys, repaired[0], spec, groups, k or int(hard))
            values = propagate_nan(values, repaired[1])
    mass = torch.ones_like(lse) if spec.selection.is_never_empty else (lse > -torch.inf).to(lse.dtype)
    if best is None:
        return Read(values, None, None, None, lse, mass)
    scores, weights, rows = best
    places = GatherIndex(tables.place(rows))
    if hard:
        values = straight_through(gather_best_value(tables, places, spec.dtype), values)
    if k is None:
        return Read(values, rows, one_hot_first(rows, weights.dtype), scores, lse, mass, normalizer=normalizer)
    bias = None if spec.bias is None else spec.bias.numbers
    has_graph = query.requires_grad or tables.keys.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and has_graph and len(tables.keys):
        # Recompute the scores with a graph, only for their gradients. The reported scores are those of the kernel,
        # which are consistent with its log-sum-exp. The noise is left out, since it has no gradient.
        recomputed = score_rows(query, tables.gather_keys(places, spec.dtype), spec)
        if spec.bias is not None:
            recomputed = recomputed + spec.bias.at(rows, groups)
        scores = straight_through(scores, recomputed.masked_fill(places.is_padding, -torch.inf))
        exponents = scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
        weights = straight_through(weights, exponents.exp())
    mass = compute_mass(weights)
    if hard:
        weights = straight_through(one_hot_first(rows, weights.dtype), weights)
    return Read(values, rows, weights, scores, lse, mass, normalizer=normalizer)


def _read_support(query: Tensor, tables: Tables, spec: ReadSpec, k: int | None, normalizer: str) -> Read:
    """Read exactly with a sparse normalizer.

    Find the rows with weight first, then gather them.
    """
    count = spec.selection.count
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, tables.keys, tables.values))
    width = tables.keys.shape[-1] + tables.values.shape[-1] if needs_grad else 1
    max_support = spec.tiling.max_sparse_elements // max(1, len(query) * width)
    searched = max(k or 1, min(FIRST_SUPPORT_ROWS, count))
    lse, scores, rows = _find_best_rows(query, tables, spec, searched)
    while True:
        support = int((SPARSE_NORMALIZERS[normalizer](scores) > 0).sum(-1).max()) if len(query) else 0
        if support > max_support:
            raise ArgumentError(
                f"normalizer: expected {normalizer!r} to gather at most {spec.tiling.max_sparse_elements:,} numbers, "
                f"got {len(query):,} queries with at least {support:,} rows of {width:,} numbers; lower the "
                "temperature, or read fewer queries at once"
            )
        # Rows that were not found score at most as high as the last row found. If that row has weight 0, so have they.
        if support < searched or searched >= count:
            break
        searched = min(SUPPORT_ROWS_GROWTH * searched, count, max_support + 1)
        with torch.no_grad():
            _, scores, rows = _find_best_rows(query, tables, spec, searched)
    rows = rows[:, : max(k or 1, support)]
    complete = torch.ones(len(query), dtype=torch.bool, device=query.device)
    tables = replace(tables, sparse=False)  # exact reads have dense gradients
    read = read_candidates(query, tables, spec, rows, normalizer, complete=complete)
    if spec.selection.has_hidden_rows and needs_grad and not is_finite(read.values):
        # The gradient of a key sums over queries. Queries that see no NaN or infinity must contribute finite numbers.
        invalid, tables = ~read.values.detach().isfinite(), replace(tables, values=replace_nonfinite(tables.values))
        read = read_candidates(query, tables, spec, rows, normalizer, complete=complete)
        read = replace(read, values=propagate_nan(read.values, invalid))
    ids, weights, scores = cast(Tensor, read.ids), cast(Tensor, read.weights), cast(Tensor, read.scores)
    if k is None:
        ids = ids.masked_fill(weights == 0, -1)
        return replace(read, ids=ids, weights=weights.detach(), scores=scores.detach(), lse=lse)
    ids, weights, scores = ids[:, :k], weights[:, :k], scores[:, :k]
    return Read(read.values, ids, weights, scores, lse, compute_mass(weights), normalizer=normalizer)


def _find_best_rows(query: Tensor, tables: Tables, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log-sum-exp over all rows; find the k best scores and rows."""
    _, lse, best = backend_for(query).exact_read(
        query, tables.keys, tables.values.detach()[:, :0], spec, tables.groups, k
    )
    scores, _, rows = cast(BestRows, best)
    return lse, scores, rows
