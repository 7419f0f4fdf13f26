"""Batch dimensions of queries and rows, folded into groups."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["BatchFold"]


class BatchFold:
    """Mapping of batch dimensions to G groups of queries, and back.

    Each group has its own rows. A batch dimension along which keys and values have size 1 is folded into the queries of
    a group, so shared rows are never copied.
    """

    def __init__(self, batch: tuple[int, ...], query_count: int, keys: Tensor, values: Tensor) -> None:
        self.batch, self.query_count = batch, query_count

        def size(table: Tensor, dimension: int) -> int:
            missing = len(batch) - (table.dim() - 2)
            return 1 if dimension < missing else table.shape[dimension - missing]

        dimensions = range(len(batch))
        self.own_dimensions = [i for i in dimensions if size(keys, i) != 1 or size(values, i) != 1]
        self.shared_dimensions = [i for i in dimensions if i not in self.own_dimensions]
        self.groups = math.prod(batch[i] for i in self.own_dimensions)
        self.shared_size = math.prod(batch[i] for i in self.shared_dimensions)

    def fold_queries(self, tensor: Tensor) -> Tensor:  # (*batch, B, x) -> (G S B, x)
        """Fold a tensor of queries into the groups."""
        if not self.batch:
            return tensor
        count = len(self.batch)
        full = tensor.expand(*self.batch, *tensor.shape[-2:])
        full = full.permute(*self.own_dimensions, *self.shared_dimensions, count, count + 1)
        return full.reshape(self.groups * self.shared_size * tensor.shape[-2], tensor.shape[-1])

    def fold_table(self, tensor: Tensor) -> Tensor:  # (*batch, N, x) -> (G N, x)
        """Fold a table of rows into the groups."""
        if not self.batch:
            return tensor
        sizes = [self.batch[i] if i in self.own_dimensions else 1 for i in range(len(self.batch))]
        return tensor.expand(*sizes, *tensor.shape[-2:]).reshape(self.groups * tensor.shape[-2], tensor.shape[-1])

    def fold_mask(self, mask: Tensor) -> Tensor:  # broadcastable to (*batch, B, N) -> to (G, S B, N)
        """Fold a mask into the groups."""
        count = len(self.batch)
        mask = mask.reshape(*[1] * (count + 2 - mask.dim()), *mask.shape)
        sizes = list(mask.shape)
        # Several dimensions are merged into one. If the mask differs along one of them, it is expanded along all.
        if any(sizes[i] != 1 for i in self.own_dimensions):
            for i in self.own_dimensions:
                sizes[i] = self.batch[i]
        if any(sizes[i] != 1 for i in (*self.shared_dimensions, count)):
            sizes[count] = self.query_count
            for i in self.shared_dimensions:
                sizes[i] = self.batch[i]
        groups = math.prod(sizes[i] for i in self.own_dimensions)
        queries = math.prod(sizes[i] for i in (*self.shared_dimensions, count))
        mask = mask.expand(sizes).permute(*self.own_dimensions, *self.shared_dimensions, count, count + 1)
        return mask.reshape(groups, queries, sizes[-1])

    def unfold(self, tensor: Tensor) -> Tensor:  # (G S B, *x) -> (*batch, B, *x)
        """Restore the batch dimensions of a result."""
        if not self.batch:
            return tensor
        rest = tensor.shape[1:]
        order = [*self.own_dimensions, *self.shared_dimensions]
        tensor = tensor.reshape(*[self.batch[i] for i in order], self.query_count, *rest)
        back = [order.index(i) for i in range(len(order))]
        return tensor.permute(*back, *range(len(order), tensor.dim()))
