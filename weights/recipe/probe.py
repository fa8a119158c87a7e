"""The probe: a small network that reads what a picture shows, to tell whether it obeys its prompt.

    python -m weights.recipe.probe --weights weights/tiny

renders pictures, trains the probe like the judge, writes `probe.safetensors` and prints how often it is
right. It reads the thing, the style, the main colour, and whether a scarf and a hat are worn, and in which
colour. It also reads hats and scarves that the world lacks, such as a robot's.

    python -m weights.recipe.probe --labels

draws the prompts of `labels.csv` with the miniature and compares the probe's answers with the labels, which
were written without knowing these answers. "?" means unclear.
"""

import argparse
import csv
import random
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import tinyti
from tinyti.files.pictures import to_image
from tinyti.programs.miniature import GUIDANCE, TINY

from . import concepts, judge, world

QUESTIONS = {  # and the answers
    "thing": (*world.THINGS, *concepts.FIGURES),
    "style": (*world.STYLES, *concepts.NEW_STYLES),
    "colour": tuple(world.COLOURS),
    "scarf": (None, "some"),
    "hat": (None, "some"),
    "scarf colour": tuple(world.SHADES),
    "hat colour": tuple(world.SHADES),
}
UNASKED = -100
PROBE_FILE = Path(__file__).parent / "probe.safetensors"
LABELS_FILE = Path(__file__).parent / "labels.csv"


class Reading(NamedTuple):
    """What the probe sees in a picture; `scarf` and `hat` are their colours, or None if none is worn."""

    thing: str
    style: str
    colour: str
    scarf: str | None
    hat: str | None

    def obeys(self, **asked):
        """Whether all is as asked: thing="dog", scarf="blue", hat=None; hat=True is a hat of any colour."""
        return all(bool(getattr(self, k)) if v is True else getattr(self, k) == v for k, v in asked.items())


def new_probe():
    """Return an untrained `Judge` whose outputs are the answers to all questions."""
    return judge.Judge(sum(map(len, QUESTIONS.values())), last=96)


@lru_cache
def load_probe():
    """Return the trained probe."""
    return judge.load_weights(new_probe(), PROBE_FILE)


def by_question(logits):
    """Return {question: its logits}."""
    return dict(zip(QUESTIONS, logits.split([len(answers) for answers in QUESTIONS.values()], 1)))


@torch.no_grad()
def answer(pictures):
    """Return {question: the probability of each answer, (B, answers)} for B pictures."""
    inputs = (judge.judge_input(pictures[i : i + 256]) for i in range(0, len(pictures), 256))
    logits = by_question(torch.cat([load_probe()(x) for x in inputs]))
    return {question: values.softmax(1) for question, values in logits.items()}


def read(pictures):
    """Return a `Reading` of each picture."""
    found = answer(pictures)
    best = {question: [QUESTIONS[question][i] for i in p.argmax(1)] for question, p in found.items()}
    for worn in world.WORN:
        best[worn] = [is_worn and colour for is_worn, colour in zip(best[worn], best[f"{worn} colour"])]
    return [Reading(*row) for row in zip(*(best[field] for field in Reading._fields))]


def obedience(pictures, **asked):
    """Return the share of the pictures that show what was asked for (`Reading.obeys`)."""
    return sum(reading.obeys(**asked) for reading in read(pictures)) / len(pictures)


# --- pictures to learn from --------------------------------------------------------------------------------

# The place (x, y, half the width) of a hat and of a scarf on things that wear none in the world.
HATS = {
    "cat": (0, -0.72, 0.46),
    "rabbit": (0, -0.56, 0.42),
    "fox": (0, -0.68, 0.46),
    "robot": (0, -0.78, 0.5),
    "fish": (0.35, -0.5, 0.42),
    "car": (-0.15, -0.76, 0.46),
    "mushroom": (0, -0.9, 0.46),
}
SCARVES = {
    "bird": (0.2, -0.02, 0.42),
    "fox": (0, 0.3, 0.5),
    "robot": (0, 0.02, 0.46),
    "mushroom": (0, 0.4, 0.46),
}


