"""Train the keys and values of a store of 100,000 rows to approximate a function.

The rows are initialized randomly. Each step reads the 32 best rows of 256 queries, and only those rows are updated. The
index follows the keys as they move. The script prints the loss, the recall of the index, and the mass: the fraction of
the exact softmax that the 32 rows hold.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from tqdm import tqdm

from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam

KEY_DIM, VALUE_DIM, NEIGHBORS, BATCH = 4, 4, 32, 256
READ_OPTIONS = {"metric": "l2", "temperature": 0.05}


def teacher(points: Tensor) -> Tensor:  # (B, KEY_DIM) -> (B, VALUE_DIM)
    """Compute a nonlinear function with a variance of about a half."""
    waves = torch.linspace(0.5, 2.0, KEY_DIM * VALUE_DIM).view(KEY_DIM, VALUE_DIM)
    return torch.sin(points @ waves + points.roll(1, dims=-1).square() @ waves / 4)


def measure_error(store: SoftKVStore) -> float:
    """Return the unexplained fraction of the teacher's variance, for new queries."""
    points = torch.randn(1024, KEY_DIM)
    with torch.no_grad():
        residual = store.read(points, "topk", k=NEIGHBORS).values - teacher(points)
    return float(residual.square().mean() / teacher(points).var())


def measure_recall(store: SoftKVStore) -> tuple[float, float]:
    """Return the recall of the index against an exact search, and the mass of the exact best rows."""
    points = torch.randn(64, KEY_DIM)
    with torch.no_grad():
        wanted, found = store.read(points, k=NEIGHBORS), store.read(points, "topk", k=NEIGHBORS)
    return float((wanted.ids[:, :, None] == found.ids[:, None, :]).any(-1).float().mean()), float(wanted.mass.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the keys and values of a store.")
    parser.add_argument("--small", action="store_true", help="quick run: 20,000 rows, 120 steps")
    small = parser.parse_args().small
    rows, steps, lists = (20_000, 120, 64) if small else (100_000, 1_500, 1024)
    torch.manual_seed(0)
    index = IndexConfig(f"IVF{lists},Flat", recall=0.97)
    store = SoftKVStore(KEY_DIM, VALUE_DIM, trainable=True, sparse_grad=True, index=index, **READ_OPTIONS)
    store.add(torch.randn(rows, KEY_DIM), 0.1 * torch.randn(rows, VALUE_DIM))
    optimizer = RowAdam([{"params": [store.keys], "lr": 0.003}, {"params": [store.values], "lr": 0.05}])
    first, started = measure_error(store), time.perf_counter()
    print(f"{'step':>6} {'loss':>7} {'recall':>7} {'mass':>6} {'pending':>8}")
    for step in tqdm(range(1, steps + 1), disable=None, leave=False):
        points = torch.randn(BATCH, KEY_DIM)
        output = store.read(points, "topk", k=NEIGHBORS).values
        loss = (output - teacher(points)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 6) == 0:
            pending = store.index_stats().pending
            recall, mass = measure_recall(store)
            tqdm.write(f"{step:6} {loss.item():7.4f} {recall:7.3f} {mass:6.3f} {pending:8}")
    stats = store.index_stats()
    print(f"error for new queries: {first:.3f} of the variance before, {measure_error(store):.3f} after")
    seconds = time.perf_counter() - started
    print(f"{rows:,} rows, {steps} steps in {seconds:.0f} s: {stats.upkeep_seconds:.1f} s upkeep of the index")


if __name__ == "__main__":
    main()
