"""Exceptions of softdb.

::

    SoftDBError
    ├── ArgumentError          (ValueError)    an argument is out of range or does not fit the others
    │   ├── ShapeError                         a tensor has the wrong shape
    │   ├── DeviceError                        a tensor is on the wrong device
    │   ├── NonFiniteError                     a number is NaN or infinite
    │   ├── DuplicateIdError                   an id is given twice, or exists already
    │   └── NotApplicableError (AttributeError) an attribute does not apply to an object with these options
    ├── DtypeError             (TypeError)     a tensor or argument has the wrong type or name
    ├── UnknownIdError         (KeyError)      no row has this id
    ├── FieldError             (KeyError)      a field is unknown, missing or reserved
    ├── GrowthError            (RuntimeError)  the storage cannot be resized now, or would exceed its capacity
    ├── StaleReadError         (RuntimeError)  a row changed between a read and its backward
    ├── SecondDerivativeError  (RuntimeError)  an exact read was differentiated twice
    ├── ForeignWriteError      (RuntimeError)  other code replaced or overwrote the tensors of the store
    ├── CorruptSnapshotError   (ValueError)    a snapshot differs from what was saved
    ├── IndexBuildError        (RuntimeError)  the index build failed; reads use exact search
    ├── LockedError            (RuntimeError)  another save to the same path is in progress
    ├── MissingPackageError    (ImportError)   a package of an extra of softdb is not installed
    ├── ReadOnlyError          (RuntimeError)  the rows are memory-mapped files: call materialize() first
    ├── TransformError         (NotImplementedError)  a transform of torch.func or torch.export is not supported
    ├── UnfinishedWriteError   (RuntimeError)  a write failed midway; the next use of the store completes it
    └── UnsupportedSystemError (RuntimeError)  the operating system lacks the files and locks of save and load

If a method that writes raises one of them, nothing has been written, except with `UnfinishedWriteError`.

`PerformanceWarning` is a warning, not an error: the result is right, but another option would cost less.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CorruptSnapshotError",
    "DeviceError",
    "DtypeError",
    "DuplicateIdError",
    "FieldError",
    "ForeignWriteError",
    "GrowthError",
    "IndexBuildError",
    "LockedError",
    "MissingPackageError",
    "NonFiniteError",
    "NotApplicableError",
    "PerformanceWarning",
    "ReadOnlyError",
    "SecondDerivativeError",
    "ShapeError",
    "SoftDBError",
    "StaleReadError",
    "TransformError",
    "UnfinishedWriteError",
    "UnknownIdError",
    "UnsupportedSystemError",
]


class SoftDBError(Exception):
    """Base class of all exceptions of softdb."""


class ArgumentError(SoftDBError, ValueError):
    """An argument is out of range or does not fit the others."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape."""


class DeviceError(ArgumentError):
    """A tensor is on the wrong device."""


class NonFiniteError(ArgumentError):
    """A number that must be finite is NaN or infinite."""


class DuplicateIdError(ArgumentError):
    """An id is given twice, or exists already."""


class NotApplicableError(ArgumentError, AttributeError):
    """An attribute does not apply to a store or layer with these options.

    ``hasattr`` returns False for it.
    """


class DtypeError(SoftDBError, TypeError):
    """A tensor or argument has the wrong type, or an argument has an unknown name."""


class UnfinishedWriteError(SoftDBError, RuntimeError):
    """A write failed midway; the next use of the store completes it.

    The usual cause is a lack of memory.
    """


class _LookupFailure(SoftDBError, KeyError):
    __str__ = Exception.__str__  # KeyError would print the message as a quoted repr


class UnknownIdError(_LookupFailure):
    """No row has this id."""


class FieldError(_LookupFailure):
    """A field is unknown, missing or reserved."""


class ForeignWriteError(SoftDBError, RuntimeError):
    """Other code replaced or overwrote the tensors of a store.

    The tensors may no longer hold the rows of the store.
    """


class GrowthError(SoftDBError, RuntimeError):
    """The storage cannot grow or shrink now, or would exceed its capacity.

    Call ``reserve()`` or ``compact()``, or load a state dict of another size, before the read and before wrapping the
    module in DistributedDataParallel.
    """


class StaleReadError(SoftDBError, RuntimeError):
    """A row that a read used changed before the backward of the read.

    Call ``backward()`` before writes and optimizer steps, or read again. Writes of a store to rows without gradient do
    not raise it, unless the number of overwritten rows to keep exceeds the number of slots of the storage.
    """


class SecondDerivativeError(SoftDBError, RuntimeError):
    """An exact read was differentiated twice."""


class CorruptSnapshotError(SoftDBError, ValueError):
    """A snapshot differs from what was saved: a file is missing, truncated or changed."""


class IndexBuildError(SoftDBError, RuntimeError):
    """The index build failed; top-k reads use exact search."""


class LockedError(SoftDBError, RuntimeError):
    """Another save to the same path is in progress; pass ``timeout=`` to wait."""


class MissingPackageError(SoftDBError, ImportError):
    """A package that an extra of softdb installs is missing."""


class ReadOnlyError(SoftDBError, RuntimeError):
    """The rows are memory-mapped snapshot files: call ``materialize()`` first.

    ``load(mmap=True)`` maps them instead of reading them.
    """


class TransformError(SoftDBError, NotImplementedError):
    """A transform (of torch.func, forward mode, export) is not supported."""


class UnsupportedSystemError(SoftDBError, RuntimeError):
    """The operating system lacks the POSIX files and locks of ``save`` and ``load``.

    Use ``torch.save(store.state_dict(), file)`` instead.
    """


class PerformanceWarning(UserWarning):
    """Warning that another read or option would give the same result at a lower cost.

    A store issues each warning once. Turn it off by ``warnings.simplefilter("ignore", softdb.PerformanceWarning)``.
    """
