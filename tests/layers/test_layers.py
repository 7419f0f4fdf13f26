"""Test the layers against float64 reference equations, and as modules of torch."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import reference
from support.tolerances import allclose, assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softdb import (
    ArgumentError,
    DeviceError,
    DtypeError,
    NonFiniteError,
    NotApplicableError,
    SecondDerivativeError,
    ShapeError,
    SoftKVStore,
    StaleReadError,
)
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.layers.context_stores import MIN_INDEXED_ROWS
from softdb.layers.product_search import PairSearch
from softdb.optim import RowAdam
from softdb.scoring.normalizers import NORMALIZERS, reports_rows

pytestmark = pytest.mark.each_device

inductor = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
)


def skip_where_inductor_fails(backend: str, layer: nn.Module) -> None:
    """Skip a test that compiles ``layer`` with a release of torch whose inductor fails on it."""
    major, minor = map(int, torch.__version__.split(".")[:2])
    if backend == "inductor" and isinstance(layer, ProductKeyMemory) and (major, minor) < (2, 13):
        pytest.skip("before torch 2.13, inductor raises an AssertionError when it fuses the backward")
    if backend == "inductor" and isinstance(layer, ContextMemory) and (major, minor) == (2, 7):
        pytest.skip("inductor of torch 2.7 raises a KeyError")


# torch itself emits these warnings.
ignore_compile_warnings = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    # At a graph break, torch reads .grad of the tensors that are passed to the next graph.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    # After a graph break torch traces functions of a read; which gives each warning once per process.
    "ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning",
    "ignore:.*should not be instantiated. Methods on autograd functions:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compute_gradients(y: Tensor, inputs: list[Tensor], direction: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(y, inputs, direction, allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else (g.to_dense() if g.is_sparse else g)
        for x, g in zip(inputs, grads, strict=True)
    ]


def assert_values_and_gradients_close(
    y: Tensor, wanted: Tensor, inputs: list[Tensor], tolerance: float = 1e-10
) -> None:
    """Compare values, and gradients in a random direction."""
    assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(wanted)
    for got, want in zip(
        compute_gradients(y, inputs, direction), compute_gradients(wanted, inputs, direction), strict=True
    ):
        assert_close(got, want, rtol=tolerance, atol=tolerance)


def project_heads(layer: nn.Module, x: Tensor) -> Tensor:  # (..., heads, parts, width)
    """Compute queries as `softdb.layers.queries.Queries` does."""
    queries = F.linear(x, layer.projection.weight)
    if isinstance(layer.norm, nn.BatchNorm1d):
        queries = layer.norm(queries.flatten(0, -2)).view_as(queries)
    queries = queries.unflatten(-1, layer.shape)
    if isinstance(layer.norm, nn.LayerNorm):
        queries = F.layer_norm(queries, layer.norm.normalized_shape, layer.norm.weight, layer.norm.bias)
    return queries


# -- MemoryLayer -----------------------------------------------------------------------------------------


def reference_memory_layer(layer: MemoryLayer, x: Tensor, visible: Tensor | None = None) -> Tensor:
    queries = project_heads(layer.queries, x).squeeze(-2)
    outputs = []
    for head in range(layer.heads):
        store = layer.stores[head if len(layer.stores) > 1 else 0]
        query = queries[..., head, :].reshape(-1, layer.key_dim)
        scores = reference.scores(query, store.keys, store.metric, store.temperature)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        if layer.mode == "hard":
            output = store.values[scores.argmax(-1)]
        else:
            best = scores.topk(layer.k if layer.mode == "topk" and layer.k else scores.shape[-1])
            output = (best.values.softmax(-1).unsqueeze(-1) * store.values[best.indices]).sum(-2)
        outputs.append(output.view(*x.shape[:-1], layer.value_dim))
    flat = torch.cat(outputs, -1)
    if layer.gate is not None:
        flat = F.silu(layer.gate(x)) * flat
    return F.linear(flat, layer.output.weight)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("mode", "k"), [("exact", None), ("topk", 5), ("hard", None)])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3)])
def test_memory_layer_equals_its_equation(shared: bool, mode: Any, k: int | None, leading: tuple[int, ...]) -> None:
    norm: Any = None if leading == () else "layer" if shared else "batch"
    layer = MemoryLayer(
        12,
        40,
        heads=3,
        key_dim=6,
        value_dim=5,
        mode=mode,
        k=k,
        shared=shared,
        query_norm=norm,
        gate=leading == (7,),
        metric="cosine" if leading == (7,) else "scaled_dot",
        dtype=torch.float64,
    )
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    assert len(layer.stores) == (1 if shared else 3)
    assert_values_and_gradients_close(layer(x), reference_memory_layer(layer, x), [x, *layer.parameters()])


def test_memory_layer_where_equals_a_masked_softmax() -> None:
    layer = MemoryLayer(8, 20, heads=2, key_dim=4, dtype=torch.float64)
    x, visible = torch.randn(5, 8, dtype=torch.float64), torch.rand(20) < 0.5
    assert_values_and_gradients_close(
        layer(x, where=visible), reference_memory_layer(layer, x, visible), list(layer.parameters())
    )


@pytest.mark.parametrize("shared", [True, False])
def test_return_read_returns_the_read_of_each_head(shared: bool) -> None:
    layer = MemoryLayer(8, 20, heads=2, key_dim=4, mode="topk", k=3, shared=shared)
    x = torch.randn(5, 6, 8)
    y, read = layer(x, return_read=True)
    assert torch.equal(y, layer(x))
    assert read.values.shape == (5, 6, 2, 4)
    assert read.ids.shape == read.weights.shape == read.scores.shape == (5, 6, 2, 3)
    assert read.lse.shape == read.mass.shape == (5, 6, 2)
    assert_close(read.weights.sum(-1), torch.ones(5, 6, 2))
    queries = layer.queries(x).squeeze(-2)
    for head in range(2):
        store = layer.stores[0 if shared else head]
        assert torch.equal(read.ids[..., head, :], store.read(queries[..., head, :], "topk", k=3).ids)


def test_initial_output_is_small_relative_to_the_input() -> None:
    x = torch.randn(64, 256)
    for options in ({}, {"mode": "topk", "k": 8}, {"mode": "hard"}, {"gate": True}, {"query_norm": "layer"}):
        layer = MemoryLayer(256, 1000, **options)  # type: ignore[arg-type]
        assert layer(x).square().mean().sqrt() < 0.1 * x.square().mean().sqrt()


def test_batch_norm_supports_a_single_vector_in_eval_mode() -> None:
    for layer in (MemoryLayer(8, 20, query_norm="batch"), ProductKeyMemory(8, 64, k=4, key_dim=6, query_norm="batch")):
        x = torch.randn(2, 8)
        assert allclose(layer.eval()(x[0]), layer(x)[0], atol=1e-6)


def test_reset_parameters_resets_usage_and_optimizer_state() -> None:
    layer = MemoryLayer(8, 30, mode="topk", k=4, track_usage=True)
    optimizer = RowAdam(layer.store.parameters(), lr=0.1)
    layer(torch.randn(50, 8)).square().sum().backward()
    optimizer.step()
    layer.reset_parameters()
    assert int(layer.store.usage.reads.sum()) == 0
    before = layer.store.values.detach().clone()
    optimizer.zero_grad()
    layer(torch.randn(50, 8)).square().sum().backward()
    optimizer.step()
    moved = (layer.store.values - before).abs()
    assert allclose(moved[moved > 1e-6], torch.tensor(0.1), atol=1e-3)  # A first step of Adam moves by lr.


def test_sparse_gradients_update_only_the_rows_read() -> None:
    layer = MemoryLayer(8, 100, heads=2, key_dim=4, mode="topk", k=3, sparse_grad=True)
    before = copy.deepcopy(layer)
    x = torch.randn(4, 8)
    y, read = layer(x, return_read=True)
    y.square().sum().backward()
    rows_read = read.ids.unique()
    for table in (layer.store.keys, layer.store.values):
        assert table.grad.layout == torch.sparse_coo
        assert set(table.grad.coalesce().indices()[0].tolist()) <= set(rows_read.tolist())
    RowAdam(layer.store.parameters(), lr=0.1).step()
    moved = (layer.store.values != before.store.values).any(-1).nonzero().squeeze(-1)
    assert torch.equal(moved, rows_read)
    dense = MemoryLayer(8, 100, mode="topk", k=3)
    dense(x).sum().backward()
    assert dense.store.keys.grad.layout == torch.strided


def test_memory_layers_share_a_store() -> None:
    first = MemoryLayer(8, 20, heads=2, key_dim=4, k=1, track_usage=True)
    second = MemoryLayer(8, 20, heads=3, key_dim=4, store=first.store, k=2)
    rows = first.store.values.clone()
    second.reset_parameters()
    assert second.store is first.store
    assert torch.equal(first.store.values, rows), "reset_parameters keeps the rows of a store that was passed"
    both = nn.ModuleList([first, second])
    assert sum(parameter is first.store.keys for parameter in both.parameters()) == 1
    second(torch.randn(5, 8))
    assert int(first.store.usage.reads.sum()) == 5 * 3 * 2
    again = copy.deepcopy(both)
    assert again[0].store is again[1].store
    with pytest.raises(ShapeError, match=r"store: expected 21 rows with key_dim=4 .* got 20"):
        MemoryLayer(8, 21, key_dim=4, store=first.store)
    with pytest.raises(ArgumentError, match=r"metric: expected no value with store=.*, which has its own options"):
        MemoryLayer(8, 20, key_dim=4, store=first.store, metric="l2")
    with pytest.raises(ArgumentError, match="shared: expected True"):
        MemoryLayer(8, 20, key_dim=4, store=first.store, shared=False)
    with pytest.raises(DtypeError, match="store: expected a SoftKVStore"):
        MemoryLayer(8, 20, store=nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.cpu_only
def test_memory_layer_rejects_invalid_arguments() -> None:
    for options, message in (
        ({"mode": "soft"}, "mode: expected one of"),
        ({"mode": "topk"}, "k: expected the number of candidates"),
        ({"mode": "hard", "k": 3}, "k: expected no value"),
        ({"mode": "hard", "normalizer": "straight_through"}, "normalizer: expected no value"),
        ({"heads": 0}, "heads: expected an integer of at least 1"),
        ({"query_norm": "group"}, "query_norm: expected one of 'layer', 'batch'"),
        ({"metric": "manhattan"}, "metric: expected one of"),
    ):
        with pytest.raises(ArgumentError, match=message):
            MemoryLayer(8, 20, **options)  # type: ignore[arg-type]
    layer = MemoryLayer(8, 20)
    with pytest.raises(ShapeError, match=r"x: expected shape \(\.\.\., 8\), got \(3, 7\)"):
        layer(torch.randn(3, 7))
    with pytest.raises(DtypeError, match="x: expected a floating-point tensor"):
        layer(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(NonFiniteError):
        layer(torch.full((3, 8), torch.nan))
    with pytest.raises(ArgumentError, match=r"use layer\.stores"):
        _ = MemoryLayer(8, 20, shared=False).store


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 4}, DtypeError, r"num_heads: MemoryLayer has no such argument; did you mean heads=\.\.\.\?"),
        ({"temperatur": 2.0}, DtypeError, r"temperatur: MemoryLayer .* did you mean temperature=\.\.\.\?"),
        ({"embed_dim": 4}, DtypeError, "embed_dim: MemoryLayer has no such argument; it has dim, .* metric, "),
        ({"tolerance": 0.1}, ArgumentError, "tolerance: .* MemoryLayer with mode='exact'.*, or pass mode='topk'"),
        ({"tail_samples": 9}, ArgumentError, r"tail_samples: .* MemoryLayer .*; read one of layer\.stores yourself"),
        ({"trainable": False}, ArgumentError, r"trainable: .* layer\.stores\.requires_grad_\(False\)"),
        ({"capacity": 20}, ArgumentError, r"capacity: .* MemoryLayer .*; pass store=\.\.\."),
        ({"evict": "lru"}, ArgumentError, r"evict: .* MemoryLayer .*; pass store=\.\.\."),
        ({"fields": ("time",)}, ArgumentError, r"fields: .* MemoryLayer .*; pass store=\.\.\."),
        ({"where": None}, ArgumentError, r"where: .* MemoryLayer .*; pass it to the layer's call"),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_memory_layer_error_names_the_unsupported_argument(
    options: dict[str, Any], error: type[Exception], message: str, given: bool
) -> None:
    store = SoftKVStore(64, 64)
    store.add(torch.randn(20, 64), torch.randn(20, 64))
    with pytest.raises(error, match=message):
        MemoryLayer(8, 20, store=store if given else None, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"num_heads": 4}, DtypeError), ({"dtype": torch.int64}, DtypeError), ({"dtype": "float32"}, DtypeError)],
)
def test_layers_reject_unknown_arguments_and_dtypes(options: dict[str, Any], error: type[Exception]) -> None:
    for make in (MemoryLayer, ContextMemory, ProductKeyMemory):
        with pytest.raises(error, match=f"{make.__name__}|dtype: expected one of float16"):
            make(8, 64, **options)


def test_track_usage_is_rejected_where_reads_report_no_rows() -> None:
    with pytest.raises(ArgumentError, match=r"track_usage: .* k=\.\.\. .*mode='topk'"):
        MemoryLayer(8, 20, track_usage=True)
    store = SoftKVStore(64, 64, track_usage=True)
    store.add(torch.randn(20, 64), torch.randn(20, 64))
    with pytest.raises(ArgumentError, match=r"store: .* track_usage=True, .* k=\.\.\."):
        MemoryLayer(8, 20, store=store)
    MemoryLayer(8, 20, track_usage=False)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"mode": "topk", "k": 3},
        {"mode": "hard"},
        *({"normalizer": name} for name in NORMALIZERS if reports_rows(name)),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_memory_layer_counts_usage(options: dict[str, Any], shared: bool) -> None:
    layer = MemoryLayer(8, 20, heads=2, shared=shared, track_usage=True, **options)
    layer(8 * torch.randn(5, 8))
    for store in layer.stores:
        assert int(store.usage.reads.sum()) >= 5 * (2 if shared else 1)


def test_rows_can_be_frozen_by_requires_grad() -> None:
    layer = MemoryLayer(8, 20, mode="topk", k=3)
    layer.stores.requires_grad_(False)
    rows = copy.deepcopy(layer.store.keys)
    layer(torch.randn(5, 8)).square().sum().backward()
    assert layer.store.keys.grad is layer.store.values.grad is None
    assert layer.queries.projection.weight.grad is not None
    assert torch.equal(layer.store.keys, rows)


@pytest.mark.slow
@ignore_compile_warnings
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"mode": "topk", "k": 4}])
def test_gumbel_layer_draws_no_noise_in_eval_mode(options: dict[str, Any], compiled: bool) -> None:
    layer = MemoryLayer(8, 50, heads=2, normalizer="gumbel", **options)
    best = copy.deepcopy(layer)
    best.normalizer = "straight_through"
    x = torch.randn(5, 8)
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    assert not torch.equal(call(x), call(x))
    layer.eval()
    state = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(call(x), best(x))
    assert torch.equal(torch.get_rng_state(), state)
    if compiled:  # The read is part of one graph, since it draws no noise.
        whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(whole(x), best(x))
    layer.train()
    assert not torch.equal(call(x), call(x))


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
def test_heads_with_separate_stores_may_have_supports_of_different_sizes(normalizer: str) -> None:
    options: dict[str, Any] = {"heads": 2, "key_dim": 4, "normalizer": normalizer, "shared": False}
    layer = MemoryLayer(8, 40, mode="topk", k=2, sparse_grad=True, **options)
    with torch.no_grad():
        layer.stores[0].keys.mul_(0.01)
        layer.stores[1].keys.mul_(100.0)
    x = torch.randn(5, 8)
    y, read = layer(x, return_read=True)
    assert read.ids.shape == read.weights.shape == read.scores.shape
    assert read.ids.shape[:2] == (5, 2)
    wide, narrow = (read.ids[:, head] for head in range(2))
    assert (wide >= 0).sum(-1).min() > layer.k
    assert (narrow[:, 2:] == -1).all()
    assert (read.weights[read.ids < 0] == 0).all()
    # The read contains every row with a weight above 0, so an exact read has the same output and gradients.
    exact = MemoryLayer(8, 40, **options)
    exact.load_state_dict(layer.state_dict())
    other, direction = exact(x), torch.randn(5, 8)
    assert_close(y, other)
    grads = compute_gradients(y, list(layer.parameters()), direction)
    wanted = compute_gradients(other, list(exact.parameters()), direction)
    assert_close(grads, wanted, rtol=1e-4, atol=1e-5)
    _, read = layer(x, return_read=True)
    (read.lse + read.weights.square().sum(-1)).sum().backward()
    assert all(p.grad is not None and p.grad.to_dense().isfinite().all() for p in layer.stores[0].parameters())
    assert read.ids.shape[2] > 2
    assert bool((read.ids[:, 1] == -1).any())
    assert_close(read.weights.sum(-1), torch.ones(5, 2))
    assert y.shape == (5, 8)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_asymmetric_association_needs_a_separate_query_projection(tied: bool) -> None:
    # The keys are the symbols in the layer's input space. The target of symbol i is the value of symbol i + 1.
    symbols, classes = 20, 4
    labels = torch.randint(classes, (symbols,))
    store = SoftKVStore(symbols, classes)
    store.add(4 * torch.eye(symbols), F.one_hot(labels, classes).float())
    layer = MemoryLayer(symbols, symbols, heads=1, key_dim=symbols, value_dim=classes, store=store)
    if tied:  # Project queries as keys: by the identity.
        layer.queries.projection.weight.requires_grad_(False).copy_(torch.eye(symbols))
    readout = nn.Linear(symbols, classes)
    trained = [p for p in (*layer.parameters(), *readout.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    x, targets = 4 * torch.eye(symbols), labels.roll(-1)
    for _ in range(300):
        loss = F.cross_entropy(readout(layer(x)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = float((readout(layer(x)).argmax(-1) == targets).float().mean())
    assert (accuracy < 0.7) if tied else (accuracy == 1.0), accuracy


# -- ContextMemory ---------------------------------------------------------------------------------------


def reference_context_memory(
    layer: ContextMemory, x: Tensor, lengths: list[int], documents: Tensor | None = None
) -> Tensor:
    """Compute all segments at once, (batch, sum of lengths, dim)."""
    queries = project_heads(layer.queries, x).squeeze(-2).transpose(1, 2)
    keys = project_heads(layer.keys, x)[..., 0, 0, :].unsqueeze(1)
    values = F.linear(x, layer.values.weight).unsqueeze(1)
    position = torch.arange(x.shape[1])
    starts = torch.tensor([0, *lengths]).cumsum(0)
    start = starts[:-1].repeat_interleave(torch.tensor(lengths)).unsqueeze(-1)  # Start of each token's segment.
    in_segment = (position >= start) & (position <= position.unsqueeze(-1))
    in_past = (position < start) & (position >= start - layer.rows)
    if documents is not None:
        same = ((documents.unsqueeze(-1) == documents.unsqueeze(-2)) & (documents >= 0).unsqueeze(-1)).unsqueeze(1)
        in_segment, in_past = in_segment & same, in_past & same
    scale = layer.key_dim**0.5

    def scores(k: Tensor, visible: Tensor) -> Tensor:
        return (queries @ k.mT / scale).masked_fill(~visible, -torch.inf)

    past = scores(keys.detach(), in_past)
    if layer.k is not None:
        threshold = past.topk(min(layer.k, past.shape[-1])).values[..., -1:]
        past = past.masked_fill(past < threshold, -torch.inf)
    both = torch.cat([past, scores(keys, in_segment)], -1)
    is_empty = (both == -torch.inf).all(-1, keepdim=True)
    weights = both.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
    outputs = weights @ torch.cat([values.detach(), values], -2)
    return F.linear(outputs.transpose(1, 2).flatten(-2), layer.output.weight)


def run_segments(layer: Callable[..., Any], x: Tensor, lengths: list[int], documents: Tensor | None = None) -> Tensor:
    parts = x.split(lengths, dim=1)
    given = [None] * len(parts) if documents is None else documents.split(lengths, dim=1)
    return torch.cat([layer(part, documents=some) for part, some in zip(parts, given, strict=True)], dim=1)


@pytest.mark.parametrize("k", [None, 4, 200])
@pytest.mark.parametrize("rows", [20, 200])
@pytest.mark.parametrize("lengths", [[10] * 6, [1, 30, 7, 25, 1, 1], [60]])
def test_segments_equal_attention_over_the_past(k: int | None, rows: int, lengths: list[int]) -> None:
    layer = ContextMemory(12, rows, heads=3, key_dim=6, value_dim=5, k=k, dtype=torch.float64)
    x = torch.randn(2, sum(lengths), 12, dtype=torch.float64)
    with torch.no_grad():
        assert_close(run_segments(layer, x, lengths), reference_context_memory(layer, x, lengths))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("k", [None, 4])
def test_gradients_reach_every_projection(batch: int, k: int | None) -> None:
    layer = ContextMemory(12, 100, heads=3, key_dim=6, k=k, dtype=torch.float64)
    x = torch.randn(batch, 40, 12, dtype=torch.float64, requires_grad=True)
    lengths = [10] * 4
    assert_values_and_gradients_close(
        run_segments(layer, x, lengths), reference_context_memory(layer, x, lengths), [x, *layer.parameters()]
    )
    for parameter in (layer.queries.projection.weight, layer.keys.projection.weight, layer.values.weight):
        assert torch.autograd.grad(layer(x).sum(), parameter)[0].abs().max() > 0


@pytest.mark.parametrize("k", [None, 4])
def test_backward_after_each_segment_accumulates_all_gradients(k: int | None) -> None:
    layer = ContextMemory(12, 25, heads=2, key_dim=6, k=k, dtype=torch.float64)
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    direction = torch.randn(2, 70, 12, dtype=torch.float64)
    for part, along in zip(x.split(10, 1), direction.split(10, 1), strict=True):
        layer(part).backward(along)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    reference_context_memory(layer, x, [10] * 7).backward(direction)
    for name, parameter in layer.named_parameters():
        assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("k", [None, 4])
def test_tokens_attend_only_to_their_own_document(k: int | None) -> None:
    layer = ContextMemory(12, 60, heads=2, key_dim=6, k=k, dtype=torch.float64)
    x, lengths = torch.randn(3, 60, 12, dtype=torch.float64), [12] * 5
    documents = torch.randint(0, 3, (3, 60)).sort(-1).values
    documents[0, 20:30] = -1
    documents[2, :] = -1
    y = run_segments(layer, x, lengths, documents)
    assert_values_and_gradients_close(
        y, reference_context_memory(layer, x, lengths, documents), list(layer.parameters())
    )
    assert torch.equal(y[2], torch.zeros(60, 12, dtype=torch.float64))
    assert torch.equal(y[0, 20:30], torch.zeros(10, 12, dtype=torch.float64))
    layer.reset()
    whole = run_segments(layer, x[1:2], lengths, documents[1:2])
    assert_close(y[1:2], whole)


def test_documents_may_be_given_per_sequence() -> None:
    layer = ContextMemory(12, 100, heads=2, key_dim=6)
    x = torch.randn(2, 30, 12)
    layer(x[:, :10], documents=torch.tensor([0, 1]))
    layer(x[:, 10:20], documents=torch.tensor([0, 2]))
    last = layer(x[:, 20:], documents=torch.tensor([0, 1]))
    layer.reset()
    wanted = run_segments(layer, x, [10, 10, 10])
    assert_close(last[0], wanted[0, 20:])
    layer.reset()
    assert_close(last[1], run_segments(layer, x[1:, [*range(10), *range(20, 30)]], [10, 10])[0, 10:])
    layer.reset()
    y = layer(x[:, :10], documents=torch.tensor([7, 8]))
    layer.reset()
    assert_close(layer(x[:, :10]), y)
    assert layer(x[:, 10:20]).isfinite().all()


@pytest.mark.parametrize("k", [None, 4])
def test_reset_forgets_the_given_sequences(k: int | None) -> None:
    layer = ContextMemory(12, 30, heads=2, key_dim=6, k=k)
    x = torch.randn(2, 40, 12)
    alone = layer(x[:, 30:])
    layer.reset()
    run_segments(layer, x[:, :30], [10] * 3)
    layer.reset([1])
    y = layer(x[:, 30:])
    assert_close(y[1], alone[1])
    assert not torch.allclose(y[0], alone[0], atol=1e-3)
    with pytest.raises(ArgumentError, match="sequences: expected indices into a batch of 2, got"):
        layer.reset([2])
    with pytest.raises(ShapeError, match=r"x: expected 2 sequences, as in the past, got 3; call reset\(\)"):
        layer(torch.randn(3, 5, 12))
    layer.reset()
    assert layer(torch.randn(3, 5, 12)).shape == (3, 5, 12)


@pytest.mark.parametrize("k", [None, 4])
def test_write_false_stores_no_segment(k: int | None) -> None:
    layer = ContextMemory(12, 30, heads=2, key_dim=6, k=k)
    x = torch.randn(2, 30, 12)
    layer(x[:, :10])
    once = layer(x[:, 10:20], write=False)
    assert torch.equal(layer(x[:, 10:20], write=False), once)


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_resumed_context_memory_continues_exactly(k: int | None, after: int) -> None:
    options: dict[str, Any] = {"heads": 2, "key_dim": 6, "k": k}
    layer = ContextMemory(12, 25, **options)
    parts = torch.randn(3, 70, 12).split(10, dim=1)
    for part in parts[:after]:
        layer(part)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    resumed = ContextMemory(12, 25, **options)
    resumed(torch.randn(1, 5, 12))  # Loading replaces this past.
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin, pickled = copy.deepcopy(layer), io.BytesIO()
    torch.save(layer, pickled)
    pickled.seek(0)
    third = torch.load(pickled, weights_only=False)
    for part in parts[after:]:
        wanted = layer(part)
        for other in (resumed, twin, third):
            assert torch.equal(other(part), wanted)


def test_state_dict_restores_documents() -> None:
    layer = ContextMemory(12, 25, heads=2, key_dim=6)
    x = torch.randn(2, 20, 12)
    layer(x[:, :10], documents=torch.tensor([0, 3]))
    resumed = ContextMemory(12, 25, heads=2, key_dim=6)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed(x[:, 10:]), layer(x[:, 10:]))


def test_load_state_dict_rejects_a_past_of_another_shape() -> None:
    layer = ContextMemory(12, 25, heads=2, key_dim=6)
    for _ in range(2):
        layer(torch.randn(2, 5, 12))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"state_dict\['past\.documents'\]: expected shape \(any, 26\)"):
        ContextMemory(12, 26, heads=2, key_dim=6).load_state_dict(state)
    missing = {name: tensor for name, tensor in state.items() if name != "past.written"}
    with pytest.raises(RuntimeError, match=r"Missing key.*past\.written"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*past\.more"):
        layer.load_state_dict(state | {"past.more": torch.zeros(1)})
    layer.load_state_dict(state | {"past.more": torch.zeros(1)}, strict=False)


def test_past_is_saved_but_is_not_a_buffer() -> None:
    layer = ContextMemory(12, 25)
    layer(torch.randn(2, 5, 12))
    assert list(layer.buffers()) == []  # DistributedDataParallel would overwrite buffers with those of rank 0.
    assert "past.recent_keys" in layer.state_dict()


def test_backward_raises_after_tokens_of_the_read_were_evicted() -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6)
    parts = torch.randn(2, 60, 12).split(10, dim=1)
    for part in parts[:2]:
        layer(part)
    third = layer(parts[2])
    layer(parts[3])
    with pytest.raises(StaleReadError, match="tokens that later segments have overwritten"):
        third.sum().backward()
    fourth = layer(parts[4])
    layer.reset()
    run_segments(layer, torch.cat(parts, 1), [10] * 6)
    fourth.sum().backward()  # `reset` allocates new storage, so the rows of this read are unchanged.


@pytest.mark.parametrize("later", [0, 1, 4])
def test_evicted_tokens_of_a_topk_read_are_kept_for_its_backward(later: int) -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6, k=3)
    twin = copy.deepcopy(layer)
    parts = torch.randn(2, 70, 12).split(10, dim=1)
    for part in parts[:2]:
        layer(part)
        twin(part)
    third = layer(parts[2])
    for part in parts[3 : 3 + later]:
        layer(part)
    third.sum().backward()
    twin(parts[2]).sum().backward()
    for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(mine.grad, other.grad)


def test_more_open_topk_reads_than_the_past_keeps_tokens_for_raise_in_backward() -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6, k=3)
    outputs = [layer(part) for part in torch.randn(2, 70, 12).split(10, dim=1)]
    outputs[-1].sum().backward()
    with pytest.raises(StaleReadError):
        outputs[2].sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_the_last_segment(reentrant: bool) -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6)
    twin = copy.deepcopy(layer)
    parts = torch.randn(2, 50, 12, requires_grad=True).split(10, dim=1)
    for part in parts:
        part = part.detach().requires_grad_()
        y = checkpoint(layer, part, use_reentrant=reentrant)
        wanted = twin(part)
        assert torch.equal(y, wanted)
        y.sum().backward(retain_graph=True)
        wanted.sum().backward()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(one.grad, other.grad)
    late = checkpoint(layer, parts[0].detach().requires_grad_(), use_reentrant=reentrant)
    layer(parts[1])
    with pytest.raises(StaleReadError, match="recompute the last segment that the memory read"):
        late.sum().backward()


def test_failed_segment_is_not_stored() -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6)
    x = torch.randn(2, 20, 12)
    layer(x[:, :10])
    twin = copy.deepcopy(layer)
    with pytest.raises(NonFiniteError):
        layer(torch.full((2, 10, 12), torch.nan))
    for documents, error, message in (
        (torch.zeros(3, dtype=torch.int64), ShapeError, r"documents: expected shape \(2,\) or \(2, 10\)"),
        (torch.zeros(2), DtypeError, "documents: expected an int64 tensor"),
        (torch.zeros(2, dtype=torch.complex64), DtypeError, "documents: expected an int64 tensor"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), DeviceError, "documents: expected .* meta device"),
        (torch.full((2,), -2), ArgumentError, "documents: expected numbers of at least 0, or -1"),
    ):
        with pytest.raises(error, match=message):
            layer(x[:, 10:], documents=documents)
    with pytest.raises(ShapeError, match=r"x: expected shape \(any, any, 12\)"):
        layer(x[0])
    assert torch.equal(layer(x[:, 10:]), twin(x[:, 10:]))


def test_training_continues_after_segments_in_inference_mode() -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6)
    with torch.inference_mode():
        for part in torch.randn(2, 30, 12).split(10, dim=1):
            layer(part)
    for part in torch.randn(2, 30, 12).split(10, dim=1):
        layer(part).sum().backward()


@pytest.mark.parametrize("k", [None, 4])
def test_past_is_converted_with_the_layer(k: int | None) -> None:
    layer = ContextMemory(12, 20, heads=2, key_dim=6, k=k)
    x = torch.randn(2, 30, 12)
    run_segments(layer, x, [10] * 3)
    layer.double()
    assert layer(x[:, :10].double()).dtype == torch.float64
    floats = [name for name, tensor in layer.state_dict().items() if tensor.dtype == torch.float32]
    assert floats == []


def test_long_past_is_indexed() -> None:
    layer = ContextMemory(8, MIN_INDEXED_ROWS, heads=2, key_dim=8, k=8)
    x = torch.randn(1, MIN_INDEXED_ROWS + 600, 8)
    with torch.no_grad():
        for part in x.split(300, dim=1):
            layer(part)
        (store,) = layer._past.tokens.stores  # type: ignore[union-attr]
        assert store.index_stats().factory.startswith("IVF")
        assert len(store) == MIN_INDEXED_ROWS
        exact = copy.deepcopy(layer)
        exact.k = None
        y, read = layer(x[:, :50], return_read=True)
    assert y.isfinite().all()
    assert read.lse.shape == (1, 2, 50)


@pytest.mark.slow
def test_recall_learned_within_segments_works_across_segments() -> None:
    # A row holds a symbol and its label. The target of a query for symbol i is the label of symbol i + 1.
    symbols, classes, batch = 20, 4, 32
    layer = ContextMemory(symbols + classes, 64, heads=1, key_dim=32)
    readout = nn.Linear(symbols + classes, classes)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=0.01)

    def episode() -> tuple[Tensor, Tensor]:
        order = torch.rand(batch, symbols).argsort(-1)
        labels = torch.randint(classes, (batch, symbols))  # The label of each symbol.
        rows = torch.cat([F.one_hot(order, symbols), F.one_hot(labels.gather(1, order), classes)], -1)
        query = torch.rand(batch, symbols).argsort(-1)
        queries = torch.cat([F.one_hot(query, symbols), torch.zeros(batch, symbols, classes)], -1)
        return torch.cat([rows, queries], 1).float(), labels.gather(1, (query + 1) % symbols)

    for _ in range(300):
        x, targets = episode()
        layer.reset()
        loss = F.cross_entropy(readout(layer(x)[:, symbols:]).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, targets = episode()
    layer.reset()
    with torch.no_grad():
        layer(x[:, :symbols])  # Rows and queries are now in different segments.
        is_correct = readout(layer(x[:, symbols:])).argmax(-1) == targets
    assert float(is_correct.float().mean()) > 0.95


@pytest.mark.parametrize(
    "move", [lambda layer: layer.to(torch.get_default_device()), lambda layer: layer.double()], ids=["to", "double"]
)
def test_eviction_is_detected_after_a_conversion_that_changes_nothing(move: Callable[[nn.Module], nn.Module]) -> None:
    layer = ContextMemory(8, 8, dtype=torch.float64)
    xs = torch.randn(4, 1, 6, 8, dtype=torch.float64)
    layer(xs[0])
    y = layer(xs[1]).sum()
    move(layer)
    layer(xs[2])
    layer(xs[3])
    with pytest.raises(StaleReadError, match="got tokens that later segments have overwritten"):
        y.backward()


@pytest.mark.parametrize("k", [None, 4])
def test_reset_accepts_a_mask_of_sequences(k: int | None) -> None:
    masked, indexed = (ContextMemory(8, 20, k=k) for _ in range(2))
    indexed.load_state_dict(masked.state_dict())
    x = torch.randn(3, 2, 8)
    for layer in (masked, indexed):
        layer(x)
    masked.reset(torch.tensor([True, False, True]))
    indexed.reset([0, 2])
    assert torch.equal(masked(x), indexed(x))
    with pytest.raises(DtypeError, match="sequences: expected int64"):
        masked.reset([1.7])
    with pytest.raises(ShapeError, match=r"sequences: expected shape \(3,\)"):
        masked.reset(torch.ones(2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="sequences: expected indices into a batch of 3"):
        masked.reset([3])


@pytest.mark.parametrize("k", [None, 4])
def test_state_is_assigned_to_a_layer_on_the_meta_device(k: int | None) -> None:
    layer = ContextMemory(8, 20, k=k, dtype=torch.float64)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    layer(x)
    layer(x)
    state = layer.state_dict()
    with torch.device("meta"):
        made = ContextMemory(8, 20, k=k)
    made.load_state_dict(state, assign=True)
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize("k", [None, 4])
def test_later_segments_do_not_change_a_saved_state(k: int | None) -> None:
    layer = ContextMemory(8, 4, heads=2, k=k)
    xs = torch.randn(6, 1, 3, 8)
    for x in xs[:3]:
        layer(x)
    wanted = copy.deepcopy(layer)(xs[5])
    state = layer.state_dict()
    layer(xs[3])
    layer(xs[4])
    layer.load_state_dict(state)
    assert torch.equal(layer(xs[5]), wanted)


def test_other_weights_load_when_the_past_does_not_fit() -> None:
    ContextMemory(8, 16).load_state_dict(ContextMemory(8, 8).state_dict())  # An empty past fits any layer.

    def model(rows: int) -> nn.ModuleDict:
        return nn.ModuleDict({"first": ContextMemory(8, rows), "second": nn.Linear(8, 8)})

    saved, loaded = model(8), model(16)
    for _ in range(2):
        saved["first"](torch.randn(2, 3, 8))
        loaded["first"](torch.randn(3, 3, 8))
    before = copy.deepcopy(loaded["first"]._past.state(torch.zeros(())))
    with pytest.raises(
        RuntimeError, match=r"expected shape \(any, 16\), got \(2, 8\); to load weights only, remove the keys"
    ):
        loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved["second"].weight, loaded["second"].weight)
    for name, tensor in loaded["first"]._past.state(torch.zeros(())).items():
        assert torch.equal(tensor, before[name])
    weights = {name: tensor for name, tensor in saved.state_dict().items() if "past." not in name}
    loaded.load_state_dict(weights, strict=False)
    assert torch.equal(saved["first"].values.weight, loaded["first"].values.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past.written": torch.tensor(-3)}, "written.*expected at least 0"),
        ({"past.documents": torch.zeros(2, 8)}, "documents.*expected int64"),
        ({f"past.recent_{name}": torch.zeros(1, 3, 2) for name in ("keys", "values")}, "recent_keys"),
    ],
)
def test_load_state_dict_rejects_an_invalid_past(change: dict[str, Tensor], message: str) -> None:
    layer = ContextMemory(8, 8, key_dim=2, value_dim=2)
    for _ in range(2):
        layer(torch.randn(2, 3, 8))
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), **change})


@pytest.mark.parametrize("write", [True, False])
def test_activation_checkpointing_supports_write_false(write: bool) -> None:
    layer, plain = ContextMemory(8, 40), ContextMemory(8, 40)
    plain.load_state_dict(layer.state_dict())
    first, x = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    grads = []
    for given, run in ((layer, lambda x: checkpoint(layer, x, write=write, use_reentrant=False)), (plain, plain)):
        given(first)
        y = x.clone().requires_grad_()
        run(y).square().sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)
    y = checkpoint(layer, x.clone().requires_grad_(), write=False, use_reentrant=False)
    layer(first)
    with pytest.raises(StaleReadError, match="recompute the last segment"):
        y.sum().backward()


# -- pasts of training and evaluation, loaded pasts ------------------------------------------------------

SMALL_OPTIONS: dict[str, Any] = {"heads": 2, "key_dim": 6}
all_rows_and_topk = pytest.mark.parametrize("k", [None, 3])


@all_rows_and_topk
def test_training_and_evaluation_have_separate_pasts(k: int | None) -> None:
    layer = ContextMemory(12, 25, k=k, **SMALL_OPTIONS)
    alone, fresh = copy.deepcopy(layer), copy.deepcopy(layer)
    x, validation = torch.randn(2, 40, 12).split(10, dim=1), torch.randn(3, 20, 12).split(10, dim=1)
    for part in x[:2]:
        assert torch.equal(layer(part), alone(part))
    layer.eval()
    assert "sequences=0" in repr(layer)
    with torch.no_grad():
        for part in validation:  # Another number of sequences.
            assert torch.equal(layer(part), fresh(part))
    assert "sequences=3" in repr(layer)
    layer.train()
    assert "sequences=2" in repr(layer)
    assert torch.equal(layer(x[2]), alone(x[2]))
    layer.eval()
    assert torch.equal(layer(validation[0]), fresh(validation[0]))  # The past of evaluation continues.
    layer.reset()
    fresh.reset()
    assert torch.equal(layer(validation[1]), fresh(validation[1]))
    layer.reset([1])
    fresh.reset([1])
    assert torch.equal(layer(validation[0]), fresh(validation[0]))
    layer.train()
    assert torch.equal(layer(x[3]), alone(x[3]))  # A reset in eval mode keeps the past of training.
    layer.reset()
    alone.reset()
    assert torch.equal(layer(x[0]), alone(x[0]))
    layer.eval()
    assert torch.equal(layer(validation[1]), fresh(validation[1]))  # A reset in training mode keeps it, too.


def test_reset_parameters_clears_both_pasts() -> None:
    layer = ContextMemory(12, 25, **SMALL_OPTIONS)
    for part in torch.randn(2, 2, 10, 12):
        layer.train()(part)
        layer.eval()(part)
    layer.reset_parameters()
    assert "sequences=0" in repr(layer)
    assert "sequences=0" in repr(layer.train())


@pytest.mark.slow
@all_rows_and_topk
@pytest.mark.parametrize("training", [True, False])
def test_state_dict_restores_both_pasts_in_either_mode(k: int | None, training: bool) -> None:
    layer = ContextMemory(12, 25, k=k, **SMALL_OPTIONS)
    x, validation = torch.randn(2, 40, 12).split(10, dim=1), torch.randn(3, 40, 12).split(10, dim=1)
    for part in x[:3]:
        layer(part)
    plain = set(layer.state_dict())
    assert not any(name.startswith("evaluation_past.") for name in plain)
    layer.eval()
    for part in validation[:3]:
        layer(part)
    layer.train(training)
    state = copy.deepcopy(layer.state_dict())
    more = set(state) - plain
    assert more
    assert all(name.startswith("evaluation_past.") for name in more)
    assert state["past.recent_documents"].shape[0] == 2
    assert state["evaluation_past.recent_documents"].shape[0] == 3
    resumed = ContextMemory(12, 25, k=k, **SMALL_OPTIONS)
    resumed.load_state_dict(state)
    old = ContextMemory(12, 25, k=k, **SMALL_OPTIONS)
    old.eval()(torch.randn(1, 5, 12))
    old.load_state_dict({name: state[name] for name in plain})  # A strict load without a past of evaluation.
    assert "sequences=0" in repr(old)
    assert old.state_dict().keys() == plain
    moved = copy.deepcopy(layer).double()
    pickled = io.BytesIO()
    torch.save(layer, pickled)
    pickled.seek(0)
    twins = [resumed, copy.deepcopy(layer), torch.load(pickled, weights_only=False)]
    for mode, part in ((True, x[3]), (False, validation[3])):
        wanted = layer.train(mode)(part)
        for twin in (*twins, old) if mode else twins:
            assert torch.equal(twin.train(mode)(part), wanted)
        assert_close(moved.train(mode)(part.double()).float(), wanted)


def test_load_state_dict_rejects_an_invalid_evaluation_past() -> None:
    layer = ContextMemory(12, 25, **SMALL_OPTIONS)
    layer.eval()
    for part in torch.randn(2, 2, 10, 12):
        layer(part)
    state = layer.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "evaluation_past.written"}
    with pytest.raises(RuntimeError, match=r"Missing key.*evaluation_past\.written"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*evaluation_past\.more"):
        layer.load_state_dict(state | {"evaluation_past.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"state_dict\['evaluation_past\.written'\]: expected at least 0, got -1"):
        layer.load_state_dict(state | {"evaluation_past.written": torch.tensor(-1)})
    weights = {name: tensor for name, tensor in state.items() if "past." not in name}
    before = copy.deepcopy(layer)
    layer.load_state_dict(weights, strict=False)
    part = torch.randn(2, 10, 12)
    assert torch.equal(layer(part), before(part))


@all_rows_and_topk
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", [True, False])
def test_loaded_past_is_dropped_when_the_batch_size_changes(k: int | None, training: bool, write: bool) -> None:
    layer = ContextMemory(12, 25, k=k, **SMALL_OPTIONS).train(training)
    for part in torch.randn(2, 2, 10, 12):
        layer(part)
    loaded = ContextMemory(12, 25, k=k, **SMALL_OPTIONS).train(training)
    loaded.load_state_dict(layer.state_dict())
    fresh = copy.deepcopy(loaded)
    fresh.reset()
    x = torch.randn(3, 20, 12).split(10, dim=1)
    with pytest.warns(
        UserWarning, match=r"expected 2 sequences, as in the loaded past .*, got 3; .* call reset\(\)"
    ) as warned:
        y = loaded(x[0], write=write)
    assert len(warned) == 1
    assert torch.equal(y, fresh(x[0], write=write))
    assert torch.equal(loaded(x[1]), fresh(x[1]))  # Warnings are errors here, so this call did not warn.
    with pytest.raises(ShapeError, match=r"x: expected 3 sequences, .* got 2; call reset\(\)"):
        loaded(torch.randn(2, 10, 12))  # The past is no longer a loaded one.
    # A call that fails drops nothing.
    loaded.load_state_dict(layer.state_dict())
    with pytest.raises(NonFiniteError):
        loaded(torch.full((3, 10, 12), torch.nan), write=write)
    assert loaded.length == 20
    # A loaded past that was continued is not dropped either.
    loaded.load_state_dict(layer.state_dict())
    loaded(torch.randn(2, 10, 12), write=False)
    with pytest.raises(ShapeError, match="x: expected 2 sequences"):
        loaded(torch.randn(0, 10, 12))
    loaded(torch.randn(2, 10, 12))
    with pytest.raises(ShapeError, match="x: expected 2 sequences"):
        loaded(x[0])


def test_pickles_with_one_past_still_load() -> None:
    layer = ContextMemory(12, 25, **SMALL_OPTIONS)
    part = torch.randn(2, 10, 12)
    layer(part)
    wanted = copy.deepcopy(layer)(part)
    del layer.__dict__["_evaluation_past"], layer._past.__dict__["is_loaded"]
    old = pickle.loads(pickle.dumps(layer))
    assert torch.equal(old(part), wanted)
    old.eval()(torch.randn(3, 10, 12))
    assert "evaluation_past.written" in old.state_dict()


@pytest.mark.slow
@ignore_compile_warnings
def test_compiled_layer_uses_the_past_of_its_mode() -> None:
    torch._dynamo.reset()
    layer = ContextMemory(12, 25, **SMALL_OPTIONS)
    twin = copy.deepcopy(layer)
    call = torch.compile(layer, backend="eager")
    x, validation = torch.randn(2, 40, 12).split(10, dim=1), torch.randn(3, 40, 12).split(10, dim=1)
    for step in range(4):
        assert torch.equal(layer.train() and call(x[step]), twin.train()(x[step]))
        assert torch.equal(layer.eval() and call(validation[step]), twin.eval()(validation[step]))


def test_activation_checkpointing_recomputes_segments_in_eval_mode() -> None:
    layer = ContextMemory(12, 20, **SMALL_OPTIONS)
    layer(torch.randn(3, 10, 12))
    layer.eval()
    twin = copy.deepcopy(layer)
    for part in torch.randn(2, 2, 10, 12):
        part = part.requires_grad_()
        y, wanted = checkpoint(layer, part, use_reentrant=False), twin(part)
        assert torch.equal(y, wanted)
        grad, other = (torch.autograd.grad(loss.sum(), part)[0] for loss in (y, wanted))
        assert_close(grad, other)


def test_empty_batch_leaves_the_past_empty() -> None:
    layer = ContextMemory(8, 16)
    for _ in range(2):
        assert layer(torch.randn(0, 3, 8)).shape == (0, 3, 8)
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)


# -- ProductKeyMemory ------------------------------------------------------------------------------------


def reference_product_keys(layer: ProductKeyMemory, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output, the rows read and their scores from all n² scores."""
    queries = project_heads(layer.queries, x)
    one = torch.einsum("...hd,hnd->...hn", queries[..., 0, :], layer.keys[:, 0])
    two = torch.einsum("...hd,hnd->...hn", queries[..., 1, :], layer.keys[:, 1])
    best = (one.unsqueeze(-1) + two.unsqueeze(-2)).flatten(-2).topk(layer.k)
    y = (best.values.softmax(-1).unsqueeze(-1) * layer.store.weight[best.indices]).sum((-3, -2))
    if layer.output is not None:
        y = F.linear(y, layer.output.weight)
    return y, best.indices, best.values


