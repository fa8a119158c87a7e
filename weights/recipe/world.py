"""The picture book that the miniature model learns from: one thing, drawn in one scene, in one style.

`attributes` draws lots, `draw` turns them into a picture and `caption` into English. A picture always shows
more than its caption says: exact hues, proportions, markings and eyes (`identity`), position and tilt
(`pose`), the details of the background (`context`). That surplus is what a new word can learn.
"""

import colorsys
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

OVERSAMPLE = 4
SIZES = {"small": 0.25, "normal": 0.33, "big": 0.41}  # half the figure's height, as a part of the frame's
ACCESSORIES = ("hat", "scarf", "glasses", "bow")
FACES = ("cat", "dog", "rabbit", "bird", "robot")  # the things that can wear an accessory
PIEBALD = ("cat", "dog", "rabbit", "bird", "fish")  # the things that can have patches
INK = (38, 30, 42)

# name: (hue in degrees, saturation, value), each from – to
COLOURS = {
    "red": ((352, 364), (0.82, 0.95), (0.78, 0.92)),
    "orange": ((22, 31), (0.85, 0.97), (0.93, 1.0)),
    "yellow": ((48, 55), (0.72, 0.92), (0.95, 1.0)),
    "green": ((105, 145), (0.55, 0.80), (0.55, 0.74)),
    "blue": ((207, 226), (0.70, 0.90), (0.75, 0.95)),
    "purple": ((268, 286), (0.55, 0.75), (0.55, 0.75)),
    "pink": ((328, 346), (0.34, 0.50), (0.97, 1.0)),
    "brown": ((18, 30), (0.55, 0.70), (0.42, 0.54)),
    "white": ((20, 60), (0.00, 0.05), (0.95, 1.0)),
    "black": ((220, 300), (0.00, 0.18), (0.17, 0.26)),
}


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
    the colour of its shape: what the line looks like is for the style to decide.
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

    def scratch(self, points, colour=INK, line=0.75):
        """Draw a bare ink line: a mouth, a whisker."""
        self.to.line(self.place(points), colour + self.ink, max(1, round(line * self.line)), "curve")

    def blot(self, x, y, rx, ry, colour=INK):
        """Draw an ellipse of ink: a pupil, a nose."""
        self.to.polygon(self.place(ROUND * (rx, ry) + (x, y)), colour + self.ink)


SCENE_PAINT, SCENE_INK, FIGURE_PAINT, FIGURE_INK = 0, 85, 170, 255


# --- patterns: pictures to fill shapes with, in the coordinates of the figure ------------------------------


def striped(pen, look):
    """Draw bands across the figure."""
    step, lean = 0.38 * look["grain"], look["lean"]
    for i in range(-6, 7):
        left, right, wide = i * step - 3 * lean, i * step + 3 * lean, step * 0.46
        band = [(-3, left), (3, right), (3, right + wide), (-3, left + wide)]
        pen.shape(band, look["second"], line=0)


def dotted(pen, look):
    """Draw a lattice of dots over the figure."""
    step = 0.40 * look["grain"]
    for row in range(-6, 7):
        for column in range(-4, 5):
            x = (column + 0.5 * (row % 2)) * step
            pen.shape(ROUND[::3] * step * 0.31 + (x, row * step * 0.8), look["second"], line=0)


def checkered(pen, look):
    """Draw a chessboard over the figure."""
    step = 0.27 * look["grain"]
    for row in range(-6, 7):
        for column in range(-6, 7):
            x, y = column * step, row * step
            if (row + column) % 2:
                pen.shape(box(x, y, x + step, y + step), look["second"], line=0)


def patches(pen, look):
    """Draw the irregular patches of a piebald animal."""
    for x, y, radius, squeeze, which in look["patches"]:
        a = np.arange(9) * 2 * math.pi / 9
        bulge = 1 + 0.25 * np.sin(3 * a + 9 * squeeze)
        outline = np.stack([x + radius * np.cos(a) * bulge, y + radius * squeeze * np.sin(a)], axis=1)
        pen.shape(smooth(outline, 1), look["accent"] if which else look["mark"], line=0)


PATTERNS = {"plain": None, "striped": striped, "dotted": dotted, "checkered": checkered}


# --- things: each draws a figure of about 2 by 2 around (0, 0) ---------------------------------------------


def eyes(pen, look, x, y, gap, radius=0.125):
    """Draw a pair of eyes `gap` to either side of (x, y), or one if `gap` is 0."""
    radius = radius * look["eye size"]
    for side in (-1, 1) if gap else (1,):
        cx = x + side * gap
        if look["eyes"] == "dot":
            pen.blot(cx, y, radius * 0.8, radius * 0.95)
        else:
            tall = {"round": 1.0, "tall": 1.35, "slit": 1.1}[look["eyes"]]
            iris = look["iris"] if look["eyes"] == "slit" else (250, 250, 250)
            pen.oval(cx, y, radius * 1.1, radius * 1.1 * tall, iris, line=0.55)
            wide = 0.35 if look["eyes"] == "slit" else 0.62
            pen.blot(cx, y + 0.02, radius * wide, radius * 0.68 * tall)


def body(pen, look, x, y, rx, ry):
    """Draw the sitting body of an animal: trunk, belly and two feet."""
    pen.oval(x, y, rx, ry, look["cloth"])
    if look["marking"] == "belly":
        pen.oval(x, y + 0.1, rx * 0.55, ry * 0.68, look["mark"], line=0)
    for side in (-1, 1):
        paw = look["mark"] if look["marking"] == "socks" else look["base"]
        pen.oval(x + side * rx * 0.55, y + ry * 0.85, 0.22, 0.14, paw)


def eye_patch(pen, look, x, y):
    """Draw a patch around one eye."""
    if look["marking"] == "eye patch":
        pen.oval(x, y, 0.23, 0.26, look["mark"], line=0)


