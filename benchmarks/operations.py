"""Random writes and reads, one after the other, beside a dict: nothing stale, excluded, twice or lost comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, main
from torch import Tensor

from softdb import SoftKVStore

WIDTH, CENTRES, SPREAD = 16, 500, 0.3
ROWS, LISTS = 20_000, 64
OPERATIONS = 1_000_000
WRITES, READS = ("add", "put", "update", "delete"), 0.1
NEIGHBOURS = 8


class Soak:
    """A store with an IVF index, and a dict of what its rows are meant to be."""

    def __init__(self, rows: int, lists: int) -> None:
        torch.manual_seed(0)
        self.chance = random.Random(0)
        self.centres = torch.randn(CENTRES, WIDTH)
        self.store = SoftKVStore(WIDTH, 1, index=f"IVF{lists},Flat")
        self.rows = rows
        self.marks: dict[int, float] = {}  # what each row's value is meant to be
        self.ids: list[int] = []  # the same ids, to choose from
        self.place: dict[int, int] = {}
        self.next_mark, self.done = 0.0, 0
        self.reads = self.wrong = self.wanted = self.found = 0
        self._write(self.store.add(*self._new(rows)).tolist())

    def _new(self, count: int) -> tuple[Tensor, Tensor]:
        keys = self.centres[torch.randint(CENTRES, (count,))] + SPREAD * torch.randn(count, WIDTH)
        marks = self.next_mark + torch.arange(count, dtype=torch.float32)
        self.next_mark = (self.next_mark + count) % 2**23  # whole numbers that float32 tells apart
        self.latest = marks.tolist()
        return keys, marks[:, None]

    def _write(self, ids: list[int]) -> None:
        for number, mark in zip(ids, self.latest, strict=True):
            if number not in self.marks:
                self.place[number] = len(self.ids)
                self.ids.append(number)
            self.marks[number] = mark

    def _forget(self, ids: list[int]) -> None:
        for number in ids:
            del self.marks[number]
            place, last = self.place.pop(number), self.ids.pop()
            if last != number:
                self.ids[place], self.place[last] = last, place

    def _some(self, count: int) -> list[int]:
        return list(dict.fromkeys(self.chance.choices(self.ids, k=count)))

    def operate(self) -> None:
        """One random operation, of one row or a few."""
        self.done += 1
        if self.chance.random() < READS:
            self._read()
            return
        kind, count = self.chance.choice(WRITES), self.chance.choice((1, 1, 1, 5))
        if len(self.ids) < self.rows // 2 or (kind == "delete" and len(self.ids) <= self.rows // 2):
            kind = "add"
        elif kind == "add" and len(self.ids) > 2 * self.rows:
            kind = "delete"
        if kind == "add":
            self._write(self.store.add(*self._new(count)).tolist())
        elif kind == "delete":
            ids = self._some(count)
            self.store.delete(ids)
            self._forget(ids)
        else:
            ids = self._some(count)
            if kind == "put" and self.chance.random() < 0.5:
                ids = [10**9 + self.done * 8 + number for number in range(count)]  # new ones, and large
            keys, values = self._new(len(ids))
            (self.store.put if kind == "put" else self.store.update)(ids, keys, values)
            self._write(ids)

    def _read(self) -> None:
        self.reads += 1
        exclude = torch.tensor([self._some(4)[:1] * 2]) if self.chance.random() < 0.3 else None
        sought = self.chance.choice(self.ids)
        query = self.store.get([sought]).keys
        read = self.store.read(query, "topk", k=NEIGHBOURS, exclude=exclude)
        found, weights = read.ids, read.weights
        if found is None or weights is None:
            raise RuntimeError("a top-k read reports its rows")
        ids = found[0].tolist()
        hidden = set() if exclude is None else set(exclude[0].tolist())
        marks = self.store.get(ids).values[:, 0].tolist() if min(ids) >= 0 else [None] * len(ids)
        blend = float((weights[0] * torch.tensor([self.marks.get(number, torch.nan) for number in ids])).sum())
        self.wrong += len(ids) - len(set(ids))
        self.wrong += sum(number not in self.marks or number in hidden for number in ids)
        self.wrong += sum(self.marks.get(number) != mark for number, mark in zip(ids, marks, strict=True))
        self.wrong += not abs(blend - float(read.values)) <= 1e-4 * max(1.0, abs(blend))
        if self.reads % 20 == 0:
            exact = self.store.read(query, k=NEIGHBOURS, exclude=exclude).ids
            self.wanted += NEIGHBOURS
            self.found += 0 if exact is None else len(set(exact[0].tolist()) & set(ids))

    def facts(self, operations: int) -> dict[str, float]:
        """Operate until there have been ``operations``, and look for every row at the end."""
        while self.done < operations:
            self.operate()
        everything = self.store.get(self.ids).values[:, 0].tolist()
        lost = len(self.store) != len(self.marks)
        lost += sum(self.marks[number] != mark for number, mark in zip(self.ids, everything, strict=True))
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
    """The time is that of one operation."""
    soak = Soak(400 if small else ROWS, 8 if small else LISTS)
    operations = 300 if small else OPERATIONS
    yield Case(
        f"{operations:,} operations on some {soak.rows:,} rows",
        softdb={"add, put, update, delete, read": soak.operate},
        peers={},
        facts=partial(soak.facts, operations),
    )


if __name__ == "__main__":
    main("operations", cases)
