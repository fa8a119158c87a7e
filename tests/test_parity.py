"""Our networks against diffusers' and transformers', with the same random weights and inputs: tiny ones, and
with `pytest -m slow` those of the published sizes, which take gigabytes and minutes."""

import gc

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, ViTConfig, ViTModel

import tinyti
from tinyti.files.folder import NETWORKS, build, read_clip, read_config
from tinyti.networks.clip import TextConfig
from tinyti.networks.ldmbert import LDMBertConfig
from tinyti.networks.unet import UNetConfig
from tinyti.networks.vae import VAEConfig
from tinyti.networks.vision import DINOPreprocessing

from . import published
from .conftest import randomise, relative_error

OUTPUT, GRADIENT = 1e-5, 1e-4  # the largest errors that we accept, relative to the scale of what is compared

UNET = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 16,
}
UNETS = {
    "sd1": UNET | {"attention_head_dim": 4, "cross_attention_dim": 24},
    "sd2": UNET | {"attention_head_dim": [2, 4, 4], "cross_attention_dim": 40, "use_linear_projection": True},
    "ldm": UNET | {"attention_head_dim": 8, "cross_attention_dim": 48, "layers_per_block": 1},
}
VAE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 16,
}
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP_TEXT = TOWER | {"vocab_size": 100, "eos_token_id": 99}
BERT = {"vocab_size": 60, "encoder_layers": 3, "encoder_ffn_dim": 64, "encoder_attention_heads": 4}
TEXTS = {
    "quick_gelu": (TextConfig, CLIPTextModel, CLIP_TEXT | {"hidden_act": "quick_gelu"}),
    "gelu": (TextConfig, CLIPTextModel, CLIP_TEXT | {"hidden_act": "gelu"}),
    "ldm": (LDMBertConfig, LDMBertModel, BERT | {"head_dim": 6, "d_model": 40, "dropout": 0.0}),
}


def sizes(tiny, full):
    """Parameters of a test: the tiny networks of a table, and with the mark `slow` those of another."""
    slow = [pytest.param(case, marks=pytest.mark.slow, id=f"published {name}") for name, case in full.items()]
    return [pytest.param(case, id=name) for name, case in tiny.items()] + slow


def pair(kind, their_kind, raw):
    """Their network, and ours of the configuration and the weights that theirs would save."""
    theirs = published.random_network(their_kind, raw)
    saved = theirs.config.to_dict() if hasattr(theirs.config, "to_dict") else dict(theirs.config)
    weights = {name.removeprefix("text_model."): w for name, w in theirs.state_dict().items()}
    return theirs, build(read_config(kind, saved, "config.json"), weights)


@pytest.fixture(autouse=True)
def inputs():
    """Inputs that do not depend on the tests before; and gigabytes are freed."""
    torch.manual_seed(0)
    yield
    gc.collect()


@pytest.mark.parametrize("size", [(16, 16), (9, 14)], ids=["even", "odd"])
@pytest.mark.parametrize("raw", sizes(UNETS, published.UNETS))
def test_unet(raw, size):
    theirs, unet = pair(UNetConfig, UNet2DConditionModel, raw)
    x, t = torch.randn(3, 4, *size), torch.tensor([0, 500, 999])
    outputs, gradients = [], []
    context = torch.randn(3, 77, raw["cross_attention_dim"])
    for run in (lambda c: theirs(x, t, c).sample, lambda c: unet(x, t, c)):
        c = context.clone().requires_grad_()
        output = run(c)
        outputs.append(output)
        gradients += torch.autograd.grad(output.square().mean(), c)
    assert outputs[0].std() > 1e-2 and gradients[0].abs().max() > 0
    assert relative_error(*outputs) <= OUTPUT
    assert relative_error(*gradients) <= GRADIENT


def test_unet_checkpointing_changes_nothing():
    _, unet = pair(UNetConfig, UNet2DConditionModel, UNETS["sd1"])
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 24)
    gradients = []
    for unet.checkpointing in (False, True):
        c = context.clone().requires_grad_()
        gradients += torch.autograd.grad(unet(x, 10, c).square().mean(), c)
    assert torch.equal(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (5, 11)])
@pytest.mark.parametrize("raw", sizes({"tiny": VAE}, {"vae": published.VAE}))
def test_vae(raw, size):
    """Encoder and decoder, each alone; `size` is the latents'."""
    theirs, vae = pair(VAEConfig, AutoencoderKL, raw)
    images = torch.rand(2, 3, *(vae.factor * side for side in size)) * 2 - 1
    mean, std = vae.encode(images)
    reference = theirs.encode(images).latent_dist
    assert mean.shape == (2, 4, *size)
    assert relative_error(reference.mean, mean) <= OUTPUT
    assert relative_error(reference.std, std) <= OUTPUT
    z = torch.randn(2, 4, *size)
    assert vae.decode(z).shape == images.shape
    assert relative_error(theirs.decode(z).sample, vae.decode(z)) <= OUTPUT