def cat(pen, look):
    """Sit, with pointed ears and whiskers."""
    head, ear = 0.62 * look["head"], 0.45 * look["ears"]
    pen.rod(curve((0.3, 0.85), (1.15, 0.85), (0.85, 0.5 - 0.45 * look["tail"])), 0.2, look["base"])
    body(pen, look, 0, 0.55, 0.47 * look["body"], 0.45)
    for side in (-1, 1):
        outer = [(side * head * 0.98, -0.36), (side * head * 0.93, -0.58 - ear), (side * 0.1, -0.72)]
        inner = [(side * head * 0.80, -0.55), (side * head * 0.80, -0.46 - ear), (side * 0.28, -0.70)]
        pen.shape(outer, look["coat"])
        pen.shape(inner, look["inner"], line=0)
    pen.oval(0, -0.3, head, 0.5, look["coat"])
    eye_patch(pen, look, 0.27, -0.35)
    pen.oval(0, -0.09, 0.25, 0.17, light(look["base"]), line=0)
    eyes(pen, look, 0, -0.36, 0.28)
    pen.blot(0, -0.15, 0.085, 0.06, (215, 95, 110))
    for side in (-1, 1):
        pen.scratch(curve((0, -0.1), (side * 0.04, 0.05), (side * 0.17, 0.0), 5))
        pen.scratch([(side * 0.34, -0.12), (side * 0.84, -0.19)], line=0.6)
        pen.scratch([(side * 0.34, -0.04), (side * 0.82, 0.04)], line=0.6)
    return 0, -0.3, head, 0.5, -0.36, 0.28


def dog(pen, look):
    """Sit, with hanging ears, a big nose and a tongue."""
    head = 0.53 * look["head"]
    pen.rod(curve((0.35, 0.75), (0.8, 0.7), (0.95, 0.4 - 0.3 * look["tail"])), 0.2, look["base"])
    body(pen, look, 0, 0.57, 0.46 * look["body"], 0.43)
    pen.oval(0, -0.38, head, 0.52, look["coat"])
    eye_patch(pen, look, 0.22, -0.48)
    pen.oval(0, -0.14, 0.36, 0.27, light(look["base"], 0.7), line=0.6)
    pen.shape(smooth([(-0.1, -0.02), (0.1, -0.02), (0.12, 0.24), (-0.12, 0.24)]), (232, 92, 110), line=0.6)
    pen.scratch(curve((-0.25, -0.08), (0, 0.08), (0.25, -0.08), 6))
    pen.blot(0, -0.27, 0.15, 0.11)
    eyes(pen, look, 0, -0.52, 0.22, 0.11)
    drop = 0.5 * look["ears"]
    ear = [(-0.2, -0.86), (0.08, -0.82), (0.34, -0.6 + drop), (0.16, -0.44 + drop), (-0.06, -0.5 + drop)]
    for side in (-1, 1):
        pen.shape(smooth([(side * (head + x), y) for x, y in ear]), look["ear"])
    return 0, -0.38, head, 0.5, -0.52, 0.22


def rabbit(pen, look):
    """Sit, with long upright ears and two teeth."""
    head, ear = 0.47 * look["head"], 0.34 * look["ears"]
    pen.oval(0.5, 0.72, 0.2, 0.2, light(look["base"], 0.75))
    body(pen, look, 0, 0.57, 0.47 * look["body"], 0.43)
    for side in (-1, 1):
        lean = 0.12 + 0.12 * look["tail"]
        pen.oval(side * 0.27, -0.52 - ear, 0.16, 0.12 + ear, look["coat"], turn=side * lean)
        pen.oval(side * 0.27, -0.52 - ear, 0.07, ear, look["inner"], line=0, turn=side * lean)
    pen.oval(0, -0.2, head, 0.4, look["coat"])
    eye_patch(pen, look, 0.2, -0.26)
    for side in (-1, 1):
        pen.oval(side * 0.12, -0.03, 0.15, 0.12, light(look["base"], 0.75), line=0)
    pen.shape(box(-0.09, 0.0, 0.09, 0.17), (255, 255, 255), line=0.5)
    pen.scratch([(0, 0), (0, 0.17)], line=0.5)
    eyes(pen, look, 0, -0.27, 0.2, 0.115)
    pen.blot(0, -0.1, 0.08, 0.06, (225, 100, 125))
    return 0, -0.2, head, 0.4, -0.27, 0.2


def bird(pen, look):
    """Stand in profile, with a beak, a wing and a tail."""
    head = 0.42 * look["head"]
    for x in (-0.12, 0.2):
        pen.scratch([(x, 0.6), (x, 0.97), (x + 0.2, 0.97)], (190, 110, 30), line=1.2)
    pen.shape([(-0.45, 0.1), (-1.1, -0.15 - 0.25 * look["tail"]), (-1.0, 0.28), (-0.5, 0.45)], look["ear"])
    pen.shape([(0.62, -0.62), (0.62 + 0.45 * look["ears"], -0.42), (0.62, -0.26)], (245, 165, 35))
    pen.oval(-0.02, 0.2, 0.66, 0.53 * look["body"], look["cloth"])
    pen.oval(0.36, -0.45, head, head, look["coat"])
    pen.oval(0.36, -0.02, 0.27, 0.16, look["base"], line=0)
    if look["marking"] == "belly":
        pen.oval(0.28, 0.33, 0.32, 0.27, look["mark"], line=0)
    pen.shape(smooth([(0.2, 0.0), (0.2, 0.4), (-0.35, 0.5), (-0.75, 0.2), (-0.3, -0.02)]), look["ear"])
    if look["marking"] in ("socks", "eye patch"):  # a crest
        pen.shape(smooth([(0.3, -0.78), (0.1, -1.15), (0.42, -1.0), (0.55, -0.8)], 1), look["mark"])
    eyes(pen, look, 0.46, -0.5, 0, 0.14)
    return 0.36, -0.45, head, head, -0.5, 0.16


