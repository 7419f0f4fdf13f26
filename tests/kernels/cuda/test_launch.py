"""Launch parameters of the kernels in Triton, and the choice of the backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from softdb.kernels import backend
from softdb.kernels.cuda import launch


def test_tensors_on_the_cpu_are_read_by_blocks_in_torch() -> None:
    assert backend.backend_for(torch.empty(0)) is backend.TORCH_BLOCKS


@pytest.mark.parametrize(("width", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (200, 256)])
def test_widths_are_padded_to_powers_of_two(width: int, padded: int) -> None:
    assert launch.pad_width(width) == padded


def test_rows_are_split_until_every_multiprocessor_has_work() -> None:
    assert launch.count_splits(10_000, 1, 132) == 264
    assert launch.count_splits(10_000, 8, 132) == 33
    assert launch.count_splits(3, 1, 132) == 3
    assert launch.count_splits(10_000, 1000, 132) == 1
    assert launch.count_splits(0, 1, 132) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has no such setting")
def test_tf32_is_used_where_either_setting_of_torch_allows_it() -> None:
    program = """
import torch
from softdb.kernels.cuda.launch import choose_precision
torch.backends.cuda.matmul.allow_tf32 = True
print(choose_precision("tf32x3"))
torch.backends.cuda.matmul.fp32_precision = "ieee"
print(choose_precision("tf32x3"))
torch.backends.cuda.matmul.fp32_precision = "tf32"
print(choose_precision("tf32x3"))
"""  # in a process of its own, since torch cannot forget which setting was used
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["tf32", "tf32x3", "tf32"]


def test_precision_can_be_chosen_in_compiled_code() -> None:
    choose = torch.compile(lambda x: (x + 1, launch.choose_precision("ieee")), backend="eager", fullgraph=True)
    assert choose(torch.ones(1))[1] == launch.choose_precision("ieee")


def test_rows_with_adjacent_elements_are_not_copied() -> None:
    table = torch.randn(6, 4)
    assert launch.with_unit_stride(table[::2]) is not None
    assert launch.with_unit_stride(table[::2]).data_ptr() == table.data_ptr()
    assert torch.equal(launch.with_unit_stride(table.T), table.T)
    assert launch.with_unit_stride(table.T).stride(-1) == 1
