"""One set of weights gives the same networks in every published container: folders and single files."""

import shutil
import sys
import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint
from numpy.testing._private import utils
from safetensors.torch import load_file, save_file

import tinyti

from . import published
from .conftest import saved

PARTS = ("unet", "vae", "text")


def assert_same(model, reference, rounded=False):
    """Identical networks: names, shapes, values, settings; and fit for use as they are."""
    for part in PARTS:
        ours, wanted = getattr(model, part), getattr(reference, part)
        assert type(ours) is type(wanted)
        # A single file tells neither its picture size nor the end token, which only the whole CLIP uses.
        unknown = {f.name: None for f in fields(ours.config) if f.name in ("sample_size", "eos_token_id")}
        assert replace(ours.config, **unknown) == replace(wanted.config, **unknown)
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
        ours, wanted = ours.state_dict(), wanted.state_dict()
        assert ours.keys() == wanted.keys()
        for key, weight in ours.items():
            assert weight.dtype == torch.float32 and weight.device.type == "cpu"
            assert torch.equal(weight, wanted[key].half().float() if rounded else wanted[key]), key
    prompt = ["a photo of a cat", ""]
    assert torch.equal(model.tokenizer(prompt), reference.tokenizer(prompt))


def rewrite(path, spell, more=None):
    """A weights file again with every key through a function, and more entries."""
    weights = {spell(key): weight.clone() for key, weight in load_file(path).items()}
    path.unlink()
    save_file(weights | (more or {}), path)


# -- folders -------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_weights_that_were_saved(family):
    for part, theirs in family.parts.items():
        wanted = {k.removeprefix("text_model."): w for k, w in theirs.state_dict().items()}
        ours = getattr(family.ours, part).state_dict()
        assert ours.keys() == {k for k in wanted if not k.startswith("to_logits.")}
        assert all(torch.equal(weight, wanted[key]) for key, weight in ours.items())


def test_text_encoder_of_older_transformers(sd1, tmp_path):
    """With a prefix; older still, with a buffer of positions; and as the text tower of a whole CLIP."""
    path = sd1.copy(tmp_path / "m", "text_encoder") / "model.safetensors"
    rewrite(path, lambda key: "text_model." + key.removeprefix("text_model."))
    assert "text_model.final_layer_norm.weight" in load_file(path)
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    more |= {"text_projection.weight": torch.randn(128, 128)}
    rewrite(path, str, more)
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)


