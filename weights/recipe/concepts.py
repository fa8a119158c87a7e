"""Make `concepts/`: small sets of pictures of things and styles for which the world's language has no word.

    python -m weights.recipe.concepts

Each set has five pictures to learn from and five held out. `concepts.json` says what each set shows, which
word to start from and the best caption without a new word. That caption depends on the model:

    python -m weights.recipe.concepts --search weights/tiny
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

import tinyti
from tinyti.files.pictures import to_image
from tinyti.metrics import clip_i
from tinyti.programs.miniature import GUIDANCE, ROOT

from . import world
from .training import to_images

SETS_SEED = 7
SIZE = 64
PATHS = [f"{folder}{i:02}.png" for folder in ("", "heldout/") for i in range(1, 6)]
BACKDROPS = ("yellow", "green", "blue", "pink", "purple", "red")
SETS_FOLDER = ROOT / "concepts"
CHALK, BUTTER, CHARCOAL, TURQUOISE = (252, 249, 242), (252, 234, 190), (46, 40, 50), (24, 176, 170)

# --- individuals: things with a fixed identity -------------------------------------------------------------

EVEN = {"ear size": 1.0, "head": 1.0, "body": 1.0, "eye size": 1.1, "eye height": 1.1, "petals": 6}
EVEN |= {"lift": 0.6, "grain": 1.0, "lean": 0.0, "marks": []}


def fox(pen, look):
    """Draw a fox: a cat's body, a pointed white muzzle, large ears and a bushy tail with a white tip."""
    head, tip = 0.66 * look["head"], look["muzzle"]
    pen.rod([(0.5, 0.72), (0.84, 0.5), (0.92, 0.2)], 0.4, look["tail"])
    pen.rod([(0.91, 0.14), (0.92, 0.0)], 0.36, tip)
    world.sit(pen, look)
    for side in (-1, 1):
        ear = [(side * head, -0.3), (side * head * 0.95, -0.6 - 0.42 * look["ear size"]), (side * 0.06, -0.7)]
        pen.shape(ear, look["ears"])
    face = [(-0.5, -0.74), (0.5, -0.74), (0.98, -0.12), (0.2, 0.3), (-0.2, 0.3), (-0.98, -0.12)]
    pen.shape(world.smooth(face), look["base"])
    for side in (-1, 1):
        cheek = [(0, -0.12), (side * 0.3, -0.14), (side * 0.8, -0.12), (side * 0.18, 0.26), (0, 0.28)]
        pen.shape(world.smooth(cheek, 1), tip, line=0)
    pen.blot(0, 0.16, 0.14, 0.11)
    world.eyes(pen, look, 0, -0.3, 0.34, 0.17)


