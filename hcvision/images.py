"""Image files: which there are, in folders or in a table, what is in them, and what to do with bad ones."""

import contextlib
import csv
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pytorch_lightning.utilities.seed import isolate_rng
from timm.data.auto_augment import AugmentOp
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import datasets as tv_datasets
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

NO_NEWS = {"Thumbs.db", "desktop.ini"}  # in folders of images


def printable(text: str) -> str:
    """The text on one line: as it is, or as Python writes it where it holds newlines or the like."""
    return text if text.isprintable() else repr(text)


@dataclass
class BadImage:
    """An image that could not be read or transformed, where, and why."""

    path: str
    reason: str
    doing: str = "read"

    def __str__(self) -> str:
        return f"cannot {self.doing} image {printable(self.path)}: {printable(self.reason)}"


class Images(Dataset):
    """Chosen samples of a map-style dataset of PIL images, transformed; bad ones become ``BadImage``.

    An index may come with an epoch. Then its augmentation depends on (seed, epoch, index) alone: not
    on the number of workers, on what else draws random numbers, or on where a run was resumed.

    A DataLoader asks for the samples of a batch together. What a transform does last and to all images alike,
    the conversion to floats and the normalization, is done to the whole batch, with the same result to the bit.
    """

    def __init__(self, base: Any, indices: Sequence[int], transform: Callable, mode: str, seed: int = 0):
        self.base, self.indices, self.mode, self.seed = base, indices, mode, seed
        self.transform, self.normalize = split_transform(transform)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int | Tensor] | BadImage:
        sample = self.__getitems__([index])[0]
        return sample if isinstance(sample, BadImage) else (self.to_floats(sample[0]), sample[1])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int | Tensor] | BadImage]:
        """The samples of a batch, which ``collate`` normalizes."""
        augmented = any(isinstance(index, tuple) for index in indices)
        isolated = augmented and get_worker_info() is None  # the process that trains draws random numbers, too
        with isolate_rng(include_cuda=False) if isolated else contextlib.nullcontext():
            return [self.read(index) for index in indices]

    def read(self, index: int | tuple[int, int]) -> tuple[Tensor, int | Tensor] | BadImage:
        """A sample, not normalized yet. Leaves the random generators in a state of its own if an epoch is given."""
        epoch, number = index if isinstance(index, tuple) else (None, index)
        position = self.indices[number]
        doing = "read"
        try:
            image, target = self.base[position]
            image = to_mode(image, self.mode)
            doing = "transform"
            if epoch is not None:
                seed = int(np.random.SeedSequence((self.seed, epoch, number)).generate_state(1)[0])
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - the generator that timm's transforms draw from
                torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a traceback for each kind of GPU
            return self.transform(image), target
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            samples = getattr(self.base, "samples", None)
            path = samples[position][0] if samples else f"number {position}"
            return BadImage(str(path), say_why(error), doing)

    def collate(self, samples: list[tuple[Tensor, int | Tensor] | BadImage]) -> "Batch":
        """What a DataLoader makes of the samples of a batch."""
        batch = collate(samples)
        return replace(batch, images=self.to_floats(batch.images)) if len(batch.images) else batch

    def to_floats(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) as ``transform`` gives them, converted and normalized."""
        if self.normalize is None:
            return images
        return self.normalize(images.to(torch.get_default_dtype()).div_(255))


def split_transform(transform: Callable) -> tuple[Callable, transforms.Normalize | None]:
    """A transform of a PIL image in two: what is done to each image, and what can be done to a whole batch.

    Where it ends with torchvision's conversion to floats and its normalization, the first part gives uint8
    (C, H, W), and the second is the normalization. Else the first part is all of it.
    """
    steps = getattr(transform, "transforms", [])
    last = tuple(map(type, steps[-2:]))
    if last not in ((MaybeToTensor, transforms.Normalize), (transforms.ToTensor, transforms.Normalize)):
        return transform, None
    return transforms.Compose([*steps[:-2], transforms.PILToTensor()]), steps[-1]


@dataclass
class Batch:
    """What the workers hand over: images (B, C, H, W), targets (B,) or (B, K), and what was bad among them."""

    images: Tensor
    targets: Tensor
    bad: list[BadImage]


def collate(samples: list[tuple[Tensor, int | Tensor] | BadImage]) -> Batch:
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    targets = torch.stack([torch.as_tensor(target) for _, target in good]) if good else torch.empty(0, dtype=torch.long)
    return Batch(images, targets, [sample for sample in samples if isinstance(sample, BadImage)])


def keep_a_bit(transform: Any) -> None:
    """Have timm's augmentation posterize to one bit where it would to none, which Pillow 13 refuses."""
    for name in ("transforms", "ops", "policy"):
        for member in getattr(transform, name, None) or ():
            keep_a_bit(member)
    if isinstance(transform, list):  # a policy's
        for member in transform:
            keep_a_bit(member)
    if isinstance(transform, AugmentOp) and transform.name.startswith("Posterize"):
        transform.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, max(bits, 1)) if bits < 8 else image


