"""Use learned words:  python sample.py "a painting of S* on the beach" --words words/S"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, too, is one line and status 130
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"sample.py: interrupted\n") and 130))

import json
import re
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tinyti
from tinyti import cli, embeddings
from tinyti.data import grid, read_image, to_image, to_tensor
from tinyti.diffusion import SAMPLERS
from tinyti.editing import attention_maps, from_image, in_region, overlay, paste, skipped, to_mask

BATCH = 8  # pictures that are drawn at once
LOOKS_LEARNED = re.compile(r"<[^<>\s]+>|\w*\*")  # how people write words that a model was taught


def arguments(argv=None):
    """The command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompts", nargs="+", type=cli.text, metavar="PROMPT", help="what to draw, with learned words")
    add = parser.add_argument_group("what to draw with").add_argument
    add("--words", nargs="+", type=cli.path, default=[], metavar="[NAME=]PATH",
        help="folders of train.py, or files of any kind in use; NAME= renames the word")  # fmt: skip
    cli.model_flags(parser)

    add = parser.add_argument_group("how to draw").add_argument
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ needs the fewest steps, ddpm the most")
    add("--steps", type=cli.number(1, 10**5, int), default=50, help="more are slower and, to a point, better")
    add("--guidance", type=cli.number(0, 100),
        help="how far to go beyond what the prompt alone gives; up to 1 there is no guidance; "
             f"by default {cli.GUIDANCE:g} with the miniature, else 7.5")  # fmt: skip
    add("--eta", type=cli.number(0, 1), default=0.0, help="noise that ddim adds: 0 none, 1 as much as ddpm")
    add("--size", type=cli.number(1, 4096, int), nargs="+", metavar="PIXELS",
        help="side, or height and width; by default what the model was trained on")  # fmt: skip

    add = parser.add_argument_group("what to begin with, instead of noise").add_argument
    add("--image", type=cli.path, metavar="FILE", help="picture to redraw, its middle square")
    add("--mask", type=cli.path, metavar="FILE", help="redraw only where it is white; the rest stays")
    add("--strength", type=cli.number(0, 1), default=0.7, help="share of the steps that --image goes through")

    add = parser.add_argument_group("what comes out").add_argument
    add("--count", type=cli.number(1, 10**4, int), default=4, help="pictures per prompt")
    add("--seed", type=cli.SEED, default=0, help="of the first picture; the next ones have the next seeds")
    add("--attention", action="store_true", help="draw in attention.png where the learned words act")
    add("--out", type=cli.path, default="pictures", metavar="FOLDER", help="for the pictures and grid.png")
    add("--force", action="store_true", help="replace pictures that are there")
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        raise ValueError(f"--size has {len(args.size)} numbers; give the side, or height and width")
    if args.mask and not args.image:
        raise ValueError(f"--mask {args.mask} has no picture to keep the rest of; give it by --image")
    return args


def main(argv=None):
    """Run, and turn bad input into one line and exit status 2."""
    return cli.run("sample.py", lambda: draw(arguments(argv)))


