"""Where streams are entered and left: in front of a run of blocks with connections, and behind it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcvision.connections import Connection, reduce_streams
from hcvision.models.blocks import ConnectedBlock
from hcvision.models.grafting import graft
from hcvision.models.stages import find_columns, find_family


@torch.fx.wrap
def leave_streams(feature: Tensor, dim: int) -> Tensor:
    """The mean over the copies of a map (B, n*dim, H, W) or of tokens (..., n*dim); what is dim wide has left them.

    n need not be whole, as for ghc2x3.
    """
    last = feature.dim() - 1
    axis = 1 if feature.dim() == 4 and feature.shape[1] >= dim else last
    rate, rest = feature.shape[axis] // dim, feature.shape[axis] % dim
    if rate <= 1 and rest == 0:
        return feature
    feature = feature.movedim(axis, last)
    if rest > 0:  # a part of x once more than the rest of it
        once_more = [feature[..., k * dim : k * dim + rest] for k in range(rate + 1)]
        others = [feature[..., k * dim + rest : (k + 1) * dim] for k in range(rate)]
        parts = [reduce_streams(torch.cat(copies, dim=-1), len(copies)) for copies in (once_more, others)]
        return torch.cat(parts, dim=-1).movedim(last, axis)
    return reduce_streams(feature, rate).movedim(last, axis)


class Exit:
    """The module behind the last block: it sees the mean of the streams, however many come out of the blocks."""

    stream_dim: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(leave_streams(x, self.stream_dim))


def place_borders(model: Any) -> None:
    """Say where streams are entered and left, for the connections that the blocks have now."""
    family = find_family(model)
    breaks = set(family.breaks(model))
    for column in find_columns(model, family):
        carried = [count_carried(block) for block in column]
        for i, block in enumerate(column):
            if not isinstance(block, ConnectedBlock):
                continue
            rate = carried[i][0]
            goes_on = i + 1 < len(column) and carried[i + 1] == carried[i] and i + 1 not in breaks
            own: list[Any] = [part for part in block.children() if isinstance(part, Connection)]
            left_behind = i + 1 == len(column) and family.exit and not own[-1].has_exit
            block.entry_rate = 1 if i > 0 and carried[i - 1] == carried[i] and i not in breaks else rate
            block.exit_rate = 1 if goes_on or left_behind else rate
            block.restores_dtype = not goes_on and own[-1].stream_dtype is not None
            for connection in own:
                if connection.has_entry:
                    connection.place_entry(connection is own[0] and block.entry_rate > 1)
                if connection.has_exit:
                    connection.place_exit(connection is own[-1] and block.exit_rate > 1)
        if family.exit and any(rate > 1 for rate, *_ in carried):
            norm = model.get_submodule(family.exit)
            if not isinstance(norm, Exit):
                graft(norm, Exit, stream_dim=model.embed_dim)


def count_carried(block: Any) -> tuple[Any, ...]:
    """How many copies of x a block leaves, and of what width and type, in which streams; (1, 0) without connections."""
    if not isinstance(block, ConnectedBlock):
        return 1, 0
    connection = block.connection1  # type: ignore[attr-defined]
    return connection.copies, connection.dim, connection.streams, connection.views, connection.stream_dtype
