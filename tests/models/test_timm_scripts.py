"""timm's train.py, validate.py and benchmark.py on our names: what they call, and they themselves where they are.

timm's packages leave these scripts out, its repository has them: HCVISION_TIMM_SCRIPTS=CHECKOUT names a copy of the
repository at the version of the installed timm, for ``pytest -m slow tests/models/test_timm_scripts.py``.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.models import load_checkpoint, resolve_model_input_args, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3

import hcvision

BASE, NAME = "vit_tiny_patch16_224", "vit_tiny_patch16_224_dhc2"
assert NAME in hcvision.vit_names
SCRIPTS = os.environ.get("HCVISION_TIMM_SCRIPTS")
WITH_NAMES = "import hcvision, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "validation"):
        for name, color in (("a", (200, 30, 30)), ("b", (30, 30, 200))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), color).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def weights(tmp_path):
    """A residual model's, with a head of 10 classes."""
    model = randomize(timm.create_model(BASE, img_size=32, depth=2, num_classes=10)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model


def options(**more):
    return argparse.Namespace(
        **{"model": NAME, "img_size": 32, "opt": "adamw", "lr": 1e-2, "weight_decay": 0.05, "momentum": 0.9},
        **{"layer_decay": 0.75, "sched": "cosine", "epochs": 2, "warmup_epochs": 0, "num_classes": 2, **more},
    )


def build(args, **more):
    """A model as the scripts ask for it: the configuration resolved by name, and handed over as a dict."""
    return timm.create_model(
        **resolve_model_input_args(args.model, vars(args), num_classes=args.num_classes, depth=2, **more)
    )


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm.data leaves that to Python
def test_what_the_scripts_call(tmp_path, photos, weights):
    """Two steps from residual weights, averaged, saved, resumed, and validated from the checkpoint: the same logits."""
    args, (path, plain) = options(), weights
    model = build(args, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": -1})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval().forward_features(x), plain.forward_features(x))
    assert model.head.out_features == 2

    config = resolve_input_data_config(model, vars(args))
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    dataset = create_dataset("", root=str(photos), split="train", is_training=True)
    loader = create_loader(
        dataset, batch_size=4, is_training=True, num_workers=0, device=torch.device("cpu"), use_prefetcher=False,
        **{key: config[key] for key in keys if key != "crop_pct"},
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
    averaged = ModelEmaV3(model, decay=0.5)
    task = ClassificationTask(model.train(), criterion_kwargs={"smoothing": 0.1}, device=torch.device("cpu"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps = 0
    for images, targets in loader:
        optimizer.zero_grad()
        task(images, targets)["loss"].backward()
        optimizer.step()
        averaged.update(model)
        steps += 1
    scheduler.step(1)
    assert steps == 2
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {f"blocks.{i}.connection{k}.static_beta" for i in (0, 1) for k in (1, 2)} <= moved

    saver = CheckpointSaver(model, optimizer, args=args, model_ema=averaged, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.0)
    again = build(args)
    assert (
        resume_checkpoint(
            again, tmp_path / "last.pth.tar", optimizer=create_optimizer_v2(again, **optimizer_kwargs(args))
        )
        == 1
    )
    assert torch.equal(again.eval()(x), model.eval()(x))
    load_checkpoint(again, tmp_path / "last.pth.tar", use_ema=True)
    assert torch.equal(again(x), averaged.module(x))
    assert not torch.equal(again(x), model(x))
    assert torch.load(tmp_path / "last.pth.tar", weights_only=False)["arch"] == NAME


def script(name):
    if not SCRIPTS:
        pytest.skip(f"timm's packages leave {name}.py out; HCVISION_TIMM_SCRIPTS=CHECKOUT names timm's repository")
    path = Path(SCRIPTS, f"{name}.py").resolve()
    assert path.is_file(), f"HCVISION_TIMM_SCRIPTS names no checkout of timm: there is no {path}"
    return str(path)


def run(folder, *command):
    common = ["--model", NAME, "--device", "cpu", "--img-size", "32", "--num-classes", "2", "--batch-size", "4"]
    done = subprocess.run(
        [sys.executable, *command, *common, "--model-kwargs", "depth=2"],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_train(tmp_path, photos, weights):
    """Two steps from residual weights; the checkpoint is of our model."""
    arguments = ["--data-dir", photos, "--pretrained", "--pretrained-path", weights[0], "--opt", "adamw", "--epochs", 1]
    arguments += ["--warmup-epochs", 0, "--workers", 0, "--output", tmp_path, "--experiment", "run"]
    run(tmp_path, script("train"), "--device-modules", "hcvision", *map(str, arguments))
    load_checkpoint(build(options()), tmp_path / "run" / "last.pth.tar")


@pytest.mark.slow
def test_validate(tmp_path, photos):
    """The accuracy of a checkpoint, by its logits for eight images of two colours."""
    model = randomize(build(options())).eval()
    CheckpointSaver(model, create_optimizer_v2(model), options(), checkpoint_dir=str(tmp_path)).save_checkpoint(0, 1.0)
    place = ["--data-dir", str(photos), "--workers", "0", "--checkpoint", str(tmp_path / "last.pth.tar")]
    told = json.loads(run(tmp_path, "-c", WITH_NAMES, script("validate"), *place).rpartition("--result")[2])
    colors = torch.tensor([(200.0, 30.0, 30.0), (30.0, 30.0, 200.0)])[:, :, None, None].expand(2, 3, 32, 32)
    right = (model(colors / 255 * 2 - 1).argmax(1) == torch.tensor([0, 1])).float().mean().item()
    assert told["model"] == NAME
    assert told["top1"] == 100 * right


@pytest.mark.slow
def test_benchmark(tmp_path):
    """Inference and training steps are timed."""
    few = ["--num-warm-iter", "1", "--num-bench-iter", "5"]
    assert NAME in run(tmp_path, "-c", WITH_NAMES, script("benchmark"), *few)
