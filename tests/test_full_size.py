"""The real widths, with random weights: the same numbers as diffusers', and loading as light and as fast.

Gigabytes and minutes: run with `pytest -m slow tests/test_full_size.py`."""

import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tinyti.files import folder
from tinyti.networks.unet import UNetConfig
from tinyti.networks.vae import VAEConfig

from . import published
from .conftest import ROOT, randomise, relative_error
from .test_checkpoint import CLIP_TEXT, TEXTS, UNETS, VAE, theirs_on_meta

pytestmark = pytest.mark.slow
ERROR = 1e-5  # the largest, relative to the output's scale


def random_network(kind, raw):
    """A network of theirs with random weights, whose storage ours will share."""
    network = theirs_on_meta(kind, raw).to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    for name, p in network.named_parameters():
        torch.nn.init.constant_(p, float(p.ndim == 1 and name.endswith("weight")))
    return randomise(network).requires_grad_(False)


def ours(kind, raw, theirs):
    config = folder.read_config(kind, raw, "config.json")
    return folder.build(
        config, {k.removeprefix("text_model."): w for k, w in theirs.state_dict().items()}
    )


@pytest.fixture(autouse=True)
def tidy():
    yield
    gc.collect()


@torch.no_grad()
@pytest.mark.parametrize("family", UNETS)
def test_unet(family):
    raw = UNETS[family]
    theirs = random_network(TheirUNet, raw)
    unet = ours(UNetConfig, raw, theirs)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.randn(1, 77, raw["cross_attention_dim"], generator=generator)
    wanted = theirs(x, 500, context).sample
    assert wanted.std() > 1e-2
    assert relative_error(wanted, unet(x, 500, context)) <= ERROR


@torch.no_grad()
def test_vae():
    theirs = random_network(AutoencoderKL, VAE)
    vae = ours(VAEConfig, VAE, theirs)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 96, 64, generator=generator) * 2 - 1
    mean, std = vae.encode(images)
    wanted = theirs.encode(images).latent_dist
    assert relative_error(wanted.mean, mean) <= ERROR
    assert relative_error(wanted.std, std) <= ERROR
    z = torch.randn(1, 4, 12, 8, generator=generator)
    assert relative_error(theirs.decode(z).sample, vae.decode(z)) <= ERROR


@torch.no_grad()
@pytest.mark.parametrize("family", TEXTS)
def test_text(family):
    kind, their_kind, raw = TEXTS[family]
    theirs = random_network(their_kind, raw)
    text = ours(kind, raw, theirs)
    ids = torch.randint(0, raw["vocab_size"] - 1, (2, 77), generator=torch.Generator().manual_seed(1))
    wanted = theirs(ids)[0]
    assert wanted.std() > 1e-2
    assert relative_error(wanted, text(text.embed(ids))) <= ERROR


# -- loading -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """Stable Diffusion 1.5 with random weights, as a folder and as a single file."""
    root = tmp_path_factory.mktemp("sd15")
    published.clip_vocabulary(root / "vocabulary")
    files = {
        "vocab": str(root / "vocabulary" / "vocab.json"),
        "merges": str(root / "vocabulary" / "merges.txt"),
    }
    pipeline = StableDiffusionPipeline(
        vae=random_network(AutoencoderKL, VAE),
        text_encoder=random_network(CLIPTextModel, CLIP_TEXT),
        tokenizer=CLIPTokenizer(**files, model_max_length=77),
        unet=random_network(TheirUNet, UNETS["sd15"]),
        scheduler=DDIMScheduler(**published.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "folder")
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    layouts = (published.original_unet, published.original_vae, published.original_clip)
    weights = published.original(*(layout(part) for layout, part in zip(layouts, parts)))
    (root / "file").mkdir()
    save_file(
        {key: weight.contiguous() for key, weight in weights.items()}, root / "file" / "model.safetensors"
    )
    (root / "file" / "tokenizer").symlink_to(root / "folder" / "tokenizer")
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert 4.2e9 < size < 4.3e9
    return root, size


OURS = """
import tinyti
def load(path):
    model = tinyti.load(path)
    return model.unet, model.vae, model.text
"""
THEIRS = """
import transformers
from diffusers import StableDiffusionPipeline
def load(path):
    if path.is_dir():
        pipeline = StableDiffusionPipeline.from_pretrained(path)
    else:
        settings = dict(config=str(path.parents[1] / "folder"), local_files_only=True)
        pipeline = StableDiffusionPipeline.from_single_file(str(path), **settings)
    return pipeline.unet, pipeline.vae, pipeline.text_encoder
"""
# Every number is read once, for weights that are only mapped into memory have not been loaded yet.
MEASURE = """
import json, re, sys, time
from pathlib import Path
import torch
start = time.perf_counter()
total = sum(p.sum(dtype=torch.float64).item() for part in load(Path(sys.argv[1])) for p in part.parameters())
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps(dict(seconds=seconds, peak=peak, total=total)))
"""


def measure(loader, path):
    """Load in a process of its own: seconds, peak resident bytes, and the sum of all weights."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", loader + MEASURE, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from Linux's /proc")
@pytest.mark.parametrize("form", ["folder", "file/model.safetensors"])
def test_loading(sd15, form):
    root, size = sd15
    measure(OURS, root / form)  # brings the files into the page cache
    runs = {OURS: [], THEIRS: []}
    for _ in range(3):
        for loader, made in runs.items():
            made.append(measure(loader, root / form))
    seconds = [statistics.median(run["seconds"] for run in made) for made in runs.values()]
    peaks = [max(run["peak"] for run in made) / size for made in runs.values()]
    print(f"\n{form}, ours and theirs: {seconds} s; peak memory {peaks} of the weights' size")
    totals = [run["total"] for made in runs.values() for run in made]
    assert max(totals) - min(totals) <= 1e-9 * abs(totals[0])
    assert peaks[0] <= 1.2
    assert seconds[0] <= seconds[1]
