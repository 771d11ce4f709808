"""Tests of mirror_images.py: the pixels, the chains, the embedded server.

Every image is drawn here: small, without any symmetry, and the same at every run.
What a viewer shows of a file is what Pillow's exif_transpose makes of it.
"""

import asyncio
import contextlib
import http
import http.client
import io
import itertools
import json
import math
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from PIL import (
    EpsImagePlugin,
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    ImageDraw,
    ImageFilter,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
)

import mirror_images
import upload_images
from mirror_images import ImageError, ImageHandler, ImageServer, mirror
from upload_images import Connection, Outcome

SCRIPT = Path(mirror_images.__file__)
SIZE = (29, 18)
ORIENTATION = ExifTags.Base.Orientation
ORIENTATIONS = range(1, 9)


# ---- what to mirror --------------------------------------------------------


def band(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    values = [
        (41 * seed + (5 + 2 * seed) * x + (11 + seed) * y + x * y) % 256
        for y in range(height)
        for x in range(width)
    ]
    return Image.frombytes("L", size, bytes(values))


def picture(mode: str, size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Pixels that no two places share a pattern of."""
    first = band(size, seed)
    if mode == "1":
        return first.point([255 * (value > 99) for value in range(256)]).convert("1")
    if mode == "P":
        image = first.point([value // 16 for value in range(256)])
        image.putpalette([(7 * n) % 256 for n in range(48)])
        return image
    if mode in ("L", "I", "F"):
        return first.convert(mode)
    if mode.startswith("I;16"):
        low = band(size, seed + 1).tobytes()
        samples = b"".join(map(bytes, zip(low, first.tobytes(), strict=True)))
        return Image.frombytes(mode, size, samples)
    bands = [
        band(size, seed + n) for n in range(len(Image.new(mode, (1, 1)).getbands()))
    ]
    return Image.merge(mode, bands)


def photo(mode: str = "RGB", size: tuple[int, int] = (192, 128)) -> Image.Image:
    """Soft ramps, sharp edges and fine detail, as in a photo."""
    fine = Image.effect_mandelbrot(size, (-2.0, -1.2, 0.6, 1.1), 60)
    across = Image.linear_gradient("L").rotate(90).resize(size)
    down = Image.radial_gradient("L").resize(size)
    bands = [
        ImageChops.blend(across, fine, 0.3),
        ImageChops.blend(down, fine, 0.2),
        ImageChops.blend(across, down, 0.7),
    ]
    image = Image.merge("RGB", bands)
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 70, 90), "#c04020")
    draw.line((10, 110, 120, 60), "#f0f0e0", 3)
    image = image.filter(ImageFilter.GaussianBlur(1))
    if mode == "RGBA":
        image.putalpha(across)
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved_frames(frames: Sequence[Image.Image], kind: str, **options: Any) -> bytes:
    rest = list(frames[1:])
    return saved(frames[0], kind, save_all=True, append_images=rest, **options)


def drawing(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A frame of an animation in which little moves, so that parts of it are stored."""
    image = Image.new("RGB", size, "#204060")
    draw = ImageDraw.Draw(image)
    draw.polygon([(2, 28), (9, 12), (17, 25)], "#c0a020")
    draw.rectangle((5 * number, 3 + number, 6 + 5 * number, 7), "#e03010")
    return image


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def shown(data: bytes) -> list[Image.Image]:
    """The frames or pages of a file, as a viewer shows them."""
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(ImageOps.exif_transpose(image))
    return frames


def seen_in_a_mirror(data: bytes) -> list[Image.Image]:
    return [ImageOps.mirror(frame) for frame in shown(data)]


def content(image: Image.Image) -> tuple[object, ...]:
    palette = image.getpalette("RGBA") if image.mode == "P" else None
    return image.mode, image.size, palette, image.tobytes()


def assert_mirrored(data: bytes) -> bytes:
    """Mirror `data`; assert that nothing but the side changed."""
    result = mirror(data)
    expected = [content(frame) for frame in seen_in_a_mirror(data)]
    assert [content(frame) for frame in shown(result)] == expected
    assert opened(result).format == opened(data).format
    return result


def decibels(one: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two images of one size and mode."""
    assert (one.size, one.mode) == (other.size, other.mode)
    if one.mode == "RGBA":  # what is hidden by transparency does not count
        grey = Image.new("RGBA", one.size, "#808080")
        one = Image.alpha_composite(grey, one)
        other = Image.alpha_composite(grey, other)
    histogram = ImageChops.difference(one, other).histogram()
    total = sum(count * (n % 256) ** 2 for n, count in enumerate(histogram))
    return 10 * math.log10(255**2 * sum(histogram) / total) if total else math.inf


def assert_close(data: bytes, least: float) -> bytes:
    """Mirror `data`; assert that every frame has `least` dB against the true flip."""
    result = mirror(data)
    pairs = zip(shown(result), seen_in_a_mirror(data), strict=True)
    assert min(decibels(frame, expected) for frame, expected in pairs) >= least
    assert opened(result).format == opened(data).format
    return result


XMP = (
    b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Make="Box" %s/></rdf:RDF>'
    b'</x:xmpmeta><?xpacket end="w"?>'
)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def camera_exif(orientation: int | None = None) -> bytes:
    """EXIF data with all that a camera writes: sub-directories, a maker note."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Box"
    exif[ExifTags.Base.Copyright] = "somebody"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2024:02:29 12:34:56",
        ExifTags.Base.ISOSpeedRatings: 200,
        ExifTags.Base.MakerNote: b"a note of the maker",
    }
    exif[ExifTags.IFD.GPSInfo] = {
        ExifTags.GPS.GPSLatitudeRef: "N",
        ExifTags.GPS.GPSLatitude: (52.0, 31.0, 12.5),
    }
    return exif.tobytes()


def camera_tags(data: bytes) -> dict[str, object]:
    """The EXIF data of a file, without what says how its pixels are stored."""
    exif = opened(data).getexif()
    return {
        "make": exif.get(ExifTags.Base.Make),
        "copyright": exif.get(ExifTags.Base.Copyright),
        "exif": dict(exif.get_ifd(ExifTags.IFD.Exif)),
        "gps": dict(exif.get_ifd(ExifTags.IFD.GPSInfo)),
    }


Pixels = list[list[tuple[int, ...]]]
PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = [
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
]
PNG_KINDS = [
    *((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)),
    *((1, 3), (2, 3), (4, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)),
]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    end = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + end


def png_line(row: Sequence[tuple[int, ...]], depth: int) -> bytes:
    samples = [sample for pixel in row for sample in pixel]
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8)


def png_of(
    pixels: Pixels,
    depth: int,
    colour: int,
    interlaced: bool = False,
    chunks: bytes = b"",
) -> bytes:
    """A PNG as the standard describes it, for what Pillow does not write."""
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    lines = b""
    for x, y, step_x, step_y in passes:
        for row in pixels[y::step_y]:
            if row[x::step_x]:
                lines += b"\0" + png_line(row[x::step_x], depth)
    size = len(pixels[0]), len(pixels)
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + chunks
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_pixels(data: bytes) -> Pixels:
    """The samples of a PNG that is not interlaced, at their full depth."""
    chunks = png_chunks(data)
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[0][1])
    lines = zlib.decompress(b"".join(b for kind, b in chunks if kind == b"IDAT"))
    bands = PNG_BANDS[colour]
    stride = (width * bands * depth + 7) // 8
    step = max(1, bands * depth // 8)
    above, pixels = bytearray(stride), []
    for y in range(height):
        method, *line = lines[y * (stride + 1) : (y + 1) * (stride + 1)]
        for x in range(stride):
            left, corner = (line[x - step], above[x - step]) if x >= step else (0, 0)
            up = above[x]
            estimate = left + up - corner
            nearest = min(left, up, corner, key=lambda v: abs(estimate - v))
            line[x] += (0, left, up, (left + up) // 2, nearest)[method]
            line[x] %= 256
        above = bytearray(line)
        bits = "".join(f"{byte:08b}" for byte in line)
        samples = [
            int(bits[n * depth : (n + 1) * depth], 2) for n in range(width * bands)
        ]
        pixels.append(
            [tuple(samples[n : n + bands]) for n in range(0, len(samples), bands)]
        )
    return pixels


def png_samples(depth: int, colour: int) -> Pixels:
    """Pixels of every depth, the low bits in use too."""
    width, height = 11, 9
    return [
        [
            tuple(
                (x * 40503 + y * 10007 + x * y * 257 + n * 12345) % 2**depth
                for n in range(PNG_BANDS[colour])
            )
            for x in range(width)
        ]
        for y in range(height)
    ]


def gif_of(frames: Sequence[bytes], size: tuple[int, int] = (10, 6)) -> bytes:
    """A GIF with a table of 256 colours."""
    head = struct.pack("<6sHHBBB", b"GIF89a", *size, 0xF7, 0, 0)
    table = bytes(n * factor % 256 for n in range(256) for factor in (1, 3, 7))
    return head + table + b"".join(frames) + b";"


def gif_frame(
    left: int, top: int, width: int, height: int, interlaced: bool = False
) -> bytes:
    """A frame whose pixels are all different, behind a graphic control extension."""
    rows = [
        [(7 * x + 31 * y + left) % 256 for x in range(width)] for y in range(height)
    ]
    if interlaced:
        order = [*range(0, height, 8), *range(4, height, 8)]
        order += [*range(2, height, 4), *range(1, height, 2)]
        rows = [rows[y] for y in order]
    codes = []
    for n, pixel in enumerate(itertools.chain(*rows)):
        if n % 250 == 0:
            codes.append(256)  # a clear code: codes stay 9 bits wide
        codes.append(pixel)
    bits = sum(code << 9 * n for n, code in enumerate([*codes, 257]))
    packed = bits.to_bytes((len(codes) + 1) * 9 // 8 + 1, "little")
    blocks = [packed[n : n + 255] for n in range(0, len(packed), 255)]
    return (
        b"!\xf9\x04\x04\x0a\0\0\0"
        + struct.pack("<BHHHHB", 0x2C, left, top, width, height, interlaced << 6)
        + b"\x08"
        + b"".join(bytes([len(block)]) + block for block in blocks)
        + b"\0"
    )


# ---- mirror: stills --------------------------------------------------------

EXACT = [
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("JPEG2000", m, {}) for m in ("L", "LA", "RGB", "RGBA", "I;16", "CMYK")),
    *(("JPEG2000", m, {"no_jp2": True}) for m in ("L", "LA", "RGB", "RGBA", "I;16")),
    *(("PNG", m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I", "F")),
    *(("WEBP", m, {"lossless": True}) for m in ("RGB", "RGBA")),
    *(
        ("TIFF", mode, {})
        for mode in (
            *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
            *("I", "I;16", "I;16B", "F"),
        )
    ),
    *(
        ("TIFF", mode, {"compression": method})
        for mode in ("1", "L", "P", "RGB", "I;16")
        for method in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    ),
    ("TIFF", "1", {"compression": "group4"}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), EXACT)
def test_a_lossless_image_is_mirrored_exactly(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    assert_mirrored(saved(picture(mode), kind, **options))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (17, 33)])
@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG2000", "PNG", "PPM", "TIFF"])
def test_any_size_is_mirrored(kind: str, size: tuple[int, int]) -> None:
    assert_mirrored(saved(picture("RGB", size), kind))


@pytest.mark.parametrize(("kind", "mode", "options"), EXACT)
def test_mirroring_twice_gives_the_original_back(
    kind: str, mode: str, options: dict[str, Any]
) -> None:
    data = saved(picture(mode), kind, **options)
    twice = [content(frame) for frame in shown(mirror(mirror(data)))]
    assert twice == [content(frame) for frame in shown(data)]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("mode", "sampling"),
    [("L", -1), ("RGB", 0), ("RGB", 1), ("RGB", 2), ("CMYK", -1)],
)
def test_a_jpeg_keeps_its_tables_subsampling_and_progressive_flag(
    mode: str, sampling: int, progressive: bool
) -> None:
    data = saved(
        photo(mode),
        "JPEG",
        quality=83,
        subsampling=sampling,
        progressive=progressive,
    )
    result = opened(assert_close(data, 45))
    source = opened(data)
    assert isinstance(source, JpegImagePlugin.JpegImageFile)
    assert isinstance(result, JpegImagePlugin.JpegImageFile)
    assert result.quantization == source.quantization
    assert JpegImagePlugin.get_sampling(result) == sampling
    assert bool(result.info.get("progressive")) == progressive


def test_a_jpeg_stored_as_rgb_stays_rgb() -> None:
    data = saved(photo(), "JPEG", quality=90, keep_rgb=True)
    result = opened(assert_close(data, 45))
    assert result.info["adobe_transform"] == opened(data).info["adobe_transform"]


def test_a_ycck_jpeg_is_mirrored_in_its_colours() -> None:
    tables = [[3] * 64, [70] * 64]  # one for the first component, one for the others
    data = saved(photo("CMYK"), "JPEG", qtables=tables)
    # An Adobe marker (Adobe TN 5116) whose transform says YCCK.
    marker = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"
    at = data.index(marker) + len(marker)
    assert_close(data[:at] + b"\2" + data[at + 1 :], 45)


def test_a_jpeg_with_one_table_for_all_its_components_keeps_it() -> None:
    data = saved(photo(), "JPEG", qtables=[[3 + n // 8 for n in range(64)]])
    result = opened(assert_close(data, 45))
    assert isinstance(result, JpegImagePlugin.JpegImageFile)
    assert list(result.quantization) == [0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(
    ("kind", "quality"), [("WEBP", 60), ("WEBP", 90), ("AVIF", 60), ("AVIF", 90)]
)
def test_a_lossy_image_is_close_to_the_true_flip(
    kind: str, quality: int, mode: str
) -> None:
    assert_close(saved(photo(mode), kind, quality=quality), 38)


def test_a_grey_avif_stays_grey() -> None:
    assert opened(assert_close(saved(photo("L"), "AVIF"), 38)).mode == "L"


def test_a_lossless_webp_stays_lossless() -> None:
    result = mirror(saved(picture("RGBA"), "WEBP", lossless=True))
    assert result[12:16] == b"VP8L" or b"VP8L" in result[:100]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_colours_hidden_by_transparency_stay(kind: str) -> None:
    image = picture("RGB")
    image.putalpha(picture("1", seed=2).convert("L"))
    assert_mirrored(saved(image, kind, lossless=True, exact=True))


def test_a_lossy_webp_stays_lossy() -> None:
    assert b"VP8L" not in mirror(saved(photo(), "WEBP", quality=80))


def test_an_mpo_photo_becomes_the_jpeg_that_viewers_show() -> None:
    exif = camera_exif(6)
    data = saved_frames([photo(), photo().rotate(180)], "MPO", exif=exif, quality=90)
    assert opened(data).format == "MPO"
    result = mirror(data)
    assert opened(result).format == "JPEG"
    (frame,) = shown(result)
    assert decibels(frame, seen_in_a_mirror(data)[0]) >= 38
    assert camera_tags(result) == camera_tags(data)


def test_the_pages_of_a_tiff_keep_their_modes_sizes_and_compression() -> None:
    pages = [
        picture("RGB", (20, 11)),
        picture("1", (33, 7)),
        picture("I;16", (9, 14)),
        picture("P", (12, 12)),
        picture("CMYK", (5, 6)),
    ]
    methods = ["tiff_lzw", "group4", "tiff_adobe_deflate", "packbits", "raw"]
    for page, method in zip(pages, methods, strict=True):
        page.encoderinfo = {"compression": method}
    result = assert_mirrored(saved_frames(pages, "TIFF"))
    with Image.open(io.BytesIO(result)) as image:
        found = []
        for number in range(len(pages)):
            image.seek(number)
            found.append(image.info["compression"])
    assert found == methods


def test_a_tiff_compressed_as_jpeg_is_close_to_the_true_flip() -> None:
    data = saved(photo(), "TIFF", compression="jpeg", quality=85)
    assert opened(assert_close(data, 38)).info["compression"] == "jpeg"


def test_every_page_of_a_tiff_is_turned_by_its_own_orientation() -> None:
    pages = [picture("RGB"), picture("RGB", seed=3), picture("RGB", seed=5)]
    for page, orientation in zip(pages, (6, 1, 3), strict=True):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        page.encoderinfo = {"exif": exif}
    data = saved_frames(pages, "TIFF")
    expected = [
        ImageOps.mirror(pages[0].transpose(Image.Transpose.ROTATE_270)),
        ImageOps.mirror(pages[1]),
        ImageOps.mirror(pages[2].transpose(Image.Transpose.ROTATE_180)),
    ]
    found = [content(frame) for frame in shown(mirror(data))]
    assert found == [content(image) for image in expected]


@pytest.mark.parametrize(
    "data",
    [
        b"P1 # plain\n3 2\n1 0 0\n1 1 0\n",
        b"P2 3 1 255\n1 20 200\n",
        b"P3 2 1 255\n1 2 3 40 50 60\n",
        b"P5 3 1 100\n\x01\x20\x40",
        b"P5 3 1 4095\n" + struct.pack(">3H", 0, 1000, 4095),
        b"P6 2 1 15\n\x01\x02\x03\x0d\x0e\x0f",
        b"Pf 2 1 1.0\n" + struct.pack(">2f", -0.5, 1e9),
    ],
)
def test_every_kind_of_netpbm_file_is_mirrored(data: bytes) -> None:
    assert_mirrored(data)


@pytest.mark.parametrize("height", [4, -4], ids=["bottom up", "top down"])
def test_a_bmp_keeps_its_alpha_channel(height: int) -> None:
    pixels = picture("RGBA", (5, 4)).tobytes()
    header = struct.pack("<IiiHHII", 108, 5, height, 1, 32, 3, len(pixels))
    header += struct.pack("<iiII", 2835, 2835, 0, 0)
    header += struct.pack("<4I4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    header += bytes(48)
    offset = 14 + len(header)
    file = struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset)
    data = file + header + pixels
    assert opened(data).mode == "RGBA"
    assert_mirrored(data)


# ---- mirror: PNG -----------------------------------------------------------


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("depth", "colour"), PNG_KINDS)
def test_a_png_keeps_every_bit_of_its_samples(
    depth: int, colour: int, interlaced: bool
) -> None:
    pixels = png_samples(depth, colour)
    table = bytes(range(48)) * 16
    chunks = png_chunk(b"PLTE", table[: 3 * 2**depth]) if colour == 3 else b""
    result = mirror(png_of(pixels, depth, colour, interlaced, chunks))
    assert png_pixels(result) == [row[::-1] for row in pixels]
    assert png_chunks(result)[0][1][8:10] == bytes([depth, colour])


def test_a_png_keeps_a_short_palette_and_its_transparency() -> None:
    pixels: Pixels = [[(0,), (1,), (2,)], [(2,), (2,), (0,)]]
    chunks = png_chunk(b"PLTE", bytes(9)) + png_chunk(b"tRNS", b"\x80\x00")
    result = mirror(png_of(pixels, 2, 3, chunks=chunks))
    kept = dict(png_chunks(result))
    assert (kept[b"PLTE"], kept[b"tRNS"]) == (bytes(9), b"\x80\x00")
    assert png_pixels(result) == [row[::-1] for row in pixels]


@pytest.mark.parametrize(
    ("depth", "colour", "transparent"),
    [(8, 0, b"\0\x11"), (16, 0, b"\x11\x22"), (8, 2, b"\0\1\0\2\0\3")],
)
def test_a_png_keeps_its_transparent_colour(
    depth: int, colour: int, transparent: bytes
) -> None:
    chunk = png_chunk(b"tRNS", transparent)
    data = png_of(png_samples(depth, colour), depth, colour, chunks=chunk)
    assert (b"tRNS", transparent) in png_chunks(mirror(data))


KEPT_CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": bytes(range(32)),
    b"sRGB": b"\0",
    b"sBIT": b"\x05\x06\x05",
    b"bKGD": b"\0\1\0\2\0\3",
    b"pHYs": struct.pack(">IIB", 3937, 3937, 1),
    b"tIME": b"\x07\xe8\x02\x1d\x0c\x22\x38",
    b"tEXt": b"Title\0a title",
    b"zTXt": b"Comment\0\0" + zlib.compress(b"much to say " * 20),
    b"iTXt": b"Author\0\0\0de\0Autor\0" + "Jürgen ☃".encode(),
    b"iCCP": b"a profile\0\0" + zlib.compress(ICC),
    b"prVt": b"a chunk of somebody's own that is safe to copy",
}


@pytest.mark.parametrize("kind", KEPT_CHUNKS)
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_png_keeps_its_other_chunks(kind: bytes, behind: bool) -> None:
    data = saved(picture("RGB"), "PNG")
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    data = data[:at] + png_chunk(kind, KEPT_CHUNKS[kind]) + data[at:]
    assert (kind, KEPT_CHUNKS[kind]) in png_chunks(mirror(data))


def test_a_png_loses_unknown_chunks_that_depend_on_the_pixels() -> None:
    data = saved(picture("RGB"), "PNG")
    at = data.index(b"IDAT") - 4
    data = data[:at] + png_chunk(b"prVT", b"left is dark") + data[at:]
    assert b"prVT" not in dict(png_chunks(assert_mirrored(data)))


def test_an_interlaced_png_says_that_it_is_no_longer_interlaced() -> None:
    result = mirror(png_of(png_samples(8, 2), 8, 2, interlaced=True))
    assert png_chunks(result)[0][1][12] == 0


# ---- mirror: animations ----------------------------------------------------


def rgba_frames(data: bytes) -> list[bytes]:
    return [frame.convert("RGBA").tobytes() for frame in shown(data)]


def mirrored_rgba_frames(data: bytes) -> list[bytes]:
    return [frame.convert("RGBA").tobytes() for frame in seen_in_a_mirror(data)]


def timing(data: bytes) -> list[float]:
    """Milliseconds of each frame, then how often the animation is shown."""
    found = []
    with Image.open(io.BytesIO(data)) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            found.append(image.info.get("duration", 0))
        found.append(image.info.get("loop", -1))
    return found


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
@pytest.mark.parametrize("transparent", [False, True])
def test_an_animated_gif_is_mirrored_frame_by_frame(
    disposal: int, transparent: bool
) -> None:
    frames = [drawing(number) for number in range(5)]
    if transparent:
        for frame in frames:
            frame.putalpha(Image.eval(frame.getchannel("G"), lambda g: 255 * (g != 64)))
    durations = [70, 120, 50, 200, 90]
    data = saved_frames(
        frames, "GIF", disposal=disposal, duration=durations, loop=3, optimize=False
    )
    result = mirror(data)
    assert rgba_frames(result) == mirrored_rgba_frames(data)
    assert timing(result) == timing(data) == [*durations, 3]


def test_a_gif_keeps_the_palettes_of_its_frames() -> None:
    frames = [picture("P"), picture("P", seed=2)]
    frames[1].putpalette([(11 * n + 3) % 256 for n in range(48)])
    data = saved_frames(frames, "GIF", duration=100)
    assert rgba_frames(mirror(data)) == mirrored_rgba_frames(data)
    assert len(mirror(data)) < 1.5 * len(data)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    "box", [(0, 0, 10, 6), (3, 1, 4, 5), (9, 5, 1, 1), (0, 0, 60, 40)]
)
def test_a_gif_frame_is_mirrored_where_it_lies(
    box: tuple[int, int, int, int], interlaced: bool
) -> None:
    data = gif_of([gif_frame(0, 0, 10, 6), gif_frame(*box, interlaced=interlaced)])
    assert rgba_frames(mirror(data))[-1] == mirrored_rgba_frames(data)[-1]


def test_a_gif_frame_beyond_the_screen_is_mirrored_as_viewers_enlarge_it() -> None:
    data = gif_of([gif_frame(8, 2, 7, 6)])
    assert rgba_frames(mirror(data)) == mirrored_rgba_frames(data)


@pytest.mark.parametrize("transparent", [None, 1])
@pytest.mark.parametrize("interlace", [0, 1])
def test_a_still_gif_is_mirrored_exactly(
    interlace: int, transparent: int | None
) -> None:
    options = {} if transparent is None else {"transparency": transparent}
    data = saved(picture("P", (40, 30)), "GIF", interlace=interlace, **options)
    assert rgba_frames(mirror(data)) == mirrored_rgba_frames(data)
    assert opened(mirror(data)).info.get("transparency") == transparent


def test_a_gif_keeps_its_comment_and_other_extensions() -> None:
    data = saved(picture("P"), "GIF", comment=b"a comment")
    at = data.index(b"!\xfe")
    extension = b"!\xff\x0bXMP DataXMP\x03abc\x02de\0"
    result = mirror(data[:at] + extension + data[at:])
    assert opened(result).info["comment"] == b"a comment"
    assert extension in result


def test_a_gif_without_its_trailer_is_mirrored() -> None:
    data = saved(picture("P"), "GIF")
    assert rgba_frames(mirror(data[:-1])) == mirrored_rgba_frames(data)


def apng(default_image: bool = False, **options: Any) -> bytes:
    frames = [drawing(number).convert("RGBA") for number in range(5)]
    for frame in frames:
        frame.putalpha(Image.eval(frame.getchannel("R"), lambda r: 255 * (r != 192)))
    durations = [70, 120, 50, 200, 90]
    return saved_frames(
        frames,
        "PNG",
        duration=durations[default_image:],
        default_image=default_image,
        **options,
    )


@pytest.mark.parametrize("default_image", [False, True])
@pytest.mark.parametrize("blend", [0, 1])
@pytest.mark.parametrize("disposal", [0, 1, 2])
def test_an_animated_png_is_mirrored_frame_by_frame(
    disposal: int, blend: int, default_image: bool
) -> None:
    data = apng(default_image, disposal=disposal, blend=blend, loop=4)
    result = mirror(data)
    assert rgba_frames(result) == mirrored_rgba_frames(data)
    assert timing(result) == timing(data)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_animated_png_is_turned_as_its_orientation_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = apng(exif=exif)
    assert rgba_frames(mirror(data)) == mirrored_rgba_frames(data)


def test_the_frames_of_an_animated_png_may_come_in_several_chunks() -> None:
    whole = png_chunks(apng())
    sequence, split = itertools.count(), b"\x89PNG\r\n\x1a\n"
    for kind, body in whole:
        if kind == b"fdAT":
            middle = len(body) // 2
            for part in (body[4:middle], body[middle:]):
                split += png_chunk(kind, struct.pack(">I", next(sequence)) + part)
        elif kind == b"fcTL":
            split += png_chunk(kind, struct.pack(">I", next(sequence)) + body[4:])
        else:
            split += png_chunk(kind, body)
    assert rgba_frames(mirror(split)) == mirrored_rgba_frames(apng())


def test_a_frame_of_an_animated_16_bit_png_keeps_all_its_bits() -> None:
    pixels = png_samples(16, 6)
    control = struct.pack(">IIIIIHHBB", 0, 11, 9, 0, 0, 1, 10, 0, 0)
    chunks = png_chunk(b"acTL", struct.pack(">II", 1, 0)) + png_chunk(b"fcTL", control)
    result = mirror(png_of(pixels, 16, 6, chunks=chunks))
    assert png_pixels(result) == [row[::-1] for row in pixels]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        ("WEBP", {"lossless": True}, math.inf),
        ("WEBP", {"quality": 85}, 38),
        ("AVIF", {"quality": 85}, 38),
    ],
)
def test_a_film_is_mirrored_frame_by_frame(
    kind: str, options: dict[str, Any], least: float, mode: str
) -> None:
    base = photo(mode, (96, 64))
    frames = [ImageChops.offset(base, 7 * number, 0) for number in range(4)]
    durations = [70, 130, 50, 200]
    data = saved_frames(frames, kind, duration=durations, loop=3, **options)
    result = assert_close(data, least)
    assert timing(result) == timing(data)
    assert timing(result)[:-1] == durations


def test_a_webp_that_is_lossless_in_any_frame_is_saved_without_loss() -> None:
    lossy = saved(photo(size=(48, 32)), "WEBP", quality=50)
    exact = saved(picture("RGB", (48, 32)), "WEBP", lossless=True)

    def frame(data: bytes) -> bytes:
        head = bytes(6) + struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3]
        body = head + struct.pack("<I", 100)[:3] + b"\2" + data[12:]
        return struct.pack("<4sI", b"ANMF", len(body)) + body

    size = struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3]
    chunks = struct.pack("<4sI4s", b"VP8X", 10, b"\2\0\0\0") + size
    chunks += struct.pack("<4sIIH", b"ANIM", 6, 0, 0) + frame(lossy) + frame(exact)
    data = struct.pack("<4sI4s", b"RIFF", 4 + len(chunks), b"WEBP") + chunks
    assert_close(data, math.inf)


