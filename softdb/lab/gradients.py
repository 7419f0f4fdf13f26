"""Comparison of the gradients of the queries between normalizers and temperatures."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softdb._checks import check_finite, check_float_tensor, check_positive, describe
from softdb.errors import DtypeError
from softdb.lab.choices import Readable, check_can_draw, check_choices, progress, resolve_temperatures
from softdb.lab.plotting import create_figure, sample_color, set_temperature_axis
from softdb.lab.tables import Line, Tabular, format_table, merge_equal_lines
from softdb.scoring.normalizers import NORMALIZERS, is_random

__all__ = ["Gradient", "GradientComparison", "compare_gradients"]


MEASUREMENT_COLUMNS = ("size", "bias", "deviation", "cosine", "loss")


@dataclass(frozen=True)
class Gradient:
    """Gradient of the queries through one normalizer at one temperature.

    Attributes:
        normalizer: Name of the normalizer.
        temperature: Divisor of the scores.
        size: Norm of the mean gradient, where the mean is over draws.
        bias: Norm of the difference between the mean gradient and the softmax gradient, divided by the norm of the
            softmax gradient.
        deviation: Root mean square distance between the gradient of a draw and the mean gradient, divided by the norm
            of the softmax gradient. 0 for a deterministic normalizer, NaN for a single draw of a random one. With n
            draws, the sampling error adds about ``deviation / sqrt(n)`` to the bias.
        cosine: Cosine similarity of the mean gradient and the softmax gradient.
        loss: Loss, averaged over draws.
    """

    normalizer: str
    temperature: float
    size: float
    bias: float
    deviation: float
    cosine: float
    loss: float


@dataclass(frozen=True)
class GradientComparison(Tabular):
    """Result of `compare_gradients`.

    Attributes:
        gradients: One for each temperature and normalizer; highest temperature first.
        draws: Number of draws of a random normalizer.
    """

    gradients: tuple[Gradient, ...]
    draws: int

    def to_dict(self) -> dict[str, list[Any]]:
        """Return a list for each column."""
        names = [field.name for field in dataclasses.fields(Gradient)]
        return {name: [getattr(row, name) for row in self.gradients] for name in names}

    def __str__(self) -> str:
        lines = [
            Line(row.normalizer, row.temperature, tuple(f"{getattr(row, name):.4g}" for name in MEASUREMENT_COLUMNS))
            for row in self.gradients
        ]
        return format_table(["normalizer", "temperature", *MEASUREMENT_COLUMNS], merge_equal_lines(lines))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot size, bias and deviation of the gradients against temperature.

        Args:
            path: Image file to write. Its suffix selects the format.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: matplotlib does not support the suffix.
        """
        figure = create_figure(path, (13, 4.2))
        names = list(dict.fromkeys(row.normalizer for row in self.gradients))
        for place, (field, heading) in enumerate(
            [
                ("size", "norm of the gradient"),
                ("bias", "bias, relative to the softmax gradient"),
                ("deviation", "deviation of a draw, relative"),
            ]
        ):
            axes = figure.add_subplot(1, 3, place + 1)
            for number, name in enumerate(names):
                if name == "softmax" and field != "size":
                    continue
                rows = [row for row in self.gradients if row.normalizer == name]
                points = [row.temperature for row in rows], [getattr(row, field) for row in rows]
                axes.plot(*points, ".-", label=name, color=sample_color(number, len(names)))
            set_temperature_axis(axes, [row.temperature for row in self.gradients])
            axes.set_title(heading, fontsize="medium")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
        figure.savefig(path, dpi=120)


