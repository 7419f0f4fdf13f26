"""Stores on the CPU do not depend on `torch.set_default_device`.

The default device is "meta" here. A tensor that is created on it by mistake has no data, so a test fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softdb
from softdb import IndexConfig, SoftKVStore, lab
from softdb.cli import demo
from softdb.functional import merge, soft_read, topk_read
from softdb.lab.page import write_page
from softdb.lab.page_explorer import PageSizes
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.layers.product_keys import ValueTable
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_
from softdb.scoring.normalizers import NORMALIZERS, is_random

ROWS = 400


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Switch the default device to meta until the test ends."""
    try:
        yield lambda: torch.set_default_device("meta")
    finally:
        torch.set_default_device(None)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(dtype)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, device="cpu")


def make(rows: int = ROWS, **options: Any) -> SoftKVStore:
    options = {"trainable": True, "fields": ("time",), "index": "Flat", "device": "cpu"} | options
    store = SoftKVStore(8, 4, **options)
    fields = {"time": torch.arange(rows, device="cpu") % 7} if options["fields"] else None
    store.add(normal(rows, 8), normal(rows, 4, seed=1), fields=fields)
    return store


def members(read: Any) -> list[Tensor]:
    found = (read.values, read.ids, read.weights, read.scores, read.lse, read.mass, read.error)
    return [member for member in found if member is not None]


def read_with(backward: bool = True, store: SoftKVStore | None = None, **how: Any) -> list[Tensor]:
    torch.manual_seed(0)
    store = make() if store is None else store
    if "seed" in how:
        how["generator"] = torch.Generator("cpu").manual_seed(how.pop("seed"))
    query = normal(5, 8, seed=2).requires_grad_()
    read = store.read(query, **how)
    if not backward:
        return members(read)
    (read.values.square().sum() + read.lse.sum()).backward()
    gradients = [query.grad, store.values.grad]
    return [*members(read), *(grad.to_dense() for grad in gradients if grad is not None)]


def in_time(row: Any) -> Tensor:
    return row["time"] < 4


def per_query(row: Any) -> Tensor:
    return row["time"] != numbers(0, 1, 2, 3, 4)[:, None]


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "mask": {"where": torch.arange(ROWS) % 3 != 0},
    "ids": {"where": torch.arange(0, ROWS, 2)},
    "rule": {"where": in_time},
    "rule per query": {"where": per_query},
    "exclude": {"exclude": torch.tensor([[0, 1, -1]] * 5)},
    "exclude list": {"exclude": [[0, 1, -1]] * 5},
    "rule and exclude": {"where": in_time, "exclude": torch.tensor([[0, 1, -1]] * 5)},
}
MODES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "exact k": {"mode": "exact", "k": 3},
    "topk": {"mode": "topk", "k": 5},
    "hard": {"mode": "hard"},
}
WAYS: dict[str, dict[str, Any]] = {
    "tail": {"mode": "topk", "k": 5, "tail_samples": 64},
    "tolerance": {"mode": "topk", "tolerance": 0.1},
    **{name: {"normalizer": name} for name in NORMALIZERS},
    **{f"{name} topk": {"mode": "topk", "k": 5, "normalizer": name} for name in NORMALIZERS},
    "entmax15 k": {"normalizer": "entmax15", "k": 3},
    "gumbel generator": {"normalizer": "gumbel", "seed": 1},
    "temperature": {"temperature": torch.full((5,), 0.5)},
    "number": {"temperature": 0.5},
}


def written(**options: Any) -> list[Tensor]:
    store = make(**options)
    fields = {"time": [1, 2]}
    new = store.add(normal(2, 8, seed=3), normal(2, 4, seed=4), fields=fields)
    store.put([3, 1000], normal(2, 8, seed=5), normal(2, 4, seed=6), fields={"time": numbers(5, 6)})
    store.update([4], values=normal(1, 4, seed=7), fields={"time": 3})
    store.delete([5, 7])
    store.add(normal(1, 8, seed=8), normal(1, 4, seed=9), ids=[2**40], fields={"time": 0})
    store.reserve(700)
    store.touch([4])
    store.refresh()
    rows = store.get([3, 4, 2**40])
    assert 1000 in store
    assert 5 not in store
    return [new, store.ids, rows.keys, rows.values, rows.fields["time"], *members(store.read(normal(2, 8), k=4))]


