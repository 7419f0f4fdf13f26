"""The command ``softdb``, as a shell sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import softdb
from softdb.cli import main

ROOT = Path(softdb.__file__).parents[1]
COMMAND = [sys.executable, "-W", "error", "-m", "softdb.cli"]


def run(
    *arguments: str, command: list[str] = COMMAND, encoding: str = "utf-8", stdout: IO[str] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments],
        env=environment(encoding),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding=encoding,
        timeout=120,
        check=False,
    )


def environment(encoding: str = "utf-8") -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": encoding}


def test_the_demo_answers() -> None:
    done = run("demo")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "bank (noun): sloping land" in done.stdout
    assert "a financial institution" in done.stdout
    assert "█" in done.stdout
    assert "\x1b" not in done.stdout


def test_bars_are_plain_where_the_encoding_has_no_blocks() -> None:
    done = run("demo", "river", encoding="ascii")
    assert done.returncode == 0
    assert "####" in done.stdout
    assert done.stdout.isascii()


def test_words_choose_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "seal", "bark"]) == 0
    out = capsys.readouterr().out
    assert '"the seal barked on the rocks"' in out
    assert '"the bark of the birch is white"' in out
    assert "river" not in out


def test_an_unknown_word_is_answered_kindly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "bank", "zebra"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("softdb: no sentence here contains 'zebra'. Try a word of one of these:\n")
    assert "  the river bank was steep\n" in err
    assert "Traceback" not in err


def test_without_arguments_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "softdb demo" in out
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"softdb {softdb.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["demo", "--nonsense"]])
def test_arguments_that_make_no_sense_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: softdb" in capsys.readouterr().err


posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and signals")


@posix
@pytest.mark.parametrize("closed", ["<&-", "<&- >&-"], ids=["stdin", "stdin and stdout"])
def test_it_runs_with_closed_streams(closed: str) -> None:
    done = run("demo", "river", command=["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ("sloping land" in done.stdout) is (closed == "<&-")


@posix
def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "demo"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 141
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_plainly() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("demo", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("softdb: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@posix
def test_ctrl_c_ends_it_quietly() -> None:
    # All sentences keep it busy for long enough to be interrupted.
    command = [*COMMAND, "demo", "the", "a", "bank"]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell has what it runs in the background ignore interrupts, and the children of that too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(120) == 130
        assert process.stderr.read() == b"\n"
