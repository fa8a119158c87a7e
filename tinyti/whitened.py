"""The optimizers of a word: whitened steps, affordable only for something as small as a word, and Adam.

Each takes the vectors (n, D), every sample's gradient there (B, n, D) and its own memory, {} at first.
It returns the next vectors and the next memory, and changes nothing in place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EVERY = 5  # steps between eigendecompositions; a fresh one every step learns no better
FLOOR = 1e-3  # least eigenvalue, relative to the largest: limits directions without gradients so far

Memory = dict[str, int | Tensor]


def whitened(
    vectors: Tensor, gradients: Tensor, memory: Memory, angle: float, length: float
) -> tuple[Tensor, Memory]:
    """Turn the vectors by an angle (radians), against the whitened gradients, and give them one length."""
    direction, memory = whiten(gradients, memory)
    return turn(vectors, direction, angle, length), memory


def whiten(gradients: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """The momentum of the gradients (B, n, D), whitened by their full second moment: d (n, D).

    Full-matrix AdaGrad (Duchi, Hazan and Singer, JMLR 12, 2011) steps along M^(-1/2) g, where M (D, D) is the
    sum of all g gᵀ so far.  A network has too many parameters for that; a vector has 128 … 1280.  M^(-1/2)
    evens out the gradients' noise, so a step follows what the samples agree on, even in the noisiest
    directions.  For each vector of the word, with g_b the gradient of sample b:

        M <- M + mean_b g_b g_bᵀ        m <- 0.9 m + 0.1 mean_b g_b        d = M^(-1/2) m

    Momentum replaces the gradient.  Only the direction of d is used, so M may be a sum or a mean.
    Eigenvalues are floored at FLOOR times the largest, because M has rank B at most after the first step.
    """
    g = gradients.transpose(0, 1)  # (n, B, D)
    step = memory.get("step", 0) + 1
    moment = memory.get("moment", 0) + g.mT @ g / g.shape[1]  # M of each vector, (n, D, D)
    momentum = 0.9 * memory.get("momentum", 0) + 0.1 * g.mean(dim=1)
    root = inverse_root(moment) if step == 1 or step % EVERY == 0 else memory["root"]
    direction = (root @ momentum[..., None])[..., 0]
    return direction, {"step": step, "moment": moment, "momentum": momentum, "root": root}


def turn(vectors: Tensor, direction: Tensor, angle: float, length: float) -> Tensor:
    """Turn vectors (n, D) by an angle (radians) away from d (n, D), on a sphere of radius `length`:

        u = v / ‖v‖        d <- d - (d·u) u        u <- normalise(u - tan(angle) d / ‖d‖)        v <- length u

    A vector of zeros has no direction: its first step goes to -length d / ‖d‖.
    """
    u = F.normalize(vectors, dim=-1)
    tangent = F.normalize(direction - (direction * u).sum(dim=-1, keepdim=True) * u, dim=-1)
    turned = length * F.normalize(u - math.tan(angle) * tangent, dim=-1)
    return torch.where((direction == 0).all(dim=-1, keepdim=True), vectors, turned)  # no gradient, no step


def adam(vectors: Tensor, gradients: Tensor, memory: Memory, lr: float) -> tuple[Tensor, Memory]:
    """Take a step of Adam (Kingma and Ba, 1412.6980) on the mean of the samples' gradients."""
    g = gradients.mean(dim=0)
    step = memory.get("step", 0) + 1
    momentum = 0.9 * memory.get("momentum", 0) + 0.1 * g
    moment = 0.999 * memory.get("moment", 0) + 0.001 * g.square()
    mean, square = momentum / (1 - 0.9**step), moment / (1 - 0.999**step)  # bias correction
    vectors = vectors - lr * mean / (square.sqrt() + 1e-8)
    return vectors, {"step": step, "moment": moment, "momentum": momentum}


def inverse_root(matrix: Tensor) -> Tensor:
    """M^(-1/2) of symmetric positive semidefinite matrices (n, D, D), with small eigenvalues floored."""
    # eigh raises on NaN; zero them here, the momentum carries the NaN to the result.
    finite = matrix.nan_to_num(0, 0, 0)
    finite = finite.cpu() if matrix.device.type == "mps" else finite  # MPS has no eigh
    values, axes = torch.linalg.eigh(finite)  # (n, D), (n, D, D)
    values = values.clamp(min=FLOOR * values[:, -1:]).clamp(min=1e-30)  # above 0 even if all gradients are 0
    return ((axes * values.rsqrt()[:, None]) @ axes.mT).to(matrix)
