"""A trained classifier with all that it needs to look at an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from hcvision.data import Images, in_one_line, mode_of
from hcvision.models import DiT, create_model
from hcvision.training import WEIGHTS, ImageGenerator, find_checkpoint, load_module

MULTI_LABEL = "multi_label"  # among the notes in a hub folder's pretrained_cfg
HUBS = ("hf-hub:", "local-dir:")


@dataclass
class Classifier:
    """A trained model, in evaluation mode, and what it was trained with.

    ``data_config`` holds arguments of ``timm.data.create_transform``: input_size (C, H, W), mean, std,
    interpolation, crop_pct. ``origin`` says where the weights are from.
    """

    model: nn.Module
    class_names: list[str] | None
    data_config: dict[str, Any]
    multi_label: bool
    origin: str

    @property
    def num_classes(self) -> int:
        return self.model.num_classes  # type: ignore[return-value]

    def name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes, (B, num_classes): they add up to 1 unless an image may have several labels."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(-1)

    def dataset(self, base: Any, indices: Sequence[int]) -> Images:
        """Chosen images of a dataset, prepared as for validation."""
        transform: Any = create_transform(**self.data_config, is_training=False)
        return Images(base, indices, transform, mode_of(self.data_config["input_size"][0]))


def load_classifier(source: str, weights: str = "ema") -> Classifier:
    """A trained classifier.

    Args:
        source: a run's folder (its best checkpoint, or its last), a checkpoint of ours, a folder in timm's hub
            layout (config.json, model.safetensors), or ``hf-hub:OWNER/NAME``.
        weights: of a run that averaged its weights: ``ema``, the average, or ``raw``, those of the last step.
            Otherwise they are the same.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is something else, or damaged, or classifies no images.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    path = Path(source)
    if source.startswith(HUBS):
        return _from_hub(source)
    if (path / "config.json").is_file():
        return _from_hub(f"local-dir:{source}")
    return _from_checkpoint(find_checkpoint(source), weights)


def _from_checkpoint(file: Path, weights: str) -> Classifier:
    module, checkpoint = load_module(file, weights)
    if isinstance(module, ImageGenerator):
        raise ValueError(f"{file} is a diffusion model, which classifies nothing; `hcvision sample` draws with it")
    config = checkpoint.get("data_config") or module.data_config
    if "vae" in config:
        raise ValueError(f"{file} classifies latents; image files have to be encoded first (`hcvision encode`)")
    return Classifier(
        module.model,
        checkpoint.get("class_names"),
        config,
        bool(module.hparams.get("multi_label", False)),
        f"{file} ({weights} weights)" if "current_model_state" in checkpoint else str(file),
    )


def _from_hub(source: str) -> Classifier:
    try:
        model: Any = create_model(source, pretrained=True).eval()
    except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{source} is no model that timm can load: {in_one_line(error)}") from error
    if isinstance(model, DiT):
        raise ValueError(f"{source} is a diffusion model, which classifies nothing")
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"{source} has no classes: it gives features")
    cfg = model.pretrained_cfg
    names = cfg.get("label_names")
    if isinstance(names, dict):  # as some publish them
        names = [names.get(str(label), str(label)) for label in range(model.num_classes)]
    config = resolve_model_data_config(model)
    return Classifier(model, list(names) if names else None, config, MULTI_LABEL in (cfg.get("notes") or ()), source)
