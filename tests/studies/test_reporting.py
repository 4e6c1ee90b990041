import csv
import math
import shutil
from pathlib import Path

import pytest

from hcvision.studies.figures import draw_curves, draw_differences
from hcvision.studies.reporting import (
    describe,
    findings,
    read_curve,
    read_curves,
    read_results,
    read_study,
    report,
    table,
    write_curves,
    write_report,
)
from hcvision.studies.statistics import TOP1, Curve, Metric, Outcome, interval, predicted
from hcvision_command import main

RESULTS = sorted(path.parent for path in (Path(__file__).parents[2] / "docs" / "results").glob("*/study.json"))
LOSS = Metric("val_loss", "val loss", digits=4, more_is_better=False)
CURVES = [Curve("val_top1", "validation top-1, %", 100.0), Curve("train_loss", "training loss")]


def outcome(variants=("residual", "dhc2"), seeds=(0, 1, 2), metrics=(TOP1,), costs=None, **kwargs):
    about = ("Title", [*variants], [*seeds], "folder, vit, 2 epochs", "top-1", [*metrics], CURVES, costs or {})
    return Outcome(*about, **kwargs)


def rows(parameters=1000, **values):
    """A row per variant and seed, values of the first metric by seed; some in another order than the first's."""
    sizes = dict.fromkeys(values, parameters) if isinstance(parameters, int) else parameters
    cells = [
        {"variant": variant, "seed": seed, "top1": value, "val_loss": value, "parameters": sizes[variant]}
        for variant, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]
    return cells[:3] + cells[:2:-1]


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_intervals_are_students():
    """t of 2 degrees of freedom is 4.302653 at 97.5 %, of 4 it is 2.776445."""
    assert interval([2.0, 1.0, 2.0]) == pytest.approx(4.302653 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-6)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    # with 2 degrees of freedom P(|T| < t) = s has t = s sqrt(2 / (1 - s²)); three intervals share the 5 %
    inside = 1 - 0.05 / 3
    quantile = inside * math.sqrt(2 / (1 - inside**2))
    assert interval([2.0, 1.0, 2.0], share=3) == pytest.approx(quantile / 3, rel=1e-6)
    # one more run: its own spread and that of the mean
    assert predicted([0.50, 0.52, 0.54]) == pytest.approx(4.302653 * 0.02 * math.sqrt(4 / 3), rel=1e-6)
    assert predicted([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776445 * math.sqrt(2.5 * 1.2), rel=1e-6)


def test_the_table_is_paired_by_seed():
    results = rows({"residual": 1000, "dhc2": 1010}, residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72))
    assert [row["seed"] for row in results] == [0, 1, 2, 2, 1, 0]
    head, _, residual, dhc = map(cells_of, table(results, outcome()))
    assert head == ["variant", "top-1 %", "minus residual", "parameters"]
    assert residual == ["residual", "60.00 ± 10.00", "", "1,000"]
    # differences 2, 1, 2: mean 1.667, standard deviation 0.577, half the interval 4.303 * 0.577 / sqrt(3) = 1.434
    assert dhc == ["dhc2", "61.67 ± 10.02", "+1.67 [+0.23, +3.10]", "1,010 (+1.00 %)"]


def test_columns_of_the_table():
    """Metrics without pairs have no differences; fewer parameters are minus; costs are of their own variants."""
    share = Metric("val_loss", "class %", 100.0, 1, paired=False)
    costs = {"residual": {"time": 1.0, "memory": 1.0}, "dfc2": {"time": 1.256, "memory": 0.5}}
    results = rows({"residual": 1000, "dfc2": 985}, residual=(0.5, 0.6, 0.7), dfc2=(0.6, 0.6, 0.6))
    lines = [*map(cells_of, table(results, outcome(("residual", "dfc2"), metrics=(share,), costs=costs)))]
    assert lines[0] == ["variant", "class %", "parameters", "step time", "memory"]
    assert lines[2] == ["residual", "60.0 ± 10.0", "1,000", "1.00 x", "1.00 x"]
    assert lines[3] == ["dfc2", "60.0 ± 0.0", "985 (-1.50 %)", "1.26 x", "0.50 x"]


