"""`SoftKVStore`: a table of keys and values that is read softly, hard, or by its k best rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import (
    check_dtype,
    check_finite,
    check_float_tensor,
    check_ids,
    check_positive,
    check_vector,
    describe,
)
from softdb.attributes import ModuleWithProperties
from softdb.errors import DtypeError
from softdb.filters import Where
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import IndexManager
from softdb.interop.compile import new_handle
from softdb.interop.ddp import is_asked_by_ddp, stand_in
from softdb.interop.module import FIXED, check_assigned, check_not_deleted, convert, describe_store, replace_tensor
from softdb.interop.pickling import replicated, send_copies
from softdb.interop.pruning import recompute_pruned
from softdb.interop.reads import read
from softdb.interop.state_dict import load_state
from softdb.reading.audit import Audit, compare_reads
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.reader import Reader
from softdb.reading.result import Read
from softdb.reading.staleness import OpenReads
from softdb.scoring.metrics import Metric
from softdb.snapshot.contents import contents_of, load_store
from softdb.snapshot.lock import locked
from softdb.snapshot.writer import write_snapshot
from softdb.table.access import Access
from softdb.table.config import Evict, StoreConfig
from softdb.table.invariants import check_invariants
from softdb.table.overwrites import observe_listing
from softdb.table.rows import Rows, contains, copy_rows, copy_usage
from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.table.usage import Usage, check_tracking
from softdb.table.writer import Fields, Ids, Writer
from softdb.transforms import is_active, outside_of_transforms, without_transforms

__all__ = ["SoftKVStore"]


class SoftKVStore(ModuleWithProperties):
    """A soft database: rows of keys and values, answered by a blend of the values.

    Equal, for the default metric, to::

        scores = query @ keys.T / sqrt(key_dim) / temperature     # match
        weights = softmax(scores)                                 # normalise
        output = weights @ values                                 # retrieve

    over the rows it holds, without holding more than a few megabytes of the (B, N) scores or weights.

    Args:
        key_dim: Width of queries and keys.
        value_dim: Width of values; their own space.
        metric: "dot", "scaled_dot" (q·k / √key_dim), "cosine" or "l2" (−‖q − k‖²).
        temperature: Divides the scores of every read that names no other. For a learnable one pass a tensor to
            `read`.
        trainable: Whether ``keys`` and ``values`` are Parameters; else they are buffers. Gradients reach the query
            and a tensor temperature either way.
        sparse_grad: Whether topk and hard reads give keys and values row-sparse gradients (coalesced COO, of the rows
            read), for optimisers that touch no other row: `softdb.optim.RowAdam`, `softdb.optim.RowAdagrad`,
            `torch.optim.SparseAdam`, Adagrad, SGD. Else they are dense, as every optimiser takes them. Exact reads
            give dense ones in any case.
        fields: Names of int64 fields that every row carries, for ``where``.
        index: How top-k reads find candidates: "auto", "Flat", a FAISS factory string, or an `IndexConfig`.
        capacity: The most rows that the store ever holds. Storage for them is laid out at once and never grows, so
            that optimisers and DistributedDataParallel may be built around it. Else it grows as rows come.
        evict: Which rows make room when there are more than ``capacity``; else that is an error. "oldest": those that
            `add` or `put` brought in first; replacing, updating or reviving a row makes it no younger. "lru": those
            whose last use is longest ago, of equals the one in the lowest slot. A row is used when it is added, put,
            revived, updated in key or value, and when a read counts it, as for `usage`: an exact softmax read without
            ``k`` counts none. Rows of one call never evict each other, nor those it replaces. An
            evicted row is gone as if by `delete`: its id is not handed out again, a read that used it cannot go
            backward, and its pending gradient is dropped.
        track_usage: Whether to count, for `usage`, how often and with which weight reads report each row.
        device, dtype: Of the stored tensors, as for any module.

    What ``evict`` and ``track_usage`` need to know is in ``state_dict``: a store that loads it evicts and counts on as
    the saved one would have. Activation checkpointing repeats reads, and repeated ones count again.

    Attributes:
        keys: (capacity, key_dim), in slot order.
        values: (capacity, value_dim).

        Read them, hand them to an optimiser, or write to them in place; what stands in a slot without a row means
        nothing. Writes by ``.data`` or numpy need `touch`. The store writes by ``.data`` itself: a graph of your own
        over these tensors does not notice.

    Raises:
        ArgumentError, DtypeError, FieldError: An argument is not as above.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> store.add(torch.eye(2), torch.tensor([[10.0], [20.0]]))
        tensor([0, 1])
        >>> store(torch.tensor([9.0, 0.0]))
        tensor([10.0172])
    """

    keys: Tensor
    values: Tensor
    key_dim: int
    value_dim: int
    metric: Metric
    temperature: float
    trainable: bool
    sparse_grad: bool
    capacity: int | None
    evict: Evict | None
    # Whether a `load_state_dict` that is under way refuses other names; torch does not pass it on.
    _is_strict = False

    @without_transforms
    @torch.inference_mode(False)
    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        *,
        metric: Metric = "scaled_dot",
        temperature: float = 1.0,
        trainable: bool = False,
        sparse_grad: bool = True,
        fields: Sequence[str] = (),
        index: str | IndexConfig = "auto",
        capacity: int | None = None,
        evict: Evict | None = None,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = StoreConfig(key_dim, value_dim, metric, trainable, fields, capacity, evict, track_usage)
        for name in FIXED:
            setattr(self, name, getattr(config, name))
        self.temperature, self.sparse_grad = temperature, bool(sparse_grad)
        check_dtype(dtype)
        if not isinstance(index, (str, IndexConfig)):
            raise DtypeError(
                f"index: expected 'auto', 'Flat', a FAISS factory string or an IndexConfig, got {describe(index)}"
            )
        for name, width in config.widths.items():
            table = torch.zeros(config.capacity or 0, width, device=device, dtype=dtype)
            if config.trainable:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        rows = RowStorage(config.fields, device, capacity=config.capacity or 0, evict=evict, track_usage=track_usage)
        self._open_reads = OpenReads()
        self._table = Table(self, rows, config, self._open_reads)
        self.rows = rows
        index_config = IndexConfig(index) if isinstance(index, str) else index
        self._index = IndexManager(index_config, metric, self.key_dim, moving=self.trainable)
        self._assemble()
        self._table.record_versions()

    def _assemble(self) -> None:
        """Make what works on the table and the index: of a new store, or of a copy."""
        self._table.attach(self)
        self._access = Access(self._table)
        self._writer = Writer(self._table, self._access)
        self._reader = Reader(self._table, self._access, self._index, self._open_reads)
        self._handle = new_handle(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("keys", "values") and "rows" in self.__dict__.get("_modules", ()):
            replace_tensor(self._table, name, value, super().__setattr__)
        else:
            super().__setattr__(name, check_assigned(self, name, value))

    def __delattr__(self, name: str) -> None:
        check_not_deleted(self, name)
        super().__delattr__(name)

    # -- the rows --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._access.reading(lambda: len(self.rows))

    def __bool__(self) -> bool:
        return True  # an empty store is still a store

    @without_transforms
    def __contains__(self, id: object) -> bool:
        return self._access.reading(lambda: contains(self.rows, id))

    @property
    def ids(self) -> Tensor:
        """The ids of the rows, (n,) int64, in slot order: the order of a bool ``where``. A copy."""
        if self.keys.is_meta:
            return self.rows.ids.new_empty(len(self))
        return self._access.reading(lambda: self.rows.ids[self.rows.live_slots()])

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that every row carries."""
        return self.rows.fields

    @property
    def usage(self) -> Usage:
        """How often, and with which weight, reads have reported each row since it came, or since `reset_usage`.

        Only rows in ``read.ids`` count, and those with weight in an exact read without ``k`` by any normalizer but
        softmax. By softmax all rows have weight, and such a read counts for none: pass ``k``. Hard reads count with
        weight 1. Whether gradients are recorded makes no difference.

        Raises:
            NotApplicableError: The store was made without ``track_usage=True``.
        """
        check_tracking(self.rows.track_usage, "store")
        return self._access.reading(lambda: copy_usage(self.rows))

    @without_transforms
    def reset_usage(self) -> None:
        """Count from 0 again. Which rows are evicted next stays as it is.

        Raises:
            NotApplicableError: The store was made without ``track_usage=True``.
        """
        check_tracking(self.rows.track_usage, "store")
        with self.rows.access.writing():
            self.rows.reset_usage(slice(None))

    @without_transforms
    def add(self, keys: Tensor, values: Tensor, ids: Ids | None = None, fields: Fields | None = None) -> Tensor:
        """Append rows, copying them: what is stored is cut from the graph that made it.

        In a store with ``evict``, as many rows go as have no room beside the new ones, and these take their slots.

        For gradients into the encoder that made keys and values, read the in-graph tensors with
        `softdb.functional.soft_read` and `softdb.functional.merge` that with the store's read.

        Args:
            keys: (m, key_dim), floating point.
            values: (m, value_dim), floating point.
            ids: Ids for the rows, (m,), none of them in the store; else the next m, which rise from 0 and are never
                handed out twice.
            fields: A column of m whole numbers, or one number for all, for every field of the store.

        Returns:
            The ids, (m,) int64.

        Raises:
            DuplicateIdError: An id is in the store, or is given twice.
            GrowthError: The storage would have to grow while it cannot; call `reserve` beforehand. Or past its
                ``capacity``, and there is no ``evict``.
            UnfinishedWriteError: Memory ran out once the write was recorded: do not repeat it.
            ArgumentError: There are more rows than the ``capacity``.
            ShapeError, DtypeError, DeviceError, NonFiniteError, FieldError: An argument is not as above.
        """
        return self._writer.add(keys, values, ids, fields)

    @without_transforms
    def put(self, ids: Ids, keys: Tensor, values: Tensor, fields: Fields | None = None) -> None:
        """Insert rows, or replace those whose id is in the store; copies, as `add` does.

        Args:
            ids: (m,), each once.
            keys: (m, key_dim).
            values: (m, value_dim).
            fields: A column for every field of the store.

        Raises:
            As `add`, but an id may exist.
        """
        self._writer.put(ids, keys, values, fields)

    @without_transforms
    def update(
        self, ids: Ids, keys: Tensor | None = None, values: Tensor | None = None, fields: Fields | None = None
    ) -> None:
        """Change parts of rows that exist; copies, as `add` does.

        Args:
            ids: (m,), each once and in the store.
            keys: (m, key_dim), or None to leave them.
            values: (m, value_dim), or None to leave them.
            fields: Columns for some of the fields.

        Raises:
            UnknownIdError: An id is not in the store.
            ShapeError, DtypeError, DeviceError, NonFiniteError, FieldError, DuplicateIdError: An argument is not as
                above.
        """
        self._writer.update(ids, keys, values, fields)

    @without_transforms
    def revive(self, ids: Ids, keys: Tensor, values: Tensor) -> None:
        """Let rows begin anew as other rows, under their old ids: for those that nobody reads any more.

        As `update`, and besides: their pending gradients are dropped, their `usage` starts from 0, and
        `softdb.optim.RowAdam` forgets what it remembered of them. torch's own optimisers do not: their momentum moves
        the new rows too.

        Args:
            ids: (m,), each once and in the store.
            keys: (m, key_dim); copies, as `add` makes them.
            values: (m, value_dim).

        Raises:
            UnknownIdError: An id is not in the store.
            ShapeError, DtypeError, DeviceError, NonFiniteError, DuplicateIdError: An argument is not as above.
        """
        self._writer.revive(ids, keys, values)

    @without_transforms
    def delete(self, ids: Ids) -> None:
        """Remove rows. Their ids are never handed out again, though they may be added explicitly.

        Args:
            ids: (m,), each once and in the store.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        self._writer.delete(ids)

    @without_transforms
    def get(self, ids: Ids) -> Rows:
        """The rows ``ids``, in that order, as copies cut from the graph.

        Args:
            ids: (m,), each in the store; an id may be asked for twice.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        self._table.check_not_meta()
        given = check_ids("ids", ids, repeats=True)
        check_vector("ids", given)
        return self._access.reading(lambda: copy_rows(self._table, given))

    @without_transforms
    def reserve(self, n: int) -> None:
        """Make room for ``n`` rows in all, so that the storage does not grow before.

        Call it before wrapping a trainable store in DistributedDataParallel, and before building one of torch's own
        optimisers: they lay out their state by the size of ``keys`` and ``values``.

        Raises:
            GrowthError: A graph over the present storage is alive, or ``n`` is more than the store's ``capacity``.
        """
        self._writer.reserve(n)

    @without_transforms
    def touch(self, ids: Ids) -> None:
        """Say that you wrote the rows' tensors yourself, as in ``store.keys.data[...] = ...``.

        Writes through the store and optimiser steps need no such word.

        Args:
            ids: (m,), each in the store.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        self._writer.touch(ids)

    # -- reading ---------------------------------------------------------------------------------------------

    def forward(self, query: Tensor, **options: Any) -> Tensor:
        """``read(query, **options).values``."""
        return self.read(query, **options).values

    def read(
        self,
        query: Tensor,  # (..., key_dim)
        mode: Mode = "exact",
        k: int | None = None,
        where: Where | None = None,
        exclude: Tensor | None = None,  # (..., m)
        temperature: float | Tensor | None = None,
        normalizer: str = "softmax",
        tail_samples: int = 0,
        tolerance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Read:
        """Answer a batch of queries.

        ========  ================================================================================================
        exact     ``softmax(scores) @ values`` over every live row that the filters allow; ``lse`` over them all
        topk      the same over the k best rows, found by the index and scored anew from the live keys; with
                  ``tail_samples`` or a ``tolerance``, an estimate of the exact answer
        hard      ``values[argmax(scores)]``, by an exact search: weight 1, gradient to that row's value only, lse
                  the top score
        ========  ================================================================================================

        Ties go to the row in the lowest slot. Where there is nothing to read (an empty store, every row filtered)
        values are 0, ids -1, lse -inf and mass 0, and gradients are 0.

        Memory beyond the result: a few megabytes for exact and hard; in topk mode the k gathered rows of each query,
        and with a sparse normalizer in exact mode all rows that have weight.

        Under torch.compile a read is one operator of the graph; a callable ``where``, a sample, a tolerance, and a
        sparse normalizer in topk mode break the graph. Rows are written outside of graphs. Gradients of the rows are
        dense where a graph reads one store more than once. torch.export takes the same reads; the exported program
        reads this very store, as long as it lives in its process and its rows stay the same.

        `torch.func.vmap`, ``grad``, ``vjp`` and ``jacrev`` go through, nested as you like, and so do gradients for each
        sample by ``functional_call``. vmap makes one read of all samples, unless each has its own rows, a ``where``
        of its own or a callable one. Writes within a transform store plain numbers, but not those of each sample.

        Args:
            query: What is looked for, (..., key_dim), floating point.
            mode: "exact", "topk" or "hard".
            k: In topk mode the number of candidates. In exact mode how many of the best rows to report besides.
            where: Which rows may be seen: a bool tensor in the order of ``store.ids``; an int64 tensor of ids; or a
                callable ``where(row) -> bool tensor``, where ``row["id"]`` and ``row["field"]`` are int64, (C,) for a
                block of rows or (B, C) for candidates of the B flattened queries, and the result broadcasts to
                (B, C). Join conditions with & and |, as for any bool tensors.
            exclude: Ids that each query may not see, (..., m) int64; -1 is padding. An id that is not in the store
                hides nothing.
            temperature: Divides the scores instead of the store's: a number above 0, or a tensor, with gradient,
                broadcastable to the query's leading shape.
            normalizer: From scores to weights, over the rows considered: "softmax"; "straight_through": hard forward,
                soft backward; "gumbel": the same for scores with noise, so that a row is drawn by its weight, and
                ``scores`` and ``lse`` are those with noise, but in eval mode (``store.eval()``) "straight_through",
                which ``read.normalizer`` says; "sparsemax" or "entmax15": weights that are 0 for all but
                some of the best rows. In topk mode k is doubled while it is too small for those of some query, up to
                16 times or 1,024: ``mass`` is 1 where all of them are known to be candidates, and NaN elsewhere, so
                wherever the search was approximate. In exact mode they are gathered, and too many are an ArgumentError.
                See `softdb.scoring.normalizers`.
            tail_samples: In topk mode, how many rows to sample for what the candidates leave out; with as many as there
                are, the read is exact. Then ``weights`` and ``mass`` are of the estimated softmax over all allowed
                rows, ``lse`` is its estimate, and ``error`` tells how far ``values`` may be off: the norm of the
                difference from the exact answer, in parts of that answer's, is below it in nine of ten cases, as
                docs/approximation.md explains. The sample is the same for the whole batch, stratified by the index's
                lists; the gradient reaches its rows too, each standing for many.
            tolerance: In topk mode, the ``error`` that no query's may surpass, as 0.05: the candidates, the lists
                visited and the sample are chosen for it, and queries that they do not serve, or that cost more so, are
                read exactly, with error 0; the gradients of rows are dense then. Rows are reported if there is a ``k``,
                which costs as much again where the read is exact.
            generator: What "gumbel" and the sample are drawn from; torch's own if None. In eval mode, where "gumbel"
                draws nothing, it is left as it is.

        Returns:
            A `Read`.

        Raises:
            ArgumentError: A mode does not use an argument that was given, or it is out of range.
            ShapeError, DtypeError, DeviceError, NonFiniteError, UnknownIdError: An argument is not as above.
            StaleReadError: In backward, if a row that the read used was changed in between. Appending rows is fine,
                unless it evicts one of those.
            SecondDerivativeError: In a second derivative of an exact read, or of any read under torch.func.
            TransformError: In forward mode (jvp, jacfwd, hessian), or for a read that draws random numbers in a vmap
                whose ``randomness`` is "error".

        Source: Vaswani et al. 2017 (arXiv 1706.03762); the top-k softmax of Rae et al. 2016 (arXiv 1610.09027).
        """
        return read(self, query, mode, k, where, exclude, temperature, normalizer, tail_samples, tolerance, generator)

    @without_transforms
    @torch.no_grad()
    def audit(
        self,
        queries: Tensor,  # (..., key_dim)
        k: int,
        where: Where | None = None,
        exclude: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Audit:
        """Compare top-k reads of ``queries`` with exact ones: what the index misses, and what k leaves out.

        It costs an exact read with ``k``, and counts for no `usage`.

        Args:
            queries: (..., key_dim), like those that will be asked.
            k: The number of candidates.
            where: As for `read`.
            exclude: As for `read`.
            temperature: As for `read`.

        Returns:
            An `Audit`.

        Raises:
            As `read`.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> ids = store.add(torch.eye(4), torch.ones(4, 2))
            >>> print(store.audit(torch.eye(4), k=1))
            4 queries, k = 1: recall 1.0000 (lowest 1.00), mass 0.3547, error 0.0000
        """
        self._table.check_not_meta()
        k = check_positive("k", k)
        check_float_tensor("queries", queries, (-1, self.key_dim), self.keys.device)
        check_finite("queries", queries)
        recompute_pruned(self)
        exact, found = self._reader.run_both(queries, ReadOptions("topk", k, where, exclude, temperature))
        return compare_reads(exact, found, k)

    # -- the index -------------------------------------------------------------------------------------------

    @without_transforms
    def build_index(self) -> None:
        """Build the index of top-k reads from the rows as they are, whatever it was before.

        Reads do so by themselves when it is due; call it to choose the moment. Where the configuration says that
        searches are exact ("Flat", or "auto" with few rows) there is nothing to build.

        Raises:
            IndexBuildError: FAISS refuses, or memory runs out; reads search exactly.
        """
        self._table.check_not_meta()
        with self.writing():
            self._index.build(self.rows, self.keys.detach())

    @without_transforms
    def refresh(self, *, wait: bool = False) -> None:
        """Take the pending rows into the index, so that no search has to go through them.

        Args:
            wait: With ``IndexConfig(background=True)``, whether to wait for a build under way, and use it.

        Raises:
            IndexBuildError: The last build failed, in the background or in a read, and this has not been said yet.
        """
        self._table.check_not_meta()
        with self.writing():
            self._index.refresh(self.rows, self.keys.detach(), wait=bool(wait))

    def index_stats(self) -> IndexStats:
        """What the index is and what it has cost so far.

        ``factory`` is "Flat" as long as there are fewer rows than the configured index needs.
        """
        self._table.check_not_meta()
        return self._access.reading(lambda: self._index.stats(self.rows, self.keys.detach()))

    # -- saving and loading ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, timeout: float = 0.0) -> None:
        """Write the store to the directory ``path``, so that it holds the whole of it, durably, or is left as it was.

        Rows, ids, fields, usage and settings; tensors in safetensors files, each with its hash. The index is not
        saved: the loaded store builds its own. Nor are gradients and optimiser states: they belong to a checkpoint of
        yours. The rows are not copied on the way.

        Args:
            path: A directory; made if it does not exist, but not those above it. A snapshot that it holds is replaced
                once the new one is complete, so there must be room for both. Give it a directory of its own: a
                ``manifest.json`` of another program is replaced, too.
            timeout: How many seconds to wait while somebody else saves to it.

        Raises:
            LockedError: Somebody else was saving for longer than that.
            OSError: The system refuses; the snapshot that was there, and the store, are as they were.
            UnsupportedSystemError: The system has no POSIX files and locks.
            ArgumentError, DtypeError: An argument is not as above.

        Example:
            >>> import tempfile, torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> ids = store.add(torch.eye(4), torch.ones(4, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store.save(folder)
            ...     len(SoftKVStore.load(folder))
            4
        """
        self._table.check_not_meta()
        with locked(path, timeout) as directory:  # until then, writes of rows go on
            self._access.reading(lambda: write_snapshot(directory, *contents_of(self._table, self._index.config)))

    @classmethod
    @without_transforms
    @torch.inference_mode(False)
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        mmap: bool = False,
        verify: bool = False,
        device: torch.device | str | None = None,
    ) -> SoftKVStore:
        """The store that was saved to the directory ``path``, with the same settings.

        Every byte is compared with its hash; nothing in the directory is executed, and no link is followed.

        Args:
            path: What `save` wrote.
            mmap: Leave keys and values in their files, which the system reads as they are looked at: for a look at a
                few rows, or more of them than memory holds. The store is read-only until `materialize`, and its keys
                and values have no gradients. Others may save to the path meanwhile, but a file that is cut short, or
                a disk that fails, ends the process at the next look (SIGBUS).
            verify: With ``mmap``, whether to read keys and values once, to compare them with their hashes. Without
                ``mmap`` that is always done.
            device: Where the store shall lie.

        Raises:
            FileNotFoundError: There is no snapshot.
            CorruptSnapshotError: The snapshot is not what was saved; names the file and the tensor.
            ArgumentError: It was made by a newer softdb, or is to be mapped on a ``device`` that is not the CPU.
            DeviceError: There is no such ``device`` here, or none that holds numbers.
            OSError, MemoryError: It cannot be read, or does not fit, which says nothing against it.
            UnsupportedSystemError: The system has no POSIX files and locks.

        Example:
            >>> import tempfile, torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> ids = store.add(torch.eye(4), torch.ones(4, 2))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store.save(folder)
            ...     mapped = SoftKVStore.load(folder, mmap=True)
            ...     mapped(torch.ones(4))
            tensor([1., 1.])
        """
        store: SoftKVStore = load_store(cls, path, mmap=mmap, verify=verify, device=device)
        return store

    @without_transforms
    def materialize(self) -> None:
        """Copy the rows of a store that was loaded with ``mmap=True`` into memory: it may be written to from then on.

        ``keys`` and ``values`` stay the same objects. Any other store is left as it is.
        """
        self._writer.materialize()

    # -- many readers, one writer ----------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let no other thread read until the block ends, so that all that is written in it is seen at once.

        Reads in several threads, beside one that writes by `add`, `put`, `update`, `revive`, `delete` or a step of
        softdb's optimisers, each answer from one version of the store, whole, without this. It is for what the store
        cannot see coming: writes of your own to ``keys`` and ``values``, steps of torch's optimisers, and several
        writes that belong together. A ``backward`` belongs to the thread that writes: it looks at the rows again.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> with store.writing():  # readers see both or none
            ...     old = store.add(torch.eye(4), torch.ones(4, 2))
            ...     store.delete(old[:2])
        """
        with self._access.writing():
            yield

    def _check(self) -> None:
        """Raise a RuntimeError that names what is not as it has to be, if anything: for tests."""
        self._access.reading(lambda: check_invariants(self._table, self._index.invariants(self.rows)))

    # -- module conventions ----------------------------------------------------------------------------------

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; DistributedDataParallel finds a stand-in with the same Parameters and no rows' buffers.

        It would overwrite those of each process with the first one's before every forward, and expects row-sparse
        gradients of embeddings only.
        """
        with outside_of_transforms() if is_active() else nullcontext():
            observe_listing(self._table)
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if (module is not self and module is not self.rows) or not is_asked_by_ddp():
                yield name, module
            elif module is self:
                yield name, stand_in(self, sparse=self.trainable and self.sparse_grad)

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        return describe_store(self, self._index.config.factory)

    @without_transforms
    def _apply(self, fn: Any, recurse: bool = True) -> SoftKVStore:
        with self._access.exclusive():
            convert(self._table, fn, lambda: super(SoftKVStore, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load rows and what is known of their use, all of it or nothing.

        Counters (``rows.reads``, ``rows.weight``) and eviction clocks (``rows.used_at``, ``rows.added_at``) that
        ``state_dict`` lacks start from 0; equally old rows are evicted in slot order. They are reported as missing, and
        those that this store does not keep as unexpected, which is an error where ``strict``. Where rows cannot be
        loaded, ``keys`` and ``values`` are among the missing ones.

        Args:
            state_dict: What ``state_dict()`` of a store returned.
            strict: Whether names that are missing or unexpected are an error; then nothing is loaded. As part of
                another module, rows are loaded before that error is raised.
            assign: As for any module.

        Returns:
            The missing and the unexpected names, as for any module.

        Raises:
            RuntimeError: ``strict``, and names differ.
            ArgumentError, DtypeError, ShapeError, NonFiniteError, DuplicateIdError: A tensor is not one of a store.
            GrowthError: The storage would have to change its size while it cannot.
        """
        with self.rows.access.writing():
            self._is_strict = bool(strict)
            try:
                return super().load_state_dict(state_dict, strict=strict, assign=assign)
            finally:
                self._is_strict = False

    def _save_to_state_dict(self, *args: Any) -> None:
        observe_listing(self._table)
        self._access.reading(lambda: super(SoftKVStore, self)._save_to_state_dict(*args))

    @without_transforms
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        assigns = local_metadata.get("assign_to_params_buffers", False)
        with self._access.changing("load_state_dict", allows_meta=assigns, loads=True):
            load = super()._load_from_state_dict
            load_state(self._table, load, self._is_strict, state_dict, prefix, local_metadata, *args)

    def _replicate_for_data_parallel(self) -> Any:
        return replicated(self, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        with self.writing():  # nothing is left unfinished
            pass
        made = ("_access", "_writer", "_reader", "_handle")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        return state | {"_table": copy.copy(self._table)}  # which refers to its own store

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._assemble()
        self._table.record_versions()

    @without_transforms
    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> SoftKVStore:
        """A copy of one version of the rows, whoever writes meanwhile."""
        with self.writing():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            copied.rows.average.begin(self._table, copied.rows.tenants)
        return copied

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        send_copies(cls)


send_copies(SoftKVStore)
