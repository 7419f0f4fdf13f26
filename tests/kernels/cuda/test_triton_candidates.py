"""Reads of candidates in Triton, against the reference in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support import reference
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from support.triton_kernels import DEVICE, MAX_SHARED, compile_for_hopper, record_launches

import softdb.reading.topk
from softdb import SoftKVStore
from softdb.filters import Selection
from softdb.functional import topk_read
from softdb.kernels import gather as blocks
from softdb.kernels.backend import TORCH_BLOCKS, Backend
from softdb.kernels.cuda import candidates, gather, gather_backward
from softdb.kernels.gather import GatherIndex
from softdb.kernels.spec import ReadSpec
from softdb.scoring.metrics import compute_center, prepare_query

BACKEND = Backend(
    TORCH_BLOCKS.exact_read,
    TORCH_BLOCKS.exact_top_k,
    candidates.score_at,
    candidates.blend_at,
    candidates.dot_at,
    candidates.blend_at_backward,
    candidates.read_at,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_index(queries: int, rows: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(rows, generator=generator)[:k] for _ in range(queries)]).to(DEVICE)


def dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense().double() if gradient.is_sparse else gradient.double()


def weigh(outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Tensor:
    """Compute a loss whose gradients are ``grads``; outputs of -inf are constant."""
    return torch.stack(
        [
            (output.masked_fill(output == -math.inf, 0.0) * grad.to(output.dtype)).sum()
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None
        ]
    ).sum()


def read_reference(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, offsets: Tensor, metric: str, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute scores, weights, log-sum-exp and weighted sum over all rows, of which only the candidates are visible."""
    zeros = offsets.new_zeros(len(index), len(keys) + 1)  # the last column is that of padding
    visible = zeros.bool().scatter(1, index % (len(keys) + 1), True)[:, :-1]
    bias = zeros.scatter(1, index % (len(keys) + 1), offsets)[:, :-1]
    answer = reference.read(query, keys, values, metric=metric, temperature=temperature, visible=visible, bias=bias)
    place, padding = index.clamp(min=0), index < 0
    scores, weights = answer.scores.gather(1, place), answer.weights.gather(1, place)
    return scores.masked_fill(padding, -math.inf), weights.masked_fill(padding, 0.0), answer.lse, answer.values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "dtype", "sparse", "sizes"),
    [
        ("dot", torch.float32, False, (3, 20, 7, 5, 6)),
        ("dot", torch.float32, True, (3, 20, 1, 1, 6)),
        ("dot", torch.float32, True, (2, 60, 256, 33, 50)),
        ("scaled_dot", torch.bfloat16, False, (3, 30, 33, 64, 4)),
        ("cosine", torch.float32, False, (4, 20, 64, 7, 6)),
        ("cosine", torch.float16, True, (3, 20, 7, 5, 6)),
        ("l2", torch.float32, True, (3, 20, 5, 96, 6)),
        ("l2", torch.float32, False, (40, 5, 3, 4, 5)),
        ("l2", torch.bfloat16, False, (2, 20, 128, 2, 3)),
    ],
    ids=str,
)
def test_triton_reads_of_candidates_equal_the_reference(
    metric: str, dtype: torch.dtype, sparse: bool, sizes: tuple[int, ...]
) -> None:
    count, rows, width, value_width, k = sizes
    index = random_index(count, rows, k)
    index[0, 1] = -1
    index[-1, :] = -1  # a query without candidates
    query, keys = random(count, width), random(rows, width, seed=1, dtype=dtype)
    values, offsets = random(rows, value_width, seed=2, dtype=dtype), random(count, k, seed=4)
    offsets = offsets.masked_fill(index < 0, 0.0)
    temperature = torch.tensor(0.7, device=DEVICE)
    inputs = [tensor.requires_grad_() for tensor in (query, keys, values, offsets, temperature)]
    center = compute_center(query, metric)
    operand = prepare_query(query, metric, temperature, center, torch.float32)
    spec = ReadSpec(metric, center, Selection(rows), torch.float32)
    read = candidates.read_at(operand, keys, values, GatherIndex(index), spec, offsets, sparse=sparse)
    assert read is not None
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = read_reference(*wide[:3], index, wide[3], metric, wide[4])
    for output, other in zip(read, wanted, strict=True):
        assert output.dtype == torch.float32
        assert torch.allclose(output.double(), other, atol=3e-5, rtol=1e-5)
    grads = (
        random(count, k, seed=5),
        random(count, k, seed=6),
        random(count, seed=7),
        random(count, value_width, seed=8),
    )
    found_gradients = torch.autograd.grad(weigh(read, grads), inputs)
    wanted_gradients = torch.autograd.grad(weigh(wanted, grads), wide)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for gradient, other in zip(found_gradients, wanted_gradients, strict=True):
        scale = 1 + other.abs().max()
        assert (dense(gradient) - other).abs().max() <= tolerance * scale
    assert found_gradients[1].is_sparse == found_gradients[2].is_sparse == sparse