def test_one_seed_has_no_intervals(tmp_path):
    results, study = rows(residual=(0.5,), dhc2=(0.52,)), outcome(seeds=[0])
    head, _, *lines = map(cells_of, table(results, study))
    assert head == ["variant", "top-1 %", "minus residual", "parameters"]
    assert lines == [["residual", "50.00", "", "1,000"], ["dhc2", "52.00", "+2.00", "1,000"]]
    assert findings(results, study) == []
    write(tmp_path, study, results)
    text = write_report(tmp_path).read_text()
    assert "Top-1 after the last epoch. One seed has no spread" in text
    assert "interval" not in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png"}


def test_accuracy_at_the_start():
    """0 % is a figure like any other; a variant that starts from nothing has none."""
    results = rows(residual=(0.5,), dhc2=(0.5,))
    for starts, shown in (((0.0, 0.0), ["0.00", "0.00"]), ((None, 0.25), ["", "25.00"]), ((None, None), None)):
        for row, start in zip(results, starts, strict=True):
            row["start_top1"] = start
        head, _, *lines = map(cells_of, table(results, outcome(seeds=[0])))
        assert ("at start %" in head) == (shown is not None)
        assert shown is None or [line[1] for line in lines] == shown


@pytest.mark.parametrize("metric", [TOP1, LOSS])
def test_what_the_intervals_allow_one_to_say(metric):
    """Five share the 5 %: with 2 degrees of freedom t is 9.9248 instead of 4.3027."""
    first = (0.5, 0.6, 0.7)
    more = {
        "clear": (0.52, 0.61, 0.72),  # 2, 1, 2: 1.667 ± 1.434, and ± 3.308 where five share the 5 %
        "firm": (0.52, 0.621, 0.719),  # 2, 2.1, 1.9: 2 ± 0.248, and ± 0.573
        "less": (0.48, 0.579, 0.681),
        "open": (0.53, 0.60, 0.72),  # 3, 0, 2: 1.667 ± 3.795
        "flat": (0.51, 0.6100000143, 0.7099999785),  # 1, 1, 1 in float32
    }
    study = outcome(("residual", *more), metrics=(Metric("accuracy", "other", paired=False), metric))
    results = rows(residual=first, **more)
    *lines, about = findings(results, study)
    if metric is TOP1:
        clear, firm, less = "clear [+0.23, +3.10]", "firm [+1.75, +2.25]", "less [-2.25, -1.75]"
        none = "open [-2.13, +5.46]; flat [+1.00, +1.00]"
        said = [
            f"better than residual: {firm}",
            f"worse than residual: {less}",
            f"perhaps better than residual: {clear}",
        ]
    else:
        clear, firm, less = "clear [+0.0023, +0.0310]", "firm [+0.0175, +0.0225]", "less [-0.0225, -0.0175]"
        none = "open [-0.0213, +0.0546]; flat [+0.0100, +0.0100]"
        said = [
            f"better than residual: {less}",
            f"worse than residual: {firm}",
            f"perhaps worse than residual: {clear}",
        ]
    assert lines == [*said, f"not told apart from residual: {none}"]
    unit = "top-1 %, points" if metric is TOP1 else "val loss"
    assert about == (
        f"in brackets the 95 % intervals of the paired difference ({unit}; Student's t, 3 seeds); perhaps: one "
        "interval alone excludes zero, but not where the 5 of them share the 5 %"
    )

    (axes,) = draw_differences(results, study).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*more]
    (low, _), (high, _) = axes.containers[0].lines[2][0].get_segments()[0]
    assert [low, high] == pytest.approx([metric.factor * (5 - 4.302653) / 300, metric.factor * (5 + 4.302653) / 300])
    good, bad, maybe = ("#00798c", "#d1495b", "#7fbcc5") if metric is TOP1 else ("#d1495b", "#00798c", "#e8a4ad")
    colors = [maybe, good, bad, "#888888", "#888888"]
    assert [container.lines[0].get_color() for container in axes.containers] == colors
    assert axes.get_xlabel() == f"{metric.heading} minus residual{', points' if metric is TOP1 else ''}"


