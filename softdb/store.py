"""The `SoftKVStore` module: a table of keys and values with differentiable reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softdb._checks import (
    Ids,
    check_dtype,
    check_finite,
    check_float_tensor,
    check_placement,
    check_positive,
    describe,
    refuse_unknown_keywords,
)
from softdb.errors import DtypeError
from softdb.filters import Where, find_ids
from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import IndexManager
from softdb.interop.compile import new_handle
from softdb.interop.module import FIXED_NAMES
from softdb.interop.pruning import recompute_pruned
from softdb.interop.reads import read
from softdb.interop.store_module import StoreModule
from softdb.reading.audit import Audit, compare_reads
from softdb.reading.options import Mode, ReadOptions
from softdb.reading.reader import Reader
from softdb.reading.result import Read
from softdb.reading.staleness import OpenReads
from softdb.scoring.metrics import Metric
from softdb.snapshot.contents import collect_contents, load_store
from softdb.snapshot.lock import lock_directory
from softdb.snapshot.writer import write_snapshot
from softdb.table.access import Access
from softdb.table.config import Evict, StoreConfig
from softdb.table.creation import create_store
from softdb.table.invariants import check_invariants
from softdb.table.rows import (
    Missing,
    Rows,
    check_row_ids,
    contains,
    copy_field,
    copy_rows,
    copy_usage,
    set_tracking,
)
from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.table.usage import Usage, check_tracking
from softdb.table.writer import Fields, Writer
from softdb.transforms import disable_compile, without_transforms

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self from Python 3.11

__all__ = ["SoftKVStore"]


@refuse_unknown_keywords
class SoftKVStore(StoreModule):
    """A key-value store that answers a query with a weighted sum of its values.

    For the default metric, a read of N rows equals::

        scores = query @ keys.T / sqrt(key_dim) / temperature     # (B, N)
        weights = softmax(scores)                                 # (B, N)
        output = weights @ values                                 # (B, value_dim)

    The scores and weights are computed in blocks: the (B, N) matrices are never allocated.

    Args:
        key_dim: Width of queries and keys.
        value_dim: Width of values. It may differ from ``key_dim``. With 0, the store is only an index: its rows have
            keys, ids and fields, and reads report ids, weights and scores.
        metric: Score of a query q and a key k: "dot" (q·k), "scaled_dot" (q·k / √key_dim), "cosine" or "l2"
            (−‖q − k‖²). A higher score is better.
        temperature: Number above 0 that divides the scores, unless `read` is called with another one. For a learnable
            temperature, pass a tensor to `read`.
        trainable: Whether ``keys`` and ``values`` are Parameters. If False, they are buffers. The query and a
            temperature tensor get gradients in both cases.
        sparse_grad: Whether topk and hard reads give ``keys`` and ``values`` row-sparse gradients: COO tensors that
            hold only the rows read, as those of ``nn.Embedding(sparse=True)``. They are coalesced except on a GPU. If
            False, gradients are dense, and every optimizer accepts them. Use True for large tables, with an optimizer
            that accepts sparse gradients: `softdb.optim.RowAdam`, `softdb.optim.RowAdagrad`,
            `torch.optim.SparseAdam`, `torch.optim.Adagrad` or `torch.optim.SGD`. Exact reads always give dense
            gradients.
        fields: Names of the int64 fields of every row. The filter ``where`` of `read` can use them, and `fields_at`
            returns the field of the rows that a read reports.
        index: How topk reads find candidates: "auto", "Flat", a FAISS factory string, or an `IndexConfig`, whose
            documentation describes these values.
        capacity: Maximum number of rows. The storage is allocated once at this size and never grows, so optimizers and
            DistributedDataParallel can be constructed before rows are added. If None, the storage grows when it is
            full.
        evict: Which rows to evict when a write would exceed ``capacity``. If None, that write raises `GrowthError`.

            - "oldest": the rows that `add` or `put` inserted first. Replacing, updating or reviving a row does not
              change its age.
            - "lru": the least recently used rows; ties go to the lowest slot. A row is used when it is added, put or
              revived, when its key or value is updated, and when a read counts it (see `usage`). An exact softmax read
              without ``k`` counts no row.

            A write never evicts a row that it inserts or replaces. Eviction has the effects of `delete`: the id is
            never assigned again, and the pending gradient of the row is dropped. If rows have gradients, backward of a
            read that used the row raises `StaleReadError`; otherwise it uses a copy of the row (see `read`).
        track_usage: Whether to count how often, and with which weight, reads report each row. See `usage` and
            `track_usage_`.
        device: Device of the stored tensors.
        dtype: Floating-point dtype of ``keys`` and ``values``.

    ``state_dict`` includes the eviction clock and the usage counters, so a store that loads it evicts the same rows as
    the saved store and continues its counts. Activation checkpointing may run a read again in backward; usage counters
    and the eviction clock then count the read twice.

    Attributes:
        keys: (capacity, key_dim), in slot order.
        values: (capacity, value_dim), in slot order.

            You may read both tensors, pass them to an optimizer, or write to them in place. The contents of a slot
            without a row are undefined. Call `touch` after a write through ``.data`` or NumPy. If you compute with
            these tensors directly, do not write to the store before ``backward``: the store writes through ``.data``,
            which autograd does not detect, and the gradients would be wrong.

    Raises:
        ArgumentError: A number is out of range, or arguments do not fit together.
        DtypeError: An argument has the wrong type, or there is no argument of this name.
        DeviceError: The ``device`` is not available.
        FieldError: A field name is not a Python identifier, is reserved, or is repeated.

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
        sparse_grad: bool = False,
        fields: Sequence[str] = (),
        index: str | IndexConfig = "auto",
        capacity: int | None = None,
        evict: Evict | None = None,
        track_usage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create an empty store; ``help(SoftKVStore)`` describes the arguments."""
        super().__init__()
        config = StoreConfig(key_dim, value_dim, metric, trainable, fields, capacity, evict, track_usage)
        for name in FIXED_NAMES:
            setattr(self, name, getattr(config, name))
        self.temperature, self.sparse_grad = temperature, bool(sparse_grad)
        check_dtype(dtype)
        check_placement(device)
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

    @classmethod
    @without_transforms
    def from_tensors(
        cls, keys: Tensor, values: Tensor, *, ids: Ids | None = None, fields: Fields | None = None, **options: Any
    ) -> SoftKVStore:
        """Create a store that holds the given rows.

        Equal to::

            store = SoftKVStore(keys.shape[1], values.shape[1], fields=tuple(fields), device=keys.device,
                                dtype=torch.promote_types(keys.dtype, values.dtype), **options)
            store.add(keys, values, ids, fields)

        The store keeps detached copies. The cost is linear in the number of rows. The storage has one slot for each
        row, or ``capacity`` slots.

        Args:
            keys: (n, key_dim), floating point.
            values: (n, value_dim), floating point, on the device of ``keys``. For a store without values, pass
                ``keys[:, :0]``.
            ids: As for `add`.
            fields: Value of every field by name, as for `add`. The names become the fields of the store. If None, the
                store has no fields.
            **options: Other options of the store, such as ``metric`` or ``trainable``.

        Returns:
            The store.

        Raises:
            ArgumentError: An option is out of range; ``key_dim``, ``value_dim``, ``device`` or ``dtype`` is given,
                which the tensors determine; or there are more than ``capacity`` rows.
            DuplicateIdError: An id is given twice.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type, or there is no argument of this name.
            DeviceError: A tensor is on the meta device, or the tensors are on different devices.
            NonFiniteError: A key or value is NaN or infinite.
            FieldError: A field name is no identifier or is reserved.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore.from_tensors(torch.eye(2), torch.ones(2, 1), fields={"time": [3, 5]}, metric="l2")
            >>> store.fields, len(store)
            (('time',), 2)
        """
        store: SoftKVStore = create_store(cls, keys, values, ids, fields, options)
        return store

    def _assemble(self) -> None:
        """Create the objects that read and write the table, for a new store or a copy."""
        self._table.attach(self)
        self._access = Access(self._table)
        self._writer = Writer(self._table, self._access)
        self._reader = Reader(self._table, self._access, self._index, self._open_reads)
        self._handle = new_handle(self)

    # -- the rows --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._access.reading(lambda: len(self.rows))

    def __bool__(self) -> bool:
        return True  # An empty store is true, like any other module.

    @without_transforms
    def __contains__(self, id: object) -> bool:
        return self._access.reading(lambda: contains(self.rows, id))

    @property
    def ids(self) -> Tensor:
        """Ids of the rows, (n,) int64, in slot order.

        A bool mask passed as ``where`` has this order. The tensor is a copy; the cost is linear in the number of slots.
        """
        if self.keys.is_meta:
            return self.rows.ids.new_empty(len(self))
        return self._access.reading(lambda: self.rows.ids[self.rows.live_slots()])

    @property
    def device(self) -> torch.device:
        """Device of ``keys`` and ``values``."""
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of ``keys`` and ``values``."""
        return self.keys.dtype

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of every row."""
        return self.rows.fields

    @property
    def usage(self) -> Usage:
        """Usage counters: how often, and with which weight, reads reported each row.

        Counting starts when a row is added, and starts again after `reset_usage` and `revive`. A read counts the rows
        in ``read.ids``; a hard read counts its row with weight 1. For an exact read without ``k``, the count depends on
        the normalizer: with softmax every row has weight, so no row is counted; with another normalizer, the rows with
        weight above 0 are counted. Pass ``k`` to count the best rows of a softmax read. Reads under ``torch.no_grad()``
        count too. The counters are copies; the cost is linear in the number of slots.

        Raises:
            NotApplicableError: The store does not track usage.
        """
        check_tracking(self.rows.track_usage, "store")
        return self._access.reading(lambda: copy_usage(self.rows))

    @without_transforms
    def reset_usage(self) -> None:
        """Set the usage counters of all rows to 0.

        The order of eviction does not change.

        Raises:
            NotApplicableError: The store does not track usage.
        """
        check_tracking(self.rows.track_usage, "store")
        with self.rows.access.writing():
            self.rows.reset_usage(slice(None))

    @without_transforms
    def track_usage_(self, enabled: bool = True) -> Self:
        """Start counting reads for `usage`, or stop and drop the counters.

        It changes the option ``track_usage`` of an existing store. The counters start at 0; if the store counts
        already, they continue. While the store counts, ``state_dict``, `save` and copies of the store include the
        counters. With ``strict=True``, a state dict with counters loads only into a store that counts. Rows, open reads
        and the order of eviction do not change. The cost of starting is linear in the number of slots.

        Args:
            enabled: Whether to count.

        Returns:
            The store.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1)
            >>> ids = store.add(torch.eye(2), torch.tensor([[10.0], [20.0]]))
            >>> read = store.track_usage_().read(torch.tensor([9.0, 0.0]), mode="hard")
            >>> store.usage.reads
            tensor([1, 0])
        """
        with self._access.exclusive():
            set_tracking(self._table, bool(enabled))
        return self

    @without_transforms
    def add(self, keys: Tensor, values: Tensor, ids: Ids | None = None, fields: Fields | None = None) -> Tensor:
        """Append rows.

        The store keeps detached copies: gradients do not flow from a read into the graph that computed ``keys`` and
        ``values``. To train an encoder through a read, read the in-graph tensors with `softdb.functional.soft_read`,
        and combine the result with the store's read by `softdb.functional.merge`.

        When a store with ``evict`` is full, it evicts just enough rows; the new rows reuse their slots.

        The cost is linear in m, the number of new rows. When the storage of a store without ``capacity`` is full, its
        size at least doubles, which copies all rows. Call `reserve` to avoid this.

        A store on a GPU takes rows on the CPU, too, and copies them; from pinned memory (``pin_memory()``) the copy is
        faster. The memory may be overwritten when the call returns.

        Args:
            keys: (m, key_dim), floating point.
            values: (m, value_dim), floating point. For a store with ``value_dim=0``, pass ``keys[:, :0]``.
            ids: Ids of the new rows, (m,), none of them in the store. If None, the store assigns m consecutive ids,
                starting one above the highest id that it has ever held, or at 0. The store never assigns an id twice.
            fields: Value of every field of the store, by name: m integers, or one integer for all m rows.

        Returns:
            The ids of the new rows, (m,) int64.

        Raises:
            DuplicateIdError: An id is in the store, or is given twice.
            GrowthError: The storage must grow but cannot now: call `reserve` earlier. Or it would exceed ``capacity``,
                and ``evict`` is None.
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.
            ArgumentError: There are more than ``capacity`` rows.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A key or value is NaN or infinite.
            FieldError: A field is missing or unknown.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1, fields=["time", "user"])
            >>> fields = {"time": torch.tensor([3, 5]), "user": 7}  # one value for each row, one value for all rows
            >>> store.add(torch.eye(2), torch.tensor([[10.0], [20.0]]), fields=fields)
            tensor([0, 1])
            >>> store.get([1]).fields
            {'time': tensor([5]), 'user': tensor([7])}
        """
        return self._writer.add(keys, values, ids, fields)

    @without_transforms
    def put(self, ids: Ids, keys: Tensor, values: Tensor, fields: Fields | None = None) -> None:
        """Insert rows, or replace the rows that have the same ids.

        The store keeps detached copies, as for `add`. The cost is linear in m, as for `add`.

        Args:
            ids: (m,), without duplicates.
            keys: (m, key_dim), floating point.
            values: (m, value_dim), floating point.
            fields: Value of every field of the store, by name: m integers, or one integer for all m rows.

        Raises:
            DuplicateIdError: An id is given twice.
            GrowthError: The storage must grow but cannot now: call `reserve` earlier. Or it would exceed ``capacity``,
                and ``evict`` is None.
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.
            ArgumentError: There are more than ``capacity`` rows, or an id is negative.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A key or value is NaN or infinite.
            FieldError: A field is missing or unknown.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1)
            >>> store.put([5, 8], torch.eye(2), torch.zeros(2, 1))
            >>> store.put([8], torch.ones(1, 2), torch.ones(1, 1))  # replaces row 8
            >>> store.get([8]).keys
            tensor([[1., 1.]])
        """
        self._writer.put(ids, keys, values, fields)

    @without_transforms
    def update(
        self, ids: Ids, keys: Tensor | None = None, values: Tensor | None = None, fields: Fields | None = None
    ) -> None:
        """Change the keys, values or fields of existing rows.

        The store keeps detached copies, as for `add`. The cost is linear in m.

        Args:
            ids: (m,), in the store, without duplicates.
            keys: (m, key_dim). If None, the keys do not change.
            values: (m, value_dim). If None, the values do not change.
            fields: New values of some of the fields, by name: m integers, or one integer for all m rows.

        Raises:
            UnknownIdError: An id is not in the store.
            DuplicateIdError: An id is given twice.
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A key or value is NaN or infinite.
            FieldError: A field is unknown.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1)
            >>> ids = store.add(torch.eye(2), torch.zeros(2, 1))
            >>> store.update(ids[:1], values=torch.ones(1, 1))
            >>> store.get(ids).values.flatten()
            tensor([1., 0.])
        """
        self._writer.update(ids, keys, values, fields)

    @without_transforms
    def revive(self, ids: Ids, keys: Tensor, values: Tensor) -> None:
        """Replace the contents of existing rows and treat them as new rows.

        Use it to restart rows that reads no longer select. It does what `update` does, and also resets everything that
        belonged to the old contents: pending gradients are dropped, `usage` starts at 0, and `softdb.optim.RowAdam` and
        `softdb.optim.RowAdagrad` reset the optimizer state of the rows. Optimizers of ``torch.optim`` do not reset
        their state: they apply the old momentum to the new contents.

        The cost is linear in m.

        Args:
            ids: (m,), in the store, without duplicates.
            keys: (m, key_dim), copied as by `add`.
            values: (m, value_dim), copied as by `add`.

        Raises:
            UnknownIdError: An id is not in the store.
            DuplicateIdError: An id is given twice.
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A key or value is NaN or infinite.
        """
        self._writer.revive(ids, keys, values)

    @without_transforms
    def delete(self, ids: Ids | None = None, *, where: Where | None = None) -> None:
        """Remove rows by id, or all rows that a filter allows.

        Their ids are never assigned again, but you may pass them to `add` or `put`. Their slots are reused, the lowest
        first. The storage does not shrink; call `compact` for that. The cost is linear in the number of deleted rows;
        with ``where``, it is linear in the number of slots.

        Args:
            ids: One id, or (m,) ids in the store, without duplicates.
            where: Filter that selects the rows to remove, instead of ``ids``. As for `read`, it is a bool tensor in the
                order of ``store.ids``, ids, or a callable ``where(row) -> bool tensor``. There are no queries, so the
                result of a callable must be broadcastable to (C,).

        Raises:
            ArgumentError: Both ``ids`` and ``where`` are given, or neither is.
            UnknownIdError: An id is not in the store.
            DuplicateIdError: An id in ``ids`` is given twice.
            ShapeError: ``ids``, a mask or the result of a callable has the wrong shape.
            DtypeError: An argument, or the result of a callable, has the wrong type.
            DeviceError: A mask, or the result of a callable, is not on the device of the store.
            FieldError: A callable uses an unknown field.
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1, fields=["time"])
            >>> ids = store.add(torch.ones(4, 2), torch.ones(4, 1), fields={"time": [3, 5, 7, 9]})
            >>> store.delete(0)
            >>> store.delete(where=lambda row: row["time"] < 6)
            >>> store.ids
            tensor([2, 3])
        """
        self._writer.delete(ids, None if where is None else lambda: find_ids(self.rows, where))

    @without_transforms
    def clear(self) -> None:
        """Remove all rows.

        It has the effects of ``delete(store.ids)``: no id is assigned again, and the storage does not shrink until
        `compact`. The cost is linear in the number of slots.

        Raises:
            UnfinishedWriteError: Memory ran out after the write was recorded. Do not repeat the call.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1)
            >>> store.add(torch.eye(2), torch.ones(2, 1))
            tensor([0, 1])
            >>> store.clear()
            >>> store.add(torch.eye(2), torch.ones(2, 1))
            tensor([2, 3])
        """
        self._writer.clear()

    @disable_compile("softdb: get: expected to run outside of graphs, which contain no rows by id")
    @without_transforms
    def get(self, ids: Ids, missing: Missing = "error") -> Rows:
        """Return copies of rows, in the order and shape of ``ids``.

        The copies are detached from the graph. The cost is linear in the number of ids.

        Args:
            ids: Ids of any shape (...), or one id. Duplicates are allowed.
            missing: "error" raises for an id that is not in the store. "pad" returns zeros as key and value, and -1 in
                every field, for such an id and for the padding -1. You may then pass ``read.ids``.

        Returns:
            A `Rows` with ``keys`` (..., key_dim), ``values`` (..., value_dim) and ``fields``, a dict of (...,) int64
            tensors.

        Raises:
            UnknownIdError: An id is not in the store, and ``missing`` is "error".
            ArgumentError: An id is negative (with "pad", less than -1), or ``missing`` is neither "error" nor "pad".
            DtypeError: The ids are not integers.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1)
            >>> ids = store.add(torch.eye(2), torch.tensor([[10.0], [20.0]]))
            >>> store.get([1, 0]).values.flatten()
            tensor([20., 10.])
            >>> store.get([[1, -1]], missing="pad").values.squeeze(-1)
            tensor([[20.,  0.]])
        """
        self._table.check_not_meta()
        given = check_row_ids(ids, missing)
        return self._access.reading(lambda: copy_rows(self._table, given, missing))

    @disable_compile("softdb: fields_at: expected to run outside of graphs, which contain no rows by id")
    @without_transforms
    def fields_at(self, ids: Ids, name: str, fill: int = -1) -> Tensor:
        """Return one field of rows, in the shape of ``ids``.

        It copies neither keys nor values. Use it to get the labels of the rows that a read reports, for example for
        `softdb.functional.class_weights`. The cost is linear in the number of ids.

        Args:
            ids: Ids of any shape (...), or one id. Duplicates and the padding -1 are allowed.
            name: Name of the field.
            fill: Number to return for -1 and for ids that are not in the store.

        Returns:
            (...,) int64, on the device of the store.

        Raises:
            FieldError: The store has no such field.
            ArgumentError: An id is less than -1.
            DtypeError: The ids, or ``fill``, are not integers.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1, fields=["label"])
            >>> ids = store.add(torch.eye(2), torch.zeros(2, 1), fields={"label": [7, 8]})
            >>> read = store.read(torch.eye(2), k=3)
            >>> read.ids
            tensor([[ 0,  1, -1],
                    [ 1,  0, -1]])
            >>> store.fields_at(read.ids, "label")
            tensor([[ 7,  8, -1],
                    [ 8,  7, -1]])
        """
        self._table.check_not_meta()
        given = check_row_ids(ids, "pad")
        return self._access.reading(lambda: copy_field(self.rows, given, name, fill))

    @without_transforms
    def reserve(self, n: int) -> None:
        """Allocate storage for at least ``n`` rows in total.

        Call it before you wrap a trainable store in DistributedDataParallel and before you construct an optimizer of
        ``torch.optim``, because both allocate state of the size of ``keys`` and ``values``. If the storage grows, all
        rows are copied.

        Args:
            n: Total number of rows, including the rows in the store.

        Raises:
            GrowthError: ``n`` exceeds ``capacity``, or the store is trainable and a read of it still waits for its
                ``backward``.

        Example:
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2, trainable=True)
            >>> store.reserve(1_000)
            >>> store.keys.shape
            torch.Size([1000, 4])
        """
        self._writer.reserve(n)

    @without_transforms
    def compact(self) -> None:
        """Shrink the storage to the rows in the store.

        The rows move to the lowest slots, in the same order. For every tensor with an entry per slot, this equals::

            tensor = tensor[live_slots]         # (capacity, ...) -> (len(store), ...)

        Ids, their order in ``store.ids``, fields, usage, the order of eviction, pending gradients, and the state of
        `softdb.optim.RowAdam` and `softdb.optim.RowAdagrad` follow the rows. ``keys`` and ``values`` stay the same
        Parameters. Later snapshots have the smaller size. If rows have moved, the next topk read builds the index
        again. The storage of a store with a ``capacity`` keeps its size, but exact reads become faster if rows were
        deleted.

        Call it after many deletions, or when no more rows will be added. After it, a store without ``capacity`` is
        full, so the next `add` at least doubles the storage. All rows are copied, and old and new tensors are in memory
        at the same time. If there are no free slots, it does nothing.

        Raises:
            GrowthError: Rows cannot move now: a read still waits for its ``backward``, an optimizer of ``torch.optim``
                has state for each row, a trainable store is in a process group of several processes, or the rows are in
                shared memory. Nothing has changed.
            ForeignWriteError: Another store shares ``keys`` or ``values``, or other code has substituted them.
            ReadOnlyError: The rows are memory-mapped files.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> ids = store.add(torch.randn(1_000, 4), torch.randn(1_000, 2))
            >>> store.delete(ids[:990])
            >>> store.compact()
            >>> store.keys.shape, store.ids[:3]
            (torch.Size([10, 4]), tensor([990, 991, 992]))
        """
        self._writer.compact()

    @without_transforms
    def touch(self, ids: Ids) -> None:
        """Report writes to ``keys`` or ``values`` that autograd does not record.

        Call it after a write through ``.data`` or NumPy, as in ``store.keys.data[...] = ...``. The methods of the store
        and steps of optimizers do not need it.

        Args:
            ids: Ids of the rows that were written to: one id, or (m,) ids, in the store.

        Raises:
            UnknownIdError: An id is not in the store.
        """
        self._writer.touch(ids)

    # -- reading ---------------------------------------------------------------------------------------------

    def forward(self, query: Tensor, **options: Any) -> Tensor:
        """Return ``read(query, **options).values``, (..., value_dim)."""
        return self.read(query, **options).values

    def read(
        self,
        query: Tensor,  # (..., key_dim)
        mode: Mode = "exact",
        k: int | None = None,
        where: Where | None = None,
        exclude: Ids | None = None,  # (..., m)
        temperature: float | Tensor | None = None,
        normalizer: str = "softmax",
        tail_samples: int = 0,
        tolerance: float | None = None,
        generator: torch.Generator | None = None,
        bias: Tensor | None = None,  # (n,), or broadcastable to (..., n)
    ) -> Read:
        """Answer a batch of queries with weighted sums of values.

        ========  ================================================================================================
        exact     ``softmax(scores) @ values`` over all rows that the filters allow; ``lse`` is over the same rows
        topk      the same over the k best rows: the index finds candidates, which are scored again from ``keys``;
                  with ``tail_samples`` or ``tolerance``, an estimate of the exact result
        hard      ``values[argmax(scores)]``, by exact search; the weight is 1, only the value of that row gets a
                  gradient, and ``lse`` is its score
        ========  ================================================================================================

        Ties go to the row in the lowest slot. If there is no row to read, because the store is empty or the filters
        hide every row, values are 0, ids are -1, lse is -inf, mass is 0, and gradients are 0.

        For B queries and N rows, exact and hard reads take O(B N (key_dim + value_dim)) operations and a few megabytes
        of memory in addition to the result. A topk read takes a search of the index and O(B k (key_dim + value_dim))
        operations; it gathers the k rows of each query. An exact read with a sparse normalizer gathers all rows with
        weight above 0.

        Under `torch.compile`, a read is one operator of the graph. A callable ``where``, ``tail_samples``,
        ``tolerance``, ``generator``, the gumbel normalizer, and a sparse normalizer in topk mode cause a graph break.
        Write rows outside of compiled functions. If a graph reads the same store more than once, the gradients of its
        rows are dense. `torch.export` exports every read that compiles without a graph break. The exported program
        reads the store object itself: the store must exist in the same process, and its storage must not be resized.

        The transforms `torch.func.vmap`, ``grad``, ``vjp`` and ``jacrev`` are supported in any nesting, as are
        per-sample gradients with ``functional_call``. Under vmap, one read answers all samples. If each sample has its
        own rows or its own ``where``, or if ``where`` is callable, each sample is read separately. Writes in a
        transform store detached tensors. A vmapped function cannot write a different tensor for each sample.

        Args:
            query: (..., key_dim), floating point.
            mode: "exact", "topk" or "hard".
            k: Number of candidates in topk mode. In exact mode, number of best rows to report in ``ids``, ``weights``
                and ``scores``.
            where: Rows that may be read, as one of

                - a bool tensor (n,), in the order of ``store.ids``;
                - an int64 tensor of ids. You may pass a list or a NumPy array in place of a tensor, but it breaks the
                  graph of torch.compile;
                - a callable ``where(row) -> bool tensor``. ``row["id"]`` and ``row[field]`` are int64 tensors: (C,) for
                  a block of rows, or (B, C) for the candidates of B flattened queries. The result must be broadcastable
                  to (B, C). Combine conditions with ``&`` and ``|``.
            exclude: Ids that each query may not read, (..., m) int64. -1 is padding. Ids that are not in the store have
                no effect.
            temperature: Divisor of the scores in place of the store's: a number above 0, or a tensor, which gets a
                gradient and must be broadcastable to the leading shape of the query.
            normalizer: Function from scores to weights, over the rows considered (see `softdb.scoring.normalizers`):

                - "softmax".
                - "straight_through": one-hot weights in forward, the gradient of softmax in backward.
                - "gumbel": straight-through with Gumbel noise added to the scores, so that a row is drawn with its
                  softmax probability. ``scores`` and ``lse`` include the noise. In eval mode (``store.eval()``),
                  "straight_through" replaces it, also in ``read.normalizer``.
                - A sparse normalizer, such as "sparsemax" or "entmax15": weights that are 0 except for some of the best
                  rows. In exact mode the rows with weight above 0 are gathered; if they are too many, `ArgumentError`
                  is raised. In topk mode, k is doubled while all candidates of a query have weight, up to the larger of
                  16 k and 1,024. ``mass`` is 1 if the candidates are known to include all rows with weight, else NaN.
                  After an approximate search, this is known only if all visible rows are candidates.
            tail_samples: Number of rows to sample, in topk mode, to estimate the contribution of the rows that are not
                candidates. If the number is large enough for all other rows, the read is exact. With a sample, ``lse``
                is an estimate over all allowed rows, and ``weights`` and ``mass`` are relative to that estimate.
                ``error`` is an upper bound of ‖values − exact values‖ / ‖exact values‖ that holds in about nine of ten
                cases (see docs/approximation.md). All queries of the batch share the sample, which is stratified by the
                lists of the index. The sampled rows get gradients, too. The gradient of a sampled row is multiplied by
                the number of rows that it represents.
            tolerance: Maximum ``error`` of each query in topk mode, such as 0.05. The read chooses the number of
                candidates, the number of lists to visit, and the number of samples. Queries that cannot meet the
                tolerance, or for which an exact read is cheaper, are read exactly and have error 0. The gradients of
                rows are dense. Rows are reported only if ``k`` is given, which doubles the cost of the queries that are
                read exactly.
            generator: Generator for the noise of "gumbel" and for the sample. If None, the default generator of torch.
                In eval mode "gumbel" draws no numbers and leaves the generator unchanged.
            bias: Numbers that are added to the scores after the division by the temperature, in the order of
                ``store.ids``: a floating-point tensor (n,), or broadcastable to (..., n), which gets a gradient. -inf
                hides the row, as a filter does. ``scores``, ``lse`` and ``mass`` include the bias, and the best rows
                are the rows with the largest sums of score and bias. A topk read with a bias searches exactly. Not
                supported with ``tail_samples``, ``tolerance`` and sparse normalizers. A bias that differs by query is a
                (B, n) tensor, and so is its gradient. For a bias (n,), no (B, n) tensor is allocated.

        Returns:
            A `Read`.

        Raises:
            ArgumentError: An argument is out of range, or the mode does not use it.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A query contains NaN or infinity, or a bias contains NaN, +inf or, in a read without float64
                tensors, a number that overflows in float32. On a GPU, `check` raises it later.
            UnknownIdError: ``where`` has an id that is not in the store.
            StaleReadError: In backward, if a row that the read used has been changed, deleted or evicted since the
                read. Appending rows is allowed. If keys and values have no gradient, the store keeps the rows that it
                overwrites, and backward uses them. The error is then raised only if the rows to keep for all reads
                exceed the number of slots of the storage, or if other code wrote to the tensors.
            SecondDerivativeError: In a second derivative of an exact read, or of any read under `torch.func`.
            TransformError: In forward mode (jvp, jacfwd, hessian), or if the read draws random numbers in a vmap with
                ``randomness="error"``.

        Source: Vaswani et al. 2017 (arXiv 1706.03762); the top-k softmax of Rae et al. 2016 (arXiv 1610.09027).

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=2, value_dim=1, fields=["time"])
            >>> ids = store.add(torch.eye(2), torch.tensor([[10.0], [20.0]]), fields={"time": torch.tensor([3, 5])})
            >>> query, now = torch.zeros(2, 2), torch.tensor([4, 6])
            >>> store.read(query, where=lambda row: row["time"] < now[:, None]).values  # each query reads earlier rows
            tensor([[10.], [15.]])
            >>> store.read(query, where=store.ids != 0).values  # a bool mask
            tensor([[20.], [20.]])
            >>> read = store.read(torch.tensor([9.0, 0.0]), mode="topk", k=1, where=torch.tensor([1]))  # ids
            >>> read.ids, read.values
            (tensor([1]), tensor([20.]))
            >>> prior = torch.tensor([0.25, 0.75]).log()
            >>> store.read(torch.zeros(2), bias=prior).values  # 0.25 * 10 + 0.75 * 20
            tensor([17.5000])
        """
        sampling = tail_samples, tolerance, generator
        return read(self, query, mode, k, where, exclude, temperature, normalizer, *sampling, bias)

    @without_transforms
    @torch.no_grad()
    def audit(
        self,
        queries: Tensor,  # (..., key_dim)
        k: int,
        where: Where | None = None,
        exclude: Ids | None = None,
        temperature: float | Tensor | None = None,
    ) -> Audit:
        """Compare topk reads with exact reads of the same queries.

        The result reports the rows that the index misses and the softmax mass that k candidates leave out. The cost is
        that of an exact read with ``k`` and a topk read. The reads do not count in `usage`.

        Args:
            queries: (..., key_dim), a sample of the queries that the store will answer.
            k: Number of candidates.
            where: As for `read`.
            exclude: As for `read`.
            temperature: As for `read`.

        Returns:
            An `Audit`.

        Raises:
            ArgumentError: An argument is out of range.
            ShapeError: A tensor has the wrong shape.
            DtypeError: An argument has the wrong type.
            DeviceError: A tensor is not on the device of the store.
            NonFiniteError: A query is NaN or infinite somewhere.
            UnknownIdError: ``where`` has an id that is not in the store.

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

    def check(self) -> None:
        """Raise the pending error of reads and optimizer steps on a GPU.

        On the CPU, a read raises its errors itself, and this method does nothing. On a GPU, the host would have to wait
        for the result of each check. There, a query with NaN or infinity gives NaN for that query only, a step of
        `softdb.optim.RowAdam` or `RowAdagrad` skips rows whose gradients are not finite, and the device records the
        failure. This method waits for the device. If any read or step since the last check has failed, it raises one
        error and forgets the failures. `index_stats`, `save` and each method that writes rows call it first, before
        anything has changed, so that the same call can be repeated. docs/gpu.md says what to do after the error.

        Raises:
            NonFiniteError: A query, bias, score or gradient of a row was NaN or infinite.
            ArgumentError: A temperature tensor was not finite and above 0.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> ids = store.add(torch.eye(4), torch.ones(4, 2))
            >>> read = store.read(torch.ones(4))
            >>> store.check()
        """
        self.rows.pending_checks.raise_failed()

    # -- the index -------------------------------------------------------------------------------------------

    @without_transforms
    def build_index(self) -> None:
        """Build the index of topk reads from the current rows.

        An existing index is replaced. Reads build the index when it is needed; call this method to choose the time. If
        the configuration selects exact search ("Flat", or "auto" with few rows), the method does nothing. Several
        indexes may be trained, of which the best is kept; for each, the cost is linear in the number of rows.

        Raises:
            IndexBuildError: FAISS fails, or memory runs out. Reads then use exact search.
        """
        self._table.check_not_meta()
        with self.writing():
            self._index.build(self.rows, self.keys.detach())

    @without_transforms
    def refresh(self, *, wait: bool = False) -> None:
        """Add the pending rows to the index, so that searches do not scan them.

        The cost is linear in the number of pending rows. If a rebuild is due, the cost is that of `build_index`.

        Args:
            wait: With ``IndexConfig(background=True)``, whether to wait for a build in progress, and use its result.

        Raises:
            IndexBuildError: The last build failed, in the background or in a read, and no call has reported it yet.
        """
        self._table.check_not_meta()
        with self.writing():
            self._index.refresh(self.rows, self.keys.detach(), wait=bool(wait))

    def index_stats(self) -> IndexStats:
        """Return the state of the index and its costs so far.

        ``factory`` is "Flat" while the store has fewer rows than the configured index needs.

        Returns:
            An `IndexStats`.

        Raises:
            NonFiniteError: As for `check`.
            ArgumentError: As for `check`.
        """
        self._table.check_not_meta()
        self.check()
        return self._access.reading(lambda: self._index.stats(self.rows, self.keys.detach()))

    # -- saving and loading ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, timeout: float = 0.0) -> None:
        """Write the store to the directory ``path``, atomically and durably.

        The snapshot holds rows, ids, fields, usage and settings. Tensors are safetensors files, each with its hash. The
        index, gradients and optimizer states are not saved: a loaded store builds its own index. If saving fails, the
        directory still holds its previous snapshot. Rows are written without a copy in memory.

        Args:
            path: Directory. It is created if it does not exist; its parent must exist. An existing snapshot is
                replaced once the new one is complete, so the disk needs room for both. Use a separate directory: a
                ``manifest.json`` of another program would be replaced too.
            timeout: Seconds to wait while another save to the same path is in progress.

        Raises:
            LockedError: Another save to the path did not finish within ``timeout``.
            OSError: The system reports an error. The previous snapshot and the store are unchanged.
            UnsupportedSystemError: The system has no POSIX files and locks.
            ArgumentError: ``timeout`` is negative or NaN, or ``path`` is not a valid path. Or as for `check`.
            NonFiniteError: As for `check`. Nothing has been written; the next call saves.
            DtypeError: An argument has the wrong type.

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
        self.check()
        with lock_directory(path, timeout) as directory:  # writes of rows are allowed until then
            self._access.reading(lambda: write_snapshot(directory, *collect_contents(self._table, self._index.config)))

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
        """Load the store that was saved to the directory ``path``, with its settings.

        Every byte is compared with its hash. Nothing in the directory is executed, and no symbolic link is followed.

        Args:
            path: Directory that `save` wrote.
            mmap: Whether to map the files of keys and values into memory instead of reading them. Use it to read a few
                rows, or more rows than fit in memory. The store is read-only until `materialize`, and its keys and
                values have no gradients. Other processes may save to the path meanwhile. If a mapped file is
                truncated or the disk fails, the next access to it ends the process (SIGBUS).
            verify: With ``mmap``, whether to read keys and values once and compare them with their hashes. Without
                ``mmap`` this is always done.
            device: Device of the loaded store. If None, the CPU.

        Returns:
            The store.

        Raises:
            FileNotFoundError: There is no snapshot.
            CorruptSnapshotError: The snapshot differs from what was saved. The message names the file and the tensor.
            ArgumentError: The snapshot was made by a newer softdb, or ``mmap`` is used with a ``device`` other than the
                CPU.
            DeviceError: The ``device`` is not available, or is the meta device.
            OSError: The system cannot read a file. The snapshot may be valid.
            MemoryError: The store does not fit in memory. The snapshot may be valid.
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
        """Copy the rows of a store that was loaded with ``mmap=True`` into memory.

        The store accepts writes afterwards. ``keys`` and ``values`` remain the same objects. For any other store it
        does nothing.
        """
        self._writer.materialize()

    # -- threads ---------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Block reads in other threads until the block ends.

        Reads in other threads then see all writes of the block, or none. Use it for your own writes to ``keys`` and
        ``values`` and for steps of optimizers of ``torch.optim``, which the store cannot detect in advance, and for
        several writes that belong together. A single `add`, `put`, `update`, `revive`, `delete`, `clear` or step of an
        optimizer of `softdb.optim` does not need it: each of them is already atomic for concurrent reads. Run
        ``backward`` in the thread that writes, because backward reads the rows again.

        Example:
            >>> import torch
            >>> from softdb import SoftKVStore
            >>> store = SoftKVStore(key_dim=4, value_dim=2)
            >>> with store.writing():  # readers see both writes or none
            ...     old = store.add(torch.eye(4), torch.ones(4, 2))
            ...     store.delete(old[:2])
        """
        with self._access.writing():
            yield

    def _check(self) -> None:
        """Raise a RuntimeError that names the first violated invariant, for tests."""
        self._access.reading(lambda: check_invariants(self._table, self._index.invariants(self.rows)))
