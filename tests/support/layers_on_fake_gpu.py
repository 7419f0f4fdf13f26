"""Program that runs layers and `soft_read` on a fake GPU, where any wait of the host raises an error.

`test_layers_no_sync` runs it in a process of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from softdb import SoftKVStore
from softdb.functional import soft_read
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.reading import attention
from support.attention import NAIVE
from support.fake_gpu import DEVICE, fake_gpu, is_fake, move_to_fake_gpu, run_cases

DIM, COUNT = 16, 70
TOKENS = (2, COUNT, DIM)  # shape of an input of a layer


def move_layer(layer: nn.Module) -> None:
    """Replace the tensors of a layer by those of the fake GPU."""
    stores = [module for module in layer.modules() if isinstance(module, SoftKVStore)]
    inside = {part for store in stores for part in store.modules()}
    for module in layer.modules():
        if module in inside:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake)
    for store in stores:
        move_to_fake_gpu(store)


def step(make: Callable[[], nn.Module], documents: bool = False) -> None:
    """Run forward and backward of a layer, three times, without a wait of the host."""
    layer, options = make(), {}
    with fake_gpu() as waits:
        move_layer(layer)
        if documents:
            options["documents"] = torch.zeros(TOKENS[:-1], dtype=torch.int64, device=DEVICE)
        for _ in range(3):
            x = torch.randn(TOKENS, device=DEVICE, requires_grad=True)
            y = layer(x, **options)
            assert is_fake(y)
            y.sum().backward()
            assert is_fake(x.grad)
            layer.zero_grad()
            with torch.no_grad():
                assert is_fake(layer(x, **options))
        assert waits.operators > 20


def attend(mask: bool, **options: Any) -> None:
    """Run forward and backward of `soft_read` without a wait of the host."""
    with fake_gpu() as waits:
        leaves = [torch.randn(2, 3, COUNT, DIM, device=DEVICE, requires_grad=True) for _ in range(3)]
        shown = torch.ones(COUNT, COUNT, dtype=torch.bool, device=DEVICE) if mask else None
        if "temperature" in options:
            options["temperature"] = torch.ones(COUNT, device=DEVICE, requires_grad=True)
        read = soft_read(*leaves, mask=shown, **options)
        (read.values.sum() + read.lse.sum()).backward()
        assert all(is_fake(leaf.grad) for leaf in leaves)
        assert waits.operators > 20


def memory(**options: Any) -> Callable[[], nn.Module]:
    return lambda: MemoryLayer(DIM, 300, heads=2, key_dim=8, **options)


def product(**options: Any) -> Callable[[], nn.Module]:
    return lambda: ProductKeyMemory(DIM, 64, heads=2, key_dim=8, k=4, **options)


def context(**options: Any) -> Callable[[], nn.Module]:
    return lambda: ContextMemory(DIM, rows=100, heads=2, key_dim=8, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "MemoryLayer": memory(),
    "MemoryLayer with top-k reads": memory(mode="topk", k=4),
    "MemoryLayer with row-sparse gradients": memory(mode="topk", k=4, sparse_grad=True),
    "MemoryLayer with learned temperatures": memory(temperature="learnable"),
    "MemoryLayer with a store for each head": memory(shared=False),
    "ProductKeyMemory": product(),
    "ProductKeyMemory with row-sparse gradients": product(sparse_grad=True),
    "ProductKeyMemory with learned temperatures": product(temperature="learnable"),
    "ContextMemory": context(),
    "ContextMemory with learned temperatures": context(temperature="learnable"),
}
CASES: dict[str, Callable[[], None]] = {name: functools.partial(step, make) for name, make in LAYERS.items()}
CASES |= {
    "ContextMemory with documents": functools.partial(step, context(), documents=True),
    "soft_read": functools.partial(attend, mask=False),
    "soft_read with a mask": functools.partial(attend, mask=True),
    "soft_read with k": functools.partial(attend, mask=False, k=4),
    "soft_read with a temperature tensor": functools.partial(attend, mask=False, temperature="tensor"),
}

if __name__ == "__main__":
    attention.choose_kernels = lambda *shapes, **options: NAIVE  # type: ignore[assignment]  # torch has none for the device
    run_cases(CASES, sys.argv[1:])
