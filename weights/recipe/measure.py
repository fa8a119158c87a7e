"""Measure the finished miniature: a probe that reads pictures, the figures, and the card with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import tinyti
from tinyti.programs.miniature import ROOT

from . import world
from .training import integers, to_images, train_stage, uniform

HEADS = {
    "thing": tuple(world.THINGS),
    "colour": tuple(world.COLOURS),
    "scene": tuple(world.SCENES),
    "style": tuple(world.STYLES),
}
PART_NAMES = sorted({part for parts in world.PARTS.values() for part in parts})
HEADS |= dict.fromkeys(PART_NAMES, ("", *world.SHADES))  # a part's colour, "" if it has none of its own


def class_numbers(captions, head):
    """Return the classes (N,) of one head, from the facts of the pictures."""
    return torch.tensor([HEADS[head].index(c.get(head, "")) for c in captions])


class Probe(torch.nn.Module):
    """A small classifier of all that captions can name: (B, 3, S, S) -> {head: logits}."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [torch.nn.Conv2d(c_in, c_out, 3, 2, 1), torch.nn.GroupNorm(8, c_out), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers, torch.nn.Flatten())
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(2048, len(v)) for name, v in HEADS.items()})

    def forward(self, images):
        x = self.body(images)
        return {name: head(x) for name, head in self.heads.items()}


def train_probe(work, array, captions):
    """Train the probe on rendered pictures, mirrored and moved a little against overfitting."""
    truth = {name: class_numbers(captions, name).to(work.device) for name in HEADS}
    has = torch.tensor([[part in world.PARTS[thing] for thing in HEADS["thing"]] for part in PART_NAMES])
    has = has.to(work.device)[:, truth["thing"]]  # (parts, pictures)
    torch.manual_seed(0)
    model = Probe()

    def loss_of(generator, count):
        rows = integers(work.recipe.pictures, count, generator)
        images = to_images(array[rows])
        images = torch.where(uniform((count, 1, 1, 1), generator) < 0.5, images.flip(-1), images)
        by = (integers(7, 2, generator) - 3).tolist()
        logits = model(images.roll(by, (2, 3)))
        total = 0
        for name in HEADS:
            each = F.cross_entropy(logits[name], truth[name][rows], reduction="none")
            if name in PART_NAMES:  # only for the things that have the part
                each = each * has[PART_NAMES.index(name), rows]
            total = total + each.mean()
        return total

    train_stage(work, "probe", model, loss_of, work.recipe.probe_samples, work.recipe.probe_batch, lr=2e-3)
    return model.cpu().eval().requires_grad_(False)


def named_parts(caption, about):
    """Return the parts of a picture whose colour its caption names."""
    for part in PART_NAMES:
        shade, other = about.get(part, ""), about.get("more patches", "")
        phrase = f"{shade} and {other} patches" if part == "patches" and other else f"{shade} {part}"
        if part == "more patches":
            phrase = f" and {shade} patches"
        if shade and phrase in caption:
            yield part


@torch.no_grad()
def accuracy(model, images, captions, prompts):
    """Return the share of pictures that the probe reads right, for thing, colour, scene and style.

    "detail" is the share of right answers among all colours of parts that the prompts name.
    """
    logits = [model(x) for x in images.split(256)]
    right = {}
    for name in HEADS:
        read = torch.cat([part[name] for part in logits]).argmax(1)
        right[name] = read == class_numbers(captions, name)
    named = [(i, part) for i, c in enumerate(captions) for part in named_parts(prompts[i], c)]
    figures = {name: right[name].float().mean().item() for name in ("thing", "colour", "scene", "style")}
    return figures | {"detail": float(np.mean([right[part][i].item() for i, part in named]))}


@torch.no_grad()
def psnr(vae, images):
    """Return each picture's PSNR in dB after encoding and decoding: (B, 3, H, W) -> (B,)."""
    errors = [
        (vae.decode(vae.encode(x)[0]).clamp(-1, 1) - x).div(2).square().mean((1, 2, 3))
        for x in images.split(64)
    ]
    return -10 * torch.cat(errors).log10()


def sample_images(model, prompts, recipe, seed=0):
    """Draw a picture for each prompt, (B, 3, S, S) in [-1, 1]."""
    options = {"steps": recipe.sampling_steps, "guidance": recipe.guidance, "sampler": "dpm++"}
    *_, x_0 = tinyti.sample(model, prompts, generator=torch.Generator().manual_seed(seed), **options)
    return model.decode(x_0).float()


