"""`SoftKVStore`: a table of keys and values that is read softly, hard, or by its k best rows."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from softdb._checks import (
    check_above_zero,
    check_choice,
    check_dense,
    check_dtype,
    check_finite,
    check_float_tensor,
    check_ids,
    check_not_meta,
    check_positive,
    check_vector,
    describe,
    is_out_of_memory,
)
from softdb.attributes import ModuleWithProperties
from softdb.errors import (
    ArgumentError,
    CorruptSnapshotError,
    DeviceError,
    DtypeError,
    GrowthError,
    NotApplicableError,
    ReadOnlyError,
    ShapeError,
    SoftDBError,
    TransformError,
)
from softdb.filters import Where
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import IndexManager
from softdb.interop.compile import count_read, new_handle, read_in_graph
from softdb.interop.ddp import has_company, is_asked_by_ddp, is_within_ddp, stand_in, with_sparse_gradient
from softdb.interop.transformed import fold_no_samples, fold_queries, without_wrapped_tensors
from softdb.reading.audit import TIE, Audit
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.reader import Reader, ReadView
from softdb.reading.result import Read, answer_of, best_of, leaves_of, read_of
from softdb.reading.staleness import OpenReads
from softdb.scoring.metrics import METRICS, Metric
from softdb.scoring.normalizers import in_eval_mode
from softdb.snapshot.lock import locked
from softdb.snapshot.reader import read_snapshot
from softdb.snapshot.state import check_state
from softdb.snapshot.writer import write_snapshot
from softdb.table.averages import averaged_by_id
from softdb.table.gradients import is_sharded
from softdb.table.hooks import unwatched, watch
from softdb.table.journal import RESIZED, WRITTEN, Growth, Journal, WriteBatch, WritePlan
from softdb.table.slots import place_of, resized
from softdb.table.storage import NO_SLOTS, RowStorage
from softdb.table.tensors import (
    check_own,
    check_size,
    check_whole,
    forget_gradients,
    grown,
    lent_of,
    only_lends,
    put_rows,
    swap_storage,
)
from softdb.transforms import (
    Answer,
    Operands,
    check_no_tangent,
    is_active,
    is_forward_mode,
    is_traced,
    is_wrapped,
    outside_of_transforms,
    plain,
    read_opaquely,
    without_transforms,
)
from softdb.version import __version__

__all__ = ["Evict", "Rows", "SoftKVStore", "Usage"]


Evict = Literal["lru", "oldest"]


EVICTIONS = ("lru", "oldest")


Ids = Tensor | Sequence[int]


Fields = Mapping[str, Tensor | Sequence[int] | int]


# What a snapshot says of a store, beside its fields and its index.
SETTINGS = ("key_dim", "value_dim", "metric", "temperature", "trainable", "sparse_grad", "capacity", "evict")


# What cannot be assigned once the store is made: its tensors and its index are laid out by them.
FIXED = ("key_dim", "value_dim", "metric", "trainable", "capacity", "evict")


# What `load` leaves in its files: what only a look at rows, or an optimiser, wants to know.
MAPPED = ("keys", "values", "rows.generation")


# A read tries so many times to find nobody writing, before it keeps others from doing so.
ATTEMPTS = 3


# Under which name torch saves what a subclass adds by `get_extra_state`.
EXTRA_STATE = "_extra_state"


T = TypeVar("T")


P = ParamSpec("P")


def _writes(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a store that changes rows: one at a time, and while nobody reads."""

    @_alone
    @functools.wraps(method)
    def allowed(*args: P.args, **kwargs: P.kwargs) -> T:
        store = cast("SoftKVStore", args[0])
        if method.__name__ not in ("reserve", "_load_from_state_dict"):  # which lay out tensors, or assign others
            store._check_not_meta()
        if store._is_mapped:
            name = "load_state_dict" if method.__name__ == "_load_from_state_dict" else method.__name__
            raise ReadOnlyError(
                f"{name}: expected a store in memory, but its rows lie in the files of a snapshot, which are not "
                "written to; call store.materialize() first"
            )
        check_own(store._tables(), store.rows)
        return method(*args, **kwargs)

    return allowed


