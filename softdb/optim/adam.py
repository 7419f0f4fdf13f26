"""`RowAdam`: AdamW for rows with a gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softdb._checks import check_flag, check_number, describe
from softdb.errors import DtypeError
from softdb.kernels.cuda import launch
from softdb.optim.blocks import RowBlock
from softdb.optim.rounding import NOISE_DTYPES
from softdb.optim.row_optimizer import RowOptimizer
from softdb.optim.row_state import State, advance_log_decay
from softdb.scoring.gumbel import hash_number
from softdb.table.hooks import register_row_optimizer
from softdb.table.storage import RowStorage

__all__ = ["RowAdam"]

# Largest number of elements of a row for the kernel, whose programs hold whole rows in registers.
MAX_KERNEL_ELEMENTS = 8192


@register_row_optimizer
class RowAdam(RowOptimizer):
    r"""Row-wise AdamW: updates only rows with a gradient.

    For each row with a gradient, with s the step number of the row::

        p   = p * prod(1 - lr_i * weight_decay  for every step i since the row's last update, including this one)
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g**2
        p   = p - lr * sqrt(1 - beta2**s) / (1 - beta1**s) * m / (sqrt(v) + eps)

    For a row-sparse gradient this is `torch.optim.SparseAdam` with weight decay. Rows without a gradient are neither
    read nor written, and no memory is allocated for their update. A dense gradient updates every row, one block of rows
    at a time, with ``eps * sqrt(1 - beta2**s)`` instead of eps: this is `torch.optim.AdamW`. With ``amsgrad``, the
    largest v of all steps of the row replaces v in the last line. With ``maximize``, -g replaces g.

    s is the step count of the Parameter, except for rows that are added to a store later: their first update has s = 1,
    as in a new optimizer.

    The state of a slot of a store is reset if the slot has received a new row since the slot's last step, or
    if `SoftKVStore.revive` has replaced the content of the row. State grows with the storage. Free slots are not
    updated.

    Weight decay is decoupled as in AdamW: it depends neither on the gradient nor on how often a row is read. A row's
    update first applies the decay of all steps since its last update, each with the ``lr`` and ``weight_decay`` of that
    step. If decay were applied for the current step only, rarely read rows would hardly be regularized, and the
    regularization would depend on the batch size. Reads between two updates see the row without the pending decay. A
    row that is added later decays from its first update on.

    Updates of rows in bfloat16 or float16 are computed in float32 and stored by stochastic rounding: with a and b the
    neighbors of p in the rows' dtype, and a <= p < b::

        p = b if u < (p - a) / (b - a) else a              u uniform in [0, 1)

    The expected value of the stored number is p, so steps far smaller than b - a accumulate. Rounding to nearest would
    discard each such step. A number that the dtype can represent is stored exactly. u is a hash of a seed, the
    Parameter's step, the row and the column. torch's default generator draws one seed per Parameter at its first step,
    so `torch.manual_seed` makes runs reproducible. The seed is part of `state_dict`, so a resumed run is bitwise equal.
    In a process group of `torch.distributed` the seed is the Parameter's index in the optimizer, so replicas stay
    equal.

    On CUDA, the step is one kernel in Triton for each Parameter, and does not wait for the device. Rows of a store are
    not updated if their gradient is not finite. The next write, `SoftKVStore.save`, `SoftKVStore.index_stats` or
    `SoftKVStore.check` raises `NonFiniteError`. Float64 rows, and rows of more than 8,192 elements, are updated by
    operations of torch.

    The optimizer can replace `torch.optim.AdamW` for a whole model, in which some gradients are row-sparse. It accepts
    the same arguments; only the default of ``weight_decay`` differs.

    Args:
        params: Parameters, named Parameters, or parameter groups with their own options, as for any optimizer.
        lr: Learning rate, at least 0. If it is a tensor, a schedule may change it in place.
        betas: Coefficients of the running averages of g and g², each in [0, 1).
        eps: Term that is added to the denominator, at least 0.
        weight_decay: Weight decay coefficient, at least 0, with ``lr * weight_decay`` below 1.
        amsgrad: Whether the denominator is the largest v of the row so far.
        maximize: Whether to maximize the objective: g is negated.
        foreach, fused: Without effect, since they choose an implementation in torch. At most one may be True.
        capturable, differentiable: Must be False.

    Memory: two tensors of the Parameter's shape, three with ``amsgrad``, in its dtype but at least float32. A store
    needs 16 more bytes per row, and weight decay 8 more bytes per row.

    Raises:
        ArgumentError, DtypeError: An argument is invalid.

    Source: Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101) for weight decay; Reddi et
    al. 2018 (arXiv 1904.09237) for ``amsgrad``; `torch.optim.SparseAdam` for lazy updates; Gupta et al. 2015 (arXiv
    1502.02551) for stochastic rounding; Zamirai et al. 2020 (arXiv 2010.06192) for stochastic rounding in the update of
    bfloat16 weights.

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

    optional_moments = ("max_exp_avg_sq",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        checked, given = super()._check_options(options), options["betas"]
        betas = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise DtypeError(f"betas: expected two numbers, got {describe(given)}")
        pair = tuple(check_number(f"betas[{number}]", beta, below=1.0) for number, beta in enumerate(betas))
        return checked | {"betas": pair, "amsgrad": check_flag("amsgrad", options.get("amsgrad", False))}

    def _initial_moments(self, options: dict[str, Any]) -> dict[str, float]:
        moments = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
        return moments | dict.fromkeys(self.optional_moments, 0.0) if options["amsgrad"] else moments

    def _state_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def _step_size(self, age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
        lr: float = options["lr"]
        beta1: float = options["betas"][0]
        correction = 1 - (beta1**age if isinstance(age, int) else torch.pow(beta1, age.to(torch.float64)))
        return _root_correction(age, options) * lr / correction

    def _epsilon(self, age: int | Tensor, is_dense: bool, options: dict[str, Any]) -> float | Tensor:
        eps: float = options["eps"]
        # AdamW adds eps after the bias correction of sqrt(v), SparseAdam before it.
        return _root_correction(age, options) * eps if is_dense else eps

    def _update_moments(
        self, block: RowBlock, gradient: Tensor, moments: list[Tensor], eps: float | Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        means, squares, *maxima = moments
        beta1, beta2 = options["betas"]
        mean = block.take(means)
        block.put(means, mean.lerp_(gradient, 1 - beta1))
        square = block.take(squares)
        block.put(squares, square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2))
        if maxima:
            largest = block.take(maxima[0])
            square = torch.maximum(largest, square, out=largest)
            block.put(maxima[0], square)
        return mean, torch.sqrt(square, out=block.spare(square)).add_(eps)

    def _has_kernel(self, rows: Tensor, moments: list[Tensor]) -> bool:
        if rows.dtype not in (torch.float32, *NOISE_DTYPES) or math.prod(rows.shape[1:]) > MAX_KERNEL_ELEMENTS:
            return False
        can_run = launch.is_available() and (rows.device.type != "cpu" or launch.is_interpreted())
        return can_run and all(each.is_contiguous() for each in (rows, *moments))

    def _run_kernel(
        self,
        rows: Tensor,
        gradient: Tensor,
        moments: list[Tensor],
        state: State,
        table: RowStorage | None,
        options: dict[str, Any],
    ) -> None:
        from softdb.kernels.cuda.adam import adam_step  # Only a step on a GPU needs Triton.

        slots, order, gradients = None, None, gradient
        if gradient.layout == torch.sparse_coo:
            slots, gradients = gradient._indices()[0], gradient._values()
            if not gradient.is_coalesced():
                slots, order = slots.sort(stable=True)  # The sums of duplicates are reproducible.
        last_log_decay = state.get("log_decay", 0.0)
        advance_log_decay(state, options)
        mean, square, *maxima = moments
        adam_step(
            rows,
            mean,
            square,
            maxima[0] if maxima else None,
            gradients.contiguous(),
            None if slots is None else slots.contiguous(),
            order,
            None if table is None else table.ids,
            None if table is None else table.generation,
            state.get("generation"),
            state.get("born"),
            state.get("decayed"),
            None if table is None else table.pending_checks.flag("gradient", rows.device),
            (len(rows) if table is None else table.used) if slots is None else len(slots),
            state["step"],
            options["lr"],
            *options["betas"],
            options["eps"],
            state.get("log_decay", 0.0),
            last_log_decay,
            options["maximize"],
            hash_number(state["seed"], state["step"]) if "seed" in state else 0,
        )
        if table is None:  # `record_update` records the rows of a table.
            torch.autograd.graph.increment_version(rows)


def _root_correction(age: int | Tensor, options: dict[str, Any]) -> float | Tensor:
    """Return the factor of the bias correction of sqrt(v) in the ``age``-th step."""
    beta2: float = options["betas"][1]
    if isinstance(age, int):
        return math.sqrt(1 - beta2**age)
    return torch.sqrt(1 - torch.pow(beta2, age.to(torch.float64)))
