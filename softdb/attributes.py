"""Attributes of modules whose properties may not apply."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ModuleWithProperties"]


class ModuleWithProperties(nn.Module):
    """A module whose properties raise AttributeErrors with messages of their own.

    Where a property raises one, Python calls ``__getattr__``, and torch's own raises another AttributeError, which says
    only that there is no such attribute.
    """

    def __getattr__(self, name: str) -> Any:
        # The same steps as torch's, and not a call of it: keys and values are looked up here on the way of every read.
        state = self.__dict__
        if "_parameters" in state:
            parameters = state["_parameters"]
            if name in parameters:
                return parameters[name]
        if "_buffers" in state:
            buffers = state["_buffers"]
            if name in buffers:
                return buffers[name]
        if "_modules" in state:
            modules = state["_modules"]
            if name in modules:
                return modules[name]
        own = getattr(type(self), name, None)
        if isinstance(own, property):
            return own.__get__(self)  # raises its error again
        return super().__getattr__(name)
