"""Scores of drawn images: Fréchet and kernel distance, classifier score, precision, recall, by one set of features.

The features are those of Inception, which makes the distances FID and KID, of any timm model, or of a small classifier
trained on the same data: such numbers compare with each other and with nothing else. torch-fidelity computes them.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from hcvision.data import ImageData, check_number, first_difference, write_json
from hcvision.diffusion import parts, to_uint8
from hcvision.models import FrozenModel
from hcvision.training import ImageClassifier, Progress, read_checkpoint

SUBSETS, SUBSET = 100, 1000  # of images, for the kernel distance
FEWEST = 4  # images: precision and recall look at the third neighbour of each
SMALL_CNN, CNN_SIZE = "resnet10t", {"channels": [32, 64, 96, 128], "output_stride": 16}


DATA = {  # what of a run's data the small classifier takes
    *("dataset", "root", "file_column", "label_column", "val_fraction", "split_seed", "train_split", "val_split"),
    *("num_workers", "num_classes"),
}


class Extractor:
    """Features and logits of images."""

    name: str  # of the network
    class_names: list[str] | None = None  # of its logits, where they are those of the data
    distance: str  # what the Fréchet distance on its features is called
    kernel: str  # what the kernel distance is called
    score: str  # what the exponential of the mean divergence of its predictions is called

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) uint8 to features (B, F) and logits (B, K), None where it has no classes."""
        raise NotImplementedError


class Inception(Extractor):
    """torch-fidelity's Inception v3, as in published numbers.

    Args:
        weights: file of its weights (``weights-inception-2015-12-05-6726825d.pth``); None downloads them.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none of weights, or they cannot be downloaded.
    """

    name, distance, kernel, score = "Inception v3", "FID", "KID", "IS"

    def __init__(self, weights: str | None = None, device: str = "cpu"):
        if weights is not None:
            if not Path(weights).is_file():
                raise FileNotFoundError(f"there is no file {weights} with Inception's weights")
            read_checkpoint(weights)  # torch-fidelity would execute what it says
        try:
            net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"no weights of Inception ({reason}); --inception names a file of them") from error
        self.net, self.device = net.to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rgb = images.expand(*images.shape[:3], 3).permute(0, 3, 1, 2).contiguous()
        features, logits = self.net(rgb.to(self.device))
        return features.cpu(), logits.cpu()


class SmallClassifier(Extractor):
    """A small CNN trained on the images that a model draws, kept in a folder: weights, and how it was trained.

    Args:
        folder: where ``train_classifier`` put it.
        device: where it runs.

    Raises:
        FileNotFoundError: there is none.
    """

    distance, score = "Fréchet distance (small classifier)", "classifier score"
    kernel = "kernel distance (small classifier)"

    def __init__(self, folder: Path, device: str = "cpu"):
        about = folder / "classifier.json"
        if not about.is_file():
            raise FileNotFoundError(f"there is no classifier in {folder}: no file {about}")
        self.about = json.loads(about.read_text())
        self.net: Any = timm.create_model(**self.about["model"])
        self.net.load_state_dict(load_file(folder / "classifier.safetensors"))
        self.net.eval().to(device)
        self.device = device
        self.class_names = self.about["class_names"]
        self.name = f"small classifier ({self.about['model']['model_name']}, {100 * self.about['top1']:.1f} % top-1)"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.about["model"]["in_chans"]
        if images.shape[-1] != channels:  # gray as three equal channels, or the reverse
            images = images[..., :1].expand(*images.shape[:3], channels)
        x = images.permute(0, 3, 1, 2).contiguous() / 127.5 - 1
        features = self.net.forward_head(self.net.forward_features(x.to(self.device)), pre_logits=True)
        return features.cpu(), self.net.get_classifier()(features).cpu()


class TimmNetwork(Extractor):
    """Any timm model: the features in front of its head, of whole images in the size of its weights.

    Args:
        source: a timm name, ``NAME=FILE`` or ``local-dir:FOLDER``; see ``FrozenModel``.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown model, or weights that cannot be had.
    """

    def __init__(self, source: str, device: str = "cpu"):
        self.net, self.device = FrozenModel(source).to(device), device
        self.name = f"{self.net.name} at {self.net.size[0]} x {self.net.size[1]}"
        self.distance, self.kernel = f"Fréchet distance ({self.net.name})", f"kernel distance ({self.net.name})"
        self.score = f"classifier score ({self.net.name})"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.net.pooled(images.to(self.device).permute(0, 3, 1, 2) / 255)
        return features.cpu(), None if logits is None else logits.cpu()


