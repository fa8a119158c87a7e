"""Similarity of pictures to other pictures (reconstruction) and to a prompt (editability), in CLIP's space.

These are the paper's two measures (2208.01618, section 5.1), with any CLIP (`load_clip`)."""

import torch
from PIL import Image

from .networks.vision import CLIP, DINO
from .tokenizer import Tokenizer


@torch.no_grad()
def clip_i(clip: CLIP | DINO, pictures: list[Image.Image], references: list[Image.Image]) -> float:
    """Mean cosine similarity over all pairs of a picture and a reference, both PIL pictures: -1 … 1.

    With a DINO instead of a CLIP it is the DreamBooth paper's measure DINO (2208.12242).
    """
    return (clip.encode_image(pictures) @ clip.encode_image(references).T).mean().item()


@torch.no_grad()
def clip_t(clip: CLIP, tokenizer: Tokenizer, pictures: list[Image.Image], prompt: str) -> float:
    """Mean cosine similarity of PIL pictures to a prompt without learned words: -1 … 1."""
    text = clip.encode_text(tokenizer(prompt).to(clip.logit_scale.device))
    return (clip.encode_image(pictures) @ text.T).mean().item()
