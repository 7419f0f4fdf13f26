"""Reads under the transforms of `torch.func` and under forward-mode differentiation.

A transform hands a function wrapped tensors, whose numbers Python code cannot look at. Reads do look at numbers: they
check them, search an index, and count. So under a transform a read is one opaque operation, a pair of
`torch.autograd.Function`: its forward runs below all transforms, on plain tensors, and keeps the eager autograd graph;
its backward goes through that graph.

``vmap`` makes one read of a whole batch where batch dimensions of the operands allow it (the batch is *folded* into the
query), else one read for each sample. For backward, each level of ``vmap`` needs to tell a batch that was there in
forward from one that only the gradients have (``jacrev``): an output of forward, the *marker*, is batched at exactly
the levels of the first kind.

The eager graph lies on another output, the *ticket*, so it lives exactly as long as torch keeps what a backward needs.
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

FORWARD_MODE = (
    "expected no forward-mode tangent (torch.func.jvp, jacfwd, hessian; torch.autograd.forward_ad), since a read has "
    "no forward-mode derivative; use reverse mode (grad, vjp, jacrev), or softdb.functional.topk_read, which has both"
)

# Whether a transform of torch.func is active in this thread.
is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def is_wrapped(*values: object) -> bool:
    """Whether one of ``values`` is a tensor that a transform wraps."""
    return any(isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value) for value in values)


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.vmap gives ``tensor`` a value for each sample."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def has_batched(gradients: Sequence[Tensor | None]) -> bool:
    """Whether gradients are batched, by torch.vmap or by ``is_grads_batched`` of torch.autograd.grad."""
    return any(
        gradient is not None
        and (functorch.is_functorch_wrapped_tensor(gradient) or functorch.is_legacy_batchedtensor(gradient))
        for gradient in gradients
    )


def check_not_batched(gradients: Sequence[Tensor | None]) -> None:
    """Raise if gradients are batched, in the backward of a read that was not."""
    if has_batched(gradients):
        raise TransformError(
            "gradients: expected plain tensors, got some that torch.vmap batches (is_grads_batched=True, or "
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
            raise TransformError(f"query, keys, values, temperature: {FORWARD_MODE}")


def disable_compile(message: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Have a function run eagerly where a graph that is being traced calls it, which breaks that graph; say why."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        # torch.compiler.disable, but it imports torch's compiler (two seconds) when the function is first called.
        call: Callable[..., T] = _disable_dynamo(function)
        call._torchdynamo_disable = True  # type: ignore[attr-defined]
        call._torchdynamo_disable_msg = message  # type: ignore[attr-defined]
        return call

    return decorate


def is_exporting() -> bool:
    """Whether torch.export is tracing; also while Dynamo traces for it."""
    return bool(torch.compiler.is_exporting()) if hasattr(torch.compiler, "is_exporting") else False  # from 2.7 on


# A constant of each graph, worked out as it is traced. Dynamo of torch 2.7 to 2.12 does not call is_exporting of
# torch.compiler: it takes for granted that it is true, for torch.compile too. This is what
# torch.compiler.assume_constant_result sets, which would import the compiler.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_traced(tensor: object) -> bool:
    """Whether torch.export, without Dynamo, passes a stand-in for a tensor."""
    return torch.compiler.is_compiling() and type(tensor) not in (Tensor, torch.nn.Parameter)


# -- tensors and functions outside of transforms ---------------------------------------------------------


@contextmanager
def suspend_transforms() -> Iterator[None]:
    """Run the block as if no transform were active: what it makes is plain."""
    stack = functorch.get_interpreter_stack() or []
    lowest = next((level for level in stack if level.key() == functorch.TransformType.Grad), None)
    # Where gradients were off outside of the transforms, they are off here.
    enabled = torch.is_grad_enabled() if lowest is None else functorch.CGradInterpreterPtr(lowest).prevGradMode()
    with temporarily_clear_interpreter_stack(), torch.set_grad_enabled(torch.is_grad_enabled() and enabled):
        yield


def move_samples_first(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor below all transforms, with a dimension in front for each `vmap` that batches it.

    To be called outside of transforms.
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
    """Return ``value`` with the tensors in it cut from every transform.

    Raises:
        TransformError: `vmap` gives one of them a value for each sample.
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
    """Decorate a method to run outside of transforms, on the plain values of what they wrap."""

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
    """A read of plain tensors, as `read_opaquely` needs it.

    Attributes:
        members: Its tensors by name.
        normalizer: Its normalizer.
        leaves: For each operand the tensor that stands for it in the graph of the members, None where no gradient
            is wanted.
    """

    members: dict[str, Tensor]
    normalizer: str
    leaves: Operands


