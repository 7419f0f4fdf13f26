"""Tests of soft_read as attention: floating-point masks, grouped heads, and the samples of torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import reference
from support.contract import METRICS, Problem, force_dispatch
from support.tolerances import allclose, assert_close, largest_error
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import softdb
from softdb.functional import soft_read
from softdb.kernels.tiling import Tiling

pytestmark = pytest.mark.each_device

BATCH, QUERIES, ROWS = (2, 3), 5, 300
# Shapes of a bias that broadcasts to (*BATCH, QUERIES, ROWS).
SHAPES = [(), (ROWS,), (QUERIES, 1), (QUERIES, ROWS), (3, 1, ROWS), (2, 1, QUERIES, ROWS), (2, 3, 1, 1)]
DISPATCHES = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("tiny tiles", "three partitions, rows first", "five partitions, always shifted, rows first")
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check_equal(read: softdb.Read, answer: reference.Answer, leaves: list[Tensor]) -> None:
    """Compare values, lse, reported rows and all gradients of a float64 read with the reference."""
    seen = answer.lse > -math.inf
    assert allclose(read.values, answer.values, atol=1e-11)
    assert allclose(read.lse, answer.lse.expand_as(read.lse), atol=1e-11)
    ours, theirs = [read.values.sin(), read.lse[seen]], [answer.values.sin(), answer.lse[seen]]
    if read.ids is not None and read.scores is not None and read.weights is not None:
        best = reference.best(answer.scores, read.ids.shape[-1])
        assert (read.ids == best).all()
        real = best >= 0
        ours += [read.scores[real].cos(), read.weights[real]]
        place = best.clamp(min=0)
        theirs += [answer.scores.gather(-1, place)[real].cos(), answer.weights.gather(-1, place)[real]]
    found = torch.autograd.grad(sum(part.sum() for part in ours), leaves)
    wanted = torch.autograd.grad(sum(part.sum() for part in theirs), leaves)
    for gradient, other in zip(found, wanted, strict=True):
        assert allclose(gradient, other, atol=1e-10)


@pytest.mark.parametrize("dispatch", [None, *DISPATCHES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_floating_mask_is_added_to_the_scores(
    shape: tuple[int, ...], dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    query, keys, values = numbers(*BATCH, QUERIES, 4), numbers(2, 1, ROWS, 4), numbers(2, 1, ROWS, 2)
    bias = numbers(*shape)
    leaves = [query, keys, values, bias]
    for k in (None, 3):
        read = soft_read(query, keys, values, mask=bias, k=k, temperature=0.7)
        check_equal(read, reference.read(query, keys, values, bias=bias, temperature=0.7), leaves)


@pytest.mark.parametrize("dispatch", [None, "two partitions"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_every_metric_and_size_agrees_in_float32(
    size: float, metric: str, dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    problem = Problem.random(rows=507, metric=metric)
    bias = (size * torch.randn(507)).requires_grad_()
    read = soft_read(problem.query, problem.keys, problem.values, metric=metric, mask=bias)
    answer = reference.read(
        problem.query.double(), problem.keys.double(), problem.values.double(), metric=metric, bias=bias.double()
    )
    assert largest_error(read.values, answer.values) < 1e-5
    assert largest_error(read.lse, answer.lse) < 1e-5 * size
    found, wanted = (torch.autograd.grad(part.values.sum(), bias)[0] for part in (read, answer))
    assert largest_error(found, wanted) < 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("dispatch", [None, "tiny tiles", "two partitions"])
@pytest.mark.parametrize("shape", [(ROWS,), (QUERIES, ROWS), (QUERIES, 1)], ids=str)
def test_minus_infinity_hides_a_row_even_if_it_is_not_finite(
    shape: tuple[int, ...], dispatch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dispatch is not None:
        force_dispatch(dispatch, monkeypatch)
    query, keys, values, bias = numbers(QUERIES, 4), numbers(ROWS, 4), numbers(ROWS, 2), numbers(*shape)
    hidden = torch.rand(shape) < 0.3
    hidden[0] = True
    bias = bias.detach().masked_fill(hidden, -math.inf).requires_grad_()
    leaves = [query, keys, values, bias]
    check_equal(soft_read(*leaves[:3], mask=bias, k=4), reference.read(*leaves[:3], bias=bias), leaves)
    if shape == (ROWS,):
        with torch.no_grad():
            keys[0] = math.nan
            values[0] = math.inf
    read = soft_read(*leaves[:3], mask=bias, k=4)
    assert (read.ids != 0).all()
    for gradient in torch.autograd.grad(read.values.sum() + read.mass.sum(), leaves):
        assert gradient.isfinite().all()
    assert torch.equal(torch.autograd.grad(soft_read(*leaves[:3], mask=bias).values.sum(), bias)[0] == 0, hidden)


def test_a_query_from_which_all_rows_are_hidden_reads_nothing() -> None:
    query, keys, values = numbers(2, 4), numbers(9, 4), numbers(9, 2)
    bias = torch.zeros(2, 9, dtype=torch.float64)
    bias[1] = -math.inf
    read = soft_read(query, keys, values, mask=bias.requires_grad_(), k=2)
    assert (read.values[1] == 0).all()
    assert read.lse[1] == -math.inf
    assert (read.ids[1] == -1).all()
    assert read.mass[1] == 0
    assert (torch.autograd.grad(read.values.sum(), bias)[0][1] == 0).all()


def test_gradcheck() -> None:
    leaves = numbers(3, 3), numbers(7, 3), numbers(7, 2), numbers(7), numbers(3, 7)

    def read(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        shared, one = soft_read(query, keys, values, mask=bias), soft_read(query, keys, values, mask=own, k=2)
        return shared.values, shared.lse, one.values, one.weights, one.scores

    assert torch.autograd.gradcheck(read, leaves)


def test_a_bias_without_a_gradient_of_the_rest() -> None:
    query, keys, values, bias = (numbers(*shape) for shape in ((3, 4), (9, 4), (9, 2), (9,)))
    wanted = torch.autograd.grad(reference.read(query, keys, values, bias=bias).values.sum(), bias)
    read = soft_read(query.detach(), keys.detach(), values.detach(), mask=bias)
    assert allclose(torch.autograd.grad(read.values.sum(), bias)[0], wanted[0])


@pytest.mark.parametrize("normalizer", ["straight_through", "gumbel"])
def test_hard_normalizers_choose_by_the_sum(normalizer: str) -> None:
    """A bias equals one more column of the keys, whose query is 1."""
    query, keys, values, bias = numbers(50, 4), numbers(20, 4), numbers(20, 2), numbers(20)
    wide = torch.cat([query, torch.ones(50, 1)], -1), torch.cat([keys, bias[:, None]], -1)
    random = {"generator": torch.Generator()} if normalizer == "gumbel" else {}
    reads = []
    for operands, mask in (((query, keys), bias), (wide, None)):
        for generator in random.values():
            generator.manual_seed(3)
        reads.append(soft_read(*operands, values, metric="dot", mask=mask, normalizer=normalizer, k=3, **random))
    ours, theirs = reads
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.values, theirs.values)
    assert allclose(ours.lse, theirs.lse)
    gradients = [torch.autograd.grad(read.values.sin().sum(), (query, keys, bias)) for read in reads]
    for mine, wanted in zip(*gradients, strict=True):
        assert allclose(mine, wanted, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_and_autocast(dtype: torch.dtype) -> None:
    query, keys, values, bias = (torch.randn(*shape).to(dtype) for shape in ((4, 8), (300, 8), (300, 3), (300,)))
    bias[:9] = -math.inf
    bias.requires_grad_()
    answer = reference.read(query.double(), keys.double(), values.double(), bias=bias.double())
    with torch.autocast(query.device.type, dtype=torch.bfloat16):
        read = soft_read(query, keys, values, mask=bias)
    assert read.values.dtype == torch.bfloat16
    assert largest_error(read.lse, answer.lse) < 1e-4
    read.lse.sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == dtype
    wanted = torch.autograd.grad(answer.lse.sum(), bias)[0]
    assert largest_error(bias.grad, wanted) <= float(wanted.abs().max()) * torch.finfo(dtype).eps


def test_a_bias_that_changes_before_backward_raises() -> None:
    query, keys, values, bias = numbers(3, 4), numbers(9, 4), numbers(9, 2), torch.zeros(9, dtype=torch.float64)
    read = soft_read(query, keys, values, mask=bias)
    bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.values.sum().backward()


def test_a_second_derivative_raises() -> None:
    query, keys, values, bias = numbers(3, 4), numbers(9, 4), numbers(9, 2), numbers(9)
    read = soft_read(query, keys, values, mask=bias)
    (gradient,) = torch.autograd.grad(read.values.sum(), bias, create_graph=True)
    with pytest.raises(softdb.SecondDerivativeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("mask", "options", "error", "message"),
    [
        (torch.full((9,), math.nan), {}, softdb.NonFiniteError, "mask: expected finite numbers"),
        (torch.full((9,), math.inf), {}, softdb.NonFiniteError, "mask: expected finite numbers"),
        (torch.zeros(8), {}, softdb.ShapeError, "mask: expected a shape broadcastable to"),
        (torch.zeros(9).long(), {}, softdb.DtypeError, "mask: expected a bool tensor"),
        (torch.zeros(9), {"normalizer": "entmax15"}, softdb.ArgumentError, "mask: expected a bool tensor with"),
    ],
    ids=["nan", "infinity", "shape", "dtype", "sparse"],
)
def test_bad_masks_are_refused(mask: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    for read in (
        soft_read,
        lambda *args, **how: vmap(lambda query: soft_read(query, *args[1:], **how).values)(args[0]),
    ):
        with pytest.raises(error, match=message):
            read(torch.ones(2, 3, 4), torch.ones(9, 4), torch.ones(9, 2), mask=mask, **options)


def test_transforms_take_a_bias_for_each_sample() -> None:
    queries, keys, values, biases = numbers(4, 3, 4), numbers(9, 4), numbers(9, 2), numbers(4, 9)

    def loss(read: Any, query: Tensor, bias: Tensor) -> Tensor:
        return read(query, keys, values, bias).sin().sum()

    def exact(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return soft_read(query, keys, values, mask=bias).values

    def dense(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.softmax(query @ keys.T / 2 + bias, -1) @ values

    for use in (
        lambda read: vmap(grad(lambda *leaves: loss(read, *leaves), (0, 1)))(queries, biases),
        lambda read: vmap(grad(lambda bias: loss(read, queries[0], bias)))(biases),
        lambda read: vmap(grad(lambda *leaves: loss(read, *leaves), (0, 1)), (0, None))(queries, biases[0]),
        lambda read: jacrev(lambda bias: read(queries[0], keys, values, bias))(biases[0]),
        lambda read: grad(lambda biases: vmap(lambda bias: loss(read, queries[0], bias))(biases).sum())(biases),
    ):
        assert_close(use(exact), use(dense))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation allocates, other than the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.numel, self.inputs = 0, {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.inputs:
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_a_bias_by_row_allocates_no_score_matrix() -> None:
    query, keys, values = (torch.randn(n, 8, requires_grad=True) for n in (300, 20_000, 20_000))
    bias = torch.randn(20_000).masked_fill(torch.rand(20_000) < 0.1, -math.inf).requires_grad_()
    with LargestTensor() as largest:
        soft_read(query, keys, values, mask=bias, k=3).values.sum().backward()
    assert 0 < largest.numel <= Tiling().tile_elements < 300 * 20_000


# -- grouped heads and torch's attention -----------------------------------------------------------------


def test_grouped_heads_broadcast_without_copying_the_rows() -> None:
    query, keys, values = numbers(2, 6, 5, 64), numbers(2, 3, 1000, 64), numbers(2, 3, 1000, 64)
    bias = numbers(6, 5, 1000)
    with LargestTensor(keys, values) as largest, torch.no_grad():
        soft_read(query.unflatten(-3, (3, 2)), keys.unsqueeze(-3), values.unsqueeze(-3))
    assert largest.numel < keys.numel()
    found = attend(query, keys, values, bias.unflatten(-3, (3, 2)), enable_gqa=True)
    wanted = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True)
    leaves = (query, keys, values, bias)
    assert allclose(found, wanted, atol=1e-12)
    gradients = (torch.autograd.grad(part.sin().sum(), leaves) for part in (found, wanted))
    for ours, theirs in zip(*gradients, strict=True):
        assert allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(("scale", "width"), [(0.3, 4), (None, 7), (2.0, 1)])
def test_a_scale_is_a_temperature_of_the_dot_product(scale: float | None, width: int) -> None:
    query, keys, values = numbers(2, 5, 4), numbers(2, 9, 4), numbers(2, 9, width)
    wanted = F.scaled_dot_product_attention(query, keys, values, scale=scale)
    assert allclose(attend(query, keys, values, scale=scale), wanted, atol=1e-12)


@pytest.mark.cpu_only
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:It looks like `register_random`")  # a plugin of hypothesis, which torch imports
def test_the_samples_of_torch_agree() -> None:
    """Every sample input of torch's own tests of scaled_dot_product_attention that has no dropout."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    # Allowed errors, in units in the last place of the largest number. torch rounds narrow gradients by far more. In
    # float64 the result of torch is no more accurate than ours.
    units = {torch.float64: 256, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}
    checked = 0
    for dtype, allowed in units.items():
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            options = dict(sample.kwargs)
            if options.pop("dropout_p", 0.0):
                continue
            leaves = [sample.input, *sample.args]
            if "attn_mask" in options:
                leaves.append(options["attn_mask"])
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            wanted = F.scaled_dot_product_attention(
                *wide[:3], **options | dict(zip(["attn_mask"], wide[3:], strict=False))
            )
            upstream = torch.randn_like(wanted)
            found = attend(*leaves[:3], **options)
            pairs = zip(
                (found, *torch.autograd.grad(found, leaves, upstream.to(dtype))),
                (wanted, *torch.autograd.grad(wanted, wide, upstream.to(dtype).double())),
                strict=True,
            )
            for ours, theirs in pairs:
                assert ours.dtype == dtype
                assert largest_error(ours, theirs) <= allowed * torch.finfo(dtype).eps * max(1.0, theirs.abs().max())
            checked += 1
    assert checked >= 40


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute scaled_dot_product_attention by `soft_read`."""
    options: dict[str, Any] = {} if scale is None else {"metric": "dot", "temperature": 1 / scale}
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], keys.shape[-2], dtype=torch.bool).tril()
    if enable_gqa:
        query, keys, values = query.unflatten(-3, (keys.shape[-3], -1)), keys.unsqueeze(-3), values.unsqueeze(-3)
    read = soft_read(query, keys, values, mask=attn_mask, **options)
    return read.values.flatten(-4, -3) if enable_gqa else read.values
