"""Checkpoints of a run: written whole, the last and the best one, found and read."""

import argparse
import io
import pickle
import re
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO

from hcvision.data import UNREADABLE, write_whole


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    path = checkpoint_folder(run) / "last.ckpt"
    return path if path.is_file() else None


def best_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run folder, the last one where there is no best, or None."""
    path = checkpoint_folder(run) / "best.ckpt"
    return path if path.is_file() else last_checkpoint(run)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are there whole or not at all, also when the process is killed or the disk is full meanwhile.

    Lightning writes them into the system's folder for temporary files and moves them, which is a copy where
    that is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: the end of every epoch, also of one that ends early, and every validation in the middle of one."""

    def __init__(self, folder: Path):
        super().__init__(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over nothing: the folder may have been another one."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        updated = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_inside_epoch(trainer) and updated and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: of all validations the one with the best score, or none where there is no validation.

    The score to beat is read in the file itself, so that a folder may be copied, moved or renamed.
    """

    def __init__(self, folder: Path, monitor: str, mode: str):
        super().__init__(folder, "best", monitor, mode=mode, enable_version_counter=False)
        self.path = Path(str(self.dirpath)) / "best.ckpt"
        self.is_validated = False  # since the last look

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over nothing: the file counts, which may be newer or gone."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and self.path.is_file():
            state = read_checkpoint(self.path).get("callbacks", {}).get(self.state_key, {})
            self.best_model_score, self.best_model_path = deepcopy(state.get("best_model_score")), str(self.path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept = trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", 0)
        self.is_validated = kept
        if is_inside_epoch(trainer):
            self.compare(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.compare(trainer)

    def compare(self, trainer: pl.Trainer) -> None:
        """Keep a checkpoint if what was validated last is better than what is there."""
        score = trainer.callback_metrics.get(str(self.monitor))
        if not self.is_validated or score is None:
            return
        self.is_validated = False
        sign = 1 if self.mode == "max" else -1
        if score.isnan():
            score = torch.full_like(score, -sign * float("inf"))
        best = self.best_model_score if self.path.is_file() else None
        if trainer.strategy.broadcast(best is None or bool(sign * score > sign * best.to(score.device))):
            self.best_model_score, self.best_model_path = score, str(self.path)
            self._save_checkpoint(trainer, str(self.path))


def is_inside_epoch(trainer: pl.Trainer) -> bool:
    """Whether more batches of the epoch follow, in a training."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors mapped and not copied. Executes nothing that the file says.

    Options of a program (argparse.Namespace), which some checkpoints hold, are let through.

    Raises:
        ValueError: it is no checkpoint, or a damaged one.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # of what is refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}")
            return content
    except UNREADABLE as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        if isinstance(error, pickle.UnpicklingError):
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = "it is not weights alone, and reading the rest could run code"
            reason += f" (it calls {foreign[1]})" if foreign else ""
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {reason}") from error


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint of the end of an epoch go on with the next one, wherever in the end it was saved."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if loops and loops["epoch_loop.batch_progress"]["is_last_batch"]:
        for counts in loops["epoch_progress"].values():
            if counts["started"] == counts["ready"]:
                counts["processed"] = counts["completed"] = counts["ready"]
