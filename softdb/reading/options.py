"""`ReadOptions`: validated arguments of a read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softdb._checks import Ids, check_above_zero, check_choice, check_int, check_positive, describe
from softdb.errors import ArgumentError, DtypeError
from softdb.filters import Where
from softdb.scoring.normalizers import check_normalizer, is_sparse

__all__ = ["MODES", "Mode", "ReadOptions"]

Mode = Literal["exact", "topk", "hard"]
MODES = ("exact", "topk", "hard")


@dataclass(frozen=True)
class ReadOptions:
    """Arguments of `softdb.SoftKVStore.read` except the query.

    The constructor checks each argument, and whether the arguments are allowed together. ``where``, ``exclude``,
    ``temperature`` and ``bias`` depend on the rows and the query, and are checked when the read runs.
    """

    mode: Mode = "exact"
    k: int | None = None
    where: Where | None = None
    exclude: Ids | None = None
    temperature: float | Tensor | None = None
    normalizer: str = "softmax"
    tail_samples: int = 0
    tolerance: float | None = None
    generator: torch.Generator | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        k, tail_samples, tolerance = check_options(
            self.mode, self.k, self.normalizer, self.tail_samples, self.tolerance, self.generator
        )
        if self.bias is not None:
            _refuse(tail_samples != 0, "bias", "tail_samples=..., which samples rows without it")
            _refuse(tolerance is not None, "bias", "tolerance=..., which samples rows without it")
            _refuse(is_sparse(self.normalizer), "bias", f"normalizer={self.normalizer!r}, which supports none")
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
    tail_samples = check_int("tail_samples", tail_samples, least=0)
    tolerance = None if tolerance is None else check_above_zero("tolerance", tolerance)
    check_choice("mode", mode, MODES)
    if mode == "hard":
        _refuse(k is not None, "k", "mode='hard', which reads one row")
        _refuse(normalizer != "softmax", "normalizer", "mode='hard', which gives its one row weight 1")
    if mode != "topk":
        other = f"mode={mode!r}, which does not approximate"
        _refuse(tail_samples != 0, "tail_samples", other, ", or pass mode='topk'")
        _refuse(tolerance is not None, "tolerance", other, ", or pass mode='topk'")
    if tail_samples:
        _check_is_softmax(normalizer, "tail_samples")
    check_normalizer(normalizer, None if tail_samples or tolerance is not None else generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
    if tolerance is not None:
        _refuse(tail_samples != 0, "tail_samples", "tolerance=..., which chooses the sample")
        _check_is_softmax(normalizer, "tolerance")
    elif mode == "topk" and k is None:
        raise ArgumentError(
            "k: expected the number of candidates, since mode='topk' needs k or tolerance, got None; pass k=..."
        )
    return None if k is None else check_positive("k", k), tail_samples, tolerance


def _refuse(given: bool, name: str, other: str, otherwise: str = "") -> None:
    """Raise `ArgumentError` if an argument that does not apply is given."""
    if given:
        raise ArgumentError(f"{name}: expected no value with {other}; leave it out{otherwise}")


def _check_is_softmax(normalizer: str, name: str) -> None:
    """Raise `ArgumentError` unless the normalizer of a sampled read is softmax."""
    if normalizer != "softmax":
        raise ArgumentError(
            f"normalizer: expected 'softmax' with {name}=..., since a sample estimates softmax weights only, got "
            f"{normalizer!r}; leave normalizer out"
        )
