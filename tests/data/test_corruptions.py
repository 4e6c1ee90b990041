"""Corruptions against their definitions: values by hand, statistics of the noise, the same image always the same."""

import math

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from hcvision.data.corruptions import CORRUPTIONS, Corrupt, filter_pixels, make_disk, smear
from hcvision.data.module import ImageData

GRAY = Image.new("RGB", (64, 64), (128, 128, 128))


def values(image):
    return np.asarray(image).astype(float) / 255


def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [1, 5])
def test_every_corruption(name, severity):
    """It changes an image, to one of the same size and mode, the same one each time; more severely is farther away."""
    image = draw(1, 3)
    once, again = Corrupt(name, severity)(image), Corrupt(name, severity)(image)
    assert (once.size, once.mode) == (image.size, image.mode)
    assert once.tobytes() == again.tobytes()
    distance = [np.abs(values(Corrupt(name, s)(image)) - values(image)).mean() for s in (1, 5)]
    assert 0 < distance[0] < distance[1]


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_channels(name, mode):
    """Gray images stay gray, and transparency stays as it is."""
    image = draw(0, 1).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    corrupted = Corrupt(name)(image)
    assert corrupted.mode == mode
    if mode == "RGBA":
        assert corrupted.getchannel("A").getextrema() == (77, 77)


def test_noise():
    """Its standard deviation, that of photons, and the share of pixels that are black and white."""
    noisy = values(Corrupt("gaussian_noise", 1)(GRAY)) - 128 / 255
    assert abs(noisy.mean()) < 3 * 0.08 / math.sqrt(noisy.size)
    assert noisy.std() == pytest.approx(0.08, rel=0.03)
    photons = values(Corrupt("shot_noise", 2)(GRAY))
    assert photons.std() == pytest.approx(math.sqrt(128 / 255 / 25), rel=0.03)
    assert np.abs(photons * 25 - np.rint(photons * 25)).max() < 25 / 255  # whole numbers of photons
    impulses = values(Corrupt("impulse_noise", 5)(GRAY))
    assert (impulses == 0).mean() == pytest.approx(0.135, rel=0.1)
    assert (impulses == 1).mean() == pytest.approx(0.135, rel=0.1)
    assert len(np.unique(impulses)) == 3
    other = Corrupt("gaussian_noise", 1, seed=1)(GRAY)
    assert other.tobytes() != Corrupt("gaussian_noise", 1)(GRAY).tobytes()


def test_colours_by_hand():
    """Value 0.4 + 0.2 at the same hue and saturation; 0.4 of the difference from the mean of a channel."""
    pixels = np.array([[[0.4, 0.2, 0.1], [0.0, 0.0, 0.0], [0.9, 0.45, 0.9]]])
    brighter = CORRUPTIONS["brightness"][0](pixels, 0.2, generator())
    np.testing.assert_allclose(brighter, [[[0.6, 0.3, 0.15], [0.2, 0.2, 0.2], [1.0, 0.5, 1.0]]], atol=1e-12)
    flat = CORRUPTIONS["contrast"][0](np.array([[[0.0, 1.0], [1.0, 0.5]]]), 0.4, generator())
    np.testing.assert_allclose(flat, [[[0.3, 0.85], [0.7, 0.65]]], atol=1e-12)


def test_pixelate_by_hand():
    """Four pixels become their mean."""
    pixels = 4 * np.arange(16.0).reshape(4, 4, 1) / 255
    blocks = CORRUPTIONS["pixelate"][0](pixels, 0.5, generator())
    means = pixels.reshape(2, 2, 2, 2).mean((1, 3))
    np.testing.assert_allclose(blocks[..., 0], means.repeat(2, 0).repeat(2, 1), atol=1e-12)


