"""A study's report from its files alone: study.json, results.csv and curves.csv in, a table and pictures out."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy.stats import t as student

from hcvision.runs import markdown, metrics_files, write_csv, write_json, write_whole

COLORS = ("#444444", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d5b9e", "#b5179e", "#e07a1f", "#5fa8d3", "#9c6644")
STYLES = ("-", "--", ":")
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

    def write(self, folder: Path) -> None:
        write_json(folder / "study.json", asdict(self))


def read_study(folder: Path) -> Outcome:
    """What ``Outcome.write`` wrote.

    Raises:
        FileNotFoundError: the folder holds no study.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no study.json; `hcvision compare` writes it when all cells are done")
    try:
        content = json.loads(path.read_text())
        content["metrics"] = [Metric(**metric) for metric in content["metrics"]]
        content["curves"] = [Curve(**curve) for curve in content["curves"]]
        return Outcome(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no study.json of `hcvision compare`, or a damaged one: {error!r}") from error


def report(folder: str) -> None:
    """Write a study's report.md and its pictures again, from the study.json, results.csv and curves.csv beside them.

    Args:
        folder: of a study, such as docs/results/fashion_mnist.

    Raises:
        FileNotFoundError: it holds no study.
    """
    print(f"{write_report(Path(folder)).read_text()}\nreport: {Path(folder) / 'report.md'}")


def write_report(folder: Path) -> Path:
    """Write report.md and its pictures from the other files of a study. Returns the path of report.md."""
    study, results = read_study(folder), read_results(folder)
    pictures = {"curves.png": " and ".join(curve.label for curve in study.curves)}
    draw_curves(read_curves(folder), study).savefig(folder / "curves.png", dpi=120)
    found = findings(results, study)
    if found:
        draw_differences(results, study).savefig(folder / "differences.png", dpi=120)
        pictures = {"differences.png": f"differences to {study.variants[0]}, their intervals and seeds"} | pictures
    lines = [
        f"# {study.title}", "",
        f"{study.lead}.", "",
        *table(results, study), "",
        *[f"- {line}" for line in found], "",
        *notes(study), "",
    ]  # fmt: skip
    for name, about in pictures.items():
        lines += [f"![{about}]({name})", ""]
    for name, about in study.pictures.items():
        lines += [f"![{name.partition('.')[0]}]({name})", "", about, ""]
    lines += [*describe(study.environments), ""]
    path = folder / "report.md"
    write_whole(path, "\n".join(lines).encode())
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The cells in results.csv, numbers as numbers and what is missing as None."""
    return read_rows(folder / "results.csv")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A CSV file of numbers and a column ``variant``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another column holds text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `hcvision compare` writes it when all cells are done")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{name: value if name == "variant" else number(value) for name, value in row.items()} for row in rows]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


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


def predicted(values: Sequence[float]) -> float:
    """Half the width of the interval around the mean in which one more run lands, 95 %, Student's t."""
    count = len(values)
    return float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / count)


def by_variant(results: list[dict[str, Any]], study: Outcome, name: str) -> dict[str, list[Any]]:
    """Values of a column by variant, in the order of the seeds.

    Raises:
        ValueError: a cell is missing, or a metric of it.
    """
    cells = {(row["variant"], row["seed"]): row.get(name) for row in results}
    missing = [f"{v}/{s}" for v in study.variants for s in study.seeds if (v, s) not in cells]
    if missing:
        raise ValueError(f"results.csv lacks {len(missing)} cells of the study: {', '.join(missing[:3])}")
    if name in [metric.name for metric in study.metrics]:
        bad = [f"{v}/{s}" for (v, s), value in cells.items() if value is None or not math.isfinite(value)]
        if bad:
            raise ValueError(f"results.csv has no finite {name} of {', '.join(bad[:3])}")
    return {variant: [cells[variant, seed] for seed in study.seeds] for variant in study.variants}


def against_first(values: dict[str, list[float]], study: Outcome) -> dict[str, list[float]]:
    """Differences to the first variant, seed by seed, of the other variants."""
    first = study.variants[0]
    return {
        variant: [mine - its for mine, its in zip(values[variant], values[first], strict=True)]
        for variant in study.variants[1:]
    }


def table(results: list[dict[str, Any]], study: Outcome) -> list[str]:
    """The report's table in Markdown, aligned so that it reads well in a terminal too."""
    first, several = study.variants[0], len(study.seeds) > 1
    parameters = {row["variant"]: row["parameters"] for row in results}
    starts = by_variant(results, study, "start_top1")
    with_start = any(value is not None for values in starts.values() for value in values)
    columns: list[list[str]] = [["variant", *study.variants]]
    if with_start:
        known = {v: "" if None in values else TOP1.show(statistics.mean(values)) for v, values in starts.items()}
        columns.append(["at start %", *known.values()])
    for metric in study.metrics:
        values = by_variant(results, study, metric.name)
        column = [metric.heading]
        for variant in study.variants:
            spread = f" ± {metric.show(statistics.stdev(values[variant]))}" if several else ""
            column.append(metric.show(statistics.mean(values[variant])) + spread)
        columns.append(column)
        if metric.paired and study.variants[1:]:
            column = [f"minus {first}", ""]
            for differences in against_first(values, study).values():
                mean = statistics.mean(differences)
                column.append(metric.show(mean, "+") + (f" {show_interval(differences, metric)}" if several else ""))
            columns.append(column)
    column = ["parameters"]
    for variant in study.variants:
        more = 100 * (parameters[variant] / parameters[first] - 1)
        column.append(f"{parameters[variant]:,}" + (f" ({more:+.2f} %)" if more else ""))
    columns.append(column)
    for name, heading in (("time", "step time"), ("memory", "memory")) if study.costs else ():
        columns.append([heading, *(f"{study.costs[variant][name]:.2f} x" for variant in study.variants)])
    return markdown([list(row) for row in zip(*columns, strict=True)])


