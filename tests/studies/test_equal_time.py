"""What a report says of variants at equal time, from its CSV files."""

import csv

import pytest

from hcvision.studies.equal_time import compare_at_equal_time, find_reached, interpolate
from hcvision.studies.figures import draw_differences
from hcvision.studies.reporting import findings, write_curves, write_report
from hcvision.studies.statistics import TOP1, Curve, Metric, Outcome, count_comparisons

CURVES = [Curve("val_top1", "validation top-1, %", 100.0), Curve("train_loss", "training loss")]
LOSS = Metric("val_loss", "val loss", digits=4, more_is_better=False)
POINTS = [(100.0, 0.2), (200.0, 0.6), (400.0, 0.7)]
MATCH = {"variant": "dhc2", "ratio": 1.6, "timed_on": "a CPU"}


def outcome(variants, seeds=(0, 1), metrics=(TOP1,), curves=CURVES, costs=None, **kwargs):
    about = ("Title", [*variants], [*seeds], "folder, vit", "top-1", [*metrics], [*curves], costs or {})
    return Outcome(*about, **kwargs)


def costs(**times):
    return {variant: {"time": time, "memory": 1.0} for variant, time in times.items()}


def cell(variant, seed, top1, epochs=4, images=400, **more):
    return {"variant": variant, "seed": seed, "top1": top1, "epochs": epochs, "images": images, **more}


def curve(variant, seed, *values, name="val_top1"):
    return [{"variant": variant, "seed": seed, "epoch": epoch, name: v} for epoch, v in enumerate(values, 1)]


def table_of(lines):
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    head, _, *rows = table
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_curves_are_linear_between_evaluations():
    assert interpolate(POINTS, 150.0) == pytest.approx(0.4)
    assert interpolate(POINTS, 350.0) == pytest.approx(0.675)
    assert [interpolate(POINTS, images) for images in (100.0, 200.0, 400.0)] == pytest.approx([0.2, 0.6, 0.7])
    assert [interpolate(POINTS, images) for images in (99.0, 401.0)] == [None, None]
    assert interpolate([], 1.0) is None


def test_when_a_curve_is_as_good():
    assert find_reached(POINTS, 0.5, more_is_better=True) == (pytest.approx(175.0), "")
    assert find_reached(POINTS, 0.6, more_is_better=True) == (pytest.approx(200.0), "")
    assert find_reached(POINTS, 0.2, more_is_better=True) == (100.0, "≥ ")
    assert find_reached(POINTS, 0.8, more_is_better=True) == (400.0, "< ")
    falling = [(images, -value) for images, value in POINTS]
    assert find_reached(falling, -0.5, more_is_better=False) == (pytest.approx(175.0), "")
    assert find_reached(falling, -0.8, more_is_better=False) == (400.0, "< ")


RESULTS = [
    cell("residual", 0, 0.50), cell("residual", 1, 0.60),
    cell("dhc2", 0, 0.70), cell("dhc2", 1, 0.68),
    cell("fast", 0, 0.7, parameters=1), cell("fast", 1, 0.7),
]  # fmt: skip
ROWS = [
    *curve("dhc2", 1, 0.30, 0.40, 0.50, 0.68), *curve("dhc2", 0, 0.10, 0.20, 0.60, 0.70),
    *curve("fast", 0, 0.1, 0.5, 0.6, 0.7), *curve("fast", 1, 0.1, 0.5, 0.6, 0.7),
    *curve("residual", 0, 0.1, 0.2, 0.3, 0.5), *curve("residual", 1, 0.1, 0.2, 0.3, 0.6),
]  # fmt: skip


def test_what_curves_say():
    """400 images of residual's time are 250 of dhc2's: halfway from epoch 2 to 3, 0.40 and 0.45, minus 0.50, 0.60.

    dhc2's mean curve is 0.2, 0.3, 0.55, 0.69: as good as 0.55 after 300 images, which cost 480 of residual's.
    """
    study = outcome(("residual", "dhc2", "fast"), costs=costs(residual=1.0, dhc2=1.6, fast=0.8))
    lines = compare_at_equal_time(RESULTS, ROWS, study)
    half = 12.7062 * 2.5  # t of one degree of freedom times 0.05 / sqrt(2) / sqrt(2), in points
    assert table_of(lines) == [
        {
            "variant": "dhc2",
            "at equal time": f"-12.50 [{-12.5 - half:.2f}, {-12.5 + half:+.2f}]",
            "read": "after 2.50 of 4 epochs, minus residual",
            "speed-up": "0.83 x",
        },
        # as good as 0.55 after 250 images, at 0.8 the time; the first one's time is longer than its own run
        {"variant": "fast", "at equal time": "-", "read": "-", "speed-up": "2.00 x"},
    ]
    text = "\n".join(lines)
    assert "its learning rate had not come down yet, and so unfavourable to it" in text
    assert "Speed-up: the time of residual" in text
    assert lines[-1] == ""


