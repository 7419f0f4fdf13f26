"""The command ``softdb``: its arguments, its output and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from softdb import __version__, lab
from softdb._checks import is_out_of_memory
from softdb.cli import demo
from softdb.cli.files import load_saved_store, read_array, read_labels, read_queries, read_store
from softdb.cli.labels import compare_labels
from softdb.cli.query import find_best_rows, format_json, format_rows
from softdb.errors import ArgumentError, DtypeError, MissingPackageError, SoftDBError, UnsupportedSystemError
from softdb.lab import comparison, page
from softdb.scoring.metrics import METRICS
from softdb.scoring.normalizers import NORMALIZERS
from softdb.snapshot.examine import Examination, examine_snapshot
from softdb.snapshot.format import FORMAT

__all__ = ["main"]


# Exit codes of a shell for a process that a signal ended: 128 plus the number of the signal.
EXIT_INTERRUPTED = 130


EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the name of the command; those of the process if None.

    Returns:
        The exit code: 0 on success; 1 if a snapshot is damaged, a file cannot be read or written, or memory runs out; 2
        for invalid arguments; 130 after Ctrl-C; 141 if the process that reads the output closed the pipe.

    Raises:
        SystemExit: From argparse, after ``--help``, ``--version`` or arguments that it cannot parse.
    """
    parser = _build_parser()
    options = parser.parse_args(argv)
    try:
        if options.command == "demo":
            _run_demo(options)
        elif options.command == "compare":
            _compare(options)
        elif options.command == "query":
            _query(options)
        elif options.command in ("info", "verify"):
            return _examine(options.path, list_contents=options.command == "info")
        else:
            print(parser.format_help(), end="", flush=True)
    except (ArgumentError, DtypeError, MissingPackageError, UnsupportedSystemError) as error:
        # Keep the lines of messages of the demo, which list one sentence per line.
        _print_error(str(error) if options.command == "demo" else _join_lines(str(error)))
        return 2
    except SoftDBError as error:
        _print_error(_join_lines(str(error)))
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if not _can_print():
            _discard_output()
        if isinstance(error, BrokenPipeError):
            return EXIT_BROKEN_PIPE
        _print_error(_join_lines(str(error)))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error(f"out of memory: {_join_lines(str(error))}")
        return 1
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softdb", description="softdb: a differentiable soft key-value store.", epilog="Start with: softdb demo"
    )
    parser.add_argument("--version", action="version", version=f"softdb {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="command")
    tour = commands.add_parser(
        "demo",
        help="show hard and soft answers of a store of 4,096 word senses",
        description=(
            "Query a store of 4,096 word senses with everyday sentences: by hard reads, by soft reads, and after a "
            "training step."
        ),
    )
    tour.add_argument(
        "words",
        nargs="*",
        metavar="word",
        help="query the sentences that contain this word, as in: softdb demo seal bark",
    )
    tour.add_argument("--plot", metavar="FILE", help="plot the weights of the rows instead, as a .png, .svg or .pdf")
    _add_compare(
        commands.add_parser(
            "compare",
            help="compare hard, top-k and soft reads of the same queries",
            description="Compare reads of the same queries with the exact softmax read.",
            epilog="For example: softdb compare --demo --html page.html",
        )
    )
    query = commands.add_parser(
        "query",
        help="print the best rows of a saved store for each query",
        description="Print ids, weights and fields of the rows with the highest scores, for each query.",
        epilog="For example: softdb query memory queries.npy -k 3 --json",
    )
    query.add_argument("store", metavar="STORE_DIR", help="the directory that store.save() wrote")
    query.add_argument("queries", metavar="QUERIES", help="queries, (B, key_dim), in a .npy file")
    query.add_argument("-k", type=int, default=5, metavar="K", help="number of rows for each query (default: 5)")
    query.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for name, what in (("info", "list and check the contents of a saved store"), ("verify", "check a saved store")):
        command = commands.add_parser(
            name,
            help=what,
            description=(
                f"{what[0].upper()}{what[1:]}: compare every byte with its hash. The exit code is 0 if the store is "
                "complete, 1 if it is damaged, missing or cannot be read, and 2 if a newer softdb saved it."
            ),
        )
        command.add_argument("path", metavar="PATH", help="the directory that store.save() wrote")
    return parser


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store",
        nargs="?",
        metavar="STORE",
        help="a directory that store.save() wrote, or a .safetensors or .npz file with keys and values",
    )
    parser.add_argument("queries", nargs="?", metavar="QUERIES", help="queries, (B, key_dim), in a .npy file")
    parser.add_argument("--demo", action="store_true", help="use the word senses and sentences of softdb demo")
    parser.add_argument("--targets", metavar="FILE", help="expected answers, classes or values, in a .npy file")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="labels of the rows, in the order of store.ids: text with one label per line, or a .npy file",
    )
    parser.add_argument(
        "--query-labels",
        metavar="FILE",
        help=(
            "labels of the queries, in a file as for --labels, which is required; the table shows the accuracy of the "
            "label with the highest total weight"
        ),
    )
    parser.add_argument(
        "--metric",
        choices=METRICS,
        help="metric for a file of keys and values (default: scaled_dot); not allowed with a saved store",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="divisor of the scores for a file of keys and values (default: 1); not allowed with a saved store",
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        metavar="T",
        help="temperatures to compare (default: 8 to 0.25 times the temperature of the store)",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=comparison.MODES, default=comparison.MODES, help="modes (default: all)"
    )
    parser.add_argument(
        "--ks",
        type=int,
        nargs="+",
        metavar="K",
        default=(1, 4, 16, 64),
        help="numbers of candidates of top-k reads (default: 1 4 16 64)",
    )
    others = ", ".join(NORMALIZERS[1:])
    parser.add_argument(
        "--normalizers",
        nargs="+",
        choices=NORMALIZERS,
        default=("softmax",),
        metavar="NAME",
        help=f"normalizers (default: softmax); others are {others}",
    )
    parser.add_argument("--plot", metavar="FILE", help="plot the comparison, as a .png, .svg or .pdf")
    parser.add_argument("--csv", metavar="FILE", help="write the comparison as a CSV file")
    parser.add_argument("--html", metavar="FILE", help="write the comparison as an HTML page with sliders")


