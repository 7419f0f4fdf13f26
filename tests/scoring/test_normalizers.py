"""From scores to weights."""

from __future__ import annotations

import math

import pytest
import torch

from softdb import Read, SoftKVStore
from softdb.errors import ArgumentError, DtypeError
from softdb.functional import merge, soft_read
from softdb.scoring.gumbel import GumbelNoise
from softdb.scoring.normalizers import NORMALIZERS, SPARSE_NORMALIZERS, check_normalizer, softmax, straight_through


def test_softmax_is_torch_softmax() -> None:
    scores = torch.randn(4, 7).double().requires_grad_()
    weights, lse = softmax(scores)
    assert torch.allclose(weights, torch.softmax(scores, -1))
    assert torch.allclose(lse, torch.logsumexp(scores, -1))
    assert torch.autograd.gradcheck(softmax, (scores,))
    assert torch.autograd.gradgradcheck(softmax, (scores,))


def test_masking_equals_deleting_and_nothing_is_zero() -> None:
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


def test_straight_through_passes_the_value_of_one_and_the_gradient_of_the_other() -> None:
    hard, soft = torch.tensor([1e30, 1.0], requires_grad=True), torch.tensor([0.1, 0.2], requires_grad=True)
    result = straight_through(hard, soft)
    assert torch.equal(result, hard)
    (result * torch.tensor([3.0, 4.0])).sum().backward()
    assert hard.grad is None
    assert soft.grad.tolist() == [3.0, 4.0]


# -- sparse ----------------------------------------------------------------------------------------------


