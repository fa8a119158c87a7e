"""Use learned words:  python sample.py "a painting of S* on the beach" --words words/S"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, too, is one line and status 130
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"sample.py: interrupted\n") and 130))

import json
import re
import sys
import warnings
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tinyti
from tinyti import cli, embeddings
from tinyti.data import grid, to_image
from tinyti.diffusion import SAMPLERS

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
    add("--steps", type=cli.whole(1, 10**5), default=50, help="more are slower and, up to a point, better")
    add("--guidance", type=cli.number(0, 100), default=cli.GUIDANCE,
        help="how far to go beyond what the prompt alone gives; up to 1 there is no guidance")  # fmt: skip
    add("--eta", type=cli.number(0, 1), default=0.0, help="noise that ddim adds: 0 none, 1 as much as ddpm")
    add("--size", type=cli.whole(1, 4096), nargs="+", metavar="PIXELS",
        help="side, or height and width; by default what the model was trained on")  # fmt: skip

    add = parser.add_argument_group("what comes out").add_argument
    add("--count", type=cli.whole(1, 10**4), default=4, help="pictures per prompt")
    add("--seed", type=cli.SEED, default=0, help="of the first picture; the next ones have the next seeds")
    add("--out", type=cli.path, default="pictures", metavar="FOLDER", help="for the pictures and grid.png")
    add("--force", action="store_true", help="replace pictures that are there")
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        raise ValueError(f"--size has {len(args.size)} numbers; give the side, or height and width")
    return args


def main(argv=None):
    """Run, and turn bad input into one line and exit status 2."""
    return cli.run("sample.py", lambda: draw(arguments(argv)))


def draw(args):
    """All pictures, a batch after another: -> exit status."""
    files = picture_files(args)
    model = cli.load_model(args)
    size = args.size or [model.size]
    size = (size[0], size[-1])
    model.check_size(*size)
    model.schedule.timesteps(args.steps)  # refuses more than the model was trained on
    add_words(model, args.words)
    for prompt in args.prompts:
        check_prompt(model, prompt, wants_word=bool(args.words))

    options = {name: getattr(args, name) for name in ("steps", "guidance", "sampler", "eta", "negative")}
    settings = options | {"size": size, "weights": Path(args.weights).name, "words": list(model.concepts)}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.count)
    bar = tqdm(total=len(args.prompts) * -(-args.count // BATCH) * args.steps, unit="step")
    rows = []
    for prompt in args.prompts:
        pictures = []
        for batch in (seeds[i : i + BATCH] for i in range(0, args.count, BATCH)):
            noise = [torch.Generator().manual_seed(seed) for seed in batch]
            for x_0 in tinyti.sample(model, [prompt] * len(batch), generator=noise, size=size, **options):  # noqa: B007
                bar.update()
            for seed, picture in zip(batch, map(to_image, model.decode(x_0))):
                save(picture, files[len(rows)][seed], {"prompt": prompt, "seed": seed, **settings})
                pictures.append(picture)
        rows.append((prompt, pictures))
    bar.close()
    save(grid(rows), Path(args.out) / "grid.png", settings)
    print(f"{len(rows) * args.count} pictures and grid.png in {cli.shown(args.out)}")
    return 0


def picture_files(args):
    """For each prompt {seed: file}; ValueError if something would be overwritten."""
    files = []
    for number, prompt in enumerate(args.prompts, 1):
        words = "-".join(re.findall(r"\w+", prompt)).encode()[:120].decode(errors="ignore") or "picture"
        stem = f"{number:0{max(2, len(str(len(args.prompts))))}}-{words}"
        seeds = range(args.seed, args.seed + args.count)
        files.append({seed: Path(args.out) / f"{stem}-{seed}.png" for seed in seeds})
    wanted = [file for row in files for file in row.values()] + [Path(args.out) / "grid.png"]
    if not args.force and (there := next((file for file in wanted if file.exists()), None)):
        raise ValueError(f"{there} is there already; take --force to replace it, or another --out")
    return files


def add_words(model, entries):
    """Register the learned words of `[NAME=]PATH` entries with the model."""
    for entry in entries:
        name, path = None, entry
        if "=" in entry and not Path(entry).exists():
            name, path = entry.split("=", 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            words = embeddings.read(path, width=model.text.table.shape[1])
        for warning in caught:
            cli.say(f"note: {warning.message}")
        if name is not None and len(words) > 1:
            raise ValueError(f"{path} holds the words {', '.join(words)}; {name}= cannot rename them all")
        for word, vectors in words.items():
            model.add_word(word if name is None else name, vectors)


def check_prompt(model, prompt, wants_word):
    """Refuse a prompt without a whole learned word, and say what will be drawn otherwise than meant."""
    ids, places = model.tokenizer.encode(prompt), model.tokenizer.length - 2
    learned = [i for i in ids if i >= model.tokenizer.vocab_size]
    if wants_word and not learned:
        known = ", ".join(model.concepts)
        raise ValueError(f"no learned word stands alone in the prompt {prompt!r}; the words are {known}")
    if any(i >= model.tokenizer.vocab_size for i in ids[places:]):
        raise ValueError(f"a learned word stands behind the {places} tokens that fit, in {prompt!r}")
    if len(ids) > places:
        cli.say(f"the last {len(ids) - places} tokens of {prompt!r} do not fit and are left out")
    for word in LOOKS_LEARNED.findall(prompt):
        if word not in model.concepts:
            cli.say(f"note: {word!r} is no word that was loaded; --words loads learned words")
    if spelled := cli.spelled_out(model, prompt):
        cli.say(f"note: the model has no word for {', '.join(spelled)}, and reads it letter by letter")


def save(picture, file, about):
    """Write a PNG whole or not at all, with how it was made in a text chunk."""
    info = PngInfo()
    info.add_itxt("tinyti", json.dumps(about, ensure_ascii=False))
    with embeddings.atomic_write(file) as stream:
        picture.save(stream, format="PNG", pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
