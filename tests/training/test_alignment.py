"""REPA: what is aligned with what, its loss by hand, its preprocessing, and runs that go on."""

import copy
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import randomize
from diffusers import AutoencoderKL
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.nn import functional as F

from hcvision.cli.sample import load_generator
from hcvision.data.module import ImageData
from hcvision.diffusion.encoding import encode_folder
from hcvision.models.conversion import convert
from hcvision.models.frozen import FrozenModel, open_encoder
from hcvision.training.alignment import Alignment
from hcvision.training.generation import ImageGenerator

VIT = {"img_size": 24, "patch_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small ViT with patches of 6 pixels, in a folder as `hcvision export` writes it, with a mean of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    net = randomize(timm.create_model("vit_tiny_patch16_224", **VIT), 0.2)
    net.pretrained_cfg = {
        **net.pretrained_cfg,
        "mean": (0.2, 0.4, 0.6),
        "std": (0.3, 0.2, 0.1),
        "input_size": (3, 24, 24),
    }
    timm.models.save_for_hf(net, folder, safe_serialization=True, model_args=VIT)
    return f"local-dir:{folder}"


def make(source, tiny_dit, connection=None, **repa):
    arguments = {"num_classes": 3, "model_args": tiny_dit, "objective": "velocity", "ema_decay": 0.5, "sample_every": 0}
    given = {"encoder": source, "block": 1, "hidden": 16, **repa}
    return ImageGenerator("dit_tiny_patch4_pixel", connection=connection, repa=given, **arguments)


def test_what_the_encoder_sees(encoder):
    """The whole image, resized so that its patches lie in the grid of the tokens, normalised as its weights want it."""
    frozen = open_encoder(encoder, (4, 4))
    assert frozen.size == (24, 24)
    images = torch.rand(2, 3, 16, 16)
    whole = F.interpolate(images, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.2, 0.4, 0.6]).view(-1, 1, 1), torch.tensor([0.3, 0.2, 0.1]).view(-1, 1, 1)
    with torch.no_grad():
        tokens = frozen.model.forward_features((whole - mean) / std)[:, 1:]  # without the class token
    torch.testing.assert_close(frozen.map(images).flatten(2).transpose(1, 2), tokens)
    assert open_encoder(encoder, (2, 3)).size == (12, 18)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.train().model.training


@pytest.mark.parametrize("connection", [None, "dhc2", "dfc2"])
def test_loss_by_hand(encoder, tiny_dit, connection):
    """The objective's loss less the weighted mean cosine, of the tokens behind the block: the mean of their streams."""
    module = randomize(make(encoder, tiny_dit, connection, weight=0.7), 0.1).train()
    images, classes = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2, 0])
    module.data_config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    module.hparams["label_dropout"] = 0.0
    torch.manual_seed(5)
    loss = module.batch_loss((images, classes))
    torch.manual_seed(5)
    t = module.diffusion.draw_time(4, "cpu")
    noise = torch.randn(images.shape)
    plain = module.diffusion.loss(module, images, classes, t, noise).mean()
    seen = []
    handle = module.model.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    module.model(module.diffusion.add_noise(images, t, noise), t, classes)
    handle.remove()
    tokens = seen[0].unflatten(-1, (-1, 48)).mean(-2)  # of 2 streams, or of the one
    layers = module.alignment.projection
    hidden = F.silu(layers[2](F.silu(layers[0](tokens))))
    ours = layers[4](hidden)
    theirs = open_encoder(encoder, (4, 4)).map(images / 2 + 0.5).flatten(2).mT
    cosine = ((ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)).mean()
    torch.testing.assert_close(loss, plain - 0.7 * cosine)
    torch.testing.assert_close(module.cosine, cosine)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
    torch.manual_seed(5)
    with torch.no_grad():
        torch.testing.assert_close(module.eval().batch_loss((images, classes)), plain)  # evaluation aligns nothing


def test_features_in_another_grid(encoder, tiny_dit, monkeypatch):
    """Where the encoder cannot have the grid of the tokens its features are interpolated to it."""
    module = make(encoder, tiny_dit)
    other = FrozenModel(encoder, (48, 48))
    monkeypatch.setattr("hcvision.training.alignment.open_encoder", lambda *_: other)
    images = torch.rand(2, 3, 16, 16)
    expected = F.interpolate(other.map(images), size=(4, 4), mode="bilinear", antialias=True).flatten(2).mT
    torch.testing.assert_close(module.alignment.place(module.alignment.see(images)), expected)


