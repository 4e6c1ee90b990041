"""A run's folder: metrics, loggers, progress bar, and the callbacks that every run has."""

import logging
import multiprocessing.util
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import CheckpointIO

from hcvision.training.checkpoints import BestCheckpoint, LastCheckpoint, WholeFiles, checkpoint_folder
from hcvision.training.stopping import StopCleanly

LONGEST_FOLDER = 70  # bytes of a path, to which Python adds 32 for a socket, of the 104 to 108 that systems take


class Progress(TQDMProgressBar):
    """Lightning's bar with the metric that counts, images per second and the time left for the whole run."""

    def __init__(self, refresh_rate: int = 10, title: str = ""):
        super().__init__(refresh_rate=refresh_rate)
        self.title = title
        self.began, self.first_step, self.images, self.paused = 0.0, 0, 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.began, self.first_step, self.images, self.paused = time.monotonic(), trainer.global_step, 0, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self.paused -= time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.paused += time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        if self.title:
            epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            self.train_progress_bar.set_description(f"{self.title} epoch {trainer.current_epoch + 1}{epochs}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self.images += len(batch[0]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        score = next((name for name in ("val_top1", "val_map") if name in trainer.callback_metrics), None)
        if score:
            metrics[score] = f"{100 * trainer.callback_metrics[score].item():.2f}%"
        elif "val_loss" in trainer.callback_metrics:
            metrics["val_loss"] = f"{trainer.callback_metrics['val_loss'].item():.4f}"
        elapsed, done = time.monotonic() - self.began, trainer.global_step - self.first_step
        if self.began and done > 0:
            metrics["img/s"] = round(self.images / (elapsed - max(self.paused, 0.0)))
            total = trainer.estimated_stepping_batches
            if total != float("inf"):
                left = elapsed / done * (total - trainer.global_step)
                metrics["left"] = show_seconds(left)
        return metrics


def show_seconds(seconds: float) -> str:
    """A time as hours, minutes and seconds: 0:01:40."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def metrics_files(run: Path) -> list[Path]:
    """The run's metrics, oldest first: metrics.1.csv, metrics.2.csv, ... (before each resume), metrics.csv."""
    earlier = sorted(run.glob("metrics.*.csv"), key=lambda path: int(path.name.split(".")[1]))
    return earlier + [path for path in [run / "metrics.csv"] if path.is_file()]


def keep_metrics(run: Path) -> None:
    """Put metrics.csv beside: Lightning's CSVLogger starts over in it when a run goes on."""
    if (run / "metrics.csv").is_file():
        (run / "metrics.csv").rename(run / f"metrics.{len(metrics_files(run))}.csv")


def equip(run: Path, trainer: dict[str, Any], monitor: tuple[str, str] = ("val_top1", "max")) -> dict[str, Any]:
    """Arguments of a Trainer with what every run has: loggers and checkpoints in one folder, a progress bar.

    ``monitor`` is the metric that chooses the best checkpoint, and whether it is to be max or min. What
    ``trainer`` says stands: other loggers, more callbacks, ``enable_progress_bar=False``, ...
    """
    arguments = {**trainer, "default_root_dir": trainer.get("default_root_dir") or str(run)}
    if trainer.get("logger") in (None, True):
        tensorboard = TensorBoardLogger(str(run), name="", version="tensorboard")
        arguments["logger"] = [CSVLogger(str(run), name="", version=""), tensorboard]
    plugins = trainer.get("plugins") or []
    plugins = [*plugins] if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        arguments["plugins"] = [*plugins, WholeFiles()]
    callbacks = trainer.get("callbacks") or []
    callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
    if trainer.get("enable_checkpointing") is not False:
        folder = checkpoint_folder(run)
        callbacks += [BestCheckpoint(folder, *monitor), LastCheckpoint(folder)]
        callbacks += [] if trainer.get("fast_dev_run") else [StopCleanly(run)]
    if arguments["logger"] and not any(isinstance(c, LearningRateMonitor) for c in callbacks):
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    if trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(Progress())
    return {**arguments, "callbacks": callbacks}


def quieten() -> None:
    """Hush what says nothing to somebody who trains."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours is, in its own way
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*loading a checkpoint outside the .fit. stage.*")  # the average itself
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def shorten_sockets() -> None:
    """Have processes meet in /tmp where the folder for temporary files has too long a path for the name of a socket.

    Loading processes would fail, and the one that waits for them would wait forever.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_FOLDER and os.access("/tmp", os.W_OK):
        try:
            tempfile.tempdir = "/tmp"
            multiprocessing.util.get_temp_dir()  # is remembered, and removed at the end
        finally:
            tempfile.tempdir = folder