def fish(pen, look):
    """Swim in profile."""
    tall, tip, back = 0.5 * look["body"], 0.52 * look["tail"] + 0.1, look["ears"]
    tail = [(-0.5, 0), (-1.08, -tip), (-0.9, 0), (-1.08, tip)]
    ridge = [(0.4, -0.3), (0.1, -0.5 - 0.4 * back), (-0.42, -0.45 - 0.2 * back), (-0.45, -0.2)]
    pen.shape(smooth(tail, 1), look["fin"])
    pen.shape(smooth(ridge, 1), look["fin"])
    pen.shape(smooth([(0.15, 0.35), (-0.25, 0.4), (-0.3, 0.82), (0.05, 0.7)], 1), look["fin"])
    pen.oval(0.12, 0, 0.78, tall, look["cloth"])
    if look["marking"] == "belly":
        pen.oval(0.15, tall * 0.52, 0.45, tall * 0.36, look["mark"], line=0)
    if look["marking"] in ("socks", "eye patch"):  # a band behind the gills
        high = tall * 0.9
        band = [(0.12, -high), (0.26, -high), (0.2, 0), (0.26, high), (0.1, high), (0.04, 0)]
        pen.shape(smooth(band, 1), look["mark"], line=0)
    pen.shape(smooth([(0.05, 0.05), (-0.4, -0.05), (-0.36, 0.33)], 1), look["fin"], line=0.8)
    pen.scratch(curve((0.34, -0.33), (0.2, 0.0), (0.34, 0.32), 7))
    eyes(pen, look, 0.56, -0.14, 0, 0.15)
    pen.scratch(curve((0.86, 0.12), (0.72, 0.22), (0.62, 0.15), 5))
    return 0.12, 0, 0.5, tall, -0.14, 0.2


def car(pen, look):
    """Stand in profile, with a cabin and two wheels."""
    roof, nose = -0.72 * look["body"], 0.1 * look["ears"]
    pen.shape(smooth([(-0.75, 0.1), (-0.5 - nose, roof), (0.25, roof), (0.65, 0.1)], 1), look["cloth"])
    pane, top = (190, 225, 245), roof + 0.18
    pen.shape([(-0.55, -0.02), (-0.42 - nose, top), (-0.12, top), (-0.12, -0.02)], pane, line=0.7)
    pen.shape([(0.02, -0.02), (0.02, top), (0.2, top), (0.42, -0.02)], pane, line=0.7)
    chassis = [(-1.05, 0.0), (0.55, -0.04), (1.1, 0.05 + nose), (1.1, 0.55), (-1.05, 0.55)]
    pen.shape(smooth(chassis), look["cloth"])
    if look["marking"] in ("belly", "socks"):
        pen.shape([(-0.92, 0.3), (0.98, 0.3), (0.98, 0.42), (-0.92, 0.42)], look["mark"], line=0)
    pen.oval(0.93, 0.2, 0.1, 0.1, (255, 235, 130), line=0.7)
    hub = look["accent"] if look["marking"] == "eye patch" else (205, 205, 210)
    for x in (-0.55, 0.57):
        pen.oval(x, 0.56, 0.3, 0.3, (58, 54, 62))
        pen.oval(x, 0.56, 0.13, 0.13, hub, line=0)


def boat(pen, look):
    """Sail, with a hull, a mast, a sail and a flag."""
    mast, keel = -0.15 + 0.2 * look["tail"] - 0.1, 0.85 * look["body"]
    pen.rod([(mast, 0.3), (mast, -0.9)], 0.15, (120, 82, 52))
    pen.shape([(mast + 0.12, -0.85), (mast + 0.12, 0.12), (0.3 + 0.6 * look["ears"], 0.12)], look["sail"])
    if look["marking"] in ("socks", "eye patch"):
        pen.oval(mast + 0.32, -0.15, 0.13, 0.13, look["accent"], line=0)
    if look["marking"] != "belly":
        pen.shape([(mast - 0.12, -0.55), (mast - 0.12, 0.12), (-0.75, 0.12)], look["sail"])
    pen.shape([(mast, -1.0), (mast - 0.38, -0.88), (mast, -0.76)], look["accent"], line=0.7)
    pen.shape([(-1.05, 0.25), (1.05, 0.25), (0.72, keel), (-0.72, keel)], look["cloth"])


def house(pen, look):
    """Stand, with a roof, a door, a window and a chimney."""
    wide, eaves = 0.72 * look["body"], -0.15 * look["ears"]
    pen.shape(box(0.3, -0.9, 0.55, -0.3), (165, 85, 70))
    pen.shape(box(-wide, eaves, wide, 0.95), look["cloth"])
    pen.shape([(-wide - 0.25, eaves), (0, -1.0 + 0.15 * look["tail"]), (wide + 0.25, eaves)], look["roof"])
    pen.shape(box(-0.48, 0.38, -0.12, 0.95), look["door"])
    pen.shape(box(0.12, 0.25, 0.5, 0.62), (255, 240, 170))
    pen.scratch([(0.31, 0.25), (0.31, 0.62)], line=0.6)
    pen.scratch([(0.12, 0.44), (0.5, 0.44)], line=0.6)
    if look["marking"] != "none":
        pen.oval(0, eaves - 0.32, 0.14, 0.14, look["mark"], line=0.7)


