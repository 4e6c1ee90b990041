"""Give a module another class without building it anew, and take that back."""

import functools
import inspect
from types import FunctionType
from typing import Any, SupportsIndex

from torch import nn


class Grafted:
    """Between a mixin and a module's own class. Pickled and copied by that pair."""

    grafted: tuple[type, type]

    def __reduce_ex__(self, protocol: SupportsIndex):
        return make_instance, type(self).grafted, *super().__reduce_ex__(protocol)[2:]


@functools.cache
def make_subclass(mixin: Any, cls: Any) -> Any:
    annotations = {**getattr(cls, "__annotations__", {}), **inspect.get_annotations(mixin)}
    namespace = {
        "__module__": mixin.__module__,
        "__doc__": cls.__doc__,
        "__annotations__": annotations,
        "grafted": (mixin, cls),
    }
    for name in ("forward", "forward_cls"):
        if hasattr(cls, name):
            namespace[f"base_{name}"] = rename_function(getattr(cls, name), f"base_{name}")
    return type(f"Connected{cls.__name__}", (mixin, Grafted, cls), namespace)


def rename_function(function: FunctionType, name: str) -> FunctionType:
    """The same code under another name, which TorchScript takes from the function, not the attribute."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__, copy.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
    return copy


def make_instance(mixin: type, cls: type) -> nn.Module:
    subclass = make_subclass(mixin, cls)
    return subclass.__new__(subclass)


def graft(module: nn.Module, mixin: type, **attributes: Any) -> None:
    cls: Any = type(module)
    module.__class__ = make_subclass(mixin, cls)
    for name, value in attributes.items():
        setattr(module, name, value)


def ungraft(module: Any, *attributes: str) -> None:
    module.__class__ = own_class(module)
    for name in attributes:
        delattr(module, name)


def own_class(module: nn.Module) -> type:
    """The class that timm gave the module."""
    return type(module).grafted[1] if isinstance(module, Grafted) else type(module)
