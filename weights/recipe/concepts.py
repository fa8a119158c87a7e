"""Makes `concepts/`: small sets of pictures of things and styles for which the world's language has no word.

    python weights/recipe/concepts.py

Each set has five pictures to learn from and five held out. `concepts.json` says what each set shows, which
word to start from and the best that a caption can do without a new word.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import world
from PIL import Image
from world import INK, dark, light

SEED = 7
SIZE = 64
PATHS = [f"{folder}{i:02}.png" for folder in ("", "heldout/") for i in range(1, 6)]
BACKDROPS = ("yellow", "green", "blue", "pink", "purple", "red")
TURQUOISE, GOLD, CREAM, MAGENTA = (20, 170, 165), (235, 180, 50), (250, 238, 208), (205, 40, 130)

# --- individuals: a thing of the world with a fixed identity -----------------------------------------------

EVEN = {"ears": 1.0, "head": 1.0, "body": 1.0, "eye size": 1.0, "tail": 0.6, "patches": (), "marking": "none"}

INDIVIDUALS = {
    "cat": {
        "description": "a calico cat: white, with orange and black patches, green eyes and large pink ears",
        "attrs": {"thing": "cat", "colour": "white"},
        "identity": {
            "base": (252, 249, 242),
            "mark": (48, 42, 50),
            "accent": (238, 140, 40),
            "inner": (250, 165, 180),
            "iris": (85, 200, 90),
            "eyes": "slit",
            "ears": 1.15,
            "eye size": 1.15,
            "patches": (
                (-0.42, -0.5, 0.36, 1.0, True),
                (0.5, -0.62, 0.28, 0.9, False),
                (0.3, 0.45, 0.26, 1.1, True),
                (-0.3, 0.62, 0.2, 0.9, False),
            ),
        },
    },
    "dog": {
        "description": "a sandy dog with one white eye patch, long chocolate ears and a turquoise scarf",
        "attrs": {"thing": "dog", "colour": "orange", "accessory": "scarf"},
        "identity": {
            "base": (226, 172, 104),
            "mark": (250, 246, 238),
            "ear": (92, 54, 38),
            "wear": TURQUOISE,
            "eyes": "dot",
            "marking": "eye patch",
            "ears": 1.25,
            "eye size": 1.1,
            "head": 1.05,
        },
    },
    "robot": {
        "description": "a turquoise robot with golden ears, a magenta screen on its chest and yellow eyes",
        "attrs": {"thing": "robot", "colour": "blue"},
        "identity": {
            "base": TURQUOISE,
            "accent": GOLD,
            "mark": MAGENTA,
            "iris": (255, 225, 70),
            "eyes": "slit",
            "marking": "belly",
            "eye size": 1.2,
            "head": 1.15,
            "body": 0.88,
            "tail": 0.9,
        },
    },
    "car": {
        "description": "a tall cream car with a turquoise stripe",
        "attrs": {"thing": "car", "colour": "white"},
        "identity": {
            "base": (252, 232, 185),
            "mark": TURQUOISE,
            "marking": "belly",
            "body": 1.25,
            "ears": 0.8,
        },
    },
    "mushroom": {
        "description": "a lilac mushroom with four ragged yellow patches and a magenta collar",
        "attrs": {"thing": "mushroom", "colour": "purple"},
        "identity": {
            "base": (178, 150, 222),
            "mark": MAGENTA,
            "accent": (250, 222, 95),
            "marking": "socks",
            "tail": 0.8,
            "patches": (
                (-0.45, -0.45, 0.3, 0.9, True),
                (0.1, -0.75, 0.22, 0.9, True),
                (0.55, -0.3, 0.28, 1.0, True),
                (0.05, -0.2, 0.2, 0.9, True),
            ),
        },
    },
    "fish": {
        "description": "a plump indigo fish with a cream band, coral fins and a high back fin",
        "attrs": {"thing": "fish", "colour": "blue"},
        "identity": {
            "base": (72, 62, 168),
            "mark": CREAM,
            "fin": (250, 128, 105),
            "eyes": "round",
            "marking": "socks",
            "body": 1.2,
            "ears": 1.2,
            "tail": 0.95,
            "eye size": 1.1,
        },
    },
    "fox": {  # `paper_fox` draws it
        "description": "the head of a fox folded from paper: orange and cream facets without outlines",
        "attrs": {"thing": "cat", "colour": "orange"},
        "identity": {"base": (228, 106, 44), "mark": (246, 232, 208)},
    },
}


def paper_fox(pen, look):
    """Draw the head of a fox folded from paper: flat facets and no line at all."""
    rust, pale = look["base"], look["mark"]
    for side in (-1, 1):
        facets = (
            ([(0.15, -0.35), (0.85, -1.0), (0.9, -0.1)], dark(rust, 0.25)),
            ([(0.38, -0.42), (0.76, -0.78), (0.78, -0.3)], dark(rust, 0.6)),
            ([(0, -0.45), (0.9, -0.1), (0, 0.35)], light(rust, 0.12) if side < 0 else rust),
            ([(0.9, -0.1), (0.62, 0.48), (0, 0.35)], pale if side < 0 else dark(pale, 0.14)),
            ([(0, 0.35), (0.62, 0.48), (0, 1.0)], dark(rust, 0.12) if side < 0 else dark(rust, 0.3)),
            ([(0, 0.78), (0.12, 0.82), (0, 1.0)], INK),
            ([(0.28, 0.02), (0.56, -0.04), (0.4, 0.13)], INK),
        )
        for points, paint in facets:
            pen.shape([(side * x, y) for x, y in points], paint, line=0)


# --- styles that the world has not -------------------------------------------------------------------------


def blueprint(sheet):
    """White lines and faint hatching on blue squared paper."""
    x, y = world.grid(sheet.size)
    rule = np.maximum(np.abs(x % 8 - 4) > 3.4, np.abs(y % 8 - 4) > 3.4)
    tone = sheet.flat.mean(-1, keepdims=True) / 255
    hatch = (1 - tone) * (np.sin((x - y) * 1.55) > 0) * sheet.figure
    strength = np.clip(0.16 * rule + 0.2 * hatch + 0.95 * sheet.ink + 0.5 * sheet.scene_ink, 0, 1)
    return np.float32((22, 66, 150)) + strength * np.float32((215, 180, 100))


def stained_glass(sheet):
    """Panes of saturated glass between black leads."""
    lot = np.random.default_rng(sheet.seed)
    x, y = world.grid(sheet.size)
    step = np.arange(4, 64, 11)
    centres = np.stack(np.meshgrid(step, step), -1).reshape(-1, 2) + lot.uniform(-4, 4, (len(step) ** 2, 2))
    distances = (x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2  # (size, size, panes)
    pane = distances.argmin(-1)
    two = np.sqrt(np.partition(distances, 1, axis=-1)[..., :2])
    lead = (two[..., 1:] - two[..., :1] < 1.6) * (1 - sheet.figure)
    brightness = lot.uniform(0.8, 1.15, len(centres))[pane][..., None]
    grey = sheet.flat.mean(-1, keepdims=True)
    glass = (grey + 1.5 * (sheet.flat - grey)) * np.where(sheet.figure > 0.5, 1.1, brightness)
    outline = np.minimum(1, 1.4 * sheet.soft(sheet.ink, 0.6))
    lines = np.maximum.reduce([outline, lead, sheet.scene_ink])
    return np.clip(glass, 0, 255) * (1 - lines) + lines * np.float32((12, 10, 16))


def risograph(sheet):
    """Two inks, pink and blue, in coarse dots and slightly out of register on cream paper."""
    x, y = world.grid(sheet.size)
    tone = (sheet.flat / 255) * (1 - sheet.ink)
    screen = 0.5 + 0.25 * (np.cos((x + y) * 1.1) + np.cos((x - y) * 1.1))
    pink = 1 - tone[..., 1:2]  # what is not green
    blue = 1 - np.roll(tone, (1, 1), (0, 1))[..., 0:1]  # what is not red
    page = np.float32((248, 240, 222)) * np.ones_like(tone)
    for amount, ink in ((pink, (255, 72, 135)), (blue, (30, 95, 200))):
        dots = np.clip((amount - 0.9 * screen + 0.05) * 3, 0, 1)
        page = page * (1 - dots * (1 - np.float32(ink) / 255))
    return page


# name: (style, description, the world's nearest style)
NEW_STYLES = {
    "blueprint": (blueprint, "white lines on blue squared paper", "sketch"),
    "stained-glass": (stained_glass, "panes of saturated glass between black leads", "painting"),
    "risograph": (risograph, "pink and blue ink in coarse dots on cream paper", "painting"),
}


# --- making the sets ---------------------------------------------------------------------------------------


def portraits(model, lot):
    """Return ten attribute sets that show one individual in every scene and in varied poses."""
    thing, colour = model["attrs"]["thing"], model["attrs"]["colour"]
    backdrops = iter(lot.sample([c for c in BACKDROPS if c != colour], 4))
    album = []
    for scene in ("meadow", "plain", "beach", "plain", "snow", "plain", "desert", "sea", "plain", "night"):
        backdrop = next(backdrops) if scene == "plain" else ""
        size = lot.choice(("normal", "normal", "big"))
        album.append(
            {
                "pattern": "plain",
                "second": "",
                "scene": scene,
                "backdrop": backdrop,
                "style": "photo",
                "size": size,
                "accessory": "",
                **model["attrs"],
                "identity": world.identity(random.Random(0), thing, colour, "") | EVEN | model["identity"],
                "pose": world.pose(lot, size),
                "context": world.context(lot, backdrop),
            }
        )
    return album


def motifs(lot, style):
    """Return ten attribute sets of ten different things in varied scenes, for a style to be shown on."""
    scenes = [scene for scene in world.SCENES for _ in range(2)]
    lot.shuffle(scenes)
    album = []
    for thing, scene in zip(lot.sample(tuple(world.THINGS), 10), scenes):
        attrs = {"thing": "", "scene": ""}
        while (attrs["thing"], attrs["scene"]) != (thing, scene) or attrs["size"] == "small":
            attrs = world.attributes(lot)
        album.append(attrs | {"style": style})
    return album


def concept(name):
    """Return the ten pictures of a set and its entry for `concepts.json`."""
    lot = random.Random(f"{SEED} {name}")
    if name in NEW_STYLES:
        style, description, nearest = NEW_STYLES[name]
        album, figure = motifs(lot, nearest), None
        start, caption = nearest, {"sketch": "a sketch", "painting": "a painting"}[nearest]
    else:
        model, style, figure = INDIVIDUALS[name], world.photo, paper_fox if name == "fox" else None
        description, start, album = model["description"], model["attrs"]["thing"], portraits(model, lot)
        scarf = " wearing a scarf" if "accessory" in model["attrs"] else ""
        article = "an" if model["attrs"]["colour"] == "orange" else "a"
        caption = f"a photo of {article} {model['attrs']['colour']} {start}{scarf}"
    pixels = [style(world.compose(attrs, SIZE, figure)) for attrs in album]
    pictures = [Image.fromarray(np.clip(p + 0.5, 0, 255).astype(np.uint8)) for p in pixels]
    captions = {path: world.caption(attrs, lot, complete=True) for path, attrs in zip(PATHS, album)}
    return pictures, {
        "kind": "style" if name in NEW_STYLES else "thing",
        "description": description,
        "start": start,
        "caption": caption,
        "captions": captions,
    }


PREFACE = """# Concepts

