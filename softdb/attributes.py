"""Properties: of modules, where they may not apply, and of objects that compute them once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

__all__ = ["ModuleWithProperties", "kept_property"]

T = TypeVar("T")


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


class kept_property(Generic[T]):
    """A property that each object computes once: `functools.cached_property`, but without a lock.

    Python 3.11 has one for all objects there: threads wait for each other, and a forked child for ever for a thread
    that it does not have.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> T:
        value = instance.__dict__[self._compute.__name__] = self._compute(instance)  # found before this from now on
        return value
