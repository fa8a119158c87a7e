"""The picture book that the miniature model learns from: one thing, drawn in one scene, in one style.

`attributes` invents a page, `draw` turns it into a picture and `caption` into English. Parts may have colours
of their own, and captions name some of them, so a new word can mean "green eyes, orange patches" too.
A picture still shows more than its caption says: the other parts, exact hues, proportions and markings
(`identity`), position and tilt (`pose`), the layout of the background (`context`).
"""

import colorsys
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLE = 4
INK = (30, 23, 34)

# name: (hue in degrees, saturation, value), each from – to
COLOURS = {
    "red": ((354, 363), (0.84, 0.95), (0.80, 0.90)),
    "orange": ((25, 31), (0.88, 0.97), (0.96, 1.0)),
    "yellow": ((51, 56), (0.74, 0.90), (0.97, 1.0)),
    "green": ((115, 138), (0.62, 0.80), (0.54, 0.68)),
    "blue": ((209, 220), (0.74, 0.88), (0.82, 0.95)),
    "purple": ((273, 284), (0.60, 0.74), (0.54, 0.66)),
    "pink": ((330, 342), (0.38, 0.50), (0.97, 1.0)),
    "brown": ((18, 26), (0.60, 0.70), (0.42, 0.50)),
    "white": ((30, 60), (0.00, 0.04), (0.97, 1.0)),
    "black": ((230, 290), (0.05, 0.16), (0.20, 0.26)),
}
# All the colours that a part may have.
SHADES = COLOURS | {
    "grey": ((210, 230), (0.03, 0.10), (0.54, 0.62)),
    "turquoise": ((174, 182), (0.74, 0.88), (0.74, 0.83)),
    "golden": ((43, 47), (0.84, 0.94), (0.76, 0.83)),
    "beige": ((34, 40), (0.25, 0.33), (0.88, 0.93)),
    "navy": ((222, 231), (0.74, 0.85), (0.36, 0.43)),
    "maroon": ((344, 353), (0.78, 0.90), (0.40, 0.47)),
    "lilac": ((262, 272), (0.28, 0.36), (0.89, 0.95)),
    "olive": ((61, 68), (0.66, 0.80), (0.43, 0.50)),
    "mint": ((143, 153), (0.30, 0.40), (0.90, 0.96)),
    "coral": ((6, 12), (0.56, 0.65), (0.96, 1.0)),
}

WHITE, CREAM, GREY = (255, 253, 248), (247, 236, 210), (160, 163, 172)
LEAF, WOOD, GLASS, CLAY = (76, 158, 74), (122, 84, 54), (188, 226, 246), (196, 104, 70)
TYRE, LAMP, BEAK, TEA, BRICK = (66, 62, 72), (255, 232, 140), (248, 168, 44), (112, 70, 46), (176, 92, 72)

# The parts of every thing in the order of its captions, each with its default colour: "" is the thing's own
# colour, and None means that the part is absent.
COAT = {"eyes": WHITE, "patches": None, "more patches": None}
PARTS = {
    "cat": COAT | {"stripes": None, "ears": "", "belly": None, "tail": "", "scarf": None},
    "dog": COAT | {"ears": "", "muzzle": CREAM, "tail": "", "scarf": None, "hat": None},
    "bird": {"eyes": WHITE, "beak": BEAK, "wings": "", "belly": None, "tail": "", "hat": None},
    "fish": {"eyes": WHITE, "fins": "", "tail": "", "stripes": None, "spots": None, "band": None},
    "rabbit": COAT | {"ears": "", "belly": None, "tail": WHITE, "scarf": None},
    "car": {"roof": "", "windows": GLASS, "wheels": TYRE, "door": "", "stripe": None},
    "boat": {"sail": WHITE, "flag": None, "mast": WOOD, "stripe": None, "windows": None},
    "house": {"roof": BRICK, "door": WOOD, "window": LAMP, "chimney": BRICK, "stripes": None},
    "mushroom": {"spots": None, "stripes": None, "stem": CREAM, "gills": CREAM, "band": None},
    "flower": {"centre": LAMP, "leaves": LEAF, "pot": CLAY, "band": None},
    "robot": {"eyes": WHITE, "ears": GREY, "screen": None, "arms": GREY, "legs": GREY, "antenna": GREY},
    "cup": {"handle": "", "spots": None, "stripes": None, "band": None, "drink": TEA, "saucer": None},
}
MARKINGS = ("patches", "stripes", "spots", "band")  # a thing has one of them at most
# Parts that overlap or are seen together: their colours must differ clearly.
NEIGHBOURS = (
    {"eyes", "patches", "more patches"},
    {"eyes", "stripes", "beak"},
    {"belly", "stripes", "scarf"},
    {"belly", "wings"},
    {"muzzle", "ears", "eyes"},
    {"ears", "hat"},
    {"eyes", "spots"},
    {"roof", "windows"},
    {"roof", "chimney"},
    {"door", "stripe", "stripes", "window"},
    {"stripe", "windows"},
    {"mast", "sail", "flag"},
    {"stem", "band", "gills"},
    {"pot", "band", "leaves"},
)


# --- drawing -----------------------------------------------------------------------------------------------


def mix(colour, other, part):
    """Return `colour` with a `part` (0 to 1) of `other` in it."""
    return tuple(round(a + (b - a) * part) for a, b in zip(colour, other))


def light(colour, part=0.6):
    """Return a tint of `colour`."""
    return mix(colour, (255, 255, 255), part)


def dark(colour, part=0.35):
    """Return a shade of `colour`."""
    return mix(colour, (20, 15, 30), part)


def smooth(points, rounds=2):
    """Round the corners of a closed polygon by cutting them `rounds` times (Chaikin)."""
    points = np.asarray(points, dtype=float)
    for _ in range(rounds):
        after = np.roll(points, -1, axis=0)
        corners = [0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after]
        points = np.stack(corners, axis=1).reshape(-1, 2)
    return points


def curve(a, b, c, steps=10):
    """Return points of the quadratic Bézier curve from `a` to `c` that is pulled towards `b`."""
    t = np.linspace(0, 1, steps)[:, None]
    return (1 - t) ** 2 * np.array(a) + 2 * t * (1 - t) * np.array(b) + t**2 * np.array(c)


