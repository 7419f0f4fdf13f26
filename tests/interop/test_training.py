"""Training with a store: gradients, mixed precision, several processes, writes between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tolerances import allclose
from torch import Tensor, nn

from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_

pytestmark = pytest.mark.each_device

INDEX = IndexConfig("IVF8,Flat", recall=1.0)


def make(rows: int = 300, seed: int = 0, *, sparse_grad: bool = True, **options: Any) -> SoftKVStore:
    generator = torch.Generator().manual_seed(seed)
    store = SoftKVStore(8, 4, trainable=True, sparse_grad=sparse_grad, index=INDEX, **options)
    store.add(torch.randn(rows, 8, generator=generator), torch.randn(rows, 4, generator=generator))
    return store


def queries(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


WAYS: list[dict[str, Any]] = [{"mode": "topk", "k": 5}, {"mode": "hard"}]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: str(how["mode"]))
@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_hold_the_rows_read_each_once(how: dict[str, Any], reads: int, backwards: int) -> None:
    sparse, dense = make(), make(sparse_grad=False)
    seen = []
    for store in (sparse, dense):
        for again in range(backwards):
            answers = [store.read(queries(seed=1 + 2 * again + each), **how) for each in range(reads)]
            sum(read.values.square().sum() for read in answers).backward()  # type: ignore[union-attr]
            seen += [read.ids for read in answers]
    rows = torch.cat([ids.flatten() for ids in seen if ids is not None]).unique()
    tables = ["values"] if how["mode"] == "hard" else ["keys", "values"]
    for name in tables:
        gradient, wanted = getattr(sparse, name).grad, getattr(dense, name).grad
        assert gradient.layout == torch.sparse_coo
        assert gradient.is_coalesced() or gradient.is_cuda  # A GPU would have to report the number of rows.
        assert torch.equal(gradient.coalesce().indices()[0], rows)
        assert wanted.layout == torch.strided
        assert allclose(gradient.to_dense(), wanted, atol=1e-6)


@pytest.mark.parametrize("optimizer", [RowAdam, RowAdagrad], ids=lambda kind: kind.__name__)
def test_exact_and_topk_reads_in_one_step(optimizer: Any) -> None:
    mixed, dense = make(), make(sparse_grad=False)
    for store in (mixed, dense):
        step = optimizer(store.parameters(), lr=0.1)
        for seed in range(3):
            step.zero_grad()
            read, rest = store.read(queries(seed=seed), "topk", k=5), store.read(queries(seed=seed + 9))
            (read.values.square().sum() + rest.values.square().sum() + rest.lse.sum()).backward()
            assert store.keys.grad is not None
            assert store.keys.grad.layout == torch.strided
            clip_row_grad_norm_(store.parameters(), 1.0)
            step.step()
    assert allclose(mixed.keys, dense.keys, atol=1e-5)
    assert allclose(mixed.values, dense.values, atol=1e-5)


def _loss_on_some_keys(store: SoftKVStore, answer: Tensor) -> Tensor:
    return answer.square().sum() + (store.keys[50:60] - 2.0).square().sum()


@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        (torch.optim.SGD, {"lr": 0.05, "weight_decay": 1.0}, None),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, _loss_on_some_keys),
        (torch.optim.AdamW, {"lr": 0.3}, None),
        (torch.optim.AdamW, {"lr": 0.3, "fused": True}, _loss_on_some_keys),
        (RowAdam, {"lr": 0.3}, _loss_on_some_keys),
    ],
    ids=["SGD with decay", "SGD and a loss on keys", "AdamW", "fused AdamW and a loss on keys", "RowAdam"],
)
def test_an_index_follows_rows_that_were_moved_but_not_read(kind: Any, options: dict[str, Any], loss: Any) -> None:
    store = make(sparse_grad=False)
    optimizer, read_before = kind(store.parameters(), **options), torch.zeros(300, dtype=torch.bool)
    for step in range(4):
        before = store.keys.detach().clone()
        read = store.read(queries(2, seed=step), "topk", k=3)
        read_before[read.ids.flatten()] = True
        (read.values.square().sum() if loss is None else loss(store, read.values)).backward()
        assert store.keys.grad is not None
        assert store.keys.grad.layout == torch.strided
        optimizer.step()
        optimizer.zero_grad()
        moved = (store.keys.detach() != before).any(-1)
        assert (moved & ~read_before).any()
        # Each key finds itself: by cosine similarity, a row that moved far would be missed in its old list.
        near = 3 * store.keys.detach()[moved]
        assert torch.equal(store.read(near, "topk", k=4).ids, store.read(near, k=4).ids)
    assert store.index_stats().factory == "IVF8,Flat"


def test_a_row_deleted_before_the_step_passes_no_gradient_to_a_new_row() -> None:
    store = make(40)
    optimizer = RowAdam(store.parameters(), lr=0.5)
    read = store.read(queries(4), "topk", k=5)
    read.values.sum().backward()
    assert read.ids is not None
    gone = read.ids[0, :1]
    store.delete(gone)
    (new,) = store.add(torch.full((1, 8), 3.0), torch.full((1, 4), 3.0)).tolist()
    optimizer.step()
    assert torch.equal(store.get([new]).keys, torch.full((1, 8), 3.0))
    assert torch.equal(store.get([new]).values, torch.full((1, 4), 3.0))


def test_autocast_trains_with_scores_in_float32() -> None:
    store = make()
    encoder = nn.Linear(8, 8)
    tables = RowAdam(store.parameters(), lr=0.1)
    other = torch.optim.Adam(encoder.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        with torch.autocast(store.device.type, dtype=torch.bfloat16):
            read = store.read(encoder(queries()), "topk", k=8)
            assert read.values.dtype == torch.bfloat16
            assert read.scores is not None
            assert read.scores.dtype == read.lse.dtype == torch.float32
            loss = (read.values.float() - queries()[:, :4]).square().mean()
        for optimizer in (tables, other):
            optimizer.zero_grad()
        loss.backward()
        assert store.keys.grad is not None
        assert store.keys.grad.dtype == torch.float32
        for optimizer in (tables, other):
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: str(how["mode"]))
def test_reads_and_appended_rows_between_forward_and_backward_change_no_gradient(how: dict[str, Any]) -> None:
    store, alone = make(), make()
    for each in (store, alone):
        each.reserve(400)
        query = queries().requires_grad_()
        read = each.read(query, **how)
        if each is store:
            each.read(queries(seed=5), **how)
            each.add(queries(20, seed=6), torch.zeros(20, 4))
            each.read(queries(seed=7), **how)
        (read.values.square().sum() + read.lse.sum()).backward()
        each.found = (query.grad, each.values.grad.to_dense())  # type: ignore[assignment, union-attr]
    for mine, other in zip(store.found, alone.found, strict=True):  # type: ignore[arg-type]
        assert torch.equal(mine, other)
