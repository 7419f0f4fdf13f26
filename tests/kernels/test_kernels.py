"""Test exact top-k, the exact read in tiles of different shapes, and reads of gathered rows."""

from __future__ import annotations

import math

import pytest
import torch
from support import reference
from support.contract import force_dispatch, force_tiling
from support.tolerances import allclose
from torch import Tensor

from softdb import NonFiniteError
from softdb.filters import Selection
from softdb.kernels.bias import ScoreBias
from softdb.kernels.blocks.exact import exact_read
from softdb.kernels.blocks.topk import exact_top_k, top_k, two_stage_top_k
from softdb.kernels.gather import blend_at, score_at
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling

pytestmark = pytest.mark.each_device


def tied(*shape: int, levels: int = 5, seed: int = 0) -> Tensor:
    """Return scores with many ties and some -inf."""
    scores = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).float()
    return scores.masked_fill(scores == 0, -math.inf)


@pytest.mark.parametrize("width", [1, 2, 31, 500])
@pytest.mark.parametrize("k", [1, 2, 7, 600])
def test_top_k_breaks_ties_towards_the_lowest_index(width: int, k: int) -> None:
    scores = tied(2, 6, width)
    values, index = top_k(scores, k)
    order = scores.sort(dim=-1, descending=True, stable=True)
    assert (values == order.values[..., :k]).all()
    real = values > -math.inf
    assert (index[real] == order.indices[..., :k][real]).all()


