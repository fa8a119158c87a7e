"""The noise predictor of latent diffusion: a UNet whose attention reads the prompt at every resolution.

Stable Diffusion 1, 2 and the paper's LDM share this network; only their configurations differ."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Attention, Downsample, ResnetBlock, Upsample, timestep_embedding


@dataclass
class UNetConfig:
    """The fields of unet/config.json that shape the network, named and defaulted as diffusers does."""

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8  # published under this name, but the *number* of heads
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int | None = None  # latents per side in training


class GEGLU(nn.Module):
    """x (..., dim) -> (..., inner): the GELU of one half of a projection gates the other half."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward, each added to its input: (B, HW, dim)."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        # Published as net.0 and net.2; net.1 was dropout.
        net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """A transformer block over the pixels of x (B, C, H, W), with context (B, T, D)."""

    def __init__(self, config: UNetConfig, channels: int, heads: int):
        super().__init__()
        c, linear = channels, config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, c, 1e-6)
        self.proj_in = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, heads, config.cross_attention_dim)])
        self.proj_out = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = self._project(self.proj_in, h)
        h = self.transformer_blocks[0](h, context)
        h = self._project(self.proj_out, h)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

    @staticmethod
    def _project(layer, h):
        # A 1×1 convolution is a linear layer; SD1 publishes the convolution, SD2 the linear layer.
        return F.linear(h, layer.weight.flatten(1), layer.bias)


def resnet(config: UNetConfig, c_in: int, c_out: int) -> ResnetBlock:
    """A residual block that takes the timestep embedding."""
    return ResnetBlock(c_in, c_out, config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0])


class Block(nn.Module):
    """One resolution of the UNet: resnets, a transformer after each if `kind` has attention, resampling."""

    def __init__(
        self,
        config: UNetConfig,
        c_ins: list[int],
        c_out: int,
        heads: int,
        kind: str,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.resnets = nn.ModuleList([resnet(config, c, c_out) for c in c_ins])
        attends = "Attn" in kind
        self.attentions = nn.ModuleList([Transformer(config, c_out, heads) for _ in c_ins if attends])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        """Apply the i-th resnet and its transformer, if any: x (B, C, H, W) -> (B, c_out, H, W)."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if self.attentions else x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet, at the lowest resolution."""

    def __init__(self, config: UNetConfig, channels: int, heads: int):
        super().__init__()
        self.resnets = nn.ModuleList([resnet(config, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(config, channels, heads)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, temb)


class UNet(nn.Module):
    """Predicts the noise (or v) in x_t, given the timestep and the prompt's context."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute activations in the backward pass instead of keeping them
        widths, layers, heads = config.block_out_channels, config.layers_per_block, config.attention_head_dim
        heads = (heads,) * len(widths) if isinstance(heads, int) else heads
        down, up = config.down_block_types, config.up_block_types
        if not len(widths) == len(down) == len(up) == len(heads):
            raise ValueError(f"widths, blocks and heads differ in number: {widths}, {down}, {up}, {heads}")

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        linear_1, linear_2 = nn.Linear(widths[0], 4 * widths[0]), nn.Linear(4 * widths[0], 4 * widths[0])
        self.time_embedding = nn.ModuleDict({"linear_1": linear_1, "linear_2": linear_2})
        skips = [widths[0]]  # channels of each activation that an up block reads again
        self.down_blocks = nn.ModuleList()
        for i, (kind, c_out) in enumerate(zip(down, widths)):
            last = i == len(widths) - 1
            c_ins = [skips[-1]] + [c_out] * (layers - 1)
            self.down_blocks.append(Block(config, c_ins, c_out, heads[i], kind, down=not last))
            skips += [c_out] * (layers if last else layers + 1)

        self.mid_block = MidBlock(config, widths[-1], heads[-1])

        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for i, (kind, c_out) in enumerate(zip(up, widths[::-1])):
            last = i == len(widths) - 1
            c_ins = [c + skips.pop() for c in [channels] + [c_out] * layers]
            self.up_blocks.append(Block(config, c_ins, c_out, heads[-1 - i], kind, up=not last))
            channels = c_out

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """x_t (B, C, H, W), t (B,) or a number in [0, 1000), context (B, T, D) -> prediction (B, C, H, W)."""
        if not torch.is_tensor(t):  # filled on the device, because a copy would wait for the GPU
            t = torch.full((), t, device=x_t.device)
        t = t.to(x_t.device).expand(len(x_t))  # (B,)
        temb = timestep_embedding(t, self.conv_in.out_channels)  # (B, c)
        temb = self.time_embedding["linear_1"](temb.to(x_t.dtype))  # (B, 4c)
        temb = self.time_embedding["linear_2"](F.silu(temb))  # (B, 4c)

        x = self.conv_in(x_t)  # (B, c, H, W)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = self._run(block.layer, i, x, temb, context)  # (B, c_i, H / 2^i, W / 2^i)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)  # half the size, rounded up
                skips.append(x)

        x = self._run(self.mid_block, x, temb, context)  # (B, c_n, H / 2^n, W / 2^n)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)  # (B, c_i + c_skip, …)
                x = self._run(block.layer, i, x, temb, context)  # (B, c_i, …)
            for upsample in block.upsamplers:
                x = upsample(x, size=skips[-1].shape[2:])  # the skip's size: 2H or 2H - 1
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, C, H, W)

    def _run(self, layer, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return layer(*args)
