"""The loop: what it changes and what it does not, and that every way through it is the same way."""

import copy

import pytest
import torch

import tinyti
from tinyti.concept import Concept
from tinyti.data import OBJECT_TEMPLATES, read_folder
from tinyti.inversion import Subject, choose_start, converged, evaluate, invert, losses, make_subject, trouble

from .conftest import CONCEPTS, TINY


@pytest.fixture(scope="module")
def model():
    return tinyti.load(TINY)


def learn(model, name="cat", token="S*", steps=4, state=None, start="cat", **options):
    """A fresh subject, trained for some steps: -> subject, steps."""
    work = model if isinstance(model, list) else [(model, name, token)]
    subjects = []
    work[0][0].tokenizer.words.clear()
    work[0][0].concepts.clear()
    for m, folder, word in work:
        ids = m.tokenizer.add(word)
        row = m.text.table[m.tokenizer.encode(start)]
        m.concepts[word] = Concept.initial(word, ids, row)
        photos, _ = read_folder(CONCEPTS / folder, m.size)
        subjects.append(make_subject(m, m.concepts[word], photos, OBJECT_TEMPLATES))
    if state:
        subjects[0].load_state_dict(state)
    taken = list(
        invert(work[0][0], subjects, steps=steps, **{"batch_size": 4, "early_stop": False, **options})
    )
    return (subjects if isinstance(model, list) else subjects[0]), taken


def tensors(model):
    parts = {"text": model.text, "vae": model.vae, "unet": model.unet}
    return {f"{n}.{k}": v.clone() for n, part in parts.items() for k, v in part.state_dict().items()}


def test_nothing_but_the_vector_is_trained(model):
    before = tensors(model)
    subject, taken = learn(model, steps=3)
    after = tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    for part in (model.text, model.vae, model.unet):
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    vectors = subject.concept.vectors
    assert vectors.dtype == torch.float32 and vectors.shape == (1, model.text.table.shape[1])
    assert not torch.equal(vectors, subject.start)
    assert [step.number for step in taken] == [1, 2, 3] and all(step.gradient > 0 for step in taken)


def test_the_loss_is_equation_2(model):
    """Written out once more, for one sample."""
    subject, _ = learn(model, steps=1)
    x_0, eps, t = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.tensor([700])
    ids = model.tokenizer(["a photo of a S*"])
    embeds = model.text.embed(ids)
    place = (ids == subject.concept.ids[0]).nonzero()[0, 1]
    embeds[0, place] = subject.concept.vectors[0].detach()
    a = model.schedule.alpha_bar[700].float()
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    by_hand = (eps - model.unet(x_t, 700, model.text(embeds))).square().mean()
    assert losses(model, x_0, eps, t, ["a photo of a S*"]).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss(model):
    """Along its own direction, against a central difference."""
    subject, _ = learn(model, steps=1)
    vectors = subject.concept.vectors
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 4, 16, 16, generator=generator)

    def loss():
        return losses(model, x_0, eps, torch.tensor([300, 800]), ["a photo of S*", "my S*"]).mean()

    (gradient,) = torch.autograd.grad(loss(), vectors)
    direction = gradient / gradient.norm()
    h, values = 1e-2, []
    here = vectors.detach().clone()
    for sign in (1, -1):
        subject.put(here + sign * h * direction)
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_resuming_is_exact(model):
    straight, _ = learn(model, steps=6)
    half, _ = learn(model, steps=3)
    state = copy.deepcopy(half.state_dict())
    rest, taken = learn(model, steps=6, state=state)
    assert [step.number for step in taken] == [4, 5, 6]
    assert torch.equal(rest.concept.vectors, straight.concept.vectors)
    assert torch.equal(rest.start, straight.start)


def test_the_word_is_an_average_of_the_path(model):
    subject, _ = learn(model, steps=0)
    points, word = [], subject.concept.vectors.detach().clone()
    for step in invert(model, [subject], steps=4, batch_size=4):
        points.append(subject.path)
        word = word.lerp(subject.path, 2 / (step.number + 1))
        assert torch.allclose(subject.concept.vectors, word, atol=1e-6)
    assert len({tuple(point.flatten().tolist()) for point in points}) == 4
    assert not torch.equal(subject.concept.vectors, subject.path)


