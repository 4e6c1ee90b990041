import contextlib
import csv
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from filelock import FileLock, Timeout

import hcvision
from hcvision.cli.sample import sample
from hcvision.data.files import first_difference
from hcvision.diffusion.sampling import Sampling, read_samples
from hcvision.studies import costs, settings
from hcvision.studies import processes as study_processes
from hcvision.studies import study as module
from hcvision.studies.generation import GenerationStudy
from hcvision.studies.repetition import repeat_cell
from hcvision.studies.reporting import read_curve, write_report
from hcvision.studies.settings import environment
from hcvision.studies.study import Study
from hcvision.training.stopping import StopCleanly, Stopped
from hcvision_command import main


@pytest.fixture
def make(image_folder, tiny, tmp_path):
    def build(**kwargs):
        arguments = {
            "out": str(tmp_path / "study"),
            "variants": ["residual", "dhc2", "dfc2"],
            "seeds": [0, 1],
            "model": {"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3},
            "data": {"root": str(image_folder), "dataset": "folder", "batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
            "timing_rounds": 2,
            "jobs": 1,
        }
        return Study(**{**arguments, **kwargs})

    return build


def test_a_study_runs_reports_and_is_not_run_twice(make, monkeypatch, tmp_path):
    report = make().run(say=lambda _: None)
    text = report.read_text()
    rows = list(csv.DictReader((report.parent / "results.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for seed in "01" for variant in ("residual", "dhc2", "dfc2")
    ]
    assert all(row["epochs"] == "2" and row["images"] == "144" for row in rows)
    parameters = {row["variant"]: int(row["parameters"]) for row in rows}
    # 4 sub-layers: DHCx2 has E(n+2) + n(n+2) + 2, DFCx2 E + E(2m+1) + m(2m+1) + 2 of them with E = 24
    assert parameters["dhc2"] - parameters["residual"] == 4 * (48 * 4 + 8 + 2)
    assert parameters["dfc2"] - parameters["residual"] == 4 * (24 + 24 * 5 + 10 + 2)
    assert "| dhc2 " in text
    assert (report.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("residual", "dhc2"):
        assert [*read_curve(report.parent / name / "seed1", ["val_top1"])["val_top1"]] == [0, 1]
    assert (
        "(img_size 32, patch_size 8, embed_dim 48, depth 2, num_heads 3), 2 epochs, 144 images each, seeds 0, 1" in text
    )
    assert re.search(r"^- 6 cells on .*; Lightning .*, Python .*, timm .*, torch .*; revision \S+\.$", text, re.M)

    monkeypatch.setattr(Study, "run_cell", lambda *_: pytest.fail("ran a finished cell again"))
    assert make().run(say=lambda _: None).read_text() == text
    assert from_files(report.parent, tmp_path) == text


def from_files(out, tmp_path):
    """The report that the committed files of a study give, alone in a folder."""
    (tmp_path / "alone").mkdir()
    for name in ("study.json", "results.csv", "curves.csv"):
        shutil.copy(out / name, tmp_path / "alone")
    return write_report(tmp_path / "alone").read_text()


def compare_again(out, root, monkeypatch, capsys):
    """What `hcvision compare` says of a study that is done, by the configuration that it wrote itself."""
    monkeypatch.setattr(Study, "run_cell", lambda *_: pytest.fail("ran a finished cell again"))
    for name in ("config.yaml", "study.json", "report.md", "results.csv", "curves.csv"):
        assert str(root.parent) not in (out / name).read_text(), name  # all paths of tests are below it
    text = (out / "report.md").read_text()
    capsys.readouterr()
    main(["compare", f"--config={out / 'config.yaml'}", f"--out={out}", f"--data.root={root}"])
    said = capsys.readouterr().out
    assert said.endswith(f"{text}\nreport: {out / 'report.md'}\n")
    return re.findall(r"^\[\d/\d\] (\S+), seed (\d): done before", said, re.MULTILINE)


MODEL = {  # what an ImageClassifier and ImageData are by default, without None
    "pretrained": False, "freeze_epochs": 0, "linear_probe": False, "opt": "adamw", "weight_decay": 0.05,
    "connection_lr_factor": 1.0, "connection_decay": False, "sched": "cosine", "warmup_steps": 0, "warmup_epochs": 0.0,
    "warmup_lr": 0.0, "min_lr": 0.0, "compile": False, "grad_checkpointing": False,
    "connection_backend": "auto", "connection_recompute": 0, "skip_nonfinite": 0,
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "mixup_prob": 1.0, "multi_label": False,
}  # fmt: skip
DATA = {
    "dataset": "folder", "file_column": "file", "label_column": "label", "multi_label": False, "label_separator": ";",
    "split_seed": 0, "train_split": "train", "val_split": "val", "test_split": "test", "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "re_prob": 0.0, "no_aug": False, "skip_bad_images": False,
    "other_logits": "leave_out", "severity": 3,
}  # fmt: skip
VARIANTS = {
    "residual": {},
    "wide": {"connection": "residual", "model": {"model_args": {"mlp_ratio": 5.0}}},
    "long": {"connection": "residual", "trainer": {"max_epochs": 3}},
}


def test_variants_change_settings(make, image_folder, tiny, tmp_path, monkeypatch, capsys):
    study = make(variants=VARIANTS, seeds=[0], timing_rounds=0)
    assert [study.build_model(v, 3, 0).model.blocks[0].mlp.fc1.out_features for v in VARIANTS] == [192, 240, 192]
    assert study.model_arguments("wide")["model_args"] == {**tiny, "mlp_ratio": 5.0}
    assert study.model == make().model
    complete = {
        "model": {**MODEL, "model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3},
        "data": {**DATA, "batch_size": 8}, "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }  # fmt: skip
    wide = {**complete["model"], "model_args": {**tiny, "mlp_ratio": 5.0}}
    assert study.settings("wide") == {**complete, "model": wide, "connection": "residual"}
    assert study.settings("residual") == complete
    assert study.settings("long")["trainer"] == {"max_epochs": 3, "accelerator": "cpu"}
    out = study.run(say=lambda _: None).parent
    rows = {row["variant"]: row for row in csv.DictReader((out / "results.csv").read_text().splitlines())}
    assert [(row["epochs"], row["images"]) for row in rows.values()] == [("2", "144"), ("2", "144"), ("3", "216")]
    sizes = [int(row["parameters"]) for row in rows.values()]
    assert [size - sizes[0] for size in sizes] == [0, 2 * (2 * 48 * 48 + 48), 0]  # 48 more in the MLPs of two blocks
    text = (out / "report.md").read_text()
    notes = "wide is residual with model.model_args.mlp_ratio 5.0. long is residual with trainer.max_epochs 3."
    assert f"\n{notes} The others have trainer.max_epochs 2.\n" in text
    assert "), 2 to 3 epochs, 144 to 216 images each, seed 0.\n" in text
    assert [*read_curve(out / "long" / "seed0", ["val_top1"])["val_top1"]] == [0, 1, 2]
    assert from_files(out, tmp_path) == text
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config == {
        "title": "Connections compared", "task": "classify", "out": "runs/study", "variants": VARIANTS, "seeds": [0],
        "timing_rounds": 0, **complete,
    }  # fmt: skip
    assert compare_again(out, image_folder, monkeypatch, capsys) == [(variant, "0") for variant in VARIANTS]


def test_a_list_of_variants_stays_a_list(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = make(out="runs/there", trainer={"max_epochs": 2, "devices": 1}).config()
    assert config["variants"] == ["residual", "dhc2", "dfc2"]
    assert config["out"] == "runs/there"
    assert config["trainer"] == {"max_epochs": 2}


def test_notes_say_what_the_others_have(make):
    """Also a default; what the others do not have at all is not said, nor the connection."""
    changes = {"model": {"lr": 0.01, "weight_decay": 0.2, "opt_args": {"eps": 1e-6}}, "trainer": {"max_epochs": 9}}
    variants = {"residual": {}, "dhc2": changes, "fast": {"connection": "dhc2", "model": {"lr": 0.1}}}
    told = "model.lr 0.01, model.weight_decay 0.2, model.opt_args.eps 1e-06, trainer.max_epochs 9"
    assert make(variants=variants).notes() == [
        f"dhc2 is dhc2 with {told}. fast is dhc2 with model.lr 0.1. "
        "The others have model.lr 0.001, model.weight_decay 0.05, trainer.max_epochs 2."
    ]
    assert make(variants={"residual": {}, "a": {"connection": "dhc2"}}).notes() == []


def test_settings_of_another_version(make, tiny):
    """What they lack is as by default today; a default that they record stays what it was."""
    there = {
        "model": {"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3, "weight_decay": 0.05, "vae": None},
        "data": {"root": None, "batch_size": 8, "num_workers": 3, "scale": [0.08, 1.0]},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": True, "precision": None},
    }
    path = make().cell_folder("residual", 0) / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(there))
    checkpoint = path.parent / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    make().check_settings()
    make(jobs=2).check_settings()  # with devices=1
    for group, name, value, message in (
        ("model", "weight_decay", 0.1, "model.weight_decay is 0.1 there and 0.05 here"),
        ("model", "ema_decay", 0.9, "model.ema_decay is 0.9 there and None here"),
        ("model", "lr", None, "model.lr is None there and 0.001 here"),
        ("data", "scale", [0.5, 1.0], r"data.scale is \[0.5, 1.0\] there and \[0.08, 1.0\] here"),
        ("data", "hflip", 0.25, "data.hflip is 0.25 there and 0.5 here"),
        ("trainer", "devices", 2, "trainer.devices is 2 there and None here"),
    ):
        path.write_text(json.dumps({**there, group: {**there[group], name: value}}))
        with pytest.raises(ValueError, match=rf"residual/seed0 was run with other settings \({message}\)"):
            make().check_settings()
    checkpoint.unlink()
    make().check_settings()  # it was never trained
    write_result(make(), "residual", 0)
    with pytest.raises(ValueError, match=rf"residual/seed0 was run with other settings \({message}\)"):
        make().check_settings()


def cells_in(text):
    return sorted(re.findall(r"^\[\d/4\] (\w+), seed (\d)$", text, re.MULTILINE))


def test_two_processes_share_a_study(make, tmp_path, monkeypatch, capfd):
    """Each cell is run by one of them, and is what it is by one process; a cell repeated gives the same again."""
    threads, signals = torch.get_num_threads(), (signal.SIGINT, signal.SIGTERM)
    children = {*multiprocessing.active_children()}
    handlers = [signal.getsignal(number) for number in signals]
    plan = {"variants": ["residual", "dhc2"], "timing_rounds": 0}
    torch.set_num_threads(1)  # as each of the two has
    one = make(out=str(tmp_path / "one"), **plan).run(say=lambda _: None).parent
    torch.set_num_threads(threads)
    run_cell, out, said = Study.run_cell, tmp_path / "two", []

    def wait_and_run(self, variant, seed):
        """The other process has a cell too before this one's first is done."""
        deadline = time.monotonic() + 300
        while not [*out.glob("*/*/result.json")] and time.monotonic() < deadline:
            time.sleep(0.05)
        return run_cell(self, variant, seed)

    monkeypatch.setattr(Study, "run_cell", wait_and_run)
    capfd.readouterr()
    make(out=str(out), jobs=2, **plan).run(say=said.append)
    assert torch.get_num_threads() == threads
    assert [signal.getsignal(number) for number in signals] == handlers
    mine, theirs = cells_in("\n".join(said)), cells_in(capfd.readouterr().out)
    assert sorted(mine + theirs) == [(v, s) for v in ("dhc2", "residual") for s in "01"]
    assert mine
    assert theirs
    assert {*multiprocessing.active_children()} <= children  # loading processes of other tests may still be there
    results = [[*csv.DictReader((folder / "results.csv").read_text().splitlines())] for folder in (one, out)]
    assert [row | {"seconds": ""} for row in results[0]] == [row | {"seconds": ""} for row in results[1]]
    assert (one / "curves.csv").read_text() == (out / "curves.csv").read_text()

    monkeypatch.setattr(Study, "run_cell", run_cell)
    torch.set_num_threads(1)
    assert repeat_cell(make(out=str(tmp_path / "three"), **plan), "dhc2", 1, one, said.append)
    torch.set_num_threads(threads)
    found = re.match(r"top-1 % ([\d.]+), recorded with this seed ([\d.]+); 2 recorded seeds ", said[-1])
    assert found[1] == found[2]
    assert not (tmp_path / "three" / "residual").exists()


@pytest.mark.parametrize(
    ("more", "cores", "jobs", "threads"),
    [
        ({}, 2, 2, 3),
        ({}, 4, 4, 1),
        ({}, 64, 6, 1),  # as many as there are cells
        ({"seeds": [0], "variants": ["dhc2"]}, 4, 1, 6),
        ({"jobs": 3}, 2, 3, 2),
        ({"trainer": {"accelerator": "cpu", "devices": 2}}, 4, 1, 6),
        ({"trainer": {"accelerator": "cpu", "num_nodes": 2}}, 4, 1, 6),
        ({"trainer": {"max_epochs": 1}}, 4, 1, 6),  # on a GPU, here
    ],
)
def test_as_many_cells_at_a_time_as_there_are_cores(make, monkeypatch, more, cores, jobs, threads):
    monkeypatch.setattr(module, "count_cores", lambda: cores)
    monkeypatch.setattr(module, "pick_device", lambda: "cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    built = make(**{"jobs": "auto", **more})
    assert (built.jobs, built.threads) == (jobs, threads)
    assert built.trainer.get("devices") == (1 if jobs > 1 else more.get("trainer", {}).get("devices"))


def test_costs_are_measured_with_the_threads_of_a_cell(make, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(costs, "measure", lambda *_: seen.append(torch.get_num_threads()) or ({}, {}))
    monkeypatch.setattr(costs, "ratios", lambda *_: [1.0])
    built = make(variants=["dhc2"], seeds=[0])
    built.threads = 3
    with pytest.raises(KeyError):  # nothing was measured
        costs.measure_costs(built, lambda _: None)
    assert (seen, torch.get_num_threads()) == ([3], before)
    assert built.timed_on.endswith("(3 threads)")


def write_result(study, variant, seed, top1=0.7):
    path = study.cell_folder(variant, seed) / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"variant": variant, "seed": seed, "top1": top1, "seconds": 0}))
    return study.read_result(variant, seed)


@pytest.mark.parametrize("finished", [True, False])
def test_a_cell_that_another_process_has_is_left_to_it(make, monkeypatch, finished):
    """Waited for, and taken up where the other ends without a result."""
    study, ran, said, taken = make(variants=["residual", "dhc2"], seeds=[0]), [], [], threading.Event()
    folder = study.cell_folder("residual", 0)
    folder.mkdir(parents=True)

    def run_cell(self, variant, seed):
        with pytest.raises(Timeout):
            FileLock(self.cell_folder(variant, seed) / "lock", blocking=False).acquire()
        ran.append(variant)
        return write_result(self, variant, seed)

    def other_process():
        with FileLock(folder / "lock"):
            taken.set()
            while study.read_result("dhc2", 0) is None:
                time.sleep(0.05)
            time.sleep(0.5)  # the first round is over
            if finished:
                write_result(study, "residual", 0, 0.25)

    monkeypatch.setattr(Study, "run_cell", run_cell)
    other = threading.Thread(target=other_process)
    other.start()
    assert taken.wait(300)
    several = make(variants=["residual"], seeds=[0], trainer={"accelerator": "cpu", "devices": 2})
    with pytest.raises(ValueError, match=r"another process is running .*residual/seed0; wait for it, or stop it"):
        several.run_cells()
    study.run_cells(said.append)
    other.join()
    assert ran == ["dhc2"] + ["residual"] * (not finished)
    last = "[1/2] residual, seed 0" + ": done before, top-1 % 25.00" * finished
    assert said[:2] == ["[2/2] dhc2, seed 0", "[2/2] dhc2, seed 0: top-1 % 70.00, 0 s"]
    assert said[-1] == last + ": top-1 % 70.00, 0 s" * (not finished)
    assert len(said) == 3 + (not finished)
    FileLock(folder / "lock", blocking=False).acquire().lock.release()


def test_what_is_done_once_per_study_is_done_by_one_process(make, monkeypatch):
    done = []

    def alone(self, *_):
        with pytest.raises(Timeout):
            FileLock(self.out / "lock", blocking=False).acquire()
        done.append(self)

    monkeypatch.setattr(Study, "run_cell", lambda self, variant, seed: write_result(self, variant, seed))
    for name in ("prepare", "write"):
        monkeypatch.setattr(Study, name, alone)
    monkeypatch.setattr(module, "measure_costs", alone)
    monkeypatch.setattr(module, "write_report", lambda out: None)
    make(seeds=[0]).run(say=lambda _: None)
    assert len(done) == 3


def test_a_cell_is_repeated_and_compared(make, tmp_path, monkeypatch, image_folder, capsys):
    """0.50, 0.52 and 0.54 expect 95 % of further runs within 0.52 ± 4.302653 * 0.02 * sqrt(4 / 3) = ± 0.0994."""
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    rows = [
        "variant,seed,top1",
        "dhc2,0,0.50",
        "dhc2,1,0.52",
        "dhc2,2,0.54",
        "residual,0,0.9",
        "dfc2,0,0.1",
        "dfc2,1,0",
    ]
    (recorded / "results.csv").write_text("\n".join(rows))
    (recorded / "config.yaml").write_text(yaml.safe_dump(make().config()))
    top1, ran = 0.0, []

    def run_cell(self, variant, seed):
        ran.append((variant, seed))
        return write_result(self, variant, seed, top1)

    monkeypatch.setattr(Study, "run_cell", run_cell)
    for number, (top1, inside) in enumerate(((0.619, True), (0.6195, False), (0.421, True), (0.4205, False))):
        said = []
        study, seed = make(out=str(tmp_path / str(number))), number % 2 * 7
        assert repeat_cell(study, "dhc2", seed, recorded, said.append) is inside
        assert ran == [("dhc2", seed)] * len(ran)
        ran.clear()
        with_seed = "" if seed else ", recorded with this seed 50.00"
        assert said[0] == f"[1/1] dhc2, seed {seed}"
        assert said[-1] == (
            f"top-1 % {100 * top1:.2f}{with_seed}; 3 recorded seeds 52.00 ± 2.00: "
            f"{'within' if inside else 'OUTSIDE'} 42.06 to 61.94, where 95 % of further seeds are expected"
        )
    for variant, message in (
        ("dhc3", "unknown variant 'dhc3'; did you mean dhc2"),
        ("residual", f"{recorded} has 1 recorded seeds of residual; a spread needs two at least"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            repeat_cell(make(), variant, 0, recorded)
    with pytest.raises(ValueError, match=r"3/dhc2/seed7 has been run already; --out names another folder"):
        repeat_cell(make(out=str(tmp_path / "3")), "dhc2", 7, recorded)
    assert ran == []

    command = ["compare", f"--config={recorded / 'config.yaml'}", f"--data.root={image_folder}"]
    for status, value in ((None, 0.52), (1, 0.7)):
        top1 = value
        try:
            code = main([*command, f"--out={tmp_path / 'again' / str(status)}", "--repeat=dhc2/2"])
        except SystemExit as end:
            code = end.code
        assert code == status
        assert ran.pop() == ("dhc2", 2)
        assert "recorded with this seed 54.00; " in capsys.readouterr().out
    for wrong in ([*command, "--repeat=dhc2"], [*command, "--repeat=dhc2/x"], [*command, "--repeat=/0"]):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2
        assert "--repeat takes VARIANT/SEED, and --config that of a study" in capsys.readouterr().err
    (recorded / "results.csv").rename(tmp_path / "results.csv")
    with pytest.raises(SystemExit) as end:
        main([*command, f"--out={tmp_path / 'never'}", "--repeat=dhc2/2"])
    assert end.value.code == 2
    assert f"{recorded} holds no results.csv; --config names the config.yaml of a study" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
    assert ran == []


def test_the_environment_of_a_cell(tmp_path, monkeypatch):
    """Device, versions, and the revision of the package: that which the process began with."""
    here = environment("cpu")
    assert here["device"].startswith("CPU ")
    assert here["versions"] == {
        "Python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__, "timm": timm.__version__,
        "Lightning": pl.__version__,
    }  # fmt: skip
    assert here["revision"] == settings.revision(Path(hcvision.__file__).parent)
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    for name in ("package/a.py", "beside.py"):
        (tmp_path / "repository" / name).write_text("1")

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(package.parent), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    read = settings.revision.__wrapped__
    git("init")
    assert read(package) == "unknown"
    git("add", "package")
    git("commit", "-m", "first")
    first = git("log", "-1", "--format=%h")
    git("add", "beside.py")
    git("commit", "-m", "another file")
    assert read(package) == first
    assert settings.revision(package) == first
    (package / "a.py").write_text("2")
    assert read(package) == f"{first}+"
    assert settings.revision(package) == first
    monkeypatch.setenv("PATH", "")
    assert read(package) == "unknown"


def test_variants_start_from_the_same_trunk_and_see_the_same_images(make, monkeypatch):
    seen = {}

    class Peek:
        def __init__(self, *args, callbacks, **kwargs):
            pass

        def fit(self, model, data, **kwargs):
            data.setup("fit")
            images = torch.cat([batch.images for batch in data.train_dataloader()])
            trunk = {k: v for k, v in model.state_dict().items() if "connection" not in k}
            seen[len(seen)] = (trunk, images)
            raise StopIteration

    monkeypatch.setattr(module.pl, "Trainer", Peek)
    for variant in ("residual", "dhc2", "dfc2"):
        with pytest.raises(StopIteration):
            make().run_cell(variant, 1)
    for number in (1, 2):
        assert torch.equal(seen[0][1], seen[number][1])
        assert seen[0][0].keys() == seen[number][0].keys()
        assert all(torch.equal(seen[0][0][name], seen[number][0][name]) for name in seen[0][0])


def test_a_trained_model_goes_on_with_connections(make, tiny, tmp_path):
    """From the weights of a file every variant starts at the same accuracy, which the table shows."""
    torch.manual_seed(0)
    weights = tmp_path / "residual.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3, **tiny).state_dict(), weights)
    model = {"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 1e-3, "init_from": str(weights)}
    report = make(model=model, timing_rounds=0).run(say=lambda _: None)
    rows = list(csv.DictReader((report.parent / "results.csv").read_text().splitlines()))
    assert len({row["start_top1"] for row in rows}) == 1
    start = f"{100 * float(rows[0]['start_top1']):.2f}"
    lines = [[cell.strip() for cell in line.split("|")] for line in report.read_text().splitlines() if "|" in line]
    assert lines[0][1:3] == ["variant", "at start %"]
    assert [line[2] for line in lines[2:]] == [start] * 3
    assert {row["top1"] for row in rows} != {row["start_top1"] for row in rows}


def test_other_settings_in_the_same_folder_are_refused(make, tiny):
    make(variants=["residual"], seeds=[0], timing_rounds=0).run(say=lambda _: None)
    changed = make(model={"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 2e-3})
    with pytest.raises(ValueError, match=r"residual/seed0 was run with other settings \(model.lr is 0.001 there and"):
        changed.run()


def test_a_killed_study_goes_on_where_it_was(make, image_folder, tmp_path):
    """kill -9 after the first epoch; the second run resumes that cell and equals an undisturbed one."""

    def start(out):
        study = make(out=str(out), variants=["dhc2"], seeds=[3], timing_rounds=0)
        study.trainer = {**study.trainer, "max_epochs": 6}
        return processes.Started(study.run)

    out = tmp_path / "killed"
    process = start(out)
    process.wait_for((out / "dhc2" / "seed3" / "checkpoints" / "last.ckpt").exists)
    process.kill()
    assert not (out / "dhc2" / "seed3" / "result.json").exists(), "it was not killed in time"
    results = {}
    for folder in (out, tmp_path / "undisturbed"):
        processes.wait_for_all([start(folder)])
        (results[folder.name],) = csv.DictReader((folder / "results.csv").read_text().splitlines())
        assert len(read_curve(folder / "dhc2" / "seed3", ["val_top1"])["val_top1"]) == 6
    for name in ("top1", "val_loss", "epochs", "images"):
        assert results["killed"][name] == results["undisturbed"][name]


def test_a_study_that_is_asked_to_stop_in_its_last_step_stops_there(make, monkeypatch):
    """The cell is done and kept; the next one is not begun."""
    monkeypatch.setattr(StopCleanly, "is_wanted", lambda self, trainer: trainer.fit_loop.done)
    study = make(seeds=[0])
    with pytest.raises(Stopped) as stop:
        study.run(say=lambda line: None)
    assert stop.value.code == 143
    assert [cell for cell in (("residual", 0), ("dhc2", 0)) if study.read_result(*cell)] == [("residual", 0)]


def test_costs_are_ratios_to_the_first_variant(make, monkeypatch):
    """The median over rounds of the ratio in a round, which is not the ratio of medians, and memory beside it."""
    times = {"residual": [1.0, 2.0, 9.0], "dhc2": [1.5, 4.0, 9.9], "dfc2": [3.0, 6.0, 27.0]}
    peaks = {"residual": 100.0, "dhc2": 150.0, "dfc2": 110.0}
    built = {}

    def measure(names, build, rounds, device):
        assert (rounds, device) == (2, "cpu")
        for name in names:
            built[name] = build(name)
        return times, peaks

    monkeypatch.setattr(costs, "measure", measure)
    assert costs.measure_costs(make(), lambda _: None) == {
        "residual": {"time": 1.0, "memory": 1.0},
        "dhc2": {"time": 1.5, "memory": 1.5},
        "dfc2": {"time": 3.0, "memory": 1.1},
    }
    assert list(built) == ["residual", "dhc2", "dfc2"]
    assert all(step() is None for step in built.values())
    monkeypatch.setattr(costs, "measure", lambda *_: pytest.fail("measured again"))
    assert costs.measure_costs(make(), lambda _: None)["dhc2"]["time"] == 1.5


def test_difference_of_settings():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there and 2 here"
    assert first_difference({"a": {}}, {"a": {"c": 2}}) == "a.c is None there and 2 here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": []}, "variants must be one or more"),
        ({"seeds": [1, 1]}, r"seeds must be one or more different ones, got \[1, 1\]"),
        ({"variants": ["residual", "dhc"]}, "connection must be 'residual', "),
        ({"variants": {}}, r"variants must be one or more different ones, got \[\]"),
        ({"variants": {"a": {"connection": "dhc"}}}, "connection must be 'residual', .* or one of .*got 'dhc'"),
        ({"variants": {"wide": {"model": {"lr": 1}}}}, "connection must be 'residual', .* or one of .*got 'wide'"),
        (
            {"variants": {"dhc2": {"data": {"batch_size": 4}}}},
            "variant dhc2 can change connection, model and trainer, got data$",
        ),
        (
            {"variants": {"dhc2": {"model": {"weight_decai": 0.1}}}},
            r"unknown model argument \(variant dhc2\) 'weight_decai'; did you mean weight_decay",
        ),
        (
            {"variants": {"dhc2": {"model": {"connection": "dhc4"}}}},
            r"unknown model argument \(variant dhc2\) 'connection'",
        ),
        ({"variants": {"dhc2": {"model": 3}}}, "model of variant dhc2 must be arguments and their values, got 3"),
        ({"variants": {"lock": {"connection": "dhc2"}}}, "a variant's name must be another one, got 'lock'"),
        (
            {"variants": {"classifier": {"connection": "dhc2"}}},
            "a variant's name must be another one, got 'classifier'",
        ),
        (
            {"variants": {"dhc2": {"trainer": {"max_epoch": 1}}}},
            r"unknown trainer argument \(variant dhc2\) 'max_epoch'; did you mean max_epochs",
        ),
        ({"variants": {"../dhc2": {"connection": "dhc2"}}}, "a variant's name must be of letters, .* got '../dhc2'"),
        ({"jobs": 0}, "jobs must be at least 1, .* got 0"),
        ({"jobs": 2, "trainer": {"devices": 2}}, "1 where a run has several devices, got 2 with devices=2"),
        (
            {"jobs": 2, "variants": {"dhc2": {"trainer": {"devices": "auto"}}}},
            "1 where a run has several devices, got 2 with devices=auto",
        ),
    ],
)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"hflip": 5}, {}, "hflip must be at least 0"),
        ({"auto_augment": "randaug"}, {}, "auto_augment must be a policy of timm"),
        ({}, {"in_chans": 2}, "images are read with 1 .* the model takes 2"),
    ],
)
def test_data_that_cannot_be_used_leave_nothing(make, image_folder, tiny, tmp_path, data, model, message):
    arguments = {"root": str(image_folder), "batch_size": 8, "num_workers": 0, **data}
    study = make(data=arguments, model={"model": "vit_tiny_patch16_224", "model_args": tiny | model})
    with pytest.raises(ValueError, match=message):
        study.run(say=lambda _: None)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= ({"lock"} if model else set())  # a model is built for a cell


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"lr": "abc"}}, "model.lr"),
        ({"trainer": {"max_epochs": "many"}}, "trainer.max_epochs"),
        ({"model": 3}, "model of variant dhc2 must be arguments and their values, got 3"),
    ],
)
def test_what_a_variant_changes_is_parsed_before_any_training(
    make, changes, message, tmp_path, image_folder, monkeypatch, capsys
):
    monkeypatch.setattr(Study, "run", lambda self: pytest.fail("it began"))
    config = {**make().config(), "variants": {"residual": {}, "dhc2": changes}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [f"--config={tmp_path / 'config.yaml'}", f"--data.root={image_folder}", f"--out={tmp_path / 'new'}"]
    with pytest.raises(SystemExit) as end:
        main(["compare", *command])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "new").exists()


