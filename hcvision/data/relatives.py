"""ImageNet's relatives, from folders as they are distributed: V2, A, R, Sketch, ReaL, and its own val.

| name | what it is | layout |
|---|---|---|
| v2 | ImageNet-V2 (Recht et al., 2019, arXiv 1902.10811) | folders 0 to 999 |
| a | ImageNet-A, natural adversarial examples (Hendrycks et al., 2021, arXiv 1907.07174) | 200 folders of WordNet ids |
| r | ImageNet-R, renditions (Hendrycks et al., 2021, arXiv 2006.16241) | 200 folders of WordNet ids |
| sketch | ImageNet-Sketch (Wang et al., 2019, arXiv 1905.13549) | 1,000 folders of WordNet ids |
| real | ImageNet's val with the ReaL labels (Beyer et al., 2020, arXiv 2006.07159) | ILSVRC2012_val_*.JPEG |
| val | ImageNet's validation images | 1,000 folders of WordNet ids |
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hcvision.data.folders import Folder, is_image, is_left_behind, walk_files
from hcvision.data.images import open_image, printable
from hcvision.data.subsets import LISTS, keep_classes, list_synsets

RELATIVES = {
    "v2": "ImageNet-V2",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
    "real": "ImageNet's validation images for ReaL",
    "val": "ImageNet's validation images",
}
VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


def list_classes(relative: str) -> list[int]:
    """The numbers, among ImageNet's 1,000 classes, of those that a relative has."""
    numbers = {name: number for number, name in enumerate(list_synsets())}
    file = LISTS.get(f"imagenet-{relative}")
    return sorted(numbers[name] for name in list_synsets(file)) if file else list(range(len(numbers)))


def open_relative(relative: str, root: Path, chosen: Sequence[int] | None = None) -> tuple[Any, list[int], list[int]]:
    """The images of a relative.

    Args:
        relative: its name, one of ``RELATIVES``.
        root: its folder, or for val and real the folder with ``val`` in it.
        chosen: numbers of the classes that are wanted; None takes all that the relative has.

    Returns:
        The images, of which each is (image, number of its class among the 1,000), or (image, (1000,) bool) for real;
        the numbers of those images that are of wanted classes; and the numbers of these classes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the relative is unknown, it has none of the classes, or the folder is laid out otherwise.
    """
    if relative not in RELATIVES:
        raise ValueError(f"relative must be one of {', '.join(RELATIVES)}, got {relative!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; data.root must hold {RELATIVES[relative]}")
    own = list_classes(relative)
    wanted = own if chosen is None else sorted({*own} & {*chosen})
    if not wanted:
        raise ValueError(
            f"{RELATIVES[relative]} has none of the classes; it has {len(own)}, {list_synsets()[own[0]]}, ..."
        )
    folder = root / "val" if relative in ("val", "real") and (root / "val").is_dir() else root
    if relative == "real":
        real = RealImages(folder)
        return real, [k for k, labels in enumerate(real.labels) if {*labels} & {*wanted}], wanted
    names = list(list_synsets())
    keys = [str(number) for number in range(len(names))] if relative == "v2" else names
    check_layout(relative, folder, [keys[number] for number in own], [keys[number] for number in wanted])
    base = Folder(folder, keys)
    base.classes = names
    found = set(base.targets)
    empty = [keys[number] for number in wanted if number not in found]
    if empty:
        more = f" (nor in {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise ValueError(f"there is no image in the class folder {folder / empty[0]}{more}")
    return base, keep_classes(base, range(len(base)), wanted), wanted


def check_layout(relative: str, folder: Path, own: list[str], wanted: list[str]) -> None:
    """Raise ValueError when a folder has other subfolders than the relative, or lacks one that is wanted.

    Args:
        relative: its name.
        folder: which should be it.
        own: names of the subfolders that the relative has.
        wanted: those that must be there.
    """
    there = list_folders(folder)
    wrong, missing = sorted(there - {*own}), sorted({*wanted} - there)
    if not wrong and not missing:
        return
    count = f"{len(own):,} folders {'0 to 999' if relative == 'v2' else f'of WordNet ids ({own[0]}, ...)'}"
    inner = [name for name in sorted(there) if {*wanted} <= list_folders(folder / name)]
    if inner:
        what = f"{folder / inner[0]} does"
    elif wrong:
        what = f"got {printable(wrong[0])}" + (f" and {len(wrong) - 1} others" if len(wrong) > 1 else "")
    else:
        what = f"{len(missing)} are missing, {missing[0]} among them"
    raise ValueError(f"{folder} must hold {RELATIVES[relative]} as it is distributed, {count}; {what}")


def list_folders(folder: Path) -> set[str]:
    """Names of the folders in a folder, but for what other programs leave behind and links that lead nowhere."""
    return {name for name in os.listdir(folder) if (folder / name).is_dir() and not is_left_behind(name)}


def read_real_labels() -> list[list[int]]:
    """The ReaL labels of ImageNet's 50,000 validation images, in the order of their names; an image may have none."""
    return json.loads((resources.files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())


class RealImages(torch.utils.data.Dataset):
    """ImageNet's validation images, in folders of classes or not, each with every label that ReaL has for it.

    An image is (image, (1000,) bool). ``labels`` are the numbers of its classes; those without any are not scored.

    Raises:
        ValueError: a file is not named as ImageNet's, or there is no image.
    """

    def __init__(self, folder: Path):
        files = [file for file in walk_files(folder) if is_image(file)]
        if not files:
            raise ValueError(
                f"{folder} must hold ImageNet's validation images, ILSVRC2012_val_*.JPEG, and has no image"
            )
        real = read_real_labels()
        self.samples: list[tuple[str, int]] = []  # file, and which of the 50,000
        self.classes = list(list_synsets())
        for file in files:
            match = VALIDATION.fullmatch(os.path.basename(file))
            if match is None or not 1 <= int(match[1]) <= len(real):
                raise ValueError(
                    f"{printable(file)} has no ReaL label: files must be named as ImageNet's validation images are, "
                    f"ILSVRC2012_val_00000001.JPEG to {len(real):08}"
                )
            self.samples.append((file, int(match[1]) - 1))
        self.labels = [real[number] for _, number in self.samples]
        if len(files) < len(real):
            warnings.warn(f"{folder} has {len(files):,} of ImageNet's {len(real):,} validation images", stacklevel=2)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        is_label = torch.zeros(len(self.classes), dtype=torch.bool)
        is_label[self.labels[index]] = True
        return open_image(self.samples[index][0]), is_label


def pick_label(logits: Tensor, is_label: Tensor) -> Tensor:
    """Of the labels of each image the most probable one: in the first k exactly if any of its labels is.

    Args:
        logits: (B, K).
        is_label: (B, K), bool, at least one per image.

    Returns:
        (B,), numbers of classes.
    """
    return logits.masked_fill(~is_label, float("-inf")).argmax(1)
