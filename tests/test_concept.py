"""Concept: insertion touches exactly the word's places, gradients reach exactly its vectors."""

import pytest
import torch
import torch.nn.functional as F

from tinyti.concept import Concept

V, D = 50, 8  # vocabulary rows, width


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def concept():
    return Concept("S*", random(2, D, seed=1), [V, V + 1])


def test_vectors_are_an_fp32_leaf_of_their_own():
    given = random(2, D).half().requires_grad_()
    concept = Concept("S*", given, [V, V + 1])
    vectors = concept.vectors
    assert vectors.dtype == torch.float32 and vectors.is_leaf and vectors.requires_grad
    assert [name for name, _ in concept.named_parameters()] == ["vectors"]
    with torch.no_grad():
        vectors.zero_()
    assert given.abs().sum() > 0
    assert concept.to("meta").vectors.device.type == "meta"


def test_insert_replaces_the_words_places_only(concept):
    # the word twice in one prompt, not at all, cut after its first vector; the ids beside its own are others'
    ids = torch.tensor([[3, V, V + 1, V, V + 1], [1, 2, 3, V + 2, V - 1], [0, V + 9, 5, 6, V]])
    embeds = random(3, 5, D)
    expected = embeds.clone()
    for b, t in ids.eq(V).nonzero().tolist():
        expected[b, t] = concept.vectors[0].detach()
    for b, t in ids.eq(V + 1).nonzero().tolist():
        expected[b, t] = concept.vectors[1].detach()
    before, vectors = embeds.clone(), concept.vectors.detach().clone()
    assert torch.equal(concept.insert(embeds, ids), expected)
    assert torch.equal(embeds, before) and torch.equal(concept.vectors, vectors)


def test_gradients_reach_the_vectors_through_their_places_alone(concept):
    ids = torch.tensor([[3, V, V + 1, V], [1, 2, 3, V + 2]])
    embeds = random(2, 4, D).requires_grad_()
    weight = random(2, 4, D, seed=2)
    (concept.insert(embeds, ids) * weight).sum().backward()
    torch.testing.assert_close(concept.vectors.grad, torch.stack([weight[0, 1] + weight[0, 3], weight[0, 2]]))
    others = ~torch.isin(ids, torch.tensor([V, V + 1]))
    assert torch.equal(embeds.grad, weight * others[..., None])
    concept.vectors.grad = None
    concept.insert(random(1, 3, D), torch.tensor([[0, 1, V - 1]])).sum().backward()  # the word is not there
    assert torch.equal(concept.vectors.grad, torch.zeros(2, D))


def test_every_sample_may_have_its_own_vectors(concept):
    ids = torch.tensor([[3, V, V + 1, V], [V + 1, 2, 3, V + 2], [1, 2, 3, 4]])
    embeds, own = random(3, 4, D), random(3, 2, D, seed=3).requires_grad_()
    inserted = concept.insert(embeds, ids, own)
    alone = [concept.insert(embeds[b : b + 1], ids[b : b + 1], own[b : b + 1]) for b in range(3)]
    assert torch.equal(inserted, torch.cat(alone)) and torch.equal(inserted[1, 0], own[1, 1])
    same = concept.insert(embeds, ids, concept.vectors.expand(3, 2, D))
    assert torch.equal(same, concept.insert(embeds, ids))
    (inserted * embeds).sum().backward()
    assert torch.equal(own.grad[0], torch.stack([embeds[0, 1] + embeds[0, 3], embeds[0, 2]]))
    assert torch.equal(own.grad[1, 1], embeds[1, 0]) and not own.grad[2].any()
    assert concept.vectors.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_insert_follows_the_embeddings_dtype_and_trains_in_fp32(concept, dtype):
    ids = torch.full((1, 300), V)
    out = concept.insert(torch.zeros(1, 300, D, dtype=dtype), ids)
    assert out.dtype == dtype and torch.equal(out[0, 0], concept.vectors[0].to(dtype))
    out.sum().backward()
    assert concept.vectors.grad.dtype == torch.float32
    assert concept.vectors.grad[0].tolist() == [300.0] * D  # summed in bf16 it would stop at 256


def test_several_concepts_are_several_inserts(concept):
    other = Concept("*", random(1, D, seed=3), [V + 2])
    embeds, ids = random(1, 4, D), torch.tensor([[V + 2, V, V + 1, 7]])
    once = other.insert(concept.insert(embeds, ids), ids)
    assert torch.equal(once, concept.insert(other.insert(embeds, ids), ids))
    assert torch.equal(once[0], torch.stack([other.vectors[0], *concept.vectors, embeds[0, 3]]))


def test_initial_copies_rows_and_averages_neighbours():
    rows = random(5, D)
    assert torch.equal(Concept.initial(rows[:1]), rows[:1])
    assert torch.equal(Concept.initial(rows, 5), rows)
    assert Concept.initial(rows[:1].half()).dtype == torch.float32
    torch.testing.assert_close(Concept.initial(rows), rows.mean(dim=0, keepdim=True))
    halves = torch.stack([rows[:2].mean(dim=0), rows[2:].mean(dim=0)])
    torch.testing.assert_close(Concept.initial(rows, 2), halves)


def test_initial_keeps_vectors_apart():
    rows = 0.4 * F.normalize(random(2, 768), dim=-1)
    vectors = Concept.initial(rows, 5)
    assert torch.equal(vectors[[0, 3]], rows)
    near = F.cosine_similarity(vectors, rows[[0, 0, 0, 1, 1]])
    assert ((near > 0.99) & (near < 1 + 1e-6)).all()
    assert (torch.pdist(vectors) > 0.03).all()
    torch.testing.assert_close((vectors[1] - rows[0]).norm(), torch.tensor(0.04))
    assert torch.equal(vectors, Concept.initial(rows, 5))
    assert not torch.equal(vectors, Concept.initial(rows, 5, seed=1))


def test_initial_leaves_global_randomness_and_rows_alone():
    rows, state = random(1, D), torch.get_rng_state()
    before = rows.clone()
    Concept.initial(rows, 2)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(rows, before)


def test_norm_and_nearest_rows_by_cosine():
    table = random(V, D, seed=4)
    concept = Concept("S*", torch.stack([7 * table[3], -table[8]]), [V, V + 1])
    assert concept.norm().tolist() == concept.vectors.detach().norm(dim=-1).tolist()
    nearest = concept.nearest(table, k=3)
    cosines = F.cosine_similarity(concept.vectors.detach()[:, None], table[None], dim=-1)
    for found, all_cosines in zip(nearest, cosines):
        values, ids = all_cosines.sort(descending=True)
        assert [id for id, _ in found] == ids[:3].tolist()
        assert [cosine for _, cosine in found] == pytest.approx(values[:3].tolist(), abs=1e-6)
    assert nearest[0][0] == (3, pytest.approx(1.0)) and nearest[1][0][0] != 8

    among = [8, 41, 17]
    found = concept.nearest(table.bfloat16().requires_grad_(), k=5, among=among)[0]
    assert {id for id, _ in found} == set(among) and len(found) == 3
    expected = F.cosine_similarity(table[3:4], table[among].bfloat16().float())
    assert found[0][1] == pytest.approx(expected.max().item())
