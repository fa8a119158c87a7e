"""Pictures: odd ones come out as the eye sees them, and what is passed over is named."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch.testing import assert_close

from tinyti.files import pictures

from .conftest import ROOT

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def corners(image):
    """Top left, top right, bottom left, bottom right."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in [(0, 0), (right, 0), (0, bottom), (right, bottom)]]


def marked(size=(60, 40)):
    """A white picture with coloured corners: red, green, blue, white."""
    image = Image.new("RGB", size, WHITE)
    image.paste(RED, (0, 0, 10, 10))
    image.paste(GREEN, (size[0] - 10, 0, size[0], 10))
    image.paste(BLUE, (0, size[1] - 10, 10, size[1]))
    return image


def near(colour, expected, within=3):
    return max(abs(a - b) for a, b in zip(colour, expected)) <= within


def saved(image, file, **options):
    """A picture as it comes back from a file."""
    image.save(file, **options)
    return pictures.read_image(file)


# one picture


SEEN = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB", 99: "RGBW"}


@pytest.mark.parametrize("suffix, orientation", [*(("jpg", way) for way in SEEN), ("png", 6), ("webp", 6)])
def test_exif_orientation(tmp_path, suffix, orientation):
    """2 is mirrored, 3 upside down, 6 to be turned clockwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = saved(marked(), tmp_path / f"x.{suffix}", exif=exif, lossless=True)
    assert image.mode == "RGB" and image.size == ((40, 60) if 5 <= orientation <= 8 else (60, 40))
    colours = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}
    for colour, expected in zip(corners(image), SEEN[orientation], strict=True):
        assert near(colour, colours[expected], 60)


def test_odd_exif_does_not_lose_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    wrong_type = exif.tobytes().replace(b"\x12\x01\x03\x00", b"\x12\x01\x05\x00")
    for junk in (wrong_type, b"Exif\0\0garbage"):
        assert saved(marked(), tmp_path / "a.jpg", exif=junk).size == (60, 40)


def palette():
    image = Image.new("P", (4, 1))
    image.putpalette([*BLUE, *RED, 10, 20, 30, 1, 2, 3])
    image.putdata(range(4))
    return image


def half_transparent(mode, colour):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((0, 0), (0,) * len(colour))  # transparent black must not stay black
    return image


TRANSPARENT = [
    (half_transparent("RGBA", (0, 0, 255, 128)), "png", None, [WHITE, (127, 127, 255)]),
    (half_transparent("LA", (0, 128)), "png", None, [WHITE, (127,) * 3]),
    (palette(), "png", 2, [BLUE, RED, WHITE, (1, 2, 3)]),
    (palette(), "gif", 2, [BLUE, RED, WHITE, (1, 2, 3)]),
    (palette(), "png", bytes([255, 0, 0, 128]), [BLUE, WHITE, WHITE, (127, 128, 128)]),
    (marked((20, 20)), "png", RED, 10 * [WHITE] + 10 * [GREEN]),
]


@pytest.mark.parametrize("image, suffix, transparency, expected", TRANSPARENT)
def test_what_is_transparent_shows_white(tmp_path, image, suffix, transparency, expected):
    options = {} if transparency is None else {"transparency": transparency}
    got = saved(image, tmp_path / f"x.{suffix}", **options)
    assert all(near(got.getpixel((x, 0)), colour, 1) for x, colour in enumerate(expected))


def test_a_png_with_a_text_that_pillow_refuses(tmp_path):
    """Programs write their whole workflow into a picture; nothing but the text gets lost."""
    about, file = PngImagePlugin.PngInfo(), tmp_path / "picture.png"
    about.add_text("workflow", "x" * 2**21, zip=True)
    marked().save(file, pnginfo=about)
    with pytest.raises(ValueError, match="MAX_TEXT"), Image.open(file) as image:
        image.load()
    assert pictures.read_image(file).tobytes() == marked().tobytes()


def test_opaque_alpha_changes_nothing(tmp_path):
    assert saved(marked().convert("RGBA"), tmp_path / "x.png").tobytes() == marked().tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    levels = np.linspace(0, 65535, 1000).astype(np.uint16)[None].repeat(2, 0)
    got = np.asarray(saved(Image.fromarray(levels), tmp_path / f"x.{suffix}"))
    assert got.shape == (2, 1000, 3) and abs(got - levels[..., None] / 257).max() <= 1


@pytest.mark.parametrize("array", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_32_bit_values_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match="32-bit"):
        saved(Image.fromarray(array), tmp_path / "x.tif")


MODES = [
    ("1", "tif", 255, WHITE),
    ("L", "tif", 77, (77,) * 3),
    ("YCbCr", "tif", (76, 85, 255), RED),
    ("CMYK", "tif", (0, 255, 255, 0), RED),
    ("CMYK", "jpg", (0, 255, 255, 0), RED),  # Adobe's are inverted
]


@pytest.mark.parametrize("mode, suffix, colour, expected", MODES)
def test_other_modes(tmp_path, mode, suffix, colour, expected):
    image = saved(Image.new(mode, (32, 32), colour), tmp_path / f"x.{suffix}")
    assert near(image.getpixel((9, 9)), expected, 4)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE, GREEN)]
    path, options = tmp_path / f"x.{suffix}", {"lossless": True} if suffix == "webp" else {}
    image = saved(frames[0], path, save_all=True, append_images=frames[1:], **options)
    assert image.getpixel((8, 8)) == RED


# picture -> tensor


def test_values_and_way_back():
    image = marked((32, 32))
    pixels = pictures.to_tensor(image, 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert_close(pixels[:, 0, -1], torch.tensor([-1.0, 128 / 127.5 - 1, -1.0]))
    assert pictures.to_image(pixels).tobytes() == image.tobytes()
    assert pictures.to_image(pixels * 3).getpixel((31, 31)) == WHITE
    one_pixel = pictures.to_tensor(Image.new("RGB", (1, 1), RED), 16)
    assert_close(one_pixel, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 16, 16))


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (301, 100)])
def test_crops_the_middle_and_does_not_squash(size):
    image = Image.new("RGB", size, RED)  # the middle square is blue on its left, white on its right
    left, top = (size[0] - 100) // 2, (size[1] - 100) // 2
    image.paste(WHITE, (left, top, left + 100, top + 100))
    image.paste(BLUE, (left, top, left + 50, top + 100))
    pixels = pictures.to_tensor(image, 50)
    expected = Image.new("RGB", (50, 50), WHITE)
    expected.paste(BLUE, (0, 0, 25, 50))
    away = torch.arange(50).sub(24.5).abs() > 2  # from the edge that resizing blurs
    assert_close(pixels[..., away], pictures.to_tensor(expected, 50)[..., away])


def test_downscaling_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the 32 pixels can show: must become grey
    assert pictures.to_tensor(Image.fromarray(stripes), 32)[..., 2:-2].abs().max() < 0.02


def test_12000_by_9000_in_bounded_time_and_memory(tmp_path):
    Image.new("L", (12_000, 9_000), 200).save(tmp_path / "a.jpg")
    Image.new("1", (9_000, 12_000), 1).save(tmp_path / "b.png")
    program = """
