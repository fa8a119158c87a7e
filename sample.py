"""Use learned words:  python sample.py "a painting of S* on the beach" --words words/S"""

import json
import os
import re
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tinyti
from tinyti.diffusion import SAMPLERS
from tinyti.editing import attention_maps, from_image, in_region, overlay, paste, skipped_steps, to_mask
from tinyti.files.hub import find_word
from tinyti.files.pictures import have_same_ratio, read_image, read_text, to_image, to_tensor
from tinyti.files.whole import atomic_write, writable_folder
from tinyti.files.words import read_words
from tinyti.programs import cli
from tinyti.programs.cli import any_text_type, number_type, path_type, text_type
from tinyti.programs.miniature import GUIDANCE, default_guidance
from tinyti.programs.sheet import draw_sheet

STRENGTH = 0.7  # share of the steps that --image goes through
BATCH = 8  # pictures that are drawn at once
LOOKS_LEARNED = re.compile(r"<[^<>\s]+>|(?<!\w)\w*\*")  # how people write learned words


# What other programs read as a weight: (S*:1.2), ((S*)), [S*:0.5], BREAK
PROMPT_WEIGHTS = re.compile(r"[(\[][^()\[\]]{0,100}:[\d.]+[)\]]|\(\([^()]{0,100}\)\)|\bBREAK\b")


def arguments(argv=None):
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompts", nargs="+", type=text_type, metavar="PROMPT", help="what to draw, with learned words")
    add = parser.add_argument_group("what to draw with").add_argument
    add(
        "--words",
        nargs="+",
        type=path_type,
        default=[],
        metavar="[NAME=]PATH",
        help="learned words: folders of train.py, files (textual inversion embeddings) or names on the hub; "
        "NAME= renames a word",
    )
    cli.model_flags(parser)

    add = parser.add_argument_group("how to draw").add_argument
    add("--negative", type=any_text_type, default="", metavar="PROMPT", help="negative prompt, for guidance")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ needs the fewest steps, ddpm the most")
    add(
        "--steps",
        type=number_type(1, 10**5, int),
        default=50,
        metavar="N",
        help="denoising steps",
    )
    add(
        "--guidance",
        type=number_type(0, 100),
        metavar="SCALE",
        help="classifier-free guidance scale; values up to 1 turn it off; "
        f"by default {GUIDANCE:g} with the miniature, else 7.5",
    )
    add("--eta", type=number_type(0, 1), default=0.0, metavar="ETA", help="noise of ddim: 0 none, 1 as ddpm")
    add(
        "--size",
        type=number_type(1, 4096, int),
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width; by default the model's resolution",
    )

    add = parser.add_argument_group("what to begin with, instead of noise").add_argument
    add("--image", type=path_type, metavar="FILE", help="redraw this picture (its middle square)")
    add("--mask", type=path_type, metavar="FILE", help="inpainting: redraw only where the mask is white")
    add(
        "--strength",
        type=number_type(0, 1),
        metavar="SHARE",
        help=f"share of the denoising steps that --image goes through; by default {STRENGTH}",
    )

    add = parser.add_argument_group("what comes out").add_argument
    add("--count", type=number_type(1, 10**4, int), default=4, metavar="N", help="pictures per prompt")
    add("--seed", type=cli.SEED, default=0, metavar="N", help="seed of the first picture; then N + 1, ...")
    add("--attention", action="store_true", help="draw the words' cross-attention, in attention.png")
    add(
        "--out",
        type=path_type,
        default="pictures",
        metavar="FOLDER",
        help="output folder, for PNGs and a sheet",
    )
    add("--force", action="store_true", help="overwrite pictures in --out")
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        raise ValueError(f"--size has {len(args.size)} numbers; give the side, or height and width")
    if args.mask and not args.image:
        raise ValueError(f"--mask {args.mask} needs the picture that it belongs to; give --image")
    return args


def main(argv=None):
    """Run the program; bad input gives one line and exit status 2."""
    return cli.run_program("sample.py", lambda: draw_pictures(arguments(argv)))