FIRST_WAITS = """
import contextlib, multiprocessing, sys
from hcvision.studies import Study
from hcvision_command import main

@contextlib.contextmanager
def others(self, cell):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    yield False

if __name__ == "__main__":
    Study.claim = others
    main(sys.argv[1:])
"""


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def soon(is_so, seconds):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a helper of a killed process goes on")


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), pytest.param("SIGKILL", -9, marks=ON_LINUX)])
def test_helpers_end_with_the_first_process(make, image_folder, tmp_path, number, code):
    """Which waits for the cells of the other, here; that one trains, and keeps a checkpoint."""
    trainer = {"max_epochs": 1000, "accelerator": "cpu"}
    study = make(variants=["residual", "dhc2"], seeds=[0], trainer=trainer)
    (tmp_path / "first.py").write_text(FIRST_WAITS)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(study.config()))
    command = ["compare", f"--config={tmp_path / 'config.yaml'}", f"--data.root={image_folder}", "--jobs=2"]
    command.append("--trainer.enable_progress_bar=false")
    with (tmp_path / "said.txt").open("w") as file:
        first = subprocess.Popen(
            [sys.executable, str(tmp_path / "first.py"), *command, f"--out={study.out}"],
            stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    (helper,) = map(int, first.stdout.readline().split())
    last = study.cell_folder("residual", 0) / "checkpoints" / "last.ckpt"
    try:
        assert soon(last.exists, 300)
        assert is_alive(helper)
        first.send_signal(getattr(signal, number))
        assert first.wait(300) == code, (tmp_path / "said.txt").read_text()
        assert soon(lambda: not is_alive(helper), 300)
    finally:
        first.kill()
        first.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)
    assert study.read_result("residual", 0) is None
    said = (tmp_path / "said.txt").read_text()
    assert "stopping after this step or validation" in said  # that is the helper
    assert "Traceback" not in said


