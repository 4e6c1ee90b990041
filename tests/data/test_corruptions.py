"""Corruptions against their definitions: values by hand, statistics of the noise, the same image always the same."""

import math

import numpy as np
import pytest
from conftest import draw
from PIL import Image

from hcvision.data.corruptions import (
    CORRUPTIONS,
    Corrupt,
    filter_pixels,
    make_disk,
    make_plasma,
    scatter,
    smear,
    zoom,
)
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
    mild = 1
    if name == "elastic_transform":  # of which 1 and 2 bend the whole image, and 3 to 5 ripple it
        mild, image = 3, image.resize((8, 8)).resize((64, 64), Image.Resampling.BILINEAR)
    distance = [np.abs(values(Corrupt(name, s)(image)) - values(image)).mean() for s in (mild, 5)]
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


@pytest.mark.parametrize("reach", [1, 3])
def test_scattered_pixels(reach):
    """One after another from the last one, each takes what one near it has by then; the edges stay."""
    x = np.arange(99.0).reshape(9, 11, 1)
    rows, columns = range(9 - reach, reach, -1), range(11 - reach, reach, -1)
    offsets = generator().integers(-reach, reach, (len(rows), len(columns), 2))
    expected = x.copy()
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            right, down = offsets[i, j]
            expected[row, column] = expected[row + down, column + right]
    np.testing.assert_array_equal(scatter(x, reach, generator()), expected)
    assert scatter(x, 5, generator()) is x  # nothing is far enough from the edges
    assert CORRUPTIONS["glass_blur"][0](np.full((20, 20, 3), 0.5), (1, 2, 1), generator()).max() == pytest.approx(
        127 / 255
    )


def test_zoom_by_hand():
    """The middle two of four, linear between them; on either side of each axis; the mean with the image itself."""
    x = (np.arange(4.0)[:, None] + 10 * np.arange(6.0))[..., None]
    large = zoom(x, 2)[..., 0]
    np.testing.assert_allclose(large[:, 0], [11, 11 + 1 / 3, 11 + 2 / 3, 12], atol=1e-12)
    np.testing.assert_allclose(large[0], [11, 15, 19, 23, 27, 31], atol=1e-12)  # columns 1 to 3
    blurred = CORRUPTIONS["zoom_blur"][0](x, (3, 1), generator())  # factors 1 and 2
    np.testing.assert_allclose(blurred[..., 0], (2 * x[..., 0] + large) / 3, atol=1e-12)
    assert [len(np.arange(1, end, step)) for end, step in CORRUPTIONS["zoom_blur"][1]] == [12, 16, 11, 13, 11]


def test_plasma_by_hand():
    """Of four points: the middle, and two that are means of the middle and the corner, both met twice."""
    u, v, w = generator().uniform(-1, 1, 3)
    points = np.array([[0, u / 2 + v], [u / 2 + w, u]])
    points -= points.min()
    np.testing.assert_allclose(make_plasma(2, 2.0, generator()), points / points.max(), atol=1e-12)
    rough, smooth = (make_plasma(64, decay, generator()) for decay in (1.2, 2.0))
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()
    assert np.abs(smooth[:, 0] - smooth[:, -1]).max() < 0.3  # a torus


