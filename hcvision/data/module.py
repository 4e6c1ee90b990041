"""The Lightning data module: folders, tables, torchvision's small sets, timm's dataset strings, and latents."""

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from hcvision.data.arguments import check_number, check_numbers, check_range
from hcvision.data.corruptions import Corrupt
from hcvision.data.folders import split_by_class
from hcvision.data.images import BadImage, Batch, Images, collate, keep_a_bit, mode_of
from hcvision.data.latents import Latents
from hcvision.data.loading import EpochSampler, Loader, StreamedImages, outlive_signals
from hcvision.data.machine import count_workers
from hcvision.data.sources import BUILT_IN, TIMM_PREFIXES, Sources
from hcvision.data.streaming import Lanes, Shards, check_labels

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
AUTO_AUGMENT = re.compile(  # timm passes over sections that it does not understand
    r"(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)*"
    r"|rand(-(m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|tweights|t3aw?))*"
    r"|augmix(-(m\d+|w[1-9]\d*|d[1-9]\d*|a\d+(\.\d+)?|b[01]|mstd\d+(\.\d+)?))*"
)


class ImageData(Sources):
    """Training and validation images. Size and statistics come from the model unless they are given.

    Every process sees its own share of the training images, and evaluation counts each image once
    whatever the number of processes.

    Args:
        dataset: ``folder`` (ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, optionally ROOT/test; or
            ROOT/CLASS/IMAGE together with val_fraction), ``csv`` (ROOT/train.csv and ROOT/val.csv, optionally
            ROOT/test.csv; or ROOT is a CSV file with a column ``split``, or comes together with val_fraction),
            ``latents`` (shards that ``hcvision encode`` made), ``fashion_mnist``, ``cifar10``,
            ``cifar100``, or a dataset string of timm (``hfds/...``, ``wds/...``, ``tfds/...``,
            ``torch/...``).
        root: where the images are, or where torchvision downloads them to.
        file_column: of a CSV file: its column of image files, relative to the CSV file's folder.
        label_column: of a CSV file: its column of labels; of a Hugging Face dataset: its column of class numbers.
        multi_label: an image of a CSV file may have several labels, or none.
        label_separator: between them.
        val_fraction: take this part of the training images for validation, per class.
        split_seed: seed of that choice, and of train_samples.
        train_split: name of the training split (a subfolder, for ``folder``).
        val_split: name of the validation split.
        test_split: name of the test split; where it is missing, the validation images serve. Only a test needs its
            classes; it and the validation images may be without some of them.
        train_samples: train on this many images, chosen once by split_seed; None takes all.
        num_classes: number of classes; only timm's dataset strings need it.
        batch_size: images per process and step.
        eval_batch_size: the same for evaluation; batch_size if None.
        num_workers: loading processes; None takes the CPU cores available, at most 8, and none for Fashion-MNIST and
            CIFAR where there is no GPU: their images are in memory, and the cores are better spent on training.
        img_size: pixels (square); the model's if None.
        mean: per channel; the model's if None.
        std: per channel; the model's if None.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos; the model's if None.
        crop_pct: centre crop of evaluation; the model's if None.
        scale: area range of the random resized crop.
        ratio: aspect range of the random resized crop; where scale and ratio are (1, 1), training images are cropped
            as for evaluation with crop_pct 1, so that all of an image of the model's shape is seen.
        hflip: probability of a horizontal flip.
        color_jitter: strength.
        auto_augment: timm's policy string, for example ``rand-m9-mstd0.5-inc1``.
        re_prob: probability of random erasing.
        no_aug: resize and centre crop only, as for evaluation.
        skip_bad_images: leave unreadable images out, with a warning, instead of stopping.
        classes: evaluate images of these classes only: a list, a file with a name a line, or imagenet-a, imagenet-r.
        other_logits: with classes, or a relative of some classes: leave_out, the model chooses among these alone; or
            keep, among all.
        relative: evaluate a relative of ImageNet in ROOT, as it is distributed: v2, a, r, sketch, real (the validation
            images with the ReaL labels) or val (with their own).
        corruption: evaluate corrupted images: gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur,
            motion_blur, zoom_blur, snow, fog, brightness, contrast, elastic_transform, jpeg, pixelate.
        severity: of the corruption, 1 to 5.
        seed: of the order of the training images.

    Raises:
        ValueError: an argument out of range, an unknown dataset, an empty class folder of training images, a class
            of validation images that the training images have not.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        dataset: str = "folder",
        root: str = "data",
        file_column: str = "file",
        label_column: str = "label",
        multi_label: bool = False,
        label_separator: str = ";",
        val_fraction: float | None = None,
        split_seed: int = 0,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        train_samples: int | None = None,
        num_classes: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        img_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        no_aug: bool = False,
        skip_bad_images: bool = False,
        classes: list[str] | str | None = None,
        other_logits: Literal["leave_out", "keep"] = "leave_out",
        relative: str | None = None,
        corruption: str | None = None,
        severity: int = 3,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in {
            "batch_size": batch_size, "eval_batch_size": eval_batch_size, "train_samples": train_samples,
            "num_classes": num_classes, "img_size": img_size,
        }.items():  # fmt: skip
            if value is not None:
                check_number(name, value, 1, whole=True)
        for name, value in {"num_workers": num_workers, "split_seed": split_seed, "seed": seed}.items():
            if value is not None:
                check_number(name, value, 0, whole=True)
        if val_fraction is not None:
            check_number("val_fraction", val_fraction, above=0, below=1)
        if multi_label and not label_separator:
            raise ValueError("label_separator must be what is between the labels of an image, got nothing")
        check_view(mean, std, interpolation, crop_pct)
        check_augmentation(scale, ratio, hflip, color_jitter, auto_augment, re_prob)
        self.dataset, self.root = dataset, Path(root)
        self.val_fraction, self.split_seed, self.train_samples = val_fraction, split_seed, train_samples
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        in_memory = dataset in BUILT_IN and not torch.accelerator.is_available()
        self.num_workers = count_workers(0 if in_memory and num_workers is None else num_workers)
        self.view: dict[str, Any] = {
            "img_size": img_size, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct
        }  # fmt: skip
        self.augmentation: dict[str, Any] = {
            "scale": tuple(scale), "ratio": tuple(ratio), "hflip": hflip, "color_jitter": color_jitter,
            "auto_augment": auto_augment, "re_prob": re_prob, "re_mode": "pixel", "no_aug": no_aug,
        }  # fmt: skip
        self.skip_bad_images, self.seed = skip_bad_images, seed
        self.columns, self.multi_label = (file_column, label_column), multi_label
        self.label_separator = label_separator if multi_label else None
        self.class_names: list[str] | None = None
        self.stages: dict[str, tuple[Any, Sequence[int]]] = {}
        self.test_problem: str | None = None  # why the test images cannot be used
        self.warned: set[str] = set()
        self.with_features = False  # of training: what an encoder sees comes with latents that have it stored
        self.train_sampler: DistributedSampler | None = None

        self.classes, self.other_logits, self.relative = classes, other_logits, relative
        self.chosen: list[int] | None = None
        self.corruption: str | None = None
        self.corrupt: Corrupt | None = None
        self._corrupt(corruption, severity)

        self.num_classes: int
        self.is_timm = dataset.startswith(TIMM_PREFIXES)
        if multi_label and dataset != "csv":
            raise ValueError(f"multi_label needs a table of labels (--data.dataset csv), got the dataset {dataset!r}")
        if relative is not None:
            self._open_relative()
        elif dataset == "folder":
            self._scan_folders()
            assert self.class_names is not None
            self.num_classes = len(self.class_names)
        elif dataset == "csv":
            self._scan_tables()
        elif dataset == "latents":
            self._scan_latents()
        elif dataset in BUILT_IN:
            self.num_classes = BUILT_IN[dataset]
        elif self.is_timm:
            if num_classes is None:
                raise ValueError(f"num_classes must be given for the dataset {dataset!r}")
            if val_fraction is not None or train_samples is not None:
                raise ValueError(f"val_fraction and train_samples do not work with the dataset {dataset!r}")
            self.num_classes = num_classes
            if not dataset.startswith("tfds/"):
                self._open_timm(root)
        else:
            known = ", ".join(("folder", "csv", *BUILT_IN, "latents", *(f"{prefix}..." for prefix in TIMM_PREFIXES)))
            raise ValueError(f"dataset must be one of {known}, got {dataset!r}")
        if num_classes is not None and num_classes != self.num_classes:
            raise ValueError(f"num_classes must be {self.num_classes} for {dataset} in {root}, got {num_classes}")
        if dataset not in BUILT_IN:  # these have names when they are opened
            self._choose_classes()

    def _corrupt(self, corruption: str | None, severity: int) -> None:
        if corruption is not None:
            if self.dataset == "latents":
                raise ValueError(f"corruption is for images, not for latents, got {corruption}")
            self.corrupt, self.corruption = Corrupt(corruption, severity, self.seed), f"{corruption}-{severity}"

    def corrupted(self, corruption: str, severity: int) -> "ImageData":
        """The same data with a corruption of the images to evaluate; see the arguments of that name."""
        other = copy.copy(self)
        other.stages, other.warned = dict(self.stages), set(self.warned)
        other._corrupt(corruption, severity)
        return other

    def setup(self, stage: str | None = None) -> None:
        if self.dataset in BUILT_IN and not self.stages:
            train, test = self._torchvision(train=True), self._torchvision(train=False)
            self.class_names = list(train.classes)
            self.stages = {"train": (train, range(len(train))), "val": (test, range(len(test)))}
            if self.val_fraction is not None:
                targets = list(train.targets)
                chosen, held_out = split_by_class(targets, self.val_fraction, self.split_seed, train.classes)
                self.stages |= {
                    "train": (train, chosen),
                    "val": (train, held_out),
                    "test": (test, range(len(test))),
                }
            self._choose_classes()
        if "train" in self.stages and self.train_samples is not None:
            base, indices = self.stages["train"]
            if self.train_samples > len(indices):
                raise ValueError(f"train_samples must be at most {len(indices)}, got {self.train_samples}")
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.split_seed))
            self.stages["train"] = (base, [indices[i] for i in order[: self.train_samples].tolist()])
            self.train_samples = None
        if stage == "fit":
            self.check_training()
        if self.stages and stage in (None, "fit"):
            self.check_batch_size(self.trainer.world_size if self.trainer else 1)

    def check_training(self) -> None:
        """Raise ValueError when these are images to evaluate alone."""
        for name in ("relative", "classes", "corruption"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for validate and test, not for training, got {getattr(self, name)!r}")

    def check_batch_size(self, processes: int) -> None:
        """Raise ValueError when the training images are known and each process has too few of them for a batch."""
        if "train" in self.stages and (share := len(self.stages["train"][1]) // processes) < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {share}, the training images per process, got {self.batch_size}"
            )

    def count_batches(self, processes: int) -> int | None:
        """Training batches of an epoch, of each process, where the images are known before ``setup``."""
        if "train" not in self.stages:
            return None
        images = len(self.stages["train"][1])
        return min(images, self.train_samples or images) // processes // self.batch_size

    def data_config(self, model: dict[str, Any] | None = None) -> dict[str, Any]:
        """input_size (C, H, W), mean, std, interpolation and crop_pct: what is given here, else the model's.

        ``model`` is its configuration; without it that of the trainer's model is taken. Of latents only input_size
        and vae, the name of the VAE that made them.
        """
        if self.dataset == "latents":
            base = self.stages["train"][0]
            return {"input_size": base.shape, "vae": base.vae}
        config: dict[str, Any] = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875}
        config |= {"mean": (0.5,), "std": (0.5,)}
        if model is None and self.trainer is not None:
            model = getattr(self.trainer.lightning_module, "data_config", None)
        config |= model or {}
        config |= {name: value for name, value in self.view.items() if value is not None and name != "img_size"}
        channels, *size = config["input_size"]
        size = [self.view["img_size"]] * 2 if self.view["img_size"] else size
        for name in ("mean", "std"):
            given = self.view[name]
            if given is not None and len(given) not in (1, channels):
                raise ValueError(f"{name} must be of 1 or {channels} numbers, as the model takes images, got {given}")
            config[name] = spread(tuple(config[name]), channels)
        return {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct")} | {
            "input_size": (channels, *size)
        }

    def check_images(self, model: dict[str, Any]) -> None:
        """Raise ValueError when images cannot be prepared for a model of that configuration as is asked here."""
        config = self.data_config(model)
        if self.dataset != "latents":
            channels = config["input_size"][0]
            mode = mode_of(channels)
            if self.augmentation["auto_augment"] and mode == "RGBA":
                raise ValueError(f"auto_augment works on gray and RGB images, the model takes {channels} channels")

    def _transform(self, config: dict[str, Any], training: bool) -> Any:
        """What prepares an image.

        With no_aug, training images are prepared as for evaluation. With scale and ratio (1, 1) they are cropped as
        for evaluation with crop_pct 1, which is all of an image that is as wide and high as the model's.
        """
        if not training or self.augmentation["no_aug"]:
            plain: Any = create_transform(**config, is_training=False)
            if self.corrupt is not None and not training:
                plain.transforms.insert(2, self.corrupt)  # behind resize and centre crop
            return plain
        transform: Any = create_transform(**config, is_training=True, **self.augmentation)
        keep_a_bit(transform)
        if self.augmentation["scale"] == self.augmentation["ratio"] == (1, 1):
            whole: Any = create_transform(**{**config, "crop_pct": 1.0}, is_training=False)
            transform.transforms[:1] = whole.transforms[:2]  # resize and centre crop instead of the random resized crop
        return transform

    def _loader(self, stage: str, model: dict[str, Any] | None = None, augments: bool = True) -> DataLoader:
        """Batches of a stage: training images in the order of an epoch, unless they are to be evaluated (augments)."""
        training, config = stage == "train" and augments, self.data_config(model)
        transform: Any = None
        mode = ""
        if self.dataset != "latents":
            transform, mode = self._transform(config, training), mode_of(config["input_size"][0])
        batch_size = self.batch_size if training else self.eval_batch_size
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        dataset: Any
        sampler: DistributedSampler | None = None
        if self.is_timm and not self.stages:
            dataset = create_dataset(
                self.dataset,
                root=str(self.root),
                split=self.splits["val" if stage == "test" else stage],
                is_training=training,
                batch_size=batch_size,
                input_img_mode=mode,
                seed=self.seed,
            )
            dataset.transform = transform
        else:
            base, indices = self._stage(stage)
            if self.dataset == "latents":
                hflip = 0.0 if self.augmentation["no_aug"] else self.augmentation["hflip"]
                dataset = Latents(base, indices, hflip, self.seed, training and self.with_features)
            elif isinstance(base, Shards):
                in_order = trainer is not None and trainer.predicting
                lanes = Lanes(base, self.seed, world, batch_size, self.num_workers, training, in_order)
                dataset = StreamedImages(lanes, indices, transform, mode, self.seed)
            else:
                dataset = Images(base, indices, transform, mode, self.seed)
        if not isinstance(dataset, IterableDataset):
            if training:
                order = EpochSampler if isinstance(dataset, (Images, Latents)) else DistributedSampler
                mixed = not isinstance(dataset, StreamedImages)  # the stream comes shuffled
                sampler = order(dataset, world, rank, shuffle=mixed, seed=self.seed, drop_last=True)
                self.train_sampler = sampler
            elif world > len(dataset):
                raise ValueError(f"there are {len(dataset)} images to evaluate, too few for {world} processes")
            elif world > 1:
                sampler = UnrepeatedDistributedSampler(dataset, world, rank, shuffle=False)
        return Loader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=dataset.collate if isinstance(dataset, Images) else collate,
            worker_init_fn=outlive_signals() if self.num_workers else None,
            drop_last=training,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed + rank),
        )

    def plain_loader(self, split: str, input_size: tuple[int, int, int], number: int | None = None) -> DataLoader:
        """Batches of a split as for evaluation, with mean and std 0.5, without a trainer.

        Args:
            split: train, val or test; where there is no test split, val.
            input_size: (C, H, W).
            number: this many of them, chosen by split_seed; None or more than there are takes all.

        Raises:
            ValueError: the images are in no fixed order (timm's dataset strings), or are latents.
        """
        if self.is_timm or self.dataset == "latents":
            raise ValueError(f"there are no images to choose from in the dataset {self.dataset!r}; a folder works")
        self.setup("predict")
        base, indices = self._stage(split)
        if number is not None and number < len(indices):
            order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(self.split_seed))
            indices = [indices[i] for i in order[:number].tolist()]
        half = (0.5,) * input_size[0]
        transform = create_transform(input_size, interpolation="bicubic", crop_pct=1.0, mean=half, std=half)
        images = Images(base, indices, transform, mode_of(input_size[0]))
        return DataLoader(images, self.eval_batch_size, num_workers=self.num_workers, collate_fn=images.collate)

    def evaluation_loader(self, stage: str, model: dict[str, Any]) -> DataLoader:
        """All images of train, val or test as for evaluation, in their order, without a trainer.

        ``model`` is the configuration of the model that will see them. Without a test split there is val.
        """
        self.setup("predict")
        return self._loader(stage, model, augments=False)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        if self.trainer is not None and "test" in self.stages:
            self._warn_of_empty("test")
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test")

    def skip_batches(self, number: int) -> None:
        """Begin the next epoch of training after so many batches, as a run that was stopped there goes on."""
        if isinstance(self.train_sampler, EpochSampler):
            self.train_sampler.skip = number * self.batch_size
        elif number:
            warnings.warn(f"{self.dataset} cannot go on after {number} batches: its epoch begins anew", stacklevel=2)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, ...]:
        self.report_bad(batch.bad)
        if self.is_timm and not (self.trainer and self.trainer.predicting):
            check_labels(batch.targets, self.num_classes)
        return batch.images, batch.targets, *(() if batch.features is None else (batch.features,))

    def report_bad(self, images: list[BadImage]) -> None:
        """Raise ValueError for the first of them, or warn of each once when they are to be left out."""
        for bad in images:
            if not self.skip_bad_images:
                raise ValueError(f"{bad} (--data.skip_bad_images true leaves such images out)")
            if bad.path not in self.warned:
                self.warned.add(bad.path)
                warnings.warn(f"left out: {bad}", stacklevel=2)


def check_view(mean: Any, std: Any, interpolation: str | None, crop_pct: float | None) -> None:
    """Raise ValueError when images cannot be seen like this; the arguments are those of ``ImageData``."""
    if mean is not None:
        check_numbers("mean", mean)
    if std is not None:
        check_numbers("std", std, above=0)
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}, or null for the model's, got {interpolation!r}"
        )
    if crop_pct is not None:
        check_number("crop_pct", crop_pct, above=0, most=1)


def check_augmentation(
    scale: Any, ratio: Any, hflip: float, color_jitter: float | None, auto_augment: str | None, re_prob: float
) -> None:
    """Raise ValueError when images cannot be augmented like this; the arguments are those of ``ImageData``."""
    check_range("scale", scale, above=0, most=1)
    check_range("ratio", ratio, above=0)
    check_number("hflip", hflip, 0, 1)
    check_number("re_prob", re_prob, 0, 1)
    if color_jitter is not None:
        check_number("color_jitter", color_jitter, 0)
    known = isinstance(auto_augment, str) and AUTO_AUGMENT.fullmatch(auto_augment)
    if auto_augment is not None and not known:
        raise ValueError(
            "auto_augment must be a policy of timm such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, originalr, "
            f"v0, v0r or 3a, or null for none, got {auto_augment!r}"
        )


def spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics of so many channels: those of RGB with 0.5 for alpha, else their mean for each channel."""
    if len(values) == channels:
        return values
    if (len(values), channels) == (3, 4):
        return (*values, 0.5)
    return (sum(values) / len(values),) * channels
