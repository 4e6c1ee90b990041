"""A study: variants of one model trained side by side, with the same seeds, and a report."""

import contextlib
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout

from hcvision.connections import parse_connection
from hcvision.data import (
    ImageData,
    check_name,
    count_cores,
    first_difference,
    is_first_process,
    pick_device,
    write_csv,
    write_json,
)
from hcvision.studies.columns import (
    COLUMNS,
    check_column_data,
    check_columns,
    describe_columns,
    measure_columns,
    validate_beside,
)
from hcvision.studies.costs import measure_costs
from hcvision.studies.display import DONE, FIELDS, CellProgress, Display, empty_board
from hcvision.studies.matching import (
    MatchTime,
    ValidateLast,
    check_matches,
    describe_match,
    measure_matches,
    read_matches,
    take_length,
    updates_per_epoch,
)
from hcvision.studies.measuring import name_device
from hcvision.studies.processes import helpers, limit_threads
from hcvision.studies.reporting import read_curve, write_curves, write_report
from hcvision.studies.settings import FIXED, complete, defaults, describe_changes, environment, merge, span, write_yaml
from hcvision.studies.statistics import TOP1, Curve, Metric, Outcome
from hcvision.training import (
    ImageClassifier,
    StopCleanly,
    TimmModule,
    equip,
    keep_metrics,
    last_checkpoint,
    read_checkpoint,
)

RESERVED = ("lock", "classifier")  # names in a study's folder
Cell = tuple[str, int]
Changes = dict[str, Any]


