"""Tests of normalizers; those of properties run over every registered normalizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import reference
from support.contract import Problem
from support.tolerances import allclose, assert_close, largest_error
from torch import Tensor

from softdb import Read, SoftKVStore
from softdb.errors import ArgumentError, DtypeError, NonFiniteError
from softdb.functional import merge, soft_read
from softdb.lab.comparison import NORMALIZER_STYLES
from softdb.lab.page_charts import NORMALIZER_DASHES
from softdb.scoring import normalizers
from softdb.scoring.gumbel import GumbelNoise, hash_number, splitmix64
from softdb.scoring.normalizers import (
    NORMALIZERS,
    REGISTRY,
    SPARSE_NORMALIZERS,
    check_normalizer,
    get_eval_normalizer,
    is_hard,
    is_random,
    is_sparse,
    reports_rows,
    softmax,
    straight_through,
)

pytestmark = pytest.mark.each_device


def test_softmax_equals_torch_softmax() -> None:
    scores = torch.randn(4, 7).double().requires_grad_()
    weights, lse = softmax(scores)
    assert allclose(weights, torch.softmax(scores, -1))
    assert allclose(lse, torch.logsumexp(scores, -1))
    assert torch.autograd.gradcheck(softmax, (scores,))
    assert torch.autograd.gradgradcheck(softmax, (scores,))


def test_softmax_of_hidden_scores_equals_softmax_without_them() -> None:
    raw = torch.randn(3, 5, requires_grad=True)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[:, 3:] = True
    hidden[1] = True
    weights, lse = softmax(raw.masked_fill(hidden, -math.inf))
    kept, kept_lse = softmax(raw[[0, 2], :3])
    assert torch.equal(weights[[0, 2], :3], kept)
    assert torch.equal(lse[[0, 2]], kept_lse)
    assert (weights[1] == 0).all()
    assert lse[1] == -math.inf
    (weights.square().sum() + lse[[0, 2]].sum()).backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[hidden] == 0).all()


def test_softmax_of_no_columns() -> None:
    weights, lse = softmax(torch.zeros(3, 0))
    assert weights.shape == (3, 0)
    assert (lse == -math.inf).all()


def test_straight_through_returns_hard_and_passes_the_gradient_to_soft() -> None:
    hard, soft = torch.tensor([1e30, 1.0], requires_grad=True), torch.tensor([0.1, 0.2], requires_grad=True)
    result = straight_through(hard, soft)
    assert torch.equal(result, hard)
    (result * torch.tensor([3.0, 4.0])).sum().backward()
    assert hard.grad is None
    assert soft.grad.tolist() == [3.0, 4.0]


# -- sparse ----------------------------------------------------------------------------------------------


SPARSE_NAMES = sorted(SPARSE_NORMALIZERS)
ROOT = Path(__file__).parents[2]


def load_example() -> Callable[[Tensor], Tensor]:
    """Return the normalizer that CONTRIBUTING.md defines, as if its code were in the module."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def relumax.*?)```", page, re.DOTALL)
    names = dict(vars(normalizers))
    exec(code, names)
    function: Callable[[Tensor], Tensor] = names["relumax"]
    return function


SPARSE_FUNCTIONS = {**SPARSE_NORMALIZERS, "example of CONTRIBUTING": load_example()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sparse_weights_equal_those_of_the_entmax_package(name: str) -> None:
    entmax = pytest.importorskip("entmax")
    theirs = getattr(entmax, name, None)
    if theirs is None:
        pytest.skip(f"entmax has no {name}")
    generator = torch.Generator().manual_seed(0)
    for case in range(1000):
        width = int(torch.randint(1, 40, (), generator=generator))
        scale = 10.0 ** float(torch.empty(()).uniform_(-3, 2, generator=generator))
        scores = scale * torch.randn(3, width, generator=generator, dtype=torch.float64)
        if case % 5 == 0:
            scores = scores.round()  # ties
        temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(3, width, generator=generator, dtype=torch.float64)
        scores.requires_grad_()
        actual, expected = SPARSE_NORMALIZERS[name](scores / temperature), theirs(scores / temperature, dim=-1)
        assert allclose(actual, expected, atol=1e-9, rtol=0)
        ours = torch.autograd.grad(actual, (scores, temperature), upstream)
        others = torch.autograd.grad(expected, (scores, temperature), upstream)
        # On the edge of the support, where ties of whole numbers lie, the derivative is not unique.
        if case % 5:
            assert allclose(ours[0], others[0], atol=1e-8, rtol=1e-6)
            assert allclose(ours[1], others[1], atol=1e-8 * max(1.0, scale), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SPARSE_FUNCTIONS))