def _alone(method: Callable[P, T]) -> Callable[P, T]:
    """A method of a store that runs while no other thread reads or writes."""
    is_loading = method.__name__ == "_load_from_state_dict"

    @without_transforms
    @functools.wraps(method)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        store = cast("SoftKVStore", args[0])
        store._check_not_wrapped()
        with store.rows.access.writing(), torch.inference_mode(False):
            if is_loading:  # which mends what something else has overwritten
                store._recover()
            else:
                store._catch_up()
            return method(*args, **kwargs)

    return alone


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as `SoftKVStore.get` returns them: copies, in the order asked for.

    Attributes:
        keys: (m, key_dim).
        values: (m, value_dim).
        fields: Field name to int64 (m,).
    """

    keys: Tensor
    values: Tensor
    fields: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Usage:
    """How the rows have been read, as `SoftKVStore.usage` returns it: copies, in the order of ``store.ids``.

    Attributes:
        reads: (n,) int64: how many queries were told of the row: how many times its id stood in ``read.ids``, or it had
            weight in an exact read without ``k``.
        weight: (n,) float64: the sum of its weights there.
    """

    reads: Tensor
    weight: Tensor


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
    temperature: float
    # Whether a `load_state_dict` that is under way refuses other names; torch does not pass it on.
    _is_strict = False
    # Whether FSDP2 has put shards in the place of the tables, which it exchanges for whole ones in a forward.
    _is_sharded = False
    # Of rows in the files of a snapshot: the tables that get no gradient once they are materialized.
    _frozen_in_files: tuple[str, ...] = ()

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
        self.key_dim = check_positive("key_dim", key_dim)
        self.value_dim = check_positive("value_dim", value_dim)
        check_choice("metric", metric, METRICS)
        self.metric = metric
        self.temperature = temperature
        check_dtype(dtype)
        if not isinstance(index, (str, IndexConfig)):
            raise DtypeError(
                f"index: expected 'auto', 'Flat', a FAISS factory string or an IndexConfig, got {describe(index)}"
            )
        self.capacity = None if capacity is None else check_positive("capacity", capacity)
        if evict is not None:
            check_choice("evict", evict, EVICTIONS)
            if capacity is None:
                raise ArgumentError(f"evict: expected a capacity beside {evict!r}, got none; pass capacity=...")
        self.evict = evict
        self.trainable = bool(trainable)
        self.sparse_grad = bool(sparse_grad)
        for name, width in (("keys", self.key_dim), ("values", self.value_dim)):
            table = torch.zeros(self.capacity or 0, width, device=device, dtype=dtype)
            if self.trainable:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        self.rows = RowStorage(fields, device=device, evict=evict, track_usage=bool(track_usage))
        if self.capacity is not None:
            self.rows.resize(self.capacity)
        config = IndexConfig(index) if isinstance(index, str) else index
        self._index = IndexManager(config, metric, self.key_dim, moving=self.trainable)
        self._reader = Reader()
        self._open_reads = OpenReads()
        self._journal = Journal()
        self._is_mapped = False  # the rows lie in the files of a snapshot
        self._has_warned = False  # of keys that were written to unnoticed
        self._handle = new_handle(self)
        self._record_versions()
        self._watch()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("keys", "values") and "rows" in self.__dict__.get("_modules", ()):
            self._replace_table(name, value)
            return
        if name == "temperature":
            value = plain(name, value)
            if isinstance(value, Tensor) and value.requires_grad:
                raise DtypeError(
                    "temperature: expected a number, got a tensor that requires grad; pass it to read(temperature=...)"
                )
            value = check_above_zero(name, value)
        elif name in FIXED and name in self.__dict__:
            own = self.__dict__[name]
            if type(value) is not type(own) or value != own:
                raise ArgumentError(
                    f"{name}: expected {own!r}, which the store was made with, got {describe(value)}; make another "
                    f"store with {name}=..."
                )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        # Torch would fail a step later, and leave the store without them.
        if name in ("keys", "values") and name not in self.__dict__:
            raise ArgumentError(
                f"{name}: expected to stay, since torch.nn.utils.parametrize cannot name a tensor {name!r}, and FSDP1 "
                "cannot flatten it; lend other tensors with torch.func.functional_call, or use fully_shard"
            )
        super().__delattr__(name)

    # -- the table -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._reading(lambda: len(self.rows))

    def __bool__(self) -> bool:
        return True  # an empty store is still a store

    @without_transforms
    def __contains__(self, id: object) -> bool:
        if isinstance(id, Tensor) and id.numel() == 1:
            id = id.item()
        if isinstance(id, bool) or not hasattr(id, "__index__"):
            return False
        number = id.__index__()
        wanted = torch.tensor([number], device="cpu") if 0 <= number < 2**63 else None
        return wanted is not None and self._reading(lambda: int(self.rows.find(wanted)) >= 0)

    @property
    def ids(self) -> Tensor:
        """The ids of the rows, (n,) int64, in slot order: the order of a bool ``where``. A copy."""
        if self.keys.is_meta:
            return self.rows.ids.new_empty(len(self))
        return self._reading(lambda: self.rows.ids[self.rows.live_slots()])

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
        self._check_tracking()
        if self.keys.is_meta:
            return Usage(self.rows.reads.new_empty(len(self)), self.rows.weight.new_empty(len(self)))

        def copied() -> Usage:
            slots = self.rows.live_slots()
            with self.rows.access.alone:
                return Usage(self.rows.reads[slots], self.rows.weight[slots])

        return self._reading(copied)

    @without_transforms
    def reset_usage(self) -> None:
        """Count from 0 again. Which rows are evicted next stays as it is.

        Raises:
            NotApplicableError: The store was made without ``track_usage=True``.
        """
        self._check_tracking()
        with self.rows.access.writing():
            self.rows.forget_usage(slice(None))

    def _check_tracking(self) -> None:
        if not self.rows.track_usage:
            raise NotApplicableError(
                "track_usage: expected True to know how rows are used, got False; make the store with track_usage=True"
            )

    @_writes
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
        stored_keys, stored_values = self._check_rows(keys, values)
        if ids is None:
            new = self.rows.new_ids(len(keys))
        else:
            new = check_ids("ids", ids)
            self._check_count(new, len(keys))
            self.rows.check_new(new)
        columns = self.rows.check_fields(fields, len(keys), complete=True)
        added = new.to(self.keys.device)  # now: afterwards an error would not say that the rows are there
        leaving, growth = self._admit(new)
        self._write(WriteBatch(new, NO_SLOTS, leaving, stored_keys, stored_values, columns), growth)
        return added

    @_writes
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
        given = check_ids("ids", ids)
        stored_keys, stored_values = self._check_rows(keys, values)
        self._check_count(given, len(keys))
        columns = self.rows.check_fields(fields, len(given), complete=True)
        slots = self.rows.find(given)
        self.rows.check_new(given[slots < 0])
        # Those that are replaced come first, and the new ones after them.
        order = (slots < 0).to(torch.int8).argsort(stable=True)
        slots, given = slots[order], given[order]
        there = place_of(order.to(stored_keys.device))
        replaced = slots[slots >= 0]
        leaving, growth = self._admit(given[len(replaced) :], replaced)
        columns = {name: column if column.dim() == 0 else column[order] for name, column in columns.items()}
        new = given[len(replaced) :]
        self._write(WriteBatch(new, replaced, leaving, stored_keys[there], stored_values[there], columns), growth)

    @_writes
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
        given = check_ids("ids", ids)
        stored_keys = None if keys is None else self._check_table("keys", keys, self.keys)
        stored_values = None if values is None else self._check_table("values", values, self.values)
        for table in (stored_keys, stored_values):
            if table is not None:
                self._check_count(given, len(table))
        columns = self.rows.check_fields(fields, len(given), complete=False)
        slots = self.rows.slots_of("ids", given)
        if keys is None and values is None and not columns:
            return
        self._write(WriteBatch(slots=slots, keys=stored_keys, values=stored_values, fields=columns))

    @_writes
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
        given = check_ids("ids", ids)
        stored_keys, stored_values = self._check_rows(keys, values)
        self._check_count(given, len(keys))
        slots = self.rows.slots_of("ids", given)
        self._write(WriteBatch(slots=slots, keys=stored_keys, values=stored_values, afresh=True))

    @_writes
    def delete(self, ids: Ids) -> None:
        """Remove rows. Their ids are never handed out again, though they may be added explicitly.

        Args:
            ids: (m,), each once and in the store.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        given = check_ids("ids", ids)
        self._write(WriteBatch(leaving=self.rows.slots_of("ids", given)))

    @without_transforms
    def get(self, ids: Ids) -> Rows:
        """The rows ``ids``, in that order, as copies cut from the graph.

        Args:
            ids: (m,), each in the store; an id may be asked for twice.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        self._check_not_meta()
        given = check_ids("ids", ids, repeats=True)
        check_vector("ids", given)

        def copied() -> Rows:
            slots = self.rows.slots_of("ids", given).to(self.keys.device)
            check_whole(self._tables())
            row = self.rows.view(slots)
            fields = {name: row[name] for name in self.rows.fields}
            return Rows(self.keys.detach()[slots], self.values.detach()[slots], fields)

        return self._reading(copied)

    @_writes
    def reserve(self, n: int) -> None:
        """Make room for ``n`` rows in all, so that the storage does not grow before.

        Call it before wrapping a trainable store in DistributedDataParallel, and before building one of torch's own
        optimisers: they lay out their state by the size of ``keys`` and ``values``.

        Raises:
            GrowthError: A graph over the present storage is alive, or ``n`` is more than the store's ``capacity``.
        """
        growth = self._growth_to(check_positive("n", n), exactly=True)
        if growth is not None:
            self._resize(growth)

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
        keys = self.keys
        if keys.is_meta or self.rows.ids.is_meta:
            self._check_not_meta()
        if torch._C._get_tracing_state() is not None:
            raise TransformError(
                "query: expected no torch.jit.trace around a read, since it would keep the rows as they are now; use "
                "torch.compile or torch.export"
            )
        if torch.compiler.is_dynamo_compiling() or is_traced(query):
            return read_in_graph(
                self,
                query,
                mode=mode,
                k=k,
                where=where,
                exclude=exclude,
                temperature=temperature,
                normalizer=normalizer,
                tail_samples=tail_samples,
                tolerance=tolerance,
                generator=generator,
            )
        if is_active():
            return self._read_under_transform(
                query,
                mode=mode,
                k=k,
                where=where,
                exclude=exclude,
                temperature=temperature,
                normalizer=normalizer,
                tail_samples=tail_samples,
                tolerance=tolerance,
                generator=generator,
            )
        if is_forward_mode():
            check_no_tangent(query, self.keys, self.values, temperature)
        options = ReadOptions(mode, k, where, exclude, temperature, normalizer, tail_samples, tolerance, generator)
        check_float_tensor("query", query, (-1, self.key_dim), keys.device)
        if not self.training:
            options = replace(options, normalizer=in_eval_mode(normalizer))

        def answered() -> Read:
            read = self._answer(query, options)
            if read.ids is None or read.weights is None:
                return read
            count_read(self.rows, read.ids, read.weights)
            if options.mode == "exact" and options.k is None:
                return best_of(read, None)
            return replace(read, ids=self.rows.ids_at(read.ids))

        return self._reading(answered, query if mode == "topk" else None, options.k)

    def _read_under_transform(self, query: Tensor, **options: Any) -> Read:
        """`read` while a transform of torch.func is active."""
        normalizer, generator = options["normalizer"], options["generator"]
        ReadOptions(**options)
        keys, values = self.keys, self.values
        check_float_tensor("query", query, (-1, self.key_dim), keys.device)
        if is_wrapped(*self.rows.buffers()):
            raise TransformError(
                "rows: expected the store's own buffers, got some that a transform of torch.func wraps; pass "
                "functional_call the Parameters only"
            )
        if callable(options["where"]):
            options["where"] = without_wrapped_tensors(options["where"])
        random = "batch" if options["tail_samples"] or options["tolerance"] is not None else ""
        if normalizer == "gumbel" and self.training:
            random = "queries"
        names = [name for name in ("temperature", "where", "exclude") if isinstance(options[name], Tensor)]
        given = [options[name] if name in names else None for name in ("temperature", "where", "exclude")]
        if not random and not is_wrapped(query, keys, values, *given):
            with outside_of_transforms():
                return self.read(query, **options)
        is_lent = is_wrapped(keys, values)

        def run(operands: Operands, wanted: list[bool]) -> Answer:
            own = leaves_of(operands, [want and (is_lent or place not in (1, 2)) for place, want in enumerate(wanted)])
            own_query, own_keys, own_values, *rest = cast("list[Tensor]", own)
            store = _LentStore(self, own_keys, own_values) if is_lent else self
            arguments = dict(zip(("temperature", "where", "exclude"), rest, strict=False))
            read = SoftKVStore.read(store, own_query, **options | {name: arguments[name] for name in names})
            return answer_of(read, own)

        fold = fold_no_samples if callable(options["where"]) else fold_queries
        operands = [query, keys, values, *given]
        return read_of(*read_opaquely(run, fold, operands, random=random, generator=generator, sparse=not is_lent))

    def _answer(self, query: Tensor, options: ReadOptions) -> Read:
        """What `read` returns, with slots for ids; nobody counts it. The query has been checked."""
        self._recompute_pruned()
        keys, values = self.keys, self.values
        lent = lent_of({"keys": keys, "values": values}, self.rows)
        for name, table in lent.items():
            self._check_lent(name, table, options.mode)
        # What made a lent tensor from others may take no row-sparse gradient.
        sparse = self.trainable and self.sparse_grad and keys.is_leaf and values.is_leaf
        if sparse and is_within_ddp():
            keys, values = with_sparse_gradient(keys), with_sparse_gradient(values)
        view = ReadView(self.rows, keys, values, frozenset(lent), self._index, self.metric, self.temperature, sparse)
        read, used = self._reader.read(view, query, options)
        return self._open_reads.attach(read, self.rows, used, list(lent.values()))

    # -- the index -------------------------------------------------------------------------------------------

    @without_transforms
    def build_index(self) -> None:
        """Build the index of top-k reads from the rows as they are, whatever it was before.

        Reads do so by themselves when it is due; call it to choose the moment. Where the configuration says that
        searches are exact ("Flat", or "auto" with few rows) there is nothing to build.

        Raises:
            IndexBuildError: FAISS refuses, or memory runs out; reads search exactly.
        """
        self._check_not_meta()
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
        self._check_not_meta()
        with self.writing():
            self._index.refresh(self.rows, self.keys.detach(), wait=bool(wait))

    @_writes
    def touch(self, ids: Ids) -> None:
        """Say that you wrote the rows' tensors yourself, as in ``store.keys.data[...] = ...``.

        Writes through the store and optimiser steps need no such word.

        Args:
            ids: (m,), each in the store.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        given = check_ids("ids", ids, repeats=True)
        check_vector("ids", given)
        slots = self.rows.slots_of("ids", given).unique()
        self._journal.commit(functools.partial(self.rows.mark_changed, slots), WRITTEN)

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
        self._check_not_meta()
        k = check_positive("k", k)
        check_float_tensor("queries", queries, (-1, self.key_dim), self.keys.device)
        check_finite("queries", queries)

        def both() -> list[Read]:
            modes: tuple[Mode, ...] = ("exact", "topk")
            return [self._answer(queries, ReadOptions(mode, k, where, exclude, temperature)) for mode in modes]

        exact, found = self._reading(both, queries, k)
        best, scores = cast(Tensor, exact.scores), cast(Tensor, found.scores)
        there = best > -torch.inf
        # The worst of the k best; rows that tie with it, but for rounding, are as good.
        worst = best.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
        hits = ((scores >= worst - TIE * worst.abs()) & (scores > -torch.inf)).sum(-1)
        count = there.sum(-1)
        recall = torch.where(count > 0, hits.clamp(max=count) / count.clamp(min=1), 1.0)
        total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
        mass = (scores - total).exp().sum(-1).clamp(max=1.0)
        apart = torch.linalg.vector_norm((found.values - exact.values).double(), dim=-1)
        size = torch.linalg.vector_norm(exact.values.double(), dim=-1)
        error = torch.where(apart > 0, apart / size, 0.0)
        return Audit(k, recall.double(), mass.double(), error)

    def index_stats(self) -> IndexStats:
        """What the index is and what it has cost so far.

        ``factory`` is "Flat" as long as there are fewer rows than the configured index needs.
        """
        self._check_not_meta()
        return self._reading(lambda: self._index.stats(self.rows, self.keys.detach()))

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
        self._check_not_meta()
        with locked(path, timeout) as directory:  # until then nobody waits who wants to write rows
            self._reading(lambda: write_snapshot(directory, *self._contents()))

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a snapshot holds of the store."""
        used = self.rows.used
        check_whole(self._tables())
        tensors = {"keys": self.keys.detach()[:used], "values": self.values.detach()[:used]}
        with self.rows.access.alone:  # readers in other threads count on
            tensors |= {f"rows.{name}": getattr(self.rows, name)[:used].clone() for name in self.rows.columns}
        tensors |= {"rows.ids": self.rows.ids[:used], "rows.next_id": self.rows.next_id}
        description = {name: getattr(self, name) for name in SETTINGS}
        description |= {"fields": list(self.fields), "index": asdict(self._index.config)}
        description |= {"track_usage": self.rows.track_usage, "rows": len(self), "softdb": __version__}
        if self._frozen:  # snapshots without it say that all is as trainable as the store
            description["frozen"] = list(self._frozen)
        return tensors, description

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
        if mmap and device is None:
            device = "cpu"  # whatever torch\'s default is
        place = usable_device(device)
        if mmap and place.type != "cpu":
            raise ArgumentError(f"device: expected the CPU beside mmap=True, got {place}; load without mmap")
        if place.type == "meta":
            raise DeviceError("device: expected one that holds numbers, got meta, which holds none")
        tensors, description = read_snapshot(path, mapped=MAPPED if mmap else (), verify=verify or not mmap)
        try:
            options = {name: description[name] for name in (*SETTINGS, "fields", "track_usage")}
            capacity = options["capacity"]
            options["capacity"] = None if capacity is None else 1  # it gets tensors that are there already
            index = IndexConfig(**description["index"])
            store = cls(**options, index=index, device=place, dtype=tensors["keys"].dtype)
            store.__dict__["capacity"] = None if capacity is None else check_positive("capacity", capacity)
            store._take_over(tensors, mapped=mmap, frozen=description.get("frozen", []))
        except torch.OutOfMemoryError:  # of a GPU
            raise
        except (SoftDBError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise MemoryError(f"{path}: there is no memory for the store: {error}") from error
            raise CorruptSnapshotError(f"{path}: expected what save() writes, got {error}") from error
        return store

    def _take_over(self, tensors: Mapping[str, Tensor], *, mapped: bool, frozen: Any) -> None:
        """Let these be the store's own tensors, instead of those of an empty one."""
        if not isinstance(frozen, list) or not all(name in ("keys", "values") for name in frozen):
            raise ValueError(f"frozen rows {frozen!r}")
        names = {"keys", "values", *(f"rows.{name}" for name in self.rows.saved)}
        if tensors.keys() != names:
            raise ValueError(f"the tensors {sorted(tensors)}")
        used = tensors["rows.ids"].numel()
        capacity = used if mapped or self.capacity is None else self.capacity
        if used > capacity:
            raise ValueError(f"{used} rows")
        check_state(tensors, used, self._widths)
        if tensors["values"].dtype != self.values.dtype:
            raise ValueError(f"values of {tensors['values'].dtype}")
        fitted = {
            name: (tensor if tensor.dim() == 0 or capacity == used else resized(tensor, capacity, _empty(name)))
            for name, tensor in tensors.items()
        }
        here = {name: tensor.to(self.keys.device) for name, tensor in fitted.items()}
        buffers = {name: here[f"rows.{name}"] for name in self.rows.saved}
        tables = {name: here[name] for name in ("keys", "values")}
        self._grow(Growth(buffers | self.rows.stamps(capacity, lasting=not mapped), tables, dict.fromkeys(tables)))
        self.rows.rebuild()
        if not self.rows.names_differ:
            raise ValueError("an id twice")
        self._index.reset()
        self._is_mapped = mapped
        self._frozen_in_files = tuple(frozen)
        for name, table in self._tables().items():
            table.requires_grad_(self.trainable and not mapped and name not in frozen)
        self._watch()

    @property
    def _frozen(self) -> tuple[str, ...]:
        """The names of the Parameters that get no gradient, or will get none once rows in files are materialized."""
        if self._is_mapped:
            return self._frozen_in_files
        return tuple(name for name, table in self._tables().items() if self.trainable and not table.requires_grad)

    @_alone
    def materialize(self) -> None:
        """Copy the rows of a store that was loaded with ``mmap=True`` into memory: it may be written to from then on.

        ``keys`` and ``values`` stay the same objects. Any other store is left as it is.
        """
        if self._is_mapped:
            self._resize(grown(self._tables(), self.rows, self.capacity or self.rows.capacity))
            for name, table in self._tables().items():
                table.requires_grad_(self.trainable and name not in self._frozen_in_files)
            self._is_mapped = False
            self._watch()

    # -- averages --------------------------------------------------------------------------------------------

    def prepare_average(self, model: SoftKVStore, decay: float) -> Callable[[], None]:
        """Check what `softdb.optim.update_average` is to do to this store, and return what does it."""
        for name in ("key_dim", "value_dim", "metric", "capacity", "fields", "evict"):
            mine, theirs = getattr(self, name), getattr(model, name)
            if mine != theirs:
                raise ArgumentError(
                    f"average: expected a store with {name}={theirs!r}, as the model's, got {mine!r}; begin with "
                    "copy.deepcopy(model)"
                )
        if self.rows.track_usage != model.rows.track_usage:
            raise ArgumentError("average: expected a store with the model's track_usage; begin with copy.deepcopy")
        if self._is_mapped:
            raise ReadOnlyError("average: expected a store in memory; call store.materialize() first")
        for store in (self, model):
            store._check_not_meta()
            check_own(store._tables(), store.rows)
        if model.rows.capacity != self.rows.capacity:
            self._check_growth(model.rows.capacity, loaded=True)
        averaged = averaged_by_id(self._tables(), self.rows, model._tables(), model.rows, decay)
        return lambda: self._journal.commit(functools.partial(self._take_average, averaged), WRITTEN)

    def _take_average(self, averaged: Growth) -> None:
        same = torch.equal(self.rows.ids, averaged.buffers["ids"])
        self._grow(averaged)
        self.rows.rebuild()
        if not same:
            self._index.reset()
        self._record_versions()
        self._watch()
        if self.trainable:
            self.rows.remember_tenants(is_updated=True)

    # -- storage ---------------------------------------------------------------------------------------------

    def _check_not_meta(self) -> None:
        for tensor in (self.keys, self.rows.ids):  # functional_call may lend keys to a store that has no rows
            check_not_meta("store", tensor, "load_state_dict() or add(), or reset_parameters() of its layer")

    def _check_rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stored_keys = self._check_table("keys", keys, self.keys)
        stored_values = self._check_table("values", values, self.values)
        if len(keys) != len(values):
            raise ShapeError(f"values: expected {len(keys)} rows, one for each key, got {len(values)}")
        return stored_keys, stored_values

    def _check_table(self, name: str, rows: Tensor, table: Tensor) -> Tensor:
        """``rows`` in the dtype they are stored in, if they are finite in it."""
        check_float_tensor(name, rows, (None, table.shape[-1]), table.device)
        stored = rows.detach().to(table.dtype)
        check_finite(name, stored)
        own = [table.untyped_storage().data_ptr() for table in (self.keys, self.values)]
        return stored.clone() if stored.untyped_storage().data_ptr() in own else stored

    @staticmethod
    def _check_count(ids: Tensor, count: int) -> None:
        if len(ids) != count:
            raise ShapeError(f"ids: expected {count} ids, one for each row, got {len(ids)}")

    def _write(self, batch: WriteBatch, growth: Growth | None = None) -> None:
        """Write. Where an interrupt or a shortage of memory breaks that off, it is applied again at once."""
        plan = self.rows.plan(batch, growth)
        self._journal.commit(functools.partial(self._apply_plan, plan), WRITTEN)

    def _apply_plan(self, plan: WritePlan) -> None:
        batch = plan.batch
        if plan.growth is not None:
            self._grow(plan.growth)
        self.rows.carry_out(plan)
        tables = self._tables()
        if len(batch.leaving):
            forget_gradients(tables.values(), batch.leaving)
            # A hidden row has weight 0, and 0 times NaN is NaN: whatever training left there must not linger.
            zero = torch.zeros((), device=self.keys.device)
            empty = batch.leaving[~torch.isin(batch.leaving, plan.placed)]
            put_rows(tables, self.rows, empty, {"keys": zero, "values": zero})
        if batch.afresh:
            forget_gradients(tables.values(), batch.slots)
        put_rows(tables, self.rows, plan.written, {"keys": batch.keys, "values": batch.values})

    def _admit(self, new: Tensor, replaced: Tensor = NO_SLOTS) -> tuple[Tensor, Growth | None]:
        """Return what makes room for ``new`` ids: slots whose rows go, in a full store that evicts, and growth.

        The rows in the slots ``replaced`` come in the same call, and stay.
        """
        count, together = len(new), len(new) + len(replaced)
        if self.capacity is not None and together > self.capacity:
            raise ArgumentError(
                f"keys: expected at most {self.capacity} rows, the store's capacity, got {together}; write fewer at "
                "a time, or make the store with a larger capacity"
            )
        self.rows.prepare(new)
        needed = self.rows.slots_needed(count)
        if self.evict is None or needed <= self.rows.capacity:
            return NO_SLOTS, self._growth_to(needed)
        return self.rows.to_evict(needed - self.rows.capacity, replaced).cpu(), None

    def _growth_to(self, needed: int, *, exactly: bool = False) -> Growth | None:
        """Return storage for ``needed`` slots, at least doubled unless ``exactly``; None if there is room."""
        capacity = self.rows.capacity
        if needed <= capacity:
            return None
        self._check_growth(needed, asked=exactly)
        return grown(self._tables(), self.rows, needed if exactly else max(needed, 2 * capacity))

    def _resize(self, growth: Growth) -> None:
        self._journal.commit(functools.partial(self._grow, growth), RESIZED)

    def _grow(self, growth: Growth) -> None:
        """Use tensors of another size: as often as need be."""
        self.rows.install(growth.buffers)
        for name, table in growth.tables.items():
            if self.trainable:
                swap_storage(getattr(self, name), table, growth.gradients[name])
            else:
                self._buffers[name] = table
        self._record_versions()

    def _check_growth(self, needed: int, *, asked: bool = False, loaded: bool = False) -> None:
        if self.capacity is not None:
            raise GrowthError(
                f"the store would have to hold {needed} rows, but was made with capacity={self.capacity}: delete rows "
                "first, or make it with evict='lru' or evict='oldest', or with a larger capacity"
            )
        if not self.trainable:
            return
        capacity = self.rows.capacity
        if needed < capacity:  # as only a state that is loaded can be
            change, remedy = "shrink", ""
        else:
            exact = "" if loaded else " or more"  # a state that is loaded has room for so many rows, and no others
            change, remedy = "grow", f"call store.reserve({needed}){exact} beforehand, or "
        change = f"the storage must {change} from {capacity} to {needed} rows"
        if self._open_reads:
            raise GrowthError(
                f"{change}, but a read of it has not gone backward yet, and its gradients have the old size: "
                f"{remedy}call backward() or drop the read first, or read under torch.no_grad()"
            )
        # `reserve` is called before wrapping, and nobody wraps an empty store.
        if not asked and capacity > 0 and has_company():
            raise GrowthError(
                f"{change}, which DistributedDataParallel cannot follow: "
                f"{'load the state' if loaded else f'call store.reserve({needed}) or more'} before wrapping"
            )

    def _check(self) -> None:
        """Raise a RuntimeError that names what is not as it has to be, if anything: for tests."""

        def check() -> None:
            claims = itertools.chain(_invariants(self), self.rows.invariants(), self._index.invariants(self.rows))
            broken = [claim for claim, holds in claims if not holds]
            if broken:
                raise RuntimeError(f"the store is inconsistent: expected that {'; that '.join(broken)}")

        self._reading(check)

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
        with self.rows.access.writing():
            self._catch_up()
            try:
                yield
            finally:
                self._catch_up()

    def _reading(self, action: Callable[[], T], query: Tensor | None = None, k: int | None = None) -> T:
        """What ``action`` finds in one version of the rows; with ``query`` it is a search."""
        if is_active():
            self._check_not_wrapped()
            with outside_of_transforms():
                return self._reading(action, query, k)
        access = self.rows.access
        if access.is_read and not access.is_written:
            return action()  # within a read, whose version counts
        for _ in range(ATTEMPTS):
            with access.reading():
                if self._is_current(query is not None):
                    return action()
            with access.writing():
                self._catch_up(query, k)
        with access.writing():  # somebody writes all the time
            self._catch_up(query, k)
            return action()

    def _is_current(self, searching: bool) -> bool:
        """Whether there is nothing to catch up with."""
        rows, tables = self.rows, self._tables()
        if not self._journal.is_empty or (not rows.is_unchanged(tables) and not only_lends(tables, self.rows)):
            return False
        if not searching or lent_of(tables, self.rows):
            return True
        return self._index.is_current(rows) and not self._index.has_stale_sample(self.keys)

    def _catch_up(self, query: Tensor | None = None, k: int | None = None) -> None:
        """Finish what broke off, note what was written in place and, before a search of ``query``, mind the index."""
        if is_active():
            self._check_not_wrapped()
            with outside_of_transforms():
                self._catch_up(query, k)
            return
        self._recover()
        self._notice_writes()
        if query is None or lent_of(self._tables(), self.rows):
            return
        if self._index.is_current(self.rows) and self._index.has_stale_sample(self.keys):
            self.rows.mark_moved()
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    "keys were written to by .data or numpy, which torch does not count, so the index was out of date; "
                    "all rows have been compared with it now. Call store.touch(ids) after such writes",
                    stacklevel=2,
                )
        if not self._index.is_current(self.rows):
            check_finite("query", query)  # before the index is tuned by it
            query = query.reshape(-1, self.key_dim)
            self._index.follow(self.rows, self.keys.detach(), query, k or 1)

    def _recover(self) -> None:
        """Finish a write that broke off."""
        if self._journal.recover():
            self._index.reset()

    # -- tensors that others write to or replace -------------------------------------------------------------

    def _notice_writes(self) -> None:
        """Follow what something else has written to keys, values and the buffers of the rows, or put in their place.

        Torch counts in-place writes, unless they are done through ``.data``, by numpy or by a fused optimiser: for
        those there are `touch` and the hooks of optimisers.

        Raises:
            ForeignWriteError: What is there now does not describe rows.
        """
        tables = self._tables()
        if self.rows.is_unchanged(tables):
            return
        written, replaced = self.rows.compare_versions(tables)
        self.rows.check_lent(replaced - tables.keys())
        for name in written & tables.keys():
            check_size(name, tables[name], self._shape_of(name))
        if written - tables.keys():
            self._follow_overwrites(written - tables.keys())
        if written & tables.keys():
            self.rows.mark_moved(keys="keys" in written)
        if written:
            self._record_versions(replaced)
            self._watch()

    def _follow_overwrites(self, written: frozenset[str]) -> None:
        found = self.rows.follow_overwrites(written)
        if found.rows_differ:
            self.rows.forget_remains()
            free = (self.rows.ids < 0).nonzero().squeeze(-1)
            zero = torch.zeros((), device=self.keys.device)
            put_rows(
                self._tables(), self.rows, free, {"keys": zero, "values": zero}
            )  # an average of a row that is gone
            self._index.reset()
        if len(found.started):
            warnings.warn(
                f"{len(found.started)} rows came into empty slots of an averaged store between two updates, so their "
                "averages began with zeros; softdb.optim.update_average(average, model, decay) averages by id and "
                "begins with the rows themselves",
                stacklevel=2,
            )

    @property
    def _widths(self) -> dict[str, int]:
        return {"keys": self.key_dim, "values": self.value_dim}

    def _shape_of(self, name: str) -> tuple[int, int]:
        return self.rows.capacity, self._widths[name]

    def _record_versions(self, lent: frozenset[str] = frozenset()) -> None:
        """Record that what is in the store's own tensors is accounted for."""
        own = {**self._parameters, **self._buffers}
        tables = {name: own.get(name) for name in ("keys", "values") if name not in lent}
        self.rows.record_versions({name: table for name, table in tables.items() if table is not None}, lent)

    def _recompute_pruned(self) -> None:
        """Have pruning compute its tables again, as it does before a forward."""
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(self, ())

    def _check_lent(self, name: str, table: Tensor, mode: Mode) -> None:
        """Raise unless a read of ``table``, in the place of the store's own, is possible."""
        check_whole(self._tables())
        if self._is_sharded and self.sparse_grad and mode != "exact" and table.requires_grad:
            raise ArgumentError(
                "sparse_grad: expected False, since fully_shard reduces dense gradients only; make the store with "
                "sparse_grad=False, or pass its Parameters to fully_shard as ignored_params"
            )
        check_size(name, table, self._shape_of(name))

    def _replace_table(self, name: str, value: Any) -> None:
        """Assign ``keys`` or ``values``: another tensor for the same rows."""
        if value is None:
            raise DtypeError(f"{name}: expected a tensor, got None")
        is_table = name in self._parameters or name in self._buffers or isinstance(value, nn.Parameter)
        if is_table and is_sharded(value):
            self.__dict__["_is_sharded"] = True
        if not is_table or self._is_sharded or not isinstance(value, Tensor):
            super().__setattr__(name, value)  # FSDP2 lends, pruning computes, torch refuses
            return
        width = self.key_dim if name == "keys" else self.value_dim
        check_float_tensor(name, value, (self.rows.capacity, width))
        with self.rows.access.writing():
            super().__setattr__(name, value)
            self.rows.mark_moved(keys=name == "keys")
            self._record_versions()
            self._watch()

    # -- reads that wait for their backward ------------------------------------------------------------------

    def _check_not_wrapped(self) -> None:
        if is_wrapped(self.keys, self.values):
            raise TransformError(
                "keys, values: expected the store's own tensors, got some that a transform of torch.func wraps and "
                "functional_call lends; within functional_call only read the store"
            )

    def _tables(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values}

    def _watch(self) -> None:
        for name, table in self._tables().items():
            if self.rows.is_own(name, table):  # not while torch.func lends another tensor
                watch(table, self.rows, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As for any module; DistributedDataParallel finds a stand-in with the same Parameters and no rows' buffers.

        It would overwrite those of each process with the first one's before every forward, and expects row-sparse
        gradients of embeddings only.
        """
        with outside_of_transforms() if is_active() else nullcontext():
            self.rows.observe_average()
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if (module is not self and module is not self.rows) or not is_asked_by_ddp():
                yield name, module
            elif module is self:
                yield name, stand_in(self, sparse=self.trainable and self.sparse_grad)

    # -- module conventions ----------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What ``repr`` shows between the brackets."""
        parts = [
            f"rows={len(self.rows)}",
            f"key_dim={self.key_dim}",
            f"value_dim={self.value_dim}",
            f"metric={self.metric!r}",
        ]
        if self.temperature != 1.0:
            parts.append(f"temperature={self.temperature}")
        if self.fields:
            parts.append(f"fields={self.fields}")
        if self.capacity is not None:
            parts.append(f"capacity={self.capacity}")
        if self.evict is not None:
            parts.append(f"evict={self.evict!r}")
        parts += [f"trainable={self.trainable}", f"index={self._index.config.factory!r}"]
        return ", ".join(parts)

    @_alone
    def _apply(self, fn: Any, recurse: bool = True) -> SoftKVStore:
        if not self.keys.is_meta:
            self.rows.check_own_ids()
        # Before anything is converted, by a try on tensors of no numbers.
        check_dtype(fn(self.keys.detach().new_empty(0)).dtype)
        whole = fn(self.rows.ids.new_empty(0)).dtype
        if whole != torch.int64:
            raise DtypeError(f"dtype: expected ids to stay int64, got {whole}; convert with .to(), not with .type()")
        before = self.keys.data_ptr(), self.values.data_ptr()
        own = [parameter for parameter in self._parameters.values() if parameter is not None]
        with unwatched(own), self.rows.unrecorded():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.rows.was_emptied:
            self.keys.data.zero_()
            self.values.data.zero_()
        if before != (self.keys.data_ptr(), self.values.data_ptr()):  # else nothing was to be converted
            self.rows.mark_moved()
            self._index.reset()
        self._record_versions()
        self._watch()
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
        self._reading(lambda: super(SoftKVStore, self)._save_to_state_dict(*args))

    @_writes
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        *args: Any,
    ) -> None:
        """Load all of it or, where something is wrong or what rows consist of is missing, nothing."""
        if not local_metadata.get("assign_to_params_buffers", False):
            self._check_not_meta()
        hooks, none = self._load_state_dict_pre_hooks, type(self._load_state_dict_pre_hooks)()
        for hook in hooks.values():  # they may rename what is there, or bring what is missing
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args)
        names = {prefix + name for name in ("keys", "values", *(f"rows.{name}" for name in self.rows.saved))}
        optional = {f"{prefix}rows.{name}" for name in self.rows.optional}
        missing = names - state_dict.keys()
        own = {*self._parameters, *self._buffers, *self._modules} - {"rows"}
        if type(self).set_extra_state is not nn.Module.set_extra_state:
            own.add(EXTRA_STATE)
        given = [name for name in state_dict if name.startswith(prefix) and name not in names]
        unexpected = [name for name in given if name.removeprefix(prefix).partition(".")[0] not in own]
        if not missing <= optional:
            missing |= {f"{prefix}keys", f"{prefix}values"}  # which are not loaded without the rest
        elif not (self._is_strict and (missing or unexpected)):
            missing, unexpected = set(), []  # torch reports them
        if missing or unexpected:
            missing_keys.extend(sorted(missing))
            unexpected_keys.extend(unexpected)
            return
        growth = self._room_for({name.removeprefix(prefix): state_dict[name] for name in names & state_dict.keys()})
        others = (local_metadata, strict, missing_keys, unexpected_keys, *args)

        reports = (missing_keys, unexpected_keys, *args)
        reported = [len(report) for report in reports]

        def load() -> None:
            for report, count in zip(reports, reported, strict=True):
                del report[count:]  # of an earlier try
            if growth is not None:
                self._grow(growth)
            own = [parameter for parameter in self._parameters.values() if parameter is not None]
            with unwatched(own), self.rows.unrecorded():  # torch may swap tensors
                try:
                    self._load_state_dict_pre_hooks = none
                    super(SoftKVStore, self)._load_from_state_dict(state_dict, prefix, *others)
                finally:
                    self._load_state_dict_pre_hooks = hooks
                self.rows.load(state_dict, f"{prefix}rows.", *others)
            for table in self._tables().values():
                if 0 in table.stride() and table.numel() > 1:  # an expanded tensor, by ``assign=True``
                    table.data = table.data.clone(memory_format=torch.contiguous_format)
            # torch goes on where it fails to copy a tensor, say for want of memory: some rows would be old.
            failed = [text for text in args[0][reported[2] :] if any(f'named "{name}"' in text for name in names)]
            if failed:
                raise RuntimeError(" ".join(failed))
            self._index.reset()
            self._record_versions()
            self._watch()

        self._journal.commit(load, WRITTEN)

    def _room_for(self, state: Mapping[str, Any]) -> Growth | None:
        """Check what is to be loaded; tensors of its size, if that is another."""
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise DtypeError(f"state_dict[{name!r}]: expected a tensor, got {describe(tensor)}")
            if tensor.is_meta:
                raise DeviceError(f"state_dict[{name!r}]: expected numbers, got a tensor on meta, which holds none")
            check_dense(f"state_dict[{name!r}]", tensor)
        for name, table in self._tables().items():
            if self.rows.is_own(name, table):
                check_size(name, table, self._shape_of(name))
        ids = state["rows.ids"]
        capacity = ids.numel() if self.capacity is None else self.capacity
        check_state(state, capacity, self._widths)
        check_ids("state_dict['rows.ids']", ids[ids != -1])
        check_finite("state_dict['keys']", state["keys"])
        check_finite("state_dict['values']", state["values"])
        if capacity == self.rows.capacity:
            return None
        self._check_growth(capacity, loaded=True)
        return grown(self._tables(), self.rows, capacity)

    def __getstate__(self) -> dict[str, Any]:
        with self.writing():  # nothing is left unfinished
            pass
        return self.__dict__.copy()

    @without_transforms
    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> SoftKVStore:
        """A copy of one version of the rows, whoever writes meanwhile."""
        with self.writing():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            if self.trainable:
                copied.rows.remember_tenants(is_updated=self.rows._is_average)
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._record_versions()
        self._handle = new_handle(self)
        self._watch()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _sent)


