"""The study: what each setting does to a word, and the paper's experiments (2208.01618, section 5) again.

    python -m notebooks.study settings                            # compute whatever is missing
    python -m notebooks.study nouns --seeds 0                     # what the model can draw, for obedience
    python -m notebooks.study paper --only "2 words" --sets cat --seeds 0
    python -m notebooks.study paper --table                       # print what there is, as Markdown
    python -m notebooks.study paper --figure                      # likeness against obedience, Figure 10
    python -m notebooks.study bias                                # colours of "car" and of a word from cars
    python -m notebooks.study --quick                             # a small part of all, in a temporary file

The set-ups are in setups.py.  Each run appends a row to study.csv, so the study may be stopped at any time.
A row that is there is not computed again.  A table shows means over sets and seeds.  The spread behind ± is
the standard deviation of a seed's mean over the sets; missing runs are shown as missing.
"""

import argparse
import csv
import hashlib
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import tinyti
from notebooks import setups
from tinyti import make_examples
from tinyti.files.pictures import read_photos, to_image
from tinyti.inversion import evaluate
from tinyti.metrics import clip_i, clip_t
from tinyti.programs.miniature import GUIDANCE, ROOT, TINY
from weights.recipe import concepts, judge, probe, world

FILE = Path(__file__).with_suffix(".csv")
BIAS_FILE = FILE.with_name("bias.csv")
SETS = json.loads((ROOT / "concepts" / "concepts.json").read_text())
PAPER_SETS = ("cat", "robot", "mushroom", "blueprint")
COUNT = {"settings": 8, "paper": 16, "nouns": 64}  # pictures a prompt
EDITS = {  # what a picture must show, as the probe reads it, to obey a prompt
    "scarf": ("a photo of a {} wearing a blue scarf", {"scarf": "blue"}),
    "hat": ("a photo of a {} wearing a hat", {"hat": True}),
    "red": ("a photo of a red {}", {"colour": "red"}),
    "neon": ("a neon sign of a {}", {"style": "neon"}),
    "sketch": ("a pencil sketch of a {}", {"style": "sketch"}),
}
STYLE_EDITS = {  # the same for styles
    thing: (f"a painting of a {thing} in the style of {{}}", {"thing": thing})
    for thing in ("cat", "car", "house", "flower", "boat")
}
PLACES = {"beach": "on the beach", "snow": "in the snow", "night": "at night", "meadow": "in a meadow"}
KEYS = ("setup", "set", "seed", "weights", "count")  # what tells a row from others
SCORES = ("to training", "to held-out", "the one", "clip-t", *EDITS, *STYLE_EDITS)
SCORES += ("scene", "ground", "loss", "length")
BIAS_COLUMNS = ("text", "seed", "cars", *world.COLOURS)
COLUMNS = ("setup", "set", "seed", "weights", "commit", "cpu", "count", *SCORES, "seconds")


class Data:
    """A set of `concepts/`: what a word is learned from, and what it is judged by."""

    def __init__(self, model, name):
        about = SETS[name]
        self.model, self.name, self.noun = model, name, about["start"]
        self.description, self.caption = about["description"], about["caption"]
        self.is_style = is_style(name)
        folder = ROOT / "concepts" / name
        self.photos, self.unseen = (read_photos(part, model.size)[0] for part in (folder, folder / "heldout"))

    @property
    def prompt(self):
        """The prompt that only names it."""
        return "a painting in the style of {}" if self.is_style else "a photo of a {}"

    @property
    def scenes(self):
        """Prompts that put it into each of PLACES."""
        prompt = "a painting of a cat {} in the style of {{}}" if self.is_style else "a photo of a {{}} {}"
        return [prompt.format(place) for place in PLACES.values()]

    @property
    def edits(self):
        """Prompts that ask for something, and what for: {name: (prompt, asked)}."""
        return STYLE_EDITS if self.is_style else EDITS

    @cached_property
    def heldout(self):
        """Examples with S* that no word is learned from."""
        return make_examples(self.model, "S*", self.unseen, setups.templates(self))


def is_style(name):
    """Whether a set is of a style."""
    return SETS[name]["kind"] == "style"


def draw(model, prompts, seed, guidance=GUIDANCE, sampler="dpm++", steps=12):
    """A picture of each prompt, from noise that `seed` and the picture's number decide."""
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    *_, x_0 = tinyti.sample(model, prompts, steps, guidance, sampler, generator=generators)
    return [to_image(pixels) for pixels in model.decode(x_0)]


