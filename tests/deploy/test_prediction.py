"""What a trained classifier says of image files, against forward passes made by hand."""

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import TINY, draw, randomize
from PIL import Image

import hcvision
from hcvision.data.module import ImageData
from hcvision.deploy.classifier import load_classifier
from hcvision.deploy.prediction import find_images, predict, predict_files
from hcvision.training.checkpoints import read_checkpoint
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator

CLASSES = ["left-out", "müller straße", "zebra"]
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]
VIEW = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 0.8}
MODEL = {"model": "vit_tiny_patch16_224", "connection": "dhc2", "model_args": TINY}


def make_run(run, image_folder, images=None, **hparams):
    """A run of one step, whose averaged and raw weights are random ones of their own."""
    data = {"root": str(image_folder), "batch_size": 8, "num_workers": 0, **VIEW, **(images or {})}
    module = ImageClassifier(**{**MODEL, "num_classes": 3, **hparams})
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_steps=1, limit_val_batches=0, default_root_dir=str(run),
    )  # fmt: skip
    trainer.fit(module, ImageData(**data))
    file = run / "checkpoints" / "best.ckpt"
    trainer.save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=True)
    states = [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]
    for seed, state in zip((0, 3), states, strict=False):  # for these dhc2 says more than one class
        values = randomize(module, 0.5, seed).state_dict()
        state.update({name: value.clone() for name, value in values.items()})
    torch.save(checkpoint, file)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return run


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_folder, ema_decay=0.5)


def model_of(run, key="state_dict"):
    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    arguments = checkpoint["hyper_parameters"]["model_args"]
    model = hcvision.create_model(MODEL["model"], MODEL["connection"], num_classes=3, **arguments)
    state = {name: value for name, value in checkpoint[key].items() if name.startswith("model.")}
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval()


def prepare(file):
    """Bilinear to 40 x 40 (32 / 0.8), the 32 x 32 in the middle, mean and std."""
    image = Image.open(file).convert("RGB").resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def logits_by_hand(run, files, key="state_dict"):
    return model_of(run, key)(torch.stack([prepare(file) for file in files]))


def read_csv(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("weights", "key"), [("ema", "state_dict"), ("raw", "current_model_state")])
def test_csv_is_a_forward_pass(run, image_folder, tmp_path, capsys, weights, key):
    """Every file of a folder, in order, with all three classes though five are asked for."""
    out = tmp_path / "new" / "p.csv"
    assert predict(str(run), [str(image_folder / "val")], str(out), weights=weights, batch_size=7, device="cpu") == 0
    assert capsys.readouterr().out == f"39 predictions in {out}, 0 unreadable\n"
    assert os.listdir(out.parent) == ["p.csv"]
    rows = read_csv(out)
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    files = sorted((image_folder / "val").rglob("*.png"))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    expected = logits_by_hand(run, files, key).softmax(-1)
    assert len(set(expected.argmax(1).tolist())) > 1
    for row, probabilities in zip(rows, expected, strict=True):
        values, labels = probabilities.sort(descending=True)
        for k, suffix in enumerate(("", "_2", "_3")):
            assert row[f"class{suffix}"] == CLASSES[labels[k]]
            assert float(row[f"probability{suffix}"]) == pytest.approx(values[k].item(), rel=2e-5, abs=1e-6)


def test_json_unreadable_and_odd_names(run, image_folder, tmp_path, capsys, monkeypatch):
    """The rest is written, what cannot be read is named in one line each, and the status is 1."""
    monkeypatch.chdir(tmp_path)
    good = ["a\nb.png", "ü ,\"'.png", os.fsdecode(b"\xff.png"), "no extension"]
    for number, name in enumerate(good):
        draw(number % 3, number).save(name, format="png")
    Path("bad\n1.png").write_bytes(b"no image")
    Path("cut.png").write_bytes((image_folder / "val" / "zebra" / "000.png").read_bytes()[:900])
    Path("gone.png").symlink_to("nowhere.png")
    assert predict(str(run), [".", "no extension"], "p.json", top_k=2, device="cpu") == 1
    out, err = capsys.readouterr()
    assert out == "4 predictions in p.json, 3 unreadable\n"
    lines = [line for line in err.splitlines() if line.startswith("cannot")]
    names = [r"'bad\n1.png'", "cut.png", "gone.png"]
    assert [line.split(": ")[0] for line in lines] == [f"cannot read image {name}" for name in names]
    found = json.loads(Path("p.json").read_text())
    assert found["checkpoint"] == f"{run / 'checkpoints' / 'best.ckpt'} (ema weights)"
    assert [bad["file"] for bad in found["unreadable"]] == ["bad\n1.png", "cut.png", "gone.png"]
    by_name = {image["file"]: image["top"] for image in found["images"]}
    assert sorted(by_name) == sorted(good)
    for name, probabilities in zip(good, logits_by_hand(run, good).softmax(-1), strict=True):
        values, labels = probabilities.sort(descending=True)
        assert [top["class"] for top in by_name[name]] == [CLASSES[label] for label in labels[:2]]
        assert [top["probability"] for top in by_name[name]] == pytest.approx(values[:2].tolist(), rel=2e-5, abs=1e-6)

    assert predict(str(run), [".", "no extension"], "p.csv", top_k=2, device="cpu") == 1
    assert [row["file"] for row in read_csv("p.csv")] == [image["file"] for image in found["images"]]
    with pytest.raises(ValueError, match="none of the 2 images could be read"):
        predict(str(run), ["bad*", "cut.png"], "none.csv", device="cpu")
    assert r"cannot read image 'bad\n1.png'" in capsys.readouterr().err
    assert not Path("none.csv").exists()


