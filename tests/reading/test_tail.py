"""Top-k reads with a tail sample or a tolerance, compared with exact reads."""

from __future__ import annotations

import math

import pytest
import torch
from support.contract import METRICS, Problem
from support.tolerances import allclose, largest_error
from torch import Tensor

import softdb
from softdb import SoftKVStore
from softdb.filters import Selection
from softdb.index.list_layout import ListLayout
from softdb.index.search import Candidates
from softdb.kernels.blocks.topk import exact_top_k
from softdb.kernels.spec import ReadSpec
from softdb.reading.reader import Reader, ReadView, ToleranceRounds
from softdb.reading.sample import UNIFORM_FRACTION, Sample
from softdb.reading.tail import TailCosts, choose_sample_size

pytestmark = pytest.mark.each_device

CPU = torch.device("cpu")


def make_store(problem: Problem, **options: object) -> SoftKVStore:
    """Make a store of the problem's rows, whose ids are the row numbers."""
    key_dim, value_dim = problem.keys.shape[1], problem.values.shape[1]
    store = SoftKVStore(key_dim, value_dim, metric=problem.metric, dtype=problem.keys.dtype, **options)
    store.add(problem.keys, problem.values)
    return store


def make_clustered_store(rows: int, **options: object) -> tuple[SoftKVStore, Tensor]:
    """Make a store of rows around 40 centers, and queries near 12 of them."""
    torch.manual_seed(0)
    centers = torch.randn(40, 16)
    place = torch.randint(40, (rows,))
    store = SoftKVStore(16, 4, metric="dot", index=softdb.IndexConfig("IVF64,Flat"), **options)
    store.add(
        centers[place] + 0.3 * torch.randn(rows, 16), (centers @ torch.randn(16, 4))[place] + torch.randn(rows, 4)
    )
    return store, centers[:12] + 0.3 * torch.randn(12, 16)


def relative_error(read: softdb.Read, exact: softdb.Read) -> Tensor:
    """Compute the norm of the difference of the values, relative to that of the exact ones."""
    return (read.values - exact.values).norm(dim=-1) / exact.values.norm(dim=-1)


# -- samples ---------------------------------------------------------------------------------------------


