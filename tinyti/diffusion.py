"""The diffusion: how noise is added (Ho et al., 2006.11239) and how samplers take it away again.

Nothing here knows a network: a sampler is given a function that predicts."""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

SAMPLERS = ("ddim", "ddpm", "dpm++")


@dataclass
class Schedule:
    """The noise schedule and the samplers' steps; its fields are those of scheduler_config.json.

    `betas` and `alpha_bar` (the product of 1 - beta up to t; (num_train_timesteps,)) are float64.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    def __post_init__(self):
        start, end, steps = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.beta_schedule == "linear":
            self.betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif self.beta_schedule == "scaled_linear":
            self.betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        else:
            raise ValueError(
                f"beta_schedule is {self.beta_schedule!r}; supported are linear and scaled_linear"
            )
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}; supported are epsilon and v_prediction"
            )
        if self.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"timestep_spacing is {self.timestep_spacing!r}; supported are leading, trailing and linspace"
            )
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)

    @classmethod
    def from_config(cls, config):
        """A schedule from the dictionary in scheduler_config.json, whichever scheduler wrote it.

        ValueError where the file asks for what would change the numbers and is not done here.
        """
        unsupported = {
            "trained_betas": None,
            "clip_sample": False,
            "thresholding": False,
            "rescale_betas_zero_snr": False,
        }
        for name, supported in unsupported.items():
            if config.get(name, supported) not in (supported, None):
                raise ValueError(
                    f"scheduler_config.json has {name} = {config[name]!r}; only {supported} is supported"
                )
        return cls(**{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None})

    def _at(self, t, like):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`; t an int or (B,)."""
        a = self.alpha_bar[torch.as_tensor(t, device="cpu")]
        shape = (-1,) + (1,) * (like.ndim - 1)
        return a.sqrt().to(like).reshape(shape), (1 - a).sqrt().to(like).reshape(shape)

    def add_noise(self, x_0, eps, t):
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps; t (B,) (2006.11239, eq. 4)."""
        signal, noise = self._at(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0, eps, t):
        """What the network learns to predict: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

        v is from Salimans and Ho, 2202.00512.
        """
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self._at(t, x_0)
        return signal * eps - noise * x_0

    def split(self, x_t, prediction, t):
        """The two parts that the prediction says x_t is made of: x_0 and eps."""
        signal, noise = self._at(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - noise * prediction) / signal, prediction
        return signal * x_t - noise * prediction, signal * prediction + noise * x_t

    def timesteps(self, steps, sampler="ddim"):
        """The timesteps that a sampler of `steps` steps visits, from high to low (2305.08891, table 2).

        ValueError for more steps than the model was trained on.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(
                f"steps is {steps}; it must lie in 1 … {total}, the steps of the model's training"
            )
        # DPM-Solver++ reserves one point more, for the end of its last step.
        points = steps + 1 if sampler == "dpm++" and self.timestep_spacing != "trailing" else steps
        if self.timestep_spacing == "linspace":
            t = np.linspace(0, total - 1, points).round()[::-1]
        elif self.timestep_spacing == "leading":
            t = np.arange(points)[::-1] * (total // points) + self.steps_offset
        else:
            t = np.arange(total, 0, -total / steps).round() - 1
        return [int(i) for i in t[:steps]]

    def _alpha_bar(self, t):
        """alpha_bar at t as a float; before the first timestep, what the configuration says is there."""
        if t >= 0:
            return self.alpha_bar[t].item()
        return 1.0 if self.set_alpha_to_one else self.alpha_bar[0].item()

    def ddim_step(self, x_t, prediction, t, t_prev, eta=0.0, z=None):
        """x at t -> x at t_prev (2010.02502, eq. 12 and 16); z is the noise that eta > 0 adds."""
        x_0, eps = self.split(x_t, prediction, t)
        a, a_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        x = math.sqrt(a_prev) * x_0 + math.sqrt(1 - a_prev - sigma**2) * eps
        return x + sigma * z if sigma > 0 else x

    def ddim_inverse_step(self, x, eps, t_prev, t):
        """x at t_prev -> x at t, where ddim_step with this eps comes from (2010.02502, eq. 13)."""
        a_prev, a = self._alpha_bar(t_prev), self._alpha_bar(t)
        return math.sqrt(a / a_prev) * (x - math.sqrt(1 - a_prev) * eps) + math.sqrt(1 - a) * eps

    def ddpm_step(self, x_t, prediction, t, t_prev, z):
        """A draw from q(x at t_prev | x at t, x_0) (2006.11239, eq. 6 and 7); t_prev -1 is the picture."""
        x_0, _ = self.split(x_t, prediction, t)
        a, a_prev = self._alpha_bar(t), self._alpha_bar(t_prev) if t_prev >= 0 else 1.0
        alpha = a / a_prev  # of all the steps from t_prev to t together
        mean = (math.sqrt(a_prev) * (1 - alpha) * x_0 + math.sqrt(alpha) * (1 - a_prev) * x_t) / (1 - a)
        return mean + math.sqrt((1 - a_prev) / (1 - a) * (1 - alpha)) * z

    def dpm_step(self, x_t, x_0, t, t_prev, earlier=None):
        """x at t -> x at t_prev by DPM-Solver++(2M) (2211.01095, algorithm 2); t_prev -1 is the picture.

        `earlier` is (t, x_0) of the step before; without it the step is of first order.
        """
        if t_prev < 0:
            return x_0
        a, a_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        h = self._log_snr(t_prev) - self._log_snr(t)
        if earlier is not None:
            t_earlier, x_0_earlier = earlier
            r = (self._log_snr(t) - self._log_snr(t_earlier)) / h
            x_0 = x_0 + (x_0 - x_0_earlier) / (2 * r)
        return math.sqrt((1 - a_prev) / (1 - a)) * x_t - math.sqrt(a_prev) * math.expm1(-h) * x_0

    def _log_snr(self, t):
        """lambda_t = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the log signal-to-noise ratio."""
        a = self._alpha_bar(t)
        return 0.5 * math.log(a / (1 - a))


def randn(shape, generator=None, like=None):
    """Standard normal noise; a list of generators draws each sample of the batch from its own.

    Drawn on the generator's device and brought to `like`'s device and dtype, so that a seed means the
    same noise wherever the model runs.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; give one, or one each")
        z = torch.cat([torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in generator])
    else:
        z = torch.randn(shape, generator=generator, device=generator.device if generator else "cpu")
    return z if like is None else z.to(like)


def denoise(predict, x_T, schedule, steps=50, sampler="ddim", eta=0.0, generator=None, start=0):
    """Walk from noise to a picture, yielding x after each step; the last one is x_0.

    predict(x_t, t) -> the network's prediction, t an int.  x_T (B, C, H, W) is standard normal noise; with
    `start` the first of the timesteps are skipped, and it is x_t at `schedule.timesteps(...)[start]`.
    The next step begins with what was yielded, so a caller who writes into that steers the walk.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; there are {', '.join(SAMPLERS)}")
    x, earlier = x_T, None
    ts = schedule.timesteps(steps, sampler)
    for i, t in enumerate(ts[start:], start):
        prediction = predict(x, t)
        t_next = ts[i + 1] if i + 1 < len(ts) else -1
        if sampler == "ddim":
            # Strides of equal length, as diffusers does, also where the spacing rounds to unequal ones.
            t_prev = t - schedule.num_train_timesteps // steps
            x = schedule.ddim_step(
                x, prediction, t, t_prev, eta, randn(x.shape, generator, x) if eta > 0 else None
            )
        elif sampler == "ddpm":
            x = schedule.ddpm_step(x, prediction, t, t_next, randn(x.shape, generator, x))
        else:
            x_0, _ = schedule.split(x, prediction, t)
            x = schedule.dpm_step(x, x_0, t, t_next, earlier)
            earlier = (t, x_0)
        yield x