def draw_pictures(args):
    """Draw and write all pictures, batch by batch; returns the exit status."""
    out, seeds = Path(args.out), range(args.seed, args.seed + args.count)
    files = [picture_files(out, *prompt, seeds) for prompt in enumerate(args.prompts, 1)]
    sheet, attention = out / "grid.png", out / "attention.png"
    refuse_to_replace([*chain(*files), sheet, *[attention] * args.attention], args.force)

    model = cli.load_model(args)
    size = args.size or [model.size]
    height, width = size[0], size[-1]
    model.check_size(height, width)
    model.schedule.timesteps(args.steps, args.sampler)  # refuses more steps than the model was trained on
    add_words(model, args.words, args.clip_skip, args.download)
    words = check_texts(model, args)
    painter = Painter(args, model, (height, width))
    note_flags_without_effect(args, painter.options)

    rows, maps = [], []
    batches = [range(args.count)[i : i + BATCH] for i in range(0, args.count, BATCH)]
    total = len(args.prompts) * len(batches) * painter.steps
    with writable_folder(out), tqdm(total=total, unit="step") as bar:
        for prompt, prompt_files, prompt_words in zip(args.prompts, files, words):
            pictures, heat = [], {word: [] for word in prompt_words if args.attention}
            for batch in batches:
                drawn = painter.draw(prompt, [seeds[i] for i in batch], heat, bar.update)
                for i, picture in zip(batch, drawn):
                    save(picture, prompt_files[i], {"prompt": prompt, "seed": seeds[i], **painter.settings})
                pictures += drawn
            rows.append((prompt, pictures))
            maps += [(f"{word} in: {prompt}", overlays) for word, overlays in heat.items()]
        save(draw_sheet(rows), sheet, painter.settings)
        if args.attention:
            save(draw_sheet(maps), attention, painter.settings)
    print(f"{len(rows) * args.count} pictures and grid.png in {cli.short_path(out)}")
    return 0


def refuse_to_replace(files, force):
    """Raise ValueError for the first file that exists, unless `force`."""
    there = next((file for file in files if os.path.lexists(file)), None)
    if there and not force:
        raise ValueError(f"{there} is there already; take --force to replace it, or another --out")


def note_flags_without_effect(args, options):
    """Print a note for each flag that has no effect."""
    without = {
        "--negative": args.negative and options["guidance"] <= 1,
        "--eta": args.eta and args.sampler != "ddim",
        "--strength": args.strength is not None and not args.image,
    }
    reasons = {
        "--negative": "has no effect without guidance; --guidance must be above 1",
        "--eta": "is for --sampler ddim only",
        "--strength": "is for --image only",
    }
    for flag in without:
        if without[flag]:
            cli.say(f"note: {flag} {reasons[flag]}")


class Painter:
    """Draws as the flags say: from noise, from --image, or inside --mask.  `settings` go into the PNGs."""

    def __init__(self, args, model, size):
        self.model, self.size = model, size
        guidance = default_guidance(args.weights) if args.guidance is None else args.guidance
        self.options = {
            "steps": args.steps,
            "guidance": guidance,
            "sampler": args.sampler,
            "eta": args.eta,
            "negative": args.negative,
        }
        self.settings = self.options | {
            "size": self.size,
            "words": list(model.concepts),
            "weights": Path(args.weights).name,
        }
        self.walk, self.decode, self.steps = partial(tinyti.sample, size=self.size), model.decode, args.steps
        if args.image:
            self._begin_with_image(args)

    def _begin_with_image(self, args):
        """Draw from --image, or inside --mask."""
        if self.size[0] != self.size[1]:
            sides = f"{self.size[0]} {self.size[1]}"
            raise ValueError(f"--size is {sides}, but --image is cropped to a square; give its side")
        strength = STRENGTH if args.strength is None else args.strength
        picture = read_image(args.image)
        image = to_tensor(picture, self.size[0])
        self.steps = args.steps - skipped_steps(args.steps, strength)
        self.settings |= {"image": Path(args.image).name, "strength": strength}
        self.walk = partial(from_image, image=image, strength=strength)
        if args.mask:
            mask = read_image(args.mask)
            if not have_same_ratio(mask, picture):
                found, expected = (f"{x.width} × {x.height} pixels" for x in (mask, picture))
                hint = "their sides must have the same ratio"
                raise ValueError(f"--mask has {found}, --image {expected}; {hint}")
            feather = self.model.vae.factor // 2  # the seam is as wide as a latent
            mask = to_mask(mask, self.size[0], feather)
            self.settings |= {"mask": Path(args.mask).name}
            self.walk = partial(in_region, image=image, mask=mask, strength=strength)
            self.decode = lambda x_0: paste(image, self.model.decode(x_0), mask)

    def draw(self, prompt, seeds, heat, after_step):
        """Draw a picture for each seed; add each word's attention maps to its list in `heat`."""
        prompts, generators = [prompt] * len(seeds), [torch.Generator().manual_seed(seed) for seed in seeds]
        with ExitStack() as stack:
            maps = {}
            for word in heat:
                maps[word] = stack.enter_context(attention_maps(self.model, prompts, word, self.size))
            for x_0 in self.walk(self.model, prompts, generator=generators, **self.options):  # noqa: B007
                after_step()
        drawn = self.decode(x_0)
        for word, of_word in maps.items():
            heat[word] += map(to_image, overlay(drawn, of_word))
        return [to_image(pixels) for pixels in drawn]


