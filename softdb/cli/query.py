"""The command ``softdb query``: the best rows of a saved store for each query."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_positive
from softdb.errors import DtypeError
from softdb.lab.tables import format_table
from softdb.store import SoftKVStore

__all__ = ["find_best_rows", "format_json", "format_rows"]


QUERIES_PER_READ = 512


@torch.no_grad()
def find_best_rows(store: SoftKVStore, queries: Tensor, k: int) -> list[list[dict[str, Any]]]:
    """Find the k rows with the highest scores for each query, by exact reads.

    Args:
        store: The store.
        queries: (B, key_dim), floating point.
        k: Number of rows for each query.

    Returns:
        For each query, a list of at most k rows, best first. Each row is a dictionary with "id", "weight" (in the
        softmax over all rows) and "fields".
    """
    k = check_positive("k", k)
    found: list[list[dict[str, Any]]] = []
    for batch in queries.split(QUERIES_PER_READ):
        read = store.read(batch, k=k)
        if read.ids is None or read.weights is None:
            raise DtypeError("store: expected read(query, k=...) to report ids and weights, got none")
        known = read.ids >= 0
        ids, places = read.ids[known].unique(return_inverse=True)
        fields = {name: column[places].tolist() for name, column in store.get(ids).fields.items()}
        weights = read.weights[known].tolist()
        rows = [
            {"id": id, "weight": weight, "fields": {name: column[place] for name, column in fields.items()}}
            for place, (id, weight) in enumerate(zip(read.ids[known].tolist(), weights, strict=True))
        ]
        remaining = iter(rows)
        found += [list(itertools.islice(remaining, count)) for count in known.sum(-1).tolist()]
    return found


def format_rows(found: list[list[dict[str, Any]]], fields: tuple[str, ...]) -> str:
    """Format rows as a table with one line for each."""
    cells = [
        [str(number), str(row["id"]), f"{row['weight']:.4g}", *(str(row["fields"][name]) for name in fields)]
        for number, rows in enumerate(found)
        for row in rows
    ]
    return format_table(["query", "id", "weight", *fields], cells)


def format_json(found: list[list[dict[str, Any]]]) -> str:
    """Format rows as a JSON array with one object for each query."""
    return json.dumps([{"query": number, "rows": rows} for number, rows in enumerate(found)], indent=2, allow_nan=False)
