"""A study's statistics: paired differences, intervals, verdicts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from hcvision.data import write_json

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Metric:
    """A column of the table: its name in results.csv, its heading, and how its values are shown."""

    name: str
    heading: str
    factor: float = 1.0
    digits: int = 2
    paired: bool = True  # with a column of differences to the first variant
    unit: str = ""  # of a difference
    more_is_better: bool = True
    is_optional: bool = False  # cells may be without it

    def show(self, value: float, sign: str = "") -> str:
        return f"{self.factor * value:{sign}z.{self.digits}f}"


@dataclass(frozen=True)
class Curve:
    """A panel of the figure: a metric by epoch, its label, and the factor that its values are shown with."""

    name: str
    label: str
    factor: float = 1.0


TOP1 = Metric("top1", "top-1 %", 100.0, unit="points")


@dataclass
class Outcome:
    """What a study compared; the content of study.json. The cells themselves are in results.csv and curves.csv."""

    title: str
    variants: list[str]
    seeds: list[int]
    lead: str  # data, model and budget, in a line
    measured: str  # what the first metric is, in words
    metrics: list[Metric]
    curves: list[Curve]
    costs: dict[str, dict[str, float]]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # file names and what they show
    environments: list[dict[str, Any]] = field(default_factory=list)  # of the cells, and how many of each
    timed_on: str = ""  # the device, and the threads of a CPU, that costs were measured on
    matched: dict[str, dict[str, Any]] = field(default_factory=dict)  # variants trained for the time of another one

    @property
    def twins(self) -> dict[str, str]:
        """By variant the one that was trained for its time, the first of several."""
        found: dict[str, str] = {}
        for twin, about in self.matched.items():
            found.setdefault(about["variant"], twin)
        return found

    def write(self, folder: Path) -> None:
        write_json(folder / "study.json", asdict(self))


def number(text: str) -> Any:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


def interval(differences: Sequence[float], share: int = 1) -> float:
    """Half the width of the confidence interval of a mean difference: 95 %, Student's t.

    Args:
        differences: paired by seed, at least two.
        share: comparisons that the 5 % are shared among (Bonferroni).
    """
    count = len(differences)
    quantile = float(student.ppf(1 - (1 - CONFIDENCE) / 2 / share, count - 1))
    return quantile * statistics.stdev(differences) / math.sqrt(count)


def show_interval(differences: Sequence[float], metric: Metric) -> str:
    """The interval of a mean difference, as text."""
    mean, half = statistics.mean(differences), interval(differences)
    return f"[{metric.show(mean - half, '+')}, {metric.show(mean + half, '+')}]"


def show_difference(differences: Sequence[float], metric: Metric) -> str:
    """A mean difference as text, with its interval if there are several."""
    about = f" {show_interval(differences, metric)}" if len(differences) > 1 else ""
    return metric.show(statistics.mean(differences), "+") + about


def predicted(values: Sequence[float]) -> float:
    """Half the width of the interval around the mean in which one more run lands, 95 %, Student's t."""
    count = len(values)
    return float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / count)


def by_variant(results: list[dict[str, Any]], study: Outcome, name: str) -> dict[str, list[Any]]:
    """Values of a column by variant, in the order of the seeds.

    Of an optional metric without the variants that have a cell without a finite value.

    Raises:
        ValueError: a cell is missing, or a metric of it that is not optional.
    """
    cells = {(row["variant"], row["seed"]): row.get(name) for row in results}
    missing = [f"{v}/{s}" for v in study.variants for s in study.seeds if (v, s) not in cells]
    if missing:
        raise ValueError(f"results.csv lacks {len(missing)} cells of the study: {', '.join(missing[:3])}")
    values = {variant: [cells[variant, seed] for seed in study.seeds] for variant in study.variants}
    metric = next((metric for metric in study.metrics if metric.name == name), None)
    if metric is None:
        return values
    bad = [cell for cell, value in cells.items() if value is None or not math.isfinite(value)]
    if bad and not metric.is_optional:
        raise ValueError(f"results.csv has no finite {name} of {', '.join(f'{v}/{s}' for v, s in bad[:3])}")
    without = {variant for variant, _ in bad}
    return {variant: own for variant, own in values.items() if variant not in without}


def against_first(values: dict[str, list[float]], study: Outcome) -> dict[str, list[float]]:
    """Differences to the first variant, seed by seed, of the other variants, where both have values."""
    first = study.variants[0]
    return subtract(values, dict.fromkeys(study.variants[1:], first))


def against_twins(values: dict[str, list[float]], study: Outcome) -> dict[str, list[float]]:
    """Differences of variants to what was trained for their time, seed by seed, where both have values."""
    return subtract(values, study.twins)


def subtract(values: dict[str, list[float]], pairs: dict[str, str]) -> dict[str, list[float]]:
    """Differences of variants to other ones, seed by seed, where both have values."""
    return {
        variant: [mine - its for mine, its in zip(values[variant], values[other], strict=True)]
        for variant, other in pairs.items()
        if variant in values and other in values
    }


def count_comparisons(results: list[dict[str, Any]], study: Outcome) -> int:
    """Paired differences that the report makes something of: to the first variant, and to time-matched twins."""
    paired = [by_variant(results, study, metric.name) for metric in study.metrics if metric.paired]
    return sum(len(against_first(values, study)) + len(against_twins(values, study)) for values in paired)


VERDICTS = ("better than", "worse than", "perhaps better than", "perhaps worse than", "not told apart from")


def judge(differences: Sequence[float], metric: Metric, count: int) -> str:
    """What the intervals of one of ``count`` comparisons allow one to say, a word of ``VERDICTS``."""
    mean = statistics.mean(differences)
    alike = statistics.stdev(differences) < 1e-6  # equal, but for float32; a few equal numbers are no certainty
    if alike or abs(mean) <= interval(differences):
        return "not told apart from"
    verdict = "better than" if (mean > 0) == metric.more_is_better else "worse than"
    return verdict if abs(mean) > interval(differences, count) else f"perhaps {verdict}"
