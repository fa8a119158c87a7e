"""Every form in which models are published gives the same modules; everything else gives one clear error."""

import functools
import inspect
import io
import json
import os
import pickle
import random
import shlex
import shutil
import sys
import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from transformers import CLIPTextConfig, CLIPTextModel, PretrainedConfig

import tinyti
from tinyti.files import folder, single, tensors
from tinyti.networks.clip import TextConfig
from tinyti.networks.ldmbert import LDMBertConfig
from tinyti.networks.unet import UNetConfig
from tinyti.networks.vae import VAEConfig

from . import published
from .published import CLIP_TEXT, TEXTS, UNETS, VAE, theirs_on_meta  # noqa: F401
from .conftest import ROOT, TINY

PARTS = ("unet", "vae", "text")


class Published:
    """A tiny model of a family: theirs, the folder they saved, ours loaded from it, its original layout."""

    def __init__(self, family, root, **scheduler):
        self.family, self.folder = family, root / "model"
        if family == "ldm":
            self.theirs = published.tiny_ldm(root / "vocabulary", **scheduler)
            parts = (self.theirs.unet, self.theirs.vqvae, self.theirs.bert)
            rewrite = published.original_bert
        else:
            self.theirs = published.tiny_stable_diffusion(family, root / "vocabulary", **scheduler)
            parts = (self.theirs.unet, self.theirs.vae, self.theirs.text_encoder)
            rewrite = published.original_openclip if family == "sd2" else published.original_clip
        self.parts = dict(zip(PARTS, parts))
        self.theirs.save_pretrained(self.folder)
        self.ours = tinyti.load(self.folder)
        self.original = published.original(
            published.original_unet(parts[0]), published.original_vae(parts[1]), rewrite(parts[2])
        )
        self.tokenizer = self.folder / "tokenizer"

    def copy(self, to, part):
        """The folder again with a part that may be changed; the other parts are links."""
        to.mkdir()
        for child in self.folder.iterdir():
            if child.name == part:
                shutil.copytree(child, to / part)
            else:
                (to / child.name).symlink_to(child)
        return to / part

    def single(self, path, weights=None):
        """The original layout as a .safetensors file, with its vocabulary beside it."""
        weights = self.original if weights is None else weights
        save_file({key: weight.contiguous() for key, weight in weights.items()}, path)
        (path.parent / "tokenizer").symlink_to(self.tokenizer)
        return path


def of_family(name, **scheduler):
    @pytest.fixture(scope="module")
    def model(tmp_path_factory):
        return Published(name, tmp_path_factory.mktemp(name), **scheduler)

    return model


sd1, sd2, ldm = of_family("sd1"), of_family("sd2", prediction_type="v_prediction"), of_family("ldm")


@pytest.fixture(params=["sd1", "sd2", "ldm"])
def family(request):
    return request.getfixturevalue(request.param)


def assert_same(model, reference, rounded=False):
    """Identical modules: names, shapes, values, settings; and fit for use as they are."""
    for part in PARTS:
        ours, wanted = getattr(model, part), getattr(reference, part)
        assert type(ours) is type(wanted)
        # A single file tells neither its picture size nor the end token, which only the whole CLIP uses.
        unknown = {f.name: None for f in fields(ours.config) if f.name in ("sample_size", "eos_token_id")}
        assert replace(ours.config, **unknown) == replace(wanted.config, **unknown)
        ours, wanted = ours.state_dict(), wanted.state_dict()
        assert ours.keys() == wanted.keys()
        for key, weight in ours.items():
            assert weight.dtype == torch.float32 and weight.device.type == "cpu"
            assert torch.equal(weight, wanted[key].half().float() if rounded else wanted[key]), key
        assert not getattr(model, part).training
        assert not any(p.requires_grad for p in getattr(model, part).parameters())
    prompt = ["a photo of a cat", ""]
    assert torch.equal(model.tokenizer(prompt), reference.tokenizer(prompt))


def rename(folder, change):
    """Every key of a part's weights through a function."""
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    path.unlink()
    save_file({change(key): weight.clone() for key, weight in weights.items()}, path)
    return path


# -- folders -------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_weights_that_were_saved(family):
    for part, theirs in family.parts.items():
        wanted = {k.removeprefix("text_model."): w for k, w in theirs.state_dict().items()}
        ours = getattr(family.ours, part).state_dict()
        assert ours.keys() == {k for k in wanted if not k.startswith("to_logits.")}
        assert all(torch.equal(weight, wanted[key]) for key, weight in ours.items())


