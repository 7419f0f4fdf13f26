"""The command ``softdb``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from softdb import __version__, lab
from softdb._checks import is_out_of_memory
from softdb.cli import demo
from softdb.cli.files import read_array, read_store
from softdb.errors import ArgumentError, DtypeError, MissingPackageError, UnsupportedSystemError
from softdb.lab import comparison, page
from softdb.scoring.metrics import METRICS
from softdb.scoring.normalizers import NORMALIZERS
from softdb.snapshot.examine import Examination, examine_snapshot
from softdb.snapshot.format import FORMAT

__all__ = ["main"]


# As shells report a process that a signal ended: 128 and the signal's number.
INTERRUPTED = 130


PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, without the command's own name; those of the process if None.

    Returns:
        The exit code: 0 if all went well, 1 if a snapshot is damaged, a file cannot be read or written or memory runs
        out, 2 for arguments that make no sense, 130 after Ctrl-C, 141 if the reader of the output went away.

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
        elif options.command in ("info", "verify"):
            return _examine(options.path, tell=options.command == "info")
        else:
            print(parser.format_help(), end="", flush=True)
    except (ArgumentError, DtypeError, MissingPackageError, UnsupportedSystemError) as error:
        print(f"softdb: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not _can_print():
            _discard_output()
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"softdb: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"softdb: there is not enough memory: {error}", file=sys.stderr)
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
    for name, what, more in (
        ("info", "tell what a saved store holds, and whether it is whole", "Tell what a saved store holds, and"),
        ("verify", "read a saved store, and tell whether it is as it was saved", "Tell"),
    ):
        command = commands.add_parser(
            name,
            help=what,
            description=(
                f"{more} whether every byte is as it was saved. The exit code is 0 if so, 1 if it is damaged, or not "
                "there, or cannot be read, and 2 if a newer softdb saved it."
            ),
        )
        command.add_argument("path", metavar="PATH", help="the directory that store.save() wrote")
    return parser


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="keys and values, in a .safetensors or .npz file")
    parser.add_argument("queries", nargs="?", metavar="QUERIES", help="queries, (B, key_dim), in a .npy file")
    parser.add_argument("--demo", action="store_true", help="take the word senses and sentences of softdb demo")
    parser.add_argument("--targets", metavar="FILE", help="classes or values that answers should be, in a .npy file")
    parser.add_argument("--metric", choices=METRICS, help="how keys are compared; scaled_dot")
    parser.add_argument("--temperature", type=float, metavar="T", help="what scores are divided by; 1")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", metavar="T", help="those to compare; 8 times that to a quarter of it"
    )
    parser.add_argument("--modes", nargs="+", choices=comparison.MODES, default=comparison.MODES, help="all three")
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


def _examine(path: str, *, tell: bool) -> int:
    progress = _Progress(f"reading {path}")
    try:
        found = examine_snapshot(path, progress=progress.show)
    finally:
        progress.clear()
    if tell:
        for line in _contents(path, found):
            print(_printable(line))
    problems = [problem for problem in (found.problem, *(state.problem for state in found.files)) if problem]
    for problem in problems:
        print(_printable(f"damaged: {problem}"))
    total = _size(sum(state.nbytes for state in found.files))
    if not problems:
        print(_printable(f"{path}: every byte is as it was saved ({len(found.files)} files, {total})"))
    sys.stdout.flush()
    return 1 if problems else 0


def _contents(path: str, found: Examination) -> Iterator[str]:
    """What a snapshot holds, line by line."""
    description = found.description or {}
    index, fields = description.get("index"), description.get("fields")
    told = {
        "rows": description.get("rows"),
        "key_dim": description.get("key_dim"),
        "value_dim": description.get("value_dim"),
        "metric": description.get("metric"),
        "temperature": description.get("temperature"),
        "fields": ", ".join(map(str, fields if isinstance(fields, list) else ())) or "none",
        "index": index.get("factory") if isinstance(index, dict) else None,
        "trainable": description.get("trainable"),
        "capacity": description.get("capacity"),
        "evict": description.get("evict"),
    }
    if description:
        yield f"{path}: a snapshot of format {FORMAT}, saved by softdb {description.get('softdb', '(unknown)')}"
        for name, value in told.items():
            if value is not None:
                yield f"  {name:<12} {value:,}" if type(value) is int else f"  {name:<12} {value}"
    else:
        yield f"{path}: a snapshot whose manifest is damaged, so that nobody can tell what it holds"
    for state in found.files:
        shape = " x ".join(f"{size:,}" for size in state.shape) or "1"
        dtype = str(state.dtype).removeprefix("torch.")
        verdict = "as saved" if state.problem is None else "DAMAGED"
        yield f"  {state.file:<32} {dtype:<9} {shape:>18}  {_size(state.nbytes):>9}  {verdict}"
    if found.others:
        yield f"  {'not of this snapshot' if description else 'files there'}: {', '.join(found.others)}"


def _printable(line: str) -> str:
    """A line with what others may have put into names, but nothing that a terminal would obey or cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(character if character.isprintable() else "?" for character in line)
    return shown.encode(encoding, "replace").decode(encoding)


def _size(count: int) -> str:
    """A number of bytes as people read it."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class _Progress:
    """How far long work has come: a line on a terminal, and nothing elsewhere."""

    def __init__(self, work: str) -> None:
        self._work = work
        self._shown: int | None = None
        self._visible = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` bytes are done."""
        share = 100 * done // max(1, total)
        if self._visible and share != self._shown:
            self._shown = share
            bar = "#" * (share // 5)
            print(f"\r{self._work} [{bar:<20}] {share:3d} % of {_size(total)}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave an empty line."""
        if self._shown is not None:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _compare(options: argparse.Namespace) -> None:
    written = [path for path in (options.csv, options.plot, options.html) if path is not None]
    for path in written:
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ArgumentError(f"{path}: expected a file in a folder that exists; make it first")
    labels = sentences = value_labels = None
    if options.demo:
        if any(x is not None for x in (options.store, options.targets, options.metric, options.temperature)):
            raise ArgumentError(
                "--demo: expected no STORE, QUERIES, --targets, --metric or --temperature beside it; leave them out"
            )
        senses = demo.load_senses()
        store, queries, targets = demo.store_of(senses), senses.queries, None
        labels, sentences = [str(row) for row in senses.rows], senses.sentences
        value_labels = list(demo.PARTS_OF_SPEECH.values())
    else:
        if options.store is None or options.queries is None:
            raise ArgumentError("STORE, QUERIES: expected both, or --demo; see softdb compare --help")
        store = read_store(options.store, options.metric or "scaled_dot", options.temperature)
        queries = read_array(options.queries)
        if queries.dim() != 2:
            raise ArgumentError(f"QUERIES: expected shape (B, key_dim), got {tuple(queries.shape)}")
        targets = None if options.targets is None else read_array(options.targets)
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
    for path in written:
        print(f"wrote {path}", flush=True)


def _draws_blocks(stream: TextIO) -> bool:
    try:
        (demo.FULL + demo.EIGHTHS).encode(stream.encoding or "ascii")
    except (AttributeError, LookupError, UnicodeEncodeError):  # no stream, or one that is no terminal or file
        return False
    return True


def _can_print() -> bool:
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _discard_output() -> None:
    """Send what is left to nowhere, so that Python's own flush at exit does not fail once more."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