def draw(args):
    """All pictures, a batch after another: -> exit status."""
    out, seeds = Path(args.out), range(args.seed, args.seed + args.count)
    wanted = [picture_file(out, *prompt, seed) for prompt in enumerate(args.prompts, 1) for seed in seeds]
    wanted += [out / "grid.png", out / "attention.png"]
    if not args.force and (there := next((file for file in wanted if file.exists()), None)):
        raise ValueError(f"{there} is there already; take --force to replace it, or another --out")
    model = cli.load_model(args)
    size = args.size or [model.size]
    size = (size[0], size[-1])
    model.check_size(*size)
    model.schedule.timesteps(args.steps, args.sampler)  # refuses more than the model was trained on
    add_words(model, args.words)
    learned = [check_prompt(model, prompt, args.words or args.attention) for prompt in args.prompts]
    walk, finish, steps = partial(tinyti.sample, size=size), model.decode, args.steps
    if args.image:
        walk, finish, steps = edit(args, model, size)

    if args.guidance is None:
        args.guidance = cli.guidance(args.weights)
    options = {name: getattr(args, name) for name in ("steps", "guidance", "sampler", "eta", "negative")}
    settings = options | {"size": size, "words": list(model.concepts), "weights": Path(args.weights).name}
    if args.image:
        settings |= {"image": Path(args.image).name, "strength": args.strength}
    if args.mask:
        settings |= {"mask": Path(args.mask).name}
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(args.prompts) * -(-args.count // BATCH) * steps, unit="step")
    rows, maps = [], []
    for number, (prompt, words) in enumerate(zip(args.prompts, learned), 1):
        pictures, shown = [], {word: [] for word in words if args.attention}
        for batch in (seeds[i : i + BATCH] for i in range(0, args.count, BATCH)):
            prompts, noise = [prompt] * len(batch), [torch.Generator().manual_seed(seed) for seed in batch]
            with ExitStack() as recording:  # of nothing, without --attention
                heat = [recording.enter_context(attention_maps(model, prompts, w, size)) for w in shown]
                for x_0 in walk(model, prompts, generator=noise, **options):  # noqa: B007
                    bar.update()
            drawn = finish(x_0)
            for seed, picture in zip(batch, map(to_image, drawn)):
                about = {"prompt": prompt, "seed": seed, **settings}
                save(picture, picture_file(out, number, prompt, seed), about)
                pictures.append(picture)
            for word, of_word in zip(shown, heat):
                shown[word] += map(to_image, overlay(drawn, of_word))
        rows.append((prompt, pictures))
        maps += [(f"{word} in: {prompt}", of_word) for word, of_word in shown.items()]
    bar.close()
    save(grid(rows), out / "grid.png", settings)
    if args.attention:
        save(grid(maps), out / "attention.png", settings)
    print(f"{len(rows) * args.count} pictures and grid.png in {cli.shown(out)}")
    return 0


def picture_file(folder, number, prompt, seed):
    """Where a picture goes: folder/01-a-photo-of-S-0.png."""
    words = "-".join(re.findall(r"\w+", prompt)).encode()[:120].decode(errors="ignore") or "picture"
    return folder / f"{number:02}-{words}-{seed}.png"


def edit(args, model, size):
    """What draws from --image, or in the --mask of it; what decodes that; how many steps there are."""
    if size[0] != size[1]:
        raise ValueError(f"--size is {size[0]} {size[1]}, but --image is cropped to a square; give its side")
    picture = read_image(args.image)
    image, steps = to_tensor(picture, size[0]), args.steps - skipped(args.steps, args.strength)
    if not args.mask:
        return partial(from_image, image=image, strength=args.strength), model.decode, steps
    mask = read_image(args.mask)
    if abs(mask.width * picture.height / (mask.height * picture.width) - 1) > 0.02:
        found, expected = (f"{x.width} × {x.height} pixels" for x in (mask, picture))
        raise ValueError(f"--mask has {found}, --image {expected}; their sides must have the same ratio")
    mask = to_mask(mask, size[0], feather=model.vae.factor // 2)  # a seam as wide as a latent
    walk = partial(in_region, image=image, mask=mask, strength=args.strength)
    return walk, lambda x_0: paste(image, model.decode(x_0), mask), steps


def add_words(model, entries):
    """Register the learned words of `[NAME=]PATH` entries with the model."""
    for entry in entries:
        name, path = None, entry
        if "=" in entry and not Path(entry).exists():
            name, path = entry.split("=", 1)
        words = embeddings.read(path, model.text.table.shape[1], lambda note: cli.say(f"note: {note}"))
        if name is not None and len(words) > 1:
            raise ValueError(f"{path} holds the words {', '.join(words)}; {name}= cannot rename them all")
        for word, vectors in words.items():
            model.add_word(word if name is None else name, vectors)


def check_prompt(model, prompt, wants_word):
    """The learned words of a prompt; ValueError for none where it wants one, or one that is cut off.

    What will be drawn otherwise than meant is said.
    """
    ids, places = model.tokenizer.encode(prompt), model.tokenizer.length - 2
    if any(i >= model.tokenizer.vocab_size for i in ids[places:]):
        raise ValueError(f"a learned word stands behind the {places} tokens that fit, in {prompt!r}")
    words = [name for name, concept in model.concepts.items() if concept.ids[0] in ids]
    if wants_word and not words:
        known = f"the words are {', '.join(model.concepts)}" if model.concepts else "--words loads them"
        raise ValueError(f"no learned word stands alone in the prompt {prompt!r}; {known}")
    if len(ids) > places:
        cli.say(f"the last {len(ids) - places} tokens of {prompt!r} do not fit and are left out")
    for word in LOOKS_LEARNED.findall(prompt):
        if word not in model.concepts:
            cli.say(f"note: {word!r} is no word that was loaded; --words loads learned words")
    plain = sorted({*re.findall(r"[^\W\d_]{4,}", prompt)} - {*model.concepts})
    if spelled := [word for word in plain if 2 < len(model.tokenizer.encode(word)) > len(word) / 2]:
        cli.say(f"note: the model has no word for {', '.join(spelled)}, and reads it letter by letter")
    return words


def save(picture, file, about):
    """Write a PNG whole or not at all, with how it was made in a text chunk."""
    info = PngInfo()
    info.add_itxt("tinyti", json.dumps(about, ensure_ascii=False))
    with embeddings.atomic_write(file) as stream:
        picture.save(stream, format="PNG", pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
