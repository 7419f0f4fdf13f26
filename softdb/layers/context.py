"""`ContextMemory`: a layer that reads the past tokens of its sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from softdb._checks import (
    check_float_tensor,
    check_ids,
    check_int,
    check_positive,
    check_shape,
    is_out_of_memory,
    refuse_unknown_keywords,
)
from softdb.errors import ArgumentError, SoftDBError, TransformError
from softdb.layers.context_attention import UNTRACED_MESSAGE, attend, attend_outside
from softdb.layers.context_state import ContextState, Ring, Stores
from softdb.layers.queries import Queries, make_output, reset_output
from softdb.layers.temperature import LayerWithTemperature, Temperature
from softdb.reading.result import Read
from softdb.transforms import is_active, is_traced, is_wrapped, suspend_transforms

__all__ = ["ContextMemory"]


@refuse_unknown_keywords
class ContextMemory(LayerWithTemperature):
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
        a[t] = softmax(q[t] @ cat([K, k[: t + 1]]).T / sqrt(key_dim) / temperature) @ cat([V, v[: t + 1]])
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

    To generate text, `repeat_interleave` and `reorder` follow the hypotheses of a beam search, `crop` drops the tokens
    that speculative decoding rejects, and calls under `paused` store nothing.

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
        temperature: Number above 0 that divides the scores, or "learnable": one number per head, which is the
            exponential of the Parameter ``log_temperature``, (heads,), and starts at 1.
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
        temperature: Temperature = 1.0,
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
        self._make_temperature(temperature, self.heads, **factory_kwargs)
        self._past, self._evaluation_past = self._new_past(), self._new_past()
        self._pauses = 0
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
        self._reset_temperature()
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
        past.forget(_check_indices("sequences", sequences, past.batch))

    @property
    def length(self) -> int:
        """Number of tokens of each sequence since `reset`, in the current mode.

        Padding and forgotten tokens count. At most the last ``rows`` of them are stored.
        """
        return self._current_past.length

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Read the past without storing segments, until the block ends.

        Each call in the block is a call with ``write=False``: it attends to the past and to its own segment, and the
        next call does not attend to that segment. The first call in the block still stores the last segment before the
        block, as every call does; if the memory is full, its tokens replace the oldest ones. Blocks may be nested.
        ``reset``, `crop` and `reorder` still change the past.

        Example:
            >>> import torch
            >>> from softdb.layers import ContextMemory
            >>> layer = ContextMemory(32, rows=512).eval()
            >>> _ = layer(torch.randn(3, 100, 32))                   # three prompts
            >>> draft = torch.randn(3, 5, 32)
            >>> with layer.paused():
            ...     first, again = layer(draft), layer(draft)
            >>> torch.equal(first, again), layer.length
            (True, 100)
        """
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def reorder(self, indices: Tensor | Sequence[int]) -> None:
        """Replace sequence i of the batch by sequence ``indices[i]``.

        Equal, for the keys, values and documents of the past, to::

            past = past[indices]                                     # (batch, length, ...) -> (m, length, ...)

        In a beam search, ``indices[i]`` is the old hypothesis that the new hypothesis i continues. An index may occur
        several times or not at all, so the size of the batch may change. Like `reset`, it changes only the past of the
        current mode.

        Call it before or after the ``backward`` of the last segment: the gradients are the same, since earlier reads
        keep their tokens. With activation checkpointing, call ``backward`` first; otherwise it raises
        `softdb.StaleReadError`. The cost is that of a copy of the past, ``m * rows * (key_dim + value_dim)`` numbers;
        with ``k``, only the sequences that occur repeatedly are copied, with their index.

        Args:
            indices: (m,) int64, at least one; each below the number of sequences.

        Raises:
            ArgumentError: There is no index, or an index is outside of the batch.
            DtypeError: ``indices`` are not integers.

        Source: ``reorder_cache`` of Hugging Face transformers.

        Example:
            >>> import torch
            >>> from softdb.layers import ContextMemory
            >>> layer = ContextMemory(32, rows=512).eval()
            >>> _ = layer(torch.randn(1, 100, 32))                   # the prompt
            >>> layer.repeat_interleave(3)                           # three hypotheses
            >>> for token in torch.randn(4, 3, 1, 32):
            ...     y = layer(token)                                 # scores of the next token of each hypothesis
            ...     layer.reorder([0, 0, 2])                         # hypothesis 0 continues twice, 1 not at all
            >>> y.shape, layer.length
            (torch.Size([3, 1, 32]), 104)
        """
        past = self._current_past
        chosen = _check_indices("indices", indices, past.batch)
        if not len(chosen):
            raise ArgumentError("indices: expected at least one sequence, got none; call reset() to forget all")
        past.select(chosen)

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch, as `torch.repeat_interleave` does.

        Equal to ``reorder(torch.arange(batch).repeat_interleave(repeats))``, at its cost. An empty past stays empty.

        Args:
            repeats: Number of copies of each sequence, such as the number of beams.

        Raises:
            ArgumentError: ``repeats`` is below 1.

        Source: ``batch_repeat_interleave`` of Hugging Face transformers.
        """
        repeats, past = check_positive("repeats", repeats), self._current_past
        if past.batch:
            past.select(torch.arange(past.batch, device="cpu").repeat_interleave(repeats))

    def crop(self, n: int) -> None:
        """Drop the newest tokens of every sequence, so that the first n remain.

        Equal, for the keys, values and documents of the past, to::

            past = past[:, :n]                                       # (batch, length, ...) -> (batch, n, ...)

        At most the last ``rows`` of the n tokens are stored. In speculative decoding, call it after a segment of
        proposed tokens: ``crop(-m)`` drops the m tokens that were rejected. Tokens of the last segment replace older
        tokens only at the next call, even if that call is under `paused`. Until then, you can drop them and lose no
        older token. If you drop more, fewer than ``rows`` tokens may remain, because replaced tokens do not come back.

        Call it before or after the ``backward`` of the last segment, as for `reorder`. The cost is constant if only
        tokens of the last segment are dropped; otherwise it is that of a copy of the past, or, with ``k``, that of
        deleting the tokens.

        Args:
            n: Number of tokens since `reset` that remain. If n is negative, -n tokens are dropped. If n is at least
                `length`, nothing changes.

        Raises:
            DtypeError: n is no integer.

        Source: ``crop`` of Hugging Face transformers; speculative decoding: Leviathan et al. 2023 (arXiv 2211.17192).

        Example:
            >>> import torch
            >>> from softdb.layers import ContextMemory
            >>> layer = ContextMemory(32, rows=512).eval()
            >>> _ = layer(torch.randn(1, 100, 32))                   # the prompt
            >>> y = layer(torch.randn(1, 5, 32))                     # five proposed tokens
            >>> layer.crop(-2)                                       # the last two are rejected
            >>> layer.length
            103
        """
        past, n = self._current_past, check_int("n", n, least=-(2**63))
        remaining = max(0, past.length + n if n < 0 else n)
        if remaining < past.length:
            past.crop(remaining)

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
                token attends to it; on a GPU any number below 0 does. Default: document 0 for all. Padding is stored in
                rows, except in a layer with ``k``.
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
        queries, keys, values = self._project(x)
        dtype = self.values.weight.dtype if write and not self._pauses else None
        attends = attend_outside if torch.compiler.is_dynamo_compiling() else attend
        read: Read = attends(self._current_past, queries, keys, values, documents, dtype)
        y: Tensor = self.output(read.values.transpose(1, 2).flatten(-2))
        return (y, read) if return_read else y

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, (batch, heads, n, key_dim), keys and values, (batch, n, ...)."""
        queries = self._divide_by_temperature(self.queries(x).squeeze(-2).transpose(1, 2), 2)
        return queries, self.keys(x)[..., 0, 0, :], self.values(x)

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
        super().__setstate__(state)
        self._pauses = 0  # Copies made within `paused` are not paused.
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


def _check_indices(name: str, indices: object, batch: int) -> Tensor:
    """Return indices of sequences as (m,) int64 on the CPU."""
    checked = check_ids(name, indices, repeats=True).reshape(-1)
    if len(checked) and int(checked.max()) >= batch:
        raise ArgumentError(f"{name}: expected indices into a batch of {batch}, got {checked.tolist()[:5]}")
    return checked
