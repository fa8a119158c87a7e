"""Tiny random models, and writers for every form in which models are published.

The names of the original (CompVis) layout come from its structure: which module sits where in its nested
lists.  Nothing here uses the loader's rules, which go the other way."""

import copy
import json
import shutil

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
)
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tinyti
from tinyti.networks.clip import TextConfig
from tinyti.networks.ldmbert import LDMBertConfig

from .conftest import randomise

# What the original training code of all three families does, as diffusers writes it down.
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}


def clip_vocabulary(folder):
    """A small byte-pair vocabulary as CLIP's files: every byte, a few merges, start and end."""
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "o f</w>", "p h", "o t", "ph ot", "phot o</w>"]
    letters = sorted(ByteLevel.alphabet())
    entries = letters + [letter + "</w>" for letter in letters] + [pair.replace(" ", "") for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return len(entries)


def bert_vocabulary(folder):
    """A small word-piece vocabulary as BERT's file."""
    letters = [*map(chr, range(0x21, 0x7F)), *"éñ猫只אבחת"]
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    entries += "cat cats dog photo of the strasse unhappy ##ing ##to".split()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*entries, ""]), "utf-8")
    return len(entries)


def tiny_unet(context_dim, heads, linear=False, width=32, **settings):
    """Three resolutions, of which two attend: enough for every kind of block."""
    return randomise(
        TheirUNet(
            sample_size=8,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=context_dim,
            attention_head_dim=heads,
            use_linear_projection=linear,
            **settings,
        )
    )


def tiny_vae():
    """Two resolutions: one latent stands for 2 × 2 pixels."""
    return randomise(
        AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            sample_size=16,
        )
    )


def tiny_stable_diffusion(family, folder, **scheduler):
    """A pipeline of family "sd1" or "sd2", with its heads and padding; `folder` takes its vocabulary."""
    sd2 = family == "sd2"
    size = clip_vocabulary(folder)
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    text = CLIPTextConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=23 if sd2 else 3,  # of a single file, the 24th is dropped by its number
        num_attention_heads=2,
        hidden_act="gelu" if sd2 else "quick_gelu",
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=0 if sd2 else size - 1,
    )
    unet = tiny_unet(128, [1, 2, 2], linear=True, width=64) if sd2 else tiny_unet(128, 8)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=randomise(CLIPTextModel(text)),
        tokenizer=CLIPTokenizer(**files, pad_token="!" if sd2 else "<|endoftext|>", model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_ldm(folder, **scheduler):
    """The paper's own model in miniature: 8 heads in the text transformer as in the UNet."""
    size = bert_vocabulary(folder)
    text = TheirBertConfig(
        vocab_size=size, encoder_layers=3, encoder_ffn_dim=80, head_dim=6, d_model=40, dropout=0.0
    )
    return LDMTextToImagePipeline(
        vqvae=tiny_vae(),
        bert=randomise(LDMBertModel(text)),
        tokenizer=BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=512),
        unet=tiny_unet(40, 8),
        scheduler=DDIMScheduler(**SCHEDULER | scheduler),
    )


class Published:
    """A tiny model of a family: theirs, the folder they saved, ours loaded from it, its original layout."""

    def __init__(self, family, root, **scheduler):
        self.family, self.folder = family, root / "model"
        if family == "ldm":
            self.theirs = tiny_ldm(root / "vocabulary", **scheduler)
            unet, vae, text = self.theirs.unet, self.theirs.vqvae, self.theirs.bert
            original_text = original_bert(text)
        else:
            self.theirs = tiny_stable_diffusion(family, root / "vocabulary", **scheduler)
            unet, vae, text = self.theirs.unet, self.theirs.vae, self.theirs.text_encoder
            original_text = original_openclip(text) if family == "sd2" else original_clip(text)
        self.parts = {"unet": unet, "vae": vae, "text": text}
        self.theirs.save_pretrained(self.folder)
        self.ours = tinyti.load(self.folder)
        self.original = original(original_unet(unet), original_vae(vae), original_text)
        self.tokenizer = self.folder / "tokenizer"

    def copy(self, to, part):
        """The folder again with a part that may be changed; the other parts are links."""
        to.mkdir()
        for child in self.folder.iterdir():
            if child.name != part:
                (to / child.name).symlink_to(child)
        return shutil.copytree(self.folder / part, to / part)

    def single(self, path, weights=None):
        """The original layout as a single file, with its vocabulary beside it."""
        save_file({key: w.contiguous() for key, w in (weights or self.original).items()}, path)
        (path.parent / "tokenizer").symlink_to(self.tokenizer)
        return path

    def with_text(self, text):
        """The original layout with another text transformer."""
        rest = {k: w for k, w in self.original.items() if not k.startswith("cond_stage_model.")}
        return rest | {f"cond_stage_model.{k}": w for k, w in text.items()}


