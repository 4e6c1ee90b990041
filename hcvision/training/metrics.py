"""Counts per class, and the accuracy that is their mean."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassCounts(Metric):
    """Of each of K classes, summed over processes: images rightly taken for it, images of it, images taken for it.

    ``compute`` gives them as (K, 3). A table of all pairs of classes, as torchmetrics counts by, would be K x K.
    """

    right: Tensor
    images: Tensor
    predicted: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        for name in ("right", "images", "predicted"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Logits (B, K) and classes (B,)."""
        predicted = logits.argmax(1)
        self.right += self.count(targets[predicted == targets])
        self.images += self.count(targets)
        self.predicted += self.count(predicted)

    def count(self, classes: Tensor) -> Tensor:
        return self.right.new_zeros(self.num_classes).index_add_(0, classes, torch.ones_like(classes))

    def compute(self) -> Tensor:
        return torch.stack([self.right, self.images, self.predicted], dim=1)


class MacroAccuracy(ClassCounts):
    """The mean over classes of the share of their images that are found; over those that have images."""

    def compute(self) -> Tensor:
        right, images, _ = super().compute().double().unbind(-1)
        return (right / images)[images > 0].mean().float()
