"""`soft_read` of several tables on each device, compared with the reference in float64 on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.tolerances import tolerance_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softdb import Read
from softdb.errors import SecondDerivativeError
from softdb.functional import merge, soft_read

# Rounding of results, relative to the largest number that is compared.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
WIDTHS = [(64, 64), (24, 40), (5, 3)]
QUERIES, ROWS = 70, 50


def make(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return numbers.to(device, dtype).requires_grad_()


def make_leaves(
    widths: tuple[int, int], dtype: torch.dtype, device: torch.device, shared: bool = False
) -> list[Tensor]:
    """Make queries, keys and values of eight heads; ``shared``: of one table for four heads."""
    heads, (key_dim, value_dim) = 1 if shared else 4, widths
    return [
        make(2, 4, QUERIES, key_dim, dtype=dtype, device=device),
        make(2, heads, ROWS, key_dim, dtype=dtype, device=device, seed=1),
        make(2, heads, ROWS, value_dim, dtype=dtype, device=device, seed=2),
    ]


def make_mask(kind: str, dtype: torch.dtype) -> Tensor | None:
    """Make a mask on the CPU: bool, or numbers and -inf. It hides row 1, and everything from query 3 of batch 0."""
    generator = torch.Generator("cpu").manual_seed(3)
    shown = torch.rand(2, 1, QUERIES, ROWS, generator=generator, device="cpu") < 0.7
    shown[..., 0], shown[..., 1] = True, False
    shown[0, :, 3] = False
    if kind == "causal":
        return torch.ones(QUERIES, ROWS, dtype=torch.bool, device="cpu").tril()
    if kind == "float":
        return torch.randn(QUERIES, ROWS, generator=generator, device="cpu").to(dtype).where(shown, -math.inf)
    return shown if kind == "bool" else None


def check(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    wanted, found = wanted.detach(), found.detach().cpu().double()
    finite = wanted.isfinite()
    assert torch.equal(found[~finite], wanted[~finite])
    assert found.isfinite().equal(finite)
    error = (found[finite] - wanted[finite]).abs().max() / wanted[finite].abs().max().clamp(min=1e-9)
    assert error <= tolerance, f"expected an error of at most {tolerance}, got {float(error):.3g}"


def compare(read: Read, leaves: list[Tensor], mask: Tensor | None, tolerance: float) -> None:
    """Compare values, log-sum-exp and gradients of both with the reference on the same rounded numbers."""
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    how: dict[str, Any] = {} if mask is None else {"visible" if mask.dtype == torch.bool else "bias": mask}
    answer = reference.read(*exact, **how)
    lse = answer.lse.expand(read.lse.shape)
    seen = lse > -math.inf
    check(read.values, answer.values, tolerance)
    check(read.lse, lse, tolerance)
    check(read.mass, seen.double(), tolerance)
    weights = make(*answer.values.shape, dtype=torch.float64, device=torch.device("cpu"), seed=4).detach()
    own = weights.to(read.values.device, read.values.dtype)
    shown = seen.to(read.lse.device)
    losses = (read.values * own).sum(), (read.lse.masked_fill(~shown, 0.0) * own[..., 0].float()).sum()
    wanted = (answer.values * weights).sum(), (lse.masked_fill(~seen, 0.0) * weights[..., 0]).sum()
    for ours, theirs in (*zip(losses, wanted, strict=True), (sum(losses), sum(wanted))):
        gradients = torch.autograd.grad(ours, leaves, retain_graph=True, allow_unused=True)
        references = torch.autograd.grad(theirs, exact, retain_graph=True, allow_unused=True)
        for gradient, other in zip(gradients, references, strict=True):
            if other is None:
                assert gradient is None or not gradient.any()
            else:
                check(gradient, other, 2 * tolerance)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_soft_read_of_heads_equals_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    tolerance = ROUNDING[dtype] + tolerance_of(torch.zeros(1, dtype=dtype, device=device)).read
    for widths in WIDTHS:
        for kind in ("none", "bool", "float", "causal"):
            leaves, mask = make_leaves(widths, dtype, device, shared=kind == "bool"), make_mask(kind, dtype)
            compare(soft_read(*leaves, mask=None if mask is None else mask.to(device)), leaves, mask, tolerance)


def test_a_row_that_no_query_sees_has_no_effect(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves, mask = make_leaves((64, 64), dtype, device), make_mask("bool", dtype)
        assert mask is not None
        found = []
        for number in (0.0, math.nan):
            with torch.no_grad():
                leaves[1][..., 1, :], leaves[2][..., 1, :] = number, number
            read = soft_read(*leaves, mask=mask.to(device))
            loss = read.values.sum() + read.lse.masked_fill(read.lse == -math.inf, 0.0).sum()
            found.append([read.values, read.lse, *torch.autograd.grad(loss, leaves)])
        for first, other in zip(*found, strict=True):
            torch.testing.assert_close(first, other)


def test_a_causal_bias_equals_a_bool_mask(device: torch.device) -> None:
    from torch.nn.attention import bias  # its import takes seconds

    for queries, rows in ((50, 50), (70, 50), (50, 70)):
        leaves = [make(2, 4, count, 32, dtype=torch.float32, device=device) for count in (queries, rows, rows)]
        shown = torch.ones(queries, rows, dtype=torch.bool, device=device)
        pairs = [(bias.causal_upper_left(queries, rows), shown.tril())]
        if queries <= rows:
            pairs.append((bias.causal_lower_right(queries, rows), shown.tril(rows - queries)))
        for causal, mask in pairs:
            found, wanted = soft_read(*leaves, mask=causal), soft_read(*leaves, mask=mask)
            check(found.values, wanted.values.cpu().double(), 1e-5)
            check(found.lse, wanted.lse.cpu().double(), 1e-5)


@pytest.mark.slow
def test_a_mask_is_right_beyond_65536_rows(device: torch.device) -> None:
    leaves = [make(2, count, 8, dtype=torch.float32, device=device, seed=count) for count in (3, 66_000, 66_000)]
    mask = torch.ones(3, 66_000, dtype=torch.bool)
    mask[0, 100:], mask[1, :65_900] = False, False
    compare(soft_read(*leaves, mask=mask.to(device)), leaves, mask, 1e-4)


def test_merged_reads_have_the_gradients_of_one_read(device: torch.device) -> None:
    leaves = make_leaves((32, 32), torch.float32, device)
    query, keys, values = leaves
    read = merge(
        [
            soft_read(query, keys[..., :20, :], values[..., :20, :]),
            soft_read(query, keys[..., 20:, :], values[..., 20:, :]),
        ]
    )
    compare(read, leaves, None, 5e-5)


def test_a_nan_query_has_no_effect_on_others_on_a_gpu_and_raises_on_the_cpu(device: torch.device) -> None:
    leaves = [leaf.detach() for leaf in make_leaves((32, 32), torch.float32, device)]
    wanted = soft_read(*leaves).values
    leaves[0][0, 0, 0] = math.nan
    if device.type == "cpu":
        with pytest.raises(ValueError, match="query: expected finite numbers"):
            soft_read(*leaves)
        return
    found = soft_read(*leaves).values
    assert found[0, 0, 0].isnan().all()
    wanted[0, 0, 0] = math.nan
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_second_derivatives_raise(device: torch.device) -> None:
    leaves = make_leaves((32, 32), torch.float32, device)
    (gradient,) = torch.autograd.grad(soft_read(*leaves).values.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(SecondDerivativeError):
        gradient.sum().backward()


class Operators(TorchDispatchMode):
    """Record the names of the operators of attention that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [
        (torch.float32, False, "efficient"),
        (torch.bfloat16, True, "efficient"),
        (torch.bfloat16, False, "flash"),
        (torch.float64, False, None),
    ],
)
def test_the_kernels_of_torch_run(dtype: torch.dtype, masked: bool, kernel: str | None) -> None:
    device = torch.device("cuda")
    leaves = make_leaves((64, 64), dtype, device)
    mask = torch.ones(QUERIES, ROWS, dtype=torch.bool, device=device) if masked else None
    with Operators() as operators:
        soft_read(*leaves, mask=mask).values.sum().backward()
    name = f"aten._scaled_dot_product_{kernel}_attention"
    assert operators.names == (set() if kernel is None else {f"{name}.default", f"{name}_backward.default"})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_deterministic_mode_repeats_the_bits() -> None:
    leaves = make_leaves((64, 64), torch.float32, torch.device("cuda"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = [torch.autograd.grad(soft_read(*leaves).values.sin().sum(), leaves) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, other) for run in runs[1:] for first, other in zip(runs[0], run, strict=True))
