"""The training loop: what it changes, what it leaves, and that every way through it gives the same result."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import sample as sample_py
import tinyti
import train as train_py
from tinyti import inversion, whitened
from tinyti.concept import Concept, word_length
from tinyti.examples import OBJECT_TEMPLATES, Batch, draw_batch, make_examples, timestep_at
from tinyti.files.pictures import read_photos
from tinyti.graphs import no_graphs
from tinyti.inversion import Inversion, diagnose, evaluate, invert, losses, losses_and_gradients

from .conftest import CONCEPTS, TINY, seeded

SIZE = 32


def on_gpu(test):
    """Mark a test that needs CUDA."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test))


def examples_of(model):
    begin(model)  # examples are of a word
    photos, _ = read_photos(CONCEPTS / "cat", SIZE)
    return make_examples(model, "S*", photos, OBJECT_TEMPLATES)


@pytest.fixture(scope="module")
def examples(model):
    return examples_of(model)


def begin(model, n=1, start="small", **options):
    """A fresh word, from a row of the vocabulary."""
    model.tokenizer.words.clear()
    model.concepts.clear()
    rows = model.text.table[[model.tokenizer.single(start)]]
    return Inversion(model, model.add_word("S*", Concept.initial(rows, n)), **options)


def learn(model, examples, steps=4, saved=None, optimizer="whitened", step_size=None, **options):
    """A fresh word, or a saved one, trained for some steps."""
    state = begin(model, optimizer=optimizer, step_size=step_size)
    if saved:
        state.load_state_dict(saved)
    for _ in invert(model, state, examples, steps, **{"batch_size": 3} | options):
        pass
    return state


def test_nothing_but_the_vector_is_trained(model, examples):
    parts = (model.text, model.vae, model.unet)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    state = learn(model, examples, steps=2)
    for part, tensors in zip(parts, before):
        assert all(torch.equal(tensors.pop(k), v) for k, v in part.state_dict().items()) and not tensors
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    vectors = state.concept.vectors
    assert vectors.dtype == torch.float32 and vectors.shape == (1, model.text.table.shape[1])
    assert torch.equal(vectors, state.vectors) and not torch.equal(vectors, state.start)
    assert state.step == 2 and len(state.log) == 2 and all((row > 0).all() for row in state.log)


