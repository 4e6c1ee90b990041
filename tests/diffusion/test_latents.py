import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file

from hcvision.data.latents import LatentShards
from hcvision.data.module import ImageData
from hcvision.diffusion.encoding import encode_folder, place_processes
from hcvision.diffusion.objectives import SeededNoise
from hcvision.diffusion.sampling import Sampling, draw_samples, read_samples
from hcvision.diffusion.vae import decode, encode, load_vae
from hcvision.training.generation import ImageGenerator

SHIFT, SCALE = 0.25, 0.4


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A VAE with random weights that makes 4 x 16 x 16 of 3 x 32 x 32."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, scaling_factor=SCALE, shift_factor=SHIFT
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(image_folder, vae_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    options = {"image_size": 32, "batch_size": 7, "shard_size": 30, "num_workers": 0, "device": "cpu"}
    said = []
    encode_folder(str(image_folder), str(out), vae_folder, **options, say=said.append)
    *said, total = (re.sub(r"[\d.]+( s: |(?= images/s))", r"?\1", line) for line in said)
    assert total == "111 images in ? s: ? images/s"
    said = [line.removesuffix(", ? images/s") for line in said]
    assert said == [
        f"{out}/train-00000.safetensors: 30 images",
        f"{out}/train-00001.safetensors: 30 images",
        f"{out}/train-00002.safetensors: 12 images",
        f"{out}/val-00000.safetensors: 30 images",
        f"{out}/val-00001.safetensors: 9 images",
    ]
    return out, options


def test_a_shard_holds_draws_of_the_posterior(shards, image_folder, vae_folder):
    """Of the image and of its mirror image, each with noise of its own number, shifted and scaled."""
    out, _ = shards
    data = ImageData(root=str(image_folder), num_workers=0)
    images = torch.cat([batch.images for batch in data.plain_loader("train", (3, 32, 32))])
    vae, tensors = load_vae(vae_folder), load_file(out / "train-00001.safetensors")
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "latents": ((30, 4, 16, 16), torch.float16),
        "flipped": ((30, 4, 16, 16), torch.float16),
        "labels": ((30,), torch.int64),
    }
    assert tensors["labels"].tolist() == data.stages["train"][0].targets[30:60]
    for key, view in (("latents", images), ("flipped", images.flip(-1))):
        with torch.no_grad():
            posterior = vae.encode(view[30:60]).latent_dist
        noise = SeededNoise(0, range(30, 60))(posterior.mean)
        expected = (posterior.mean + posterior.std * noise - SHIFT) * SCALE
        torch.testing.assert_close(tensors[key].float(), expected, rtol=1e-3, atol=1e-3)
    with safe_open(str(out / "train-00001.safetensors"), "pt") as file:
        about = file.metadata()
    values = tensors["latents"].double()
    np.testing.assert_allclose(json.loads(about["mean"]), values.mean((0, 2, 3)))
    np.testing.assert_allclose(json.loads(about["std"]), values.std((0, 2, 3)))
    assert (about["vae"], about["image_size"], about["images"]) == (vae_folder, "32", "72")


def test_decode_undoes_shift_and_scale(vae_folder):
    vae, images = load_vae(vae_folder), torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encode(vae, images, torch.zeros_like)
    with torch.no_grad():
        expected = vae.decode(vae.encode(images).latent_dist.mode()).sample
    torch.testing.assert_close(decode(vae, latents), expected)


STATISTICS = {
    "scale": {"scaling_factor": 0.5},
    "scale and shift": {"scaling_factor": 0.5, "shift_factor": 0.25},
    "mean and deviation": {"scaling_factor": 0.5, "latents_mean": [5.0, 0, -1, 2], "latents_std": [10.0, 1, 2, 0.5]},
    "mean": {"scaling_factor": 0.5, "latents_mean": [5.0, 0, -1, 2]},
    "deviation and shift": {"scaling_factor": 1.0, "shift_factor": -0.5, "latents_std": [10.0, 1, 2, 0.5]},
}


def small_vae(**more):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **more).eval()


