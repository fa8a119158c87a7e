"""Made-up words, from which the miniature learns to accept new ones: each means an individual or a manner."""

import random

import numpy as np
import torch
import torch.nn.functional as F

from tinyti.networks.layers import Attention
from tinyti.tokenizer import Tokenizer

from . import world
from .measure import PART_NAMES
from .pages import MADE_UP_MANNER, own_manner_attributes
from .training import map_chunks

MADE_UP_WORD = "S*"  # means something else in every caption


def word_features(attrs):
    """Return numbers for what a made-up word means: an individual, or a page's own manner."""
    if attrs["manner"].startswith(MADE_UP_MANNER):
        return [0.0] * len(individual_features(attrs)) + manner_features(attrs["manner"])
    return individual_features(attrs) + [0.0] * len(manner_features(world.MANNERS[0]))


# Where an individual has four numbers for each part, and five for each patch, after nine proportions.
PART_FEATURES = slice(len(world.THINGS), len(world.THINGS) + 4 * (1 + len(PART_NAMES)))
PATCH_FEATURES = slice(PART_FEATURES.stop + 9, PART_FEATURES.stop + 9 + 4 * 5)


def individual_features(attrs):
    """Return the thing, its colours (1 and three levels for each part), its proportions and its patches."""
    look = attrs["identity"]
    found = [1.0 * (attrs["thing"] == thing) for thing in world.THINGS]
    for part in ("base", *PART_NAMES):
        colour = look.get(part)
        found += [1.0, *(level / 127.5 - 1 for level in colour)] if colour else [0.0] * 4
    sizes = ("ear size", "head", "body", "eye size", "eye height", "grain")
    found += [8 * (look[size] - 1) for size in sizes]
    found += [2 * look["lift"] - 1, 5 * look["lean"], look["petals"] - 6.0]
    for x, y, radius, squeeze, second in look["marks"]:
        mark = [4 * x, 4 * y, 20 * (radius - 0.31), 5 * (squeeze - 1), 2.0 * second - 1]
        found += mark if look.get("patches") else [0.0] * 5
    return found


def manner_features(manner):
    """Return a manner's palette, its lines' colour, its texture, its strength and the texture's period."""
    *palette, part, line, texture, period = world.tones(manner)
    found = [level / 127.5 - 1 for colour in (*palette, line) for level in colour]
    found += [1.0 * (texture == other) for other in ("none", "hatch", "grid", "dots")]
    return [*found, 4 * part - 3, period - 10.0]


def page_captions(attrs, seed):
    """Return eight captions of a page: two leave things out, two are complete and add the made-up word.

    In the last four the word alone stands for the individual; two of these leave other things out, two do
    not. If the page has a manner of its own, the word stands for the manner in all eight.
    """
    lot, word = random.Random(f"said {seed}"), MADE_UP_WORD
    if attrs["manner"].startswith(MADE_UP_MANNER):
        return [caption_with_word(attrs | {"manner": word}, lot) for _ in range(8)]
    captions = [world.caption(attrs, lot) for _ in range(2)]
    both = attrs | {"colour": f"{word} {attrs['colour']}"}
    captions += [world.caption(both, lot, complete=True, most=len(world.SHADES)) for _ in range(2)]
    captions += [caption_with_word(attrs | {"who": word}, lot) for _ in range(2)]
    alone = attrs | {"thing": word, "colour": "", "details": {}}
    return captions + [world.caption(alone, lot, complete=True) for _ in range(2)]


def caption_with_word(attrs, lot):
    """Draw captions of a page until one contains the made-up word."""
    while MADE_UP_WORD not in (caption := world.caption(attrs, lot)):
        pass
    return caption


def _write_chunk(numbers, folder, pictures):
    tokenizer, ids, features = Tokenizer.from_folder(folder), [], []
    tokenizer.add(MADE_UP_WORD)
    for n in numbers:
        attrs = world.attributes(random.Random(n)) if n < pictures else own_manner_attributes(n - pictures)
        ids.append(tokenizer(page_captions(attrs, n)).short().numpy())
        features.append(word_features(attrs))
    return np.stack(ids), np.array(features, np.float32)


def write_captions(work):
    """Caption all pages: -> ids (N, 8, 77), and the features of their made-up words (N, F)."""
    pictures, total = work.recipe.pictures, work.recipe.pictures + work.recipe.own_manners

    def make():
        return map(np.concatenate, map_chunks(_write_chunk, total, work / "tokenizer", pictures))

    return work.once("captions", total, make, "captions.npy", "features.npy")


class Reader(torch.nn.Module):
    """Reads what each part is like from a context, as the UNet does: one attention with a query per part.

    A part of a few pixels hardly counts in the loss on pictures.  The reader asks for its colour, whether a
    caption names it or a made-up word means it.  So the text transformer learns to keep the parts of one word
    apart, as it does those of a caption.  The reader is thrown away at the end, like `JointModel.names`.
    """

    def __init__(self, width):
        super().__init__()
        self.parts = torch.nn.Parameter(torch.randn(1 + len(PART_NAMES) + 4, width))
        self.attention = Attention(width, 4, width)
        self.out = torch.nn.Linear(width, 5)

    def forward(self, context, features, whole):
        """context (B, 77, D), features (B, F), rows to ask (B,) -> mean squared error of the answers."""
        colours = features[:, PART_FEATURES].unflatten(1, (-1, 4))
        patches = features[:, PATCH_FEATURES].unflatten(1, (-1, 5))
        has = colours[..., :1].expand(-1, -1, 3)
        there = torch.cat([torch.ones_like(has[..., :1]), has, torch.zeros_like(has[..., :1])], -1)
        there = torch.cat([there, (patches != 0).any(-1, keepdim=True).expand_as(patches)], 1)
        truth = torch.cat([F.pad(colours, (0, 1)), patches], 1)
        read = self.out(self.attention(self.parts.expand(len(context), -1, -1), context)).float()
        there = there * whole[:, None, None]
        return (there * (read - truth).square()).sum() / there.sum().clamp(min=1)
