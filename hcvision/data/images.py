"""Image files: read, converted, put into batches, bad ones named."""

import contextlib
import os
import random
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pytorch_lightning.utilities.seed import isolate_rng
from timm.data.auto_augment import AugmentOp
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import transforms

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names of those that are read
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names of images of so many channels
DECODING_ERRORS = (  # what Pillow's decoders raise for files that are damaged, or made to damage
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError),
    *(EOFError, BufferError, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)


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
    """What the workers hand over: images (B, C, H, W), targets (B,) or (B, K), and what was bad among them.

    Of latents with stored features of an encoder these too, (B, F, h, w), where they are wanted.
    """

    images: Tensor
    targets: Tensor
    bad: list[BadImage]
    features: Tensor | None = None


def collate(samples: list[Any]) -> Batch:
    """Samples of an image and a target each, or of features too, or bad ones."""
    good = [sample for sample in samples if not isinstance(sample, BadImage)]
    images = torch.stack([sample[0] for sample in good]) if good else torch.empty(0)
    targets = [torch.as_tensor(sample[1]) for sample in good]
    features = torch.stack([sample[2] for sample in good]) if good and len(good[0]) > 2 else None
    bad = [sample for sample in samples if isinstance(sample, BadImage)]
    return Batch(images, torch.stack(targets) if good else torch.empty(0, dtype=torch.long), bad, features)


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