def test_bad_arguments_come_before_the_work(run, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [str(image_folder / "val" / "zebra")]
    Path("there.csv").write_text("mine")
    Path("folder.csv").mkdir()
    with pytest.raises(ValueError, match=r"out must end in .csv or .json, got p.txt"):
        predict("nowhere", images, "p.txt")
    with pytest.raises(FileExistsError, match=r"there.csv exists; --overwrite true replaces"):
        predict("nowhere", images, "there.csv")
    with pytest.raises(FileExistsError, match=r"folder.csv exists"):
        predict("nowhere", images, "folder.csv", overwrite=True)
    for wrong, message in (
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"precision": "8"}, "precision must be 32, bf16, 16, got '8'"),
        ({"device": "gpu"}, "device must be one that works here, such as auto, cpu"),
        ({"weights": "last"}, "weights must be ema or raw, got 'last'"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(str(run), images, "there.csv", overwrite=True, **wrong)
    assert Path("there.csv").read_text() == "mine"
    predict(str(run), images, "there.csv", overwrite=True, device="cpu")
    assert len(read_csv("there.csv")) == 13
    assert sorted(os.listdir()) == ["folder.csv", "there.csv"]


def test_batches_workers_and_precision_change_nothing_that_counts(run, image_folder):
    classifier = load_classifier(str(run))
    files = find_images([str(image_folder / "val")])
    one = predict_files(classifier, files, 3, 3, 0, "cpu")
    many = predict_files(classifier, files, 3, 20, 1, "cpu")
    assert one.files == many.files == files
    assert torch.equal(one.classes, many.classes)
    torch.testing.assert_close(one.probabilities, many.probabilities, rtol=1e-4, atol=1e-6)
    half = predict_files(classifier, files, 3, 20, 0, "cpu", "bf16")
    difference = (half.probabilities - one.probabilities).abs().max()
    assert 1e-5 < difference < 0.05


def test_multi_label(run, image_folder, tmp_path):
    """Sigmoids, which do not add up to 1."""
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["multi_label"] = True
    torch.save(checkpoint, tmp_path / "multi.ckpt")
    classifier = load_classifier(str(tmp_path / "multi.ckpt"))
    files = find_images([str(image_folder / "val" / "zebra")])
    found = predict_files(classifier, files, device="cpu")
    values, labels = logits_by_hand(run, files).sigmoid().sort(descending=True)
    assert torch.equal(found.classes, labels)
    torch.testing.assert_close(found.probabilities, values, rtol=1e-4, atol=1e-6)


def test_gray_and_no_average(image_folder, tmp_path):
    """One channel is fed gray images; without an average raw weights are the weights."""
    run = make_run(
        tmp_path / "gray", image_folder, {"mean": [0.3], "std": [0.2]}, model_args={**TINY, "in_chans": 1}
    )  # fmt: skip
    files = find_images([str(image_folder / "val" / "zebra")])
    ema, raw = (predict_files(load_classifier(str(run), weights), files, device="cpu") for weights in ("ema", "raw"))
    assert torch.equal(ema.probabilities, raw.probabilities)
    gray = [Image.open(file).convert("L").resize((40, 40), Image.Resampling.BILINEAR) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(image.crop((4, 4, 36, 36)))) for image in gray])[:, None] / 255
    with torch.no_grad():
        values, labels = model_of(run)((pixels - 0.3) / 0.2).softmax(-1).sort(descending=True)
    assert torch.equal(ema.classes, labels)
    torch.testing.assert_close(ema.probabilities, values, rtol=1e-4, atol=1e-6)


