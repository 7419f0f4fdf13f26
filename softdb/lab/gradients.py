"""`anneal`: the gradients that go back through ways of reading, as the temperature falls."""

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
from softdb.lab.choices import Readable, check_draws, chosen_of, progress, temperatures_of
from softdb.lab.plotting import cooling_axis, figure_of, shade
from softdb.lab.tables import Columns, aligned
from softdb.scoring.normalizers import NORMALIZERS, is_random

__all__ = ["Annealing", "Gradient", "anneal"]


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
class Annealing(Columns):
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
        return aligned(
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
        figure = figure_of(path, (13, 4.2))
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
                axes.plot(*points, ".-", label=name, color=shade(number, len(names)))
            cooling_axis(axes, [row.temperature for row in self.gradients])
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
    names = list(dict.fromkeys(("softmax", *chosen_of("normalizers", normalizers, NORMALIZERS))))
    times = check_positive("draws", draws)
    cooling = temperatures_of(store, temperatures)
    check_draws(store, names)

    def gradient(name: str, temperature: float) -> tuple[Tensor, float]:
        options: dict[str, Any] = {"generator": generator} if is_random(name) else {}
        with torch.inference_mode(False), torch.enable_grad():
            leaf = queries.detach().clone().requires_grad_()
            result = loss(store.read(leaf, normalizer=name, temperature=temperature, **options).values)
            if not isinstance(result, Tensor) or result.dim() or not result.requires_grad:
                raise DtypeError(f"loss: expected a scalar tensor that depends on the values, got {describe(result)}")
            (found,) = torch.autograd.grad(result, leaf)
        return found.double(), float(result.detach())

    rows = []
    with progress(len(cooling) * len(names)) as advance:
        for temperature in cooling:
            soft, _ = gradient("softmax", temperature)
            for name in names:
                drawn = [gradient(name, temperature) for _ in range(times if is_random(name) else 1)]
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
        deviation=math.nan if is_random(name) and len(drawn) < 2 else _ratio(spread, norm),
        cosine=_ratio(float(mean @ soft), size * norm),
        loss=sum(loss for _, loss in drawn) / len(drawn),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
