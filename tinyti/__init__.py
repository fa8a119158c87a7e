"""Textual Inversion from scratch in plain PyTorch: one learned word for a frozen latent diffusion model."""

from .concept import Concept
from .inversion import invert, make_subject
from .model import LatentDiffusion, load, load_clip, sample

__all__ = ["Concept", "LatentDiffusion", "invert", "load", "load_clip", "make_subject", "sample"]
