"""What to compare: the choices that a caller makes, and those made where none are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from softdb._checks import check_above_zero, check_choice
from softdb.errors import ArgumentError, DtypeError
from softdb.reading.result import Read
from softdb.scoring.normalizers import is_random

__all__ = ["Readable", "check_draws", "chosen_of", "given_list", "progress", "temperatures_of"]

T = TypeVar("T")


# What a temperature is multiplied by where none are given: from nearly even weights to nearly one row.
FACTORS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)


class Readable(Protocol):
    """What the lab needs of a store: a `softdb.SoftKVStore`, or anything that answers the same."""

    @property
    def read(self) -> Callable[..., Read]:
        """As `softdb.SoftKVStore.read`."""


def given_list(name: str, values: Iterable[Any], check: Callable[[Any], T]) -> list[T]:
    """Check each of ``values``; return each once, and at least one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DtypeError(f"{name}: expected a sequence, got {values!r}; write ({values!r},)")
    found = list(dict.fromkeys(map(check, values)))
    if not found:
        raise ArgumentError(f"{name}: expected at least one, got none")
    return found


def chosen_of(name: str, values: Iterable[str], choices: Sequence[str]) -> list[str]:
    """Each once, at least one, and all among ``choices``."""

    def checked(value: str) -> str:
        check_choice(name, value, choices)
        return value

    return given_list(name, values, checked)


def check_draws(store: Any, normalizers: Sequence[str]) -> None:
    """Raise where what is called a draw would be the best row."""
    drawn = [name for name in normalizers if is_random(name)]
    if drawn and not getattr(store, "training", True):
        raise ArgumentError(
            f"store: expected one in training mode, since {drawn[0]!r} draws nothing in eval mode; call store.train(), "
            "or leave it out of normalizers"
        )


def temperatures_of(store: Any, temperatures: Sequence[float] | None) -> list[float]:
    """From soft to hard, each once."""
    if temperatures is None:
        own = float(getattr(store, "temperature", 1.0))
        return [factor * own for factor in FACTORS]
    return sorted(
        given_list("temperatures", temperatures, functools.partial(check_above_zero, "temperature")), reverse=True
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[], object]]:
    """What to call after each of ``total`` steps: a progress bar's, on a terminal where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, disable=None, leave=False) as bar:
        yield bar.update
