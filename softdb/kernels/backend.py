"""`backend_for`: the one place where the implementation of the kernels is chosen, by device and dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from softdb.kernels import gather
from softdb.kernels.cpu import exact, topk
from softdb.kernels.spec import BestRows, ReadSpec

__all__ = ["Backend", "backend_for"]


class ExactRead(Protocol):
    """Softmax over all rows, and its backward; as `softdb.kernels.cpu.exact.exact_read`."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, spec: ReadSpec, groups: int = 1, k: int = 0
    ) -> tuple[Tensor, Tensor, BestRows | None]: ...


class ExactTopK(Protocol):
    """The k best of all rows; as `softdb.kernels.cpu.topk.exact_top_k`."""

    def __call__(self, query: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> tuple[Tensor, Tensor]: ...


class ScoresAt(Protocol):
    """The scores of gathered rows; as `softdb.kernels.gather.scores_at`."""

    def __call__(self, query: Tensor, keys: Tensor, numbers: Tensor, spec: ReadSpec) -> Tensor: ...


class BlendAt(Protocol):
    """The weighted sum of gathered values; as `softdb.kernels.gather.blend_at`."""

    def __call__(self, weights: Tensor, values: Tensor, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """The kernels of one kind of device: exact read, exact top-k, and score and blend of gathered rows."""

    exact_read: ExactRead
    exact_top_k: ExactTopK
    scores_at: ScoresAt
    blend_at: BlendAt


TORCH_BLOCKS = Backend(exact.exact_read, topk.exact_top_k, gather.scores_at, gather.blend_at)


def backend_for(tensor: Tensor) -> Backend:
    """Return the kernels for ``tensor``: blocks in torch, on every device so far."""
    return TORCH_BLOCKS
