"""Tests of kernels in Triton.

On a machine with a CUDA device the tests run compiled kernels on it. Elsewhere they run the interpreter of Triton on
CPU tensors: `tests/conftest.py` sets ``TRITON_INTERPRET=1`` before Triton is imported. A test module starts with
``pytest.importorskip("triton")``, and imports modules with kernels after it::

    pytest.importorskip("triton")

    from softdb.kernels.cuda import forward
    from support.triton import DEVICE, compile_for_hopper
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

__all__ = ["DEVICE", "Compiled", "Variant", "compile_for_hopper"]

# Device of the operands of kernels.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PROGRAM = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
results = []
for variant in json.loads(sys.stdin.read()):
    kernel = getattr(importlib.import_module(variant["module"]), variant["kernel"])
    constants = variant["constants"]
    signature = {name: "constexpr" if name in constants else variant["types"][name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): constants[name] for name in constants})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=variant["options"])
    results.append({"shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"] if variant["keep_ptx"] else ""})
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Variant:
    """Kernel with the types and constants of one launch.

    Attributes:
        module: Module of the kernel.
        kernel: Name of the kernel.
        types: Types of the arguments in Triton's notation, such as "*fp32" and "i32".
        constants: Values of the compile-time arguments; a pointer that is None is one, too.
        options: Options such as ``num_warps``.
        keep_ptx: Whether to return the assembly.
    """

    module: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_ptx: bool = False


@dataclass(frozen=True)
class Compiled:
    """Properties of a compiled kernel.

    Attributes:
        shared: Shared memory in bytes; a multiprocessor of Hopper has 227 KiB for a kernel.
        ptx: Assembly, or an empty string.
    """

    shared: int
    ptx: str


def compile_for_hopper(variants: Sequence[Variant]) -> list[Compiled]:
    """Compile kernels for Hopper, without a GPU, in a process without Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    text = json.dumps([asdict(variant) for variant in variants])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=text, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**result) for result in json.loads(done.stdout)]
