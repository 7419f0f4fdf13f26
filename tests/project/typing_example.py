"""Example of user code with expected types; `.ci/run` type-checks a copy outside of the project."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import softdb
from softdb import IndexConfig, SoftKVStore, errors, lab
from softdb.functional import class_weights, merge, soft_read, topk_read
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_, update_average


class Model(nn.Module):
    """Linear layer followed by a memory layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.memory = nn.Linear(dim, dim), MemoryLayer(dim, rows=16, heads=2, key_dim=4)

    def forward(self, x: Tensor, report: bool = False) -> Tensor:
        y = self.memory(self.first(x))
        assert_type(y, Tensor)
        both = self.memory(x, return_read=True)
        assert_type(both, tuple[Tensor, softdb.Read])
        assert_type(self.memory(x, return_read=report), Tensor | tuple[Tensor, softdb.Read])
        return y + both[1].values.sum()


def use_a_store() -> None:
    store = SoftKVStore(key_dim=4, value_dim=2, fields=("time",), index=IndexConfig("Flat"), trainable=True)
    ids = store.add(torch.randn(8, 4), torch.randn(8, 2), fields={"time": torch.arange(8)})
    assert_type(ids, Tensor)
    query = torch.randn(3, 4)

    def recent(row: Mapping[str, Tensor]) -> Tensor:
        return row["time"] > 3

    read = store.read(query, "topk", k=2, where=recent)
    assert_type(read, softdb.Read)
    assert_type(read.values, Tensor)
    assert_type(read.ids, Tensor | None)
    assert_type(store.get(ids), softdb.Rows)
    assert_type(store.get([[0, -1]], missing="pad"), softdb.Rows)
    assert_type(store.fields_at(ids, "time"), Tensor)
    store.read(query, where=[0, 1], exclude=[[0], [1], [2]])
    store.delete(where=[True] * 2 + [False] * 6)
    store.delete(ids.numpy()[2:3])
    store.delete(3)
    assert_type(store.device, torch.device)
    assert_type(len(store), int)
    assert_type(store.index_stats(), softdb.IndexStats)
    try:
        store.get(torch.tensor([99]))
    except errors.UnknownIdError as error:
        assert_type(str(error), str)
    for optimizer in (RowAdam([store.keys], lr=0.1), RowAdagrad([store.values], lr=0.1)):
        optimizer.zero_grad()
        store.read(query).values.sum().backward()
        clip_row_grad_norm_(store.parameters(), 1.0)
        optimizer.step()
    assert_type(lab.compare(store, query, ks=(2,)), lab.Comparison)
    store.clear()
    copied = SoftKVStore.from_tensors(query, query[:, :0], ids=[5, 6, 7], fields={"time": 1}, metric="l2")
    assert_type(copied, SoftKVStore)


def use_functions() -> None:
    query, keys, values = torch.randn(3, 4), torch.randn(8, 4), torch.randn(8, 2)
    read = topk_read(query, keys, values, torch.arange(4).expand(3, 4), metric="l2")
    assert_type(merge([read, soft_read(query, keys, values)]), softdb.Read)
    assert_type(class_weights(torch.arange(4), torch.ones(3, 4), 4), Tensor)


def use_layers() -> None:
    x = torch.randn(2, 5, 8)
    model, average = Model(8), Model(8)
    assert_type(model.forward(x), Tensor)
    update_average(average, model, 0.9)
    context = ContextMemory(8, rows=16, heads=2)
    context.reset()
    assert_type(context(x, write=False), Tensor)
    assert_type(context.forward(x, return_read=True), tuple[Tensor, softdb.Read])
    product = ProductKeyMemory(8, rows=16, heads=2, k=2, key_dim=8)
    assert_type(product(x), Tensor)
    assert_type(product(x, return_read=True)[1], softdb.Read)


def main() -> None:
    use_a_store()
    use_functions()
    use_layers()


if __name__ == "__main__":
    main()
