"""Race of many readers with one writer: briefly in the tests, longer in ``scripts/faults``."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softdb import IndexConfig, SoftKVStore
from softdb.optim import RowAdam
from support.faults import Report

WIDTH = 8


def run_together(functions: list[Callable[[], object]]) -> None:
    """Run each function in its own thread; raise the first exception of any."""
    failures: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


class Version(NamedTuple):
    """Rows of one version of the store."""

    ids: Tensor
    keys: Tensor
    values: Tensor


class Answer(NamedTuple):
    """Result of a read, with the versions of the store before and after it."""

    mode: str
    query: Tensor
    ids: Tensor
    values: Tensor
    first: int
    last: int

    def fits(self, version: Version) -> bool:
        """Return whether the result is right for these rows, in float64.

        For top-k and hard reads, the values are compared for the reported rows.
        """
        scores = self.query.double() @ version.keys.T / WIDTH**0.5
        if self.mode != "exact":
            place = {number: column for column, number in enumerate(version.ids.tolist())}
            if any(number not in place for number in self.ids.flatten().tolist() if number >= 0):
                return False
            columns = torch.tensor([[place.get(number, -1) for number in row] for row in self.ids.tolist()])
            chosen = torch.full_like(scores, -torch.inf)
            for row, found in enumerate(columns):
                chosen[row, found[found >= 0]] = scores[row, found[found >= 0]]
            if self.mode == "hard" and not torch.allclose(chosen.amax(-1), scores.amax(-1), atol=1e-5):
                return False
            scores = chosen
        return torch.allclose(scores.softmax(-1) @ version.values, self.values.double(), atol=1e-4)


def race(
    report: Report, folder: object, *, seconds: float, readers: int = 4, factory: str = "IVF16,Flat", **options: Any
) -> None:
    """Run readers and a writer; check that each answer is right for one version of the store."""
    config = IndexConfig(factory, recall=0.5, **options)
    store = SoftKVStore(WIDTH, 2, trainable=True, sparse_grad=True, index=config)
    optimizer = RowAdam(store.parameters(), lr=0.05)
    history: dict[int, Version] = {}
    answers: list[Answer] = []
    stop = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)

    def random_rows(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, WIDTH, generator=generator), torch.randn(count, 2, generator=generator)

    def step() -> None:
        store.read(random_rows(4)[0], "topk", k=3).values.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def random_ids(count: int) -> Tensor:
        ids = store.ids
        return ids[torch.randperm(len(ids), generator=generator)[:count]]

    writes: list[Callable[[], object]] = [
        lambda: store.add(*random_rows(20)),
        lambda: store.add(*random_rows(1)),
        lambda: store.delete(random_ids(25 if len(store) > 150 else 1)),
        lambda: store.update(random_ids(len(store)), values=random_rows(len(store))[1]),
        lambda: store.update(random_ids(60), *random_rows(60)),
        lambda: store.put(torch.cat([random_ids(5), store.ids.max() + torch.arange(1, 6)]), *random_rows(10)),
        lambda: store.revive(random_ids(5), *random_rows(5)),
        step,
        store.refresh,
        store.build_index,
        store.compact,
    ]
    chance = random.Random(0)

    def record_version() -> None:
        rows = store.get(store.ids)
        history[store.rows.version] = Version(store.ids, rows.keys.double(), rows.values.double())

    def write() -> None:
        while time.monotonic() < stop:
            with store.writing():
                write_one = writes[chance.randrange(len(writes))]
                if len(store) > 600:
                    store.delete(random_ids(200))
                write_one()
                record_version()
            time.sleep(0.001 * chance.random())

    def read(number: int) -> None:
        own = torch.Generator().manual_seed(number)
        for mode in itertools.cycle(("exact", "topk", "hard")):
            if time.monotonic() > stop:
                return
            query = torch.randn(3, WIDTH, generator=own)
            first = store.rows.version
            with torch.no_grad():
                found = store.read(query, mode, k=None if mode == "hard" else 4)  # type: ignore[arg-type]
            assert found.ids is not None
            answers.append(Answer(mode, query, found.ids, found.values, first, store.rows.version))

    store.add(*random_rows(300))
    record_version()
    run_together([write, *(lambda number=number: read(number) for number in range(readers))])  # type: ignore[misc]
    report.check(len(history) > 20 and len(answers) > 100, f"{len(history)} versions, {len(answers)} answers")
    for answer in answers:
        # The version that a reader saw may have been recorded long before the read.
        oldest = max((version for version in history if version <= answer.first), default=0)
        possible = [history[version] for version in history if oldest <= version <= answer.last]
        right = any(answer.fits(version) for version in possible)
        report.note(
            "right" if right else "matches no version", ["right"], f"{answer.mode}, {answer.first} to {answer.last}"
        )
