"""Variants that are trained for the time of another one."""

import csv
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml

from hcvision.data import ImageData
from hcvision.studies import costs, matching
from hcvision.studies.matching import MatchTime, read_matches
from hcvision.studies.repetition import repeat_cell
from hcvision.studies.reporting import read_curve, read_study
from hcvision.studies.study import Study
from hcvision.training import ImageClassifier, StopCleanly, Stopped
from hcvision_command import main

TWINS = {"residual": {}, "dhc2": {}, "residual-time": {"match_time": "dhc2"}}


@pytest.fixture
def make(image_folder, tiny, tmp_path):
    """Studies of 9 updates an epoch, two epochs."""

    def build(**kwargs):
        arguments = {
            "out": str(tmp_path / "study"),
            "variants": TWINS,
            "seeds": [0],
            "model": {"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3},
            "data": {"root": str(image_folder), "dataset": "folder", "batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
            "timing_rounds": 2,
            "jobs": 1,
        }
        return Study(**{**arguments, **kwargs})

    return build


@pytest.fixture
def timed(monkeypatch):
    """Steps take what the test says, in place of a measurement; holds what was measured."""
    took = SimpleNamespace(times={"residual": 2.0, "dhc2": 2.8, "dfc2": 5.0}, names=[], look=lambda: None)

    def measure(names, build, rounds, device):
        took.look()
        took.names.append(names)
        return {name: [took.times[name]] * rounds for name in names}, dict.fromkeys(names, 1.0)

    monkeypatch.setattr(costs, "measure", measure)
    return took


def quiet(_):
    pass


def read_csv(path):
    return [*csv.DictReader(path.read_text().splitlines())]


def results_of(out):
    return {(row["variant"], int(row["seed"])): row for row in read_csv(out / "results.csv")}


def scores_of(study, variant):
    """What the last checkpoint of a cell scores."""
    model = study.build_model(variant, 3, 0)
    path = study.cell_folder(variant, 0) / "checkpoints" / "last.ckpt"
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    quietly = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", inference_mode=False, **quietly)
    (scores,) = trainer.validate(model, ImageData(**study.data, seed=0), verbose=False)
    return scores


def test_a_twin_trains_for_the_time_of_its_variant(make, timed, monkeypatch, tmp_path, image_folder, capsys):
    """2.8 / 2.0 of 18 updates are 25.2: 25 of them, 2 epochs of 9 and 7 / 9 of one, with the whole schedule."""
    study, rates = make(), []

    def before_any_cell():
        assert torch.get_num_threads() == study.threads
        assert not [*study.out.glob("*/seed*")]

    def note(self, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])

    timed.look = before_any_cell
    monkeypatch.setattr(ImageClassifier, "on_before_optimizer_step", note)
    said = []
    out = study.run(said.append).parent
    assert timed.names == [["residual", "dhc2"]]  # once; the twin's step is that of residual
    (line,) = [line for line in said if "residual-time has" in line]
    assert line == f"residual-time has the time of dhc2: 1.4 x its updates, as timed on {study.timed_on}"
    rows = results_of(out)
    lengths = {variant: (row["updates"], row["epochs"], row["images"]) for (variant, _), row in rows.items()}
    assert lengths == dict.fromkeys(("residual", "dhc2"), ("18", "2", "144")) | {
        "residual-time": ("25", "2.7778", "200")
    }
    # a cosine over 25 updates: the last one has what is left one step before its end
    assert len(rates) == 18 + 18 + 25
    assert rates[36:] == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)])

    # scored after the last update, in the middle of an epoch
    cell = out / "residual-time" / "seed0"
    scores = scores_of(study, "residual-time")
    assert float(rows["residual-time", 0]["val_loss"]) == pytest.approx(scores["val_loss"], abs=1e-6)
    assert [*read_curve(cell, ["val_top1"])["val_top1"]] == [0, 1, 2]  # in training, where best.ckpt is chosen
    curves = [row for row in read_csv(out / "curves.csv") if row["variant"] == "residual-time"]
    assert [row["epoch"] for row in curves] == ["1", "2", "2.7778"]
    assert float(curves[-1]["val_top1"]) == pytest.approx(float(rows["residual-time", 0]["top1"]), abs=1e-5)

    # recorded: in the cell's settings and configuration, and in the report
    assert json.loads((cell / "settings.json").read_text())["match_time"] == {"variant": "dhc2", "ratio": 1.4}
    config = yaml.safe_load((cell / "config.yaml").read_text())
    assert (config["model"]["connection"], config["trainer"]["max_steps"]) == ("residual", 25)
    about = {"variant": "dhc2", "ratio": 1.4, "timed_on": study.timed_on}
    assert read_study(out).matched == {"residual-time": about}
    assert yaml.safe_load((out / "config.yaml").read_text())["variants"] == TWINS
    text = (out / "report.md").read_text()
    assert "2 to 2.78 epochs, 144 to 200 images each" in text
    assert f"25 updates (2.78 epochs), 1.40 x those of dhc2, the ratio of their step times on {study.timed_on}" in text
    difference = 100 * (float(rows["dhc2", 0]["top1"]) - float(rows["residual-time", 0]["top1"]))
    assert re.search(
        rf"^\| dhc2 +\| {re.escape(f'{difference:+z.2f}')} +\| at the end, minus residual-time", text, re.M
    )

    # it goes on with what was measured, whatever a step takes now
    timed.times, timed.look = {"residual": 1.0, "dhc2": 9.0}, lambda: None
    for name in ("residual-time/seed0", "costs.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(timing_rounds=3).run(quiet)
    again = results_of(out)["residual-time", 0]
    assert {**again, "seconds": ""} == {**rows["residual-time", 0], "seconds": ""}
    assert read_study(out).costs["dhc2"]["time"] == 9.0
    assert read_study(out).matched == {"residual-time": about}

    # and a cell that is run again elsewhere has the recorded number of updates
    with (out / "results.csv").open("a") as file:
        file.write(",".join(str(again[name] if name != "seed" else 1) for name in again) + "\n")
    assert repeat_cell(make(out=str(tmp_path / "again")), "residual-time", 0, out, said.append)
    assert json.loads((tmp_path / "again" / "residual-time" / "seed0" / "result.json").read_text())["updates"] == 25


def test_equal_steps_give_the_first_variant_again(make, timed):
    """A ratio of 1: the same run, whatever else the first variant changes; and in any order of cells."""
    timed.times["dhc2"] = timed.times["wide"] = 2.0
    wide = {"connection": "residual", "model": {"lr": 2e-3, "model_args": {"mlp_ratio": 5.0}}}
    out = make(variants={"wide": wide, "dhc2": {}, "time": {"match_time": "dhc2"}}).run(quiet).parent
    rows = results_of(out)
    assert rows["time", 0]["val_loss"] == rows["wide", 0]["val_loss"] != rows["dhc2", 0]["val_loss"]
    assert rows["time", 0]["parameters"] == rows["wide", 0]["parameters"]
    assert (rows["time", 0]["updates"], rows["time", 0]["epochs"]) == ("18", "2")


def test_what_a_twin_is(make):
    """Its own connection and changes, and of the other variant the length alone."""
    variants = {
        "residual": {"model": {"lr": 2e-3}},
        "dhc2": {"model": {"lr": 5e-3}, "trainer": {"max_epochs": 7, "precision": "bf16-mixed"}},
        "plain": {"match_time": "dhc2", "model": {"weight_decay": 0.2}},
        "shc2-time": {"match_time": "dhc2", "connection": "shc2"},
    }
    study = make(variants=variants)
    assert [study.connection(variant) for variant in variants] == ["residual", "dhc2", "residual", "shc2"]
    assert study.model_arguments("plain") == {**study.model, "lr": 2e-3, "weight_decay": 0.2}
    assert study.model_arguments("shc2-time") == study.model
    assert study.trainer_arguments("plain") == {**study.trainer, "max_epochs": 7}
    assert study.settings("plain")["match_time"] == {"variant": "dhc2", "ratio": "not measured"}
    assert "match_time" not in study.cost_settings("plain")
    assert study.settings("dhc2") == study.cost_settings("dhc2")
    assert "match_time" not in " ".join(study.notes())


def test_the_ratio_is_of_the_two_variants(make, timed):
    """5.0 / 2.8, whatever the first one takes; one that joins later is measured then, and the other one stays."""
    study = make(variants={**TWINS, "dfc2": {}, "dhc2-time": {"match_time": "dfc2", "connection": "dhc2"}})
    matching.measure_matches(study, quiet)
    found = {name: about["ratio"] for name, about in read_matches(study).items()}
    assert found == {"residual-time": 1.4, "dhc2-time": 1.7857}
    timed.times = {"residual": 1.0, "dhc2": 1.5, "dfc2": 3.0}
    more = make(variants={**study.changes, "late": {"match_time": "dfc2"}})
    assert {*read_matches(more)} == {"residual-time", "dhc2-time"}
    matching.measure_matches(more, quiet)
    assert {name: about["ratio"] for name, about in read_matches(more).items()} == {**found, "late": 3.0}
    deeper = make(model={**more.model, "model_args": {**more.model["model_args"], "depth": 3}})
    assert read_matches(deeper) == {}  # of other models


def test_a_lost_ratio_is_no_other_one(make, timed):
    """Of cells that have been trained by it."""
    study = make()
    matching.measure_matches(study, quiet)
    study.matches = read_matches(study)
    folder = study.cell_folder("residual-time", 0)
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(study.settings("residual-time")))
    (folder / "result.json").write_text("{}")
    study.check_settings()
    (study.out / "match_time.json").unlink()
    with pytest.raises(ValueError, match=r"\(match_time.ratio is 1.4 there and 'not measured' here\)"):
        make().run(quiet)


