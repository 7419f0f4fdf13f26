"""The command ``softdb``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from softdb import __version__, demo
from softdb.errors import ArgumentError

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
            for line in demo.tour(demo.choose(options.words), blocks=_draws_blocks(sys.stdout)):
                print(line, flush=True)
        else:
            print(parser.format_help(), end="", flush=True)
    except ArgumentError as error:
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
    return parser


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
