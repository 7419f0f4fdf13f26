"""What softdb raises.

::

    SoftDBError
    ├── ArgumentError          (ValueError)    an argument is out of range or does not fit the others
    │   ├── ShapeError                         a tensor has the wrong shape
    │   ├── DeviceError                        a tensor lies on the wrong device
    │   ├── NonFiniteError                     NaN or infinity where a finite number is needed
    │   ├── DuplicateIdError                   an id is given twice, or exists already
    │   └── NotApplicableError (AttributeError) an attribute does not apply to an object made as this one is
    ├── DtypeError             (TypeError)     a tensor or argument has the wrong type
    ├── UnknownIdError         (KeyError)      no row has this id
    ├── FieldError             (KeyError)      a field is unknown, missing or reserved
    ├── GrowthError            (RuntimeError)  the storage cannot grow now: reserve() first; or never, past a capacity
    ├── StaleReadError         (RuntimeError)  a row changed between a read and its backward
    ├── SecondDerivativeError  (RuntimeError)  an exact read was differentiated twice
    ├── ForeignWriteError      (RuntimeError)  something other than the store replaced or overwrote its tensors
    ├── CorruptSnapshotError   (ValueError)    a saved store is not what it was when it was saved
    ├── IndexBuildError        (RuntimeError)  the index could not be built; searches are exact
    ├── LockedError            (RuntimeError)  somebody else is saving to the same path
    ├── MissingPackageError    (ImportError)   a package is needed that only an extra of softdb installs
    ├── ReadOnlyError          (RuntimeError)  the rows lie in a snapshot: materialize() first
    ├── TransformError         (NotImplementedError)  a transform of torch.func or torch.export cannot go through
    ├── UnfinishedWriteError   (RuntimeError)  a write is recorded, and completed at the next use of the store
    └── UnsupportedSystemError (RuntimeError)  the operating system lacks what saving and loading need

Whenever one of these is raised by a method that writes, nothing has been written, except by an `UnfinishedWriteError`.
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
    """The root of everything softdb raises on purpose."""


class ArgumentError(SoftDBError, ValueError):
    """An argument is out of range or does not fit the others."""


class ShapeError(ArgumentError):
    """A tensor has the wrong shape."""


class DeviceError(ArgumentError):
    """A tensor lies on the wrong device."""


class NonFiniteError(ArgumentError):
    """NaN or infinity where a finite number is needed."""


class DuplicateIdError(ArgumentError):
    """An id is given twice, or exists already."""


class NotApplicableError(ArgumentError, AttributeError):
    """An attribute does not apply to a store or layer made with these arguments: ``hasattr`` is False."""


class DtypeError(SoftDBError, TypeError):
    """A tensor or an argument has the wrong type."""


class UnfinishedWriteError(SoftDBError, RuntimeError):
    """Memory ran out in the middle of a write, which is recorded: the next use of the store completes it."""


class _LookupFailure(SoftDBError, KeyError):
    __str__ = Exception.__str__  # KeyError would print the message as a quoted repr


class UnknownIdError(_LookupFailure):
    """No row has this id."""


class FieldError(_LookupFailure):
    """A field is unknown, missing or reserved."""


class ForeignWriteError(SoftDBError, RuntimeError):
    """Something other than the store replaced or overwrote its tensors, so that they no longer hold its rows."""


class GrowthError(SoftDBError, RuntimeError):
    """The storage cannot grow now: ``reserve()`` before the read, or before wrapping in DDP. Or it has a capacity.

    Nor can it shrink, as a smaller state that is loaded would have it: load before the read, or before wrapping.
    """


class StaleReadError(SoftDBError, RuntimeError):
    """A row that a read used was changed before the read's backward."""


class SecondDerivativeError(SoftDBError, RuntimeError):
    """An exact read was differentiated twice."""


class CorruptSnapshotError(SoftDBError, ValueError):
    """A saved store is not what it was when it was saved: a file is missing, cut, changed or foreign."""


class IndexBuildError(SoftDBError, RuntimeError):
    """The index of top-k reads could not be built: they search exactly, and are right."""


class LockedError(SoftDBError, RuntimeError):
    """Somebody else is saving to the same path: wait with ``timeout=``."""


class MissingPackageError(SoftDBError, ImportError):
    """A package is needed that only an extra of softdb installs."""


class ReadOnlyError(SoftDBError, RuntimeError):
    """The rows lie in the files of a snapshot, as ``load(mmap=True)`` leaves them: call ``materialize()`` first."""


class TransformError(SoftDBError, NotImplementedError):
    """A transform (vmap, jvp, forward-mode differentiation, export) asks for what an operation does not support."""


class UnsupportedSystemError(SoftDBError, RuntimeError):
    """The operating system lacks what saving and loading need: keep ``state_dict()`` with ``torch.save`` there."""
