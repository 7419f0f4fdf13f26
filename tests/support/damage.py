"""Damaged and hostile snapshot files, for the tests and ``scripts/faults``."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import softdb
from softdb import ArgumentError, CorruptSnapshotError, SoftKVStore, snapshot
from softdb.snapshot.format import ALIGNMENT, Sizes
from support.faults import Report, content_of, contents, fill, make, skips_fsync, which

MANIFEST = "manifest.json"
# Limits of loading small files, in addition to what an imported softdb takes: memory, address space, time.
MAX_MEMORY_BYTES, MAX_ADDRESS_BYTES, TIMEOUT_SECONDS = 2**26, 2**28, 120.0


# -- writing files that softdb does not write ------------------------------------------------------------


def body_of(path: Path) -> dict[str, Any]:
    """Return the body of the manifest in a directory."""
    body: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())["snapshot"]
    return body


def sign_text(text: str | bytes) -> bytes:
    """Return a manifest with any text as body, and the right hash of it."""
    body = text if isinstance(text, bytes) else text.encode()
    return b'{"blake2b": "%s", "snapshot":\n%s\n}\n' % (hashlib.blake2b(body).hexdigest().encode(), body)


def sign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest with a changed body and its right hash.

    ``change`` returns the new body as text, or modifies the given body and returns None.
    """
    body = body_of(path)
    (path / MANIFEST).write_bytes(sign_text(change(body) or json.dumps(body)))


def header_of(name: str, described: Any) -> bytes:
    """Return a safetensors header with any content."""
    text = described if isinstance(described, bytes) else json.dumps({name: described}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def hash_of(header: bytes, rest: bytes) -> str:
    """Compute the hash of a file as the format defines it."""
    whole = hashlib.blake2b(hashlib.blake2b(header).digest())
    chunk = Sizes.default().chunk
    for start in range(0, len(rest), chunk):
        whole.update(hashlib.blake2b(rest[start : start + chunk]).digest())
    return whole.hexdigest()


def replace(path: Path, index: int, header: bytes, rest: bytes | None = None, **described: Any) -> None:
    """Replace the file of a tensor, with its right hash, and update its manifest entry by ``described``."""

    def change(body: dict[str, Any]) -> None:
        entry = body["tensors"][index]
        file = path / entry["file"]
        content = file.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :] if rest is None else rest
        file.write_bytes(header + data)
        entry.update(blake2b=hash_of(header, data), **described)

    sign(path, change)


# -- damage ----------------------------------------------------------------------------------------------


def check_refused(report: Report, path: Path, content: Mapping[str, bytes], file: str, what: str) -> None:
    """Check that loading fails with an error that names file and tensor, and changes nothing."""
    tensor = {} if file == MANIFEST else {one["file"]: one["name"] for one in body_of(path)["tensors"]}
    try:
        SoftKVStore.load(path)
        outcome = "was loaded"
    except CorruptSnapshotError as error:
        named = file in str(error) and (file not in tensor or repr(tensor[file]) in str(error))
        outcome = "refused" if named else f"refused without a name: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    report.note(outcome, ["refused"], what)
    report.check(content_of(path) == content, f"{what}: loading has changed the directory")


def save_small_store(folder: Path) -> tuple[Path, dict[str, bytes]]:
    path = folder / "store"
    make(rows=3).save(path)
    return path, {name: data for name, data in content_of(path).items() if name != ".lock"}


def header_size(file: str, data: bytes) -> int:
    return len(data) if file == MANIFEST else 8 + int.from_bytes(data[:8], "little")


@skips_fsync
def truncate_files(report: Report, folder: Path, *, every: int = 1) -> None:
    """Truncate each file at each header byte and at every ``every``-th other byte; also append to it."""
    path, files = save_small_store(folder)
    for file, data in files.items():
        size = 8 if file == MANIFEST else header_size(file, data)
        places = [*range(size), *range(size, len(data), every), len(data) - 1]
        for content in (*(data[:place] for place in places), data + b"\0", data + data):
            (path / file).write_bytes(content)
            check_refused(report, path, content_of(path), file, f"{file} of {len(data)} bytes cut to {len(content)}")
        (path / file).write_bytes(data)
    report.check(which(path, {"same": make(rows=3)}) == "same", "the files as they were are not loaded")


