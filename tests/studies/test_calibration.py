"""Calibration by hand: ECE and Brier score of known probabilities, the temperature, the halves, what is written."""

import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from hcvision.data.module import ImageData
from hcvision.studies import calibration
from hcvision.studies.calibration import (
    BrierScore,
    Calibration,
    KeptLogits,
    fit_temperature,
    fits_temperature,
    make_ece,
)
from hcvision.studies.records import RecordScores, add_line, read_lines, tabulate
from hcvision.training.classification import ImageClassifier


class Module(torch.nn.Module):
    """What metrics ask of a module."""

    device = torch.device("cpu")

    def __init__(self, classes):
        super().__init__()
        self.hparams = {"num_classes": classes, "multi_label": False}


def test_ece_by_hand():
    """Two bins of 15 are met: three images at 0.62 of which one is right, and one at 0.9 that is right."""
    metric = make_ece(Module(2))
    metric.update(torch.tensor([[0.62, 0.38]] * 3 + [[0.1, 0.9]]), torch.tensor([0, 1, 1, 1]))
    assert metric.compute().item() == pytest.approx(3 / 4 * (0.62 - 1 / 3) + 1 / 4 * (1 - 0.9), abs=1e-7)


def test_brier_by_hand():
    """0.3^2 + 0.2^2 + 0.1^2, and 2 for an image whose probability is all elsewhere; in batches."""
    metric = BrierScore()
    metric.update(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(0.14, abs=1e-7)
    metric.update(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([2]))
    assert metric.compute().item() == pytest.approx(2.14 / 2, abs=1e-7)


def test_temperature_by_hand():
    """Logits (a, 0) that are right three times of four want a / T = ln 3, in one part or in several."""
    logits, targets = torch.tensor([[5.0, 0.0]] * 4), torch.tensor([0, 0, 1, 0])
    expected = 5 / math.log(3)
    assert fit_temperature(lambda: [(logits, targets)]) == pytest.approx(expected, rel=1e-9)
    assert fit_temperature(lambda: [(logits[:1], targets[:1]), (logits[1:], targets[1:])]) == pytest.approx(expected)
    assert fit_temperature(lambda: [(logits, 0 * targets)]) == pytest.approx(1 / 100, rel=1e-6)  # always right
    assert fit_temperature(lambda: [(logits, 0 * targets + 1)]) == pytest.approx(100, rel=1e-6)  # never


def test_the_temperature_is_the_best_one():
    """Of many classes: no other one has a smaller negative log-likelihood."""
    logits = 3 * torch.randn(200, 7)
    targets = (logits / 2).softmax(1).multinomial(1)[:, 0]
    best = fit_temperature(lambda: [(logits, targets)])
    losses = [F.cross_entropy(logits.double() / (best * factor), targets).item() for factor in (0.999, 1, 1.001)]
    assert losses[1] < min(losses[0], losses[2])


def test_halves():
    """One of each pair, neither the first nor the second of all, by a seed; the same whatever the batches are."""
    fits = fits_temperature(torch.arange(5000))
    assert torch.equal(fits[::2], ~fits[1::2])
    assert 0.45 < fits[::2].double().mean() < 0.55
    assert torch.equal(torch.cat([fits_temperature(torch.arange(5000)[k::3]) for k in range(3)]).sort().values,
                       fits.sort().values)  # fmt: skip
    assert torch.equal(fits_temperature(torch.tensor([4001, 7])), fits[[4001, 7]])
    assert not torch.equal(fits, fits_temperature(torch.arange(5000), seed=1))


def test_logits_that_are_kept(monkeypatch):
    """The largest is 0, those left out stay finite, and there are no more than there may be, spread over all images."""
    kept = KeptLogits()
    kept.add(torch.arange(2), torch.tensor([[1e5, 1e5 - 2.5, -math.inf], [1.0, 3.0, 2.0]]), torch.tensor([1, 0]))
    rows = torch.cat([logits for fits in (True, False) for logits, _ in kept.half(fits)])
    assert sorted(rows.tolist()) == sorted([[0.0, -2.5, -29996.0 - 4], [-2.0, 0.0, -1.0]])
    monkeypatch.setattr(calibration, "MOST_LOGITS", 100)
    kept = KeptLogits()
    for k in range(50):
        kept.add(torch.arange(10 * k, 10 * k + 10), torch.zeros(10, 2), torch.zeros(10, dtype=torch.long))
    numbers = torch.cat([part[0] for part in kept.parts])
    assert kept.count() <= 100
    assert kept.every == 16
    assert numbers.tolist() == [n for n in range(500) if n // 2 % 16 == 0]


def take_the_darkest(images):
    """Logits of the three classes, which lack a colour, with the noise of single pixels: often right, too sure."""
    return 24 * images[..., 4, 9] - 31 * images.mean((2, 3))


def score(tmp_path, image_folder, trainer_args, tiny, batch_size=8, **more):
    data = ImageData("folder", root=str(image_folder), batch_size=batch_size, num_workers=0, **more)
    model = ImageClassifier("vit_tiny_patch16_224", connection="dhc2", num_classes=3, model_args=tiny)
    model.model.forward = take_the_darkest
    trainer = pl.Trainer(**trainer_args, callbacks=[Calibration(), RecordScores(tmp_path / "test")])
    (scores,) = trainer.test(model, data, verbose=False)
    return model, data, scores


def expected_ece(probabilities, targets):
    """By the definition: bins of a 15th, left edge included; the gap of confidence and accuracy, weighted by images."""
    confidence, taken = probabilities.max(1)
    total, bins = 0.0, np.floor(confidence.numpy() * 15).clip(max=15)
    for number in np.unique(bins):
        own = torch.tensor(bins == number)
        gap = confidence[own].mean() - (taken == targets)[own].float().mean()
        total += own.float().mean().item() * abs(gap.item())
    return total


def test_scores_of_a_test(image_folder, tmp_path, trainer_args, tiny, capsys):
    """All of them from the logits of the model, by their definitions; batches do not matter."""
    model, data, scores = score(tmp_path, image_folder, trainer_args, tiny)
    with torch.no_grad():
        batches = [(model.eval()(batch.images), batch.targets) for batch in data.test_dataloader()]
    logits, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    p = logits.softmax(1)
    assert scores["test_ece"] == pytest.approx(expected_ece(p, targets), abs=1e-6)
    assert scores["test_brier"] == pytest.approx((p - F.one_hot(targets, 3)).square().sum(1).mean().item(), abs=1e-6)
    assert scores["test_loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    fits = fits_temperature(torch.arange(len(targets)))
    t = scores["test_temperature"]
    grid = [F.cross_entropy(logits[fits] / (t * f), targets[fits]).item() for f in (0.98, 1, 1.02)]
    assert grid[1] < min(grid[0], grid[2])
    held_out = logits[~fits], targets[~fits]
    assert scores["test_half_nll"] == pytest.approx(F.cross_entropy(*held_out).item(), rel=1e-3)  # kept in float16
    assert scores["test_scaled_nll"] == pytest.approx(F.cross_entropy(held_out[0] / t, held_out[1]).item(), rel=1e-3)
    scaled = (held_out[0] / t).softmax(1)
    assert scores["test_scaled_ece"] == pytest.approx(expected_ece(scaled, held_out[1]), abs=2e-3)
    other = score(tmp_path, image_folder, trainer_args, tiny, batch_size=5)[2]
    assert {name: pytest.approx(value, rel=1e-4) for name, value in scores.items()} == other
    capsys.readouterr()


def test_the_line_of_a_test(image_folder, tmp_path, trainer_args, tiny, capsys):
    """It says what was tested and every number; the same test again takes its place."""
    for _ in range(2):
        _, _, scores = score(tmp_path, image_folder, trainer_args, tiny)
    (line,) = [json.loads(text) for text in (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()]
    about = {"model": "vit_tiny_patch16_224", "connection": "dhc2", "weights": "raw", "images": 39, "split": "val"}
    assert line.items() >= about.items()
    assert line["data"] == str(image_folder)
    assert line["nll"] == pytest.approx(scores["test_loss"])
    names = {"top1", "macro", "ece", "brier", "temperature", "half_nll", "half_ece", "scaled_nll", "scaled_ece"}
    assert {name: line[name] for name in names} == {name: pytest.approx(scores[f"test_{name}"]) for name in names}
    shown = capsys.readouterr().out
    assert f"the scores are in {tmp_path / 'test' / 'metrics.jsonl'}" in shown
    assert f"{100 * line['top1']:.2f} %" in shown


def test_lines(tmp_path):
    """Another checkpoint or other data get a line of their own; a file of something else is not overwritten."""
    path = tmp_path / "a" / "metrics.jsonl"
    line = {"model": "m", "connection": "dhc2", "checkpoint": "a", "weights": "raw", "data": "x/y", "variant": ""}
    add_line(path, line | {"top1": 0.5})
    add_line(path, line | {"variant": "v2", "top1": 0.25})
    lines = add_line(path, line | {"top1": 0.75})
    assert [(one["variant"], one["top1"]) for one in lines] == [("v2", 0.25), ("", 0.75)]
    assert read_lines(path) == lines
    table = tabulate([*lines, line | {"connection": "residual", "nll": 1.5}])
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "model",
        "connection",
        "data",
        "images",
        "top1",
        "nll",
    ]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == ["m", "dhc2", "y v2", "-", "25.00 %", "-"]
    assert [cell.strip() for cell in table[4].split("|")[1:-1]][1:] == ["residual", "y", "-", "-", "1.5000"]
    path.write_text("no lines")
    with pytest.raises(ValueError, match="is not what a test writes"):
        add_line(path, line)
    assert path.read_text() == "no lines"


def test_several_labels(image_folder, tmp_path, trainer_args, tiny, capsys):
    """There is no calibration then, and the line has what there is."""
    files = sorted(image_folder.glob("*/*/*.png"))
    rows = ["file,label,split", *(f"{p},{p.parent.name},{p.parent.parent.name}" for p in files)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = ImageData("csv", root=str(tmp_path / "t.csv"), batch_size=8, num_workers=0, multi_label=True)
    model = ImageClassifier("vit_tiny_patch16_224", num_classes=3, model_args=tiny, multi_label=True)
    trainer = pl.Trainer(**trainer_args, callbacks=[Calibration(), RecordScores(tmp_path / "test", "a file")])
    (scores,) = trainer.test(model, data, verbose=False)
    (line,) = read_lines(tmp_path / "test" / "metrics.jsonl")
    assert {*scores} == {"test_loss", "test_map", "test_f1"}
    assert (line["loss"], line["map"]) == pytest.approx((scores["test_loss"], scores["test_map"]))
    assert (line["connection"], line["checkpoint"]) == ("residual", "a file")
    assert "nll" not in line
    capsys.readouterr()
