"""Gumbel noise as a hash of seed, query and slot.

Backward recomputes the noise of forward, so the noise is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.scoring.normalizers import is_random

__all__ = ["GumbelNoise", "draw_noise", "hash_number", "splitmix64"]


@dataclass(frozen=True)
class GumbelNoise:
    """Gumbel noise for the scores of queries and rows.

    The row with the largest sum of score and noise is a sample from the softmax of the scores. The noise is
    ``-log(-log(u))``, where the uniform number u is a hash of seed, query and row. So the noise does not depend on the
    tiling, and forward and backward compute the same noise.

    Attributes:
        seed: The seed, an int64. A tensor () under transforms of torch.func, which may batch it.

    Source: Gumbel 1954; Maddison, Tarlow & Minka 2014 (arXiv 1411.0030). The hash is SplitMix64 (Steele, Lea & Flood
    2014, doi 10.1145/2660193.2660195).
    """

    seed: int | Tensor

    @classmethod
    def draw(cls, generator: torch.Generator | None) -> GumbelNoise:
        """Draw a seed from ``generator``, or from torch's default generator."""
        device = "cpu" if generator is None else generator.device
        return cls(int(torch.randint(2**62, (), generator=generator, device=device)))

    def at(self, queries: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:  # (..., b), (..., C) -> (..., b, C)
        """Compute the noise of queries and rows.

        Args:
            queries: Numbers of the queries, (..., b).
            rows: Numbers of the rows, (..., C). Queries (b, 1) and rows (b, k) give (b, 1, k): a list of rows
                for each query.
            dtype: Floating-point type of the noise.
        """
        query_hash = splitmix64(self.seed, queries).unsqueeze(-1)
        row_hash = splitmix64(~self.seed, rows).unsqueeze(-2)
        bits = mix_bits(query_hash + row_hash)
        uniform = (bits >> 11).bitwise_and_(2**53 - 1).to(dtype).mul_(2.0**-53)
        # Large noise needs u near 1, where floating-point numbers are coarse. So ``uniform`` is 1 - u.
        lowest, highest = 2.0**-54, 1 - torch.finfo(dtype).eps / 2
        if isinstance(self.seed, Tensor):  # torch has no batching rule for clamp_
            uniform = uniform.clamp(lowest, highest)
        else:
            uniform.clamp_(lowest, highest)
        return uniform.neg_().log1p_().neg_().log_().neg_()


def _to_signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_GOLDEN_GAMMA = _to_signed(0x9E3779B97F4A7C15)


_SHIFTS_AND_FACTORS = ((30, _to_signed(0xBF58476D1CE4E5B9)), (27, _to_signed(0x94D049BB133111EB)), (31, 1))


def splitmix64(seed: int | Tensor, numbers: Tensor) -> Tensor:
    """Compute the int64 numbers at some positions of the SplitMix64 stream of a seed."""
    return mix_bits(numbers * _GOLDEN_GAMMA + seed)


def hash_number(seed: int, number: int) -> int:
    """Compute `splitmix64` of one number on the host."""
    bits = (number * _GOLDEN_GAMMA + seed) % 2**64
    for shift, factor in _SHIFTS_AND_FACTORS:
        bits = (bits ^ bits >> shift) * factor % 2**64
    return _to_signed(bits)


def mix_bits(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers by the last steps of SplitMix64."""
    for shift, factor in _SHIFTS_AND_FACTORS:
        high = (numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # a logical shift: torch's shift repeats the sign
        numbers = high.bitwise_xor_(numbers)
        if factor != 1:
            numbers = numbers.mul_(factor)
    return numbers


def draw_noise(normalizer: str, generator: torch.Generator | None) -> GumbelNoise | None:
    """Draw the noise of a read; return None if its normalizer has none."""
    return GumbelNoise.draw(generator) if is_random(normalizer) else None
