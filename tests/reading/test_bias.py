"""Tests of ``SoftKVStore.read(bias=)``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.contract import force_dispatch
from support.tolerances import allclose, largest_error
from torch import Tensor

import softdb
from softdb import NonFiniteError, SoftKVStore
from softdb.functional import soft_read

pytestmark = pytest.mark.each_device

QUERIES, ROWS = 6, 200


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_store(rows: int = ROWS, *, deleted: int = 20, **options: Any) -> SoftKVStore:
    """Create a trainable store of ``rows`` rows, in slots of which some are empty."""
    options = {"trainable": True, "fields": ("kind",), "dtype": torch.float64} | options
    store = SoftKVStore(5, 3, **options)
    total = rows + deleted
    ids = store.add(torch.randn(total, 5), torch.randn(total, 3), fields={"kind": torch.arange(total) % 3})
    if deleted:
        store.delete(ids[torch.randperm(total)[:deleted]])
    return store


def make_bias(*shape: int, hidden: float = 0.0) -> Tensor:
    bias = 2 * torch.randn(shape, dtype=torch.float64)
    return bias.masked_fill(torch.rand(shape) < hidden, -math.inf).requires_grad_()


def live(store: SoftKVStore) -> tuple[Tensor, Tensor]:
    """Return the keys and values in the order of ``store.ids``, in the graph."""
    slots = store.rows.live_slots()
    return store.keys[slots], store.values[slots]


def check_read(store: SoftKVStore, query: Tensor, bias: Tensor, visible: Tensor | None = None, **how: Any) -> None:
    """Compare a read, and its gradients, with the reference over the same rows."""
    read = store.read(query, bias=bias, **how)
    keys, values = live(store)
    flat = query.reshape(-1, query.shape[-1])
    own = bias.expand(*query.shape[:-1], len(store)).reshape(len(flat), -1)
    temperature = how.get("temperature", 1.0)
    answer = reference.read(flat, keys, values, bias=own, visible=visible, temperature=temperature)
    if how.get("mode", "exact") != "exact":
        best = reference.best(answer.scores, 1 if how["mode"] == "hard" else how["k"])
        seen = (best.unsqueeze(-1) == torch.arange(len(store))).any(1)
        answer = reference.read(flat, keys, values, bias=own, visible=seen, temperature=temperature)
    finite = answer.lse > -math.inf
    lse, found = read.lse.reshape(-1), read.values.reshape(len(flat), -1)
    assert allclose(found, answer.values, atol=1e-11)
    assert allclose(lse, answer.lse, atol=1e-11)
    ours, theirs = found.sin().sum() + lse[finite].sum(), answer.values.sin().sum() + answer.lse[finite].sum()
    if read.ids is not None and read.scores is not None and read.weights is not None:
        ids, scores, weights = (part.reshape(len(flat), -1) for part in (read.ids, read.scores, read.weights))
        best = reference.best(answer.scores, ids.shape[-1])
        assert (ids == torch.where(best < 0, -1, store.ids[best])).all()
        real, place = best >= 0, best.clamp(min=0)
        ours = ours + weights[real].square().sum() + scores[real].sin().sum()
        wanted = answer.weights.gather(1, place), answer.scores.gather(1, place)
        theirs = theirs + wanted[0][real].square().sum() + wanted[1][real].sin().sum()
    leaves = [query, bias, store.keys, store.values]
    gradients = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        assert mine is not None
        assert largest_error(mine.to_dense(), other.to_dense()) < 1e-10


MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, best": {"k": 4},
    "topk": {"mode": "topk", "k": 7},
    "hard": {"mode": "hard"},
}
SHAPES = [(ROWS,), (QUERIES, ROWS), (2, 1, ROWS), (2, 3, 1)]


@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_a_bias_is_added_to_the_scores(how: dict[str, Any], shape: tuple[int, ...], hidden: float) -> None:
    store, bias = make_store(), make_bias(*shape, hidden=hidden)
    query = torch.randn(*((2, 3) if len(shape) == 3 else (QUERIES,)), 5, dtype=torch.float64, requires_grad=True)
    check_read(store, query, bias, temperature=0.5, **how)


@pytest.mark.slow
@pytest.mark.parametrize("deleted", [0, 20, 300])
@pytest.mark.parametrize("dispatch", ["tiny tiles", "two partitions", "five partitions, always shifted, rows first"])
def test_reads_in_tiles_agree(dispatch: str, deleted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force_dispatch(dispatch, monkeypatch)
    store = make_store(deleted=deleted)  # most slots are empty, or some, or none
    query = torch.randn(QUERIES, 5, dtype=torch.float64, requires_grad=True)
    for shape in ((ROWS,), (QUERIES, ROWS)):
        for how in MODES.values():
            check_read(store, query, make_bias(*shape, hidden=0.2), **how)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("by_query", [False, True])
def test_a_bias_is_combined_with_filters(by_query: bool, how: dict[str, Any]) -> None:
    store = make_store()
    bias = make_bias(*([QUERIES] if by_query else []), ROWS, hidden=0.2)
    query = torch.randn(QUERIES, 5, dtype=torch.float64, requires_grad=True)
    kind = store.get(store.ids).fields["kind"]
    exclude = store.ids[torch.arange(2 * QUERIES).view(QUERIES, 2)]
    visible = (kind != 1) & ~(store.ids == exclude.unsqueeze(-1)).any(1)
    for where in (kind != 1, store.ids[kind != 1], lambda row: row["kind"] != 1):
        check_read(store, query, bias, visible, where=where, exclude=exclude, **how)


def test_a_bias_and_a_callable_hide_rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a bias has a dimension for groups, that of a callable has none."""
    force_dispatch("two partitions", monkeypatch)
    store, query = make_store(), torch.randn(QUERIES, 5, dtype=torch.float64, requires_grad=True)
    kind, least = store.fields_at(store.ids, "kind"), torch.arange(QUERIES).view(-1, 1) % 3
    for shape in ((ROWS,), (QUERIES, ROWS)):
        bias = make_bias(*shape, hidden=0.2)
        check_read(store, query, bias, kind != 1, where=lambda row: row["kind"] != 1)
        check_read(store, query, bias, kind >= least, where=lambda row: row["kind"] >= least, k=3)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_minus_infinity_equals_a_filter(how: dict[str, Any]) -> None:
    """Also where the hidden rows hold numbers that are not finite."""
    store, query = make_store(deleted=0), torch.randn(QUERIES, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        store.keys[3], store.values[4], store.values[5] = math.nan, math.inf, math.nan
    store.touch(store.ids[3:6])
    kept = torch.rand(ROWS) < 0.6
    kept[3:6] = False
    bias = torch.where(kept, 0.0, -math.inf).double().requires_grad_()
    found, wanted = store.read(query, bias=bias, **how), store.read(query, where=kept, **how)
    for name in ("values", "ids", "weights", "scores", "lse", "mass"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or allclose(ours, theirs, atol=1e-12, equal_nan=True)
    for gradient in torch.autograd.grad(found.values.sum() + found.lse.sum(), (query, bias, store.keys, store.values)):
        dense = gradient.to_dense()
        assert dense.isfinite().all()
        assert len(dense) != ROWS or (dense[~kept] == 0).all()


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rows", [0, 9])
def test_nothing_to_read(rows: int, how: dict[str, Any]) -> None:
    store, query = make_store(rows, deleted=0), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.full((rows,), -math.inf, dtype=torch.float64, requires_grad=True)
    read = store.read(query, bias=bias, **how)
    assert (read.values == 0).all()
    assert (read.lse == -math.inf).all()
    assert (read.mass == 0).all()
    assert read.ids is None or (read.ids == -1).all()
    read.values.sum().backward()
    assert bias.grad is None or (bias.grad == 0).all()
    values = store.read(query.detach(), bias=bias.detach()[:1].expand(rows).requires_grad_(), **how).values
    assert values.requires_grad


def test_a_bias_that_the_read_cannot_hold_is_refused() -> None:
    store, query = make_store(9, dtype=torch.float32), torch.zeros(2, 5)
    for number in (-1e39, 1e39):
        bias = torch.tensor([number, -math.inf] + 7 * [0.0], dtype=torch.float64)
        with pytest.raises(NonFiniteError, match="bias: expected numbers of at most"):
            store.read(query, bias=bias)
        with pytest.raises(NonFiniteError, match="mask: expected numbers of at most"):
            soft_read(query, store.keys[:9], store.values[:9], mask=bias)
    read = store.read(query.double(), bias=bias)
    assert read.lse.isfinite().all()


@pytest.mark.parametrize("mode", ["topk", "hard"])
def test_top_k_searches_exactly(mode: Any) -> None:
    """The rows that a bias lifts are found, although the index ranks them last."""
    store = make_store(3000, deleted=0, index="IVF16,Flat", dtype=torch.float32)
    query = torch.randn(QUERIES, 5)
    store.read(query, "topk", k=4)
    builds = store.index_stats().builds
    worst = store.read(query, k=len(store)).ids[:, -2:]
    bias = torch.zeros(QUERIES, 3000).scatter(1, worst, torch.tensor([60.0, 50.0]).expand(QUERIES, 2))
    found = store.read(query, mode, k=2 if mode == "topk" else None, bias=bias).ids
    assert torch.equal(found, worst[:, : found.shape[1]])
    assert store.index_stats().builds == builds > 0


def test_ties_of_sums_go_to_the_lowest_slot() -> None:
    store = SoftKVStore(1, 1, metric="dot")
    ids = store.add(torch.tensor([[0.0], [2.0], [1.0], [2.0]]), torch.zeros(4, 1))
    bias = torch.tensor([2.0, 0.0, 1.0, -1.0])  # the sums are 2, 2, 2, 1
    for how in ({"k": 4}, {"mode": "topk", "k": 4}):
        assert torch.equal(store.read(torch.ones(1), bias=bias, **how).ids, ids)  # type: ignore[arg-type]
    assert store.read(torch.ones(1), "hard", bias=bias).ids == 0


@pytest.mark.parametrize("mode", ["exact", "topk"])
def test_gumbel_draws_by_the_sum(mode: Any) -> None:
    store = SoftKVStore(1, 1)
    store.add(torch.zeros(4, 1), torch.zeros(4, 1))
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4])
    read = store.read(
        torch.zeros(2_000, 1),
        mode,
        k=4,
        bias=probability.log(),
        normalizer="gumbel",
        generator=torch.Generator().manual_seed(0),
    )
    assert read.ids is not None
    drawn = read.ids[:, 0].bincount(minlength=4) / 2_000
    assert allclose(drawn, probability, atol=0.05)


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    store, bias = make_store(), make_bias(ROWS)
    query = torch.randn(QUERIES, 5, dtype=torch.float64, requires_grad=True)
    hard = store.read(query, bias=bias, normalizer="straight_through", k=2)
    keys, values = live(store)
    answer = reference.read(query, keys, values, bias=bias)
    assert torch.equal(hard.values, values[answer.scores.argmax(-1)])
    found, wanted = (torch.autograd.grad(part.values.sum(), (query, bias))[1] for part in (hard, answer))
    assert allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_rows_and_autocast(dtype: torch.dtype) -> None:
    store = make_store(dtype=dtype)
    query, bias = torch.randn(QUERIES, 5).to(dtype), make_bias(ROWS).detach().to(dtype).requires_grad_()
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        read = store.read(query, bias=bias)
    keys, values = live(store)
    answer = reference.read(query.double(), keys.double(), values.double(), bias=bias.double())
    assert largest_error(read.lse, answer.lse) < 1e-5
    assert largest_error(read.values, answer.values) < 0.02
    found, wanted = (torch.autograd.grad(part.lse.sum(), bias)[0] for part in (read, answer))
    assert found.dtype == dtype
    assert largest_error(found, wanted) <= torch.finfo(dtype).eps * float(wanted.abs().max()) + 1e-6