@pytest.mark.parametrize("kept", range(4))
def test_each_result_of_a_triton_read_of_candidates_has_a_gradient(kept: int) -> None:
    index, metric = random_index(2, 9, 3), "cosine"
    query, keys, values = random(2, 4).requires_grad_(), random(9, 4, seed=1), random(9, 3, seed=2)
    spec = ReadSpec(metric, None, Selection(9), torch.float32)
    operand = prepare_query(query, metric, 1.0, None, torch.float32)
    read = candidates.read_at(operand, keys, values, GatherIndex(index), spec, None, sparse=False)
    assert read is not None
    shapes = [output.shape for output in read]
    grads = tuple(random(*shape, seed=5) if i == kept else None for i, shape in enumerate(shapes))
    wide = query.detach().double().requires_grad_()
    none = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    wanted = read_reference(wide, keys.double(), values.double(), index, none, metric, one)
    (found,), (other,) = (
        torch.autograd.grad(weigh(outputs, grads), source) for outputs, source in ((read, query), (wanted, wide))
    )
    assert torch.allclose(found.double(), other, atol=1e-5)


def test_padding_has_no_row_sparse_gradient_in_triton() -> None:
    index = torch.tensor([[5, -1, 2], [-1, -1, 2]], device=DEVICE)
    query, keys = random(2, 4), random(9, 4, seed=1).requires_grad_()
    query[1] = math.nan
    spec = ReadSpec("dot", None, Selection(9), torch.float32)
    read = candidates.read_at(query, keys, random(9, 3, seed=2), GatherIndex(index), spec, None, sparse=True)
    assert read is not None
    assert read.values[0].isfinite().all()
    assert read.values[1].isnan().all()
    (gradient,) = torch.autograd.grad(read.values.sum(), keys)
    assert gradient._indices().unique().tolist() == [2, 5]
    assert gradient.to_dense()[5].isfinite().all()
    assert gradient.to_dense()[2].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_triton_reads_no_candidates(shape: tuple[int, int]) -> None:
    query, keys = random(shape[0], 4).requires_grad_(), random(9, 4, seed=1).requires_grad_()
    spec = ReadSpec("dot", None, Selection(9), torch.float32)
    index = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    for sparse in (False, True):
        read = candidates.read_at(query, keys, keys, GatherIndex(index), spec, None, sparse=sparse)
        assert read is not None
        assert read.scores.shape == read.weights.shape == shape
        assert (read.values == 0).all()
        assert (read.lse == -math.inf).all()
        for gradient in torch.autograd.grad(read.values.sum(), (query, keys)):
            assert (dense(gradient) == 0).all()


def test_triton_gathers_equal_blocks_of_torch() -> None:
    index = random_index(3, 40, 5)
    keys, values, query = random(40, 33, seed=1), random(40, 7, seed=2), random(3, 33)
    weights, upstream = random(3, 5, seed=4), random(3, 7, seed=5)
    spec = ReadSpec("cosine", None, Selection(40), torch.float32)
    padded = index.clone()
    padded[1, 2] = -1
    pairs = [
        (candidates.score_at(query, keys, padded, spec), blocks.score_at(query, keys, padded, spec)),
        (candidates.dot_at(query, keys, index), blocks.dot_at(query, keys, index)),
        (candidates.blend_at(weights, values, index), blocks.blend_at(weights, values, index)),
    ]
    for sparse in (False, True):
        found, wanted = (
            module.blend_at_backward(upstream, weights, values, index, sparse=sparse) for module in (candidates, blocks)
        )
        assert found.is_sparse == sparse
        pairs.append((found.to_dense(), wanted.to_dense()))
    for found, wanted in pairs:
        assert torch.allclose(found, wanted, atol=1e-5)


