"""A linear probe: multinomial logistic regression on frozen features, its L2 penalty chosen on held-out images.

The protocol is that of CLIP (Radford et al., 2021, arXiv 2103.00020, appendix A.3): features as they are, L-BFGS with
at most 1000 iterations, and a penalty between 1e-6 and 1e6, looked for on a grid that is halved around its best point.

Letters in shapes: N training images, F features, K classes, R directions in which the features vary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

EXPONENTS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)  # of 10, the penalties that are tried first
STEPS = (1.0, 0.5, 0.25, 0.125)  # between the best exponent so far and those that are tried next
FITS = len(EXPONENTS) + 2 * len(STEPS) + 1  # of a probe, at most
ITERATIONS = 1000
TOLERANCE = 1e-4  # as scikit-learn's
MOST_LOGITS = 2**25  # that are in memory at a time


@dataclass
class LinearProbe:
    """A linear classifier: weight (K, F), bias (K,), the penalty ``l2`` that it was fitted with."""

    weight: Tensor
    bias: Tensor
    l2: float

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


class Regression:
    """The sum over images of the cross entropy of ``softmax(W x + b)``, plus ``l2 / 2 * |W|^2``, to be minimized.

    b has no penalty, so that the features may be centred; the penalty does not see a rotation, so that they may be
    turned into their principal directions. There the curvature is nearly diagonal. L-BFGS, in variables divided by the
    square root of its diagonal, needs a tenth of the iterations. The optimum is the same one.

    Args:
        features: (N, F); float64 finds the optimum to more digits.
        targets: (N,).
        classes: K.
    """

    def __init__(self, features: Tensor, targets: Tensor, classes: int):
        self.targets, self.classes = targets, classes
        self.mean = features.mean(0)
        centred = features - self.mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
        varies = variances > variances[-1] * torch.finfo(features.dtype).eps * features.shape[1]
        self.directions = directions[:, varies]  # (F, R)
        self.turned = centred @ self.directions  # (N, R)

    def fit(self, l2: float, start: LinearProbe | None = None, tolerance: float = TOLERANCE) -> LinearProbe:
        """The optimum, looked for from ``start``.

        Args:
            l2: the penalty, above 0.
            start: a probe of such features, fitted with another penalty or to other images.
            tolerance: of the gradient of the mean loss in the variables of L-BFGS, its largest entry.
        """
        weight = self.turned.new_zeros(self.turned.shape[1], self.classes)
        bias = weight.new_zeros(self.classes)
        if start is not None:
            weight, bias = self.directions.T @ start.weight.T, start.bias + start.weight @ self.mean
        scale = self.curvature(weight, bias, l2).rsqrt()

        def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
            point = torch.as_tensor(vector, dtype=weight.dtype, device=weight.device).view(-1, self.classes)
            loss, slope, slope_of_bias = self.mean_loss(scale * point[:-1], point[-1], l2)
            slopes = torch.cat([scale * slope, slope_of_bias[None]])
            return loss, slopes.flatten().double().cpu().numpy()

        first = torch.cat([weight / scale, bias[None]]).flatten().double().cpu().numpy()
        options: dict[str, Any] = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "gtol": tolerance, "ftol": 0.0}
        found = minimize(value, first, jac=True, method="L-BFGS-B", options=options).x
        best = torch.as_tensor(found, dtype=weight.dtype, device=weight.device).view(-1, self.classes)
        turned = (self.directions @ (scale * best[:-1])).T
        return LinearProbe(turned, best[-1] - turned @ self.mean, l2)

    def curvature(self, weight: Tensor, bias: Tensor, l2: float) -> Tensor:
        """The diagonal of the second derivatives by weight of the loss per image, there: (R, K)."""
        total = torch.full_like(weight, l2)
        for turned, _ in self.parts():
            p = (turned @ weight + bias).softmax(1)
            total += turned.square().T @ (p * (1 - p))
        return total / len(self.targets)

    def mean_loss(self, weight: Tensor, bias: Tensor, l2: float) -> tuple[float, Tensor, Tensor]:
        """The loss per image and its gradient, of weight (R, K) and bias (K,)."""
        count = len(self.targets)
        loss = l2 / 2 * float(weight.double().square().sum())
        slope, slope_of_bias = l2 * weight, torch.zeros_like(bias)
        for turned, targets in self.parts():
            logits = turned @ weight + bias
            loss += float(F.cross_entropy(logits, targets, reduction="none").double().sum())
            error = logits.softmax(1)
            error[torch.arange(len(targets), device=error.device), targets] -= 1
            slope, slope_of_bias = slope + turned.T @ error, slope_of_bias + error.sum(0)
        return loss / count, slope / count, slope_of_bias / count

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Turned features (B, R) and targets (B,) of as many images as are looked at together."""
        each = max(MOST_LOGITS // self.classes, 1)
        return zip(self.turned.split(each), self.targets.split(each), strict=True)


def fit_linear_probe(
    features: Tensor,
    targets: Tensor,
    classes: int,
    is_held_out: Tensor,
    tick: Callable[[], Any] = lambda: None,
) -> LinearProbe:
    """The probe of all training images, with the penalty that has the highest accuracy on those that are held out.

    Of equal accuracies the lower negative log-likelihood decides. Seven penalties are tried, 1e6 down to 1e-6; then
    those on either side of the best one, a power of ten away, half of one, a quarter and an eighth, as CLIP does. Each
    fit begins where the one with the next larger penalty ended, and the last one, of all images, where the best ended.

    Args:
        features: (N, F), of all training images.
        targets: (N,).
        classes: K.
        is_held_out: (N,), bool.
        tick: called after each fit, ``FITS`` times at most.
    """
    regression = Regression(features[~is_held_out], targets[~is_held_out], classes)
    held_out, answers = features[is_held_out], targets[is_held_out]
    probes: dict[float, LinearProbe] = {}  # by the exponent of their penalty
    merits: dict[float, tuple[float, float]] = {}

    def attempt(exponent: float) -> None:
        larger = min((other for other in probes if other > exponent), default=None)
        probe = regression.fit(10**exponent, None if larger is None else probes[larger])
        logits = probe(held_out)
        right = (logits.argmax(1) == answers).double().mean()
        probes[exponent], merits[exponent] = probe, (float(right), -float(F.cross_entropy(logits, answers)))
        tick()

    for exponent in EXPONENTS:
        attempt(exponent)
    for step in STEPS:
        best = max(merits, key=merits.__getitem__)
        for exponent in (best + step, best - step):
            if exponent not in merits and EXPONENTS[-1] <= exponent <= EXPONENTS[0]:
                attempt(exponent)
    chosen = probes[max(merits, key=merits.__getitem__)]
    probe = Regression(features, targets, classes).fit(chosen.l2, chosen)
    tick()
    return probe