def test_other_processes_wait_for_the_first(make, timed, monkeypatch):
    study, waited = make(), []
    study.out.mkdir(parents=True)

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            matching.measure_matches(study, quiet)

    monkeypatch.setattr(matching.time, "sleep", sleep)
    assert read_matches(study, wait=True)["residual-time"]["ratio"] == 1.4
    assert len(waited) == 2
    assert read_matches(make(variants=["residual", "dhc2"]), wait=True) == {}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_twin_that_was_stopped_goes_on(make, timed, monkeypatch):
    """In the middle of its last epoch; the end is that of one which was not stopped."""
    variants = {"residual": {}, "dhc2": {}, "time": {"match_time": "dhc2"}}
    study = make(variants=variants)
    matching.measure_matches(study, quiet)
    study.matches = read_matches(study)
    folder = study.cell_folder("time", 0)
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(StopCleanly, "is_wanted", lambda self, trainer: trainer.global_step == 22)
        with pytest.raises(Stopped):
            study.run_cell("time", 0)
    assert not (folder / "result.json").exists()
    ended = study.run_cell("time", 0)
    shutil.rmtree(folder)
    folder.mkdir()
    whole = study.run_cell("time", 0)
    assert (ended["updates"], ended["epochs"], ended["images"]) == (25, 2.7778, 200)
    no_part = {"seconds": 0, "train_loss": 0}  # the loss of an epoch is that of its batches since
    assert ended | no_part == whole | no_part


