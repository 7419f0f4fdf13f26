"""Stochastic rounding of rows in half precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softdb.scoring.gumbel import splitmix64

__all__ = ["NOISE_DTYPES", "draw_noise", "round_stochastically", "start_streams"]


# The random bits of an entry: bfloat16 drops 16 bits of a float32, float16 up to 24 that count.
NOISE_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int32}


def start_streams(seed: int, step: int, rows: Tensor) -> Tensor:
    """Start a random stream for a step and each column of ``rows``.

    A random number serves as many columns as its 64 bits suffice for.
    """
    key = int(splitmix64(seed, torch.tensor(step, device="cpu")))
    columns_per_number = 64 // torch.iinfo(NOISE_DTYPES[rows.dtype]).bits
    streams = -(-math.prod(rows.shape[1:]) // columns_per_number)
    return splitmix64(key, torch.arange(streams, device=rows.device))


def draw_noise(streams: Tensor, slots: slice | Tensor, rows: Tensor) -> Tensor:
    """Draw a random integer for each entry of ``rows``.

    It depends on the seed, the step, the row's slot and the column alone, not on the block.
    """
    if isinstance(slots, slice):
        slots = torch.arange(slots.start, slots.stop, device=rows.device)
    numbers = splitmix64(streams, slots.unsqueeze(-1)).view(NOISE_DTYPES[rows.dtype])
    return numbers[:, : math.prod(rows.shape[1:])].reshape(rows.shape)


def round_stochastically(numbers: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 numbers to a neighbour in ``dtype``, with odds that keep the mean.

    Args:
        numbers: float32; they stay as they are.
        dtype: bfloat16 or float16.
        noise: A random integer for each of them, of the type in `NOISE_DTYPES`.

    Returns:
        The rounded numbers, in float32.
    """
    largest = torch.finfo(dtype).max
    within = numbers.clamp(-largest, largest)
    bits = within.view(torch.int32)
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32. Random bits in the lower half carry over with the right odds.
        bits = bits.add(noise).add_(2**15).bitwise_and_(-(2**16))
        rounded = bits.view(torch.float32)
    else:
        # Neighbours in float16 are 2^-10 of the number's power of two apart, at least 2^-24: all steps are exact.
        spacing = bits.bitwise_and(0xFF << 23).clamp_(min=(127 - 14) << 23).sub_(10 << 23).view(torch.float32)
        odds = within.abs().div_(spacing)
        rounded = odds.floor()
        odds -= rounded
        uniform = noise.bitwise_and(2**24 - 1).to(torch.float32).mul_(2.0**-24)
        rounded.add_(uniform < odds).mul_(spacing).copysign_(within)
    # The conversion handles numbers beyond the largest one, infinities and NaN. The difference is 0 elsewhere, and is
    # subtracted, since adding it would turn -0 into 0.
    return rounded.sub_(within.sub_(numbers))
