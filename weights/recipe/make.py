"""From nothing to weights/tiny: a complete Stable Diffusion in miniature.

    python weights/recipe/make.py

pictures -> tokenizer -> CLIP -> VAE -> latents -> UNet -> model folder -> probe -> card.  Every stage leaves
its result in the run folder and is passed over when that is there; one that was killed goes on where it was.
`--stage NAME` ends after that stage, so that CLIP and VAE, which need nothing of each other, can be trained
side by side.  Networks this small train faster with one process a core than with one process on all of them:

    torchrun --nproc-per-node=2 weights/recipe/make.py
"""

import argparse
import copy
import json
import random
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import abstract
import measure
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, trainers
from training import PROCESSES, RANK, Run, in_turn, integers, to_images, train, uniform

import tinyti
from tinyti.diffusion import Schedule, randn
from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES
from tinyti.networks.clip import TextConfig
from tinyti.networks.layers import Attention
from tinyti.networks.unet import UNet, UNetConfig
from tinyti.networks.vae import VAE, VAEConfig
from tinyti.networks.vision import CLIP, CLIPConfig, Preprocessing, VisionConfig
from tinyti.programs.miniature import GUIDANCE
from tinyti.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = "S*"  # a made-up one, which means something else in every caption
MADE_UP = "made up"  # how the name of a manner begins that a single page has
WEIGHTS = {  # where a finished folder keeps what a stage has trained
    "clip": "clip/model.safetensors",
    "text": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}
