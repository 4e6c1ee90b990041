"""Classes one by one: the numbers, the table and the picture."""

import csv
import json
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import randomize
from PIL import Image
from torchmetrics.classification import MulticlassStatScores

from hcvision.data.module import ImageData
from hcvision.data.relatives import read_real_labels
from hcvision.studies import evaluation
from hcvision.studies.evaluation import ClassReport, count_confusions, draw_confusion, lowest, rate_classes
from hcvision.studies.measuring import TensorMemory
from hcvision.training.classification import ImageClassifier
from hcvision.training.metrics import MacroAccuracy

MATRIX = torch.tensor([[3, 1, 0], [2, 2, 2], [0, 0, 0]])
NAMES = ["cat", "dog", "a\nb"]


def rows_of(matrix, names):
    """What a report says of the classes of a confusion matrix."""
    counts = torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], dim=1)
    rows = zip(rate_classes(counts, names), count_confusions(matrix, names), strict=True)
    return [rates | confusions for rates, confusions in rows]


def test_counts():
    """True classes are rows: 3 of 4 cats found, 3 of 5 taken for cats were some."""
    cat, dog, empty = rows_of(MATRIX, NAMES)
    assert (cat["images"], cat["accuracy"], cat["precision"], cat["f1"]) == (4, 0.75, 0.6, pytest.approx(6 / 9))
    assert (cat["taken for"], cat["times"]) == ("dog", 1)
    assert (dog["taken for"], dog["times"]) == ("cat", 2)
    assert (empty["images"], empty["taken for"], empty["times"]) == (0, "", 0)


def test_the_lowest_come_first_and_stay_on_their_line():
    lines = lowest(rows_of(MATRIX, NAMES))
    assert lines[0].startswith("| class  | images | accuracy | precision | f1")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [r"'a\nb'", "dog", "cat"]
    assert "33.3 %" in lines[3]
    many = lowest(rows_of(torch.eye(30, dtype=torch.long), [str(k) for k in range(30)]))
    assert len(many) == 23
    assert many[-1] == "the lowest 20 of 30 classes"


@pytest.mark.parametrize("classes", [3, 30, 100])
def test_the_picture(classes, tmp_path):
    """Names with signs that matplotlib would read as formulas, or that its font lacks, do no harm."""
    names = [["$x_", "猫", "a\nb"][k % 3] + str(k) for k in range(classes)]
    draw_confusion(torch.randint(9, (classes, classes)), names).savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.parametrize("multi_label", [False, True])
def test_report_of_a_test(image_folder, tmp_path, trainer_args, tiny, capsys, multi_label):
    files = sorted(image_folder.glob("*/*/*.png"))
    rows = ["file,label,split", *(f"{p},{p.parent.name},{p.parent.parent.name}" for p in files)]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = ImageData("csv", root=str(tmp_path / "t.csv"), batch_size=8, num_workers=0, multi_label=multi_label)
    model = ImageClassifier("vit_tiny_patch16_224", num_classes=3, model_args=tiny, multi_label=multi_label)
    randomize(model.model)
    trainer = pl.Trainer(**trainer_args, callbacks=[ClassReport(tmp_path / "test")])
    (scores,) = trainer.test(model, data)
    rows = read(tmp_path / "test" / "classes.csv")
    assert [(row["class"], row["images"]) for row in rows] == [(name, "13") for name in data.class_names]
    assert f"the classes are in {tmp_path / 'test'}" in capsys.readouterr().out
    if multi_label:
        mean = sum(float(row["average precision"]) for row in rows) / 3
        assert mean == pytest.approx(scores["test_map"], abs=1e-4)
        assert not (tmp_path / "test" / "confusion.png").exists()
        return
    assert sum(float(row["accuracy"]) for row in rows) / 3 == pytest.approx(scores["test_macro"], abs=1e-4)
    matrix = torch.tensor(
        [[int(row[name]) for name in data.class_names] for row in read(tmp_path / "test" / "confusion.csv")]
    )
    expected = torch.zeros(3, 3, dtype=torch.long)
    with torch.no_grad():
        for batch in data.test_dataloader():
            for true, predicted in zip(batch.targets, model.eval()(batch.images).argmax(1), strict=True):
                expected[true, predicted] += 1
    assert torch.equal(matrix, expected)
    about = json.loads((tmp_path / "test" / "about.json").read_text())
    assert about["data"] == str(tmp_path / "t.csv")
    assert (tmp_path / "test" / "confusion.png").is_file()


def test_many_classes(tmp_path, capsys, monkeypatch):
    """Of more classes than a confusion matrix is made for there are counts alone, the same, and a word about it."""

    def report(most):
        monkeypatch.setattr(evaluation, "MOST_CLASSES", most)
        module = SimpleNamespace(hparams={"num_classes": 3, "multi_label": False}, device="cpu")
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(reduce=lambda count, reduce_op: count),
            is_global_zero=True, ckpt_path=None,
            datamodule=SimpleNamespace(class_names=NAMES, root="data", chosen=None),
        )  # fmt: skip
        callback = ClassReport(tmp_path / str(most))
        callback.on_test_start(trainer, module)
        for true, taken in [(0, 0), (0, 1), (1, 1), (1, 1), (1, 0)]:
            callback.on_test_batch_end(trainer, module, (torch.eye(3)[[taken]], torch.tensor([true])), None, 0)
        callback.on_test_epoch_end(trainer, module)
        assert (tmp_path / str(most) / "confusion.csv").exists() == (most == 3)
        return [tuple(row.values()) for row in read(tmp_path / str(most) / "classes.csv")], capsys.readouterr().out

    (few, _), (many, said) = report(3), report(2)
    assert many == [row[:5] for row in few]
    assert many[1] == ("dog", "3", "0.6667", "0.6667", "0.6667")
    assert "3 are too many for a confusion matrix, which is made for up to 2" in said


