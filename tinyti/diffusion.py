"""Diffusion: the noise schedule (Ho et al., 2006.11239), and the samplers that remove the noise again.

This file knows no network: a sampler takes a function that predicts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor

SAMPLERS = ("ddim", "ddpm", "dpm++")
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
}
DEFAULT_SPACING = {"ddim": "leading", "ddpm": "leading", "dpm++": "linspace"}  # for None, as in diffusers


@dataclass
class Schedule:
    """The noise schedule and the samplers' steps; its fields are those of scheduler_config.json.

    `betas` and `alpha_bar`, the product of 1 - beta up to t, are float64, (num_train_timesteps,).
    ValueError for values that are not supported.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False  # the last timestep is pure noise

    def __post_init__(self):
        start, end, steps = self.beta_start, self.beta_end, self.num_train_timesteps
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r:.100}; supported are {', '.join(map(str, choices))}")
        if not 0 < start <= end < 1:
            raise ValueError(f"beta_start is {start!r} and beta_end {end!r}; expected 0 < start <= end < 1")
        if not (1 <= steps <= 100_000 and 0 <= self.steps_offset < steps):
            raise ValueError(f"num_train_timesteps is {steps!r} and steps_offset {self.steps_offset!r}")
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1
        self.betas = torch.linspace(start**power, end**power, steps, dtype=torch.float64, device="cpu")
        self.betas = self.betas ** (1 / power)
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        if self.rescale_betas_zero_snr:
            if self.prediction_type == "epsilon":
                raise ValueError("rescale_betas_zero_snr works with v_prediction only, not with epsilon")
            signal = self.alpha_bar.sqrt()  # shifted to end at 0, stretched to begin as before (2305.08891)
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
            self.alpha_bar = signal.square()
            self.betas[1:] = 1 - self.alpha_bar[1:] / self.alpha_bar[:-1]
        self._tables = {}  # cache of `_at`, by device and dtype

    def _at(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`; t an int or (B,)."""
        key = like.device, like.dtype
        if key not in self._tables:  # copied once, because each copy would wait for the GPU
            self._tables[key] = [a.sqrt().to(like) for a in (self.alpha_bar, 1 - self.alpha_bar)]
        t = t.to(like.device) if torch.is_tensor(t) else t
        signal, noise = (table[t].reshape(-1, *(1,) * (like.ndim - 1)) for table in self._tables[key])
        return signal, noise

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; t (B,) (2006.11239, eq. 4)."""
        signal, noise = self._at(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """What the network learns to predict: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

        v is from Salimans and Ho, 2202.00512.
        """
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self._at(t, x_0)
        return signal * eps - noise * x_0

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Split x_t into the x_0 and eps that the prediction implies."""
        signal, noise = self._at(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def timesteps(self, steps: int, sampler: str = "ddim") -> list[int]:
        """The timesteps that a sampler of `steps` steps visits, from high to low (2305.08891, table 2).

        ValueError for more steps than the training had timesteps, or than the spacing has room for.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"steps is {steps}; it must lie in 1 … {total}, the training's timesteps")
        spacing = self.timestep_spacing or DEFAULT_SPACING[sampler]
        # DPM-Solver++ reserves one more point, for the end of its last step.
        points = steps + 1 if sampler == "dpm++" and spacing != "trailing" else steps
        if spacing == "linspace":
            t = np.linspace(0, total - 1, points).round()[::-1]
        elif spacing == "leading":
            t = np.arange(points)[::-1] * (total // points) + self.steps_offset
        else:
            t = np.arange(total, 0, -total / steps).round() - 1
        ts = [int(i) for i in t[:steps]]
        if ts[0] >= total or any(a <= b for a, b in pairwise(ts)):
            raise ValueError(f"steps is {steps}: too many for {sampler} at {spacing} spacing")
        return ts

    def _alpha_bar(self, t: int) -> float:
        """alpha_bar at t as a float; for t < 0 it is 1 or alpha_bar[0], by `set_alpha_to_one`."""
        if t >= 0:
            return self.alpha_bar[t].item()
        return 1.0 if self.set_alpha_to_one else self.alpha_bar[0].item()

    def ddim_step(
        self, x_0: Tensor, eps: Tensor, t: int, t_prev: int, eta: float = 0.0, z: Tensor | None = None
    ) -> Tensor:
        """x_0 and eps at t -> x at t_prev (2010.02502, eq. 12 and 16); z is the noise that eta > 0 adds.

        With eta = 1 it draws from q(x at t_prev | x at t, x_0), which is DDPM's step (2006.11239, eq. 7).
        """
        a, a_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x = math.sqrt(a_prev) * x_0 + math.sqrt(1 - a_prev - sigma**2) * eps
        return x + sigma * z if sigma > 0 else x

    def ddim_inverse_step(self, x: Tensor, eps: Tensor, t_prev: int, t: int) -> Tensor:
        """Invert `ddim_step` with this eps and eta = 0: x at t_prev -> x at t (2010.02502, eq. 13)."""
        a_prev, a = self._alpha_bar(t_prev), self._alpha_bar(t)
        return math.sqrt(a / a_prev) * (x - math.sqrt(1 - a_prev) * eps) + math.sqrt(1 - a) * eps

    def dpm_step(
        self, x_t: Tensor, x_0: Tensor, t: int, t_prev: int, earlier: tuple[int, Tensor] | None = None
    ) -> Tensor:
        """x at t -> x at t_prev by DPM-Solver++(2M) (2211.01095, algorithm 2).

        `earlier` is (t, x_0) of the previous step; without it the step is first-order.
        """
        a, a_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        h = self._log_snr(t_prev) - self._log_snr(t)
        if earlier is not None:
            t_earlier, x_0_earlier = earlier
            r = (self._log_snr(t) - self._log_snr(t_earlier)) / h
            x_0 = x_0 + (x_0 - x_0_earlier) / (2 * r)
        return math.sqrt((1 - a_prev) / (1 - a)) * x_t - math.sqrt(a_prev) * math.expm1(-h) * x_0

    def _log_snr(self, t: int) -> float:
        """lambda_t = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the log signal-to-noise ratio."""
        a = max(self._alpha_bar(t), 2**-24)  # as diffusers does at zero terminal SNR
        return 0.5 * math.log(a / (1 - a))


def randn(
    shape: Sequence[int], generator: Generator | list[Generator] | None = None, like: Tensor | None = None
) -> Tensor:
    """Standard normal noise; with a list of generators, each sample of the batch comes from its own.

    It is drawn in fp32 on the generator's device, then copied to the device and dtype of `like`, so a seed
    gives the same noise wherever the model runs.  ValueError for a list of another length than the batch.
    """
    several = generator if isinstance(generator, (list, tuple)) else [generator] * (generator is not None)
    if not all(isinstance(g, Generator) for g in several):
        raise TypeError(f"generator is {generator!r:.100}; it is a torch.Generator, a list of them or None")
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one, or one each")
        one = 1, *shape[1:]
        z = torch.cat(
            [torch.randn(one, generator=g, device=g.device, dtype=torch.float32) for g in generator]
        )
    else:
        device = generator.device if generator else "cpu"
        z = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return z if like is None else z.to(like, non_blocking=like.is_cuda)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for the GPU's queue."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def denoise(
    predict: Callable[[Tensor, int], Tensor],
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 50,
    sampler: str = "ddim",
    eta: float = 0.0,
    generator: Generator | list[Generator] | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """Go from noise to a picture and yield x after each step; the last one is x_0.

    predict(x_t, t) -> the network's prediction, t an int.  x_T (B, C, H, W) is standard normal noise; if the
    first `start` timesteps are skipped, it is x_t at `schedule.timesteps(...)[start]`.  Steps are computed in
    the dtype of x_T.  Each step starts from the tensor yielded before, so a caller may change that in place.
    ValueError for an unknown sampler, or for steps, eta or start out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; there are {', '.join(SAMPLERS)}")
    ts = schedule.timesteps(steps, sampler)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in 0 … 1")
    if not 0 <= start < steps:
        raise ValueError(f"start is {start}; it must lie in 0 … {steps - 1}, the steps that can be skipped")
    x, earlier = x_T, None
    for t, t_next in list(zip(ts, [*ts[1:], -1]))[start:]:
        x_0, eps = schedule.split(x, predict(x, t).to(x.dtype), t)
        if sampler == "ddim":
            # Like diffusers, step back by T // steps even where rounding makes the timesteps uneven.
            t_prev = t - schedule.num_train_timesteps // steps
            z = randn(x.shape, generator, x) if eta > 0 else None
            x = schedule.ddim_step(x_0, eps, t, t_prev, eta, z)
        elif t_next < 0:
            x = x_0
        elif sampler == "ddpm":
            x = schedule.ddim_step(x_0, eps, t, t_next, 1.0, randn(x.shape, generator, x))
        else:
            x, earlier = schedule.dpm_step(x, x_0, t, t_next, earlier), (t, x_0)
        yield x
