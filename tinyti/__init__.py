"""Textual Inversion from scratch in plain PyTorch: one learned word for a frozen latent diffusion model."""

from .concept import Concept
from .examples import make_examples
from .inversion import Inversion, invert
from .model import LatentDiffusion, load, load_clip, load_dino, sample

__all__ = [
    "Concept", "Inversion", "LatentDiffusion", "invert", "load", "load_clip", "load_dino", "make_examples",
    "sample",
]  # fmt: skip
