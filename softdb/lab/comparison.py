"""Comparison of hard, top-k and soft reads of the same queries."""

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
from softdb.lab.choices import Readable, check_can_draw, check_choices, check_list, progress, resolve_temperatures
from softdb.lab.plotting import create_figure, is_fraction, sample_color, set_temperature_axis
from softdb.lab.tables import Line, Tabular, format_table, merge_equal_lines
from softdb.reading.result import Read
from softdb.scoring.normalizers import NORMALIZERS, is_hard, is_random, is_sparse

__all__ = ["MODES", "Comparison", "Reference", "Setting", "compare", "read_support"]


Metric = Callable[[Tensor, Tensor], float | Tensor]


MODES = ("exact", "topk", "hard")


QUERIES_PER_READ = 512


SCORE_TOLERANCE = 1e-5  # relative difference of float32 scores that rounding may cause


INITIAL_SUPPORT_ROWS = 32  # rows of the first read in the search for all rows with weight


@dataclass(frozen=True)
class Setting:
    """One mode, normalizer, temperature and k, with its measurements over all queries.

    Attributes:
        mode: "exact", "topk" or "hard".
        normalizer: Name of the normalizer.
        temperature: Divisor of the scores.
        k: Number of candidates of a top-k read; None in other modes.
        distance: ``norm(values - exact) / norm(exact)`` over all queries, where ``exact`` are the values of the exact
            softmax read at this temperature.
        agreement: Fraction of queries whose row with the highest weight is the row with the highest score.
        mass: Fraction of the exact softmax at this temperature that the rows with weight above 0 hold, averaged over
            queries.
        entropy: Entropy of the weights, in nats, averaged over queries.
        effective_rows: exp(entropy of the weights of a query), averaged over queries.
        metric: Accuracy, loss or the caller's metric; None without targets.
        time: Duration of the reads divided by the duration of the exact softmax reads. Both durations are medians over
            the temperatures.
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
        """Name in tables and plots, without the temperature."""
        mode = self.mode if self.k is None else f"{self.mode} {self.k}"
        return mode if self.normalizer == "softmax" else f"{mode} {self.normalizer}"


@dataclass(frozen=True)
class Comparison(Tabular):
    """Result of `compare`.

    Attributes:
        settings: One for each combination of mode, normalizer, temperature and k; highest temperature first.
        metric: Name of the settings' ``metric``: "accuracy", "loss", or the name of the caller's function; None without
            targets.
        queries: Number of queries.
    """

    settings: tuple[Setting, ...]
    metric: str | None
    queries: int

    def to_dict(self) -> dict[str, list[Any]]:
        """Return a list for each column; the column of the metric has its name."""
        columns = {field.name: [getattr(row, field.name) for row in self.settings] for field in SETTING_FIELDS}
        metric = columns.pop("metric")
        return columns if self.metric is None else columns | {self.metric: metric}

    def __str__(self) -> str:
        headings = ["read", "temperature", "distance", "agreement", "mass", "effective rows", "time"]
        if self.metric is not None:
            headings.insert(2, self.metric)
        return format_table(headings, merge_equal_lines(map(self._line, self.settings)))

    def _line(self, row: Setting) -> Line:
        figures = [f"{row.distance:.4f}", f"{row.agreement:.3f}", f"{row.mass:.4f}", f"{row.effective_rows:,.1f}"]
        if self.metric is not None:
            figures.insert(0, "–" if row.metric is None else f"{row.metric:.4f}")
        return Line(row.name, row.temperature, tuple(figures), row.time)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot distance and metric against temperature and against k.

        Without targets, the softmax mass is plotted instead of the metric.

        Args:
            path: Image file to write. Its suffix selects the format.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: matplotlib does not support the suffix.
        """
        figure = create_figure(path, (11, 8))
        shown = [("distance", "distance from the exact blend")]
        shown += (
            [("metric", self.metric)] if self.metric is not None else [("mass", "softmax mass of the rows with weight")]
        )
        for line, (field, heading) in enumerate(shown):
            left, right = figure.add_subplot(2, 2, 2 * line + 1), figure.add_subplot(2, 2, 2 * line + 2)
            self._plot_against_temperature(left, field)
            self._plot_against_k(right, field)
            column = self.metric if field == "metric" and self.metric is not None else field
            for axes in (left, right):
                axes.set_ylabel(heading)
                axes.grid(alpha=0.3)
                if field == "distance":
                    axes.set_yscale("symlog", linthresh=1e-3)
                    axes.set_ylim(bottom=0)
                elif is_fraction(column, [getattr(row, field) for row in self.settings]):
                    axes.set_ylim(0, 1)
                    for curve in axes.lines:
                        curve.set_clip_on(False)  # markers at 0 and 1 stay whole
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=4, fontsize="small")
        figure.suptitle(f"Hard or soft? {self.queries:,} queries", fontsize="large")
        figure.savefig(path, dpi=120)

    def _plot_against_temperature(self, axes: Any, field: str) -> None:
        ks = sorted({row.k for row in self.settings if row.k is not None})
        for name in dict.fromkeys(row.name for row in self.settings):
            rows = [row for row in self.settings if row.name == name]
            first = rows[0]
            color = MODE_COLORS[first.mode] if first.k is None else sample_color(ks.index(first.k), len(ks))
            points = [row.temperature for row in rows], [getattr(row, field) for row in rows]
            axes.plot(*points, marker=".", label=name, color=color, linestyle=NORMALIZER_STYLES[first.normalizer])
        set_temperature_axis(axes, [row.temperature for row in self.settings])

    def _plot_against_k(self, axes: Any, field: str) -> None:
        soft = [row for row in self.settings if row.normalizer == "softmax"]
        temperatures = sorted({row.temperature for row in soft}, reverse=True)
        ks = sorted({row.k for row in soft if row.k is not None})
        ticks = ["hard", *map(str, ks), "exact"]
        for number, temperature in enumerate(temperatures):
            by_tick = {
                "hard" if row.mode == "hard" else "exact" if row.mode == "exact" else str(row.k): getattr(row, field)
                for row in soft
                if row.temperature == temperature
            }
            places = [place for place, tick in enumerate(ticks) if tick in by_tick]
            values = [by_tick[ticks[place]] for place in places]
            color = sample_color(number, len(temperatures))
            axes.plot(places, values, ".-", label=f"{temperature:.3g}", color=color)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel("k: one row to all")
        axes.legend(title="temperature", fontsize="x-small", title_fontsize="x-small", ncols=2)


