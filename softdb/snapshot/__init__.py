"""Named tensors and a JSON description, as one directory that always holds a whole snapshot.

::

    path/manifest.json             which files make the snapshot, their sizes and hashes, and the description
    path/keys-7.safetensors        one tensor each, of generation 7
    path/.lock                     held while somebody saves

Data files carry the generation in their name and are never written to again. A save writes new ones, makes them
durable, and then swaps the manifest alone, by a rename: whoever opens the path finds the old snapshot or the new one,
whole. What a crash left over belongs to no manifest, and the next save removes it.

Reading trusts nothing: a file's header has to be, byte for byte, the one that the manifest describes, sizes are
compared with the file's before memory is taken, names lead nowhere but into the directory, and links are not followed.
There is nothing in a snapshot that could be executed.

A file's hash is the blake2b of those of its header and of each 8 MiB of what follows, so that these are taken side by
side, and while other bytes are written or read.
"""

from softdb.snapshot.examine import Examination, FileState, examine_snapshot
from softdb.snapshot.format import FORMAT
from softdb.snapshot.lock import locked
from softdb.snapshot.reader import read_snapshot
from softdb.snapshot.writer import write_snapshot

__all__ = ["FORMAT", "Examination", "FileState", "examine_snapshot", "locked", "read_snapshot", "write_snapshot"]
