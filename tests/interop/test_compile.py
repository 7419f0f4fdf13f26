"""Reads in graphs of torch.compile equal eager reads."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.programs import check_exit
from torch import Tensor, nn

from softdb import ArgumentError, GrowthError, Read, SoftKVStore, UnknownIdError
from softdb.interop import compile as compile_module

# Importing inductor makes torch warn of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
inductor = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    if compile_module._pending_reads:
        gc.collect()
    assert compile_module._pending_reads == {}, "an eager graph outlives what could go backward through it"


def make_store(rows: int = 30, **options: Any) -> SoftKVStore:
    store = SoftKVStore(8, 3, **({"trainable": True} | options))
    store.reserve(64)
    store.add(torch.randn(rows, 8), torch.randn(rows, 3))
    return store


class Model(nn.Module):
    def __init__(self, store: SoftKVStore) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8)
        self.store = store

    def forward(self, x: Tensor, **how: Any) -> Read:
        return self.store.read(self.encoder(x).tanh(), **how)


class Counter:
    """Backend that counts the graphs it compiles."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = 0
        self.backend = backend

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def members(read: Read) -> dict[str, Tensor | None]:
    return {name: getattr(read, name) for name in ("values", "ids", "weights", "scores", "lse", "mass")}


def loss_of(read: Read) -> Tensor:
    total = torch.zeros(())
    for member in members(read).values():
        if member is not None and member.requires_grad:
            total = total + (member * torch.arange(member.numel()).view_as(member).sin()).sum()
    return total


def check_parity(store: SoftKVStore, backend: str, how: dict[str, Any], x: Tensor) -> None:
    model = Model(store)
    inputs = [x.requires_grad_(), *model.parameters()]
    if isinstance(how.get("temperature"), Tensor):
        inputs.append(how["temperature"].requires_grad_())
    if isinstance(how.get("bias"), Tensor):
        inputs.append(how["bias"].requires_grad_())
    found = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        read = run(x, **how)
        gradients = torch.autograd.grad(loss_of(read), inputs, allow_unused=True)
        found.append((read, gradients))
    (wanted, wanted_gradients), (ours, our_gradients) = found
    assert ours.normalizer == wanted.normalizer
    for name, member in members(wanted).items():
        got = members(ours)[name]
        if member is None:
            assert got is None, name
            continue
        assert (got.dtype, got.shape, got.requires_grad) == (member.dtype, member.shape, member.requires_grad), name
        torch.testing.assert_close(got, member, equal_nan=True)
    for got, gradient in zip(our_gradients, wanted_gradients, strict=True):
        assert (got is None) == (gradient is None)
        if gradient is not None:
            assert got.layout == gradient.layout
            torch.testing.assert_close(got.to_dense(), gradient.to_dense(), rtol=1e-4, atol=1e-6)