def write_sheet(images, columns, path):
    """Lay pictures (B, 3, S, S) out in rows and write them to a PNG."""
    rows = ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()
    rows = rows.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(rows.numpy()).save(path, format="PNG", optimize=True)


def read_sets():
    """Return the pictures of every set of concepts/, {name: (10, 3, S, S)}."""
    root = ROOT / "concepts"
    found = {}
    for name in json.loads((root / "concepts.json").read_text()):
        files = sorted((root / name).rglob("*.png"))
        found[name] = torch.cat([to_images(np.array(Image.open(f).convert("RGB"))[None]) for f in files])
    return found


@torch.no_grad()
def measure_folder(work, out, probe, array, captions):
    """Measure the finished folder, as `tinyti.load` gives it, on pictures no stage has seen: -> figures."""
    recipe, model = work.recipe, tinyti.load(out, work.device)
    unseen = [i for i in range(recipe.pictures, len(array)) if not captions[i]["manner"]]
    images, about = to_images(array[unseen]).cpu(), [captions[i] for i in unseen]
    prompts = [c["complete"] for c in about]

    towers, words = tinyti.load_clip(out / "clip")
    a = torch.cat([towers.encode_image(x) for x in images.split(256)])
    b = [towers.encode_text(words([c["caption"] for c in about[i : i + 256]])) for i in range(0, len(a), 256)]
    b = torch.cat(b)
    size = min(500, len(a))
    quizzes = [a[i : i + size] @ b[i : i + size].T for i in range(0, len(a) - size + 1, size)]
    right = torch.cat([quiz.argmax(1) == torch.arange(size) for quiz in quizzes])

    count = recipe.generated
    batches = [(i, prompts[i : min(i + 50, count)]) for i in range(0, count, 50)]
    drawn = torch.cat([sample_images(model, batch, recipe, seed).cpu() for seed, batch in batches])
    write_sheet(torch.stack([images[:24], drawn[:24]], 1).flatten(0, 1), 12, work / "contact_sheet.png")
    write_sheet(drawn[:100], 10, work / "generated.png")
    coder = model.vae.cpu().float()
    return {
        "real": accuracy(probe, images, about, prompts),
        "made": accuracy(probe, drawn, about[:count], prompts),
        "psnr": psnr(coder, images).mean().item(),
        "sets": {name: psnr(coder, pictures).mean().item() for name, pictures in read_sets().items()},
        "retrieval": right.float().mean().item(),
    }


def write_card(work, out, probe, array, captions):
    """Measure the folder, and write its README.md from card.md and the figures."""
    measured = measure_folder(work, out, probe, array, captions)
    print(json.dumps(measured, indent=1))
    recipe, costs = work.recipe, json.loads((work / "costs.json").read_text())

    def size(part):
        return sum(w.numel() for w in load_file(next((out / part).glob("*.safetensors"))).values())

    lines = ["| stage | samples | minutes | on |", "|---|---|---|---|"]
    for stage, cost in costs.items():
        lines.append(f"| {stage} | {cost['samples']:,} | {cost['seconds'] / 60:.0f} | {cost['device']} |")
    sets = measured["sets"]
    text = (Path(__file__).parent / "card.md").read_text().format(
        **measured,
        worst=min(sets, key=sets.get),
        least=min(sets.values()),
        text_parameters=size("text_encoder"),
        clip_parameters=size("clip"),
        vae_parameters=size("vae"),
        unet_parameters=size("unet"),
        megabytes=sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6,
        guidance=recipe.guidance,
        generated=recipe.generated,
        sampling_steps=recipe.sampling_steps,
        unseen=recipe.unseen,
        layers=recipe.clip_layers,
        width=recipe.clip_width,
        patch=recipe.clip_patch,
        vocabulary=len(json.loads((out / "tokenizer" / "vocab.json").read_text())),
        size=recipe.size,
        side=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
        widths=", ".join(map(str, recipe.unet_widths)),
        things=", ".join(world.THINGS),
        colours=", ".join(world.COLOURS),
        shades=", ".join(list(world.SHADES)[len(world.COLOURS) :]),
        characters=len(world.CHARACTERS),
        manners=len(world.MANNERS),
        own_manners=recipe.own_manners,
        scenes=", ".join(list(world.SCENES)[1:]),
        styles=", ".join(world.STYLES),
        costs="\n".join(lines),
    )  # fmt: skip
    shutil.copy(work / "contact_sheet.png", out / "contact_sheet.png")
    (out / "README.md").write_text(text)