def compare_gradients(
    store: Readable,
    queries: Tensor,  # (B, key_dim)
    loss: Callable[[Tensor], Tensor],
    *,
    temperatures: Sequence[float] | None = None,
    normalizers: Sequence[str] = ("straight_through", "gumbel"),
    draws: int = 32,
    generator: torch.Generator | None = None,
) -> GradientComparison:
    """Compare the gradients of the queries with those of the softmax read.

    Let ``g`` be the gradient of ``loss(store.read(queries, normalizer=...).values)`` with respect to the queries, and
    ``soft`` this gradient for "softmax". At each temperature::

        bias = norm(g.mean(over draws) - soft) / norm(soft)
        deviation = sqrt(norm(g - g.mean(over draws)).square().mean(over draws)) / norm(soft)

    To train a model that will use hard reads, anneal the temperature: multiply it by the same factor in each step::

        for step in range(steps):
            temperature = first * (last / first) ** (step / (steps - 1))
            values = store.read(queries, temperature=temperature).values

    The column ``size`` of the table shows at which temperatures the gradient vanishes. Choose ``last`` above these
    temperatures.

    Args:
        store: A `softdb.SoftKVStore`, or another object with its `read`.
        queries: (B, key_dim), floating point.
        loss: Function from the values, (B, value_dim), to a scalar tensor.
        temperatures: Divisors of the scores; by default 8, 4, 2, 1, 0.5 and 0.25 times the store's own temperature.
        normalizers: Normalizers to compare with "softmax".
        draws: Number of draws of a random normalizer.
        generator: Generator for the noise of "gumbel". If None, the default generator of torch.

    Returns:
        A `GradientComparison`. ``print(found.table())`` prints it, ``found.plot(path)`` plots it.

    Raises:
        ArgumentError, ShapeError, DtypeError, NonFiniteError: An argument is invalid.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore, lab
        >>> store = SoftKVStore(key_dim=2, value_dim=1)
        >>> ids = store.add(torch.randn(50, 2), torch.randn(50, 1))
        >>> queries, loss = torch.randn(8, 2), lambda values: values.square().mean()
        >>> found = lab.compare_gradients(store, queries, loss, temperatures=(1.0, 0.1))
        >>> [row.normalizer for row in found.gradients]
        ['softmax', 'straight_through', 'gumbel', 'softmax', 'straight_through', 'gumbel']
    """
    check_float_tensor("queries", queries, (None, None))
    check_finite("queries", queries)
    names = list(dict.fromkeys(("softmax", *check_choices("normalizers", normalizers, NORMALIZERS))))
    draws = check_positive("draws", draws)
    resolved = resolve_temperatures(store, temperatures)
    check_can_draw(store, names)

    def compute_gradient(name: str, temperature: float) -> tuple[Tensor, float]:
        options: dict[str, Any] = {"generator": generator} if is_random(name) else {}
        with torch.inference_mode(False), torch.enable_grad():
            leaf = queries.detach().clone().requires_grad_()
            result = loss(store.read(leaf, normalizer=name, temperature=temperature, **options).values)
            if not isinstance(result, Tensor) or result.dim() or not result.requires_grad:
                raise DtypeError(f"loss: expected a scalar tensor that depends on the values, got {describe(result)}")
            (found,) = torch.autograd.grad(result, leaf)
        return found.double(), float(result.detach())

    rows = []
    with progress(len(resolved) * len(names)) as advance:
        for temperature in resolved:
            soft, _ = compute_gradient("softmax", temperature)
            for name in names:
                drawn = [compute_gradient(name, temperature) for _ in range(draws if is_random(name) else 1)]
                rows.append(_compare_draws(name, temperature, soft, drawn))
                advance()
    return GradientComparison(tuple(rows), draws)


def _compare_draws(name: str, temperature: float, soft: Tensor, drawn: Sequence[tuple[Tensor, float]]) -> Gradient:
    gradients = torch.stack([gradient for gradient, _ in drawn]).flatten(1)
    mean, soft = gradients.mean(0), soft.flatten()
    norm, size = float(soft.norm()), float(mean.norm())
    spread = float((gradients - mean).square().sum(-1).mean().sqrt())
    return Gradient(
        normalizer=name,
        temperature=temperature,
        size=size,
        bias=_divide(float((mean - soft).norm()), norm),
        deviation=math.nan if is_random(name) and len(drawn) < 2 else _divide(spread, norm),
        cosine=_divide(float(mean @ soft), size * norm),
        loss=sum(loss for _, loss in drawn) / len(drawn),
    )


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
