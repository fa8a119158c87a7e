"""Use learned words:  python sample.py "a painting of S* on the beach" --words words/S"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import tinyti
from tinyti import embeddings
from tinyti.data import grid, to_image
from tinyti.diffusion import SAMPLERS
from tinyti.model import pick_device

HERE = Path(__file__).resolve().parent


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="what to draw; learned words stand in it by their names"
    )
    add = parser.add_argument_group("what to draw with").add_argument
    add(
        "--words",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help="folders of train.py, or files of any kind in use; NAME= renames the word",
    )
    add(
        "--weights",
        default=str(HERE / "weights" / "tiny"),
        metavar="PATH",
        help="model folder or single file, see weights/README.md",
    )
    add("--tokenizer", metavar="FOLDER", help="the vocabulary, for a single file that has none beside it")
    add(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the model predicts, for single files of Stable Diffusion 2",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the networks; by default bf16 on GPUs that have it, else fp32",
    )

    add = parser.add_argument_group("how to draw").add_argument
    add("--negative", default="", metavar="PROMPT", help="what guidance leads away from")
    add("--sampler", choices=SAMPLERS, default="ddim", help="dpm++ needs the fewest steps, ddpm the most")
    add("--steps", type=int, default=50, help="more are slower and, up to a point, better")
    add("--guidance", type=float, default=7.5, help="how strictly to follow the prompt; 1 is not at all")
    add("--eta", type=float, default=0.0, help="noise that ddim adds on the way: 0 none, 1 as much as ddpm")
    add(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width; by default what the model was trained on",
    )

    add = parser.add_argument_group("what comes out").add_argument
    add("--count", type=int, default=4, help="pictures per prompt")
    add("--seed", type=int, default=0, help="of the first picture; the next ones have the next seeds")
    add("--out", default="pictures", metavar="FOLDER", help="for the pictures and grid.png")
    args = parser.parse_args(argv)
    for flag in ("count", "steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}; it must be at least 1")
    return args


def add_words(model, entries):
    """Register the learned words of `[NAME=]PATH` entries with the model."""
    for entry in entries:
        name, path = None, entry
        if "=" in entry and not Path(entry).exists():
            name, path = entry.split("=", 1)
        words = embeddings.read(path, width=model.text.table.shape[1])
        if name and len(words) > 1:
            raise ValueError(
                f"{path} holds {len(words)} words ({', '.join(words)}), so {name}= cannot rename it"
            )
        for word, vectors in words.items():
            model.add_word(name or word, vectors)


def check(args, model):
    """Refuse prompts without a learned word where some were given, and sizes that do not fit."""
    for prompt in args.prompts:
        ids = model.tokenizer.encode(prompt)
        if args.words and not any(i >= model.tokenizer.vocab_size for i in ids):
            known = ", ".join(model.concepts)
            raise ValueError(f"no learned word stands alone in the prompt {prompt!r}; the words are {known}")
        if cut := model.tokenizer.overflow(prompt):
            tqdm.write(f"the last {cut} tokens of {prompt!r} do not fit and are left out", file=sys.stderr)
    model.schedule.timesteps(
        args.steps
    )  # refuses more than the model was trained on, before anything is drawn
    size = args.size or [model.size]
    if len(size) > 2 or any(side <= 0 or side % model.vae.factor for side in size):
        raise ValueError(
            f"--size {' '.join(map(str, size))}: give one or two multiples of {model.vae.factor}"
        )
    return (size[0], size[-1])


def draw(args):
    """All pictures, a batch per prompt and at most 8 at once: -> exit status."""
    device, dtype = pick_device(args.device, args.precision)
    model = tinyti.load(args.weights, device, dtype, args.prediction, args.tokenizer)
    add_words(model, args.words)
    size = check(args, model)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("prompts", "out", "count", "seed", "device")}
    options = {k: getattr(args, k) for k in ("steps", "guidance", "sampler", "eta", "negative")}
    seeds = [args.seed + i for i in range(args.count)]
    bar = tqdm(total=len(args.prompts) * -(-args.count // 8) * args.steps, unit="step")
    rows = []
    for number, prompt in enumerate(args.prompts):
        pictures = []
        for first in range(0, args.count, 8):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + 8]]
            batch = [prompt] * len(generators)
            for x_0 in tinyti.sample(model, batch, generator=generators, size=size, **options):  # noqa: B007
                bar.update()
            pictures += [to_image(pixels) for pixels in model.decode(x_0)]
        for seed, picture in zip(seeds, pictures):
            about = PngInfo()
            about.add_itxt(
                "tinyti", json.dumps({"prompt": prompt, "seed": seed, **settings}, ensure_ascii=False)
            )
            stem = re.sub(r"[^\w]+", "-", prompt).strip("-")[:60] or "picture"
            save(picture, out / f"{number + 1:02d}-{stem}-{seed}.png", about)
        rows.append((prompt, pictures))
    bar.close()
    save(grid(rows), out / "grid.png")
    print(f"{sum(len(p) for _, p in rows)} pictures and grid.png in {os.path.relpath(out)}")
    return 0


def save(picture, path, about=None):
    """Write to a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, format="PNG", pnginfo=about)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv=None):
    """Run, and turn bad input into one line and exit status 2."""
    try:
        return draw(arguments(argv))
    except torch.cuda.OutOfMemoryError:
        print("sample.py: out of GPU memory; take a smaller --size or --count", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