@pytest.mark.parametrize("what", STATISTICS)
@torch.no_grad()
def test_latents_are_standardised_as_the_vae_says(what):
    """(z - mean) * scaling_factor / std, and back."""
    options = STATISTICS[what]
    vae, images = small_vae(**options), torch.rand(2, 3, 16, 16) * 2 - 1
    z = vae.encode(images).latent_dist.mode()
    mean = torch.tensor(options.get("latents_mean", [options.get("shift_factor", 0.0)] * 4)).view(4, 1, 1)
    std = torch.tensor(options.get("latents_std", [1.0] * 4)).view(4, 1, 1)
    latents = encode(vae, images, torch.zeros_like)
    torch.testing.assert_close(latents, (z - mean) * options["scaling_factor"] / std)
    torch.testing.assert_close(decode(vae, latents), vae.decode(z).sample)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "AutoencoderTiny"}, "it is of the class AutoencoderTiny, and AutoencoderKL is what latents"),
        ({"_class_name": "VQModel"}, "it is of the class VQModel"),
        ({"layers_per_block": 2}, "its weights are of another model: 16 missing, such as decoder.up_blocks.0"),
        ({"mid_block_add_attention": False}, "its weights are of another model: 20 unexpected, such as decoder.mid"),
        ({"block_out_channels": [16]}, ".*size mismatch for encoder.conv_in.weight"),
        ({"in_channels": 1}, ".*size mismatch for encoder.conv_in.weight"),
        ({"block_out_channels": "x"}, "TypeError: "),
        ({"scaling_factor": 0}, "its scaling_factor must be above 0, got 0"),
        ({"scaling_factor": None}, "its scaling_factor must be a number, got None"),
        ({"shift_factor": "x"}, "its shift_factor must be a number, got 'x'"),
        ({"latents_mean": [1, 2, 3]}, "its latents_mean must be a list of 4 numbers, got"),
        ({"latents_std": [1, 2, 0, 4]}, "each number of its latents_std must be above 0, got 0"),
        ({"latents_mean": [1, 2, 3, 4], "shift_factor": 0.5}, "it has both a shift_factor and latents_mean"),
    ],
)
def test_a_folder_that_holds_another_vae(tmp_path, changes, reason, capfd):
    """It is refused in one line: weights that are missing would be random ones."""
    small_vae().save_pretrained(tmp_path)
    configure(tmp_path, **changes)
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"{tmp_path} is no VAE that can be used: {reason}"):
        load_vae(str(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_vae_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "it_ran", "it ran"))

    small_vae().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for write in (torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))):
        write({"encoder.conv_in.bias": Payload()}, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(ValueError, match="is no VAE that can be used"):
            load_vae(str(tmp_path))
        assert not (tmp_path / "it_ran").exists()


def test_gray_vaes_are_refused(tmp_path):
    small_vae(in_channels=1, out_channels=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it takes images of 1 channels, not of 3"):
        load_vae(str(tmp_path))


def test_folders_are_encoded_as_they_are_trained_on(image_folder, vae_folder, tmp_path):
    """Without what other programs left there, upright, and with the class numbers of the training images."""
    root = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns("0[1-9]*", "00[2-9]*"))
    shutil.rmtree(root / "val" / "left-out")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "zebra" / "._000.png").write_bytes(b"\0\5\x16\7")
    options = {"image_size": 32, "num_workers": 0, "device": "cpu", "say": lambda _: None}
    with pytest.warns(
        UserWarning, match="left out, what other programs leave behind: '._000.png', '.ipynb_checkpoints'"
    ):
        encode_folder(str(root), str(tmp_path / "out"), vae_folder, **options)
    data = ImageData("latents", str(tmp_path / "out"), batch_size=6)
    assert data.class_names == ["left-out", "müller straße", "zebra"]
    assert [data.stages[stage][0].targets for stage in ("train", "val")] == [[0, 0, 1, 1, 2, 2], [1, 1, 2, 2]]


