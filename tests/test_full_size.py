"""Stable Diffusion 1.5 at full size, with random weights, loads as fast and as light as in diffusers.

Gigabytes and minutes: run with `pytest -m slow tests/test_full_size.py`.  Its networks: test_parity.py."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from . import published
from .conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """Stable Diffusion 1.5 with random weights, as a folder and as a single file."""
    root = tmp_path_factory.mktemp("sd15")
    published.clip_vocabulary(root / "vocabulary")
    vocab, merges = (str(root / "vocabulary" / name) for name in ("vocab.json", "merges.txt"))
    pipeline = StableDiffusionPipeline(
        vae=published.random_network(AutoencoderKL, published.VAE),
        text_encoder=published.random_network(CLIPTextModel, published.CLIP_TEXT),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77),
        unet=published.random_network(UNet2DConditionModel, published.UNETS["sd15"]),
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
    weights = {key: weight.contiguous() for key, weight in weights.items()}
    save_file(weights, root / "file" / "model.safetensors")
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
