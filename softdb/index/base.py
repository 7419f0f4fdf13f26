"""The base index: a FAISS index over rows as it took them in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import faiss

from softdb.filters import Selection
from softdb.index.faiss_parts import (
    accepts,
    array_of,
    core_of,
    distance_to,
    is_movable,
    ivf_of,
    parts_of,
    prepared_keys,
    search_parameters,
    width_name,
    within_lists,
)
from softdb.index.list_layout import Outline
from softdb.index.norm_outliers import longest_rows, scale_of
from softdb.index.policy import IndexPolicy
from softdb.index.tuning import truth_of
from softdb.index.visibility import Visible
from softdb.kernels.gather import scores_at
from softdb.scoring.metrics import compute_dtype
from softdb.table.slots import resized
from softdb.table.storage import RowStorage

# A row has its list chosen again when it has come this far since, relative to the scale of the keys, and when it comes
# this far at once.
LIST_TOLERANCE, JUMP_TOLERANCE = 1.0, 0.25


# An IVF base is trained anew when it holds this many times the rows that its lists were trained for, or its lists are
# this much less even than they were.
OUTGROWN, UNBALANCED = 4, 2


FEWEST_PROBES = 1


# Neighbours that a step in a graph looks at, about.
GRAPH_DEGREE = 32


# Rows that have moved by less than the tolerance come in a slightly wrong order: this share more of them are asked for.
SLACK = 0.25


# An outline of the rows by lists is made anew when the base has taken in this share of its entries; as many rows of a
# list tell where it lies.
OUTLINE_SHARE, OUTLINE_ROWS = 1 / 8, 32


UNBOUNDED = ("dot", "scaled_dot")


# As many numbers are compared with their copies at a time.
COMPARED_ELEMENTS = 2**22


# The keys of so many rows are compared with the index's before each search.
SAMPLE_ROWS = 64


class Base:
    """A FAISS index over rows as it took them in.

    Entry e of it is the row in slot ``slots[e]``, and ``entry_of`` gives the latest entry of a slot, -1 where there is
    none. Entries whose row has changed or is gone are hidden. A plain inverted file takes a row in again under its old
    entry, which moves to another list or stays; any other index under a new one, and the old is garbage.

    Attributes:
        crown: The slots of the longest rows, which the owner searches exactly: they are hidden.
        crown_norm: From which norm on rows belong there.
        copy: The rows as taken in, (capacity, d) float32, beside the keys; None if nobody moves them.
        scale: What a move is far beside: the median distance of the rows from their middle, or, where they lie in
            clusters, a few times that from the nearest of a sample.
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
        self.owner = owner  # the FAISS index: what FAISS gives as its parts or other types dies with it
        self.factory = factory
        self.policy = policy
        self.slots = slots  # on the CPU, as are the next
        self.entry_of = torch.full((capacity,), -1, dtype=torch.int64, device="cpu")
        self.entry_of[slots] = torch.arange(len(slots), device="cpu")
        self.visible = Visible(len(slots))
        self._can_widen = accepts(self.index, None, 1)
        self._can_select = isinstance(core_of(self.index), faiss.IndexIVF) and accepts(
            self.index, self.visible.selector(), None
        )
        self.in_order = len(slots) == 0 or int(slots[-1]) == len(slots) - 1  # entry e is slot e, since they ascend
        self.crown, self.crowned, self.crown_norm = slots[:0], 0, math.inf
        self.check_after = policy.checking_shares[0]
        self.taken = 0  # rows taken in since the recall was checked
        self._outline: Outline | None = None
        self._outlined = 0  # rows taken in since
        self.trained_rows, self.imbalance = len(slots), self._imbalance()
        self.recall: float | None = None
        self.told = 0  # by how many queries that were asked; else by made-up ones
        self.neighbours = 0  # of which that is the share found
        self.next_check = policy.check_after  # after as many queries
        self.scale = scale_of(rows)
        self.copy: Tensor | None = None
        self._drift: Tensor | None = None  # (capacity,): how far rows have come since their list was chosen
        if copied:
            self.copy = rows if len(rows) == capacity and self.in_order else rows.new_zeros(capacity, rows.shape[1])
            if self.copy is not rows:
                self.copy[slots.to(rows.device)] = rows
            self._drift = torch.zeros(capacity, device="cpu")
        self._sample_slots = slots[:: max(1, len(slots) // SAMPLE_ROWS)][:SAMPLE_ROWS].to(rows.device)
        self._sample_keys: Tensor | None = None

    def follow_sample(self, rows: RowStorage, keys: Tensor, version: int) -> None:
        """Copy the sampled keys that are known to have changed after ``version``, or all of them at first."""
        slots = self._sample_slots
        if self._sample_keys is None:
            self._sample_keys = keys.index_select(0, slots)
        elif self.copy is None:
            known = (rows.keys_changed_at[slots] > version) | (rows.keys_moved_at > version)
            self._sample_keys[known] = keys[slots[known]]

    def has_stale_sample(self, keys: Tensor, metric: str, tolerance: float) -> bool:
        """Whether the key of a sampled row is another than the index's, though every known write was followed."""
        if self._sample_keys is None:
            return False
        present = keys.index_select(0, self._sample_slots)
        if torch.equal(present, self._sample_keys):
            return False
        if self.copy is None:
            return True
        seen = self._sample_slots[self.sees(self._sample_slots.cpu()).to(keys.device)]
        if len(self.moved(seen, keys, metric, tolerance)):
            return True
        self._sample_keys = present
        return False

    @property
    def index(self) -> Any:
        """The FAISS index under its own type."""
        return faiss.downcast_index(self.owner)

    @property
    def entries(self) -> int:
        """How many entries there are, hidden ones included."""
        return len(self.slots)

    @property
    def lists(self) -> int:
        """How many lists entries move between; 0 where they cannot."""
        ivf = is_movable(self.index)
        return 0 if ivf is None else int(ivf.nlist)

    @property
    def probes(self) -> int | None:
        """IVF lists visited by each query."""
        ivf = ivf_of(self.index)
        return None if ivf is None else int(ivf.nprobe)

    @property
    def share(self) -> float:
        """The share of the lists that each query visits; 0 where there are none."""
        ivf = ivf_of(self.index)
        return 0.0 if ivf is None else float(ivf.nprobe / ivf.nlist)

    @property
    def looked_at(self) -> float:
        """The share of the entries that each query looks at, about."""
        core = core_of(self.index)
        if isinstance(core, faiss.IndexHNSW):
            return float(min(1.0, core.hnsw.efSearch * GRAPH_DEGREE / max(1, self.entries)))
        return self.share or 1.0

    @property
    def is_exact_at_full_width(self) -> bool:
        """Whether a search of all lists finds the best rows, so that each one more brings it nearer to that.

        Not where codes or projections lose something, nor in a graph, some of whose rows no search reaches.
        """
        if not isinstance(core_of(self.index), faiss.IndexIVFFlat):
            return False
        changes = [part for part in parts_of(self.index) if isinstance(part, faiss.VectorTransform)]
        return all(part.d_in == part.d_out and getattr(part, "is_orthonormal", False) for part in changes)

    @property
    def effort(self) -> tuple[int, int]:
        """What trades time for recall, and its largest useful value; 0 where a search cannot choose it."""
        knob, name, limit = width_name(self.index)
        return (int(getattr(knob, name)), int(limit)) if self._can_widen else (0, 0)

    def exert(self, effort: int) -> None:
        """Search with so much effort from now on."""
        knob, name, _ = width_name(self.index)
        if self._can_widen:
            setattr(knob, name, effort)

    def sees(self, slots: Tensor) -> Tensor:
        """At which of ``slots`` there is a row that searches may find."""
        entries = self.entry_of[slots]
        return (entries >= 0) & self.visible.at(entries.clamp(min=0))

    def search(  # (B, d), (used,) bool -> (B, c)
        self, queries: Any, k: int, allowed: Tensor | None = None, *, effort: int | None = None
    ) -> Tensor:
        """Slots of ``k`` or more rows, -1 where fewer were found; with another ``effort``, where FAISS can, if given.

        Among them may be some that are not ``allowed``, where FAISS cannot leave them out.
        """
        index = self.index
        if self.copy is not None:
            k += round(SLACK * k)
        selector, hidden = None, self.visible.hidden > 0
        if hidden or allowed is not None:
            if not self._can_select:
                k *= 2
            elif allowed is None:
                selector, hidden = self.visible.selector(), False
            else:
                bits = np.packbits((self.visible.all() & allowed[self.slots]).numpy(), bitorder="little")
                selector, hidden = faiss.IDSelectorBitmap(bits), False
        parameters = None
        if selector is not None or effort is not None:
            parameters = search_parameters(index, selector, effort)
        entries = torch.from_numpy(index.search(queries, min(k, self.entries), params=parameters)[1])
        if self.in_order and not hidden:
            return entries
        places = entries.clamp(min=0)
        missing = entries < 0
        if hidden:
            missing |= ~self.visible.at(places)
        return self.slots[places].masked_fill_(missing, -1)

    def moved(self, slots: Tensor, keys: Tensor, metric: str, tolerance: float) -> Tensor:
        """Those of ``slots`` whose key is no longer where it was taken in, by more than ``tolerance``."""
        if self.copy is None:
            return slots
        apart = []
        for part in slots.split(max(1, COMPARED_ELEMENTS // keys.shape[1])):
            apart.append(
                distance_to(prepared_keys(keys.index_select(0, part), metric), self.copy.index_select(0, part))
            )
        distance = torch.cat(apart) if apart else slots.new_zeros(0)
        return slots[~(distance <= tolerance * self.scale)]  # so that NaN has moved

    def hide(self, slots: Tensor) -> None:
        """Keep searches from finding ``slots``."""
        entries = self.entry_of[slots]
        self.visible.hide(entries[entries >= 0])

    def take(self, slots: Tensor, rows: Tensor) -> None:  # (m,) ascending, on the CPU; (m, d) finite
        """Take rows in as they are now, and show them."""
        if len(slots) == 0:
            return
        self.taken += len(slots)
        self._outlined += len(slots)
        entries = self.entry_of[slots]
        known = (entries >= 0) & bool(self.lists)
        if bool(known.all()):
            self._move(entries, slots, rows)
        else:
            if bool(known.any()):
                self._move(entries[known], slots[known], rows[known.to(rows.device)])
            self._append(slots[~known], rows[~known.to(rows.device)])
        if self.copy is not None:
            self.copy.index_copy_(0, slots.to(rows.device), rows)

    def _move(self, entries: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Put entries of an inverted file where they belong now."""
        ivf, vectors = is_movable(self.index), within_lists(self.index, array_of(rows))
        lists = self.lists_of(entries)
        astray = torch.ones(len(slots), dtype=torch.bool, device="cpu")
        if self.copy is not None and self._drift is not None:
            moved = distance_to(rows, self.copy.index_select(0, slots.to(rows.device))).cpu()
            drift = self._drift[slots] + moved
            astray = ~((drift <= LIST_TOLERANCE * self.scale) & (moved <= JUMP_TOLERANCE * self.scale))
            self._drift[slots] = drift.masked_fill_(astray, 0.0)
        if bool(astray.any()):
            lists[astray.numpy()] = ivf.quantizer.search(vectors[astray.numpy()], 1)[1].ravel()
        codes = np.empty((len(vectors), ivf.code_size), dtype=np.uint8)
        numbers = entries.numpy()
        ivf.encode_vectors(len(vectors), *map(faiss.swig_ptr, (vectors, lists, codes)))
        ivf.direct_map.update_codes(ivf.invlists, len(vectors), *map(faiss.swig_ptr, (numbers, lists, codes)))
        self.visible.show(entries)

    def _append(self, slots: Tensor, rows: Tensor) -> None:
        first = self.entries
        self.owner.add(array_of(rows))
        self.hide(slots)
        self.entry_of[slots] = torch.arange(first, first + len(slots), device="cpu")
        self.in_order &= int(slots[0]) == first and int(slots[-1]) == first + len(slots) - 1
        self.slots = torch.cat([self.slots, slots])
        self.visible.extend(len(slots))
        if self._drift is not None:
            self._drift[slots] = 0.0

    def lists_of(self, entries: Tensor) -> Any:
        """The IVF lists that entries are in, as an int64 array."""
        ivf = is_movable(self.index)
        return faiss.rev_swig_ptr(ivf.direct_map.array.data(), ivf.ntotal)[entries.numpy()] >> 32

    def outline(self, keys: Tensor, size: int) -> Outline | None:
        """The slots below ``size`` by lists, as they were not long ago; None where there are no lists."""
        if not self.lists:
            return None
        if self._outline is None or self._outlined > OUTLINE_SHARE * self.entries:
            number = torch.full((size,), self.lists, dtype=torch.int64, device="cpu")  # those in no list come last
            listed = (self.entry_of[:size] >= 0).nonzero().squeeze(-1)
            number[listed] = torch.from_numpy(self.lists_of(self.entry_of[listed]))
            order, counts = number.argsort(stable=True), number.bincount(minlength=self.lists + 1)
            some = counts.unsqueeze(-1) * torch.arange(OUTLINE_ROWS, device="cpu") // OUTLINE_ROWS
            some = order[(some + (counts.cumsum(0) - counts).unsqueeze(-1)).clamp_(max=max(0, size - 1))]
            means = keys[some.flatten().to(keys.device)].view(*some.shape, -1).mean(1, dtype=compute_dtype(keys))
            self._outline = Outline(order.to(keys.device), counts.to(keys.device), means)
            self._outlined = 0
        return self._outline

    def widen(self, capacity: int) -> None:
        """Make room for slots."""
        if capacity > len(self.entry_of):
            self.entry_of = resized(self.entry_of, capacity, fill=-1)
            self.copy = None if self.copy is None else resized(self.copy, capacity)
            self._drift = None if self._drift is None else resized(self._drift, capacity)

    def _imbalance(self) -> float:
        """How uneven the lists are: 1 if all are as long."""
        ivf = is_movable(self.index)
        return 1.0 if ivf is None else float(ivf.invlists.imbalance_factor())

    def inherit(self, old: Base) -> None:
        """Take over what is known of the lists that were trained for ``old``."""
        self.trained_rows, self.imbalance = old.trained_rows, old.imbalance

    def is_outworn(self, rows: int) -> bool:
        """Whether lists trained anew would serve ``rows`` rows better."""
        if ivf_of(self.index) is None:
            return False
        return rows > OUTGROWN * self.trained_rows or self._imbalance() > UNBALANCED * self.imbalance

    def tune(
        self,
        groups: list[Tensor],  # of queries, (m, d)
        keys: Tensor,  # (capacity, d)
        metric: str,
        selection: Selection,
        wanted: float,
        neighbours: int,
    ) -> None:
        """Find how much to probe, and how many rows to crown, until each group finds ``wanted`` of its best rows.

        There is no crown when it begins: what is in none has to be visible.

        Args:
            groups: Queries.
            keys: The rows as they are.
            metric: How they meet.
            selection: In which slots there are rows.
            wanted: The recall.
            neighbours: Of so many best rows.
        """
        self.taken, self.crown, self.neighbours = 0, self.crown[:0], neighbours
        k = min(neighbours, self.entries)
        queries = torch.cat(groups)
        spec, operand, best, worst = truth_of(queries, keys, metric, selection, k)
        crowning = metric in UNBOUNDED and self.entries >= self.policy.outlier_entries
        longest = longest_rows(keys, selection) if crowning else best.new_empty(0)
        rank = best.new_full((len(keys),), len(keys))
        rank[longest] = torch.arange(len(longest), device=rank.device)
        vectors, sizes = array_of(prepared_keys(queries, metric)), [len(group) for group in groups]
        knob, name, limit = width_name(self.index)

        def measure(probes: int, crown: int) -> tuple[float, float]:
            """The recall of the queries, and what it is for certain but for the chance in drawing them."""
            if knob is not None:
                setattr(knob, name, probes)
            found = self.search(vectors, k).to(keys.device)
            hits = (scores_at(operand, keys, found, spec) >= worst) & (found >= 0)
            hits &= rank[found.clamp(min=0)] >= crown  # not twice
            held = (rank[best.clamp(min=0)] < crown) & (best >= 0)
            shares = ((hits.sum(-1) + held.sum(-1)).clamp(max=k) / k).split(sizes)
            chance = [float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in shares]
            means = [float(part.mean()) for part in shares]
            return min(means), min(mean - off for mean, off in zip(means, chance, strict=True))

        levels = self._levels(limit if knob is not None else 0, len(longest))
        level, again, now = 0, self.recall is not None, (0, 0)
        if again:
            now = (0 if knob is None else getattr(knob, name), self.crowned)
            level = sum(probes < now[0] or crown < now[1] for probes, crown in levels[:-1])
        probes, crown = levels[level]
        recall, sure = measure(probes, crown)
        # Tuned on a sample, to be right for others: beyond chance. Checked on a smaller one: not moved by chance.
        near = self.policy.near_enough
        lacks = recall < wanted - near if again else sure < wanted
        if lacks:
            # The sample is the same for all levels: where it is a hard one, the wanted recall is far off.
            while (recall < wanted - near / 2 if again else sure < wanted) and level < len(levels) - 1:
                level += 1
                probes, crown = levels[level]
                recall, sure = measure(probes, crown)
        elif recall > wanted + near and level > 0:
            lower = measure(*levels[level - 1])
            if lower[not again] >= wanted:
                level, recall = level - 1, lower[0]
            probes, crown = levels[level]
        few = levels[level - 1][0] if level else probes
        while probes - few > max(1, probes // 8):
            middle = (few + probes) // 2
            found = measure(middle, crown)
            if found[not again] >= wanted:
                probes, recall = middle, found[0]
            else:
                few = middle
        if knob is not None:
            setattr(knob, name, probes)
        self.recall, self.next_check = recall, self.policy.check_after
        if again:  # the more often, the more there is to be changed
            interval = self.check_after * (0.5 if (probes, crown) != now else 2)
            least, most = self.policy.checking_shares
            self.check_after = min(max(interval, least), most)
        last = longest[crown - 1 : crown] if crown else longest[:1]
        self.crown_norm = float(torch.linalg.vector_norm(keys[last], dtype=torch.float32)) if len(last) else math.inf
        self.crown, self.crowned = longest[:crown].sort().values.cpu(), crown
        self.hide(self.crown)

    def _levels(self, limit: int, longest: int) -> list[tuple[int, int]]:
        """Probes up to ``limit`` and sizes of a crown up to ``longest``, from the cheapest on, in doublings."""
        probes, crown, policy = min(FEWEST_PROBES, limit), 0, self.policy
        visited = self.entries / max(1, self.lists)  # rows a probe, in lists
        levels = [(probes, crown)]
        while probes < limit or crown < longest:
            if crown < longest and (
                probes == limit
                or policy.outlier_cost * (crown + policy.outlier_rows) < policy.visit_cost * probes * visited
            ):
                crown = min(longest, max(64, 2 * crown))
            else:
                probes = min(limit, 2 * probes)
            levels.append((probes, crown))
        return levels
