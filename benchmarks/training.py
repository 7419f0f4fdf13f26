"""Training the rows of a store: what a step costs at a million rows, and how well the index keeps up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import Case, Contestant, main
from torch import Tensor

from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam

WIDTH, QUERIES, NEIGHBOURS = 64, 256, 32
CENTRES, SPREAD = 20_000, 0.4
RECALL = 0.97
# Large enough that within a thousand steps keys come further than to their nearest neighbour.
LEARNING_RATE = 0.1
STEPS, CHECKED_EVERY = 1_000, 50
BLOCK = 150  # steps a turn, so that recall checks and rebuilds come in each


@dataclass(frozen=True)
class Task:
    """A linear teacher over clustered queries, answered by rows about the same clusters."""

    centres: Tensor
    teacher: Tensor

    def near(self, count: int) -> Tensor:
        """Points about the centres."""
        chosen = self.centres[torch.randint(len(self.centres), (count,))]
        return chosen + SPREAD * torch.randn_like(chosen)

    def store(self, rows: int, index: IndexConfig) -> SoftKVStore:
        """Rows about the centres, with random values; its index is built."""
        store = SoftKVStore(WIDTH, WIDTH, trainable=True, index=index)
        store.add(self.near(rows), torch.randn(rows, WIDTH))
        store.read(self.near(QUERIES), "topk", k=NEIGHBOURS)
        return store

    def loss(self, store: SoftKVStore, mode: str = "topk") -> Tensor:
        """How far the store's answers are from the teacher's."""
        query = self.near(QUERIES)
        answer = store.read(query, "topk", k=NEIGHBOURS) if mode == "topk" else store.read(query)
        return (answer.values - query @ self.teacher).square().sum(-1).mean()


def make_task() -> Task:
    """The same for every case."""
    torch.manual_seed(0)
    return Task(torch.randn(CENTRES, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5)


def step_of(task: Task, store: SoftKVStore, optimizer: torch.optim.Optimizer, mode: str = "topk") -> Contestant:
    """A training step."""

    def step() -> None:
        loss = task.loss(store, mode)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def repeated(step: Contestant, times: int) -> Contestant:
    """Several steps."""

    def block() -> None:
        for _ in range(times):
            step()

    return block


def cases(small: bool) -> Iterator[Case]:
    """A step at many rows beside few, and beside the dense way; a long run; a read after an update."""
    many, few = (3_000, 500) if small else (1_000_000, 10_000)
    config = IndexConfig("IVF16,Flat" if small else "auto", recall=RECALL)
    yield _growing(many, few, config, 3 if small else BLOCK)
    yield _dense(many, config)
    steps, every = (6, 2) if small else (STEPS, CHECKED_EVERY)
    yield _following(many, config, steps, every)
    yield _pending(many, config)


def _growing(many: int, few: int, config: IndexConfig, block: int) -> Case:
    """Blocks of steps, so that what comes once in a hundred steps is part of it."""
    task = make_task()
    steps: dict[int, Contestant] = {}
    for rows in (many, few):
        store = task.store(rows, config)
        steps[rows] = step_of(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
        steps[rows]()  # makes the optimiser's state
    return Case(
        f"{block} training steps ({QUERIES}, {many:,}), k {NEIGHBOURS}",
        softdb={"RowAdam": repeated(steps[many], block)},
        peers={f"{few:,} rows": repeated(steps[few], block)},
        claims={("RowAdam", f"{few:,} rows"): 4.0},
    )


def _dense(rows: int, config: IndexConfig) -> Case:
    task = make_task()
    store = task.store(rows, config)
    step = step_of(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
    other = task.store(rows, IndexConfig("Flat"))
    dense = step_of(task, other, torch.optim.Adam(other.parameters(), lr=1e-3, fused=True), "exact")
    return Case(
        f"training step ({QUERIES}, {rows:,})",
        softdb={"topk, RowAdam": step},
        peers={"exact, fused Adam": dense},
        claims={("topk, RowAdam", "exact, fused Adam"): 1 / 40},
    )


def _following(rows: int, config: IndexConfig, steps: int, every: int) -> Case:
    """The facts are of one run; an index that is built once and left alone goes beside it."""
    task = make_task()
    store = task.store(rows, config)
    step = step_of(task, store, RowAdam(store.parameters(), lr=LEARNING_RATE))
    start = store.keys.detach().clone()
    frozen = SoftKVStore(WIDTH, 1, index=config)
    frozen.add(start, torch.zeros(rows, 1))
    frozen.read(task.near(QUERIES), "topk", k=NEIGHBOURS)
    before = store.index_stats()

    def run() -> dict[str, float]:
        own, others, seconds = [], [], 0.0
        for _ in range(steps // every):
            started = time.perf_counter()
            repeated(step, every)()
            seconds += time.perf_counter() - started
            with torch.no_grad():
                query = task.near(QUERIES)
                wanted = store.read(query, k=NEIGHBOURS).ids
                own.append(_share(wanted, store.read(query, "topk", k=NEIGHBOURS).ids))
                others.append(_share(wanted, frozen.read(query, "topk", k=NEIGHBOURS).ids))
        after = store.index_stats()
        upkeep = after.upkeep_seconds + after.rebuild_seconds - before.upkeep_seconds - before.rebuild_seconds
        moved = (store.keys.detach() - start).norm(dim=-1).mean()
        return {
            "steps": steps,
            "lowest recall": min(own),
            "mean recall": sum(own) / len(own),
            "frozen: lowest": min(others),
            "frozen: last": others[-1],
            "moved / nearest": float(moved) / _nearest(start),
            "upkeep share": upkeep / seconds,
            "builds": after.builds - before.builds,
            "nprobe": after.nprobe or 0,
            "ms a step": 1e3 * seconds / steps,
        }

    facts: Callable[[], dict[str, float]] = run
    return Case(f"{every} training steps ({QUERIES}, {rows:,})", {"RowAdam": repeated(step, 1)}, {}, facts=facts)


def _share(wanted: Tensor | None, found: Tensor | None) -> float:
    """How many of the wanted ids were found."""
    if wanted is None or found is None:
        return 0.0
    return float((wanted[:, :, None] == found[:, None, :]).any(-1).float().mean())


def _nearest(keys: Tensor) -> float:
    """The mean distance from a key to the nearest other one, over a sample."""
    sample = torch.randperm(len(keys))[:QUERIES]
    nearest = torch.full((len(sample),), torch.inf)
    for start in range(0, len(keys), 2**17):
        distances = torch.cdist(keys[sample], keys[start : start + 2**17])
        inside = (sample >= start) & (sample < start + 2**17)
        distances[inside, sample[inside] - start] = torch.inf
        nearest = torch.minimum(nearest, distances.amin(1))
    return float(nearest.mean())


def _pending(rows: int, config: IndexConfig) -> Case:
    """An update of keys leaves rows pending, one of values does not; the rest is the same."""
    task = make_task()
    store = task.store(rows, config)

    def read_after(keys: Tensor | None = None, values: Tensor | None = None) -> Contestant:
        def run() -> None:
            store.update(torch.randint(rows, (200,)).unique()[:100], keys, values)
            with torch.no_grad():
                store.read(task.near(QUERIES), "topk", k=NEIGHBOURS)

        return run

    return Case(
        f"100 rows updated, then a read ({QUERIES}, {rows:,})",
        softdb={"their keys": read_after(keys=task.near(100))},
        peers={"their values": read_after(values=torch.randn(100, WIDTH))},
        claims={("their keys", "their values"): 1.2},
    )


if __name__ == "__main__":
    main("training", cases)
