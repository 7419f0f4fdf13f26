"""Layers that give a model a memory.

Each layer projects its input to one query per head, reads rows of keys and values with the queries, and projects the
outputs of the heads back. The layers differ in the source of the rows: a `MemoryLayer` learns them; a `ContextMemory`
writes them as the model runs; a `ProductKeyMemory` learns a value for every pair of keys from two short lists. A search
of its million rows costs as much as a search of two lists of a thousand keys.

The layers behave as the modules of torch do: ``device`` and ``dtype``, construction on the meta device,
``reset_parameters``, ``state_dict``, ``deepcopy``, autocast and torch.compile are supported.
"""

from softdb.layers.context import ContextMemory
from softdb.layers.memory import MemoryLayer
from softdb.layers.product_keys import ProductKeyMemory

__all__ = ["ContextMemory", "MemoryLayer", "ProductKeyMemory"]
