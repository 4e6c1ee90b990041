"""Shards of latents, as ``hcvision encode`` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

SAME = ("vae", "image_size", "classes", "shards", "encoder")  # in all shards
LATENT_FORMAT = "hcvision-latents-1"


class LatentShards:
    """The shards of a split, as ``hcvision encode`` writes them; latents are read one by one when they are asked for.

    Raises:
        FileNotFoundError: there are no shards of that split, or one is missing.
        ValueError: a shard is damaged, or of another set than the first.
    """

    def __init__(self, root: Path, split: str):
        self.paths = sorted(root.glob(f"{split}-*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(
                f"there are no shards {split}-*.safetensors in {root}; `hcvision encode` makes them"
            )
        first = self.header(self.paths[0])
        for number in range(int(first["shards"])):
            path = root / f"{split}-{number:05}.safetensors"
            if path not in self.paths:
                raise FileNotFoundError(f"the shard {path} is missing; there must be {first['shards']}")
        self.classes: list[str] = json.loads(first["classes"])
        self.vae = first["vae"]
        self.encoder: str | None = first.get("encoder")  # whose features are stored beside the latents
        self.targets: list[int] = []
        self.places: list[tuple[int, int]] = []
        for number, path in enumerate(self.paths):
            about = self.header(path)
            differing = next((k for k in SAME if about.get(k) != first.get(k)), None)
            if differing:
                raise ValueError(f"{path} has another {differing} than {self.paths[0]}")
            labels = self.open(path).get_tensor("labels").tolist()
            self.targets += labels
            self.places += [(number, row) for row in range(len(labels))]
        self.shape = tuple(self.open(self.paths[0]).get_slice("latents").get_shape()[1:])
        self.files: dict[int, Any] = {}

    @staticmethod
    def open(path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the shard {path} is cut short or damaged ({error}); encode it again") from error

    @classmethod
    def header(cls, path: Path) -> dict[str, str]:
        about = cls.open(path).metadata() or {}
        if about.get("format") != LATENT_FORMAT:
            raise ValueError(
                f"{path} is no shard of latents: its format is {about.get('format')!r}, not {LATENT_FORMAT!r}"
            )
        return about

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": {}}  # a loading process opens its own

    def latent(self, position: int, flipped: bool) -> Tensor:
        """(C, H, W), float32."""
        return self.read(position, "flipped" if flipped else "latents")

    def features(self, position: int, flipped: bool) -> Tensor:
        """What the encoder sees in the image, (F, h, w), float32."""
        return self.read(position, "flipped_features" if flipped else "features")

    def read(self, position: int, what: str) -> Tensor:
        number, row = self.places[position]
        if number not in self.files:
            self.files[number] = self.open(self.paths[number])
        return self.files[number].get_slice(what)[row].float()


class Latents(Dataset):
    """Chosen latents of shards, mirrored with a probability that (seed, epoch, index) alone decides.

    With ``features`` each comes with what the encoder of the shards sees in its image, mirrored alike.
    """

    def __init__(self, base: LatentShards, indices: Sequence[int], hflip: float, seed: int = 0, features: bool = False):
        self.base, self.indices, self.hflip, self.seed, self.features = base, indices, hflip, seed, features

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, ...]:
        epoch, number = index if isinstance(index, tuple) else (None, index)
        flipped = epoch is not None and np.random.default_rng((self.seed, epoch, number)).random() < self.hflip
        position = self.indices[number]
        seen = (self.base.features(position, flipped),) if self.features else ()
        return self.base.latent(position, flipped), self.base.targets[position], *seen
