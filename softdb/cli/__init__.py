"""The command ``softdb``."""

from softdb.cli.main import main

__all__ = ["main"]
