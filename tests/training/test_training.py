import csv
import functools
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import threading

import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import randomize
from PIL import Image
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from pytorch_lightning.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hcvision.connections.streams import StreamConnection
from hcvision.data.arguments import check_name
from hcvision.data.module import ImageData
from hcvision.diffusion.sampling import Sampling, enlarge, grid
from hcvision.training.checkpoints import last_checkpoint, read_checkpoint
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator
from hcvision.training.metrics import MacroAccuracy
from hcvision.training.runs import equip, keep_metrics, metrics_files, quieten


@pytest.fixture
def build(tiny):
    def make(model="vit_tiny_patch16_224", **kwargs):
        return ImageClassifier(model, **{"num_classes": 3, "model_args": tiny, **kwargs})

    return make


@pytest.fixture
def images(image_folder):
    def make(**kwargs):
        return ImageData(**{"root": str(image_folder), "batch_size": 8, "num_workers": 0, "no_aug": True, **kwargs})

    return make


@pytest.fixture
def fit(images, trainer_args):
    def run(model, max_epochs=2, data=None, **kwargs):
        trainer = pl.Trainer(max_epochs=max_epochs, **{**trainer_args, **kwargs})
        trainer.fit(model, data or images())
        return trainer

    return run


@pytest.mark.parametrize("connection", ["residual", "dhc2", "dfc2"])
def test_it_learns(build, fit, connection):
    model = build(connection=connection, lr=2e-3, weight_decay=0.0, warmup_steps=10)
    trainer = fit(model, max_epochs=4)
    assert trainer.callback_metrics["val_top1"] > 0.9
    if connection != "residual":  # the connections learned too
        moved = model.model.blocks[0].connection1.static_alpha - model.model.blocks[0].connection1.initial_weights()[0]
        assert moved.abs().max() > 1e-3


def test_metrics_are_plain_top1_over_all_images(build, fit, images):
    """Micro, not timm's or torchmetrics' macro; every image once, though 39 is no multiple of 8."""
    model = build(lr=1e-3)
    trainer = fit(model, max_epochs=1)
    data = images()
    data.trainer = trainer
    data.setup()
    model.eval()
    with torch.no_grad():
        logits, targets = zip(*((model(batch.images), batch.targets) for batch in data.val_dataloader()), strict=True)
    logits, targets = torch.cat(logits), torch.cat(targets)
    assert len(targets) == 39
    assert trainer.callback_metrics["val_top1"] == pytest.approx((logits.argmax(1) == targets).double().mean())
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert "val_top5" not in trainer.callback_metrics  # three classes


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_steps_per_update_with_warmup(build, fit, accumulate):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    model = build(lr=1.0, warmup_steps=3, min_lr=0.1, opt="sgd")
    trainer = fit(model, callbacks=[Watch()], accumulate_grad_batches=accumulate, gradient_clip_val=1e-9)
    total = 2 * math.ceil(9 / accumulate)
    assert trainer.global_step == total
    expected = [step / 3 for step in range(3)]
    expected += [0.1 + 0.45 * (1 + math.cos(math.pi * step / (total - 3))) for step in range(total - 3)]
    assert rates == pytest.approx(expected)


