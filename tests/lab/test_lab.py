"""Compare the figures of the lab with plain loops over queries, rows and settings."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from support import reference
from torch import Tensor

import softdb
from softdb import SoftKVStore, lab
from softdb.cli.demo import load_senses
from softdb.lab.comparison import QUERIES_PER_READ
from softdb.lab.tables import Line, merge_equal_lines
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.normalizers import NORMALIZERS, SPARSE_NORMALIZERS, is_random, is_sparse

ROWS, QUERIES, DIM, WIDTH = 60, 9, 6, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["scaled_dot", "cosine", "l2"])
def metric(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(metric: str = "scaled_dot", **options: object) -> tuple[SoftKVStore, Tensor]:
    store = SoftKVStore(DIM, WIDTH, metric=metric, temperature=0.4, dtype=torch.float64, **options)
    store.add(torch.randn(ROWS, DIM), torch.randn(ROWS, WIDTH), ids=torch.randperm(1000)[:ROWS])
    return store, torch.randn(QUERIES, DIM, dtype=torch.float64)


def weights_of(scores: Tensor, mode: str, k: int | None, normalizer: str, noise: Tensor) -> Tensor:
    """Compute the weights of all rows for one query, row by row."""
    # With a sparse normalizer, k is doubled until the candidates contain all rows with weight.
    few = k if mode == "topk" and not is_sparse(normalizer) else 1 if mode == "hard" else None
    rows = scores.sort(descending=True, stable=True).indices[:few]
    seen = torch.full_like(scores, -math.inf)
    seen[rows] = scores[rows]
    if mode == "hard":
        return torch.softmax(seen, 0)
    if is_sparse(normalizer):
        return SPARSE_NORMALIZERS[normalizer](seen)
    if normalizer == "softmax":
        return torch.softmax(seen, 0)
    hard = torch.zeros_like(scores)
    hard[(seen + (noise if is_random(normalizer) else 0.0)).argmax()] = 1.0
    return hard


def test_figures_equal_those_of_a_plain_loop(metric: str) -> None:
    store, queries = make(metric)
    targets = torch.randint(WIDTH, (QUERIES,))
    generator = torch.Generator().manual_seed(4)
    found = lab.compare(
        store,
        queries,
        ks=(1, 3, 200),
        temperatures=(0.05, 2.0, 0.4),
        normalizers=NORMALIZERS,
        targets=targets,
        generator=generator,
    )
    assert [row.temperature for row in found.settings[:: len(found.settings) // 3]] == [2.0, 0.4, 0.05]
    assert len(found.settings) == 3 * (1 + 4 * len(NORMALIZERS))
    assert (found.metric, found.queries) == ("accuracy", QUERIES)
    raw = reference.scores(queries, store.keys[:ROWS], metric)
    values = store.values[:ROWS]
    draws = torch.Generator().manual_seed(4)
    for row in found.settings:
        noise = torch.zeros(QUERIES, ROWS)
        if is_random(row.normalizer):
            noise = GumbelNoise.draw(draws).at(torch.arange(QUERIES), torch.arange(ROWS), torch.float64)
        apart = size = agreed = mass = entropy = effective = right = 0.0
        for query in range(QUERIES):
            scores = raw[query] / row.temperature
            exact = torch.softmax(scores, 0)
            weights = weights_of(scores, row.mode, row.k, row.normalizer, noise[query])
            answer, wanted = weights @ values, exact @ values
            apart += float((answer - wanted).square().sum())
            size += float(wanted.square().sum())
            agreed += bool(weights.argmax() == scores.argmax())
            mass += float(exact[weights > 0].sum())
            held = weights[weights > 0]
            spread = float(-(held * held.log()).sum())
            entropy += spread
            effective += math.exp(spread)
            right += bool(answer.argmax() == targets[query])
        assert row.distance == pytest.approx(math.sqrt(apart / size), abs=1e-6), row
        assert row.agreement == pytest.approx(agreed / QUERIES), row
        assert row.mass == pytest.approx(mass / QUERIES, abs=1e-6), row
        assert row.entropy == pytest.approx(entropy / QUERIES, abs=1e-6), row
        assert row.effective_rows == pytest.approx(effective / QUERIES, rel=1e-6), row
        assert row.metric == pytest.approx(right / QUERIES), row
        assert row.time > 0


def test_float32_stores_have_the_same_figures() -> None:
    store, queries = make()
    narrow = SoftKVStore(DIM, WIDTH, temperature=0.4)
    narrow.add(store.keys[:ROWS], store.values[:ROWS], ids=store.ids)
    wide, found = (lab.compare(s, q, ks=(3,)) for s, q in ((store, queries), (narrow, queries.float())))
    for row, wanted in zip(found.settings, wide.settings, strict=True):
        assert row.name == wanted.name
        for field in ("distance", "mass", "entropy"):
            assert getattr(row, field) == pytest.approx(getattr(wanted, field), abs=2e-6), (row, field)


def test_hard_reads_are_listed_once_and_equal_the_limits_of_topk() -> None:
    store, queries = make()
    found = lab.compare(store, queries, ks=(1, ROWS), normalizers=("softmax", "sparsemax"), temperatures=(0.4,))
    names = [row.name for row in found.settings]
    assert names == ["exact", "exact sparsemax", "topk 1", "topk 60", "topk 1 sparsemax", "topk 60 sparsemax", "hard"]
    rows = dict(zip(names, found.settings, strict=True))
    assert rows["exact"].distance == 0
    assert rows["exact"].time == pytest.approx(1)
    assert rows["topk 60"].distance < 1e-9
    assert rows["topk 1"].distance == rows["hard"].distance
    assert rows["hard"].entropy == 0


@pytest.mark.slow
def test_equal_rows_count_as_agreement() -> None:
    keys = torch.randn(20, DIM)
    for metric in ("l2", "cosine", "scaled_dot"):
        store = SoftKVStore(DIM, WIDTH, metric=metric)
        store.add(torch.cat([keys, 3 * keys if metric == "cosine" else keys]), torch.randn(40, WIDTH))
        found = lab.compare(store, torch.randn(200, DIM), ks=(4,), normalizers=("softmax", "sparsemax"))
        assert all(row.agreement == 1 for row in found.settings), metric


@pytest.mark.slow
def test_many_queries_are_read_in_batches() -> None:
    store, _ = make()
    queries, sizes = torch.randn(QUERIES_PER_READ + 200, DIM, dtype=torch.float64), set[int]()

    class Counted:
        temperature = store.temperature

        def read(self, query: Tensor, *args: object, **options: object) -> softdb.Read:
            sizes.add(len(query))
            return store.read(query, *args, **options)

    options = {"ks": (3,), "normalizers": ("softmax", "entmax15")}
    found = lab.compare(Counted(), queries, **options).settings
    assert {QUERIES_PER_READ, 200} <= sizes
    assert max(sizes) == QUERIES_PER_READ
    parts = [lab.compare(store, part, **options).settings for part in queries.split([QUERIES_PER_READ, 200])]
    for row, first, second in zip(found, *parts, strict=True):
        way = {"mode": row.mode, "k": row.k, "temperature": row.temperature}
        if row.mode != "hard":
            way["normalizer"] = row.normalizer
        blend = store.read(queries, temperature=row.temperature).values
        distance = (store.read(queries, **way).values - blend).norm() / blend.norm()
        assert row.distance == pytest.approx(float(distance))
        for figure in ("agreement", "mass", "entropy"):
            mean = (QUERIES_PER_READ * getattr(first, figure) + 200 * getattr(second, figure)) / len(queries)
            assert getattr(row, figure) == pytest.approx(mean)


def test_targets_are_classes_or_values_or_for_a_metric() -> None:
    store, queries = make()
    wanted = torch.randn(QUERIES, WIDTH, dtype=torch.float64)
    found = lab.compare(store, queries, modes=("hard",), temperatures=(1.0,), targets=wanted)
    answer = store.read(queries, "hard").values
    assert found.metric == "loss"
    assert found.settings[0].metric == pytest.approx(float((answer - wanted).square().mean()))

    def furthest(values: Tensor, targets: Tensor) -> Tensor:
        return (values - targets).abs().max()

    found = lab.compare(store, queries, modes=("hard",), temperatures=(1.0,), targets=wanted, metric=furthest)
    assert found.metric == "furthest"

    def distance(values: Tensor, targets: Tensor) -> float:
        return 42.0

    other = lab.compare(store, queries, modes=("hard",), temperatures=(1.0,), targets=wanted, metric=distance).to_dict()
    assert other["metric"] == [42.0]
    assert other["distance"] != [42.0]
    small = torch.arange(QUERIES).to(torch.uint8) % WIDTH
    assert lab.compare(store, queries, modes=("hard",), targets=small).metric == "accuracy"
    assert found.to_dict()["furthest"] == [pytest.approx(float(furthest(answer, wanted)))]


def test_an_empty_store_raises() -> None:
    store = SoftKVStore(DIM, WIDTH)
    with pytest.raises(softdb.ArgumentError, match="store: expected at least one row, got none"):
        lab.compare(store, torch.randn(3, DIM), ks=(2,), normalizers=NORMALIZERS)
    with pytest.raises(softdb.ArgumentError, match="store: expected at least one row, got none"):
        lab.explain(store, torch.randn(DIM))


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1e-4, 1e4, 1e30])
def test_figures_at_extreme_temperatures(temperature: float) -> None:
    store = SoftKVStore(DIM, WIDTH)
    store.add(torch.randn(300, DIM), torch.randn(300, WIDTH))
    found = lab.compare(store, torch.randn(50, DIM), ks=(4,), temperatures=(temperature,), normalizers=NORMALIZERS)
    for row in found.settings:
        if not is_random(row.normalizer) or temperature < 1:
            assert row.agreement == 1, row
        if temperature < 1e-4:
            assert (row.mass, row.effective_rows) == (pytest.approx(1), pytest.approx(1)), row


def test_comparisons_work_in_inference_mode() -> None:
    store, queries = make()
    wanted = lab.compare(store, queries, ks=(3,))
    with torch.inference_mode():
        found = lab.compare(store, queries + 0.0, ks=(3,))
        assert lab.explain(store, queries + 0.0, k=2).ids.shape == (QUERIES, 2)
        lab.compare_gradients(store, queries + 0.0, lambda values: values.sum(), draws=2)
    for row, other in zip(found.settings, wanted.settings, strict=True):
        assert (row.distance, row.mass, row.entropy) == (other.distance, other.mass, other.entropy)


def test_any_object_with_read_is_compared() -> None:
    store, queries = make()

    class Other:
        def read(self, query: Tensor, mode: str = "exact", k: int | None = None, **options: object) -> softdb.Read:
            return store.read(query, mode, k=k, **options)

    options = {"ks": (2,), "temperatures": (0.4,)}
    found, wanted = lab.compare(Other(), queries, **options), lab.compare(store, queries, **options)
    assert [row.distance for row in found.settings] == [row.distance for row in wanted.settings]
    assert lab.compare(Other(), queries, modes=("hard",)).settings[0].temperature == 8.0


def test_agreement_reports_rows_that_an_approximate_index_misses() -> None:
    store = SoftKVStore(DIM, WIDTH, index=softdb.IndexConfig("IVF64,Flat", recall=0.5))
    store.add(torch.randn(20_000, DIM), torch.randn(20_000, WIDTH))
    store.build_index()
    queries = torch.randn(200, DIM)
    found = lab.compare(store, queries, modes=("topk",), ks=(1,), temperatures=(0.1,)).settings[0]
    wanted = store.read(queries, "topk", k=1).ids == store.read(queries, "hard").ids
    assert found.agreement == pytest.approx(float(wanted.float().mean()))
    assert found.agreement < 1


BAD = [
    (dict(queries=torch.zeros(3)), softdb.ShapeError, "queries: "),
    (dict(queries=torch.zeros(0, DIM)), softdb.ShapeError, "queries: expected at least one, got none"),
    (dict(queries=torch.full((2, DIM), torch.nan)), softdb.NonFiniteError, "queries: "),
    (dict(modes=("soft",)), softdb.ArgumentError, "modes: expected one of 'exact'"),
    (dict(modes=()), softdb.ArgumentError, "modes: expected at least one"),
    (dict(modes="exact"), softdb.DtypeError, r"modes: expected a sequence, got 'exact'; pass \('exact',\)"),
    (dict(normalizers=("relu",)), softdb.ArgumentError, "normalizers: expected one of 'softmax'"),
    (dict(ks=(0,)), softdb.ArgumentError, "ks: expected an integer of at least 1, got 0"),
    (dict(temperatures=(0.0,)), softdb.ArgumentError, "temperature: expected a finite number above 0"),
    (dict(targets=torch.zeros(5)), softdb.ShapeError, "targets: expected a tensor with one entry for each of 9"),
    (dict(targets=torch.zeros(QUERIES, 2)), softdb.ShapeError, r"targets: expected the shape of the values, \(9, 4\)"),
    (dict(targets=torch.zeros(QUERIES) > 1), softdb.ShapeError, "targets: expected classes"),
    (
        dict(targets=torch.arange(QUERIES) - 1),
        softdb.ArgumentError,
        "targets: expected classes from 0 to 3",
    ),
    (dict(temperatures=1.0), softdb.DtypeError, "temperatures: expected a sequence, got 1.0"),
    (
        dict(targets=torch.zeros(QUERIES), metric=lambda values, targets: "good"),
        softdb.DtypeError,
        r"metric\(values, targets\): expected a number, got str 'good'",
    ),
    (
        dict(metric=lambda values, targets: 0.0),
        softdb.ArgumentError,
        "targets: expected the targets that metric compares",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_raise(change: dict[str, object], error: type[Exception], message: str) -> None:
    store, queries = make()
    with pytest.raises(error, match=message):
        lab.compare(store, **({"queries": queries} | change))


def test_results_convert_to_tables_dictionaries_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, queries = make()
    found = lab.compare(store, queries, ks=(2,), targets=torch.randint(WIDTH, (QUERIES,)))
    out = io.StringIO()
    print(found.table(out))
    assert capsys.readouterr().out == out.getvalue() == str(found) + "\n"
    assert "None" not in str(found)
    assert repr(found.table()) == str(found)
    lines = str(found).splitlines()
    headings = ["read", "temperature", "accuracy", "distance", "agreement", "mass", "effective rows", "time"]
    assert re.split(r" {2,}", lines[0]) == headings
    assert len(lines) == 1 + 18
    columns = found.to_dict()
    assert list(columns) == [
        *("mode", "normalizer", "temperature", "k", "distance", "agreement", "mass", "entropy", "effective_rows"),
        *("time", "accuracy"),
    ]
    assert columns["k"][:3] == [None, 2, None]
    found.to_csv(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["distance"]) for row in rows] == columns["distance"]
    assert rows[0]["k"] == ""


# -- gradients ----------------------------------------------------------------------------------------------


def test_gradient_figures_equal_those_of_plain_reads() -> None:
    store, queries = make()
    direction = torch.randn(QUERIES, WIDTH, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return (values * direction).sum()

    names = ("straight_through", "gumbel", "entmax15")
    generator = torch.Generator().manual_seed(3)
    found = lab.compare_gradients(
        store, queries, loss, temperatures=(0.2, 1.0), normalizers=names, draws=7, generator=generator
    )
    assert found.draws == 7
    assert [(row.temperature, row.normalizer) for row in found.gradients] == [
        (temperature, name) for temperature in (1.0, 0.2) for name in ("softmax", *names)
    ]
    raw, values = reference.scores(queries, store.keys[:ROWS], "scaled_dot"), store.values[:ROWS]
    slope = store.keys[:ROWS] / math.sqrt(DIM)
    draws = torch.Generator().manual_seed(3)
    for row in found.gradients:
        scores = raw / row.temperature

        def through(weights: Tensor, temperature: float = row.temperature) -> Tensor:
            upstream = direction @ values.T
            back = weights * (upstream - (weights * upstream).sum(-1, keepdim=True))
            return back @ slope / temperature

        soft = through(torch.softmax(scores, -1))
        if row.normalizer == "entmax15":
            leaf = queries.clone().requires_grad_()
            weights = SPARSE_NORMALIZERS["entmax15"](
                reference.scores(leaf, store.keys[:ROWS], "scaled_dot") / row.temperature
            )
            gradients = [torch.autograd.grad(loss(weights @ values), leaf)[0]]
        elif is_random(row.normalizer):
            noises = [
                GumbelNoise.draw(draws).at(torch.arange(QUERIES), torch.arange(ROWS), torch.float64) for _ in range(7)
            ]
            gradients = [through(torch.softmax(scores + noise, -1)) for noise in noises]
        else:
            gradients = [soft]
        mean = torch.stack(gradients).mean(0)
        spread = torch.stack([(gradient - mean).square().sum() for gradient in gradients]).mean().sqrt()
        assert row.size == pytest.approx(float(mean.norm()), rel=1e-6)
        assert row.bias == pytest.approx(float((mean - soft).norm() / soft.norm()), abs=1e-6)
        assert row.deviation == pytest.approx(float(spread / soft.norm()), abs=1e-6)
        assert row.cosine == pytest.approx(float((mean * soft).sum() / mean.norm() / soft.norm()), abs=1e-6)
    assert len(str(found).splitlines()) == 9
    assert found.to_dict()["bias"][0] == 0


def test_straight_through_is_unbiased_for_a_linear_loss_only() -> None:
    store, queries = make()
    linear = lab.compare_gradients(store, queries, lambda values: values.sum(), normalizers=("straight_through",))
    assert all(row.bias < 1e-9 for row in linear.gradients)
    bent = lab.compare_gradients(
        store, queries, lambda values: values.square().sum(), normalizers=("straight_through",)
    )
    assert bent.gradients[1].bias > 0.1


def test_a_loss_that_is_not_a_scalar_of_the_values_raises() -> None:
    store, queries = make()
    with pytest.raises(softdb.DtypeError, match="loss: expected a scalar tensor"):
        lab.compare_gradients(store, queries, lambda values: values)
    with pytest.raises(softdb.DtypeError, match="loss: expected a scalar tensor"):
        lab.compare_gradients(store, queries, lambda values: 3.0)
    with pytest.raises(softdb.ArgumentError, match="draws: expected an integer of at least 1"):
        lab.compare_gradients(store, queries, lambda values: values.sum(), draws=0)


# -- explain ---------------------------------------------------------------------------------------------


def test_contributions_sum_to_the_answer(metric: str) -> None:
    store, queries = make(metric)
    store.delete(store.ids[[3, 10]])
    found = lab.explain(store, queries, k=ROWS - 2, temperatures=(0.1, 0.4))
    read = store.read(queries)
    assert torch.allclose(found.contributions.sum(1), read.values)
    assert torch.allclose(found.values, read.values)
    assert torch.allclose(found.rest, torch.zeros(QUERIES, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.cooling[:, 0], found.weights)
    assert found.temperatures == (0.4, 0.1)
    some = lab.explain(store, queries[0], k=5)
    assert some.ids.shape == (1, 5)
    assert torch.equal(some.ids[0], found.ids[0, :5])
    assert float(some.rest) == pytest.approx(1 - float(found.weights[0, :5].sum()))
    held = found.weights[0]
    assert float(some.effective_rows) == pytest.approx(math.exp(float(torch.special.entr(held).sum())))


def test_rows_and_queries_have_their_labels() -> None:
    store, queries = make()
    names = [f"<{id}>" for id in store.ids.tolist()]
    found = lab.explain(store, queries[:2], names, k=3, query_labels=["first", "second"])
    for id, name in found.labels.items():
        assert name == f"<{id}>"
    assert set(found.labels) == set(found.ids.flatten().tolist())
    assert str(found).startswith("first  (temperature 0.4)\n")
    assert "\n\nsecond  (temperature 0.4)\n" in str(found)
    assert all(len(line) <= 79 for line in str(found).splitlines())
    assert torch.equal(
        lab.explain(store, queries, temperature=1.0).weights, store.read(queries, k=10, temperature=1.0).weights
    )
    best = int(found.ids[0, 0])
    assert lab.explain(store, queries[0], {best: "the best"}, k=2).labels[best] == "the best"
    assert lab.explain(store, queries[0], k=2).labels[best] == f"row {best}"
    with pytest.raises(softdb.ShapeError, match="labels: expected one for each of 60 rows"):
        lab.explain(store, queries[0], ["a", "b"])
    with pytest.raises(softdb.ShapeError, match="query_labels: expected one for each of 9 queries, got 1"):
        lab.explain(store, queries, query_labels=["a"])


def test_negative_contributions_keep_their_sign() -> None:
    store = SoftKVStore(2, 1)
    store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[-1.0], [-2.0]]))
    assert "adds    -0.944" in str(lab.explain(store, torch.tensor([1.0, 0.0])))
    wide, queries = make()
    assert "adds a vector of norm" in str(lab.explain(wide, queries[0]))


@pytest.mark.slow
def test_labels_are_plotted_literally(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store = SoftKVStore(2, 1)
    store.add(torch.eye(2), torch.eye(2)[:, :1])
    names = ["a $\\frac$ b\n\x1b[31m", "_x_ $5"]
    found = lab.explain(store, torch.eye(2), names, query_labels=["$", "_\\sum_"])
    found.plot(tmp_path / "labels.svg")
    assert "\x1b" not in str(found)
    with pytest.raises(softdb.DtypeError, match="labels: expected a sequence of strings"):
        lab.explain(store, torch.eye(2), "ab")
    with pytest.raises(softdb.DtypeError, match="query_labels: expected a sequence of strings, got str 'ab'"):
        lab.explain(store, torch.eye(2), query_labels="ab")
    with pytest.raises(softdb.ShapeError, match="query: expected shape"):
        lab.explain(store, torch.zeros(0, 2))


def test_the_context_decides_which_bank_is_found() -> None:
    senses = load_senses()
    store = SoftKVStore(384, 3, metric="cosine", temperature=0.05)
    store.add(senses.keys, senses.parts_of_speech())
    sentences = ["the river bank was steep", "she checked her bank account"]
    queries = torch.stack([senses.query(sentence) for sentence in sentences])
    found = lab.explain(store, queries, [str(row) for row in senses.rows], query_labels=sentences)
    assert found.labels[int(found.ids[0, 0])].startswith("bank (noun): sloping land")
    assert "bank account" in found.labels[int(found.ids[1, 0])]
    assert float(found.weights[0, 0]) > 0.8


# -- plots -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_results_plot_themselves(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    store, queries = make()
    targets = torch.randint(WIDTH, (QUERIES,))
    path = tmp_path / f"plot.{ending}"
    made = [
        lab.compare(store, queries, ks=(1, 4), normalizers=NORMALIZERS, targets=targets),
        lab.compare(store, queries, modes=("exact", "hard"), temperatures=(0.4,)),
        lab.compare_gradients(store, queries, lambda values: values.square().sum(), draws=2),
        lab.explain(store, queries[:3]),
        lab.explain(store, queries[0], k=3),
    ]
    for found in made:
        found.plot(path)
        assert path.stat().st_size > 5_000
        path.unlink()
    for name in ("plot.nothing", "plot"):
        with pytest.raises(softdb.ArgumentError, match="path: expected an image file"):
            made[1].plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plots_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    store, queries = make()
    with pytest.raises(softdb.SoftDBError, match=r"pip install 'softdb\[plot\]'"):
        lab.explain(store, queries).plot(tmp_path / "plot.png")


def test_comparisons_work_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    store, queries = make()
    assert lab.compare(store, queries, modes=("hard",)).settings


def test_gumbel_requires_training_mode() -> None:
    store = SoftKVStore(8, 2)
    store.add(torch.randn(20, 8), torch.randn(20, 2))
    store.eval()
    queries = torch.randn(5, 8)
    with pytest.raises(softdb.ArgumentError, match=r"store: expected training mode.*; call store\.train\(\)"):
        lab.compare(store, queries, normalizers=("softmax", "gumbel"))
    with pytest.raises(softdb.ArgumentError, match="store: expected training mode"):
        lab.compare_gradients(store, queries, lambda values: values.square().mean())
    lab.compare_gradients(store, queries, lambda values: values.square().mean(), normalizers=("straight_through",))


# -- tables ----------------------------------------------------------------------------------------------


def test_equal_settings_of_one_temperature_share_a_line() -> None:
    store, queries = make()
    found = lab.compare(store, queries, ks=(1, 60, 100), temperatures=(0.4,))
    names = [line.split("  ")[0] for line in str(found).splitlines()[1:]]
    assert names == ["exact = topk 60, 100", "topk 1 = hard"]
    assert len(found.settings) == len(found.to_dict()["mode"]) == 5


def test_equal_settings_of_consecutive_temperatures_share_a_line() -> None:
    lines = [
        Line(name, temperature, (figure,))
        for temperature, figures in ((4.0, "aa"), (2.0, "ab"), (1.0, "ab"), (0.5, "aa"))
        for name, figure in zip(("exact", "hard"), figures, strict=True)
    ]
    assert merge_equal_lines(lines) == [
        ["exact = hard", "4", "a"],
        ["exact", "2 to 1", "a"],
        ["hard", "2 to 1", "b"],
        ["exact = hard", "0.5", "a"],
    ]


def test_merged_lines_show_the_range_of_their_times() -> None:
    names = ("exact", "topk 4", "topk 4 entmax15", "topk 16", "hard")
    lines = [Line(name, 1.0, ("a",), time) for name, time in zip(names, (1.0, 2.0, 12.0, 3.0, 0.5), strict=True)]
    assert merge_equal_lines(lines) == [["exact = topk 4, 16 = topk 4 entmax15 = hard", "1", "a", "0.50 to 12.00"]]
    assert merge_equal_lines([Line("exact", 1.0, ("a",), 1.0)]) == [["exact", "1", "a", "1.00"]]


def test_equal_rows_of_an_explanation_share_a_line() -> None:
    store = SoftKVStore(2, 1)
    store.add(torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]]), torch.ones(4, 1))
    found = lab.explain(store, torch.tensor([1.0, 0.0]), ["east"] * 3 + ["north"])
    lines = found.table().splitlines()
    assert lines[1].endswith("east  (3 equal rows)")
    assert lines[2].endswith("north")
    assert len(lines) == 5


# -- explanations by other normalizers -------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_explain_reads_by_a_normalizer(normalizer: str) -> None:
    store, queries = make()

    def seeded() -> dict[str, torch.Generator]:
        return {"generator": torch.Generator().manual_seed(5)} if normalizer == "gumbel" else {}

    found = lab.explain(store, queries, k=ROWS, temperatures=(0.4,), normalizer=normalizer, **seeded())
    read = store.read(queries, k=ROWS, normalizer=normalizer, **seeded())
    assert torch.equal(found.ids, read.ids)
    assert torch.allclose(found.weights, read.weights)
    assert torch.allclose(found.values, read.values)
    assert torch.allclose(found.contributions.sum(1), read.values)
    assert torch.allclose(found.effective_rows, torch.special.entr(read.weights).sum(-1).exp())
    assert found.normalizer == normalizer
    assert (f", {normalizer})" in str(found)) is (normalizer != "softmax")
    if normalizer != "gumbel":
        assert torch.allclose(found.cooling[:, 0], found.weights)
    few = lab.explain(store, queries, k=2, normalizer=normalizer, **seeded())
    assert torch.allclose(few.effective_rows, found.effective_rows)
    assert torch.allclose(few.rest, 1 - few.weights.sum(-1), atol=1e-9)


def test_explain_by_gumbel_reports_the_normalizer_of_eval_mode() -> None:
    store, queries = make()
    assert lab.explain(store.eval(), queries, normalizer="gumbel").normalizer == "straight_through"


def test_explain_checks_the_normalizer() -> None:
    store, queries = make()
    with pytest.raises(softdb.ArgumentError, match="normalizer: expected one of 'softmax'"):
        lab.explain(store, queries, normalizer="relu")
    with pytest.raises(softdb.ArgumentError, match="generator: "):
        lab.explain(store, queries, generator=torch.Generator())


def test_a_row_labeled_none_has_the_default_label() -> None:
    store, queries = make()
    found = lab.explain(store, queries[0], [None] * ROWS)
    assert "None" not in str(found)


# -- axes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_axes_of_fractions_end_at_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from softdb.lab import comparison

    figures = []

    def create(*arguments: object) -> object:
        figures.append(create_figure(*arguments))
        return figures[-1]

    create_figure = comparison.create_figure
    monkeypatch.setattr(comparison, "create_figure", create)
    store, queries = make()

    def accuracy(values: Tensor, targets: Tensor) -> float:
        return 70.0

    targets = torch.randint(WIDTH, (QUERIES,))
    for options in ({}, {"targets": targets}, {"targets": targets, "metric": accuracy}):
        lab.compare(store, queries, ks=(2,), **options).plot(tmp_path / "plot.png")
    limits = [[axes.get_ylim() for axes in figure.axes[2:4]] for figure in figures]
    assert limits[0] == limits[1] == [(0, 1), (0, 1)]  # mass, accuracy
    assert limits[2][0][1] > 70  # in percent
