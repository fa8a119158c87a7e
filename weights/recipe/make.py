"""From nothing to weights/tiny: a complete Stable Diffusion in miniature.

    python weights/recipe/make.py

pictures -> tokenizer -> CLIP -> VAE -> latents -> UNet -> model folder -> probe -> card.  Every stage leaves
its result in the run folder and is passed over when that is there; one that was killed goes on where it was.
Networks this small train faster with one process a core than with one process on all of them:

    torchrun --nproc-per-node=2 weights/recipe/make.py
"""

import argparse
import csv
import json
import os
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import tinyti  # noqa: E402
from tinyti.clip import CLIP, CLIPConfig, Preprocessing, TextConfig, VisionConfig  # noqa: E402
from tinyti.data import OBJECT_TEMPLATES, STYLE_TEMPLATES  # noqa: E402
from tinyti.diffusion import Schedule, denoise, randn  # noqa: E402
from tinyti.tokenizer import Tokenizer, _byte_pair  # noqa: E402
from tinyti.unet import UNet, UNetConfig  # noqa: E402
from tinyti.vae import VAE, VAEConfig  # noqa: E402

START, END = "<|startoftext|>", "<|endoftext|>"
PARTS = {  # where a finished folder keeps what a stage has trained
    "clip": "clip/model.safetensors",
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
    """The sizes of one go, in samples seen: for two CPU cores and an afternoon.  `--weights` adds another."""

    size: int = 64  # pixels a side
    pictures: int = 65_536
    unseen: int = 2_048
    vocabulary: int = 1_024
    clip_width: int = 128
    clip_layers: int = 4
    clip_patch: int = 8
    clip_samples: int = 280_000
    vae_widths: tuple[int, ...] = (16, 32, 64)
    vae_samples: int = 90_000
    unet_widths: tuple[int, ...] = (32, 64, 128)
    unet_layers: int = 1
    unet_samples: int = 540_000
    unet_batch: int = 128
    probe_samples: int = 600_000
    generated: int = 1_000
    guidance: float = 5.0
    unet_lr: float = 1e-3
    offset_noise: float = 0.2
    empty_prompts: float = 0.1


RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def in_turn(stage):
    """Call stage() in the first process and then, when its files are there, in the others."""
    if RANK:
        dist.barrier()
    made = stage()
    if PROCESSES > 1 and not RANK:
        dist.barrier()
    return made


class Run:
    """The folder that holds what the stages have made so far, and the device they run on."""

    def __init__(self, folder, recipe, start=None):
        self.folder, self.recipe, self.start = Path(folder), recipe, start
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def __truediv__(self, name):
        return self.folder / name

    def write(self, path, save):
        """Call save(temporary path), then put the file in its place."""
        temporary = self / f"{path}.tmp"
        save(temporary)
        os.replace(temporary, self / path)

    def cost(self, stage, samples, seconds):
        """Add what a stage has cost to costs.json."""
        path = self / "costs.json"
        costs = json.loads(path.read_text()) if path.exists() else {}
        before = costs.get(stage, {"samples": 0, "seconds": 0})
        costs[stage] = {
            "samples": before["samples"] + samples,
            "seconds": round(before["seconds"] + seconds, 1),
            "device": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{os.cpu_count()} CPU cores",
        }
        self.write("costs.json", lambda p: p.write_text(json.dumps(costs, indent=1)))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices and (flattened) convolutions (K. Jordan, 2024).

    Scaled to the size of Adam's steps (2502.16982), so that both take the same rate.  Per sample it learns
    far faster here than AdamW, at a fifth more time per step.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.mul_(group["momentum"]).add_(p.grad)
                update = self.orthogonal(p.grad + group["momentum"] * average)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(len(p), p[0].numel()) ** 0.5)

    @staticmethod
    def orthogonal(g, steps=5):
        """The nearest matrix with singular values about 1, by a Newton-Schulz iteration."""
        x = g.flatten(1)
        x = x.T if len(x) > x.shape[1] else x
        x = x / (x.norm() + 1e-7)
        for _ in range(steps):
            a = x @ x.T
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.T if len(g) > g[0].numel() else x).reshape(g.shape)


