"""Test `softdb.functional.class_weights` against sums over one-hot vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tolerances import allclose
from torch import Tensor
from torch.nn.functional import one_hot

from softdb import ArgumentError, DeviceError, DtypeError, ShapeError, SoftKVStore
from softdb.functional import class_weights

pytestmark = pytest.mark.each_device


def expected(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    labels, weights = torch.broadcast_tensors(labels.long(), weights)
    return (one_hot(labels + 1, classes + 1)[..., 1:] * weights.double().unsqueeze(-1)).sum(-2)


def problem(*shape: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, shape, generator=generator)
    return labels, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (3, 0), (0, 7), (3, 1)])
def test_weights_are_summed_by_label(shape: tuple[int, ...]) -> None:
    labels, weights = problem(*shape)
    found = class_weights(labels, weights, 4)
    assert found.dtype == torch.float64
    assert allclose(found, expected(labels, weights, 4), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shapes", [((7,), (3, 7)), ((3, 7), (7,)), ((2, 1, 7), (3, 7)), ((3, 1), (3, 7))])
def test_labels_and_weights_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    labels, weights = problem(*shapes[0])[0], problem(*shapes[1])[1].requires_grad_()
    found = class_weights(labels, weights, 4)
    assert allclose(found, expected(labels, weights, 4))
    given = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, weights, given)
    (wanted,) = torch.autograd.grad(expected(labels, weights, 4), weights, given)
    assert allclose(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32])
def test_sums_are_in_at_least_float32(dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    labels, weights = problem(5, 4000)
    labels, weights = labels.clamp(min=0).to(label_dtype), weights.abs().to(dtype)
    found = class_weights(labels, weights, 4)
    assert found.dtype == torch.float32
    assert allclose(found.double(), expected(labels, weights, 4), rtol=1e-5)


# torch itself scripts decompositions for forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradcheck() -> None:
    labels, weights = problem(3, 5)
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: class_weights(labels, w, 4), weights, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: class_weights(labels, w.square(), 4), weights)


def test_a_weight_without_a_class_may_be_nan_and_has_no_gradient() -> None:
    weights = torch.tensor([0.5, torch.nan, 0.25], requires_grad=True)
    found = class_weights(torch.tensor([1, -1, 1]), weights, 2)
    assert found.tolist() == [0.0, 0.75]
    found.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [1.0, 0.0, 1.0]


# torch itself scripts decompositions for forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_of_torch_func() -> None:
    labels, weights = problem(3, 5)
    wanted = expected(labels, weights, 4)
    assert allclose(torch.vmap(lambda la, w: class_weights(la, w, 4))(labels, weights), wanted)
    assert allclose(torch.vmap(lambda w: class_weights(labels[0], w, 4))(weights)[0], wanted[0])
    shared = torch.vmap(lambda la: class_weights(la, weights[0], 4))(labels)
    assert allclose(shared, expected(labels, weights[0], 4))
    jacobian = torch.func.jacrev(lambda w: class_weights(labels[0], w, 4))(weights[0])
    assert torch.equal(jacobian, torch.func.jacfwd(lambda w: class_weights(labels[0], w, 4))(weights[0]))
    assert torch.equal(jacobian.mT, one_hot(labels[0] + 1, 5)[:, 1:].double())
    with pytest.raises(ArgumentError, match=r"labels: expected integers from -1 to 3, .* got 4"):
        torch.vmap(lambda la, w: class_weights(la, w, 4))(labels.clone().fill_(4), weights)


@pytest.mark.slow
# Dynamo looks at the gradient of each tensor that enters a graph after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_classifier_equals_the_eager_one() -> None:
    store = SoftKVStore.from_tensors(torch.randn(9, 3), torch.zeros(9, 0), fields={"label": torch.arange(9) % 3})

    def classify(query: Tensor) -> Tensor:
        read = store.read(query, "topk", k=4)
        return class_weights(store.fields_at(read.ids, "label"), read.weights, 3)  # type: ignore[arg-type]

    query = torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(classify, backend="aot_eager")(query)
    assert allclose(compiled, classify(query))
    (gradient,) = torch.autograd.grad(compiled[:, 1].sum(), query)
    (wanted,) = torch.autograd.grad(classify(query)[:, 1].sum(), query)
    assert allclose(gradient, wanted, atol=1e-6)


@pytest.mark.slow
def test_one_compiled_graph_gives_the_same_values_gradients_and_errors() -> None:
    labels, weights = problem(3, 5)
    weights.requires_grad_()
    compiled = torch.compile(class_weights, fullgraph=True, backend="aot_eager")
    found = compiled(labels, weights, 4)
    assert torch.equal(found, class_weights(labels, weights, 4))
    (gradient,) = torch.autograd.grad(found.square().sum(), weights)
    (wanted,) = torch.autograd.grad(class_weights(labels, weights, 4).square().sum(), weights)
    assert torch.equal(gradient, wanted)
    with pytest.raises(RuntimeError, match="labels: expected integers from -1 to 3"):
        compiled(labels.clone().fill_(4), weights, 4)
    mapped = torch.compile(torch.vmap(lambda la, w: class_weights(la, w, 4)), fullgraph=True, backend="aot_eager")
    assert torch.equal(mapped(labels, weights.detach()), found)


def test_no_tensor_of_rows_by_classes_is_allocated() -> None:
    labels, weights = problem(2, 1000, classes=5000)
    with torch.profiler.profile(profile_memory=True) as profile:
        class_weights(labels, weights.requires_grad_(), 5000).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * 5000 * 8


def test_a_read_classifies_by_the_labels_of_its_rows() -> None:
    store = SoftKVStore(3, 1, fields=("label",), trainable=True, dtype=torch.float64)
    keys, labels = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 3
    store.add(keys, torch.zeros(9, 1, dtype=torch.float64), fields={"label": labels})
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    read = store.read(query, k=12)
    assert read.ids is not None
    assert read.weights is not None
    found = class_weights(store.fields_at(read.ids, "label"), read.weights, 3)
    wanted = (query @ keys.T / 3**0.5).softmax(-1) @ one_hot(labels, 3).double()
    assert allclose(found, wanted)
    found[:, 1].log().sum().backward()
    assert allclose(query.grad, torch.autograd.grad(wanted[:, 1].log().sum(), query)[0])  # type: ignore[arg-type]


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([0, 4])}, ArgumentError, "labels: expected integers from -1 to 3, .* got 4"),
        ({"labels": torch.tensor([0, -2])}, ArgumentError, "labels: expected integers from -1 to 3, .* got -2"),
        (
            {"labels": torch.tensor([0.0, 1.0])},
            DtypeError,
            "labels: expected a tensor of integers, got a torch.float32",
        ),
        ({"labels": [0, 1]}, DtypeError, "labels: expected a tensor of integers, got list"),
        ({"labels": torch.tensor([0, 1, 2])}, ShapeError, r"labels: expected a shape that broadcasts .* \(2,\), got"),
        ({"labels": torch.tensor([0, 1], device="meta")}, DeviceError, "labels: expected a tensor on cpu"),
        ({"weights": torch.tensor([1, 2])}, DtypeError, "weights: expected a floating-point tensor"),
        ({"weights": torch.tensor(1.0)}, ShapeError, "weights: expected shape"),
        ({"num_classes": 0}, ArgumentError, "num_classes: expected an integer of at least 1, got 0"),
        ({"num_classes": 2.0}, DtypeError, "num_classes: expected an integer"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"labels": torch.tensor([0, 1]), "weights": torch.ones(2), "num_classes": 4}
    with pytest.raises(error, match=message):
        class_weights(**(given | change))
