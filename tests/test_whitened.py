"""The optimizers of a word: on a quadratic they take the path that the formulas say."""

import numpy as np
import pytest
import torch

from tinyti.whitened import EVERY, FLOOR, adam, inverse_root, whitened

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
    path, _ = walk(whitened, torch.zeros(n, D, dtype=torch.float64), H, c, 23, lr=0.05, cap=1.1)
    assert (path[-1].norm(dim=-1) == pytest.approx(1.1)) and (path[0].norm(dim=-1) < 1.1).all()

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
            x = x - 0.05 * np.sqrt(D) * d / np.linalg.norm(d)
            x = x * min(1, 1.1 / np.linalg.norm(x))
            np.testing.assert_allclose(path[k - 1][i].numpy(), x, rtol=1e-8, atol=1e-10)


def test_the_first_step_of_a_sample_is_along_its_gradient():
    """M = g gᵀ has g for its only axis, so that the whitened direction is g's: closed form."""
    g = torch.randn(1, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, _ = whitened(torch.zeros(1, D, dtype=torch.float64), g, {}, lr=0.01)
    torch.testing.assert_close(v, -0.01 * D**0.5 * g[0] / g.norm(), rtol=1e-9, atol=0)


def test_adam_is_torchs():
    H, c = quadratic()
    theirs = torch.nn.Parameter(torch.ones(n, D, dtype=torch.float64))
    optimizer = torch.optim.Adam([theirs], lr=0.02)
    path, _ = walk(adam, torch.ones(n, D, dtype=torch.float64), H, c, 20, lr=0.02)
    for v in path:
        theirs.grad = gradients(H, c, theirs.detach()).mean(0)
        optimizer.step()
        torch.testing.assert_close(v, theirs.detach(), rtol=1e-7, atol=1e-9)


def test_whitened_steps_need_far_fewer_than_adam_where_the_axes_are_mixed():
    H, c = quadratic()
    best = torch.from_numpy(c.mean(0))
    left = {}
    for optimizer in (whitened, adam):
        path, _ = walk(optimizer, torch.zeros(n, D, dtype=torch.float64), H, c, 40, lr=0.05)
        rest = (path[-1] - best).numpy()
        left[optimizer] = ((rest @ H) * rest).sum()
    assert left[whitened] < 0.5 * left[adam]


@pytest.mark.parametrize("optimizer", [whitened, adam])
def test_nothing_is_changed_in_place_and_a_memory_goes_on(optimizer):
    H, c = quadratic()
    path, memory = walk(optimizer, torch.zeros(n, D, dtype=torch.float64), H, c, 3, lr=0.01)
    kept, here = {k: x.clone() for k, x in memory.items() if torch.is_tensor(x)}, path[-1].clone()
    rest, _ = walk(optimizer, path[-1], H, c, 4, memory, lr=0.01)
    whole, _ = walk(optimizer, torch.zeros(n, D, dtype=torch.float64), H, c, 7, lr=0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole, path + rest, strict=True))
    assert all(torch.equal(memory[k], x) for k, x in kept.items()) and torch.equal(path[-1], here)


def test_gradients_that_are_zero_or_no_numbers():
    v = torch.ones(1, D)
    assert torch.equal(whitened(v, torch.zeros(B, 1, D), {}, lr=0.01)[0], v)
    assert whitened(v, torch.full((B, 1, D), float("nan")), {}, lr=0.01)[0].isnan().all()


def test_inverse_root():
    H, _ = quadratic()
    root = inverse_root(torch.from_numpy(H)[None])[0]
    torch.testing.assert_close(root @ torch.from_numpy(H) @ root, torch.eye(D, dtype=torch.float64))
    singular = torch.diag(torch.tensor([4.0, 1.0, 0.0]))[None]
    expected = torch.tensor([0.5, 1.0, (4 * FLOOR) ** -0.5])
    torch.testing.assert_close(inverse_root(singular)[0].diag(), expected)