def optimizers_of(module, lr, muon):
    """AdamW; with `muon`, Muon for what is wide on both sides."""
    hidden = [
        n for n, p in module.named_parameters() if muon and p.ndim > 1 and min(len(p), p[0].numel()) > 16
    ]
    hidden = [n for n in hidden if not n.startswith("conv_in") and "embedding" not in n]
    parts = {"muon": [], "matrices": [], "vectors": []}
    for name, p in module.named_parameters():
        parts["muon" if name in hidden else "matrices" if p.ndim > 1 else "vectors"].append(p)
    groups = [
        {"params": parts["matrices"], "weight_decay": 0.01},
        {"params": parts["vectors"], "weight_decay": 0.0},
    ]
    made = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)]
    return made + ([Muon(parts["muon"], lr)] if hidden else [])


def train(run, stage, module, loss_of, samples, batch, lr, bf16=False, muon=False, look=None):
    """Train `module` on loss_of(generator, n), the mean over n samples, until it has seen `samples` of them.

    AdamW, or Muon beside it; the rate warms up, stays, and falls to zero over the last 30 %, so that the
    end can be moved while the run is under way.  The state is kept every minute; the draws of a step depend
    on its number only, so a killed run goes on as if nothing had happened.  Several processes share out each
    batch and average their gradients.  look(samples seen) is called now and then.
    """
    final, state_file = run / f"{stage}.safetensors", run / f"{stage}.state"
    if final.exists():
        module.load_state_dict(load_file(final))
        return
    if run.start and stage in PARTS:
        module.load_state_dict(load_file(run.start / PARTS[stage]))
    module.to(run.device)
    optimizers = optimizers_of(module, lr, muon)
    step, steps, running = 0, samples // batch, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        step, running = state["step"], state["running"]
    began = kept = looked = time.time()
    first = step
    while step < steps:
        rate = lr * min(1, (step + 1) / 200, (steps - step) / (0.3 * steps))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        with torch.autocast(run.device, torch.bfloat16, enabled=bf16 or run.device == "cuda"):
            generator = torch.Generator().manual_seed(step * PROCESSES + RANK)
            loss = loss_of(generator, batch // PROCESSES)
        loss.backward()
        if PROCESSES > 1:
            parameters = list(module.parameters())
            gradients = torch.cat([p.grad.flatten() for p in parameters]).div_(PROCESSES)
            dist.all_reduce(gradients)
            for p, part in zip(parameters, gradients.split([p.numel() for p in parameters])):
                p.grad.copy_(part.view_as(p))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        running = 0.99 * running + 0.01 * loss.item()
        if RANK:
            continue
        if step % 100 == 0:
            average = running / (1 - 0.99**step)
            with open(run / f"{stage}.csv", "a", newline="") as f:
                csv.writer(f).writerow([step * batch, f"{average:.5f}", f"{rate:.2e}"])
            pace = (step - first) * batch / (time.time() - began)
            print(f"{stage} {step * batch:,} of {samples:,}  loss {average:.5f}  {pace:.0f}/s", flush=True)
        if time.time() - kept > 60 or step == steps:
            state = {"module": module.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step, "running": running}
            run.write(state_file.name, lambda p, s=state: torch.save(s, p))
            run.cost(stage, (step - first) * batch, time.time() - began)
            began, kept, first = time.time(), time.time(), step
        if look and (time.time() - looked > 300 or step == steps):
            look(step * batch)
            looked = time.time()
    if not RANK:
        weights = {k: v.contiguous() for k, v in module.state_dict().items()}
        run.write(final.name, lambda p: save_file(weights, p))


# -- pictures ------------------------------------------------------------------------------------------


def _render(args):
    seeds, size = args
    drawn = [world.picture(seed, size) for seed in seeds]
    return np.stack([np.asarray(image) for image, _, _ in drawn]), [(c, a) for _, c, a in drawn]


def pictures(run):
    """Draw the book: pictures.npy (N, S, S, 3) and captions.json; the last `unseen` are never trained on."""
    if not (run / "captions.json").exists():
        began = time.time()
        total = run.recipe.pictures + run.recipe.unseen
        jobs = [(range(i, min(i + 512, total)), run.recipe.size) for i in range(0, total, 512)]
        with ProcessPoolExecutor() as pool:
            parts = list(pool.map(_render, jobs))
        run.write(
            "pictures.npy", lambda p: np.save(p.open("wb"), np.concatenate([part[0] for part in parts]))
        )
        captions = [{"caption": c, **a} for part in parts for c, a in part[1]]
        run.write("captions.json", lambda p: p.write_text(json.dumps(captions)))
        run.cost("pictures", total, time.time() - began)
    return np.load(run / "pictures.npy", mmap_mode="r"), json.loads((run / "captions.json").read_text())


def to_images(array):
    """uint8 (B, S, S, 3) -> (B, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float() / 127.5 - 1


# -- tokenizer -----------------------------------------------------------------------------------------


def tokenizer(run, captions):
    """A byte-pair vocabulary, from the captions and the paper's templates, in CLIP's form."""
    folder = run / "tokenizer"
    if run.start:
        return Tokenizer.from_folder(shutil.copytree(run.start / "tokenizer", folder, dirs_exist_ok=True))
    if not (folder / "merges.txt").exists():
        text = [c["caption"] for c in captions]
        text += [t.format(thing) for t in OBJECT_TEMPLATES + STYLE_TEMPLATES for thing in world.THINGS] * 20
        core = _byte_pair({END: 0}, [], END)
        core.train_from_iterator(text, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
        merges = [
            m if isinstance(m, str) else " ".join(m) for m in json.loads(core.to_str())["model"]["merges"]
        ]
        # All bytes, inside a word and at its end, come first: any text can be spelt.
        letters = sorted(ByteLevel.alphabet())
        letters += [letter + "</w>" for letter in letters]
        merges = merges[: run.recipe.vocabulary - len(letters) - 2]
        entries = [*letters, *(m.replace(" ", "") for m in merges), START, END]
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        folder.mkdir(exist_ok=True)
        (folder / "vocab.json").write_text(
            json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False)
        )
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        run.write(
            "tokenizer/merges.txt", lambda p: p.write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        )
    return Tokenizer.from_folder(folder)


# -- CLIP ----------------------------------------------------------------------------------------------


def clip(run, array, ids, captions):
    """Both towers, contrastively (2103.00020, figure 3): a batch is a quiz of 128 pairs.

    Every other quiz is a hard one: its pictures agree in two of colour, scene and style, so that the rest has
    to tell them apart.  Otherwise the towers live off backgrounds and hardly learn what a thing is.
    """
    recipe = run.recipe
    drawn = labels(captions[: recipe.pictures])
    shared = [drawn[name] for name in ("colour", "scene", "style")]
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
    used = int((ids == text.eos_token_id).int().argmax(1).max()) + 1

    def loss_of(generator, count):
        rows = torch.randint(recipe.pictures, (count,), generator=generator)
        kind = torch.randint(2 * len(shared), (), generator=generator)
        if kind < len(shared):  # a hard quiz; `kind` is what may differ
            alike = [v == v[rows[0]] for i, v in enumerate(shared) if i != kind]
            rows = torch.stack(alike).all(0).nonzero()[:, 0]
            rows = rows[torch.randint(len(rows), (count,), generator=generator)]
        images = to_images(array[rows.numpy()]).to(run.device)
        a, b = model.encode_image(images), model.encode_text(ids[rows, :used].to(run.device))
        logits = model.logit_scale.exp().clamp(max=100) * a @ b.T
        truth = torch.arange(len(rows), device=run.device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    train(run, "clip", model, loss_of, recipe.clip_samples, 128, lr=1e-3, muon=True)
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


def vae(run, array):
    """Squared error, and a Kullback-Leibler term small enough to blur nothing and keep the latents smooth."""
    recipe = run.recipe
    torch.manual_seed(0)
    model = VAE(VAEConfig(block_out_channels=recipe.vae_widths, layers_per_block=1, norm_num_groups=8))

    def loss_of(generator, count):
        images = to_images(array[torch.randint(recipe.pictures, (count,), generator=generator).numpy()])
        images = images.to(run.device)
        mean, std = model.encode(images)
        mean, std = mean.float(), std.float()
        z = mean + std * randn(mean.shape, generator, mean)
        kl = (mean**2 + std**2 - 1 - 2 * std.log()).mean() / 2
        return F.mse_loss(model.decode(z).float(), images) + 1e-4 * kl

    # On a CPU, too, bf16 is half as fast again in these thin convolutions at full resolution.
    train(run, "vae", model, loss_of, recipe.vae_samples, 16, lr=1e-3, bf16=True, muon=True)
    return model.eval().requires_grad_(False)


def psnr(model, images):
    """Mean over the pictures (B, 3, H, W) of the decibels that survive encoding and decoding."""
    errors = [
        (model.decode(model.encode(x)[0]).clamp(-1, 1) - x).div(2).square().mean((1, 2, 3))
        for x in images.split(64)
    ]
    return (-10 * torch.cat(errors).log10()).mean().item()


# -- UNet ----------------------------------------------------------------------------------------------


def encoded(run, name, count, encode):
    """(count, …) in fp16, from encode(first, last), computed once and kept as name.npy."""
    if not (run / f"{name}.npy").exists():
        began = time.time()
        with torch.no_grad():
            parts = [encode(i, min(i + 256, count)).half().cpu() for i in range(0, count, 256)]
        run.write(f"{name}.npy", lambda p: np.save(p.open("wb"), torch.cat(parts).numpy()))
        run.cost(name, count, time.time() - began)
    return torch.from_numpy(np.load(run / f"{name}.npy", mmap_mode="c"))


def unet(run, latents, scale, contexts, empty, look):
    """Noise prediction on scaled latents, as in tinyti.inversion, but here the weights learn.

    Offset noise (a constant per picture and channel on top of eps) teaches the network that the initial
    noise says nothing of the picture's mean colour; min-SNR weights (2303.09556, gamma 5) spend less of a
    small network on the last, fine steps.
    """
    recipe, schedule = run.recipe, Schedule.from_config(SCHEDULE)
    torch.manual_seed(0)
    model = UNet(unet_config(recipe))
    for p in [
        p for name, p in model.named_parameters() if name.endswith(("conv2.weight", "proj_out.weight"))
    ]:
        torch.nn.init.zeros_(p)  # every block begins as the identity
    model.to(memory_format=torch.channels_last)
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    weights = (snr.clamp(max=5) / snr).float()

    def loss_of(generator, count):
        rows = torch.randint(len(latents), (count,), generator=generator)
        x_0 = scale * latents[rows].float().to(run.device)
        dropped = torch.rand(count, 1, 1, generator=generator) < recipe.empty_prompts
        context = torch.where(dropped, empty, contexts[rows].float()).to(run.device)
        t = torch.randint(schedule.num_train_timesteps, (count,), generator=generator)
        eps = randn(x_0.shape, generator, x_0)
        eps = eps + recipe.offset_noise * randn((*x_0.shape[:2], 1, 1), generator, x_0)
        x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        error = (model(x_t, t.to(run.device), context).float() - schedule.target(x_0, eps, t)).square()
        return (weights[t].to(run.device) * error.mean((1, 2, 3))).mean()

    train(
        run,
        "unet",
        model,
        loss_of,
        recipe.unet_samples,
        recipe.unet_batch,
        recipe.unet_lr,
        muon=True,
        look=lambda n: look(model, n),
    )
    return model.eval().requires_grad_(False)


def unet_config(recipe):
    """One layer a level, attention on all levels but the first."""
    widths = recipe.unet_widths
    return UNetConfig(
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
        block_out_channels=widths,
        layers_per_block=recipe.unet_layers,
        cross_attention_dim=recipe.clip_width,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
    )


@torch.no_grad()
def generate(unet, vae, scale, contexts, empty, steps=30, guidance=5.0, seed=0):
    """Pictures (B, 3, S, S) in [-1, 1] for contexts (B, 77, D): the last stages' own short sampling loop."""
    side = unet.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    x = randn((len(contexts), unet.config.in_channels, side, side), generator, contexts)
    both = torch.cat([empty.expand_as(contexts), contexts])

    def predict(x, t):
        without, with_prompt = unet(torch.cat([x, x]), t, both).chunk(2)
        return without + guidance * (with_prompt - without)

    *_, x_0 = denoise(predict, x, Schedule.from_config(SCHEDULE), steps)
    return vae.decode(x_0 / scale).clamp(-1, 1)


# -- the folder ----------------------------------------------------------------------------------------


def plain(config):
    """A configuration as published: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def export(out, run, both, coder, model, scale):
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
    unet_config = {"_class_name": "UNet2DConditionModel", **plain(model.config)}
    part("unet", "diffusion_pytorch_model", unet_config, model)
    text_config, vision_config = plain(both.config.text_config), plain(both.config.vision_config)
    ids = {"bos_token_id": text_config["vocab_size"] - 2, "pad_token_id": text_config["eos_token_id"]}
    text_config |= {"model_type": "clip_text_model", "projection_dim": both.config.projection_dim, **ids}
    vision_config |= {"model_type": "clip_vision_model", "projection_dim": both.config.projection_dim}
    published = {"architectures": ["CLIPTextModel"], "dtype": "float32", **text_config}
    part("text_encoder", "model", published, both.text_model)
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


# -- the probe -----------------------------------------------------------------------------------------

HEADS = {
    "thing": tuple(world.THINGS),
    "colour": tuple(world.COLOURS),
    "scene": tuple(world.SCENES),
    "style": tuple(world.STYLES),
}


class Probe(torch.nn.Module):
    """A small classifier of the captioned attributes: (B, 3, S, S) -> {head: logits}."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [torch.nn.Conv2d(c_in, c_out, 3, 2, 1), torch.nn.GroupNorm(8, c_out), torch.nn.SiLU()]
        self.body = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(2048, len(v)) for name, v in HEADS.items()})

    def forward(self, images):
        x = self.body(images)
        return {name: head(x) for name, head in self.heads.items()}


