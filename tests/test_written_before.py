"""Runs, a study and an exported model that an earlier version wrote, when hcvision was one flat folder: all go on.

``written_before/`` was made by commit c655de5 with images that ``conftest.write_folder`` draws (6 of each class for
training, 3 for validation); the paths in its checkpoints are relative. A model there is 12 wide and one block deep.
"""

import csv
import json
import shutil
from pathlib import Path

import conftest
import pytest
import timm
import torch
import yaml

import hcvision
from hcvision_command import main

WRITTEN = Path(__file__).parent / "written_before"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with copies of what was written, and with the images."""
    place = tmp_path / "here"
    shutil.copytree(WRITTEN, place)
    conftest.write_folder(place / "images", train=6, val=3)
    monkeypatch.chdir(place)
    return place


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_run_goes_on(here, capsys):
    """With its callback, whose class had another place then, its averaged weights and its optimizer's state."""
    before = torch.load("vit/checkpoints/last.ckpt", weights_only=True)
    assert yaml.safe_load(Path("vit/config.yaml").read_text())["trainer"]["callbacks"][0]["class_path"] == (
        "hcvision.insight.LogConnections"
    )
    main(["fit", "--config", "vit/config.yaml", "--resume", "true", "--trainer.max_epochs", "3"])
    assert "resuming vit from vit/checkpoints/last.ckpt" in capsys.readouterr().out
    after = torch.load("vit/checkpoints/last.ckpt", weights_only=True)
    assert (before["epoch"], after["epoch"], after["global_step"]) == (1, 2, 6)
    assert [*after["state_dict"]] == [*before["state_dict"]]
    epochs = [row["epoch"] for path in sorted(here.glob("vit/metrics*.csv")) for row in rows(path) if row["val_loss"]]
    assert sorted(epochs) == ["0", "1", "2"]
    assert (here / "vit" / "connections" / "stage0-step000006.csv").is_file()


def test_a_run_is_scored_as_it_was(here, capsys):
    """The recorded loss of the last epoch."""
    main(["validate", "--config", "vit/config.yaml", "--ckpt_path", "last"])
    recorded = [row for row in rows(here / "vit" / "metrics.csv") if row["val_loss"]][-1]
    assert recorded["val_loss"][:6] in capsys.readouterr().out


def test_a_run_predicts_and_is_inspected(here):
    main(["predict", "vit", "images/val", "--out", "predictions.csv", "--device", "cpu"])
    recorded = [row for row in rows(here / "vit" / "metrics.csv") if row["val_top1"]][-1]
    named = rows(here / "predictions.csv")
    right = sum(row["class"] == Path(row["file"]).parent.name for row in named)
    assert right / len(named) == pytest.approx(float(recorded["val_top1"]), abs=1e-6)
    main(["inspect", "vit", "--out", "inside", "--device", "cpu"])
    assert (here / "inside" / "matrix.csv").is_file()


def test_a_diffusion_run_draws(here):
    main(["sample", "dit", "--out", "drawn", "--number", "3", "--steps", "2", "--accelerator", "cpu"])
    assert (here / "drawn" / "samples.png").is_file()


def test_an_exported_model_is_timms(here):
    model = timm.create_model("local-dir:exported", pretrained=True).eval()
    own = torch.load("vit/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    state = model.state_dict()
    assert {f"model.{name}" for name in state} == set(own)
    assert isinstance(model.blocks[0].connection1, hcvision.HyperConnection)
    assert json.loads(Path("exported/config.json").read_text())["architecture"] == "vit_tiny_patch16_224_dhc2"


def test_a_study_is_not_run_again(here, capsys, monkeypatch):
    """Its cells count as done, and its report is written as it was, but for who wrote it."""
    monkeypatch.setattr("hcvision.studies.Study.run_cell", lambda *_: pytest.fail("ran a finished cell again"))
    before = Path("study/report.md").read_text()
    main(["compare", "--config", "study.yaml"])
    assert Path("study/report.md").read_text() == before
    main(["report", "study"])
    assert Path("study/report.md").read_text() == before