def test_findings_of_two_metrics():
    """They share the 5 % too: with 2 degrees of freedom t is 6.2053, and the half 2.068."""
    results = rows(residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72))
    study = outcome(metrics=(TOP1, Metric("accuracy", "other", paired=False), LOSS))
    *lines, about = findings(results, study)
    assert lines == [
        "top-1 %: perhaps better than residual: dhc2 [+0.23, +3.10]",
        "val loss: perhaps worse than residual: dhc2 [+0.0023, +0.0310]",
    ]
    assert "(top-1 %, points; val loss; Student's t, 3 seeds); perhaps: " in about
    assert about.endswith("where the 2 of them share the 5 %")
    assert draw_differences(results, study).axes[0].containers[0].lines[0].get_color() == "#7fbcc5"


def test_a_single_comparison_shares_with_none():
    """What excludes zero alone is no perhaps there: 1.667 ± 1.434."""
    results = rows(residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72))
    lines = findings(results, outcome())
    assert lines[0] == "better than residual: dhc2 [+0.23, +3.10]"
    assert len(lines) == 2
    assert lines[1].endswith("Student's t, 3 seeds)")
    assert draw_differences(results, outcome()).axes[0].containers[0].lines[0].get_color() == "#00798c"


def test_no_minus_before_a_zero():
    assert [LOSS.show(value) for value in (-0.00004, -0.00006)] == ["0.0000", "-0.0001"]
    assert [LOSS.show(value, "+") for value in (-0.00004, 0.00004, -0.00006)] == ["+0.0000", "+0.0000", "-0.0001"]


def write(folder, study, results, curves=None):
    study.write(folder)
    for name, content in (("results", results), ("curves", curves or [{"variant": "", "seed": "", "epoch": ""}])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*content[0]])
            writer.writeheader()
            writer.writerows(content)


def test_a_report_is_written_from_files_alone(tmp_path, capsys):
    results = rows(residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72))
    results[0]["top5"] = None
    points = [
        {"variant": v, "seed": s, "epoch": e, "val_top1": e / 10, "train_loss": ""}
        for s in range(3) for v in ("residual", "dhc2") for e in (1, 2)
    ]  # fmt: skip
    versions = {"torch": "2.11", "timm": "1.0"}
    places = [{"device": "a CPU", "versions": versions, "revision": "abc", "cells": 1}]
    study = outcome(
        notes=["What it is."], pictures={"samples.png": "Samples."}, environments=[*places, {**places[0], "cells": 5}]
    )
    write(tmp_path, study, results, points)
    assert read_study(tmp_path) == study
    assert [{**row, "top5": None} for row in read_results(tmp_path)] == [{"top5": None, **row} for row in results]
    text = write_report(tmp_path).read_text()
    assert text.split("\n")[:4] == ["# Title", "", "folder, vit, 2 epochs.", ""]
    parts = [
        "| dhc2 ", "\n- better than residual: dhc2 [+0.23, +3.10]\n- in brackets", "\nWhat it is.\n\nTop-1: the mean",
        "(differences.png)", "(curves.png)", "\n![samples](samples.png)\n\nSamples.\n",
        "\n- 1 cell on a CPU; torch 2.11, timm 1.0; revision abc.\n- 5 cells on a CPU;",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "Step time" not in text
    for name in ("report.md", "curves.png", "differences.png"):
        (tmp_path / name).unlink()
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.md").read_bytes() == text.encode()
    assert capsys.readouterr().out == f"{text}\nreport: {tmp_path / 'report.md'}\n"
    for name in ("curves.png", "differences.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_cell_is_missing():
    results = rows(residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72))
    with pytest.raises(ValueError, match=r"results.csv lacks 1 cells of the study: dhc2/1"):
        table([row for row in results if (row["variant"], row["seed"]) != ("dhc2", 1)], outcome())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("results.csv", "dhc2,1,0.61", "dhc2,1,nan", "results.csv has no finite top1 of dhc2/1"),
        ("results.csv", "dhc2,1,0.61", "dhc2,1,inf", "results.csv has no finite top1 of dhc2/1"),
        ("results.csv", "dhc2,1,0.61", "dhc2,1,", "results.csv has no finite top1 of dhc2/1"),
        (
            "results.csv",
            "dhc2,1,0.61",
            "dhc2,1,good",
            "results.csv is damaged: could not convert string to float: 'good'",
        ),
        ("results.csv", "dhc2,1,0.61,0.61,1000", "dhc2,1,0.61,0.61,1000,7", "results.csv is damaged: "),
        (
            "results.csv",
            None,
            None,
            r"there is no .*results\.csv; `hcvision compare` writes it when all cells are done",
        ),
        ("curves.csv", None, None, r"there is no .*curves\.csv; `hcvision compare` writes it when all cells are done"),
        ("study.json", "", "[", "study.json is no study.json of `hcvision compare`, or a damaged one: JSONDecodeError"),
        ("study.json", "", "{}", r"study.json is no study.json .*, or a damaged one: KeyError\('metrics'\)"),
    ],
)
def test_damaged_files(file, old, new, message, tmp_path, capsys):
    write(tmp_path, outcome(), rows(residual=(0.5, 0.6, 0.7), dhc2=(0.52, 0.61, 0.72)))
    path = tmp_path / file
    text = path.read_text()
    if new is None:
        path.unlink()
    else:
        assert old in text
        path.write_text(text.replace(old, new) if old else new)
    with pytest.raises(FileNotFoundError if new is None else ValueError, match=message) as error:
        report(str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"hcvision: error: {error.value} (")
    assert not (tmp_path / "report.md").exists()


