"""The VAE between images and latents: diffusers' AutoencoderKL (``pip install hcvision[latents]``)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hcvision.data import UNREADABLE, check_number, check_numbers


@cache
def load_vae(name: str) -> nn.Module:
    """diffusers' AutoencoderKL by the name of its repository or the path of its folder.

    Raises:
        ValueError: diffusers is not installed, there is no such VAE, or it is of another class, of other images than
            RGB, or its folder does not hold all of its weights.
    """
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:
        raise ValueError("latents need diffusers: pip install 'hcvision[latents]'") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it warns of is an error here
    try:
        kind = AutoencoderKL.load_config(name).get("_class_name", AutoencoderKL.__name__)
        if kind != AutoencoderKL.__name__:
            raise ValueError(f"it is of the class {kind}, and AutoencoderKL is what latents are made with")
        vae, found = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False, output_loading_info=True)
        for what in ("missing", "mismatched", "unexpected"):
            keys = found[f"{what}_keys"]
            if keys:
                raise ValueError(f"its weights are of another model: {len(keys)} {what}, such as {sorted(keys)[0]}")
        check_statistics(vae.config)
        if (vae.config.in_channels, vae.config.out_channels) != (3, 3):
            raise ValueError(f"it takes images of {vae.config.in_channels} channels, not of 3")
    except (*UNREADABLE, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        if Path(name).exists():
            raise ValueError(f"{name} is no VAE that can be used: {reason}") from error
        raise ValueError(f"there is no VAE {name!r}, neither a folder nor in reach on the hub: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    return vae.eval().requires_grad_(False)


def check_statistics(config: Any) -> None:
    """Raise ValueError when what a VAE's configuration says of its latents cannot be meant."""
    check_number("its scaling_factor", config.scaling_factor, above=0)
    check_number("its shift_factor", config.shift_factor or 0)
    for name, least in (("latents_mean", {}), ("latents_std", {"above": 0})):
        if config[name] is not None:
            check_numbers(f"its {name}", config[name], config.latent_channels, **least)
    if config.shift_factor and config.latents_mean is not None:
        raise ValueError("it has both a shift_factor and latents_mean")


def scale_and_shift(vae: Any) -> tuple[Any, Any]:
    """What a model sees of latents z is (z - shift) * scale: numbers, or tensors (C, 1, 1)."""
    config = vae.config
    scale, shift = config.scaling_factor, config.shift_factor or 0.0
    if config.latents_mean is not None:
        shift = torch.tensor(config.latents_mean, device=vae.device).view(-1, 1, 1)
    if config.latents_std is not None:
        scale = scale / torch.tensor(config.latents_std, device=vae.device).view(-1, 1, 1)
    return scale, shift


@torch.no_grad()
def encode(vae: Any, images: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to a draw of their latents (B, C, H/8, W/8), shifted and scaled."""
    scale, shift = scale_and_shift(vae)
    posterior = vae.encode(images).latent_dist
    return (posterior.mean + posterior.std * draw(posterior.mean) - shift) * scale


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of ``encode``: images (B, 3, 8 H, 8 W), about in [-1, 1]."""
    scale, shift = scale_and_shift(vae)
    return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()