def test_encoding_goes_on_where_it_was(shards, image_folder, vae_folder, tmp_path):
    out, options = shards
    copy = shutil.copytree(out, tmp_path / "copy")
    whole = load_file(copy / "train-00001.safetensors")
    (copy / "train-00001.safetensors").unlink()
    said = []
    encode_folder(str(image_folder), str(copy), vae_folder, **{**options, "batch_size": 30}, say=said.append)
    assert [line.partition(": ")[2].partition(",")[0] for line in said[:5]] == ["was there"] * 4 + ["30 images"]
    assert said[5].startswith("30 images in ")
    done = []
    encode_folder(str(image_folder), str(copy), vae_folder, **{**options, "batch_size": 30}, say=done.append)
    assert [line.partition(": ")[2] for line in done] == ["was there"] * 5
    again = load_file(copy / "train-00001.safetensors")
    for key, value in whole.items():  # batches of another size round in other places
        torch.testing.assert_close(again[key].float(), value.float(), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="is there already with image_size '32', not '16'; give another folder"):
        encode_folder(str(image_folder), str(copy), vae_folder, **{**options, "image_size": 16})


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_two_processes_make_the_same_shards(shards, image_folder, vae_folder, tmp_path):
    """To the bit what one makes, also where they go on; each shard by one of them, and all of it counted once."""
    out, options = shards
    more = ("--image_size=32", "--batch_size=7", "--shard_size=30", "--num_workers=0", "--device=cpu")
    command = ("encode", str(image_folder), "two", f"--vae={vae_folder}", *more, "--devices=2", "--strategy=ddp")
    first = processes.run_twice(*command, folder=tmp_path).stdout
    assert "two/train-00000.safetensors: 30 images, " in first
    assert "two/train-00001.safetensors" not in first  # the other's
    assert re.search(r"111 images in \d+ s by 2 processes: [\d.]+ images/s", first)
    names = sorted(path.name for path in out.iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in ("train-00001.safetensors", "val-00000.safetensors"):
        (tmp_path / "two" / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}
    again = []
    encode_folder(str(image_folder), str(tmp_path / "two"), vae_folder, **options, say=again.append)
    assert [line.partition(": ")[2].partition(",")[0] for line in again[:5]] == ["was there"] * 3 + ["30 images"] * 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (out / name).read_bytes()


def test_where_processes_run(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert place_processes("cuda:1", None) == {"accelerator": "cuda", "devices": [1], "num_nodes": 1}
    assert place_processes("cpu", 3) == {"accelerator": "cpu", "devices": 3, "num_nodes": 1}
    with pytest.raises(
        ValueError, match="devices must be 1 with a device by its number, got device=cuda:1 and devices=2"
    ):
        place_processes("cuda:1", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's, on two machines
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert place_processes("cuda", None) == {"accelerator": "cuda", "devices": 4, "num_nodes": 2}


def test_bad_images(image_folder, vae_folder, shards, tmp_path):
    damaged = shutil.copytree(image_folder, tmp_path / "damaged")
    bad = damaged / "train" / "zebra" / "003.png"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"cannot read image {bad}.*skip_bad_images"):
        encode_folder(str(damaged), str(tmp_path / "out"), vae_folder, **shards[1])
    said = []
    encode_folder(str(damaged), str(tmp_path / "out"), vae_folder, **shards[1], skip_bad_images=True, say=said.append)
    assert "train-00001.safetensors: 29 images, 1 unreadable ones left out, " in "".join(said)
    assert ImageData("latents", str(tmp_path / "out"), batch_size=8).num_classes == 3


def test_the_loader_streams_latents(shards, vae_folder):
    out, _ = shards
    data = ImageData("latents", str(out), batch_size=8, num_workers=0, hflip=0.5)
    data.setup("fit")
    assert (data.num_classes, data.class_names) == (3, ["left-out", "müller straße", "zebra"])
    assert data.data_config() == {"input_size": (4, 16, 16), "vae": vae_folder}
    stored = [load_file(path) for path in sorted(out.glob("train-*.safetensors"))]
    straight, flipped = (torch.cat([shard[key] for shard in stored]).float() for key in ("latents", "flipped"))
    epochs = []
    for epoch in (0, 0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch.images for batch in loader]))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    mirrored = 0
    for latent in epochs[0]:
        as_is, turned = (latent == straight).all((1, 2, 3)).any(), (latent == flipped).all((1, 2, 3)).any()
        assert as_is != turned
        mirrored += bool(turned)
    assert 18 < mirrored < 54  # of 72
    val = torch.cat([batch.images for batch in data.val_dataloader()])
    assert torch.equal(val[:30], load_file(out / "val-00000.safetensors")["latents"].float())
    workers = ImageData("latents", str(out), batch_size=8, num_workers=1, hflip=0.5)
    workers.setup("fit")
    assert torch.equal(torch.cat([batch.images for batch in workers.train_dataloader()]), epochs[0])
    plain = ImageData("latents", str(out), batch_size=8, num_workers=0, hflip=1.0, no_aug=True)
    plain.setup("fit")
    for batch in plain.train_dataloader():
        assert all((latent == straight).all((1, 2, 3)).any() for latent in batch.images)
    split = ImageData("latents", str(out), batch_size=8, num_workers=0, val_fraction=0.25)
    assert [len(split.stages[stage][1]) for stage in ("train", "val")] == [54, 18]


