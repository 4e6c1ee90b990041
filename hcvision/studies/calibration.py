"""How far a classifier's confidence can be trusted: calibration error, Brier score, temperature scaling.

Letters in shapes: B images of a batch, K classes.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassCalibrationError

BINS = 15  # of the expected calibration error, as in the papers
MOST_LOGITS = 2**27  # numbers that a process keeps to fit and to score a temperature, 2 bytes each
LOWEST = -30000.0  # what a class is kept with that is left out or hopeless; float16 ends at -65504
HOTTEST = 100.0  # temperatures are looked for between 1/100 and 100
BLOCK = 1024  # pairs of images whose coins are tossed together


class BrierScore(Metric):
    """The mean over images of ``sum_k (p_k - y_k)^2``, y one-hot: 0 is best, 2 is worst (Brier, 1950)."""

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Probabilities (B, K) and classes (B,)."""
        right = probabilities.gather(1, targets[:, None])[:, 0]
        self.total += (probabilities.square().sum(1) - 2 * right + 1).double().sum()
        self.images += len(targets)

    def compute(self) -> Tensor:
        """A scalar."""
        return (self.total / self.images).float()


@lru_cache(maxsize=8)
def toss(block: int, seed: int) -> Tensor:
    """Which image of each pair of a block fits the temperature, 0 or 1: (BLOCK,)."""
    return torch.randint(2, (BLOCK,), generator=torch.Generator().manual_seed(1_000_003 * seed + block))