def test_metrics_grow_with_the_classes():
    """Metrics of 5,000 classes: a table of all pairs would be 200 MB."""
    classes = 5000
    with TensorMemory() as memory:
        model = ImageClassifier("vit_tiny_patch16_224", num_classes=classes, model_args={"depth": 0, "img_size": 16})
        metrics = [model.val_metrics, model.test_metrics]
        logits = torch.zeros(2, classes)
        logits[[0, 1], [7, 4999]] = 1
        before = memory.now
        for metric in metrics:
            metric.update(logits, torch.tensor([7, 8]))
            assert metric.compute()[f"{metric.prefix}macro"] == 0.5
    assert memory.peak - before < 100 * 8 * classes


def test_macro():
    """The mean over the classes that have images, as torchmetrics has it, in batches, and of two processes together."""
    targets, logits = torch.tensor([0, 0, 1, 3, 3, 3]), torch.randn(6, 5)
    parts = [MacroAccuracy(5) for _ in range(2)]
    parts[0].update(logits[:2], targets[:2])
    parts[1].update(logits[2:], targets[2:])
    parts[0].update(logits[:0], targets[:0])
    whole = MacroAccuracy(5)
    for name in ("right", "images", "predicted"):
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    whole._update_count = 1
    right, *_, images = MulticlassStatScores(5, average=None)(logits, targets).double().unbind(-1)
    assert whole.compute() == (right / images)[images > 0].mean().float()
    assert MacroAccuracy(5)(logits, targets) == whole.compute()


def logits_of(model, loader):
    with torch.no_grad():
        batches = [(model.eval()(batch.images), batch.targets) for batch in loader]
    return (torch.cat(part) for part in zip(*batches, strict=True))


@pytest.mark.parametrize("other_logits", ["leave_out", "keep"])
def test_some_classes(image_folder, tmp_path, trainer_args, tiny, other_logits):
    """Only their images count; the model chooses among them, or among all. The report has them alone."""
    model = ImageClassifier("vit_tiny_patch16_224", num_classes=3, model_args=tiny)
    weight = torch.tensor([[1.0, 0, 0], [0.2, 0.9, 0.3], [0, 0, 1]])
    model.model.forward = lambda images: -4 * images.mean((2, 3)) @ weight.T + 3 * images[..., 2, 5]
    data = ImageData(
        root=str(image_folder), batch_size=8, num_workers=0, classes=["left-out", "zebra"], other_logits=other_logits
    )
    trainer = pl.Trainer(**trainer_args, callbacks=[ClassReport(tmp_path)])
    (scores,) = trainer.test(model, data)
    logits, targets = logits_of(model, data.test_dataloader())
    assert torch.equal(targets, torch.tensor([0] * 13 + [2] * 13))
    if other_logits == "leave_out":
        logits, targets = logits[:, [0, 2]], targets // 2
    assert 0 < scores["test_top1"] < 1
    assert scores["test_top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert scores["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert [(row["class"], row["images"]) for row in read(tmp_path / "classes.csv")] == [
        ("left-out", "13"),
        ("zebra", "13"),
    ]
    assert len(read(tmp_path / "confusion.csv")) == (2 if other_logits == "leave_out" else 3)


def test_several_right_labels(tmp_path, trainer_args, tiny):
    """As ReaL has them: an image is right in the first five if any of its labels is; those without any do not count."""
    real = read_real_labels()
    for number in range(16):
        Image.new("RGB", (8, 8), (16 * number, 80, 255 - 16 * number)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.png").rename(tmp_path / f"ILSVRC2012_val_{number + 1:08}.JPEG")
    with pytest.warns(UserWarning, match="16 of ImageNet's"):
        data = ImageData(root=str(tmp_path), relative="real", num_workers=0, batch_size=5)
    model = ImageClassifier("vit_tiny_patch16_224", num_classes=1000, model_args=tiny)
    wanted = [own[-1] for own in real[:16] if own]
    shift = torch.zeros(1000).index_fill(0, torch.tensor(wanted[:6]), 3.0)  # so that some of the images are right
    noise = torch.randn(3, 1000)
    model.model.forward = lambda images: images.mean((2, 3)) @ noise + shift
    logits, is_label = logits_of(model, data.val_dataloader())
    scored = [own for own in real[:16] if own]
    assert len(logits) == len(scored) < 16
    assert all(mask.nonzero().flatten().tolist() == sorted(own) for mask, own in zip(is_label, scored, strict=True))
    (scores,) = pl.Trainer(**trainer_args).test(model, data)
    for k in (1, 5):
        right = [bool({*own} & {*top}) for own, top in zip(scored, logits.topk(k).indices.tolist(), strict=True)]
        assert scores[f"test_top{k}"] == pytest.approx(sum(right) / len(right))
    assert scores["test_top5"] > 0
