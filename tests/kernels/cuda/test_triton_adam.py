"""Test the steps of row optimizers on a GPU against those on the CPU.

Without a GPU, the interpreter of Triton runs the kernel on the CPU, where checks are deferred as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.triton_kernels import DEVICE, MAX_SHARED, compile_for_hopper, record_launches
from torch import Tensor, nn

from softdb import SoftKVStore
from softdb.errors import NonFiniteError
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_
from softdb.pending_checks import defer_checks
from softdb.table.duplicates import sum_duplicates
from softdb.table.hooks import register_row_optimizer

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NumPy's, in the interpreter
]

SLOTS, WIDTH = 12, 5


@register_row_optimizer
class AdamInTorch(RowAdam):
    """`RowAdam` without its kernel."""

    def _has_kernel(self, *_: Any) -> bool:
        return False


@pytest.fixture
def as_on_gpu() -> Iterator[Callable[[], None]]:
    """Defer checks as on a GPU, once the function is called."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(defer_checks(DEVICE))


def make_row_sparse(rows: Tensor, values: Tensor, count: int, device: str) -> Tensor:
    shape = (count, *values.shape[1:])
    return torch.sparse_coo_tensor(rows[None].to(device), values.to(device), shape, check_invariants=True)


def make_gradient(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return rows with duplicates, unordered, and their gradients."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, shape[0], (10,), generator=generator)
    return rows, torch.randn(10, *shape[1:], generator=generator)


def train(device: str, options: dict[str, Any], sparse: bool, kind: Any = RowAdam) -> tuple[SoftKVStore, Any]:
    """Train a store whose rows are deleted, revived, added and grown between steps."""
    store = SoftKVStore(WIDTH, 3, trainable=True, device=device)
    store.reserve(SLOTS)
    generator = torch.Generator().manual_seed(0)
    contents = [torch.randn(SLOTS + 4, width, generator=generator).to(device) for width in (WIDTH, 3)]
    ids = store.add(*(content[: SLOTS - 4] for content in contents))
    optimizer = kind([store.keys], lr=0.05, **options)
    for step in range(5):
        if step == 1:
            store.delete(ids[[1, 5]])
        if step == 3:
            store.add(*(content[-5:-4] for content in contents))  # in the slot of a deleted row
            store.revive(ids[[7]], *(content[-4:-3] for content in contents))
            store.reserve(SLOTS + 9)
            store.add(*(content[-3:] for content in contents))
        rows, values = make_gradient(step, tuple(store.keys.shape))
        gradient = make_row_sparse(rows, values, len(store.keys), device)
        store.keys.grad = gradient if sparse else gradient.to_dense()
        optimizer.step()
    return store, optimizer


def assert_same_training(own: tuple[SoftKVStore, Any], expected: tuple[SoftKVStore, Any]) -> None:
    live = (expected[0].rows.ids >= 0).cpu()
    torch.testing.assert_close(own[0].keys.detach().cpu(), expected[0].keys.detach(), rtol=2e-6, atol=2e-6)
    states = [optimizer.state[store.keys] for store, optimizer in (own, expected)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        found = states[0][name]
        if isinstance(value, Tensor):  # The state of free slots is reset when they get a row.
            torch.testing.assert_close(found.cpu()[live], value[live], rtol=2e-6, atol=2e-6)
        else:
            assert found == value


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"weight_decay": 0.3, "amsgrad": True, "maximize": True, "betas": (0.3, 0.99)},
}


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [RowAdam, AdamInTorch])
def test_triton_step_of_a_store_equals_the_cpu(
    kind: Any, options: str, sparse: bool, as_on_gpu: Callable[[], None]
) -> None:
    expected = train("cpu", OPTIONS[options], sparse)
    as_on_gpu()
    assert_same_training(train(DEVICE, OPTIONS[options], sparse, kind), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_row_adagrad_without_host_reads_equals_the_cpu(sparse: bool, as_on_gpu: Callable[[], None]) -> None:
    expected = train("cpu", {"weight_decay": 0.3}, sparse, RowAdagrad)
    as_on_gpu()
    assert_same_training(train(DEVICE, {"weight_decay": 0.3}, sparse, RowAdagrad), expected)


@pytest.mark.parametrize("width", [1, 33, 256])
def test_triton_step_sums_many_duplicates(width: int, as_on_gpu: Callable[[], None]) -> None:
    as_on_gpu()
    counts = [1, 2, 8, 9, 10, 33, 34, 70]  # around the size of a chunk
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(1))
    table = nn.Parameter(torch.zeros(20, width, device=DEVICE))
    optimizer = RowAdam([table], betas=(0.0, 0.5))
    table.grad = make_row_sparse(rows, values, 20, DEVICE)
    optimizer.step()
    sums = torch.zeros(20, width, dtype=torch.float64).index_add_(0, rows, values.double())
    torch.testing.assert_close(optimizer.state[table]["exp_avg"].cpu().double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table.detach().cpu().double(), -1e-3 * sums.sign(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_step_rounds_as_the_cpu(dtype: torch.dtype, sparse: bool, as_on_gpu: Callable[[], None]) -> None:
    # With these options a step moves each number by lr, exactly; only the stored number is rounded.
    options: dict[str, Any] = {"lr": 2.0**-12, "betas": (0.0, 0.0), "eps": 0.0}
    found: list[Tensor] = []
    for device in ("cpu", DEVICE):
        if found:
            as_on_gpu()
        torch.manual_seed(0)
        table = nn.Parameter((torch.arange(60.0).view(12, 5) / 16 - 2).to(dtype).to(device))
        optimizer = RowAdam([table], **options)
        for step in range(3):
            rows = torch.randperm(12, generator=torch.Generator().manual_seed(step))[: 12 if not sparse else 7]
            values = torch.where(
                torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(step)) > 0, 1.0, -1.0
            )
            gradient = make_row_sparse(rows, values.to(dtype), 12, device)
            table.grad = gradient if sparse else gradient.to_dense()
            optimizer.step()
        found.append(table.detach().cpu())
        moved = found[-1].float() - (torch.arange(60.0).view(12, 5) / 16 - 2).to(dtype).float()
    assert bool((moved != 0).any())
    assert torch.equal(*found)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", [RowAdam, AdamInTorch])
def test_triton_step_skips_rows_whose_gradient_is_not_finite(
    kind: Any, sparse: bool, as_on_gpu: Callable[[], None]
) -> None:
    as_on_gpu()
    store = SoftKVStore(WIDTH, 3, trainable=True, device=DEVICE)
    ids = store.add(torch.ones(6, WIDTH, device=DEVICE), torch.ones(6, 3, device=DEVICE))
    store.delete(ids[[4]])
    optimizer = kind([store.keys], lr=0.1, weight_decay=1.0)
    rows = torch.tensor([3, 0, 3, 2, 4])
    values = torch.ones(5, WIDTH)
    for bad in (torch.nan, torch.inf):
        values[2, 1] = values[4, 0] = bad  # in a duplicate of row 3, and in a deleted row
        gradient = make_row_sparse(rows, values, len(store.keys), DEVICE)
        store.keys.grad = gradient if sparse else gradient.to_dense()
        before = store.keys.detach().cpu().clone()
        optimizer.step()
        moved = (store.keys.detach().cpu() != before).any(1).tolist()
        assert moved[:6] == ([True, False, True] if sparse else [True, True, True]) + [False, False, not sparse]
        with pytest.raises(NonFiniteError, match="gradient: expected finite gradients of rows in each optimizer step"):
            store.check()
        store.check()
    values[2, 1] = values[4, 0] = 1.0
    store.keys.grad = make_row_sparse(rows, values, len(store.keys), DEVICE)
    optimizer.step()
    store.check()
    # The decay of all three steps is due, and a full step in the direction of the gradient.
    expected = torch.full((WIDTH,), 0.9**3) - 0.1 * _correct_third_step()
    torch.testing.assert_close(store.keys.detach().cpu()[3], expected, rtol=1e-5, atol=1e-5)


def _correct_third_step() -> float:
    """Return the first update of a row in step 3, in units of lr."""
    mean, square = 0.1 * 2, 0.001 * 4
    return (1 - 0.999**3) ** 0.5 / (1 - 0.9**3) * mean / square**0.5


def test_triton_step_of_a_plain_parameter_takes_nan_as_torch_does(as_on_gpu: Callable[[], None]) -> None:
    as_on_gpu()
    table = nn.Parameter(torch.ones(4, 3, device=DEVICE))
    version = table._version
    optimizer = RowAdam([table])
    table.grad = make_row_sparse(torch.tensor([1]), torch.full((1, 3), torch.nan), 4, DEVICE)
    optimizer.step()
    assert table.detach().isnan().any(1).tolist() == [False, True, False, False]
    assert table._version > version


def test_triton_step_of_wide_rows_and_other_dtypes_equals_the_cpu(as_on_gpu: Callable[[], None]) -> None:
    shapes = {(3, 8192): torch.float32, (2, 8200): torch.float32, (4, 2, 3): torch.float64, (): torch.float32}
    results = []
    for device in ("cpu", DEVICE):
        if results:
            as_on_gpu()
        torch.manual_seed(0)
        tables = [nn.Parameter(torch.randn(shape, dtype=dtype).to(device)) for shape, dtype in shapes.items()]
        optimizer = RowAdam(tables, lr=0.1)
        for _ in range(2):
            for table in tables:
                table.grad = torch.randn(table.shape, dtype=table.dtype).to(device)
            optimizer.step()
        results.append([table.detach().cpu() for table in tables])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [2.0, torch.inf])
