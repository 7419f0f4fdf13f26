"""Configure an index, and report its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from softdb._checks import check_above_zero, check_number, describe
from softdb.errors import DtypeError

__all__ = ["IndexConfig", "IndexStats"]


@dataclass(frozen=True)
class IndexConfig:
    """Configure how a store finds the candidates of a top-k read.

    Args:
        factory: "auto" (exact below a measured number of rows, FAISS IVF above), "Flat" (softdb's own exact top-k;
            no FAISS object is built), or a FAISS factory string such as "IVF1024,Flat" or "HNSW32".
        recall: The fraction of the true k best rows that the search is to find. IVF probes and HNSW's efSearch are
            raised, when the index is built, until a sample of queries finds as many, and checked again after a
            quarter of the rows has moved.
        tolerance: How far a key may be moved by an optimiser before the index takes note, relative to the keys' median
            distance from their middle: for keys about the origin that is their norm (of normalised keys, for
            metric="cosine"), and less where they lie in clusters far apart. Scores come from the keys as they are in
            any case. 0 takes note of every move. To know, the index keeps a float32 copy of a trainable store's keys.
        garbage: The share of the index's entries that may be of rows changed or deleted before it is rebuilt.
        background: Whether to build in a thread of its own: until it is done, and rows change the next time, searches
            go on with what is there. Off, so that results never depend on timing.
    """

    factory: str = "auto"
    recall: float = field(default=0.95, kw_only=True)
    tolerance: float = field(default=0.02, kw_only=True)
    garbage: float = field(default=0.5, kw_only=True)
    background: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise DtypeError(
                f"factory: expected 'auto', 'Flat' or a FAISS factory string, got {describe(self.factory)}"
            )
        for name in ("recall", "garbage"):
            object.__setattr__(self, name, check_above_zero(name, getattr(self, name), most=1))
        object.__setattr__(self, "tolerance", check_number("tolerance", self.tolerance))
        if not isinstance(self.background, bool):
            raise DtypeError(f"background: expected True or False, got {describe(self.background)}")


@dataclass(frozen=True)
class IndexStats:
    """Report the state of an index and its costs.

    Attributes:
        rows: Rows in the store.
        pending: Rows that are searched exactly because the base does not hold them as they are.
        factory: The FAISS factory string of the base; "Flat" where searches are exact.
        nprobe: IVF lists visited per query; None for other indexes.
        recall: Measured on a sample of queries when the base was built, or checked last; 1.0 where there is none. Reads
            search exactly where the base would be slower: then they find everything.
        builds: How often a base has been built.
        search_seconds, upkeep_seconds, rebuild_seconds: Time spent so far in searching; in noting changes, taking rows
            in and checking the recall; and in building.
        error: Why the last build failed; searches are exact until the next. None if it did not.
    """

    rows: int
    pending: int
    factory: str
    nprobe: int | None
    recall: float | None
    builds: int
    search_seconds: float
    upkeep_seconds: float
    rebuild_seconds: float
    error: str | None
