"""The judge: a small network that says which set's *the one* a picture shows, if any, and which scene.

    python -m weights.recipe.judge

renders pictures, trains it, writes `judge.safetensors` and prints how often it is right. For a thing, "the
one" has the colours, markings and proportions of the set's individual; look-alikes differ in one part or
more. For a style, it is any picture in that style. Blurred, resampled, noisy and (with `--weights`)
autoencoded copies keep their original's label, so that the look of a model's pictures decides nothing.
"""

import argparse
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn

import tinyti

from . import concepts, world
from .training import to_images

SETS = (*concepts.INDIVIDUALS, *concepts.NEW_STYLES)
SCENE_NAMES = tuple(world.SCENES)
OUTPUTS = len(SETS) + len(SCENE_NAMES)
FILE = Path(__file__).parent / "judge.safetensors"


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> logits (B, outputs), by default of sets and scenes."""

    def __init__(self, outputs=OUTPUTS, last=128):
        super().__init__()
        layers = []
        for c_in, c_out, kernel, stride in ((3, 64, 6, 4), (64, 96, 3, 2), (96, last, 3, 2)):
            layers += [nn.Conv2d(c_in, c_out, kernel, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(4 * 4 * last, outputs)

    def forward(self, images):
        return self.head(self.body(images))


def judge_input(pictures):
    """Convert RGB pictures of any size -> (B, 3, 64, 64) in [-1, 1]."""
    pixels = [np.asarray(picture.resize((concepts.SIZE,) * 2, Image.Resampling.BOX)) for picture in pictures]
    return to_images(np.stack(pixels))


def load_weights(model, file):
    """Load a file's weights into a network, and freeze it in eval mode."""
    model.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    return model.eval().requires_grad_(False)


