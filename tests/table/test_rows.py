"""Test `softdb.table.rows`: copies of rows by id, and of one field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softdb
from softdb import ArgumentError, DtypeError, FieldError, ShapeError, SoftKVStore, UnknownIdError

pytestmark = pytest.mark.each_device


def store_of(rows: int = 5, **options: Any) -> SoftKVStore:
    """Make a store whose row i has keys (i, -i), the value 10 + i and the field 100 + i; row 2 is deleted."""
    store = SoftKVStore(2, 1, fields=("label",), **options)
    numbers = torch.arange(float(rows))
    keys = torch.stack([numbers, -numbers], dim=-1)
    store.add(keys, 10 + numbers[:, None], fields={"label": 100 + torch.arange(rows)})
    if rows > 2:
        store.delete(2)
    return store


def expected(ids: Tensor, live: set[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Look up each id in turn."""
    known = torch.tensor([number in live for number in ids.flatten().tolist()], dtype=torch.bool).view(ids.shape)
    numbers = ids.where(known, 0)
    keys = torch.stack([numbers, -numbers], dim=-1).float()
    return keys, ((10.0 + numbers) * known)[..., None], (100 + numbers).where(known, -1)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("trainable", [False, True])
def test_get_with_padding_gives_zeros_for_padding_and_unknown_ids(shape: tuple[int, ...], trainable: bool) -> None:
    store = store_of(trainable=trainable)
    ids = torch.randint(-1, 8, shape, generator=torch.Generator().manual_seed(3))
    rows = store.get(ids, missing="pad")
    keys, values, labels = expected(ids, {0, 1, 3, 4})
    assert torch.equal(rows.keys, keys)
    assert torch.equal(rows.values, values)
    assert torch.equal(rows.fields["label"], labels)
    assert torch.equal(store.fields_at(ids, "label"), labels)
    assert torch.equal(store.fields_at(ids, "label", fill=-(2**63)), labels.where(labels >= 0, -(2**63)))
    assert not rows.keys.requires_grad


@pytest.mark.parametrize(
    "ids",
    [
        3,
        np.int64(3),
        np.uint8(3),
        torch.tensor(3),
        np.array(3),
        [[3, 0], [1, 4]],
        ((3,), (3,)),
        np.array([[3, 0, 1]])[:, ::-1],
        np.arange(0, 2, dtype=np.int32),
        [np.int64(1), np.int64(0)],
        torch.tensor([[0]], dtype=torch.int16),
    ],
)
def test_get_takes_an_id_and_ids_of_any_shape(ids: Any) -> None:
    store = store_of()
    given = ids.long() if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids, dtype=np.int64, order="C"))
    rows = store.get(ids)
    assert torch.equal(rows.values, 10.0 + given.unsqueeze(-1))
    assert rows.keys.shape == (*given.shape, 2)
    assert torch.equal(rows.fields["label"], 100 + given)
    assert torch.equal(store.fields_at(ids, "label"), 100 + given)


def test_a_row_that_get_returns_is_a_copy() -> None:
    store = store_of()
    for ids in (3, [3]):
        rows = store.get(ids)
        for tensor in (rows.keys, rows.values, rows.fields["label"]):
            tensor.fill_(7)
    assert store.get(3).values.item() == 13
    assert store.fields_at(3, "label").item() == 103


def test_ids_are_looked_up_in_a_store_that_never_held_a_row() -> None:
    store = SoftKVStore(2, 1, fields=("label",))
    rows = store.get([[0, -1]], missing="pad")
    assert rows.keys.shape == (1, 2, 2)
    assert not rows.keys.any()
    assert store.fields_at([[0, -1]], "label", fill=4).tolist() == [[4, 4]]
    assert store.get([]).values.shape == (0, 1)


def test_fields_of_the_rows_of_a_read_are_padded_like_its_ids() -> None:
    store = store_of()
    read = store.read(torch.randn(2, 3, 2), k=6)
    assert read.ids is not None
    labels = store.fields_at(read.ids, "label")
    assert torch.equal(labels, torch.where(read.ids < 0, -1, 100 + read.ids))
    assert torch.equal(store.get(read.ids, missing="pad").fields["label"], labels)


def test_large_ids_are_found_among_padding() -> None:
    store = store_of(3)
    store.put([2**40], torch.ones(1, 2), torch.ones(1, 1), fields={"label": 5})
    assert store.fields_at([-1, 2**40, 2**41, 0], "label").tolist() == [-1, 5, -1, 100]


def test_an_id_is_in_the_store_as_any_kind_of_integer() -> None:
    store = store_of()
    for kind in (int, np.int64, np.uint8, np.array, torch.tensor, lambda number: torch.tensor([number])):
        assert kind(3) in store
        assert kind(2) not in store
    for other in (True, np.True_, torch.tensor(True), 3.0, torch.tensor(3.0), "3", None, [3], -1, 2**70):
        assert other not in store
    with pytest.raises(ShapeError, match=r"id: expected one id, got shape \(2,\)"):
        assert torch.tensor([0, 1]) in store


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda store: store.get([0, 2]), UnknownIdError, "ids: expected ids of rows in the store, got unknown 2"),
        (lambda store: store.get([[0, -1]]), ArgumentError, "ids: expected ids of at least 0, got -1"),
        (lambda store: store.get([-2], "pad"), ArgumentError, "ids: expected ids of at least 0, or -1 for padding"),
        (lambda store: store.get([0], missing="zero"), ArgumentError, "missing: expected one of 'error', 'pad', got"),
        (lambda store: store.get(True), DtypeError, "ids: expected int64 ids, got torch.bool"),
        (lambda store: store.get([[True, 2]]), DtypeError, "ids: expected int64 ids, got torch.bool in a list"),
        (
            lambda store: store.fields_at([0], "time"),
            FieldError,
            "name: expected .* fields .*'label'.*, got str 'time'",
        ),
        (lambda store: store.fields_at([0], 3), FieldError, "name: expected one of .* got int 3"),
        (lambda store: store.fields_at([-2], "label"), ArgumentError, "ids: expected ids of at least 0, or -1"),
        (lambda store: store.fields_at([0.5], "label"), DtypeError, "ids: expected int64 ids, got torch.float32"),
        (lambda store: store.fields_at([0], "label", fill=0.5), DtypeError, "fill: expected an integer"),
    ],
)
def test_bad_lookups_raise(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(store_of())


def test_a_batched_id_raises_a_transform_error() -> None:
    store = store_of()
    with pytest.raises(softdb.TransformError, match="fields_at: expected one value for all samples"):
        torch.vmap(lambda ids: store.fields_at(ids, "label"))(torch.tensor([[0], [1]]))
