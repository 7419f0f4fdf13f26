"""Test ``scripts/gpu`` and its pytest plugin, on the CPU."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.device_run import DEVICE_IS_BROKEN
from support.programs import check_exit

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu"
pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("scripts_gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # none next to the script
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


def read_results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    report = tmp_path / "reports" / "hangs.jsonl"
    hangs = f"""echo '{{"name": "a", "outcome": "passed"}}' > {report}
        echo '{{"name": "b", "outcome": "failed", "message": "wrong"}}' >> {report}
        echo '{{"name": "c", "outc' >> {report}
        sleep 600 & echo $! > {tmp_path}/child; wait"""
    parts = [
        gpu.Part("fails", shell("echo some words; exit 3"), 1.0),
        gpu.Part("hangs", shell(hangs), 0.03),
        gpu.Part("finds no test", shell("exit 5"), 1.0, may_be_empty=True),
        gpu.Part("passes", shell('echo "$OF_PARTS"'), 1.0),
    ]
    out = tmp_path / "out"
    out.mkdir()
    failed = gpu.run_parts(
        parts, 100.0, out, tmp_path / "reports", settings={"device": "cpu"}, variables={"OF_PARTS": "a variable"}
    )

    assert failed == 2
    results = read_results(out)
    assert (results["device"], results["finished"]) == ("cpu", True)
    fails, hangs, empty, passes = results["parts"]
    assert [part["outcome"] for part in results["parts"]] == ["failed", "timed out", "passed", "passed"]
    assert (fails["code"], empty["code"], passes["code"]) == (3, 5, 0)
    assert 0.5 < hangs["limit"] < hangs["seconds"] < 60
    assert passes["limit"] > 50  # It gets the time that the others did not use.
    # What a part reported until its limit is kept; an incomplete line is not.
    assert hangs["counts"] == {"passed": 1, "failed": 1}
    assert hangs["reports"] == [{"name": "b", "outcome": "failed", "message": "wrong"}]
    assert not is_running(int((tmp_path / "child").read_text()))
    assert (out / "fails.log").read_text().endswith("some words\n")
    assert (out / "passes.log").read_text().endswith("a variable\n")


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]],
    ids=["kill", "end of the terminal", "Ctrl-C twice"],
)
def test_a_kill_of_the_script_ends_the_part_and_keeps_the_results(signals: list[int], tmp_path: Path) -> None:
    trap = "trap '' TERM; " if len(signals) > 1 else ""  # A part that ignores SIGTERM is killed.
    program = f"""
import importlib.machinery, importlib.util, pathlib, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores,
signal.signal(signal.SIGINT, signal.default_int_handler)  # and this one shells ignore in the background
sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("gpu", {str(SCRIPT)!r})
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu", loader))
loader.exec_module(gpu)
out = pathlib.Path({str(tmp_path)!r})
hangs = "{trap}sleep 600 & echo $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/child; wait"
parts = [
    gpu.Part("passes", ["true"], 1.0),
    gpu.Part("hangs", ["sh", "-c", hangs], 1.0),
    gpu.Part("never runs", ["true"], 1.0),
]
sys.exit(gpu.run_parts(parts, 600.0, out, out, settings={{}}, variables={{}}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "child").exists() and time.monotonic() < end:
        time.sleep(0.02)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(60) == 2
    assert not is_running(int((tmp_path / "child").read_text()))
    results = read_results(tmp_path)
    assert results["finished"] is False
    assert [part["outcome"] for part in results["parts"]] == ["passed", "interrupted", "not run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "environment, operation"], "--parts: expected names among environment, .*; got 'operation'"),
        (["--minutes", "0"], "--minutes: expected a number above 0, got 0"),
        (["--out", "{file}"], "--out: expected a folder to which files can be written, got .*: File exists"),
    ],
)
def test_a_wrong_argument_is_named_before_a_part_runs(
    arguments: list[str], message: str, gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = ["--out", str(tmp_path), *(argument.format(file=tmp_path / "file") for argument in arguments)]
    with pytest.raises(SystemExit, match="2"):
        gpu.main(given)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "results.json").exists()


