"""The optimizers of a word: whitened steps, which only something as small as a word can afford, and Adam.

Both take the gradient of every sample of the batch by itself, (B, n, D), and change no tensor in place."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EVERY = 5  # steps from one eigendecomposition to the next; a fresh one every step learns no better
FLOOR = 1e-3  # of the largest eigenvalue: how much the directions that no gradient has shown yet may weigh


class Whitened:
    """Steps of one length along the momentum, whitened by the full second moment of the gradients.

    Full-matrix AdaGrad (Duchi, Hazan and Singer, JMLR 12, 2011) walks along M^(-1/2) g, M (D, D) being the
    sum of all g gᵀ so far.  A network has too many parameters for that; a vector has 128 … 1280.  M^(-1/2)
    makes the gradients' noise alike in all directions, so that a step follows what the samples agree on, also
    where they differ most.  For each vector v of the word, with g_b the gradient of sample b:

        M <- M + mean_b g_b g_bᵀ        m <- 0.9 m + 0.1 mean_b g_b
        d  = M^(-1/2) m                 v <- v - lr √D d / ‖d‖

    Two things differ from the paper.  Momentum takes the gradient's place.  And the step is normalised, so
    that its root mean square is `lr` per number; M as a sum or a mean, m with or without a correction for
    its start, are then the same.  Eigenvalues are floored at FLOOR of the largest: M has a rank of at most
    B after the first step.  `cap` is the longest that a vector may become: without it vectors grow with each
    step, and the longer they are, the less do the other words of a prompt count.
    """

    LR = 1e-2

    def __init__(self, vectors: Tensor, lr: float = LR, cap: float = math.inf):
        n, D = vectors.shape
        self.lr, self.cap = lr, cap
        self.steps = 0
        self.momentum = torch.zeros_like(vectors)
        self.moment = vectors.new_zeros(n, D, D)
        self.root = vectors.new_zeros(n, D, D)  # moment^(-1/2), from the last eigendecomposition

    def step(self, vectors: Tensor, gradients: Tensor) -> Tensor:
        """The next vectors (n, D), from these and the gradients (B, n, D) of the samples there."""
        g = gradients.transpose(0, 1)  # (n, B, D)
        self.steps += 1
        self.moment = self.moment + g.mT @ g / g.shape[1]
        self.momentum = 0.9 * self.momentum + 0.1 * g.mean(dim=1)
        if self.steps == 1 or self.steps % EVERY == 0:
            self.root = inverse_root(self.moment)
        direction = F.normalize((self.root @ self.momentum[..., None])[..., 0], dim=-1)
        vectors = vectors - self.lr * vectors.shape[1] ** 0.5 * direction
        return vectors * (self.cap / vectors.norm(dim=-1, keepdim=True)).clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        """All but the settings."""
        return {name: getattr(self, name) for name in ("steps", "momentum", "moment", "root")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.__dict__.update(state)


class Adam:
    """Adam (Kingma and Ba, 1412.6980) on the mean of the samples' gradients: the paper's way."""

    LR = 5e-3

    def __init__(self, vectors: Tensor, lr: float = LR):
        self.lr = lr
        self.steps = 0
        self.momentum = torch.zeros_like(vectors)
        self.moment = torch.zeros_like(vectors)

    def step(self, vectors: Tensor, gradients: Tensor) -> Tensor:
        """The next vectors (n, D), from these and the gradients (B, n, D) of the samples there."""
        g = gradients.mean(dim=0)
        self.steps += 1
        self.momentum = 0.9 * self.momentum + 0.1 * g
        self.moment = 0.999 * self.moment + 0.001 * g.square()
        mean, square = self.momentum / (1 - 0.9**self.steps), self.moment / (1 - 0.999**self.steps)
        return vectors - self.lr * mean / (square.sqrt() + 1e-8)

    def state_dict(self) -> dict[str, Any]:
        """All but the settings."""
        return {name: getattr(self, name) for name in ("steps", "momentum", "moment")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.__dict__.update(state)


def inverse_root(matrix: Tensor) -> Tensor:
    """M^(-1/2) of symmetric positive semidefinite matrices (n, D, D), small eigenvalues floored."""
    # Not a number in, not a number out, by way of the momentum; here eigh would raise.
    finite = matrix.nan_to_num(0, 0, 0)
    finite = finite.cpu() if matrix.device.type == "mps" else finite  # which has no eigh
    values, axes = torch.linalg.eigh(finite)  # (n, D), (n, D, D)
    values = values.clamp(min=FLOOR * values[:, -1:]).clamp(min=1e-30)  # of gradients that are zero, too
    return ((axes * values.rsqrt()[:, None]) @ axes.mT).to(matrix)
