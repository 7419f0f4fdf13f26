"""Types of numbers that each argument of the public interface accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import softdb
from softdb import ArgumentError, DtypeError, IndexConfig, SoftKVStore, lab, optim
from softdb.functional import soft_read, topk_read
from softdb.lab import page as page_module
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory

pytestmark = pytest.mark.each_device

KEYS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
VALUES = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
QUERY = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
HUGE = 10**400
DIGITS = 10**5000  # more than Python prints
SHORT = ("nan", "NumPy nan", "tensor nan", "-1", "10**400")
CANDIDATES = torch.tensor([[0, 1, 2], [3, 4, 5], [5, 6, -1]])


class Number(NamedTuple):
    """Number of the public interface: a call that takes it, and a valid value."""

    name: str
    call: Callable[[Any], object]
    good: int
    takes_tensors: bool = False  # of any floating-point dtype, with gradients


def filled(**options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 2, **options)
    store.add(KEYS, VALUES)
    return store


def described(store: SoftKVStore) -> object:
    return store.extra_repr(), store.keys.shape, store.values.shape, type(store.temperature), type(store.capacity)


def answer(read: softdb.Read) -> list[Any]:
    members = (read.values, read.ids, read.weights, read.lse, read.error)
    return [None if member is None else member.detach().tolist() for member in members]


def trained(kind: type[torch.optim.Optimizer], **options: Any) -> object:
    table = nn.Parameter(KEYS.clone())
    optimizer = kind([table], **options)
    for _ in range(2):
        table.grad = torch.ones_like(table)
        optimizer.step()
    return table.tolist()


def clipped(**options: Any) -> object:
    table = nn.Parameter(KEYS.clone())
    table.grad = KEYS.clone()
    total = optim.clip_row_grad_norm_([table], **{"max_norm": 1.0, **options})
    return total.tolist(), table.grad.tolist()


def shapes(module: nn.Module) -> object:
    return repr(module), {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def saved(timeout: Any) -> object:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        filled().save(folder, timeout=timeout)
        return len(SoftKVStore.load(folder))


def compared(**options: Any) -> object:
    found = lab.compare(filled(), QUERY, **{"temperatures": (1.0,), "ks": (2,), **options})
    return [(row.name, row.temperature, type(row.temperature), row.metric) for row in found.settings]


def gradients_compared(**options: Any) -> object:
    generator = torch.Generator().manual_seed(0)
    options = {"temperatures": (1.0,), "draws": 2, "generator": generator, **options}
    return repr(lab.compare_gradients(filled(), QUERY, lambda values: values.square().mean(), **options).gradients)


def generated(method: str, n: Any) -> object:
    torch.manual_seed(0)
    layer = ContextMemory(4, 8)
    layer(torch.randn(1, 5, 4))
    getattr(layer, method)(n)
    return layer.extra_repr(), layer.length


def layer_explained(**options: Any) -> object:
    torch.manual_seed(0)
    return str(lab.explain(ContextMemory(4, 8), torch.randn(2, 4), temperatures=(1.0,), **options))


def explained(**options: Any) -> object:
    explanation = lab.explain(filled(), QUERY, **{"temperatures": (1.0,), **options})
    return str(explanation), type(explanation.temperature), explanation.temperatures


def paged(**changed: Any) -> object:
    columns = {"mode": "topk", "normalizer": "softmax", "temperature": 1.0, "k": 2, "distance": 0.5, "mass": 0.5}
    settings, _ = page_module._check_columns({name: [value] for name, value in (columns | changed).items()}, None)
    return settings


WHOLE = [
    Number("SoftKVStore(key_dim=)", lambda n: described(SoftKVStore(n, 2)), 3),
    Number("SoftKVStore(value_dim=)", lambda n: described(SoftKVStore(2, n)), 3),
    Number("SoftKVStore(capacity=)", lambda n: described(SoftKVStore(2, 2, capacity=n)), 3),
    Number("reserve", lambda n: (store := SoftKVStore(2, 2)).reserve(n) or store.keys.shape, 3),
    Number("read(k=)", lambda n: answer(filled().read(QUERY, k=n)), 3),
    Number("read(mode='topk', k=)", lambda n: answer(filled().read(QUERY, "topk", k=n)), 3),
    Number(
        "read(tail_samples=)",
        lambda n: answer(filled().read(QUERY, "topk", k=2, tail_samples=n, generator=torch.Generator().manual_seed(0))),
        3,
    ),
    Number("audit(k=)", lambda n: str(filled().audit(QUERY, n)), 3),
    Number("soft_read(k=)", lambda n: answer(soft_read(QUERY, KEYS, VALUES, k=n)), 3),
    Number("MemoryLayer(dim=)", lambda n: shapes(MemoryLayer(n, 8)), 4),
    Number("MemoryLayer(rows=)", lambda n: shapes(MemoryLayer(4, n)), 8),
    Number("MemoryLayer(heads=)", lambda n: shapes(MemoryLayer(4, 8, heads=n)), 2),
    Number("MemoryLayer(key_dim=)", lambda n: shapes(MemoryLayer(4, 8, key_dim=n)), 2),
    Number("MemoryLayer(value_dim=)", lambda n: shapes(MemoryLayer(4, 8, value_dim=n)), 2),
    Number("MemoryLayer(k=)", lambda n: shapes(MemoryLayer(4, 8, mode="topk", k=n)), 2),
    Number("ContextMemory(dim=)", lambda n: shapes(ContextMemory(n, 8)), 4),
    Number("ContextMemory(rows=)", lambda n: shapes(ContextMemory(4, n)), 8),
    Number("ContextMemory(heads=)", lambda n: shapes(ContextMemory(4, 8, heads=n)), 2),
    Number("ContextMemory(key_dim=)", lambda n: shapes(ContextMemory(4, 8, key_dim=n)), 2),
    Number("ContextMemory(value_dim=)", lambda n: shapes(ContextMemory(4, 8, value_dim=n)), 2),
    Number("ContextMemory(k=)", lambda n: shapes(ContextMemory(4, 8, k=n)), 2),
    Number("ProductKeyMemory(dim=)", lambda n: shapes(ProductKeyMemory(n, 64)), 4),
    Number("ProductKeyMemory(rows=)", lambda n: shapes(ProductKeyMemory(4, n)), 64),
    Number("ProductKeyMemory(heads=)", lambda n: shapes(ProductKeyMemory(4, 64, heads=n)), 2),
    Number("ProductKeyMemory(k=)", lambda n: shapes(ProductKeyMemory(4, 64, k=n)), 2),
    Number("ProductKeyMemory(key_dim=)", lambda n: shapes(ProductKeyMemory(4, 64, key_dim=n)), 2),
    Number("ProductKeyMemory(value_dim=)", lambda n: shapes(ProductKeyMemory(4, 64, value_dim=n)), 2),
    Number("ContextMemory.repeat_interleave(repeats=)", lambda n: generated("repeat_interleave", n), 2),
    Number("ContextMemory.crop(n=)", lambda n: generated("crop", n), 2),
    Number("lab.compare(ks=)", lambda n: compared(ks=(n, 2, n)), 3),
    Number("lab.compare_gradients(draws=)", lambda n: gradients_compared(draws=n), 3),
    Number("lab.explain(k=)", lambda n: explained(k=n), 3),
    Number("lab.explain(head=)", lambda n: layer_explained(head=n), 1),
    Number("lab.explain(sequence=)", lambda n: layer_explained(sequence=n), 0),
    Number("lab.summarize_usage(k=)", lambda n: str(lab.summarize_usage(filled(track_usage=True), k=n)), 3),
    Number("write_page(columns['k'])", lambda n: paged(k=n), 3),
]
REAL = [
    Number("SoftKVStore(temperature=)", lambda x: described(filled(temperature=x)), 2),
    Number("store.temperature", lambda x: setattr(store := filled(), "temperature", x) or described(store), 2),
    Number("read(temperature=)", lambda x: answer(filled().read(QUERY, k=2, temperature=x)), 2, True),
    Number("read(tolerance=)", lambda x: answer(filled().read(QUERY, "topk", tolerance=x)), 2),
    Number("audit(temperature=)", lambda x: str(filled().audit(QUERY, 2, temperature=x)), 2, True),
    Number("soft_read(temperature=)", lambda x: answer(soft_read(QUERY, KEYS, VALUES, k=2, temperature=x)), 2, True),
    Number(
        "topk_read(temperature=)", lambda x: answer(topk_read(QUERY, KEYS, VALUES, CANDIDATES, temperature=x)), 2, True
    ),
    Number("save(timeout=)", saved, 2),
    Number("IndexConfig(recall=)", lambda x: repr(IndexConfig(recall=x)), 1),
    Number("IndexConfig(tolerance=)", lambda x: repr(IndexConfig(tolerance=x)), 2),
    Number("IndexConfig(garbage=)", lambda x: repr(IndexConfig(garbage=x)), 1),
    Number("MemoryLayer(temperature=)", lambda x: shapes(MemoryLayer(4, 8, temperature=x)), 2),
    Number("MemoryLayer(tolerance=)", lambda x: shapes(MemoryLayer(4, 8, mode="topk", tolerance=x)), 2),
    Number("ContextMemory(temperature=)", lambda x: ContextMemory(4, 8, temperature=x).temperature, 2),
    Number("ProductKeyMemory(temperature=)", lambda x: ProductKeyMemory(4, 64, temperature=x).temperature, 2),
    Number(
        "layer.temperature", lambda x: setattr(layer := MemoryLayer(4, 8), "temperature", x) or layer.temperature, 2
    ),
    Number("RowAdam(lr=)", lambda x: trained(optim.RowAdam, lr=x), 2),
    Number("RowAdam(betas[0])", lambda x: trained(optim.RowAdam, betas=(x, 0.5)), 0),
    Number("RowAdam(betas[1])", lambda x: trained(optim.RowAdam, betas=(0.5, x)), 0),
    Number("RowAdam(eps=)", lambda x: trained(optim.RowAdam, eps=x), 2),
    Number("RowAdam(weight_decay=)", lambda x: trained(optim.RowAdam, weight_decay=x), 2),
    Number("RowAdagrad(lr=)", lambda x: trained(optim.RowAdagrad, lr=x), 2),
    Number("RowAdagrad(eps=)", lambda x: trained(optim.RowAdagrad, eps=x), 2),
    Number("RowAdagrad(weight_decay=)", lambda x: trained(optim.RowAdagrad, weight_decay=x), 2),
    Number(
        "RowAdagrad(initial_accumulator_value=)", lambda x: trained(optim.RowAdagrad, initial_accumulator_value=x), 2
    ),
    Number("clip_row_grad_norm_(max_norm=)", lambda x: clipped(max_norm=x), 2),
    Number("clip_row_grad_norm_(norm_type=)", lambda x: clipped(norm_type=x), 2),
    Number("lab.compare(temperatures=)", lambda x: compared(temperatures=(x, 1.0, x)), 2),
    Number("lab.compare(metric=)", lambda x: compared(targets=VALUES[:3], metric=lambda values, targets: x), 2, True),
    Number("lab.compare_gradients(temperatures=)", lambda x: gradients_compared(temperatures=(x,)), 2),
    Number("lab.explain(temperature=)", lambda x: explained(temperature=x), 2),
    Number("lab.explain(temperatures=)", lambda x: explained(temperatures=(x, 1.0)), 2),
    Number("write_page(columns['temperature'])", lambda x: paged(temperature=x), 2),
    Number("write_page(columns['distance'])", lambda x: paged(distance=x), 2),
    Number("write_page(columns['mass'])", lambda x: paged(mass=x), 1),
]


def whole_forms(n: int) -> Iterator[tuple[str, Any]]:
    """Return the same integer as other types."""
    yield "an int", n
    for kind in (np.int64, np.int32, np.uint8, np.uint64):
        yield f"a NumPy {kind.__name__}", kind(n)
        yield f"a 0-d array of {kind.__name__}", np.array(n, dtype=kind)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        yield f"a 0-d tensor of {dtype}", torch.tensor(n, dtype=dtype)


def real_forms(n: int) -> Iterator[tuple[str, Any]]:
    """Return the same real number as other types."""
    yield from whole_forms(n)
    yield "a float", float(n)
    yield "a Fraction", Fraction(n)
    for kind in (np.float64, np.float32, np.float16, np.longdouble):
        yield f"a NumPy {kind.__name__}", kind(n)
        yield f"a 0-d array of {kind.__name__}", np.array(n, dtype=kind)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield f"a 0-d tensor of {dtype}", torch.tensor(n, dtype=dtype)


def no_numbers(n: int) -> Iterator[tuple[str, Any]]:
    """Return values that are neither an integer nor a real number."""
    yield "a bool", True
    yield "a NumPy bool", np.True_
    yield "a 0-d array of bool", np.array(True)
    yield "a 0-d tensor of bool", torch.tensor(True)
    yield "a str", str(n)
    yield "a NumPy str", np.array(str(n))
    yield "a complex", complex(n)
    yield "a NumPy complex", np.complex64(n)
    yield "a 0-d tensor of complex", torch.tensor(complex(n))
    yield "a list", [n]
    yield "an array of one", np.array([n])
    yield "an array of two", np.array([n, n])
    yield "an object", object()


@pytest.mark.parametrize("number", WHOLE, ids=lambda number: number.name)
def test_a_whole_number_is_accepted_as_any_type_of_integer(number: Number) -> None:
    wanted = number.call(number.good)
    for name, value in whole_forms(number.good):
        assert number.call(value) == wanted, name


@pytest.mark.parametrize("number", WHOLE, ids=lambda number: number.name)
def test_a_whole_number_is_refused_as_any_other_type(number: Number) -> None:
    fractions = [(name, value) for name, value in real_forms(number.good) if name not in dict(whole_forms(number.good))]
    grad = [("a tensor of two", torch.tensor([number.good, number.good]))]
    for name, value in (*fractions, *no_numbers(number.good), *grad):
        with pytest.raises(DtypeError, match=r": expected an integer, got "):
            print(name, number.call(value))


@pytest.mark.slow
@pytest.mark.parametrize("number", REAL, ids=lambda number: number.name)
def test_a_real_number_is_accepted_as_any_type_of_number(number: Number) -> None:
    wanted = number.call(float(number.good))
    for name, value in real_forms(number.good):
        assert number.call(value) == wanted, name


@pytest.mark.parametrize("number", REAL, ids=lambda number: number.name)
def test_a_real_number_is_refused_as_any_other_type(number: Number) -> None:
    others = list(no_numbers(number.good))
    if not number.takes_tensors:
        others.append(("a tensor of two", torch.ones(2)))
        others.append(("a tensor with gradient", torch.tensor(float(number.good), requires_grad=True)))
        others.append(("a Parameter", nn.Parameter(torch.tensor(float(number.good)))))
    for name, value in others:
        with pytest.raises(DtypeError, match=r": expected "):
            print(name, number.call(value))


@pytest.mark.parametrize("number", REAL, ids=lambda number: number.name)
@pytest.mark.parametrize("value", [float("nan"), np.float32("nan"), torch.tensor(float("nan")), -1, HUGE], ids=SHORT)
def test_a_real_number_out_of_range_is_an_argument_error(number: Number, value: Any) -> None:
    if "columns" in number.name or "metric" in number.name:
        return  # what was measured may be anything
    if value is HUGE and number.name in ("save(timeout=)", "clip_row_grad_norm_(norm_type=)"):
        return  # it stands for infinity
    with pytest.raises(ArgumentError, match=r": expected "):
        print(number.call(value))


@pytest.mark.parametrize("number", [DIGITS, -DIGITS], ids=["many digits", "negative"])
def test_a_number_of_too_many_digits_to_print_is_an_argument_error(number: int) -> None:
    calls: list[Callable[[], object]] = [
        lambda: filled().read(QUERY, k=number),
        lambda: filled().read(QUERY, temperature=number),
        lambda: SoftKVStore(number, 2),
        lambda: SoftKVStore(2, 2, temperature=number),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=": expected "):
            call()
    with pytest.raises(DtypeError, match="expected a SoftKVStore, got int a number"):
        MemoryLayer(4, 8, store=number)  # type: ignore[arg-type]