def test_a_step_cut_off_half_way_leaves_no_trace(model, monkeypatch):
    straight, _ = learn(model, steps=4)
    subject, _ = learn(model, steps=2)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        list(invert(model, [subject], steps=4, batch_size=4))
    rest, _ = learn(model, steps=4, state=copy.deepcopy(subject.state_dict()))
    assert torch.equal(rest.concept.vectors, straight.concept.vectors)


def test_words_learned_side_by_side_are_those_learned_alone(model):
    together, taken = learn([(model, "dog", "D*"), (model, "cat", "C*")], steps=3)
    assert [(s.subject.concept.name, s.number) for s in taken[:4]] == [
        ("D*", 1),
        ("C*", 1),
        ("D*", 2),
        ("C*", 2),
    ]
    for subject, folder in zip(together, ("dog", "cat")):
        alone, _ = learn(model, folder, subject.concept.name, steps=3)
        assert torch.allclose(alone.concept.vectors, subject.concept.vectors, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulating_changes_rounding_only(model, parts):
    whole, _ = learn(model, steps=3)
    in_parts, _ = learn(model, steps=3, accumulate=parts)
    assert torch.allclose(whole.concept.vectors, in_parts.concept.vectors, atol=1e-4)


def test_the_timesteps_lie_in_the_span(model, monkeypatch):
    seen = []
    add_noise = type(model.schedule).add_noise

    def spy(schedule, x_0, eps, t):
        seen.extend(t.tolist())
        return add_noise(schedule, x_0, eps, t)

    monkeypatch.setattr(type(model.schedule), "add_noise", spy)
    for span in ((0, 1), (0.25, 0.95), (0.5, 0.6)):
        seen.clear()
        learn(model, steps=3, batch_size=16, span=span)
        low, high = (round(1000 * end) for end in span)
        assert low <= min(seen) and max(seen) < high and max(seen) - min(seen) > 0.8 * (high - low)


def test_the_seed_decides(model):
    a, _ = learn(model, steps=2)
    b, _ = learn(model, steps=2)
    c, _ = learn(model, steps=2, seed=1)
    assert torch.equal(a.concept.vectors, b.concept.vectors)
    assert not torch.equal(a.concept.vectors, c.concept.vectors)


def test_the_evaluation_is_fixed_and_falls(model):
    subject, _ = learn(model, steps=30, evaluate_every=10, batch_size=8)
    assert len(subject.evaluations) == 4  # at the start and every ten steps
    assert evaluate(model, subject) == subject.evaluations[-1]
    assert subject.evaluations[-1] < subject.evaluations[0]
    assert trouble(subject) is None


@pytest.mark.parametrize("name", ["fish", "mushroom", "car"])
def test_the_start_word_is_the_things_own(model, name):
    subject, _ = learn(model, name, steps=0)
    before = subject.concept.vectors.clone()
    found = choose_start(model, subject, ["cat", "fish", "mushroom", "car", "notaword"])
    assert next(iter(found)) == name
    assert "notaword" not in found and sorted(found.values()) == list(found.values())
    assert torch.equal(subject.concept.vectors, before)


def test_converged():
    falling = [1 - 0.02 * i for i in range(30)]
    assert not converged(falling)
    assert converged(falling + [falling[-1]] * 12)
    assert not converged([1.0] * 5)


def subject_with(evaluations, moved=1.0):
    concept = Concept("S*", torch.ones(1, 4), [9])
    one = Subject(concept, None, None, [], torch.ones(1, 4), evaluations=evaluations)
    one.put(torch.full((1, 4), moved))
    return one


def test_trouble_is_named():
    assert trouble(subject_with([1.0, 0.9], moved=2.0)) is None
    assert "not fallen" in trouble(subject_with([1.0, 1.1], moved=2.0))
    assert "not moved" in trouble(subject_with([1.0, 0.9]))
    assert "not a number" in trouble(subject_with([1.0, float("nan")], moved=2.0))
    assert "not a number" in trouble(subject_with([1.0, 0.9], moved=float("nan")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    subject, _ = learn(tinyti.load(TINY, "cuda", dtype), steps=30, batch_size=8)
    assert trouble(subject) is None