def test_one_seed_has_no_interval():
    study = outcome(("residual", "dhc2"), seeds=(1,), costs=costs(residual=1.0, dhc2=1.6))
    (row,) = table_of(compare_at_equal_time(RESULTS[1:4:2], ROWS, study))
    assert row["at equal time"] == "-15.00"
    assert row["speed-up"] == f"{400 / (355.56 * 1.6):.2f} x"  # 0.6 lies (0.1 / 0.18) of an epoch behind the third


@pytest.mark.parametrize(
    ("time", "images", "equal", "speed"),
    [
        (1.0, 400, "-", "1.33 x"),  # as fast
        (0.5, 400, "-", "2.67 x"),
        (3.9, 400, "-45.00", "0.34 x"),  # just behind the first evaluation
        (4.1, 400, "-", "0.33 x"),  # before it
        (1.6, 200, "-", "1.67 x"),  # its run was half as long, and ended before
    ],
)
def test_where_a_curve_says_nothing(time, images, equal, speed):
    study = outcome(("residual", "dhc2"), seeds=(0,), costs=costs(residual=1.0, dhc2=time))
    results = [cell("residual", 0, 0.55), cell("dhc2", 0, 0.7, images=images)]
    (row,) = table_of(compare_at_equal_time(results, curve("dhc2", 0, 0.09, 0.2, 0.55, 0.7), study))
    assert (row.get("at equal time", "-").split(" ")[0][:4], row["speed-up"]) == (equal[:4], speed)


@pytest.mark.parametrize(("goal", "speed"), [(0.8, "< 0.50 x"), (0.05, "≥ 2.00 x")])
def test_bounds_of_a_speed_up(goal, speed):
    study = outcome(("residual", "dhc2"), seeds=(0,), costs=costs(residual=1.0, dhc2=2.0))
    results = [cell("residual", 0, goal), cell("dhc2", 0, 0.7)]
    (row,) = table_of(compare_at_equal_time(results, curve("dhc2", 0, 0.09, 0.2, 0.55, 0.7), study))
    assert row["speed-up"] == speed


def test_nothing_is_said_where_nothing_is_known():
    known = {"costs": costs(residual=1.0, dhc2=1.6)}
    assert compare_at_equal_time(RESULTS[:4], ROWS, outcome(("residual", "dhc2"))) == []  # what steps cost
    assert compare_at_equal_time(RESULTS[:4], [], outcome(("residual", "dhc2"), **known)) == []  # curves
    assert compare_at_equal_time(RESULTS[:2], ROWS, outcome(("residual",), costs=costs(residual=1.0))) == []
    score = Metric("distance", "FID", more_is_better=False)  # of samples drawn at the end
    generation = outcome(("residual", "dhc2"), metrics=(score, LOSS), curves=[Curve("val_loss", "loss")], **known)
    losses = [{**row, "val_loss": row["val_top1"]} for row in ROWS]
    results = [{**row, "distance": 1.0, "val_loss": 1.0} for row in RESULTS[:4]]
    assert compare_at_equal_time(results, losses, generation) == []


MATCHED = [
    *RESULTS[:4],
    *(cell("residual-time", seed, top1, 6.4, 640, updates=1234) for seed, top1 in ((1, 0.64), (0, 0.65))),
]