def heldout_loss(model, data):
    """The loss of S* on pictures that nobody has learned from, over the whole schedule: a fixed batch."""
    return evaluate(model, data.heldout, span=(0.0, 1.0), size=64)


@torch.no_grad()
def likeness(clip, data, pictures):
    """How like a set pictures are: CLIP-I to those learned from and to others, and the judge's "the one"."""
    training, unseen = ([to_image(photo.pixels) for photo in part] for part in (data.photos, data.unseen))
    return {
        "to training": clip_i(clip, pictures, training),
        "to held-out": clip_i(clip, pictures, unseen),
        "the one": (judge.judge(pictures)[:, judge.SETS.index(data.name)] > 0.5).float().mean().item(),
    }


@torch.no_grad()
def scores(model, clip, data, text, seed=0, count=8, **sampling):
    """What pictures of a text are worth that stands for a set in prompts: {one of SCORES: value}.

    Likeness: `likeness` of pictures of the text alone.  Obedience: the part of the pictures in which the
    probe finds what each edit asks for, and the judge the scene.  CLIP-T: the mean over all prompts that ask
    for something, against the prompt without the text.
    """
    encoder, tokenizer = clip
    found = likeness(encoder, data, draw(model, count * [data.prompt.format(text)], seed, **sampling))
    near = []
    for name, (prompt, asked) in data.edits.items():
        pictures = draw(model, count * [prompt.format(text)], seed, **sampling)
        found[name] = probe.obedience(pictures, **asked)
        near.append(clip_t(encoder, tokenizer, pictures, without(prompt)))
    each, right = max(1, count // len(PLACES)), []
    for place, prompt in zip(PLACES, data.scenes):
        pictures = draw(model, each * [prompt.format(text)], seed, **sampling)
        right += [scene == place for scene in judge.scenes(pictures)]
        near.append(clip_t(encoder, tokenizer, pictures, without(prompt)))
    return found | {"scene": statistics.mean(right), "clip-t": statistics.mean(near)}


def without(prompt):
    """A prompt with nothing in place of the word, as in the paper."""
    return " ".join(prompt.replace("{}", "").split())


def ground(picture):
    """The word for the colour that most of a picture's border has."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return concepts.nearest_word(tuple(np.median(border, axis=0)), world.SHADES)


# --- runs and rows -----------------------------------------------------------------------------------------


def run(model, clip, setup, name, seed, count=8):
    """Learn what a set-up learns from a set: {column: value} of SCORES."""
    data, began = Data(model, name), time.perf_counter()
    words = setup.learn(model, data, seed)
    found = {"seconds": round(time.perf_counter() - began, 1)}
    setups.use(model, words)
    for vectors in words.values():
        found["length"] = vectors.norm(dim=-1).mean().item()
        found["loss"] = heldout_loss(model, data)
    if setup.pictures:
        return found | likeness(clip[0], data, setup.pictures(data, seed))
    found |= scores(model, clip, data, setup.text(data), seed, count, **setup.sampling)
    if setup.ground:
        pictures = draw(model, count * [data.prompt.format("S*")], seed)
        found["ground"] = statistics.mean(ground(picture) == setups.ground_of(seed) for picture in pictures)
    return found


def read_rows(file):
    """The rows of a file, as text; a row that a kill has cut is left out."""
    if not file.exists():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return list(csv.DictReader(whole.splitlines()))


def append_row(file, row, columns=COLUMNS):
    """Add a row to a file; numbers with four digits."""
    whole = file.read_bytes() if file.exists() else b""
    with file.open("r+" if whole else "w", newline="", encoding="utf-8") as lines:
        lines.seek(whole.rfind(b"\n") + 1)
        lines.truncate()  # what a kill has cut
        writer = csv.DictWriter(lines, columns, lineterminator="\n")
        if not lines.tell():
            writer.writeheader()
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def provenance():
    """What the rows of today are computed by: the commit and the CPU."""
    models = [line for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return {"commit": commit(), "cpu": models[0].split(":")[1].strip() if models else platform.processor()}


def commit():
    """The commit of this tree, "-dirty" behind it if files differ from it; "unknown" outside of git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_lines(file):
    """The lines of a file, none where it is not there."""
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def load(weights):
    """A folder's model, its CLIP with tokenizer, and what tells its weights from others."""
    model, clip = tinyti.load(weights), tinyti.load_clip(weights / "clip")
    return model, clip, digest(model.unet, model.vae, model.text, clip[0])


def digest(*networks):
    """What tells weights from others: a hash of names as they are loaded, and of values in half precision."""
    found = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            found.update(name.encode() + tensor.half().cpu().numpy().tobytes())
    return found.hexdigest()[:8]


def compute(args, table, file):
    """Append the rows of a table that are missing."""
    where, count = provenance(), args.count or COUNT[table]
    model, clip, weights = load(args.weights)
    there = {tuple(row[key] for key in KEYS) for row in read_rows(file)}
    for seed in args.seeds:
        for label, setup in TABLES[table].items():
            for name in args.sets or (PAPER_SETS if table == "paper" else SETS):
                row = dict(zip(KEYS, (label, name, str(seed), weights, str(count))))
                is_wanted = label in (args.only or [label]) and not (setup.ground and is_style(name))
                if is_wanted and tuple(row.values()) not in there:
                    append_row(file, row | where | run(model, clip, setup, name, seed, count))
                    print(f"{label}: {name}, seed {seed}", flush=True)


def compute_bias(args, file):
    """Append how many of 64 pictures have each colour, of "car" and of a word from `concepts/cars`.

    The paper's section 4.4.  In the miniature's world every other car is red, on purpose.
    """
    model, there = tinyti.load(args.weights), read_rows(file)
    photos = read_photos(ROOT / "concepts" / "cars", model.size)[0]
    data = SimpleNamespace(name="cars", is_style=False, noun="car", photos=photos)
    for seed in args.seeds:
        for text in ("car", "S*"):
            if any(row["text"] == text and row["seed"] == str(seed) for row in there):
                continue
            setups.use(model, setups.learn(model, data, seed) if text == "S*" else {})
            readings = probe.read(draw(model, 64 * [f"a photo of a {text}"], seed))
            counts = Counter(reading.colour for reading in readings)
            cars = sum(reading.thing == "car" for reading in readings)
            colours = {colour: counts[colour] for colour in world.COLOURS}
            append_row(file, {"text": text, "seed": seed, "cars": cars} | colours, BIAS_COLUMNS)
            print(f"{text}, seed {seed}: {cars} cars, {counts['red']} red of 64", flush=True)


# --- tables and figures ------------------------------------------------------------------------------------


def obedience(rows):
    """The mean over EDITS and STYLE_EDITS of each row, in the order of the rows; None where none counts.

    An edit counts for a set where the set's noun obeys it in half of the pictures or more: what the model
    itself cannot draw says nothing of a word.  The noun's rows with the most pictures decide.
    """
    able = able_edits(rows)
    found = []
    for row in rows:
        values = [float(row[edit]) for edit in able.get(row["set"], ()) if row[edit]]
        found.append(statistics.mean(values) if values else None)
    return found


def able_edits(rows):
    """{set: edits that its noun obeys in half of the pictures or more}, from the rows of NOUN."""
    found = defaultdict(list)
    for name in SETS:
        nouns = [row for row in rows if row["setup"] == NOUN and row["set"] == name]
        most = max((int(row["count"]) for row in nouns), default=0)
        nouns = [row for row in nouns if int(row["count"]) == most]
        for edit in (*EDITS, *STYLE_EDITS):
            values = [float(row[edit]) for row in nouns if row[edit]]
            if values and statistics.mean(values) >= 0.5:
                found[name].append(edit)
    return found


def spread(rows, values):
    """Mean over rows, and the standard deviation of the seeds' means: (mean, deviation), None for nothing."""
    seeds = defaultdict(list)
    for row, value in zip(rows, values):
        if value not in (None, ""):
            seeds[row["seed"]].append(float(value))
    means = [statistics.mean(found) for found in seeds.values()]
    if not means:
        return None
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else None


TABLED = ("to training", "to held-out", "the one", "clip-t", "obedience", "scene", "loss")
SHOWN = (*TABLED, "ground", "length")


def summary(rows, table, count=None):
    """{set-up: {column: (mean, deviation)} and "runs"} of a table; count: pictures a prompt of its rows."""
    scored = [row | {"obedience": value} for row, value in zip(rows, obedience(rows))]
    found = {}
    sets, count = PAPER_SETS if table == "paper" else SETS, str(count or COUNT[table])
    scored = [row for row in scored if row["set"] in sets and row["count"] == count]
    for label in TABLES[table]:
        group = [row for row in scored if row["setup"] == label]
        found[label] = {"runs": len(group)}
        found[label] |= {column: spread(group, [row[column] for row in group]) for column in SHOWN}
    return found


def markdown(rows, table, count=None):
    """A table of means over sets and seeds, ± the standard deviation of a seed's mean."""
    lines = [["no.", "set-up", "runs", *TABLED], ["---"] * (len(TABLED) + 3)]
    for number, (label, means) in enumerate(summary(rows, table, count).items(), 1):
        cells = [show(means[column], 4 if column == "loss" else 2) for column in TABLED]
        lines.append([str(number), label, str(means["runs"] or "missing"), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(value, digits):
    """(mean, deviation) as text."""
    if value is None:
        return ""
    mean, deviation = value
    text = f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def figure(rows, table, file):
    """Draw likeness against obedience, as the paper's Figure 10: a point a set-up, with its spread.

    Numbers are those of the table.  The right panel enlarges where most points are.  file: where to save it,
    if anywhere.
    """
    from matplotlib import pyplot as plt

    _, panels = plt.subplots(1, 2, figsize=(11, 5), dpi=110, layout="constrained")
    near = (0.55, 0.95)
    for number, (label, means) in enumerate(summary(rows, table).items(), 1):
        x, y = means["obedience"], means["the one"]
        if not (x and y):
            continue
        colour = plt.get_cmap("tab20")(number % 20)
        style = {"fmt": "o", "ms": 6, "lw": 0.7, "color": colour, "mec": "black"}
        for panel in panels:
            panel.errorbar(x[0], y[0], y[1] or 0, x[1] or 0, **style, label=f"{number} {label}")
        is_near = all(near[0] < value[0] < near[1] for value in (x, y))
        angle = 2.4 * number  # radians: neighbours' numbers go different ways
        place = (10 * math.cos(angle) - 3, 10 * math.sin(angle) - 3)
        panels[int(is_near)].annotate(number, (x[0], y[0]), place, textcoords="offset points", fontsize=9)
    panels[1].set(xlim=near, ylim=near, title="enlarged")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    panels[0].set_ylabel("likeness: pictures taken for the one")
    for panel in panels:
        panel.set_xlabel("obedience: pictures that show what is asked")
    if file:
        plt.savefig(file)


NOUN = "coarse word"
TABLES = {"settings": setups.SETTINGS, "paper": setups.PAPER, "nouns": {NOUN: setups.PAPER[NOUN]}}


def main():
    """Compute what is missing, or show what there is."""
    parser = argparse.ArgumentParser(prog="python -m notebooks.study", description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=(*TABLES, "bias"), nargs="?", default="paper")
    parser.add_argument("--weights", type=Path, default=TINY, help="a model folder with a clip/ in it")
    parser.add_argument("--only", nargs="+", metavar="SETUP", help="some set-ups, as --table calls them")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="by default all, or the paper's four")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, help="pictures a prompt (default: 8, 16 and 64)")
    parser.add_argument("--file", type=Path, default=FILE, help="where the rows are (default: study.csv)")
    parser.add_argument("--table", action="store_true", dest="show", help="print the table")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw likeness against obedience")
    parser.add_argument("--quick", action="store_true", help="a few rows of each table, into no file")
    args = parser.parse_args()
    if args.quick:
        return quick(args)
    if args.table == "bias":
        return compute_bias(args, BIAS_FILE)
    if not (args.show or args.figure):
        return compute(args, args.table, args.file)
    *_, weights = load(args.weights)
    rows = [row for row in read_rows(args.file) if row["weights"] == weights]
    if args.show:
        print(markdown(rows, args.table, args.count))
    if args.figure:
        figure(rows, args.table, args.figure)


def quick(args):
    """Some rows of each table on one set, four pictures a prompt, in a temporary file; print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE.name
        args.sets, args.seeds, args.count = args.sets or ["robot"], [0], 4
        for table, some in {"settings": QUICK_SETTINGS, "paper": QUICK_PAPER}.items():
            args.only = some
            compute(args, table, file)
            print(markdown(read_rows(file), table, args.count))


QUICK_SETTINGS = ["default"]
QUICK_PAPER = [NOUN, "progressive, 2 words", "training pictures"]

if __name__ == "__main__":
    main()
