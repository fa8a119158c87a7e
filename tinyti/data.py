"""From a folder of photos to what the training loop takes: images in [-1, 1] and prompts with the word."""

import struct
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

# No EPS, PDF or WMF among them, which Pillow hands to other programs.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]

# What Pillow raises for damaged pictures of these formats, and for those of more than 178 million pixels.
DAMAGED = (EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, struct.error,
           Image.DecompressionBombError)  # fmt: skip

# EXIF's Orientation -> how to turn the picture upright.
ORIENTATION = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
               5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
               8: Transpose.ROTATE_90}  # fmt: skip


class Photo(NamedTuple):
    """One picture: its file, its pixels (3, size, size) in [-1, 1], its caption if it has one."""

    file: Path
    pixels: Tensor
    caption: str | None


def read_folder(folder: str | Path, size: int) -> tuple[list[Photo], list[str]]:
    """Read every picture in a folder, in the order of their names; a single picture is a folder of one.

    `cat.txt` beside `cat.jpg` is its caption.  Subfolders are ignored, other files and damaged pictures are
    passed over.  Returns the photos, `size` pixels square, and one line for each thing passed over.
    FileNotFoundError if there is no such folder, ValueError if it holds no readable picture or a caption
    that is not UTF-8 text.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"No such folder: {folder}; give a folder with a few pictures of one thing")
    files = sorted(f for f in folder.iterdir() if not f.is_dir()) if folder.is_dir() else [folder]
    captioned = {file.stem for file in files if file.suffix != ".txt"}
    photos, passed_over = [], []
    for file in files:
        if file.suffix == ".txt" and file.stem in captioned:
            continue
        try:
            pixels = to_tensor(read_image(file), size)
        except (OSError, ValueError) as error:
            passed_over.append(" ".join(str(error).splitlines()))
        else:
            caption = file.with_suffix(".txt")
            text = " ".join(_read_text(caption).split()) if caption.is_file() else ""
            photos.append(Photo(file, pixels, text or None))
    if not photos:
        found = "; ".join(passed_over[:3]) or "nothing"
        raise ValueError(f"No readable picture in {folder}; give a folder with a few of them (found {found})")
    return photos, passed_over


def read_image(file: str | Path) -> Image.Image:
    """Read one picture as upright RGB, the first frame if it moves; what is transparent shows white.

    FileNotFoundError if there is no such file, ValueError if it is no picture, damaged, too large for Pillow
    or has 32-bit values.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: {'not a file' if Path(file).exists() else 'no such file'}")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without some
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on large and on odd pictures
            with Image.open(file, formats=formats) as image:
                picture = to_rgb(image)
                # (ImageOps.exif_transpose also rewrites the EXIF data, and fails on odd ones)
                turn = ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation))
                return picture if turn is None else picture.transpose(turn)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file}: not a picture") from error
    except DAMAGED as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, white where it is transparent; ValueError for 32-bit values."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        levels = np.asarray(image)  # (H, W)
        if image.mode == "F" or levels.min() < 0 or levels.max() >= 2**16:
            raise ValueError("32-bit values; save it with 8 or 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")  # convert() alone clips at 255
    if image.has_transparency_data:
        opaque, image = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        opaque.paste(image, mask=image)
        return opaque
    return image.convert("RGB")


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """The middle square of an RGB image, resized (bicubic, antialiased): (3, size, size) in [-1, 1]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would mix in what is outside
    levels = np.array(square.resize((size, size), Image.Resampling.BICUBIC))  # (size, size, 3)
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """The way back: (3, H, W), values outside [-1, 1] clipped."""
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def grid(rows: list[tuple[str, list[Image.Image]]], footer: list[str] = ()) -> Image.Image:
    """A sheet of pictures of one size: a label before each row, a caption under each column."""
    font = ImageFont.load_default(size=12)
    pictures = [image for _, images in rows for image in images]
    enlarged = max(1, 128 // pictures[0].width)  # small ones are shown pixel by pixel
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


# The 27 neutral templates in the paper's supplement.
OBJECT_TEMPLATES = (
    "a photo of a {}", "a photo of the {}", "the photo of a {}", "a photo of my {}", "a photo of one {}",
    "a photo of a clean {}", "a photo of the clean {}", "a photo of a dirty {}", "a photo of a cool {}",
    "a photo of the cool {}", "a photo of a nice {}", "a photo of the nice {}", "a photo of a small {}",
    "a photo of the small {}", "a photo of the large {}", "a photo of the weird {}", "a good photo of a {}",
    "a good photo of the {}", "a cropped photo of a {}", "a cropped photo of the {}",
    "a close-up photo of a {}", "a close-up photo of the {}", "a bright photo of the {}",
    "a dark photo of the {}", "a rendition of a {}", "a rendition of the {}", "a rendering of a {}",
)  # fmt: skip

# Those for a style, from the official code, where two stand twice and so are drawn twice as often.
STYLE_TEMPLATES = tuple(f"{picture} in the style of {{}}" for picture in (
    "a painting", "the painting", "a picture", "a rendering", "a rendition", "a clean painting",
    "a dirty painting", "a dark painting", "a bright painting", "a cool painting", "a nice painting",
    "a good painting", "a small painting", "a large painting", "a weird painting", "a cropped painting",
    "a cropped painting", "a close-up painting", "a close-up painting",
))  # fmt: skip


def read_templates(file: str | Path) -> list[str]:
    """Prompt templates from a text file: one per line, `{}` for the word; blank and `#` lines are skipped.

    OSError if the file is missing, ValueError for a line without `{}`, which is named, or no template at all.
    """
    lines = [line.strip() for line in _read_text(Path(file)).splitlines()]
    templates = [line for line in lines if line and not line.startswith("#")]
    if without := next((line for line in templates if "{}" not in line), None):
        number = lines.index(without) + 1
        raise ValueError(f"{file}, line {number}: '{without}' has no {{}} for the word")
    if not templates:
        raise ValueError(f"{file}: no templates in it; write one per line, e.g. 'a photo of a {{}}'")
    return templates


def prompt(template: str, word: str, caption: str | None = None) -> str:
    """A template with the word in it, and the picture's caption if it has one.

    A caption with `{}` in it is a template itself and replaces the drawn one; another is put behind it, as
    AUTOMATIC1111's template "a photo of a [name], [filewords]" does.
    """
    if caption:
        template = caption if "{}" in caption else f"{template}, {caption}"
    return template.replace("{}", word)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from error
