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
    backend, sparse_weights = backend_for(query), is_sparse(normalizer)
    offsets = _list_offsets(tables, spec, rows)
    sources = query, tables.keys, tables.values, *offsets
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources)
    read = None
    if backend.read_at is not None and len(tables.keys) and not sparse_weights:
        offset = sum(offsets[1:], offsets[0]) if offsets else None
        read = backend.read_at(query, tables.keys, tables.values, places, spec, offset, sparse=tables.sparse)
    if read is None:
        scores = _score(query, tables, places, spec, offsets, needs_grad=needs_grad)
        weights, lse = softmax(scores)
    else:
        scores, weights, lse, _ = read
    known = scores.detach().masked_fill(places.is_padding, 0.0) if places.has_padding else scores
    check_scores(known, spec.pending_checks)
    if sparse_weights:
        weights = SPARSE_NORMALIZERS[normalizer](scores)
        if best:
            complete = complete | (weights.detach() == 0).any(-1)
    order = _sort_best_first(scores.detach(), rows)
    if is_hard(normalizer):
        first = GatherIndex(places.index.gather(-1, order[:, :1]), is_full=is_full)
        blend = gather_best_value(tables, first, spec.dtype)
        if needs_grad:
            soft = _blend(weights, tables, places, spec.dtype) if read is None else read.values
            blend = straight_through(blend, soft)
    elif read is not None:
        blend = read.values
    elif needs_grad or places.has_padding or tables.values.dtype != spec.dtype or tables.values.shape[-1] == 0:
        blend = _blend(weights, tables, places, spec.dtype)
    else:
        blend = backend.blend_at(weights, tables.values, places.index)
    rows = rows.gather(-1, order)
    weights, scores = weights.gather(-1, order), scores.gather(-1, order)
    if is_hard(normalizer):
        weights = straight_through(one_hot_first(rows, weights.dtype), weights)
    mass = torch.where(complete, 1.0, torch.nan).to(lse.dtype).masked_fill(lse == -torch.inf, 0.0)
    return Read(blend, rows, weights, scores, lse, mass, normalizer=normalizer)


def _list_offsets(tables: Tables, spec: ReadSpec, rows: Tensor) -> list[Tensor]:  # (M, k) each
    """Return the bias and the noise of the scores, where there are any."""
    offsets = []
    if spec.bias is not None and len(tables.keys):
        offsets.append(spec.bias.at(rows, tables.groups))
    if spec.noise is not None:
        numbers = enumerate_queries(range(len(rows) // tables.groups), range(tables.groups), rows.device)
        offsets.append(spec.noise.at(numbers.flatten().unsqueeze(-1), rows, spec.dtype).squeeze(-2))
    return offsets


def _score(
    query: Tensor, tables: Tables, places: GatherIndex, spec: ReadSpec, offsets: list[Tensor], *, needs_grad: bool
) -> Tensor:  # (M, k)
    """Score the rows at places; -inf at padding."""
    if len(tables.keys) == 0:
        zeros = 0.0 * query.sum(-1, keepdim=True) + tables.zero(spec.dtype)  # connects the result to the graph
        zeros = zeros if spec.bias is None else zeros + spec.bias.numbers.sum() * 0.0
        scores = zeros.to(spec.dtype).expand(places.index.shape)
    elif needs_grad:
        scores = score_rows(query, tables.gather_keys(places, spec.dtype), spec)
    else:
        scores = backend_for(query).score_at(query, tables.keys, places.index, spec)
    for offset in offsets:
        scores = scores + offset
    return scores.masked_fill(places.is_padding, -torch.inf) if places.has_padding else scores


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
