"""The Lightning module of classification."""

from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision, MultilabelF1Score

from hcvision.data import ImageData, check_number, pick_label, refusals
from hcvision.models import DiT
from hcvision.training.metrics import MacroAccuracy
from hcvision.training.module import TimmModule


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

    def batch_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
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

    def answer(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, K) in float32, minus infinity for classes that are left out, and targets (B,), multi-label (B, K).

        Where an image has several labels of which any is right, its target is the most probable one.
        """
        images, targets = batch
        logits = self(images).float()
        if isinstance(self.data, ImageData):
            logits = self.data.leave_out(logits)
        if targets.dim() == 2 and not self.hparams["multi_label"]:
            targets = pick_label(logits, targets)
        return logits, targets

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean_loss: MeanMetric, stage: str
    ) -> tuple[Tensor, Tensor] | None:
        if len(batch[0]) == 0:
            return None
        logits, targets = self.answer(batch)
        metrics.update(logits.sigmoid() if self.hparams["multi_label"] else logits, targets.long())
        mean_loss.update(self.plain_loss(logits, targets), weight=len(targets))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, batch_size=len(targets))
        self.log(f"{stage}_loss", mean_loss, on_step=False, on_epoch=True, batch_size=len(targets))
        return logits, targets

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Logits and targets, for who reports more."""
        return self._evaluate(batch, self.val_metrics, self.val_loss, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """The same."""
        return self._evaluate(batch, self.test_metrics, self.test_loss, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities of the classes, (B, num_classes)."""
        return self.probabilities(self(batch[0]))
