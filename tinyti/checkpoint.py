"""Public weights, exactly as published, to networks: a diffusers folder, or a single CompVis file.

Every key must find its place and every place its key; only what is listed by name may be left over."""

import json
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .clip import ACTIVATIONS, CLIP, CLIPConfig, CLIPText, Preprocessing, TextConfig, VisionConfig
from .ldmbert import LDMBert, LDMBertConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

SUPPORTED = "supported are Stable Diffusion 1.x, 2.0 and 2.1, the LDM text2img model, and weights/tiny"
DOWNLOAD = (
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir weights/sd15 "
    '--include "*.json" --include "*.txt" --include "[tuv]*/*model.safetensors"'
)
NETWORKS = {UNetConfig: UNet, VAEConfig: VAE, TextConfig: CLIPText, LDMBertConfig: LDMBert, CLIPConfig: CLIP}

# Pipelines and beginnings of keys that belong to other families, and how people call these.
FOREIGN_PIPELINES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Inpaint": "an inpainting model",
}
FOREIGN_KEYS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
}

# Settings that our networks do not have, with the one value that changes nothing.
FIXED = {
    UNetConfig: {
        "act_fn": "silu",
        "addition_embed_type": None,
        "attention_type": "default",
        "center_input_sample": False,
        "class_embed_type": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
    },
    VAEConfig: {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    TextConfig: {"model_type": ("clip_text_model", "clip")},
    VisionConfig: {"model_type": ("clip_vision_model", "clip")},
    LDMBertConfig: {"activation_function": "gelu"},
}

# Published beside the weights, but no weights of ours: buffers, projections and heads that nothing here uses.
LEFT_OUT = {
    UNet: (),
    VAE: (),
    CLIPText: ("embeddings.position_ids", "text_projection", "logit_scale", "attn_mask"),
    LDMBert: ("to_logits.",),
    CLIP: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
}

# Packages whose objects training leaves in a .ckpt file beside the weights; empty stubs take their places.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "numpy.")

# What the readers raise for files that are cut off, damaged, or hold something else.
UNREADABLE = (SafetensorError, UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError)
UNREADABLE += (LookupError, TypeError, AssertionError, AttributeError)


@dataclass
class Checkpoint:
    """What a model is made of, read but not yet built: each part's configuration and weights."""

    unet: tuple[UNetConfig, dict]
    vae: tuple[VAEConfig, dict]
    text: tuple[TextConfig | LDMBertConfig, dict]
    schedule: dict
    tokenizer: Path


def build(config, weights, device="cpu", dtype=torch.float32, **extra):
    """The frozen network of a configuration with exactly these weights.

    ValueError names the first key that is missing, left over or of another shape.
    """
    kind = NETWORKS[type(config)]
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        network = kind(config, **extra)
    weights = {k: w for k, w in weights.items() if not k.startswith(LEFT_OUT[kind])}
    ours = {k: tuple(w.shape) for k, w in network.state_dict().items()}
    for key in sorted(ours.keys() | weights.keys()):
        if key not in weights:
            raise _unsupported(f"{kind.__name__}: the weights lack {key}, expected with shape {ours[key]}")
        if key not in ours:
            raise _unsupported(f"{kind.__name__}: the weights hold {key}, which has no place in it")
        found = tuple(weights[key].shape)
        if found != ours[key]:
            raise _unsupported(f"{kind.__name__}: {key} has shape {found}, expected is {ours[key]}")
    # Weights that need no conversion stay in their file, mapped into memory, and are read where used.
    weights = {k: w.to(device, dtype) for k, w in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _unsupported(found):
    return ValueError(f"{found}; {SUPPORTED}")


def read(path, tokenizer=None, prediction=None):
    """Read a model folder or a single file: -> Checkpoint.

    `tokenizer` is a folder with a vocabulary, in place of the one beside the weights; `prediction`, "epsilon"
    or "v_prediction", overrules the scheduler's configuration and is needed where there is none (SD2 files).
    FileNotFoundError where something is not there, ValueError where it is not what is supported.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no model at {path}; weights/README.md has the command that puts each public model in "
            f"place, and this one brings Stable Diffusion 1.5: {DOWNLOAD}"
        )
    if prediction not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction is {prediction!r}; it is epsilon, v_prediction or nothing")
    checkpoint = _read_folder(path) if path.is_dir() else _read_file(path, prediction)
    if prediction:
        checkpoint.schedule["prediction_type"] = prediction
    if tokenizer:
        checkpoint.tokenizer = Path(tokenizer)
    if not checkpoint.tokenizer.is_dir():
        raise FileNotFoundError(
            f"there is no vocabulary at {checkpoint.tokenizer}, and the weights of {path} carry none; put "
            "the model's tokenizer folder there, or name one with tokenizer= (--tokenizer)"
        )
    return checkpoint


def read_clip(path):
    """Read a folder like openai/clip-vit-base-patch32 as published: -> CLIPConfig, weights, Preprocessing."""
    path = Path(path)
    file = path / "config.json"
    raw = _json(file)
    if "text_config" not in raw or "vision_config" not in raw:
        raise ValueError(f"{file} lacks text_config or vision_config; expected a CLIP with both towers")
    # Configurations from before transformers 4.27 say some things twice; the complete ones end in _dict.
    text = _config(TextConfig, raw.get("text_config_dict") or raw["text_config"], file)
    vision = _config(VisionConfig, raw.get("vision_config_dict") or raw["vision_config"], file)
    weights = _weights_in(path, "model", "pytorch_model")
    return CLIPConfig(text, vision, raw.get("projection_dim", 512)), weights, _preprocessing(path)


def _preprocessing(path):
    raw = _json(path / "preprocessor_config.json")
    size, crop = raw["size"], raw["crop_size"]
    return Preprocessing(
        resize=size["shortest_edge"] if isinstance(size, dict) else size,
        crop=crop["height"] if isinstance(crop, dict) else crop,
        mean=tuple(raw["image_mean"]),
        std=tuple(raw["image_std"]),
        resample=raw.get("resample", Preprocessing.resample),
    )


# -- folders -------------------------------------------------------------------------------------------------


def _read_folder(path):
    index = path / "model_index.json"
    pipeline = _json(index).get("_class_name", "") if index.exists() else ""
    for mark, name in FOREIGN_PIPELINES.items():
        if mark in pipeline:
            raise _unsupported(f"{path} is {name} ({pipeline})")
    for later in ("text_encoder_2", "transformer"):
        if (path / later).exists():
            raise _unsupported(f"{path} holds a {later}, so it is a model of a later family")

    bert = not (path / "text_encoder").exists() and (path / "bert").exists()
    text_path = path / ("bert" if bert else "text_encoder")
    vae_path = path / ("vae" if (path / "vae").exists() else "vqvae")
    unet, vae, text = (
        _config(kind, _json(folder / "config.json"), folder / "config.json")
        for kind, folder in (
            (UNetConfig, path / "unet"),
            (VAEConfig, vae_path),
            (LDMBertConfig if bert else TextConfig, text_path),
        )
    )
    _refuse_inpainting(unet.in_channels, path)
    return Checkpoint(
        (unet, _weights_in(path / "unet", "diffusion_pytorch_model")),
        (vae, _rename_old_vae(_weights_in(vae_path, "diffusion_pytorch_model"))),
        (text, _rename_clip(_weights_in(text_path, "model", "pytorch_model"))),
        _json(path / "scheduler" / "scheduler_config.json"),
        path / "tokenizer",
    )


def _refuse_inpainting(channels, path):
    if channels != 4:
        what = "an inpainting model" if channels == 9 else "a model of another kind"
        raise _unsupported(f"{path} is {what}: its UNet takes {channels} channels, not 4")


def _json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the whole model folder (weights/README.md)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); download it again") from None


def _config(kind, raw, path):
    """The fields that `kind` has; ValueError where another setting would change the numbers."""
    for name, wanted in FIXED[kind].items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if raw.get(name, allowed[0]) not in allowed:
            raise _unsupported(f"{path}: {name} is {raw[name]!r}, expected {wanted!r}")
    config = kind(**{f.name: _tuple(raw[f.name]) for f in fields(kind) if raw.get(f.name) is not None})
    activation = getattr(config, "hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return config


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _weights_in(folder, *stems):
    """The weights of one part; full precision before fp16, then .safetensors before .bin."""
    for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for stem in stems:
            if (folder / (stem + ending)).is_file():
                return _load(folder / (stem + ending))
    raise FileNotFoundError(f"{folder} has no weights: {stems[0]}.safetensors or .bin (weights/README.md)")


# -- files ---------------------------------------------------------------------------------------------------


def _load(path):
    """The tensors of a .safetensors, .bin or .ckpt file, mapped into memory; a pickle's code never runs."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except UNREADABLE as error:
        beside = re.search(r"GLOBAL (\S+)", str(error))
        if beside:
            raise ValueError(
                f"{path} holds {beside[1]} beside weights and is not opened, for a pickle can run code; take "
                "the .safetensors file of the same model"
            ) from None
        raise ValueError(f"{path} is cut off, damaged or no file of weights; download it again") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not any(torch.is_tensor(w) for w in state.values()):
        raise ValueError(f"{path} holds no weights: expected a dictionary of tensors")
    return {str(k): w for k, w in state.items() if torch.is_tensor(w)}


def _unpickle(path):
    zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    with torch.serialization.safe_globals([_stub(name) for name in names if name.startswith(BOOKKEEPING)]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


class _Stub:
    """Stands for any object of a checkpoint's bookkeeping, and keeps nothing of it."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _stub(name):
    """A stub under a full name, which is how torch.load knows what it stands for."""
    module, _, kind = name.rpartition(".")
    return type(kind, (_Stub,), {"__module__": module})


def _read_file(path, prediction):
    unet, vae, text = _split(_load(path), path)
    unet, vae = _rename_unet(unet), _rename_vae(vae)
    _refuse_inpainting(unet["conv_in.weight"].shape[1], path)
    if "model.ln_final.weight" in text:
        if prediction is None:
            raise ValueError(
                f"{path} is a Stable Diffusion 2 file, which does not say what its UNet predicts; say it "
                "with prediction= (--prediction): epsilon for the 512-pixel base models, v_prediction for 768"
            )
        text, size = _rename_openclip(text), 96 if prediction == "v_prediction" else 64
        text_config = _text_config(text, "gelu")
    elif "transformer.token_emb.weight" in text:
        text, size = _rename_ldmbert(text), 32
        text_config = _ldmbert_config(text)
    else:
        text, size = _rename_clip(text), 64
        text_config = _text_config(text, "quick_gelu")
    # What the original code of all three models does.
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "epsilon"}
    unet_config = _unet_config(unet, size)
    vae_config = VAEConfig(block_out_channels=_widths(vae, "encoder.down_blocks"))
    tokenizer = path.parent / "tokenizer"
    return Checkpoint((unet_config, unet), (vae_config, vae), (text_config, text), schedule, tokenizer)


def _split(weights, path):
    """The weights of UNet, VAE and text transformer, each without its prefix."""
    for mark, name in FOREIGN_KEYS.items():
        if any(key.startswith(mark) for key in weights):
            raise _unsupported(f"{path} is {name}")
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    for prefix in prefixes:
        if not any(key.startswith(prefix) for key in weights):
            raise _unsupported(f"{path} holds no {prefix}* keys, so it is no complete model")
    for key in weights:
        # A name without a dot is a buffer of the schedule; model_ema is the UNet once more, averaged.
        if "." in key and not key.startswith((*prefixes, "model_ema.")):
            raise _unsupported(f"{path} holds {key}, which has no place in a latent diffusion model")
    return ({k.removeprefix(p): w for k, w in weights.items() if k.startswith(p)} for p in prefixes)


# -- the names that other layouts use ------------------------------------------------------------------------


class _Weights(dict):
    """Weights by name; an error names one that is looked for and not there."""

    def __missing__(self, key):
        raise _unsupported(f"the weights lack {key}")


def _rename(weights, rules):
    """Every key through every rule, a regular expression and what it becomes, in order."""
    renamed = _Weights()
    for key, weight in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = weight
    return renamed


def _rename_old_vae(weights):
    # The names in folders that diffusers wrote before 0.17.
    return _rename(
        weights,
        [
            (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
            (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
            (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
            (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
        ],
    )


def _rename_unet(weights):
    # Each resolution takes three places in a flat list: two resnets and a downsampler, or three resnets.
    def down(m):
        i, j = divmod(int(m[1]) - 1, 3)
        return f"down_blocks.{i}.{'attentions' if m[2] == '1' else 'resnets'}.{j}."

    def up(m):
        i, j = divmod(int(m[1]), 3)
        return f"up_blocks.{i}.{'attentions' if m[2] == '1' else 'resnets'}.{j}."

    def downsampler(m):
        return f"down_blocks.{int(m[1]) // 3 - 1}.downsamplers.0.conv."

    def upsampler(m):
        return f"up_blocks.{int(m[1]) // 3}.upsamplers.0.conv."

    return _rename(
        weights,
        [
            (r"^time_embed\.0\.", "time_embedding.linear_1."),
            (r"^time_embed\.2\.", "time_embedding.linear_2."),
            (r"^out\.0\.", "conv_norm_out."),
            (r"^out\.2\.", "conv_out."),
            (r"^input_blocks\.0\.0\.", "conv_in."),
            (r"^input_blocks\.(\d+)\.0\.op\.", downsampler),
            (r"^input_blocks\.(\d+)\.([01])\.", down),
            (r"^middle_block\.0\.", "mid_block.resnets.0."),
            (r"^middle_block\.1\.", "mid_block.attentions.0."),
            (r"^middle_block\.2\.", "mid_block.resnets.1."),
            (r"^output_blocks\.(\d+)\.[12]\.conv\.", upsampler),
            (r"^output_blocks\.(\d+)\.([01])\.", up),
            (r"\.in_layers\.0\.", ".norm1."),
            (r"\.in_layers\.2\.", ".conv1."),
            (r"\.emb_layers\.1\.", ".time_emb_proj."),
            (r"\.out_layers\.0\.", ".norm2."),
            (r"\.out_layers\.3\.", ".conv2."),
            (r"\.skip_connection\.", ".conv_shortcut."),
        ],
    )


def _rename_vae(weights):
    last = _count(weights, r"decoder\.up\.(\d+)\.") - 1  # the decoder's list counts backwards

    def up(m):
        return f".up_blocks.{last - int(m[1])}.{'upsamplers.0' if m[2] == 'upsample' else 'resnets'}."

    renamed = _rename(
        weights,
        [
            (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
            (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
            (r"\.up\.(\d+)\.(upsample|block)\.", up),
            (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
            (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
            (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
            (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
            (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
            (r"\.norm_out\.", ".conv_norm_out."),
            (r"\.nin_shortcut\.", ".conv_shortcut."),
        ],
    )
    # Attention by 1×1 convolutions becomes attention by matrices.
    return _Weights({k: w.flatten(1) if ".to_" in k and w.ndim == 4 else w for k, w in renamed.items()})


def _rename_clip(weights):
    # transformers before 5, and single files, have the one prefix; single files the other one too.
    return _rename(weights, [(r"^transformer\.", ""), (r"^text_model\.", "")])


def _rename_openclip(weights):
    split = {}
    for key, weight in weights.items():
        if key.startswith("model.transformer.resblocks.23."):
            continue  # OpenCLIP's last layer: Stable Diffusion 2 reads the one before it
        if ".attn.in_proj_" in key:
            for name, third in zip(("q_proj.", "k_proj.", "v_proj."), weight.chunk(3)):
                split[key.replace("in_proj_", name)] = third
        else:
            split[key] = weight
    return _rename(
        split,
        [
            (r"^model\.", ""),
            (r"^positional_embedding$", "embeddings.position_embedding.weight"),
            (r"^token_embedding\.", "embeddings.token_embedding."),
            (r"^ln_final\.", "final_layer_norm."),
            (r"^transformer\.resblocks\.", "encoder.layers."),
            (r"\.ln_([12])\.", r".layer_norm\1."),
            (r"\.attn\.", ".self_attn."),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
        ],
    )


def _rename_ldmbert(weights):
    def norm(m):  # of attention and of feed-forward, which alternate in a flat list
        return f"{m[1]}{m[2]}.{'final_layer_norm' if int(m[2]) % 2 else 'self_attn_layer_norm'}."

    return _rename(
        weights,
        [
            (r"^transformer\.", "model."),
            (r"^model\.to_logits\.", "to_logits."),
            (r"^model\.token_emb\.", "model.embed_tokens."),
            (r"^model\.pos_emb\.emb\.", "model.embed_positions."),
            (r"^model\.norm\.", "model.layer_norm."),
            (r"^(model\.attn_layers\.layers\.)(\d+)\.0\.", norm),
            (r"\.1\.to_([qkv]|out)\.", r".self_attn.\1_proj."),
            (r"\.1\.net\.0\.0\.", ".fc1."),
            (r"\.1\.net\.2\.", ".fc2."),
            (r"\.attn_layers\.layers\.(\d+)\.", lambda m: f".layers.{int(m[1]) // 2}."),
        ],
    )


# -- configurations read off the shapes, for a single file has none ------------------------------------------


def _count(weights, pattern):
    """How many different numbers stand where the pattern's group is."""
    return len({m[1] for m in (re.match(pattern, k) for k in weights) if m})


def _widths(weights, blocks):
    """Channels at each resolution."""
    count = _count(weights, re.escape(blocks) + r"\.(\d+)\.")
    return tuple(weights[f"{blocks}.{i}.resnets.0.conv1.weight"].shape[0] for i in range(count))


def _unet_config(weights, sample_size):
    widths = _widths(weights, "down_blocks")
    attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in weights for i in range(len(widths))]
    linear = weights["mid_block.attentions.0.proj_in.weight"].ndim == 2  # Stable Diffusion 2
    return UNetConfig(
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        block_out_channels=widths,
        cross_attention_dim=weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        attention_head_dim=tuple(c // 64 for c in widths) if linear else 8,
        use_linear_projection=linear,
        sample_size=sample_size,
    )


def _text_config(weights, activation):
    vocab_size, width = weights["embeddings.token_embedding.weight"].shape
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(weights, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // 64,
        max_position_embeddings=weights["embeddings.position_embedding.weight"].shape[0],
        hidden_act=activation,
    )


def _ldmbert_config(weights):
    vocab_size, width = weights["model.embed_tokens.weight"].shape
    return LDMBertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=weights["model.embed_positions.weight"].shape[0],
        encoder_layers=_count(weights, r"model\.layers\.(\d+)\."),
        encoder_ffn_dim=weights["model.layers.0.fc1.weight"].shape[0],
        head_dim=weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // 8,
        d_model=width,
    )
