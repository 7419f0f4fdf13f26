"""Top-k reads, over candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.kernels.backend import backend_for
from softdb.kernels.gather import GatherIndex, score_rows, weighted_sum
from softdb.kernels.spec import ReadSpec, check_scores, enumerate_queries
from softdb.pending_checks import is_deferred
from softdb.reading.result import Read
from softdb.reading.tables import Tables, gather_best_value, one_hot_first
from softdb.scoring.normalizers import SPARSE_NORMALIZERS, is_hard, is_sparse, softmax, straight_through

__all__ = ["read_candidates"]


def read_candidates(
    query: Tensor,
    tables: Tables,
    spec: ReadSpec,
    rows: Tensor,
    normalizer: str,
    *,
    complete: Tensor,
    best: bool = False,
    is_full: bool = False,
) -> Read:
    """Read candidates for prepared queries, in ``spec.dtype``.

    Args:
        query: Prepared queries, (M, w).
        tables: Keys and values.
        spec: Metric, filters, dtype, bias and noise.
        rows: Candidates, (M, k); -1 is padding.
        normalizer: Name of the normalizer.
        complete: Whether the candidates are known to be all visible rows, (M,) bool.
        best: Whether the candidates are known to be the k best rows. If one of them then has weight 0 under a sparse
            normalizer, they include all rows with weight.
        is_full: Whether the candidates are known to have no padding.
    """
    places = GatherIndex(tables.place(rows), is_full=is_full)
    bias = None if spec.bias is None or len(tables.keys) == 0 else spec.bias.at(rows, tables.groups)
    sources = query, tables.keys, tables.values, bias
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)
    has_values = tables.values.dtype == spec.dtype and tables.values.shape[-1] > 0
    lean = not needs_grad and not places.has_padding and has_values
    if len(tables.keys) == 0:
        zeros = 0.0 * query.sum(-1, keepdim=True) + tables.zero(spec.dtype)  # connects the result to the graph
        zeros = zeros if spec.bias is None else zeros + spec.bias.numbers.sum() * 0.0
        scores = zeros.to(spec.dtype).expand(rows.shape).masked_fill(places.is_padding, -torch.inf)
    elif needs_grad:
        scores = score_rows(query, tables.gather_keys(places, spec.dtype), spec)
        scores = scores if bias is None else scores + bias
        scores = scores.masked_fill(places.is_padding, -torch.inf) if places.has_padding else scores
    else:
        scores = backend_for(query).score_at(query, tables.keys, places.index, spec)
        scores = scores if bias is None else scores + bias
    if spec.noise is not None:
        numbers = enumerate_queries(range(len(rows) // tables.groups), range(tables.groups), rows.device)
        scores = scores + spec.noise.at(numbers.flatten().unsqueeze(-1), rows, spec.dtype).squeeze(-2)
    weights, lse = softmax(scores)
    known = scores.detach().masked_fill(places.is_padding, 0.0) if places.has_padding else scores
    check_scores(known, spec.pending_checks)
    if is_sparse(normalizer):
        weights = SPARSE_NORMALIZERS[normalizer](scores)
        if best:
            complete = complete | (weights.detach() == 0).any(-1)
    order = _sort_best_first(scores.detach(), rows)
    if is_hard(normalizer):
        first = GatherIndex(places.index.gather(-1, order[:, :1]), is_full=is_full)
        blend = gather_best_value(tables, first, spec.dtype)
        if needs_grad:
            blend = straight_through(blend, _blend(weights, tables, places, spec.dtype))
    elif lean:
        blend = backend_for(weights).blend_at(weights, tables.values, places.index)
    else:
        blend = _blend(weights, tables, places, spec.dtype)
    rows = rows.gather(-1, order)
    weights, scores = weights.gather(-1, order), scores.gather(-1, order)
    if is_hard(normalizer):
        weights = straight_through(one_hot_first(rows, weights.dtype), weights)
    mass = torch.where(complete, 1.0, torch.nan).to(lse.dtype).masked_fill(lse == -torch.inf, 0.0)
    return Read(blend, rows, weights, scores, lse, mass, normalizer=normalizer)


def _sort_best_first(scores: Tensor, rows: Tensor) -> Tensor:  # (M, k), (M, k) -> (M, k)
    """Sort candidates by score; ties go to the lowest row, padding comes last."""
    is_tied, order = True, rows  # On a GPU, the host does not wait to find out whether scores tie.
    if not is_deferred(scores):
        ordered, order = scores.sort(dim=-1, descending=True)
        is_tied = bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > -torch.inf)).any())
    if is_tied:
        by_row = rows.sort(dim=-1).indices
        order = by_row.gather(-1, scores.gather(-1, by_row).sort(dim=-1, descending=True, stable=True).indices)
    return order


def _blend(weights: Tensor, tables: Tables, places: GatherIndex, dtype: torch.dtype) -> Tensor:  # (M, k) -> (M, dv)
    """Compute the weighted sum of the values at places."""
    width = tables.values.shape[-1]
    if len(tables.values) == 0:
        values = tables.zero(dtype).expand(*weights.shape, width)
    else:
        values = tables.gather_values(places, dtype)
    return weighted_sum(weights, values)
