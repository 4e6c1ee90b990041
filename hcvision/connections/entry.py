"""Streams that start different: copies of x, each scaled channel by channel."""

import torch
from torch import Tensor, nn

ENTRIES = ("copies", "scaled")  # equal streams, or different ones
STRENGTH = 0.6


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
