"""Hard against soft: what each way of reading a store gives and costs, as tables and pictures.

`compare` reads the same queries in every way asked for and sets the answers side by side; `anneal` compares the
gradients that go back through them; `explain` shows which rows one answer is made of. What they return prints itself as
a table, goes to a dictionary or a CSV file, and draws itself where matplotlib is installed (``pip install
'softdb[plot]'``).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import math
import os
import statistics
import sys
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, TypeVar

import torch
from torch import Tensor

from softdb.errors import (
    ArgumentError,
    DtypeError,
    MissingPackageError,
    ShapeError,
    check_above_zero,
    check_choice,
    check_finite,
    check_float_tensor,
    check_positive,
    check_real,
    describe,
)
from softdb.functional import Read
from softdb.normalizers import NORMALIZERS, SPARSE

__all__ = ["Annealing", "Comparison", "Explanation", "Gradient", "Setting", "anneal", "compare", "explain"]

T = TypeVar("T")
Metric = Callable[[Tensor, Tensor], float | Tensor]
Labels = Sequence[str] | Mapping[int, str]

MODES = ("exact", "topk", "hard")
# What a temperature is multiplied by where none are given: from nearly even weights to nearly one row.
FACTORS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
BATCH = 512  # queries in a read
TIE = 1e-5  # relative difference of scores that rounding may make in float32
WIDTH = 79
BAR_WIDTH = 12


class Readable(Protocol):
    """What the lab needs of a store: a `softdb.SoftKVStore`, or anything that answers the same."""

    @property
    def read(self) -> Callable[..., Read]:
        """As `softdb.SoftKVStore.read`."""


class _Printed:
    """What prints itself."""

    def table(self, file: TextIO | None = None) -> None:
        """Print it, to ``file`` or the standard output."""
        (sys.stdout if file is None else file).write(f"{self}\n")


class _Columns(_Printed, ABC):
    """What goes to a dictionary, and to a file."""

    @abstractmethod
    def to_dict(self) -> dict[str, list[Any]]:
        """A list for each column."""

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns to a file."""
        columns = self.to_dict()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


# -- compare ---------------------------------------------------------------------------------------------


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
class Comparison(_Columns):
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
        return _aligned(headings, cells)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw distance, and the metric or else the mass, against temperature and against k.

        Args:
            path: The picture to write; its ending says of which kind.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: Pictures of that kind are not known.
        """
        figure = _figure(path, (11, 8))
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
            color = ENDS[first.mode] if first.k is None else _shade(ks.index(first.k), len(ks))
            points = [row.temperature for row in rows], [getattr(row, field) for row in rows]
            axes.plot(*points, marker=".", label=name, color=color, linestyle=DASHES[first.normalizer])
        _cooling(axes, [row.temperature for row in self.settings])

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
            color = _shade(number, len(temperatures))
            axes.plot(places, values, ".-", label=f"{temperature:.3g}", color=color)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel("k: one row to all")
        axes.legend(title="temperature", fontsize="x-small", title_fontsize="x-small", ncols=2)


FIELDS = dataclasses.fields(Setting)
ENDS = {"exact": "black", "hard": "#d55e00"}
DASHES: dict[str, Any] = {
    "softmax": "-",
    "straight_through": ":",
    "gumbel": "-.",
    "sparsemax": "--",
    "entmax15": (0, (5, 1, 1, 1, 1, 1)),
}


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
        normalizers: Of those of `softdb.normalizers`.
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
    modes, normalizers = _chosen("modes", modes, MODES), _chosen("normalizers", normalizers, NORMALIZERS)
    candidates = _given("ks", ks, functools.partial(check_positive, "ks")) if "topk" in modes else []
    cooling = _temperatures(store, temperatures)
    judge, judged = _judge(queries, targets, metric)
    _check_draws(store, normalizers)
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
    with _progress(len(cooling) * (1 + len(ways))) as advance:
        for temperature in cooling:
            reference = _Reference(store, batches, temperature)
            seconds.append(reference.seconds)
            advance()
            for mode, name, k in ways:
                found.append(_measured(store, batches, reference, mode, name, k, generator, judge))
                advance()
    exact = statistics.median(seconds)
    spent = {row.name: statistics.median(other.time for other in found if other.name == row.name) for row in found}
    settings = tuple(dataclasses.replace(row, time=spent[row.name] / exact) for row in found)
    return Comparison(settings, judged, len(queries))


class _Reference:
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
    reference: _Reference,
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
    if normalizer == "gumbel":
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
    reference: _Reference,
    mode: str,
    normalizer: str,
    reads: Sequence[Read],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query: whether its heaviest row is the best of all, the mass of rows with weight, and the entropy."""
    if mode == "exact" and normalizer == "straight_through":
        held = (reference.best_score - reference.lse).exp().nan_to_num(0.0)
        return torch.ones_like(held), held, torch.zeros_like(held)
    agreement, mass, entropy = [], [], []
    places = torch.arange(len(reference.lse), device=reference.lse.device).split(BATCH)
    for batch, read, place in zip(batches, reads, places, strict=True):
        if mode == "exact" and normalizer in SPARSE:
            read = _whole_support(store, batch, options)
        if read.ids is None or read.weights is None or read.scores is None:
            raise DtypeError(f"store: expected a {mode} read to tell ids, weights and scores, got none")
        weights, scores = read.weights.double(), read.scores.double()
        if normalizer == "gumbel":  # whose scores have noise
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


