"""Normalizers: functions from scores to weights.

======================  ==================================================================================
softmax                 exp(score) / sum of exp(score)
sparsemax               max(score - t, 0), where t makes the weights sum to 1
entmax15                max(score / 2 - t, 0) ** 2, where t makes the weights sum to 1
straight_through        forward: 1 for the best row and 0 for the others; backward: gradient of softmax
gumbel                  straight_through of scores plus Gumbel noise: samples a row by its softmax weight
======================  ==================================================================================

sparsemax and entmax15 give weight 0 to all but the best rows. Like dropout, gumbel is active in training mode only: a
store in eval mode reads with straight_through instead and draws no noise. The functions of `softdb.functional` have no
mode and always draw noise.

`REGISTRY` is the only list of normalizers. The argument checks, the read paths, the lab, the command line and the tests
derive from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from softdb._checks import check_choice, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.transforms import is_active, is_forward_mode

__all__ = [
    "NORMALIZERS",
    "REGISTRY",
    "SPARSE_NORMALIZERS",
    "Normalizer",
    "check_normalizer",
    "entmax15",
    "get_eval_normalizer",
    "is_hard",
    "is_random",
    "is_sparse",
    "reports_rows",
    "softmax",
    "sparsemax",
    "straight_through",
]


Weigh = Callable[[Tensor], Tensor]


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:  # (..., k) -> (..., k), (...,)
    """Compute softmax and log-sum-exp of the last dimension.

    Equal to ``torch.softmax(scores, -1), torch.logsumexp(scores, -1)`` where some score is above -inf. Where every
    score is -inf, or there are no scores, the weights are 0 and the log-sum-exp is -inf; torch.softmax returns NaN
    where every score is -inf. A score of -inf has weight 0. Gradients are finite everywhere.
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
    """Return ``hard`` in forward; pass the gradient to ``soft`` in backward.

    Forward returns the bits of ``hard`` unchanged, unlike ``soft + (hard - soft).detach()``.

    Source: Bengio, Leonard & Courville 2013 (arXiv 1308.3432).
    """
    function = _TransformableStraightThrough if is_active() or is_forward_mode() else _StraightThrough
    result: Tensor = function.apply(hard.detach(), soft)  # type: ignore[no-untyped-call]
    return result


class _TransformableStraightThrough(torch.autograd.Function):
    """`_StraightThrough` for transforms of torch.func, which is slower to call."""

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
    """Project scores onto the probability simplex, which gives many weights of 0.

    Equal to ``(scores - t).clamp(min=0)``, where the threshold t makes the weights sum to 1. A score that is 1 or more
    below the largest has weight 0, and so has a score of -inf. Where every score is -inf, all weights are 0. Twice
    differentiable.

    Source: Martins & Astudillo 2016 (arXiv 1602.02068), equations 2 and 14, algorithm 1.

    Example:
        >>> import torch
        >>> from softdb.scoring.normalizers import sparsemax
        >>> sparsemax(torch.tensor([2.0, 1.5, 0.0, -torch.inf]))
        tensor([0.7500, 0.2500, 0.0000, 0.0000])
    """
    return _sparse(scores, _project, _sparsemax_slopes, SPARSEMAX_FLOOR)