@pytest.mark.parametrize(
    ("n", "k", "heads", "value_dim", "norm"),
    [
        (16, 8, 4, None, "layer"),
        (128, 8, 2, 5, "batch"),
        (65, 8, 1, None, None),
        (67, 1, 2, 3, "layer"),
        (4, 16, 2, None, "layer"),
        (5, 12, 3, 7, None),
        (1, 1, 2, None, "layer"),
    ],
)
@pytest.mark.parametrize("leading", [(9,), (2, 5)])
@pytest.mark.parametrize("sparse", [True, False])
def test_product_key_memory_equals_a_search_of_all_pairs(
    n: int, k: int, heads: int, value_dim: int | None, norm: Any, leading: tuple[int, ...], sparse: bool
) -> None:
    layer = ProductKeyMemory(
        12, n * n, heads=heads, k=k, key_dim=8, value_dim=value_dim, query_norm=norm, sparse_grad=sparse
    ).double()
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    wanted, rows, scores = reference_product_keys(layer, x)
    y, read = layer(x, return_read=True)
    assert torch.equal(read.ids, rows)
    assert_close(read.scores, scores)
    assert_close(read.weights, scores.softmax(-1))
    assert_close(read.lse, scores.logsumexp(-1))
    assert read.mass.isnan().all() == (k < n * n)
    assert read.values.shape == (*leading, heads, layer.value_dim)
    assert_values_and_gradients_close(y, wanted, [x, *layer.parameters()])


