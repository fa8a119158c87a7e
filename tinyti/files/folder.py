"""Read model folders as published, and build every network strictly.

Every key of a file must match a weight, and every weight a key; only keys in LEFT_OUT may be left over."""

import inspect
import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
from ..networks.vision import CLIP, DINO, CLIPConfig, DINOConfig, Preprocessing, VisionConfig
from .tensors import explain_errors, read_tensors

MOST_JSON = 2**20  # bytes of a configuration
MOST_BLOCKS = 16  # resolutions of a network
DOWNLOAD = (
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir weights/sd15 "
    '--include "*.json" --include "*.txt" --include "[tuv]*/*model.safetensors"'
)
NETWORKS = {
    UNetConfig: UNet, VAEConfig: VAE, TextConfig: CLIPText, LDMBertConfig: LDMBert, CLIPConfig: CLIP,
    DINOConfig: DINO,
}  # fmt: skip

# Settings that change the numbers but no weight's name or shape, with the values that our networks support.
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
    TextConfig: {"hidden_act": tuple(ACTIVATIONS), "use_attention_mask": (False,)},
    VisionConfig: {"hidden_act": tuple(ACTIVATIONS)},
    DINOConfig: {"hidden_act": ("gelu",), "num_channels": (3,), "qkv_bias": (True,)},
    LDMBertConfig: {"activation_function": ("gelu",)},
    Schedule: {
        **CHOICES, "thresholding": (False,), "trained_betas": (None,),
    },
}  # fmt: skip

# Published keys that our networks do not use: buffers, projections and heads.
LEFT_OUT = {
    CLIPText: ("embeddings.position_ids", "text_projection", "logit_scale", "attn_mask"),
    LDMBert: ("to_logits.",),
    CLIP: ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    DINO: ("pooler.",),
}

# A regular expression and its replacement.
Rules = list[tuple[str, str | Callable[[re.Match], str]]]

