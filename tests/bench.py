"""What tinyti costs beside the way of diffusers' example script.  A program, no test: nothing here fails.

    python -m tests.bench step                                                 # the miniature, batch 4
    python -m tests.bench step --batch 1 4 8 16 --vectors 1 4                  # how it grows
    python -m tests.bench step --weights sd15 --size 256 512 --batch 1 --rounds 3 --block 1
    python -m tests.bench alone --weights sd15 --size 256 --batch 1 --rounds 3 --block 2
    python -m tests.bench quality --sets cat dog --seeds 0 1

The sides take turns, so that what else the machine does is shared, and the medians of all turns are compared.
`--weights` is a model folder as diffusers saves it, or sd15 or sd21 for random weights of that size, which
are written to a temporary folder (4.3 and 5.2 GB).  On a GPU: `--device cuda --precision bf16`.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils import flop_counter

import tinyti
from tinyti import inversion, whitened
from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES, make_examples
from tinyti.files import words
from tinyti.files.pictures import read_photos
from tinyti.inversion import BATCH_SIZE, STEPS, Inversion, invert
from tinyti.programs.run import WORD_FILE

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = {"lr": 2e-3, "batch": 4, "steps": 3000}  # of the example's README: 5e-4, scaled by a batch of 4


class Ours:
    """tinyti's training, to be taken step by step."""

    def __init__(self, weights, images, size, batch, vectors, device, precision):
        self.model = tinyti.load(weights, device, DTYPES[precision])
        mean = self.model.text.table.mean(0, keepdim=True)
        concept = self.model.add_word("S*", tinyti.Concept.initial(mean, vectors))
        photos, _ = read_photos(images, size)
        examples = make_examples(self.model, "S*", photos, OBJECT_TEMPLATES)
        word = Inversion(self.model, concept)
        word.evaluations = [0.0] * 10**6  # they are there: none is computed within a step
        self.begin = lambda: invert(self.model, word, examples, 10**6, batch)
        self.steps = self.begin()

    def step(self):
        next(self.steps)

    def unrecorded(self):
        """A step whose operations can be counted also on a GPU."""
        with patch.object(inversion, "recorded", lambda function: function):
            next(self.begin())


def load_ours(weights):
    """VAE, UNet and text transformer."""
    model = tinyti.load(weights)
    return model.vae, model.unet, model.text


def load_theirs(weights):
    """The same of theirs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    return [kind.from_pretrained(weights, subfolder=name) for name, kind in kinds.items()]


class Theirs:
    """diffusers' examples/textual_inversion, its loop in our words: what it computes, and in which order."""

    def __init__(self, weights, images, size, batch, vectors, device, precision,
                 style=False, start=None, seed=0):  # fmt: skip
        from diffusers import DDPMScheduler
        from transformers import CLIPTokenizer

        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.device, self.dtype, self.size, self.batch = torch.device(device), DTYPES[precision], size, batch
        self.files = sorted(file for file in Path(images).iterdir() if file.is_file())
        self.templates = STYLE_TEMPLATES if style else OBJECT_TEMPLATES
        self.tokenizer = CLIPTokenizer.from_pretrained(weights, subfolder="tokenizer")
        self.noise = DDPMScheduler.from_pretrained(weights, subfolder="scheduler")
        self.vae, self.unet, self.text = load_theirs(weights)
        self.names = [f"<placeholder-{i}>" for i in range(vectors)]
        self.tokenizer.add_tokens(self.names)
        self.ids = self.tokenizer.convert_tokens_to_ids(self.names)
        self.text.resize_token_embeddings(self.text.config.vocab_size + vectors, mean_resizing=False)
        self.vae.requires_grad_(False).to(self.device, self.dtype)
        self.unet.requires_grad_(False).to(self.device, self.dtype)
        self.text.requires_grad_(False).to(self.device).train()  # stays in fp32
        table = self.text.get_input_embeddings().requires_grad_()
        self.table = table.weight
        start_id = self.tokenizer(start, add_special_tokens=False).input_ids[0] if start else 0
        with torch.no_grad():
            self.table[self.ids] = self.table[start_id].clone()
        self.before = self.table.detach().clone()
        self.frozen = torch.ones(len(self.table), dtype=torch.bool, device=self.device)
        self.frozen[self.ids] = False
        self.optimizer = torch.optim.AdamW(table.parameters(), RECIPE["lr"], weight_decay=1e-2)

    def example(self):
        """A sample of the batch: the picture is read, resized and perhaps mirrored, the prompt tokenised."""
        image = Image.open(self.random.choice(self.files)).convert("RGB")
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
        prompt = self.random.choice(self.templates).replace("{}", " ".join(self.names))
        options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
        return pixels, self.tokenizer(prompt, **options).input_ids[0]

    def step(self):
        batch = zip(*(self.example() for _ in range(self.batch)))
        pixels, ids = (torch.stack(part).to(self.device) for part in batch)
        x_0 = self.vae.encode(pixels.to(self.dtype)).latent_dist.sample().detach()
        x_0 = x_0 * self.vae.config.scaling_factor
        eps = torch.randn_like(x_0)
        t = torch.randint(self.noise.config.num_train_timesteps, (self.batch,), device=self.device)
        x_t = self.noise.add_noise(x_0, eps, t)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            context = self.text(ids)[0].to(self.dtype)
        prediction = self.unet(x_t, t, context).sample
        is_v = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(x_0, eps, t) if is_v else eps
        F.mse_loss(prediction.float(), target.float()).backward()
        self.optimizer.step()  # of the whole vocabulary, whose other rows are then put back
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.frozen] = self.before[self.frozen]

    unrecorded = step


