"""pytest plugin of ``scripts/gpu``: report each test at once, and end a process whose device no longer works.

After an illegal access every operation on the device fails in that process. With pytest-xdist a new process replaces
the one that ends, so that the next tests are not affected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

__all__ = ["DEVICE_IS_BROKEN"]

# Exit code of a process whose device no longer works.
DEVICE_IS_BROKEN = 70
MESSAGE_CHARACTERS = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file of the reports."""
    parser.addoption("--device-report", type=Path, help="file to which a line of JSON is appended for each test")


def pytest_configure(config: pytest.Config) -> None:
    """Write reports in the process that receives the reports of all others."""
    path = config.getoption("--device-report")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ReportFile(path), "device-report-file")


class ReportFile:
    """File with a line of JSON for each test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Append the report of a test, unless its setup or teardown passed."""
        if report.when == "call" or not report.passed:
            append_report(self.path, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Append the report of a module that could not be imported."""
        if report.failed:
            append_report(self.path, report)


def append_report(path: Path, report: pytest.TestReport | pytest.CollectReport) -> None:
    """Append a line of JSON."""
    line = {
        "name": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(getattr(report, "duration", 0.0), 3),
        "message": "" if report.passed else str(report.longrepr)[-MESSAGE_CHARACTERS:],
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End this process after a test that failed and left the device unusable."""
    report = yield
    if report.failed and is_device_broken():
        path = item.config.getoption("--device-report")
        if path is not None:  # pytest-xdist reports only that the process ended.
            append_report(path, report)
        os._exit(DEVICE_IS_BROKEN)
    return report


def is_device_broken() -> bool:
    """Return whether the device was used and refuses further work."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda")
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False
