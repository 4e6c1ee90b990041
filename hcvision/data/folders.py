"""Folders of images: which files there are, and what other programs left behind."""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from hcvision.data.images import open_image

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
        with os.scandir(directory) as entries:
            there = sorted(entry.name for entry in entries if os.path.isdir(entry.path))  # not a link to itself
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


def find_left_behind(files: Sequence[str]) -> set[str]:
    """Those of the files that other programs leave behind: by their names and those of folders that not all share."""
    full = {file: os.path.abspath(file) for file in files}
    top = len(os.path.commonpath(map(os.path.dirname, full.values()))) if files else 0
    return {file for file, path in full.items() if any(map(is_left_behind, path[top:].split(os.sep)))}


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
