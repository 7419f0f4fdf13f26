"""Scenarios of stores in two processes under torch.distributed, for `test_frameworks`.

Run as ``python ranks.py RANK RENDEZVOUS_FILE``. Prints a line of JSON for each scenario: its name, and "passed" or the
traceback.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import softdb
from softdb import IndexConfig, SoftKVStore
from softdb.layers import MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_

SCENARIOS: list[Callable[[int], None]] = []


def scenario(function: Callable[[int], None]) -> Callable[[int], None]:
    SCENARIOS.append(function)
    return function


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A linear layer before a store."""

    def __init__(
        self, *, rows: int = 24, capacity: int = 64, trainable: bool = True, sparse_grad: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(4))
            self.linear.bias.zero_()
        self.store = SoftKVStore(
            4, 3, trainable=trainable, sparse_grad=sparse_grad, capacity=capacity, fields=("time",), track_usage=True
        )
        self.store.add(normal(rows, 4), normal(rows, 3, seed=1), fields={"time": torch.arange(rows)})

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.store(self.linear(x), **options)


class Wrapper(nn.Module):
    """A module that contains a store."""

    def __init__(self, store: SoftKVStore) -> None:
        super().__init__()
        self.store = store

    def forward(self, query: Tensor, **options: object) -> Tensor:
        return self.store(query, **options)


@scenario
def default_ddp_leaves_each_process_its_rows(rank: int) -> None:
    for trainable in (True, False):
        model = Model(trainable=trainable)
        wrapped = DistributedDataParallel(model)
        more = 3 + 2 * rank
        ids = model.store.add(
            normal(more, 4, seed=2 + rank), normal(more, 3, seed=5 + rank), fields={"time": 100 + rank}
        )
        model.store.delete([rank])
        before = model.store.get(model.store.ids)
        ids_before, usage = model.store.ids, model.store.usage
        for mode, k in (("exact", None), ("exact", 2), ("topk", 3)):
            x = normal(5, 4, seed=rank)
            answer = wrapped(x, mode=mode, k=k)
            direct = model.store.read(model.linear(x), mode=mode, k=k).values
            torch.testing.assert_close(answer, direct)
        model.store._check()
        after = model.store.get(model.store.ids)
        assert torch.equal(model.store.ids, ids_before), "ids"
        assert torch.equal(before.keys, after.keys), "keys"
        assert torch.equal(before.values, after.values), "values"
        assert torch.equal(before.fields["time"], after.fields["time"]), "fields"
        assert int(model.store.usage.reads.sum()) > int(usage.reads.sum()), "usage"
        assert all(int(id) in model.store for id in ids), "lookups"


@scenario
def ddp_begins_with_the_rows_of_rank_0(rank: int) -> None:
    for trainable in (True, False):
        model = Model(trainable=trainable, rows=20 + rank)
        model.store.delete([rank])
        model.store.read(normal(2, 4), "topk", k=2)
        DistributedDataParallel(model)
        first = Model(trainable=trainable, rows=20)
        first.store.delete([0])
        assert torch.equal(model.store.ids, first.store.ids), model.store.ids
        assert len(model.store) == 19
        assert 0 not in model.store
        assert 1 in model.store
        assert torch.equal(model.store.get([1, 5]).keys, first.store.get([1, 5]).keys)
        model.store._check()


@scenario
def ddp_reduces_row_sparse_gradients_without_visible_embeddings(rank: int) -> None:
    model = Model(sparse_grad=True)
    wrapped = DistributedDataParallel(model)
    for root in (model, wrapped):
        kinds = [type(module).__name__ for _, module in root.named_modules()]
        assert not any("Embedding" in kind or "Sparse" in kind for kind in kinds), kinds
        assert not any(isinstance(module, nn.Embedding) for module in root.modules())
        assert any("rows.ids" in name for name, _ in root.named_buffers())
    wrapped(normal(4, 4, seed=rank), mode="topk", k=2).sum().backward()
    assert model.store.keys.grad is not None
    assert model.store.keys.grad.layout == torch.sparse_coo
    both = [torch.zeros(64, 4) for _ in range(2)]
    distributed.all_gather(both, model.store.keys.grad.to_dense())
    assert torch.equal(*both)


