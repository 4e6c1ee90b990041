"""What a trained classifier says of image files."""

import csv
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from hcvision.arguments import check_number, in_one_line, refusals
from hcvision.convert import create_model
from hcvision.data import ImageData, count_workers
from hcvision.dit import DiT
from hcvision.images import BadImage, Images, is_image, is_left_behind, mode_of, open_image, walk_files
from hcvision.runs import best_checkpoint, check_writable, checkpoint_folder, pick_device, read_checkpoint, write_whole
from hcvision.training import ImageClassifier, ImageGenerator, TimmModule

WEIGHTS = ("ema", "raw")
PRECISIONS: dict[str, torch.dtype | None] = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
FORMATS = (".csv", ".json")
MULTI_LABEL = "multi_label"  # among the notes in a hub folder's pretrained_cfg
FOR_TRAINING = {
    "pretrained": False,
    "init_from": None,
    "grad_checkpointing": False,
}  # what a trained model needs no more
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


def find_checkpoint(source: str) -> Path:
    """The file that a run's folder (its best checkpoint, or its last) or a path stands for.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the folder is no run's.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {source}; a run's folder, a checkpoint, a folder that timm saved or hf-hub:OWNER/NAME "
                "would work"
            )
        return path
    file = best_checkpoint(path)
    if file is None and (checkpoint_folder(path).is_dir() or (path / "config.yaml").is_file()):
        raise FileNotFoundError(f"there is no checkpoint in the run {path} yet")
    if file is None:
        raise ValueError(
            f"{path} holds no classifier: neither checkpoints/best.ckpt or last.ckpt, as a run does, nor "
            "config.json and model.safetensors, as timm saves models"
        )
    return file


def load_module(file: Path, weights: str = "ema", **changes: Any) -> tuple[TimmModule, dict[str, Any]]:
    """The module of a checkpoint, with its weights, in evaluation mode, and the checkpoint.

    Args:
        file: a checkpoint of ours.
        weights: ema or raw, as ``load_classifier`` has it.
        **changes: of the arguments that the module was made with.

    Raises:
        ValueError: it is something else, or damaged.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    checkpoint = read_checkpoint(file)
    hparams = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(hparams, dict) or "model" not in hparams or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is no checkpoint of ours; those of a run are in RUN/checkpoints")
    kind: Any = ImageGenerator if "objective" in hparams else ImageClassifier
    hparams = hparams | {name: value for name, value in FOR_TRAINING.items() if name in hparams} | changes
    with refusals(f"{file} is of a model that cannot be built"):
        module = kind(**hparams)
    averaged = "current_model_state" in checkpoint
    state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
    module.on_load_checkpoint({**checkpoint, "state_dict": state})
    module.load_state_dict(state)
    return module.eval(), checkpoint


def run_config(source: str) -> Path | None:
    """The config.yaml of the run that a folder or a checkpoint in it is of, if there is one."""
    path = Path(source)
    run = path if path.is_dir() else path.absolute().parent.parent
    known = path.exists() and checkpoint_folder(run).is_dir() and (run / "config.yaml").is_file()
    return run / "config.yaml" if known else None


def run_data(source: str, but_not: tuple[str, ...] = (), changes: dict[str, Any] | None = None) -> ImageData:
    """The data of the run that a folder or a checkpoint in it is of, as its config.yaml has them, but for ``changes``.

    Raises:
        ValueError: no config.yaml says what they are, they cannot be opened, or are a dataset that begins as one of
            ``but_not``.
    """
    path = run_config(source)
    if path is None:
        raise ValueError("no config.yaml says what the data are")
    try:
        own, changes = yaml.safe_load(path.read_text())["data"], changes or {}
        if any("pipe:" in str(value).lower() for name, value in own.items() if name not in changes):
            raise ValueError("its config.yaml names a command, which only the command line may")
        config = own | changes
        if not config.get("dataset", "folder").startswith(but_not):
            return ImageData(**{**config, "num_workers": 0})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, yaml.YAMLError) as error:
        raise ValueError(f"the run's cannot be opened: {in_one_line(error)}") from error
    raise ValueError(f"the dataset {config['dataset']} is not looked into")


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