SIDES = {"tinyti": Ours, "diffusers": Theirs}
LOADERS = {"tinyti": load_ours, "diffusers": load_theirs}


def clock(step, count, device):
    """Seconds that each of `count` steps takes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def operations(step):
    """Floating-point operations of a step: matrix products, convolutions and attention, forward and back."""
    count, back = flop_counter.sdpa_flop_count, flop_counter.sdpa_backward_flop_count
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {  # else the CPU's attention counts as nothing
        attention: lambda q, k, v, *_, **__: count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: back(g, q, k, v),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(device, precision, side=2048):
    """Floating-point operations per second of a large matrix product, the best of five."""
    side *= 4 if device.startswith("cuda") else 1
    a = torch.randn(side, side, device=device, dtype=DTYPES[precision])
    clock(lambda: a @ a, 1, device)
    return 2 * side**3 / min(clock(lambda: a @ a, 1, device) for _ in range(5))


def row(*cells):
    """A line of a table."""
    print("|", " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells), "|")


def head(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def isolated(function, **arguments):
    """What a function of this file prints as JSON, in a process of its own."""
    command = [sys.executable, "-c", f"import tests.bench as b; b.{function.__name__}(**{arguments!r})"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cases(args):
    """All (sizes, batches, numbers of vectors), each with what our side and theirs are made with."""
    shared = {name: getattr(args, name) for name in ("weights", "images", "device")}
    precisions = args.precision[0], args.precision[-1]
    for case in itertools.product(args.size, args.batch, args.vectors):
        both = shared | dict(zip(("size", "batch", "vectors"), case))
        yield case, [both | {"precision": precision} for precision in precisions]


def step(args):
    """Seconds and operations of a step, and the share of the machine's matrix rate."""
    rate = matrix_rate(args.device, args.precision[0])
    print(f"matrix rate: {rate / 1e12:.3g} TFLOP/s\n")
    names = "tinyti s", "diffusers s", "ratio", "ratio of operations", "TFLOP", "of the rate"
    head("pixels", "batch", "vectors", *names)
    for case, sides in cases(args):
        sides = [kind(**own) for kind, own in zip(SIDES.values(), sides)]
        m, n = (operations(side.unrecorded) for side in sides)
        for side in sides:
            side.step()  # a warm-up
        turns = [[clock(side.step, args.block, args.device) for side in sides] for _ in range(args.rounds)]
        a, b = (statistics.median(seconds) for seconds in zip(*turns))
        row(*case, a, b, b / a, n / m, m / 1e12, f"{m / a / rate:.0%}")