@pytest.mark.parametrize(
    ("trainer", "epochs", "updates"),
    [
        ({"max_epochs": -1, "max_steps": 11}, 1.2222, 11),  # in the middle of an epoch
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, 3, 27),  # an epoch behind the last validation
        ({"max_epochs": 2, "accumulate_grad_batches": 2, "max_steps": 8}, 1.6, 8),  # of 5 updates an epoch
    ],
)
def test_a_cell_is_scored_after_its_last_update(make, trainer, epochs, updates):
    study = make(variants=["residual"], timing_rounds=0, trainer={"accelerator": "cpu", **trainer})
    result = study.run(quiet) and study.read_result("residual", 0)
    assert (result["epochs"], result["updates"]) == (epochs, updates)
    assert result["val_loss"] == pytest.approx(scores_of(study, "residual")["val_loss"], abs=1e-6)
    points = [row for row in read_csv(study.out / "curves.csv") if row["val_top1"]]
    assert float(points[-1]["epoch"]) == epochs


@pytest.mark.parametrize(
    ("theirs", "ratio", "accumulate", "batches", "updates", "epochs"),
    [
        (18, 1.4, 1, 9, 25, 3),  # 25.2
        (18, 1.43, 1, 9, 26, 3),  # 25.74
        (10, 1.4, 2, 9, 14, 3),  # of 5 updates an epoch
        (18, 0.5, 1, 9, 9, 1),
        (18, 0.01, 1, 9, 1, 1),
        (100, 1.5, 1, float("inf"), 150, -1),  # a stream, and max_steps
    ],
)
def test_numbers_of_updates(theirs, ratio, accumulate, batches, updates, epochs):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(max_steps=-1), max_epochs=2)
    trainer = SimpleNamespace(
        estimated_stepping_batches=theirs,
        accumulate_grad_batches=accumulate,
        num_training_batches=batches,
        fit_loop=loop,
    )
    match = MatchTime(ratio)
    match.setup(trainer, None, "fit")
    assert (match.updates, loop.epoch_loop.max_steps, loop.max_epochs) == (updates, updates, epochs)


