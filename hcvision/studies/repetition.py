"""A cell of a study once more, held against what was recorded."""

import statistics
from collections.abc import Callable
from pathlib import Path

from hcvision.data import check_name
from hcvision.studies.processes import helpers
from hcvision.studies.reporting import read_results, read_study
from hcvision.studies.statistics import predicted
from hcvision.studies.study import Study


def repeat_cell(study: Study, variant: str, seed: int, recorded: Path, say: Callable[[str], None] = print) -> bool:
    """Run one cell again, here, and compare it with what a study recorded.

    Args:
        study: it; its variants and seeds become those.
        variant: which.
        seed: any; that of a recorded cell should give the same again, on the same machine and versions.
        recorded: folder of the study, with its results.csv.
        say: called with the lines to print.

    Returns:
        Whether the first metric lands where 95 % of further runs are expected, by the recorded seeds.

    Raises:
        ValueError: the study has no such variant, or fewer than two recorded seeds of it.
    """
    check_name("variant", variant, study.variants)
    if not (recorded / "results.csv").is_file():
        raise ValueError(f"{recorded} holds no results.csv; --config names the config.yaml of a study with results")
    if study.read_result(variant, seed) is not None:
        raise ValueError(f"{study.cell_folder(variant, seed)} has been run already; --out names another folder")
    rows = {row["seed"]: row for row in read_results(recorded) if row["variant"] == variant}
    if len(rows) < 2:
        raise ValueError(f"{recorded} has {len(rows)} recorded seeds of {variant}; a spread needs two at least")
    if "match_time" in study.changes[variant]:  # for as many updates as those had
        study.matches = read_study(recorded).matched
    study.variants, study.seeds = [variant], [seed]
    study.check_settings()
    study.prepare()
    with study.display(say, study.cells) as say_beside, helpers(study, 1):
        study.run_cells(say_beside)
    again = study.read_result(variant, seed) or {}
    inside = []
    for metric in study.metrics:
        values = [row[metric.name] for row in rows.values()]
        mean, half = statistics.mean(values), predicted(values)
        inside.append(abs(again[metric.name] - mean) <= half)
        line = f"{metric.heading} {metric.show(again[metric.name])}"
        line += f", recorded with this seed {metric.show(rows[seed][metric.name])}" if seed in rows else ""
        line += f"; {len(values)} recorded seeds {metric.show(mean)} ± {metric.show(statistics.stdev(values))}"
        expected = f"{metric.show(mean - half)} to {metric.show(mean + half)}"
        say(f"{line}: {'within' if inside[-1] else 'OUTSIDE'} {expected}, where 95 % of further seeds are expected")
    return inside[0]
