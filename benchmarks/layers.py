"""Layers, compared with packages of similar layers and with torch's attention.

The packages are not part of softdb's extras. Without them their columns are empty::

    pip install --no-deps product-key-memory==0.3.0 memorizing-transformers-pytorch==0.4.1 colt5-attention \
        local-attention hyper-connections torch-einops-utils einops-exts einops joblib filelock

``--no-deps`` is needed because the second depends on faiss-gpu, which overwrites the files of faiss-cpu.
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
    """Yield product keys, attention over past tokens, and attention over learned rows."""
    yield from _make_product_key_cases(64, 32, 16) if small else _make_product_key_cases(1024, 128, TOKENS)
    yield _make_context_case(2, 64, 8) if small else _make_context_case(16, 8192, 64)
    yield _make_attention_case(64, 16) if small else _make_attention_case(4096, TOKENS)


def _try_import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _run_backward(layer: nn.Module, x: Tensor, **options: Any) -> None:
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x, **options)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()


# -- product keys ------------------------------------------------------------------------------------------------------


def _make_product_key_cases(n: int, fewer: int, tokens: int) -> Iterator[Case]:
    def x() -> Tensor:  # New tokens at each call, since the rows of the same tokens would be in the cache.
        return torch.randn(1, tokens, DIM)

    def make_own(count: int) -> tuple[ProductKeyMemory, Contestant]:
        layer = ProductKeyMemory(DIM, count * count, heads=4, k=32, key_dim=256, sparse_grad=True)
        values = layer.store.weight
        optimizers: list[torch.optim.Optimizer] = [
            RowAdam([values], lr=1e-3),
            torch.optim.Adam([parameter for parameter in layer.parameters() if parameter is not values], lr=1e-3),
        ]
        return layer, lambda: _step(layer, optimizers, x())

    layer, step = make_own(n)
    _, small_step = make_own(fewer)
    yield Case(
        f"step, {n * n:,} values, beside fewer",
        softdb={"ProductKeyMemory": step},
        peers={f"{fewer * fewer:,} values": small_step},
        claims={("ProductKeyMemory", f"{fewer * fewer:,} values"): 2.5},
    )
    forward: dict[str, Contestant] = {}
    peers: dict[str, Contestant] = {}
    package = _try_import("product_key_memory")
    if package is not None:
        theirs = package.PKM(DIM, heads=4, num_keys=n, topk=32, dim_head=128)
        adam: list[torch.optim.Optimizer] = [torch.optim.Adam(theirs.parameters(), lr=1e-3)]
        peers["product-key-memory"] = lambda: _step(theirs, adam, x())
        forward["product-key-memory"] = lambda: theirs(x())
        forward["product-key-memory, no gradient"] = lambda: _run_no_grad(theirs, x())
    yield Case(
        f"step, {n * n:,} values",
        softdb={"ProductKeyMemory": step},
        peers=peers,
        claims={("ProductKeyMemory", "product-key-memory"): 0.04},
    )
    yield Case(
        f"forward, {n * n:,} values",
        softdb={"ProductKeyMemory": lambda: layer(x()), "no gradient": lambda: _run_no_grad(layer, x())},
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
def _run_no_grad(layer: nn.Module, x: Tensor) -> None:
    layer(x)


# -- past tokens -------------------------------------------------------------------------------------------------------


def _make_context_case(batch: int, past: int, length: int) -> Case:
    def x() -> Tensor:
        return torch.randn(batch, length, DIM, requires_grad=True)

    def make_own(k: int | None) -> Contestant:
        layer = ContextMemory(DIM, past, heads=8, key_dim=64, k=k)
        with torch.no_grad():
            for _ in range(past // length + 1):
                layer(x())
        return lambda: _run_backward(layer, x())

    peers: dict[str, Contestant] = {}
    module = _try_import("memorizing_transformers_pytorch.memorizing_transformers_pytorch")
    if module is not None:
        memory = importlib.import_module("memorizing_transformers_pytorch.knn_memory")
        folder = tempfile.TemporaryDirectory()
        for name, processes in (("memorizing-transformers", False), ("with its processes", True)):
            attention = module.KNNAttention(dim=DIM, heads=8, dim_head=64, num_retrieved_memories=32)
            file = str(Path(folder.name) / name)
            # Twice the capacity, since a full memory is cleared.
            knn = memory.KNNMemory(64, 2 * past, num_indices=batch, memmap_filename=file, multiprocessing=processes)
            knn.folder = folder  # Keeps the temporary folder until the last memory is freed.
            with torch.no_grad():
                for _ in range(past // (8 * length)):
                    attention(torch.randn(batch, 8 * length, DIM), knn_memory=knn)
            peers[name] = lambda attention=attention, knn=knn: _run_backward(attention, x(), knn_memory=knn)  # type: ignore[misc]
    return Case(
        f"step, {batch} segments of {length}, {past:,} tokens past",
        softdb={"ContextMemory": make_own(None), "ContextMemory, k=32": make_own(32)},
        peers=peers,
        claims={("ContextMemory", "memorizing-transformers"): 0.2},
    )


# -- learned rows ------------------------------------------------------------------------------------------------------


def _make_attention_case(rows: int, tokens: int) -> Case:
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
    contestants = {
        name: lambda layer=layer: _run_backward(layer, torch.randn(1, tokens, dim, requires_grad=True))
        for name, layer in layers.items()
    }
    return Case(
        f"forward and backward, {rows:,} rows, {heads} heads, {tokens} tokens",
        softdb=contestants,
        peers={"MultiheadAttention": theirs},
        claims={(name, "MultiheadAttention"): 1.0 for name in contestants},
    )


if __name__ == "__main__":
    main("layers", cases)
