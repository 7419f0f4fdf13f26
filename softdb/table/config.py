"""`StoreConfig`: the settings that a store is created with and never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from softdb._checks import check_choice, check_int, check_positive
from softdb.errors import ArgumentError
from softdb.scoring.metrics import METRICS, Metric
from softdb.table.fields import check_field_names

__all__ = ["Evict", "StoreConfig"]

Evict = Literal["lru", "oldest"]


@dataclass(frozen=True)
class StoreConfig:
    """Checked arguments of `softdb.SoftKVStore` that define its tensors and index."""

    key_dim: int
    value_dim: int
    metric: Metric = "scaled_dot"
    trainable: bool = False
    fields: Sequence[str] = ()
    capacity: int | None = None
    evict: Evict | None = None
    track_usage: bool = False

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        if self.evict is not None:
            check_choice("evict", self.evict, get_args(Evict))
        checked = {
            "key_dim": check_positive("key_dim", self.key_dim),
            "value_dim": check_int("value_dim", self.value_dim, least=0),
            "trainable": bool(self.trainable),
            "fields": check_field_names(self.fields),
            "capacity": None if self.capacity is None else check_positive("capacity", self.capacity),
            "track_usage": bool(self.track_usage),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.evict is not None and self.capacity is None:
            raise ArgumentError(f"evict={self.evict!r}: expected a capacity, got None; pass capacity=...")

    @property
    def widths(self) -> dict[str, int]:
        """Widths of keys and values, by name."""
        return {"keys": self.key_dim, "values": self.value_dim}