def test_a_helper_whose_study_was_killed_meanwhile_begins_nothing(make, monkeypatch):
    dead = types.SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr(study_processes.multiprocessing, "parent_process", lambda: dead)
    monkeypatch.setattr(study_processes.ctypes, "CDLL", lambda _: types.SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(Study, "run_cells", lambda _: pytest.fail("it began"))
    with pytest.raises(SystemExit) as end:
        study_processes.help_along(make(), torch.get_num_threads(), [], None)
    assert end.value.code == 143


@pytest.fixture
def make_generation(image_folder, tiny_dit, tmp_path):
    def build(**kwargs):
        model = {"model": "dit_tiny_patch4_pixel", "model_args": tiny_dit, "lr": 2e-3, "ema_decay": 0.5}
        arguments = {
            "out": str(tmp_path / "study"),
            "variants": ["residual", "dhc2"],
            "seeds": [0, 1],
            "model": {**model, "objective": "velocity", "sample_every": 1, "sample_count": 3, "sample_steps": 1},
            "data": {"root": str(image_folder), "dataset": "folder", "batch_size": 8, "num_workers": 0},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
            "timing_rounds": 1,
            "sampling": Sampling(steps=2, guidance=1.5),
            "samples": 12,
            "sample_batch": 5,
            "real_images": 30,
            "classifier_epochs": 1,
            "jobs": 1,
        }
        return GenerationStudy(**{**arguments, **kwargs})

    return build


def test_a_generation_study_trains_draws_and_scores(make_generation, image_folder, tmp_path, monkeypatch, capsys):
    study = make_generation()
    report = study.run(say=lambda _: None)
    text, out = report.read_text(), report.parent
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for s in "01" for v in ("residual", "dhc2")]
    assert len({row["distance"] for row in rows}) == len({row["val_loss"] for row in rows}) == 4
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == [
        "variant", "Fréchet distance", "minus residual", "class %", "val loss", "minus residual", "parameters",
        "step time", "memory",
    ]  # fmt: skip
    losses = [float(row["val_loss"]) for row in rows if row["variant"] == "dhc2"]
    assert lines[3][4].startswith(f"{sum(losses) / 2:.4f} ± ")
    how = "heun, 2 steps (3 evaluations of the model), guidance 1.5 on all channels"
    assert f"12 samples (seed 0, {how}) against 30 training images, on the features of small classifier" in text
    assert "It is no FID" in text
    for name in ("samples.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(read_curve(out / "dhc2" / "seed1", ["val_loss"])["val_loss"]) == 2
    assert read_samples(out / "dhc2" / "seed1" / "samples" / "parts", 12).shape == (12, 16, 16, 3)
    assert (out / "dhc2" / "seed1" / "grids" / "step0000018.png").is_file()

    again = pickle.loads(pickle.dumps(study))  # for a process beside this one, without what this one has looked at
    assert {*vars(study)} - {*vars(again)} == {"extractor", "real", "input_size", "board", "lines"}
    assert again.settings("dhc2") == study.settings("dhc2")
    assert again.cells == study.cells
    assert from_files(out, tmp_path) == text
    assert len(compare_again(out, image_folder, monkeypatch, capsys)) == 4
    assert make_generation().run(say=lambda _: None).read_text() == text
    with pytest.raises(ValueError, match=r"other settings \(sampling.steps is 2 there and 3 here\)"):
        make_generation(sampling=Sampling(steps=3, guidance=1.5)).run()


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_the_samples_of_a_cell_are_those_of_its_checkpoint(make_generation, tmp_path):
    """The averaged weights: what `hcvision sample` draws from the cell's folder is what was scored."""
    study = make_generation(variants=["residual"], seeds=[1], timing_rounds=0)
    study.run(say=lambda _: None)
    folder = tmp_path / "study" / "residual" / "seed1"
    sample(str(folder), out=str(tmp_path / "again"), number=12, guidance=1.5, steps=2, accelerator="cpu", devices="1")
    again = read_samples(tmp_path / "again" / "parts", 12)
    assert torch.equal(again, read_samples(folder / "samples" / "parts", 12))

    # killed after training: nothing is trained again, and the samples and scores are the same
    before = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "samples")
    study.run(say=lambda _: None)
    after = json.loads((folder / "result.json").read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert torch.equal(again, read_samples(folder / "samples" / "parts", 12))
    with pytest.raises(ValueError, match=r"network is 'small classifier, 1 epochs' there and 'Inception' here"):
        make_generation(variants=["residual"], seeds=[1], inception="weights.pth").run()


def test_variants_may_draw_otherwise(make_generation, tmp_path):
    """The same training, scored by two samplers: settings, samples and the report say which."""
    more = {"connection": "residual", "sampling": {"sampler": "sde", "steps": 3}}
    study = make_generation(variants={"ode": {"connection": "residual"}, "sde": more}, seeds=[0], timing_rounds=0)
    assert study.settings("ode")["sampling"]["steps"] == 2
    assert study.settings("sde")["sampling"] == {**study.settings("ode")["sampling"], "steps": 3, "sampler": "sde"}
    text = study.run(say=lambda _: None).read_text()
    assert (
        "ode: seed 0, heun, 2 steps (3 evaluations of the model), guidance 1.5 on all channels; sde: seed 0, " in text
    )
    assert "sde, 3 steps (coefficient sigma, last step 0.04; 3 evaluations of the model)" in text
    one, two = (
        json.loads((tmp_path / "study" / name / "seed0" / "result.json").read_text()) for name in study.variants
    )
    assert one["val_loss"] == two["val_loss"]
    assert one["distance"] != two["distance"]
    with pytest.raises(ValueError, match="sampler must be heun, euler or sde for this objective, got 'ddim'"):
        make_generation(variants={"ode": {"connection": "residual", "sampling": {"sampler": "ddim"}}})
    with pytest.raises(ValueError, match=r"unknown sampling argument \(variant ode\) 'stepps'; did you mean steps"):
        make_generation(variants={"ode": {"connection": "residual", "sampling": {"stepps": 3}}})


def test_an_encoder_that_is_not_there_is_said_first(make_generation, tmp_path):
    repa = {"connection": "dhc2", "model": {"repa": {"encoder": "local-dir:nowhere", "block": 1}}}
    with pytest.raises(ValueError, match="no timm model local-dir:nowhere to look at images with"):
        make_generation(variants={"residual": {}, "repa": repa}).run(say=lambda _: None)
    assert not (tmp_path / "study" / "residual").exists()


def test_a_study_needs_real_images(make_generation, image_folder, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "zebra").rename(other / split / "horse")
    with pytest.raises(ValueError, match=r"real_data must have the classes of data, got .*'horse'.* and .*'zebra'"):
        make_generation(real_data={"root": str(other), "dataset": "folder", "num_workers": 0}).run(say=lambda _: None)
    assert not (tmp_path / "study" / "residual").exists()
    given = {"root": str(other), "dataset": "folder", "num_workers": 0}
    assert make_generation(real_data=given).config()["real_data"] == {"dataset": "folder", "num_workers": 0}
    with pytest.raises(ValueError, match="real images beside them, and 'latents' has none to choose from"):
        make_generation(data={"dataset": "latents", "root": "nowhere"})


def test_variants_see_the_same_times_and_noise(make_generation):
    """At the start every variant predicts zero, so that the first loss of a seed is the same for all of them."""
    study, first = make_generation(variants=["residual", "dhc2", "dfc2"]), {}
    for variant in study.variants:
        for seed in (0, 1):
            module = study.build_model(variant, 3, seed)
            module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            module.log = lambda *_, **__: None
            pl.seed_everything(seed, verbose=False)
            module.on_train_batch_start(None, 0)
            batch = (torch.ones(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
            first[variant, seed] = module.training_step(batch, 0).item()
    assert len(set(first.values())) == 2
    assert first["residual", 0] == first["dhc2", 0] == first["dfc2", 0]
