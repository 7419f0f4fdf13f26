"""softdb: a differentiable soft key-value store.

A read is attention over the rows of a table: a query is compared with every key, and the result is the sum of the
values, weighted by the softmax of the scores. `SoftKVStore` holds the rows. Gradients flow to the query, the keys and
the values.
"""

from softdb import errors, functional, lab, layers, optim, page
from softdb.errors import (
    ArgumentError,
    CorruptSnapshotError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FieldError,
    ForeignWriteError,
    GrowthError,
    IndexBuildError,
    LockedError,
    MissingPackageError,
    NonFiniteError,
    NotApplicableError,
    PerformanceWarning,
    ReadOnlyError,
    SecondDerivativeError,
    ShapeError,
    SoftDBError,
    StaleReadError,
    TransformError,
    UnfinishedWriteError,
    UnknownIdError,
    UnsupportedSystemError,
)
from softdb.index.config import IndexConfig, IndexStats
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdam
from softdb.reading.audit import Audit
from softdb.reading.result import Read
from softdb.store import SoftKVStore
from softdb.table.rows import Rows
from softdb.table.usage import Usage
from softdb.version import __version__

__all__ = [
    "ArgumentError",
    "Audit",
    "ContextMemory",
    "CorruptSnapshotError",
    "DeviceError",
    "DtypeError",
    "DuplicateIdError",
    "FieldError",
    "ForeignWriteError",
    "GrowthError",
    "IndexBuildError",
    "IndexConfig",
    "IndexStats",
    "LockedError",
    "MemoryLayer",
    "MissingPackageError",
    "NonFiniteError",
    "NotApplicableError",
    "PerformanceWarning",
    "ProductKeyMemory",
    "Read",
    "ReadOnlyError",
    "RowAdam",
    "Rows",
    "SecondDerivativeError",
    "ShapeError",
    "SoftDBError",
    "SoftKVStore",
    "StaleReadError",
    "TransformError",
    "UnfinishedWriteError",
    "UnknownIdError",
    "UnsupportedSystemError",
    "Usage",
    "__version__",
    "errors",
    "functional",
    "lab",
    "layers",
    "optim",
    "page",
]
