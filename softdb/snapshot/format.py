"""Format of a snapshot: a manifest, and a safetensors file for each tensor."""

from __future__ import annotations

import errno
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ALIGNMENT",
    "DAMAGE_ERRNOS",
    "DATA_FILE_PATTERN",
    "DRAFT_PATTERN",
    "DTYPES_BY_NAME",
    "DTYPE_NAMES",
    "FORMAT",
    "LOCK_FILE",
    "MANIFEST",
    "Entry",
    "Sizes",
    "is_name",
    "view_bytes",
]

FORMAT = 1


MANIFEST, LOCK_FILE = "manifest.json", ".lock"


# Error numbers of `os.open` which mean that a file is missing or is not a regular file.
DAMAGE_ERRNOS = (
    errno.ENOENT,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENAMETOOLONG,
)


# Alignment of the data in a file, in bytes.
ALIGNMENT = 64


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


DATA_FILE_PATTERN = re.compile(r"[a-z_][a-z0-9_.]*-([0-9]{1,18})\.safetensors")


DRAFT_PATTERN = re.compile(re.escape(MANIFEST) + r"-([0-9]{1,18})")


class Entry(NamedTuple):
    """Tensor of a snapshot, as the manifest describes it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blake2b: str

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """Header of the file, in the safetensors format."""
        described = {"dtype": DTYPE_NAMES[self.dtype], "shape": list(self.shape), "data_offsets": [0, self.nbytes]}
        text = json.dumps({self.name: described}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def is_name(name: str) -> bool:
    """Return whether ``name`` consists of identifiers separated by dots.

    The name of a tensor becomes part of a file name.
    """
    return all(part.isidentifier() for part in name.split("."))


def view_bytes(flat: Tensor) -> memoryview:
    """Return a view of the bytes of a 1-D tensor on the CPU."""
    numbers: Any = flat.contiguous().view(torch.uint8).numpy()
    return memoryview(numbers) if len(flat) else memoryview(b"")


@dataclass(frozen=True)
class Sizes:
    """Numbers of bytes that are processed at a time.

    Attributes:
        chunk: Size of the chunks that are written and hashed, each by one thread. The hash of a file is computed from
            those of its chunks, so this size is part of the format.
        part: Size of the parts of a chunk that are copied, hashed and written one after the other. A part fits in the
            processor cache.
        sync: Number of written bytes after which a thread starts to sync the file to the disk. Writing continues.
        manifest: Maximum size of a manifest, which describes a few dozen tensors.
    """

    chunk: int = 2**23
    part: int = 2**18
    sync: int = 2**26
    manifest: int = 2**20

    @classmethod
    def default(cls) -> Sizes:
        """Return the sizes that are used to write and read files."""
        return cls()
