"""Images from a diffusion model: settings, a run over many that can be killed, and the files it leaves.

Image i depends on the seed and on i alone: not on the batch size, the number of processes, or on where a run went on.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm import tqdm

from hcvision.data import check_name, check_number, check_range, is_first_process, write_json
from hcvision.diffusion.objectives import COEFFICIENTS, check_sampler, guide


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Args:
        steps: of the sampler; the objective's default if None (ddpm 250, velocity and image 50).
        sampler: ddpm, ddim, dpm++ or unipc; heun, euler or sde; the first of the objective if None.
        guidance: scale of classifier-free guidance; 1 is none.
        guided_channels: of the first channels; None guides all.
        seed: of the noise.
        guidance_interval: where to guide, from 0 (noise) to 1 (image): t of velocity and image, 1 - t / 1000 of ddpm;
            None guides everywhere.
        coefficient: diffusion coefficient of sde: constant, sigma or path; sigma if None. See ``LinearPath.sample``.
        last_step: size of the last step of sde, which adds no noise; 0.04 if None.

    Raises:
        ValueError: no number, or one that cannot be meant.
    """

    steps: int | None = None
    sampler: str | None = None
    guidance: float = 1.0
    guided_channels: int | None = 3
    seed: int = 0
    guidance_interval: tuple[float, float] | None = None
    coefficient: str | None = None
    last_step: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("guided_channels", self.guided_channels)):
            check_number(name, 1 if value is None else value, least=1, whole=True)
        check_number("guidance", self.guidance)
        check_number("seed", self.seed, least=0, whole=True)
        check_range("guidance_interval", self.guidance_interval or (0, 1), least=0, most=1)
        check_name("coefficient", self.coefficient or "sigma", COEFFICIENTS)
        check_number("last_step", 0.04 if self.last_step is None else self.last_step, above=0, below=1)

    def check(self, diffusion: Any) -> None:
        """Raise ValueError when these settings do not work with this objective."""
        sampler = self.sampler or diffusion.samplers[0]
        check_sampler(sampler, diffusion.samplers)
        diffusion.check_steps(self.steps or diffusion.default_steps)
        guide(lambda x, t, y: x, torch.zeros(1), 0, self.guidance, self.guided_channels)
        given = [name for name in ("coefficient", "last_step") if getattr(self, name) is not None]
        if given and sampler != "sde":
            raise ValueError(f"{given[0]} is for the sampler sde, got {getattr(self, given[0])} for {sampler}")
        if self.guidance_interval is not None and self.guidance == 1:
            raise ValueError(f"guidance_interval is for guidance, got {list(self.guidance_interval)} with guidance 1")

    def settle(self, diffusion: Any) -> "Sampling":
        """The same with the objective's defaults where it says nothing."""
        sampler = self.sampler or diffusion.samplers[0]
        own: dict[str, Any] = {"coefficient": self.coefficient or "sigma", "last_step": self.last_step or 0.04}
        steps = self.steps or diffusion.default_steps
        return replace(self, steps=steps, sampler=sampler, **(own if sampler == "sde" else {}))

    def settings(self) -> dict[str, Any]:
        """All of it as JSON has it, without what later versions added and is not used."""
        optional = ("guidance_interval", "coefficient", "last_step")
        settings = {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
        return json.loads(json.dumps(settings))

    def describe(self, diffusion: Any, channels: int) -> str:
        """In words, for scores and reports: the sampler, its evaluations, what is guided of so many channels."""
        plan = self.settle(diffusion)
        count = diffusion.count_evaluations(plan.steps, plan.sampler)
        own = f"coefficient {plan.coefficient}, last step {plan.last_step:g}; " if plan.sampler == "sde" else ""
        method = f"{plan.sampler}, {plan.steps} steps ({own}{count} evaluations of the model)"
        if self.guidance == 1:
            return f"{method}, no guidance"
        guided = channels if self.guided_channels is None else min(self.guided_channels, channels)
        what = "all channels" if guided == channels else f"the first {guided} of {channels} channels"
        where = ""
        if self.guidance_interval is not None:
            first, last = self.guidance_interval
            where = f" from {first:g} to {last:g} of the way to the image"
        return f"{method}, guidance {self.guidance:g} on {what}{where}"


def to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) normalised by mean and std to (B, H, W, C) uint8."""
    shape = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std, device=images.device).view(shape)
    pixels = pixels + torch.tensor(mean, device=images.device).view(shape)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images (B, H, W, C) uint8, row by row, as one picture (3, height, width) uint8 on white."""
    return make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=padding, pad_value=255)


