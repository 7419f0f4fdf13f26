"""softdb: a differentiable soft key-value store.

Attention is a soft database lookup: a query says what is looked for, a key what a row advertises, a value what it
delivers. `SoftKVStore` keeps the rows and answers with a blend of their values through which gradients flow.
"""

from softdb import errors, functional, lab, layers, optim, page
from softdb.errors import (
    ArgumentError,
    CorruptSnapshotError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FieldError,
    GrowthError,
    LockedError,
    MissingPackageError,
    NonFiniteError,
    SecondDerivativeError,
    ShapeError,
    SoftDBError,
    StaleReadError,
    UnknownIdError,
)
from softdb.functional import Read
from softdb.index import IndexConfig, IndexStats
from softdb.store import Audit, Rows, SoftKVStore, Usage

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Audit",
    "CorruptSnapshotError",
    "DeviceError",
    "DtypeError",
    "DuplicateIdError",
    "FieldError",
    "GrowthError",
    "IndexConfig",
    "IndexStats",
    "LockedError",
    "MissingPackageError",
    "NonFiniteError",
    "Read",
    "Rows",
    "SecondDerivativeError",
    "ShapeError",
    "SoftDBError",
    "SoftKVStore",
    "StaleReadError",
    "UnknownIdError",
    "Usage",
    "__version__",
    "errors",
    "functional",
    "lab",
    "layers",
    "optim",
    "page",
]
