"""Test what generation needs of a `ContextMemory` against attention over plain lists of tokens."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softdb import ArgumentError, DtypeError, StaleReadError
from softdb.layers import ContextMemory, ProductKeyMemory

DIM, ROWS = 8, 12
with_and_without_k = pytest.mark.parametrize("k", [None, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(k: int | None, **options: Any) -> ContextMemory:
    return ContextMemory(DIM, ROWS, heads=2, key_dim=6, value_dim=5, k=k, dtype=torch.float64, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64)


def attend(layer: ContextMemory, past: Tensor, segment: Tensor) -> Tensor:  # (m, dim), (n, dim) -> (n, dim)
    """Compute one sequence, head by head, with all scores at once."""
    queries = layer.queries(segment).squeeze(-2).transpose(0, 1)  # (heads, n, key_dim)
    with torch.no_grad():
        past_keys, past_values = layer.keys(past)[:, 0, 0], layer.values(past)
    keys = torch.cat([past_keys, layer.keys(segment)[:, 0, 0]])
    values = torch.cat([past_values, layer.values(segment)])
    scores = (
        queries
        @ keys.T
        / layer.key_dim**0.5
        / torch.as_tensor(layer.temperature, dtype=torch.float64).reshape(-1, 1, 1)
    )
    own = torch.ones(len(segment), len(segment), dtype=torch.bool).tril().expand(layer.heads, -1, -1)
    seen = torch.ones(layer.heads, len(segment), len(past), dtype=torch.bool)
    if layer.k is not None and len(past) > layer.k:
        seen = torch.zeros_like(seen).scatter_(-1, scores[..., : len(past)].topk(layer.k).indices, True)
    weights = scores.masked_fill(~torch.cat([seen, own], -1), -torch.inf).softmax(-1)
    return F.linear((weights @ values).transpose(0, 1).flatten(-2), layer.output.weight)


class TokenLists:
    """All tokens of each sequence, and the number of the oldest ones that were replaced."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.replaced = 0

    def past(self, sequence: int) -> Tensor:
        if self.tokens is None:
            return draw(0)
        return self.tokens[sequence, self.replaced :]

    def read(self, layer: ContextMemory, x: Tensor) -> Tensor:
        if self.tokens is not None:
            self.replaced = max(self.replaced, self.tokens.shape[1] - ROWS)
        return torch.stack([attend(layer, self.past(sequence), part) for sequence, part in enumerate(x)])

    def write(self, x: Tensor) -> None:
        self.tokens = x if self.tokens is None else torch.cat([self.tokens, x], 1)


def step(name: str, layer: ContextMemory, lists: TokenLists) -> ContextMemory:
    """Change the past of the layer and of the lists in the same way."""
    assert lists.tokens is not None
    batch, length = lists.tokens.shape[:2]
    if name == "reorder":
        indices = torch.randint(batch, (int(torch.randint(1, 4, ())),))
        layer.reorder(indices)
        lists.tokens = lists.tokens[indices]
    elif name == "repeat":
        layer.repeat_interleave(2)
        lists.tokens = lists.tokens.repeat_interleave(2, 0)
    elif name == "crop":
        count = min(length, int(torch.randint(1, 10, ())))
        layer.crop(-count if count % 2 else length - count)
        lists.tokens, lists.replaced = lists.tokens[:, : length - count], min(lists.replaced, length - count)
    elif name == "resume":
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        resumed = make(layer.k)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        layer = resumed.train(layer.training)
    elif name == "copy":
        layer = copy.deepcopy(layer)
    return layer


@with_and_without_k
@pytest.mark.parametrize(("seed", "training"), [(0, True), (1, False), (2, False)])
def test_generation_equals_attention_over_the_kept_tokens(k: int | None, seed: int, training: bool) -> None:
    torch.manual_seed(seed)
    layer, lists = make(k).train(training), TokenLists()
    for _ in range(20):
        batch = 2 if lists.tokens is None else len(lists.tokens)
        x = draw(batch, int(torch.randint(1, 18 if torch.rand(()) < 0.2 else 6, ())))
        pauses = bool(torch.rand(()) < 0.3)
        if pauses:
            with layer.paused():
                y = layer(x)
        else:
            y = layer(x)
        torch.testing.assert_close(y, lists.read(layer, x))
        if not pauses:
            lists.write(x)
        if lists.tokens is not None:
            names = ["reorder", "crop", "none", "resume", "copy"] + ["repeat"] * (batch == 1)
            layer = step(names[int(torch.randint(len(names), ()))], layer, lists)
            assert layer.length == lists.tokens.shape[1]


