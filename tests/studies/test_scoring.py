import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from safetensors.torch import save_file
from torchmetrics.image import FrechetInceptionDistance, InceptionScore

from hcvision.data.module import ImageData
from hcvision.studies.scoring import (
    Features,
    Inception,
    SmallClassifier,
    TimmNetwork,
    compare_features,
    count_samples,
    look,
    look_at_data,
    look_at_samples,
    open_samples,
    train_classifier,
    warn_of_few,
)

SIZE = (3, 32, 32)


class AsItIs(torch.nn.Module):
    """Features that are given as images."""

    num_features = 12

    def forward(self, x):
        return x


def blobs(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Features(*(shift + torch.randn(count, 12, generator=generator) for _ in range(2)))


def test_scores_are_those_of_torchmetrics():
    samples, real = blobs(300, 0.4), blobs(400, seed=1)
    scores = compare_features(samples, real)
    fid = FrechetInceptionDistance(feature=AsItIs())
    fid.set_dtype(torch.float64)
    fid.update(real.features.double(), real=True)
    fid.update(samples.features.double(), real=False)
    assert scores["distance"] == pytest.approx(fid.compute().item(), rel=1e-6)
    with pytest.warns(UserWarning, match="save all extracted features"):
        inception = InceptionScore(feature=AsItIs())
    inception.update(samples.logits)
    assert scores["score"] == pytest.approx(inception.compute()[0].item(), rel=0.02)  # its ten splits are other ones


def test_kernel_distance_by_its_definition():
    """Unbiased MMD² with the kernel (x.y / F + 1)³, over all pairs of different images (arXiv 1801.01401)."""
    samples, real = blobs(40, 0.4), blobs(40, seed=1)
    x, y = samples.features.double(), real.features.double()

    def kernel(a, b):
        return (a @ b.T / 12 + 1) ** 3

    within = sum((kernel(z, z).sum() - kernel(z, z).trace()) / (40 * 39) for z in (x, y))
    expected = within - 2 * kernel(x, y).mean()
    assert compare_features(samples, real)["kernel_distance"] == pytest.approx(expected.item(), rel=1e-9)
    more = compare_features(samples, blobs(60, seed=1))["kernel_distance"]  # on subsets
    assert more == pytest.approx(expected.item(), rel=0.2)
    assert abs(compare_features(blobs(40, seed=2), real)["kernel_distance"]) < 0.5 * expected


def test_few_images_are_said():
    assert warn_of_few(blobs(13), blobs(40)) is None
    said = warn_of_few(blobs(12), blobs(40))
    assert said.startswith("the Fréchet distance says little: 12 features have no covariance of 12 images")
    assert warn_of_few(blobs(40), blobs(5)) is not None


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    """A small ViT with its weights in a file."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(net.state_dict(), path)
    return net.eval(), path


@pytest.mark.parametrize("channels", [1, 3])
def test_any_timm_model_looks_at_images(small_vit, channels):
    """Whole images, resized and normalised as its weights say; the features are those in front of its head."""
    net, path = small_vit
    extractor = TimmNetwork(f"vit_tiny_patch16_224={path}")
    assert (extractor.name, extractor.score) == (
        "vit_tiny_patch16_224 at 224 x 224",
        "classifier score (vit_tiny_patch16_224)",
    )
    images = torch.randint(0, 256, (2, 20, 28, channels), dtype=torch.uint8)
    rgb = images.expand(2, 20, 28, 3).permute(0, 3, 1, 2) / 255
    whole = torch.nn.functional.interpolate(rgb, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = net.forward_features((whole - 0.5) / 0.5)[:, 0]  # its class token
        logits = net.head(expected)
    features, found = extractor(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_a_network_without_classes(monkeypatch):
    """It has distances and no score of classes."""
    monkeypatch.setattr(
        "hcvision.models.frozen.create_model", lambda *_, **__: timm.create_model("resnet10t", num_classes=0)
    )
    seen = look(TimmNetwork("resnet10t"), torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8).split(3), 6)
    assert seen.logits is None
    assert "score" not in compare_features(seen, seen)
    assert compare_features(seen, seen)["distance"] == pytest.approx(0, abs=1e-6)


def test_networks_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file none\.pth with the weights of resnet18"):
        TimmNetwork("resnet18=none.pth")
    for source in ("resnet99", "resnet10t", f"local-dir:{tmp_path}"):  # unknown, without weights, empty
        with pytest.raises(ValueError, match=f"no timm model {source} to look at images with: "):
            TimmNetwork(source)


def test_distance_of_known_gaussians():
    """The same covariance, shifted by d: |d|²; scaled by s: (s - 1)² of the variance."""
    real = blobs(500)
    shifted = Features(real.features + 0.5, real.logits)
    assert compare_features(shifted, real)["distance"] == pytest.approx(12 * 0.25, rel=1e-4)
    centred = Features(real.features - real.features.mean(0), real.logits)
    scaled = Features(centred.features * 1.5, real.logits)
    variances = torch.cov(real.features.T.double()).trace().item()
    assert compare_features(scaled, centred)["distance"] == pytest.approx(0.25 * variances, rel=1e-4)


def test_precision_is_of_the_samples_and_recall_of_the_real_images():
    real = Features(torch.cat([blobs(50).features, blobs(50, 100.0).features]), torch.zeros(100, 12))
    half = blobs(50, seed=2)  # good, but only half of what there is
    scores = compare_features(half, real)
    assert scores["precision"] > 0.8
    assert 0.35 < scores["recall"] < 0.5
    scores = compare_features(real, half)  # all there is, and as much again that is not
    assert 0.35 < scores["precision"] < 0.5
    assert scores["recall"] > 0.8


def test_accuracy_is_of_the_classes_that_were_wanted():
    samples = blobs(40)
    samples.classes = samples.logits.argmax(1)
    assert compare_features(samples, blobs(40, seed=1))["accuracy"] == 1
    samples.classes[:10] = (samples.classes[:10] + 1) % 12
    assert compare_features(samples, blobs(40, seed=1))["accuracy"] == 0.75
    samples.classes = None
    assert "accuracy" not in compare_features(samples, blobs(40, seed=1))


@pytest.fixture(scope="module")
def classifier(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores") / "classifier"
    data = {"root": str(image_folder), "dataset": "folder", "num_workers": 0}
    return train_classifier(folder, {**data, "batch_size": 16}, SIZE, epochs=4, progress=False, say=lambda _: None)


def test_the_small_classifier_is_trained_once_and_sees(classifier, image_folder, tmp_path, monkeypatch):
    extractor = SmallClassifier(classifier)
    assert extractor.about["top1"] > 0.6
    assert extractor.name == f"small classifier (resnet10t, {100 * extractor.about['top1']:.1f} % top-1)"
    assert "FID" not in extractor.distance
    data = ImageData(root=str(image_folder), num_workers=0, eval_batch_size=20)
    seen = look_at_data(extractor, data, "val", SIZE, 100)
    assert seen.features.shape == (39, 128)
    data.setup("test")
    right = seen.logits.argmax(1) == torch.tensor(data.stages["val"][0].targets)
    assert right.double().mean().item() == pytest.approx(extractor.about["top1"], abs=1e-6)
    again = look_at_data(extractor, data, "train", SIZE, 20)
    assert torch.equal(again.features, look_at_data(extractor, data, "train", SIZE, 20).features)
    monkeypatch.setattr("hcvision.studies.scoring.ImageClassifier", None)  # nothing to train
    arguments = {"root": str(image_folder), "dataset": "folder"}
    assert train_classifier(classifier, arguments, SIZE, epochs=4) == classifier
    with pytest.raises(ValueError, match=r"a classifier of other images: input_size is \[3, 32, 32\] there and \[1,"):
        train_classifier(classifier, arguments, (1, 28, 28), epochs=4)
    other = shutil.copytree(image_folder, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "zebra").rename(other / split / "horse")
    with pytest.raises(ValueError, match="a classifier of other images: class_names is"):
        train_classifier(classifier, {**arguments, "root": str(other)}, SIZE, epochs=4)
    with pytest.raises(FileNotFoundError, match="there is no classifier in"):
        SmallClassifier(classifier.parent)


def test_real_images_score_best(classifier, image_folder):
    extractor = SmallClassifier(classifier)
    data = ImageData(root=str(image_folder), num_workers=0)
    real = look_at_data(extractor, data, "train", SIZE, 1000)
    held_out = look_at_data(extractor, data, "val", SIZE, 1000)
    noise = torch.randint(0, 256, (39, 32, 32, 3), dtype=torch.uint8)
    drawn = Features(*extractor(noise))
    good, bad = compare_features(held_out, real), compare_features(drawn, real)
    assert good["distance"] < bad["distance"]
    assert good["precision"] > bad["precision"]


def write_run(folder, images, classes, names=None):
    (folder / "parts").mkdir(parents=True)
    for start in range(0, len(images), 3):
        part = images[start : start + 3]
        np.save(folder / "parts" / f"{start:09}-{start + len(part):09}.npy", part)
    (folder / "sampling.json").write_text(json.dumps({"classes": classes, "class_names": names}))


def test_samples_are_read_with_their_classes(classifier, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    write_run(tmp_path / "run", images, [2, 0], names=["left-out", "müller straße", "zebra"])
    write_run(tmp_path / "nameless", images, [2, 0])
    np.savez(tmp_path / "a.npz", arr_0=images)
    extractor = SmallClassifier(classifier)
    of_run = look_at_samples(extractor, tmp_path / "run", 7)
    assert of_run.classes.tolist() == [2, 0, 2, 0, 2, 0, 2]
    write_run(tmp_path / "other", images, [2, 0], names=["cat", "dog", "cow"])
    assert look_at_samples(extractor, tmp_path / "other").classes is None  # other classes than the network's
    assert look_at_samples(extractor, tmp_path / "nameless").classes is None
    of_npz = look_at_samples(extractor, tmp_path / "a.npz")
    assert of_npz.classes is None
    torch.testing.assert_close(of_npz.features[:7], of_run.features)
    gray = images[..., :1]
    assert torch.equal(extractor(torch.from_numpy(gray))[0], extractor(torch.from_numpy(gray.repeat(3, -1)))[0])


def test_unreadable_real_images(classifier, image_folder, tmp_path):
    damaged = shutil.copytree(image_folder, tmp_path / "damaged")
    for number in range(24):
        (damaged / "train" / "zebra" / f"{number:03}.png").write_bytes(b"no image")
    extractor = SmallClassifier(classifier)
    data = ImageData(root=str(damaged), num_workers=0, eval_batch_size=8)
    with pytest.raises(ValueError, match="cannot read image"):
        look_at_data(extractor, data, "train", SIZE, 100)
    data = ImageData(root=str(damaged), num_workers=0, eval_batch_size=8, skip_bad_images=True)
    with pytest.warns(UserWarning, match="left out: cannot read image"):
        assert len(look_at_data(extractor, data, "train", SIZE, 100).features) == 48


def test_bad_samples(tmp_path):
    write_run(tmp_path / "run", np.zeros((9, 4, 4, 3), np.uint8), [0])
    with pytest.raises(ValueError, match=r"number must be at least 4 and at most 9, got 10"):
        look_at_samples(Inception, tmp_path / "run", 10)
    (tmp_path / "run" / "parts" / "000000003-000000006.npy").unlink()
    with pytest.raises(ValueError, match="have gaps"):
        open_samples(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no samples in"):
        open_samples(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"neither a folder of `hcvision sample` nor a \.npz"):
        open_samples(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match=r"is no \.npz with arr_0"):
            open_samples(tmp_path / name)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"must be \(N, H, W, C\) uint8, got \(2, 4, 4, 3\) float64"):
        open_samples(tmp_path / "floats.npz")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception with random weights, in a file as torch-fidelity's own."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(net.state_dict(), path)
    return path


def test_inception_from_a_file(inception_file):
    extractor = Inception(str(inception_file))
    assert (extractor.distance, extractor.score) == ("FID", "IS")
    images = torch.randint(0, 256, (2, 28, 28, 1), dtype=torch.uint8)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    rgb = images.permute(0, 3, 1, 2).expand(2, 3, 28, 28)
    assert torch.equal(features, extractor.net(rgb)[0])


def test_inception_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no file none.pth with Inception's weights"):
        Inception("none.pth")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of Inception"):
        Inception(str(tmp_path / "other.pth"))

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"no weights of Inception \(no route to host\); --inception names a file"):
        Inception()


class Payload:
    def __reduce__(self):
        return (open, ("payload-ran", "w"))


def test_weights_of_inception_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="is no checkpoint, or a damaged one"):
        Inception(str(tmp_path / "evil.pth"))
    torch.save(Payload(), tmp_path / "evil2.pth")
    with pytest.raises(ValueError, match="is no checkpoint, or a damaged one"):
        Inception(str(tmp_path / "evil2.pth"))
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    "what", ["an object", "a pickle", "a .npy", "nothing", "a text", "half", "floats", "two channels"]
)
def test_files_of_samples_run_nothing(tmp_path, what):
    """What is no .npz of images ends in one line; no pickle in it is read."""

    class Payload:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "it_ran", "it ran"))

    path, images = tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images)
    if what == "an object":
        np.savez(path, allow_pickle=True, arr_0=np.array([Payload()], dtype=object))
    elif what == "a .npy":
        with path.open("wb") as file:
            np.save(file, images)
    elif what == "a text":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("arr_0", "text")
    elif what in ("floats", "two channels"):
        np.savez(path, arr_0=images / 2 if what == "floats" else images[..., :2])
    else:
        whole = path.read_bytes()
        path.write_bytes({"a pickle": pickle.dumps(Payload()), "nothing": b"", "half": whole[: len(whole) // 2]}[what])
    with pytest.raises(ValueError, match=r"a\.npz (is no .npz with arr_0: |must be .* uint8, got )"):
        open_samples(path)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_too_few_to_score(number, tmp_path):
    """Precision and recall look at the third neighbour: fewer than four images, drawn or real, are said to be few."""
    images = np.zeros((number, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "few.npz", arr_0=images)
    with pytest.raises(ValueError, match=f"there are {number} samples in .*few.npz; scores need at least 4"):
        count_samples(tmp_path / "few.npz")
    with pytest.raises(ValueError, match=f"scores need at least 4 real train images, got {number}"):
        look(lambda x: (x, x), torch.from_numpy(images).split(2), number, "real train images")


def test_one_class(tmp_path, image_folder):
    """A classifier of one class tells nothing apart; Inception can score it."""
    for split in ("train", "val"):
        shutil.copytree(image_folder / split / "zebra", tmp_path / "one" / split / "zebra")
    with pytest.raises(ValueError, match="needs two classes or more to tell apart, the data have one; --inception"):
        train_classifier(tmp_path / "c", {"root": str(tmp_path / "one"), "num_workers": 0}, SIZE)
