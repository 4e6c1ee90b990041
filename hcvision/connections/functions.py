"""Functions of autograd, called without what their calls do not need."""

import inspect
import types
from typing import Any

import torch


class AsGiven(inspect.Signature):
    """Takes arguments as they come."""

    def bind(self, *args: Any) -> Any:
        return types.SimpleNamespace(args=args, kwargs={}, apply_defaults=lambda: None)


def skip_binding(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Spare every call of a function what PyTorch does for default arguments, which ours lack: it binds them all."""
    function.forward.__signature__ = AsGiven()  # type: ignore[attr-defined]
    return function