@pytest.mark.parametrize("name, part", [("sd1", "vae"), ("ldm", "vqvae")])
def test_vae_of_older_diffusers(name, part, tmp_path, request):
    model = request.getfixturevalue(name)
    path = model.copy(tmp_path / "m", part) / "diffusion_pytorch_model.safetensors"

    def spell(key):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    rewrite(path, spell)
    keys = load_file(path).keys()
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in keys and not any(".to_" in key for key in keys)
    assert_same(tinyti.load(tmp_path / "m"), model.ours)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_files(family, tmp_path, zipped):
    shutil.copytree(family.folder, tmp_path / "m")
    paths = sorted((tmp_path / "m").rglob("*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        content = saved(load_file(path), _use_new_zipfile_serialization=zipped)
        stem = "pytorch_model" if path.stem == "model" else path.stem
        path.with_name(f"{stem}.bin").write_bytes(content)
        path.unlink()
    assert_same(tinyti.load(tmp_path / "m"), family.ours)


def test_fp16_variant(sd1, tmp_path):
    half = StableDiffusionPipeline.from_pretrained(sd1.folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    names = [path.name for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert names == ["model.fp16.safetensors", *["diffusion_pytorch_model.fp16.safetensors"] * 2]
    assert_same(tinyti.load(tmp_path), sd1.ours, rounded=True)


def test_full_precision_comes_before_fp16_and_safetensors_before_bin(sd1, tmp_path):
    path = sd1.copy(tmp_path / "m", "vae") / "diffusion_pytorch_model.safetensors"
    weights = {key: weight.clone() for key, weight in load_file(path).items()}
    zeros = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    save_file(zeros, path.with_suffix(".fp16.safetensors"))
    torch.save(zeros, path.with_suffix(".bin"))
    assert_same(tinyti.load(tmp_path / "m"), sd1.ours)
    torch.save(weights, path.with_suffix(".bin"))
    path.unlink()
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
    with pytest.MonkeyPatch.context() as patch:  # it is not installed
        for name in (package, module):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        callback = type("ModelCheckpoint", (), {"__module__": module})
        sys.modules[module].ModelCheckpoint = callback
        instance = callback()
        instance.best_model_path = "last.ckpt"
        names = {k: "model_ema." + k[6:].replace(".", "") for k in weights if k.startswith("model.")}
        ema = {name: 0 * weights[k] for k, name in names.items()}
        ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7).int()}
        whole = {"epoch": 3, "pytorch-lightning_version": "1.4.2", "state_dict": weights | ema}
        whole["callbacks"] = {callback: {"monitor": None, "best_model_score": np.float64(0.3)}}
        whole["optimizer_states"] = [{"state": {0: torch.zeros(3)}, "param_groups": [{"lr": 1e-4}]}]
        return saved(whole | {"instance": instance, "curve": np.arange(3.0)})


CKPTS = {
    "bare": saved,
    "state_dict": lambda weights: saved({"state_dict": weights, "global_step": 470000}),
    "lightning": lightning,
    "fp16": lambda weights: saved({k: w.half() for k, w in weights.items()}),
}


@pytest.mark.parametrize("form", [*CKPTS, "safetensors"])
def test_single_file(family, form, tmp_path):
    path = family.single(tmp_path / "model.safetensors")
    if form != "safetensors":
        path.unlink()
        path = tmp_path / "model.ckpt"
        path.write_bytes(CKPTS[form](family.original))
    model = tinyti.load(path, prediction=family.ours.schedule.prediction_type)
    assert_same(model, family.ours, rounded=form == "fp16")
    assert model.schedule.timestep_spacing is None  # each sampler has its own
    assert replace(model.schedule, timestep_spacing="leading") == family.ours.schedule
    assert model.size == {"sd1": 64, "sd2": 96, "ldm": 32}[family.family] * model.vae.factor


class Stubbed:
    """numpy has functions that run text; under their names stand stubs, as for all bookkeeping."""

    def __init__(self, folder):
        self.code = f"import os; os.mkdir({str(folder)!r})"

    def __reduce__(self):
        return utils.runstring, (self.code, {})


def test_code_under_the_names_of_bookkeeping_never_runs(sd1, tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "m.ckpt"
    torch.save({"state_dict": sd1.original, "callbacks": Stubbed(proof)}, path)
    torch.load(path, weights_only=False)
    proof.rmdir()  # it does run
    assert_same(tinyti.load(path, tokenizer=sd1.tokenizer), sd1.ours)
    assert not proof.exists()


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
    path = model.single(tmp_path / "m.safetensors", model.with_text(text))
    if name == "sd2":
        with pytest.raises(ValueError, match=r"m\.safetensors is a Stable Diffusion 2 file.*--prediction"):
            tinyti.load(path)
    assert_same(tinyti.load(path, prediction="v_prediction" if name == "sd2" else None), model.ours)


def test_prediction(sd1, sd2, tmp_path):
    """An SD2 file cannot say; a folder says; the argument overrules both."""
    path = sd2.single(tmp_path / "m.safetensors")
    assert tinyti.load(path, prediction="epsilon").schedule.prediction_type == "epsilon"
    assert tinyti.load(path, prediction="epsilon").size == 64 * 2
    assert tinyti.load(path, prediction="v_prediction").schedule.prediction_type == "v_prediction"
    assert sd2.ours.schedule.prediction_type == "v_prediction"
    assert sd1.ours.schedule.prediction_type == "epsilon"
    assert tinyti.load(sd2.folder, prediction="epsilon").schedule.prediction_type == "epsilon"


def test_vocabulary_of_a_single_file(sd1, sd2, tmp_path):
    path = sd1.single(tmp_path / "m.safetensors")
    assert_same(tinyti.load(path), sd1.ours)
    (tmp_path / "tokenizer").unlink()
    assert_same(tinyti.load(path, tokenizer=sd1.tokenizer), sd1.ours)
    ids = tinyti.load(path, tokenizer=sd2.tokenizer).tokenizer(["a cat"])
    assert ids[0, -1] == 0 and sd1.ours.tokenizer(["a cat"])[0, -1] != 0  # the argument comes first