def box(left, top, right, bottom):
    """Return the corners of a rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


ROUND = np.stack([f(np.arange(28) * 2 * math.pi / 28) for f in (np.cos, np.sin)], axis=1)


class Pen:
    """Draws outlined shapes in its own coordinates on an RGBA canvas whose alpha tells paint from ink.

    `frame` is (scale, tilt, x, y, mirrored): where the pen's unit square goes, in pixels. An ink line keeps
    the colour of its shape; the style decides what the line looks like.
    """

    def __init__(self, canvas, frame, paint, ink, line):
        scale, tilt, x, y, mirrored = frame
        cos, sin = scale * math.cos(tilt), scale * math.sin(tilt)
        flip = -1 if mirrored else 1
        self.matrix = np.array([[cos * flip, sin * flip], [-sin, cos]])
        self.offset = np.array([x, y])
        self.frame, self.scale, self.canvas, self.to = frame, scale, canvas, ImageDraw.Draw(canvas)
        self.paint, self.ink, self.line = (paint,), (ink,), line

    def place(self, points):
        """Return pixel coordinates as a list of tuples."""
        return list(map(tuple, (np.asarray(points, dtype=float) @ self.matrix + self.offset).tolist()))

    def shape(self, points, fill, line=1.0):
        """Fill a polygon with a colour or with a picture, and ink its outline (`line`: relative width)."""
        points = self.place(points)
        edge = fill
        if isinstance(fill, Image.Image):
            stencil = Image.new("1", self.canvas.size)
            ImageDraw.Draw(stencil).polygon(points, 1)
            self.canvas.paste(fill, (0, 0), stencil)
            edge = fill.info["base"]
        else:
            self.to.polygon(points, fill + self.paint)
        if line:
            joint = "curve" if len(points) < 10 else None
            width = max(1, round(line * self.line))
            self.to.line([*points, *points[:2]], edge + self.ink, width, joint)

    def oval(self, x, y, rx, ry, fill, line=1.0, turn=0.0):
        """Fill an ellipse, turned by `turn` radians."""
        points = ROUND * (rx, ry)
        if turn:
            points = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        self.shape(points + np.array((x, y)), fill, line)

    def rod(self, points, width, fill, line=1.0):
        """Draw a thick round-ended line: a tail, a leg, a mast."""
        places = self.place(points)
        inner = width * self.scale
        for part, edge in ((self.ink, line * self.line), (self.paint, -line * self.line)):
            w, colour = max(1, inner + edge), fill + part
            self.to.line(places, colour, round(w), "curve")
            for x, y in (places[0], places[-1]):
                self.to.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), colour)

    def blot(self, x, y, rx, ry, colour=INK):
        """Draw an ellipse of ink: a pupil, a nose."""
        self.to.polygon(self.place(ROUND * (rx, ry) + (x, y)), colour + self.ink)


SCENE_PAINT, SCENE_INK, FIGURE_PAINT, FIGURE_INK = 0, 85, 170, 255


# --- markings: pictures to fill shapes with, in the coordinates of the figure ------------------------------


def stripes(pen, look):
    """Draw bands across the figure."""
    step, lean = 0.46 * look["grain"], look["lean"]
    for i in range(-6, 7):
        left, right, wide = i * step - 3 * lean, i * step + 3 * lean, step * 0.45
        pen.shape([(-3, left), (3, right), (3, right + wide), (-3, left + wide)], look["stripes"], line=0)


def spots(pen, look):
    """Draw a lattice of large dots over the figure."""
    step = 0.56 * look["grain"]
    for row in range(-4, 5):
        for column in range(-3, 4):
            x = (column + 0.5 * (row % 2)) * step + look["lean"]
            pen.shape(ROUND[::2] * step * 0.32 + (x, row * step * 0.8), look["spots"], line=0)


def patches(pen, look):
    """Draw the irregular patches of a piebald animal."""
    for x, y, radius, squeeze, which in look["marks"]:
        a = np.arange(9) * 2 * math.pi / 9
        bulge = 1 + 0.2 * np.sin(3 * a + 9 * squeeze)
        outline = np.stack([x + radius * np.cos(a) * bulge, y + radius * squeeze * np.sin(a)], axis=1)
        paint = look["more patches"] if which else look["patches"]
        pen.shape(smooth(outline, 1), paint or look["patches"], line=0)


FABRICS = {"patches": patches, "stripes": stripes, "spots": spots}


def fabric(pen, look):
    """Return the filling of the body: its colour, or a picture of its marking in the body's position."""
    for marking, pattern in FABRICS.items():
        if look.get(marking):
            cloth = Image.new("RGBA", pen.canvas.size, look["base"] + pen.paint)
            pattern(Pen(cloth, pen.frame, pen.paint[0], pen.ink[0], pen.line), look)
            cloth.info["base"] = look["base"]
            return cloth
    return look["base"]


# --- things: each draws a figure of about 2 by 2 around (0, 0) ---------------------------------------------


def eyes(pen, look, x, y, gap, radius=0.185):
    """Draw a pair of eyes `gap` to either side of (x, y), or one if `gap` is 0."""
    radius = radius * look["eye size"]
    for side in (-1, 1) if gap else (1,):
        pen.oval(x + side * gap, y, radius, radius * look["eye height"], look["eyes"], line=0.6)
        pen.blot(x + side * gap, y, radius * 0.4, radius * 0.44 * look["eye height"])


def sit(pen, look):
    """Draw the sitting body of an animal: trunk, belly and two feet."""
    wide = 0.56 * look["body"]
    pen.oval(0, 0.52, wide, 0.46, look["coat"])
    if look.get("belly"):
        pen.oval(0, 0.56, wide * 0.6, 0.36, look["belly"], line=0)
    for side in (-1, 1):
        pen.oval(side * wide * 0.62, 0.88, 0.24, 0.14, look["base"])


def scarf(pen, look, y, wide):
    """Wind a scarf around a neck."""
    if look["scarf"]:
        pen.shape(smooth(box(0.12, y, 0.44, y + 0.58), 1), look["scarf"])
        pen.shape(smooth(box(-wide, y - 0.13, wide, y + 0.17), 1), look["scarf"])


def hat(pen, look, x, y, wide):
    """Put a hat on a head."""
    if look["hat"]:
        pen.shape(box(x - wide * 0.62, y - 0.38, x + wide * 0.62, y), look["hat"])
        pen.shape(smooth(box(x - wide, y - 0.1, x + wide, y + 0.1), 1), look["hat"])


def cat(pen, look):
    """Draw a sitting cat with pointed ears and a raised tail."""
    head, ear = 0.70 * look["head"], 0.42 * look["ear size"]
    pen.rod(curve((0.3, 0.85), (1.2, 0.85), (0.92, 0.35 - 0.35 * look["lift"])), 0.24, look["tail"])
    sit(pen, look)
    for side in (-1, 1):
        ear_tip = (side * head * 0.92, -0.56 - ear)
        pen.shape([(side * head * 0.98, -0.3), ear_tip, (side * 0.08, -0.72)], look["ears"])
    pen.oval(0, -0.28, head, 0.50, look["coat"])
    pen.blot(0, -0.06, 0.1, 0.075)
    eyes(pen, look, 0, -0.34, 0.33)
    scarf(pen, look, 0.22, 0.5)


