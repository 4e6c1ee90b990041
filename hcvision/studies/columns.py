"""More columns for the report of a study of classifiers: what of a cell is measured at its end, beside top-1."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl

from hcvision.data import ImageData, check_name
from hcvision.studies.calibration import Calibration
from hcvision.studies.insight import StreamDiversity
from hcvision.studies.measuring import PRECISIONS
from hcvision.studies.probing import Protocol, check_data, collect
from hcvision.studies.statistics import Metric, Outcome

MOST = 20  # neighbours of the column knn


@dataclass(frozen=True)
class Column:
    """A column that a study may have: where it stands in results.csv and how it is shown, and what it is."""

    metric: Metric
    about: str


def share(name: str, heading: str, more_is_better: bool = True) -> Metric:
    """A metric in percent."""
    return Metric(name, heading, 100.0, unit="points", more_is_better=more_is_better, is_optional=True)


COLUMNS = {
    "nll": Column(
        Metric("val_loss", "NLL", digits=4, more_is_better=False, is_optional=True), "NLL: negative log-likelihood"
    ),
    "ece": Column(share("ece", "ECE %", False), "ECE: expected calibration error, 15 bins"),
    "scaled_ece": Column(
        share("scaled_ece", "scaled ECE %", False),
        "scaled ECE: the same of one half of the images, with the temperature that fits the other half",
    ),
    "brier": Column(
        Metric("brier", "Brier", digits=4, more_is_better=False, is_optional=True), "Brier: Brier score, 0 to 2"
    ),
    "macro": Column(share("macro", "macro %"), "macro: mean over classes of their accuracy"),
    "knn": Column(
        share("knn", "k-NN %"), f"k-NN: {MOST} nearest neighbours on frozen features, of all training images"
    ),
    "linear": Column(share("linear", "linear %"), "linear: a linear probe on frozen features"),
    "rank": Column(
        Metric("stream_rank", "rank", paired=False, is_optional=True),
        "rank: effective rank of the streams in the end, 1 to as many as there are, mean over tokens",
    ),
    "cosine": Column(
        Metric("stream_cosine", "cosine", digits=3, paired=False, is_optional=True),
        "cosine: mean cosine between two streams in the end",
    ),
}
CALIBRATED = ("ece", "scaled_ece", "brier")
PROBED = ("knn", "linear")
DIVERSE = ("rank", "cosine")
ENDING = ". All of the validation images; -: not recorded."  # of what a report says of columns


def check_columns(names: Sequence[str], several_devices: bool) -> None:
    """Raise ValueError for columns that are not there, named twice, or not to be had where a cell has more devices."""
    for name in names:
        check_name("column", name, COLUMNS)
    if len({*names}) < len(names):
        raise ValueError(f"columns must be different ones, got {list(names)}")
    alone = [name for name in names if name in PROBED + DIVERSE]
    if alone and several_devices:
        raise ValueError(f"the columns {', '.join(alone)} need cells of one device each")


def plan_probes(names: Sequence[str], seed: int) -> Protocol | None:
    """How the features of a cell of that seed are scored, or None."""
    probes = [name for name in PROBED if name in names]
    return Protocol(probes, neighbours=[MOST], seeds=[seed]) if probes else None


def check_column_data(names: Sequence[str], data: ImageData) -> None:
    """Raise ValueError where the images are too few for columns, before any cell trains."""
    if protocol := plan_probes(names, seed=0):
        check_data(data, protocol)


def validate_beside(
    study: Any, variant: str, module: Any, data: ImageData, *callbacks: pl.Callback
) -> dict[str, float]:
    """What a validation of a module gives, beside the training of a cell of that variant; callbacks look on."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "inference_mode": False, "callbacks": [*callbacks]}
    trainer = pl.Trainer(**{**study.trainer_arguments(variant), **quiet})
    return {name: float(value) for name, value in trainer.validate(module, data, verbose=False)[0].items()}


def measure_columns(
    study: Any, variant: str, seed: int, module: Any, data: ImageData, metrics: dict[str, float], precision: str
) -> dict[str, float | None]:
    """What the columns of a ``Study`` want to know of a trained cell, by the names in results.csv.

    Args:
        study: of the cell.
        variant: of the cell.
        seed: of the cell.
        module: the cell's, with the weights that are scored.
        data: the cell's.
        metrics: of its last validation.
        precision: of its trainer, as Lightning calls it: images pass through the module in it.
    """
    names = study.columns
    found: dict[str, float | None] = {"macro": metrics["val_macro"]} if "macro" in names else {}
    if wanted := [name for name in CALIBRATED if name in names]:
        logged = validate_beside(study, variant, module, data, Calibration())
        found |= {name: logged[f"val_{name}"] for name in wanted}
    if {*DIVERSE} & {*names}:
        diversity = StreamDiversity()
        validate_beside(study, variant, module, data, diversity)
        values = {"rank": diversity.rank, "cosine": diversity.cosine}
        found |= {COLUMNS[name].metric.name: values[name] for name in DIVERSE if name in names}
    if protocol := plan_probes(names, seed):
        precision = precision if precision in PRECISIONS else "32"
        train, held_out = (collect(module, data, split, study.device, precision) for split in ("train", "val"))
        scores = protocol.score(train, held_out, data.class_names or range(data.num_classes), study.device)
        found |= {name: scores[f"knn{MOST}" if name == "knn" else name] for name in PROBED if name in names}
    return found


def describe_columns(names: Sequence[str]) -> str:
    """What the reader of the table has to know of columns."""
    return "; ".join(COLUMNS[name].about for name in names) + ENDING


def show_columns(study: Outcome, names: Sequence[str]) -> Outcome:
    """A study that is done, with these columns in its report, in the place of those that it had.

    Raises:
        ValueError: a column that is not there, or is named twice.
    """
    check_columns(names, several_devices=False)
    own = [metric for metric in study.metrics if not metric.is_optional]
    more = [COLUMNS[name].metric for name in names]
    notes = [note for note in study.notes if not note.endswith(ENDING)] + [describe_columns(names)] * bool(names)
    return replace(study, metrics=[*own, *(m for m in more if m.name not in {o.name for o in own})], notes=notes)