# ---- mirror: metadata ------------------------------------------------------

ORIENTED: list[tuple[str, dict[str, Any], float]] = [
    ("JPEG", {"quality": 90, "subsampling": 0}, 45),
    ("JPEG", {"quality": 90, "subsampling": 2}, 45),
    ("PNG", {}, math.inf),
    ("WEBP", {"lossless": True}, math.inf),
    ("TIFF", {}, math.inf),
    ("AVIF", {"quality": 85}, 38),
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("kind", "options", "least"), ORIENTED)
def test_an_image_is_turned_as_its_exif_orientation_says(
    kind: str, options: dict[str, Any], least: float, orientation: int
) -> None:
    data = saved(photo(), kind, exif=camera_exif(orientation), **options)
    result = assert_close(data, least)
    assert ORIENTATION not in opened(result).getexif()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_compressed_tiff_is_turned_as_its_orientation_says(orientation: int) -> None:
    tags = {ORIENTATION: orientation, ExifTags.Base.Make: "Box"}
    data = saved(picture("RGB"), "TIFF", compression="tiff_lzw", tiffinfo=tags)
    result = assert_mirrored(data)
    assert opened(result).getexif().get(ExifTags.Base.Make) == "Box"


def test_a_compressed_tiff_keeps_its_exif_data() -> None:
    """Pillow cannot write such a file; it is put together here."""
    data = saved(picture("RGB"), "TIFF", compression="tiff_lzw")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = data[start + 2 : start + 2 + 12 * count]
    data += bytes(len(data) % 2)
    # A sub-directory with one entry: DateTimeOriginal, 20 bytes.
    text = b"2024:02:29 12:34:56\0"
    sub = struct.pack("<HHHII", 1, 0x9003, 2, len(text), len(data) + 18) + bytes(4)
    pointer = struct.pack("<HHII", ExifTags.IFD.Exif, 4, 1, len(data))
    data += sub + text
    start = len(data)
    data += struct.pack("<H", count + 1) + entries + pointer + bytes(4)
    data = data[:4] + struct.pack("<I", start) + data[8:]
    tags = camera_tags(assert_mirrored(data))["exif"]
    assert tags == {ExifTags.Base.DateTimeOriginal: "2024:02:29 12:34:56"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("of_type", "kept"), [(7, True), (4, False)])
