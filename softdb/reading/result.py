"""`Read`: the result of a read, and how reads of disjoint rows are merged."""

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
    """Result of a read of a batch of queries.

    The leading dimensions, written ``...``, are those of the query. ``values``, ``weights``, ``scores``, ``lse`` and
    ``mass`` are differentiable.

    Attributes:
        values: Blended values, (..., value_dim), in the query's dtype (under autocast: the dtype of autocast).
        ids: Ids of the reported rows, (..., k) int64, best first. If fewer than k rows may be seen, the rest is padding
            of -1. None if ``k`` was not given, in an exact read or a read with ``tolerance``. A top-k read with a
            sparse normalizer may report more than k rows.
        weights: Weights of the reported rows, (..., k); 0 at padding. None if ``ids`` is None.
        scores: Scores of the reported rows, divided by the temperature, plus the bias if there is one, (..., k); -inf
            at padding. None if ``ids`` is None.
        lse: Log-sum-exp of the scores of all rows considered, (...,); -inf where there are none.
        mass: Softmax mass of the reported rows: the fraction of the total weight of all visible rows that they hold,
            (...,). If ``normalizer`` is sparse, its weights are used instead of softmax. 1 for an exact read without
            ``k``. For a read with ``tolerance`` and without ``k``, the mass of the candidates. 0 where there is nothing
            to read; NaN where the mass is unknown.
        error: Upper bound of the relative error of ``values``, ``|values - exact| / |exact|``, (...,). It is an
            estimate from a sample, not a guarantee: it should hold for nine of ten pairs of query and sample. 0 where
            the read is exact; infinity where the sample does not exclude exact values of 0. It has no gradient. None
            unless ``tail_samples`` or ``tolerance`` was given. See docs/approximation.md for its derivation and limits.
        normalizer: Name of the normalizer that gave the weights; "hard" for a hard read.
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
    """Apply a function to every tensor of a read."""

    def apply(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return Read(
        function(read.values),
        apply(read.ids),
        apply(read.weights),
        apply(read.scores),
        function(read.lse),
        function(read.mass),
        apply(read.error),
        read.normalizer,
    )


def replace_queries(read: Read, queries: Tensor, other: Read) -> Read:
    """Replace the results of ``queries``, (b,) numbers, by the b results of ``other``."""

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


def pad_candidates(read: Read, k: int) -> Read:
    """Pad the reported rows of a read to k."""
    if read.ids is None or read.weights is None or read.scores is None:
        return read
    padding = (0, k - read.ids.shape[-1])
    ids, weights = torch.nn.functional.pad(read.ids, padding, value=-1), torch.nn.functional.pad(read.weights, padding)
    return replace(
        read, ids=ids, weights=weights, scores=torch.nn.functional.pad(read.scores, padding, value=-torch.inf)
    )


def keep_best(read: Read, k: int | None) -> Read:
    """Report only the k best rows of a read, which reports more; none if k is None."""
    if k is None:
        return replace(read, ids=None, weights=None, scores=None)
    if read.ids is None or read.weights is None or read.scores is None or read.ids.shape[-1] <= k:
        return read
    weights = read.weights[:, :k]
    return replace(read, ids=read.ids[:, :k], weights=weights, scores=read.scores[:, :k], mass=compute_mass(weights))


def rescale_to_exact(read: Read, queries: Tensor, exact: Read) -> Read:
    """Report the candidates of ``read`` as rows of an exact read.

    Args:
        read: A top-k read.
        queries: Some of its queries, (b,).
        exact: An exact read of the same queries.
    """
    scores = cast(Tensor, read.scores)[queries]
    total = exact.lse.masked_fill(exact.lse == -torch.inf, 0.0).unsqueeze(-1)
    weights = (scores - total).exp()
    return replace(
        exact,
        ids=cast(Tensor, read.ids)[queries],
        weights=weights,
        scores=scores,
        mass=compute_mass(weights),
        error=torch.zeros_like(exact.lse),
    )


def compute_mass(weights: Tensor) -> Tensor:  # (M, k) -> (M,)
    """Sum weights to a mass of at most 1."""
    total = weights.sum(-1)
    return straight_through(total.clamp(max=1.0), total)


def answer_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of ``read.values``: that of the query, or autocast's."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def merge(reads: Sequence[Read]) -> Read:
    """Merge reads of disjoint sets of rows, for the same queries.

    Equal to the softmax over the union of the rows: with m_i = softmax over i of lse_i, the mass of read i::

        values = sum_i m_i values_i,   lse = logsumexp_i lse_i

    Use it to combine a read of a local, in-graph context with a read of a store, or the reads of several shards.
    Gradients reach every tensor that the gradients of the reads reach.

    Args:
        reads: At least one `Read`. All have softmax weights and ``values`` of the same shape. The caller ensures that
            their rows are disjoint.

    Returns:
        A `Read`. If all reads have ids, it reports the rows of all reads, best first, and ``mass`` is the sum of m_i
        times the mass of read i. Otherwise ``ids`` is None, and ``mass`` is 1, or 0 where there is nothing to read. In
        both cases, ``mass`` is NaN where the mass of a read is NaN. ``error`` is None. Reads of different stores may
        report the same id for different rows; give their rows distinct ids to distinguish them.

    Raises:
        ArgumentError: There are no reads, or the weights of a read are not those of softmax.
        DtypeError: ``reads`` is not a sequence of `Read` objects.
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
        fractions, lse = softmax(torch.stack([read.lse.to(dtype) for read in reads], dim=-1))
        parts = torch.stack([read.values.to(dtype) for read in reads], dim=-1)  # (..., dv, reads)
        values = (parts * fractions.unsqueeze(-2)).sum(-1).to(reads[0].values.dtype)
        masses = torch.stack([read.mass.to(dtype) for read in reads], dim=-1)
        scored = [read for read in reads if read.ids is not None]
        if len(scored) < len(reads):
            held = torch.where(masses > 0, masses.detach().ceil(), masses)
            mass = (fractions.detach() * held).sum(-1).clamp(max=1.0)
            return Read(values, None, None, None, lse, mass)
        ids = torch.cat([read.ids for read in reads if read.ids is not None], dim=-1)
        scores = torch.cat([read.scores.to(dtype) for read in reads if read.scores is not None], dim=-1)
        weights = torch.cat(
            [
                read.weights.to(dtype) * fractions[..., i : i + 1]
                for i, read in enumerate(reads)
                if read.weights is not None
            ],
            dim=-1,
        )
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
        total = (fractions * masses).sum(-1)
        mass = straight_through(total.clamp(max=1.0), total)
        return Read(values, ids.gather(-1, order), weights.gather(-1, order), scores.gather(-1, order), lse, mass)


def make_answer(read: Read, leaves: Operands) -> Answer:
    """Convert a read to a `softdb.transforms.Answer`."""
    members = {field.name: tensor for field in fields(Read) if isinstance(tensor := getattr(read, field.name), Tensor)}
    return Answer(members, read.normalizer, leaves)


def make_read(members: dict[str, Tensor], normalizer: str) -> Read:
    """Make a read from its members."""
    named = {field.name: members.get(field.name) for field in fields(Read)}
    return Read(**named | {"normalizer": normalizer})  # type: ignore[arg-type]


def make_leaves(operands: Operands, wanted: Sequence[bool]) -> Operands:
    """Detach tensors; require gradients of the wanted ones."""
    return [
        value.detach().requires_grad_() if want and value is not None else value
        for value, want in zip(operands, wanted, strict=True)
    ]


def cast_values(read: Read, query: Tensor) -> Read:
    """Cast the values of a read to `answer_dtype`."""
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
                "merge reads with normalizer='softmax' only"
            )
        if read.values.shape != reads[0].values.shape:
            raise ShapeError(
                "reads: expected values of one shape, "
                f"got {tuple(reads[0].values.shape)} and {tuple(read.values.shape)}"
            )
