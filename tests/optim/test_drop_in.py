"""`RowAdam` and `RowAdagrad` in the place of optimizers of torch, and optimizers of torch that refuse rows."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from support.tolerances import allclose, assert_close
from torch import Tensor, nn

from softdb import ArgumentError, DtypeError, SoftKVStore
from softdb.layers import MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdagrad, RowAdam, other_parameters, row_parameters

OPTIMIZERS = [RowAdam, RowAdagrad]
# torch.optim.Adagrad emits this warning.
pytestmark = [
    pytest.mark.each_device,
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    memory = MemoryLayer(6, 20, heads=2, key_dim=4, mode="topk", k=3, **options)
    return nn.Sequential(nn.Linear(6, 6), memory, ProductKeyMemory(6, 16, heads=1, k=2, key_dim=4, **options))


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    model(normal(5, 6, seed=seed)).square().sum().backward()


# -- the arguments of AdamW ----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_dense_gradients_equal_adamw_with_its_options(amsgrad: bool, maximize: bool, eps: float) -> None:
    parameters = [nn.Parameter(normal(30, 4).double()) for _ in "ab"]
    options: dict[str, Any] = {"eps": eps, "weight_decay": 0.1, "amsgrad": amsgrad, "maximize": maximize}
    rates = [torch.tensor(0.05, dtype=torch.float64) for _ in "ab"]
    kinds = (RowAdam, torch.optim.AdamW)
    optimizers = [kind([p], lr=lr, **options) for kind, p, lr in zip(kinds, parameters, rates, strict=True)]
    for step in range(12):
        for parameter, optimizer, rate in zip(parameters, optimizers, rates, strict=True):
            # Gradients of the size of eps show where it is added, a larger one the maximum of amsgrad.
            parameter.grad = normal(30, 4, seed=step).double() * eps * (100.0 if step == 2 else 1.0)
            optimizer.step()
            rate.mul_(0.9)  # as a schedule does
    assert_close(*parameters, rtol=0, atol=1e-10)


def test_one_optimizer_trains_a_model_as_adamw_and_sparse_adam_do() -> None:
    """Dense Parameters are updated as by AdamW and row-sparse ones as by SparseAdam."""
    models = [nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    rows, others = row_parameters(models[0]), other_parameters(models[0])
    own = RowAdam([{"params": rows, "lr": 0.1}, {"params": others, "weight_decay": 0.1}], lr=torch.tensor(0.01))
    peers = [
        torch.optim.SparseAdam(models[1][0].parameters(), lr=0.1),
        torch.optim.AdamW(models[1][1].parameters(), lr=torch.tensor(0.01), weight_decay=0.1),
    ]
    for step in range(10):
        ids = torch.randint(9, (3,), generator=torch.Generator().manual_seed(step))
        for model, optimizers in zip(models, ([own], peers), strict=True):
            model.zero_grad()
            (1e-6 * model(ids).square().sum()).backward()
            for optimizer in optimizers:
                optimizer.step()
    for parameter, peer in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(parameter, peer, rtol=0, atol=2e-6)


def test_row_sparse_gradients_with_amsgrad_and_maximize_equal_the_equation() -> None:
    parameter = nn.Parameter(normal(10, 3).double())
    optimizer = RowAdam([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-6, amsgrad=True, maximize=True)
    p, m, v, largest = (parameter.detach().clone(), *(torch.zeros(10, 3).double() for _ in "mvl"))
    for step in range(1, 9):
        rows, gradient = torch.tensor([step % 4, 4 + step % 3]), normal(2, 3, seed=step).double()
        parameter.grad = torch.sparse_coo_tensor(rows[None], gradient, (10, 3), check_invariants=True)
        optimizer.step()
        for row, g in zip(rows.tolist(), -gradient, strict=True):
            m[row] = 0.8 * m[row] + 0.2 * g
            v[row] = 0.9 * v[row] + 0.1 * g**2
            largest[row] = torch.maximum(largest[row], v[row])
            size = 0.1 * (1 - 0.9**step) ** 0.5 / (1 - 0.8**step)
            p[row] -= size * m[row] / (largest[row].sqrt() + 1e-6)
    assert_close(parameter.detach(), p, rtol=0, atol=1e-12)


def test_the_state_of_amsgrad_follows_new_rows_and_a_change_of_the_option() -> None:
    store = SoftKVStore(4, 3, trainable=True, sparse_grad=True)
    store.add(normal(6, 4), normal(6, 3, seed=1))
    optimizer = RowAdam(store.parameters(), lr=0.1, amsgrad=True)

    def step() -> None:
        optimizer.zero_grad()
        store.read(normal(2, 4, seed=2), "topk", k=6).values.square().sum().backward()
        optimizer.step()

    step()
    largest = optimizer.state[store.values]["max_exp_avg_sq"]
    assert (largest > 0).all()
    store.delete([0])
    store.add(normal(1, 4, seed=3), torch.zeros(1, 3))  # reuses the slot
    for rows in (store.keys, store.values):
        rows.grad = torch.sparse_coo_tensor([[0]], torch.zeros_like(rows[:1]), rows.shape, check_invariants=True)
    optimizer.step()
    assert (optimizer.state[store.values]["max_exp_avg_sq"][0] == 0).all()
    optimizer.param_groups[0]["amsgrad"] = False
    step()
    assert "max_exp_avg_sq" not in optimizer.state[store.values]
    optimizer.param_groups[0]["amsgrad"] = True
    step()
    assert (optimizer.state[store.values]["max_exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_run_resumes_with_amsgrad(amsgrad: bool) -> None:
    whole, resumed = make_model(sparse_grad=True), make_model(sparse_grad=True)
    optimizers = [RowAdam(model.parameters(), lr=0.05, amsgrad=amsgrad) for model in (whole, resumed)]
    for step in range(2):
        for model, optimizer in zip((whole, resumed), optimizers, strict=True):
            backward(model, step)
            optimizer.step()
    other = RowAdam(resumed.parameters())
    other.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert other.param_groups[0]["amsgrad"] is amsgrad
    for model, optimizer in ((whole, optimizers[0]), (resumed, other)):
        backward(model, 9)
        optimizer.step()
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_adamw_with_amsgrad_and_one_without_the_new_options_load() -> None:
    parameter = nn.Parameter(normal(5, 2))
    torchs = torch.optim.AdamW([parameter], lr=0.1, amsgrad=True)
    parameter.grad = normal(5, 2, seed=1)
    torchs.step()
    own = RowAdam([parameter])
    own.load_state_dict(torchs.state_dict())
    assert torch.equal(own.state[parameter]["max_exp_avg_sq"], torchs.state[parameter]["max_exp_avg_sq"])
    state = own.state_dict()
    for name in ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"):
        del state["param_groups"][0][name]
    del state["state"][0]["max_exp_avg_sq"]
    own = RowAdam([parameter])
    own.load_state_dict(state)
    own.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_options_that_choose_an_implementation_change_nothing(kind: Any) -> None:
    results = []
    for options in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        parameter = nn.Parameter(normal(6, 2))
        optimizer = kind([parameter], lr=0.1, **options)
        parameter.grad = normal(6, 2, seed=1)
        optimizer.step()
        results.append(parameter.detach())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_options_that_cannot_be_met_are_errors(kind: Any) -> None:
    parameter = nn.Parameter(normal(2, 2))
    with pytest.raises(ArgumentError, match="differentiable: expected False, since autograd"):
        kind([parameter], differentiable=True)
    with pytest.raises(ArgumentError, match="fused: expected at most one of foreach and fused"):
        kind([parameter], foreach=True, fused=True)
    optimizer = kind([parameter])
    with pytest.raises(ArgumentError, match="capturable: expected False"):
        optimizer.add_param_group({"params": [nn.Parameter(normal(2, 2))], "capturable": True})
    assert len(optimizer.param_groups) == 1


OPTION_NAMES = [(RowAdam, "amsgrad"), (RowAdam, "capturable")]
OPTION_NAMES += [(kind, name) for kind in OPTIMIZERS for name in ("maximize", "foreach", "fused", "differentiable")]


@pytest.mark.parametrize(("kind", "name"), OPTION_NAMES)
def test_options_that_are_not_true_or_false_are_errors(kind: Any, name: str) -> None:
    for value in (1, "no", torch.tensor(True)):
        with pytest.raises(DtypeError, match=f"{name}: expected True or False, got"):
            kind([nn.Parameter(normal(2, 2))], **{name: value})
    kind([nn.Parameter(normal(2, 2))], **{name: np.bool_(False)})


@pytest.mark.parametrize(
    ("kind", "peer", "different"),
    [(RowAdam, torch.optim.AdamW, ["weight_decay"]), (RowAdagrad, torch.optim.Adagrad, ["lr_decay"])],
)
def test_row_optimizers_have_the_arguments_and_defaults_of_torch(kind: Any, peer: Any, different: list[str]) -> None:
    own, other = (inspect.signature(each).parameters for each in (kind, peer))
    for name, parameter in other.items():
        if name not in different:
            assert own[name].default == parameter.default
    if kind is RowAdam:
        assert list(own)[:6] == list(other)[:6]  # the positional arguments


def test_a_state_of_adamw_that_a_row_optimizer_cannot_continue_is_an_error() -> None:
    parameter = nn.Parameter(normal(2, 2))
    state = torch.optim.AdamW([parameter], lr=0.2, capturable=True).state_dict()
    optimizer = RowAdam([parameter], lr=0.1)
    with pytest.raises(ArgumentError, match="capturable: expected False, since the step"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_state_of_a_parameter_without_dimensions_is_exchanged_with_adamw(amsgrad: bool) -> None:
    parameters = [nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2)]
    optimizers: list[Any] = [
        kind([parameter], lr=0.1, weight_decay=0.2, amsgrad=amsgrad)
        for kind, parameter in zip((RowAdam, torch.optim.AdamW), parameters, strict=True)
    ]
    for exchange in (False, True, False):
        if exchange:
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
        for gradient in (2.0, -1.0, 0.5):
            for optimizer, parameter in zip(optimizers, parameters, strict=True):
                parameter.grad = torch.tensor(gradient, dtype=torch.float64)
                optimizer.step()
    assert allclose(*parameters, rtol=1e-12)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_with_one_entry_for_a_parameter_without_dimensions_loads(kind: Any) -> None:
    parameter = nn.Parameter(torch.tensor(1.5))
    optimizer, other = kind([parameter], lr=0.1), kind([parameter], lr=0.1)
    parameter.grad = torch.tensor(2.0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for name, value in state["state"][0].items():
        if isinstance(value, Tensor):
            state["state"][0][name] = value.view(1)
    other.load_state_dict(state)
    assert str(other.state) == str(optimizer.state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_named_parameters_keep_their_names(kind: Any) -> None:
    model = make_model()
    optimizer = kind(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    optimizer = kind([{"params": list(model.named_parameters()), "lr": 0.1}])
    backward(model)
    optimizer.step()
    other = kind(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.1


# -- row_parameters ------------------------------------------------------------------------------------------


def test_parameters_of_anything_but_a_module_are_an_error() -> None:
    for function in (row_parameters, other_parameters):
        with pytest.raises(DtypeError, match="model: expected a module, got a list"):
            function([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_row_parameters_are_found_after_they_were_replaced() -> None:
    model = nn.ModuleList([MemoryLayer(6, 10, key_dim=4, device="meta"), ProductKeyMemory(6, 16, k=2, key_dim=4)])
    model = model.to_empty(device=torch.get_default_device())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    own = [model[0].store.keys, model[0].store.values, model[1].store.weight]
    assert [id(parameter) for parameter in row_parameters(model)] == [id(parameter) for parameter in own]


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_parameters_are_rows_or_others_each_once(sparse_grad: bool) -> None:
    shared = MemoryLayer(6, 10, key_dim=4, sparse_grad=sparse_grad)
    products = ProductKeyMemory(6, 16, k=2, key_dim=4, sparse_grad=sparse_grad)
    embedding, plain = nn.EmbeddingBag(4, 3, sparse=True, mode="sum"), nn.Embedding(4, 3)
    layers = [shared, MemoryLayer(6, 10, key_dim=4, store=shared.store), products, embedding, plain, nn.Linear(2, 2)]
    model = copy.deepcopy(nn.ModuleList([*layers, SoftKVStore(2, 2)]))
    rows, others = list(row_parameters(model)), list(other_parameters(model))
    own = [model[0].store.keys, model[0].store.values, model[2].store.weight, model[3].weight]
    assert {id(parameter) for parameter in rows} == {id(parameter) for parameter in own}
    assert len(rows) == 4
    assert len(rows) + len(others) == len(list(model.parameters()))
    assert not {id(parameter) for parameter in rows} & {id(parameter) for parameter in others}
    RowAdam([{"params": row_parameters(model)}, {"params": other_parameters(model), "weight_decay": 0.1}])


# -- optimizers that refuse rows -----------------------------------------------------------------------------

REFUSING: dict[str, Any] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
    "SGD with weight_decay or fused=True": lambda parameters: torch.optim.SGD(parameters, weight_decay=0.1),
    "Adagrad with weight_decay or fused=True": lambda parameters: torch.optim.Adagrad(parameters, weight_decay=0.1),
}


@pytest.mark.parametrize("layer", [0, 1], ids=["store", "product keys"])
@pytest.mark.parametrize("name", list(REFUSING))
def test_an_optimizer_that_refuses_row_sparse_gradients_names_the_remedy(name: str, layer: int) -> None:
    model = make_model(sparse_grad=True)
    backward(model)
    rows = list(row_parameters(model[1 + layer]))
    before = copy.deepcopy(model.state_dict())
    optimizer = REFUSING[name]([*model[0].parameters(), *rows])
    expected = name.removeprefix("fused ")
    with pytest.raises(ArgumentError, match=rf"got {expected}; use softdb.optim.RowAdam, or .* sparse_grad=False"):
        optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is not None for parameter in rows)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam, *OPTIMIZERS])
def test_optimizers_that_accept_row_sparse_gradients_train(kind: Any) -> None:
    model = make_model(sparse_grad=True)
    backward(model)
    before = [rows.detach().clone() for rows in row_parameters(model)]
    kind(row_parameters(model), lr=0.1).step()
    assert all((rows != old).any() for rows, old in zip(row_parameters(model), before, strict=True))


def test_sparse_adam_with_dense_gradients_of_rows_names_the_remedy() -> None:
    model = make_model()
    backward(model)
    with pytest.raises(ArgumentError, match=r"got SparseAdam; use softdb\.optim\.RowAdam"):
        torch.optim.SparseAdam(list(row_parameters(model))).step()


def test_an_optimizer_of_another_package_is_left_alone() -> None:
    class Other(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})
            self.steps = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.steps += 1

    model = make_model(sparse_grad=True)
    backward(model)
    optimizer = Other(model.parameters())
    optimizer.step()
    assert optimizer.steps == 1