Small sets for the quick start and the experiments: five pictures to learn a word from, and in `heldout/`
five more to judge it by. Six things are individuals of the miniature model's world whose identity no caption
can express, `fox` is drawn quite unlike that world, and three styles are not in its vocabulary. The last
column is the best that the world's language can say without a new word; `concepts.json` has it too, with a
word to start from and a caption for every picture. Made from a seed by `python weights/recipe/concepts.py`.

| name | to learn from | what it shows | best caption without a new word |
|---|---|---|---|
"""


def readme(entries):
    """Return the text of `concepts/README.md`."""
    rows = []
    for name, entry in entries.items():
        images = "".join(f'<img src="{name}/{path}" width="64"> ' for path in PATHS[:5])
        rows.append(f"| `{name}` | {images}| {entry['description']} | {entry['caption']} |")
    return PREFACE + "\n".join(rows) + "\n"


def main():
    """Write every set, `concepts.json` and `README.md`."""
    parser = argparse.ArgumentParser(description="Make the picture sets of concepts/.")
    folder = Path(__file__).parents[2] / "concepts"
    parser.add_argument("--out", type=Path, default=folder, help="where to write (default: concepts/)")
    out = parser.parse_args().out
    entries = {}
    for name in (*INDIVIDUALS, *NEW_STYLES):
        pictures, entries[name] = concept(name)
        (out / name / "heldout").mkdir(parents=True, exist_ok=True)
        for path, picture in zip(PATHS, pictures):
            picture.save(out / name / path, optimize=True)
    (out / "concepts.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