def labels(captions):
    """{head: (N,)} from what the pictures were drawn from."""
    return {name: torch.tensor([values.index(c[name]) for c in captions]) for name, values in HEADS.items()}


def probe(run, array, captions):
    """Train the probe on rendered pictures, mirrored and moved a little, lest it learn them by heart."""
    truth = labels(captions)
    torch.manual_seed(0)
    model = Probe()

    def loss_of(generator, count):
        rows = torch.randint(run.recipe.pictures, (count,), generator=generator)
        images = to_images(array[rows.numpy()])
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        by = torch.randint(-4, 5, (2,), generator=generator).tolist()
        images = torch.where(mirrored, images.flip(-1), images).roll(by, (2, 3))
        logits = model(images.to(run.device))
        return sum(F.cross_entropy(logits[name], truth[name][rows].to(run.device)) for name in HEADS)

    train(run, "probe", model, loss_of, run.recipe.probe_samples, 128, lr=2e-3)
    return model.eval().requires_grad_(False)


def accuracy(model, images, truth):
    """{head: part of the pictures that the probe reads as the truth says}."""
    logits = [model(x) for x in images.split(256)]
    return {
        name: (torch.cat([part[name] for part in logits]).argmax(1) == truth[name]).float().mean().item()
        for name in HEADS
    }