def test_a_tap_of_any_block(tiny_dit):
    """Behind the last one too, whose streams are left elsewhere."""
    torch.manual_seed(0)
    plain = randomize(timm.create_model("dit_tiny_patch4_pixel", num_classes=3, **tiny_dit)).eval()
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0, 500]), torch.tensor([0, 3])
    for block in (1, 2):
        prediction, expected = plain(*inputs, tap=block)
        assert torch.equal(prediction, plain(*inputs))
        for connection in ("dhc2", "dfc2", "dense", "mhc4"):
            found = convert(copy.deepcopy(plain), connection)(*inputs, tap=block)[1]
            assert found.shape == (2, 16, 48)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_run_goes_on_and_draws(encoder, tiny_dit, image_folder, trainer_args, tmp_path, monkeypatch):
    """Stopped and resumed it is the run that was not; the projection is trained, averaged and kept; to draw needs no
    encoder; the validation loss is the objective's."""
    path = tmp_path / "half.ckpt"

    def fit(epochs, start=None):
        pl.seed_everything(0, verbose=False)
        module = make(encoder, tiny_dit, "dhc2")
        data = ImageData(root=str(image_folder), batch_size=8, num_workers=0, img_size=16, hflip=0.0)
        each = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
        arguments = {**trainer_args, "callbacks": [each], "enable_checkpointing": True, "limit_val_batches": 1}
        trainer = pl.Trainer(**arguments, max_epochs=epochs, num_sanity_val_steps=0)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        return module, trainer

    whole, trainer = fit(2)
    (tmp_path / "kept" / "epoch=0.ckpt").rename(path)
    before = make(encoder, tiny_dit, "dhc2").alignment.projection[0].weight
    assert (whole.alignment.projection[0].weight - before).abs().max() > 0
    assert -1 < trainer.callback_metrics["repa_cosine"] < 1
    state = torch.load(path, weights_only=True)
    assert "alignment.projection.4.weight" in state["state_dict"]
    assert not any("encoder" in name for name in state["state_dict"])
    assert state["hyper_parameters"]["repa"]["features"] == 24
    went_on, _ = fit(2, path)
    for (name, a), b in zip(whole.named_parameters(), went_on.parameters(), strict=True):
        assert torch.equal(a, b), name
    monkeypatch.setattr("hcvision.training.alignment.open_encoder", None)
    loaded = load_generator(str(path), None, None, None, "velocity", None)
    assert torch.equal(loaded.alignment.projection[0].weight, state["state_dict"]["alignment.projection.0.weight"])
    assert loaded.alignment.features == 24
    started = ImageGenerator(
        "dit_tiny_patch4_pixel", num_classes=3, model_args=tiny_dit, connection="dhc2", init_from=str(path)
    )
    assert torch.equal(started.model.blocks[0].attn.qkv.weight, loaded.model.blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_two_processes_align(encoder, tiny_dit, image_folder, tmp_path):
    """Under DDP, which does not look for parameters without a gradient; the projection is trained."""
    shape = str(tiny_dit).replace("'", "")
    fit = ("fit", "--task=generate", f"--data.root={image_folder}", "--data.num_workers=0", "--data.img_size=16")
    fit += ("--model.model=dit_tiny_patch4_pixel", f"--model.model_args={shape}", "--model.label_dropout=0")
    fit += (f"--model.repa={{encoder: '{encoder}', block: 1, hidden: 16}}", "--model.sample_every=0")
    fit += ("--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.enable_progress_bar=false")
    two = ("--data.batch_size=8", "--trainer.devices=2", "--trainer.strategy=ddp", "--run=two")
    processes.run_twice(*fit, *two, folder=tmp_path)
    state = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
    first = make(encoder, tiny_dit)
    moved = [(state[name] - p).abs().max() for name, p in first.named_parameters() if "projection" in name]
    assert all(amount > 0 for amount in moved)


def test_every_parameter_has_one_group(encoder, tiny_dit):
    for opt in ("adamw", "muon"):
        module = make(encoder, tiny_dit, "dhc2")
        module.hparams["opt"] = opt
        optimizer = module.make_optimizer()
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("repa", "message"),
    [
        ({"block": 3}, "repa.block must be at least 1 and at most 2, got 3"),
        ({"weight": 0}, "repa.weight must be above 0, got 0"),
        ({"encoder": "vit_nano"}, "no timm model vit_nano to look at images with"),
        ({"blocks": 1}, "repa takes encoder, block, weight and hidden: .*'blocks'"),
    ],
)
def test_errors(encoder, tiny_dit, repa, message):
    with pytest.raises(ValueError, match=message):
        make(encoder, tiny_dit, **repa)


