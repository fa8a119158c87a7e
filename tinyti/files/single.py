"""Read single files in the layout of the original code (CompVis, Stability AI), and rename their weights.

A file has no configuration: the shapes give the sizes, and names the kind of text transformer."""

import re
from pathlib import Path

from torch import Tensor

from ..networks.clip import TextConfig
from ..networks.ldmbert import LDMBertConfig
from ..networks.unet import UNetConfig
from ..networks.vae import VAEConfig
from .folder import Checkpoint, Part, Rules, rename
from .tensors import explain_errors, read_tensors

PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")  # UNet, VAE, text
# The noise schedule in the original code of all three models.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


def read_single_file(path: Path, prediction: str | None = None) -> Checkpoint:
    """Read a single file; its vocabulary is the folder `tokenizer` beside it.

    `prediction` says what the UNet of a Stable Diffusion 2 file predicts, because the file does not.
    ValueError if the file is damaged, of another family, or Stable Diffusion 2 without `prediction`.
    """
    weights = read_tensors(path)
    with explain_errors(path, "latent diffusion model"):
        unet, vae, text = split_parts(weights)
        unet, vae = rename(unet, UNET_RULES), rename_vae(vae)
        # Only Stable Diffusion 2 projects linearly; the others use 1 × 1 convolutions.
        sd2 = unet["mid_block.attentions.0.proj_in.weight"].ndim == 2
        text, text_config = read_text_transformer(text, sd2)
        size = 64  # the side of the latents in training
        if isinstance(text_config, LDMBertConfig):
            size = 32
        elif sd2 and prediction == "v_prediction":
            size = 96
        vae_config = VAEConfig(block_out_channels=block_widths(vae, "encoder.down_blocks"))
        parts = (unet_config(unet, sd2, size), unet), (vae_config, vae), (text_config, text)
        parts = (Part(config, weights, path) for config, weights in parts)
        model = Checkpoint(*parts, dict(SCHEDULER), path, path.parent / "tokenizer")
    if sd2 and prediction is None:
        hint = "epsilon for the 512-pixel base models, v_prediction for 768"
        raise ValueError(
            f"{path} is a Stable Diffusion 2 file, which does not say what its UNet predicts; "
            f"give prediction= (--prediction): {hint}"
        )
    return model


