"""Training on each device with autocast, GradScaler, torch.compile and DistributedDataParallel."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from softdb import SoftKVStore
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_, other_parameters, row_parameters

DIM = 16


def normal(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device)


def make_memory(device: torch.device, **options: Any) -> MemoryLayer:
    torch.manual_seed(0)
    return MemoryLayer(DIM, 200, heads=2, key_dim=8, **options).to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler_train_rows(dtype: torch.dtype, device: torch.device) -> None:
    layer = make_memory(device, mode="topk", k=8, sparse_grad=True)
    optimizers = [RowAdam(row_parameters(layer), lr=0.02), torch.optim.AdamW(other_parameters(layer), lr=0.01)]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    x, target = normal(64, DIM, device=device), normal(64, DIM, device=device, seed=1)
    losses = []
    for _ in range(30):
        with torch.autocast(device.type, dtype=dtype):
            y = layer(x)
            loss = (y.float() - target).square().mean()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        assert clip_row_grad_norm_(layer.parameters(), 1.0).isfinite()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        losses.append(loss.detach())
    assert all(loss.isfinite() for loss in losses)
    assert losses[-1] < 0.7 * losses[0]


def test_grad_scaler_skips_a_step_whose_gradient_overflows(device: torch.device) -> None:
    for sparse_grad in (True, False):
        store = SoftKVStore(8, 4, trainable=True, sparse_grad=sparse_grad, device=device)
        store.add(normal(50, 8, device=device), normal(50, 4, device=device, seed=1))
        optimizer, scaler = RowAdam(store.parameters(), lr=0.1), torch.amp.GradScaler(device.type, init_scale=4.0)
        before = store.values.detach().clone()
        for factor in (math.inf, 1.0):
            scaler.scale(factor * store.read(normal(3, 8, device=device), "topk", k=4).values.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert store.values.isfinite().all()
            assert torch.equal(store.values, before) == (factor == math.inf)
        assert scaler.get_scale() == 2.0
        store.check()


def test_autocast_computes_scores_in_float32(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        store = SoftKVStore(8, 4, device=device, metric="dot")
        keys = 300 * torch.ones(2, 8, device=device)  # their dot product overflows in float16
        keys[1] += 0.5
        store.add(keys, torch.tensor([[0.0] * 4, [1.0] * 4], device=device))
        with torch.autocast(device.type, dtype=dtype):
            read = store.read(keys[1:], k=2)
        assert read.values.dtype == dtype
        assert read.scores is not None
        assert (read.scores.dtype, read.lse.dtype) == (torch.float32, torch.float32)
        assert read.scores.isfinite().all()
        torch.testing.assert_close(read.values, torch.ones_like(read.values))


@pytest.mark.parametrize("optimizer", [RowAdam, RowAdagrad])
def test_half_precision_rows_train(optimizer: Any, device: torch.device) -> None:
    store = SoftKVStore(8, 4, trainable=True, sparse_grad=True, device=device, dtype=torch.bfloat16)
    store.add(normal(50, 8, device=device), normal(50, 4, device=device, seed=1))
    step, query = optimizer(store.parameters(), lr=0.05), normal(20, 8, device=device, seed=2)
    target = normal(20, 4, device=device, seed=3)
    losses = []
    for _ in range(30):
        loss = (store.read(query, "topk", k=4).values - target).square().mean()
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "exact": lambda: MemoryLayer(DIM, 200, heads=2, key_dim=8),
    "topk": lambda: MemoryLayer(DIM, 200, heads=2, key_dim=8, mode="topk", k=8, sparse_grad=True),
    "product keys": lambda: ProductKeyMemory(DIM, 256, heads=2, key_dim=8, k=8),
}


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_equal_eager_ones(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = COMPILED[name]().to(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    for seed in (1, 2):
        x = normal(3, 20, DIM, device=device, seed=seed)
        found = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(x)
            (y * normal(3, 20, DIM, device=device, seed=9)).sum().backward()
            gradients = [parameter.grad.to_dense() for parameter in layer.parameters() if parameter.grad is not None]
            found.append([y.detach(), *gradients])
        assert len(found[0]) == len(found[1])
        for eager, other in zip(*found, strict=True):
            torch.testing.assert_close(other, eager, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore")
def test_a_context_memory_runs_between_graphs(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = ContextMemory(DIM, rows=64, heads=2, key_dim=8).to(device)
    other = copy.deepcopy(layer)
    compiled: Any = torch.compile(other, backend="inductor" if device.type == "cuda" else "aot_eager")
    for seed in range(3):
        x = normal(2, 20, DIM, device=device, seed=seed)
        y, found = layer(x), compiled(x)
        torch.testing.assert_close(found, y, atol=1e-4, rtol=1e-3)
        y.square().sum().backward()
        found.square().sum().backward()
    for one, wanted in zip(other.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(one.grad, wanted.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore")
def test_reads_compiled_with_cuda_graphs_see_writes_and_count() -> None:
    device = torch.device("cuda")
    store = SoftKVStore(8, 4, device=device, track_usage=True, index="Flat")
    store.reserve(100)
    store.add(normal(50, 8, device=device), normal(50, 4, device=device, seed=1))
    encoder = nn.Linear(8, 8, device=device)
    compiled: Any = torch.compile(
        lambda query: 2 * store.read(encoder(query).tanh(), "topk", k=4).values.sin(), mode="reduce-overhead"
    )
    for step in range(6):
        query = normal(5, 8, device=device, seed=step)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(query).clone()
            wanted = 2 * store.read(encoder(query).tanh(), "topk", k=4).values.sin()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        assert int(store.usage.reads.sum()) == 2 * 20 * (step + 1)
        store.add(3 * normal(2, 8, device=device, seed=50 + step), normal(2, 4, device=device, seed=60 + step))


@pytest.fixture
def process_group(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """Make a process group of one rank, on NCCL or gloo."""
    is_gpu = device.type == "cuda"
    options: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if is_gpu else {}
    place = f"file://{tmp_path}/rendezvous"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("nccl" if is_gpu else "gloo", init_method=place, rank=0, world_size=1, **options)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_of_one_rank_trains_as_without_it(device: torch.device) -> None:
    alone = make_memory(device, mode="topk", k=8)
    inside = copy.deepcopy(alone)
    wrapped = DistributedDataParallel(inside, device_ids=[0] if device.type == "cuda" else None)
    for layer, run in ((alone, alone), (inside, wrapped)):
        optimizers = [RowAdam(row_parameters(layer), lr=0.02), torch.optim.AdamW(other_parameters(layer), lr=0.01)]
        for step in range(3):
            run(normal(32, DIM, device=device, seed=step)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(inside.state_dict(), alone.state_dict(), atol=1e-5, rtol=1e-4)
    store: Any = inside.stores[0]
    store._check()