def test_a_tiff_keeps_iptc_data_whole_or_not_at_all(of_type: int, kept: bool) -> None:
    """Pillow reads only the first number of IPTC data that are said to be numbers."""
    iptc = b"\x1c\x02\x5a\0\6Berlin\0"
    data = saved(picture("RGB"), "TIFF", tiffinfo={ExifTags.Base.IPTCNAA: iptc})
    entry = struct.pack("<HHI", ExifTags.Base.IPTCNAA, 7, 12)
    assert entry in data
    count = len(iptc) // (4 if of_type == 4 else 1)
    said = struct.pack("<HHI", ExifTags.Base.IPTCNAA, of_type, count)
    result = mirror(data.replace(entry, said))
    assert (iptc in result) == kept
    assert (ExifTags.Base.IPTCNAA in opened(result).getexif()) == kept


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_other_exif_data_stay(kind: str, orientation: int) -> None:
    data = saved(picture("RGB"), kind, exif=camera_exif(orientation))
    result = mirror(data)
    assert camera_tags(result) == camera_tags(data)
    assert camera_tags(result)["make"] == "Box"


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_maker_note_stays_in_its_place_with_its_type(order: str) -> None:
    """Maker notes point into the EXIF data by offsets that nobody else knows."""

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(order + "HHI4s", tag, kind, count, value)

    long, short = order + "I", order + "H2x"
    note = b"a note that is 25 bytes.."
    exif = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(long, 8)
    exif += struct.pack(order + "H", 2)
    exif += entry(ORIENTATION, 3, 1, struct.pack(short, 6))
    exif += entry(ExifTags.IFD.Exif, 4, 1, struct.pack(long, 38)) + bytes(4)
    exif += struct.pack(order + "H", 1)
    exif += entry(ExifTags.Base.MakerNote, 7, len(note), struct.pack(long, 56))
    exif += bytes(4) + note
    result = opened(mirror(saved(picture("RGB"), "JPEG", exif=b"Exif\0\0" + exif)))
    kept = result.info["exif"].removeprefix(b"Exif\0\0")
    assert kept[38:] == exif[38:]
    assert kept[8:10] == struct.pack(order + "H", 1)


