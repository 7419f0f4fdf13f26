"""Bad input raises a typed error and changes nothing; extreme input gives finite results."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import reference
from support.contract import METRICS
from support.programs import check_exit
from support.tolerances import largest_error
from torch import Tensor

import softdb
from softdb import (
    ArgumentError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FieldError,
    NonFiniteError,
    ShapeError,
    SoftKVStore,
    UnknownIdError,
)
from softdb.functional import soft_read, topk_read
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory

ROOT = Path(__file__).parents[2]
Call = Callable[[SoftKVStore], object]


class Case(NamedTuple):
    """A call that must fail, and how: its message begins with ``message``, a pattern that names the argument."""

    name: str
    call: Call
    error: type[softdb.SoftDBError]
    message: str


class Fault(NamedTuple):
    """Something that is no good for an argument; ``message`` is what comes after its name."""

    name: str
    value: Any
    error: type[softdb.SoftDBError]
    message: str


# -- what is no good ---------------------------------------------------------------------------------------------------

KEYS, VALUES, FIELDS, QUERY = torch.ones(2, 3), torch.ones(2, 2), {"time": [8, 9]}, torch.ones(2, 3)
NAN, INF = math.nan, math.inf


def written(value: object) -> str:
    """For the name of a case: without addresses, so that names are the same in each process."""
    return " ".join(re.sub(r" object at 0x[0-9a-f]+", "", repr(value)).split())


def short(value: object) -> str:
    return written(value)[:30]


def with_entry(tensor: Tensor, entry: float) -> Tensor:
    """A copy whose last entry is another."""
    changed = tensor.clone()
    changed[-1, -1] = entry
    return changed


def number_faults(good: Tensor) -> Iterator[Fault]:
    """What no tensor of numbers may be, whatever its shape."""
    finite = r"expected finite numbers in torch.float32, got {} NaN or infinite elements"
    for name, entry in (("NaN", NAN), ("inf", INF), ("-inf", -INF)):
        yield Fault(name, with_entry(good, entry), NonFiniteError, finite.format(1))
    both = with_entry(good, INF)
    both[0, 0] = -INF
    yield Fault("inf and -inf", both, NonFiniteError, finite.format(2))
    yield Fault("NaN everywhere", good * NAN, NonFiniteError, finite.format(good.numel()))
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        yield Fault(str(dtype), good.to(dtype), DtypeError, f"expected a floating-point tensor, got {dtype}")
    narrow = torch.float8_e4m3fn
    yield Fault(str(narrow), good.to(narrow), DtypeError, f"expected one of float16, .* got {narrow}")
    for value in (good.numpy(), good.tolist(), 1.0, "keys"):
        kind = type(value).__name__
        yield Fault(kind, value, DtypeError, rf"expected a floating-point torch.Tensor, got .*{kind}")
    yield Fault("sparse", good.to_sparse(), DtypeError, "expected a dense tensor, got torch.sparse_coo")
    yield Fault("on meta", good.to("meta"), DeviceError, "expected a tensor on cpu, got one on meta")


def width_faults(good: Tensor) -> Iterator[Fault]:
    for width in (0, good.shape[1] - 1, good.shape[1] + 1):
        yield Fault(f"width {width}", torch.ones(2, width), ShapeError, rf"expected shape .*got \(2, {width}\)")
    yield Fault("no dimensions", torch.tensor(1.0), ShapeError, r"expected shape .*got \(\)")


def row_faults(good: Tensor) -> Iterator[Fault]:
    """What may not be stored in place of the rows ``good``."""
    yield from number_faults(good)
    yield from width_faults(good)
    for shape in ((good.shape[1],), (1, *good.shape)):
        name = f"{len(shape)} dimensions"
        yield Fault(name, torch.ones(shape), ShapeError, rf"expected shape \(any, .*got {re.escape(str(shape))}")
    too_large = good.double() * 1e300
    yield Fault("too large for float32", too_large, NonFiniteError, "expected finite numbers in torch.float32, got")


def id_faults(*, padding: bool = False, many: bool = False, one: bool = False) -> Iterator[Fault]:
    """What two ids may not be; with ``padding`` -1 is fine, with ``many`` so is every shape, with ``one`` an id."""
    whole, least = "expected int64 ids, got ", "expected ids of at least 0, " + padding * "or -1 for padding, "
    for ids in ([0, 2**63], [0, -(2**63) - 1], [0, None], ["0", "1"], {0, 1}, {0: 1}, "01", iter([0, 1])):
        yield Fault(short(ids), ids, DtypeError, whole + type(ids).__name__)
    booleans = [True, 2] if many else [[True, 2]]
    for ids, dtype in (([0.0, 1.0], "float32"), ([0, NAN], "float32"), (booleans, "bool"), ([0, 1j], "complex64")):
        yield Fault(short(ids), ids, DtypeError, whole + f"torch.{dtype}")
    for dtype in (torch.float64, torch.bool, torch.complex64, torch.uint8, torch.uint64):
        yield Fault(str(dtype), torch.tensor([0, 1]).to(dtype), DtypeError, whole + f"{dtype}; pass integers")
    for kind in (np.float64, np.bool_, np.uint64):
        yield Fault(str(kind), np.array([0, 1], dtype=kind), DtypeError, whole + "torch")
    yield Fault("objects", np.array([0, None]), DtypeError, whole)
    for lowest in (-(2**63), -2, *([] if padding else [-1])):
        yield Fault(f"{lowest}", [0, lowest], ArgumentError, least + f"got {lowest}")
    yield Fault(
        "on meta", torch.tensor([0, 1]).to("meta"), DeviceError, "expected ids with data, got .* on the meta device"
    )
    yield Fault("sparse", torch.tensor([0, 1]).to_sparse(), DtypeError, "expected a dense tensor, got torch.sparse_coo")
    if not many:
        for shape in ((1, 2), (2, 1), *([] if one else [()])):
            ids = torch.arange(math.prod(shape)).reshape(shape)
            expected = r"expected a 1-dimensional list of ids, got shape "
            yield Fault(f"shape {shape}", ids, ShapeError, expected + re.escape(str(shape)))


def field_faults() -> Iterator[tuple[str, Any, type[softdb.SoftDBError], str]]:
    """What the fields of two rows may not be; these messages are whole."""
    whole, column = "expected whole numbers (int64), got ", "fields['time']: "
    columns: list[tuple[Any, type[softdb.SoftDBError], str]] = [
        ([1.5, 2], DtypeError, whole + "torch.float32"),
        ([1, NAN], DtypeError, whole + "torch.float32"),
        ([True, False], DtypeError, whole + "torch.bool"),
        (1.0, DtypeError, whole + "torch.float32"),
        (1j, DtypeError, whole + "torch.complex64"),
        ("a", DtypeError, whole + "str 'a'"),
        (["a", "b"], DtypeError, whole + "list ['a', 'b']"),
        (None, DtypeError, whole + "NoneType None"),
        (2**63, DtypeError, whole + f"int {2**63}"),
        (-(2**63) - 1, DtypeError, whole + f"int {-(2**63) - 1}"),
        (torch.tensor([1, 2]).to(torch.uint64), DtypeError, whole + "torch.uint64"),
        (torch.tensor([1, 2]).to("meta"), DtypeError, whole + "a torch.int64 tensor of shape (2,)"),
        (torch.tensor([1, 2]).to_sparse(), DtypeError, "expected a dense tensor, got torch.sparse_coo"),
        ([1], ShapeError, "expected one number or shape (2,), one per row, got (1,)"),
        ([1, 2, 3], ShapeError, "expected one number or shape (2,), one per row, got (3,)"),
        ([[1, 2]], ShapeError, "expected one number or shape (2,), one per row, got (1, 2)"),
        ([], ShapeError, "expected one number or shape (2,), one per row, got (0,)"),
    ]
    for value, error, message in columns:
        yield f"time={short(value)}", {"time": value}, error, re.escape(column + message)
    for given in ([1, 2], "time", 5, {"time"}, torch.ones(2)):
        yield short(given), given, DtypeError, "fields: expected a mapping from field name to int64 tensor, got "
    for name in ("size", "id", 5):
        names = r"fields: expected names among this store's fields \('time'\), got "
        yield f"unknown {name!r}", {"time": 1, name: 1}, FieldError, names + re.escape(repr(name))


def whole_number_faults() -> Iterator[Fault]:
    """What a number of rows may not be."""
    for number in (0, -1, -(2**63), -(2**70)):
        yield Fault(short(number), number, ArgumentError, f"expected an integer of at least 1, got {number}")
    yield Fault("2**63", 2**63, ArgumentError, f"expected an integer of at most {2**63 - 1}, got {2**63}")
    for value in (2.0, NAN, INF, 1j, True, "3", [3], torch.tensor(2.0), torch.tensor([1, 2]), np.array([1, 2])):
        yield Fault(short(value), value, DtypeError, "expected an integer, got ")


def temperature_faults() -> Iterator[Fault]:
    for number in (0, 0.0, -0.0, -1.0, NAN, INF, -INF, 10**400):
        yield Fault(short(number), number, ArgumentError, f"expected a finite number above 0, got {number}")
    for value in (True, "1", 1j, [1.0], np.array([1.0])):
        yield Fault(short(value), value, DtypeError, "expected a number, got ")
    for dtype in (torch.bool, torch.complex64):
        message = f"expected a number or a floating-point tensor, got a {dtype} tensor"
        yield Fault(str(dtype), torch.ones((), dtype=dtype), DtypeError, message)
    integers = "expected a number or a floating-point tensor, got a torch.int64 tensor of shape \\(2,\\)"
    yield Fault("integers", torch.ones(2, dtype=torch.int64), DtypeError, integers)
    for entry in (0.0, -1.0, NAN, INF):
        tensor = torch.tensor([1.0, entry])
        yield Fault(f"[1, {entry}]", tensor, ArgumentError, "expected finite numbers above 0, got a tensor")
    for shape in ((3,), (2, 1), (1, 2), (2, 2)):
        message = r"expected a scalar or a tensor broadcastable .*got shape " + re.escape(str(shape))
        yield Fault(f"shape {shape}", torch.ones(shape), ShapeError, message)
    for shape in ((), (2,)):
        tensor = torch.ones(shape, device="meta")
        yield Fault(f"{shape} on meta", tensor, DeviceError, "expected a tensor on cpu, got one on meta")


def where_faults(*, queries: bool = True) -> Iterator[Fault]:
    """What ``where`` may not be in a read of two queries, or without queries."""
    some = r"expected a bool tensor in the order of store.ids, an int64 tensor of ids, or a callable .*got "
    for value in (0, True, "id", {0}):
        yield Fault(short(value), value, DtypeError, some + type(value).__name__)
    for value in ([0, None], ["id"], [True, 0, None], np.array([0, None])):
        yield Fault(short(value), value, DtypeError, "expected int64 ids, got ")
    for value in ([0.5], [[0.5]], np.array([0.5])):
        yield Fault(short(value), value, DtypeError, "expected int64 ids, got torch.float")
    for mask in ([True, False], np.array([True, False])):
        yield Fault(short(mask), mask, ShapeError, r"expected a bool tensor of shape \(3,\), one entry per row")
    for shape in ((), (2,), (4,), (3, 1), (1, 3), (0,)):
        mask = torch.ones(shape, dtype=torch.bool)
        yield Fault(f"mask {shape}", mask, ShapeError, r"expected a bool tensor of shape \(3,\), one entry per row")
    mask = torch.ones(3, dtype=torch.bool)
    yield Fault("mask on meta", mask.to("meta"), DeviceError, "expected a tensor on cpu, got one on meta")
    yield Fault("sparse mask", mask.to_sparse(), DtypeError, "expected a dense tensor, got torch.sparse_coo")
    for fault in id_faults():
        if isinstance(fault.value, Tensor) and fault.value.dtype != torch.bool:
            yield fault._replace(name=f"ids {fault.name}")
    for id in (-1, -(2**63)):
        yield Fault(f"id {id}", torch.tensor([id]), ArgumentError, f"expected ids of at least 0, got {id}")
    for id in (2, 99, 2**63 - 1):
        yield Fault(f"id {id}", torch.tensor([0, id]), UnknownIdError, f"expected ids of rows .*got unknown {id}")
    answer = "expected the callable to return a "
    for value in (1, None, [True], np.array([True])):
        yield Fault(f"-> {value!r}", lambda row, value=value: value, DtypeError, answer + "bool tensor, got ")
    yield Fault("-> ids", lambda row: row["id"], DtypeError, answer + "bool tensor, got a torch.int64 tensor")
    yield Fault("-> floats", lambda row: row["id"] * NAN, DtypeError, answer + "bool tensor, got a torch.float32")
    for shape in ((5,), (3, 1), (1, 5), (1, 2, 1)):
        count = 2 if queries else 1
        message = answer + rf"tensor broadcastable to \({count}, .*\) \(queries, rows\), got " + re.escape(str(shape))
        yield Fault(f"-> {shape}", lambda row, shape=shape: torch.ones(shape) > 0, ShapeError, message)
    on_meta = lambda row: (row["id"] > 0).to("meta")  # noqa: E731
    yield Fault("-> on meta", on_meta, DeviceError, answer + "tensor on cpu")
    names = r"expected names among this store's fields \('id', 'time'\), got 'size'"
    yield Fault("of an unknown field", lambda row: row["size"] > 0, FieldError, names)


def exclude_faults() -> Iterator[Fault]:
    yield from id_faults(padding=True, many=True)
    for shape in ((), (2,), (3, 1), (1, 1), (1, 2, 1)):
        expected = r"expected shape \(2, m\), ids for each query of the read, got "
        yield Fault(f"shape {shape}", torch.zeros(shape).long(), ShapeError, expected + re.escape(str(shape)))


# -- the table ---------------------------------------------------------------------------------------------------------

READS: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact with k": {"k": 2},
    "topk": {"mode": "topk", "k": 2},
    "hard": {"mode": "hard"},
}
WRITES: dict[tuple[str, str], Callable[[SoftKVStore, Any], object]] = {
    ("add", "keys"): lambda store, keys: store.add(keys, VALUES, fields=FIELDS),
    ("add", "values"): lambda store, values: store.add(KEYS, values, fields=FIELDS),
    ("put", "keys"): lambda store, keys: store.put([0, 9], keys, VALUES, FIELDS),
    ("put", "values"): lambda store, values: store.put([0, 9], KEYS, values, FIELDS),
    ("update", "keys"): lambda store, keys: store.update([0, 1], keys, VALUES, FIELDS),
    ("update", "values"): lambda store, values: store.update([0, 1], KEYS, values, FIELDS),
    ("revive", "keys"): lambda store, keys: store.revive([0, 1], keys, VALUES),
    ("revive", "values"): lambda store, values: store.revive([0, 1], KEYS, values),
}
BY_ID: dict[str, Callable[[SoftKVStore, Any], object]] = {
    "add": lambda store, ids: store.add(KEYS, VALUES, ids, FIELDS),
    "put": lambda store, ids: store.put(ids, KEYS, VALUES, FIELDS),
    "update": lambda store, ids: store.update(ids, KEYS, VALUES, FIELDS),
    "revive": lambda store, ids: store.revive(ids, KEYS, VALUES),
    "delete": lambda store, ids: store.delete(ids),
    "get": lambda store, ids: store.get(ids),
    "touch": lambda store, ids: store.touch(ids),
}
WITH_FIELDS: dict[str, Callable[[SoftKVStore, Any], object]] = {
    "add": lambda store, fields: store.add(KEYS, VALUES, fields=fields),
    "put": lambda store, fields: store.put([0, 9], KEYS, VALUES, fields),
    "update": lambda store, fields: store.update([0, 1], KEYS, VALUES, fields),
}


def cases_of_writes() -> Iterator[Case]:
    for (method, argument), call in WRITES.items():
        for fault in row_faults(KEYS if argument == "keys" else VALUES):
            yield case(method, argument, call, fault)
    for method in ("add", "put", "revive"):
        for argument in ("keys", "values"):
            fault = Fault("None", None, DtypeError, "expected a floating-point torch.Tensor, got NoneType None")
            yield case(method, argument, WRITES[method, argument], fault)
        for count in (0, 1, 3):
            fault = Fault(f"{count} rows", torch.ones(count, 2), ShapeError, f"expected 2 rows, .* got {count}")
            yield case(method, "values", WRITES[method, "values"], fault)
    for argument, width in (("keys", 3), ("values", 2)):
        fault = Fault(f"3 {argument}", torch.ones(3, width), ShapeError, "expected 3 ids, one for each row, got 2")
        yield case("update", "ids", WRITES["update", argument], fault)


def cases_of_ids() -> Iterator[Case]:
    for method, call in BY_ID.items():
        for fault in id_faults(many=method == "get", one=method in ("delete", "touch")):
            yield case(method, "ids", call, fault)
        if method not in ("get", "touch"):
            twice = Fault("twice", [1, 1], DuplicateIdError, "expected each id once, got repeated ids 1")
            yield case(method, "ids", call, twice)
        if method in ("add", "put"):
            fault = Fault("2**63 - 1", [9, 2**63 - 1], ArgumentError, f"expected ids of at most {2**63 - 2}, got")
            yield case(method, "ids", call, fault)
        else:
            for id in (2, 99, 2**63 - 1):
                fault = Fault(f"unknown {id}", [0, id], UnknownIdError, f"expected ids of rows in .* unknown {id}")
                yield case(method, "ids", call, fault)
        if method in ("add", "put", "update", "revive"):
            for ids in ([], [0], [0, 1, 3]):
                message = f"expected 2 ids, one for each row, got {len(ids)}"
                yield case(method, "ids", call, Fault(f"{len(ids)} ids", ids, ShapeError, message))
        if method not in ("add", "delete"):
            fault = Fault("None", None, DtypeError, "expected int64 ids, got NoneType")
            yield case(method, "ids", call, fault)
    exactly_one = "ids, where: expected one of them, got "
    yield Case("delete: nothing", lambda store: store.delete(), ArgumentError, exactly_one + "neither")
    both = lambda store: store.delete([0], where=[1])  # noqa: E731
    yield Case("delete: ids and where", both, ArgumentError, exactly_one + "both")
    for fault in where_faults(queries=False):
        yield case("delete", "where", lambda store, where: store.delete(where=where), fault)
    existing = Fault("existing", [9, 1], DuplicateIdError, "expected ids that are not in the store, got existing 1")
    yield case("add", "ids", BY_ID["add"], existing)


def cases_of_fields() -> Iterator[Case]:
    for method, call in WITH_FIELDS.items():
        for name, fields, error, message in field_faults():
            yield Case(f"{method}: fields {name}", lambda s, call=call, fields=fields: call(s, fields), error, message)
    for method in ("add", "put"):
        for fields in (None, {}):
            call = WITH_FIELDS[method]
            yield Case(
                f"{method}: fields {fields}",
                lambda s, call=call, fields=fields: call(s, fields),
                FieldError,
                r"fields: expected a column for every field \('time'\), got none for 'time'",
            )


def cases_of_reads() -> Iterator[Case]:
    reads: dict[str, Callable[..., object]] = {
        f"read {name}": lambda store, query=QUERY, how=how, **change: store.read(query, **(how | change))
        for name, how in READS.items()
    }
    reads["audit"] = lambda store, query=QUERY, **change: store.audit(query, **({"k": 2} | change))
    for name, read in reads.items():
        query = "queries" if name == "audit" else "query"
        for fault in (*number_faults(QUERY), *width_faults(QUERY)):
            yield case(name, query, read, fault)
        none = Fault("None", None, DtypeError, "expected a floating-point torch.Tensor, got NoneType None")
        yield case(name, query, read, none)
        for argument, faults in (
            ("temperature", temperature_faults()),
            ("where", where_faults()),
            ("exclude", exclude_faults()),
            ("k", () if name == "read hard" else whole_number_faults()),
        ):
            for fault in faults:
                call = lambda store, value, read=read, argument=argument: read(store, **{argument: value})  # noqa: E731
                yield case(name, argument, call, fault)
    for change, error, message in BAD_OPTIONS:
        yield Case(f"read {written(change)}", lambda store, change=change: store.read(QUERY, **change), error, message)
    no_k = Fault("None", None, DtypeError, "expected an integer, got NoneType")
    yield case("audit", "k", lambda store, k: store.audit(QUERY, k), no_k)


# Options that only some modes use, or that are no good for any.
BAD_OPTIONS: list[tuple[dict[str, Any], type[softdb.SoftDBError], str]] = [
    (dict(mode="fuzzy"), ArgumentError, "mode: expected one of 'exact', 'topk', 'hard', got 'fuzzy'"),
    (dict(mode=None), ArgumentError, "mode: expected one of 'exact', 'topk', 'hard', got None"),
    (dict(mode=["exact"]), ArgumentError, "mode: expected one of 'exact', 'topk', 'hard'"),
    (dict(normalizer="fuzzy"), ArgumentError, "normalizer: expected one of 'softmax', "),
    (dict(normalizer=None), ArgumentError, "normalizer: expected one of 'softmax', "),
    (dict(mode="topk"), ArgumentError, "k: expected the number of candidates"),
    (dict(mode="hard", k=1), ArgumentError, "k: expected no value with mode='hard', which reads one row"),
    (dict(mode="hard", normalizer="straight_through"), ArgumentError, "normalizer: expected no value"),
    (dict(mode="hard", normalizer="gumbel"), ArgumentError, "normalizer: expected no value"),
    (dict(tail_samples=5), ArgumentError, "tail_samples: expected no value with mode='exact'"),
    (dict(mode="hard", tail_samples=5), ArgumentError, "tail_samples: expected no value"),
    (dict(tolerance=0.1), ArgumentError, "tolerance: expected no value"),
    (dict(mode="hard", tolerance=0.1), ArgumentError, "tolerance: expected no value"),
    (dict(generator=torch.Generator()), ArgumentError, "generator: expected no value"),
    (dict(mode="hard", generator=torch.Generator()), ArgumentError, "generator: expected no value"),
    (dict(normalizer="gumbel", generator=7), DtypeError, "generator: expected a torch.Generator"),
    (dict(mode="topk", k=2, tail_samples=-1), ArgumentError, "tail_samples: expected an integer of at least 0, got -1"),
    (dict(mode="topk", k=2, tail_samples=True), DtypeError, "tail_samples: expected an integer, got "),
    (dict(mode="topk", k=2, tail_samples=2.0), DtypeError, "tail_samples: expected an integer, got "),
    (dict(mode="topk", k=2, tail_samples=NAN), DtypeError, "tail_samples: expected an integer, got "),
    (dict(mode="topk", k=2, tail_samples=None), DtypeError, "tail_samples: expected an integer, got "),
    (dict(mode="topk", k=2, tail_samples=5, normalizer="gumbel"), ArgumentError, "normalizer: expected 'softmax'"),
    (dict(mode="topk", k=2, tail_samples=3, generator="x"), DtypeError, "generator: expected a torch.Generator"),
    (dict(mode="topk", tolerance=0.1, generator=7), DtypeError, "generator: expected a torch.Generator"),
    (dict(mode="topk", tolerance=0), ArgumentError, "tolerance: expected a finite number above 0, got 0"),
    (dict(mode="topk", tolerance=-0.1), ArgumentError, "tolerance: expected a finite number above 0, got -0.1"),
    (dict(mode="topk", tolerance=NAN), ArgumentError, "tolerance: expected a finite number"),
    (dict(mode="topk", tolerance=INF), ArgumentError, "tolerance: expected a finite number"),
    (dict(mode="topk", tolerance=True), DtypeError, "tolerance: expected a number, got bool"),
    (dict(mode="topk", tolerance="0.1"), DtypeError, "tolerance: expected a number, got str"),
    (dict(mode="topk", tolerance=0.1, tail_samples=4), ArgumentError, "tail_samples: expected no value"),
    (dict(mode="topk", tolerance=0.1, normalizer="sparsemax"), ArgumentError, "normalizer: expected 'softmax'"),
]


def case(method: str, argument: str, call: Callable[[SoftKVStore, Any], object], fault: Fault) -> Case:
    """The case that ``fault`` is given to ``call`` for ``argument``."""
    name = f"{method}: {argument} {fault.name}"
    return Case(name, lambda store: call(store, fault.value), fault.error, f"{argument}: {fault.message}")


def cases() -> list[Case]:
    """The table."""
    reserved = [case("reserve", "n", lambda store, n: store.reserve(n), fault) for fault in whole_number_faults()]
    nothing = Fault("None", None, DtypeError, "expected an integer, got NoneType")
    reserved.append(case("reserve", "n", lambda store, n: store.reserve(n), nothing))
    return [*cases_of_writes(), *cases_of_ids(), *cases_of_fields(), *cases_of_reads(), *reserved]


def growing() -> SoftKVStore:
    """Rows 0, 1 and 3 with a hole between them."""
    store = SoftKVStore(3, 2, fields=("time",))
    store.add(2 * torch.ones(4, 3), 3 * torch.ones(4, 2), fields={"time": [4, 5, 6, 7]})
    store.delete([2])
    return store


def full() -> SoftKVStore:
    """Return a full store with rows 0, 1 and 3, gradients and usage; another row would evict one."""
    options: dict[str, Any] = {"trainable": True, "track_usage": True, "metric": "l2"}
    store = SoftKVStore(3, 2, fields=("time",), capacity=3, evict="lru", **options)
    store.add(2 * torch.ones(3, 3), 3 * torch.ones(3, 2), ids=[0, 1, 3], fields={"time": [4, 5, 6]})
    store.read(torch.ones(2, 3), "topk", k=2).values.sum().backward()
    return store


def snapshot(store: SoftKVStore) -> dict[str, Any]:
    """All that a failed call may not change."""
    gradients = {
        name: None if (grad := getattr(store, name).grad) is None else grad.to_dense().clone()
        for name in ("keys", "values")
    }
    return {
        **{name: tensor.clone() for name, tensor in store.state_dict().items()},
        "ids": store.ids,
        "len": len(store),
        "version": store.rows.version,
        "slots": store.rows.slots.find(torch.arange(20)),
        "next turn": store.rows.clock.now,
        "free": store.rows.free.all().tolist(),
        **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same."""

    def same(one: object, other: object) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other

    return sorted(name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name)))