def train_classifier(
    folder: Path,
    data: dict[str, Any],
    input_size: tuple[int, int, int],
    device: str = "cpu",
    epochs: int = 3,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Train the small classifier on the training images of ``data``, once.

    Args:
        folder: for ``classifier.safetensors`` and ``classifier.json``.
        data: arguments of ``ImageData``.
        input_size: (C, H, W) of the images that will be scored.
        device: where it is trained.
        epochs: over all training images.
        progress: show a bar.
        say: called with a line when there is something to train.

    Returns:
        The folder.

    Raises:
        ValueError: it holds a classifier of other images.
    """
    about = folder / "classifier.json"
    channels = input_size[0]
    if data.get("multi_label"):
        raise ValueError("the small classifier takes one label per image, not several (multi_label)")
    kept = {key: data[key] for key in data if key in DATA}
    half, whole = [0.5] * channels, (1.0, 1.0)
    images = ImageData(
        **kept, eval_batch_size=500, hflip=0.0, scale=whole, ratio=whole, crop_pct=1.0, mean=half, std=half
    )
    images.prepare_data()
    images.setup("test")
    count = len(images.stages["train"][1])
    if images.num_classes < 2:
        raise ValueError(
            "the small classifier needs two classes or more to tell apart, the data have one; "
            "--inception (a file of weights, or download) scores samples of one class"
        )
    identity = {
        "dataset": images.dataset, "class_names": images.class_names, "images": count, "input_size": list(input_size),
        "epochs": epochs,
    }  # fmt: skip
    if about.is_file():
        there = json.loads(about.read_text())
        difference = first_difference({key: there.get(key) for key in identity}, identity)
        if difference:
            raise ValueError(f"{folder} holds a classifier of other images: {difference}")
        return folder
    say(f"training the small classifier that scores the samples ({epochs} epochs)")
    pl.seed_everything(0, workers=True, verbose=False)
    images.batch_size = max(2, min(128, count // 10))
    module = ImageClassifier(
        SMALL_CNN, model_args={**CNN_SIZE, "in_chans": channels}, num_classes=images.num_classes, lr=3e-3
    )
    module.data_config["input_size"] = input_size
    arguments: dict[str, Any] = {"max_epochs": epochs, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0}
    arguments |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    one = torch.device(device)
    arguments |= {"accelerator": one.type, "devices": 1, "strategy": SingleDeviceStrategy(one)}
    runner = pl.Trainer(
        **arguments, enable_progress_bar=progress, callbacks=[Progress(title="classifier")] if progress else []
    )
    runner.fit(module, images)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(module.model.state_dict()), folder / "classifier.safetensors")
    model = {"model_name": SMALL_CNN, "num_classes": images.num_classes, "in_chans": channels, **CNN_SIZE}
    write_json(about, {**identity, "top1": runner.callback_metrics["val_top1"].item(), "model": model})
    return folder


@dataclass
class Features:
    """What a network sees in N images: features (N, F), logits (N, K) if it has any, the classes meant, if known."""

    features: Tensor
    logits: Tensor | None
    classes: Tensor | None = None


def look(extractor: Extractor, batches: Iterable[Tensor], total: int, title: str = "") -> Features:
    """Features of images (B, H, W, C) uint8, with a progress bar. Raises ValueError when there are too few to score."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    with tqdm(total=total, desc=title, unit=" images", leave=False, disable=None) as bar:
        for images in batches:
            seen.append(extractor(images))
            bar.update(len(images))
    if sum(len(features) for features, _ in seen) < FEWEST:
        raise ValueError(f"scores need at least {FEWEST} {title or 'images'}, got {sum(len(f) for f, _ in seen)}")
    features, logits = zip(*seen, strict=True)
    return Features(torch.cat(features), torch.cat(logits) if logits[0] is not None else None)


def look_at_data(
    extractor: Extractor, data: ImageData, split: str, input_size: tuple[int, int, int], number: int
) -> Features:
    """Features of real images, chosen by ``data.split_seed`` and prepared as for evaluation.

    Raises:
        ValueError: an image cannot be read and ``data.skip_bad_images`` is not set.
    """
    loader: Any = data.plain_loader(split, input_size, number)
    half = (0.5,) * input_size[0]

    def batches() -> Iterator[Tensor]:
        for batch in loader:
            data.report_bad(batch.bad)
            if len(batch.images):
                yield to_uint8(batch.images, half, half)

    return look(extractor, batches(), len(loader.dataset), f"real {split} images")


def look_at_samples(extractor: Extractor, path: Path, number: int | None = None) -> Features:
    """Features of what ``hcvision sample`` drew: its folder, or any .npz with ``arr_0`` (N, H, W, C) uint8.

    The classes they were drawn as are known in a folder; they are kept if the network's classes are the same ones.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: fewer than ``number`` images, or no images at all.
    """
    files, count = open_samples(path), count_samples(path, number)

    def batches() -> Iterator[Tensor]:
        left = count
        for images in files:
            yield from torch.from_numpy(np.array(images[:left])).split(250)
            left = max(left - len(images), 0)
            if left == 0:
                return

    seen = look(extractor, batches(), count, "samples")
    if path.is_dir():
        about = json.loads((path / "sampling.json").read_text())
        classes = torch.tensor(about["classes"])
        if extractor.class_names is not None and about["class_names"] == extractor.class_names:
            seen.classes = classes[torch.arange(count) % len(classes)]
    return seen


def count_samples(path: Path, number: int | None = None) -> int:
    """How many of the samples in a place are meant by ``number``; None means all.

    Raises:
        ValueError: there are not as many, or fewer than can be scored.
    """
    total = sum(map(len, open_samples(path)))
    if total < FEWEST:
        raise ValueError(f"there are {total} samples in {path}; scores need at least {FEWEST}")
    check_number("number", total if number is None else number, least=FEWEST, most=total, whole=True)
    return total if number is None else number


def open_samples(path: Path) -> list[np.ndarray]:
    """Arrays (N, H, W, C), uint8; those of a folder are not in memory until they are used."""
    if path.is_dir():
        files = parts(path / "parts")
        if not files:
            raise FileNotFoundError(f"there are no samples in {path}; `hcvision sample` draws them")
        ends = [0, *(span.stop for span, _ in files)]
        if any(span.start != end for (span, _), end in zip(files, ends, strict=False)):
            raise ValueError(f"the samples in {path} have gaps; `hcvision sample` with the same options goes on")
        return [np.load(file, mmap_mode="r") for _, file in files]
    if not path.is_file():
        raise FileNotFoundError(f"there are no samples {path}: neither a folder of `hcvision sample` nor a .npz")
    try:
        with path.open("rb") as file:
            images = np.asarray(np.load(file)["arr_0"])  # without pickles, which could run code
    except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npz with arr_0: {error}") from error
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"arr_0 of {path} must be (N, H, W, C) uint8, got {images.shape} {images.dtype} (C has to be 1 or 3)"
        )
    return [images]


