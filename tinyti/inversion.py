"""Textual Inversion (Gal et al., 2208.01618): learn the vectors of a word, and nothing else, so that a frozen
model predicts the noise in pictures of a thing from prompts that name it.  Equation 2 of the paper:

    v* = argmin_v  E  || eps - eps_theta(x_t, t, c(prompt with v)) ||²
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .concept import Concept
from .data import prompt
from .diffusion import randn

EVALUATIONS = 16  # samples in the fixed batch that a vector is judged by
AVERAGE = 50  # steps that the word is an average over
# The part of the timesteps that is drawn from.  The paper takes (0, 1), but at the low end the picture is in
# plain sight, and a prompt hardly changes the loss, which is largest there (notebook 1 has the curves).
TIMESTEPS = (0.25, 0.95)

# What `choose_start` tries: common nouns that are one entry of CLIP's vocabulary and most of BERT's.
START_WORDS = """
    cat dog bird fish rabbit bear horse cow sheep mouse elephant lion fox monkey turtle frog insect animal
    person man woman child face hand baby doll toy robot statue sculpture figurine mask monster dragon
    car truck bus train bike boat ship plane house building castle church bridge tower room
    tree flower plant leaf mushroom fruit apple cake bread food mountain rock cloud cup mug bottle bowl plate
    teapot vase lamp clock chair table sofa bed bag backpack hat shoe shirt dress glasses book phone camera
    computer guitar piano ball kite candle key box jar can pot pillow teddy necklace ring
""".split()
STYLE_WORDS = """
    painting drawing sketch art watercolor oil pencil ink cartoon anime comic illustration poster print
    mosaic glass neon pixel photo abstract pattern graffiti collage render vintage
""".split()


@dataclass
class Subject:
    """One word and what it is learned from: the latents of its pictures, and the prompts for each of them.

    The word, `concept.vectors`, is an average over the last points of a path that the optimizer walks: single
    points are noisy, for every step has seen a few samples only.
    """

    concept: Concept
    mean: torch.Tensor  # (pictures, flips, C, h, w); a draw is mean + std * noise
    std: torch.Tensor
    prompts: list[list[str]]  # for each picture, one per template
    start: torch.Tensor | None = None  # the vectors before the first step, on the CPU
    path: torch.Tensor | None = None  # where the optimizer is
    step: int = 0  # how many the word has been trained for
    evaluations: list[float] = field(default_factory=list)  # loss on the fixed batch, from step 0 on
    finished: bool = False
    optimizer: torch.optim.Optimizer | None = None

    def state_dict(self):
        """All that a later run needs to go on exactly from here."""
        return {
            "step": self.step,
            "vectors": self.concept.vectors.detach().cpu().clone(),
            "start": self.start,
            "path": self.path,
            "evaluations": list(self.evaluations),
            "finished": self.finished,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }

    def put(self, vectors):
        """Replace the word's vectors."""
        with torch.no_grad():
            self.concept.vectors.copy_(vectors)

    @contextmanager
    def taking_a_step(self):
        """In the block, the optimizer's point is in the word's place; what is left there is its next."""
        word = self.concept.vectors.detach().cpu().clone()
        self.put(self.path)
        try:
            yield
            self.path = self.concept.vectors.detach().cpu().clone()
            self.step += 1
            word = word.lerp(self.path, max(2 / (self.step + 1), 1 / AVERAGE))
        finally:  # also where Ctrl-C ends a step half-way
            self.put(word)

    def load_state_dict(self, state):
        """Take up what `state_dict` gave; the optimizer's part waits for `invert` to make one."""
        self.put(state["vectors"])
        self.start, self.path = state["start"], state["path"]
        self.step, self.finished = state["step"], state["finished"]
        self.evaluations = list(state["evaluations"])
        if state["optimizer"]:
            self.optimizer = torch.optim.Adam([self.concept.vectors])
            self.optimizer.load_state_dict(state["optimizer"])


@dataclass
class Step:
    """What one step did to one word."""

    subject: Subject
    number: int
    loss: float
    gradient: float  # its norm before clipping
    evaluated: bool  # whether the subject's `evaluations` has a new entry


@torch.no_grad()
def make_subject(model, concept, photos, templates, flip=True):
    """Encode the photos once, both ways round unless told not to: -> Subject."""
    images = torch.stack([photo.pixels for photo in photos])
    views = torch.stack([images, images.flip(-1)], 1) if flip else images[:, None]  # (N, flips, 3, H, W)
    moments = [model.vae.encode(view.to(model.device, model.dtype)) for view in views]  # a photo at a time
    mean, std = (torch.stack(part).float() * model.vae.config.scaling_factor for part in zip(*moments))
    prompts = [[prompt(t, concept.name, photo.caption) for t in templates] for photo in photos]
    return Subject(concept, mean, std, prompts)


def draw(subject, size, generator):
    """A batch of one subject: latents x_0 (B, C, h, w), noise eps, timesteps' quantiles (B,), prompts."""
    pictures, flips = subject.mean.shape[:2]
    i = torch.randint(pictures, (size,), generator=generator)
    j = torch.randint(flips, (size,), generator=generator)
    k = torch.randint(len(subject.prompts[0]), (size,), generator=generator)
    u = torch.rand(size, generator=generator)
    mean, std = subject.mean[i, j], subject.std[i, j]
    x_0 = mean + std * randn(mean.shape, generator, mean)
    eps = randn(mean.shape, generator, mean)
    return x_0, eps, u, [subject.prompts[a][b] for a, b in zip(i.tolist(), k.tolist())]


