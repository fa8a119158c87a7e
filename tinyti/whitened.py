"""The optimizers of a word: whitened steps, which only something as small as a word can afford, and Adam.

Each is a function of the vectors (n, D), of the gradient of every sample of a batch there, (B, n, D), and of
its memory, {} at first.  It returns the next vectors and the next memory, and changes nothing in place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EVERY = 5  # steps from one eigendecomposition to the next; a fresh one every step learns no better
FLOOR = 1e-3  # of the largest eigenvalue: how much the directions that no gradient has shown yet may weigh

Memory = dict[str, int | Tensor]


def whitened(
    vectors: Tensor, gradients: Tensor, memory: Memory, angle: float, length: float
) -> tuple[Tensor, Memory]:
    """Turn the vectors by an angle (radians), against the whitened gradients, at one length."""
    direction, memory = whiten(gradients, memory)
    return turn(vectors, direction, angle, length), memory


def whiten(gradients: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """The momentum of the gradients (B, n, D), whitened by their full second moment: d (n, D).

    Full-matrix AdaGrad (Duchi, Hazan and Singer, JMLR 12, 2011) walks along M^(-1/2) g, M (D, D) being the
    sum of all g gᵀ so far.  A network has too many parameters for that; a vector has 128 … 1280.  M^(-1/2)
    makes the gradients' noise alike in all directions, so that a step follows what the samples agree on, also
    where they differ most.  For each vector of the word, with g_b the gradient of sample b:

        M <- M + mean_b g_b g_bᵀ        m <- 0.9 m + 0.1 mean_b g_b        d = M^(-1/2) m

    Momentum takes the gradient's place.  Only the direction of d is used, so M may be a sum or a mean.
    Eigenvalues are floored at FLOOR of the largest: M has a rank of at most B after the first step.
    """
    g = gradients.transpose(0, 1)  # (n, B, D)
    step = memory.get("step", 0) + 1
    moment = memory.get("moment", 0) + g.mT @ g / g.shape[1]  # M of each vector, (n, D, D)
    momentum = 0.9 * memory.get("momentum", 0) + 0.1 * g.mean(dim=1)
    root = inverse_root(moment) if step == 1 or step % EVERY == 0 else memory["root"]
    direction = (root @ momentum[..., None])[..., 0]
    return direction, {"step": step, "moment": moment, "momentum": momentum, "root": root}


def turn(vectors: Tensor, direction: Tensor, angle: float, length: float) -> Tensor:
    """Turn vectors (n, D) by an angle away from d (n, D), on the sphere of vectors of one length:

        u = v / ‖v‖        d <- d - (d·u) u        u <- normalise(u - tan(angle) d / ‖d‖)        v <- length u

    Zeros have no direction: the first step from there goes to -d / ‖d‖.
    """
    u = F.normalize(vectors, dim=-1)
    tangent = F.normalize(direction - (direction * u).sum(dim=-1, keepdim=True) * u, dim=-1)
    turned = length * F.normalize(u - math.tan(angle) * tangent, dim=-1)
    return torch.where((direction == 0).all(dim=-1, keepdim=True), vectors, turned)  # no gradient, no step


def adam(vectors: Tensor, gradients: Tensor, memory: Memory, lr: float) -> tuple[Tensor, Memory]:
    """A step of Adam (Kingma and Ba, 1412.6980) on the mean of the samples' gradients: the paper's way."""
    g = gradients.mean(dim=0)
    step = memory.get("step", 0) + 1
    momentum = 0.9 * memory.get("momentum", 0) + 0.1 * g
    moment = 0.999 * memory.get("moment", 0) + 0.001 * g.square()
    mean, square = momentum / (1 - 0.9**step), moment / (1 - 0.999**step)
    vectors = vectors - lr * mean / (square.sqrt() + 1e-8)
    return vectors, {"step": step, "moment": moment, "momentum": momentum}


def inverse_root(matrix: Tensor) -> Tensor:
    """M^(-1/2) of symmetric positive semidefinite matrices (n, D, D), small eigenvalues floored."""
    # eigh raises on NaN; zero them here, the momentum carries the NaN to the result.
    finite = matrix.nan_to_num(0, 0, 0)
    finite = finite.cpu() if matrix.device.type == "mps" else finite  # which has no eigh
    values, axes = torch.linalg.eigh(finite)  # (n, D), (n, D, D)
    values = values.clamp(min=FLOOR * values[:, -1:]).clamp(min=1e-30)  # of gradients that are zero, too
    return ((axes * values.rsqrt()[:, None]) @ axes.mT).to(matrix)
