"""A folder of images encoded once, into shards of latents."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import save
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hcvision.data import (
    LATENT_FORMAT,
    Images,
    LatentShards,
    check_number,
    count_workers,
    is_first_process,
    open_folder,
    pick_device,
    warn_of_left_out,
)
from hcvision.diffusion.objectives import SeededNoise
from hcvision.diffusion.vae import encode, load_vae
from hcvision.models import FrozenModel, open_encoder


@dataclass
class Split:
    """A split of a folder: its images, and what every shard of it says of itself."""

    images: Images
    about: dict[str, str]
    size: int  # images per shard

    def numbers(self, shard: int) -> range:
        """The numbers of the images of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, int(self.about["images"])))


class Jobs(pl.LightningDataModule):
    """Shards that are still to be made, by split and number; every process takes its share."""

    def __init__(self, missing: list[tuple[str, int]]):
        super().__init__()
        self.missing = missing
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        jobs: Any = self.missing[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(jobs, batch_size=None)


class ShardWriter(pl.LightningModule):
    """Makes shards, each whole or not at all, and says how fast: by what it holds alone, whoever makes the others."""

    def __init__(
        self, vae: nn.Module, splits: dict[str, Split], out: Path, options: dict[str, Any], say: Callable[[str], None]
    ):
        super().__init__()
        self.vae, self.splits, self.out, self.options, self.say = vae, splits, out, options, say
        self.images = 0  # that this process has encoded

    def on_predict_start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)  # now that every process has checked what is there
        self.began = time.monotonic()

    def predict_step(self, batch: tuple[str, int], batch_idx: int) -> int:
        """Make the shard of a split and a number. Returns how many images are in it."""
        name, number = batch
        split, options, began = self.splits[name], self.options, time.monotonic()
        numbers = split.numbers(number)
        workers = options["num_workers"]
        if workers is None:  # processes on a machine share its cores
            workers = count_workers(None) // (self.trainer.num_devices if self.trainer.world_size > 1 else 1)
        chosen = Subset(split.images, numbers)
        loader: Any = DataLoader(chosen, options["batch_size"], num_workers=workers, collate_fn=split.images.collate)
        encoder = None if options["encoder"] is None else open_encoder(*options["encoder"]).to(self.device)
        tensors, left_out = encode_shard(
            self.vae, loader, numbers.start, options["seed"], options["skip_bad_images"], str(self.device), encoder
        )
        values = tensors["latents"].double()
        statistics = {
            "mean": json.dumps(values.mean((0, 2, 3)).tolist()),
            "std": json.dumps(values.std((0, 2, 3)).tolist()),
        }
        path = shard_path(self.out, name, number)
        partial = path.with_suffix(".partial")
        partial.write_bytes(sort_metadata(save(tensors, {**split.about, **statistics})))
        partial.replace(path)
        self.images += len(values)
        bad = f", {left_out} unreadable ones left out" if left_out else ""
        self.say(f"{path}: {len(values)} images{bad}, {len(values) / (time.monotonic() - began):.1f} images/s")
        return len(values)

    def on_predict_end(self) -> None:
        count: Any = self.trainer.strategy.reduce(torch.tensor(float(self.images), device=self.device), reduce_op="sum")
        seconds, processes = time.monotonic() - self.began, self.trainer.world_size
        by = f" by {processes} processes" if processes > 1 else ""
        if self.trainer.is_global_zero:
            self.say(f"{int(count)} images in {seconds:.0f} s{by}: {float(count) / seconds:.1f} images/s")


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
    devices: int | None = None,
    strategy: str = "auto",
    seed: int = 0,
    encoder: str | None = None,
    encoder_grid: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Encode the images of a folder into shards. Shards that are there already are not made again.

    Several processes, of Lightning (``devices``), torchrun or Slurm, make a shard each at a time. A shard is the same
    to the bit however many there are and whenever it was made, with the same batch size on the same kind of device.

    Args:
        root: folder of images: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, or ROOT/CLASS/IMAGE.
        out: folder for the shards.
        vae: repository on the Hugging Face hub or folder of a diffusers AutoencoderKL.
        image_size: pixels; the shorter side is resized to it, the middle kept.
        batch_size: images per pass through the VAE.
        shard_size: images per shard.
        num_workers: loading processes of each process; None takes its share of the CPU cores available, at most 8.
        skip_bad_images: leave unreadable images out instead of stopping.
        device: where the VAE runs: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        devices: GPUs, or processes on a CPU; None is as many as torchrun has started here, else one.
        strategy: Lightning's.
        seed: of the draws from the VAE's posterior; each image has its own.
        encoder: store what this timm encoder sees in the images beside the latents, for REPA: a timm name, NAME=FILE or
            local-dir:FOLDER. 197 kB an image and as much for its mirror image, for 16 x 16 patches of 384 numbers.
        encoder_grid: patches along a side that it sees, where it can; half of a side of the latents if not given.
        say: called with a line per shard, and one for all of them with the images per second.

    Raises:
        ValueError: a bad argument, no images, an unreadable image, or shards in ``out`` of something else.
        FileNotFoundError: there is no such folder.
    """
    for name, value in {"image_size": image_size, "batch_size": batch_size, "shard_size": shard_size}.items():
        check_number(name, value, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    check_number("devices", 1 if devices is None else devices, 1, whole=True)
    if num_workers is not None:
        check_number("num_workers", num_workers, 0, whole=True)
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {root}; root must hold the images")
    folders = {split: Path(root) / split for split in ("train", "val") if (Path(root) / split).is_dir()}
    bases: dict[str, Any] = {}
    for split, folder in (folders or {"train": Path(root)}).items():
        bases[split] = open_folder(folder, bases.get("train"))
    if is_first_process():
        warn_of_left_out(bases.values(), root)
    arguments = place_processes(pick_device(device), devices)
    model: Any = load_vae(vae)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if image_size % factor:
        raise ValueError(
            f"image_size must be a multiple of {factor}, by which {vae} makes images smaller, got {image_size}"
        )
    pixels = (image_size, image_size)
    transform = create_transform((3, *pixels), crop_pct=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    side = image_size // factor
    grid = max(1, side // 2) if encoder_grid is None else encoder_grid
    check_number("encoder_grid", grid, 1, side, whole=True)
    if encoder is not None:
        open_encoder(encoder, (grid, grid))
    splits: dict[str, Split] = {}
    missing: list[tuple[str, int]] = []
    for split, base in bases.items():
        shards = range(-(-len(base) // shard_size))
        about = {
            "format": LATENT_FORMAT, "vae": vae, "image_size": str(image_size), "classes": json.dumps(base.classes),
            "images": str(len(base)), "shard_size": str(shard_size), "shards": str(len(shards)), "seed": str(seed),
        }  # fmt: skip
        about |= {} if encoder is None else {"encoder": encoder, "encoder_grid": str(grid)}
        splits[split] = Split(Images(base, range(len(base)), transform, "RGB"), about, shard_size)
        for number in shards:
            path = shard_path(Path(out), split, number)
            if not path.is_file():
                missing.append((split, number))
                continue
            check_shard(path, about)
            if is_first_process():
                say(f"{path}: was there")
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "skip_bad_images": skip_bad_images,
        "seed": seed,
    }
    options["encoder"] = None if encoder is None else (encoder, (grid, grid))
    writer = ShardWriter(model, splits, Path(out), options, say)
    runner = pl.Trainer(
        **arguments, strategy=strategy, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    if missing:
        if runner.world_size > len(missing) and is_first_process():
            say(f"{runner.world_size} processes share {len(missing)} shards: a smaller shard_size would keep all busy")
        runner.predict(writer, datamodule=Jobs(missing), return_predictions=False)
    return Path(out)


def place_processes(device: str, devices: int | None) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for so many devices or, where there is one, for that device."""
    kind, _, index = device.partition(":")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = here if devices is None else devices
    if index and count > 1:
        raise ValueError(f"devices must be 1 with a device by its number, got device={device} and devices={count}")
    nodes = int(os.environ.get("WORLD_SIZE", count)) // count if "LOCAL_WORLD_SIZE" in os.environ else 1
    return {"accelerator": kind, "devices": [int(index)] if index else count, "num_nodes": nodes}


