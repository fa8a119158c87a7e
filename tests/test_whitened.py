"""The optimizers of a word: on a quadratic they take the path of the formulas."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyti.whitened import EVERY, FLOOR, adam, inverse_root, turn, whitened

B, n, D = 4, 2, 6


def quadratic(seed=0):
    """Samples' losses ½ (v - c_b)ᵀ H (v - c_b): H (D, D) of condition 300, targets c (B, n, D)."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))
    return axes @ np.diag(np.geomspace(1, 300, D)) @ axes.T, rng.normal(size=(B, n, D))


def gradients(H, c, v):
    return torch.from_numpy((v.numpy() - c) @ H)


def walk(optimizer, v, H, c, steps, memory=None, **settings):
    """The vectors after each step, and what the optimizer remembers after the last."""
    path, memory = [], memory or {}
    for _ in range(steps):
        v, memory = optimizer(v, gradients(H, c, v), memory, **settings)
        path.append(v)
    return path, memory


def test_the_path_on_a_quadratic_is_the_formulas():
    """Written out once more with numpy in float64, a vector at a time, the root by another decomposition."""
    H, c = quadratic()
    path, _ = walk(whitened, torch.zeros(n, D, dtype=torch.float64), H, c, 23, angle=0.2, length=1.1)
    torch.testing.assert_close(torch.stack(path).norm(dim=-1), torch.full((23, n), 1.1, dtype=torch.float64))
    turned = F.cosine_similarity(torch.stack(path[1:]), torch.stack(path[:-1]), dim=-1).acos()
    torch.testing.assert_close(turned, torch.full((22, n), 0.2, dtype=torch.float64))

    for i in range(n):
        x, M, m = np.zeros(D), np.zeros((D, D)), np.zeros(D)
        for k in range(1, 24):
            g = (x - c[:, i]) @ H  # (B, D)
            M += sum(np.outer(row, row) for row in g) / B
            m = 0.9 * m + 0.1 * g.mean(0)
            if k == 1 or k % EVERY == 0:
                u, s, _ = np.linalg.svd(M)
                root = u @ np.diag(np.maximum(s, FLOOR * s[0]) ** -0.5) @ u.T
            d = root @ m
            if k == 1:
                x = -1.1 * d / np.linalg.norm(d)
            else:  # the circle through x and -d: another way to say it
                e = d - x * (d @ x) / (x @ x)
                x = np.cos(0.2) * x - np.sin(0.2) * 1.1 * e / np.linalg.norm(e)
            np.testing.assert_allclose(path[k - 1][i].numpy(), x, rtol=1e-8, atol=1e-10)


def test_the_first_step_of_a_sample_is_along_its_gradient():
    """M = g gᵀ has g for its only axis, so that the whitened direction is g's: closed form."""
    g = torch.randn(1, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, _ = whitened(torch.zeros(1, D, dtype=torch.float64), g, {}, angle=0.1, length=2.0)
    torch.testing.assert_close(v, -2 * g[0] / g.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_the_scale_of_the_loss_changes_nothing(scale):
    H, c = quadratic()
    start, settings = torch.ones(n, D, dtype=torch.float64), {"angle": 0.1, "length": 1.0}
    path, _ = walk(whitened, start, H, c, 20, **settings)
    scaled, _ = walk(whitened, start, scale * H, c, 20, **settings)
    torch.testing.assert_close(torch.stack(scaled), torch.stack(path), rtol=1e-5, atol=1e-5)


def test_noise_turns_a_word_to_no_direction_more_than_chance():
    """Gradients of pure noise, but of one axis ten times as large: 200 words, D of 32."""
    generator, words, width = torch.Generator().manual_seed(0), 200, 32
    axes = torch.ones(width)
    axes[0] = 10
    v, memory = torch.zeros(words, width), {}
    for _ in range(50):
        noise = axes * torch.randn(8, words, width, generator=generator)
        v, memory = whitened(v, noise, memory, angle=0.12, length=1.0)
    squares = v.square().mean(dim=0)  # of a random direction 1 / D, up to the noise of 200 words
    assert squares.sum().item() == pytest.approx(1) and (squares < 1.5 / width).all()
    mean = v.mean(dim=0).norm().item()
    assert mean < 2 / words**0.5


def test_adam_is_torchs():
    H, c = quadratic()
    theirs = torch.nn.Parameter(torch.ones(n, D, dtype=torch.float64))
    optimizer = torch.optim.Adam([theirs], lr=0.02)
    path, _ = walk(adam, torch.ones(n, D, dtype=torch.float64), H, c, 20, lr=0.02)
    for v in path:
        theirs.grad = gradients(H, c, theirs.detach()).mean(0)
        optimizer.step()
        torch.testing.assert_close(v, theirs.detach(), rtol=1e-7, atol=1e-9)


def plain(vectors, gradients, memory, angle, length):
    """The turn without the whitening: along the momentum."""
    momentum = 0.9 * memory.get("momentum", 0) + 0.1 * gradients.mean(dim=0)
    return turn(vectors, momentum, angle, length), {"momentum": momentum}


def test_whitening_is_what_finds_the_way_where_the_axes_are_mixed():
    """What is left of the loss after 40 turns, a mean of four problems, each way with its best angle."""
    left = {}
    for optimizer in (whitened, plain):
        for angle in (0.03, 0.06, 0.12, 0.2, 0.3):
            found = []
            for seed in range(4):
                H, c = quadratic(seed)
                c = c / np.linalg.norm(c.mean(0), axis=-1)[:, None]  # the best vectors are of length 1
                start = torch.zeros(n, D, dtype=torch.float64)
                path, _ = walk(optimizer, start, H, c, 40, angle=angle, length=1.0)
                rest = torch.stack(path[30:]).mean(dim=0).numpy() - c.mean(0)  # a word is an average
                found.append(((rest @ H) * rest).sum())
            left[optimizer] = min(np.mean(found), left.get(optimizer, np.inf))
    assert left[whitened] < 0.5 * left[plain]


@pytest.mark.parametrize("optimizer", [partial(whitened, angle=0.1, length=1.0), partial(adam, lr=0.01)])
def test_nothing_is_changed_in_place_and_a_memory_goes_on(optimizer):
    H, c = quadratic()
    path, memory = walk(optimizer, torch.zeros(n, D, dtype=torch.float64), H, c, 3)
    kept, here = {k: x.clone() for k, x in memory.items() if torch.is_tensor(x)}, path[-1].clone()
    rest, _ = walk(optimizer, path[-1], H, c, 4, memory)
    whole, _ = walk(optimizer, torch.zeros(n, D, dtype=torch.float64), H, c, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, path + rest, strict=True))
    assert all(torch.equal(memory[k], x) for k, x in kept.items()) and torch.equal(path[-1], here)


def test_gradients_that_are_zero_or_no_numbers():
    for v in (torch.ones(1, D), torch.zeros(1, D)):
        assert torch.equal(whitened(v, torch.zeros(B, 1, D), {}, angle=0.1, length=0.3)[0], v)
        assert whitened(v, torch.full((B, 1, D), torch.nan), {}, angle=0.1, length=0.3)[0].isnan().all()


def test_inverse_root():
    H, _ = quadratic()
    root = inverse_root(torch.from_numpy(H)[None])[0]
    torch.testing.assert_close(root @ torch.from_numpy(H) @ root, torch.eye(D, dtype=torch.float64))
    singular = torch.diag(torch.tensor([4.0, 1.0, 0.0]))[None]
    expected = torch.tensor([0.5, 1.0, (4 * FLOOR) ** -0.5])
    torch.testing.assert_close(inverse_root(singular)[0].diag(), expected)
