"""Averages of two tables by row id."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from softdb.errors import ArgumentError, ReadOnlyError
from softdb.table.growth import change_columns
from softdb.table.journal import WRITE_OUTCOME, Growth
from softdb.table.table import Table

__all__ = ["prepare_average"]

# Number of rows that are averaged at a time.
CHUNK_ROWS = 2**14
# Settings that a store and its average must share.
SHARED_SETTINGS = ("key_dim", "value_dim", "metric", "capacity", "fields", "evict")


def prepare_average(average: Table, model: Table, decay: float) -> Callable[[], None]:
    """Compute an average of two tables by id; each row gets its slot in ``model``.

    Equal to, for every row that both have::

        average[id] = decay * average[id] + (1 - decay) * model[id]

    Rows that only the model has are copied. Rows that only the average has are dropped. The caller holds the locks of
    both tables; neither is changed.

    Args:
        average: The average so far.
        model: The table to average.
        decay: The weight of the average so far.

    Returns:
        A function that replaces the rows of ``average`` by the new average.

    Raises:
        ArgumentError: The tables have different settings.
        ReadOnlyError: The rows of the average are memory-mapped files.
        GrowthError: The storage of ``average`` must be resized, which is not possible now.
    """
    for name in SHARED_SETTINGS:
        found, expected = getattr(average.config, name), getattr(model.config, name)
        if found != expected:
            raise ArgumentError(
                f"average: expected a store with {name}={expected!r}, as the model's, got {found!r}; start from "
                "copy.deepcopy(model)"
            )
    if average.config.track_usage != model.config.track_usage:
        raise ArgumentError(
            f"average: expected a store with track_usage={model.config.track_usage}, as the model's, got "
            f"{average.config.track_usage}; start from copy.deepcopy(model)"
        )
    if average.files is not None:
        raise ReadOnlyError(
            "average: expected a store in memory, got memory-mapped rows; call store.materialize() first"
        )
    for table in (average, model):
        table.check_not_meta()
        table.check_not_substituted()
    if model.rows.capacity != average.rows.capacity:
        average.check_growth(model.rows.capacity, loaded=True)
    averaged = _average_by_id(average, model, decay)
    layout = average.rows.layout + (not torch.equal(average.rows.ids, averaged.buffers["ids"]))
    install = functools.partial(_install, average, averaged, layout)
    return lambda: average.journal.commit(install, WRITE_OUTCOME)


def _install(average: Table, averaged: Growth, layout: int) -> None:
    rows = average.rows
    average.install(averaged)
    rows.derive()
    rows.layout = layout
    average.record_versions()
    if average.config.trainable:
        rows.average.record(rows.slot_rows, is_updated=True)


def _average_by_id(average: Table, model: Table, decay: float) -> Growth:
    rows, model_rows = average.rows, model.rows
    live = model_rows.live_slots()
    model_slots, average_slots = live.cpu(), rows.slots.find(model_rows.ids[live].cpu())
    known = average_slots >= 0
    model_slots, average_slots = model_slots[known], average_slots[known]
    # A row with the same id but another generation is a new row that reuses the id. It is copied. Compaction moves rows
    # with their generations.
    same = model_rows.generation.cpu()[model_slots] == rows.generation.cpu()[average_slots]
    averages, device, source = {}, rows.ids.device, model.tensors()
    for name, table in average.tensors().items():
        present = source[name].detach()
        averaged = present.to(table.device, table.dtype, copy=True)
        wide = torch.promote_types(table.dtype, torch.float32)
        chunks = zip(model_slots[same].split(CHUNK_ROWS), average_slots[same].split(CHUNK_ROWS), strict=True)
        for target, old in chunks:
            new_values = present[target.to(present.device)].to(table.device, wide)
            old_values = table.detach()[old.to(table.device)].to(wide)
            averaged[target.to(table.device)] = torch.lerp(new_values, old_values, decay).to(table.dtype)
        averages[name] = averaged
    buffers = {name: getattr(model_rows, name).to(device, copy=True) for name in model_rows.saved}
    return Growth(buffers | change_columns(model_rows.capacity, device), averages, dict.fromkeys(averages))
