"""Test the command ``softdb``: output, messages and exit codes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
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


def call(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which is faster."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    for stream in (out, err):
        stream.seek(0)
    return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def environment(encoding: str = "utf-8") -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": encoding}


@pytest.mark.slow
def test_the_demo_prints_hard_and_soft_answers() -> None:
    done = run("demo")
    check_exit(done)
    assert done.stderr == ""
    assert "bank (noun): sloping land" in done.stdout
    assert "a financial institution" in done.stdout
    assert "█" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.slow
def test_bars_are_ascii_if_the_encoding_has_no_blocks() -> None:
    done = call("demo", "river", encoding="ascii")
    check_exit(done)
    assert "####" in done.stdout
    assert done.stdout.isascii()


def test_words_choose_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "seal", "bark"]) == 0
    out = capsys.readouterr().out
    assert '"the seal barked on the rocks"' in out
    assert '"the bark of the birch is white"' in out
    assert "river" not in out


def test_an_unknown_word_lists_the_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "bank", "zebra"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("softdb: word: expected a word of the sentences below, got 'zebra'\n")
    assert "  the river bank was steep\n" in err
    assert "Traceback" not in err


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert "softdb demo" in out
    assert err == ""


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"softdb {softdb.__version__}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["demo", "--nonsense"]])
def test_invalid_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: softdb" in capsys.readouterr().err


posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and signals")


@pytest.mark.slow
@posix
@pytest.mark.parametrize("closed", ["<&-", "<&- >&-"], ids=["stdin", "stdin and stdout"])
def test_the_command_runs_with_closed_streams(closed: str) -> None:
    done = run("demo", "river", command=["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND])
    check_exit(done)
    assert done.stderr == ""
    assert ("sloping land" in done.stdout) is (closed == "<&-")


@pytest.mark.slow
@posix
def test_a_closed_pipe_exits_with_141() -> None:
    with subprocess.Popen(
        [*COMMAND, "demo"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 141
        assert process.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_exits_with_1() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("demo", stdout=full)
    check_exit(done, 1)
    assert done.stderr.startswith("softdb: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@posix
def test_ctrl_c_exits_with_130() -> None:
    # All sentences take long enough to be interrupted.
    command = [*COMMAND, "demo", "the", "a", "bank"]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Background processes of a shell ignore interrupts, and so do their children.
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
    """Write a store, its queries and targets to a directory."""
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


@pytest.mark.slow
def test_compare_takes_targets_and_writes_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    start = ["compare", str(files / "store.npz"), str(files / "queries.npy"), "--temperatures", "1", "--metric", "l2"]
    written = [str(files / name) for name in ("table.csv", "plot.png", "page.html")]
    options = [part for pair in zip(("--csv", "--plot", "--html"), written, strict=True) for part in pair]
    assert main([*start, "--targets", str(files / "classes.npy"), "--normalizers", "softmax", "gumbel", *options]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out.splitlines()[0]
    assert out.splitlines()[-3:] == [f"wrote {path}" for path in written]
    assert all(Path(path).stat().st_size > 500 for path in written)
    assert main([*start, "--targets", str(files / "wanted.npy")]) == 0
    assert "loss" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
def test_compare_reads_the_demo() -> None:
    done = call("compare", "--demo", "--temperatures", "0.05", "--ks", "4")
    check_exit(done)
    assert done.stderr == ""
    assert [line[0] for line in table(done.stdout)] == ["read", "exact", "topk", "hard"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "STORE, QUERIES: expected both, or --demo"),
        (["store.npz"], "STORE, QUERIES: expected both, or --demo"),
        (["store.npz", "--demo"], "--demo: expected none of STORE"),
        (["queries.npy", "queries.npy"], "expected arrays in the format of numpy or safetensors"),
        (["single.npz", "queries.npy"], "expected arrays in the format .* it is a single array"),
        (["empty.npz", "queries.npy"], "expected arrays in the format of numpy"),
        (["store.npz", "empty.npy"], "expected arrays in the format of numpy"),
        (["store.npz", "words.npy"], "expected one array of numbers of at most 64 bits"),
        (["store.npz", "one.npy"], r"QUERIES: expected shape \(B, key_dim\), got \(6,\)"),
        (["--demo", "--metric", "l2"], "--demo: expected none of STORE, QUERIES, --targets, --labels"),
        (["store.npz", "queries.npy", "--csv", "nowhere/found.csv"], "expected a file in an existing directory"),
        (["bare.npz", "queries.npy"], "STORE: expected arrays 'keys' and 'values' in .*, got 'rows'"),
        (["whole.npz", "queries.npy"], "STORE: expected keys of floating-point numbers"),
        (["store.npz", "store.npz"], "expected one array of numbers of at most 64 bits"),
        (["store.npz", "wide.npy"], "query: expected"),
        (["store.npz", "queries.npy", "--targets", "short.npy"], "targets: expected a tensor with one entry for each"),
        (["store.npz", "queries.npy", "--temperatures", "-1"], "temperature: expected a finite number above 0"),
    ],
)
def test_compare_reports_invalid_arguments(
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


def test_compare_of_a_missing_file_exits_with_1(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(files / "none.npz"), str(files / "queries.npy")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bank.svg"
    assert main(["demo", "--plot", str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert path.stat().st_size > 20_000
    assert main(["demo", "crane", "--plot", str(tmp_path / "crane.nothing")]) == 2
    assert "expected an image file" in capsys.readouterr().err


def test_compare_reads_big_endian_numbers(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(files / "other.npy", np.load(files / "queries.npy").astype(">f4"))
    found = []
    for name in ("queries.npy", "other.npy"):
        arguments = ["compare", str(files / "store.npz"), str(files / name), "--temperatures", "1", "--modes", "hard"]
        assert main(arguments) == 0
        found.append([line[:-1] for line in table(capsys.readouterr().out)])
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_missing_file_does_not_close_the_output(files: Path) -> None:
    script = "from softdb.cli import main\nprint(main(['compare', 'none.npz', 'none.npy']))\nprint('after')"
    done = run(command=[sys.executable, "-W", "error", "-c", script])
    assert done.stdout.split() == ["1", "after"]


# -- saved stores ----------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Write a saved store, queries and labels to a directory."""
    torch.manual_seed(0)
    store = softdb.SoftKVStore(6, 3, metric="l2", temperature=0.5, fields=("time", "place"))
    store.add(torch.randn(40, 6), torch.randn(40, 3), ids=torch.randperm(100)[:40], fields={"time": 7, "place": 0})
    store.delete(store.ids[:2])
    store.update(store.ids, fields={"place": torch.arange(38)})
    store.save(tmp_path / "store")
    np.save(tmp_path / "queries.npy", torch.randn(7, 6))
    labels = [f"class {number % 3}" for number in range(38)]
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    (tmp_path / "query_labels.txt").write_text("class 1\r\n" * 6 + "class 9", encoding="utf-8")
    np.save(tmp_path / "labels.npy", np.arange(38) % 3)
    np.save(tmp_path / "query_labels.npy", np.array([1] * 6 + [9]))
    return tmp_path


