"""Exact reads: over every row that may be seen."""

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
from softdb.reading.result import Read, share_of
from softdb.reading.tables import Tables, choose, one_hot_first
from softdb.reading.topk import read_candidates
from softdb.scoring.normalizers import SPARSE_NORMALIZERS, is_hard, is_sparse, straight_through

__all__ = ["read_exactly"]

# How many of the best rows are looked at for those that a sparse normalizer gives weight, and how many times as many
# where that was not enough.
FIRST_REACH, FURTHER = 32, 8


def read_exactly(query: Tensor, tables: Tables, spec: ReadSpec, k: int | None, normalizer: str) -> Read:
    """An exact read of prepared queries (M, w); everything in ``spec.dtype``.

    Without ``k`` it reports the rows that a sparse or hard normalizer gives weight all the same, without gradients:
    whoever has counted them drops them by `best_of`.
    """
    selection, groups = spec.selection, tables.groups
    height = len(query) // max(1, groups)
    if selection.hides_some and torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad):
        tables = replace(tables, keys=hidden_keys_zeroed(tables.keys, spec, groups, height))
    if is_sparse(normalizer):
        return _read_support(query, tables, spec, k, normalizer)
    hard, exact_read = is_hard(normalizer), backend_for(query).exact_read
    values, lse, best = exact_read(query, tables.keys, tables.values, spec, groups, k or int(hard))
    if selection.hides_some and not is_finite(values):
        mended = separate_nonfinite_values(tables.values, selection, groups, height)
        if mended is not None:
            values, lse, best = exact_read(query, tables.keys, mended[0], spec, groups, k or int(hard))
            values = propagate_nan(values, mended[1])
    mass = torch.ones_like(lse) if spec.selection.shows_some_to_all else (lse > -torch.inf).to(lse.dtype)
    if best is None:
        return Read(values, None, None, None, lse, mass)
    scores, weights, rows = best
    places = GatherIndex(tables.place(rows))
    if hard:
        values = straight_through(choose(tables, places, spec.dtype), values)
    if k is None:
        return Read(values, rows, one_hot_first(rows, weights.dtype), scores, lse, mass, normalizer=normalizer)
    if torch.is_grad_enabled() and (query.requires_grad or tables.keys.requires_grad) and len(tables.keys):
        # Once more with a graph; forward, the kernel's own numbers stand, since they agree with its log-sum-exp.
        again = score_rows(query, tables.gather_keys(places, spec.dtype), spec)  # noise has no gradient
        scores = straight_through(scores, again.masked_fill(places.is_padding, -torch.inf))
        exponents = scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
        weights = straight_through(weights, exponents.exp())
    mass = share_of(weights)
    if hard:
        weights = straight_through(one_hot_first(rows, weights.dtype), weights)
    return Read(values, rows, weights, scores, lse, mass, normalizer=normalizer)


def _read_support(query: Tensor, tables: Tables, spec: ReadSpec, k: int | None, normalizer: str) -> Read:
    """An exact read that gives weight to some of the best rows only: they are found first, and then gathered."""
    count = spec.selection.count
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, tables.keys, tables.values))
    width = tables.keys.shape[-1] + tables.values.shape[-1] if wanted else 1
    most = spec.tiling.max_sparse_elements // max(1, len(query) * width)
    reach = max(k or 1, min(FIRST_REACH, count))
    lse, scores, rows = _best_rows(query, tables, spec, reach)
    while True:
        support = int((SPARSE_NORMALIZERS[normalizer](scores) > 0).sum(-1).max()) if len(query) else 0
        if support > most:
            raise ArgumentError(
                f"normalizer: expected {normalizer!r} to give weight to no more rows than can be gathered, "
                f"{spec.tiling.max_sparse_elements:,} numbers in all, "
                f"got {len(query):,} queries with at least {support:,} "
                f"rows of {width:,} numbers; lower the temperature, or read fewer queries at once"
            )
        # No row that was not found scores better than the last that was: if that has no weight, they have none.
        if support < reach or reach >= count:
            break
        reach = min(FURTHER * reach, count, most + 1)
        with torch.no_grad():
            _, scores, rows = _best_rows(query, tables, spec, reach)
    rows = rows[:, : max(k or 1, support)]
    everything = torch.ones(len(query), dtype=torch.bool, device=query.device)
    tables = replace(tables, sparse=False)  # as of every exact read, gradients of the rows are dense
    read = read_candidates(query, tables, spec, rows, normalizer, complete=everything)
    if spec.selection.hides_some and wanted and not is_finite(read.values):
        # Gradients of the keys are sums over queries, of which those that see no such value give theirs as ever.
        wrong, tables = ~read.values.detach().isfinite(), replace(tables, values=replace_nonfinite(tables.values))
        read = read_candidates(query, tables, spec, rows, normalizer, complete=everything)
        read = replace(read, values=propagate_nan(read.values, wrong))
    ids, weights, scores = cast(Tensor, read.ids), cast(Tensor, read.weights), cast(Tensor, read.scores)
    if k is None:
        ids = ids.masked_fill(weights == 0, -1)
        return replace(read, ids=ids, weights=weights.detach(), scores=scores.detach(), lse=lse)
    ids, weights, scores = ids[:, :k], weights[:, :k], scores[:, :k]
    return Read(read.values, ids, weights, scores, lse, share_of(weights), normalizer=normalizer)


def _best_rows(query: Tensor, tables: Tables, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp over all rows, and scores and numbers of the k best."""
    _, lse, best = backend_for(query).exact_read(
        query, tables.keys, tables.values.detach()[:, :0], spec, tables.groups, k
    )
    scores, _, rows = cast(BestRows, best)
    return lse, scores, rows
