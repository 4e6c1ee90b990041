"""A study: variants of one model trained side by side, with the same seeds, and a report.

Every cell (variant, seed) has a folder of its own and is run once; a study that was killed goes on
where it was. All cells of a seed see the same images in the same order and start from the same trunk.
"""

import csv
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hcvision.benchmark import measure, ratios, training_step
from hcvision.connections import parse_connection
from hcvision.data import TIMM_PREFIXES, ImageData
from hcvision.latents import decode, load_vae
from hcvision.runs import (
    StopCleanly,
    equip,
    first_difference,
    is_first_process,
    keep_metrics,
    last_checkpoint,
    markdown,
    metrics_files,
    pick_device,
    read_checkpoint,
    write_json,
)
from hcvision.sampling import Sampling, columns_of, draw_samples, grid, read_samples
from hcvision.scoring import (
    Extractor,
    Features,
    Inception,
    SmallClassifier,
    compare,
    look_at_data,
    look_at_samples,
    train_classifier,
)
from hcvision.training import ImageClassifier, ImageGenerator, TimmModule


@dataclass(frozen=True)
class Metric:
    """A column of the table: its name in results.csv, its heading, and how its values are shown."""

    name: str
    heading: str
    factor: float = 1.0
    digits: int = 2
    paired: bool = True  # with a column of differences to the first variant

    def show(self, values: list[float], sign: str = "") -> str:
        return f"{self.factor * statistics.mean(values):{sign}.{self.digits}f}"


