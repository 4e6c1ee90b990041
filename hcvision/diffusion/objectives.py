"""Diffusion for DiT: objectives with one interface, their samplers, and classifier-free guidance.

``DDPM`` predicts the noise of 1000 linear steps and its variance (arXiv 2102.09672, as DiT trains);
``LinearPath`` the velocity from noise to data (arXiv 2401.08740, SiT), ``ImagePath`` the image on the same path (arXiv
2511.13720, JiT). All have::

    diffusion.loss(model, x, y)                     # (B,), to average and to minimise
    diffusion.sample(model, noise, steps, sampler)  # noise to images

A model takes (x, t, y) and predicts C channels, or 2 C with ``learn_sigma``. Letters in shapes: B batch, C channels,
H height, W width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcvision.diffusion.solvers import SOLVERS, check_solver, solve

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def guide(
    model: Model,
    y: Tensor,
    null: int,
    scale: float,
    channels: int | None = 3,
    interval: Sequence[float] | None = None,
    place: Callable[[Tensor], Tensor] = lambda t: t,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598), at all times or in an interval of them (arXiv 2404.07724).

    Args:
        model: (x, t, y) -> (B, C or 2 C, H, W).
        y: the classes wanted, (B,).
        null: the class that stands for none.
        scale: 1 is no guidance, and costs one evaluation of the model; else it is two.
        channels: how many of the first channels are guided: 3, as the published DiT numbers are, or None for
            all C, without the variance.
        interval: guide where the place of t is in it, both ends included; None guides everywhere. Elsewhere the model
            is evaluated once.
        place: t (B,) to how far it is from noise (0) to the image (1), as the objective's ``place`` says.

    Returns:
        A function (x, t) -> prediction, without the class.

    Raises:
        ValueError: scale < 0 or channels < 1.
    """
    if scale < 0 or (channels is not None and channels < 1):
        raise ValueError(f"guidance needs scale >= 0 and channels >= 1, got {scale} and {channels}")
    if scale == 1:
        return lambda x, t: model(x, t, y)
    first, last = (-math.inf, math.inf) if interval is None else interval

    def guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (place(t) >= first) & (place(t) <= last)
        if interval is not None and not inside.any():
            return model(x, t, y)
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
        wanted, anything = both.chunk(2)
        count = x.shape[1] if channels is None else min(channels, x.shape[1])
        moved = anything[:, :count] + scale * (wanted[:, :count] - anything[:, :count])
        if interval is not None:
            moved = torch.where(inside.view(-1, *[1] * (x.dim() - 1)), moved, wanted[:, :count])
        return torch.cat([moved, wanted[:, count:]], dim=1)

    return guided


