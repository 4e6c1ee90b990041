"""k nearest neighbours on frozen features (Wu et al., 2018, arXiv 1805.01978, section 3.4; DINO, arXiv 2104.14294)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
MOST_COSINES = 2**26  # that are in memory at a time, 4 bytes each


@torch.no_grad()
def predict_by_neighbours(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    classes: int,
    neighbours: Sequence[int] = (10, 20),
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """The class that the k nearest training images vote for, by cosine similarity, each with weight exp(cosine / T).

    Letters in shapes: Q queries, N training images, F features, K classes.

    Args:
        queries: features of the images to classify, (Q, F).
        bank: features of the training images, (N, F), on the same device.
        labels: their classes, (N,).
        classes: K.
        neighbours: the k, each at most N.
        temperature: T.

    Returns:
        By k, the class with the largest sum of weights, (Q,); the one with the lowest number of equal ones.

    Raises:
        ValueError: there are no neighbours asked for, or more than there are training images.
    """
    if not neighbours or min(neighbours) < 1 or max(neighbours) > len(bank):
        raise ValueError(f"neighbours must be 1 to {len(bank)}, the training images, got {list(neighbours)}")
    bank = F.normalize(bank, dim=1)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for part in F.normalize(queries, dim=1).split(max(MOST_COSINES // len(bank), 1)):
        cosines, nearest = (part @ bank.T).topk(max(neighbours), dim=1)
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # relative to the nearest one: no overflow
        for k, parts in found.items():
            votes = weights.new_zeros(len(part), classes)
            parts.append(votes.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k]).argmax(1))
    return {k: torch.cat(parts) for k, parts in found.items()}