# -- the card ------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(run, out, judge, array, captions):
    """Judge the finished folder, loaded as anybody would, on what no stage has seen: -> the figures."""
    recipe, unseen = run.recipe, slice(run.recipe.pictures, None)
    model = tinyti.load(out, run.device)
    images, truth = to_images(array[unseen]), labels(captions[unseen])

    towers, words = tinyti.load_clip(out / "clip")
    a = torch.cat([towers.encode_image(x) for x in images.split(256)])
    b = torch.cat(
        [
            towers.encode_text(words([c["caption"] for c in captions[unseen][i : i + 256]]))
            for i in range(0, len(a), 256)
        ]
    )
    quizzes = [a[i : i + 500] @ b[i : i + 500].T for i in range(0, len(a) - 499, 500)]
    right = torch.cat([quiz.argmax(1) == torch.arange(500) for quiz in quizzes])

    count = recipe.generated
    prompts = [
        world.caption(c, random.Random(i), complete=True) for i, c in enumerate(captions[unseen][:count])
    ]
    drawn = []
    for i in range(0, count, 50):
        options = {"steps": 30, "guidance": recipe.guidance, "generator": torch.Generator().manual_seed(i)}
        *_, x_0 = tinyti.sample(model, prompts[i : i + 50], **options)
        drawn.append(model.decode(x_0).cpu())
    drawn = torch.cat(drawn)
    sheet(torch.stack([images[:24], drawn[:24]], 1).flatten(0, 1), 12, run / "contact_sheet.png")
    sheet(drawn[:100], 10, run / "generated.png")
    return {
        "real": accuracy(judge, images, truth),
        "made": accuracy(judge, drawn, {name: values[:count] for name, values in truth.items()}),
        "psnr": psnr(model.vae.cpu(), images),
        "retrieval": right.float().mean().item(),
    }


