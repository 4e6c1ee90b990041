"""Stopping a run so that it can go on."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from hcvision.data import is_first_process
from hcvision.training.checkpoints import checkpoint_folder


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
