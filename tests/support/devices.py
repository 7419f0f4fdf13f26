"""Run tests that were written for the CPU on another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

RANDOM_FACTORIES = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm})


class SameNumbers(TorchFunctionMode):
    """Draw random tensors on the CPU and copy them: every device gets the same numbers, from CPU generators.

    Tensors made with ``device=`` are not affected.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in RANDOM_FACTORIES or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        return function(*args, **kwargs, device="cpu").to(self.device).requires_grad_(wanted)


@contextmanager
def default_device(device: torch.device) -> Iterator[None]:
    """Create tensors without ``device=`` on ``device``, with the random numbers that the CPU would draw."""
    torch.set_default_device(device)
    try:
        with SameNumbers(device):
            yield
    finally:
        torch.set_default_device(None)
