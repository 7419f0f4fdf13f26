"""Test the errors for optimizers of torch that refuse the gradients of rows, compared with torch's own behavior."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softdb import ArgumentError, SoftKVStore
from softdb.layers import ProductKeyMemory

# torch.optim.Adagrad emits this warning.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

KINDS = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"fused": True},
    {"foreach": True},
    {"maximize": True},
    {"momentum": 0.9, "nesterov": True},
]


def make_store(**options: Any) -> SoftKVStore:
    store = SoftKVStore(2, 2, trainable=True, **options)
    store.add(torch.eye(2), torch.ones(2, 2))
    return store


def compute_gradient(tables: list[nn.Parameter], sparse: bool) -> Tensor:
    for table in tables:
        table.grad = torch.ones_like(table)
        if sparse:
            table.grad = table.grad.to_sparse(1)
    return torch.tensor(1.0)


def option_sets(kind: Any) -> Iterator[dict[str, Any]]:
    known = inspect.signature(kind).parameters
    return (options for options in OPTIONS if options.keys() <= known.keys())


def is_accepted(rows: nn.Parameter, optimizer: Any, sparse: bool, with_closure: bool, error: type[Exception]) -> bool:
    """Return whether a step succeeds; if not, check that it changed nothing."""
    try:
        if with_closure:
            optimizer.step(lambda: compute_gradient([rows], sparse))
        else:
            compute_gradient([rows], sparse)
            optimizer.step()
    except error:
        assert torch.equal(rows, torch.ones(2, 2))
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_of_torch_are_refused_if_their_step_fails(kind: Any) -> None:
    for options in option_sets(kind):
        for sparse in (True, False):
            for with_closure in (True, False) if kind is not torch.optim.LBFGS else (True,):
                store, plain = make_store(), nn.Parameter(torch.ones(2, 2))
                accepted = []
                for rows, error in ((plain, RuntimeError), (store.values, ArgumentError)):
                    optimizer = kind([rows], **options)
                    accepted.append(is_accepted(rows, optimizer, sparse, with_closure, error))
                assert accepted[0] == accepted[1], (options, sparse, with_closure)


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_of_a_closure_are_checked_after_it(by_name: bool) -> None:
    store = make_store(sparse_grad=True)
    optimizer = torch.optim.AdamW(store.parameters(), lr=0.1)

    def step(mode: Any, **options: Any) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = store.read(torch.ones(1, 2), mode, **options).values.square().sum()
            loss.backward()
            return loss.detach()

        return optimizer.step(closure=closure) if by_name else optimizer.step(closure)

    with pytest.raises(ArgumentError, match=r"got AdamW; use softdb\.optim\.RowAdam, or .* sparse_grad=False"):
        step("topk", k=1)
    assert torch.equal(store.values, torch.ones(2, 2))
    assert store.values.grad.layout == torch.sparse_coo
    # The gradients of the last step do not matter, since the closure computes new ones.
    assert float(step("exact")) == pytest.approx(2.0)
    assert bool((store.values != 1).all())


def test_sparse_adam_over_a_model_with_dense_parameters_names_the_remedy() -> None:
    store, linear = make_store(), nn.Linear(2, 2)
    optimizer = torch.optim.SparseAdam([*linear.parameters(), *store.parameters()])
    before = [parameter.detach().clone() for parameter in linear.parameters()]
    compute_gradient([store.keys, store.values], sparse=True)
    compute_gradient(list(linear.parameters()), sparse=False)
    with pytest.raises(ArgumentError, match=r"accepts dense gradients, got SparseAdam; use softdb\.optim\.RowAdam"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(linear.parameters(), before, strict=True))
    assert not optimizer.state


def test_models_without_rows_keep_the_error_of_torch() -> None:
    make_store()  # registers the hooks
    embedding, linear = nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2)
    for parameters, kind, sparse in ((embedding, torch.optim.AdamW, True), (linear, torch.optim.SparseAdam, False)):
        tables = list(parameters.parameters())
        optimizer = kind(tables)
        compute_gradient(tables, sparse)
        with pytest.raises(RuntimeError, match="does not support"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="does not support"):
            optimizer.step(lambda tables=tables, sparse=sparse: compute_gradient(tables, sparse))


def test_a_hook_may_convert_gradients_to_dense_ones() -> None:
    store = make_store()
    optimizer = torch.optim.AdamW([store.values], lr=0.1)

    def convert(*_: Any) -> None:
        store.values.grad = store.values.grad.to_dense()

    optimizer.register_step_pre_hook(convert)
    compute_gradient([store.values], sparse=True)
    optimizer.step()
    assert bool((store.values != 1).all())


def test_a_subclass_of_an_optimizer_of_torch_is_not_checked() -> None:
    class Own(torch.optim.AdamW):
        pass

    store = make_store()
    compute_gradient([store.values], sparse=True)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        Own([store.values]).step()


@pytest.mark.parametrize("change", ["to_empty", "assign", "swap"])
def test_values_of_a_layer_are_checked_after_their_parameter_was_replaced(change: str) -> None:
    layer = ProductKeyMemory(4, 4, heads=1, k=2, key_dim=4, sparse_grad=True)
    first = layer.store.weight
    if change == "to_empty":
        layer = ProductKeyMemory(4, 4, heads=1, k=2, key_dim=4, sparse_grad=True, device="meta").to_empty(device="cpu")
    elif change == "assign":
        layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)
    else:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            layer = layer.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    values = layer.store.weight
    assert change == "swap" or values is not first
    compute_gradient([values], sparse=True)
    with pytest.raises(ArgumentError, match=r"got Adam; use softdb\.optim\.RowAdam"):
        torch.optim.Adam([values]).step()