def test_the_thumbnail_which_is_not_mirrored_goes() -> None:
    thumbnail = saved(picture("RGB"), "JPEG")
    exif = camera_exif(6).removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[exif[:2]]
    (count,) = struct.unpack_from(order + "H", exif, 8)
    next_directory = 10 + 12 * count
    entries = struct.pack(
        order + "HHHIIHHII",
        *(2, 0x201, 4, 1, len(exif) + 30),
        *(0x202, 4, 1, len(thumbnail)),
    )
    exif = (
        exif[:next_directory]
        + struct.pack(order + "I", len(exif))
        + exif[next_directory + 4 :]
        + entries
        + bytes(4)
        + thumbnail
    )
    data = saved(picture("RGB"), "JPEG", exif=b"Exif\0\0" + exif)
    assert opened(data).getexif().get_ifd(ExifTags.IFD.IFD1)
    result = mirror(data)
    assert not opened(result).getexif().get_ifd(ExifTags.IFD.IFD1)
    assert camera_tags(result) == camera_tags(data)


def test_exif_data_that_hold_nothing_but_the_orientation_go() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    assert "exif" not in opened(mirror(saved(picture("RGB"), "PNG", exif=exif))).info


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"garbage",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\xff\xff\xff\x7f",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04text\0\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06",
        b"II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\1\0\0\0\x1a\0\0\0\0\0\0\0" + bytes(8),
    ],
)
def test_a_photo_with_unreadable_exif_data_is_mirrored(exif: bytes, kind: str) -> None:
    mark = b"Exif\0\0" if kind == "JPEG" else b""
    plain = saved(picture("RGB"), kind, lossless=True)
    data = saved(picture("RGB"), kind, lossless=True, exif=mark + exif)
    (frame,) = shown(mirror(data))
    assert frame.tobytes() == shown(mirror(plain))[0].tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_colour_profile_stays(kind: str) -> None:
    data = saved(picture("RGB"), kind, icc_profile=ICC)
    assert opened(mirror(data)).info["icc_profile"] == ICC


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP"])
def test_the_resolution_stays(kind: str) -> None:
    data = saved(picture("RGB"), kind, dpi=(300, 300))
    assert opened(mirror(data)).info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_a_jpeg_keeps_its_comment() -> None:
    data = saved(picture("RGB"), "JPEG", comment=b"a comment")
    assert opened(mirror(data)).info["comment"] == b"a comment"


@pytest.mark.parametrize("iptc", [b"\x1c\x02\x5a\0\6Berlin", b"\x1c\x02\x5a\0\3Ulm"])
def test_a_jpeg_keeps_its_iptc_data_but_no_other_photoshop_data(iptc: bytes) -> None:
    blocks = b"Photoshop 3.0\0"
    for number, data in {0x040C: b"thumbnail", 0x0404: iptc}.items():
        blocks += struct.pack(">4sHHI", b"8BIM", number, 0, len(data))
        blocks += data + bytes(len(data) % 2)
    segment = b"\xff\xed" + struct.pack(">H", len(blocks) + 2) + blocks
    result = mirror(saved(picture("RGB"), "JPEG", extra=segment))
    assert opened(result).info["photoshop"] == {0x0404: iptc}


def with_xmp(kind: str, xmp: bytes, **options: Any) -> bytes:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    elif kind == "TIFF":
        options["tiffinfo"] = {ExifTags.Base.XMLPacket: xmp}
    else:
        options["xmp"] = xmp
    return saved(picture("RGB"), kind, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_xmp_data_stay(kind: str) -> None:
    xmp = XMP % b""
    assert opened(mirror(with_xmp(kind, xmp))).info["xmp"] == xmp


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_xmp_orientation_says(
    kind: str, orientation: int
) -> None:
    xmp = XMP % b'tiff:Orientation="%d"' % orientation
    result = assert_mirrored(with_xmp(kind, xmp, lossless=True))
    assert opened(result).info["xmp"] == XMP % b""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    "form",
    [
        b'tiff:Orientation="6"',
        b"tiff:Orientation='6'",
        b"tiff:Orientation = '6'",
        b"><tiff:Orientation>6</tiff:Orientation></rdf:Description><rdf:x",
    ],
)
def test_xmp_does_not_repeat_the_orientation_that_exif_gave(
    form: bytes, kind: str
) -> None:
    xmp = XMP % form
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    if kind == "TIFF":
        tags = {ORIENTATION: 6, ExifTags.Base.XMLPacket: xmp}
        data = saved(picture("RGB"), kind, tiffinfo=tags)
    else:
        data = with_xmp(kind, xmp, exif=exif)
    result = opened(mirror(data))
    assert b"Orientation" not in result.info["xmp"]
    assert b"Box" in result.info["xmp"]
    assert result.size == SIZE[::-1]


# ---- mirror: what is no image ----------------------------------------------

STRANGERS = {
    "nothing at all": b"",
    "an HTML page": b"\n<!DOCTYPE html><html><title>404</title></html>",
    "text that begins 'Not found'": b"Not found",
    "text that begins 'Datei nicht gefunden": "Datei nicht gefunden — ☃".encode() * 9,
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3",
    "an EPS or PostScript document": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "an SVG drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "an XML or SVG document": b'<?xml version="1.0"?><svg/>',
    "a ZIP archive": b"PK\3\4" + bytes(30),
    "gzip data": b"\x1f\x8b\x08" + bytes(30),
    "JSON": b'{"error": "not found"}',
    "a 'heic' file (HEIC, or a film?)": b"\0\0\0\x18ftypheic" + bytes(40),
    "a damaged AVIF image": b"\0\0\0\x18ftypavif" + bytes(40),
    "a damaged JPEG image": b"\xff\xd8\xff\xe0" + bytes(9),
    "a damaged PNG image": b"\x89PNG\r\n\x1a\n" + bytes(9),
    "a damaged GIF image": b"GIF89a",
    "a damaged TIFF image, or one of an unusual kind": b"II*\0\x08" + bytes(9),
    "32 bytes of an unknown": bytes(range(128, 160)),
    "12 bytes of an unknown": bytes(12),
}


@pytest.mark.parametrize(("words", "data"), STRANGERS.items(), ids=STRANGERS)
def test_what_is_no_image_is_called_by_its_name(words: str, data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        mirror(data)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI", "DDS", "PDF"])
def test_formats_that_are_not_meant_for_strangers_are_never_opened(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[object] = []
    for owner, name in {
        EpsImagePlugin: "Ghostscript",
        EpsImagePlugin.EpsImageFile: "_open",
    }.items():
        monkeypatch.setattr(owner, name, lambda *arguments: run.append(arguments))
    with pytest.raises(ImageError, match="not an image that can be mirrored"):
        mirror(saved(picture("RGB", (16, 16)), kind))
    assert run == []


SAMPLES: dict[str, Callable[[], bytes]] = {
    "avif": lambda: saved(photo(), "AVIF"),
    "avif film": lambda: saved_frames([photo(), photo().rotate(9)], "AVIF"),
    "bmp": lambda: saved(picture("RGB"), "BMP"),
    "gif": lambda: saved(picture("P"), "GIF"),
    "gif film": lambda: saved_frames([drawing(n) for n in range(3)], "GIF"),
    "jpeg": lambda: saved(photo(), "JPEG", exif=camera_exif(6), icc_profile=ICC),
    "jpeg progressive": lambda: saved(photo("CMYK"), "JPEG", progressive=True),
    "mpo": lambda: saved_frames([photo(), photo()], "MPO"),
    "jp2": lambda: saved(picture("RGB"), "JPEG2000"),
    "j2k": lambda: saved(picture("RGB"), "JPEG2000", no_jp2=True),
    "png": lambda: saved(picture("RGB"), "PNG", exif=camera_exif(6)),
    "png interlaced": lambda: png_of(png_samples(16, 6), 16, 6, True),
    "apng": apng,
    "ppm": lambda: saved(picture("RGB"), "PPM"),
    "pfm": lambda: saved(picture("F"), "PPM"),
    "tiff": lambda: saved(picture("RGB"), "TIFF", exif=camera_exif(6)),
    "tiff lzw": lambda: saved(picture("RGB"), "TIFF", compression="tiff_lzw"),
    "tiff pages": lambda: saved_frames([picture("RGB"), picture("1")], "TIFF"),
    "webp": lambda: saved(photo(), "WEBP", exif=camera_exif(6)),
    "webp lossless": lambda: saved(picture("RGBA"), "WEBP", lossless=True),
    "webp film": lambda: saved_frames([photo(), photo().rotate(9)], "WEBP"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("sample", SAMPLES)
def test_a_truncated_image_is_refused(sample: str, part: float) -> None:
    data = SAMPLES[sample]()
    if sample == "mpo":  # only its first photo is of interest
        data = data[: len(data) // 2]
    with pytest.raises(ImageError) as caught:
        mirror(data[: int(len(data) * part)])
    words = str(caught.value)
    assert words.startswith(("a damaged", "not an image that can be mirrored, but"))
    assert "unpack" not in words
    assert "index" not in words


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sample", SAMPLES)
def test_damage_leads_to_an_image_error_or_to_an_image(sample: str) -> None:
    source, chance = SAMPLES[sample](), random.Random(sample)
    for _ in range(25):
        data = bytearray(source)
        for _ in range(chance.choice([1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(ImageError):
            opened(mirror(bytes(data)))


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_decompression_bomb_is_refused_at_the_level_of_a_warning(
    sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SAMPLES[sample]()
    width, height = opened(data).size
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match="too large an image"):
            mirror(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_an_animation_with_too_many_pixels_in_all_its_frames_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [picture("RGB", (40, 30), number) for number in range(5)]
    data = saved_frames(frames, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 * 2)
    with pytest.raises(ImageError, match="too large an animation"):
        mirror(data)


def test_a_tiff_with_one_large_page_among_small_ones_is_mirrored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = [picture("RGB", (40, 30)), *(picture("L", (5, 4)) for _ in range(6))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30)
    assert_mirrored(saved_frames(pages, "TIFF"))


def test_gif_frames_far_beyond_the_screen_count_with_all_their_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = gif_of([gif_frame(0, 0, 30, 20)] * 4, size=(1, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 20)
    with pytest.raises(ImageError, match="too large an animation"):
        mirror(data)


def test_an_animated_png_cannot_hide_how_many_frames_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = [picture("RGB", (40, 30), number) for number in range(5)]
    data = saved_frames(frames, "PNG")
    count = png_chunk(b"acTL", struct.pack(">II", 5, 0))
    assert count in data
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30)
    with pytest.raises(ImageError, match="too large an animation"):
        mirror(data.replace(count, b""))
    with pytest.raises(ImageError, match="frames missing or out of order"):
        mirror(data.replace(count, png_chunk(b"acTL", struct.pack(">II", 1, 0))))


def test_a_png_with_an_unknown_chunk_that_its_pixels_depend_on_is_refused() -> None:
    data = saved(picture("RGB"), "PNG")
    at = data.index(b"IDAT") - 4
    with pytest.raises(ImageError, match="it has a chunk b'ABCD'"):
        mirror(data[:at] + png_chunk(b"ABCD", b"") + data[at:])


@pytest.mark.parametrize("missing", [b"fcTL", b"fdAT", b"IDAT"])
def test_a_png_with_a_part_missing_is_refused(missing: bytes) -> None:
    chunks = png_chunks(apng())
    gap = max(n for n, (kind, _) in enumerate(chunks) if kind == missing)
    del chunks[gap]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks))
    with pytest.raises(ImageError):
        mirror(data)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"fcTL", b"fdAT"])
def test_a_png_with_a_wrong_checksum_is_refused(kind: bytes) -> None:
    frames = [picture("P", seed=number) for number in range(3)]
    data = bytearray(saved_frames(frames, "PNG"))
    at = data.index(kind)
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length] ^= 1
    with pytest.raises(ImageError):
        mirror(bytes(data))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_that_promises_more_than_it_holds_is_refused(depth: int) -> None:
    header = struct.pack(">IIBBBBB", 9000, 9000, depth, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(99)))
    with pytest.raises(ImageError):
        mirror(b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b""))


@pytest.mark.parametrize(
    "control",
    [
        (0, 0, 0, 0),
        (40, 30, 1, 0),
        (41, 30, 0, 0),
        (39, 30, 0, 0),
        (2**31, 2**31, 0, 0),
        (40, 30, 2**32 - 1, 0),
    ],
)
def test_an_animated_png_whose_frame_control_lies_is_refused(
    control: tuple[int, int, int, int],
) -> None:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in png_chunks(apng()):
        if kind == b"fcTL" and body[:4] != bytes(4):
            body = body[:4] + struct.pack(">4I", *control) + body[20:]
        out += png_chunk(kind, body)
    with pytest.raises(ImageError):
        mirror(out)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("field", [12, 16], ids=["x", "y"])
def test_a_frame_of_an_animated_png_beyond_its_edges_is_refused(
    field: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    chunks = png_chunks(apng(exif=exif))
    last = max(n for n, (kind, _) in enumerate(chunks) if kind == b"fcTL")
    body = bytearray(chunks[last][1])
    struct.pack_into(">I", body, field, 45)
    chunks[last] = b"fcTL", bytes(body)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks))
    with pytest.raises(ImageError, match="a frame beyond its edges"):
        mirror(data)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_gif_frame_without_pixels_does_no_harm(size: tuple[int, int]) -> None:
    empty = b"," + struct.pack("<HHHHB", 2, 1, *size, 0) + b"\x08\x02\x00\x03\0"
    data = gif_of([gif_frame(0, 0, 10, 6), empty])
    with contextlib.suppress(ImageError):
        assert rgba_frames(mirror(data))[0] == mirrored_rgba_frames(data)[0]


def test_a_tiff_whose_directories_form_a_loop_ends() -> None:
    data = bytearray(saved(picture("L"), "TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    struct.pack_into("<I", data, directory + 2 + 12 * count, directory)
    (frame,) = shown(mirror(bytes(data)))
    assert frame.tobytes() == ImageOps.mirror(picture("L")).tobytes()


def tiff_16_bit(bands: int) -> bytes:
    width, height, photometric = 3, 2, {3: 2, 4: 5}[bands]
    strip = bytes(range(width * height * bands * 2))
    depths = struct.pack("<4H", 16, 16, 16, 16)[: 2 * bands]
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, bands, 8),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 16),
        (277, 3, 1, bands),
        (278, 3, 1, height),
        (279, 4, 1, len(strip)),
    ]
    head = struct.pack("<2sHI", b"II", 42, 16 + len(strip)) + depths.ljust(8, b"\0")
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + strip + directory + bytes(4)


