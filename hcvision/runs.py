"""A run and its folder: checkpoints, metrics, loggers, the progress bar, and stopping so that it can go on."""

import argparse
import csv
import ctypes
import io
import json
import logging
import multiprocessing.util
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, ProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import CheckpointIO, TorchCheckpointIO

UNREADABLE = (  # what torch.load says of files that are something else, or damaged
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error),
    *(ValueError, TypeError, LookupError, AttributeError),
)


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


def write_whole(path: Path, content: Any) -> None:
    """Write bytes into a file, whole or not at all; what was there before stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # what is left of it where that failed


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


class Stopped(SystemExit):
    """A run was asked to stop (Ctrl-C, SIGTERM) and did. ``code`` is 128 and the signal's number, as shells have it."""

    def __init__(self, code: int, message: str):
        super().__init__(code)
        self.message = message


class StopCleanly(Checkpoint):
    """On Ctrl-C or SIGTERM finish the step, keep a checkpoint that goes on right there, and stop; on a second, at once.

    A checkpoint callback, so that it comes after the others in every hook, the averaging of weights included.
    """

    patient = False  # a second signal is no other wish, where another process stops this one

    def __init__(self, run: Path):
        self.run = run
        self.signal: int | None = None
        self.was_asked = False  # in a training that was over before it could stop
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.receive)

    def receive(self, number: int, _: Any) -> None:
        if self.signal is not None:
            if self.patient:
                return
            self.give_back()
            raise KeyboardInterrupt
        self.signal = number
        if is_first_process():
            print("\nstopping after this step or validation; once more stops at once", file=sys.stderr)

    def give_back(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def is_wanted(self, trainer: pl.Trainer) -> bool:
        """Whether any process was asked to stop; all of them have to say the same."""
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        updated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # what follows the last step of an epoch, and some others, is a validation, whose result belongs to the run
        every = getattr(trainer, "val_check_batch", None) or float("inf")
        validated = trainer.is_last_batch or (trainer.fit_loop.total_batch_idx + 1) % every == 0
        validated |= (batch_idx + 1) % every == 0
        if updated and not validated and self.is_wanted(trainer):
            self.stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_wanted(trainer) and not trainer.fit_loop.done:
            self.stop(trainer)

    def stop(self, trainer: pl.Trainer) -> None:
        path = checkpoint_folder(self.run) / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.leave(f"stopped after step {trainer.global_step} (epoch {trainer.current_epoch}); {path} holds it")

    def leave(self, where: str) -> NoReturn:
        raise Stopped(128 + (self.signal or signal.SIGTERM), where)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.was_asked = self.is_wanted(trainer)
        self.give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.give_back()


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


def keep_freed_memory() -> None:
    """Have glibc keep what it frees: a step on a CPU would get its tensors as fresh pages again and again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, at the largest that it takes


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


def has_compiler(device: str) -> bool:
    """Whether there is the compiler that torch.compile needs: of C++ for a CPU, of C for starting kernels on a GPU."""
    usual = ("clang++" if sys.platform == "darwin" else "g++",) if device == "cpu" else ("gcc", "clang", "cc")
    chosen = os.environ.get("CXX" if device == "cpu" else "CC")
    return any(shutil.which(name) for name in ([chosen] if chosen else usual))


def check_writable(folder: Path, instead: str) -> None:
    """Look at a folder, or at the one in which it is to be made, before long work.

    Args:
        folder: into which something is to be written.
        instead: what would work, for the error.

    Raises:
        PermissionError: nothing can be written there.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    effective = os.access in os.supports_effective_ids
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK, effective_ids=effective):
        raise PermissionError(f"nothing can be written into {there}; {instead}")


def pick_device(wanted: str = "auto") -> str:
    """``wanted``, where auto stands for a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    name = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        known = ", ".join(["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise ValueError(f"device must be one that works here, such as {known}, got {wanted!r}") from error
    return name


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the machine had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_first_process() -> bool:
    """Whether this is the process that writes, also before Lightning has told the others what they are."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all."""
    write_whole(path, json.dumps(value, indent=1).encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys, whole or not at all."""
    write_cells(path, [[*rows[0]], *([*row.values()] for row in rows)])


def write_cells(path: Path, rows: list[list[Any]]) -> None:
    """Write a CSV file of a header and rows, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def markdown(rows: list[list[str]]) -> list[str]:
    """A table in Markdown of a header and rows, aligned so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in lines]


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first difference between two trees of plain values, in words, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            difference = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"
