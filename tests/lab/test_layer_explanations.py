"""Compare explanations of layers with plain softmax over the rows that a head reads, and usage with plain counts."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softdb import ArgumentError, DtypeError, NotApplicableError, ShapeError, SoftKVStore, lab
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.scoring.normalizers import SPARSE_NORMALIZERS

DIM, HEADS = 8, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(kind: type[nn.Module], *args: int, **options: Any) -> Any:
    return kind(DIM, *args, heads=HEADS, key_dim=6, value_dim=5, dtype=torch.float64, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def weigh(scores: Tensor, normalizer: str) -> Tensor:  # (n,), -inf where hidden
    if normalizer in SPARSE_NORMALIZERS:
        return SPARSE_NORMALIZERS[normalizer](scores)
    if normalizer == "straight_through":
        return nn.functional.one_hot(scores.argmax(), len(scores)).double()
    return scores.softmax(-1)


def check(found: lab.Explanation, query: int, scores: Tensor, values: Tensor, normalizer: str = "softmax") -> None:
    """Compare one query with all rows of a layer: their undivided scores, -inf where hidden, and values."""
    weights = weigh(scores / found.temperature, normalizer)
    listed = found.ids[query] >= 0
    ids = found.ids[query][listed]
    torch.testing.assert_close(found.scores[query][listed], (scores / found.temperature)[ids])
    torch.testing.assert_close(found.weights[query][listed], weights[ids])
    torch.testing.assert_close(found.contributions[query][listed], weights[ids, None] * values[ids])
    torch.testing.assert_close(found.values[query], weights @ values)
    torch.testing.assert_close(found.rest[query], 1 - weights[ids].sum(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.effective_rows[query], torch.special.entr(weights).sum().exp(), atol=1e-6, rtol=0)
    for step, temperature in enumerate(found.temperatures):
        cooled = weigh(scores / temperature, normalizer)[ids]
        torch.testing.assert_close(found.cooling[query, step][listed], cooled)
    top = scores.sort(descending=True)
    count = int(listed.sum())
    assert torch.equal(top.indices[:count], ids)
    assert count == len(found.ids[query]) or bool((top.values[count:] == -torch.inf).all())


# -- MemoryLayer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MemoryLayer, ProductKeyMemory])
def test_explanation_leaves_a_frozen_normalization_frozen(kind: type[nn.Module]) -> None:
    layer = make(kind, 16, k=4, query_norm="batch")
    layer.queries.norm.eval()
    lab.explain(layer, draw(2), head=0)
    assert layer.queries.training
    assert not layer.queries.norm.training


@pytest.mark.parametrize(
    ("options", "normalizer"),
    [
        ({}, "softmax"),
        ({"mode": "topk", "k": 6}, "softmax"),
        ({"mode": "topk", "tolerance": 0.1}, "softmax"),
        ({"mode": "hard"}, "straight_through"),
        ({"normalizer": "sparsemax"}, "sparsemax"),
        ({"mode": "topk", "k": 6, "normalizer": "straight_through"}, "straight_through"),
        ({"temperature": 0.4, "shared": False, "query_norm": "batch"}, "softmax"),
        ({"temperature": "learnable", "metric": "l2"}, "softmax"),
    ],
)
def test_explanation_of_a_memory_layer_weighs_the_rows_of_the_head(options: dict[str, Any], normalizer: str) -> None:
    layer = make(MemoryLayer, 30, **options)
    if layer.log_temperature is not None:
        with torch.no_grad():
            layer.log_temperature.copy_(torch.tensor([0.0, -1.0, 1.0]))
    layer(draw(20))
    state = copy.deepcopy(layer.state_dict())
    x, head = draw(4), 1
    found = lab.explain(layer, x, k=9, head=head)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert layer.queries.training
    store = layer.stores[head if len(layer.stores) > 1 else 0]
    queries = layer.eval().queries(x)[:, head, 0]
    if store.metric == "l2":
        scores = -(queries[:, None] - store.keys).square().sum(-1)
    else:
        scores = queries @ store.keys.T / 6**0.5
    if layer.mode == "topk" and layer.tolerance is None:
        scores = scores.masked_fill(scores < scores.topk(6).values[:, -1:], -torch.inf)
    assert found.normalizer == normalizer
    temperature = torch.as_tensor(layer.temperature).detach()
    assert found.temperature == pytest.approx(float(temperature[head] if temperature.dim() else temperature))
    for query in range(4):
        check(found, query, scores[query].detach(), store.values.detach(), normalizer)
    read = layer(x, return_read=True)[1]
    if layer.tolerance is None:
        torch.testing.assert_close(found.values, read.values[:, head].detach())


def test_explanation_of_all_heads_lists_the_heads_of_each_query() -> None:
    layer = make(MemoryLayer, 30, mode="topk", k=4, temperature=0.5)
    x, labels = draw(2), {row: f"<{row}>" for row in range(30)}
    found = lab.explain(layer, x, labels, query_labels=["a", "b"])
    assert found.queries == tuple(f"{query}, head {head}" for query in "ab" for head in range(HEADS))
    for head in range(HEADS):
        one = lab.explain(layer, x, labels, head=head)
        assert torch.equal(one.ids, found.ids[head::HEADS])
        assert torch.equal(one.weights, found.weights[head::HEADS])
        assert one.labels.items() <= found.labels.items()
    assert found.ids.shape == (6, 10)
    assert int((found.ids >= 0).sum(-1).unique()) == 4
    assert "a, head 2  (temperature 0.5)" in str(found)
    assert set(lab.explain(layer, x[0], [f"r{row}" for row in range(30)], head=0).labels.values()) <= {
        f"r{row}" for row in range(30)
    }
    single = MemoryLayer(DIM, 30, heads=1, dtype=torch.float64)
    assert lab.explain(single, x[0]).queries == ("query 0",)


# -- ProductKeyMemory and ContextMemory ------------------------------------------------------------------


def test_explanation_of_a_product_key_memory_weighs_its_k_rows() -> None:
    layer = make(ProductKeyMemory, 49, k=5, temperature=0.3)
    x = draw(4)
    found = lab.explain(layer, x, k=7)
    queries, values = layer.queries(x), layer.store.weight.detach()
    _, read = layer(x, return_read=True)
    for query in range(4):
        for head in range(HEADS):
            one, two = queries[query, head]
            keys = layer.keys[head]
            scores = ((keys[0] @ one)[:, None] + keys[1] @ two).flatten().detach()
            scores = scores.masked_fill(scores < scores.topk(5).values[-1], -torch.inf)
            check(found, query * HEADS + head, scores, values)
            assert torch.equal(found.ids[query * HEADS + head, :5], read.ids[query, head])
    torch.testing.assert_close(found.values.view(4, HEADS, 5), read.values.detach())


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("segments", [[], [4], [4, 5, 6]])
def test_explanation_of_a_context_memory_weighs_positions(k: int | None, segments: list[int]) -> None:
    layer = make(ContextMemory, 8, k=k, temperature=0.5)
    tokens = draw(2, sum(segments) + 3)
    for part in tokens[:, : sum(segments)].split(segments, 1) if segments else []:
        layer(part)
    twin = copy.deepcopy(layer)
    x, start = tokens[1, -3:], sum(segments)
    head = 2
    found = lab.explain(layer, x, k=20, head=head, sequence=1 if segments else 0)
    queries = layer.queries(x)[:, head, 0]
    keys, values = layer.keys(tokens[1])[:, 0, 0].detach(), layer.values(tokens[1]).detach()
    position = torch.arange(start + 3)
    for query in range(3):
        scores = (keys @ queries[query] / 6**0.5).detach()
        past = scores.masked_fill((position < start - 8) | (position >= start), -torch.inf)
        if k is not None and start:
            past = past.masked_fill(past < past.topk(k).values[-1], -torch.inf)
        is_own = (position >= start) & (position <= start + query)
        check(found, query, torch.where(is_own, scores, past), values)
    assert found.labels[start] == f"token {start}"
    names = lab.explain(layer, x, [f"t{number}" for number in range(start + 3)], head=head).labels
    assert names[start + 2] == f"t{start + 2}"
    after = draw(2, 2)
    assert torch.equal(layer(after), twin(after))  # The past did not change.


def test_explaining_a_context_memory_leaves_its_past_and_open_reads_alone() -> None:
    layer = make(ContextMemory, 8)
    layer(draw(2, 6))
    twin = copy.deepcopy(layer)
    x, after = draw(2, 5), draw(2, 4)
    y, wanted = layer(x), twin(x)
    lab.explain(layer, after[0], head=0)
    direction = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, list(layer.parameters()), direction),
        torch.autograd.grad(wanted, list(twin.parameters()), direction),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert torch.equal(layer(after), twin(after))


def test_explain_rejects_arguments_that_do_not_apply() -> None:
    layer = make(MemoryLayer, 30)
    context = make(ContextMemory, 8)
    context(draw(2, 3))
    x = draw(2)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (layer, {"head": 3}, ArgumentError, "head: expected a number from 0 to 2, got 3"),
        (layer, {"head": -1}, ArgumentError, "head: expected an integer of at least 0, got -1"),
        (layer, {"head": "first"}, DtypeError, "head: expected an integer, got"),
        (layer, {"sequence": 0}, ArgumentError, "sequence: expected no value with a MemoryLayer"),
        (context, {"sequence": 2}, ArgumentError, "sequence: expected an index into a batch of 2, got 2"),
        (context, {"labels": ["a"]}, ShapeError, "labels: expected one for each of 5 tokens, .*, got 1"),
        (layer.store, {"head": 0}, ArgumentError, "head: expected no value with a store, which has none"),
        (
            make(MemoryLayer, 30, shared=False),
            {},
            ArgumentError,
            "head: .* each head .* has its own rows.*; pass head=",
        ),
    ]
    learned = make(MemoryLayer, 30, temperature="learnable")
    with torch.no_grad():
        learned.log_temperature[0] = 1.0
    cases.append((learned, {}, ArgumentError, "head: .* each head .* has its own temperature"))
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            lab.explain(source, torch.zeros(2, 6) if isinstance(source, SoftKVStore) else x, **options)
    with pytest.raises(ShapeError, match=r"query: expected shape \(\.\.\., 8\), got \(6,\)"):
        lab.explain(layer, torch.zeros(6, dtype=torch.float64))


# -- usage -----------------------------------------------------------------------------------------------


def test_usage_summary_sorts_the_rows_and_names_the_dead_ones(tmp_path: Path) -> None:
    store = SoftKVStore(2, 1, track_usage=True)
    keys = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]])
    store.add(keys, torch.zeros(4, 1), ids=[10, 20, 30, 40])
    store.read(torch.tensor([[0.0, 1.0]] * 5 + [[-1.0, 0.0]] * 2), mode="hard")
    found = lab.summarize_usage(store, {20: "north"}, k=3)
    assert found.ids.tolist() == [20, 30, 10, 40]
    assert found.reads.tolist() == [5, 2, 0, 0]
    assert found.weight.tolist() == [5.0, 2.0, 0.0, 0.0]
    assert found.dead.tolist() == [10, 40]
    shares = torch.tensor([5 / 7, 2 / 7], dtype=torch.float64)
    assert found.effective_rows == pytest.approx(float((shares**-shares).prod()))
    lines = str(found.table()).splitlines()
    assert lines[0] == "4 rows, 7 reads: 2 dead rows (50.0 %), 1.8 effective rows"
    assert [line.split("#")[0].split() for line in lines[2:6]] == [
        ["0", "(dead)", "2"],
        ["1", "0"],
        ["2", "to", "3", "1"],
        ["4", "to", "7", "1"],
    ]
    assert lines[7].split() == ["north", "5", "5"]
    assert lines[8].split() == ["row", "30", "2", "2"]
    assert len(lines) == 9
    found.to_csv(tmp_path / "usage.csv")
    with open(tmp_path / "usage.csv", encoding="utf-8") as file:
        assert list(csv.reader(file))[:2] == [["id", "label", "reads", "weight"], ["20", "north", "5", "5.0"]]
    store.reset_usage()
    empty = lab.summarize_usage(store)
    assert empty.effective_rows == 0.0
    assert "4 dead rows (100.0 %)" in str(empty)


@pytest.mark.slow
def test_usage_summary_of_layers_combines_the_heads(tmp_path: Path) -> None:
    shared, separate = (make(MemoryLayer, 20, mode="topk", k=2, shared=flag).track_usage_() for flag in (True, False))
    products = make(ProductKeyMemory, 49, k=2).track_usage_()
    x = draw(5)
    for layer in (shared, separate, products):
        _, read = layer(x, return_read=True)
        found = lab.summarize_usage(layer)
        counts = {(int(h), int(i)): int(n) for h, i, n in zip(*_heads_ids(found), found.reads, strict=True)}
        for head in range(HEADS):
            for row in range(len(found.ids) // (HEADS if layer is separate else 1)):
                ids = read.ids[:, head] if layer is separate else read.ids
                assert counts[head if layer is separate else 0, row] == int((ids == row).sum())
        assert int(found.reads.sum()) == 5 * HEADS * 2
    assert "head 0, row " in str(lab.summarize_usage(separate))
    assert "head" in lab.summarize_usage(separate).to_dict()
    by_usage = lab.summarize_usage(shared.usage)
    assert torch.equal(by_usage.ids, lab.summarize_usage(shared).ids)
    pytest.importorskip("matplotlib")
    for name, source in (("shared", shared), ("separate", separate), ("products", products)):
        lab.summarize_usage(source).plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    shared.store.reset_usage()
    lab.summarize_usage(shared).plot(tmp_path / "dead.png")
    with pytest.raises(ArgumentError, match="path: expected an image file"):
        by_usage.plot(tmp_path / "usage.txt")


def _heads_ids(found: lab.UsageSummary) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(found.ids) if found.heads is None else found.heads, found.ids


def test_usage_summary_rejects_sources_without_usage() -> None:
    store = SoftKVStore(2, 1)
    with pytest.raises(NotApplicableError, match=r"track_usage: expected True .* call store\.track_usage_\(\)"):
        lab.summarize_usage(store)
    with pytest.raises(ArgumentError, match="source: expected at least one row"):
        lab.summarize_usage(store.track_usage_())
    with pytest.raises(DtypeError, match=r"source: expected a store, .* rows of a ContextMemory are tokens"):
        lab.summarize_usage(make(ContextMemory, 8))
    with pytest.raises(DtypeError, match="labels: expected a mapping from ids"):
        lab.summarize_usage(store, ["a"])  # type: ignore[arg-type]