SPARSE_NAMES = sorted(SPARSE_NORMALIZERS)


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sparse_weights_are_those_of_the_entmax_package_over_a_thousand_cases(name: str) -> None:
    entmax = pytest.importorskip("entmax")
    theirs = {"sparsemax": entmax.sparsemax, "entmax15": entmax.entmax15}[name]
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
        found, wanted = SPARSE_NORMALIZERS[name](scores / temperature), theirs(scores / temperature, dim=-1)
        assert torch.allclose(found, wanted, atol=1e-9, rtol=0)
        ours = torch.autograd.grad(found, (scores, temperature), upstream)
        others = torch.autograd.grad(wanted, (scores, temperature), upstream)
        # On the edge of the support either side is a gradient; ties of whole numbers lie there.
        if case % 5:
            assert torch.allclose(ours[0], others[0], atol=1e-8, rtol=1e-6)
            assert torch.allclose(ours[1], others[1], atol=1e-8 * max(1.0, scale), rtol=1e-6)


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sparse_weights_by_their_definition(name: str) -> None:
    scores = torch.tensor([[3.0, 2.9, 2.5, -4.0], [0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    weights = SPARSE_NORMALIZERS[name](scores)
    assert torch.allclose(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(weights[1], torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(weights[2], torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    z = scores if name == "sparsemax" else scores / 2
    thresholds = z - (weights if name == "sparsemax" else weights.sqrt())  # equal wherever there is weight
    assert torch.allclose(thresholds[0, :3], thresholds[0, 0].expand(3))
    assert z[0, 3] < thresholds[0, 0]


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sparse_weights_have_exact_derivatives(name: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SPARSE_NORMALIZERS[name], scores)
    assert torch.autograd.gradgradcheck(SPARSE_NORMALIZERS[name], scores)


@pytest.mark.parametrize("name", SPARSE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_weights_where_rows_are_hidden_or_nothing_is_there(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    raw = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    hidden = torch.rand(3, 6) < 0.4
    hidden[1], hidden[:, 0] = True, torch.tensor([False, True, False])
    weights = SPARSE_NORMALIZERS[name](raw.masked_fill(hidden, -math.inf))
    assert (weights[hidden] == 0).all()
    for row in (0, 2):
        assert torch.allclose(weights[row, ~hidden[row]], SPARSE_NORMALIZERS[name](raw[row, ~hidden[row]]))
    weights.square().sum().backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[hidden] == 0).all()
    assert SPARSE_NORMALIZERS[name](torch.zeros(3, 0)).shape == (3, 0)
    assert SPARSE_NORMALIZERS[name](torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", SPARSE_NAMES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 1e8])
def test_sparse_weights_sum_to_one_at_any_scale(name: str, size: float) -> None:
    torch.manual_seed(0)
    for width in (1, 7, 3000):
        scores = size * torch.randn(5, width)
        weights = SPARSE_NORMALIZERS[name](scores)
        assert torch.allclose(weights.sum(-1), torch.ones(5), atol=1e-4)
        wanted = SPARSE_NORMALIZERS[name](scores.double()).float()
        assert torch.allclose(weights, wanted, atol=1e-4)


# -- chance ----------------------------------------------------------------------------------------------


def test_noise_is_gumbel_and_independent() -> None:
    noise = GumbelNoise(seed=7).at(torch.arange(1000), torch.arange(2000), torch.float64)
    assert noise.shape == (1000, 2000)
    ordered = noise.flatten().sort().values
    wanted = torch.exp(-torch.exp(-ordered))
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert float((wanted - steps).abs().max()) < 2 / math.sqrt(len(ordered))  # Kolmogorov and Smirnov
    uniform = torch.exp(-torch.exp(-noise)) - 0.5
    for rows, columns in ((1, 0), (0, 1), (1, 1), (7, 64)):
        shifted = uniform.roll((rows, columns), dims=(0, 1))
        correlation = (uniform * shifted).mean() * 12
        assert abs(float(correlation)) < 5 / math.sqrt(noise.numel())
    other = torch.exp(-torch.exp(-GumbelNoise(seed=8).at(torch.arange(1000), torch.arange(2000), torch.float64)))
    assert abs(float((uniform * (other - 0.5)).mean() * 12)) < 5 / math.sqrt(noise.numel())


def test_noise_belongs_to_query_and_row_whatever_they_stand_beside() -> None:
    noise = GumbelNoise(seed=7)
    whole = noise.at(torch.arange(5), torch.arange(100), torch.float32)
    rows = torch.tensor([[3, 99], [50, 0]])
    some = noise.at(torch.tensor([[1], [4]]), rows, torch.float32).squeeze(1)
    assert torch.equal(some, whole[[1, 4]].gather(1, rows))
    assert whole.isfinite().all()


def test_seeds_come_from_the_generator() -> None:
    first, again = (GumbelNoise.draw(torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again
    torch.manual_seed(3)
    assert GumbelNoise.draw(None) != GumbelNoise.draw(None)


@pytest.mark.parametrize("options", [{}, {"k": 5}, {"mode": "topk", "k": 5}])
def test_a_store_in_eval_mode_reads_the_best_row_instead_of_drawing_one(options: dict[str, object]) -> None:
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
    wanted, found = read("straight_through"), read("gumbel", generator=generator)
    assert torch.equal(generator.get_state(), state)  # nothing is drawn from it
    assert found.normalizer == "straight_through"
    for name in ("values", "ids", "weights", "scores", "lse", "mass"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True)
    slopes = [torch.autograd.grad(one.values.square().sum(), query)[0] for one in (found, wanted)]
    assert torch.equal(*slopes)
    with pytest.raises(ArgumentError, match="reads: expected reads with softmax weights"):
        merge([found])
    for bad, error in ((7, DtypeError), ("cpu", DtypeError)):
        with pytest.raises(error, match="generator: expected a"):
            read("gumbel", generator=bad)
    with pytest.raises(ArgumentError, match="generator: expected nothing"):
        read("straight_through", generator=generator)
    store.train()
    assert not torch.equal(read("gumbel").values, read("gumbel").values)
    with torch.no_grad():
        drawn = [soft_read(query, store.keys, store.values, normalizer="gumbel").values for _ in range(2)]
    assert not torch.equal(*drawn)  # a function knows no mode


def test_names() -> None:
    for name in NORMALIZERS:
        check_normalizer(name)
    with pytest.raises(ArgumentError, match=r"normalizer: expected one of 'softmax', .* got 'relu'"):
        check_normalizer("relu")
    with pytest.raises(ArgumentError, match="generator: expected nothing, since nothing is random with 'sparsemax'"):
        check_normalizer("sparsemax", torch.Generator())
    check_normalizer("gumbel", torch.Generator())
    with pytest.raises(DtypeError, match=r"generator: expected a torch\.Generator, got int 3"):
        check_normalizer("gumbel", 3)