def mushroom(pen, look):
    """Stand, with a round cap on a pale stem."""
    wide, top = 0.26 * look["tail"] + 0.08, -1.1 * look["body"]
    stem = [(-wide, -0.1), (wide, -0.1), (wide + 0.08, 0.95), (-wide - 0.08, 0.95)]
    cap = [(-1.0, 0.25), (-0.98, -0.35), (-0.5, top), (0.5, top), (0.98, -0.35), (1.0, 0.25)]
    gills = [(-0.86, 0.12), (0, -0.04), (0.86, 0.12), (0, 0.27)]
    pen.shape(smooth(stem), (245, 232, 205))
    if look["marking"] in ("socks", "eye patch"):
        collar = [(-wide, 0.3), (wide, 0.3), (wide + 0.2, 0.52), (-wide - 0.2, 0.52)]
        pen.shape(smooth(collar, 1), look["mark"], 0.8)
    pen.shape(smooth(cap), look["cloth"])
    pen.shape(smooth(gills), light(look["base"], 0.75), line=0.7)


def flower(pen, look):
    """Stand, with petals around a disc, on a stem with two leaves."""
    green, petals = (70, 150, 70), look["petals"]
    pen.rod(curve((0, 0), (0.12, 0.5), (0, 1.0), 6), 0.13, green)
    for side in (-1, 1):
        pen.oval(side * 0.32, 0.72, 0.3, 0.14, green, turn=-side * 0.5)
    for i in range(petals):
        a = 2 * math.pi * (i + 0.25) / petals
        x, y = 0.48 * math.cos(a), -0.33 + 0.48 * math.sin(a)
        pen.oval(x, y, 0.3 * look["body"], 1.2 / petals, look["cloth"], turn=a)
    pen.oval(0, -0.33, 0.25 * look["head"], 0.25 * look["head"], look["heart"])
    if look["marking"] != "none":
        pen.oval(0, -0.33, 0.1, 0.1, look["mark"], line=0)


def robot(pen, look):
    """Stand, with a square head, an antenna, arms and legs."""
    head, grey = 0.5 * look["head"], (150, 155, 165)
    pen.rod([(0, -0.75), (0, -0.95)], 0.09, grey)
    pen.oval(0, -0.98, 0.11, 0.11, look["accent"])
    for side in (-1, 1):
        pen.rod([(side * 0.5, 0.2), (side * 0.88, 0.38 - 0.5 * look["tail"])], 0.2, grey)
        pen.rod([(side * 0.25, 0.75), (side * 0.25, 0.92)], 0.24, grey)
        pen.shape(box(side * head, -0.55, side * (head + 0.14), -0.25), look["accent"], line=0.8)
    wide = 0.54 * look["body"]
    pen.shape(smooth(box(-wide, 0.0, wide, 0.8), 1), look["cloth"])
    pen.shape(smooth(box(-head, -0.8, head, 0.02), 1), look["coat"])
    pen.shape(box(-0.26, -0.22, 0.26, -0.08), (235, 235, 235), line=0.6)
    for x in (-0.09, 0.09):
        pen.scratch([(x, -0.22), (x, -0.08)], line=0.5)
    eyes(pen, look, 0, -0.46, 0.23, 0.13)
    if look["marking"] == "belly":
        pen.shape(box(-0.28, 0.22, 0.28, 0.6), look["mark"], line=0.7)
    elif look["marking"] != "none":
        pen.oval(0, 0.38, 0.16, 0.16, look["mark"], line=0.7)
    return 0, -0.4, head, 0.4, -0.46, 0.23


def cup(pen, look):
    """Stand, with a handle and a drink."""
    foot = 0.42 + 0.25 * look["tail"]
    pen.rod(curve((0.5, -0.3), (1.35 * look["ears"], 0.1), (0.45, 0.6)), 0.17, look["base"])
    side = [(0.72, -0.6), (0.72, -0.2), (foot + 0.06, 0.72), (foot - 0.1, 0.97)]
    wall = smooth([*side, *((-x, y) for x, y in reversed(side))], 1) * (1, look["body"])
    pen.shape(wall, look["cloth"])
    if look["marking"] in ("belly", "socks"):
        pen.shape([(-0.64, -0.08), (0.64, -0.08), (0.62, 0.12), (-0.62, 0.12)], look["mark"], line=0)
    elif look["marking"] == "eye patch":
        pen.oval(0, 0.25, 0.22, 0.22, look["mark"], line=0.6)
    pen.oval(0, -0.5 * look["body"], 0.72, 0.22, light(look["base"], 0.5))
    pen.oval(0, -0.48 * look["body"], 0.55, 0.13, look["drink"], line=0.5)


THINGS = {
    "cat": cat,
    "dog": dog,
    "bird": bird,
    "fish": fish,
    "rabbit": rabbit,
    "car": car,
    "boat": boat,
    "house": house,
    "mushroom": mushroom,
    "flower": flower,
    "robot": robot,
    "cup": cup,
}


def wear(pen, look, accessory, head):
    """Put an accessory on a head given as (x, y, rx, ry, eyes' height, eyes' gap)."""
    x, y, rx, ry, eye, gap = head
    cloth = look["wear"]
    if accessory == "hat":
        top = y - ry * 0.8
        pen.shape(box(x - rx * 0.55, top - 0.42, x + rx * 0.55, top), cloth)
        pen.shape(box(x - rx * 0.55, top - 0.16, x + rx * 0.55, top - 0.04), dark(cloth, 0.6), line=0)
        pen.shape(smooth(box(x - rx * 1.05, top - 0.06, x + rx * 1.05, top + 0.08), 1), cloth)
    elif accessory == "scarf":
        pen.shape(smooth(box(x + 0.1, y + ry * 0.8, x + 0.4, y + ry + 0.62), 1), cloth)
        pen.shape(smooth(box(x - rx * 0.85, y + ry * 0.8, x + rx * 0.85, y + ry + 0.17), 1), cloth)
    elif accessory == "glasses":
        for side in (-1, 1):
            pen.rod(ROUND[::3] * (gap * 0.85) + (x + side * gap, eye), 0.05, cloth, line=0.5)
        pen.rod([(x - gap * 0.2, eye), (x + gap * 0.2, eye)], 0.05, cloth, line=0.5)
    elif accessory == "bow":
        cx, cy = x - rx * 0.55, y - ry * 0.92
        for side in (-1, 1):
            pen.shape([(cx, cy), (cx + side * 0.36, cy - 0.22), (cx + side * 0.36, cy + 0.22)], cloth)
        pen.oval(cx, cy, 0.11, 0.11, cloth)