def test_a_folder_without_study(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"holds no study\.json; `hcvision compare` writes it when all cells"):
        report(str(tmp_path))
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"hcvision: error: {tmp_path} holds no study.json; ")


def test_curves_make_the_round_trip(tmp_path):
    """Of a cell that was resumed, with values that are missing, and of one with more epochs."""
    files = {
        "short/metrics.1.csv": "epoch,step,loss,train_loss,val_top1\n0,5,3.5,,\n0,8,,2.5,\n1,9,1.5,9.0,\n",
        "short/metrics.csv": "epoch,step,train_loss,val_top1\n1,17,1.23456789,\n1,17,,0.5\n",
        "long/metrics.csv": "epoch,train_loss,val_top1\n0,3.0,0.25\n1,2.0,0.5\n2,1.0,0.75\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_curve(tmp_path / "short", ["val_top1", "train_loss"]) == {
        "val_top1": {1: 0.5}, "train_loss": {0: 2.5, 1: 1.23456789},
    }  # fmt: skip
    cells = {("residual", 0): tmp_path / "short", ("dhc2", 0): tmp_path / "long", ("dhc2", 1): tmp_path / "short"}
    write_curves(tmp_path, cells, CURVES)
    read = read_curves(tmp_path)
    short = [(1, None, 2.5), (2, 0.5, 1.23457)]
    expected = [("residual", 0, *row) for row in short]
    expected += [("dhc2", 0, 1, 0.25, 3.0), ("dhc2", 0, 2, 0.5, 2.0), ("dhc2", 0, 3, 0.75, 1.0)]
    expected += [("dhc2", 1, *row) for row in short]
    assert [tuple(row.values()) for row in read] == expected
    assert [*read[0]] == ["variant", "seed", "epoch", "val_top1", "train_loss"]

    for order in (read, read[::-1]):  # a seed may lack the first epoch, and come first
        top1, loss = draw_curves(order, outcome(seeds=[0, 1])).axes
        drawn = [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in top1.lines + loss.lines]
        assert drawn == [
            ("residual", [2], [50.0]),
            ("dhc2", [1, 2, 3], [25.0, 50.0, 75.0]),
            ("residual", [1, 2], [2.5, 1.23457]),
            ("dhc2", [1, 2, 3], [2.75, pytest.approx(1.617285), 1.0]),
        ]


def test_places_and_versions():
    one = {"device": "NVIDIA H100", "versions": {"Python": "3.12", "torch": "2.11"}, "revision": "abc+", "cells": 2}
    assert describe([one]) == ["- 2 cells on NVIDIA H100; Python 3.12, torch 2.11; revision abc+."]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_committed_reports_are_what_their_files_say(folder, tmp_path):
    for name in ("study.json", "results.csv", "curves.csv"):
        shutil.copy(folder / name, tmp_path)
    assert write_report(tmp_path).read_bytes() == (folder / "report.md").read_bytes()
    for name in (*read_study(folder).pictures, *(path.name for path in tmp_path.glob("*.png"))):
        assert (folder / name).is_file()
