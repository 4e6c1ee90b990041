"""The seam: what a connection is, and the residual add as one."""

from collections.abc import Callable
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import layout


def expand_streams(x: Tensor, rate: int) -> Tensor:
    """Enter the streams: n copies of x side by side (HC alg. 2). (..., E) -> (..., n*E)."""
    return torch.cat([x] * rate, dim=-1) if rate > 1 else x


def reduce_streams(x: Tensor, rate: int) -> Tensor:
    """Leave the streams: their mean. (..., n*E) -> (..., E).

    The paper takes the sum (HC alg. 2). The final norm that follows makes the two equal up to its
    eps, and only the mean makes a converted pretrained model exactly itself.
    """
    return layout.average_streams(x, rate) if rate > 1 else x


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks wait for a call of the module: its own, or those of every module."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(own) or nn.modules.module._has_any_global_hook()


class Connection(nn.Module):
    """What all connections have: ``dim``, ``streams`` S, ``views`` V, and ``width`` = S * dim / V.

    ``width`` is the size of the last axis of x, the tensor between blocks.
    """

    copies: int  # of x that are entered, 1 where x is its own streams
    stream_dtype: Any = None  # that streams are stored in, None for that of x; see ``set_stream_dtype``
    tap = "mean"  # what of x is the state of the model behind a block: the mean of its copies, their sum, or the last
    undecayed: tuple[str, ...] = ()  # parameters that must not decay
    has_entry = False  # whether ``enter`` has parameters
    has_exit = False  # whether ``leave`` has parameters
    starts_as_residual = True  # whether it is the residual add at its initial values
    ways = 1  # mixtures that the branch is given, side by side: for queries, keys and values apart
    needs_ways = False  # whether there are such in some blocks
    takes_scaled = True  # whether a block may scale x where it is carried

    def __init__(self, dim: int, streams: int, views: int):
        super().__init__()
        self.dim = dim
        self.streams = streams
        self.views = views
        self.width = streams * (dim // views)
        self.copies = streams // views

    @torch.jit.ignore
    def forward(
        self,
        x: Tensor,
        branch: Callable[[Tensor], Tensor],
        carry: Callable[[Tensor], Tensor] | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Do what ``x + branch(x)`` did, or ``carry(x) + branch(x)``.

        Args:
            x: the streams, (..., S*E).
            branch: the sub-layer with its pre-norm, (..., V*E) -> (..., V*E).
            carry: what the add does to x itself, (..., S*E) -> (..., S*E); see the method of that name.
            time: embeddings of the images' times, (B, D), for connections that see them.

        Returns:
            The next streams, (..., S*E), in the dtype of x.

        Raises:
            ValueError: x is not S*E wide, or the branch returned another shape than it was given.
        """
        branch_input, carried = self.width_connection(x, time)
        if carry is not None:
            carried = self.carry(carry(x), carried)
        return self.depth_connection(branch(branch_input), carried)

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """Before the first sub-layer: the streams of x, (..., dim) -> (..., width); x itself at a rate of 1."""
        return expand_streams(x, rate)

    def leave(self, x: Tensor, rate: int) -> Tensor:
        """Behind the last one: what ``enter`` does undone, (..., width) -> (..., dim)."""
        return reduce_streams(x, rate)

    @torch.jit.ignore
    def show_exit(self, x: Tensor) -> Tensor | None:
        """How much ``leave`` takes of each stream of x, (..., S); None where that is their mean."""
        return None

    @torch.jit.ignore
    def continues(self, before: "Connection") -> bool:
        """Whether the streams that another connection leaves are those that this one reads."""
        mine, others = ((c.copies, c.dim, c.streams, c.views, c.stream_dtype, c.tap) for c in (self, before))
        return mine == others

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: it would erode A_r, which starts as I."""
        return {name for name, _ in self.named_parameters() if name in self.undecayed}

    def width_connection(self, x: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Any]:
        raise NotImplementedError

    def depth_connection(self, branch_output: Tensor, carried: Any) -> Tensor:
        raise NotImplementedError

    def carry(self, x: Tensor, carried: Any) -> Any:
        raise NotImplementedError

    def join(self, branch_output: Tensor, carried: Any, time: Optional[Tensor] = None) -> Tuple[Tensor, Any]:
        raise NotImplementedError


class Residual(Connection):
    """The residual add itself, ``x + branch(x)`` on (..., dim), without a parameter."""

    def __init__(self, dim: int):
        super().__init__(dim, streams=1, views=1)

    def weights(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """alpha = [[1, 1]] and beta = [1] for every token: (..., 1, 2) and (..., 1)."""
        beta = torch.ones_like(layout.split_streams(x, 1, self.dim)[..., 0])
        return torch.stack([beta, beta], dim=-1), beta

    def width_connection(self, x: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """The branch input is x, and x is carried."""
        x = layout.split_streams(x, 1, self.dim).squeeze(-2)
        return x, x

    def depth_connection(self, branch_output: Tensor, carried: Tensor) -> Tensor:
        """carried + branch_output, both (..., dim)."""
        return carried + layout.split_output(branch_output, carried.unsqueeze(-2), 1).squeeze(-2)

    def carry(self, x: Tensor, carried: Tensor) -> Tensor:
        """x."""
        return layout.split_streams(x, 1, self.dim).squeeze(-2)

    def join(self, branch_output: Tensor, carried: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """The add of the sub-layer before, and what this one reads."""
        return self.width_connection(self.depth_connection(branch_output, carried))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def check_alone(name: str, rate: int) -> None:
    if rate != 1:
        raise ValueError(f"{name} has one stream, got rate={rate!r}")


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
