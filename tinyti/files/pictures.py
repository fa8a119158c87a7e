"""Pictures: read photos, masks and captions; convert between PIL images and tensors in [-1, 1]."""

import io
import os
import struct
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor

from .tensors import one_line

with suppress(ImportError):  # tinyti[heic]: photos of an iPhone
    import pillow_heif

    pillow_heif.register_heif_opener()

# EPS and WMF are left out: Pillow hands them to Ghostscript and to Windows.
FORMATS = ["AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]

# Offset and first bytes of picture formats that are not read, and what to do instead.
EXPORT = "export it as JPEG or PNG"
NOT_READ = [
    (4, b"ftyphei", f"a HEIC photo; pip install pillow-heif, or {EXPORT}"),
    (4, b"ftypmif1", f"a HEIC photo; pip install pillow-heif, or {EXPORT}"),
    (4, b"ftypcrx", f"a raw photo, which is not read; {EXPORT}"),
    (0, b"FUJIFILMCCD-RAW", f"a raw photo, which is not read; {EXPORT}"),
    (0, b"8BPS", f"a Photoshop file, which is not read; {EXPORT}"),
    (0, b"gimp xcf", f"a GIMP file, which is not read; {EXPORT}"),
    (0, b"\0\0\1\0", f"an icon, which is not read; {EXPORT}"),
    (0, b"<svg", f"an SVG drawing, which is not read; {EXPORT}"),
    (0, b"%PDF", f"a PDF, which is not read; {EXPORT}"),
]
SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
MOST_TEXT = 2**20  # bytes of a caption or of a file of templates
MOST_LETTERS = 10_000  # of a caption or a text on the command line; a prompt has room for 75 tokens

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
    """One picture: its file, its pixels (3, size, size) in [-1, 1], its caption and mask if it has any."""

    file: Path
    pixels: Tensor
    caption: str | None = None
    mask: Tensor | None = None  # (1, size, size), from 0 (not learned) to 1 (learned)


def read_photos(folder: str | Path, size: int) -> tuple[list[Photo], list[str]]:
    """Read every picture in a folder, in the order of their names; `folder` may also be a single picture.

    `cat.txt` beside `cat.jpg` is its caption.  `cat.mask.png` or the picture's own transparency is its mask.
    Pictures in subfolders, other files and damaged pictures are passed over.  Returns the photos, `size`
    pixels square, and one line for each thing passed over.  The subfolder `heldout`, for judging a word,
    gets no line.  FileNotFoundError if there is no such folder, ValueError if it holds no readable picture,
    a caption that is too long or not text, or a mask that fits no picture.
    """
    folder = Path(folder)
    if not size >= 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    if not folder.exists():
        raise FileNotFoundError(f"No such folder: {folder}; give a folder with a few pictures of one thing")
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    entries.sort(key=lambda entry: (unicodedata.normalize("NFC", entry.name), entry.name))
    files = [entry for entry in entries if not entry.is_dir()]
    masks = {file.stem.removesuffix(".mask"): file for file in files if file.stem.endswith(".mask")}
    files = [file for file in files if file not in masks.values()]
    captioned = {file.stem for file in files if file.suffix != ".txt"}
    if without := sorted(masks.keys() - captioned):
        raise ValueError(f"{masks[without[0]]} is the mask of a picture {without[0]}, which is not there")
    photos, passed_over = [], []
    for file in files:
        if file.suffix == ".txt" and file.stem in captioned:
            continue
        try:
            picture, alpha = read_cutout(file)
        except (OSError, ValueError) as error:
            passed_over.append(one_line(error))
        else:
            caption = file.with_suffix(".txt")
            text = " ".join(read_text(caption).split()) if caption.is_file() else ""
            if len(text) > MOST_LETTERS:
                raise ValueError(f"{caption}: {len(text):,} letters; a prompt has room for 75 tokens")
            mask = read_mask(file, picture, alpha, masks.get(file.stem), size)
            if (cut := 1 - min(picture.size) / max(picture.size)) > 0.5:
                passed_over.append(one_line(f"{cut:.0%} of {file.name}, outside of its middle square"))
            photos.append(Photo(file, to_tensor(picture, size), text or None, mask))
    for subfolder in (entry for entry in entries if entry.is_dir() and entry.name != "heldout"):
        if count := count_pictures(subfolder):
            found = f"{count} picture{'s' * (count > 1)} in the subfolder {subfolder.name}"
            passed_over.append(one_line(f"{found} (give {subfolder} to learn from these)"))
    if not photos:
        found = "; ".join(passed_over[:3]) or "nothing"
        raise ValueError(f"No readable picture in {folder}; give a folder with a few of them (found {found})")
    return photos, passed_over


def read_mask(file: Path, picture: Image.Image, alpha, mask_file: Path | None, size: int) -> Tensor | None:
    """Read a photo's mask (1, size, size), cropped and resized like the photo; None if it has none.

    ValueError if the mask has another aspect ratio or is empty, or if there is transparency and a mask file.
    """
    if mask_file is None and alpha is None:
        return None
    if mask_file is not None and alpha is not None:
        raise ValueError(f"{file} has transparency and a mask, {mask_file.name}; keep one of them")
    image, source = (alpha, file) if mask_file is None else (read_image(mask_file), mask_file)
    if not have_same_ratio(image, picture):
        sides = (f"{x.width} × {x.height} pixels" for x in (image, picture))
        raise ValueError("{} has {}, its picture {}; the ratios must be equal".format(source, *sides))
    mask = (to_tensor(image.convert("RGB"), size).mean(dim=0, keepdim=True) + 1) / 2
    if not (mask > 0.05).any():
        raise ValueError(f"{source}: the mask is empty in the middle square; white marks what is learned")
    return mask.clamp(0, 1)


def have_same_ratio(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures have the same aspect ratio, within 2 %."""
    return abs(one.width * other.height / (one.height * other.width) - 1) <= 0.02


def count_pictures(folder: Path) -> int:
    """Count the files with a picture's suffix in a folder and below it; hidden folders are left out."""
    count = 0
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += sum(Path(name).suffix.lower() in SUFFIXES for name in files)
    return 0 if folder.name.startswith(".") else count


def read_image(file: str | Path) -> Image.Image:
    """Read one picture as upright RGB: the first frame of an animation, white where it is transparent.

    FileNotFoundError if there is no such file, ValueError if it is not a picture, is damaged, too large for
    Pillow or has 32-bit values.
    """
    return read_cutout(file)[0]


def read_cutout(file: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """Read as `read_image` does, with the alpha channel, 0 (clear) to 255; None if all of it is opaque."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: {'not a file' if Path(file).exists() else 'no such file'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large and of odd pictures
            try:
                return _open(file)
            except ValueError as error:
                if "MAX_TEXT" not in str(error):
                    raise
                return _open(io.BytesIO(_without_text(Path(file).read_bytes())))
    except UnidentifiedImageError as error:
        with open(file, "rb") as stream:
            head = stream.read(64)
        kinds = [kind for offset, start, kind in NOT_READ if head[offset:].startswith(start)]
        kind = kinds[0] if kinds else "not a picture"
        if "HEIC" in kind and "HEIF" in Image.OPEN:
            kind = f"a HEIC photo that is damaged or that pillow-heif does not read; {EXPORT}"
        raise ValueError(f"{file}: {kind}") from error
    except DAMAGED as error:
        raise ValueError(one_line(f"{file}: cannot be read ({error})")) from error


def _open(file):
    """Read one picture as upright RGB, and its alpha channel if it has one; errors are Pillow's."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without some
    with Image.open(file, formats=formats) as image:
        picture = to_rgb(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha is not None and alpha.getextrema()[0] == 255:
            alpha = None
        # Not ImageOps.exif_transpose: it also rewrites the EXIF data, and fails on odd ones.
        turn = ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation))
        if turn is not None:
            picture, alpha = picture.transpose(turn), alpha and alpha.transpose(turn)
        return picture, alpha


def _without_text(png: bytes) -> bytes:
    """Remove a PNG's texts and colour profile: Pillow refuses texts of more than 1 MB."""
    kept, place = [png[:8]], 8
    while place + 8 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place : place + 12 + length]  # length, kind, data, check sum
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, white where it is transparent; ValueError for 32-bit values."""
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
    """The middle square of an RGB image, resized (bicubic, antialiased): (3, size, size) in [-1, 1].

    ValueError for a picture of another mode or without pixels.
    """
    if image.mode != "RGB" or 0 in image.size:
        raise ValueError(f"a picture of mode {image.mode} and size {image.size}; expected RGB, by to_rgb")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would mix in pixels outside
    levels = np.array(square.resize((size, size), Image.Resampling.BICUBIC))  # (size, size, 3)
    return torch.from_numpy(levels).permute(2, 0, 1).float().contiguous() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """Convert floats (3, H, W) to an image, clipped to [-1, 1].

    FloatingPointError for NaN and infinity, ValueError for another shape or dtype.
    """
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.is_floating_point():
        found = f"{pixels.dtype} of shape {tuple(pixels.shape)}"
        raise ValueError(f"a picture is floats of shape (3, H, W), not {found}")
    pixels = pixels.detach().float().cpu()
    if not pixels.isfinite().all():
        hint = "compute in fp32 or bf16, lower the guidance, or check the weights and the words"
        raise FloatingPointError(f"the picture is not made of finite numbers; {hint}")
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def read_text(file: Path) -> str:
    """Read a UTF-8 file, or UTF-16 with its byte order mark; ValueError for others and for over 1 MiB."""
    if (size := file.stat().st_size) > MOST_TEXT:
        raise ValueError(f"{file}: {size:,} bytes of text, expected at most {MOST_TEXT:,}")
    data = file.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"not UTF-8 text (byte {error.start})"
        raise ValueError(f"{file}: {found}; save the file as UTF-8 in a text editor") from error
