"""Train the autoencoder, and encode all pictures with it."""

import torch
import torch.nn.functional as F

from tinyti.diffusion import randn
from tinyti.networks.vae import VAE, VAEConfig

from .training import integers, to_images, train_stage, uniform


def recolour_images(images, generator):
    """Recolour half of the images (B, 3, S, S): paler, with channels swapped or inverted."""
    count = len(images)
    swap = uniform((count, 3), generator).argsort(1)
    sign = integers(2, (count, 3, 1, 1), generator) * 2 - 1
    low = uniform((count, 3, 1, 1), generator) * 0.6 + 0.4  # the contrast that is left
    other = images[torch.arange(count, device=images.device)[:, None], swap] * sign * low
    other = other + (1 - low) * (uniform((count, 3, 1, 1), generator) * 2 - 1)
    return torch.where(uniform((count, 1, 1, 1), generator) < 0.5, images, other)


def edges(images):
    """Return the differences of neighbouring pixels, across and down, of (B, 3, S, S)."""
    return images.diff(dim=-1), images.diff(dim=-2)


def train_vae(work, array, others):
    """Train the autoencoder on pixels, on edges, and on a Kullback-Leibler term for smooth latents.

    Seven of ten pictures are the world's, half of them recoloured; the others are abstract.
    """
    recipe = work.recipe
    torch.manual_seed(0)
    model = VAE(VAEConfig(block_out_channels=recipe.vae_widths, layers_per_block=1, norm_num_groups=8))
    work.load_start(model, "vae")

    def loss_of(generator, count):
        few = count * 3 // 10
        pages = to_images(array[integers(recipe.pictures, count - few, generator)])
        pages = recolour_images(pages, generator)
        images = torch.cat([pages, to_images(others[integers(len(others), few, generator)])])
        mean, std = model.encode(images)
        mean, std = mean.float(), std.float()
        z = mean + std * randn(mean.shape, generator, mean)
        kl = (mean**2 + std**2 - 1 - 2 * std.log()).mean() / 2
        decoded = model.decode(z).float()
        sharp = sum(F.mse_loss(a, b) for a, b in zip(edges(decoded), edges(images)))
        return F.mse_loss(decoded, images) + 0.25 * sharp + 1e-4 * kl

    train_stage(work, "vae", model, loss_of, recipe.vae_samples, recipe.vae_batch, lr=1e-3, ema=0.999)
    return model.eval().requires_grad_(False)


def encode_pages(work, coder, kind, array):
    """Return a sample of each picture's latents, (N, C, h, w) in fp16."""
    size = 32 if work.device == "cpu" else 1024

    def make():
        parts = []
        for i in range(0, len(array), size):
            with torch.no_grad(), torch.autocast(work.device, torch.bfloat16):
                mean, std = coder.encode(to_images(array[i : i + size]))
            z = mean + std * randn(mean.shape, torch.Generator().manual_seed(i), mean)
            parts.append(z.half().cpu())
        return [torch.cat(parts).numpy()]

    [latents] = work.once(f"{kind} encoded", len(array), make, f"{kind}-latents.npy")
    return latents
