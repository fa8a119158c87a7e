"""CLIP (Radford et al., 2103.00020): the text transformer that Stable Diffusion reads its prompts with,
and the image tower beside it, for measuring how near a picture is to a prompt or to another picture."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .layers import attend, divisor, embedding

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass
class TextConfig:
    """The fields of text_encoder/config.json that shape the network, as transformers names them."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass
class VisionConfig:
    """The fields of a CLIP's vision_config that shape the network, as transformers names them."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass
class CLIPConfig:
    """A published CLIP: both towers and the width of the space in which they meet."""

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512


class SelfAttention(nn.Module):
    """Self-attention of x (B, T, D), causal (the text tower) or not (the image tower)."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = divisor(heads, dim), causal
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class MLP(nn.Module):
    """x (B, T, D) -> (B, T, D) through a wider layer."""

    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """One pre-norm transformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TextConfig | VisionConfig, causal: bool):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(dim, eps)
        self.self_attn = SelfAttention(dim, config.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def transformer(config: TextConfig | VisionConfig, causal: bool) -> nn.ModuleDict:
    """The layers of a tower, under the name that transformers gives them: encoder.layers.i."""
    layers = [Layer(config, causal) for _ in range(config.num_hidden_layers)]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})


class CLIPText(nn.Module):
    """The text transformer, in two halves: ids -> embeds -> context.  Textual Inversion acts between them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        token = embedding(config.vocab_size, config.hidden_size)
        position = embedding(config.max_position_embeddings, config.hidden_size)
        self.embeddings = nn.ModuleDict({"token_embedding": token, "position_embedding": position})
        self.encoder = transformer(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    @property
    def table(self) -> Tensor:
        """The vocabulary's rows (V, D)."""
        return self.embeddings["token_embedding"].weight

    def embed(self, ids: Tensor) -> Tensor:
        """Word rows only, before positions: ids (B, T) -> embeds (B, T, D).

        Ids at or above the vocabulary belong to learned words; their rows are a stand-in, for
        `Concept.insert` to replace.
        """
        return self.embeddings["token_embedding"](ids.where(ids < self.config.vocab_size, 0))

    def forward(self, embeds: Tensor) -> Tensor:
        """embeds (B, T, D), T at most 77 -> context (B, T, D)."""
        x = embeds + self.embeddings["position_embedding"].weight[: embeds.shape[1]]
        return self.final_layer_norm(self.encoder["layers"](x))


class VisionEmbeddings(nn.Module):
    """Images (B, 3, S, S) -> patches behind a class token, with positions (B, 1 + (S/p)², D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, patch, stride=patch, bias=False)
        self.position_embedding = embedding((config.image_size // patch) ** 2 + 1, dim)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight


class CLIPVision(nn.Module):
    """The image tower: preprocessed images (B, 3, S, S) -> the class token's last state (B, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # (sic) as published
        self.encoder = transformer(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.encoder["layers"](self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(x[:, 0])


@dataclass
class Preprocessing:
    """A picture's way into the image tower, by preprocessor_config.json; OpenAI's values by default."""

    resize: int = 224  # shortest side
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        if not (0 < self.crop <= self.resize and len(self.mean) == len(self.std) == 3):
            raise ValueError(f"expected a crop within the size, and three means and deviations, got {self}")
        Image.Resampling(self.resample)  # ValueError for other numbers

    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """PIL pictures of any size -> (B, 3, crop, crop) in fp32."""
        return torch.stack([self._to_tensor(picture.convert("RGB")) for picture in pictures])

    def _to_tensor(self, picture):
        short = min(picture.size)
        picture = picture.resize(tuple(self.resize * side // short for side in picture.size), self.resample)
        left, top = ((side - self.crop) // 2 for side in picture.size)
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        levels = np.asarray(picture, dtype=np.float32) / 255
        pixels = (levels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1)


class CLIP(nn.Module):
    """Both towers and their projections into one space, in which cosine measures likeness."""

    def __init__(self, config: CLIPConfig, preprocess: Preprocessing | None = None):
        super().__init__()
        self.config = config
        size = config.vision_config.image_size
        self.preprocess = preprocess or Preprocessing(size, size)
        if self.preprocess.crop != size:
            raise ValueError(f"a crop of {self.preprocess.crop} pixels, but the image tower takes {size}")
        self.text_model = CLIPText(config.text_config)
        self.vision_model = CLIPVision(config.vision_config)
        text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
        self.text_projection = nn.Linear(text, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07)

    def encode_image(self, images: list[Image.Image] | Tensor) -> Tensor:
        """PIL pictures, or preprocessed images (B, 3, S, S) -> (B, P) of length 1."""
        if not torch.is_tensor(images):
            images = self.preprocess(images).to(self.logit_scale)
        return F.normalize(self.visual_projection(self.vision_model(images)), dim=-1)

    def encode_text(self, ids: Tensor, embeds: Tensor | None = None) -> Tensor:
        """ids (B, T), and embeds (B, T, D) if they hold learned words -> (B, P) of length 1."""
        context = self.text_model(self.text_model.embed(ids) if embeds is None else embeds)
        # The first end token's state stands for the prompt.  Its place is found by id: argmax, as in the
        # original, would take a learned word's.  Old configurations say 2 where they mean the last id.
        config = self.config.text_config
        end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
        pooled = context[torch.arange(len(ids)), (ids == end).int().argmax(dim=-1)]
        return F.normalize(self.text_projection(pooled), dim=-1)