def dog(pen, look):
    """Draw a sitting dog with hanging ears and a big muzzle."""
    head, drop = 0.58 * look["head"], 0.42 * look["ear size"]
    pen.rod(curve((0.35, 0.78), (0.85, 0.75), (1.0, 0.4 - 0.3 * look["lift"])), 0.24, look["tail"])
    sit(pen, look)
    pen.oval(0, -0.36, head, 0.54, look["coat"])
    pen.oval(0, -0.08, 0.36, 0.26, look["muzzle"], line=0.7)
    pen.blot(0, -0.17, 0.15, 0.1)
    eyes(pen, look, 0, -0.45, 0.25, 0.175)
    ear = [(-0.14, -0.86), (0.1, -0.84), (0.40, -0.6 + drop), (0.2, -0.36 + drop), (-0.06, -0.46 + drop)]
    for side in (-1, 1):
        pen.shape(smooth([(side * (head + x), y) for x, y in ear]), look["ears"])
    scarf(pen, look, 0.26, 0.5)
    hat(pen, look, 0, -0.78, 0.46)


def rabbit(pen, look):
    """Draw a sitting rabbit with long upright ears and a round tail."""
    head, ear = 0.54 * look["head"], 0.20 * look["ear size"]
    pen.oval(0.62, 0.66, 0.24, 0.24, look["tail"])
    sit(pen, look)
    for side in (-1, 1):
        turn = side * (0.1 + 0.15 * look["lift"])
        pen.oval(side * 0.29, -0.54 - ear, 0.19, 0.18 + ear, look["ears"], turn=turn)
    pen.oval(0, -0.18, head, 0.44, look["coat"])
    pen.blot(0, 0.0, 0.1, 0.075)
    eyes(pen, look, 0, -0.25, 0.26)
    scarf(pen, look, 0.26, 0.46)


def bird(pen, look):
    """Draw a bird in profile, with a beak, a wing and a tail."""
    head = 0.44 * look["head"]
    for x in (-0.12, 0.2):
        pen.rod([(x, 0.6), (x, 0.95), (x + 0.12, 0.95)], 0.1, BEAK, line=0.6)
    tip = -0.1 - 0.25 * look["lift"]
    pen.shape([(-0.4, 0.05), (-1.12, tip), (-1.05, tip + 0.45), (-0.45, 0.48)], look["tail"])
    pen.shape([(0.66, -0.66), (0.78 + 0.35 * look["ear size"], -0.4), (0.66, -0.16)], look["beak"])
    pen.oval(-0.02, 0.2, 0.68, 0.54 * look["body"], look["coat"])
    pen.oval(0.34, -0.42, head, head, look["base"])
    pen.oval(0.32, 0.02, 0.29, 0.2, look["base"], line=0)
    if look["belly"]:
        pen.oval(0.30, 0.36, 0.34, 0.28, look["belly"], line=0)
    pen.shape(smooth([(0.12, -0.04), (0.12, 0.38), (-0.38, 0.5), (-0.8, 0.12), (-0.3, -0.08)]), look["wings"])
    eyes(pen, look, 0.42, -0.42, 0, 0.21)
    hat(pen, look, 0.32, -0.76, 0.42)


def fish(pen, look):
    """Draw a fish in profile."""
    tall, tip, back = 0.56 * look["body"], 0.42 + 0.2 * look["lift"], look["ear size"]
    pen.shape(smooth([(-0.5, 0), (-1.12, -tip), (-0.92, 0), (-1.12, tip)], 1), look["tail"])
    ridge = [(0.45, -0.3), (0.15, -0.62 - 0.3 * back), (-0.42, -0.55 - 0.2 * back), (-0.5, -0.2)]
    pen.shape(smooth(ridge, 1), look["fins"])
    pen.shape(smooth([(0.2, 0.35), (-0.3, 0.4), (-0.36, 0.92), (0.08, 0.8)], 1), look["fins"])
    pen.oval(0.12, 0, 0.82, tall, look["coat"])
    if look["band"]:
        bend = np.linspace(-0.9, 0.9, 9)[:, None]
        arc = np.hstack([0.16 - 0.08 * np.cos(bend * 1.5), tall * bend])
        half = np.array((0.15, 0))
        pen.shape(np.vstack([arc - half, arc[::-1] + half]), look["band"], line=0)
    pen.shape(smooth([(0.02, 0.06), (-0.46, -0.08), (-0.42, 0.38)], 1), look["fins"], line=0.8)
    eyes(pen, look, 0.56, -0.12, 0, 0.21)


def car(pen, look):
    """Draw a car in profile, with a cabin and two wheels."""
    roof, nose = -0.78 * look["body"], 0.1 * look["head"]
    pen.shape(smooth([(-0.82, 0.1), (-0.62, roof), (0.32, roof), (0.72, 0.1)], 1), look["roof"])
    top = roof + 0.3
    pen.shape([(-0.62, 0.0), (-0.48, top), (-0.12, top), (-0.12, 0.0)], look["windows"], line=0.7)
    pen.shape([(0.04, 0.0), (0.04, top), (0.26, top), (0.48, 0.0)], look["windows"], line=0.7)
    chassis = [(-1.08, 0.02), (0.55, -0.02), (1.1, 0.06 + nose), (1.1, 0.58), (-1.08, 0.58)]
    pen.shape(smooth(chassis), look["base"])
    if look["stripe"]:
        pen.shape(box(-1.0, 0.17, 1.02, 0.37), look["stripe"], line=0)
    pen.shape(box(-0.22, 0.04, 0.24, 0.54), look["door"], line=0.7)
    pen.oval(0.98, 0.22, 0.1, 0.1, LAMP, line=0.6)
    for x in (-0.62, 0.62):
        pen.oval(x, 0.58, 0.32 * look["eye size"], 0.32 * look["eye size"], look["wheels"])
        pen.blot(x, 0.58, 0.09, 0.09)


def boat(pen, look):
    """Draw a sailing boat with a hull, a mast, two sails and, if it has one, a flag."""
    mast, keel = -0.2 + 0.2 * look["lift"], 0.88 * look["body"]
    pen.rod([(mast, 0.3), (mast, -0.92)], 0.17, look["mast"])
    tip = (0.35 + 0.55 * look["ear size"], 0.14)
    pen.shape([(mast + 0.14, -0.68), (mast + 0.14, 0.14), tip], look["sail"])
    pen.shape([(mast - 0.14, -0.42), (mast - 0.14, 0.14), (-0.85, 0.14)], look["sail"])
    if look["flag"]:
        pen.shape([(mast + 0.06, -1.06), (mast + 0.62, -0.88), (mast + 0.06, -0.68)], look["flag"], line=0.8)
    pen.shape([(-1.08, 0.26), (1.08, 0.26), (0.74, keel), (-0.74, keel)], look["base"])
    if look["stripe"]:
        pen.shape([(-0.96, 0.36), (0.96, 0.36), (0.84, 0.57), (-0.84, 0.57)], look["stripe"], line=0)
    if look["windows"]:
        for x in (-0.5, 0, 0.5):
            pen.oval(x, 0.54, 0.15, 0.15, look["windows"], line=0.6)


