"""`Reader`: reads of one version of a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from softdb._checks import Ids, check_finite, check_float_tensor, check_temperature
from softdb.errors import ArgumentError, NonFiniteError
from softdb.filters import Selection, Where, select
from softdb.index.list_layout import list_importance
from softdb.index.manager import IndexManager
from softdb.index.search import Candidates
from softdb.kernels.backend import backend_for
from softdb.kernels.spec import ReadSpec, disable_autocast
from softdb.kernels.tiling import Tiling
from softdb.pending_checks import is_deferred
from softdb.processes import is_within_ddp
from softdb.reading.bias import prepare_bias
from softdb.reading.counting import count_read
from softdb.reading.exact import read_exactly
from softdb.reading.hints import CostHints
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.preparation import SearchPreparation
from softdb.reading.result import (
    Read,
    answer_dtype,
    cast_values,
    keep_best,
    pad_candidates,
    replace_queries,
    rescale_to_exact,
    transform,
)
from softdb.reading.sample import Sample
from softdb.reading.staleness import OpenReads
from softdb.reading.tables import Tables
from softdb.reading.tail import TailCosts, add_tail, choose_sample_size, estimate_exact_cost, is_worth_trying
from softdb.reading.topk import read_candidates
from softdb.scoring.gumbel import draw_noise
from softdb.scoring.metrics import Metric, compute_center, compute_dtype, find_exact_divisor, prepare_query
from softdb.scoring.normalizers import get_eval_normalizer, is_random, is_sparse
from softdb.table.access import Access
from softdb.table.gradients import with_sparse_gradient
from softdb.table.kept_rows import RowsAtRead
from softdb.table.storage import RowStorage
from softdb.table.table import Table

__all__ = ["ReadView", "Reader"]

# Number of rows whose norms are computed at a time.
NORM_CHUNK_ROWS = 2**14
# A sparse normalizer doubles the number of candidates, up to the larger of this number and this multiple of k.
SUPPORT_LIMIT, SUPPORT_LIMIT_PER_K = 1024, 16


@dataclass(frozen=True)
class ToleranceRounds:
    """Sample sizes of a read with ``tolerance``.

    Attributes:
        candidates: Minimum number of candidates of each query.
        samples: Number of rows of the first sample, which all queries share.
        exponents: One exponent p for each round after the first sample. A round multiplies the number of rows by
            ``margin * (error / tolerance) ** p``. p = 2 is correct for a simple random sample, whose error falls as
            1 / sqrt(rows). The error of a stratified sample falls faster at first, so the first p is smaller.
        margin: Safety factor of the number of rows.
    """

    candidates: int = 256
    samples: int = 2**14
    exponents: tuple[float, ...] = (1.4, 2.0, 2.0)
    margin: float = 1.2


@dataclass(frozen=True)
class ReadView:
    """Tensors and options of one read.

    Attributes:
        rows: Ids, fields and versions of the rows.
        keys: Keys in slot order, (capacity, key_dim).
        values: Values in slot order, (capacity, value_dim).
        substituted: Names of the tensors, "keys" or "values", that replace the table's own.
        index: Index that finds candidates; unused if the keys are substituted.
        metric: Metric of the store.
        temperature: Temperature of the store.
        sparse: Whether gathered rows get row-sparse gradients.
        at_read: The rows as they are now, for backward; None if gradients are disabled.
    """

    rows: RowStorage
    keys: Tensor
    values: Tensor
    substituted: frozenset[str]
    index: IndexManager
    metric: Metric
    temperature: float
    sparse: bool
    at_read: RowsAtRead | None = None


class Reader:
    """Reads of a table.

    It caches the selection of all rows and the largest norm of a key for each version of the rows.

    Args:
        table: The rows.
        access: Locks of the table.
        index: Index that finds candidates.
        open_reads: Reads whose backward may still run.
    """

    rounds = ToleranceRounds()
    costs = TailCosts()

    def __init__(self, table: Table, access: Access, index: IndexManager, open_reads: OpenReads) -> None:
        self._table, self._access, self._index, self._open_reads = table, access, index, open_reads
        # Caches, each with the version of the rows: the selection of a read without filters, the largest norm of a key.
        self._full_selection: tuple[int, Selection | None] = (0, None)
        self._key_norm = (0, 0.0)
        self._key_nan_at = -1  # version at which a key held NaN
        self._hints = CostHints()

    def run(self, query: Tensor, options: ReadOptions, substitutes: Mapping[str, Tensor] | None = None) -> Read:
        """Answer a batch of queries.

        Check the query, read one version of the rows, count the read and convert slots to ids.

        Args:
            query: Queries, (..., key_dim).
            options: Arguments of the read.
            substitutes: Keys and values to read instead of the store's own. Writes to the store do not affect them.
        """
        table, store = self._table, self._table.module
        check_float_tensor("query", query, (-1, table.config.key_dim), store.keys.device)
        if not store.training and is_random(options.normalizer):
            options = replace(options, normalizer=get_eval_normalizer(options.normalizer), generator=None)

        def read() -> Read:
            answer = self.answer(query, options, substitutes)
            if answer.ids is None or answer.weights is None:
                return answer
            count_read(table.rows, answer.ids, answer.weights)
            if options.mode == "exact" and options.k is None:
                return keep_best(answer, None)
            return replace(answer, ids=table.rows.ids_at(answer.ids))

        searches = options.mode == "topk" and substitutes is None and options.bias is None
        preparation = SearchPreparation(table, self._index, query, options.k) if searches else None
        return self._access.reading(read, preparation)

    def run_both(self, query: Tensor, options: ReadOptions) -> tuple[Read, Read]:
        """Answer an exact and a top-k read of one version of the rows.

        The reads have slots for ids, and are not counted.
        """
        exact = replace(options, mode="exact")

        def read() -> tuple[Read, Read]:
            return self.answer(query, exact), self.answer(query, options)

        return self._access.reading(read, SearchPreparation(self._table, self._index, query, options.k))

    def answer(self, query: Tensor, options: ReadOptions, substitutes: Mapping[str, Tensor] | None = None) -> Read:
        """Answer a checked query with slots for ids, without counting the read.

        Args:
            query: As for `run`.
            options: As for `run`.
            substitutes: As for `run`.
        """
        table = self._table
        tensors = table.tensors() if substitutes is None else substitutes
        replacements = table.substituted_tensors(tensors) if substitutes is None else dict(substitutes)
        for name, tensor in replacements.items():
            self._check_substitute(name, tensor, options.mode)
        keys, values, store = tensors["keys"], tensors["values"], table.module
        # The operation that made a substituted tensor may not accept row-sparse gradients.
        sparse = table.config.trainable and store.sparse_grad and keys.is_leaf and values.is_leaf
        if sparse and is_within_ddp():
            keys, values = with_sparse_gradient(keys), with_sparse_gradient(values)
        names = frozenset(replacements)
        at_read = None
        if substitutes is None and torch.is_grad_enabled():
            frozen = not (replacements or keys.requires_grad or values.requires_grad)
            at_read = RowsAtRead(table.rows, tensors, keeps=frozen)
        metric, temperature = table.config.metric, store.temperature
        view = ReadView(table.rows, keys, values, names, self._index, metric, temperature, sparse, at_read)
        read, used = self.read(view, query, options)
        if substitutes is not None:
            return read
        if options.mode != "exact" and not sparse and not table.is_sharded:
            self._hints.check_gradient("store", (keys, values))
        return self._open_reads.attach(read, at_read, used, list(replacements.values()))

    def _check_substitute(self, name: str, tensor: Tensor, mode: Mode) -> None:
        """Raise if a tensor cannot replace the store's own in a read."""
        table = self._table
        table.check_not_sharded()
        if table.is_sharded and table.module.sparse_grad and mode != "exact" and tensor.requires_grad:
            raise ArgumentError(
                "sparse_grad: expected False, since fully_shard reduces dense gradients only; make the store with "
                "sparse_grad=False, or pass its Parameters to fully_shard as ignored_params"
            )
        table.check_size(name, tensor)

    def read(self, view: ReadView, query: Tensor, options: ReadOptions) -> tuple[Read, Tensor | None]:
        """Answer a batch of queries from a view.

        Returns:
            The read, with slots for ids, and the slots that it used, or None for all slots.
        """
        leading, rows, mode = query.shape[:-1], view.rows, options.mode
        temperature: float | Tensor = view.temperature
        if options.temperature is not None:
            pending_checks = rows.pending_checks
            temperature = check_temperature(options.temperature, leading, view.keys.device, pending_checks)
        selection, bias = self._select(rows, leading, options.where, options.exclude), None
        dtype = compute_dtype(query, view.keys, view.values)
        if options.bias is not None:
            with disable_autocast(query.device):
                bias, visible = prepare_bias(rows, options.bias, leading, dtype)
            selection = selection if visible is None else selection.hide(visible)
        if is_deferred(query):
            rows.pending_checks.check_finite("query", query)
        elif mode != "exact" or not selection.is_never_empty or is_random(options.normalizer):
            check_finite("query", query)  # otherwise the check of the scores detects a query with NaN
        tiling = Tiling.for_device(query.device)
        output_dtype = answer_dtype(query)
        narrow = tiling.can_use_bf16_matmul(view.values, output_dtype)
        with disable_autocast(query.device):
            center = compute_center(query, view.metric)
            operand = prepare_query(query, view.metric, temperature, center, dtype)
            if len(leading) != 1:
                operand = operand.reshape(-1, operand.shape[-1])
            noise = draw_noise(options.normalizer, options.generator)
            if "keys" in view.substituted:
                largest = functools.partial(largest_norm, view.keys)
            else:
                largest = functools.partial(self.largest_key_norm, rows, view.keys)
            keeps = view.at_read is not None and view.at_read.keeps
            at_read = view.at_read if keeps else None
            divisor = find_exact_divisor(query, view.keys, view.metric, temperature)
            spec = ReadSpec(
                view.metric,
                center,
                selection,
                dtype,
                largest,
                narrow,
                noise,
                bias,
                tiling,
                at_read,
                rows.pending_checks,
                output_dtype,
                divisor,
            )
            tables = Tables(view.keys, view.values, sparse=view.sparse)
            if mode == "exact":
                try:
                    read = read_exactly(operand, tables, spec, options.k, options.normalizer)
                except NonFiniteError:
                    check_finite("query", query)  # its message is more precise than that of the scores
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
        return cast_values(read, query), used

    def _read_topk(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, tables: Tables, options: ReadOptions
    ) -> tuple[Read, Tensor]:
        """Read the k best rows, and a tail sample if requested.

        Returns:
            The read, and the slots that it used.
        """
        read, found = self._read_candidates(view, query, operand, spec, tables, options.k, options.normalizer)
        used = found.slots.flatten()
        if is_sparse(options.normalizer):
            read, support_slots = self._find_support(view, read, query, operand, spec, tables, options.normalizer)
            used = torch.cat([used, *support_slots])
        if options.tail_samples:
            count, generator = options.tail_samples, options.generator
            read, sampled = self._add_tail(view, read, operand, spec, tables, count, found.recall, generator)
            used = torch.cat([used, sampled])
        if options.mode == "topk":
            self._hint_at_exact_read(spec.selection, found, options)
        return read, used

    def _hint_at_exact_read(self, selection: Selection, found: Candidates, options: ReadOptions) -> None:
        """Warn once for each option that makes a topk read cost more than an exact one."""
        (queries, k), count = found.slots.shape, selection.known_count
        rows = selection.size if count is None else count
        exact = estimate_exact_cost(rows, queries)
        cost = self.costs.estimate_candidates_cost(k, queries, rows if found.exact else 0)
        self._hints.check_cost("k", k, cost, exact)
        if options.tail_samples and cost <= exact:
            cost += self.costs.estimate_sample_cost(min(options.tail_samples, rows), queries)
            self._hints.check_cost("tail_samples", options.tail_samples, cost, exact)

    def _read_candidates(
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
        """Read the k best rows; return the read and the candidates."""
        found = self.candidates(view, query, operand, spec, k, careful=careful)
        slots, selection = found.slots, spec.selection
        complete = _find_complete(slots, selection, len(view.rows))
        is_full = found.exact and selection.is_shared and slots.shape[-1] <= (selection.known_count or 0)
        read = read_candidates(
            operand, tables, spec, slots, normalizer, complete=complete, best=found.exact, is_full=is_full
        )
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
        """Double k for each query whose candidates all have weight, up to a limit.

        Returns:
            The read, and the slots that it used in addition.
        """
        query, used = query.detach().reshape(-1, query.shape[-1]), list[Tensor]()
        width = cast(Tensor, read.ids).shape[-1]
        max_width = min(spec.selection.shared_count, max(SUPPORT_LIMIT, SUPPORT_LIMIT_PER_K * width))
        while True:
            undecided = (cast(Tensor, read.weights).detach() > 0).all(-1)  # further rows may have weight
            remaining = (undecided & read.mass.isnan()).nonzero().squeeze(-1)
            gathered = 2 * width * len(remaining) * (view.keys.shape[-1] + view.values.shape[-1])
            if len(remaining) == 0 or width >= max_width or gathered > spec.tiling.max_sparse_elements:
                return read, used
            width = min(2 * width, max_width)
            part = replace(spec, selection=spec.selection.take(remaining))
            wider, found = self._read_candidates(
                view, query[remaining], operand[remaining], part, tables, width, normalizer
            )
            used.append(found.slots.flatten())
            read = replace_queries(pad_candidates(read, width), remaining, wider)

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
        """Add a tail sample of ``count`` rows to a read of candidates.

        Returns:
            The read, and the slots of the sample.
        """
        selection = spec.selection
        if count >= selection.shared_count - cast(Tensor, read.ids).shape[-1]:
            count = selection.shared_count
        has_lists = "keys" not in view.substituted
        layout = view.index.list_layout(view.rows, view.keys.detach(), selection.size) if has_lists else None
        importance = None
        if layout is not None:
            importance = list_importance(layout, operand, spec, cast(Tensor, read.scores), read.lse)
        sample = Sample.draw(selection, count, operand.device, generator, layout, importance)
        return add_tail(read, operand, tables, spec, sample, recall), sample.slots

    def _read_within_tolerance(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, tables: Tables, options: ReadOptions
    ) -> tuple[Read, Tensor | None]:
        """Read with an ``error`` of at most the tolerance.

        Returns:
            The read, and the slots that it used, or None for all slots.
        """
        k, tolerance, generator = options.k, cast(float, options.tolerance), options.generator
        selection, query, rounds = spec.selection, query.detach().reshape(-1, query.shape[-1]), self.rounds
        candidates = max(k or 1, rounds.candidates)
        tries_sample = is_worth_trying(rounds.samples, candidates, len(query), selection.shared_count, self.costs)
        tries_sample = tries_sample and "keys" not in view.substituted
        if not (tries_sample and view.index.is_approximate(view.rows, selection, candidates, len(query))):
            read = read_exactly(operand, tables, spec, k, "softmax")
            return replace(read, error=torch.zeros_like(read.lse)), selection.shared
        best, found = self._read_candidates(view, query, operand, spec, tables, candidates, careful=True)
        read, sampled = self._add_tail(view, best, operand, spec, tables, rounds.samples, found.recall, generator)
        used = [found.slots.flatten(), sampled]
        cost = self.costs.estimate_candidates_cost(candidates, len(query), 0)
        cost += self.costs.estimate_sample_cost(rounds.samples, len(query))
        drawn = torch.full_like(cast(Tensor, read.error), rounds.samples)
        for exponent in rounds.exponents:
            remaining, excess = _find_above_tolerance(read, tolerance)
            needed = rounds.margin * drawn[remaining] * excess**exponent
            samples = choose_sample_size(needed, selection.shared_count, self.costs)
            if not samples:
                break
            some = remaining[needed <= samples]
            part = replace(spec, selection=selection.take(some))
            repeated = transform(best, lambda tensor, some=some: tensor[some])  # type: ignore[misc]
            repeated, sampled = self._add_tail(
                view, repeated, operand[some], part, tables, samples, found.recall, generator
            )
            cost += self.costs.estimate_sample_cost(samples, len(some))
            drawn[some] = samples
            read = replace_queries(read, some, repeated)
            used.append(sampled)
        remaining, _ = _find_above_tolerance(read, tolerance)
        cost += estimate_exact_cost(selection.shared_count, len(remaining))
        exact_cost = estimate_exact_cost(selection.shared_count, len(query))
        self._hints.check_cost("tolerance", tolerance, cost, exact_cost)
        if len(remaining) == 0:
            return keep_best(read, k), torch.cat(used)
        part = replace(spec, selection=selection.take(remaining))
        exact = read_exactly(operand[remaining], tables, part, None, "softmax")
        exact = rescale_to_exact(read, remaining, exact)
        return keep_best(replace_queries(read, remaining, exact), k), selection.shared

    def _select(self, rows: RowStorage, leading: torch.Size, where: Where | None, exclude: Ids | None) -> Selection:
        """Select the visible rows; cache the selection of all rows for each version."""
        if where is not None or exclude is not None:
            return select(rows, tuple(leading), where, exclude)
        version, selection_of_all = self._full_selection
        if version != rows.version or selection_of_all is None:
            selection_of_all = select(rows, (), None, None)
            self._full_selection = (rows.version, selection_of_all)
        return selection_of_all

    def largest_key_norm(self, rows: RowStorage, keys: Tensor) -> float:
        """Return an upper bound of the norms of all keys; NaN if a key holds NaN.

        The bound may include rows that have been deleted or changed since.
        """
        version, norm = self._key_norm
        if version == rows.version:
            return norm
        if self._key_nan_at == rows.version:
            return math.nan
        keys = keys.detach()
        moved = rows.all_keys_changed_at > version
        largest = torch.tensor(0.0 if moved else norm, dtype=compute_dtype(keys), device=keys.device)
        changed = rows.changed_since(version, keys=True)
        for slots in changed.split(NORM_CHUNK_ROWS) if len(changed) else ():
            part = keys[int(slots[0]) : int(slots[-1]) + 1] if moved else keys[slots]
            norms = torch.linalg.vector_norm(part, dim=-1, dtype=largest.dtype)
            largest = torch.maximum(largest, norms.amax())
        norm = float(largest)
        if math.isnan(norm):  # a cached NaN would remain after the row is deleted
            self._key_nan_at = rows.version
        else:
            self._key_norm = (rows.version, norm)
        return norm

    def candidates(
        self, view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, k: int | None, *, careful: bool = False
    ) -> Candidates:
        """Find the candidates of each query.

        Args:
            view: The rows.
            query: Queries, (..., key_dim).
            operand: Prepared queries, (B, w).
            spec: Metric and filters.
            k: Number of candidates; None for the best row.
            careful: Whether to use a larger search width.
        """
        keys = view.keys.detach()
        if k is None:
            return Candidates(backend_for(operand).exact_top_k(operand, keys, spec, 1)[1], True, 1.0)
        count = max(1, min(k, len(view.rows)))
        if "keys" in view.substituted or spec.bias is not None:  # the index searches without the bias
            found = Candidates(backend_for(operand).exact_top_k(operand, keys, spec, count)[1], True, 1.0)
        else:
            query = query.reshape(-1, query.shape[-1])
            found = view.index.search(query, operand, keys, view.rows, spec, count, careful=careful)
        return found._replace(slots=F.pad(found.slots, (0, k - found.slots.shape[-1]), value=-1))


def _find_complete(slots: Tensor, selection: Selection, rows: int) -> Tensor:  # (B, k) -> (B,)
    """Return for which queries the candidates are all visible rows."""
    count, visible = slots.shape[-1], selection.known_count
    if count >= rows or (selection.is_shared and visible is not None and count >= visible):
        return torch.ones(len(slots), dtype=torch.bool, device=slots.device)
    complete = (slots < 0).any(-1)
    if selection.is_shared and visible is None and selection.shared is not None:  # counted on the device
        complete |= selection.shared.sum() <= count
    return complete


def largest_norm(keys: Tensor) -> float:
    """Compute the largest norm of a key."""
    parts = keys.detach().split(NORM_CHUNK_ROWS)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=compute_dtype(keys)).amax() for part in parts if len(part)]
    return float(torch.stack(norms).amax()) if norms else 0.0


def _find_above_tolerance(read: Read, tolerance: float) -> tuple[Tensor, Tensor]:  # -> (b,), (b,)
    """Find the queries whose error is above the tolerance.

    Returns:
        The numbers of the queries, and their ratios of error to tolerance.
    """
    times = cast(Tensor, read.error).detach() / tolerance
    remaining = (~(times <= 1)).nonzero().squeeze(-1)
    return remaining, times[remaining]
