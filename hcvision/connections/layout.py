"""How streams lie in x: side by side on its last axis.

Torch FX takes each function as one node, where it is called by way of this module (``layout.split_last``).
"""

from typing import List

import torch
from torch import Tensor


@torch.fx.wrap
def split_last(x: Tensor, parts: int) -> Tensor:
    """(..., parts * size) -> (..., parts, size), by sizes that a trace for ONNX takes from x, unlike ``unflatten``."""
    return x.reshape(list(x.shape[:-1]) + [parts, x.shape[-1] // parts])  # noqa: RUF005 - TorchScript


@torch.fx.wrap
def split_streams(x: Tensor, streams: int, stream_dim: int) -> Tensor:
    """(..., S*E) -> (..., S, E). Raises ValueError when the last axis of x is not S*E wide."""
    width = streams * stream_dim
    if not torch.jit.is_tracing() and x.shape[-1] != width:
        hint = f"; expand_streams(x, {streams}) enters the streams" if x.shape[-1] == stream_dim else ""
        raise ValueError(
            f"x must have {streams} streams of {stream_dim} on its last axis, {width} in all, "
            f"got shape {list(x.shape)}{hint}"
        )
    return split_last(x, streams)


@torch.fx.wrap
def split_output(branch_output: Tensor, streams: Tensor, views: int) -> Tensor:
    """(..., V*E) -> (..., V, E). Raises ValueError when it is not shaped as the branch input was."""
    if not torch.jit.is_tracing():
        expected = list(streams.shape[:-2]) + [views * streams.shape[-1]]  # noqa: RUF005 - TorchScript
        if list(branch_output.shape) != expected:
            raise ValueError(
                f"the branch must return the shape it was given, {expected}, got {list(branch_output.shape)}"
            )
    return split_last(branch_output, views)


@torch.fx.wrap
def average_streams(x: Tensor, rate: int) -> Tensor:
    """(..., n*E) -> (..., E), in float32 at least, in the dtype of x."""
    parts: List[Tensor] = list(split_last(x, rate).to(torch.promote_types(x.dtype, torch.float32)).unbind(-2))
    while len(parts) > 1:  # in pairs: 2, 4 or 8 equal streams add up without rounding
        last = parts[len(parts) // 2 * 2 :]
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)] + list(last)
    return (parts[0] / rate).to(x.dtype)