def show_interval(differences: Sequence[float], metric: Metric) -> str:
    mean, half = statistics.mean(differences), interval(differences)
    return f"[{metric.show(mean - half, '+')}, {metric.show(mean + half, '+')}]"


def findings(results: list[dict[str, Any]], study: Outcome) -> list[str]:
    """What the intervals of the metrics with pairs allow one to say, a line per kind of answer."""
    paired = [metric for metric in study.metrics if metric.paired]
    if not paired or len(study.seeds) < 2 or not study.variants[1:]:
        return []
    count = (len(study.variants) - 1) * len(paired)
    lines = []
    for metric in paired:
        compared = against_first(by_variant(results, study, metric.name), study)
        said: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for variant, differences in compared.items():
            said[judge(differences, metric, count)].append(f"{variant} {show_interval(differences, metric)}")
        about = f"{metric.heading}: " if len(paired) > 1 else ""
        lines += [f"{about}{verdict} {study.variants[0]}: {'; '.join(ones)}" for verdict, ones in said.items() if ones]
    of = "; ".join(f"{metric.heading}{f', {metric.unit}' if metric.unit else ''}" for metric in paired)
    about = f"in brackets the 95 % intervals of the paired difference ({of}; Student's t, {len(study.seeds)} seeds)"
    if count > 1:
        about += f"; perhaps: one interval alone excludes zero, but not where the {count} of them share the 5 %"
    return [*lines, about]


VERDICTS = ("better than", "worse than", "perhaps better than", "perhaps worse than", "not told apart from")


def judge(differences: Sequence[float], metric: Metric, count: int) -> str:
    """What the intervals of one of ``count`` comparisons allow one to say, a word of ``VERDICTS``."""
    mean = statistics.mean(differences)
    alike = statistics.stdev(differences) < 1e-6  # equal, but for float32; a few equal numbers are no certainty
    if alike or abs(mean) <= interval(differences):
        return "not told apart from"
    verdict = "better than" if (mean > 0) == metric.more_is_better else "worse than"
    return verdict if abs(mean) > interval(differences, count) else f"perhaps {verdict}"


def notes(study: Outcome) -> list[str]:
    """What the reader of the table has to know."""
    first, what = study.variants[0], study.measured
    what = what[0].upper() + what[1:]
    if len(study.seeds) > 1:
        lines = [
            f"{what}: the mean over {len(study.seeds)} seeds ± their standard deviation, after the last epoch; the "
            f"difference to {first} is paired by seed, with its 95 % interval."
        ]
    else:
        lines = [
            f"{what} after the last epoch. One seed has no spread: a difference here can be luck, a study with several "
            "seeds (`seeds` in its config) tells."
        ]
    if study.costs:
        lines.append(
            f"Step time (forward, backward and AdamW, eager, variants interleaved in one process, median) and peak "
            f"memory of a training step are ratios to {first}"
            + (f", measured on {study.timed_on} when no cell was training." if study.timed_on else ".")
        )
    return [line for note in [*study.notes, *lines] for line in (note, "")][:-1]


def describe(environments: list[dict[str, Any]]) -> list[str]:
    """Where the cells ran, a line for each place and version."""
    lines = []
    for one in environments:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        cells = f"{one['cells']} cell{'s' * (one['cells'] > 1)}"
        lines.append(f"- {cells} on {one['device']}; {versions}; revision {one['revision']}.")
    return lines


# Curves


def read_curve(folder: Path, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Metrics by epoch, from the metrics.csv of a cell."""
    curve: dict[str, dict[int, float]] = {name: {} for name in names}
    for path in metrics_files(folder):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name in names:
                    if row.get(name):
                        curve[name][int(row["epoch"])] = float(row[name])
    return curve


def write_curves(folder: Path, cells: dict[tuple[str, int], Path], curves: Sequence[Curve]) -> None:
    """Write curves.csv: a row per variant, seed and epoch."""
    names = [curve.name for curve in curves]
    rows = []
    for (variant, seed), path in cells.items():
        points = read_curve(path, names)
        for epoch in sorted({epoch for values in points.values() for epoch in values}):
            row: dict[str, Any] = {"variant": variant, "seed": seed, "epoch": epoch + 1}
            rows.append(row | {name: f"{points[name][epoch]:.6g}" if epoch in points[name] else "" for name in names})
    write_csv(folder / "curves.csv", rows or [{"variant": "", "seed": "", "epoch": ""}])


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """The rows of curves.csv."""
    return read_rows(folder / "curves.csv")


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
    """Each variant's paired differences to the first: seeds as dots, their mean, and its 95 % interval."""
    paired = [metric for metric in study.metrics if metric.paired]
    metric, count = paired[0], len(paired) * (len(study.variants) - 1)
    compared = against_first(by_variant(results, study, metric.name), study)
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
