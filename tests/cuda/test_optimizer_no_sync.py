"""The step of a row optimizer on a GPU never waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fake_gpu import is_supported, run_program
from support.steps_on_fake_gpu import CASES, OPTIMIZERS, WAITS, make_store

from softdb.optim import clip_row_grad_norm_

needs_fake_gpu = pytest.mark.skipif(not is_supported(), reason="torch cannot register a device from Python")


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Error of each case, all of them run in one process; None where there was none."""
    return run_program("support.steps_on_fake_gpu")


@needs_fake_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_does_not_wait_for_the_device(name: str, errors: dict[str, str | None]) -> None:
    assert errors[name] is None, errors[name]


@needs_fake_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", WAITS)
def test_a_wait_in_a_step_is_found(name: str, errors: dict[str, str | None]) -> None:
    assert "in wait_in_a_step" in (errors[name] or "")


@pytest.mark.gpu
@pytest.mark.parametrize("sparse_grad", [True, False])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_on_a_gpu_does_not_synchronize(kind: Any, options: dict[str, Any], sparse_grad: bool) -> None:
    store = make_store(torch.float32, sparse_grad=sparse_grad).to("cuda")
    optimizer = kind(store.parameters(), **options)
    query = torch.randn(16, 8, device="cuda")

    def train() -> None:
        optimizer.zero_grad()
        store.read(query, "topk", k=4).values.square().mean().backward()
        clip_row_grad_norm_(store.parameters(), 1.0)
        optimizer.step()

    train()  # compiles kernels, and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    store.check()
