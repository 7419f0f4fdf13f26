"""From scores to weights.

======================  ==========================================================================
softmax                 exp(score) / sum of exp(score)
straight_through        forward: 1 for the best row, 0 for the rest; backward: that of softmax
gumbel, sparsemax,      not there yet: asking for one is a NotImplementedError
entmax15
======================  ==========================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from softdb.errors import check_choice

__all__ = ["NORMALIZERS", "check_normalizer", "softmax", "straight_through"]

NORMALIZERS = ("softmax", "straight_through", "gumbel", "sparsemax", "entmax15")


def check_normalizer(name: str) -> None:
    """Raise unless ``name`` is a normalizer that exists."""
    check_choice("normalizer", name, NORMALIZERS)
    if name not in ("softmax", "straight_through"):
        raise NotImplementedError(
            f"normalizer: {name!r} is planned and not there yet; use 'softmax' or 'straight_through'"
        )


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:  # (..., k) -> (..., k), (...,)
    """``torch.softmax(scores, -1)`` and ``torch.logsumexp(scores, -1)``, defined where nothing is to be read.

    A score of -inf gets weight 0. Where every score is -inf the weights are 0 and the log-sum-exp is -inf; torch's
    own would be NaN. Gradients are finite everywhere.
    """
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    exponentials = (scores - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (largest + total.log()).masked_fill(empty, -torch.inf)
    return exponentials / total, lse.squeeze(-1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        return None, grads[0]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` forward, bit for bit; the gradient goes to ``soft`` (Bengio et al. 2013, arXiv 1308.3432)."""
    result: Tensor = _StraightThrough.apply(hard.detach(), soft)  # type: ignore[no-untyped-call]
    return result