SETTING_FIELDS = dataclasses.fields(Setting)


MODE_COLORS = {"exact": "black", "hard": "#d55e00"}


LINE_STYLES = ("-", ":", "-.", "--", (0, (5, 1, 1, 1, 1, 1)))


NORMALIZER_STYLES: dict[str, Any] = dict(zip(NORMALIZERS, itertools.cycle(LINE_STYLES), strict=False))


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
    """Compare reads of the same queries with the exact softmax read.

    The result has one `Setting` for each temperature, mode, normalizer and, in mode "topk", k. Equal to a loop over the
    settings that calls ``store.read(queries, mode, ...)`` and computes::

        distance = norm(values - exact) / norm(exact)               # over all queries, exact at the same temperature
        mass = exact_weights[weights > 0].sum()                     # averaged over queries, as is the entropy
        entropy = -(weights * weights.log()).sum()

    A hard read has no normalizer. Its values do not depend on the temperature, but it is listed once for each
    temperature, because the exact read with which it is compared does. Settings count as equal if all their numbers
    except the time are equal. The printed table merges equal settings of one temperature, and equal settings of
    consecutive temperatures. On a terminal, a progress bar is shown if tqdm is installed. The reads count in the
    store's ``usage``.

    Args:
        store: A `softdb.SoftKVStore`, or another object with its `read`.
        queries: (B, key_dim), floating point.
        modes: Some of "exact", "topk" and "hard".
        ks: Numbers of candidates of the top-k reads.
        temperatures: Divisors of the scores; by default 8, 4, 2, 1, 0.5 and 0.25 times the store's own temperature.
        normalizers: Names of normalizers, as in `softdb.SoftKVStore.read`.
        targets: Expected answers. For classes, (B,) integers, the metric is "accuracy": the fraction of queries whose
            ``values.argmax(-1)`` is the class. For values, (B, value_dim) floating point, the metric is "loss": the
            mean squared error.
        metric: Function ``metric(values, targets)`` that returns a number, to use instead of accuracy or loss.
        generator: Generator for the noise of "gumbel". If None, the default generator of torch.

    Returns:
        A `Comparison`. ``print(found.table())`` prints it, ``found.plot(path)`` plots it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is invalid.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> found = lab.compare(store, torch.tensor([[1.0, 0.0]]), modes=("exact", "hard"), temperatures=(1.0, 0.1))
        >>> [(row.name, row.temperature, round(row.distance, 3)) for row in found.settings]
        [('exact', 1.0, 0.0), ('hard', 1.0, 0.053), ('exact', 0.1, 0.0), ('hard', 0.1, 0.0)]
        >>> print(found.table())  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        read          temperature  distance  agreement    mass  effective rows  time
        exact                   1    0.0000      1.000  1.0000             1.2  ...
        hard                    1    0.0529      1.000  0.9442             1.0  ...
        exact = hard          0.1    0.0000      1.000  1.0000             1.0  ...
    """
    check_float_tensor("queries", queries, (None, None))
    check_finite("queries", queries)
    if len(queries) == 0:
        raise ShapeError("queries: expected at least one, got none")
    modes, normalizers = check_choices("modes", modes, MODES), check_choices("normalizers", normalizers, NORMALIZERS)
    candidates = check_list("ks", ks, functools.partial(check_positive, "ks")) if "topk" in modes else []
    resolved = resolve_temperatures(store, temperatures)
    measure, metric_name = _resolve_metric(queries, targets, metric)
    check_can_draw(store, normalizers)
    ways: list[tuple[str, str, int | None]] = []
    for mode, name in itertools.product(modes, normalizers):
        if mode == "topk":
            ways += [(mode, name, k) for k in candidates]
        elif mode == "exact" or (mode, "softmax", None) not in ways:
            ways.append((mode, "softmax" if mode == "hard" else name, None))
    batches = queries.split(QUERIES_PER_READ)
    if candidates:
        store.read(queries[:1], "topk", k=candidates[0])  # builds the index, if one is due, outside of the timing
    found, seconds = [], []
    with progress(len(resolved) * (1 + len(ways))) as advance:
        for temperature in resolved:
            reference = Reference(store, batches, temperature)
            seconds.append(reference.seconds)
            advance()
            for mode, name, k in ways:
                found.append(_measure_setting(store, batches, reference, mode, name, k, generator, measure))
                advance()
    exact = statistics.median(seconds)
    medians = {row.name: statistics.median(other.time for other in found if other.name == row.name) for row in found}
    settings = tuple(dataclasses.replace(row, time=medians[row.name] / exact) for row in found)
    return Comparison(settings, metric_name, len(queries))