def test_find_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.JPG", "b/10.webp", "b/c d/é.png", "a[1].dat", "notes.txt", "b/readme", "e/x.dat"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "up").symlink_to(tmp_path)

    def found(*patterns):
        return [str(path) for path in find_images(patterns)]

    assert found("b") == ["b/10.webp", "b/2.JPG", "b/c d/é.png"]
    assert found("notes.txt", "b/2.JPG", "b") == ["notes.txt", "b/2.JPG", "b/10.webp", "b/c d/é.png"]
    assert found("a[1].dat") == ["a[1].dat"]
    assert found("b/[rc12]*") == ["b/10.webp", "b/2.JPG", "b/c d/é.png"]
    assert found("**/*.png") == found("b/?*/*.png", "b/c*") == ["b/c d/é.png"]
    assert found(f"{tmp_path}/*/*.JPG") == [f"{tmp_path}/b/2.JPG"]
    assert found("e/*") == found("e/*.dat") == ["e/x.dat"]
    for pattern, message in (
        ("nowhere", "there is no 'nowhere': neither a file, nor a folder, nor a pattern that fits any"),
        ("*.gif", r"there is no '\*.gif'"),
        ("", "there is no ''"),
        ("e", "there is no image in 'e'; they end in .jpg, .jpeg, .png"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images([pattern, "b"])


def test_best_then_last_and_a_hub_folder(run, image_folder, tmp_path):
    files = find_images([str(image_folder / "val" / "zebra")])
    expected = logits_by_hand(run, files).softmax(-1).sort(descending=True)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    timm.models.save_for_hf(
        model_of(run),
        tmp_path / "hub",
        safe_serialization=True,
        model_config={"label_names": CLASSES},
        data_config=VIEW,
    )
    for source in (tmp_path / "run", folder / "last.ckpt", tmp_path / "hub", f"local-dir:{tmp_path / 'hub'}"):
        classifier = load_classifier(str(source))
        assert classifier.class_names == CLASSES
        assert not classifier.model.training
        found = predict_files(classifier, files, device="cpu")
        assert torch.equal(found.classes, expected.indices), source
        torch.testing.assert_close(found.probabilities, expected.values, rtol=1e-4, atol=1e-6)
    (folder / "best.ckpt").write_bytes(b"damaged")  # and yet it is the one that is wanted
    with pytest.raises(ValueError, match=r"best.ckpt is no checkpoint, or a damaged one"):
        load_classifier(str(tmp_path / "run"))


class Payload:
    def __reduce__(self):
        return (open, ("payload-ran", "w"))


def test_what_is_no_classifier(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = ImageGenerator("dit_tiny_patch4_pixel", num_classes=3, model_args=tiny_dit, sample_every=0)
    hparams = dict(generator.hparams)
    torch.save({"hyper_parameters": hparams, "state_dict": generator.state_dict()}, "dit.ckpt")
    torch.save(generator.state_dict(), "weights.pth")
    torch.save({"hyper_parameters": {**MODEL, "rate": 5}, "state_dict": {}}, "newer.ckpt")
    torch.save({"hyper_parameters": {**MODEL, "num_classes": 3}, "state_dict": {}}, "other.ckpt")
    torch.save(Payload(), "evil.ckpt")
    Path("evil2.ckpt").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("empty", "unfinished/checkpoints", "dit", "evil", "damaged", "foreign", "broken", "features"):
        Path(name).mkdir(parents=True)
    timm.models.save_for_hf(generator.model, "dit", safe_serialization=True)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    for name in ("evil", "damaged"):
        timm.models.save_for_hf(plain, name, safe_serialization=True)
    Path("evil/model.safetensors").unlink()
    torch.save(Payload(), "evil/pytorch_model.bin")
    Path("damaged/model.safetensors").write_bytes(b"damaged")
    Path("foreign/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    Path("broken/config.json").write_text("{")
    plain.reset_classifier(0)
    timm.models.save_for_hf(plain, "features", safe_serialization=True)
    for source, message in (
        ("dit.ckpt", "dit.ckpt is a diffusion model, which classifies nothing; `hcvision sample` draws with it"),
        ("dit", "dit is a diffusion model"),
        ("weights.pth", "weights.pth is no checkpoint of ours"),
        ("newer.ckpt", "newer.ckpt is of a model that cannot be built: TypeError: .*rate"),
        ("other.ckpt", "another architecture: model.cls_token is missing"),
        ("evil.ckpt", "evil.ckpt is no checkpoint, or a damaged one"),
        ("evil2.ckpt", "evil2.ckpt is no checkpoint, or a damaged one"),
        ("evil", "local-dir:evil is no model that timm can load: .* blocked loading"),
        ("damaged", "local-dir:damaged is no model that timm can load: SafetensorError"),
        ("foreign", "local-dir:foreign is no model that timm can load: KeyError: 'architecture'"),
        ("broken", "local-dir:broken is no model that timm can load"),
        ("features", "features has no classes"),
        ("empty", "empty holds no classifier: neither checkpoints/best.ckpt or last.ckpt.* nor config.json"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            load_classifier(source)
        assert "\n" not in str(refused.value)
    assert not Path("payload-ran").exists()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in the run unfinished yet"):
        load_classifier("unfinished")
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere; a run's folder, a checkpoint, .* would work"):
        load_classifier("nowhere")
