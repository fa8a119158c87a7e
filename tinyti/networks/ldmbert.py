"""The text transformer of the paper's own model, LDM text2img 1.45B: BERT's vocabulary, trained from
scratch with the diffusion model (Rombach et al., 2112.10752).  It is not causal and masks no padding."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attend, embedding


@dataclass
class LDMBertConfig:
    """The fields of bert/config.json that shape the network, named and defaulted as diffusers does."""

    vocab_size: int = 30522
    max_position_embeddings: int = 77
    encoder_layers: int = 32
    encoder_ffn_dim: int = 5120
    encoder_attention_heads: int = 8
    head_dim: int = 64
    d_model: int = 1280


class SelfAttention(nn.Module):
    """Self-attention; the heads together are narrower than D (8 × 64 in 1280): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LDMBertConfig):
        super().__init__()
        inner = config.encoder_attention_heads * config.head_dim
        self.heads = config.encoder_attention_heads
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class Layer(nn.Module):
    """One pre-norm transformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LDMBertConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class LDMBert(nn.Module):
    """The same two halves as CLIPText: ids -> embeds -> context."""

    def __init__(self, config: LDMBertConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embedding(config.vocab_size, config.d_model),
                "embed_positions": embedding(config.max_position_embeddings, config.d_model),
                "layers": nn.Sequential(*(Layer(config) for _ in range(config.encoder_layers))),
                "layer_norm": nn.LayerNorm(config.d_model),
            }
        )

    @property
    def table(self) -> Tensor:
        """The vocabulary's rows (V, D)."""
        return self.model["embed_tokens"].weight

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the word rows, without positions: ids (B, T) -> embeds (B, T, D).

        Ids outside the vocabulary belong to learned words; they get row 0, and `Concept.insert` replaces it.
        """
        return self.model["embed_tokens"](ids.where(ids < self.config.vocab_size, 0))

    def forward(self, embeds: Tensor) -> Tensor:
        """embeds (B, T, D), T at most 77 -> context (B, T, D)."""
        x = embeds + self.model["embed_positions"].weight[: embeds.shape[1]]
        return self.model["layer_norm"](self.model["layers"](x))
