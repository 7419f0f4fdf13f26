"""Norm of sparse tensors, which ``clip_grad_norm_`` needs and torch lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softdb.pending_checks import is_deferred
from softdb.table.duplicates import sum_duplicates

__all__ = ["register_sparse_norm"]

_OPERATOR = "aten::linalg_vector_norm"
_BACKENDS = ("SparseCPU", "SparseCUDA")

# The library that holds the kernel while the process runs; None before the first row-sparse gradient.
_library: torch.library.Library | None = None


def register_sparse_norm() -> None:
    """Register a kernel for `torch.linalg.vector_norm` of COO tensors, once.

    ``clip_grad_norm_`` and the trainers that call it raise NotImplementedError without it. The kernel is registered
    with the first row-sparse gradient, for the backends for which torch has none.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    for backend in _BACKENDS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, backend):
            _library.impl("linalg_vector_norm", compute_sparse_norm, backend)


def compute_sparse_norm(
    tensor: Tensor,
    ord: float = 2.0,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``torch.linalg.vector_norm(tensor.to_dense(), ord)`` of a COO tensor.

    Raises:
        NotImplementedError: ``dim`` or ``keepdim`` is given, or ``ord`` is negative.
    """
    if dim is not None or keepdim or ord < 0:
        raise NotImplementedError(
            f"linalg_vector_norm: expected a norm of order 0 or above of the whole sparse tensor, got ord={ord}, "
            f"dim={dim}, keepdim={keepdim}; convert the tensor with .to_dense()"
        )
    if tensor.is_coalesced() or not is_deferred(tensor):
        values = tensor.coalesce()._values()
    else:
        values = sum_duplicates(tensor._indices()[0], tensor._values()).sums
    if values.numel() == 0:  # An empty tensor has no maximum.
        return values.new_zeros((), dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(values, ord, dtype=dtype)
    return norm
