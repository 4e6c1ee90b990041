"""REPA: tokens of a diffusion transformer aligned with the patches that a frozen encoder sees (arXiv 2410.06940)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.data import check_number
from hcvision.models import DiT, open_encoder


class Alignment(nn.Module):
    """The mean cosine between projected tokens of a block and the features of an encoder (REPA, eq. 8).

    ::

        h = leave(tokens behind the block)                 # (B, N, D): of several streams their mean
        cosine = mean over n of cos(projection(h[n]), encoder(image)[n])

    The projection is an MLP of three layers with SiLU, as published; it is trained, and part of a run's checkpoint. The
    encoder is not: it is opened when it is wanted, once per process. It sees the clean image, whole, resized and
    normalised as its weights want it; where its patches do not lie in the grid of the tokens, its features are
    interpolated to it.

    Args:
        model: the diffusion transformer.
        encoder: a timm name, ``NAME=FILE`` or ``local-dir:FOLDER``; see ``FrozenModel``.
        block: the tokens behind so many blocks are aligned; 8 of the 28 of an XL model as published.
        weight: of the negative cosine in the loss.
        hidden: width of the projection.
        features: channels of the encoder's patches; None asks the encoder.

    Raises:
        FileNotFoundError: there is no such file of weights.
        ValueError: an unknown encoder, or one whose weights cannot be had; no such block.
    """

    def __init__(
        self,
        model: DiT,
        encoder: str,
        block: int,
        weight: float = 0.5,
        hidden: int = 2048,
        features: int | None = None,
    ):
        super().__init__()
        check_number("repa.block", block, 1, len(model.blocks), whole=True)
        check_number("repa.weight", weight, above=0)
        check_number("repa.hidden", hidden, 1, whole=True)
        self.encoder, self.block, self.weight = encoder, block, weight
        height, width = model.x_embedder.grid_size
        self.grid: tuple[int, int] = (height, width)
        if features is None:
            blank = torch.zeros(1, 3, *(side * model.patch_size for side in self.grid))
            features = open_encoder(encoder, self.grid).map(blank).shape[1]
        self.features = features
        dim = model.embed_dim
        self.projection = nn.Sequential(
            nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )

    def see(self, images: Tensor) -> Tensor:
        """Clean images (B, 1 or 3, H, W) from 0 to 1 to what the encoder sees in them, (B, F, h, w)."""
        return open_encoder(self.encoder, self.grid).to(images.device).map(images)

    def place(self, seen: Tensor) -> Tensor:
        """Features (B, F, h, w) of an encoder in the places of the tokens, (B, N, F)."""
        if tuple(seen.shape[2:]) != self.grid:
            seen = F.interpolate(seen, size=self.grid, mode="bilinear", antialias=True, align_corners=False)
        return seen.flatten(2).transpose(1, 2)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Tokens (B, N, D) and what the encoder sees in clean images, (B, F, h, w), to the mean cosine, a scalar."""
        dtype: Any = next(self.projection.parameters()).dtype
        return F.cosine_similarity(self.projection(tokens.to(dtype)).float(), self.place(seen.float()), dim=-1).mean()

    def extra_repr(self) -> str:
        return f"encoder={self.encoder}, block={self.block}, weight={self.weight}"
