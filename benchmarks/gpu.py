"""Reads and training on a GPU, against torch and against the limits of the GPU.

The limits are measured in the same run: the rate of a copy, which counts bytes read and bytes written, and the rate of
matrix products of size 8192 in float32 (without TF32) and in bfloat16. Times are medians with CUDA events, with
cleared caches (see `device_timing`). A case that raises an exception is a result, and the next case runs.

With ``--device cpu`` the script runs on the CPU, to try it. The bounds are those for an H100 or H200.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_timing import DeviceTimer
from gpu_report import (
    NAN,
    Report,
    Result,
    Seconds,
    continue_in_new_process,
    format_results,
    judge,
    limit_time,
)
from harness import RESULTS, describe_machine
from sdpa import list_kernels, list_part_kernels, read_in_parts, run_sdpa
from torch import Tensor, nn

from softdb import SoftKVStore
from softdb.functional import soft_read
from softdb.layers import MemoryLayer
from softdb.optim import RowAdam

MIB = 2**20
BF16, FLOAT32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FLOAT32: "float32"}


@dataclass
class Setting:
    """Device, sizes and measured limits of a run.

    Attributes:
        device: The device.
        small: Whether sizes are tiny, to try the script.
        timer: The timer.
        copy_rate: Bytes per second of a copy, read and written.
        product_rates: Floating-point operations per second of a matrix product, by dtype.
    """

    device: torch.device
    small: bool
    timer: DeviceTimer
    copy_rate: float = NAN
    product_rates: dict[torch.dtype, float] = field(default_factory=dict)

    def pick(self, full: int, small: int) -> int:
        """Return the first size, or the second one if sizes are tiny."""
        return small if self.small else full

    def draw(self, *shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
        """Draw normally distributed numbers on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype)

    def time(self, own: Callable[[], object], peers: Mapping[str, Callable[[], object]] | None = None) -> Seconds:
        """Measure a call, the host in it, and its peers; NaN for a peer that fails."""
        measured = self.timer.measure(own)
        seconds = {"softdb": measured.median, "host": measured.host}
        for name, peer in (peers or {}).items():
            try:
                seconds[name] = self.timer.measure(peer).median
            except Exception:  # A kernel may refuse the sizes, lack a backward, or not exist in this release.
                print(f"{name} failed:", traceback.format_exc(limit=-2), flush=True)
                seconds[name] = NAN
        return seconds

    def bytes_seconds(self, count: float) -> float:
        """Return the time of reading a number of bytes at the rate of a copy."""
        return count / self.copy_rate

    def product_seconds(self, operations: float, dtype: torch.dtype) -> float:
        """Return the time of a number of operations at the rate of a matrix product."""
        return operations / self.product_rates.get(dtype, NAN)


Case = tuple[str, str, Callable[[Setting], Iterable[Result]]]  # row, work, function


# -- the cases ---------------------------------------------------------------------------------------------------------


