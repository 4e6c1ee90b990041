"""A study of diffusion models: samples drawn and scored."""

import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hcvision.data import TIMM_PREFIXES, ImageData, check_name, is_first_process
from hcvision.diffusion import (
    OBJECTIVES,
    Sampling,
    columns_of,
    decode,
    describe_samples,
    draw_samples,
    grid,
    load_vae,
    read_samples,
)
from hcvision.studies.scoring import (
    Extractor,
    Features,
    Inception,
    SmallClassifier,
    compare_features,
    look_at_data,
    look_at_samples,
    train_classifier,
    warn_of_few,
)
from hcvision.studies.settings import defaults
from hcvision.studies.statistics import Curve, Metric
from hcvision.studies.study import Study
from hcvision.training import ImageGenerator


class GenerationStudy(Study):
    """Train every variant with every seed, draw images with each, score them, and report: diffusion.

    Args:
        out: folder of the study, as for ``Study``, and samples.png.
        sampling: how images are drawn for the scores; variants may change it.
        samples: images drawn per cell, as many of each class.
        sample_batch: images drawn at a time.
        real_images: training images that they are compared with.
        real_data: arguments of ``ImageData`` for the real images, where ``data`` are latents or none to choose from.
        inception: file of Inception's weights, for the FID; without it a small classifier, trained on the same data
            and kept in ``out/classifier``, sees the images.
        classifier_epochs: of its training.
        **kwargs: the arguments of ``Study``: variants, seeds, data, ...; ``model`` holds those of ``ImageGenerator``,
            without connection, num_classes and seed.

    Raises:
        ValueError: an unknown variant, a variant or seed named twice, a sampler that its objective does not have, or a
            folder with cells that were run with other settings.
    """

    task = "generate"
    module = ImageGenerator
    recorded = ("distance", "kernel_distance", "accuracy", "score", "precision", "recall", "val_loss", "train_loss")
    curves = (Curve("val_loss", "validation loss"), Curve("train_loss", "training loss"))
    measured = "scores and loss"

    def __init__(
        self,
        out: str,
        *,
        sampling: Sampling | None = None,
        samples: int = 2000,
        sample_batch: int = 100,
        real_images: int = 10000,
        real_data: dict[str, Any] | None = None,
        inception: str | None = None,
        classifier_epochs: int = 3,
        **kwargs: Any,
    ):
        super().__init__(out, **kwargs)
        if self.columns:
            raise ValueError(f"columns are for classification, not for --task generate, got {self.columns}")
        self.sampling, self.samples, self.sample_batch = sampling or Sampling(), samples, sample_batch
        self.real_images, self.inception, self.classifier_epochs = real_images, inception, classifier_epochs
        self.real_data = real_data or self.data
        dataset = str(self.real_data.get("dataset", "folder"))
        if dataset == "latents" or dataset.startswith(TIMM_PREFIXES):
            raise ValueError(
                f"the samples need real images beside them, and {dataset!r} has none to choose from; real_data"
            )
        network = "Inception" if inception else f"small classifier, {classifier_epochs} epochs"
        self.more_settings = {"samples": samples, "real_images": real_images, "network": network}
        for variant in self.variants:
            objective = self.model_arguments(variant).get("objective") or defaults(self.module)["objective"]
            check_name("objective", objective, OBJECTIVES)
            self.sampling_of(variant).check(OBJECTIVES[objective]())

    def changeable(self) -> dict[str, dict[str, Any]]:
        return {**super().changeable(), "sampling": asdict(Sampling())}

    def sampling_of(self, variant: str) -> Sampling:
        """How the images of a variant are drawn."""
        return replace(self.sampling, **(self.all_changes(variant).get("sampling") or {}))

    def cost_settings(self, variant: str) -> dict[str, Any]:
        return {**super().cost_settings(variant), "sampling": self.sampling_of(variant).settings()}

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        distance = Metric("distance", "FID" if self.inception else "Fréchet distance", more_is_better=False)
        accuracy = () if self.inception else (Metric("accuracy", "class %", 100.0, 1, paired=False),)
        return (distance, *accuracy, Metric("val_loss", "val loss", digits=4, more_is_better=False))

    def build_model(self, variant: str, num_classes: int, seed: int) -> Any:
        arguments = {"seed": seed, **self.model_arguments(variant)}
        return self.module(connection=self.connection(variant), num_classes=num_classes, **arguments)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: not what was looked at here."""
        looked_at = ("extractor", "real", "input_size")
        return {name: value for name, value in super().__getstate__().items() if name not in looked_at}

    def config(self) -> dict[str, Any]:
        numbers = ("samples", "sample_batch", "real_images", "classifier_epochs", "inception")
        more = {"sampling": self.sampling.settings(), **{name: getattr(self, name) for name in numbers}}
        if self.real_data is not self.data:
            more["real_data"] = {key: value for key, value in self.real_data.items() if key != "root"}
        known = super().config()
        crop_pct = self.data.get("crop_pct")  # None is no default of the command
        return {**known, **more, "data": {**known["data"], "crop_pct": crop_pct}}

    def prepare(self) -> None:
        """Have the network that scores, before several processes are bound together: it is trained in one.

        Raises:
            ValueError: ``real_data`` have other classes than ``data``, or an encoder of a variant cannot be had.
        """
        for variant in self.variants:
            if self.model_arguments(variant).get("repa") is not None:
                self.build_model(variant, 1, 0)
        known = self.extractor.class_names
        drawn = known if self.real_data is self.data else ImageData(**self.data).class_names
        if known is not None and known != drawn:
            raise ValueError(f"real_data must have the classes of data, got {known[:3]}... and {(drawn or [])[:3]}...")

    @cached_property
    def extractor(self) -> Extractor:
        if self.inception:
            return Inception(self.inception, self.device)
        folder = self.out / "classifier"
        show = self.trainer.get("enable_progress_bar") is not False
        train_classifier(folder, self.real_data, self.input_size, self.device, self.classifier_epochs, show)
        return SmallClassifier(folder, self.device)

    @cached_property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of what is drawn."""
        module = self.build_model(self.variants[0], ImageData(**self.data).num_classes, 0)
        size = tuple(module.data_config["input_size"])
        if self.model.get("vae"):
            size = decode(load_vae(self.model["vae"]), torch.zeros(1, *size)).shape[1:]
        channels, height, width = size
        return (channels, height, width)

    @cached_property
    def real(self) -> Features:
        return look_at_data(self.extractor, ImageData(**self.real_data), "train", self.input_size, self.real_images)

    def score(self, folder: Path, model: Any, metrics: dict[str, float]) -> dict[str, float | None]:
        classes = range(model.hparams["num_classes"])
        names = ("accelerator", "devices", "strategy", "precision", "num_nodes")
        trainer = {name: self.trainer[name] for name in names if name in self.trainer}
        trainer["enable_progress_bar"] = False  # the study has a display of its own
        if self.lines is not None:
            self.lines.put(f"drawing {self.samples} images of {folder.parent.name}, {folder.name}")
        plan = self.sampling_of(folder.parent.name)
        draw_samples(model, folder / "samples", plan, self.samples, classes, self.sample_batch, trainer)
        if not is_first_process():
            return {}
        return {**compare_features(look_at_samples(self.extractor, folder / "samples", self.samples), self.real)}

    def pictures(self) -> dict[str, str]:
        first = self.cell_folder(self.variants[0], self.seeds[0]) / "samples" / "sampling.json"
        columns = columns_of(json.loads(first.read_text())["classes"])
        number = min(3 * columns, self.samples)
        shown = {
            v: read_samples(self.cell_folder(v, self.seeds[0]) / "samples" / "parts", number) for v in self.variants
        }
        draw_rows(shown, columns).savefig(self.out / "samples.png", dpi=150)
        about = f"The first samples of seed {self.seeds[0]}; image by image the variants start from the same noise."
        return {"samples.png": about}

    def notes(self) -> list[str]:
        held_out = look_at_data(self.extractor, ImageData(**self.real_data), "val", self.input_size, self.samples)
        yardstick = compare_features(held_out, self.real)
        drawn: dict[str, list[str]] = {}  # variants by how their samples were drawn
        for variant in self.variants:
            how = describe_samples(self.cell_folder(variant, self.seeds[0]) / "samples")
            drawn.setdefault(f"seed {self.sampling_of(variant).seed}, {how}", []).append(variant)
        many = len(drawn) > 1
        how = "; ".join(f"{', '.join(names)}: {one}" if many else one for one, names in drawn.items())
        lines = [
            f"{self.extractor.distance}: {self.samples:,} samples ({how}) against "
            f"{len(self.real.features):,} training images, on the features of {self.extractor.name}; as many held-out "
            f"real images score {yardstick['distance']:.2f}."
        ]
        few = warn_of_few(held_out, self.real)
        if few:
            lines[0] += f" {few[0].upper()}{few[1:]}."
        if not self.inception:
            lines[0] += " It is no FID, and compares with nothing outside this table."
            lines[0] += " class %: samples that the classifier takes for the class they were drawn as."
        return [*lines, *super().notes()]


def draw_rows(images: dict[str, Tensor], columns: int) -> Figure:
    """Each variant's images (N, H, W, C) uint8, in rows of ``columns``."""
    with matplotlib.rc_context({"font.size": 11}):
        rows = max(-(-len(these) // columns) for these in images.values())
        figure = Figure(figsize=(8, 0.8 * rows * len(images)), layout="constrained")
        for axes, (variant, these) in zip(
            figure.subplots(len(images), squeeze=False)[:, 0], images.items(), strict=True
        ):
            axes.imshow(grid(these, columns).permute(1, 2, 0).numpy())
            axes.set_ylabel(variant)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        return figure
