"""Kernels in Triton are launched on the device of their tensors, which may not be the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from support.triton_kernels import DEVICE

from softdb.kernels.cuda import gather, gather_backward, topk

TABLE = torch.randn(70, 4, device=DEVICE)
QUERY = torch.randn(2, 4, device=DEVICE)
INDEX = torch.tensor([[0, 3], [5, -1]], device=DEVICE)
WEIGHTS = torch.rand(2, 2, device=DEVICE)
NEEDS = True, True, True
CALLS: dict[str, tuple[Any, Callable[[], object]]] = {
    "score": (gather, lambda: gather.score_candidates(QUERY, None, TABLE, INDEX, "dot")),
    "blend": (gather, lambda: gather.blend_rows(WEIGHTS, TABLE, INDEX)),
    "read": (gather, lambda: gather.read_rows(QUERY, None, TABLE, TABLE, INDEX, None, "dot")),
    "read backward": (
        gather_backward,
        lambda: gather_backward.read_rows_backward(
            QUERY, None, TABLE, TABLE, INDEX, WEIGHTS, QUERY, None, None, None, QUERY, "dot", *NEEDS
        ),
    ),
    "sum by row": (
        gather_backward,
        lambda: gather_backward.sum_by_row(*INDEX.flatten().sort(stable=True), WEIGHTS, QUERY, None, TABLE, "dot"),
    ),
    "top-k": (
        topk,
        lambda: topk.find_best_rows(QUERY, None, TABLE, None, None, 70, 1, "dot", 2**20, 4, "ieee"),
    ),
}


class _Guarded:
    """Kernel that may only be launched inside of a context."""

    def __init__(self, kernel: Any, active: list[Tensor]) -> None:
        self._kernel, self._active = kernel, active

    def __getitem__(self, grid: Any) -> Any:
        assert self._active
        return self._kernel[grid]


@pytest.mark.parametrize("name", CALLS)
def test_kernels_are_launched_on_the_device_of_their_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, call = CALLS[name]
    active: list[Tensor] = []
    seen: list[torch.device] = []

    @contextmanager
    def record(tensor: Tensor) -> Iterator[None]:
        active.append(tensor)
        seen.append(tensor.device)
        yield
        active.pop()

    monkeypatch.setattr(module, "on_device", record)
    for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
        monkeypatch.setattr(module, kernel, _Guarded(getattr(module, kernel), active))
    call()
    assert seen == [QUERY.device]