def house(pen, look):
    """Draw a house with a roof, a door, a window and a chimney."""
    wide, eaves = 0.76 * look["body"], -0.12 * look["ear size"]
    pen.shape(box(0.28, -0.98, 0.62, -0.3), look["chimney"])
    pen.shape(box(-wide, eaves, wide, 0.95), look["coat"])
    pen.shape([(-wide - 0.25, eaves), (0, -1.0 + 0.15 * look["lift"]), (wide + 0.25, eaves)], look["roof"])
    pen.shape(box(-0.56, 0.3, -0.12, 0.95), look["door"])
    pen.shape(box(0.1, 0.18, 0.56, 0.62), look["window"])


def mushroom(pen, look):
    """Draw a mushroom with a round cap on a stem."""
    wide, top = 0.30 + 0.14 * look["lift"], -0.98 * look["body"]
    stem = [(-wide, -0.1), (wide, -0.1), (wide + 0.1, 1.08), (-wide - 0.1, 1.08)]
    cap = [(-1.05, 0.22), (-1.02, -0.35), (-0.5, top), (0.5, top), (1.02, -0.35), (1.05, 0.22)]
    pen.shape(smooth(stem), look["stem"])
    pen.oval(0, 0.1, 0.84, 0.3, look["gills"])
    if look["band"]:
        pen.shape(smooth(box(-wide - 0.16, 0.44, wide + 0.16, 0.78), 1), look["band"], line=0.7)
    pen.shape(smooth(cap) - (0, 0.08), look["coat"])


def flower(pen, look):
    """Draw a flower in a pot, with petals around a disc."""
    count, round_it = look["petals"], look["lift"]
    pen.rod(curve((0, -0.2), (0.1, 0.2), (0, 0.7), 6), 0.16, look["leaves"], line=0.8)
    for side in (-1, 1):
        pen.oval(side * 0.42, 0.36, 0.36 * look["ear size"], 0.17, look["leaves"], turn=-side * 0.4)
    pen.shape([(-0.52, 0.54), (0.52, 0.54), (0.38, 1.02), (-0.38, 1.02)], look["pot"])
    if look["band"]:
        pen.shape([(-0.45, 0.66), (0.45, 0.66), (0.39, 0.88), (-0.39, 0.88)], look["band"], line=0)
    for i in range(count):
        a = 2 * math.pi * (i + round_it) / count
        x, y = 0.44 * math.cos(a), -0.42 + 0.44 * math.sin(a)
        pen.oval(x, y, 0.28 * look["body"], 1.35 / count, look["base"], turn=a)
    pen.oval(0, -0.42, 0.29 * look["head"], 0.29 * look["head"], look["centre"])


def robot(pen, look):
    """Draw a robot with a square head, an antenna, arms and legs."""
    head, wide = 0.56 * look["head"], 0.52 * look["body"]
    pen.rod([(0, -0.7), (0, -0.9)], 0.1, look["antenna"])
    pen.oval(0, -0.96, 0.15, 0.15, look["antenna"])
    for side in (-1, 1):
        pen.rod([(side * 0.45, 0.25), (side * 0.92, 0.42 - 0.5 * look["lift"])], 0.24, look["arms"])
        pen.rod([(side * 0.26, 0.7), (side * 0.26, 0.9)], 0.28, look["legs"])
        pen.shape(box(side * (head - 0.05), -0.6, side * (head + 0.22), -0.2), look["ears"])
    pen.shape(smooth(box(-wide, 0.0, wide, 0.8), 1), look["base"])
    pen.shape(smooth(box(-head, -0.8, head, 0.04), 1), look["base"])
    eyes(pen, look, 0, -0.4, 0.27, 0.19)
    if look["screen"]:
        pen.shape(box(-0.32, 0.2, 0.32, 0.62), look["screen"], line=0.7)


def cup(pen, look):
    """Draw a cup with a handle and a drink."""
    foot = 0.46 + 0.2 * look["lift"]
    if look["saucer"]:
        pen.oval(0, 0.86, 1.02, 0.2, look["saucer"])
    pen.rod(curve((0.5, -0.3), (1.45 * look["ear size"], 0.1), (0.45, 0.6)), 0.22, look["handle"])
    side = [(0.76, -0.6), (0.76, -0.2), (foot + 0.08, 0.68), (foot - 0.1, 0.94)]
    pen.shape(smooth([*side, *((-x, y) for x, y in reversed(side))], 1) * (1, look["body"]), look["coat"])
    if look["band"]:
        pen.shape([(-0.7, 0.02), (0.7, 0.02), (0.64, 0.34), (-0.64, 0.34)], look["band"], line=0)
    pen.oval(0, -0.52 * look["body"], 0.76, 0.27, look["base"])
    pen.oval(0, -0.51 * look["body"], 0.58, 0.16, look["drink"], line=0.6)


THINGS = {
    draw.__name__: draw
    for draw in (cat, dog, bird, fish, rabbit, car, boat, house, mushroom, flower, robot, cup)
}


# --- scenes: each fills the unit square --------------------------------------------------------------------


def hills(lot, height, swing, steepness):
    """Return the outline of rolling ground that fills the frame below `height`."""
    swell = lot.uniform(0, 6)
    ridge = [(x, height + swing * math.sin(steepness * x + swell)) for x in np.linspace(-0.1, 1.1, 14)]
    return [*ridge, (1.1, 1.1), (-0.1, 1.1)]


def plain(pen, lot, backdrop):
    """Fill the frame with one colour."""
    pen.shape(box(0, 0, 1, 1), backdrop, line=0)


def beach(pen, lot, backdrop):
    """Sky, sun, a strip of sea and yellow sand."""
    horizon = lot.uniform(0.36, 0.42)
    pen.shape(box(0, 0, 1, 1), (160, 216, 246), line=0)
    pen.oval(lot.choice((0.14, 0.86)), 0.14, 0.11, 0.11, (255, 222, 70))
    pen.shape(box(-0.1, horizon, 1.1, 1.1), (46, 140, 204))
    pen.shape(hills(lot, lot.uniform(0.62, 0.68), 0.02, 7), (244, 216, 148))


def night(pen, lot, backdrop):
    """Dark sky with a moon and stars over a dark hill."""
    pen.shape(box(0, 0, 1, 1), (30, 36, 92), line=0)
    moon = lot.choice((0.15, 0.85))
    pen.oval(moon, 0.15, 0.11, 0.11, (250, 240, 190))
    for x, y in ((0.38, 0.08), (0.62, 0.12), (0.88, 0.2), (0.08, 0.46), (0.94, 0.48), (0.12, 0.2)):
        if abs(x - moon) > 0.15 or y > 0.4:
            x, y, r = x + lot.uniform(-0.04, 0.04), y + lot.uniform(-0.04, 0.04), 0.042
            star = [(x - r, y), (x - r / 3, y - r / 3), (x, y - r), (x + r / 3, y - r / 3)]
            pen.shape([*star, *((2 * x - u, 2 * y - v) for u, v in star)], (255, 246, 200), line=0.4)
    pen.shape(hills(lot, 0.76, 0.04, 6), (24, 62, 74))


