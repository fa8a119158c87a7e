"""The schedule and the samplers equal diffusers' schedulers over whole trajectories, and closed forms."""

import re

import pytest
import torch
from diffusers import DDPMScheduler

from tinyti.diffusion import CHOICES, Schedule, denoise, randn
from tinyti.files.folder import read_config

from . import published
from .conftest import last, relative_error, seeded

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, t):
    """A smooth stand-in for a UNet, whose errors would grow along the way."""
    return torch.tanh(x * 1.3 + 0.2) * (0.5 + t / 2000) + 0.1 * x.flip(-1)


def their_trajectory(sampler, config, x, steps, eta, seed):
    config = config | ({"clip_sample": False} if sampler != "dpm++" else {})
    scheduler = published.SAMPLERS[sampler](**config)
    scheduler.set_timesteps(steps)
    noise = {"generator": seeded(seed)}
    noise |= {"eta": eta} if sampler == "ddim" else {}
    trajectory = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.item()), t, x, **noise).prev_sample
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler, steps, settings", [
    ("ddim", 50, {"set_alpha_to_one": False}), ("ddim", 30, {"set_alpha_to_one": True, "eta": 0.7}),
    ("ddpm", 40, {}), ("dpm++", 25, {}), ("dpm++", 8, {})])  # fmt: skip
def test_trajectories(sampler, steps, settings, spacing, prediction):
    config = {**SD, "timestep_spacing": spacing, "prediction_type": prediction, "steps_offset": 1, **settings}
    eta = config.pop("eta", 0.0)
    x_T = randn((2, 4, 8, 8), seeded(1))
    theirs = their_trajectory(sampler, config, x_T, steps, eta, seed=2)
    schedule = read_config(Schedule, config, "scheduler_config.json")
    ours = denoise(network, x_T, schedule, steps, sampler, eta, seeded(2))
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
    x, generator = x_0.clone(), seeded()
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

    g = seeded()
    x_0 = 1.5 + 0.5 * randn((20_000,), g)  # at t = 999 a little of the data still shows: begin with it
    x_T = s.add_noise(x_0, randn((20_000,), g), torch.full((20_000,), 999))
    x = last(denoise(predict, x_T, s, 200, sampler, generator=g))
    assert x.mean().item() == pytest.approx(1.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_a_list_of_generators_makes_each_sample_its_own():
    def three(seeds):
        return randn((len(seeds), 4, 2, 2), seeded(seeds))

    assert torch.equal(three([5, 6, 7])[1], three([6])[0])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 1), [torch.Generator(), torch.Generator()])


REFUSED = {
    "beta_schedule": ["squaredcos_cap_v2", ["linear"]],
    "prediction_type": ["sample"],
    "timestep_spacing": ["karras"],
    "trained_betas": [[0.1]],
    "rescale_betas_zero_snr": ["yes", 1],
    "beta_end": [5, "0.012", 1e-5],
    "beta_start": [float("nan")],
    "num_train_timesteps": [0, 10**12, 10.5],
    "steps_offset": [1000],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_unsupported_configurations_are_named(name, value):
    shown = repr(tuple(value) if isinstance(value, list) else value)
    with pytest.raises(ValueError, match=rf"{name} (is )?{re.escape(shown)}"):
        read_config(Schedule, {name: value}, "scheduler_config.json")


BAD = {
    "steps is 1001": {"steps": 1001},
    "sampler is 'euler'": {"steps": 10, "sampler": "euler"},
    "start is 10": {"steps": 10, "start": 10},
    "too many": {"steps": 1000, "sampler": "dpm++"},  # no room for the point behind the last
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_named(message):
    with pytest.raises(ValueError, match=message):
        next(denoise(network, torch.zeros(1, 1), Schedule(**SD), **BAD[message]))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr works with v_prediction only"):
        Schedule(**SD, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="too many"):  # t = 1000, where the training ended at 999
        Schedule(**SD, steps_offset=1).timesteps(1000)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_start_continues_a_walk(sampler):
    s, x_T = Schedule(**SD), randn((1, 4, 8, 8), seeded())
    generator = seeded(1)
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

    x_T = randn((1, 4, 16, 16), seeded())
    walks = ((network, x_T), (predict, x_T), (predict, x_T.bfloat16()))
    exact, kept, rounded = (last(denoise(*walk, Schedule(**SD), 50)) for walk in walks)
    assert kept.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    errors = [(x.float() - exact).square().mean().sqrt() for x in (kept, rounded)]
    assert errors[0] < errors[1] / 1.5


@pytest.mark.parametrize("name", CHOICES)
def test_settings_that_are_not_supported(name):
    message = re.escape(f"{name} is 'another'; supported are {', '.join(map(str, CHOICES[name]))}")
    with pytest.raises(ValueError, match=message):
        Schedule(**SD | {name: "another"})