def test_sparse_weights_favor_high_scores_and_treat_ties_alike(name: str) -> None:
    scores = torch.tensor([[3.0, 2.9, 2.5, -4.0], [0.0, 0.0, 0.0, 0.0], [900.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    weights = SPARSE_FUNCTIONS[name](scores)
    assert allclose(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (weights[0].diff() <= 0).all()
    assert torch.equal(weights[1], torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(weights[2], torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(SPARSE_FUNCTIONS))
def test_sparse_weights_do_not_depend_on_rows_without_weight(name: str) -> None:
    """The read paths find the rows with weight first and drop the others; a wrong floor of the scores shows here."""
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        scores = scale * torch.randn(30, 50, dtype=torch.float64)
        scores[:, ::2] -= 1e6
        weights = SPARSE_FUNCTIONS[name](scores)
        assert (weights[:, ::2] == 0).all()
        assert allclose(weights[:, 1::2], SPARSE_FUNCTIONS[name](scores[:, 1::2]))
        for one, row in zip(weights, scores, strict=True):
            assert allclose(one[one > 0], SPARSE_FUNCTIONS[name](row[one > 0]))


@pytest.mark.parametrize(("name", "inverse"), [("sparsemax", lambda w: w), ("entmax15", lambda w: 2 * w.sqrt())])
def test_rows_with_sparse_weight_have_one_threshold(name: str, inverse: Callable[[Tensor], Tensor]) -> None:
    scores = torch.tensor([3.0, 2.9, 2.5, -4.0], dtype=torch.float64)
    weights = SPARSE_NORMALIZERS[name](scores)
    thresholds = (scores - inverse(weights))[weights > 0]
    assert allclose(thresholds, thresholds[0])
    assert (scores[weights == 0] < thresholds[0]).all()


@pytest.mark.parametrize("name", sorted(SPARSE_FUNCTIONS))
def test_sparse_weights_pass_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SPARSE_FUNCTIONS[name], scores)
    assert torch.autograd.gradgradcheck(SPARSE_FUNCTIONS[name], scores)


@pytest.mark.parametrize("name", sorted(SPARSE_FUNCTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_weights_of_hidden_scores_and_of_empty_inputs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    raw = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    hidden = torch.rand(3, 6) < 0.4
    hidden[1], hidden[:, 0] = True, torch.tensor([False, True, False])
    weights = SPARSE_FUNCTIONS[name](raw.masked_fill(hidden, -math.inf))
    assert (weights[hidden] == 0).all()
    for row in (0, 2):
        assert allclose(weights[row, ~hidden[row]], SPARSE_FUNCTIONS[name](raw[row, ~hidden[row]]))
    weights.square().sum().backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[hidden] == 0).all()
    assert SPARSE_FUNCTIONS[name](torch.zeros(3, 0)).shape == (3, 0)
    assert SPARSE_FUNCTIONS[name](torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", sorted(SPARSE_FUNCTIONS))
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 1e8])
def test_sparse_weights_sum_to_one_at_any_scale(name: str, size: float) -> None:
    torch.manual_seed(0)
    for width in (1, 7, 3000):
        scores = size * torch.randn(5, width)
        weights = SPARSE_FUNCTIONS[name](scores)
        assert allclose(weights.sum(-1), torch.ones(5), atol=1e-4)
        expected = SPARSE_FUNCTIONS[name](scores.double()).float()
        assert allclose(weights, expected, atol=1e-4)


# -- noise ----------------------------------------------------------------------------------------------


def test_the_hash_of_one_number_equals_that_of_a_tensor() -> None:
    numbers = torch.tensor([0, 1, 5, 2**40, -3, -(2**63)])
    for seed in (0, 1, 2**62, -(2**63), 0x1234567890ABCDEF):
        assert splitmix64(seed, numbers).tolist() == [hash_number(seed, number) for number in numbers.tolist()]


def test_noise_is_gumbel_distributed_and_independent() -> None:
    noise = GumbelNoise(seed=7).at(torch.arange(1000), torch.arange(2000), torch.float64)
    assert noise.shape == (1000, 2000)
    ordered = noise.flatten().sort().values
    expected = torch.exp(-torch.exp(-ordered))
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert float((expected - steps).abs().max()) < 2 / math.sqrt(len(ordered))  # Kolmogorov and Smirnov
    uniform = torch.exp(-torch.exp(-noise)) - 0.5
    for rows, columns in ((1, 0), (0, 1), (1, 1), (7, 64)):
        shifted = uniform.roll((rows, columns), dims=(0, 1))
        correlation = (uniform * shifted).mean() * 12
        assert abs(float(correlation)) < 5 / math.sqrt(noise.numel())
    other = torch.exp(-torch.exp(-GumbelNoise(seed=8).at(torch.arange(1000), torch.arange(2000), torch.float64)))
    assert abs(float((uniform * (other - 0.5)).mean() * 12)) < 5 / math.sqrt(noise.numel())


@pytest.mark.cpu_only
def test_a_refused_query_draws_no_numbers() -> None:
    store = SoftKVStore.from_tensors(torch.randn(5, 2), torch.randn(5, 1))
    generator, query = torch.Generator().manual_seed(0), torch.tensor([[0.0, math.nan]])
    before = generator.get_state()
    for mode, k in (("exact", None), ("topk", 2)):
        with pytest.raises(NonFiniteError, match="query"):
            store.read(query, mode, k, normalizer="gumbel", generator=generator)
    with pytest.raises(NonFiniteError, match="query"):
        soft_read(query, store.keys, store.values, normalizer="gumbel", generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_noise_depends_on_query_and_row_only() -> None:
    noise = GumbelNoise(seed=7)
    whole = noise.at(torch.arange(5), torch.arange(100), torch.float32)
    rows = torch.tensor([[3, 99], [50, 0]])
    some = noise.at(torch.tensor([[1], [4]]), rows, torch.float32).squeeze(1)
    assert torch.equal(some, whole[[1, 4]].gather(1, rows))
    assert whole.isfinite().all()


def test_the_seed_comes_from_the_generator() -> None:
    first, again = (GumbelNoise.draw(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again
    torch.manual_seed(3)
    assert GumbelNoise.draw(None) != GumbelNoise.draw(None)


@pytest.mark.parametrize("options", [{}, {"k": 5}, {"mode": "topk", "k": 5}])
def test_a_store_in_eval_mode_reads_the_best_row_without_noise(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    store = SoftKVStore(4, 3)
    store.add(torch.randn(40, 4), torch.randn(40, 3))
    query = torch.randn(6, 4, requires_grad=True)

    def read(normalizer: str, **more: object) -> Read:
        return store.read(query, normalizer=normalizer, **options, **more)  # type: ignore[arg-type]

    assert read("gumbel").normalizer == "gumbel"
    assert not torch.equal(read("gumbel").values, read("gumbel").values)
    store.eval()
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    expected, actual = read("straight_through"), read("gumbel", generator=generator)
    assert torch.equal(generator.get_state(), state)  # eval mode draws no noise
    assert actual.normalizer == "straight_through"
    for name in ("values", "ids", "weights", "scores", "lse", "mass"):
        assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    slopes = [torch.autograd.grad(one.values.square().sum(), query)[0] for one in (actual, expected)]
    assert torch.equal(*slopes)
    with pytest.raises(ArgumentError, match="reads: expected reads with softmax weights"):
        merge([actual])
    for bad, error in ((7, DtypeError), ("cpu", DtypeError)):
        with pytest.raises(error, match="generator: expected a"):
            read("gumbel", generator=bad)
    with pytest.raises(ArgumentError, match="generator: expected no value"):
        read("straight_through", generator=generator)
    store.train()
    assert not torch.equal(read("gumbel").values, read("gumbel").values)
    with torch.no_grad():
        drawn = [soft_read(query, store.keys, store.values, normalizer="gumbel").values for _ in range(2)]
    assert not torch.equal(*drawn)  # functions have no mode


# -- registry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMALIZERS)
def test_properties_of_each_normalizer_are_consistent(name: str) -> None:
    entry = REGISTRY[name]
    assert is_sparse(name) == (entry.weigh is not None) == (name in SPARSE_NORMALIZERS)
    assert (is_hard(name), is_random(name)) == (entry.is_hard, entry.is_random)
    assert not (is_hard(name) and is_sparse(name))
    assert reports_rows(name) or name == "softmax"
    replacement = get_eval_normalizer(name)
    assert not is_random(replacement)
    assert (replacement == name) == (not is_random(name))
    assert (is_hard(replacement), is_sparse(replacement)) == (is_hard(name), is_sparse(name))
    assert NORMALIZER_STYLES[name]
    assert NORMALIZER_DASHES[name]


@pytest.mark.parametrize("name", NORMALIZERS)
def test_each_normalizer_is_documented(name: str) -> None:
    page, changelog = ((ROOT / path).read_text(encoding="utf-8") for path in ("docs/normalizers.md", "CHANGELOG.md"))
    places = {
        "table in the docstring of softdb/scoring/normalizers.py": f"\n{name} " in (normalizers.__doc__ or ""),
        "first table of docs/normalizers.md": f'\n| `"{name}"`' in page,
        "CHANGELOG.md": f"`{name}`" in changelog,
    }
    missing = [place for place, is_there in places.items() if not is_there]
    assert not missing, f"{name}: expected to be documented, got no mention of it; add a line to each of {missing}"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_exact_reads_equal_dense_weights(name: str) -> None:
    problem = Problem.random(rows=40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1) if is_random(name) else None
    tables = problem.query, problem.keys, problem.values
    exact = soft_read(*tables, k=40, normalizer=name, generator=generator)
    scores = reference.scores(problem.query, problem.keys, problem.metric, problem.temperature)
    if is_random(name):
        seeded = torch.Generator().manual_seed(1)
        scores = scores + GumbelNoise.draw(seeded).at(torch.arange(5), torch.arange(40), torch.float64)
    soft = SPARSE_NORMALIZERS[name](scores) if is_sparse(name) else torch.softmax(scores, -1)
    weights = torch.nn.functional.one_hot(scores.argmax(-1), 40).double() if is_hard(name) else soft
    assert largest_error(exact.values, weights @ problem.values) < 1e-9
    assert largest_error(exact.weights, weights.gather(-1, exact.ids)) < 1e-9
    assert allclose(exact.weights.sum(-1), torch.ones(5, dtype=torch.float64))
    assert exact.normalizer == name
    upstream = torch.randn(5, 3, dtype=torch.float64)
    ours = torch.autograd.grad((exact.values * upstream).sum(), tables)
    expected = torch.autograd.grad((soft @ problem.values * upstream).sum(), tables)
    for mine, other in zip(ours, expected, strict=True):
        assert largest_error(mine, other) < 1e-8


@pytest.mark.parametrize("name", NORMALIZERS)
def test_only_random_normalizers_accept_a_generator(name: str) -> None:
    check_normalizer(name)
    if is_random(name):
        check_normalizer(name, torch.Generator())
        with pytest.raises(DtypeError, match=r"generator: expected a torch\.Generator, got int 3"):
            check_normalizer(name, 3)  # type: ignore[arg-type]
    else:
        with pytest.raises(ArgumentError, match=f"generator: expected no value with normalizer='{name}'"):
            check_normalizer(name, torch.Generator())


def test_an_unknown_normalizer_raises() -> None:
    with pytest.raises(ArgumentError, match=r"normalizer: expected one of 'softmax', .* got 'relu'"):
        check_normalizer("relu")
