"""More columns of a study's report: measured when a cell ends, paired as top-1 is, absent from cells without them."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hcvision.data.module import ImageData
from hcvision.studies.columns import COLUMNS
from hcvision.studies.generation import GenerationStudy
from hcvision.studies.probing.features import collect
from hcvision.studies.probing.neighbours import predict_by_neighbours
from hcvision.studies.reporting import findings, read_results, report, table, write_report
from hcvision.studies.statistics import TOP1, Curve, Outcome, count_comparisons
from hcvision.studies.study import Study
from hcvision.training.checkpoints import last_checkpoint
from hcvision.training.loading import load_module

RESULTS = Path(__file__).parents[2] / "docs" / "results"
METRICS = {name: column.metric for name, column in COLUMNS.items()}


def outcome(variants, *columns, **more):
    metrics = [TOP1, *(METRICS[name] for name in columns)]
    return Outcome("Title", [*variants], [0, 1, 2], "about", "top-1", metrics, [Curve("val_top1", "%")], {}, **more)


def rows(**values):
    """Per variant the top-1 by seed, and the ECE by seed; None is none."""
    return [
        {"variant": v, "seed": seed, "top1": top1[seed], "ece": ece[seed], "parameters": 10}
        for v, (top1, ece) in values.items()
        for seed in range(3)
    ]


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


TOP = ((0.5, 0.6, 0.7), (0.52, 0.61, 0.72), (0.48, 0.59, 0.68))


def test_a_column_is_paired_and_may_be_absent():
    """0.04, 0.02, 0.04 less is better, by Student's t; a variant with a cell without it has none, and no verdict."""
    results = rows(
        residual=(TOP[0], (0.10, 0.11, 0.12)), dhc2=(TOP[1], (0.06, 0.09, 0.08)), old=(TOP[2], (0.05, None, 0.05))
    )
    study = outcome(("residual", "dhc2", "old"), "ece")
    head, _, *lines = map(cells_of, table(results, study))
    assert head == ["variant", "top-1 %", "minus residual", "ECE %", "minus residual", "parameters"]
    assert lines[0][3:5] == ["11.00 ± 1.00", ""]
    # differences -4, -2, -4: mean -3.333, standard deviation 1.155, half the interval 4.3027 * 1.155 / sqrt(3) = 2.868
    assert lines[1][3:5] == ["7.67 ± 1.53", "-3.33 [-6.20, -0.46]"]
    assert lines[2][3:5] == ["-", "-"]
    assert lines[2][2] != "-"
    assert count_comparisons(results, study) == 3
    said = findings(results, study)
    assert "ECE %: perhaps better than residual: dhc2 [-6.20, -0.46]" in said
    assert not any("ECE" in line and "old" in line for line in said[:-1])
    assert "(top-1 %, points; ECE %, points; Student's t, 3 seeds)" in said[-1]


def test_a_column_that_no_cell_has_changes_no_verdict():
    results = rows(residual=(TOP[0], (None,) * 3), dhc2=(TOP[1], (0.1, 0.1, 0.1)))
    with_it, without = outcome(("residual", "dhc2"), "ece"), outcome(("residual", "dhc2"))
    assert findings(results, with_it) == findings(results, without)
    assert count_comparisons(results, with_it) == 1
    assert [cells_of(line)[3:5] for line in table(results, with_it)[2:]] == [["-", ""], ["10.00 ± 0.00", "-"]]


