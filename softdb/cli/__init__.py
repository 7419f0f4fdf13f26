"""Command-line interface: the command ``softdb``."""

from softdb.cli.main import main

__all__ = ["main"]
