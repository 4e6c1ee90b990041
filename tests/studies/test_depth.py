"""Blocks that are skipped: the same as their removal at the initial values, and as branches of zeros at any."""

import copy
import csv

import pytest
import pytorch_lightning as pl
import torch
from conftest import randomize
from PIL import Image

import hcvision
from hcvision.data.module import ImageData
from hcvision.models.stages import stages
from hcvision.studies.insight.depth import draw_blocks, join_rows, skip_block, summarize_blocks
from hcvision.studies.insight.inspection import inspect
from hcvision.studies.insight.unfolding import connect_adds, watch
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator


def build(tiny, connection=None, **kwargs):
    model = hcvision.create_model("vit_tiny_patch16_224", connection, num_classes=5, **{**tiny, "depth": 3}, **kwargs)
    return model.double().eval()


@pytest.mark.parametrize("connection", ["dhc2", "shc4", "dfc2", "shc1", "ghc2x3"])
@torch.no_grad()
def test_at_the_initial_values_a_block_is_removed(connection, tiny):
    """What is left is the residual model without that block; streams are entered and left as before."""
    residual = randomize(build(tiny))
    connected = hcvision.convert(copy.deepcopy(residual), connection)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for number in range(3):
        removed = copy.deepcopy(residual)
        del removed.blocks[number]
        with skip_block(connected.blocks[number]):
            skipped = connected(images)
        torch.testing.assert_close(skipped, removed(images), rtol=0, atol=1e-12)
        with skip_block(connect_adds(residual).blocks[number]):  # of a copy: the residual model is whole
            assert (residual(images) - removed(images)).abs().max() > 1e-3
    torch.testing.assert_close(connected(images), residual(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "connection",
    [
        "residual",
        "dhc2",
        "shc3",
        "dfc3",
        "mhc2",
        "ihc2",
        "ghc2x3",
        "sihc2",
        "gr2",
        "oru",
        "laurel",
        "mhclite2",
        "krom2",
        "dense",
        "attnres2",
    ],
)
@torch.no_grad()
def test_trained_streams_are_still_mixed(connection, tiny):
    """As with the last layer of each branch at zero, whatever the connections have become."""
    model = randomize(build(tiny, None if connection == "residual" else connection))
    model = connect_adds(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    whole = model(images)
    for number, block in enumerate(model.blocks):
        silent = copy.deepcopy(model)
        for layer in (silent.blocks[number].attn.proj, silent.blocks[number].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        seen = []
        with watch([block], seen.append), skip_block(block):
            skipped = model(images)
        assert len(seen) == 2
        assert seen[0].output.abs().max() == 0
        torch.testing.assert_close(skipped, silent(images), rtol=0, atol=1e-12)
        assert (skipped - whole).abs().max() > 1e-6
        assert torch.equal(model(images), whole)


@torch.no_grad()
def test_stages():
    """A block in a stage of a hierarchical model, whose channels come last or not."""
    model = hcvision.create_model("convnext_atto", "dhc2", num_classes=5, depths=(1, 2, 1, 1), dims=(8, 16, 16, 16))
    model = randomize(model.double().eval())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    silent = copy.deepcopy(model)
    stages(silent)[1][1].mlp.fc2.weight.zero_()
    stages(silent)[1][1].mlp.fc2.bias.zero_()
    with skip_block(stages(model)[1][1]):
        skipped = model(images)
    torch.testing.assert_close(skipped, silent(images), rtol=0, atol=1e-12)
    assert (skipped - model(images)).abs().max() > 1e-9


def save(module, path, trainer_args):
    trainer = pl.Trainer(**{**trainer_args, "enable_checkpointing": True})
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return module.eval()


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_inspect(image_folder, tmp_path, trainer_args, tiny, capsys):
    """Loss and accuracy per block, by hand from the logits; those of the residual twin beside them."""
    modules = {}
    for name, connection in (("ours", "dhc2"), ("twin", None)):
        module = ImageClassifier("vit_tiny_patch16_224", connection=connection, num_classes=3, model_args=tiny)
        randomize(module.model, std=0.5, seed=3)
        modules[name] = save(module, tmp_path / f"{name}.ckpt", trainer_args)
    data = {"dataset": "folder", "root": str(image_folder)}
    inspect(str(tmp_path / "ours.ckpt"), images=39, batch_size=10, data=data, twin=str(tmp_path / "twin.ckpt"),
            skip_blocks=True)  # fmt: skip
    rows = read(tmp_path / "ours.inspect" / "blocks.csv")
    assert [*rows[0]] == ["skipped", "loss", "accuracy", "residual loss", "residual accuracy"]
    assert [row["skipped"] for row in rows] == ["none", "block 0", "block 1"]
    view = {name: modules["ours"].data_config[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    source = ImageData(root=str(image_folder), batch_size=39, num_workers=0, img_size=32, **view)
    batch = next(iter(source.val_dataloader()))
    for name, prefix in (("ours", ""), ("twin", "residual ")):
        inner = connect_adds(modules[name].model)
        for number, row in enumerate(rows):
            with torch.no_grad(), skip_block(inner.blocks[number - 1]) if number else torch.no_grad():
                logits = inner(batch.images)
            loss = torch.nn.functional.cross_entropy(logits, batch.targets).item()
            right = (logits.argmax(1) == batch.targets).float().mean().item()
            assert float(row[f"{prefix}loss"]) == pytest.approx(loss, abs=2e-4)
            assert float(row[f"{prefix}accuracy"]) == pytest.approx(right, abs=1e-6)
    with Image.open(tmp_path / "ours.inspect" / "blocks.png") as picture:
        assert min(picture.size) > 300
    shown = capsys.readouterr().out
    assert "skipping a block changes the accuracy by" in shown
    assert "in the residual twin skipping a block" in shown


def test_diffusion(image_folder, tmp_path, trainer_args, tiny_dit):
    """The loss alone, with the same noise for every block: twice the same."""
    module = ImageGenerator("dit_tiny_patch4_pixel", connection="dhc2", num_classes=3, model_args=tiny_dit)
    randomize(module.model)
    save(module, tmp_path / "d.ckpt", trainer_args)
    data = {"dataset": "folder", "root": str(image_folder), "num_workers": 0}
    found = []
    for out in ("a", "b"):
        inspect(str(tmp_path / "d.ckpt"), str(tmp_path / out), images=4, data=data, skip_blocks=True)
        found.append(read(tmp_path / out / "blocks.csv"))
    assert found[0] == found[1]
    assert [*found[0][0]] == ["skipped", "loss"]
    assert len({row["loss"] for row in found[0]}) == 3


def test_summary():
    rows = [{"skipped": "none", "loss": 1.0, "accuracy": 0.9}, {"skipped": "block 0", "loss": 1.5, "accuracy": 0.5}]
    rows.append({"skipped": "block 1", "loss": 0.9, "accuracy": 0.92})
    assert summarize_blocks(rows) == (
        "skipping a block changes the accuracy by -19.00 points on average, most block 0: -40.00 points"
    )
    losses = [{name: value for name, value in row.items() if name != "accuracy"} for row in rows]
    assert "the loss by +0.2000 on average, most block 0: +0.5000" in summarize_blocks(losses)
    assert join_rows(losses, [])[1] == {"skipped": "block 0", "loss": "1.500000"}
    (axes,) = draw_blocks(rows, rows).axes
    assert [line.get_ydata()[0] for line in axes.lines] == [0.5, 0.9, 0.5, 0.9]