def test_studies_of_before_are_drawn_again_with_columns(tmp_path):
    """From committed files: the negative log-likelihood stands in them, the calibration error does not."""
    folder = tmp_path / "study"
    shutil.copytree(RESULTS / "fashion_mnist", folder)
    content = json.loads((folder / "study.json").read_text())
    report(str(folder), ["nll", "ece"])
    text = (folder / "report.md").read_text()
    assert "\n\nNLL: negative log-likelihood; ECE: " in text
    lines = [cells_of(line) for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    place = lines[0].index("NLL")
    losses = [row["val_loss"] for row in read_results(folder) if row["variant"] == "residual"]
    assert lines[1][place] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert {line[lines[0].index("ECE %")] for line in lines[1 : 1 + len(content["variants"])]} == {"-"}
    report(str(folder), ["nll"])  # instead of those, and what a report is made from keeps them
    text = (folder / "report.md").read_text()
    assert "NLL" in text
    assert "ECE" not in text
    assert write_report(folder).read_text() == text
    report(str(folder), [])
    assert "NLL" not in (folder / "report.md").read_text()
    assert json.loads((folder / "study.json").read_text())["notes"] == content["notes"]
    with pytest.raises(ValueError, match="unknown column 'nnl'"):
        report(str(folder), ["nnl"])


@pytest.fixture
def make(image_folder, tiny, tmp_path):
    def build(**kwargs):
        arguments = {
            "out": str(tmp_path / "study"), "variants": ["residual", "dhc2"], "seeds": [3],
            "model": {"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3, "ema_decay": 0.5},
            "data": {"root": str(image_folder), "batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            "timing_rounds": 0, "jobs": 1, "columns": [*COLUMNS],
        }  # fmt: skip
        return Study(**{**arguments, **kwargs})

    return build


def test_columns_are_measured_when_a_cell_ends(make, image_folder, tmp_path, monkeypatch):
    """By their definitions from what the cell's checkpoint says; settings are as without; cells keep them."""
    study = make()
    assert study.settings("dhc2") == make(columns=None).settings("dhc2")
    out = study.run(say=lambda _: None).parent
    result = json.loads((out / "dhc2" / "seed3" / "result.json").read_text())
    module, _ = load_module(last_checkpoint(out / "dhc2" / "seed3"))
    data = ImageData(root=str(image_folder), batch_size=8, num_workers=0)
    (train, labels), (features, targets) = (collect(module, data, split, "cpu") for split in ("train", "val"))
    p = module.model.get_classifier()(features).detach().softmax(1)
    assert result["brier"] == pytest.approx((p - F.one_hot(targets, 3)).square().sum(1).mean().item(), abs=1e-5)
    assert result["val_loss"] == pytest.approx(F.nll_loss(p.log(), targets).item(), abs=1e-5)
    confidence, taken = p.max(1)
    bins, right = (confidence * 15).long(), (taken == targets).float()
    gaps = [
        (bins == b).float().mean() * (confidence[bins == b].mean() - right[bins == b].mean()).abs()
        for b in bins.unique()
    ]
    assert result["ece"] == pytest.approx(float(sum(gaps)), abs=1e-5)
    assert 0 <= result["scaled_ece"] <= 1
    voted = predict_by_neighbours(features, train, labels, 3, (20,))[20]
    assert result["knn"] == pytest.approx((voted == targets).double().mean().item())
    assert result["macro"] == pytest.approx(np.mean([right[targets == k].mean() for k in range(3)]))
    assert result["linear"] > 0.5
    assert 1 <= result["stream_rank"] < 1.2  # they are hardly told apart yet
    assert 0.9 < result["stream_cosine"] <= 1
    residual = json.loads((out / "residual" / "seed3" / "result.json").read_text())
    assert (residual["stream_rank"], residual["stream_cosine"]) == (1, None)
    (row,) = [row for row in csv.DictReader((out / "results.csv").read_text().splitlines()) if row["variant"] == "dhc2"]
    assert float(row["knn"]) == result["knn"]
    text = (out / "report.md").read_text()
    assert all(f" {metric.heading} " in text for metric in METRICS.values())
    assert "k-NN: 20 nearest neighbours on frozen features" in text

    monkeypatch.setattr(Study, "run_cell", lambda *_: pytest.fail("trained a finished cell again"))
    measured = {*METRICS, "stream_rank", "stream_cosine"}
    for cell in out.glob("*/seed3/result.json"):
        known = json.loads(cell.read_text())
        cell.write_text(json.dumps({name: value for name, value in known.items() if name not in measured}))
    text = make().run(say=lambda _: None).read_text()
    (line,) = [cells_of(line) for line in text.splitlines() if line.startswith("| dhc2 ")]
    assert line.count("-") == 2 * 6 + 2
    assert "columns" not in (out / "study.json").read_text()


def test_columns_that_cannot_be(make, tmp_path, tiny_dit, image_folder):
    for arguments, message in [
        ({"columns": ["nnl"]}, "unknown column 'nnl'; did you mean nll?"),
        ({"columns": ["ece", "ece"]}, "columns must be different ones"),
        ({"columns": ["knn"], "trainer": {"devices": 2, "accelerator": "cpu"}}, "columns knn need cells of one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**arguments)
    few = make(data={"root": str(image_folder), "batch_size": 8, "num_workers": 0, "train_samples": 12})
    with pytest.raises(ValueError, match="neighbours must be at most 12, the training images, got 20"):
        few.run(say=lambda _: None)
    assert not (tmp_path / "study").exists()
    dit = {"model": "dit_tiny_patch4_pixel", "model_args": tiny_dit}
    with pytest.raises(ValueError, match="columns are for classification"):
        GenerationStudy(str(tmp_path), columns=["ece"], variants=["dhc2"], seeds=[0], model=dit, data={}, trainer={})


def test_features_are_in_the_precision_of_the_cell(make, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hcvision.studies.columns.collect",
        lambda module, data, split, device, precision: (
            seen.append(precision) or (torch.randn(72, 4), torch.arange(72) % 3)
        ),
    )
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "precision": "bf16-mixed"}
    make(variants=["dhc2"], columns=["knn"], trainer=trainer).run(say=lambda _: None)
    assert seen == ["bf16-mixed"] * 2
