"""Corruptions of images, with the constants of ImageNet-C (Hendrycks & Dietterich, 2019, arXiv 1903.12261), section 3.

They are made of the pixels that the model would see, resized and cropped, with noise that follows from the seed and
the image alone. ImageNet-C's own files were made of 224 x 224 pixels and stored as JPEG, with other random numbers and
libraries: scores are comparable among models that are tested here, and not the same as on the published files. The
constants are for images of 224 pixels; blurs are in pixels whatever the size.
"""

import io
import math
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from hcvision.data.arguments import check_name, check_number

SEVERITIES = 5
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue
Pixels = Any  # an array (H, W, C) of floats, 0 to 1


def gaussian_noise(x: Pixels, scale: float, generator: np.random.Generator) -> Pixels:
    """``x + n``, n normal with this standard deviation."""
    return x + generator.normal(scale=scale, size=x.shape)


def shot_noise(x: Pixels, photons: float, generator: np.random.Generator) -> Pixels:
    """Poisson's noise of so many photons in a white pixel."""
    return generator.poisson(x * photons) / photons


def impulse_noise(x: Pixels, share: float, generator: np.random.Generator) -> Pixels:
    """This share of the values of pixels is 0 or 1, either as often as the other."""
    drawn = generator.random(x.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, x))


def defocus_blur(x: Pixels, disk: tuple[int, float], generator: np.random.Generator) -> Pixels:
    """The mean over a disk of this radius in pixels, whose edge is smoothed by a Gaussian of this width."""
    return filter_pixels(x, make_disk(*disk))


def motion_blur(x: Pixels, blur: tuple[int, float], generator: np.random.Generator) -> Pixels:
    """The mean over 2 * radius + 1 pixels along a line within 45 degrees of the horizontal, by half a Gaussian."""
    radius, sigma = blur
    angle = math.radians(generator.uniform(-45, 45))
    return smear(x, np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2)), angle)


def brightness(x: Pixels, more: float, generator: np.random.Generator) -> Pixels:
    """The value (of hue, saturation, value) is larger by so much, at most 1; hue and saturation stay."""
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + more, 1.0)
    return np.where(value > 0, x / np.where(value > 0, value, 1.0), 1.0) * brighter