@skips_fsync
def flip_bits(report: Report, folder: Path, *, every: int = 1, sampled: int = 1, seed: int = 0) -> None:
    """Flip every ``every``-th bit of headers and manifest, and every ``sampled``-th other bit."""
    chance = random.Random(seed)
    path, files = save_small_store(folder)
    for file, data in files.items():
        size = 8 * header_size(file, data)
        first = chance.randrange(every), size + chance.randrange(sampled)
        for place in (*range(first[0], size, every), *range(first[1], 8 * len(data), sampled)):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            (path / file).write_bytes(changed)
            after = {**files, file: bytes(changed), ".lock": b""}
            check_refused(report, path, after, file, f"bit {place} of {file} flipped")
        (path / file).write_bytes(data)
    report.check(which(path, {"same": make(rows=3)}) == "same", "the files as they were are not loaded")


@skips_fsync
def fail_reads(report: Report, folder: Path) -> None:
    """Let each read of a load fail, or return end of file; check for typed errors and no changes."""
    path, _ = save_small_store(folder)
    before, read = content_of(path), os.preadv
    for number in range(len(body_of(path)["tensors"])):
        for ended in (False, True):
            seen = []

            def fail(*args: Any, number: int = number, ended: bool = ended, seen: list[int] = seen) -> int:
                seen.append(1)
                if len(seen) != number + 1:
                    return read(*args)
                if ended:
                    return 0
                raise OSError(5, "no")

            try:
                with mock.patch.object(os, "preadv", fail):
                    SoftKVStore.load(path)
                outcome = "loaded"
            except (CorruptSnapshotError, OSError) as error:
                outcome = type(error).__name__
            wanted = "CorruptSnapshotError" if ended else "OSError"
            report.note(outcome, [wanted], f"read {number} {'of nothing' if ended else 'fails'}")
            report.check(content_of(path) == before, f"read {number}: the directory has changed")
    report.check(which(path, {"same": make(rows=3)}) == "same", "the files as they were are not loaded")


# -- hostile directories ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """Hostile directory: how to make it from a good one, and the expected outcome of loading it."""

    harm: Callable[[Path], Any]
    outcome: str = "corrupt"  # or "fine", "newer", "missing"
    saves: bool = True  # whether a save to it succeeds afterwards


def setting(index: int, key: str, value: Any) -> Case:
    return Case(lambda path: sign(path, lambda body: body["tensors"][index].update({key: value})))


def describing(outcome: str = "corrupt", **changes: Any) -> Case:
    return Case(lambda path: sign(path, lambda body: body["description"].update(changes)), outcome)


def saying(change: Callable[[dict[str, Any]], Any], outcome: str = "corrupt") -> Case:
    return Case(lambda path: sign(path, change), outcome)


def heading(described: Any, rest: bytes | None = None, **manifest: Any) -> Case:
    """Return a case with another header of the first tensor, and its right hash."""
    header = header_of("keys", described)
    return Case(lambda path: replace(path, 0, header, rest, **manifest))


def shaped(*shape: int, dtype: str = "F32") -> Case:
    """Return a case whose keys have this shape in the manifest and in the header, without data."""
    nbytes = math.prod(shape) * (8 if dtype == "I64" else 4)
    described = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}
    return heading(described, b"", shape=list(shape), dtype=dtype)


class Exploding:
    """Object whose pickle aborts the process that loads it."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def plant(path: Path, *planted: str) -> None:
    for name in planted:
        (path / name).write_bytes(pickle.dumps(Exploding()))


def keys_file(path: Path) -> Path:
    return path / str(body_of(path)["tensors"][0]["file"])


def swap_for(make_it: Callable[[Path, Path], Any], find: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Move a file of the snapshot outside, and create something else at its path."""

    def harm(path: Path) -> None:
        file = find(path)
        outside = path.parent / f"outside-{path.name}"
        file.rename(outside)
        make_it(file, outside)

    return harm


def link(file: Path, outside: Path) -> None:
    file.symlink_to(outside)


def empty_directory(file: Path, outside: Path) -> None:
    file.mkdir()


def fifo(file: Path, outside: Path) -> None:
    os.mkfifo(file)


