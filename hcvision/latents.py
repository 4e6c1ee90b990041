"""The VAE between images and latents: encode a folder once into shards, decode what a model draws.

A shard is a safetensors file ``SPLIT-00000.safetensors`` with ``latents`` and ``flipped`` (those of the
mirrored images), both (N, C, H, W) float16 and scaled as the model sees them, and ``labels`` (N,). Its
metadata hold the class names, the VAE, and mean and standard deviation per channel of the shard.
``hcvision.data.LatentShards`` reads them. The VAE is diffusers' AutoencoderKL (``pip install hcvision[latents]``).
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hcvision.data import LATENT_FORMAT, LatentShards, count_workers
from hcvision.diffusion import SeededNoise
from hcvision.images import Images, open_folder
from hcvision.runs import pick_device


@cache
def load_vae(name: str) -> nn.Module:
    """diffusers' AutoencoderKL by the name of its repository or the path of its folder.

    Raises:
        ValueError: diffusers is not installed, or there is no such VAE.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("latents need diffusers: pip install 'hcvision[latents]'") from error
    try:
        vae: nn.Module = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"there is no VAE {name!r}, neither a folder nor in reach on the hub: {reason}") from error
    return vae.eval().requires_grad_(False)


def scale_and_shift(vae: Any) -> tuple[float, float]:
    return float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)


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


def encode_folder(
    root: str,
    out: str,
    vae: str = "stabilityai/sd-vae-ft-ema",
    image_size: int = 256,
    batch_size: int = 32,
    shard_size: int = 8192,
    num_workers: int | None = None,
    skip_bad_images: bool = False,
    device: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Encode the images of a folder into shards. Shards that are there already are not made again.

    Args:
        root: folder of images: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, or ROOT/CLASS/IMAGE.
        out: folder for the shards.
        vae: repository on the Hugging Face hub or folder of a diffusers AutoencoderKL.
        image_size: pixels; the shorter side is resized to it, the middle kept.
        batch_size: images per pass through the VAE.
        shard_size: images per shard.
        num_workers: loading processes; None takes the CPU cores available, at most 8.
        skip_bad_images: leave unreadable images out instead of stopping.
        device: where the VAE runs: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        seed: of the draws from the VAE's posterior; each image has its own.
        say: called with a line per shard.

    Raises:
        ValueError: a bad argument, no images, an unreadable image, or shards in ``out`` of something else.
        FileNotFoundError: there is no such folder.
    """
    for name, value in {"image_size": image_size, "batch_size": batch_size, "shard_size": shard_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {root}; root must hold the images")
    folders = {split: Path(root) / split for split in ("train", "val") if (Path(root) / split).is_dir()}
    bases = {split: open_folder(folder) for split, folder in (folders or {"train": Path(root)}).items()}
    device = pick_device(device)
    model: Any = load_vae(vae).to(device)
    pixels = (image_size, image_size)
    transform = create_transform((3, *pixels), crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    workers = count_workers(num_workers)
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, base in bases.items():
        images = Images(base, range(len(base)), transform, "RGB")
        shards = range(0, len(base), shard_size)
        about = {
            "format": LATENT_FORMAT, "vae": vae, "image_size": str(image_size), "classes": json.dumps(base.classes),
            "images": str(len(base)), "shard_size": str(shard_size), "shards": str(len(shards)), "seed": str(seed),
        }  # fmt: skip
        for number, start in enumerate(shards):
            path = Path(out) / f"{split}-{number:05}.safetensors"
            if path.is_file():
                check_shard(path, about)
                say(f"{path}: was there")
                continue
            chosen = range(start, min(start + shard_size, len(base)))
            loader: Any = DataLoader(Subset(images, chosen), batch_size, num_workers=workers, collate_fn=images.collate)
            tensors, left_out = encode_shard(model, loader, start, seed, skip_bad_images, device)
            values = tensors["latents"].double()
            statistics = {
                "mean": json.dumps(values.mean((0, 2, 3)).tolist()),
                "std": json.dumps(values.std((0, 2, 3)).tolist()),
            }
            partial = path.with_suffix(".partial")
            save_file(tensors, partial, metadata={**about, **statistics})
            partial.replace(path)
            bad = f", {left_out} unreadable ones left out" if left_out else ""
            say(f"{path}: {len(values)} images{bad}")
    return Path(out)


def encode_shard(
    vae: Any, loader: Any, start: int, seed: int, skip_bad_images: bool, device: str
) -> tuple[dict[str, Tensor], int]:
    """The tensors of a shard and how many images were unreadable."""
    straight: list[Tensor] = []
    flipped: list[Tensor] = []
    labels: list[int] = []
    left_out = 0
    for batch in loader:
        if batch.bad and not skip_bad_images:
            raise ValueError(f"{batch.bad[0]} (--skip_bad_images true leaves such images out)")
        left_out += len(batch.bad)
        if len(batch.images) == 0:
            continue
        images = batch.images.to(device)
        for kept, view in ((straight, images), (flipped, images.flip(-1))):
            first = start + len(labels)
            noise = SeededNoise(seed, range(first, first + len(images)))
            kept.append(encode(vae, view, noise).half().cpu())
        labels += batch.targets.tolist()
    if not labels:
        raise ValueError(f"none of the images {start} and following can be read")
    tensors = {"latents": torch.cat(straight), "flipped": torch.cat(flipped), "labels": torch.tensor(labels)}
    return {key: value.contiguous() for key, value in tensors.items()}, left_out


def check_shard(path: Path, about: dict[str, str]) -> None:
    """Raise ValueError when a shard is damaged or made from something else."""
    there = LatentShards.header(path)
    for key, value in about.items():
        if there.get(key) != value:
            raise ValueError(
                f"{path} is there already with {key} {there.get(key)!r}, not {value!r}; give another folder"
            )
