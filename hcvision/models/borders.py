"""Where streams are entered and left: in front of a run of blocks with connections, and behind it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcvision.connections import Connection, reduce_streams
from hcvision.models.grafting import graft
from hcvision.models.stages import find_columns, find_family


@torch.fx.wrap
def leave_streams(feature: Tensor, dim: int, tap: str = "mean") -> Tensor:
    """The mean over the copies of a map (B, n*dim, H, W) or of tokens (..., n*dim); what is dim wide has left them.

    n need not be whole, as for ghc2x3. Of a history it is the sum of the entries, or the last one (``tap``).
    """
    last = feature.dim() - 1
    axis = 1 if feature.dim() == 4 and feature.shape[1] >= dim else last
    rate, rest = feature.shape[axis] // dim, feature.shape[axis] % dim
    if rate <= 1 and rest == 0:
        return feature
    feature = feature.movedim(axis, last)
    if tap == "last":
        return feature[..., -dim:].movedim(last, axis)
    if tap == "sum":
        total = feature[..., :dim]
        for k in range(1, rate):
            total = total + feature[..., k * dim : (k + 1) * dim]
        return total.movedim(last, axis)
    if rest > 0:  # a part of x once more than the rest of it
        once_more = [feature[..., k * dim : k * dim + rest] for k in range(rate + 1)]
        others = [feature[..., k * dim + rest : (k + 1) * dim] for k in range(rate)]
        parts = [reduce_streams(torch.cat(copies, dim=-1), len(copies)) for copies in (once_more, others)]
        return torch.cat(parts, dim=-1).movedim(last, axis)
    return reduce_streams(feature, rate).movedim(last, axis)


class Exit:
    """The module behind the last block: it sees the mean of the streams, however many come out of the blocks."""

    stream_dim: int
    tap: str

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(leave_streams(x, self.stream_dim, self.tap))


def place_borders(model: Any) -> None:
    """Say where streams are entered and left, for the connections that the blocks have now."""
    family = find_family(model)
    breaks = set(family.breaks(model))
    for column in find_columns(model, family):
        carried = [connections_of(block) for block in column]
        for i, block in enumerate(column):
            own = carried[i]
            if not own:
                continue
            last = i + 1 == len(column)
            goes_on = not last and i + 1 not in breaks and continues(own, carried[i + 1])
            left_behind = last and family.exit and not own[-1].has_exit
            went_on = i > 0 and i not in breaks and continues(carried[i - 1], own)
            block.entry_rate = 1 if went_on else own[0].copies
            block.exit_rate = 1 if goes_on or left_behind else own[-1].copies
            block.restores_dtype = not goes_on and own[-1].stream_dtype is not None
            for connection in own:
                if connection.has_entry:
                    connection.place_entry(connection is own[0] and block.entry_rate > 1)
                if connection.has_exit:
                    connection.place_exit(connection is own[-1] and block.exit_rate > 1)
        if family.exit and any(own and own[0].copies > 1 for own in carried):
            norm = model.get_submodule(family.exit)
            if not isinstance(norm, Exit):
                graft(norm, Exit, stream_dim=model.embed_dim)
            norm.tap = find_tap(model)


def connections_of(block: Any) -> list[Any]:
    """The connections of a block, in order; none where it has residual adds."""
    return [part for part in block.children() if isinstance(part, Connection)]


def continues(before: list[Any], own: list[Any]) -> bool:
    """Whether the streams that a block leaves are those that the next one reads, by the connections of both."""
    return bool(before and own) and own[0].continues(before[-1])


def find_tap(model: Any) -> str:
    """What of the tensor between blocks is the state of the model, of those that have more of it than one copy."""
    taps = (part.tap for part in model.modules() if isinstance(part, Connection) and part.copies > 1)
    return next(taps, Connection.tap)
