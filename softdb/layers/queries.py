"""Shared parts of the layers: the query and output projections of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softdb._checks import check_choice, check_dtype, check_not_meta
from softdb.reading.result import Read, pad_candidates

__all__ = ["Queries", "QueryNorm"]


QueryNorm = Literal["layer", "batch"]


QUERY_NORMS = ("layer", "batch")


READ_FIELDS = [field.name for field in fields(Read)]


class Queries(nn.Module):
    """Query projection, with one query per head and an optional normalization.

    Equal to ``norm(x @ W.T)``, (..., dim) -> (..., heads, parts, width).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        norm: QueryNorm | None,
        *,
        parts: int = 1,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        if norm is not None:
            check_choice("query_norm", norm, QUERY_NORMS)
        self.shape = (heads, parts, width)
        self.projection = nn.Linear(dim, heads * parts * width, bias=False, device=device, dtype=dtype)
        self.norm: nn.Module | None = None
        if norm == "layer":
            self.norm = nn.LayerNorm(width, device=device, dtype=dtype)
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(heads * parts * width, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new weights, so that queries have variance 1 where x has variance 1."""
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        if isinstance(self.norm, (nn.LayerNorm, nn.BatchNorm1d)):
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the queries of each token."""
        is_meta = getattr(self.projection.weight, "is_meta", False)  # In a quantized layer, weight is a method.
        # accelerate replaces `forward` of a module whose weights it loads from the meta device on demand.
        if is_meta and "forward" not in vars(self.projection):
            check_not_meta("layer", self.projection.weight)
        queries: Tensor = self.projection(x)
        if isinstance(self.norm, nn.BatchNorm1d):
            queries = self.norm(queries.reshape(-1, queries.shape[-1])).view_as(queries)
        queries = queries.unflatten(-1, self.shape)
        return self.norm(queries) if isinstance(self.norm, nn.LayerNorm) else queries


def make_output(heads: int, value_dim: int, dim: int, device: Any, dtype: Any) -> nn.Linear:
    """Make the projection from the values of all heads to the output."""
    return nn.Linear(heads * value_dim, dim, bias=False, device=device, dtype=dtype)


def reset_output(output: nn.Linear) -> None:
    """Draw new weights of an output projection."""
    nn.init.normal_(output.weight, std=output.in_features**-0.5)


def stack_reads(reads: Sequence[Read], dimension: int) -> Read:
    """Stack reads of several stores along a new dimension."""
    widths = {0 if read.ids is None else read.ids.shape[-1] for read in reads}
    if len(widths) > 1:  # A sparse normalizer doubles k in the stores that need it.
        reads = [pad_candidates(read, max(widths)) for read in reads]
    stacked: dict[str, Any] = {}
    for name in READ_FIELDS:
        parts = [getattr(read, name) for read in reads]
        stacked[name] = torch.stack(parts, dim=dimension) if isinstance(parts[0], Tensor) else parts[0]
    return Read(**stacked)