@dataclass
class _Call:
    """One read under transforms; each level of vmap that batches an operand makes another of it.

    Attributes:
        run: Read plain operands; which of them want a gradient is told by its second argument.
        fold: Make the operands of one read of operands with a batch dimension in front, told which have one and its
            size; None where there is no such read.
        levels: The highest level at which an operand wants a gradient: 0 outside of transforms, -1 for none.
        random: "queries" where every query draws for itself, "batch" where a read draws once, "" where it does not.
        generator: What it draws from.
        sparse: Whether gradients may be row-sparse.
        names, normalizer: Of the members, once it has been answered.
        differentiable: Which of them have a gradient.
        folded: The read of the whole batch, of which this is a sample.
        shapes: The shapes of this read's operands, where it is folded.
        parts: The reads of the samples, where the batch is not folded.
        widths: The last dimensions of this read's members, where it is one of those; 0 for a scalar.
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
        """Return a read like this that has not been answered."""
        return replace(self, names=[], differentiable=[], folded=None, shapes=[], parts=[], widths=[])

    def describe_as(self, other: _Call) -> None:
        """Take over what is known of another read's members."""
        self.names, self.normalizer, self.differentiable = other.names, other.normalizer, other.differentiable


def _untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Have Dynamo trace nothing within ``function``, where a graph broke around it; do not import Dynamo for that."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        dynamo = sys.modules.get("torch._dynamo")
        result: T = (function if dynamo is None else dynamo.disable(function))(*args, **kwargs)
        return result

    return run


