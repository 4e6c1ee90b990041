"""What the data module opens: folders, tables, torchvision's small sets, timm's dataset strings, and latents."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchvision import datasets as tv_datasets

from hcvision.data.fashion import find_fashion_mnist
from hcvision.data.folders import open_folder, say_left_out, split_by_class, warn_of_left_out
from hcvision.data.images import printable
from hcvision.data.latents import LatentShards
from hcvision.data.relatives import open_relative
from hcvision.data.streaming import open_dataset
from hcvision.data.subsets import find_numbers, keep_classes, leave_out, list_synsets, read_classes, shorten
from hcvision.data.tables import Row, Table, find_classes, read_table

BUILT_IN = {"fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
TIMM_PREFIXES = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")


class Sources(pl.LightningDataModule):
    """The images of each stage (train, val, test), by kind of data set; the arguments are those of ``ImageData``."""

    dataset: str
    root: Path
    splits: dict[str, str]
    columns: tuple[str, str]
    val_fraction: float | None
    split_seed: int
    multi_label: bool
    label_separator: str | None
    num_classes: int
    class_names: list[str] | None
    stages: dict[str, tuple[Any, Sequence[int]]]  # the images of a stage, and which of them
    test_problem: str | None  # why the test images cannot be used
    classes: list[str] | str | None
    other_logits: str
    relative: str | None
    corruption: str | None  # with its severity
    chosen: list[int] | None  # numbers of the classes that are evaluated, where these are not all

    def _open_relative(self) -> None:
        assert self.relative is not None
        if self.dataset != "folder":
            raise ValueError(
                f"relative {self.relative} is a folder (--data.dataset folder --data.root ...), got the dataset "
                f"{self.dataset!r}"
            )
        names = list(list_synsets())
        chosen = None if self.classes is None else find_numbers(self.classes, names)
        base, indices, wanted = open_relative(self.relative, self.root, chosen)
        self.stages = {"val": (base, indices)}
        self.class_names, self.num_classes = names, len(names)
        self.chosen = wanted if len(wanted) < len(names) else None

    def _choose_classes(self) -> None:
        """Keep the images to evaluate that are of ``classes``."""
        if self.classes is None or self.chosen is not None or self.relative is not None:
            return
        if self.multi_label or not self.stages or not hasattr(self.stages["val"][0], "targets"):
            what = "with several labels per image" if self.multi_label else f"in the dataset {self.dataset!r}"
            raise ValueError(f"classes cannot be chosen {what}; a folder or a table of one label per image would work")
        names = self.class_names or [str(number) for number in range(self.num_classes)]
        self.chosen = find_numbers(self.classes, names)
        for stage in {"val", "test"} & {*self.stages}:
            base, indices = self.stages[stage]
            kept = keep_classes(base, indices, self.chosen)
            if not kept:
                raise ValueError(f"there are no {stage} images of {shorten([names[n] for n in self.chosen])}")
            self.stages[stage] = (base, kept)

    def leave_out(self, logits: Tensor) -> Tensor:
        """Logits (B, K) of images to evaluate, minus infinity for classes that the model may not choose."""
        return logits if self.chosen is None or self.other_logits == "keep" else leave_out(logits, self.chosen)

    @property
    def variant(self) -> str:
        """What of the data a test looks at, where that is not all of it as it is; may stand in a file's name."""
        chosen = "" if self.classes is None else "chosen"
        if isinstance(self.classes, str):
            chosen = re.sub(r"[^\w.-]", "_", Path(self.classes).stem)
        kept = "all-logits" if self.chosen is not None and self.other_logits == "keep" else ""
        return "-".join(filter(None, [self.relative, chosen, kept, self.corruption]))

    def describe(self) -> dict[str, Any]:
        """What a test looks at, for a table of tests; ``classes`` are the names of those that were chosen by a list."""
        split = self.splits["test" if "test" in self.stages else "val"]
        about = {"data": str(self.root), "dataset": self.dataset, "split": split, "variant": self.variant}
        return about | ({} if self.classes is None else {"classes": read_classes(self.classes)})

    def _scan_folders(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}; data.root must hold the images")
        if self.val_fraction is not None:
            folder = self.root / self.splits["train"]
            base = open_folder(folder if folder.is_dir() else self.root)
            train, val = split_by_class(base.targets, self.val_fraction, self.split_seed, base.classes)
            self.stages = {"train": (base, train), "val": (base, val)}
        else:
            for stage in ("train", "val"):
                folder = self.root / self.splits[stage]
                if not folder.is_dir():
                    raise FileNotFoundError(
                        f"there is no folder {folder}; {self.root} must hold {self.splits['train']}/ and "
                        f"{self.splits['val']}/, or val_fraction must say how much of it is for validation"
                    )
                base = open_folder(folder, None if stage == "train" else self.stages["train"][0])
                self.stages[stage] = (base, range(len(base)))
        train = self.stages["train"][0]
        test = self.root / self.splits["test"]
        if test.is_dir():
            self._open_test(lambda: open_folder(test, train))
        self.class_names = list(train.classes)
        self._warn_of_empty("val")
        warn_of_left_out([base for base, _ in self.stages.values()], self.root)

    def _open_test(self, open_images: Callable[[], Any]) -> None:
        """Open the test images. What is wrong with them is said when they are asked for: a fit needs none of them."""
        try:
            base = open_images()
        except (ValueError, OSError) as error:
            self.test_problem = str(error)
        else:
            self.stages["test"] = (base, range(len(base)))

    def _stage(self, stage: str) -> tuple[Any, Sequence[int]]:
        """The images of a stage, and which of them. Raises ValueError for test images that cannot be used."""
        if stage == "test" and self.test_problem is not None:
            raise ValueError(
                f"the test images need the classes of the training images: {self.test_problem} "
                "(--data.test_split names another split)"
            )
        return self.stages.get(stage, self.stages["val"])

    def _warn_of_empty(self, stage: str) -> None:
        """Say which classes have no images in a stage, which then says nothing of them."""
        base, _ = self._stage(stage)
        names = getattr(base, "empty", ())
        if names:
            shown = ", ".join(map(printable, names[:3])) + ", ..." * (len(names) > 3)
            warnings.warn(
                f"the {stage} images are of {len(base.classes) - len(names)} of the {len(base.classes)} classes, "
                f"without {shown} (--data.{stage}_split names another split)",
                stacklevel=2,
            )

    def _scan_tables(self) -> None:
        tables = {stage: self.root / f"{split}.csv" for stage, split in self.splits.items()}
        if not self.root.exists():
            raise FileNotFoundError(f"there is no {self.root}; data.root must be a CSV file or a folder of them")
        one = self.root if self.root.is_file() else tables["train"] if self.val_fraction else None
        if one is None:
            absent = [str(tables[stage]) for stage in ("train", "val") if not tables[stage].is_file()]
            if absent:
                raise FileNotFoundError(
                    f"there is no {absent[0]}; {self.root} must hold {tables['train'].name} and {tables['val'].name}"
                )
            rows = {stage: self._read_table(tables[stage]) for stage in ("train", "val")}
        elif self.val_fraction is None:
            every = self._read_table(one)
            rows = {stage: [row for row in every if row.split == split] for stage, split in self.splits.items()}
            others = {row.split or "(none)" for row in every} - set(self.splits.values())
            if not (rows["train"] and rows["val"]):
                there = ", ".join(sorted({row.split for row in every} - {""})) or "none"
                raise ValueError(
                    f"{one} must have a column split of {self.splits['train']} and {self.splits['val']}, got {there}, "
                    "or val_fraction must say how much of it is for validation"
                )
            say_left_out("rows of other splits", others, one)
        else:
            every, (train, val, _) = self._read_table(one), self.splits.values()
            if any(row.split == val for row in every):
                raise ValueError(f"{one} says which images are for validation ({val}), and val_fraction too; give one")
            rows = {"train": [row for row in every if row.split in ("", train)]}
            rows["test"] = [row for row in every if row.split == self.splits["test"]]
        classes = find_classes(rows["train"])
        test = rows.pop("test", [])
        bases = {stage: Table(part, classes, self.multi_label) for stage, part in rows.items()}
        self.stages = {stage: (base, range(len(base))) for stage, base in bases.items()}
        if self.val_fraction is not None:
            names = () if self.multi_label else classes
            chosen, held_out = split_by_class(bases["train"].targets, self.val_fraction, self.split_seed, names)
            self.stages |= {"train": (bases["train"], chosen), "val": (bases["train"], held_out)}
        else:
            self._warn_of_empty("val")
        apart = self.root.is_dir() and tables["test"].is_file()
        if test or apart:
            self._open_test(
                lambda: Table(test + (self._read_table(tables["test"]) if apart else []), classes, self.multi_label)
            )
        self.class_names, self.num_classes = classes, len(classes)

    def _read_table(self, path: Path) -> list[Row]:
        return read_table(path, *self.columns, self.label_separator, unlabelled=self.splits["test"])

    def _open_timm(self, root: str) -> None:
        for stage in ("train", "val"):
            base = open_dataset(self.dataset, root, self.splits[stage], self.columns[1])
            self.stages[stage] = (base, range(len(base)))
        names, others = (getattr(self.stages[stage][0], "classes", None) for stage in ("train", "val"))
        if names and others and list(names) != list(others):  # they are numbered apart
            raise ValueError(
                f"the classes of {self.splits['train']} and {self.splits['val']} of {self.dataset} must be the same "
                f"ones, got {len(names)} and {len(others)}"
            )
        if names:
            self.class_names = [name if isinstance(name, str) else name[0] for name in names]
            self.num_classes = len(names)

    def _scan_latents(self) -> None:
        base = LatentShards(self.root, self.splits["train"])
        if self.val_fraction is not None:
            train, val = split_by_class(base.targets, self.val_fraction, self.split_seed, base.classes)
            self.stages = {"train": (base, train), "val": (base, val)}
        else:
            held_out = LatentShards(self.root, self.splits["val"])
            if (held_out.classes, held_out.shape) != (base.classes, base.shape):
                raise ValueError(f"the shards of {self.splits['train']} and {self.splits['val']} are of different sets")
            self.stages = {"train": (base, range(len(base))), "val": (held_out, range(len(held_out)))}
        self.class_names, self.num_classes = base.classes, len(base.classes)

    def prepare_data(self) -> None:
        if self.dataset == "fashion_mnist":
            find_fashion_mnist(self.root)
        elif self.dataset in BUILT_IN:
            self._torchvision(train=True, download=True)

    def _torchvision(self, train: bool, download: bool = False) -> Any:
        names = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
        return getattr(tv_datasets, names[self.dataset])(str(self.root), train=train, download=download)
