"""Lightning modules around timm models."""

import difflib
import pickle
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from timm.data import Mixup, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import get_model_input_config, load_state_dict
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from hcvision.connections import Connection
from hcvision.convert import checkpoint_filter_fn, create_model
from hcvision.dit import DiT

SCHEDULES = ("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant")


class ImageClassifier(pl.LightningModule):
    """A timm model, its optimizer and schedule, and the loss and accuracy of image classification.

    Args:
        model: timm name, ours included, with or without a pretrained tag.
        connection: ``dhc2``, ``sfc4``, ... instead of residual adds; None leaves the model as named.
        num_classes: size of the head.
        model_args: more arguments of ``timm.create_model``: img_size, drop_path_rate, ...
        pretrained: load timm's weights of ``model``.
        init_from: file with weights to start from: a checkpoint of ours, .safetensors or .pth. A head
            of another size is left out. (``ckpt_path`` resumes a run; this starts a new one.)
        opt: optimizer, by timm's name.
        lr: peak learning rate.
        weight_decay: of matrices; biases, norms and the static parameters of connections do not decay.
        opt_args: more arguments of the optimizer: betas, eps, ...
        layer_decay: factor of the learning rate from one layer to the one below.
        connection_lr_factor: factor of the learning rate of connections; a pretrained trunk wants a small
            rate, connections that start as residual adds a larger one.
        sched: schedule, by timm's name, stepped after every update.
        warmup_steps: updates of linear warm-up before the schedule.
        warmup_epochs: the same in epochs.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the schedule.
        sched_args: more arguments of timm's schedule, in epochs: decay_epochs, decay_rate, ...
        label_smoothing: of the training targets.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off.
        mixup_prob: probability of either, per batch.
        ema_decay: evaluate and save an exponential moving average of the weights.
        compile: run the model through torch.compile.

    Raises:
        ValueError: an unknown model, optimizer or schedule, with the nearest names.
    """

    def __init__(
        self,
        model: str,
        connection: str | None = None,
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        opt_args: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        connection_lr_factor: float = 1.0,
        sched: str = "cosine",
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        sched_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        ema_decay: float | None = None,
        compile: bool = False,
    ):
        super().__init__()
        check_name("model", model.partition(".")[0], timm.list_models(), remote=True)
        check_name("opt", opt, list_optimizers())
        check_name("sched", sched, SCHEDULES)
        if warmup_steps and warmup_epochs:
            raise ValueError(f"give warmup_steps or warmup_epochs, got both ({warmup_steps} and {warmup_epochs})")
        if connection_lr_factor <= 0:
            raise ValueError(f"connection_lr_factor must be positive, got {connection_lr_factor}")
        if init_from is not None and not Path(init_from).is_file():
            raise FileNotFoundError(f"there is no file {init_from} to take weights from")
        self.save_hyperparameters()
        self.model = create_model(
            model, connection, pretrained=pretrained, num_classes=num_classes, **(model_args or {})
        )
        if isinstance(self.model, DiT):
            raise ValueError(f"{model} is a diffusion model, which classifies nothing; vit_* and the like do")
        # the pretrained weights' view of images, at the size and channels this model was built for
        self.data_config = resolve_model_data_config(self.model)
        self.data_config["input_size"] = get_model_input_config(self.model)["input_size"]
        if init_from is not None:
            self.load_weights(init_from)
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        self.loss = SoftTargetCrossEntropy() if self.mixup else nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        accuracy = {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, 5) if k <= num_classes
        }
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = MetricCollection(dict(accuracy), prefix="val_")
        self.test_metrics = MetricCollection(dict(accuracy), prefix="test_").clone()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def configure_callbacks(self) -> list[pl.Callback]:
        decay = self.hparams["ema_decay"]
        return [] if decay is None else [EMAWeightAveraging(decay=decay)]

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        if classes is not None and classes != self.hparams["num_classes"]:
            raise ValueError(f"num_classes must be {classes}, as in the data, got {self.hparams['num_classes']}")
        batch_size = getattr(data, "batch_size", 0)
        if stage == "fit" and self.mixup is not None and batch_size % 2:
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {batch_size}")
        if self.hparams["compile"]:
            self.model.compile()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        images, targets = batch
        if len(images) == 0:
            return None
        if self.mixup is not None and len(images) % 2 == 0:
            images, mixed = self.mixup(images, targets)
            loss = self.loss(self(images), mixed)
        elif self.mixup is not None:  # a bad image was left out
            loss = nn.functional.cross_entropy(self(images), targets)
        else:
            logits = self(images)
            loss = self.loss(logits, targets)
            self.train_top1(logits, targets)
            self.log("train_top1", self.train_top1, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean_loss: MeanMetric, stage: str):
        images, targets = batch
        if len(images) == 0:
            return
        logits = self(images).float()
        metrics.update(logits, targets)
        mean_loss.update(nn.functional.cross_entropy(logits, targets), weight=len(targets))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, batch_size=len(targets))
        self.log(f"{stage}_loss", mean_loss, on_step=False, on_epoch=True, batch_size=len(targets))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, self.val_loss, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, self.test_loss, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities, (B, num_classes)."""
        return self(batch[0]).float().softmax(-1)

    def configure_optimizers(self) -> Any:
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.model,
            opt=hparams["opt"],
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            layer_decay=hparams["layer_decay"],
            fallback_list=("*connection?.*",),  # muon and its like choose by shape; all our matrices are Adam's
            **(hparams["opt_args"] or {}),
        )
        if hparams["connection_lr_factor"] != 1:
            scale_connections(optimizer, self.model, hparams["connection_lr_factor"])
        updates = int(self.trainer.estimated_stepping_batches)
        epochs = self.trainer.max_epochs or 1
        per_epoch = max(updates / max(epochs, 1), 1.0)
        warmup = hparams["warmup_steps"] or round(hparams["warmup_epochs"] * per_epoch)
        if warmup >= updates:
            raise ValueError(f"the warm-up must be shorter than the {updates} updates of the run, got {warmup}")
        sched_args = dict(hparams["sched_args"] or {})
        for name in ("decay_epochs", "cooldown_epochs", "stable_timescale"):
            if sched_args.get(name, 0) >= 1:
                sched_args[name] = round(sched_args[name] * per_epoch)
        if "decay_milestones" in sched_args:
            sched_args["decay_milestones"] = [round(epoch * per_epoch) for epoch in sched_args["decay_milestones"]]
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=hparams["sched"],
            num_epochs=updates - warmup,
            warmup_epochs=warmup,
            warmup_prefix=True,
            warmup_lr=hparams["warmup_lr"],
            min_lr=hparams["min_lr"],
            step_on_epochs=False,
            updates_per_epoch=1,
            **sched_args,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:  # type: ignore[override]
        scheduler.step_update(self.trainer.global_step)

    def load_weights(self, path: str) -> list[str]:
        """Load the weights of a file into the model; what is missing beside connections and head is an error.

        Returns:
            Names of parameters that keep their initial values: the connections of a residual
            checkpoint, the head of one with other classes.
        """
        state = load_state_dict(path, use_ema=True)
        if any(name.startswith("model.") for name in state):
            state = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        given = set(state)
        state = checkpoint_filter_fn(state, self.model)
        own = self.model.state_dict()
        head: Any = self.model.pretrained_cfg["classifier"]  # type: ignore[index]
        heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head or []))
        for name in [n for n in state if n.startswith(heads) and n in own and own[n].shape != state[n].shape]:
            del state[name]
        difference = compare_states(own, state, ignore=heads)
        if difference:
            raise ValueError(f"the weights in {path} are of another architecture: {difference}")
        self.model.load_state_dict(state, strict=False)
        return sorted(set(own) - given | (set(own) - set(state)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError when the checkpoint is of another architecture."""
        theirs = checkpoint.get("hyper_parameters", {})
        for name in ("model", "connection", "num_classes", "model_args"):
            if name in theirs and theirs[name] != self.hparams[name]:
                raise ValueError(
                    f"the checkpoint is of another architecture: {name} is {theirs[name]!r} there and "
                    f"{self.hparams[name]!r} here"
                )
        difference = compare_states(self.state_dict(), checkpoint["state_dict"])
        if difference:
            raise ValueError(f"the checkpoint is of another architecture: {difference}")


