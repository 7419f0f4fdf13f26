"""Program that reads stores on a fake GPU, where any wait of the host raises an error.

`test_no_sync` runs it in a process of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from softdb import SoftKVStore
from support.fake_gpu import DEVICE, fake_gpu, is_fake, move_to_fake_gpu, run_cases

ROWS, QUERIES, WIDTH = 3_000, 64, 16
READS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact with k": {"k": 4},
    "topk": {"mode": "topk", "k": 8},
    "topk of one query": {"mode": "topk", "k": 8, "queries": 1},
    "hard": {"mode": "hard"},
    "exact with a mask": {"where": "mask"},
    "exact with k and a mask": {"where": "mask", "k": 4},
    "topk with a mask": {"where": "mask", "mode": "topk", "k": 8},
    "exact with a temperature tensor": {"temperature": "tensor"},
    "topk with a temperature tensor": {"temperature": "tensor", "mode": "topk", "k": 8},
    "exact with a bias": {"bias": "tensor"},
    "topk with a bias": {"bias": "tensor", "mode": "topk", "k": 8},
    "exact of few rows": {"rows": 50},
    "topk with more candidates than rows": {"rows": 5, "mode": "topk", "k": 8},
    "topk of an empty store": {"rows": 0, "mode": "topk", "k": 8},
    "exact after a deletion": {"deleted": 10},
    "topk after a deletion": {"deleted": 10, "mode": "topk", "k": 8},
    "topk with a mask after a deletion": {"deleted": 10, "where": "mask", "mode": "topk", "k": 8},
    "exact after most rows are deleted": {"deleted": 2_000},
}
STORES: dict[str, dict[str, Any]] = {
    "buffers": {},
    "parameters": {"trainable": True},
    "row-sparse": {"trainable": True, "sparse_grad": True},
    "bfloat16": {"trainable": True, "dtype": torch.bfloat16},
    "usage and eviction": {"track_usage": True, "capacity": ROWS, "evict": "lru"},
}


def read(options: dict[str, Any], store_options: dict[str, Any], metric: str) -> None:
    """Read, and run backward, without a wait of the host."""
    options = dict(options)
    rows, queries = options.pop("rows", ROWS), options.pop("queries", QUERIES)
    store = SoftKVStore(WIDTH, WIDTH + 8, metric=metric, **store_options)
    ids = store.add(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH + 8))
    store.delete(ids[: options.pop("deleted", 0)])
    with fake_gpu() as waits:
        move_to_fake_gpu(store)
        query = torch.randn(queries, WIDTH, device=DEVICE, requires_grad=True)
        if "where" in options:
            options["where"] = torch.ones(len(store), dtype=torch.bool, device=DEVICE)
        if "temperature" in options:
            options["temperature"] = torch.ones(queries, device=DEVICE, requires_grad=True)
        if "bias" in options:
            options["bias"] = torch.ones(len(store), device=DEVICE, requires_grad=True)
        for enabled in (True, False, True):
            store.rows.mark_updated(torch.arange(min(rows, 3), device=DEVICE))  # as a step of an optimizer does
            with torch.set_grad_enabled(enabled):
                answer = store.read(query, **options)
                assert is_fake(answer.values)
                assert answer.ids is None or is_fake(answer.ids)
            if enabled:
                (
                    answer.values.sum() + answer.lse.sum() + (0 if answer.weights is None else answer.weights.sum())
                ).backward()
                assert is_fake(query.grad)
                for table in store.parameters():
                    assert is_fake(table.grad)
        assert waits.operators > 20


def wait_in_a_read(wait: Callable[[torch.Tensor], Any]) -> None:
    """Read with a wait of the host on the way; the read has to raise."""
    from softdb.reading import reader

    original = reader.cast_values

    def cast_values(answer: Any, query: torch.Tensor) -> Any:
        wait(answer.values)
        return original(answer, query)

    reader.cast_values = cast_values
    try:
        read({}, {}, "scaled_dot")
    finally:
        reader.cast_values = original


# Each read of a store with row-sparse gradients, and of buffers by the metric whose operands are transformed; and some
# reads of each other store.
CHOICES = [
    *((name, "row-sparse", "scaled_dot") for name in READS),
    *((name, "buffers", "l2") for name in READS),
    *((name, store, "cosine") for name in ("exact", "exact with k", "topk") for store in STORES),
]
CASES: dict[str, Callable[[], None]] = {
    f"{name}, {store}, {metric}": functools.partial(read, READS[name], STORES[store], metric)
    for name, store, metric in CHOICES
}
WAITS: dict[str, Callable[[], None]] = {
    "item": functools.partial(wait_in_a_read, lambda tensor: tensor.sum().item()),
    "bool": functools.partial(wait_in_a_read, lambda tensor: bool((tensor > 0).any())),
    "tolist": functools.partial(wait_in_a_read, lambda tensor: tensor.tolist()),
    "nonzero": functools.partial(wait_in_a_read, lambda tensor: tensor.nonzero()),
    "unique": functools.partial(wait_in_a_read, lambda tensor: tensor.unique()),
    "mask": functools.partial(wait_in_a_read, lambda tensor: tensor[tensor > 0]),
    "assignment by a mask": functools.partial(
        wait_in_a_read, lambda tensor: tensor.detach().clone().__setitem__(tensor > 0, 0.0)
    ),
    "cpu": functools.partial(wait_in_a_read, lambda tensor: tensor.cpu()),
    "copy from the CPU": functools.partial(wait_in_a_read, lambda tensor: torch.ones(3).to(tensor.device)),
    "index on the CPU": functools.partial(wait_in_a_read, lambda tensor: tensor[torch.tensor([0, 1])]),
    "tensor of a list": functools.partial(wait_in_a_read, lambda tensor: torch.tensor([1, 2], device=tensor.device)),
}

if __name__ == "__main__":
    run_cases(CASES | WAITS, sys.argv[1:])
