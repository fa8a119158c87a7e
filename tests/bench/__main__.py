"""The command line: each section answers one question."""

import argparse
import tempfile
from pathlib import Path

from tinyti import whitened
from tinyti.diffusion import SAMPLERS
from tinyti.programs import cli
from tinyti.programs.miniature import ROOT, TINY

from .alone import alone
from .dreambench import dreambench
from .quality import quality
from .sides import DTYPES, RECIPE
from .step import step


def write_random(family, folder):
    """Write a model as large as Stable Diffusion 1.5 or 2.1, with random weights and a small vocabulary."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from .. import published

    parts = {"vae": (AutoencoderKL, published.VAE), "unet": (UNet2DConditionModel, published.UNETS[family])}
    for name, part in (parts | {"text_encoder": published.TEXTS[family][1:]}).items():
        published.random_network(*part).save_pretrained(folder / name)
    prediction = {"prediction_type": "v_prediction" if family == "sd21" else "epsilon"}
    DDIMScheduler(**published.SCHEDULER | prediction).save_pretrained(folder / "scheduler")
    published.clip_vocabulary(folder / "tokenizer")


def arguments(argv=None):
    """The command line."""
    parser = cli.Parser("What tinyti costs and what its words are worth.")
    parser.prog = "python -m tests.bench"
    add = parser.add_argument
    add("section", choices=SECTIONS)
    add("--weights", default=str(TINY), help="a model folder, sd15 or sd21 (default: the miniature)")
    add("--images", default=str(ROOT / "concepts" / "cat"))
    add("--size", type=int, nargs="+", default=[64], help="pixels per side")
    add("--batch", type=int, nargs="+", default=[4])
    add("--vectors", type=int, nargs="+", default=[1])
    add("--rounds", type=int, default=7, help="how often the sides take turns")
    add("--block", type=int, default=whitened.EVERY, help="steps in a turn; 5 have one eigendecomposition")
    add("--device", default="cpu")
    add("--precision", choices=DTYPES, nargs="+", default=["fp32"], help="of both sides, or ours and theirs")
    add("--sets", nargs="+", default=["cat"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, default=RECIPE["steps"], help="of the diffusers recipe")
    add = parser.add_argument_group("dreambench").add_argument
    add("--data", type=cli.path_type, metavar="FOLDER", help="google/dreambooth, or its folder dataset")
    add("--clip", type=cli.path_type, metavar="FOLDER", help="by default clip/ beside the weights")
    add("--dino", type=cli.path_type, metavar="FOLDER", help="facebook/dino-vits16, see weights/README.md")
    add("--out", type=cli.path_type, metavar="FOLDER", default=str(ROOT / "words" / "dreambench"))
    add("--subjects", nargs="+", metavar="NAME", help="by default all; with --grid four")
    add("--grid", action="store_true", help="settings of ours against diffusers' recipe")
    add("--check", action="store_true", help="only compare the real pictures; nothing is drawn")
    add("--class-word", action=argparse.BooleanOptionalAction, default=False, help="'a S* dog', not 'a S*'")
    add("--pictures", type=cli.number_type(1, 999, int), default=4, metavar="N", help="of each prompt")
    add("--sampler", choices=SAMPLERS, default="ddim")
    add("--draw-steps", type=cli.number_type(1, 1000, int), default=50, metavar="N")
    add("--guidance", type=cli.number_type(0, 100), help="by default 7.5, of the miniature 3")
    return parser.parse_args(argv)


def main(argv=None):
    """Run one section; bad input gives one line and exit status 2."""
    return cli.run_program("python -m tests.bench", lambda: bench(arguments(argv)))


def bench(args):
    """Run a section on the weights; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        if args.weights in ("sd15", "sd21"):
            write_random(args.weights, Path(folder))
            args.weights = folder
        return SECTIONS[args.section](args) or 0


SECTIONS = {f.__name__: f for f in (step, alone, quality, dreambench)}

if __name__ == "__main__":
    cli.leave(main)