@pytest.mark.parametrize("levels", [3, 10_000])
@pytest.mark.parametrize("width", [64, 1000, 4096 + 17])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_two_stage_top_k_equals_top_k(width: int, k: int, levels: int) -> None:
    scores = tied(2, 3, width, levels=levels)
    values, index = two_stage_top_k(scores, k)
    wanted_values, wanted = top_k(scores, k)
    assert (values == wanted_values).all()
    real = values > -math.inf
    assert (index[real] == wanted[real]).all()


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(64, 2), (4096, 7), (2**19, 256)], ids=str)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1000, 3001])
@pytest.mark.parametrize(("few", "maxima"), [(1, 2**23), (1, 50), (10**9, 0)])
def test_exact_top_k_equals_the_reference_for_every_tiling(
    rows: int, tile: tuple[int, int], few: int, maxima: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 0 if tile[0] < 2**19 else 2**17
    gathered = 30 * tile[1]
    tiling = Tiling(
        max_dense_scores=small,
        tile_elements=tile[0],
        max_queries=tile[1],
        one_pass_groups=few,
        max_group_maxima=maxima,
        gathered_elements=gathered,
    )
    force_tiling(tiling, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (9, 3), generator=generator).float()
    keys = torch.randint(-2, 3, (rows, 3), generator=generator).float()  # small whole numbers: many exact ties
    shared = torch.rand(rows, generator=generator) < 0.8
    for selection in (
        Selection(rows),
        Selection(rows, shared=shared),
        Selection(rows).restrict_to(torch.arange(0, rows, 3)),
        Selection(rows, shared=shared).restrict_to(torch.arange(0, rows, 2)),
    ):
        visible = torch.ones(rows, dtype=torch.bool) if selection.shared is None else selection.shared.clone()
        if selection.visited is not None:
            visible &= torch.zeros(rows, dtype=torch.bool).scatter(0, selection.visited, True)
        scores = (query @ keys.T).masked_fill(~visible, -math.inf)
        for k in (1, 5, 50):
            found_scores, found = exact_top_k(query, keys, ReadSpec("dot", None, selection, torch.float32), k)
            wanted = reference.best(scores, k)
            assert (found == wanted).all()
            assert (found_scores.isneginf() == (wanted < 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(64, 2), (4096, 7), (2**19, 256)], ids=str)
@pytest.mark.parametrize(("few", "maxima"), [(1, 2**23), (1, 50), (10**9, 0)])
def test_exact_top_k_adds_a_bias(tile: tuple[int, int], few: int, maxima: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = Tiling(
        max_dense_scores=0 if tile[0] < 2**19 else 2**17,
        tile_elements=tile[0],
        max_queries=tile[1],
        one_pass_groups=few,
        max_group_maxima=maxima,
    )
    force_tiling(tiling, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (9, 3), generator=generator).float()
    keys = torch.randint(-2, 3, (1000, 3), generator=generator).float()
    every_third = Selection(1000).restrict_to(torch.arange(0, 1000, 3))
    for selection, step in ((Selection(1000), 1), (every_third, 3)):
        for shape in ((1, 1, 1000), (1, 9, 1000), (1, 9, 1)):
            bias = torch.randint(-3, 4, shape, generator=generator).float()
            visible = torch.rand(shape, generator=generator) < 0.7
            shown = visible[0] & (torch.arange(1000) % step == 0)
            scores = (query @ keys.T + bias[0]).masked_fill(~shown, -math.inf)
            for k in (1, 5, 50):
                spec = ReadSpec("dot", None, selection.hide(visible), torch.float32, bias=ScoreBias(bias))
                found_scores, found = exact_top_k(query, keys, spec, k)
                wanted = reference.best(scores, k)
                assert torch.equal(found, wanted)
                assert torch.equal(found_scores[wanted >= 0], scores.gather(1, wanted.clamp(min=0))[wanted >= 0])


def test_every_tile_is_visited_once() -> None:
    for groups, queries, rows in ((1, 1, 1), (3, 5, 100), (40, 300, 70), (1, 2000, 100_000)):
        for k in (0, 1, 40):
            spec = ReadSpec("dot", None, Selection(rows), torch.float32)
            tiling = spec.choose_tiles(torch.empty(groups, queries, 8), 0, k)
            seen = 0
            for chunk, block, slices in spec.iterate_tiles(tiling, groups, queries):
                assert isinstance(block.rows, slice)
                for part in slices:
                    area = (part.stop - part.start) * (block.rows.stop - block.rows.start)
                    seen += (chunk.stop - chunk.start) * area
            assert seen == groups * queries * rows


# -- reads in blocks -------------------------------------------------------------------------------------


def read_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, patch: pytest.MonkeyPatch, **options: object
) -> tuple[Tensor, Tensor]:
    force_dispatch("two partitions", patch)
    spec = ReadSpec("dot", None, Selection(len(keys)), query.dtype, **options)  # type: ignore[arg-type]
    values, lse, _ = exact_read(query, keys, values, spec)
    return values, lse


def naive_read(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    scores = query.double() @ keys.double().T
    return torch.softmax(scores, -1) @ values.double(), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("magnitude", [-90.0, -39.0, 0.0, 39.0, 90.0])
def test_scores_of_any_magnitude_give_accurate_reads(magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.ones(9, 1), magnitude + 0.3 * torch.randn(700, 1), torch.randn(700, 3)
    found = read_in_blocks(query, keys, values, monkeypatch)
    wanted = naive_read(query, keys, values)
    assert allclose(found[0].double(), wanted[0], atol=1e-5)
    assert allclose(found[1].double(), wanted[1], atol=1e-4)


def test_a_block_above_the_bound_shifts_earlier_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the first block are within the bound; others are far above or below."""
    torch.manual_seed(0)
    query, values = torch.ones(5, 1), torch.randn(1500, 3)
    keys = torch.cat([torch.randn(600, 1), 300 + torch.randn(300, 1), torch.randn(300, 1) - 500, torch.randn(300, 1)])
    for rows in (600, 900, 1500):
        for order in (slice(None), torch.arange(rows - 1, -1, -1)):
            found = read_in_blocks(query, keys[:rows][order], values[:rows][order], monkeypatch)
            wanted = naive_read(query, keys[:rows], values[:rows])
            assert allclose(found[0].double(), wanted[0], atol=1e-4)
            assert allclose(found[1].double(), wanted[1], rtol=1e-6)


def test_small_gradients_survive_large_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    force_dispatch("two partitions", monkeypatch)
    query, keys, values = torch.ones(4, 1), 38 + 0.5 * torch.randn(900, 1), torch.randn(900, 2)
    spec = ReadSpec("dot", None, Selection(900), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (query, keys, values)]
    found = torch.autograd.grad(exact_read(*leaves, spec)[0], leaves, torch.full((4, 2), 1e-25))
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    wanted = torch.autograd.grad(naive_read(*doubles)[0], doubles, torch.full((4, 2), 1e-25, dtype=torch.float64))
    for mine, other in zip(found, wanted, strict=True):
        assert allclose(mine.double(), other, rtol=1e-3, atol=1e-31)


def test_an_outdated_key_norm_gives_accurate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for magnitude in (-200.0, 200.0):
        query, keys, values = torch.ones(9, 1), magnitude + torch.randn(700, 1), torch.randn(700, 3)
        found = read_in_blocks(query, keys, values, monkeypatch, max_key_norm=lambda: 1.0)
        wanted = naive_read(query, keys, values)
        assert allclose(found[0].double(), wanted[0], atol=1e-4)
        assert allclose(found[1].double(), wanted[1], rtol=1e-6)


@pytest.mark.cpu_only
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("queries", [1, 9])
def test_an_infinite_key_raises_instead_of_being_hidden(
    queries: int, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = torch.randn(700, 8)
    keys[500, 3] = sign * math.inf
    with pytest.raises(NonFiniteError, match="expected finite scores"):
        read_in_blocks(torch.ones(queries, 8), keys, torch.randn(700, 3), monkeypatch)


def test_a_bf16_matmul_rounds_no_more_than_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(9, 8), torch.randn(900, 8), torch.randn(900, 3).bfloat16()
    bf16, lse = read_in_blocks(query, keys, values, monkeypatch, bf16_matmul=True)
    wanted = naive_read(query, keys, values)
    assert allclose(lse.double(), wanted[1], atol=1e-5)
    assert 1e-6 < (bf16 - wanted[0]).abs().max() < 2**-8  # rounded, but by no more than a bfloat16 output


def test_bf16_matmul_needs_bf16_values_and_output_and_no_gradient() -> None:
    tiling = Tiling(has_fast_bf16_matmul=True)
    bf16, fp32 = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1)
    with torch.no_grad():
        assert tiling.can_use_bf16_matmul(bf16, torch.bfloat16)
        assert not tiling.can_use_bf16_matmul(bf16, torch.float32)
        assert not tiling.can_use_bf16_matmul(fp32, torch.bfloat16)
        assert not Tiling().can_use_bf16_matmul(bf16, torch.bfloat16)
    assert not tiling.can_use_bf16_matmul(bf16, torch.bfloat16)  # gradients are enabled


# -- reads of gathered rows ------------------------------------------------------------------------------


def test_scores_and_blends_of_gathered_rows_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    force_tiling(Tiling(gathered_elements=40), monkeypatch)
    query, keys, values = torch.randn(7, 4), torch.randn(30, 4), torch.randn(30, 3)
    numbers = torch.randint(30, (7, 5))
    spec = ReadSpec("dot", None, Selection(30), torch.float32)
    wanted = (query[:, None] * keys[numbers]).sum(-1)
    assert allclose(score_at(query, keys, numbers, spec), wanted, atol=1e-6)
    weights = torch.rand(7, 5)
    blend = (weights[..., None] * values[numbers]).sum(1)
    assert allclose(blend_at(weights, values, numbers), blend, atol=1e-6)
    numbers[2, 1] = -1
    assert score_at(query, keys, numbers, spec)[2, 1] == -math.inf
