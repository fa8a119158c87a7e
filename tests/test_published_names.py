"""Our networks have the published names, shapes and settings; weights/README.md's commands fetch them."""

import inspect
import shlex
from dataclasses import fields

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from huggingface_hub.utils import filter_repo_objects
from transformers import CLIPTextConfig, PretrainedConfig, ViTConfig

from tinyti.files.folder import DOWNLOAD, FIXED, NETWORKS, build, read_config
from tinyti.networks.clip import TextConfig
from tinyti.networks.ldmbert import LDMBertConfig
from tinyti.networks.unet import UNetConfig
from tinyti.networks.vae import VAEConfig
from tinyti.networks.vision import DINOConfig

from .conftest import ROOT
from .published import TEXTS, UNETS, VAE, theirs_on_meta

NAMES = {  # with the counts of tensors, and of numbers in them, in the published files
    "sd15 unet": (UNetConfig, TheirUNet, UNETS["sd15"], 686, 859520964),
    "sd21 unet": (UNetConfig, TheirUNet, UNETS["sd21"], 686, 865910724),
    "ldm unet": (UNetConfig, TheirUNet, UNETS["ldm"], 686, 872300484),
    "vae": (VAEConfig, AutoencoderKL, VAE, 248, 83653863),
    "sd15 text": (*TEXTS["sd15"], 196, 123060480),
    "sd21 text": (*TEXTS["sd21"], 372, 340387840),
    "ldm text": (*TEXTS["ldm"], 420, 542895360),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_the_published_weights(name):
    kind, their_kind, raw, tensors, numbers = NAMES[name]
    config = read_config(kind, raw, "config.json")
    with torch.device("meta"):
        ours = NETWORKS[kind](config)
    wanted = theirs_on_meta(their_kind, raw).state_dict()
    shapes = {k.removeprefix("text_model."): w.shape for k, w in wanted.items()}
    wanted = {k: shape for k, shape in shapes.items() if not k.startswith("to_logits.")}
    assert {k: w.shape for k, w in ours.state_dict().items()} == wanted
    assert len(wanted) == tensors
    assert sum(shape.numel() for shape in wanted.values()) == numbers
    assert not list(ours.buffers())


# Settings of theirs that our networks need not know: they change nothing when not training, are for other
# kinds of blocks, say what the names of the weights say, or are about precision and memory.
HARMLESS = {
    UNetConfig: """class_embeddings_concat cross_attention_norm dropout reverse_transformer_layers_per_block
        upcast_attention""",
    VAEConfig: "down_block_types up_block_types force_upcast sample_size",
    TextConfig: """attention_dropout bos_token_id initializer_factor initializer_range pad_token_id
        projection_dim""",
    LDMBertConfig: """activation_dropout attention_dropout classifier_dropout dropout encoder_layerdrop
        init_std num_hidden_layers pad_token_id scale_embedding use_cache""",
    DINOConfig: """attention_probs_dropout_prob encoder_stride hidden_dropout_prob initializer_range
        pooler_act pooler_output_size""",
}
# Those that change a name or a shape among the weights, by which the strict build refuses them, as these do.
TRACED = [
    (UNetConfig, "addition_embed_type", "text_time"),
    (UNetConfig, "attention_type", "gated"),
    (UNetConfig, "conv_in_kernel", 5),
    (UNetConfig, "conv_out_kernel", 5),
    (UNetConfig, "dual_cross_attention", True),
    (UNetConfig, "encoder_hid_dim_type", "text_proj"),
    (UNetConfig, "mid_block_type", None),
    (UNetConfig, "num_class_embeds", 8),
    (UNetConfig, "resnet_time_scale_shift", "scale_shift"),
    (UNetConfig, "time_cond_proj_dim", 8),
    (UNetConfig, "time_embedding_dim", 8),
    (UNetConfig, "time_embedding_type", "fourier"),
    (UNetConfig, "transformer_layers_per_block", 2),
    (VAEConfig, "mid_block_add_attention", False),
    (VAEConfig, "use_quant_conv", False),
    (VAEConfig, "use_post_quant_conv", False),
]
SIZES = {  # what some of these need to know beside
    "addition_embed_type": {
        "addition_time_embed_dim": 8,
        "addition_embed_type_num_heads": 64,
        "projection_class_embeddings_input_dim": 8,
    },
    "encoder_hid_dim_type": {"encoder_hid_dim": 8},
}


@pytest.mark.parametrize("kind", HARMLESS, ids=lambda kind: kind.__name__)
def test_no_setting_of_theirs_is_overlooked(kind):
    """A setting that diffusers or transformers may write is ours, fixed, traced or known to be harmless."""
    network = {UNetConfig: TheirUNet, VAEConfig: AutoencoderKL}.get(kind)
    if network:
        theirs = inspect.signature(network).parameters.keys()
    else:
        config = {TextConfig: CLIPTextConfig, DINOConfig: ViTConfig}.get(kind, TheirBertConfig)
        theirs = vars(config()).keys() - vars(PretrainedConfig()).keys()
    harmless = set(HARMLESS[kind].split())
    traced = {name for of, name, _ in TRACED if of is kind}
    traced |= {size for name in traced for size in SIZES.get(name, ())}
    assert len(theirs) > 10
    assert theirs <= {f.name for f in fields(kind)} | FIXED[kind].keys() | harmless | traced
    assert harmless | traced <= theirs


@pytest.mark.parametrize("kind, name, value", TRACED)
def test_settings_that_leave_a_trace(kind, name, value):
    network, raw = (TheirUNet, UNETS["sd15"]) if kind is UNetConfig else (AutoencoderKL, VAE)
    raw = raw | {name: value} | SIZES.get(name, {})
    theirs = theirs_on_meta(network, raw).state_dict()
    with pytest.raises(ValueError, match=r"expected (floats|nothing)"):
        build(read_config(kind, raw, "config.json"), theirs)


# -- weights/README.md ---------------------------------------------------------------------------------------

SAFETENSORS = """
README.md .gitattributes model_index.json v1-5-pruned-emaonly.safetensors v1-5-pruned-emaonly.ckpt
feature_extractor/preprocessor_config.json safety_checker/config.json safety_checker/model.safetensors
scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors
text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin tokenizer/merges.txt tokenizer/vocab.json
tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json unet/config.json
unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors unet/diffusion_pytorch_model.bin vae/config.json
vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.bin"""
BINS = """README.md model_index.json bert/config.json bert/pytorch_model.bin scheduler/scheduler_config.json
tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.txt unet/config.json
unet/diffusion_pytorch_model.bin vqvae/config.json vqvae/diffusion_pytorch_model.bin"""
CLIP = """README.md config.json flax_model.msgpack merges.txt preprocessor_config.json pytorch_model.bin
special_tokens_map.json tf_model.h5 tokenizer.json tokenizer_config.json vocab.json"""
DINO = "README.md config.json preprocessor_config.json pytorch_model.bin"
DIFFUSION = "diffusion_pytorch_model"
SD1 = SAFETENSORS, {"text_encoder/model", f"unet/{DIFFUSION}", f"vae/{DIFFUSION}"}
DOWNLOADS = {  # what the repository holds, and which large files the command brings
    **dict.fromkeys(("weights/sd14", "weights/sd15", "weights/sd21-base", "weights/sd21"), SD1),
    "weights/ldm": (BINS, {"bert/pytorch_model", f"unet/{DIFFUSION}", f"vqvae/{DIFFUSION}"}),
    "weights/clip-vit-base-patch32": (CLIP, {"pytorch_model"}),
    "weights/dino-vits16": (DINO, {"pytorch_model"}),
    "weights/sd15-file": (SAFETENSORS, {"v1-5-pruned-emaonly"}),
}


def test_the_commands_of_the_readme_bring_what_is_needed():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("hf download ")]
    assert shlex.split(DOWNLOAD) in commands
    seen = set()
    for command in commands:
        flags = list(zip(command[3::2], command[4::2]))
        (folder,) = (value for flag, value in flags if flag == "--local-dir")
        include = [value for flag, value in flags if flag == "--include"]
        listing, large = DOWNLOADS[folder]
        files = set(filter_repo_objects(listing.split(), allow_patterns=include))
        assert {f.rpartition(".")[0] for f in files if not f.endswith((".json", ".txt"))} == large
        needed = {f for f in listing.split() if f.endswith((".json", ".txt")) and not f.startswith("safety")}
        single = folder == "weights/sd15-file"
        assert files >= {f for f in needed if f.startswith("tokenizer/") or not single}
        seen.add(folder)
    assert seen == DOWNLOADS.keys()
