"""Checks and defaults of the arguments that the functions of the lab share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from softdb._checks import check_above_zero, check_choice
from softdb.errors import ArgumentError, DtypeError
from softdb.reading.result import Read
from softdb.scoring.normalizers import is_random

__all__ = ["Readable", "check_can_draw", "check_choices", "check_list", "progress", "resolve_temperatures"]

T = TypeVar("T")


# Default temperatures, as multiples of the store's own: from nearly uniform weights to nearly one row.
TEMPERATURE_FACTORS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)


class Readable(Protocol):
    """Interface of a store that the lab needs; `softdb.SoftKVStore` implements it."""

    @property
    def read(self) -> Callable[..., Read]:
        """Method with the arguments of `softdb.SoftKVStore.read`."""


def check_list(name: str, values: Iterable[Any], check: Callable[[Any], T]) -> list[T]:
    """Check each value of a sequence; return the distinct ones, at least one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DtypeError(f"{name}: expected a sequence, got {values!r}; pass ({values!r},)")
    distinct = list(dict.fromkeys(map(check, values)))
    if not distinct:
        raise ArgumentError(f"{name}: expected at least one, got none")
    return distinct


def check_choices(name: str, values: Iterable[str], choices: Sequence[str]) -> list[str]:
    """Check that each value is one of ``choices``; return the distinct ones."""

    def check(value: str) -> str:
        check_choice(name, value, choices)
        return value

    return check_list(name, values, check)


def check_can_draw(store: Any, normalizers: Sequence[str]) -> None:
    """Raise if a normalizer is random and the store is in eval mode."""
    drawn = [name for name in normalizers if is_random(name)]
    if drawn and not getattr(store, "training", True):
        raise ArgumentError(
            f"store: expected training mode, since {drawn[0]!r} adds no noise in eval mode; call store.train(), or "
            f"remove {drawn[0]!r} from normalizers"
        )


def resolve_temperatures(store: Any, temperatures: Sequence[float] | None) -> list[float]:
    """Return the distinct temperatures, highest first; if None, the defaults."""
    if temperatures is None:
        own = float(getattr(store, "temperature", 1.0))
        return [factor * own for factor in TEMPERATURE_FACTORS]
    return sorted(
        check_list("temperatures", temperatures, functools.partial(check_above_zero, "temperature")), reverse=True
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[], object]]:
    """Show a progress bar of ``total`` steps; yield the function that advances it.

    The bar is shown on a terminal, if tqdm is installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, disable=None, leave=False) as bar:
        yield bar.update