def entmax15(scores: Tensor) -> Tensor:  # (..., k) -> (..., k)
    """Compute the 1.5-entmax of scores, which lies between `softmax` and `sparsemax`.

    Equal to ``(scores / 2 - t).clamp(min=0) ** 2``, where the threshold t makes the weights sum to 1. The weights fall
    smoothly to 0. A score that is 2 or more below the largest has weight 0, and so has a score of -inf; where every
    score is -inf, all weights are 0. Twice differentiable.

    Source: Peters, Niculae & Martins 2019 (arXiv 1905.05702), equation 7, algorithm 2.

    Example:
        >>> import torch
        >>> from softdb.scoring.normalizers import entmax15
        >>> entmax15(torch.tensor([2.0, 2.0, -1.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    return _sparse(scores, _project_squared, _entmax15_slopes, ENTMAX15_FLOOR)


# Scores are clamped at this distance below the largest score, so that sums of squares stay finite. A score at distance
# -1 (sparsemax) or -2 (entmax15) has weight 0 already; the larger distance is a margin for rounding of the threshold.
SPARSEMAX_FLOOR, ENTMAX15_FLOOR = -4.0, -4.0


class _Sparse(torch.autograd.Function):
    """Weights ``f(score - t)`` that sum to 1, given ``weigh`` and the derivative of f.

    ``weigh`` maps scores whose largest is 0 to weights. ``slopes`` maps weights to the values of f' there. Scores below
    ``floor``, relative to the largest, are clamped to it.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weigh: Weigh, slopes: Weigh, floor: float) -> Tensor:
        weights = _weigh_shifted(scores, weigh, floor)
        ctx.slopes = slopes
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _multiply_by_jacobian(grads[0], ctx.slopes(*ctx.saved_tensors)), None, None, None