class Study:
    """Train every variant with every seed and report: image classification.

    Args:
        out: folder of the study: a folder per cell, and report.md, its pictures, and what they are made from:
            config.yaml, study.json, results.csv, curves.csv.
        title: headline of the report.
        variants: connections to compare (``residual``, ``dhc2``, ...), or names of one's own and what each changes:
            ``connection``, and arguments of ``model`` and ``trainer``. Differences are to the first. ``match_time``
            names another variant, whose time it is trained for; without a connection it is the first variant then.
        seeds: of the initial weights, the order of the images and the augmentation.
        model: arguments of ``ImageClassifier``, without connection and num_classes.
        data: arguments of ``ImageData``, without seed.
        trainer: arguments of Lightning's Trainer.
        timing_rounds: rounds of the interleaved step-time measurement; 0 leaves it out.
        jobs: cells that train at the same time, each in a process of its own on the same device; ``auto`` is as many
            as there are CPU cores for cells that train on a CPU, and one on a GPU.
        columns: more columns of the report, measured when a cell ends: nll, ece, scaled_ece, brier, macro, knn, linear,
            rank, cosine.

    Raises:
        ValueError: an unknown variant, a change of something that is not there, a variant or seed named twice, or a
            folder with cells that were run with other settings, or a ``match_time`` that cannot be.
    """

    task = "classify"
    module: type[TimmModule] = ImageClassifier
    metrics: tuple[Metric, ...] = (TOP1,)
    recorded: tuple[str, ...] = ("start_top1", "top1", "top5", "val_loss", "train_loss")  # in results.csv
    curves: tuple[Curve, ...] = (Curve("val_top1", "validation top-1, %", 100.0), Curve("train_loss", "training loss"))
    measured = "top-1"

    def __init__(
        self,
        out: str,
        variants: list[str] | dict[str, Changes | None],
        seeds: list[int],
        model: dict[str, Any],
        data: dict[str, Any],
        trainer: dict[str, Any],
        title: str = "Connections compared",
        timing_rounds: int = 15,
        jobs: int | Literal["auto"] = "auto",
        columns: list[str] | None = None,
    ):
        for what, values in (("variants", [*variants]), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must be one or more different ones, got {values}")
        if data.get("multi_label") or model.get("multi_label"):
            raise ValueError("a study reports top-1, which images with several labels (multi_label) do not have")
        changes = variants if isinstance(variants, dict) else dict.fromkeys(variants)
        self.changes = {name: self.check_variant(name, change or {}) for name, change in changes.items()}
        several = None  # devices, where a cell has more than one
        for change in ({}, *self.changes.values()):
            count = merge(trainer, change.get("trainer")).get("devices", 1)
            several = several or (None if count in (1, "1") else count)
        if jobs != "auto" and (jobs < 1 or (jobs > 1 and several)):
            raise ValueError(
                f"jobs must be at least 1, and 1 where a run has several devices, got {jobs} with "
                f"devices={several or 1}"
            )
        self.columns = columns or []
        check_columns(self.columns, several is not None)
        self.out, self.title, self.variants, self.seeds = Path(out), title, [*changes], seeds
        self.model, self.data, self.trainer = model, data, trainer
        if jobs == "auto":
            together = several or trainer.get("num_nodes", 1) != 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
            jobs = 1 if together or self.device != "cpu" else count_cores()
        self.jobs = min(jobs, len(self.cells))
        if self.jobs > 1:
            self.trainer = {**trainer, "devices": 1}
        self.timing_rounds = timing_rounds
        # one thread a cell where there are enough cells
        self.threads = max(torch.get_num_threads() // self.jobs, 1)
        self.board: Any = empty_board(len(self.cells))  # how far the cells are: see Display
        self.lines: Any = None  # what they say, where it is shown
        self.more_settings: dict[str, Any] = {}
        self.matches: dict[str, dict[str, Any]] = {}  # what was measured for variants with match_time
        check_matches(self)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; what it shares with this one is handed over when it starts."""
        return {name: value for name, value in vars(self).items() if name not in ("board", "lines")}

    def changeable(self) -> dict[str, dict[str, Any]]:
        """Groups of arguments that a variant can change, and their defaults."""
        return {"model": defaults(self.module), "trainer": defaults(pl.Trainer)}

    def check_variant(self, name: str, changes: Changes) -> Changes:
        if not re.fullmatch(r"\w[\w.+-]*", name) or name in RESERVED:
            what = "another one" if name in RESERVED else "of letters, digits and any of .+-_"
            raise ValueError(f"a variant's name must be {what}, got {name!r}")
        known = self.changeable()
        unknown = {*changes} - {"connection", "match_time", *known}
        if unknown:
            *first, last = "connection", *known
            raise ValueError(f"variant {name} can change {', '.join(first)} and {last}, got {', '.join(unknown)}")
        if "connection" in changes or "match_time" not in changes:
            parse_connection(changes.get("connection", name))
        for group, names in known.items():
            given = changes.get(group) or {}
            if not isinstance(given, dict):
                raise ValueError(f"{group} of variant {name} must be arguments and their values, got {given!r}")
            for key in given:
                check_name(f"{group} argument (variant {name})", key, [n for n in names if n not in FIXED])
        return changes

    def all_changes(self, variant: str) -> Changes:
        """What a variant changes; one with ``match_time`` and no connection what the first variant does, before."""
        changes, first = self.changes[variant], next(iter(self.changes))
        if "match_time" in changes and "connection" not in changes:
            return merge({"connection": first, **self.changes[first]}, changes)
        return changes

    def connection(self, variant: str) -> str:
        return self.all_changes(variant).get("connection", variant)

    def model_arguments(self, variant: str) -> dict[str, Any]:
        return merge(self.model, self.all_changes(variant).get("model"))

    def trainer_arguments(self, variant: str) -> dict[str, Any]:
        """Arguments of Lightning's Trainer; with ``match_time`` the length is that of the variant that it names."""
        arguments = merge(self.trainer, self.all_changes(variant).get("trainer"))
        target = self.changes[variant].get("match_time")
        return arguments if target is None else take_length(arguments, self.trainer_arguments(target))

    def settings(self, variant: str) -> dict[str, Any]:
        """What a cell of a variant depends on, beside its seed."""
        return self.cost_settings(variant) | describe_match(self, variant)

    def cost_settings(self, variant: str) -> dict[str, Any]:
        """The same without what follows from measured costs."""
        own = {} if self.connection(variant) == variant else {"connection": self.connection(variant)}
        model, trainer = self.model_arguments(variant), self.trainer_arguments(variant)
        return complete(
            self.module, {"model": model, "data": self.data, "trainer": trainer, **own, **self.more_settings}
        )

    def cell_folder(self, variant: str, seed: int) -> Path:
        return self.out / variant / f"seed{seed}"

    @property
    def cells(self) -> list[Cell]:
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    @property
    def device(self) -> str:
        """Where steps are timed and samples are scored."""
        return "cpu" if self.trainer.get("accelerator") == "cpu" else pick_device()

    @property
    def timed_on(self) -> str:
        """The device and the threads that steps are timed on: those that a cell has."""
        with limit_threads(self.threads):
            return name_device(self.device)

    def build_model(self, variant: str, num_classes: int, seed: int) -> Any:
        return self.module(
            connection=self.connection(variant), num_classes=num_classes, **self.model_arguments(variant)
        )

    def run(self, say: Callable[[str], None] = print) -> Path:
        """Run what is missing and write the report. Returns the path of report.md."""
        self.matches = read_matches(self)
        self.check_settings()
        missing = [cell for cell in self.cells if self.read_result(*cell) is None]
        if missing:
            check_column_data(self.columns, ImageData(**self.data))  # what is wrong is said before anything is written
        if is_first_process() and missing:
            with self.lock():
                self.prepare()
                measure_matches(self, say)
        self.matches = read_matches(self, wait=bool(missing))
        with self.display(say, missing) as say_beside, helpers(self, min(self.jobs, len(missing))):
            self.run_cells(say_beside)
        if is_first_process():
            with self.lock():
                self.write(measure_costs(self, say))
                write_report(self.out)
        return self.out / "report.md"

    def lock(self) -> FileLock:
        """Held by a process that does what is done once per study: others that work on it wait."""
        return FileLock(self.out / "lock")

    @contextlib.contextmanager
    def display(self, say: Callable[[str], None], missing: list[Cell]) -> Iterator[Callable[[str], None]]:
        """Show how far the cells are, if progress bars are wanted. Gives what says a line beside the bars."""
        context = multiprocessing.get_context("spawn")
        self.board, self.lines = context.Array("d", empty_board(len(self.cells)), lock=False), None
        if not (self.shows_progress and missing and is_first_process()):
            yield say
            return
        self.lines = context.SimpleQueue()
        for number, cell in enumerate(self.cells):
            if cell not in missing:
                self.board[number * FIELDS] = DONE
        titles = [f"{variant} seed {seed}" for variant, seed in self.cells]
        count = f"{len(missing)} cell{'s' * (len(missing) > 1)}"
        several = f", {min(self.jobs, len(missing))} at a time" if min(self.jobs, len(missing)) > 1 else ""
        on = f" with {self.threads} thread{'s' * (self.threads > 1)} each" if self.device == "cpu" else ""
        say(f"training {count}{several}{on}; how long it takes is shown after the first steps")
        curve = self.curves[0]

        def show_score(value: float) -> str:
            return f"{curve.name} {curve.factor * value:.4g}"

        with Display(titles, self.board, self.jobs, self.lines, say, show_score):
            yield self.lines.put

    @property
    def shows_progress(self) -> bool:
        return self.trainer.get("enable_progress_bar") is not False

    def run_cells(self, say: Callable[[str], None] = print) -> None:
        """Run the cells that are missing and that no other process has, until all are done."""
        waiting, number = self.cells, {cell: place for place, cell in enumerate(self.cells, 1)}
        first = multiprocessing.parent_process() is None  # the one that says what was done before
        before = [cell for cell in waiting if first and self.read_result(*cell) is not None]
        while waiting:
            busy = []
            for cell in waiting:
                place, (variant, seed) = f"[{number[cell]}/{len(number)}]", cell
                done = self.read_result(variant, seed)
                if done is None:
                    with self.claim(cell) as mine:
                        if not mine:
                            busy.append(cell)
                            continue
                        done = self.read_result(variant, seed)  # or somebody was faster
                        if done is None:
                            say(f"{place} {variant}, seed {seed}")
                            done = self.run_cell(variant, seed)
                            self.board[(number[cell] - 1) * FIELDS] = DONE
                            say(f"{place} {variant}, seed {seed}: {self.show(done)}, {done['seconds']:.0f} s")
                            continue
                self.board[(number[cell] - 1) * FIELDS] = DONE
                if self.jobs == 1 or cell in before:
                    say(f"{place} {variant}, seed {seed}: done before, {self.show(done)}")
            if len(busy) == len(waiting):
                time.sleep(1)
            waiting = busy

    def show(self, result: dict[str, Any]) -> str:
        scored = [metric for metric in self.metrics if metric.name in result]  # the first process alone has scores
        return ", ".join(f"{metric.heading} {metric.show(result[metric.name])}" for metric in scored)

    @contextlib.contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether the cell is this process's to run; it is given back at the end, also that of a killed process.

        Raises:
            ValueError: several processes run a cell together, and others have it.
        """
        if not is_first_process():
            yield True
            return
        folder = self.cell_folder(*cell)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            if self.trainer.get("devices", 1) not in (1, "1"):
                raise ValueError(f"another process is running {folder}; wait for it, or stop it") from None
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def prepare(self) -> None:
        """What is needed before the first cell, in the first process alone."""

    def check_settings(self) -> None:
        for variant, seed in self.cells:
            path = self.cell_folder(variant, seed) / "settings.json"
            trained = last_checkpoint(path.parent) is not None or self.read_result(variant, seed) is not None
            if not path.is_file() or not trained:
                continue
            difference = first_difference(complete(self.module, json.loads(path.read_text())), self.settings(variant))
            if difference:
                raise ValueError(
                    f"{path.parent} was run with other settings ({difference}); "
                    f"give the study another folder (--out) or delete that one"
                )

    def read_result(self, variant: str, seed: int) -> dict[str, Any] | None:
        path = self.cell_folder(variant, seed) / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def run_cell(self, variant: str, seed: int) -> dict[str, Any]:
        folder, began, here = self.cell_folder(variant, seed), time.monotonic(), environment(self.device)
        pl.seed_everything(seed, workers=True, verbose=False)
        data = ImageData(**self.data, seed=seed)
        if self.data.get("num_workers") is None:  # cells that train at the same time share the cores
            data.num_workers = min(data.num_workers, max(count_cores() // self.jobs, 1))
        model = self.build_model(variant, data.num_classes, seed)
        data.prepare_data()
        model.check_data(data)
        if is_first_process():
            write_json(folder / "settings.json", self.settings(variant))
            write_yaml(folder / "config.yaml", self.run_config(variant, seed))
            keep_metrics(folder)
        quiet: dict[str, Any] = {"enable_model_summary": False, "num_sanity_val_steps": 0}
        arguments = {**quiet, **self.trainer_arguments(variant), "enable_progress_bar": False}  # the study shows it
        equipped = equip(folder, arguments, model.monitor)
        progress = CellProgress(self.board, self.cells.index((variant, seed)), self.curves[0].name)
        validated, matched = ValidateLast(), [MatchTime(self.matches[v]["ratio"]) for v in self.matches if v == variant]
        equipped["callbacks"] += [progress, validated, *matched]
        trainer = pl.Trainer(**equipped)
        checkpoint = last_checkpoint(folder)
        start = self.score_start(folder / "start.json", variant, model, data)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        last = last_checkpoint(folder)
        if last is not None:  # the averaged weights, also where nothing was left to train
            model.load_state_dict(read_checkpoint(last)["state_dict"])
        epochs: float = trainer.current_epoch
        steps, each = trainer.global_step, updates_per_epoch(trainer)
        if each is not None:  # a part of an epoch, where that is the last one
            epochs = steps // each if steps % each == 0 else round(steps / each, 4)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if validated.step != steps or model.monitor[0] not in metrics:
            metrics |= {name: float(value) for name, value in trainer.validate(model, data, verbose=False)[0].items()}
        if matched and is_first_process():
            write_yaml(folder / "config.yaml", self.run_config(variant, seed, matched[0].updates))
        losses = read_curve(folder, ["train_loss"])["train_loss"]
        result = {
            "variant": variant,
            "seed": seed,
            "start_top1": start,
            "val_loss": metrics["val_loss"],
            "train_loss": metrics.get("train_loss", losses[max(losses)] if losses else None),
            **self.score(folder, model, metrics),
            **measure_columns(self, variant, seed, model, data, metrics, str(trainer.precision)),
            "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "updates": steps,
            "epochs": epochs,
            "images": steps * data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            "seconds": round(time.monotonic() - began, 1),
            "environment": here,
        }
        if is_first_process():
            write_json(folder / "result.json", result)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StopCleanly) and callback.was_asked:
                callback.leave(f"stopped after {variant}, seed {seed}")
        return result

    def run_config(self, variant: str, seed: int, updates: int | None = None) -> dict[str, Any]:
        """A cell as a run: its folder is one, for `hcvision test`, `inspect`, `export`, ...

        ``updates`` is its length where that was measured.
        """
        length = {} if updates is None else {"max_epochs": -1, "max_steps": updates}
        model = {"connection": self.connection(variant), **self.model_arguments(variant)}
        about = {"task": self.task, "seed_everything": seed, "run": str(self.cell_folder(variant, seed))}
        return {
            **about,
            "model": model,
            "data": {**self.data, "seed": seed},
            "trainer": self.trainer_arguments(variant) | length,
        }

    def score(self, folder: Path, model: Any, metrics: dict[str, float]) -> dict[str, float | None]:
        """What the table wants to know of a trained cell."""
        return {"top1": metrics["val_top1"], "top5": metrics.get("val_top5")}

    def score_start(self, path: Path, variant: str, model: Any, data: ImageData) -> float | None:
        """Top-1 before the first step, for weights that come from somewhere (``init_from``, ``pretrained``)."""
        given = self.model_arguments(variant)
        if not (given.get("init_from") or given.get("pretrained")) or "start_top1" not in self.recorded:
            return None
        if not path.is_file():
            start = validate_beside(self, variant, model, data)["val_top1"]
            if not is_first_process():
                return start
            write_json(path, start)
        return json.loads(path.read_text())

    def write(self, costs: dict[str, dict[str, float]]) -> None:
        """Write what the report is made from: config.yaml, study.json, results.csv and curves.csv."""
        results = [self.read_result(*cell) or {} for cell in self.cells]
        shown = [COLUMNS[name].metric for name in self.columns]
        recorded = dict.fromkeys([*self.recorded, *(metric.name for metric in shown)])
        names = ("variant", "seed", *recorded, "parameters", "updates", "epochs", "images", "seconds")
        write_csv(self.out / "results.csv", [{name: result.get(name) for name in names} for result in results])
        ends = {cell: result["epochs"] for cell, result in zip(self.cells, results, strict=True)}
        write_curves(self.out, {cell: self.cell_folder(*cell) for cell in self.cells}, self.curves, ends)
        epochs, images = (span([result[name] for result in results]) for name in ("epochs", "images"))
        seeds = "s" * (len(self.seeds) > 1)
        sizes = ", ".join(f"{key} {value}" for key, value in (self.model.get("model_args") or {}).items())
        lead = f"{self.data.get('dataset', 'folder')}, {self.model['model']}{f' ({sizes})' if sizes else ''}, {epochs} "
        lead += f"epoch{'s' * (epochs != '1')}, {images} images each, seed{seeds} {', '.join(map(str, self.seeds))}"
        seen = Counter(json.dumps(result.get("environment"), sort_keys=True) for result in results)
        environments = [{**json.loads(one), "cells": count} for one, count in seen.items() if one != "null"]
        outcome = Outcome(
            self.title, self.variants, self.seeds, lead, self.measured, [*self.metrics, *shown], [*self.curves], costs,
            self.notes(), self.pictures(), environments, self.timed_on if costs else "", self.matches,
        )  # fmt: skip
        outcome.write(self.out)
        write_yaml(self.out / "config.yaml", self.config())

    def config(self) -> dict[str, Any]:
        """The study as a configuration of ``hcvision compare``."""
        settings = complete(self.module, {"model": self.model, "data": self.data, "trainer": self.trainer})
        listed = [*self.changes] if not any(self.changes.values()) else self.changes
        out = f"runs/{self.out.name}" if self.out.is_absolute() else str(self.out)
        about = {"title": self.title, "task": self.task, "out": out, "variants": listed, "seeds": self.seeds}
        more = {"columns": self.columns} if self.columns else {}
        return {**about, "timing_rounds": self.timing_rounds, **more, **settings}

    def notes(self) -> list[str]:
        """What the reader of the table has to know and its files do not say: what the variants are."""
        usual = complete(self.module, {"model": self.model, "data": self.data, "trainer": self.trainer})
        told = describe_changes(self.changes, self.connection, usual)
        return told + ([describe_columns(self.columns)] if self.columns else [])

    def pictures(self) -> dict[str, str]:
        """Pictures of the report beside its curves, drawn here: file names and what they show."""
        return {}
