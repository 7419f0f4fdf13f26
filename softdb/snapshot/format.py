"""How a snapshot lies on disk: a manifest, and a safetensors file for each tensor."""

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
    "DAMAGE",
    "DATA_FILE",
    "DRAFT",
    "DTYPES",
    "DTYPE_OF",
    "FORMAT",
    "LOCK",
    "MANIFEST",
    "Entry",
    "Sizes",
    "bytes_of",
    "is_name",
]

FORMAT = 1


MANIFEST, LOCK = "manifest.json", ".lock"


# Of errors when a file is opened, those that tell of another kind of file than a save makes, or of none.
DAMAGE = (
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


# Where the numbers in a file begin: at a multiple of so many bytes.
ALIGNMENT = 64


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


DATA_FILE = re.compile(r"[a-z_][a-z0-9_.]*-([0-9]{1,18})\.safetensors")


DRAFT = re.compile(re.escape(MANIFEST) + r"-([0-9]{1,18})")


class Entry(NamedTuple):
    """One tensor of a snapshot, as the manifest describes it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blake2b: str

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor's numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """What the file begins with, in the safetensors format."""
        described = {"dtype": DTYPES[self.dtype], "shape": list(self.shape), "data_offsets": [0, self.nbytes]}
        text = json.dumps({self.name: described}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def is_name(name: str) -> bool:
    """Whether a tensor may have this name: it becomes part of a file's name."""
    return all(part.isidentifier() for part in name.split("."))


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a vector on the CPU."""
    numbers: Any = flat.contiguous().view(torch.uint8).numpy()
    return memoryview(numbers) if len(flat) else memoryview(b"")


@dataclass(frozen=True)
class Sizes:
    """How many bytes are handled at a time.

    Attributes:
        chunk: Written and hashed at a time, as one task for a thread; a file's hash is that of its chunks' hashes, so
            this is part of the format.
        part: Copied at a time within a chunk: stays in the processor's cache from the hash to the write.
        sync: After so many the system is asked to write them to the disk, so that it has something
            to do while more are hashed.
        manifest: The most that a manifest takes: it describes some dozen tensors.
    """

    chunk: int = 2**23
    part: int = 2**18
    sync: int = 2**26
    manifest: int = 2**20

    @classmethod
    def usual(cls) -> Sizes:
        """Return the sizes that files are written and read by."""
        return cls()
