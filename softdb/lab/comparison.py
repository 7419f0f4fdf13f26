"""`compare`: the same queries, read in every way asked for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_finite, check_float_tensor, check_positive, check_real, describe
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.lab.choices import Readable, check_draws, chosen_of, given_list, progress, temperatures_of
from softdb.lab.plotting import cooling_axis, figure_of, shade
from softdb.lab.tables import Columns, aligned
from softdb.reading.result import Read
from softdb.scoring.normalizers import NORMALIZERS, is_hard, is_random, is_sparse

__all__ = ["Comparison", "Setting", "compare"]


Metric = Callable[[Tensor, Tensor], float | Tensor]


MODES = ("exact", "topk", "hard")


BATCH = 512  # queries in a read


TIE = 1e-5  # relative difference of scores that rounding may make in float32


@dataclass(frozen=True)
class Setting:
    """One way of reading, and what came of it, over all queries.

    Attributes:
        mode: "exact", "topk" or "hard".
        normalizer: From scores to weights.
        temperature: Divides the scores.
        k: How many candidates a top-k read has; None for the others.
        distance: How far its answers lie from the exact soft blend at this temperature: the Frobenius norm of the
            difference, divided by that of the blend.
        agreement: The share of queries whose row of most weight is the best row of all.
        mass: The share of the exact softmax at this temperature that the rows with weight hold, on average.
        entropy: Of its weights, on average, in nats.
        effective_rows: exp(entropy of a query's weights), on average: how many rows answer.
        metric: Accuracy, loss or whatever was asked for; None without targets.
        time: What it takes, as a multiple of the exact soft read's: of both the median over all temperatures.
    """

    mode: str
    normalizer: str
    temperature: float
    k: int | None
    distance: float
    agreement: float
    mass: float
    entropy: float
    effective_rows: float
    metric: float | None
    time: float

    @property
    def name(self) -> str:
        """How it is called in tables and pictures, but for its temperature."""
        mode = self.mode if self.k is None else f"{self.mode} {self.k}"
        return mode if self.normalizer == "softmax" else f"{mode} {self.normalizer}"


@dataclass(frozen=True)
class Comparison(Columns):
    """What `compare` found.

    Attributes:
        settings: One for each way of reading, the softest temperature first.
        metric: What ``metric`` of a setting is: "accuracy", "loss" or the name of a function; None without targets.
        queries: How many queries were read.
    """

    settings: tuple[Setting, ...]
    metric: str | None
    queries: int

    def to_dict(self) -> dict[str, list[Any]]:
        """A list for each column; the column of targets has the metric's name."""
        columns = {field.name: [getattr(row, field.name) for row in self.settings] for field in FIELDS}
        metric = columns.pop("metric")
        return columns if self.metric is None else columns | {self.metric: metric}

    def __str__(self) -> str:
        headings = ["read", "temperature", "distance", "agreement", "mass", "effective rows", "time"]
        cells = [
            [
                row.name,
                f"{row.temperature:.4g}",
                f"{row.distance:.4f}",
                f"{row.agreement:.3f}",
                f"{row.mass:.4f}",
                f"{row.effective_rows:,.1f}",
                f"{row.time:.2f}",
            ]
            for row in self.settings
        ]
        if self.metric is not None:
            headings.insert(2, self.metric)
            for line, row in zip(cells, self.settings, strict=True):
                line.insert(2, "–" if row.metric is None else f"{row.metric:.4f}")
        return aligned(headings, cells)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw distance, and the metric or else the mass, against temperature and against k.

        Args:
            path: The picture to write; its ending says of which kind.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: Pictures of that kind are not known.
        """
        figure = figure_of(path, (11, 8))
        shown = [("distance", "distance from the exact blend")]
        shown += (
            [("metric", self.metric)] if self.metric is not None else [("mass", "softmax mass of the rows with weight")]
        )
        for line, (field, heading) in enumerate(shown):
            left, right = figure.add_subplot(2, 2, 2 * line + 1), figure.add_subplot(2, 2, 2 * line + 2)
            self._against_temperature(left, field)
            self._against_k(right, field)
            for axes in (left, right):
                axes.set_ylabel(heading)
                axes.grid(alpha=0.3)
                if field == "distance":
                    axes.set_yscale("symlog", linthresh=1e-3)
                    axes.set_ylim(bottom=0)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=4, fontsize="small")
        figure.suptitle(f"Hard or soft? {self.queries:,} queries", fontsize="large")
        figure.savefig(path, dpi=120)

    def _against_temperature(self, axes: Any, field: str) -> None:
        ks = sorted({row.k for row in self.settings if row.k is not None})
        for name in dict.fromkeys(row.name for row in self.settings):
            rows = [row for row in self.settings if row.name == name]
            first = rows[0]
            color = ENDS[first.mode] if first.k is None else shade(ks.index(first.k), len(ks))
            points = [row.temperature for row in rows], [getattr(row, field) for row in rows]
            axes.plot(*points, marker=".", label=name, color=color, linestyle=DASHES[first.normalizer])
        cooling_axis(axes, [row.temperature for row in self.settings])

    def _against_k(self, axes: Any, field: str) -> None:
        soft = [row for row in self.settings if row.normalizer == "softmax"]
        temperatures = sorted({row.temperature for row in soft}, reverse=True)
        ks = sorted({row.k for row in soft if row.k is not None})
        ticks = ["hard", *map(str, ks), "exact"]
        for number, temperature in enumerate(temperatures):
            found = {
                "hard" if row.mode == "hard" else "exact" if row.mode == "exact" else str(row.k): getattr(row, field)
                for row in soft
                if row.temperature == temperature
            }
            places = [place for place, tick in enumerate(ticks) if tick in found]
            values = [found[ticks[place]] for place in places]
            color = shade(number, len(temperatures))
            axes.plot(places, values, ".-", label=f"{temperature:.3g}", color=color)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel("k: one row to all")
        axes.legend(title="temperature", fontsize="x-small", title_fontsize="x-small", ncols=2)


FIELDS = dataclasses.fields(Setting)


ENDS = {"exact": "black", "hard": "#d55e00"}


LINE_STYLES = ("-", ":", "-.", "--", (0, (5, 1, 1, 1, 1, 1)))


DASHES: dict[str, Any] = dict(zip(NORMALIZERS, itertools.cycle(LINE_STYLES), strict=False))


@torch.no_grad()
def compare(
    store: Readable,
    queries: Tensor,  # (B, key_dim)
    *,
    modes: Sequence[str] = MODES,
    ks: Sequence[int] = (1, 4, 16, 64),
    temperatures: Sequence[float] | None = None,
    normalizers: Sequence[str] = ("softmax",),
    targets: Tensor | None = None,  # (B,) or (B, value_dim)
    metric: Metric | None = None,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Read the same queries in every way asked for, and set what comes beside the exact soft blend.

    For each temperature, mode and normalizer (and k, where the mode is "topk"), as ``store.read(queries, mode, ...)``
    answers; see `Setting` for the figures. Equal to a loop over the settings, and over the queries within::

        distance = norm(values - exact) / norm(exact)               # over all queries, exact at the same temperature
        mass = exact_weights[weights > 0].sum()                     # the mean over queries, as what follows
        entropy = -(weights * weights.log()).sum()

    A hard read has no normalizer, and is there once for each temperature, since the blend that it is compared with
    moves. A progress bar is shown on a terminal where tqdm is installed. The reads count in the store's ``usage``.

    Args:
        store: A `softdb.SoftKVStore`, or anything that answers `read` the same way.
        queries: What is looked for.
        modes: Of "exact", "topk" and "hard".
        ks: How many candidates top-k reads have.
        temperatures: What divides the scores; from 8 times to a quarter of the store's own unless given.
        normalizers: Of those of `softdb.scoring.normalizers`.
        targets: What answers should be: classes, (B,) integers, for the accuracy of ``values.argmax(-1)``; or values,
            (B, value_dim), for the mean squared error, "loss".
        metric: ``metric(values, targets)``, a number, in place of those.
        generator: What "gumbel" draws from.

    Returns:
        A `Comparison`: ``.table()`` prints it, ``.plot(path)`` draws it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is not as above.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> found = lab.compare(store, torch.tensor([[1.0, 0.0]]), modes=("exact", "hard"), temperatures=(1.0, 0.1))
        >>> [(row.name, row.temperature, round(row.distance, 3)) for row in found.settings]
        [('exact', 1.0, 0.0), ('hard', 1.0, 0.053), ('exact', 0.1, 0.0), ('hard', 0.1, 0.0)]
    """
    check_float_tensor("queries", queries, (None, None))
    check_finite("queries", queries)
    if len(queries) == 0:
        raise ShapeError("queries: expected at least one, got none")
    modes, normalizers = chosen_of("modes", modes, MODES), chosen_of("normalizers", normalizers, NORMALIZERS)
    candidates = given_list("ks", ks, functools.partial(check_positive, "ks")) if "topk" in modes else []
    cooling = temperatures_of(store, temperatures)
    judge, judged = _judge(queries, targets, metric)
    check_draws(store, normalizers)
    ways: list[tuple[str, str, int | None]] = []
    for mode, name in itertools.product(modes, normalizers):
        if mode == "topk":
            ways += [(mode, name, k) for k in candidates]
        elif mode == "exact" or (mode, "softmax", None) not in ways:
            ways.append((mode, "softmax" if mode == "hard" else name, None))
    batches = queries.split(BATCH)
    if candidates:
        store.read(queries[:1], "topk", k=candidates[0])  # which may build an index
    found, seconds = [], []
    with progress(len(cooling) * (1 + len(ways))) as advance:
        for temperature in cooling:
            reference = Reference(store, batches, temperature)
            seconds.append(reference.seconds)
            advance()
            for mode, name, k in ways:
                found.append(_measured(store, batches, reference, mode, name, k, generator, judge))
                advance()
    exact = statistics.median(seconds)
    spent = {row.name: statistics.median(other.time for other in found if other.name == row.name) for row in found}
    settings = tuple(dataclasses.replace(row, time=spent[row.name] / exact) for row in found)
    return Comparison(settings, judged, len(queries))


class Reference:
    """The exact soft read that others are compared with, at one temperature.

    Attributes:
        values: (B, value_dim).
        lse, entropy: (B,), float64.
        best, best_score: Id and score of the best row, (B,); -1 and -inf where there is none.
        seconds: What the read takes.
    """

    def __init__(self, store: Readable, batches: Sequence[Tensor], temperature: float) -> None:
        self.temperature = temperature
        self.values, self.seconds = _timed(lambda query: store.read(query, temperature=temperature).values, batches)
        parts = [self._of(store, batch) for batch in batches]
        self.lse, self.entropy, self.best, self.best_score = map(torch.cat, zip(*parts, strict=True))
        if bool((self.lse == -torch.inf).all()):
            raise ArgumentError("store: expected at least one row, got none; add rows first")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _of(self, store: Readable, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # In float64, since an entropy is a small difference of large numbers.
        query, temperature = batch.detach().clone().double(), self.temperature
        divisor = torch.full((len(query),), temperature, dtype=query.dtype, device=query.device, requires_grad=True)
        read = store.read(query, k=1, temperature=divisor)
        if read.ids is None or read.scores is None:
            raise DtypeError("store: expected read(query, k=1) to tell ids and scores, got none")
        # The derivative of the log-sum-exp tells the mean score: d lse / d T = - (sum of weight * score) / T.
        (slope,) = torch.autograd.grad(read.lse.sum(), divisor)
        lse, best_score = read.lse.detach(), read.scores[:, 0].detach()
        # Where the best row holds all weight there is none, however large the numbers are.
        entropy = torch.where(lse > best_score, lse + temperature * slope, 0.0).clamp(min=0)
        return lse, entropy, read.ids[:, 0], best_score


def _measured(
    store: Readable,
    batches: Sequence[Tensor],
    reference: Reference,
    mode: str,
    normalizer: str,
    k: int | None,
    generator: torch.Generator | None,
    judge: Callable[[Tensor], float] | None,
) -> Setting:
    """What comes of a way of reading; its time in seconds."""
    options: dict[str, Any] = {"mode": mode, "temperature": reference.temperature}
    if mode != "hard":
        options["normalizer"] = normalizer
    if k is not None:
        options["k"] = k
    if is_random(normalizer):
        options |= {"k": k or 1, "generator": generator}  # so that the row that was drawn is known
    reads: list[Read] = []

    def answer(query: Tensor) -> Tensor:
        reads.append(store.read(query, **options))
        return reads[-1].values

    if mode == "exact" and normalizer == "softmax":
        values, seconds = reference.values, reference.seconds
        agreement = mass = torch.ones_like(reference.entropy)
        entropy = reference.entropy
    else:
        values, seconds = _timed(answer, batches)
        agreement, mass, entropy = _weighed(store, batches, reference, mode, normalizer, reads, options)
    difference = torch.linalg.vector_norm((values - reference.values).double())
    size = torch.linalg.vector_norm(reference.values.double())
    return Setting(
        mode=mode,
        normalizer=normalizer,
        temperature=reference.temperature,
        k=k,
        distance=float(difference / size) if float(difference) else 0.0,
        agreement=float(agreement.double().mean()),
        mass=float(mass.mean()),
        entropy=float(entropy.mean()),
        effective_rows=float(entropy.exp().mean()),
        metric=None if judge is None else judge(values),
        time=seconds,
    )


def _weighed(
    store: Readable,
    batches: Sequence[Tensor],
    reference: Reference,
    mode: str,
    normalizer: str,
    reads: Sequence[Read],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query: whether its heaviest row is the best of all, the mass of rows with weight, and the entropy."""
    if mode == "exact" and is_hard(normalizer) and not is_random(normalizer):
        held = (reference.best_score - reference.lse).exp().nan_to_num(0.0)
        return torch.ones_like(held), held, torch.zeros_like(held)
    agreement, mass, entropy = [], [], []
    places = torch.arange(len(reference.lse), device=reference.lse.device).split(BATCH)
    for batch, read, place in zip(batches, reads, places, strict=True):
        if mode == "exact" and is_sparse(normalizer):
            read = _whole_support(store, batch, options)
        if read.ids is None or read.weights is None or read.scores is None:
            raise DtypeError(f"store: expected a {mode} read to tell ids, weights and scores, got none")
        weights, scores = read.weights.double(), read.scores.double()
        if is_random(normalizer):  # whose scores have noise
            scores = scores.new_full(scores.shape, -torch.inf)
            scores[:, 0] = _score_of(store, batch, read.ids[:, 0], reference.temperature)
        best_score = reference.best_score[place]
        # Where rows are equal but for rounding, either is the best.
        rounding = TIE * (1 + best_score.abs())
        agrees = (read.ids[:, 0] == reference.best[place]) | (scores[:, 0] >= best_score - rounding)
        # Scores less that of the best row: what both are rounded by cancels.
        top = torch.where(agrees, scores[:, 0], best_score)
        held = (best_score - reference.lse[place]).exp().nan_to_num(0.0)
        share = (scores - top.unsqueeze(-1)).exp().nan_to_num(0.0) * held.unsqueeze(-1)
        mass.append(torch.where(weights > 0, share, 0.0).sum(-1).clamp(max=1.0))
        entropy.append(torch.special.entr(weights).sum(-1))
        agreement.append(agrees)
    return torch.cat(agreement), torch.cat(mass), torch.cat(entropy)


def _whole_support(store: Readable, batch: Tensor, options: dict[str, Any]) -> Read:
    """An exact read with as many of the best rows as have weight."""
    k = 32
    while True:
        read = store.read(batch, **options, k=k)
        if read.weights is None or not bool((read.weights[:, -1] > 0).any()):
            return read
        k *= 8


def _score_of(store: Readable, batch: Tensor, ids: Tensor, temperature: float) -> Tensor:  # (b, d), (b,) -> (b,)
    """The score of each query with one row: the log-sum-exp of a read that may see nothing else."""
    wanted = ids.unsqueeze(-1)
    return store.read(batch.double(), where=lambda row: row["id"] == wanted, temperature=temperature).lse


def _timed(answer: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> tuple[Tensor, float]:
    """What is answered, and how many seconds that takes."""
    started = time.perf_counter()
    values = torch.cat([answer(batch) for batch in batches])
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return values, time.perf_counter() - started


def _judge(
    queries: Tensor, targets: Tensor | None, metric: Metric | None
) -> tuple[Callable[[Tensor], float] | None, str | None]:
    """What tells how good answers are, and what that is called."""
    if targets is None:
        if metric is not None:
            raise ArgumentError("targets: expected what metric compares values with, got None")
        return None, None
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) != len(queries):
        raise ShapeError(
            f"targets: expected a tensor with one entry for each of {len(queries)} queries, got {describe(targets)}"
        )
    if metric is not None:
        name = getattr(metric, "__name__", "")
        if not name.isidentifier() or name in {field.name for field in FIELDS}:
            name = "metric"
        return lambda values: _number(metric(values, targets)), name
    if targets.is_floating_point():

        def loss(values: Tensor) -> float:
            if values.shape != targets.shape:
                raise ShapeError(
                    f"targets: expected shape {tuple(values.shape)}, as the values, got {tuple(targets.shape)}"
                )
            return float((values - targets).double().square().mean())

        return loss, "loss"
    if targets.dim() != 1 or targets.dtype == torch.bool or targets.is_complex():
        raise ShapeError(f"targets: expected classes, ({len(queries)},) integers, or values, got {describe(targets)}")
    classes = targets.to(torch.int64)

    def accuracy(values: Tensor) -> float:
        width = values.shape[-1]
        if width < 2 or not (int(classes.min()) >= 0 and int(classes.max()) < width):
            raise ArgumentError(
                f"targets: expected classes from 0 to {width - 1}, places in values of width {width}, got "
                f"{int(classes.min())} to {int(classes.max())}; give values themselves as floating-point numbers"
            )
        return float((values.argmax(-1) == classes).double().mean())

    return accuracy, "accuracy"


def _number(result: object) -> float:
    return check_real("metric(values, targets)", result.detach() if isinstance(result, Tensor) else result)