@_untraced
def read_opaquely(
    run: Callable[[Operands, list[bool]], Answer],
    fold: Callable[[Operands, list[bool], int], Operands | None],
    operands: Operands,
    *,
    random: str = "",
    generator: torch.Generator | None = None,
    sparse: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Read under transforms: return the members by name, as wrapped as the operands, and the normalizer.

    Args:
        run: As in `_Call`.
        fold: As in `_Call`. The last operand, which `read_opaquely` adds, is to be passed on; it is batched where
            samples draw differently.
        operands: What the read depends on.
        random: As in `_Call`.
        generator: What it draws from.
        sparse: Whether gradients may be row-sparse where no transform takes them.
    """
    stack = functorch.get_interpreter_stack() or []
    if any(level.key() == functorch.TransformType.Functionalize for level in stack):
        raise TransformError(
            "query: expected a transform other than torch.func.functionalize, which goes through no operation of "
            "Python; leave the read out of the functionalized function"
        )
    salt = None
    if random:
        check_randomness()
        salt = torch.randint(1, (), device="cpu")  # torch batches it where samples draw differently
    if any(level.key() != functorch.TransformType.Vmap for level in stack):
        sparse = False  # transforms of gradients wrap dense tensors only
    operands = [*operands, salt]
    call = _Call(run, fold, [_highest_gradient(value) for value in operands], random, generator, sparse)
    outputs = _Read.apply(call, *operands)  # type: ignore[no-untyped-call]
    return dict(zip(call.names, outputs[:-2], strict=True)), call.normalizer


def check_randomness() -> None:
    """Raise if a vmap around this forbids random numbers."""
    for level in functorch.get_interpreter_stack() or []:
        if level.key() != functorch.TransformType.Vmap:
            continue
        if functorch.CVmapInterpreterPtr(level).randomness() == functorch.RandomnessType.Error:
            raise TransformError(
                "randomness: expected 'same' or 'different' for a read that draws random numbers, got "
                "torch.vmap(..., randomness='error'); pass one of them to vmap"
            )


def _highest_gradient(value: Tensor | None) -> int:
    """The highest level that wants a gradient of ``value``, 0 for none but torch's own, -1 for none at all."""
    if value is None or not value.is_floating_point():
        return -1
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_gradtrackingtensor(value) and value.requires_grad:
            return int(functorch.maybe_get_level(value))
        value = functorch.get_unwrapped(value)
    return 0 if value.requires_grad else -1


def _level_of_vmap() -> int:
    """The level whose vmap rule is running; those from it on are off the stack."""
    below = functorch.peek_interpreter_stack()
    return 1 if below is None else below.level() + 1


TICKET, MARKER = -2, -1


class _Read(torch.autograd.Function):
    """A read: operands to members, ticket and marker."""

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
        # Not by save_for_backward: rows that were not read may be written to before the backward.
        ctx.operands = [value for value, level in zip(operands, call.levels, strict=True) if level >= 0]
        ctx.save_for_backward(output[TICKET], output[MARKER])
        fixed = [member for member, has in zip(output, call.differentiable, strict=False) if not has]
        ctx.mark_non_differentiable(*fixed, output[TICKET], output[MARKER])
        ctx.set_materialize_grads(False)

    @staticmethod
    @_untraced
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
        raise TransformError(f"query, keys, values, temperature: {FORWARD_MODE}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *operands: Tensor | None) -> Any:
        size, level = info.batch_size, _level_of_vmap()
        batched = [dim is not None for dim in in_dims[1:]]
        given = [
            value if value is None or dim is None else value.movedim(dim, 0)
            for value, dim in zip(operands, in_dims[1:], strict=True)
        ]
        call.shapes = [None if value is None else value.shape[has:] for value, has in zip(given, batched, strict=True)]
        draws_differently = batched[-1]
        for place, value in enumerate(given):
            if value is not None and not batched[place] and call.levels[place] > level:
                # A transform above takes a gradient for each sample.
                given[place], batched[place] = value.unsqueeze(0).expand(size, *value.shape), True
        repeats = call.random == "queries" and not draws_differently
        separate = repeats or (call.random == "batch" and draws_differently)
        folded = None if separate else call.fold(given, batched, size)
        if folded is not None:
            call.folded = call.copy()
            outputs = _Read.apply(call.folded, *folded)  # type: ignore[no-untyped-call]
            call.describe_as(call.folded)
            marker = outputs[MARKER].unsqueeze(0).expand(size, *outputs[MARKER].shape)
            return (*outputs[:MARKER], marker), (*[0] * len(call.names), None, 0)
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
            part.widths = [member.shape[-1] if member.dim() else 0 for member in samples[-1][:TICKET]]
        call.describe_as(call.parts[0])
        members = [
            _stack(name, parts)
            for name, *parts in zip(call.names, *(sample[:TICKET] for sample in samples), strict=True)
        ]
        with suspend_transforms():
            ticket, marker = torch.zeros((), device="cpu"), torch.zeros(size, device="cpu")
        ticket._softdb_parts = [sample[TICKET:] for sample in samples]  # type: ignore[attr-defined]
        return (*members, ticket, marker), (*[0] * len(members), None, 0)


# What padding holds where reads differ in how many candidates they report.
PADDING = {"ids": -1, "scores": -torch.inf}


def _stack(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Stack a member of the samples' reads, padded to the same width."""
    widest = max(part.shape[-1] for part in parts) if parts[0].dim() else 0
    padding = PADDING.get(name, 0)
    return torch.stack(
        [
            torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=padding)
            if part.dim() and part.shape[-1] < widest
            else part
            for part in parts
        ]
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _narrow(gradient: Tensor | None, width: int) -> Tensor | None:
    """Cut off the gradient of padding."""
    if gradient is None or gradient.dim() == 0 or gradient.shape[-1] == width:
        return gradient
    return gradient[..., :width]


class _Gradient(torch.autograd.Function):
    """The gradients of a read's operands that are needed, from those of its members.

    The operands are passed so that the result depends on them: a second derivative is an error, not zero.
    """

    @staticmethod
    def forward(
        call: _Call, needs: tuple[bool, ...], count: int, ticket: Tensor, marker: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept = getattr(ticket, "_softdb_kept", None)
        if kept is None:
            raise StaleReadError(
                "the eager graph of a read is gone before its backward, since something (a saved-tensor hook?) "
                "replaced the tensors that torch had saved for it; read outside of the transform"
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
        return tuple(part if part is None or call.sparse else _dense(part) for part in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise SecondDerivativeError(
            "a read has no second derivative under transforms of torch.func or inside of vmap; for a few rows, use "
            "softdb.functional.topk_read with all of them as candidates, which has"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise TransformError(f"query, keys, values, temperature: {FORWARD_MODE}")

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
        was_there = in_dims[4] is not None
        if not was_there and not any(batched):
            results = _Gradient.apply(call, needs, count, ticket, marker, *grads, *operands)  # type: ignore[no-untyped-call]
            return results, (None,) * len(results)
        if was_there and call.folded is not None:
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
            if was_there:
                part = call.parts[sample]
                kept, mark = ticket._softdb_parts[sample]  # type: ignore[attr-defined]
                own = [_narrow(value, width) for value, width in zip(own, part.widths, strict=True)]
            samples.append(_Gradient.apply(part, needs, count, kept, mark, *own, *operands))  # type: ignore[no-untyped-call]
        results = tuple(
            None if parts[0] is None else torch.stack([_dense(part) for part in parts])
            for parts in zip(*samples, strict=True)
        )
        return results, (0,) * len(results)
