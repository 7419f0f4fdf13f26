"""Checks of numbers on a GPU, whose errors are raised later.

A check on the CPU raises at once. On a GPU the host would have to wait for the result, so that the GPU idles until the
next kernel is launched. There a check only updates a number in the memory of the device. The host reads these numbers,
and raises the error, at the next call that waits for the device anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softdb.errors import ArgumentError, NonFiniteError

__all__ = ["DEFERRED_DEVICES", "PendingChecks", "defer_checks", "is_deferred"]

# Types of devices on which checks are deferred.
DEFERRED_DEVICES = {"cuda"}

# Messages of the checks, in the order in which they are raised: a NaN in a query makes scores NaN, too.
MESSAGES = {
    "query": "query: expected finite numbers in each read since the last check, got NaN or infinity in one of them; "
    "the results of such a query are NaN; remove or rescale it",
    "temperature": "temperature: expected finite numbers above 0 in each read since the last check, got a tensor with "
    "other values",
    "bias": "bias: expected finite numbers, or -inf to hide a row, in each read since the last check, got NaN or "
    "infinity; replace them",
    "scores": "query, keys, temperature: expected finite scores in each read since the last check, got NaN or "
    "infinity; if the keys contain NaN, training may have diverged; if query times key divided by temperature "
    "overflows, rescale query or keys, or raise the temperature",
    "gradient": "gradient: expected finite gradients of rows in each optimizer step since the last check, got NaN or "
    "infinity in some rows, which were not updated; the training may have diverged: lower the learning rate, or clip "
    "gradients",
}
KINDS = tuple(MESSAGES)


def is_deferred(tensor: Tensor) -> bool:
    """Return whether checks of a tensor are deferred, since it is on a GPU."""
    return tensor.device.type in DEFERRED_DEVICES


@contextmanager
def defer_checks(device_type: str) -> Iterator[None]:
    """Treat another type of device like a GPU within the block, in tests."""
    added = {device_type} - DEFERRED_DEVICES
    DEFERRED_DEVICES.update(added)
    try:
        yield
    finally:
        DEFERRED_DEVICES.difference_update(added)


class PendingChecks:
    """Results of checks on a device that the host has not read yet.

    For each kind of check, the device holds the largest absolute number that was checked. NaN and infinity persist in a
    maximum. A kernel may also write NaN or infinity to `flag`. The memory of the flags stays the same, so that CUDA
    graphs can capture it.

    Attributes:
        KINDS: Names of the checks.
    """

    KINDS = KINDS

    def __init__(self) -> None:
        self._flags: Tensor | None = None  # (kinds,) float64

    def __reduce__(self) -> tuple[type[PendingChecks], tuple[()]]:
        return PendingChecks, ()  # The reads and steps of a store are not those of its copy.

    def flag(self, kind: str, device: torch.device) -> Tensor:
        """Return the largest number of a kind of check, () float64.

        A kernel may update it in place.

        Args:
            kind: One of `KINDS`.
            device: The device of the numbers.
        """
        flags = self._flags
        if flags is None or flags.device != device:
            self.raise_failed()  # before the results on another device are dropped
            with torch.inference_mode(False):
                flags = self._flags = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        return flags[KINDS.index(kind)]

    @torch.no_grad()
    def check_finite(self, kind: str, numbers: Tensor) -> None:
        """Check that all numbers are finite."""
        if numbers.numel():
            self._record(kind, torch.linalg.vector_norm(numbers.detach(), torch.inf))

    @torch.no_grad()
    def check_below_infinity(self, kind: str, numbers: Tensor) -> None:
        """Check that all numbers are finite or -inf."""
        if numbers.numel():
            self._record(kind, numbers.detach().amax())

    def _record(self, kind: str, largest: Tensor) -> None:
        flag = self.flag(kind, largest.device)
        torch.maximum(flag, largest, out=flag)

    def raise_failed(self) -> None:
        """Raise the error of a check that failed, and reset all checks.

        The host waits for the device if there has been a check since the store was created.

        Raises:
            NonFiniteError: A number was NaN or infinite.
            ArgumentError: A temperature was not above 0.
        """
        flags = self._flags
        if flags is None:
            return
        largest = dict(zip(KINDS, flags.tolist(), strict=True))
        failed = [kind for kind in KINDS if not math.isfinite(largest[kind])]
        if failed:
            flags.zero_()
            error: Any = ArgumentError if failed[0] == "temperature" else NonFiniteError
            raise error(MESSAGES[failed[0]])
