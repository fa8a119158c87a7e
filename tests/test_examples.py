"""Templates and captions become prompts, photos and their mirror images become latents, both batches."""

import pytest
import torch

from tinyti.examples import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    Examples,
    draw_batch,
    fill_template,
    make_examples,
    read_templates,
)
from tinyti.files.pictures import read_photos

from .conftest import CONCEPTS


def test_template_lists():
    assert len(OBJECT_TEMPLATES) == len(set(OBJECT_TEMPLATES)) == 27
    assert len(STYLE_TEMPLATES) == 19 and len(set(STYLE_TEMPLATES)) == 17
    for template in [*OBJECT_TEMPLATES, *STYLE_TEMPLATES]:
        assert template.count("{}") == 1 and template.endswith(" {}")


PROMPTS = [
    ("a photo of a {}", "S*", None, "a photo of a S*"),
    ("{} beside {}", "S*", None, "S* beside S*"),
    ("a photo of a {}", "S*", "on a table", "a photo of a S*, on a table"),
    ("a photo of a {}", "S*", "two {} on a table", "two S* on a table"),
    ("{0} and {}", "S*", None, "{0} and S*"),  # nothing else is a field
    ("a {}", "{}", None, "a {}"),
]


@pytest.mark.parametrize("template, name, caption, expected", PROMPTS)
def test_a_template_is_filled(template, name, caption, expected):
    assert fill_template(template, name, caption) == expected


def test_own_templates(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbf# made by hand\r\n\r\n  a portrait of {}  \r\n{} as a toy")
    assert read_templates(file) == ["a portrait of {}", "{} as a toy"]
    refused = {
        b"a {}\n\na photo of S*\n": r"line 3: 'a photo of S\*'",
        b"": "no templates",
        b"# nothing\n\n": "no templates",
        b"a {} caf\xe9\n": "UTF-8",
    }
    for content, found in refused.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=found) as caught:
            read_templates(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_templates(tmp_path / "none.txt")


def test_the_second_view_of_a_photo_is_its_mirror_image(model):
    if "S*" not in model.concepts:
        model.add_word("S*", model.text.table[:1])
    photos, _ = read_photos(CONCEPTS / "robot", 64)
    both = make_examples(model, "S*", photos, OBJECT_TEMPLATES)
    one = make_examples(model, "S*", photos, OBJECT_TEMPLATES, flip=False)
    mirrored = [photo._replace(pixels=photo.pixels.flip(-1)) for photo in photos]
    mirror = make_examples(model, "S*", mirrored, OBJECT_TEMPLATES, flip=False)
    torch.testing.assert_close(both.mean[:, 0], one.mean[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.mean[:, 1], mirror.mean[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both.mean[:, 0], both.mean[:, 1], atol=0.1)


def test_a_batch_takes_each_view_with_a_prompt_of_its_picture(model):
    """Latents that say which picture and view they are of, and prompts that say which picture."""
    views = torch.arange(6.0).reshape(3, 2, 1, 1, 1).expand(-1, -1, 4, 8, 8)
    names = ["cat", "dog", "boat"]
    examples = Examples(views, torch.zeros_like(views), [[f"a {name}", f"the {name}"] for name in names])
    batch = draw_batch(model, examples, 200, torch.Generator().manual_seed(0), (0.2, 0.4))
    view = batch.x_0[:, 0, 0, 0].long()
    assert sorted(set(view.tolist())) == list(range(6))
    for i in range(3):
        word = model.tokenizer.single(names[i])
        assert ((batch.ids == word).any(dim=1) == (view // 2 == i)).all()
    assert {ids[1] for ids in batch.ids.tolist()} == {model.tokenizer.single(word) for word in ("a", "the")}
    assert batch.t.min() >= 200 and batch.t.max() < 400
    assert batch.eps.std().item() == pytest.approx(1, abs=0.02)
