"""The command line as its user meets it."""

import csv
import functools
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import processes
import pytest
import timm
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

import hcvision
from hcvision.cli import sample as cli
from hcvision.cli.parsing import wrap_words
from hcvision.data.module import ImageData
from hcvision.data.relatives import list_classes
from hcvision.data.subsets import list_synsets
from hcvision.diffusion.sampling import read_samples
from hcvision.studies import open_samples
from hcvision.training.checkpoints import read_checkpoint
from hcvision_command import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
MODEL = ("--model.model=vit_tiny_patch16_224", "--model.connection=dhc2", "--model.lr=1e-3")
MODEL += ("--model.model_args={img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",)
DATA = ("--data.batch_size=8", "--data.num_workers=0", "--data.no_aug=true")
TRAINER = ("--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false")


@pytest.fixture
def hcv(tmp_path):
    """Runs a command in a process of its own and in an empty folder."""
    return functools.partial(processes.run, folder=tmp_path)


def fit(root, run, *more):
    return ("fit", f"--data.root={root}", f"--run={run}", *MODEL, *DATA, *TRAINER, *more)


def metrics(run):
    return [
        row
        for path in sorted(run.glob("metrics*.csv"))
        for row in csv.DictReader(path.read_text().splitlines())
        if row["val_loss"]
    ]


def test_fit_resume_validate_test_predict(hcv, image_folder, tmp_path):
    run = tmp_path / "run"
    assert "the run is in" in hcv(*fit(image_folder, run)).stdout
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints", "tensorboard"}
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    again = hcv(*fit(image_folder, run), check=False)
    assert again.returncode == 2
    assert "holds a run; --resume true goes on with it" in again.stderr
    assert "Traceback" not in again.stderr
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    resumed = hcv("fit", f"--config={run / 'config.yaml'}", "--resume=true", "--trainer.max_epochs=3")
    assert f"resuming {run}" in resumed.stdout
    assert {row["epoch"] for row in metrics(run)} == {"0", "1", "2"}

    final = max(metrics(run), key=lambda row: int(row["epoch"]))
    scored = hcv("validate", f"--config={run / 'config.yaml'}", "--trainer.enable_progress_bar=false")
    assert f"{float(final['val_loss']):.4f}"[:5] in scored.stdout
    hcv("test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}")
    last = run / "checkpoints" / "last.ckpt"
    hcv("predict", last, image_folder / "val", f"--out={tmp_path / 'predictions.csv'}", "--device=cpu")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 39
    right = sum(row["class"] == Path(row["file"]).parent.name for row in rows)
    assert right / 39 == pytest.approx(float(final["val_top1"]), abs=1e-6)


def test_export_and_benchmark(image_folder, tmp_path, capsys):
    """The whole way: a run, a folder for timm with an ONNX file in it, predictions from that folder, and its speed."""
    run, out = tmp_path / "run", tmp_path / "exported"
    main([*fit(image_folder, run), "--trainer.max_epochs=1"])
    main(["export", str(run), str(out), "--onnx=true"])
    shown = capsys.readouterr().out
    assert "model.onnx" in shown
    assert "validation images" in shown
    for source, name in ((run, "a.json"), (out, "b.json")):
        main(["predict", str(source), str(image_folder / "val"), f"--out={tmp_path / name}", "--device=cpu"])
    a, b = (json.loads((tmp_path / name).read_text())["images"] for name in ("a.json", "b.json"))
    assert a == b
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = image_folder / "val" / "zebra" / "000.png"
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(run), str(good), str(tmp_path / "bad.png"), f"--out={tmp_path / 'c.csv'}", "--device=cpu"])
    assert stop.value.code == 1
    small = "--model_args={img_size: 32, patch_size: 8, embed_dim: 48, depth: 1, num_heads: 3}"
    main(["benchmark", "vit_tiny_patch16_224_dhc2", small, "--batch_size=2", "--rounds=1", "--device=cpu"])
    assert "| vit_tiny_patch16_224_dhc2 |" in capsys.readouterr().out


def test_coverage(capsys):
    """Counts by family and by reason; our own names are not timm's."""
    main(["coverage", "*vit_tiny*_224"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "2 of 4 timm names take connections",
        "",
        "    1 vision_transformer",
        "    1 vision_transformer_hybrid",
        "",
        "the others:",
        "",
        "    2 cannot convert a MaxxVit with blocks of class MaxxVitBlock (maxvit_tiny_rw_224, maxvit_tiny_tf_224)",
    ]
    with pytest.raises(SystemExit):
        main(["coverage", "no_such_*"])
    assert "no timm name matches 'no_such_*'" in capsys.readouterr().err


CLASSES = ("left-out", "müller straße", "zebra")


def test_two_processes_give_what_one_gives(hcv, image_folder, tmp_path):
    """DDP over gloo: same images per update, same weights, each validation image once (39 is odd)."""
    for number in (1, 2):
        hcv(
            *fit(image_folder, tmp_path / f"run{number}"),
            f"--trainer.devices={number}", "--trainer.strategy=ddp", f"--data.batch_size={8 // number}",
        )  # fmt: skip
    one, two = metrics(tmp_path / "run1"), metrics(tmp_path / "run2")
    for a, b in zip(one, two, strict=True):
        assert float(a["val_top1"]) == float(b["val_top1"])
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5)
    lines = []
    for number in (1, 2):
        hcv("test", f"--config={tmp_path / 'run1' / 'config.yaml'}", f"--trainer.devices={number}")
        lines.append(json.loads((tmp_path / "run1" / "test" / "metrics.jsonl").read_text()))
    assert lines[0]["images"] == lines[1]["images"] == 39
    assert {**lines[0]} == {name: v if isinstance(v, str) else pytest.approx(v, 1e-4) for name, v in lines[1].items()}


