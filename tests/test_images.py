"""Image files: what is read from them, and which are found."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from hcvision.images import (
    BadImage,
    Images,
    Table,
    find_classes,
    open_folder,
    open_image,
    read_table,
    to_mode,
    walk_files,
)


def gradient(mode="RGB", size=(7, 5)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_16_bits_become_8_and_not_white(tmp_path, extension):
    """Pillow's own conversion clips: all but the darkest 1/256 would be white."""
    gray = np.asarray(gradient("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / f"a.{extension}")
    image = open_image(str(tmp_path / f"a.{extension}"))
    assert image.mode.startswith("I")
    assert np.array_equal(to_mode(image, "L"), gray)
    assert np.array_equal(to_mode(image, "RGB"), np.repeat(gray[..., None], 3, -1))


def test_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16)
    assert np.asarray(to_mode(Image.fromarray(values), "L")).tolist() == [[0, 0, 1, 1, 2, 255]]


@pytest.mark.parametrize(
    ("values", "message"), [(np.float32([[0.5]]), "floats"), (np.int32([[70000]]), "32-bit integers")]
)
def test_pixels_of_unknown_range_are_refused(values, message):
    with pytest.raises(ValueError, match=f"{message}.*8 or 16 bits a channel would work"):
        to_mode(Image.fromarray(values), "RGB")


def test_palettes_and_transparency():
    palette = gradient("P")
    palette.info["transparency"] = bytes(range(256))
    plain = gradient("P")
    assert np.array_equal(to_mode(palette, "RGB"), plain.convert("RGB"))
    for mode in ("1", "L", "LA", "CMYK", "RGBA", "YCbCr", "HSV"):
        image = gradient(mode)
        assert np.array_equal(to_mode(image, "RGB"), image.convert("RGB")), mode


def test_walk_follows_links_once(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "b" / "c.png").touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    other = tmp_path.parent / "elsewhere"
    other.mkdir()
    (other / "d.png").touch()
    (tmp_path / "link").symlink_to(other)
    assert [str(Path(path).relative_to(tmp_path)) for path in walk_files(tmp_path)] == [
        "a.png", "self", "b/c.png", "link/d.png",
    ]  # fmt: skip


def test_files_come_in_the_order_of_imagefolder(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("x/1.png", "x/a/2.png", "x/a-b/3.png", "x/a/c/4.png", "y/5.JPG", "y/.hidden.png", "y/0.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert open_folder(tmp_path).samples == ImageFolder(str(tmp_path)).samples


def test_what_is_left_out_is_known(tmp_path):
    for name in ("a/1.png", "a/notes.txt", "a/.DS_Store", "a/Thumbs.db", "b/2.png", "b/3.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert open_folder(tmp_path).left_out == ["notes.txt", "3.heic"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a" / "locked").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod does not keep root out
    with pytest.raises(PermissionError, match=r"Permission denied: .*locked"):
        open_folder(tmp_path)


def write_table(path, text, files=("1.png", "sub/2.png", "3 ö.png")):
    for name in files:
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        gradient().save(path.parent / name)
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_a_table_of_files_and_labels(tmp_path):
    path = write_table(tmp_path / "t.csv", 'label,file,split\nb,1.png,train\n"a, c",sub/2.png,val\nb,3 ö.png,\n')
    rows = read_table(path, "file", "label")
    assert [(os.path.relpath(row.file, tmp_path), row.labels, row.split) for row in rows] == [
        ("1.png", ("b",), "train"), ("sub/2.png", ("a, c",), "val"), ("3 ö.png", ("b",), ""),
    ]  # fmt: skip
    classes = find_classes(rows)
    assert classes == ["a, c", "b"]
    table = Table(rows, classes)
    assert table.targets == [1, 0, 1]
    image, target = table[1]
    assert target == 0
    assert np.array_equal(image, gradient())


def test_numbers_are_sorted_as_numbers(tmp_path):
    path = write_table(tmp_path / "t.csv", "file,label\n1.png,10\nsub/2.png,9\n3 ö.png,2\n")
    assert find_classes(read_table(path, "file", "label")) == ["2", "9", "10"]


def test_several_labels(tmp_path):
    path = write_table(tmp_path / "t.csv", "file,label\n1.png,cat; dog\nsub/2.png,\n3 ö.png,dog\n")
    rows = read_table(path, "file", "label", ";")
    table = Table(rows, find_classes(rows), multi_label=True)
    batch = [table[number][1].tolist() for number in range(3)]
    assert batch == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"the label 'cat' of .*1\.png is not among those of the training images"):
        Table(rows, ["dog"], multi_label=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n1.png,a\n", "must have the columns file and label in its first line, got name, label"),
        ("", "must have the columns file and label in its first line, got nothing"),
        ("file,label\n", "there is no image in"),
        ("file,label\n1.png,\n", "line 2: no label"),
        ("file,label\n1.png\n", "line 2: no label"),
        ("file,label\n,a\n", "line 2: no file"),
        ("file,label\n1.png,a\n4.png,a\n5.png,a\n", r"line 3: there is no file .*4.png \(nor 1 more\)"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(write_table(tmp_path / "t.csv", text), "file", "label")


def test_a_table_in_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes("file,label\nö.png,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape("t.csv is no CSV file in UTF-8")):
        read_table(tmp_path / "t.csv", "file", "label")


def test_images_convert_before_they_transform(tmp_path):
    gray = np.asarray(gradient("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "a.png")
    rows = read_table(write_table(tmp_path / "t.csv", "file,label\na.png,x\n", ()), "file", "label")
    images = Images(Table(rows, ["x"]), [0], lambda image: torch.from_numpy(np.array(image)), "L")
    assert torch.equal(images[0][0], torch.from_numpy(gray.copy()))


class Pictures:
    """Two kinds of images in memory, and one that cannot be read."""

    def __getitem__(self, number):
        if number == 2:
            raise OSError("broken")
        return gradient(size=(9 + number, 8)), number


@pytest.mark.parametrize("more", [{}, {"re_prob": 1.0}, {"no_aug": True}, {"auto_augment": "rand-m9-inc1"}])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_is_the_images_one_by_one_to_the_bit(more, mode, channels, training):
    """What is done to the whole batch (floats, mean, std) gives what timm's transform gives each image."""
    arguments = {"mean": (0.4, 0.5, 0.6)[:channels], "std": (0.2, 0.3, 0.4)[:channels], "is_training": training}
    transform = create_transform((channels, 7, 7), **arguments, **(more if training else {}))
    images = Images(Pictures(), [0, 1, 2, 3], transform, mode, seed=3)
    indices = [(5, number) if training else number for number in range(4)]
    batch = next(iter(DataLoader(images, 4, sampler=indices, collate_fn=images.collate)))
    assert (batch.images.dtype, batch.targets.tolist()) == (torch.float32, [0, 1, 3])
    assert [str(bad) for bad in batch.bad] == ["cannot read image number 2: broken"]
    images.transform, images.normalize = transform, None  # timm's own, image by image
    alone = [images[index] for index in indices]
    assert isinstance(alone.pop(2), BadImage)
    assert torch.equal(batch.images, torch.stack([image for image, _ in alone]))
    assert (images.read(indices[0])[0].dtype, batch.images.min() < 0) == (torch.float32, True)
