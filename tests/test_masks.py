"""Masks: the model does not learn what is outside; a picture without a mask is learned as before."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train as train_py
from tinyti.examples import OBJECT_TEMPLATES, Batch, draw_batch, make_examples
from tinyti.files.pictures import read_photos
from tinyti.inversion import evaluate, losses

from .conftest import CONCEPTS, seeded


@pytest.fixture(autouse=True)
def word(model):
    """S* is a word of the model."""
    if "S*" not in model.concepts:
        model.add_word("S*", model.text.table[:1])


def cutout(size=64, left=20, exif=None):
    """A picture with a transparent ground, opaque from column `left` on."""
    pixels = np.full((size, size, 4), 255, np.uint8)
    pixels[..., :3] = np.random.default_rng(0).integers(0, 255, (size, size, 3))
    pixels[:, :left, 3] = 0
    return Image.fromarray(pixels)


def test_transparency_is_a_mask_and_shows_white(tmp_path):
    cutout().save(tmp_path / "a.png")
    [photo], passed_over = read_photos(tmp_path, 64)
    assert not passed_over and photo.mask.shape == (1, 64, 64)
    assert (photo.mask[..., :18] == 0).all() and (photo.mask[..., 22:] == 1).all()
    assert (photo.pixels[..., :18] == 1).all()  # white


def test_a_mask_file_is_turned_and_cropped_as_its_picture_is_and_is_no_photo(tmp_path):
    cutout().convert("RGB").resize((128, 64)).save(tmp_path / "a.jpg")
    mask = Image.new("L", (128, 64), 0)
    mask.paste(255, (64, 0, 128, 64))  # the right half
    mask.save(tmp_path / "a.mask.png")
    [photo], passed_over = read_photos(tmp_path, 32)
    assert len(passed_over) == 0 and photo.file.name == "a.jpg"
    assert (photo.mask[..., :15] == 0).all() and (photo.mask[..., 17:] == 1).all()
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down: both sides change places
    mask.convert("RGB").save(tmp_path / "a.mask.png", exif=turned)
    [photo], _ = read_photos(tmp_path, 32)
    assert (photo.mask[..., :15] > 0.9).all() and (photo.mask[..., 17:] < 0.1).all()


def test_a_picture_that_is_opaque_everywhere_is_learned_as_one_without_transparency(tmp_path, model):
    found = []
    for name, mode in (("plain", "RGB"), ("opaque", "RGBA")):
        (tmp_path / name).mkdir()
        Image.open(CONCEPTS / "cat" / "01.png").convert(mode).save(tmp_path / name / "a.png")
        photos, _ = read_photos(tmp_path / name, 64)
        found.append(make_examples(model, "S*", photos, OBJECT_TEMPLATES))
    assert found[0].weight is None and found[1].weight is None
    assert torch.equal(found[0].mean, found[1].mean) and found[0].prompts == found[1].prompts


def test_weights_follow_the_flip_and_pictures_without_a_mask_count_everywhere(tmp_path, model):
    cutout().save(tmp_path / "a.png")
    cutout(left=0).convert("RGB").save(tmp_path / "b.png")
    photos, _ = read_photos(tmp_path, 64)
    weight = make_examples(model, "S*", photos, OBJECT_TEMPLATES).weight
    side = 64 // model.vae.factor
    assert weight.shape == (2, 2, 1, side, side) and (weight[1] == 1).all()
    assert (
        torch.equal(weight[0, 1], weight[0, 0].flip(-1)) and weight[0, 0, 0, 0].tolist() == [0] * 5 + [1] * 11
    )


def test_the_loss_is_the_weighted_mean(model, monkeypatch):
    """Against the closed form, with a network that predicts nothing: the loss is the mean of eps² inside."""
    monkeypatch.setattr(type(model), "predict", lambda self, x_t, t, context: torch.zeros_like(x_t))
    eps, weight = torch.randn(2, 4, 8, 8, generator=seeded()), torch.zeros(2, 1, 8, 8)
    weight[0, :, :, :3] = 1
    weight[1] = torch.rand(1, 8, 8, generator=seeded(1))
    t, ids = torch.tensor([100, 700]), model.tokenize(["a cat", "a dog"])
    found = losses(model, Batch(torch.zeros_like(eps), eps, t, ids, weight))
    assert found[0].item() == pytest.approx(eps[0, :, :, :3].square().mean().item(), rel=1e-5)
    w = weight[1].expand(4, -1, -1)
    assert found[1].item() == pytest.approx(((w * eps[1] ** 2).sum() / w.sum()).item(), rel=1e-5)
    plain = losses(model, Batch(torch.zeros_like(eps), eps, t, ids))
    assert torch.allclose(plain, F.mse_loss(eps, torch.zeros_like(eps), reduction="none").mean((1, 2, 3)))


def test_batches_and_the_fixed_evaluation_are_weighted(tmp_path, model):
    cutout().save(tmp_path / "a.png")
    photos, _ = read_photos(tmp_path, 64)
    masked = make_examples(model, "S*", photos, OBJECT_TEMPLATES)
    batch = draw_batch(model, masked, 3, seeded())
    assert batch.weight.shape == (3, 1, *batch.x_0.shape[2:])
    assert evaluate(model, masked) != evaluate(model, masked._replace(weight=None))
    assert math.isclose(
        evaluate(model, masked._replace(weight=torch.ones_like(masked.weight))),
        evaluate(model, masked._replace(weight=None)), rel_tol=1e-5,
    )  # fmt: skip


REFUSED = {
    "empty": ("is empty", lambda folder: Image.new("L", (64, 64)).save(folder / "a.mask.png")),
    "ratio": ("ratios must be", lambda folder: Image.new("L", (64, 32), 255).save(folder / "a.mask.png")),
    "alone": ("which is not there", lambda folder: Image.new("L", (64, 64), 255).save(folder / "c.mask.png")),
    "both": ("keep one", lambda folder: (Image.new("L", (64, 64), 255).save(folder / "b.mask.png"))),
    "clear": ("is empty", lambda folder: Image.new("RGBA", (64, 64)).save(folder / "d.png")),
}  # fmt: skip


@pytest.mark.parametrize("words, spoil", REFUSED.values(), ids=REFUSED)
def test_a_mask_that_fits_nothing_is_one_line(words, spoil, tmp_path, capsys):
    cutout(left=0).convert("RGB").save(tmp_path / "a.png")
    cutout().save(tmp_path / "b.png")
    spoil(tmp_path)
    flags = ["--images", str(tmp_path), "--token", "S*", "--steps", "1", "--out", str(tmp_path / "out")]
    assert train_py.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and len(error) <= 2 and not (tmp_path / "out").exists()