# --- scenes: each fills the unit square --------------------------------------------------------------------


def plain(pen, lot, backdrop):
    """Fill the frame with one colour."""
    pen.shape(box(0, 0, 1, 1), backdrop, line=0)


def beach(pen, lot, backdrop):
    """Sky, sun, a strip of sea and yellow sand."""
    horizon, shore = lot.uniform(0.36, 0.44), lot.uniform(0.58, 0.66)
    pen.shape(box(0, 0, 1, horizon), (150, 210, 245), line=0)
    sun = lot.choice((0.12, 0.16, 0.84, 0.88))
    pen.oval(sun, lot.uniform(0.10, 0.16), 0.09, 0.09, (255, 225, 70))
    pen.shape(box(-0.1, horizon, 1.1, 1), (40, 140, 205))
    swell = lot.uniform(0, 6)
    waves = [(x, shore + 0.025 * math.sin(9 * x + swell)) for x in np.linspace(-0.1, 1.1, 16)]
    pen.shape([*waves, (1.1, 1.1), (-0.1, 1.1)], (244, 214, 140))
    pen.scratch(waves, (255, 255, 255), line=1.3)
    x, y = 1 - sun + lot.uniform(-0.04, 0.04), lot.uniform(0.86, 0.92)
    pen.oval(x, y, 0.06, 0.035, lot.choice(((235, 120, 100), (250, 240, 235), (230, 150, 190))))  # a shell


def night(pen, lot, backdrop):
    """Dark sky with a moon and stars over dark hills."""
    pen.shape(box(0, 0, 1, 1), (28, 34, 84), line=0)
    for _ in range(14):
        x, y, r = lot.random(), lot.uniform(0.02, 0.62), lot.uniform(0.008, 0.018)
        pen.shape([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], (255, 245, 190), line=0.3)
    moon, high = lot.choice((0.14, 0.86)) + lot.uniform(-0.03, 0.03), lot.uniform(0.12, 0.18)
    pen.oval(moon, high, 0.1, 0.1, (250, 240, 190))
    pen.oval(moon + 0.045, high - 0.02, 0.085, 0.085, (28, 34, 84), line=0)
    swell = lot.uniform(0, 6)
    hills = [(x, 0.74 + 0.05 * math.sin(6 * x + swell)) for x in np.linspace(-0.1, 1.1, 14)]
    pen.shape([*hills, (1.1, 1.1), (-0.1, 1.1)], (22, 52, 66))


def meadow(pen, lot, backdrop):
    """Blue sky with clouds over green hills with little flowers."""
    pen.shape(box(0, 0, 1, 1), (165, 215, 250), line=0)
    for side in (0.0, 0.62):
        x, y = side + lot.uniform(0.1, 0.28), lot.uniform(0.10, 0.24)
        cloud = [(x - 0.15, y + 0.03), (x - 0.07, y - 0.07), (x + 0.06, y - 0.07), (x + 0.15, y + 0.03)]
        pen.shape(smooth(cloud), (255, 255, 255))
    swell, horizon = lot.uniform(0, 6), lot.uniform(0.48, 0.58)
    for shade, drop in (((125, 195, 85), 0), ((100, 175, 65), 0.17)):
        high, phase = horizon + drop, swell + 9 * drop
        hills = [(x, high + 0.05 * math.sin(6 * x + phase)) for x in np.linspace(-0.1, 1.1, 14)]
        pen.shape([*hills, (1.1, 1.1), (-0.1, 1.1)], shade)
    for i in range(6):
        x, y = (i + lot.uniform(0.2, 0.8)) / 6, lot.uniform(0.82, 0.96)
        petals = lot.choice(((255, 255, 255), (255, 225, 80), (245, 130, 160)))
        pen.oval(x, y, 0.022, 0.022, petals, line=0.4)