def dressed(thing):
    """Return a function that draws a thing with its hat and its scarf."""
    figure = concepts.FIGURES.get(thing) or world.THINGS[thing]

    def draw_dressed(pen, look):
        figure(pen, look)
        for worn, places in (("scarf", SCARVES), ("hat", HATS)):
            if thing in places and look.get(worn):
                x, y, wide = places[thing]
                other = world.Pen(pen.canvas, pen.frame, pen.paint[0], pen.ink[0], pen.line)
                other.offset = np.array(pen.place([(x, 0)])[0])
                if worn == "hat":
                    world.hat(other, look, 0, y, wide)
                else:
                    world.scarf(other, look, y, wide)

    return draw_dressed


def dress(thing, attrs, lot):
    """Return a look whose scarf and hat may be changed, and {"scarf" and "hat": the colour's word or ""}."""
    look, words = dict(attrs["identity"]), dict.fromkeys(world.WORN, "")
    clear = [shade for shade in world.SHADES if world.colour_distance(shade, look["base"]) > world.CLEAR]
    for worn, places in (("scarf", SCARVES), ("hat", HATS)):
        if thing in places or worn in world.PARTS.get(thing, ()):
            words[worn], change = attrs["details"].get(worn, ""), lot.random()
            if change < 0.45:
                words[worn] = lot.choice(clear)
                look[worn] = world.draw_colour(lot, words[worn])
            elif change < 0.7:
                words[worn], look[worn] = "", None
    return look, words


def labelled(lot):
    """Return a picture and the number of the answer to each question, `UNASKED` if there is none."""
    attrs = world.attributes(lot)
    thing, style, colour, kind = attrs["thing"], attrs["style"], attrs["colour"], lot.random()
    if kind < 0.15:  # a set's individual, whose colour may not be one of the ten
        thing, colour = lot.choice(tuple(concepts.INDIVIDUALS)), None
        attrs |= {key: concepts.individual(thing)[key] for key in ("details", "identity")}
    elif kind < 0.22:
        thing, attrs["thing"] = "fox", "cat"
        details = world.colouring(lot, "cat", colour)
        attrs |= {"details": details, "identity": world.identity(lot, "cat", colour, details)}
        attrs["identity"]["muzzle"] = world.draw_colour(lot, "white")
    attrs["identity"], words = dress(thing, attrs, lot)
    finish = world.STYLES[style]
    if lot.random() < 0.12:
        style = lot.choice(tuple(concepts.NEW_STYLES))
        finish, attrs["manner"] = concepts.NEW_STYLES[style][0], ""
    sheet = world.compose(attrs, concepts.SIZE, dressed(thing))
    pixels = finish(sheet)
    if attrs["manner"]:
        pixels, style = world.manner(attrs["manner"])(sheet, pixels), None
    told = {"thing": thing, "style": style, "colour": colour}
    told |= {worn: "some" if word else None for worn, word in words.items()}
    told |= {f"{worn} colour": word for worn, word in words.items()}
    if style not in world.STYLES:  # manners and new styles have colours of their own
        told |= dict.fromkeys(("colour", "scarf colour", "hat colour"))
    truth = [a.index(told[q]) if told[q] in a else UNASKED for q, a in QUESTIONS.items()]
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8)), truth


def lesson(count, seed=0, weights=None):
    """Render `count` pictures: images uint8 (count, 64, 64, 3), the answers' numbers (count, questions)."""
    lot, images, truth = random.Random(f"probe {seed}"), [], []
    for _ in range(count):
        picture, numbers = labelled(lot)
        images.append(np.asarray(judge.degrade(picture, lot) if lot.random() < 0.4 else picture))
        truth.append(numbers)
    images = np.stack(images)
    if weights:
        judge.autoencode(images, weights, one_in=8)
    return images, torch.tensor(truth)


