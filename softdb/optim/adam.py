"""`RowAdam`: AdamW of the rows that a gradient names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdb._checks import check_number, describe
from softdb.errors import DtypeError
from softdb.optim.blocks import RowBlock
from softdb.optim.row_optimizer import RowOptimizer
from softdb.table.hooks import register_row_optimizer

__all__ = ["RowAdam"]


@register_row_optimizer
class RowAdam(RowOptimizer):
    r"""Update only the rows that a gradient names, by AdamW.

    For each of those rows, at the Parameter's t-th step, s = t − born::

        p   = p * prod(1 - lr_i * weight_decay  for every step i since the row's last update, this one included)
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g**2
        p   = p - lr * sqrt(1 - beta2**s) / (1 - beta1**s) * m / (sqrt(v) + eps)

    which is `torch.optim.SparseAdam`, with weight decay. ``born`` is 0, and s the Parameter's step count, except for
    rows that came into a store later: their first step is a new optimiser's. Nothing is read, written or allocated
    for rows without gradient; a dense gradient updates every row, one block of rows at a time.

    The state of a store's row is reset when its slot holds another row than at its last step, and when
    `SoftKVStore.revive` has given the row another content. State grows with the storage. Free slots stay as they are.

    Weight decay is AdamW's: independent of the gradient, and of how often a row is read. The decay of the steps
    without an update is applied at the next update, also where ``lr`` or ``weight_decay`` changed in between. If
    it were applied only at updates, rarely read rows would be hardly regularised, and the strength would depend on
    the size of the batch. A read in between sees the row as its last update left it. The decay of a row that came into
    a store later begins with its first step.

    Rows in bfloat16 or float16 are computed in float32 and stored by stochastic rounding: with a and b the neighbours
    of p in the rows' dtype, a <= p < b::

        p = b if u < (p - a) / (b - a) else a              u uniform in [0, 1)

    The mean of the stored numbers is p, so steps that are far smaller than b - a add up; rounding to the nearest would
    drop each of them. A number that the dtype holds is stored as it is. u is a hash of a seed, the Parameter's step,
    the row and the column. torch's default generator draws the seed at the first step, one per Parameter, so
    `torch.manual_seed` repeats a run; the seed is part of `state_dict`, so a resumed run is the same to the bit. In a
    process group of `torch.distributed` the seed is the Parameter's place in the optimiser, so replicas stay equal.

    Args:
        params: Parameters, or groups of them with options of their own, as for any optimiser.
        lr: The step size, at least 0.
        betas: The decay rates of the means of g and g², each in [0, 1).
        eps: Added to the denominator, at least 0; not bias-corrected, as in SparseAdam.
        weight_decay: At least 0, and ``lr * weight_decay`` below 1.

    Memory: two numbers for each number of the Parameter, in its dtype but at least float32; for a store another 16
    bytes a row; with weight decay another 8.

    Raises:
        ArgumentError, DtypeError: An argument is not as above.

    Source: Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101) for the decay; the lazy
    variant is that of `torch.optim.SparseAdam`; Gupta et al. 2015 (arXiv 1502.02551) for stochastic rounding, Zamirai
    et al. 2020 (arXiv 2010.06192) for its use in the update of bfloat16 weights.

    Example:
        >>> import torch
        >>> from softdb import SoftKVStore
        >>> from softdb.optim import RowAdam
        >>> store = SoftKVStore(8, 4, trainable=True)
        >>> ids = store.add(torch.eye(8), torch.zeros(8, 4))
        >>> optimizer = RowAdam(store.parameters(), lr=0.1)
        >>> loss = (store.read(torch.eye(8)[:1], "topk", k=2).values - 1).square().sum()
        >>> loss.backward()
        >>> optimizer.step()
        >>> store.values.abs().sum(1) > 0
        tensor([ True,  True, False, False, False, False, False, False])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        checked, given = super()._check_options(options), options["betas"]
        betas = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise DtypeError(f"betas: expected two numbers, got {describe(given)}")
        pair = tuple(check_number(f"betas[{number}]", beta, below=1.0) for number, beta in enumerate(betas))
        return checked | {"betas": pair}

    def _initial_moments(self, options: dict[str, Any]) -> dict[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def _state_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def _step_size(self, age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
        lr: float = options["lr"]
        beta1: float
        beta2: float
        beta1, beta2 = options["betas"]
        if isinstance(age, int):
            return lr * math.sqrt(1 - beta2**age) / (1 - beta1**age)
        exponent = age.to(torch.float64)
        return torch.sqrt(1 - torch.pow(beta2, exponent)).mul_(lr).div_(1 - torch.pow(beta1, exponent))

    def _update_moments(
        self, block: RowBlock, gradient: Tensor, moments: list[Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        means, squares = moments
        beta1, beta2 = options["betas"]
        mean = block.take(means)
        block.put(means, mean.lerp_(gradient, 1 - beta1))
        square = block.take(squares)
        block.put(squares, square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2))
        return mean, torch.sqrt(square, out=block.spare(square)).add_(options["eps"])