SCHEDULE = {  # Stable Diffusion's own, but for the spacing: it starts at the noisiest step (2305.08891)
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


@dataclass
class Recipe:
    """The sizes of one go, in samples seen: for two CPU cores and a night.  `--weights` adds another go."""

    size: int = 64  # pixels a side
    pictures: int = 98_304
    unseen: int = 2_048
    mannered: int = 16_384
    abstract: int = 24_576
    vocabulary: int = 2_048
    clip_width: int = 128
    clip_layers: int = 4
    clip_patch: int = 8
    clip_samples: int = 400_000
    vae_widths: tuple[int, ...] = (32, 64, 128)
    vae_samples: int = 300_000
    unet_widths: tuple[int, ...] = (32, 64, 128)
    unet_layers: int = 1
    unet_samples: int = 4_000_000
    unet_batch: int = 128
    unet_lr: float = 1e-3
    unet_ema: float = 0.999
    offset_noise: float = 0.2
    empty_prompts: float = 0.1
    probe_samples: int = 500_000
    generated: int = 1_000
    guidance: float = GUIDANCE


ON_A_GPU = {  # sizes for ten minutes of an H100; training.train has the batches and rates
    "clip_samples": 1_000_000,
    "vae_samples": 120_000,
    "unet_samples": 2_800_000,
    "probe_samples": 2_000_000,
}


# -- pictures ------------------------------------------------------------------------------------------


def _page(seed, size):
    """A picture, and what is said of it: a caption, a complete one, and the truth."""
    image, caption, attrs = world.picture(seed, size)
    complete = world.caption(attrs, random.Random(seed), complete=True)
    return image, {"caption": caption, "complete": complete, **world.named(attrs)}


def mannered(seed):
    """Attributes of a page in a manner that no other page has."""
    lot = random.Random(f"mannered {seed}")
    return world.attributes(lot) | {"style": lot.choice(("photo", "painting")), "manner": f"{MADE_UP} {seed}"}


DRAW = {  # what is drawn of a seed, and what is said of it
    "pictures": _page,
    "mannered": lambda seed, size: (world.draw(mannered(seed), size), None),
    "abstract": lambda seed, size: (abstract.picture(seed, size), None),
}


def _render(args):
    kind, seeds, size = args
    drawn = [DRAW[kind](seed, size) for seed in seeds]
    return np.stack([np.asarray(image) for image, _ in drawn]), [said for _, said in drawn if said]


def render(run, kind, total):
    """Draw `total` pictures, a process a core: -> a tensor, (N, S, S, 3) uint8, and what is said of them."""
    captions = run / f"{kind}.json"
    if not captions.exists():
        began = time.time()
        jobs = [(kind, range(i, min(i + 512, total)), run.recipe.size) for i in range(0, total, 512)]
        with ProcessPoolExecutor() as pool:
            parts = list(pool.map(_render, jobs))
        pixels = np.concatenate([images for images, _ in parts])
        run.write(f"{kind}.npy", lambda p: np.save(p.open("wb"), pixels))
        said = [caption for _, lines in parts for caption in lines]
        run.write(captions.name, lambda p: p.write_text(json.dumps(said)))
        run.cost(kind, total, time.time() - began)
    return run.tensor(run / f"{kind}.npy"), json.loads(captions.read_text())


# -- tokenizer -----------------------------------------------------------------------------------------


def tokenizer(run, captions):
    """A byte-pair vocabulary, from the captions and the paper's templates, in CLIP's form."""
    folder = run / "tokenizer"
    if run.start:
        shutil.copytree(run.start / "tokenizer", folder, dirs_exist_ok=True)
    if not (folder / "merges.txt").exists():
        text = [c["caption"] for c in captions]
        text += [t.format(thing) for t in OBJECT_TEMPLATES + STYLE_TEMPLATES for thing in world.THINGS] * 20
        text += [f"a {shade} {part}" for shade in world.SHADES for part in measure.PARTS]
        core = Core(models.BPE(end_of_word_suffix="</w>"))
        words = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        core.pre_tokenizer = pre_tokenizers.Sequence(words)
        core.train_from_iterator(text, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
        merges = json.loads(core.to_str())["model"]["merges"]
        # All bytes, inside a word and at its end, come first: any text can be spelt.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        letters += [letter + "</w>" for letter in letters]
        merges = merges[: run.recipe.vocabulary - len(letters) - 2]
        entries = [*letters, *("".join(pair) for pair in merges), START, END]
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        vocabulary = json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False)
        lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
        folder.mkdir(exist_ok=True)
        (folder / "vocab.json").write_text(vocabulary)
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        run.write("tokenizer/merges.txt", lambda p: p.write_text(lines))
    return Tokenizer.from_folder(folder)


# -- CLIP ----------------------------------------------------------------------------------------------


def clip(run, array, ids, full, captions):
    """Both towers, contrastively (2103.00020, figure 3): a batch is a quiz of 128 pairs.

    Two of three quizzes are hard ones: their pictures agree in two of colour, scene and style, or in thing
    and colour; the latter are told apart by complete captions.  Otherwise the towers live off backgrounds:
    they hardly learn what a thing is, and not at all what the eyes of this cat are like.
    """
    recipe = run.recipe
    heads, trained = ("thing", "colour", "scene", "style"), captions[: recipe.pictures]
    drawn = {head: measure.numbers(trained, head).to(run.device) for head in heads}
    ids, full = ids.to(run.device), full.to(run.device)
    alike = [("colour", "scene"), ("colour", "style"), ("scene", "style"), *[("thing", "colour")] * 3]
    tower = {
        "hidden_size": recipe.clip_width,
        "intermediate_size": 4 * recipe.clip_width,
        "num_hidden_layers": recipe.clip_layers,
        "num_attention_heads": recipe.clip_width // 32,
        "hidden_act": "gelu",
    }
    text = TextConfig(vocab_size=int(ids.max()) + 1, eos_token_id=int(ids.max()), **tower)
    vision = VisionConfig(image_size=recipe.size, patch_size=recipe.clip_patch, **tower)
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocessing(resize=recipe.size, crop=recipe.size, mean=half, std=half)
    torch.manual_seed(0)
    model = initialise(CLIP(CLIPConfig(text, vision, recipe.clip_width), preprocess))
    # The tower is causal: nothing behind the end of the longest caption can change the result.
    used = max(int((each == text.eos_token_id).int().argmax(1).max()) + 1 for each in (ids, full))

    def loss_of(generator, count):
        rows = integers(recipe.pictures, count, generator)
        kind = int(integers(9, (), generator))
        if kind < len(alike):
            same = torch.stack([drawn[k] == drawn[k][rows[0]] for k in alike[kind]]).all(0).nonzero()[:, 0]
            rows = same[integers(len(same), count, generator)]
        by_details = kind < len(alike) and "thing" in alike[kind]
        words = (full if by_details else ids)[rows, :used]
        a, b = model.encode_image(to_images(array[rows])).float(), model.encode_text(words).float()
        with torch.autocast(run.device, enabled=False):
            logits = model.logit_scale.exp().clamp(max=100) * a @ b.T
        truth = torch.arange(len(rows), device=run.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    begin = run.start and run.start / WEIGHTS["clip"]
    train(run, "clip", model, loss_of, recipe.clip_samples, 128, lr=1e-3, begin=begin)
    return model.eval().requires_grad_(False)


def initialise(model):
    """CLIP's own initial scale: small embeddings, residual branches thinner the deeper the tower."""
    for name, p in model.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight", "class_embedding")):
            torch.nn.init.normal_(p, std=0.02)
        elif name.endswith(("out_proj.weight", "fc2.weight")):
            layers = model.config.text_config.num_hidden_layers
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (2 * layers) ** -0.5)
    return model


# -- VAE -----------------------------------------------------------------------------------------------


def recoloured(images, generator):
    """Half of the pictures (B, 3, S, S) as they are; the others paler, with swapped or inverted channels."""
    count = len(images)
    swap = uniform((count, 3), generator).argsort(1)
    sign = integers(2, (count, 3, 1, 1), generator) * 2 - 1
    low = uniform((count, 3, 1, 1), generator) * 0.6 + 0.4  # of the contrast that is left
    other = images[torch.arange(count, device=images.device)[:, None], swap] * sign * low
    other = other + (1 - low) * (uniform((count, 3, 1, 1), generator) * 2 - 1)
    return torch.where(uniform((count, 1, 1, 1), generator) < 0.5, images, other)


def edges(images):
    """Differences of neighbouring pixels, across and down, of (B, 3, S, S)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def vae(run, array, others):
    """Squared error of pixels and of edges, and a Kullback-Leibler term just large enough for smooth latents.

    Seven of ten pictures are the world's, half of them recoloured; the others show nothing in particular.
    """
    recipe = run.recipe
    torch.manual_seed(0)
    model = VAE(VAEConfig(block_out_channels=recipe.vae_widths, layers_per_block=1, norm_num_groups=8))

    def loss_of(generator, count):
        few = count * 3 // 10
        images = recoloured(to_images(array[integers(recipe.pictures, count - few, generator)]), generator)
        images = torch.cat([images, to_images(others[integers(len(others), few, generator)])])
        mean, std = model.encode(images)
        mean, std = mean.float(), std.float()
        z = mean + std * randn(mean.shape, generator, mean)
        kl = (mean**2 + std**2 - 1 - 2 * std.log()).mean() / 2
        decoded = model.decode(z).float()
        sharp = sum(F.mse_loss(a, b) for a, b in zip(edges(decoded), edges(images)))
        return F.mse_loss(decoded, images) + 0.25 * sharp + 1e-4 * kl

    begin = run.start and run.start / WEIGHTS["vae"]
    train(run, "vae", model, loss_of, recipe.vae_samples, 16, 1e-3, begin, ema=0.999)
    return model.eval().requires_grad_(False)


# -- UNet ----------------------------------------------------------------------------------------------


def encoded(run, coder, kind, count, array):
    """A sample of each picture's latents, (count, C, h, w) in fp16, computed once and kept."""
    path, size = run / f"{kind}-latents.npy", 32 if run.device == "cpu" else 1024
    if not path.exists():
        began, parts = time.time(), []
        for i in range(0, count, size):
            with torch.no_grad(), torch.autocast(run.device, torch.bfloat16):
                mean, std = coder.encode(to_images(array[i : min(i + size, count)]))
            z = mean + std * randn(mean.shape, torch.Generator().manual_seed(i), mean)
            parts.append(z.half().cpu())
        run.write(path.name, lambda p: np.save(p.open("wb"), torch.cat(parts).numpy()))
        run.cost(f"{kind} encoded", count, time.time() - began)
    return run.tensor(path)


def features(attrs):
    """What a made-up word stands for, in numbers: an individual, or a manner if the page's is made up."""
    if attrs["manner"].startswith(MADE_UP):
        return [0.0] * len(of_individual(attrs)) + of_manner(attrs["manner"])
    return of_individual(attrs) + [0.0] * len(of_manner(world.MANNERS[0]))


# Where `of_individual` has four numbers for each part and, behind nine proportions, five for each patch.
COLOURS = slice(len(world.THINGS), len(world.THINGS) + 4 * (1 + len(measure.PARTS)))
PATCHES = slice(COLOURS.stop + 9, COLOURS.stop + 9 + 4 * 5)


def of_individual(attrs):
    """Its thing, the colours it has (1 and three levels for each part), its proportions and its patches."""
    look = attrs["identity"]
    found = [1.0 * (attrs["thing"] == thing) for thing in world.THINGS]
    for part in ("base", *measure.PARTS):
        colour = look.get(part)
        found += [1.0, *(level / 127.5 - 1 for level in colour)] if colour else [0.0] * 4
    sizes = ("ear size", "head", "body", "eye size", "eye height", "grain")
    found += [8 * (look[size] - 1) for size in sizes]
    found += [2 * look["lift"] - 1, 5 * look["lean"], look["petals"] - 6.0]
    for x, y, radius, squeeze, second in look["marks"]:
        mark = [4 * x, 4 * y, 20 * (radius - 0.31), 5 * (squeeze - 1), 2.0 * second - 1]
        found += mark if look.get("patches") else [0.0] * 5
    return found


def of_manner(manner):
    """Its palette, the colour of its lines, its texture and how wide that is."""
    *palette, part, line, texture, period = world.tones(manner)
    found = [level / 127.5 - 1 for colour in (*palette, line) for level in colour]
    found += [1.0 * (texture == other) for other in ("none", "hatch", "grid", "dots")]
    return [*found, 4 * part - 3, period - 10.0]


def said(attrs, seed):
    """Eight captions of a page: two leave things out, two say all there is and have WORD besides.

    In the last four WORD alone stands for the individual; two of them leave things out, two nothing else.  If
    the page's manner is made up, WORD stands for that in all eight.
    """
    lot = random.Random(f"said {seed}")
    if attrs["manner"].startswith(MADE_UP):
        return [with_word(attrs | {"manner": WORD}, lot) for _ in range(8)]
    captions = [world.caption(attrs, lot) for _ in range(2)]
    both = attrs | {"colour": f"{WORD} {attrs['colour']}"}
    captions += [world.caption(both, lot, complete=True, most=len(world.SHADES)) for _ in range(2)]
    captions += [with_word(attrs | {"who": WORD}, lot) for _ in range(2)]
    alone = attrs | {"thing": WORD, "colour": "", "details": {}}
    return captions + [world.caption(alone, lot, complete=True) for _ in range(2)]


def with_word(attrs, lot):
    """A caption that does have WORD in it."""
    while WORD not in (caption := world.caption(attrs, lot)):
        pass
    return caption


def _captioned(args):
    folder, pictures, numbers = args
    words = Tokenizer.from_folder(folder)
    words.add(WORD)
    pages = [world.attributes(random.Random(n)) if n < pictures else mannered(n - pictures) for n in numbers]
    ids = [words(said(attrs, n)).short().numpy() for n, attrs in zip(numbers, pages)]
    return np.stack(ids), np.array([features(attrs) for attrs in pages], np.float32)


def captioned(run):
    """The pages' captions, ids (N, 8, 77), and what their made-up words stand for (N, F), computed once."""
    path, pictures = run / "captioned.pt", run.recipe.pictures
    if not path.exists():
        total = pictures + run.recipe.mannered
        parts = (range(i, min(i + 512, total)) for i in range(0, total, 512))
        with ProcessPoolExecutor() as pool:
            made = list(pool.map(_captioned, ((run / "tokenizer", pictures, part) for part in parts)))
        ids, found = (torch.from_numpy(np.concatenate(each)) for each in zip(*made))
        run.write(path.name, lambda p: torch.save([ids, found], p))
    return torch.load(path)


class Reader(torch.nn.Module):
    """What each part is like, read from a context as the UNet reads it: one attention, a query for each part.

    The loss on pictures says next to nothing of a part of a few pixels.  This asks for its colour, whether a
    caption spells it out or a made-up word means it: so the text transformer learns to keep the parts apart,
    one word's as those of a caption, which the UNet knows how to draw.  Thrown away at the end, like names.
    """

    def __init__(self, width):
        super().__init__()
        self.parts = torch.nn.Parameter(torch.randn(1 + len(measure.PARTS) + 4, width))
        self.attention = Attention(width, 4, width)
        self.out = torch.nn.Linear(width, 5)

    def forward(self, context, found, whole):
        """context (B, 77, D), features (B, F), which to ask (B,) -> squared error of parts and patches."""
        colours, patches = (found[:, part].unflatten(1, (-1, n)) for part, n in ((COLOURS, 4), (PATCHES, 5)))
        has = colours[..., :1].expand(-1, -1, 3)
        there = torch.cat([torch.ones_like(has[..., :1]), has, torch.zeros_like(has[..., :1])], -1)
        there = torch.cat([there, (patches != 0).any(-1, keepdim=True).expand_as(patches)], 1)
        truth = torch.cat([F.pad(colours, (0, 1)), patches], 1)
        read = self.out(self.attention(self.parts.expand(len(context), -1, -1), context)).float()
        there = there * whole[:, None, None]
        return (there * (read - truth).square()).sum() / there.sum().clamp(min=1)


class Painter(torch.nn.Module):
    """What the last stage trains: the UNet, the text transformer that it reads, made-up words' vectors."""

    def __init__(self, unet, text, count):
        super().__init__()
        self.unet, self.text, self.longest = unet, text, 4 * text.table.norm(dim=1).median().item()
        self.names = torch.nn.Linear(count, text.config.hidden_size)
        torch.nn.init.normal_(self.names.weight, std=0.25 * self.longest / count**0.5)
        self.names.bias.data.copy_(text.table.mean(0))
        self.reader = Reader(text.config.hidden_size)

    def words(self, features, generator):
        """features (B, F) -> the vectors (B, D) of made-up words, not quite the same each time."""
        vectors = self.names(features).float()
        vectors = vectors * (self.longest / vectors.norm(dim=1, keepdim=True)).clamp(max=1)
        noise = randn(vectors.shape, generator, vectors)
        return vectors + 0.1 * vectors.detach().norm(dim=1, keepdim=True) / noise.shape[1] ** 0.5 * noise

    def context(self, ids, features, generator):
        """Token ids (B, 77), some of them WORD's, -> (B, 77, D)."""
        made_up = (ids >= self.text.config.vocab_size)[..., None]
        return self.text(torch.where(made_up, self.words(features, generator)[:, None], self.text.embed(ids)))


def unet(run, latents, scale, ids, found, text, empty, look):
    """Noise prediction on scaled latents, as in tinyti.inversion, but here the weights learn.

    The text transformer is trained along, as in the latent diffusion of the paper (2112.10752, section
    4.3), from where CLIP has left it.  A noisy picture is seen twice, with one of its captions in words and
    one with WORD for the individual, or the manner (`ids`, N, 4 + 4, 77).  Its vector is a linear function,
    trained along as well, of what makes it, `found` (N, F).  So the networks learn to read an individual
    from the one vector of one word, whichever: what Textual Inversion asks of them, and a vocabulary has
    room for a few hundred names only.

    Where the words say everything and WORD is there besides, the prediction with WORD alone is drawn to the
    one with them.  Both see the same noise, so their difference is free of it: small parts, which are next
    to nothing in the loss on pictures, soon have the colours that the UNet knows how to draw from words.

    Offset noise (a constant per picture and channel on top of eps) teaches the network that the initial
    noise says nothing of the picture's mean colour.  The loss has min-SNR weights (2303.09556, gamma 5): a
    small network spends less on the last, fine steps.  Where noise outweighs the picture they are
    2310.08442's, for there it is decided what colour a part will have.
    """
    recipe, schedule = run.recipe, Schedule.from_config(SCHEDULE)
    torch.manual_seed(0)
    model = UNet(unet_config(recipe))
    for name, p in model.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            torch.nn.init.zeros_(p)  # every block begins as the identity
    for part, name in ((model, "unet"), (text, "text")) if run.start else ():
        part.load_state_dict({k: w.float() for k, w in load_file(run.start / WEIGHTS[name]).items()})
    painter = Painter(model, text.requires_grad_(True), found.shape[1])
    layout = torch.channels_last if run.device == "cuda" else torch.contiguous_format  # each the faster
    model.to(memory_format=layout)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weights = (snr.clamp(max=5) / snr * snr.clamp(0.1, 1).rsqrt()).float().to(run.device)
    ids, found, empty = ids.to(run.device), found.to(run.device), empty.to(run.device)

    def loss_of(generator, count):
        rows = integers(len(latents), count // 2, generator)  # in words and with WORD
        which = integers(4, count // 2, generator)
        words = torch.cat([ids[rows, which], ids[rows, which + 4]]).long()
        dropped = uniform(count, generator) < recipe.empty_prompts
        words = torch.where(dropped[:, None], empty, words)
        meant = found[rows].repeat(2, 1)
        context = painter.context(words, meant, generator)
        x_0 = scale * latents[rows].float().repeat(2, 1, 1, 1)
        t = integers(schedule.num_train_timesteps, count // 2, generator).repeat(2)
        eps = randn((count // 2, *x_0.shape[1:]), generator, x_0)
        eps = eps + recipe.offset_noise * randn((*eps.shape[:2], 1, 1), generator, x_0)
        eps, weight = eps.repeat(2, 1, 1, 1), weights[t]
        x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=layout)
        predicted = model(x_t, t, context).float()
        error = weight * (predicted - schedule.target(x_0, eps, t)).square().mean((1, 2, 3))

        whole = ((which > 1) & (rows < recipe.pictures)).repeat(2) & ~dropped
        reading = painter.reader(context, meant, whole)
        told, drawn = predicted.chunk(2)
        pairs = torch.stack(whole.chunk(2)).all(0)
        alike = pairs * weight[: count // 2] * (drawn - told.detach()).square().mean((1, 2, 3))
        return error.mean() + 0.1 * reading + 10 * alike.mean()

    samples, batch = recipe.unet_samples, recipe.unet_batch
    train(run, "unet", painter, loss_of, samples, batch, recipe.unet_lr, ema=recipe.unet_ema, look=look)
    return painter.eval().requires_grad_(False)


def unet_config(recipe):
    """One layer a level, attention on all levels but the first."""
    lower = len(recipe.unet_widths) - 1
    return UNetConfig(
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * lower),
        up_block_types=(*["CrossAttnUpBlock2D"] * lower, "UpBlock2D"),
        block_out_channels=recipe.unet_widths,
        layers_per_block=recipe.unet_layers,
        cross_attention_dim=recipe.clip_width,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
    )


# -- the folder ----------------------------------------------------------------------------------------


def plain(config):
    """A configuration as published: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def export(out, run, both, coder, painter, scale):
    """The folder in the layout of Stable Diffusion's, in fp16, with CLIP's towers beside it."""

    def part(name, weights_name, config, module):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {k: v.detach().cpu().half().contiguous() for k, v in module.state_dict().items()}
        save_file(weights, out / name / f"{weights_name}.safetensors", metadata={"format": "pt"})

    levels = len(coder.config.block_out_channels)
    vae_config = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **plain(coder.config),
        "scaling_factor": scale,
        "sample_size": run.recipe.size,
    }
    part("vae", "diffusion_pytorch_model", vae_config, coder)
    unet_config = {"_class_name": "UNet2DConditionModel", **plain(painter.unet.config)}
    part("unet", "diffusion_pytorch_model", unet_config, painter.unet)
    text_config, vision_config = plain(both.config.text_config), plain(both.config.vision_config)
    ids = {"bos_token_id": text_config["vocab_size"] - 2, "pad_token_id": text_config["eos_token_id"]}
    text_config |= {"model_type": "clip_text_model", "projection_dim": both.config.projection_dim, **ids}
    vision_config |= {"model_type": "clip_vision_model", "projection_dim": both.config.projection_dim}
    published = {"architectures": ["CLIPTextModel"], "dtype": "float32", **text_config}
    part("text_encoder", "model", published, painter.text)
    towers = {"text_config": text_config, "vision_config": vision_config}
    published = {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": "float32"}
    part("clip", "model", {**published, "projection_dim": both.config.projection_dim, **towers}, both)

    size = both.preprocess.resize
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(both.preprocess.mean),
        "image_std": list(both.preprocess.std),
        "resample": int(both.preprocess.resample),
        "rescale_factor": 1 / 255,
        **{f"do_{what}": True for what in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    }
    (out / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE, indent=2) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for folder in ("tokenizer", "clip"):
        shutil.copytree(run / "tokenizer", out / folder, dirs_exist_ok=True)


# -- all of it -----------------------------------------------------------------------------------------


def make(run, out, last):
    """The stages, one after the other, up to the one called `last`."""
    recipe = run.recipe
    array, captions = in_turn(lambda: render(run, "pictures", recipe.pictures + recipe.unseen))
    others, _ = in_turn(lambda: render(run, "abstract", recipe.abstract))
    words = in_turn(lambda: tokenizer(run, captions[: recipe.pictures]))
    if last == "pictures":
        return
    if last != "vae":
        ids, full = words([c["caption"] for c in captions]), words([c["complete"] for c in captions])
        both = clip(run, array, ids, full, captions)
    if last == "clip":
        return
    coder = vae(run, array, others)
    if last == "vae":
        return

    count = recipe.pictures
    pages, _ = in_turn(lambda: render(run, "mannered", recipe.mannered))
    latents = in_turn(lambda: encoded(run, coder, "pictures", count, array))
    more = in_turn(lambda: encoded(run, coder, "mannered", recipe.mannered, pages))
    latents = torch.cat([latents, more])
    scale = 1 / latents[:8192].float().std().item()
    coder.config.scaling_factor = scale
    ids, found = in_turn(lambda: captioned(run))
    schedule = Schedule.from_config(SCHEDULE)
    prompts = [c["complete"] for c in captions[count : count + 24]]
    shown = to_images(array[count : count + 24]).cpu()

    def look(painter, seen):
        whole = tinyti.LatentDiffusion(words, painter.text, coder, painter.unet, schedule)
        pictures = measure.draw(whole, prompts, recipe.guidance).cpu()
        pairs = torch.stack([shown, pictures], 1).flatten(0, 1)
        run.write("preview.png", lambda p: measure.sheet(pairs, 12, p))
        shutil.copy(run / "preview.png", run / f"preview-{seen}.png")

    painter = unet(run, latents, scale, ids, found, copy.deepcopy(both.text_model), words(""), look)
    if RANK:
        return
    export(out, run, both, coder, painter, scale)
    measure.card(run, out, array, captions)


def main():
    """Parse the command line and make the miniature."""
    parser = argparse.ArgumentParser(description="Make the miniature Stable Diffusion of weights/tiny.")
    parser.add_argument("--out", type=Path, default=HERE.parent / "tiny", help="the model folder to write")
    parser.add_argument("--work", type=Path, default=HERE / "run", help="the folder for unfinished work")
    parser.add_argument("--weights", type=Path, help="go on from the networks of this finished folder")
    parser.add_argument("--stage", choices=("pictures", "clip", "vae"), help="end after this stage")
    recipe = Recipe(**ON_A_GPU) if torch.cuda.is_available() else Recipe()
    for stage in ("clip", "vae", "unet"):
        default = getattr(recipe, f"{stage}_samples")
        parser.add_argument(f"--{stage}-samples", type=int, default=default, help=f"default: {default:,}")
    args = parser.parse_args()
    samples = {f"{stage}_samples": getattr(args, f"{stage}_samples") for stage in ("clip", "vae", "unet")}
    run = Run(args.work, replace(recipe, **samples), args.weights)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if run.device == "cuda" else "gloo")
    make(run, args.out, args.stage)


if __name__ == "__main__":
    main()