def complaint(case: Case, store: SoftKVStore) -> str | None:
    """What is wrong with how ``store`` takes the call, if anything. No assert: ``python -O`` removes it."""
    before = snapshot(store)
    try:
        case.call(store)
    except softdb.SoftDBError as error:
        if type(error) is not case.error:
            return f"expected {case.error.__name__}, got {error!r}"
        if not re.match(case.message, str(error)):
            return f"expected a message that begins with {case.message!r}, got {error}"
    except Exception as error:
        return f"expected {case.error.__name__}, got {error!r}, which softdb does not define"
    else:
        return f"expected {case.error.__name__}, got no error"
    changed = differences(before, snapshot(store))
    return f"expected nothing to change, got other {', '.join(changed)}" if changed else None


def check_all() -> int:
    """Check every ninth case of the table; return their number."""
    table = cases()[::9]
    for store in (growing(), full()):
        for one in table:
            wrong = complaint(one, store)
            if wrong is not None:
                raise RuntimeError(f"{one.name}: {wrong}")
    return len(table)


@pytest.fixture(scope="module")
def stores() -> tuple[SoftKVStore, SoftKVStore]:
    """Make the stores that all cases share: each case asserts that it has changed nothing."""
    return growing(), full()


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_bad_input_is_a_typed_error_that_names_the_argument_and_changes_nothing(
    case: Case, stores: tuple[SoftKVStore, SoftKVStore]
) -> None:
    for store in stores:
        assert complaint(case, store) is None


