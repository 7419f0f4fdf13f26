"""What a read answers, and how answers of disjoint rows are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor

from softdb._checks import describe
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.kernels.spec import disable_autocast
from softdb.scoring.metrics import compute_dtype
from softdb.scoring.normalizers import softmax, straight_through
from softdb.transforms import Answer, Operands

__all__ = ["Read", "merge"]


@dataclass(frozen=True, eq=False)
class Read:
    """One answered batch of queries; the leading shape is the query's.

    ``values``, ``weights``, ``scores``, ``lse`` and ``mass`` are differentiable.

    Attributes:
        values: The answer, (..., value_dim), in the query's dtype (under autocast: its dtype).
        ids: The rows behind it, (..., k) int64, best first; -1 where fewer than k rows could be seen. None for an
            exact read, or one to a tolerance, without ``k``. A top-k read with a sparse normalizer may double k.
        weights: The rows' weights, (..., k); 0 at padding. None where ``ids`` is.
        scores: The rows' scores, divided by the temperature, (..., k); -inf at padding. None where ``ids`` is.
        lse: log of the sum of exp(score) over the rows considered, (...,); -inf where there were none.
        mass: The fraction of the weight of all allowed rows that the rows in ``ids`` hold, (...,): by ``normalizer``
            if it is sparse, else by softmax. 1 for an exact read without ``k``, what the candidates hold for a read to
            a tolerance without it, 0 where there was nothing to read, NaN when unknown.
        error: The estimated relative error of ``values``, (...,), where a tail or a tolerance was asked for.
        normalizer: How scores became weights; "hard" for a hard read.
    """

    values: Tensor
    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None
    lse: Tensor
    mass: Tensor
    error: Tensor | None = None
    normalizer: str = "softmax"


def transform(read: Read, function: Callable[[Tensor], Tensor]) -> Read:
    """The same read with ``function`` applied to every tensor."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return Read(
        function(read.values),
        changed(read.ids),
        changed(read.weights),
        changed(read.scores),
        function(read.lse),
        function(read.mass),
        changed(read.error),
        read.normalizer,
    )


