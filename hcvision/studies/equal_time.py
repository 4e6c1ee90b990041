"""Variants at equal time: what the time that their steps take longer would have bought the first variant.

Where a study has a variant that was trained for another one's time (``match_time``), the two are compared at their
ends. Else curves are read: where the other one was when the first one's time was over, and when it was as good.
"""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hcvision.data import markdown
from hcvision.studies.statistics import Curve, Outcome, against_twins, by_variant, show_difference

Rows = list[dict[str, Any]]
Points = Sequence[tuple[float, float]]  # images that were trained on, and the metric then
NONE = "-"


def compare_at_equal_time(results: Rows, rows: Rows, study: Outcome) -> list[str]:
    """A table in Markdown, what to know of it, and an empty line; nothing where nothing can be told.

    Args:
        results: the rows of results.csv.
        rows: the rows of curves.csv.
        study: what was compared.
    """
    first, others = study.variants[0], [v for v in study.variants[1:] if v not in study.matched]
    paired, curve = [metric for metric in study.metrics if metric.paired], find_curve(study)
    readings: dict[str, tuple[list[float], str]] = {}
    speeds = dict.fromkeys(others, NONE)
    if curve and study.costs and all(row.get("images") and row.get("epochs") for row in results):
        for variant in others:
            own = Curves(variant, results, rows, study, curve)
            speeds[variant] = own.show_speed_up()
            if variant not in study.twins and (differences := own.read_in_time()):
                readings[variant] = differences, own.describe_reading()
    has_speed = any(speed != NONE for speed in speeds.values())
    if not study.twins and not readings and not has_speed:
        return []
    columns = [["variant", *others]]
    for metric in paired:
        known = against_twins(by_variant(results, study, metric.name), study)
        known |= {v: one for v, (one, _) in readings.items()} if metric is study.metrics[0] else {}
        heading = f"{metric.heading} at equal time" if len(paired) > 1 and study.twins else "at equal time"
        if known:
            columns.append([heading, *(show_difference(known[v], metric) if v in known else NONE for v in others)])
    about = {v: f"{when}, minus {first}" for v, (_, when) in readings.items()}
    about |= {v: f"at the end, minus {twin}" for v, twin in study.twins.items()}
    columns += [["read", *(about.get(v, NONE) for v in others)]] * bool(about)
    columns += [["speed-up", *speeds.values()]] * has_speed
    table = markdown([list(row) for row in zip(*columns, strict=True)])
    return [*table, "", *explain(results, study, bool(readings), has_speed)]


def find_curve(study: Outcome) -> Curve | None:
    """The curve of the first metric, which holds its values after epochs. A score of drawn samples has none."""
    return next((curve for curve in study.curves if curve.name == f"val_{study.metrics[0].name}"), None)


class Curves:
    """The curves of a variant beside what the first variant came to, and what a step of it costs.

    Args:
        variant: which.
        results: the rows of results.csv.
        rows: the rows of curves.csv.
        study: what was compared.
        curve: of the first metric.
    """

    def __init__(self, variant: str, results: Rows, rows: Rows, study: Outcome, curve: Curve):
        cells = {(row["variant"], row["seed"]): row for row in results}
        self.own = [cells[variant, seed] for seed in study.seeds]
        self.first = [cells[study.variants[0], seed] for seed in study.seeds]
        self.metric, self.ratio = study.metrics[0], study.costs[variant]["time"]
        self.points: list[Points] = []  # by seed
        for seed, cell in zip(study.seeds, self.own, strict=True):
            mine = [row for row in rows if (row["variant"], row.get("seed")) == (variant, seed)]
            each = cell["images"] / cell["epochs"]
            points = [(row["epoch"] * each, row[curve.name]) for row in mine if row.get(curve.name) is not None]
            self.points.append(sorted(points))

    def read_in_time(self) -> list[float]:
        """By seed what the variant was when the first one's time was over, minus what that one was then.

        Nothing where a step takes no longer, or where a curve says nothing of that moment.
        """
        if self.ratio <= 1:
            return []
        read = [interpolate(p, cell["images"] / self.ratio) for p, cell in zip(self.points, self.first, strict=True)]
        ends = [cell[self.metric.name] for cell in self.first]
        known = [value - end for value, end in zip(read, ends, strict=True) if value is not None]
        return known if len(known) == len(read) else []

    def describe_reading(self) -> str:
        """When that was."""
        own, images = self.own[0], self.first[0]["images"] / self.ratio
        return f"after {images * own['epochs'] / own['images']:.2f} of {own['epochs']:.3g} epochs"

    def show_speed_up(self) -> str:
        """The first one's time to its end by the variant's time to the same mean, as text.

        Less than what it were at the end of the curve where it is never reached, at least what it were at the first
        evaluation where it is reached there.
        """
        goal = statistics.mean(cell[self.metric.name] for cell in self.first)
        budget = statistics.mean(cell["images"] for cell in self.first)
        shared = set.intersection(*({images for images, _ in points} for points in self.points))
        curve = [(x, statistics.mean(dict(points)[x] for points in self.points)) for x in sorted(shared)]
        if not curve:
            return NONE
        images, bound = find_reached(curve, goal, self.metric.more_is_better)
        return f"{bound}{budget / (images * self.ratio):.2f} x"


def interpolate(points: Points, images: float) -> float | None:
    """The value of a curve there, linear between its points; None before the first and behind the last one."""
    for (before, low), (after, high) in pairwise(points):
        if before <= images <= after:
            return low + (high - low) * (images - before) / (after - before)
    return None


def find_reached(points: Points, goal: float, more_is_better: bool) -> tuple[float, str]:
    """The images after which a curve is first as good as ``goal``, linear between its points.

    Returns:
        They, and "". Those of the first point and "≥ " where it is as good; those of the last one and "< " where none
        is: the signs are those of a speed.
    """
    sign = 1 if more_is_better else -1
    if sign * points[0][1] >= sign * goal:
        return points[0][0], "≥ "
    for (before, low), (after, high) in pairwise(points):
        if sign * high >= sign * goal:
            return before + (after - before) * (goal - low) / (high - low), ""
    return points[-1][0], "< "


def explain(results: Rows, study: Outcome, is_read: bool, has_speed: bool) -> list[str]:
    """What the reader of the table has to know."""
    first, lines = study.variants[0], []
    for twin, about in study.matched.items():
        row = next(row for row in results if row["variant"] == twin)
        lines.append(
            f"{twin} was trained for the time of {about['variant']}, with a whole schedule of its own: "
            f"{row['updates']:,} updates ({row['epochs']:.3g} epochs), {about['ratio']:.2f} x those of "
            f"{about['variant']}, the ratio of their step times on {about['timed_on']}, measured before it trained."
        )
    text = "At equal time: "
    if study.twins:
        text += "the variant minus the one that was trained for its time, both at their end"
        text += "; or, " if is_read else ". "
    if is_read:
        text += (
            f"the variant's own curve where the time of {first} was over, linear between evaluations, minus {first} at "
            "its end. That is in the middle of the variant's schedule, where its learning rate had not come down yet, "
            "and so unfavourable to it: only training for equal time (`match_time`) can tell. "
        )
    if study.twins or is_read:
        lines.append(text.strip())
    if has_speed:
        lines.append(
            f"Speed-up: the time of {first} to its end, divided by the time after which the variant's mean curve is "
            "first as good, in the middle of its schedule too (<: it never is; ≥: it is at its first evaluation)."
        )
    return [line for note in lines for line in (note, "")]
