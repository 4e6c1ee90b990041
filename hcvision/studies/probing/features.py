"""Frozen features of images: what a model hands to its head, before the classifier."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hcvision.data import ImageData, refusals
from hcvision.models import DiT
from hcvision.studies.measuring import PRECISIONS
from hcvision.studies.records import describe_model
from hcvision.training import ImageClassifier, TimmModule, find_checkpoint, load_module

HUBS = ("hf-hub:", "local-dir:")


@dataclass
class Frozen:
    """A model whose features are looked at: its module, and where its weights are from (``ema``: an average)."""

    module: TimmModule
    origin: str
    weights: str = "raw"

    def describe(self) -> dict[str, Any]:
        """What it is, as in a line of ``metrics.jsonl``."""
        return describe_model(self.origin, self.module) | {"weights": self.weights}


def open_model(
    source: str,
    classes: int,
    connection: str | None = None,
    pretrained: bool = False,
    init_from: str | None = None,
    model_args: dict[str, Any] | None = None,
    weights: str = "ema",
) -> Frozen:
    """A model by name, or a run's.

    Args:
        source: a timm name, ours included, with or without a pretrained tag; a run's folder (its best checkpoint, or
            its last) or a checkpoint of ours; a folder in timm's hub layout, ``local-dir:FOLDER`` or
            ``hf-hub:OWNER/NAME``.
        classes: of the head that a name gets, which nobody looks at.
        connection: of a name.
        pretrained: load timm's weights of a name; else they are initial ones.
        init_from: of a name: a file, run or folder of weights, as in a run.
        model_args: of a name: more arguments of ``timm.create_model``.
        weights: ema or raw, of a run that averaged its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name, or something that has no features of images: a diffusion model, latents.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        source = f"local-dir:{source}"
    elif not source.startswith(HUBS) and (path.exists() or "/" in source):
        return open_run(source, weights)
    from_hub = source.startswith(HUBS)
    arguments: dict[str, Any] = {"connection": connection, "model_args": model_args, "init_from": init_from}
    module = ImageClassifier(source, num_classes=max(classes, 2), pretrained=pretrained or from_hub, **arguments)
    given = source if from_hub else f"timm's weights of {source}" if pretrained else "initial weights"
    return Frozen(module, str(init_from or given))


def open_run(source: str, weights: str) -> Frozen:
    """The model of a run's folder, or of a checkpoint."""
    file = find_checkpoint(source)
    module, checkpoint = load_module(file, weights)
    if isinstance(module.model, DiT):
        raise ValueError(f"{source} is a diffusion model, whose features are not looked at; a classifier would work")
    if "vae" in checkpoint.get("data_config", {}):
        raise ValueError(f"{source} classifies latents, not images")
    averaged = module.hparams["ema_decay"] is not None and weights == "ema"
    return Frozen(module, str(file), "ema" if averaged else "raw")


def pre_logits(model: Any, images: Tensor) -> Tensor:
    """Features (B, F) of images (B, C, H, W): pooled and normalized as the model does it, before its classifier."""
    return model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)


def check_model(frozen: Frozen, data: ImageData) -> None:
    """Raise ValueError when a model does not take the images of the data, by trying one, or gives no features."""
    module = frozen.module
    data.check_images(module.data_config)
    size = data.data_config(module.data_config)["input_size"]
    name = module.hparams["model"]
    with refusals(f"{name} gives no features of images of {size}; model_args has img_size, in_chans and the like"):
        look(module.eval(), torch.zeros(1, *size))


@torch.inference_mode()
def look(module: TimmModule, images: Tensor, precision: str = "32") -> Tensor:
    """Features (B, F) in float32 on the CPU, of images (B, C, H, W)."""
    place = next(module.model.parameters()).device
    dtype, autocast = PRECISIONS[precision]
    with torch.autocast(place.type, autocast, enabled=autocast is not None):
        return pre_logits(module.model, images.to(place, dtype, non_blocking=True)).float().cpu()


def collect(
    module: TimmModule, data: ImageData, split: str, device: str, precision: str = "32", title: str | None = None
) -> tuple[Tensor, Tensor]:
    """Features (N, F) and classes (N,) of all images of a split, prepared as for evaluation.

    Args:
        module: its model is left on the device, in evaluation mode and in the type of the precision.
        data: of one label per image.
        split: train or test; where there are no test images, the validation images.
        device: where the model runs.
        precision: one of ``PRECISIONS``.
        title: of the progress bar; None shows none.

    Raises:
        ValueError: an image cannot be read and ``data.skip_bad_images`` is not set, or there is none.
    """
    module.eval().model.to(device, PRECISIONS[precision][0])
    loader: Any = data.evaluation_loader(split, module.data_config)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        count = len(loader.dataset) if hasattr(loader.dataset, "__len__") else None
        with tqdm(total=count, desc=title, unit=" images", leave=False, disable=True if title is None else None) as bar:
            for batch in loader:
                images, targets = data.on_before_batch_transfer(batch, 0)
                if len(images):
                    yield look(module, images, precision), targets
                bar.update(len(targets) + len(batch.bad))

    seen = list(batches())
    if not seen:
        raise ValueError(f"there are no {split} images to look at")
    features, targets = zip(*seen, strict=True)
    return torch.cat(features), torch.cat(targets)
