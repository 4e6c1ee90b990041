"""The folder of a run."""

import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
    TQDMProgressBar,
)

from hcvision.data.files import write_whole
from hcvision.training.checkpoints import last_checkpoint, read_checkpoint
from hcvision.training.runs import equip, shorten_sockets
from hcvision.training.stopping import StopCleanly

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")


class Net(pl.LightningModule):
    """Its score is best in the second of four epochs."""

    scores = (0.2, 0.4, 0.3, 0.1)
    averaged = False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def configure_callbacks(self):
        return [EMAWeightAveraging()] if self.averaged else []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_top1", self.scores[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(run, epochs, monitor=("val_top1", "max"), checkpoint=None, **more):
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"num_sanity_val_steps": 0, "max_epochs": epochs, **more}
    data = torch.utils.data.DataLoader(torch.ones(3, 1))
    pl.Trainer(**equip(run, options, monitor=monitor)).fit(Net(), data, data, ckpt_path=checkpoint, weights_only=True)
    return {name: read_checkpoint(run / "checkpoints" / f"{name}.ckpt")["epoch"] for name in ("last", "best")}


@pytest.mark.parametrize(("monitor", "best"), [(("val_top1", "max"), 1), (("val_top1", "min"), 3)])
def test_last_is_the_last_epoch_and_best_the_best(tmp_path, monitor, best):
    """Also where the score gets worse, and also after a resume."""
    assert train(tmp_path / "a", 4, monitor) == {"last": 3, "best": best}
    assert {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert train(tmp_path / "b", 3, ("val_top1", "max")) == {"last": 2, "best": 1}
    resumed = train(tmp_path / "b", 4, ("val_top1", "max"), last_checkpoint(tmp_path / "b"))
    assert resumed == {"last": 3, "best": 1}
    assert {path.name for path in (tmp_path / "b" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def copy(run):
    shutil.copytree(run, run.with_name("copy"))
    return run.with_name("copy")


def move(run):
    return run.rename(run.with_name("moved"))


def move_twice(run):
    (moved := move(run)).with_name("deeper").mkdir()
    train(moved, 3, checkpoint=last_checkpoint(moved))  # goes on there
    return moved.rename(run.with_name("deeper") / "moved again")


def link(run):
    run.with_name("link").symlink_to(run)
    return run.with_name("link")


def name_relatively(run):
    return Path(os.path.relpath(run))


@pytest.mark.parametrize("take", [copy, move, move_twice, link, name_relatively])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_best_checkpoint_stays_the_best_wherever_its_folder_is(tmp_path, monkeypatch, take, averaged):
    """Epochs 2 and 3 score less than epoch 1."""
    monkeypatch.setattr(Net, "averaged", averaged)
    assert train(tmp_path / "run", 2) == {"last": 1, "best": 1}
    run = take(tmp_path / "run")
    assert train(run, 4, checkpoint=last_checkpoint(run)) == {"last": 3, "best": 1}
    assert read_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 6
    monkeypatch.setattr(Net, "scores", (0.2, 0.4, 0.3, 0.1, 0.5))
    assert train(run, 5, checkpoint=last_checkpoint(run)) == {"last": 4, "best": 4}


def test_a_best_checkpoint_that_was_deleted_is_the_best_of_those_that_follow(tmp_path):
    train(tmp_path, 2)
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    assert train(tmp_path, 4, checkpoint=last_checkpoint(tmp_path)) == {"last": 3, "best": 2}


def test_a_score_that_is_nan_is_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(Net, "scores", (float("nan"), 0.1, float("nan")))
    assert train(tmp_path, 3) == {"last": 2, "best": 1}


def test_a_new_training_has_no_score_to_beat(tmp_path, monkeypatch):
    train(tmp_path, 2)
    monkeypatch.setattr(Net, "scores", (0.1, 0.05))
    assert train(tmp_path, 2) == {"last": 1, "best": 0}


def test_callbacks_of_the_users_own(tmp_path):
    """Each of them is used, and those that a run has too are not there twice."""
    own = [
        ModelCheckpoint(filename="{step}", monitor="val_top1", mode="max", save_top_k=2),
        ModelCheckpoint(every_n_train_steps=2, filename="every-{step}", save_top_k=-1, save_last="link"),
        LearningRateMonitor(), EarlyStopping("val_top1", mode="max", patience=2), ModelSummary(), Timer(),
    ]  # fmt: skip
    arguments = equip(tmp_path, {"callbacks": own, "logger": None})
    assert sum(isinstance(callback, LearningRateMonitor) for callback in arguments["callbacks"]) == 1
    assert train(tmp_path, 4, callbacks=own[:2] + own[3:]) == {"last": 3, "best": 1}
    assert own[3].stopped_epoch == 3
    names = {path.stem for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last", "best", "step=6", "step=9", *(f"every-step={step}" for step in range(2, 13, 2))}
    assert not (tmp_path / "checkpoints" / "last.ckpt").is_symlink()


def test_a_progress_bar_of_the_users_own(tmp_path):
    bars = [c for c in equip(tmp_path, {"callbacks": TQDMProgressBar()})["callbacks"] if isinstance(c, ProgressBar)]
    assert [type(bar) for bar in bars] == [TQDMProgressBar]


def test_a_trial_run_keeps_nothing(tmp_path):
    """Nor does it touch the run that is there."""
    train(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(tmp_path, 2, fast_dev_run=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_processes_meet_where_a_socket_has_a_name_short_enough(tmp_path, monkeypatch):
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    shorten_sockets()
    with multiprocessing.connection.Listener(family="AF_UNIX") as listener:
        assert listener.address.startswith("/tmp/")
    assert tempfile.gettempdir() == str(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("patient", [False, True])
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, patient):
    """But not a process that another one stops, to which Ctrl-C has gone too."""
    monkeypatch.setattr(StopCleanly, "patient", patient)
    stop, before = StopCleanly(tmp_path), signal.getsignal(signal.SIGTERM)
    stop.on_train_start(None, None)
    signal.raise_signal(signal.SIGINT)
    try:
        signal.raise_signal(signal.SIGTERM)
        at_once = False
    except KeyboardInterrupt:
        at_once = True
    finally:
        stop.give_back()
    assert at_once is not patient
    assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


def test_files_are_there_whole_or_not_at_all(tmp_path):
    """Killed after the bytes are written, and failing in the middle of them: what was there is there still."""
    path = tmp_path / "a.ckpt"
    write_whole(path, b"before")
    code = "import os, signal; from pathlib import Path; from hcvision.data import write_whole\n"
    code += "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    code += f"write_whole(Path({str(path)!r}), b'after' * 1000)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert path.read_bytes() == b"before"
    with pytest.raises(TypeError):
        write_whole(path, "no bytes")
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    assert path.read_bytes() == b"before"


def test_checkpoints_are_written_beside_their_place(tmp_path, monkeypatch):
    """Never in the folder for temporary files, from where a move may be a copy."""
    monkeypatch.setattr("tempfile.mkstemp", None)
    assert train(tmp_path / "a", 2) == {"last": 1, "best": 1}


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"PK\x03\x04 no archive", b"\x80\x02}q\x00.", b"\x80\x05K\x01.", b"(lp0\n", b"\x00" * 100],
)
def test_whatever_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt is no checkpoint, or a damaged one: \S") as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert len(str(error.value).splitlines()) == 1


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is no checkpoint, or a damaged one: it holds a list"):
        read_checkpoint(tmp_path / "a.pth")