def test_the_command_for_wheels_names_every_package_with_its_pinned_version(gpu: ModuleType) -> None:
    command = gpu.make_wheels_command()
    words = command.split()
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    for name in gpu.PACKAGES:
        assert sum(word.partition("==")[0] == name for word in words) == 1
        pinned = [pin for pin in pins if pin.startswith(f"{name}==") and ";" not in pin]
        assert set(pinned) <= set(words)
    assert any(word.startswith("faiss-cpu==") for word in words)
    assert gpu.find_pins(["numpy"], "3.10.2") != gpu.find_pins(["numpy"], "3.12")
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert command in " ".join(page.replace("\\\n", " ").split())


@pytest.mark.slow
def test_missing_packages_are_installed_from_a_folder(gpu: ModuleType, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pins = {"softdb-test-package": "1.0", "softdb-absent-package": "", "pytest": "8.0"}
    text = gpu.install_wheels(tmp_path / "wheels", site, pins)
    assert text.startswith("packages: softdb-test-package, softdb-absent-package missing or too old, and no folder")
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "softdb_test_package-1.0-py3-none-any.whl", "w") as wheel:
        folder = "softdb_test_package-1.0.dist-info"
        wheel.writestr("softdb_test_package.py", "number = 3\n")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: softdb-test-package\nVersion: 1.0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    text = gpu.install_wheels(tmp_path / "wheels", site, pins)
    assert text.startswith(f"packages: installed softdb-test-package into {site}; could not install softdb-absent")
    assert (site / "softdb_test_package.py").exists()
    text = gpu.install_wheels(tmp_path / "wheels", site, {"softdb-test-package": "1.0"})
    assert text == "packages: none is missing or too old"
    assert not gpu.has_package("softdb-test-package", site, "1.0.1")


def test_parts_run_correctness_first_and_every_test_of_a_device_once(gpu: ModuleType, tmp_path: Path) -> None:
    parts = {part.name: part for part in gpu.list_parts("cuda", False, 4, tmp_path, tmp_path, tmp_path)}
    assert list(parts) == ["environment", "operations", "triton", "kernels", "tests", "benchmarks", "slow"]
    paths = {name: [w for w in part.command if w.startswith("tests")] for name, part in parts.items()}
    ignored = {word.partition("=")[2] for word in parts["tests"].command if word.startswith("--ignore=")}
    assert paths["tests"] == paths["slow"] == ["tests"]
    assert ignored == {*paths["operations"], *paths["kernels"], "tests/lab/test_page.py"}
    assert all((ROOT / path).exists() for path in [*ignored, *paths["triton"]])


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--minutes", "8"]
    command += ["--parts", "environment,tests", "--out", str(tmp_path), "--site", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check_exit(done)
    results = read_results(tmp_path)
    environment, tests = results["parts"]
    (found,) = environment["reports"]
    assert found["outcome"] == "measured"
    assert {"torch", "softdb", "faiss", "triton", "host", "compiler"} <= set(found)
    assert tests["counts"]["passed"] > 0
    assert set(tests["counts"]) <= {"passed", "skipped"}
    assert "all parts passed" in done.stdout


PROGRAM = """
import pytest, torch

def test_passes():
    pass

def test_fails():
    assert 1 + 1 == 3

def test_is_skipped():
    pytest.skip("no reason")

def fail():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_breaks_the_device(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail
    fail()

def test_never_runs():
    pass
"""


@pytest.mark.slow
def test_the_plugin_reports_tests_at_once_and_ends_a_process_whose_device_is_broken(tmp_path: Path) -> None:
    (tmp_path / "test_program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # else pytest may find that of softdb
    report = tmp_path / "report.jsonl"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    options = ["-p", "support.device_run", "--device-report", str(report), "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    check_exit(done, DEVICE_IS_BROKEN)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    names = [line["name"].partition("::")[2] for line in lines]
    assert names == ["test_passes", "test_fails", "test_is_skipped", "test_breaks_the_device"]
    assert [line["outcome"] for line in lines] == ["passed", "failed", "skipped", "failed"]
    assert "1 + 1" in lines[1]["message"]
    assert "illegal memory access" in lines[3]["message"]
