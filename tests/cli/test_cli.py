"""The command ``softdb``, as a shell sees it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.programs import check_exit

import softdb
from softdb.cli.main import main

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
    check_exit(done)
    assert done.stderr == ""
    assert "bank (noun): sloping land" in done.stdout
    assert "a financial institution" in done.stdout
    assert "█" in done.stdout
    assert "\x1b" not in done.stdout


def test_bars_are_plain_where_the_encoding_has_no_blocks() -> None:
    done = run("demo", "river", encoding="ascii")
    check_exit(done)
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
    check_exit(done)
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
    check_exit(done, 1)
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


# -- compare ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a store, its queries and targets."""
    torch.manual_seed(0)
    keys, values, queries = torch.randn(40, 6), torch.randn(40, 3), torch.randn(7, 6)
    np.savez(tmp_path / "store.npz", keys=keys, values=values)
    safetensors.torch.save_file({"keys": keys, "values": values}, tmp_path / "store.safetensors")
    np.save(tmp_path / "queries.npy", queries)
    np.save(tmp_path / "classes.npy", np.arange(7) % 3)
    np.save(tmp_path / "wanted.npy", np.zeros((7, 3), dtype=np.float32))
    return tmp_path


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_compare_reads_a_file(files: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(files / f"store.{ending}"), str(files / "queries.npy"), "--ks", "2", "--temperatures", "1", "0.1"]
    assert main(["compare", *arguments]) == 0
    found = table(capsys.readouterr().out)
    assert [line[0] for line in found] == ["read", "exact", "topk", "hard", "exact", "topk", "hard"]
    with np.load(files / "store.npz") as arrays:
        store = softdb.SoftKVStore(6, 3)
        store.add(torch.from_numpy(arrays["keys"]), torch.from_numpy(arrays["values"]))
    queries = torch.from_numpy(np.load(files / "queries.npy"))
    wanted = softdb.lab.compare(store, queries, ks=(2,), temperatures=(1.0, 0.1))
    assert [line[1:-1] for line in found[1:]] == [line[1:-1] for line in table(str(wanted))[1:]]


