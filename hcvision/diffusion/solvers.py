"""Solvers of diffusers for the ODE of a DDPM: DPM-Solver++ and UniPC (``pip install hcvision[latents]``)."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SOLVERS = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}  # classes of diffusers


def check_solver(name: str) -> None:
    """Raise ValueError when diffusers, which has the solver, is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(f"sampler {name} needs diffusers: pip install 'hcvision[latents]'")


def solve(
    name: str, kept: Tensor, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, clip: bool
) -> Iterator[Tensor]:
    """From noise to images by a multistep solver of second order, in few steps.

    Args:
        name: ``dpm++``, DPM-Solver++ 2M (arXiv 2211.01095), or ``unipc``, UniPC of order 2 with B2 (arXiv 2302.04867).
        kept: alpha-bar of every timestep, (T,).
        model: (x, t) -> predicted noise, (B, C, H, W), or (B, 2 C, H, W) with a variance, which no solver uses.
        noise: (B, C, H, W).
        steps: evaluations of the model, at timesteps that are equally far apart.
        clip: clamp the predicted image to [-1, 1] in every step.

    Yields:
        The predicted image after every step; the last is the result.

    Raises:
        ValueError: diffusers is not installed.
    """
    check_solver(name)
    import diffusers

    scheduler = getattr(diffusers, SOLVERS[name])(
        num_train_timesteps=len(kept), trained_betas=(1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).numpy(),
        solver_order=2, prediction_type="epsilon", thresholding=clip, sample_max_value=1.0,
        timestep_spacing="linspace", final_sigmas_type="zero",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, about how diffusers calls it
        scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        predicted = model(x, t.expand(len(x))).to(x.dtype)[:, : x.shape[1]]
        share = float(kept[int(t)])
        image = (x - (1 - share) ** 0.5 * predicted) / share**0.5
        x = scheduler.step(predicted, t, x, return_dict=False)[0]
        result = x if i + 1 == steps else image
        yield result.clamp(-1, 1) if clip else result
