"""Textual Inversion (Gal et al., 2208.01618, eq. 2): train only the vectors v of a word; the model is frozen.

    v* = argmin_v  E  || eps - eps_theta(x_t, t, c(prompt with v)) ||²

On a CPU the same settings give the same bytes (except batches of one 16-pixel picture on several threads).
On a GPU the last digits differ, because attention sums its gradients in no fixed order."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor

from .concept import Concept, word_length
from .examples import Batch, Examples, draw_batch
from .graphs import record_graph
from .model import LatentDiffusion
from .whitened import adam, whitened

STEPS, BATCH_SIZE = 50, 8
OPTIMIZERS = {"whitened": (whitened, 0.12), "adam": (adam, 5e-3)}  # step sizes: radians, learning rate
AVERAGE = 10  # the word is a running average of about the last 10 points of the path
EVALUATE_EVERY = 5  # steps
EVALUATIONS = 8  # samples in the fixed evaluation batch
# Timesteps are drawn from this part of the schedule; the paper uses all of it, (0, 1).  At small t the
# picture is almost free of noise: the loss is largest, yet the prompt hardly changes it (notebook 1).
TIMESTEPS = (0.25, 0.95)


class Point(NamedTuple):
    """Everything that a step changes.  A step replaces it as a whole, so Ctrl-C never leaves half a step."""

    step: int
    path: Tensor  # where the optimizer stands, (n, D)
    vectors: Tensor  # the word: a running average of the path, (n, D)
    memory: dict  # the optimizer's state
    scale: float  # loss scale: keeps fp16 gradients from underflowing


class Inversion:
    """The training state of one word; `invert` advances it step by step.

    `step_size` is the angle of a whitened step, in radians, or Adam's learning rate.  Whitened steps give the
    path the length of a real word.  Each step sees only a few samples, so the path is noisy.  The word is its
    running average over about `average` steps; prompts use that (`concept`).  The attribute `optimizer` may
    be replaced by a function like those in whitened.py.  `evaluations` are losses on the fixed batch, every
    EVALUATE_EVERY steps from step 0.  `log` has a row per step: loss, norm of the gradient, length of the
    word.  Only the tensor `concept.vectors` is changed in place.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        concept: Concept,
        optimizer: str = "whitened",
        step_size: float | None = None,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r:.100}; there are {', '.join(OPTIMIZERS)}")
        function, default = OPTIMIZERS[optimizer]
        size = default if step_size is None else step_size
        if not 0 < size < (math.pi / 2 if function is whitened else math.inf):
            raise ValueError(f"step_size is {size}; expected an angle below π/2, or a learning rate, above 0")
        length = word_length(model.text.table)
        settings = {"angle": size, "length": length} if function is whitened else {"lr": size}
        self.optimizer = partial(function, **settings)
        self.concept = concept
        self.start = concept.vectors.detach().clone()
        self.point = Point(0, self.start, self.start, {}, 2.0**16 if model.dtype == torch.float16 else 1.0)
        self.average = AVERAGE
        self.evaluations: list[float] = []
        self.log: list[Tensor] = []

    @property
    def step(self) -> int:
        """The number of steps taken so far."""
        return self.point.step

    @property
    def path(self) -> Tensor:
        """Where the optimizer stands, (n, D)."""
        return self.point.path

    @property
    def vectors(self) -> Tensor:
        """The word (n, D)."""
        return self.point.vectors

    def move(self, losses: Tensor, gradients: Tensor) -> None:
        """Take one step, given a batch's losses (B,) and their gradients (B, n, D)."""
        step, path, vectors, memory, scale = self.point
        if scale > 1 and not gradients.isfinite().all():  # fp16 overflow: skip the batch
            scale = scale / 2
        else:
            path, memory = self.optimizer(path, gradients, memory)
            vectors = vectors.lerp(path, max(2 / (step + 2), 1 / self.average))
        # An fp16 overflow costs only this batch, so the log gets finite numbers (0 for NaN).
        loss, gradient = losses.mean().nan_to_num(), gradients.mean(dim=0).norm().nan_to_num()
        del self.log[step:]  # the row of a step that Ctrl-C interrupted
        self.log.append(torch.stack([loss, gradient, vectors.norm(dim=-1).mean()]))
        self.point = Point(step + 1, path, vectors, memory, scale)
        self.show(vectors)

    @torch.no_grad()
    def show(self, vectors: Tensor) -> None:
        """Copy these vectors (n, D) into the concept, so that prompts use them."""
        self.concept.vectors.copy_(vectors)

    def is_finite(self) -> bool:
        """Whether the word and its last evaluation are finite numbers."""
        return bool(self.vectors.isfinite().all()) and math.isfinite(self.evaluations[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a later run needs to continue exactly from here, as CPU tensors."""
        step, path, vectors, memory, scale = self.point
        log = torch.cat([self.start.new_zeros(0, 3), *(row[None] for row in self.log[: self.step])])
        saved = {"start": self.start, "path": path, "word": vectors, "memory": memory, "scale": scale}
        return _to(saved | {"step": step, "evaluations": [*self.evaluations], "log": log}, "cpu")

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a `state_dict`, moved to this word's device.  This state keeps its own step size.

        ValueError if it does not fit this word's shape and optimizer.  The state of a function that replaced
        `optimizer` is not checked.
        """
        function = getattr(self.optimizer, "func", None)
        if function in (whitened, adam) and not _is_state(saved, *self.start.shape, function is whitened):
            raise ValueError(f"this is not the state of vectors of shape {tuple(self.start.shape)}")
        saved = _to(saved, self.start.device)
        self.start, self.evaluations, self.log = saved["start"], [*saved["evaluations"]], [*saved["log"]]
        self.point = Point(saved["step"], saved["path"], saved["word"], saved["memory"], saved["scale"])
        self.show(self.vectors)


def invert(
    model: LatentDiffusion,
    state: Inversion,
    examples: Examples,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    accumulate: int = 1,
    span: tuple[float, float] = TIMESTEPS,
) -> Iterator[Inversion]:
    """Learn a word: yield its state after each step, until it has taken `steps` steps in total.

    batch_size: samples per step, over all processes.  accumulate: number of parts in which each process
    computes its share.  span: timesteps are drawn from this part of the schedule, in 0 … 1.  Training stops
    early if an evaluation is not finite.  A step's draws depend only on `seed` and the step number, so a
    resumed (Inversion.load_state_dict) or distributed run follows the same path.  TypeError for arguments
    that are not whole numbers, ValueError for numbers out of range.
    """
    low, high = span
    if not all(isinstance(number, int) for number in (steps, batch_size, seed, accumulate)):
        raise TypeError("steps, batch_size, seed and accumulate are whole numbers")
    if min(steps, batch_size, accumulate) < 1 or not 0 <= low < high <= 1:
        found = f"steps {steps}, batch_size {batch_size}, accumulate {accumulate} and span {span}"
        raise ValueError(f"{found}; expected at least 1 of each, and 0 <= low < high <= 1")
    compute = record_graph(partial(losses_and_gradients, model, state.concept.name))
    state.show(state.vectors)  # Ctrl-C may have come between a step and its show
    evaluate_on_time(model, state, examples, seed, span)
    while state.step < steps and math.isfinite(state.evaluations[-1]):
        generator = Generator().manual_seed(seed * 1_000_003 + state.step + 1)
        batch = draw_batch(model, examples, batch_size, generator, span)
        losses, gradients = backward(compute, state.point, batch, accumulate)  # (B,), (B, n, D): equation 2
        state.move(losses, gradients)
        evaluate_on_time(model, state, examples, seed, span)
        yield state


def losses(model: LatentDiffusion, batch: Batch, vectors: dict[str, Tensor] | None = None) -> Tensor:
    """|| eps - eps_theta(x_t, t, c(prompt)) ||² of each sample, (B,): the mean over its latents, or weighted.

    `vectors` {name: (B, n, D)} replace a word's own vectors, one copy per sample.
    """
    x_0, eps, t, ids, weight = batch
    x_t = model.schedule.add_noise(x_0, eps, t)
    with torch.autocast(x_0.device.type, model.dtype, enabled=model.dtype == torch.float16):
        context = model.encode_prompts(ids, vectors)
        prediction = model.predict(x_t.to(model.dtype), t, context)
    target = model.schedule.target(x_0, eps, t)
    error = F.mse_loss(prediction.float(), target, reduction="none")  # (B, C, h, w)
    if weight is None:
        return error.mean(dim=(1, 2, 3))
    return (weight * error).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * error.shape[1])


def losses_and_gradients(
    model: LatentDiffusion, name: str, scale: Tensor, vectors: Tensor, *batch: Tensor
) -> tuple[Tensor, Tensor]:
    """Each sample's loss (B,), and its gradient with respect to its own copy of the vectors, (B, n, D).

    One backward pass gives all gradients, because every sample has its own copy.  `batch` are the fields of a
    Batch.  `scale` is the loss scale for fp16; the gradients are divided by it again.
    """
    copies = vectors.detach().requires_grad_()  # (B, n, D)
    loss = losses(model, Batch(*batch), {name: copies})
    (gradient,) = torch.autograd.grad(scale * loss.sum(), copies)
    return loss.detach(), gradient / scale


def backward(compute, point: Point, batch: Batch, accumulate: int = 1) -> tuple[Tensor, Tensor]:
    """The losses (B,) and gradients (B, n, D) of a batch at a point; `compute` is losses_and_gradients.

    Each process computes its share, in `accumulate` parts to save memory; all processes get all rows.
    """
    size = len(batch.x_0)
    accumulate = min(accumulate, size)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = [size * i // (ranks * accumulate) for i in range(ranks * accumulate + 1)]
    own = bounds[rank * accumulate : (rank + 1) * accumulate + 1]  # where this process's parts begin and end
    vectors = point.path.expand(size, -1, -1)  # a copy for each sample
    scale = batch.x_0.new_full((), point.scale)
    loss, gradient = batch.x_0.new_zeros(size), torch.zeros_like(vectors)
    for start, end in pairwise(own):
        if start < end:
            part = (x[start:end] for x in (vectors, *batch) if x is not None)
            loss[start:end], gradient[start:end] = compute(scale, *part)
    if ranks > 1:  # the rows of other processes are zero, so the sum has all rows
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
    return loss, gradient


@torch.no_grad()
def evaluate(
    model: LatentDiffusion,
    examples: Examples,
    seed: int = 0,
    span: tuple[float, float] = TIMESTEPS,
    size: int = EVALUATIONS,
) -> float:
    """The loss on a fixed batch: always the same pictures, prompts and noise, at evenly spread timesteps."""
    generator = Generator().manual_seed(seed + 2**62)  # differs from every step's seed
    quantiles = (torch.arange(size, device="cpu", dtype=torch.float32) + 0.5) / size
    return losses(model, draw_batch(model, examples, size, generator, span, quantiles)).mean().item()


def evaluate_on_time(
    model: LatentDiffusion, state: Inversion, examples: Examples, seed: int, span: tuple[float, float]
) -> None:
    """Evaluate the word once at every EVALUATE_EVERY-th step; all processes use the first one's value."""
    due = state.step % EVALUATE_EVERY == 0
    if due and len(state.evaluations) <= state.step // EVALUATE_EVERY:
        value = torch.tensor(evaluate(model, examples, seed, span), device=model.device, dtype=torch.float32)
        if dist.is_initialized():  # rounding may differ, but all must stop at the same step
            dist.broadcast(value, 0)
        state.evaluations.append(value.item())


def is_flat(evaluations: list[float]) -> bool:
    """Whether more steps gain little: the last five evaluations fell by less than 1 % of the whole drop."""
    if len(evaluations) < 6:
        return False
    return evaluations[-5] - evaluations[-1] < 0.01 * (evaluations[0] - evaluations[-1])


def diagnose(state: Inversion) -> str | None:
    """One line that says why the word is not usable; None if it has learned something."""
    first, last = state.evaluations[0], state.evaluations[-1]
    if not state.is_finite() and state.step == 0:
        return "the loss is not a number from the start; check the weights, or take another --precision"
    if not state.is_finite():
        return "the vector or the loss is not a number; take a smaller --lr, or --precision bf16 or fp32"
    if torch.equal(state.vectors, state.start):
        return "the vector has not moved: its gradient was zero"
    if last >= first:
        found = f"the evaluation loss has not fallen ({first:.4f}, now {last:.4f})"
        return f"{found}; try another --init or a smaller step"
    return None


def _is_state(saved: Any, n: int, D: int, has_root: bool) -> bool:
    """Whether `saved` is a `state_dict` of n vectors of width D; `has_root`: of the whitened optimizer."""
    if not isinstance(saved, dict) or not isinstance(saved.get("memory"), dict):
        return False  # a tensor would treat a name as an index
    try:
        step, memory, evaluations = saved["step"], saved["memory"], saved["evaluations"]
        tensors = [(saved[name], (n, D)) for name in ("start", "path", "word")] + [(saved["log"], (step, 3))]
        if memory:
            tensors += [(memory["momentum"], (n, D)), (memory["moment"], (n, D, D) if has_root else (n, D))]
        if memory and has_root:
            tensors.append((memory["root"], (n, D, D)))
        return (
            all(tuple(x.shape) == shape and x.dtype == torch.float32 for x, shape in tensors)
            and all(x.layout == torch.strided and not x.is_meta for x, _ in tensors)
            and all(isinstance(number, int) for number in (step, memory.get("step", 0)))
            and (0 < memory["step"] <= step if memory else step == 0 or saved["scale"] > 1)
            and 1 <= saved["scale"] < math.inf
            and (step > 0) <= len(evaluations)
            and 0 <= len(evaluations) - step // EVALUATE_EVERY <= 1  # Ctrl-C may come before an evaluation
            and all(isinstance(value, float) for value in evaluations)
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _to(saved: Any, device: str | torch.device) -> Any:
    """A copy of saved values, with the tensors on a device."""
    if isinstance(saved, dict):
        return {key: _to(value, device) for key, value in saved.items()}
    return saved.to(device) if isinstance(saved, Tensor) else saved
