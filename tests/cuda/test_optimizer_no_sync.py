"""Test that the host never waits for a GPU in the step of a row optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_gpu import is_supported, run_program

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch cannot register a device from Python")


@pytest.mark.slow
def test_steps_do_not_wait_for_the_device() -> None:
    errors = run_program(Path(__file__).with_name("steps_on_fake_gpu.py"))
    assert {name: error for name, error in errors.items() if error and not name.startswith("wait: ")} == {}
    # The program notices each kind of wait that is put into a step.
    assert len(errors) > 20
    assert [name for name, error in errors.items() if error] == [name for name in errors if name.startswith("wait: ")]
