"""Bad inputs, what each of them gets, and docs/reliability.md, which lists it.

``HCVISION_WRITE_DOCS=1 python -m pytest tests/cli/test_reliability.py`` writes the table anew.
"""

import os
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import write_folder
from PIL import Image
from test_cli import ROOT, fit

from hcvision_command import main

PAGE = ROOT / "docs" / "reliability.md"
SEEN: dict[str, str] = {}
USED = "used"
HEADER = "| input | answer |"
SHORT = (
    "--trainer.max_epochs=1",
    "--model.connection=residual",
    "--data.batch_size=1",
    "--trainer.logger=false",
    "--data.img_size=32",
)


def pixels(mode="RGB", size=(40, 30)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def put(root, name, image=None, **options):
    """An image, or bytes, in the training images of a class."""
    path = root / "train" / "zebra" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image or pixels()).save(path, **options)
    return path


def cut(root, name, part=0.5):
    path = put(root, name)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def palette(root):
    image = pixels("P")
    image.info["transparency"] = bytes(range(256))
    put(root, "palette.png", image)


def sixteen_bits(root):
    put(root, "16.png", Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70))


def floats(root):
    put(root, "float.tif", Image.fromarray(np.random.default_rng(0).random((30, 30), dtype=np.float32)))


def loop(root):
    (root / "train" / "zebra" / "loop").symlink_to(root / "train")
    (root / "train" / "zebra" / "self").symlink_to(root / "train" / "zebra" / "self")


def in_bytes(root):
    shutil.copy(root / "train" / "zebra" / "000.png", os.fsencode(root / "train" / "zebra") + b"/\xff\xfe.png")


def rename_class(root, name):
    for split in ("train", "val"):
        (root / split / "zebra").rename(root / split / name)


