"""How PyTorch is about to use the operations of a step: run, compile, trace, export or transform them."""

import contextlib
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_operations() -> bool:
    """Whether a step has to consist of PyTorch's operations, with the gradients that autograd gives them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work.

    They take operations of PyTorch alone: a kernel would miss the batch and the tangents that a tensor carries.
    """
    if torch.compiler.is_compiling():
        return False
    levels: Any = forward_ad
    return torch._C._functorch.maybe_current_level() is not None or levels._current_level >= 0


def needs_operations_backward(grads: Sequence[Optional[Tensor]]) -> bool:
    """Whether the backward of these gradients has to consist of PyTorch's operations.

    It has for a second derivative, under a transform, and for a batch of gradients (``is_grads_batched``).
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or is_transformed() or any(grad is not None and batched(grad) for grad in grads)


def is_exporting() -> bool:
    """Whether torch.export is at work."""
    flags: Any = torch.compiler  # is_exporting() itself says yes in every torch.compile of PyTorch 2.11
    return flags._is_exporting_flag


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Operations in the types of their inputs."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
