"""Stores whose keys and values are computed by torch.nn.utils.prune."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

__all__ = ["recompute_pruned"]


def recompute_pruned(module: nn.Module) -> None:
    """Recompute the tensors that pruning computes before every forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())
