"""Training of the rows of a store: time of a step, and recall of the index."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import Case, Contestant, main
from torch import Tensor

from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam

WIDTH, QUERIES, NEIGHBORS = 64, 256, 32
CENTERS, CLUSTER_STD = 20_000, 0.4
RECALL_TARGET = 0.97
# Large enough that keys move further than the distance to their nearest neighbor within a thousand steps.
LEARNING_RATE = 0.1
STEPS, STEPS_PER_CHECK = 1_000, 50
# Steps per turn, so that each turn includes checks of the recall and rebuilds.
STEPS_PER_TURN = 150


@dataclass(frozen=True)
class Task:
    """Regression of a linear teacher by a store, with clustered queries and keys."""

    centers: Tensor
    teacher: Tensor

    def draw(self, count: int) -> Tensor:
        """Draw points around the centers."""
        centers = self.centers[torch.randint(len(self.centers), (count,))]
        return centers + CLUSTER_STD * torch.randn_like(centers)

    def make_store(self, rows: int, index: IndexConfig) -> SoftKVStore:
        """Make a store of clustered keys and random values, and build its index."""
        store = SoftKVStore(WIDTH, WIDTH, trainable=True, sparse_grad=True, index=index)
        store.add(self.draw(rows), torch.randn(rows, WIDTH))
        store.read(self.draw(QUERIES), "topk", k=NEIGHBORS)
        return store

    def compute_loss(self, store: SoftKVStore, mode: str = "topk") -> Tensor:
        """Compute the squared error of the store's values against the teacher's."""
        query = self.draw(QUERIES)
        read = store.read(query, "topk", k=NEIGHBORS) if mode == "topk" else store.read(query)
        return (read.values - query @ self.teacher).square().sum(-1).mean()


def make_task() -> Task:
    """Make the task, which is the same for every case."""
    torch.manual_seed(0)
    return Task(torch.randn(CENTERS, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5)


def make_step(task: Task, store: SoftKVStore, optimizer: torch.optim.Optimizer, mode: str = "topk") -> Contestant:
    """Make a function that runs a training step."""

    def step() -> None:
        loss = task.compute_loss(store, mode)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def repeat(step: Contestant, times: int) -> Contestant:
    """Make a function that runs several steps."""

    def block() -> None:
        for _ in range(times):
            step()

    return block


def cases(small: bool) -> Iterator[Case]:
    """Yield steps over many rows, a long run, and a read after an update.

    The peers are steps over few rows, and exact reads with dense gradients.
    """
    many, few = (3_000, 500) if small else (1_000_000, 10_000)
    config = IndexConfig("IVF16,Flat" if small else "auto", recall=RECALL_TARGET)
    yield _make_size_case(many, few, config, 3 if small else STEPS_PER_TURN)
    yield _make_dense_case(many, config)
    steps, every = (4, 2) if small else (STEPS, STEPS_PER_CHECK)
    yield _make_recall_case(many, config, steps, every)
    yield _make_pending_case(many, config)


def _make_size_case(many: int, few: int, config: IndexConfig, block: int) -> Case:
    """Make a case that times blocks of steps, to include rare events such as rebuilds."""
    task = make_task()
    steps: dict[int, Contestant] = {}
    for rows in (many, few):
        store = task.make_store(rows, config)
        steps[rows] = make_step(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
        steps[rows]()  # The first step allocates the optimizer's state.
    return Case(
        f"{block} training steps ({QUERIES}, {many:,}), k {NEIGHBORS}",
        softdb={"RowAdam": repeat(steps[many], block)},
        peers={f"{few:,} rows": repeat(steps[few], block)},
        claims={("RowAdam", f"{few:,} rows"): 4.0},
    )


def _make_dense_case(rows: int, config: IndexConfig) -> Case:
    task = make_task()
    store = task.make_store(rows, config)
    step = make_step(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
    other = task.make_store(rows, IndexConfig("Flat"))
    dense = make_step(task, other, torch.optim.Adam(other.parameters(), lr=1e-3, fused=True), "exact")
    return Case(
        f"training step ({QUERIES}, {rows:,})",
        softdb={"topk, RowAdam": step},
        peers={"exact, fused Adam": dense},
        claims={("topk, RowAdam", "exact, fused Adam"): 1 / 40},
    )


def _make_recall_case(rows: int, config: IndexConfig, steps: int, every: int) -> Case:
    """Make a case that measures the recall in one long run.

    Its facts also have the recall of an index over the initial keys that is never updated.
    """
    task = make_task()
    store = task.make_store(rows, config)
    step = make_step(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
    start = store.keys.detach().clone()
    frozen = SoftKVStore(WIDTH, 1, index=config)
    frozen.add(start, torch.zeros(rows, 1))
    frozen.read(task.draw(QUERIES), "topk", k=NEIGHBORS)
    before = store.index_stats()

    def run() -> dict[str, float]:
        own, others, seconds = [], [], 0.0
        for _ in range(steps // every):
            started = time.perf_counter()
            repeat(step, every)()
            seconds += time.perf_counter() - started
            with torch.no_grad():
                query = task.draw(QUERIES)
                wanted = store.read(query, k=NEIGHBORS).ids
                own.append(_compute_recall(wanted, store.read(query, "topk", k=NEIGHBORS).ids))
                others.append(_compute_recall(wanted, frozen.read(query, "topk", k=NEIGHBORS).ids))
        after = store.index_stats()
        upkeep = after.upkeep_seconds + after.rebuild_seconds - before.upkeep_seconds - before.rebuild_seconds
        moved = (store.keys.detach() - start).norm(dim=-1).mean()
        return {
            "steps": steps,
            "lowest recall": min(own),
            "mean recall": sum(own) / len(own),
            "frozen: lowest": min(others),
            "frozen: last": others[-1],
            "moved / nearest": float(moved) / _mean_nearest_distance(start),
            "upkeep share": upkeep / seconds,
            "builds": after.builds - before.builds,
            "nprobe": after.nprobe or 0,
            "ms a step": 1e3 * seconds / steps,
        }

    facts: Callable[[], dict[str, float]] = run
    return Case(f"{every} training steps ({QUERIES}, {rows:,})", {"RowAdam": repeat(step, 1)}, {}, facts=facts)


def _compute_recall(wanted: Tensor | None, found: Tensor | None) -> float:
    """Compute the fraction of the wanted ids that were found."""
    if wanted is None or found is None:
        return 0.0
    return float((wanted[:, :, None] == found[:, None, :]).any(-1).float().mean())


def _mean_nearest_distance(keys: Tensor) -> float:
    """Compute the mean distance of a sample of keys to their nearest neighbors."""
    sample = torch.randperm(len(keys))[:QUERIES]
    nearest = torch.full((len(sample),), torch.inf)
    for start in range(0, len(keys), 2**17):
        distances = torch.cdist(keys[sample], keys[start : start + 2**17])
        inside = (sample >= start) & (sample < start + 2**17)
        distances[inside, sample[inside] - start] = torch.inf
        nearest = torch.minimum(nearest, distances.amin(1))
    return float(nearest.mean())


def _make_pending_case(rows: int, config: IndexConfig) -> Case:
    """Make a case of updated keys, which leave rows pending, and of updated values."""
    task = make_task()
    store = task.make_store(rows, config)

    def read_after(keys: Tensor | None = None, values: Tensor | None = None) -> Contestant:
        def run() -> None:
            store.update(torch.randint(rows, (200,)).unique()[:100], keys, values)
            with torch.no_grad():
                store.read(task.draw(QUERIES), "topk", k=NEIGHBORS)

        return run

    return Case(
        f"100 rows updated, then a read ({QUERIES}, {rows:,})",
        softdb={"their keys": read_after(keys=task.draw(100))},
        peers={"their values": read_after(values=torch.randn(100, WIDTH))},
        claims={("their keys", "their values"): 1.2},
    )


if __name__ == "__main__":
    main("training", cases)
