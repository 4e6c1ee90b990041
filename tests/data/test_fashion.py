"""Fashion-MNIST: where it is looked for, and the folder of images made of it."""

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

from hcvision.data import fashion
from hcvision.data.fashion import FASHION_FILES, find_fashion_mnist, main


def test_fashion_mnist_is_looked_for_in_every_place(tmp_path, monkeypatch):
    debian = tmp_path / "debian"
    debian.mkdir()
    for name in FASHION_FILES:
        with gzip.open(debian / f"{name}.gz", "wb") as file:
            file.write(name.encode())
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", debian)
    raw = find_fashion_mnist(tmp_path / "root")
    assert {path.name: path.read_text() for path in raw.iterdir()} == {name: name for name in FASHION_FILES}

    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "missing")
    assert find_fashion_mnist(tmp_path / "root") == raw  # found where it was put

    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading t10k")

    monkeypatch.setattr(fashion.tv_datasets, "FashionMNIST", no_network)
    with pytest.raises(FileNotFoundError, match=r"Error downloading.*python -m hcvision.data.*apt-get install"):
        find_fashion_mnist(tmp_path / "other")


class Few:
    """Fashion-MNIST with six images, as torchvision gives them."""

    classes = ("T-shirt/top", "Bag")
    class_to_idx = {"T-shirt/top": 0, "Bag": 1}  # noqa: RUF012

    def __init__(self, root, train):
        self.targets = torch.tensor([1, 0, 1, 1, 0, 1] if train else [0, 1])

    def __getitem__(self, index):
        return Image.fromarray(np.full((28, 28), 10 * index, dtype=np.uint8)), int(self.targets[index])


def test_a_folder_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fashion, "find_fashion_mnist", lambda root, debian_download: root)
    monkeypatch.setattr(fashion.tv_datasets, "FashionMNIST", Few)
    main([str(tmp_path), "--folder", str(tmp_path / "a"), "--images", "3"])
    assert f"images are in {tmp_path / 'a'}" in capsys.readouterr().out
    files = {str(path.relative_to(tmp_path / "a")): path for path in tmp_path.rglob("*.png")}
    assert sorted(files) == [
        "train/Bag/00000.png", "train/Bag/00002.png", "train/Bag/00003.png", "train/T-shirt-top/00001.png",
        "train/T-shirt-top/00004.png", "val/Bag/00001.png", "val/T-shirt-top/00000.png",
    ]  # fmt: skip
    with Image.open(files["train/Bag/00003.png"]) as image:
        assert image.getpixel((5, 5)) == 30
    before = {path: path.stat().st_mtime_ns for path in files.values()}
    main([str(tmp_path), "--folder", str(tmp_path / "a")])  # what is there stays
    assert {path: path.stat().st_mtime_ns for path in files.values()} == before
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--folder", str(tmp_path / "b"), "--classes", "Shoe"])
    assert "classes must be of T-shirt/top, Bag, got Shoe" in capsys.readouterr().err
