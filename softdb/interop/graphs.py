"""Functions shared by the operators of softdb in graphs of torch.compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from softdb.errors import SecondDerivativeError

__all__ = ["EAGER_OPTIONS", "EAGER_TAGS", "count_read_in_graph", "refuse_second_derivative"]

# Tags of operators whose Python code must run at every call. A CUDA graph (``mode="reduce-overhead"``) would replay the
# kernels of one call only. Torch has the tag from 2.9 on.
EAGER_TAGS: tuple[torch.Tag, ...] = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
# Options with these tags for `torch.library.custom_op`, which takes tags from torch 2.8 on.
EAGER_OPTIONS: dict[str, Any] = {"tags": EAGER_TAGS} if EAGER_TAGS else {}

# Number of reads of each table in the graph that is being traced. The keys are the fake tensors of the tables.
_reads_in_graph: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """Raise `SecondDerivativeError`, as the backward of the backward of an operator."""
    raise SecondDerivativeError(
        "a compiled read and a ProductKeyMemory have no second derivatives; for a few rows, use "
        "softdb.functional.topk_read with all rows as candidates, which has them"
    )


@dataclass
class GraphReads:
    """Number of reads of a table in one graph."""

    count: int = 0


def count_read_in_graph(table: Tensor) -> GraphReads:
    """Count a read of ``table`` in the graph that is being traced.

    Backward is traced after all reads, so the count is complete by then. Inductor cannot add a row-sparse gradient to
    another gradient. So if there are several reads of a table, their gradients must be dense.
    """
    is_traced = type(table) not in (Tensor, torch.nn.Parameter)
    reads: GraphReads = _reads_in_graph.setdefault(table, GraphReads()) if is_traced else GraphReads()
    reads.count += 1
    return reads