def enlarge(picture: Tensor, side: int) -> Image.Image:
    """A PIL image of (3, H, W) uint8, small ones enlarged by a whole factor to about ``side`` pixels in width."""
    factor = max(1, side // picture.shape[-1])
    return Image.fromarray(picture.permute(1, 2, 0).repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy())


def columns_of(classes: Sequence[int]) -> int:
    """One column per class where that reads well, else 8."""
    return len(classes) if 1 < len(classes) <= 16 else 8


class Chunks(pl.LightningDataModule):
    """Ranges of image numbers that are still to be drawn, and the class of each; every process takes its share."""

    def __init__(self, missing: list[range], classes: Sequence[int]):
        super().__init__()
        self.missing, self.classes = missing, torch.tensor(classes)
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_dataloader(self) -> DataLoader:
        numbers = [torch.tensor(list(span)) for span in self.missing]
        batches: Any = [(chunk, self.classes[chunk % len(self.classes)]) for chunk in numbers]
        assert self.trainer is not None
        return DataLoader(batches[self.trainer.global_rank :: self.trainer.world_size], batch_size=None)


class WriteParts(Callback):
    """Each chunk as a file of its own, written whole or not at all; a bar that moves with every step."""

    def __init__(self, folder: Path, total: int, show: bool):
        self.folder, self.total, self.show, self.done = folder, total, show, 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)  # now that every process has checked what is there
        format = "{l_bar}{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}]"
        hidden = not (self.show and trainer.is_global_zero)
        self.bar = tqdm(total=self.total, initial=self.done, desc="sampling", bar_format=format, disable=hidden)
        module: Any = pl_module
        module.on_sampling_step = lambda part: self.advance(part * trainer.world_size)

    def advance(self, images: float) -> None:
        """By a guess where several processes draw; never over the end, where tqdm forgets its total."""
        self.bar.update(min(images, self.total - self.bar.n))

    def on_predict_batch_end(self, trainer, pl_module, outputs: Tensor, batch: Any, *_: Any) -> None:
        numbers, _classes = batch
        path = self.folder / f"{int(numbers[0]):09}-{int(numbers[-1]) + 1:09}.npy"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, outputs.numpy())
        partial.replace(path)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.advance(self.total)
        self.bar.close()


def fingerprint(module: Any) -> str:
    """What tells one set of weights from another: a hash of all of them."""
    digest = hashlib.sha256()
    for value in module.model.state_dict().values():
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def parts(folder: Path) -> list[tuple[range, Path]]:
    """The parts of a run, in order."""
    return [(range(*map(int, path.stem.split("-"))), path) for path in sorted(folder.glob("[0-9]*-*.npy"))]


def gaps(done: list[range], number: int, chunk: int) -> list[range]:
    """What is missing of range(number), in chunks."""
    missing, at = [], 0
    for part in [*done, range(number, number)]:
        missing += [range(i, min(i + chunk, part.start)) for i in range(at, part.start, chunk)]
        at = max(at, part.stop)
    return missing


def draw_samples(
    module: Any,
    out: Path,
    plan: Sampling,
    number: int,
    classes: Sequence[int],
    batch_size: int = 64,
    trainer: dict[str, Any] | None = None,
) -> Path:
    """Draw images with ``module`` (an ``ImageGenerator``) into ``out/parts``; what is there is not drawn again.

    Args:
        module: draws them.
        out: folder.
        plan: how.
        number: how many images; image i is of class ``classes[i % len(classes)]``.
        classes: numbers of the classes wanted.
        batch_size: images per process at a time.
        trainer: arguments of Lightning's Trainer: devices, precision, ...

    Returns:
        The folder of the parts.

    Raises:
        ValueError: bad numbers, or a folder begun with other settings.
    """
    if number < 1 or batch_size < 1:
        raise ValueError(f"number and batch_size must be at least 1, got {number} and {batch_size}")
    count = module.hparams["num_classes"]
    wrong = [label for label in classes if not 0 <= label < count]
    if wrong or not classes:
        raise ValueError(f"classes must be one or more of 0 to {count - 1}, got {list(classes)}")
    plan.check(module.diffusion)
    arguments = dict(trainer or {})
    drawn, plan = plan.describe(module.diffusion, module.data_config["input_size"][0]), plan.settle(module.diffusion)
    settings = {
        "plan": plan.settings(), "classes": list(classes), "class_names": module.class_names,
        "weights": fingerprint(module), "objective": module.hparams["objective"], "vae": module.hparams["vae"],
        "precision": str(arguments.get("precision", "32-true")),
    }  # fmt: skip
    about, folder = out / "sampling.json", out / "parts"
    if about.is_file():
        there = json.loads(about.read_text())
        for name in settings:
            if there.get(name) != settings[name]:
                raise ValueError(
                    f"{out} was begun with other {name} ({there.get(name)} there, {settings[name]} here); "
                    "give another folder (--out)"
                )
    elif is_first_process():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} exists and holds something else; give another folder (--out)")
        write_json(about, {**settings, "drawn": drawn})
    show = arguments.pop("enable_progress_bar", None) is not False
    writer = WriteParts(folder, number, show)
    runner = pl.Trainer(
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        **arguments,
    )
    done = [span for span, _ in parts(folder) if span.start < number]
    missing = gaps(done, number, batch_size)
    if missing:
        writer.done = number - sum(map(len, missing))
        module.sampling = plan
        runner.predict(module, datamodule=Chunks(missing, classes), return_predictions=False)
    runner.strategy.barrier()
    return folder


def describe_samples(folder: Path) -> str:
    """How the images of a run were drawn, in words: the sampler first."""
    about = json.loads((folder / "sampling.json").read_text())
    plan = about["plan"]
    return about.get("drawn") or f"{plan['sampler']}, {plan['steps']} steps, guidance {plan['guidance']:g}"


def read_samples(folder: Path, number: int) -> Tensor:
    """The first ``number`` images of a run's parts, (N, H, W, C) uint8."""
    images = [np.load(path) for span, path in parts(folder) if span.start < number]
    return torch.from_numpy(np.concatenate(images)[:number])


def write_npz(path: Path, folder: Path, number: int) -> None:
    """All images as ``arr_0``, (N, H, W, 3) uint8, the layout of ADM's evaluator, without holding them in memory."""
    files = [(span, file) for span, file in parts(folder) if span.start < number]
    height, width = np.load(files[0][1], mmap_mode="r").shape[1:3]
    partial = path.with_suffix(".partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (number, height, width, 3)}
    with (
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
    ):
        np.lib.format.write_array_header_1_0(entry, header)  # type: ignore[arg-type]
        for span, file in files:
            images = np.load(file)[: number - span.start]
            entry.write(np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3))).data)
    partial.replace(path)
