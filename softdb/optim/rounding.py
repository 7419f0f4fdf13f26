"""Stochastic rounding of rows in half precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softdb.scoring.gumbel import hash_number, splitmix64

__all__ = ["NOISE_DTYPES", "draw_noise", "round_stochastically", "start_streams"]


# Integer type of the random bits for each entry. Rounding a float32 to bfloat16 drops 16 bits; rounding to float16
# drops up to 24 significant bits.
NOISE_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int32}


def start_streams(seed: int, step: int, rows: Tensor) -> Tensor:
    """Start the random streams of a step, for each column of ``rows``.

    Each stream yields 64-bit numbers. The bits of a number are divided among several columns.
    """
    key = hash_number(seed, step)
    columns_per_number = 64 // torch.iinfo(NOISE_DTYPES[rows.dtype]).bits
    streams = -(-math.prod(rows.shape[1:]) // columns_per_number)
    return splitmix64(key, torch.arange(streams, device=rows.device))


def draw_noise(streams: Tensor, slots: slice | Tensor, rows: Tensor) -> Tensor:
    """Draw a random integer for each entry of ``rows``.

    It depends only on the seed, the step, the row's slot and the column, not on the block.
    """
    if isinstance(slots, slice):
        slots = torch.arange(slots.start, slots.stop, device=rows.device)
    numbers = splitmix64(streams, slots.unsqueeze(-1)).view(NOISE_DTYPES[rows.dtype])
    return numbers[:, : math.prod(rows.shape[1:])].reshape(rows.shape)


def round_stochastically(numbers: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 numbers to a neighbor in ``dtype``, so that the mean is kept.

    Args:
        numbers: float32 numbers, which are not changed.
        dtype: bfloat16 or float16.
        noise: A random integer per number, of the type in `NOISE_DTYPES`.

    Returns:
        The rounded numbers, in float32.
    """
    largest = torch.finfo(dtype).max
    within = numbers.clamp(-largest, largest)
    bits = within.view(torch.int32)
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32. Adding random bits to the lower half carries into the upper half with
        # a probability that is proportional to the distance.
        bits = bits.add(noise).add_(2**15).bitwise_and_(-(2**16))
        rounded = bits.view(torch.float32)
    else:
        # Neighbors in float16 differ by 2^-10 times the number's power of two, and by at least 2^-24. All operations
        # below are exact.
        spacing = bits.bitwise_and(0xFF << 23).clamp_(min=(127 - 14) << 23).sub_(10 << 23).view(torch.float32)
        probability = within.abs().div_(spacing)
        rounded = probability.floor()
        probability -= rounded
        uniform = noise.bitwise_and(2**24 - 1).to(torch.float32).mul_(2.0**-24)
        rounded.add_(uniform < probability).mul_(spacing).copysign_(within)
    # `within - numbers` is 0, except for infinities, NaN and numbers outside of the dtype's range. Its subtraction
    # restores such numbers, and the conversion to the dtype handles them. `numbers - within` is not added, because
    # -0 + 0 is 0, which would lose the sign.
    return rounded.sub_(within.sub_(numbers))