@scenario
def an_index_follows_rows_that_only_other_ranks_read(rank: int) -> None:
    store = SoftKVStore(4, 3, metric="l2", trainable=True, index="IVF16,Flat")
    store.add(normal(2000, 4), normal(2000, 3, seed=1))
    wrapped, x = DistributedDataParallel(store), normal(4, 4, seed=rank)
    read, before = store.read(normal(64, 4, seed=9), "topk", k=3), store.keys.detach().clone()
    assert store.index_stats().factory == "IVF16,Flat"
    optimizer = torch.optim.SGD(store.parameters(), lr=500.0)
    read = store.read(x, "topk", k=3)
    wrapped(x, mode="topk", k=3).square().sum().backward()
    optimizer.step()
    moved = (store.keys.detach() != before).any(-1).nonzero().squeeze(-1)
    assert not torch.isin(moved, read.ids).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # The store would warn of a write that it has not recorded.
        found = store.read(store.keys.detach()[moved], "topk", k=1).ids.squeeze(-1)
    assert torch.equal(found, moved)  # Each moved key finds itself.


@scenario
def default_ddp_leaves_each_process_its_counters(rank: int) -> None:
    layer = ProductKeyMemory(8, rows=16, heads=1, k=2, key_dim=4, sparse_grad=True, track_usage=True)
    wrapped = DistributedDataParallel(layer)
    for step in range(3):
        wrapped(normal(2 + rank, 8, seed=step)).sum().backward()
    assert int(layer.store.usage.reads.sum()) == 3 * 2 * (2 + rank)
    assert layer.store.weight.grad.layout == torch.sparse_coo


@scenario
def row_optimizers_refuse_shards(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model)
    for kind in (RowAdam, RowAdagrad):
        with pytest.raises(softdb.DtypeError, match=r"params: expected whole Parameters.*ignored_params"):
            kind(model.parameters(), lr=0.1)
    assert math.isfinite(float(clip_row_grad_norm_(model.parameters(), 1.0)))


