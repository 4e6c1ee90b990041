"""Some of the classes of a data set: named by a list, by a file, or as timm's lists of ImageNet's relatives."""

import difflib
from collections.abc import Collection, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcvision.data.images import printable

LISTS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}  # timm's files


@cache
def list_synsets(file: str = "imagenet_synsets.txt") -> tuple[str, ...]:
    """The WordNet ids of a list of timm, in its order; those of ImageNet's 1,000 classes are sorted."""
    return tuple((resources.files("timm.data") / "_info" / file).read_text().split())


def read_classes(classes: Sequence[str] | str) -> list[str]:
    """Names of classes.

    Args:
        classes: the names; or a file with a name a line; or ``imagenet-a`` or ``imagenet-r``, the 200 WordNet ids of
            these; or one name.

    Raises:
        ValueError: there is none, or the file is no text.
    """
    if not isinstance(classes, str):
        names = [str(name) for name in classes]
    elif classes in LISTS:
        names = list(list_synsets(LISTS[classes]))
    elif Path(classes).is_file():
        try:
            names = [line.strip() for line in Path(classes).read_text().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{classes} must hold the name of a class in each line, and is no text") from error
    else:
        names = [classes]
    if not names:
        raise ValueError(f"classes must name one class or more, got none in {classes!r}")
    return names


def find_numbers(classes: Sequence[str] | str, known: Sequence[str]) -> list[int]:
    """The numbers of classes, sorted, each once.

    Args:
        classes: as ``read_classes`` has them.
        known: names of all classes.

    Raises:
        ValueError: one of them is not known; the line has the nearest names.
    """
    numbers = {name: number for number, name in enumerate(known)}
    names = read_classes(classes)
    unknown = [name for name in names if name not in numbers]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {' or '.join(map(printable, near))}?" if near else f"they are {shorten(known)}"
        more = f" (nor are {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        is_path = isinstance(classes, str) and "/" in classes
        raise ValueError(
            f"there is no file {classes} of classes"
            if is_path and unknown == [classes]
            else f"{unknown[0]!r} is no class of the data{more}; {hint}"
        )
    return sorted({numbers[name] for name in names})


def shorten(names: Sequence[str]) -> str:
    """The first few names on one line, and how many there are."""
    shown = ", ".join(map(printable, names[:4]))
    return f"{shown}, ... ({len(names)} of them)" if len(names) > 4 else shown


def keep_classes(base: Any, indices: Sequence[int], chosen: Collection[int]) -> list[int]:
    """Those of the indices whose images are of chosen classes; ``base.targets`` has the class of each image."""
    chosen = set(chosen)
    return [index for index in indices if int(base.targets[index]) in chosen]


def leave_out(logits: Tensor, chosen: Sequence[int]) -> Tensor:
    """Logits (B, K) with minus infinity for the classes that are not chosen: their probability is 0."""
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[list(chosen)] = False
    return logits.masked_fill(others, float("-inf"))