class Reference:
    """Exact softmax read of all queries at one temperature.

    Attributes:
        values: (B, value_dim).
        lse, entropy: (B,), float64.
        best, best_score: Id and score of the row with the highest score, (B,); -1 and -inf if no row is allowed.
        seconds: Duration of the read.
    """

    def __init__(self, store: Readable, batches: Sequence[Tensor], temperature: float) -> None:
        self.temperature = temperature
        self.values, self.seconds = _time_reads(
            lambda query: store.read(query, temperature=temperature).values, batches
        )
        parts = [self._measure(store, batch) for batch in batches]
        self.lse, self.entropy, self.best, self.best_score = map(torch.cat, zip(*parts, strict=True))
        if bool((self.lse == -torch.inf).all()):
            raise ArgumentError("store: expected at least one row, got none; add rows first")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _measure(self, store: Readable, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # In float64, because the entropy is a small difference of large numbers.
        query, temperature = batch.detach().clone().double(), self.temperature
        divisor = torch.full((len(query),), temperature, dtype=query.dtype, device=query.device, requires_grad=True)
        read = store.read(query, k=1, temperature=divisor)
        if read.ids is None or read.scores is None:
            raise DtypeError("store: expected read(query, k=1) to report ids and scores, got none")
        # The derivative of the log-sum-exp gives the mean score: d lse / d T = - (sum of weight * score) / T.
        (slope,) = torch.autograd.grad(read.lse.sum(), divisor)
        lse, best_score = read.lse.detach(), read.scores[:, 0].detach()
        # Where the best row holds all weight, the entropy is 0; the formula would leave a rounding error of large
        # numbers.
        entropy = torch.where(lse > best_score, lse + temperature * slope, 0.0).clamp(min=0)
        return lse, entropy, read.ids[:, 0], best_score


def _measure_setting(
    store: Readable,
    batches: Sequence[Tensor],
    reference: Reference,
    mode: str,
    normalizer: str,
    k: int | None,
    generator: torch.Generator | None,
    measure: Callable[[Tensor], float] | None,
) -> Setting:
    """Read all queries with one setting; return its measurements, time in seconds."""
    options: dict[str, Any] = {"mode": mode, "temperature": reference.temperature}
    if mode != "hard":
        options["normalizer"] = normalizer
    if k is not None:
        options["k"] = k
    if is_random(normalizer):
        options |= {"k": k or 1, "generator": generator}  # with k, the read reports the row that was drawn
    reads: list[Read] = []

    def answer(query: Tensor) -> Tensor:
        reads.append(store.read(query, **options))
        return reads[-1].values

    if mode == "exact" and normalizer == "softmax":
        values, seconds = reference.values, reference.seconds
        agreement = mass = torch.ones_like(reference.entropy)
        entropy = reference.entropy
    else:
        values, seconds = _time_reads(answer, batches)
        agreement, mass, entropy = _compare_weights(store, batches, reference, mode, normalizer, reads, options)
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
        metric=None if measure is None else measure(values),
        time=seconds,
    )


