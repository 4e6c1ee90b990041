"""A block of timm with connections: how its sub-layers become branches, and the parts that many blocks share."""

import functools
import inspect
import linecache
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from hcvision.connections import has_hooks


class ConnectedBlock:
    """A block of timm whose residual adds are connections.

    Its forward is made of the branches of the subclass; the parameters of a branch after x are
    parameters of the block, in the order in which they appear::

        x = self.connection1.enter(x, self.entry_rate)
        view, carried = self.connection1.width_connection(x)
        view, carried = self.connection2.join(self.branch1(view, rope), carried)
        ...                                                     # branch3, ...
        x = self.connection2.depth_connection(self.branch2(view), carried)
        return self.connection2.leave(x, self.exit_rate)

    Tensors are channels last here, whatever they are outside (``channels_first``). A block that
    scales x itself in an add has ``carry1``, ... too: it gets the streams and the scaled streams are
    carried, where timm's scaled x went into the add.

    The steps of a connection are called by name, so that two of them can be one kernel. Where a connection has hooks,
    those of this block are called as modules instead, ``x = self.connection1(x, branch)``: hooks see the streams
    before and behind a sub-layer, (..., S*E).
    """

    adds: int  # how many branches
    sees_time = False  # whether a parameter ``time``, embeddings (B, D), goes to the steps of its connections

    entry_rate: int  # copies of x that this block enters as streams, 1 for none
    exit_rate: int  # copies that it leaves, 1 for none
    restores_dtype: bool  # streams in another type than the model's end here; see ``set_stream_dtype``
    channels_first: bool  # x is (B, C, H, W) outside

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        numbers = [k for k in range(1, 10) if hasattr(cls, f"branch{k}")]
        if numbers and numbers == list(range(1, len(numbers) + 1)) and "grafted" not in vars(cls):
            cls.adds = len(numbers)
            cls.forward = compose(cls)  # type: ignore[attr-defined]

    @staticmethod
    def dim(block: Any) -> int:
        """The channels of x."""
        return channels(block.norm1)

    @staticmethod
    def is_channels_first(block: Any) -> bool:
        """Whether the tensors between blocks are (B, C, H, W)."""
        return False

    @staticmethod
    def find_obstacle(block: Any) -> str | None:
        """Why this block has to keep its residual add, or None."""
        return None


def compose(mixin: type[ConnectedBlock]) -> Callable:
    """The forward of a block, from its branches, with a source that TorchScript and tracebacks can read."""
    extras: dict[str, inspect.Parameter] = {}
    numbers = range(1, mixin.adds + 1)
    hooked = " or ".join(f"has_hooks(self.connection{k})" for k in numbers)
    lines, calls = [], []
    time = ", time" if mixin.sees_time else ""
    for k in numbers:
        own = list(inspect.signature(getattr(mixin, f"branch{k}")).parameters.values())[2:]
        extras.update((parameter.name, parameter) for parameter in own)
        arguments = ", ".join(["view", *(parameter.name for parameter in own)])
        is_joined = k < mixin.adds and not hasattr(mixin, f"carry{k + 1}")
        if k == 1 or hasattr(mixin, f"carry{k}"):
            lines.append(f"    view, carried = self.connection{k}.width_connection(x{time})")
        if hasattr(mixin, f"carry{k}"):
            lines.append(f"    carried = self.connection{k}.carry(self.carry{k}(x), carried)")
        if is_joined:
            lines.append(f"    view, carried = self.connection{k + 1}.join(self.branch{k}({arguments}), carried{time})")
        else:
            lines.append(f"    x = self.connection{k}.depth_connection(self.branch{k}({arguments}), carried)")
        branch = ", ".join([f"self.branch{k}", *(f"{parameter.name}={parameter.name}" for parameter in own)])
        carry = f", self.carry{k}" if hasattr(mixin, f"carry{k}") else ""
        calls.append(f"    x = self.connection{k}(x, partial({branch}){carry}{', time=time' * mixin.sees_time})")
    leave = [
        "    if self.restores_dtype:",
        f"        x = x.to(self.connection{mixin.adds}.parameter_dtype())",
        f"    x = self.connection{mixin.adds}.leave(x, self.exit_rate)",
        "    return x.movedim(3, 1) if self.channels_first else x",
    ]
    lines = [
        "    if self.channels_first:",
        "        x = x.movedim(1, 3)",
        "    x = self.connection1.enter(x, self.entry_rate)",
        "    if torch.jit.is_scripting():",
        "        pass",
        f"    elif {hooked}:",
        *(f"    {line}" for line in calls + leave),
        *lines,
        *leave,
    ]
    last = ["time: Optional[torch.Tensor] = None"] if mixin.sees_time else []
    signature = ", ".join(["self", "x: torch.Tensor", *map(str, extras.values()), *last])
    source = f"def forward({signature}) -> torch.Tensor:\n" + "\n".join(lines) + "\n"
    scope = {"torch": torch, "Optional": Optional, "has_hooks": has_hooks, "partial": functools.partial}
    filename = f"<forward of {mixin.__module__}.{mixin.__qualname__}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"]  # type: ignore[return-value]


def channels(norm: Any) -> int:
    """What a norm normalises over."""
    shape = getattr(norm, "normalized_shape", None) or next(norm.parameters()).shape
    return shape[-1]


# Branches that several blocks share
class LayerScaleMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PlainMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x)))


class GammaMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        x = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            x = self.gamma_2 * x
        return self.drop_path2(x)


class ChannelMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp_channels(self.norm2(x)))


class PostNormMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))
