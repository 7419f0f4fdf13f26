"""`ContextMemory`: a layer that reads the past tokens of its sequences."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from softdb._checks import (
    INTEGER_DTYPES,
    check_float_tensor,
    check_ids,
    check_positive,
    check_shape,
    describe,
    is_out_of_memory,
    refuse_unknown_keywords,
)
from softdb.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ShapeError,
    SoftDBError,
    StaleReadError,
    TransformError,
)
from softdb.functional import soft_read
from softdb.layers.context_state import ContextState, Ring, Stores
from softdb.layers.queries import Queries, make_output, reset_output
from softdb.reading.result import Read, merge
from softdb.transforms import (
    check_no_tangent,
    disable_compile,
    is_active,
    is_batched,
    is_forward_mode,
    is_traced,
    is_wrapped,
    suspend_transforms,
    unwrap_tensors,
)

__all__ = ["ContextMemory"]


UNTRACED_MESSAGE = (
    "softdb: ContextMemory: expected to run outside of graphs of torch.compile and torch.export, since it stores the "
    "tokens of each call; leave out fullgraph=True"
)


@refuse_unknown_keywords
class ContextMemory(nn.Module):
    r"""Attend causally to the current segment and to past segments of the sequence.

    Each call takes the next segment of the same sequences, in the same order in the batch. The layer stores the tokens
    of all segments; the stored tokens are called the past. Call `reset` before each batch of new sequences. Otherwise
    the new sequences attend to tokens of the previous ones, which the layer cannot detect. See the second example.

    Training and evaluation have separate pasts. After ``eval()`` the layer reads and writes the past of evaluation,
    which is empty at first. After ``train()`` it continues with the past of training. `reset` clears only the past of
    the current mode, so call it at the start of every validation, too.

    A sequence is split into segments, one per call. Let K and V be the keys and values of the last ``rows`` tokens
    before this segment, and k and v the keys and values of this segment::

        q = (x @ W_Q.T).unflatten(-1, (heads, key_dim));  k = x @ W_K.T;  v = x @ W_V.T
        a[t] = softmax(q[t] @ cat([K, k[: t + 1]]).T / sqrt(key_dim)) @ cat([V, v[: t + 1]])
        y = a.flatten(-2) @ W_O.T

    For a sequence of up to ``rows`` tokens the result equals full causal attention, for any length of the segments.
    All heads share one key and one value per token. Keys and queries are both normalized (with learned gains), so that
    current queries still match keys that were computed some steps ago. The layer has no positional encoding: add one to
    x if positions within a segment matter.

    Stored tokens are detached from the graph: gradients reach W_Q through the past and the segment, and W_K and W_V
    through the segment only. When the memory is full, each new token replaces the oldest. The tokens of a segment are
    stored at the next call. Call ``backward`` of a segment before the next forward. Later, ``backward`` raises
    `softdb.StaleReadError` if tokens that it needs have been overwritten. The weights over all tokens are never
    allocated.

    The past is part of ``state_dict``, so a resumed run continues exactly, and ``.to`` moves it. It is not a buffer,
    since DistributedDataParallel would overwrite the buffers of every rank with those of rank 0. In ``state_dict`` the
    keys of the past of training start with ``past.`` in either mode. Those of the past of evaluation start with
    ``evaluation_past.``; they are left out if it is empty. A loaded past is dropped, with a warning, if the next
    segment has another number of sequences.

    Args:
        dim: Width of input and output.
        rows: Number of past tokens that are kept per sequence. Their storage is allocated at the first call in each of
            the two modes: ``rows * (key_dim + value_dim)`` numbers per sequence.
        heads: Number of heads. Each computes one query per token.
        key_dim: Width of queries and keys.
        value_dim: Width of values; default: ``key_dim``.
        k: Number of past tokens that each query attends to: the k with the highest scores, which an index finds for
            each sequence. If None, each query attends to all past tokens, and the cost of a segment is proportional to
            ``rows``. Up to about ten thousand tokens, None is faster.
        device, dtype: Device and dtype of the parameters and of the stored tokens, as for any module.

    Raises:
        ArgumentError, DtypeError: An argument is invalid.

    Source: Wu et al. 2022 (arXiv 2203.08913); one key for all heads: Shazeer 2019 (arXiv 1911.02150); normalized
    queries and keys: Henry et al. 2020 (arXiv 2010.04245); the parts are merged by log-sum-exp, as in FlashAttention
    (Dao et al. 2022, arXiv 2205.14135).

    Example:
        >>> import torch
        >>> from softdb.layers import ContextMemory
        >>> layer = ContextMemory(32, rows=512, heads=2, key_dim=16)
        >>> text = torch.randn(3, 100, 32)                       # three sequences
        >>> parts = [layer(segment) for segment in text.split(25, dim=1)]
        >>> layer.reset()
        >>> torch.allclose(torch.cat(parts, dim=1), layer(text), atol=1e-5)
        True

        Train on batches of sequences, each split into segments, and validate in between:

        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> validation = torch.randn(5, 100, 32)                 # of another number of sequences
        >>> for batch in torch.randn(2, 3, 100, 32):
        ...     layer.reset()                                    # new sequences follow
        ...     for segment in batch.split(25, dim=1):           # the next tokens of the same sequences
        ...         layer(segment).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     layer.eval().reset()                             # keeps the past of training
        ...     with torch.no_grad():
        ...         losses = [layer(segment).square().mean() for segment in validation.split(25, dim=1)]
        ...     _ = layer.train()
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        *,
        heads: int = 4,
        key_dim: int = 64,
        value_dim: int | None = None,
        k: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the layer; ``help(ContextMemory)`` describes the arguments."""
        super().__init__()
        self.dim, self.rows = check_positive("dim", dim), check_positive("rows", rows)
        self.heads, self.key_dim = check_positive("heads", heads), check_positive("key_dim", key_dim)
        self.value_dim = self.key_dim if value_dim is None else check_positive("value_dim", value_dim)
        self.k = None if k is None else check_positive("k", k)
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = Queries(self.dim, self.heads, self.key_dim, "layer", **factory_kwargs)
        self.keys = Queries(self.dim, 1, self.key_dim, "layer", **factory_kwargs)
        self.values = nn.Linear(self.dim, self.value_dim, bias=False, **factory_kwargs)
        self.output = make_output(self.heads, self.value_dim, self.dim, **factory_kwargs)
        self._past, self._evaluation_past = self._new_past(), self._new_past()
        self.reset_parameters()

    def _new_past(self) -> ContextState:
        """Create an empty past."""
        shape = self.rows, self.key_dim, self.value_dim
        return ContextState(Ring(*shape) if self.k is None else Stores(*shape, self.k))

    @property
    def _current_past(self) -> ContextState:
        """The past of the current mode."""
        return self._past if self.training else self._evaluation_past

    def reset_parameters(self) -> None:
        """Draw new weights, and clear the past of training and of evaluation."""
        self.queries.reset_parameters()
        self.keys.reset_parameters()
        nn.init.normal_(self.values.weight, std=self.dim**-0.5)
        reset_output(self.output)
        self._past.clear()
        self._evaluation_past.clear()

    def reset(self, sequences: Tensor | Sequence[int] | None = None) -> None:
        """Forget all sequences, or some sequences of the batch.

        Call it before the first segment of new sequences. It clears the past of the current mode: in training mode
        the past of training, after ``eval()`` the past of evaluation. After all sequences have been forgotten, the next
        batch may have another size.

        Args:
            sequences: Indices into the batch, (m,) int64, or a mask, (batch,) bool; None for all sequences.

        Raises:
            ArgumentError: An index is outside of the batch.
            DtypeError, ShapeError: ``sequences`` has the wrong dtype or shape.
        """
        past = self._current_past
        if sequences is None:
            past.clear()
            return
        if isinstance(sequences, Tensor) and sequences.dtype == torch.bool:
            check_shape("sequences", sequences, (past.batch,))
            sequences = sequences.nonzero().squeeze(-1)
        indices = check_ids("sequences", sequences, repeats=True).reshape(-1)
        if len(indices) and int(indices.max()) >= past.batch:
            raise ArgumentError(f"sequences: expected indices into a batch of {past.batch}, got {indices.tolist()[:5]}")
        past.forget(indices)

    @overload
    def forward(
        self, x: Tensor, *, documents: Tensor | None = None, write: bool = True, return_read: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, *, documents: Tensor | None = None, write: bool = True, return_read: Literal[True]
    ) -> tuple[Tensor, Read]: ...

    @overload
    def forward(
        self, x: Tensor, *, documents: Tensor | None = None, write: bool = True, return_read: bool
    ) -> Tensor | tuple[Tensor, Read]: ...

    def forward(
        self, x: Tensor, *, documents: Tensor | None = None, write: bool = True, return_read: bool = False
    ) -> Tensor | tuple[Tensor, Read]:
        """Compute causal attention over the past and the segment, and store the segment.

        Args:
            x: The next segment of every sequence, (batch, n, dim); the first segment after `reset`.
            documents: The document number of each sequence or of each token, integers of shape (batch,) or (batch, n).
                Tokens attend only to tokens of their own document. -1 marks padding: it attends to no token, and no
                token attends to it. Default: document 0 for all. Padding is stored in rows, except in a layer with
                ``k``.
            write: Whether to store the segment. If no call stores its segment, the layer computes causal attention
                within each segment.
            return_read: Whether to return the read as well. Its leading shape is (batch, heads, n).

        Returns:
            The output, (batch, n, dim); with ``return_read`` a tuple of the output and a `softdb.Read`.

        Raises:
            ShapeError: A shape is wrong, or ``x`` has another number of sequences than the past: call `reset` first. If
                the past was loaded and no segment has been stored since, the past is dropped instead, with a warning.
            DtypeError, DeviceError, NonFiniteError: An argument is invalid.
            StaleReadError: In backward, if tokens that the read used have been overwritten since, or if activation
                checkpointing recomputes a segment other than the last.
            TransformError: ``write`` is True under torch.vmap; a transform of torch.func wraps ``documents``; in
                forward mode; under torch.export.
        """
        if is_active() and not is_wrapped(x, documents, *self.parameters()):
            with suspend_transforms():
                return self.forward(x, documents=documents, write=write, return_read=return_read)
        if is_traced(x) and not torch.compiler.is_dynamo_compiling():
            raise TransformError(UNTRACED_MESSAGE)
        check_float_tensor("x", x, (None, None, self.dim))
        queries = self.queries(x).squeeze(-2).transpose(1, 2)  # (batch, heads, n, key_dim)
        keys = self.keys(x)[..., 0, 0, :]  # (batch, n, key_dim)
        values = self.values(x)
        dtype = self.values.weight.dtype if write else None
        attend = _attend_outside if torch.compiler.is_dynamo_compiling() else _attend
        read: Read = attend(self._current_past, queries, keys, values, documents, dtype)
        y: Tensor = self.output(read.values.transpose(1, 2).flatten(-2))
        return (y, read) if return_read else y

    if TYPE_CHECKING:
        __call__ = forward  # torch.nn.Module types it as Callable[..., Any]

    def extra_repr(self) -> str:
        """Return the options that ``repr`` shows."""
        k = "" if self.k is None else f", k={self.k}"
        return f"dim={self.dim}, rows={self.rows}, heads={self.heads}{k}, sequences={self._current_past.batch}"

    # -- module conventions ----------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> ContextMemory:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._past.apply(fn)
        self._evaluation_past.apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_evaluation_past" not in self.__dict__:  # Older pickles have one past for both modes.
            self._evaluation_past = self._new_past()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        pasts = {"past.": self._past}
        if self._evaluation_past.batch:
            pasts["evaluation_past."] = self._evaluation_past
        for start, past in pasts.items():
            for name, tensor in past.state(self.values.weight).items():
                # Copy: later segments are written to the same rows, and would change parts of the saved tensors.
                destination[f"{prefix}{start}{name}"] = tensor.detach().clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        starts = (f"{prefix}past.", f"{prefix}evaluation_past.")
        rest = {name: tensor for name, tensor in state_dict.items() if not name.startswith(starts)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # With assign=True, torch assigns Parameters after this call, so `self.values.weight` may still be the old one.
        like = self.values.weight
        if local_metadata.get("assign_to_params_buffers", False):
            like = state_dict.get(f"{prefix}values.weight", like)
        complete = True
        for start, past in zip(starts, (self._past, self._evaluation_past), strict=True):
            given = {name[len(start) :]: tensor for name, tensor in state_dict.items() if name.startswith(start)}
            unexpected = {name for name in given if not past.accepts_name(name)}
            unexpected_keys += [start + name for name in sorted(unexpected)]
            if past is self._evaluation_past and not given:  # An empty past of evaluation is not saved.
                if complete:
                    past.clear()
                continue
            missing = past.required_names - given.keys()
            missing_keys += [start + name for name in sorted(missing)]
            complete = complete and not missing
            if missing:
                continue
            try:
                past.load({name: given[name] for name in given if name not in unexpected}, start, like)
            except (SoftDBError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                error_msgs.append(
                    f"{error}; to load weights only, remove the keys that start with {start!r} and pass strict=False"
                )


def _attend(
    past: ContextState,
    queries: Tensor,  # (batch, heads, n, key_dim)
    keys: Tensor,  # (batch, n, key_dim)
    values: Tensor,  # (batch, n, value_dim)
    documents: Tensor | None,
    dtype: torch.dtype | None,
) -> Read:
    """Read a segment and the past; store the segment in ``dtype`` unless it is None."""
    if is_forward_mode():
        check_no_tangent(queries, keys, values)
    if is_active():
        return _attend_under_transform(past, queries, keys, values, documents, dtype)
    batch, count = keys.shape[:2]
    is_recomputing = torch._C._current_graph_task_id() != -1  # Only activation checkpointing runs within a backward.
    documents = _check_documents(documents, batch, count, keys.device)
    if past.batch not in (0, batch):
        if not past.is_loaded or is_recomputing or batch == 0:
            _check_batch(past, batch)
        warnings.warn(
            f"x: expected {past.batch} sequences, as in the loaded past of the ContextMemory, got {batch}; the past is "
            "dropped; call reset() after load_state_dict() before new sequences",
            UserWarning,
            stacklevel=2,
        )
        past.clear()
    if is_recomputing and not past.is_recompute(keys):
        raise StaleReadError(
            "x: expected activation checkpointing to recompute the last segment that the memory read, got another one, "
            "so the result would differ; call backward() before the next segment"
        )
    if not is_recomputing:
        past.flush_segment()
        past.record_segment(keys)
    read = _attend_to_segment(queries, keys, values, documents)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and not is_recomputing and batch:
        past.remember(keys, values, documents, dtype)
    return read


def _attend_under_transform(
    past: ContextState,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Tensor | None,
    dtype: torch.dtype | None,
) -> Read:
    """Read a segment and the past under a transform of torch.func.

    Tokens are stored as plain tensors, detached from the transform.
    """
    if dtype is not None and any(map(is_batched, (keys, values))):
        raise TransformError(
            "write: expected False under torch.vmap, since a ContextMemory cannot store a segment for each sample; "
            "pass write=False, or pass the samples as sequences of x"
        )
    if is_wrapped(documents):
        raise TransformError(
            "documents: expected a tensor that no transform of torch.func wraps; pass documents from outside of the "
            "transformed function"
        )
    batch, count = keys.shape[:2]
    with suspend_transforms():
        _check_batch(past, batch)
        documents = _check_documents(documents, batch, count, keys.device)
        past.flush_segment()
    read = _attend_to_segment(queries, keys, values, documents)
    before = past.read(queries, documents)
    if before is not None:
        read = merge([before, read])
    if dtype is not None and batch:
        kept = unwrap_tensors("keys", keys), unwrap_tensors("values", values)
        with suspend_transforms():
            past.remember(*kept, documents, dtype)
    return read


def _check_batch(past: ContextState, batch: int) -> None:
    """Raise unless the past is empty or has ``batch`` sequences."""
    if past.batch not in (0, batch):
        raise ShapeError(
            f"x: expected {past.batch} sequences, as in the past, got {batch}; call reset() before new sequences"
        )


def _attend_to_segment(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None) -> Read:
    """Compute causal attention within a segment, (batch, heads, n)."""
    count = keys.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril()
    if documents is not None:
        own = documents[:, None, :, None]
        mask = mask & (own == documents[:, None, None, :]) & (own >= 0)
    return soft_read(queries, keys.unsqueeze(1), values.unsqueeze(1), mask=mask)


_attend_outside = disable_compile(UNTRACED_MESSAGE)(_attend)


def _check_documents(documents: object, batch: int, count: int, device: torch.device) -> Tensor | None:
    """Check ``documents`` and return them as (batch, 1 or n)."""
    if documents is None:
        return None
    if not isinstance(documents, Tensor) or documents.dtype not in INTEGER_DTYPES:
        raise DtypeError(f"documents: expected an int64 tensor, got {describe(documents)}")
    if documents.is_meta:
        raise DeviceError("documents: expected a tensor with data, got one on the meta device; pass one with data")
    if documents.shape not in ((batch,), (batch, count)):
        raise ShapeError(
            f"documents: expected shape ({batch},) or ({batch}, {count}), one number per sequence or per token, "
            f"got {tuple(documents.shape)}"
        )
    given = documents.to(device, torch.int64).reshape(batch, -1)
    if given.numel() and int(given.min()) < -1:
        raise ArgumentError(f"documents: expected numbers of at least 0, or -1 for padding, got {int(given.min())}")
    return given