def losses(model, x_0, eps, t, prompts):
    """|| eps - eps_theta(x_t, t, c(prompt)) ||² of each sample, a mean over the latents: (B,) in fp32."""
    x_t = model.schedule.add_noise(x_0, eps, t)
    with torch.autocast(x_0.device.type, model.dtype, enabled=model.dtype == torch.float16):
        context = model.encode_prompts(prompts)
        prediction = model.unet(x_t.to(model.dtype), t.to(x_t.device), context)
    target = model.schedule.target(x_0, eps, t)
    return F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))


def timestep_at(u, model, span):
    """The timesteps t (B,) at the quantiles u (B,) of a part of the schedule."""
    low, high = span
    return ((low + (high - low) * u) * model.schedule.num_train_timesteps).long()


@torch.no_grad()
def evaluate(model, subject, seed=0, span=TIMESTEPS):
    """The loss on a fixed batch: always the same pictures, prompts and noise, and timesteps spread evenly."""
    generator = torch.Generator().manual_seed(seed + 2**31)  # not a step's
    x_0, eps, _, prompts = draw(subject, EVALUATIONS, generator)
    t = timestep_at((torch.arange(EVALUATIONS) + 0.5) / EVALUATIONS, model, span)
    return losses(model, x_0, eps, t, prompts).mean().item()


@torch.no_grad()
def choose_start(model, subject, words, seed=0, span=TIMESTEPS):
    """The word of the vocabulary that already explains the pictures best: {word: loss}, best first.

    Words that are not one entry of the vocabulary are passed over.  Leaves the concept as it was.
    """
    before, found = subject.concept.vectors.clone(), {}
    for word in words:
        ids = model.tokenizer.core.encode(word, add_special_tokens=False).ids
        if len(ids) == 1:
            subject.put(model.text.table[ids].expand_as(before))
            found[word] = evaluate(model, subject, seed, span)
    subject.put(before)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def invert(
    model,
    subjects,
    steps=1000,
    batch_size=8,
    lr=5e-3,
    seed=0,
    early_stop=True,
    evaluate_every=10,
    accumulate=1,
    span=TIMESTEPS,
):
    """Learn the vectors of every subject's word side by side: a generator of `Step`s, one a step and word.

    batch_size: samples of each word per step, in all processes together; accumulate: parts in which each
    process works them off.  lr: what Adam takes, whatever the batch.  span: the part of the timesteps, from 0
    to 1, that is drawn from.  A word ends where `converged` says so.
    The draws of a step depend on `seed` and its number alone: a run that is resumed
    (Subject.load_state_dict), distributed, or has further words beside it walks the same path.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    for s in subjects:
        if s.step == 0:
            s.start = s.path = s.concept.vectors.detach().cpu().clone()
            s.optimizer = torch.optim.Adam([s.concept.vectors], lr=lr)
        s.evaluations = s.evaluations or [evaluate(model, s, seed, span)]

    for number in range(min(s.step for s in subjects) + 1, steps + 1):
        active = [s for s in subjects if not s.finished and s.step < number]
        if not active:
            continue
        seeds = [torch.Generator().manual_seed(seed * 1_000_003 + number) for _ in active]
        drawn = [draw(s, batch_size, generator) for s, generator in zip(active, seeds)]
        x_0, eps, u = (torch.cat(parts) for parts in list(zip(*drawn))[:3])
        prompts = [line for *_, lines in drawn for line in lines]
        t = timestep_at(u, model, span)
        totals = torch.zeros(len(active), device=model.device)
        with ExitStack() as stack:
            for s in active:
                stack.enter_context(s.taking_a_step())
                s.optimizer.zero_grad()
            for part in torch.arange(rank, batch_size, ranks).tensor_split(accumulate):
                if len(part):  # the last of many processes may have none
                    rows = (torch.arange(len(active))[:, None] * batch_size + part).flatten()
                    each = losses(model, x_0[rows], eps[rows], t[rows], [prompts[i] for i in rows])
                    each = (
                        each.view(len(active), -1).sum(1) / batch_size
                    )  # a word's loss moves that word only
                    scaler.scale(each.sum()).backward()
                    totals += each.detach()
            if ranks > 1:  # sums, for every process has divided by the whole batch
                dist.all_reduce(totals)
                for s in active:
                    dist.all_reduce(s.concept.vectors.grad)
            gradients = []
            for s in active:
                scaler.unscale_(s.optimizer)
                gradients.append(torch.nn.utils.clip_grad_norm_([s.concept.vectors], 1.0).item())
                scaler.step(s.optimizer)
            scaler.update()

        evaluated = number % evaluate_every == 0
        for s in active if evaluated else []:
            value = torch.tensor(evaluate(model, s, seed, span), device=model.device)
            if ranks > 1:  # so that all agree when to end, down to the rounding
                dist.broadcast(value, 0)
            s.evaluations.append(value.item())
            s.finished = early_stop and converged(s.evaluations)
        for s, loss, gradient in zip(active, totals.tolist(), gradients):
            yield Step(s, number, loss, gradient, evaluated)


def converged(evaluations, window=12, ratio=0.05):
    """Whether the last evaluations vary little against all of them (DVAR, 2302.04841)."""
    if len(evaluations) < 2 * window:
        return False
    history = torch.tensor(evaluations, dtype=torch.float64)
    return bool(history[-window:].var() < ratio**2 * history.var())


def trouble(subject):
    """Why the word is not to be trusted, in a line; None if it has learned something."""
    first, last = subject.evaluations[0], subject.evaluations[-1]
    if not torch.isfinite(subject.concept.vectors).all() or last != last:
        return "the vector or the loss is not a number; lower --lr, or take --precision bf16 or fp32"
    if torch.equal(subject.concept.vectors.detach().cpu(), subject.start):
        return "the vector has not moved: its gradient was zero"
    if last >= first:
        return f"the evaluation loss has not fallen ({first:.4f}, now {last:.4f}); try another --lr or --init"
    return None
