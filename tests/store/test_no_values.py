"""Test stores with ``value_dim=0``, which are only an index: each read equals that of a store with values of 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contract import force_dispatch
from support.tolerances import allclose
from torch import Tensor

from softdb import DtypeError, SoftKVStore, lab
from softdb.functional import merge, soft_read
from softdb.optim import RowAdam

pytestmark = pytest.mark.each_device

MEMBERS = ("ids", "weights", "scores", "lse", "mass")


def stores(**options: Any) -> tuple[SoftKVStore, SoftKVStore]:
    """Make a store without values, and one whose values are one number each, 0."""
    keys = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = [
        SoftKVStore.from_tensors(keys, keys.new_zeros(60, width), fields={"time": torch.arange(60)}, **options)
        for width in (0, 1)
    ]
    for store in made:
        store.delete(7)
    return made[0], made[1]


def compute(store: SoftKVStore, options: dict[str, Any]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the members of a read, and the gradients of the query and the keys."""
    query = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    if options.get("normalizer") == "gumbel" or "tail_samples" in options:
        options = options | {"generator": torch.Generator().manual_seed(1)}
    read = store.read(query, **options)
    assert read.values.shape == (3, store.value_dim)
    assert not read.values.any()
    loss = read.values.sum() + read.lse.clamp(min=-9).sum()
    if read.weights is not None:
        loss = loss + read.weights.square().sum()
    leaves = [query, store.keys] if store.trainable else [query]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [getattr(read, name) for name in MEMBERS], [g if g is None else g.to_dense() for g in gradients]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 3},
        {"mode": "topk", "k": 3},
        {"mode": "topk", "k": 60},
        {"mode": "hard"},
        {"k": 3, "where": lambda row: row["time"] < 9},
        {"k": 3, "where": []},
        {"k": 3, "exclude": [[0], [1], [2]]},
        {"k": 3, "normalizer": "sparsemax"},
        {"mode": "topk", "k": 3, "normalizer": "entmax15"},
        {"mode": "topk", "k": 3, "normalizer": "straight_through"},
        {"mode": "topk", "k": 3, "normalizer": "gumbel"},
        {"mode": "topk", "k": 3, "tail_samples": 8},
    ],
)
@pytest.mark.parametrize("how", [{}, {"trainable": True, "sparse_grad": True}, {"index": "IVF4,Flat", "metric": "l2"}])
def test_reads_report_the_rows_that_a_store_with_values_reports(options: dict[str, Any], how: dict[str, Any]) -> None:
    found, wanted = (compute(store, options) for store in stores(**how))
    for one, other in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert allclose(one.double(), other.double(), atol=1e-12, equal_nan=True)


def test_values_without_width_have_no_error() -> None:
    store, _ = stores()
    query = torch.ones(2, 4, dtype=torch.float64)
    for options in ({"k": 3, "tail_samples": 8}, {"tolerance": 0.1}):
        error = store.read(query, "topk", **options).error  # type: ignore[arg-type]
        assert error is not None
        assert not error.any()


@pytest.mark.cpu_only
@pytest.mark.parametrize("how", [{}, {"trainable": True, "capacity": 60, "evict": "oldest", "track_usage": True}])
def test_rows_without_values_are_written_saved_and_copied(how: dict[str, Any], tmp_path: Path) -> None:
    store, _ = stores(**how)
    row = torch.ones(1, 4), torch.zeros(1, 0)
    assert store.add(*row, fields={"time": 5}).tolist() == [60]
    store.put([3], *row, fields={"time": 6})
    store.update([4], *row)
    store.revive([5], *row)
    if store.trainable:
        store.read(torch.ones(2, 4), "topk", k=2).lse.sum().backward()
        RowAdam(store.parameters(), lr=0.1).step()
    store.reserve(60)
    store.save(tmp_path / "saved")
    mapped = SoftKVStore.load(tmp_path / "saved", mmap=True)
    other = SoftKVStore(4, 0, fields=("time",), dtype=torch.float64, **how)
    other.load_state_dict(store.state_dict())
    query = torch.ones(2, 4)
    wanted = store.read(query, k=5)
    for same in (SoftKVStore.load(tmp_path / "saved"), mapped, other, copy.deepcopy(store)):
        assert torch.equal(same.read(query, k=5).ids, wanted.ids)  # type: ignore[arg-type]
        assert torch.equal(same.get([3, 4]).keys, torch.ones(2, 4))
        same.materialize()
        same.clear()
        same._check()


def test_functions_of_reads_without_values() -> None:
    store, _ = stores()
    query, keys = torch.randn(3, 4), torch.randn(6, 4)
    read = merge([store.read(query, k=2), soft_read(query, keys, keys[:, :0], k=2)])
    assert read.values.shape == (3, 0)
    assert torch.equal(torch.vmap(lambda one: store.read(one, k=2).ids)(query), store.read(query, k=2).ids)
    assert store.audit(query, k=3).recall.tolist() == [1.0] * 3
    assert "topk" in str(lab.compare(store, query, ks=(2,)))


def test_integer_values_raise_an_error_that_points_to_fields() -> None:
    store, with_values = stores()
    for one, width in ((store, 0), (with_values, 1)):
        for dtype in (torch.int64, torch.uint8):
            with pytest.raises(
                DtypeError, match=rf"values: .* got {dtype}; .*\.float\(\), or store integers in fields="
            ):
                one.add(torch.ones(1, 4), torch.ones(1, width, dtype=dtype), fields={"time": 1})


@pytest.mark.parametrize(("rows", "dispatch"), [(60, None), (1500, None), (1024, "two partitions")])
def test_backward_of_a_store_with_free_slots(rows: int, dispatch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainable values of no width get a gradient, whether one product covers all slots or not."""
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    store = SoftKVStore(4, 0, trainable=True, capacity=rows + 7)
    ids = store.add(torch.randn(rows, 4), torch.empty(rows, 0))
    if dispatch is None:  # A product does not cover a part of a block with hidden rows.
        store.delete(ids[::9])
    store.read(torch.randn(100, 4), k=2).lse.sum().backward()
    store(torch.randn(100, 4, requires_grad=True)).sum().backward()
    assert store.values.grad is not None
    assert store.values.grad.shape == store.values.shape
