"""Classes one by one: the numbers, the table and the picture."""

import csv
import json

import pytest
import pytorch_lightning as pl
import torch
from conftest import randomize
from PIL import Image

from hcvision.data import ImageData
from hcvision.evaluation import ClassReport, count_confusions, draw_confusion, lowest
from hcvision.training import ImageClassifier

MATRIX = torch.tensor([[3, 1, 0], [2, 2, 2], [0, 0, 0]])
NAMES = ["cat", "dog", "a\nb"]


def test_counts():
    """True classes are rows: 3 of 4 cats found, 3 of 5 taken for cats were some."""
    cat, dog, empty = count_confusions(MATRIX, NAMES)
    assert (cat["images"], cat["accuracy"], cat["precision"], cat["f1"]) == (4, 0.75, 0.6, pytest.approx(6 / 9))
    assert (cat["taken for"], cat["times"]) == ("dog", 1)
    assert (dog["taken for"], dog["times"]) == ("cat", 2)
    assert (empty["images"], empty["taken for"], empty["times"]) == (0, "", 0)


def test_the_lowest_come_first_and_stay_on_their_line():
    lines = lowest(count_confusions(MATRIX, NAMES))
    assert lines[0].startswith("| class  | images | accuracy | precision | f1")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [r"'a\nb'", "dog", "cat"]
    assert "33.3 %" in lines[3]
    many = lowest(count_confusions(torch.eye(30, dtype=torch.long), [str(k) for k in range(30)]))
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
