"""Layers that give a model a memory.

Each projects its input to queries, one a head, looks them up in rows of keys and values, and projects the answers of
the heads back. They differ in the source of the rows: a `MemoryLayer` learns them; a `ContextMemory` writes them as the
model runs; a `ProductKeyMemory` learns a value for every pair of two short lists of keys, so that a million rows are
searched at the cost of two thousand.

They are modules like any other: ``device`` and ``dtype``, construction on the meta device, ``reset_parameters``,
``state_dict``, ``deepcopy``, autocast and torch.compile behave as for torch's own.
"""

from softdb.layers.context import ContextMemory
from softdb.layers.memory import MemoryLayer
from softdb.layers.product_keys import ProductKeyMemory

__all__ = ["ContextMemory", "MemoryLayer", "ProductKeyMemory"]
