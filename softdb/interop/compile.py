"""Operators of their own in graphs of torch.compile: the reads of a store, and blends of a table's rows.

A read is one opaque operator whose body is the eager read.

Every contract of a read (checks, errors, upkeep of the index, what is stale) lies in Python that depends on data, so
nothing of it is traced. ``softdb::read`` runs it when the graph runs; where gradients are wanted, it keeps the eager
autograd graph, on a *ticket* that the compiled graph saves for its backward, and ``softdb::read_backward`` goes through
what is on the ticket. A ticket is a tensor, so it lives exactly as long as torch keeps what a backward needs, and what
is on it goes with it: after the backward, unless that retains the graph, or with an answer that never goes backward.

A read whose result is not used would go, and two that are equal would become one: stores that count reads count by an
operator of its own, ``softdb::count``, which is declared to write to a tensor and so stays.

Stores enter a graph as a tensor too, the *handle* that each has: as a constant it would be a graph for every store.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from softdb.errors import ArgumentError, StaleReadError, TransformError
from softdb.interop.graphs import count_read_in_graph, refuse_second_derivative
from softdb.reading.counting import deferring, note_read
from softdb.reading.result import Read, answer_dtype
from softdb.scoring.metrics import compute_dtype
from softdb.scoring.normalizers import SPARSE, in_eval_mode
from softdb.table.storage import RowStorage
from softdb.transforms import disable_compile, is_active, is_exporting, is_traced

__all__ = ["new_handle", "read_in_graph"]


class Store(Protocol):
    """What is needed of a `softdb.SoftKVStore`."""

    keys: Tensor
    values: Tensor
    rows: RowStorage
    temperature: float
    trainable: bool
    sparse_grad: bool
    training: bool
    _handle: Tensor

    @property
    def read(self) -> Callable[..., Read]:
        """Answers a batch of queries."""


# values, ids, weights, scores, lse, mass and the ticket of a read; empty where there is none
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


UNTRACED = (
    "softdb: where: expected a bool mask or int64 ids, since a callable, like an argument of an unknown type, cannot "
    "be part of a compiled or exported graph, nor can a sample, a tolerance, 'gumbel', or a sparse normalizer with "
    "mode='topk'; pass a mask or ids, read outside of the graph, or leave out fullgraph=True"
)


_numbers = itertools.count(1)


_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


_kept: dict[int, _Kept] = {}


# At which version of its rows a store was last read for a backward.
_last_version: weakref.WeakKeyDictionary[Store, int] = weakref.WeakKeyDictionary()


@torch.inference_mode(False)
def new_handle(store: Store) -> Tensor:
    """A tensor that stands for ``store`` in compiled graphs, by a number that no store of another process has."""
    number = secrets.randbits(63)
    _stores[number] = store
    return torch.tensor(number, device="cpu")


def _store_of(handle: Tensor) -> Store:
    store = _stores.get(int(handle))
    if store is None:
        raise ArgumentError(
            "store: a compiled or exported graph reads a store that no longer exists in this process, or is in another "
            "one; compile or export the model again, where its store is"
        )
    return store


@dataclass(frozen=True, eq=False)
class _Kept:
    """An eager read that waits for its backward, and the slots and weights that it reports, where it is to be counted.

    Attributes:
        read: The read.
        inputs: Query, keys, values, temperature; None where no gradient is wanted.
        reported: Slots and weights.
    """

    read: Read
    inputs: tuple[Tensor | None, ...]
    reported: tuple[tuple[Tensor, Tensor], ...] = ()


def read_in_graph(store: Store, query: Tensor, **options: Any) -> Read:
    """``store.read(query, **options)`` as an operator of the graph; where that cannot be, a graph break."""
    if is_active():  # Dynamo goes through transforms by itself, and finds no rule for the operator
        return _read_outside(store, query, **options)
    mode, k, normalizer = options["mode"], options["k"], options["normalizer"]
    where, exclude, temperature = options["where"], options["exclude"], options["temperature"]
    if not store.training:
        normalizer = in_eval_mode(normalizer)
    chosen = store.temperature if temperature is None else temperature
    fits = (
        isinstance(query, Tensor)
        and isinstance(mode, str)
        and isinstance(normalizer, str)
        and not (mode == "topk" and normalizer in SPARSE)  # k may be doubled
        and normalizer != "gumbel"  # two reads that are written alike are not to become one
        and (k is None or (isinstance(k, int) and not isinstance(k, bool)))
        and (where is None or (not callable(where) and isinstance(where, Tensor)))  # torch 2.6 traces callable() alone
        and (exclude is None or isinstance(exclude, Tensor))
        and isinstance(chosen, (int, float, Tensor))
        and not isinstance(chosen, bool)
        and options["tail_samples"] == 0
        and options["tolerance"] is None
        and options["generator"] is None
    )
    if not fits:
        return _read_outside(store, query, **options)
    divisor = chosen if isinstance(chosen, Tensor) else None
    number = None
    if temperature is not None and divisor is None:
        # As a tensor: a number that changes from step to step would be a new graph each time.
        number = torch.ones((), dtype=torch.float64, device="cpu") * float(chosen)
    # Only what graphs call for its effect stays where its result is not used, and is not merged with its like.
    counts = store.rows.counts_reads and not is_exporting()
    keys, values = store.keys, store.values
    wanted = [False] * 4
    if torch.is_grad_enabled():
        wanted = [tensor is not None and tensor.requires_grad for tensor in (query, keys, values, divisor)]
    answer, ids, weights, scores, lse, mass, ticket = torch.ops.softdb.read.default(
        query,
        keys,
        values,
        divisor,
        where,
        exclude,
        store._handle,
        mode,
        k,
        number,
        normalizer,
        answer_dtype(query),
        wanted,
        store.trainable and store.sparse_grad and mode != "exact",
        not counts,
    )
    if counts:
        torch.ops.softdb.count.default(store._handle, ticket)
    name = "hard" if mode == "hard" else normalizer
    if mode == "exact" and k is None:
        return Read(answer, None, None, None, lse, mass, normalizer=name)
    return Read(answer, ids, weights, scores, lse, mass, normalizer=name)


@disable_compile(UNTRACED)
def _read_outside(store: Store, query: Tensor, **options: Any) -> Read:
    """The eager read, which breaks a graph that is being traced."""
    if is_traced(query):
        raise TransformError(UNTRACED)
    return store.read(query, **options)


@torch.library.custom_op(
    "softdb::read",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor? temperature, Tensor? where, Tensor? exclude, "
    "Tensor handle, str mode, SymInt? k, Tensor? number, str normalizer, ScalarType answer, bool[] wanted, "
    "bool sparse, bool counting=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read(
    query: Tensor,  # (..., key_dim)
    keys: Tensor,  # (capacity, key_dim)
    values: Tensor,  # (capacity, value_dim)
    temperature: Tensor | None,
    where: Tensor | None,
    exclude: Tensor | None,
    handle: Tensor,  # () int64
    mode: str,
    k: int | None,
    number: Tensor | None,
    normalizer: str,
    answer: torch.dtype,
    wanted: Sequence[bool],
    sparse: bool,
    counting: bool = True,
) -> Outputs:
    """The eager read; which gradients of query, keys, values and temperature are wanted is known to the tracer only."""
    store = _store_of(handle)
    for name, given, own in (("keys", keys, store.keys), ("values", values, store.values)):
        if given.data_ptr() == own.data_ptr() and given.shape == own.shape:
            continue
        if not torch.equal(given, own.detach()):  # a copy would do
            raise ArgumentError(
                f"{name}: expected the store's own tensor in its compiled graph, got another; write to a store outside "
                "of graphs, and read tensors that a graph makes with softdb.functional"
            )
    divisor = None if number is None else float(number)
    options: dict[str, Any] = {"mode": mode, "k": k, "where": where, "exclude": exclude, "normalizer": normalizer}
    reported: list[tuple[Tensor, Tensor]] = []
    if not any(wanted):
        with torch.no_grad(), _autocast(query, answer), deferring(None if counting else reported):
            read = store.read(query, temperature=divisor if temperature is None else temperature, **options)
        return _outputs(read, query, _ticket(_Kept(read, (), tuple(reported))) if reported else _ticket(None))
    _check_repetition(store)
    # Copies: the graph may use its own tensors' memory anew.
    own_query = query.detach().clone().requires_grad_(wanted[0])
    own_temperature = None if temperature is None else temperature.detach().clone().requires_grad_(wanted[3])
    with _autograd(), _autocast(query, answer), deferring(None if counting else reported):
        read = store.read(own_query, temperature=divisor if own_temperature is None else own_temperature, **options)
    inputs = (own_query, store.keys, store.values, own_temperature)
    return _outputs(read, query, _ticket(_Kept(read, inputs, tuple(reported))))


def _ticket(kept: _Kept | None) -> Tensor:
    """Make a tensor that keeps something as long as it lives."""
    if kept is None:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    number = next(_numbers)
    ticket = torch.tensor(number, device="cpu")
    weakref.finalize(ticket, _kept.pop, number, None)
    _kept[number] = kept
    return ticket


@_read.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: Tensor | None,
    where: Tensor | None,
    exclude: Tensor | None,
    handle: Tensor,
    mode: str,
    k: int | None,
    number: Tensor | None,
    normalizer: str,
    answer: torch.dtype,
    wanted: Sequence[bool],
    sparse: bool,
    counting: bool = True,
) -> Outputs:
    leading, dtype = query.shape[:-1], compute_dtype(query, keys, values)
    width = 1 if mode == "hard" or (mode == "topk" and k is None) else k  # without k, topk is an error when it runs
    rows = (0,) if width is None else (*leading, width)
    return (
        query.new_empty((*leading, values.shape[-1]), dtype=answer),
        query.new_empty(rows, dtype=torch.int64),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(leading, dtype=dtype),
        query.new_empty(leading, dtype=dtype),
        torch.empty((), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("softdb::count", mutates_args=("handle",), schema="(Tensor(a!) handle, Tensor ticket) -> ()")
def _count(handle: Tensor, ticket: Tensor) -> None:
    """Count the read that made the ticket; said to write to the handle, so that every call counts, in order."""
    kept, store = _kept.get(int(ticket)), _store_of(handle)
    if kept is not None:
        for slots, weights in kept.reported:
            note_read(store.rows, slots, weights)


@_count.register_fake
def _(handle: Tensor, ticket: Tensor) -> None:
    pass


# Not torch.library.custom_op: in torch 2.6, the operators that it makes cannot return row-sparse tensors.
torch.library.define(
    "softdb::read_backward",
    "(Tensor ticket, Tensor? values, Tensor? weights, Tensor? scores, Tensor? lse, Tensor? mass, "
    "Tensor? temperature, SymInt[] query_shape, ScalarType query_dtype, SymInt[] keys_shape, ScalarType keys_dtype, "
    "SymInt[] values_shape, ScalarType values_dtype, Device device, bool[] wanted, bool sparse) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("softdb::read_backward", "default")
def _read_backward(
    ticket: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    lse: Tensor | None,
    mass: Tensor | None,
    temperature: Tensor | None,
    query_shape: Sequence[int],
    query_dtype: torch.dtype,
    keys_shape: Sequence[int],
    keys_dtype: torch.dtype,
    values_shape: Sequence[int],
    values_dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, keys, values and temperature, from those of a read's members."""
    kept = _kept.get(int(ticket))
    if kept is None:
        raise StaleReadError(
            "the eager graph of a compiled read is gone before its backward, since something (a saved-tensor hook?) "
            "replaced the tensors that torch had saved for it; read outside of the graph"
        )
    given = {"values": values, "weights": weights, "scores": scores, "lse": lse, "mass": mass}
    pairs = [(getattr(kept.read, name), gradient) for name, gradient in given.items() if gradient is not None]
    pairs = [(output, gradient) for output, gradient in pairs if output is not None and output.requires_grad]
    leaves = [tensor for tensor, want in zip(kept.inputs, wanted, strict=True) if want and tensor is not None]
    found: list[Tensor | None] = [None] * len(leaves)
    if pairs:
        outputs, gradients = zip(*pairs, strict=True)
        with _autograd():
            # The graph stays until the ticket goes: a backward may be repeated.
            found = list(torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True))
    results = iter(zip(leaves, found, strict=True))
    layouts = (False, sparse, sparse, False)
    return tuple(  # type: ignore[return-value]
        _laid_out(*next(results), rows) if want else torch.empty(0, device=device)
        for want, rows in zip(wanted, layouts, strict=True)
    )