def test_compare_has_targets_and_writes_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    start = ["compare", str(files / "store.npz"), str(files / "queries.npy"), "--temperatures", "1", "--metric", "l2"]
    written = [str(files / name) for name in ("table.csv", "picture.png", "page.html")]
    options = [part for pair in zip(("--csv", "--plot", "--html"), written, strict=True) for part in pair]
    assert main([*start, "--targets", str(files / "classes.npy"), "--normalizers", "softmax", "gumbel", *options]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out.splitlines()[0]
    assert out.splitlines()[-3:] == [f"wrote {path}" for path in written]
    assert all(Path(path).stat().st_size > 500 for path in written)
    assert main([*start, "--targets", str(files / "wanted.npy")]) == 0
    assert "loss" in capsys.readouterr().out.splitlines()[0]


def test_compare_of_the_demo() -> None:
    done = run("compare", "--demo", "--temperatures", "0.05", "--ks", "4")
    check_exit(done)
    assert done.stderr == ""
    assert [line[0] for line in table(done.stdout)] == ["read", "exact", "topk", "hard"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "STORE, QUERIES: expected both, or --demo"),
        (["store.npz"], "STORE, QUERIES: expected both, or --demo"),
        (["store.npz", "--demo"], "--demo: expected no STORE"),
        (["queries.npy", "queries.npy"], "expected arrays as numpy or safetensors write them"),
        (["single.npz", "queries.npy"], "expected arrays as numpy .* it is a single array"),
        (["empty.npz", "queries.npy"], "expected arrays as numpy"),
        (["store.npz", "empty.npy"], "expected arrays as numpy"),
        (["store.npz", "words.npy"], "expected one array of numbers of at most 64 bits"),
        (["store.npz", "one.npy"], r"QUERIES: expected shape \(B, key_dim\), got \(6,\)"),
        (["--demo", "--metric", "l2"], "--demo: expected no STORE, QUERIES, --targets, --metric"),
        (["store.npz", "queries.npy", "--csv", "nowhere/found.csv"], "expected a file in a folder that exists"),
        (["bare.npz", "queries.npy"], "STORE: expected arrays 'keys' and 'values' in .*, got 'rows'"),
        (["whole.npz", "queries.npy"], "STORE: expected keys of floating-point numbers"),
        (["store.npz", "store.npz"], "expected one array of numbers of at most 64 bits"),
        (["store.npz", "wide.npy"], "query: expected"),
        (["store.npz", "queries.npy", "--targets", "short.npy"], "targets: expected a tensor with one entry for each"),
        (["store.npz", "queries.npy", "--temperatures", "-1"], "temperature: expected a finite number above 0"),
    ],
)
def test_compare_says_what_is_wrong(
    files: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(files / "bare.npz", rows=np.zeros(3))
    np.savez(files / "whole.npz", keys=np.zeros((3, 6), dtype=int), values=np.zeros((3, 2)))
    np.save(files / "wide.npy", np.zeros((7, 5), dtype=np.float32))
    np.save(files / "short.npy", np.zeros(3, dtype=int))
    np.save(files / "words.npy", np.array(["a", "b"]))
    np.save(files / "one.npy", np.zeros(6, dtype=np.float32))
    with open(files / "single.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name in ("empty.npz", "empty.npy"):
        (files / name).touch()
    given = [str(files / part) if part.endswith((".npy", ".npz")) else part for part in arguments]
    assert main(["compare", *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(rf"softdb: (.*: )?{message}", captured.err), captured.err


def test_compare_of_a_file_that_is_not_there(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(files / "none.npz"), str(files / "queries.npy")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_the_demo_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bank.svg"
    assert main(["demo", "--plot", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.stat().st_size > 20_000
    assert main(["demo", "crane", "--plot", str(tmp_path / "crane.nothing")]) == 2
    assert "expected the ending of a picture" in capsys.readouterr().err


def test_numbers_of_other_machines_and_kinds_are_read(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(files / "other.npy", np.load(files / "queries.npy").astype(">f4"))
    found = []
    for name in ("queries.npy", "other.npy"):
        arguments = ["compare", str(files / "store.npz"), str(files / name), "--temperatures", "1", "--modes", "hard"]
        assert main(arguments) == 0
        found.append([line[:-1] for line in table(capsys.readouterr().out)])
    assert found[0] == found[1]


def test_a_file_that_is_not_there_leaves_the_output_open(files: Path) -> None:
    script = "from softdb.cli import main\nprint(main(['compare', 'none.npz', 'none.npy']))\nprint('after')"
    done = run(command=[sys.executable, "-W", "error", "-c", script])
    assert done.stdout.split() == ["1", "after"]


# -- info and verify -------------------------------------------------------------------------------------


def saved(path: Path, rows: int = 1200) -> Path:
    store = softdb.SoftKVStore(4, 3, fields=("time",), metric="l2")
    store.add(torch.randn(rows, 4), torch.randn(rows, 3), fields={"time": 0})
    store.save(path)
    return path


def test_info_tells_what_a_snapshot_holds(tmp_path: Path) -> None:
    done = run("info", str(saved(tmp_path / "store")))
    check_exit(done)
    assert done.stderr == ""
    for part in (
        rf"store: a snapshot of format 1, saved by softdb {re.escape(softdb.__version__)}\n",
        r"  rows +1,200\n",
        r"  key_dim +4\n",
        r"  metric +l2\n",
        r"  fields +time\n",
        r"  keys-1.safetensors +float32 +1,200 x 4 +19\.2 kB  as saved\n",
        r"store: every byte is as it was saved \(6 files, 62\.4 kB\)\n$",
    ):
        assert re.search(part, done.stdout), part


def test_verify_says_by_its_exit_code_whether_a_snapshot_is_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "store")
    done = run("verify", str(path))
    check_exit(done)
    assert done.stderr == ""
    assert done.stdout.endswith("every byte is as it was saved (6 files, 62.4 kB)\n")
    (file,) = path.glob("values-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (other,) = path.glob("keys-*")
    other.write_bytes(other.read_bytes()[:-3])
    for command in ("verify", "info"):
        done = run(command, str(path))
        check_exit(done, 1)
        assert re.search(r"damaged: .*values-1.*the saved bytes of the tensor 'values'", done.stdout)
        assert re.search(r"damaged: .*keys-1.*bytes for the tensor 'keys'", done.stdout)
        assert len(re.findall("damaged: ", done.stdout)) == 2
    assert re.search(r"rows.ids-1.safetensors.* as saved\n", done.stdout)
    assert re.search(r"values-1.safetensors.* DAMAGED\n", done.stdout)


def test_a_path_that_the_terminal_cannot_show_is_shown_in_part(tmp_path: Path) -> None:
    path = saved(tmp_path / "späces 数据")
    done = run("verify", str(path), encoding="ascii")
    check_exit(done)
    assert done.stderr == ""
    assert "sp?ces ??: every byte is as it was saved" in done.stdout
    path = path.rename(os.fsdecode(os.fsencode(tmp_path / "odd") + b"\xff"))
    for command in ("verify", "info"):
        done = run(command, str(path))
        check_exit(done)
        assert done.stderr == ""
        assert "odd?: every byte is as it was saved" in done.stdout


def test_a_saved_store_is_not_a_file_to_compare(tmp_path: Path) -> None:
    done = run("compare", str(saved(tmp_path / "store")), "queries.npy")
    check_exit(done, 2)
    assert re.search(r"STORE: expected a .safetensors or .npz file, got the directory .*lab.compare", done.stderr)


def test_info_of_a_damaged_manifest_tells_what_is_there(tmp_path: Path) -> None:
    path = saved(tmp_path / "store")
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    (path / "odd\x1b[2Jname").write_text("", encoding="utf-8")
    done = run("info", str(path))
    check_exit(done, 1)
    assert "a snapshot whose manifest is damaged" in done.stdout
    assert re.search(r"files there: keys-1.safetensors, odd\?\[2Jname, ", done.stdout)
    assert "\x1b" not in done.stdout
    assert re.search(r"damaged: .*manifest.json: expected the saved bytes", done.stdout)


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_snapshot_is_a_plain_message(command: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        done = run(command, str(path))
        check_exit(done, 1)
        assert re.match(r"softdb: .*No such file or directory", done.stderr)
        assert done.stdout == ""


@pytest.mark.parametrize(
    "shortage", [MemoryError("none left"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_no_fault_of_the_files(
    shortage: Exception, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise shortage

    for name in ("numpy.load", "softdb.lab.compare"):
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            assert main(["compare", str(files / "store.npz"), str(files / "queries.npy")]) == 1
        assert capsys.readouterr().err == f"softdb: there is not enough memory: {shortage}\n"
