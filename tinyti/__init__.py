"""Textual Inversion from scratch in plain PyTorch: one learned word for a frozen latent diffusion model."""

from .concept import Concept
from .inversion import Inversion, invert, make_examples
from .model import LatentDiffusion, load, load_clip, sample

__all__ = ["Concept", "Inversion", "LatentDiffusion", "invert", "load", "load_clip", "make_examples"]
__all__ += ["sample"]
