"""Availability of Triton, and launch parameters that the kernels share.

This module does not import Triton. The interpreter of Triton (``TRITON_INTERPRET=1`` before Triton is imported) runs
kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LOG2_E",
    "MAX_WIDTH",
    "MIN_BLOCK",
    "choose_chunk",
    "choose_precision",
    "count_blocks",
    "count_splits",
    "is_available",
    "is_interpreted",
    "on_device",
    "pad_width",
    "with_unit_stride",
]

# Kernels multiply scores by this number once, because exp2 is faster than exp.
LOG2_E = 1.4426950408889634

# Largest width of keys and values that kernels support.
MAX_WIDTH = 256

# Smallest size of each dimension of a product (tl.dot).
MIN_BLOCK = 16


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def is_interpreted() -> bool:
    """Return whether the interpreter of Triton runs the kernels.

    The interpreter computes bfloat16 wrongly except for conversions to float32. Kernels therefore have a compile-time
    flag ``INTERPRETED``, with which they convert to float32 right after a load.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose_precision(precision: str) -> str:
    """Return the ``input_precision`` of products of float32 operands.

    Args:
        precision: "ieee", or "tf32x3": sums of three products of tensor cores, with almost the digits of float32.
    """
    return "tf32" if _allows_tf32() else precision


def _allows_tf32() -> bool:
    """Return whether torch may multiply float32 in TF32."""
    settings = torch.backends.cuda.matmul
    # torch refuses to read allow_tf32 once fp32_precision, which torch 2.9 added, was set.
    newer = getattr(settings, "fp32_precision", None)
    return bool(settings.allow_tf32) if newer is None else newer == "tf32"


# The compiler cannot trace the newer setting. torch.compiler.assume_constant_result would import the compiler.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_chunk(precision: str) -> int:
    """Return the number of columns that products of float32 take at a time; 0 for all.

    Products without tensor cores hold both operands in registers, which whole rows exceed.
    """
    return 32 if precision == "ieee" else 0


def count_blocks(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size`` elements."""
    return -(-size // block)


def pad_width(width: int) -> int:
    """Return the block size of a width: the next power of two, at least `MIN_BLOCK`.

    Kernels mask the columns from ``width`` on.
    """
    return max(MIN_BLOCK, 1 << max(0, width - 1).bit_length())


def count_splits(blocks: int, programs: int, multiprocessors: int, per_multiprocessor: int = 2) -> int:
    """Choose the number of splits of the rows so that all multiprocessors work.

    Args:
        blocks: Number of blocks of rows; each split gets at least one.
        programs: Number of programs for each split.
        multiprocessors: See `softdb.kernels.tiling.Tiling`.
        per_multiprocessor: Number of programs that run at once on a multiprocessor.
    """
    return max(1, min(blocks, per_multiprocessor * multiprocessors // max(1, programs)))


def with_unit_stride(tensor: Tensor) -> Tensor:
    """Return ``tensor``, copied if the elements of its rows are not adjacent."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches kernels on the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
