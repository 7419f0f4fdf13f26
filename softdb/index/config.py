"""Configure an index, and report its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from softdb._checks import check_above_zero, check_number, describe, refuse_unknown_keywords
from softdb.errors import DtypeError

__all__ = ["IndexConfig", "IndexStats"]


@refuse_unknown_keywords
@dataclass(frozen=True)
class IndexConfig:
    """Configuration of the index that finds candidates of top-k reads.

    Args:
        factory: "auto" (exact search below 500,000 rows, below 10,000,000 on a GPU; FAISS IVF from there on), "Flat"
            (exact search by softdb, without a FAISS index), or a FAISS factory string such as "IVF1024,Flat" or
            "HNSW32". FAISS indexes are in CPU memory and searched by the CPU.
        recall: Recall target: the fraction of the k best rows that a search should find. When the index is built, the
            search width (nprobe or efSearch) is raised until a sample of queries reaches the target. It is tuned again
            when the rows merged since exceed a fraction of the index, which is between a quarter and a half.
        tolerance: Distance that an optimizer may move a key before the index treats the row as changed, as a fraction
            of the median distance of the keys from their center. If the keys form distant clusters, the unit is
            smaller, because distances within clusters are used. With metric="cosine", distances are those of normalized
            keys. With 0, every change of a key counts. Scores are always computed from the current keys. For the
            comparison, the index of a trainable store keeps a float32 copy of the keys.
        garbage: Rebuild the index when more than this fraction of its entries belongs to changed or deleted rows.
        background: Whether to build the index in a background thread. When the build has finished, the new index is
            used from the first search after a further change of rows, or from a call of `SoftKVStore.refresh`. With
            False, the default, results never depend on timing.
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
    """Statistics of an index.

    Attributes:
        rows: Number of rows in the store.
        pending: Number of pending rows: new or changed rows that the base index has not merged. They are searched
            exactly.
        factory: FAISS factory string of the base index; "Flat" if searches are exact.
        nprobe: Number of IVF lists that each query visits; None for other indexes.
        recall: Recall measured on a sample of queries when the base index was built or last checked; 1.0 without a base
            index. A read uses exact search where that is faster, and then has recall 1.
        builds: Number of times that a base index has been built.
        search_seconds: Total time of searches, in seconds.
        upkeep_seconds: Total time to track changes, merge rows and check the recall, in seconds.
        rebuild_seconds: Total time of builds, in seconds.
        error: Error of the last build, or None if it succeeded. Searches are exact until a build succeeds.
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
