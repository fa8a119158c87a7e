"""The pieces that the networks share: attention, residual blocks, resampling, the timestep embedding.

Attributes carry the names that diffusers publishes, so that weights load without a mapping."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention: q (B, T, D), k and v (B, S, D) -> (B, T, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # ten times slower than fp32 with narrow heads
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), heads, causal).bfloat16()
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D / heads)
    # The kernels keep the scores in fp32 for any inputs; in SD2.1 the scores exceed fp16's range.
    x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return x.transpose(1, 2).flatten(2)


def embedding(count: int, dim: int) -> nn.Embedding:
    """A table (count, dim) of uninitialised values, to be loaded from a file or set by the caller."""
    # Random initialisation on the meta device makes PyTorch import its compiler: a second per load.
    return nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)


def check_heads(heads: int, dim: int) -> int:
    """Return the number of heads if it divides the width `dim`; else raise ValueError."""
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide a width of {dim}")
    return heads


class Attention(nn.Module):
    """Attention from x (B, T, dim) to a context (B, S, context_dim), or to x itself if there is none."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = check_heads(heads, dim)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out[0](attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timesteps t (B,) -> (B, dim) in fp32: cosines first, then sines (dim is even)."""
    steps = torch.arange(dim // 2, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(10_000) / (dim // 2)))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut: x (B, c_in, H, W), temb (B, temb_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, temb_dim: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, c_out) if temb_dim else None  # the VAE has no timestep
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), rounded up in the UNet (padding 1), down in the VAE (0)."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):  # the VAE pads right and bottom only
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, *size), nearest neighbour then a convolution; size is (2H, 2W) unless given."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