@pytest.mark.parametrize("theirs", [-1, float("inf")])
def test_a_run_of_unknown_length_has_no_twin(theirs):
    with pytest.raises(ValueError, match="match_time needs a known number of updates; max_steps of the matched"):
        MatchTime(1.5).setup(SimpleNamespace(estimated_stepping_batches=theirs), None, "fit")


def twin(own=None, other=None, **changes):
    return {"variants": {"residual": {}, "dhc2": other or {}, "time": {"match_time": "dhc2", **(own or {}), **changes}}}


WRONG = [
    (twin(match_time="dhc4"), "unknown variant in match_time of time: 'dhc4'; did you mean dhc2"),
    (twin(match_time=None), "unknown variant in match_time of time: 'None'"),
    (twin(match_time="time"), "match_time of time must be a variant with a length of its own, got time"),
    (
        {"variants": {**TWINS, "more": {"match_time": "residual-time"}}},
        "match_time of more must be a variant with a length of its own, got residual-time",
    ),
    ({"variants": {"a": {"match_time": "dhc2", "connection": "residual"}, "dhc2": {}}}, "a is the first variant, "),
    (twin(connection="dhc"), "connection must be 'residual', "),
    ({"timing_rounds": 0}, "match_time of residual-time needs step times; timing_rounds must be at least 1, got 0"),
    (twin(trainer={"max_steps": 3}), "time has its length from match_time; trainer.max_steps cannot be given too"),
    (twin(trainer={"max_epochs": 3}), "time has its length from match_time; trainer.max_epochs cannot be given too"),
    (twin(trainer={"max_time": "00:01:00:00"}), "time has its length from match_time; trainer.max_time cannot"),
    (twin(other={"trainer": {"max_time": "00:01:00:00"}}), "counts the updates of dhc2, which max_time leaves open"),
    (twin(other={"trainer": {"max_epochs": -1}}), "match_time of time needs an end of dhc2: max_epochs or max_steps"),
    (
        twin(other={"trainer": {"accumulate_grad_batches": 2}}),
        "time and dhc2 must have the same trainer.accumulate_grad_batches for match_time, got None and 2",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


def test_the_command_says_it_before_anything_starts(make, tmp_path, image_folder, capsys):
    config = {**make().config(), "timing_rounds": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        main(
            ["compare", f"--config={tmp_path / 'config.yaml'}", f"--data.root={image_folder}", f"--out={tmp_path}/new"]
        )
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "timing_rounds must be at least 1, got 0" in line
    assert not (tmp_path / "new").exists()