def card(run, out, measured):
    """weights/tiny/README.md, from card.md and the figures."""
    recipe, costs = run.recipe, json.loads((run / "costs.json").read_text())

    def size(part):
        return sum(w.numel() for w in load_file(next((out / part).glob("*.safetensors"))).values())

    lines = ["| stage | samples | minutes | on |", "|---|---|---|---|"]
    lines += [
        f"| {k} | {v['samples']:,} | {v['seconds'] / 60:.0f} | {v['device']} |" for k, v in costs.items()
    ]
    text = (HERE / "card.md").read_text().format(
        **measured,
        text_parameters=size("text_encoder"),
        clip_parameters=size("clip"),
        vae_parameters=size("vae"),
        unet_parameters=size("unet"),
        megabytes=sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1e6,
        guidance=recipe.guidance,
        generated=recipe.generated,
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
        scenes=", ".join(list(world.SCENES)[1:]),
        styles=", ".join(world.STYLES),
        costs="\n".join(lines),
    )  # fmt: skip
    shutil.copy(run / "contact_sheet.png", out / "contact_sheet.png")
    (out / "README.md").write_text(text)


def sheet(images, columns, path):
    """Write pictures (B, 3, S, S) in [-1, 1] as one PNG."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = torch.cat(rows, dim=1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, format="PNG")


def main():
    """Run the stages in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default=HERE / "run", type=Path, help="where the stages keep their results")
    parser.add_argument("--out", default=HERE.parent / "tiny", type=Path, help="the finished model folder")
    parser.add_argument("--weights", type=Path, help="a finished folder to go on from, instead of nothing")
    parser.add_argument(
        "--unet-samples", type=int, help="stop the UNet earlier or later than the recipe says"
    )
    args = parser.parse_args()
    recipe = Recipe(**({"unet_samples": args.unet_samples} if args.unet_samples else {}))
    run = Run(args.work, recipe, args.weights)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if run.device == "cuda" else "gloo")
    array, captions = in_turn(lambda: pictures(run))
    words = in_turn(lambda: tokenizer(run, captions[: recipe.pictures]))
    ids = words([c["caption"] for c in captions])
    both = clip(run, array, ids, captions)
    coder = vae(run, array)
    text = both.text_model
    count = recipe.pictures
    latents = in_turn(lambda: encoded(run, "latents", count, lambda a, b: draw_latents(coder, array[a:b], a)))
    contexts = in_turn(lambda: encoded(run, "contexts", count, lambda a, b: text(text.embed(ids[a:b]))))
    empty = text(text.embed(words("")))
    scale = 1 / latents[:8192].float().std().item()

    rows = torch.arange(recipe.pictures, recipe.pictures + 24)
    preview = text(text.embed(ids[rows]))
    run.write("preview.txt", lambda p: p.write_text("\n".join(captions[r]["caption"] for r in rows)))
    real = to_images(array[rows.numpy()])

    def look(model, seen):
        drawn = generate(model, coder, scale, preview, empty)
        pairs = torch.stack([real, drawn], 1).flatten(0, 1)
        run.write("preview.png", lambda p: sheet(pairs, 12, p))
        shutil.copy(run / "preview.png", run / f"preview-{seen}.png")

    model = unet(run, latents, scale, contexts, empty, look)
    if RANK:
        return
    export(args.out, run, both, coder, model, scale)
    judge = probe(run, array, captions).cpu()
    measured = measure(run, args.out, judge, array, captions)
    print(json.dumps(measured, indent=1))
    card(run, args.out, measured)


def draw_latents(coder, array, seed):
    """A sample of each picture's latents."""
    mean, std = coder.encode(to_images(array))
    return mean + std * randn(mean.shape, torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
