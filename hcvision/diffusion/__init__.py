"""Diffusion: objectives and samplers, the VAE between images and latents, drawing many images.

``objectives.py`` is the mathematics, ``solvers.py`` its solvers in diffusers, ``vae.py`` and ``encoding.py`` the
latents, ``sampling.py`` draws in parts that survive a kill.
"""

from hcvision.diffusion.encoding import encode_folder
from hcvision.diffusion.objectives import OBJECTIVES, LinearPath, SeededNoise, guide
from hcvision.diffusion.sampling import (
    Sampling,
    columns_of,
    describe_samples,
    draw_samples,
    enlarge,
    grid,
    parts,
    read_samples,
    to_uint8,
    write_npz,
)
from hcvision.diffusion.vae import decode, load_vae

__all__ = [
    "OBJECTIVES",
    "LinearPath",
    "Sampling",
    "SeededNoise",
    "columns_of",
    "decode",
    "describe_samples",
    "draw_samples",
    "encode_folder",
    "enlarge",
    "grid",
    "guide",
    "load_vae",
    "parts",
    "read_samples",
    "to_uint8",
    "write_npz",
]