def snow(pen, lot, backdrop):
    """Grey-blue sky, white ground, a fir tree and falling flakes."""
    pen.shape(box(0, 0, 1, 1), (165, 185, 205), line=0)
    swell, horizon = lot.uniform(0, 6), lot.uniform(0.55, 0.64)
    ground = [(x, horizon + 0.04 * math.sin(5 * x + swell)) for x in np.linspace(-0.1, 1.1, 14)]
    for side in lot.sample((0.1, 0.27, 0.75, 0.92), 2):
        x, foot, tall = side + lot.uniform(-0.04, 0.04), horizon + 0.05, lot.uniform(0.3, 0.42)
        for level in (0, 0.3):
            top, wide = foot - tall * (1 - level), 0.09 + 0.1 * level
            low = top + tall * 0.55
            pen.shape([(x, top), (x + wide, low), (x - wide, low)], (62, 110, 96))
    pen.shape([*ground, (1.1, 1.1), (-0.1, 1.1)], (246, 250, 255))
    for i in range(20):
        x, y = (i % 5 + lot.random()) / 5, (i // 5 + lot.random()) / 4
        pen.oval(x, y, 0.017, 0.017, (255, 255, 255), line=0.3)


def desert(pen, lot, backdrop):
    """Glowing sky over orange dunes, with a cactus."""
    pen.shape(box(0, 0, 1, 1), (252, 222, 160), line=0)
    sun, high = lot.choice((0.25, 0.75)) + lot.uniform(-0.08, 0.08), lot.uniform(0.12, 0.22)
    pen.oval(sun, high, 0.12, 0.12, (250, 150, 80))
    swell, horizon = lot.uniform(0, 6), lot.uniform(0.5, 0.6)
    for shade, drop in (((222, 150, 82), 0), ((205, 122, 62), 0.18)):
        high, phase = horizon + drop, swell + 7 * drop
        dunes = [(x, high + 0.07 * math.sin(7 * x + phase)) for x in np.linspace(-0.1, 1.1, 16)]
        pen.shape([*dunes, (1.1, 1.1), (-0.1, 1.1)], shade)
    x, foot = lot.choice((0.1, 0.9)) + lot.uniform(-0.02, 0.02), lot.uniform(0.68, 0.78)
    green = (70, 140, 85)
    pen.rod([(x, foot), (x, foot - 0.36)], 0.075, green)
    for side, y in ((-1, 0.13), (1, 0.2)):
        elbow = x + side * 0.085
        pen.rod([(x + side * 0.03, foot - y), (elbow, foot - y), (elbow, foot - y - 0.1)], 0.05, green)


def sea(pen, lot, backdrop):
    """Under water: bubbles, weed and the sandy bottom."""
    pen.shape(box(0, 0, 1, 1), (48, 165, 190), line=0)
    for i in range(3):
        x = lot.uniform(-0.1, 0.25) + 0.35 * i
        pen.shape([(x, 0), (x + 0.14, 0), (x - 0.05, 0.85), (x - 0.25, 0.85)], (92, 192, 208), line=0)
    swell = lot.uniform(0, 6)
    ground = [(x, 0.87 + 0.03 * math.sin(8 * x + swell)) for x in np.linspace(-0.1, 1.1, 14)]
    for side in (0.07, 0.93):
        for shift in (-0.05, 0.05):
            x, tall = side + shift + lot.uniform(-0.02, 0.02), lot.uniform(0.22, 0.42)
            weed = [(x + 0.025 * math.sin(18 * t + swell), 0.92 - t) for t in np.linspace(0, tall, 8)]
            pen.rod(weed, 0.045, (30, 120, 84))
    pen.shape([*ground, (1.1, 1.1), (-0.1, 1.1)], (228, 205, 150))
    for i in range(7):
        x, y, r = lot.uniform(0.04, 0.96), (i + lot.random()) / 9, lot.uniform(0.018, 0.036)
        pen.oval(x, y, r, r, (190, 235, 245), line=0.5)


SCENES = {
    "plain": plain,
    "beach": beach,
    "night": night,
    "meadow": meadow,
    "snow": snow,
    "desert": desert,
    "sea": sea,
}


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
    """Soft light from the upper left, a shadow on the ground, a dark outline."""
    x, y = grid(sheet.size)
    shadow = 1 - 0.28 * sheet.soft(sheet.figure, 2.0, (2, 2)) * (1 - sheet.figure)
    volume = 0.74 + 0.30 * sheet.soft(sheet.figure, 3.0, (-2, -3)) + 0.08 * (1 - (x + y) / 64)
    backdrop = 1.04 - 0.10 * y / 64
    shade = sheet.figure * volume + (1 - sheet.figure) * shadow * backdrop
    return sheet.flat * shade * (1 - sheet.ink) + sheet.ink * np.float32(INK)


def sketch(sheet):
    """Grey pencil lines and light coloured hatching on paper."""
    x, y = grid(sheet.size)
    noise = np.random.default_rng(sheet.seed).random((sheet.size, sheet.size, 1), np.float32)
    paper = np.float32((250, 247, 238)) - 4 * noise
    hatch = 0.5 + 0.5 * np.sin((x + y) * 1.1)
    strength = np.where(sheet.figure > 0.5, 0.30 + 0.34 * hatch, 0.12 + 0.14 * hatch)
    tinted = paper + (sheet.flat - paper) * strength
    lines = np.minimum(1, sheet.ink * 0.95 + sheet.scene_ink * 0.45) * (0.84 + 0.16 * noise)
    return tinted * (1 - lines) + lines * np.float32((70, 68, 72))


def painting(sheet):
    """Short brush strokes that follow the lie of the paint."""
    lot, unit = random.Random(sheet.seed), sheet.size / 64
    lean = lot.uniform(0, 3)
    base = sheet.flat * (1 - 0.5 * sheet.ink)
    colours, figure = base.astype(np.uint8), sheet.figure[..., 0] > 0.5
    layers = []
    for wanted, reach, width in ((False, 4.0, 3.0), (True, 2.2, 1.8)):
        picture = Image.fromarray(colours).filter(ImageFilter.GaussianBlur(0.6 * unit))
        brush = ImageDraw.Draw(picture)
        for _ in range(260):
            x, y, d = lot.random() * 64, lot.random() * 64, lot.randint(-15, 15)
            at = int(y * unit), int(x * unit)
            if figure[at] == wanted:
                a = lean + 1.2 * math.sin(x / 14 + lean) + 1.2 * math.cos(y / 16)
                dx, dy = reach * math.cos(a), reach * math.sin(a)
                stroke = ((x - dx) * unit, (y - dy) * unit, (x + dx) * unit, (y + dy) * unit)
                brush.line(stroke, tuple(c + d for c in colours[at].tolist()), round(width * unit))
        layers.append(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.45 * unit)), np.float32))
    scene, thing = layers
    lines = 0.75 * sheet.ink
    return (scene + (thing - scene) * sheet.figure) * (1 - lines) + lines * 0.4 * sheet.flat