@scenario
def two_processes_equal_one_on_the_joint_batch(rank: int) -> None:
    def make(sparse_grad: bool) -> SoftKVStore:
        index = IndexConfig("IVF8,Flat", recall=1.0)
        store = SoftKVStore(8, 4, trainable=True, sparse_grad=sparse_grad, index=index)
        generator = torch.Generator().manual_seed(0)
        store.add(torch.randn(300, 8, generator=generator), torch.randn(300, 4, generator=generator))
        store.reserve(400)
        return store

    def train(model: nn.Module, store: SoftKVStore, part: slice, how: dict[str, Any]) -> None:
        # Exact reads: RowAdam adds eps in another place for row-sparse gradients, which only DDP gives, than for dense.
        is_exact = how["mode"] == "exact"
        optimizer = torch.optim.SGD(store.parameters(), lr=10.0) if is_exact else RowAdam(store.parameters(), lr=0.1)
        for seed in range(6):
            optimizer.zero_grad()
            query = normal(16, 8, seed=seed)[part]
            (model(query, **how) - query[:, :4]).square().mean().backward()
            optimizer.step()

    topk: dict[str, Any] = {"mode": "topk", "k": 4}
    for sparse_grad, how in ((False, topk), (True, topk), (True, {"mode": "exact"})):
        store, single = make(sparse_grad), make(sparse_grad)
        before = store.keys.detach().clone()
        wrapped = DistributedDataParallel(Wrapper(store), broadcast_buffers=False)
        train(wrapped, store, slice(8 * rank, 8 * rank + 8), how)
        assert store.keys.grad is not None
        assert store.keys.grad.is_sparse == sparse_grad
        train(single, single, slice(None), how)
        for mine, other in zip(store.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert not torch.equal(store.keys, before)


@scenario
def zero_redundancy_optimizer(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, single = Model(), Model()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=0.1)
    plain = torch.optim.AdamW(single.parameters(), lr=0.1)
    for step in range(3):
        x = normal(8, 4, seed=step)
        for net, each, part in ((wrapped, optimizer, slice(4 * rank, 4 * rank + 4)), (single, plain, slice(None))):
            each.zero_grad()
            net(x[part], mode="topk", k=4).square().mean().backward()
            each.step()
    torch.testing.assert_close(model.store.keys, single.store.keys, atol=1e-4, rtol=1e-4)
    assert model.store.audit(normal(8, 4), k=4).mean_recall == 1.0
    model.store._check()


@scenario
def fsdp2_with_dense_gradients(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for mode, k in (("exact", None), ("exact", 3), ("topk", 3), ("hard", None)):
        model, single = Model(), Model()
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        plain = torch.optim.AdamW(single.parameters(), lr=0.1)
        for step in range(3):
            x = normal(8, 4, seed=step)
            for net, each, part in ((model, optimizer, slice(4 * rank, 4 * rank + 4)), (single, plain, slice(None))):
                each.zero_grad()
                net(x[part], mode=mode, k=k).square().mean().backward()
                each.step()
        keys = model.store.keys
        torch.testing.assert_close(keys.full_tensor(), single.store.keys.detach(), atol=1e-4, rtol=1e-4)
        with pytest.raises(softdb.ForeignWriteError, match="fully_shard"):
            model.store.read(normal(2, 4))
        with pytest.raises(softdb.ForeignWriteError, match="fully_shard"):
            model.store.add(normal(1, 4), normal(1, 3), fields={"time": 0})
        assert len(model.store) == 24


@scenario
def fsdp2_of_layers(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in (
        MemoryLayer(8, rows=32, heads=2, key_dim=4, sparse_grad=False),
        MemoryLayer(8, rows=32, heads=2, key_dim=4, mode="topk", k=4, sparse_grad=False, shared=False),
        ProductKeyMemory(8, rows=16, heads=1, k=2, key_dim=4, sparse_grad=False),
    ):
        for parameter in layer.parameters():
            distributed.broadcast(parameter.data, 0)
        fully_shard(layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for step in range(2):
            layer(normal(3, 8, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


@scenario
def fsdp2_refuses_sparse_gradients(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model(sparse_grad=True)
    fully_shard(model)
    model(normal(2, 4)).sum().backward()  # gradients of exact reads are dense
    with pytest.raises(softdb.ArgumentError, match=r"sparse_grad=False.*ignored_params"):
        model(normal(2, 4), mode="topk", k=2).sum().backward()


@scenario
def fsdp2_leaves_ignored_parameters_alone(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Model(sparse_grad=True)
    fully_shard(model, ignored_params=set(model.store.parameters()))
    model(normal(4, 4, seed=rank), mode="topk", k=2).sum().backward()
    assert model.store.keys.grad is not None
    assert model.store.keys.grad.layout == torch.sparse_coo
    RowAdam(model.store.parameters(), lr=0.1).step()
    model.store._check()


@scenario
def checkpoints_load_in_place(rank: int) -> None:
    model, other = Model(rows=30), Model(rows=7)
    model.store.delete([3])
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(folder, 0)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    assert len(other.store) == 29
    assert 3 not in other.store
    assert 29 in other.store
    assert torch.equal(other.store.ids, model.store.ids)
    assert torch.equal(other(normal(3, 4), mode="topk", k=4), model(normal(3, 4), mode="topk", k=4))
    other.store._check()


def main() -> None:
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    warnings.simplefilter("ignore")  # from torch itself
    for each in SCENARIOS:
        try:
            each(rank)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps([each.__name__, outcome]), flush=True)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