def _fake_read_backward(
    ticket: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    lse: Tensor | None,
    mass: Tensor | None,
    temperature: Tensor | None,
    query_shape: Sequence[int],
    query_dtype: torch.dtype,
    keys_shape: Sequence[int],
    keys_dtype: torch.dtype,
    values_shape: Sequence[int],
    values_dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.sparse_coo if sparse else torch.strided
    made = (
        (query_shape, query_dtype, torch.strided),
        (keys_shape, keys_dtype, rows),
        (values_shape, values_dtype, rows),
    )
    results = [
        torch.empty(shape, dtype=dtype, device=device, layout=layout) if want else torch.empty(0, device=device)
        for (shape, dtype, layout), want in zip(made, wanted[:3], strict=True)
    ]
    divisor = temperature if temperature is not None and wanted[3] else torch.empty(0, device=device)
    return results[0], results[1], results[2], torch.empty_like(divisor, memory_format=torch.contiguous_format)


torch.library.register_fake("softdb::read_backward", _fake_read_backward)
torch.library.register_autograd("softdb::read_backward", refuse_second_derivative)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, keys, values, temperature = inputs[:4]
    mode, k, ctx.wanted, ctx.sparse = inputs[7], inputs[8], inputs[12], inputs[13]
    ctx.reads = count_read_in_graph(keys)
    ctx.shapes = [part for table in (query, keys, values) for part in (table.shape, table.dtype)]
    ctx.device = query.device
    ctx.save_for_backward(output[-1], temperature)
    ctx.set_materialize_grads(False)
    if mode != "exact" or k is None:
        ctx.mark_non_differentiable(output[5])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ticket, temperature = ctx.saved_tensors
    values, _, weights, scores, lse, mass, _ = grads
    sparse = ctx.sparse and ctx.reads.count == 1
    results = torch.ops.softdb.read_backward.default(
        ticket, values, weights, scores, lse, mass, temperature, *ctx.shapes, ctx.device, ctx.wanted, sparse
    )
    return *(result if want else None for result, want in zip(results, ctx.wanted, strict=True)), *[None] * 11


_read.register_autograd(_differentiate, setup_context=_save)


def _outputs(read: Read, query: Tensor, ticket: Tensor) -> Outputs:
    """The members of a read as an operator may return them: no views, none missing, and nothing of its graph."""
    members: list[Tensor] = []
    for member in (read.values, read.ids, read.weights, read.scores, read.lse, read.mass):
        if member is None:
            members.append(query.new_empty(0, dtype=torch.int64 if len(members) == 1 else read.lse.dtype))
        else:
            members.append(member.detach().clone(memory_format=torch.contiguous_format))
    return *members, ticket  # type: ignore[return-value]


def _laid_out(leaf: Tensor, gradient: Tensor | None, sparse: bool) -> Tensor:
    if sparse:
        if gradient is None:
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device, layout=torch.sparse_coo)
        return gradient if gradient.layout != torch.strided else gradient.to_sparse(1)
    if gradient is None:
        return torch.zeros_like(leaf, memory_format=torch.contiguous_format)
    return gradient.to_dense() if gradient.layout != torch.strided else gradient.contiguous()


def _check_repetition(store: Store) -> None:
    """Raise if activation checkpointing repeats a read after rows were written, as far as can be told."""
    version = store.rows.version
    if torch._C._current_graph_task_id() == -1:  # not within a backward
        _last_version[store] = version
    elif _last_version.get(store, version) != version:
        raise StaleReadError(
            "activation checkpointing repeated a compiled read after rows had been written, so its gradients would be "
            "those of another read; call backward() before writing to the store"
        )


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd within the body of an operator, where it is switched off a level below `torch.enable_grad`."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.inference_mode(False), torch.enable_grad():
        yield


def _autocast(query: Tensor, answer: torch.dtype) -> torch.autocast:
    """Autocast as it was where the graph was traced; it is off where one runs."""
    if answer == query.dtype:
        return torch.autocast(query.device.type, enabled=False)
    return torch.autocast(query.device.type, dtype=answer)
