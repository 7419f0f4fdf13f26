"""Modules whose properties may not apply, and a cached property without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

__all__ = ["ModuleWithProperties", "lock_free_cached_property"]

T = TypeVar("T")


class ModuleWithProperties(nn.Module):
    """Module whose properties can raise AttributeErrors with their own messages.

    If a property raises an AttributeError, Python calls ``__getattr__``. `torch.nn.Module.__getattr__` would raise
    another AttributeError, which only says that the attribute does not exist.
    """

    def __getattr__(self, name: str) -> Any:
        # Repeats torch's lookup instead of calling it, because every read looks up keys and values here.
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
            return own.__get__(self)  # raises the error of the property again
        return super().__getattr__(name)


class lock_free_cached_property(Generic[T]):
    """Property that is computed once per object, without a lock.

    `functools.cached_property` of Python 3.11 holds one lock for all objects: threads wait for each other, and a forked
    child waits forever if another thread of the parent held the lock.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> T:
        # The instance dict is searched before this descriptor, so the value is found there from now on.
        value = instance.__dict__[self._compute.__name__] = self._compute(instance)
        return value