def shard_path(out: Path, split: str, number: int) -> Path:
    return out / f"{split}-{number:05}.safetensors"


def encode_shard(
    vae: Any,
    loader: Any,
    start: int,
    seed: int,
    skip_bad_images: bool,
    device: str,
    encoder: FrozenModel | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The tensors of a shard and how many images were unreadable."""
    kept: dict[str, list[Tensor]] = {"latents": [], "flipped": []}
    if encoder is not None:
        kept |= {"features": [], "flipped_features": []}
    labels: list[int] = []
    left_out = 0
    for batch in loader:
        if batch.bad and not skip_bad_images:
            raise ValueError(f"{batch.bad[0]} (--skip_bad_images true leaves such images out)")
        left_out += len(batch.bad)
        if len(batch.images) == 0:
            continue
        images = batch.images.to(device)
        for latents, features, view in (
            ("latents", "features", images), ("flipped", "flipped_features", images.flip(-1))
        ):  # fmt: skip
            first = start + len(labels)
            noise = SeededNoise(seed, range(first, first + len(images)))
            kept[latents].append(encode(vae, view, noise).half().cpu())
            if encoder is not None:
                kept[features].append(encoder.map(view / 2 + 0.5).half().cpu())
        labels += batch.targets.tolist()
    if not labels:
        raise ValueError(f"none of the images {start} and following can be read")
    tensors = {name: torch.cat(parts) for name, parts in kept.items()} | {"labels": torch.tensor(labels)}
    return {key: value.contiguous() for key, value in tensors.items()}, left_out


def sort_metadata(content: bytes) -> bytes:
    """The same safetensors file with its metadata in alphabetical order; safetensors writes them in a random one."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors behind it stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def check_shard(path: Path, about: dict[str, str]) -> None:
    """Raise ValueError when a shard is damaged or made from something else."""
    there = LatentShards.header(path)
    for key, value in about.items():
        if there.get(key) != value:
            raise ValueError(
                f"{path} is there already with {key} {there.get(key)!r}, not {value!r}; give another folder"
            )