@pytest.mark.slow
def test_bad_input_is_an_error_without_asserts() -> None:
    """``python -O`` removes assert statements: the table holds there, too."""
    code = "import sys, test_bad_input; print(sys.flags.optimize, test_bad_input.check_all())"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    command = [sys.executable, "-O", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    check_exit(done)
    assert done.stdout.split() == ["1", str(len(cases()[::9]))]


# -- nothing to read ---------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {**READS, "topk through FAISS": {"mode": "topk", "k": 2}}


def in_every_way(test: Callable[..., None]) -> Callable[..., None]:
    """Run ``test(metric, mode)`` for every metric and mode."""
    for mark in (pytest.mark.parametrize("mode", MODES), pytest.mark.parametrize("metric", METRICS)):
        test = mark(test)
    return test


def store_for(mode: str, metric: str, keys: Tensor, values: Tensor, **options: Any) -> SoftKVStore:
    """Return a trainable store of the rows, with ids 0 to n - 1, and an index if ``mode`` needs one."""
    index = "IVF1,Flat" if mode == "topk through FAISS" else "auto"
    store = SoftKVStore(
        keys.shape[1], values.shape[1], metric=metric, trainable=True, index=index, dtype=keys.dtype, **options
    )
    store.add(keys, values)
    return store


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def emptied(store: SoftKVStore) -> None:
    store.delete(store.ids)


NOTHING: dict[str, tuple[Callable[[SoftKVStore], object], dict[str, Any]]] = {
    "an empty store": (emptied, {}),
    "an empty store, filtered": (emptied, {"where": lambda row: row["id"] > 3, "exclude": torch.zeros(2, 1).long()}),
    "a mask of nothing": (len, {"where": torch.zeros(60, dtype=torch.bool)}),
    "no ids": (len, {"where": torch.empty(0, dtype=torch.int64)}),
    "a rule that nothing meets": (len, {"where": lambda row: row["id"] > 99}),
    "everything excluded": (len, {"exclude": torch.arange(60).expand(2, 60)}),
    "the one row left is excluded": (len, {"where": torch.tensor([5]), "exclude": torch.tensor([[5], [5]])}),
}


@pytest.mark.parametrize("nothing", NOTHING)
@in_every_way
def test_nothing_to_read_gives_zeros_and_gradients_of_zero(metric: str, mode: str, nothing: str) -> None:
    store = store_for(mode, metric, seeded(60, 3), seeded(60, 2))
    prepare, filters = NOTHING[nothing]
    prepare(store)
    query = seeded(2, 3, seed=1).requires_grad_()
    temperature = torch.tensor(0.5, requires_grad=True)
    read = store.read(query, temperature=temperature, **filters, **MODES[mode])
    assert torch.equal(read.values, torch.zeros(2, 2))
    assert (read.lse == -INF).all()
    assert (read.mass == 0).all()
    if mode != "exact":
        assert (read.ids == -1).all()
        assert (read.weights == 0).all()
        assert (read.scores == -INF).all()
    assert store(query, **filters, **MODES[mode]).shape == (2, 2)
    (read.values.sum() + read.mass.sum()).backward()
    for leaf in (query, temperature, store.keys, store.values):
        assert leaf.grad is None or not leaf.grad.to_dense().any()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
@in_every_way
def test_zero_queries_have_zero_answers(metric: str, mode: str, shape: tuple[int, ...]) -> None:
    for rows in (0, 60):
        store = store_for(mode, metric, seeded(rows, 3), seeded(rows, 2))
        query = torch.ones(*shape, 3, requires_grad=True)
        filters = {"where": lambda row: row["id"] > 3, "exclude": torch.zeros(*shape, 1).long()}
        for options in ({}, filters, {"temperature": torch.ones(shape)}):
            read = store.read(query, **MODES[mode], **options)
            assert read.values.shape == (*shape, 2)
            assert read.lse.shape == read.mass.shape == shape
            if mode != "exact":
                width = 1 if mode == "hard" else 2
                assert read.ids.shape == read.weights.shape == read.scores.shape == (*shape, width)
            if read.values.requires_grad:
                read.values.sum().backward()
                assert query.grad is None or query.grad.shape == query.shape
        audit = store.audit(query, k=2)
        assert audit.recall.shape == audit.mass.shape == audit.error.shape == shape


# -- extreme numbers, against the float64 reference --------------------------------------------------------------------


def run(answer: Callable[..., tuple[Tensor, Tensor]], leaves: dict[str, Tensor], small: float) -> dict[str, Tensor]:
    """Values and log-sum-exp, and the gradients of ``small`` times a weighted sum of them."""
    values, lse = answer(**leaves)
    weigh = seeded(*values.shape, seed=2).to(values.dtype)
    size = max(1.0, float(values.detach().abs().max()))  # so that neither drowns in the rounding of the other
    loss = small * ((values * weigh).sum() + size * lse.sum().to(values.dtype))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"gradient of {name}": grad.to_dense() for name, grad in zip(leaves, gradients, strict=True)}
    return {"values": values.detach(), "lse": lse.detach()} | named


