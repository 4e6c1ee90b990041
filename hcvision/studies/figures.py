"""A study's pictures: curves and differences."""

import statistics
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hcvision.studies.statistics import (
    Outcome,
    against_first,
    against_twins,
    by_variant,
    count_comparisons,
    interval,
    judge,
)

COLORS = ("#444444", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5b9e", "#b5179e", "#e07a1f", "#5fa8d3", "#9c6644")
STYLES = ("-", "--", ":")


def draw_curves(rows: list[dict[str, Any]], study: Outcome) -> Figure:
    """Each variant's metrics by epoch, mean over seeds, with the range as a band where that can be read."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        panels = figure.subplots(1, len(study.curves), squeeze=False)[0]
        for axes, curve in zip(panels, study.curves, strict=True):
            for place, variant in enumerate(study.variants):
                points: dict[int, list[float]] = {}
                for row in rows:
                    if row["variant"] == variant and row.get(curve.name) is not None:
                        points.setdefault(row["epoch"], []).append(row[curve.name] * curve.factor)
                style = {"color": COLORS[place % len(COLORS)], "linestyle": STYLES[place // len(COLORS) % len(STYLES)]}
                points = dict(sorted(points.items()))  # a seed may lack an epoch that others have
                means = [statistics.mean(values) for values in points.values()]
                axes.plot([*points], means, label=variant, marker=".", **style)
                if len(study.seeds) > 1 and len(study.variants) <= 4:
                    low, high = (list(map(bound, points.values())) for bound in (min, max))
                    axes.fill_between([*points], low, high, color=style["color"], alpha=0.15)
            axes.set_xlabel("epoch")
            axes.set_ylabel(curve.label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.25)
        handles, labels = panels[0].get_legend_handles_labels()
        if len(labels) > 4:
            figure.legend(handles, labels, frameon=False, loc="outside right center")
        else:
            panels[0].legend(frameon=False)
        return figure


def verdict_color(verdict: str) -> str:
    colors = {"better than": "#00798c", "perhaps better than": "#7fbcc5"}
    return (colors | {"worse than": "#d1495b", "perhaps worse than": "#e8a4ad"}).get(verdict, "#888888")


def draw_differences(results: list[dict[str, Any]], study: Outcome) -> Figure:
    """Each variant's paired differences to the first: seeds as dots, their mean, and its 95 % interval.

    Below them those to variants that were trained for its time.
    """
    metric = next(metric for metric in study.metrics if metric.paired)
    count = count_comparisons(results, study)
    values = by_variant(results, study, metric.name)
    compared = against_first(values, study)
    compared |= {f"{v}, at equal time": one for v, one in against_twins(values, study).items()}
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 1.2 + 0.36 * len(compared)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#444444", linewidth=1)
        for place, differences in enumerate(compared.values()):
            shown = [metric.factor * value for value in differences]
            mean, half = statistics.mean(shown), metric.factor * interval(differences)
            color = verdict_color(judge(differences, metric, count))
            axes.scatter(shown, [place - 0.22] * len(shown), s=14, color=color, alpha=0.6, linewidths=0)
            axes.errorbar(mean, place, xerr=half, color=color, marker="o", markersize=6, capsize=4, linewidth=2)
        axes.set_yticks(range(len(compared)), list(compared))
        axes.set_ylim(len(compared) - 0.5, -0.5)
        unit = f", {metric.unit}" if metric.unit else ""
        axes.set_xlabel(f"{metric.heading} minus {study.variants[0]}{unit}")
        axes.grid(axis="x", alpha=0.25)
        return figure
