"""Exported classifiers, read back as others would read them, against forward passes made by hand."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY, randomize
from test_prediction import CLASSES, VIEW, logits_by_hand, make_run, prepare

import hcvision
from hcvision.deploy import exporting as module
from hcvision.deploy.classifier import Classifier, load_classifier
from hcvision.deploy.exporting import export, plain_attention, save_hub_folder
from hcvision.deploy.prediction import find_images
from hcvision.models.conversion import convert

SWIN = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
SHALLOW = {**TINY, "depth": 1}


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), image_folder, ema_decay=0.5, model_args=SHALLOW)


@pytest.fixture(scope="module")
def files(image_folder):
    return find_images([str(image_folder / "val" / "zebra")])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "connection",
    [
        "residual",
        "shc2",
        "dhc4",
        "sfc2",
        "dfc2",
        "mhc4",
        "ihc4",
        "ghc2x3",
        "sihc4",
        "gr4",
        "oru",
        "laurel",
        "mhclite3",
        "krom4",
        "dense",
        "attnres",
    ],
)
def test_traced_onnx(connection, tmp_path):
    """torch.onnx.export with dynamo=False, as recipes for TensorRT have it: a file for batches of any size."""
    model = randomize(hcvision.create_model("vit_tiny_patch16_224", connection, num_classes=3, **SHALLOW)).eval()
    torch.onnx.export(
        model, (torch.randn(2, 3, 32, 32),), tmp_path / "model.onnx", dynamo=False, opset_version=17,
        input_names=["images"], output_names=["logits"], dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=1e-4, atol=1e-6)


def load_elsewhere(folder, images):
    """Logits of folders, each loaded by plain timm in one process that has only imported hcvision."""
    torch.save(images, folder / "images.pth")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    code = (
        "import sys, torch, hcvision, timm\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # convolutions round by it
        "images = torch.load('images.pth')\n"
        "models = {name: timm.create_model(f'local-dir:{name}', pretrained=True).eval() for name in sys.argv[1:]}\n"
        "with torch.no_grad():\n"
        "    torch.save({name: model(images) for name, model in models.items()}, 'logits.pth')\n"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True, cwd=folder)
    return torch.load(folder / "logits.pth", weights_only=True)


def test_hub_folder_of_a_run(run, files, image_folder, tmp_path, capsys):
    """Averaged and raw weights, class names and how images are prepared; checked on validation images."""
    for weights, key in (("ema", "state_dict"), ("raw", "current_model_state")):
        export(str(run), str(tmp_path / weights), weights=weights)
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"{run / 'checkpoints' / 'best.ckpt'} ({weights} weights) is checked on " + (
            "32 validation images of the run"
        )
        assert out[1].startswith("model.safetensors: largest difference 0 of logits up to ")
        assert out[1].endswith("same top-1 100.0%, in batches of 1, 5, 26")
        assert out[2].startswith(f"{tmp_path / weights}: 2 files, config.json (0.")
        assert out[3].endswith(f'timm.create_model("local-dir:{tmp_path / weights}", pretrained=True)')
        config = json.loads((tmp_path / weights / "config.json").read_text())
        assert config["architecture"] == "vit_tiny_patch16_224_dhc2"
        assert config["label_names"] == CLASSES
        assert {key: config["pretrained_cfg"][key] for key in VIEW} == VIEW
        assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
        assert config["pretrained_cfg"]["crop_mode"] == "center"
        again = load_classifier(str(tmp_path / weights))
        assert (again.class_names, again.multi_label) == (CLASSES, False)
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in again.data_config.items()} == {
            **VIEW, "input_size": [3, 32, 32], "crop_mode": "center",
        }  # fmt: skip
        model = timm.create_model(f"local-dir:{tmp_path / weights}", pretrained=True).eval()
        given = model(torch.stack([prepare(file) for file in files]))
        assert torch.equal(given, logits_by_hand(run, files, key))


def classifier_of(model, size=32):
    config = {**VIEW, "input_size": [3, size, size]}
    return Classifier(randomize(model, 0.3).eval(), CLASSES, config, False, "here")


def test_plain_timm_loads_every_conversion(tmp_path):
    """Also names that importing hcvision does not register, several conversions, and options."""
    base = "vit_tiny_patch16_224"
    several = timm.create_model(base, num_classes=3, **{**TINY, "depth": 3})
    convert(several, "dhc3", blocks=":1", tanh=False)
    convert(several, "sfc4", blocks=[2])
    options = {"connection_blocks": "1:", "connection_tanh": False, "connection_arrangement": "parallel"}
    models = {
        "residual": timm.create_model(base, num_classes=3, **TINY),
        "dfc2": timm.create_model(f"{base}_dfc2", num_classes=3, **TINY, connection_norm=False),
        "dhc3": hcvision.create_model(base, "dhc3", num_classes=3, **TINY, **options),
        "several": several,
        "swin": hcvision.create_model("swin_tiny_patch4_window7_224", "dhc2", num_classes=3, **SWIN),
        "eva": hcvision.create_model(
            "eva02_tiny_patch14_224", "shc2", num_classes=3, **TINY
        ),
        "convnext": hcvision.create_model(
            "convnext_atto", "sfc2", num_classes=3, depths=(1,) * 4, dims=(8, 16, 16, 24)
        ),
    }  # fmt: skip
    for name, model in models.items():
        save_hub_folder(classifier_of(model), tmp_path / name)
        again = hcvision.create_model(f"local-dir:{tmp_path / name}", pretrained=True)  # and once more, from itself
        save_hub_folder(Classifier(again.eval(), CLASSES, {**VIEW}, False, "there"), tmp_path / f"{name} again")
        timm.models.save_for_hf(again, tmp_path / f"{name} by timm", safe_serialization=True)
    images = torch.randn(3, 3, 32, 32)
    logits = load_elsewhere(tmp_path, images)
    assert len(logits) == 3 * len(models)
    with torch.no_grad():
        for name, given in logits.items():
            assert torch.equal(given, models[name.split()[0]](images)), name
    named = {name: json.loads((tmp_path / name / "config.json").read_text())["architecture"] for name in models}
    assert named == {
        "residual": base,
        "dfc2": f"{base}_dfc2",
        **dict.fromkeys(("dhc3", "several", "swin", "eva", "convnext"), "hcvision_converted"),
    }


def test_hcvision_converted(tmp_path):
    """timm's other ways to build it, and what happens when its conversion is undone."""
    name = "vit_tiny_patch16_224_sfc3"
    model = timm.create_model("hcvision_converted", connection_architecture=name, num_classes=3, **TINY).eval()
    assert model.connection == "sfc3"
    timm.models.save_for_hf(model, tmp_path / "a", safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    features = timm.create_model(
        f"local-dir:{tmp_path / 'a'}", pretrained=True, features_only=True, out_indices=2
    ).eval()
    expected = model.forward_intermediates(images, indices=2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(images), expected, strict=True))
    arguments = timm.models.resolve_model_input_args(f"local-dir:{tmp_path / 'a'}")  # as timm's own scripts do
    again = timm.create_model(arguments.pop("model_name"), pretrained=True, **arguments).eval()
    assert torch.equal(again(images), model(images))
    for connection, cls in (("residual", "VisionTransformer"), ("dhc2", "ConnectedVisionTransformer")):
        convert(again, connection)
        timm.models.save_for_hf(again, tmp_path / connection, safe_serialization=True)
        other = timm.create_model(f"local-dir:{tmp_path / connection}", pretrained=True).eval()
        assert (type(other).__name__, getattr(other, "connection", "residual")) == (cls, connection)
        assert torch.equal(other(images), model(images))
    for wrong in (None, "dhc2"):
        with pytest.raises(ValueError, match=f"must be a timm name and a connection, such as .*, got {wrong!r}"):
            timm.create_model("hcvision_converted", connection_architecture=wrong)
    with pytest.raises(ValueError, match="connection must be 'residual', "):
        timm.create_model("hcvision_converted", connection_architecture="vit_tiny_patch16_224")
    with pytest.raises(RuntimeError, match=r"Unknown model \(vit_tinny\)"):
        timm.create_model("hcvision_converted", connection_architecture="vit_tinny_dhc2")