def train_reader(data, samples):
    """Return a probe trained on `samples` samples of the rendered pictures."""
    images, truth = data

    def loss_of(logits, rows):
        losses = [
            F.cross_entropy(values, numbers, ignore_index=UNASKED, reduction="sum")
            for values, numbers in zip(by_question(logits).values(), truth[rows].T)
        ]
        return sum(losses) / len(rows)

    torch.manual_seed(0)
    return judge.fit(new_probe(), images, loss_of, samples)


# --- measuring ---------------------------------------------------------------------------------------------


def hits(count, seed=1, blurred=False):
    """Return {question: {answer: 1 or 0, found or not, for each unseen picture where it is true}}."""
    lot = random.Random(f"unseen {seed}")
    pictures, truth = zip(*(labelled(lot) for _ in range(count)))
    if blurred:
        pictures = [judge.degrade(picture, lot) for picture in pictures]
    found, by_answer = answer(pictures), {}
    for (question, answers), numbers in zip(QUESTIONS.items(), torch.tensor(truth).T):
        hit = (found[question].argmax(1) == numbers).float()
        by_answer[question] = {a: hit[numbers == i] for i, a in enumerate(answers) if i in numbers}
    return by_answer


def share_right(by_answer):
    """Return the accuracy on one question, and its mean over the answers (balanced accuracy)."""
    each = [hit.mean() for hit in by_answer.values()]
    return torch.cat(tuple(by_answer.values())).mean().item(), torch.stack(each).mean().item()


def compare_labels():
    """Return {question: [(number, label, what the probe reads)]} for the pictures of `labels.csv`."""
    with LABELS_FILE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model, pictures = tinyti.load(TINY), []
    for i in range(0, len(rows), 20):
        part = rows[i : i + 20]
        lots = [torch.Generator().manual_seed(int(row["seed"])) for row in part]
        prompts = [row["prompt"] for row in part]
        *_, x_0 = tinyti.sample(model, prompts, 12, GUIDANCE, "dpm++", generator=lots)
        pictures += [to_image(x) for x in model.decode(x_0)]
    pairs = {field: [] for field in Reading._fields}
    for row, reading in zip(rows, read(pictures)):
        for field, seen in reading._asdict().items():
            if row[field] != "?":
                pairs[field].append((row["number"], row[field], seen or ""))
    return pairs


def main():
    """Train the probe and print how well it reads, or compare it with the labels."""
    parser = argparse.ArgumentParser(description="Train the probe of what pictures show.")
    parser.add_argument("--pictures", type=int, default=16_000, help="how many to render (default: 16000)")
    parser.add_argument("--samples", type=int, default=160_000, help="how many to train on (default: 160000)")
    parser.add_argument("--weights", type=Path, help="a model folder whose autoencoder 1 in 8 goes through")
    parser.add_argument("--labels", action="store_true", help="compare with labels.csv instead of training")
    args = parser.parse_args()
    if args.labels:
        for field, pairs in compare_labels().items():
            wrong = [f"{number}: {label or 'bare'}, not {seen or 'bare'}" for number, label, seen in pairs]
            wrong = [text for text, (_, label, seen) in zip(wrong, pairs) if label != seen]
            print(f"{field}: {len(pairs) - len(wrong)} of {len(pairs)}", *wrong, sep="; ")
        return
    model = train_reader(lesson(args.pictures, weights=args.weights), args.samples)
    judge.save_weights(model, PROBE_FILE)
    for blurred in (False, True):
        print("blurred, resampled or noisy" if blurred else "as rendered")
        for question, by_answer in hits(4000, blurred=blurred).items():
            each = ", ".join(f"{name or 'bare'} {100 * hit.mean():.1f}" for name, hit in by_answer.items())
            overall, balanced = share_right(by_answer)
            print(f"  {question}: {100 * overall:.1f} %, balanced {100 * balanced:.1f} % ({each})")


if __name__ == "__main__":
    main()
