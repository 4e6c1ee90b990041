"""Streams that start different: copies of x, each scaled channel by channel."""

from typing import Any

import torch
from torch import Tensor, nn

from hcvision.connections.base import check_count, expand_streams
from hcvision.connections.streams import StreamConnection

ENTRIES = ("copies", "scaled")  # equal streams, or different ones
STRENGTH = 0.6


class EnteredConnection(StreamConnection):
    """A connection of n streams and one view whose streams are entered as equal copies, or scaled (``entry``).

    Raises:
        ValueError: an unknown entry; or scaled streams, and fewer than two.
    """

    def __init__(self, dim: int, rate: int, layer_index: int, backend: str, entry: str):
        if entry not in ENTRIES:
            raise ValueError(f"entry must be {' or '.join(ENTRIES)}, got {entry!r}")
        if entry == "scaled":
            check_count("rate", rate, 2)
        super().__init__(dim, rate, rate, 1, layer_index, backend)
        self.entry, self.has_entry = entry, entry == "scaled"
        self.scaled: Any = nn.Identity()

    @torch.jit.ignore
    def place_entry(self, wanted: bool) -> None:
        """Make the scales in front of the first sub-layer, or take them away; what is there and wanted stays."""
        if not wanted:
            self.scaled = nn.Identity()
        elif isinstance(self.scaled, nn.Identity):
            like = next(self.parameters())
            self.scaled = ScaledCopies(self.dim, self.rate, like.device, like.dtype)

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """The streams of x, (..., dim) -> (..., n * dim): copies, or scaled ones; x itself at a rate of 1."""
        if self.has_entry and rate > 1:
            return self.scaled(x)
        return expand_streams(x, rate)

    def reset_entry(self) -> None:
        """Set the scales to their initial values, where there are any."""
        if isinstance(self.scaled, ScaledCopies):
            self.scaled.reset_parameters()


class ScaledCopies(nn.Module):
    """Enter n streams as copies of x with a learned scale for each stream and channel.

    ::

        H[j, c] = scale[j, c] x[c]

    Equal streams with equal reads and writes get the same gradients, and stay equal for good. After Alimaskina et al.
    (arXiv 2606.03483), who break that symmetry where streams start by n * dim parameters, with their strength of 0.6;
    the initial values are ours: stream j has 1 + 0.6 of the channels j, j + n, ... and 1 - 0.6 / (n - 1) of the others.
    Their mean over streams is 1, so that reads and a read-out that are means see x itself.

    Args:
        dim: width of the model, which is E.
        rate: n, at least 2.
    """

    def __init__(self, dim: int, rate: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(rate, dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scales to their initial values."""
        rate, dim = self.scale.shape
        own = torch.arange(dim) % rate == torch.arange(rate)[:, None]
        self.scale.copy_(torch.where(own, 1 + STRENGTH, 1 - STRENGTH / (rate - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., n*E), multiplied in float32 at least, in the dtype of x."""
        return scale_copies(x, self.scale)


@torch.fx.wrap
def scale_copies(x: Tensor, scale: Tensor) -> Tensor:
    """Copies of x (..., E), scaled by (n, E), side by side: (..., n*E)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype).unsqueeze(-2) * scale.to(dtype)).flatten(-2).to(x.dtype)
