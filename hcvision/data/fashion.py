"""Fashion-MNIST: where it is found, and a folder of it.

``python -m hcvision.data ROOT`` puts it into ROOT; ``--folder FOLDER`` also writes images of it as files.
"""

import argparse
import gzip
import shutil
import subprocess
import tempfile
from pathlib import Path

from torchvision import datasets as tv_datasets

FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def find_fashion_mnist(root: Path, debian_download: bool = False) -> Path:
    """The folder with Fashion-MNIST's four files below root, unpacked or downloaded if need be.

    Tried in this order: root, Debian's package where it is installed, torchvision's download, and, if
    debian_download, Debian's package fetched and unpacked without being installed.

    Raises:
        FileNotFoundError: none of them worked; says what can be done.
    """
    raw = root / "FashionMNIST" / "raw"
    if all((raw / name).is_file() for name in FASHION_FILES):
        return raw
    if unpack(DEBIAN_FOLDER, raw):
        return raw
    reasons = []
    try:
        tv_datasets.FashionMNIST(str(root), download=True)
        return raw
    except (RuntimeError, OSError) as error:
        reasons.append(f"torchvision's download failed ({str(error).splitlines()[-1]})")
    if debian_download:
        try:
            with tempfile.TemporaryDirectory() as folder:
                fetch_debian_package(Path(folder))
                unpack(Path(folder) / DEBIAN_FOLDER.relative_to("/"), raw)
            return raw
        except (OSError, subprocess.CalledProcessError) as error:
            reasons.append(f"so did Debian's package ({str(getattr(error, 'stderr', '') or error).strip()})")
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {raw}: {'; '.join(reasons)}. Any of these works: a network, "
        f"`python -m hcvision.data {root}`, `apt-get install {DEBIAN_PACKAGE}`, or its four unpacked files in {raw}"
    )


def unpack(folder: Path, raw: Path) -> bool:
    """Unpack the four .gz files of folder into raw. False if they are not there."""
    if not all((folder / f"{name}.gz").is_file() for name in FASHION_FILES):
        return False
    raw.mkdir(parents=True, exist_ok=True)
    for name in FASHION_FILES:
        partial = raw / f"{name}.partial"
        with gzip.open(folder / f"{name}.gz") as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target)
        partial.replace(raw / name)
    return True


def fetch_debian_package(folder: Path) -> None:
    """Download Debian's Fashion-MNIST package and unpack it into folder, with package lists of its own: no root."""
    lists, cache = folder / "lists", folder / "cache"
    for path in (lists / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True)
    options = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={cache}", "-oAPT::Sandbox::User="]
    for arguments in (["apt-get", *options, "update"], ["apt-get", *options, "download", DEBIAN_PACKAGE]):
        subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True)
    package = next(folder.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True, text=True)


def write_folder(root: Path, folder: Path, images: int, classes: list[str] | None = None) -> Path:
    """Images of Fashion-MNIST as FOLDER/train/CLASS/NUMBER.png and FOLDER/val/CLASS/NUMBER.png.

    Args:
        root: where Fashion-MNIST is.
        folder: a new one.
        images: the first so many of each class for training, a quarter of that for validation.
        classes: all if not given.

    Raises:
        FileExistsError: the folder is there.
        ValueError: an unknown class.
    """
    for split, count in (("train", images), ("val", max(images // 4, 1))):
        base = tv_datasets.FashionMNIST(str(root), train=split == "train")
        unknown = sorted({*(classes or [])} - {*base.classes})
        if unknown:
            raise ValueError(f"classes must be of {', '.join(base.classes)}, got {unknown[0]}")
        for name in classes or base.classes:
            place = folder / split / name.replace("/", "-")
            place.mkdir(parents=True)
            members = (base.targets == base.class_to_idx[name]).nonzero().squeeze(1)[:count]
            for number in members.tolist():
                base[number][0].save(place / f"{number:05}.png")
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hcvision.data", description="Get Fashion-MNIST.")
    parser.add_argument("root", type=Path, help="folder for its four files")
    parser.add_argument(
        "--folder", type=Path, help="write images into this new folder, as train/CLASS/NUMBER.png and val/"
    )
    parser.add_argument("--images", type=int, default=500, help="of each class, a quarter of that for val (500)")
    parser.add_argument("--classes", nargs="+", help="all if not given")
    options = parser.parse_args(arguments)
    print(f"Fashion-MNIST is in {find_fashion_mnist(options.root, debian_download=True)}")
    if options.folder and not options.folder.exists():
        try:
            print(f"images are in {write_folder(options.root, options.folder, options.images, options.classes)}")
        except ValueError as error:
            parser.error(str(error))