def alone(args):
    """Seconds to have every weight in memory, and the peak of memory over some steps."""
    names = "tinyti loads in s", "diffusers", "ratio", "tinyti GiB", "diffusers", "ratio"
    head("pixels", "batch", "vectors", *names)
    for case, sides in cases(args):
        turns = [[isolated(process, side=side, block=args.block, **own) for side, own in zip(SIDES, sides)]
                 for _ in range(args.rounds)]  # fmt: skip
        (a, m), (b, n) = (map(statistics.median, zip(*found)) for found in zip(*turns))
        row(*case, a, b, b / a, m, n, n / m)


def process(side, block, **case):
    """One side of `alone`."""
    began = time.perf_counter()
    parts = LOADERS[side](case["weights"])
    for p in [p for part in parts for p in part.parameters()]:
        p.sum().item()  # a file that is only mapped has not been read yet
    seconds = time.perf_counter() - began
    del parts, p
    clock(SIDES[side](**case).step, block, case["device"])
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if case["device"].startswith("cuda") else peak
    print(json.dumps([seconds, peak / 2**30]))


def quality(args):
    """Both programs whole, with their defaults: time, samples and what the word is worth, means over sets."""
    from notebooks import study

    model, clip = tinyti.load(args.weights), tinyti.load_clip(Path(args.weights) / "clip")
    found = {}
    for name in args.sets:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as out:
                for key, (seconds, file) in programs(args, name, seed, Path(out), study.SETS[name]).items():
                    study.add_word(model, next(iter(words.read_words(file).values())))
                    loss = study.heldout_loss(model, study.load_set(model, name)[1])
                    scores = {"seconds": seconds, "loss": loss} | study.scores(model, *clip, name)
                    found.setdefault(key, []).append(scores)
    columns = ("seconds", "loss", *study.SCORES)
    head("program", "samples", *columns)
    for (side, samples), runs in found.items():
        cells = [[run[column] for run in runs if column in run] for column in columns]
        row(side, samples, *(statistics.mean(cell) if cell else "" for cell in cells))


def programs(args, name, seed, out, about):
    """Run both on a set: {(side, samples): (seconds since the program's start, the word's file)}."""
    images, is_style = ROOT / "concepts" / name, about["kind"] == "style"
    command = [sys.executable, "train.py", "--images", images, "--token", "S*", "--seed", seed, "--out", out]
    command += ["--weights", args.weights, "--device", args.device, "--precision", "fp32"]
    command += ["--style"] * is_style
    began = time.time()
    subprocess.run(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)  # status 1: nothing learned
    words = {("tinyti", STEPS * BATCH_SIZE): (time.time() - began, out / WORD_FILE)}
    case = {"weights": args.weights, "images": str(images), "size": args.size[0], "batch": RECIPE["batch"]}
    case |= {"vectors": 1, "device": args.device, "precision": "fp32"}
    case |= {"style": is_style, "start": about["start"], "seed": seed}
    began = time.time()
    for steps, ended in isolated(recipe, out=str(out), steps=args.steps, **case).items():
        words["diffusers", int(steps) * RECIPE["batch"]] = ended - began, out / f"{steps}.safetensors"
    return words


def recipe(out, steps, **case):
    """diffusers' program in `quality`: words along the way, and when each came."""
    side, ended = Theirs(**case), {}
    for i in range(1, steps + 1):
        side.step()
        if i in (25, 50, 100, 250, 500, 1000, 2000, steps):
            words.write_words(Path(out) / f"{i}.safetensors", {"S*": side.table[side.ids].detach()})
            ended[i] = time.time()
    print(json.dumps(ended))


def write_random(family, folder):
    """A folder of the size of Stable Diffusion 1.5 or 2.1, with random weights and a small vocabulary."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from . import published
    from .test_checkpoint import TEXTS, UNETS, VAE
    from .test_full_size import random_network

    parts = {"vae": (AutoencoderKL, VAE), "unet": (UNet2DConditionModel, UNETS[family])}
    for name, part in (parts | {"text_encoder": TEXTS[family][1:]}).items():
        random_network(*part).save_pretrained(folder / name)
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
