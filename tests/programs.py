"""Programs that tests run in processes of their own."""

from __future__ import annotations

import signal
import subprocess


def check_exit(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    """Raise unless a program ended with ``code``; show how it ended and what it printed."""
    assert done.returncode == code, (
        f"expected exit code {code}, got {_describe(done.returncode)}\n"
        f"---- stdout\n{(done.stdout or '')[-2000:]}\n---- stderr\n{(done.stderr or '')[-4000:]}"
    )


def _describe(code: int) -> str:
    try:
        return f"{code} ({signal.Signals(-code).name})"
    except ValueError:
        return str(code)
