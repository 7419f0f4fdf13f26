"""Warnings about reads that cost more than another read or another option would."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from softdb.errors import PerformanceWarning

__all__ = ["CostHints"]

# Number of elements of a dense gradient above which row-sparse ones are proposed: 64 MiB of float32.
MAX_DENSE_GRADIENT = 2**24

# Waste that is worth a hint, in products of a query with a key and a value: some ten milliseconds on two cores.
MIN_WASTE = 2**23

# A warning names the first caller outside both directories.
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class CostHints:
    """Hints about the reads of a store or layer, each of them given once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def check_gradient(self, owner: str, tables: Iterable[Tensor]) -> None:
        """Warn if a read of a few rows makes large dense gradients.

        Args:
            owner: What has the option ``sparse_grad``, "store" or "layer".
            tables: Keys and values that are read.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        elements = sum(table.numel() for table in tables if table.requires_grad and table.is_leaf)
        if elements > MAX_DENSE_GRADIENT and self._is_first("sparse_grad"):
            _warn(
                f"sparse_grad: backward of this read makes dense gradients of {elements:,} numbers, which are 0 except "
                f"at the rows read; make the {owner} with sparse_grad=True, and train it with softdb.optim.RowAdam, "
                "which updates only the rows read"
            )

    def check_cost(self, option: str, cost: float, exact_cost: float) -> None:
        """Warn if a read costs more than the exact read of the same queries.

        Args:
            option: The option that determines the cost, such as "k=64".
            cost: Estimated cost of the read, in products of a query with a key and a value.
            exact_cost: Estimated cost of the exact read.
        """
        if exact_cost > 0 and cost - exact_cost > MIN_WASTE and self._is_first(option.split("=")[0]):
            _warn(
                f"{option}: the topk read costs about {cost / exact_cost:.1f} times as much as the exact read of the "
                'same queries, estimated from the shapes; use mode="exact", or a smaller number'
            )

    def _is_first(self, option: str) -> bool:
        """Return whether no hint about ``option`` has been given, and record that one is."""
        is_first = option not in self._given
        self._given.add(option)
        return is_first


def _warn(message: str) -> None:
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PerformanceWarning, stacklevel=level)