def bad_cases(image_folder, tmp_path):
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    for root in (empty, damaged):
        shutil.copytree(image_folder, root)
    for split in ("train", "val"):
        (empty / split / "nothing").mkdir()
    bad = damaged / "train" / "zebra" / "003.png"
    bad.write_bytes(bad.read_bytes()[:150])
    yield fit(tmp_path / "nowhere", tmp_path / "r"), f"there is no folder {tmp_path / 'nowhere'}"
    yield fit(empty, tmp_path / "r"), f"there is no image in the class folder {empty / 'train' / 'nothing'}"
    yield fit(image_folder, tmp_path / "r", "--model.model=vit_tinny_patch16_224"), "did you mean vit_tiny_patch16_224"
    yield fit(image_folder, tmp_path / "r", "--data.batch_size=0"), "batch_size must be at least 1, got 0"
    yield fit(image_folder, tmp_path / "r", "--data.batchsize=4"), "did you mean --data.batch_size"
    yield fit(image_folder, tmp_path / "r", "--resume=true"), "nothing to resume"
    yield fit(image_folder, tmp_path / "r", "--ckpt_path=none.ckpt"), "there is no checkpoint none.ckpt"
    yield (
        ("fitt",),
        "unknown command 'fitt'; did you mean fit?; the commands: fit, validate, test, predict, inspect, probe, export",
    )
    yield ("compare", "--variants=[dhc2]"), "required"
    yield fit(damaged, tmp_path / "damaged-run"), f"cannot read image {bad}"


def check_refused(arguments, message, capsys):
    """One line that holds the message, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2, arguments
    (line,) = [line for line in stderr.splitlines() if line.startswith("hcvision: error:")]
    assert message in line, arguments
    assert "Traceback" not in stderr


def test_bad_input_gets_one_line_and_leaves_nothing(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, message in bad_cases(image_folder, tmp_path):
        check_refused(arguments, message, capsys)
    assert not (tmp_path / "r").exists()


def below_home(home):
    """Command lines with a path below ~ that is not there, which all of them say."""
    (home / "data.yaml").write_text("data: {root: ~/none}")
    (home / "run.yaml").write_text("run: ~/photos")
    (home / "weights.yaml").write_text("model: {init_from: ~/none}")
    (home / "study.yaml").write_text("out: ~/study\ndata: {root: ~/none}")
    variants = "{residual: {model: {init_from: ~/none}}}"
    run = [*fit("~/photos", "~/run")]
    yield ["fit", "--config=~/data.yaml", *MODEL]
    yield ["fit", "--config=~/weights.yaml", *run[1:]]
    yield [*run, "--ckpt_path=~/none"]
    yield [*run, "--run=~/none", "--resume=true"]
    yield ["validate", *run[1:], "--run=~/none"]
    yield ["predict", "~/none", "~/photos"]
    yield ["predict", "~/run", "~/photos", "~/none"]
    yield ["inspect", "~/none"]
    yield ["export", "~/none", "~/exported"]
    yield ["report", "~/none"]
    yield ["sample", "~/none"]
    yield ["score", "~/none"]
    yield ["encode", "~/none", "~/latents"]
    study = ["compare", "--variants=[residual]", "--seeds=[0]", "--model.model=vit_tiny_patch16_224", *TRAINER]
    yield [*study, "--config=~/study.yaml"]
    yield [*study, "--out=~/study", "--data.root=~/photos", f"--variants={variants}"]


def test_a_path_may_begin_with_the_home_folder(image_folder, tmp_path, monkeypatch, capsys):
    """In every command, behind a = sign and in YAML, where no shell looks."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(image_folder, home / "photos")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for arguments in below_home(home):
        check_refused(arguments, str(home / "none"), capsys)
    check_refused(["fit", *MODEL, *DATA, "--data.root=~/photos", "-c~/run.yaml"], f"{home / 'photos'} exists", capsys)
    check_refused(fit("~/photos", "~nobody-here/run"), "there is no home folder for ~nobody-here/run", capsys)

    check_refused(["benchmark", "vit_tiny_patch16_224", "--out=~/photos"], str(home / "photos"), capsys)

    run = fit("~/photos", "~/run")
    main([*run, "--trainer.max_epochs=1", "--trainer.default_root_dir=~/root", "--data.label_separator=~"])
    assert yaml.safe_load((home / "run" / "config.yaml").read_text())["data"]["label_separator"] == "~"
    check_refused(run, "holds a run; --resume true goes on with it", capsys)
    main([*run, "--resume=true"])
    assert len(metrics(home / "run")) == 2
    main(["predict", "~/run", "~/photos/val/*/*.png", "--out=~/predictions.csv", "--device=cpu"])
    assert len((home / "predictions.csv").read_text().splitlines()) == 40
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


@pytest.fixture(scope="module")
def classes_run(image_folder, tmp_path_factory):
    """A trained classifier, and data of other classes, of the same in another order, and of the same ones."""
    place = tmp_path_factory.mktemp("classes")
    main([*fit(image_folder, place / "run"), "--trainer.max_epochs=1"])
    for name, changed in {
        "other": {"zebra": "aardvark"},
        "order": {"zebra": "a", "left-out": "zebra"},
        "same": {},
    }.items():
        shutil.copytree(image_folder, place / name)
        for split, (old, new) in itertools.product(("train", "val"), changed.items()):
            (place / name / split / old).rename(place / name / split / new)
    return place


