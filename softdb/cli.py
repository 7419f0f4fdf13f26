"""The command ``softdb``."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from softdb import __version__, demo, lab, page
from softdb.errors import ArgumentError, DtypeError, MissingPackageError, describe
from softdb.normalizers import NORMALIZERS
from softdb.scores import METRICS
from softdb.store import SoftKVStore

__all__ = ["main"]

# As shells report a process that a signal ended: 128 and the signal's number.
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, without the command's own name; those of the process if None.

    Returns:
        The exit code: 0 if all went well, 1 if the output could not be written, 2 for arguments that make no sense,
        130 after Ctrl-C, 141 if the reader of the output went away.

    Raises:
        SystemExit: From argparse, after ``--help``, ``--version`` or arguments it cannot parse.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.command == "demo":
            _demo(options)
        elif options.command == "compare":
            _compare(options)
        else:
            print(parser.format_help(), end="", flush=True)
    except (ArgumentError, DtypeError, MissingPackageError) as error:
        print(f"softdb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        _discard_output()
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"softdb: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softdb", description="softdb: a differentiable soft key-value store.", epilog="Start with: softdb demo"
    )
    parser.add_argument("--version", action="version", version=f"softdb {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="command")
    tour = commands.add_parser(
        "demo",
        help="see hard and soft answers from a table of 4,096 word senses",
        description="Ask a table of 4,096 word senses what everyday sentences mean: hard, softly, and learning.",
    )
    tour.add_argument(
        "words", nargs="*", metavar="word", help="ask the sentences with this word, as in: softdb demo seal bark"
    )
    tour.add_argument("--plot", metavar="FILE", help="draw which rows answer instead, as a .png, .svg or .pdf")
    _add_compare(
        commands.add_parser(
            "compare",
            help="read the same queries hard, softly and by top-k, and compare",
            description="Read the same queries in several ways, and set what comes beside the exact soft blend.",
            epilog="For example: softdb compare --demo --html page.html",
        )
    )
    return parser


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="keys and values, in a .safetensors or .npz file")
    parser.add_argument("queries", nargs="?", metavar="QUERIES", help="queries, (B, key_dim), in a .npy file")
    parser.add_argument("--demo", action="store_true", help="take the word senses and sentences of softdb demo")
    parser.add_argument("--targets", metavar="FILE", help="classes or values that answers should be, in a .npy file")
    parser.add_argument("--metric", choices=METRICS, default="scaled_dot", help="how keys are compared; scaled_dot")
    parser.add_argument("--temperature", type=float, default=1.0, help="what scores are divided by; 1")
    parser.add_argument("--temperatures", type=float, nargs="+", metavar="T", help="8 times that to a quarter of it")
    parser.add_argument("--modes", nargs="+", choices=lab.MODES, default=lab.MODES, help="all three")
    parser.add_argument("--ks", type=int, nargs="+", metavar="K", default=(1, 4, 16, 64), help="of top-k; 1 4 16 64")
    others = ", ".join(NORMALIZERS[1:])
    parser.add_argument(
        "--normalizers",
        nargs="+",
        choices=NORMALIZERS,
        default=("softmax",),
        metavar="NAME",
        help=f"softmax; others are {others}",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the comparison, as a .png, .svg or .pdf")
    parser.add_argument("--csv", metavar="FILE", help="write the comparison as a table")
    parser.add_argument("--html", metavar="FILE", help="write a page with it, and sliders from soft to hard")


def _demo(options: argparse.Namespace) -> None:
    if options.plot is None:
        for line in demo.tour(demo.choose(options.words), blocks=_draws_blocks(sys.stdout)):
            print(line, flush=True)
        return
    demo.explanation(demo.choose(options.words) if options.words else demo.BANKS).plot(options.plot)
    print(f"wrote {options.plot}", flush=True)


def _compare(options: argparse.Namespace) -> None:
    labels = sentences = value_labels = None
    if options.demo:
        if options.store is not None or options.targets is not None:
            raise ArgumentError("--demo: expected no STORE, QUERIES or --targets beside it; leave them out")
        senses = demo.load_senses()
        store, queries, targets = demo.store_of(senses), senses.queries, None
        labels, sentences = [str(row) for row in senses.rows], senses.sentences
        value_labels = list(demo.PARTS_OF_SPEECH.values())
    else:
        if options.store is None or options.queries is None:
            raise ArgumentError("STORE, QUERIES: expected both, or --demo; see softdb compare --help")
        store = _read_store(options.store, options.metric, options.temperature)
        queries = _read_array(options.queries)
        targets = None if options.targets is None else _read_array(options.targets)
    found = lab.compare(
        store,
        queries,
        modes=options.modes,
        ks=options.ks,
        temperatures=options.temperatures,
        normalizers=options.normalizers,
        targets=targets,
    )
    print(found, flush=True)
    if options.csv is not None:
        found.to_csv(options.csv)
    if options.plot is not None:
        found.plot(options.plot)
    if options.html is not None:
        page.write_page(
            options.html,
            store,
            queries,
            labels=labels,
            query_labels=sentences,
            value_labels=value_labels,
            columns=found.to_dict(),
            metric=found.metric,
        )
    for path in filter(None, (options.csv, options.plot, options.html)):
        print(f"wrote {path}", flush=True)


def _read_store(path: str, metric: Any, temperature: float) -> SoftKVStore:
    """A store of the ``keys`` and ``values`` in a file."""
    try:
        tensors = _read_npz(path) if path.endswith(".npz") else safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, zipfile.BadZipFile) as error:
        raise ArgumentError(f"STORE: expected a .safetensors or .npz file, got {path!r}: {error}") from error
    if not {"keys", "values"} <= tensors.keys():
        found = ", ".join(map(repr, sorted(tensors))) or "none"
        raise ArgumentError(f"STORE: expected arrays 'keys' and 'values' in {path!r}, got {found}")
    keys, values = tensors["keys"], tensors["values"]
    for name, rows in (("keys", keys), ("values", values)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ArgumentError(f"STORE: expected {name} of floating-point numbers, (rows, n), got {describe(rows)}")
    dtype = torch.promote_types(keys.dtype, values.dtype)
    store = SoftKVStore(keys.shape[1], values.shape[1], metric=metric, temperature=temperature, dtype=dtype)
    store.add(keys, values)
    return store


def _read_npz(path: str) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _read_array(path: str) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ArgumentError(f"{path}: expected a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ArgumentError(f"{path}: expected one array of numbers in a .npy file")
    return torch.from_numpy(array)


def _draws_blocks(stream: TextIO) -> bool:
    try:
        (demo.FULL + demo.EIGHTHS).encode(stream.encoding or "ascii")
    except (AttributeError, LookupError, UnicodeEncodeError):  # no stream, or one that is no terminal or file
        return False
    return True


def _discard_output() -> None:
    """Send what is left to nowhere, so that Python's own flush at exit does not fail once more."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


if __name__ == "__main__":
    sys.exit(main())
