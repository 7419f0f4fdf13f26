"""Attention kernels in plain torch, with the quirks of the memory-efficient kernels for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softdb.kernels.attention import AttentionKernels


def _scores(query: Tensor, keys: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    scores = scale * query @ keys.mT
    if bias is not None:
        scores = scores + bias
    shown = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~shown, -torch.inf) if is_causal else scores


def _naive(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Compute attention as the memory-efficient kernel: a query that sees nothing gets NaN, lse is padded to 32."""
    assert all(tensor.shape[-1] % 8 == 0 and tensor.stride(-1) == 1 for tensor in (query, keys, values))
    assert bias is None or bias.stride(-2) % 16 == 0
    scores = _scores(query, keys, bias, is_causal, scale)
    lse = torch.full(
        (*query.shape[:2], -(-query.shape[-2] // 32) * 32), torch.nan, dtype=query.dtype, device=query.device
    )
    lse[..., : query.shape[-2]] = scores.logsumexp(-1)
    return torch.softmax(scores, -1) @ values, lse, ("state",)


def _naive_backward(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: tuple[Any, ...],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    assert state == ("state",)
    scores = _scores(query, keys, bias, is_causal, scale)
    weights = (scores - lse[..., : query.shape[-2], None]).exp()
    grad_scores = weights * (gradient @ values.mT - (gradient * out).sum(-1, keepdim=True)) * scale
    return grad_scores @ keys, grad_scores.mT @ query, weights.mT @ gradient


NAIVE = AttentionKernels(_naive, _naive_backward, needs_equal_widths=False)
