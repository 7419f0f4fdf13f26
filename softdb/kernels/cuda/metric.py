"""Scores of rows in kernels: dot, scaled_dot, cosine and l2.

Kernels take queries that are prepared for the metric, but keys as stored. The scores of one query are

===========  ===========================  =====================
metric       query                        score
===========  ===========================  =====================
dot          q / T                        query·k
scaled_dot   q / (√key_dim T)             query·k
cosine       q / (‖q‖ T)                  query·k / ‖k‖
l2           q, and a scale of 1 / T      −scale ‖query − k‖²
===========  ===========================  =====================

For l2 the sum of squared differences is accurate in float32, unlike the expanded product of `softdb.scoring.metrics`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softdb.kernels.cuda.launch import MAX_WIDTH
from softdb.kernels.spec import ReadSpec

__all__ = ["can_score", "is_supported", "norm_rows", "restore_query", "score_rows"]

STORAGE_DTYPES = torch.float32, torch.bfloat16, torch.float16


def is_supported(*tables: Tensor) -> bool:
    """Return whether kernels support the dtypes and widths of tables."""
    return all(table.dtype in STORAGE_DTYPES and 1 <= table.shape[-1] <= MAX_WIDTH for table in tables)


def can_score(spec: ReadSpec, *tables: Tensor) -> bool:
    """Return whether kernels support a read in ``spec.dtype`` of tables."""
    return spec.dtype == torch.float32 and is_supported(*tables)


def restore_query(query: Tensor, spec: ReadSpec) -> tuple[Tensor, Tensor | None]:  # (M, w) -> (M, d), (M,)
    """Restore queries and scales from prepared queries; differentiable.

    These are the arguments of `score_rows`. The scale is None except for l2.
    """
    if spec.metric != "l2":
        return query, None
    scale = -query[:, -2]
    points = query[:, :-2] / (2 * scale.unsqueeze(-1))
    if spec.center is not None:
        points = points + spec.center
    return points.to(spec.dtype), scale.to(spec.dtype)


@triton.jit
def norm_rows(rows):  # (C, D) -> (C,)
    """Compute the norms of float32 rows, at least 1e-12 as F.normalize does."""
    return tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)


@triton.jit
def score_rows(query, scale, rows, METRIC: tl.constexpr):  # (D,), (), (C, D) -> (C,)
    """Score float32 rows by one query.

    The bits of a score depend only on the row, the query and the shape of the block, so equal rows tie.
    """
    if METRIC == "l2":
        difference = query[None, :] - rows
        scores = -scale * tl.sum(difference * difference, 1)
    else:
        scores = tl.sum(query[None, :] * rows, 1)
        if METRIC == "cosine":
            scores = scores / norm_rows(rows)
    return scores