@pytest.mark.parametrize(("dtype", "cast"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_the_dtype_of_autocast_may_differ_from_that_of_the_bias(dtype: torch.dtype, cast: torch.dtype) -> None:
    store, query = make_store(dtype=torch.float32), torch.randn(QUERIES, 5)
    bias = make_bias(ROWS, hidden=0.2).detach().to(dtype).requires_grad_()
    with torch.autocast(query.device.type, dtype=cast):
        found = store.read(query, bias=bias)
    wanted = store.read(query, bias=bias)
    assert torch.equal(found.lse, wanted.lse)
    assert torch.equal(*(torch.autograd.grad(read.lse.sum(), bias)[0] for read in (found, wanted)))


@pytest.mark.parametrize("largest", [3e38, 1e4])
def test_huge_negative_numbers_hide_in_effect(largest: float) -> None:
    """As the masks of libraries do that add the lowest finite number."""
    store = make_store(dtype=torch.float32)
    bias = torch.where(torch.rand(ROWS) < 0.5, -largest, 0.0)
    query = torch.randn(QUERIES, 5)
    found, wanted = store.read(query, bias=bias), store.read(query, where=bias == 0)
    assert allclose(found.values, wanted.values, atol=1e-6)
    assert allclose(found.lse, wanted.lse, atol=1e-5)


def test_forward_passes_the_bias() -> None:
    store, bias, query = make_store(), make_bias(ROWS), torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(store(query, bias=bias), store.read(query, bias=bias).values)
    assert not torch.allclose(store(query, bias=bias), store(query))


def test_a_prior_over_rows_is_learned() -> None:
    """The first row has the target as its value; a learned bias raises its weight."""
    store = SoftKVStore(2, 1)
    store.add(torch.randn(5, 2), torch.tensor([[1.0], [0.0], [0.0], [0.0], [0.0]]))
    prior, query = torch.zeros(5, requires_grad=True), torch.randn(8, 2)
    for _ in range(30):
        (gradient,) = torch.autograd.grad((store(query, bias=prior) - 1).square().mean(), prior)
        prior = (prior - 20 * gradient).detach().requires_grad_()
    assert store(query, bias=prior).min() > 0.95
    assert prior.argmax() == 0


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "nan": (torch.full((9,), math.nan), {}, softdb.NonFiniteError, "bias: expected finite numbers, or -inf"),
    "infinity": (torch.full((9,), math.inf), {}, softdb.NonFiniteError, "bias: expected finite numbers, or -inf"),
    "list": ([0.0] * 9, {}, softdb.DtypeError, "bias: expected a floating-point torch.Tensor"),
    "integers": (torch.zeros(9).long(), {}, softdb.DtypeError, "bias: expected a floating-point tensor"),
    "rows": (torch.zeros(8), {}, softdb.ShapeError, r"bias: expected a shape broadcastable to \(2, 9\)"),
    "queries": (torch.zeros(3, 9), {}, softdb.ShapeError, r"bias: expected a shape broadcastable to \(2, 9\)"),
    "sample": (torch.zeros(9), {"mode": "topk", "k": 2, "tail_samples": 4}, softdb.ArgumentError, "tail_samples"),
    "tolerance": (torch.zeros(9), {"mode": "topk", "tolerance": 0.1}, softdb.ArgumentError, "bias: expected no value"),
    "sparsemax": (torch.zeros(9), {"normalizer": "sparsemax"}, softdb.ArgumentError, "bias: expected no value"),
    "entmax15": (torch.zeros(9), {"normalizer": "entmax15"}, softdb.ArgumentError, "bias: expected no value"),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize(("bias", "how", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_bias_is_refused(bias: Any, how: dict[str, Any], error: type[Exception], message: str) -> None:
    store = make_store(9, deleted=1, track_usage=True)
    with pytest.raises(error, match=message):
        store.read(torch.zeros(2, 5, dtype=torch.float64), bias=bias, **how)
    assert store.usage.reads.sum() == 0