# -- anneal ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient:
    """How the gradient through one normalizer differs from the soft one, at one temperature.

    Attributes:
        normalizer: "softmax" for the soft one itself.
        temperature: Divides the scores.
        size: The norm of the mean gradient of the queries.
        bias: The norm of the difference of the mean gradient and the soft one, divided by that of the soft one.
        deviation: The root mean square distance of single gradients from their mean, divided likewise; 0 where nothing
            is random, NaN for a single draw. With n draws, as much as ``deviation / sqrt(n)`` of the bias is chance.
        cosine: Of the angle between the mean gradient and the soft one.
        loss: The mean loss of the answers.
    """

    normalizer: str
    temperature: float
    size: float
    bias: float
    deviation: float
    cosine: float
    loss: float


@dataclass(frozen=True)
class Annealing(_Columns):
    """What `anneal` found.

    Attributes:
        gradients: One for each temperature and normalizer, the softest temperature first.
        draws: How often what is random is drawn.
    """

    gradients: tuple[Gradient, ...]
    draws: int

    def to_dict(self) -> dict[str, list[Any]]:
        """A list for each column."""
        names = [field.name for field in dataclasses.fields(Gradient)]
        return {name: [getattr(row, name) for row in self.gradients] for name in names}

    def __str__(self) -> str:
        headings = ["normalizer", "temperature", "size", "bias", "deviation", "cosine", "loss"]
        return _aligned(
            headings,
            [
                [row.normalizer, f"{row.temperature:.4g}", *(f"{getattr(row, name):.4g}" for name in headings[2:])]
                for row in self.gradients
            ],
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw size, bias and deviation of the gradients against temperature.

        Args:
            path: The picture to write; its ending says of which kind.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: Pictures of that kind are not known.
        """
        figure = _figure(path, (13, 4.2))
        names = list(dict.fromkeys(row.normalizer for row in self.gradients))
        for place, (field, heading) in enumerate(
            [
                ("size", "norm of the gradient"),
                ("bias", "bias, of the soft gradient"),
                ("deviation", "deviation of one draw"),
            ]
        ):
            axes = figure.add_subplot(1, 3, place + 1)
            for number, name in enumerate(names):
                if name == "softmax" and field != "size":
                    continue
                rows = [row for row in self.gradients if row.normalizer == name]
                points = [row.temperature for row in rows], [getattr(row, field) for row in rows]
                axes.plot(*points, ".-", label=name, color=_shade(number, len(names)))
            _cooling(axes, [row.temperature for row in self.gradients])
            axes.set_title(heading, fontsize="medium")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
        figure.savefig(path, dpi=120)


def anneal(
    store: Readable,
    queries: Tensor,  # (B, key_dim)
    loss: Callable[[Tensor], Tensor],
    *,
    temperatures: Sequence[float] | None = None,
    normalizers: Sequence[str] = ("straight_through", "gumbel"),
    draws: int = 32,
    generator: torch.Generator | None = None,
) -> Annealing:
    """Compare the gradients that reach the queries, from soft to hard.

    At each temperature, with ``g`` the gradient of ``loss(store.read(queries, normalizer=...).values)``, and ``soft``
    that for "softmax"::

        bias = norm(g.mean(over draws) - soft) / norm(soft)
        deviation = sqrt(norm(g - g.mean(over draws)).square().mean(over draws)) / norm(soft)

    For a training that ends hard, lower the temperature as it goes, by the same factor each step::

        for step in range(steps):
            temperature = first * (last / first) ** (step / (steps - 1))
            values = store.read(queries, temperature=temperature).values

    and stop where the table says that the gradient vanishes.

    Args:
        store: A `softdb.SoftKVStore`, or anything that answers `read` the same way.
        queries: What is looked for.
        loss: A scalar of the values, (B, value_dim).
        temperatures: What divides the scores; from 8 times to a quarter of the store's own unless given.
        normalizers: Those to compare with "softmax".
        draws: How often to draw what is random.
        generator: What "gumbel" draws from.

    Returns:
        An `Annealing`: ``.table()`` prints it, ``.plot(path)`` draws it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is not as above.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.randn(50, 2), torch.randn(50, 1))
        >>> found = lab.anneal(store, torch.randn(8, 2), lambda values: values.square().mean(), temperatures=(1.0, 0.1))
        >>> [row.normalizer for row in found.gradients]
        ['softmax', 'straight_through', 'gumbel', 'softmax', 'straight_through', 'gumbel']
    """
    check_float_tensor("queries", queries, (None, None))
    check_finite("queries", queries)
    names = list(dict.fromkeys(("softmax", *_chosen("normalizers", normalizers, NORMALIZERS))))
    times = check_positive("draws", draws)
    cooling = _temperatures(store, temperatures)
    _check_draws(store, names)

    def gradient(name: str, temperature: float) -> tuple[Tensor, float]:
        options: dict[str, Any] = {"generator": generator} if name == "gumbel" else {}
        with torch.inference_mode(False), torch.enable_grad():
            leaf = queries.detach().clone().requires_grad_()
            result = loss(store.read(leaf, normalizer=name, temperature=temperature, **options).values)
            if not isinstance(result, Tensor) or result.dim() or not result.requires_grad:
                raise DtypeError(f"loss: expected a scalar tensor that depends on the values, got {describe(result)}")
            (found,) = torch.autograd.grad(result, leaf)
        return found.double(), float(result.detach())

    rows = []
    with _progress(len(cooling) * len(names)) as advance:
        for temperature in cooling:
            soft, _ = gradient("softmax", temperature)
            for name in names:
                drawn = [gradient(name, temperature) for _ in range(times if name == "gumbel" else 1)]
                rows.append(_compared(name, temperature, soft, drawn))
                advance()
    return Annealing(tuple(rows), times)


def _compared(name: str, temperature: float, soft: Tensor, drawn: Sequence[tuple[Tensor, float]]) -> Gradient:
    gradients = torch.stack([gradient for gradient, _ in drawn]).flatten(1)
    mean, soft = gradients.mean(0), soft.flatten()
    norm, size = float(soft.norm()), float(mean.norm())
    spread = float((gradients - mean).square().sum(-1).mean().sqrt())
    return Gradient(
        normalizer=name,
        temperature=temperature,
        size=size,
        bias=_ratio(float((mean - soft).norm()), norm),
        deviation=math.nan if name == "gumbel" and len(drawn) < 2 else _ratio(spread, norm),
        cosine=_ratio(float(mean @ soft), size * norm),
        loss=sum(loss for _, loss in drawn) / len(drawn),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


# -- explain ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Explanation(_Printed):
    """What `explain` found, for each of Q queries, about the k best rows.

    Attributes:
        queries: What the queries are called.
        labels: What each row is called, by its id.
        ids: The k best rows of each query, (Q, k), best first; -1 where there were fewer.
        scores: Their scores, (Q, k).
        weights: Their weights, (Q, k).
        contributions: What each adds to the answer, ``weight * value``, (Q, k, value_dim).
        values: The answers, of all rows, (Q, value_dim).
        rest: The weight of all other rows, (Q,).
        effective_rows: exp(entropy of all weights), (Q,).
        temperature: What the scores are divided by.
        temperatures: Those of ``cooling``, the softest first.
        cooling: The weights of the same rows at each temperature, (Q, temperatures, k).
    """

    queries: tuple[str, ...]
    labels: Mapping[int, str]
    ids: Tensor
    scores: Tensor
    weights: Tensor
    contributions: Tensor
    values: Tensor
    rest: Tensor
    effective_rows: Tensor
    temperature: float
    temperatures: tuple[float, ...]
    cooling: Tensor

    def __str__(self) -> str:
        return "\n\n".join("\n".join(self._lines(query)) for query in range(len(self.queries)))

    def _lines(self, query: int) -> Iterator[str]:
        yield f"{self.queries[query]}  (temperature {self.temperature:.4g})"
        for place, row in enumerate(self.ids[query].tolist()):
            if row < 0:
                continue
            weight = float(self.weights[query, place])
            bar = "#" * round(BAR_WIDTH * weight)
            start = f"  {100 * weight:5.1f} %  {bar:<{BAR_WIDTH}}  {self._added(query, place)}  "
            yield start + _short(self.labels[row], max(20, WIDTH - len(start)))
        rest, effective = 100 * float(self.rest[query]), float(self.effective_rows[query])
        yield f"  {rest:5.1f} %  in all other rows; {effective:,.1f} rows answer"
        shown = self.cooling[query, :, 0].tolist()
        steps = ", ".join(
            f"{100 * weight:.0f} % at {t:.3g}" for t, weight in zip(self.temperatures, shown, strict=True)
        )
        yield from textwrap.wrap(f"the best row's weight: {steps}", WIDTH, initial_indent="  ", subsequent_indent="  ")

    def _added(self, query: int, place: int) -> str:
        contribution = self.contributions[query, place]
        if contribution.numel() == 1:
            return f"adds {float(contribution):9.3g}"
        return f"adds a vector of norm {float(contribution.norm()):.3g}" if contribution.numel() else "adds nothing"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the weights: of several queries a heat map of all rows seen; of each query bars, and how they move.

        Args:
            path: The picture to write; its ending says of which kind.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: Pictures of that kind are not known.
        """
        count, shown = len(self.queries), min(self.ids.shape[1], 8)
        lines = count + (count > 1)
        heat = 0.3 * len(self._rows_seen(shown)) + 1.4 if count > 1 else 0.0
        figure = _figure(path, (13, heat + 3.0 * count))
        grid = figure.add_gridspec(lines, 2, height_ratios=[heat] * (count > 1) + [3.0] * count, width_ratios=[3, 2])
        if count > 1:
            self._heat_map(figure.add_subplot(grid[0, :]), shown)
        for query in range(count):
            self._bars(figure.add_subplot(grid[query + (count > 1), 0]), query, shown)
            self._moving(figure.add_subplot(grid[query + (count > 1), 1]), query, min(shown, 5))
        figure.savefig(path, dpi=120)

    def _rows_seen(self, shown: int) -> list[int]:
        return [row for row in dict.fromkeys(self.ids[:, :shown].flatten().tolist()) if row >= 0]

    def _heat_map(self, axes: Any, shown: int) -> None:
        rows = self._rows_seen(shown)
        weights = torch.zeros(len(rows), len(self.queries), device="cpu")
        for query, ids in enumerate(self.ids.tolist()):
            for place, row in enumerate(ids):
                if row in rows:
                    weights[rows.index(row), query] = self.weights[query, place]
        image = axes.imshow(weights.tolist(), aspect="auto", cmap="Blues", vmin=0, vmax=float(weights.max()) or 1.0)
        axes.set_xticks(range(len(self.queries)), [_drawn(query, 40) for query in self.queries])
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(rows)), [_drawn(self.labels[row], 60) for row in rows], fontsize="small")
        for (line, column), weight in zip(
            itertools.product(range(len(rows)), range(len(self.queries))), weights.flatten().tolist(), strict=True
        ):
            if weight >= 0.005:
                color = "white" if weight > 0.6 * float(weights.max()) else "black"
                axes.text(
                    column, line, f"{100 * weight:.0f} %", ha="center", va="center", fontsize="small", color=color
                )
        axes.figure.colorbar(image, ax=axes, label="weight", fraction=0.03, pad=0.01)

    def _bars(self, axes: Any, query: int, shown: int) -> None:
        rows = [(row, place) for place, row in enumerate(self.ids[query, :shown].tolist()) if row >= 0]
        names = [_drawn(self.labels[row], 50) for row, _ in rows] + ["all other rows"]
        held = [float(self.weights[query, place]) for _, place in rows]
        held.append(max(0.0, 1.0 - sum(held)))
        colors = ["#d55e00", *["#0072b2"] * (len(rows) - 1), "#999999"][-len(names) :]
        axes.barh(range(len(names)), held, color=colors)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight; a hard lookup takes the first row alone", fontsize="small")
        effective = float(self.effective_rows[query])
        axes.set_title(
            f"“{_drawn(self.queries[query], 80)}”: {effective:,.1f} rows answer", fontsize="medium", loc="left"
        )

    def _moving(self, axes: Any, query: int, shown: int) -> None:
        for place, row in enumerate(self.ids[query, :shown].tolist()):
            if row >= 0:
                color = "#d55e00" if place == 0 else _shade(place, shown)
                weights = self.cooling[query, :, place].tolist()
                axes.plot(self.temperatures, weights, ".-", label=_drawn(self.labels[row], 28), color=color)
        axes.axvline(self.temperature, color="#999999", linestyle=":")
        _cooling(axes, self.temperatures)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("weight", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="upper left")


