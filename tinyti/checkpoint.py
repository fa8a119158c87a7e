"""Public weights, exactly as published, to networks: model folders, and the strict build of every part.

Every key must find its place and every place its key; only what is listed by name may be left over."""

import inspect
import json
import math
import re
import reprlib
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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

# Pipelines that belong to other families, and how people call these.
FOREIGN = {"StableDiffusionXL": "Stable Diffusion XL", "StableDiffusion3": "Stable Diffusion 3",
           "Flux": "Flux", "Inpaint": "an inpainting model"}  # fmt: skip
LATER = ("text_encoder_2", "transformer")  # their folders

# Settings that our networks do not have, or not all values of, with those that they can do.
FIXED = {
    UNetConfig: {
        **dict.fromkeys("""
            addition_embed_type class_embed_type cross_attention_norm encoder_hid_dim encoder_hid_dim_type
            mid_block_only_cross_attention num_attention_heads num_class_embeds time_cond_proj_dim
            time_embedding_act_fn time_embedding_dim timestep_post_act""".split(), (None,)),
        **dict.fromkeys("""
            center_input_sample dual_cross_attention only_cross_attention resnet_skip_time_act
            """.split(), (False,)),
        **dict.fromkeys("""
            downsample_padding mid_block_scale_factor resnet_out_scale_factor transformer_layers_per_block
            """.split(), (1,)),
        **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
        "act_fn": ("silu",), "attention_type": ("default",), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",), "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",), "out_channels": (4,),
    },
    VAEConfig: {
        **dict.fromkeys(("latents_mean", "latents_std", "shift_factor"), (None,)),
        **dict.fromkeys(("mid_block_add_attention", "use_post_quant_conv", "use_quant_conv"), (True,)),
        "act_fn": ("silu",), "in_channels": (3,), "latent_channels": (4,), "out_channels": (3,),
    },
    TextConfig: {"model_type": ("clip_text_model", "clip"), "hidden_act": tuple(ACTIVATIONS)},
    VisionConfig: {"model_type": ("clip_vision_model", "clip"), "hidden_act": tuple(ACTIVATIONS)},
    LDMBertConfig: {"activation_function": ("gelu",)},
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

# Packages whose objects training leaves in a .ckpt file beside the weights; empty stubs take their places.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "numpy.")

# What readers and Python itself raise for files that are cut off, damaged, or hold something else.
NONSENSE = (ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError,
            MemoryError, OSError, RuntimeError, SafetensorError, TypeError, UnpicklingError, ValueError,
            struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip


@contextmanager
def describes(path: str | Path, what: str, hint: str = SUPPORTED) -> Iterator[None]:
    """Whatever goes wrong while the contents of `path` become `what` is a ValueError of one line."""
    try:
        yield
    except NONSENSE as error:
        found = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        found = f"{path} does not describe a {what} ({' '.join(found.split()):.500}); {hint}"
        raise ValueError(" ".join(found.splitlines())) from None


Part = tuple[Any, dict[str, Tensor], Path]  # configuration, weights, and where both are from


@dataclass
class Checkpoint:
    """What a model is made of, read but not yet built; ValueError if its UNet takes more than latents."""

    unet: Part
    vae: Part
    text: Part
    schedule: dict  # the contents of scheduler_config.json
    scheduler: Path  # where it is from
    tokenizer: Path  # the folder of the vocabulary

    def __post_init__(self):
        channels = self.unet[0].in_channels
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
    with describes(path, kind.__name__):
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
    index = path / "model_index.json"
    pipeline = str(read_json(index).get("_class_name")) if index.exists() else ""
    found = [f"{family} ({pipeline:.100})" for mark, family in FOREIGN.items() if mark in pipeline]
    found += [f"of a later family: it has a {part}" for part in LATER if (path / part).exists()]
    with describes(path, "latent diffusion model"):
        if found:
            raise ValueError(f"it is {found[0]}")
    bert = not (path / "text_encoder").exists() and (path / "bert").exists()
    folders = ("unet", "vae" if (path / "vae").exists() else "vqvae", "bert" if bert else "text_encoder")
    parts = []
    for kind, folder in zip((UNetConfig, VAEConfig, LDMBertConfig if bert else TextConfig), folders):
        file = path / folder / "config.json"
        config, weights = read_config(kind, read_json(file), file), read_weights(path / folder)
        with describes(path / folder, kind.__name__):
            parts.append((config, rename(weights, OLD_NAMES), path / folder))
    scheduler = path / "scheduler" / "scheduler_config.json"
    schedule = read_json(scheduler)
    with describes(path, "latent diffusion model"):
        return Checkpoint(*parts, schedule, scheduler, path / "tokenizer")


def read_clip(path: Path) -> tuple[CLIPConfig, dict[str, Tensor], Preprocessing]:
    """Read a folder like openai/clip-vit-base-patch32 as published; errors as of `read_folder`."""
    file, preprocessor = path / "config.json", path / "preprocessor_config.json"
    raw = read_json(file)
    if not ("text_config" in raw and "vision_config" in raw):
        raise ValueError(f"{file} lacks text_config or vision_config; expected a CLIP with both towers")
    config = read_config(CLIPConfig, {"projection_dim": raw.get("projection_dim")}, file)
    # Configurations from before transformers 4.27 say some things twice; the complete ones end in _dict.
    config.text_config = read_config(TextConfig, raw.get("text_config_dict") or raw["text_config"], file)
    vision = raw.get("vision_config_dict") or raw["vision_config"]
    config.vision_config = read_config(VisionConfig, vision, file)
    settings = read_json(preprocessor)
    size, crop = settings.get("size"), settings.get("crop_size")
    settings["resize"] = size.get("shortest_edge") if isinstance(size, dict) else size
    settings["crop"] = crop.get("height") if isinstance(crop, dict) else crop
    settings |= {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    return config, read_weights(path), read_config(Preprocessing, settings, preprocessor)


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError or ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; download the whole model folder (weights/README.md)")
    with describes(path, "JSON object", "download it again"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def read_config(kind: type, raw: dict, path: Path):
    """The configuration `kind` among the settings of `path`; absent and null ones have their default.

    ValueError where a value is none that such a network has, or another setting would change the numbers.
    """
    schema = {field.name: field.type for field in fields(kind)}
    values = {}
    with describes(path, kind.__name__):
        for name, allowed in (schema | FIXED.get(kind, {})).items():
            found = raw.get(name)
            value = tuple(found) if isinstance(found, list) else found
            if value is not None and not fits(value, allowed, name):
                fixed = isinstance(allowed, tuple)
                expected = " or ".join(map(repr, allowed)) if fixed else inspect.formatannotation(allowed)
                raise ValueError(f"{name} is {reprlib.repr(found)}, expected {expected}")
            if value is not None and name in schema:
                values[name] = value
        return kind(**values)


def fits(value, allowed, name: str) -> bool:
    """Whether a JSON value is among those allowed, or of an annotated type and a size that networks have."""
    if isinstance(allowed, tuple):
        return value in allowed
    if isinstance(allowed, UnionType):
        return any(fits(value, kind, name) for kind in get_args(allowed))
    if get_origin(allowed) is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(allowed)[0], name) for v in value)
    if allowed is float:
        return type(value) in (int, float) and 0 < value < math.inf
    if allowed is int:
        return type(value) is int and 0 <= value <= (2**7 if "layers" in name else 2**20)
    return isinstance(value, allowed)


# -- files ---------------------------------------------------------------------------------------------------


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a part; full precision before fp16, then .safetensors before .bin.

    FileNotFoundError if there are none.
    """
    for ending in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            if (folder / (stem + ending)).is_file():
                return load_tensors(folder / (stem + ending))
    names = "diffusion_pytorch_model.safetensors, model.safetensors or the same as .bin"
    raise FileNotFoundError(f"{folder} has no weights: expected {names} (weights/README.md)")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .bin or .ckpt file, mapped into memory; a pickle's code never runs.

    ValueError if it is damaged, holds something else, or no file that could be read again.
    """
    with describes(path, "file of weights", "download it again, or as .safetensors"):
        if not path.is_file():  # a device or a pipe may never end
            raise ValueError("it is no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's on odd pickles
            state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
        state = state.get("state_dict", state) if isinstance(state, dict) else None
        entries = state.items() if isinstance(state, dict) else ()
        weights = {str(k): w.detach() for k, w in entries if torch.is_tensor(w)}
        if not weights:
            raise ValueError("it holds no dictionary of tensors")
        for name, w in weights.items():
            if w.layout is not torch.strided or w.device.type != "cpu" or w.is_quantized:
                raise ValueError(f"{name!r:.200} is sparse, quantised or without numbers")
    return weights


def _unpickle(path):
    zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    stubs = [_stub(name) for name in names if name.startswith(BOOKKEEPING)]
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:  # whose text advises to run the file's code
        call = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"it would call {call[1]}, which was not run" if call else "it is damaged") from None


def _stub(name):
    """A class that keeps nothing of its objects, under the full name by which torch.load asks for it."""

    def ignore(*args):
        pass

    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})