def make_layouts(rows: int) -> dict[str, tuple[ListLayout | None, Tensor | None]]:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([rows // 2, 0, rows // 10, 1, rows - rows // 2 - rows // 10 - 1])
    layout = ListLayout(order, counts, torch.zeros(5, 2))
    importance = torch.tensor([0.0, 3.0, 50.0, 200.0, 1.0], dtype=torch.float64)
    return {
        "one list": (None, None),
        "lists": (layout, None),
        "importance": (layout, importance),
        "no importance": (layout, 0 * importance),
    }


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("kind", make_layouts(10))
@pytest.mark.parametrize("count", [1, 2, 7, 30, 90, 149, 150])
def test_each_row_is_represented_once_on_average(kind: str, count: int) -> None:
    rows, times = 150, 1000 if count < 30 else 400
    selection = Selection(rows)
    layout, importance = make_layouts(rows)[kind]
    generator = torch.Generator().manual_seed(0)
    drawn, stood = torch.zeros(rows), torch.zeros(rows, dtype=torch.float64)
    for _ in range(times):
        sample = Sample.draw(selection, count, CPU, generator, layout, importance)
        real = sample.factors > 0
        slots = sample.slots[real]
        assert len(slots.unique()) == len(slots) <= count + 1
        assert float(sample.factors.sum()) == rows  # the sample represents all rows
        drawn[slots] += 1
        stood[slots] += sample.factors[real]
    # A row is drawn with probability 1 / f and represents f rows: its mean is 1.
    spread = (stood / times - 1).abs() * math.sqrt(times) / (rows / max(2, count)) ** 0.5
    assert float(spread.max()) < 6
    assert int(drawn.min()) > 0
    if kind == "importance" and count == 30:
        ordered = drawn[layout.order]
        assert ordered[75:90].mean() > 3 * ordered[:75].mean()
        assert ordered.min() > 0.5 * UNIFORM_FRACTION * times * count / rows


def test_first_and_second_rows_come_from_the_same_strata() -> None:
    sample = Sample.draw(Selection(1000), 100, CPU, torch.Generator().manual_seed(0))
    chunks = [chunk for _, chunk in sample.chunks]
    assert [number for number, _ in sample.chunks] == list(range(16))
    for first, second in zip(chunks[0::2], chunks[1::2], strict=True):
        real = sample.factors[first] > 0
        assert torch.equal(sample.factors[first], sample.factors[second])
        assert torch.equal(sample.slots[first][real] // 20, sample.slots[second][real] // 20)
        assert (sample.slots[first] != sample.slots[second])[real].all()


@pytest.mark.cpu_only
def test_a_sample_of_a_selection_has_only_selected_rows() -> None:
    layout, importance = make_layouts(150)["importance"]
    shared = torch.arange(170) % 3 != 0  # the layout has 150 rows
    for count in (10, 40, 113):
        sample = Sample.draw(Selection(170, shared=shared), count, CPU, None, layout, importance)
        assert shared[sample.slots].all()
        assert float(sample.factors.sum()) == int(shared.sum())


# -- reading ---------------------------------------------------------------------------------------------


WHERES = {
    "all": {},
    "ids": {"where": torch.arange(51, 121)},
    "rule": {"where": lambda row: row["id"] % 3 != 0},
    "rule for each query": {"where": lambda row: row["id"] % 5 != torch.arange(5).unsqueeze(-1)},
    "exclude": {"exclude": torch.arange(15).view(5, 3)},
}


@pytest.mark.parametrize("where", WHERES.values(), ids=WHERES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_sample_of_all_rows_gives_the_exact_read(metric: str, where: dict[str, object]) -> None:
    problem = Problem.random(rows=123, metric=metric, dtype=torch.float64)
    store = make_store(problem, trainable=True, sparse_grad=True)
    store.delete([2, 50])
    leaves = [problem.query, store.keys, store.values]
    exact = store.read(problem.query, k=6, **where)
    for count in (117, 118, 10_000):  # 121 rows live
        tail = store.read(problem.query, "topk", k=6, tail_samples=count, **where)
        for name in ("values", "weights", "lse", "mass"):
            assert largest_error(getattr(tail, name), getattr(exact, name)) < 1e-9, name
        assert torch.equal(tail.ids, exact.ids)
        assert (tail.error == 0).all()
    found, wanted = (
        torch.autograd.grad(read.values.sin().sum() + read.lse.sum() + read.mass.sum(), leaves)
        for read in (tail, exact)
    )
    for mine, other in zip(found, wanted, strict=True):
        assert largest_error(mine.to_dense(), other.to_dense()) < 1e-8


@pytest.mark.slow
def test_numerator_denominator_and_their_gradients_are_unbiased() -> None:
    problem = Problem.random(rows=123, dtype=torch.float64)
    store = make_store(problem, trainable=True, sparse_grad=True)
    leaves = [problem.query, store.keys, store.values]
    generator = torch.Generator().manual_seed(0)

    def estimates(read: softdb.Read) -> list[Tensor]:
        denominator = read.lse.exp()
        numerator = denominator.unsqueeze(-1) * read.values
        gradients = torch.autograd.grad(numerator.sum(), leaves, retain_graph=True)
        return [denominator.detach(), numerator.detach(), *(gradient.to_dense() for gradient in gradients)]

    draws = [
        estimates(store.read(problem.query, "topk", k=5, tail_samples=20, generator=generator)) for _ in range(600)
    ]
    for drawn, wanted in zip(zip(*draws, strict=True), estimates(store.read(problem.query)), strict=True):
        found = torch.stack(drawn)
        deviation = (found.mean(0) - wanted).abs() / (found.std(0) / math.sqrt(len(found)) + 1e-12)
        assert float(deviation.max()) < 5
        assert float(deviation.square().mean().sqrt()) < 1.3


def test_a_tail_reduces_the_error_and_bounds_it_in_nine_of_ten_cases() -> None:
    torch.manual_seed(0)
    store = SoftKVStore(16, 4)
    store.add(torch.randn(20_000, 16), torch.randn(20_000, 4) + 1)
    query = torch.randn(64, 16)
    exact = store.read(query, k=50, temperature=2.0)
    plain = store.read(query, "topk", k=50, temperature=2.0)

    def tail(seed: int) -> softdb.Read:
        generator = torch.Generator().manual_seed(seed)
        return store.read(query, "topk", k=50, temperature=2.0, tail_samples=2000, generator=generator)

    assert float(exact.mass.mean()) < 0.1
    assert plain.mass.isnan().all()
    assert plain.error is None
    reads = [tail(seed) for seed in range(40)]  # the queries of a batch share one sample
    errors, bounds = (
        torch.stack([relative_error(read, exact) for read in reads]),
        torch.stack([read.error for read in reads]),
    )
    assert float(errors.mean()) < 0.25 * float(relative_error(plain, exact).mean())
    assert 0.8 < 1.6 * float(errors.square().mean().sqrt() / bounds.square().mean().sqrt()) < 1.25
    assert float((errors < bounds).double().mean()) > 0.9
    assert all(float((read.mass - exact.mass).abs().max()) < 0.01 for read in reads)
    assert torch.equal(tail(3).values, reads[3].values)
    assert not torch.equal(reads[4].values, reads[3].values)


def test_sampled_rows_get_gradients_and_a_staleness_check() -> None:
    problem = Problem.random(rows=400)
    store = make_store(problem, trainable=True, sparse_grad=True)
    read = store.read(problem.query, "topk", k=3, tail_samples=30)
    (gradient,) = torch.autograd.grad(read.values.sum(), store.values, retain_graph=True)
    rows = gradient.coalesce().indices()[0]
    assert torch.isin(read.ids.unique(), rows).all()
    assert 30 <= len(rows) <= 45
    sampled = rows[~torch.isin(rows, read.ids)]
    store.update(sampled[:1], values=torch.zeros(1, 3))
    with pytest.raises(softdb.StaleReadError):
        read.values.sum().backward()


def test_a_tail_with_few_or_no_rows_or_queries() -> None:
    empty = SoftKVStore(8, 3)
    read = empty.read(torch.randn(4, 8), "topk", k=2, tail_samples=5)
    assert (read.values == 0).all()
    assert (read.lse == -math.inf).all()
    assert (read.error == 0).all()
    problem = Problem.random(rows=40)
    store = make_store(problem)
    hidden = store.read(problem.query, "topk", k=2, tail_samples=5, where=lambda row: row["id"] < 0)
    assert (hidden.values == 0).all()
    assert (hidden.mass == 0).all()
    assert store.read(problem.query, "topk", k=2, tail_samples=1).error.gt(0).all()
    assert store.read(problem.query[:0], "topk", k=2, tail_samples=5).values.shape == (0, 3)
    batched = store.read(problem.query[:4].view(2, 2, 8), "topk", k=2, tail_samples=5)
    assert batched.error.shape == batched.mass.shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True])
def test_lists_reduce_the_error_and_stay_unbiased_while_rows_change(trainable: bool) -> None:
    store, query = make_clustered_store(6000, trainable=trainable)
    generator = torch.Generator().manual_seed(0)

    def errors(times: int = 60) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            exact = store.read(query, temperature=1.5)
            reads = [
                store.read(query, "topk", k=20, temperature=1.5, tail_samples=500, generator=generator)
                for _ in range(times)
            ]
        denominator = torch.stack([(read.lse - exact.lse).exp() for read in reads])
        apart = (denominator.mean(0) - 1).abs() / (denominator.std(0) / math.sqrt(times))
        assert float(apart.square().mean().sqrt()) < 1.8
        errors_of_reads = torch.stack([relative_error(read, exact) for read in reads])
        bounds = torch.stack([read.error for read in reads])
        assert float((errors_of_reads < bounds).double().mean()) > 0.9
        return errors_of_reads.mean(), bounds.mean(), denominator.std(0).mean()

    with_lists = errors()
    assert store.index_stats().factory == "IVF64,Flat"
    store.delete(torch.arange(0, 3000, 7))
    store.add(torch.randn(900, 16), torch.randn(900, 4))
    store.update(torch.arange(1, 60, 7), keys=torch.randn(9, 16))
    errors()
    if trainable:
        with torch.no_grad():
            store.keys[1000:2000] = store.keys[1000:2000].roll(1, 0)
        errors()
    flat, _ = make_clustered_store(6000)
    flat._index = softdb.index.manager.IndexManager(softdb.IndexConfig("Flat"), "dot", 16, moving=False)
    flat._assemble()
    store = flat
    assert with_lists[0] < 0.8 * errors()[0]


def test_a_missed_row_far_above_the_candidates_is_sampled() -> None:
    torch.manual_seed(0)
    problem = Problem.random(rows=300, dtype=torch.float32)
    store = make_store(problem)
    query = problem.query.detach()
    best = store.read(query, k=1).ids[:, 0]

    others = torch.stack([torch.arange(300)[torch.arange(300) != row][:2] for row in best])

    def miss_the_best_row(*args: object, careful: bool = False) -> Candidates:
        return Candidates(others, False, 1.0)

    store._reader.candidates = miss_the_best_row  # type: ignore[method-assign]
    exact = store.read(query, temperature=0.001)
    read = store.read(query, "topk", k=2, temperature=0.001, tail_samples=300)
    assert largest_error(read.values, exact.values) < 1e-5
    assert allclose(read.lse, exact.lse)


def hide_best_rows(store: SoftKVStore, count: int) -> None:
    """Replace the search of a store by one that misses the best ``count`` rows."""

    def search(
        view: ReadView, query: Tensor, operand: Tensor, spec: ReadSpec, k: int, *, careful: bool = False
    ) -> Candidates:
        return Candidates(exact_top_k(operand, store.keys.detach(), spec, k + count)[1][:, count:], False, 0.95)

    store._reader.candidates = search  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(("metric", "temperature"), [("dot", 0.004), ("l2", 0.005)])
def test_a_missed_row_with_a_very_negative_score_is_sampled(metric: str, temperature: float) -> None:
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    query = direction + 0.05 * torch.randn(6, 8)
    keys = -3 * direction + 0.3 * torch.randn(300, 8)
    keys[17] = -direction
    store = SoftKVStore(8, 4, metric=metric)
    store.add(keys, torch.randn(300, 4))
    exact = store.read(query, temperature=temperature)
    assert float(exact.lse.max()) < -100
    hide_best_rows(store, 1)
    read = store.read(query, "topk", k=2, temperature=temperature, tail_samples=300)
    assert allclose(read.lse, exact.lse, rtol=1e-4)
    assert float(relative_error(read, exact).max()) < 1e-3


def test_error_is_above_zero_unless_the_read_is_exact() -> None:
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    query, keys = direction + 0.05 * torch.randn(6, 8), -3 * direction + 0.3 * torch.randn(300, 8)
    keys[10:60] = -direction + 0.02 * torch.randn(50, 8)
    store = SoftKVStore(8, 4, metric="dot")
    store.add(keys, torch.randn(300, 4))
    hide_best_rows(store, 50)
    for temperature in (0.06, 0.035, 0.028):  # the missed rows score up to 80 above the candidates
        read = store.read(query, "topk", k=2, temperature=temperature, tail_samples=150)
        assert (read.error > 0).all()
    zeros = SoftKVStore(16, 4)
    values = torch.zeros(20_000, 4)
    values[::100] = 1.0
    zeros.add(torch.randn(20_000, 16), values)
    query = torch.randn(16, 16)
    exact, read = zeros.read(query), zeros.read(query, "topk", k=8, tail_samples=64)
    assert ((relative_error(read, exact) < 0.1) | (read.error > 0.05)).all()
    huge = SoftKVStore(16, 4)
    huge.add(torch.randn(20_000, 16), 1e20 * torch.randn(20_000, 4))
    assert (huge.read(query, "topk", k=8, tail_samples=64).error > 0).all()
    nothing = huge.read(query, "topk", k=8, tail_samples=64, where=lambda row: row["id"] < 0)
    assert (nothing.error == 0).all()


@pytest.mark.parametrize("count", [30, 32, 50])
def test_a_tail_with_an_excluded_row_for_each_query(count: int) -> None:
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(500, 32), dim=-1)
    store = SoftKVStore(32, 4, metric="dot")
    own = store.add(keys, torch.randn(500, 4))[:5].unsqueeze(-1)
    how = dict(temperature=0.005, exclude=own)
    exact = store.read(keys[:5], **how)  # type: ignore[arg-type]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        read = store.read(keys[:5], "topk", k=4, tail_samples=count, generator=generator, **how)  # type: ignore[arg-type]
        assert float(relative_error(read, exact).max()) < 0.1


def test_a_query_that_may_see_nothing_does_not_change_list_importance() -> None:
    store, query = make_clustered_store(6000)
    rule = lambda row: (torch.arange(12).unsqueeze(-1) > 0) & (row["id"] >= 0)  # noqa: E731
    exact = store.read(query, temperature=1.5, where=rule)
    generator = torch.Generator().manual_seed(0)
    reads = [
        store.read(query, "topk", k=20, temperature=1.5, tail_samples=500, where=rule, generator=generator)
        for _ in range(30)
    ]
    assert (reads[0].values[0] == 0).all()
    assert (reads[0].error[0] == 0).all()
    assert (
        float(torch.stack([relative_error(read, exact)[1:] for read in reads]).mean()) < 0.052
    )  # measured: 0.06 without lists


@pytest.mark.slow
def test_gradients_of_a_tail_pass_gradcheck() -> None:
    problem = Problem.random(queries=3, rows=24, key_dim=4, value_dim=2, dtype=torch.float64)
    store = make_store(problem, trainable=True, sparse_grad=False)

    def forward(query: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        read = store.read(query, "topk", k=3, tail_samples=8, temperature=temperature, generator=generator)
        return read.values, read.lse, read.mass, read.weights

    def answer(query: Tensor, keys: Tensor, values: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        tables = dict(keys=keys, values=values)
        return torch.func.functional_call(store, tables, (query, temperature))  # type: ignore[no-any-return]

    store.forward = forward  # type: ignore[method-assign, assignment]
    leaves = (problem.query, store.keys.detach().requires_grad_(), store.values.detach().requires_grad_())
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(answer, (*leaves, temperature))


# -- tolerance -----------------------------------------------------------------------------------------


def make_samples_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set all costs of a sample but that of its rows to 0, so that small stores draw samples."""
    monkeypatch.setattr(Reader, "costs", TailCosts(sample=0.0, sample_queries=0.0, max_trial_fraction=math.inf))


TEMPERATURES = (0.3, 1.0, 2.0, 4.0, 30.0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("queries", [1, 48])
def test_errors_stay_below_error_and_tolerance(width: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_samples_free(monkeypatch)
    monkeypatch.setattr(Reader, "rounds", ToleranceRounds(candidates=16, samples=256))
    torch.manual_seed(0)
    centers = torch.randn(200, 16)
    place = torch.randint(200, (20_000,))
    store = SoftKVStore(16, width, metric="dot", index=softdb.IndexConfig("IVF128,Flat"))
    values = (centers @ torch.randn(16, width))[place] + torch.randn(20_000, width) + 1
    store.add(centers[place] + 0.4 * torch.randn(20_000, 16), values)
    below, within, exactly = [], [], []
    for temperature in TEMPERATURES:
        for _ in range(48 // queries if queries > 1 else 24):
            query = centers[torch.randint(200, (queries,))] + 0.5 * torch.randn(queries, 16)
            exact = store.read(query, k=16, temperature=temperature)
            read = store.read(query, "topk", tolerance=0.1, temperature=temperature)
            error = relative_error(read, exact)
            below.append((error <= read.error + 1e-5).double())
            within.append((error <= 0.1).double())
            exactly.append((read.error == 0).double())
            assert (read.error <= 0.1).all()
            assert read.ids is read.weights is read.scores is None
            read = store.read(query, "topk", k=16, tolerance=0.1, temperature=temperature)
            assert read.ids.shape == (queries, 16)
            total = (read.weights - (read.scores - read.lse.unsqueeze(-1)).exp()).abs()
            assert float(total.max()) < 1e-5
            assert allclose(read.mass, read.weights.sum(-1), atol=1e-5)
    # The sample of a single query may miss the few rows that matter; in a batch, the typical variance corrects that.
    assert float(torch.cat(below).mean()) > (0.9 if queries > 1 else 0.85)
    assert float(torch.cat(within).mean()) > 0.95
    assert float(torch.cat(exactly).mean()) < 0.7  # most queries are not read exactly


def test_a_read_to_a_tolerance_is_exact_where_that_is_cheaper() -> None:
    problem = Problem.random(rows=300, dtype=torch.float64)
    store = make_store(problem, trainable=True, sparse_grad=True)
    exact, read = store.read(problem.query), store.read(problem.query, "topk", tolerance=0.1)
    assert read.ids is None
    assert largest_error(read.values, exact.values) < 1e-12
    assert (read.error == 0).all()
    assert store.read(problem.query, "topk", k=3, tolerance=0.1).ids.shape[-1] == 3
    read.values.sum().backward()
    store.zero_grad()
    empty = SoftKVStore(8, 3).read(torch.randn(4, 8), "topk", tolerance=0.1)
    assert (empty.values == 0).all()
    assert (empty.error == 0).all()


@pytest.mark.parametrize("kind", ["all", "ids", "rule", "exclude"])
def test_a_read_to_a_tolerance_respects_filters_and_has_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_samples_free(monkeypatch)
    monkeypatch.setattr(Reader, "rounds", ToleranceRounds(candidates=8, samples=64))
    store, query = make_clustered_store(6000, trainable=True, sparse_grad=True)
    query = query.view(3, 4, 16).requires_grad_()
    wheres: dict[str, dict[str, object]] = {
        "all": {},
        "ids": {"where": torch.arange(3000)},
        "rule": {"where": lambda row: row["id"] % 3 != torch.arange(12).unsqueeze(-1) % 3},
        "exclude": {"exclude": torch.arange(36).view(3, 4, 3)},
    }
    for temperature in (0.5, 2.0):
        exact = store.read(query, k=8, temperature=temperature, **wheres[kind])  # type: ignore[arg-type]
        read = store.read(query, "topk", k=8, tolerance=1e-4, temperature=temperature, **wheres[kind])  # type: ignore[arg-type]
        assert float(relative_error(read, exact).detach().max()) < 1e-3
        assert largest_error(read.lse, exact.lse) < 1e-3
        found, wanted = (torch.autograd.grad(r.values.sum(), (query, store.values)) for r in (read, exact))
        assert allclose(found[0], wanted[0], atol=2e-3)
        assert allclose(found[1].to_dense(), wanted[1].to_dense(), atol=2e-3)


@pytest.mark.parametrize("needed", [[], [100.0], [1e9], [50.0, 60.0, 5e4], [100.0] * 50 + [9e4] * 50])
def test_the_sample_size_is_enough_for_some_query(needed: list[float]) -> None:
    samples = choose_sample_size(torch.tensor(needed), 1_000_000, TailCosts())
    if not needed or needed == [1e9]:
        assert samples == 0
    else:
        assert min(needed) <= samples < 1_000_000
        assert samples in needed


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e10, 1e19])
def test_the_scale_of_values_does_not_change_their_error(unit: float) -> None:
    torch.manual_seed(0)
    keys, values, query = torch.randn(5000, 16), torch.randn(5000, 4), torch.randn(8, 16)

    def error_at(scale: float) -> Tensor:
        store = SoftKVStore(16, 4)
        store.add(keys, scale * values)
        return store.read(query, "topk", k=8, tail_samples=100, generator=torch.Generator().manual_seed(0)).error

    assert allclose(error_at(unit), error_at(1.0), rtol=1e-3)
