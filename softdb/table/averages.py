"""Averages of two tables, row by row."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from softdb.errors import ArgumentError, ReadOnlyError
from softdb.table.growth import change_columns
from softdb.table.journal import WRITTEN, Growth
from softdb.table.table import Table

__all__ = ["prepare_average"]

# As many rows are averaged at a time.
CHUNK_ROWS = 2**14
# The settings that a store and its average have in common.
COMMON = ("key_dim", "value_dim", "metric", "capacity", "fields", "evict")


def prepare_average(average: Table, model: Table, decay: float) -> Callable[[], None]:
    """Check and compute an average by id, laid out as the model's, while neither is written to.

    Rows of the model alone are in it as they are, and those of the average alone are not::

        average[id] = decay * average[id] + (1 - decay) * model[id]

    Args:
        average: The average so far.
        model: The table that is averaged.
        decay: The share of the average so far.

    Returns:
        A function that lets ``average`` hold the new average.

    Raises:
        ArgumentError: The tables have other settings.
        ReadOnlyError: The rows of the average lie in files.
        GrowthError: The average cannot have another size now.
    """
    for name in COMMON:
        mine, theirs = getattr(average.config, name), getattr(model.config, name)
        if mine != theirs:
            raise ArgumentError(
                f"average: expected a store with {name}={theirs!r}, as the model's, got {mine!r}; begin with "
                "copy.deepcopy(model)"
            )
    if average.config.track_usage != model.config.track_usage:
        raise ArgumentError("average: expected a store with the model's track_usage; begin with copy.deepcopy")
    if average.files is not None:
        raise ReadOnlyError("average: expected a store in memory; call store.materialize() first")
    for table in (average, model):
        table.check_not_meta()
        table.check_own()
    if model.rows.capacity != average.rows.capacity:
        average.check_growth(model.rows.capacity, loaded=True)
    averaged = _averaged_by_id(average, model, decay)
    layout = average.rows.layout + (not torch.equal(average.rows.ids, averaged.buffers["ids"]))
    install = functools.partial(_install, average, averaged, layout)
    return lambda: average.journal.commit(install, WRITTEN)


def _install(average: Table, averaged: Growth, layout: int) -> None:
    rows = average.rows
    average.install(averaged)
    rows.derive()
    rows.layout = layout
    average.record_versions()
    if average.config.trainable:
        rows.average.remember(rows.tenants, is_updated=True)


def _averaged_by_id(average: Table, model: Table, decay: float) -> Growth:
    rows, theirs = average.rows, model.rows
    live = theirs.live_slots()
    slots, mine = live.cpu(), rows.slots.find(theirs.ids[live].cpu())
    known = mine >= 0
    slots, mine = slots[known], mine[known]
    # Another generation of the same slot is another row under an old id.
    generation, before = theirs.generation.cpu()[slots], rows.generation.cpu()[mine]
    same = (generation == before) | (slots != mine)
    averages, device, source = {}, rows.ids.device, model.tensors()
    for name, table in average.tensors().items():
        present = source[name].detach()
        averaged = present.to(table.device, table.dtype, copy=True)
        wide = torch.promote_types(table.dtype, torch.float32)
        for to, of in zip(slots[same].split(CHUNK_ROWS), mine[same].split(CHUNK_ROWS), strict=True):
            now = present[to.to(present.device)].to(table.device, wide)
            then = table.detach()[of.to(table.device)].to(wide)
            averaged[to.to(table.device)] = torch.lerp(now, then, decay).to(table.dtype)
        averages[name] = averaged
    buffers = {name: getattr(theirs, name).to(device, copy=True) for name in theirs.saved}
    return Growth(buffers | change_columns(theirs.capacity, device), averages, dict.fromkeys(averages))
