"""Loading of a ``state_dict`` into a store, completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softdb._checks import check_dense, check_finite, check_ids, describe
from softdb.errors import DeviceError, DtypeError
from softdb.table.average_watch import AverageWatch
from softdb.table.eviction import CLOCK_COLUMNS
from softdb.table.growth import change_columns
from softdb.table.hooks import pause_watching
from softdb.table.id_check import CHECK_SIZE
from softdb.table.journal import WRITE_OUTCOME, Growth
from softdb.table.state import check_state
from softdb.table.storage import RowStorage
from softdb.table.table import Table

__all__ = ["load_state"]

# Name under which torch saves the result of `get_extra_state` of a subclass.
EXTRA_STATE_KEY = "_extra_state"


def load_state(
    table: Table,
    load_tensors: Callable[..., None],
    is_strict: bool,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    *args: Any,
) -> None:
    """Load a state dict; load nothing if a tensor of the rows is invalid or missing.

    Args:
        table: The rows. No other thread may read or write them.
        load_tensors: ``_load_from_state_dict`` of `torch.nn.Module`.
        is_strict: Whether missing and unexpected names are an error. Torch always passes True as ``strict``.
        state_dict: The state dict.
        prefix: Prefix of the names.
        local_metadata: As torch passes it.
        strict: As torch passes it.
        missing_keys: List to which missing names are appended.
        unexpected_keys: List to which unexpected names are appended.
        *args: As torch passes them.
    """
    module, rows = table.module, table.rows
    hooks, none = module._load_state_dict_pre_hooks, type(module._load_state_dict_pre_hooks)()
    for hook in hooks.values():  # They may rename tensors, or add missing ones.
        hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args)
    missing, unexpected = _find_differing_names(table, state_dict, prefix, is_strict)
    if missing or unexpected:
        missing_keys.extend(sorted(missing))
        unexpected_keys.extend(unexpected)
        return
    names = _list_names(rows, prefix)
    growth = _prepare_storage(
        table, {name.removeprefix(prefix): state_dict[name] for name in names & state_dict.keys()}
    )
    others = (local_metadata, strict, missing_keys, unexpected_keys, *args)
    reports = (missing_keys, unexpected_keys, *args)
    reported = [len(report) for report in reports]

    def load() -> None:
        for report, count in zip(reports, reported, strict=True):
            del report[count:]  # remove what an interrupted attempt reported
        if growth is not None:
            table.install(growth)
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        with pause_watching(own), rows.recorded.suspend():  # torch may swap the tensors
            try:
                module._load_state_dict_pre_hooks = none
                load_tensors(state_dict, prefix, *others)
            finally:
                module._load_state_dict_pre_hooks = hooks
            _load_rows(rows, state_dict, f"{prefix}rows.", *others)
        for tensor in table.tensors().values():
            if 0 in tensor.stride() and tensor.numel() > 1:  # ``assign=True`` may assign an expanded tensor
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        # If torch fails to copy a tensor, for instance because memory runs out, it reports the error and continues with
        # the other tensors. The rows would then be a mixture of old and new rows.
        failed = [text for text in args[0][reported[2] :] if any(f'named "{name}"' in text for name in names)]
        if failed:
            raise RuntimeError(" ".join(failed))
        table.record_versions()

    table.journal.commit(load, WRITE_OUTCOME)


def _list_names(rows: RowStorage, prefix: str) -> set[str]:
    return {prefix + name for name in ("keys", "values", *(f"rows.{name}" for name in rows.saved))}


def _find_differing_names(
    table: Table, state_dict: Mapping[str, Any], prefix: str, is_strict: bool
) -> tuple[set[str], list[str]]:
    """Return the missing and unexpected names that prevent the rows from loading."""
    module, rows, names = table.module, table.rows, _list_names(table.rows, prefix)
    missing = names - state_dict.keys()
    own = {*module._parameters, *module._buffers, *module._modules} - {"rows"}
    if type(module).set_extra_state is not nn.Module.set_extra_state:
        own.add(EXTRA_STATE_KEY)
    given = [name for name in state_dict if name.startswith(prefix) and name not in names]
    unexpected = [name for name in given if name.removeprefix(prefix).partition(".")[0] not in own]
    if not missing <= {f"{prefix}rows.{name}" for name in rows.optional}:
        return missing | {f"{prefix}keys", f"{prefix}values"}, unexpected  # not loaded without the others
    if not (is_strict and (missing or unexpected)):
        return set(), []  # torch reports them
    return missing, unexpected


def _prepare_storage(table: Table, state: Mapping[str, Any]) -> Growth | None:
    """Check the tensors to load; return new storage if its size must change."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"state_dict[{name!r}]: expected a tensor, got {describe(tensor)}")
        if tensor.is_meta:
            raise DeviceError(f"state_dict[{name!r}]: expected a tensor with data, got one on the meta device")
        check_dense(f"state_dict[{name!r}]", tensor)
    for name, tensor in table.tensors().items():
        if table.rows.recorded.is_own(name, tensor):
            table.check_size(name, tensor)
    ids, config = state["rows.ids"], table.config
    capacity = ids.numel() if config.capacity is None else config.capacity
    check_state(state, capacity, config.widths)
    check_ids("state_dict['rows.ids']", ids[ids != -1])
    check_finite("state_dict['keys']", state["keys"])
    check_finite("state_dict['values']", state["values"])
    if capacity == table.rows.capacity:
        return None
    table.check_growth(capacity, loaded=True)
    return table.prepare_resize(capacity)


def _load_rows(rows: RowStorage, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load the buffers of rows; initialize missing counters and clocks.

    Counters and the clock of ``evict="lru"`` start at 0. The clock of ``evict="oldest"`` starts in slot order.
    """
    is_average, source = rows.average.is_active, rows.average.source
    rows.average = AverageWatch(is_updated=rows.average.is_updated)
    nn.Module._load_from_state_dict(rows, state_dict, prefix, *args)
    for name in rows.optional:
        if prefix + name not in state_dict:
            dtype = torch.float64 if name == "weight" else torch.int64
            initial = torch.zeros(rows.capacity, dtype=dtype, device=rows.ids.device)
            if name == CLOCK_COLUMNS["oldest"]:  # All ages must differ.
                initial = torch.arange(rows.capacity, device=rows.ids.device)
            setattr(rows, name, initial)
    for name in rows.saved:  # ``assign=True`` accepts any dtype.
        column = getattr(rows, name)
        # Copy a tensor that still belongs to the state dict, because another store may load it, too.
        is_shared = column.data_ptr() == getattr(state_dict.get(prefix + name), "data_ptr", int)()
        setattr(rows, name, column.to(torch.float64 if name == "weight" else torch.int64, copy=is_shared))
    if rows.changed_at.device != rows.ids.device:  # ``assign=True`` does not assign the change columns.
        for name, column in change_columns(rows.capacity, rows.ids.device).items():
            setattr(rows, name, column)
        rows.id_check = torch.zeros(CHECK_SIZE, dtype=torch.int64, device=rows.ids.device)
    if is_average:  # The loaded store most likely continues to be an average.
        rows.average.record(rows.slot_rows, is_updated=True)
    rows.average.source = None if source is None else source.restart(rows.ids, rows.generation)
    rows.derive()
