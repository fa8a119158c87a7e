"""Our networks against diffusers' and transformers': tiny random ones, saved by them and loaded by us."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel

from tinyti.files import folder
from tinyti.networks.clip import TextConfig
from tinyti.networks.ldmbert import LDMBertConfig
from tinyti.networks.unet import UNetConfig
from tinyti.networks.vae import VAEConfig

from .conftest import randomise, relative_error

torch.manual_seed(0)
OUTPUT, GRADIENT = 1e-5, 1e-4  # the largest errors that we accept, relative to the scale of what is compared

UNETS = {
    "sd1": {"attention_head_dim": 4, "cross_attention_dim": 24},
    "sd2": {"attention_head_dim": [2, 4, 4], "cross_attention_dim": 40, "use_linear_projection": True},
    "ldm": {"attention_head_dim": 8, "cross_attention_dim": 48, "layers_per_block": 1},
}


def ours(kind, their_model, strip=""):
    """Our network, built from the configuration and the weights that theirs would save."""
    raw = their_model.config.to_dict() if hasattr(their_model.config, "to_dict") else dict(their_model.config)
    config = folder.read_config(kind, raw, "config.json")
    return folder.build(
        config, {k.removeprefix(strip): w.clone() for k, w in their_model.state_dict().items()}
    )


def their_unet(settings):
    return randomise(
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=16,
            **settings,
        )
    )


@pytest.mark.parametrize("size", [(16, 16), (9, 14)], ids=["even", "odd"])
@pytest.mark.parametrize("family", UNETS)
def test_unet(family, size):
    theirs = their_unet(UNETS[family])
    unet = ours(UNetConfig, theirs)
    x, t = torch.randn(3, 4, *size), torch.tensor([0, 500, 999])
    outputs, gradients = [], []
    context = torch.randn(3, 77, UNETS[family]["cross_attention_dim"])
    for run in (lambda c: theirs(x, t, c).sample, lambda c: unet(x, t, c)):
        c = context.clone().requires_grad_()
        output = run(c)
        outputs.append(output)
        gradients += torch.autograd.grad(output.square().mean(), c)
    assert outputs[0].std() > 1e-3 and gradients[0].abs().max() > 0
    assert relative_error(*outputs) <= OUTPUT
    assert relative_error(*gradients) <= GRADIENT


def test_unet_checkpointing_changes_nothing():
    unet = ours(UNetConfig, their_unet(UNETS["sd1"]))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 24)
    gradients = []
    for unet.checkpointing in (False, True):
        c = context.clone().requires_grad_()
        gradients += torch.autograd.grad(unet(x, 10, c).square().mean(), c)
    assert torch.equal(*gradients)


@pytest.fixture(scope="module")
def vaes():
    theirs = randomise(
        AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            norm_num_groups=16,
        )
    )
    return theirs, ours(VAEConfig, theirs)


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
def test_vae_encoder(vaes, size):
    theirs, vae = vaes
    images = torch.rand(2, 3, *size) * 2 - 1
    mean, std = vae.encode(images)
    reference = theirs.encode(images).latent_dist
    assert mean.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert relative_error(reference.mean, mean) <= OUTPUT
    assert relative_error(reference.std, std) <= OUTPUT


def test_vae_decoder(vaes):
    theirs, vae = vaes
    z = torch.randn(2, 4, 5, 8)
    assert vae.decode(z).shape == (2, 3, 20, 32)
    assert relative_error(theirs.decode(z).sample, vae.decode(z)) <= OUTPUT


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text(activation):
    theirs = randomise(
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                hidden_act=activation,
                eos_token_id=99,
            )
        )
    )
    text = ours(TextConfig, theirs, strip="text_model.")
    ids = torch.randint(0, 99, (3, 77))
    embeds = text.embed(ids)
    assert torch.equal(embeds, theirs.get_input_embeddings()(ids))  # bare rows, without positions
    assert relative_error(theirs(ids).last_hidden_state, text(embeds)) <= OUTPUT


def test_clip_text_accepts_ids_above_the_vocabulary():
    text = folder.NETWORKS[TextConfig](TextConfig(vocab_size=10, hidden_size=8, num_hidden_layers=0))
    assert text.embed(torch.tensor([[3, 10, 57]])).shape == (1, 3, 8)


def test_ldm_bert():
    config = TheirBertConfig(
        vocab_size=60,
        encoder_layers=3,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        head_dim=6,
        d_model=40,
        dropout=0.0,
    )
    theirs = randomise(LDMBertModel(config))
    bert = ours(LDMBertConfig, theirs)
    ids = torch.randint(0, 60, (3, 77))
    assert relative_error(theirs(ids)[0], bert(bert.embed(ids))) <= OUTPUT


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A whole CLIP as a published folder: theirs, and ours read from it."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={"vocab_size": 100, "eos_token_id": 99, **tower},
        vision_config={"image_size": 32, "patch_size": 8, **tower},
        projection_dim=20,
    )
    theirs = randomise(CLIPModel(config))
    theirs.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    config, weights, preprocess = folder.read_clip(folder)
    return theirs, processor, folder.build(config, weights, preprocess=preprocess)


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