def lying(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(root, "photo.jpg", exif=exif)


def left_by_others(root):
    for name in (".ipynb_checkpoints/a-checkpoint.png", "._a.png", "@eaDir/a.png", "../.ipynb_checkpoints/a.png"):
        put(root, name)


def unlabelled_tests(root):
    (root / "test").mkdir()
    pixels().save(root / "test" / "1.png")


def pipe(root):
    os.mkfifo(root / "train" / "zebra" / "pipe.png")


def lock(path, root):
    (root / path).chmod(0)


# what is wrong, how it is made, and what has to be in the answer (the whole answer is in the page)
IMAGES = {
    "a JPEG cut in the middle": (lambda root: cut(root, "cut.jpg"), "cannot read image photos/train/zebra/cut.jpg: "),
    "a PNG cut in the middle": (lambda root: cut(root, "cut.png"), "cannot read image photos/train/zebra/cut.png: "),
    "a WebP cut in the middle": (lambda root: cut(root, "cut.webp"), "cannot read image photos/train/zebra/cut.webp: "),
    "a file of no bytes": (lambda root: put(root, "empty.jpg", b""), "cannot read image photos/train/zebra/empty.jpg: "),
    "a text with an image's name": (lambda root: put(root, "text.png", b"text"), "cannot read image photos/train/zebra/text.png: "),
    "a CMYK JPEG": (lambda root: put(root, "cmyk.jpg", pixels("CMYK")), USED),
    "a PNG with 16 bits a channel": (sixteen_bits, USED),
    "a palette with transparency": (palette, USED),
    "black and white, 1 bit": (lambda root: put(root, "one.png", pixels("1")), USED),
    "gray with transparency": (lambda root: put(root, "la.png", pixels("LA")), USED),
    "a photo that EXIF turns upright": (lying, USED),
    "a transparent background": (lambda root: put(root, "rgba.png", pixels("RGBA")), USED),
    "1 x 1 pixels": (lambda root: put(root, "1x1.png", pixels(size=(1, 1))), USED),
    "20,000 x 20 pixels": (lambda root: put(root, "wide.png", pixels(size=(20000, 20))), USED),
    "20,000 x 20,000 pixels": (
        lambda root: put(root, "huge.png", Image.new("1", (20000, 20000))),
        "cannot read image photos/train/zebra/huge.png: Image size (400000000 pixels) exceeds limit",
    ),
    "a TIFF of floats": (floats, "cannot read image photos/train/zebra/float.tif: its pixels are floats; 8 or 16 bits"),
    "PostScript with an image's name": (
        lambda root: put(root, "photo.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"),
        "cannot read image photos/train/zebra/photo.jpg: it is no image, or of a kind that is not read",
    ),
    "a pipe with an image's name": (pipe, "cannot read image photos/train/zebra/pipe.png: it is no regular file"),
    "what other programs leave behind": (left_by_others, "left out, what other programs leave behind: '._a.png', '.ipynb_checkpoints', '@eaDir' (3 in photos)"),
    "a text among the images": (lambda root: put(root, "notes.txt", b"text"), "left out, no images by their names: 'notes.txt'"),
    "a kind of image that is not read": (lambda root: put(root, "a.heic", b"?"), "left out, no images by their names: 'a.heic'"),
    "Thumbs.db and .DS_Store": (lambda root: (put(root, "Thumbs.db", b"?"), put(root, ".DS_Store", b"?")), USED),
    "a link that leads nowhere": (
        lambda root: (root / "train" / "zebra" / "link.png").symlink_to("nowhere.png"),
        "cannot read image photos/train/zebra/link.png: No such file",
    ),
    "links that lead in circles": (loop, "left out, no images by their names: 'self' (1 in photos)"),
    "a folder within a class": (lambda root: put(root, "more/a.png"), USED),
    "a folder with an image's name": (lambda root: put(root, "folder.png/a.png"), USED),
    "a name with spaces": (lambda root: put(root, " a  b .png"), USED),
    "a name in Chinese": (lambda root: put(root, "斑馬.png"), USED),
    "a name with a newline": (lambda root: put(root, "a\nb.png"), USED),
    "a damaged file with a newline in its name": (lambda root: put(root, "a\nb.png", b""), "cannot read image 'photos/train/zebra/a\\nb.png': "),
    "a name that is no UTF-8": (in_bytes, USED),
    "a class with a newline in its name": (lambda root: rename_class(root, "zeb\nra"), USED),
    "a class without images": (lambda root: (root / "train" / "none").mkdir(), "there is no image in the class folder photos/train/none"),
    "a class that is in train alone": (lambda root: put(root, "../new/a.png"), "the val images are of 3 of the 4 classes, without new"),
    "a class that is in val alone": (lambda root: put(root, "../../val/new/a.png"), "the class folders of train and val differ: new"),
    "test images without classes": (unlabelled_tests, USED),
    "test images of some of the classes": (lambda root: put(root, "../../test/zebra/a.png"), USED),
    "an image that must not be read": (
        lambda root: lock("train/zebra/003.png", root),
        "cannot read image photos/train/zebra/003.png: Permission denied",
    ),
    "a class that must not be read": (lambda root: lock("train/zebra", root), "Permission denied: 'photos/train/zebra'"),
}  # fmt: skip


@pytest.fixture
def photos():
    """Images that another user may read, and write beside, where root has to become one."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o777)
    write_folder(place / "photos", train=4, val=1)
    yield place / "photos"
    for path in place.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o777)
    shutil.rmtree(place)


def answer(arguments, place, capsys) -> str:
    """What a command answers: ``used``, its warnings, or its error; it has to be one line."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            main(list(arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    said = [str(w.message) for w in caught if str(w.message).startswith(("left out", "the val"))]
    if code:
        assert code == 2, shown.err
        (line,) = [line for line in shown.err.splitlines() if line.startswith("hcvision: error: ")]
        said = [line.removeprefix("hcvision: error: ").removesuffix(" (HCVISION_DEBUG=1 shows where)")]
    assert not any(part in line for part in ("\n", "\r") for line in said)
    return "; ".join(said).replace(f"{place}/", "") or USED


@pytest.mark.parametrize("what", IMAGES)
def test_images(photos, what, capsys):
    spoil, expected = IMAGES[what]
    spoil(photos)
    outsider = os.geteuid() == 0 and "must not be read" in what
    if outsider:
        os.seteuid(65534)  # root may read everything
    try:
        SEEN[what] = answer(fit(photos, photos.parent / "run", *SHORT), photos.parent, capsys)
    finally:
        if outsider:
            os.seteuid(0)
    assert SEEN[what] == USED if expected == USED else expected in SEEN[what]
    if expected.startswith("cannot"):  # the same, left out
        arguments = fit(photos, photos.parent / "run", *SHORT, "--data.skip_bad_images=true")
        if not outsider:
            assert answer(arguments, photos.parent, capsys) in (
                USED,
                f"left out: {SEEN[what].partition(' (--data')[0]}",
            )


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), "it ran"))