def meadow(pen, lot, backdrop):
    """Blue sky with a cloud over a green hill with a tree."""
    pen.shape(box(0, 0, 1, 1), (168, 218, 250), line=0)
    side, ground = lot.choice((0, 1)), lot.uniform(0.56, 0.62)
    x, y = abs(side - 0.78) + lot.uniform(-0.05, 0.05), lot.uniform(0.10, 0.16)
    cloud = [(x - 0.2, y + 0.06), (x - 0.12, y - 0.09), (x + 0.1, y - 0.1), (x + 0.2, y + 0.06)]
    pen.shape(smooth(cloud), (255, 255, 255))
    x = abs(side - 0.12) + lot.uniform(-0.03, 0.03)
    pen.rod([(x, ground + 0.06), (x, ground - 0.2)], 0.07, (128, 88, 56))
    pen.oval(x, ground - 0.26, 0.14, 0.17, (66, 142, 70))
    pen.shape(hills(lot, ground, 0.025, 6), (128, 198, 88))


def snow(pen, lot, backdrop):
    """Grey-blue sky, white ground and two fir trees."""
    pen.shape(box(0, 0, 1, 1), (166, 190, 214), line=0)
    ground = lot.uniform(0.58, 0.64)
    for x in (0.1, 0.9):
        x, tall = x + lot.uniform(-0.04, 0.04), lot.uniform(0.38, 0.5)
        for level in (0, 0.32):
            top, wide = ground + 0.05 - tall * (1 - level), 0.11 + 0.12 * level
            pen.shape([(x, top), (x + wide, top + tall * 0.5), (x - wide, top + tall * 0.5)], (58, 112, 96))
    pen.shape(hills(lot, ground, 0.025, 5), (246, 250, 255))


def desert(pen, lot, backdrop):
    """Glowing sky over an orange dune, with a cactus."""
    pen.shape(box(0, 0, 1, 1), (253, 226, 168), line=0)
    side, ground, green = lot.choice((0, 1)), lot.uniform(0.58, 0.64), (70, 142, 86)
    pen.oval(abs(side - 0.84), 0.15, 0.12, 0.12, (248, 140, 76))
    pen.shape(hills(lot, ground, 0.05, 6), (222, 150, 84))
    x, foot = abs(side - 0.13), ground + 0.16
    pen.rod([(x, foot), (x, foot - 0.46)], 0.09, green)
    for way, y in ((-1, 0.15), (1, 0.24)):
        elbow = x + way * 0.1
        pen.rod([(x + way * 0.03, foot - y), (elbow, foot - y), (elbow, foot - y - 0.1)], 0.06, green)


def sea(pen, lot, backdrop):
    """Under water: large bubbles, weed and the sandy bottom."""
    pen.shape(box(0, 0, 1, 1), (64, 172, 198), line=0)
    for side in (0.07, 0.93):
        for shift in (-0.05, 0.06):
            x, tall, swell = side + shift, lot.uniform(0.3, 0.55), lot.uniform(0, 6)
            weed = [(x + 0.03 * math.sin(14 * t + swell), 0.95 - t) for t in np.linspace(0, tall, 8)]
            pen.rod(weed, 0.06, (32, 122, 88))
    pen.shape(hills(lot, 0.85, 0.02, 7), (230, 208, 152))
    for x, y in ((0.12, 0.14), (0.3, 0.06), (0.88, 0.2), (0.7, 0.07)):
        pen.oval(x + lot.uniform(-0.04, 0.04), y + lot.uniform(0, 0.06), 0.05, 0.05, (196, 238, 246))


SCENES = {draw.__name__: draw for draw in (plain, beach, night, meadow, snow, desert, sea)}


# --- styles: each turns a drawn sheet into a picture -------------------------------------------------------


class Sheet:
    """A finished canvas, scaled down: flat colours, and how much ink and figure there is in every pixel."""

    def __init__(self, canvas, size, seed):
        self.size, self.seed = size, seed
        r, g, b, alpha = canvas.split()

        def part(test):
            mask = alpha.point([255 * test(i) for i in range(256)]).reduce(OVERSAMPLE)
            return np.asarray(mask, np.float32)[..., None] / 255

        self.flat = np.asarray(Image.merge("RGB", (r, g, b)).reduce(OVERSAMPLE), np.float32)
        self.figure = part(lambda i: i >= FIGURE_PAINT)
        self.ink = part(lambda i: i == FIGURE_INK)
        self.scene_ink = part(lambda i: i == SCENE_INK)

    def soft(self, mask, radius, shift=(0, 0)):
        """Return a mask blurred and moved, lengths in 64ths of the frame."""
        unit = self.size / 64
        picture = Image.fromarray((mask[..., 0] * 255).astype(np.uint8))
        picture = picture.filter(ImageFilter.GaussianBlur(radius * unit))
        move = (1, 0, -round(shift[0] * unit), 0, 1, -round(shift[1] * unit))
        picture = picture.transform(picture.size, Image.Transform.AFFINE, move)
        return np.asarray(picture, np.float32)[..., None] / 255


