"""Row storage: ids, slots, versions."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import softdb
from softdb.table.growth import resize_buffers
from softdb.table.hooks import watch
from softdb.table.journal import WriteBatch
from softdb.table.kept_rows import RowsAtRead
from softdb.table.slots import SlotTable
from softdb.table.storage import RowStorage


def storage_of(count: int) -> RowStorage:
    rows = RowStorage(())
    resize(rows, count)
    insert(rows, new_ids(rows, count))
    return rows


def resize(rows: RowStorage, capacity: int) -> None:
    for name, buffer in resize_buffers(rows, capacity).items():
        setattr(rows, name, buffer)


def new_ids(rows: RowStorage, count: int) -> torch.Tensor:
    return torch.arange(rows.first_new_id, rows.first_new_id + count)


def insert(rows: RowStorage, ids: torch.Tensor) -> list[int]:
    rows.slots.widen(ids, len(rows))
    plan = rows.plan(WriteBatch(ids))
    rows.apply_plan(plan)
    found: list[int] = plan.inserted_slots.tolist()
    return found


def remove(rows: RowStorage, ids: list[int]) -> None:
    rows.apply_plan(rows.plan(WriteBatch(removed_slots=rows.slots.find(torch.tensor(ids)))))


def put(table: SlotTable, ids: torch.Tensor, slots: torch.Tensor, rows: int) -> None:
    table.widen(ids, rows)
    table.put(ids, slots)


def test_slot_table_keeps_small_ids_in_an_array_and_large_ones_in_a_dict() -> None:
    slots = SlotTable()
    large = torch.tensor([10**12, 5000, 10**15])
    put(slots, large, torch.tensor([0, 1, 2]), rows=0)
    put(slots, torch.arange(3000), torch.arange(3, 3003), rows=3)
    assert slots.find(large).tolist() == [0, 1, 2]
    assert slots.find(torch.tensor([0, 2999, 3000, 4999, 5001, 10**14])).tolist() == [3, 3002, -1, -1, -1, -1]
    put(slots, torch.tensor([6000]), torch.tensor([3003]), rows=3003)
    assert slots.find(torch.tensor([5000, 6000])).tolist() == [1, 3003]
    array, others = slots._map
    assert len(others) == 2  # id 5000 moved to the array when the number of rows grew
    assert len(array) < 20_000
    slots.remove(torch.tensor([10**12, 7, 5000]))
    assert slots.find(torch.tensor([10**12, 7, 5000, 8])).tolist() == [-1, -1, -1, 11]


def test_free_slots_are_filled_lowest_first() -> None:
    rows = storage_of(10)
    remove(rows, [7, 2, 5])
    assert insert(rows, torch.tensor([20, 21])) == [2, 5]
    remove(rows, [0])
    assert insert(rows, torch.tensor([22, 23])) == [0, 7]
    assert rows.live_mask() is None


def test_changed_since_returns_the_slots_changed_after_a_version() -> None:
    rows = storage_of(10)
    start = rows.version
    rows.mark_written(torch.tensor([4, 2]))
    middle = rows.version
    remove(rows, [9])
    assert rows.changed_since(start).tolist() == [2, 4, 9]
    assert rows.changed_since(middle).tolist() == [9]
    assert rows.changed_since(rows.version).tolist() == []
    rows.mark_written(torch.tensor([], dtype=torch.int64))
    assert rows.version == middle + 1
    rows.mark_updated()
    assert rows.changed_since(middle).tolist() == list(range(10))


def test_an_update_of_uncoalesced_slots_is_reported_once_per_slot() -> None:
    rows = storage_of(10)
    start = rows.version
    rows.mark_updated(torch.tensor([7, 2, 7, 7, 0]), keys=False)  # as a gradient on a GPU names them
    rows.mark_updated(torch.tensor([3, 3]))
    assert rows.changed_since(start).tolist() == [0, 2, 3, 7]
    assert rows.changed_since(start, keys=True).tolist() == [3]
    assert rows.changed_at[[7, 2, 0]].tolist() == [start + 1] * 3


@pytest.mark.parametrize(
    "used", [None, torch.tensor([[1, -1], [3, 1]]), torch.arange(10) < 4], ids=["all", "some", "mask"]
)
def test_a_staleness_check_raises_only_for_rows_that_were_used(used: torch.Tensor | None) -> None:
    rows = storage_of(10)
    remove(rows, [8])
    check = RowsAtRead(rows, {}, keeps=False)
    check.used = check.used if used is None else used
    insert(rows, torch.tensor([50]))  # into the free slot
    resize(rows, 20)
    insert(rows, torch.tensor([51]))
    if used is not None:
        rows.mark_written(torch.tensor([6]))
    check.check()
    rows.mark_written(torch.tensor([3]))
    with pytest.raises(softdb.StaleReadError, match="slots 3"):
        check.check()


def test_optimizer_steps_are_recorded_and_tables_can_be_freed() -> None:
    rows, parameter = storage_of(3), torch.nn.Parameter(torch.ones(3))
    watch(parameter, rows, "values")
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter, other], lr=0.1)
    before = rows.version
    other.grad = torch.ones(3)
    optimizer.step()
    assert rows.version == before
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert rows.all_changed_at == rows.version == before + 1
    assert rows.all_keys_changed_at < rows.version
    del rows
    gc.collect()
    optimizer.step()


def test_a_copy_assigns_ids_independently() -> None:
    rows = storage_of(5)
    remove(rows, [1])
    copied = copy.deepcopy(rows)
    insert(copied, new_ids(copied, 1))
    assert copied.slots.find(torch.tensor([5])).tolist() == [1]
    assert rows.slots.find(torch.tensor([5])).tolist() == [-1]