def jpeg2000_16_bit() -> bytes:
    data = bytearray(saved(picture("RGB"), "JPEG2000", no_jp2=True))
    for component in range(3):  # the depth in the SIZ marker, less one
        assert data[42 + 3 * component] == 7
        data[42 + 3 * component] = 15
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"P6 1 1 65535\n\0\1\0\2\0\3",
        b"P6 1 1 4095\n\0\1\0\2\0\3",
        b"P3 1 1 1000\n1 2 3\n",
        tiff_16_bit(3),
        tiff_16_bit(4),
        jpeg2000_16_bit(),
    ],
)
def test_depth_that_cannot_be_written_back_is_refused_rather_than_lost(
    data: bytes,
) -> None:
    assert opened(data).mode in ("RGB", "CMYK")
    with pytest.raises(ImageError, match="16 bits a channel"):
        mirror(data)


# ---- the chain -------------------------------------------------------------


class Service:
    """The embedded server, with a listing and answers of the test's own.

    `requests` is what the server was asked for, as it came over the wire.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.listing: bytes | None = None
        self.kind = "text/plain; charset=utf-8"
        self.answers: dict[str, Callable[[ImageHandler], None]] = {}
        self.requests: list[str] = []
        self.clients: set[object] = set()

    def add(self, *names: str) -> None:
        for name in names:
            self.folder.joinpath(name).write_bytes(saved(picture("RGB"), "PNG"))

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def downloads(self) -> list[str]:
        return [r for r in self.requests if r.startswith("GET /images/") and r[12:]]

    def uploads(self) -> int:
        return sum(request.startswith("POST") for request in self.requests)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service(tmp_path / "images")
    service.folder.mkdir()

    class Handler(ImageHandler):
        def deliver(self) -> None:
            service.requests.append(f"{self.command} {self.path}")
            service.clients.add(self.client_address)
            if self.path in service.answers:
                return service.answers[self.path](self)
            if self.path.rstrip("/") == "/images" and service.listing is not None:
                return self.send_body(http.HTTPStatus.OK, service.kind, service.listing)
            return super().deliver()

        def receive(self) -> None:
            service.requests.append(f"{self.command} {self.path}")
            super().receive()

    monkeypatch.setattr(mirror_images, "ImageHandler", Handler)
    with ImageServer(service.folder).running() as url:
        service.url = url
        yield service


def run(service: Service, *options: str) -> int:
    return mirror_images.main([service.url, "--retries", "0", *options])


def report_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: line for line in lines}


def test_every_image_of_the_list_is_mirrored_and_uploaded(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"a.jpg": "JPEG", "b.png": "PNG", "c.gif": "GIF", "d.webp": "WEBP"}
    for name, kind in kinds.items():
        service.folder.joinpath(name).write_bytes(saved(photo(), kind))
    assert run(service) == 0
    assert service.names() == {*kinds, *("mirrored_" + name for name in kinds)}
    for name in kinds:
        original = service.folder.joinpath(name).read_bytes()
        assert service.folder.joinpath("mirrored_" + name).read_bytes() == mirror(
            original
        )
    assert capsys.readouterr().out.startswith("4 mirrored, 0 failed, 0 skipped, ")


@pytest.mark.parametrize(
    "listing",
    [
        b"a.png\nb.png\n",
        b"a.png\nb.png",
        b"a.png\r\nb.png\r\n",
        b"\xef\xbb\xbfa.png\nb.png\n",
        b"\n\na.png\n  \n\r\nb.png\n\n",
        b"a.png\nb.png\na.png\nb.png\n",
    ],
)
def test_the_listing_may_be_written_in_many_ways(
    service: Service, listing: bytes
) -> None:
    service.add("a.png", "b.png")
    service.listing = listing
    assert run(service) == 0
    assert sorted(service.downloads()) == ["GET /images/a.png", "GET /images/b.png"]
    assert service.names() == {"a.png", "b.png", "mirrored_a.png", "mirrored_b.png"}


@pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream"])
def test_a_listing_of_plain_text_may_have_several_types(
    service: Service, kind: str
) -> None:
    service.add("a.png")
    service.listing, service.kind = b"a.png\n", kind
    assert run(service) == 0


@pytest.mark.parametrize(
    ("listing", "kind"),
    [
        (b"<!DOCTYPE html><html></html>", "text/html"),
        (b"\n  <!doctype html><html></html>", "text/plain"),
        (b"\xef\xbb\xbf<HTML></HTML>", "text/plain"),
        (b"a.png\n", "text/html; charset=utf-8"),
        (b"<?xml version='1.0'?><a/>", "text/plain"),
        (b'["a.png"]', "application/json"),
        (saved(picture("L"), "PNG"), "image/png"),
        (saved(picture("L"), "PNG"), "text/plain"),
        (b"\xff\xfea\0.\0p\0n\0g\0", "text/plain"),
    ],
)
def test_a_listing_that_is_no_plain_text_ends_the_run(
    service: Service, listing: bytes, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service.listing, service.kind = listing, kind
    assert run(service) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "plain text, one name a line" in written.err
    assert written.err.count("\n") == 1
    assert service.downloads() == []


HOSTILE = [
    *("..", ".", "../secret.png", "a/b.png", "/etc/passwd", "a\\b.png", "..\\c.png"),
    *("http://example.com/a.png", "//example.com/a.png", "tab\there.png"),
    *("nul\0.png", "escape\x1b[2J.png", "c1\x85.png", "cr\rin.png"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_fails_and_is_never_requested(
    service: Service, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.add("good.png")
    service.listing = f"{name}\ngood.png\n".encode()
    report = tmp_path / "report.jsonl"
    assert run(service, "--report", str(report)) == 1
    assert service.downloads() == ["GET /images/good.png"]
    assert report_of(report)[name]["status"] == "failed"
    assert report_of(report)[name]["attempts"] == 0
    assert report_of(report)["good.png"]["status"] == "mirrored"
    written = capsys.readouterr().err.strip()
    assert written.startswith("ERROR ")
    assert written.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("with space.png", "ünïcode ☃.png", "50%.png", "%2e%2e.png", "a%2Fb.png"),
        *("what?.png", "one#two.png", "a&b=c;d.png", "'\".png", "+.png", "...png"),
        *(" leading.png", "a:b.png", "http:c.png", "[x].png", "~.png", "-v.png"),
    ],
)
def test_every_other_name_arrives_as_it_is(service: Service, name: str) -> None:
    service.add(name)
    service.listing = name.encode()
    assert run(service) == 0
    assert service.names() == {name, "mirrored_" + name}


def test_what_is_mirrored_already_is_skipped(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.add("a.png", "mirrored_a.png", "b.png")
    report = tmp_path / "report.jsonl"
    assert run(service, "--report", str(report)) == 0
    assert service.downloads() == ["GET /images/b.png"]
    assert report_of(report)["a.png"]["status"] == "skipped"
    assert "mirrored_a.png" not in report_of(report)
    assert capsys.readouterr().out.startswith("1 mirrored, 0 failed, 1 skipped, ")


def test_running_again_finishes_what_was_left_and_then_has_nothing_to_do(
    service: Service,
) -> None:
    service.add("a.png", "b.png")
    service.folder.joinpath("c.png").write_bytes(b"broken")
    assert run(service) == 1
    service.add("c.png")
    service.requests.clear()
    assert run(service) == 0
    assert service.downloads() == ["GET /images/c.png"]
    service.requests.clear()
    assert run(service) == 0
    assert service.requests == ["GET /images/"]


def test_again_mirrors_what_is_mirrored_already(service: Service) -> None:
    service.add("a.png", "mirrored_a.png")
    assert run(service, "--again") == 0
    assert service.downloads() == ["GET /images/a.png"]
    result = service.folder.joinpath("mirrored_a.png").read_bytes()
    assert result == mirror(service.folder.joinpath("a.png").read_bytes())


def test_another_prefix_may_be_chosen(service: Service) -> None:
    service.add("a.png", "mirrored_a.png")
    assert run(service, "--prefix", "flip-") == 0
    assert service.names() == {
        *("a.png", "mirrored_a.png", "flip-a.png", "flip-mirrored_a.png")
    }


def test_the_empty_prefix_overwrites_and_skips_nothing(service: Service) -> None:
    service.add("a.png", "mirrored_a.png")
    original = service.folder.joinpath("a.png").read_bytes()
    assert run(service, "--prefix", "") == 0
    assert service.names() == {"a.png", "mirrored_a.png"}
    assert len(service.downloads()) == 2
    assert service.folder.joinpath("a.png").read_bytes() == mirror(original)


@pytest.mark.parametrize("prefix", ["../", "a/", "\\", "new\nline"])
def test_a_prefix_that_leads_elsewhere_is_refused(
    service: Service, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service, "--prefix", prefix) == 2
    assert "--prefix" in capsys.readouterr().err
    assert service.requests == []


@pytest.mark.parametrize(
    ("ending", "asked"),
    [
        ("/images/", ["GET /images/", "GET /images/a.png", "POST /images/"]),
        ("/images", ["GET /images", "GET /images/a.png", "POST /images"]),
        (
            "/images/?key=1&b=%2F",
            [
                "GET /images/?key=1&b=%2F",
                "GET /images/a.png?key=1&b=%2F",
                "POST /images/?key=1&b=%2F",
            ],
        ),
        (
            "/images?k=/",
            ["GET /images?k=/", "GET /images/a.png?k=/", "POST /images?k=/"],
        ),
    ],
)
def test_the_url_is_used_as_it_is_given(
    service: Service, ending: str, asked: list[str]
) -> None:
    service.add("a.png")
    url = service.url.removesuffix("/images/") + ending
    assert mirror_images.main([url]) == 0
    assert service.requests == asked


def test_one_bad_image_never_stops_the_others(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.add(*(f"{number}.png" for number in range(6)))
    service.folder.joinpath("2.png").write_bytes(b"<html>oops</html>")
    service.folder.joinpath("4.png").write_bytes(b"")
    service.listing = b"0.png\n1.png\n2.png\ngone.png\n3.png\n4.png\n5.png\n"
    report = tmp_path / "report.jsonl"
    assert run(service, "--report", str(report), "--chains", "2") == 1
    told = report_of(report)
    failed = {name for name, line in told.items() if line["status"] == "failed"}
    assert failed == {"2.png", "4.png", "gone.png"}
    assert "an HTML page" in told["2.png"]["error"]
    assert "0 bytes" in told["4.png"]["error"]
    assert told["gone.png"]["error"].startswith("404 ")
    assert service.uploads() == 4
    assert capsys.readouterr().out.startswith("4 mirrored, 3 failed, 0 skipped, ")


def test_the_report_tells_of_every_image(service: Service, tmp_path: Path) -> None:
    service.add("a.png", "b.png", "mirrored_b.png")
    report = tmp_path / "report.jsonl"
    assert run(service, "--report", str(report)) == 0
    line = report_of(report)["a.png"]
    assert list(line) == [
        *("name", "status", "bytes_in", "bytes_out", "seconds", "attempts", "error")
    ]
    assert line["status"] == "mirrored"
    assert line["bytes_in"] == service.folder.joinpath("a.png").stat().st_size
    result = service.folder.joinpath("mirrored_a.png")
    assert line["bytes_out"] == result.stat().st_size
    assert line["attempts"] == 2
    assert line["error"] is None
    assert report_of(report)["b.png"]["error"] == "already mirrored"


def test_an_empty_listing_is_a_run_in_which_all_went_well(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service) == 0
    assert capsys.readouterr().out.startswith("0 mirrored, 0 failed, 0 skipped, ")


def test_a_download_that_announces_too_much_is_not_begun(service: Service) -> None:
    service.add("small.png")
    size = service.folder.joinpath("small.png").stat().st_size
    read = []

    def announce(handler: ImageHandler) -> None:
        handler.close_connection = True
        handler.send_head(http.HTTPStatus.OK, "image/png", 10**12)
        handler.wfile.flush()
        read.append(handler.rfile.read(1))  # nothing, when the client has gone

    service.answers["/images/large.png"] = announce
    service.listing = b"large.png\nsmall.png\n"
    assert run(service, "--max-bytes", str(size)) == 1
    assert read == [b""]
    assert service.names() == {"small.png", "mirrored_small.png"}


def test_a_download_of_unknown_length_is_cut_off(
    service: Service, tmp_path: Path
) -> None:
    sent = []

    def pour(handler: ImageHandler) -> None:
        handler.close_connection = True
        handler.send_response(http.HTTPStatus.OK)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(bytes(10**6))
                sent.append(10**6)

    service.answers["/images/endless.png"] = pour
    service.listing = b"endless.png\n"
    report = tmp_path / "report.jsonl"
    assert run(service, "--max-bytes", "2MB", "--report", str(report)) == 1
    assert report_of(report)["endless.png"]["error"] == "larger than 2.0 MB"
    assert sum(sent) < 10**8


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500000", 500_000), ("64MB", 64_000_000), ("1.5GB", 1_500_000_000)],
)
def test_a_size_may_be_written_as_people_write_it(text: str, size: int) -> None:
    assert mirror_images.byte_count(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "many", "1TB", "", "1e9", "0.1"])
def test_an_unusable_size_is_refused(
    text: str, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service, f"--max-bytes={text}") == 2
    assert "--max-bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        *(
            ["--chains", "0"],
            ["--chains", "x"],
            ["--retries", "-1"],
            ["--timeout", "0"],
        ),
        *(["--header", "no colon"], ["--port", "-1"], ["--port", "65536"]),
        *(["--serve"], ["--unknown"], ["-v", "-q"]),
    ],
)
def test_unusable_options_are_one_line_and_status_2(
    options: list[str], service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service, *options) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert service.requests == []


@pytest.mark.parametrize("url", ["ftp://host/images/", "images/", "http://", "http:x"])
def test_a_url_that_is_not_http_is_refused(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mirror_images.main([url]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_listening_is_status_2_and_says_how_to_try_it_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/images/"
        assert mirror_images.main([url, "--retries", "0"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "python mirror_images.py --serve received/" in written.err
    assert written.err.count("\n") == 1


def test_a_listing_that_cannot_be_had_is_status_2(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    url = service.url.replace("/images/", "/pictures/")
    assert mirror_images.main([url, "--retries", "0"]) == 2
    assert "404" in capsys.readouterr().err


def test_headers_and_the_field_name_are_sent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add("a.png")
    seen: list[str | None] = []
    fields: list[bytes] = []

    def answer(handler: ImageHandler, work: Callable[[], None]) -> None:
        seen.append(handler.headers["X-Key"])
        work()

    def parse(disposition: bytes) -> str | None:
        fields.append(disposition)
        return original(disposition)

    original = mirror_images.file_name
    monkeypatch.setattr(ImageHandler, "answer", answer)
    monkeypatch.setattr(mirror_images, "file_name", parse)
    assert run(service, "--header", "X-Key: 7", "--field", "picture") == 0
    assert seen == ["7", "7", "7"]
    assert b'name="picture"; filename="mirrored_a.png"' in fields[0]


def test_a_server_error_that_passes_is_retried(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upload_images.FIRST_BACKOFF", 0.001)
    service.add("a.png")
    answers = iter([http.HTTPStatus.SERVICE_UNAVAILABLE])

    def fail_once(handler: ImageHandler) -> None:
        if status := next(answers, None):
            return handler.send_text(status, "busy")
        del service.answers["/images/a.png"]
        return handler.deliver()

    service.answers["/images/a.png"] = fail_once
    report = tmp_path / "report.jsonl"
    assert mirror_images.main([service.url, "--report", str(report)]) == 0
    assert report_of(report)["a.png"]["attempts"] == 3


@respx.mock
def test_an_answer_that_does_not_say_saved_is_a_failure(tmp_path: Path) -> None:
    url = "http://images.test/images/"
    respx.get(url).respond(200, text="a.png\n")
    respx.get(url + "a.png").respond(200, content=saved(picture("L"), "PNG"))
    respx.post(url).respond(202, text="perhaps later")
    report = tmp_path / "report.jsonl"
    assert mirror_images.main([url, "--report", str(report)]) == 1
    assert report_of(report)["a.png"]["error"] == "202 Accepted: perhaps later"


@respx.mock
def test_a_download_that_never_comes_times_out_without_stopping_others(
    tmp_path: Path,
) -> None:
    url = "http://images.test/images/"
    respx.get(url).respond(200, text="a.png\nb.png\n")
    respx.get(url + "a.png").mock(side_effect=httpx.ReadTimeout)
    respx.get(url + "b.png").respond(200, content=saved(picture("L"), "PNG"))
    saving = respx.post(url).respond(200)
    report = tmp_path / "report.jsonl"
    options = ["--retries", "0", "--timeout", "7", "--report", str(report)]
    assert mirror_images.main([url, *options]) == 1
    assert report_of(report)["a.png"]["error"] == "no answer within 7 s"
    assert report_of(report)["b.png"]["status"] == "mirrored"
    assert saving.call_count == 1


def test_each_chain_has_one_connection(service: Service) -> None:
    service.add(*(f"{number}.png" for number in range(12)))
    assert run(service, "--chains", "3") == 0
    assert len(service.clients) <= 1 + 3


def test_pixel_work_runs_on_other_threads_than_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(data: bytes) -> bytes:
        threads.append(threading.current_thread())
        return mirror(data)

    monkeypatch.setattr(mirror_images, "mirror", watched)
    service.add("a.png", "b.png")
    assert run(service) == 0
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_no_more_pixel_work_runs_at_once_than_there_are_processors(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.png" for number in range(8)]
    service.add(*names)
    lock, all_downloaded = threading.Lock(), threading.Event()
    pair = threading.Barrier(2)
    running, most, downloaded = 0, 0, 0

    def deliver(handler: ImageHandler) -> None:
        nonlocal downloaded
        with lock:
            downloaded += 1
            if downloaded == len(names):
                all_downloaded.set()
        body = saved(picture("L"), "PNG")
        handler.send_body(http.HTTPStatus.OK, "image/png", body)

    def work(data: bytes) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        pair.wait(10)
        assert all_downloaded.wait(10)
        with lock:
            running -= 1
        return data

    service.answers = {f"/images/{name}": deliver for name in names}
    monkeypatch.setattr(mirror_images, "PROCESSORS", 2)
    monkeypatch.setattr(mirror_images, "mirror", work)
    assert run(service, "--chains", "8") == 0
    assert most == 2


def test_tasks_grow_with_the_chains_and_not_with_the_listing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    async def chain(
        work: mirror_images.Mirroring, connection: Connection, name: str
    ) -> Outcome:
        nonlocal most
        await asyncio.sleep(0)  # lets all the others begin
        most = max(most, len(asyncio.all_tasks()))
        return Outcome(name, "mirrored", {"bytes_in": 1, "bytes_out": 1})

    monkeypatch.setattr(mirror_images.Mirroring, "chain", chain)
    service.listing = b"".join(b"%d.png\n" % number for number in range(2000))
    assert run(service, "--chains", "5") == 0
    assert most == 1 + 5


def test_the_url_may_come_from_the_environment(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add("a.png")
    monkeypatch.setenv("IMAGES_URL", service.url)
    assert mirror_images.main([]) == 0
    assert service.names() == {"a.png", "mirrored_a.png"}


# What starts the tests may ignore SIGINT, and children inherit that.
LAUNCHER = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def script(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script in a process of its own, for what signals do to it."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(SCRIPT), *arguments],
        cwd=SCRIPT.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_drops_what_is_in_flight_and_tells_what_was_done(
    service: Service,
) -> None:
    service.add("a.png", "b.png", "c.png", "d.png")
    asked, over = threading.Event(), threading.Event()

    def hang(handler: ImageHandler) -> None:
        asked.set()
        over.wait(60)

    service.answers["/images/c.png"] = hang
    with script(service.url, "--chains", "1") as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        # The download hangs for a minute, its time-out is half of it.
        out, err = process.communicate(timeout=15)
    over.set()
    assert process.returncode == 130, err
    assert out.startswith("2 mirrored, 0 failed, 0 skipped, 2 not tried, ")
    assert "Traceback" not in err
    assert "GET /images/d.png" not in service.requests


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'; name="filename=x.png"; filename="real.png"', "real.png"),
        (b"; filename=\"a filename*=utf-8''b.png\"", "a filename*=utf-8''b.png"),
        (b"; filename=plain.png", "plain.png"),
        (b"; filename=\"a.png\"; filename*=UTF-8''%C3%A4.png", "ä.png"),
        (b'; name="file"', None),
    ],
)
def test_the_file_name_is_looked_for_outside_of_quoted_text_only(
    disposition: bytes, name: str | None
) -> None:
    header = b"Content-Disposition: form-data" + disposition
    assert mirror_images.file_name(header) == name


def test_a_tiff_of_very_many_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_images, "MAX_PAGES", 2)
    page = Image.new("L", (3, 2))
    for count in (2, 3):
        file = io.BytesIO()
        page.save(file, "TIFF", save_all=True, append_images=[page] * (count - 1))
        if count == 2:
            assert len(shown(mirror_images.mirror(file.getvalue()))) == 2
        else:
            with pytest.raises(ImageError, match="more than 2 pages"):
                mirror_images.mirror(file.getvalue())


def test_an_image_that_does_not_fit_into_memory_stops_no_other(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service.add("a.png", "b.png")
    get = upload_images.Connection.get

    async def exhausted(self: Any, url: str, limit: int) -> tuple[str, bytes]:
        if url.endswith("a.png"):
            raise MemoryError
        return await get(self, url, limit)

    monkeypatch.setattr(upload_images.Connection, "get", exhausted)
    assert run(service, "--chains", "1") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("1 mirrored, 1 failed, ")
    assert "a.png: there is not enough memory" in captured.err


# ---- without a URL ---------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the temporary folder with the samples will be."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_without_a_url_the_chain_runs_on_an_embedded_server_and_says_so(
    samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mirror_images.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "embedded server" in lines[0]
    assert "http://127.0.0.1:" in lines[0]
    (folder,) = samples.iterdir()
    assert str(folder) in lines[-1] + lines[-2]
    assert str(folder / "side_by_side.png") in lines[-1]
    with Image.open(folder / "side_by_side.png") as sheet:
        sheet.load()


def test_the_samples_are_asymmetric_and_really_mirrored(samples: Path) -> None:
    assert mirror_images.main(["-q"]) == 0
    (folder,) = samples.iterdir()
    originals = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(("mirrored_", "side_by_side"))
    ]
    formats = set()
    for path in originals:
        data = path.read_bytes()
        formats.add(opened(data).format)
        result = shown(folder.joinpath("mirrored_" + path.name).read_bytes())
        pairs = zip(result, seen_in_a_mirror(data), shown(data), strict=True)
        for found, expected, original in pairs:
            found, expected, original = (
                image.convert("RGBA") for image in (found, expected, original)
            )
            assert decibels(found, expected) >= 38
            assert decibels(found, original) < 20
    assert formats == {"JPEG", "PNG", "GIF", "WEBP"}


def test_one_sample_has_an_orientation_one_is_transparent_and_one_moves(
    tmp_path: Path,
) -> None:
    mirror_images.draw_samples(tmp_path)
    images = [opened(path.read_bytes()) for path in tmp_path.iterdir()]
    (turned,) = (i for i in images if i.getexif().get(ORIENTATION, 1) != 1)
    upright = ImageOps.exif_transpose(turned)
    assert upright.height > upright.width
    assert any(image.mode == "RGBA" for image in images)
    assert any(getattr(image, "n_frames", 1) > 1 for image in images)


@pytest.mark.parametrize("options", [["--shard", "1/3"], ["--prefix", ""]])
def test_side_by_side_shows_the_samples_that_were_mirrored(
    samples: Path, options: list[str]
) -> None:
    assert mirror_images.main(options) == 0
    (folder,) = samples.iterdir()
    with Image.open(folder / "side_by_side.png") as sheet:
        left = sheet.crop((0, 25, 260, 150))
        right = sheet.crop((260, 25, 520, 150))
    assert left.tobytes() != right.tobytes()


def test_side_by_side_shows_the_original_at_the_left_and_its_mirror_at_the_right() -> (
    None
):
    image = Image.new("RGB", (200, 100), "#ff0000")
    image.paste("#0000ff", (100, 0, 200, 100))
    original, result = io.BytesIO(), io.BytesIO()
    image.save(original, "PNG")
    ImageOps.mirror(image).save(result, "PNG")
    pair = {"a.png": original.getvalue(), "mirrored_a.png": result.getvalue()}
    sheet = mirror_images.side_by_side([pair])
    middle = sheet.width // 2
    halves = (
        sheet.crop((0, 0, middle, sheet.height)),
        sheet.crop((middle, 0, sheet.width, sheet.height)),
    )

    def left_edge(half: Image.Image, colour: str) -> int:
        difference = ImageChops.difference(half, Image.new("RGB", half.size, colour))
        box = ImageOps.invert(difference.convert("L").point(lambda v: 255 * (v > 0)))
        found = box.getbbox()
        assert found
        return found[0]

    assert left_edge(halves[0], "#ff0000") < left_edge(halves[0], "#0000ff")
    assert left_edge(halves[1], "#0000ff") < left_edge(halves[1], "#ff0000")


# ---- the embedded server ---------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ImageServer(folder, limit=10**5).running() as url:
        yield folder, url


def exchange(url: str, request: bytes, end: bool = False) -> bytes:
    """Send bytes to the server; return all that it answers."""
    address = urllib.parse.urlsplit(url)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), 10) as connection:
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while block := connection.recv(1 << 16):
            answer += block
    return answer


def post(
    url: str, body: bytes, *headers: str, length: str | None = None, end: bool = False
) -> tuple[int, str]:
    """POST over a bare socket; return the status and the words of the answer."""
    lines = ["POST /images/ HTTP/1.1", "Host: here", "Connection: close", *headers]
    if length != "":
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    head = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
    answer = exchange(url, head + body, end)
    head, _, words = answer.rpartition(b"\r\n\r\n")
    return int(answer.split()[1]), words.decode()


def form(*parts: tuple[str, bytes], boundary: bytes = b"edge") -> bytes:
    """A form with file parts: (the Content-Disposition's parameters, content)."""
    body = b""
    for parameters, data in parts:
        body += b"--" + boundary + b"\r\nContent-Disposition: form-data; "
        body += parameters.encode("utf-8", "surrogateescape") + b"\r\n"
        body += b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


FORM = "Content-Type: multipart/form-data; boundary=edge"


def test_the_server_lists_the_images_of_the_folder_as_text(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    for name in ("b.png", "a.jpg", "ü ☃.webp", "notes.txt", ".upload-1.png"):
        folder.joinpath(name).write_bytes(b"x")
    folder.joinpath("folder.png").mkdir()
    answer = httpx.get(url)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.text == "a.jpg\nb.png\nü ☃.webp\n"
    assert httpx.get(url.rstrip("/")).text == answer.text


@pytest.mark.parametrize("name", ["a.png", "with space.png", "ü ☃.png", "50%.png"])
def test_the_server_delivers_an_image_by_its_name(
    served: tuple[Path, str], name: str
) -> None:
    folder, url = served
    folder.joinpath(name).write_bytes(b"content")
    answer = httpx.get(url + urllib.parse.quote(name, safe=""))
    assert answer.content == b"content"
    assert answer.headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("path", ["", "a.png", "missing.png"])
def test_head_answers_as_get_does_without_a_body(
    served: tuple[Path, str], path: str
) -> None:
    folder, url = served
    folder.joinpath("a.png").write_bytes(b"content")
    full = httpx.get(url + path)
    request = f"HEAD /images/{path} HTTP/1.1\r\nConnection: close\r\n\r\n"
    head, _, body = exchange(url, request.encode()).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == full.status_code
    assert b"Content-Length: %d" % len(full.content) in head
    assert body == b""


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/images/missing.png", 404),
        ("/", 404),
        ("/imagesx", 404),
        ("/images/../secret.png", 400),
        ("/images/%2e%2e%2fsecret.png", 400),
        ("/images/..%2fsecret.png", 400),
        ("/images/..%5csecret.png", 400),
        ("/images/%2fetc%2fpasswd", 400),
        ("/images//etc/passwd", 400),
        ("/images/a%00.png", 400),
        ("/images/.", 400),
        ("/images/..", 400),
        ("/images/" + "x" * 256, 400),
        ("/images/%ff.png", 404),
        ("/images/.upload-0", 400),
    ],
)
def test_a_path_that_is_no_image_of_the_folder_is_refused(
    served: tuple[Path, str], path: str, status: int
) -> None:
    folder, url = served
    folder.parent.joinpath("secret.png").write_bytes(b"hidden")
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    answer = exchange(url, request.encode())
    assert int(answer.split()[1]) == status
    assert b"hidden" not in answer