def test_offsets_of_triton_gathers_have_64_bits(tmp_path: Path) -> None:
    width, rows = 64, 2**25 + 3  # more than 2^31 elements
    if DEVICE == "cuda":
        table = torch.zeros(rows, width, dtype=torch.float16, device=DEVICE)
    else:
        sparse_file = str(tmp_path / "table")
        table = torch.from_file(sparse_file, shared=True, size=rows * width, dtype=torch.float16).view(rows, width)
    table[rows - 1], table[7] = 3.0, 1.0
    index = torch.tensor([[rows - 1, 7, -1]], device=DEVICE)
    spec = ReadSpec("dot", None, Selection(rows), torch.float32)
    query = torch.full((1, width), 0.1, device=DEVICE).requires_grad_()
    read = candidates.read_at(query, table, table, GatherIndex(index), spec, None, sparse=True)
    assert read is not None
    weight = read.scores[0, :2].double().softmax(0)
    assert torch.allclose(read.scores[0, :2], torch.tensor([19.2, 6.4], device=DEVICE), atol=1e-3)
    assert torch.allclose(read.values.double(), (3 * weight[0] + weight[1]).expand(1, width), atol=1e-4)
    (gradient,) = torch.autograd.grad(read.scores[0, 0], query)
    assert torch.equal(gradient, torch.full_like(query, 3.0))


def test_second_derivatives_of_triton_reads_equal_those_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = random(2, 4), random(9, 4, seed=1), random(9, 3, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (query, keys, values)]
    index = random_index(2, 9, 3)
    index[0, 1] = -1
    results = []
    for backend in (TORCH_BLOCKS, BACKEND):
        monkeypatch.setattr(softdb.reading.topk, "backend_for", lambda tensor, backend=backend: backend)
        for metric in ("dot", "cosine", "l2"):
            read = topk_read(*inputs, index, metric=metric)
            first = torch.autograd.grad(read.values.square().sum() + read.lse.sum(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum(part.square().sum() for part in first), inputs))
    for wanted, found in zip(results[:3], results[3:], strict=True):
        for left, right in zip(wanted, found, strict=True):
            assert torch.allclose(left, right, atol=1e-4, rtol=1e-4)


def test_triton_backward_takes_the_rows_of_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for backend in (TORCH_BLOCKS, BACKEND):
        monkeypatch.setattr(softdb.reading.topk, "backend_for", lambda tensor, backend=backend: backend)
        store = SoftKVStore(6, 5, metric="l2", device=DEVICE)
        ids = store.add(random(9, 6, seed=1), random(9, 5, seed=2))
        query = random(2, 6).requires_grad_()
        read = store.read(query, mode="topk", k=7)
        store.put(ids[:4], random(4, 6, seed=3), random(4, 5, seed=4))
        store.add(random(9, 6, seed=1), random(9, 5, seed=2))
        read.values.square().sum().backward()
        gradients.append(query.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_fake_tensors_pass_through_triton_reads_of_candidates() -> None:
    with FakeTensorMode():
        query, keys = (torch.empty(n, 8, device="cuda") for n in (3, 100))
        values = torch.empty(100, 5, dtype=torch.bfloat16, device="cuda")
        index = torch.zeros(3, 4, dtype=torch.int64, device="cuda")
        spec = ReadSpec("cosine", None, Selection(100), torch.float32)
        read = candidates.read_at(query, keys, values, GatherIndex(index), spec, None, sparse=False)
        assert read is not None
        assert [tuple(output.shape) for output in read] == [(3, 4), (3, 4), (3,), (3, 5)]
        assert candidates.score_at(query, keys, index, spec).shape == (3, 4)
        assert candidates.blend_at(read.weights, values, index).shape == (3, 5)
        gradient = candidates.blend_at_backward(read.values, read.weights, values, index, sparse=False)
        assert (gradient.shape, gradient.dtype, gradient.device) == (values.shape, values.dtype, values.device)


@pytest.mark.slow
def test_triton_reads_of_candidates_compile_for_hopper() -> None:
    query, keys, values = torch.zeros(64, 256), torch.zeros(300, 256), torch.zeros(300, 64)
    index, upstream = torch.zeros(64, 32, dtype=torch.int64), torch.zeros(64, 32)
    with record_launches(gather, "_read_kernel", "_blend_kernel") as launches:
        _, weights, lse, blend = gather.read_rows(query, query[:, 0], keys, values, index, upstream, "l2")
        gather.blend_rows(weights, values, index)
    with record_launches(gather_backward, "_read_backward_kernel", "_sum_by_row_kernel") as more:
        grads = upstream, upstream, lse, blend
        narrow = keys.half(), values.half()
        gather_backward.read_rows_backward(
            query, None, *narrow, index, weights, blend, *grads, "cosine", True, True, True
        )
        rows, order = index.flatten().sort(stable=True)
        gather_backward.sum_by_row(rows, order, upstream, query, None, keys, "cosine")
    for compiled in compile_for_hopper([*launches, *more]):
        assert compiled.shared <= MAX_SHARED
        assert compiled.stack <= 64
