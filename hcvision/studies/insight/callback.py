"""The unfolded matrix kept during training."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from hcvision.data import is_first_process, write_csv
from hcvision.models import ConnectedBlock, stages
from hcvision.studies.insight.figures import draw_matrix
from hcvision.studies.insight.notes import StageNotes
from hcvision.studies.insight.tables import matrix_rows
from hcvision.studies.insight.unfolding import watch


class Watcher(pl.Callback):
    """Notes what passes through a module's model in its evaluation, a ``StageNotes`` per stage, and the labels."""

    def __init__(self) -> None:
        self.notes: list[StageNotes] = []
        self.labels: list[Tensor] = []
        self.watching = contextlib.ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.notes, self.labels = [StageNotes(blocks) for blocks in stages(pl_module.model)], []
        for notes in self.notes:
            self.watching.enter_context(watch(notes.blocks, notes.note))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.labels.append(batch[1].cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.watching.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.watching.close()


class LogConnections(pl.Callback):
    """Draws the unfolded connection matrix on some validation images during training, for TensorBoard and as CSV.

    The files are in RUN/connections: stage0-step000100.csv, .png, ...

    Args:
        images: of the first validation batch of each validation.
        every_n_epochs: how often.
    """

    def __init__(self, images: int = 32, every_n_epochs: int = 1):
        if images < 1 or every_n_epochs < 1:
            raise ValueError(f"images and every_n_epochs must be at least 1, got {images} and {every_n_epochs}")
        self.images, self.every_n_epochs = images, every_n_epochs
        self.batch: Any = None
        self.works = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Raise ValueError when the model has no blocks to look into."""
        stages(pl_module.model)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            self.batch = tuple(part[: self.images] for part in batch)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batch, self.batch = self.batch, None
        if trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs or not self.works:
            return
        if batch is None or not len(batch[0]):
            return
        inner = pl_module.model
        notes = [StageNotes(blocks) for blocks in stages(inner)]
        if not all(isinstance(block, ConnectedBlock) for stage in notes for block in stage.blocks):
            return  # residual adds: ones, now and always
        try:
            with contextlib.ExitStack() as watching:
                for stage in notes:
                    watching.enter_context(watch(stage.blocks, stage.note))
                pl_module.batch_loss(batch)
        except ValueError as error:
            self.works = False
            warnings.warn(f"no matrix of connections is logged: {error}", stacklevel=2)
            return
        if not is_first_process():
            return
        folder = Path(trainer.default_root_dir) / "connections"
        for number, stage in enumerate(notes):
            mean, _ = stage.matrix()
            name = f"stage{number}-step{trainer.global_step:06}"
            write_csv(folder / f"{name}.csv", matrix_rows(mean, stage.names))
            figure = draw_matrix(mean, None, stage.names)
            figure.savefig(folder / f"{name}.png", dpi=100)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"connections/stage{number}", figure, trainer.global_step)
