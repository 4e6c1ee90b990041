"""A study: variants of one model trained side by side, with the same seeds, and a report.

Every cell (variant, seed) has a folder of its own and is run once; a study that was killed goes on
where it was. All cells of a seed see the same images in the same order and start from the same trunk.
"""

import csv
import json
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from timm.models import get_model_input_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcvision.connections import parse_connection
from hcvision.data import ImageData
from hcvision.training import ImageClassifier, equip, keep_metrics, last_checkpoint, metrics_files

COLUMNS = (
    "variant",
    "seed",
    "start_top1",
    "top1",
    "top5",
    "val_loss",
    "train_loss",
    "parameters",
    "epochs",
    "images",
    "seconds",
)
COLORS = ("#444444", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5b9e", "#2e4057", "#b8b8b8")


class Study:
    """Train every variant with every seed and report.

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
        self.out, self.title, self.variants, self.seeds = Path(out), title, variants, seeds
        self.model, self.data, self.trainer = model, data, trainer
        self.timing_rounds = timing_rounds
        self.settings = json.loads(json.dumps({"model": model, "data": {**data, "root": None}, "trainer": trainer}))

    def cell_folder(self, variant: str, seed: int) -> Path:
        return self.out / variant / f"seed{seed}"

    def build_model(self, variant: str, num_classes: int) -> ImageClassifier:
        return ImageClassifier(connection=variant, num_classes=num_classes, **self.model)

    def run(self, say: Callable[[str], None] = print) -> Path:
        """Run what is missing and write the report. Returns the path of report.md."""
        cells = [(variant, seed) for seed in self.seeds for variant in self.variants]
        self.check_settings(cells)
        results = []
        for number, (variant, seed) in enumerate(cells, 1):
            done = self.read_result(variant, seed)
            if done is None:
                say(f"[{number}/{len(cells)}] {variant}, seed {seed}")
                done = self.run_cell(variant, seed)
            else:
                say(f"[{number}/{len(cells)}] {variant}, seed {seed}: done before, top-1 {100 * done['top1']:.2f} %")
            results.append(done)
        costs = self.costs(say)
        return self.report(results, costs)

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
        model = self.build_model(variant, data.num_classes)
        data.prepare_data()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", self.settings)
        keep_metrics(folder)
        quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = pl.Trainer(**equip(folder, {**quiet, **self.trainer}, f"{variant} seed {seed}"))
        checkpoint = last_checkpoint(folder)
        start = self.score_start(folder / "start.json", model, data)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "val_top1" not in metrics:
            metrics = {name: float(value) for name, value in trainer.validate(model, data, verbose=False)[0].items()}
        result = {
            "variant": variant,
            "seed": seed,
            "start_top1": start,
            "top1": metrics["val_top1"],
            "top5": metrics.get("val_top5"),
            "val_loss": metrics["val_loss"],
            "train_loss": metrics.get("train_loss"),
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "epochs": trainer.current_epoch,
            "images": trainer.global_step * data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            "seconds": round(time.monotonic() - began, 1),
        }
        write_json(folder / "result.json", result)
        return result

    def score_start(self, path: Path, model: ImageClassifier, data: ImageData) -> float | None:
        """Top-1 before the first step, for weights that come from somewhere (``init_from``, ``pretrained``)."""
        if not (self.model.get("init_from") or self.model.get("pretrained")):
            return None
        if not path.is_file():
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = pl.Trainer(**{**self.trainer, **quiet, "enable_model_summary": False, "inference_mode": False})
            write_json(path, float(trainer.validate(model, data, verbose=False)[0]["val_top1"]))
        return json.loads(path.read_text())

    def costs(self, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Per variant the time of a training step and its peak of memory, as ratios to the first variant."""
        if not self.timing_rounds:
            return {}
        path = self.out / "costs.json"
        device = "cuda" if torch.cuda.is_available() and self.trainer.get("accelerator", "auto") != "cpu" else "cpu"
        key = {"variants": self.variants, "rounds": self.timing_rounds, "device": device, "settings": self.settings}
        if path.is_file() and (known := json.loads(path.read_text()))["key"] == key:
            return known["costs"]
        say("measuring step time and memory")
        data = ImageData(**self.data)
        steps = {}
        for variant in self.variants:
            torch.manual_seed(0)
            model = self.build_model(variant, data.num_classes).model.to(device)
            images = torch.randn(data.batch_size, *get_model_input_config(model)["input_size"], device=device)
            targets = torch.randint(data.num_classes, (data.batch_size,), device=device)
            steps[variant] = training_step(model, images, targets, str(self.trainer.get("precision", "32")))
        times = interleaved_ratios(steps, self.timing_rounds, device)
        peaks = {variant: peak_memory(step, device) for variant, step in steps.items()}
        costs = {v: {"time": times[v], "memory": peaks[v] / peaks[self.variants[0]]} for v in self.variants}
        write_json(path, {"key": key, "costs": costs})
        return costs

    def report(self, results: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> Path:
        """Write results.csv, curves.png and report.md."""
        with (self.out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(results)
        draw_curves({v: [read_curve(self.cell_folder(v, s)) for s in self.seeds] for v in self.variants}).savefig(
            self.out / "curves.png", dpi=150
        )
        first = results[0]
        trained = f"{first['epochs']} epochs, {first['images']:,} images each"
        lines = [
            f"# {self.title}", "",
            f"{self.data['dataset']}, {self.model['model']}, {trained}, seeds {', '.join(map(str, self.seeds))}.", "",
            *table(results, costs, self.variants), "",
            *notes(self.variants, self.seeds, costs), "",
            "![validation accuracy and training loss](curves.png)", "",
        ]  # fmt: skip
        path = self.out / "report.md"
        path.write_text("\n".join(lines))
        return path


def table(results: list[dict[str, Any]], costs: dict[str, dict[str, float]], variants: list[str]) -> list[str]:
    """The report's table in Markdown, aligned so that it reads well in a terminal too."""
    top1 = {v: {r["seed"]: 100 * r["top1"] for r in results if r["variant"] == v} for v in variants}
    parameters = {r["variant"]: r["parameters"] for r in results}
    first = variants[0]
    starts = {
        v: [100 * r["start_top1"] for r in results if r["variant"] == v and r.get("start_top1") is not None]
        for v in variants
    }
    header = ["variant", "top-1 %", f"minus {first}", "parameters"]
    header += ["step time", "memory"] if costs else []
    rows = []
    for variant in variants:
        values = list(top1[variant].values())
        mean = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        row = [variant, mean, "", f"{parameters[variant]:,}"]
        if variant != first:
            differences = [top1[variant][seed] - top1[first][seed] for seed in top1[variant]]
            row[2] = f"{statistics.mean(differences):+.2f}"
            if len(differences) > 1:
                row[2] += f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}"
            row[3] += f" (+{100 * (parameters[variant] / parameters[first] - 1):.2f} %)"
        if costs:
            row += [f"{costs[variant]['time']:.2f} x", f"{costs[variant]['memory']:.2f} x"]
        if any(starts.values()):
            row.insert(1, f"{statistics.mean(starts[variant]):.2f}")
        rows.append(row)
    if any(starts.values()):
        header.insert(1, "at start %")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(row)} |" for row in cells]


def notes(variants: list[str], seeds: list[int], costs: dict[str, dict[str, float]]) -> list[str]:
    first = variants[0]
    if len(seeds) > 1:
        lines = [
            f"top-1 is the mean over {len(seeds)} seeds ± their standard deviation, after the last epoch; the "
            f"difference to {first} is paired by seed, ± its standard error."
        ]
    else:
        lines = [
            "top-1 after the last epoch. One seed has no spread: a difference here can be luck, "
            "a study with several seeds (`seeds` in its config) tells."
        ]
    if costs:
        lines.append(
            f"Step time (forward, backward and AdamW, eager, variants interleaved in one process, median) and "
            f"peak memory of a training step are ratios to {first}."
        )
    return lines


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first difference between two trees of plain values, in words, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            difference = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def read_curve(folder: Path) -> dict[str, list[float]]:
    """Validation top-1 in percent and training loss by epoch, from a cell's metrics.csv."""
    curve: dict[str, dict[int, float]] = {"val_top1": {}, "train_loss": {}}
    for path in metrics_files(folder):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, points in curve.items():
                    if row.get(name):
                        points[int(row["epoch"])] = float(row[name]) * (100 if name == "val_top1" else 1)
    return {name: [points[epoch] for epoch in sorted(points)] for name, points in curve.items()}


def draw_curves(curves: dict[str, list[dict[str, list[float]]]]) -> Figure:
    """Validation accuracy and training loss by epoch, mean over seeds, with the range as a band."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = (("val_top1", "validation top-1, %"), ("train_loss", "training loss"))
        for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
            for color, (variant, runs) in zip(COLORS * 9, curves.items(), strict=False):
                by_epoch = list(zip(*(run[name] for run in runs), strict=False))
                epochs = range(1, len(by_epoch) + 1)
                axes.plot(epochs, [statistics.mean(p) for p in by_epoch], color=color, label=variant, marker=".")
                if len(runs) > 1:
                    axes.fill_between(
                        epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=color, alpha=0.15
                    )
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
        figure.axes[0].legend(frameon=False)
        return figure


def training_step(model: torch.nn.Module, images: Tensor, targets: Tensor, precision: str) -> Callable[[], None]:
    """A training step as a function: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def interleaved_ratios(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median over rounds of each step's time relative to the first one's in the same round."""

    def seconds(step: Callable[[], None]) -> float:
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first, ratios = next(iter(steps)), defaultdict(list)
    for number in range(rounds + 2):
        order = list(steps)[:: 1 if number % 2 else -1]
        times = {name: seconds(steps[name]) for name in order}
        if number >= 2:  # after two rounds of warm-up
            for name in steps:
                ratios[name].append(times[name] / times[first])
    return {name: statistics.median(values) for name, values in ratios.items()}


def peak_memory(step: Callable[[], None], device: str) -> float:
    """Peak of the memory that the tensors of a step take, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with TensorMemory() as memory:
        step()
    return memory.peak


class TensorMemory(TorchDispatchMode):
    """Adds up the storages that operations touch while they live: what a GPU's allocator counts, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def _drop(self, address: int) -> None:
        self.now -= self.known.pop(address, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self.known:
                self.known[address] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, address)
        self.peak = max(self.peak, self.now)
        return result
