"""Reads under transforms of `torch.func` and under forward-mode differentiation.

A transform passes wrapped tensors to a function. Python code cannot read the elements of a wrapped tensor, but a read
needs them: it checks the query, searches an index, and counts. So a read under a transform is one opaque operation, a
pair of `torch.autograd.Function`. Its forward runs outside of all transforms, on plain tensors, and keeps the eager
autograd graph; its backward runs through that graph.

``vmap`` runs one read for all samples if their batch dimension can become a dimension of the query: the batch is
*folded* into the query. Otherwise it runs one read for each sample. In backward, each level of ``vmap`` must
distinguish a batch dimension that existed in forward from one that only the gradients have, as in ``jacrev``. For this,
forward has an additional output, the *marker*, which is batched at exactly the levels that existed in forward.

The eager graph is attached to another output, the *ticket*. Torch keeps the ticket for backward, so the graph lives
exactly as long as the ticket.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from softdb.errors import SecondDerivativeError, StaleReadError, TransformError

__all__ = [
    "Answer",
    "Operands",
    "check_no_tangent",
    "check_not_batched",
    "check_randomness",
    "disable_compile",
    "has_batched",
    "is_active",
    "is_batched",
    "is_exporting",
    "is_forward_mode",
    "is_traced",
    "is_wrapped",
    "move_samples_first",
    "read_opaquely",
    "suspend_transforms",
    "unwrap_tensors",
    "without_transforms",
]

P = ParamSpec("P")
T = TypeVar("T")
Operands = list[Tensor | None]

FORWARD_MODE_MESSAGE = (
    "expected no forward-mode tangent (torch.func.jvp, jacfwd, hessian; torch.autograd.forward_ad), because a read has "
    "no forward-mode derivative; use reverse mode (grad, vjp, jacrev), or softdb.functional.topk_read, which has both"
)

# Whether a transform of torch.func is active in this thread.
is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def is_wrapped(*values: object) -> bool:
    """Return whether one of ``values`` is a tensor that a transform wraps."""
    return any(isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value) for value in values)


def is_batched(tensor: Tensor) -> bool:
    """Return whether torch.vmap batches ``tensor``."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def has_batched(gradients: Sequence[Tensor | None]) -> bool:
    """Return whether gradients are batched.

    They are under torch.vmap, and with ``is_grads_batched=True`` of `torch.autograd.grad`.
    """
    return any(
        gradient is not None
        and (functorch.is_functorch_wrapped_tensor(gradient) or functorch.is_legacy_batchedtensor(gradient))
        for gradient in gradients
    )


def check_not_batched(gradients: Sequence[Tensor | None]) -> None:
    """Raise if gradients are batched, for a backward that supports plain tensors only."""
    if has_batched(gradients):
        raise TransformError(
            "gradients: expected plain tensors, got tensors that torch.vmap batches (is_grads_batched=True, or "
            "vectorize=True in torch.autograd.functional); use torch.func.jacrev or torch.func.vjp, or vectorize=False"
        )


def check_no_tangent(*values: object) -> None:
    """Raise if one of ``values`` is a tensor with a forward-mode tangent."""
    for value in values:
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and forward_ad.unpack_dual(value).tangent is not None
        ):
            raise TransformError(f"query, keys, values, temperature, bias, mask: {FORWARD_MODE_MESSAGE}")


