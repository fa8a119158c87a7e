"""The text transformer of CLIP (Radford et al., 2103.00020), which reads Stable Diffusion's prompts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attend, check_heads, embedding

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


class SelfAttention(nn.Module):
    """Self-attention of x (B, T, D), causal (the text tower) or not (the image tower)."""

    def __init__(self, dim: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = check_heads(heads, dim), causal
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

    def __init__(self, dim: int, inner: int, heads: int, activation: str, eps: float, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim, eps)
        self.self_attn = SelfAttention(dim, heads, causal)
        self.layer_norm2 = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, inner, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def transformer(config, causal: bool) -> nn.ModuleDict:
    """The layers of a tower, by a TextConfig or VisionConfig; named encoder.layers.i as in transformers."""
    dim, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    numbers = dim, inner, heads, config.hidden_act, config.layer_norm_eps
    layers = [Layer(*numbers, causal) for _ in range(config.num_hidden_layers)]
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
        """Look up the word rows, without positions: ids (B, T) -> embeds (B, T, D).

        Ids outside the vocabulary belong to learned words; they get row 0, and `Concept.insert` replaces it.
        """
        return self.embeddings["token_embedding"](ids.where(ids < self.config.vocab_size, 0))

    def forward(self, embeds: Tensor) -> Tensor:
        """embeds (B, T, D), T at most 77 -> context (B, T, D)."""
        x = embeds + self.embeddings["position_embedding"].weight[: embeds.shape[1]]
        return self.final_layer_norm(self.encoder["layers"](x))
