"""Pictures as they come from phones, scanners and the web, at random: each is its plain RGB form, or is refused with a reason.

MMKD_ODD_PICTURES=1000 draws as many; by default a sample of seconds is drawn.
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from mmkd.data.samples import ImageRef
from mmkd.errors import ImageError

COUNT = int(os.environ.get("MMKD_ODD_PICTURES", "90"))
SIZES = [(1, 1), (1, 9), (8000, 8), (8, 8000), (33, 17), (64, 48), (2, 300), (257, 255)]  # [width, height]
# How a picture that is stored in each orientation is to be turned: of [h, w, ...] arrays.
TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def white(colour, opacity):
    """Colours [h, w, 3] on white, by opacities [h, w] of 0 to 255."""
    share = opacity[..., None] / 255
    return colour * share + 255 * (1 - share)


def three(grey):
    return np.stack([grey] * 3, -1)


class Draw:
    """Draws pictures; each method gives an encoded picture and its plain RGB form [h, w, 3], None where it must be refused."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        width, height = SIZES[seed % len(SIZES)]
        self.shape = (height, width)
        self.turn = int(self.rng.integers(1, 9))
        self.grey = self.rng.integers(0, 256, self.shape, dtype=np.uint8)
        self.colour = self.rng.integers(0, 256, (*self.shape, 3), dtype=np.uint8)
        self.opacity = self.rng.choice(np.array([0, 90, 255], dtype=np.uint8), self.shape)

    def saved(self, picture, kind, plain=None, tags=(), **options):
        exif = Image.Exif()
        for tag, value in ((0x0112, self.turn), *tags):
            exif[tag] = value
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({} if kind in ("GIF", "BMP", "PPM", "JPEG2000") else {"exif": exif}), **options)
        turned = kind not in ("GIF", "BMP", "PPM", "JPEG2000")
        return buffer.getvalue(), None if plain is None else (TURNS[self.turn](plain) if turned else plain)

    def lossy(self, picture, kind, **options):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        plain = np.asarray(Image.open(buffer).convert("RGB"))
        return self.saved(picture, kind, plain, **options)

    def png(self, depth, colours, rows, key=None):
        """A PNG that Pillow cannot write, not turned. rows [h, bytes or samples].  key: the chunk of the transparent colour."""
        height, width = self.shape
        parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))]
        parts += [(b"tRNS", key)] if key is not None else []
        parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    # ---- kinds

    def rgb(self):
        kind = self.rng.choice(["PNG", "TIFF", "BMP", "PPM", "WEBP"])
        return self.saved(Image.fromarray(self.colour), kind, self.colour, **({"lossless": True} if kind == "WEBP" else {}))

    def grey_levels(self):
        return self.saved(Image.fromarray(self.grey), self.rng.choice(["PNG", "TIFF", "BMP", "GIF", "PPM"]), three(self.grey))

    def one_bit(self):
        bits = self.grey > 127
        return self.saved(Image.fromarray(bits), self.rng.choice(["PNG", "TIFF", "BMP", "PPM"]), three(bits * 255))

    def rgba(self):
        picture = Image.fromarray(np.dstack([self.colour, self.opacity]))
        kind = self.rng.choice(["PNG", "TIFF", "WEBP"])
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        return self.saved(picture, kind, white(self.colour, self.opacity), **options)

    def grey_alpha(self):
        return self.saved(Image.fromarray(np.dstack([self.grey, self.opacity])), "PNG", white(three(self.grey), self.opacity))

    def palette(self):
        colours = self.rng.integers(0, 256, (256, 3), dtype=np.uint8)
        picture = Image.fromarray(self.grey, "P")
        picture.putpalette(colours.tobytes())
        plain = colours[self.grey]
        how = self.rng.integers(3)
        if how == 0:
            return self.saved(picture, self.rng.choice(["PNG", "TIFF", "BMP"]), plain)
        if how == 1:
            return self.saved(picture, "PNG", np.where(self.grey[..., None] == 7, 255, plain), transparency=7)
        opacities = self.rng.integers(0, 256, 256, dtype=np.uint8)
        return self.saved(picture, "PNG", white(plain, opacities[self.grey]), transparency=opacities.tobytes())

    def a_colour_for_transparency(self):
        key = tuple(int(value) for value in self.colour[0, 0])
        plain = np.where((self.colour == key).all(-1)[..., None], 255, self.colour)
        return self.saved(Image.fromarray(self.colour), "PNG", plain, transparency=key)

    def few_bits_with_a_transparent_shade(self):
        bits = int(self.rng.choice([1, 2, 4]))
        values = self.grey >> (8 - bits)
        key, most = int(values[0, 0]), 2**bits - 1
        packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(len(values), -1), axis=1)
        plain = three(values * (255 / most))
        return self.png(bits, 0, packed, key.to_bytes(2, "big")), np.where(values[..., None] == key, 255, plain)

    def sixteen_bit_colour(self):
        values = self.rng.integers(0, 65536, (*self.shape, 3), dtype=np.uint16).astype(">u2")
        if self.rng.integers(2):
            return self.png(16, 2, values), values / 257
        key = values[0, 0]
        return self.png(16, 2, values, key.tobytes()), np.where((values == key).all(-1)[..., None], 255, values / 257)

    def sixteen_bits_and_opacity(self):
        opacity = self.opacity.astype(">u2") * 257
        if self.rng.integers(2):
            values = self.rng.integers(0, 65536, self.shape, dtype=np.uint16)
            return self.png(16, 4, np.dstack([values, opacity]).astype(">u2")), white(three(values / 257), self.opacity)
        values = self.rng.integers(0, 65536, (*self.shape, 3), dtype=np.uint16)
        return self.png(16, 6, np.dstack([values, opacity]).astype(">u2")), white(values / 257, self.opacity)

    def sixteen_bits(self):
        values = self.rng.integers(0, 65536, self.shape, dtype=np.uint16)
        return self.saved(Image.fromarray(values), self.rng.choice(["PNG", "TIFF"]), three(values / 257))

    def sixteen_bits_with_a_transparent_shade(self):
        values = self.rng.integers(0, 65536, self.shape, dtype=np.uint16)
        key = int(values[0, 0])
        return self.saved(Image.fromarray(values), "PNG", three(np.where(values == key, 255, values / 257)), transparency=key)

    def sixteen_bits_of_a_negative(self):
        values = self.rng.integers(0, 65536, self.shape, dtype=np.uint16)
        return self.saved(Image.fromarray(values), "TIFF", three(255 - values / 257), tags=[(262, 0)])

    def floats(self):
        values = self.grey.astype(np.float32) / 255
        values[0, 0] = 1.0
        return self.saved(Image.fromarray(values), "TIFF", three(values * 255))

    def cmyk(self):
        picture = Image.fromarray(self.colour).convert("CMYK")
        if self.rng.integers(2):
            return self.saved(picture, "TIFF", np.asarray(picture.convert("RGB")))
        return self.lossy(picture, "JPEG", quality=95)

    def jpeg(self):
        picture = Image.fromarray(self.colour if self.rng.integers(2) else self.grey)
        return self.lossy(picture, "JPEG", quality=90, progressive=bool(self.rng.integers(2)))

    def jpeg_2000(self):
        return self.saved(Image.fromarray(self.colour), "JPEG2000", self.colour, irreversible=False)

    def compressed_tiff(self):
        way = self.rng.choice(["tiff_lzw", "tiff_deflate", "packbits"])
        return self.saved(Image.fromarray(self.colour), "TIFF", self.colour, compression=str(way))

    def animation(self):
        kind = self.rng.choice(["GIF", "WEBP", "PNG", "TIFF"])
        frames = [Image.fromarray(self.grey), Image.new("L", self.shape[::-1], 3)]
        options = {"lossless": True} if kind == "WEBP" else {}
        return self.saved(frames[0], kind, three(self.grey), save_all=True, append_images=frames[1:], **options)

    def lab(self):
        picture = Image.fromarray(np.dstack([self.grey, np.full((*self.shape, 2), 128, np.uint8)]), "LAB")
        return self.saved(picture, "TIFF", np.asarray(picture.convert("RGB")))

    def cut(self):
        picture = Image.fromarray(self.rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        data, _ = self.saved(picture, self.rng.choice(["PNG", "JPEG", "WEBP", "BMP", "TIFF"]))
        return data[: int(len(data) * self.rng.uniform(0.05, 0.9))], None

    def something_else(self):
        eps = io.BytesIO()
        Image.fromarray(self.colour[:4, :4]).save(eps, "EPS")
        others = [b"", b"<!DOCTYPE html><html>404</html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", eps.getvalue(), b"\0" * 500]
        return others[int(self.rng.integers(len(others)))], None


KINDS = [name for name in vars(Draw) if not name.startswith("_") and name not in ("saved", "lossy", "png")]
if not features.check("jpg_2000"):
    KINDS.remove("jpeg_2000")


@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_are_their_plain_form_or_refused(tmp_path, kind):
    ref = ImageRef.inside(tmp_path, "picture.jpg")  # names say little
    for seed in range(max(2, COUNT // len(KINDS))):
        data, plain = getattr(Draw(seed), kind)()
        (tmp_path / ref.name).write_bytes(data)
        if plain is None:
            with pytest.raises(ImageError, match=r"picture\.jpg does not decode: \w"):
                ref.load()
            continue
        found = ref.load()
        assert found.mode == "RGB" and found.size == (plain.shape[1], plain.shape[0]), (kind, seed)
        assert np.abs(np.asarray(found).astype(float) - plain).max() <= 2, (kind, seed)
