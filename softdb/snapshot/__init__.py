"""Storage of named tensors and a JSON description in a directory.

::

    path/manifest.json             name, file, dtype, shape and hash of each tensor, and the description
    path/keys-7.safetensors        one tensor, in the generation 7; each save increases the generation
    path/.lock                     locked during a save

The names of data files contain the generation, and data files are never overwritten. A save writes new files, syncs
them to the disk, and then replaces only the manifest, by a rename. A reader finds either the complete old snapshot or
the complete new one. Files that remain after a crash are not in the manifest; the next save removes them.

A reader checks all files. The header of a file must be equal, byte for byte, to the one that the manifest describes.
The size of a file is compared with the expected one before memory is allocated. Names of files outside of the directory
are rejected, and symbolic links are not followed. A snapshot contains nothing that can be executed.

The hash of a file is the blake2b of the hashes of its header and of each following chunk of 8 MiB. Threads can hash the
chunks in parallel, while other chunks are read or written.
"""

from softdb.snapshot.examine import Examination, FileState, examine_snapshot
from softdb.snapshot.format import FORMAT
from softdb.snapshot.lock import lock_directory
from softdb.snapshot.reader import read_snapshot
from softdb.snapshot.writer import write_snapshot

__all__ = [
    "FORMAT",
    "Examination",
    "FileState",
    "examine_snapshot",
    "lock_directory",
    "read_snapshot",
    "write_snapshot",
]
