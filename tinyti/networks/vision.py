"""CLIP with its image tower (Radford et al., 2103.00020), and DINO (Caron et al., 2104.14294).

They only measure how similar a picture is to a prompt or another picture; no word is learned with them."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .clip import CLIPText, TextConfig, transformer
from .layers import embedding


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
    """The configuration of a published CLIP: both towers, and the width of their common space."""

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projection_dim: int = 512


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
    """Prepares pictures for the image tower, as preprocessor_config.json says; the defaults are OpenAI's."""

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
        left, top = (self._margin(side - self.crop) for side in picture.size)
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        levels = np.asarray(picture, dtype=np.float32) / 255
        pixels = (levels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _margin(self, rest):
        """The pixels to crop at the left or the top, of `rest` in all; transformers rounds down."""
        return rest // 2


class CLIP(nn.Module):
    """Both towers and their projections into a common space, where the cosine measures similarity."""

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
        # The first end token's state represents the prompt.  It is found by its id: the largest id, as in the
        # original, would be a learned word's.  Old configurations say 2 but mean the last id.
        config = self.config.text_config
        end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
        pooled = context[torch.arange(len(ids)), (ids == end).int().argmax(dim=-1)]
        return F.normalize(self.text_projection(pooled), dim=-1)


@dataclass
class DINOConfig(VisionConfig):
    """The fields of a vision transformer's config.json that shape the network, such as DINO's."""

    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12


@dataclass
class DINOPreprocessing(Preprocessing):
    """Prepares pictures as DINO's own evaluation does (eval_knn.py); the DreamBooth paper follows it.

    The result equals torchvision's Resize, CenterCrop and Normalize on PIL pictures.  The
    preprocessor_config.json of facebook/dino-vits16 resizes without a crop, and is not read.
    """

    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def _margin(self, rest):
        return round(rest / 2)  # rounds a half to even, as torchvision does


class DINOEmbeddings(nn.Module):
    """Images (B, 3, S, S) -> patches behind a class token, with positions (B, 1 + (S/p)², D)."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2 + 1, dim))
        projection = nn.Conv2d(config.num_channels, dim, patch, stride=patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return x + self.position_embeddings


class DINO(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2010.11929): images (B, 3, S, S) -> the class token's last
    state (B, D).  Its cosine similarity is the measure DINO of the DreamBooth paper (2208.12242)."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.config = config
        size = config.image_size
        self.preprocess = DINOPreprocessing(size * 8 // 7, size)  # 256 for 224
        self.embeddings = DINOEmbeddings(config)
        self.encoder = transformer(config, causal=False)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        return self.layernorm(self.encoder["layers"](self.embeddings(images))[:, 0])

    def encode_image(self, images: list[Image.Image] | Tensor) -> Tensor:
        """PIL pictures, or preprocessed images (B, 3, S, S) -> (B, D) of length 1."""
        if not torch.is_tensor(images):
            images = self.preprocess(images).to(self.layernorm.weight)
        return F.normalize(self(images), dim=-1)
