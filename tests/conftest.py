"""Settings for all tests."""

from __future__ import annotations

import gc
import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the test processes: threads that wait spin, and take cores from others.

    Also choose how kernels of Triton run.
    """
    processes = len(getattr(config.option, "tx", None) or [])
    if processes and not hasattr(config, "workerinput"):
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported; workers inherit it
    if not processes or hasattr(config, "workerinput"):
        interpret_triton()


def interpret_triton() -> None:
    """Run kernels of Triton in its interpreter if there is no CUDA device.

    Triton reads the variable when it is imported, and tests of other things import it, too.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that open a browser, and run slow tests first, so that no process waits for one at the end."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    items.sort(key=lambda item: ("test_examples" not in item.nodeid, item.get_closest_marker("slow") is None))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude what was collected from garbage collection: it lives to the end, and tests collect garbage often."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo `pytest_collection_finish`: plugins that are imported last may look for referrers, which it hides."""
    gc.unfreeze()