def read_onnx(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [put.name for put in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    batches = [session.run(None, {"images": batch.numpy()})[0] for batch in images.split(2)]
    return torch.from_numpy(np.concatenate(batches)), session.get_modelmeta().custom_metadata_map


def test_onnx_and_torch_export_of_a_run(run, files, image_folder, tmp_path, capsys):
    """dhc2: 13 images in batches of 2, the last one alone; checked on images that were given."""
    images = [str(image_folder / "val" / "zebra"), str(image_folder / "val" / "left-out" / "00?.png")]
    out = tmp_path / "out"
    export(str(run / "checkpoints" / "best.ckpt"), str(out), onnx=True, torch_export=True, images=images)
    assert sorted(os.listdir(out)) == ["config.json", "model.onnx", "model.pt2", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("is checked on 23 images that were given")
    assert [line.split(":")[0] for line in lines[1:4]] == ["model.safetensors", "model.pt2", "model.onnx"]
    expected = logits_by_hand(run, files)
    prepared = torch.stack([prepare(file) for file in files])
    given, about = read_onnx(out / "model.onnx", prepared)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert {name: json.loads(value) for name, value in about.items()} == {
        **VIEW, "input_size": [3, 32, 32], "class_names": CLASSES, "multi_label": False,
    }  # fmt: skip
    program = torch.export.load(out / "model.pt2").module()
    given = torch.cat([program(batch) for batch in prepared.split(2)])
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "opset"), [("dfc2", None), pytest.param("swin", None, marks=pytest.mark.slow), ("beit", 18)]
)
def test_onnx(name, opset, tmp_path, monkeypatch, capsys):
    """beit: torch.onnx does not take its fused attention; and here its weights go into a file of their own.

    Without real images noise is used, and that is said.
    """
    if name == "beit":
        monkeypatch.setattr(module, "LARGE", 0)
    models = {
        "dfc2": lambda: hcvision.create_model("vit_tiny_patch16_224", "dfc2", num_classes=3, **SHALLOW),
        "swin": lambda: hcvision.create_model("swin_tiny_patch4_window7_224", "dhc2", num_classes=3, **SWIN),
        "beit": lambda: hcvision.create_model("beit_base_patch16_224", "dfc3", num_classes=3, **SHALLOW),
    }
    classifier = classifier_of(models[name]())
    save_hub_folder(classifier, tmp_path / "hub")
    export(str(tmp_path / "hub"), str(tmp_path / "out"), onnx=True, opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(tmp_path / "out" / "model.onnx").opset_import}
    assert opset in (None, versions[""])
    assert ("model.onnx.data" in os.listdir(tmp_path / "out")) == (name == "beit")
    assert "checked on 8 images of seeded noise, for want of real ones (no config.yaml" in capsys.readouterr().out
    images = torch.randn(3, 3, 32, 32)
    given, _ = read_onnx(tmp_path / "out" / "model.onnx", images)
    with torch.no_grad():
        expected = classifier.model(images)
    assert expected.std(0).max() > 1e-3
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_plain_attention():
    """In it timm multiplies matrices, with the same result; behind it everything is as it was."""
    model = classifier_of(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)).model
    model.blocks[1].attn.fused_attn = False
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with plain_attention(model):
            assert not model.blocks[0].attn.fused_attn
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert [block.attn.fused_attn for block in model.blocks] == [True, False]