def test_search_in_parts_gives_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ProductKeyMemory(12, 100, heads=2, k=5, key_dim=8).double()
    x = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(ProductKeyMemory, "search", PairSearch(max_scores=7 * 2 * 2 * 10))
    assert_values_and_gradients_close(layer(x), reference_product_keys(layer, x)[0], [x, *layer.parameters()])
    assert layer(x[:0]).shape == (0, 12)


def test_optimizer_step_updates_only_the_rows_read() -> None:
    layer = ProductKeyMemory(16, 64 * 64, key_dim=8, k=4, sparse_grad=True)
    before = layer.store.weight.detach().clone()
    y, read = layer(torch.randn(6, 16), return_read=True)
    y.square().sum().backward()
    gradient = layer.store.weight.grad
    rows_read = read.ids.unique()
    assert torch.equal(gradient._indices()[0], rows_read)  # The gradient is coalesced.
    RowAdam(layer.store.parameters(), lr=0.1).step()
    moved = (layer.store.weight != before).any(-1).nonzero().squeeze(-1)
    assert torch.equal(moved, rows_read)


@pytest.mark.slow
def test_product_key_memory_learns_a_table() -> None:
    layer, table = ProductKeyMemory(16, 32 * 32, key_dim=16, k=8, sparse_grad=True), torch.randn(50, 16)
    x = F.normalize(torch.randn(50, 16), dim=-1) * 4
    values = [layer.store.weight]
    optimizers = (
        RowAdam(values, lr=0.05),
        torch.optim.Adam([p for p in layer.parameters() if p is not layer.store.weight], lr=0.005),
    )
    for _ in range(150):
        loss = (layer(x) - table).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss < 0.02