def _run_demo(options: argparse.Namespace) -> None:
    if options.plot is None:
        for line in demo.run_tour(demo.choose_sentences(options.words), blocks=_can_encode_blocks(sys.stdout)):
            print(line, flush=True)
        return
    sentences = demo.choose_sentences(options.words) if options.words else demo.BANK_SENTENCES
    demo.explain_sentences(sentences).plot(options.plot)
    print(f"wrote {options.plot}", flush=True)


def _query(options: argparse.Namespace) -> None:
    store = load_saved_store(options.store, verify=False)
    found = find_best_rows(store, read_queries(options.queries), options.k)
    print(format_json(found) if options.json else format_rows(found, store.fields), flush=True)


def _examine(path: str, *, list_contents: bool) -> int:
    progress = _Progress(f"reading {path}")
    try:
        found = examine_snapshot(path, progress=progress.show)
    finally:
        progress.clear()
    if list_contents:
        for line in _describe_contents(path, found):
            print(_make_printable(line))
    problems = [problem for problem in (found.problem, *(state.problem for state in found.files)) if problem]
    for problem in problems:
        print(_make_printable(f"damaged: {problem}"))
    total = _format_size(sum(state.nbytes for state in found.files))
    if not problems:
        print(_make_printable(f"{path}: every byte is as it was saved ({len(found.files)} files, {total})"))
    sys.stdout.flush()
    return 1 if problems else 0