def test_multi_label_travels(run, tmp_path):
    classifier = replace(load_classifier(str(run)), multi_label=True)
    save_hub_folder(classifier, tmp_path / "one")
    again = load_classifier(str(tmp_path / "one"))
    assert again.multi_label
    timm.models.save_for_hf(again.model, tmp_path / "two", safe_serialization=True)
    assert load_classifier(str(tmp_path / "two")).multi_label
    assert json.loads(module.describe(again)["multi_label"]) is True


def test_another_answer_is_refused_and_nothing_is_left(run, tmp_path, monkeypatch):
    """One thousandth of the largest logit in ONNX, anything at all in timm's layout; NaN too."""
    load, opened = timm.create_model, []

    def wrong(factor):
        def forward(images):
            opened.append(len(images))
            return classifier.model(images) * factor

        return forward

    classifier = load_classifier(str(run))
    out = str(tmp_path / "new" / "out")
    monkeypatch.setattr(module, "_trace", lambda _: None)
    monkeypatch.setattr(module, "_save_onnx", lambda *_: None)
    for factor, message in (
        (1.01, "model.onnx gives other logits"),
        (float("nan"), "other logits than the model: nan"),
    ):
        monkeypatch.setattr(module, "_open_onnx", lambda _, factor=factor: wrong(factor))
        with pytest.raises(ValueError, match=message):
            export(str(run), out, onnx=True)
        assert list((tmp_path / "new").iterdir()) == []
    assert opened == [1, 5, 26] * 2

    def nearly(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.head.bias[0] += 1e-5
        return model

    monkeypatch.setattr(timm, "create_model", nearly)
    with pytest.raises(ValueError, match=r"model.safetensors gives other logits .* \(0 is allowed\)"):
        export(str(run), out)
    assert list((tmp_path / "new").iterdir()) == []


def test_room_and_packages(run, tmp_path, monkeypatch, capsys):
    """Before anything is loaded; an earlier export is replaced if wanted, and nothing else ever is."""
    out = tmp_path / "out"
    out.mkdir()
    export(str(run), str(out))
    (tmp_path / "as usual").mkdir()
    (tmp_path / "as usual" / "file").touch()
    assert out.stat().st_mode == (tmp_path / "as usual").stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "as usual" / "file").stat().st_mode}
    shutil.rmtree(tmp_path / "as usual")
    with pytest.raises(FileExistsError, match=r"out is not empty; --overwrite true replaces an earlier export"):
        export("nowhere", str(out))
    export(str(run), str(out), weights="raw", overwrite=True)
    assert load_classifier(str(out)).model.head.bias.equal(load_classifier(str(run), "raw").model.head.bias)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out holds more than an export, and is not replaced: notes.txt"):
        export(str(run), str(out), overwrite=True)
    with pytest.raises(FileExistsError, match=r"notes.txt is a file; out must be a folder"):
        export(str(run), str(out / "notes.txt"), overwrite=True)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "notes.txt"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript: pip install 'hcvision\[export\]'"):
        export("nowhere", str(tmp_path / "onnx"), onnx=True)
    assert os.listdir(tmp_path) == ["out"]