def test_a_form_is_saved(served: tuple[Path, str]) -> None:
    folder, url = served
    body = form(('name="file"; filename="a.png"', b"content"))
    assert post(url, body, FORM) == (200, "saved a.png\n")
    assert folder.joinpath("a.png").read_bytes() == b"content"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"--edge",
        b"\r\n--edg",
        b"\r\n--\r\n--\r\n",
        b"\r" * 70_000,
        bytes(range(256)) * 300,
        b"x" * (1 << 16) + b"\r\n",
    ],
)
def test_the_content_of_a_form_arrives_byte_for_byte(
    served: tuple[Path, str], content: bytes
) -> None:
    folder, url = served
    assert post(url, form(('filename="a.png"', content)), FORM)[0] == 200
    assert folder.joinpath("a.png").read_bytes() == content


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ('filename="with space.png"', "with space.png"),
        ('filename="ü ☃.png"', "ü ☃.png"),
        ('filename="quo%22te.png"', 'quo"te.png'),
        (r'filename="quo\"te.png"', 'quo"te.png'),
        ('filename="line%0D%0Abreak.png"', "line\r\nbreak.png"),
        ('filename="50%.png"', "50%.png"),
        ("filename=plain.png", "plain.png"),
        ("filename=plain.png; x=y", "plain.png"),
        ("filename*=UTF-8''%e2%98%83%20a.png", "☃ a.png"),
        ("filename=\"a.png\"; filename*=utf-8''%e2%98%83.png", "☃.png"),
        ('filename="latin-\udce9.png"', "latin-\udce9.png"),
    ],
)
def test_a_file_name_may_be_escaped_in_several_ways(
    served: tuple[Path, str], parameters: str, name: str
) -> None:
    folder, url = served
    assert post(url, form((parameters, b"content")), FORM)[0] == 200
    assert [path.name for path in folder.iterdir()] == [name]