def test_layer_decay_reaches_the_optimizer(build, fit):
    groups = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            groups[:] = [(g["lr"], g["lr_scale"]) for g in trainer.optimizers[0].param_groups]

    fit(build(connection="dhc2", layer_decay=0.5, sched="constant", lr=1e-3), max_epochs=1, callbacks=[Watch()])
    assert {scale for _, scale in groups} == {1.0, 0.5, 0.25, 0.125}
    assert all(lr == pytest.approx(1e-3 * scale) for lr, scale in groups)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_connection_lr_factor(build, fit, layer_decay):
    """Connections learn 4 times as fast as their block, all else as without the factor."""
    rates = []
    for factor in (1.0, 4.0):
        model = build(
            connection="dhc2", layer_decay=layer_decay, connection_lr_factor=factor, sched="constant", lr=1e-3
        )
        optimizer = fit(model, max_epochs=1).optimizers[0]
        names = {id(p): name for name, p in model.model.named_parameters()}
        groups = [(names[id(p)], g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
        rates.append({name: (lr, decay) for name, lr, decay in groups})
        assert len(groups) == len(rates[-1]) == len(names)
    for name, (lr, decay) in rates[0].items():
        factor = 4 if ".connection" in name else 1
        assert rates[1][name] == (pytest.approx(factor * lr), decay), name
    with pytest.raises(ValueError, match="connection_lr_factor must be above 0, got 0"):
        build(connection="dhc2", connection_lr_factor=0)


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_every_parameter_is_optimized_once_and_static_ones_do_not_decay(build, fit, opt):
    model = build(connection="dhc2", weight_decay=0.3, opt=opt)
    trainer = fit(model, max_epochs=1, limit_train_batches=1)
    names = {id(p): name for name, p in model.model.named_parameters()}
    groups = [(names[id(p)], group) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(name for name, _ in groups) == sorted(names.values())
    for name, group in groups:
        if "static" in name or "scale" in name:
            assert group["weight_decay"] == 0, name
        if "dynamic" in name and name.endswith("_fn"):
            assert group["weight_decay"] == 0.3, name
        if opt == "muon" and "connection" in name:
            assert group["use_fallback"], name


def test_mixup_trains_on_soft_targets(build, fit, images):
    model = build(mixup=0.8, cutmix=1.0, label_smoothing=0.1, lr=1e-3)
    trainer = fit(model, max_epochs=1)
    assert "train_top1" not in trainer.callback_metrics
    assert trainer.callback_metrics["train_loss"] > 0.3
    with pytest.raises(ValueError, match="batch_size must be even for mixup and cutmix, got 7"):
        fit(build(mixup=0.8), data=images(batch_size=7))


def test_ema_is_what_is_validated_and_saved(build, fit, tmp_path):
    model = build(ema_decay=0.0, lr=1e-3)  # an average that forgets all: the current weights
    trainer = fit(model, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "ema.ckpt")
    checkpoint = read_checkpoint(tmp_path / "ema.ckpt")
    assert set(checkpoint["current_model_state"]) == set(checkpoint["state_dict"])
    slow = build(ema_decay=0.999, lr=1e-3)
    start = slow.model.head.weight.detach().clone()
    fit(slow, max_epochs=1)
    fast = build(lr=1e-3)
    fast.load_state_dict(model.state_dict())
    assert (slow.model.head.weight - start).abs().max() < 0.1 * (model.model.head.weight - start).abs().max()


def test_a_run_resumes_to_the_same_weights(build, fit, images, trainer_args, tmp_path):
    def run(epochs, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        model = build(connection="dhc2", lr=2e-3, warmup_steps=4)
        trainer = pl.Trainer(max_epochs=4, **trainer_args)
        stop = type("Stop", (pl.Callback,), {})()
        stop.on_train_epoch_end = lambda trainer, module: setattr(
            trainer, "should_stop", trainer.current_epoch + 1 == epochs
        )
        trainer.callbacks.append(stop)
        trainer.fit(model, images(), ckpt_path=ckpt_path, weights_only=True)
        return model, trainer

    whole, _ = run(4)
    _, half = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = run(4, tmp_path / "half.ckpt")
    assert trainer.global_step == 4 * 9
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_another_architecture_is_refused(build, fit, tmp_path):
    trainer = fit(build(connection="dhc2"), max_epochs=1, limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "dhc2.ckpt")
    checkpoint = read_checkpoint(tmp_path / "dhc2.ckpt")
    with pytest.raises(ValueError, match="connection is 'dhc2' there and 'dhc4' here"):
        build(connection="dhc4").on_load_checkpoint(checkpoint)
    del checkpoint["hyper_parameters"]
    with pytest.raises(ValueError, match=r"another architecture: model\.blocks\.0.*connection1.* is not in this model"):
        build(connection="residual").on_load_checkpoint(checkpoint)
    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "dhc2.ckpt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="no checkpoint, or a damaged one"):
        read_checkpoint(tmp_path / "broken.ckpt")
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": print}))
    with pytest.raises(ValueError, match="no checkpoint, or a damaged one"):
        read_checkpoint(tmp_path / "evil.ckpt")


def test_init_from_takes_weights_and_resizes_the_head(build, fit, tiny, tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, **tiny)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build(connection="dhc2", init_from=str(tmp_path / "w.pth"))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.model.forward_features(x), source.forward_features(x))
    assert model.model.head.weight.shape == (3, 48)
    trainer = fit(model, max_epochs=1, limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = build(connection="dhc2", init_from=str(tmp_path / "run.ckpt"))
    for (name, a), b in zip(model.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r"are of another architecture: .*blocks\.1"):
        build(model_args={**tiny, "depth": 1}, init_from=str(tmp_path / "w.pth"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        build(init_from="nowhere.pth")


def test_bf16_mixed_trains(build, fit):
    trainer = fit(build(connection="dhc2", lr=3e-3), max_epochs=3, precision="bf16-mixed")
    assert trainer.callback_metrics["val_top1"] > 0.5
    assert math.isfinite(trainer.callback_metrics["train_loss"])


def test_compile_keeps_keys_and_values(build, trainer_args, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = build(connection="dfc2")
    names = list(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.hparams["compile"] = True
    model.trainer = pl.Trainer(**trainer_args)
    model.setup("validate")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_tiny_patch16_224_dch2"}, "unknown model .*did you mean vit_tiny_patch16_224_dhc2"),
        ({"opt": "adamww"}, "unknown opt 'adamww'; did you mean adamw"),
        ({"sched": "cosin"}, "unknown sched 'cosin'; did you mean cosine"),
        ({"connection": "dhc"}, "connection must be 'residual', "),
        ({"warmup_steps": 1, "warmup_epochs": 1}, "give warmup_steps or warmup_epochs"),
        ({"connection": "dhc2", "connection_backend": "cuda"}, "unknown connection_backend 'cuda'"),
        ({"connection_recompute": 2}, "recompute=2 needs a model with connections"),
        ({"stream_dtype": "bfloat16"}, "stream_dtype=bfloat16 needs a model with connections"),
        (
            {"connection": "dhc2", "stream_dtype": "int8"},
            "stream_dtype must be one of bfloat16, float16, float32, got int8",
        ),
        ({"connection_recompute": 2, "grad_checkpointing": True}, "has no use with grad_checkpointing"),
    ],
)
def test_wrong_arguments(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_wrong_for_the_run(build, fit):
    with pytest.raises(ValueError, match="warmup_steps must be less than the 18 updates of the run, got 18"):
        fit(build(warmup_steps=18))
    with pytest.raises(ValueError, match=r"warmup_epochs must be less than the 2 epochs of the run, got 2\.5"):
        fit(build(warmup_epochs=2.5))
    with pytest.raises(ValueError, match="num_classes must be 3, as in the data, got 5"):
        fit(build(num_classes=5))


def test_check_name_accepts_hub_names():
    check_name("model", "hf-hub:timm/vit_tiny", ["vit_tiny"], remote=True)


def test_metrics_of_a_resumed_run_are_kept(tmp_path):
    for content in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(content)
        keep_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("third")
    assert [path.read_text() for path in metrics_files(tmp_path)] == ["first", "second", "third"]


@pytest.fixture
def generator(tiny_dit):
    def make(model="dit_tiny_patch4_pixel", **kwargs):
        arguments = {"num_classes": 3, "model_args": tiny_dit, "lr": 2e-3, "ema_decay": 0.5, "sample_every": 0}
        return ImageGenerator(model, **{**arguments, **kwargs})

    return make


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.mark.parametrize("connection", ["residual", "dhc2", "dfc2"])
@pytest.mark.parametrize("objective", ["ddpm", "velocity"])
def test_a_diffusion_model_learns(generator, fit, connection, objective):
    losses = Losses()
    model = generator(connection=connection, objective=objective)
    trainer = fit(model, max_epochs=6, callbacks=[losses], gradient_clip_val=1.0)
    first, last = sum(losses.values[:9]) / 9, sum(losses.values[-9:]) / 9
    assert last < 0.8 * first
    assert trainer.callback_metrics["val_loss"] < 0.8 * first
    if connection != "residual":
        moved = model.model.blocks[0].connection1.static_alpha - model.model.blocks[0].connection1.initial_weights()[0]
        assert moved.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_resumed_run_goes_on_with_the_same_losses(generator, fit, tmp_path):
    """Times, noise, dropped labels, the average of the weights: all as if nothing had happened."""
    whole, first, second = Losses(), Losses(), Losses()
    torch.manual_seed(5)
    straight = generator(connection="dhc2")
    straight_trainer = fit(straight, max_epochs=3, callbacks=[whole])
    torch.manual_seed(5)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer = fit(generator(connection="dhc2"), max_epochs=1, callbacks=[first, keep], enable_checkpointing=True)
    torch.manual_seed(99)  # nothing hangs on where the generator is
    resumed = generator(connection="dhc2")
    again = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    resumed_trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[second, again],
    )  # fmt: skip
    resumed_trainer.fit(resumed, trainer.datamodule, ckpt_path=keep.last_model_path, weights_only=True)
    assert first.values + second.values == whole.values
    assert len(set(whole.values)) == len(whole.values) == 27
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert straight_trainer.callback_metrics["val_loss"] == resumed_trainer.callback_metrics["val_loss"]


def test_validation_loss_is_of_the_images_alone(generator, fit, images):
    """Each image has its own time and noise, so that batches of another size give the same."""
    model = generator()
    trainer = fit(model, max_epochs=1)
    results = []
    for size in (39, 8, 8):
        data = images(eval_batch_size=size)
        results.append(pl.Trainer.validate(trainer, model, data, verbose=False)[0]["val_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[1] == results[2]
    other = generator(seed=1)
    other.load_state_dict(model.state_dict())
    assert abs(trainer.validate(other, images(), verbose=False)[0]["val_loss"] - results[0]) > 1e-3


def test_labels_are_dropped_and_noise_is_fresh(generator):
    model, seen = generator(label_dropout=0.25), []

    def keep(net, x, y, t, noise):
        seen.append((y, t, noise))
        return torch.zeros(len(x))

    model.diffusion.loss = keep
    images, classes = torch.zeros(4000, 3, 1, 1), torch.arange(4000) % 3
    model.batch_loss((images, classes))
    (y, t, noise) = seen[0]
    dropped = y == 3
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(y[~dropped], classes[~dropped])
    assert (t.min(), t.max()) == (0, 999)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    for name, one in {"time": t.double(), "noise": noise.flatten(1).mean(1).double()}.items():
        correlation = torch.corrcoef(torch.stack([one, dropped.double()]))[0, 1]
        assert abs(correlation) < 0.06, name


def test_grids_are_drawn_with_the_averaged_weights(generator, fit, tmp_path):
    """At the end of an epoch, into the run's folder and TensorBoard; the checkpoint draws the same picture."""
    model = generator(sample_every=2, sample_count=6, sample_steps=2, sample_guidance=1.5, ema_decay=0.9)
    logger = pl.loggers.TensorBoardLogger(str(tmp_path), name="", version="tensorboard")
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    fit(model, max_epochs=4, logger=logger, callbacks=[keep], enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["step0000018.png", "step0000036.png"]
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    reader.Reload()
    assert [event.step for event in reader.Images("samples")] == [18, 36]

    state = read_checkpoint(keep.last_model_path)
    pictures = []
    for weights in (state["state_dict"], state["current_model_state"]):
        again = generator(sample_every=2, sample_count=6, sample_steps=2, sample_guidance=1.5)
        again.load_state_dict({key: value for key, value in weights.items() if key in again.state_dict()}, strict=False)
        again.eval().data_config = model.data_config
        drawn = again.generate(torch.arange(6) % 3, range(6), again.sampling)
        pictures.append(np.asarray(enlarge(grid(drawn, 3), 640)))
    logged = np.asarray(Image.open(tmp_path / "grids" / "step0000036.png"))
    assert np.array_equal(pictures[0], logged)
    assert not np.array_equal(pictures[1], logged)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision(generator, fit, tiny_dit, qk_norm):
    losses = Losses()
    model = generator(connection="dhc4", model_args={**tiny_dit, "qk_norm": qk_norm})
    fit(model, max_epochs=1, precision="bf16-mixed", callbacks=[losses], gradient_clip_val=1.0)
    assert all(math.isfinite(value) for value in losses.values)
    full = Losses()
    model = generator(connection="dhc4", model_args={**tiny_dit, "qk_norm": qk_norm})
    fit(model, max_epochs=1, callbacks=[full], gradient_clip_val=1.0)
    assert losses.values == pytest.approx(full.values, rel=0.05)


def test_weights_of_other_classes(generator, tmp_path):
    """A trained DiT goes on with connections and other classes: all but the embedding of classes is taken over."""
    trained = randomize(generator(num_classes=5)).model
    torch.save({"ema": trained.state_dict(), "model": {}}, tmp_path / "trained.pt")
    model = generator(connection="dfc2", init_from=str(tmp_path / "trained.pt")).model
    own = model.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(own[name], value) != name.startswith("y_embedder"), name
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    trained.y_embedder, y = model.y_embedder, torch.tensor([0, 3])
    torch.testing.assert_close(model(x, t, y), trained(x, t, y))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit_tiny_patch16_224", "model_args": {}}, "vit_tiny_patch16_224 is no diffusion model; dit_"),
        ({"objective": "flow"}, "unknown objective 'flow'"),
        ({"objective": "velocty"}, "did you mean velocity"),
        ({"label_dropout": 1.0}, "label_dropout must be at least 0 and below 1, got 1.0"),
        ({"objective": "velocity", "sample_guidance": -1.0}, "guidance needs scale >= 0"),
    ],
)
def test_wrong_arguments_of_a_generator(generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        generator(**arguments)


def test_a_dit_does_not_classify(build):
    with pytest.raises(ValueError, match=r"dit_tiny_patch4_pixel is a diffusion model.*--task generate"):
        build("dit_tiny_patch4_pixel", model_args={"img_size": 16})


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({}, {"mean": [0.4, 0.5, 0.5]}, r"mean and std must be 0.5 to draw images, got \[0.4, 0.5, 0.5\] and \[0.5"),
        ({"vae": "some/vae"}, {}, "model.vae is for latents .*, got 'some/vae' and images"),
        ({"warmup_epochs": 3.0}, {}, "warmup_epochs must be less than the 2 epochs of the run, got 3"),
    ],
)
def test_data_and_settings_that_do_not_fit(generator, fit, images, arguments, data, message):
    with pytest.raises(ValueError, match=message):
        fit(generator(**arguments), data=images(**data))


def test_epochs_of_warmup_in_a_run_of_steps(build, fit):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit(
        build(lr=1.0, warmup_epochs=1, sched="constant", opt="sgd"),
        max_epochs=-1,
        max_steps=13,
        callbacks=[Watch()],
        gradient_clip_val=1e-9,
    )
    assert rates == pytest.approx([step / 9 for step in range(9)] + [1.0] * 4)


def test_a_model_runs_without_the_compiler_that_compiling_needs(build, fit, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.warns(
        UserWarning, match=r"there is no compiler, which torch\.compile needs: the model runs uncompiled"
    ):
        fit(build(compile=True), max_epochs=1, limit_train_batches=1, limit_val_batches=1)


class Rates(pl.Callback):
    """The rate of every batch; asks to stop after so many."""

    def __init__(self, stop=None):
        self.rates, self.stop = [], stop

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer.should_stop |= len(self.rates) == self.stop


WARMED = [step / 4 for step in range(4)]


@pytest.mark.parametrize(
    ("sched", "arguments", "rates"),
    [
        *((sched, None, [*WARMED, *[1.0] * 16]) for sched in ("cosine", "tanh", "poly", "wsd", "constant")),
        ("step", {"decay_epochs": 1}, [*WARMED, *[1.0] * 9, *[0.1] * 7]),
        ("multistep", {"decay_milestones": [1]}, [*WARMED, *[1.0] * 8, *[0.1] * 8]),
    ],
)
def test_an_endless_run_trains(build, fit, sched, arguments, rates, recwarn):
    """At a rate that stays where a schedule needs an end, and says so."""
    watch = Rates(stop=20)
    model = build(lr=1.0, warmup_steps=4, sched=sched, sched_args=arguments, opt="sgd")
    trainer = fit(model, max_epochs=-1, callbacks=[watch], gradient_clip_val=1e-9)
    assert trainer.global_step == 20
    assert watch.rates == pytest.approx(rates)
    said = [str(w.message) for w in recwarn if "no set number of updates" in str(w.message)]
    assert bool(said) == (sched in ("cosine", "tanh", "poly", "wsd"))
    assert all(f"(max_epochs is -1), which {sched} needs" in line for line in said)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*not resumable", "ignore:Be aware")
def test_a_run_of_a_time_is_kept_and_goes_on(build, images, trainer_args, tmp_path):
    """A millisecond is one step; then some of max_steps."""
    options = {**trainer_args, "enable_checkpointing": True}
    last = tmp_path / "checkpoints" / "last.ckpt"

    def train(checkpoint=None, **more):
        pl.seed_everything(0, verbose=False)
        pl.Trainer(**equip(tmp_path, {**options, **more})).fit(
            build(sched="constant", ema_decay=0.5), images(), ckpt_path=checkpoint, weights_only=True
        )
        return read_checkpoint(last)

    assert train(max_time={"milliseconds": 1})["global_step"] == 1
    resumed = train(last, max_epochs=-1, max_steps=11)
    shutil.rmtree(tmp_path / "checkpoints")
    whole = train(max_epochs=-1, max_steps=11)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(resumed[key][name], whole[key][name]) for name in whole[key]), key


@pytest.mark.parametrize(
    ("warmup", "trainer", "rates", "said"),
    [
        ({"warmup_epochs": 1}, {"fast_dev_run": True}, [1.0], "warmup_epochs 1 .* 0 updates of warm-up"),
        ({"warmup_epochs": 1}, {"max_epochs": 1}, [0, 0.25, 0.5, 0.75], r"\(1 epochs\): 4 updates of warm-up"),
        ({"warmup_epochs": 3}, {"max_steps": 2}, [0, 1.0], r"warmup_epochs 3 .* \(0\.222 epochs\): 1 updates"),
        ({"warmup_steps": 99}, {"limit_train_batches": 2}, [0, 0.5, 1.0, 1.0], r"warmup_steps 99 .* .*: 2 updates"),
        ({"warmup_steps": 99}, {"overfit_batches": 2}, [0, 0.5, 1.0, 1.0], r"warmup_steps 99 .* .*: 2 updates"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*overfit")
def test_a_run_that_is_cut_short_has_a_short_warmup(build, fit, warmup, trainer, rates, said):
    watch = Rates()
    with pytest.warns(UserWarning, match=said):
        fit(build(lr=1.0, sched="constant", opt="sgd", **warmup), callbacks=[watch], gradient_clip_val=1e-9, **trainer)
    assert watch.rates[: len(rates)] == pytest.approx(rates)


def test_the_learning_rate_finder_is_followed(build, fit):
    """By every group of the optimizer, with the warm-up and layer decay that it had."""
    watch = Rates()

    class Finder(LearningRateFinder):
        def on_fit_start(self, trainer, module):
            super().on_fit_start(trainer, module)
            watch.rates.clear()

    model = build(lr=0.5, warmup_steps=4, sched="constant", layer_decay=0.5, opt="sgd")
    trainer = fit(model, 2, callbacks=[finder := Finder(num_training_steps=16, early_stop_threshold=None), watch])
    found = finder.optimal_lr.suggestion()
    assert found not in (None, 0.5)
    assert model.hparams["lr"] == found
    scale = trainer.optimizers[0].param_groups[0]["lr_scale"]
    assert watch.rates == pytest.approx([scale * found * min(step / 4, 1) for step in range(18)])
    assert all(group["lr"] == pytest.approx(group["lr_scale"] * found) for group in trainer.optimizers[0].param_groups)


def test_the_batch_size_finder_is_followed(build, fit, images):
    """The schedule is of as many updates as there are with the batches that it found."""
    watch, data = Rates(), images(batch_size=2)
    finder = BatchSizeFinder(init_val=4, max_trials=3, steps_per_trial=1)
    trainer = fit(build(lr=1.0, warmup_steps=2, opt="sgd"), 2, data, callbacks=[finder, watch], gradient_clip_val=1e-9)
    assert (data.batch_size, trainer.global_step) == (16, 8)
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6))]
    assert watch.rates == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:SWA is currently only", "ignore:Swapping scheduler")
def test_weight_averaging_of_lightning_has_its_own_schedule(build, fit):
    watch = Rates()
    averaging = StochasticWeightAveraging(0.25, swa_epoch_start=1, annealing_epochs=2, annealing_strategy="linear")
    model = build(lr=1.0, sched="constant", opt="sgd")
    fit(model, 4, callbacks=[averaging, watch], gradient_clip_val=1e-9)
    assert watch.rates[:9] == [1.0] * 9
    assert watch.rates[-1] == pytest.approx(0.25)


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_tuners_by_themselves(build, images, trainer_args, tune):
    model, data = build(lr=0.5), images(batch_size=2)
    tuner = Tuner(pl.Trainer(max_epochs=1, **trainer_args))
    if tune == "lr_find":
        found = tuner.lr_find(model, datamodule=data, num_training=16, update_attr=True).suggestion()
        assert found == model.hparams["lr"] != 0.5
    else:
        assert tuner.scale_batch_size(model, datamodule=data, init_val=4, max_trials=2) == data.batch_size == 8


@pytest.mark.parametrize("objective", ["ddpm", "velocity"])
def test_a_run_with_weights_in_half_precision(generator, fit, objective):
    losses = []
    for precision in ("bf16-true", "32-true"):
        torch.manual_seed(0)
        watch = Losses()
        model = generator(objective=objective, ema_decay=None, sample_every=1, sample_count=2, sample_steps=2)
        fit(model, max_epochs=1, precision=precision, callbacks=[watch])
        losses.append(watch.values)
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.01)  # the same times and noise


def test_low_precision_is_of_the_model_alone(generator):
    """With bf16 weights the noise, the loss and the sampler's state stay in float32."""
    model, seen = generator().to(torch.bfloat16), []
    original = model.diffusion.add_noise

    def keep(x, t, noise):
        seen.append((x.dtype, noise.dtype))
        return original(x, t, noise)

    model.diffusion.add_noise = keep
    loss = model.batch_loss((torch.randn(4, 3, 16, 16, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 0])))
    assert loss.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)]
    states = []
    step = model.diffusion.step

    def watch(noisy, *rest):
        states.append(noisy.dtype)
        return step(noisy, *rest)

    model.diffusion.step = watch
    model.generate(torch.tensor([0, 1]), range(2), Sampling(steps=2))
    assert states == [torch.float32] * 2


def test_weights_that_are_none(build, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth is no checkpoint, or a damaged one"):
        build(init_from=str(tmp_path / "text.pth"))


def test_data_of_another_size(generator, fit, images):
    with pytest.raises(ValueError, match=r"the data are of size \(3, 32, 32\) and the model of \(3, 16, 16\)"):
        fit(generator(), data=images(img_size=32))


def test_a_checkpoint_knows_its_images(build, fit, tmp_path):
    trainer = fit(build(lr=1e-3), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["class_names"] == ["left-out", "müller straße", "zebra"]
    assert checkpoint["data_config"]["input_size"] == [3, 32, 32]
    assert checkpoint["data_config"]["mean"] == [0.5, 0.5, 0.5]


def spoil(model, *steps):
    """A loss of NaN at these steps."""
    original, count = model.training_step, iter(range(10**6))

    def training_step(batch, batch_idx):
        loss = original(batch, batch_idx)
        if next(count) in steps:
            loss = loss * float("nan")
            model.last_loss = loss.detach()
        return loss

    model.training_step = training_step


def test_a_loss_that_is_nan_stops_the_run(build, fit, tmp_path):
    model = build(lr=1e-3, sched="constant")
    spoil(model, 12)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    last = re.escape(str(tmp_path / "checkpoints" / "last.ckpt"))
    message = rf"the loss is not finite at step 12 \(epoch 1, lr 0.001\); last good checkpoint: {last}\. A smaller lr"
    with pytest.raises(ValueError, match=message):
        fit(model, callbacks=[keep], enable_checkpointing=True)
    assert all(p.isfinite().all() for p in model.parameters())
    assert read_checkpoint(keep.last_model_path)["global_step"] == 9
    model = build(lr=1e-3)
    spoil(model, 0)
    with pytest.raises(ValueError, match=r"step 0 .*last good checkpoint: none yet"):
        fit(model)


def test_updates_that_are_not_finite_can_be_left_out(build, fit):
    weights = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(module.model.head.weight.detach().clone())

    model = build(lr=1e-3, skip_nonfinite=2)
    spoil(model, 3, 5)
    with pytest.warns(UserWarning, match="the loss is not finite at step .*; this update is left out") as caught:
        fit(model, max_epochs=1, callbacks=[Watch()])
    assert sum("left out" in str(warning.message) for warning in caught) == 2
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [True, True, False, True, False, True, True, True]
    model = build(lr=1e-3, skip_nonfinite=1)
    spoil(model, 3, 5)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"the loss is not finite at step 5"),
    ):
        fit(model, max_epochs=1)


def test_a_gradient_that_is_infinite_stops_the_run(build, fit):
    model = build(lr=1e-3)
    model.model.head.weight.register_hook(lambda grad: grad / 0)
    with pytest.raises(ValueError, match="the gradient is not finite at step 0"):
        fit(model)


def train_on(root, out, epochs, workers, how, steps, delay):
    """Training that goes on from the last checkpoint in its folder, and is hit by a signal soon after some steps."""
    quieten()
    pl.seed_everything(3, workers=True, verbose=False)
    data = ImageData(root=root, batch_size=8, num_workers=workers, auto_augment="rand-m9-mstd0.5-inc1", seed=3)
    module = ImageClassifier(
        "vit_tiny_patch16_224", connection="dhc2", num_classes=3, lr=1e-3, warmup_steps=5, mixup=0.8, cutmix=1.0,
        ema_decay=0.9, model_args={**model_args(), "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
    )  # fmt: skip
    numbers = itertools.count(1)

    class Hit(pl.Callback):
        def on_train_batch_end(self, *_):
            if next(numbers) == steps:
                threading.Timer(delay, os.kill, (os.getpid(), how)).start()

    trainer = {"accelerator": "cpu", "max_epochs": epochs, "enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {"callbacks": [Hit()], "num_sanity_val_steps": 0}
    keep_metrics(out)
    checkpoint = last_checkpoint(out)
    pl.Trainer(**equip(out, trainer)).fit(module, data, ckpt_path=checkpoint, weights_only=True)


def drive(root, out, epochs, kills, how=signal.SIGKILL, workers=0):
    """The last checkpoint of a training that was hit by so many signals at random moments, and what it printed."""
    moments, shown = random.Random(0), ""
    for number in range(kills + 1):
        steps = moments.randint(1, 9 * epochs // 10) if number < kills else None
        done = processes.Started(train_on, root, out, epochs, workers, how, steps, moments.random() / 20).wait()
        shown += done.stderr
        code = 0 if number == kills else -how if how == signal.SIGKILL else 128 + how
        assert done.returncode == code, done.stderr[-3000:]
    return read_checkpoint(out / "checkpoints" / "last.ckpt"), shown


def same_run(a, b, steps):
    for key in ("state_dict", "current_model_state"):
        assert a[key].keys() == b[key].keys()
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key]), key
    assert a["global_step"] == b["global_step"] == steps


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    return drive(image_folder, tmp_path_factory.mktemp("undisturbed") / "run", 4, 0)[0]


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 0), (signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(image_folder, tmp_path, undisturbed, how, workers):
    """Twice: augmentation, mixup, dropout, schedule, optimizer and average go on; a loading process changes nothing.

    Ctrl-C: the step it is in is finished and kept, and no step is done twice.
    """
    state, shown = drive(image_folder, tmp_path / "run", 4, 2, how, workers)
    same_run(undisturbed, state, 36)
    if how != signal.SIGKILL:
        assert shown.count("stopping after this step") == 2
        rows = [row for path in metrics_files(tmp_path / "run") for row in read_rows(path) if row["val_loss"]]
        assert [int(row["step"]) for row in rows] == list(range(8, 36, 9))  # each epoch was validated once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "times", "workers"), [(signal.SIGKILL, 20, 0), (signal.SIGINT, 8, 1), (signal.SIGTERM, 8, 1)]
)
def test_a_long_run_that_is_stopped_many_times(image_folder, tmp_path, how, times, workers):
    """Of 144 steps; a signal keeps those done, up to 14 of them each time, so that eight cannot reach the end."""
    expected, _ = drive(image_folder, tmp_path / "undisturbed", 16, 0)
    same_run(expected, drive(image_folder, tmp_path / "run", 16, times, how, workers)[0], 144)


def read_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def weights_of(model):
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def moved(model, before):
    """Names of the parameters that training changed."""
    return {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}


def test_a_frozen_trunk_thaws(build, fit):
    """One epoch of head and connections, then all."""
    model = build(connection="dhc2", lr=1e-3, freeze_epochs=1)
    before = weights_of(model)
    states = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append(moved(pl_module, before))

    fit(model, callbacks=[Watch()])
    fresh = {name for name in before if name.startswith("head.") or ".connection" in name}
    assert states[0] == fresh
    assert states[1] == set(before)


def test_gradients_of_what_is_frozen_are_dropped(build, fit):
    """Where several processes share gradients the trunk keeps its own, which must not move it."""
    model = build(connection="dhc2", lr=1e-3, freeze_epochs=1)
    before = weights_of(model)

    class Thaw(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.requires_grad_(True)

    fit(model, 1, callbacks=[Thaw()])
    assert moved(model, before) == {name for name in before if name.startswith("head.") or ".connection" in name}


@pytest.mark.parametrize("connection", ["residual", "dhc2"])
def test_a_linear_probe_trains_the_head_alone(build, fit, connection):
    model = build(connection=connection, lr=1e-3, linear_probe=True, model_args={**model_args(), "drop_path_rate": 0.5})
    before = weights_of(model)
    modes = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append(pl_module.model.training)

    fit(model, callbacks=[Watch()])
    assert moved(model, before) == {"head.weight", "head.bias"}
    assert not any(modes)


def model_args():
    return {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def test_freezing_arguments(build):
    with pytest.raises(ValueError, match="freeze_epochs must be 0 with linear_probe, got 2"):
        build(freeze_epochs=2, linear_probe=True)
    with pytest.raises(ValueError, match="grad_checkpointing does not work with inception_v4"):
        build("inception_v4", grad_checkpointing=True, model_args={})


@pytest.mark.parametrize("connection", ["dhc2", "sfc2"])
@pytest.mark.parametrize(("part", "held", "free"), [("width", "alpha", "beta"), ("depth", "beta", "alpha")])
def test_half_of_a_connection_is_held_still(build, fit, connection, part, held, free):
    """All of it, also where the trunk is frozen for a while and thaws; all the rest is trained."""
    model = build(connection=connection, lr=1e-2, weight_decay=0.1, connection_decay=True, connection_freeze=part)
    before = weights_of(model)
    fit(model, 2)
    names = {name for name in before if ".connection" in name and held in name}
    assert len(names) == 4 * (3 if connection == "dhc2" else 1)
    assert {name for name in before if ".connection" in name} - names == {
        name for name in before if ".connection" in name and free in name
    }
    assert moved(model, before) == set(before) - names
    model = build(connection=connection, lr=1e-2, connection_freeze=part, freeze_epochs=1)
    before = weights_of(model)
    fit(model, 2)
    assert moved(model, before) == set(before) - names


def test_what_cannot_be_frozen(build):
    for connection in ("residual", None):
        with pytest.raises(ValueError, match="connection_freeze='width' needs a model with connections, this one has"):
            build(connection=connection, connection_freeze="width")
    with pytest.raises(ValueError, match="connection_freeze must be one of width, depth, got 'alpha'"):
        build(connection="dhc2", connection_freeze="alpha")


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
def test_connections_decay_where_they_are_told_to(build, fit, connection):
    """Without a gradient a step of AdamW is the decay alone: a factor of 1 - lr * weight_decay."""

    class NoGradient(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for parameter in pl_module.parameters():
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter)

    for decay in (False, True):
        model = build(connection=connection, lr=0.5, sched="constant", weight_decay=0.1, connection_decay=decay)
        randomize(model.model)
        before = weights_of(model)
        trainer = fit(model, 1, limit_train_batches=2, callbacks=[NoGradient()])
        groups = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
        assert sorted(map(id, groups)) == sorted(map(id, model.model.parameters()))
        for name, value in model.model.state_dict().items():
            own = ".connection" in name
            shrinks = (
                decay or "_fn" in name if own else before[name].ndim > 1 and name not in ("pos_embed", "cls_token")
            )
            factor = (1 - 0.5 * 0.1) ** 2 if shrinks else 1.0
            torch.testing.assert_close(value, before[name] * factor, msg=name)


@pytest.mark.parametrize("opt", ["adamw", "muon"])
def test_rates_and_decay_of_connections_go_together(build, fit, opt):
    """Each parameter that is trained is in one group, whatever is set apart, and has its rate and its decay."""
    arguments = {"layer_decay": 0.5, "connection_lr_factor": 4.0, "connection_decay": True, "opt": opt}
    model = build(
        connection="dhc2", sched="constant", lr=1e-3, weight_decay=0.3, connection_freeze="depth", **arguments
    )
    optimizer = fit(model, 1, limit_train_batches=1).optimizers[0]
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.model.parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    assert set(groups) == trained
    for index, block in enumerate(model.model.blocks):
        for name, parameter in block.named_parameters():
            if parameter.requires_grad:
                own = name.startswith("connection")
                assert groups[id(parameter)]["lr"] == pytest.approx(1e-3 * 0.5 ** (2 - index) * (4 if own else 1)), name
                assert groups[id(parameter)]["weight_decay"] == (0.3 if own or parameter.ndim > 1 else 0), name


def test_gradient_checkpointing_changes_memory_and_nothing_else(build, images):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = build(connection="dhc2", grad_checkpointing=on)
        assert model.model.grad_checkpointing is on
        data = images(img_size=32)
        batch = data.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
        model.batch_loss(batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_backend_and_recomputation_are_of_the_run(backend, build, fit, tmp_path):
    """They reach the connections, change no gradient, and are not in the checkpoint."""
    torch.manual_seed(0)
    model = build(connection="dhc2", connection_backend=backend, connection_recompute=2)
    torch.manual_seed(1)
    fit(model)
    parts = [part for part in model.modules() if isinstance(part, StreamConnection)]
    assert {part.backend for part in parts} == {backend}
    assert [part.recompute for part in parts] == [False, True, True, True]
    torch.manual_seed(0)
    plain = build(connection="dhc2", connection_backend=backend)
    torch.manual_seed(1)
    fit(plain)
    for one, other in zip(model.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not {"connection_backend", "connection_recompute", "stream_dtype"}.intersection(model.hparams)
    assert "connection_freeze" in model.hparams


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hub folder"])
def test_weights_from_an_earlier_run(build, fit, images, tmp_path, kind):
    """Also how its images were prepared, where it says."""
    first = build(connection="dhc2", lr=1e-3)
    randomize(first.model)
    run = tmp_path / "run"
    callbacks = equip(run, {"logger": False, "enable_progress_bar": False})["callbacks"]
    fit(first, 1, images(mean=[0.1, 0.2, 0.3], std=[0.4] * 3), enable_checkpointing=True, callbacks=callbacks)
    source = {"run": run, "checkpoint": run / "checkpoints" / "last.ckpt", "hub folder": tmp_path / "hub"}[kind]
    if kind == "hub folder":
        timm.models.save_for_hf(first.model, source, safe_serialization=True)
    second = build(connection="dhc2", num_classes=5, init_from=str(source))
    assert second.untouched == ["head.bias", "head.weight"]
    for name, value in weights_of(first).items():
        if not name.startswith("head."):
            assert torch.equal(second.model.state_dict()[name], value), name
    assert list(second.data_config["mean"]) == ([0.5] * 3 if kind == "hub folder" else [0.1, 0.2, 0.3])
    assert second.data_config["input_size"] == (3, 32, 32)


def test_pretrained_gives_way_to_init_from(build, tmp_path):
    """No network is needed for weights that are not used."""
    timm.models.save_for_hf(build(connection="dhc2").model, tmp_path / "hub", safe_serialization=True)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = build(name, connection="dhc2", pretrained=True, init_from=str(tmp_path / "hub"))
    assert model.untouched == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.ckpt", "there is no file nothing.ckpt to take weights from"),
        (".", "there are no weights in .: neither a run's nor an exported model's folder"),
        ("hf-hub:nobody/nothing", "no weights from hf-hub:nobody/nothing"),
    ],
)
def test_no_weights(build, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        build(init_from=source)


@pytest.fixture
def labelled(image_folder, tmp_path):
    """A table of the images with two labels: what is missing in the picture's name, and whether its number is even."""
    rows = ["file,label,split"]
    for path in sorted(image_folder.glob("*/*/*.png")):
        labels = [path.parent.name] + ["even"] * (int(path.stem) % 2 == 0)
        labels = labels if path.stem != "003" else []
        rows.append(f"{path},{'|'.join(labels)},{path.parent.parent.name}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path / "table.csv"


def test_several_labels_an_image(build, fit, labelled):
    """The loss is a sigmoid's for each label, and the metrics are those of the definitions."""
    data = ImageData(
        "csv", root=str(labelled), multi_label=True, label_separator="|", batch_size=8, num_workers=0, no_aug=True
    )
    assert data.class_names == ["even", "left-out", "müller straße", "zebra"]
    model = build(num_classes=4, multi_label=True, connection="dhc2", lr=2e-3)
    trainer = fit(model, 3, data, num_sanity_val_steps=0)
    batches = [data.on_before_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    images, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    assert targets.shape == (39, 4)
    assert targets.sum() == 13 * 3 + 7 * 3 - 3
    with torch.no_grad():
        logits = model.eval()(images)
        probabilities = model.predict_step((images, targets), 0)
    torch.testing.assert_close(probabilities, 1 / (1 + torch.exp(-logits)))
    loss = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean()
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["val_loss"], loss, rtol=1e-5, atol=0)
    precisions, scores = [], []
    for true, score in zip(targets.T.bool(), probabilities.T, strict=True):
        ranked = true[score.argsort(descending=True)].double()
        precisions.append(float((ranked.cumsum(0) / torch.arange(1, 40) * ranked).sum() / ranked.sum()))
        right = (true & (score > 0.5)).sum()
        scores.append(float(2 * right / (true.sum() + (score > 0.5).sum())))
    assert metrics["val_map"].item() == pytest.approx(sum(precisions) / 4)
    assert metrics["val_f1"].item() == pytest.approx(sum(scores) / 4)
    assert model.monitor == ("val_map", "max")
    assert metrics["val_map"] > 0.7


def test_several_labels_and_what_needs_one(build, fit, images):
    with pytest.raises(ValueError, match="label_smoothing, mixup and cutmix are for one label per image"):
        build(multi_label=True, mixup=0.5)
    with pytest.raises(ValueError, match="multi_label must be False, as in the data, got True"):
        fit(build(multi_label=True))


def test_macro_accuracy_is_the_mean_over_classes(build, trainer_args, image_folder, tmp_path):
    """On classes of 2, 6 and 13 images it differs from top-1."""
    rows = ["file,label,split"]
    for label, count in (("left-out", 2), ("müller straße", 6), ("zebra", 13)):
        for split in ("train", "val"):
            files = sorted((image_folder / split / label).glob("*.png"))[:count]
            rows += [f"{path},{label},{split}" for path in files]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    data = ImageData("csv", root=str(tmp_path / "table.csv"), batch_size=8, num_workers=0, no_aug=True)
    model = build()
    randomize(model.model)
    trainer = pl.Trainer(**trainer_args)
    trainer.validate(model, data)
    predicted, targets = [], []
    for batch in data.val_dataloader():
        predicted.append(model.eval()(batch.images).argmax(1))
        targets.append(batch.targets)
    predicted, targets = torch.cat(predicted), torch.cat(targets)
    recalls = [(predicted[targets == k] == k).float().mean().item() for k in range(3)]
    assert trainer.callback_metrics["val_macro"].item() == pytest.approx(sum(recalls) / 3)
    assert trainer.callback_metrics["val_top1"].item() == pytest.approx((predicted == targets).float().mean().item())
    assert trainer.callback_metrics["val_macro"] != trainer.callback_metrics["val_top1"]


def test_a_run_that_gets_more_epochs_follows_their_schedule(build, fit, images, trainer_args, tmp_path):
    """Not that of the epochs before, which has ended: the rest would be trained with a rate of zero."""
    whole, rest = Rates(), Rates()
    fit(build(lr=1e-3, warmup_steps=3), 4, callbacks=[whole])
    trainer = fit(build(lr=1e-3, warmup_steps=3), 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    model = build(lr=1e-3, warmup_steps=3)
    trainer = pl.Trainer(max_epochs=4, callbacks=[rest], **trainer_args)
    trainer.fit(model, images(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert rest.rates == whole.rates[18:]
    assert min(rest.rates) > 0


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_run_of_steps_that_ended_in_the_middle_of_an_epoch_goes_on_there(build, fit, images, trainer_args, tmp_path):
    """With the rest of the same order: no image twice, none left out."""

    class Seen(pl.Callback):
        def __init__(self):
            self.images = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.images.append(batch[0].sum().item())

    def run(steps, checkpoint=None):
        seen = Seen()
        trainer = pl.Trainer(max_epochs=-1, max_steps=steps, callbacks=[seen], **trainer_args)
        trainer.fit(build(lr=1e-3), images(), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        return seen.images

    assert run(5) + run(22, tmp_path / "a.ckpt") == run(22)


WAYS = {  # options of the trainer, the updates after which last.ckpt is written (an epoch has 4), whether best.ckpt is
    "every second of three epochs": ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [4, 8, 12], True),
    "too seldom": ({"max_epochs": 2, "check_val_every_n_epoch": 5}, [4, 8], False),
    "never": ({"max_epochs": 2, "limit_val_batches": 0}, [4, 8], False),
    "every three batches": ({"max_epochs": 2, "val_check_interval": 3}, [3, 4, 7, 8], True),
    "across epochs": ({"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 4, 6, 8], True),
    "every half": ({"max_epochs": 2, "val_check_interval": 0.5}, [2, 4, 6, 8], True),
    "within an update": ({"max_epochs": 2, "val_check_interval": 1, "accumulate_grad_batches": 2}, [1, 2, 3, 4], True),
    "steps that end within an epoch": ({"max_epochs": -1, "max_steps": 6}, [4, 6], True),
    "steps that end at a validation": ({"max_epochs": -1, "max_steps": 6, "val_check_interval": 3}, [3, 4, 6], True),
    "a part of the batches": ({"max_epochs": 2, "limit_train_batches": 3, "val_check_interval": 2}, [2, 3, 5, 6], True),
}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("way", WAYS)
def test_last_is_always_where_training_ended_and_every_one_goes_on_exactly(
    build, images, tiny, trainer_args, tmp_path, way
):
    """Weights, their average and what the validations said, from every last.ckpt that there ever was."""
    options, steps, is_validated = WAYS[way]
    written = []

    class Keep(pl.callbacks.Checkpoint):  # after the others
        def on_validation_end(self, trainer, *_):
            self.look(trainer)

        def on_train_epoch_end(self, trainer, *_):
            self.look(trainer)

        def look(self, trainer):
            last = read_checkpoint(path) if path.is_file() else {}
            if last.get("global_step") and last["global_step"] not in written:
                written.append(last["global_step"])
                shutil.copytree(run, tmp_path / f"after{last['global_step']}")

    class Scores(pl.Callback):
        def on_validation_end(self, trainer, *_):
            scores[trainer.global_step] = trainer.callback_metrics["val_loss"].item()

    def train(run, *callbacks, checkpoint=None):
        model = build(lr=1e-3, warmup_steps=1, mixup=0.8, ema_decay=0.5, model_args={**tiny, "depth": 1})
        arguments = {**trainer_args, "enable_checkpointing": True, "num_sanity_val_steps": 0, **options}
        equipped = equip(run, {**arguments, "callbacks": [Scores()]})
        equipped["callbacks"] += callbacks
        data = images(train_samples=32, eval_batch_size=39)
        pl.Trainer(**equipped).fit(model, data, ckpt_path=checkpoint, weights_only=True)
        return read_checkpoint(run / "checkpoints" / "last.ckpt")

    run, path = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    scores = {}
    whole, all_scores = train(run, Keep()), dict(scores)
    assert written == steps
    assert whole["global_step"] == steps[-1]
    assert (run / "checkpoints" / "best.ckpt").is_file() == is_validated == bool(all_scores)
    for step in written[:-1]:
        place, scores = tmp_path / f"after{step}", {}
        again = train(place, checkpoint=place / "checkpoints" / "last.ckpt")
        for key in ("state_dict", "current_model_state"):
            assert all(torch.equal(again[key][name], whole[key][name]) for name in whole[key]), (step, key)
        after = [{at: score for at, score in some.items() if at > step} for some in (scores, all_scores)]
        assert after[0] == after[1]
        assert again["global_step"] == whole["global_step"]
        assert again["epoch"] == whole["epoch"]
        if is_validated:
            a, b = (read_checkpoint(folder / "checkpoints" / "best.ckpt") for folder in (place, run))
            assert a["global_step"] == b["global_step"]


def test_other_batches_in_the_middle_of_an_epoch_are_refused(build, images, trainer_args, tmp_path):
    trainer = pl.Trainer(max_epochs=-1, max_steps=5, **trainer_args)
    trainer.fit(build(), images())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(
        ValueError, match=r"middle of an epoch with 1 x 8 images a batch .*, got 1 x 4 images; give the same"
    ):
        pl.Trainer(max_epochs=3, **trainer_args).fit(
            build(), images(batch_size=4), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


def test_macro_accuracy_leaves_out_classes_without_images():
    """Also where one of them is predicted."""
    metric = MacroAccuracy(3)
    metric.update(torch.eye(3)[[0, 0, 2, 1]], torch.tensor([0, 0, 1, 1]))
    assert metric.compute() == 0.75


def test_what_the_model_keeps_fixed_stays_fixed(generator, fit):
    model = generator(freeze_epochs=1)
    assert not model.model.pos_embed.requires_grad
    fit(model, 2)
    assert not model.model.pos_embed.requires_grad
    assert all(parameter.requires_grad for parameter in model.trunk())


def test_an_exported_folder_says_how_images_are_prepared(build, tmp_path):
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "interpolation": "bilinear", "crop_pct": 0.9}
    timm.models.save_for_hf(build().model, tmp_path / "hub", safe_serialization=True, data_config=config)
    model = build(init_from=str(tmp_path / "hub"))
    assert {
        key: list(v) if isinstance(v, tuple) else v for key, v in model.data_config.items()
    }.items() >= config.items()


def test_models_that_cannot_be_built(build):
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take these model_args: .*'foo'"):
        build(model_args={"foo": 3})
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        build(num_classes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"ema_decay": 2.0}, "ema_decay must be at least 0 and below 1, got 2.0"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0, got 0.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"model_args": {"drop_path_rate": 10}}, "drop_path_rate must be at least 0 and at most 1, got 10"),
        ({"label_smoothing": 1.5}, "label_smoothing must be at least 0 and at most 1, got 1.5"),
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"model_args": {"embed_dim": 50, "num_heads": 3}}, "does not take these model_args: AssertionError: "),
        ({"model_args": {"num_heads": 0}}, "does not take these model_args: ZeroDivisionError: "),
        ({"model_args": {"depth": "many"}}, "does not take these model_args: TypeError: "),
    ],
)
def test_values_that_cannot_be_meant(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opt_args": {"beta": 0.9}}, "adamw does not take these opt_args: TypeError: "),
        ({"opt_args": {"betas": 0.9}}, "adamw does not take these opt_args: TypeError: "),
        ({"sched_args": {"foo": 1}}, "cosine does not take these sched_args: TypeError: "),
        ({"sched_args": {"decay_epochs": "two"}, "sched": "step"}, "step does not take these sched_args: TypeError: "),
        ({"sched_args": {"decay_milestones": 3}, "sched": "multistep"}, "multistep does not take these sched_args: "),
    ],
)
def test_arguments_that_timm_refuses(build, arguments, message):
    """They are said before a run begins, and change nothing."""
    build().check_arguments()
    with pytest.raises(ValueError, match=message):
        build(**arguments).check_arguments()


def test_images_of_a_size_that_the_model_does_not_take(build, images, tiny):
    with pytest.raises(
        ValueError, match=r"does not take the images of the data, \(3, 64, 64\); model_args has img_size"
    ):
        build().check_data(images(img_size=64))
    build(model_args={**tiny, "dynamic_img_size": True}).check_data(images(img_size=64))


def test_a_name_that_nobody_registered():
    """What can be converted is a model's name; what cannot is answered with the nearest names."""
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    name = "swin_small_patch4_window7_224_dfc3"
    assert not timm.is_model(name)
    module = ImageClassifier(model=name, num_classes=3, model_args=sizes)
    assert module.model.layers[0].blocks[0].connection1.name == "dfc3"
    for wrong in ("swin_small_patch4_window7_224_dfc", "swin_smal_patch4_window7_224_dfc3"):
        with pytest.raises(ValueError, match=f"^unknown model '{wrong}'; did you mean swin_small_patch4_window7_224"):
            ImageClassifier(model=wrong, num_classes=3)