def test_spread():
    """Folders are sorted by class: the first 32 images would be of one."""
    assert module._spread(3) == [0, 1, 2]
    assert module._spread(320) == list(range(0, 320, 10))
    assert module._spread(0) == []


def test_images_to_check_with(run, image_folder, tmp_path, capsys):
    """A run whose data are gone is checked on noise, and that is said; images that were given must be readable."""
    gone = tmp_path / "gone"
    (gone / "checkpoints").mkdir(parents=True)
    (gone / "checkpoints" / "last.ckpt").symlink_to(run / "checkpoints" / "best.ckpt")
    for data, reason in (
        ("data: {root: nowhere}", "the run's cannot be opened: FileNotFoundError: there is no folder nowhere"),
        ("data: {roof: nowhere}", "the run's cannot be opened: TypeError"),
        ("[", "the run's cannot be opened: ParserError"),
        ("data: {dataset: wds/x, num_classes: 3}", "the dataset wds/x is not looked into"),
    ):
        (gone / "config.yaml").write_text(data)
        export(str(gone), str(tmp_path / "out"), overwrite=True)
        out = capsys.readouterr().out
        assert f"8 images of seeded noise, for want of real ones ({reason}" in out
        assert "in batches of 1, 5, 2" in out
    one = image_folder / "val" / "zebra" / "000.png"
    export(str(gone), str(tmp_path / "out"), images=[str(one)], overwrite=True)
    out = capsys.readouterr().out
    assert "checked on 1 images that were given" in out
    assert "in batches of 1, 5\n" in out
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"none of the images to check with could be read: cannot read image .*bad.png"
    ):
        export(str(gone), str(tmp_path / "out"), images=[str(tmp_path / "bad.png")], overwrite=True)
    with pytest.raises(ValueError, match="there is no 'nowhere'"):
        export(str(gone), str(tmp_path / "out"), images=["nowhere"], overwrite=True)


def test_opset_that_cannot_be_had(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SHALLOW)
    save_hub_folder(classifier_of(model), tmp_path / "hub")
    with pytest.raises(ValueError, match="PyTorch writes this model with opset 18, not 5"):
        export(str(tmp_path / "hub"), str(tmp_path / "out"), onnx=True, opset=5)
    assert os.listdir(tmp_path) == ["hub"]
