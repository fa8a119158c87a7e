"""What the study compares: ways to put a thing or a style into words, each a few lines on the library."""

import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyti import Concept, Inversion, invert, make_examples
from tinyti.concept import word_length
from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyti.files.pictures import Photo, to_image, to_tensor
from tinyti.inversion import AVERAGE, OPTIMIZERS, STEPS
from tinyti.whitened import turn, whiten, whitened
from weights.recipe import concepts, judge, world

ANGLE = OPTIMIZERS["whitened"][1]


class Setup(NamedTuple):
    """A way to say what a set shows: words that are learned, and the text that stands for it in prompts."""

    learn: Callable[..., dict[str, Tensor]] = lambda model, data, seed: {}  # {name: vectors (n, D)}
    text: Callable[[Any], str] = lambda data: "S*"
    pictures: Callable[..., list] | None = None  # what takes the place of pictures that are drawn
    sampling: Mapping[str, Any] = MappingProxyType({})  # options of `tinyti.sample`
    ground: bool = False  # whether the ground's colour is counted, for things only


def use(model, words):
    """Give a model these learned words, {name: vectors (n, D)}, and no others."""
    model.concepts.clear()
    model.tokenizer.words.clear()
    for name, vectors in words.items():
        model.add_word(name, vectors)


def templates(data):
    """The paper's prompts for the kind of a set."""
    return STYLE_TEMPLATES if data.is_style else OBJECT_TEMPLATES


# --- one word, with other settings -------------------------------------------------------------------------


def learn(
    model, data, seed, start=None, vectors=1, optimizer="whitened", step_size=None, function=None,
    average=AVERAGE, photos=None, pool="max", **options,
):  # fmt: skip
    """Learn S* from a set's photos: {"S*": (n, D)}.

    start: vectors to begin with, "noun" for the row of the set's coarse word.  function(model, data): another
    optimizer.  photos(data, seed): other photos.  pool: how masks become those of latents.  options: those
    of `invert`.
    """
    table = model.text.table
    if start is None:
        start = torch.zeros(vectors, table.shape[1])
    elif isinstance(start, str):
        start = noun_row(model, data)
    use(model, {"S*": start})
    state = Inversion(model, model.concepts["S*"], optimizer, step_size)
    state.optimizer = function(model, data) if function else state.optimizer
    state.average = average
    photos = photos(data, seed) if photos else data.photos
    examples = make_examples(model, "S*", photos, templates(data))
    if pool == "mean":
        masks = torch.stack([torch.stack([photo.mask, photo.mask.flip(-1)]) for photo in photos])
        means = F.avg_pool2d(masks.flatten(0, 1), model.vae.factor)
        examples = examples._replace(weight=means.view_as(examples.weight))
    for _ in invert(model, state, examples, seed=seed, **options):
        pass
    return {"S*": state.vectors}


def noun_row(model, data):
    """The row (1, D) of a set's coarse word."""
    return model.text.table[[model.tokenizer.single(data.noun)]].detach()


def directions(length=1.0, angle=ANGLE, falls=False, weight=0.0, towards="mean"):
    """Whitened turns of vectors of `length` words, by an angle that may fall to 0.

    `weight` is of a pull towards a row of the table, the noun's or the mean of all.  The pull is the prior of
    DTI (2512.13672), beside a direction of length 1.
    """

    def optimizer(model, data):
        table = model.text.table
        row = noun_row(model, data) if towards == "noun" else table.mean(dim=0, keepdim=True)
        pull, real = weight * F.normalize(row, dim=-1), length * word_length(table)

        def function(vectors, gradients, memory):
            direction, memory = whiten(gradients, memory)
            part = 1 - (memory["step"] - 1) / STEPS if falls else 1
            return turn(vectors, F.normalize(direction, dim=-1) - pull, part * angle, real), memory

        return function

    return optimizer


def lengths(step, cap, until=STEPS):
    """Whitened steps, up to a cap, both in lengths of a real word; turns after `until` of them."""

    def optimizer(model, data):
        real = word_length(model.text.table)

        def function(vectors, gradients, memory):
            if memory.get("step", 0) >= until:
                return whitened(vectors, gradients, memory, ANGLE, real)
            direction, memory = whiten(gradients, memory)
            vectors = vectors - step * real * F.normalize(direction, dim=-1)
            longest = cap * real / vectors.norm(dim=-1, keepdim=True)
            return vectors * longest.clamp(max=1), memory

        return function

    return optimizer