def picture_files(folder, number, prompt, seeds):
    """The files of a prompt's pictures: folder/01-a-photo-of-S-0.png and so on, or folder/01.png for one."""
    if len(seeds) == 1:
        return [folder / f"{number:02}.png"]
    words = "-".join(re.findall(r"\w+", prompt)).encode()[:40].decode(errors="ignore").strip("-") or "picture"
    return [folder / f"{number:02}-{words}-{seed}.png" for seed in seeds]


def add_words(model, entries, clip_skip, download):
    """Register the learned words of `[NAME=]PATH` entries with the model."""
    for entry in entries:
        name, path = None, entry
        if "=" in entry and not Path(entry).exists():
            name, path = entry.split("=", 1)
        path = find_word(path, download)
        words = read_words(path, model.text.table.shape[1], lambda note: cli.say(f"note: {note}"))
        if name is not None and len(words) > 1:
            raise ValueError(f"{path} holds the words {', '.join(words)}; {name}= cannot rename them all")
        for word, vectors in words.items():
            model.add_word(word if name is None else name, vectors)
        learned_with = read_clip_skip(Path(path))
        if learned_with not in (None, clip_skip):
            cli.say(f"note: {path} was learned with --clip-skip {learned_with}, now it is {clip_skip}")


def read_clip_skip(path):
    """Read the --clip-skip that the word in a run's folder was learned with; None if it is unknown."""
    folder = path if path.is_dir() else path.parent
    file = folder / "settings.json"
    try:
        return json.loads(read_text(file))["clip_skip"] if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_texts(model, args):
    """Check all prompts; returns the learned words of each, and prints each note once.

    ValueError if a learned word is cut off, or if a prompt has none although --words or --attention is
    given.  A learned word in --negative is enough for --words.
    """
    notes = {}  # in order, each once
    words = [check_text(model, prompt, notes) for prompt in args.prompts]
    negative = check_text(model, args.negative, notes)
    for prompt, found in zip(args.prompts, words):
        if not found and (args.attention or (args.words and not negative)):
            known = f"the words are {', '.join(model.concepts)}" if model.concepts else "--words loads them"
            raise ValueError(f"no learned word stands alone in the prompt {prompt!r}; {known}")
    for note in notes:
        cli.say(note)
    return words


def check_text(model, text, notes):
    """Find the learned words of a text; add to `notes`.  ValueError for a word that is cut off."""
    ids, places = model.tokenizer.encode(text), model.tokenizer.length - 2
    if any(i >= model.tokenizer.vocab_size for i in ids[places:]):
        raise ValueError(f"a learned word comes after the {places} tokens that fit, in {text!r:.500}")
    if len(ids) > places:
        notes[f"the last {len(ids) - places} tokens of {text!r:.500} do not fit and are left out"] = None
    rest = model.tokenizer.without_words(text)
    for word in LOOKS_LEARNED.findall(rest):
        notes[f"note: {word!r} is not loaded; load learned words with --words"] = None
    if weighted := PROMPT_WEIGHTS.findall(text):
        notes[f"note: {', '.join(weighted)} in a prompt is read as text; weights and BREAK do nothing"] = None
    rest = rest.replace("BREAK", " ")
    plain = sorted(set(re.findall(r"[^\W\d_]{4,}", rest)))
    if spelled := [word for word in plain if is_spelled(model.tokenizer, word)]:
        notes[f"note: the model has no word for {', '.join(spelled)}, and reads it letter by letter"] = None
    return [name for name, concept in model.concepts.items() if concept.ids[0] in ids]


def is_spelled(tokenizer, word):
    """Whether a word takes more than two tokens, and more than one for every two letters."""
    tokens = len(tokenizer.encode(word))
    return tokens > 2 and tokens > len(word) / 2


def save(picture, file, about):
    """Write a PNG atomically; a text chunk says how it was made."""
    info = PngInfo()
    about = json.dumps(about, ensure_ascii=False).encode(errors="backslashreplace").decode()  # odd file names
    info.add_itxt("tinyti", about)
    with atomic_write(file) as stream:
        picture.save(stream, format="PNG", pnginfo=info)


if __name__ == "__main__":
    cli.leave(main)
