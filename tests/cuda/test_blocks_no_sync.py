"""The blocks in torch never wait for a GPU, forward or backward."""

from __future__ import annotations

import pytest
from support.blocks_on_fake_gpu import CASES, WAITS
from support.fake_gpu import is_supported, run_program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_supported(), reason="torch cannot register a device from Python"),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    """Error of each case, all of them run in one process; None where there was none."""
    return run_program("support.blocks_on_fake_gpu")


@pytest.mark.parametrize("name", CASES)
def test_a_read_in_blocks_does_not_wait_for_the_device(name: str, errors: dict[str, str | None]) -> None:
    assert errors[name] is None, errors[name]


@pytest.mark.parametrize("name", WAITS)
def test_decisions_that_are_right_on_a_cpu_wait_for_the_device(name: str, errors: dict[str, str | None]) -> None:
    assert "DataDependentOutputException" in (errors[name] or "")