HOW = {
    "exact": {},
    "exact, best": {"k": 2},
    "exact, hard forward": {"k": 3, "normalizer": "straight_through"},
    "topk": {"mode": "topk", "k": 4},
    "topk, hard forward": {"mode": "topk", "k": 4, "normalizer": "straight_through"},
    "exact, sparse": {"k": 3, "normalizer": "sparsemax"},
    "more than rows": {"mode": "topk", "k": 40},
    "hard": {"mode": "hard"},
    "temperature": {"temperature": torch.tensor([0.5, 1.0, 2.0, 0.7])},
    "number": {"mode": "topk", "k": 4, "temperature": 0.3},
    "exclude": {"mode": "topk", "k": 4, "exclude": torch.arange(8).view(4, 2)},
    "mask": {"k": 2, "where": torch.arange(30) % 3 == 0},
    "ids": {"mode": "topk", "k": 4, "where": torch.arange(5, 15)},
    "bias": {"k": 2, "bias": torch.linspace(-2, 3, 30).sin()},
    "bias by query": {"mode": "topk", "k": 4, "bias": torch.linspace(-20, 30, 120).view(4, 30).cos()},
    "bias that hides": {"mode": "hard", "bias": torch.where(torch.arange(30) % 3 == 0, -torch.inf, 0.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_compiled_reads_equal_eager_reads(how: dict[str, Any]) -> None:
    check_parity(make_store(), "aot_eager", dict(how), torch.randn(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", inductor])
def test_other_backends(backend: str) -> None:
    how = HOW["topk"] | HOW["temperature"]
    check_parity(make_store(), backend, how, torch.randn(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 3, 8)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check_parity(make_store(metric="cosine"), "aot_eager", {"mode": "topk", "k": 2}, torch.randn(shape))


def test_nothing_to_read() -> None:
    check_parity(make_store(rows=0, trainable=False), "aot_eager", {"k": 2}, torch.randn(4, 8))


def test_dense_gradients_where_the_store_gives_them() -> None:
    check_parity(make_store(sparse_grad=False), "aot_eager", {"mode": "topk", "k": 4}, torch.randn(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", inductor])
def test_several_reads_in_one_graph(backend: str) -> None:
    store = make_store()
    back = nn.Linear(3, 8)

    def hops(x: Tensor) -> Tensor:
        for how in ({"mode": "topk", "k": 4}, {"mode": "topk", "k": 4}, {"mode": "hard"}, {"k": 2}):
            x = back(store(x, **how)).tanh()
        return x

    x = torch.randn(4, 8)
    found = []
    for run in (hops, torch.compile(hops, backend=backend, fullgraph=True)):
        found.append(torch.autograd.grad(run(x).square().sum(), (store.keys, store.values)))
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.to_dense(), wanted.to_dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"mode": "topk", "k": 4}, {"mode": "hard"}], ids=["exact", "topk", "hard"])
def test_training_compiles_once(how: dict[str, Any]) -> None:
    torch.manual_seed(1)
    store = make_store(index="IVF4,Flat" if how.get("k") else "auto")
    x, wanted = torch.randn(16, 8), torch.randn(16, 3)
    found = []
    for counter in (None, Counter()):
        model = Model(copy.deepcopy(store))
        with torch.no_grad():
            model.encoder.weight.copy_(torch.eye(8))
            model.encoder.bias.zero_()
        run = model if counter is None else torch.compile(model, backend=counter, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(30):
            optimizer.zero_grad()
            loss = (run(x, **how).values - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 10 == 5:
                generator = torch.Generator().manual_seed(step)
                model.store.add(torch.randn(2, 8, generator=generator), torch.randn(2, 3, generator=generator))
                model.store.update([step], values=torch.ones(1, 3))
                model.store.delete([step + 1])
        found.append((losses, model.store.keys.detach(), model.store.values.detach()))
        assert counter is None or counter.graphs == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[1][0][4] < found[1][0][0]


def test_one_graph_for_many_stores() -> None:
    counter = Counter("eager")
    for _ in range(12):
        model, x = Model(make_store()), torch.randn(4, 8)
        assert torch.equal(torch.compile(model, backend=counter, fullgraph=True)(x).values, model(x).values)
    assert counter.graphs == 1


def test_sizes_and_numbers_that_change() -> None:
    store, counter = make_store(), Counter()
    run = torch.compile(
        lambda x, k, t: store.read(x * 2, "topk", k=k, temperature=t), backend=counter, fullgraph=True, dynamic=True
    )
    for size in range(2, 8):
        x = torch.randn(size, 8)
        ours, wanted = run(x, size, 0.1 * size), store.read(x * 2, "topk", k=size, temperature=0.1 * size)
        assert torch.equal(ours.values, wanted.values)
        assert torch.equal(ours.ids, wanted.ids)
    assert counter.graphs <= 2


def test_writes_between_calls_are_seen() -> None:
    store = make_store(trainable=False)
    counter = Counter("eager")
    run = torch.compile(lambda x: store.read(x, "topk", k=1), backend=counter, fullgraph=True)
    x = 10 * torch.eye(8)[:1]
    run(x)
    (new,) = store.add(100 * x, torch.tensor([[1.0, 2.0, 3.0]])).tolist()
    assert run(x).ids.item() == new
    store.update([new], values=torch.tensor([[4.0, 5.0, 6.0]]))
    assert run(x).values.tolist() == [[4.0, 5.0, 6.0]]
    store.delete([new])
    assert run(x).ids.item() != new
    assert counter.graphs == 1


def test_copies_are_stores_of_their_own() -> None:
    store = make_store()
    run = torch.compile(lambda store, x: store(x), backend="eager", fullgraph=True)
    x = torch.randn(4, 8)
    for copied in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        copied.update([0], values=torch.full((1, 3), 9.0))
        assert torch.equal(run(copied, x), copied(x))
        assert torch.equal(run(store, x), store(x))
        assert not torch.equal(run(store, x), run(copied, x))


def test_autocast() -> None:
    store = make_store()

    def reads(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = store(x), store(x.double()), store(x.bfloat16())
        return *narrow, store(x)

    x = torch.randn(4, 8)
    for ours, wanted in zip(torch.compile(reads, backend="aot_eager", fullgraph=True)(x), reads(x), strict=True):
        assert ours.dtype == wanted.dtype
        assert torch.equal(ours, wanted)


def test_no_graph_is_kept_without_gradients() -> None:
    store = make_store()
    run = torch.compile(lambda x: store(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 8)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            answer = run(x)
            assert torch.equal(answer, store(x))
            assert not answer.requires_grad
            assert compile_module._pending_reads == {}


def test_the_graph_is_freed_with_the_result() -> None:
    store = make_store()
    run = torch.compile(lambda x: store(x), backend="aot_eager", fullgraph=True)
    answer = run(torch.randn(4, 8))
    for _ in range(3):
        answer = run(torch.randn(4, 8))
    assert len(compile_module._pending_reads) == 1
    with pytest.raises(GrowthError, match="backward of a read is still due"):
        store.reserve(200)
    answer.sum().backward()
    store.reserve(200)


def test_backward_twice() -> None:
    store = make_store()
    run = torch.compile(lambda x: store(x, mode="topk", k=3).sum(), backend="aot_eager", fullgraph=True)
    with torch._functorch.config.patch(donated_buffer=False):  # torch's own condition
        answer = run(torch.randn(4, 8))
        answer.backward(retain_graph=True)
        once = store.keys.grad.to_dense().clone()
        answer.backward()
    torch.testing.assert_close(store.keys.grad.to_dense(), 2 * once)


def test_the_graph_may_write_to_its_own_tensors() -> None:
    store = make_store()

    def altered(x: Tensor, weight: Tensor) -> Tensor:
        query = x * weight
        read = store.read(query, k=3)
        query.add_(1.0)
        read.values.mul_(2.0)
        read.weights.zero_()
        return read.values.sum() + query.sum()

    def wanted(x: Tensor, weight: Tensor) -> Tensor:
        return 2 * store(x * weight).sum() + (x * weight + 1.0).sum()

    x, weight = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    inputs = (weight, store.keys, store.values)
    ours = torch.autograd.grad(torch.compile(altered, backend="aot_eager", fullgraph=True)(x, weight), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted(x, weight), inputs))


@pytest.mark.slow
def test_errors_are_those_of_the_read() -> None:
    store, x = make_store(), torch.randn(4, 8)

    def run(**how: Any) -> Read:
        return torch.compile(lambda x: store.read(x, **how), backend="aot_eager", fullgraph=True)(x)

    with pytest.raises(ArgumentError, match="k: expected the number of candidates"):
        run(mode="topk")
    with pytest.raises(ArgumentError, match="mode: expected one of"):
        run(mode="soft")
    with pytest.raises(ArgumentError, match="temperature: expected a finite number above 0"):
        run(temperature=-1.0)
    # The interpreter of graphs in torch 2.6 turns a KeyError into a RuntimeError.
    with pytest.raises((UnknownIdError, RuntimeError), match="where: expected ids of rows in the store"):
        run(where=torch.tensor([99]))
    with pytest.raises(ArgumentError, match="normalizer: expected one of"):
        run(normalizer="relu")


# What Dynamo does with a tensor that crosses a graph break.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_callable_where() -> None:
    store, x = make_store(), torch.randn(4, 8)

    def read(x: Tensor) -> Tensor:
        return store(x * 2, where=lambda row: row["id"] < 9) + 1

    # torch 2.6 and 2.7 name only the function that breaks the graph.
    message = r"where: expected a bool mask or int64 ids.*pass a mask or ids|function `?<function _read_eagerly"
    with pytest.raises(Exception, match=message):
        torch.compile(read, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(read, backend="aot_eager")(x), read(x))  # outside of the graph


def test_tensors_computed_in_the_graph_are_refused() -> None:
    store, x = make_store(trainable=False), torch.randn(4, 8)

    def write(x: Tensor) -> Tensor:
        store.keys.mul_(0.9)
        return store(x)

    with pytest.raises(ArgumentError, match="keys: expected the store's own tensor"):
        torch.compile(write, backend="aot_eager", fullgraph=True)(x)


def test_a_graph_of_a_deleted_store_raises() -> None:
    store = make_store()
    handle, keys, values, number = store._handle, store.keys.detach(), store.values.detach(), None
    del store
    gc.collect()
    with pytest.raises(ArgumentError, match="expected the store that the compiled or exported graph reads"):
        torch.ops.softdb.read(
            torch.randn(4, 8), keys, values, None, None, None, None, handle, "exact", None, number, "softmax",
            torch.float32, [False] * 5, False,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["exact", "topk", "hard"])
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(mode: str, wanted: bool) -> None:
    store = make_store(rows=1, sparse_grad=False)  # else mass may be NaN, which equals nothing
    bias = torch.randn(1, requires_grad=wanted)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not wanted:  # else every call has a ticket of its own, and results are compared
        checks.append("test_aot_dispatch_dynamic")
        store.requires_grad_(False)
    torch.library.opcheck(
        torch.ops.softdb.read.default,
        (
            torch.randn(4, 8), store.keys, store.values, None, bias, None, None, store._handle, mode,
            3 if mode == "topk" else None, None, "softmax", torch.float32, [False, wanted, wanted, False, wanted],
            False,
        ),
        test_utils=checks,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has the tag from 2.9 on")
@pytest.mark.parametrize("name", ["read", "read_backward", "count", "blend", "blend_backward"])
def test_cuda_graphs_of_the_compiler_leave_the_operators_out(name: str) -> None:
    tags = getattr(torch.ops.softdb, name).default.tags
    assert {torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag} <= set(tags)


@pytest.mark.slow
def test_importing_softdb_does_not_import_the_compiler() -> None:
    program = "import sys, softdb; sys.exit('torch._dynamo' in sys.modules)"
    check_exit(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False))
