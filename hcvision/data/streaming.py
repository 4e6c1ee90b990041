"""Datasets by timm's strings: tar shards (wds/...), Hugging Face datasets streamed (hfids/...) or not (hfds/...).

timm's own readers, shared among loading processes, leave images out of an evaluation or count some twice, and drop
what they cannot read without a word. Here every image has a number. Process r of W has the numbers r, r + W, ... and
its loading processes take its batches in turn; the batches of one loading process are a lane, and a lane reads a part
of the shards of its own, from front to back.
"""

import importlib
import io
import itertools
import json
import lzma
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.targets import get_field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from hcvision.data.folders import is_left_behind, open_folder
from hcvision.data.images import DECODING_ERRORS, open_image

PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}
UNREADABLE = (*DECODING_ERRORS, tarfile.TarError, lzma.LZMAError)
Sample = tuple[str, Any]  # its name, and what is stored; an exception where that cannot be read


class Shards:
    """The shards of a split.

    Attributes:
        names: of the shards.
        lengths: how many images each of them holds, or None if only their sum is known.
        total: that sum.
        classes: names, or None.
        buffer: how many images training shuffles among, and how many of them must be there to begin.
    """

    names: list[str]
    lengths: list[int] | None
    total: int
    classes: list[str] | None = None
    buffer: tuple[int, int]

    def __len__(self) -> int:
        return self.total

    def read(self, shard: int) -> Iterator[Sample]:
        """The samples of a shard, as they are stored. Raises anything of UNREADABLE."""
        raise NotImplementedError

    def decode(self, stored: Any) -> tuple[Image.Image, int]:
        """Image and label; -1 stands for no label."""
        raise NotImplementedError

    def samples(self, shard: int) -> Iterator[Sample]:
        """The same; after damage comes an exception, as often as there can be images."""
        count = 0
        try:
            for sample in self.read(shard):
                yield sample
                count += 1
        except UNREADABLE as error:
            reason = str(error.args[0] if error.args else error).partition(" @ ")[0]
            problem = ValueError(f"the shard is damaged after {count} images: {reason}")
            yield from itertools.repeat((self.names[shard], problem), self.lengths[shard] if self.lengths else 1)

    def between(self, order: list[int], start: int, stop: int) -> Iterator[Sample]:
        """The samples from start to stop of shards laid end to end, neither more nor fewer."""
        parts: list[tuple[str, Iterator[Sample], int]]
        if self.lengths is None:
            parts = [("of the split", itertools.chain.from_iterable(map(self.samples, order)), self.total)]
        else:
            parts = [(self.names[shard], self.samples(shard), self.lengths[shard]) for shard in order]
        before = 0
        for name, samples, length in parts:
            first, last = max(start - before, 0), min(stop - before, length)
            before += length
            if first < last:
                yield from itertools.islice(exactly(name, samples, length), first, last)

    def share(self, order: list[int], lane: int, lanes: int) -> Iterator[Sample]:
        """What one of so many lanes reads where lengths are not known: every so many-th shard, or image of a shard."""
        number = len(order)
        sharing = len(range(lane % number, lanes, number))
        for shard in order[lane % number :: lanes]:
            yield from itertools.islice(self.samples(shard), lane // number, None, sharing)


def exactly(name: str, samples: Iterator[Sample], length: int) -> Iterator[Sample]:
    """So many samples; an exception for each that is missing, and for the last one if there are more."""
    held = 0
    for position in range(length):
        sample = next(samples, None)
        held += sample is not None
        if sample is None:
            sample = name, ValueError(f"there are {held} images, not {length}")
        elif position == length - 1 and not isinstance(sample[1], Exception) and next(samples, None) is not None:
            sample = name, ValueError(f"there are more than {length} images")
        yield sample


def shuffle(samples: Iterator[Sample], size: int, initial: int, generator: np.random.Generator) -> Iterator[Sample]:
    """The same samples, each drawn from the next ``size``; from ``initial`` to begin with, and one more each time."""
    held: list[Sample] = []
    for sample in samples:
        held += [sample, *itertools.islice(samples, int(len(held) + 1 < size))]
        if len(held) >= min(initial, size):
            place = generator.integers(len(held))
            held[place], held[-1] = held[-1], held[place]
            yield held.pop()
    yield from (held[place] for place in generator.permutation(len(held)))


class Lanes(Dataset):
    """Images of shards by number, to be asked for in ascending order, with the epoch set.

    Args:
        shards: of the split.
        seed: of the order in training.
        world: number of processes.
        batch_size: images per process and step.
        workers: loading processes.
        training: shuffle by seed and ``epoch``, and give every process the same number of whole batches.
        in_order: number n is image n of the shards (every lane reads them all).
    """

    def __init__(
        self,
        shards: Shards,
        seed: int,
        world: int,
        batch_size: int,
        workers: int,
        training: bool = False,
        in_order: bool = False,
    ):
        self.shards, self.seed, self.world, self.batch_size, self.lanes = shards, seed, world, batch_size, workers or 1
        self.training, self.in_order, self.epoch = training, in_order, 0
        self.reading: dict[int, tuple[int, int, Iterator[Sample]]] = {}  # lane: epoch, samples read, the others
        self.samples: dict[int, Sample] = {}  # the last one by its number, for whoever has to say its name

    def __len__(self) -> int:
        return len(self.shards)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reading": {}}

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        place, rank = divmod(number, self.world)
        batch, place = divmod(place, self.batch_size)
        turn, lane = divmod(batch, self.lanes)
        place += turn * self.batch_size
        epoch, count, samples = self.reading.get(lane, (-1, 0, iter(())))
        if epoch != self.epoch or place < count:
            count, samples = 0, self.lane(rank, lane)
        sample = next(itertools.islice(samples, place - count, None))  # what is passed over is not decoded
        self.reading[lane] = self.epoch, place + 1, samples
        self.samples = {number: sample}
        if isinstance(sample[1], Exception):
            raise sample[1]
        return self.shards.decode(sample[1])

    def lane(self, rank: int, lane: int) -> Iterator[Sample]:
        """The samples of a lane in this epoch."""
        shards, world, total = self.shards, self.world, len(self)
        order = list(range(len(shards.names)))
        if self.in_order:
            for number, sample in enumerate(shards.between(order, 0, total)):
                if number % world == rank and number // world // self.batch_size % self.lanes == lane:
                    yield sample
            return
        count = len(range(rank, total, world))
        start = rank * (total // world) + min(rank, total % world)
        if self.training:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
            count = total // world // self.batch_size * self.batch_size
            start = rank * count
        size = self.batch_size
        firsts = [range(k * size, count, self.lanes * size) for k in range(self.lanes)]  # of the batches of each lane
        parts = [sum(min(size, count - first) for first in each) for each in firsts]
        start += sum(parts[:lane])
        samples = shards.between(order, start, start + parts[lane])
        if not self.training:
            yield from samples
            return
        generator = np.random.default_rng((self.seed, self.epoch, rank, lane))
        if shards.lengths is not None:
            yield from shuffle(samples, *shards.buffer, generator)
            return
        while True:
            empty = True
            for sample in shuffle(
                shards.share(order, lane * world + rank, world * self.lanes), *shards.buffer, generator
            ):
                empty = False
                yield sample
            if empty:
                yield shards.names[0], ValueError(f"too few images for {world} x {self.lanes} loading processes")


class TarShards(Shards):
    """Tar files of images with their labels beside them (KEY.jpg, KEY.cls), as _info.json or a pattern lists them.

    Raises:
        FileNotFoundError: a shard is not there.
        ValueError: nothing says how many images there are.
    """

    def __init__(self, name: str, root: str, split: str):
        reader = create_dataset(name, root=root, split=split).reader
        about = reader.split_info
        lengths: dict[str, int] = {}
        for part in reader.info.get("splits", {}).values():
            lengths |= zip(part["filenames"], part["shard_lengths"], strict=True)
        command = next((file for file in lengths if "pipe:" in file.lower()), None)
        if command is not None:
            raise ValueError(f"_info.json names a command ({command!r}), which only the command line may")
        self.names = [file if is_remote(file) else os.path.join(root, file) for file in about.filenames]
        missing = [path for path in self.names if not is_remote(path) and not os.path.isfile(path)]
        if missing:
            more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise FileNotFoundError(f"there is no shard {missing[0]}{more}")
        known = all(file in lengths for file in about.filenames)
        self.lengths = [lengths[file] for file in about.filenames] if known else None
        self.total = about.num_samples if self.lengths is None else sum(self.lengths)
        if not self.total:
            raise ValueError(f"nothing says how many images there are; {split}|50000 would")
        self.label = about.alt_label
        self.buffer = (reader.sample_shuffle_size, reader.sample_initial_size)

    def read(self, shard: int) -> Iterator[Sample]:
        tariterators = importlib.import_module("webdataset.tariterators")
        name = self.names[shard]
        with tariterators.gopen.gopen(name) as stream:  # left to webdataset it would stay open
            files = tariterators.tar_file_expander(iter([{"url": name, "stream": stream}]), select_files=is_kept)
            for stored in tariterators.group_by_keys(files):
                yield f"{name}: {stored['__key__']}", stored

    def decode(self, stored: Any) -> tuple[Image.Image, int]:
        content = next((stored[suffix[1:]] for suffix in IMG_EXTENSIONS if suffix[1:] in stored), None)
        if content is None:
            raise ValueError(f"there is no image, only {', '.join(key for key in stored if not key.startswith('__'))}")
        label = get_field(json.loads(stored["json"]), self.label) if self.label else stored.get("cls", -1)
        return open_image(io.BytesIO(content)), int(label)


class HubShards(Shards):
    """A split of a Hugging Face dataset as a stream; its files are the shards.

    Raises:
        ValueError: a column is missing, or nothing says how many images there are.
    """

    def __init__(self, name: str, root: str, split: str, label: str):
        datasets = importlib.import_module("datasets")
        split, _, number = split.partition("|")
        builder = datasets.load_dataset_builder(name, cache_dir=root)
        stream = builder.as_streaming_dataset(split=split)
        self.image, self.label, self.classes = find_columns(stream.features or {}, label)
        columns = stream.select_columns([self.image, self.label])
        self.stream = columns.cast_column(self.image, datasets.Image(decode=False))
        about = (builder.info.splits or {}).get(split)
        self.total = int(number or (about.num_examples if about else 0))
        if not self.total:
            raise ValueError(f"nothing says how many images there are; {split}|50000 would")
        self.names = [f"{name}, {split}, shard {shard}" for shard in range(stream.num_shards)]
        self.lengths = [self.total] if len(self.names) == 1 else None
        self.buffer = (int(os.environ.get("HFIDS_SHUFFLE_SIZE", 4096)), 1024)  # the variable is timm's

    def read(self, shard: int) -> Iterator[Sample]:
        importlib.import_module("fsspec").asyn.reset_lock()  # a loading process may be a fork
        number = 0
        for rows in self.stream.shard(len(self.names), shard).iter(
            16
        ):  # iterating over rows would share them out again
            for image, label in zip(rows[self.image], rows[self.label], strict=True):
                yield f"{self.names[shard]}, image {number}", {self.image: image, self.label: label}
                number += 1

    def decode(self, stored: Any) -> tuple[Image.Image, int]:
        return decode_row(stored, self.image, self.label)


class HubRows(Dataset):
    """A split of a Hugging Face dataset, downloaded and read in any order.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(self, name: str, root: str, split: str, label: str):
        datasets = importlib.import_module("datasets")
        rows = datasets.load_dataset(name, split=split, cache_dir=root)
        self.image, self.label, self.classes = find_columns(rows.features, label)
        rows = rows.select_columns([self.image, self.label])  # others would be decoded, too
        self.rows = rows.cast_column(self.image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return decode_row(self.rows[index], self.image, self.label)


def find_columns(features: dict[str, Any], label: str) -> tuple[str, str, list[str] | None]:
    """The columns of images (``image``, or the only one) and of class numbers, and the names of the classes, if any."""
    there = ", ".join(f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items())
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if "image" not in images and len(images) != 1:
        raise ValueError(f"it must have one column of images, got {there}")
    names = getattr(features.get(label), "names", None)
    if names is None and not str(getattr(features.get(label), "dtype", "")).startswith(("int", "uint")):
        raise ValueError(f"its column {label} (--data.label_column) must hold class numbers, got {there}")
    return "image" if "image" in images else images[0], label, names


def decode_row(row: dict[str, Any], image: str, label: str) -> tuple[Image.Image, int]:
    content = row[image]
    if content is None:
        raise ValueError("there is no image in its row")
    if content["bytes"] is None:
        with importlib.import_module("fsspec").open(content["path"], "rb") as file:
            content = {"bytes": file.read()}
    return open_image(io.BytesIO(content["bytes"])), -1 if row[label] is None else row[label]


def is_kept(member: str) -> bool:
    """Whether a file of a tar is used: none that is hidden or that other programs leave behind."""
    return not any(map(is_left_behind, member.removeprefix("./").split("/")))


def is_remote(file: str) -> bool:
    """Whether it is an address, or a command (``pipe:...``), rather than a path."""
    return re.match(r"\w+:", file) is not None


def open_dataset(name: str, root: str, split: str, label: str = "label") -> Any:
    """A split of a dataset that a string of timm names: ``Shards``, or a map-style dataset of images and labels.

    Raises:
        ValueError: it cannot be opened, or the package for it is missing.
    """
    kind, _, rest = name.partition("/")
    errors: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError, AssertionError, KeyError)
    try:
        if kind in PACKAGES:
            importlib.import_module(PACKAGES[kind])
        if PACKAGES.get(kind) == "datasets":
            errors += (importlib.import_module("datasets.exceptions").DatasetsError,)
    except ImportError as error:
        raise ValueError(f"{name} needs the package {PACKAGES[kind]}: pip install 'hcvision[streaming]'") from error
    try:
        if kind == "wds":
            return TarShards(name, root, split)
        if kind == "hfids":
            return HubShards(rest, root, split, label)
        if kind == "hfds":
            return HubRows(rest, root, split, label)
        if name in ("torch/image_folder", "torch/folder"):
            return open_folder(Path(create_dataset(name, root=root, split=split, allow_empty=True).root))
        base = create_dataset(name, root=root, split=split)
        if hasattr(base, "loader"):
            base.loader = open_image
        return base
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot open the split {split} of {name} in {root}: {reason}") from error


def check_labels(targets: Tensor, classes: int) -> None:
    """Raise ValueError when a label is none of so many classes."""
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise ValueError(
            f"an image has the label {int(wrong[0])}: with num_classes {classes} it must be 0 to {classes - 1}"
        )