# Names in folders written by transformers before 5 and by diffusers before 0.17.
OLD_NAMES: Rules = [
    (r"^text_model\.", ""),
    (r"\.attentions\.0\.(query|key|value)\.", lambda m: f".attentions.0.to_{m[1][0]}."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]

# Names of a published vision transformer (ViT), which become those of CLIP's layers.
VIT_NAMES: Rules = [
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.layernorm_before\.", ".layer_norm1."),
    (r"\.layernorm_after\.", ".layer_norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".self_attn.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]


class Part(NamedTuple):
    """One network of a model, not yet built."""

    config: Any
    weights: dict[str, Tensor]
    path: Path  # the source of both


@dataclass
class Checkpoint:
    """The parts of a model, read but not yet built; ValueError unless its UNet takes 4 channels (latents).

    If a setting is missing, the methods choose as diffusers' pipelines do.
    """

    unet: Part
    vae: Part
    text: Part
    scheduler: dict  # the contents of scheduler_config.json
    scheduler_path: Path  # its source
    tokenizer: Path  # the folder of the vocabulary

    def __post_init__(self):
        channels = self.unet.config.in_channels
        if channels != 4:
            what = "an inpainting model" if channels == 9 else "a model of another kind"
            raise ValueError(f"it is {what}: its UNet takes {channels} channels")

    @property
    def is_ldm(self) -> bool:
        """Whether this is the paper's LDM and not Stable Diffusion."""
        return isinstance(self.text.config, LDMBertConfig)

    def schedule(self, prediction: str | None = None) -> Schedule:
        """The noise schedule of scheduler_config.json; `prediction` overrides its prediction_type.

        ValueError if the betas are missing (flow and consistency models) or a setting is not supported.
        """
        settings = dict(self.scheduler)
        with explain_errors(self.scheduler_path, "noise schedule"):
            for name in ("beta_start", "beta_end", "beta_schedule"):
                if settings.get(name) is None:
                    raise ValueError(f"it lacks {name}, as the schedulers of flow and consistency models do")
            if self.is_ldm and settings.get("clip_sample"):  # the pipelines of Stable Diffusion ignore it
                raise ValueError("clip_sample is True, expected False")
        if not self.is_ldm:
            settings["steps_offset"] = 1
        if prediction:
            settings["prediction_type"] = prediction
        schedule = read_config(Schedule, settings, self.scheduler_path)
        if settings.get("timestep_spacing") is None:  # each sampler then has its own
            schedule = replace(schedule, timestep_spacing=None)
        return schedule

    def skip_text_layers(self, clip_skip: int) -> Part:
        """The text transformer without its last `clip_skip` - 1 layers; diffusers' clip_skip is one less.

        ValueError for Stable Diffusion 2 and LDM, and for a layer that does not exist.
        """
        config, weights, path = self.text
        if clip_skip == 1:
            return self.text
        if self.is_ldm or self.unet.config.use_linear_projection:  # only Stable Diffusion 2 projects linearly
            hint = "Stable Diffusion 2 already skips a layer, and LDM uses them all"
            raise ValueError(f"clip skip is {clip_skip}, but it is for Stable Diffusion 1 only; {hint}")
        layers = config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"clip skip is {clip_skip}; it is 1 (none) to {layers}, all layers")
        kept = layers - (clip_skip - 1)
        skipped = tuple(f"encoder.layers.{i}." for i in range(kept, layers))
        weights = {key: w for key, w in weights.items() if not key.startswith(skipped)}
        return Part(replace(config, num_hidden_layers=kept), weights, path)


def build(
    config,
    weights: dict[str, Tensor],
    path: str | Path = "configuration",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **extra,
) -> nn.Module:
    """Build the frozen network of a configuration from exactly these weights; errors name `path`.

    ValueError names the first key that is missing, left over, of another shape or not floating-point, or
    says what is wrong with the configuration.
    """
    kind = NETWORKS[type(config)]
    with explain_errors(path, kind.__name__):
        # On the meta device weights take no memory and no random numbers; they are replaced at once.
        with torch.device("meta"):
            network = kind(config, **extra)
        ours = network.state_dict()
        weights = {k: w for k, w in weights.items() if not k.startswith(LEFT_OUT.get(kind, ()))}
        for key in sorted(ours.keys() | weights.keys()):
            expected, found = (_format(tensors.get(key)) for tensors in (ours, weights))
            if found != expected:
                raise ValueError(f"for {key!r:.200} it has {found}, expected {expected}")
    # Weights that need no conversion stay memory-mapped: the file is read when they are used.
    weights = {k: w.to(device, dtype) for k, w in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _format(weight: Tensor | None) -> str:
    """A weight's kind of dtype and its shape, on which a network and its file must agree."""
    if weight is None:
        return "nothing"
    return f"{'floats' if weight.is_floating_point() else weight.dtype} of shape {tuple(weight.shape)}"


def rename(weights: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Apply every rule, in order, to every key; ValueError if two keys become the same."""
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

    FileNotFoundError if a file is missing, ValueError if one is damaged or the model is of another family.
    """
    path = find_snapshot(path)
    with explain_errors(path, "latent diffusion model"):
        for part in ("text_encoder_2", "transformer"):
            if (path / part).exists():
                raise ValueError(f"it has a {part}, as Stable Diffusion XL, 3 and Flux have them")
    vae = "vae" if (path / "vae").exists() else "vqvae"
    is_ldm = (path / "bert").exists() and not (path / "text_encoder").exists()
    text, text_kind = ("bert", LDMBertConfig) if is_ldm else ("text_encoder", TextConfig)
    kinds = {"unet": UNetConfig, vae: VAEConfig, text: text_kind}
    parts = [read_part(path / name, kind) for name, kind in kinds.items()]
    if not is_ldm:
        file = path / "unet" / "config.json"
        parts[0] = parts[0]._replace(config=correct_sample_size(parts[0].config, read_json(file)))
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file)
    with explain_errors(path, "latent diffusion model"):
        return Checkpoint(*parts, scheduler, file, path / "tokenizer")


def find_snapshot(path: Path) -> Path:
    """Find the snapshot in a Hugging Face cache folder, `models--org--name`; return other paths unchanged.

    ValueError unless refs/main names the snapshot or there is exactly one.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        return snapshots / main.read_text(encoding="utf-8").strip()
    found = sorted(snapshots.iterdir())
    if len(found) != 1:
        names = ", ".join(snapshot.name for snapshot in found) or "none"
        raise ValueError(f"{path} must hold one snapshot, found {names}; name one, as {snapshots}/...")
    return found[0]


def correct_sample_size(config: UNetConfig, raw: dict) -> UNetConfig:
    """Use latents of size 64 if diffusers before 0.9 wrote a smaller size, as diffusers' pipelines do."""
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("_diffusers_version", "")))
    is_old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    too_small = config.sample_size is not None and config.sample_size < 64
    return replace(config, sample_size=64) if is_old and too_small else config


