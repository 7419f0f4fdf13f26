"""Averages of two tables, row by row."""

from __future__ import annotations

import torch

from softdb.table.journal import Growth
from softdb.table.storage import RowStorage
from softdb.table.tensors import Tables

__all__ = ["averaged_by_id"]

# As many rows are averaged at a time.
CHUNK = 2**14


def averaged_by_id(tables: Tables, rows: RowStorage, theirs: Tables, model: RowStorage, decay: float) -> Growth:
    """Return the average of two tables by id, laid out as the model's, while nobody writes to either.

    Rows of the model alone are in it as they are, and those of the average alone are not::

        average[id] = decay * average[id] + (1 - decay) * model[id]

    Args:
        tables: Keys and values of the average.
        rows: Which rows they are.
        theirs: Keys and values of the model.
        model: Which rows those are.
        decay: The share of the average.
    """
    capacity, live = model.capacity, model.live_slots()
    slots, mine = live.cpu(), rows.find(model.ids[live].cpu())
    known = mine >= 0
    slots, mine = slots[known], mine[known]
    # Another generation of the same slot is another row under an old id.
    generation, before = model.generation.cpu()[slots], rows.generation.cpu()[mine]
    same = (generation == before) | (slots != mine)
    averages, device = {}, rows.ids.device
    for name, table in tables.items():
        present = theirs[name].detach()
        average = present.to(table.device, table.dtype, copy=True)
        wide = torch.promote_types(table.dtype, torch.float32)
        for to, of in zip(slots[same].split(CHUNK), mine[same].split(CHUNK), strict=True):
            now = present[to.to(present.device)].to(table.device, wide)
            then = table.detach()[of.to(table.device)].to(wide)
            average[to.to(table.device)] = torch.lerp(now, then, decay).to(table.dtype)
        averages[name] = average
    buffers = {name: getattr(model, name).to(device, copy=True) for name in model.saved}
    buffers |= rows.stamps(capacity, lasting=True)
    return Growth(buffers, averages, dict.fromkeys(averages))