def agrees(
    mode: str,
    metric: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    temperature: float = 1.0,
    *,
    small: float = 1.0,
    k: int = 5,
) -> None:
    """Assert that a read is finite and as close to the reference as the equation in float32 is."""
    store = store_for(mode, metric, keys, values)
    how = MODES[mode] | ({"k": k} if "k" in MODES[mode] else {})
    if mode == "topk through FAISS":
        store.build_index()
        assert store.index_stats().factory == "IVF1,Flat"
    leaves = {"query": query.clone().requires_grad_(), "keys": store.keys, "values": store.values}
    leaves["temperature"] = torch.tensor(temperature, requires_grad=True)
    read: list[softdb.Read] = []

    def ours(query: Tensor, temperature: Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
        read.append(store.read(query, temperature=temperature, **how))
        return read[0].values, read[0].lse

    found = run(ours, leaves, small)

    def copied(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}

    wide = copied(torch.float64)
    scores = reference.scores(wide["query"], wide["keys"], metric, wide["temperature"]).detach()
    rounding = 1e-6 * max(1.0, float(scores.abs().max()))
    visible = None
    if mode in ("topk", "topk through FAISS", "hard"):
        # Which of the rows that are equal in float32 comes first is not the reference's to say.
        rows = read[0].ids[:, : len(keys)]
        visible = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, rows, True)
        worst = scores.topk(rows.shape[1]).values[:, -1:]
        assert (scores.gather(1, rows) >= worst - rounding).all()

    def plain(query: Tensor, keys: Tensor, values: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        answer = reference.read(query, keys, values, metric=metric, temperature=temperature, visible=visible)
        return answer.values, answer.lse

    wanted, rough = run(plain, wide, small), run(plain, copied(torch.float32), small)
    for name, tensor in wanted.items():
        size = max(1.0, float(tensor.abs().max()))
        step = torch.finfo(found[name].dtype).eps
        allowed = max(1e-5 * size, step * size, 2 * largest_error(rough[name], tensor))
        assert found[name].isfinite().all(), name
        assert largest_error(found[name], tensor) <= allowed, name
    if read[0].scores is not None:
        there = scores.gather(1, read[0].ids.clamp(min=0)).masked_fill(read[0].ids < 0, -INF)
        assert largest_error(read[0].scores, there) <= rounding


@pytest.mark.parametrize("mode", [mode for mode, how in MODES.items() if "k" in how])
@pytest.mark.parametrize("metric", METRICS)
def test_more_rows_asked_for_than_there_are(metric: str, mode: str) -> None:
    rows = seeded(3, 4, seed=1), seeded(60, 4), seeded(60, 2)
    agrees(mode, metric, *rows, k=90)
    read = store_for(mode, metric, *rows[1:]).read(rows[0], **(MODES[mode] | {"k": 90}))
    assert (read.ids[:, :60].sort().values == torch.arange(60)).all()
    assert (read.ids[:, 60:] == -1).all()
    assert (read.weights[:, 60:] == 0).all()
    assert (read.scores[:, 60:] == -INF).all()
    assert torch.allclose(read.mass, torch.ones(3))


@in_every_way
def test_negative_zeros_are_zeros(metric: str, mode: str) -> None:
    keys, values, query = seeded(60, 4), seeded(60, 2), seeded(3, 4, seed=1)
    keys[::3], keys[1::3, 1] = -0.0, -0.0
    values[::2] = -0.0
    query[0], query[1, 2] = -0.0, -0.0
    agrees(mode, metric, query, keys, values)
    plus = [tensor + 0.0 for tensor in (keys, values, query)]
    reads = [store_for(mode, metric, *rows[:2]).read(rows[2], **MODES[mode]) for rows in ((keys, values, query), plus)]
    assert torch.equal(reads[0].values, reads[1].values)
    if reads[0].ids is not None:
        assert torch.equal(reads[0].ids, reads[1].ids)


@pytest.mark.parametrize("denormal", ["keys", "values", "query", "all"])
@in_every_way
def test_denormal_numbers(metric: str, mode: str, denormal: str) -> None:
    rows = {"keys": seeded(60, 4), "values": seeded(60, 2), "query": seeded(3, 4, seed=1)}
    for name in rows:
        if denormal in (name, "all"):
            rows[name] *= 1e-40
            assert 0 < rows[name].abs().max() < torch.finfo(torch.float32).tiny
    agrees(mode, metric, **rows)


@pytest.mark.parametrize("extreme", ["keys", "values", "all"])
@in_every_way
def test_the_largest_numbers_of_float16(metric: str, mode: str, extreme: str) -> None:
    largest = torch.finfo(torch.float16).max
    rows = {"keys": seeded(60, 4), "values": seeded(60, 2)}
    for name in rows:
        if extreme in (name, "all"):
            rows[name] = rows[name].sign() * largest
        rows[name] = rows[name].half()
    # Gradients are float16, too: a loss that is small enough keeps them in its range.
    agrees(mode, metric, seeded(3, 4, seed=1), **rows, small=1e-6)
    half = store_for(mode, metric, **rows).read((largest * seeded(3, 4, seed=1).sign()).half(), **MODES[mode])
    assert half.values.dtype == torch.float16
    assert half.values.isfinite().all()
    assert half.lse.isfinite().all()


@pytest.mark.parametrize("by", ["keys", "temperature"])
@in_every_way
def test_scores_of_ten_thousand(metric: str, mode: str, by: str) -> None:
    keys, values, query = seeded(60, 4), seeded(60, 2), seeded(3, 4, seed=1)
    if by == "keys" and metric != "cosine":
        factor = 100.0 if metric == "l2" else 1e4
        agrees(mode, metric, query, factor * keys, values)
        agrees(mode, metric, query, -factor * keys, values)
    else:
        agrees(mode, metric, query, keys, values, temperature=1e-4)
        agrees(mode, metric, query, keys, values, temperature=1e4)


# -- dtypes ------------------------------------------------------------------------------------------------------------

WORKING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.int8, torch.bool)
LISTED = r"expected one of float16, bfloat16, float32, float64, got "