def save_weights(model, file):
    """Write the weights of a network in half precision."""
    save_file({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, file)


@lru_cache
def load_judge():
    """Return the trained `Judge`."""
    return load_weights(Judge(), FILE)


@torch.no_grad()
def judge(pictures):
    """Return the probability that each of B pictures shows the one of each of `SETS`: (B, sets)."""
    logits = [load_judge()(judge_input(pictures[i : i + 256])) for i in range(0, len(pictures), 256)]
    return torch.cat(logits)[:, : len(SETS)].sigmoid()


@torch.no_grad()
def scenes(pictures):
    """Return the name of the scene in each picture."""
    return [SCENE_NAMES[i] for i in load_judge()(judge_input(pictures))[:, len(SETS) :].argmax(1)]


# --- pictures to learn from --------------------------------------------------------------------------------


def the_one(name, lot):
    """Return attributes of the set's subject in a random pose and scene; for a style, of any page."""
    page = world.attributes(lot)
    if name in concepts.NEW_STYLES:
        return page
    return page | concepts.individual(name) | {"style": "painting" if lot.random() < 0.1 else "photo"}


def change_parts(name, lot, count=1):
    """Return attributes of a look-alike that differs clearly in the colour of `count` parts.

    A part that the individual lacks may appear, and one that others may lack can be missing.
    """
    attrs = the_one(name, lot) | {"style": "photo"}
    look, parts = dict(attrs["identity"]), world.PARTS[attrs["thing"]]
    markings = (*world.MARKINGS, "more patches")
    able = [p for p, v in look.items() if isinstance(v, tuple) or (v is None and p not in markings)]
    if name in concepts.FIGURES:  # its function draws only these parts
        able = [part for part in able if part in concepts.INDIVIDUALS[name][2] or part == "tail"]
    for part in lot.sample(able, count):
        before = look[part] or look["base"]
        clear = [shade for shade in world.SHADES if world.colour_distance(shade, before) > world.CLEAR]
        look[part] = world.draw_colour(lot, lot.choice(clear))
        if part != "more patches" and parts.get(part, "") is None and before != look["base"]:
            look[part] = lot.choice((look[part], None))
        if part == "base":  # parts without a colour of their own take this one
            look |= {p: look["base"] for p, default in parts.items() if default == "" and look[p] == before}
    return attrs | {"identity": look}


def stranger(name, lot):
    """Return attributes of another individual of the kind, with at least one part clearly different."""
    one = the_one(name, lot) | {"style": "photo"}
    if name in concepts.FIGURES and lot.random() < 0.5:
        return same_words(name, lot)  # but another figure
    while True:
        other = world.look_alike(one, lot)
        for part in world.PARTS[one["thing"]]:
            a, b = one["identity"][part], other["identity"][part]
            if a is not b and (a is None or b is None or world.colour_distance(a, b) > world.CLEAR):
                return other


def same_words(name, lot):
    """Return attributes of another individual that the fullest caption of the set's thing also describes."""
    attrs = the_one(name, lot) | {"style": "photo"}
    look = world.identity(lot, attrs["thing"], attrs["colour"], attrs["details"])
    return attrs | {"identity": look}


def recolour_picture(picture, lot):
    """Return a picture with its colours rotated or its channels exchanged."""
    if lot.random() < 0.5:
        hue, saturation, value = picture.convert("HSV").split()
        turn = lot.randint(60, 195)
        hue = hue.point([(i + turn) % 256 for i in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    order = lot.choice(((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))
    return Image.fromarray(np.asarray(picture)[..., order])


def style_look_alike(name, lot):
    """Return a picture in another style, or in the set's style with other colours, and its scene's number."""
    attrs, draw = world.attributes(lot), lot.random()
    if draw < 0.25 and name != "stained-glass":  # its panes have all colours anyway
        return recolour_picture(concepts.draw_for_set(name, attrs), lot), -1
    if draw < 0.5:
        other = lot.choice([other for other in concepts.NEW_STYLES if other != name])
        return concepts.draw_for_set(other, attrs), SCENE_NAMES.index(attrs["scene"])
    if draw < 0.75:  # the world's styles in the colours of the new ones
        backdrop = lot.choice({"blueprint": ["blue"], "risograph": ["pink", "white"]}.get(name, ["black"]))
        place = {"scene": "plain", "backdrop": backdrop, "context": world.context(lot, backdrop)}
        style = lot.choice(("sketch", "neon") if name == "blueprint" else tuple(world.STYLES))
        attrs |= place | {"style": style, "manner": ""}
    elif draw < 0.9:
        attrs |= {"style": "photo", "manner": lot.choice(world.MANNERS)}
    return world.draw(attrs), SCENE_NAMES.index(attrs["scene"])


KINDS = ("the one", "one part", "two parts", "look-alike", "other")


def example(name, kind, lot):
    """Return a picture for a set and the number of its scene, or -1 if the scene is not to be learned."""
    if name in concepts.NEW_STYLES:
        if kind == "the one":
            attrs = the_one(name, lot)
            return concepts.draw_for_set(name, attrs), SCENE_NAMES.index(attrs["scene"])
        if kind != "other":
            return style_look_alike(name, lot)
    if kind == "other":
        attrs = world.attributes(lot)
        return world.draw(attrs), SCENE_NAMES.index(attrs["scene"])
    figure = name
    if kind == "the one":
        attrs = the_one(name, lot)
    elif kind == "one part":
        attrs = change_parts(name, lot)
    elif kind == "two parts":
        attrs = change_parts(name, lot, 2)
    else:
        attrs, figure = stranger(name, lot), ""  # as the world draws it
    return concepts.draw_for_set(figure, attrs), SCENE_NAMES.index(attrs["scene"])


def degrade(picture, lot):
    """Return a picture slightly blurred, resampled or noisy, as a generated one may be."""
    draw = lot.random()
    if draw < 0.4:
        picture = picture.filter(ImageFilter.GaussianBlur(lot.uniform(0.4, 1.0)))
    elif draw < 0.65:
        small = picture.resize((concepts.SIZE // 2,) * 2, Image.Resampling.BOX)
        picture = small.resize((concepts.SIZE,) * 2, Image.Resampling.BICUBIC)
    if draw > 0.5:
        pixels, rng = np.asarray(picture), np.random.default_rng(lot.getrandbits(31))
        pixels = pixels + rng.normal(0, lot.uniform(2, 9), pixels.shape)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return picture


def examples(count, seed=0, weights=None):
    """Render `count` pictures for all sets in turn.

    Returns images uint8 (count, 64, 64, 3), the sets' numbers, whether each is the one, the scenes' numbers.
    """
    lot, rows = random.Random(f"judge {seed}"), []
    for i in range(count):
        number = i % len(SETS)
        kind = lot.choices(KINDS, (0.42, 0.24, 0.1, 0.14, 0.1))[0]
        picture, scene = example(SETS[number], kind, lot)
        if lot.random() < 0.4:
            picture = degrade(picture, lot)
        rows.append((np.asarray(picture), number, kind == "the one", scene))
    images, *truth = map(np.stack, zip(*rows))
    if weights:
        autoencode(images, weights, one_in=3)
    return images, *map(torch.from_numpy, truth)


@torch.no_grad()
def autoencode(images, weights, one_in):
    """Autoencode one in `one_in` batches of the images uint8 (N, 64, 64, 3) with a model's VAE, in place."""
    vae = tinyti.load(weights).vae
    for i in range(0, len(images), 64 * one_in):
        batch = torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(batch)[0]).clamp(-1, 1).permute(0, 2, 3, 1)
        images[i : i + 64] = decoded.add(1).mul(127.5).round().byte().numpy()


# --- training and measuring --------------------------------------------------------------------------------


def train_judge(data, samples):
    """Return a `Judge` trained on `samples` samples of the rendered pictures."""
    images, number, one, scene = data

    def loss_of(logits, rows):
        truth = torch.zeros(len(rows), len(SETS))
        truth[torch.arange(len(rows)), number[rows]] = one[rows].float()
        weight = torch.full_like(truth, 0.2).scatter(1, number[rows, None], 2.0)  # look-alikes are hard
        loss = F.binary_cross_entropy_with_logits(logits[:, : len(SETS)], truth, weight)
        return loss + 0.1 * F.cross_entropy(logits[:, len(SETS) :], scene[rows], ignore_index=-1)

    torch.manual_seed(0)
    return fit(Judge(), images, loss_of, samples)


def fit(model, images, loss_of, samples, batch=64, lr=3e-3):
    """Train a `Judge` on images uint8 (N, 64, 64, 3); loss_of(logits, rows) takes the rows of the batch."""
    model, generator = model.to(memory_format=torch.channels_last), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    steps = samples // batch
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        by = torch.randint(-2, 3, (2,), generator=generator).tolist()
        gain = 1 + 0.06 * (torch.rand(batch, 3, 1, 1, generator=generator) * 2 - 1)  # a colour jitter
        x = torch.where(mirrored, x.flip(-1), x).roll(by, (2, 3))
        x = ((x + 1) * gain - 1).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        loss = loss_of(model(x), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            print(f"{step * batch:,} of {samples:,}  loss {loss.item():.4f}", flush=True)
    return model.eval().requires_grad_(False)


def rates(name, count, seed=1):
    """Return the share of unseen pictures of each kind that the judge takes for the one: {kind: share}."""
    lot, found = random.Random(f"unseen {seed} {name}"), {}

    def accepted(pictures):
        return (judge(pictures)[:, SETS.index(name)] > 0.5).float().mean().item()

    for kind in KINDS:
        found[kind] = accepted([example(name, kind, lot)[0] for _ in range(count)])
    blurred = [example(name, lot.choice(KINDS[1:4]), lot)[0] for _ in range(count)]
    found["blurred"] = accepted([degrade(picture, lot) for picture in blurred])
    if name in concepts.INDIVIDUALS:
        found["same words"] = accepted([world.draw(same_words(name, lot)) for _ in range(count)])
    return found


def balanced_accuracy(found):
    """Return the balanced accuracy from `rates`: the mean over "the one" and all other kinds."""
    wrong = [found[kind] for kind in KINDS[1:]]
    return (found["the one"] + 1 - sum(wrong) / len(wrong)) / 2


def table(count):
    """Return the rates of all sets as the rows of a table."""
    kinds = (*KINDS, "blurred", "same words")
    lines = [f"{'':14}{'right':>11}" + "".join(f"{kind:>11}" for kind in kinds)]
    for name in SETS:
        found = rates(name, count)
        cells = [balanced_accuracy(found), *(found.get(kind, float("nan")) for kind in kinds)]
        lines.append(f"{name:14}" + "".join(f"{100 * cell:10.1f}%" for cell in cells))
    return "\n".join(lines)


def main():
    """Train the judge and print how well it judges."""
    parser = argparse.ArgumentParser(description="Train the judge of individuals and styles.")
    parser.add_argument("--pictures", type=int, default=16_000, help="how many to render (default: 16000)")
    parser.add_argument("--samples", type=int, default=200_000, help="how many to train on (default: 200000)")
    parser.add_argument("--weights", type=Path, help="a model folder whose autoencoder a third goes through")
    args = parser.parse_args()
    model = train_judge(examples(args.pictures, weights=args.weights), args.samples)
    save_weights(model, FILE)
    print(table(200))


if __name__ == "__main__":
    main()
