"""The loop: what it changes and what it does not, and that every way through it is the same way."""

import math

import pytest
import torch

import sample as sample_py
import tinyti
import train as train_py
from tinyti import inversion
from tinyti.concept import Concept
from tinyti.examples import OBJECT_TEMPLATES, draw_batch, make_examples, timestep_at
from tinyti.files.pictures import read_photos
from tinyti.inversion import Inversion, diagnose, evaluate, invert, losses

from .conftest import CONCEPTS, TINY

SIZE = 32


@pytest.fixture(scope="module")
def model():
    return tinyti.load(TINY)


@pytest.fixture(scope="module")
def examples(model):
    photos, _ = read_photos(CONCEPTS / "cat", SIZE)
    return make_examples(model, "S*", photos, OBJECT_TEMPLATES)


def begin(model, n=1, start="small", **options):
    """A fresh word, from a row that is short: no step of a few reaches the cap."""
    model.tokenizer.words.clear()
    model.concepts.clear()
    rows = model.text.table[[model.tokenizer.single(start)]]
    return Inversion(model, model.add_word("S*", Concept.initial(rows, n)), **options)


def learn(model, examples, steps=4, state=None, n=1, optimizer="whitened", lr=None, **options):
    """A fresh word, or one of a state, trained for some steps."""
    word = begin(model, n, optimizer=optimizer, lr=lr)
    if state:
        word.load_state_dict(state)
    for _ in invert(model, word, examples, steps, **{"batch_size": 3} | options):
        pass
    return word


def test_nothing_but_the_vector_is_trained(model, examples):
    parts = (model.text, model.vae, model.unet)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    word = learn(model, examples, steps=2)
    for part, tensors in zip(parts, before):
        assert all(torch.equal(tensors.pop(k), v) for k, v in part.state_dict().items()) and not tensors
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    vectors = word.concept.vectors
    assert vectors.dtype == torch.float32 and vectors.shape == (1, model.text.table.shape[1])
    assert torch.equal(vectors, word.word) and not torch.equal(vectors, word.start)
    assert word.step == 2 and len(word.log) == 2 and all((row > 0).all() for row in word.log)


def test_the_loss_is_equation_2(model, examples):
    """Written out once more, for one sample."""
    word = begin(model)
    x_0, eps, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([700])
    ids = model.tokenizer(["a photo of a S*"])
    embeds = model.text.embed(ids)
    place = (ids == word.concept.ids[0]).nonzero()[0, 1]
    embeds[0, place] = word.concept.vectors[0].detach()
    a = model.schedule.alpha_bar[700].float()
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    by_hand = (eps - model.unet(x_t, 700, model.text(embeds))).square().mean()
    assert losses(model, x_0, eps, t, ["a photo of a S*"]).item() == pytest.approx(by_hand.item(), rel=1e-5)


def batch(model, examples, size=3):
    x_0, eps, u, prompts = draw_batch(examples, size, torch.Generator().manual_seed(0))
    return x_0, eps, timestep_at(u, model, (0.25, 0.95)), prompts


