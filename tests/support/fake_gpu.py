"""A GPU without memory, on which any wait of the host raises an error.

Tensors of the device "fakegpu" are `FakeTensor` objects: they have shapes, but no numbers. Whatever needs a number or a
shape that depends on numbers (``.item()``, ``bool()``, ``.tolist()``, ``nonzero``, ``unique``, ``x[mask]``) raises.
`HostWaits` adds what FakeTensorMode allows: copies to the CPU, and copies from the CPU for which the host waits.

torch cannot run autograd on fake tensors of the device "cuda" if it is built for CPUs. The device is therefore torch's
"PrivateUse1". It can be registered once per process, and changes what `torch.accelerator` returns, so it is used in
processes of its own: `run_cases` runs each case of a program, and prints what it raised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import softdb
from softdb.pending_checks import defer_checks
from support.programs import check_exit

DEVICE = "fakegpu"
# Operators for which the host waits on a GPU, and which FakeTensorMode accepts.
WAITING = {"aten::_coalesce", "aten::coalesce", "aten::equal", "aten::is_nonzero", "aten::masked_select"}


def is_supported() -> bool:
    """Return whether this version of torch can register a device from Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class HostWaitError(Exception):
    """The host would wait for the GPU."""


class HostWaits(TorchDispatchMode):
    """Mode that raises for operators that FakeTensorMode accepts although the host waits.

    Operators on CPU tensors run for real, outside of FakeTensorMode: the host may compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0  # number of operators on the GPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = [tensor for tensor in inputs if tensor.device.type == DEVICE]
        device = kwargs.get("device")
        if not on_gpu and (device is None or torch.device(device).type != DEVICE):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name
        self.operators += 1
        from_host = [tensor for tensor in inputs if tensor.device.type != DEVICE and tensor.dim()]
        if from_host and not (name in ("aten::_to_copy", "aten::copy_") and _is_asynchronous(func, args, kwargs)):
            raise HostWaitError(f"{name} copies a tensor of the CPU to the GPU, and the host waits")
        if from_host:  # FakeTensorMode cannot copy from real tensors.
            return torch.empty(from_host[0].shape, dtype=kwargs.get("dtype"), device=DEVICE) if device else args[0]
        if name == "aten::_to_copy" and on_gpu and device is not None and torch.device(device).type == "cpu":
            raise HostWaitError(f"{name} copies a tensor of the GPU to the CPU")
        if name == "aten::copy_" and args[0].device.type != DEVICE:
            raise HostWaitError(f"{name} copies a tensor of the GPU to the CPU")
        if name in ("aten::add", "aten::add_") and len({tensor.layout for tensor in inputs}) > 1:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=DEVICE)  # FakeTensorMode cannot add these.
        if name in WAITING:
            raise HostWaitError(f"the host waits for {name}")
        if name.startswith("aten::index") and any(tensor.dtype == torch.bool for tensor in _indices(name, args)):
            raise HostWaitError(f"the host waits for {name} with a mask, which it converts to positions")
        return func(*args, **kwargs)


def _is_asynchronous(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a copy was requested with ``non_blocking=True``."""
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking"))


def _indices(name: str, args: Any) -> list[Tensor]:
    """Return the index tensors of ``x[...]`` or ``x[...] = y``."""
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return []
    return [index for index in args[1] if isinstance(index, Tensor)]


@contextmanager
def fake_gpu() -> Iterator[HostWaits]:
    """Make the device "fakegpu" available within the block; its tensors cannot be used after the block."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    waits = HostWaits()
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        yield waits


def move_to_fake_gpu(store: softdb.SoftKVStore) -> softdb.SoftKVStore:
    """Replace the tensors of a store by those of the fake GPU; its rows keep their places."""
    rows = store.rows
    for module in (store, rows):
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    for name, parameter in store._parameters.items():
        store._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE))
    rows._live, rows._live_slots = (-1, None), None
    rows.layout += 1  # the index describes tensors on the CPU
    rows.mark_updated()
    store._table.record_versions()
    return store


def run_cases(cases: Mapping[str, Callable[[], None]], names: list[str]) -> None:
    """Register the device, run the cases, and print the error of each as JSON, or None."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    errors: dict[str, str | None] = {}
    for name in names or cases:
        try:
            with defer_checks(DEVICE):
                cases[name]()
            errors[name] = None
        except Exception:  # whatever the wait of the host raises
            errors[name] = traceback.format_exc()
    print(json.dumps(errors), flush=True)
    os._exit(0)  # without waiting for the autograd thread of the device, which torch cannot end


def run_program(module: str, *names: str) -> dict[str, str | None]:
    """Run a module that calls `run_cases` in its own process; return the error of each case, or None."""
    folders = Path(softdb.__file__).parents[1], Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", module, *names],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
    )
    check_exit(done)
    errors: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return errors


def is_fake(tensor: object) -> bool:
    """Return whether a tensor is one of the fake GPU."""
    return isinstance(tensor, FakeTensor) and tensor.device.type == DEVICE
