"""Image files: what is read from them, and which are found."""

import io
import os
import re
import struct
import subprocess
import zlib
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from timm.data import create_transform
from torch.utils.data import DataLoader

from hcvision.data.folders import open_folder, split_by_class, walk_files
from hcvision.data.images import BadImage, Images, mode_of, open_image, to_mode
from hcvision.data.tables import Row, Table, find_classes, read_table
from hcvision.deploy.prediction import Files, find_images


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


def test_modes_without_transparency():
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        image = gradient(mode)
        assert np.array_equal(to_mode(image, "RGB"), image.convert("RGB")), mode
        assert (np.asarray(to_mode(image, "RGBA"))[..., 3] == 255).all(), mode


def write_png(depth, kind, row, transparent):
    """A PNG with a transparent colour, made by hand: Pillow writes none of 2, 4 or 16 bits."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)) + chunk(b"tRNS", transparent)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


def save(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


GRAY, RGB = 0, 2  # kinds of PNG


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def with_alpha(color, kind="PNG", **options):
    return save(Image.fromarray(np.uint8([[(*color, 0), (255, 0, 0, 255)]])), kind, **options)


def of_16_bits(color):
    color = [257 * value for value in color]
    return write_png(16, RGB, words(*color, 65535, 0, 0), words(*color))


# a transparent pixel of some colour beside an opaque one, which is red or gray
HIDDEN = {
    "RGBA": with_alpha,
    "RGBA in a WebP": lambda c: with_alpha(c, "WEBP", lossless=True, exact=True),
    "RGBA in a TIFF": lambda c: with_alpha(c, "TIFF"),
    "LA": lambda c: save(Image.fromarray(np.uint8([[(c[0], 0), (77, 255)]]))),
    "a palette and one transparent colour": lambda c: save(in_palette(c), transparency=0),
    "a palette and the opacity of each colour": lambda c: save(in_palette(c), transparency=b"\0\xff"),
    "a GIF": lambda c: save(in_palette(c), "GIF", transparency=0),
    "RGB and a transparent colour": lambda c: write_png(8, RGB, bytes([*c, 255, 0, 0]), words(*c)),
    "RGB of 16 bits": of_16_bits,
    "gray and a transparent gray": lambda c: write_png(8, GRAY, bytes([c[0], 77]), words(c[0])),
    "gray of 16 bits": lambda c: write_png(16, GRAY, words(257 * c[0], 257 * 77), words(257 * c[0])),
    "gray of 4 bits": lambda c: write_png(4, GRAY, bytes([c[0] // 17 << 4 | 5]), words(c[0] // 17)),
    "gray of 2 bits": lambda c: write_png(2, GRAY, bytes([c[0] // 85 << 6 | 1 << 4]), words(c[0] // 85)),
    "black and white": lambda c: write_png(1, GRAY, bytes([c[0] // 255 << 7]), words(c[0] // 255)),
}


def in_palette(color):
    image = Image.fromarray(np.uint8([[0, 1]]))
    image.putpalette([*color, 255, 0, 0])
    return image


@pytest.mark.parametrize("what", HIDDEN)
def test_transparency_is_laid_over_white(what):
    """Whatever colour an encoder left behind it; with four channels it is kept."""
    for color in ((0, 0, 0), (255, 30, 10)) if what != "black and white" else ((255, 255, 255),):
        image = open_image(HIDDEN[what](color))
        opaque = np.asarray(image.convert("RGB"))[0, 1]
        if image.mode == "I;16":
            opaque = [77] * 3
        seen = np.asarray(to_mode(image, "RGB"))
        assert seen.tolist() == [[[255, 255, 255], list(opaque)]]
        assert np.asarray(to_mode(image, "L"))[0, 0] == 255
        assert np.asarray(to_mode(image, "RGBA"))[..., 3].tolist() == [[0, 255]]


def test_half_transparency():
    image = Image.new("RGBA", (1, 1), (100, 0, 255, 51))
    assert to_mode(image, "RGB").getpixel((0, 0)) == (224, 204, 255)  # a fifth of it, four fifths of white
    assert to_mode(image, "RGBA").getpixel((0, 0)) == (100, 0, 255, 51)
    for mode, first in (("La", "LA"), ("RGBa", "RGBA")):  # as some TIFF are, multiplied by their opacity
        black = Image.new("RGBA", (1, 1), (0, 0, 0, 51)).convert(first).convert(mode)
        assert to_mode(black, "L").getpixel((0, 0)) == 204


LYING = gradient(size=(6, 4))
UPRIGHT = {
    1: LYING, 2: ImageOps.mirror(LYING), 3: LYING.rotate(180), 4: ImageOps.flip(LYING),
    5: ImageOps.mirror(LYING.rotate(-90, expand=True)), 6: LYING.rotate(-90, expand=True),
    7: ImageOps.mirror(LYING.rotate(90, expand=True)), 8: LYING.rotate(90, expand=True),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright(orientation, tmp_path):
    """As EXIF says: in files of folders and of tables, of predict, and in bytes of streams."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    wanted = np.asarray(UPRIGHT[orientation])
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(open_image(save(LYING, kind, exif=exif, **options)), wanted), kind
    with Image.open(save(LYING, "JPEG")) as plain:
        turned = dict(zip(UPRIGHT, (None, 0, 3, 1, 5, 4, 6, 2), strict=True))[orientation]
        expected = plain if turned is None else plain.transpose(Image.Transpose(turned))
        assert np.array_equal(open_image(save(LYING, "JPEG", exif=exif)), expected)
    place = tmp_path / "train" / "a" / "1.png"
    place.parent.mkdir(parents=True)
    LYING.save(place, exif=exif)
    table = write_table(tmp_path / "t.csv", "file,label\ntrain/a/1.png,a\n", ())
    for base in (open_folder(tmp_path / "train"), Table(read_table(table, "file", "label"), ["a"]), Files([place])):
        assert np.array_equal(base[0][0], wanted)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_is_passed_over(exif):
    assert open_image(save(LYING, "JPEG", exif=exif)).size == LYING.size


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "DDS", "PDF", "JPEG2000", "SGI"])
def test_other_kinds_are_not_opened(tmp_path, kind, monkeypatch):
    """Not even PostScript, which Pillow hands to Ghostscript, under an image's name."""
    monkeypatch.setattr(subprocess, "check_call", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    path = tmp_path / "photo.jpg"
    path.write_bytes(POSTSCRIPT) if kind == "EPS" else LYING.resize((64, 64)).save(path, kind)
    bad = Images(Files([path]), [0], lambda image: image, "RGB")[0]
    assert str(bad) == f"cannot read image {path}: it is no image, or of a kind that is not read"


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_kinds_that_are_read(tmp_path, kind):
    """Whatever their files are called."""
    LYING.save(tmp_path / "photo.jpg", kind)
    assert open_image(str(tmp_path / "photo.jpg")).size == LYING.size


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack"), zlib.error("Error -3"), EOFError(), IndexError("index"), KeyError("key"),
        TypeError("None"), ZeroDivisionError("by zero"), OverflowError("too large"), AttributeError("no fp"),
        AssertionError(), MemoryError(), NotImplementedError("no"), RuntimeError("broken"), BufferError("export"),
        SyntaxError("not a TIFF file"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_a_decoder_raises_is_a_bad_image(tmp_path, error, monkeypatch):
    def fail(*_):
        raise error

    path = tmp_path / "a.png"
    LYING.save(path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    bad = Images(Files([path]), [0], lambda image: image, "RGB")[0]
    assert (bad.path, bad.doing) == (str(path), "read")
    assert str(error) in bad.reason
    assert bad.reason.removesuffix(": ") == bad.reason != ""


def test_an_image_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert Images(Files([tmp_path / "a.png"]), [0], lambda image: image, "RGB")[0].reason == "it is no regular file"


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_images_of_other_channels(channels):
    with pytest.raises(
        ValueError, match=rf"read with 1 \(gray\), 3 \(RGB\) or 4 .*the model takes {channels} \(in_chans\)"
    ):
        mode_of(channels)


OTHERS = ("._001.png", ".ipynb_checkpoints/001-checkpoint.png", "@eaDir/001.png/SYNOPHOTO_THUMB_M.jpg", ".hidden.jpg")
OTHERS += ("__MACOSX/._001.png", "$RECYCLE.BIN/$R001.png", "lost+found/#1.png", ".thumbnails/001.png")


def test_what_other_programs_leave_is_passed_over(tmp_path):
    """As files and folders of a class, as classes, and below folders and patterns of predict, which may name it."""
    kept = [tmp_path / "a" / "1.png", tmp_path / "b" / "2.png"]
    for name in [*kept, *(tmp_path / "a" / name for name in OTHERS), *(tmp_path / n for n in OTHERS if "/" in n)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".empty").mkdir()
    base = open_folder(tmp_path)
    assert (base.classes, base.samples) == (["a", "b"], [(str(path), n) for n, path in enumerate(kept)])
    assert {*(name.partition("/")[0] for name in OTHERS), ".empty"} == set(base.left_behind)
    assert find_images([str(tmp_path)]) == find_images([f"{tmp_path}/**/*.*"]) == find_images([f"{tmp_path}/*"]) == kept
    assert find_images([f"{tmp_path}/a/.hid*.jpg"]) == find_images([f"{tmp_path}/a/.hidden.jpg"])
    assert len(find_images([f"{tmp_path}/a/.hid*.jpg"])) == 1


def test_what_other_programs_leave_in_a_table(tmp_path):
    """It is left out of the rows, whether its file is still there or not; a hidden folder that all share is theirs."""
    root = tmp_path / ".cache" / "images"
    names = ["a/1.png", "a/._1.png", "b/2.png", "b/.ipynb_checkpoints/2-checkpoint.png", f"{root}/@eaDir/2.png"]
    path = write_table(
        root / "t.csv", "\n".join(["file,label", *(f"{name},x" for name in names)]), ("a/1.png", "b/2.png")
    )
    with pytest.warns(
        UserWarning, match=r"left out, what other programs leave behind: .*a/\._1\.png'.* \(3 in .*t\.csv\)"
    ):
        rows = read_table(path, "file", "label")
    assert [row.file for row in rows] == [str(root / "a/1.png"), str(root / "b/2.png")]


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


def test_a_link_to_itself_is_no_class(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.png").touch()
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert open_folder(tmp_path).classes == ["x"]


def test_files_come_in_the_order_of_imagefolder(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("x/1.png", "x/a/2.png", "x/a-b/3.png", "x/a/c/4.png", "y/5.JPG", "y/0.webp"):
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


@pytest.mark.parametrize("labels", [("1", "01", "001", "2", "02"), ("7", "007"), ("٣", "3", "03"), ("b", "a", "B")])
def test_classes_have_one_order(labels):
    """That of numbers, then of text, whatever the order of a set, which differs from process to process."""
    orders = {tuple(find_classes([Row("a", each, "")])) for each in (labels, labels[::-1])}
    orders |= {tuple(find_classes([Row("a", (label,), "") for label in each])) for each in permutations(labels)}
    assert orders == {tuple(sorted(labels, key=lambda label: (int(label) if label.isdecimal() else 0, label)))}


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="class 'zebra' has 1 image, too few to split for validation"):
        split_by_class([0, 0, 1], 0.5, 0, ["ant", "zebra"])


def test_another_part_of_the_same_data(tmp_path):
    """Classes keep their numbers; one without images is all right, an unknown one is not."""
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/b/1.png", "other/d/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "val" / "a").mkdir()
    train = open_folder(tmp_path / "train")
    val = open_folder(tmp_path / "val", train)
    assert (val.classes, val.targets, val.empty) == (["a", "b", "c"], [1, 2], ["a"])
    with pytest.raises(ValueError, match="the class folders of train and other differ: d"):
        open_folder(tmp_path / "other", train)


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
