"""The pages of the picture book that the stages see: drawn once, and written about."""

import random

import numpy as np

from . import abstract, world
from .training import map_chunks

MADE_UP_MANNER = "made up"  # how the name of a manner begins that a single page has


def draw_page(seed, size):
    """Draw a picture, and say what is true of it: a caption, a complete one, and the facts."""
    image, caption, attrs = world.picture(seed, size)
    complete = world.caption(attrs, random.Random(seed), complete=True)
    return image, {"caption": caption, "complete": complete, **world.facts(attrs)}


def own_manner_attributes(seed):
    """Draw the attributes of a page in a manner that no other page has."""
    lot = random.Random(f"mannered {seed}")
    manner = f"{MADE_UP_MANNER} {seed}"
    return world.attributes(lot) | {"style": lot.choice(("photo", "painting")), "manner": manner}


DRAWERS = {  # what is drawn of a seed, and what is said of it
    "pictures": draw_page,
    "own-manners": lambda seed, size: (world.draw(own_manner_attributes(seed), size), None),
    "abstract": lambda seed, size: (abstract.draw_abstract(seed, size), None),
}


def _draw_chunk(seeds, kind, size):
    drawn = [DRAWERS[kind](seed, size) for seed in seeds]
    return np.stack([np.asarray(image) for image, _ in drawn]), [truth for _, truth in drawn if truth]


def draw_pages(work, kind, total):
    """Draw `total` pages of a kind: -> a tensor (N, S, S, 3) uint8, and what is true of them."""

    def make():
        pixels, truth = map_chunks(_draw_chunk, total, kind, work.recipe.size)
        return np.concatenate(pixels), [said for chunk in truth for said in chunk]

    return work.once(kind, total, make, f"{kind}.npy", f"{kind}.json")
