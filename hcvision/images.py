"""Image files: which there are, in folders or in a table, what is in them, and what to do with bad ones."""

import contextlib
import csv
import os
import random
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

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

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names of those that are read
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names of images of so many channels
DECODING_ERRORS = (  # what Pillow's decoders raise for files that are damaged, or made to damage
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
    *(EOFError, BufferError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
LEFT_BEHIND = {  # what other programs leave in folders, in lower case, beside names that begin with a dot
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("lost+found", "lost.dir", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),
}

OF_OTHERS = "what other programs leave behind"


def is_left_behind(name: str) -> bool:
    """Whether a file or folder of that name, without its path, is hidden or what other programs leave behind."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def is_image(file: str) -> bool:
    """Whether a file is an image by its name."""
    return file.lower().endswith(IMG_EXTENSIONS)


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
        try:
            image, target = self.base[position]
            image = to_mode(image, self.mode)
        except DECODING_ERRORS as error:
            return BadImage(self.name_of(position), say_why(error))
        try:
            if epoch is not None:
                seed = int(np.random.SeedSequence((self.seed, epoch, number)).generate_state(1)[0])
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - the generator that timm's transforms draw from
                torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a traceback for each kind of GPU
            return self.transform(image), target
        except (OSError, ValueError) as error:
            return BadImage(self.name_of(position), say_why(error), "transform")

    def name_of(self, position: int) -> str:
        """What an image of the dataset is called in messages: its path, where it has one."""
        samples = getattr(self.base, "samples", None)
        return str(samples[position][0]) if samples else f"number {position}"

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
    if isinstance(error, (OSError, SyntaxError, ValueError, Image.DecompressionBombError)) and str(error):
        return getattr(error, "strerror", None) or str(error)
    return f"its decoder fails with {type(error).__name__}: {error}".removesuffix(": ")


def open_image(source: str | BinaryIO) -> Image.Image:
    """The image of a file in memory, upright as its EXIF orientation says. No other program takes part in it.

    Raises:
        DECODING_ERRORS: it is no image of one of FORMATS, or a damaged one.
    """
    if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is no regular file")  # reading a pipe would wait for whoever writes into it
    with Image.open(source, formats=FORMATS) as image:
        scale_transparency(image)
        image.load()
        with contextlib.suppress(*DECODING_ERRORS):  # damaged EXIF says nothing; the pixels are good
            ImageOps.exif_transpose(image, in_place=True)
        return image


def scale_transparency(image: Any) -> None:
    """Bring the transparent colour of a PNG to 8 bits a channel; Pillow does this with its pixels alone."""
    pixels = image.tile[0][3] if image.format == "PNG" and image.tile else None
    color = image.info.get("transparency")
    if pixels in ("L;2", "L;4") and color is not None:
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[pixels]
    elif pixels == "RGB;16B" and color is not None:
        image.info["transparency"] = tuple(value >> 8 for value in color)


def mode_of(channels: int) -> str:
    """Pillow's name of images of so many channels.

    Raises:
        ValueError: there are none.
    """
    if channels not in MODES:
        raise ValueError(
            f"images are read with 1 (gray), 3 (RGB) or 4 channels (RGBA), the model takes {channels} (in_chans)"
        )
    return MODES[channels]


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in ``mode`` (``RGB``, ``L`` or ``RGBA``), 8 bits a channel; Pillow would turn 16 bits into white.

    Where there is no channel for it, transparency is laid over white, whatever colour is behind it.

    Raises:
        ValueError: its pixels are floats or 32-bit integers.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its pixels are 32-bit integers; 8 or 16 bits a channel would work")
        transparent = image.info.get("transparency")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    elif image.mode == "F":
        raise ValueError("its pixels are floats; 8 or 16 bits a channel would work")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def walk_files(folder: Path, left_behind: list[str] | None = None) -> Iterator[str]:
    """The files below a folder in the order of torchvision's ImageFolder; links are followed, each folder is read once.

    What other programs leave behind is passed over; names of it that stand for images, and of folders, are put into
    ``left_behind``.

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
            continue
        seen.add((about.st_dev, about.st_ino))
        if left_behind is not None:
            left_behind += [name for name in folders if is_left_behind(name)]
            left_behind += [name for name in files if is_left_behind(name) and is_image(name)]
        folders[:] = sorted(name for name in folders if not is_left_behind(name))
        places.append((place, sorted(name for name in files if not is_left_behind(name))))
    for place, files in sorted(places):
        yield from (os.path.join(place, file) for file in files)


class Folder(tv_datasets.ImageFolder):
    """ImageFolder that knows which files it leaves out, and does not follow a link round and round.

    Args:
        folder: with one subfolder per class.
        classes: names of the classes, for another part of the same data; None takes the subfolders.

    Attributes:
        left_out: names of files that are no images by their names.
        left_behind: names of what other programs leave behind, where it could be taken for images or classes.
        unknown: names of subfolders that are none of ``classes``.
    """

    def __init__(self, folder: Path, classes: list[str] | None = None):
        self.given = classes
        self.left_out: list[str] = []
        self.left_behind: list[str] = []
        self.unknown: list[str] = []
        super().__init__(str(folder), allow_empty=True, loader=open_image)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        there = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        self.left_behind += [name for name in there if is_left_behind(name)]
        there = [name for name in there if not is_left_behind(name)]
        if not there:
            raise ValueError(f"there is no class folder in {directory}; it must hold one subfolder per class")
        classes = there if self.given is None else self.given
        self.unknown = sorted(set(there) - set(classes))
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory: Any, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:  # type: ignore[override]
        places = [(Path(directory) / name, target) for name, target in class_to_idx.items()]
        files = [(p, target) for place, target in places if place.is_dir() for p in walk_files(place, self.left_behind)]
        self.left_out = [os.path.basename(path) for path, _ in files if not is_image(path)]
        return [sample for sample in files if is_image(sample[0])]

    @property
    def empty(self) -> list[str]:
        """Names of the classes without images."""
        found = {target for _, target in self.samples}
        return [name for target, name in enumerate(self.classes) if target not in found]


def open_folder(folder: Path, like: Folder | None = None) -> Folder:
    """One subfolder per class, as torchvision's ImageFolder, with one clear line for what is missing.

    Args:
        folder: with the subfolders.
        like: the training images, where these are another part of the same data: classes have the numbers that they
            have there, and may be without images here.

    Raises:
        ValueError: there is no subfolder, or no image in one of them, or one that ``like`` has not.
        PermissionError: a folder cannot be read.
    """
    base = Folder(folder, like.classes if like else None)
    if base.unknown and like:
        raise ValueError(
            f"the class folders of {Path(like.root).name} and {folder.name} differ: {', '.join(base.unknown)}"
        )
    if base.empty and (like is None or not base.samples):
        raise ValueError(
            f"there is no image in the class folder {folder / base.empty[0]}"
            + (f" (nor in {len(base.empty) - 1} more)" if len(base.empty) > 1 else "")
        )
    return base


def warn_of_left_out(folders: Iterable[Folder], place: str | Path) -> None:
    """Say which files of folders are left out: those that are no images, and what other programs left behind."""
    folders = list(folders)
    say_left_out("no images by their names", (name for folder in folders for name in folder.left_out), place)
    say_left_out(OF_OTHERS, (name for folder in folders for name in folder.left_behind), place)


def say_left_out(why: str, names: Iterable[str], place: str | Path) -> None:
    names = sorted(set(names))
    if names:
        shown = ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)
        warnings.warn(f"left out, {why}: {shown} ({len(names)} in {place})", stacklevel=4)


@dataclass
class Row:
    """A line of a table: an image file, its labels, and the split it belongs to ("" where there is no such column)."""

    file: str
    labels: tuple[str, ...]
    split: str


def read_table(
    path: Path, file_column: str, label_column: str, separator: str | None = None, unlabelled: str | None = None
) -> list[Row]:
    """The rows of a CSV file with a header line; files are relative to its folder.

    Rows of files that other programs leave behind, by their names below the folder of all files, are left out.

    Args:
        path: of the CSV file, in UTF-8.
        file_column: name of the column of files.
        label_column: name of the column of labels.
        separator: between the labels of an image; None for exactly one label an image.
        unlabelled: the split whose rows may be without a label, and whose files need not be there yet.

    Raises:
        ValueError: no such columns, a row without file or label, a file that is not there.
    """
    rows: dict[int, Row] = {}
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
                split = (cells.get("split") or "").strip()
                given = [label] if separator is None else label.split(separator)
                labels = tuple(filter(None, map(str.strip, given)))
                if not name or not (labels or separator or (split and split == unlabelled)):
                    raise ValueError(f"{path}, line {reader.line_num}: no {'label' if name else 'file'}")
                rows[reader.line_num] = Row(str(path.parent / name), labels, split)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    left_behind = find_left_behind([row.file for row in rows.values()])
    say_left_out(OF_OTHERS, left_behind, path)
    rows = {line: row for line, row in rows.items() if row.file not in left_behind}
    needed = {line: row.file for line, row in rows.items() if not row.split or row.split != unlabelled}
    missing = [(line, file) for line, file in needed.items() if not os.path.isfile(file)]
    if missing:
        line, name = missing[0]
        more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{path}, line {line}: there is no file {name}{more}")
    if not rows:
        raise ValueError(f"there is no image in {path}")
    return list(rows.values())


def find_left_behind(files: Sequence[str]) -> set[str]:
    """Those of the files that other programs leave behind: by their names and those of folders that not all share."""
    full = {file: os.path.abspath(file) for file in files}
    top = len(os.path.commonpath(map(os.path.dirname, full.values()))) if files else 0
    return {file for file, path in full.items() if any(map(is_left_behind, path[top:].split(os.sep)))}


def find_classes(rows: Sequence[Row]) -> list[str]:
    """The labels of the rows, each once, sorted: as numbers where all are, and by their text where these are equal."""
    labels = sorted({label for row in rows for label in row.labels})
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


class Table(Dataset):
    """The images of a table's rows; a target is a class number, or with ``multi_label`` (K,), one where a label is.

    Raises:
        ValueError: a label that is none of the classes, or a row without a label.
    """

    def __init__(self, rows: Sequence[Row], classes: list[str], multi_label: bool = False):
        self.classes, self.multi_label = classes, multi_label
        bare = None if multi_label else next((row.file for row in rows if not row.labels), None)
        if bare is not None:
            raise ValueError(f"there is no label of {bare}")
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = [(row.file, label) for row in rows for label in row.labels if label not in numbers]
        if unknown:
            raise ValueError(
                f"the label {unknown[0][1]!r} of {unknown[0][0]} is not among those of the training images"
            )
        self.labels = [tuple(numbers[label] for label in row.labels) for row in rows]
        self.targets = [0 if multi_label else labels[0] for labels in self.labels]  # what a split is balanced by
        self.samples = [(row.file, target) for row, target in zip(rows, self.targets, strict=True)]

    @property
    def empty(self) -> list[str]:
        """Names of the classes without images."""
        found = {label for labels in self.labels for label in labels}
        return [name for label, name in enumerate(self.classes) if label not in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | Tensor]:
        path, target = self.samples[index]
        if not self.multi_label:
            return open_image(path), target
        return open_image(path), torch.zeros(len(self.classes)).index_fill(
            0, torch.tensor(self.labels[index], dtype=torch.long), 1
        )


def split_by_class(
    targets: Sequence[int], fraction: float, seed: int, names: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Indices to keep and indices to hold out: ``fraction`` of each class, at least one, chosen by seed.

    Args:
        targets: number of the class of each image.
        fraction: between 0 and 1.
        seed: of the choice.
        names: of the classes, for the message.

    Raises:
        ValueError: a class has 1 image.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(targets)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            name = repr(names[label]) if names else f"number {label}"
            raise ValueError(f"class {name} has 1 image, too few to split for validation")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().squeeze(1).tolist(), held_out.nonzero().squeeze(1).tolist()
