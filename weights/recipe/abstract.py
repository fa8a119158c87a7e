"""Abstract pictures: random shapes, colours, hatchings and gradients.

The autoencoder trains on them beside the world's pictures, so that it can also encode unknown styles.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .world import OVERSAMPLE


def random_colour(lot):
    """Draw any colour (r, g, b); one in four is grey."""
    if lot.random() < 0.25:
        return (lot.randrange(256),) * 3
    return tuple(lot.randrange(256) for _ in range(3))


def random_shape(lot, side):
    """Draw the corners of an ellipse or a polygon around a random centre."""
    x, y, r = lot.uniform(0, side), lot.uniform(0, side), lot.uniform(0.04, 0.35) * side
    corners = 40 if lot.random() < 0.5 else lot.randint(3, 7)
    turn, squeeze = lot.uniform(0, 7), lot.uniform(0.4, 1)
    rough = 0 if corners == 40 else 0.4
    points = []
    for i in range(corners):
        a, far = turn + 2 * math.pi * i / corners, r * lot.uniform(1 - rough, 1 + rough)
        points.append((x + far * math.cos(a), y + far * squeeze * math.sin(a)))
    return points


def hatching(lot, size):
    """Draw a mask (size, size, 1) of parallel lines, a grid or dots, 4 to 12 pixels apart."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    turn, period = lot.uniform(0, math.pi), lot.uniform(4, 12)
    along = np.cos(2 * math.pi / period * (x * math.cos(turn) + y * math.sin(turn)))
    across = np.cos(2 * math.pi / period * (y * math.cos(turn) - x * math.sin(turn)))
    wave = lot.choice((along, np.maximum(along, across), (along + across) / 2))
    return np.clip((wave - lot.uniform(-0.5, 0.7)) * period / 3 + 0.5, 0, 1)[..., None]


def draw_abstract(seed, size=64):
    """Draw the abstract picture number `seed`, an RGB image of `size` × `size` pixels."""
    lot = random.Random(seed)
    side, palette = size * OVERSAMPLE, [random_colour(lot) for _ in range(lot.randint(2, 6))]
    canvas = Image.new("RGB", (side, side), palette[0])
    brush, line = ImageDraw.Draw(canvas), lot.choice((0, 0, 2, 3)) * OVERSAMPLE * size // 64
    for _ in range(lot.randint(1, 12)):
        points, fill = random_shape(lot, side), lot.choice(palette)
        if lot.random() < 0.25:  # a bare thick line
            wide = lot.randint(2, 6) * OVERSAMPLE * size // 64
            brush.line(points[: lot.randint(2, 5)], fill, wide, "curve")
        else:
            brush.polygon(points, fill)
            if line:
                brush.line([*points, *points[:2]], palette[-1], line, "curve")
    pixels = np.asarray(canvas.reduce(OVERSAMPLE), np.float32)
    if lot.random() < 0.5:  # light from one side
        y, x = np.mgrid[0:size, 0:size] / size - 0.5
        turn = lot.uniform(0, 7)
        pixels = pixels * (1 + lot.uniform(0, 0.6) * (x * math.cos(turn) + y * math.sin(turn)))[..., None]
    if lot.random() < 0.4:
        strength = lot.uniform(0.15, 0.9) * hatching(lot, size)
        pixels = pixels + (np.float32(random_colour(lot)) - pixels) * strength
    image = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(lot.uniform(0.5, 2))) if lot.random() < 0.1 else image
