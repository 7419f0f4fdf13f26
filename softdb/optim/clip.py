"""`clip_row_grad_norm_`: clip the joint norm of dense and row-sparse gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from softdb._checks import check_above_zero, check_flag, check_number
from softdb.errors import NonFiniteError
from softdb.optim.gradients import check_gradient
from softdb.pending_checks import is_deferred
from softdb.table.duplicates import sum_duplicates
from softdb.table.gradients import coalesce

__all__ = ["clip_row_grad_norm_"]


@torch.no_grad()
def clip_row_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the joint norm of row-sparse and dense gradients, in place.

    Let g be the concatenation of all gradients. Equal to ``g *= min(1, max_norm / (norm(g) + 1e-6))``, which
    `torch.nn.utils.clip_grad_norm_` computes for dense gradients. The arguments are those of that function. Sparse
    gradients are not converted to dense ones.

    Args:
        parameters: Parameters. Parameters without a gradient are skipped. An uncoalesced sparse gradient is replaced by
            its coalesced form, except on a GPU, where the host would have to wait for the number of its rows.
        max_norm: Maximum norm of the gradients, at least 0.
        norm_type: Order p of the norm, above 0; ``math.inf`` or "inf" is the maximum norm.
        error_if_nonfinite: Whether to raise if the norm is NaN or infinite.
        foreach: Accepted, without effect: it chooses an implementation in torch.

    Returns:
        The norm before clipping, a tensor without dimensions.

    Raises:
        NonFiniteError: ``error_if_nonfinite`` is True and the norm is not finite. The gradients are unchanged.
        ArgumentError, DtypeError: An argument is invalid, or a gradient is neither dense nor row-sparse.

    Example:
        >>> import torch
        >>> from softdb.optim import clip_row_grad_norm_
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> (3 * table(torch.tensor([3, 3]))).sum().backward()
        >>> clip_row_grad_norm_(table.parameters(), max_norm=1.0)
        tensor(8.4853)
        >>> table.weight.grad.to_dense()[3]
        tensor([0.7071, 0.7071])
    """
    max_norm = check_number("max_norm", max_norm)
    order = check_above_zero(
        "norm_type", math.inf if isinstance(norm_type, str) and norm_type == "inf" else norm_type, most=math.inf
    )
    if foreach is not None:
        check_flag("foreach", foreach)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    owners = [parameter for parameter in given if parameter.grad is not None]
    for parameter in owners:
        check_gradient(parameter, allow_complex=True)
    # Numbers to scale, and numbers with the norm of the gradient. An empty tensor has no maximum.
    found = [_find_numbers(parameter, parameter.grad) for parameter in owners if parameter.grad is not None]
    parts = [numbers for numbers in found if numbers[0].numel()]
    if not parts:
        return torch.zeros((), device=given[0].device if given else None)
    device = parts[0][0].device
    norms = [torch.linalg.vector_norm(summed, order).to(device) for _, summed in parts]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise NonFiniteError(
            f"parameters: expected gradients with a finite norm, got {float(total)}; skip the step, or pass "
            "error_if_nonfinite=False to scale them anyway"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient, _ in parts:
        gradient.mul_(factor.to(gradient.device))
    return total


def _find_numbers(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of a gradient, and those with duplicates of rows summed."""
    if gradient.layout != torch.sparse_coo:
        return gradient, gradient
    if is_deferred(gradient) and not gradient.is_coalesced():
        return gradient._values(), sum_duplicates(gradient._indices()[0], gradient._values()).sums
    parameter.grad = whole = coalesce(gradient)
    return whole._values(), whole._values()
