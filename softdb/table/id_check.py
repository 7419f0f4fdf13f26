"""The check of ids: numbers beside them that no average or mixture of two stores' buffers fits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AVERAGED", "CHECK_SIZE", "NO_CHECK", "PATTERN", "hash_rows", "id_check_of", "same_hash"]

# The numbers are below this: a float32 holds them, so that averaging equal checks leaves them as they are.
MASK, NO_CHECK = 2**20 - 1, -1
# An average of two equal integers may be another one, by rounding: about one in three, for many decays. With so many
# numbers it is noticed.
CHECK_SIZE = 64
PATTERN = 1_000_003 + 40_503 * torch.arange(CHECK_SIZE, device="cpu")
AVERAGED = (
    "rows.ids: expected the ids of rows, got numbers that something else has averaged or overwritten (an average with "
    "use_buffers=True or of a state_dict, or one that mixes two rows); average by id with "
    "softdb.optim.update_average(average, model, decay), and load a state_dict to go on"
)


def id_check_of(id_hash: int, writes: int) -> Tensor:  # -> (CHECK_SIZE,)
    """Return the check of ids with a hash: the number of writes, and numbers derived from it and the hash."""
    writes &= MASK
    mixed = (writes * 0x9E3779B1 ^ (id_hash & MASK) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
    check = PATTERN + ((mixed ^ (mixed >> 13)) & MASK)
    check[0] = writes
    return check


def hash_rows(slots: Tensor, ids: Tensor) -> int:  # (m,), (m,) on one device
    """Sum up the hashes of rows' slots and ids."""
    mixed = slots * -7046029254386353131 + ids * -4417276706812531889
    mixed = (mixed ^ (mixed >> 31)) * -7723592293110705685
    return int(((mixed ^ (mixed >> 29)) & MASK).sum())


def same_hash(one: int, other: int) -> bool:
    """Whether two sums of hashes agree in what the check keeps of them."""
    return one & MASK == other & MASK