def paths(directory: Path) -> list[str]:
    return [str(directory / "store"), str(directory / "queries.npy")]


def load(directory: Path) -> tuple[softdb.SoftKVStore, torch.Tensor]:
    return softdb.SoftKVStore.load(directory / "store"), torch.from_numpy(np.load(directory / "queries.npy"))


def test_compare_reads_a_saved_store_with_its_own_settings(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *paths(directory), "--ks", "2"]) == 0
    store, queries = load(directory)
    wanted = table(str(softdb.lab.compare(store, queries, ks=(2,))))
    assert [line[:-1] for line in table(capsys.readouterr().out)] == [line[:-1] for line in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["txt", "npy"])
def test_compare_shows_the_accuracy_of_labels(directory: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    options = [
        "--labels",
        str(directory / f"labels.{suffix}"),
        "--query-labels",
        str(directory / f"query_labels.{suffix}"),
    ]
    files = [str(directory / "found.csv"), str(directory / "page.html")]
    options += ["--csv", files[0], "--html", files[1], "--normalizers", "softmax", "gumbel", "--ks", "2"]
    assert main(["compare", *paths(directory), *options]) == 0
    assert "accuracy" in capsys.readouterr().out.splitlines()[0]
    store, queries = load(directory)
    classes = torch.nn.functional.one_hot(torch.arange(38) % 3, 3).float()
    with open(files[0], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 5
    for row in rows:
        if row["normalizer"] != "softmax":
            continue
        mode, temperature = row["mode"], float(row["temperature"])
        read = store.read(queries, mode, temperature=temperature, k={"topk": 2, "exact": 38, "hard": None}[mode])
        places = (read.ids.unsqueeze(-1) == store.ids).int().argmax(-1)
        answers = (read.weights.unsqueeze(-1) * classes[places]).sum(-2).argmax(-1)
        assert float(row["accuracy"]) == pytest.approx(int((answers[:6] == 1).sum()) / 7)
    text = Path(files[1]).read_text(encoding="utf-8")
    assert ("class 1" if suffix == "txt" else '<option value="0">1</option>') in text


@pytest.mark.slow
def test_compare_takes_labels_of_a_file_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(files / "labels.npy", np.arange(40) % 3)
    start = ["compare", str(files / "store.npz"), str(files / "queries.npy"), "--temperatures", "1"]
    options = ["--labels", str(files / "labels.npy"), "--query-labels", str(files / "classes.npy")]
    assert main([*start, *options]) == 0
    assert "accuracy" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "dot"], "--metric, --temperature: expected neither with a saved store"),
        (["--temperature", "1"], "--metric, --temperature: expected neither with a saved store"),
        (["--query-labels", "query_labels.txt"], "--query-labels: expected --labels, and no --targets"),
        (["--labels", "labels.txt"], "--labels: expected --query-labels or --html, which use the labels"),
        (
            ["--labels", "labels.txt", "--query-labels", "query_labels.txt", "--targets", "x.npy"],
            "--query-labels: .* no",
        ),
        (
            ["--labels", "query_labels.txt", "--html", "page.html"],
            "--labels: expected 38 labels, one for each of the rows .* got 7",
        ),
        (
            ["--labels", "labels.txt", "--query-labels", "labels.txt"],
            "--query-labels: expected 7 labels, one for each of the queries, got 38",
        ),
        (
            ["--labels", "queries.npy", "--html", "page.html"],
            "--labels: expected a 1-dimensional array of strings or integers",
        ),
        (["--labels", "latin.txt", "--html", "page.html"], "--labels: expected a text file in UTF-8"),
    ],
)
def test_compare_reports_invalid_labels(
    directory: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "latin.txt").write_bytes(b"\xe4\n")
    given = [str(directory / part) if "." in part else part for part in options]
    assert main(["compare", *paths(directory), *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(rf"softdb: {message}", captured.err), captured.err


def test_query_prints_the_best_rows(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", *paths(directory), "-k", "3"]) == 0
    found = table(capsys.readouterr().out)
    assert found[0] == ["query", "id", "weight", "time", "place"]
    store, queries = load(directory)
    read = store.read(queries, k=3)
    places = store.get(read.ids.flatten()).fields["place"].tolist()
    assert [line[0] for line in found[1:]] == [str(number) for number in range(7) for _ in range(3)]
    assert [int(line[1]) for line in found[1:]] == read.ids.flatten().tolist()
    assert [float(line[2]) for line in found[1:]] == pytest.approx(read.weights.flatten().tolist(), rel=1e-3)
    assert [line[3:] for line in found[1:]] == [["7", str(place)] for place in places]


def test_query_prints_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", *paths(directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    store, queries = load(directory)
    read = store.read(queries, k=5)
    assert [entry["query"] for entry in found] == list(range(7))
    for entry, ids, weights in zip(found, read.ids.tolist(), read.weights.tolist(), strict=True):
        assert [row["id"] for row in entry["rows"]] == ids
        assert [row["weight"] for row in entry["rows"]] == pytest.approx(weights)
        assert all(
            row["fields"] == {"time": 7, "place": int(store.get([row["id"]]).fields["place"])} for row in entry["rows"]
        )


def test_query_lists_all_rows_of_a_small_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "queries.npy", np.ones((2, 4), dtype=np.float32))
    for rows in (3, 0):
        store = softdb.SoftKVStore(4, 1)
        store.add(torch.randn(rows, 4), torch.randn(rows, 1))
        store.save(tmp_path / "store")
        assert main(["query", *paths(tmp_path)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * rows
        assert main(["query", *paths(tmp_path), "--json"]) == 0
        assert [len(entry["rows"]) for entry in json.loads(capsys.readouterr().out)] == [rows, rows]


def test_query_maps_the_rows(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    original = softdb.SoftKVStore.load

    def load(path: str, **given: Any) -> softdb.SoftKVStore:
        options.update(given)
        return original(path, **given)

    monkeypatch.setattr(softdb.SoftKVStore, "load", load)
    assert main(["query", *paths(directory)]) == 0
    assert options["mmap"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "queries.npy"], 1, r"\[Errno 2\] No such file or directory"),
        (["queries.npy", "queries.npy"], 2, "STORE_DIR: expected a directory that store.save"),
        (["store", "nowhere.npy"], 1, r"\[Errno 2\] No such file or directory"),
        (["store", "labels.npy"], 2, r"QUERIES: expected shape \(B, key_dim\), got \(38,\)"),
        (["store", "wide.npy"], 2, "query: expected"),
        (["store", "queries.npy", "-k", "0"], 2, "k: expected an integer of at least 1, got 0"),
        (["damaged", "queries.npy"], 1, ".*manifest.json: expected"),
    ],
)
def test_query_reports_errors_in_one_line(
    directory: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(directory / "wide.npy", np.zeros((7, 5), dtype=np.float32))
    (directory / "damaged").mkdir()
    (directory / "damaged" / "manifest.json").write_text("{}", encoding="utf-8")
    assert main(["query", *(str(directory / part) for part in arguments[:2]), *arguments[2:]]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(rf"softdb: {message}", captured.err), captured.err


def test_compare_of_a_damaged_store_exits_with_1(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (directory / "store").glob("values-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["compare", *paths(directory)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "values-1" in captured.err


# -- info and verify -------------------------------------------------------------------------------------


def save_store(path: Path, rows: int = 1200) -> Path:
    store = softdb.SoftKVStore(4, 3, fields=("time",), metric="l2")
    store.add(torch.randn(rows, 4), torch.randn(rows, 3), fields={"time": 0})
    store.save(path)
    return path


@pytest.mark.slow
def test_info_describes_a_snapshot(tmp_path: Path) -> None:
    done = call("info", str(save_store(tmp_path / "store")))
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


@pytest.mark.slow
def test_verify_exits_with_1_if_a_snapshot_is_damaged(tmp_path: Path) -> None:
    path = save_store(tmp_path / "store")
    done = call("verify", str(path))
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
        done = call(command, str(path))
        check_exit(done, 1)
        assert re.search(r"damaged: .*values-1.*the saved bytes of the tensor 'values'", done.stdout)
        assert re.search(r"damaged: .*keys-1.*bytes for the tensor 'keys'", done.stdout)
        assert len(re.findall("damaged: ", done.stdout)) == 2
    assert re.search(r"rows.ids-1.safetensors.* as saved\n", done.stdout)
    assert re.search(r"values-1.safetensors.* DAMAGED\n", done.stdout)


@pytest.mark.slow
def test_characters_that_the_terminal_cannot_encode_are_replaced(tmp_path: Path) -> None:
    path = save_store(tmp_path / "späces 数据")
    done = run("verify", str(path), encoding="ascii")
    check_exit(done)
    assert done.stderr == ""
    assert "sp?ces ??: every byte is as it was saved" in done.stdout
    path = path.rename(os.fsdecode(os.fsencode(tmp_path / "odd") + b"\xff"))
    for command in ("verify", "info"):
        done = call(command, str(path))
        check_exit(done)
        assert done.stderr == ""
        assert "odd?: every byte is as it was saved" in done.stdout


@pytest.mark.slow
def test_info_of_a_damaged_manifest_lists_the_files(tmp_path: Path) -> None:
    path = save_store(tmp_path / "store")
    (path / "manifest.json").write_text("{}", encoding="utf-8")
    (path / "odd\x1b[2Jname").write_text("", encoding="utf-8")
    done = call("info", str(path))
    check_exit(done, 1)
    assert "a snapshot with a damaged manifest" in done.stdout
    assert re.search(r"  files: keys-1.safetensors, odd\?\[2Jname, ", done.stdout)
    assert "\x1b" not in done.stdout
    assert re.search(r"damaged: .*manifest.json: expected the saved bytes", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_directory_without_a_snapshot_exits_with_1(command: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        done = call(command, str(path))
        check_exit(done, 1)
        assert re.match(r"softdb: .*No such file or directory", done.stderr)
        assert done.stdout == ""


@pytest.mark.parametrize(
    "shortage", [MemoryError("none left"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_exits_with_1(
    shortage: Exception, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise shortage

    for name in ("numpy.load", "softdb.lab.compare"):
        with monkeypatch.context() as patch:
            patch.setattr(name, refuse)
            assert main(["compare", str(files / "store.npz"), str(files / "queries.npy")]) == 1
        assert capsys.readouterr().err == f"softdb: out of memory: {shortage}\n"
