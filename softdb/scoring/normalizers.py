"""From scores to weights.

======================  ==========================================================================
softmax                 exp(score) / sum of exp(score)
sparsemax               max(score - t, 0), t such that they sum to 1: 0 for all but the best rows
entmax15                max(score / 2 - t, 0) ** 2, likewise: between softmax and sparsemax
straight_through        forward: 1 for the best row, 0 for the rest; backward: that of softmax
gumbel                  straight_through, of scores with noise: a row drawn by its softmax weight
======================  ==========================================================================

As dropout, gumbel is for training: a store in eval mode reads by straight_through instead, and draws nothing. The
functions of `softdb.functional` have no mode and always draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from softdb._checks import check_choice, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.transforms import is_active, is_forward_mode

__all__ = [
    "NORMALIZERS",
    "SPARSE",
    "check_normalizer",
    "entmax15",
    "in_eval_mode",
    "is_hard",
    "softmax",
    "sparsemax",
    "straight_through",
]


NORMALIZERS = ("softmax", "straight_through", "gumbel", "sparsemax", "entmax15")


def check_normalizer(name: str, generator: torch.Generator | None = None) -> None:
    """Raise unless ``name`` is a normalizer that exists, and draws from a ``generator`` if there is one."""
    check_choice("normalizer", name, NORMALIZERS)
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
    if name != "gumbel":
        raise ArgumentError(f"generator: expected nothing, since nothing is random with {name!r}; leave it out")
    if torch._C._current_graph_task_id() != -1:  # within a backward
        raise ArgumentError(
            "generator: expected None under activation checkpointing, which repeats a read and would draw again; torch "
            "repeats its own draws"
        )


def is_hard(name: str) -> bool:
    """Whether forward gives one row weight 1, and backward has the gradient of a softmax."""
    return name in ("straight_through", "gumbel")


def in_eval_mode(name: str) -> str:
    """Return the normalizer by which a module in eval mode reads: the same, but without noise."""
    return "straight_through" if name == "gumbel" else name


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
    function = _TransformableStraightThrough if is_active() or is_forward_mode() else _StraightThrough
    result: Tensor = function.apply(hard.detach(), soft)  # type: ignore[no-untyped-call]
    return result


class _TransformableStraightThrough(torch.autograd.Function):
    """`_StraightThrough` as transforms of torch.func need it, which costs some ten microseconds more a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].clone()


def sparsemax(scores: Tensor) -> Tensor:  # (..., k) -> (..., k)
    """The point of the probability simplex that is nearest to ``scores``: many of its weights are 0.

    Equal to ``(scores - t).clamp(min=0)`` with the t for which that sums to 1. t lies less than 1 below the largest
    score. A score of -inf gets weight 0; where every score is -inf all weights are 0. Twice differentiable.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), equations 2 and 14, algorithm 1.

    Example:
        >>> import torch
        >>> from softdb.scoring.normalizers import sparsemax
        >>> sparsemax(torch.tensor([2.0, 1.5, 0.0, -torch.inf]))
        tensor([0.7500, 0.2500, 0.0000, 0.0000])
    """
    return _sparse(scores, _nearest, _steps)


def entmax15(scores: Tensor) -> Tensor:  # (..., k) -> (..., k)
    """Between `softmax` and `sparsemax`: weights fall off smoothly, and are 0 from some score on.

    Equal to ``(scores / 2 - t).clamp(min=0) ** 2`` with the t for which that sums to 1: the 1.5-entmax. A score that
    lies 2 or more below the largest has weight 0, as has one of -inf; where every score is -inf all weights are 0.
    Twice differentiable.

    Source: Peters, Niculae & Martins 2019 (arXiv 1905.05702), equation 7, algorithm 2.

    Example:
        >>> import torch
        >>> from softdb.scoring.normalizers import entmax15
        >>> entmax15(torch.tensor([2.0, 2.0, -1.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    return _sparse(scores, _smooth, _roots)


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {"sparsemax": sparsemax, "entmax15": entmax15}


# So far below the largest score weights are 0, to whatever the threshold is rounded: twice the larger reach.
LOWEST = -4.0


Weigh = Callable[[Tensor], Tensor]


class _Sparse(torch.autograd.Function):
    """Weights ``f(score - t)`` that sum to 1, by a function of scores whose largest is 0, and by the slopes of f."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weigh: Weigh, slopes: Weigh) -> Tensor:
        weights = _weighed(scores, weigh)
        ctx.slopes = slopes
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _through(grads[0], ctx.slopes(*ctx.saved_tensors)), None, None


class _TransformableSparse(torch.autograd.Function):
    """`_Sparse` as transforms of torch.func need it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, weigh: Weigh, slopes: Weigh) -> Tensor:
        return _weighed(scores, weigh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Weigh, Weigh], output: Tensor) -> None:
        ctx.slopes = inputs[2]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _through(grads[0], ctx.slopes(*ctx.saved_tensors)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _through(tangents[0], ctx.slopes(*ctx.saved_tensors))  # the Jacobian is symmetric


def _sparse(scores: Tensor, weigh: Weigh, slopes: Weigh) -> Tensor:
    function = _TransformableSparse if is_active() or is_forward_mode() else _Sparse
    weights: Tensor = function.apply(scores, weigh, slopes)  # type: ignore[no-untyped-call]
    return weights


def _weighed(scores: Tensor, weigh: Weigh) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.clone()
    largest = scores.amax(-1, keepdim=True)
    empty = largest == -torch.inf
    below = (scores - largest.masked_fill(empty, 0.0)).clamp(min=LOWEST)
    return weigh(below).masked_fill_(empty, 0.0)


def _nearest(z: Tensor) -> Tensor:
    ordered = z.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    support = (_counts(z) * ordered > excess).sum(-1, keepdim=True).clamp(min=1)  # no NaN is to be an index
    return (z - excess.gather(-1, support - 1) / support).clamp(min=0)  # torch.vmap has no rule for clamp_


def _steps(weights: Tensor) -> Tensor:
    return (weights > 0).to(weights.dtype)


def _smooth(z: Tensor) -> Tensor:
    z, count = z / 2, _counts(z)
    ordered = z.sort(dim=-1, descending=True).values
    mean = ordered.cumsum(-1) / count
    scatter = count * (ordered.square().cumsum(-1) / count - mean.square())
    thresholds = mean - ((1 - scatter) / count).clamp(min=0).sqrt()
    support = (thresholds <= ordered).sum(-1, keepdim=True).clamp(min=1)
    return (z - thresholds.gather(-1, support - 1)).clamp(min=0).square()


def _roots(weights: Tensor) -> Tensor:
    seen = weights > 0
    return torch.where(seen, torch.where(seen, weights, 1.0).sqrt(), 0.0)  # a second derivative meets no root of 0


def _counts(z: Tensor) -> Tensor:  # (..., k) -> (k,)
    return torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)


def _through(gradient: Tensor, slopes: Tensor) -> Tensor:
    """Of weights ``f(score - t)`` that sum to 1, back to the scores; ``slopes`` are those of f."""
    total = slopes.sum(-1, keepdim=True)
    mean = (gradient * slopes).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
    return slopes * (gradient - mean)
