"""The optimizers of a word: on a quadratic they take the path that the formulas say."""

import numpy as np
import pytest
import torch

from tinyti.whitened import EVERY, FLOOR, Adam, Whitened, inverse_root

B, n, D = 4, 2, 6


def quadratic(seed=0):
    """Samples' losses ½ (v - c_b)ᵀ H (v - c_b): H (D, D) of condition 300, targets c (B, n, D)."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))
    return axes @ np.diag(np.geomspace(1, 300, D)) @ axes.T, rng.normal(size=(B, n, D))


def gradients(H, c, v):
    return torch.from_numpy((v.numpy() - c) @ H)


def test_the_path_on_a_quadratic_is_the_formulas():
    """Written out once more with numpy in float64, a vector at a time, the root by another decomposition."""
    H, c = quadratic()
    start = torch.zeros(n, D, dtype=torch.float64)
    optimizer, v, path = Whitened(start, lr=0.05, cap=1.1), start, []
    for _ in range(23):
        v = optimizer.step(v, gradients(H, c, v))
        path.append(v)
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
    v = Whitened(g[0], lr=0.01).step(torch.zeros(1, D, dtype=torch.float64), g)
    torch.testing.assert_close(v, -0.01 * D**0.5 * g[0] / g.norm(), rtol=1e-9, atol=0)


def test_adam_is_torchs():
    H, c = quadratic()
    start = torch.ones(n, D, dtype=torch.float64)
    ours, v = Adam(start, lr=0.02), start
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.02)
    for _ in range(20):
        v = ours.step(v, gradients(H, c, v))
        theirs.grad = gradients(H, c, theirs.detach()).mean(0)
        optimizer.step()
        torch.testing.assert_close(v, theirs.detach(), rtol=1e-7, atol=1e-9)


def test_whitened_steps_need_far_fewer_than_adam_where_the_axes_are_mixed():
    H, c = quadratic()
    best = torch.from_numpy(c.mean(0))
    left = {}
    for kind, lr in ((Whitened, 0.05), (Adam, 0.05)):
        v = torch.zeros(n, D, dtype=torch.float64)
        optimizer = kind(v, lr=lr)
        for _ in range(40):
            v = optimizer.step(v, gradients(H, c, v))
        left[kind] = (((v - best).numpy() @ H) * (v - best).numpy()).sum()
    assert left[Whitened] < 0.5 * left[Adam]


@pytest.mark.parametrize("kind", [Whitened, Adam])
def test_nothing_is_changed_in_place_and_a_state_goes_on(kind):
    H, c = quadratic()
    v = torch.zeros(n, D, dtype=torch.float64)
    optimizer = kind(v)
    for _ in range(3):
        v = optimizer.step(v, gradients(H, c, v))
    state, here = optimizer.state_dict(), v.clone()
    kept = {k: x.clone() for k, x in state.items() if torch.is_tensor(x)}
    other, w = kind(here), here
    other.load_state_dict(state)
    for _ in range(4):
        v, w = optimizer.step(v, gradients(H, c, v)), other.step(w, gradients(H, c, w))
        assert torch.equal(v, w)
    assert all(torch.equal(state[k], x) for k, x in kept.items()) and not torch.equal(v, here)


def test_gradients_that_are_zero_or_no_numbers():
    v = torch.ones(1, D)
    assert torch.equal(Whitened(v).step(v, torch.zeros(B, 1, D)), v)
    assert Whitened(v).step(v, torch.full((B, 1, D), float("nan"))).isnan().all()


def test_inverse_root():
    H, _ = quadratic()
    root = inverse_root(torch.from_numpy(H)[None])[0]
    torch.testing.assert_close(root @ torch.from_numpy(H) @ root, torch.eye(D, dtype=torch.float64))
    singular = torch.diag(torch.tensor([4.0, 1.0, 0.0]))[None]
    expected = torch.tensor([0.5, 1.0, (4 * FLOOR) ** -0.5])
    torch.testing.assert_close(inverse_root(singular)[0].diag(), expected)
