"""Pictures of all kinds come out as a person sees them, or are refused with a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from mmkd.data.pictures import decode
from mmkd.data.samples import ImageRef
from mmkd.errors import ImageError

SHADES = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5  # [h, w] grey, no two alike


def rgb():
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def close(picture, values, most=2):
    found = np.asarray(picture).astype(int)
    wanted = np.broadcast_to(np.asarray(values).astype(int), found.shape) if np.ndim(values) == 3 else np.stack([values] * 3, -1)
    assert picture.mode == "RGB" and np.abs(found - wanted).max() <= most


def test_an_ordinary_picture_is_itself_to_the_bit():
    assert np.array_equal(np.asarray(decode(encoded(rgb()))), np.asarray(rgb()))
    grey = Image.fromarray(SHADES)
    assert np.array_equal(np.asarray(decode(encoded(grey))), np.asarray(grey.convert("RGB")))


@pytest.mark.parametrize("turn", range(1, 9))
def test_it_stands_upright(turn):
    """A camera stores rows and columns as its sensor has them and says how to turn them."""
    stored_as = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
                 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
                 8: Image.Transpose.ROTATE_270}  # fmt: skip
    stored = rgb().transpose(stored_as[turn]) if turn in stored_as else rgb()
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        close(decode(encoded(stored, kind, exif=exif, **options)), np.asarray(rgb()), most=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    """The colour below a transparent place is often black; nobody sees it."""
    grey = np.where(SHADES > 120, 0, SHADES)
    opacity = np.where(SHADES > 120, 0, 255).astype(np.uint8)
    picture, options = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opacity)]), {}
    if mode == "P":
        picture = Image.fromarray(np.where(SHADES > 120, 200, SHADES).astype(np.uint8), "P")
        picture.putpalette([shade for value in range(256) for shade in [0 if value == 200 else value] * 3])
        options = {"transparency": 200}
    picture = picture.convert("RGBA") if mode == "RGBA" else picture
    close(decode(encoded(picture, **options)), np.where(SHADES > 120, 255, SHADES), most=2)


def test_half_transparent_is_mixed_with_white():
    picture = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    close(decode(encoded(picture)), np.full((2, 2), 127), most=1)


def test_a_colour_that_stands_for_transparency():
    data = encoded(Image.fromarray(SHADES).convert("RGB"), transparency=(5, 5, 5))
    close(decode(data), np.where(SHADES == 5, 255, SHADES))


@pytest.mark.parametrize(("values", "kind"), [
    (SHADES.astype(np.uint16) * 257, "PNG"), (SHADES.astype(np.uint16) * 257, "TIFF"),
    (SHADES.astype(np.int32) * 257, "TIFF"), (SHADES.astype(np.int32), "TIFF"),
    (SHADES.astype(np.float32) / 255, "TIFF"), (SHADES.astype(np.float32), "TIFF"), (SHADES.astype(np.float32) * 257, "TIFF"),
])  # fmt: skip
def test_more_than_eight_bits_are_scaled(values, kind):
    close(decode(encoded(Image.fromarray(values), kind)), SHADES, most=1)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 1e6])
def test_values_that_are_no_shades_are_refused(wrong):
    values = SHADES.astype(np.float32)
    values[2, 3] = wrong
    with pytest.raises(ValueError, match="no shades of grey"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("L", (4, 4), shade) for shade in (40, 200)]
    close(decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), np.full((4, 4), 40))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LAB"])
def test_other_modes_are_converted(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF"
    data = encoded(rgb().convert(mode) if mode != "LAB" else Image.new("LAB", (3, 3), (128, 0, 0)), kind)
    assert decode(data).mode == "RGB"


def test_only_decoders_of_pictures_run(tmp_path):
    """An EPS file is a program; Pillow would hand it to Ghostscript."""
    buffer = io.BytesIO()
    rgb().save(buffer, "EPS")
    (tmp_path / "photo.jpg").write_bytes(buffer.getvalue())
    with pytest.raises(ImageError, match=r"photo\.jpg does not decode"):
        ImageRef.inside(tmp_path, "photo.jpg").load()


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", encoded(rgb())[:60]])
def test_what_is_no_picture_is_refused(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError, match="does not decode"):
        ImageRef.inside(tmp_path, "x.png").load()
