"""Layers and `soft_read` on a GPU, and their backward, never wait for the device."""

from __future__ import annotations

import pytest
import torch
from support.fake_gpu import is_supported, run_program
from support.layers_on_fake_gpu import CASES, LAYERS, TOKENS
from torch import nn

from softdb.functional import soft_read


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Error of each case, all of them run in one process; None where there was none."""
    return run_program("support.layers_on_fake_gpu")


@pytest.mark.skipif(not is_supported(), reason="torch cannot register a device from Python")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_layer_and_its_backward_do_not_wait_for_the_device(name: str, errors: dict[str, str | None]) -> None:
    assert errors[name] is None, errors[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_gpu_does_not_synchronize(name: str) -> None:
    layer: nn.Module = LAYERS[name]().to("cuda")
    steps = [torch.randn(TOKENS, device="cuda", requires_grad=True) for _ in range(4)]
    layer(steps[0]).sum().backward()  # compiles kernels, and fills caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in steps[1:]:
            layer(x).sum().backward()
            layer.zero_grad()
            with torch.no_grad():
                layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_attention_on_a_gpu_does_not_synchronize() -> None:
    leaves = [torch.randn(2, 4, 100, 32, device="cuda", requires_grad=True) for _ in range(3)]
    mask = torch.ones(100, 100, dtype=torch.bool, device="cuda").tril()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for shown in (None, mask):
                read = soft_read(*leaves, mask=shown)
                (read.values.sum() + read.lse.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