def _sent(store: SoftKVStore) -> Any:
    """What is pickled to send a store to another process: a copy, unless ``share_memory()`` was called.

    torch sends tensors by moving them to memory that both processes see: each would write to the rows of the other,
    and keep books of its own.
    """
    if store.keys.is_shared():
        return store.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    sent, process = copy.deepcopy(store), get_spawning_popen()
    if process is not None:  # which takes over open files: they are not to be closed before it begins
        _copies.setdefault(process, []).append(sent)
    return sent.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


# The memory that a process has its store in, as long as that process is known.
_copies: weakref.WeakKeyDictionary[Any, list[SoftKVStore]] = weakref.WeakKeyDictionary()


ForkingPickler.register(SoftKVStore, _sent)


class _Nobody(OpenReads):
    """No reads that wait: those of lent tables."""

    def attach(self, read: Read, rows: RowStorage, used: Tensor | None, lent: Sequence[Tensor] = ()) -> Read:
        return read


class _LentStore(SoftKVStore):
    """The rows of a store with other keys and values in their place, exactly searched: for reads only."""

    def __init__(self, store: SoftKVStore, keys: Tensor, values: Tensor) -> None:
        self.__dict__.update(store.__dict__)
        tables = {"keys": keys, "values": values}
        self.__dict__["_parameters"] = {name: tables.get(name, value) for name, value in store._parameters.items()}
        self.__dict__["_buffers"] = {name: tables.get(name, value) for name, value in store._buffers.items()}
        self.__dict__["_index"] = IndexManager(IndexConfig("Flat"), self.metric, self.key_dim, moving=True)
        self.__dict__["_open_reads"] = _Nobody()  # later writes to the store do not concern these tables

    def _is_current(self, searching: bool) -> bool:
        return self._journal.is_empty

    def _notice_writes(self) -> None:
        pass


def _invariants(store: SoftKVStore) -> Iterator[tuple[str, bool]]:
    capacity, live = store.rows.capacity, store.rows.ids >= 0
    shapes = (capacity, store.key_dim), (capacity, store.value_dim)
    yield "keys and values have a row for each slot", (store.keys.shape, store.values.shape) == shapes
    empty = bool((store.keys.detach()[~live] == 0).all()) and bool((store.values.detach()[~live] == 0).all())
    yield "slots without a row hold zeros", empty
    yield "no write is unfinished", store._journal.is_empty


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device, if tensors can be put there: what it raises would else look like a fault of the snapshot."""
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise DeviceError(f"device: expected one that torch can use here, got {device!r}: {error}") from error
    return place


def _empty(name: str) -> int:
    """What a column of the saved tensors holds where there is no row."""
    return -1 if name == "rows.ids" else 0
