"""The picture book's pages for the stages: each drawn once, with its captions."""

import random

import numpy as np

from . import abstract, world
from .training import map_chunks

MADE_UP_MANNER = "made up"  # the prefix of a manner's name that only one page has


def draw_page(seed, size):
    """Draw a page: -> its image, and its caption, complete caption and facts."""
    image, caption, attrs = world.picture(seed, size)
    complete = world.caption(attrs, random.Random(seed), complete=True)
    return image, {"caption": caption, "complete": complete, **world.facts(attrs)}


def own_manner_attributes(seed):
    """Draw the attributes of a page in a manner that no other page has."""
    lot = random.Random(f"mannered {seed}")
    manner = f"{MADE_UP_MANNER} {seed}"
    return world.attributes(lot) | {"style": lot.choice(("photo", "painting")), "manner": manner}


DRAWERS = {  # seed, size -> image, and captions and facts if there are any
    "pictures": draw_page,
    "own-manners": lambda seed, size: (world.draw(own_manner_attributes(seed), size), None),
    "abstract": lambda seed, size: (abstract.draw_abstract(seed, size), None),
}


def _draw_chunk(seeds, kind, size):
    drawn = [DRAWERS[kind](seed, size) for seed in seeds]
    return np.stack([np.asarray(image) for image, _ in drawn]), [truth for _, truth in drawn if truth]


def draw_pages(work, kind, total):
    """Draw `total` pages of a kind: -> a tensor (N, S, S, 3) uint8, and their captions and facts."""

    def make():
        pixels, truth = map_chunks(_draw_chunk, total, kind, work.recipe.size)
        return np.concatenate(pixels), [said for chunk in truth for said in chunk]

    return work.once(kind, total, make, f"{kind}.npy", f"{kind}.json")
