"""Hold the base index: a FAISS index of the rows as it took them in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss

from softdb.index.faiss_parts import (
    accepts_parameters,
    apply_transforms,
    core_of,
    get_search_width,
    ivf_of,
    make_search_parameters,
    movable_ivf_of,
    parts_of,
    set_search_width,
    to_array,
)
from softdb.index.list_layout import ListLayout
from softdb.index.movement import KeyMovement
from softdb.index.policy import IndexPolicy
from softdb.index.visibility import EntryVisibility
from softdb.table.slots import resized

__all__ = ["Base"]

# Train an IVF base again when it has this many times the rows that its lists were trained for, or when its lists have
# become this many times less even.
OUTGROWN_RATIO, IMBALANCE_RATIO = 4, 2

# Neighbours that a step in a graph visits, about.
GRAPH_DEGREE = 32

# Moves within the tolerance change the order of rows a little: ask for this share of additional rows.
EXTRA_CANDIDATES_SHARE = 0.25

# Make the list layout again when the base has merged this share of its entries since.
LAYOUT_SHARE = 1 / 8


class Base:
    """Search a FAISS index of the rows as it took them in.

    Entry e is the row in slot ``slots[e]``; ``entry_of`` gives the latest entry of a slot, or -1. Entries whose row has
    changed or is gone are hidden. A plain inverted file merges a changed row under its old entry, which moves to
    another list or stays; any other index appends a new entry, and the old one is garbage.

    Args:
        owner: The FAISS index, filled.
        factory: Its factory string.
        slots: (n,) ascending, on the CPU: the slot of each entry.
        rows: (n, d) float32: the vector of each entry.
        capacity: The number of slots.
        copied: Whether to keep copies of the vectors, to compare keys with.
        policy: The thresholds.

    Attributes:
        movement: How far keys have moved since.
        visibility: Which entries are hidden.
        norm_outliers: The slots of the norm outliers, which are hidden here and searched exactly.
        outlier_norm: The norm from which on a row is a norm outlier.
        recall: The measured recall, None before it is measured.
        tuned_queries: The number of recent queries on which it was measured; 0 where queries were made up.
        neighbours: The number of nearest rows of which the recall is the share found.
        recall_checks: How often the recall has been checked on recent queries.
        merged_rows: Rows merged since the recall was tuned.
        checking_share: The share of the entries after whose merging it is tuned again.
        check_after: The number of queries after which it is checked on recent queries.
    """

    def __init__(
        self,
        owner: Any,
        factory: str,
        slots: Tensor,
        rows: Tensor,
        capacity: int,
        *,
        copied: bool,
        policy: IndexPolicy,
    ) -> None:
        self.owner = owner  # what FAISS gives as its parts or other types dies with it
        self.factory = factory
        self.policy = policy
        self.slots = slots  # on the CPU, like `entry_of`
        self.entry_of = torch.full((capacity,), -1, dtype=torch.int64, device="cpu")
        self.entry_of[slots] = torch.arange(len(slots), device="cpu")
        self.movement = KeyMovement(slots, rows, capacity, copied=copied)
        self.visibility = EntryVisibility(len(slots))
        self._can_widen = accepts_parameters(self.index, None, 1)
        self._can_select = isinstance(core_of(self.index), faiss.IndexIVF) and accepts_parameters(
            self.index, self.visibility.selector(), None
        )
        self._in_order = len(slots) == 0 or int(slots[-1]) == len(slots) - 1  # entry e is slot e, since they ascend
        self._layout: ListLayout | None = None
        self._merged_since_layout = 0
        self.trained_rows, self.imbalance = len(slots), self._measure_imbalance()
        self.norm_outliers, self.outlier_norm = slots[:0], math.inf
        self.outlier_count = 0  # as tuned: some may be gone, some may have come
        self.recall: float | None = None
        self.tuned_queries = self.neighbours = self.recall_checks = self.merged_rows = 0
        self.checking_share = policy.checking_shares[0]
        self.check_after = policy.check_after

    @property
    def index(self) -> Any:
        """The FAISS index under its own type."""
        return faiss.downcast_index(self.owner)

    @property
    def entries(self) -> int:
        """The number of entries, hidden ones included."""
        return len(self.slots)

    @property
    def lists(self) -> int:
        """The number of lists that entries move between; 0 where they cannot."""
        ivf = movable_ivf_of(self.index)
        return 0 if ivf is None else int(ivf.nlist)

    @property
    def probes(self) -> int | None:
        """The number of IVF lists that each query visits; None where there are no lists."""
        ivf = ivf_of(self.index)
        return None if ivf is None else int(ivf.nprobe)

    @property
    def visited_list_share(self) -> float:
        """The share of the lists that each query visits; 0 where there are none."""
        ivf = ivf_of(self.index)
        return 0.0 if ivf is None else float(ivf.nprobe / ivf.nlist)

    @property
    def visited_entry_share(self) -> float:
        """The share of the entries that each query visits, about."""
        core = core_of(self.index)
        if isinstance(core, faiss.IndexHNSW):
            return float(min(1.0, core.hnsw.efSearch * GRAPH_DEGREE / max(1, self.entries)))
        return self.visited_list_share or 1.0

    @property
    def is_exact_at_full_width(self) -> bool:
        """Whether a search of all lists finds the best rows.

        Then each additional list brings a search nearer to that. Codes and projections lose something, and a graph has
        rows that no search reaches.
        """
        if not isinstance(core_of(self.index), faiss.IndexIVFFlat):
            return False
        changes = [part for part in parts_of(self.index) if isinstance(part, faiss.VectorTransform)]
        return all(part.d_in == part.d_out and getattr(part, "is_orthonormal", False) for part in changes)

    @property
    def search_width(self) -> tuple[int, int]:
        """The search width and its largest useful value; zeros if it is fixed."""
        return get_search_width(self.index) if self._can_widen else (0, 0)

    def set_search_width(self, width: int) -> None:
        """Set the width of searches that do not choose their own."""
        if self._can_widen:
            set_search_width(self.index, width)

    def is_visible(self, slots: Tensor) -> Tensor:
        """Return which of ``slots`` hold a row that searches may find, (m,) bool."""
        entries = self.entry_of[slots]
        return (entries >= 0) & self.visibility.at(entries.clamp(min=0))

    def search(  # (B, d), (used,) bool -> (B, c)
        self, queries: Any, k: int, allowed: Tensor | None = None, *, search_width: int | None = None
    ) -> Tensor:
        """Find slots of ``k`` or more rows for each query, -1 where fewer were found.

        Some may not be ``allowed``, where FAISS cannot leave them out. The ``search_width`` counts where FAISS can
        choose it.
        """
        index = self.index
        if self.movement.copy is not None:
            k += round(EXTRA_CANDIDATES_SHARE * k)
        selector, hidden = None, self.visibility.hidden > 0
        if hidden or allowed is not None:
            if not self._can_select:
                k *= 2
            elif allowed is None:
                selector, hidden = self.visibility.selector(), False
            else:
                bits = np.packbits((self.visibility.all() & allowed[self.slots]).numpy(), bitorder="little")
                selector, hidden = faiss.IDSelectorBitmap(bits), False
        parameters = None
        if selector is not None or search_width is not None:
            parameters = make_search_parameters(index, selector, search_width)
        entries = torch.from_numpy(index.search(queries, min(k, self.entries), params=parameters)[1])
        if self._in_order and not hidden:
            return entries
        places = entries.clamp(min=0)
        missing = entries < 0
        if hidden:
            missing |= ~self.visibility.at(places)
        return self.slots[places].masked_fill_(missing, -1)

    def hide(self, slots: Tensor) -> None:
        """Hide ``slots`` from searches."""
        entries = self.entry_of[slots]
        self.visibility.hide(entries[entries >= 0])

    def merge(self, slots: Tensor, rows: Tensor) -> None:  # (m,) ascending, on the CPU; (m, d) finite
        """Merge rows as they are now, and show them to searches."""
        if len(slots) == 0:
            return
        self.merged_rows += len(slots)
        self._merged_since_layout += len(slots)
        entries = self.entry_of[slots]
        known = (entries >= 0) & bool(self.lists)
        if bool(known.all()):
            self._move(entries, slots, rows)
        else:
            if bool(known.any()):
                self._move(entries[known], slots[known], rows[known.to(rows.device)])
            self._append(slots[~known], rows[~known.to(rows.device)])
        self.movement.record_rows(slots, rows)

    def _move(self, entries: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Move entries of an inverted file to the lists of their rows."""
        ivf, vectors = movable_ivf_of(self.index), apply_transforms(self.index, to_array(rows))
        lists, far = self.lists_of(entries), self.movement.needs_new_list(slots, rows)
        if bool(far.any()):
            lists[far.numpy()] = ivf.quantizer.search(vectors[far.numpy()], 1)[1].ravel()
        codes = np.empty((len(vectors), ivf.code_size), dtype=np.uint8)
        numbers = entries.numpy()
        ivf.encode_vectors(len(vectors), *map(faiss.swig_ptr, (vectors, lists, codes)))
        ivf.direct_map.update_codes(ivf.invlists, len(vectors), *map(faiss.swig_ptr, (numbers, lists, codes)))
        self.visibility.show(entries)

    def _append(self, slots: Tensor, rows: Tensor) -> None:
        first = self.entries
        self.owner.add(to_array(rows))
        self.hide(slots)
        self.entry_of[slots] = torch.arange(first, first + len(slots), device="cpu")
        self._in_order &= int(slots[0]) == first and int(slots[-1]) == first + len(slots) - 1
        self.slots = torch.cat([self.slots, slots])
        self.visibility.extend(len(slots))
        self.movement.record_new_lists(slots)

    def lists_of(self, entries: Tensor) -> Any:
        """Return the IVF lists of entries, as an int64 array."""
        ivf = movable_ivf_of(self.index)
        return faiss.rev_swig_ptr(ivf.direct_map.array.data(), ivf.ntotal)[entries.numpy()] >> 32

    def list_layout(self, keys: Tensor, size: int) -> ListLayout | None:
        """Return a recent layout of the slots below ``size``; None without lists."""
        if not self.lists:
            return None
        if self._layout is None or self._merged_since_layout > LAYOUT_SHARE * self.entries:
            lists = torch.full((size,), self.lists, dtype=torch.int64, device="cpu")  # rows in no list come last
            listed = (self.entry_of[:size] >= 0).nonzero().squeeze(-1)
            lists[listed] = torch.from_numpy(self.lists_of(self.entry_of[listed]))
            self._layout = ListLayout.from_lists(lists, self.lists, keys)
            self._merged_since_layout = 0
        return self._layout

    def resize(self, capacity: int) -> None:
        """Make room for more slots."""
        if capacity > len(self.entry_of):
            self.entry_of = resized(self.entry_of, capacity, fill=-1)
            self.movement.resize(capacity)

    def _measure_imbalance(self) -> float:
        """Measure how uneven the lists are: 1 if all are as long."""
        ivf = movable_ivf_of(self.index)
        return 1.0 if ivf is None else float(ivf.invlists.imbalance_factor())

    def inherit_lists(self, old: Base) -> None:
        """Take over the statistics of the lists that were trained for ``old``."""
        self.trained_rows, self.imbalance = old.trained_rows, old.imbalance

    def has_outgrown_lists(self, rows: int) -> bool:
        """Test whether newly trained lists would serve ``rows`` rows better."""
        if ivf_of(self.index) is None:
            return False
        outgrown = rows > OUTGROWN_RATIO * self.trained_rows
        return outgrown or self._measure_imbalance() > IMBALANCE_RATIO * self.imbalance