def test_plasma_beside_a_transcription():
    """Point by point: squares, then diamonds, then half of the step and a quarter of the noise."""
    size, decay = 8, 2.0
    draws, heights, step, strength = generator(), np.zeros((8, 8)), 8, 1.0
    while step > 1:
        half, places = step // 2, range(0, size, step)
        number = len(places)
        noises = [draws.uniform(-strength, strength, (number, number)) for _ in range(3)]
        for i in places:
            for j in places:
                four = [heights[(i + a) % size, (j + b) % size] for a in (0, step) for b in (0, step)]
                heights[i + half, j + half] = sum(four) / 4 + noises[0][i // step, j // step]
        for i in places:
            for j in places:
                for (r, c), noise in (((i, j + half), noises[1]), ((i + half, j), noises[2])):
                    near = ((r + half, c), (r - half, c), (r, c + half), (r, c - half))
                    mean = sum(heights[a % size, b % size] for a, b in near) / 4
                    heights[r, c] = mean + noise[i // step, j // step]
        step, strength = half, strength / decay**2
    heights -= heights.min()
    np.testing.assert_allclose(make_plasma(size, decay, generator()), heights / heights.max(), atol=1e-12)


def test_fog_by_hand():
    """(x + 1.5 plasma) * max / (max + 1.5): what is white stays white where the fog is thickest."""
    x = generator().random((20, 24, 3)) / 2
    plasma = make_plasma(256, 2, generator())[:20, :24, None]
    expected = (x + 1.5 * plasma) * x.max() / (x.max() + 1.5)
    np.testing.assert_allclose(CORRUPTIONS["fog"][0](x, (1.5, 2), generator()), expected, atol=1e-12)


def test_snow_by_hand():
    """0.8 of a colour and 0.2 of its gray times 1.5 plus 0.5; flakes are added, and the same ones turned round."""
    fall = (0.1, 0.3, 3, 0.5, 10, 4, 0.8)
    clear = (*fall[:3], 99, *fall[4:])  # no flake is so bright
    x = np.tile(np.array([0.4, 0.2, 0.1]), (6, 8, 1))
    gray = 0.299 * 0.4 + 0.587 * 0.2 + 0.114 * 0.1
    whitened = 0.8 * x + 0.2 * (1.5 * gray + 0.5)
    np.testing.assert_allclose(CORRUPTIONS["snow"][0](x, clear, generator()), whitened, atol=1e-12)
    flakes = CORRUPTIONS["snow"][0](np.zeros((64, 48, 3)), fall, generator()) - 0.1
    np.testing.assert_allclose(flakes, flakes[::-1, ::-1], atol=1e-12)
    assert flakes.min() >= -1e-12
    draws = generator()
    noise = zoom(draws.normal(0.1, 0.3, (64, 48, 1)), 3)
    kept = np.floor(255 * np.where(noise < 0.5, 0, noise).clip(0, 1)) / 255
    angle = math.radians(draws.uniform(-135, -45))  # upwards from each pixel: what is there falls onto it
    fallen = smear(kept, np.exp(-(np.arange(21) ** 2) / 32), angle)
    np.testing.assert_allclose(flakes, np.tile(fallen + fallen[::-1, ::-1], 3), atol=1e-12)


class Fixed:
    """A generator whose numbers are known."""

    def __init__(self, *numbers):
        self.numbers = [*numbers]

    def uniform(self, low, high, shape):
        return np.full(shape, self.numbers.pop(0))


def test_elastic_by_hand():
    """Three points moved by 2 rows and columns move all; offsets of 0.5 * 4 take what is 2 away; edges are mirrored."""
    x = generator().random((20, 30, 3))
    elastic = CORRUPTIONS["elastic_transform"][0]
    moved = elastic(x, (0.0, 1.0, 9.0), Fixed(2.0, 0.0))
    np.testing.assert_allclose(moved[2:, 2:], x[:-2, :-2], atol=1e-9)
    np.testing.assert_allclose(moved[0, 2:], x[2, :-2], atol=1e-9)  # the edge itself once
    taken = elastic(x, (4.0, 1.0, 0.0), Fixed(0.0, 0.5))
    np.testing.assert_allclose(taken[:-2, :-2], x[2:, 2:], atol=1e-9)
    np.testing.assert_allclose(taken[-1, :-2], x[-2, 2:], atol=1e-9)  # the edge itself twice


def test_elastic_moves_three_points():
    """A ramp is what it was, there: at the middle plus or minus a third of the image."""
    ramp = (np.arange(60.0)[:, None] + 100 * np.arange(60.0))[..., None]
    corners = np.array([[50, 50], [10, 50], [10, 10]])
    shifts = np.array([[1.0, -2.0], [3.0, 0.0], [-1.0, 2.0]])

    class Three(Fixed):
        def uniform(self, low, high, shape):
            return shifts if shape == (3, 2) else np.zeros(shape)

    moved = CORRUPTIONS["elastic_transform"][0](ramp, (0.0, 1.0, 3.0), Three())
    for corner, shift in zip(corners, shifts.astype(int), strict=True):
        assert moved[tuple(corner + shift)].item() == pytest.approx(ramp[tuple(corner)].item(), abs=1e-9)


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
        ("frost", 3, "frost needs ImageNet-C's photographs of frost, which are not here; there are gaussian_noise, "),
        ("jpeg", 6, "severity must be at least 1 and at most 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageData(root=str(image_folder), corruption=corruption, severity=severity)
