"""`update_average`: an exponential moving average of a model, by id."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from softdb._checks import check_not_meta, check_real, describe
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.store import SoftKVStore
from softdb.table.averages import prepare_average

__all__ = ["update_average"]


@torch.inference_mode(False)
@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Update an exponential moving average of a model, matching rows by id.

    For each Parameter, and for the keys and values of each row, equal to::

        average = decay * average + (1 - decay) * model

    A row that is new in ``model``, or whose content `SoftKVStore.revive` has replaced, is copied. Rows that ``model``
    has deleted are deleted. The storage of ``average`` is resized to that of ``model``. Ids, fields, usage counters and
    eviction clocks of stores, and all other buffers, are copied from ``model``.

    `torch.optim.swa_utils.AveragedModel` averages tensors slot by slot instead. It raises an error when a store has
    grown, and mixes two rows when a new row has reused the slot of a deleted row.

    Args:
        average: A store, or a module that contains stores: initially ``copy.deepcopy(model)``, or an
            ``AveragedModel``, whose ``update_parameters`` must not be called in addition. If rows are in half
            precision, convert it with ``average.float()``; otherwise updates below half a unit in the last place are
            lost.
        model: The model to average. Like ``average``, it may be wrapped by DistributedDataParallel, ``AveragedModel``
            or torch.compile.
        decay: Factor of the old average, from 0 to 1.

    Raises:
        ArgumentError: The modules do not match, or ``decay`` is out of range.
        ShapeError: A Parameter or buffer outside of the stores has another shape in ``average``.
        ReadOnlyError: The rows of ``average`` are memory-mapped files.
        GrowthError: The storage of ``average`` must be resized, but ``backward`` of a read of it is still due.
        DtypeError: An argument has the wrong type.

    Source: Polyak & Juditsky 1992 (doi 10.1137/0330046), with the exponential weights of Tarvainen & Valpola 2017
    (arXiv 1703.01780).

    Example:
        >>> import copy, torch
        >>> from softdb import SoftKVStore
        >>> from softdb.optim import update_average
        >>> store = SoftKVStore(key_dim=2, value_dim=1, trainable=True)
        >>> ids = store.add(torch.zeros(2, 2), torch.tensor([[0.0], [10.0]]))
        >>> average = copy.deepcopy(store)
        >>> store.delete([0])
        >>> store.update([1], values=torch.tensor([[20.0]]))
        >>> ids = store.add(torch.ones(1, 2), torch.tensor([[5.0]]))
        >>> update_average(average, store, decay=0.9)
        >>> average.get([1, 2]).values
        tensor([[11.],
                [ 5.]])
    """
    decay = check_real("decay", decay)
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay: expected a number from 0 to 1, got {decay}")
    for name, module in (("average", average), ("model", model)):
        if not isinstance(module, nn.Module):
            raise DtypeError(f"{name}: expected a module, got {describe(module)}")
    averaged, source = _unwrap(average), _unwrap(model)
    if averaged is source:
        raise ArgumentError(
            "average: expected a copy of the model, got the model itself; start from copy.deepcopy(model)"
        )
    stores = _pair_stores(averaged, source)
    pairs = _pair_other_tensors(averaged, source, stores)
    for own, other in stores.values():
        check_not_meta("average", own.keys, "load_state_dict()")
        check_not_meta("model", other.keys, "load_state_dict()")
    with ExitStack() as locks:
        # All threads take the locks in the same order, which prevents a deadlock.
        for store in sorted({store for pair in stores.values() for store in pair}, key=id):
            locks.enter_context(store.writing())
        # Compute all updates before applying the first: an error then changes nothing, and stores may share a tensor.
        updates = [prepare_average(mine._table, theirs._table, decay) for mine, theirs in stores.values()]
        for update in updates:
            update()
    for mine, theirs, is_parameter in pairs:
        if is_parameter:
            _lerp_(mine, theirs, decay)
        else:
            mine.copy_(theirs)
    if isinstance(average, AveragedModel):
        average.n_averaged += 1


def _unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside an AveragedModel, DDP or torch.compile wrapper."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, (AveragedModel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _pair_stores(average: nn.Module, model: nn.Module) -> dict[str, tuple[SoftKVStore, SoftKVStore]]:
    """Pair the stores of both modules by name."""
    stores, model_stores = (
        {name: module for name, module in root.named_modules() if isinstance(module, SoftKVStore)}
        for root in (average, model)
    )
    if stores.keys() != model_stores.keys():
        raise ArgumentError(
            f"average: expected stores at {sorted(model_stores)}, as in the model, got {sorted(stores)}; start from "
            "copy.deepcopy(model)"
        )
    pairs = {name: (stores[name], model_stores[name]) for name in stores}
    for name, (mine, theirs) in pairs.items():
        if mine is theirs:
            raise ArgumentError(
                f"average: expected a copy of each store, got the model's own store at {name!r}; start from "
                "copy.deepcopy(model)"
            )
    return pairs


def _pair_other_tensors(
    average: nn.Module, model: nn.Module, stores: dict[str, tuple[SoftKVStore, SoftKVStore]]
) -> list[tuple[Tensor, Tensor, bool]]:
    """Return pairs of the tensors outside of stores, and whether they are Parameters."""
    prefixes = tuple(f"{name}." if name else "" for name in stores)
    pairs: list[tuple[Tensor, Tensor, bool]] = []
    for is_parameter in (True, False):
        mine, theirs = (
            {
                name: tensor.detach()
                for name, tensor in (root.named_parameters() if is_parameter else root.named_buffers())
                if not (prefixes and name.startswith(prefixes))
            }
            for root in (average, model)
        )
        if mine.keys() != theirs.keys():
            raise ArgumentError(
                "average: expected the Parameters and buffers of the model, got a difference in "
                f"{sorted(mine.keys() ^ theirs)[:5]}; start from copy.deepcopy(model)"
            )
        for name, tensor in mine.items():
            if tensor.shape != theirs[name].shape:
                raise ShapeError(
                    f"average: expected {name} of shape {tuple(theirs[name].shape)}, as in the model, got "
                    f"{tuple(tensor.shape)}; start from copy.deepcopy(model)"
                )
            pairs.append((tensor, theirs[name], is_parameter))
    return pairs


def _lerp_(average: Tensor, model: Tensor, decay: float) -> None:
    """Update ``average`` in place; copy integers and booleans."""
    model = model.to(average.device)
    if not average.is_floating_point() and not average.is_complex():
        average.copy_(model)
        return
    wide = torch.promote_types(average.dtype, torch.float32)
    average.copy_(torch.lerp(model.to(wide), average.to(wide), decay))
