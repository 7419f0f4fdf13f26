"""`Reader`: from a query and its options to a read, over the rows as they are in one version."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb._checks import check_finite, check_float_tensor, check_temperature
from softdb.errors import ArgumentError, NonFiniteError
from softdb.filters import Selection, Where, select
from softdb.index.list_layout import list_importance
from softdb.index.manager import IndexManager
from softdb.index.search import Candidates
from softdb.kernels.backend import backend_for
from softdb.kernels.spec import ReadSpec, disable_autocast
from softdb.kernels.tiling import Tiling
from softdb.processes import is_within_ddp
from softdb.reading.counting import count_read
from softdb.reading.exact import read_exactly
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.preparation import SearchPreparation
from softdb.reading.result import Read, answer_dtype, best_of, completed, finish, replaced, transform, widened
from softdb.reading.sample import Sample
from softdb.reading.staleness import OpenReads
from softdb.reading.tables import Tables
from softdb.reading.tail import TailCosts, add_tail, is_worth_trying, samples_for
from softdb.reading.topk import read_candidates
from softdb.scoring.gumbel import noise_for
from softdb.scoring.metrics import Metric, centre_of, compute_dtype, prepare_query
from softdb.scoring.normalizers import get_eval_normalizer, is_random, is_sparse
from softdb.table.access import Access
from softdb.table.gradients import with_sparse_gradient
from softdb.table.storage import RowStorage
from softdb.table.table import Table

__all__ = ["ReadView", "Reader"]

# As many rows have their norms taken at a time.
NORM_ROWS = 2**14
# As many candidates, or so many times those asked for, are looked at for the rows to which a sparse normalizer gives
# weight.
SUPPORT, SUPPORT_TIMES = 1024, 16


@dataclass(frozen=True)
class ToleranceRounds:
    """How a read to a tolerance goes on until its error is small enough.

    Attributes:
        candidates: The candidates of each query, at the least.
        samples: The rows of the first sample, for all queries.
        rates: The error tells how many samples are enough where those were not, if it falls with a root of their
            number: the first of these, as a stratified sample's does at first, or the square root, as that of any
            sample does. One round for each.
        more: So many times more are drawn.
    """

    candidates: int = 256
    samples: int = 2**14
    rates: tuple[float, ...] = (1.4, 2.0, 2.0)
    more: float = 1.2


@dataclass(frozen=True)
class ReadView:
    """The rows as one read finds them.

    Attributes:
        rows: Ids, fields and versions.
        keys, values: (capacity, width), in slot order.
        lent: The names of those that lie in the place of the table's own.
        index: What finds candidates; not asked where keys are lent.
        metric, temperature: Of the store.
        sparse: Whether gathered rows get row-sparse gradients.
    """

    rows: RowStorage
    keys: Tensor
    values: Tensor
    lent: frozenset[str]
    index: IndexManager
    metric: Metric
    temperature: float
    sparse: bool


class Reader:
    """Answers queries, and keeps between reads what depends on the version of the rows alone.

    Args:
        table: The rows.
        access: How they are reached.
        index: What finds candidates among them.
        open_reads: The reads that wait for their backward.
    """

    rounds = ToleranceRounds()
    costs = TailCosts()

    def __init__(self, table: Table, access: Access, index: IndexManager, open_reads: OpenReads) -> None:
        self._table, self._access, self._index, self._open_reads = table, access, index, open_reads
        # At which version of the rows, and: what a read without filters sees, the largest norm that a key has had.
        self._everything: tuple[int, Selection | None] = (0, None)
        self._key_norm = (0, 0.0)
        self._key_nan_at = -1  # at which version a key held NaN

    def run(self, query: Tensor, options: ReadOptions, lent: Mapping[str, Tensor] | None = None) -> Read:
        """Answer a batch of queries: checked, from one version of the rows, counted, with ids.

        Args:
            query: (..., key_dim).
            options: What is asked for.
            lent: Keys and values to read in the place of the store's own; no write to the store concerns them.
        """
        table, store = self._table, self._table.module
        check_float_tensor("query", query, (-1, table.config.key_dim), store.keys.device)
        if (
            not store.training and get_eval_normalizer(options.normalizer) != options.normalizer
        ):  # then nothing is drawn
            options = replace(options, normalizer=get_eval_normalizer(options.normalizer), generator=None)

        def read() -> Read:
            answer = self.answer(query, options, lent)
            if answer.ids is None or answer.weights is None:
                return answer
            count_read(table.rows, answer.ids, answer.weights)
            if options.mode == "exact" and options.k is None:
                return best_of(answer, None)
            return replace(answer, ids=table.rows.ids_at(answer.ids))

        searches = options.mode == "topk" and lent is None
        preparation = SearchPreparation(table, self._index, query, options.k) if searches else None
        return self._access.reading(read, preparation)

    def run_both(self, query: Tensor, options: ReadOptions) -> tuple[Read, Read]:
        """Answer an exact and a top-k read of one version of the rows, with slots for ids, and count neither."""
        exact = replace(options, mode="exact")

        def read() -> tuple[Read, Read]:
            return self.answer(query, exact), self.answer(query, options)

        return self._access.reading(read, SearchPreparation(self._table, self._index, query, options.k))

    def answer(self, query: Tensor, options: ReadOptions, lent: Mapping[str, Tensor] | None = None) -> Read:
        """Answer as `run`, but with slots for ids, and counting nothing: of a query that has been checked."""
        table = self._table
        tensors = table.tensors() if lent is None else lent
        foreign = table.substituted_tensors(tensors) if lent is None else dict(lent)
        for name, tensor in foreign.items():
            self._check_lent(name, tensor, options.mode)
        keys, values, store = tensors["keys"], tensors["values"], table.module
        # What made a lent tensor from others may take no row-sparse gradient.
        sparse = table.config.trainable and store.sparse_grad and keys.is_leaf and values.is_leaf
        if sparse and is_within_ddp():
            keys, values = with_sparse_gradient(keys), with_sparse_gradient(values)
        names = frozenset(foreign)
        view = ReadView(table.rows, keys, values, names, self._index, table.config.metric, store.temperature, sparse)
        read, used = self.read(view, query, options)
        if lent is not None:
            return read
        return self._open_reads.attach(read, table.rows, used, list(foreign.values()))

    def _check_lent(self, name: str, tensor: Tensor, mode: Mode) -> None:
        """Raise unless a read of ``tensor``, in the place of the store's own, is possible."""
        table = self._table
        table.check_not_sharded()
        if table.is_sharded and table.module.sparse_grad and mode != "exact" and tensor.requires_grad:
            raise ArgumentError(
                "sparse_grad: expected False, since fully_shard reduces dense gradients only; make the store with "
                "sparse_grad=False, or pass its Parameters to fully_shard as ignored_params"
            )
        table.check_size(name, tensor)

    def read(self, view: ReadView, query: Tensor, options: ReadOptions) -> tuple[Read, Tensor | None]:
        """Answer a batch of queries.

        Returns:
            The read, with slots for ids, and the slots that it used, None for all.
        """
        leading, rows, mode = query.shape[:-1], view.rows, options.mode
        temperature: float | Tensor = view.temperature
        if options.temperature is not None:
            temperature = check_temperature(options.temperature, leading, view.keys.device)
        selection = self._select(rows, leading, options.where, options.exclude)
        if mode != "exact" or not selection.shows_some_to_all:
            check_finite("query", query)  # else its scores tell
        tiling = Tiling.for_device(query.device)
        narrow = tiling.can_use_bf16_matmul(view.values, answer_dtype(query))
        with disable_autocast(query.device):
            dtype = compute_dtype(query, view.keys, view.values)
            centre = centre_of(query, view.metric)
            operand = prepare_query(query, view.metric, temperature, centre, dtype)
            if len(leading) != 1:
                operand = operand.reshape(-1, operand.shape[-1])
            noise = noise_for(options.normalizer, options.generator)
            if "keys" in view.lent:
                largest = functools.partial(largest_norm, view.keys)
            else:
                largest = functools.partial(self.largest_key_norm, rows, view.keys)
            spec = ReadSpec(view.metric, centre, selection, dtype, largest, narrow, noise, tiling)
            tables = Tables(view.keys, view.values, sparse=view.sparse)
            if mode == "exact":
                try:
                    read = read_exactly(operand, tables, spec, options.k, options.normalizer)
                except NonFiniteError:
                    check_finite("query", query)  # it may be its fault: say so
                    raise
                used = selection.shared
            elif options.tolerance is not None:
                read, used = self._read_within_tolerance(view, query, operand, spec, tables, options)
            else:
                read, used = self._read_topk(view, query, operand, spec, tables, options)
        if mode == "hard":
            read = replace(read, normalizer="hard")
        if len(leading) != 1:
            read = transform(read, lambda tensor: tensor.reshape((*leading, *tensor.shape[1:])))
        return finish(read, query), used

    def _read_topk(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, tables: Tables, options: ReadOptions
    ) -> tuple[Read, Tensor]:
        """A read of the k best rows, with a sample of the others if that is asked for, and the slots that it used."""
        read, found = self._read_best(view, query, operand, spec, tables, options.k, options.normalizer)
        used = found.slots.flatten()
        if is_sparse(options.normalizer):
            read, more = self._find_support(view, read, query, operand, spec, tables, options.normalizer)
            used = torch.cat([used, *more])
        if options.tail_samples:
            count, generator = options.tail_samples, options.generator
            read, sampled = self._add_tail(view, read, operand, spec, tables, count, found.recall, generator)
            used = torch.cat([used, sampled])
        return read, used

    def _read_best(
        self,
        view: ReadView,
        query: Tensor,
        operand: Tensor,
        spec: ReadSpec,
        tables: Tables,
        k: int | None,
        normalizer: str = "softmax",
        *,
        careful: bool = False,
    ) -> tuple[Read, Candidates]:
        """A read of the k best rows, and how they were found."""
        found = self.candidates(view, query, operand, spec, k, careful=careful)
        complete = _are_complete(found.slots, spec.selection, len(view.rows))
        read = read_candidates(operand, tables, spec, found.slots, normalizer, complete=complete, best=found.exact)
        return read, found

    def _find_support(
        self,
        view: ReadView,
        read: Read,
        query: Tensor,
        operand: Tensor,
        spec: ReadSpec,
        tables: Tables,
        normalizer: str,
    ) -> tuple[Read, list[Tensor]]:
        """The same read, of as many candidates for a query as it takes for one of them to have no weight."""
        query, used = query.detach().reshape(-1, query.shape[-1]), list[Tensor]()
        reach = cast(Tensor, read.ids).shape[-1]
        most = min(spec.selection.shared_count, max(SUPPORT, SUPPORT_TIMES * reach))
        while True:
            whole = (cast(Tensor, read.weights).detach() > 0).all(-1)  # so there might be more
            left = (whole & read.mass.isnan()).nonzero().squeeze(-1)
            gathered = 2 * reach * len(left) * (view.keys.shape[-1] + view.values.shape[-1])
            if len(left) == 0 or reach >= most or gathered > spec.tiling.max_sparse_elements:
                return read, used
            reach = min(2 * reach, most)
            part = replace(spec, selection=spec.selection.take(left))
            again, found = self._read_best(view, query[left], operand[left], part, tables, reach, normalizer)
            used.append(found.slots.flatten())
            read = replaced(widened(read, reach), left, again)

    def _add_tail(
        self,
        view: ReadView,
        read: Read,
        operand: Tensor,
        spec: ReadSpec,
        tables: Tables,
        count: int,
        recall: float,
        generator: torch.Generator | None,
    ) -> tuple[Read, Tensor]:
        """The read of the best rows and, by a sample of ``count``, of the others; and the slots of the sample."""
        selection = spec.selection
        if count >= selection.shared_count - cast(Tensor, read.ids).shape[-1]:
            count = selection.shared_count
        layout = None if "keys" in view.lent else view.index.list_layout(view.rows, view.keys.detach(), selection.size)
        importance = None
        if layout is not None:
            importance = list_importance(layout, operand, spec, cast(Tensor, read.scores), read.lse)
        sample = Sample.draw(selection, count, operand.device, generator, layout, importance)
        return add_tail(read, operand, tables, spec, sample, recall), sample.slots

    def _read_within_tolerance(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, tables: Tables, options: ReadOptions
    ) -> tuple[Read, Tensor | None]:
        """A read with an error of no more than the tolerance, and the slots that it used, None for all."""
        k, tolerance, generator = options.k, cast(float, options.tolerance), options.generator
        selection, query, rounds = spec.selection, query.detach().reshape(-1, query.shape[-1]), self.rounds
        candidates = max(k or 1, rounds.candidates)
        trial = is_worth_trying(rounds.samples, candidates, len(query), selection.shared_count, self.costs)
        trial = trial and "keys" not in view.lent
        if not (trial and view.index.is_approximate(view.rows, selection, candidates, len(query))):
            read = read_exactly(operand, tables, spec, k, "softmax")
            return replace(read, error=torch.zeros_like(read.lse)), selection.shared
        best, found = self._read_best(view, query, operand, spec, tables, candidates, careful=True)
        read, sampled = self._add_tail(view, best, operand, spec, tables, rounds.samples, found.recall, generator)
        used = [found.slots.flatten(), sampled]
        drawn = torch.full_like(cast(Tensor, read.error), rounds.samples)
        for rate in rounds.rates:
            left, excess = _excess(read, tolerance)
            needed = rounds.more * drawn[left] * excess**rate
            samples = samples_for(needed, selection.shared_count, self.costs)
            if not samples:
                break
            some = left[needed <= samples]
            part = replace(spec, selection=selection.take(some))
            again = transform(best, lambda tensor, some=some: tensor[some])  # type: ignore[misc]
            again, sampled = self._add_tail(view, again, operand[some], part, tables, samples, found.recall, generator)
            drawn[some] = samples
            read = replaced(read, some, again)
            used.append(sampled)
        left, _ = _excess(read, tolerance)
        if len(left) == 0:
            return best_of(read, k), torch.cat(used)
        part = replace(spec, selection=selection.take(left))
        exact = read_exactly(operand[left], tables, part, None, "softmax")
        return best_of(replaced(read, left, completed(read, left, exact)), k), selection.shared

    def _select(self, rows: RowStorage, leading: torch.Size, where: Where | None, exclude: Tensor | None) -> Selection:
        if where is not None or exclude is not None:
            return select(rows, tuple(leading), where, exclude)
        version, everything = self._everything
        if version != rows.version or everything is None:
            everything = select(rows, (), None, None)
            self._everything = (rows.version, everything)
        return everything

    def largest_key_norm(self, rows: RowStorage, keys: Tensor) -> float:
        """Return a norm that no key surpasses; rows that are gone may still count."""
        version, norm = self._key_norm
        if version == rows.version:
            return norm
        if self._key_nan_at == rows.version:
            return math.nan
        keys = keys.detach()
        moved = rows.all_keys_changed_at > version
        largest = torch.tensor(0.0 if moved else norm, dtype=compute_dtype(keys), device=keys.device)
        changed = rows.changed_since(version, keys=True)
        for slots in changed.split(NORM_ROWS) if len(changed) else ():
            part = keys[int(slots[0]) : int(slots[-1]) + 1] if moved else keys[slots]
            norms = torch.linalg.vector_norm(part, dim=-1, dtype=largest.dtype)
            largest = torch.maximum(largest, norms.amax())
        norm = float(largest)
        if math.isnan(norm):  # which is not what to go on from: it would stay when the row is gone
            self._key_nan_at = rows.version
        else:
            self._key_norm = (rows.version, norm)
        return norm

    def candidates(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, k: int | None, *, careful: bool = False
    ) -> Candidates:
        """Find the slots to score, (B, k)."""
        keys = view.keys.detach()
        if k is None:
            return Candidates(backend_for(operand).exact_top_k(operand, keys, spec, 1)[1], True, 1.0)
        wanted = max(1, min(k, len(view.rows)))
        if "keys" in view.lent:
            found = Candidates(backend_for(operand).exact_top_k(operand, keys, spec, wanted)[1], True, 1.0)
        else:
            query = query.reshape(-1, query.shape[-1])
            found = view.index.search(query, operand, keys, view.rows, spec, wanted, careful=careful)
        return found._replace(slots=F.pad(found.slots, (0, k - found.slots.shape[-1]), value=-1))


def _are_complete(slots: Tensor, selection: Selection, rows: int) -> Tensor:  # (B, k) -> (B,)
    """For which queries the candidates are all the rows that may be seen, as far as is known."""
    count = slots.shape[-1]
    if count >= rows or (selection.is_shared and count >= selection.shared_count):
        return torch.ones(len(slots), dtype=torch.bool, device=slots.device)
    return (slots < 0).any(-1)


def largest_norm(keys: Tensor) -> float:
    """Return the largest norm of a key."""
    parts = keys.detach().split(NORM_ROWS)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=compute_dtype(keys)).amax() for part in parts if len(part)]
    return float(torch.stack(norms).amax()) if norms else 0.0


def _excess(read: Read, tolerance: float) -> tuple[Tensor, Tensor]:  # -> (b,), (b,)
    """The queries whose error is above the tolerance, and by how many times."""
    times = cast(Tensor, read.error).detach() / tolerance
    left = (~(times <= 1)).nonzero().squeeze(-1)
    return left, times[left]