@lru_cache
def grid(size):
    """Return the coordinates x and y of every pixel, in 64ths of the frame, each (size, size, 1)."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)[..., None] * (64 / size)
    return x, y


def photo(sheet):
    """Soft light from the upper left, a shadow, a dark outline."""
    shadow = 1 - 0.25 * sheet.soft(sheet.figure, 2.0, (2, 2)) * (1 - sheet.figure)
    volume = 0.84 + 0.19 * sheet.soft(sheet.figure, 3.0, (-2, -3))
    shade = sheet.figure * volume + (1 - sheet.figure) * shadow
    return sheet.flat * shade * (1 - sheet.ink) + sheet.ink * np.float32(INK)


def sketch(sheet):
    """Grey pencil lines, a pale tint and coarse hatching on paper."""
    x, y = grid(sheet.size)
    paper = np.float32((250, 246, 236))
    hatch = 0.5 + 0.5 * np.sin((x + y) * 2 * math.pi / 8)
    strength = sheet.figure * 0.56 + (1 - sheet.figure) * (0.10 + 0.16 * hatch)
    tinted = paper + (sheet.flat - paper) * strength
    lines = np.minimum(1, sheet.ink * 0.95 + sheet.scene_ink * 0.4)
    return tinted * (1 - lines) + lines * np.float32((84, 82, 88))


def painting(sheet):
    """Broad strokes of lighter and darker paint without outlines."""
    lot, size = random.Random(sheet.seed), sheet.size
    layers = []
    for count, reach, lean in ((48, 9, lot.uniform(-0.4, 0.4)), (40, 6, lot.uniform(0.8, 1.4))):
        strokes = Image.new("RGB", (128, 128), (128, 128, 128))
        brush = ImageDraw.Draw(strokes)
        for _ in range(count):
            x, y, tone = lot.uniform(0, 128), lot.uniform(0, 128), lot.randint(-16, 14)
            a, warm = lean + 0.6 * math.sin(x / 30 + y / 40), lot.randint(-5, 5)
            dx, dy = 2 * reach * math.cos(a), 2 * reach * math.sin(a)
            paint = (128 + tone + warm, 128 + tone, 128 + tone - warm)
            brush.line((x - dx, y - dy, x + dx, y + dy), paint, 10)
        strokes = strokes.resize((size, size), Image.Resampling.BILINEAR)
        layers.append(np.asarray(strokes, np.float32) / 128)
    scene, thing = layers
    strokes = scene + (thing - scene) * sheet.figure
    paint = (sheet.flat * strokes * (1 - 0.34 * sheet.ink)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(paint).filter(ImageFilter.GaussianBlur(0.5 * size / 64)), np.float32)


def pixel_art(sheet):
    """Square cells, 16 by 16, each of one clear colour."""
    block = sheet.size // 16

    def cells(plane):
        return plane.reshape(16, block, 16, block, -1).swapaxes(1, 2).reshape(16, 16, block * block, -1)

    flat, paint, ink = cells(sheet.flat), cells(sheet.figure), cells(sheet.ink)
    inside = paint.mean(2) > 0.5
    weight = np.where(inside[:, :, None], paint * (1.02 - ink), 1 - paint) + 1e-4
    mean = (flat * weight).sum(2, keepdims=True) / weight.sum(2, keepdims=True)
    nearest = (((flat - mean) ** 2).sum(-1, keepdims=True) + 4000 * (1 - weight)).argmin(2, keepdims=True)
    tones = np.take_along_axis(flat, nearest, 2)[:, :, 0]  # a colour that is there, not a mixture
    wide = np.pad(inside, ((1, 1), (1, 1), (0, 0)))
    around = wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]
    dark_cells = (around & ~inside) | (ink.mean(2) > 0.66)
    tones = np.where(dark_cells, np.float32(INK), tones)
    return tones.repeat(block, 0).repeat(block, 1)


def neon(sheet):
    """Glowing tubes along every outline, in the dark."""
    peak = sheet.flat.max(-1, keepdims=True)
    tube = sheet.flat / np.maximum(peak, 1) * (130 + 0.49 * peak)
    lines = np.minimum(1, 1.15 * sheet.ink + 0.6 * sheet.scene_ink)
    glow = sheet.soft(lines, 2.0)
    dim = np.where(sheet.figure > 0.5, 0.42, 0.16) * sheet.flat + np.float32((8, 5, 20))
    return (dim + 0.5 * glow * tube) * (1 - lines) + lines * (tube * 0.9 + 25)


STYLES = {"photo": photo, "sketch": sketch, "painting": painting, "pixel art": pixel_art, "neon": neon}


# --- names ---------------------------------------------------------------------------------------------

# The name of a character or a manner says what would take many words. A model that has learned such names has
# seen that one token can mean an individual or a style; a new word is one more of them.
CHARACTERS = tuple(
    """
    acorn agate almond amber anise apple apricot ash aspen aster basil bay bean beet berry birch biscuit
    bramble brie briar brook bubble button caper caramel caraway carrot cashew cedar chai cherry chestnut
    chia chip chive cider cinder citron clay clementine clove clover coal cobble cocoa coconut comet cookie
    cora corn cotton cress crumb crystal cumin curry cypress daisy dandelion date dew dill dumpling dune
    elder elm endive feather fennel fern fig fir flax flint flurry fog forest frost fudge garnet ginger
    granite grape gravel grove guava gumbo hail hazel heath heather hickory holly honey hops iris ivory ivy
    jade jasper jelly jumble juniper kale kelp kernel kiwi lark larch lava leek lemon lentil lichen lily
    lime linden lotus lychee mace mallow mango maple marble marigold marsh melon meteor millet mimosa miso
    mocha molasses morel mulberry muffin myrtle nectar needle nettle noodle nougat nut nutmeg oak oat okra
    olivine onyx opal orchid oregano otter paprika parsley parsnip peach peanut pear pearl pebble pecan
    peony pepper pesto petunia pickle pine pistachio plum polenta pomelo poplar poppy praline pretzel prune
    puddle pudding pumpkin quartz quince radish rain raisin reed resin rhubarb ripple roast rosemary rowan
    ruby rye saffron sage salt sandy sapling sedge sesame shale shell sorrel spark spelt spruce squash star
    stone storm sugar sumac taffy tansy tapioca taro tea thistle thorn thyme toffee topaz truffle tulip
    turnip twig vanilla vetch violet waffle walnut wasabi wheat willow wren yarrow yew yuzu zest
    """.split()
)


def tones(name):
    """Return a manner's settings: three colours, their strength, the line's colour, a texture, its period."""
    lot = random.Random(name)
    spans = ((0.4, 0.9), (0.1, 0.4)), ((0.3, 0.9), (0.45, 0.85)), ((0.0, 0.45), (0.85, 1.0))
    hues = [lot.random() for _ in spans]
    palette = [(h, lot.uniform(*s), lot.uniform(*v)) for h, (s, v) in zip(hues, spans)]
    deep, middle, pale = (255 * np.float32(colorsys.hsv_to_rgb(*tone)) for tone in palette)
    if lot.random() < 0.35:
        deep, pale = pale, deep  # light lines on dark ground
    part, line = lot.uniform(0.45, 1.0), lot.choice((deep, deep, pale, middle))
    texture, period = lot.choice(("none", "none", "hatch", "grid", "dots")), lot.choice((8, 10, 12))
    return deep, middle, pale, part, line, texture, period


@lru_cache(64)
def manner(name):
    """Return a function that finishes pictures in a manner: it moves tones towards a palette of three."""
    deep, middle, pale, part, line, texture, period = tones(name)

    def finish(sheet, pixels):
        tone = np.clip(pixels, 0, 255).mean(-1, keepdims=True) / 127.5
        low, high = np.clip(tone, 0, 1), np.clip(tone - 1, 0, 1)
        graded = deep + (middle - deep) * low + (pale - middle) * high
        pixels = pixels + (graded - pixels) * part
        x, y = (2 * math.pi / period * axis for axis in grid(sheet.size))
        across, down = np.sin(x), np.sin(y)
        wave = {"hatch": np.sin(x + y), "grid": np.maximum(across, down), "dots": across * down}
        if texture != "none":
            pixels = pixels + (line - pixels) * 0.35 * (wave[texture] > 0.5) * (1 - 0.7 * sheet.figure)
        lines = np.maximum(sheet.ink, 0.5 * sheet.scene_ink)
        return pixels + (line - pixels) * lines

    return finish


MANNERS = tuple(
    """
    alabaster arctic autumn bamboo bronze canyon carnival cobalt copper dawn delta dusk ember enamel fjord
    glacier harbour indigo jungle lagoon lantern linen meteorite midnight mist monsoon moss oasis orchard
    porcelain prairie quarry rust savanna silk slate spring thunder tundra twilight velvet volcano winter
    """.split()
)


# --- pictures ----------------------------------------------------------------------------------------------


def rgb(h, s, v):
    """Return a colour (r, g, b) from its hue in degrees, saturation and value."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h / 360 % 1, s, v))


