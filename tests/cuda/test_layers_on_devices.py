"""Layers on each device, compared with the same layers in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softdb.layers import ContextMemory, MemoryLayer, ProductKeyMemory

# Relative to the largest number that is compared: float32 on the device, float64 on the CPU.
TOLERANCE = 1e-4
DIM, SEQUENCES, TOKENS = 16, 3, 40
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "exact": lambda: MemoryLayer(DIM, 300, heads=2, key_dim=8),
    "topk": lambda: MemoryLayer(
        DIM, 300, heads=2, key_dim=8, mode="topk", k=8, sparse_grad=True, temperature="learnable"
    ),
    "own stores": lambda: MemoryLayer(DIM, 100, heads=2, key_dim=8, shared=False, mode="topk", k=8, gate=True),
    "product keys": lambda: ProductKeyMemory(DIM, 32 * 32, heads=2, key_dim=8, k=8, value_dim=12, sparse_grad=True),
    "context": lambda: ContextMemory(DIM, rows=64, heads=2, key_dim=8, value_dim=12, temperature="learnable"),
    "context, k": lambda: ContextMemory(DIM, rows=64, heads=2, key_dim=8, k=8),
}


def make_input(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(SEQUENCES, tokens, DIM, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def check(found: Tensor | None, wanted: Tensor | None) -> None:
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    found, wanted = dense(found.detach()).cpu().double(), dense(wanted.detach())
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=0.1)  # a gradient may be 0
    assert error <= TOLERANCE, f"expected an error of at most {TOLERANCE}, got {float(error):.3g}"


def make_pair(name: str, device: torch.device) -> tuple[Any, Any]:
    """Make a layer in float64 on the CPU, and its copy in float32 on the device."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    return copy.deepcopy(layer).to("cpu", torch.float64), layer.to(device)


def run_both(reference: Any, layer: Any, seed: int, device: torch.device, **options: Any) -> None:
    """Run forward and backward of both layers on equal inputs, and compare outputs and gradients."""
    x = make_input(seed)
    inputs = x.double().requires_grad_(), x.to(device).requires_grad_()
    outputs = []
    for one, own in zip((reference, layer), inputs, strict=True):
        one.zero_grad()
        here = {name: value.to(own.device) for name, value in options.items()}
        y = one(own, **here)
        (y * make_input(100 + seed).to(own)).sum().backward()
        outputs.append(y)
    assert outputs[1].device.type == device.type
    check(outputs[1], outputs[0])
    check(inputs[1].grad, inputs[0].grad)
    for one, other in zip(layer.parameters(), reference.parameters(), strict=True):
        check(one.grad, other.grad)


@pytest.mark.parametrize("name", ["exact", "topk", "own stores"])
def test_memory_layers_equal_those_in_float64(name: str, device: torch.device) -> None:
    run_both(*make_pair(name, device), 1, device)


def test_product_key_memories_equal_those_in_float64(device: torch.device) -> None:
    run_both(*make_pair("product keys", device), 1, device)


@pytest.mark.parametrize("name", ["context", "context, k"])
def test_context_memories_equal_those_in_float64_over_several_segments(name: str, device: torch.device) -> None:
    reference, layer = make_pair(name, device)
    documents = torch.tensor([[0] * 30 + [1] * 10, [0] * 40, [2] * 35 + [-1] * 5], device="cpu")
    run_both(reference, layer, 1, device)
    run_both(reference, layer, 2, device, documents=documents)
    run_both(reference, layer, 3, device, documents=documents)
    for one in (reference, layer):
        one.crop(-7)
        one.reorder([2, 0, 0])
    run_both(reference, layer, 4, device)
    for one in (reference, layer):
        one.reset(torch.tensor([1], device=device if one is layer else "cpu"))
    run_both(reference, layer, 5, device)
    assert layer.length == reference.length


@pytest.mark.parametrize("name", ["context", "context, k"])
def test_the_past_moves_with_the_layer_and_its_state(name: str, device: torch.device) -> None:
    reference, layer = make_pair(name, torch.device("cpu"))
    for one in (reference, layer):
        one(make_input(1).to(next(one.parameters())))
        one(make_input(2).to(next(one.parameters())))
    state = copy.deepcopy(layer.state_dict())
    layer.to(device)
    loaded = LAYERS[name]().to(device)
    loaded.load_state_dict(state)
    wanted = reference(make_input(3).double())
    for one in (layer, loaded):
        check(one(make_input(3).to(device)), wanted)
    back = LAYERS[name]()
    back.load_state_dict(loaded.state_dict())
    check(back(make_input(4)), reference(make_input(4).double()))


def test_a_layer_works_after_it_was_made_on_the_device_or_moved_there_from_meta(device: torch.device) -> None:
    for name in ("exact", "topk", "product keys"):
        torch.manual_seed(0)
        layer = LAYERS[name]()
        with torch.device("meta"):
            other = LAYERS[name]()
        other.to_empty(device=device)
        other.load_state_dict(layer.state_dict())
        x = make_input(1)
        torch.testing.assert_close(other(x.to(device)).cpu(), layer(x), atol=1e-4, rtol=1e-4)
    with torch.device(device):
        made = MemoryLayer(DIM, 50, mode="topk", k=4)
    assert {parameter.device.type for parameter in made.parameters()} == {device.type}
    assert made(make_input(1).to(device)).isfinite().all()


def test_usage_is_counted_on_the_device(device: torch.device) -> None:
    for name in ("topk", "product keys"):
        reference, layer = make_pair(name, device)
        for one in (reference, layer):
            one.track_usage_()
            with torch.no_grad():
                one(make_input(1).to(next(one.parameters())))
        assert layer.usage.reads.device.type == device.type
        assert torch.equal(layer.usage.reads.cpu(), reference.usage.reads)
        check(layer.usage.weight, reference.usage.weight)
