"""Small images for every test, drawn here: no download."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core; torch reads it when it is imported
import torch
from PIL import Image

if not torch.cuda.is_available():  # for test_kernels.py; Triton reads it when it is imported, by Lightning among others
    os.environ.setdefault("TRITON_INTERPRET", "1")
import pytorch_lightning as pl

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning calls what jsonargparse deprecates


def draw(label: int, number: int) -> Image.Image:
    """A 32x32 picture that lacks red (class 0), green (1) or blue (2), with noise of its own."""
    generator = torch.Generator().manual_seed(1000 * label + number)
    pixels = torch.randint(120, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    pixels[..., label] //= 3
    return Image.fromarray(pixels.numpy())


def write_folder(root: Path, train: int = 24, val: int = 13) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("left-out", "müller straße", "zebra")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                draw(label, number + (500 if split == "val" else 0)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """train/ with 72 and val/ with 39 images of three classes."""
    return write_folder(tmp_path_factory.mktemp("images"))


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def tiny() -> dict:
    """Arguments that make a timm ViT small."""
    return dict(TINY)


@pytest.fixture
def tiny_dit() -> dict:
    """Arguments that make a dit_tiny_patch4_pixel smaller still, for images of 16 x 16."""
    return {"img_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def trainer_args(tmp_path) -> dict:
    """A Trainer that keeps quiet and writes nothing but checkpoints below tmp_path."""
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(tmp_path),
    }


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(0, verbose=False)


def randomize(model: torch.nn.Module, std: float = 0.2, seed: int = 1) -> Any:
    """Every parameter random, so that no connection is the identity and no branch is small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