def evicted(evict: Any) -> list[Tensor]:
    store = make(100, capacity=120, evict=evict, track_usage=True)
    store.read(normal(3, 8, seed=2), "topk", k=10)
    store.add(normal(60, 8, seed=3), normal(60, 4, seed=4), fields={"time": 1})
    usage = store.usage
    store.reset_usage()
    return [store.ids, usage.reads, usage.weight]


def indexed(**how: Any) -> list[Tensor]:
    store = make(3000, index=IndexConfig("IVF16,Flat", recall=0.9))
    store.build_index()
    found = read_with(store=store, **how)
    store.keys.grad = store.values.grad = None
    store.add(normal(20, 8, seed=3), normal(20, 4, seed=4), fields={"time": 1})
    store.delete([0, 1])
    store.refresh()
    store.index_stats()
    return [*found, *read_with(store=store, **how)]


def copied(folder: Path, mmap: bool) -> list[Tensor]:
    folder.mkdir()
    store = make(track_usage=True)
    store.delete([3])
    store.read(normal(2, 8), k=4)
    store.save(folder / "store")
    loaded = SoftKVStore.load(folder / "store", mmap=mmap, device="cpu")
    found = members(loaded.read(normal(2, 8), k=4))
    if mmap:
        loaded.materialize()
    loaded.add(normal(1, 8), normal(1, 4), fields={"time": 0})
    other = make(3, track_usage=True)
    other.load_state_dict(store.state_dict())
    return [*found, loaded.ids, other.ids, *members(other.read(normal(2, 8), k=4))]