def replaced(read: Read, queries: Tensor, other: Read) -> Read:
    """``read`` of M queries with the answers to some of them, (b,), from ``other``."""

    def put(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        return None if mine is None or theirs is None else mine.index_copy(0, queries, theirs)

    return Read(
        read.values.index_copy(0, queries, other.values),
        put(read.ids, other.ids),
        put(read.weights, other.weights),
        put(read.scores, other.scores),
        read.lse.index_copy(0, queries, other.lse),
        read.mass.index_copy(0, queries, other.mass),
        put(read.error, other.error),
        read.normalizer,
    )


def widened(read: Read, k: int) -> Read:
    """The same read with padding, up to k candidates."""
    if read.ids is None or read.weights is None or read.scores is None:
        return read
    room = (0, k - read.ids.shape[-1])
    ids, weights = torch.nn.functional.pad(read.ids, room, value=-1), torch.nn.functional.pad(read.weights, room)
    return replace(read, ids=ids, weights=weights, scores=torch.nn.functional.pad(read.scores, room, value=-torch.inf))


def best_of(read: Read, k: int | None) -> Read:
    """The same read, of which only the k best candidates are reported, or none."""
    if k is None:
        return replace(read, ids=None, weights=None, scores=None)
    if read.ids is None or read.weights is None or read.scores is None or read.ids.shape[-1] <= k:
        return read
    weights = read.weights[:, :k]
    return replace(read, ids=read.ids[:, :k], weights=weights, scores=read.scores[:, :k], mass=share_of(weights))


def completed(read: Read, queries: Tensor, exact: Read) -> Read:
    """Of some of the queries, (b,), the candidates of ``read`` as parts of an exact one of those queries."""
    scores = cast(Tensor, read.scores)[queries]
    total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
    weights = (scores - total).exp()
    return replace(
        exact,
        ids=cast(Tensor, read.ids)[queries],
        weights=weights,
        scores=scores,
        mass=share_of(weights),
        error=torch.zeros_like(exact.lse),
    )


def share_of(weights: Tensor) -> Tensor:  # (M, k) -> (M,)
    """What weights come to, no more than 1."""
    total = weights.sum(-1)
    return straight_through(total.clamp(max=1.0), total)


def answer_dtype(query: Tensor) -> torch.dtype:
    """The dtype that ``read.values`` comes in: the query's, or autocast's where it is on."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def merge(reads: Sequence[Read]) -> Read:
    """Join reads of disjoint sets of rows, for the same queries, into the read of all of them.

    Equal to the softmax over the union of the rows: with shares s_i = softmax over i of lse_i::

        values = sum_i s_i values_i,   lse = logsumexp_i lse_i

    so a read over a local, in-graph context and a read of a store make one read, and so do the reads of shards.
    Differentiable: gradients reach whatever each read's gradients reach.

    Args:
        reads: At least one `Read`, all with softmax weights and of one leading shape and value width. That their rows
            are disjoint is the caller's word.

    Returns:
        A `Read`. Where all reads carry ids, the merged one carries them all, best first; ids of different sources
        stand side by side, and telling them apart is the caller's part. Its ``mass`` counts what each read considered:
        NaN if one of them does not know its own. It has no ``error``, whatever theirs were.

    Raises:
        ArgumentError: No reads, or one whose weights are not a softmax's.
        ShapeError: Shapes differ.

    Example:
        >>> import torch
        >>> from softdb.functional import merge, soft_read
        >>> q, keys, values = torch.randn(3, 8), torch.randn(20, 8), torch.randn(20, 2)
        >>> halves = [soft_read(q, keys[:9], values[:9]), soft_read(q, keys[9:], values[9:])]
        >>> torch.allclose(merge(halves).values, soft_read(q, keys, values).values, atol=1e-6)
        True
    """
    if isinstance(reads, Read):
        raise DtypeError("reads: expected a sequence of Read objects, got one Read; pass [first, second]")
    reads = list(reads)
    _check_mergeable(reads)
    dtype = compute_dtype(*[read.lse for read in reads], *[read.values for read in reads])
    with disable_autocast(reads[0].lse.device):
        shares, lse = softmax(torch.stack([read.lse.to(dtype) for read in reads], dim=-1))
        parts = torch.stack([read.values.to(dtype) for read in reads], dim=-1)  # (..., dv, reads)
        values = (parts * shares.unsqueeze(-2)).sum(-1).to(reads[0].values.dtype)
        masses = torch.stack([read.mass.to(dtype) for read in reads], dim=-1)
        scored = [read for read in reads if read.ids is not None]
        if len(scored) < len(reads):
            held = torch.where(masses > 0, masses.detach().ceil(), masses)
            mass = (shares.detach() * held).sum(-1).clamp(max=1.0)
            return Read(values, None, None, None, lse, mass)
        ids = torch.cat([read.ids for read in reads if read.ids is not None], dim=-1)
        scores = torch.cat([read.scores.to(dtype) for read in reads if read.scores is not None], dim=-1)
        weights = torch.cat(
            [
                read.weights.to(dtype) * shares[..., i : i + 1]
                for i, read in enumerate(reads)
                if read.weights is not None
            ],
            dim=-1,
        )
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
        total = (shares * masses).sum(-1)
        mass = straight_through(total.clamp(max=1.0), total)
        return Read(values, ids.gather(-1, order), weights.gather(-1, order), scores.gather(-1, order), lse, mass)


def answer_of(read: Read, leaves: Operands) -> Answer:
    """Return a read as `softdb.transforms` takes it."""
    members = {field.name: tensor for field in fields(Read) if isinstance(tensor := getattr(read, field.name), Tensor)}
    return Answer(members, read.normalizer, leaves)


def read_of(members: dict[str, Tensor], normalizer: str) -> Read:
    """Return the read that has these members."""
    named = {field.name: members.get(field.name) for field in fields(Read)}
    return Read(**named | {"normalizer": normalizer})  # type: ignore[arg-type]


def leaves_of(operands: Operands, wanted: Sequence[bool]) -> Operands:
    """Return the same tensors, those whose gradients are wanted as leaves of a graph."""
    return [
        value.detach().requires_grad_() if want and value is not None else value
        for value, want in zip(operands, wanted, strict=True)
    ]


def finish(read: Read, query: Tensor) -> Read:
    """``read``, its values in the dtype they are answered in."""
    dtype = answer_dtype(query)
    return read if read.values.dtype == dtype else replace(read, values=read.values.to(dtype))


def _check_mergeable(reads: list[Read]) -> None:
    if not reads:
        raise ArgumentError("reads: expected at least one Read, got none")
    for read in reads:
        if not isinstance(read, Read):
            raise DtypeError(f"reads: expected Read objects, got {describe(read)}")
        if read.normalizer != "softmax":
            raise ArgumentError(
                f"reads: expected reads with softmax weights, got one with {read.normalizer!r}; "
                "only a softmax can be put together from its parts"
            )
        if read.values.shape != reads[0].values.shape:
            raise ShapeError(
                "reads: expected values of one shape, "
                f"got {tuple(reads[0].values.shape)} and {tuple(read.values.shape)}"
            )
