"""What a backend tunes: how passes over the rows are cut, as one frozen object that is passed in.

Choices depend on shapes and on facts of the device, never on timing: the same call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["GROUP", "Tiles", "Tiling"]

# Two-stage top-k: the columns whose maximum stands for them.
GROUP = 32


@dataclass(frozen=True)
class Tiles:
    """How one pass over the rows is cut into products. Backward cuts as forward did, so that it makes the same scores.

    Attributes:
        queries: The queries of a tile.
        rows: The rows of a block, a multiple of ``partition``.
        partition: The rows that one product takes where a block is split.
        tall: Whether tiles lie with their rows along the longer stride: see `softdb.kernels.cpu.products.Product`.
        even: Whether equal rows give equal scores: see there.
    """

    queries: int
    rows: int
    partition: int
    tall: bool
    even: bool


@dataclass(frozen=True)
class Tiling:
    """The sizes that a backend works with; the defaults are those of CPUs.

    Attributes:
        elements: The scores of a tile: it stays in the second-level cache beside the operands that made it.
        queries: The most queries of a tile.
        rows: The most rows of a tile.
        copied: How many numbers of a block's rows are copied at a time, where they have to be: 4 MiB of float32.
        sum_rows: The most rows whose weighted values one product sums up. Over 70,000 equal summands one float32
            product was off by 6e-4 (AMD EPYC, Zen 3); the error grows with their number.
        fewest_sum_rows: The fewest rows that are worth a product of their own.
        small_sum: Where all scores make one small tile, products and torch's softmax may sum over so many rows, as
            three lines of torch do.
        small_scores: As many weights are held all at once, and kept for backward: half a MiB of float32.
        few_rows: Few enough rows to be padded by a copy; no fewer than a group.
        unshifted: Where no score can be larger than this, in absolute value, exponentials neither overflow nor
            underflow as they are.
        few_groups: Up to this many groups of rows for each row wanted, one pass of an exact top-k is faster than two.
        maxima: The group maxima of a pass that are held, for as many queries at a time: 32 MiB.
        gathered: The numbers of gathered rows that are held: 4 MiB.
        most_gathered: The most numbers of rows that a sparse normalizer may give weight: a GiB of float32.
        tall: Whether tiles lie with their rows along the longer stride; None for what is faster, by their shapes.
        multiplies_bfloat16: Whether the device multiplies bfloat16 faster than float32.
    """

    elements: int = 2**20
    queries: int = 1024
    rows: int = 2**18
    copied: int = 2**20
    sum_rows: int = 512
    fewest_sum_rows: int = 256
    small_sum: int = 2048
    small_scores: int = 2**17
    few_rows: int = 4096
    unshifted: float = 40.0
    few_groups: int = 32
    maxima: int = 2**23
    gathered: int = 2**20
    most_gathered: int = 2**28
    tall: bool | None = None
    multiplies_bfloat16: bool = False

    @classmethod
    def for_device(cls, device: torch.device) -> Tiling:
        """Return the sizes for a device. All that compute ask here."""
        return _for_kind(device.type)

    def is_tall(self, queries: int, width: int) -> bool:
        """Return which way round the product of so many queries of a width is faster; measured on CPUs."""
        if self.tall is not None:
            return self.tall
        return 12 <= queries <= 48 or (width >= 256 and 4 <= queries <= 48)

    def is_narrow(self, values: Tensor, answer: torch.dtype) -> bool:
        """Return whether a blend may be multiplied in the dtype of ``values``, for an answer in a dtype.

        The scores never are. For bfloat16 both times, where the device multiplies it faster than float32: two to four
        times. The weights are rounded then, each by up to 2^-9, beside an answer that is rounded by as much; so no
        gradient should depend on it.
        """
        both = values.dtype == answer == torch.bfloat16 and not torch.is_grad_enabled()
        return both and self.multiplies_bfloat16

    def tiles(self, queries: int, width: int, copied: int, k: int, *, threads: int) -> Tiles:
        """Choose the tiles of a pass.

        Args:
            queries: How many queries each group has.
            width: Of prepared queries.
            copied: How many numbers of each row of a block are copied: where they are, blocks are smaller.
            k: How many of the best rows are looked for in each tile: a tile for many is wide.
            threads: How many threads share a block; 1 where a product is shared by all.
        """
        if k:
            wide = min(8 * GROUP * k, self.copied // max(1, copied))
            height = min(queries, max(16, self.elements // max(1, wide)))
        else:
            height = -(-queries // max(1, -(-queries // self.queries)))
        rows = min(self.elements // max(1, height), self.copied // max(1, copied), self.rows)
        rows = max(rows // GROUP, 1) * GROUP
        partition = min(self.sum_rows, rows)
        # A thread that multiplies a part of the rows by itself shares no operand and no result with the others.
        share = rows // threads // GROUP * GROUP
        if threads > 1 and min(self.fewest_sum_rows, partition) <= share < partition:
            partition = share
        tall = k == 0 and self.is_tall(height, width)
        return Tiles(height, rows // partition * partition, partition, tall, even=k > 0)


@lru_cache(maxsize=8)
def _for_kind(kind: str) -> Tiling:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
    fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return Tiling(multiplies_bfloat16=fast)
