"""Tests of reads by the attention kernels of torch, with other kernels in place of those for CUDA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.attention import NAIVE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import softdb.reading.attention as routing
from softdb.errors import SecondDerivativeError, ShapeError
from softdb.functional import soft_read
from softdb.kernels.attention import EFFICIENT, FLASH, AttentionKernels, _Attention, attend, choose_kernels

DEVICE = torch.device("cuda", 0)


def make_causal_bias(variant: str, queries: int, rows: int) -> Tensor:
    from torch.nn.attention import bias  # its import takes seconds

    made: Tensor = getattr(bias, f"causal_{variant}")(queries, rows)
    return made


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _flash(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Any:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return *operator(query, keys, values, 0.0, is_causal, attn_mask=bias, scale=scale), ()


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: tuple[Any, ...],
    is_causal: bool,
    scale: float,
) -> Any:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return operator(gradient, query, keys, values, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale)


FLASH_FOR_CPU = AttentionKernels(_flash, _flash_backward, needs_equal_widths=True)


def make_mask(kind: str, queries: int, rows: int) -> Tensor | None:
    """Make a mask that hides row 1 from all queries and all rows from query 2."""
    if kind in ("none", "causal"):
        return None
    shown = torch.rand(2, 1, queries, rows) < 0.7
    shown[..., 1], shown[..., 0] = False, True
    shown[0, :, 2] = False
    if kind == "bool":
        return shown
    return torch.randn(1, 1, queries, rows, dtype=torch.float64).where(shown, -torch.inf)


def compare(found: tuple[Tensor, Tensor], leaves: list[Tensor], mask: Tensor | None) -> None:
    """Compare values, lse and all gradients, of values and of lse, with the reference."""
    query, keys, values = leaves
    visible = mask if mask is not None and mask.dtype == torch.bool else None
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    answer = reference.read(query, keys, values, visible=visible, bias=bias)
    wanted = answer.values, answer.lse.expand(found[1].shape)
    seen = wanted[1] > -math.inf
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)
    parts = [lambda out, lse: out.sin().sum(), lambda out, lse: lse[seen].sin().sum()]
    for part in (*parts, lambda out, lse: sum(one(out, lse) for one in parts)):
        gradients = (
            torch.autograd.grad(part(*pair), leaves, retain_graph=True, allow_unused=True) for pair in (found, wanted)
        )
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-10)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize(
    ("kernels", "widths"), [(NAIVE, (5, 3)), (NAIVE, (8, 16)), (FLASH_FOR_CPU, (16, 16)), (FLASH_FOR_CPU, (5, 3))]
)
def test_attention_and_its_lse_have_the_gradients_of_the_reference(
    kernels: AttentionKernels, widths: tuple[int, int], mask: str
) -> None:
    queries, rows = 6, 7 if mask != "causal" else 9
    leaves = [
        torch.randn(2, 3, count, width, dtype=torch.float64, requires_grad=True)
        for count, width in ((queries, widths[0]), (rows, widths[0]), (rows, widths[1]))
    ]
    given = make_mask(mask, queries, rows)
    found = attend(*leaves, given, widths[0] ** -0.5, is_causal=mask == "causal", kernels=kernels)
    shown = torch.ones(queries, rows, dtype=torch.bool).tril() if mask == "causal" else given
    compare(found, leaves, shown)


def test_a_row_that_no_query_sees_may_hold_nan() -> None:
    mask = make_mask("bool", 6, 7)
    leaves = [torch.randn(2, 3, count, 8, dtype=torch.float64, requires_grad=True) for count in (6, 7, 7)]
    with torch.no_grad():
        leaves[1][..., 1, :] = math.nan
        leaves[2][..., 1, :] = math.inf
    out, lse = attend(*leaves, mask, 1.0, is_causal=False, kernels=NAIVE)
    assert (out[0, :, 2] == 0).all()
    assert (lse[0, :, 2] == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum() + lse[lse > -math.inf].sum(), leaves):
        assert gradient.isfinite().all()


def test_a_mask_of_the_lowest_numbers_still_shows_rows() -> None:
    query = torch.randn(1, 1, 2, 8)
    mask = torch.full((1, 1, 2, 5), torch.finfo(torch.float32).min)
    biases: list[Tensor] = []

    def forward(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, *rest: Any) -> Any:
        biases.append(bias)
        return NAIVE.forward(query, keys, values, bias, *rest)

    attend(
        query,
        torch.randn(1, 1, 5, 8),
        torch.randn(1, 1, 5, 8),
        mask,
        1.0,
        is_causal=False,
        kernels=NAIVE._replace(forward=forward),
    )
    assert (biases[0] * math.log2(math.e)).isfinite().all()


def test_a_second_derivative_raises() -> None:
    leaves = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    out, _ = attend(*leaves, None, 1.0, is_causal=False, kernels=NAIVE)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(SecondDerivativeError):
        gradient.sum().backward()


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = [
    # Batch dimensions of query and of keys, shape of the mask.
    ((3,), (3,), None),
    ((2, 3), (2, 1), None),
    ((2, 3), (2, 3), (6, 7)),
    ((2, 3), (1, 1), (2, 1, 1, 7)),
    ((), (), (6, 7)),
    ((2, 2, 3), (2, 2, 1), (6, 7)),
    ((2, 2, 3), (2, 2, 1), (2, 1, 1, 6, 1)),
]


@pytest.mark.parametrize(("own", "tables", "mask"), SHAPES, ids=str)
def test_batch_dimensions_and_masks_broadcast(
    own: tuple[int, ...], tables: tuple[int, ...], mask: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "choose_kernels", lambda *shapes, **options: NAIVE)
    leaves = [
        torch.randn(*batch, count, 4, dtype=torch.float64, requires_grad=True)
        for batch, count in ((own, 6), (tables, 7), (tables, 7))
    ]
    shown = None if mask is None else torch.rand(mask) < 0.7
    temperature = torch.rand(6) + 0.5
    for divisor in (0.7, temperature):
        found = routing.read_by_attention(*leaves, own, metric="scaled_dot", temperature=divisor, mask=shown)
        wanted = soft_read(*leaves, mask=shown, temperature=divisor)
        assert found is not None
        assert found.values.shape == wanted.values.shape
        assert torch.allclose(found.values, wanted.values)
        assert torch.allclose(found.lse, wanted.lse)
        assert torch.equal(found.mass, wanted.mass)
        gradients = (torch.autograd.grad(read.values.sin().sum(), leaves) for read in (found, wanted))
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, theirs)


@pytest.mark.parametrize(("batch", "is_read"), [((), False), ((2**16 - 1,), True), ((2**16,), False)], ids=str)
def test_no_batch_dimension_exceeds_a_cuda_grid(
    batch: tuple[int, ...], is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "choose_kernels", lambda *shapes, **options: NAIVE)
    one, options = torch.ones(1, 1), {"metric": "dot", "temperature": 1.0, "mask": None}
    for shape in (batch, (1, *batch), (*batch, 1), (1, *batch, 1)) if batch else ((),):
        rows = one.expand(*shape, 1, 1)
        assert (routing.read_by_attention(rows, rows, rows, shape, **options) is not None) is is_read


class Operators(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


class Context:
    """Context of an autograd.Function whose forward and backward are called directly.

    Autograd itself aborts on tensors of a device that the build of torch lacks.
    """

    needs_input_grad = (True,) * 3
    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "upper_left", "lower_right"])
def test_soft_read_uses_the_kernels_on_cuda_without_a_copy_to_the_cpu(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = Context()
    monkeypatch.setattr(_Attention, "apply", lambda *inputs: _Attention.forward(context, *inputs))
    mask: Any = make_causal_bias(kind, 512, 520) if kind in ("upper_left", "lower_right") else None
    with FakeTensorMode(), Operators() as operators, torch.no_grad():
        counts = (512, 520, 520)
        leaves = [torch.randn(4, 8, count, 64, device="cuda", dtype=dtype) for count in counts]
        if kind == "bool":
            mask = torch.ones(512, 520, dtype=torch.bool, device="cuda")
        elif kind == "float":
            mask = torch.zeros(512, 520, dtype=dtype, device="cuda")
        read = soft_read(*leaves, mask=mask)
        assert (read.values.dtype, read.lse.dtype, read.values.device.type) == (dtype, torch.float32, "cuda")
        gradients = _Attention.backward(context, read.values, read.lse)[:3]
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in context.saved_tensors[:3]]
    names = {name for name in operators.names if "attention" in name}
    assert names == {
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_efficient_attention_backward.default",
    }
    assert not operators.names & {"aten._local_scalar_dense.default", "aten.nonzero.default"}


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_flash_kernels_take_what_forward_returned(is_causal: bool) -> None:
    context: Any = Context()
    with FakeTensorMode(), Operators() as operators, torch.no_grad():
        query, keys, values = (torch.randn(4, 8, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out, lse = _Attention.forward(context, query, keys, values, None, None, FLASH, is_causal, 0.125)
        assert (out.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:-1], torch.float32)
        gradients = _Attention.backward(context, out, lse)[:3]
        assert all(gradient.shape == query.shape for gradient in gradients)
    name = "aten._scaled_dot_product_flash_attention"
    assert operators.names >= {f"{name}.default", f"{name}_backward.default"}


CASES: list[tuple[dict[str, Any], AttentionKernels | None]] = [
    ({}, EFFICIENT),
    ({"masked": True}, EFFICIENT),
    ({"dtype": torch.float64}, None),
    ({"widths": (64, 300)}, None),
    ({"shape": (4, 70_000, 128)}, EFFICIENT),
    ({"shape": (4, 70_000, 128), "masked": True}, None),
    ({"shape": (4, 128, 70_000), "is_causal": True}, None),
    ({"shape": (4, 0, 128)}, None),
    ({"shape": (2**20, 128, 128)}, None),
    ({"device": torch.device("cpu")}, None),
]


@pytest.mark.parametrize(("changed", "wanted"), CASES, ids=[str(changed) for changed, _ in CASES])
def test_kernels_are_chosen_only_where_they_are_correct(
    changed: dict[str, Any], wanted: AttentionKernels | None
) -> None:
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.float32, "shape": (32, 512, 512), "widths": (64, 64)}
    assert choose_kernels(**options | {"masked": False, "is_causal": False} | changed) is wanted


def test_kernels_follow_the_settings_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    shape: tuple[Any, ...] = (DEVICE, torch.bfloat16, (32, 512, 512), (64, 64))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert choose_kernels(*shape, masked=False, is_causal=True) is FLASH
    assert choose_kernels(*shape, masked=True, is_causal=False) is EFFICIENT
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert choose_kernels(*shape, masked=False, is_causal=True) is EFFICIENT
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: False)
    assert choose_kernels(*shape, masked=False, is_causal=True) is None
    monkeypatch.undo()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_kernels(*shape, masked=False, is_causal=True) is None


@pytest.mark.parametrize(("variant", "offset"), [("upper_left", 0), ("lower_right", 2)])
def test_a_causal_bias_is_a_mask(variant: str, offset: int) -> None:
    query, rows = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    causal, mask = make_causal_bias(variant, 5, 7), torch.ones(5, 7, dtype=torch.bool).tril(offset)
    wanted = F.scaled_dot_product_attention(query, rows, rows, attn_mask=mask)
    assert torch.allclose(soft_read(query, rows, rows, mask=causal).values, wanted, atol=1e-6)
    found = torch.func.vmap(lambda one, own: soft_read(one, own, own, mask=causal).values)(query, rows)
    assert torch.allclose(found, wanted, atol=1e-6)
    with pytest.raises(ShapeError, match=r"mask: expected a CausalBias of 5 queries and 6 rows, got one of 5 and 7"):
        soft_read(query, rows[..., :6, :], rows[..., :6, :], mask=causal)
