"""Tests of kernels in Triton.

On a machine with a CUDA device the tests run compiled kernels on it. Elsewhere they run the interpreter of Triton on
CPU tensors: `tests/conftest.py` sets ``TRITON_INTERPRET=1`` before Triton is imported. A test module starts with
``pytest.importorskip("triton")``, and imports modules with kernels after it::

    pytest.importorskip("triton")

    from softdb.kernels.cuda import forward
    from support.triton_kernels import DEVICE

Kernels can be compiled for Hopper without a GPU: `record_launches` records what a function would launch, and
`compile_for_hopper` compiles it.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["DEVICE", "MAX_SHARED", "Compiled", "Launch", "compile_for_hopper", "record_launches"]

# Device of the operands of kernels.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Shared memory of a kernel on Hopper, in bytes.
MAX_SHARED = 227 * 1024

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

PROGRAM = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for launch in json.loads(sys.stdin.read()):
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    types, place = launch["types"], kernel.arg_names.index
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(place(name),): value for name, value in launch["constants"].items()}
    aligned = {(place(name),): [["tt.divisibility", 16]] for name in launch["aligned"]}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=launch["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    print(json.dumps([compiled.metadata.shared, int(registers), int(stack)]))
"""


@dataclass(frozen=True)
class Launch:
    """Launch of a kernel.

    Attributes:
        module: Name of the module of the kernel.
        kernel: Name of the kernel.
        types: Types of the arguments in Triton's notation, such as "*fp32" and "i32".
        aligned: Names of the arguments that are divisible by 16.
        constants: Values of the compile-time arguments; a pointer that is None is one, too.
        options: Options such as ``num_warps``.
    """

    module: str
    kernel: str
    types: dict[str, str]
    aligned: list[str]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """Properties of a compiled kernel.

    Attributes:
        shared: Shared memory in bytes.
        registers: Number of registers of a thread.
        stack: Local memory of a thread in bytes, to which registers spill.
    """

    shared: int
    registers: int
    stack: int


class _Recorder:
    """Kernel that records its launches instead of running."""

    def __init__(self, module: str, name: str, kernel: Any, launches: list[Launch]) -> None:
        self._module, self._name, self._launches = module, name, launches
        self._parameters = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid: object) -> Any:
        return self._record

    def _record(self, *args: Any, **options: Any) -> None:
        named = dict(zip(self._parameters, args, strict=False))
        named.update({name: options.pop(name) for name in list(options) if name in self._parameters})
        launch = Launch(self._module, self._name, {}, [], {}, options)
        for name, value in named.items():
            if isinstance(value, Tensor):
                launch.types[name] = TYPES[value.dtype]
                launch.aligned.append(name)
            elif name.isupper() or value is None or (type(value) is int and value == 1):
                launch.constants[name] = value
            elif isinstance(value, float):
                launch.types[name] = "fp32"
            else:
                launch.types[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    launch.aligned.append(name)
        self._launches.append(launch)


@contextmanager
def record_launches(module: ModuleType, *kernels: str) -> Iterator[list[Launch]]:
    """Record the launches of kernels, which then do not run."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in kernels:
            patch.setattr(module, name, _Recorder(module.__name__, name, getattr(module, name), launches))
        yield launches


def compile_for_hopper(launches: Sequence[Launch]) -> list[Compiled]:
    """Compile launches for Hopper, in a process without Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    text = json.dumps([asdict(launch) for launch in launches])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=text, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{len(done.stdout.splitlines())} compiled, then:\n{done.stderr}"
    return [Compiled(*json.loads(line)) for line in done.stdout.splitlines()]