def read_part(folder: Path, kind: type, names: Rules = OLD_NAMES) -> Part:
    """Read the configuration `kind` and the weights of one network, renamed; errors as in `read_folder`."""
    file = folder / "config.json"
    config, weights = read_config(kind, read_json(file), file), read_weights(folder)
    with explain_errors(folder, kind.__name__):
        return Part(config, rename(weights, names), folder)


def read_clip(path: Path) -> tuple[CLIPConfig, dict[str, Tensor], Preprocessing]:
    """Read a folder like openai/clip-vit-base-patch32 as published; errors as in `read_folder`."""
    file = path / "config.json"
    raw = read_json(file)
    towers = {}
    for kind, name in ((TextConfig, "text_config"), (VisionConfig, "vision_config")):
        # transformers before 4.27 wrote a tower's settings twice; the complete ones end in _dict.
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


def read_dino(path: Path) -> Part:
    """Read a folder like facebook/dino-vits16 as published; errors as in `read_folder`."""
    file = path / "config.json"
    if (found := read_json(file).get("model_type")) != "vit":
        raise ValueError(f"{file}: model_type is {found!r:.80}, expected 'vit' as in facebook/dino-vits16")
    return read_part(path, DINOConfig, VIT_NAMES)


def read_json(path: Path) -> dict:
    """Read the object in a JSON file; FileNotFoundError or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the whole model folder (weights/README.md)")
    with explain_errors(path, "JSON object", "download it again"):
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes, expected at most {MOST_JSON:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def read_config(kind: type, raw: dict, path: Path):
    """Build the configuration `kind` from the settings in `path`; missing and null ones take their default.

    ValueError for a value of the wrong type or size, and for a setting in FIXED that we do not support.
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
    """Whether a JSON value has an annotated type and, if it is a number or a list, a plausible size."""
    if isinstance(kind, UnionType):
        return any(fits(value, one, most) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return (
            isinstance(value, tuple)
            and len(value) <= MOST_BLOCKS
            and all(fits(v, get_args(kind)[0], most) for v in value)
        )
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    if kind is int:
        return type(value) is int and 0 <= value <= most
    return isinstance(value, kind)


# -- files ---------------------------------------------------------------------------------------------------


VARIANTS = ("", ".fp16", ".bf16", ".non_ema")  # of the weights in a folder; the first that exists is read


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read a part's weights: full precision before variants, .safetensors before .bin, whole before shards.

    FileNotFoundError if there are none.
    """
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for variant in VARIANTS:
        for suffix in (".safetensors", ".bin"):
            for stem in stems:
                file = folder / f"{stem}{variant}{suffix}"
                indices = folder / f"{file.name}.index.json", folder / f"{stem}{suffix}.index{variant}.json"
                if file.is_file():
                    return read_tensors(file)
                for index in indices:
                    if index.is_file():
                        return read_shards(index)
    found = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
    names = "diffusion_pytorch_model.safetensors, model.safetensors or the same as .bin"
    raise FileNotFoundError(f"{folder} has no weights: found {found}, expected {names} (weights/README.md)")


def read_shards(index: Path) -> dict[str, Tensor]:
    """Read the weight files that an index.json lists; errors as in `read_folder`."""
    with explain_errors(index, "list of weight files", "download it again"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside of its folder")
    weights = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is missing, which {index.name} names")
        weights |= read_tensors(index.parent / name)
    return weights
