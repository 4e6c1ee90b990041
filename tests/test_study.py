import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl
import timm
import torch

from hcvision import study
from hcvision.cli import sample
from hcvision.runs import StopCleanly, Stopped, first_difference
from hcvision.sampling import Sampling, read_samples
from hcvision.study import GenerationStudy, Study, read_curve, table


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
        }
        return Study(**{**arguments, **kwargs})

    return build


def test_a_study_runs_reports_and_is_not_run_twice(make, monkeypatch):
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
        assert len(read_curve(report.parent / name / "seed1")["val_top1"]) == 2

    monkeypatch.setattr(Study, "run_cell", lambda *_: pytest.fail("ran a finished cell again"))
    assert make().run(say=lambda _: None).read_text() == text


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

    monkeypatch.setattr(study.pl, "Trainer", Peek)
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


def test_a_start_of_nothing_right_is_shown():
    """0 % at the start is a figure like any other."""
    results = [
        {"variant": v, "seed": 0, "start_top1": 0.0, "top1": 0.5, "parameters": 100} for v in ("residual", "dhc2")
    ]
    lines = table(results, {}, ["residual", "dhc2"])
    assert [line.split("|")[2].strip() for line in (lines[0], *lines[2:])] == ["at start %", "0.00", "0.00"]


def test_other_settings_in_the_same_folder_are_refused(make, tiny):
    make(variants=["residual"], seeds=[0], timing_rounds=0).run(say=lambda _: None)
    changed = make(model={"model": "vit_tiny_patch16_224", "model_args": tiny, "lr": 2e-3})
    with pytest.raises(ValueError, match=r"residual/seed0 was run with other settings \(model.lr is 0.001 there and"):
        changed.run()


def test_a_killed_study_goes_on_where_it_was(make, image_folder, tmp_path):
    """kill -9 after the first epoch; the second run resumes that cell and equals an undisturbed one."""
    code = (
        "import json, sys; from hcvision.study import Study; import torch; torch.set_num_threads(1);"
        "Study(**json.loads(sys.argv[1])).run()"
    )

    def arguments(out):
        study = make(out=str(out), variants=["dhc2"], seeds=[3], timing_rounds=0)
        trainer = {**study.trainer, "max_epochs": 6}
        return json.dumps(
            {"out": str(out), "variants": ["dhc2"], "seeds": [3], "model": study.model, "data": study.data,
             "trainer": trainer, "timing_rounds": 0}
        )  # fmt: skip

    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, arguments(out)], stdout=subprocess.DEVNULL)
    last = out / "dhc2" / "seed3" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "dhc2" / "seed3" / "result.json").exists(), "it was not killed in time"
    results = {}
    for folder in (out, tmp_path / "undisturbed"):
        subprocess.run([sys.executable, "-c", code, arguments(folder)], check=True, capture_output=True)
        (results[folder.name],) = csv.DictReader((folder / "results.csv").read_text().splitlines())
        assert len(read_curve(folder / "dhc2" / "seed3")["val_top1"]) == 6
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


def test_the_table_is_paired_by_seed():
    results = [
        {"variant": v, "seed": s, "top1": top1, "parameters": p}
        for v, p, values in (("residual", 1000, (0.5, 0.6, 0.7)), ("dhc2", 1010, (0.52, 0.61, 0.72)))
        for s, top1 in enumerate(values)
    ]
    head, _, residual, dhc = table(results, {}, ["residual", "dhc2"])
    assert head.split("|")[1:4] == [" variant  ", " top-1 %       ", " minus residual "]
    assert "60.00 ± 10.00" in residual
    # differences 2, 1, 2: mean 1.667, standard deviation 0.577, standard error 0.333
    assert "61.67 ± 10.02" in dhc
    assert "+1.67 ± 0.33" in dhc
    assert "1,010 (+1.00 %)" in dhc


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

    monkeypatch.setattr(study, "measure", measure)
    assert make().costs(lambda _: None) == {
        "residual": {"time": 1.0, "memory": 1.0},
        "dhc2": {"time": 1.5, "memory": 1.5},
        "dfc2": {"time": 3.0, "memory": 1.1},
    }
    assert list(built) == ["residual", "dhc2", "dfc2"]
    assert all(step() is None for step in built.values())
    monkeypatch.setattr(study, "measure", lambda *_: pytest.fail("measured again"))
    assert make().costs(lambda _: None)["dhc2"]["time"] == 1.5


def test_difference_of_settings():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there and 2 here"
    assert first_difference({"a": {}}, {"a": {"c": 2}}) == "a.c is None there and 2 here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": []}, "variants must be one or more"),
        ({"seeds": [1, 1]}, r"seeds must be one or more different ones, got \[1, 1\]"),
        ({"variants": ["residual", "dhc"]}, "connection must be 'residual' or one of"),
    ],
)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


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
        }
        return GenerationStudy(**{**arguments, **kwargs})

    return build


def test_a_generation_study_trains_draws_and_scores(make_generation, monkeypatch):
    report = make_generation().run(say=lambda _: None)
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
    assert "12 samples (seed 0, guidance 1.5) against 30 training images, on the features of small classifier" in text
    assert "It is no FID" in text
    for name in ("samples.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(read_curve(out / "dhc2" / "seed1", GenerationStudy.curves)["val_loss"]) == 2
    assert read_samples(out / "dhc2" / "seed1" / "samples" / "parts", 12).shape == (12, 16, 16, 3)
    assert (out / "dhc2" / "seed1" / "grids" / "step0000018.png").is_file()

    monkeypatch.setattr(GenerationStudy, "run_cell", lambda *_: pytest.fail("ran a finished cell again"))
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


def test_a_study_needs_real_images(make_generation, image_folder, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "zebra").rename(other / split / "horse")
    with pytest.raises(ValueError, match=r"real_data must have the classes of data, got .*'horse'.* and .*'zebra'"):
        make_generation(real_data={"root": str(other), "dataset": "folder", "num_workers": 0}).run(say=lambda _: None)
    assert not (tmp_path / "study" / "residual").exists()
    with pytest.raises(ValueError, match="real images beside them, and 'latents' has none to choose from"):
        make_generation(data={"dataset": "latents", "root": "nowhere"})


def test_variants_see_the_same_times_and_noise(make_generation):
    """At the start every variant predicts zero, so that the first loss of a seed is the same for all of them."""
    study, first = make_generation(), {}
    for variant in ("residual", "dhc2", "dfc2"):
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
