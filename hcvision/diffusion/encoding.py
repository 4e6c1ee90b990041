"""A folder of images encoded once, into shards of latents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hcvision.data import (
    LATENT_FORMAT,
    Images,
    LatentShards,
    check_number,
    count_workers,
    open_folder,
    pick_device,
    warn_of_left_out,
)
from hcvision.diffusion.objectives import SeededNoise
from hcvision.diffusion.vae import encode, load_vae


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