def contrast(x: Pixels, factor: float, generator: np.random.Generator) -> Pixels:
    """Every channel's difference from its mean, times a factor."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def jpeg(x: Pixels, quality: int, generator: np.random.Generator) -> Pixels:
    """Stored as a JPEG of this quality."""
    file = io.BytesIO()
    to_image(x).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return to_pixels(image)


def pixelate(x: Pixels, share: float, generator: np.random.Generator) -> Pixels:
    """Averaged to this share of the width and height, and back."""
    image = to_image(x)
    small = image.resize((max(int(image.width * share), 1), max(int(image.height * share), 1)), Image.Resampling.BOX)
    return to_pixels(small.resize(image.size, Image.Resampling.BOX))


def glass_blur(x: Pixels, glass: tuple[float, int, int], generator: np.random.Generator) -> Pixels:
    """Blurred by a Gaussian of this width, pixels replaced by ones near them (reach, times), blurred once more."""
    sigma, reach, times = glass
    x = np.floor(blur(x, sigma) * 255) / 255  # 8 bits
    for _ in range(times):
        x = scatter(x, reach, generator)
    return blur(x, sigma)


def zoom_blur(x: Pixels, factors: tuple[float, float], generator: np.random.Generator) -> Pixels:
    """The mean of the image and of what it is zoomed by factors from 1 to below an end, with a step between them."""
    end, step = factors
    zoomed = [zoom(x, factor) for factor in np.arange(1, end, step)]
    return (x + sum(zoomed)) / (len(zoomed) + 1)


def snow(x: Pixels, fall: tuple[float, ...], generator: np.random.Generator) -> Pixels:
    """Flakes (normal noise, enlarged, those above a threshold, smeared downwards), twice, on a whitened image."""
    mean, scale, factor, threshold, radius, sigma, share = fall
    flakes = zoom(generator.normal(mean, scale, (*x.shape[:2], 1)), factor)
    flakes = np.floor(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255) / 255  # 8 bits
    weights = np.exp(-(np.arange(2 * int(radius) + 1) ** 2) / (2 * sigma**2))
    flakes = smear(flakes, weights, math.radians(generator.uniform(-135, -45)))
    gray = x @ np.array(LUMA)[:, None] if x.shape[2] == 3 else x
    whitened = share * x + (1 - share) * np.maximum(x, 1.5 * gray + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def fog(x: Pixels, thick: tuple[float, float], generator: np.random.Generator) -> Pixels:
    """Plasma of heights 0 to this one is added, and the whole is darkened so that its maximum stays."""
    height, decay = thick
    size = 1 << max(8, (max(x.shape[:2]) - 1).bit_length())
    plasma = make_plasma(size, decay, generator)[: x.shape[0], : x.shape[1], None]
    return (x + height * plasma) * x.max() / (x.max() + height)


def elastic_transform(x: Pixels, stretch: tuple[float, float, float], generator: np.random.Generator) -> Pixels:
    """Sheared by moving three points, and every pixel taken from near it, smoothly over the image.

    How far away is ``strength`` times uniform noise between -1 and 1 that is blurred by a Gaussian of this width.
    """
    strength, sigma, shift = stretch
    height, width = x.shape[:2]
    center, reach = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = center + reach * np.array([[1, 1], [-1, 1], [-1, -1]])  # rows and columns of three points
    moved = corners + generator.uniform(-shift, shift, corners.shape)
    back = np.linalg.solve(np.c_[moved, np.ones(3)], corners)  # where a point of the new image is from: (3, 2)
    places = np.moveaxis(np.indices((height, width)), 0, -1)  # (H, W, 2)
    x = sample(x, places @ back[:2] + back[2], "mirror")
    noise = generator.uniform(-1, 1, (2, height, width))
    offsets = [strength * ndimage.gaussian_filter(one, sigma, mode="reflect", truncate=3) for one in noise]
    return sample(x, places + np.stack(offsets, axis=-1), "reflect")


CORRUPTIONS: dict[str, tuple[Callable[..., Pixels], tuple[Any, ...]]] = {  # with a constant for each severity
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "elastic_transform": (
        elastic_transform,
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
}  # new ones at the end: the noise of those before stays
ABSENT = "frost"  # of ImageNet-C's fifteen


class Corrupt:
    """A transform of images of 8 bits a channel, (PIL image) -> PIL image; transparency stays as it is.

    Args:
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the noise, together with the image: the same image is the same whenever it is read.

    Raises:
        ValueError: an unknown corruption, with the nearest names, or severity; frost, which is made of photographs.
    """

    def __init__(self, name: str, severity: int = 3, seed: int = 0):
        if name == ABSENT:
            others = ", ".join(CORRUPTIONS)
            raise ValueError(f"frost needs ImageNet-C's photographs of frost, which are not here; there are {others}")
        check_name("corruption", name, CORRUPTIONS)
        check_number("severity", severity, 1, SEVERITIES, whole=True)
        self.corruption, constants = CORRUPTIONS[name]
        self.constant, self.place = constants[severity - 1], (seed, [*CORRUPTIONS].index(name), severity)

    def __call__(self, image: Image.Image) -> Image.Image:
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = image.convert("RGB") if alpha else image
        generator = np.random.default_rng((*self.place, zlib.crc32(image.tobytes())))
        corrupted = to_image(self.corruption(to_pixels(image), self.constant, generator))
        if alpha is not None:
            corrupted.putalpha(alpha)
        return corrupted


def to_pixels(image: Image.Image) -> Pixels:
    """An image as an array (H, W, C) of floats from 0 to 1."""
    pixels = np.asarray(image).astype(np.float64) / 255
    return pixels[..., None] if pixels.ndim == 2 else pixels


def to_image(pixels: Pixels) -> Image.Image:
    """An array (H, W, C) as an image of 8 bits a channel, values rounded and those below 0 and above 1 cut off."""
    values = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


@cache
def make_disk(radius: int, sigma: float) -> Any:
    """A disk of pixels within this radius, smoothed by a Gaussian of 3 x 3 pixels (5 x 5 above 8): (D, D), sum 1."""
    size = max(radius, 8)
    axis = np.arange(-size, size + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    half = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    gauss = np.exp(-(half**2) / (2 * sigma**2))
    smooth = filter_pixels(disk[..., None], np.outer(gauss, gauss) / gauss.sum() ** 2)[..., 0]
    return smooth / smooth.sum()


def filter_pixels(x: Pixels, kernel: Any) -> Pixels:
    """The mean of the pixels around each one by the weights of a kernel (D, D), D odd; beyond an edge is its mirror.

    By Fourier transforms: a kernel of 21 x 21 would be 441 passes.
    """
    pad = len(kernel) // 2
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    size = padded.shape[:2]
    weights = np.fft.rfft2(kernel[::-1, ::-1], s=size)[..., None]
    return np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * weights, s=size, axes=(0, 1))[2 * pad :, 2 * pad :]


def smear(x: Pixels, weights: Any, angle: float) -> Pixels:
    """The mean of the pixels along a line that begins at each one, by weights; beyond an edge is its last pixel.

    Args:
        x: (H, W, C).
        weights: of the pixels along the line.
        angle: of the line, radians; 0 is to the right, and a positive one goes down.
    """
    height, width = x.shape[:2]
    reach = len(weights) - 1
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = np.zeros_like(x)
    for distance, weight in enumerate(weights / weights.sum()):
        right, down = (math.floor(distance * part + 0.5) for part in (math.cos(angle), math.sin(angle)))
        top, left = reach + down, reach + right
        total += weight * padded[top : top + height, left : left + width]
    return total


def blur(x: Pixels, sigma: float) -> Pixels:
    """Blurred by a Gaussian of four standard deviations; beyond an edge is its last pixel."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def scatter(x: Pixels, reach: int, generator: np.random.Generator) -> Pixels:
    """Each pixel, from the last one to the first, takes the value that one near it has then.

    That one is ``-reach`` to ``reach - 1`` rows and columns away, and may have taken another's value before: ImageNet-C
    means to swap the two, and its assignment of views of an array copies the one. Pixels at the edges stay.
    """
    height, width = x.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    if not len(rows) or not len(columns):
        return x
    offsets = generator.integers(-reach, reach, (len(rows), len(columns), 2))
    own = rows[:, None] * width + columns
    near = own + offsets[..., 1] * width + offsets[..., 0]
    source = np.arange(height * width)  # whose value a pixel has in the end
    source[own] = near
    done = np.zeros(height * width, dtype=bool)
    done[own] = True
    follows = done & done[source] & (source > np.arange(height * width))  # that one has taken another's value before
    while follows.any():
        source, follows = np.where(follows, source[source], source), follows & follows[source]
    return x.reshape(height * width, -1)[source].reshape(x.shape)