class _TransformableSparse(torch.autograd.Function):
    """`_Sparse` for transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, weigh: Weigh, slopes: Weigh, floor: float) -> Tensor:
        return _weigh_shifted(scores, weigh, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Weigh, Weigh, float], output: Tensor) -> None:
        ctx.slopes = inputs[2]
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _multiply_by_jacobian(grads[0], ctx.slopes(*ctx.saved_tensors)), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _multiply_by_jacobian(tangents[0], ctx.slopes(*ctx.saved_tensors))


def _sparse(scores: Tensor, weigh: Weigh, slopes: Weigh, floor: float) -> Tensor:
    function = _TransformableSparse if is_active() or is_forward_mode() else _Sparse
    weights: Tensor = function.apply(scores, weigh, slopes, floor)  # type: ignore[no-untyped-call]
    return weights


def _weigh_shifted(scores: Tensor, weigh: Weigh, floor: float) -> Tensor:
    """Apply ``weigh`` to scores relative to the largest score of each query.

    Where every score is -inf, all weights are 0. Differentiable if ``weigh`` is.
    """
    if scores.shape[-1] == 0:
        return scores.clone()
    largest = scores.amax(-1, keepdim=True)
    empty = largest == -torch.inf
    shifted = (scores - largest.masked_fill(empty, 0.0)).clamp(min=floor)
    # Neither value nor gradient of an empty query may be NaN, whatever ``weigh`` does with scores at the floor.
    return weigh(shifted.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)


def _project(z: Tensor) -> Tensor:
    """Compute the weights of sparsemax by algorithm 1 of Martins & Astudillo."""
    ordered = z.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    support = (_ranks(z) * ordered > excess).sum(-1, keepdim=True).clamp(min=1)  # NaN scores give a valid index
    return (z - excess.gather(-1, support - 1) / support).clamp(min=0)  # torch.vmap has no rule for clamp_


def _sparsemax_slopes(weights: Tensor) -> Tensor:
    return (weights > 0).to(weights.dtype)


def _project_squared(z: Tensor) -> Tensor:
    """Compute the weights of 1.5-entmax by algorithm 2 of Peters, Niculae & Martins."""
    z, count = z / 2, _ranks(z)
    ordered = z.sort(dim=-1, descending=True).values
    mean = ordered.cumsum(-1) / count
    scatter = count * (ordered.square().cumsum(-1) / count - mean.square())
    thresholds = mean - ((1 - scatter) / count).clamp(min=0).sqrt()
    support = (thresholds <= ordered).sum(-1, keepdim=True).clamp(min=1)
    return (z - thresholds.gather(-1, support - 1)).clamp(min=0).square()


def _entmax15_slopes(weights: Tensor) -> Tensor:
    seen = weights > 0
    return torch.where(seen, torch.where(seen, weights, 1.0).sqrt(), 0.0)  # the root of 0 has no finite derivative


def _ranks(z: Tensor) -> Tensor:  # (..., k) -> (k,)
    return torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)


def _multiply_by_jacobian(vector: Tensor, slopes: Tensor) -> Tensor:
    """Multiply by the Jacobian of weights ``f(score - t)`` that sum to 1.

    The Jacobian is symmetric: the product is the vector-Jacobian product and the Jacobian-vector product.
    """
    total = slopes.sum(-1, keepdim=True)
    mean = (vector * slopes).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
    return slopes * (vector - mean)


@dataclass(frozen=True)
class Normalizer:
    """Properties of a normalizer.

    Attributes:
        weigh: For a sparse normalizer, the function from scores to weights, (..., k) -> (..., k). The weights sum to 1
            and are 0 for all but the best rows. They depend only on the scores of the rows with weight above 0. If
            None, the weights are those of `softmax`.
        is_hard: Whether forward gives weight 1 to the best row, and backward is that of softmax.
        is_random: Whether Gumbel noise is added to the scores.
        eval_name: Name of the normalizer that a module in eval mode uses instead; None for itself.
    """

    weigh: Weigh | None = None
    is_hard: bool = False
    is_random: bool = False
    eval_name: str | None = None


REGISTRY: dict[str, Normalizer] = {
    "softmax": Normalizer(),
    "straight_through": Normalizer(is_hard=True),
    "gumbel": Normalizer(is_hard=True, is_random=True, eval_name="straight_through"),
    "sparsemax": Normalizer(weigh=sparsemax),
    "entmax15": Normalizer(weigh=entmax15),
}


# These are tuples because ``in`` on a tuple accepts arguments of any type, and torch.compile can trace it.
NORMALIZERS = tuple(REGISTRY)
SPARSE_NORMALIZERS: dict[str, Weigh] = {
    name: normalizer.weigh for name, normalizer in REGISTRY.items() if normalizer.weigh is not None
}
_SPARSE_NAMES = tuple(SPARSE_NORMALIZERS)
_HARD_NAMES = tuple(name for name, normalizer in REGISTRY.items() if normalizer.is_hard)
_RANDOM_NAMES = tuple(name for name, normalizer in REGISTRY.items() if normalizer.is_random)
_EVAL_NAMES = tuple((name, item.eval_name) for name, item in REGISTRY.items() if item.eval_name is not None)


def is_sparse(name: str) -> bool:
    """Return whether a normalizer gives weight 0 to all but the best rows."""
    return name in _SPARSE_NAMES


def is_hard(name: str) -> bool:
    """Return whether forward selects one row and backward is that of softmax."""
    return name in _HARD_NAMES


def is_random(name: str) -> bool:
    """Return whether a normalizer adds noise to the scores."""
    return name in _RANDOM_NAMES


def reports_rows(name: str) -> bool:
    """Return whether an exact read without ``k`` finds the rows with weight above 0."""
    return is_sparse(name) or is_hard(name)


def get_eval_normalizer(name: str) -> str:
    """Return the normalizer that a module in eval mode uses instead of ``name``."""
    for own, replacement in _EVAL_NAMES:
        if own == name:
            return replacement
    return name


def check_normalizer(name: str, generator: torch.Generator | None = None) -> None:
    """Check the name of a normalizer, and whether ``generator`` is allowed with it."""
    check_choice("normalizer", name, NORMALIZERS)
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
    if not is_random(name):
        raise ArgumentError(
            f"generator: expected no value with normalizer={name!r}, which draws no noise; leave it out"
        )
    if torch._C._current_graph_task_id() != -1:  # a backward is running
        raise ArgumentError(
            "generator: expected None under activation checkpointing, which repeats the read in backward and would "
            "draw other noise; leave it out: torch restores the state of its own generator"
        )