@torch.no_grad()
def explain(
    store: Any,
    query: Tensor,  # (key_dim,) or (Q, key_dim)
    labels: Labels | None = None,
    k: int = 10,
    *,
    query_labels: Sequence[str] | None = None,
    temperature: float | None = None,
    temperatures: Sequence[float] | None = None,
) -> Explanation:
    """Which rows a soft answer is made of, what each adds, and how their weights move with the temperature.

    Of the exact read; ``values = sum of contributions`` over all rows, of which the k best are told.

    Args:
        store: A `softdb.SoftKVStore`.
        query: What is looked for, once or several times.
        labels: What rows are called: one for each, in the order of ``store.ids``, or by id.
        k: How many of the best rows to tell.
        query_labels: What the queries are called.
        temperature: What the scores are divided by; the store's own unless given.
        temperatures: For the weights' movement; from 8 times to a quarter of the store's own unless given.

    Returns:
        An `Explanation`: ``.table()`` prints it, ``.plot(path)`` draws it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is not as above.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
        >>> told = lab.explain(store, torch.tensor([1.0, 0.0]), ["east", "north"], query_labels=["where to?"])
        >>> print(told)
        where to?  (temperature 1)
           94.4 %  ###########   adds    0.944  east
            5.6 %  #             adds    0.112  north
            0.0 %  in all other rows; 1.2 rows answer
          the best row's weight: 59 % at 8, 67 % at 4, 80 % at 2, 94 % at 1, 100 % at
          0.5, 100 % at 0.25
    """
    check_float_tensor("query", query, (-1, None))
    if query.dim() > 2 or query.numel() == 0:
        raise ShapeError(f"query: expected shape (key_dim,) or (Q, key_dim), at least one, got {tuple(query.shape)}")
    check_finite("query", query)
    queries = query.reshape(-1, query.shape[-1])
    count = check_positive("k", k)
    cooling = _temperatures(store, temperatures)
    own = float(store.temperature) if temperature is None else check_above_zero("temperature", temperature)
    names = (
        tuple(f"query {number}" for number in range(len(queries)))
        if query_labels is None
        else tuple(map(str, query_labels))
    )
    if isinstance(query_labels, str) or len(names) != len(queries):
        raise ShapeError(f"query_labels: expected one for each of {len(queries)} queries, got {len(names)}")
    reference = _Reference(store, [queries], own)
    read = store.read(queries.double(), k=count, temperature=own)
    known = read.ids >= 0
    rows, places = read.ids[known].unique(return_inverse=True)
    values = torch.zeros(*read.ids.shape, reference.values.shape[-1], dtype=torch.float64, device=queries.device)
    values[known] = store.get(rows).values.double()[places]
    moved = [store.read(queries.double(), k=count, temperature=step).weights for step in cooling]
    return Explanation(
        queries=names,
        labels=_labels(store, labels, rows.tolist()),
        ids=read.ids,
        scores=read.scores,
        weights=read.weights,
        contributions=read.weights.unsqueeze(-1) * values,
        values=reference.values,
        rest=(1 - read.weights.sum(-1)).clamp(min=0),
        effective_rows=reference.entropy.exp(),
        temperature=own,
        temperatures=tuple(cooling),
        cooling=torch.stack(moved, dim=1),
    )