def as_one(model, data):
    """Whiten all vectors of a word as one of n D numbers, which are more than there are samples."""

    def function(vectors, gradients, memory):
        direction, memory = whiten(gradients.flatten(1)[:, None], memory)
        return turn(vectors, direction.view_as(vectors), ANGLE, word_length(model.text.table)), memory

    return function


def back_to_length(model, data, seed):
    """The default word, at the length of a real word, from which its average departs."""
    real = word_length(model.text.table)
    return {name: real * F.normalize(v, dim=-1) for name, v in learn(model, data, seed).items()}


word = partial(partial, learn)
SETTINGS = {
    "default": Setup(learn),
    "angle .2 falling": Setup(word(function=directions(angle=0.2, falls=True))),
    "length .5": Setup(word(function=directions(0.5))),
    "length .5, angle .2 falling": Setup(word(function=directions(0.5, 0.2, falls=True))),
    "step .09, cap 1": Setup(word(function=lengths(0.09, 1))),
    "step .15, cap 1": Setup(word(function=lengths(0.15, 1))),
    "step .2, cap 1": Setup(word(function=lengths(0.2, 1))),
    "ten steps .12, then turns": Setup(word(function=lengths(0.12, 1, until=10))),
    "step .09, cap .74 (former default)": Setup(word(function=lengths(0.09, 0.74))),
    **{f"angle {angle}": Setup(word(step_size=angle)) for angle in (0.06, 0.09, 0.17)},
    **{f"length {length}": Setup(word(function=directions(length))) for length in (0.35, 2, 4.5)},
    **{f"average {average}": Setup(word(average=average)) for average in (1, 5, 20)},
    "average, back to length": Setup(back_to_length),
    "pull .1 to the mean": Setup(word(function=directions(weight=0.1))),
    "pull .1 to the noun": Setup(word(function=directions(weight=0.1, towards="noun"))),
    "pull .3 to the noun": Setup(word(function=directions(weight=0.3, towards="noun"))),
    "timesteps .5 to .9": Setup(word(span=(0.5, 0.9))),
    "timesteps 0 to 1": Setup(word(span=(0, 1))),
    "start at the noun": Setup(word(start="noun")),
    **{f"{steps} steps": Setup(word(steps=steps)) for steps in (25, 100)},
    "batch 4, 100 steps": Setup(word(batch_size=4, steps=100)),
    "batch 16, 25 steps": Setup(word(batch_size=16, steps=25)),
    "six vectors": Setup(word(vectors=6)),
    "six vectors, whitened as one": Setup(word(vectors=6, function=as_one)),
    **{f"Adam {lr}": Setup(word(optimizer="adam", step_size=lr)) for lr in (5e-3, 2e-2)},
}


# --- the paper's set-ups (2208.01618, section 5) -----------------------------------------------------------


