"""What the recall of a search is measured by."""

from __future__ import annotations

import torch
from torch import Tensor

from softdb.filters import Selection
from softdb.kernels.cpu.topk import exact_top_k, top_k
from softdb.kernels.gather import scores_at
from softdb.kernels.spec import ReadSpec
from softdb.kernels.tiling import Tiling
from softdb.scoring.metrics import centre_of, compute_dtype, prepare_query

TELLING_QUERIES = 8


def truth_of(
    queries: Tensor, keys: Tensor, metric: str, selection: Selection, k: int
) -> tuple[ReadSpec, Tensor, Tensor, Tensor]:
    """What a recall is measured by.

    How queries meet rows, the queries prepared, the slots of the k best rows of each, (m, k), and from which score on a
    row is as good as these, (m, 1): one that ties with the k-th best is.
    """
    spec = ReadSpec(
        metric,
        centre_of(queries, metric),
        selection,
        compute_dtype(queries, keys),
        tiling=Tiling.for_device(keys.device),
    )
    operand = prepare_query(queries, metric, 1.0, spec.centre, spec.dtype)
    scores, best = exact_top_k(operand, keys, spec, k)
    worst = scores[:, -1:]
    return spec, operand, best, worst - 1e-5 * worst.abs()


def best_candidates(slots: Tensor, operand: Tensor, keys: Tensor, spec: ReadSpec, k: int) -> Tensor:  # (B, c) -> (B, k)
    """The k best of each query's candidates by their live keys."""
    return slots.gather(-1, top_k(scores_at(operand, keys, slots, spec), k)[1])


def tuning_queries(query: Tensor | None, rows: Tensor, count: int) -> list[Tensor]:  # (B, d), (n, d) -> (m, d) each
    """Queries to tune on: those of the read that wants the index, and, where they are few, some rows moved a little."""
    given = rows[:0] if query is None else query.detach().to(rows.dtype)
    given = given[:: max(1, len(given) // count)][:count]
    generator = torch.Generator("cpu").manual_seed(0)
    wanted = count - len(given) if len(rows) else 0
    chosen = torch.randint(max(1, len(rows)), (wanted,), generator=generator, device="cpu")
    sample = rows[chosen.to(rows.device)]
    noise = torch.randn(sample.shape, generator=generator, device="cpu").to(sample)
    spread = sample.std(dim=0, correction=0) if len(sample) else 0.0
    made = sample + noise.mul_(0.5 * spread)
    groups = [given, made] if len(given) >= TELLING_QUERIES else [torch.cat([given, made])]
    return [group for group in groups if len(group)]
