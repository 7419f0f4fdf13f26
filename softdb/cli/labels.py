"""Accuracy of reads by the labels of rows and queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softdb import lab
from softdb.errors import ArgumentError
from softdb.store import SoftKVStore

__all__ = ["compare_labels"]


MAX_ONE_HOT_ENTRIES = 2**28  # rows times labels: 1 GiB in float32


def compare_labels(
    store: SoftKVStore, queries: Tensor, labels: Sequence[str], query_labels: Sequence[str], **options: Any
) -> lab.Comparison:
    """Compare reads as `softdb.lab.compare` does, with accuracy by labels.

    The answer to a query is the label with the highest total weight. It is correct if it equals the label of the query.
    To sum the weights by label, a second store with the same keys and with one-hot labels as values is read.

    Args:
        store: The store.
        queries: (B, key_dim).
        labels: One for each row, in the order of ``store.ids``.
        query_labels: One for each query.
        options: Further arguments of `softdb.lab.compare`, without ``targets``, ``metric`` and ``generator``.
    """
    numbers = {label: number for number, label in enumerate(dict.fromkeys([*labels, *query_labels]))}
    ids = store.ids
    if len(ids) * len(numbers) > MAX_ONE_HOT_ENTRIES:
        most = MAX_ONE_HOT_ENTRIES // len(ids)
        raise ArgumentError(
            f"--labels: expected at most {most:,} different labels of {len(ids):,} rows, to compute the accuracy, got "
            f"{len(numbers):,}; remove --query-labels"
        )
    keys = store.get(ids).keys
    classes = SoftKVStore(
        store.key_dim,
        max(2, len(numbers)),
        metric=store.metric,
        temperature=store.temperature,
        device="cpu",
        dtype=keys.dtype,
    )
    row_classes = torch.tensor([numbers[label] for label in labels], dtype=torch.int64, device="cpu")
    values = torch.zeros(len(ids), classes.value_dim, dtype=keys.dtype, device="cpu")
    classes.add(keys, values.scatter_(1, row_classes.unsqueeze(1), 1.0), ids=ids)
    targets = torch.tensor([numbers[label] for label in query_labels], dtype=torch.int64, device="cpu")
    seed = torch.initial_seed()  # the same for both stores, so that "gumbel" draws the same rows

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    found = lab.compare(store, queries, generator=generator(), **options)
    accuracies = lab.compare(classes, queries, targets=targets, generator=generator(), **options).settings
    settings = tuple(
        dataclasses.replace(setting, metric=other.metric)
        for setting, other in zip(found.settings, accuracies, strict=True)
    )
    return lab.Comparison(settings, "accuracy", found.queries)
