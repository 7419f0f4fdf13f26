"""Programs that tests run in subprocesses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import softdb


def check_exit(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    """Raise unless a program ended with ``code``; show how it ended and what it printed."""
    assert done.returncode == code, (
        f"expected exit code {code}, got {_describe(done.returncode)}\n"
        f"---- stdout\n{(done.stdout or '')[-2000:]}\n---- stderr\n{(done.stderr or '')[-4000:]}"
    )


def run_ranks(program: Path, rendezvous: Path) -> list[str]:
    """Run ``program`` as two ranks with a file rendezvous; return the output of each rank."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(Path(softdb.__file__).parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(rendezvous)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (out, err) in zip(ranks, outputs, strict=True):
        check_exit(subprocess.CompletedProcess(rank.args, rank.returncode, out, err))
    # Gloo of torch 2.8 prints to stdout that it is connected.
    return ["".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]")) for out, _ in outputs]


def _describe(code: int) -> str:
    try:
        return f"{code} ({signal.Signals(-code).name})"
    except ValueError:
        return str(code)
