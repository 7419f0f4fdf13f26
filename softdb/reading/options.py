"""`ReadOptions`: validated arguments of a read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdb._checks import check_above_zero, check_choice, check_int, check_positive, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.filters import Where
from softdb.scoring.normalizers import check_normalizer

__all__ = ["MODES", "Mode", "ReadOptions"]

Mode = Literal["exact", "topk", "hard"]
MODES = ("exact", "topk", "hard")


@dataclass(frozen=True)
class ReadOptions:
    """Arguments of `softdb.SoftKVStore.read` except the query.

    The constructor checks how they depend on each other. ``where``, ``exclude`` and ``temperature`` are checked against
    the rows and the query when the read runs.
    """

    mode: Mode = "exact"
    k: int | None = None
    where: Where | None = None
    exclude: Tensor | None = None
    temperature: float | Tensor | None = None
    normalizer: str = "softmax"
    tail_samples: int = 0
    tolerance: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        k, tail_samples, tolerance = check_options(
            self.mode, self.k, self.normalizer, self.tail_samples, self.tolerance, self.generator
        )
        for name, value in (("k", k), ("tail_samples", tail_samples), ("tolerance", tolerance)):
            object.__setattr__(self, name, value)


def check_options(
    mode: object,
    k: int | None,
    normalizer: str,
    tail_samples: int = 0,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[int | None, int, float | None]:
    """Check the arguments of a read that depend on its mode.

    Returns:
        k, tail_samples and tolerance as Python numbers.
    """
    tail_samples = check_whole("tail_samples", tail_samples, least=0)
    tolerance = None if tolerance is None else check_above_zero("tolerance", tolerance)
    check_choice("mode", mode, MODES)
    if mode == "hard":
        _refuse(k is not None, "k", "hard mode reads one row")
        _refuse(normalizer != "softmax", "normalizer", "hard mode gives its one row weight 1")
    if mode != "topk":
        _refuse(tail_samples != 0, "tail_samples", f"{mode} mode leaves no tail", ", or pass mode='topk'")
        _refuse(tolerance is not None, "tolerance", f"{mode} mode approximates nothing", ", or pass mode='topk'")
    if tail_samples:
        _refuse(normalizer != "softmax", "normalizer", "a sample estimates a softmax only")
    check_normalizer(normalizer, None if tail_samples or tolerance is not None else generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
    if tolerance is not None:
        _refuse(tail_samples != 0, "tail_samples", "a tolerance chooses the sample")
        _refuse(normalizer != "softmax", "normalizer", "a sample estimates a softmax only")
    elif mode == "topk" and k is None:
        raise ArgumentError(
            "k: expected the number of candidates, since mode='topk' needs k or tolerance, got None; pass k=..."
        )
    return None if k is None else check_positive("k", k), tail_samples, tolerance


def _refuse(given: bool, name: str, why: str, otherwise: str = "") -> None:
    """Raise `ArgumentError` if an argument that does not apply is given."""
    if given:
        raise ArgumentError(f"{name}: expected nothing, since {why}; leave it out{otherwise}")
