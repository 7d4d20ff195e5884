"""Decodes a picture as a person would see it: upright, on white, in eight bits, its first frame."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

# Decoders that read pixels and run nothing else (EPS would start Ghostscript).
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
# Decompression bombs: 64 megapixels is beyond any camera picture that a vision encoder reads.
MAX_PIXELS = 64_000_000
_SIXTEEN_BITS = 65535
_LEVELS = {"L;2": 3, "L;4": 15}  # the whitest shade of grey PNGs with two and four bits
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # of TIFF


def decode(data: bytes) -> Image.Image:
    """The picture of an encoded file, in RGB.

    Turned as its EXIF orientation says; what is transparent stands on white; 16-bit grey is scaled to 8 bits, so are pictures of
    32-bit integers and of floats, whose scale is told by their largest value (1, 255 or 65,535); of an animation the
    first frame. Raises ValueError for a picture over MAX_PIXELS, and for values that no such scale fits; decoders raise errors
    of any type.
    """
    picture = Image.open(io.BytesIO(data), formats=DECODERS)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, over {MAX_PIXELS:,}; scale it down")
    negative = picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    _scale_transparent_shade(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        return _eight_bits(picture, negative)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return _on_white(picture)
    return picture.convert("RGB")


def _scale_transparent_shade(picture: Image.Image) -> None:
    """Pillow gives the pixels of these PNGs in eight bits, but their transparent shade or colour as the file has it."""
    key, stored = picture.info.get("transparency"), picture.tile[0][3] if picture.tile else None
    if isinstance(key, int) and stored in _LEVELS:
        picture.info["transparency"] = key * 255 // _LEVELS[stored]
    elif isinstance(key, tuple) and stored == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _on_white(picture: Image.Image) -> Image.Image:
    straight = {"RGBa": "RGBA", "La": "LA"}.get(picture.mode)  # colours that are multiplied by their opacity already
    layer = (picture if straight is None else picture.convert(straight)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bits(picture: Image.Image, negative: bool) -> Image.Image:
    """negative: whether 0 is white, which Pillow heeds up to eight bits."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all() or low < 0 or high > _SIXTEEN_BITS:
        raise ValueError(f"values from {low:g} to {high:g}, which are no shades of grey; save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        scale = _SIXTEEN_BITS
    elif picture.mode == "F" and high <= 1:
        scale = 1
    else:
        scale = 255 if high <= 255 else _SIXTEEN_BITS
    shades = np.rint(values * (255 / scale))
    shades = 255 - shades if negative else shades
    transparent = picture.info.get("transparency")
    shades = np.where(values == transparent, 255, shades) if isinstance(transparent, int) else shades
    return Image.fromarray(shades.astype(np.uint8), "L").convert("RGB")