def test_the_gradient_is_that_of_the_loss(model, examples):
    """Along its own direction, against a central difference."""
    word = begin(model)
    (gradient,) = torch.autograd.grad(losses(model, *batch(model, examples)).mean(), word.concept.vectors)
    h, values = 1e-2, []
    for sign in (1, -1):
        word.show(word.start + sign * h * gradient / gradient.norm())
        values.append(losses(model, *batch(model, examples)).mean().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_the_gradients_of_one_backward_pass_are_those_of_one_for_each_sample(model, examples):
    word = begin(model, n=2)
    x_0, eps, t, prompts = batch(model, examples)
    copies = word.path.expand(3, -1, -1).clone().requires_grad_()
    losses(model, x_0, eps, t, prompts, {"S*": copies}).sum().backward()
    for i in range(3):
        row = slice(i, i + 1)
        loss = losses(model, x_0[row], eps[row], t[row], prompts[row]).sum()
        (alone,) = torch.autograd.grad(loss, word.concept.vectors)
        torch.testing.assert_close(copies.grad[i], alone, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(copies.grad[0], copies.grad[1], rtol=0.1)


@pytest.mark.parametrize("optimizer", ["whitened", "adam"])
def test_resuming_is_exact_and_takes_the_learning_rate_it_is_given(model, examples, optimizer):
    straight = learn(model, examples, steps=6, optimizer=optimizer)
    state = learn(model, examples, steps=3, optimizer=optimizer).state_dict()
    rest = learn(model, examples, 6, state, optimizer=optimizer)
    assert torch.equal(rest.concept.vectors, straight.concept.vectors)
    assert rest.evaluations == straight.evaluations and torch.equal(rest.start, straight.start)
    assert torch.equal(torch.stack(rest.log), torch.stack(straight.log))
    words = [learn(model, examples, 4, state, optimizer=optimizer, lr=lr) for lr in (1e-3, 1e-2)]
    slow, fast = ((word.path - state["path"]).norm().item() for word in words)
    assert fast == pytest.approx(10 * slow, rel=1e-3)


def test_the_word_is_an_average_of_the_path(model, examples):
    word = begin(model)
    average, points = word.word, []
    for _ in invert(model, word, examples, steps=4, batch_size=2):
        points.append(word.path)
        average = average.lerp(word.path, 2 / (word.step + 1))
        assert torch.allclose(word.concept.vectors, average, atol=1e-6)
    assert len({tuple(point.flatten().tolist()) for point in points}) == 4
    assert not torch.equal(word.word, word.path)


def test_a_step_cut_off_anywhere_leaves_no_trace(model, examples, monkeypatch):
    """Ctrl-C inside of the optimizer, before the evaluation, and between the step and what shows it."""
    straight = learn(model, examples, steps=inversion.EVALUATE_EVERY + 1)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place in ("whitened.F.normalize", "inversion.evaluate", "inversion.Inversion.show"):
        word = begin(model)
        with pytest.raises(KeyboardInterrupt):
            for _ in invert(model, word, examples, steps=inversion.EVALUATE_EVERY, batch_size=3):
                if word.step == inversion.EVALUATE_EVERY - 1:
                    monkeypatch.setattr(f"tinyti.{place}", interrupt)
        monkeypatch.undo()
        rest = learn(model, examples, inversion.EVALUATE_EVERY + 1, word.state_dict())
        assert torch.equal(rest.word, straight.word) and rest.evaluations == straight.evaluations


def test_the_seed_decides_and_accumulating_changes_rounding_only(model, examples):
    whole, again, other = (learn(model, examples, 3, seed=seed) for seed in (0, 0, 2**32 - 1))
    assert torch.equal(whole.word, again.word) and not torch.equal(whole.word, other.word)
    for parts in (2, 5):
        assert torch.allclose(whole.word, learn(model, examples, 3, accumulate=parts).word, atol=1e-4)


@pytest.mark.parametrize("span", [(0, 1), (0.25, 0.95), (0.5, 0.6), (0.99999999, 1)])
def test_the_timesteps_lie_in_the_span(model, span):
    t = timestep_at(torch.linspace(0, 1 - 2**-24, 1000), model, span)
    low, high = span
    assert math.floor(1000 * low) == t.min() and t.max() == math.ceil(1000 * high) - 1


def test_the_evaluation_is_fixed_and_falls(model, examples):
    word = learn(model, examples, steps=22, batch_size=8)
    assert len(word.evaluations) == 1 + 22 // inversion.EVALUATE_EVERY
    assert evaluate(model, examples) == evaluate(model, examples)
    assert word.evaluations[-1] < word.evaluations[0] and diagnose(word) is None


def test_whitened_vectors_stay_under_the_cap(model, examples):
    word = learn(model, examples, steps=3, lr=1.0)
    cap = inversion.CAP * model.text.table.norm(dim=-1).median().item()
    assert word.path.norm().item() == pytest.approx(cap)


def test_an_overflow_of_fp16_costs_a_batch_and_half_of_the_scale(model):
    word = begin(model)
    word.scale = 2.0**16
    gradients = torch.randn(2, *word.path.shape)
    word.move(gradients * float("inf"), torch.ones(2))
    assert word.scale == 2.0**15 and word.step == 1 and torch.equal(word.word, word.start)
    word.move(gradients, torch.ones(2))
    assert word.scale == 2.0**15 and word.word.isfinite().all() and not torch.equal(word.word, word.start)


def test_a_word_that_learned_nothing_is_diagnosed(model):
    word = begin(model)
    for moved, evaluations, expected in [
        (1.0, [1.0, 0.9], None), (1.0, [1.0, 1.1], "not fallen"), (0.0, [1.0, 0.9], "not moved"),
        (1.0, [1.0, math.nan], "not a number"), (math.nan, [1.0, 0.9], "not a number"),
    ]:  # fmt: skip
        word.word, word.evaluations = word.start + moved, evaluations
        found = diagnose(word)
        assert found is None if expected is None else expected in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_and_on_from_there_on_the_cpu(model, examples, dtype):
    there = tinyti.load(TINY, "cuda", dtype)
    on_gpu = make_examples(there, "S*", read_photos(CONCEPTS / "cat", SIZE)[0], OBJECT_TEMPLATES)
    word = learn(there, on_gpu, steps=30, batch_size=8)
    assert diagnose(word) is None
    here = learn(model, examples, 32, word.state_dict())
    assert here.step == 32 and here.word.device.type == "cpu"
    back = learn(there, on_gpu, 34, here.state_dict(), batch_size=8)
    assert back.word.device.type == "cuda" and diagnose(back) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recorded_kernels_compute_the_same(dtype, monkeypatch):
    there = tinyti.load(TINY, "cuda", dtype)
    examples = make_examples(there, "S*", read_photos(CONCEPTS / "cat", SIZE)[0], OBJECT_TEMPLATES)
    recorded = learn(there, examples, steps=7, batch_size=5, accumulate=2)  # parts of 2 and of 3
    monkeypatch.setattr(inversion, "recorded", lambda function: function)
    direct = learn(there, examples, steps=7, batch_size=5, accumulate=2)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(torch.stack(recorded.log), torch.stack(direct.log), **tolerance)
    with torch.no_grad():
        for size in (1, 2, 3, 4, 5, 1):  # more shapes than are kept
            x_t, t = torch.randn(2, size, 4, 8, 8).to("cuda", dtype), torch.randint(1000, (2, size)).cuda()
            context = torch.randn(2, size, 77, there.text.table.shape[1]).to("cuda", dtype)
            pairs = [(there.predict(*inputs), inputs) for inputs in zip(x_t, t, context)]
            for found, inputs in pairs:  # the first result is what it was after the second call
                torch.testing.assert_close(found, there.unet(*inputs), rtol=1e-2, atol=1e-2)
    assert not torch.equal(pairs[0][0], pairs[1][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_both_programs_take_the_gpu_that_is_there(tmp_path):
    flags = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--out", str(tmp_path / "S")]
    assert train_py.main(flags) == 0
    assert sample_py.main(["a photo of S*", "--words", str(tmp_path / "S"), "--out", str(tmp_path)]) == 0