@pytest.mark.slow
@with_and_without_k
@pytest.mark.parametrize("change", ["reorder", "repeat", "crop"])
def test_backward_after_a_change_gives_the_gradients_of_the_read(k: int | None, change: str) -> None:
    layer, lists = make(k), TokenLists()
    for count in (9, 5, 6, 4):
        x = draw(2 if lists.tokens is None else len(lists.tokens), count).requires_grad_()
        y, wanted = layer(x), lists.read(layer, x)
        lists.write(x.detach())
        inputs, direction = [x, *layer.parameters()], torch.randn_like(y)
        expected = torch.autograd.grad(wanted, inputs, direction)
        if change == "reorder":
            layer.reorder([1, 1])
            lists.tokens = lists.tokens[[1, 1]]
        elif change == "repeat":
            layer.repeat_interleave(2)
            lists.tokens = lists.tokens.repeat_interleave(2, 0)
        else:
            layer.crop(-3)
            lists.tokens = lists.tokens[:, :-3]
        for got, want in zip(torch.autograd.grad(y, inputs, direction), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_rows_of_cropped_tokens_are_not_reused_under_an_open_read() -> None:
    layer = make(None)
    layer(draw(1, 10))
    x = draw(1, 2)
    y = layer(x)
    twin = copy.deepcopy(layer)
    layer.crop(4)  # Drops tokens that the read used.
    for _ in range(2):
        layer(draw(1, 2))
    direction, parameters = torch.randn_like(y), list(layer.parameters())
    got = torch.autograd.grad(y, parameters, direction)
    twin.crop(10)
    for mine, wanted in zip(got, torch.autograd.grad(twin(x), list(twin.parameters()), direction), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_staleness_is_detected_after_changes() -> None:
    layer = make(None)
    layer(draw(2, 10))
    layer.reorder([1, 0])
    late = layer(draw(2, 2))
    for _ in range(3):
        layer(draw(2, 2))
    with pytest.raises(StaleReadError, match="tokens that later segments have overwritten"):
        late.sum().backward()
    topk = make(3)
    topk(draw(2, 10))
    twin, x = copy.deepcopy(topk), draw(2, 2)
    late = topk(x)
    topk.crop(1)  # Stores keep copies of the dropped tokens for the open read.
    got = torch.autograd.grad(late.sum(), list(topk.parameters()))
    for mine, wanted in zip(got, torch.autograd.grad(twin(x).sum(), list(twin.parameters())), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("change", ["reorder", "crop", "reset"])
def test_a_change_does_not_hide_that_tokens_were_overwritten(change: str) -> None:
    layer = make(None)
    layer(draw(2, ROWS))
    y = layer(draw(2, 2))
    with layer.paused():
        layer(draw(2, 2))  # Replaces two tokens that the read used.
    if change == "reorder":
        layer.reorder([1, 0])
    elif change == "crop":
        layer.crop(9)
    else:
        layer.reset()
    with pytest.raises(StaleReadError, match="tokens that later segments have overwritten"):
        y.sum().backward()


@with_and_without_k
@pytest.mark.parametrize("change", ["paused", "crop", "reorder"])
def test_activation_checkpointing_recomputes_unless_the_past_changed(k: int | None, change: str) -> None:
    layer = make(k)
    layer(draw(2, 6))
    twin, x = copy.deepcopy(layer), draw(2, 4).requires_grad_()
    if change == "paused":
        with layer.paused():
            y = checkpoint(layer, x, use_reentrant=False)
    else:
        y = checkpoint(layer, x, use_reentrant=False)
    if change == "crop":
        layer.crop(-1)
    if change == "reorder":
        layer.reorder([1, 0])
        with pytest.raises(StaleReadError, match="recompute the last segment that the memory read"):
            y.sum().backward()
        return
    (got,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(twin(x).square().sum(), x)[0])
    assert layer.length == (6 if change == "paused" else 9)


@with_and_without_k
def test_rejected_tokens_leave_no_trace(k: int | None) -> None:
    layer = make(k).eval()
    layer(draw(2, ROWS + 3))
    plain = copy.deepcopy(layer)
    x = draw(2, 5)
    layer(x)
    layer.crop(-3)
    plain(x[:, :2])
    after = draw(2, 2)
    torch.testing.assert_close(layer(after), plain(after))  # The memory was full, and no token was lost.
    assert layer.length == plain.length == ROWS + 7
    layer.crop(layer.length + 1)
    assert layer.length == ROWS + 7
    layer.crop(0)
    assert layer.length == 0
    assert "sequences=0" in repr(layer)


@with_and_without_k
def test_forgetting_one_sequence_loses_no_tokens_of_the_others(k: int | None) -> None:
    layer = make(k).eval()
    layer(draw(2, ROWS))
    plain, x = copy.deepcopy(layer), draw(2, 5)
    layer(x)
    layer.reset([1])
    layer.crop(-3)
    plain(x[:, :2])
    y = layer(after := draw(2, 2))
    torch.testing.assert_close(y[0], plain(after)[0])
    torch.testing.assert_close(y[1], attend(layer, draw(0), after[1]))


def test_crop_counts_padding_and_forgotten_tokens() -> None:
    for k in (None, 3):
        layer = make(k).eval()
        x, documents = draw(2, 8), torch.zeros(2, 8, dtype=torch.int64)
        documents[0, 2:4] = -1
        layer(x, documents=documents)
        layer(draw(2, 1))
        layer.reset([1])
        layer.crop(5)
        y = layer(after := draw(2, 2))
        torch.testing.assert_close(y[0], attend(layer, x[0, [0, 1, 4]], after[0]))
        torch.testing.assert_close(y[1], attend(layer, draw(0), after[1]))
        assert layer.length == 7


@with_and_without_k
def test_changes_apply_to_the_past_of_the_mode(k: int | None) -> None:
    layer = make(k)
    layer(draw(2, 4))
    layer.eval()
    layer(draw(1, 6))
    layer.repeat_interleave(3)
    layer.crop(5)
    assert layer.length == 5
    assert "sequences=3" in repr(layer)
    layer.train()
    assert layer.length == 4
    assert "sequences=2" in repr(layer)


def test_paused_blocks_nest_and_end_with_an_error() -> None:
    layer = make(None)
    with layer.paused():
        with layer.paused():
            layer(draw(2, 3))
        layer(draw(1, 3))
        twin = copy.deepcopy(layer)
    with pytest.raises(ZeroDivisionError), layer.paused():
        raise ZeroDivisionError
    for memory in (layer, twin):
        memory(draw(3, 3))
        assert memory.length == 3


def test_generation_rejects_invalid_arguments() -> None:
    layer = make(None)
    layer.repeat_interleave(2)  # An empty past stays empty.
    with pytest.raises(ArgumentError, match="indices: expected indices into a batch of 0, got"):
        layer.reorder([0])
    layer(draw(2, 3))
    with pytest.raises(ArgumentError, match=r"indices: expected indices into a batch of 2, got \[0, 2\]"):
        layer.reorder(torch.tensor([0, 2]))
    with pytest.raises(ArgumentError, match=r"indices: expected at least one .* call reset\(\)"):
        layer.reorder([])
    with pytest.raises(DtypeError, match="indices: expected int64 ids"):
        layer.reorder(torch.tensor([True, False]))
    with pytest.raises(ArgumentError, match="repeats: expected an integer of at least 1, got 0"):
        layer.repeat_interleave(0)
    with pytest.raises(DtypeError, match="n: expected an integer, got"):
        layer.crop(1.5)  # type: ignore[arg-type]
    assert layer.length == 3
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x := draw(2, 2)), twin(x))


@with_and_without_k
def test_states_and_pickles_without_a_count_of_tokens_load(k: int | None) -> None:
    layer = make(k)
    for _ in range(2):
        layer(draw(2, 9))
    state = layer.state_dict()
    if k is not None:
        old = make(k)
        old.load_state_dict({name: tensor for name, tensor in state.items() if name != "past.written"})
        assert old.length == layer.length == 18
        with pytest.raises(RuntimeError, match=r"state_dict\['past\.written'\]: expected at least 9, got 8"):
            old.load_state_dict(state | {"past.written": torch.tensor(8)})
        del layer._past.tokens.__dict__["written"]
        assert copy.deepcopy(layer).length == 18


@with_and_without_k
@pytest.mark.parametrize("temperature", [0.3, "learnable"])
def test_temperature_divides_the_scores_of_a_context_memory(k: int | None, temperature: Any) -> None:
    layer, lists = make(k, temperature=temperature), TokenLists()
    if temperature == "learnable":
        assert layer.log_temperature.tolist() == [0.0, 0.0]
        with torch.no_grad():
            layer.log_temperature.copy_(torch.tensor([-1.0, 0.5]))
    for _ in range(3):
        x = draw(2, 5)
        y, wanted = layer(x), lists.read(layer, x)
        lists.write(x)
        torch.testing.assert_close(y, wanted)
        parameters, direction = list(layer.parameters()), torch.randn_like(y)
        got, expected = (torch.autograd.grad(result, parameters, direction) for result in (y, wanted))
        for mine, want in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("value", [-1000.0, 1000.0, torch.nan])
def test_a_diverged_temperature_is_named(value: float) -> None:
    for layer in (
        make(None, temperature="learnable"),
        make(3, temperature="learnable"),
        ProductKeyMemory(DIM, 16, k=4, key_dim=4, temperature="learnable", dtype=torch.float64),
    ):
        torch.nn.init.constant_(layer.log_temperature, value)
        with pytest.raises(ArgumentError, match="temperature: expected finite numbers above 0"):
            layer(draw(2, 3))
        assert getattr(layer, "length", 0) == 0