def test_clipping_on_a_gpu_leaves_gradients_uncoalesced(order: float, as_on_gpu: Callable[[], None]) -> None:
    rows, values = make_gradient(0, (12, 5))
    dense = make_row_sparse(rows, values, 12, "cpu").to_dense()
    expected = torch.linalg.vector_norm(dense, order)
    as_on_gpu()
    table = nn.Parameter(torch.zeros(12, 5, device=DEVICE))
    table.grad = make_row_sparse(rows, values, 12, DEVICE)
    torch.testing.assert_close(clip_row_grad_norm_([table], 0.5, order).cpu(), expected)
    assert len(table.grad._indices()[0]) == len(rows)
    torch.testing.assert_close(table.grad.to_dense().cpu(), dense * (0.5 / (expected + 1e-6)))


@pytest.mark.slow
def test_triton_training_steps_follow_the_cpu(as_on_gpu: Callable[[], None]) -> None:
    found: list[Tensor] = []
    for device in ("cpu", DEVICE):
        if found:
            as_on_gpu()
        generator = torch.Generator().manual_seed(0)
        store = SoftKVStore(WIDTH, 3, trainable=True, sparse_grad=True, device=device)
        store.add(*(torch.randn(20, width, generator=generator).to(device) for width in (WIDTH, 3)))
        optimizer = RowAdam(store.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(2):
            read = store.read(torch.randn(4, WIDTH, generator=generator).to(device), "topk", k=2)
            optimizer.zero_grad()
            read.values.square().mean().backward()
            clip_row_grad_norm_(store.parameters(), 0.1)
            optimizer.step()
        found.append(torch.cat([store.keys.detach().cpu(), store.values.detach().cpu()], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_sums_of_duplicates_equal_coalesce() -> None:
    rows, values = make_gradient(3, (12, 5))
    whole = make_row_sparse(rows, values, 12, "cpu").coalesce()
    ordered, place, sums = sum_duplicates(rows, values)
    count = len(whole.indices()[0])
    torch.testing.assert_close(sums[:count], whole.values())
    assert torch.equal(sums[count:], torch.zeros_like(sums[count:]))
    assert torch.equal(whole.indices()[0][place], ordered)
    assert [len(part) for part in sum_duplicates(rows[:0], values[:0])] == [0, 0, 0]


def test_grad_scaler_skips_a_step_with_an_infinite_gradient(as_on_gpu: Callable[[], None]) -> None:
    as_on_gpu()
    store = SoftKVStore(WIDTH, 3, trainable=True, sparse_grad=True, device=DEVICE)
    store.add(torch.eye(WIDTH, device=DEVICE), torch.ones(WIDTH, 3, device=DEVICE))
    optimizer, scaler = RowAdam(store.parameters(), lr=0.1), torch.amp.GradScaler(DEVICE, init_scale=4.0)
    changes = []
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        before = store.values.detach().clone()
        read = store.read(torch.eye(WIDTH, device=DEVICE)[:1], "topk", k=2)
        scaler.scale((factor * read.values).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        changes.append(bool((store.values != before).any()))
    assert changes == [True, False, True]
    assert optimizer.state[store.values]["step"] == 2
    store.check()


@pytest.mark.gpu
def test_step_of_a_table_with_more_than_two_billion_numbers() -> None:
    count, width = 40_000_000, 64
    table = nn.Parameter(torch.zeros(count, width, device="cuda"))
    optimizer = RowAdam([table], lr=0.1)
    rows = torch.tensor([count - 1, 0, 2**31 // width + 1, count - 1])
    table.grad = make_row_sparse(rows, torch.ones(4, width), count, "cuda")
    optimizer.step()
    moved = table.detach()[:, 0].nonzero().squeeze(-1).cpu()
    assert moved.tolist() == [0, 2**31 // width + 1, count - 1]


@pytest.mark.slow
def test_triton_kernel_compiles_for_hopper() -> None:
    from softdb.kernels.cuda import adam

    with record_launches(adam, "adam_kernel") as launches:
        for dtype, width, sparse, is_plain in (
            (torch.float32, 64, True, False),
            (torch.bfloat16, 128, True, False),
            (torch.float16, 256, False, False),
            (torch.float32, 8192, True, True),
        ):
            rows = torch.empty(64, width, dtype=dtype)
            moments = [torch.empty(64, width) for _ in range(3)]
            slots = torch.empty(64, dtype=torch.int64) if sparse else None
            state = [None] * 4 if is_plain else [torch.empty(64, dtype=torch.int64) for _ in range(4)]
            numbers = [torch.empty(64, dtype=torch.float64), torch.empty((), dtype=torch.float64)]
            options = (64, 3, 0.1, 0.9, 0.999, 1e-8, -0.2, -0.1, True, 2**40)
            adam.launch_adam(rows, *moments, rows, slots, slots, *state, *numbers, *options)
    for compiled in compile_for_hopper(launches):
        assert compiled.shared <= MAX_SHARED
        assert compiled.stack == 0