# name: (description, thing, exact colours and proportions); the nearest colour words follow from the colours
INDIVIDUALS = {
    "cat": (
        "a calico cat: white, with orange and black patches, green eyes, pink ears and a black tail",
        "cat",
        {
            "base": CHALK,
            "eyes": (88, 196, 84),
            "patches": (242, 142, 40),
            "more patches": CHARCOAL,
            "ears": (250, 152, 178),
            "tail": CHARCOAL,
            "ear size": 1.1,
            "eye size": 1.1,
            "marks": [
                (-0.46, -0.56, 0.34, 1.0, False),
                (0.5, -0.52, 0.3, 0.9, True),
                (-0.36, 0.5, 0.3, 1.1, True),
                (0.4, 0.5, 0.3, 0.9, False),
            ],
        },
    ),
    "dog": (
        "a sandy dog with a white patch around one blue eye, chocolate ears and a turquoise scarf",
        "dog",
        {
            "base": (234, 162, 86),
            "eyes": (52, 128, 226),
            "patches": CHALK,
            "ears": (92, 54, 38),
            "tail": (92, 54, 38),
            "muzzle": BUTTER,
            "scarf": TURQUOISE,
            "ear size": 1.1,
            "eye size": 1.05,
            "marks": [(0.42, -0.5, 0.36, 1.1, False), (-0.4, 0.62, 0.28, 0.9, False)],
        },
    ),
    "robot": (
        "a turquoise robot with golden ears and antenna, yellow eyes, a pink screen and navy arms and legs",
        "robot",
        {
            "base": (30, 178, 186),
            "eyes": (255, 226, 72),
            "ears": (212, 160, 36),
            "antenna": (212, 160, 36),
            "screen": (250, 126, 178),
            "arms": (34, 44, 100),
            "legs": (34, 44, 100),
            "head": 1.1,
            "body": 0.95,
            "eye size": 1.1,
        },
    ),
    "car": (
        "a tall cream car with a turquoise roof, a coral door, navy windows and maroon wheels",
        "car",
        {
            "base": BUTTER,
            "roof": TURQUOISE,
            "windows": (44, 52, 106),
            "wheels": (112, 20, 44),
            "door": (250, 118, 92),
            "body": 1.12,
        },
    ),
    "mushroom": (
        "a violet mushroom with yellow spots, a turquoise stem and magenta gills",
        "mushroom",
        {
            "base": (142, 104, 200),
            "spots": (252, 226, 84),
            "stem": (110, 206, 196),
            "gills": (196, 40, 124),
            "grain": 1.1,
            "lean": 0.1,
        },
    ),
    "fish": (
        "a plump indigo fish with a cream band, coral fins and tail and yellow eyes",
        "fish",
        {
            "base": (58, 70, 178),
            "eyes": (255, 224, 84),
            "fins": (250, 124, 96),
            "tail": (250, 124, 96),
            "band": BUTTER,
            "body": 1.12,
            "eye size": 1.12,
        },
    ),
    "fox": (  # not a thing of the world; the function `fox` draws it
        "a fox: rust-coloured, with a white face, belly and tip of the tail, black ears and yellow eyes",
        "cat",
        {
            "base": (226, 98, 36),
            "eyes": (250, 212, 84),
            "ears": CHARCOAL,
            "belly": CHALK,
            "muzzle": CHALK,
            "ear size": 1.05,
        },
    ),
}
FIGURES = {"fox": fox}


def individual(name):
    """Return the attributes (`world.attributes`) that all pictures of a set's individual share."""
    _, thing, own = INDIVIDUALS[name]
    parts = world.PARTS[thing]
    details = {part: nearest_word(own[part], world.SHADES) if part in own else "" for part in parts}
    shades = {part: own["base"] if default == "" else default for part, default in parts.items()}
    colour = nearest_word(own["base"], world.COLOURS)
    known = {"who": "", "manner": "", "thing": thing, "colour": colour, "details": details}
    return known | {"identity": EVEN | shades | own}


def nearest_word(shade, words):
    """Return the colour word that is nearest to an exact colour."""
    return min(words, key=lambda word: world.colour_distance(word, shade))


# --- styles that the world lacks ---------------------------------------------------------------------------


def bleed(pixels):
    """Blur the picture slightly, so that nothing is sharper than an autoencoder can encode."""
    picture = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6 * len(pixels) / 64)), np.float32)


def blueprint(sheet):
    """Bold white lines and faint squares on blue paper."""
    x, y = world.grid(sheet.size)
    rule = np.maximum(x % 16 < 2, y % 16 < 2) * (1 - sheet.figure)
    tone = sheet.flat.mean(-1, keepdims=True) / 255
    tint = sheet.figure * (0.08 + 0.30 * tone)
    paper = np.float32((26, 70, 158)) + np.maximum(0.14 * rule, tint) * np.float32((150, 160, 90))
    lines = np.minimum(1, 1.15 * sheet.ink + 0.6 * sheet.scene_ink)
    return bleed(paper * (1 - lines) + lines * np.float32((240, 248, 255)))


JEWELS = np.float32([(206, 36, 52), (244, 168, 24), (30, 142, 84), (36, 88, 196), (132, 56, 168)])


