"""The kernels: top-k with ties, in two stages, over selections; the exact read in tiles of every shape."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from torch import Tensor

from softdb import blockwise
from softdb.blockwise import Scan, exact_top_k, top_k, top_of_block
from softdb.filters import Selection


def tied(*shape: int, levels: int = 5, seed: int = 0) -> Tensor:
    """Scores with many ties, and some -inf."""
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
def test_two_stages_find_what_one_finds(width: int, k: int, levels: int) -> None:
    scores = tied(2, 3, width, levels=levels)
    values, index = top_of_block(scores, k)
    wanted_values, wanted = top_k(scores, k)
    assert (values == wanted_values).all()
    real = values > -math.inf
    assert (index[real] == wanted[real]).all()


@pytest.mark.parametrize("tile", [(64, 2), (4096, 7), (2**19, 256)], ids=str)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 1000, 3001])
@pytest.mark.parametrize(("few", "maxima"), [(1, 2**23), (1, 50), (10**9, 0)])
def test_exact_top_k_over_tiles(
    rows: int, tile: tuple[int, int], few: int, maxima: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "TILE_ELEMENTS", tile[0])
    monkeypatch.setattr(blockwise, "TILE_QUERIES", tile[1])
    monkeypatch.setattr(blockwise, "FEW_GROUPS", few)
    monkeypatch.setattr(blockwise, "MAXIMA_ELEMENTS", maxima)
    monkeypatch.setattr(blockwise, "GATHER_ELEMENTS", 30 * tile[1])
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (9, 3), generator=generator).float()
    keys = torch.randint(-2, 3, (rows, 3), generator=generator).float()  # small whole numbers: many exact ties
    shared = torch.rand(rows, generator=generator) < 0.8
    for selection in (
        Selection(rows),
        Selection(rows, shared=shared),
        Selection(rows).among(torch.arange(0, rows, 3)),
        Selection(rows, shared=shared).among(torch.arange(0, rows, 2)),
    ):
        visible = torch.ones(rows, dtype=torch.bool) if selection.shared is None else selection.shared.clone()
        if selection.visit is not None:
            visible &= torch.zeros(rows, dtype=torch.bool).scatter(0, selection.visit, True)
        scores = (query @ keys.T).masked_fill(~visible, -math.inf)
        for k in (1, 5, 50):
            found_scores, found = exact_top_k(query, keys, Scan("dot", None, selection, torch.float32), k)
            wanted = reference.best(scores, k)
            assert (found == wanted).all()
            assert (found_scores.isneginf() == (wanted < 0)).all()


def test_every_tile_is_visited_once() -> None:
    for groups, queries, rows in ((1, 1, 1), (3, 5, 100), (40, 300, 70), (1, 2000, 100_000)):
        for k in (0, 1, 40):
            scan = Scan("dot", None, Selection(rows), torch.float32)
            seen = 0
            for chunk, block, slices in scan.tiles(groups, queries, 0, k):
                assert isinstance(block.rows, slice)
                for part in slices:
                    area = (part.stop - part.start) * (block.rows.stop - block.rows.start)
                    seen += (chunk.stop - chunk.start) * area
            assert seen == groups * queries * rows
