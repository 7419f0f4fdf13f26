"""Operators of torch.compile graphs that read a store.

A read is one opaque operator whose body is the eager read.

The argument checks, index upkeep and staleness check of a read are Python code that depends on data, so they cannot be
traced. The operator ``softdb::read`` runs them when the graph runs. If gradients are needed, the operator keeps the
eager autograd graph, attached to a *ticket*: a tensor that the compiled graph saves for its backward. The operator
``softdb::read_backward`` runs backward through the graph of the ticket. Torch frees the ticket after backward (unless
``retain_graph=True``), or together with a result that is never differentiated. The eager graph is freed with the
ticket.

Dead code elimination would remove a read whose result is not used, and common subexpression elimination would merge two
equal reads. A store that counts reads therefore counts by a separate operator, ``softdb::count``. That operator is
declared to mutate a tensor, so it is never removed.

A graph receives the store as a tensor, too: its *handle*. If the store were a constant of the graph, torch would
compile one graph for each store.
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
from softdb.interop.graphs import EAGER_OPTIONS, EAGER_TAGS, count_read_in_graph, refuse_second_derivative
from softdb.reading.counting import defer_counting, record_read
from softdb.reading.result import Read, answer_dtype
from softdb.scoring.metrics import compute_dtype
from softdb.scoring.normalizers import get_eval_normalizer, is_random, is_sparse
from softdb.table.storage import RowStorage
from softdb.transforms import disable_compile, is_active, is_exporting, is_traced

__all__ = ["new_handle", "read_in_graph"]


class Store(Protocol):
    """Attributes of a `softdb.SoftKVStore` that this module uses."""

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
        """Method that answers a batch of queries."""


# Values, ids, weights, scores, lse, mass and ticket of a read. A member that is None is an empty tensor.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


UNTRACED_MESSAGE = (
    "softdb: where: expected a bool mask or int64 ids in a compiled or exported graph, which does not support a "
    "callable, an argument of another type, tail_samples, tolerance, 'gumbel', or a sparse normalizer with "
    "mode='topk'; pass a mask or ids, read outside of the graph, or omit fullgraph=True"
)


_numbers = itertools.count(1)


_stores_by_number: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


_pending_reads: dict[int, _PendingRead] = {}


# Version of the rows of each store at its latest read with gradients.
_last_read_version: weakref.WeakKeyDictionary[Store, int] = weakref.WeakKeyDictionary()


@torch.inference_mode(False)
def new_handle(store: Store) -> Tensor:
    """Create a tensor that represents ``store`` in compiled graphs.

    Its element is a random number, so that stores in other processes have other numbers.
    """
    number = secrets.randbits(63)
    _stores_by_number[number] = store
    return torch.tensor(number, device="cpu")


def _find_store(handle: Tensor) -> Store:
    store = _stores_by_number.get(int(handle))
    if store is None:
        raise ArgumentError(
            "store: expected the store that the compiled or exported graph reads, got none in this process; keep a "
            "reference to the store, or compile or export the model again in the process of the store"
        )
    return store


@dataclass(frozen=True, eq=False)
class _PendingRead:
    """Eager read whose backward or count is still to run.

    Attributes:
        read: The read.
        inputs: Query, keys, values, temperature and bias in the eager graph; empty if no gradient is needed.
        reported: Slots and weights to count.
    """

    read: Read
    inputs: tuple[Tensor | None, ...]
    reported: tuple[tuple[Tensor, Tensor], ...] = ()


def read_in_graph(store: Store, query: Tensor, **options: Any) -> Read:
    """Run ``store.read(query, **options)`` as an operator, or break the graph."""
    if is_active():  # Dynamo traces transforms itself, and the operator has no rule for them.
        return _read_eagerly(store, query, **options)
    mode, k, normalizer = options["mode"], options["k"], options["normalizer"]
    where, exclude, temperature, bias = options["where"], options["exclude"], options["temperature"], options["bias"]
    if not store.training:
        normalizer = get_eval_normalizer(normalizer)
    chosen = store.temperature if temperature is None else temperature
    fits = (
        isinstance(query, Tensor)
        and isinstance(mode, str)
        and isinstance(normalizer, str)
        and not (mode == "topk" and is_sparse(normalizer))  # The width of the result depends on data.
        and not is_random(normalizer)  # Equal operators would be merged, and draw only once.
        and (k is None or (isinstance(k, int) and not isinstance(k, bool)))
        and (where is None or (not callable(where) and isinstance(where, Tensor)))  # torch 2.6 traces callable() only
        and (exclude is None or isinstance(exclude, Tensor))
        and (bias is None or isinstance(bias, Tensor))
        and isinstance(chosen, (int, float, Tensor))
        and not isinstance(chosen, bool)
        and options["tail_samples"] == 0
        and options["tolerance"] is None
        and options["generator"] is None
    )
    if not fits:
        return _read_eagerly(store, query, **options)
    divisor = chosen if isinstance(chosen, Tensor) else None
    number = None
    if temperature is not None and divisor is None:
        # Pass the number as a tensor, because torch would compile another graph for each new number.
        number = torch.ones((), dtype=torch.float64, device="cpu") * float(chosen)
    # Torch may remove or merge an operator that mutates nothing, so a separate, mutating operator counts.
    counts = store.rows.counts_reads and not is_exporting()
    keys, values = store.keys, store.values
    wanted = [False] * 5
    if torch.is_grad_enabled():
        wanted = [tensor is not None and tensor.requires_grad for tensor in (query, keys, values, divisor, bias)]
    answer, ids, weights, scores, lse, mass, ticket = torch.ops.softdb.read.default(
        query,
        keys,
        values,
        divisor,
        bias,
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


@disable_compile(UNTRACED_MESSAGE)
def _read_eagerly(store: Store, query: Tensor, **options: Any) -> Read:
    """Run the eager read, which breaks a graph that is being traced."""
    if is_traced(query):
        raise TransformError(UNTRACED_MESSAGE)
    return store.read(query, **options)


@torch.library.custom_op(
    "softdb::read",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor? temperature, Tensor? bias, Tensor? where, "
    "Tensor? exclude, Tensor handle, str mode, SymInt? k, Tensor? number, str normalizer, ScalarType answer, "
    "bool[] wanted, bool sparse, bool counting=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    **EAGER_OPTIONS,
)
def _read(
    query: Tensor,  # (..., key_dim)
    keys: Tensor,  # (capacity, key_dim)
    values: Tensor,  # (capacity, value_dim)
    temperature: Tensor | None,
    bias: Tensor | None,
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
    """Run the eager read.

    Which gradients of query, keys, values, temperature and bias are needed is known only while the graph is traced;
    ``wanted`` stores it.
    """
    store = _find_store(handle)
    for name, given, own in (("keys", keys, store.keys), ("values", values, store.values)):
        if given.data_ptr() == own.data_ptr() and given.shape == own.shape:
            continue
        if not torch.equal(given, own.detach()):  # a copy is accepted
            raise ArgumentError(
                f"{name}: expected the store's own tensor in the compiled or exported graph, got another tensor; write "
                "to a store outside of graphs, export again after its storage was resized, and read tensors that a "
                "graph computes with softdb.functional"
            )
    divisor = None if number is None else float(number)
    options: dict[str, Any] = {"mode": mode, "k": k, "where": where, "exclude": exclude, "normalizer": normalizer}
    reported: list[tuple[Tensor, Tensor]] = []
    if not any(wanted):
        with torch.no_grad(), _restore_autocast(query, answer), defer_counting(None if counting else reported):
            chosen = divisor if temperature is None else temperature
            read = store.read(query, temperature=chosen, bias=bias, **options)
        return _to_outputs(
            read, query, _make_ticket(_PendingRead(read, (), tuple(reported))) if reported else _make_ticket(None)
        )
    _check_recompute(store)
    # Copies, because the graph may reuse the memory of its own tensors.
    own_query = query.detach().clone().requires_grad_(wanted[0])
    own_temperature = None if temperature is None else temperature.detach().clone().requires_grad_(wanted[3])
    own_bias = None if bias is None else bias.detach().clone().requires_grad_(wanted[4])
    with _enable_autograd(), _restore_autocast(query, answer), defer_counting(None if counting else reported):
        chosen = divisor if own_temperature is None else own_temperature
        read = store.read(own_query, temperature=chosen, bias=own_bias, **options)
    inputs = (own_query, store.keys, store.values, own_temperature, own_bias)
    return _to_outputs(read, query, _make_ticket(_PendingRead(read, inputs, tuple(reported))))


def _make_ticket(kept: _PendingRead | None) -> Tensor:
    """Create a tensor that keeps ``kept`` alive until the tensor is freed."""
    if kept is None:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    number = next(_numbers)
    ticket = torch.tensor(number, device="cpu")
    weakref.finalize(ticket, _pending_reads.pop, number, None)
    _pending_reads[number] = kept
    return ticket


@_read.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: Tensor | None,
    bias: Tensor | None,
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
    width = 1 if mode == "hard" or (mode == "topk" and k is None) else k  # topk without k raises at run time
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


@torch.library.custom_op(
    "softdb::count", mutates_args=("handle",), schema="(Tensor(a!) handle, Tensor ticket) -> ()", **EAGER_OPTIONS
)
def _count(handle: Tensor, ticket: Tensor) -> None:
    """Count the read of a ticket.

    The operator is declared to mutate the handle, so that every call is executed, in order.
    """
    kept, store = _pending_reads.get(int(ticket)), _find_store(handle)
    if kept is not None:
        for slots, weights in kept.reported:
            record_read(store.rows, slots, weights)


@_count.register_fake
def _(handle: Tensor, ticket: Tensor) -> None:
    pass


# Operators made by torch.library.custom_op cannot return row-sparse tensors in torch 2.6.
torch.library.define(
    "softdb::read_backward",
    "(Tensor ticket, Tensor? values, Tensor? weights, Tensor? scores, Tensor? lse, Tensor? mass, "
    "Tensor? temperature, Tensor? bias, SymInt[] query_shape, ScalarType query_dtype, SymInt[] keys_shape, "
    "ScalarType keys_dtype, SymInt[] values_shape, ScalarType values_dtype, Device device, bool[] wanted, bool sparse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, *EAGER_TAGS),
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
    bias: Tensor | None,
    query_shape: Sequence[int],
    query_dtype: torch.dtype,
    keys_shape: Sequence[int],
    keys_dtype: torch.dtype,
    values_shape: Sequence[int],
    values_dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of query, keys, values, temperature and bias."""
    kept = _pending_reads.get(int(ticket))
    if kept is None:
        raise StaleReadError(
            "the eager graph of a compiled read was freed before its backward, because the tensors that torch saved "
            "for it were replaced, for instance by a saved-tensor hook; read outside of the graph"
        )
    given = {"values": values, "weights": weights, "scores": scores, "lse": lse, "mass": mass}
    pairs = [(getattr(kept.read, name), gradient) for name, gradient in given.items() if gradient is not None]
    pairs = [(output, gradient) for output, gradient in pairs if output is not None and output.requires_grad]
    leaves = [tensor for tensor, want in zip(kept.inputs, wanted, strict=True) if want and tensor is not None]
    found: list[Tensor | None] = [None] * len(leaves)
    if pairs:
        outputs, gradients = zip(*pairs, strict=True)
        with _enable_autograd():
            # Backward may be repeated, so the graph is kept until the ticket is freed.
            found = list(torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True))
    results = iter(zip(leaves, found, strict=True))
    layouts = (False, sparse, sparse, False, False)
    return tuple(  # type: ignore[return-value]
        _convert_layout(*next(results), rows) if want else torch.empty(0, device=device)
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
    bias: Tensor | None,
    query_shape: Sequence[int],
    query_dtype: torch.dtype,
    keys_shape: Sequence[int],
    keys_dtype: torch.dtype,
    values_shape: Sequence[int],
    values_dtype: torch.dtype,
    device: torch.device,
    wanted: Sequence[bool],
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    for tensor, want in zip((temperature, bias), wanted[3:], strict=True):
        like = tensor if tensor is not None and want else torch.empty(0, device=device)
        results.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return tuple(results)  # type: ignore[return-value]


torch.library.register_fake("softdb::read_backward", _fake_read_backward)
torch.library.register_autograd("softdb::read_backward", refuse_second_derivative)


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, keys, values, temperature, bias = inputs[:5]
    mode, k, ctx.wanted, ctx.sparse = inputs[8], inputs[9], inputs[13], inputs[14]
    ctx.reads = count_read_in_graph(keys)
    ctx.shapes = [part for table in (query, keys, values) for part in (table.shape, table.dtype)]
    ctx.device = query.device
    ctx.save_for_backward(output[-1], temperature, bias)
    ctx.set_materialize_grads(False)
    if mode != "exact" or k is None:
        ctx.mark_non_differentiable(output[5])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    ticket, temperature, bias = ctx.saved_tensors
    values, _, weights, scores, lse, mass, _ = grads
    sparse = ctx.sparse and ctx.reads.count == 1
    results = torch.ops.softdb.read_backward.default(
        ticket, values, weights, scores, lse, mass, temperature, bias, *ctx.shapes, ctx.device, ctx.wanted, sparse
    )
    return *(result if want else None for result, want in zip(results, ctx.wanted, strict=True)), *[None] * 11


_read.register_autograd(_differentiate, setup_context=_save_context)


def _to_outputs(read: Read, query: Tensor, ticket: Tensor) -> Outputs:
    """Return the members of a read in the form that an operator must return.

    Each member is copied and detached. A member that is None becomes an empty tensor.
    """
    members: list[Tensor] = []
    for member in (read.values, read.ids, read.weights, read.scores, read.lse, read.mass):
        if member is None:
            members.append(query.new_empty(0, dtype=torch.int64 if len(members) == 1 else read.lse.dtype))
        else:
            members.append(member.detach().clone(memory_format=torch.contiguous_format))
    return *members, ticket  # type: ignore[return-value]


def _convert_layout(leaf: Tensor, gradient: Tensor | None, sparse: bool) -> Tensor:
    if sparse:
        if gradient is None:
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device, layout=torch.sparse_coo)
        return gradient if gradient.layout != torch.strided else gradient.to_sparse(1)
    if gradient is None:
        return torch.zeros_like(leaf, memory_format=torch.contiguous_format)
    return gradient.to_dense() if gradient.layout != torch.strided else gradient.contiguous()


def _check_recompute(store: Store) -> None:
    """Raise if activation checkpointing repeats a read after rows were written.

    The check is not exact: it compares the version of the rows with their version at the latest read outside of
    backward.
    """
    version = store.rows.version
    if torch._C._current_graph_task_id() == -1:  # outside of backward
        _last_read_version[store] = version
    elif _last_read_version.get(store, version) != version:
        raise StaleReadError(
            "backward: expected activation checkpointing to repeat a compiled read with unchanged rows, got rows that "
            "were written since, so the gradients would be wrong; call backward() before writing to the store"
        )


@contextmanager
def _enable_autograd() -> Iterator[None]:
    """Enable autograd in the body of an operator.

    The dispatcher disables autograd by means that `torch.enable_grad` does not undo.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.inference_mode(False), torch.enable_grad():
        yield


def _restore_autocast(query: Tensor, answer: torch.dtype) -> torch.autocast:
    """Return the autocast context of the traced code.

    Autocast is off when a graph runs.
    """
    if answer == query.dtype:
        return torch.autocast(query.device.type, enabled=False)
    return torch.autocast(query.device.type, dtype=answer)
