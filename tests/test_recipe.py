"""The recipe of weights/tiny: every stage at a small size, from scratch and from a finished folder."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import tinyti
from tinyti.files.pictures import to_image
from weights.recipe import make, training

from .conftest import TINY

SMALL = make.Recipe(
    pictures=24,
    unseen=40,
    own_manners=4,
    abstract=4,
    vocabulary=600,
    clip_width=32,
    clip_layers=1,
    clip_batch=8,
    clip_samples=24,
    vae_widths=(16, 32, 32),
    vae_batch=4,
    vae_samples=12,
    unet_widths=(16, 16, 32),
    unet_batch=8,
    unet_samples=24,
    probe_batch=8,
    probe_samples=16,
    generated=30,
    sampling_steps=2,
)
LIKE_TINY = {"vocabulary": 2_048, "clip_width": 128, "clip_layers": 4}
LIKE_TINY |= {"vae_widths": (32, 64, 128), "unet_widths": (32, 64, 128)}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with "work" and "tiny" in it that all stages leave when they start from nothing."""
    folder = tmp_path_factory.mktemp("recipe")
    make.make_miniature(training.Workspace(folder / "work", SMALL), folder / "tiny")
    return folder


def check_folder(folder):
    """A model folder loads, draws finite pictures that are not of one colour, and its CLIP sees them."""
    model, (clip, tokenizer) = tinyti.load(folder), tinyti.load_clip(folder / "clip")
    prompts = ["a photo of a cat", "a red car on the beach"]
    *_, x_0 = tinyti.sample(model, prompts, steps=2, generator=torch.Generator().manual_seed(0))
    images = model.decode(x_0)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all() and images.std() > 0
    pictures = [to_image(image) for image in images]
    likeness = clip.encode_image(pictures) @ clip.encode_text(tokenizer(prompts)).T
    assert likeness.shape == (2, 2) and likeness.isfinite().all()


def read_part(folder, part):
    """The weights of a part; those of the text transformer all have the prefix that transformers 4 wants."""
    weights = load_file(folder / training.WEIGHTS[part])
    prefix = "text_model." if part == "text" else ""
    assert all(key.startswith(prefix) for key in weights)
    return {key.removeprefix(prefix): weight for key, weight in weights.items()}


def test_every_stage_from_nothing(made):
    check_folder(made / "tiny")
    read_part(made / "tiny", "text")
    costs = json.loads((made / "work" / "costs.json").read_text())
    seen = {stage: cost["samples"] for stage, cost in costs.items()}
    assert {"pictures": 64, "abstract": 4, "own-manners": 4, "captions": 28}.items() <= seen.items()
    assert {"clip": 24, "vae": 12, "unet": 24, "probe": 16}.items() <= seen.items()
    card = (made / "tiny" / "README.md").read_text()
    assert "| unet | 24 |" in card and "{" not in card
    assert (made / "tiny" / "contact_sheet.png").stat().st_size > 1000


def held(learner):
    """A copy of all that a learner has, its place on the disk apart."""
    state = {name: value for name, value in vars(learner).items() if name not in ("work", "file")}
    state |= {"module": learner.module.state_dict()}
    return copy.deepcopy(state | {"optimizers": [each.state_dict() for each in learner.optimizers]})


@pytest.mark.parametrize("stage", ["clip", "vae", "unet"])
def test_a_killed_stage_goes_on_as_if_nothing_had_happened(stage, made, tmp_path, monkeypatch):
    """Its last step begins with the same numbers, bit for bit, and sees the same batch at the same rate.

    What the step makes of them may differ in the last digit: float sums are not the same in every run.  The
    loss of another batch differs by more than a tenth.
    """
    shutil.copytree(made / "work", tmp_path / "work", ignore=shutil.ignore_patterns(f"{stage}.*"))
    work, learn, steps = training.Workspace(tmp_path / "work", SMALL), training.Learner.learn, []

    def killed(self, loss, rate):
        if self.step == 2:
            steps.append((held(self), loss.item(), rate))
            raise KeyboardInterrupt
        learn(self, loss, rate)

    def recorded(self, loss, rate):
        steps.append((held(self), loss.item(), rate))
        learn(self, loss, rate)
        steps.append(self.average)

    last = None if stage == "unet" else stage
    monkeypatch.setattr(make, "write_card", lambda *_: None)  # which the whole recipe has written
    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    monkeypatch.setattr(training.Learner, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        make.make_miniature(work, tmp_path / "tiny", last)
    assert not (work / f"{stage}.safetensors").exists()
    monkeypatch.setattr(training.Learner, "learn", recorded)
    make.make_miniature(work, tmp_path / "tiny", last)
    (before, loss, rate), (after, loss_again, rate_again), average = steps
    assert before["step"] == 2 and all(optimizer["state"] for optimizer in before["optimizers"])
    assert_close(after, before, rtol=0, atol=0)
    assert loss_again == pytest.approx(loss, rel=1e-2) and rate_again == rate
    assert_close(load_file(work / f"{stage}.safetensors"), average, rtol=0, atol=0)


def test_a_finished_stage_is_passed_over(made, tmp_path, monkeypatch):
    shutil.copytree(made / "work", tmp_path / "work")
    monkeypatch.setattr(make, "write_card", lambda *_: None)
    monkeypatch.setattr(training.Learner, "learn", None)  # nothing is to be learned
    monkeypatch.setattr(training, "ProcessPoolExecutor", None)  # or drawn
    make.make_miniature(training.Workspace(tmp_path / "work", SMALL), tmp_path / "tiny")
    for file in sorted((made / "tiny").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "tiny" / file.relative_to(made / "tiny")).read_bytes()


def test_every_stage_from_a_finished_folder(tmp_path, monkeypatch):
    """Each begins with the tensors of the folder's network, and learns."""
    first, learn = {}, training.Learner.learn

    def remembered(self, loss, rate):
        if self.step == 0:
            first[self.file] = {name: weight.clone() for name, weight in self.module.state_dict().items()}
        learn(self, loss, rate)

    monkeypatch.setattr(training.Learner, "learn", remembered)
    monkeypatch.setattr(make, "Recipe", lambda: replace(SMALL, **LIKE_TINY))
    flags = ["--weights", str(TINY), "--out", str(tmp_path / "tiny"), "--work", str(tmp_path / "work")]
    make.main([*flags, "--clip-samples", "8", "--vae-samples", "4", "--unet-samples", "8"])

    theirs = {part: read_part(TINY, part) for part in training.WEIGHTS}
    begun = {"clip": first["clip.state"], "vae": first["vae.state"]}
    begun |= {
        part: {
            name.removeprefix(f"{part}."): weight
            for name, weight in first["unet.state"].items()
            if name.startswith(f"{part}.")
        }
        for part in ("unet", "text")
    }
    for part, weights in theirs.items():
        assert begun[part].keys() == weights.keys()
        assert all(torch.equal(begun[part][name], weight.float()) for name, weight in weights.items())
        learned = read_part(tmp_path / "tiny", part)
        assert any(not torch.equal(learned[name], weight) for name, weight in weights.items())
    for file in (TINY / "tokenizer").iterdir():
        assert file.read_bytes() == (tmp_path / "tiny" / "tokenizer" / file.name).read_bytes()
    check_folder(tmp_path / "tiny")
