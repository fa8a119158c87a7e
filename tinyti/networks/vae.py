"""The autoencoder of latent diffusion (Rombach et al., 2112.10752): images <-> latents.

The encoder gives a Gaussian for each image; diffusion runs on samples of it, scaled to unit variance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm in the VAE


@dataclass
class VAEConfig:
    """The fields of vae/config.json that shape the network, named and defaulted as diffusers does."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215


class MidBlock(nn.Module):
    """Resnet, self-attention with one head over all pixels, resnet, at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])
        attention = Attention(channels, heads=1, bias=True)
        attention.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        attention = self.attentions[0]
        h = attention(attention.group_norm(x).flatten(2).transpose(1, 2))  # (B, HW, C)
        x = x + h.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.resnets[1](x)


class Block(nn.Module):
    """Resnets at one resolution, then a Downsample or an Upsample unless the block is the last."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool = False, up: bool = False):
        super().__init__()
        widths = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, c_out, groups, EPS) for c in widths])
        self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> moments (B, 2C, H/f, W/f)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(*(
            Block(c_in, c_out, config.layers_per_block, groups, down=i < len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths))
        ))  # fmt: skip
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, C, H/f, W/f) -> images (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.Sequential(*(
            Block(c_in, c_out, config.layers_per_block + 1, groups, up=i < len(widths) - 1)
            for i, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths))
        ))  # fmt: skip
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.up_blocks(self.mid_block(self.conv_in(z)))
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """AutoencoderKL.  Latents here are unscaled; `config.scaling_factor` brings them to unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of `factor` -> mean, std (B, C, H/f, W/f)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f h, f w), about [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(z))