def progressive(model, data, seed, vectors=2):
    """Begin with one vector, add another after each part of the steps; the earlier ones go on."""
    found = torch.zeros(0, model.text.table.shape[1])
    for part in range(1, vectors + 1):
        start = torch.cat([found, torch.zeros_like(model.text.table[:1])])
        [found] = learn(model, data, seed * vectors + part, start=start, steps=STEPS // vectors).values()
    return {"S*": found}


def per_image(model, data, seed):
    """Learn a word for each picture beside S*, "a photo of S* with S_i", and keep only S*."""
    use(model, {})
    count = len(data.photos)
    names = ["S*", *(f"S{i}" for i in range(1, count + 1))]
    ids = [id for name in names for id in model.tokenizer.add(name)]
    examples = make_examples(model, "S*", data.photos, templates(data))
    prompts = [[f"{line} with {own}" for line in lines] for own, lines in zip(names[1:], examples.prompts)]
    concept = Concept("S*", torch.zeros(len(ids), model.text.table.shape[1]), ids)  # all rows at once
    model.concepts["S*"] = concept
    state = Inversion(model, concept)
    for _ in invert(model, state, examples._replace(prompts=prompts), seed=seed):
        pass
    return {"S*": state.vectors[:1]}


def rendered(count):
    """A function of a set and a seed: `count` photos of its individual, or in its style."""

    def photos(data, seed):
        if count <= len(data.photos):
            return random.Random(seed).sample(data.photos, count)
        lot = random.Random(f"{data.name} {seed}")
        pages = [judge.the_one(data.name, lot) for _ in range(count)]
        return [to_photo(concepts.draw_for_set(data.name, keep_photo(data, page))) for page in pages]

    return photos


def keep_photo(data, page):
    """A page as a photo, unless the set is of a style."""
    return page if data.is_style else page | {"style": "photo", "manner": ""}


def to_photo(picture, mask=None):
    """A PIL picture, and a mask (1, H, W) of what counts in it, as `read_photos` gives them."""
    return Photo(Path(), to_tensor(picture, picture.width), None, mask)


def one_ground(pool=None, count=5):
    """Photos on one ground, whose colour the seed decides; `pool`, "max" or "mean", says how masks are used.

    A mask is where two pictures on different grounds are alike.
    """

    def photos(data, seed):
        lot, found = random.Random(f"ground {data.name} {seed}"), []
        for _ in range(count):
            page = keep_photo(data, judge.the_one(data.name, lot)) | {"scene": "plain"}
            views = [on_ground(data.name, page, colour) for colour in (ground_of(seed), "yellow")]
            alike = (to_tensor(views[0], concepts.SIZE) - to_tensor(views[1], concepts.SIZE)).abs() < 0.1
            found.append(to_photo(views[0], alike.all(dim=0, keepdim=True).float() if pool else None))
        return found

    return photos


def ground_of(seed):
    """The colour of the ground that `one_ground` takes."""
    return ("green", "purple", "blue")[seed % 3]


def on_ground(name, page, colour):
    """A page of a set on a plain ground of a colour, the same for every page."""
    context = page["context"] | {"backdrop": world.draw_colour(random.Random(colour), colour)}
    return concepts.draw_for_set(name, page | {"backdrop": colour, "context": context})


def short_caption(data):
    """At most twelve words of a set's description: the caption of somebody in a hurry."""
    return " ".join(plain(data.description).split()[:12]).rstrip(",")


def long_caption(data):
    """A set's description, at most thirty words."""
    return " ".join(plain(data.description).split()[:30])


def searched_caption(data):
    """The caption that a search found best by CLIP-I, among those that the world's language has."""
    return plain(data.caption)


def plain(caption):
    """A caption without its beginning, "a photo of a"."""
    return re.sub(r"^.* of (a|an) |^(a|an) ", "", caption)


def training_pictures(data, seed):
    """The set's own pictures."""
    return [to_image(photo.pixels) for photo in data.photos]


GAL = {"optimizer": "adam", "span": (0, 1), "steps": 250, "average": 1, "start": "noun"}
PAPER = {
    "training pictures": Setup(pictures=training_pictures),
    "coarse word": Setup(text=lambda data: data.noun),
    "default": SETTINGS["default"],  # one word
    **{f"{n} words": Setup(word(vectors=n)) for n in (2, 3)},
    **{f"progressive, {n} words": Setup(partial(progressive, vectors=n)) for n in (2, 3)},
    "pull .3 to the noun": SETTINGS["pull .3 to the noun"],
    "a word for each picture": Setup(per_image),
    "angle × 4": Setup(word(step_size=4 * ANGLE)),
    "angle / 50": Setup(word(step_size=ANGLE / 50)),
    "as the paper (Adam, 2,000 samples)": Setup(word(**GAL)),
    "short caption": Setup(text=short_caption),
    "long caption": Setup(text=long_caption),
    "searched caption": Setup(text=searched_caption),
    "1 picture": Setup(word(photos=rendered(1))),
    **{f"{count} pictures": Setup(word(photos=rendered(count))) for count in (2, 3, 10, 25)},
    "one ground": Setup(word(photos=one_ground()), ground=True),
    "one ground, masks": Setup(word(photos=one_ground("max")), ground=True),
    "one ground, masks by their mean": Setup(word(photos=one_ground("mean"), pool="mean"), ground=True),
    "50 steps of DDIM": Setup(learn, sampling={"sampler": "ddim", "steps": 50}),
}
