"""The probe of what pictures show: on unseen rendered pictures, and on drawn ones labelled by eye."""

import random

import pytest

from weights.recipe import judge, probe, world

# Which colour is the main one of a striped house is a matter of taste.
BOUNDS = {"thing": 0.97, "style": 0.97, "colour": 0.93, "scarf": 0.95, "hat": 0.95}


def test_judge_and_probe_are_small():
    assert judge.FILE.stat().st_size + probe.PROBE_FILE.stat().st_size <= 1e6


def test_it_reads_unseen_pictures():
    """In a few hundred, three standard errors may be missing."""
    found = probe.hits(300, seed=2)
    for question, bound in BOUNDS.items():
        asked = sum(map(len, found[question].values()))
        assert asked > 150
        assert probe.share_right(found[question])[0] >= bound - 3 * (bound * (1 - bound) / asked) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("blurred", (False, True))
def test_it_reads_thousands_of_unseen_pictures(blurred):
    """Every answer counts alike, however often it is the right one."""
    found = probe.hits(4000, seed=3, blurred=blurred)
    for question, bound in BOUNDS.items():
        assert probe.share_right(found[question])[1] >= bound


def test_obedience_is_what_was_asked_for():
    lot, pictures = random.Random(0), []
    for i in range(20):
        attrs = world.attributes(lot)
        details = dict.fromkeys(world.PARTS["dog"], "") | {"hat": "blue" if i < 15 else ""}
        look = world.identity(lot, "dog", "red", details)
        plain = {"thing": "dog", "style": "photo", "manner": "", "scene": "snow"}
        pictures.append(world.draw(attrs | plain | {"identity": look}))
    assert probe.obedience(pictures, thing="dog", style="photo", colour="red", scarf=None) >= 0.9
    assert probe.obedience(pictures, hat="blue") == probe.obedience(pictures, hat=True) == 0.75
    assert probe.obedience(pictures, hat=None) == 0.25
    assert probe.obedience(pictures, hat="green") == probe.obedience(pictures, thing="cat") == 0


@pytest.mark.slow
def test_it_agrees_with_labels_by_eye():
    """Of a hundred pictures that the miniature drew; labelled before anybody knew the probe's answers."""
    for field, pairs in probe.compare_labels().items():
        agreed = sum(label == seen for _, label, seen in pairs)
        assert len(pairs) >= 80 and agreed >= (0.8 if field == "colour" else 0.9) * len(pairs), field