def test_the_loss_is_equation_2(model, examples):
    """Written out once more, for one sample."""
    state = begin(model)
    ids = model.tokenizer(["a photo of a S*"])
    batch = Batch(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([700]), ids)
    embeds = model.text.embed(ids)
    place = (ids == state.concept.ids[0]).nonzero()[0, 1]
    embeds[0, place] = state.concept.vectors[0].detach()
    a = model.schedule.alpha_bar[700].float()
    x_t = a.sqrt() * batch.x_0 + (1 - a).sqrt() * batch.eps
    by_hand = (batch.eps - model.unet(x_t, 700, model.text(embeds))).square().mean()
    assert losses(model, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss(model, examples):
    """Along its own direction, against a central difference."""
    state = begin(model)
    batch = draw_batch(model, examples, 3, seeded(), (0.25, 0.95))
    (gradient,) = torch.autograd.grad(losses(model, batch).mean(), state.concept.vectors)
    h, values = 1e-2, []
    for sign in (1, -1):
        state.show(state.start + sign * h * gradient / gradient.norm())
        values.append(losses(model, batch).mean().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_the_gradients_of_one_backward_pass_are_those_of_one_for_each_sample(model, examples):
    state = begin(model, n=2)
    batch, vectors = draw_batch(model, examples, 3, seeded(), (0.25, 0.95)), state.path.expand(3, -1, -1)
    together, gradients = losses_and_gradients(model, "S*", torch.tensor(8.0), vectors, *batch)
    for i in range(3):
        loss = losses(model, Batch(*(part[i : i + 1] for part in batch[:4]))).sum()
        (alone,) = torch.autograd.grad(loss, state.concept.vectors)
        torch.testing.assert_close(gradients[i], alone, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(together[i], loss)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


@pytest.mark.parametrize("optimizer", ["whitened", "adam"])
def test_resuming_is_exact_and_takes_the_step_size_it_is_given(model, examples, optimizer):
    straight = learn(model, examples, steps=6, optimizer=optimizer)
    saved = learn(model, examples, steps=3, optimizer=optimizer).state_dict()
    rest = learn(model, examples, 6, saved, optimizer=optimizer)
    assert torch.equal(rest.concept.vectors, straight.concept.vectors)
    assert rest.evaluations == straight.evaluations and torch.equal(rest.start, straight.start)
    assert torch.equal(torch.stack(rest.log), torch.stack(straight.log))
    states = [learn(model, examples, 4, saved, optimizer=optimizer, step_size=s) for s in (1e-3, 1e-2)]
    slow, fast = ((state.path - saved["path"]).norm().item() for state in states)
    assert fast == pytest.approx(10 * slow, rel=1e-3)


def test_the_word_is_an_average_of_the_path(model, examples):
    state = begin(model)
    average, points = state.vectors, []
    for _ in invert(model, state, examples, steps=4, batch_size=2):
        points.append(state.path)
        average = average.lerp(state.path, 2 / (state.step + 1))
        assert torch.allclose(state.concept.vectors, average, atol=1e-6)
    assert len({tuple(point.flatten().tolist()) for point in points}) == 4
    assert not torch.equal(state.vectors, state.path)


def interrupt(run, k):
    """Ctrl-C at the k-th line of inversion.py and whitened.py -> where that is, or None after the last."""
    files, lines, place = {inversion.__file__, whitened.__file__}, itertools.count(), None

    def trace(frame, event, _):
        nonlocal place
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and next(lines) == k:
            place = frame.f_code.co_name, frame.f_lineno
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return place
    finally:
        sys.settrace(before)
    return None


def to_bytes(saved):
    """What `state_dict` gave, with every tensor as its bytes."""
    if isinstance(saved, dict):
        return {key: to_bytes(value) for key, value in saved.items()}
    return saved.numpy().tobytes() if torch.is_tensor(saved) else saved


@pytest.mark.parametrize("optimizer, taken", [("adam", 0), ("whitened", inversion.EVALUATE_EVERY - 1)])
def test_a_step_cut_off_at_any_line_leaves_no_trace(model, examples, monkeypatch, optimizer, taken):
    """The first step, and one that ends in an evaluation.  Its lines are the real ones; only the networks
    are replaced, by something quick that reads the word."""

    def context(ids, vectors=None):
        return model.concepts["S*"].insert(model.text.embed(ids), ids, vectors and vectors["S*"])

    monkeypatch.setattr(model, "encode_prompts", context)
    monkeypatch.setattr(
        model, "predict", lambda x_t, t, c: x_t + c.square().mean((1, 2))[:, None, None, None]
    )
    options = {"optimizer": optimizer, "batch_size": 2, "accumulate": 2}
    saved = learn(model, examples, taken, **options).state_dict() if taken else None
    straight = learn(model, examples, taken + 2, saved, **options).state_dict()
    places = []
    for k in itertools.count():
        state = begin(model, optimizer=optimizer)
        if saved:
            state.load_state_dict(saved)
        step = invert(model, state, examples, taken + 1, batch_size=2, accumulate=2)
        place = interrupt(lambda step=step: next(step), k)
        cut = state.state_dict()
        list(invert(model, state, examples, taken + 2, batch_size=2, accumulate=2))  # the same object goes on
        rest = learn(model, examples, taken + 2, cut, **options)  # and so does a fresh one
        assert to_bytes(rest.state_dict()) == to_bytes(state.state_dict()) == to_bytes(straight), place
        if place is None:
            break
        places.append(place)
    step = {
        "invert",
        "backward",
        "losses_and_gradients",
        "losses",
        "move",
        "show",
        "evaluate_on_time",
        "evaluate",
    }
    assert {name for name, _ in places} >= step | {optimizer} and len(set(places)) >= 50
    assert len(straight["evaluations"]) == 1 + (taken > 0) and len(straight["log"]) == taken + 2


def test_the_seed_decides_and_accumulating_changes_rounding_only(model, examples):
    whole, again, other = (learn(model, examples, 3, seed=seed) for seed in (0, 0, 2**32 - 1))
    assert torch.equal(whole.vectors, again.vectors) and not torch.equal(whole.vectors, other.vectors)
    for parts in (2, 5):
        assert torch.allclose(whole.vectors, learn(model, examples, 3, accumulate=parts).vectors, atol=1e-4)


@pytest.mark.parametrize("span", [(0, 1), (0.25, 0.95), (0.5, 0.6), (0.99999999, 1)])
def test_the_timesteps_lie_in_the_span(model, span):
    t = timestep_at(model, torch.linspace(0, 1 - 2**-24, 1000), span)
    low, high = span
    assert math.floor(1000 * low) == t.min() and t.max() == math.ceil(1000 * high) - 1


def test_the_evaluation_is_fixed_and_falls(model, examples):
    state = learn(model, examples, steps=22, batch_size=8)
    assert len(state.evaluations) == 1 + 22 // inversion.EVALUATE_EVERY
    assert evaluate(model, examples) == evaluate(model, examples)
    assert state.evaluations[-1] < state.evaluations[0] and diagnose(state) is None


def nouns(model):
    """The rows of fifty common nouns and colours, as far as the vocabulary has them: (N, D)."""
    words = """cat dog fish robot car boat house tree flower rabbit mushroom bird cup beach snow night meadow
        desert sea sun moon stars grass sand water sky hill cloud hat scarf eyes ears tail nose roof door
        window wheels stem petals photo painting sketch picture drawing red blue green pink
        yellow white""".split()
    ids = [model.tokenizer.single(word) for word in words]
    return model.text.table[[id for id in ids if id is not None]]


def as_published(table):
    return table


def equal_rows(table):
    return F.normalize(table, dim=-1) * 0.39


def untrained_rows(table):
    """60 % of the rows as an initialization leaves them."""
    table = equal_rows(table)
    table[: int(0.6 * len(table))] *= 0.1
    return table


def junk_rows(table):
    """1 % of the rows fifty times as long."""
    table = equal_rows(table)
    table[::100] *= 50
    return table


@pytest.mark.parametrize(
    "change, real", [(as_published, None), (equal_rows, 0.39), (untrained_rows, 0.39), (junk_rows, 0.39)]
)
def test_a_word_is_as_long_as_a_real_one(examples, change, real):
    """The path is as long as `word_length` says; the average, which prompts use, within 15 % of nouns."""
    model = tinyti.load(TINY)
    real = real or nouns(model).norm(dim=-1).median().item()
    model.text.table.copy_(change(model.text.table))
    state = learn(model, examples, steps=20, batch_size=8)
    assert state.path.norm().item() == pytest.approx(word_length(model.text.table), rel=1e-5)
    assert state.path.norm().item() == pytest.approx(real, rel=0.15)
    assert state.vectors.norm().item() == pytest.approx(real, rel=0.15)


def test_without_a_start_each_vector_finds_its_own_direction(model, examples):
    begin(model)
    model.concepts.clear()
    model.tokenizer.words.clear()
    state = Inversion(model, model.add_word("S*", torch.zeros(3, model.text.table.shape[1])))
    for _ in invert(model, state, examples, 1, batch_size=3):
        pass
    torch.testing.assert_close(state.vectors.norm(dim=-1), torch.full((3,), word_length(model.text.table)))
    cosines = F.cosine_similarity(state.vectors[[0, 0, 1]], state.vectors[[1, 2, 2]])
    assert (cosines < 0.999).all()


def test_a_word_whose_gradient_is_zero_stays_where_it_is(model, examples):
    state = begin(model)
    for _ in range(3):
        state.move(torch.ones(2), torch.zeros(2, *state.path.shape))
    state.evaluations = [1.0]
    assert torch.equal(state.vectors, state.start) and "gradient was zero" in diagnose(state)


def test_an_optimizer_of_ones_own(model, examples):
    """What is handed in replaces the library's: here plain descent, whose path is written out beside it."""
    state = begin(model)
    state.optimizer = lambda vectors, gradients, memory: (vectors - gradients.mean(dim=0), memory)
    state.average = 1
    gradients = torch.randn(2, *state.path.shape, generator=seeded())
    state.move(torch.ones(2), gradients)
    state.move(torch.ones(2), 2 * gradients)
    torch.testing.assert_close(state.vectors, state.start - 3 * gradients.mean(dim=0))
    resumed = begin(model)
    resumed.optimizer, resumed.average = state.optimizer, state.average
    resumed.load_state_dict(state.state_dict())
    assert resumed.step == 2 and torch.equal(resumed.vectors, state.vectors)


def test_an_overflow_of_fp16_costs_a_batch_and_half_of_the_scale(model):
    state = begin(model)
    state.point = state.point._replace(scale=2.0**16)
    gradients = torch.randn(2, *state.path.shape)
    state.move(torch.ones(2), gradients * float("inf"))
    assert state.point.scale == 2.0**15 and state.step == 1 and torch.equal(state.vectors, state.start)
    state.move(torch.ones(2), gradients)
    assert state.point.scale == 2.0**15 and state.vectors.isfinite().all()
    assert not torch.equal(state.vectors, state.start)


def test_a_word_that_learned_nothing_is_diagnosed(model):
    state = begin(model)

    def found(moved, evaluation):
        state.point = state.point._replace(vectors=state.start + moved)
        state.evaluations = [1.0, evaluation]
        return diagnose(state)

    assert found(1.0, 0.9) is None
    assert "not fallen" in found(1.0, 1.1) and "not moved" in found(0.0, 0.9)
    assert "not a number" in found(1.0, math.nan) and "not a number" in found(math.nan, 0.9)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_and_on_from_there_on_the_cpu(model, examples, dtype):
    there = tinyti.load(TINY, "cuda", dtype)
    photos = examples_of(there)
    state = learn(there, photos, steps=30, batch_size=8)
    assert diagnose(state) is None
    here = learn(model, examples, 32, state.state_dict())
    assert here.step == 32 and here.vectors.device.type == "cpu"
    back = learn(there, photos, 34, here.state_dict(), batch_size=8)
    assert back.vectors.device.type == "cuda" and diagnose(back) is None


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recorded_kernels_compute_the_same(dtype):
    there = tinyti.load(TINY, "cuda", dtype)
    examples = examples_of(there)
    recorded = learn(there, examples, steps=7, batch_size=5, accumulate=2)  # parts of 2 and of 3
    with no_graphs():
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


@on_gpu
def test_both_programs_take_the_gpu_that_is_there(tmp_path):
    flags = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--out", str(tmp_path / "S")]
    assert train_py.main(flags) == 0
    assert sample_py.main(["a photo of S*", "--words", str(tmp_path / "S"), "--out", str(tmp_path)]) == 0


def test_every_step_draws_anew_and_the_evaluation_is_no_steps_batch(model, examples, monkeypatch):
    drawn = []

    def draw(*args):
        drawn.append(draw_batch(*args))
        return drawn[-1]

    monkeypatch.setattr(inversion, "draw_batch", draw)
    learn(model, examples, steps=3)
    noise = [tuple(batch.eps.flatten()[:8].tolist()) for batch in drawn]
    assert len(drawn) == 4 and len(set(noise)) == 4  # the evaluation of step 0, and three steps
