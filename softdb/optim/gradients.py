"""Check of the gradients that row optimisers take."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.errors import DtypeError, ShapeError

__all__ = ["check_gradient"]


def check_gradient(parameter: Tensor) -> None:
    """Raise unless a gradient is dense or row-sparse, real, and of the right shape."""
    gradient = parameter.grad
    if gradient is None:
        return
    rows = gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1
    if not rows and gradient.layout != torch.strided:
        found = f"{gradient.layout}"
        if gradient.layout == torch.sparse_coo:
            found += f" with {gradient.sparse_dim()} sparse dimensions"
        raise DtypeError(
            "gradient: expected a dense one, or a COO tensor that is sparse in its first dimension only, got "
            f"{found}; convert it with .to_dense()"
        )
    if not gradient.is_floating_point():
        raise DtypeError(f"gradient: expected a floating-point one, got {gradient.dtype}; take its real part")
    if gradient.shape != parameter.shape:
        raise ShapeError(
            f"gradient: expected shape {tuple(parameter.shape)}, as its Parameter, got {tuple(gradient.shape)}; "
            "call zero_grad() and go backward again"
        )
