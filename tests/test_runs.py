"""The folder of a run."""

import pytest
import pytorch_lightning as pl
import torch

from hcvision.runs import equip, last_checkpoint, read_checkpoint


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