def trained(kind: Any, dtype: torch.dtype, how: dict[str, Any], **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    store = make(dtype=dtype, **options)
    optimizer = kind(store.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        store.read(normal(4, 8, seed=step, dtype=dtype), **how).values.square().sum().backward()
        norm = clip_row_grad_norm_(store.parameters(), 0.5)
        optimizer.step()
        store.delete([step])
        store.add(normal(6, 8, seed=step, dtype=dtype), normal(6, 4, seed=step, dtype=dtype), fields={"time": 1})
    other = kind(store.parameters())
    other.load_state_dict(optimizer.state_dict())
    other.zero_grad()
    store.read(normal(4, 8, dtype=dtype), **how).values.sum().backward()
    other.step()
    state = [value for entry in other.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return [norm, store.keys.detach(), store.values.detach(), *state]


def pure() -> list[Tensor]:
    query, keys, values = normal(2, 5, 8), normal(2, 30, 8, seed=1), normal(2, 30, 4, seed=2)
    mask = torch.ones(5, 30, dtype=torch.bool, device="cpu").tril()
    reads = [soft_read(query, keys, values, mask=mask, k=3), soft_read(query, keys + 1, values, k=3)]
    gumbel = soft_read(query, keys, values, normalizer="gumbel", generator=torch.Generator("cpu").manual_seed(0))
    some = topk_read(query, keys, values, numbers(3, 1, -1).expand(2, 5, 3))
    found = [*members(merge(reads)), *members(gumbel), *members(some)]
    for kind in NORMALIZERS:
        generator = torch.Generator("cpu").manual_seed(0) if is_random(kind) else None
        found += members(soft_read(query, keys, values, mask=mask, normalizer=kind, generator=generator))
    return found


def layers() -> list[Tensor]:
    torch.manual_seed(0)
    made: list[nn.Module] = [
        MemoryLayer(16, 32, heads=2, device="cpu"),
        MemoryLayer(16, 32, heads=2, gate=True, mode="topk", k=4, device="cpu", track_usage=True),
        ContextMemory(16, 6, heads=2, key_dim=8, device="cpu"),
        ContextMemory(16, 6, heads=2, key_dim=8, k=3, device="cpu"),
        ProductKeyMemory(16, 64, heads=2, k=4, key_dim=8, device="cpu", track_usage=True),
    ]
    found = []
    for layer in made:
        layer.reset_parameters()  # type: ignore[operator]
        for seed in range(2):
            x = normal(2, 4, 16, seed=seed).requires_grad_()
            answer = layer(x)
            answer.square().sum().backward()
            found += [answer, x.grad]
        layer.load_state_dict(layer.state_dict())
    table = ValueTable(9, 3, sparse_grad=True, track_usage=True, device="cpu")
    weights, rows = normal(2, 2).softmax(-1), numbers(1, 2, 3, 4).view(2, 2)
    return [*found, table.blend(weights, rows), table.usage.reads]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{
        f"read {mode}, {name}": lambda how=how, filters=filters: read_with(**how, **filters)  # type: ignore[misc]
        for mode, how in MODES.items()
        for name, filters in FILTERS.items()
    },
    **{f"read by {name}": lambda how=how: read_with(**how) for name, how in WAYS.items()},  # type: ignore[misc]
    "read frozen rows": lambda: read_with(backward=False, store=make(trainable=False)),
    "read dense gradients": lambda: read_with(mode="topk", k=5, store=make(sparse_grad=False)),
    "read by l2": lambda: read_with(k=5, store=make(metric="l2")),
    "read by cosine": lambda: read_with(mode="topk", k=5, store=make(metric="cosine")),
    "read nothing": lambda: read_with(backward=False, store=make(0), k=3),
    "write": written,
    "write frozen rows": lambda: written(trainable=False),
    "write with an index": lambda: written(index="IVF8,Flat"),
    "evict lru": lambda: evicted("lru"),
    "evict oldest": lambda: evicted("oldest"),
    "index topk": lambda: indexed(mode="topk", k=5),
    "index topk rule": lambda: indexed(mode="topk", k=5, where=in_time),
    "index tail": lambda: indexed(mode="topk", k=5, tail_samples=64),
    "index tolerance": lambda: indexed(mode="topk", tolerance=0.2),
    **{
        f"train {kind.__name__} {str(dtype)[6:]} {mode}": lambda kind=kind, dtype=dtype, mode=mode: trained(  # type: ignore[misc]
            kind, dtype, MODES[mode]
        )
        for kind in (RowAdam, RowAdagrad)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for mode in ("exact", "topk")
    },
    "functions": pure,
    "layers": layers,
}


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert [tensor.device.type for tensor in found] == ["cpu"] * len(wanted)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_follows_the_default_device(name: str, elsewhere: Callable[[], None]) -> None:
    wanted = CASES[name]()
    elsewhere()
    assert_same(CASES[name](), wanted)


@pytest.mark.parametrize("mmap", [False, True])
def test_saved_stores_do_not_follow_the_default_device(
    mmap: bool, elsewhere: Callable[[], None], tmp_path: Path
) -> None:
    wanted = copied(tmp_path / "here", mmap)
    elsewhere()
    assert_same(copied(tmp_path / "there", mmap), wanted)


@pytest.mark.slow
def test_lab_does_not_follow_the_default_device(elsewhere: Callable[[], None], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store, queries, labels = make(30, fields=()), normal(3, 8, seed=2), [f"row {number}" for number in range(30)]
    elsewhere()
    lab.compare(store, queries, modes=("exact", "topk", "hard"), temperatures=(1.0, 0.1), ks=(4,))
    lab.compare_gradients(store, queries, lambda values: values.square().mean(), temperatures=(1.0, 0.1), draws=3)
    lab.explain(store, queries, labels).plot(tmp_path / "rows.png")


def test_the_page_does_not_follow_the_default_device(
    elsewhere: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    # So that the page keeps a histogram of most rows.
    monkeypatch.setattr(PageSizes, "usual", lambda: PageSizes(numbers=800, fewest_rows=20))
    store, wide, equal = make(400, fields=()), make(30, fields=()), SoftKVStore(2, 1, device="cpu")
    equal = SoftKVStore(2, 1, device="cpu")
    equal.add(normal(1, 2).expand(400, 2), normal(400, 1))
    elsewhere()
    for name, each in (("many", store), ("few", wide), ("equal", equal)):
        labels = [f"row {number}" for number in range(len(each))]
        write_page(tmp_path / f"{name}.html", each, normal(2, each.key_dim, seed=2), labels=labels)
        assert "row " in (tmp_path / f"{name}.html").read_text(encoding="utf-8")


def test_the_demo_does_not_follow_the_default_device(elsewhere: Callable[[], None]) -> None:
    senses = demo.load_senses()
    elsewhere()
    assert demo.build_store(senses).keys.device.type == senses.parts_of_speech().device.type == "cpu"


def test_a_norm_without_gradients_is_on_the_device_of_the_parameters(elsewhere: Callable[[], None]) -> None:
    parameter = nn.Parameter(normal(3, 2))
    elsewhere()
    norm = clip_row_grad_norm_([parameter], 1.0)
    assert norm.device.type == "cpu"
    assert float(norm) == 0.0


def test_a_store_is_made_on_the_default_device(elsewhere: Callable[[], None]) -> None:
    elsewhere()
    assert softdb.SoftKVStore(8, 4).keys.is_meta
