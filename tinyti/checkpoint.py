"""Public weights, exactly as published, to networks: a diffusers folder, or a single CompVis file.

Every key must find its place and every place its key; only what is listed by name may be left over."""

import json
import re
import zipfile
from collections.abc import Mapping
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

# Pipelines and marks in a file's keys that belong to other families, and how people call these.
FOREIGN_PIPELINES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Inpaint": "an inpainting model",
}
FOREIGN_KEYS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
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
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
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
    VAE: ("loss.",),
    CLIPText: ("embeddings.position_ids", "text_projection", "logit_scale"),
    LDMBert: ("to_logits.",),
    CLIP: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
}


@dataclass
class Checkpoint:
    """What a model is made of, read but not yet built: part -> (configuration, weights)."""

    unet: tuple[UNetConfig, dict]
    vae: tuple[VAEConfig, dict]
    text: tuple[TextConfig | LDMBertConfig, dict]
    schedule: dict
    tokenizer: Path


NETWORKS = {UNetConfig: UNet, VAEConfig: VAE, TextConfig: CLIPText, LDMBertConfig: LDMBert, CLIPConfig: CLIP}


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
            raise ValueError(f"{kind.__name__}: the weights lack {key}, expected with shape {ours[key]}; {SUPPORTED}")
        if key not in ours:
            raise ValueError(f"{kind.__name__}: the weights hold {key}, which has no place in it; {SUPPORTED}")
        if tuple(weights[key].shape) != ours[key]:
            found = tuple(weights[key].shape)
            raise ValueError(f"{kind.__name__}: {key} has shape {found}, expected {ours[key]} by its configuration")
    for key in list(weights):  # one by one, so that never two copies of everything are in memory
        weights[key] = weights[key].to(device, dtype)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def read(path, tokenizer=None, prediction=None):
    """Read a model folder or a single file: -> Checkpoint.

    `tokenizer` is a folder with a vocabulary, in place of the one beside the weights; `prediction`, "epsilon"
    or "v_prediction", overrules the scheduler's configuration and is needed where there is none (SD2 files).
    FileNotFoundError where something is not there, ValueError where it is not what is supported.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no model at {path}; weights/README.md has the command that puts each public model in place, "
            "e.g. hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir weights/sd15"
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
            f"there is no vocabulary at {checkpoint.tokenizer}, and the weights of {path} carry none; put the "
            "model's tokenizer folder there, or name one with tokenizer= (--tokenizer)"
        )
    return checkpoint


def read_clip(path):
    """Read a folder like the published openai/clip-vit-base-patch32: -> CLIPConfig, weights, Preprocessing."""
    path = Path(path)
    raw = _json(path / "config.json")
    # Configurations from before transformers 4.27 say some things twice; the complete ones end in _dict.
    text = _config(TextConfig, raw.get("text_config_dict") or raw["text_config"], path / "config.json")
    vision = _config(VisionConfig, raw.get("vision_config_dict") or raw["vision_config"], path / "config.json")
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


# -- folders -----------------------------------------------------------------------------------------------------


def _read_folder(path):
    index = path / "model_index.json"
    pipeline = _json(index).get("_class_name", "") if index.exists() else ""
    for mark, name in FOREIGN_PIPELINES.items():
        if mark in pipeline:
            raise ValueError(f"{path} is {name} ({pipeline}); {SUPPORTED}")
    if (path / "text_encoder_2").exists() or (path / "transformer").exists():
        raise ValueError(f"{path} holds a text_encoder_2 or a transformer, so it is a later family; {SUPPORTED}")

    unet = _config(UNetConfig, _json(path / "unet" / "config.json"), path / "unet" / "config.json")
    _refuse_inpainting(unet.in_channels, path)
    vae_path = path / ("vae" if (path / "vae").exists() else "vqvae")
    vae = _config(VAEConfig, _json(vae_path / "config.json"), vae_path / "config.json")
    is_bert = not (path / "text_encoder").exists() and (path / "bert").exists()
    text_path = path / ("bert" if is_bert else "text_encoder")
    text = _config(LDMBertConfig if is_bert else TextConfig, _json(text_path / "config.json"), text_path / "config.json")

    names = "diffusion_pytorch_model"
    vae_weights = {_new_attention_names(k): w for k, w in _weights_in(vae_path, names).items()}
    # Files from transformers before 5 carry a prefix.
    text_weights = _weights_in(text_path, "model", "pytorch_model")
    text_weights = {k.removeprefix("text_model."): w for k, w in text_weights.items()}
    return Checkpoint(
        (unet, _weights_in(path / "unet", names)),
        (vae, vae_weights),
        (text, text_weights),
        _json(path / "scheduler" / "scheduler_config.json"),
        path / "tokenizer",
    )


def _new_attention_names(key):
    """VAE attention as diffusers called it before 0.17, and as it does now."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return key


