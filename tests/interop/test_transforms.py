"""Reads under torch.func, forward-mode differentiation and torch.export; usage counts of compiled reads."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contract import rotate
from support.programs import check_exit
from support.versions import TORCH_RELEASE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

from softdb import (
    ArgumentError,
    DuplicateIdError,
    NonFiniteError,
    Read,
    SecondDerivativeError,
    ShapeError,
    SoftKVStore,
    StaleReadError,
    TransformError,
)
from softdb.functional import merge, soft_read, topk_read
from softdb.interop import compile as compile_module
from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory
from softdb.scoring.normalizers import NORMALIZERS, is_random

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script.*is deprecated:DeprecationWarning"),
    # torch.export emits these warnings about its own code.
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|isinstance.treespec).*:FutureWarning"),
]

exports = pytest.mark.skipif(
    TORCH_RELEASE < (2, 8), reason="torch.export emits other warnings and requires bounds before torch 2.8"
)
SAMPLES, QUERIES, ROWS, KEY_DIM, VALUE_DIM = 5, 3, 7, 4, 2


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense_read(
    query: Tensor, keys: Tensor, values: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    divisor = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    scores = query @ keys.mT / query.shape[-1] ** 0.5 / divisor
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1) @ values


def exact(
    query: Tensor, keys: Tensor, values: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    return soft_read(query, keys, values, temperature=temperature, mask=mask).values


def best(query: Tensor, keys: Tensor, values: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    candidates = torch.arange(keys.shape[-2]).expand(query.shape[-2], -1)
    return topk_read(query, keys, values, candidates, temperature=temperature).values


def loss_of(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: read(*tensors).sin().sum()


QUERY, KEYS, VALUES = numbers(SAMPLES, QUERIES, KEY_DIM), numbers(ROWS, KEY_DIM), numbers(ROWS, VALUE_DIM)
OWN_KEYS, OWN_VALUES = numbers(SAMPLES, ROWS, KEY_DIM), numbers(SAMPLES, ROWS, VALUE_DIM)
TEMPERATURE = torch.rand(SAMPLES, QUERIES, dtype=torch.float64) + 0.5
MASK = torch.rand(SAMPLES, QUERIES, ROWS).argsort(-1) < 4

Use = Callable[[Callable[..., Tensor]], Any]
USES: dict[str, Use] = {
    "vmap of queries": lambda read: vmap(read, (0, None, None))(QUERY, KEYS, VALUES),
    "vmap of another dimension": lambda read: vmap(read, (2, None, None))(QUERY.permute(1, 2, 0), KEYS, VALUES),
    "vmap of keys": lambda read: vmap(read, (None, 0, None))(QUERY[0], OWN_KEYS, VALUES),
    "vmap of all": lambda read: vmap(read)(QUERY, OWN_KEYS, OWN_VALUES),
    "vmap of temperatures": lambda read: vmap(read, (None, None, None, 0))(QUERY[0], KEYS, VALUES, TEMPERATURE),
    "vmap of a scalar": lambda read: vmap(read, (0, None, None, 0))(QUERY, KEYS, VALUES, TEMPERATURE[:, 0]),
    "grad": lambda read: grad(loss_of(read), (0, 1, 2))(QUERY, KEYS, VALUES),
    "vjp": lambda read: vjp(read, QUERY, KEYS, VALUES)[1](torch.ones(SAMPLES, QUERIES, VALUE_DIM).double()),
    "jacrev": lambda read: jacrev(read, (0, 1))(QUERY[0], KEYS, VALUES),
    "vmap of grad": lambda read: vmap(grad(loss_of(read)), (0, None, None))(QUERY, KEYS, VALUES),
    "vmap of grad of what samples share": lambda read: vmap(grad(loss_of(read), (0, 1, 2, 3)), (0, None, None, None))(
        QUERY, KEYS, VALUES, torch.tensor(0.7, dtype=torch.float64)
    ),
    "vmap of grad of some": lambda read: vmap(grad(loss_of(read), (0, 1, 2, 3)), (0, 0, None, 0))(
        QUERY, OWN_KEYS, VALUES, TEMPERATURE
    ),
    "grad of vmap": lambda read: grad(loss_of(vmap(read, (0, None, None))), (0, 1))(QUERY, KEYS, VALUES),
    "vmap of jacrev": lambda read: vmap(jacrev(read, (0, 1)), (0, None, None))(QUERY, KEYS, VALUES),
    "jacrev of vmap": lambda read: jacrev(vmap(read, (0, None, None)))(QUERY, KEYS, VALUES),
    "vmap of vmap": lambda read: vmap(vmap(read, (0, None, None)), (None, 0, 0))(QUERY, OWN_KEYS, OWN_VALUES),
    "vmap of vmap of grad": lambda read: vmap(
        vmap(grad(loss_of(read), (0, 1)), (0, None, None)), (None, 0, None)
    )(QUERY, OWN_KEYS, VALUES),
    "two reads": lambda read: vmap(
        grad(lambda query: read(read(query.sin(), KEYS, VALUES) @ KEYS[:2], KEYS, VALUES).square().sum())
    )(QUERY),
}  # fmt: skip
TWICE: dict[str, Use] = {
    "grad of grad": lambda read: grad(lambda query: grad(loss_of(read))(query, KEYS, VALUES).sum())(QUERY[0]),
    "grad of grad of keys": lambda read: grad(
        lambda keys: grad(lambda keys: read(QUERY[0], keys, VALUES).sum())(keys).sin().sum()
    )(KEYS),
    "jacrev of jacrev": lambda read: jacrev(jacrev(read))(QUERY[0], KEYS, VALUES),
    "grad of vmap of grad": lambda read: grad(
        lambda query: vmap(grad(loss_of(read)), (0, None, None))(query, KEYS, VALUES).sin().sum()
    )(QUERY),
}
FORWARD: dict[str, Use] = {
    "jvp": lambda read: jvp(lambda query: read(query, KEYS, VALUES), (QUERY[0],), (QUERY[1],)),
    "jvp of keys": lambda read: jvp(lambda keys: read(QUERY[0], keys, VALUES), (KEYS,), (OWN_KEYS[0],)),
    "jacfwd": lambda read: jacfwd(read)(QUERY[0], KEYS, VALUES),
    "hessian": lambda read: hessian(loss_of(read))(QUERY[0], KEYS, VALUES),
    "vmap of jvp": lambda read: vmap(lambda query: jvp(lambda x: read(x, KEYS, VALUES), (query,), (query,)))(QUERY),
    "jvp of vmap": lambda read: jvp(lambda x: vmap(read, (0, None, None))(x, KEYS, VALUES), (QUERY,), (QUERY,)),
    "vmap of hessian": lambda read: vmap(hessian(loss_of(read)), (0, None, None))(QUERY, KEYS, VALUES),
}


def check_equal(found: Any, wanted: Any, **tolerance: float) -> None:
    for ours, theirs in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("read", [exact, best])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_transformed_reads_equal_transformed_attention(use: Use, read: Callable[..., Tensor]) -> None:
    check_equal(use(read), use(dense_read))


def test_vmap_of_masks() -> None:
    found = vmap(exact, (None, None, None, None, 0))(QUERY[0], KEYS, VALUES, 1.0, MASK)
    check_equal(found, vmap(dense_read, (None, None, None, None, 0))(QUERY[0], KEYS, VALUES, 1.0, MASK))


@pytest.mark.parametrize("use", TWICE.values(), ids=TWICE)
def test_second_derivatives(use: Use) -> None:
    check_equal(use(best), use(dense_read))
    with pytest.raises(SecondDerivativeError, match="topk_read"):
        use(exact)


@pytest.mark.parametrize("use", FORWARD.values(), ids=FORWARD)
def test_forward_mode(use: Use) -> None:
    check_equal(use(best), use(dense_read))
    with pytest.raises(TransformError, match="expected no forward-mode tangent"):
        use(exact)


def test_forward_mode_without_transforms() -> None:
    store = make_store(dtype=torch.float64)
    with forward_ad.dual_level():
        query, keys = forward_ad.make_dual(QUERY[0], QUERY[1]), forward_ad.make_dual(KEYS, OWN_KEYS[0])
        for read in (
            lambda: exact(query, KEYS, VALUES),
            lambda: exact(QUERY[0], keys, VALUES),
            lambda: store(query),
            lambda: store(query, mode="topk", k=3),
            lambda: store(QUERY[0], bias=query.sum()),
            lambda: exact(QUERY[0], KEYS, VALUES, mask=query.sum()),
        ):
            with pytest.raises(TransformError, match="bias, mask: expected no forward-mode tangent"):
                read()
        assert torch.equal(store(QUERY[0]), store(QUERY[0]))
        tangent = forward_ad.unpack_dual(best(query, KEYS, VALUES)).tangent
        wanted = forward_ad.unpack_dual(dense_read(query, KEYS, VALUES)).tangent
        torch.testing.assert_close(tangent, wanted)
    with pytest.raises(TransformError, match="forward-mode tangent"):
        linearize(store, QUERY[0])


def members(read: Read) -> Tensor:
    total = read.values.sin().sum() + read.lse.sum() + read.mass.nansum()
    if read.weights is not None and read.scores is not None:
        total = total + read.weights.square().sum() + read.scores.cos().sum()
    return total


@pytest.mark.parametrize("normalizer", [name for name in NORMALIZERS if not is_random(name)])
@pytest.mark.parametrize("kind", ["exact", "topk"])
def test_every_member_and_normalizer(kind: str, normalizer: str) -> None:
    def read(query: Tensor, keys: Tensor) -> Read:
        if kind == "exact":
            return soft_read(query, keys, VALUES, k=3, normalizer=normalizer)
        candidates = torch.tensor([[0, 3, 2, -1], [6, 5, 4, 1], [-1, -1, -1, -1]])
        return topk_read(query, keys, VALUES, candidates, normalizer=normalizer)

    def loss(query: Tensor, keys: Tensor) -> Tensor:
        found = read(query, keys)
        return found.values.sin().sum() + found.weights.square().sum() + found.lse[:2].sum()

    found = vmap(grad(loss, (0, 1)), (0, None))(QUERY, KEYS)
    for sample, query in enumerate(QUERY):
        inputs = query.clone().requires_grad_(), KEYS.clone().requires_grad_()
        check_equal([part[sample] for part in found], torch.autograd.grad(loss(*inputs), inputs))
    reads = vmap(lambda query: tuple(vars(read(query, KEYS)).values())[:6], out_dims=0)(QUERY)
    for sample, query in enumerate(QUERY):
        for ours, wanted in zip(reads, list(vars(read(query, KEYS)).values())[:6], strict=True):
            torch.testing.assert_close(ours[sample], wanted, equal_nan=True)


def test_merged_reads() -> None:
    def halves(query: Tensor) -> Tensor:
        return merge([soft_read(query, KEYS[:3], VALUES[:3], k=2), soft_read(query, KEYS[3:], VALUES[3:], k=2)]).values

    check_equal(vmap(jacrev(halves))(QUERY), vmap(jacrev(dense_read), (0, None, None))(QUERY, KEYS, VALUES))


@pytest.mark.parametrize("read", [soft_read, best])
def test_noise_follows_the_randomness_of_vmap(read: Any) -> None:
    def draw(query: Tensor) -> Tensor:
        if read is soft_read:
            return soft_read(query, KEYS, VALUES, normalizer="gumbel").values
        candidates = torch.arange(ROWS).expand(len(query), -1)
        return topk_read(query, KEYS, VALUES, candidates, normalizer="gumbel").values

    query = 0.1 * numbers(20, KEY_DIM)
    for function, batch in ((draw, query.expand(4, -1, -1)), (lambda x: draw(query) + 0 * x, torch.zeros(4, 1, 1))):
        with pytest.raises(TransformError, match="randomness: expected 'same' or 'different'"):
            vmap(function)(batch)
        same = vmap(function, randomness="same")(batch)
        assert torch.equal(same, same[:1].expand_as(same))
        different = vmap(function, randomness="different")(batch)
        assert not torch.equal(different[0], different[1])


def test_errors_are_those_of_the_read() -> None:
    bad = QUERY.clone()
    bad[2, 1, 0] = torch.nan
    for read in (exact, best):
        with pytest.raises(NonFiniteError, match="query: expected finite"):
            vmap(read, (0, None, None))(bad, KEYS, VALUES)
        with pytest.raises(ShapeError, match="keys: expected shape"):
            vmap(read, (0, None, None))(QUERY, KEYS[:, 1:], VALUES)
        with pytest.raises(ArgumentError, match="temperature: expected finite numbers above 0"):
            vmap(read, (0, None, None, 0))(QUERY, KEYS, VALUES, torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0]))
    twice = torch.tensor([[0, 1], [2, 2], [1, 0]])
    with pytest.raises(DuplicateIdError, match="each row at most once"):
        vmap(lambda query: topk_read(query, KEYS, VALUES, twice).values)(QUERY)
    with pytest.raises(DuplicateIdError, match="each row at most once"):
        vmap(lambda rows: topk_read(QUERY[0], KEYS, VALUES, rows).values)(twice.expand(2, -1, -1))
    with pytest.raises(TransformError, match="functionalize"):
        torch.func.functionalize(lambda query: exact(query, KEYS, VALUES))(QUERY)


# -- stores ----------------------------------------------------------------------------------------------


def make_store(index: str = "Flat", rows: int = 40, **options: Any) -> SoftKVStore:
    store = SoftKVStore(KEY_DIM, VALUE_DIM, index=index, fields=("kind",), **({"trainable": True} | options))
    store.reserve(64)
    dtype = store.keys.dtype
    store.add(
        torch.randn(rows, KEY_DIM, dtype=dtype), torch.randn(rows, VALUE_DIM, dtype=dtype),
        fields={"kind": torch.arange(rows)},
    )  # fmt: skip
    return store


def check_usable(store: SoftKVStore, folder: Path) -> None:
    """Check that a store reads, copies, saves and grows."""
    store.read(torch.randn(2, KEY_DIM), "topk", k=3)
    store.read(torch.randn(2, KEY_DIM))
    copied = copy.deepcopy(store)
    torch.save(store, io.BytesIO())
    store.save(folder / "store")
    assert len(SoftKVStore.load(folder / "store")) == len(copied) == len(store)
    store.add(torch.randn(1, KEY_DIM), torch.randn(1, VALUE_DIM), fields={"kind": 0})
    store.reserve(2 * store.rows.capacity)
    store._check()


HOW: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, best": {"k": 3},
    "exact, sparse": {"k": 2, "normalizer": "sparsemax"},
    "topk": {"mode": "topk", "k": 5},
    "topk, sparse": {"mode": "topk", "k": 5, "normalizer": "entmax15"},
    "hard": {"mode": "hard"},
    "ids": {"mode": "topk", "k": 3, "where": torch.arange(30)},
    "callable": {"where": lambda row: row["kind"] < 20},
    "exclude": {"exclude": torch.arange(2 * QUERIES).view(QUERIES, 2)},
    "temperature": {"mode": "topk", "k": 4, "temperature": torch.tensor([0.5, 1.0, 2.0])},
}


@pytest.mark.slow
@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_store_reads(how: dict[str, Any], index: str, tmp_path: Path) -> None:
    store, queries = make_store(index), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    if index != "Flat":
        store.build_index()
        store.add(torch.randn(3, KEY_DIM), torch.randn(3, VALUE_DIM), fields={"kind": 1})  # pending rows

    def loss(query: Tensor) -> Tensor:
        return members(store.read(query, **how))

    def gradient(query: Tensor) -> Tensor:
        query = query.clone().requires_grad_()
        return torch.autograd.grad(loss(query), query)[0]

    wanted = torch.stack([gradient(query) for query in queries])
    check_equal(vmap(grad(loss))(queries), wanted)
    check_equal(grad(lambda queries: vmap(loss)(queries).sum())(queries), wanted)
    check_equal(vmap(lambda query: store(query, **how))(queries), torch.stack([store(q, **how) for q in queries]))
    check_equal(
        jacrev(lambda query: store(query, **how))(queries[0]),
        torch.autograd.functional.jacobian(lambda query: store(query, **how), queries[0]),
    )
    check_usable(store, tmp_path)
    for failing in (jacfwd(loss), hessian(loss)):
        with pytest.raises(TransformError, match="forward-mode"):
            failing(queries[0])
    check_usable(store, tmp_path)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_gradients_for_each_sample(how: dict[str, Any], tmp_path: Path) -> None:
    store, queries = make_store(), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    parameters = {name: parameter.detach() for name, parameter in store.named_parameters()}

    def loss(parameters: dict[str, Tensor], query: Tensor) -> Tensor:
        return functional_call(store, parameters, (query,), how).sin().sum()

    found = vmap(grad(loss), (None, 0))(parameters, queries)
    for sample, query in enumerate(queries):
        store.zero_grad()
        store(query, **how).sin().sum().backward()
        for name, parameter in store.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            torch.testing.assert_close(found[name][sample], wanted, rtol=1e-4, atol=1e-6)
    check_usable(store, tmp_path)


def test_samples_with_separate_tables(tmp_path: Path) -> None:
    store, queries = make_store(), torch.randn(2, QUERIES, KEY_DIM)
    tables = torch.stack([store.keys.detach(), -store.keys.detach()])

    def read(keys: Tensor, query: Tensor) -> Tensor:
        return functional_call(store, {"keys": keys}, (query,), {"mode": "topk", "k": 4})

    found = vmap(read)(tables, queries)
    torch.testing.assert_close(found[0], store(queries[0], mode="topk", k=4))
    torch.testing.assert_close(found[1], store(-queries[1], mode="topk", k=4))
    gradients = vmap(grad(lambda keys, query: read(keys, query).sum()))(tables, queries)
    assert gradients.shape == tables.shape
    check_usable(store, tmp_path)


@pytest.mark.parametrize("how", [{}, {"mode": "topk", "k": 3}, {"mode": "hard"}], ids=["exact", "topk", "hard"])
def test_vmap_within_ordinary_training(how: dict[str, Any]) -> None:
    store, queries = make_store(), torch.randn(SAMPLES, QUERIES, KEY_DIM, requires_grad=True)
    inputs = (queries, store.values)
    wanted = torch.autograd.grad(store(queries, **how).sin().sum(), inputs)
    answer = vmap(lambda query: store(query, **how))(queries).sin().sum()
    for ours, gradient in zip(torch.autograd.grad(answer, inputs), wanted, strict=True):
        assert ours.layout == gradient.layout
        torch.testing.assert_close(ours.to_dense(), gradient.to_dense())
    answer = vmap(lambda query: store(query, **how))(queries).sin().sum()
    answer.backward()
    store.reserve(200)  # nothing waits, though `answer` is alive
    answer = vmap(lambda query: store(query, **how))(queries).sin().sum()
    store.update(store.ids, values=torch.ones(len(store), VALUE_DIM))
    with pytest.raises(StaleReadError, match="the rows that this read used to be unchanged"):
        answer.backward()
    answer = vmap(lambda query: store(query, **how))(queries).sin().sum()
    (gradient,) = torch.autograd.grad(answer, queries, create_graph=True)
    if how.get("mode") != "hard":
        with pytest.raises(SecondDerivativeError):
            gradient.sum().backward()


def test_a_sampled_tail_follows_the_randomness_of_vmap() -> None:
    store, query = make_store(), torch.randn(QUERIES, KEY_DIM).expand(SAMPLES, -1, -1)

    def read(query: Tensor) -> Tensor:
        return store(query, mode="topk", k=3, tail_samples=8)

    with pytest.raises(TransformError, match="randomness"):
        vmap(read)(query)
    same = vmap(read, randomness="same")(query)
    torch.testing.assert_close(same, same[:1].expand_as(same))
    different = vmap(read, randomness="different")(query)
    assert not torch.allclose(different[0], different[1])


def test_a_callable_where_with_wrapped_tensors_is_refused(tmp_path: Path) -> None:
    store = make_store()
    with pytest.raises(TransformError, match="where: expected a callable that uses no tensors which a transform"):
        vmap(lambda query, kind: store(query, where=lambda row: row["kind"] == kind))(
            torch.randn(3, 2, 4), torch.arange(3)
        )
    check_usable(store, tmp_path)


def test_filters_for_each_sample() -> None:
    store, queries = make_store(), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    masks = torch.rand(SAMPLES, len(store)) < 0.5
    found = vmap(lambda query, mask: store(query, where=mask))(queries, masks)
    check_equal(found, torch.stack([store(query, where=mask) for query, mask in zip(queries, masks, strict=True)]))
    hidden = torch.arange(SAMPLES * QUERIES).view(SAMPLES, QUERIES, 1)
    found = vmap(lambda hidden: store(queries[0], exclude=hidden))(hidden)
    check_equal(found, torch.stack([store(queries[0], exclude=part) for part in hidden]))


@pytest.mark.parametrize("how", [{"k": 3}, {"mode": "topk", "k": 4}, {"mode": "hard"}], ids=["exact", "topk", "hard"])
@pytest.mark.parametrize("by_query", [False, True])
def test_a_bias_for_each_sample(by_query: bool, how: dict[str, Any]) -> None:
    store, queries = make_store(), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    biases = torch.randn(SAMPLES, *([QUERIES] if by_query else []), len(store))
    biases[..., ::4] = -torch.inf

    def loss(query: Tensor, bias: Tensor) -> Tensor:
        return members(store.read(query, bias=bias, **how))

    inputs = queries.clone().requires_grad_(), biases.clone().requires_grad_()
    wanted = torch.autograd.grad(sum(map(loss, *inputs)), inputs)
    check_equal(vmap(grad(loss, (0, 1)))(queries, biases), wanted)
    check_equal(grad(lambda *batch: vmap(loss)(*batch).sum(), (0, 1))(queries, biases), wanted)
    one = inputs[0][0].detach()
    found = vmap(grad(lambda bias: loss(one, bias)))(biases)  # the samples share their queries
    check_equal(found, torch.autograd.grad(sum(loss(one, bias) for bias in inputs[1]), inputs[1])[0])


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat"])
def test_plain_reads_within_a_transform(index: str, tmp_path: Path) -> None:
    store, query = make_store(index), torch.randn(QUERIES, KEY_DIM)
    for how in ({}, {"mode": "topk", "k": 3}):
        found = grad(lambda x, how=how: (x * store(query, **how)).sum())(torch.ones(()))  # type: ignore[misc]
        torch.testing.assert_close(found, store(query, **how).sum())
        del found  # its graph goes back to the rows
        check_usable(store, tmp_path)
    found = grad(lambda x: (x * exact(QUERY, KEYS, VALUES)).sum())(torch.ones(()).double())
    torch.testing.assert_close(found, exact(QUERY, KEYS, VALUES).sum())


def test_usage_is_counted_once_for_each_sample() -> None:
    store, queries = make_store(track_usage=True), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    store(queries, mode="topk", k=3)
    wanted = store.usage
    for read in (vmap(store.forward), vmap(grad(lambda query, **how: store(query, **how).sum()))):
        store.reset_usage()
        read(queries, mode="topk", k=3)
        check_equal(vars(store.usage), vars(wanted))


WRITES: dict[str, Callable[[SoftKVStore, Tensor], Any]] = {
    "add": lambda store, rows: store.add(rows, rows[:, :2], fields={"kind": 1}),
    "put": lambda store, rows: store.put([50, 51, 52], rows, rows[:, :2], fields={"kind": 1}),
    "update": lambda store, rows: store.update([0, 1, 2], keys=rows),
    "revive": lambda store, rows: store.revive([0, 1, 2], rows, rows[:, :2]),
    "delete": lambda store, rows: store.delete((rows[:, 0] * 0).long()[:1]),
    "touch": lambda store, rows: store.touch((rows[:, 0] * 0).long()),
    "get": lambda store, rows: store.get((rows[:, 0] * 0).long()),
    "audit": lambda store, rows: store.audit(rows, k=3),
    "fields": lambda store, rows: store.update([0, 1, 2], fields={"kind": rows[:, 0].long()}),
    "temperature": lambda store, rows: setattr(store, "temperature", rows.square().sum().detach()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_within_transforms(write: Callable[[SoftKVStore, Tensor], Any], tmp_path: Path) -> None:
    store, rows = make_store(), torch.randn(3, KEY_DIM)
    wanted, version = copy.deepcopy(store), store.rows.version
    with pytest.raises(TransformError, match="expected one value for all samples"):
        vmap(lambda rows: (write(store, rows), rows)[1])(rows.expand(2, -1, -1))
    assert store.rows.version == version
    assert torch.equal(store.keys, wanted.keys)
    write(wanted, rows)
    grad(lambda rows: (write(store, rows), rows.sum())[1])(rows)
    check_equal(store.state_dict(), wanted.state_dict())
    check_usable(store, tmp_path)


def test_upkeep_within_transforms(tmp_path: Path) -> None:
    stores: list[SoftKVStore] = []

    def use(query: Tensor) -> Tensor:
        store = make_store("IVF4,Flat", track_usage=True)
        stores.extend([store, copy.deepcopy(store)])
        for action in (
            store.build_index,
            store.refresh,
            store.reset_usage,
            lambda: store.reserve(90),
            lambda: store.ids,
        ):
            action()
        assert 3 in store
        with store.writing():
            store.delete([3])
        store.save(tmp_path / "within")
        stores.append(SoftKVStore.load(tmp_path / "within"))
        return store(query, mode="topk", k=3).sum()

    grad(use)(torch.randn(QUERIES, KEY_DIM))
    for store in stores:
        check_usable(store, tmp_path)


def test_tensors_of_a_functional_call_are_not_written_to() -> None:
    store, query = make_store(), torch.randn(QUERIES, KEY_DIM)

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store = store

        def forward(self, query: Tensor) -> Tensor:
            self.store.delete([0])
            return self.store(query)

    with pytest.raises(TransformError, match="the store's own tensors"):
        grad(lambda keys: functional_call(Writing(), {"store.keys": keys}, (query,)).sum())(store.keys.detach())
    store._check()
    with pytest.raises(TransformError, match="rows: expected the store's own buffers"):
        vmap(lambda ids: functional_call(store, {"rows.ids": ids}, (query,)))(store.rows.ids.expand(2, -1))


def test_vectorized_jacobians() -> None:
    read = lambda query: soft_read(query, numbers(40_000, KEY_DIM), numbers(40_000, VALUE_DIM)).values  # noqa: E731
    with pytest.raises(TransformError, match="is_grads_batched"):
        torch.autograd.functional.jacobian(read, QUERY[0], vectorize=True)
    layer, x = ProductKeyMemory(8, 36, heads=2, k=4, key_dim=6), torch.randn(3, 8)
    found = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(layer, x))


# -- layers ----------------------------------------------------------------------------------------------


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "exact": lambda: MemoryLayer(8, 20, heads=2, key_dim=4),
    "topk": lambda: MemoryLayer(8, 20, heads=2, key_dim=4, mode="topk", k=3, gate=True, track_usage=True),
    "hard": lambda: MemoryLayer(8, 20, heads=2, key_dim=4, mode="hard", shared=False),
    "sparse": lambda: MemoryLayer(8, 20, heads=2, key_dim=4, normalizer="entmax15", query_norm="layer"),
    "product keys": lambda: ProductKeyMemory(8, 36, heads=2, k=4, key_dim=6, track_usage=True),
    "product keys, narrow": lambda: ProductKeyMemory(8, 36, heads=2, k=4, key_dim=6, value_dim=5, query_norm=None),
}


def check_samples(layer: nn.Module, xs: Tensor, **options: Any) -> None:
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,), options).sin().sum()

    found = vmap(grad(loss), (None, 0))(parameters, xs)
    for sample, x in enumerate(xs):
        layer.zero_grad()
        layer(x, **options).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            torch.testing.assert_close(found[name][sample], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(make: Callable[[], nn.Module]) -> None:
    layer, xs = make(), torch.randn(SAMPLES, 3, 8)
    check_samples(layer, xs)
    check_equal(vmap(layer)(xs), layer(xs), rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.functional.jacobian(layer, xs[0])
    check_equal(vmap(jacrev(layer))(xs)[0], wanted, rtol=1e-4, atol=1e-5)
    if isinstance(layer, MemoryLayer):
        with pytest.raises(TransformError, match="forward-mode"):
            jacfwd(layer)(xs[0])
    else:
        check_equal(jacfwd(layer)(xs[0]), wanted, rtol=1e-4, atol=1e-5)
    copy.deepcopy(layer)
    torch.save(layer.state_dict(), io.BytesIO())


def test_product_keys_count_what_transforms_read() -> None:
    layer, xs = LAYERS["product keys"](), torch.randn(SAMPLES, 3, 8)
    layer(xs)
    wanted = layer.store.usage
    for read in (vmap(layer), grad(lambda xs: layer(xs).sum()), vmap(grad(lambda x: layer(x).sum()))):
        layer.store.reset_usage()
        read(xs)
        check_equal(vars(layer.store.usage), vars(wanted))


@pytest.mark.parametrize("k", [None, 3])
def test_context_memory(k: int | None) -> None:
    layer = ContextMemory(8, 16, heads=2, key_dim=4, k=k)
    xs = torch.randn(SAMPLES, 2, 6, 8)
    layer(xs[0])
    layer(xs[1])
    with pytest.raises(TransformError, match=r"write: expected False under torch\.vmap"):
        vmap(layer)(xs)
    with pytest.raises(TransformError, match="forward-mode"):
        jvp(layer, (xs[0],), (xs[0],))
    check_samples(layer, xs, write=False)
    documents = torch.tensor([0, 1])
    found = vmap(lambda x: layer(x, write=False, documents=documents))(xs)
    check_equal(found, torch.stack([layer(x, write=False, documents=documents) for x in xs]), rtol=1e-4, atol=1e-5)
    with pytest.raises(TransformError, match="documents: expected a tensor that no transform"):
        vmap(lambda x, d: layer(x, write=False, documents=d))(xs, documents.expand(SAMPLES, -1))
    plain, x = copy.deepcopy(layer), xs[2].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(x).sum(), x)
    check_equal(grad(lambda x: layer(x).sum())(xs[2]), wanted, rtol=1e-4, atol=1e-5)
    check_equal(layer.state_dict(), plain.state_dict())  # it has remembered the segment
    copy.deepcopy(layer)
    torch.save(layer.state_dict(), io.BytesIO())
    layer(xs[3]).sum().backward()


# -- torch.export ----------------------------------------------------------------------------------------


class Reading(nn.Module):
    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.read(*tensors)


class StoreReading(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.store, self.how = make_store(), how

    def forward(self, query: Tensor) -> Tensor:
        return self.store(query, **self.how)


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    "exact": lambda: StoreReading(),
    "topk": lambda: StoreReading(mode="topk", k=3),
    "layer": lambda: MemoryLayer(KEY_DIM, 20, heads=2, key_dim=4, mode="topk", k=3, track_usage=True),
    "product keys": lambda: ProductKeyMemory(KEY_DIM, 36, heads=2, k=4, key_dim=6),
}


@pytest.mark.slow
@exports
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", EXPORTED.values(), ids=EXPORTED)
def test_export(make: Callable[[], nn.Module], strict: bool) -> None:
    module = make().eval()
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(module, (torch.randn(3, KEY_DIM),), strict=strict, dynamic_shapes=shapes)
    for count in (3, 5):
        x = torch.randn(count, KEY_DIM)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.slow
@exports
@pytest.mark.parametrize("strict", [True, False])
def test_export_refuses_reads_that_depend_on_data(strict: bool) -> None:
    query = torch.randn(3, KEY_DIM)
    keys, values = torch.randn(ROWS, KEY_DIM), torch.randn(ROWS, VALUE_DIM)
    segment = torch.randn(2, 3, 8)
    memory = ContextMemory(8, 16, heads=2, key_dim=4)
    refused: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (Reading(exact), (query, keys, values)),
        (Reading(best), (query, keys, values)),
        (StoreReading(mode="topk", k=3, tail_samples=5), (query,)),
        (memory, (segment,)),
    ]
    for module, inputs in refused:
        with pytest.raises(Exception, match="softdb: ") as raised:
            torch.export.export(module, inputs, strict=strict)
        assert strict or isinstance(raised.value, TransformError)
    memory(segment)


@pytest.mark.slow
@exports
def test_an_exported_program_reads_no_other_store(tmp_path: Path) -> None:
    module = StoreReading()
    program = torch.export.export(module, (torch.randn(3, KEY_DIM),))
    torch.export.save(program, tmp_path / "program.pt2")
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from softdb import ArgumentError, SoftKVStore
stores = [SoftKVStore(4, 2) for _ in range(9)]
try:
    torch.export.load({str(tmp_path / "program.pt2")!r}).module()(torch.randn(3, 4))
except ArgumentError as error:
    assert "expected the store that the compiled or exported graph reads, got none" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    check_exit(done)
    module.store.update([0], values=torch.ones(1, VALUE_DIM))
    query = torch.zeros(3, KEY_DIM)
    assert torch.equal(program.module()(query), module(query))


# -- compiled reads --------------------------------------------------------------------------------------


class Counter:
    """A backend that counts the graphs that it is given."""

    def __init__(self, backend: str) -> None:
        self.graphs, self.backend = 0, backend

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "how", "backend"),
    rotate(
        [False, True],
        [{"mode": "topk", "k": 3}, {"k": 2}, {"mode": "hard"}, {"normalizer": "sparsemax"}],
        ["eager", "aot_eager", "inductor"],
    ),
    ids=str,
)
def test_compiled_reads_count_and_evict_as_eager_ones(backend: str, how: dict[str, Any], training: bool) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    back = torch.randn(VALUE_DIM, KEY_DIM)

    def step(store: SoftKVStore, query: Tensor) -> Tensor:
        store.read(2 * query, **how)  # is not used
        first, second = store(query, **how), store(query, **how)  # are equal
        return (first + second + store((first @ back).tanh(), **how)).sum()

    options: dict[str, Any] = {"trainable": True, "capacity": 16, "evict": "lru", "track_usage": True}
    made = SoftKVStore(KEY_DIM, VALUE_DIM, **options)
    made.add(torch.randn(16, KEY_DIM), torch.randn(16, VALUE_DIM))
    counter, found = Counter(backend), []
    for run in (step, torch.compile(step, backend=counter, fullgraph=True)):
        store = copy.deepcopy(made)
        optimizer = torch.optim.SGD(store.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(10):
            query = torch.randn(1, KEY_DIM)
            if training:
                optimizer.zero_grad()
                run(store, query).backward()
                optimizer.step()
            else:
                with torch.no_grad():
                    run(store, query)
            store.add(torch.randn(1, KEY_DIM), torch.randn(1, VALUE_DIM))
        found.append((store.ids, store.usage.reads, store.usage.weight))
    check_equal(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert counter.graphs == 1
    assert compile_module._pending_reads == {}


@pytest.mark.slow
def test_compiled_transforms() -> None:
    store, queries = make_store(), torch.randn(SAMPLES, QUERIES, KEY_DIM)
    inputs = queries.clone().requires_grad_()
    answer = torch.compile(vmap(store), backend="aot_eager")(inputs)
    torch.testing.assert_close(answer, store(queries))
    wanted = grad(lambda x: store(x).sin().sum())(queries)
    torch.testing.assert_close(torch.autograd.grad(answer.sin().sum(), inputs)[0], wanted)
    found = torch.compile(vmap(grad(lambda x: store(x).sin().sum())), backend="aot_eager")(queries)
    torch.testing.assert_close(found, wanted)


def test_an_overridden_read_is_called_once_under_a_transform() -> None:
    class Doubling(SoftKVStore):
        def read(self, query: Tensor, *args: Any, **options: Any) -> Any:
            return super().read(2 * query, *args, **options)

    store = Doubling(2, 1)
    store.add(torch.eye(2), torch.tensor([[1.0], [2.0]]))
    queries = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    eager = torch.stack([store.read(query).values for query in queries])
    torch.testing.assert_close(torch.vmap(lambda query: store.read(query).values)(queries), eager)


def test_grad_of_a_pruned_store_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    store = SoftKVStore(2, 1, trainable=True)
    store.add(torch.eye(2), torch.tensor([[1.0], [2.0]]))
    torch.nn.utils.prune.random_unstructured(store, "keys", amount=1)
    query = torch.tensor([1.0, 0.5])

    def loss(keys: Tensor) -> Tensor:
        return functional_call(store, {"keys_orig": keys}, (query,)).sum()

    leaf = store.keys_orig.detach().clone().requires_grad_()
    wanted = torch.autograd.grad(loss(leaf), leaf)[0]
    assert bool(wanted.any())
    torch.testing.assert_close(grad(loss)(leaf.detach()), wanted)