def socket_of(file: Path, outside: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(file.parent)  # paths of sockets have a short maximum length
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(here)


def loop(file: Path, outside: Path) -> None:
    file.symlink_to(file.name)


def manifest_file(path: Path) -> Path:
    return path / MANIFEST


def lock_file(path: Path) -> Path:
    return path / ".lock"


def link_directory(path: Path) -> None:
    outside = path.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def sparse(name: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        os.truncate(keys_file(path) if name == "keys" else path / name, 2**40)

    return harm


def more_than_memory(path: Path) -> None:
    header = header_of(
        "keys", {"dtype": "F32", "shape": [MAX_ADDRESS_BYTES // 4, 1], "data_offsets": [0, MAX_ADDRESS_BYTES]}
    )
    replace(path, 0, header, b"", shape=[MAX_ADDRESS_BYTES // 4, 1])
    os.truncate(keys_file(path), len(header) + MAX_ADDRESS_BYTES)


def exchange_files(path: Path) -> None:
    first, second = (path / one["file"] for one in body_of(path)["tensors"][2:4])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DEEP = 200_000
GOOD = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
CASES: dict[str, Case] = {
    # The manifest, each signed with a right hash.
    "dimensions of 2**62": setting(0, "shape", [2**62, 2**62]),
    "a dimension of 2**64": setting(0, "shape", [2**64, 4]),
    "a product that wraps to 12": setting(0, "shape", [2**32 + 1, 2**32, 12]),
    "a tensor of terabytes": setting(0, "shape", [2**40, 4]),
    "negative dimensions": setting(0, "shape", [-3, -4]),
    "a float dimension": setting(0, "shape", [3.0, 4]),
    "a bool dimension": setting(0, "shape", [True, 12]),
    "a shape of text": setting(0, "shape", "34"),
    "a nested shape": setting(0, "shape", [[3], 4]),
    "many dimensions": setting(0, "shape", [1] * 100_000),
    "many huge dimensions": setting(0, "shape", [2**62] * 30_000),
    "a file in the parent directory": setting(0, "file", "../keys-1.safetensors"),
    "an absolute path": setting(0, "file", "/etc/passwd"),
    "a file of the system": setting(0, "file", "/proc/self/mem"),
    "a file in a subdirectory": setting(0, "file", "keys-1.safetensors/keys-1.safetensors"),
    "the parent directory": setting(0, "file", ".."),
    "the manifest for a tensor": setting(0, "file", MANIFEST),
    "the lock for a tensor": setting(0, "file", ".lock"),
    "NUL in a file name": setting(0, "file", "keys-1.safetensors\0"),
    "a newline in a file name": setting(0, "file", "keys-1.safetensors\n"),
    "a backslash in a file name": setting(0, "file", "..\\keys-1.safetensors"),
    "a lone surrogate in a file name": setting(0, "file", "\ud800-1.safetensors"),
    "a long file name": setting(0, "file", "k" * 5000 + "-1.safetensors"),
    "no file name": setting(0, "file", None),
    "the file of another tensor": setting(0, "file", "values-1.safetensors"),
    "a missing file": setting(0, "file", "keys-2.safetensors"),
    "an unknown dtype": setting(0, "dtype", "OBJECT"),
    "a dtype in lower case": setting(0, "dtype", "f32"),
    "a dtype with a trailing blank": setting(0, "dtype", "F32 "),
    "a dtype of eight bits": setting(0, "dtype", "F8_E4M3"),
    "a bool dtype": setting(0, "dtype", "BOOL"),
    "a dtype name of torch": setting(0, "dtype", "torch.float32"),
    "a list for a dtype": setting(0, "dtype", ["F32"]),
    "none for a dtype": setting(0, "dtype", None),
    "another dtype": setting(0, "dtype", "I64"),
    "another dtype of the same size": Case(lambda path: sign(path, lambda b: b["tensors"][2].update(dtype="F64"))),
    "a name with a parent path": setting(0, "name", "../../x"),
    "a name with NUL": setting(0, "name", "keys\0"),
    "a name with a newline": setting(0, "name", "keys\n"),
    "an empty name": setting(0, "name", ""),
    "a lone surrogate for a name": setting(0, "name", "\ud800"),
    "a name twice": setting(0, "name", "values"),
    "another name": setting(0, "name", "kez"),
    "no hash": setting(0, "blake2b", None),
    "a hash in upper case": Case(
        lambda path: sign(path, lambda body: body["tensors"][0].update(blake2b=body["tensors"][0]["blake2b"].upper()))
    ),
    "one tensor too few": saying(lambda body: body["tensors"].pop() and None),
    "one tensor twice": saying(lambda body: body["tensors"].append(body["tensors"][0])),
    "no list of tensors": saying(lambda body: body.update(tensors=7)),
    "a nested list of tensors": saying(lambda body: body.update(tensors=[[body["tensors"]]])),
    "no tensors": saying(lambda body: body["tensors"].clear()),
    "no description": saying(lambda body: body.pop("description") and None),
    "a list for a description": saying(lambda body: body.update(description=[])),
    "an empty description": saying(lambda body: body["description"].clear()),
    "deeply nested lists": saying(lambda body: "[" * DEEP),
    "deeply nested objects": saying(lambda body: '{"a":' * DEEP),
    "deeply nested, closed lists": saying(lambda body: "[" * DEEP + "]" * DEEP),
    "deeply nested lists in the description": saying(
        lambda body: json.dumps(body).replace(
            '"description": {', '"description": {"a": ' + "[" * DEEP + "]" * DEEP + ","
        )
    ),
    "invalid JSON": saying(lambda body: "{'a': 1}"),
    "bytes that are not UTF-8": Case(lambda path: (path / MANIFEST).write_bytes(sign_text(b"\xff\xfe\x00{"))),
    "UTF-16 text": Case(lambda path: (path / MANIFEST).write_bytes(sign_text('{"a":1}'.encode("utf-16")))),
    "duplicate keys": saying(lambda body: '{"format": 1, "format": 1, "tensors": [], "description": {}}'),
    "duplicate keys in the description": saying(
        lambda body: json.dumps(body).replace('"key_dim": 4', '"key_dim": 4, "key_dim": 4')
    ),
    "NaN": saying(lambda body: '{"format": NaN}'),
    "a number of a million digits": saying(lambda body: '{"format": 1' + "0" * 1_000_000 + "}"),
    "a format of a float": saying(lambda body: body.update(format=1.5)),
    "a format of text": saying(lambda body: body.update(format="1")),
    "a negative format": saying(lambda body: body.update(format=-1)),
    "no format": saying(lambda body: body.pop("format") and None),
    "a newer format": saying(lambda body: body.update(format=2), "newer"),
    "an unsigned manifest": Case(lambda path: (path / MANIFEST).write_text(json.dumps(body_of(path)))),
    "an empty manifest": Case(lambda path: (path / MANIFEST).write_bytes(b"")),
    "a manifest of terabytes": Case(sparse(MANIFEST)),
    "a pickle for a manifest": Case(lambda path: plant(path, MANIFEST)),
    # The description of the store.
    "another metric": describing(metric="manhattan"),
    "a list for a metric": describing(metric=["dot"]),
    "another width": describing(key_dim=5),
    "a width of 2**62": describing(key_dim=2**62),
    "a width beyond float range": describing(value_dim=10**400),
    "a temperature beyond float range": describing(temperature=10**400),
    "a temperature of 0": describing(temperature=0),
    "a temperature of text": describing(temperature="hot"),
    "an infinite temperature": describing(temperature=math.inf),
    "an index with an unknown option": describing(index={"factory": "Flat", "evil": 1}),
    "a recall beyond float range": describing(index={"factory": "Flat", "recall": 10**400}),
    "an index of text": describing(index="Flat"),
    "a field with a parent path": describing(fields=["../x"]),
    "fields of a number": describing(fields=7),
    "a field too many": describing(fields=["time", "more"]),
    "a capacity beyond memory": describing("MemoryError", capacity=2**50),
    "a capacity beyond float range": describing(capacity=10**400),
    "an unknown eviction rule": describing(capacity=3, evict="all"),
    # Headers, each with a right hash in the manifest.
    "a header of 2**63 bytes": Case(lambda path: replace(path, 0, (2**63).to_bytes(8, "little") + bytes(120))),
    "a header of no bytes": Case(lambda path: replace(path, 0, bytes(128))),
    "a negative offset": heading(GOOD | {"data_offsets": [-48, 0]}),
    "an offset beyond the file": heading(GOOD | {"data_offsets": [0, 2**63]}),
    "an offset in the middle": heading(GOOD | {"data_offsets": [8, 56]}),
    "overlapping tensors": heading(
        b'{"keys":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},"b":{"dtype":"I8","shape":[1],'
        b'"data_offsets":[0,1]}}'
    ),
    "a key twice in a header": heading(
        b'{"keys":{"dtype":"F32","dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}',
    ),
    "a name twice in a header": heading(
        b'{"keys":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},'
        b'"keys":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}',
    ),
    "a deeply nested header": heading(b"[" * DEEP),
    "metadata in a header": heading(
        b'{"__metadata__":{"a":"b"},"keys":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}'
    ),
    "a header of another dtype": heading(GOOD | {"dtype": "I32"}),
    "a header of another shape": heading(GOOD | {"shape": [4, 3]}),
    "no rows of 2**62 columns": shaped(0, 2**62),
    "no rows of 2**124 columns": shaped(0, 2**62, 2**62),
    "no columns of 2**62 rows": shaped(2**62, 0, 2**62),
    "no rows of many dimensions": shaped(*[0] * 3000),
    "one number of many dimensions": heading(
        {"dtype": "F32", "shape": [1] * 3000, "data_offsets": [0, 4]}, bytes(4), shape=[1] * 3000
    ),
    "integer keys": shaped(0, 4, dtype="I64"),
    # Other kinds of files.
    "a link for a file": Case(swap_for(link, keys_file)),
    "a link for the manifest": Case(swap_for(link, manifest_file)),
    "a link to itself for the manifest": Case(swap_for(loop, manifest_file)),
    "a link for the lock": Case(swap_for(link, lock_file), "fine", saves=False),
    "a link for the directory": Case(link_directory, "fine"),
    "a directory for a file": Case(swap_for(empty_directory, keys_file)),
    "a directory for the manifest": Case(swap_for(empty_directory, manifest_file), saves=False),
    "a directory for the lock": Case(swap_for(empty_directory, lock_file), "fine", saves=False),
    "a FIFO for a file": Case(swap_for(fifo, keys_file)),
    "a FIFO for the manifest": Case(swap_for(fifo, manifest_file)),
    "a FIFO for the lock": Case(swap_for(fifo, lock_file), "fine"),
    "a socket for a file": Case(swap_for(socket_of, keys_file)),
    "a file of terabytes": Case(sparse("keys")),
    "more numbers than memory": Case(more_than_memory, "MemoryError"),
    "exchanged files": Case(exchange_files),
    "no manifest": Case(lambda path: (path / MANIFEST).unlink(), "missing"),
    "no directory": Case(shutil.rmtree, "missing"),
    "a file for the directory": Case(lambda path: (shutil.rmtree(path), path.write_bytes(b"")), saves=False),
    "a pickle for a file": Case(lambda path: plant(path, keys_file(path).name)),
    "planted pickles": Case(
        lambda path: plant(path, "keys.pkl", "data.pkl", "keys-0.bin", "keys-9.safetensors", "manifest.json-1"), "fine"
    ),
    "planted indexes": Case(lambda path: plant(path, "index.faiss", "store.index", "keys-1.faissindex"), "fine"),
    "a planted module": Case(lambda path: plant(path, "softdb.py", "conftest.py", "__init__.py", "json.pyc"), "fine"),
}


def load_hostile_directories(report: Report, folder: Path) -> None:
    """Load and save every case in a process with limited memory.

    Checks for typed errors, and that no other file is touched.
    """
    good = folder / "good"
    make(rows=3).save(good)
    for number, case in enumerate(CASES.values()):
        path = folder / str(number)
        fill(path, content_of(good))
        case.harm(path)
    outside = outside_of(folder)
    for (name, case), found in zip(CASES.items(), run_in_limited_memory(folder, len(CASES)), strict=True):
        report.note(found["outcome"], [case.outcome], f"{name} ({found['message']})")
        examined = {"fine": ["whole"], "newer": ["newer"], "missing": ["missing"]}.get(
            case.outcome, ["damaged", "whole"]
        )
        report.check(found["examined"] in examined, f"{name}: examined, it is {found['examined']}")
        agree = (found["read"] == "fine") == (found["examined"] == "whole")
        report.check(agree, f"{name}: {found['read']} to read, and examined it is {found['examined']}")
        report.check(not found["changed"], f"{name}: loading has changed the directory")
        report.check(found["memory"] <= MAX_MEMORY_BYTES, f"{name}: loading took {found['memory']} bytes of memory")
        report.check(not found["strayed"], f"{name}: loading touched {found['strayed']}")
        report.check(not found["did"], f"{name}: loading did {found['did']}")
        report.check(found["saved"] == ("saved" if case.saves else "OSError"), f"{name}: saving: {found['saved']}")
        report.check(not found["strayed_saving"], f"{name}: saving touched {found['strayed_saving']}")
    report.check(outside_of(folder) == outside, "files outside have changed")


def content_at(path: Path) -> dict[str, bytes] | None:
    return content_of(path) if path.is_dir() else None


def outside_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("outside-*") if file.is_file()}


def run_in_limited_memory(folder: Path, count: int) -> list[dict[str, Any]]:
    """Load the directories 0 to ``count`` in a process with limited memory; return its results."""
    places = [
        str(Path(module).resolve()) for module in (Path(softdb.__file__).parent.parent, Path(__file__).parents[1])
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from support import damage; damage.in_limited_memory(*sys.argv[1:])",
            str(folder),
            str(count),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != count:
        raise RuntimeError(f"after {len(lines)} of {count}: ended by {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in lines]


# Audit events that must not occur while a snapshot is loaded. "open" is checked separately.
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec")
FORBIDDEN += ("import", "marshal.loads", "socket.connect", "os.chmod", "os.link", "os.symlink", "shutil.rmtree")
CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate")


@skips_fsync
def in_limited_memory(folder: str, count: str) -> None:
    """Load and save the directories, and print the results; runs in the other process."""
    opened: list[tuple[str, bool]] = []
    did: list[str] = []
    is_watching = [False]

    def record_event(event: str, args: tuple[Any, ...]) -> None:
        if not is_watching[0]:
            return
        if event == "open" and not isinstance(args[0], int):  # not an open descriptor
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            opened.append((os.fsdecode(args[0]), writes))
        elif event in CHANGING:
            opened.append((os.fsdecode(args[0]), True))
        elif event in FORBIDDEN:
            did.append(event)

    good, store = Path(folder) / "good", make(2.0, rows=3)
    same = contents(SoftKVStore.load(good))
    snapshot.examine_snapshot(good)
    store.save(good.parent / "warm")
    sys.addaudithook(record_event)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(int(count)):
        path, loaded = Path(folder) / str(number), list[SoftKVStore]()
        inside = {str(path), *(str(path / name) for name in (*listed(path), MANIFEST))}
        content, before = content_at(path), memory()
        opened.clear()
        did.clear()
        is_watching[0] = True
        read, _ = outcome_of(functools.partial(snapshot.read_snapshot, path))
        examined = examination(path)
        outcome, message = outcome_of(lambda path=path, loaded=loaded: loaded.append(SoftKVStore.load(path)))
        is_watching[0] = False
        took = memory() - before
        if loaded and contents(loaded[0]) != same:
            outcome = "another store"
        strayed = [one for one in opened if one[0] not in inside or one[1]]
        changed, acts = content_at(path) != content, list(did)
        opened.clear()
        is_watching[0] = True
        saved, _ = outcome_of(functools.partial(store.save, path))
        is_watching[0] = False
        if saved == "fine":
            saved = which(path, {"saved": store})
        elif saved in ("IsADirectoryError", "NotADirectoryError", "FileExistsError"):
            saved = "OSError"
        strayed_saving = [one for one in opened if one[1] and Path(one[0]).parent != path and one[0] != str(path)]
        found = {"outcome": outcome, "message": message[:200], "read": read, "examined": examined, "changed": changed}
        found |= {"strayed": strayed, "did": acts, "memory": took, "saved": saved, "strayed_saving": strayed_saving}
        print(json.dumps(found), flush=True)


def memory() -> int:
    """Return the peak resident memory of the process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def listed(path: Path) -> list[str]:
    """Return the plain file names in the manifest, which a load may open."""
    if not (path / MANIFEST).is_file():
        return []
    try:
        files = [one["file"] for one in body_of(path)["tensors"]]
        return [file for file in files if isinstance(file, str) and "/" not in file and file not in (".", "..")]
    except Exception:
        return [f"{name}-{number}.safetensors" for name in ("keys", "values") for number in (1, 2)]


def outcome_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Run a function; return its outcome in one word, and the error message."""
    try:
        act()
    except CorruptSnapshotError as error:
        return "corrupt", str(error)
    except ArgumentError as error:
        return "newer", str(error)
    except FileNotFoundError as error:
        return "missing", str(error)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "fine", ""


def examination(path: Path) -> str:
    whole: list[bool] = []
    outcome, _ = outcome_of(lambda: whole.append(snapshot.examine_snapshot(path).is_whole))
    return ("whole" if whole[0] else "damaged") if whole else outcome
