"""Model folders exactly as published, and the strict build of every network.

Every key must find its place and every place its key; only what is listed by name may be left over."""

import inspect
import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn

from ..diffusion import CHOICES, Schedule
from ..networks.clip import ACTIVATIONS, CLIPText, TextConfig
from ..networks.ldmbert import LDMBert, LDMBertConfig
from ..networks.unet import UNet, UNetConfig
from ..networks.vae import VAE, VAEConfig
from ..networks.vision import CLIP, CLIPConfig, Preprocessing, VisionConfig
from .tensors import explain_errors, read_tensors

DOWNLOAD = (
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir weights/sd15 "
    '--include "*.json" --include "*.txt" --include "[tuv]*/*model.safetensors"'
)
NETWORKS = {UNetConfig: UNet, VAEConfig: VAE, TextConfig: CLIPText, LDMBertConfig: LDMBert, CLIPConfig: CLIP}

# Settings that change the numbers but no name or shape of a weight, and their values in our networks.
FIXED = {
    UNetConfig: {
        "act_fn": ("silu",), "center_input_sample": (False,), "class_embed_type": (None,),
        "downsample_padding": (1,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "mid_block_only_cross_attention": (None,), "mid_block_scale_factor": (1,),
        "num_attention_heads": (None,), "only_cross_attention": (False,), "out_channels": (4,),
        "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,),
        "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    },
    VAEConfig: {
        "act_fn": ("silu",), "in_channels": (3,), "latent_channels": (4,), "latents_mean": (None,),
        "latents_std": (None,), "out_channels": (3,), "shift_factor": (None,),
    },
    TextConfig: {"hidden_act": tuple(ACTIVATIONS)},
    VisionConfig: {"hidden_act": tuple(ACTIVATIONS)},
    LDMBertConfig: {"activation_function": ("gelu",)},
    Schedule: {
        **CHOICES, "clip_sample": (False,), "rescale_betas_zero_snr": (False,), "thresholding": (False,),
        "trained_betas": (None,),
    },
}  # fmt: skip

# Published beside the weights, but no weights of ours: buffers, projections and heads that nothing here uses.
LEFT_OUT = {
    CLIPText: ("embeddings.position_ids", "text_projection", "logit_scale", "attn_mask"),
    LDMBert: ("to_logits.",),
    CLIP: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
}

# A regular expression and what it becomes.
Rules = list[tuple[str, str | Callable[[re.Match], str]]]

# The names in folders that transformers wrote before 5, and diffusers before 0.17.
OLD_NAMES: Rules = [
    (r"^text_model\.", ""),
    (r"\.attentions\.0\.(query|key|value)\.", lambda m: f".attentions.0.to_{m[1][0]}."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]


class Part(NamedTuple):
    """One network of a model, not yet built."""

    config: Any
    weights: dict[str, Tensor]
    path: Path  # where both are from


@dataclass
class Checkpoint:
    """What a model is made of, read but not yet built; ValueError if its UNet takes more than latents."""

    unet: Part
    vae: Part
    text: Part
    scheduler: dict  # the contents of scheduler_config.json
    scheduler_path: Path  # where it is from
    tokenizer: Path  # the folder of the vocabulary

    def __post_init__(self):
        channels = self.unet.config.in_channels
        if channels != 4:
            what = "an inpainting model" if channels == 9 else "a model of another kind"
            raise ValueError(f"it is {what}: its UNet takes {channels} channels")


def build(config, weights: dict[str, Tensor], path: str | Path = "configuration",
          device: str = "cpu", dtype: torch.dtype = torch.float32, **extra) -> nn.Module:  # fmt: skip
    """The frozen network of a configuration with exactly these weights, which are from `path`.

    ValueError names the first key that is missing, left over, of another shape or no floating-point tensor,
    and says what is wrong with a configuration that no network has.
    """
    kind = NETWORKS[type(config)]
    with explain_errors(path, kind.__name__):
        # On meta: no memory and no random numbers for weights that are replaced at once.
        with torch.device("meta"):
            network = kind(config, **extra)
        ours = network.state_dict()
        weights = {k: w for k, w in weights.items() if not k.startswith(LEFT_OUT.get(kind, ()))}
        for key in sorted(ours.keys() | weights.keys()):
            expected, found = (_format(tensors.get(key)) for tensors in (ours, weights))
            if found != expected:
                raise ValueError(f"for {key!r:.200} it has {found}, expected is {expected}")
    # Weights that need no conversion stay in their file, mapped into memory, and are read where used.
    weights = {k: w.to(device, dtype) for k, w in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _format(weight: Tensor | None) -> str:
    """What a network and its file must agree on."""
    if weight is None:
        return "nothing"
    return f"{'floats' if weight.is_floating_point() else weight.dtype} of shape {tuple(weight.shape)}"


def rename(weights: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Every key through every rule, in order; ValueError where two become the same."""
    renamed = {}
    for key, weight in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if key in renamed:
            raise ValueError(f"it has {key} twice")
        renamed[key] = weight
    return renamed


# -- folders -------------------------------------------------------------------------------------------------


def read_folder(path: Path) -> Checkpoint:
    """Read a model folder as published.

    FileNotFoundError where something is not there, ValueError where it is damaged or of another family.
    """
    with explain_errors(path, "latent diffusion model"):
        for part in ("text_encoder_2", "transformer"):
            if (path / part).exists():
                raise ValueError(f"it has a {part}, as Stable Diffusion XL, 3 and Flux have them")
    vae = "vae" if (path / "vae").exists() else "vqvae"
    is_ldm = (path / "bert").exists() and not (path / "text_encoder").exists()
    text, text_kind = ("bert", LDMBertConfig) if is_ldm else ("text_encoder", TextConfig)
    kinds = {"unet": UNetConfig, vae: VAEConfig, text: text_kind}
    parts = [read_part(path / name, kind) for name, kind in kinds.items()]
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file)
    with explain_errors(path, "latent diffusion model"):
        return Checkpoint(*parts, scheduler, file, path / "tokenizer")


def read_part(folder: Path, kind: type) -> Part:
    """Read the configuration `kind` and the weights of one network; errors as of `read_folder`."""
    file = folder / "config.json"
    config, weights = read_config(kind, read_json(file), file), read_weights(folder)
    with explain_errors(folder, kind.__name__):
        return Part(config, rename(weights, OLD_NAMES), folder)


def read_clip(path: Path) -> tuple[CLIPConfig, dict[str, Tensor], Preprocessing]:
    """Read a folder like openai/clip-vit-base-patch32 as published; errors as of `read_folder`."""
    file = path / "config.json"
    raw = read_json(file)
    towers = {}
    for kind, name in ((TextConfig, "text_config"), (VisionConfig, "vision_config")):
        # Configurations from before transformers 4.27 say some things twice; the complete ones end in _dict.
        tower = raw.get(f"{name}_dict") or raw.get(name)
        if tower is None:
            raise ValueError(f"{file} lacks {name}; expected a CLIP with both towers")
        towers[name] = read_config(kind, tower, file)
    config = read_config(CLIPConfig, raw | towers, file)

    file = path / "preprocessor_config.json"
    raw = read_json(file)
    size, crop = raw.get("size"), raw.get("crop_size")  # numbers, or dictionaries of them
    raw["resize"] = size.get("shortest_edge") if isinstance(size, dict) else size
    raw["crop"] = crop.get("height") if isinstance(crop, dict) else crop
    raw["mean"], raw["std"] = raw.get("image_mean"), raw.get("image_std")
    return config, read_weights(path), read_config(Preprocessing, raw, file)


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the whole model folder (weights/README.md)")
    with explain_errors(path, "JSON object", "download it again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def read_config(kind: type, raw: dict, path: Path):
    """The configuration `kind` among the settings of `path`; absent and null ones have their default.

    ValueError where a value is none that such a network has, or another setting would change the numbers.
    """
    values, fixed = {}, FIXED.get(kind, {})
    types = {field.name: field.type for field in fields(kind)}
    with explain_errors(path, kind.__name__):
        for name in types | fixed:
            value = tuple(raw[name]) if isinstance(raw.get(name), list) else raw.get(name)
            if value is None:
                continue
            if name in fixed:
                is_ours, expected = value in fixed[name], " or ".join(map(repr, fixed[name]))
            else:
                is_ours = fits(value, types[name], most=2**7 if "layers" in name else 2**20)
                expected = inspect.formatannotation(types[name])
            if not is_ours:
                raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")
            if name in types:
                values[name] = value
        return kind(**values)


def fits(value, kind: type, most: int) -> bool:
    """Whether a JSON value is of an annotated type and, if a number, of a size that networks have."""
    if isinstance(kind, UnionType):
        return any(fits(value, one, most) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(kind)[0], most) for v in value)
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    if kind is int:
        return type(value) is int and 0 <= value <= most
    return isinstance(value, kind)


# -- files ---------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a part; full precision before fp16, then .safetensors before .bin.

    FileNotFoundError if there are none.
    """
    for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            if (folder / (stem + ending)).is_file():
                return read_tensors(folder / (stem + ending))
    names = "diffusion_pytorch_model.safetensors, model.safetensors or the same as .bin"
    raise FileNotFoundError(f"{folder} has no weights: expected {names} (weights/README.md)")
