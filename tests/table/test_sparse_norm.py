"""The norm of sparse tensors, by which torch clips row-sparse gradients."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import assert_close

from softdb import SoftKVStore
from softdb.optim import clip_row_grad_norm_

pytestmark = pytest.mark.each_device


def make_store() -> SoftKVStore:
    torch.manual_seed(0)
    store = SoftKVStore(4, 3, trainable=True, sparse_grad=True, dtype=torch.float64)
    store.add(torch.randn(20, 4).double(), torch.randn(20, 3).double())
    store.read(torch.randn(5, 4).double(), "topk", k=3).values.square().sum().backward()
    assert store.keys.grad is not None
    assert store.keys.grad.is_sparse
    return store


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("order", [1.0, 2.0, torch.inf])
def test_torch_clips_row_sparse_gradients_by_norm(order: float, foreach: bool | None) -> None:
    store, other = make_store(), make_store()
    total = torch.nn.utils.clip_grad_norm_(store.parameters(), 0.1, order, foreach=foreach)
    assert_close(total, clip_row_grad_norm_(other.parameters(), 0.1, order))
    for mine, wanted in zip(store.parameters(), other.parameters(), strict=True):
        assert_close(mine.grad.to_dense(), wanted.grad.to_dense())


@pytest.mark.parametrize("order", [0, 0.5, 1, 2, 3.5, torch.inf])
def test_the_norm_of_a_sparse_tensor_is_that_of_the_dense_one(order: float) -> None:
    make_store()  # registers the norm
    rows, values = torch.tensor([[4, 1, 4]]), torch.randn(3, 2, dtype=torch.float64)
    tensor = torch.sparse_coo_tensor(rows, values, (6, 2), check_invariants=True)  # row 4 is given twice
    assert_close(torch.linalg.vector_norm(tensor, order), torch.linalg.vector_norm(tensor.to_dense(), order))
    empty = torch.sparse_coo_tensor(rows[:, :0], values[:0], (6, 2), check_invariants=True)
    assert float(torch.linalg.vector_norm(empty, order)) == 0


def test_norms_of_parts_of_a_sparse_tensor_are_refused() -> None:
    gradient = make_store().keys.grad
    for options in ({"dim": 1}, {"keepdim": True}, {"ord": -1.0}):
        with pytest.raises(NotImplementedError, match="expected a norm of order 0 or above of the whole sparse tensor"):
            torch.linalg.vector_norm(gradient, **options)