def malicious(place, name):
    (place / name).write_bytes(pickle.dumps({"state_dict": Payload(place / "it_ran")}))
    torch.save({"state_dict": Payload(place / "it_ran")}, place / f"zip_{name}")


def rename_classes(root, to):
    if not to.exists():
        shutil.copytree(root, to)
        for split in ("train", "val"):
            (to / split / "zebra").rename(to / split / "zorse")


def table(place, text):
    (place / "table.csv").write_text(text)


def small_vit(**changes):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, num_heads=3, **changes
    ).state_dict()


NEW = "--run=run2"
# what is wrong, how it is made in a folder with photos/ and a trained run/, the command, and what is answered
OTHERS = {
    "a folder that is not there": (None, ["--data.root=nowhere"], "there is no folder nowhere; data.root must hold the images"),
    "one folder, and nothing to validate on": (
        None, ["--data.root=photos/train"], "there is no folder photos/train/train; photos/train must hold train/ and val/, or val_fraction"
    ),
    "a table without its columns": (
        lambda p: table(p, "name,class\n"), ["--data.dataset=csv", "--data.root=table.csv", "--data.val_fraction=0.5"],
        "table.csv must have the columns file and label in its first line, got name, class",
    ),
    "a table of files that are not there": (
        lambda p: table(p, "file,label\na.png,x\nb.png,x\n"), ["--data.dataset=csv", "--data.root=table.csv", "--data.val_fraction=0.5"],
        "table.csv, line 2: there is no file a.png (nor 1 more)",
    ),
    "a test on images without classes": (
        lambda p: put(p / "photos", "../../unlabelled/1.png"), ["test", "--data.test_split=unlabelled"],
        "the test images need the classes of the training images: there is no class folder in photos/unlabelled; it must hold one",
    ),
    "a table of a class with one image, to be split": (
        lambda p: table(p, "file,label\n" + "".join(f"photos/train/zebra/{n:03}.png,{label}\n" for n, label in ((0, "x"), (1, "x"), (2, "y")))),
        ["--data.dataset=csv", "--data.root=table.csv", "--data.val_fraction=0.5"], "class 'y' has 1 image, too few to split for validation",
    ),
    "a table in Latin-1": (
        lambda p: (p / "table.csv").write_bytes(b"file,label\n\xf6.png,x\n"), ["--data.dataset=csv", "--data.root=table.csv", "--data.val_fraction=0.5"],
        "table.csv is no CSV file in UTF-8",
    ),
    "an option that is not there": (None, ["--data.batchsize=4"], "unknown option --data.batchsize; did you mean --data.batch_size"),
    "a command that is not there": (None, "fti", "unknown command 'fti'; did you mean fit?"),
    "a value of the wrong type": (None, ["--data.batch_size=many"], "batch_size"),
    "a probability of 5": (None, ["--data.hflip=5"], "hflip must be at least 0 and at most 1, got 5"),
    "a range that is turned round": (None, ["--data.scale=[1,0.5]"], "scale must be the smaller number and then the larger one, got (1.0, 0.5)"),
    "per cent in the place of a part": (None, ["--data.crop_pct=87.5"], "crop_pct must be above 0 and at most 1, got 87.5"),
    "a policy of augmentation that is not there": (None, ["--data.auto_augment=randaug"], "auto_augment must be a policy of timm such as rand-m9-mstd0.5-inc1"),
    "an interpolation that is not there": (None, ["--data.interpolation=bicubicc"], "interpolation must be one of nearest, bilinear"),
    "statistics of too few channels": (None, ["--data.mean=[0.5,0.5]"], "mean must be of 1 or 3 numbers, as the model takes images, got [0.5, 0.5]"),
    "images of two channels": (
        None, ["--model.model_args={img_size: 32, patch_size: 16, embed_dim: 48, depth: 1, num_heads: 3, in_chans: 2}"],
        "images are read with 1 (gray), 3 (RGB) or 4 channels (RGBA), the model takes 2 (in_chans)",
    ),
    "images of four channels to be drawn": (
        None, ["--task=generate", "--model.model=dit_tiny_patch4_pixel", "--model.model_args={img_size: 32, depth: 1, in_chans: 4}"],
        "images that are drawn are gray or RGB, the model takes 4 channels (in_chans)",
    ),
    "a model that is not there": (None, ["--model.model=vit_tinny_patch16_224"], "unknown model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224"),
    "a connection that is not there": (None, ["--model.connection=dhd2"], "dhd2"),
    "more images in a batch than there are": (None, ["--data.batch_size=1000"], "batch_size must be at most 72, the training images per process, got 1000"),
    "a configuration that is no YAML": (lambda p: (p / "bad.yaml").write_text("model: [1"), ["--config=bad.yaml"], "bad.yaml is no YAML"),
    "a configuration that would run code": (
        lambda p: (p / "bad.yaml").write_text(f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{p}/it_ran']]"),
        ["--config=bad.yaml"], "bad.yaml is no YAML",
    ),
    "a configuration of unknown keys": (lambda p: (p / "bad.yaml").write_text("modle: {lr: 1}"), ["--config=bad.yaml"], "modle"),
    "a folder with a run in it": (None, ["--run=run"], "run holds a run; --resume true goes on with it, --run names another folder for a new one"),
    "a folder with something else in it": (None, ["--run=photos"], "photos exists and is not a run of ours; --run names another folder"),
    "nothing to go on with": (None, [NEW, "--resume=true"], "there is nothing to resume or score: no checkpoint in run2"),
    "a checkpoint that would run code": (lambda p: malicious(p, "bad.ckpt"), [NEW, "--ckpt_path=zip_bad.ckpt"], "zip_bad.ckpt is no checkpoint, or a damaged one: it is not weights alone, and reading the rest could run code"),
    "a plain pickle that would run code": (lambda p: malicious(p, "bad.ckpt"), [NEW, "--ckpt_path=bad.ckpt"], "bad.ckpt is no checkpoint, or a damaged one: it is not weights alone, and reading the rest could run code"),
    "weights that would run code": (lambda p: malicious(p, "bad.pth"), [NEW, "--model.init_from=zip_bad.pth"], "zip_bad.pth is no checkpoint, or a damaged one: it is not weights alone, and reading the rest could run code"),
    "a checkpoint cut in the middle": (
        lambda p: (p / "cut.ckpt").write_bytes((p / "run/checkpoints/last.ckpt").read_bytes()[:5000]),
        [NEW, "--ckpt_path=cut.ckpt"], "cut.ckpt is no checkpoint, or a damaged one",
    ),
    "a safetensors file cut in the middle": (
        lambda p: (p / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}"), [NEW, "--model.init_from=cut.safetensors"], "cut.safetensors is no safetensors file, or a damaged one",
    ),
    "a checkpoint of other classes, though of as many": (
        lambda p: rename_classes(p / "photos", p / "renamed"), [NEW, "--data.root=renamed", "--ckpt_path=run/checkpoints/last.ckpt"],
        "the checkpoint is of other classes than the data: class 2 is 'zebra' there and 'zorse' here; data of its classes would work",
    ),
    "a path below the home folder of nobody": (None, ["--run=~nobody-here/run"], "there is no home folder for ~nobody-here/run"),
    "a warm-up of more updates than the run has": (
        None, [NEW, "--model.warmup_steps=500"], "warmup_steps must be less than the 18 updates of the run, got 500",
    ),
    "a warm-up of more epochs than the run has": (
        None, [NEW, "--model.warmup_epochs=5"], "warmup_epochs must be less than the 2 epochs of the run, got 5",
    ),
    "no epoch to train": (None, [NEW, "--trainer.max_epochs=0"], "there is nothing to train: max_epochs is 0"),
    "an argument that the optimizer does not take": (None, [NEW, "--model.opt_args={beta: 0.9}"], "adamw does not take these opt_args: TypeError: "),
    "an argument that the schedule does not take": (None, [NEW, "--model.sched_args={foo: 1}"], "cosine does not take these sched_args: TypeError: "),
    "heads that do not divide the width": (
        None, [NEW, "--model.model_args={img_size: 32, embed_dim: 50, num_heads: 3, depth: 1}"],
        "vit_tiny_patch16_224 does not take these model_args: AssertionError: dim should be divisible by num_heads",
    ),
    "images of a size that the model does not take": (
        None, [NEW, "--data.img_size=64"], "vit_tiny_patch16_224 does not take the images of the data, (3, 64, 64); model_args has img_size",
    ),
    "a negative learning rate": (None, [NEW, "--model.lr=-0.1"], "lr must be at least 0, got -0.1"),
    "a learning rate that is no number": (None, [NEW, "--model.lr=.nan"], "lr must be at least 0, got nan"),
    "an average that does not forget": (None, [NEW, "--model.ema_decay=2"], "ema_decay must be at least 0 and below 1, got 2"),
    "a drop rate of per cent": (
        None, [NEW, "--model.model_args={drop_path_rate: 10}"], "drop_path_rate must be at least 0 and at most 1, got 10",
    ),
    "weights of another depth": (
        lambda p: torch.save(small_vit(depth=3), p / "deep.pth"), [NEW, "--model.init_from=deep.pth"],
        "the weights in deep.pth are of another architecture: blocks.",
    ),
    "weights of other names": (
        lambda p: torch.save({"a.b": torch.ones(1), "a.c": torch.ones(1)}, p / "names.pth"), [NEW, "--model.init_from=names.pth"],
        "the weights in names.pth are of another architecture: cls_token is missing; there are 'a.b', 'a.c', ...",
    ),
    "a checkpoint of another architecture": (
        None, [NEW, "--ckpt_path=run/checkpoints/last.ckpt", "--model.connection=dhc4"],
        "the checkpoint is of another architecture: connection is 'dhc2' there and 'dhc4' here",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_folder(place / "photos")
    main([*fit(place / "photos", place / "run"), "--trainer.max_epochs=1"])
    return place


@pytest.mark.parametrize("what", OTHERS)
def test_other_inputs(trained, what, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    make, arguments, expected = OTHERS[what]
    if make:
        make(trained)
    command = [arguments] if isinstance(arguments, str) else [*fit("photos", "run2"), *arguments]
    if arguments[0] == "test":
        command = ["test", *fit("photos", "run")[1:], *arguments[1:]]
    SEEN[what] = answer(command, trained, capsys)
    assert expected in SEEN[what]
    assert not (trained / "it_ran").exists(), "the payload ran"
    assert not (trained / "run2").exists()


def cell(text):
    return text.replace("|", "\\|").encode("utf-8", "backslashreplace").decode()


def test_page():
    """The page has a row for each of them; it is written here, where all of them were asked."""
    names = [*IMAGES, *OTHERS]
    if os.environ.get("HCVISION_WRITE_DOCS") and len(SEEN) == len(names):
        rows = [f"| {cell(what)} | {cell(SEEN[what])} |" for what in names]
        PAGE.write_text("\n".join([PAGE.read_text().partition(HEADER)[0] + HEADER, "|---|---|", *rows, ""]))
    known = re.findall(r"^\| (.*?) \|", PAGE.read_text().partition(HEADER)[2], re.MULTILINE)
    assert known == [cell(what) for what in names]
