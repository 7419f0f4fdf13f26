"""Test the forms that filters take: tensors, lists and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softdb import SoftKVStore

pytestmark = pytest.mark.each_device


@pytest.mark.parametrize("mode", ["exact", "topk", "hard"])
@pytest.mark.parametrize("kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda tensor: tuple(tensor.tolist())])
def test_lists_and_arrays_filter_like_tensors(mode: str, kind: Any) -> None:
    store = SoftKVStore(3, 2)
    store.add(torch.randn(6, 3), torch.randn(6, 2))
    store.delete(1)
    query, exclude = torch.randn(2, 3, requires_grad=True), torch.tensor([[0, -1], [5, 9]])
    options: dict[str, Any] = {"mode": mode} if mode == "hard" else {"mode": mode, "k": 3}
    for where in (torch.tensor([0, 2, 5]), torch.tensor([True, True, False, False, True])):
        wanted = store.read(query, where=where, exclude=exclude, **options)
        given = {"where": kind(where), "exclude": kind(exclude)}

        def answer(x: Tensor, given: dict[str, Any] = given) -> tuple[Tensor, Tensor]:
            read = store.read(x, **given, **options)
            return read.ids, read.values

        for ids, values in (answer(query), torch.vmap(answer)(query[None])):
            assert torch.equal(ids.view_as(wanted.ids), wanted.ids)
            assert torch.equal(values.view_as(wanted.values), wanted.values)


@pytest.mark.slow
def test_a_list_of_ids_breaks_a_compiled_graph() -> None:
    store = SoftKVStore(3, 2)
    store.add(torch.randn(6, 3), torch.randn(6, 2))
    compiled = torch.compile(lambda query: 2 * store(query, where=[0, 2], exclude=[[0], [2]]), backend="eager")
    assert torch.equal(compiled(torch.ones(2, 3)), 2 * store.get([2, 0]).values)


def test_an_audit_takes_a_list_of_ids() -> None:
    store = SoftKVStore(3, 2)
    store.add(torch.randn(6, 3), torch.randn(6, 2))
    audit = store.audit(torch.randn(2, 3), k=2, where=[0, 1, 2], exclude=[[0], [1]])
    assert audit.recall.tolist() == [1.0, 1.0]


def test_arrays_that_are_reversed_or_read_only_are_filters() -> None:
    store = SoftKVStore(3, 2)
    store.add(torch.randn(3, 3), torch.randn(3, 2))
    frozen = np.array([2, 0])
    frozen.flags.writeable = False
    for where in (frozen, frozen[::-1]):
        assert set(store.read(torch.ones(1, 3), k=3, where=where).ids[0].tolist()) == {0, 2, -1}
