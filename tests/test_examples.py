"""Templates and captions: the prompts that a word is learned from."""

import pytest

from tinyti.examples import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill_template, read_templates


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
