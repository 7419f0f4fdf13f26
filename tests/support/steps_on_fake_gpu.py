"""Program that steps row optimizers on a fake GPU, where any wait of the host raises.

`test_optimizer_no_sync` runs it in a process of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softdb import SoftKVStore
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_
from softdb.table.hooks import register_row_optimizer
from support.fake_gpu import DEVICE, fake_gpu, is_fake, move_to_fake_gpu, run_cases

ROWS, ENTRIES = 500, 64


@register_row_optimizer
class AdamInTorch(RowAdam):
    """`RowAdam` without its kernel."""

    def _has_kernel(self, *_: Any) -> bool:
        return False


GRADIENTS = ("uncoalesced", "coalesced", "dense")
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RowAdam": (RowAdam, {}),
    "RowAdam with all options": (RowAdam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "RowAdam without its kernel": (AdamInTorch, {"weight_decay": 0.1, "amsgrad": True}),
    "RowAdagrad": (RowAdagrad, {"weight_decay": 0.1}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class CountKernels(TorchDispatchMode):
    """Count the calls of the operator that launches the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func._schema.name == "softdb::row_adam_"
        return func(*args, **(kwargs or {}))


def make_gradient(layout: str, table: torch.Tensor) -> torch.Tensor:
    if layout == "dense":
        return torch.randn(table.shape, dtype=table.dtype, device=DEVICE)
    rows = torch.arange(ENTRIES, device=DEVICE)
    values = torch.randn(ENTRIES, table.shape[1], dtype=table.dtype, device=DEVICE)
    gradient = torch.sparse_coo_tensor(rows.unsqueeze(0), values, table.shape, check_invariants=False)
    return gradient._coalesced_(layout == "coalesced")


def make_store(dtype: torch.dtype, *, sparse_grad: bool) -> SoftKVStore:
    """Make a store with free slots, some of them between its rows."""
    store = SoftKVStore(8, 4, trainable=True, sparse_grad=sparse_grad, dtype=dtype)
    store.reserve(ROWS + 50)
    ids = store.add(torch.randn(ROWS, 8, dtype=dtype), torch.randn(ROWS, 4, dtype=dtype))
    store.delete(ids[10:20])
    return store


def step(optimizer_name: str, layout: str, dtype: torch.dtype) -> None:
    """Clip gradients and step twice, without a wait of the host."""
    kind, options = OPTIMIZERS[optimizer_name]
    store = make_store(dtype, sparse_grad=True)
    with fake_gpu() as waits, CountKernels() as kernels:
        move_to_fake_gpu(store)
        optimizer = kind(store.parameters(), **options)
        version = store.rows.version
        for _ in range(2):
            for table in store.parameters():
                table.grad = make_gradient(layout, table)
            clip_row_grad_norm_(store.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert waits.operators > 20
        assert store.rows.version == version + 4  # Each step has recorded the changes of keys and of values.
        for state in optimizer.state.values():
            assert all(is_fake(value) for value in state.values() if isinstance(value, torch.Tensor))
    assert kernels.calls == (4 if kind is RowAdam and dtype != torch.float64 else 0)


def train(mode: str, options: dict[str, Any], sparse_grad: bool) -> None:
    """Read, run backward and step, three times, without a wait of the host."""
    store = make_store(torch.float32, sparse_grad=sparse_grad)
    with fake_gpu():
        move_to_fake_gpu(store)
        optimizer = RowAdam(store.parameters())
        for _ in range(3):
            read = store.read(torch.randn(16, 8, device=DEVICE), mode, **options)
            read.values.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def step_plain_parameter(layout: str) -> None:
    """Step a Parameter that no store owns, without a wait of the host."""
    with fake_gpu():
        table = torch.nn.Parameter(torch.randn(ROWS, 8, device=DEVICE))
        version = table._version
        table.grad = make_gradient(layout, table)
        RowAdam([table], weight_decay=0.1).step()
        assert table._version > version


def wait_in_a_step(wait: Callable[[torch.Tensor], Any]) -> None:
    """Step an optimizer that waits; the step has to raise."""

    class Waiting(RowAdagrad):
        def _epsilon(self, age: Any, is_dense: bool, options: dict[str, Any]) -> Any:
            wait(age)
            return super()._epsilon(age, is_dense, options)

    store = make_store(torch.float32, sparse_grad=True)
    with fake_gpu():
        move_to_fake_gpu(store)
        store.keys.grad = make_gradient("uncoalesced", store.keys)
        Waiting(store.parameters()).step()


CASES: dict[str, Callable[[], None]] = {
    f"{name}, {layout}, {dtype}": functools.partial(step, name, layout, DTYPES[dtype])
    for name in OPTIMIZERS
    for layout in GRADIENTS
    for dtype in (DTYPES if name == "RowAdam" else ("float32",))
}
CASES |= {
    f"train with {mode} reads, {'row-sparse' if sparse_grad else 'dense'}": functools.partial(
        train, mode, {"k": 4} if mode == "topk" else {}, sparse_grad
    )
    for mode in ("exact", "topk", "hard")
    for sparse_grad in (False, True)
}
CASES |= {f"plain Parameter, {layout}": functools.partial(step_plain_parameter, layout) for layout in GRADIENTS}
WAITS: dict[str, Callable[[], None]] = {
    "item": functools.partial(wait_in_a_step, lambda age: age.max().item()),
    "bool": functools.partial(wait_in_a_step, lambda age: bool((age > 1).any())),
    "unique": functools.partial(wait_in_a_step, lambda age: age.unique()),
    "cpu": functools.partial(wait_in_a_step, lambda age: age.cpu()),
}

if __name__ == "__main__":
    run_cases(CASES | WAITS, sys.argv[1:])
