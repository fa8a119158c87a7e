"""Shared by the stages: the work folder, the optimizers, and a training loop that survives a kill."""

import csv
import json
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
CHUNK = 512  # pages that a process draws or captions at a time
SAVE_EVERY, LOOK_EVERY = 60, 300  # seconds
WEIGHTS = {  # where a finished folder keeps a stage's network
    "clip": "clip/model.safetensors",
    "text": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
}


def in_turn(make):
    """Call make() in the first process; the others wait for it."""
    if not RANK:
        make()
    if PROCESSES > 1:
        dist.barrier()


def map_chunks(function, total, *rest):
    """Call function(numbers, *rest) on `CHUNK` numbers below `total` at a time, one process per core.

    Each call returns several results; this returns, for each of them, the tuple of all chunks' results.
    """
    chunks = [range(i, min(i + CHUNK, total)) for i in range(0, total, CHUNK)]
    with ProcessPoolExecutor() as pool:
        return list(zip(*pool.map(function, chunks, *map(repeat, rest))))


def to_images(pixels):
    """Convert uint8 (B, S, S, 3), an array or a tensor -> (B, 3, S, S) in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def integers(high, shape, generator):
    """Draw integers in [0, high) on the generator's device."""
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randint(high, shape, generator=generator, device=generator.device)


def uniform(shape, generator):
    """Draw numbers in [0, 1) on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


class Workspace:
    """The folder of the stages' results so far, the recipe, and the device.

    start: a finished folder from whose networks the stages continue.
    """

    def __init__(self, folder, recipe, start=None):
        self.folder, self.recipe, self.start = Path(folder), recipe, start
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # The faster image layout on each device.
        self.layout = torch.channels_last if self.device == "cuda" else torch.contiguous_format

    def __truediv__(self, name):
        return self.folder / name

    def once(self, stage, total, make, *files):
        """Return the contents of the .npy and .json files; make() computes all of them if one is missing.

        The first process makes them, and the others wait. The time for `total` samples goes to costs.json.
        """

        def fill():
            if all((self / file).exists() for file in files):
                return
            began = time.time()
            for file, made in zip(files, make()):
                self.write(file, lambda p, made=made: self._save(p, made))
            self.cost(stage, total, time.time() - began)

        in_turn(fill)
        return [self._read(self / file) for file in files]

    @staticmethod
    def _save(path, made):
        if isinstance(made, np.ndarray):
            with path.open("wb") as file:
                np.save(file, made)
        else:
            path.write_text(json.dumps(made), encoding="utf-8")

    def _read(self, path):
        """Read a list, or a tensor: loaded at once on a GPU, memory-mapped on a CPU."""
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.from_numpy(np.load(path, mmap_mode="c")).to(self.device)

    def load_start(self, module, name):
        """Load the weights that the finished folder has for `module`, if there is such a folder."""
        if self.start:
            weights = load_file(self.start / WEIGHTS[name])
            prefix = "text_model." if name == "text" else ""  # written for transformers 4
            weights = {key.removeprefix(prefix): weight.float() for key, weight in weights.items()}
            module.load_state_dict(weights)

    def write(self, path, save):
        """Call save(temporary path), then rename the file to its own name."""
        temporary = self / f"{path}.tmp"
        save(temporary)
        os.replace(temporary, self / path)

    def cost(self, stage, samples, seconds):
        """Add a stage's samples and seconds to costs.json."""
        path = self / "costs.json"
        costs = json.loads(path.read_text()) if path.exists() else {}
        before = costs.get(stage, {"samples": 0, "seconds": 0})
        device = torch.cuda.get_device_name() if self.device == "cuda" else f"{os.cpu_count()} CPU cores"
        samples, seconds = before["samples"] + samples, round(before["seconds"] + seconds, 1)
        costs[stage] = {"samples": samples, "seconds": seconds, "device": device}
        self.write("costs.json", lambda p: p.write_text(json.dumps(costs, indent=1)))


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps, for matrices and (flattened) convolutions (K. Jordan, 2024).

    Steps are scaled to the size of Adam's (2502.16982), so that both take the same learning rate.  Per
    sample it learns far faster here than AdamW, at a tenth more time per step.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)  # by shape: a batch of matrices takes half the time of single ones
            for p in group["params"]:
                alike[p.shape].append(p)
            for shape, parameters in alike.items():
                gradients = torch.stack([p.grad for p in parameters])
                state = self.state[parameters[0]]
                if not state:
                    state["average"] = torch.zeros_like(gradients)
                average = state["average"]
                average.mul_(group["momentum"]).add_(gradients)
                updates = self.orthogonal(gradients + group["momentum"] * average)
                updates *= -group["lr"] * 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates))

    @staticmethod
    def orthogonal(g, steps=5):
        """Return the nearest matrices with singular values about 1 (Newton-Schulz): g (N, rows, …)."""
        x = g.flatten(2).bfloat16()
        x = x.mT if x.shape[1] > x.shape[2] else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.mT if g.shape[1] > g[0, 0].numel() else x).reshape(g.shape).to(g.dtype)


