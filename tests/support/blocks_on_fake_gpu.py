"""Program that runs the blocks in torch on a fake GPU, where any wait of the host raises an error.

`test_blocks_no_sync` runs it in a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from softdb.filters import Selection
from softdb.kernels.bias import ScoreBias, separate_hidden_rows
from softdb.kernels.blocks.exact import exact_read
from softdb.kernels.blocks.topk import exact_top_k, top_k
from softdb.kernels.gather import blend_at, score_at
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import PendingChecks
from softdb.scoring.metrics import compute_center, prepare_query
from support.fake_gpu import DEVICE, fake_gpu, is_fake, run_cases

QUERIES, ROWS, WIDTH = 20, 3_000, 8
TILINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "one tile": {"max_dense_scores": 0},
    "tiles": {"max_dense_scores": 0, "tile_elements": 2**13, "max_queries": 8, "one_pass_groups": 1},
}


def make_spec(tiling: str, metric: str, rows: int, *, masked: bool, biased: bool, query: torch.Tensor) -> ReadSpec:
    """Make the spec of a read on the fake GPU."""
    shared = torch.ones(rows, dtype=torch.bool, device=DEVICE) if masked else None
    bias = None
    if biased:
        numbers, visible = separate_hidden_rows("bias", torch.randn(1, 1, rows, device=DEVICE), torch.float32)
        assert visible is not None
        bias = ScoreBias(numbers.requires_grad_())
    return ReadSpec(
        metric,
        compute_center(query, metric),
        Selection(rows, shared=shared),
        torch.float32,
        max_key_norm=wait_for_norm,
        tiling=replace(Tiling.for_device(query.device), **TILINGS[tiling]),
        bias=bias,
        pending_checks=PendingChecks(),
    )


def wait_for_norm() -> float:
    """Raise: the norm of all keys is on the GPU."""
    raise AssertionError("the host waits for the largest norm of a key")


def read(tiling: str, metric: str, *, rows: int = ROWS, masked: bool = False, biased: bool = False, k: int = 0) -> None:
    """Read, run backward, and search, without a wait of the host."""
    with fake_gpu() as waits:
        tensors = [torch.randn(count, WIDTH, device=DEVICE, requires_grad=True) for count in (QUERIES, rows, rows)]
        query, keys, values = tensors
        assert Tiling.for_device(query.device) == Tiling.for_device(torch.device("cuda"))
        spec = make_spec(tiling, metric, rows, masked=masked, biased=biased, query=query)
        operand = prepare_query(query, metric, 2.0, spec.center, spec.dtype)
        blend, lse, best = exact_read(operand, keys, values, spec, k=k)
        (blend.sum() + lse.sum()).backward()
        leaves = tensors if spec.bias is None else [*tensors, spec.bias.numbers]
        assert all(is_fake(leaf.grad) for leaf in leaves)
        assert (best is not None) == (k > 0)
        with torch.no_grad():
            exact_read(operand, keys, values, spec, k=k)
            scores, found = exact_top_k(operand, keys, spec, 5)
            assert is_fake(scores)
            if rows:
                score_at(operand, keys, found, spec)
                blend_at(scores, values, found.clamp(min=0))
        assert waits.operators > 20


def read_as_on_a_cpu(module: str, run: Callable[[], None]) -> None:
    """Run with the decisions of one module made as on a CPU: the host waits, which raises."""
    owner = importlib.import_module(f"softdb.kernels.{module}")
    original = owner.is_deferred
    owner.is_deferred = lambda tensor: False
    try:
        run()
    finally:
        owner.is_deferred = original


def search() -> None:
    """Search a tile of scores."""
    with fake_gpu():
        top_k(torch.randn(3, 50, device=DEVICE), 4)


CASES: dict[str, Callable[[], None]] = {
    f"{tiling}, {name}": functools.partial(read, tiling, **how)
    for tiling in TILINGS
    for name, how in {
        "dot": {"metric": "dot"},
        "cosine with k": {"metric": "cosine", "k": 4},
        "l2 with a mask": {"metric": "l2", "masked": True},
        "dot with a mask and k": {"metric": "dot", "masked": True, "k": 4},
        "dot without rows": {"metric": "dot", "rows": 0},
        "dot with a bias": {"metric": "dot", "biased": True, "k": 4},
    }.items()
}
WAITS: dict[str, Callable[[], None]] = {
    "wait in topk": functools.partial(read_as_on_a_cpu, "blocks.topk", search),
    "wait in forward": functools.partial(
        read_as_on_a_cpu, "blocks.forward", functools.partial(read, "tiles", "dot", rows=0)
    ),
    "wait in exact": functools.partial(read_as_on_a_cpu, "blocks.exact", functools.partial(read, "tiles", "dot")),
    "wait in dense": functools.partial(read_as_on_a_cpu, "blocks.dense", functools.partial(read, "dense", "dot")),
    "wait in spec": functools.partial(read_as_on_a_cpu, "spec", functools.partial(read, "tiles", "dot")),
    "wait in bias": functools.partial(read_as_on_a_cpu, "bias", functools.partial(read, "dense", "dot", biased=True)),
}


if __name__ == "__main__":
    run_cases(CASES | WAITS, sys.argv[1:])
