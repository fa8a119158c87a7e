"""The schedule and the samplers: against diffusers' schedulers over whole trajectories, and closed forms."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from tinyti.diffusion import Schedule, denoise, randn

from .conftest import relative_error

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}


def network(x, t):
    """A smooth stand-in for a UNet, whose errors would grow along the way."""
    return torch.tanh(x * 1.3 + 0.2) * (0.5 + t / 2000) + 0.1 * x.flip(-1)


def their_trajectory(sampler, config, x, steps, eta, seed):
    scheduler = SCHEDULERS[sampler](**config, **({"clip_sample": False} if sampler != "dpm++" else {}))
    scheduler.set_timesteps(steps)
    noise = {"generator": torch.Generator().manual_seed(seed)}
    noise |= {"eta": eta} if sampler == "ddim" else {}
    trajectory = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item()), t, x, **noise).prev_sample
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddim", 50, 0.0), ("ddim", 30, 0.7), ("ddpm", 40, 0.0), ("dpm++", 25, 0.0), ("dpm++", 8, 0.0),
])  # fmt: skip
def test_trajectories(sampler, steps, eta, spacing, prediction):
    config = {**SD, "timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1}
    if sampler == "ddim":
        config["set_alpha_to_one"] = False
    if spacing == "trailing":
        config["steps_offset"] = 0
    x_T = randn((2, 4, 8, 8), torch.Generator().manual_seed(1))
    theirs = their_trajectory(sampler, config, x_T, steps, eta, seed=2)
    schedule, generator = Schedule.from_config(config), torch.Generator().manual_seed(2)
    ours = denoise(network, x_T, schedule, steps, sampler, eta, generator)
    for a, b in zip(theirs, ours, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_alpha_bar_is_the_product(schedule):
    s = Schedule(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule)
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule).alphas_cumprod
    assert s.alpha_bar.dtype == torch.float64
    assert s.alpha_bar[499].item() == pytest.approx((1 - s.betas[:500]).prod().item(), rel=1e-12)
    assert relative_error(reference.double(), s.alpha_bar) <= 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_splits_back_into_its_parts(prediction):
    s = Schedule(prediction_type=prediction, **SD)
    x_0, eps, t = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 10, 500, 900, 999])
    x_t = s.add_noise(x_0, eps, t)
    x_0_again, eps_again = s.split(x_t, s.target(x_0, eps, t), t)
    assert torch.allclose(x_0_again, x_0, atol=1e-4) and torch.allclose(eps_again, eps, atol=1e-4)
    scheduler = DDPMScheduler(prediction_type=prediction, **SD)
    assert torch.allclose(scheduler.add_noise(x_0, eps, t), x_t, atol=1e-5)
    if prediction == "v_prediction":
        assert torch.allclose(scheduler.get_velocity(x_0, eps, t), s.target(x_0, eps, t), atol=1e-5)


def test_the_chain_of_single_steps_has_the_closed_form():
    """x_t by t small Gaussian steps (2006.11239, eq. 2) has eq. 4's mean and variance."""
    s, t = Schedule(**SD), 300
    x_0 = torch.full((200_000,), 2.0)
    x, generator = x_0.clone(), torch.Generator().manual_seed(0)
    for beta in s.betas[: t + 1].tolist():
        x = (1 - beta) ** 0.5 * x + beta**0.5 * randn(x.shape, generator)
    assert x.mean().item() == pytest.approx(2 * s.alpha_bar[t].sqrt().item(), abs=0.01)
    assert x.var().item() == pytest.approx(1 - s.alpha_bar[t].item(), rel=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_samplers_reach_a_known_distribution(sampler):
    """With the exact denoiser of Gaussian data N(1.5, 0.5²), samples are N(1.5, 0.5²)."""
    s = Schedule(**SD, timestep_spacing="trailing", set_alpha_to_one=True)

    def predict(x, t):
        a = s.alpha_bar[t].item()
        posterior = 1.5 + 0.25 * a**0.5 / (0.25 * a + 1 - a) * (x - 1.5 * a**0.5)
        return (x - a**0.5 * posterior) / (1 - a) ** 0.5

    g = torch.Generator().manual_seed(0)
    x_0 = 1.5 + 0.5 * randn((20_000,), g)  # at t = 999 a little of the data still shows: begin with it
    x_T = s.add_noise(x_0, randn((20_000,), g), torch.full((20_000,), 999))
    *_, x = denoise(predict, x_T, s, 200, sampler, generator=g)
    assert x.mean().item() == pytest.approx(1.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_a_list_of_generators_makes_each_sample_its_own():
    def three(seeds):
        return randn((len(seeds), 4, 2, 2), [torch.Generator().manual_seed(s) for s in seeds])

    assert torch.equal(three([5, 6, 7])[1], three([6])[0])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 1), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("name, value", [
    ("beta_schedule", "squaredcos_cap_v2"), ("beta_schedule", ["linear"]), ("prediction_type", "sample"),
    ("timestep_spacing", "karras"), ("clip_sample", True), ("trained_betas", [0.1]),
    ("rescale_betas_zero_snr", True), ("beta_end", 5), ("beta_end", "0.012"), ("beta_end", 1e-5),
    ("beta_start", float("nan")), ("num_train_timesteps", 0), ("num_train_timesteps", 10**12),
    ("num_train_timesteps", 10.5), ("steps_offset", 1000),
])  # fmt: skip
def test_unsupported_configurations_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} (is )?{re.escape(repr(value))}"):
        Schedule.from_config({name: value})


@pytest.mark.parametrize("steps, sampler, options, message", [
    (1001, "ddim", {}, "steps is 1001"), (10, "euler", {}, "sampler is 'euler'"),
    (10, "ddim", {"start": 10}, "start is 10"),
    (1000, "dpm++", {}, "too many"),  # no room for the point behind the last
])  # fmt: skip
def test_bad_requests_are_named(steps, sampler, options, message):
    with pytest.raises(ValueError, match=message):
        next(denoise(network, torch.zeros(1, 1), Schedule(**SD), steps, sampler, **options))
    with pytest.raises(ValueError, match="too many"):  # t = 1000, where the training ended at 999
        Schedule(**SD, steps_offset=1).timesteps(1000)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_start_continues_a_walk(sampler):
    s, x_T = Schedule(**SD), randn((1, 4, 8, 8), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    steps = denoise(network, x_T, s, 10, sampler, generator=generator)
    whole = [next(steps) for _ in range(4)]
    state = generator.get_state()
    whole += list(steps)
    again = denoise(network, whole[3], s, 10, sampler, generator=generator.set_state(state), start=4)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], again, strict=True))


def test_what_is_written_into_a_step_steers_the_walk():
    s, x_T = Schedule(**SD), torch.ones(1, 4, 8, 8)
    steps = denoise(network, x_T, s, 5)
    next(steps).fill_(0.5)
    assert torch.equal(next(steps), next(denoise(network, torch.full_like(x_T, 0.5), s, 5, start=1)))


def test_the_state_keeps_its_precision_whatever_the_network_has():
    def predict(x, t):
        return network(x.bfloat16(), t)

    x_T = randn((1, 4, 16, 16), torch.Generator().manual_seed(0))
    *_, exact = denoise(network, x_T, Schedule(**SD), 50)
    *_, kept = denoise(predict, x_T, Schedule(**SD), 50)
    *_, rounded = denoise(predict, x_T.bfloat16(), Schedule(**SD), 50)
    assert kept.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    errors = [(x.float() - exact).square().mean().sqrt() for x in (kept, rounded)]
    assert errors[0] < errors[1] / 1.5
