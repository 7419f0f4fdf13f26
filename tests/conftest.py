"""Settings for all tests, and the devices that they run on."""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

GPU = "cuda"  # the type of the device of tests marked `gpu`
# Tests of one function that run on a GPU as well, of all its parameters.
MAX_GPU_VARIANTS = 2
# Folders and files of tests that run on a GPU, in an order in which a failure explains later ones.
GPU_ORDER = (
    "kernels",
    "functional",
    "reading",
    "scoring",
    "filters",
    "store",
    "table",
    "interop/test_training.py",
    "optim",
    "layers",
    "snapshot",
    "interop/test_compile.py",
)


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests marked `each_device`, or that use the fixture `device`, on the CPU and on a GPU."""
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    named = "device" in inspect.signature(metafunc.function).parameters
    if not (named or "each_device" in marks) or marks & {"gpu", "cpu_only"} or parametrizes(metafunc, "device"):
        return
    devices = [pytest.param("cpu", id=pytest.HIDDEN_PARAM), pytest.param(GPU, marks=pytest.mark.gpu, id="cuda")]
    metafunc.parametrize("device", devices, indirect=True)


def parametrizes(metafunc: pytest.Metafunc, name: str) -> bool:
    return any(name in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Leave out most of the tests of a function on a GPU: those on the CPU cover the parameters."""
    found = yield
    if not isinstance(found, list):
        return found
    variants = [item for item in found if is_gpu_variant(item)]
    count = min(MAX_GPU_VARIANTS, len(variants))
    chosen = {variants[step * (len(variants) - 1) // max(1, count - 1)] for step in range(count)}
    return [item for item in found if item in chosen or not is_gpu_variant(item)]


def is_gpu_variant(item: object) -> bool:
    return isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.callspec.params.get("device") == GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that open a browser, and sort the tests.

    Slow tests are first, so that no process waits for one at the end; tests on a GPU are last, in the order of
    `GPU_ORDER`.
    """
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    items.sort(key=place)


def place(item: pytest.Item) -> tuple[int, bool, bool]:
    if item.get_closest_marker("gpu"):
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        area = [number for number, start in enumerate(GPU_ORDER) if path.startswith(start)]
        return (1 + (area[0] if area else len(GPU_ORDER)), True, True)
    return (0, "test_examples" not in item.nodeid, item.get_closest_marker("slow") is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude what was collected from garbage collection: it lives to the end, and tests collect garbage often."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo `pytest_collection_finish`: plugins that are imported last may look for referrers, which it hides."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, before any fixture is made."""
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")


@functools.cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the test runs on: the CPU, or a CUDA device in tests marked `gpu`."""
    import torch

    return torch.device(GPU if request.node.get_closest_marker("gpu") else "cpu")


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest, device: object) -> Iterator[None]:
    """Make the device of a test marked `each_device` the default device."""
    marks = {mark.name for mark in request.node.iter_markers()}
    if not {"gpu", "each_device"} <= marks:
        yield
        return
    from support.devices import default_device

    with default_device(device):
        yield