# -- the original layout -------------------------------------------------------------------------------------


class Layout(dict):
    """A state dictionary that is filled module by module."""

    def put(self, name, module, parts="="):
        """All weights of a module under a name, or those of its parts: "new=old new=old"."""
        for part in parts.split():
            new, old = part.split("=")
            for key, weight in module.get_submodule(old).state_dict().items():
                self[".".join(filter(None, (name, new, key)))] = weight


def _unet_resnet(layout, name, resnet):
    # Between them are activations and dropout.
    layout.put(name, resnet, "in_layers.0=norm1 in_layers.2=conv1 out_layers.0=norm2 out_layers.3=conv2")
    shortcut = " skip_connection=conv_shortcut" if resnet.conv_shortcut is not None else ""
    layout.put(name, resnet, "emb_layers.1=time_emb_proj" + shortcut)


def original_unet(unet):
    """openaimodel.UNetModel: two flat lists of short sequences, and a middle."""
    layout = Layout()
    layout.put("time_embed", unet.time_embedding, "0=linear_1 2=linear_2")
    layout.put("input_blocks.0.0", unet.conv_in)
    n = 1
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            _unet_resnet(layout, f"input_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                layout.put(f"input_blocks.{n}.1", block.attentions[i])  # the same names inside
            n += 1
        if block.downsamplers:
            layout.put(f"input_blocks.{n}.0.op", block.downsamplers[0].conv)
            n += 1
    _unet_resnet(layout, "middle_block.0", unet.mid_block.resnets[0])
    layout.put("middle_block.1", unet.mid_block.attentions[0])
    _unet_resnet(layout, "middle_block.2", unet.mid_block.resnets[1])
    n = 0
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            _unet_resnet(layout, f"output_blocks.{n}.0", resnet)
            if hasattr(block, "attentions"):
                layout.put(f"output_blocks.{n}.1", block.attentions[i])
            if i == len(block.resnets) - 1 and block.upsamplers:  # last in its sequence, wherever that is
                place = 2 if hasattr(block, "attentions") else 1
                layout.put(f"output_blocks.{n}.{place}.conv", block.upsamplers[0].conv)
            n += 1
    layout.put("out", unet, "0=conv_norm_out 2=conv_out")
    return layout


def _vae_resnet(layout, name, resnet):
    shortcut = " nin_shortcut=conv_shortcut" if resnet.conv_shortcut is not None else ""
    layout.put(name, resnet, "norm1=norm1 conv1=conv1 norm2=norm2 conv2=conv2" + shortcut)


def original_vae(vae):
    """autoencoder.AutoencoderKL: both halves count their resolutions from the finest, the decoder too."""
    layout = Layout()
    for name, half in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        layout.put(name, half, "conv_in=conv_in norm_out=conv_norm_out conv_out=conv_out")
        for i, resnet in enumerate(half.mid_block.resnets):
            _vae_resnet(layout, f"{name}.mid.block_{i + 1}", resnet)
        attention, mid = half.mid_block.attentions[0], f"{name}.mid.attn_1"
        layout.put(mid, attention, "norm=group_norm q=to_q k=to_k v=to_v proj_out=to_out.0")
        for part in ("q", "k", "v", "proj_out"):
            layout[f"{mid}.{part}.weight"] = layout[f"{mid}.{part}.weight"][:, :, None, None]  # a convolution
        blocks = list(half.down_blocks) if name == "encoder" else list(half.up_blocks)[::-1]
        way = "down" if name == "encoder" else "up"
        for i, block in enumerate(blocks):
            for j, resnet in enumerate(block.resnets):
                _vae_resnet(layout, f"{name}.{way}.{i}.block.{j}", resnet)
            samplers = block.downsamplers if way == "down" else block.upsamplers
            if samplers:
                layout.put(f"{name}.{way}.{i}.{way}sample", samplers[0])
    layout.put("", vae, "quant_conv=quant_conv post_quant_conv=post_quant_conv")
    return layout


def original_clip(text):
    """FrozenCLIPEmbedder: transformers' own module, of the time when it had a prefix and a buffer."""
    text = getattr(text, "text_model", text)
    layout = Layout()
    layout.put("transformer.text_model", text)
    layout["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return layout


def original_openclip(text, extra=True):
    """FrozenOpenCLIPEmbedder: open_clip's module, with one layer more than Stable Diffusion 2 reads."""
    text = getattr(text, "text_model", text)
    layout = Layout()
    layout.put("model.token_embedding", text.embeddings.token_embedding)
    layout["model.positional_embedding"] = text.embeddings.position_embedding.weight.detach()
    layers = list(text.encoder.layers)
    for i, layer in enumerate([*layers, copy.deepcopy(layers[0])] if extra else layers):
        name, attention = f"model.transformer.resblocks.{i}", layer.self_attn
        thirds = (attention.q_proj, attention.k_proj, attention.v_proj)
        layout[f"{name}.attn.in_proj_weight"] = torch.cat([part.weight.detach() for part in thirds])
        layout[f"{name}.attn.in_proj_bias"] = torch.cat([part.bias.detach() for part in thirds])
        layout.put(name, layer, "attn.out_proj=self_attn.out_proj ln_1=layer_norm1 ln_2=layer_norm2")
        layout.put(name, layer, "mlp.c_fc=mlp.fc1 mlp.c_proj=mlp.fc2")
    layout.put("model.ln_final", text.final_layer_norm)
    if extra:
        width = text.config.hidden_size
        layout["model.text_projection"] = torch.randn(width, width)
        layout["model.logit_scale"] = torch.tensor(4.6)
        layout["model.attn_mask"] = torch.full((77, 77), float("-inf")).triu(1)
    return layout


def original_bert(bert):
    """BERTEmbedder: x_transformers' TransformerWrapper, whose list alternates attention and feed-forward."""
    layout = Layout()
    layout.put("transformer", bert, "to_logits=to_logits norm=model.layer_norm")
    layout.put("transformer", bert.model, "token_emb=embed_tokens pos_emb.emb=embed_positions")
    for i, layer in enumerate(bert.model.layers):
        attention, forward = (f"transformer.attn_layers.layers.{j}" for j in (2 * i, 2 * i + 1))
        layout.put(attention, layer, "0=self_attn_layer_norm")
        layout.put(attention + ".1", layer.self_attn, "to_q=q_proj to_k=k_proj to_v=v_proj to_out=out_proj")
        layout.put(forward, layer, "0=final_layer_norm 1.net.0.0=fc1 1.net.2=fc2")
    return layout


def original(unet, vae, text):
    """The whole latent diffusion model: its three parts, and the buffers of its schedule."""
    whole = {f"model.diffusion_model.{k}": w for k, w in unet.items()}
    whole |= {f"first_stage_model.{k}": w for k, w in vae.items()}
    whole |= {f"cond_stage_model.{k}": w for k, w in text.items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return whole | {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0), "logvar": 0 * betas}


# -- the published sizes -------------------------------------------------------------------------------------

UNET = json.loads("""{
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": false, "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                         "DownBlock2D"], "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}""")
SD2_UNET = UNET | json.loads("""{
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": false,
    "num_class_embeds": null, "only_cross_attention": false, "sample_size": 96, "upcast_attention": true,
    "use_linear_projection": true}""")
VAE = json.loads("""{
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D",
                         "DownEncoderBlock2D"], "in_channels": 3, "latent_channels": 4,
    "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}""")
CLIP_TEXT = json.loads("""{
    "architectures": ["CLIPTextModel"], "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408}""")
OPENCLIP = CLIP_TEXT | json.loads("""{
    "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512}""")
BERT = json.loads("""{
    "activation_function": "gelu", "architectures": ["LDMBertModel"], "d_model": 1280, "dropout": 0.1,
    "encoder_attention_heads": 8, "encoder_ffn_dim": 5120, "encoder_layers": 32, "head_dim": 64,
    "max_position_embeddings": 77, "model_type": "ldmbert", "num_hidden_layers": 32, "pad_token_id": 0,
    "scale_embedding": false, "vocab_size": 30522}""")

UNETS = {
    "sd15": UNET | {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": SD2_UNET,
    "ldm": UNET | {"attention_head_dim": 8, "cross_attention_dim": 1280},
}
TEXTS = {  # our configuration, their network, the published settings
    "sd15": (TextConfig, CLIPTextModel, CLIP_TEXT),
    "sd21": (TextConfig, CLIPTextModel, OPENCLIP),
    "ldm": (LDMBertConfig, LDMBertModel, BERT),
}


def theirs_on_meta(kind, raw):
    """A network of theirs with published settings, without memory for its weights."""
    with torch.device("meta"):
        if kind is TheirUNet or kind is AutoencoderKL:
            return kind.from_config(raw)
        return kind({CLIPTextModel: CLIPTextConfig, LDMBertModel: TheirBertConfig}[kind].from_dict(dict(raw)))


def random_network(kind, raw):
    """A network of theirs with published settings and random weights."""
    network = theirs_on_meta(kind, raw).to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    for name, p in network.named_parameters():
        torch.nn.init.constant_(p, float(p.ndim == 1 and name.endswith("weight")))
    return randomise(network).requires_grad_(False)