def list_cases() -> list[Case]:
    """Return the cases in order: the limits, the table of bounds, other tables."""
    cases: list[Case] = [("limits", "copy, matrix products", measure_limits)]
    for queries in (1, 8, 64):
        cases.append(("1", f"exact forward bf16, ({queries}, 1M)", partial(measure_bf16_read, queries=queries)))
    cases.append(("2", "exact forward float32, (64, 1M)", measure_float32_read))
    cases.append(("3", "exact forward bf16, (1024, 1M), width 128", measure_wide_read))
    for dtype in (FLOAT32, BF16):
        name = NAMES[dtype]
        work = f"forward + backward to all {name}, (1024, 1M)"
        cases.append(("4", work, partial(measure_gradients, dtype=dtype, queries=1024)))
    for dtype, bound in ((BF16, "≤ 3"), (FLOAT32, "≤ 5")):
        work = f"exact top-k {NAMES[dtype]}, (256, 1M), k = 32"
        cases.append(("5", work, partial(measure_top_k, dtype=dtype, bound=bound)))
    cases.append(("6", "RowAdam step, 8,192 of 1M rows", measure_optimizer))
    cases.append(("7", "training step, 256 queries, k = 32, 1M rows", measure_training_step))
    cases.append(("8", "MemoryLayer bf16, 65,536 rows, 8 heads, 4,096 tokens", measure_layer))
    for dtype, is_causal in itertools.product((BF16, FLOAT32), (True, False)):
        work = f"soft_read {NAMES[dtype]}, 4 x 512 tokens, 8 heads, {'causal' if is_causal else 'mask'}"
        cases.append(("attention", work, partial(measure_attention, dtype=dtype, is_causal=is_causal)))
    sizes = [(1, 64), (8, 64), (64, 64), (1024, 64), (64, 128), (1024, 128)]
    for dtype, (queries, width) in itertools.product((BF16, FLOAT32), sizes):
        work = f"{NAMES[dtype]}, ({queries}, 1M), width {width}"
        cases.append(("kernels", work, partial(measure_library_kernels, dtype=dtype, width=width, queries=queries)))
    for dtype, queries in itertools.product((BF16, FLOAT32), (1, 64)):
        work = f"forward + backward to all {NAMES[dtype]}, ({queries}, 1M)"
        cases.append(("backward", work, partial(measure_gradients, dtype=dtype, queries=queries)))
    for rows in (1, 4, 10):
        work = f"exact top-k bf16, ({rows}M rows), k = 32"
        cases.append(("search", work, partial(measure_search, rows=rows * 10**6)))
    return cases