def optimizers_of(module, lr):
    """Return AdamW and Muon: Muon for wide matrices, AdamW for tables, first layers, biases and norms."""
    hidden = [n for n, p in module.named_parameters() if p.ndim > 1 and min(len(p), p[0].numel()) > 16]
    hidden = [n for n in hidden if not n.startswith("conv_in") and "embedding" not in n]
    parts = {"muon": [], "matrices": [], "vectors": []}
    for name, p in module.named_parameters():
        parts["muon" if name in hidden else "matrices" if p.ndim > 1 else "vectors"].append(p)
    decays = {"matrices": 0.01, "vectors": 0.0}
    groups = [{"params": parts[name], "weight_decay": decay} for name, decay in decays.items()]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True), Muon(parts["muon"], lr)]


def average_gradients(module):
    """Replace every process's gradients by their mean over the processes, with one all-reduce."""
    parameters = list(module.parameters())
    gradients = torch.cat([p.grad.flatten() for p in parameters]).div_(PROCESSES)
    dist.all_reduce(gradients)
    for p, part in zip(parameters, gradients.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))


class Learner:
    """A module, its optimizers and the average of its weights: all that a killed stage needs to continue."""

    def __init__(self, work, stage, module, lr, ema):
        self.work, self.module, self.ema = work, module, ema
        self.file = f"{stage}.state"
        self.optimizers = optimizers_of(module, lr)
        self.average = {k: w.detach().clone() for k, w in module.state_dict().items()}
        self.step, self.running = 0, 0.0
        if (work / self.file).exists():
            saved = torch.load(work / self.file, map_location=work.device, weights_only=True)
            module.load_state_dict(saved["module"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            self.average, self.step, self.running = saved["average"], saved["step"], saved["running"]

    def save(self):
        """Write the state to the workspace."""
        state = {"module": self.module.state_dict(), "average": self.average, "step": self.step}
        state |= {"running": self.running, "optimizers": [each.state_dict() for each in self.optimizers]}
        self.work.write(self.file, lambda p: torch.save(state, p))

    def learn(self, loss, rate):
        """Take a step down the gradient of a loss."""
        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            group["lr"] = rate
        loss.backward()
        if PROCESSES > 1:
            average_gradients(self.module)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        forget = 1 - min(self.ema, self.step / (self.step + 10))  # forget the first weights soon
        torch._foreach_lerp_(list(self.average.values()), list(self.module.state_dict().values()), forget)
        # A tensor, because reading a number would wait for the GPU.
        self.running = 0.99 * self.running + 0.01 * loss.detach()

    @torch.no_grad()
    def show(self, look, seen):
        """Call look(module, samples seen) while the module has the average of its weights."""
        learning = {k: w.clone() for k, w in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        look(self.module, seen)
        self.module.load_state_dict(learning)


def train_stage(work, stage, module, loss_of, samples, batch, lr, ema=0.0, look=None):
    """Train `module` on loss_of(generator, n), the mean over n samples, until it has seen `samples` of them.

    On a GPU the batch is eight times as large and the learning rate twice as high (the square root would be
    2.8).  The rate warms up, stays, and falls to zero over the last 30 %, so that the end can be moved while
    the stage runs.  The state is saved every minute.  The random numbers of a step depend only on its number
    and the process, so a killed stage continues as if nothing had happened.  Several processes share each
    batch and average their gradients.  ema: the result is an average of the weights that forgets 1 - ema per
    step.  look(module, samples seen) is called every five minutes.
    """
    final = work / f"{stage}.safetensors"
    module.to(work.device)
    if final.exists():
        module.load_state_dict(load_file(final))
        return
    if work.device == "cuda":
        batch, lr = 8 * batch, 2 * lr
    torch.set_flush_denormal(True)
    learner, steps = Learner(work, stage, module, lr, ema), samples // batch
    began = kept = looked = time.time()
    first = learner.step
    while (step := learner.step) < steps:
        with torch.autocast(work.device, torch.bfloat16):
            generator = torch.Generator(work.device).manual_seed(step * PROCESSES + RANK)
            loss = loss_of(generator, batch // PROCESSES)
        rate = lr * min(1, (step + 1) / 200, (steps - step) / (0.3 * steps))
        learner.learn(loss, rate)
        step += 1
        if RANK:
            continue
        if step % 100 == 0:
            mean = learner.running / (1 - 0.99**step)
            with open(work / f"{stage}.csv", "a", newline="") as f:
                csv.writer(f).writerow([step * batch, f"{mean:.5f}", f"{rate:.2e}"])
            pace = (step - first) * batch / (time.time() - began)
            print(f"{stage} {step * batch:,} of {samples:,}  loss {mean:.5f}  {pace:.0f}/s", flush=True)
        if time.time() - kept > SAVE_EVERY or step == steps:
            learner.save()
            work.cost(stage, (step - first) * batch, time.time() - began)
            began, kept, first = time.time(), time.time(), step
        if look and (time.time() - looked > LOOK_EVERY or step == steps):
            learner.show(look, step * batch)
            looked = time.time()
    module.load_state_dict(learner.average)
    if not RANK:
        weights = {k: w.contiguous() for k, w in learner.average.items()}
        work.write(final.name, lambda p: save_file(weights, p))
