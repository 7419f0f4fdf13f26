"""Layers beside the packages that offer the same, and beside torch's attention.

The peers are not among softdb's own extras; without them their columns are empty::

    pip install --no-deps product-key-memory==0.3.0 memorizing-transformers-pytorch==0.4.1 colt5-attention \
        local-attention hyper-connections torch-einops-utils einops-exts einops joblib filelock

``--no-deps``, since the second asks for faiss-gpu, which overwrites the files of faiss-cpu.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case, Contestant, main
from torch import Tensor, nn

from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdam

DIM, TOKENS = 256, 256


def cases(small: bool) -> Iterator[Case]:
    """Product keys, attention over the past, and attention over learned rows."""
    yield from _product_keys(64, 32, 16) if small else _product_keys(1024, 128, TOKENS)
    yield _context(2, 64, 8) if small else _context(16, 8192, 64)
    yield _attention(64, 16) if small else _attention(4096, TOKENS)


def _found(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _backward(layer: nn.Module, x: Tensor, **options: Any) -> None:
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x, **options)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()


# -- product keys ------------------------------------------------------------------------------------------------------


def _product_keys(n: int, fewer: int, tokens: int) -> Iterator[Case]:
    def x() -> Tensor:  # other tokens each time: the same ones' rows would lie in the cache
        return torch.randn(1, tokens, DIM)

    def own(count: int) -> tuple[ProductKeyMemory, Contestant]:
        layer = ProductKeyMemory(DIM, count * count, heads=4, k=32, key_dim=256)
        values = layer.store.weight
        optimizers: list[torch.optim.Optimizer] = [
            RowAdam([values], lr=1e-3),
            torch.optim.Adam([parameter for parameter in layer.parameters() if parameter is not values], lr=1e-3),
        ]
        return layer, lambda: _step(layer, optimizers, x())

    many, step = own(n)
    _, step_of_few = own(fewer)
    yield Case(
        f"step, {n * n:,} values, beside fewer",
        softdb={"ProductKeyMemory": step},
        peers={f"{fewer * fewer:,} values": step_of_few},
        claims={("ProductKeyMemory", f"{fewer * fewer:,} values"): 2.5},
    )
    forward: dict[str, Contestant] = {}
    peers: dict[str, Contestant] = {}
    package = _found("product_key_memory")
    if package is not None:
        theirs = package.PKM(DIM, heads=4, num_keys=n, topk=32, dim_head=128)
        adam: list[torch.optim.Optimizer] = [torch.optim.Adam(theirs.parameters(), lr=1e-3)]
        peers["product-key-memory"] = lambda: _step(theirs, adam, x())
        forward["product-key-memory"] = lambda: theirs(x())
        forward["product-key-memory, no gradient"] = lambda: _without(theirs, x())
    yield Case(
        f"step, {n * n:,} values",
        softdb={"ProductKeyMemory": step},
        peers=peers,
        claims={("ProductKeyMemory", "product-key-memory"): 0.04},
    )
    yield Case(
        f"forward, {n * n:,} values",
        softdb={"ProductKeyMemory": lambda: many(x()), "no gradient": lambda: _without(many, x())},
        peers=forward,
        claims={
            ("ProductKeyMemory", "product-key-memory"): 0.85,
            ("no gradient", "product-key-memory, no gradient"): 0.85,
        },
    )


def _step(layer: nn.Module, optimizers: list[torch.optim.Optimizer], x: Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    layer(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def _without(layer: nn.Module, x: Tensor) -> None:
    layer(x)


# -- the past ----------------------------------------------------------------------------------------------------------


def _context(batch: int, past: int, length: int) -> Case:
    def x() -> Tensor:
        return torch.randn(batch, length, DIM, requires_grad=True)

    def filled(k: int | None) -> Contestant:
        layer = ContextMemory(DIM, past, heads=8, key_dim=64, k=k)
        with torch.no_grad():
            for _ in range(past // length + 1):
                layer(x())
        return lambda: _backward(layer, x())

    peers: dict[str, Contestant] = {}
    module = _found("memorizing_transformers_pytorch.memorizing_transformers_pytorch")
    if module is not None:
        memory = importlib.import_module("memorizing_transformers_pytorch.knn_memory")
        folder = tempfile.TemporaryDirectory()
        for name, processes in (("memorizing-transformers", False), ("with its processes", True)):
            attention = module.KNNAttention(dim=DIM, heads=8, dim_head=64, num_retrieved_memories=32)
            file = str(Path(folder.name) / name)
            # Twice the room: at its end it forgets everything.
            knn = memory.KNNMemory(64, 2 * past, num_indices=batch, memmap_filename=file, multiprocessing=processes)
            knn.folder = folder  # goes when the last of them goes
            with torch.no_grad():
                for _ in range(past // (8 * length)):
                    attention(torch.randn(batch, 8 * length, DIM), knn_memory=knn)
            peers[name] = lambda attention=attention, knn=knn: _backward(attention, x(), knn_memory=knn)  # type: ignore[misc]
    return Case(
        f"step, {batch} segments of {length}, {past:,} tokens past",
        softdb={"ContextMemory": filled(None), "ContextMemory, k=32": filled(32)},
        peers=peers,
        claims={("ContextMemory", "memorizing-transformers"): 0.2},
    )


# -- learned rows ------------------------------------------------------------------------------------------------------


def _attention(rows: int, tokens: int) -> Case:
    dim, heads = 512, 8
    attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
    table = nn.Parameter(torch.randn(1, rows, dim))

    def theirs() -> None:
        table.grad = None
        for parameter in attention.parameters():
            parameter.grad = None
        x = torch.randn(1, tokens, dim, requires_grad=True)
        attention(x, table, table, need_weights=False)[0].square().sum().backward()

    layers = {
        "MemoryLayer": MemoryLayer(dim, rows, heads=heads, key_dim=dim // heads),
        "a store a head": MemoryLayer(dim, rows, heads=heads, key_dim=dim // heads, shared=False),
    }
    ways = {
        name: lambda layer=layer: _backward(layer, torch.randn(1, tokens, dim, requires_grad=True))
        for name, layer in layers.items()
    }
    return Case(
        f"forward and backward, {rows:,} rows, {heads} heads, {tokens} tokens",
        softdb=ways,
        peers={"MultiheadAttention": theirs},
        claims={(name, "MultiheadAttention"): 1.0 for name in ways},
    )


if __name__ == "__main__":
    main("layers", cases)