def test_product_key_memories_share_a_store() -> None:
    first = ProductKeyMemory(12, 100, k=5, key_dim=8, sparse_grad=True, track_usage=True).double()
    second = ProductKeyMemory(12, 100, heads=2, k=3, key_dim=4, store=first.store, dtype=torch.float64)
    both = nn.ModuleList([first, second])
    assert second.store is first.store
    assert sum(parameter is first.store.weight for parameter in both.parameters()) == 1
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    y = second(first(x))
    wanted = reference_product_keys(second, reference_product_keys(first, x)[0])[0]
    assert int(first.store.usage.reads.sum()) == 7 * (4 * 5 + 2 * 3)
    assert_values_and_gradients_close(y, wanted, [x, *both.parameters()])
    second(first(x)).sum().backward()
    assert first.store.weight.grad.layout == torch.sparse_coo
    values = first.store.weight.detach().clone()
    second.reset_parameters()
    assert torch.equal(first.store.weight, values)
    again = copy.deepcopy(both)
    assert again[0].store is again[1].store
    with pytest.raises(ShapeError, match=r"store: expected 81 values of width 12, got \(100, 12\)"):
        ProductKeyMemory(12, 81, k=5, store=first.store)
    with pytest.raises(DtypeError, match="store: expected the store of another ProductKeyMemory"):
        ProductKeyMemory(12, 81, k=5, store=SoftKVStore(2, 2))  # type: ignore[arg-type]


