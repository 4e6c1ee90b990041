"""Optimizer and schedule: groups of parameters, connections among them, and numbers of updates."""

import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from hcvision.data import refusals
from hcvision.training.connections import connection_parameters

ENDING_SCHEDULES = ("cosine", "tanh", "poly", "wsd")
SCHEDULES = (*ENDING_SCHEDULES, "step", "multistep", "constant")


def count_updates(trainer: pl.Trainer, batches: float) -> float:
    """Updates of a run whose epochs have so many batches; infinite where nothing says when it ends."""
    endless = trainer.max_epochs in (None, -1) or batches == float("inf")
    each = math.ceil(batches / trainer.accumulate_grad_batches) if not endless else 0
    updates = float("inf") if endless else each * max(trainer.max_epochs or 0, 1)
    return updates if trainer.max_steps == -1 else min(updates, trainer.max_steps)


def set_apart(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], lr_scale: float = 1.0, **changes: Any
) -> None:
    """Give parameters groups of their own with ``changes``; timm's schedules apply ``lr_scale``."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) not in own]
        apart = [p for p in parameters if id(p) in own]
        if apart:
            scaled = {"lr_scale": group.get("lr_scale", 1.0) * lr_scale}
            optimizer.add_param_group({**group, **scaled, **changes, "params": apart})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class OptimizedModule(pl.LightningModule):
    """Makes its optimizer and its schedule of its hyper-parameters, which are the arguments of ``TimmModule``."""

    model: nn.Module

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        schedule = {"scheduler": self.make_schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def check_arguments(self) -> None:
        """Raise ValueError when the optimizer or the schedule does not take its arguments."""
        self.build_schedule(self.make_optimizer(), self.hparams["sched"], 1000, 0, 1.0)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of this run. Raises ValueError when it does not take its arguments."""
        hparams = self.hparams
        with refusals(f"{hparams['opt']} does not take these opt_args"):
            optimizer = create_optimizer_v2(
                self.model,
                opt=hparams["opt"],
                lr=hparams["lr"],
                weight_decay=hparams["weight_decay"],
                layer_decay=hparams["layer_decay"],
                fallback_list=("*connection?.*",),  # muon and its like choose by shape; all our matrices are Adam's
                **(hparams["opt_args"] or {}),
            )
        beside = [p for name, p in self.named_parameters() if not name.startswith("model.")]
        if beside:  # what is trained with the model and no part of it
            fallback = (
                {"use_fallback": True} if any("use_fallback" in group for group in optimizer.param_groups) else {}
            )
            for matrices, decay in ((True, hparams["weight_decay"]), (False, 0.0)):
                parameters = [p for p in beside if (p.dim() > 1) == matrices]
                optimizer.add_param_group({"params": parameters, "weight_decay": decay, **fallback})
        own = connection_parameters(self.model)
        if hparams["connection_lr_factor"] != 1:
            set_apart(optimizer, own, lr_scale=hparams["connection_lr_factor"])
        if hparams["connection_decay"]:
            set_apart(optimizer, own, weight_decay=hparams["weight_decay"])
        return optimizer

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        """The schedule of this run, in updates.

        Raises:
            ValueError: the warm-up is as long as the run, and this was not cut short.
        """
        hparams, trainer = self.hparams, self.trainer
        trainer.fit_loop.setup_data()  # a run of max_steps has no number of epochs, but epochs have a length
        batches = trainer.num_training_batches
        updates, per_epoch = count_updates(trainer, batches), max(batches / trainer.accumulate_grad_batches, 1.0)
        warmup = self.count_warmup(trainer, batches)
        self.scheduled = hparams["lr"], updates
        name = hparams["sched"]
        if updates == float("inf") and name in ENDING_SCHEDULES:
            about = f"the run has no set number of updates (max_epochs is {trainer.max_epochs}), which {name} needs: "
            about += "after the warm-up the learning rate stays as it is; max_epochs or max_steps would set one"
            warnings.warn(about)  # noqa: B028 - said once, whoever asks
            name = "constant"
        length = 1 if updates == float("inf") else int(updates) - warmup
        return self.build_schedule(optimizer, name, length, warmup, per_epoch)

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, name: str, length: int, warmup: int, per_epoch: float
    ) -> Scheduler:
        """timm's schedule of so many updates behind those of the warm-up.

        Raises:
            ValueError: it does not take its arguments.
        """
        hparams = self.hparams
        sched_args = dict(hparams["sched_args"] or {})
        with refusals(f"{name} does not take these sched_args"):
            for key in ("decay_epochs", "cooldown_epochs", "stable_timescale"):
                if sched_args.get(key, 0) >= 1:
                    sched_args[key] = round(sched_args[key] * per_epoch)
            if "decay_milestones" in sched_args:
                sched_args["decay_milestones"] = [round(epoch * per_epoch) for epoch in sched_args["decay_milestones"]]
            schedule, _ = create_scheduler_v2(
                optimizer,
                sched=name,
                num_epochs=length,
                warmup_epochs=warmup,
                warmup_prefix=True,
                warmup_lr=hparams["warmup_lr"],
                min_lr=hparams["min_lr"],
                step_on_epochs=False,
                updates_per_epoch=1,
                **sched_args,
            )
        return schedule

    def count_warmup(self, trainer: pl.Trainer, batches: float) -> int:
        """Updates of the warm-up in a run whose epochs have so many batches; half of a run that was cut short.

        Raises:
            ValueError: the warm-up is as long as the run, and this was not cut short.
        """
        steps, epochs = self.hparams["warmup_steps"], self.hparams["warmup_epochs"]
        if epochs and batches == float("inf"):
            raise ValueError(f"warmup_epochs {epochs:g} needs epochs of a known length; warmup_steps does not")
        updates, per_epoch = count_updates(trainer, batches), max(batches / trainer.accumulate_grad_batches, 1.0)
        warmup = round(epochs * per_epoch) if epochs else steps
        if warmup < updates:
            return warmup
        option, given = ("warmup_epochs", epochs) if epochs else ("warmup_steps", steps)
        whole = f"{updates / per_epoch:.3g} epochs" if epochs else f"{updates} updates"
        if trainer.limit_train_batches == 1.0 and trainer.max_steps == -1 and trainer.max_epochs != 1:
            raise ValueError(f"{option} must be less than the {whole} of the run, got {given:g}")
        half = int(updates) // 2
        warnings.warn(f"{option} {given:g} is more than this short run has ({whole}): {half} updates of warm-up")  # noqa: B028
        return half

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(self.trainer.global_step)
        else:  # that of a callback or a tuner
            super().lr_scheduler_step(scheduler, metric)

    def renew_schedule(self) -> None:
        """Have the schedule be at this step, and of the learning rate and the batches that a tuner has found since."""
        for config in self.trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, Scheduler):
                continue
            (optimizer,), (lr, updates) = self.trainer.optimizers, self.scheduled
            now = self.hparams["lr"], count_updates(self.trainer, self.trainer.num_training_batches)
            if now != (lr, updates) and self.trainer.callbacks:  # a tuner's trials have none
                for group in optimizer.param_groups:
                    group["initial_lr"] *= self.hparams["lr"] / lr
                config.scheduler = self.make_schedule(optimizer)
            self.lr_scheduler_step(config.scheduler, None)