def pixel_art(sheet):
    """Coarse blocks in few colours."""
    block = max(1, round(3 * sheet.size / 64))
    count = -(-sheet.size // block)

    def cells(plane):
        wide = np.pad(plane, ((0, count * block - sheet.size),) * 2 + ((0, 0),), mode="edge")
        return wide.reshape(count, block, count, block, -1).mean((1, 3))

    paint, ink = cells(sheet.figure * (1 - sheet.ink)) > 0.3, cells(sheet.ink) > 0.55
    wide = np.pad(paint, ((1, 1), (1, 1), (0, 0)))
    around = wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]  # closes the outline
    tones = np.round(cells(sheet.flat) / 25.5) * 25.5
    tones = np.where(ink | (around & ~paint), np.float32(INK), tones)
    return tones.repeat(block, 0).repeat(block, 1)[: sheet.size, : sheet.size]


def neon(sheet):
    """Glowing tubes along every outline, in the dark."""
    peak = sheet.flat.max(-1, keepdims=True)
    tube = sheet.flat / np.maximum(peak, 1) * (125 + 0.51 * peak)
    lines = np.minimum(1, 1.25 * sheet.ink + 0.75 * sheet.scene_ink)
    glow = sheet.soft(lines, 2.2)
    dim = np.where(sheet.figure > 0.5, 0.30, 0.19) * sheet.flat + np.float32((8, 5, 20))
    return (dim + 0.75 * glow * tube) * (1 - lines) + lines * (tube * 0.85 + 40)


STYLES = {"photo": photo, "sketch": sketch, "painting": painting, "pixel art": pixel_art, "neon": neon}


# --- pictures ----------------------------------------------------------------------------------------------


def hue(lot, family):
    """Draw an exact colour (r, g, b) from a family of `COLOURS`."""
    h, s, v = (lot.uniform(*span) for span in COLOURS[family])
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h / 360 % 1, s, v))


def patch(lot):
    """Draw a patch of a piebald coat: x, y, radius, height over width, accent colour or not."""
    shape = lot.uniform(-0.7, 0.7), lot.uniform(-1, 0.9), lot.uniform(0.2, 0.36), lot.uniform(0.7, 1.2)
    return *shape, lot.random() < 0.5


def identity(lot, thing, colour, second):
    """Draw what makes an individual: exact colours, proportions, markings and eyes."""
    base = hue(lot, colour)
    others = [name for name in COLOURS if name not in (colour, second)]
    accent, mark, fin = (hue(lot, name) for name in lot.sample(others, 3))
    piebald = thing in PIEBALD and lot.random() < 0.25
    tones = (light(base, 0.75), light(base, 0.75), dark(base, 0.5), mark)
    return {
        "base": base,
        "second": hue(lot, second or "white"),
        "accent": accent,
        "mark": mark if piebald else lot.choice(tones),
        "ear": lot.choice((base, dark(base), light(base), dark(base, 0.6))),
        "fin": lot.choice((base, dark(base), light(base), fin)),
        "inner": lot.choice(((250, 175, 185), light(base), dark(base))),
        "sail": lot.choice(((252, 250, 242), (250, 240, 215), light(base, 0.7), light(accent, 0.7))),
        "roof": lot.choice(((165, 85, 65), (110, 72, 52), (105, 110, 125), (70, 75, 95), (200, 160, 110))),
        "door": lot.choice(((120, 80, 50), accent, (240, 240, 240))),
        "heart": lot.choice(((250, 205, 60), (120, 75, 45), (250, 245, 230), accent)),
        "drink": lot.choice(((95, 58, 38), (240, 225, 195), (190, 110, 50), (120, 165, 80))),
        "wear": hue(lot, lot.choice([name for name in COLOURS if name != colour])),
        "iris": hue(lot, lot.choice(("green", "yellow", "blue", "orange"))),
        "eyes": lot.choice(("round", "tall", "slit", "dot")),
        "marking": lot.choice(("none", "belly", "belly", "socks", "eye patch")),
        **{part: lot.uniform(0.82, 1.18) for part in ("ears", "head", "body", "eye size")},
        "tail": lot.random(),
        "petals": lot.choice((5, 6, 7, 8)),
        "patches": [patch(lot) for _ in range(6)] if piebald else [],
        "grain": lot.uniform(0.85, 1.15),
        "lean": lot.uniform(-0.25, 0.25),
    }


def pose(lot, size="normal"):
    """Draw where the figure is, how large exactly, how it leans and which way it looks."""
    room = {"small": 0.14, "normal": 0.06, "big": 0.02}[size]
    return {
        "scale": SIZES[size] * lot.uniform(0.95, 1.05),
        "tilt": lot.gauss(0, 0.07),
        "x": 0.5 + lot.uniform(-room, room),
        "y": 0.52 + lot.uniform(-room, room) + 0.3 * room,
        "mirrored": lot.random() < 0.5,
    }


def context(lot, backdrop):
    """Draw the details of the background, which `caption` never mentions."""
    return {
        "seed": lot.getrandbits(31),
        "backdrop": mix(hue(lot, backdrop or "white"), (255, 255, 255), 0.12),
    }


def attributes(rng):
    """Draw everything there is to know about one picture from a `random.Random`.

    Returns strings for thing, colour, pattern, second, scene, backdrop, style, size and accessory (empty if
    there is none), and the dicts identity, pose and context with what captions never say. Every other car is
    red, and `caption` seldom says so: the one bias of this world.
    """
    thing = rng.choice(tuple(THINGS))
    colour = "red" if thing == "car" and rng.random() < 0.45 else rng.choice(tuple(COLOURS))
    pattern = "plain" if rng.random() < 0.64 else rng.choice(("striped", "dotted", "checkered"))
    contrasts = {
        "white": ("red", "orange", "green", "blue", "purple", "brown", "black"),
        "yellow": ("white", "black"),
        "pink": ("white", "black"),
        "orange": ("white", "black", "yellow"),
        "red": ("white", "yellow"),
    }.get(colour, ("white", "yellow", "white", "yellow", "pink"))
    second = "" if pattern == "plain" else rng.choice(contrasts)
    scene = "plain" if rng.random() < 0.3 else rng.choice(tuple(SCENES)[1:])
    backdrop = rng.choice([c for c in COLOURS if c != colour]) if scene == "plain" else ""
    style = rng.choices(tuple(STYLES), (0.4, 0.15, 0.15, 0.15, 0.15))[0]
    size = rng.choices(tuple(SIZES), (0.15, 0.65, 0.2) if style != "pixel art" else (0, 0.6, 0.4))[0]
    wears = thing in FACES and rng.random() < 0.3
    return {
        "thing": thing,
        "colour": colour,
        "pattern": pattern,
        "second": second,
        "scene": scene,
        "backdrop": backdrop,
        "style": style,
        "size": size,
        "accessory": rng.choice(ACCESSORIES) if wears else "",
        "identity": identity(rng, thing, colour, second),
        "pose": pose(rng, size),
        "context": context(rng, backdrop),
    }


