"""Check of the gradients of row optimizers."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.errors import DtypeError, ShapeError

__all__ = ["check_gradient"]


def check_gradient(parameter: Tensor, *, allow_complex: bool = False) -> None:
    """Raise unless a gradient is dense or row-sparse, real, and of the right shape."""
    gradient = parameter.grad
    if gradient is None:
        return
    is_row_sparse = gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1
    if not is_row_sparse and gradient.layout != torch.strided:
        layout = f"{gradient.layout}"
        if gradient.layout == torch.sparse_coo:
            layout += f" with {gradient.sparse_dim()} sparse dimensions"
        raise DtypeError(
            "gradient: expected a dense tensor, or a COO tensor that is sparse in its first dimension only, got "
            f"{layout}; convert it with .to_dense()"
        )
    if not gradient.is_floating_point() and not (allow_complex and gradient.is_complex()):
        raise DtypeError(f"gradient: expected a floating-point tensor, got {gradient.dtype}; pass its real part")
    if gradient.shape != parameter.shape:
        raise ShapeError(
            f"gradient: expected shape {tuple(parameter.shape)}, that of its Parameter, got {tuple(gradient.shape)}; "
            "call zero_grad() and backward() again"
        )
