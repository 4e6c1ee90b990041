"""Variants that train for the time of another one: which may, for how many updates, and by which measured ratio.

``variants: {residual-time: {match_time: dhc2}}`` is the first variant trained for as many updates as the time of
``dhc2`` allows: the updates of ``dhc2`` times the ratio of its step time to that of ``residual-time``. It is a run of
that length, with the whole of its learning-rate schedule.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from hcvision.data import check_name, write_json
from hcvision.studies.costs import measure_costs

LENGTHS = ("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time")  # of a run, by Lightning's names
SAME = ("accumulate_grad_batches", "limit_train_batches", "overfit_batches", "devices", "num_nodes")  # for both
UNKNOWN = "not measured"


def check_matches(study: Any) -> None:
    """Whether every time-matched variant of a ``Study`` has one whose time it can have.

    Raises:
        ValueError: it has not.
    """
    first = next(iter(study.changes))
    for name, changes in study.changes.items():
        if "match_time" not in changes:
            continue
        target = changes["match_time"]
        check_name(f"variant in match_time of {name}:", str(target), [*study.changes])
        if name == first:
            raise ValueError(f"{name} is the first variant, which others are compared with; it takes no match_time")
        if "match_time" in study.changes[target]:
            raise ValueError(f"match_time of {name} must be a variant with a length of its own, got {target}")
        if study.timing_rounds < 1:
            raise ValueError(
                f"match_time of {name} needs step times; timing_rounds must be at least 1, got {study.timing_rounds}"
            )
        given = [key for key in LENGTHS if key in (changes.get("trainer") or {})]
        if given:
            raise ValueError(f"{name} has its length from match_time; trainer.{given[0]} cannot be given too")
        mine, theirs = study.trainer_arguments(name), study.trainer_arguments(target)
        if theirs.get("max_time") is not None:
            raise ValueError(f"match_time of {name} counts the updates of {target}, which max_time leaves open")
        if theirs.get("max_epochs") == -1 and theirs.get("max_steps", -1) == -1:
            raise ValueError(f"match_time of {name} needs an end of {target}: max_epochs or max_steps")
        for key in SAME:
            if mine.get(key) != theirs.get(key):
                raise ValueError(
                    f"{name} and {target} must have the same trainer.{key} for match_time, "
                    f"got {mine.get(key)} and {theirs.get(key)}"
                )


def take_length(arguments: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer with the length of another one's run."""
    own = {key: value for key, value in arguments.items() if key not in LENGTHS}
    return own | {key: value for key, value in theirs.items() if key in LENGTHS}


def find_twins(study: Any) -> dict[str, str]:
    """The time-matched variants of a ``Study``, and whose time each has."""
    return {name: changes["match_time"] for name, changes in study.changes.items() if "match_time" in changes}


def describe_match(study: Any, variant: str) -> dict[str, Any]:
    """What the cells of a time-matched variant depend on beside its other settings; nothing of another variant."""
    target, ratio = study.changes[variant].get("match_time"), study.matches.get(variant, {}).get("ratio", UNKNOWN)
    return {} if target is None else {"match_time": {"variant": target, "ratio": ratio}}


def read_matches(study: Any, wait: bool = False) -> dict[str, dict[str, Any]]:
    """What was measured for the time-matched variants when their study began, so that it goes on with the same.

    Args:
        study: a ``Study``.
        wait: until it is there, which the first of several processes measures.

    Returns:
        By variant the one whose time it has (``variant``), the ``ratio`` of updates, and where it was ``timed_on``.
    """
    path: Path = study.out / "match_time.json"
    while True:
        kept = json.loads(path.read_text()) if path.is_file() else {}
        found = {}
        for name, target in find_twins(study).items():
            about = dict(kept.get(name, {}))
            if about.pop("settings", None) == find_settings(study, name, target):
                found[name] = about
        if not wait or {*found} == {*find_twins(study)}:
            return found
        time.sleep(0.5)


def find_settings(study: Any, *variants: str) -> list[dict[str, Any]]:
    """What a measurement is of."""
    return [study.cost_settings(variant) for variant in variants]


def measure_matches(study: Any, say: Callable[[str], None]) -> None:
    """Measure what ``read_matches`` reads, where it is not known yet: with nothing of the study beside."""
    found, wanted = read_matches(study), find_twins(study)
    if {*found} == {*wanted}:
        return
    costs = measure_costs(study, say)
    for name, target in wanted.items():
        if name not in found:
            ratio = round(costs[target]["time"] / costs[name]["time"], 4)
            found[name] = {"variant": target, "ratio": ratio, "timed_on": study.timed_on}
            say(f"{name} has the time of {target}: {ratio:g} x its updates, as timed on {study.timed_on}")
    settings = {name: {"settings": find_settings(study, name, target)} for name, target in wanted.items()}
    write_json(study.out / "match_time.json", {name: found[name] | settings[name] for name in wanted})


class MatchTime(Callback):
    """Has a run whose trainer says the length of another variant's train for the time of that one.

    Args:
        ratio: of the other's step time to that of this run.
    """

    def __init__(self, ratio: float):
        self.ratio, self.updates = ratio, 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the optimizer and its schedule are made, which ask the trainer how many updates there will be.

        Raises:
            ValueError: the other variant's run has no known number of updates.
        """
        if stage != "fit":
            return
        theirs = trainer.estimated_stepping_batches
        if not 0 < theirs < float("inf"):
            raise ValueError("match_time needs a known number of updates; max_steps of the matched variant sets one")
        self.updates = max(round(theirs * self.ratio), 1)
        each = updates_per_epoch(trainer)
        trainer.fit_loop.epoch_loop.max_steps = self.updates
        trainer.fit_loop.max_epochs = -1 if each is None else math.ceil(self.updates / each)


class ValidateLast(Callback):
    """Has a run validate after its last update, also where ``max_steps`` ends it in the middle of an epoch.

    So that the best checkpoint is chosen among all of them. ``step`` says whether it did.
    """

    def __init__(self) -> None:
        self.step = -1  # updates before the last validation

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates then, as where a run stops early

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step


def updates_per_epoch(trainer: pl.Trainer) -> int | None:
    """Updates of a whole epoch; None where it has no known length, as a stream has."""
    batches = trainer.num_training_batches
    return None if batches == float("inf") else math.ceil(batches / trainer.accumulate_grad_batches)
