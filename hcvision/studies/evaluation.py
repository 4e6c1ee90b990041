"""What a classifier gets right and wrong, class by class: a table and a picture of the confusion matrix."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

from hcvision.data import markdown, printable, write_cells, write_csv, write_json
from hcvision.training import ClassCounts

SHOWN = 20  # classes of the table that is printed
MOST_CLASSES = 2000  # of a confusion matrix, which grows with their square


class ClassReport(pl.Callback):
    """After a test: ``classes.csv`` in a folder; ``confusion.csv`` and ``confusion.png`` for one label per image.

    Prints the classes with the lowest score. More than ``MOST_CLASSES`` have no confusion matrix, and it says so.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.is_on = True

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes, multi_label = pl_module.hparams["num_classes"], pl_module.hparams["multi_label"]
        each: dict[str, Any] = {"num_labels": classes, "average": "none"}
        scores: dict[str, Any] = {"counts": ClassCounts(classes)}
        if classes <= MOST_CLASSES:
            scores["confusion"] = MulticlassConfusionMatrix(classes)
        if multi_label:
            scores = {
                "average precision": MultilabelAveragePrecision(**each),
                "precision": MultilabelPrecision(**each),
                "recall": MultilabelRecall(**each),
                "f1": MultilabelF1Score(**each),
            }
        self.metrics = MetricCollection(scores, compute_groups=False).to(pl_module.device)
        self.count = torch.zeros(classes, device=pl_module.device)

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx, dataloader_idx=0) -> None:
        if outputs is None or not self.is_on:
            return
        logits, targets = outputs
        if pl_module.hparams["multi_label"]:
            self.metrics.update(logits.sigmoid(), targets.long())
            self.count += targets.sum(0)
        else:
            self.metrics.update(logits, targets)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_on:
            return
        scores = self.metrics.compute()
        count = trainer.strategy.reduce(self.count, reduce_op="sum")
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = data.class_names or [str(number) for number in range(len(self.count))]
        about = {"checkpoint": str(trainer.ckpt_path), "data": str(data.root)}
        remark, matrix = "", None
        if "counts" in scores:
            rows = rate_classes(scores["counts"].cpu(), names)
        if "confusion" in scores:
            matrix = scores["confusion"].cpu()
            rows = [row | more for row, more in zip(rows, count_confusions(matrix, names), strict=True)]
        elif "counts" in scores:
            remark = f"; {len(names)} are too many for a confusion matrix, which is made for up to {MOST_CLASSES}"
        else:
            values = {name: value.tolist() for name, value in scores.items()}
            rows = [
                {"class": name, "images": int(count[number])} | {key: value[number] for key, value in values.items()}
                for number, name in enumerate(names)
            ]
        chosen = data.chosen
        if chosen is not None:
            rows = [rows[number] for number in chosen]
            if matrix is not None and data.other_logits == "leave_out":
                matrix, names = matrix[chosen][:, chosen], [names[number] for number in chosen]
        try:
            self.write(about, rows, matrix, names)
            kept = f"the classes are in {self.folder}"
        except OSError as error:
            kept = f"the classes cannot be kept in {self.folder}: {error.strerror}"
        print("\n".join(["", *lowest(rows), "", f"{kept}{remark}"]))

    def write(self, about: dict[str, str], rows: list[dict[str, Any]], matrix: Tensor | None, names: list[str]) -> None:
        """Write the rows of the classes, what they are of, and the confusion matrix (K, K) if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "about.json", about)
        if matrix is not None:
            lines = [[name, *line] for name, line in zip(names, matrix.tolist(), strict=True)]
            write_cells(self.folder / "confusion.csv", [["class", *names], *lines])
            draw_confusion(matrix, names).savefig(self.folder / "confusion.png", dpi=150)
        decimals = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        write_csv(self.folder / "classes.csv", decimals)


def rate_classes(counts: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Per class: images, accuracy (its recall), precision and F1, from ``ClassCounts`` (K, 3) of the K names."""
    right, images, predicted = counts.double().unbind(1)
    rates = torch.stack([right / images, right / predicted, 2 * right / (images + predicted)], dim=1).tolist()
    return [
        {"class": name, "images": count, **dict(zip(("accuracy", "precision", "f1"), rate, strict=True))}
        for name, count, rate in zip(names, counts[:, 1].tolist(), rates, strict=True)
    ]


def count_confusions(matrix: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Per class: the class it is taken for most often, and how often.

    Args:
        matrix: (K, K), images of the row's class that were taken for the column's.
        names: of the K classes.
    """
    most, which = matrix.clone().fill_diagonal_(0).max(1)
    return [
        {"taken for": names[other] if times else "", "times": times}
        for times, other in zip(most.tolist(), which.tolist(), strict=True)
    ]


def lowest(rows: list[dict[str, Any]]) -> list[str]:
    """The classes with the lowest score (the third column) as a Markdown table."""
    columns = list(rows[0])
    worst = sorted(rows, key=lambda row: (row[columns[2]] == row[columns[2]], row[columns[2]]))[:SHOWN]  # nan first
    table = markdown([columns, *([show(value) for value in row.values()] for row in worst)])
    return table + [f"the lowest {SHOWN} of {len(rows)} classes"] * (len(rows) > SHOWN)


def show(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{100 * value:.1f} %"
    return printable(str(value))


def plain(name: str) -> str:
    """A name that matplotlib shows as it is: no formulas, and no signs that its font lacks."""
    return show("".join(c if ord(c) < 0x250 else "?" for c in name)).replace("$", r"\$")


def draw_confusion(matrix: Tensor, names: list[str]) -> Figure:
    """Rows are the true classes, colours the share of their images; up to 40 classes are named, up to 15 counted."""
    classes = len(names)
    size = min(max(4.5, 0.42 * classes + 2), 14)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    picture = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if classes <= 40:
        labels = [name if len(name) <= 24 else f"{name[:22]}…" for name in map(plain, names)]
        axes.set_xticks(range(classes), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), labels)
    if classes <= 15:
        for row in range(classes):
            for column in range(classes):
                if matrix[row, column]:
                    color = "white" if share[row, column] > 0.5 else "black"
                    axes.text(
                        column, row, f"{int(matrix[row, column])}", ha="center", va="center", color=color, fontsize=8
                    )
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class's images")
    return figure