def fits_temperature(numbers: Tensor, seed: int = 0) -> Tensor:
    """Whether an image is of the half that fits the temperature: one of each pair that follow each other, by a coin.

    So both halves have as many images of each class where classes follow each other, as in folders.

    Args:
        numbers: (B,), of images in their order, from 0.
        seed: of the coins.

    Returns:
        (B,), bool.
    """
    coins = [int(toss(pair // BLOCK, seed)[pair % BLOCK]) for pair in (numbers // 2).tolist()]
    return numbers % 2 == torch.tensor(coins, dtype=numbers.dtype)


def fit_temperature(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float:
    """The temperature T with the smallest negative log-likelihood of softmax(logits / T) (Guo et al., 2017).

    The likelihood is concave in 1 / T. Newton's steps are taken as long as they stay between two values of 1 / T of
    which the one is too small and the other too large; else these are halved.

    Args:
        batches: gives logits (B, K) and classes (B,), the same ones each time that it is called.
        add_up: adds a tensor up over processes.

    Returns:
        T, at least 1/100 and at most 100: a model that is right on every image would want 0.
    """
    low, high, value = 1 / HOTTEST, HOTTEST, 1.0
    for _ in range(60):
        sums = torch.zeros(2, dtype=torch.float64)
        for logits, targets in batches():
            logits = logits.double()
            p = (value * logits).softmax(1)
            mean = (p * logits).sum(1)
            sums[0] += (mean - logits.gather(1, targets[:, None])[:, 0]).sum()
            sums[1] += ((p * logits.square()).sum(1) - mean.square()).sum()
        slope, curvature = add_up(sums).tolist()
        low, high = (value, high) if slope <= 0 else (low, value)
        step = value - slope / curvature if curvature > 0 else high
        if step == value:
            break
        step = step if low < step < high else (low * high) ** 0.5
        if abs(step - value) < 1e-9 * value or high / low < 1 + 1e-9:
            break
        value = step
    return 1 / step


class KeptLogits:
    """Logits of a share of the images, for a temperature that is known at the end only.

    They are kept in float16, the largest one of an image at 0, where it loses nothing: 2 bytes x K per image, 100 MB
    for the 50,000 images and 1,000 classes of ImageNet. Beyond ``MOST_LOGITS`` every second pair of images is let go,
    as often as it takes; what is left is spread over all images.
    """

    def __init__(self) -> None:
        self.every = 1
        self.parts: list[tuple[Tensor, ...]] = []  # numbers (B,), whether they fit (B,), logits (B, K), classes (B,)

    def add(self, numbers: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Numbers of images (B,) in their order, logits (B, K), classes (B,)."""
        shifted = (logits - logits.amax(1, keepdim=True)).clamp(min=LOWEST).to("cpu", torch.float16)
        self.parts.append(self.thin((numbers, fits_temperature(numbers), shifted, targets.cpu())))
        while self.count() > MOST_LOGITS:
            self.every *= 2
            self.parts = [self.thin(part) for part in self.parts]

    def thin(self, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is kept of a part."""
        kept = (part[0] // 2) % self.every == 0
        return tuple(column[kept] for column in part)

    def count(self) -> int:
        """Numbers that are kept."""
        return sum(logits.numel() for _, _, logits, _ in self.parts)

    def half(self, fits: bool) -> Iterable[tuple[Tensor, Tensor]]:
        """Logits (B, K) in float32 and classes (B,) of the half that fits the temperature, or of the other one."""
        for _, fitting, logits, targets in self.parts:
            own = fitting == fits
            if own.any():
                yield logits[own].float(), targets[own]


class Calibration(pl.Callback):
    """In an evaluation with one label per image: how far the probabilities are to be trusted, logged.

    As ``test_...`` in a test, as ``val_...`` in a validation. Of all images: ``ece``, the expected calibration error
    with 15 bins of equal width (Naeini et al., 2015; Guo et al., 2017; torchmetrics' bins hold their lower edge), and
    ``brier``, the Brier score. Then a temperature is fitted on one half of the images, one of each pair that follow
    each other by a seeded coin, and the other half is scored: ``temperature``, ``half_nll`` and ``half_ece`` as the
    model is, ``scaled_nll`` and ``scaled_ece`` with the temperature. The negative log-likelihood of all images is the
    ``loss`` of the evaluation.

    Confidences are kept as 8 bytes per image, logits as ``KeptLogits`` says. Over processes each image counts once.
    """

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin(pl_module)

    def on_test_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx, dataloader_idx=0) -> None:
        self.take(trainer, outputs)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs: Any, batch: Any, batch_idx, dataloader_idx=0
    ) -> None:
        self.take(trainer, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.score(trainer, pl_module, "test")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.score(trainer, pl_module, "val")

    def begin(self, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self.is_on = not pl_module.hparams["multi_label"]
        self.seen, self.kept = 0, KeptLogits()
        if self.is_on:
            self.ece, self.brier = make_ece(pl_module), BrierScore().to(pl_module.device)

    def take(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Take in the logits (B, K) and classes (B,) of a batch."""
        if outputs is None or not self.is_on:
            return
        logits, targets = outputs
        probabilities = as_probabilities(logits)
        self.ece.update(probabilities, targets)
        self.brier.update(probabilities, targets)
        numbers = (self.seen + torch.arange(len(targets))) * trainer.world_size + trainer.global_rank
        self.seen += len(targets)
        self.kept.add(numbers, logits, targets)

    def score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log the scores."""
        if not self.is_on:
            return
        scores = {"ece": self.ece.compute(), "brier": self.brier.compute()} | self.scale(trainer, pl_module)
        several = trainer.world_size > 1
        pl_module.log_dict({f"{stage}_{name}": float(value) for name, value in scores.items()}, sync_dist=several)

    def scale(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """What a temperature changes, or nothing where there are too few images for two halves."""

        def add_up(sums: Tensor) -> Tensor:
            kind = torch.float32 if pl_module.device.type == "mps" else torch.float64
            return trainer.strategy.reduce(sums.to(pl_module.device, kind), reduce_op="sum").cpu()  # type: ignore

        counts = [sum(len(targets) for _, targets in self.kept.half(fits)) for fits in (True, False)]
        if min(add_up(torch.tensor(counts)).tolist()) < 1:
            return {}
        temperature = fit_temperature(lambda: self.kept.half(True), add_up)
        scores = {"temperature": torch.tensor(temperature)}
        for name, divisor in (("half", 1.0), ("scaled", temperature)):
            nll, ece = MeanMetric().to(pl_module.device), make_ece(pl_module)
            for logits, targets in self.kept.half(False):
                logits, targets = logits.to(pl_module.device) / divisor, targets.to(pl_module.device)
                nll.update(F.cross_entropy(logits, targets), weight=len(targets))
                ece.update(as_probabilities(logits), targets)
            scores |= {f"{name}_nll": nll.compute(), f"{name}_ece": ece.compute()}
        return scores


def make_ece(pl_module: Any) -> MulticlassCalibrationError:
    """The expected calibration error of a module's classes, on its device."""
    metric = MulticlassCalibrationError(pl_module.hparams["num_classes"], n_bins=BINS, norm="l1", validate_args=False)
    return metric.to(pl_module.device)


def as_probabilities(logits: Tensor) -> Tensor:
    """Softmax of (B, K), at most 1 in spite of rounding: torchmetrics takes what is above for logits."""
    return logits.float().softmax(1).clamp(max=1.0)
