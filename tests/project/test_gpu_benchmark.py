"""Test ``benchmarks/gpu.py`` on the CPU, at tiny sizes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from device_timing import DeviceTimer
from gpu_report import Report, Result, from_json, judge, to_json
from sdpa import list_part_kernels, read_in_parts, run_sdpa
from support.programs import check_exit

CPU = torch.device("cpu")
BOUNDED_ROWS = {"1", "2", "3", "4", "5", "6", "7", "8"}


@pytest.fixture
def setting() -> gpu.Setting:
    return gpu.Setting(CPU, True, DeviceTimer(CPU, 0.0))


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_merged_by_lse_equal_one_read(parts: int) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(7, 16), torch.randn(80, 16), torch.randn(80, 16)
    (kernel,) = list_part_kernels(CPU, torch.float32).values()
    expected = run_sdpa(query, keys, values)[0, 0]
    torch.testing.assert_close(read_in_parts(kernel, query, keys, values, parts), expected)


def test_bounds_are_inclusive_and_a_missing_value_is_an_error() -> None:
    assert judge("1", "work", "ratio", 1.5, "≤ 1.5").outcome == "held"
    assert judge("1", "work", "ratio", 1.51, "≤ 1.5").outcome == "missed"
    assert judge("1", "work", "ratio", 10.0, "≥ 10").outcome == "held"
    assert judge("1", "work", "ratio", 9.9, "≥ 10").outcome == "missed"
    assert judge("1", "work", "ratio", 9.9).outcome == "measured"
    assert judge("1", "work", "ratio", math.nan, "≤ 1.5").outcome == "error"


def test_an_exception_is_the_result_of_its_case(setting: gpu.Setting, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(setting: gpu.Setting):
        yield judge("9", "work", "ms", 1.0)
        raise RuntimeError("an illegal memory access")

    first, second = gpu.run_case(setting, ("9", "work", fail))
    assert first.outcome == "measured"
    assert (second.row, second.work, second.outcome) == ("9", "work", "error")
    assert second.message.startswith("RuntimeError: an illegal memory access (test_gpu_benchmark.py:")


def test_a_peer_that_fails_leaves_the_others(setting: gpu.Setting, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no kernel")

    seconds = setting.time(lambda: None, {"bad": fail, "good": lambda: None})
    assert math.isnan(seconds["bad"])
    assert gpu.find_fastest(seconds) == seconds["good"]
    result = judge("9", "work", "ms", 1.0, seconds=seconds)
    assert result.message == "failed, see the log: bad"
    entry = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert entry["seconds"]["bad"] is None
    assert to_json(from_json(entry)) == to_json(result)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--seconds", "0.0001", *arguments])
    return gpu.main()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory counters of Linux")
def test_all_rows_run_and_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    assert run(monkeypatch, "--out", str(tmp_path), "--lines", str(lines)) == 0
    report = json.loads((tmp_path / "gpu_cpu.json").read_text(encoding="utf-8"))
    assert report["machine"]["torch"] == torch.__version__
    results = report["results"]
    assert {result["row"] for result in results} == {
        *BOUNDED_ROWS,
        "limits",
        "attention",
        "kernels",
        "backward",
        "search",
    }
    for result in results:
        assert result["outcome"] != "error", result["message"]
        assert result["value"] > 0
        assert (result["bound"] == "") == (result["row"] in ("limits", "kernels", "backward", "search"))
        assert all(seconds > 0 for seconds in result["seconds"].values())
    assert [json.loads(line)["work"] for line in lines.read_text().splitlines()] == [r["work"] for r in results]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == len(results) + 2


def test_a_new_process_continues_after_the_last_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = Result("8", "layer", outcome="error", message="RuntimeError: an illegal memory access")
    Report(tmp_path / "gpu_cpu.json", None, {}).add(earlier)
    last = len(gpu.list_cases()) - 2
    assert run(monkeypatch, "--out", str(tmp_path), f"--after={last}") == 1  # the earlier error counts
    results = json.loads((tmp_path / "gpu_cpu.json").read_text(encoding="utf-8"))["results"]
    assert [result["row"] for result in results] == ["8", "search", "search"]
    assert results[0]["message"] == earlier.message


PROGRAM = """
import sys, time
import gpu

gpu.list_cases = lambda: [
    ("limits", "rates", lambda setting: []),
    ("1", "never ends", lambda setting: time.sleep(600)),
    ("2", "ends", lambda setting: [gpu.judge("2", "ends", "ms", 1.0, "≤ 2")]),
]
sys.exit(gpu.main())
"""


@pytest.mark.slow
def test_a_case_that_never_ends_is_given_up_and_the_next_one_runs(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    benchmarks = Path(gpu.__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(benchmarks.parent), str(benchmarks)])}
    command = [sys.executable, str(program), "--device", "cpu", "--small", "--case-seconds", "0.5", "--out", "."]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    check_exit(done, 1)
    first, second = json.loads((tmp_path / "gpu_cpu.json").read_text(encoding="utf-8"))["results"]
    assert (first["row"], first["outcome"], first["message"]) == ("1", "error", "did not end within 0.5 s")
    assert (second["row"], second["outcome"]) == ("2", "held")


class FakeEvent:
    """Event whose time is the number of kernels before it."""

    kernels = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.kernels

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


def test_on_a_gpu_the_time_is_that_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = DeviceTimer(CPU, 0.0)
    timer.is_cuda = True

    def run() -> None:
        FakeEvent.kernels += 3

    duration = timer.measure(run)
    assert duration.median == duration.lower == duration.upper == pytest.approx(3e-3)
    assert duration.calls == 3
    assert duration.host < 1


def test_on_a_gpu_memory_is_the_peak_without_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    timer = DeviceTimer(CPU, 0.0)
    timer.is_cuda = True
    assert timer.measure_memory(lambda: [torch.zeros(10), None]) == 1000 - 100 - 40


def test_an_unknown_row_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--rows", "1, kernel"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--rows: expected 1 to 8, attention, kernels, backward or search; got kernel" in capsys.readouterr().err
