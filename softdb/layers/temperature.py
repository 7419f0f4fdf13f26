"""Temperature of a layer: a number, or a learned number for each head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from softdb._checks import check_above_zero, check_temperature
from softdb.attributes import ModuleWithProperties
from softdb.errors import ArgumentError, DtypeError
from softdb.scoring.metrics import compute_dtype
from softdb.transforms import is_active

__all__ = ["LayerWithTemperature", "Temperature"]


Temperature = float | Literal["learnable"]


class LayerWithTemperature(ModuleWithProperties):
    """Base class of the layers, whose scores are divided by a temperature.

    Attributes:
        log_temperature: Logarithms of the learned temperatures, (heads,); None for a temperature that is a number.
    """

    log_temperature: nn.Parameter | None
    _temperature: float | None = None

    def _make_temperature(self, temperature: object, heads: int, **factory_kwargs: Any) -> None:
        """Make the Parameter of a learnable temperature, or keep a number.

        With None, the layer has no temperature of its own: it reads with that of its store.
        """
        is_learnable = isinstance(temperature, str) and temperature == "learnable"
        parameter = nn.Parameter(torch.zeros(heads, **factory_kwargs)) if is_learnable else None
        self.register_parameter("log_temperature", parameter)
        if not is_learnable and temperature is not None:
            self._temperature = self._check_temperature(temperature)

    def _check_temperature(self, temperature: object) -> float:
        """Return a temperature as a float."""
        if isinstance(temperature, str):
            raise DtypeError(
                f"temperature: expected a number above 0, or 'learnable', in a {type(self).__name__}, got "
                f"{temperature!r}"
            )
        return check_above_zero("temperature", temperature)

    @property
    def _own_temperature(self) -> float | Tensor | None:
        """Temperature of the layer; None if it has none of its own."""
        if self.log_temperature is None:
            return self._temperature
        return self.log_temperature.to(compute_dtype(self.log_temperature)).exp()

    def _reset_temperature(self) -> None:
        """Set learned temperatures to 1."""
        if self.log_temperature is not None:
            nn.init.zeros_(self.log_temperature)

    @property
    def temperature(self) -> float | Tensor:
        """Divisor of the scores: a number, or learned ones for the heads, (heads,).

        Assign a number to change it, as a schedule does.

        Raises:
            ArgumentError: In an assignment, if the temperature is learned, or the number is not above 0.
        """
        own = self._own_temperature
        return 1.0 if own is None else own

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._assign_temperature(value)

    def _assign_temperature(self, value: float) -> None:
        """Check and keep a new number."""
        if self.log_temperature is not None:
            raise ArgumentError(
                f"temperature: expected no assignment to a {type(self).__name__} that learns it; write to "
                "log_temperature, or make the layer with a number"
            )
        self._temperature = self._check_temperature(value)

    def _divide_by_temperature(self, queries: Tensor, dimensions: int) -> Tensor:
        """Divide queries, whose scores are linear in them, by the temperature.

        Args:
            queries: (..., heads, *rest), where ``rest`` has ``dimensions`` dimensions.
            dimensions: Number of dimensions after that of the heads.

        Raises:
            ArgumentError: A learned temperature is not above 0 or not finite. A compiled graph does not check it.
        """
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            if not torch.compiler.is_compiling() and not is_active():
                check_temperature(temperature, temperature.shape)
            return (queries / temperature.reshape(-1, *[1] * dimensions)).to(queries.dtype)
        return queries if temperature == 1.0 else queries / temperature

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # torch would register a Parameter instead of calling the setter.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._parameters.setdefault("log_temperature", None)  # Older pickles lack it.
