"""``hcvision probe``: a line per model, what it is of, and what is refused before long work."""

import json
from pathlib import Path

import pytest
import timm
import torch
from test_cli import DATA, MODEL, TRAINER, check_refused, main

from hcvision.data.module import ImageData
from hcvision.studies.probing import command, features
from hcvision.studies.probing.neighbours import predict_by_neighbours

PROBE = ("--data.num_workers=0", "--data.img_size=32", "--device=cpu", "--seeds=[0,1]", "--neighbours=4")


def read(out):
    return [json.loads(text) for text in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_models_in_a_row(image_folder, tmp_path, tiny, capsys, monkeypatch):
    """A line each, by hand from what the models hand to their heads; each image is looked at once."""
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=7, **tiny)
    torch.save(weights.state_dict(), tmp_path / "weights.pth")
    looked, look = [], features.look

    def count(module, images, *more):
        looked.append(len(images))
        return look(module, images, *more)

    monkeypatch.setattr(features, "look", count)
    options = (f"--data.root={image_folder}", f"--model_args={tiny}", f"--out={tmp_path / 'out'}", *PROBE)
    models = ("vit_tiny_patch16_224", "vit_tiny_patch16_224_dhc2")
    for _ in range(2):  # the second time the lines take the places of the first ones
        looked.clear()
        main(["probe", *models, *options, f"--init_from={tmp_path / 'weights.pth'}"])
    assert sum(looked) == 2 * (1 + 72 + 39)
    lines = read(tmp_path / "out")
    assert [(line["model"], line["connection"]) for line in lines] == [(models[0], "residual"), (models[1], "dhc2")]
    about = {"images": 39, "train_images": 72, "features": 48, "size": [3, 32, 32], "split": "val", "seeds": [0, 1]}
    assert lines[0].items() >= about.items()
    assert lines[0]["checkpoint"] == str(tmp_path / "weights.pth")
    data = ImageData(root=str(image_folder), num_workers=0, batch_size=72, img_size=32, crop_pct=0.9)
    with torch.no_grad():
        train, test = (
            (weights.eval().forward_features(batch.images)[:, 0], batch.targets)
            for split in ("train", "val")
            for batch in data.evaluation_loader(split, {})
        )
    voted = predict_by_neighbours(test[0], *train, 3, (4,))[4]
    right = (voted == test[1]).double().mean().item()
    assert [line["knn4"] for line in lines] == pytest.approx([right, right])  # connections start as the residual add
    assert [line["linear"] for line in lines] == pytest.approx([lines[0]["linear"]] * 2, abs=0.06)
    assert right > 0.5
    assert lines[0]["linear"] > 0.5
    shown = capsys.readouterr().out
    assert f"{100 * right:.2f} %" in shown
    assert f"written to {tmp_path / 'out' / 'metrics.jsonl'}" in shown


def test_a_run(image_folder, tmp_path, capsys):
    """Its checkpoint on its own data, where none are named; a folder that timm saved; a few images per class."""
    run = tmp_path / "run"
    main(["fit", f"--data.root={image_folder}", f"--run={run}", *MODEL, *DATA, *TRAINER])
    main(["probe", str(run), f"--out={tmp_path / 'out'}", *PROBE[2:]])
    main(["export", str(run), str(tmp_path / "saved")])
    main(["probe", str(tmp_path / "saved"), f"--data.root={image_folder}", f"--out={tmp_path / 'out'}", *PROBE])
    few = ("--shots=5", "--probes=knn", f"--out={tmp_path / 'few'}")
    main(["probe", str(run), f"--data.root={image_folder}", *PROBE, *few])
    lines = read(tmp_path / "out")
    assert lines[0]["checkpoint"].startswith(str(run / "checkpoints"))
    assert lines[0]["connection"] == lines[1]["connection"] == "dhc2"
    assert lines[0]["knn4"] == pytest.approx(lines[1]["knn4"])
    assert lines[0]["images"] == 39
    (line,) = read(tmp_path / "few")
    assert (line["shots"], "linear" in line, "knn4_std" in line) == (5, False, True)
    capsys.readouterr()


def bad(image_folder, tmp_path):
    root = f"--data.root={image_folder}"
    yield ("vit_tinny_patch16_224", root), "unknown model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224"
    yield ("vit_tiny_patch16_224", "dit_tiny_patch4_pixel", root), "diffusion model, which classifies nothing"
    yield ("nowhere/run", root), "there is no nowhere/run; a run's folder, a checkpoint"
    yield ("vit_tiny_patch16_224",), "--data.root and the like name the images"
    yield ("vit_tiny_patch16_224", root), "vit_tiny_patch16_224 gives no features of images of (3, 32, 32)"
    yield ("resnet10t", root, "--neighbours=[73]"), "neighbours must be at most 72, the training images, got 73"
    yield ("resnet10t", root, "--shots=25"), "shots must be at most 24, the images of class 'left-out', got 25"
    yield ("resnet10t", root, "--probes=[knm]"), "unknown probe 'knm'; did you mean knn?"
    yield ("resnet10t", root, "--data.corruption=jpeg"), "corruption is for validate and test, not for training"
    yield ("resnet10t", root, "--data.dataset=csv", "--data.multi_label=true"), "there is no"
    yield ("resnet10t", f"--data.root={tmp_path / 'none'}"), "there is no folder"
    yield ("resnet10t", root, "--device=tpu9"), "device must be one that works here"
    yield ("resnet10t", root, "--connection=dhc2"), "cannot convert a ResNet"


def test_bad_input(image_folder, tmp_path, monkeypatch, capsys):
    """One line, before any image is looked at, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "collect", None)
    for arguments, message in bad(image_folder, tmp_path):
        options = PROBE if any(word.startswith("--data") for word in arguments) else PROBE[2:]
        check_refused(["probe", *dict.fromkeys((*options, *arguments))], message, capsys)
    assert list(tmp_path.iterdir()) == []
