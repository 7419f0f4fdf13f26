"""Random writes and reads of a store, checked against a dict.

A read that returns a stale, deleted, excluded or duplicate row counts as wrong, and a row that is missing at the end
counts as lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, CENTERS, CLUSTER_STD = 16, 500, 0.3
ROWS, LISTS = 20_000, 64
OPERATIONS = 1_000_000
WRITE_METHODS, READ_PROBABILITY = ("add", "put", "update", "delete"), 0.1
NEIGHBORS = 8


class SoakTest:
    """Store with an IVF index, and a dict of the expected values of its rows."""

    def __init__(self, rows: int, lists: int) -> None:
        torch.manual_seed(0)
        self.random = random.Random(0)
        self.centers = torch.randn(CENTERS, WIDTH)
        self.store = SoftKVStore(WIDTH, 1, index=f"IVF{lists},Flat")
        self.rows = rows
        self.expected: dict[int, float] = {}  # Expected value of each row, by id.
        self.ids: list[int] = []  # The keys of `expected`, as a list to choose from.
        self.positions: dict[int, int] = {}  # Position of each id in `ids`.
        self.next_value, self.done = 0.0, 0
        self.reads = self.wrong = self.wanted = self.found = 0
        self._record(self.store.add(*self._draw_rows(rows)).tolist())

    def _draw_rows(self, count: int) -> tuple[Tensor, Tensor]:
        keys = self.centers[torch.randint(CENTERS, (count,))] + CLUSTER_STD * torch.randn(count, WIDTH)
        values = self.next_value + torch.arange(count, dtype=torch.float32)
        self.next_value = (self.next_value + count) % 2**23  # float32 represents these integers exactly.
        self.last_values = values.tolist()
        return keys, values[:, None]

    def _record(self, ids: list[int]) -> None:
        for number, value in zip(ids, self.last_values, strict=True):
            if number not in self.expected:
                self.positions[number] = len(self.ids)
                self.ids.append(number)
            self.expected[number] = value

    def _forget(self, ids: list[int]) -> None:
        for number in ids:
            del self.expected[number]
            position, last = self.positions.pop(number), self.ids.pop()
            if last != number:
                self.ids[position], self.positions[last] = last, position

    def _choose_ids(self, count: int) -> list[int]:
        return list(dict.fromkeys(self.random.choices(self.ids, k=count)))

    def run_operation(self) -> None:
        """Run one random operation on one or several rows."""
        self.done += 1
        if self.random.random() < READ_PROBABILITY:
            self._read()
            return
        method, count = self.random.choice(WRITE_METHODS), self.random.choice((1, 1, 1, 5))
        if len(self.ids) < self.rows // 2 or (method == "delete" and len(self.ids) <= self.rows // 2):
            method = "add"
        elif method == "add" and len(self.ids) > 2 * self.rows:
            method = "delete"
        if method == "add":
            self._record(self.store.add(*self._draw_rows(count)).tolist())
        elif method == "delete":
            ids = self._choose_ids(count)
            self.store.delete(ids)
            self._forget(ids)
        else:
            ids = self._choose_ids(count)
            if method == "put" and self.random.random() < 0.5:
                ids = [10**9 + self.done * 8 + number for number in range(count)]  # New, large ids.
            keys, values = self._draw_rows(len(ids))
            (self.store.put if method == "put" else self.store.update)(ids, keys, values)
            self._record(ids)

    def _read(self) -> None:
        self.reads += 1
        exclude = torch.tensor([self._choose_ids(4)[:1] * 2]) if self.random.random() < 0.3 else None
        target = self.random.choice(self.ids)
        query = self.store.get([target]).keys
        read = self.store.read(query, "topk", k=NEIGHBORS, exclude=exclude)
        if read.ids is None or read.weights is None:
            raise RuntimeError("a top-k read reports its rows")
        ids, weights = read.ids[0].tolist(), read.weights[0]
        excluded = set() if exclude is None else set(exclude[0].tolist())
        stored = self.store.get(ids).values[:, 0].tolist() if min(ids) >= 0 else [None] * len(ids)
        blend = float((weights * torch.tensor([self.expected.get(number, torch.nan) for number in ids])).sum())
        self.wrong += len(ids) - len(set(ids))
        self.wrong += sum(number not in self.expected or number in excluded for number in ids)
        self.wrong += sum(self.expected.get(number) != value for number, value in zip(ids, stored, strict=True))
        self.wrong += not abs(blend - float(read.values)) <= 1e-4 * max(1.0, abs(blend))
        if self.reads % 20 == 0:
            exact = self.store.read(query, k=NEIGHBORS, exclude=exclude).ids
            self.wanted += NEIGHBORS
            self.found += 0 if exact is None else len(set(exact[0].tolist()) & set(ids))

    def facts(self, operations: int) -> dict[str, float]:
        """Run the remaining of ``operations``, then check every row."""
        while self.done < operations:
            self.run_operation()
        stored = self.store.get(self.ids).values[:, 0].tolist()
        lost = len(self.store) != len(self.expected)
        lost += sum(self.expected[number] != value for number, value in zip(self.ids, stored, strict=True))
        stats = self.store.index_stats()
        return {
            "operations": self.done,
            "reads": self.reads,
            "wrong": self.wrong,
            "lost": lost,
            "recall": self.found / max(1, self.wanted),
            "builds": stats.builds,
        }


def cases(small: bool) -> Iterator[Case]:
    """Yield one case, whose time is that of one operation."""
    test = SoakTest(400 if small else ROWS, 8 if small else LISTS)
    operations = 300 if small else OPERATIONS
    yield Case(
        f"{operations:,} operations on some {test.rows:,} rows",
        softdb={"add, put, update, delete, read": test.run_operation},
        peers={},
        facts=partial(test.facts, operations),
    )


if __name__ == "__main__":
    main("operations", cases)
