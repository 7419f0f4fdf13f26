"""Choose tile sizes and other parameters of the kernels.

A backend takes its parameters from one frozen `Tiling`, which is passed in. Choices depend on shapes and on properties
of the device, never on timing: the same call gives the same bits.

`Tiling.for_device` returns these sizes; all others are the same on all devices:

======================  =======  =======  ============================================================================
parameter               CPU      CUDA     reason for the size on CUDA
======================  =======  =======  ============================================================================
tile_elements           2^20     2^24     A tile need not fit in a cache: 64 MiB of float32 per kernel hide its launch.
max_queries             1024     4096     A product with more queries has a higher arithmetic intensity.
max_rows                2^18     2^22     A few queries fill a tile with that number of rows.
copied_elements         2^20     2^24     As tile_elements.
max_sum_rows            512      1024     Partitions are the batch of a product, which fills all multiprocessors.
max_dense_sum_rows      2048     4096     Reductions on a GPU sum pairwise, products do not.
max_dense_scores        2^17     2^22     The weights that are saved for backward: 16 MiB of float32.
max_padded_rows         4096     2^20     A copy of the rows takes less time than another kernel launch.
max_group_maxima        2^23     2^25     128 MiB of float32, so that 1,024 queries and 10^6 rows take one slice.
gathered_elements       2^20     2^24     As tile_elements.
transposed              None     False    cuBLAS multiplies both layouts equally fast.
has_fast_bf16_matmul    by CPU   True     On GPUs of compute capability 8.0 or more.
multiprocessors         -        by GPU   Number of parts into which kernels split the rows.
======================  =======  =======  ============================================================================

The parameters `min_sum_rows`, for threads, and `max_unshifted_score` are not used on CUDA, where reads always subtract
the largest score: to find out whether that is necessary, the host would have to wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from softdb.pending_checks import DEFERRED_DEVICES

__all__ = ["GROUP_COLUMNS", "Tiles", "Tiling"]

# Two-stage top-k compares the maxima of groups of this many columns.
GROUP_COLUMNS = 32


@dataclass(frozen=True)
class Tiles:
    """Tile shape of one pass over the rows.

    Backward uses the tiles of forward, so that it computes the same scores.

    Attributes:
        queries: Number of queries in a tile.
        rows: Number of rows in a block, a multiple of ``partition``.
        partition: Number of rows in each product, where a block is split into several products.
        transposed: Whether tiles are stored transposed: see `softdb.kernels.blocks.products.TileProduct`.
        exact_ties: Whether equal rows have bitwise equal scores: see `softdb.kernels.blocks.products.TileProduct`.
    """

    queries: int
    rows: int
    partition: int
    transposed: bool
    exact_ties: bool


@dataclass(frozen=True)
class Tiling:
    """Sizes and thresholds of a backend; the defaults are those of CPUs.

    Attributes:
        tile_elements: Maximum number of scores in a tile. A tile and its operands fit in the second-level cache.
        max_queries: Maximum number of queries in a tile.
        max_rows: Maximum number of rows in a tile.
        copied_elements: Maximum number of elements of a block that are copied at once, where rows have to be copied.
            2^20 elements are 4 MiB of float32.
        max_sum_rows: Maximum number of rows over which one product sums weighted values. On an AMD EPYC (Zen 3) one
            float32 product over 70,000 equal summands had an error of 6e-4; the error grows with their number.
        min_sum_rows: Minimum number of rows in a partition.
        max_dense_sum_rows: Maximum number of rows over which products and torch's softmax sum, in a read whose scores
            all fit in one small tile.
        max_dense_scores: Maximum number of scores that are computed at once and whose weights are saved for backward.
            2^17 scores are half a MiB of float32.
        max_padded_rows: Maximum number of rows that are copied to pad them; at least `GROUP_COLUMNS`.
        max_unshifted_score: Maximum absolute score for which exponentials are computed without subtracting a maximum.
            Up to this score they neither overflow nor underflow.
        one_pass_groups: An exact top-k search takes one pass if there are at most k times this number of groups of
            rows, otherwise two passes.
        max_group_maxima: Maximum number of group maxima that an exact top-k search holds at once. The search processes
            the queries in slices to stay below this limit. 2^23 maxima are 32 MiB of float32.
        gathered_elements: Maximum number of elements of gathered rows that are held at once, 4 MiB of float32.
        max_sparse_elements: Maximum number of elements that are gathered from rows with weight under a sparse
            normalizer. 2^28 elements are 1 GiB of float32.
        transposed: Whether tiles are stored transposed; None to choose the faster layout for each shape.
        has_fast_bf16_matmul: Whether the device multiplies bfloat16 matrices faster than float32 ones.
        multiprocessors: Number of multiprocessors of a GPU. Kernels split the rows until each multiprocessor has work.
            The default is that of an H100.
        float32_precision: How kernels in Triton multiply float32, if TF32 is not allowed: "ieee", or "tf32x3" on tensor
            cores.
    """

    tile_elements: int = 2**20
    max_queries: int = 1024
    max_rows: int = 2**18
    copied_elements: int = 2**20
    max_sum_rows: int = 512
    min_sum_rows: int = 256
    max_dense_sum_rows: int = 2048
    max_dense_scores: int = 2**17
    max_padded_rows: int = 4096
    max_unshifted_score: float = 40.0
    one_pass_groups: int = 32
    max_group_maxima: int = 2**23
    gathered_elements: int = 2**20
    max_sparse_elements: int = 2**28
    transposed: bool | None = None
    has_fast_bf16_matmul: bool = False
    multiprocessors: int = 132
    float32_precision: str = "ieee"

    @classmethod
    def for_device(cls, device: torch.device) -> Tiling:
        """Return the parameters for a device."""
        index = 0 if device.index is None else device.index
        return _make_tiling(device.type, index if device.type == "cuda" else 0)

    def is_transposed_faster(self, queries: int, width: int) -> bool:
        """Return whether ``keys @ query.T`` is faster than ``query @ keys.T``.

        The thresholds were measured on CPUs.
        """
        if self.transposed is not None:
            return self.transposed
        return 12 <= queries <= 48 or (width >= 256 and 4 <= queries <= 48)

    def can_use_bf16_matmul(self, values: Tensor, output_dtype: torch.dtype) -> bool:
        """Return whether to multiply weights by bfloat16 ``values`` in bfloat16.

        True if the output is bfloat16 as well, no gradient is required, and the device multiplies bfloat16 faster than
        float32. The product is then two to four times as fast. Each weight has a relative rounding error of up to 2^-9,
        as the output has. Scores are never computed in bfloat16.
        """
        is_bf16 = values.dtype == output_dtype == torch.bfloat16
        return is_bf16 and not torch.is_grad_enabled() and self.has_fast_bf16_matmul

    def choose_tiles(self, queries: int, width: int, copied_per_row: int, k: int, *, threads: int) -> Tiles:
        """Choose the tiles of a pass.

        Args:
            queries: Number of queries in each group.
            width: Width of prepared queries.
            copied_per_row: Number of elements of each row that are copied; blocks of copied rows are smaller.
            k: Number of best rows to find in each tile; 0 for none. Tiles have more rows for larger k.
            threads: Number of threads that share a block; 1 where they share each product.
        """
        if k:
            wide = min(8 * GROUP_COLUMNS * k, self.copied_elements // max(1, copied_per_row))
            height = min(queries, max(16, self.tile_elements // max(1, wide)))
        else:
            height = -(-queries // max(1, -(-queries // self.max_queries)))
        rows = min(self.tile_elements // max(1, height), self.copied_elements // max(1, copied_per_row), self.max_rows)
        rows = max(rows // GROUP_COLUMNS, 1) * GROUP_COLUMNS
        partition = min(self.max_sum_rows, rows)
        # Each thread multiplies its own partitions, so threads share neither operands nor results.
        rows_per_thread = rows // threads // GROUP_COLUMNS * GROUP_COLUMNS
        if threads > 1 and min(self.min_sum_rows, partition) <= rows_per_thread < partition:
            partition = rows_per_thread
        transposed = k == 0 and self.is_transposed_faster(height, width)
        return Tiles(height, rows // partition * partition, partition, transposed, exact_ties=k > 0)


# Sizes for GPUs; the table at the top of this module gives the reasons.
_GPU_TILING = Tiling(
    tile_elements=2**24,
    max_queries=4096,
    max_rows=2**22,
    copied_elements=2**24,
    max_sum_rows=1024,
    max_dense_sum_rows=4096,
    max_dense_scores=2**22,
    max_padded_rows=2**20,
    max_group_maxima=2**25,
    gathered_elements=2**24,
    transposed=False,
    has_fast_bf16_matmul=True,
)


@lru_cache(maxsize=64)
def _make_tiling(kind: str, index: int) -> Tiling:
    """Make the parameters for a device; read its properties once."""
    if kind == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return Tiling(has_fast_bf16_matmul=fast)
    if kind not in DEFERRED_DEVICES:
        return Tiling()
    if kind != "cuda" or not torch.cuda.is_available():  # a fake tensor
        return _GPU_TILING
    properties = torch.cuda.get_device_properties(index)
    return replace(
        _GPU_TILING, multiprocessors=properties.multi_processor_count, has_fast_bf16_matmul=properties.major >= 8
    )