def test_usage_counts_reads_and_weights() -> None:
    layer = ProductKeyMemory(12, 100, heads=2, k=5, key_dim=8, track_usage=True)
    _, read = layer(torch.randn(3, 4, 12), return_read=True)
    usage = layer.store.usage
    assert torch.equal(usage.reads, read.ids.flatten().bincount(minlength=100))
    weights = torch.zeros(100, dtype=torch.float64).index_add_(
        0, read.ids.flatten(), read.weights.detach().flatten().double()
    )
    assert_close(usage.weight, weights)
    resumed = ProductKeyMemory(12, 100, heads=2, k=5, key_dim=8, track_usage=True)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed.store.usage.reads, usage.reads)
    layer.half()
    assert layer.store.usage.weight.dtype == torch.float64
    layer.store.reset_usage()
    assert int(layer.store.usage.reads.sum()) == 0
    assert int(usage.reads.sum()) == 3 * 4 * 2 * 5  # `usage` is a copy, which reset_usage does not change.
    with pytest.raises(ArgumentError, match="track_usage: expected True"):
        _ = ProductKeyMemory(12, 100, k=5).store.usage


def test_product_key_memory_rejects_invalid_arguments() -> None:
    for options, message in (
        (
            {"rows": 1000},
            "rows: expected a square number, since every pair of keys has a row, got 1000; use 961 or 1024",
        ),
        ({"key_dim": 7}, "key_dim: expected an even number, the width of both halves together, got 7"),
        ({"k": 101}, "k: expected at most the number of rows, 100, got 101"),
        ({"k": 0}, "k: expected an integer of at least 1, got 0"),
        ({"query_norm": "rms"}, "query_norm: expected one of"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ProductKeyMemory(12, **({"rows": 100} | options))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"x: expected shape \(\.\.\., 12\)"):
        ProductKeyMemory(12, 100)(torch.randn(3, 11))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch itself uses it.
def test_forward_mode_agrees_with_reverse_mode() -> None:
    layer = ProductKeyMemory(8, 64, key_dim=6, k=4)
    x, direction = torch.randn(2, 3, 8)
    jacobian = torch.func.jacrev(layer)(x)
    assert_close(torch.func.jacfwd(layer)(x), jacobian, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    assert_close(tangent, (jacobian * direction).sum((-2, -1)), rtol=1e-4, atol=1e-5)


def test_nonfinite_input_raises_and_counts_no_reads() -> None:
    layer = ProductKeyMemory(8, 64, key_dim=6, k=4, track_usage=True)
    for nonfinite in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="x: expected finite numbers"):
            layer(torch.randn(3, 8).index_fill(0, torch.tensor([1]), nonfinite))
    assert int(layer.store.usage.reads.sum()) == 0
    assert (layer.store.usage.weight == 0).all()


def test_second_derivative_raises() -> None:
    layer = ProductKeyMemory(12, 100, k=5, key_dim=8)
    x = torch.randn(3, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="a ProductKeyMemory have no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_blended_in_float32(dtype: torch.dtype) -> None:
    layer = ProductKeyMemory(16, 400, k=8, key_dim=8)
    layer.store.to(dtype)
    widened = copy.deepcopy(layer)
    widened.store.float()
    x = torch.randn(5, 16, requires_grad=True)
    assert layer(x).dtype == torch.float32
    assert_close(layer(x), widened(x))
    for one in (layer, widened):
        one(x).square().sum().backward()
    assert layer.store.weight.grad.dtype == dtype
    assert_close(layer.store.weight.grad.to_dense().float(), widened.store.weight.grad.to_dense(), rtol=1e-2, atol=1e-2)
    assert_close(layer.keys.grad, widened.keys.grad)


# -- module conventions ----------------------------------------------------------------------------------

LAYER_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "memory": lambda **options: MemoryLayer(16, 50, heads=2, key_dim=8, **options),
    "memory, top-k, one store per head": lambda **options: MemoryLayer(
        16, 50, heads=2, key_dim=8, mode="topk", k=4, shared=False, query_norm="batch", gate=True, **options
    ),
    "context": lambda **options: ContextMemory(16, 30, heads=2, key_dim=8, **options),
    "context, top-k": lambda **options: ContextMemory(16, 30, heads=2, key_dim=8, k=4, **options),
    "product": lambda **options: ProductKeyMemory(16, 64, k=4, key_dim=8, value_dim=10, track_usage=True, **options),
}
for_each_layer = pytest.mark.parametrize("make", LAYER_FACTORIES.values(), ids=LAYER_FACTORIES)


@for_each_layer
def test_layer_is_materialized_from_the_meta_device(make: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        one = make()
    for layer in (one, make(device="meta")):
        assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
        layer.to_empty(device=torch.get_default_device())
        layer.reset_parameters()  # type: ignore[operator]
        y = layer(torch.randn(2, 3, 16))
        assert y.isfinite().all()
        y.sum().backward()
        assert y.abs().max() > 0
        twin = make()
        twin.load_state_dict(layer.state_dict())


@for_each_layer
def test_reset_parameters_repeats_with_the_same_seed(make: Callable[..., nn.Module]) -> None:
    layer = make()
    x = torch.randn(2, 3, 16)
    layer(x)
    torch.manual_seed(1)
    layer.reset_parameters()  # type: ignore[operator]
    first = layer(x)
    torch.manual_seed(1)
    layer.reset_parameters()  # type: ignore[operator]
    assert torch.equal(layer(x), first)


@for_each_layer
def test_deepcopy_and_state_dict_copies_are_equal(make: Callable[..., nn.Module]) -> None:
    layer, x = make(), torch.randn(2, 3, 16)
    layer(x)
    twin = copy.deepcopy(layer)
    loaded = make()
    loaded.load_state_dict(layer.state_dict())
    wanted = layer(x)
    assert torch.equal(twin(x), wanted)
    assert torch.equal(loaded(x), wanted)
    wanted.sum().backward()
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert "dim=16" in repr(layer)


@for_each_layer
def test_layers_support_dtypes_and_autocast(make: Callable[..., nn.Module]) -> None:
    x = torch.randn(2, 3, 16)
    for dtype in (torch.float64, torch.bfloat16):
        layer = make(dtype=dtype)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        y.sum().backward()
    layer = make()
    plain = layer(x)
    layer.reset_parameters() if isinstance(layer, ContextMemory) else None  # type: ignore[func-returns-value]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    if not isinstance(layer, ContextMemory):
        assert_close(y.float(), plain, rtol=0.1, atol=0.1)


@pytest.mark.cpu_only
@pytest.mark.slow
@ignore_compile_warnings
@for_each_layer
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_compiled_layers_equal_eager_layers(make: Callable[..., nn.Module], backend: str) -> None:
    torch._dynamo.reset()
    layer = make().double()
    skip_where_inductor_fails(backend, layer)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=not isinstance(layer, ContextMemory))
    for _ in range(3):
        x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
        y, wanted = compiled(x), twin(x)
        assert_close(y, wanted)
        y.sum().backward()
        wanted.sum().backward()
        for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
            grads = [g.to_dense() if g.is_sparse else g for g in (one.grad, other.grad)]
            assert_close(*grads)
            one.grad = other.grad = None


@pytest.mark.cpu_only
@pytest.mark.slow
@ignore_compile_warnings
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_shared_store_in_a_compiled_graph(backend: str) -> None:
    torch._dynamo.reset()
    first = ProductKeyMemory(12, 100, k=5, key_dim=8)
    skip_where_inductor_fails(backend, first)
    both = nn.Sequential(first, ProductKeyMemory(12, 100, k=5, key_dim=8, store=first.store)).double()
    twin = copy.deepcopy(both)
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.compile(both, backend=backend, fullgraph=True)(x).sum().backward()
    twin(x).sum().backward()
    gradient = both[0].store.weight.grad
    assert_close(gradient.to_dense() if gradient.is_sparse else gradient, twin[0].store.weight.grad.to_dense())


def test_blend_operator_passes_opcheck() -> None:
    weights, values = torch.randn(6, 3).requires_grad_(), torch.randn(9, 4).requires_grad_()
    rows = torch.randint(9, (6, 3))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.softdb.blend.default, (weights, values, rows, False), test_utils=checks)