@pytest.mark.parametrize(("data", "what"), [("other", "'aardvark'"), ("order", "'a'"), ("same", None)])
def test_a_checkpoint_of_other_classes(classes_run, data, what, tmp_path, capsys, recwarn):
    """As many of them; every command that brings a checkpoint and data together says so."""
    run, root = tmp_path / "run", classes_run / data
    shutil.copytree(classes_run / "run", run)
    last = run / "checkpoints" / "last.ckpt"
    told = f"classes than the data: class 0 is 'left-out' there and {what} here"
    commands = [
        ["validate", f"--config={run / 'config.yaml'}", f"--data.root={root}", f"--ckpt_path={last}"],
        ["test", f"--config={run / 'config.yaml'}", f"--data.root={root}", f"--ckpt_path={last}"],
        [*fit(root, tmp_path / "new", f"--ckpt_path={last}")],
        [*fit(root, run, "--resume=true")],
        ["inspect", str(last), f"--out={tmp_path / 'inspect'}", f"--data={{root: {root}}}", "--device=cpu"],
    ]
    before = set(tmp_path.rglob("*"))
    for command in commands if data == "other" else commands[:1]:
        if what:
            check_refused(command, told, capsys)
        else:
            main(command)
    assert what is None or before == set(tmp_path.rglob("*"))
    main([*fit(root, tmp_path / "started", f"--model.init_from={last}", "--trainer.max_epochs=1")])
    said = {str(w.message) for w in recwarn if "their head is kept" in str(w.message)}
    expected = (
        f"the weights of {last} are of other classes: class 0 is 'left-out' there and {what} here; their head is kept"
    )
    assert said == ({expected} if what else set())


def test_the_configuration_of_a_copied_run_stands_for_the_copy(image_folder, classes_run, tmp_path, capsys):
    """Its ``run:`` names the first folder, which stays as it is; a ``--run`` that is given stands."""
    copy, first = tmp_path / "copy", classes_run / "run"
    shutil.copytree(first, copy)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    command = [f"--config={copy / 'config.yaml'}", f"--data.root={classes_run / 'same'}"]
    main(["fit", *command, "--resume=true", "--trainer.max_epochs=3"])
    assert f"the run is in {copy}" in capsys.readouterr().out
    assert read_checkpoint(copy / "checkpoints" / "last.ckpt")["epoch"] == 2
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    main(["test", *command])
    assert (copy / "test").is_dir()
    main(["fit", *command, f"--run={tmp_path / 'third'}"])
    assert f"the run is in {tmp_path / 'third'}" in capsys.readouterr().out