def test_motion_by_hand():
    """A pixel takes of those right of it, or below: so a white one is smeared to the left, or upwards."""
    pixels = np.zeros((5, 5, 1))
    pixels[2, 2] = 1
    row = smear(pixels, np.array([4.0, 2.0, 1.0]), 0.0)[..., 0]
    np.testing.assert_allclose(row[2], [1 / 7, 2 / 7, 4 / 7, 0, 0], atol=1e-12)
    assert row.sum() == pytest.approx(1)
    down = smear(pixels, np.array([4.0, 2.0, 1.0]), math.pi / 2)[..., 0]
    np.testing.assert_allclose(down[:, 2], [1 / 7, 2 / 7, 4 / 7, 0, 0], atol=1e-12)
    np.testing.assert_allclose(smear(np.ones((4, 6, 2)), np.ones(9), 0.5), 1, atol=1e-12)


@pytest.mark.parametrize(("radius", "sigma"), CORRUPTIONS["defocus_blur"][1])
def test_disk(radius, sigma):
    """It sums to 1, is the same from all sides, flat inside and nothing outside."""
    disk = make_disk(radius, sigma)
    assert disk.sum() == pytest.approx(1)
    np.testing.assert_allclose(disk, disk.T, atol=1e-12)
    np.testing.assert_allclose(disk, disk[::-1], atol=1e-12)
    middle = len(disk) // 2
    count = sum(x * x + y * y <= radius**2 for x in range(-radius, radius + 1) for y in range(-radius, radius + 1))
    assert disk[middle, middle] == pytest.approx(1 / count, rel=0.05)
    pixels = np.random.default_rng(0).random((12, 12, 3))
    assert filter_pixels(pixels, disk).mean() == pytest.approx(pixels.mean(), rel=0.05)
    np.testing.assert_allclose(filter_pixels(np.ones((12, 12, 3)), disk), 1, atol=1e-12)


def test_filter_by_hand():
    """Weights right of and below the middle are for the pixels right of and below; beyond an edge is its mirror."""
    x = np.arange(12.0).reshape(3, 4, 1)
    kernel = np.zeros((3, 3))
    kernel[1, 2], kernel[2, 1] = 0.75, 0.25
    expected = [[0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 5, 0.75 * 3 + 0.25 * 6, 0.75 * 2 + 0.25 * 7]]
    expected += [[0.75 * 5 + 0.25 * 8, 0.75 * 6 + 0.25 * 9, 0.75 * 7 + 0.25 * 10, 0.75 * 6 + 0.25 * 11]]
    expected += [[0.75 * 9 + 0.25 * 4, 0.75 * 10 + 0.25 * 5, 0.75 * 11 + 0.25 * 6, 0.75 * 10 + 0.25 * 7]]
    np.testing.assert_allclose(filter_pixels(x, kernel)[..., 0], expected, atol=1e-12)


def test_jpeg():
    """Of the quality that is asked: what Pillow itself writes and reads."""
    import io

    image, file = draw(2, 2), io.BytesIO()
    image.save(file, "JPEG", quality=7)
    assert Corrupt("jpeg", 5)(image).tobytes() == Image.open(file).tobytes()


def test_images_to_evaluate_are_corrupted(image_folder):
    """Behind resize and crop, before they are normalized; those for training are not."""
    plain = ImageData(root=str(image_folder), batch_size=8, num_workers=0, img_size=32, crop_pct=1.0, no_aug=True)
    dark = plain.corrupted("contrast", 5)
    other = ImageData(
        root=str(image_folder),
        batch_size=8,
        num_workers=0,
        img_size=32,
        crop_pct=1.0,
        corruption="contrast",
        severity=5,
    )
    clean, first, second = (next(iter(data.val_dataloader())).images for data in (plain, dark, other))
    mean = (clean + 1).mean((2, 3), keepdim=True) / 2
    expected = ((clean + 1) / 2 - mean) * 0.05 + mean
    assert ((first + 1) / 2 - expected).abs().max() <= 0.5 / 255 + 1e-5
    assert first.equal(second)
    trained = [next(iter(data.train_dataloader())).images for data in (plain, dark)]
    assert trained[0].equal(trained[1])
    assert (plain.variant, dark.variant) == ("", "contrast-5")


def test_wrong_corruptions(image_folder):
    for corruption, severity, message in (
        ("gausian_noise", 3, "unknown corruption 'gausian_noise'; did you mean gaussian_noise"),
        ("jpeg", 6, "severity must be at least 1 and at most 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageData(root=str(image_folder), corruption=corruption, severity=severity)
