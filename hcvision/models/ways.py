"""Attention whose queries, keys and values see different mixtures: the norm and the linear map in front of it."""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Attention, LayerNorm, RmsNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.connections import layout
from hcvision.models.grafting import graft, own_class, ungraft

NORMS = (nn.LayerNorm, LayerNorm, nn.RMSNorm, RmsNorm)


class NormOfWays:
    """A norm of (..., 3 D), of each D."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(layout.split_last(x, 3)).flatten(-2)


class ProjectionOfWays:
    """The queries of the first D of (..., 3 D), the keys of the second, the values of the third, as of one x."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, x: Tensor) -> Tensor:
        return project_ways(x, self.weight, self.bias)


@torch.fx.wrap
def project_ways(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., 3 D), (3 E, D), (3 E,) -> (..., 3 E)."""
    queries, keys, values = x.chunk(3, dim=-1)
    rows = weight.chunk(3, dim=0)
    if bias is None:
        return torch.cat([F.linear(queries, rows[0]), F.linear(keys, rows[1]), F.linear(values, rows[2])], dim=-1)
    own = bias.chunk(3, dim=0)
    parts = [F.linear(queries, rows[0], own[0]), F.linear(keys, rows[1], own[1]), F.linear(values, rows[2], own[2])]
    return torch.cat(parts, dim=-1)


def find_way_obstacle(block: Any) -> str | None:
    """Why the attention of a block cannot be given queries, keys and values apart, or None."""
    if own_class(block) is not Block:
        return f"a {own_class(block).__name__}"
    if own_class(block.norm1) not in NORMS:
        return f"a block whose norm is a {own_class(block.norm1).__name__}"
    attention = block.attn
    if own_class(attention) is not Attention or attention.gate is not None or own_class(attention.qkv) is not nn.Linear:
        return f"a block whose attention is a {own_class(attention).__name__} of another form"
    return None


def place_ways(block: Any, wanted: bool) -> None:
    """Let the norm and the linear map in front of the attention of a block take three inputs side by side, or one."""
    if find_way_obstacle(block):
        return
    for module, mixin in ((block.norm1, NormOfWays), (block.attn.qkv, ProjectionOfWays)):
        if wanted and not isinstance(module, mixin):
            graft(module, mixin)
        elif not wanted and isinstance(module, mixin):
            ungraft(module)