def say_why(error: Exception) -> str:
    """Why an image cannot be used, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a kind that is not read"
    return getattr(error, "strerror", None) or str(error)


def open_image(path: str) -> Image.Image:
    """The image in memory, its file closed."""
    with Image.open(path) as image:
        image.load()
        return image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in ``mode`` (``RGB`` or ``L``), 8 bits a channel; Pillow would turn 16 bits into white.

    Raises:
        ValueError: its pixels are floats or 32-bit integers.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its pixels are 32-bit integers; 8 or 16 bits a channel would work")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats; 8 or 16 bits a channel would work")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def walk_files(folder: Path) -> Iterator[str]:
    """The files below a folder in the order of torchvision's ImageFolder; links are followed, each folder is read once.

    Raises:
        PermissionError: a folder cannot be read.
    """

    def complain(error: OSError) -> None:
        raise error

    seen, places = set(), []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=complain):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()  # a link that leads back
        else:
            folders.sort()
            seen.add((about.st_dev, about.st_ino))
            places.append((place, sorted(files)))
    for place, files in sorted(places):
        yield from (os.path.join(place, file) for file in files)


class Folder(tv_datasets.ImageFolder):
    """ImageFolder that knows which files it leaves out, and does not follow a link round and round."""

    def make_dataset(self, directory: Any, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:  # type: ignore[override]
        files = [(path, target) for name, target in class_to_idx.items() for path in walk_files(Path(directory) / name)]
        samples = [sample for sample in files if sample[0].lower().endswith(IMG_EXTENSIONS)]
        names = [os.path.basename(path) for path, _ in files if not path.lower().endswith(IMG_EXTENSIONS)]
        self.left_out = [name for name in names if name not in NO_NEWS and not name.startswith(".")]
        return samples


def open_folder(folder: Path) -> Folder:
    """One subfolder per class, as torchvision's ImageFolder, with one clear line for what is missing.

    Raises:
        ValueError: there is no subfolder, or no image in one of them.
        PermissionError: a folder cannot be read.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ValueError(f"there is no class folder in {folder}; it must hold one subfolder per class")
    base = Folder(str(folder), allow_empty=True, loader=open_image)
    found = {target for _, target in base.samples}
    empty = [name for target, name in enumerate(base.classes) if target not in found]
    if empty:
        raise ValueError(
            f"there is no image in the class folder {folder / empty[0]}"
            + (f" (nor in {len(empty) - 1} more)" if len(empty) > 1 else "")
        )
    return base


@dataclass
class Row:
    """A line of a table: an image file, its labels, and the split it belongs to ("" where there is no such column)."""

    file: str
    labels: tuple[str, ...]
    split: str


def read_table(path: Path, file_column: str, label_column: str, separator: str | None = None) -> list[Row]:
    """The rows of a CSV file with a header line; files are relative to its folder.

    Args:
        path: of the CSV file, in UTF-8.
        file_column: name of the column of files.
        label_column: name of the column of labels.
        separator: between the labels of an image; None for exactly one label an image.

    Raises:
        ValueError: no such columns, a row without file or label, a file that is not there.
    """
    rows, missing = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if file_column not in columns or label_column not in columns:
                raise ValueError(
                    f"{path} must have the columns {file_column} and {label_column} in its first line, got "
                    f"{', '.join(columns) or 'nothing'} (--data.file_column and --data.label_column name others)"
                )
            for cells in reader:
                name, label = (cells[column] or "" for column in (file_column, label_column))
                labels = (
                    (label.strip(),)
                    if separator is None
                    else tuple(filter(None, map(str.strip, label.split(separator))))
                )
                if not name or labels == ("",):
                    raise ValueError(f"{path}, line {reader.line_num}: no {'label' if name else 'file'}")
                image = path.parent / name
                if not image.is_file():
                    missing.append(f"{path}, line {reader.line_num}: there is no file {image}")
                rows.append(Row(str(image), labels, (cells.get("split") or "").strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    if missing:
        raise ValueError(missing[0] + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""))
    if not rows:
        raise ValueError(f"there is no image in {path}")
    return rows


def find_classes(rows: Sequence[Row]) -> list[str]:
    """The labels of the rows, each once, sorted: as numbers where all are."""
    labels = {label for row in rows for label in row.labels}
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)


class Table(Dataset):
    """The images of a table's rows; a target is a class number, or with ``multi_label`` (K,), one where a label is.

    Raises:
        ValueError: a label that is none of the classes.
    """

    def __init__(self, rows: Sequence[Row], classes: list[str], multi_label: bool = False):
        self.classes, self.multi_label = classes, multi_label
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = [(row.file, label) for row in rows for label in row.labels if label not in numbers]
        if unknown:
            raise ValueError(
                f"the label {unknown[0][1]!r} of {unknown[0][0]} is not among those of the training images"
            )
        self.labels = [tuple(numbers[label] for label in row.labels) for row in rows]
        self.targets = [0 if multi_label else labels[0] for labels in self.labels]  # what a split is balanced by
        self.samples = [(row.file, target) for row, target in zip(rows, self.targets, strict=True)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | Tensor]:
        path, target = self.samples[index]
        if not self.multi_label:
            return open_image(path), target
        return open_image(path), torch.zeros(len(self.classes)).index_fill(
            0, torch.tensor(self.labels[index], dtype=torch.long), 1
        )


def split_by_class(targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to keep and indices to hold out: ``fraction`` of each class, at least one, chosen by seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(targets)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise ValueError(f"class number {int(label)} has 1 image, too few to split for validation")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().squeeze(1).tolist(), held_out.nonzero().squeeze(1).tolist()
