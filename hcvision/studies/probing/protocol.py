"""Scores of frozen features: k nearest neighbours and a linear probe, from seeds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hcvision.data import check_name, check_number, check_numbers, split_by_class
from hcvision.studies.probing.linear import FITS, fit_linear_probe
from hcvision.studies.probing.neighbours import TEMPERATURE, predict_by_neighbours

PROBES = ("knn", "linear")
HELD_OUT = 0.2  # of each class's training images, to choose the penalty of the linear probe by
Labelled = tuple[Tensor, Tensor]  # features (N, F) and classes (N,)


@dataclass(frozen=True)
class Protocol:
    """How features are scored.

    Args:
        probes: knn, linear, or both.
        neighbours: the k of knn.
        temperature: of knn.
        seeds: of the images that the linear probe's penalty is chosen by, and of those that ``shots`` leaves.
        shots: training images per class, chosen by seed; all if None.

    Raises:
        ValueError: an argument out of range.
    """

    probes: list[str] = field(default_factory=lambda: [*PROBES])
    neighbours: list[int] = field(default_factory=lambda: [10, 20])
    temperature: float = TEMPERATURE
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    shots: int | None = None

    def __post_init__(self) -> None:
        lists: dict[str, list[Any]] = {"probes": self.probes, "neighbours": self.neighbours, "seeds": self.seeds}
        for name, values in lists.items():
            if not values or len({*values}) < len(values):
                raise ValueError(f"{name} must be one or more different ones, got {list(values)}")
        for probe in self.probes:
            check_name("probe", probe, PROBES)
        check_numbers("neighbours", self.neighbours, least=1, whole=True)
        check_numbers("seeds", self.seeds, least=0, whole=True)
        check_number("temperature", self.temperature, above=0)
        if self.shots is not None:
            check_number("shots", self.shots, least=2 if "linear" in self.probes else 1, whole=True)

    @property
    def fits(self) -> int:
        """Linear probes that are fitted, at most."""
        return FITS * len(self.seeds) if "linear" in self.probes else 0

    def check(self, targets: Sequence[int] | Tensor, names: Sequence[Any]) -> None:
        """Raise ValueError when there are too few training images of these classes, (N,)."""
        for seed in self.seeds:
            chosen = torch.as_tensor(targets)[self.choose(targets, names, seed)]
            if "knn" in self.probes and max(self.neighbours) > len(chosen):
                raise ValueError(
                    f"neighbours must be at most {len(chosen)}, the training images, got {max(self.neighbours)}"
                )
            if "linear" in self.probes:
                split_by_class(chosen.tolist(), HELD_OUT, seed, names)

    def choose(self, targets: Sequence[int] | Tensor, names: Sequence[Any], seed: int) -> Tensor:
        """Numbers of the training images that are looked at, ascending.

        Raises:
            ValueError: a class has fewer than ``shots``.
        """
        labels = torch.as_tensor(targets)
        if self.shots is None:
            return torch.arange(len(labels))
        generator, kept = torch.Generator().manual_seed(seed), []
        for label in labels.unique().tolist():
            own = (labels == label).nonzero()[:, 0]
            if len(own) < self.shots:
                name = repr(names[label]) if names else f"number {label}"
                raise ValueError(f"shots must be at most {len(own)}, the images of class {name}, got {self.shots}")
            kept.append(own[torch.randperm(len(own), generator=generator)[: self.shots]])
        return torch.cat(kept).sort().values

    def score(
        self,
        train: Labelled,
        test: Labelled,
        names: Sequence[Any],
        device: str = "cpu",
        tick: Callable[[], Any] = lambda: None,
    ) -> dict[str, Any]:
        """Top-1 on test images, the mean over seeds, and its standard deviation where seeds make a difference.

        Args:
            train: features and classes of the training images.
            test: the same of the images that are scored.
            names: of the K classes.
            device: where it is computed; the linear probe in float64 on a CPU, else in float32.
            tick: called after each linear probe that was fitted.

        Returns:
            ``knn10``, ``knn20`` (of each k), ``linear``; ``..._std``; ``l2``, the linear probe's penalty by seed.
        """
        dtype = torch.float64 if device == "cpu" else torch.float32
        bank, queries = (part[0].to(device) for part in (train, test))
        labels, answers = (part[1].to(device) for part in (train, test))
        found: dict[str, list[float]] = {}
        penalties: list[float] = []

        def note(name: str, predicted: Tensor) -> None:
            found.setdefault(name, []).append(float((predicted == answers).double().mean()))

        for number, seed in enumerate(self.seeds):
            chosen = self.choose(train[1], names, seed)
            own = labels[chosen.to(device)]
            features = bank[chosen.to(device)]
            if "knn" in self.probes and (self.shots is not None or number == 0):  # of all images no seed decides
                voted = predict_by_neighbours(queries, features, own, len(names), self.neighbours, self.temperature)
                for k, predicted in voted.items():
                    note(f"knn{k}", predicted)
            if "linear" in self.probes:
                is_held_out = torch.zeros(len(own), dtype=torch.bool, device=device)
                is_held_out[split_by_class(own.cpu(), HELD_OUT, seed, names)[1]] = True  # type: ignore[arg-type]
                probe = fit_linear_probe(features.to(dtype), own, len(names), is_held_out, tick)
                penalties.append(probe.l2)
                note("linear", probe(queries).argmax(1))
        scores: dict[str, Any] = {}
        for name, values in found.items():
            scores[name] = statistics.mean(values)
            if len(values) > 1:
                scores[f"{name}_std"] = statistics.stdev(values)
        return scores | ({"l2": penalties} if penalties else {})
