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

from hcvision.data.arguments import check_name, check_number

SEVERITIES = 5
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
}


class Corrupt:
    """A transform of images of 8 bits a channel, (PIL image) -> PIL image; transparency stays as it is.

    Args:
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the noise, together with the image: the same image is the same whenever it is read.

    Raises:
        ValueError: an unknown corruption, with the nearest names, or severity.
    """

    def __init__(self, name: str, severity: int = 3, seed: int = 0):
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