def compare_features(samples: Features, real: Features) -> dict[str, float]:
    """The scores of samples against real images.

    Returns:
        distance: squared Fréchet distance between Gaussians of the features' means and covariances (arXiv 1706.08500).
        kernel_distance: unbiased squared maximum mean discrepancy with a cubic kernel, on 100 subsets of 1000 images
            at most (arXiv 1801.01401, section 4); negative values near zero are possible.
        score: the inception score, of whatever network (arXiv 1606.03498); not of one without classes.
        precision, recall: with balls to the third neighbour (arXiv 1904.06991).
        accuracy: share of samples that the network takes for the class they were meant to be, where that is known.
    """
    distance = fid_statistics_to_metric(
        *(fid_features_to_statistics(which.features.double()) for which in (samples, real)), verbose=False
    )
    neighbours = prc_features_to_metric(
        samples.features, real.features, prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    size = min(SUBSET, len(samples.features), len(real.features))
    whole = size == len(samples.features) == len(real.features)
    kernel = kid_features_to_metric(
        samples.features.double(), real.features.double(), kid_subsets=1 if whole else SUBSETS, kid_subset_size=size,
        verbose=False,
    )  # fmt: skip
    scores = {
        "distance": distance[KEY_METRIC_FID],
        "kernel_distance": kernel[KEY_METRIC_KID_MEAN],
        "precision": neighbours[KEY_METRIC_PRECISION],
        "recall": neighbours[KEY_METRIC_RECALL],
    }
    if samples.logits is not None:
        score = isc_features_to_metric(samples.logits, splits=min(10, len(samples.logits)))
        scores["score"] = score[KEY_METRIC_ISC_MEAN]
        if samples.classes is not None:
            scores["accuracy"] = (samples.logits.argmax(1) == samples.classes).double().mean().item()
    return scores


def warn_of_few(samples: Features, real: Features) -> str | None:
    """What is wrong with the Fréchet distance of so few images, or None: their covariance does not have full rank."""
    number, features = min(len(samples.features), len(real.features)), samples.features.shape[1]
    if number > features:
        return None
    return (
        f"the Fréchet distance says little: {features} features have no covariance of {number} images, more would be "
        "needed; the kernel distance is not biased by that"
    )