@torch.no_grad()
@pytest.mark.parametrize("case", sizes(TEXTS, published.TEXTS))
def test_text(case):
    theirs, text = pair(*case)
    ids = torch.randint(0, len(text.table) - 1, (3, 77))
    embeds = text.embed(ids)
    if isinstance(theirs, CLIPTextModel):
        assert torch.equal(embeds, theirs.get_input_embeddings()(ids))  # bare rows, without positions
    wanted = theirs(ids)[0]
    assert wanted.std() > 1e-2
    assert relative_error(wanted, text(embeds)) <= OUTPUT


def test_clip_text_accepts_ids_above_the_vocabulary():
    text = NETWORKS[TextConfig](TextConfig(vocab_size=10, hidden_size=8, num_hidden_layers=0))
    assert text.embed(torch.tensor([[3, 10, 57]])).shape == (1, 3, 8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A whole CLIP as a published folder: theirs, and ours read from it."""
    folder = tmp_path_factory.mktemp("clip")
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=CLIP_TEXT, vision_config=vision, projection_dim=20)
    theirs = randomise(CLIPModel(config))
    theirs.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    config, weights, preprocess = read_clip(folder)
    return theirs, processor, build(config, weights, preprocess=preprocess)


def test_clip_encode_text(clips):
    theirs, _, clip = clips
    ids = torch.randint(0, 99, (4, 77))
    for row, end in zip(ids, (3, 10, 40, 76)):
        row[end:] = 99  # padded with end tokens, of which the first counts
    reference = theirs.get_text_features(ids)
    reference = getattr(reference, "pooler_output", reference)
    assert relative_error(torch.nn.functional.normalize(reference, dim=-1), clip.encode_text(ids)) <= OUTPUT


def test_clip_encode_image_and_preprocessing(clips, pictures):
    theirs, processor, clip = clips
    reference = processor(pictures, return_tensors="pt")["pixel_values"]
    assert relative_error(reference, clip.preprocess(pictures)) <= OUTPUT
    features = theirs.get_image_features(reference)
    features = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
    assert relative_error(features, clip.encode_image(pictures)) <= OUTPUT
    assert clip.encode_image(pictures).norm(dim=-1).allclose(torch.ones(len(pictures)))


VITS = {"with a pooler": TOWER | {"image_size": 32, "patch_size": 8}}
DINOS = {"dino-vits16": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}}


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("raw", [*VITS.values(), *DINOS.values()], ids=[*VITS, *DINOS])
def test_dino(raw, suffix, pooled, tmp_path, pictures):
    """A folder of theirs, whose class token ours gives, with and without the pooler that is left out."""
    theirs = randomise(ViTModel(ViTConfig(**raw), add_pooling_layer=pooled))
    theirs.save_pretrained(tmp_path)
    if suffix == "bin":
        weights = tmp_path / "model.safetensors"
        torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
        weights.unlink()
    dino = tinyti.load_dino(tmp_path)
    images = dino.preprocess(pictures)
    assert images.shape == (len(pictures), 3, theirs.config.image_size, theirs.config.image_size)
    wanted = theirs(images).last_hidden_state[:, 0]
    assert (wanted - wanted.mean(dim=0)).std() > 1e-2
    assert relative_error(wanted, dino(images)) <= OUTPUT
    normalised = torch.nn.functional.normalize(wanted, dim=-1)
    assert relative_error(normalised, dino.encode_image(pictures)) <= OUTPUT


# (width, height): what torchvision 0.28 makes of `drawn`, by Resize(256, bicubic), CenterCrop(224), ToTensor
# and Normalize of ImageNet: the mean of all numbers, and the pixels at (0, 0) and (100, 200).
TORCHVISION = {
    (97, 33): (-0.2062861552, (0.8446785212, -1.9131652117, -0.1835293323),
        (-0.6622998714, 0.1176470593, 1.3850982189)),
    (100, 103): (-0.1333628699, (-1.2102921009, -1.9306721687, -1.8044444323),
        (-1.2959158421, -1.1953780651, 0.3916340470)),
    (256, 259): (0.0913008834, (0.1768131405, -1.3179270029, -1.8044444323),
        (0.5193082094, -1.0378150940, 0.0256209914)),
    (300, 301): (0.1102731065, (0.4679339230, -1.1603640318, -1.8044444323),
        (0.2624368966, -0.7752100229, 2.1171243191)),
}  # fmt: skip


def drawn(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([5 * x + 3 * y, x * y // 7, (x - y) ** 2 // 11], -1).astype(np.uint8))


@pytest.mark.parametrize("size", TORCHVISION)
def test_dino_preprocessing_is_torchvisions(size):
    """Also where torchvision rounds a half of a pixel up: of the second and the third size."""
    [pixels] = DINOPreprocessing()([drawn(*size)])
    mean, first, other = TORCHVISION[size]
    assert pixels.shape == (3, 224, 224)
    assert pixels.double().mean().item() == pytest.approx(mean, abs=1e-7)
    assert pixels[:, 0, 0].tolist() == pytest.approx(first, abs=1e-6)
    assert pixels[:, 100, 200].tolist() == pytest.approx(other, abs=1e-6)


def test_clip_preprocessing_rounds_down_as_transformers_does(clips):
    """Where a half of a pixel is cut off: 32 of 35."""
    _, processor, clip = clips
    picture = drawn(32, 35)
    reference = processor([picture], return_tensors="pt")["pixel_values"]
    assert relative_error(reference, clip.preprocess([picture])) <= OUTPUT
