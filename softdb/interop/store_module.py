"""Module conventions of a store: assignment, conversion, state dicts, copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softdb.attributes import ModuleWithProperties
from softdb.index.manager import IndexManager
from softdb.interop.ddp import is_called_by_ddp, make_stand_in
from softdb.interop.module import check_assigned, check_deletion, convert, describe_store, replace_tensor
from softdb.interop.pickling import send_copies, set_up_replica
from softdb.interop.state_dict import load_state
from softdb.table.access import Access
from softdb.table.overwrites import observe_listing
from softdb.table.storage import RowStorage
from softdb.table.table import Table
from softdb.transforms import is_active, suspend_transforms, without_transforms

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self from Python 3.11

__all__ = ["StoreModule"]


class StoreModule(ModuleWithProperties):
    """Base class of the store, with the methods that torch calls on a module.

    `softdb.SoftKVStore` adds the methods that users call.
    """

    keys: Tensor
    values: Tensor
    rows: RowStorage
    trainable: bool
    sparse_grad: bool
    _table: Table
    _access: Access
    _index: IndexManager
    # Value of ``strict`` during `load_state_dict`; torch does not pass it to `_load_from_state_dict`.
    _is_strict = False

    def _assemble(self) -> None:
        """Create the objects that read and write the table, for a new store or a copy."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("keys", "values") and "rows" in self.__dict__.get("_modules", ()):
            replace_tensor(self._table, name, value, super().__setattr__)
        else:
            super().__setattr__(name, check_assigned(self, name, value))

    def __delattr__(self, name: str) -> None:
        check_deletion(self, name)
        super().__delattr__(name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules as `torch.nn.Module` does; yield a stand-in to DDP.

        The stand-in has the same Parameters, but not the buffers of the rows. Otherwise DistributedDataParallel would
        overwrite the buffers of each process with those of rank 0 before every forward. If gradients are row-sparse,
        the stand-in is an embedding, because DDP accepts such gradients of embeddings only.
        """
        with suspend_transforms() if is_active() else nullcontext():
            observe_listing(self._table)
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if (module is not self and module is not self.rows) or not is_called_by_ddp():
                yield name, module
            elif module is self:
                yield name, make_stand_in(self, sparse=self.trainable and self.sparse_grad)

    def extra_repr(self) -> str:
        """Return the settings that ``repr`` shows between the parentheses."""
        return describe_store(self, self._index.config.factory)

    @without_transforms
    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with self._access.exclusive():
            convert(self._table, fn, lambda: super(StoreModule, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the rows and their usage from a state dict, completely or not at all.

        If ``state_dict`` has no counters (``rows.reads``, ``rows.weight``), they start at 0. If it has no eviction
        clock (``rows.used_at``, ``rows.added_at``), rows are evicted in slot order. Such names are reported as missing.
        Counters or clocks that this store does not keep are reported as unexpected. Missing and unexpected names are
        errors if ``strict``. If any other name is missing, nothing is loaded, and the missing names include ``keys``
        and ``values``.

        Args:
            state_dict: Result of ``state_dict()`` of a store.
            strict: Whether missing or unexpected names raise an error, before anything is loaded. If another module
                that contains the store loads the state dict, the error may come after the rows are loaded.
            assign: As for `torch.nn.Module.load_state_dict`.

        Returns:
            The missing and the unexpected names, as for `torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: ``strict`` is True and names differ.
            GrowthError: The storage must change its size but cannot now.
            ArgumentError: The tensors are not those of a store.
            DtypeError: A tensor has the wrong dtype.
            ShapeError: A tensor has the wrong shape.
            NonFiniteError: A key or value is NaN or infinite.
            DuplicateIdError: An id occurs twice.
        """
        with self.rows.access.writing():
            self._is_strict = bool(strict)
            try:
                return super().load_state_dict(state_dict, strict=strict, assign=assign)
            finally:
                self._is_strict = False

    def _save_to_state_dict(self, *args: Any) -> None:
        observe_listing(self._table)
        self._access.reading(lambda: super(StoreModule, self)._save_to_state_dict(*args))

    @without_transforms
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        assigns = local_metadata.get("assign_to_params_buffers", False)
        with self._access.changing("load_state_dict", allows_meta=assigns, loads=True):
            load = super()._load_from_state_dict
            load_state(self._table, load, self._is_strict, state_dict, prefix, local_metadata, *args)

    def _replicate_for_data_parallel(self) -> Any:
        return set_up_replica(self, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        with self.writing():  # Completes an interrupted write, if there is one.
            pass
        derived = ("_access", "_writer", "_reader", "_handle")
        state = {name: value for name, value in self.__dict__.items() if name not in derived}
        return state | {"_table": copy.copy(self._table)}  # Each copy of the table refers to its own store.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._assemble()
        self._table.record_versions()

    @without_transforms
    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy of one version of the rows, also while other threads write."""
        with self.writing():
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            copied.rows.average.begin(self._table, copied.rows.slot_rows)
        return copied

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        send_copies(cls)
