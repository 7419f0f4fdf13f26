"""Reference implementation of exact reads, for float64 inputs; simple rather than fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def scores(query: Tensor, keys: Tensor, metric: str, temperature: float | Tensor = 1.0) -> Tensor:
    """Compute scores: (..., B, d), (..., N, d) -> (..., B, N)."""
    if metric == "l2":
        raw = -(query.unsqueeze(-2) - keys.unsqueeze(-3)).square().sum(-1)
    elif metric == "cosine":
        raw = F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).mT
    elif metric == "scaled_dot":
        raw = query @ keys.mT / math.sqrt(query.shape[-1])
    else:
        raw = query @ keys.mT
    return raw / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature)


@dataclass
class Answer:
    values: Tensor
    lse: Tensor
    weights: Tensor  # (..., B, N), of all rows, in row order
    scores: Tensor  # (..., B, N)


def read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    metric: str = "scaled_dot",
    temperature: float | Tensor = 1.0,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> Answer:
    """Compute the exact read.

    ``visible``, (B, N) bool, selects the rows of each query; ``bias`` is added to the scores. The values of a query
    without visible rows are 0.
    """
    found = scores(query, keys, metric, temperature)
    if bias is not None:
        found = found + bias
    if visible is not None:
        found = found.masked_fill(~visible, -math.inf)
    some = (found > -math.inf).any(-1, keepdim=True)
    safe = torch.where(some, found, torch.zeros_like(found))
    weights = torch.where(some, torch.softmax(safe, -1), torch.zeros_like(found))
    lse = torch.where(some.squeeze(-1), torch.logsumexp(safe, -1), -math.inf)
    return Answer(weights @ values, lse, weights, found)


def best(found: Tensor, k: int) -> Tensor:
    """Return the k best columns of each row, best first; ties go to the lowest column, -1 is padding."""
    order = found.sort(dim=-1, descending=True, stable=True)
    columns = order.indices.masked_fill(order.values == -math.inf, -1)[..., :k]
    return F.pad(columns, (0, k - columns.shape[-1]), value=-1)
