import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Case, Work, compare, measure_peak_memory
from support.programs import check_exit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# gpu.py has its own tests; the other modules without cases are imported by scripts.
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "\ndef cases(" in path.read_text(encoding="utf-8"))


def parse_table(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_compare_reports_times_ratios_floors_claims_and_facts(tmp_path):
    numbers = torch.randn(64, 64)
    square = Case(
        "square",
        softdb={"mine": lambda: numbers @ numbers},
        peers={"theirs": lambda: torch.mm(numbers, numbers)},
        work=Work(operations=2 * 64**3, bytes=numbers.nbytes, product=(64, 64, 64)),
        claims={("mine", "theirs"): 1000.0},
        facts=lambda: {"error": 0.25},
    )
    total = Case("total", softdb={"mine": numbers.sum}, peers={"others": numbers.sum}, claims={("mine", "others"): 0.0})

    table = compare("trial", iter([square, total]), seconds=0.01, out=tmp_path)

    head, _, first, second = parse_table(table)
    assert head[:7] == ["work", "softdb", "time", "theirs", "ratio", "others", "ratio"]
    assert head[7:] == ["product floor", "ratio", "memory floor", "ratio", "error"]
    assert first[:2] == ["square", "mine"]
    assert first[4].endswith("≤ 1000.00")
    assert "NOT" not in first[4]
    assert first[5] == "–"
    assert first[-1] == "0.25"
    assert second[:2] == ["total", "mine"]
    assert second[6].endswith("NOT ≤ 0.00")
    assert second[7:] == ["–"] * 5
    assert len({len(line) for line in table.splitlines()}) == 1

    report = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))
    assert report["name"] == "trial"
    assert report["machine"]["torch"] == torch.__version__
    line = report["lines"][0]
    assert line["ratios"]["theirs"] == pytest.approx(line["time"]["median"] / line["peers"]["theirs"]["median"])
    assert line["time"]["turns"] >= 5
    assert set(line["floors"]) == {"product", "memory"}
    assert line["facts"] == {"error": 0.25}


@pytest.mark.slow
def test_compare_makes_each_case_after_the_previous_one_is_measured():
    made = []

    def cases():
        for name in ("first", "second"):
            made.append(name)
            yield Case(name, softdb={"mine": lambda: calls.append(list(made))}, peers={})

    calls = []
    compare("trial", cases(), seconds=0.0)
    assert calls[0] == ["first"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory counters of Linux")
def test_peak_memory_includes_memory_that_is_freed_again():
    megabyte = 2**20

    def run():
        for _ in range(2):
            numbers = torch.ones(32 * megabyte, dtype=torch.uint8)
            del numbers

    assert measure_peak_memory(run) == pytest.approx(32 * megabyte, abs=4 * megabyte)
    assert measure_peak_memory(lambda: None) < 4 * megabyte


@pytest.fixture
def threads():
    """Restore the number of torch's threads, which a measurement sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", SCRIPTS)
def test_cases_run_at_small_sizes(name, tmp_path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = compare(name, script.cases(True), seconds=0.01, out=tmp_path, min_rounds=2)
    check_report(table, tmp_path / f"{name}.json")


@pytest.mark.slow
def test_a_script_runs_as_a_program(tmp_path):
    script = str(BENCHMARKS / "small_reads.py")
    command = [sys.executable, "-W", "error", script, "--small", "--seconds", "0.01", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check_exit(done)
    check_report(done.stdout, tmp_path / "small_reads.json")


def check_report(table, path):
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["lines"]
    _head, _rule, *lines = parse_table(table)
    assert [line[0] for line in lines] == [line["label"] for line in report["lines"]]