import resource, sys, time, torch
from tinyti.files import pictures
start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
photos, passed_over = pictures.read_photos(sys.argv[1], 64)
assert passed_over == [], passed_over
assert torch.allclose(photos[0].pixels, torch.tensor(200 / 127.5 - 1), atol=0.02)
assert photos[1].pixels.min() == 1
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    seconds, mebibytes = map(float, result.stdout.split())
    assert seconds < 30 and mebibytes < 1000


# a folder


PASSED_OVER = {  # a file's name, its contents and what is said of it
    ".DS_Store": (b"\0\0\0\1Bud1\0\0\x10\0\0\0\x08\0", "not a picture"),
    "e.png": (b"\x89PNG\r\n\x1a\n" + b"?" * 100, ""),
    "h.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
    "notes.txt": (b"no picture has this name", "not a picture"),
    "two\nlines.txt": (b"a name on two lines", "not a picture"),
}


def test_folder_with_all_sorts_of_things(tmp_path):
    for name in ["b.png", "a.JPG", "c.webp", "d.png"]:
        marked().save(tmp_path / name)
    good = (tmp_path / "d.png").read_bytes()
    (tmp_path / "d.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "b.txt").write_bytes(b"  a mug\n on a table \n")
    (tmp_path / "c.txt").write_bytes(b"\n")
    for name, (content, _) in PASSED_OVER.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "more").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    Image.new("1", (20_000, 20_000)).save(tmp_path / "g.png")

    photos, passed_over = pictures.read_photos(tmp_path, 16)
    assert [photo.file.name for photo in photos] == ["a.JPG", "b.png", "c.webp"]
    assert [photo.caption for photo in photos] == [None, "a mug on a table", None]
    assert all(photo.pixels.shape == (3, 16, 16) for photo in photos)
    reasons = {name.replace("\n", " "): reason for name, (_, reason) in PASSED_OVER.items()}
    reasons |= {"d.png": "cannot be read", "g.png": "exceeds limit", "pipe": "not a file"}
    for line, name in zip(passed_over, sorted(reasons), strict=True):
        assert line.startswith(f"{tmp_path / name}: ") and reasons[name] in line and "\n" not in line

    [photo], passed_over = pictures.read_photos(tmp_path / "b.png", 16)  # a single picture is a folder of one
    assert (photo.file, photo.caption, passed_over) == (tmp_path / "b.png", "a mug on a table", [])


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such folder"):
        pictures.read_photos(tmp_path / "none", 16)
    with pytest.raises(FileNotFoundError, match="no such file"):
        pictures.read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"No readable picture in .*found nothing"):
        pictures.read_photos(tmp_path, 16)
    (tmp_path / "a.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"No readable picture in .*a.txt: not a picture"):
        pictures.read_photos(tmp_path, 16)
    marked().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        pictures.read_photos(tmp_path, 16)


def test_photos_of_an_iphone(tmp_path, monkeypatch):
    """Read where pillow-heif is installed, upright and white where it is clear; else told with a way out."""
    pillow_heif = pytest.importorskip("pillow_heif")
    file, picture = tmp_path / "IMG_1.HEIC", marked((96, 64))
    for orientation in range(1, 9):  # which the file's own rotation repeats, or not
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        pillow_heif.from_pillow(picture).save(file, quality=100, exif=exif.tobytes())
        turn = pictures.ORIENTATION.get(orientation)
        upright = picture if turn is None else picture.transpose(turn)
        assert all(near(*pair, 20) for pair in zip(corners(pictures.read_image(file)), corners(upright)))
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", (96, 64), 0))
    pillow_heif.from_pillow(clear).save(file, quality=100)
    assert all(near(colour, WHITE) for colour in corners(pictures.read_image(file)))
    whole = file.read_bytes()
    for data in (whole[:-20], whole[:60], whole[: len(whole) // 2], whole[:12] + bytes(len(whole))):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"\A[^\n]*IMG_1.HEIC: [^\n]*\Z") as refusal:
            pictures.read_image(file)
        assert "pip install" not in str(refusal.value)
    file.write_bytes(whole)
    monkeypatch.delitem(Image.OPEN, "HEIF")
    with pytest.raises(ValueError, match="pip install pillow-heif, or export it as JPEG or PNG"):
        pictures.read_image(file)


def test_without_pillow_heif(tmp_path):
    """The package can be imported, and says what is missing."""
    (tmp_path / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    code = "import sys; sys.modules['pillow_heif'] = None; from tinyti.files.pictures import read_photos\n"
    code += "try: read_photos(sys.argv[1], 16)\nexcept ValueError as error: print(error)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "IMG_1.heic: a HEIC photo; pip install pillow-heif" in ended.stdout
