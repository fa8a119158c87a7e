"""A sheet of pictures with labels: progress.png, grid.png, attention.png and the notebooks' figures."""

import textwrap

from PIL import Image, ImageDraw, ImageFont


def draw_sheet(rows: list[tuple[str, list[Image.Image]]], footer: list[str] = ()) -> Image.Image:
    """Draw a sheet of pictures of one size: a label before each row, a caption under each column."""
    font = ImageFont.load_default(size=12)
    pictures = [image for _, images in rows for image in images]
    enlarged = max(1, 128 // pictures[0].width)  # small pictures are enlarged by a whole number
    width, height = (enlarged * side for side in pictures[0].size)
    columns, gap, margin = max(len(images) for _, images in rows), 4, 130
    captions = ["\n".join(textwrap.wrap(caption, width // 7)) for caption in footer]
    foot = 16 * max((caption.count("\n") + 1 for caption in captions), default=0)
    sheet = Image.new("RGB", (margin + columns * (width + gap), len(rows) * (height + gap) + foot), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows):
        top = r * (height + gap)
        pen.text((8, top + 8), "\n".join(textwrap.wrap(label, 18)), "black", font)
        for c, image in enumerate(images):
            image = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + c * (width + gap), top))
    for c, caption in enumerate(captions):
        pen.text((margin + c * (width + gap), len(rows) * (height + gap)), caption, "black", font)
    return sheet


def add_curve(sheet: Image.Image, values: list[float], every: int) -> Image.Image:
    """Add a small curve below a sheet: the evaluation loss at every `every`-th step."""
    if len(values) < 2:
        return sheet
    height, margin = 90, 130
    taller = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    taller.paste(sheet)
    pen, font = ImageDraw.Draw(taller), ImageFont.load_default(size=12)
    low, high = min(values), max(values)
    left, top, right, bottom = margin, sheet.height + 10, sheet.width - 70, sheet.height + height - 20
    pen.text((8, top), "evaluation\nloss", "black", font)
    pen.text((left, bottom + 2), f"step 0 to {every * (len(values) - 1)}", "black", font)
    places = [left + (right - left) * i / (len(values) - 1) for i in range(len(values))]
    heights = [bottom - (bottom - top) * (value - low) / ((high - low) or 1) for value in values]
    pen.line(list(zip(places, heights)), "black", 2)
    for value, place in ((values[0], heights[0]), (values[-1], heights[-1])):
        x = left - 48 if value is values[0] else right + 6
        pen.text((x, place - 7), f"{value:.4f}", "black", font)
    return taller