def zoom(x: Pixels, factor: float) -> Pixels:
    """The middle of an image, enlarged to its size by linear interpolation."""
    parts = []
    for size in x.shape[:2]:
        kept = math.ceil(size / factor)
        parts.append(slice((size - kept) // 2, (size - kept) // 2 + kept))
    large = ndimage.zoom(x[tuple(parts)], (factor, factor, 1), order=1)
    top, left = ((large.shape[axis] - x.shape[axis]) // 2 for axis in (0, 1))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def make_plasma(size: int, decay: float, generator: np.random.Generator) -> Any:
    """Heights from 0 to 1 by midpoints on a torus ("diamond-square"): (size, size), size a power of two.

    A point in the middle of four is their mean and uniform noise, whose strength falls by ``decay`` squared whenever
    the distance is halved.
    """
    heights, step, strength = np.zeros((size, size)), size, 1.0

    def wobble(sums: Any) -> Any:
        return sums / 4 + generator.uniform(-strength, strength, sums.shape)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        middles = wobble(pairs + np.roll(pairs, -1, 1))
        heights[half::step, half::step] = middles
        above = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = wobble(above)
        beside = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = wobble(beside)
        step, strength = half, strength / decay**2
    heights -= heights.min()
    return heights / heights.max()


def sample(x: Pixels, places: Any, mode: str) -> Pixels:
    """Values of an image (H, W, C) at rows and columns (H, W, 2), linear between pixels; ``mode`` is scipy's."""
    at = np.moveaxis(places, -1, 0)
    return np.stack([ndimage.map_coordinates(one, at, order=1, mode=mode) for one in np.moveaxis(x, -1, 0)], axis=-1)
