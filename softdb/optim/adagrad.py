"""`RowAdagrad`: Adagrad for rows with a gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_number
from softdb.optim.blocks import RowBlock
from softdb.optim.row_optimizer import RowOptimizer
from softdb.table.hooks import register_row_optimizer

__all__ = ["RowAdagrad"]


@register_row_optimizer
class RowAdagrad(RowOptimizer):
    r"""Row-wise Adagrad: updates only rows with a gradient, one accumulator per row.

    For each row with a gradient::

        p   = p * prod(1 - lr_i * weight_decay  for every step i since the row's last update, including this one)
        a   = a + mean(g**2)
        p   = p - lr * g / (sqrt(a) + eps)

    The state needs little memory, so the optimizer suits large embedding tables. New rows, growth, weight decay
    and the stochastic rounding of rows in bfloat16 or float16 work as in `RowAdam`. Rows without a gradient are neither
    read nor written, and no memory is allocated for their update. On CUDA, the step does not wait for the device, and
    treats gradients that are not finite as `RowAdam` does.

    Args:
        params: Parameters, or parameter groups with their own options, as for any optimizer.
        lr: Learning rate, at least 0.
        eps: Term that is added to the denominator, at least 0.
        weight_decay: Weight decay coefficient, at least 0, with ``lr * weight_decay`` below 1.
        initial_accumulator_value: Initial value of a, at least 0.
        maximize: Whether to maximize the objective: g is negated.
        foreach, fused: Without effect, since they choose an implementation in torch. At most one may be True.
        differentiable: Must be False.

    Memory: one number per row, in the Parameter's dtype but at least float32; for a store 16 more bytes per row; with
    weight decay 8 more bytes per row.

    Raises:
        ArgumentError, DtypeError: An argument is invalid.

    Source: Duchi et al. 2011; Mudigere et al. 2021 (arXiv 2104.05158) for one accumulator per row, as in FBGEMM's exact
    row-wise Adagrad; Gupta et al. 2015 (arXiv 1502.02551) for stochastic rounding.

    Example:
        >>> import torch
        >>> from softdb.optim import RowAdagrad
        >>> table = torch.nn.Embedding(5, 2, sparse=True)
        >>> _ = table.weight.data.fill_(1.0)
        >>> optimizer = RowAdagrad(table.parameters(), lr=0.5)
        >>> table(torch.tensor([3])).sum().backward()
        >>> optimizer.step()
        >>> table.weight.data[2:4]
        tensor([[1.0000, 1.0000],
                [0.5000, 0.5000]])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        name = "initial_accumulator_value"
        return super()._check_options(options) | {name: check_number(name, options[name])}

    def _initial_moments(self, options: dict[str, Any]) -> dict[str, float]:
        return {"sum": options["initial_accumulator_value"]}

    def _state_shape(self, shape: torch.Size) -> torch.Size:
        return shape[:1]

    def _step_size(self, age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
        lr: float = options["lr"]
        return lr

    def _update_moments(
        self, block: RowBlock, gradient: Tensor, moments: list[Tensor], eps: float | Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        (totals,) = moments
        squares = torch.linalg.vector_norm(gradient.unsqueeze(-1).flatten(1), dim=1).square_()
        total = block.take(totals)
        block.put(totals, total.add_(squares, alpha=1 / max(1, math.prod(gradient.shape[1:]))))
        return gradient, total.sqrt().add_(eps).view(-1, *[1] * (gradient.dim() - 1))