TOP1 = Metric("top1", "top-1 %", 100.0)
COLORS = ("#444444", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5b9e", "#2e4057", "#b8b8b8")


class Study:
    """Train every variant with every seed and report: image classification.

    Args:
        out: folder of the study: a folder per cell, and report.md, results.csv, curves.png.
        title: headline of the report.
        variants: connections to compare (``residual``, ``dhc2``, ...). Differences are to the first.
        seeds: of the initial weights, the order of the images and the augmentation.
        model: arguments of ``ImageClassifier``, without connection and num_classes.
        data: arguments of ``ImageData``, without seed.
        trainer: arguments of Lightning's Trainer.
        timing_rounds: rounds of the interleaved step-time measurement; 0 leaves it out.

    Raises:
        ValueError: an unknown variant, a variant or seed named twice, or a folder with cells that were
            run with other settings.
    """

    module: type[TimmModule] = ImageClassifier
    metrics: tuple[Metric, ...] = (TOP1,)
    columns: tuple[str, ...] = ("start_top1", "top1", "top5", "val_loss", "train_loss")
    curves: tuple[tuple[str, str, float], ...] = (
        ("val_top1", "validation top-1, %", 100.0),
        ("train_loss", "training loss", 1.0),
    )
    measured = "top-1"

    def __init__(
        self,
        out: str,
        variants: list[str],
        seeds: list[int],
        model: dict[str, Any],
        data: dict[str, Any],
        trainer: dict[str, Any],
        title: str = "Connections compared",
        timing_rounds: int = 15,
    ):
        for what, values in (("variants", variants), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must be one or more different ones, got {values}")
        for variant in variants:
            parse_connection(variant)
        if data.get("multi_label") or model.get("multi_label"):
            raise ValueError("a study reports top-1, which images with several labels (multi_label) do not have")
        self.out, self.title, self.variants, self.seeds = Path(out), title, variants, seeds
        self.model, self.data, self.trainer = model, data, trainer
        self.timing_rounds = timing_rounds
        self.settings = json.loads(json.dumps({"model": model, "data": {**data, "root": None}, "trainer": trainer}))

    def cell_folder(self, variant: str, seed: int) -> Path:
        return self.out / variant / f"seed{seed}"

    @property
    def device(self) -> str:
        """Where steps are timed and samples are scored."""
        return "cpu" if self.trainer.get("accelerator") == "cpu" else pick_device()

    def build_model(self, variant: str, num_classes: int, seed: int) -> Any:
        return self.module(connection=variant, num_classes=num_classes, **self.model)

    def run(self, say: Callable[[str], None] = print) -> Path:
        """Run what is missing and write the report. Returns the path of report.md."""
        cells = [(variant, seed) for seed in self.seeds for variant in self.variants]
        self.check_settings(cells)
        if is_first_process() and any(self.read_result(*cell) is None for cell in cells):
            self.prepare()
        results = []
        for number, (variant, seed) in enumerate(cells, 1):
            done = self.read_result(variant, seed)
            if done is None:
                say(f"[{number}/{len(cells)}] {variant}, seed {seed}")
                done = self.run_cell(variant, seed)
            else:
                known = ", ".join(f"{metric.heading} {metric.show([done[metric.name]])}" for metric in self.metrics)
                say(f"[{number}/{len(cells)}] {variant}, seed {seed}: done before, {known}")
            results.append(done)
        if not is_first_process():
            return self.out / "report.md"
        costs = self.costs(say)
        return self.report(results, costs)

    def prepare(self) -> None:
        """What is needed before the first cell, in the first process alone."""

    def check_settings(self, cells: list[tuple[str, int]]) -> None:
        for cell in cells:
            path = self.cell_folder(*cell) / "settings.json"
            if not path.is_file():
                continue
            difference = first_difference(json.loads(path.read_text()), self.settings)
            if difference:
                raise ValueError(
                    f"{path.parent} was run with other settings ({difference}); "
                    f"give the study another folder (--out) or delete that one"
                )

    def read_result(self, variant: str, seed: int) -> dict[str, Any] | None:
        path = self.cell_folder(variant, seed) / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def run_cell(self, variant: str, seed: int) -> dict[str, Any]:
        folder, began = self.cell_folder(variant, seed), time.monotonic()
        pl.seed_everything(seed, workers=True, verbose=False)
        data = ImageData(**self.data, seed=seed)
        model = self.build_model(variant, data.num_classes, seed)
        data.prepare_data()
        if is_first_process():
            write_json(folder / "settings.json", self.settings)
            keep_metrics(folder)
        quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = pl.Trainer(**equip(folder, {**quiet, **self.trainer}, f"{variant} seed {seed}", model.monitor))
        checkpoint = last_checkpoint(folder)
        start = self.score_start(folder / "start.json", model, data)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        last = last_checkpoint(folder)
        if last is not None:  # the averaged weights, also where nothing was left to train
            model.load_state_dict(read_checkpoint(last)["state_dict"])
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if model.monitor[0] not in metrics:
            metrics = {name: float(value) for name, value in trainer.validate(model, data, verbose=False)[0].items()}
        losses = read_curve(folder, self.curves)["train_loss"]
        epochs, steps = trainer.current_epoch, trainer.global_step
        result = {
            "variant": variant,
            "seed": seed,
            "start_top1": start,
            "val_loss": metrics["val_loss"],
            "train_loss": metrics.get("train_loss", next(reversed(losses), None)),
            **self.score(folder, model, metrics),
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "epochs": epochs,
            "images": steps * data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            "seconds": round(time.monotonic() - began, 1),
        }
        if is_first_process():
            write_json(folder / "result.json", result)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StopCleanly) and callback.was_asked:
                callback.leave(f"stopped after {variant}, seed {seed}")
        return result

    def score(self, folder: Path, model: Any, metrics: dict[str, float]) -> dict[str, float | None]:
        """What the table wants to know of a trained cell."""
        return {"top1": metrics["val_top1"], "top5": metrics.get("val_top5")}

    def score_start(self, path: Path, model: Any, data: ImageData) -> float | None:
        """Top-1 before the first step, for weights that come from somewhere (``init_from``, ``pretrained``)."""
        if not (self.model.get("init_from") or self.model.get("pretrained")) or "start_top1" not in self.columns:
            return None
        if not path.is_file():
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = pl.Trainer(**{**self.trainer, **quiet, "enable_model_summary": False, "inference_mode": False})
            start = float(trainer.validate(model, data, verbose=False)[0]["val_top1"])
            if not is_first_process():
                return start
            write_json(path, start)
        return json.loads(path.read_text())

    def costs(self, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Per variant the time of a training step and its peak of memory, as ratios to the first variant."""
        if not self.timing_rounds:
            return {}
        path = self.out / "costs.json"
        device = self.device
        key = {"variants": self.variants, "rounds": self.timing_rounds, "device": device, "settings": self.settings}
        if path.is_file() and (known := json.loads(path.read_text()))["key"] == key:
            return known["costs"]
        say("measuring step time and memory")
        data = ImageData(**self.data)

        def build(variant: str) -> Callable[[], None]:
            torch.manual_seed(0)
            module = self.build_model(variant, data.num_classes, 0).to(device)
            images = torch.randn(data.batch_size, *module.data_config["input_size"], device=device)
            targets = torch.randint(data.num_classes, (data.batch_size,), device=device)
            return training_step(module, (images, targets), str(self.trainer.get("precision", "32")))

        times, peaks = measure(self.variants, build, self.timing_rounds, device)
        first = self.variants[0]
        costs = {
            v: {"time": statistics.median(ratios(times[v], times[first])), "memory": peaks[v] / peaks[first]}
            for v in self.variants
        }
        write_json(path, {"key": key, "costs": costs})
        return costs

    def report(self, results: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> Path:
        """Write results.csv, curves.png and report.md."""
        with (self.out / "results.csv").open("w", newline="") as file:
            columns = ("variant", "seed", *self.columns, "parameters", "epochs", "images", "seconds")
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(results)
        runs = {v: [read_curve(self.cell_folder(v, s), self.curves) for s in self.seeds] for v in self.variants}
        draw_curves(runs, self.curves).savefig(self.out / "curves.png", dpi=150)
        first = results[0]
        epochs, seeds = ("" if count == 1 else "s" for count in (first["epochs"], len(self.seeds)))
        trained = f"{first['epochs']} epoch{epochs}, {first['images']:,} images each"
        trained += f", seed{seeds} {', '.join(map(str, self.seeds))}"
        lines = [
            f"# {self.title}", "",
            f"{self.data['dataset']}, {self.model['model']}, {trained}.", "",
            *table(results, costs, self.variants, self.metrics), "",
            *self.notes(costs), "",
            f"![{' and '.join(label for _, label, _ in self.curves)}](curves.png)", "",
        ]  # fmt: skip
        path = self.out / "report.md"
        path.write_text("\n".join(lines))
        return path

    def notes(self, costs: dict[str, dict[str, float]]) -> list[str]:
        """What the reader of the table has to know."""
        first, what = self.variants[0], self.measured
        if len(self.seeds) > 1:
            lines = [
                f"{what[0].upper()}{what[1:]}: the mean over {len(self.seeds)} seeds ± their standard deviation, after "
                f"the last epoch; the difference to {first} is paired by seed, ± its standard error."
            ]
        else:
            lines = [
                f"{what[0].upper()}{what[1:]} after the last epoch. One seed has no spread: a difference here can be "
                "luck, a study with several seeds (`seeds` in its config) tells."
            ]
        if costs:
            lines.append(
                f"Step time (forward, backward and AdamW, eager, variants interleaved in one process, median) and "
                f"peak memory of a training step are ratios to {first}."
            )
        return lines


class GenerationStudy(Study):
    """Train every variant with every seed, draw images with each, score them, and report: diffusion.

    Args:
        out: folder of the study: a folder per cell, and report.md, results.csv, curves.png, samples.png.
        sampling: how images are drawn for the scores.
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
        ValueError: an unknown variant, a variant or seed named twice, or a folder with cells that were
            run with other settings.
    """

    module = ImageGenerator
    columns = ("distance", "accuracy", "score", "precision", "recall", "val_loss", "train_loss")
    curves = (("val_loss", "validation loss", 1.0), ("train_loss", "training loss", 1.0))
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
        self.sampling, self.samples, self.sample_batch = sampling or Sampling(), samples, sample_batch
        self.real_images, self.inception, self.classifier_epochs = real_images, inception, classifier_epochs
        self.real_data = real_data or self.data
        dataset = str(self.real_data.get("dataset", "folder"))
        if dataset == "latents" or dataset.startswith(TIMM_PREFIXES):
            raise ValueError(
                f"the samples need real images beside them, and {dataset!r} has none to choose from; real_data"
            )
        network = "Inception" if inception else f"small classifier, {classifier_epochs} epochs"
        self.settings |= {
            "sampling": asdict(self.sampling), "samples": samples, "real_images": real_images, "network": network
        }  # fmt: skip

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        distance = Metric("distance", "FID" if self.inception else "Fréchet distance")
        accuracy = () if self.inception else (Metric("accuracy", "class %", 100.0, 1, paired=False),)
        return (distance, *accuracy, Metric("val_loss", "val loss", digits=4))

    def build_model(self, variant: str, num_classes: int, seed: int) -> Any:
        return self.module(connection=variant, num_classes=num_classes, seed=seed, **self.model)

    def prepare(self) -> None:
        """Have the network that scores, before several processes are bound together: it is trained in one.

        Raises:
            ValueError: ``real_data`` have other classes than ``data``.
        """
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
        names = ("accelerator", "devices", "strategy", "precision", "num_nodes", "enable_progress_bar")
        trainer = {name: self.trainer[name] for name in names if name in self.trainer}
        draw_samples(model, folder / "samples", self.sampling, self.samples, classes, self.sample_batch, trainer)
        if not is_first_process():
            return {}
        return {**compare(look_at_samples(self.extractor, folder / "samples", self.samples), self.real)}

    def report(self, results: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> Path:
        first = self.cell_folder(self.variants[0], self.seeds[0]) / "samples" / "sampling.json"
        columns = columns_of(json.loads(first.read_text())["classes"])
        number = min(3 * columns, self.samples)
        shown = {
            v: read_samples(self.cell_folder(v, self.seeds[0]) / "samples" / "parts", number) for v in self.variants
        }
        draw_rows(shown, columns).savefig(self.out / "samples.png", dpi=150)
        path = super().report(results, costs)
        lines = [
            "![samples of each variant](samples.png)",
            "",
            f"The first samples of seed {self.seeds[0]}; image by image the variants start from the same noise.",
            "",
        ]
        path.write_text(path.read_text() + "\n".join(lines))
        return path

    def notes(self, costs: dict[str, dict[str, float]]) -> list[str]:
        held_out = look_at_data(self.extractor, ImageData(**self.real_data), "val", self.input_size, self.samples)
        yardstick = compare(held_out, self.real)
        plan = self.sampling
        guidance = f"guidance {plan.guidance:g}" if plan.guidance != 1 else "no guidance"
        lines = [
            f"{self.extractor.distance}: {self.samples:,} samples (seed {plan.seed}, {guidance}) against "
            f"{len(self.real.features):,} training images, on the features of {self.extractor.name}; as many held-out "
            f"real images score {yardstick['distance']:.2f}."
        ]
        if not self.inception:
            lines[0] += " It is no FID, and compares with nothing outside this table."
            lines[0] += " class %: samples that the classifier takes for the class they were drawn as."
        return [*lines, *super().notes(costs)]


def table(
    results: list[dict[str, Any]],
    costs: dict[str, dict[str, float]],
    variants: list[str],
    metrics: tuple[Metric, ...] = (TOP1,),
) -> list[str]:
    """The report's table in Markdown, aligned so that it reads well in a terminal too."""
    cells = {(r["variant"], r["seed"]): r for r in results}
    seeds = sorted({seed for _, seed in cells})
    parameters = {r["variant"]: r["parameters"] for r in results}
    first = variants[0]
    starts = {
        v: [cells[v, s]["start_top1"] for s in seeds if cells[v, s].get("start_top1") is not None] for v in variants
    }
    header = ["variant"] + (["at start %"] if any(starts.values()) else [])
    for metric in metrics:
        header += [metric.heading] + ([f"minus {first}"] if metric.paired else [])
    header += ["parameters"] + (["step time", "memory"] if costs else [])
    rows = []
    for variant in variants:
        row = [variant] + ([TOP1.show(starts[variant])] if any(starts.values()) else [])
        for metric in metrics:
            values = [cells[variant, seed][metric.name] for seed in seeds]
            spread = f" ± {metric.factor * statistics.stdev(values):.{metric.digits}f}" if len(seeds) > 1 else ""
            row.append(metric.show(values) + spread)
            if metric.paired and variant == first:
                row.append("")
            elif metric.paired:
                differences = [cells[variant, seed][metric.name] - cells[first, seed][metric.name] for seed in seeds]
                row.append(metric.show(differences, "+"))
                if len(seeds) > 1:
                    error = metric.factor * statistics.stdev(differences) / len(seeds) ** 0.5
                    row[-1] += f" ± {error:.{metric.digits}f}"
        row.append(f"{parameters[variant]:,}")
        if variant != first:
            row[-1] += f" (+{100 * (parameters[variant] / parameters[first] - 1):.2f} %)"
        if costs:
            row += [f"{costs[variant]['time']:.2f} x", f"{costs[variant]['memory']:.2f} x"]
        rows.append(row)
    return markdown([header, *rows])


def read_curve(folder: Path, curves: tuple[tuple[str, str, float], ...] = Study.curves) -> dict[str, list[float]]:
    """Metrics by epoch, from a cell's metrics.csv; ``curves`` are their names, labels and factors."""
    curve: dict[str, dict[int, float]] = {name: {} for name, _, _ in curves}
    for path in metrics_files(folder):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, _, factor in curves:
                    if row.get(name):
                        curve[name][int(row["epoch"])] = float(row[name]) * factor
    return {name: [points[epoch] for epoch in sorted(points)] for name, points in curve.items()}


def draw_curves(runs: dict[str, list[dict[str, list[float]]]], curves: tuple[tuple[str, str, float], ...]) -> Figure:
    """Each variant's metrics by epoch, mean over seeds, with the range as a band."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, (name, label, _) in zip(figure.subplots(1, len(curves)), curves, strict=True):
            for color, (variant, seeds) in zip(COLORS * 9, runs.items(), strict=False):
                by_epoch = list(zip(*(run[name] for run in seeds), strict=False))
                epochs = range(1, len(by_epoch) + 1)
                axes.plot(epochs, [statistics.mean(p) for p in by_epoch], color=color, label=variant, marker=".")
                if len(seeds) > 1:
                    axes.fill_between(
                        epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=color, alpha=0.15
                    )
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
        figure.axes[0].legend(frameon=False)
        return figure


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