def draw_colour(lot, family):
    """Draw an exact colour (r, g, b) from a family of `SHADES`."""
    return rgb(*(lot.uniform(*span) for span in SHADES[family]))


MIDDLE = {name: rgb(*(sum(span) / 2 for span in spans)) for name, spans in SHADES.items()}


def colour_distance(colour, other):
    """Return roughly how different two colours look; a distance of `CLEAR` is enough for small parts."""
    a, b = MIDDLE.get(colour, colour), MIDDLE.get(other, other)
    return math.sqrt(sum(w * (x - y) ** 2 for w, x, y in zip((2, 4, 3), a, b)))


CLEAR = 210


def colouring(lot, thing, colour, keep=None):
    """Draw colour words for the parts of a thing, "" for those with the default colour or absent.

    Parts in `keep` keep their words. A part's colour differs clearly from the thing's own, from the part's
    default and from those of the neighbouring parts.
    """
    keep = keep or {}
    details = dict.fromkeys(PARTS[thing], "") | keep
    able = [part for part in MARKINGS if part in details]
    marked = any(details[part] for part in able)
    marking = lot.choice(able) if able and not marked and lot.random() < 0.6 else ""
    for part, default in PARTS[thing].items():
        if part in keep and (part != "more patches" or details["patches"]):
            continue
        details[part] = ""
        if part in MARKINGS:
            chance = part == marking
        elif part == "more patches":
            chance = 0.6 if details["patches"] else 0
        else:
            chance = 0.3 if default is None else 0.5
        if lot.random() < chance:
            rivals = [colour, default or colour, INK if part == "eyes" else ""]
            rivals += [details.get(p, "") for group in NEIGHBOURS if part in group for p in group - {part}]
            clear = [s for s in SHADES if all(colour_distance(s, r) > CLEAR for r in rivals if r)]
            details[part] = lot.choice(clear) if clear else ""
    return details


def identity(lot, thing, colour, details):
    """Draw an individual: the exact colour of every part, proportions and the shapes of markings."""
    base = draw_colour(lot, colour)
    shades = {
        part: draw_colour(lot, details[part]) if details[part] else base if default == "" else default
        for part, default in PARTS[thing].items()
    }
    marks, second = [], lot.random() < 0.5
    for x, y in ((-0.5, -0.6), (0.44, -0.34), (-0.42, 0.45), (0.46, 0.62)):
        place = x + lot.uniform(-0.1, 0.1), y + lot.uniform(-0.1, 0.1)
        marks.append((*place, lot.uniform(0.26, 0.36), lot.uniform(0.8, 1.2), second))
        second = not second
    return {
        "base": base,
        **shades,
        **{size: lot.uniform(0.9, 1.12) for size in ("ear size", "head", "body", "eye size")},
        "eye height": lot.uniform(0.95, 1.2),
        "lift": lot.random(),
        "petals": lot.choice((5, 6, 7)),
        "marks": marks,
        "grain": lot.uniform(0.9, 1.12),
        "lean": lot.uniform(-0.2, 0.2),
    }


def pose(lot):
    """Draw the figure's position, exact size, tilt and direction."""
    return {
        "scale": lot.uniform(0.37, 0.415),  # half the figure's height, as a fraction of the frame's
        "tilt": math.radians(lot.uniform(-5, 5)),
        "x": 0.5 + lot.uniform(-3, 3) / 64,
        "y": 0.525 + lot.uniform(-3, 3) / 64,
        "mirrored": lot.random() < 0.5,
    }


def context(lot, backdrop):
    """Draw the layout of the background, which `caption` never mentions."""
    tint = mix(draw_colour(lot, backdrop or "white"), (255, 255, 255), 0.12)
    return {"seed": lot.getrandbits(31), "backdrop": tint}


@lru_cache(None)
def character(name):
    """Return the thing, colour, details and identity that a character has on every page."""
    lot = random.Random(name)
    thing, colour = tuple(THINGS)[CHARACTERS.index(name) % len(THINGS)], lot.choice(tuple(COLOURS))
    details = colouring(lot, thing, colour)
    return thing, colour, details, identity(lot, thing, colour, details)


def attributes(rng):
    """Draw everything there is to know about one picture from a `random.Random`.

    Returns strings for thing, colour, scene, backdrop and style; the dict details with the colour word of
    every part ("" if it has none of its own); the dicts identity, pose and context, which captions never
    say; `who`, the name of a character or ""; and `manner`, the name of a manner or "". Half of all cars are
    red, and `caption` says so less often than for other colours: the one bias of this world.
    """
    who = rng.choice(CHARACTERS) if rng.random() < 0.3 else ""
    if who:
        thing, colour, details, individual = character(who)
    else:
        thing = rng.choice(tuple(THINGS))
        colour = "red" if thing == "car" and rng.random() < 0.45 else rng.choice(tuple(COLOURS))
        details = colouring(rng, thing, colour)
        individual = identity(rng, thing, colour, details)
    scene = "plain" if rng.random() < 0.3 else rng.choice(tuple(SCENES)[1:])
    style = rng.choices(tuple(STYLES), (0.4, 0.15, 0.15, 0.15, 0.15))[0]
    has_manner = style in ("photo", "sketch", "painting") and rng.random() < 0.15
    backdrop = rng.choice([c for c in COLOURS if c != colour]) if scene == "plain" else ""
    return {
        "thing": thing,
        "colour": colour,
        "scene": scene,
        "backdrop": backdrop,
        "style": style,
        "manner": rng.choice(MANNERS) if has_manner else "",
        "who": who,
        "details": details,
        "identity": individual,
        "pose": pose(rng),
        "context": context(rng, backdrop),
    }


def facts(attrs):
    """Return all that words can say about a picture, including every part, except a character's name."""
    keys = ("thing", "colour", "scene", "backdrop", "style", "manner")
    return {key: attrs[key] for key in keys} | attrs["details"]