def disable_compile(message: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function to run eagerly, with a graph break, under torch.compile.

    Args:
        message: Reason for the graph break, shown by torch.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        # torch.compiler.disable would import the compiler at the first call, which takes two seconds.
        call: Callable[..., T] = _disable_dynamo(function)
        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = message  # type: ignore[attr-defined]
        return call

    return decorate


def is_exporting() -> bool:
    """Return whether torch.export is tracing, with Dynamo or without it."""
    return bool(torch.compiler.is_exporting()) if hasattr(torch.compiler, "is_exporting") else False  # from 2.7 on


# Dynamo calls a function with this mark while it traces, and uses the result as a constant. Without it, Dynamo of
# torch 2.7 to 2.12 assumes that torch.compiler.is_exporting returns True, also for torch.compile.
# torch.compiler.assume_constant_result sets the same mark, but imports the compiler.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced(tensor: object) -> bool:
    """Return whether ``tensor`` is traced by torch.export without Dynamo."""
    return torch.compiler.is_compiling() and type(tensor) not in (Tensor, torch.nn.Parameter)


# -- tensors and functions outside of transforms ---------------------------------------------------------


@contextmanager
def suspend_transforms() -> Iterator[None]:
    """Run the block as if no transform were active."""
    stack = functorch.get_interpreter_stack() or []
    lowest = next((level for level in stack if level.key() == functorch.TransformType.Grad), None)
    # If gradients were disabled outside of the transforms, they are disabled in the block.
    enabled = torch.is_grad_enabled() if lowest is None else functorch.CGradInterpreterPtr(lowest).prevGradMode()
    with temporarily_clear_interpreter_stack(), torch.set_grad_enabled(torch.is_grad_enabled() and enabled):
        yield


def move_samples_first(tensor: Tensor) -> Tensor:
    """Return a detached plain tensor whose leading dimensions are those of `vmap`.

    There is one leading dimension for each level of vmap that batches the tensor. Call this function only within
    `suspend_transforms`.
    """
    dims = []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            dims.append(functorch.maybe_get_bdim(tensor))
        tensor = functorch.get_unwrapped(tensor)
    for count, dim in enumerate(reversed(dims)):
        tensor = tensor.movedim(dim + count, 0)
    return tensor.detach()


def unwrap_tensors(name: str, value: T) -> T:
    """Return ``value`` with its tensors unwrapped from all transforms, and detached.

    Args:
        name: Name of the value, for the message.
        value: A tensor, or a mapping or sequence of tensors. Other values are returned unchanged.

    Raises:
        TransformError: `vmap` batches one of the tensors.
    """
    if isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if is_batched(value):
            raise TransformError(
                f"{name}: expected one value for all samples, got a tensor that torch.vmap batches; call the store "
                "outside of vmap"
            )
        tensor: Tensor = value
        while functorch.is_functorch_wrapped_tensor(tensor):
            tensor = functorch.get_unwrapped(tensor)
        return cast(T, tensor.detach())
    if isinstance(value, Mapping) and is_wrapped(*value.values()):
        return cast(T, {key: unwrap_tensors(f"{name}[{key!r}]", part) for key, part in value.items()})
    if isinstance(value, (list, tuple)) and is_wrapped(*value):
        return cast(T, [unwrap_tensors(name, part) for part in value])
    return value


def without_transforms(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method to run outside of transforms, on unwrapped arguments."""

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_active():
            return method(*args, **kwargs)
        given: list[Any] = [unwrap_tensors(method.__name__, value) for value in args]
        named: dict[str, Any] = {name: unwrap_tensors(name, value) for name, value in kwargs.items()}
        with suspend_transforms():
            return method(*given, **named)

    return run


# -- reads inside of transforms --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Read of plain tensors, in the form that `read_opaquely` needs.

    Attributes:
        members: Tensors of the read, by name.
        normalizer: Normalizer of the read.
        leaves: Tensor that represents each operand in the graph of the members; None for operands without a gradient.
    """

    members: dict[str, Tensor]
    normalizer: str
    leaves: Operands


@dataclass
class _Call:
    """Read under transforms, with the reads to which a level of vmap reduces it.

    Attributes:
        run: Function that reads plain operands. Its second argument lists which operands need a gradient.
        fold: Function from batched operands to the operands of one read. Its other arguments list which operands have a
            leading batch dimension, and give the size of that dimension. It returns None if one read is not possible.
        levels: Highest level at which each operand needs a gradient: 0 outside of transforms, -1 for no gradient.
        random: "queries" if each query draws random numbers, "batch" if a read draws once, "" if it does not.
        generator: Source of the random numbers.
        sparse: Whether gradients may be row-sparse.
        names: Names of the members; set by the read.
        normalizer: Normalizer of the result; set by the read.
        differentiable: Whether each member has a gradient; set by the read.
        folded: Read of the whole batch, if the batch was folded.
        shapes: Shapes of the operands of one sample, if the batch was folded.
        parts: Reads of the samples, if the batch was not folded.
        widths: Last dimensions of the members, if this is the read of one sample; 0 for a scalar.
    """

    run: Callable[[Operands, list[bool]], Answer]
    fold: Callable[[Operands, list[bool], int], Operands | None]
    levels: list[int]
    random: str = ""
    generator: torch.Generator | None = None
    sparse: bool = False
    names: list[str] = field(default_factory=list)
    normalizer: str = ""
    differentiable: list[bool] = field(default_factory=list)
    folded: _Call | None = None
    shapes: list[torch.Size | None] = field(default_factory=list)
    parts: list[_Call] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def copy(self) -> _Call:
        """Return a copy without results."""
        return replace(self, names=[], differentiable=[], folded=None, shapes=[], parts=[], widths=[])

    def copy_description(self, other: _Call) -> None:
        """Copy the description of the members from another read."""
        self.names, self.normalizer, self.differentiable = other.names, other.normalizer, other.differentiable


def _disable_tracing(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that Dynamo does not trace it after a graph break.

    If Dynamo is not imported yet, it stays so.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        dynamo = sys.modules.get("torch._dynamo")
        result: T = (function if dynamo is None else dynamo.disable(function))(*args, **kwargs)
        return result

    return run


@_disable_tracing
def read_opaquely(
    run: Callable[[Operands, list[bool]], Answer],
    fold: Callable[[Operands, list[bool], int], Operands | None],
    operands: Operands,
    *,
    random: str = "",
    generator: torch.Generator | None = None,
    sparse: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Read under transforms; return the members by name, and the normalizer.

    The members are wrapped as the operands are.

    Args:
        run: As in `_Call`.
        fold: As in `_Call`. `read_opaquely` appends one operand, which ``fold`` must return as the last one. That
            operand is batched if the samples draw different random numbers.
        operands: Tensors that the read depends on.
        random: As in `_Call`.
        generator: As in `_Call`.
        sparse: Whether gradients may be row-sparse if no transform computes them.
    """
    stack = functorch.get_interpreter_stack() or []
    if any(level.key() == functorch.TransformType.Functionalize for level in stack):
        raise TransformError(
            "query: expected a transform other than torch.func.functionalize, which does not support operations in "
            "Python; move the read out of the functionalized function"
        )
    salt = None
    if random:
        check_randomness()
        salt = torch.randint(1, (), device="cpu")  # torch batches it if the samples draw different numbers
    if any(level.key() != functorch.TransformType.Vmap for level in stack):
        sparse = False  # Transforms that compute gradients can wrap dense tensors only.
    operands = [*operands, salt]
    call = _Call(run, fold, [_highest_gradient_level(value) for value in operands], random, generator, sparse)
    outputs = _Read.apply(call, *operands)  # type: ignore[no-untyped-call]
    return dict(zip(call.names, outputs[:-2], strict=True)), call.normalizer


def check_randomness() -> None:
    """Raise if an active vmap forbids random numbers."""
    for level in functorch.get_interpreter_stack() or []:
        if level.key() != functorch.TransformType.Vmap:
            continue
        if functorch.CVmapInterpreterPtr(level).randomness() == functorch.RandomnessType.Error:
            raise TransformError(
                "randomness: expected 'same' or 'different' for a read that draws random numbers, got "
                "torch.vmap(..., randomness='error'); pass one of the two to vmap"
            )


def _highest_gradient_level(value: Tensor | None) -> int:
    """Return the highest level at which ``value`` needs a gradient.

    0 is autograd outside of transforms; -1 is no gradient.
    """
    if value is None or not value.is_floating_point():
        return -1
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_gradtrackingtensor(value) and value.requires_grad:
            return int(functorch.maybe_get_level(value))
        value = functorch.get_unwrapped(value)
    return 0 if value.requires_grad else -1


def _get_vmap_level() -> int:
    """Return the level of the vmap whose rule is running.

    While the rule runs, that level and the levels above it are not on the stack.
    """
    below = functorch.peek_interpreter_stack()
    return 1 if below is None else below.level() + 1


# Positions of the ticket and the marker in the outputs of `_Read`.
TICKET_INDEX, MARKER_INDEX = -2, -1


class _Read(torch.autograd.Function):
    """Read as a function from operands to the members, the ticket and the marker."""

    @staticmethod
    def forward(call: _Call, *operands: Tensor | None) -> tuple[Tensor, ...]:
        wanted = [level >= 0 for level in call.levels]
        with torch.set_grad_enabled(any(wanted)):
            answer = call.run(list(operands), wanted)
        members = list(answer.members.values())
        call.names, call.normalizer = list(answer.members), answer.normalizer
        call.differentiable = [member.requires_grad for member in members]
        ticket, marker = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        if any(call.differentiable):
            ticket._softdb_kept = members, answer.leaves  # type: ignore[attr-defined]
        return *(member.detach() for member in members), ticket, marker

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *operands = inputs
        ctx.call, ctx.count = call, len(output) - 2
        # Do not use save_for_backward: it raises after a write to any row, also to rows that the read did not use.
        ctx.operands = [value for value, level in zip(operands, call.levels, strict=True) if level >= 0]
        ctx.save_for_backward(output[TICKET_INDEX], output[MARKER_INDEX])
        fixed = [member for member, has in zip(output, call.differentiable, strict=False) if not has]
        ctx.mark_non_differentiable(*fixed, output[TICKET_INDEX], output[MARKER_INDEX])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_tracing
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        given = grads[: ctx.count]
        results: tuple[Tensor | None, ...] = ()
        if any(gradient is not None for gradient in given):
            ticket, marker = ctx.saved_tensors
            results = _Gradient.apply(  # type: ignore[no-untyped-call]
                ctx.call, needs, ctx.count, ticket, marker, *given, *ctx.operands
            )
        found = iter(results)
        return None, *(next(found, None) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TransformError(f"query, keys, values, temperature, bias, mask: {FORWARD_MODE_MESSAGE}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *operands: Tensor | None) -> Any:
        size, level = info.batch_size, _get_vmap_level()
        batched = [dim is not None for dim in in_dims[1:]]
        given = [
            value if value is None or dim is None else value.movedim(dim, 0)
            for value, dim in zip(operands, in_dims[1:], strict=True)
        ]
        call.shapes = [None if value is None else value.shape[has:] for value, has in zip(given, batched, strict=True)]
        has_own_randomness = batched[-1]
        for place, value in enumerate(given):
            if value is not None and not batched[place] and call.levels[place] > level:
                # A transform at a higher level computes one gradient per sample, so the operand needs a batch
                # dimension.
                given[place], batched[place] = value.unsqueeze(0).expand(size, *value.shape), True
        repeats = call.random == "queries" and not has_own_randomness
        separate = repeats or (call.random == "batch" and has_own_randomness)
        folded = None if separate else call.fold(given, batched, size)
        if folded is not None:
            call.folded = call.copy()
            outputs = _Read.apply(call.folded, *folded)  # type: ignore[no-untyped-call]
            call.copy_description(call.folded)
            marker = outputs[MARKER_INDEX].unsqueeze(0).expand(size, *outputs[MARKER_INDEX].shape)
            return (*outputs[:MARKER_INDEX], marker), (*[0] * len(call.names), None, 0)
        generator = torch.default_generator if call.generator is None else call.generator
        state = generator.get_state() if repeats else None
        samples = []
        for sample in range(size):
            if state is not None:
                generator.set_state(state)
            part = call.copy()
            call.parts.append(part)
            own = [
                value[sample] if has and value is not None else value for value, has in zip(given, batched, strict=True)
            ]
            samples.append(_Read.apply(part, *own))  # type: ignore[no-untyped-call]
            part.widths = [member.shape[-1] if member.dim() else 0 for member in samples[-1][:TICKET_INDEX]]
        call.copy_description(call.parts[0])
        members = [
            _stack_padded(name, parts)
            for name, *parts in zip(call.names, *(sample[:TICKET_INDEX] for sample in samples), strict=True)
        ]
        with suspend_transforms():
            ticket, marker = torch.zeros((), device="cpu"), torch.zeros(size, device="cpu")
        ticket._softdb_parts = [sample[TICKET_INDEX:] for sample in samples]  # type: ignore[attr-defined]
        return (*members, ticket, marker), (*[0] * len(members), None, 0)


# Padding of the members of samples that report fewer candidates than others; 0 for members not named here.
PADDING_VALUES = {"ids": -1, "scores": -torch.inf}


def _stack_padded(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Stack one member of the reads of all samples, padded to a common width."""
    widest = max(part.shape[-1] for part in parts) if parts[0].dim() else 0
    padding = PADDING_VALUES.get(name, 0)
    return torch.stack(
        [
            torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=padding)
            if part.dim() and part.shape[-1] < widest
            else part
            for part in parts
        ]
    )


def _to_dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _drop_padding_gradient(gradient: Tensor | None, width: int) -> Tensor | None:
    """Remove the gradient of padding."""
    if gradient is None or gradient.dim() == 0 or gradient.shape[-1] == width:
        return gradient
    return gradient[..., :width]


class _Gradient(torch.autograd.Function):
    """Function from the gradients of a read's members to those of its operands.

    The operands are inputs, although they are not used, so that the result depends on them. Otherwise a second
    derivative would be 0 instead of raising an error.
    """

    @staticmethod
    def forward(
        call: _Call, needs: tuple[bool, ...], count: int, ticket: Tensor, marker: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept = getattr(ticket, "_softdb_kept", None)
        if kept is None:
            raise StaleReadError(
                "the eager graph of a read was freed before its backward, because the tensors that torch saved for it "
                "were replaced, for instance by a saved-tensor hook; read outside of the transform"
            )
        members, leaves = kept
        pairs = [
            (member, gradient)
            for member, gradient in zip(members, rest[:count], strict=True)
            if gradient is not None and member.requires_grad
        ]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True)
        return tuple(part if part is None or call.sparse else _to_dense(part) for part in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise SecondDerivativeError(
            "a read has no second derivative under transforms of torch.func; for a few rows, use "
            "softdb.functional.topk_read with all rows as candidates, which has one"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TransformError(f"query, keys, values, temperature, bias, mask: {FORWARD_MODE_MESSAGE}")

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        call: _Call,
        needs: tuple[bool, ...],
        count: int,
        ticket: Tensor,
        marker: Tensor,
        *rest: Tensor | None,
    ) -> Any:
        size, dims = info.batch_size, in_dims[5:]
        operands = rest[count:]
        grads = [
            value if value is None or dim is None else value.movedim(dim, 0)
            for value, dim in zip(rest[:count], dims[:count], strict=True)
        ]
        batched = [dim is not None for dim in dims[:count]]
        was_batched_in_forward = in_dims[4] is not None
        if not was_batched_in_forward and not any(batched):
            results = _Gradient.apply(call, needs, count, ticket, marker, *grads, *operands)  # type: ignore[no-untyped-call]
            return results, (None,) * len(results)
        if was_batched_in_forward and call.folded is not None:
            grads = [
                value if value is None or has else value.unsqueeze(0).expand(size, *value.shape)
                for value, has in zip(grads, batched, strict=True)
            ]
            results = _Gradient.apply(call.folded, needs, count, ticket, marker, *grads, *operands)  # type: ignore[no-untyped-call]
            shapes = [shape for shape, need in zip(call.shapes, needs, strict=True) if need]
            results = tuple(
                None if part is None else part.reshape(size, *cast(torch.Size, shape))
                for part, shape in zip(results, shapes, strict=True)
            )
            return results, (0,) * len(results)
        samples = []
        for sample in range(size):
            own = [
                value[sample] if has and value is not None else value for value, has in zip(grads, batched, strict=True)
            ]
            part, kept, mark = call, ticket, marker
            if was_batched_in_forward:
                part = call.parts[sample]
                kept, mark = ticket._softdb_parts[sample]  # type: ignore[attr-defined]
                own = [_drop_padding_gradient(value, width) for value, width in zip(own, part.widths, strict=True)]
            samples.append(_Gradient.apply(part, needs, count, kept, mark, *own, *operands))  # type: ignore[no-untyped-call]
        results = tuple(
            None if parts[0] is None else torch.stack([_to_dense(part) for part in parts])
            for parts in zip(*samples, strict=True)
        )
        return results, (0,) * len(results)
