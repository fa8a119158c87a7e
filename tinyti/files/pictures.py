"""Pictures: files of photos, masks and captions, PIL images, and tensors in [-1, 1]."""

import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

# No EPS, PDF or WMF among them, which Pillow hands to other programs.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]

# What Pillow raises for damaged pictures of these formats, and for those of more than 178 million pixels.
DAMAGED = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)

# EXIF's Orientation -> how to turn the picture upright.
ORIENTATION = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Photo(NamedTuple):
    """One picture: its file, its pixels (3, size, size) in [-1, 1], its caption if it has one."""

    file: Path
    pixels: Tensor
    caption: str | None


def read_photos(folder: str | Path, size: int) -> tuple[list[Photo], list[str]]:
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
            text = " ".join(read_text(caption).split()) if caption.is_file() else ""
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


def read_text(file: Path) -> str:
    """The text in a UTF-8 file; ValueError for another encoding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from error
