"""Write the finished model folder, in Stable Diffusion's layout."""

import json
import shutil
from dataclasses import asdict

from safetensors.torch import save_file

# Stable Diffusion's betas. Trailing spacing starts sampling at the noisiest step (2305.08891).
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_folder(out, work, clip, coder, text, unet):
    """Write the networks in fp16, with CLIP's towers beside them."""
    levels = len(coder.config.block_out_channels)
    vae_config = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **published_config(coder.config),
        "sample_size": work.recipe.size,
    }
    write_part(out / "vae", "diffusion_pytorch_model", vae_config, coder)
    unet_config = {"_class_name": "UNet2DConditionModel", **published_config(unet.config)}
    write_part(out / "unet", "diffusion_pytorch_model", unet_config, unet)
    text_config, clip_config = text_configs(clip.config)
    write_part(out / "text_encoder", "model", text_config, text, prefix="text_model.")
    write_part(out / "clip", "model", clip_config, clip)
    write_json(out / "clip" / "preprocessor_config.json", preprocessor_config(clip.preprocess))
    (out / "scheduler").mkdir(exist_ok=True)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(out / "model_index.json", INDEX)
    for folder in ("tokenizer", "clip"):
        shutil.copytree(work / "tokenizer", out / folder, dirs_exist_ok=True)


def write_part(folder, weights_name, config, module, prefix=""):
    """Write a network's folder; transformers 4 needs a prefix before the names of a text transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    weights = {prefix + k: v.detach().cpu().half().contiguous() for k, v in module.state_dict().items()}
    save_file(weights, folder / f"{weights_name}.safetensors", metadata={"format": "pt"})


def write_json(path, content):
    """Write a file of settings."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def published_config(config):
    """Return a configuration as it is published, with lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def text_configs(config):
    """Return the published configurations of the text transformer alone and of both of CLIP's towers."""
    text, vision = published_config(config.text_config), published_config(config.vision_config)
    ids = {"bos_token_id": text["vocab_size"] - 2, "pad_token_id": text["eos_token_id"]}
    text |= {"model_type": "clip_text_model", "projection_dim": config.projection_dim, **ids}
    vision |= {"model_type": "clip_vision_model", "projection_dim": config.projection_dim}
    alone = {"architectures": ["CLIPTextModel"], "dtype": "float32", **text}
    both = {"architectures": ["CLIPModel"], "model_type": "clip", "dtype": "float32"}
    both |= {"projection_dim": config.projection_dim, "text_config": text, "vision_config": vision}
    return alone, both


def preprocessor_config(preprocess):
    """Return the settings by which CLIP's pictures are preprocessed."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": preprocess.resize},
        "crop_size": {"height": preprocess.resize, "width": preprocess.resize},
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": int(preprocess.resample),
        "rescale_factor": 1 / 255,
        **{f"do_{what}": True for what in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    }
