"""Measure the time and the memory of a call on one device.

On a GPU the time of a call is the difference of two CUDA events around it, and the result is the median over the calls.
Before each call 256 MiB are cleared, so that no operand is in the second-level cache. The GPU is busy with that for
about 0.1 ms, in which the host can prepare the call: the time includes what the host needs beyond that. The time of the
host, from the call to its return, is reported in addition. On a CPU the time is that of `time.perf_counter`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from harness import measure_peak_memory
from torch import Tensor

__all__ = ["DeviceTimer", "Duration"]

# Bytes that are cleared before each call: several times the second-level cache of any GPU.
CLEARED_BYTES = 2**28
WARM_UP_CALLS, MIN_CALLS, MAX_CALLS = 3, 3, 200


@dataclass(frozen=True)
class Duration:
    """Seconds of a call: median and quartiles, and the median time of the host."""

    median: float
    lower: float
    upper: float
    host: float
    calls: int


class DeviceTimer:
    """Timer of calls on a device.

    Args:
        device: The device.
        seconds: Time for the calls of one measurement; there are at least `MIN_CALLS` calls.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.is_cuda = device.type == "cuda"
        self._cleared = torch.empty(CLEARED_BYTES, dtype=torch.int8, device=device) if self.is_cuda else None

    def measure(self, run: Callable[[], object]) -> Duration:
        """Measure calls of ``run``, after calls that warm up."""
        began = time.perf_counter()
        for call in range(WARM_UP_CALLS):
            run()  # The first call compiles kernels and allocates memory.
            self.synchronize()
            if call == 0:
                began = time.perf_counter()
        estimate = (time.perf_counter() - began) / (WARM_UP_CALLS - 1)
        calls = int(min(MAX_CALLS, max(MIN_CALLS, self.seconds / max(estimate, 1e-6))))
        seconds, host = self._time_on_gpu(run, calls) if self.is_cuda else self._time_on_cpu(run, calls)
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return Duration(median, lower, upper, statistics.median(host), calls)

    def _time_on_gpu(self, run: Callable[[], object], calls: int) -> tuple[list[float], list[float]]:
        pairs, host = [], []
        for _ in range(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self._cleared is not None:
                self._cleared.zero_()
            start.record()
            began = time.perf_counter()
            run()
            host.append(time.perf_counter() - began)
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()  # once, so that the host never waits between calls
        return [start.elapsed_time(end) / 1e3 for start, end in pairs], host

    def _time_on_cpu(self, run: Callable[[], object], calls: int) -> tuple[list[float], list[float]]:
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return seconds, seconds

    def synchronize(self) -> None:
        """Wait until the device has finished all calls."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def measure_memory(self, run: Callable[[], Iterable[Tensor | None]]) -> int:
        """Measure the peak of memory during ``run``, without its results, in bytes.

        The results and gradients that ``run`` makes must not exist before the call.
        """
        if self.is_cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = list(run())
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            results = []
            peak = measure_peak_memory(lambda: results.extend(run()))
        return max(0, peak - sum(tensor.nbytes for tensor in results if tensor is not None))
