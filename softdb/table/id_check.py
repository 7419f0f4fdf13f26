"""Checksum of ids, which reveals averaged or mixed row buffers.

The checksum fits the buffers of one store. It does not fit an average of the buffers of two stores, or ids of one store
with other buffers of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "AVERAGED_IDS",
    "CHECK_PATTERN",
    "CHECK_SIZE",
    "INVALID_CHECK",
    "compute_id_check",
    "hash_rows",
    "is_same_hash",
]

# Hashes and numbers of writes are cut to these bits. The numbers of a checksum are then below 2^24, and float32
# represents them exactly: an average a + rate * (b - a) of two equal checksums is the same checksum.
HASH_MASK, INVALID_CHECK = 2**20 - 1, -1
# Length of the checksum. An average decay * a + (1 - decay) * b is rounded down to an integer. For some decays, such as
# 0.9 and 0.9999, it differs from two equal integers in about a fifth of all cases. Ids then change, too; a checksum of
# this length is practically certain to reveal that.
CHECK_SIZE = 64
CHECK_PATTERN = 1_000_003 + 40_503 * torch.arange(CHECK_SIZE, device="cpu")
AVERAGED_IDS = (
    "rows.ids: expected the ids of rows, got numbers that other code has averaged or overwritten, for example by an "
    "average with use_buffers=True, of a state_dict, or of two rows in one slot; average by id with "
    "softdb.optim.update_average(average, model, decay), and load a state_dict to use this store again"
)


def compute_id_check(id_hash: int, writes: int) -> Tensor:  # -> (CHECK_SIZE,)
    """Compute the checksum of ids from their hash.

    Its first number is the number of writes; the others depend on the number of writes and the hash.
    """
    writes &= HASH_MASK
    mixed = (writes * 0x9E3779B1 ^ (id_hash & HASH_MASK) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
    check = CHECK_PATTERN + ((mixed ^ (mixed >> 13)) & HASH_MASK)
    check[0] = writes
    return check


def hash_rows(slots: Tensor, ids: Tensor) -> int:  # (m,), (m,) on one device
    """Sum the hashes of the pairs of slot and id."""
    mixed = slots * -7046029254386353131 + ids * -4417276706812531889
    mixed = (mixed ^ (mixed >> 31)) * -7723592293110705685
    return int(((mixed ^ (mixed >> 29)) & HASH_MASK).sum())


def is_same_hash(one: int, other: int) -> bool:
    """Return whether two hashes agree in the bits that the checksum uses."""
    return one & HASH_MASK == other & HASH_MASK
