"""The Lightning module of diffusion."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics import MeanMetric

from hcvision.data import ImageData, check_name, check_number, refusals
from hcvision.diffusion import (
    OBJECTIVES,
    Sampling,
    SeededNoise,
    columns_of,
    decode,
    enlarge,
    grid,
    guide,
    load_vae,
    to_uint8,
)
from hcvision.models import DiT
from hcvision.training.alignment import Alignment
from hcvision.training.module import TimmModule


class ImageGenerator(TimmModule):
    """Diffusion: a DiT trained to predict noise, velocity or the image, its pictures, and all of ``TimmModule``.

    Times and noise of an evaluation image depend on the seed and on its number alone.

    Args:
        model: timm name of a DiT, for example ``dit_b_patch2_256``.
        objective: what is predicted: ``ddpm`` (the noise), ``velocity`` or ``image``; see ``hcvision.diffusion``.
        label_dropout: probability that a class is replaced by none, which guidance needs.
        vae: name or folder of the VAE that made the latents; None for a model of pixels.
        sample_every: epochs from one sample grid to the next; 0 draws none.
        sample_count: images in a grid.
        sample_steps: of the sampler, for grids.
        sample_guidance: scale of classifier-free guidance, for grids.
        repa: REPA's arguments: encoder, block, and weight (0.5); see ``Alignment``. None aligns nothing.
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
        repa: dict[str, Any] | None = None,
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
        self.alignment: Alignment | None = None
        if repa is not None:
            with refusals("repa takes encoder, block, weight and hidden"):
                self.alignment = Alignment(self.model, **repa)  # type: ignore[arg-type]
            self.hparams["repa"] = {**repa, "features": self.alignment.features}  # whoever draws needs no encoder
        self.cosine = torch.zeros(())
        self.diffusion = OBJECTIVES[objective](clip=vae is None)
        self.sampling = Sampling(steps=sample_steps, guidance=sample_guidance, seed=seed)
        self.sampling.check(self.diffusion)
        self.on_sampling_step: Callable[[float], None] = lambda part: None
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.evaluated = 0

    @property
    def head_names(self) -> tuple[str, ...]:
        return ("y_embedder.",)

    def check_model(self, name: str) -> None:
        if not isinstance(self.model, DiT):
            raise ValueError(f"{name} is no diffusion model; dit_* are (`--task classify` trains it)")

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
        if self.alignment is not None and data.dataset == "latents":
            stored = data.stages["train"][0].encoder
            data.with_features = stored == self.alignment.encoder
            if not data.with_features:
                about = f"those stored beside the latents are of {stored}" if stored else "there are none beside them"
                warnings.warn(  # noqa: B028
                    f"features of {self.alignment.encoder}: {about}, so that every batch is decoded for it; "
                    "`hcvision encode --encoder` stores them"
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

    def batch_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        images, classes = batch[0].float(), batch[1]
        t = self.diffusion.draw_time(len(images), images.device)
        noise = torch.randn(images.shape, device=images.device, dtype=torch.float32)
        dropped = torch.rand(len(images), device=images.device) < self.hparams["label_dropout"]
        classes = torch.where(dropped, self.hparams["num_classes"], classes)
        alignment = self.alignment if self.training else None
        if alignment is None:
            return self.diffusion.loss(self, images, classes, t, noise).mean()
        tokens: list[Tensor] = []

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            prediction, tapped = self.model(x.to(next(self.model.parameters()).dtype), t, y, tap=alignment.block)
            tokens.append(tapped)
            return prediction

        loss = self.diffusion.loss(predict, images, classes, t, noise).mean()
        cosine = alignment(tokens[0], batch[2] if len(batch) > 2 else alignment.see(self.show(images)))
        self.cosine = cosine.detach()
        return loss - alignment.weight * cosine

    def show(self, images: Tensor) -> Tensor:
        """What the data hold, as pixels from 0 to 1: images without their normalisation, latents decoded."""
        if self.hparams["vae"] is not None:
            vae = load_vae(self.hparams["vae"]).to(images.device)
            return (torch.cat([decode(vae, part) for part in images.split(8)]) / 2 + 0.5).clamp(0, 1)
        mean, std = (images.new_tensor(self.data_config[what]).view(-1, 1, 1) for what in ("mean", "std"))
        return (images * std + mean).clamp(0, 1)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor | None:
        images = batch[0]
        if len(images) == 0:
            return None
        loss = self.batch_loss(batch)
        self.last_loss = loss.detach()
        self.log("loss", loss, on_step=True, prog_bar=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        if self.alignment is not None:
            self.log("repa_cosine", self.cosine, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
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
        plan = plan.settle(self.diffusion)
        assert plan.steps is not None
        own: dict[str, Any] = (
            {"coefficient": plan.coefficient, "last_step": plan.last_step} if plan.sampler == "sde" else {}
        )
        shape = (len(classes), *self.data_config["input_size"])
        predict = guide(
            self, classes, self.hparams["num_classes"], plan.guidance, plan.guided_channels, plan.guidance_interval,
            self.diffusion.place,
        )  # fmt: skip
        x = noise(torch.empty(shape, device=classes.device, dtype=torch.float32))
        for image in self.diffusion.sample(predict, x, plan.steps, str(plan.sampler), noise, **own):
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
