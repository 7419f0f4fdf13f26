"""Gumbel noise: a function of the seed, the query and the slot, so that backward draws what forward drew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softdb.scoring.normalizers import is_random

__all__ = ["GumbelNoise", "noise_for", "splitmix64"]


@dataclass(frozen=True)
class GumbelNoise:
    """Noise for the score of each query with each row: of scores with it, the largest is a draw from their softmax.

    ``-log(-log(u))`` of a uniform u that is a hash of seed, query and row. So it is the same in every block, forward
    and backward, and never held.

    Attributes:
        seed: What it is drawn by, an int64; a tensor () where a transform of torch.func may batch it.

    Source: Gumbel 1954; Maddison, Tarlow & Minka 2014 (arXiv 1411.0030). The hash is SplitMix64 (Steele, Lea & Flood
    2014, doi 10.1145/2660193.2660195).
    """

    seed: int | Tensor

    @classmethod
    def draw(cls, generator: torch.Generator | None) -> GumbelNoise:
        """Noise whose seed comes from ``generator``, or from torch's own."""
        device = "cpu" if generator is None else generator.device
        return cls(int(torch.randint(2**62, (), generator=generator, device=device)))

    def at(self, queries: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:  # (..., b), (..., C) -> (..., b, C)
        """The noise of queries with rows, each given by its number; an own list of rows for each query is (b, 1, k)."""
        query_hash = splitmix64(self.seed, queries).unsqueeze(-1)
        row_hash = splitmix64(~self.seed, rows).unsqueeze(-2)
        bits = mixed(query_hash + row_hash)
        uniform = (bits >> 11).bitwise_and_(2**53 - 1).to(dtype).mul_(2.0**-53)
        # The large ones come of u near 1, so it is 1 - u that is exact there.
        lowest, highest = 2.0**-54, 1 - torch.finfo(dtype).eps / 2
        if isinstance(self.seed, Tensor):  # torch has no batching rule for clamp_
            uniform = uniform.clamp(lowest, highest)
        else:
            uniform.clamp_(lowest, highest)
        return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)


_FACTORS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def splitmix64(seed: int | Tensor, numbers: Tensor) -> Tensor:
    """Compute the random int64 at the places ``numbers`` of the SplitMix64 stream of ``seed``."""
    return mixed(numbers * _GOLDEN + seed)


def mixed(numbers: Tensor) -> Tensor:
    """Numbers whose bits all depend on all bits of those given: the last steps of SplitMix64."""
    for shift, factor in _FACTORS:
        high = (numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch repeats the sign where it shifts
        numbers = high.bitwise_xor_(numbers)
        if factor != 1:
            numbers = numbers.mul_(factor)
    return numbers


def noise_for(normalizer: str, generator: torch.Generator | None) -> GumbelNoise | None:
    """The noise of a read, if its normalizer has any."""
    return GumbelNoise.draw(generator) if is_random(normalizer) else None
