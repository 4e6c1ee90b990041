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

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from hcvision.data import (
    BadImage,
    check_number,
    check_writable,
    count_workers,
    is_image,
    is_left_behind,
    open_image,
    pick_device,
    walk_files,
    write_whole,
)
from hcvision.deploy.classifier import Classifier, load_classifier

PRECISIONS: dict[str, torch.dtype | None] = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
FORMATS = (".csv", ".json")


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