def measure_limits(setting: Setting) -> Iterator[Result]:
    """Measure the rates of a copy and of matrix products."""
    source = torch.ones(setting.pick(2**30, 2**20), dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    setting.copy_rate = 2 * source.nbytes / setting.timer.measure(lambda: target.copy_(source)).median
    yield judge("limits", "copy", "TB/s, read and written", setting.copy_rate / 1e12)
    for dtype, name in NAMES.items():
        size = setting.pick(8192, 128)
        left, right = setting.draw(size, size, dtype=dtype), setting.draw(size, size, dtype=dtype)
        product = partial(torch.mm, left, right)
        setting.product_rates[dtype] = 2 * size**3 / setting.timer.measure(product).median
        yield judge("limits", f"{name} product of size {size}", "TFLOP/s", setting.product_rates[dtype] / 1e12)


def make_rows(setting: Setting, dtype: torch.dtype, width: int = 64, rows: int = 10**6) -> tuple[Tensor, Tensor]:
    """Make keys and values, (rows, width)."""
    rows = setting.pick(rows, 1000)
    return setting.draw(rows, width, dtype=dtype), setting.draw(rows, width, dtype=dtype)


def bind_sdpa(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return calls of torch's attention, with its own choice and with each kernel.

    Only kernels that accept the operands are named, and only if there are several.
    """
    kernels = list_kernels(query[None, None], keys[None, None], values[None, None])
    calls: dict[str, Callable[[], Tensor]] = {"SDPA": partial(run_sdpa, query, keys, values)}
    if len(kernels) > 1:
        calls |= {f"SDPA {name}": partial(run_sdpa, query, keys, values, name) for name in kernels}
    return calls


def find_fastest(seconds: Seconds) -> float:
    """Return the time of the fastest peer; NaN if all failed."""
    peers = [time for name, time in seconds.items() if name not in ("softdb", "host", "limit")]
    return min((time for time in peers if not math.isnan(time)), default=NAN)


@torch.no_grad()
def measure_bf16_read(setting: Setting, queries: int) -> Iterator[Result]:
    """Measure an exact read of few queries, which is bound by memory."""
    keys, values = make_rows(setting, BF16)
    store = SoftKVStore.from_tensors(keys, values, index="Flat")
    query = setting.draw(queries, 64, dtype=BF16)
    work = f"exact forward bf16, ({queries}, {len(keys):,})"
    seconds = setting.time(lambda: store.read(query).values, bind_sdpa(query, keys, values))
    limit = setting.bytes_seconds(keys.nbytes + values.nbytes)
    seconds["limit"] = limit
    yield judge("1", work, "time / reading the rows once", seconds["softdb"] / limit, "≤ 1.5", seconds)
    if queries == 64:
        yield judge("1", work, "SDPA / softdb", seconds["SDPA"] / seconds["softdb"], "≥ 10", seconds)


@torch.no_grad()
def measure_float32_read(setting: Setting) -> Iterator[Result]:
    """Measure an exact read in float32."""
    keys, values = make_rows(setting, FLOAT32)
    store = SoftKVStore.from_tensors(keys, values, index="Flat")
    query = setting.draw(64, 64)
    seconds = setting.time(lambda: store.read(query).values, bind_sdpa(query, keys, values))
    limit = max(
        setting.bytes_seconds(keys.nbytes + values.nbytes),
        setting.product_seconds(4 * 64 * keys.numel(), FLOAT32),
    )
    seconds["limit"] = limit
    work = f"exact forward float32, (64, {len(keys):,})"
    yield judge("2", work, "time / the larger of bytes and operations", seconds["softdb"] / limit, "≤ 2", seconds)


@torch.no_grad()
def measure_wide_read(setting: Setting) -> Iterator[Result]:
    """Measure an exact read of many queries, which is bound by matrix products."""
    keys, values = make_rows(setting, BF16, 128)
    store = SoftKVStore.from_tensors(keys, values, index="Flat")
    query = setting.draw(1024, 128, dtype=BF16)
    seconds = setting.time(lambda: store.read(query).values, bind_sdpa(query, keys, values))
    rate = 4 * len(query) * keys.numel() / seconds["softdb"] / 1e12
    yield judge("3", f"exact forward bf16, (1024, {len(keys):,}), width 128", "TFLOP/s", rate, "≥ 300", seconds)


def measure_gradients(setting: Setting, dtype: torch.dtype, queries: int) -> Iterator[Result]:
    """Measure forward and backward to query, keys and values: time and memory."""
    operands = [*make_rows(setting, dtype), setting.draw(setting.pick(queries, min(queries, 16)), 64, dtype=dtype)]
    keys, values, query = (operand.requires_grad_() for operand in operands)
    upstream = torch.randn_like(query)

    def differentiate(read: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        output = read()
        return output, *torch.autograd.grad(output, (query, keys, values), upstream.view_as(output))

    def run() -> tuple[Tensor, ...]:
        return differentiate(lambda: soft_read(query, keys, values).values)

    peers = {name: partial(differentiate, peer) for name, peer in bind_sdpa(query, keys, values).items()}
    seconds = setting.time(run, peers)
    work = f"forward + backward to all {NAMES[dtype]}, ({len(query)}, {len(keys):,})"
    ratio = seconds["softdb"] / find_fastest(seconds)
    if queries < 1024:
        yield judge("backward", work, "softdb / the fastest SDPA", ratio, seconds=seconds)
        return
    yield judge("4", work, "softdb / the fastest SDPA", ratio, "≤ 1.0", seconds)
    memory = setting.timer.measure_memory(run) / MIB
    yield judge("4", work, "MiB beyond operands, gradients and output", memory, "≤ 64")


@torch.no_grad()
def measure_top_k(setting: Setting, dtype: torch.dtype, bound: str) -> Iterator[Result]:
    """Measure a top-k read with exact search."""
    keys, values = make_rows(setting, dtype)
    store = SoftKVStore.from_tensors(keys, values, index="Flat")
    query = setting.draw(setting.pick(256, 16), 64, dtype=dtype)
    seconds = setting.time(
        lambda: store.read(query, "topk", k=32).values,
        {"matmul and topk": lambda: (query @ keys.T).topk(32)},
    )
    work = f"exact top-k {NAMES[dtype]}, ({len(query)}, {len(keys):,}), k = 32"
    yield judge("5", work, "ms", 1e3 * seconds["softdb"], bound, seconds)
    yield judge("5", work, "(q @ k.T).topk / softdb", seconds["matmul and topk"] / seconds["softdb"], "≥ 2", seconds)


def measure_optimizer(setting: Setting) -> Iterator[Result]:
    """Measure optimizer steps with row-sparse gradients.

    The gradients are neither sorted nor marked as coalesced, like those of a backward.
    """
    touched, many, few = setting.pick(8192, 32), setting.pick(10**6, 1000), setting.pick(10**4, 100)

    def make_step(kind: type[torch.optim.Optimizer], rows: int, is_dense: bool = False) -> Callable[[], object]:
        parameter = nn.Parameter(setting.draw(rows, 64))
        optimizer = kind([parameter], lr=1e-3)  # type: ignore[call-arg]
        gradients = [
            torch.sparse_coo_tensor(
                torch.randperm(rows, device=setting.device)[:touched][None],
                setting.draw(touched, 64),
                (rows, 64),
                check_invariants=False,
            )
            for _ in range(1 if is_dense else 8)  # gradients of different rows
        ]
        rounds = itertools.cycle([gradient.to_dense() for gradient in gradients] if is_dense else gradients)

        def step() -> None:
            parameter.grad = next(rounds)
            optimizer.step()

        return step

    seconds = setting.time(
        make_step(RowAdam, many),
        {
            "few rows": make_step(RowAdam, few),
            "SparseAdam": make_step(torch.optim.SparseAdam, many),
            "dense Adam": make_step(torch.optim.Adam, many, is_dense=True),
        },
    )
    work = f"RowAdam step, {touched:,} of {many:,} rows"
    ratio = seconds["softdb"] / seconds["few rows"]
    yield judge("6", work, f"time / the same of {few:,} rows", ratio, "≤ 1.5", seconds)
    yield judge("6", work, "SparseAdam / softdb", seconds["SparseAdam"] / seconds["softdb"], "≥ 5", seconds)


def measure_training_step(setting: Setting) -> Iterator[Result]:
    """Measure a step with top-k reads and RowAdam, and with exact reads and Adam."""
    query = setting.draw(256, 64)

    def make_step(mode: str) -> Callable[[], object]:
        keys, values = make_rows(setting, FLOAT32)
        store = SoftKVStore.from_tensors(keys, values, trainable=True, sparse_grad=True, index="Flat")
        if mode == "topk":
            optimizer: torch.optim.Optimizer = RowAdam(store.parameters(), lr=1e-3)
        else:
            optimizer = torch.optim.Adam(store.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            read = store.read(query, "topk", k=32) if mode == "topk" else store.read(query)
            read.values.square().mean().backward()
            optimizer.step()

        return step

    seconds = setting.time(make_step("topk"), {"exact and dense Adam": make_step("exact")})
    work = f"training step, 256 queries, k = 32, {setting.pick(10**6, 1000):,} rows"
    yield judge("7", work, "ms", 1e3 * seconds["softdb"], "≤ 10", seconds)


class AttentionLayer(nn.Module):
    """The layer of row 8 by torch's attention: all heads read one table of rows."""

    def __init__(self, dim: int, rows: int, heads: int, key_dim: int, kernel: str | None, **options: Any) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.query = nn.Linear(dim, heads * key_dim, bias=False, **options)
        self.output = nn.Linear(heads * key_dim, dim, bias=False, **options)
        self.keys = nn.Parameter(torch.randn(rows, key_dim, **options))
        self.values = nn.Parameter(torch.randn(rows, key_dim, **options))

    def forward(self, x: Tensor) -> Tensor:
        """Read the rows with one query for each head and token."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).flatten(0, -2)
        read = run_sdpa(query, self.keys, self.values, self.kernel)
        output: Tensor = self.output(read[0, 0].view(*x.shape[:-1], -1))
        return output


def measure_layer(setting: Setting) -> Iterator[Result]:
    """Measure forward and backward of a MemoryLayer."""
    dim, rows, tokens = setting.pick(512, 64), setting.pick(65_536, 256), setting.pick(4096, 16)
    x = setting.draw(1, tokens, dim, dtype=BF16).requires_grad_()
    sample = setting.draw(256, 64, dtype=BF16).requires_grad_()[None, None]
    options: dict[str, Any] = {"device": setting.device, "dtype": BF16}

    def differentiate(layer: nn.Module) -> Callable[[], object]:
        inputs = [x, *layer.parameters()]
        upstream = torch.randn_like(x)
        return lambda: torch.autograd.grad(layer(x), inputs, upstream)

    layer = MemoryLayer(dim, rows, heads=8, key_dim=64, **options)
    peers = {"SDPA": differentiate(AttentionLayer(dim, rows, 8, 64, None, **options))}
    for name in list_kernels(sample, sample, sample):
        peers[f"SDPA {name}"] = differentiate(AttentionLayer(dim, rows, 8, 64, name, **options))
    seconds = setting.time(differentiate(layer), peers)
    work = f"MemoryLayer bf16, {rows:,} rows, 8 heads, {tokens:,} tokens, forward + backward"
    ratio = seconds["softdb"] / find_fastest(seconds)
    yield judge("8", work, "softdb / the fastest SDPA", ratio, "≤ 1.0", seconds)


def measure_attention(setting: Setting, dtype: torch.dtype, is_causal: bool) -> Iterator[Result]:
    """Measure forward and backward of `soft_read` as attention between tokens."""
    from torch.nn.attention.bias import causal_upper_left  # takes seconds, since it imports torch._dynamo

    tokens = setting.pick(512, 32)
    operands = [setting.draw(4, 8, tokens, 64, dtype=dtype).requires_grad_() for _ in range(3)]
    query, keys, values = operands
    upstream = torch.randn_like(query)
    causal = causal_upper_left(tokens, tokens)
    mask = torch.rand(tokens, tokens, device=setting.device) < 0.5
    mask.fill_diagonal_(True)  # Each query sees a row.
    options = {"is_causal": True} if is_causal else {"attn_mask": mask}

    def differentiate(output: Tensor) -> object:
        return torch.autograd.grad(output, operands, upstream)

    seconds = setting.time(
        lambda: differentiate(soft_read(query, keys, values, mask=causal if is_causal else mask).values),
        {"SDPA": lambda: differentiate(run_sdpa(query, keys, values, **options))},
    )
    kind = "causal" if is_causal else "mask"
    work = f"soft_read {NAMES[dtype]}, 4 x {tokens} tokens, 8 heads, {kind}, forward + backward"
    yield judge("attention", work, "softdb / SDPA", seconds["softdb"] / seconds["SDPA"], "≤ 1.15", seconds)


@torch.no_grad()
def measure_library_kernels(setting: Setting, dtype: torch.dtype, width: int, queries: int) -> Iterator[Result]:
    """Compare an exact read with torch's kernels over parts of the rows."""
    keys, values = make_rows(setting, dtype, width)
    query = setting.draw(setting.pick(queries, min(queries, 16)), width, dtype=dtype)
    peers = {
        f"{name}/{parts}": partial(read_in_parts, kernel, query, keys, values, parts)
        for name, kernel in list_part_kernels(setting.device, dtype).items()
        for parts in ((4,) if setting.small else (16, 64, 250))
    }
    seconds = setting.time(lambda: soft_read(query, keys, values).values, peers)
    seconds["limit"] = max(
        setting.bytes_seconds(keys.nbytes + values.nbytes),
        setting.product_seconds(4 * queries * keys.numel(), dtype),
    )
    work = f"{NAMES[dtype]}, ({queries}, {len(keys):,}), width {width}"
    ratio = seconds["softdb"] / find_fastest(seconds)
    yield judge("kernels", work, "softdb / the fastest kernel in parts", ratio, seconds=seconds)


@torch.no_grad()
def measure_search(setting: Setting, rows: int) -> Iterator[Result]:
    """Measure exact top-k by number of rows, to choose where it is the default."""
    keys, values = make_rows(setting, BF16, rows=rows)
    store = SoftKVStore.from_tensors(keys, values, index="Flat")
    for queries in (1, 256):
        query = setting.draw(queries, 64, dtype=BF16)
        seconds = setting.time(partial(store.read, query, "topk", k=32))
        work = f"exact top-k bf16, ({queries}, {len(keys):,}), k = 32"
        yield judge("search", work, "ms", 1e3 * seconds["softdb"], seconds=seconds)


# -- run and report ----------------------------------------------------------------------------------------------------


def run_case(setting: Setting, case: Case) -> Iterator[Result]:
    """Run a case; an exception is its last result."""
    row, work, function = case
    try:
        torch.manual_seed(0)
        yield from function(setting)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {str(error)[:500]} ({Path(place.filename).name}:{place.lineno})"
        traceback.print_exc()
        yield Result(row, work, outcome="error", message=message)
    gc.collect()
    if setting.timer.is_cuda and not is_broken():
        torch.cuda.empty_cache()


def is_broken() -> bool:
    """Return whether the GPU refuses work in this process, as after a bad access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def name_device(device: torch.device) -> str:
    """Return the name of the card in the form of a file name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> int:
    """Run the cases; return the number of cases that raised an exception."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__)
    parser.add_argument("--device", default="cuda", help="the device (default: cuda)")
    parser.add_argument("--small", action="store_true", help="use tiny sizes, to try the script; saved only with --out")
    parser.add_argument("--seconds", type=float, default=0.1, help="seconds of calls per contestant (default: 0.1)")
    parser.add_argument("--rows", help="rows to run, separated by commas: 1 to 8, attention, kernels, backward, search")
    parser.add_argument("--out", type=Path, help="folder of gpu_CARD.json (default: benchmarks/results)")
    parser.add_argument("--lines", type=Path, help="file to which each result is appended as a line of JSON")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="time limit of a case (default: 60)")
    parser.add_argument("--after", type=int, default=-1, help=argparse.SUPPRESS)  # the last case that has run
    options = parser.parse_args()
    rows = None if options.rows is None else [row.strip() for row in options.rows.split(",")]
    unknown = sorted(set(rows or ()) - {row for row, _, _ in list_cases()})
    if unknown:
        parser.error(f"--rows: expected 1 to 8, attention, kernels, backward or search; got {', '.join(unknown)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU; pass --device cpu --small to try the script")
    torch.backends.cuda.matmul.allow_tf32 = False
    setting = Setting(device, options.small, DeviceTimer(device, options.seconds))
    out = options.out or (None if options.small else RESULTS)
    path = None if out is None else out / f"gpu_{name_device(device)}.json"
    date = datetime.now(timezone.utc).date().isoformat()
    machine = {**describe_machine(), "cuda": torch.version.cuda}
    with suppress(importlib.metadata.PackageNotFoundError):
        machine["triton"] = importlib.metadata.version("triton")
    head = {"name": "gpu", "date": date, "device": str(device), "small": options.small, "machine": machine}
    report = Report(path, options.lines, head)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.after >= 0:
        report.load()
    for number, case in enumerate(list_cases()):
        is_limit = case[0] == "limits"  # every process measures the limits, to which others are compared
        if (number <= options.after and not is_limit) or (rows is not None and not is_limit and case[0] not in rows):
            continue
        with limit_time(report, number, *case[:2], options.case_seconds):
            for result in run_case(setting, case):
                if not (is_limit and options.after >= 0):
                    report.add(result)
        if setting.timer.is_cuda and is_broken():
            continue_in_new_process(number, "the GPU refuses further work in this process")
    print(format_results(report.results))
    return min(sum(result.outcome == "error" for result in report.results), 100)


if __name__ == "__main__":
    sys.exit(main())