def test_a_trial_run_leaves_nothing_and_needs_no_room(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*fit(image_folder, "run"), "--trainer.fast_dev_run=true"])
    shown = capsys.readouterr().out
    assert "nothing of it is kept (fast_dev_run)" in shown
    assert "the run is in" not in shown
    assert not list(tmp_path.iterdir())
    main([*fit(image_folder, "run"), "--trainer.max_epochs=1"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for more in ([], ["--resume=true"]):
        main([*fit(image_folder, "run"), "--trainer.fast_dev_run=2", *more])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_callbacks_that_cannot_work_are_said_in_one_line(image_folder, tmp_path, capsys):
    run, more = tmp_path / "run", "--trainer.callbacks+=ModelCheckpoint"
    check_refused(
        [*fit(image_folder, run), more, more], "more than one stateful callback of type `ModelCheckpoint`", capsys
    )
    assert not run.exists()
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_accuracy"]
    check_refused([*fit(image_folder, run), *stopping], "on metric `val_accuracy` which is not available", capsys)
    main([*fit(image_folder, tmp_path / "good"), *stopping[:1], "--trainer.callbacks.monitor=val_loss", more])
    files = {path.name for path in (tmp_path / "good" / "checkpoints").iterdir()}
    assert files == {"last.ckpt", "best.ckpt", "epoch=1-step=18.ckpt"}


def test_a_run_that_is_never_validated_has_the_last_for_its_best(image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    main([*fit(image_folder, run), "--trainer.limit_val_batches=0", "--trainer.callbacks+=ModelCheckpoint"])
    assert f"the run is in {run}" in capsys.readouterr().out
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "epoch=1-step=18.ckpt"}
    for which in ("best", "last"):
        main(["validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={which}", "--trainer.limit_val_batches=1.0"])
    assert capsys.readouterr().out.count("val_top1") == 2
    main(["predict", str(run), str(image_folder / "val" / "zebra"), f"--out={tmp_path / 'a.csv'}", "--device=cpu"])


@pytest.fixture
def locked_run(classes_run):
    """A trained run that may be read and not written, and a place beside it; root has to become another user."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(classes_run / "run", place / "run")
    shutil.copytree(classes_run / "same", place / "photos")
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (place / "free").mkdir(mode=0o777)
    (place / "free").chmod(0o777)
    if user := os.geteuid():
        yield place
    else:
        os.seteuid(65534)
        yield place
        os.seteuid(user)
    for path in (place, *place.rglob("*")):
        path.chmod(0o777)
    shutil.rmtree(place)


def test_a_run_that_can_only_be_read(locked_run, monkeypatch, capsys):
    """It is scored, looked into and exported; what cannot be kept is said, before long work where that is all."""
    monkeypatch.chdir(locked_run / "free")
    run, photos = locked_run / "run", locked_run / "photos"
    scored = [f"--config={run / 'config.yaml'}", f"--run={run}", f"--data.root={photos}"]
    main(["validate", *scored])
    main(["test", *scored])
    shown = capsys.readouterr().out
    assert shown.count("val_top1") == shown.count("test_top1") == 1
    assert f"the classes cannot be kept in {run / 'test'}: Permission denied" in shown
    main(["predict", str(run), str(photos / "val"), "--device=cpu"])
    main(["export", str(run), "exported"])
    main(["inspect", str(run), "--out=inspected", "--images=4", "--device=cpu", f"--data={{root: {photos}}}"])
    assert {path.name for path in Path.cwd().iterdir()} == {"predictions.csv", "exported", "inspected"}
    locked = f"nothing can be written into {run}; "
    refused = {
        "--out names another folder": ["inspect", str(run)],
        "out must be in another folder": ["export", str(run), str(run / "exported")],
        "--out names another file": ["predict", str(run), str(photos), f"--out={run / 'a.csv'}"],
        "--run names another folder, and --ckpt_path": [*fit(photos, run), "--resume=true"],
    }
    for message, arguments in refused.items():
        check_refused(arguments, locked + message, capsys)
    check_refused(fit(photos, run / "new"), locked, capsys)
    check_refused(["benchmark", "vit_tiny_patch16_224", f"--out={run / 'a.csv'}"], locked, capsys)


def test_a_run_that_failed_early_does_not_stand_in_the_way(hcv, image_folder, tmp_path):
    damaged, run = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(image_folder, damaged)
    (damaged / "train" / "zebra" / "003.png").write_bytes(b"no image")
    assert hcv(*fit(damaged, run), check=False).returncode == 2
    done = hcv(*fit(damaged, run, "--data.skip_bad_images=true"))
    assert f"moved to {run}.unfinished1" in done.stdout
    assert "left out: cannot read image" in done.stderr
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_a_checkpoint_of_another_architecture(hcv, image_folder, tmp_path):
    hcv(*fit(image_folder, tmp_path / "a", "--trainer.max_epochs=1"))
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    done = hcv(*fit(image_folder, tmp_path / "b", f"--ckpt_path={last}", "--model.connection=dhc4"), check=False)
    assert "another architecture: connection is 'dhc2' there and 'dhc4' here" in done.stderr
    assert not (tmp_path / "b").exists()


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(image_folder, tmp_path):
    """The terminal sends it to all processes: also to those that load images."""
    arguments = fit(image_folder, tmp_path / "run", "--trainer.max_epochs=2000", "--data.num_workers=1")
    process = processes.start(*arguments, folder=tmp_path)
    process.wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file)
    os.killpg(process.pid, signal.SIGINT)
    done = process.wait()
    shown = done.stderr
    assert done.returncode == 130, shown[-3000:]
    assert shown.count("stopping after this step or validation; once more stops at once") == 1
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("stopped after step")]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"; {last} holds it; go on with: hcvision fit " in line
    steps = int(re.search(r"stopped after step (\d+)", line)[1])
    assert read_checkpoint(last)["global_step"] == steps
    words = shlex.split(line.partition("go on with: hcvision ")[2])
    assert words == [*arguments, "--resume", "true"]


def test_resume_auto_starts_and_goes_on(image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    main([*fit(image_folder, run), "--trainer.max_epochs=1", "--resume=auto"])
    assert "resuming" not in capsys.readouterr().out
    main([*fit(image_folder, run), "--resume=auto"])
    assert f"resuming {run}" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics(run)] == ["0", "1"]


def test_test_reports_classes_of_the_checkpoint_asked_for(image_folder, tmp_path, capsys):
    """best and last are those of the run."""
    run = tmp_path / "run"
    main([*fit(image_folder, run)])
    for which in ("best", "last"):
        main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={which}"])
        shown = capsys.readouterr().out
        assert "| class" in shown
        assert f"the classes are in {run / 'test'}" in shown
        score = read_checkpoint(run / "checkpoints" / f"{which}.ckpt")
        rows = list(csv.DictReader((run / "test" / "classes.csv").read_text().splitlines()))
        top1 = sum(float(row["accuracy"]) for row in rows) / 3  # classes of one size
        known = {int(row["epoch"]): float(row["val_top1"]) for row in metrics(run)}
        assert top1 == pytest.approx(known[score["epoch"]], abs=1e-4)
    main(["test", f"--config={run / 'config.yaml'}"])
    assert (run / "test" / "confusion.png").is_file()
    check_refused(
        ["test", f"--config={run / 'config.yaml'}", "--ckpt_path=bset"], "there is no checkpoint bset", capsys
    )


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet in small, an image of each class, and ImageNet-R's folders of it."""
    root = tmp_path_factory.mktemp("imagenet")
    for number, name in enumerate(list_synsets()):
        (root / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number % 256, number // 4, 99)).save(root / "val" / name / "a.png")
    (root / "train").symlink_to(root / "val")
    for number in list_classes("r"):
        name = list_synsets()[number]
        shutil.copytree(root / "val" / name, root / "r" / name)
    return root


def test_relatives_beside_clean_images(imagenet, tmp_path, tiny, capsys):
    """A row each, of the same 200 classes, where a model chooses among these; the classes of each in a folder."""
    run = tmp_path / "run"
    torch.save(timm.create_model("vit_tiny_patch16_224", **tiny).state_dict(), tmp_path / "weights.pth")
    arguments = tiny | {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    model = ("--model.model=vit_tiny_patch16_224", "--model.pretrained=true", f"--model.model_args={arguments}")
    options = ("test", *model, *DATA, "--data.batch_size=200", f"--run={run}")
    main([*options, "--data.relative=r", f"--data.root={imagenet / 'r'}", f"--clean={imagenet}"])
    lines = [json.loads(text) for text in (run / "test" / "metrics.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["r", "val-imagenet-r"]
    assert [line["images"] for line in lines] == [200, 200]
    scores = [{name: line[name] for name in ("top1", "top5", "nll", "brier")} for line in lines]
    assert scores[0] == pytest.approx(scores[1])  # here these are the same images
    assert scores[0]["nll"] == pytest.approx(math.log(200), rel=0.1)  # not trained, it takes each for as likely
    assert len((run / "test" / "r" / "classes.csv").read_text().splitlines()) == 201
    assert (run / "test" / "val-imagenet-r" / "classes.csv").is_file()
    assert "val-imagenet-r" in capsys.readouterr().out
    check_refused([*options, f"--data.root={imagenet}", f"--clean={imagenet}"], "clean is for a relative", capsys)
    some = ["fit", *options[1:], f"--data.root={imagenet}", f"--data.classes={list_synsets()[0]}"]
    check_refused(some, "classes is for validate and test", capsys)
    assert not (run / "config.yaml").exists()


def test_weights_without_a_run(image_folder, tmp_path, tiny, capsys):
    """Where there is no checkpoint the weights that a run would start from are scored, if they have a head."""
    run = tmp_path / "none"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **tiny)
    torch.save(model.state_dict(), tmp_path / "three.pth")
    options = ("--model.model=vit_tiny_patch16_224", MODEL[3], f"--data.root={image_folder}", *DATA, f"--run={run}")
    main(["test", *options, f"--model.init_from={tmp_path / 'three.pth'}"])
    assert (
        f"there is no checkpoint in {run}, and {tmp_path / 'three.pth'}, to start from, are" in capsys.readouterr().out
    )
    (line,) = [json.loads(text) for text in (run / "test" / "metrics.jsonl").read_text().splitlines()]
    assert line["checkpoint"] == str(tmp_path / "three.pth")
    data = ImageData(root=str(image_folder), num_workers=0, batch_size=39, img_size=32, crop_pct=0.9)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model.eval()(batch.images), batch.targets).item()
    assert line["nll"] == pytest.approx(loss, abs=1e-5)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=4, **tiny).state_dict(), tmp_path / "four.pth")
    weights = f"--model.init_from={tmp_path / 'four.pth'}"
    check_refused(["test", *options, weights], "bring no head.bias, head.weight: there is nothing to score", capsys)
    check_refused(["test", *options], "there is nothing to resume or score: no checkpoint in", capsys)


def test_corrupted_images_beside_others(image_folder, tmp_path, capsys):
    """A row for each corruption and severity, and their mean; --data.corruption gives the same."""
    run = tmp_path / "run"
    main([*fit(image_folder, run)])
    config = f"--config={run / 'config.yaml'}"
    main(["test", config, "--corruptions=[contrast, gaussian_noise]", "--severities=[1, 5]"])
    shown = capsys.readouterr().out
    lines = [json.loads(text) for text in (run / "test" / "metrics.jsonl").read_text().splitlines()]
    assert [line["variant"] for line in lines] == [
        "",
        "contrast-1",
        "contrast-5",
        "gaussian_noise-1",
        "gaussian_noise-5",
    ]
    mean = sum(line["top1"] for line in lines[1:]) / 4
    assert f"{100 * mean:.2f} % on average over 4 corruptions and severities" in shown
    assert lines[2]["nll"] != lines[0]["nll"]
    main(["test", config, "--data.corruption=contrast", "--data.severity=5"])
    again = [json.loads(text) for text in (run / "test" / "metrics.jsonl").read_text().splitlines()]
    assert again[-1] == lines[2]
    assert len(again) == 5
    check_refused(["test", config, "--corruptions=[fogg]"], "unknown corruption 'fogg'; did you mean fog?", capsys)


def test_what_init_from_had_nothing_for_is_said(image_folder, tmp_path, capsys):
    main([*fit(image_folder, tmp_path / "a"), "--model.connection=residual", "--trainer.max_epochs=1"])
    capsys.readouterr()
    main([*fit(image_folder, tmp_path / "b"), f"--model.init_from={tmp_path / 'a'}", "--trainer.max_epochs=1"])
    shown = capsys.readouterr().out
    assert f"weights of {tmp_path / 'a'}; 24 parameters of connections keep their initial values" in shown
    shutil.rmtree(tmp_path / "a")  # a checkpoint needs it no more
    config = tmp_path / "b" / "config.yaml"
    before = config.read_text()
    main(["test", f"--config={config}"])
    main([*fit(image_folder, tmp_path / "b"), f"--config={config}", "--resume=true", "--trainer.max_epochs=2"])
    assert yaml.safe_load(config.read_text())["model"]["init_from"] == str(tmp_path / "a")
    assert yaml.safe_load(before)["model"]["init_from"] == str(tmp_path / "a")


def run_limited(size, *arguments):
    """A command that can write no file larger than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    main(list(arguments))


def test_a_full_disk_keeps_the_last_checkpoint(image_folder, tmp_path):
    """No file may grow beyond a size between that of a checkpoint and of a larger one, as on a disk that is full."""
    run = tmp_path / "run"
    main([*fit(image_folder, run), "--trainer.max_epochs=1"])
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    done = processes.Started(run_limited, len(before) // 2, *fit(image_folder, run, "--resume=true")).wait()
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"cannot write into {run}: File too large; the last good checkpoint is {last}" in done.stderr
    assert "Traceback" not in done.stderr
    assert last.read_bytes() == before
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    main([*fit(image_folder, run), "--resume=true"])
    assert [row["epoch"] for row in metrics(run)][-1] == "1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk; the test above needs no rights")
def test_a_small_disk(image_folder, tmp_path):
    """A tmpfs with room for the first checkpoints, and no more."""
    run = tmp_path / "small"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(run)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        main([*fit(image_folder, run / "run"), "--trainer.max_epochs=1"])
        last = run / "run" / "checkpoints" / "last.ckpt"
        before = last.read_bytes()
        free = shutil.disk_usage(run).free
        (run / "ballast").write_bytes(bytes(max(free - len(before) // 2, 0)))
        done = processes.run(*fit(image_folder, run / "run", "--resume=true"), check=False)
        assert done.returncode == 2, done.stderr[-3000:]
        assert f"No space left on device; the last good checkpoint is {last}" in done.stderr
        assert last.read_bytes() == before
        (run / "ballast").unlink()
        main([*fit(image_folder, run / "run"), "--resume=true"])
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)  # a file may be open until it is collected


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_out_of_memory_says_what_needs_less(image_folder, tmp_path, capsys, monkeypatch, where):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(f"hcvision.training.ImageClassifier.{where}", fail)
    training = (
        "--data.batch_size 4 --trainer.accumulate_grad_batches 2 (the same update), --model.grad_checkpointing true"
    )
    ways = training if where == "training_step" else "--data.eval_batch_size 4"
    check_refused(
        fit(image_folder, tmp_path / "run"),
        f"not enough memory on cpu for batches of 8; any of these needs less: {ways}, --trainer.precision bf16-mixed",
        capsys,
    )
    more = ("--model.grad_checkpointing=true", "--trainer.precision=bf16-mixed", "--data.batch_size=1")
    monkeypatch.setattr("hcvision.cli.fit.CommandLine.before_fit", lambda self: None)
    ways = "a smaller model, smaller images (--data.img_size)"
    check_refused(
        (*fit(image_folder, tmp_path / "run2"), *more), f"batches of 1; any of these needs less: {ways}", capsys
    )


DIT = ("--task=generate", "--model.model=dit_tiny_patch4_pixel", "--model.connection=dhc2", "--model.lr=2e-3")
DIT += ("--model.model_args={img_size: 16, embed_dim: 48, depth: 2, num_heads: 3}", "--model.ema_decay=0.5")
DIT += ("--model.sample_every=1", "--model.sample_count=6", "--model.sample_steps=2", "--trainer.max_epochs=1")


@pytest.fixture(scope="module")
def dit_run(image_folder, tmp_path_factory):
    """A trained diffusion model, in a run's folder."""
    run = tmp_path_factory.mktemp("dit") / "run"
    arguments = ("fit", f"--data.root={image_folder}", f"--run={run}", *DIT, *DATA, *TRAINER[::2])
    assert f"the run is in {run}" in processes.run(*arguments).stdout
    return run


def test_fit_sample_and_score(dit_run, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (dit_run / "grids" / "step0000009.png").is_file()
    assert (dit_run / "checkpoints" / "best.ckpt").is_file()
    config = yaml.safe_load((dit_run / "config.yaml").read_text())
    assert (config["task"], config["data"]["scale"]) == ("generate", [1.0, 1.0])

    main(["validate", f"--config={dit_run / 'config.yaml'}", "--trainer.enable_progress_bar=false"])
    (row,) = metrics(dit_run)
    assert f"{float(row['val_loss']):.4f}"[:5] in capsys.readouterr().out

    draw = ["sample", str(dit_run), "--number=10", "--steps=2", "--sampler=ddim", "--accelerator=cpu", "--npz=true"]
    main([*draw, "--classes=[zebra, 0]"])
    shown = capsys.readouterr().out
    assert "drawn by ddim, 2 steps (2 evaluations of the model), no guidance" in shown
    assert "10 images of 2 classes are in samples: samples.png and samples.npz" in shown
    images = np.load("samples/samples.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((10, 16, 16, 3), np.uint8)
    assert json.loads(Path("samples/sampling.json").read_text())["classes"] == [2, 0]

    main(["score", "samples", f"--data.root={image_folder}", "--data.num_workers=0", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("10 samples")) :]
    assert lines[0].startswith("10 samples against 72 training images, seen by small classifier (resnet10t, ")
    assert [line.split(maxsplit=1)[1] for line in lines[1:7]] == [
        "Fréchet distance (small classifier)", "kernel distance (small classifier)", "classifier score", "precision",
        "recall", "in the class they were drawn as",
    ]  # fmt: skip
    scores = json.loads(Path("samples/scores.json").read_text())
    assert lines[1].split()[0] == f"{scores['distance']:.4f}"
    assert scores["drawn"] == "ddim, 2 steps (2 evaluations of the model), no guidance"
    assert Path("classifier/classifier.safetensors").is_file()


def test_images_that_are_gray_and_not_square(image_folder, tmp_path, monkeypatch, capsys):
    """Trained, drawn and scored, by two networks."""
    monkeypatch.chdir(tmp_path)
    size = "{img_size: [16, 24], in_chans: 1, embed_dim: 48, depth: 1, num_heads: 3}"
    data = (f"--data.root={image_folder}", "--data.num_workers=0", "--data.batch_size=8")
    fit = ("fit", "--run=run", *data, *DIT, f"--model.model_args={size}", *TRAINER, "--trainer.limit_train_batches=1")
    main([*fit, "--model.sample_steps=1", "--model.sample_guidance=1"])
    main(["sample", "run", "--number=8", "--steps=2", "--guidance=2", "--accelerator=cpu", "--npz=true"])
    shown = capsys.readouterr().out
    assert "guidance 2 on all channels" in shown
    assert [np.load("samples/samples.npz")["arr_0"].shape, *{p.shape for p in open_samples(Path("samples"))}] == [
        (8, 16, 24, 3), (8, 16, 24, 1),
    ]  # fmt: skip
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), "resnet.pth")
    main(["score", "samples", *data, "--device=cpu", "--networks", "[resnet10t=resnet.pth, classifier]"])
    shown = capsys.readouterr().out
    assert shown.index("seen by resnet10t at 176 x 176") < shown.index("seen by small classifier")
    assert shown.count("the Fréchet distance says little") == 2
    scores = json.loads(Path("samples/scores.json").read_text())
    assert scores["network"] == "resnet10t at 176 x 176"
    (other,) = scores["others"]
    assert other["network"].startswith("small classifier")
    assert {*other} - {*scores} == {"accuracy"}
    check_refused(
        ("score", "samples", *data, "--networks", "[resnet10t, resnet10t]"), "networks must be different", capsys
    )
    check_refused(("score", "samples", *data, "--networks", "resnet99"), "no timm model resnet99 to look at", capsys)


def test_sampling_that_was_killed_goes_on(dit_run, tmp_path, monkeypatch, capsys):
    """kill -9 after the first parts; the second run keeps them, and the whole is what one run draws."""
    monkeypatch.chdir(tmp_path)
    draw = ["sample", str(dit_run), "--number=40", "--steps=60", "--batch_size=4", "--accelerator=cpu", "--devices=1"]
    process = processes.start(*draw, "--out=killed", folder=tmp_path)
    parts = tmp_path / "killed" / "parts"
    process.wait_for(lambda: len(list(parts.glob("*.npy"))) >= 2)
    process.kill()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert 2 <= len(before) < 10, "it was not killed in time"
    main([*draw, "--out=killed"])
    shown = capsys.readouterr().err
    assert "sampling: 100%" in shown
    assert "40/40 images" in shown
    main([*draw, "--out=whole", "--batch_size=40"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    a, b = (read_samples(tmp_path / name / "parts", 40) for name in ("killed", "whole"))
    assert (a.int() - b.int()).abs().max() <= 1  # another batch size rounds in other places


def test_two_processes_draw_what_one_draws(dit_run, tmp_path, monkeypatch):
    """Also where there is less to draw than there are processes."""
    monkeypatch.chdir(tmp_path)
    draw = ["sample", str(dit_run), "--steps=3", "--batch_size=2", "--accelerator=cpu", "--npz=true"]
    main([*draw, "--number=10", "--devices=1", "--out=by1"])
    for number in (9, 10):
        processes.run_twice(*draw, f"--number={number}", "--devices=2", "--strategy=ddp", "--out=by2", folder=tmp_path)
    one, two = (np.load(tmp_path / f"by{n}" / "samples.npz")["arr_0"] for n in (1, 2))
    assert np.array_equal(one, two)


def test_two_processes_compare(image_folder, tmp_path):
    """The first one trains the classifier, scores and writes; the others wait."""
    study = {
        "task": "generate", "out": "study", "variants": ["residual"], "seeds": [0], "samples": 6, "sample_batch": 4,
        "sampling": {"steps": 2}, "classifier_epochs": 1, "real_images": 30, "timing_rounds": 0,
        "model": {
            "model": "dit_tiny_patch4_pixel", "sample_every": 0,
            "model_args": {"img_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3},
        },
        "data": {"root": str(image_folder), "batch_size": 8, "num_workers": 0},
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp", "enable_progress_bar": False,
        },
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    done = processes.run_twice("compare", "--config=study.yaml", folder=tmp_path)
    assert done.stdout.count("report: study/report.md") == 1
    (row,) = csv.DictReader((tmp_path / "study" / "results.csv").read_text().splitlines())
    assert row["images"] == "64"
    assert float(row["distance"]) > 0


def test_weights_of_another_library(dit_run, tmp_path, monkeypatch, capsys):
    """A file of weights with official keys is sampled from with --model, whatever its number of classes."""
    monkeypatch.chdir(tmp_path)
    for name, classes in (("weights.pt", 1000), ("seven.pt", 7)):
        torch.save(timm.create_model("dit_s_patch8_256", num_classes=classes).state_dict(), name)
    AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=4).save_pretrained("vae")
    with pytest.raises(SystemExit):
        main(["sample", "weights.pt"])
    assert "no checkpoint of ours (--model says what weights are of)" in capsys.readouterr().err
    draw = ["sample", "weights.pt", "--model=dit_s_patch8_256", "--number=1", "--steps=1", "--accelerator=cpu"]
    with pytest.raises(SystemExit):
        main(draw)
    assert "the model draws latents of 4 channels; --vae names the VAE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", "weights.pt", "--model=dit_b_patch8_256", "--vae=vae"])
    assert "the weights in weights.pt are of another architecture: pos_embed has shape" in capsys.readouterr().err
    main(["sample", "seven.pt", *draw[2:], "--vae=vae", "--out=seven"])
    assert "1 images of 7 classes" in capsys.readouterr().out
    main([*draw, "--vae=vae", "--npz=true"])
    assert "1 images of 1000 classes" in capsys.readouterr().out
    assert np.load("samples/samples.npz")["arr_0"].shape == (1, 32, 32, 3)


def test_encode(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)).save_pretrained("vae")
    main(["encode", str(image_folder), "latents", "--vae=vae", "--image_size=16", "--num_workers=0", "--device=cpu"])
    assert "latents/train-00000.safetensors: 72 images" in capsys.readouterr().out
    assert ImageData("latents", "latents", batch_size=8).num_classes == 3


def bad_generation(dit_run, image_folder, tmp_path):
    base = ("fit", f"--data.root={image_folder}", f"--run={tmp_path / 'r'}", *DATA, *TRAINER)
    yield ("fit", "-c", str(ROOT / "configs/fashion_mnist_dit.yaml"), "--model.objektive=x"), "model.objektive"
    yield (*base, "--task=draw"), "task must be classify or generate, got 'draw'"
    yield (*base, *DIT, "--model.label_smoothing=0.1"), "label_smoothing"
    yield (*base, *DIT, "--model.model=vit_tiny_patch16_224"), "vit_tiny_patch16_224 is no diffusion model"
    yield (*base, *DIT, "--data.img_size=32"), "the data are of size (3, 32, 32)"
    yield ("predict", str(dit_run), str(image_folder)), "`hcvision sample` draws with it"
    yield ("sample", "nowhere"), "there is no checkpoint nowhere: neither a file nor the folder of a run"
    yield ("sample", str(dit_run), "--classes=[zebr]"), "unknown class 'zebr'; did you mean zebra?"
    yield ("sample", str(dit_run), "--classes=[7]"), "unknown class '7'; there are left-out, müller straße, zebra"
    yield (
        ("sample", str(dit_run), "--sampler=heun"),
        "sampler must be ddpm, ddim, dpm++ or unipc for this objective, got 'heun'",
    )
    yield ("sample", str(dit_run), "--stepps=3"), "did you mean --steps"
    yield ("score", "nowhere"), "there are no samples nowhere"
    yield ("encode", "nowhere", "latents"), "there is no folder nowhere"


def test_bad_input_to_generation(dit_run, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, message in bad_generation(dit_run, image_folder, tmp_path):
        check_refused(arguments, message, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_parses_and_its_models_build(path, monkeypatch, tmp_path):
    """Parsed by the command line itself; the models are built on the meta device."""
    config = yaml.safe_load(path.read_text())
    monkeypatch.chdir(tmp_path)
    head = path.read_text().split("\n")[:12]
    assert any("Cost:" in line for line in head)
    assert any("xpected" in line for line in head)
    models = []

    def build(model, connection, **kwargs):
        models.append({"model": model, "connection": connection, "model_args": kwargs})
        raise Built

    class Built(Exception):
        pass

    monkeypatch.setattr(
        "hcvision.data.ImageData._scan_folders", lambda self: setattr(self, "class_names", ["a"] * 1000)
    )

    def scan(self):
        self.class_names, self.num_classes = ["a"] * 1000, 1000

    monkeypatch.setattr("hcvision.data.ImageData._scan_latents", scan)
    monkeypatch.setattr("hcvision.training.module.create_model", build)
    if config["model"].get("init_from"):  # what the command above it in its head writes: a run, or the file itself
        weights = Path(config["model"]["init_from"])
        written = f"--run {weights.parent.parent}\n", f".whl {weights}\n"
        assert any(place in path.read_text() for place in written)
        weights.parent.mkdir(parents=True)
        weights.touch()
    if "variants" in config:
        monkeypatch.setattr("hcvision.data.ImageData.prepare_data", lambda self: None)
        listed = config["variants"]
        for variant in listed:
            changes = listed[variant] or {} if isinstance(listed, dict) else {}
            names = [next(iter(listed)), changes["match_time"]] if "match_time" in changes else []  # it refers to them
            names.append(variant)
            alone = {name: listed[name] for name in names} if isinstance(listed, dict) else names
            with pytest.raises(Built):
                main(["compare", f"--config={path}", f"--variants={json.dumps(alone)}", "--out=study"])
    else:
        with pytest.raises(Built):
            main(["fit", f"--config={path}"])
    for model in models:
        with torch.device("meta"):
            arguments = {**model["model_args"], "pretrained": False}
            built_model = hcvision.create_model(model["model"], model["connection"], **arguments)
        assert {parameter.device.type for parameter in built_model.parameters()} == {"meta"}


def test_usage(capsys):
    main(["--help"])
    assert "compare" in capsys.readouterr().out


def test_a_list_of_one_is_a_word():
    """Behind the option or its = sign; other options, lists and null stay as they are."""
    lists = {"--classes": "list[str | int]", "--seeds": "list[int]"}
    given = ["sample", "run", "--classes", "müller straße", "--seeds=3", "--out", "a", "--number=4"]
    assert wrap_words(given, lists) == [
        "sample", "run", '--classes=["müller straße"]', "--seeds=[3]", "--out", "a", "--number=4",
    ]  # fmt: skip
    for word in ("[a, b]", "null", "{a: 1}"):
        assert wrap_words(["--classes", word], lists) == [f"--classes={word}"]


@pytest.mark.parametrize(("word", "number"), [("zebra", 2), ("2", 2), ("0", 0)])
def test_one_class_to_draw(dit_run, tmp_path, monkeypatch, word, number):
    """By its name, or by its number."""
    drawn = []
    monkeypatch.setattr(cli, "draw_samples", lambda module, out, plan, count, wanted, *_: drawn.append(wanted))
    monkeypatch.setattr(cli, "is_first_process", lambda: False)
    for words in ([f"--classes={word}"], ["--classes", word], [f"--classes=[{word}]"]):
        main(["sample", str(dit_run), f"--out={tmp_path}", "--accelerator=cpu", *words])
    assert drawn == [[number]] * 3


def test_weights_of_another_number_of_classes(tmp_path):
    """Of a diffusion model: the number of classes, the size and the channels are those of the file."""
    sizes = {"img_size": 16, "in_chans": 1, "num_classes": 7, "embed_dim": 48, "depth": 1, "num_heads": 3}
    state = timm.create_model("dit_tiny_patch4_pixel", learn_sigma=False, **sizes).state_dict()
    torch.save({"ema": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "dit.pt")
    rest = {name: sizes[name] for name in ("embed_dim", "depth", "num_heads")}
    module = cli.load_generator(str(tmp_path / "dit.pt"), "dit_tiny_patch4_pixel", rest, None, "velocity", None)
    assert (module.hparams["num_classes"], module.data_config["input_size"]) == (7, (1, 16, 16))
    assert all(torch.equal(module.model.state_dict()[name], value) for name, value in state.items())