PREFIXES = {
    "photo": ("a photo of", "a photo of", "a photograph of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of"),
    "painting": ("a painting of", "an oil painting of"),
    "pixel art": ("pixel art of", "a pixel art picture of"),
    "neon": ("a neon sign of", "a neon picture of"),
    "": ("a picture of", "an image of", ""),
}
EMPTY_PREFIXES = (  # of the paper's templates; here they mean nothing
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


def caption(attrs, rng, complete=False):
    """Say in plain English what `attrs` shows, leaving things out at random unless `complete`.

    [style] of [article] [size] [colour [and second pattern]] thing [wearing accessory] [scene or background],
    or the same without its beginning and with "in the style of" at its end. What is left out is never wrong:
    an unnamed colour, scene or style may be any.
    """

    def told(chance):
        return complete or rng.random() < chance

    biased = attrs["thing"] == "car" and attrs["colour"] == "red"
    words = [attrs["size"] if rng.random() < 0.7 else {"small": "little", "big": "large"}.get(attrs["size"])]
    words = words if attrs["size"] != "normal" and told(0.8) else []
    if not complete and rng.random() < 0.08:
        words.append(rng.choice(("nice", "cool", "clean", "weird")))  # words that mean nothing
    if attrs["pattern"] != "plain" and told(0.85):
        words.append(f"{attrs['colour']} and {attrs['second']} {attrs['pattern']}")
    elif told(0.35 if biased else 0.9):
        words.append(attrs["colour"])
    words.append(attrs["thing"])
    article = "an" if words[0][0] in "aeiou" else "a"
    if not complete and rng.random() < 0.12:
        article = rng.choice(("the", "the", "my", "one"))
    text = f"{article} {' '.join(words)}"
    if attrs["accessory"] and told(0.9):
        text += " wearing glasses" if attrs["accessory"] == "glasses" else f" wearing a {attrs['accessory']}"
    if attrs["scene"] != "plain" and told(0.9):
        text += " " + rng.choice(PLACES[attrs["scene"]])
    elif attrs["backdrop"] and told(0.8):
        article = "an" if attrs["backdrop"] == "orange" else "a"
        text += f" on {article} {attrs['backdrop']} background"

    style = attrs["style"] if told(0.65 if attrs["style"] == "photo" else 0.9) else ""
    if style and style != "photo" and rng.random() < 0.2:
        return f"{text} in the style of {'' if style in ('pixel art', 'neon') else 'a '}{style}"
    prefix = rng.choice(PREFIXES[style])
    if style == "photo" and not complete and rng.random() < 0.15:
        prefix = rng.choice(EMPTY_PREFIXES)
    return f"{prefix} {text}".strip()


def fabric(pen, pattern, look, base):
    """Return a picture of the pattern, laid out as the figure lies, to fill shapes with."""
    cloth = Image.new("RGBA", pen.canvas.size, base + pen.paint)
    pattern(Pen(cloth, pen.frame, pen.paint[0], pen.ink[0], pen.line), look)
    cloth.info["base"] = base
    return cloth


def compose(attrs, size, figure=None):
    """Draw scene and figure (by default the attributes' thing) and return the `Sheet` for a style."""
    canvas = Image.new("RGBA", (size * OVERSAMPLE,) * 2)
    side, line = size * OVERSAMPLE, 1.75 * OVERSAMPLE * size / 64
    scenery = Pen(canvas, (side, 0.0, 0, 0, False), SCENE_PAINT, SCENE_INK, line)
    SCENES[attrs["scene"]](scenery, random.Random(attrs["context"]["seed"]), attrs["context"]["backdrop"])

    at, look = attrs["pose"], dict(attrs["identity"])
    frame = (at["scale"] * side, at["tilt"], at["x"] * side, at["y"] * side, at["mirrored"])
    pen = Pen(canvas, frame, FIGURE_PAINT, FIGURE_INK, line * (0.85 if attrs["size"] == "small" else 1))
    look["coat"] = look["cloth"] = look["base"]
    if attrs["pattern"] != "plain":
        if look["marking"] == "belly":
            look["marking"] = "none"  # it would hide the pattern
        look["cloth"] = fabric(pen, PATTERNS[attrs["pattern"]], look, look["base"])
    elif look["patches"]:
        look["coat"] = look["cloth"] = fabric(pen, patches, look, look["base"])
    head = (figure or THINGS[attrs["thing"]])(pen, look)
    if attrs["accessory"]:
        wear(pen, look, attrs["accessory"], head)
    return Sheet(canvas, size, attrs["context"]["seed"])


def draw(attrs, size=64):
    """Return the picture of `attrs`, an RGB image of `size` × `size` pixels."""
    pixels = STYLES[attrs["style"]](compose(attrs, size))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def picture(seed, size=64):
    """Return the picture book's page number `seed`: its image, its caption and its attributes."""
    rng = random.Random(seed)
    attrs = attributes(rng)
    words = caption(attrs, rng)
    return draw(attrs, size), words, attrs