def test_latents_are_decoded_for_the_encoder(encoder, tiny_dit, monkeypatch):
    module = make(encoder, tiny_dit)
    module.hparams["vae"] = "some"
    vae = torch.nn.Identity()
    monkeypatch.setattr("hcvision.training.generation.load_vae", lambda name: vae)
    monkeypatch.setattr("hcvision.training.generation.decode", lambda vae, part: part * 3)
    latents = torch.randn(10, 3, 4, 4)
    torch.testing.assert_close(module.show(latents), (latents * 1.5 + 0.5).clamp(0, 1))
    assert Path(encoder.removeprefix("local-dir:")).is_dir()


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_features_stored_beside_latents(encoder, tiny_dit, image_folder, trainer_args, tmp_path):
    """What the encoder sees in each image and in its mirror image goes with the latents, and no batch is decoded."""
    AutoencoderKL(norm_num_groups=4, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2).save_pretrained(tmp_path / "vae")  # fmt: skip
    options = {"image_size": 32, "num_workers": 0, "device": "cpu", "say": lambda _: None}
    vae = str(tmp_path / "vae")
    encode_folder(str(image_folder), str(tmp_path / "with"), vae, **options, encoder=encoder, encoder_grid=4)
    encode_folder(str(image_folder), str(tmp_path / "plain"), vae, **options)
    stored, plain = (load_file(tmp_path / name / "train-00000.safetensors") for name in ("with", "plain"))
    assert all(torch.equal(stored[name], plain[name]) for name in ("latents", "flipped", "labels"))
    images = torch.cat(
        [b.images for b in ImageData(root=str(image_folder), num_workers=0).plain_loader("train", (3, 32, 32))]
    )
    for name, view in (("features", images), ("flipped_features", images.flip(-1))):
        expected = open_encoder(encoder, (4, 4)).map(view[:8] / 2 + 0.5)
        torch.testing.assert_close(stored[name][:8].float(), expected, rtol=1e-3, atol=1e-3)
    data = ImageData("latents", str(tmp_path / "with"), batch_size=8, num_workers=0, hflip=1.0)
    model_args = {**tiny_dit, "in_chans": 4}
    repa = {"encoder": encoder, "block": 1, "hidden": 16}
    module = ImageGenerator(
        "dit_tiny_patch4_pixel", num_classes=3, model_args=model_args, vae=vae, repa=repa, sample_every=0
    )
    module.show = None  # nothing to decode
    trainer = pl.Trainer(**trainer_args, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert -1 < trainer.callback_metrics["repa_cosine"] < 1
    for batch in data.train_dataloader():
        places = [(latent == stored["flipped"].float()).all((1, 2, 3)).nonzero().item() for latent in batch.images]
        assert torch.equal(batch.features, stored["flipped_features"][places].float())
    assert all(batch.features is None for batch in data.val_dataloader())
    other = ImageData("latents", str(tmp_path / "plain"), batch_size=8, num_workers=0)
    with pytest.warns(UserWarning, match="there are none beside them, so that every batch is decoded for it"):
        module.check_data(other)
    with pytest.raises(ValueError, match="is there already with encoder None, not 'local-dir:"):
        encode_folder(str(image_folder), str(tmp_path / "plain"), vae, **options, encoder=encoder, encoder_grid=4)
    with pytest.raises(ValueError, match="encoder_grid must be at least 1 and at most 16, got 17"):
        encode_folder(str(image_folder), str(tmp_path / "more"), vae, **options, encoder=encoder, encoder_grid=17)


def test_alignment_alone(encoder, tiny_dit):
    """Its parameters: the three layers, of which the last is as wide as the encoder's patches."""
    model = timm.create_model("dit_tiny_patch4_pixel", num_classes=3, **tiny_dit)
    alignment = Alignment(model, encoder, block=2)
    assert [tuple(p.shape) for p in alignment.parameters() if p.dim() > 1] == [(2048, 48), (2048, 2048), (24, 2048)]
