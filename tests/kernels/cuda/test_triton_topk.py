"""Exact top-k in Triton, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import reference
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from support.triton_kernels import DEVICE, MAX_SHARED, compile_for_hopper, record_launches

from softdb.filters import Selection
from softdb.kernels.bias import ScoreBias
from softdb.kernels.blocks import topk as blocks
from softdb.kernels.cuda import topk
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import compute_center, prepare_query

TEMPERATURE = 0.7


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def find(
    query: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "dot",
    selection: Selection | None = None,
    temperature: float = TEMPERATURE,
    **tiling: int,
) -> tuple[Tensor, Tensor]:
    center = compute_center(query, metric)
    operand = prepare_query(query, metric, temperature, center, torch.float32)
    chosen = Selection(len(keys)) if selection is None else selection
    spec = ReadSpec(metric, center, chosen, torch.float32, tiling=Tiling(**tiling))  # type: ignore[arg-type]
    return topk.exact_top_k(operand, keys, spec, k)


def check(
    found: tuple[Tensor, Tensor],
    query: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "dot",
    visible: Tensor | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Compare scores and rows with the reference."""
    wanted = reference.scores(query.double(), keys.double(), metric, TEMPERATURE)
    if visible is not None:
        wanted = wanted.masked_fill(~visible, -math.inf)
    scores, rows = found
    ordered, order = wanted.sort(dim=-1, descending=True, stable=True)
    count = min(k, len(keys))
    assert torch.equal(rows[:, :count], order[:, :count].masked_fill(ordered[:, :count] == -math.inf, -1))
    assert torch.allclose(scores[:, :count].double(), ordered[:, :count], atol=tolerance)
    assert (rows[:, count:] == -1).all()
    assert (scores[:, count:] == -math.inf).all()


@pytest.mark.parametrize(
    ("metric", "dtype", "queries", "rows", "width", "k"),
    [
        ("dot", torch.float32, 3, 300, 1, 3),
        ("scaled_dot", torch.float32, 17, 200, 33, 2),
        ("dot", torch.float32, 2, 130, 256, 1),
        ("cosine", torch.float32, 2, 200, 96, 2),
        ("l2", torch.float32, 1, 200, 7, 2),
        ("dot", torch.bfloat16, 5, 300, 64, 4),
        ("cosine", torch.bfloat16, 1, 200, 7, 1),
        ("l2", torch.bfloat16, 2, 150, 5, 2),
        ("scaled_dot", torch.float16, 4, 300, 128, 3),
        ("cosine", torch.float16, 2, 200, 33, 2),
        ("dot", torch.float32, 3, 70, 8, 100),
        ("dot", torch.float32, 2, 1, 8, 1),
        ("l2", torch.float16, 2, 64, 3, 64),
    ],
    ids=str,
)
def test_triton_top_k_equals_the_reference(
    metric: str, dtype: torch.dtype, queries: int, rows: int, width: int, k: int
) -> None:
    query, keys = random(queries, width), random(rows, width, seed=1, dtype=dtype)
    check(find(query, keys, k, metric), query, keys, k, metric)


@pytest.mark.parametrize("k", [2, 60])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.6])
def test_triton_top_k_finds_visible_rows_only(fraction: float, k: int) -> None:
    query, keys = random(3, 8), random(300, 8, seed=1)
    visible = torch.rand(300, generator=torch.Generator().manual_seed(2)).to(DEVICE) < fraction
    keys[~visible] = math.nan
    for selection in (Selection(300, shared=visible), Selection(300).restrict_to(visible.nonzero().squeeze(-1))):
        check(find(query, keys, k, selection=selection), query, keys.nan_to_num(), k, visible=visible)


@pytest.mark.parametrize(("metric", "dtype"), [("dot", torch.float32), ("l2", torch.float32), ("dot", torch.bfloat16)])
def test_triton_top_k_breaks_ties_towards_the_lowest_slot(metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (4, 3), generator=generator).float().to(DEVICE)
    keys = torch.randint(-2, 3, (400, 3), generator=generator).to(DEVICE, dtype)
    query[0] = 0  # every row ties
    scores, rows = find(query, keys, 5, metric, temperature=1.0)
    wanted = reference.scores(query.double(), keys.double(), metric)
    assert torch.equal(rows, wanted.sort(dim=-1, descending=True, stable=True).indices[:, :5])
    assert torch.equal(scores.double(), wanted.gather(1, rows))


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_equal_rows_have_equal_scores_in_triton(metric: str) -> None:
    query, keys = random(1, 20), random(256, 20, seed=1)
    keys[[3, 70, 130, 255]] = query * (1.0 if metric == "l2" else 3.0)
    scores, rows = find(query, keys, 4, metric)
    assert rows.tolist() == [[3, 70, 130, 255]]
    assert (scores == scores[:, :1]).all()


