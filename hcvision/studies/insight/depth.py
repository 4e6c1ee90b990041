"""What each block is worth: accuracy and loss when its branches are skipped, one block at a time.

A block is skipped when each of its branches gives zero, as stochastic depth drops them (Huang et al., 2016, arXiv
1603.09382): of a residual block ``x + f(x)`` stays x, as in Veit et al. (2016, arXiv 1605.06431), who skip blocks of
trained residual networks. A connection still mixes its streams, by its own weights: ``H = A_r^T H`` is left of
``B^T f(A_m^T H) + A_r^T H``. At the initial values of Hyper- and Frac-Connections A_r is the identity, so that both are
the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from hcvision.models import connections_of, stages
from hcvision.studies.insight.figures import OURS, STYLE, TWIN
from hcvision.training import ImageClassifier

NONE = "none"  # what the row of the whole model has for the block that is skipped


@contextlib.contextmanager
def skip_block(block: nn.Module) -> Iterator[None]:
    """Have every branch of a block with connections give zero meanwhile; the streams are still mixed."""
    before: list[tuple[Any, dict[str, Any]]] = []
    try:
        for connection in connections_of(block):
            before.append((connection, dict(vars(connection))))
            for name in ("depth_connection", "join"):
                vars(connection)[name] = ignore_output(getattr(connection, name))
        yield
    finally:
        for connection, attributes in before:
            for name in ("depth_connection", "join"):
                vars(connection).pop(name, None)
                if name in attributes:  # somebody else looks on, too
                    vars(connection)[name] = attributes[name]


def ignore_output(step: Any) -> Any:
    """A step of a connection that takes a zero for the output of the branch."""
    return lambda branch_output, carried, *time: step(torch.zeros_like(branch_output), carried, *time)


class SkipBlocks(pl.Callback):
    """In an evaluation: the loss, and with one label per image the accuracy, of the model with each block skipped.

    Every batch passes through the model once more for each of its blocks and once with none skipped. All blocks need
    connections; ``connect_adds`` writes residual adds as such. The noise of a diffusion model is the same for all.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[str, nn.Module | None]] = []
        self.sums = torch.zeros(0, 2, dtype=torch.float64)  # of loss and of images that are right, per skipped block
        self.images = 0
        self.has_accuracy = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        columns = stages(pl_module.model)
        places = ["" if len(columns) == 1 else f"stage {number} " for number in range(len(columns))]
        self.blocks = [(NONE, None)]
        for place, column in zip(places, columns, strict=True):
            self.blocks += [(f"{place}block {number}", block) for number, block in enumerate(column)]
        self.sums, self.images = torch.zeros(len(self.blocks), 2, dtype=torch.float64), 0
        self.has_accuracy = isinstance(pl_module, ImageClassifier) and not pl_module.hparams["multi_label"]

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        count = len(batch[0])
        if not count:
            return
        for number, (_, block) in enumerate(self.blocks):
            with skip_block(block) if block is not None else contextlib.nullcontext():
                self.sums[number] += torch.tensor(self.judge(pl_module, batch, batch_idx)) * count
        self.images += count

    def judge(self, pl_module: Any, batch: tuple[Tensor, Tensor], seed: int) -> list[float]:
        """Loss and accuracy of a batch, means over its images; the accuracy is 0 where there is none."""
        if isinstance(pl_module, ImageClassifier):
            logits, targets = pl_module.answer(batch)
            loss = pl_module.plain_loss(logits, targets)
            right = (logits.argmax(1) == targets).double().mean() if self.has_accuracy else torch.zeros(())
            return [loss.item(), right.item()]
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return [pl_module.batch_loss(batch).item(), 0.0]

    def rows(self) -> list[dict[str, Any]]:
        """Per skipped block, ``none`` first: loss and accuracy, means over images."""
        rows = []
        for (name, _), (loss, right) in zip(self.blocks, (self.sums / self.images).tolist(), strict=True):
            rows.append({"skipped": name, "loss": loss} | ({"accuracy": right} if self.has_accuracy else {}))
        return rows


def join_rows(rows: list[dict[str, Any]], twin: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of ``SkipBlocks`` as they are written, those of the residual twin, if there is one, beside them."""
    joined = []
    for number, row in enumerate(rows):
        more = {f"residual {name}": value for name, value in twin[number].items()} if twin else {}
        more.pop("residual skipped", None)
        joined.append({name: v if isinstance(v, str) else f"{v:.6f}" for name, v in (row | more).items()})
    return joined


def draw_blocks(rows: list[dict[str, Any]], twin: list[dict[str, Any]]) -> Figure:
    """Accuracy, or the loss where there is none, with each block skipped; dashed lines are with none skipped."""
    name = "accuracy" if "accuracy" in rows[0] else "loss"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6, 1.5 + 0.32 * len(rows)), 4), layout="constrained")
        axes = figure.subplots()
        for values, color, label in ((rows, OURS, "this model"), (twin, TWIN, "residual twin")):
            if values:
                whole, *each = [row[name] for row in values]
                axes.plot(range(len(each)), each, color=color, marker="o", label=label)
                axes.axhline(whole, color=color, linestyle="--", linewidth=1)
        axes.set_xticks(range(len(rows) - 1), [row["skipped"] for row in rows[1:]], rotation=90)
        axes.set_ylabel(f"{name} without the block")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure


def summarize_blocks(rows: list[dict[str, Any]], who: str = "") -> str:
    """A line: what skipping a block does on average, and which one does most."""
    name = "accuracy" if "accuracy" in rows[0] else "loss"
    whole, *each = rows
    changes = [row[name] - whole[name] for row in each]
    most = max(range(len(changes)), key=lambda k: abs(changes[k]))
    factor, unit, digits = (100, " points", 2) if name == "accuracy" else (1, "", 4)
    mean, worst = (f"{factor * value:+.{digits}f}{unit}" for value in (sum(changes) / len(changes), changes[most]))
    return f"{who}skipping a block changes the {name} by {mean} on average, most {each[most]['skipped']}: {worst}"
