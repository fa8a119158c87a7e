"""Make a complete miniature Stable Diffusion from scratch.  The card of weights/tiny names the editions of
this recipe from which its weights come.

    python -m weights.recipe.make

pictures -> tokenizer -> CLIP -> VAE -> latents -> UNet -> probe -> model folder -> card.  Each stage leaves
its result in the work folder and is skipped if that exists; a killed stage continues where it was.
`--stage NAME` ends after that stage, so that CLIP and VAE, which are independent, can train side by side.
Networks this small train faster with one process per core than with one process on all cores:

    torchrun --nproc-per-node=2 -m weights.recipe.make
"""

import argparse
import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import tinyti
from tinyti.diffusion import Schedule
from tinyti.files.folder import read_config
from tinyti.programs.miniature import GUIDANCE, TINY

from .clip import train_clip
from .folder import SCHEDULER_CONFIG, write_folder
from .made_up_words import write_captions
from .measure import sample_images, train_probe, write_card, write_sheet
from .pages import draw_pages
from .training import PROCESSES, RANK, Workspace, to_images
from .unet import Pages, train_unet
from .vae import encode_pages, train_vae
from .vocabulary import make_tokenizer

WORK = Path(__file__).resolve().parent / "run"


@dataclass
class Recipe:
    """The sizes of one run, in samples seen, for a night on two CPU cores.  `--weights` adds another run."""

    size: int = 64  # pixels a side
    pictures: int = 98_304
    unseen: int = 2_048
    own_manners: int = 16_384  # pages that each have a manner of their own
    abstract: int = 24_576
    vocabulary: int = 2_048
    clip_width: int = 128
    clip_layers: int = 4
    clip_patch: int = 8
    clip_batch: int = 128
    clip_samples: int = 400_000
    vae_widths: tuple[int, ...] = (32, 64, 128)
    vae_batch: int = 16
    vae_samples: int = 300_000
    unet_widths: tuple[int, ...] = (32, 64, 128)
    unet_layers: int = 1
    unet_samples: int = 4_000_000
    unet_batch: int = 128
    unet_lr: float = 1e-3
    unet_ema: float = 0.999
    offset_noise: float = 0.2
    empty_prompts: float = 0.1
    probe_batch: int = 128
    probe_samples: int = 500_000
    generated: int = 1_000
    sampling_steps: int = 30
    guidance: float = GUIDANCE


ON_A_GPU = {  # sizes for ten minutes on an H100; train_stage uses larger batches and rates there
    "clip_samples": 1_000_000,
    "vae_samples": 120_000,
    "unet_samples": 2_800_000,
    "probe_samples": 2_000_000,
}


def make_miniature(work, out, last=None):
    """Run the stages in order, up to the stage `last`."""
    recipe = work.recipe
    count = recipe.pictures
    array, captions = draw_pages(work, "pictures", count + recipe.unseen)
    others, _ = draw_pages(work, "abstract", recipe.abstract)
    tokenizer = make_tokenizer(work, [c["caption"] for c in captions[:count]])
    if last == "pictures":
        return
    if last != "vae":
        ids, full = (tokenizer([c[which] for c in captions]) for which in ("caption", "complete"))
        clip = train_clip(work, array, ids, full, captions)
    if last == "clip":
        return
    coder = train_vae(work, array, others)
    if last == "vae":
        return

    own_manners, _ = draw_pages(work, "own-manners", recipe.own_manners)
    latents = encode_pages(work, coder, "pictures", array[:count])
    latents = torch.cat([latents, encode_pages(work, coder, "own-manners", own_manners)])
    coder.config.scaling_factor = 1 / latents[:8192].float().std().item()
    pages = Pages(latents, coder.config.scaling_factor, *write_captions(work))
    schedule = read_config(Schedule, SCHEDULER_CONFIG, Path("scheduler_config.json"))
    prompts = [c["complete"] for c in captions[count : count + 24]]
    drawn = to_images(array[count : count + 24]).cpu()

    def look(model, seen):
        whole = tinyti.LatentDiffusion(tokenizer, model.text, coder, model.unet, schedule)
        images = sample_images(whole, prompts, recipe).cpu()
        pairs = torch.stack([drawn, images], 1).flatten(0, 1)
        work.write("preview.png", lambda p: write_sheet(pairs, 12, p))
        shutil.copy(work / "preview.png", work / f"preview-{seen}.png")

    model = train_unet(work, pages, schedule, copy.deepcopy(clip.text_model), tokenizer(""), look)
    probe = train_probe(work, array, captions)
    if RANK:
        return
    write_folder(out, work, clip, coder, model.text, model.unet)
    write_card(work, out, probe, array, captions)


def main(argv=None):
    """Parse the command line and make the miniature."""
    parser = argparse.ArgumentParser(description="Make the miniature Stable Diffusion of weights/tiny.")
    parser.add_argument("--out", type=Path, default=TINY, help="the model folder to write")
    parser.add_argument("--work", type=Path, default=WORK, help="the folder for unfinished work")
    parser.add_argument("--weights", type=Path, help="continue from the networks of this finished folder")
    parser.add_argument("--stage", choices=("pictures", "clip", "vae"), help="end after this stage")
    recipe = Recipe(**ON_A_GPU) if torch.cuda.is_available() else Recipe()
    for stage in ("clip", "vae", "unet"):
        default = getattr(recipe, f"{stage}_samples")
        parser.add_argument(f"--{stage}-samples", type=int, default=default, help=f"default: {default:,}")
    args = parser.parse_args(argv)
    samples = {f"{stage}_samples": getattr(args, f"{stage}_samples") for stage in ("clip", "vae", "unet")}
    work = Workspace(args.work, replace(recipe, **samples), args.weights)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if work.device == "cuda" else "gloo")
    make_miniature(work, args.out, args.stage)


if __name__ == "__main__":
    main()
