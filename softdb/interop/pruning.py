"""Pruned stores: keys and values that torch.nn.utils.prune computes."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune

__all__ = ["recompute_pruned"]


def recompute_pruned(module: nn.Module) -> None:
    """Have pruning compute its tensors again, as it does before a forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())
