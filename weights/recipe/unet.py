"""The UNet, and the text transformer that is trained along with it."""

from typing import NamedTuple

import torch
from torch import Tensor

from tinyti.diffusion import randn
from tinyti.networks.unet import UNet, UNetConfig

from .made_up_words import Reader
from .training import integers, train_stage, uniform


class Pages(NamedTuple):
    """The data of this stage, from N pages."""

    latents: Tensor  # (N, C, h, w), fp16
    scale: float  # times this, the latents have a standard deviation of one
    ids: Tensor  # (N, 4 + 4, 77), captions in words and with a made-up word alone
    features: Tensor  # (N, F), what the made-up word means


class JointModel(torch.nn.Module):
    """All that is trained: the UNet, its text transformer, the vectors of made-up words, and the reader."""

    def __init__(self, unet, text, count):
        super().__init__()
        self.unet, self.text, self.longest = unet, text, 4 * text.table.norm(dim=1).median().item()
        self.names = torch.nn.Linear(count, text.config.hidden_size)
        torch.nn.init.normal_(self.names.weight, std=0.25 * self.longest / count**0.5)
        self.names.bias.data.copy_(text.table.mean(0))
        self.reader = Reader(text.config.hidden_size)

    def words(self, features, generator):
        """Return the vectors (B, D) of made-up words with some noise, from their features (B, F)."""
        vectors = self.names(features).float()
        vectors = vectors * (self.longest / vectors.norm(dim=1, keepdim=True)).clamp(max=1)
        noise = randn(vectors.shape, generator, vectors)
        return vectors + 0.1 * vectors.detach().norm(dim=1, keepdim=True) / noise.shape[1] ** 0.5 * noise

    def context(self, ids, features, generator):
        """Return the contexts (B, 77, D) of ids (B, 77), some of which are the made-up word's."""
        made_up = (ids >= self.text.config.vocab_size)[..., None]
        return self.text(torch.where(made_up, self.words(features, generator)[:, None], self.text.embed(ids)))


def train_unet(work, pages, schedule, text, empty, look):
    """Train noise prediction on scaled latents, as in tinyti.inversion, but here the weights learn.

    The text transformer is trained too, as in the latent diffusion of the paper (2112.10752, section 4.3),
    starting from CLIP's.  The model sees a noisy picture twice: with a caption in words, and with a made-up
    word for the individual or the manner.  The word's vector is a linear function of the individual's
    features, which is also trained.  So the networks learn to read any individual from the vector of one
    word, as Textual Inversion needs.  Names alone would not do: a vocabulary has room for a few hundred.

    If the caption is complete and also has the made-up word, the prediction with the word alone is drawn to
    the prediction with that caption.  Both see the same noise, so their difference is free of it.  Small
    parts, which hardly count in the loss on pictures, soon get the colours that the UNet draws from words.
    """
    recipe = work.recipe
    torch.manual_seed(0)
    unet = start_as_identity(UNet(recipe_unet_config(recipe)))
    work.load_start(unet, "unet")
    work.load_start(text, "text")
    model = JointModel(unet, text.requires_grad_(True), pages.features.shape[1])
    unet.to(memory_format=work.layout)
    weights = loss_weights(schedule).to(work.device)
    ids, features, empty = pages.ids.to(work.device), pages.features.to(work.device), empty.to(work.device)

    def loss_of(generator, count):
        rows = integers(len(pages.latents), count // 2, generator)
        which = integers(4, count // 2, generator)
        words = torch.cat([ids[rows, which], ids[rows, which + 4]]).long()
        is_empty = uniform(count, generator) < recipe.empty_prompts
        words, meant = torch.where(is_empty[:, None], empty, words), twice(features[rows])
        context = model.context(words, meant, generator)
        x_0 = pages.scale * pages.latents[rows].float()
        t, eps = draw_noise(x_0, schedule.num_train_timesteps, recipe.offset_noise, generator)
        x_0, t, eps = twice(x_0), twice(t), twice(eps)
        x_t = schedule.add_noise(x_0, eps, t).contiguous(memory_format=work.layout)
        predicted = model.unet(x_t, t, context).float()
        error = weights[t] * (predicted - schedule.target(x_0, eps, t)).square().mean((1, 2, 3))

        says_all = twice((which > 1) & (rows < recipe.pictures)) & ~is_empty
        reading = model.reader(context, meant, says_all)
        in_words, by_word = predicted.chunk(2)
        pairs = torch.stack(says_all.chunk(2)).all(0) * weights[t[: count // 2]]
        difference = pairs * (by_word - in_words.detach()).square().mean((1, 2, 3))
        return error.mean() + 0.1 * reading + 10 * difference.mean()

    samples, batch = recipe.unet_samples, recipe.unet_batch
    train_stage(work, "unet", model, loss_of, samples, batch, recipe.unet_lr, recipe.unet_ema, look)
    return model.eval().requires_grad_(False)


def twice(batch):
    """Return a batch followed by itself."""
    return torch.cat([batch, batch])


def draw_noise(like, steps, offset, generator):
    """Draw a timestep below `steps` and noise for each of `like`.

    Offset noise (an added constant per picture and channel) teaches the network that the initial noise says
    nothing about the picture's mean colour.
    """
    t, eps = integers(steps, len(like), generator), randn(like.shape, generator, like)
    return t, eps + offset * randn((*like.shape[:2], 1, 1), generator, like)


def loss_weights(schedule):
    """Return the weight of each timestep in the loss.

    min-SNR weights (2303.09556, gamma 5): a small network spends less on the last, fine steps.  Where noise
    outweighs the picture, they grow as in 2310.08442, because the colours of parts are decided there.
    """
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    return (snr.clamp(max=5) / snr * snr.clamp(0.1, 1).rsqrt()).float()


def start_as_identity(unet):
    """Zero the last layer of every residual branch, so that each block begins as the identity."""
    for name, p in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            torch.nn.init.zeros_(p)
    return unet


def recipe_unet_config(recipe):
    """Return the UNet's configuration: attention on all levels except the first."""
    lower = len(recipe.unet_widths) - 1
    return UNetConfig(
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * lower),
        up_block_types=(*["CrossAttnUpBlock2D"] * lower, "UpBlock2D"),
        block_out_channels=recipe.unet_widths,
        layers_per_block=recipe.unet_layers,
        cross_attention_dim=recipe.clip_width,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=recipe.size // 2 ** (len(recipe.vae_widths) - 1),
    )
