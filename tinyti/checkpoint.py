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
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]

# Packages whose objects training leaves in a .ckpt file beside the weights; empty stubs take their places.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "numpy.")

# What readers and Python itself raise for files that are cut off, damaged, or hold something else.
NONSENSE = (ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError,
            MemoryError, OSError, RuntimeError, SafetensorError, TypeError, UnpicklingError, ValueError,
            struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip


def unsupported(found: str) -> ValueError:
    """The error for what may well be in order, but is nothing that is read here."""
    return ValueError(f"{found}; {SUPPORTED}")


@contextmanager
def describes(path: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong while the contents of `path` become `what` is a ValueError of one line."""
    try:
        yield
    except NONSENSE as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} does not describe a {what} ({found:.400})") from None


@contextmanager
def one_line() -> Iterator[None]:
    """Errors have one line, also where a file's name has several."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(" ".join(str(error).splitlines())) from None


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
        config, _, path = self.unet
        if config.in_channels != 4:
            what = "an inpainting model" if config.in_channels == 9 else "a model of another kind"
            raise unsupported(f"{path} is {what}: its UNet takes {config.in_channels} channels, not 4")


def build(config, weights: dict[str, Tensor], path: str | Path = "configuration",
          device: str = "cpu", dtype: torch.dtype = torch.float32, **extra) -> nn.Module:  # fmt: skip
    """The frozen network of a configuration with exactly these weights, which are from `path`.

    ValueError names the first key that is missing, left over, of another shape or no floating-point tensor,
    and says what is wrong with a configuration that no network has.
    """
    kind = NETWORKS[type(config)]
    # On meta: no memory and no random numbers for weights that are replaced at once.
    with describes(path, kind.__name__), torch.device("meta"):
        network = kind(config, **extra)
    weights = {k: w for k, w in weights.items() if not k.startswith(LEFT_OUT.get(kind, ()))}
    ours = {k: tuple(w.shape) for k, w in network.state_dict().items()}
    for key in sorted(ours.keys() | weights.keys()):
        name = f"{path}: {kind.__name__}: {repr(key)[1:-1]:.200}"
        if key not in weights:
            raise unsupported(f"the weights lack {name}, expected with shape {ours[key]}")
        if key not in ours:
            raise unsupported(f"the weights hold {name}, which has no place in it")
        found = tuple(weights[key].shape)
        if found != ours[key]:
            raise unsupported(f"{name} has shape {found}, expected is {ours[key]}")
        if not weights[key].is_floating_point():
            raise unsupported(f"{name} is of {weights[key].dtype}, expected are floating-point numbers")
    # Weights that need no conversion stay in their file, mapped into memory, and are read where used.
    weights = {k: w.to(device, dtype) for k, w in weights.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)


class Weights(dict):
    """Weights by name; an error names what is looked for and not there."""

    def __missing__(self, key):
        raise unsupported(f"the weights lack {key}")


def rename(weights: dict[str, Tensor], rules: Rules) -> Weights:
    """Every key through every rule, in order; ValueError where two become the same."""
    renamed = Weights()
    for old, weight in weights.items():
        key = old
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        if key in renamed:
            raise unsupported(f"the weights hold {key} twice, once as {old}")
        renamed[key] = weight
    return renamed


# -- folders -------------------------------------------------------------------------------------------------


def read_folder(path: Path) -> Checkpoint:
    """Read a model folder as published.

    FileNotFoundError where something is not there, ValueError where it is damaged or of another family.
    """
    index = path / "model_index.json"
    pipeline = read_json(index).get("_class_name") if index.exists() else ""
    pipeline = pipeline if isinstance(pipeline, str) else ""
    for mark, family in FOREIGN.items():
        if mark in pipeline:
            raise unsupported(f"{path} is {family} ({pipeline:.100})")
    for later in ("text_encoder_2", "transformer"):
        if (path / later).exists():
            raise unsupported(f"{path} holds a {later}, so it is a model of a later family")

    bert = not (path / "text_encoder").exists() and (path / "bert").exists()
    folders = ("unet", "vae" if (path / "vae").exists() else "vqvae", "bert" if bert else "text_encoder")
    parts = []
    for kind, name in zip((UNetConfig, VAEConfig, LDMBertConfig if bert else TextConfig), folders):
        file = path / name / "config.json"
        config = read_config(kind, read_json(file), file)
        weights = read_weights(path / name)
        with describes(path / name, kind.__name__):
            parts.append((config, rename(weights, OLD_NAMES), path / name))
    scheduler = path / "scheduler" / "scheduler_config.json"
    return Checkpoint(*parts, read_json(scheduler), scheduler, path / "tokenizer")


def read_clip(path: Path) -> tuple[CLIPConfig, dict[str, Tensor], Preprocessing]:
    """Read a folder like openai/clip-vit-base-patch32 as published; errors as of `read_folder`."""
    file, preprocessor = path / "config.json", path / "preprocessor_config.json"
    raw = read_json(file)
    if not ("text_config" in raw and "vision_config" in raw):
        raise ValueError(f"{file} lacks text_config or vision_config; expected a CLIP with both towers")
    # Configurations from before transformers 4.27 say some things twice; the complete ones end in _dict.
    text = read_config(TextConfig, raw.get("text_config_dict") or raw["text_config"], file)
    vision = read_config(VisionConfig, raw.get("vision_config_dict") or raw["vision_config"], file)
    config = read_config(CLIPConfig, {"projection_dim": raw.get("projection_dim")}, file)
    config.text_config, config.vision_config = text, vision
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not readable as a JSON object: it holds a {type(content).__name__}")
    return content


def read_config(kind: type, raw: dict, path: Path):
    """The configuration `kind` among the settings of `path`; absent and null ones have their default.

    ValueError where a value is none that such a network has, or another setting would change the numbers.
    """
    with describes(path, kind.__name__):
        raw = {name: value for name, value in raw.items() if value is not None}
    allowed = FIXED.get(kind, {})
    for name in raw.keys() & allowed.keys():
        if raw[name] not in allowed[name]:
            expected = " or ".join(map(repr, allowed[name]))
            raise unsupported(f"{path}: {name} is {reprlib.repr(raw[name])}, expected {expected}")
    values = {}
    for field in fields(kind):
        if field.name in raw:
            value = values[field.name] = _frozen(raw[field.name])
            if not fits(value, field.type, field.name):
                expected = inspect.formatannotation(field.type)
                raise unsupported(f"{path}: {field.name} is {reprlib.repr(value)}, expected {expected}")
    with describes(path, kind.__name__):
        return kind(**values)


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


def fits(value, kind, name: str) -> bool:
    """Whether a JSON value is of an annotated type, and of a size that networks have."""
    if isinstance(kind, UnionType):
        return any(fits(value, k, name) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(v, get_args(kind)[0], name) for v in value)
    if kind is float:
        return type(value) in (int, float) and 0 < value < math.inf
    if kind is int:
        return type(value) is int and 0 <= value <= (2**7 if "layers" in name else 2**20)
    return isinstance(value, kind)


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
    if not path.is_file():  # a device or a pipe may never end
        raise ValueError(f"{path} is no regular file; expected one of weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's on odd pickles
            state = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except PermissionError:
        raise
    except NONSENSE as error:
        if beside := re.search(r"GLOBAL (\S+)", str(error)):
            found = f"{path} holds {beside[1]} beside weights and is not opened, for a pickle can run code"
            raise ValueError(f"{found}; take the .safetensors file of the same model") from None
        raise ValueError(f"{path} is cut off, damaged or no file of weights; download it again") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not any(torch.is_tensor(w) for w in state.values()):
        raise ValueError(f"{path} holds no weights: expected a dictionary of tensors")
    weights = {str(k): w.detach() for k, w in state.items() if torch.is_tensor(w)}
    for name, w in weights.items():
        if w.layout is not torch.strided or w.device.type != "cpu" or w.is_quantized:
            raise ValueError(f"{path} holds {name!r:.200}, which is sparse, quantised or without numbers")
    return weights


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