def scale_connections(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Give the parameters of connections groups of their own, whose ``lr_scale`` timm's schedules apply."""
    own = {id(p) for module in model.modules() if isinstance(module, Connection) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        parameters = group["params"]
        group["params"] = [p for p in parameters if id(p) not in own]
        apart = [p for p in parameters if id(p) in own]
        if apart:
            optimizer.add_param_group({**group, "params": apart, "lr_scale": group.get("lr_scale", 1.0) * factor})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def compare_states(own: dict[str, Tensor], state: dict[str, Tensor], ignore: tuple[str, ...] = ()) -> str | None:
    """The first difference in names or shapes in words, or None."""
    for name in own:
        if name.startswith(ignore) if ignore else False:
            continue
        if name not in state:
            return f"{name} is missing"
        if own[name].shape != state[name].shape:
            return f"{name} has shape {list(state[name].shape)}, not {list(own[name].shape)}"
    unknown = next((name for name in state if name not in own), None)
    return None if unknown is None else f"{unknown} is not in this model"


def check_name(what: str, name: str, known: Any, remote: bool = False) -> None:
    """Raise ValueError with the nearest names when name is not known."""
    if name in known or (remote and ":" in name):
        return
    near = difflib.get_close_matches(name, list(known), n=3)
    raise ValueError(f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


class Progress(TQDMProgressBar):
    """Lightning's bar with accuracy, images per second and the time that is left for the whole run."""

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
        if "val_top1" in trainer.callback_metrics:
            metrics["val_top1"] = f"{100 * trainer.callback_metrics['val_top1'].item():.2f}%"
        elapsed, done = time.monotonic() - self.began, trainer.global_step - self.first_step
        if self.began and done > 0:
            metrics["img/s"] = round(self.images / (elapsed - max(self.paused, 0.0)))
            total = trainer.estimated_stepping_batches
            if total != float("inf"):
                left = int(elapsed / done * (total - trainer.global_step))
                metrics["left"] = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        return metrics


def checkpoint_folder(run: Path) -> Path:
    return run / "checkpoints"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    path = checkpoint_folder(run) / "last.ckpt"
    return path if path.is_file() else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, tensors mapped and not copied. Executes nothing that the file says.

    Raises:
        ValueError: it is no checkpoint, or a damaged one.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {str(error).splitlines()[0]}") from error


def metrics_files(run: Path) -> list[Path]:
    """The run's metrics, oldest first: metrics.1.csv, metrics.2.csv, ... (before each resume), metrics.csv."""
    earlier = sorted(run.glob("metrics.*.csv"), key=lambda path: int(path.name.split(".")[1]))
    return earlier + [path for path in [run / "metrics.csv"] if path.is_file()]


def keep_metrics(run: Path) -> None:
    """Put metrics.csv beside: Lightning's CSVLogger starts over in it when a run goes on."""
    if (run / "metrics.csv").is_file():
        (run / "metrics.csv").rename(run / f"metrics.{len(metrics_files(run))}.csv")


def equip(run: Path, trainer: dict[str, Any], title: str = "") -> dict[str, Any]:
    """Arguments of a Trainer with what every run has: loggers and checkpoints in one folder, a progress bar.

    What ``trainer`` says stands: other loggers, more callbacks, ``enable_progress_bar=False``, ...
    """
    arguments = {"default_root_dir": str(run), **{k: v for k, v in trainer.items() if v is not None}}
    if trainer.get("logger") in (None, True):
        tensorboard = TensorBoardLogger(str(run), name="", version="tensorboard")
        arguments["logger"] = [CSVLogger(str(run), name="", version=""), tensorboard]
    callbacks = trainer.get("callbacks") or []
    callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
    if trainer.get("enable_checkpointing") is not False:
        best = ModelCheckpoint(checkpoint_folder(run), "best", monitor="val_top1", mode="max", save_last=True)
        callbacks.append(best)
    if arguments["logger"]:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    if trainer.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(Progress(title=title))
    return {**arguments, "callbacks": callbacks}
