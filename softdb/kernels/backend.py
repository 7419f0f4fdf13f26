"""Choose the backend of the kernels for a device and dtype.

No other module makes this choice. The kernels in Triton are imported for the first CUDA tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from softdb.kernels import gather
from softdb.kernels.blocks import exact, topk
from softdb.kernels.cuda import launch
from softdb.kernels.gather import CandidateRead, GatherIndex
from softdb.kernels.spec import BestRows, ReadSpec
from softdb.pending_checks import is_deferred

__all__ = ["Backend", "backend_for"]


class ExactRead(Protocol):
    """Differentiable softmax over all rows.

    See `softdb.kernels.blocks.exact.exact_read`.
    """

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int = 1, k: int = 0
    ) -> tuple[Tensor, Tensor, BestRows | None]: ...


class ExactTopK(Protocol):
    """Top-k over all rows.

    See `softdb.kernels.blocks.topk.exact_top_k`.
    """

    def __call__(self, query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]: ...


class ScoreAt(Protocol):
    """Scores of gathered rows.

    See `softdb.kernels.gather.score_at`.
    """

    def __call__(self, query: Tensor, keys: Tensor, index: Tensor, spec: ReadSpec) -> Tensor: ...


class BlendAt(Protocol):
    """Weighted sum of gathered values.

    See `softdb.kernels.gather.blend_at`.
    """

    def __call__(self, weights: Tensor, values: Tensor, index: Tensor) -> Tensor: ...


class DotAt(Protocol):
    """Dot products with gathered rows.

    See `softdb.kernels.gather.dot_at`.
    """

    def __call__(self, query: Tensor, table: Tensor, index: Tensor) -> Tensor: ...


class BlendAtBackward(Protocol):
    """Gradient of the values in a weighted sum of gathered values.

    See `softdb.kernels.gather.blend_at_backward`.
    """

    def __call__(self, gradient: Tensor, weights: Tensor, values: Tensor, index: Tensor, *, sparse: bool) -> Tensor: ...


class ReadAt(Protocol):
    """Differentiable softmax over gathered rows, in one kernel.

    Args:
        query: Prepared queries, (M, w).
        keys: Keys as stored, (N, d).
        values: Values as stored, (N, dv).
        places: Rows to read.
        spec: The metric and dtype. Bias and noise are passed as offsets.
        offsets: Numbers that are added to the scores, (M, k), or None.
        sparse: Whether the gradients of keys and values are row-sparse; they are not coalesced.

    Returns:
        The read, or None if the kernel does not support the dtypes or widths.
    """

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        places: GatherIndex,
        spec: ReadSpec,
        offsets: Tensor | None,
        *,
        sparse: bool,
    ) -> CandidateRead | None: ...


@dataclass(frozen=True)
class Backend:
    """Kernels for one kind of device.

    Attributes:
        exact_read: Softmax over all rows.
        exact_top_k: Top-k over all rows.
        score_at: Scores of gathered rows.
        blend_at: Weighted sum of gathered values.
        dot_at: Dot products with gathered rows.
        blend_at_backward: Gradient of the values in ``blend_at``.
        read_at: Softmax over gathered rows in one kernel; None if the backend has no such kernel.
    """

    exact_read: ExactRead
    exact_top_k: ExactTopK
    score_at: ScoreAt
    blend_at: BlendAt
    dot_at: DotAt
    blend_at_backward: BlendAtBackward
    read_at: ReadAt | None = None


TORCH_BLOCKS = Backend(
    exact.exact_read, topk.exact_top_k, gather.score_at, gather.blend_at, gather.dot_at, gather.blend_at_backward
)


@lru_cache(maxsize=1)
def _import_cuda() -> Backend:
    """Import the kernels in Triton."""
    from softdb.kernels.cuda import candidates
    from softdb.kernels.cuda import exact as cuda_exact
    from softdb.kernels.cuda import topk as cuda_topk

    return replace(
        TORCH_BLOCKS,
        exact_read=cuda_exact.exact_read,
        exact_top_k=cuda_topk.exact_top_k,
        score_at=candidates.score_at,
        blend_at=candidates.blend_at,
        dot_at=candidates.dot_at,
        blend_at_backward=candidates.blend_at_backward,
        read_at=candidates.read_at,
    )


def backend_for(tensor: Tensor) -> Backend:
    """Return the kernels for the device of ``tensor``.

    CUDA tensors are read by kernels in Triton, where it is installed, and all others by blocks in torch.
    """
    is_on_gpu = is_deferred(tensor) and not tensor.is_cpu  # tests defer checks on the CPU, too
    return _import_cuda() if is_on_gpu and launch.is_available() else TORCH_BLOCKS