def split_parts(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split the weights into those of UNet, VAE and text transformer, without their prefixes."""
    parts = []
    for prefix in PREFIXES:
        part = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
        if not part:
            hint = "it is a part of a model, or, like Stable Diffusion XL, 3 and Flux, of another family"
            raise ValueError(f"it has no {prefix}* keys; {hint}")
        parts.append(part)
    # Names without a dot are the schedule's buffers; model_ema is a running average of the UNet.
    for key in weights:
        if "." in key and not key.startswith((*PREFIXES, "model_ema.")):
            raise ValueError(f"for {key!r:.200} it has a weight, expected nothing")
    return parts


# -- names ---------------------------------------------------------------------------------------------------


def layer_name(place: int, kind: str) -> str:
    """Name a UNet's layer from its place in a flat list: a resolution has three, the last may downsample."""
    return f"{place // 3}.{'attentions' if kind == '1' else 'resnets'}.{place % 3}"


UNET_RULES: Rules = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.0\.op\.", lambda m: f"down_blocks.{int(m[1]) // 3 - 1}.downsamplers.0.conv."),
    (r"^input_blocks\.(\d+)\.([01])\.", lambda m: f"down_blocks.{layer_name(int(m[1]) - 1, m[2])}."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.([02])\.", lambda m: f"mid_block.resnets.{int(m[1]) // 2}."),
    (r"^output_blocks\.(\d+)\.[12]\.conv\.", lambda m: f"up_blocks.{int(m[1]) // 3}.upsamplers.0.conv."),
    (r"^output_blocks\.(\d+)\.([01])\.", lambda m: f"up_blocks.{layer_name(int(m[1]), m[2])}."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]
VAE_RULES: Rules = [
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]
CLIP_RULES: Rules = [(r"^transformer\.", ""), (r"^text_model\.", "")]  # one prefix or both
OPENCLIP_RULES: Rules = [
    (r"^model\.", ""),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
# Attention (even) and feed-forward (odd) alternate in a flat list, each after its norm.
LDMBERT_RULES: Rules = [
    (r"^transformer\.", "model."),
    (r"^model\.to_logits\.", "to_logits."),
    (r"^model\.token_emb\.", "model.embed_tokens."),
    (r"^model\.pos_emb\.emb\.", "model.embed_positions."),
    (r"^model\.norm\.", "model.layer_norm."),
    (r"\.layers\.(\d*[02468])\.0\.", r".layers.\1.self_attn_layer_norm."),
    (r"\.layers\.(\d*[13579])\.0\.", r".layers.\1.final_layer_norm."),
    (r"\.1\.to_([qkv]|out)\.", r".self_attn.\1_proj."),
    (r"\.1\.net\.0\.0\.", ".fc1."),
    (r"\.1\.net\.2\.", ".fc2."),
    (r"\.attn_layers\.layers\.(\d+)\.", lambda m: f".layers.{int(m[1]) // 2}."),
]


def rename_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the VAE's weights: its decoder counts resolutions backwards, its attention uses convolutions."""
    last = count_numbers(weights, r"decoder\.up\.(\d+)\.") - 1
    weights = {re.sub(r"\.up\.(\d+)", lambda m: f".up.{last - int(m[1])}", k): w for k, w in weights.items()}
    renamed = rename(weights, VAE_RULES).items()
    return {key: w.flatten(1) if ".to_" in key and w.ndim == 4 else w for key, w in renamed}


def read_text_transformer(weights: dict[str, Tensor], sd2: bool) -> tuple[dict, TextConfig | LDMBertConfig]:
    """Rename and configure the text transformer: the paper's or OpenCLIP's by its names, else CLIP's.

    A single file converted from a Stable Diffusion 2 folder may have CLIP's names for OpenCLIP's weights.
    ValueError if the text transformer belongs to another family than the UNet.
    """
    if "transformer.token_emb.weight" in weights and not sd2:
        weights = rename(weights, LDMBERT_RULES)
        return weights, ldmbert_config(weights)
    openclip = "model.ln_final.weight" in weights
    weights = rename(split_openclip(weights), OPENCLIP_RULES) if openclip else rename(weights, CLIP_RULES)
    config = text_config(weights, "gelu" if sd2 else "quick_gelu")
    # Stable Diffusion 1 has CLIP's transformer, 768 wide; 2 has OpenCLIP's, 1024 wide; miniatures differ.
    of_the_other = 768 if sd2 else 1024
    if config.hidden_size == of_the_other or (openclip and not sd2):
        raise ValueError(f"its text transformer (width {config.hidden_size}) is not the one of its UNet")
    return weights, config


def split_openclip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split OpenCLIP's q, k and v, and drop its last layer: Stable Diffusion 2 reads the one before it."""
    parts = {}
    for key, weight in weights.items():
        if ".attn.in_proj_" in key:
            parts |= zip((key.replace("in_proj_", f"{name}_proj.") for name in "qkv"), weight.chunk(3))
        else:
            parts[key] = weight
    return {key: w for key, w in parts.items() if not key.startswith("model.transformer.resblocks.23.")}


# -- configurations ------------------------------------------------------------------------------------------


def count_numbers(weights: dict[str, Tensor], pattern: str) -> int:
    """Count the different numbers that the pattern's group matches."""
    return len({m[1] for m in (re.match(pattern, k) for k in weights) if m})


def block_widths(weights: dict[str, Tensor], blocks: str) -> tuple[int, ...]:
    """Channels at each resolution."""
    resolutions = range(count_numbers(weights, re.escape(blocks) + r"\.(\d+)\."))
    return tuple(weights[f"{blocks}.{i}.resnets.0.conv1.weight"].shape[0] for i in resolutions)


def unet_config(weights: dict[str, Tensor], sd2: bool, sample_size: int) -> UNetConfig:
    """Read a UNet's configuration off its shapes; 8 heads, or heads of 64 channels in Stable Diffusion 2."""
    channels = block_widths(weights, "down_blocks")
    attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in weights for i in range(len(channels))]
    return UNetConfig(
        in_channels=weights["conv_in.weight"].shape[1],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        block_out_channels=channels,
        cross_attention_dim=weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        attention_head_dim=tuple(c // 64 for c in channels) if sd2 else 8,
        use_linear_projection=sd2,
        sample_size=sample_size,
    )


def text_config(weights: dict[str, Tensor], activation: str) -> TextConfig:
    """Read a CLIP text transformer's configuration off its shapes; heads have 64 channels each."""
    vocab_size, width = weights["embeddings.token_embedding.weight"].shape
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count_numbers(weights, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // 64,
        hidden_act=activation,
    )


def ldmbert_config(weights: dict[str, Tensor]) -> LDMBertConfig:
    """Read the configuration of the paper's text transformer off its shapes; it has 8 heads."""
    vocab_size, width = weights["model.embed_tokens.weight"].shape
    return LDMBertConfig(
        vocab_size=vocab_size,
        encoder_layers=count_numbers(weights, r"model\.layers\.(\d+)\."),
        encoder_ffn_dim=weights["model.layers.0.fc1.weight"].shape[0],
        head_dim=weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // 8,
        d_model=width,
    )
