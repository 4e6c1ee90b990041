"""The folder of a run."""

import signal
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch

from hcvision.runs import StopCleanly, equip, last_checkpoint, read_checkpoint, write_whole


class Net(pl.LightningModule):
    """Its score is best in the second of four epochs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_top1", (0.2, 0.4, 0.3, 0.1)[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(run, epochs, monitor=("val_top1", "max"), checkpoint=None):
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"num_sanity_val_steps": 0, "max_epochs": epochs}
    data = torch.utils.data.DataLoader(torch.ones(3, 1))
    pl.Trainer(**equip(run, options, monitor=monitor)).fit(Net(), data, data, ckpt_path=checkpoint, weights_only=True)
    return {name: read_checkpoint(run / "checkpoints" / f"{name}.ckpt")["epoch"] for name in ("last", "best")}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize(("monitor", "best"), [(("val_top1", "max"), 1), (("val_top1", "min"), 3)])
def test_last_is_the_last_epoch_and_best_the_best(tmp_path, monitor, best):
    """Also where the score gets worse, and also after a resume."""
    assert train(tmp_path / "a", 4, monitor) == {"last": 3, "best": best}
    assert {path.name for path in (tmp_path / "a" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert train(tmp_path / "b", 3, ("val_top1", "max")) == {"last": 2, "best": 1}
    resumed = train(tmp_path / "b", 4, ("val_top1", "max"), last_checkpoint(tmp_path / "b"))
    assert resumed == {"last": 3, "best": 1}
    assert {path.name for path in (tmp_path / "b" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


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
    code = "import os, signal; from pathlib import Path; from hcvision.runs import write_whole\n"
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