def _refuse_inpainting(channels, path):
    if channels != 4:
        what = "an inpainting model" if channels == 9 else "a model of another kind"
        raise ValueError(f"{path} is {what}: its UNet takes {channels} channels, not 4; {SUPPORTED}")


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
            raise ValueError(f"{path}: {name} is {raw[name]!r}, expected {wanted!r}; {SUPPORTED}")
    config = kind(**{f.name: _tuple(raw[f.name]) for f in fields(kind) if raw.get(f.name) is not None})
    activation = getattr(config, "hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    return config


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _weights_in(folder, *stems):
    """The weights of one part; full precision before fp16, .safetensors before .bin."""
    for ending in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"):
        for stem in stems:
            if (folder / (stem + ending)).is_file():
                return _load(folder / (stem + ending))
    raise FileNotFoundError(f"no weights in {folder}: expected {stems[0]}.safetensors or .bin (weights/README.md)")


# -- files -------------------------------------------------------------------------------------------------------


def _load(path):
    """The tensors of a .safetensors, .bin or .ckpt file, mapped into memory; a pickle's code never runs."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off or damaged ({error}); download it again") from None
    try:
        stubs = [(type("Stub", (dict,), {}), name) for name in _lightning_globals(path)]
        with torch.serialization.safe_globals(stubs):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is cut off or no file of weights ({reason}); download it again") from None
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights and is not opened, for a pickle can run code "
            f"({str(error).splitlines()[0]}); use the .safetensors file of the same model"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    if not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no weights: expected a dictionary of tensors")
    return {k: w for k, w in state.items() if torch.is_tensor(w)}





def _lightning_globals(path):
    """Names of classes that a Lightning checkpoint mentions beside its weights: bookkeeping, replaced by stubs."""
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [name for name in names if name.startswith(("pytorch_lightning.", "lightning."))]


def _read_file(path, prediction):
    weights = _load(path)
    for mark, name in FOREIGN_KEYS.items():
        if any(key.startswith(mark) for key in weights):
            raise ValueError(f"{path} is {name}; {SUPPORTED}")

    def part(prefix, rename):
        found = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
        if not found:
            raise ValueError(f"{path} holds no {prefix}* keys, so it is no complete model; {SUPPORTED}")
        return rename(found)

    unet = part("model.diffusion_model.", _rename_unet)
    _refuse_inpainting(unet["conv_in.weight"].shape[1], path)
    vae = part("first_stage_model.", _rename_vae)
    if "cond_stage_model.model.ln_final.weight" in weights:
        text = part("cond_stage_model.model.", _rename_openclip)
        text_config = _text_config(text, "gelu")
        if prediction is None:
            raise ValueError(
                f"{path} is a Stable Diffusion 2 file, which does not say what its UNet predicts; name it with "
                "prediction= (--prediction): epsilon for the 512-pixel base models, v_prediction for the 768 ones"
            )
    elif "cond_stage_model.transformer.token_emb.weight" in weights:
        text = part("cond_stage_model.transformer.", _rename_ldmbert)
        text_config = _ldmbert_config(text)
    else:
        text = part("cond_stage_model.transformer.", lambda w: {k.removeprefix("text_model."): v for k, v in w.items()})
        text_config = _text_config(text, "quick_gelu")
    # What the original code of all three models does.
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "epsilon"}
    return Checkpoint(
        (_unet_config(unet), unet), (_vae_config(vae), vae), (text_config, text), schedule, path.parent / "tokenizer"
    )


def _rename(weights, rules):
    """Every key through every rule, a regular expression and what it becomes, in order."""
    renamed = {}
    for key, weight in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = weight
    return renamed


def _rename_unet(weights):
    # A stage of the original's flat list is `layers` resnets and a downsampler, or layers + 1 resnets.
    stage = min(int(k.split(".")[1]) for k in weights if ".op." in k)

    def down(m):
        i, j = divmod(int(m[1]) - 1, stage)
        return f"down_blocks.{i}.{'attentions' if m[2] == '1' else 'resnets'}.{j}."

    def up(m):
        i, j = divmod(int(m[1]), stage)
        return f"up_blocks.{i}.{'attentions' if m[2] == '1' else 'resnets'}.{j}."

    return _rename(
        weights,
        [
            (r"^time_embed\.0\.", "time_embedding.linear_1."),
            (r"^time_embed\.2\.", "time_embedding.linear_2."),
            (r"^out\.0\.", "conv_norm_out."),
            (r"^out\.2\.", "conv_out."),
            (r"^input_blocks\.0\.0\.", "conv_in."),
            (r"^input_blocks\.(\d+)\.0\.op\.", lambda m: f"down_blocks.{int(m[1]) // stage - 1}.downsamplers.0.conv."),
            (r"^input_blocks\.(\d+)\.([01])\.", down),
            (r"^middle_block\.1\.", "mid_block.attentions.0."),
            (r"^middle_block\.0\.", "mid_block.resnets.0."),
            (r"^middle_block\.2\.", "mid_block.resnets.1."),
            (r"^output_blocks\.(\d+)\.\d\.conv\.", lambda m: f"up_blocks.{int(m[1]) // stage}.upsamplers.0.conv."),
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
    last = max(int(k.split(".")[2]) for k in weights if k.startswith("decoder.up."))  # its list counts backwards
    renamed = _rename(
        weights,
        [
            (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
            (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
            (r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{last - int(m[1])}.upsamplers.0."),
            (r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{last - int(m[1])}.resnets."),
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
    return {k: w.flatten(1) if ".to_" in k and w.ndim == 4 else w for k, w in renamed.items()}


def _rename_openclip(weights):
    last = max(int(k.split(".")[2]) for k in weights if k.startswith("transformer.resblocks."))
    split = {}
    for key, weight in weights.items():
        if key.startswith(f"transformer.resblocks.{last}.") or key == "attn_mask":
            continue  # SD2 reads the layer before the last
        if ".attn.in_proj_" in key:
            for name, third in zip(("q_proj.", "k_proj.", "v_proj."), weight.chunk(3)):
                split[key.replace("in_proj_", name)] = third
        else:
            split[key] = weight
    return _rename(
        split,
        [
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
    def sublayer(names):  # even entries of the original's list are attention, odd ones feed-forward
        return lambda m: f"model.layers.{int(m[1]) // 2}.{names[int(m[1]) % 2]}."

    return _rename(
        weights,
        [
            (r"^token_emb\.", "model.embed_tokens."),
            (r"^pos_emb\.emb\.", "model.embed_positions."),
            (r"^norm\.", "model.layer_norm."),
            (r"^attn_layers\.layers\.(\d+)\.0\.", sublayer(("self_attn_layer_norm", "final_layer_norm"))),
            (r"^attn_layers\.layers\.(\d+)\.1\.(?=to_)", sublayer(("self_attn", "self_attn"))),
            (r"^attn_layers\.layers\.(\d+)\.1\.net\.0\.0\.", sublayer(("fc1", "fc1"))),
            (r"^attn_layers\.layers\.(\d+)\.1\.net\.2\.", sublayer(("fc2", "fc2"))),
            (r"\.to_([qkv]|out)\.", r".\1_proj."),
        ],
    )


# -- configurations read off the shapes, for a single file has none ------------------------------------------------


def _count(weights, pattern):
    """How many different numbers stand where the pattern's group is."""
    return len({m[1] for m in (re.match(pattern, k) for k in weights) if m})


def _unet_config(weights):
    blocks = range(_count(weights, r"down_blocks\.(\d+)"))
    widths = tuple(weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in blocks)
    attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in weights for i in blocks]
    linear = weights["mid_block.attentions.0.proj_in.weight"].ndim == 2
    return UNetConfig(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        block_out_channels=widths,
        layers_per_block=_count(weights, r"down_blocks\.0\.resnets\.(\d+)"),
        cross_attention_dim=weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        attention_head_dim=tuple(c // 64 for c in widths) if linear else 8,  # SD2; SD1 and LDM
        use_linear_projection=linear,
    )


def _vae_config(weights):
    blocks = range(_count(weights, r"encoder\.down_blocks\.(\d+)"))
    return VAEConfig(
        block_out_channels=tuple(weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in blocks),
        layers_per_block=_count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)"),
        latent_channels=weights["post_quant_conv.weight"].shape[0],
    )


def _text_config(weights, activation):
    vocab_size, width = weights["embeddings.token_embedding.weight"].shape
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(weights, r"encoder\.layers\.(\d+)"),
        num_attention_heads=width // 64,
        max_position_embeddings=weights["embeddings.position_embedding.weight"].shape[0],
        hidden_act=activation,
    )


def _ldmbert_config(weights):
    vocab_size, width = weights["model.embed_tokens.weight"].shape
    return LDMBertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=weights["model.embed_positions.weight"].shape[0],
        encoder_layers=_count(weights, r"model\.layers\.(\d+)"),
        encoder_ffn_dim=weights["model.layers.0.fc1.weight"].shape[0],
        head_dim=weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // 8,
        d_model=width,
    )