def test_text_encoder_of_older_transformers(sd1, tmp_path):
    """With a prefix; older still, with a buffer of positions; and as the text tower of a whole CLIP."""
    folder = sd1.copy(tmp_path / "m", "text_encoder")
    path = rename(folder, lambda key: "text_model." + key.removeprefix("text_model."))
    assert "text_model.final_layer_norm.weight" in load_file(path)
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)
    weights = load_file(path) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    weights |= {"text_projection.weight": torch.randn(128, 128)}
    path.unlink()
    save_file(weights, path)
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)


@pytest.mark.parametrize("name", ["sd1", "ldm"])
def test_vae_of_older_diffusers(name, tmp_path, request):
    model = request.getfixturevalue(name)
    folder = model.copy(tmp_path / "m", "vqvae" if name == "ldm" else "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def spell(key):
        return functools.reduce(lambda key, new: key.replace(new, old[new]), old, key)

    keys = load_file(rename(folder, spell)).keys()
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in keys and not any(".to_" in key for key in keys)
    assert_same(tinyti.load(tmp_path / "m"), model.ours)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_files(family, tmp_path, zipped):
    shutil.copytree(family.folder, tmp_path / "m")
    for path in (tmp_path / "m").glob("*/*.safetensors"):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        weights = {k: w.clone() for k, w in load_file(path).items()}
        torch.save(weights, path.parent / f"{stem}.bin", _use_new_zipfile_serialization=zipped)
        path.unlink()
    assert_same(tinyti.load(tmp_path / "m"), family.ours)


def test_fp16_variant(sd1, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(sd1.folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in tmp_path.glob("*/*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    assert_same(tinyti.load(tmp_path), sd1.ours, rounded=True)


def test_full_precision_comes_before_fp16_and_safetensors_before_bin(sd1, tmp_path):
    folder = sd1.copy(tmp_path / "m", "vae")
    full = folder / "diffusion_pytorch_model.safetensors"
    zeros = {key: torch.zeros_like(weight) for key, weight in load_file(full).items()}
    save_file(zeros, folder / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(zeros, folder / "diffusion_pytorch_model.bin")
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)
    weights = {key: weight.clone() for key, weight in load_file(full).items()}
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    full.unlink()
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)


def test_dtype(sd1):
    model = tinyti.load(sd1.folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for part in PARTS:
        wanted = getattr(sd1.ours, part).state_dict()
        for key, weight in getattr(model, part).state_dict().items():
            assert torch.equal(weight, wanted[key].bfloat16())


# -- single files --------------------------------------------------------------------------------------------


def lightning(weights):
    """What pytorch_lightning 1.x saves around the weights, and an average of them among them."""
    package, module = "pytorch_lightning", "pytorch_lightning.callbacks"
    with pytest.MonkeyPatch.context() as monkeypatch:  # it is not installed
        for name in (package, module):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        callback = type("ModelCheckpoint", (), {"__module__": module})
        sys.modules[module].ModelCheckpoint = callback
        instance = callback()
        instance.best_model_path = "last.ckpt"
        names = {k: "model_ema." + k[6:].replace(".", "") for k in weights if k.startswith("model.")}
        ema = {name: 0 * weights[k] for k, name in names.items()}
        ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7).int()}
        whole = {
            "epoch": 3,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": weights | ema,
            "callbacks": {callback: {"monitor": None, "best_model_score": np.float64(0.3)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
            "instance": instance,
            "curve": np.arange(3.0),
        }
        return saved(whole)


def saved(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


CKPTS = {
    "bare": lambda weights: saved(weights),
    "state_dict": lambda weights: saved({"state_dict": weights, "global_step": 470000}),
    "lightning": lightning,
    "fp16": lambda weights: saved({k: w.half() for k, w in weights.items()}),
}


@pytest.mark.parametrize("form", [*CKPTS, "safetensors"])
def test_single_file(family, form, tmp_path):
    if form == "safetensors":
        path = family.single(tmp_path / "model.safetensors")
    else:
        path = tmp_path / "model.ckpt"
        path.write_bytes(CKPTS[form](family.original))
        (tmp_path / "tokenizer").symlink_to(family.tokenizer)
    model = tinyti.load(path, prediction=family.ours.schedule.prediction_type)
    assert_same(model, family.ours, rounded=form == "fp16")
    assert model.schedule == family.ours.schedule
    assert model.size == {"sd1": 64, "sd2": 96, "ldm": 32}[family.family] * model.vae.factor


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_diffusers_reads_our_single_file_as_we_do(name, tmp_path, request):
    model = request.getfixturevalue(name)
    path = model.single(tmp_path / "model.safetensors")
    options = {"config": str(model.folder), "local_files_only": True}
    theirs = StableDiffusionPipeline.from_single_file(str(path), **options)
    for part, module in (("unet", theirs.unet), ("vae", theirs.vae), ("text", theirs.text_encoder)):
        wanted = model.parts[part].state_dict()
        assert module.state_dict().keys() == wanted.keys()
        assert all(torch.equal(weight, wanted[key]) for key, weight in module.state_dict().items())


class Nested:
    """Names with dots as attributes and items, the way diffusers' converter walks the original's modules."""

    def __init__(self, weights, name=""):
        self._weights, self._name = weights, name

    def __getattr__(self, part):
        name = f"{self._name}.{part}" if self._name else part
        weight = self._weights.get(name)
        return Nested(self._weights, name) if weight is None else torch.nn.Parameter(weight)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(i.start, i.stop)]
        return getattr(self, str(i))


def test_diffusers_reads_the_original_text_transformer_of_ldm_as_we_do(ldm):
    weights = {k.removeprefix("cond_stage_model."): w for k, w in ldm.original.items()}
    theirs = convert_ldm_bert_checkpoint(Nested(weights), ldm.theirs.bert.config).state_dict()
    wanted = ldm.theirs.bert.state_dict()
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[key]) for key, weight in theirs.items())


def with_text(model, text):
    """The model's original layout with another text transformer."""
    rest = {k: w for k, w in model.original.items() if not k.startswith("cond_stage_model.")}
    return rest | {f"cond_stage_model.{k}": w for k, w in text.items()}


@pytest.mark.parametrize("name, prefix", [("sd1", ""), ("sd2", ""), ("sd2", "text_model."), ("sd2", None)])
def test_text_transformers_of_converted_files(name, prefix, tmp_path, request):
    """From a transformers 5 folder diffusers' converter gives the text transformer CLIP's names, also SD2's,
    with or without the inner prefix; from older ones OpenCLIP's, without its last layer (None).
    """
    model = request.getfixturevalue(name)
    if prefix is None:
        text = published.original_openclip(model.parts["text"], extra=False)
    else:
        text = published.original_clip(model.parts["text"])
        text = {key.replace("text_model.", prefix): weight for key, weight in text.items()}
    path = model.single(tmp_path / "m.safetensors", with_text(model, text))
    if name == "sd2":
        fails(ValueError, path, "m.safetensors is a Stable Diffusion 2 file", "--prediction")
    assert_same(tinyti.load(path, prediction="v_prediction" if name == "sd2" else None), model.ours)


@pytest.mark.parametrize("unet, text", [("sd1", "sd2"), ("sd2", "ldm"), ("ldm", "sd2")])
def test_a_file_whose_parts_are_of_two_families(unet, text, tmp_path, request):
    unet, text = request.getfixturevalue(unet), request.getfixturevalue(text)
    mark = "cond_stage_model."
    other = {k.removeprefix(mark): w for k, w in text.original.items() if k.startswith(mark)}
    path = unet.single(tmp_path / "m.safetensors", with_text(unet, other))
    fails(ValueError, path, "does not describe a latent diffusion model", prediction="epsilon")


@pytest.mark.parametrize("width, sd2", [(768, True), (1024, False)])
def test_a_clip_of_the_other_familys_width(width, sd2):
    text = {"embeddings.token_embedding.weight": torch.zeros(9, width),
            "embeddings.position_embedding.weight": torch.zeros(77, width),
            "encoder.layers.0.mlp.fc1.weight": torch.zeros(1, width)}  # fmt: skip
    assert single.read_text_transformer(text, not sd2)[1].hidden_act == ("quick_gelu" if sd2 else "gelu")
    with pytest.raises(ValueError, match=f"width {width}"):
        single.read_text_transformer(text, sd2)


def test_prediction(sd1, sd2, tmp_path):
    """An SD2 file cannot say; a folder says; the argument overrules both."""
    path = sd2.single(tmp_path / "m.safetensors")
    assert tinyti.load(path, prediction="epsilon").schedule.prediction_type == "epsilon"
    assert tinyti.load(path, prediction="epsilon").size == 64 * 2
    assert tinyti.load(path, prediction="v_prediction").schedule.prediction_type == "v_prediction"
    assert sd2.ours.schedule.prediction_type == "v_prediction"
    assert sd1.ours.schedule.prediction_type == "epsilon"
    assert tinyti.load(sd2.folder, prediction="epsilon").schedule.prediction_type == "epsilon"
    fails(ValueError, sd2.folder, "prediction is 'eps'; it is epsilon, v_prediction", prediction="eps")


def test_vocabulary_of_a_single_file(sd1, sd2, tmp_path):
    path = sd1.single(tmp_path / "m.safetensors")
    assert_same(tinyti.load(path), sd1.ours)
    (tmp_path / "tokenizer").unlink()
    fails(FileNotFoundError, path, "no vocabulary at", "tokenizer, ", "--tokenizer")
    assert_same(tinyti.load(path, tokenizer=sd1.tokenizer), sd1.ours)
    fails(FileNotFoundError, path, "no vocabulary at", "nowhere", tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    fails(FileNotFoundError, path, "empty: found nothing, expected tok", tokenizer=tmp_path / "empty")
    ids = tinyti.load(path, tokenizer=sd2.tokenizer).tokenizer(["a cat"])
    assert ids[0, -1] == 0 and sd1.ours.tokenizer(["a cat"])[0, -1] != 0  # the argument comes first


# -- the published names -------------------------------------------------------------------------------------

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
    config = folder.read_config(kind, raw, "config.json")
    with torch.device("meta"):
        ours = folder.NETWORKS[kind](config)
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
    UNetConfig: "class_embeddings_concat cross_attention_norm dropout reverse_transformer_layers_per_block "
                "upcast_attention",
    VAEConfig: "down_block_types up_block_types force_upcast sample_size",
    TextConfig: "attention_dropout bos_token_id initializer_factor initializer_range pad_token_id "
                "projection_dim",
    LDMBertConfig: "activation_dropout attention_dropout classifier_dropout dropout encoder_layerdrop "
                   "init_std num_hidden_layers pad_token_id scale_embedding use_cache",
}  # fmt: skip
# Those that change a name or a shape among the weights, by which the strict build refuses them, as these do.
TRACED = {
    UNetConfig: [
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
         "addition_embed_type_num_heads": 64, "projection_class_embeddings_input_dim": 8},
        {"attention_type": "gated"}, {"conv_in_kernel": 5}, {"conv_out_kernel": 5},
        {"dual_cross_attention": True}, {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"},
        {"mid_block_type": None}, {"num_class_embeds": 8}, {"resnet_time_scale_shift": "scale_shift"},
        {"time_cond_proj_dim": 8}, {"time_embedding_dim": 8}, {"time_embedding_type": "fourier"},
        {"transformer_layers_per_block": 2},
    ],
    VAEConfig: [{name: False} for name in ("mid_block_add_attention", "use_quant_conv",
                                                "use_post_quant_conv")],
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS, ids=lambda kind: kind.__name__)
def test_no_setting_of_theirs_is_overlooked(kind):
    """A setting that diffusers or transformers may write is ours, fixed, traced or known to be harmless."""
    network = {UNetConfig: TheirUNet, VAEConfig: AutoencoderKL}.get(kind)
    if network:
        theirs = inspect.signature(network).parameters.keys()
    else:
        config = CLIPTextConfig if kind is TextConfig else TheirBertConfig
        theirs = vars(config()).keys() - vars(PretrainedConfig()).keys()
    harmless = set(HARMLESS[kind].split())
    traced = {name for settings in TRACED.get(kind, []) for name in settings}
    assert len(theirs) > 10
    assert theirs <= {f.name for f in fields(kind)} | folder.FIXED[kind].keys() | harmless | traced
    assert harmless | traced <= theirs


@pytest.mark.parametrize("kind, settings", [(kind, x) for kind, table in TRACED.items() for x in table])
def test_settings_that_leave_a_trace(kind, settings):
    network, raw = (TheirUNet, UNETS["sd15"]) if kind is UNetConfig else (AutoencoderKL, VAE)
    theirs = theirs_on_meta(network, raw | settings).state_dict()
    with pytest.raises(ValueError, match="expected is"):
        folder.build(folder.read_config(kind, raw | settings, "config.json"), theirs)


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
DIFFUSION = "diffusion_pytorch_model"
DOWNLOADS = {  # what the repository holds, and which large files the command brings
    "weights/sd15": (SAFETENSORS, {"text_encoder/model", f"unet/{DIFFUSION}", f"vae/{DIFFUSION}"}),
    "weights/ldm": (BINS, {"bert/pytorch_model", f"unet/{DIFFUSION}", f"vqvae/{DIFFUSION}"}),
    "weights/clip-vit-base-patch32": (CLIP, {"pytorch_model"}),
    "weights/sd15-file": (SAFETENSORS, {"v1-5-pruned-emaonly"}),
}
for _name in ("weights/sd14", "weights/sd21-base", "weights/sd21"):
    DOWNLOADS[_name] = DOWNLOADS["weights/sd15"]


def test_the_commands_of_the_readme_bring_what_is_needed():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("hf download ")]
    assert shlex.split(folder.DOWNLOAD) in commands
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


# -- what is refused -----------------------------------------------------------------------------------------


def fails(kind, path, *words, **settings):
    """Loading fails with one error of this kind, whose message has all these words."""
    with pytest.raises(kind) as caught:
        tinyti.load(path, **settings)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert caught.value.__cause__ is None


def edit(path, change):
    """A weights file with its dictionary of weights changed."""
    weights = {key: weight.clone() for key, weight in load_file(path).items()}
    change(weights)
    path.unlink()
    save_file(weights, path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_nothing_there(tmp_path):
    for name in ("nowhere", "nowhere/model.ckpt"):
        fails(FileNotFoundError, tmp_path / name, name, "weights/README.md", folder.DOWNLOAD)
    fails(FileNotFoundError, tmp_path, "config.json is missing", "whole model folder")


@pytest.mark.parametrize("part, file, found", [
    ("unet", "config.json", "weights/README.md"), ("vae", "config.json", "weights/README.md"),
    ("unet", "diffusion_pytorch_model.safetensors", "weights/README.md"),
    ("text_encoder", "config.json", "weights/README.md"),
    ("text_encoder", "model.safetensors", "weights/README.md"),
    ("scheduler", "scheduler_config.json", "weights/README.md"), ("tokenizer", "", "--tokenizer"),
])  # fmt: skip
def test_a_file_of_a_folder_is_missing(sd1, part, file, found, tmp_path):
    folder = sd1.copy(tmp_path / "m", part)
    (folder / file).unlink() if file else shutil.rmtree(folder)
    fails(FileNotFoundError, tmp_path / "m", part, file.removesuffix(".safetensors"), found)


def test_a_vocabulary_of_another_model(sd1, ldm, tmp_path):
    (tmp_path / "big").mkdir()
    vocabulary = {"".join(chr(97 + i // 26**j % 26) for j in range(3)): i for i in range(3000)}
    vocabulary |= {"<|startoftext|>": 3000, "<|endoftext|>": 3001}
    write_json(tmp_path / "big" / "vocab.json", vocabulary)
    (tmp_path / "big" / "merges.txt").write_text("#version: 0.2\n")
    fails(ValueError, sd1.folder, "3002 entries", "523 rows", tokenizer=tmp_path / "big")


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_folders_of_other_families(part, tmp_path):
    (tmp_path / part).mkdir()
    fails(ValueError, tmp_path, f"it has a {part}, as Stable Diffusion XL", "supported are Stable")


@pytest.mark.parametrize("key", [
    "conditioner.embedders.1.model.ln_final.weight",  # Stable Diffusion XL
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",  # Stable Diffusion 3
    "double_blocks.0.img_attn.proj.weight",  # Flux
    "down_blocks.0.resnets.0.conv1.weight",  # a part of a folder
])  # fmt: skip
@pytest.mark.parametrize("ending, save", [("safetensors", save_file), ("ckpt", torch.save)])
def test_files_of_other_families(key, ending, save, tmp_path):
    # SDXL's files have a UNet and a VAE under the same names as ours.
    keys = ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", key)
    save({key: torch.zeros(4) for key in keys}, tmp_path / f"m.{ending}")
    fails(ValueError, tmp_path / f"m.{ending}", f"m.{ending}", "no cond_stage_model.* keys", "supported are")


@pytest.mark.parametrize("channels, what", [(9, "an inpainting model"), (5, "a model of another kind")])
def test_unets_that_take_more_than_latents(sd1, channels, what, tmp_path):
    unet = published.tiny_unet(128, 8, in_channels=channels)
    unet.save_pretrained(sd1.copy(tmp_path / "m", "unet"))
    fails(ValueError, tmp_path / "m", what, f"{channels} channels", "supported are")
    inner = {f"model.diffusion_model.{k}": w for k, w in published.original_unet(unet).items()}
    path = sd1.single(tmp_path / "m.safetensors", sd1.original | inner)
    fails(ValueError, path, what, f"{channels} channels", "supported are")


@pytest.mark.parametrize("part, stem, key", [
    ("unet", "diffusion_pytorch_model", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    ("vae", "diffusion_pytorch_model", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"),
    ("text_encoder", "model", "encoder.layers.2.mlp.fc1.bias"),
])  # fmt: skip
def test_a_key_of_a_folder_is_missing_left_over_or_misshapen(sd1, part, stem, key, tmp_path):
    path = sd1.copy(tmp_path / "m", part) / f"{stem}.safetensors"
    shape = tuple(load_file(path)[key].shape)
    edit(path, lambda weights: weights.update({key: torch.zeros(3, 5)}))
    fails(ValueError, tmp_path / "m", key, "(3, 5)", str(shape))
    edit(path, lambda weights: weights.pop(key))
    fails(ValueError, tmp_path / "m", key, "it has nothing, expected is floats", str(shape))
    edit(path, lambda weights: weights.update({key: torch.zeros(shape), key + "_2": torch.zeros(1)}))
    fails(ValueError, tmp_path / "m", key + "_2", "expected is nothing")
    path.write_bytes(path.read_bytes()[:-1])
    fails(ValueError, tmp_path / "m", str(path), "does not describe a file of weights", "download it again")


MISSING = {  # in the file, and in the error; the first are those that the configuration is read from
    "model.diffusion_model.input_blocks.0.0.weight": "conv_in.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": "attn2.to_k.weight",
    "first_stage_model.encoder.down.1.block.0.conv1.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": "layers.0.mlp.fc1.weight",
    "model.diffusion_model.input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "model.diffusion_model.output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "first_stage_model.decoder.up.1.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
    "first_stage_model.decoder.mid.attn_1.q.bias": "decoder.mid_block.attentions.0.to_q.bias",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": "final_layer_norm.bias",
}


@pytest.mark.parametrize("key", MISSING)
def test_a_key_of_a_single_file_is_missing_or_misshapen(sd1, key, tmp_path):
    weights = dict(sd1.original)
    weight = weights.pop(key)
    path = sd1.single(tmp_path / "m.safetensors", weights)
    fails(ValueError, path, MISSING[key], "supported are")
    edit(path, lambda weights: weights.update({key: torch.cat([weight, weight], dim=-1)}))
    fails(ValueError, path, "shape", "expected")


def test_a_key_of_a_single_file_is_left_over(sd1, tmp_path):
    path = sd1.single(tmp_path / "m.safetensors")
    for key in ("model.diffusion_model.input_blocks.1.2.weight", "control_model.input_blocks.0.0.weight",
                "first_stage_model.decoder.up.0.attn.0.q.weight", "model_ema_2.decay",
                "cond_stage_model.transformer.text_model.head.weight"):  # fmt: skip
        edit(path, lambda weights, key=key: weights.update({key: torch.zeros(1)}))
        fails(ValueError, path, ".".join(key.split(".")[-2:]), "expected is nothing", "supported are")
        edit(path, lambda weights, key=key: weights.pop(key))


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.pt", "m.safetensors"])
def test_no_weights_at_all(name, tmp_path):
    """What git leaves for a large file, a web page, nothing, half a picture, other pickles, cut files."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4265380512\n"
    others = [b"<!DOCTYPE html><html>", b"", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", pickle.dumps([1, 2])]
    zero = torch.zeros(1)
    others += [saved(content) for content in ([zero], zero, {"state_dict": 5}, {}, {"lr": 1.0}, {0: zero})]
    weights = {"a.weight": torch.zeros(2, 2), "b": torch.ones(300)}
    whole = [saved(weights), saved(weights, _use_new_zipfile_serialization=False), serialize(weights)]
    cut = [data[:keep] for data in whole for keep in (4, len(data) // 2, -1)]
    for content in (pointer, *others, *cut):
        (tmp_path / name).write_bytes(content)
        fails(ValueError, tmp_path / name, name, "does not describe a")


@pytest.mark.parametrize("zipped", [True, False])
def test_random_damage_gives_the_same_error(zipped, tmp_path):
    """Bytes changed at random: weights, or an error of ours that names the file, and nothing else."""
    rng = np.random.default_rng(0)
    weights = {"a.weight": torch.zeros(2, 2), "b": torch.ones(3)}
    clean = saved({"state_dict": weights, "epoch": 1}, _use_new_zipfile_serialization=zipped)
    outcomes = set()
    for _ in range(500):
        content = bytearray(clean)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        (tmp_path / "m.bin").write_bytes(content)
        try:
            outcomes.add(type(tensors.read_tensors(tmp_path / "m.bin")))
        except ValueError as error:
            assert "m.bin" in str(error)
            outcomes.add(ValueError)
    assert outcomes == {dict, ValueError}


class Attack:
    """A pickle that makes a file when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["bin", "ckpt", "ckpt beside the weights"])
def test_code_in_a_pickle_never_runs(sd1, zipped, place, tmp_path):
    attack = Attack(tmp_path / "proof")
    if place == "bin":
        folder = sd1.copy(tmp_path / "m", "unet")
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        path, target = folder / "diffusion_pytorch_model.bin", tmp_path / "m"
        content = weights | {"conv_in.bias": attack}
    else:
        path = target = tmp_path / "m.ckpt"
        content = {"state_dict": sd1.original, "callbacks": attack}
        content = attack if place == "ckpt" else content
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    (tmp_path / "proof").rmdir()  # the attack is real
    fails(ValueError, target, str(path), "posix.mkdir, which was not run", "as .safetensors")
    assert not (tmp_path / "proof").exists()


def test_code_under_the_names_of_bookkeeping_never_runs(sd1, tmp_path):
    """numpy has functions that run text; under their names stand stubs."""
    from numpy.testing._private import utils

    proof = tmp_path / "proof"

    class Runs:
        def __reduce__(self):
            return utils.runstring, (f"import os; os.mkdir({str(proof)!r})", {})

    torch.save({"state_dict": sd1.original, "callbacks": Runs()}, tmp_path / "m.ckpt")
    torch.load(tmp_path / "m.ckpt", weights_only=False)
    proof.rmdir()
    assert_same(tinyti.load(tmp_path / "m.ckpt", tokenizer=sd1.tokenizer), sd1.ours)
    assert not proof.exists()


def test_fp16_on_the_cpu(sd1):
    fails(ValueError, sd1.folder, "fp16 is for GPUs", "torch.float32", "torch.bfloat16", dtype=torch.float16)


@pytest.mark.parametrize("part, setting, value", [
    ("unet", "only_cross_attention", True), ("unet", "freq_shift", 1), ("vae", "shift_factor", 0.1),
    ("vae", "latents_mean", [0.0] * 4), ("text_encoder", "hidden_act", "relu"),
    ("scheduler", "prediction_type", "sample"), ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
    ("scheduler", "timestep_spacing", "karras"), ("scheduler", "trained_betas", [0.1, 0.2]),
    ("scheduler", "clip_sample", True), ("scheduler", "thresholding", True),
    ("scheduler", "rescale_betas_zero_snr", True),
])  # fmt: skip
def test_settings_that_would_change_the_numbers(sd1, part, setting, value, tmp_path):
    (path,) = sd1.copy(tmp_path / "m", part).glob("*config.json")
    write_json(path, json.loads(path.read_text()) | {setting: value})
    found = str(value)[1:-1]  # without brackets or the first and last letter
    fails(ValueError, tmp_path / "m", f"m/{part}/{path.name}", f"{setting} is ", found, "supported")


def tiny(folder, file, content):
    """The model in weights/ with other contents of one file; the rest are links."""
    shutil.copytree(TINY, folder, copy_function=os.symlink)
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("content, found", [
    ("{", "line 1"), ("[" * 100_000, ""), ("[]", "it holds a list"), ("1" * 10_000, ""), ("\xff", "line 1"),
])  # fmt: skip
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_json(file, content, found, tmp_path):
    fails(ValueError, tiny(tmp_path / "m", file, content), file, "does not describe a JSON object", found)


NONSENSE = {
    "unet": {"block_out_channels": ["abc", [], [32, 64], [32, 64, "x"], [33, 64, 128], 5, [10**30]],
             "attention_head_dim": [3, 0, -1, [4], "4", {}, 10**9], "layers_per_block": [10**9, 0, 1.5, True],
             "norm_eps": [0, -1.0, "1e-5", [1]], "norm_num_groups": [7, 0, 10**18], "sample_size": [[16, 16]],
             "down_block_types": ["abc", [1, 2, 3], ["DownBlock2D"]], "cross_attention_dim": [[128], 10**19]},
    "vae": {"block_out_channels": ["abc", [], [7], [[]]], "layers_per_block": [-1, 10**9],
            "scaling_factor": [0, "x"], "norm_num_groups": [0, 13], "latent_channels": ["4", 10**6]},
    "text_encoder": {"num_attention_heads": [5, 0, "8"], "num_hidden_layers": [10**12], "vocab_size": [-1],
                     "hidden_size": [None, 1, "x"], "layer_norm_eps": [float("nan"), float("inf")],
                     "max_position_embeddings": [5, [77]], "hidden_act": [["gelu"], 5]},
    "scheduler": {"beta_end": [5, "0.1", [0.1], -1], "num_train_timesteps": [0, "x", 10**30, 1.5],
                  "timestep_spacing": [1, []], "steps_offset": [-1, 10**6], "set_alpha_to_one": ["yes", 3.5]},
}  # fmt: skip


@pytest.mark.parametrize("part, name", [(part, name) for part, table in NONSENSE.items() for name in table])
def test_nonsense_in_a_configuration_is_one_line(part, name, tmp_path):
    file = TINY / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    for i, value in enumerate(NONSENSE[part][name]):
        content = json.loads(file.read_text()) | {name: value}
        folder = tiny(tmp_path / f"two\nlines{i}", file.relative_to(TINY), content)
        with pytest.raises(ValueError, match=rf"two lines{i}/{part}") as caught:
            tinyti.load(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name, value", [
    ("crop_size", 999), ("crop_size", {"height": 16}), ("size", "big"), ("size", []),
    ("image_std", [0, 1, 1]), ("image_mean", 5), ("resample", 99),
])  # fmt: skip
def test_nonsense_in_a_preprocessing(name, value, tmp_path):
    content = json.loads((TINY / "clip" / "preprocessor_config.json").read_text()) | {name: value}
    with pytest.raises(ValueError, match="m/clip"):
        tinyti.load_clip(tiny(tmp_path / "m", "clip/preprocessor_config.json", content) / "clip")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "m.ckpt"])
def test_what_is_no_regular_file_is_not_opened(file, tmp_path):
    """A pipe, which would wait for ever, and a device that never ends."""
    shutil.copytree(TINY, tmp_path / "m", copy_function=os.symlink)
    path = tmp_path / "m" / file
    target = path if file == "m.ckpt" else tmp_path / "m"
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises((ValueError, FileNotFoundError), match=r"unet|no regular file"):
            tinyti.load(target)


def random_damage(weights, dice):
    """One entry with another type, shape or name."""
    damaged, key = dict(weights), dice.choice(sorted(weights))
    weight, huge = damaged[key], key.replace("1", "9" * 5000)
    new = [5, None, "x", [], {}, torch.tensor(1.0), torch.zeros(0), torch.zeros(3, dtype=torch.int64),
           torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), weight.bool(), weight[None],
           torch.zeros(1, device="meta"), torch.zeros(1).expand(weight.shape[:1])]  # fmt: skip
    if dice.random() < 0.3:
        del damaged[key]
        damaged[dice.choice([key + ".0", "", "\n", key[:-7], key.upper(), 7, huge])] = weight
    else:
        damaged[key] = dice.choice(new)
    return damaged


def test_random_damage_of_a_single_file(sd1, ldm, tmp_path):
    """Types, shapes and names changed at random: a model, or one line that names the file."""
    dice = random.Random(0)
    for model in (sd1, ldm):
        for _ in range(15):
            torch.save(random_damage(model.original, dice), tmp_path / "m.ckpt")
            try:
                parts = single.read_single_file(tmp_path / "m.ckpt", "epsilon")
                for part in (parts.unet, parts.vae, parts.text):
                    folder.build(*part)
            except ValueError as error:
                assert "m.ckpt" in str(error) and "\n" not in str(error)


def test_a_folder_that_is_no_clip(sd1):
    with pytest.raises(ValueError, match=r"text_encoder/config\.json lacks text_config"):
        tinyti.load_clip(sd1.folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json is missing"):
        tinyti.load_clip(sd1.folder / "nowhere")