class SeededNoise:
    """Standard normal noise of which row i depends on the seed and on ``numbers[i]`` alone, on any device.

    A function of x (B, ...) that draws noise of its shape, the next one with every call.
    """

    def __init__(self, seed: int, numbers: Iterable[int]):
        seeds = (np.random.SeedSequence((seed, int(number))).generate_state(1, np.uint64)[0] for number in numbers)
        self.generators = [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        rows = [torch.randn(x.shape[1:], dtype=torch.float32, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(x)


def expand(values: Tensor, x: Tensor) -> Tensor:
    """(B,) beside (B, C, H, W), in the dtype of x."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class DDPM:
    """Gaussian diffusion over T = 1000 steps, betas linear from 1e-4 to 0.02 (arXiv 2006.11239, 2102.09672).

    The model predicts the noise; with 2 C channels also the log-variance of each step, between that of
    the forward step and that of the posterior. Its loss is the squared error of the noise plus the variational
    bound, in bits per dimension, with the gradient of the bound going to the variance alone.

    Args:
        timesteps: T.
        clip: clamp the predicted image to [-1, 1] when sampling: for pixels, not for latents.
    """

    samplers = ("ddpm", "ddim", *SOLVERS)
    default_steps = 250

    def __init__(self, timesteps: int = 1000, clip: bool = False):
        if timesteps < 2:
            raise ValueError(f"timesteps must be at least 2, got {timesteps}")
        self.timesteps, self.clip = timesteps, clip
        betas = torch.linspace(1e-4 * 1000 / timesteps, 0.02 * 1000 / timesteps, timesteps, dtype=torch.float64)
        self.kept = (1 - betas).cumprod(0)  # alpha-bar: how much of the image's variance is left at t

    def place(self, t: Tensor) -> Tensor:
        """How far steps t (B,) are from noise (0) to the image (1): 1 - t / T."""
        return 1 - t / self.timesteps

    def count_evaluations(self, steps: int, sampler: str) -> int:
        """How often the model is evaluated for an image, without guidance: once a step."""
        return steps

    def add_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of images x (B, C, H, W) at steps t (B,)."""
        kept = self.kept.to(x.device)[t]
        return expand(kept.sqrt(), x) * x + expand((1 - kept).sqrt(), x) * noise

    def draw_time(self, count: int, device: Any, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(self.timesteps, (count,), device=device, generator=generator)

    def loss(self, model: Model, x: Tensor, y: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,), at times t and with noise, drawn if not given. x is (B, C, H, W), y is (B,)."""
        t = self.draw_time(len(x), x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        noisy = self.add_noise(x, t, noise)
        prediction = model(noisy, t, y).to(x.dtype)
        error = (prediction[:, : x.shape[1]] - noise).square().flatten(1).mean(1)
        if prediction.shape[1] == x.shape[1]:
            return error
        fixed_mean = torch.cat([prediction[:, : x.shape[1]].detach(), prediction[:, x.shape[1] :]], dim=1)
        return error + self.bound(x, noisy, t, fixed_mean)

    def bound(self, x: Tensor, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The term of the variational bound at t, in bits per dimension, (B,)."""
        kept = self.kept.to(x.device)
        before = torch.cat([kept.new_ones(1), kept])[t]
        mean, log_variance, _ = self.step(noisy, prediction, kept[t], before)
        true_mean, true_log_variance = self.posterior(x, noisy, kept[t], before)
        kl = 0.5 * (
            log_variance - true_log_variance - 1
            + (true_log_variance - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp()
        )  # fmt: skip
        nats = torch.where(expand(t, x) == 0, -discrete_log_likelihood(x, mean, 0.5 * log_variance), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def posterior(self, x: Tensor, noisy: Tensor, kept: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of x one step before, given the image; ``kept`` and ``before`` are (B,)."""
        beta = 1 - kept / before
        mean = expand(before.sqrt() * beta / (1 - kept), x) * x
        mean = mean + expand((kept / before).sqrt() * (1 - before) / (1 - kept), x) * noisy
        return mean, expand(self.log_posterior(kept, before), x)

    def log_posterior(self, kept: Tensor, before: Tensor) -> Tensor:
        """log of beta (1 - before) / (1 - kept); at the last step, where that is 0, the one before it, as published."""
        first, second = self.kept[0].to(kept.device), self.kept[1].to(kept.device)
        last = before == 1
        kept, before = torch.where(last, second, kept), torch.where(last, first, before)
        return ((1 - kept / before) * (1 - before) / (1 - kept)).log()

    def step(self, noisy: Tensor, prediction: Tensor, kept: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of x one step before, and the image, as the model sees them."""
        noise = prediction[:, : noisy.shape[1]]
        image = expand((1 / kept).sqrt(), noisy) * noisy - expand((1 / kept - 1).sqrt(), noisy) * noise
        if self.clip:
            image = image.clamp(-1, 1)
        mean, low = self.posterior(image, noisy, kept, before)
        if prediction.shape[1] == noisy.shape[1]:
            return mean, low, image
        fraction = (prediction[:, noisy.shape[1] :] + 1) / 2
        high = expand((1 - kept / before).log(), noisy)
        return mean, fraction * high + (1 - fraction) * low, image

    def check_steps(self, steps: int) -> None:
        """Raise ValueError when a sampler cannot take that many steps."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps must be between 1 and {self.timesteps}, got {steps}")

    def spaced(self, steps: int) -> list[int]:
        """The steps, of T, that a sampler with fewer of them visits, ascending, first and last included."""
        self.check_steps(steps)
        stride = (self.timesteps - 1) / max(steps - 1, 1)
        return [round(i * stride) for i in range(steps)]

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        steps: int = 250,
        sampler: str = "ddpm",
        draw: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Iterator[Tensor]:
        """From noise to images.

        Args:
            model: (x, t) -> prediction, as ``guide`` returns it.
            noise: (B, C, H, W).
            steps: evaluations of the model.
            sampler: ``ddpm``, which adds noise in every step; ``ddim``, which adds none (arXiv 2010.02502); or a
                solver of second order, ``dpm++`` or ``unipc``, which adds none either; see ``solve``.
            draw: a function of x that draws the noise of a step.

        Yields:
            The predicted image after every step; the last is the result.

        Raises:
            ValueError: an unknown sampler, steps out of range, or a solver without diffusers.
        """
        check_sampler(sampler, self.samplers)
        if sampler in SOLVERS:
            self.check_steps(steps)
            yield from solve(sampler, self.kept, model, noise, steps, self.clip)
            return
        x, times = noise, self.spaced(steps)
        for i in reversed(range(steps)):
            t = torch.full((len(x),), times[i], device=x.device)
            kept = self.kept[times[i]].to(x.device).expand(len(x))
            before = self.kept[times[i - 1]].to(x.device).expand(len(x)) if i else torch.ones_like(kept)
            prediction = model(x, t).to(x.dtype)
            mean, log_variance, image = self.step(x, prediction, kept, before)
            if sampler == "ddim":
                noise = (x - expand(kept.sqrt(), x) * image) / expand((1 - kept).sqrt(), x)
                x = expand(before.sqrt(), x) * image + expand((1 - before).sqrt(), x) * noise
            else:
                x = mean + (0.5 * log_variance).exp() * draw(x) if i else mean
            yield x if i == 0 else image


class LinearPath:
    """The straight path x_t = t * image + (1 - t) * noise, t from 0 to 1; the model predicts image - noise."""

    samplers = ("heun", "euler", "sde")
    default_steps = 50

    def __init__(self, clip: bool = False):
        self.clip = clip

    def place(self, t: Tensor) -> Tensor:
        """How far times t (B,) are from noise (0) to the image (1): t itself."""
        return t

    def count_evaluations(self, steps: int, sampler: str) -> int:
        """How often the model is evaluated for an image, without guidance: twice a step but the last by Heun."""
        return 2 * steps - 1 if sampler == "heun" else steps

    def check_steps(self, steps: int) -> None:
        """Raise ValueError when a sampler cannot take that many steps."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")

    def add_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of images x (B, C, H, W) at times t (B,)."""
        return expand(t, x) * x + (1 - expand(t, x)) * noise

    def draw_time(self, count: int, device: Any, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(count, device=device, dtype=torch.float32, generator=generator)

    def loss(self, model: Model, x: Tensor, y: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The loss of each image, (B,), at times t and with noise, drawn if not given. x is (B, C, H, W), y is (B,)."""
        t = self.draw_time(len(x), x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        between = self.add_noise(x, t, noise)
        prediction = model(between, t, y).to(x.dtype)[:, : x.shape[1]]
        return (self.find_velocity(prediction, between, t) - (x - noise)).square().flatten(1).mean(1)

    def find_velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity that the model's prediction means for x_t (B, C, H, W) at times t (B,)."""
        return prediction

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        steps: int = 50,
        sampler: str = "heun",
        draw: Callable[[Tensor], Tensor] = torch.randn_like,
        coefficient: str = "sigma",
        last_step: float = 0.04,
    ) -> Iterator[Tensor]:
        """From noise to images.

        ``euler`` and ``heun`` follow the velocity v, an ODE; Heun's method evaluates the model twice in all steps but
        the last. ``sde`` is Euler-Maruyama on the SDE with the same marginals (SiT, arXiv 2401.08740, eq. 4)::

            dx = (v + D * score) dt + sqrt(2 D) dW,    score = (t v - x) / (1 - t),    sigma = 1 - t

        of which D, the diffusion coefficient, is free: its steps are equal up to 1 - ``last_step``, and the last one
        goes to the predicted image x + (1 - t) v without noise, since the score grows without bound towards the image.

        Args:
            model: (x, t) -> prediction, as ``guide`` returns it.
            noise: (B, C, H, W).
            steps: of the method, the last one included.
            sampler: ``heun``, ``euler`` or ``sde``.
            draw: a function of x that draws the noise of a step.
            coefficient: D of ``sde``: ``constant`` is 1, ``sigma`` is 1 - t, ``path`` is (1 - t) / t, that of the
                forward process whose marginals the path has; there t is not less than two steps, or steps of such a
                size would leave the marginals.
            last_step: its size in ``sde``; 0.04 as published.

        Yields:
            The predicted image after every step; the last is the result.

        Raises:
            ValueError: an unknown sampler or coefficient, steps < 1, or a last step that is not between 0 and 1.
        """
        check_sampler(sampler, self.samplers)
        self.check_steps(steps)
        if coefficient not in COEFFICIENTS:
            raise ValueError(f"coefficient must be one of {', '.join(COEFFICIENTS)}, got {coefficient!r}")
        if not 0 < last_step < 1:
            raise ValueError(f"last_step must be above 0 and below 1, got {last_step}")

        def velocity(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            return self.find_velocity(model(x, times).to(x.dtype)[:, : x.shape[1]], x, times)

        x, is_sde = noise, sampler == "sde"
        rate = max(steps - 1, 1) / (1 - last_step) if is_sde else float(steps)  # of steps, in time
        for i in range(steps):
            t = i / rate
            slope = velocity(x, t)
            image = x + (1 - t) * slope
            if is_sde and i + 1 == steps:
                x = image
            elif is_sde:
                amount = COEFFICIENTS[coefficient](t, 1 / rate)
                drift = slope + amount * (t * slope - x) / (1 - t)
                x = x + drift / rate + math.sqrt(2 * amount / rate) * draw(x)
            else:
                if sampler == "heun" and i + 1 < steps:
                    slope = (slope + velocity(x + slope / rate, (i + 1) / rate)) / 2
                x = x + slope / rate
            result = x if i + 1 == steps else image
            yield result.clamp(-1, 1) if self.clip else result


class ImagePath(LinearPath):
    """The same path and loss, and a model that predicts the image (JiT, arXiv 2511.13720, eq. 5-6).

    Its velocity is (prediction - x_t) / (1 - t), and the loss that of the velocity. Where the pixels of a patch
    outnumber the channels of a model it can say what an image looks like, but not what noise was added to it. Near the
    image 1 - t is not less than ``nearest``, as in the paper. Times are uniform, as those of ``LinearPath``; the paper
    draws them logit-normal.
    """

    nearest = 0.05

    def find_velocity(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """See ``LinearPath``."""
        return (prediction - x) / (1 - expand(t, x)).clamp(min=self.nearest)


COEFFICIENTS: dict[str, Callable[[float, float], float]] = {  # of diffusion, by time and size of a step
    "constant": lambda t, size: 1.0,
    "sigma": lambda t, size: 1 - t,
    "path": lambda t, size: (1 - t) / max(t, 2 * size),
}
OBJECTIVES: dict[str, Callable[..., DDPM | LinearPath]] = {"ddpm": DDPM, "velocity": LinearPath, "image": ImagePath}


def check_sampler(sampler: str, known: tuple[str, ...]) -> None:
    """Raise ValueError when a sampler is not among the known ones, or needs what is not installed."""
    if sampler not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ValueError(f"sampler must be {names} for this objective, got {sampler!r}")
    if sampler in SOLVERS:
        check_solver(sampler)


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log of the probability of the 8-bit value that x in [-1, 1] stands for, under a Gaussian; shaped like x."""
    scale = (-log_deviation).exp()
    above = torch.special.ndtr((x - mean + 1 / 255) * scale)
    below = torch.special.ndtr((x - mean - 1 / 255) * scale)
    ends = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return ends.clamp(min=1e-12).log()