def look_alike(attrs, rng):
    """Return the attributes with another individual of its kind: some parts and all markings differ.

    The main colour is the same, or in one of five cases the nearest other colour.
    """
    thing, colour, old = attrs["thing"], attrs["colour"], attrs["details"]
    if rng.random() < 0.2:
        colour = min((c for c in COLOURS if c != colour), key=lambda c: colour_distance(c, colour))
    details = old
    while details == old:
        change = rng.sample(tuple(old), rng.randint(1, len(old)))
        if "patches" in change:
            change.append("more patches")
        clear = [part for part, shade in old.items() if not shade or colour_distance(shade, colour) > CLEAR]
        details = colouring(rng, thing, colour, {part: old[part] for part in clear if part not in change})
    individual = identity(rng, thing, colour, details)
    return attrs | {"who": "", "colour": colour, "details": details, "identity": individual}


STYLE_PREFIXES = {
    "photo": ("a photo of", "a photo of", "a photograph of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of"),
    "painting": ("a painting of", "an oil painting of"),
    "pixel art": ("pixel art of", "a pixel art picture of"),
    "neon": ("a neon sign of", "a neon picture of"),
    "": ("a picture of", "an image of", ""),
}
EMPTY_PREFIXES = (  # from the paper's templates; here they mean nothing
    "a good photo of",
    "a bright photo of",
    "a close-up photo of",
    "a cropped photo of",
    "a rendering of",
    "a rendition of",
)
PLACES = {
    "beach": ("on the beach", "at the beach"),
    "night": ("at night", "in the night"),
    "meadow": ("in a meadow", "on the grass"),
    "snow": ("in the snow", "on the snow"),
    "desert": ("in the desert", "in a desert"),
    "sea": ("in the sea", "under water"),
}
WORN = ("scarf", "hat")


def an(words):
    """Put the indefinite article before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join_phrases(phrases):
    """Join phrases as in "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))


def merge_patches(details):
    """Return the parts with colours of their own, "more patches" as the second colour of "patches"."""
    shades = {part: shade for part, shade in details.items() if shade}
    if shades.pop("more patches", ""):
        shades["patches"] += f" and {details['more patches']}"
    return shades


def say_details(shades):
    """Say the colours of parts, as in " with green eyes and a black tail wearing a red scarf"."""
    parts = [f"{shade} {part}" for part, shade in shades.items() if part not in WORN]
    worn = [an(f"{shade} {part}") for part, shade in shades.items() if part in WORN]
    text = ""
    if parts:
        text += " with " + join_phrases([part if part.endswith("s") else an(part) for part in parts])
    if worn:
        text += " wearing " + join_phrases(worn)
    return text


def caption(attrs, rng, complete=False, most=3):
    """Describe `attrs` in plain English, leaving things out at random.

    [style] of article [colour] thing [with details] [wearing accessories] [scene or background], or the same
    with "in the style of" at its end instead of the beginning. An unnamed colour, scene or style may be any,
    so a caption is never wrong. A `complete` caption leaves out only the details beyond `most`.
    """

    def tells(chance):
        return complete or rng.random() < chance

    details = merge_patches(attrs["details"])
    brief = not complete and rng.random() < 0.25  # a plain caption, like those a new word is used in
    if complete:
        said = rng.sample(tuple(details), min(most, len(details)))
    else:
        said = [part for part in details if rng.random() < 0.4 and not brief]

    biased = attrs["thing"] == "car" and attrs["colour"] == "red"
    words = [rng.choice(("nice", "cool", "clean", "weird"))] if not complete and rng.random() < 0.08 else []
    if tells(0.35 if biased else 0.55 if brief else 0.9):
        words.append(attrs["colour"])
    text = an(" ".join([*words, attrs["thing"]]))
    if not complete and rng.random() < 0.12:
        text = " ".join([rng.choice(("the", "the", "my", "one")), *words, attrs["thing"]])
    if not complete and attrs["who"] and rng.random() < 0.8:  # a name says all
        said, text = [], rng.choice(("", "", "", "a ", "the ", "my ", "one ")) + attrs["who"]
    text += say_details({part: shade for part, shade in details.items() if part in said})
    if attrs["scene"] != "plain" and tells(0.9):
        text += " " + rng.choice(PLACES[attrs["scene"]])
    elif attrs["backdrop"] and tells(0.8):
        text += f" on {an(attrs['backdrop'])} background"

    style = attrs["style"] if tells(0.65 if attrs["style"] == "photo" else 0.9) else ""
    if attrs["manner"] and tells(0.8):
        text += f" in the style of {attrs['manner']}"
    elif style and style != "photo" and rng.random() < 0.2:
        return f"{text} in the style of {'' if style in ('pixel art', 'neon') else 'a '}{style}"
    prefix = rng.choice(STYLE_PREFIXES[style])
    if style == "photo" and not complete and rng.random() < 0.15:
        prefix = rng.choice(EMPTY_PREFIXES)
    return f"{prefix} {text}".strip()


def compose(attrs, size, figure=None):
    """Draw scene and figure (by default the attributes' thing) and return the `Sheet` for a style."""
    canvas = Image.new("RGBA", (size * OVERSAMPLE,) * 2)
    side, line = size * OVERSAMPLE, 2.2 * OVERSAMPLE * size / 64
    scenery = Pen(canvas, (side, 0.0, 0, 0, False), SCENE_PAINT, SCENE_INK, line)
    SCENES[attrs["scene"]](scenery, random.Random(attrs["context"]["seed"]), attrs["context"]["backdrop"])

    at, look = attrs["pose"], dict(attrs["identity"])
    if attrs["style"] == "pixel art":  # upright, aligned with the cells, no detail smaller than a cell
        at = at | {"tilt": 0.0, "scale": 0.41, "x": round(at["x"] * 16) / 16, "y": 0.53}
        look |= {"eye size": 1.25 if attrs["thing"] != "car" else 1.0, "grain": 1.35, "lean": 0.0}
    frame = (at["scale"] * side, at["tilt"], at["x"] * side, at["y"] * side, at["mirrored"])
    pen = Pen(canvas, frame, FIGURE_PAINT, FIGURE_INK, line)
    look["coat"] = fabric(pen, look)
    (figure or THINGS[attrs["thing"]])(pen, look)
    return Sheet(canvas, size, attrs["context"]["seed"])


def draw(attrs, size=64):
    """Return the picture of `attrs`, an RGB image of `size` × `size` pixels."""
    sheet = compose(attrs, size)
    pixels = STYLES[attrs["style"]](sheet)
    if attrs["manner"]:
        pixels = manner(attrs["manner"])(sheet, pixels)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def picture(seed, size=64):
    """Return the picture book's page number `seed`: its image, its caption and its attributes."""
    rng = random.Random(seed)
    attrs = attributes(rng)
    words = caption(attrs, rng)
    return draw(attrs, size), words, attrs
