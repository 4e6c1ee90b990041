"""A study's report from its files alone: study.json, results.csv and curves.csv in, a table and pictures out."""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcvision.data import markdown, write_csv, write_whole
from hcvision.studies.columns import show_columns
from hcvision.studies.equal_time import NONE, compare_at_equal_time
from hcvision.studies.figures import draw_curves, draw_differences
from hcvision.studies.statistics import (
    TOP1,
    VERDICTS,
    Curve,
    Metric,
    Outcome,
    against_first,
    against_twins,
    by_variant,
    count_comparisons,
    judge,
    number,
    show_difference,
    show_interval,
)
from hcvision.training import metrics_files


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


def report(folder: str, columns: list[str] | None = None) -> None:
    """Write a study's report.md and its pictures again, from the study.json, results.csv and curves.csv beside them.

    Args:
        folder: of a study, such as docs/results/fashion_mnist.
        columns: more columns, as for `hcvision compare`, of what results.csv has; study.json keeps them.

    Raises:
        FileNotFoundError: it holds no study.
        ValueError: a column that is not there.
    """
    if columns is not None:
        show_columns(read_study(Path(folder)), columns).write(Path(folder))
    print(f"{write_report(Path(folder)).read_text()}\nreport: {Path(folder) / 'report.md'}")


def write_report(folder: Path) -> Path:
    """Write report.md and its pictures from the other files of a study. Returns the path of report.md."""
    study, results = read_study(folder), read_results(folder)
    pictures = {"curves.png": " and ".join(curve.label for curve in study.curves)}
    curves = read_curves(folder)
    draw_curves(curves, study).savefig(folder / "curves.png", dpi=120)
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
        *compare_at_equal_time(results, curves, study),
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
            own = values.get(variant, ())
            spread = f" ± {metric.show(statistics.stdev(own))}" if several and own else ""
            column.append(metric.show(statistics.mean(own)) + spread if own else NONE)
        columns.append(column)
        if metric.paired and study.variants[1:]:
            differences = against_first(values, study)
            column = [show_difference(differences[v], metric) if v in differences else NONE for v in study.variants[1:]]
            columns.append([f"minus {first}", "", *column])
    column = ["parameters"]
    for variant in study.variants:
        more = 100 * (parameters[variant] / parameters[first] - 1)
        column.append(f"{parameters[variant]:,}" + (f" ({more:+.2f} %)" if more else ""))
    columns.append(column)
    for name, heading in (("time", "step time"), ("memory", "memory")) if study.costs else ():
        columns.append([heading, *(f"{study.costs[variant][name]:.2f} x" for variant in study.variants)])
    return markdown([list(row) for row in zip(*columns, strict=True)])


def findings(results: list[dict[str, Any]], study: Outcome) -> list[str]:
    """What the intervals of the metrics with pairs allow one to say, a line per kind of answer."""
    paired = [m for m in study.metrics if m.paired and against_first(by_variant(results, study, m.name), study)]
    if not paired or len(study.seeds) < 2 or not study.variants[1:]:
        return []
    count = count_comparisons(results, study)
    lines = []
    for metric in paired:
        compared = against_first(by_variant(results, study, metric.name), study)
        said: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for variant, differences in compared.items():
            said[judge(differences, metric, count)].append(f"{variant} {show_interval(differences, metric)}")
        about = f"{metric.heading}: " if len(paired) > 1 else ""
        lines += [f"{about}{verdict} {study.variants[0]}: {'; '.join(ones)}" for verdict, ones in said.items() if ones]
    for metric in paired:
        at_equal_time = against_twins(by_variant(results, study, metric.name), study)
        about = f"{metric.heading} at equal time" if len(paired) > 1 else "at equal time"
        for variant, differences in at_equal_time.items():
            verdict = judge(differences, metric, count)
            lines.append(f"{about}: {variant} {verdict} {study.twins[variant]} {show_interval(differences, metric)}")
    of = "; ".join(f"{metric.heading}{f', {metric.unit}' if metric.unit else ''}" for metric in paired)
    about = f"in brackets the 95 % intervals of the paired difference ({of}; Student's t, {len(study.seeds)} seeds)"
    if count > 1:
        about += f"; perhaps: one interval alone excludes zero, but not where the {count} of them share the 5 %"
    return [*lines, about]


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


def write_curves(
    folder: Path,
    cells: dict[tuple[str, int], Path],
    curves: Sequence[Curve],
    ends: dict[tuple[str, int], float] | None = None,
) -> None:
    """Write curves.csv: a row per variant, seed and epoch; ``ends`` are the epochs of cells, the last may be a part."""
    names = [curve.name for curve in curves]
    rows = []
    for (variant, seed), path in cells.items():
        end = (ends or {}).get((variant, seed), math.inf)
        points = read_curve(path, names)
        if end < math.inf:  # what was validated behind the last epoch belongs to it
            last = math.ceil(end) - 1
            points = {name: {min(epoch, last): v for epoch, v in values.items()} for name, values in points.items()}
        for epoch in sorted({epoch for values in points.values() for epoch in values}):
            row: dict[str, Any] = {"variant": variant, "seed": seed, "epoch": min(epoch + 1, end)}
            rows.append(row | {name: f"{points[name][epoch]:.6g}" if epoch in points[name] else "" for name in names})
    write_csv(folder / "curves.csv", rows or [{"variant": "", "seed": "", "epoch": ""}])


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """The rows of curves.csv."""
    return read_rows(folder / "curves.csv")
