"""Layouts of gradients, dense or row-sparse, that the optimizers of torch accept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ArgumentError

__all__ = ["check_before_step"]

DENSE, ROW_SPARSE = torch.strided, torch.sparse_coo


def check_before_step(
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    holds_rows: Callable[[Tensor], bool],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Raise if a step of an optimizer of torch would refuse the gradients of rows.

    If ``step`` has a closure, the gradients are computed during the step. The closure is then replaced by one that also
    checks the gradients. Optimizers of other packages are not checked.

    Args:
        optimizer: The optimizer.
        args: Positional arguments of ``step``, from ``self`` on.
        kwargs: Keyword arguments of ``step``.
        holds_rows: Whether a Parameter is a table of rows.

    Returns:
        The arguments of ``step`` with another closure; None to keep them.

    Raises:
        ArgumentError: The optimizer does not accept the layout of a gradient. No Parameter has changed.
    """
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is not kind or kind is torch.optim.LBFGS:
        return None  # LBFGS converts all gradients to dense ones.
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    if given is None:
        _check_layouts(optimizer, holds_rows)
        return None
    if not any(map(holds_rows, _parameters(optimizer))):
        return None

    def closure() -> Any:
        loss = given()
        _check_layouts(optimizer, holds_rows)
        return loss

    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})


def _check_layouts(optimizer: torch.optim.Optimizer, holds_rows: Callable[[Tensor], bool]) -> None:
    kind = type(optimizer)
    for group in optimizer.param_groups:
        accepted = _accepted_layouts(kind, group)
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None or gradient.layout in accepted:
                continue
            if gradient.layout == ROW_SPARSE and holds_rows(parameter):
                how = " with weight_decay or fused=True" if kind in (torch.optim.SGD, torch.optim.Adagrad) else ""
                raise ArgumentError(
                    f"optimizer: expected one that accepts row-sparse gradients, got {kind.__name__}{how}; use "
                    "softdb.optim.RowAdam, or make the store or layer with sparse_grad=False"
                )
            if gradient.layout == DENSE and any(map(holds_rows, _parameters(optimizer))):
                raise ArgumentError(
                    f"optimizer: expected one that accepts dense gradients, got {kind.__name__}; use "
                    "softdb.optim.RowAdam, which accepts dense and row-sparse gradients, or pass the Parameters with "
                    "dense gradients to another optimizer"
                )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _accepted_layouts(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> tuple[torch.layout, ...]:
    """Return the layouts of gradients that a class of torch accepts with some options."""
    if kind is torch.optim.SparseAdam:
        return (ROW_SPARSE,)
    if kind in (torch.optim.SGD, torch.optim.Adagrad) and group["weight_decay"] == 0 and not group.get("fused"):
        return DENSE, ROW_SPARSE
    return (DENSE,)