def test_bad_shards_are_named(shards, tmp_path):
    copy = shutil.copytree(shards[0], tmp_path / "copy")
    bad = copy / "train-00001.safetensors"
    whole = bad.read_bytes()
    for content in (whole[:-100], whole[:50], b""):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"the shard {bad} is cut short or damaged .*encode it again"):
            ImageData("latents", str(copy))
    bad.unlink()
    with pytest.raises(FileNotFoundError, match=f"the shard {bad} is missing; there must be 3"):
        ImageData("latents", str(copy))
    shutil.copy(copy / "val-00000.safetensors", bad)
    with pytest.raises(ValueError, match=f"{bad} has another shards than"):
        ImageData("latents", str(copy))
    with pytest.raises(FileNotFoundError, match=r"no shards train-\*.safetensors in .*hcvision encode"):
        ImageData("latents", str(tmp_path))
    torch.save({}, copy / "train-00000.safetensors")
    with pytest.raises(ValueError, match="cut short or damaged"):
        LatentShards(copy, "train")


@pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks` argument:UserWarning", "ignore:model.vae is 'no-vae':UserWarning"
)
def test_training_and_sampling_on_latents(shards, vae_folder, trainer_args, tmp_path, tiny_dit):
    out, _ = shards
    data = ImageData("latents", str(out), batch_size=8, num_workers=0)
    model_args = {**tiny_dit, "in_chans": 4}
    with pytest.raises(ValueError, match=r"latents need the VAE that made them: --model.vae"):
        pl.Trainer(**trainer_args, max_epochs=1).fit(
            ImageGenerator("dit_tiny_patch4_pixel", num_classes=3, model_args=model_args), data
        )
    module = ImageGenerator(
        "dit_tiny_patch4_pixel", connection="dhc2", num_classes=3, model_args=model_args, vae=vae_folder,
        sample_every=1, sample_count=3, sample_steps=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="there is no VAE 'no-vae'"):
        ImageGenerator("dit_tiny_patch4_pixel", num_classes=3, model_args=model_args, vae="no-vae").check_data(data)
    assert not module.diffusion.clip  # latents have no bounds
    trainer = pl.Trainer(**trainer_args, max_epochs=1)
    trainer.fit(module, data)
    assert (tmp_path / "grids" / "step0000009.png").is_file()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    images = read_samples(draw_samples(module, tmp_path / "s", Sampling(steps=2), 3, range(3), 2, quiet), 3)
    assert images.shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        (
            {"image_size": 33},
            ValueError,
            "image_size must be a multiple of 2, by which .* makes images smaller, got 33",
        ),
        ({"image_size": 32.0}, ValueError, "image_size must be a whole number, got 32.0"),
        ({"batch_size": True}, ValueError, "batch_size must be a whole number, got True"),
        ({"shard_size": -1}, ValueError, "shard_size must be at least 1, got -1"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0, got -1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"devices": 0}, ValueError, "devices must be at least 1, got 0"),
        ({"root": "nowhere"}, FileNotFoundError, "there is no folder nowhere; root must hold the images"),
        ({"vae": "nowhere/vae"}, ValueError, "there is no VAE 'nowhere/vae', neither a folder nor in reach on the hub"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_wrong_arguments(image_folder, vae_folder, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        encode_folder(**{"root": str(image_folder), "out": str(tmp_path / "out"), "vae": vae_folder, **options})
    assert not (tmp_path / "out").exists()


def test_without_diffusers(monkeypatch, vae_folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    load_vae.cache_clear()
    with pytest.raises(ValueError, match=r"latents need diffusers: pip install 'hcvision\[latents\]'"):
        load_vae(vae_folder)