def test_positive_and_negative_zero_tie_in_triton() -> None:
    keys = torch.zeros(200, 1, device=DEVICE)
    keys[::2] = -0.0
    assert torch.equal(find(torch.ones(1, 1, device=DEVICE), keys, 3)[1].cpu(), torch.tensor([[0, 1, 2]]))


def test_triton_top_k_of_nothing() -> None:
    keys = random(100, 4)
    scores, rows = find(random(0, 4), keys, 3)
    assert scores.shape == rows.shape == (0, 3)
    scores, rows = find(random(2, 4), keys[:0], 3)
    assert (rows == -1).all()
    assert (scores == -math.inf).all()


def test_nan_in_a_query_changes_the_result_of_that_query_only_in_triton() -> None:
    query, keys = random(3, 8), random(200, 8, seed=1)
    query[1] = math.nan
    scores, rows = find(query, keys, 2)
    assert scores[1].isnan().all()
    assert ((rows[1] >= 0) & (rows[1] < 200)).all()
    others = query[[0, 2]]
    check((scores[[0, 2]], rows[[0, 2]]), others, keys, 2)


def test_triton_top_k_takes_queries_in_slices() -> None:
    query, keys = random(5, 4), random(300, 4, seed=1)
    check(find(query, keys, 3, max_group_maxima=400), query, keys, 3)
    check(find(query, keys, 3, multiprocessors=1), query, keys, 3)


def test_large_queries_do_not_overflow_float16_in_triton() -> None:
    query, keys = 1e6 * random(2, 8), random(200, 8, seed=1, dtype=torch.float16)
    check(find(query, keys, 2), query, keys, 2, tolerance=10.0)


def test_strided_keys_are_found_in_triton() -> None:
    query, keys = random(2, 4), random(4, 300, seed=1).T
    check(find(query, keys, 2), query, keys, 2)
    wide = random(300, 9, seed=1)[:, :4]
    check(find(query, wide, 2), query, wide, 2)


def test_offsets_of_triton_top_k_have_64_bits(tmp_path: Path) -> None:
    width, rows = 64, 2**25 + 3  # more than 2^31 elements
    if DEVICE == "cuda":
        keys = torch.zeros(rows, width, dtype=torch.float16, device=DEVICE)
    else:
        sparse_file = str(tmp_path / "keys")
        keys = torch.from_file(sparse_file, shared=True, size=rows * width, dtype=torch.float16).view(rows, width)
    visited = torch.cat([torch.arange(100), torch.arange(rows - 2, rows)]).to(DEVICE)
    keys[rows - 1], keys[rows - 2], keys[5] = 3.0, 2.0, 1.0
    found = find(torch.ones(1, width, device=DEVICE), keys, 3, selection=Selection(rows, visited=visited))
    assert found[1].tolist() == [[rows - 1, rows - 2, 5]]


def test_top_k_without_support_in_triton_uses_blocks() -> None:
    query, keys = random(3, 4), random(50, 4, seed=1)
    spec = ReadSpec("dot", None, Selection(50), torch.float32)
    mask = random(1, 3, 50, seed=2) > 0
    variants = [
        replace(spec, bias=ScoreBias(random(1, 3, 50, seed=3))),
        replace(spec, selection=Selection(50).hide(mask)),
    ]
    for variant in variants:
        for found, wanted in zip(
            topk.exact_top_k(query, keys, variant, 4), blocks.exact_top_k(query, keys, variant, 4), strict=True
        ):
            assert torch.equal(found, wanted)
    wide = replace(spec, dtype=torch.float64)
    assert topk.exact_top_k(query.double(), keys.double(), wide, 4)[0].dtype == torch.float64


def test_fake_tensors_pass_through_triton_top_k() -> None:
    with FakeTensorMode():
        query, keys = torch.empty(3, 8, device="cuda"), torch.empty(1000, 8, device="cuda")
        visible = torch.ones(1000, dtype=torch.bool, device="cuda")
        selection = Selection(1000, shared=visible)
        scores, rows = topk.exact_top_k(query, keys, ReadSpec("dot", None, selection, torch.float32), 5)
    assert scores.shape == rows.shape == (3, 5)
    assert scores.device.type == rows.device.type == "cuda"
    assert (scores.dtype, rows.dtype) == (torch.float32, torch.int64)


@pytest.mark.slow
def test_triton_top_k_compiles_for_hopper() -> None:
    with record_launches(topk, "_rank_groups_kernel", "_rank_rows_kernel") as launches:
        for metric, dtype, width in (("dot", torch.float32, 128), ("cosine", torch.float16, 256)):
            find(torch.zeros(64, width), torch.zeros(30_000, width, dtype=dtype), 32, metric)
    for compiled in compile_for_hopper(launches):
        assert compiled.shared <= MAX_SHARED
        assert compiled.stack <= 64