@pytest.mark.parametrize("dtype", [*OTHERS, "float32", float], ids=str)
def test_a_dtype_that_no_read_works_in_is_refused_when_the_store_or_layer_is_made(dtype: Any) -> None:
    makers: list[Callable[[], object]] = [
        lambda: SoftKVStore(3, 2, dtype=dtype),
        lambda: MemoryLayer(4, 8, dtype=dtype),
        lambda: ContextMemory(4, 8, dtype=dtype),
        lambda: ProductKeyMemory(4, 64, dtype=dtype),
    ]
    for make in makers:
        with pytest.raises(DtypeError, match="dtype: " + LISTED):
            make()


@pytest.mark.parametrize("options", [{}, {"trainable": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_store_is_not_converted_to_a_dtype_that_no_read_works_in(options: dict[str, Any]) -> None:
    store = SoftKVStore(3, 2, fields=("time",), track_usage=True, **options)
    store.add(KEYS, VALUES, fields=FIELDS)
    before = {name: tensor.clone() for name, tensor in store.state_dict().items()}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64):
        with pytest.raises(DtypeError, match="dtype: " + LISTED):
            store.to(dtype)
    for dtype in (torch.float64, torch.int64, torch.float8_e4m3fn):  # type() converts ids and fields as well
        with pytest.raises(DtypeError, match="dtype: expected "):
            store.type(dtype)
    after = store.state_dict()
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: t.dtype for name, t in after.items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for dtype in WORKING:
        assert store.to(dtype).keys.dtype == dtype
        assert store.rows.ids.dtype == torch.int64


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_tensors_of_a_dtype_that_no_read_works_in_are_refused(dtype: torch.dtype) -> None:
    store = SoftKVStore(3, 2)
    store.add(KEYS, VALUES)
    state = {name: tensor.clone() for name, tensor in store.state_dict().items()}
    keys, values, query = KEYS.to(dtype), VALUES.to(dtype), torch.ones(2, 3)
    candidates = torch.zeros(2, 1, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {
        "keys": lambda: store.add(keys, VALUES),
        "values": lambda: store.update([0, 1], values=values),
        "query": lambda: store.read(keys),
        "queries": lambda: store.audit(keys, 1),
        "query ": lambda: soft_read(keys, KEYS, VALUES),
        "keys ": lambda: soft_read(query, keys, VALUES),
        "values ": lambda: topk_read(query, KEYS, values, candidates),
        "temperature": lambda: store.read(query, temperature=torch.ones(2).to(dtype)),
        "x": lambda: ProductKeyMemory(3, 64)(keys),
    }
    for name, call in calls.items():
        with pytest.raises(DtypeError, match=f"^{name.strip()}: expected "):
            call()
    for name in ("keys", "values"):
        with pytest.raises(DtypeError, match=rf"state_dict\['{name}'\]: expected "):
            store.load_state_dict(state | {name: state[name].to(dtype)})
    for name in ("rows.ids", "rows.next_id", "rows.generation"):
        if dtype not in (torch.int64, torch.int8):
            with pytest.raises(DtypeError, match=rf"state_dict\['{name}'\]: expected "):
                store.load_state_dict(state | {name: state[name].to(dtype)})
    assert all(torch.equal(tensor, state[name]) for name, tensor in store.state_dict().items())


# -- options of a store ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(key_dim=0), ArgumentError, "key_dim: expected an integer of at least 1, got 0"),
        (dict(value_dim=2.0), DtypeError, "value_dim: expected an integer"),
        (dict(metric="l1"), ArgumentError, "metric: expected one of"),
        (dict(temperature=0), ArgumentError, "temperature: "),
        (
            dict(temperature=torch.ones((), requires_grad=True)),
            DtypeError,
            r"pass it to read\(temperature=...\)",
        ),
        (dict(dtype=torch.int32), DtypeError, "dtype: expected one of float16, .* got torch.int32"),
        (dict(fields=("id",)), FieldError, "expected names other than 'id', which is reserved"),
        (dict(fields=("a", "a")), FieldError, "each name once"),
        (dict(fields=("a b",)), FieldError, "Python identifiers, got str 'a b'"),
        (dict(fields=5), DtypeError, "fields: expected a sequence of names, got int 5"),
        (dict(dtype="float32"), DtypeError, "dtype: expected one of float16, .* got str 'float32'"),
        (dict(fields="time"), DtypeError, "fields: expected a sequence of names"),
        (dict(index="IVFmany"), ArgumentError, "index: .* got 'IVFmany', which FAISS does not accept"),
        (dict(index=7), DtypeError, "index: expected 'auto', 'Flat'"),
        (dict(evict="lru"), ArgumentError, "evict='lru': expected a capacity, got None; pass capacity="),
        (
            dict(capacity=3, evict="random"),
            ArgumentError,
            "evict: expected one of 'lru', 'oldest', got 'random'",
        ),
        (dict(capacity=0), ArgumentError, "capacity: expected an integer of at least 1, got 0"),
        (dict(capacity=2.0), DtypeError, "capacity: expected an integer"),
    ],
)
def test_invalid_options_of_a_store_raise(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftKVStore(**({"key_dim": 3, "value_dim": 1} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftKVStore(3, 1, metrics="dot"), r"metrics: SoftKVStore has .*; did you mean metric=\.\.\.\?"),
        (lambda: SoftKVStore(3, 1, color=1), "color: SoftKVStore has no such argument; it has key_dim, value_dim, me"),
        (lambda: softdb.IndexConfig(recal=0.9), r"recal: IndexConfig has .*; did you mean recall=\.\.\.\?"),
        (lambda: MemoryLayer(8, 4, num_heads=4), r"num_heads: MemoryLayer has .*; did you mean heads=\.\.\.\?"),
        (lambda: ContextMemory(8, 4, row=4), r"row: ContextMemory has .*; did you mean rows=\.\.\.\?"),
        (lambda: ProductKeyMemory(8, 4, keydim=4), r"keydim: ProductKeyMemory has .*; did you mean key_dim=\.\.\.\?"),
        (lambda: type("Cache", (SoftKVStore,), {})(3, 1, capacty=9), r"capacty: Cache has .* mean capacity=\.\.\.\?"),
    ],
)
def test_an_unknown_argument_is_named_with_the_class_and_a_similar_argument(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(DtypeError, match=message):
        make()
