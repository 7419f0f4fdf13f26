"""What the operators of softdb have in common in graphs of torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from softdb.errors import SecondDerivativeError

__all__ = ["count_read_in_graph", "refuse_second_derivative"]

# How often the tables of graphs that are being traced are read there, by the tensors that stand for them.
_reads_in_graph: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """Raise: the backward of an operator cannot be differentiated."""
    raise SecondDerivativeError(
        "a compiled read and a ProductKeyMemory have no second derivatives; for a few rows, use "
        "softdb.functional.topk_read with all of them as candidates, which has"
    )


@dataclass
class GraphReads:
    """How often a table is read in one graph."""

    count: int = 0


def count_read_in_graph(table: Tensor) -> GraphReads:
    """Count a read of ``table`` in the graph that is being traced; its backward is traced after all reads.

    Inductor cannot add a row-sparse gradient to another one: where there are several, they have to be dense.
    """
    is_traced = type(table) not in (Tensor, torch.nn.Parameter)
    reads: GraphReads = _reads_in_graph.setdefault(table, GraphReads()) if is_traced else GraphReads()
    reads.count += 1
    return reads