def find_images(patterns: Iterable[str]) -> list[Path]:
    """The image files that are meant, each once.

    Args:
        patterns: files, which are taken whatever they are called; folders, for the images in them and in theirs, in
            order; and patterns such as ``photos/**/*.jpg``. What other programs leave in folders is passed over.

    Raises:
        ValueError: there is nothing, or a folder has no image in it.
        PermissionError: a folder cannot be read.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        places = [pattern] if os.path.lexists(pattern) else _fitting(pattern)
        if not places:
            raise ValueError(f"there is no {pattern!r}: neither a file, nor a folder, nor a pattern that fits any")
        files = [place for place in places if not os.path.isdir(place)]
        if len(places) > 1:
            files = [file for file in files if is_image(file)] or files
        for place in places:
            files += [file for file in walk_files(Path(place)) if is_image(file)] if os.path.isdir(place) else []
        if not files:
            raise ValueError(f"there is no image in {pattern!r}; they end in {', '.join(IMG_EXTENSIONS)}")
        found |= dict.fromkeys(map(Path, files))
    return list(found)


def _fitting(pattern: str) -> list[str]:
    """What fits a pattern, in order, without what other programs leave behind, unless the pattern names it.

    ``**`` follows no links, which may lead round and round.
    """
    parts = Path(pattern).parts
    fixed = len(list(itertools.takewhile(lambda part: not set(part) & set("*?["), parts)))
    if fixed == len(parts):
        return []
    found = Path(*parts[:fixed]).glob("/".join(parts[fixed:]))
    named = any(map(is_left_behind, parts[fixed:]))
    return sorted(str(path) for path in found if named or not any(map(is_left_behind, path.parts[fixed:])))


class Files:
    """Image files as a dataset; the target of each is its number."""

    def __init__(self, files: Sequence[Path]):
        self.samples = [(str(file), number) for number, file in enumerate(files)]

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return open_image(self.samples[number][0]), number


@dataclass
class Predictions:
    """The K most probable classes of N files, and what could not be read."""

    files: list[Path]
    classes: Tensor  # (N, K), the most probable first
    probabilities: Tensor  # (N, K)
    unreadable: list[BadImage]


@torch.inference_mode()
def predict_files(
    classifier: Classifier,
    files: Sequence[Path],
    top_k: int = 5,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    precision: str = "32",
) -> Predictions:
    """What a classifier says of image files, which are prepared as for validation.

    Args:
        classifier: its model is left on the device.
        files: in the order of the predictions.
        top_k: classes per file, at most as many as there are.
        batch_size: images at a time.
        num_workers: loading processes; None takes the CPU cores available, at most 8, and none for a single batch.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
        precision: 32, or bf16 or 16 for autocast.

    Raises:
        ValueError: an argument out of range, or a device that is not there.
    """
    for name, value, least in (("top_k", top_k, 1), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None:
            check_number(name, value, least, whole=True)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")
    place = torch.device(pick_device(device))
    model = classifier.model.to(place)
    dtype = PRECISIONS[precision]
    if num_workers is None:
        num_workers = min(count_workers(None), math.ceil(len(files) / batch_size) - 1)
    images = classifier.dataset(Files(files), range(len(files)))
    loader = DataLoader(
        images, batch_size, num_workers=max(num_workers, 0), collate_fn=images.collate, pin_memory=place.type == "cuda"
    )
    read: list[Path] = []
    classes, probabilities, unreadable = [], [], []
    with tqdm(total=len(files), desc="predicting", unit=" images", disable=None, leave=False) as bar:
        for batch in loader:
            if len(batch.images):
                with torch.autocast(place.type, dtype, enabled=dtype is not None):
                    logits = model(batch.images.to(place, non_blocking=True))
                top = classifier.probabilities(logits).cpu().topk(min(top_k, classifier.num_classes))
                classes.append(top.indices)
                probabilities.append(top.values)
            read += [files[number] for number in batch.targets.tolist()]
            unreadable += batch.bad
            bar.update(len(batch.targets) + len(batch.bad))
    empty = torch.empty(0, min(top_k, classifier.num_classes))
    return Predictions(read, torch.cat(classes or [empty.long()]), torch.cat(probabilities or [empty]), unreadable)


def predict(
    checkpoint: str,
    images: list[str],
    out: str = "predictions.csv",
    top_k: int = 5,
    weights: str = "ema",
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    precision: str = "32",
    overwrite: bool = False,
) -> int:
    """Write what a trained classifier says of image files.

    Args:
        checkpoint: a run's folder, a checkpoint, a folder that timm or `hcvision export` wrote, or hf-hub:OWNER/NAME.
        images: files, folders (with all that is below them) and patterns such as 'photos/*.jpg'.
        out: file to write, .csv or .json.
        top_k: classes per image, the most probable first.
        weights: ema or raw, where the run averaged its weights.
        batch_size: images at a time.
        num_workers: loading processes; the CPU cores available, at most 8, if not given.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
        precision: 32, bf16 or 16.
        overwrite: replace a file that is there.

    Returns:
        0 if every image was read, 1 if some were not.

    Raises:
        ValueError: an argument out of range, no such images, or none that can be read.
        FileExistsError: there is a file ``out``.
    """
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"out must end in .csv or .json, got {out}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{out} exists; --overwrite true replaces a file, --out names another one")
    check_writable(path.parent, "--out names another file")
    files = find_images(images)
    classifier = load_classifier(checkpoint, weights)
    predictions = predict_files(classifier, files, top_k, batch_size, num_workers, device, precision)
    for bad in predictions.unreadable:
        print(bad, file=sys.stderr)
    if not predictions.files:
        raise ValueError(f"none of the {len(files)} images could be read")
    write = _as_csv if path.suffix.lower() == ".csv" else _as_json
    write_whole(path, write(classifier, predictions).encode("utf-8", "surrogateescape"))
    print(f"{len(predictions.files)} predictions in {out}, {len(predictions.unreadable)} unreadable")
    return 1 if predictions.unreadable else 0


def _named(classifier: Classifier, predictions: Predictions) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each file with its classes and their probabilities, by name and in six digits."""
    return [
        (str(file), [(classifier.name(label), f"{value:.6g}") for label, value in zip(labels, values, strict=True)])
        for file, labels, values in zip(
            predictions.files, predictions.classes.tolist(), predictions.probabilities.tolist(), strict=True
        )
    ]


def _as_csv(classifier: Classifier, predictions: Predictions) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    suffixes = ["", *(f"_{k + 2}" for k in range(predictions.classes.shape[1] - 1))]
    writer.writerow(["file", *(f"{what}{suffix}" for suffix in suffixes for what in ("class", "probability"))])
    for file, top in _named(classifier, predictions):
        writer.writerow([file, *(cell for pair in top for cell in pair)])
    return text.getvalue()


def _as_json(classifier: Classifier, predictions: Predictions) -> str:
    images = [
        {"file": file, "top": [{"class": name, "probability": float(value)} for name, value in top]}
        for file, top in _named(classifier, predictions)
    ]
    unreadable = [{"file": bad.path, "reason": bad.reason} for bad in predictions.unreadable]
    return json.dumps({"checkpoint": classifier.origin, "images": images, "unreadable": unreadable}, indent=1)