def _compare_weights(
    store: Readable,
    batches: Sequence[Tensor],
    reference: Reference,
    mode: str,
    normalizer: str,
    reads: Sequence[Read],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute agreement, softmax mass and entropy of each query, (B,) each."""
    if mode == "exact" and is_hard(normalizer) and not is_random(normalizer):
        held = (reference.best_score - reference.lse).exp().nan_to_num(0.0)
        return torch.ones_like(held), held, torch.zeros_like(held)
    agreement, mass, entropy = [], [], []
    places = torch.arange(len(reference.lse), device=reference.lse.device).split(QUERIES_PER_READ)
    for batch, read, place in zip(batches, reads, places, strict=True):
        if mode == "exact" and is_sparse(normalizer):
            read = read_support(store, batch, options)
        if read.ids is None or read.weights is None or read.scores is None:
            raise DtypeError(f"store: expected a {mode} read to report ids, weights and scores, got none")
        weights, scores = read.weights.double(), read.scores.double()
        if is_random(normalizer):  # The reported scores include the noise, so score the row without it.
            scores = scores.new_full(scores.shape, -torch.inf)
            scores[:, 0] = _score_rows(store, batch, read.ids[:, 0], reference.temperature)
        best_score = reference.best_score[place]
        # If the scores of two rows differ only by rounding, both rows count as the best row.
        rounding = SCORE_TOLERANCE * (1 + best_score.abs())
        agrees = (read.ids[:, 0] == reference.best[place]) | (scores[:, 0] >= best_score - rounding)
        # A rounding error that all scores of a read share cancels in their differences from the best score.
        top = torch.where(agrees, scores[:, 0], best_score)
        held = (best_score - reference.lse[place]).exp().nan_to_num(0.0)
        share = (scores - top.unsqueeze(-1)).exp().nan_to_num(0.0) * held.unsqueeze(-1)
        mass.append(torch.where(weights > 0, share, 0.0).sum(-1).clamp(max=1.0))
        entropy.append(torch.special.entr(weights).sum(-1))
        agreement.append(agrees)
    return torch.cat(agreement), torch.cat(mass), torch.cat(entropy)


def read_support(store: Readable, batch: Tensor, options: dict[str, Any]) -> Read:
    """Read exactly, and report all rows with weight above 0 (sparse normalizers)."""
    k = INITIAL_SUPPORT_ROWS
    while True:
        read = store.read(batch, **options, k=k)
        if read.weights is None or not bool((read.weights[:, -1] > 0).any()):
            return read
        k *= 8


def _score_rows(store: Readable, batch: Tensor, ids: Tensor, temperature: float) -> Tensor:  # (b, d), (b,) -> (b,)
    """Score one row for each query, as the log-sum-exp of a read of only this row."""
    wanted = ids.unsqueeze(-1)
    return store.read(batch.double(), where=lambda row: row["id"] == wanted, temperature=temperature).lse


def _time_reads(answer: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the values of all batches and the duration in seconds."""
    started = time.perf_counter()
    values = torch.cat([answer(batch) for batch in batches])
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return values, time.perf_counter() - started


def _resolve_metric(
    queries: Tensor, targets: Tensor | None, metric: Metric | None
) -> tuple[Callable[[Tensor], float] | None, str | None]:
    """Return the function that measures values, and its name."""
    if targets is None:
        if metric is not None:
            raise ArgumentError("targets: expected the targets that metric compares values with, got None")
        return None, None
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) != len(queries):
        raise ShapeError(
            f"targets: expected a tensor with one entry for each of {len(queries)} queries, got {describe(targets)}"
        )
    if metric is not None:
        name = getattr(metric, "__name__", "")
        if not name.isidentifier() or name in {field.name for field in SETTING_FIELDS}:
            name = "metric"
        return lambda values: _number(metric(values, targets)), name
    if targets.is_floating_point():

        def loss(values: Tensor) -> float:
            if values.shape != targets.shape:
                raise ShapeError(
                    f"targets: expected the shape of the values, {tuple(values.shape)}, got {tuple(targets.shape)}"
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
                f"targets: expected classes from 0 to {width - 1}, positions in values of width {width}, got "
                f"{int(classes.min())} to {int(classes.max())}; pass values as floating-point numbers instead"
            )
        return float((values.argmax(-1) == classes).double().mean())

    return accuracy, "accuracy"


def _number(result: object) -> float:
    return check_real("metric(values, targets)", result.detach() if isinstance(result, Tensor) else result)
