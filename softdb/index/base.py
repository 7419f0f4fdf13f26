"""Manage the base index: a FAISS index of merged rows."""

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
    find_ivf,
    find_movable_ivf,
    get_core_index,
    get_search_width,
    iterate_parts,
    make_search_parameters,
    set_search_width,
    to_array,
)
from softdb.index.list_layout import ListLayout
from softdb.index.movement import KeyMovement
from softdb.index.policy import IndexPolicy
from softdb.index.visibility import EntryVisibility
from softdb.table.slots import resize

__all__ = ["Base"]

# Train the lists of an IVF index again when, since the last training, the number of rows has grown by the first ratio,
# or the imbalance of the lists by the second ratio.
OUTGROWN_RATIO, IMBALANCE_RATIO = 4, 2

# Approximate number of neighbors that one step of a graph search visits.
GRAPH_DEGREE = 32

# Fraction of additional candidates to search, since moves of keys within the tolerance may change the order of rows.
EXTRA_CANDIDATES_FRACTION = 0.25

# Compute the list layout again when more than this fraction of the entries has been merged since.
LAYOUT_FRACTION = 1 / 8


class Base:
    """FAISS index of merged rows.

    Entry e of the FAISS index is the row in slot ``slots[e]``; ``entry_of`` is the latest entry of a slot, or -1.
    Entries of changed and deleted rows are hidden. If the FAISS index is an IVF index whose entries can move (see
    `find_movable_ivf`), merging a changed row updates its entry, and moves the entry to another list if necessary. In
    any other index, a new entry is appended, and the old one is garbage.

    Args:
        owner: Filled FAISS index.
        factory: FAISS factory string.
        slots: Slot of each entry, (n,), ascending, on the CPU.
        rows: Vector of each entry, (n, d) float32.
        capacity: Number of slots.
        copied: Whether to keep copies of the vectors, with which keys are compared.
        policy: Thresholds of the index.

    Attributes:
        movement: Movement of the keys since their rows were merged.
        visibility: Visibility of the entries.
        norm_outliers: Slots of the norm outliers, which are hidden here and searched exactly.
        outlier_norm: Minimum norm of a norm outlier.
        recall: Measured recall, or None before it is measured.
        tuned_queries: Number of recent queries on which the recall was measured; 0 for generated queries.
        neighbors: Number of nearest rows k for which the recall was measured.
        recall_checks: Number of times that the recall was checked on recent queries.
        merged_rows: Number of rows merged since the base index was tuned.
        tuning_fraction: Tune the base index again when the merged rows exceed this fraction of the entries.
        check_after: Number of queries after which the recall is checked on recent queries.
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
        self.owner = owner  # keeps FAISS parts and downcasts of it alive
        self.factory = factory
        self.policy = policy
        self.slots = slots  # on the CPU, as is `entry_of`
        self.entry_of = torch.full((capacity,), -1, dtype=torch.int64, device="cpu")
        self.entry_of[slots] = torch.arange(len(slots), device="cpu")
        self.movement = KeyMovement(slots, rows, capacity, copied=copied)
        self.visibility = EntryVisibility(len(slots))
        self._can_widen = accepts_parameters(self.index, None, 1)
        self._can_select = isinstance(get_core_index(self.index), faiss.IndexIVF) and accepts_parameters(
            self.index, self.visibility.selector(), None
        )
        self._in_order = len(slots) == 0 or int(slots[-1]) == len(slots) - 1  # entry e is slot e, since slots ascend
        self._layout: ListLayout | None = None
        self._merged_since_layout = 0
        self.trained_rows, self.imbalance = len(slots), self._measure_imbalance()
        self.norm_outliers, self.outlier_norm = slots[:0], math.inf
        self.outlier_count = 0  # number at the last tuning; rows may have changed since
        self.recall: float | None = None
        self.tuned_queries = self.neighbors = self.recall_checks = self.merged_rows = 0
        self.tuning_fraction = policy.tuning_fractions[0]
        self.check_after = policy.check_after

    @property
    def index(self) -> Any:
        """The FAISS index under its own type."""
        return faiss.downcast_index(self.owner)

    @property
    def entries(self) -> int:
        """Number of entries, including hidden ones."""
        return len(self.slots)

    @property
    def lists(self) -> int:
        """Number of lists between which entries can move; 0 if they cannot."""
        ivf = find_movable_ivf(self.index)
        return 0 if ivf is None else int(ivf.nlist)

    @property
    def probes(self) -> int | None:
        """Number of IVF lists that each query visits; None without lists."""
        ivf = find_ivf(self.index)
        return None if ivf is None else int(ivf.nprobe)

    @property
    def visited_list_fraction(self) -> float:
        """Fraction of the lists that each query visits; 0 without lists."""
        ivf = find_ivf(self.index)
        return 0.0 if ivf is None else float(ivf.nprobe / ivf.nlist)

    @property
    def visited_entry_fraction(self) -> float:
        """Approximate fraction of the entries that each query visits."""
        core = get_core_index(self.index)
        if isinstance(core, faiss.IndexHNSW):
            return float(min(1.0, core.hnsw.efSearch * GRAPH_DEGREE / max(1, self.entries)))
        return self.visited_list_fraction or 1.0

    @property
    def is_exact_at_full_width(self) -> bool:
        """Whether a search of all lists finds the k best rows.

        If so, each additional list raises the recall. It is False for quantized or projected vectors, which lose
        information, and for graphs, in which some rows may not be reachable.
        """
        if not isinstance(get_core_index(self.index), faiss.IndexIVFFlat):
            return False
        transforms = [part for part in iterate_parts(self.index) if isinstance(part, faiss.VectorTransform)]
        return all(part.d_in == part.d_out and getattr(part, "is_orthonormal", False) for part in transforms)

    @property
    def search_width(self) -> tuple[int, int]:
        """Search width and its largest useful value; zeros if it is fixed."""
        return get_search_width(self.index) if self._can_widen else (0, 0)

    def set_search_width(self, width: int) -> None:
        """Set the default search width."""
        if self._can_widen:
            set_search_width(self.index, width)

    def is_visible(self, slots: Tensor) -> Tensor:
        """Return which ``slots`` have a visible entry, (m,) bool."""
        entries = self.entry_of[slots]
        return (entries >= 0) & self.visibility.at(entries.clamp(min=0))

    def search(  # (B, d), (used,) bool -> (B, c)
        self, queries: Any, k: int, allowed: Tensor | None = None, *, search_width: int | None = None
    ) -> Tensor:
        """Find ``k`` or more rows for each query.

        If the FAISS index does not support selectors, some of the rows may not be ``allowed``. ``search_width`` is
        ignored if the FAISS index does not support it.

        Returns:
            Slots of the rows, -1 where fewer were found.
        """
        index = self.index
        if self.movement.copy is not None:
            k += round(EXTRA_CANDIDATES_FRACTION * k)
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
        clamped = entries.clamp(min=0)
        missing = entries < 0
        if hidden:
            missing |= ~self.visibility.at(clamped)
        return self.slots[clamped].masked_fill_(missing, -1)

    def hide(self, slots: Tensor) -> None:
        """Hide the entries of ``slots`` from searches."""
        entries = self.entry_of[slots]
        self.visibility.hide(entries[entries >= 0])

    def merge(self, slots: Tensor, rows: Tensor) -> None:  # (m,) ascending, on the CPU; (m, d) finite
        """Merge the present rows, and make them visible to searches."""
        if len(slots) == 0:
            return
        self.merged_rows += len(slots)
        self._merged_since_layout += len(slots)
        entries = self.entry_of[slots]
        is_known = (entries >= 0) & bool(self.lists)
        if bool(is_known.all()):
            self._move(entries, slots, rows)
        else:
            if bool(is_known.any()):
                self._move(entries[is_known], slots[is_known], rows[is_known.to(rows.device)])
            self._append(slots[~is_known], rows[~is_known.to(rows.device)])
        self.movement.record_rows(slots, rows)

    def _move(self, entries: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Update entries of an IVF index, and move them to the lists of their rows."""
        ivf, vectors = find_movable_ivf(self.index), apply_transforms(self.index, to_array(rows))
        lists, far = self.get_lists(entries), self.movement.needs_new_list(slots, rows)
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

    def get_lists(self, entries: Tensor) -> Any:
        """Return the list numbers of entries, as an int64 array."""
        ivf = find_movable_ivf(self.index)
        return faiss.rev_swig_ptr(ivf.direct_map.array.data(), ivf.ntotal)[entries.numpy()] >> 32

    def list_layout(self, keys: Tensor, size: int) -> ListLayout | None:
        """Return a recent layout of the slots below ``size``; None without lists."""
        if not self.lists:
            return None
        if self._layout is None or self._merged_since_layout > LAYOUT_FRACTION * self.entries:
            lists = torch.full((size,), self.lists, dtype=torch.int64, device="cpu")  # slots without a list come last
            listed = (self.entry_of[:size] >= 0).nonzero().squeeze(-1)
            lists[listed] = torch.from_numpy(self.get_lists(self.entry_of[listed]))
            self._layout = ListLayout.from_lists(lists, self.lists, keys)
            self._merged_since_layout = 0
        return self._layout

    def resize(self, capacity: int) -> None:
        """Change the number of slots; slots that are dropped have never held a row."""
        if capacity != len(self.entry_of):
            self.entry_of = resize(self.entry_of, capacity, fill=-1)
            self.movement.resize(capacity)

    def _measure_imbalance(self) -> float:
        """Measure the imbalance of the lists; 1 if all have the same length."""
        ivf = find_movable_ivf(self.index)
        return 1.0 if ivf is None else float(ivf.invlists.imbalance_factor())

    def inherit_lists(self, old: Base) -> None:
        """Copy the training statistics of the lists of ``old``."""
        self.trained_rows, self.imbalance = old.trained_rows, old.imbalance

    def has_outgrown_lists(self, rows: int) -> bool:
        """Return whether the lists should be trained again for ``rows`` rows."""
        if find_ivf(self.index) is None:
            return False
        has_grown = rows > OUTGROWN_RATIO * self.trained_rows
        return has_grown or self._measure_imbalance() > IMBALANCE_RATIO * self.imbalance
