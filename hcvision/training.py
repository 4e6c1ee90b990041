"""Lightning modules around timm models: classification and diffusion."""

import difflib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from timm.data import Mixup, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from hcvision.arguments import check_number, refusals
from hcvision.connections import BACKENDS, Connection, StreamConnection
from hcvision.convert import checkpoint_filter_fn, create_model, recompute_streams
from hcvision.data import ImageData
from hcvision.diffusion import OBJECTIVES, SeededNoise, check_sampler, guide
from hcvision.dit import DiT
from hcvision.latents import decode, load_vae
from hcvision.runs import has_compiler
from hcvision.sampling import Sampling, columns_of, enlarge, grid, to_uint8
from hcvision.sharding import hold_whole, number_by_module, shard
from hcvision.weights import compare_states, find_weights, fit_channels, pick_weights, read_weights

PARTS = tuple(StreamConnection.parts)  # of a connection
ENDING_SCHEDULES = ("cosine", "tanh", "poly", "wsd")
SCHEDULES = (*ENDING_SCHEDULES, "step", "multistep", "constant")


class TimmModule(pl.LightningModule):
    """What every task shares: a timm model, the weights it starts from, its optimizer, schedule and average.

    Args:
        model: timm name, ours included, with or without a pretrained tag.
        connection: ``dhc2``, ``sfc4``, ... instead of residual adds; None leaves the model as named.
        num_classes: classes of the data.
        model_args: more arguments of ``timm.create_model``: img_size, drop_path_rate, ...
        pretrained: load timm's weights of ``model``.
        init_from: weights to start from instead of timm's: a .safetensors, .pth or .ckpt file, the folder of an
            earlier run or of an exported model, or ``hf-hub:OWNER/NAME``. A head of another size is left out, and
            images are prepared as that run did. (``ckpt_path`` resumes a run; this starts a new one.)
        freeze_epochs: for so many epochs only the head and the connections are trained.
        linear_probe: train the head alone, all the time; the rest is as in evaluation.
        opt: optimizer, by timm's name.
        lr: peak learning rate.
        weight_decay: of matrices; biases, norms and the static parameters of connections do not decay.
        opt_args: more arguments of the optimizer: betas, eps, ...
        layer_decay: factor of the learning rate from one layer to the one below.
        connection_lr_factor: factor of the learning rate of connections; a pretrained trunk wants a small
            rate, connections that start as residual adds a larger one.
        connection_freeze: ``width`` keeps the width-connections (alpha) at their initial values, ``depth`` the
            depth-connections (beta): the papers' ablations.
        connection_decay: weight decay for all parameters of connections; the papers leave out the static ones and
            the scales.
        sched: schedule, by timm's name, stepped after every update.
        warmup_steps: updates of linear warm-up before the schedule.
        warmup_epochs: the same in epochs.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the schedule.
        sched_args: more arguments of timm's schedule, in epochs: decay_epochs, decay_rate, ...
        ema_decay: evaluate and save an exponential moving average of the weights.
        compile: run the model through torch.compile.
        grad_checkpointing: compute activations again in backward instead of keeping them: less memory, more time.
        connection_backend: ``torch``; ``triton`` or ``native``, fused kernels for a GPU or a CPU, an error where they
            cannot run; or ``auto``, which takes them where they can. Checkpoints do not know of it.
        connection_recompute: keep the streams of every so many blocks only, and compute those in between again in
            backward from the branch outputs, which are kept: less memory, hardly more time, with ``compile`` too.
            0 keeps them all.
        skip_nonfinite: how many updates may be left out because the loss or its gradient is NaN or infinite; one
            more stops the run.

    Raises:
        ValueError: an unknown model, optimizer or schedule, with the nearest names.
    """

    monitor = ("val_loss", "min")  # what the best checkpoint is chosen by
    identity: tuple[str, ...] = ("model", "connection", "num_classes", "model_args")  # of a checkpoint

    def __init__(
        self,
        model: str,
        connection: str | None = None,
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        freeze_epochs: int = 0,
        linear_probe: bool = False,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        opt_args: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        connection_lr_factor: float = 1.0,
        connection_freeze: Literal["width", "depth"] | None = None,
        connection_decay: bool = False,
        sched: str = "cosine",
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        sched_args: dict[str, Any] | None = None,
        ema_decay: float | None = None,
        compile: bool = False,
        grad_checkpointing: bool = False,
        connection_backend: Literal["auto", "torch", "triton", "native"] = "auto",
        connection_recompute: int = 0,
        skip_nonfinite: int = 0,
    ):
        super().__init__()
        check_name("model", model.partition(".")[0], timm.list_models(), remote=True)
        check_name("opt", opt, list_optimizers())
        check_name("sched", sched, SCHEDULES)
        if warmup_steps and warmup_epochs:
            raise ValueError(f"give warmup_steps or warmup_epochs, got both ({warmup_steps} and {warmup_epochs})")
        for name, value in {"lr": lr, "weight_decay": weight_decay, "warmup_lr": warmup_lr, "min_lr": min_lr}.items():
            check_number(name, value, least=0)
        check_number("connection_lr_factor", connection_lr_factor, above=0)
        check_number("layer_decay", 1 if layer_decay is None else layer_decay, above=0)
        for name, value in (model_args or {}).items():
            if name.endswith("drop_rate") or name == "drop_path_rate":
                check_number(name, value, 0, 1)
        check_number("ema_decay", 0 if ema_decay is None else ema_decay, least=0, below=1)
        check_number("num_classes", num_classes, least=1, whole=True)
        check_number("warmup_epochs", warmup_epochs, least=0)
        counts = {"warmup_steps": warmup_steps, "freeze_epochs": freeze_epochs, "skip_nonfinite": skip_nonfinite}
        for name, value in counts.items():
            check_number(name, value, least=0, whole=True)
        if freeze_epochs and linear_probe:
            raise ValueError(f"freeze_epochs must be 0 with linear_probe, got {freeze_epochs}")
        if init_from is not None:
            find_weights(init_from)
        if connection_recompute and grad_checkpointing:
            raise ValueError(
                f"connection_recompute={connection_recompute} has no use with grad_checkpointing, which keeps less"
            )
        self.save_hyperparameters(ignore=["connection_backend", "connection_recompute"])  # the run's own
        load_pretrained = pretrained and init_from is None
        with refusals(f"{model} does not take these model_args"):
            self.model = create_model(
                model, connection, pretrained=load_pretrained, num_classes=num_classes, **(model_args or {})
            )
        self.check_model(model)
        self.skipped, self.last_loss = 0, torch.zeros(())
        self.batches_done = 0  # of the epoch in which a run goes on
        self.images_per_step: list[int] | None = None  # processes and images of each, in these batches
        # the pretrained weights' view of images, at the size and channels this model was built for
        self.data_config = resolve_model_data_config(self.model)
        self.data_config["input_size"] = get_model_input_config(self.model)["input_size"]
        self.untouched: list[str] | None = None  # what init_from has no weights for
        self.adapted = ""  # what was done to its weights, in words
        self.initial_classes: list[str] | None = None  # of these weights' head
        self.class_names: list[str] | None = None  # of the data
        if init_from is not None:
            self.untouched = self.load_weights(init_from)
        if grad_checkpointing:
            self.checkpoint_gradients(model)
        if connection_backend != "auto":
            choose_backend(self.model, connection_backend)
        if connection_recompute:
            recompute_streams(self.model, connection_recompute)
        if connection_freeze is not None:
            freeze_connections(self.model, connection_freeze)
        self.frozen: list[nn.Parameter] = []
        self.fixed = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        if linear_probe:
            for parameter in self.trunk(connections=True):
                parameter.requires_grad_(False)

    def checkpoint_gradients(self, name: str) -> None:
        try:
            self.model.set_grad_checkpointing()  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"grad_checkpointing does not work with {name}: timm has none for it") from error

    def trunk(self, connections: bool = False) -> list[nn.Parameter]:
        """What is trained and not the head, with or without the connections.

        Raises:
            ValueError: timm does not say what the head is.
        """
        if not self.head_names:
            raise ValueError(f"timm does not say which part of {self.hparams['model']} is the head")
        own = set() if connections else {id(parameter) for parameter in connection_parameters(self.model)}
        parameters = [(name, p) for name, p in self.model.named_parameters() if name not in self.fixed]
        return [p for name, p in parameters if not name.startswith(self.head_names) and id(p) not in own]

    def on_train_start(self) -> None:
        """Begin where the run was stopped."""
        if isinstance(self.data, ImageData):
            self.check_place(self.data, self.trainer.world_size)
            self.data.skip_batches(self.batches_done)
        if not self.batches_done:  # with max_steps Lightning would end the finished epoch once more
            self.trainer.fit_loop.epoch_loop.restarting = False
        self.batches_done = 0
        self.renew_schedule()
        self.hold_still()

    def check_place(self, data: ImageData, processes: int) -> None:
        """Raise ValueError when a run would go on in the middle of an epoch with other batches than before."""
        if self.batches_done and self.images_per_step not in (None, [processes, data.batch_size]):
            before, now = (f"{n} x {size} images" for n, size in (self.images_per_step, (processes, data.batch_size)))
            raise ValueError(
                f"the checkpoint is from the middle of an epoch with {before} a batch (processes x batch_size), "
                f"got {now}; give the same until the epoch ends, or --ckpt_path of the end of one"
            )

    def on_train_epoch_start(self) -> None:
        self.hold_still()

    def hold_still(self) -> None:
        """Hold still what this epoch does not train."""
        if self.hparams["linear_probe"]:
            self.model.eval()
        if self.hparams["freeze_epochs"]:
            freezing = self.current_epoch < self.hparams["freeze_epochs"]
            self.frozen = self.trunk() if freezing else []
            if self.trainer.world_size == 1:  # DDP would not share gradients of what was frozen when it began
                for parameter in self.trunk():
                    parameter.requires_grad_(not freezing)

    def check_model(self, name: str) -> None:
        """Raise ValueError when the model is of another task."""

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch as in training, a scalar."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[pl.Callback]:
        decay = self.hparams["ema_decay"]
        return [] if decay is None else [EMAWeightAveraging(decay=decay)]

    def setup(self, stage: str) -> None:
        if isinstance(self.data, ImageData):
            self.check_data(self.data)
            self.class_names = self.data.class_names
        if self.device_mesh is not None:  # here, as EMAWeightAveraging warns of classes that define it
            self.configure_model = self.shard_weights  # type: ignore[method-assign]
        if self.hparams["compile"] and has_compiler(self.trainer.strategy.root_device.type):
            self.model.compile()
        elif self.hparams["compile"]:
            warnings.warn("there is no compiler, which torch.compile needs: the model runs uncompiled")  # noqa: B028

    def shard_weights(self) -> None:
        shard(self, self.model)

    def on_validation_start(self) -> None:
        hold_whole(self.model)

    def on_validation_end(self) -> None:
        hold_whole(self.model, False)

    def on_test_start(self) -> None:
        hold_whole(self.model)

    def on_predict_start(self) -> None:
        hold_whole(self.model)

    def check_data(self, data: ImageData) -> None:
        """Raise ValueError when the model cannot be trained on these data."""
        if data.num_classes != self.hparams["num_classes"]:
            raise ValueError(
                f"num_classes must be {data.num_classes}, as in the data, got {self.hparams['num_classes']}"
            )
        multi_label = self.hparams.get("multi_label", False)
        if data.multi_label != multi_label:
            raise ValueError(f"multi_label must be {data.multi_label}, as in the data, got {multi_label}")
        data.check_images(self.data_config)
        difference = compare_classes(self.initial_classes, data.class_names)
        if difference and not any(name.startswith(self.head_names) for name in self.untouched or ()):
            source = self.hparams["init_from"]
            warnings.warn(f"the weights of {source} are of other classes: {difference}; their head is kept")  # noqa: B028

    @property
    def data(self) -> Any:
        """The data module of the trainer, or None."""
        return getattr(self.trainer, "datamodule", None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in a step (dropout, mixup, ...) by the run's seed, the epoch, the batch and the process.

        So a run that goes on after a kill is the run that was not killed.
        """
        place = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx, self.global_rank)
        first, second = np.random.SeedSequence(place).generate_state(2)
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(int(first))
        np.random.seed(second)  # noqa: NPY002 - the generator that timm's mixup draws from

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out an update whose loss or gradient is not finite, or stop.

        Raises:
            ValueError: it is one more than ``skip_nonfinite``; says the step, the rate and the last checkpoint.
        """
        for parameter in self.frozen:
            parameter.grad = None
        values = [self.last_loss]
        if self.trainer.precision != "16-mixed":  # there the scaler leaves out what overflows
            values.append(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        finite = all(bool(value.isfinite()) for value in values)
        if self.trainer.strategy.reduce_boolean_decision(finite):  # or some processes would wait for others forever
            return
        self.skipped += 1
        what = "loss" if not self.last_loss.isfinite() else "gradient"
        rate = max(group["lr"] for group in optimizer.param_groups)
        where = f"the {what} is not finite at step {self.global_step} (epoch {self.current_epoch}, lr {rate:.3g})"
        if self.skipped > self.hparams["skip_nonfinite"]:
            kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            paths = [c.last_model_path or c.best_model_path for c in kept] + [str(self.trainer.ckpt_path)]
            last = max(filter(os.path.isfile, paths), key=os.path.getmtime, default="none yet")
            raise ValueError(f"{where}; last good checkpoint: {last}. A smaller lr or gradient clipping may help")
        warnings.warn(f"{where}; this update is left out", stacklevel=2)
        for parameter in self.parameters():
            parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how the images were prepared, what the classes are called, and where in the epoch this is."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["batches_done"] = 0 if progress.is_last_batch else progress.current.processed
        if checkpoint["batches_done"]:  # max_steps has Lightning count an epoch as done that is not
            for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                counts["processed"] = counts["completed"] = counts["ready"] - 1
            checkpoint["epoch"] = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
        for optimizer, state in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            number_by_module(state, optimizer, self)
        if isinstance(self.data, ImageData):
            config = {key: list(v) if isinstance(v, tuple) else v for key, v in self.data.data_config().items()}
            checkpoint["data_config"], checkpoint["class_names"] = config, self.data.class_names
            checkpoint["images_per_step"] = [self.trainer.world_size, self.data.batch_size]

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

    @property
    def head_names(self) -> tuple[str, ...]:
        """Prefixes of what belongs to the classes, and may have another size in a file of weights."""
        head: Any = self.model.pretrained_cfg["classifier"]  # type: ignore[index]
        return tuple(f"{name}." for name in ([head] if isinstance(head, str) else head or []))

    def load_weights(self, source: str) -> list[str]:
        """Load weights into the model; what is missing beside connections and head is an error.

        Args:
            source: as ``init_from``.

        Returns:
            Names of parameters that keep their initial values: the connections of a residual
            checkpoint, the head of one with other classes.
        """
        content, about = read_weights(source)
        self.initial_classes = about["class_names"]
        self.prepare_as(about)
        own, heads = self.model.state_dict(), self.head_names
        trunk = {name for name in own if not name.startswith(heads) and ".connection" not in name}
        state = pick_weights(content, trunk)
        given = set(state)
        where = f"the weights in {source} are of another architecture"
        ours, theirs = ({name: part[name] for name in own if name in trunk and name in part} for part in (own, state))
        with refusals(": ".join(filter(None, (where, compare_states(ours, theirs))))):
            state = checkpoint_filter_fn(state, self.model)
        for name in [n for n in state if n.startswith(heads) and n in own and own[n].shape != state[n].shape]:
            del state[name]
        self.adapted = fit_channels(state, own, self.model.pretrained_cfg.get("first_conv"))  # type: ignore[union-attr,operator]
        difference = compare_states(own, state, ignore=heads)
        if difference:
            raise ValueError(f"{where}: {difference}")
        self.model.load_state_dict(state, strict=False)
        return sorted(set(own) - given | (set(own) - set(state)))

    def prepare_as(self, config: dict[str, Any]) -> None:
        """Prepare images as ``config`` says, where it is for as many channels; data may say otherwise."""
        keys = ("mean", "std", "interpolation", "crop_pct")
        if all(key in config for key in keys) and len(config["mean"]) == self.data_config["input_size"][0]:
            self.data_config |= {key: config[key] for key in keys}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint is of another architecture."""
        self.batches_done = checkpoint.get("batches_done", 0)
        finish_epoch(checkpoint)
        self.images_per_step = checkpoint.get("images_per_step")
        self.prepare_as(checkpoint.get("data_config", {}))
        # the schedule is that of this run, which may have more epochs; the step says where in it we are
        checkpoint["lr_schedulers"] = [{} for _ in checkpoint.get("lr_schedulers", ())]
        theirs = checkpoint.get("hyper_parameters", {})
        for name in self.identity:
            if name in theirs and theirs[name] != self.hparams[name]:
                raise ValueError(
                    f"the checkpoint is of another architecture: {name} is {theirs[name]!r} there and "
                    f"{self.hparams[name]!r} here"
                )
        difference = compare_classes(checkpoint.get("class_names"), self.class_names)
        if difference:
            raise ValueError(
                f"the checkpoint is of other classes than the data: {difference}; data of its classes would work, or a "
                "new run from its weights (--model.init_from)"
            )
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has loaded it
            return
        difference = compare_states(self.state_dict(), checkpoint["state_dict"])
        if difference:
            raise ValueError(f"the checkpoint is of another architecture: {difference}")


class ClassCounts(Metric):
    """Of each of K classes, summed over processes: images rightly taken for it, images of it, images taken for it.

    ``compute`` gives them as (K, 3). A table of all pairs of classes, as torchmetrics counts by, would be K x K.
    """

    right: Tensor
    images: Tensor
    taken: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        for name in ("right", "images", "taken"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (B, K) and classes (B,)."""
        taken = logits.argmax(1)
        self.right += self.count(targets[taken == targets])
        self.images += self.count(targets)
        self.taken += self.count(taken)

    def count(self, classes: Tensor) -> Tensor:
        return self.right.new_zeros(self.num_classes).index_add_(0, classes, torch.ones_like(classes))

    def compute(self) -> Tensor:
        return torch.stack([self.right, self.images, self.taken], dim=1)


class MacroAccuracy(ClassCounts):
    """The mean over classes of the share of their images that are found; over those that have images."""

    def compute(self) -> Tensor:
        right, images, _ = super().compute().double().unbind(-1)
        return (right / images)[images > 0].mean().float()


class ImageClassifier(TimmModule):
    """Image classification: loss, accuracy, mixup and cutmix, and all of ``TimmModule``.

    Args:
        model: timm name, ours included, with or without a pretrained tag.
        label_smoothing: of the training targets.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off.
        mixup_prob: probability of either, per batch.
        multi_label: any number of labels per image: a sigmoid each, mean average precision instead of accuracy.
        **kwargs: the arguments of ``TimmModule``: connection, num_classes, lr, ...

    Raises:
        ValueError: an unknown model, optimizer or schedule, with the nearest names.
    """

    identity = (*TimmModule.identity, "multi_label")

    def __init__(
        self,
        model: str,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        multi_label: bool = False,
        **kwargs: Any,
    ):
        check_number("label_smoothing", label_smoothing, 0, 1)
        check_number("mixup_prob", mixup_prob, 0, 1)
        check_number("mixup", mixup, least=0)
        check_number("cutmix", cutmix, least=0)
        if kwargs.get("num_classes", 2) == 1 and not multi_label:
            raise ValueError(
                f"num_classes must be at least 2, got {kwargs['num_classes']}: there is nothing to tell apart"
            )
        if multi_label and (label_smoothing or mixup or cutmix):
            raise ValueError("label_smoothing, mixup and cutmix are for one label per image, not for multi_label")
        super().__init__(model, **kwargs)
        self.monitor = ("val_map", "max") if multi_label else ("val_top1", "max")
        classes = self.hparams["num_classes"]
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                label_smoothing=label_smoothing,
                num_classes=classes,
            )
        self.plain_loss: nn.Module = nn.BCEWithLogitsLoss() if multi_label else nn.CrossEntropyLoss()
        smooth = nn.CrossEntropyLoss(label_smoothing=label_smoothing) if label_smoothing else self.plain_loss
        self.loss = SoftTargetCrossEntropy() if self.mixup else smooth
        scores: dict[str, Any] = {"map": MultilabelAveragePrecision(classes), "f1": MultilabelF1Score(classes)}
        if not multi_label:
            scores = {f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in (1, 5) if k <= classes}
            scores["macro"] = MacroAccuracy(classes)
            self.train_top1 = MulticlassAccuracy(classes, average="micro")
        self.val_metrics = MetricCollection(scores, prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def check_model(self, name: str) -> None:
        if isinstance(self.model, DiT):
            raise ValueError(
                f"{name} is a diffusion model, which classifies nothing; vit_* and the like do "
                "(`--task generate` trains it)"
            )

    def check_data(self, data: ImageData) -> None:
        super().check_data(data)
        config = data.data_config(self.data_config)
        size = tuple(config["input_size"])
        if size != tuple(self.data_config["input_size"]):
            self.check_size(size)
        if self.mixup is not None and data.batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {data.batch_size}")

    @torch.no_grad()
    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise ValueError when the model does not take images of this size (C, H, W), by trying one."""
        training, like = self.model.training, next(self.model.parameters())
        self.model.eval()
        with refusals(
            f"{self.hparams['model']} does not take the images of the data, {size}; model_args has img_size, in_chans "
            "and, for some, dynamic_img_size"
        ):
            self.model(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
        self.model.train(training)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.plain_loss(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        images, targets = batch
        if len(images) == 0:
            return None
        if self.mixup is not None and len(images) % 2 == 0:
            images, mixed = self.mixup(images, targets)
            loss = self.loss(self(images), mixed)
        elif self.mixup is not None:  # a bad image was left out
            loss = self.plain_loss(self(images), targets)
        else:
            logits = self(images)
            loss = self.loss(logits, targets)
            if not self.hparams["multi_label"]:
                self.train_top1(logits, targets)
                self.log("train_top1", self.train_top1, on_step=False, on_epoch=True)
        self.last_loss = loss.detach()
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if self.hparams["multi_label"] else logits.float().softmax(-1)

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean_loss: MeanMetric, stage: str
    ) -> tuple[Tensor, Tensor] | None:
        images, targets = batch
        if len(images) == 0:
            return None
        logits = self(images).float()
        metrics.update(logits.sigmoid() if self.hparams["multi_label"] else logits, targets.long())
        mean_loss.update(self.plain_loss(logits, targets), weight=len(targets))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, batch_size=len(targets))
        self.log(f"{stage}_loss", mean_loss, on_step=False, on_epoch=True, batch_size=len(targets))
        return logits, targets

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, self.val_loss, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Logits and targets, for who reports more about the classes."""
        return self._evaluate(batch, self.test_metrics, self.test_loss, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities of the classes, (B, num_classes)."""
        return self.probabilities(self(batch[0]))


class ImageGenerator(TimmModule):
    """Diffusion: a DiT trained to predict noise or velocity, its pictures, and all of ``TimmModule``.

    Times and noise of an evaluation image depend on the seed and on its number alone.

    Args:
        model: timm name of a DiT, for example ``dit_b_patch2_256``.
        objective: ``ddpm`` or ``velocity``; see ``hcvision.diffusion``.
        label_dropout: probability that a class is replaced by none, which guidance needs.
        vae: name or folder of the VAE that made the latents; None for a model of pixels.
        sample_every: epochs from one sample grid to the next; 0 draws none.
        sample_count: images in a grid.
        sample_steps: of the sampler, for grids.
        sample_guidance: scale of classifier-free guidance, for grids.
        seed: of the times and the noise of evaluation, and of the noise of grids.
        lr: peak learning rate.
        weight_decay: of matrices.
        sched: schedule, by timm's name.
        ema_decay: evaluate, draw with and save an exponential moving average of the weights.
        **kwargs: the other arguments of ``TimmModule``: connection, num_classes, ...

    Raises:
        ValueError: an unknown model, objective, optimizer or schedule, with the nearest names.
    """

    identity = (*TimmModule.identity, "objective")

    def __init__(
        self,
        model: str,
        *,
        objective: str = "ddpm",
        label_dropout: float = 0.1,
        vae: str | None = None,
        sample_every: int = 10,
        sample_count: int = 32,
        sample_steps: int = 50,
        sample_guidance: float = 4.0,
        seed: int = 0,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        sched: str = "constant",
        ema_decay: float | None = 0.9999,
        **kwargs: Any,
    ):
        check_name("objective", objective, OBJECTIVES)
        check_number("sample_every", sample_every, least=0, whole=True)
        check_number("sample_count", sample_count, least=1, whole=True)
        check_number("sample_steps", sample_steps, least=1, whole=True)
        check_number("label_dropout", label_dropout, least=0, below=1)
        super().__init__(model, lr=lr, weight_decay=weight_decay, sched=sched, ema_decay=ema_decay, **kwargs)
        self.diffusion = OBJECTIVES[objective](clip=vae is None)
        self.sampling = Sampling(steps=sample_steps, guidance=sample_guidance, seed=seed)
        self.check_sampling(self.sampling)
        self.on_sampling_step: Callable[[float], None] = lambda part: None
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.evaluated = 0

    @property
    def head_names(self) -> tuple[str, ...]:
        return ("y_embedder.",)

    def check_model(self, name: str) -> None:
        if not isinstance(self.model, DiT):
            raise ValueError(f"{name} is no diffusion model; dit_* are (`--task classify` trains it)")

    def check_sampling(self, plan: Sampling) -> None:
        """Raise ValueError when these settings do not work with this objective."""
        check_sampler(plan.sampler or self.diffusion.samplers[0], self.diffusion.samplers)
        self.diffusion.check_steps(plan.steps or self.diffusion.default_steps)
        guide(self.model, torch.zeros(1), 0, plan.guidance, plan.guided_channels)

    def settle(self, plan: Sampling) -> Sampling:
        """The same with the objective's defaults where it says nothing."""
        return replace(
            plan,
            steps=plan.steps or self.diffusion.default_steps,
            sampler=plan.sampler or self.diffusion.samplers[0],
        )

    def check_data(self, data: ImageData) -> None:
        super().check_data(data)
        config = data.data_config(self.data_config)
        vae = self.hparams["vae"]
        if "vae" in config and vae is None:
            raise ValueError(f"latents need the VAE that made them: --model.vae, {config['vae']!r} as the shards say")
        if "vae" in config and vae != config["vae"]:
            warnings.warn(f"model.vae is {vae!r}, but {config['vae']!r} made the latents", stacklevel=2)
        if "vae" not in config and vae is not None:
            raise ValueError(f"model.vae is for latents (--data.dataset latents), got {vae!r} and images")
        channels = config["input_size"][0]
        if "vae" not in config and channels not in (1, 3):
            raise ValueError(f"images that are drawn are gray or RGB, the model takes {channels} channels (in_chans)")
        if "mean" in config and {*config["mean"], *config["std"]} != {0.5}:
            raise ValueError(
                f"mean and std must be 0.5 to draw images, got {list(config['mean'])} and {list(config['std'])}"
            )
        if vae is not None and self.hparams["sample_every"]:
            load_vae(vae)  # now rather than when the first grid is due
        if tuple(config["input_size"]) != tuple(self.data_config["input_size"]):
            ours, theirs = tuple(self.data_config["input_size"]), tuple(config["input_size"])
            raise ValueError(
                f"the data are of size {theirs} and the model of {ours}; model_args has in_chans and img_size"
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.data, ImageData):
            self.data_config = self.data.data_config()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's prediction, (B, C or 2 C, H, W), in its own precision."""
        return self.model(x.to(next(self.model.parameters()).dtype), t, y)

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, classes = batch
        images = images.float()
        t = self.diffusion.draw_time(len(images), images.device)
        noise = torch.randn(images.shape, device=images.device, dtype=torch.float32)
        dropped = torch.rand(len(images), device=images.device) < self.hparams["label_dropout"]
        classes = torch.where(dropped, self.hparams["num_classes"], classes)
        return self.diffusion.loss(self, images, classes, t, noise).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        images = batch[0]
        if len(images) == 0:
            return None
        loss = self.batch_loss(batch)
        self.last_loss = loss.detach()
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], mean_loss: MeanMetric, stage: str) -> None:
        images, classes = batch[0].float(), batch[1]
        if len(images) == 0:
            return
        numbers = (self.evaluated + torch.arange(len(images))) * self.trainer.world_size + self.global_rank
        self.evaluated += len(images)
        noise = SeededNoise(self.hparams["seed"], numbers.tolist())
        t = torch.cat([self.diffusion.draw_time(1, "cpu", generator) for generator in noise.generators])
        loss = self.diffusion.loss(self, images, classes, t.to(images.device), noise(images)).mean()
        mean_loss.update(loss, weight=len(images))
        self.log(f"{stage}_loss", mean_loss, on_step=False, on_epoch=True, batch_size=len(images))

    def on_validation_epoch_start(self) -> None:  # here the averaged weights are in place
        self.evaluated = 0
        every, trainer = self.hparams["sample_every"], self.trainer
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking and not getattr(trainer, "fast_dev_run", 0)
        if every and fitting:
            epochs = trainer.current_epoch + 1
            before = epochs - (trainer.check_val_every_n_epoch or 1)  # when the last validation was
            if epochs // every > before // every:
                self.draw_grid()

    def on_test_epoch_start(self) -> None:
        self.evaluated = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_loss, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_loss, "test")

    @torch.no_grad()
    def generate(self, classes: Tensor, numbers: Sequence[int], plan: Sampling) -> Tensor:
        """Images of classes (B,), uint8 (B, H, W, C); ``numbers`` say which noise each of them starts from."""
        noise = SeededNoise(plan.seed, numbers)
        plan = self.settle(plan)
        assert plan.steps is not None
        assert plan.sampler is not None
        shape = (len(classes), *self.data_config["input_size"])
        predict = guide(self, classes, self.hparams["num_classes"], plan.guidance, plan.guided_channels)
        x = noise(torch.empty(shape, device=classes.device, dtype=torch.float32))
        for image in self.diffusion.sample(predict, x, steps=plan.steps, sampler=plan.sampler, draw=noise):
            x = image
            self.on_sampling_step(len(classes) / plan.steps)
        if self.hparams["vae"] is not None:
            vae = load_vae(self.hparams["vae"]).to(classes.device)
            return to_uint8(torch.cat([decode(vae, part) for part in x.split(8)]), (0.5,) * 3, (0.5,) * 3)
        return to_uint8(x, self.data_config["mean"], self.data_config["std"])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images (B, H, W, C), uint8, of numbers and classes (B,), as ``self.sampling`` says."""
        numbers, classes = batch
        return self.generate(classes, numbers.tolist(), self.sampling)

    def draw_grid(self) -> None:
        """A grid of samples, with the same noise every time, into the run's folder and to the loggers."""
        count, classes = self.hparams["sample_count"], self.hparams["num_classes"]
        shown = range(0, classes, max(1, classes // 8)) if classes > 16 else range(classes)
        labels = [shown[i % len(shown)] for i in range(count)]
        training = self.model.training
        self.model.eval()
        with self.trainer.precision_plugin.forward_context():
            images = self.generate(torch.tensor(labels, device=self.device), range(count), self.sampling)
        self.model.train(training)
        picture = grid(images, columns_of(shown))
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir) / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        enlarge(picture, 640).save(folder / f"step{self.global_step:07}.png")
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", picture, self.global_step)
            elif hasattr(logger, "log_image"):
                logger.log_image("samples", [picture], step=self.global_step)


def count_updates(trainer: pl.Trainer, batches: float) -> float:
    """Updates of a run whose epochs have so many batches; infinite where nothing says when it ends."""
    endless = trainer.max_epochs in (None, -1) or batches == float("inf")
    each = math.ceil(batches / trainer.accumulate_grad_batches) if not endless else 0
    updates = float("inf") if endless else each * max(trainer.max_epochs or 0, 1)
    return updates if trainer.max_steps == -1 else min(updates, trainer.max_steps)


def compare_classes(there: list[str] | None, here: list[str] | None) -> str | None:
    """The first difference between as many classes by name, in words, or None."""
    pairs = enumerate(zip(there, here, strict=False)) if isinstance(there, list) and here is not None else ()
    return next(
        (f"class {k} is {theirs!r} there and {ours!r} here" for k, (theirs, ours) in pairs if theirs != ours), None
    )


def finish_epoch(checkpoint: dict[str, Any]) -> None:
    """Have a checkpoint of the end of an epoch go on with the next one, wherever in the end it was saved."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if loops and loops["epoch_loop.batch_progress"]["is_last_batch"]:
        for counts in loops["epoch_progress"].values():
            if counts["started"] == counts["ready"]:
                counts["processed"] = counts["completed"] = counts["ready"]


def choose_backend(model: nn.Module, backend: str) -> None:
    """Let all connections of a model, if it has any, run by ``backend``.

    Raises:
        ValueError: there is no such backend, or no kernel for the connections.
    """
    check_name("connection_backend", backend, BACKENDS)
    for module in model.modules():
        if isinstance(module, StreamConnection):
            module.choose_backend(backend)


def connection_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for module in model.modules() if isinstance(module, Connection) for p in module.parameters()]


def freeze_connections(model: nn.Module, part: str) -> None:
    """Hold the width-connections (alpha) or the depth-connections (beta) of a model still.

    Raises:
        ValueError: another part, or a model without connections.
    """
    if part not in PARTS:
        raise ValueError(f"connection_freeze must be one of {', '.join(PARTS)}, got {part!r}")
    connections = [module for module in model.modules() if isinstance(module, StreamConnection)]
    if not connections:
        raise ValueError(f"connection_freeze={part!r} needs a model with connections, this one has residual adds")
    for connection in connections:
        for name, parameter in connection.named_parameters():
            if any(word in name for word in connection.parts[part]):
                parameter.requires_grad_(False)


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


def check_name(what: str, name: str, known: Any, remote: bool = False) -> None:
    """Raise ValueError with the nearest names when name is not known."""
    if name in known or (remote and ":" in name):
        return
    near = difflib.get_close_matches(name, list(known), n=3)
    raise ValueError(f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
