"""Test row optimizers against the optimizers of torch and reference equations."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.tolerances import allclose
from torch import Tensor, nn

import softdb
from softdb import SoftKVStore
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_
from softdb.optim.blocks import BlockSizes
from softdb.optim.row_optimizer import RowOptimizer

OPTIMIZERS = [RowAdam, RowAdagrad]
# torch 2.11 and 2.12 emit this warning even if check_invariants is passed.
pytestmark = [
    pytest.mark.each_device,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=make_generator()).to(dtype))


def make_row_gradient(shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = make_generator(seed)
    slots = torch.randperm(shape[0], generator=generator)[:count].sort().values
    values = torch.randn(count, *shape[1:], generator=generator).to(dtype)
    return torch.sparse_coo_tensor(slots[None], values, shape, is_coalesced=True, check_invariants=True)


def make_store(count: int = 8, capacity: int | None = None, **options: Any) -> SoftKVStore:
    store = SoftKVStore(4, 3, trainable=True, sparse_grad=True, **options)
    store.reserve(capacity or count)
    generator = make_generator()
    store.add(torch.randn(count, 4, generator=generator), torch.randn(count, 3, generator=generator))
    return store


def set_gradients(store: SoftKVStore, slots: list[int], seed: int) -> None:
    """Set row-sparse gradients of the keys and values at ``slots``."""
    generator = make_generator(seed)
    for table in (store.keys, store.values):
        values = torch.randn(len(slots), table.shape[1], generator=generator)
        places = torch.tensor([sorted(slots)])
        table.grad = torch.sparse_coo_tensor(places, values, table.shape, is_coalesced=True, check_invariants=True)


def run_read_backward(store: SoftKVStore, query: Tensor, k: int = 2) -> None:
    store.read(query, "topk", k=k).values.square().sum().backward()


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 5), (40,), (40, 2, 3)])
def test_row_adam_equals_sparse_adam(shape: tuple[int, ...]) -> None:
    own, other = make_parameter(*shape), make_parameter(*shape)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizers = [RowAdam([own], **options), torch.optim.SparseAdam([other], **options)]
    for step in range(50):
        for parameter, optimizer in zip((own, other), optimizers, strict=True):
            parameter.grad = make_row_gradient(shape, 7, seed=step)
            optimizer.step()
    assert allclose(own, other, rtol=0, atol=1e-6)


def test_row_adam_in_many_blocks_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowOptimizer, "block_sizes", BlockSizes(cpu=3 * 6))
    test_row_adam_equals_sparse_adam((40, 6))
    test_dense_gradients_equal_adamw(0.1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dense_gradients_equal_adamw(weight_decay: float) -> None:
    own, other = make_parameter(30, 4), make_parameter(30, 4)
    options = {"lr": 0.05, "weight_decay": weight_decay}
    optimizers = [RowAdam([own], **options), torch.optim.AdamW([other], **options)]
    for step in range(20):
        for parameter, optimizer in zip((own, other), optimizers, strict=True):
            parameter.grad = torch.randn(30, 4, generator=make_generator(step))
            optimizer.step()
    assert allclose(own, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dense_gradients_of_any_shape(kind: type, shape: tuple[int, ...]) -> None:
    parameter = make_parameter(*shape)
    before = parameter.detach().clone()
    optimizer = kind([parameter], lr=0.1, weight_decay=0.1)
    parameter.grad = torch.full(shape, 2.0)
    optimizer.step()
    # If all gradients are equal, the first step of either optimizer is lr times the sign of the gradient.
    assert allclose(parameter, before * (1 - 0.01) - 0.1, atol=1e-6)


def test_row_adagrad_equals_its_equation() -> None:
    parameter = make_parameter(20, 4)
    expected, total = parameter.detach().double(), torch.full((20,), 0.5, dtype=torch.float64)
    optimizer = RowAdagrad([parameter], lr=0.3, eps=1e-4, initial_accumulator_value=0.5)
    for step in range(30):
        gradient = make_row_gradient((20, 4), 5, seed=step)
        parameter.grad = gradient if step % 3 else gradient.to_dense()
        optimizer.step()
        dense = gradient.to_dense().double()
        total += dense.square().mean(1)
        expected -= 0.3 * dense / (total.sqrt() + 1e-4)[:, None]
    assert allclose(parameter.double(), expected, atol=1e-6)
    assert optimizer.state[parameter]["sum"].shape == (20,)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_uncoalesced_gradients_are_summed(kind: type) -> None:
    results = []
    for coalesced in (False, True):
        parameter = make_parameter(6, 2)
        values = torch.arange(8.0).view(4, 2) - 3
        places = torch.tensor([[5, 1, 5, 2]])
        gradient = torch.sparse_coo_tensor(places, values, (6, 2), check_invariants=True)
        parameter.grad = gradient.coalesce() if coalesced else gradient
        kind([parameter], lr=0.1).step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_ordered_indices_without_the_coalesced_flag() -> None:
    parameter = make_parameter(6, 2)
    gradient = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 2), (6, 2), check_invariants=True)
    assert not gradient.is_coalesced()
    parameter.grad = gradient
    before = parameter.detach().clone()
    RowAdam([parameter], lr=0.1).step()
    assert (parameter != before).any(1).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_empty_gradient_counts_as_a_step_and_updates_nothing(kind: type) -> None:
    parameter = make_parameter(6, 2)
    before = parameter.detach().clone()
    optimizer = kind([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = make_row_gradient((6, 2), 0, seed=0)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparse", [True, False])
def test_state_of_half_precision_parameters_is_float32(dtype: torch.dtype, sparse: bool) -> None:
    narrow, wide = make_parameter(10, 4, dtype=dtype), nn.Parameter(make_parameter(10, 4, dtype=dtype).detach().float())
    optimizers = [RowAdam([p], lr=0.01, weight_decay=0.1) for p in (narrow, wide)]
    for step in range(5):
        wide.data.copy_(narrow.data)
        gradient = make_row_gradient((10, 4), 4, seed=step, dtype=dtype)
        gradient = gradient if sparse else gradient.to_dense()
        for parameter, optimizer in zip((narrow, wide), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        # Stochastic rounding deviates by less than one unit in the last place.
        assert bool(((narrow.float() - wide).abs() <= torch.finfo(dtype).eps * wide.abs()).all())
    moments = [optimizer.state[p]["exp_avg"] for p, optimizer in zip((narrow, wide), optimizers, strict=True)]
    assert moments[0].dtype == torch.float32
    assert torch.equal(*moments)


# -- rows of half precision --------------------------------------------------------------------------------------------

HALF_DTYPES = [torch.bfloat16, torch.float16]


def run_steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range, sparse: bool = False) -> None:
    for step in steps:
        if sparse:
            parameter.grad = make_row_gradient(tuple(parameter.shape), 5, seed=step, dtype=parameter.dtype)
        else:
            parameter.grad = torch.randn(parameter.shape, generator=make_generator(step)).to(parameter.dtype)
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_small_steps_accumulate_in_half_precision(kind: type, dtype: torch.dtype, sparse: bool) -> None:
    torch.manual_seed(0)
    lr, columns = 1e-3 if kind is RowAdam else 1e-2, 1024
    gradient = torch.ones(1, columns)
    tables = [nn.Parameter(torch.ones(3, columns, dtype=each)) for each in (dtype, torch.float32)]
    for table in tables:
        optimizer = kind([table], lr=lr)
        for _ in range(200):
            table.grad = torch.sparse_coo_tensor(
                torch.tensor([[1]]), gradient.to(table.dtype), table.shape, is_coalesced=True, check_invariants=True
            )
            if not sparse:
                table.grad = table.grad.to_dense()
            optimizer.step()
    moved, wanted = (1 - table.detach()[1].double().mean() for table in tables)
    assert wanted > 0.1
    # A step of lr rounds up by one unit in the last place (ulp) with probability lr / ulp, so the standard deviation
    # of 200 steps is at most sqrt(200 * lr * ulp).
    deviation = math.sqrt(200 * lr * torch.finfo(dtype).eps / columns)
    assert abs(moved - wanted) < 4 * deviation
    assert torch.equal(tables[0].detach()[[0, 2]], torch.ones(2, columns, dtype=dtype))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_run_rounds_as_an_uninterrupted_run(kind: type, dtype: torch.dtype, sparse: bool) -> None:
    torch.manual_seed(1)
    whole = make_parameter(9, 7, dtype=dtype)
    optimizer = kind([whole], lr=1e-3, weight_decay=0.1)
    run_steps(whole, optimizer, range(5), sparse)
    file = io.BytesIO()
    torch.save({"rows": whole.detach(), "optimizer": optimizer.state_dict()}, file)
    run_steps(whole, optimizer, range(5, 10), sparse)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(2)
    resumed = nn.Parameter(saved["rows"])
    other = kind([resumed], lr=1e-3)
    other.load_state_dict(saved["optimizer"])
    run_steps(resumed, other, range(5, 10), sparse)
    assert torch.equal(whole, resumed)
    assert type(optimizer.state[whole]["seed"]) is int


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rounding_is_independent_of_blocks_threads_and_other_rows(
    kind: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(rows: list[int], sparse: bool) -> Tensor:
        torch.manual_seed(3)
        table = nn.Parameter(torch.ones(12, 5, dtype=dtype))
        optimizer = kind([table], lr=1e-3)
        for step in range(20):
            gradient = torch.randn(12, 5, generator=make_generator(step)).to(dtype)
            places = torch.tensor([rows])
            if sparse:
                table.grad = torch.sparse_coo_tensor(places, gradient[rows], (12, 5), check_invariants=True)
            else:
                table.grad = gradient
            optimizer.step()
        return table.detach()

    everything = trained(list(range(12)), sparse=False)
    assert bool((everything != 1).any(1).all())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(RowOptimizer, "block_sizes", BlockSizes(cpu=3 * 5))
    try:
        assert torch.equal(trained(list(range(12)), sparse=False), everything)
        assert torch.equal(trained([7, 2, 11, 3], sparse=True)[[2, 3, 7, 11]], everything[[2, 3, 7, 11]])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_rows_columns_steps_and_parameters_are_rounded_independently(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    tables = [nn.Parameter(torch.ones(64, 64, dtype=dtype)) for _ in range(2)]
    optimizer = RowAdagrad(tables, lr=torch.finfo(dtype).eps / 4, eps=0.0)
    rounded_up = []
    for _ in range(3):
        for table in tables:
            table.data.fill_(1.0)
            table.grad = torch.full((64, 64), -1.0, dtype=dtype)
            optimizer.state[table].pop("sum", None)
        optimizer.step()
        rounded_up += [(table.detach() != 1).double() for table in tables]
    ups = torch.stack(rounded_up).flatten(1)
    assert bool(((ups.mean(1) - 0.25).abs() < 0.03).all())
    shifted = torch.cat([ups, ups.view(6, 64, 64).roll(1, 1).flatten(1), ups.view(6, 64, 64).roll(1, 2).flatten(1)])
    correlation = torch.corrcoef(shifted) - torch.eye(18, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 64


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_unchanged_numbers_are_stored_exactly(kind: type, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # All 16-bit numbers.
    table = nn.Parameter(patterns.view(dtype).view(64, 1024).clone())
    optimizer = kind([table], lr=0.5)
    for _ in range(2):
        table.grad = torch.zeros_like(table)
        optimizer.step()
    after, before = table.detach().flatten(), patterns.view(dtype)
    numbers = ~before.isnan()
    assert torch.equal(after.view(torch.int16)[numbers], patterns[numbers])
    assert bool(after[~numbers].isnan().all())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_numbers_are_rounded_to_a_neighbor_without_bias(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    least = smallest * torch.finfo(dtype).eps
    columns = 2**16
    given = [1.0, 1.9, -3.3, 100.3, 1e-3, smallest, -smallest * 0.77, 5.3 * least, 0.3 * least, -0.3 * least, largest]
    numbers = torch.tensor(given, dtype=torch.float64).float()[:, None] * torch.tensor([1.0, 1 - 2.0**-13])
    for number in numbers.flatten().tolist():
        # From 0, one step with lr = |number| against the sign of the gradient ends at the number.
        table = nn.Parameter(torch.zeros(1, columns, dtype=dtype))
        optimizer = RowAdagrad([table], lr=abs(number), eps=0.0)
        table.grad = torch.full((1, columns), -math.copysign(1.0, number), dtype=dtype)
        optimizer.step()
        rounded = table.detach().double().flatten()
        exact = torch.tensor(number, dtype=torch.float64)
        spacing = max(2.0 ** math.floor(math.log2(abs(number))) * torch.finfo(dtype).eps, least)
        assert bool(((rounded - exact).abs() < spacing).all())
        assert len(rounded.unique()) <= 2
        assert abs(rounded.mean() - exact) < 2.5 * spacing / math.sqrt(columns)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_numbers_outside_the_range_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    unit = 2.0 ** math.floor(math.log2(largest)) * torch.finfo(dtype).eps
    for sign in (1.0, -1.0):
        for number in (largest + 0.4 * unit, largest + 0.6 * unit):
            table = nn.Parameter(torch.zeros(8, 64, dtype=dtype))
            table.grad = torch.full((8, 64), -sign, dtype=dtype)
            RowAdagrad([table], lr=number, eps=0.0).step()
            assert torch.equal(table.detach(), torch.full((8, 64), sign * number, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_only_half_precision_draws_a_seed_from_the_default_generator(kind: type) -> None:
    def seed(number: int) -> int:
        torch.manual_seed(number)
        table = make_parameter(4, 2, dtype=torch.bfloat16)
        optimizer = kind([table], lr=1e-3)
        run_steps(table, optimizer, range(2))
        drawn: int = optimizer.state[table]["seed"]
        return drawn

    assert seed(0) == seed(0)
    assert seed(0) != seed(1)
    table = make_parameter(4, 2)
    before = torch.get_rng_state()
    optimizer = kind([table, make_parameter(4, 2, dtype=torch.bfloat16)], lr=1e-3)
    run_steps(table, optimizer, range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert "seed" not in optimizer.state[table]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replicas_of_a_process_group_round_equally(kind: type) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        replicas = []
        for number in range(2):
            torch.manual_seed(number)
            tables = [make_parameter(6, 5, dtype=torch.bfloat16) for _ in range(2)]
            optimizer = kind(tables, lr=1e-3)
            for table in tables:
                run_steps(table, optimizer, range(3))
                table.grad = None
            replicas.append(tables)
        for own, other in zip(*replicas, strict=True):
            assert torch.equal(own, other)
        assert not torch.equal(*replicas[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4), (3, 0), (2, 5)])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_half_precision_parameters_of_any_shape(kind: type, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    parameter = make_parameter(*shape, dtype=dtype)
    before = parameter.detach().clone()
    optimizer = kind([parameter], lr=0.1)
    parameter.grad = torch.full(shape, 2.0, dtype=dtype)
    optimizer.step()
    assert allclose(parameter.float(), before.float() - 0.1, atol=0.02)


# -- weight decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_is_independent_of_how_often_a_row_is_read(kind: type) -> None:
    parameter = make_parameter(3, 2)
    before = parameter.detach().clone()
    optimizer = kind([parameter], lr=0.1, weight_decay=0.5, eps=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    reads = [[0], [0, 1], [0], [0], [0, 1, 2]]
    for rows in reads:
        gradient = torch.zeros(len(rows), 2)
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([rows]), gradient, (3, 2), check_invariants=True)
        optimizer.step()
        schedule.step()
    factor = math.prod(1 - 0.1 * 0.9**step * 0.5 for step in range(5))
    assert allclose(parameter, before * factor, atol=1e-6)


def test_weight_decay_equals_dense_adamw_under_a_schedule() -> None:
    own, other = make_parameter(12, 3), make_parameter(12, 3)
    optimizers = [RowAdam([own], lr=0.1, weight_decay=0.3), torch.optim.AdamW([other], lr=0.1, weight_decay=0.3)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40) for optimizer in optimizers]
    for step in range(30):
        gradient = make_row_gradient((12, 3), 3, seed=step) * 0
        own.grad, other.grad = gradient, gradient.to_dense()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    own.grad = other.grad = torch.zeros(12, 3)  # This step applies the pending decay of every row.
    for optimizer in optimizers:
        optimizer.step()
    assert allclose(own, other, atol=1e-6)


def test_weight_decay_may_begin_and_end_between_steps() -> None:
    parameter = make_parameter(2, 2)
    before = parameter.detach().clone()
    optimizer = RowAdam([parameter], lr=0.1)
    for weight_decay, rows in [(0.0, [0]), (0.5, [0]), (0.5, [0]), (0.0, [0]), (0.0, [0, 1])]:
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        gradient = torch.zeros(len(rows), 2)
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([rows]), gradient, (2, 2), check_invariants=True)
        optimizer.step()
    assert allclose(parameter, before * 0.95**2, atol=1e-6)


# -- new and deleted rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_growth_during_training_equals_reserved_storage(kind: type, weight_decay: float) -> None:
    def train(capacity: int) -> SoftKVStore:
        store = make_store(8, capacity)
        optimizer = kind(store.parameters(), lr=0.05, weight_decay=weight_decay)
        generator = make_generator(7)
        for step in range(12):
            if step in (4, 7):
                store.add(torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator))
            optimizer.zero_grad()
            run_read_backward(store, torch.randn(2, 4, generator=generator), k=3)
            optimizer.step()
        return store

    grown, reserved = train(8), train(64)
    assert len(grown.keys) < 64
    for name in ("keys", "values"):
        assert torch.equal(getattr(grown, name)[:20], getattr(reserved, name)[:20])


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("event", ["deleted and added", "revived"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_new_or_revived_row_starts_with_reset_state(kind: type, weight_decay: float, event: str, sparse: bool) -> None:
    store, peer = make_store(6), make_store(6)
    optimizer, other = (kind(each.parameters(), lr=0.05, weight_decay=weight_decay) for each in (store, peer))
    for step in range(5):
        for each, one in ((store, optimizer), (peer, other)):
            set_gradients(each, [1, 2, 4], seed=step)
            one.step()
    if event == "revived":
        key, value = store.keys.data[2:3].clone(), store.values.data[2:3].clone()
        store.revive([2], key, value)
    else:
        store.delete([2])
        key, value = torch.randn(1, 4, generator=make_generator(3)), torch.randn(1, 3, generator=make_generator(4))
        store.add(key, value)
        assert store.ids.tolist() == [0, 1, 6, 3, 4, 5]  # The new row has the slot of the deleted row.
    lone = SoftKVStore(4, 3, trainable=True, sparse_grad=True)
    lone.add(key, value)
    fresh = kind(lone.parameters(), lr=0.05, weight_decay=weight_decay)
    for step in range(3):
        for each, one in ((store, optimizer), (peer, other)):
            set_gradients(each, [1, 2, 4], seed=10 + step)
            for own, table in ((lone.keys, each.keys), (lone.values, each.values)):
                gradient = table.grad.to_dense()
                own.grad = gradient[2:3].to_sparse(1) if sparse else gradient[2:3].clone()
                if not sparse:
                    table.grad = gradient
            one.step()
        fresh.step()
        assert torch.equal(store.values[2], lone.values[0])
        assert torch.equal(store.keys[2], lone.keys[0])
        assert torch.equal(store.values[[0, 1, 3, 4, 5]], peer.values[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_free_slots_are_not_updated(kind: type, sparse: bool) -> None:
    store = make_store(6, 9)
    optimizer = kind(store.parameters(), lr=0.1, weight_decay=0.1)
    store.delete([1, 4])
    store.values.data[[1, 4]] = 7.0
    before = store.values.detach().clone()
    gradient = torch.ones_like(store.values)
    store.values.grad = gradient.to_sparse(1) if sparse else gradient
    optimizer.step()
    moved = (store.values != before).any(1)
    assert moved.tolist() == [True, False, True, True, False, True, False, False, False]
    moment = {RowAdam: "exp_avg", RowAdagrad: "sum"}[kind]
    assert bool((optimizer.state[store.values][moment][[1, 4]] == 0).all())


def test_state_follows_a_store_that_shrinks_on_load() -> None:
    store, small = make_store(20), make_store(5)
    optimizer = RowAdam(store.parameters(), lr=0.1)
    set_gradients(store, [0, 3, 19], seed=0)
    optimizer.step()
    optimizer.zero_grad()
    store.load_state_dict(small.state_dict())
    set_gradients(store, [0, 3], seed=1)
    optimizer.step()
    assert optimizer.state[store.keys]["exp_avg"].shape == (5, 4)
    store.add(torch.randn(15, 4), torch.randn(15, 3))
    set_gradients(store, [19], seed=2)
    optimizer.step()
    expected = store.values.grad.to_dense()[19] * (1 - 0.9)
    assert allclose(optimizer.state[store.values]["exp_avg"][19], expected)


def test_state_follows_a_conversion_of_the_store() -> None:
    store = make_store(4)
    optimizer = RowAdam(store.parameters(), lr=0.1)
    set_gradients(store, [0, 3], seed=0)
    optimizer.step()
    optimizer.zero_grad()
    store.double()
    run_read_backward(store, torch.ones(1, 4, dtype=torch.float64))
    optimizer.step()
    assert optimizer.state[store.keys]["exp_avg"].dtype == torch.float64


def test_topk_finds_keys_moved_by_the_optimizer() -> None:
    store = make_store(50, index="Flat")
    optimizer = RowAdam(store.parameters(), lr=0.5)
    query = torch.randn(3, 4, generator=make_generator(1))
    for _ in range(3):
        optimizer.zero_grad()
        read = store.read(query, "topk", k=4)
        assert torch.equal(read.ids, (query @ store.keys.T).topk(4).indices)
        read.values.square().sum().backward()
        optimizer.step()


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_run_resumed_from_a_file_equals_an_uninterrupted_run(kind: type, dtype: torch.dtype) -> None:
    def run_steps(store: SoftKVStore, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = make_generator(step)
            if step % 4 == 3:
                store.delete(store.ids[:1])
                rows = torch.randn(3, 7, generator=generator).to(dtype)
                store.add(rows[:, :4], rows[:, 4:])
            optimizer.zero_grad()
            run_read_backward(store, torch.randn(2, 4, generator=generator).to(dtype), k=3)
            optimizer.step()

    def make(count: int) -> tuple[SoftKVStore, torch.optim.Optimizer]:
        store = SoftKVStore(4, 3, trainable=True, sparse_grad=True, dtype=dtype)
        rows = torch.randn(count, 7, generator=make_generator()).to(dtype)
        store.add(rows[:, :4], rows[:, 4:])
        return store, kind(store.parameters(), lr=0.05, weight_decay=0.1)

    store, optimizer = make(8)
    run_steps(store, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"store": store.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = make(2)
    resumed.load_state_dict(saved["store"])
    other.load_state_dict(saved["optimizer"])
    for own, its in ((store.keys, resumed.keys), (store.values, resumed.values)):
        assert optimizer.state[own].keys() == other.state[its].keys()
        for name, value in optimizer.state[own].items():
            loaded = other.state[its][name]
            if isinstance(value, Tensor):
                assert loaded.dtype == value.dtype
                assert torch.equal(loaded, value)
            else:
                assert loaded == value
    run_steps(store, optimizer, range(10, 20))
    run_steps(resumed, other, range(10, 20))
    assert torch.equal(store.ids, resumed.ids)
    assert torch.equal(store.keys, resumed.keys)
    assert torch.equal(store.values, resumed.values)


def test_load_state_dict_copies_the_result_of_hooks() -> None:
    parameter = make_parameter(4, 2)
    optimizer = RowAdam([parameter])
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    other = RowAdam([make_parameter(4, 2)])
    kept = optimizer.state_dict()
    other.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": {0: {**given["state"][0], "step": 5}}})
    other.load_state_dict(kept)
    (state,) = other.state.values()
    assert state["step"] == 5
    state["exp_avg"].zero_()
    assert bool((optimizer.state[parameter]["exp_avg"] != 0).all())
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copies_of_store_and_optimizer_train_independently(kind: type, copied: Callable[[Any], Any]) -> None:
    store = make_store(6)
    optimizer = kind(store.parameters(), lr=0.1, weight_decay=0.1)
    set_gradients(store, [1, 2], seed=0)
    optimizer.step()
    twin, other = copied((store, optimizer))
    for each, one in ((store, optimizer), (twin, other)):
        each.delete([2])
        each.add(torch.ones(9, 4), torch.ones(9, 3))
        set_gradients(each, [1, 2, 9], seed=1)
        one.step()
    assert torch.equal(store.keys[:14], twin.keys[:14])
    assert torch.equal(store.values[:14], twin.values[:14])


# -- state of other optimizers and dtypes ------------------------------------------------------------------------------


def make_trained_state(kind: type, shape: tuple[int, ...] = (4, 2), **options: Any) -> dict[str, Any]:
    """Return the state dict of an optimizer after three steps with a dense gradient."""
    parameter = make_parameter(*shape)
    optimizer = kind([parameter], lr=0.1, **options)
    for seed in range(3):
        parameter.grad = torch.randn(shape, generator=make_generator(seed))
        optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_loaded_moments_of_any_floating_dtype_keep_their_values(
    kind: type, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    saved = make_trained_state(kind)
    moments = {name: value.to(dtype) for name, value in saved["state"][0].items() if isinstance(value, Tensor)}
    saved["state"][0].update(moments)
    parameter = make_parameter(4, 2, dtype=parameter_dtype)
    optimizer = kind([parameter])
    optimizer.load_state_dict(saved)
    for name, value in moments.items():
        loaded = optimizer.state[parameter][name]
        assert loaded.dtype in (torch.float32, torch.float64)
        assert torch.equal(loaded.double(), value.double())
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name in moments:
        assert optimizer.state[parameter][name].dtype == torch.promote_types(parameter_dtype, torch.float32)


@pytest.mark.parametrize(
    "number", [7, 7.0, np.int64(7), np.float32(7), np.array(7), torch.tensor(7), torch.tensor(7.0)]
)
def test_step_count_of_any_number_type_is_loaded_as_an_int(number: Any) -> None:
    saved = make_trained_state(RowAdam, weight_decay=0.1)
    saved["state"][0].update(step=number, log_decay=torch.tensor(-0.5) if number == 7.0 else np.float64(-0.5))
    parameter = make_parameter(4, 2)
    optimizer = RowAdam([parameter])
    optimizer.load_state_dict(saved)
    state = optimizer.state[parameter]
    assert (type(state["step"]), state["step"]) == (int, 7)
    assert (type(state["log_decay"]), state["log_decay"]) == (float, -0.5)


def test_row_adam_continues_from_sparse_adam_state() -> None:
    parameter, peer = make_parameter(6, 2), make_parameter(6, 2)
    given = torch.optim.SparseAdam([peer], lr=0.05)
    for step in range(3):
        peer.grad = make_row_gradient((6, 2), 3, seed=step)
        given.step()
    saved = given.state_dict()
    saved["state"][0]["step"] = torch.tensor(float(saved["state"][0]["step"]))
    optimizer = RowAdam([parameter], lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(saved)
    parameter.data.copy_(peer.data)
    for step in range(3, 6):
        for each, one in ((parameter, optimizer), (peer, given)):
            each.grad = make_row_gradient((6, 2), 3, seed=step)
            one.step()
    assert allclose(parameter, peer, rtol=0, atol=1e-6)


INVALID_STATE: list[tuple[str, Any, type[Exception], str]] = [
    ("exp_avg", torch.zeros(4, 3), softdb.ShapeError, r"state\['exp_avg'\]: expected shape \(4, 2\), got \(4, 3\)"),
    ("exp_avg", torch.zeros(4), softdb.ShapeError, r"state\['exp_avg'\]: expected shape"),
    ("exp_avg_sq", torch.zeros(5, 2), softdb.ShapeError, r"state\['exp_avg_sq'\]: expected shape \(4, 2\)"),
    ("exp_avg", torch.zeros(4, 2, dtype=torch.int64), softdb.DtypeError, r"state\['exp_avg'\]: expected a floating"),
    ("exp_avg", torch.zeros(4, 2).to_sparse(), softdb.DtypeError, r"state\['exp_avg'\]: expected a dense tensor"),
    ("exp_avg", [[0.0, 0.0]] * 4, softdb.DtypeError, r"state\['exp_avg'\]: expected a floating"),
    ("exp_avg", None, softdb.DtypeError, r"state\['exp_avg'\]: expected a floating"),
    ("decayed", torch.zeros(3), softdb.ShapeError, r"state\['decayed'\]: expected shape \(4,\)"),
    ("born", torch.zeros(4), softdb.DtypeError, r"state\['born'\]: expected an integer tensor, got torch.float32"),
    ("generation", torch.zeros(4, dtype=torch.bool), softdb.DtypeError, r"state\['generation'\]: expected an integer"),
    ("step", "many", softdb.DtypeError, r"state\['step'\]: expected a number"),
    ("step", True, softdb.DtypeError, r"state\['step'\]: expected a number"),
    ("step", 2.5, softdb.ArgumentError, r"state\['step'\]: expected a whole number of at least 0, got 2.5"),
    ("step", -1, softdb.ArgumentError, r"state\['step'\]: expected an integer of at least 0, got -1"),
    ("step", math.nan, softdb.ArgumentError, r"state\['step'\]: expected a whole number of at least 0, got nan"),
    ("step", torch.zeros(2), softdb.DtypeError, r"state\['step'\]: expected a number"),
    ("log_decay", math.nan, softdb.ArgumentError, r"state\['log_decay'\]: expected a finite number of at most 0"),
    ("log_decay", 0.5, softdb.ArgumentError, r"state\['log_decay'\]: expected a finite number of at most 0"),
    ("seed", 0.5, softdb.ArgumentError, r"state\['seed'\]: expected a whole number"),
    ("sum", torch.zeros(4), softdb.ArgumentError, r"state: expected the entries 'step', 'exp_avg', .*, got 'sum'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), INVALID_STATE)
def test_invalid_state_raises_and_changes_nothing(name: str, value: Any, error: type[Exception], message: str) -> None:
    parameter = make_parameter(4, 2)
    optimizer = RowAdam([parameter], lr=0.3, weight_decay=0.1)
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    saved = make_trained_state(RowAdam, weight_decay=0.1)
    rows = torch.zeros(4, dtype=torch.int64)
    saved["state"][0].update({"generation": rows, "born": rows, name: value})
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"][0].keys() == before["state"][0].keys()
    for own, other in zip(after["state"][0].values(), before["state"][0].values(), strict=True):
        assert torch.equal(own, other) if isinstance(own, Tensor) else own == other


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "log_decay", "decayed"])
def test_incomplete_state_raises(name: str) -> None:
    saved = make_trained_state(RowAdam, weight_decay=0.1)
    del saved["state"][0][name]
    with pytest.raises(softdb.ArgumentError, match=f"state: expected all of .*, got none named '{name}'"):
        RowAdam([make_parameter(4, 2)]).load_state_dict(saved)


def test_invalid_options_in_a_state_dict_raise() -> None:
    optimizer = RowAdam([make_parameter(4, 2)], lr=0.3)
    saved = make_trained_state(RowAdam)
    saved["param_groups"][0]["lr"] = "fast"
    with pytest.raises(softdb.DtypeError, match="lr: expected a number"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_unsupported_parameter_dtypes_raise(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(softdb.DtypeError, match="params: expected dense floating-point Parameters"):
        RowAdam([parameter])


# -- conventions of torch.optim ----------------------------------------------------------------------------------------


def test_parameter_groups_have_their_own_options() -> None:
    store = make_store(4)
    before = [table.detach().clone() for table in (store.keys, store.values)]
    optimizer = RowAdam([{"params": [store.keys], "lr": 0.0}, {"params": [store.values]}], lr=0.1)
    set_gradients(store, [0, 1], seed=0)
    optimizer.step()
    assert torch.equal(store.keys, before[0])
    assert not torch.equal(store.values, before[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step_calls_the_closure(kind: type) -> None:
    parameter = make_parameter(3, 2)
    optimizer = kind([parameter], lr=torch.tensor(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_step_on_a_plain_parameter_bumps_its_version() -> None:
    parameter = make_parameter(3, 2)
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3, 2)
    RowAdam([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


INVALID_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, softdb.ArgumentError, "lr: expected a finite number of at least 0, got -0.1"),
    ({"lr": math.nan}, softdb.ArgumentError, "lr: expected"),
    ({"lr": "fast"}, softdb.DtypeError, "lr: expected a number, got str 'fast'"),
    ({"eps": -1e-8}, softdb.ArgumentError, "eps: expected"),
    ({"weight_decay": -1}, softdb.ArgumentError, "weight_decay: expected"),
    ({"weight_decay": math.inf}, softdb.ArgumentError, "weight_decay: expected"),
]


@pytest.mark.parametrize(("options", "error", "message"), INVALID_OPTIONS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_invalid_options_raise(kind: type, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind([make_parameter(2, 2)], **options)
    optimizer = kind([make_parameter(2, 2)])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [make_parameter(2, 2)], **options})
    assert len(optimizer.param_groups) == 1


def test_invalid_options_of_one_optimizer_raise() -> None:
    for betas in ((1.0, 0.9), (0.9, -0.1)):
        with pytest.raises(softdb.ArgumentError, match=r"betas\[[01]\]: expected a number in \[0, 1\)"):
            RowAdam([make_parameter(2, 2)], betas=betas)
    with pytest.raises(softdb.DtypeError, match="betas: expected two numbers"):
        RowAdam([make_parameter(2, 2)], betas=0.9)
    with pytest.raises(softdb.ArgumentError, match="initial_accumulator_value"):
        RowAdagrad([make_parameter(2, 2)], initial_accumulator_value=-1.0)
    with pytest.raises(softdb.DtypeError, match="params: expected dense floating-point Parameters"):
        RowAdam([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


# Types of numbers that are accepted as an option. Each holds 0.5 or 1.
NUMBERS: dict[str, Any] = {
    "float": 0.5,
    "int": 1,
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "int64": np.int64(1),
    "array": np.array(0.5),
    "int array": np.array(1),
    "tensor": torch.tensor(0.5),
    "int tensor": torch.tensor(1),
    "tensor of one": torch.tensor([0.5]),
}
NON_NUMBERS: dict[str, Any] = {
    "bool": True,
    "numpy bool": np.bool_(True),
    "bool tensor": torch.tensor(True),
    "string": "0.5",
    "complex": 0.5j,
    "two": torch.tensor([0.5, 0.5]),
    "array of two": np.array([0.5, 0.5]),
    "None": None,
}
NUMBER_OPTIONS = [(RowAdam, name) for name in ("lr", "eps", "weight_decay")]
NUMBER_OPTIONS += [(RowAdagrad, name) for name in ("lr", "eps", "weight_decay", "initial_accumulator_value")]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("kind", "name"), NUMBER_OPTIONS)
def test_options_accept_any_number_type_and_store_floats(kind: type, name: str, number: str) -> None:
    parameter, peer, late = make_parameter(4, 2), make_parameter(4, 2), make_parameter(4, 2)
    given = NUMBERS[number]
    others = {} if name == "lr" else {"lr": 0.1}
    optimizer = kind([parameter], **{name: given}, **others)
    optimizer.add_param_group({"params": [late], name: given})
    plain = kind([peer], **{name: float(given)}, **others)
    for each in (parameter, peer, late):
        each.grad = torch.ones(4, 2)
    optimizer.step()
    plain.step()
    assert torch.equal(parameter, peer)
    assert torch.equal(late, peer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for group in (*optimizer.param_groups, *loaded["param_groups"]):
        kept = group[name]
        if name == "lr" and isinstance(given, Tensor) and given.is_floating_point():
            assert isinstance(kept, Tensor)  # Schedulers write to it in place.
        else:
            assert type(kept) is float
        assert float(kept) == float(given)


@pytest.mark.parametrize("value", NON_NUMBERS)
@pytest.mark.parametrize(("kind", "name"), NUMBER_OPTIONS)
def test_options_that_are_not_numbers_raise(kind: type, name: str, value: str) -> None:
    with pytest.raises(softdb.DtypeError, match=f"{name}: expected a number, got"):
        kind([make_parameter(4, 2)], **{name: NON_NUMBERS[value]})


BETAS: dict[str, Any] = {
    "list": [0.5, 0.75],
    "numpy numbers": (np.float32(0.5), np.float64(0.75)),
    "array": np.array([0.5, 0.75], dtype=np.float32),
    "tensor": torch.tensor([0.5, 0.75]),
    "tensors": (torch.tensor(0.5), torch.tensor(0.75)),
    "arrays": (np.array(0.5), np.array(0.75)),
}


@pytest.mark.parametrize("pair", BETAS)
def test_betas_accept_any_number_type_and_store_floats(pair: str) -> None:
    optimizer = RowAdam([make_parameter(2, 2)], betas=BETAS[pair])
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert [type(beta) for beta in optimizer.param_groups[0]["betas"]] == [float, float]


@pytest.mark.parametrize("betas", [0.9, (0.9,), np.array(0.9), torch.ones(3) / 2, "ab", {0.1, 0.2}, None])
def test_betas_that_are_not_two_numbers_raise(betas: Any) -> None:
    with pytest.raises(softdb.DtypeError, match="betas: expected two numbers, got"):
        RowAdam([make_parameter(2, 2)], betas=betas)


def test_options_changed_between_steps_are_stored_as_floats() -> None:
    parameter = make_parameter(4, 2)
    optimizer = RowAdam([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5**step))
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    schedule.step()
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.25)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.25)


def test_tensor_learning_rate_follows_its_schedule() -> None:
    parameter = make_parameter(4, 2)
    lr = torch.tensor(0.1)
    optimizer = RowAdam([parameter], lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    parameter.grad = torch.ones(4, 2)
    optimizer.step()
    schedule.step()
    before = parameter.detach().clone()
    optimizer.step()
    assert allclose(before - parameter, torch.full((4, 2), 0.05), atol=1e-5)


def test_group_that_is_not_a_dictionary_raises() -> None:
    with pytest.raises(TypeError, match="param_group must be a dict"):
        RowAdam([make_parameter(2, 2)]).add_param_group([make_parameter(2, 2)])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_gradients_and_parameters_of_any_strides(kind: type) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = []
        for contiguous in (True, False):
            torch.manual_seed(0)
            table = make_parameter(5, 8, dtype=dtype).detach()
            table = nn.Parameter(table if contiguous else table.t().contiguous().t())
            optimizer = kind([table], lr=0.01, weight_decay=0.1)
            for step in range(6):
                gradient = torch.randn(5, 8, generator=make_generator(step)).to(dtype)
                rows = torch.tensor([[0, 3]])
                if step % 2:
                    values = gradient[rows[0]] if contiguous else gradient[rows[0]].t().contiguous().t()
                    table.grad = torch.sparse_coo_tensor(rows, values, (5, 8), check_invariants=True)
                else:
                    table.grad = gradient if contiguous else gradient.t().contiguous().t()
                optimizer.step()
                table.grad = None
            results.append(table.detach().contiguous())
        assert allclose(*results, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_invalid_gradients_raise_and_change_nothing(kind: type) -> None:
    first, second = make_parameter(4, 2), make_parameter(4, 2)
    before = first.detach().clone()
    optimizer = kind([first, second])
    first.grad = torch.ones(4, 2)
    second.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(softdb.DtypeError, match="2 sparse dimensions; convert it"):
        optimizer.step()
    second.grad = None
    second.grad = torch.ones(4, 2)
    second.data = torch.ones(5, 2)
    with pytest.raises(softdb.ShapeError, match=r"expected shape \(5, 2\).* got \(4, 2\)"):
        optimizer.step()
    second.data = torch.ones(4, 2)
    optimizer.param_groups[0].update(lr=2.0, weight_decay=0.5)
    with pytest.raises(softdb.ArgumentError, match=r"expected lr \* weight_decay below 1, got 2.0 \* 0.5"):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state[first]


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch_on_dense_gradients(max_norm: float, norm_type: float) -> None:
    own, other = ([make_parameter(9, 2), make_parameter(7), make_parameter(3), make_parameter(4, 2)] for _ in range(2))
    values = torch.randn(4, 2, generator=make_generator(1))
    twice = torch.sparse_coo_tensor(torch.tensor([[5, 1, 5, 2]]), values, (9, 2), check_invariants=True)
    given = [twice, torch.randn(7, generator=make_generator(2)), None, make_row_gradient((4, 2), 0, seed=0)]
    for parameter, peer, gradient in zip(own, other, given, strict=True):
        parameter.grad = gradient
        peer.grad = None if gradient is None else gradient.to_dense().clone()
    total = clip_row_grad_norm_(iter(own), max_norm, norm_type)
    assert allclose(total, torch.nn.utils.clip_grad_norm_(other, max_norm, norm_type))
    for parameter, peer in zip(own, other, strict=True):
        if peer.grad is not None:
            assert allclose(parameter.grad.to_dense(), peer.grad)
    assert own[0].grad.is_coalesced() or own[0].grad.is_cuda


@pytest.mark.parametrize("order", [2.0, "inf"])
def test_clipping_accepts_the_arguments_of_torch(order: Any) -> None:
    names = [list(inspect.signature(each).parameters) for each in (clip_row_grad_norm_, torch.nn.utils.clip_grad_norm_)]
    assert names[0] == names[1]
    own, other = ([make_parameter(4), nn.Parameter(torch.zeros(3, dtype=torch.complex64))] for _ in range(2))
    for parameters in (own, other):
        parameters[0].grad, parameters[1].grad = torch.arange(4.0), torch.full((3,), 3 + 4j)
    total = clip_row_grad_norm_(own, 1.0, order, False, True)
    assert allclose(total, torch.nn.utils.clip_grad_norm_(other, 1.0, order, False, False))
    for parameter, peer in zip(own, other, strict=True):
        assert allclose(parameter.grad, peer.grad)
    with pytest.raises(softdb.DtypeError, match="foreach: expected True or False"):
        clip_row_grad_norm_(own, 1.0, foreach="yes")  # type: ignore[arg-type]


def test_clipping_of_empty_and_nonfinite_gradients() -> None:
    parameter = make_parameter(3, 2)
    assert float(clip_row_grad_norm_(parameter, 1.0)) == 0.0
    parameter.grad = make_row_gradient((3, 2), 0, seed=0)
    assert float(clip_row_grad_norm_(parameter, 1.0)) == 0.0
    parameter.grad = torch.full((3, 2), math.inf)
    with pytest.raises(softdb.NonFiniteError, match="finite norm, got inf"):
        clip_row_grad_norm_(parameter, 1.0, error_if_nonfinite=True)
    assert bool((parameter.grad == math.inf).all())
    assert float(clip_row_grad_norm_(parameter, 1.0)) == math.inf


def test_clipping_with_invalid_arguments_raises() -> None:
    parameter = make_parameter(3, 2)
    with pytest.raises(softdb.ArgumentError, match="max_norm"):
        clip_row_grad_norm_(parameter, -1.0)
    with pytest.raises(softdb.ArgumentError, match="norm_type: expected a number above 0"):
        clip_row_grad_norm_(parameter, 1.0, 0)
    parameter.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(softdb.DtypeError, match="sparse dimensions"):
        clip_row_grad_norm_(parameter, 1.0)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["max_norm", "norm_type"])
def test_clipping_accepts_any_number_type(name: str, number: str) -> None:
    parameters = [make_parameter(3, 2), make_parameter(3, 2)]
    norms = []
    for parameter, given in zip(parameters, (NUMBERS[number], float(NUMBERS[number])), strict=True):
        parameter.grad = torch.ones(3, 2)
        norms.append(clip_row_grad_norm_(parameter, **{"max_norm": 0.1, name: given}))
    assert torch.equal(*norms)
    assert torch.equal(parameters[0].grad, parameters[1].grad)


@pytest.mark.parametrize("value", NON_NUMBERS)
@pytest.mark.parametrize("name", ["max_norm", "norm_type"])
def test_clipping_by_a_non_number_raises(name: str, value: str) -> None:
    parameter = make_parameter(3, 2)
    parameter.grad = torch.ones(3, 2)
    with pytest.raises(softdb.DtypeError, match=f"{name}: expected a number, got"):
        clip_row_grad_norm_(parameter, **{"max_norm": 0.1, name: NON_NUMBERS[value]})
    assert torch.equal(parameter.grad, torch.ones(3, 2))


@pytest.mark.parametrize("order", [math.inf, np.float32("inf"), np.array(math.inf), torch.tensor(math.inf)])
def test_infinite_norm_accepts_any_number_type(order: Any) -> None:
    parameter = make_parameter(3, 2)
    parameter.grad = torch.tensor([[1.0, -3.0], [0.0, 2.0], [0.0, 0.0]])
    assert float(clip_row_grad_norm_(parameter, 1.0, order)) == 3.0


@pytest.mark.parametrize("order", [math.nan, -1.0, -math.inf, torch.tensor(math.nan)])
def test_invalid_norm_types_raise(order: Any) -> None:
    parameter = make_parameter(3, 2)
    parameter.grad = torch.ones(3, 2)
    with pytest.raises(softdb.ArgumentError, match="norm_type: expected a"):
        clip_row_grad_norm_(parameter, 1.0, order)
