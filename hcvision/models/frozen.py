"""A timm model that looks at images and is never trained: for scores, and as the teacher of another model."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.models.names import create_model


class FrozenModel(nn.Module):
    """A trained timm model in evaluation mode, with images prepared as its weights want them.

    Its parameters need no gradient, and it stays in evaluation mode. Letters in shapes: B batch, C channels, H height,
    W width, F features.

    Args:
        source: a timm name with or without a pretrained tag (``vit_small_patch14_dinov2.lvd142m``), ``NAME=FILE`` for
            the weights in a file, or ``local-dir:FOLDER`` as ``hcvision export`` writes it.
        img_size: (H, W) that images are resized to; that of the weights if None. Models that are built for one size,
            such as ViTs, are set to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown model, weights that cannot be had, or a size that the model does not take.
    """

    def __init__(self, source: str, img_size: tuple[int, int] | None = None):
        super().__init__()
        name, equals, file = source.partition("=")
        if equals and not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file} with the weights of {name}")
        more: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if equals else {}
        try:
            self.model: Any = create_model(name, pretrained=True, **more)
        except (OSError, RuntimeError, ValueError, LookupError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"no timm model {source} to look at images with: {reason}") from error
        self.name = name
        config = resolve_model_data_config(self.model)
        self.channels: int = config["input_size"][0]
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.mode = "bicubic" if config["interpolation"] not in ("bilinear", "nearest") else config["interpolation"]
        for what in ("mean", "std"):
            self.register_buffer(what, torch.tensor(config[what]).view(-1, 1, 1), persistent=False)
        if img_size is not None and tuple(img_size) != self.size:
            self.set_size(img_size)
        self.requires_grad_(False).eval()

    def set_size(self, img_size: tuple[int, int]) -> None:
        try:
            if hasattr(self.model, "set_input_size"):
                self.model.set_input_size(img_size=tuple(img_size))
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.name} does not take images of {tuple(img_size)} pixels: {reason}") from error
        self.size = (img_size[0], img_size[1])

    def train(self, mode: bool = True) -> "FrozenModel":
        """Nothing: it stays in evaluation mode."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) from 0 to 1, as the model wants them: whole, resized, normalised."""
        x = images.float()
        if x.shape[1] != self.channels:  # gray as equal channels, or the reverse
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if tuple(x.shape[2:]) != self.size:
            smooth = {} if self.mode == "nearest" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, size=self.size, mode=self.mode, **smooth).clamp(0, 1)
        return (x - self.get_buffer("mean")) / self.get_buffer("std")

    @torch.no_grad()
    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 1 or 3, H, W) from 0 to 1 to features before the head (B, F), and its logits if it has any."""
        features = self.model.forward_head(self.model.forward_features(self.prepare(images)), pre_logits=True)
        return features, self.model.get_classifier()(features) if self.model.num_classes else None

    @torch.no_grad()
    def map(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) from 0 to 1 to the features of patches behind the last block, (B, F, h, w)."""
        x = self.prepare(images)
        return self.model.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[0]


@cache
def open_encoder(source: str, grid: tuple[int, int]) -> FrozenModel:
    """A frozen encoder whose patches lie in this grid, where it can have it; see ``FrozenModel``.

    A model with patches of p pixels gets images of p times the grid, as REPA's DINOv2 of patches of 14 pixels sees
    224 x 224 for a grid of 16 x 16; any other one gets images of the size of its weights.
    """
    encoder = FrozenModel(source)
    patch = getattr(getattr(encoder.model, "patch_embed", None), "patch_size", None)
    if patch is not None and hasattr(encoder.model, "set_input_size"):
        encoder.set_size((grid[0] * patch[0], grid[1] * patch[1]))
    return encoder