def _describe_contents(path: str, found: Examination) -> Iterator[str]:
    """Yield the lines that describe a snapshot."""
    description = found.description or {}
    index, fields = description.get("index"), description.get("fields")
    settings = {
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
        for name, value in settings.items():
            if value is not None:
                yield f"  {name:<12} {value:,}" if type(value) is int else f"  {name:<12} {value}"
    else:
        yield f"{path}: a snapshot with a damaged manifest; its settings are unknown"
    for state in found.files:
        shape = " x ".join(f"{size:,}" for size in state.shape) or "1"
        dtype = str(state.dtype).removeprefix("torch.")
        verdict = "as saved" if state.problem is None else "DAMAGED"
        yield f"  {state.file:<32} {dtype:<9} {shape:>18}  {_format_size(state.nbytes):>9}  {verdict}"
    if found.others:
        yield f"  {'other files' if description else 'files'}: {', '.join(found.others)}"


def _make_printable(line: str) -> str:
    """Replace characters that the terminal interprets or cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(character if character.isprintable() else "?" for character in line)
    return shown.encode(encoding, "replace").decode(encoding)


def _join_lines(text: str) -> str:
    """Join the lines of a message; replace control characters."""
    line = " ".join(part.strip() for part in text.splitlines())
    return "".join(character if character.isprintable() else "?" for character in line)


def _print_error(message: str) -> None:
    print(f"softdb: {message}", file=sys.stderr)


def _format_size(count: int) -> str:
    """Format a number of bytes with a unit."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class _Progress:
    """Progress line on standard error; it prints nothing if that is not a terminal."""

    def __init__(self, work: str) -> None:
        self._work = work
        self._shown: int | None = None
        self._visible = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are read."""
        percent = 100 * done // max(1, total)
        if self._visible and percent != self._shown:
            self._shown = percent
            bar = "#" * (percent // 5)
            size = _format_size(total)
            print(f"\r{self._work} [{bar:<20}] {percent:3d} % of {size}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clear the line."""
        if self._shown is not None:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _compare(options: argparse.Namespace) -> None:
    written = [path for path in (options.csv, options.plot, options.html) if path is not None]
    for path in written:
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ArgumentError(f"{path}: expected a file in an existing directory; create the directory first")
    settings = {
        "modes": options.modes,
        "ks": options.ks,
        "temperatures": options.temperatures,
        "normalizers": options.normalizers,
    }
    labels = query_labels = value_labels = None
    if options.demo:
        inputs = (options.store, options.targets, options.labels, options.query_labels)
        if any(x is not None for x in (*inputs, options.metric, options.temperature)):
            raise ArgumentError(
                "--demo: expected none of STORE, QUERIES, --targets, --labels, --query-labels, --metric and "
                "--temperature, got at least one; remove them"
            )
        senses = demo.load_senses()
        store, queries = demo.build_store(senses), senses.queries
        labels, query_labels = [str(row) for row in senses.rows], list(senses.sentences)
        value_labels = list(demo.PARTS_OF_SPEECH.values())
        found = lab.compare(store, queries, **settings)
    else:
        if options.store is None or options.queries is None:
            raise ArgumentError("STORE, QUERIES: expected both, or --demo; see softdb compare --help")
        if options.query_labels is not None and (options.labels is None or options.targets is not None):
            raise ArgumentError(
                "--query-labels: expected --labels, and no --targets; add --labels FILE, remove --targets"
            )
        if options.labels is not None and options.query_labels is None and options.html is None:
            raise ArgumentError(
                "--labels: expected --query-labels or --html, which use the labels, got neither; add one"
            )
        store = read_store(options.store, options.metric, options.temperature)
        queries = read_queries(options.queries)
        if options.labels is not None:
            labels = read_labels("--labels", options.labels, len(store), "rows of the store")
        if labels is not None and options.query_labels is not None:
            query_labels = read_labels("--query-labels", options.query_labels, len(queries), "queries")
            found = compare_labels(store, queries, labels, query_labels, **settings)
        else:
            targets = None if options.targets is None else read_array(options.targets)
            found = lab.compare(store, queries, targets=targets, **settings)
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
            query_labels=query_labels,
            value_labels=value_labels,
            columns=found,
        )
    for path in written:
        print(f"wrote {path}", flush=True)


def _can_encode_blocks(stream: TextIO) -> bool:
    try:
        (demo.FULL_BLOCK + demo.EIGHTH_BLOCKS).encode(stream.encoding or "ascii")
    except (AttributeError, LookupError, UnicodeEncodeError):  # There is no stream, or its encoding is unknown.
        return False
    return True


def _can_print() -> bool:
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _discard_output() -> None:
    """Discard unwritten output, so that Python's flush at exit does not fail again."""
    if sys.__stdout__ is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