def test_a_time_matched_twin_is_compared_with():
    """Differences 5 and 4 points: 4.5 ± 12.7062 / 2. Curves are not read for what is known better."""
    variants = ("residual", "dhc2", "residual-time")
    study = outcome(variants, costs=costs(residual=1, dhc2=1.6, **{"residual-time": 1}), matched={variants[2]: MATCH})
    lines = compare_at_equal_time(MATCHED, ROWS, study)
    assert table_of(lines) == [
        {
            "variant": "dhc2",
            "at equal time": "+4.50 [-1.85, +10.85]",
            "read": "at the end, minus residual-time",
            "speed-up": "0.83 x",
        }
    ]
    text = "\n".join(lines)
    assert (
        "residual-time was trained for the time of dhc2, with a whole schedule of its own: 1,234 updates (6.4 epochs), "
        "1.60 x those of dhc2, the ratio of their step times on a CPU, measured before it trained." in text
    )
    assert "unfavourable" not in text.partition("Speed-up")[0]
    said = findings(MATCHED, study)
    assert "at equal time: dhc2 not told apart from residual-time [-1.85, +10.85]" in said
    assert said[-1].endswith("where the 3 of them share the 5 %")  # two to residual, one to the twin
    (axes,) = draw_differences(MATCHED, study).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dhc2", "residual-time", "dhc2, at equal time"]
    (low, _), (high, _) = axes.containers[2].lines[2][0].get_segments()[0]
    assert [low, high] == pytest.approx([4.5 - 12.7062 / 2, 4.5 + 12.7062 / 2], rel=1e-5)


def test_one_seed_of_a_twin_gives_no_verdict():
    variants = ("residual", "dhc2", "residual-time")
    study = outcome(variants, seeds=(0,), matched={"residual-time": MATCH})
    results = [row for row in MATCHED if row["seed"] == 0]
    (row,) = table_of(compare_at_equal_time(results, [], study))
    assert row == {"variant": "dhc2", "at equal time": "+5.00", "read": "at the end, minus residual-time"}
    assert findings(results, study) == []


def test_twins_of_a_generation_study_have_every_paired_metric():
    """Scores are of the end, where twins can be compared: 1.02 ± 12.7062 * 0.02 less, which is better."""
    score = Metric("distance", "FID", more_is_better=False)
    study = outcome(("residual", "dhc2", "twin"), metrics=(score, LOSS), curves=[], matched={"twin": MATCH})
    values = {"residual": (9.0, 9.5), "dhc2": (7.0, 7.02), "twin": (8.0, 8.06)}
    results = [
        {**cell(v, seed, None), "distance": value, "val_loss": value / 100, "updates": 1}
        for v, both in values.items() for seed, value in enumerate(both)
    ]  # fmt: skip
    (row,) = table_of(compare_at_equal_time(results, [], study))
    assert row["FID at equal time"] == "-1.02 [-1.27, -0.77]"
    assert row["val loss at equal time"] == "-0.0102 [-0.0127, -0.0077]"
    assert count_comparisons(results, study) == 6
    said = findings(results, study)
    assert [line.partition(" [")[0] for line in said if "equal" in line] == [
        "FID at equal time: dhc2 perhaps better than twin",
        "val loss at equal time: dhc2 perhaps better than twin",
    ]


def test_the_first_of_several_twins_counts():
    twice = {"a-time": MATCH, "b-time": {**MATCH, "ratio": 1.7}, "c-time": {**MATCH, "variant": "dfc2"}}
    assert outcome(("residual", "dhc2", "dfc2", *twice), matched=twice).twins == {"dhc2": "a-time", "dfc2": "c-time"}


def test_reports_have_the_table_below_theirs(tmp_path):
    study = outcome(("residual", "dhc2", "fast"), costs=costs(residual=1.0, dhc2=1.6, fast=0.8))
    study.write(tmp_path)
    for name, rows in (("results", [{**row, "parameters": 10, "start_top1": ""} for row in RESULTS]), ("curves", ROWS)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    text = write_report(tmp_path).read_text()
    places = [text.index(part) for part in ("| top-1 %", "Step time (", "| at equal time", "![")]
    assert places == sorted(places)
    assert "0.83 x" in text
    assert "\n\n\n" not in text


def test_the_last_point_of_a_curve_may_be_within_an_epoch(tmp_path):
    """The validation behind an end, of a cell that was killed there, belongs to the last epoch."""
    (tmp_path / "metrics.csv").write_text("epoch,val_top1\n0,0.25\n1,0.5\n2,0.625\n3,0.75\n")
    cells = {("a", 0): tmp_path, ("b", 0): tmp_path, ("c", 0): tmp_path}
    write_curves(tmp_path, cells, CURVES[:1], {("a", 0): 2.25, ("b", 0): 4})
    with (tmp_path / "curves.csv").open() as file:
        found = [(row["variant"], row["epoch"], row["val_top1"]) for row in csv.DictReader(file)]
    assert found == [
        ("a", "1", "0.25"), ("a", "2", "0.5"), ("a", "2.25", "0.75"),
        *((v, str(epoch), value) for v in "bc" for epoch, value in enumerate(("0.25", "0.5", "0.625", "0.75"), 1)),
    ]  # fmt: skip
