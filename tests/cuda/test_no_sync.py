"""Reads of a store on a GPU and their backward never wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fake_gpu import is_supported, run_program
from support.reads_on_fake_gpu import CASES, QUERIES, READS, ROWS, STORES, WAITS, WIDTH

from softdb import SoftKVStore

needs_fake_gpu = pytest.mark.skipif(not is_supported(), reason="torch cannot register a device from Python")


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Error of each case, all of them run in one process; None where there was none."""
    return run_program("support.reads_on_fake_gpu")


@needs_fake_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_read_and_its_backward_do_not_wait_for_the_device(name: str, errors: dict[str, str | None]) -> None:
    assert errors[name] is None, errors[name]


@needs_fake_gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", WAITS)
def test_a_wait_in_a_read_is_found(name: str, errors: dict[str, str | None]) -> None:
    assert "in wait_in_a_read" in (errors[name] or "")


@pytest.mark.gpu
@pytest.mark.parametrize("store_options", STORES.values(), ids=STORES)
@pytest.mark.parametrize("options", READS.values(), ids=READS)
def test_a_read_on_a_gpu_does_not_synchronize(options: dict[str, Any], store_options: dict[str, Any]) -> None:
    options = dict(options)
    rows, queries = options.pop("rows", ROWS), options.pop("queries", QUERIES)
    store = SoftKVStore(WIDTH, WIDTH + 8, device="cuda", **store_options)
    ids = store.add(torch.randn(rows, WIDTH, device="cuda"), torch.randn(rows, WIDTH + 8, device="cuda"))
    store.delete(ids[: options.pop("deleted", 0)])
    query = torch.randn(queries, WIDTH, device="cuda", requires_grad=True)
    if "where" in options:
        options["where"] = torch.rand(len(store), device="cuda") < 0.7
    if "temperature" in options:
        options["temperature"] = torch.ones(queries, device="cuda", requires_grad=True)
    if "bias" in options:
        options["bias"] = torch.zeros(len(store), device="cuda", requires_grad=True)
    store.read(query, **options).values.sum().backward()  # compiles kernels, and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            read = store.read(query, **options)
            (read.values.sum() + read.lse.sum()).backward()
        with torch.no_grad():
            store.read(query, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    store.check()