def _labels(store: Any, labels: Labels | None, wanted: list[int]) -> dict[int, str]:
    """What the rows of the ids ``wanted`` are called."""
    if labels is None:
        return {row: f"row {row}" for row in wanted}
    if isinstance(labels, Mapping):
        return {row: str(labels.get(row, f"row {row}")) for row in wanted}
    if isinstance(labels, (str, Tensor)):
        raise DtypeError(f"labels: expected a sequence of strings, or a mapping from ids, got {describe(labels)}")
    if len(labels) != len(store):
        raise ShapeError(
            f"labels: expected one for each of {len(store):,} rows, in the order of store.ids, got {len(labels):,}"
        )
    places = {row: place for place, row in enumerate(store.ids.tolist())}
    return {row: str(labels[places[row]]) for row in wanted}


# -- checks, tables and pictures -------------------------------------------------------------------------


def _given(name: str, values: Iterable[Any], check: Callable[[Any], T]) -> list[T]:
    """Check each of ``values``; return each once, and at least one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DtypeError(f"{name}: expected a sequence, got {values!r}; write ({values!r},)")
    found = list(dict.fromkeys(map(check, values)))
    if not found:
        raise ArgumentError(f"{name}: expected at least one, got none")
    return found


def _chosen(name: str, values: Iterable[str], choices: Sequence[str]) -> list[str]:
    """Each once, at least one, and all among ``choices``."""

    def checked(value: str) -> str:
        check_choice(name, value, choices)
        return value

    return _given(name, values, checked)


def _check_draws(store: Any, normalizers: Sequence[str]) -> None:
    """Raise where what is called a draw would be the best row."""
    if "gumbel" in normalizers and not getattr(store, "training", True):
        raise ArgumentError(
            "store: expected one in training mode, since 'gumbel' draws nothing in eval mode; call store.train(), or "
            "leave it out of normalizers"
        )


def _temperatures(store: Any, temperatures: Sequence[float] | None) -> list[float]:
    """From soft to hard, each once."""
    if temperatures is None:
        own = float(getattr(store, "temperature", 1.0))
        return [factor * own for factor in FACTORS]
    return sorted(
        _given("temperatures", temperatures, functools.partial(check_above_zero, "temperature")), reverse=True
    )


def _aligned(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """What to call after each of ``total`` steps: a progress bar's, on a terminal where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, disable=None, leave=False) as bar:
        yield bar.update


def _figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"matplotlib: expected it to be installed, to draw {os.fspath(path)!r}; pip install 'softdb[plot]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if os.path.splitext(path)[1][1:].lower() not in known:
        raise ArgumentError(
            f"path: expected the ending of a picture, one of {', '.join(sorted(known))}, got {os.fspath(path)!r}"
        )
    return figure


def _shade(place: int, count: int) -> Any:
    """One of a row of colours that are told apart by their lightness too."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * place / max(1, count - 1))


def _cooling(axes: Any, temperatures: Iterable[float]) -> None:
    """Let temperatures fall from left to right."""
    ticks = sorted(set(temperatures))
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks[:: max(1, len(ticks) // 7)], [f"{tick:.3g}" for tick in ticks[:: max(1, len(ticks) // 7)]])
    axes.minorticks_off()
    axes.set_xlabel("temperature: soft to hard", fontsize="small")


def _short(text: str, width: int) -> str:
    """``text`` in one line, and no longer than ``width``."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _drawn(text: str, width: int) -> str:
    """`_short` for matplotlib, which takes dollars for formulas and leaves out of legends what begins with a bar."""
    text = _short(text, width).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
