"""What every task shares: a timm model, its weights, optimizer, schedule and average."""

import contextlib
import os
import warnings
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config
from timm.optim import list_optimizers
from torch import Tensor, nn

from hcvision.data import ImageData, check_name, check_number, has_compiler, refusals
from hcvision.models import checkpoint_filter_fn, create_model, recompute_streams, register_if_new, set_stream_dtype
from hcvision.training.checkpoints import finish_epoch
from hcvision.training.connections import choose_backend, connection_parameters, freeze_connections
from hcvision.training.finite import FiniteCheck
from hcvision.training.optimization import SCHEDULES, OptimizedModule
from hcvision.training.sharding import AverageInParts, hold_whole, number_by_module, shard
from hcvision.training.weights import (
    compare_classes,
    compare_states,
    find_weights,
    fit_channels,
    pick_weights,
    read_weights,
)


class TimmModule(OptimizedModule):
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
        stream_dtype: ``bfloat16`` stores the streams in half of the memory; they are mixed in float32 and rounded once,
            when they are written. None leaves them in the type in which they enter, in timm's ViTs float32 under
            autocast too. Checkpoints do not know of it.
        skip_nonfinite: how many updates may be left out because the loss or its gradient is NaN or infinite; one
            more stops the run. With any a step waits for the GPU.

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
        stream_dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        skip_nonfinite: int = 0,
    ):
        super().__init__()
        with contextlib.suppress(ValueError, RuntimeError):  # what is wrong with the name is said with the nearest ones
            register_if_new(model.partition(".")[0])
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
        own = ["connection_backend", "connection_recompute", "stream_dtype"]  # the run's
        self.save_hyperparameters(ignore=own)
        load_pretrained = pretrained and init_from is None
        with refusals(f"{model} does not take these model_args"):
            self.model = create_model(
                model, connection, pretrained=load_pretrained, num_classes=num_classes, **(model_args or {})
            )
        self.check_model(model)
        self.skipped, self.last_loss, self.finite = 0, torch.zeros(()), FiniteCheck()
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
        if stream_dtype is not None:
            set_stream_dtype(self.model, stream_dtype)
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

    def batch_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss of a batch as in training, a scalar."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[pl.Callback]:
        decay = self.hparams["ema_decay"]
        in_parts = isinstance(self.trainer.strategy, ModelParallelStrategy)
        return [] if decay is None else [(AverageInParts if in_parts else EMAWeightAveraging)(decay=decay)]

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
        self.check_finite()
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
        return getattr(self._trainer, "datamodule", None)

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

        To know it is to wait for the device. Where no update may be left out and that is a GPU, it is asked once per
        logging interval, and before the weights are evaluated or saved.

        Raises:
            ValueError: it is one more than ``skip_nonfinite``; says the step, the rate and the last checkpoint.
        """
        for parameter in self.frozen:
            parameter.grad = None
        values = {"loss": self.last_loss}
        if self.trainer.precision != "16-mixed":  # there the scaler leaves out what overflows
            values["gradient"] = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        rate = max(group["lr"] for group in optimizer.param_groups)
        place = f"step {self.global_step} (epoch {self.current_epoch}, lr {rate:.3g})"
        self.finite.note({name: value.to(self.device) for name, value in values.items()}, place)
        interval = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        if self.asks_every_step or (self.global_step + 1) % interval == 0:
            self.check_finite()

    @property
    def asks_every_step(self) -> bool:
        """Whether an update can be left out, or it costs nothing to ask."""
        return self.hparams["skip_nonfinite"] > 0 or self.device.type == "cpu"

    def check_finite(self) -> None:
        """Ask for the updates since this was last asked for; see ``on_before_optimizer_step``."""
        if not self.finite.noted:
            return
        place = self.finite.noted[-1][-1]
        found = self.finite.find()
        if self.trainer.strategy.reduce_boolean_decision(found is None):  # or some processes would wait forever
            return
        found = found or f"the gradient of another process is not finite at {place}"
        self.skipped += 1
        if self.skipped > self.hparams["skip_nonfinite"]:
            kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            paths = [c.last_model_path or c.best_model_path for c in kept] + [str(self.trainer.ckpt_path)]
            last = max(filter(os.path.isfile, paths), key=os.path.getmtime, default="none yet")
            raise ValueError(f"{found}; last good checkpoint: {last}. A smaller lr or gradient clipping may help")
        warnings.warn(f"{found}; this update is left out", stacklevel=2)
        for parameter in self.parameters():
            parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how the images were prepared, what the classes are called, and where in the epoch this is.

        Raises:
            ValueError: the loss or the gradient of an update was not finite.
        """
        self.check_finite()
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
