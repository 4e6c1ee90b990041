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
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hcvision.arguments import check_number, check_numbers
from hcvision.data import LATENT_FORMAT, LatentShards, count_workers
from hcvision.diffusion import SeededNoise
from hcvision.images import Images, open_folder, warn_of_left_out
from hcvision.runs import UNREADABLE, pick_device


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
        check_number(name, value, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    if num_workers is not None:
        check_number("num_workers", num_workers, 0, whole=True)
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {root}; root must hold the images")
    folders = {split: Path(root) / split for split in ("train", "val") if (Path(root) / split).is_dir()}
    bases: dict[str, Any] = {}
    for split, folder in (folders or {"train": Path(root)}).items():
        bases[split] = open_folder(folder, bases.get("train"))
    warn_of_left_out(bases.values(), root)
    device = pick_device(device)
    model: Any = load_vae(vae).to(device)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if image_size % factor:
        raise ValueError(
            f"image_size must be a multiple of {factor}, by which {vae} makes images smaller, got {image_size}"
        )
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