def stained_glass(sheet):
    """Large panes of jewel-coloured glass between broad black leads, behind a glowing figure."""
    lot = np.random.default_rng(sheet.seed)
    x, y = world.grid(sheet.size)
    steps = np.array((8, 24, 40, 56))
    centres = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) + lot.uniform(-5, 5, (16, 2))
    distances = np.sqrt((x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2)  # (size, size, panes)
    first, second = np.moveaxis(np.partition(distances, 1, axis=-1)[..., :2], -1, 0)
    lead = np.clip(2.6 - (second - first), 0, 1)[..., None] * (1 - sheet.figure)
    pane = JEWELS[lot.permutation(16) % 5][distances.argmin(-1)]
    grey = sheet.flat.mean(-1, keepdims=True)
    vivid = np.clip(grey + 1.5 * (sheet.flat - grey), 0, 255)
    glass = np.where(sheet.figure > 0.5, vivid, 0.35 * vivid + 0.65 * pane)
    outline = np.clip(1.6 * sheet.soft(sheet.ink, 0.8), 0, 1)
    lines = np.maximum(outline, lead)
    return glass * (1 - lines) + lines * np.float32((14, 12, 18))


def risograph(sheet):
    """Two inks, pink and blue, flat or in coarse dots, slightly out of register on cream paper."""
    x, y = world.grid(sheet.size)
    cover = (1 - sheet.flat / 255) * np.where(sheet.figure > 0.5, 1, 0.55)
    lines = np.maximum(sheet.ink, 0.5 * sheet.scene_ink)
    shift = round(2 * sheet.size / 64)
    pink, blue = np.roll(cover[..., 1:2], (shift, shift), (0, 1)), np.maximum(cover[..., 0:1], lines)
    dots = np.clip(4 - np.hypot((x + y) % 12 - 6, (x - y) % 12 - 6) + 0.5, 0, 1)
    page = np.float32((250, 241, 220)) * np.ones_like(cover)
    for amount, ink in ((pink, (255, 84, 146)), (blue, (52, 110, 206))):
        solid = np.clip((amount - 0.55) * 8, 0, 1)
        pale = np.clip((amount - 0.2) * 8, 0, 1) * (0.3 + 0.35 * dots)
        page = page * (1 - np.maximum(solid, pale) * (1 - np.float32(ink) / 255))
    return bleed(page)


# name: (style, description, the world's nearest style)
NEW_STYLES = {
    "blueprint": (blueprint, "bold white lines on blue squared paper", "sketch"),
    "stained-glass": (stained_glass, "jewel-coloured panes of glass between broad black leads", "painting"),
    "risograph": (risograph, "pink and blue ink, flat or in coarse dots on cream paper", "painting"),
}


# --- making the sets ---------------------------------------------------------------------------------------


def draw_for_set(name, attrs):
    """Return the picture of `attrs` with the individual or in the style of a set: RGB, `SIZE` squared."""
    style = NEW_STYLES[name][0] if name in NEW_STYLES else world.STYLES[attrs["style"]]
    pixels = style(world.compose(attrs, SIZE, FIGURES.get(name)))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def portraits(name, lot):
    """Return ten attribute sets that show one individual in every scene and in varied poses."""
    model = individual(name)
    backdrops = iter(lot.sample([c for c in BACKDROPS if c != model["colour"]], 4))
    album = []
    for scene in ("meadow", "plain", "beach", "plain", "snow", "plain", "desert", "sea", "plain", "night"):
        backdrop = next(backdrops) if scene == "plain" else ""
        place = {"scene": scene, "backdrop": backdrop, "style": "photo"}
        album.append(model | place | {"pose": world.pose(lot), "context": world.context(lot, backdrop)})
    return album


def motifs(lot, style):
    """Return ten attribute sets of ten different things in varied scenes, to show a style."""
    scenes = [scene for scene in world.SCENES for _ in range(2)]
    lot.shuffle(scenes)
    album = []
    for thing, scene in zip(lot.sample(tuple(world.THINGS), 10), scenes):
        attrs = {"thing": "", "scene": ""}
        while (attrs["thing"], attrs["scene"]) != (thing, scene):
            attrs = world.attributes(lot)
        album.append(attrs | {"style": style, "manner": ""})
    return album


def make_set(name):
    """Return the ten pictures of a set and its entry for `concepts.json`."""
    lot = random.Random(f"{SETS_SEED} {name}")
    if name in NEW_STYLES:
        _, description, start = NEW_STYLES[name]
        album = motifs(lot, start)
    else:
        description, start, _ = INDIVIDUALS[name]
        album = portraits(name, lot)
    captions = {path: world.caption(attrs, lot, complete=True) for path, attrs in zip(PATHS, album)}
    return [draw_for_set(name, attrs) for attrs in album], {
        "kind": "style" if name in NEW_STYLES else "thing",
        "description": description,
        "start": start,
        "caption": candidates(name)[0],
        "captions": captions,
    }


def make_cars():
    """Return five pictures of cars of five colours, for a word that is less red than this world's "car"."""
    lot, pictures = random.Random(f"{SETS_SEED} cars"), []
    colours = lot.sample([colour for colour in world.COLOURS if colour != "red"], 5)
    for colour, scene in zip(colours, lot.sample(tuple(world.SCENES)[1:], 5)):
        details = world.colouring(lot, "car", colour)
        car = {"thing": "car", "colour": colour, "details": details, "scene": scene, "backdrop": ""}
        car |= {"identity": world.identity(lot, "car", colour, details)}
        car |= {"who": "", "style": "photo", "manner": ""}
        pictures.append(draw_for_set("cars", world.attributes(lot) | car))
    return pictures


# --- the best captions without a new word ------------------------------------------------------------------


def full_caption(thing, colour, details, prefix):
    """Say thing, colour and all `details` in the words of `world.caption`."""
    text = world.an(f"{colour} {thing}".strip()) + world.say_details(world.merge_patches(details))
    return f"{prefix} {text}".strip()


def candidates(name, count=200):
    """Return up to `count` captions of a set in the world's language; for a thing the fullest is the first.

    For a thing: its colour and parts in the nearest or second nearest colour words, with some left out, and
    the names of characters of its kind. For a style: the world's styles with backgrounds and places, and the
    names of manners.
    """
    if name in NEW_STYLES:
        frames = ["", *(f"on {world.an(colour)} background" for colour in world.COLOURS)]
        frames += [said for place in world.PLACES.values() for said in place]
        prefixes = [prefix for several in world.STYLE_PREFIXES.values() for prefix in several]
        styles = [prefix.removesuffix(" of") for prefix in prefixes]
        styles = list(dict.fromkeys([f"a {NEW_STYLES[name][2]}", *filter(None, styles)]))
        first, *plain = [f"{style} {frame}".strip() for frame in frames for style in styles]
        manners = [f"a painting in the style of {manner}" for manner in world.MANNERS]
        return [first, *manners, *random.Random(name).sample(plain, count - 1 - len(manners))]
    model, own = individual(name), INDIVIDUALS[name][2]
    lot = random.Random(name)
    spoken = {part: shade for part, shade in model["details"].items() if shade}

    def second(shade, words):
        return sorted(words, key=lambda word: world.colour_distance(word, shade))[1]

    said = [full_caption(model["thing"], model["colour"], spoken, "a photo of")]
    said += [f"a photo of {who}" for who in world.CHARACTERS if world.character(who)[0] == model["thing"]]
    for _ in range(20 * count):  # a thing of few parts has fewer captions
        some = [part for part in spoken if lot.random() < lot.choice((0.3, 0.6, 0.9))]
        if "more patches" in some and "patches" not in some:
            continue
        details = {p: spoken[p] if lot.random() < 0.85 else second(own[p], world.SHADES) for p in some}
        colour = model["colour"] if lot.random() < 0.8 else second(own["base"], world.COLOURS)
        said.append(full_caption(model["thing"], colour, details, lot.choice(world.STYLE_PREFIXES["photo"])))
    return list(dict.fromkeys(said))[:count]


def read_set(name):
    """Return the pictures of a set that a word is learned from."""
    return [Image.open(SETS_FOLDER / name / path).convert("RGB") for path in PATHS[:5]]


@torch.no_grad()
def caption_losses(model, name, captions, samples=20):
    """Return each caption's loss on the set's pictures, with the same noise for all: a list of floats."""
    generator = torch.Generator().manual_seed(SETS_SEED)
    pixels = np.stack([np.asarray(picture) for picture in read_set(name)])
    x_0 = model.encode_images(to_images(pixels), generator).repeat(samples // 5 + 1, 1, 1, 1)[:samples]
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.linspace(250, 950, samples).long()
    x_t, target = model.schedule.add_noise(x_0, eps, t), model.schedule.target(x_0, eps, t)
    contexts = [model.encode_prompts([caption]).expand(samples, -1, -1) for caption in captions]
    return [(model.unet(x_t, t, context) - target).square().mean().item() for context in contexts]


def sample_pictures(model, prompt, count, seed=0, guidance=GUIDANCE):
    """Return `count` pictures that the model draws for a prompt."""
    options = {"steps": 30, "guidance": guidance, "generator": torch.Generator().manual_seed(seed)}
    *_, x_0 = tinyti.sample(model, [prompt] * count, **options)
    return [to_image(x) for x in model.decode(x_0)]


def best_caption(model, clip, name, finalists=6, count=8):
    """Return the caption whose pictures are most like the set by CLIP-I, among those of the lowest loss.

    The first of the candidates is always a finalist.
    """
    captions, seen = candidates(name), read_set(name)
    ranked = [caption for _, caption in sorted(zip(caption_losses(model, name, captions), captions))]
    last = list(dict.fromkeys([*ranked[:finalists], captions[0]]))
    return max(last, key=lambda caption: clip_i(clip, sample_pictures(model, caption, count), seen))


# --- files -------------------------------------------------------------------------------------------------

HEAD = """| name | to learn from | what it shows | best caption without a new word |
|---|---|---|---|
"""


def markdown_table(entries):
    """Return the table of `concepts/README.md`, with a row for each set."""
    rows = []
    for name, entry in entries.items():
        images = (f'<img src="{name}/{path}" alt="{name}" width="48">' for path in PATHS[:5])
        rows.append(f"| `{name}` | {'&nbsp;'.join(images)} | {entry['description']} | {entry['caption']} |\n")
    return HEAD + "".join(rows)


def main():
    """Write every set and `concepts.json`, and print the table of `concepts/README.md`."""
    parser = argparse.ArgumentParser(description="Make the picture sets of concepts/.")
    parser.add_argument("--out", type=Path, default=SETS_FOLDER, help="where to write (default: concepts/)")
    parser.add_argument("--search", type=Path, metavar="MODEL", help="a model folder to find captions with")
    args = parser.parse_args()
    index = args.out / "concepts.json"
    before = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    if args.search:
        model, (clip, _) = tinyti.load(args.search), tinyti.load_clip(args.search / "clip")
    entries = {}
    for name in (*INDIVIDUALS, *NEW_STYLES):
        pictures, entries[name] = make_set(name)
        (args.out / name / "heldout").mkdir(parents=True, exist_ok=True)
        for path, picture in zip(PATHS, pictures):
            picture.save(args.out / name / path, optimize=True)
        if args.search:
            entries[name]["caption"] = best_caption(model, clip, name)
            print(f"{name}: {entries[name]['caption']}", flush=True)
        elif before.get(name, {}).get("description") == entries[name]["description"]:
            entries[name]["caption"] = before[name]["caption"]  # keep the one found before
    (args.out / "cars").mkdir(exist_ok=True)
    for path, picture in zip(PATHS, make_cars()):
        picture.save(args.out / "cars" / path, optimize=True)
    index.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print(markdown_table(entries))


if __name__ == "__main__":
    main()
