"""What tests and probes have found of a model: a JSON line for each set of images, and a table of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from hcvision.data import markdown, printable, write_whole

SHARES = re.compile(r"(top1|top5|macro|map|f1|(scaled_)?ece|(knn\d+|linear)(_std)?)")  # shown in percent
COLUMNS = (*("data", "top1", "top5", "macro", "map", "f1", "nll", "ece", "brier"), "temperature", "scaled_ece")
PROBED = re.compile(r"(knn\d+|linear)(_std)?")  # columns of a probe, behind those


class RecordScores(pl.Callback):
    """After a test: one line of ``metrics.jsonl`` in a folder, and a table of its lines.

    A line says model, connection, checkpoint, whether its weights are an average (``ema``) or not (``raw``), the data
    and how many images, and every number of the test without its ``test_``; ``test_loss`` is ``nll`` where there is one
    label per image. A later test of the same checkpoint on the same data takes the place of its line. Many such files
    are one table: ``pandas.read_json(file, lines=True)``.

    Args:
        folder: of the file.
        source: where the weights are from, if not from a checkpoint of the trainer.
    """

    def __init__(self, folder: Path, source: str | None = None):
        self.folder, self.source = folder, source
        self.images = 0
        self.is_quiet = False  # writes and shows no table

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self.images = 0

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx, dataloader_idx=0) -> None:
        """Count the images."""
        self.images += 0 if outputs is None else len(outputs[1])

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the line and show the table."""
        images = int(trainer.strategy.reduce(torch.tensor(self.images, device=pl_module.device), reduce_op="sum"))
        if not trainer.is_global_zero:
            return
        about = describe_model(str(trainer.ckpt_path or self.source), pl_module)
        line = about | trainer.datamodule.describe() | {"images": images}  # type: ignore
        line |= name_scores(trainer.callback_metrics, pl_module.hparams["multi_label"])
        path = self.folder / "metrics.jsonl"
        try:
            lines = add_line(path, line)
            kept = f"the scores are in {path}"
        except (OSError, ValueError) as error:
            lines, kept = [line], f"the scores cannot be kept in {path}: {getattr(error, 'strerror', None) or error}"
        if self.is_quiet:
            return
        own = [other for other in lines if other.get("checkpoint") == line["checkpoint"]]
        print("\n".join(["", *tabulate(own), "", kept]))


def describe_model(checkpoint: str, pl_module: pl.LightningModule) -> dict[str, Any]:
    """What was tested: model, connection, checkpoint, and which of its weights."""
    hparams = pl_module.hparams
    weights = "raw" if hparams["ema_decay"] is None else "ema"
    connection = getattr(pl_module.model, "connection", "residual")  # which the name of a model may say, too
    return {"model": hparams["model"], "connection": connection, "checkpoint": checkpoint, "weights": weights}


def name_scores(metrics: Any, multi_label: bool) -> dict[str, float]:
    """Numbers of a test without their ``test_``."""
    scores = {name.removeprefix("test_"): float(value) for name, value in metrics.items() if name.startswith("test_")}
    if not multi_label and "loss" in scores:
        scores = {"nll" if name == "loss" else name: value for name, value in scores.items()}
    return scores


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; none where there is no file.

    Raises:
        ValueError: a line is no JSON.
    """
    try:
        return [json.loads(text) for text in path.read_text().splitlines() if text.strip()] if path.is_file() else []
    except ValueError as error:
        raise ValueError(f"{path} is not what a test writes: {error}; without the file it would be written") from error


def add_line(path: Path, line: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a line into a ``metrics.jsonl``, in place of that of the same model, checkpoint and data.

    Args:
        path: of the file, which need not be there.
        line: a test's.

    Returns:
        All lines.

    Raises:
        OSError: it cannot be written.
        ValueError: the file is something else.
    """
    names = ("model", "connection", "checkpoint", "weights", "data", "split", "variant", "classes", "size", "shots")
    others = [one for one in read_lines(path) if any(one.get(name) != line.get(name) for name in names)]
    lines = [*others, line]
    write_whole(path, "".join(json.dumps(one) + "\n" for one in lines).encode())
    return lines


def tabulate(lines: list[dict[str, Any]]) -> list[str]:
    """Lines of one or more ``metrics.jsonl`` as a Markdown table, a row each; what a line lacks is ``-``."""
    models = {(line["model"], line["connection"]) for line in lines}
    columns = [*(("model", "connection") if len(models) > 1 else ()), "data", "images"]
    columns += [name for name in COLUMNS[1:] if any(name in line for line in lines)]
    columns += sorted({name for line in lines for name in line if PROBED.fullmatch(name)}, key=natural_order)
    rows = [[show(name, name_data(line) if name == "data" else line.get(name)) for name in columns] for line in lines]
    return markdown([columns, *rows])


def natural_order(name: str) -> tuple[str, int, str]:
    """By which the columns of a probe are put in order: knn5, knn10, linear."""
    letters, digits, rest = re.fullmatch(r"([a-z]+)(\d*)(.*)", name).groups()  # type: ignore[union-attr]
    return letters, int(digits or 0), rest


def name_data(line: dict[str, Any]) -> str:
    """What a row of the table calls its data."""
    return " ".join(filter(None, [Path(line["data"]).name or line["data"], line.get("variant")]))


def show(name: str, value: Any) -> str:
    """A cell: shares in percent, other numbers with four digits behind the point."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if SHARES.fullmatch(name) else f"{value:.4f}"
    return printable(str(value))
