"""What is not finite is found without waiting for the device in every step, and before anything of it is kept."""

import collections
import traceback

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from hcvision.data import ImageData
from hcvision.training import ImageClassifier, ImageGenerator, equip
from hcvision.training.finite import FiniteCheck
from hcvision.training.module import TimmModule

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)


OWNERS = ("/torch/optim/", "/hcvision/", "/timm/", "/torchmetrics/", "/pytorch_lightning/")


class Waits(TorchDispatchMode):
    """Counts by step what would wait for a GPU: ``item``, ``bool`` of a tensor, ``tolist``, ``cpu``, ``numpy``.

    Not what AdamW reads: the number of the step, which is on the CPU.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.step: int | None = None
        self.found: collections.Counter = collections.Counter()
        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **kwargs):
            self.count()
            return method(*args, **kwargs)

        return call

    def count(self):
        if self.step is not None:
            files = [frame.filename for frame in reversed(traceback.extract_stack())]
            callers = [next((own for own in OWNERS if own in file), None) for file in files]
            if next(filter(None, callers)) != "/torch/optim/":
                self.found[self.step] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            self.count()
        return function(*args, **(kwargs or {}))


class Watch(pl.Callback):
    def __init__(self, waits):
        self.waits = waits

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.waits.step = batch_idx

    def on_train_batch_end(self, *_):
        self.waits.step = None


MODULES = {
    "classify": (ImageClassifier, {"model": "vit_tiny_patch16_224", "model_args": TINY, "mixup": 0.2}),
    "generate": (
        ImageGenerator,
        {"model": "dit_tiny_patch4_pixel", "model_args": {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}},
    ),
}


@pytest.fixture
def fit(image_folder, tmp_path):
    def run(module, *callbacks, **trainer):
        data = ImageData(root=str(image_folder), batch_size=6, num_workers=0, no_aug=True)
        usual = {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
        arguments = equip(tmp_path / "run", {**usual, "log_every_n_steps": 4, **trainer}, monitor=module.monitor)
        arguments["callbacks"] += callbacks
        pl.Trainer(**arguments).fit(module, data)

    return run


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(TimmModule, "asks_every_step", False)


@pytest.mark.parametrize("task", MODULES)
def test_a_step_waits_once_per_logging_interval(task, fit, as_on_a_gpu, monkeypatch):
    """12 steps, logged every 4: what logs is looked at there, and nothing in the steps between."""
    kind, arguments = MODULES[task]
    waits = Waits(monkeypatch)
    with waits:
        fit(kind(connection="dhc2", num_classes=3, ema_decay=0.9, **arguments), Watch(waits), gradient_clip_val=1.0)
    assert set(waits.found) == {3, 7, 11}


class Break(pl.Callback):
    """A weight becomes NaN before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            next(module.model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize(("interval", "broken", "done"), [(4, 5, 8), (50, 5, 12), (4, 8, 12)])
def test_it_is_found_late_and_named_as_it_was(interval, broken, done, fit, as_on_a_gpu, tmp_path):
    """At the end of the logging interval, or before the validation: the step is the one where it happened."""
    module = ImageClassifier(connection="dhc2", num_classes=3, lr=1e-3, **MODULES["classify"][1])
    with pytest.raises(ValueError, match=rf"^the loss is not finite at step {broken} \(epoch 0, lr .*none yet"):
        fit(module, Break(broken), log_every_n_steps=interval)
    assert module.trainer.global_step in (done - 1, done)  # in the last step's hook, or behind it
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))


def test_nothing_of_it_is_saved(fit, as_on_a_gpu, tmp_path):
    """A checkpoint in the middle of an interval asks first."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step in (2, 7):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module = ImageClassifier(connection="dhc2", num_classes=3, **MODULES["classify"][1])
    with pytest.raises(ValueError, match="the loss is not finite at step 5"):
        fit(module, Break(5), Save(), log_every_n_steps=50)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["2.ckpt"]


def test_notes():
    """The first of several, by its name and place; once."""
    check, good, bad = FiniteCheck(), torch.tensor(1.0), torch.tensor(float("inf"))
    assert check.find() is None
    check.note({"loss": good, "gradient": good}, "step 0")
    check.note({"loss": good, "gradient": bad}, "step 1")
    check.note({"loss": bad, "gradient": bad}, "step 2")
    assert check.find() == "the gradient is not finite at step 1"
    assert check.find() is None
