"""The command line: one section, one question."""

import argparse
import tempfile
from pathlib import Path

from tinyti import whitened
from tinyti.programs.miniature import ROOT, TINY

from .alone import alone
from .quality import quality
from .sides import DTYPES, RECIPE
from .step import step


def write_random(family, folder):
    """A folder of the size of Stable Diffusion 1.5 or 2.1, with random weights and a small vocabulary."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from .. import published

    parts = {"vae": (AutoencoderKL, published.VAE), "unet": (UNet2DConditionModel, published.UNETS[family])}
    for name, part in (parts | {"text_encoder": published.TEXTS[family][1:]}).items():
        published.random_network(*part).save_pretrained(folder / name)
    prediction = {"prediction_type": "v_prediction" if family == "sd21" else "epsilon"}
    DDIMScheduler(**published.SCHEDULER | prediction).save_pretrained(folder / "scheduler")
    published.clip_vocabulary(folder / "tokenizer")


def main():
    """One section."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    add = parser.add_argument
    add("section", choices=SECTIONS)
    add("--weights", default=str(TINY), help="a model folder, sd15 or sd21 (default: the miniature)")
    add("--images", default=str(ROOT / "concepts" / "cat"))
    add("--size", type=int, nargs="+", default=[64], help="pixels per side")
    add("--batch", type=int, nargs="+", default=[4])
    add("--vectors", type=int, nargs="+", default=[1])
    add("--rounds", type=int, default=7, help="how often the sides take turns")
    add("--block", type=int, default=whitened.EVERY, help="steps in a turn; 5 have a share of everything")
    add("--device", default="cpu")
    add("--precision", choices=DTYPES, nargs="+", default=["fp32"], help="of both sides, or ours and theirs")
    add("--sets", nargs="+", default=["cat"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=RECIPE["steps"], help="of the diffusers recipe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.weights in ("sd15", "sd21"):
            write_random(args.weights, Path(folder))
            args.weights = folder
        SECTIONS[args.section](args)


SECTIONS = {f.__name__: f for f in (step, alone, quality)}

if __name__ == "__main__":
    main()