# -- temperature, tolerance and usage of MemoryLayer and ProductKeyMemory --------------------------------


@pytest.mark.parametrize(("mode", "k"), [("exact", None), ("topk", 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_learnable_temperature_divides_the_scores_of_each_head(mode: Any, k: int | None, shared: bool) -> None:
    options: dict[str, Any] = {"mode": mode, "k": k, "shared": shared, "sparse_grad": False, "dtype": torch.float64}
    layer = MemoryLayer(8, 30, heads=3, key_dim=6, temperature="learnable", **options)
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    plain = MemoryLayer(8, 30, heads=3, key_dim=6, **options)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "log_temperature"})
    assert_close(layer(x), plain(x))  # It starts at 1.
    with torch.no_grad():
        layer.log_temperature.copy_(torch.tensor([-1.0, 0.0, 0.7]))
    # A layer without temperature whose queries are divided by it.
    scaled = copy.deepcopy(layer)
    del scaled.log_temperature
    scaled.register_parameter("log_temperature", None)
    assert scaled.temperature == 1.0
    divisor = layer.log_temperature.exp().repeat_interleave(6).unsqueeze(-1)
    weight = layer.queries.projection.weight / divisor
    wanted = torch.func.functional_call(
        scaled,
        {name: parameter for name, parameter in layer.named_parameters() if name != "log_temperature"}
        | {"queries.projection.weight": weight},
        (x,),
    )
    assert_values_and_gradients_close(layer(x), wanted, [x, *layer.parameters()])
    layer.reset_parameters()
    assert layer.temperature.tolist() == [1.0] * 3
    with pytest.raises(ArgumentError, match="temperature: expected no assignment to a MemoryLayer that learns it"):
        layer.temperature = 0.5


def test_temperature_of_a_memory_layer_is_that_of_its_stores_or_its_own() -> None:
    layer = MemoryLayer(8, 20, key_dim=4, temperature=0.5)
    assert layer.temperature == layer.store.temperature == 0.5
    layer.temperature = 0.25
    assert layer.store.temperature == 0.25
    assert MemoryLayer(8, 20, key_dim=4, store=layer.store).temperature == 0.25
    other = MemoryLayer(8, 20, key_dim=4, store=layer.store, temperature=2.0)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    before = other(x)
    layer.temperature = 2.0
    assert_close(other(x), layer(x))
    layer.temperature = 0.1
    assert torch.equal(other(x), before)
    other.temperature = 3.0
    assert (other.temperature, layer.temperature) == (3.0, 0.1)
    separate = MemoryLayer(8, 20, heads=2, shared=False, temperature=0.5)
    separate.stores[1].temperature = 1.0
    with pytest.raises(NotApplicableError, match="temperature: expected stores with one temperature, got several"):
        _ = separate.temperature


@pytest.mark.parametrize("kind", [MemoryLayer, ContextMemory, ProductKeyMemory])
def test_layers_reject_invalid_temperatures(kind: Any) -> None:
    with pytest.raises(DtypeError, match=f"temperature: expected .* or 'learnable', in a {kind.__name__}, got"):
        kind(8, 64, temperature="learned")
    with pytest.raises(ArgumentError, match="temperature: expected a finite number above 0, got 0"):
        kind(8, 64, temperature=0)
    with pytest.raises(DtypeError, match="temperature: expected a number, got"):
        kind(8, 64, temperature=[1.0])
    layer = kind(8, 64, temperature=torch.tensor(0.5))
    assert type(layer.temperature) is float
    assert "log_temperature" not in layer.state_dict()
    learned = kind(8, 64, heads=2, temperature="learnable", dtype=torch.bfloat16)
    assert learned.temperature.dtype == torch.float32
    assert learned(torch.randn(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_temperature_divides_the_scores_of_a_product_key_memory() -> None:
    layer = ProductKeyMemory(8, 49, heads=2, k=5, key_dim=6, temperature="learnable", dtype=torch.float64)
    with torch.no_grad():
        layer.log_temperature.copy_(torch.tensor([-1.0, 0.5]))
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    _, rows, scores = reference_product_keys(layer, x)
    weights = (scores / layer.log_temperature.exp().unsqueeze(-1)).softmax(-1)
    wanted = (weights.unsqueeze(-1) * layer.store.weight[rows]).sum((-3, -2))
    assert_values_and_gradients_close(layer(x), wanted, [x, *layer.parameters()])


def test_tolerance_bounds_the_error_of_a_memory_layer() -> None:
    layer = MemoryLayer(8, 500, heads=2, key_dim=4, mode="topk", tolerance=0.05, dtype=torch.float64)
    exact = MemoryLayer(8, 500, heads=2, key_dim=4, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(20, 8, dtype=torch.float64)
    _, read = layer(x, return_read=True)
    _, wanted = exact(x, return_read=True)
    error = ((read.values - wanted.values).norm(dim=-1) / wanted.values.norm(dim=-1)).detach()
    assert read.error is not None
    assert float(read.error.max()) <= 0.05
    assert float(error.mean()) <= 0.05
    assert read.ids is None
    for options, message in (
        ({}, "tolerance: .* MemoryLayer with mode='exact'"),
        ({"mode": "hard"}, "tolerance: .* MemoryLayer with mode='hard'"),
        ({"mode": "topk", "normalizer": "sparsemax"}, "normalizer: expected 'softmax' with tolerance"),
        ({"mode": "topk", "track_usage": True}, "track_usage: expected False, since a read with tolerance without k"),
    ):
        with pytest.raises(ArgumentError, match=message):
            MemoryLayer(8, 20, tolerance=0.1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [True, False])
def test_usage_of_a_memory_layer_sums_or_concatenates_the_heads(shared: bool) -> None:
    layer = MemoryLayer(8, 20, heads=2, shared=shared, mode="topk", k=3)
    with pytest.raises(NotApplicableError, match=r"track_usage: expected True .* call layer\.track_usage_\(\)"):
        _ = layer.usage
    assert layer.track_usage_() is layer
    _, read = layer(torch.randn(5, 8), return_read=True)
    counts = torch.stack([read.ids[:, head].flatten().bincount(minlength=20) for head in range(2)])
    usage = layer.usage
    assert torch.equal(usage.reads, counts.sum(0) if shared else counts.flatten())
    assert float(usage.weight.sum()) == pytest.approx(10.0)
    layer.track_usage_()  # The counters continue.
    assert torch.equal(layer.usage.reads, usage.reads)
    resumed = MemoryLayer(8, 20, heads=2, shared=shared, mode="topk", k=3, track_usage=True)
    resumed.load_state_dict(layer.state_dict())
    assert torch.equal(resumed.usage.reads, usage.reads)
    layer.track_usage_(False)
    assert not any(name.endswith((".reads", ".weight")) for name in layer.state_dict() if ".rows." in name)
    with pytest.raises(NotApplicableError):
        _ = layer.usage
    with pytest.raises(ArgumentError, match="enabled: expected False, since an exact softmax read without k"):
        MemoryLayer(8, 20).track_usage_()


def test_product_key_memory_starts_and_stops_counting() -> None:
    layer = ProductKeyMemory(12, 100, heads=2, k=5, key_dim=8)
    x = torch.randn(3, 12)
    layer(x)
    assert layer.track_usage_() is layer
    _, read = layer(x, return_read=True)
    assert torch.equal(layer.usage.reads, read.ids.flatten().bincount(minlength=100))
    plain = layer.state_dict().keys()
    assert {"store.reads", "store.total"} <= plain
    assert torch.equal(copy.deepcopy(layer).usage.reads, layer.usage.reads)
    layer.track_usage_(False)
    assert layer.state_dict().keys() == plain - {"store.reads", "store.total"}
    layer(x)
    with pytest.raises(NotApplicableError, match=r"call layer\.track_usage_\(\)"):
        _ = layer.usage
    layer.track_usage_()
    assert int(layer.usage.reads.sum()) == 0


@pytest.mark.cpu_only
@pytest.mark.slow
@ignore_compile_warnings
def test_compiled_layers_follow_temperature_and_tracking() -> None:
    for make in (
        lambda: MemoryLayer(8, 20, key_dim=4, mode="topk", k=3, temperature="learnable"),
        lambda: ProductKeyMemory(8, 49, k=3, key_dim=4, temperature="learnable"),
    ):
        torch._dynamo.reset()
        layer = make()
        compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(5, 8)
        for _ in range(2):
            with torch.no_grad():
                layer.log_temperature.fill_(-1.0)
            y, wanted = compiled(x), layer(x)
            assert_close(y, wanted)
            for got, want in zip(
                compute_gradients(y, list(layer.parameters()), torch.ones_like(y)),
                compute_gradients(wanted, list(layer.parameters()), torch.ones_like(y)),
                strict=True,
            ):
                assert_close(got, want)
            layer.track_usage_()
            before = int(layer.usage.reads.sum())
            compiled(x)
            assert int(layer.usage.reads.sum()) == before + 5 * 4 * 3