def test_all_files_of_a_form_are_saved_and_its_other_fields_are_not(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    body = form(
        ('name="title"', b"not a file"),
        ('filename="a.png"', b"first"),
        ('name="x"', b""),
        ('filename="b.png"', b"second"),
    )
    assert post(url, b"preamble\r\n" + body + b"epilogue", FORM)[0] == 200
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"a.png": b"first", "b.png": b"second"}


def test_a_raw_body_is_saved_under_the_name_in_content_disposition(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    header = 'Content-Disposition: attachment; filename="ü.png"'
    assert post(url, b"content", "Content-Type: image/png", header)[0] == 200
    assert folder.joinpath("ü.png").read_bytes() == b"content"


def test_an_upload_replaces_what_has_its_name(served: tuple[Path, str]) -> None:
    folder, url = served
    folder.joinpath("a.png").write_bytes(b"old")
    assert post(url, form(('filename="a.png"', b"new")), FORM)[0] == 200
    assert folder.joinpath("a.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x.png", "a/b.png", "/x.png", "a\\b.png", "..\\x.png"),
        *("nul\0.png", "x" * 252 + ".png", "ü" * 126 + ".png", ".upload-x.png"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_a_name_that_leaves_the_folder_is_refused(
    served: tuple[Path, str], name: str, raw: bool
) -> None:
    folder, url = served
    before = sorted(folder.parent.rglob("*"))
    parameters = f'filename="{name}"'
    if raw:
        header = f"Content-Disposition: attachment; {parameters}"
        status, words = post(url, b"content", header)
    else:
        body = form(('filename="good.png"', b"x"), (parameters, b"content"))
        status, words = post(url, body, FORM)
    assert status == 400
    assert "name" in words
    assert sorted(folder.parent.rglob("*")) == before


def test_a_percent_sign_in_the_name_of_an_upload_is_just_that(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    assert post(url, form(('filename="..%2fx.png"', b"content")), FORM)[0] == 200
    assert [path.name for path in folder.iterdir()] == ["..%2fx.png"]


def test_the_name_of_a_folder_is_refused(served: tuple[Path, str]) -> None:
    folder, url = served
    folder.joinpath("a.png").mkdir()
    assert post(url, form(('filename="a.png"', b"content")), FORM)[0] == 409
    assert [path.name for path in folder.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ([FORM], b"", 400),
        ([FORM], b"no form at all", 400),
        ([FORM], b"--edge\r\nContent-Disposition: form-data; filename=a.png", 400),
        ([FORM], form(("filename=a.png", b"content"))[:-12], 400),
        ([FORM], form(('name="title"', b"no file")), 400),
        ([FORM], b"--edge\r\n" + b"X" * 20_000, 400),
        (["Content-Type: multipart/form-data"], form(("filename=a.png", b"x")), 400),
        (
            ["Content-Type: multipart/form-data; boundary*=utf-8''%E2%98%83"],
            form(("filename=a.png", b"x")),
            400,
        ),
        (["Content-Type: image/png"], b"content", 415),
        ([], b"content", 415),
        (["Content-Disposition: attachment"], b"content", 415),
    ],
)
def test_a_body_that_holds_no_named_file_is_refused(
    served: tuple[Path, str], headers: list[str], body: bytes, status: int
) -> None:
    folder, url = served
    answered, words = post(url, body, *headers)
    assert answered == status
    assert words.strip()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("length", "status"),
    [
        ("", 411),
        ("-1", 400),
        ("abc", 400),
        ("+5", 400),
        ("1e3", 400),
        ("5, 5", 400),
        ("9" * 30, 400),
        ("9" * 18, 413),
        ("100001", 413),
    ],
)
def test_an_unusable_length_is_refused_before_the_body_is_read(
    served: tuple[Path, str], length: str, status: int
) -> None:
    folder, url = served
    assert post(url, b"", FORM, length=length, end=True)[0] == status
    assert list(folder.iterdir()) == []


def test_a_client_that_sends_too_large_a_body_reads_the_refusal(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    # More than sockets buffer, so that it would break if nobody read it.
    body = form(('filename="a.png"', bytes(30_000_000)))
    status, words = post(url, body, FORM)
    assert (status, words) == (413, "the limit is 100000 bytes\n")
    assert list(folder.iterdir()) == []


def test_a_chunked_body_is_refused(served: tuple[Path, str]) -> None:
    folder, url = served
    chunked = b"7\r\ncontent\r\n0\r\n\r\n"
    headers = [FORM, "Transfer-Encoding: chunked"]
    status, words = post(url, chunked, *headers, length="")
    assert status == 411
    assert "chunked" in words
    assert list(folder.iterdir()) == []


def test_a_post_to_another_path_is_refused(served: tuple[Path, str]) -> None:
    folder, url = served
    assert httpx.post(url + "a.png", content=b"content").status_code == 404
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("raw", [False, True])
def test_half_an_upload_leaves_nothing_behind(
    served: tuple[Path, str], raw: bool
) -> None:
    folder, url = served
    body = form(("filename=a.png", b"x" * 90_000), ("filename=b.png", b"y"))
    header = "Content-Disposition: attachment; filename=a.png" if raw else FORM
    head = f"POST /images/ HTTP/1.1\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = exchange(url, head.encode() + body[:80_000], end=True)
    assert answer == b""
    assert list(folder.iterdir()) == []


def test_an_upload_under_way_does_not_show(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    folder.joinpath("a.png").write_bytes(b"old")
    reads, begun = 0, threading.Event()
    read = mirror_images.Body.read

    def watched(body: mirror_images.Body) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 1:
            begun.set()
        return read(body)

    monkeypatch.setattr(mirror_images.Body, "read", watched)
    address = urllib.parse.urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/images/")
        connection.putheader("Content-Length", "90000")
        connection.putheader("Content-Disposition", "attachment; filename=a.png")
        connection.endheaders(bytes(70_000))
        assert begun.wait(10)
        assert httpx.get(url).text == "a.png\n"
        assert httpx.get(url + "a.png").content == b"old"
        connection.send(bytes(20_000))
        assert connection.getresponse().status == 200
    assert folder.joinpath("a.png").read_bytes() == bytes(90_000)
    assert [path.name for path in folder.iterdir()] == ["a.png"]


def test_what_a_server_that_was_killed_left_is_cleaned_up(tmp_path: Path) -> None:
    tmp_path.joinpath(".upload-0123").write_bytes(b"half")
    tmp_path.joinpath("a.png").write_bytes(b"whole")
    with ImageServer(tmp_path).running():
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_client_that_asks_first_is_told_to_continue(
    served: tuple[Path, str],
) -> None:
    folder, url = served
    body = form(("filename=a.png", b"content"))
    answer = exchange(
        url,
        b"POST /images/ HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n"
        + f"{FORM}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body,
    )
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n")
    assert b"HTTP/1.1 200 OK" in answer
    assert folder.joinpath("a.png").read_bytes() == b"content"


def test_a_connection_serves_many_requests(served: tuple[Path, str]) -> None:
    _, url = served
    body = form(("filename=a.png", b"content"))
    upload = f"POST /images/ HTTP/1.1\r\n{FORM}\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = exchange(
        url,
        upload.encode()
        + body
        + b"HEAD /images/a.png HTTP/1.1\r\n\r\n"
        + b"GET /images/none.png HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    )
    statuses = [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 200, 404]


@pytest.mark.parametrize(
    "request_line", [b"garbage", b"GET /images/ HTTP/9.9", b"GET", b"\0\0\0"]
)
def test_garbage_does_not_harm_the_server(
    served: tuple[Path, str], request_line: bytes
) -> None:
    _, url = served
    exchange(url, request_line + b"\r\n\r\n", end=True)
    assert httpx.get(url).status_code == 200


def test_serve_runs_until_ctrl_c(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with script("--serve", str(folder), "--port", "0", "-v") as process:
        assert process.stdout
        line = process.stdout.readline()
        assert str(folder) in line
        url = next(
            word for word in line.split() if word.startswith("http://127.0.0.1:")
        )
        assert post(url, form(("filename=a.png", b"x")), FORM)[0] == 200
        assert httpx.get(url).text == "a.png\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert '"POST /images/ HTTP/1.1" 200' in err


def test_serve_does_not_log_requests_without_v(tmp_path: Path) -> None:
    with script("--serve", str(tmp_path), "--port", "0") as process:
        assert process.stdout
        url = process.stdout.readline().split(" at ")[1].split()[0]
        assert httpx.get(url).text == ""
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
    assert err == ""


def test_a_port_that_is_taken_is_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert mirror_images.main(["--serve", str(tmp_path), "--port", port]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert port in written.err
    assert written.err.count("\n") == 1


def test_a_file_cannot_be_served_as_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("file").write_text("")
    options = ["--serve", str(tmp_path / "file"), "--port", "0"]
    assert mirror_images.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1
