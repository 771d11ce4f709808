"""Tests of mirror_images.py: the pixels, the chains, the embedded server.

Every image is drawn here: small, asymmetric, and the same in every run. Viewers are
assumed to show an image as Pillow's exif_transpose returns it.
"""

import asyncio
import contextlib
import email.message
import functools
import http
import http.client
import http.server
import io
import itertools
import math
import multiprocessing
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fuzz_mirror import images, saved
from helpers import PATIENCE, read_report, running_script, write
from PIL import (
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    ImageDraw,
    ImageFilter,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)
from pytest import MonkeyPatch

import mirror_images
from mirror_images import ImageHandler, ImageServer, mirror
from upload_images import Client, ImageError

table = pytest.mark.parametrize
Capture = pytest.CaptureFixture[str]
Options = dict[str, Any]
Box = tuple[int, int, int, int]  # left, top, width, height

SCRIPT = Path(mirror_images.__file__)
IMAGES = images()  # one in each format and variant
SIZE = (29, 18)
ORIENTATION = ExifTags.Base.Orientation
ORIENTATIONS = range(1, 9)


# ---- what to mirror --------------------------------------------------------


def picture(mode: str, size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Pixels in a pattern that never repeats."""
    if mode in ("1", "I", "F"):
        return picture("L", size, seed).convert(mode, dither=Image.Dither.NONE)
    width, height = size
    pixel_size = 2 if mode.startswith("I;16") else Image.getmodebands(mode)
    samples = [
        (41 * seed + (5 + 2 * seed) * x + (11 + seed) * y + x * y) % 256
        for y in range(height)
        for x in range(width * pixel_size)
    ]
    if mode == "P":
        samples = [sample // 16 for sample in samples]
    image = Image.frombytes(mode, size, bytes(samples))
    if mode == "P":
        image.putpalette([(7 + 4 * seed) * n % 256 for n in range(48)])
    return image


@functools.cache
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


def drawing(number: int, *, transparent: bool = False) -> Image.Image:
    """A frame of an animation with little motion, so that only parts are stored."""
    image = Image.new("RGB", (40, 30), "#204060")
    draw = ImageDraw.Draw(image)
    draw.polygon([(2, 28), (9, 12), (17, 25)], "#c0a020")
    draw.rectangle((5 * number, 3 + number, 6 + 5 * number, 7), "#e03010")
    if transparent:
        image.putalpha(image.getchannel("G").point(lambda green: 255 * (green != 64)))
    return image


def tiff_of(pages: Iterable[tuple[Image.Image, Options]]) -> bytes:
    """A TIFF whose pages have options of their own."""
    file = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(file) as writer:
        for page, options in pages:
            page.save(writer, "TIFF", **options)
            writer.newFrame()
    return file.getvalue()


def relabelled(data: bytes, before: Sequence[int], after: Sequence[int]) -> bytes:
    """A TIFF with an entry replaced: a tag, a type, a count, and perhaps a value."""
    old, new = (struct.pack("<HHII"[: 1 + len(e)], *e) for e in (before, after))
    assert data.count(old) == 1
    return data.replace(old, new)


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


def timing(data: bytes) -> list[float]:
    """Milliseconds of each frame, then how often the animation is shown."""
    frames = shown(data)
    durations = [frame.info.get("duration", 0) for frame in frames]
    return [*durations, frames[0].info.get("loop", -1)]


def decibels(one: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two images of one size and mode."""
    assert (one.size, one.mode) == (other.size, other.mode)
    if one.mode == "RGBA":  # ignore pixels hidden by transparency
        grey = Image.new("RGBA", one.size, "#808080")
        one, other = (Image.alpha_composite(grey, image) for image in (one, other))
    histogram = ImageChops.difference(one, other).histogram()
    total = sum(count * (n % 256) ** 2 for n, count in enumerate(histogram))
    return 10 * math.log10(255**2 * sum(histogram) / total) if total else math.inf


def pixels(image: Image.Image) -> tuple[object, ...]:
    palette = image.getpalette("RGBA") if image.mode == "P" else None
    return image.mode, image.size, palette, image.tobytes()


def assert_mirrored(data: bytes, least: float = math.inf) -> bytes:
    """Mirror `data`; assert that all its frames are exact, or have `least` dB."""
    result = mirror(data)
    for frame, expected in zip(shown(result), seen_in_a_mirror(data), strict=True):
        if least < math.inf:
            assert decibels(frame, expected) >= least
        else:
            assert pixels(frame) == pixels(expected)
    assert opened(result).format == opened(data).format
    assert timing(result) == timing(data)
    return result


# ---- mirror: stills --------------------------------------------------------

EXACT = [
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("JPEG2000", m, {}) for m in ("L", "LA", "RGB", "RGBA", "I;16", "CMYK")),
    *(("JPEG2000", m, {"no_jp2": True}) for m in ("L", "LA", "RGB", "RGBA", "I;16")),
    *(("PNG", m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I", "F")),
    *(("WEBP", m, {"lossless": True}) for m in ("RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")),
    *(("TIFF", m, {}) for m in ("CMYK", "YCbCr", "LAB", "I", "I;16", "I;16B", "F")),
    *(
        ("TIFF", mode, {"compression": method})
        for mode in ("1", "L", "P", "RGB", "I;16")
        for method in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    ),
    ("TIFF", "1", {"compression": "group4"}),
]


@table(("format", "mode", "options"), EXACT)
def test_a_lossless_image_stays_exact(format: str, mode: str, options: Options) -> None:
    assert_mirrored(saved(format, picture(mode), **options))


@table("size", [(1, 1), (1, 7), (7, 1)])
@table("format", ["BMP", "GIF", "JPEG2000", "PNG", "PPM", "TIFF"])
def test_any_size_is_mirrored(format: str, size: tuple[int, int]) -> None:
    assert_mirrored(saved(format, picture("RGB", size)))


@table("progressive", [False, True])
@table(
    ("mode", "sampling"), [("L", -1), ("RGB", 0), ("RGB", 1), ("RGB", 2), ("CMYK", -1)]
)
def test_a_jpeg_keeps_its_tables_subsampling_and_progressive_flag(
    mode: str, sampling: int, progressive: bool
) -> None:
    options = {"quality": 83, "subsampling": sampling, "progressive": progressive}
    data = saved("JPEG", photo(mode), **options)
    source, result = opened(data), opened(assert_mirrored(data, 45))
    assert isinstance(source, JpegImagePlugin.JpegImageFile)
    assert isinstance(result, JpegImagePlugin.JpegImageFile)
    assert result.quantization == source.quantization
    assert JpegImagePlugin.get_sampling(result) == sampling
    assert bool(result.info.get("progressive")) == progressive


@table("orientation", ORIENTATIONS)
@table(
    ("stored", "across", "down", "upright"),
    [
        ("4:4:4", 1, 1, ("4:4:4", "4:4:4")),
        ("4:2:2", 2, 1, ("4:2:2", "4:4:4")),  # Pillow cannot write 4:4:0
        ("4:4:0", 1, 2, ("4:4:4", "4:2:2")),
        ("4:2:0", 2, 2, ("4:2:0", "4:2:0")),
    ],
)
def test_tables_and_subsampling_of_a_jpeg_are_transposed_with_its_pixels(
    stored: str, across: int, down: int, upright: tuple[str, str], orientation: int
) -> None:
    rows = [8 + 6 * (n % 8) + n // 8 for n in range(64)]
    columns = [8 + 6 * (n // 8) + n % 8 for n in range(64)]
    exif = camera_exif(orientation)
    sampling = {1: "4:4:4", 2: "4:2:2", 4: "4:2:0"}[across * down]
    data = saved("JPEG", photo(), qtables=[rows], subsampling=sampling, exif=exif)
    # A start of frame for 4:4:0: there are as many blocks, although in other places.
    luma = data.index(b"\xff\xc0") + 11
    data = data[:luma] + bytes([across << 4 | down]) + data[luma + 1 :]
    result = opened(assert_mirrored(data, 36))
    assert isinstance(result, JpegImagePlugin.JpegImageFile)
    swapped = orientation > 4
    assert result.quantization == {0: columns if swapped else rows}
    number = JpegImagePlugin.get_sampling(result)
    assert ["4:4:4", "4:2:2", "4:2:0"][number] == upright[swapped]


def test_a_jpeg_stored_as_rgb_stays_rgb() -> None:
    data = saved("JPEG", photo(), quality=90, keep_rgb=True)
    result = opened(assert_mirrored(data, 45))
    assert result.info["adobe_transform"] == opened(data).info["adobe_transform"]


def test_a_ycck_jpeg_keeps_its_colours() -> None:
    tables = [[3] * 64, [70] * 64]  # one for the first component, one for the others
    data = saved("JPEG", photo("CMYK"), qtables=tables)
    # An Adobe marker (Adobe TN 5116) whose transform says YCCK.
    marker = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"
    assert marker + b"\0" in data
    assert_mirrored(data.replace(marker + b"\0", marker + b"\2"), 45)


@table("quality", [60, 90])
@table("mode", ["RGB", "RGBA", "L"])
@table("format", ["WEBP", "AVIF"])
def test_a_lossy_image_stays_close(format: str, quality: int, mode: str) -> None:
    assert_mirrored(saved(format, photo(mode), quality=quality), 38)


@table("format", ["PNG", "WEBP"])
def test_colours_hidden_by_transparency_are_kept(format: str) -> None:
    image = picture("RGB")
    image.putalpha(picture("1", seed=2).convert("L"))
    assert_mirrored(saved(format, image, lossless=True, exact=True))


def test_a_lossy_webp_stays_lossy() -> None:
    assert b"VP8L" not in mirror(saved("WEBP", photo(), quality=80))


def test_an_mpo_photo_becomes_the_jpeg_that_viewers_show() -> None:
    frames = [photo(), photo().rotate(180)]
    data = saved("MPO", *frames, exif=camera_exif(6), quality=90)
    assert opened(data).format == "MPO"
    result = mirror(data)
    assert opened(result).format == "JPEG"
    (frame,) = shown(result)
    assert decibels(frame, seen_in_a_mirror(data)[0]) >= 38
    assert camera_tags(result) == camera_tags(data)


def test_the_pages_of_a_tiff_keep_their_modes_sizes_and_compression() -> None:
    pages = {
        "tiff_lzw": picture("RGB", (20, 11)),
        "group4": picture("1", (33, 7)),
        "tiff_adobe_deflate": picture("I;16", (9, 14)),
        "packbits": picture("P", (12, 12)),
        "raw": picture("CMYK", (5, 6)),
    }
    data = tiff_of((page, {"compression": method}) for method, page in pages.items())
    with Image.open(io.BytesIO(assert_mirrored(data))) as image:
        for number, method in enumerate(pages):
            image.seek(number)
            assert image.info["compression"] == method


def test_a_jpeg_compressed_tiff_is_close_to_the_true_flip() -> None:
    data = saved("TIFF", photo(), compression="jpeg", quality=85)
    assert opened(assert_mirrored(data, 38)).info["compression"] == "jpeg"


@table(
    "data",
    [
        b"P1 # plain\n3 2\n1 0 0\n1 1 0\n",
        b"P2 3 1 255\n1 20 200\n",
        b"P3 2 1 255\n1 2 3 40 50 60\n",
        b"P5 3 1 100\n\x01\x20\x40",
        b"P5 3 1 4095\n\0\0\3\xe8\x0f\xff",
        b"P6 2 1 15\n\x01\x02\x03\x0d\x0e\x0f",
        b"Pf 2 1 1.0\n" + struct.pack(">2f", -0.5, 1e9),
    ],
)
def test_every_netpbm_variant_is_mirrored(data: bytes) -> None:
    assert_mirrored(data)


@table("height", [16, -16], ids=["bottom up", "top down"])
def test_a_bmp_keeps_its_alpha_channel(height: int) -> None:
    data = IMAGES["bmp alpha"]
    data = data[:22] + struct.pack("<i", height) + data[26:]
    assert opened(data).mode == "RGBA"
    assert_mirrored(data)


@table("start", [30, 100, 121])
def test_a_bmp_whose_pixels_overlap_its_header_is_refused(start: int) -> None:
    data = IMAGES["bmp alpha"]
    with pytest.raises(ImageError, match="overlap"):
        mirror(data[:10] + struct.pack("<I", start) + data[14:])


# ---- mirror: PNG -----------------------------------------------------------

PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by colour type
PNG_TYPES = [  # bit depth and colour type
    *((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)),
    *((1, 3), (2, 3), (4, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)),
]
ADAM7 = [  # the passes of an interlaced PNG: first column and row, steps
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
]

Pixels = list[list[int]]  # rows; the samples of a pixel make one number
Chunk = tuple[bytes, bytes]  # type and data


def png_chunk(chunk_type: bytes, body: bytes) -> bytes:
    end = struct.pack(">I", zlib.crc32(chunk_type + body))
    return struct.pack(">I", len(body)) + chunk_type + body + end


def png_file(chunks: Iterable[Chunk]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks))


def png_chunks(data: bytes) -> list[Chunk]:
    chunks, at = [], 8
    while at < len(data):
        length, chunk_type = struct.unpack_from(">I4s", data, at)
        chunks.append((chunk_type, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def with_chunk(data: bytes, chunk: Chunk, before: bytes = b"IDAT") -> bytes:
    at = data.index(before) - 4
    return data[:at] + png_chunk(*chunk) + data[at:]


def png_picture(bits: int) -> Pixels:
    """Pixels of so many bits, with the low ones in use as well."""
    mix = 0x9E3779B97F4A7C15  # spreads a small number over 64 bits
    return [
        [(11 * y + x + 1) * mix % 2**64 >> 64 - bits for x in range(11)]
        for y in range(9)
    ]


def png_of(
    pixels: Pixels, depth: int, colour: int, *chunks: Chunk, interlaced: bool = False
) -> bytes:
    """A PNG written from the standard, for variants that Pillow does not write."""
    bits = depth * PNG_SAMPLES[colour]
    lines = b""
    for x, y, step_x, step_y in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        for row in pixels[y::step_y]:
            digits = "".join(f"{pixel:0{bits}b}" for pixel in row[x::step_x])
            if digits:
                length = (len(digits) + 7) // 8
                lines += b"\0" + int(digits.ljust(8 * length, "0"), 2).to_bytes(length)
    size = len(pixels[0]), len(pixels)
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    samples = (b"IDAT", zlib.compress(lines))
    return png_file([(b"IHDR", header), *chunks, samples, (b"IEND", b"")])


def png_pixels(data: bytes) -> Pixels:
    """The pixels of a PNG that is not interlaced, at their full depth."""
    chunks = png_chunks(data)
    width, _, depth, colour = struct.unpack_from(">IIBB", chunks[0][1])
    bits = depth * PNG_SAMPLES[colour]
    lines = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    stride, step = (width * bits + 7) // 8, max(1, bits // 8)
    above, pixels = bytes(stride), []
    for start in range(0, len(lines), stride + 1):
        method, *line = lines[start : start + stride + 1]
        for x, up in enumerate(above):
            left, corner = (line[x - step], above[x - step]) if x >= step else (0, 0)
            estimate = left + up - corner
            nearest = min(left, up, corner, key=lambda value: abs(estimate - value))
            line[x] += (0, left, up, (left + up) // 2, nearest)[method]
            line[x] %= 256
        above = bytes(line)
        digits = "".join(f"{byte:08b}" for byte in line)
        starts = range(0, width * bits, bits)
        pixels.append([int(digits[at : at + bits], 2) for at in starts])
    return pixels


@table("interlaced", [False, True])
@table(("depth", "colour"), PNG_TYPES)
def test_a_png_keeps_every_bit(depth: int, colour: int, interlaced: bool) -> None:
    pixels = png_picture(depth * PNG_SAMPLES[colour])
    palette = [(b"PLTE", bytes(3 * 2**depth))] if colour == 3 else []
    result = mirror(png_of(pixels, depth, colour, *palette, interlaced=interlaced))
    assert png_pixels(result) == [row[::-1] for row in pixels]
    assert png_chunks(result)[0][1][8:] == bytes([depth, colour, 0, 0, 0])


KEPT_CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": bytes(range(32)),
    b"sRGB": b"\0",
    b"sBIT": b"\x05\x06\x05",
    b"bKGD": b"\0\1\0\2\0\3",
    b"tRNS": b"\0\1\0\2\0\3",
    b"pHYs": struct.pack(">IIB", 3937, 3937, 1),
    b"tIME": b"\x07\xe8\x02\x1d\x0c\x22\x38",
    b"tEXt": b"Title\0a title",
    b"zTXt": b"Comment\0\0" + zlib.compress(b"much to say " * 20),
    b"iTXt": b"Author\0\0\0de\0Autor\0" + "Jürgen ☃".encode(),
    b"iCCP": b"a profile\0\0" + zlib.compress(b"profile " * 20),
    b"prVt": b"a chunk of somebody's own that is safe to copy",
}


@table("before", [b"IDAT", b"IEND"])
@table("chunk", KEPT_CHUNKS.items())
def test_a_png_keeps_its_other_chunks(chunk: Chunk, before: bytes) -> None:
    data = with_chunk(saved("PNG", picture("RGB")), chunk, before)
    assert chunk in png_chunks(mirror(data))


def test_a_png_loses_unknown_chunks_that_depend_on_the_pixels() -> None:
    data = with_chunk(saved("PNG", picture("RGB")), (b"prVT", b"left is dark"))
    assert b"prVT" not in dict(png_chunks(assert_mirrored(data)))


# ---- mirror: animations ----------------------------------------------------


DURATIONS = [70, 120, 50, 200, 90]  # milliseconds


@table("disposal", [0, 1, 2, 3])
@table("transparent", [False, True])
def test_an_animated_gif_is_mirrored(disposal: int, transparent: bool) -> None:
    frames = [drawing(number, transparent=transparent) for number in range(5)]
    options = {"disposal": disposal, "duration": DURATIONS, "optimize": False}
    data = saved("GIF", *frames, loop=3, **options)
    assert timing(assert_mirrored(data)) == [*DURATIONS, 3]


def test_a_gif_keeps_the_palettes_of_its_frames() -> None:
    data = saved("GIF", picture("P"), picture("P", seed=2), duration=100)
    assert len(assert_mirrored(data)) < 1.5 * len(data)


def gif_of(*frames: bytes, size: tuple[int, int] = SIZE) -> bytes:
    """A GIF with a table of 256 greys."""
    head = struct.pack("<6sHHBBB", b"GIF89a", *size, 0xF7, 0, 0)
    greys = bytes(grey for grey in range(256) for _ in "RGB")
    return head + greys + b"".join(frames) + b";"


def gif_frame(
    left: int, top: int, width: int, height: int, *, interlace: bool = False
) -> bytes:
    """A frame as Pillow writes it (it interlaces none that are smaller than 16)."""
    image = picture("L", (width, height), seed=left)
    data = bytearray(saved("GIF", image, duration=100, interlace=interlace))
    start = 13 + (6 << (data[10] & 7))  # of the graphic control extension
    struct.pack_into("<HH", data, start + 9, left, top)
    return bytes(data[start:-1])


@table(
    ("box", "interlace"),
    [
        (SCREEN := (0, 0, *SIZE), False),
        (SCREEN, True),
        ((3, 1, 17, 16), True),
        ((3, 1, 17, 16), False),
        ((28, 17, 1, 1), False),
    ],
)
def test_a_gif_frame_is_mirrored_where_it_lies(box: Box, interlace: bool) -> None:
    frame = gif_frame(*box, interlace=interlace)
    assert_mirrored(gif_of(gif_frame(*SCREEN), frame))


def test_a_gif_frame_beyond_the_screen_is_mirrored_as_viewers_enlarge_it() -> None:
    assert_mirrored(gif_of(gif_frame(8, 2, 7, 6), size=(10, 6)))


@table(
    "box", [(0, 0, 60, 4), (3, 1, 29, 5), (28, 5, 44, 1), (29, 0, 5, 5), (99, 0, 5, 5)]
)
def test_a_later_gif_frame_is_cropped_to_the_screen(box: Box) -> None:
    """Unlike browsers, Pillow enlarges the screen, so expect what browsers show."""
    data = gif_of(gif_frame(*SCREEN), gif_frame(*box))
    seen = ImageOps.mirror(shown(data)[1].crop(SCREEN))
    first, second = shown(mirror(data))
    assert first.size == SIZE
    assert second.crop(SCREEN).tobytes() == seen.tobytes()


def test_a_gif_keeps_its_comment_and_other_extensions() -> None:
    data = saved("GIF", picture("P"), comment=b"a comment")
    at = data.index(b"!\xfe")
    extension = b"!\xff\x0bXMP DataXMP\x03abc\x02de\0"
    result = mirror(data[:at] + extension + data[at:])
    assert opened(result).info["comment"] == b"a comment"
    assert extension in result


@table("extension", [b"!\xff\x0bNETSCAPE2.0\0", b"!\xff\0", b"!\xf9\0"])
def test_a_gif_loses_extensions_without_data(extension: bytes) -> None:
    """Pillow reads on until it finds an empty block."""
    frame = gif_frame(*SCREEN)
    data = gif_of(extension + bytes(3) + frame)  # and padding that some programs write
    assert mirror(data) == mirror(gif_of(frame))


def test_a_gif_without_its_trailer_is_mirrored() -> None:
    assert_mirrored(saved("GIF", picture("P"))[:-1])


def apng(*, default_image: bool = False, **options: Any) -> bytes:
    frames = [drawing(number, transparent=True) for number in range(5)]
    options |= {"duration": DURATIONS[default_image:], "default_image": default_image}
    return saved("PNG", *frames, **options)


@table("default_image", [False, True])
@table("blend", [0, 1])
@table("disposal", [0, 1, 2])
def test_an_apng_is_mirrored(disposal: int, blend: int, default_image: bool) -> None:
    options = {"disposal": disposal, "blend": blend, "loop": 4}
    assert_mirrored(apng(default_image=default_image, **options))


@table("orientation", ORIENTATIONS)
def test_an_apng_is_transposed_as_its_orientation_says(orientation: int) -> None:
    assert_mirrored(apng(exif=camera_exif(orientation)))


def test_a_frame_of_an_apng_may_span_several_chunks() -> None:
    split, sequence = [], itertools.count()
    for chunk_type, body in png_chunks(apng()):
        if chunk_type in (b"fcTL", b"fdAT"):
            middle = len(body) // 2 if chunk_type == b"fdAT" else len(body)
            for part in filter(None, (body[4:middle], body[middle:])):
                split.append((chunk_type, struct.pack(">I", next(sequence)) + part))
        else:
            split.append((chunk_type, body))
    assert mirror(png_file(split)) == mirror(apng())


@table("mode", ["RGB", "RGBA"])
@table(
    ("format", "options", "least"),
    [
        ("WEBP", {"lossless": True}, math.inf),
        ("WEBP", {"quality": 85}, 38),
        ("AVIF", {"quality": 85}, 38),
    ],
)
def test_a_webp_or_avif_animation_is_mirrored(
    format: str, options: Options, least: float, mode: str
) -> None:
    base = photo(mode, (96, 64))
    frames = [ImageChops.offset(base, 7 * number, 0) for number in range(5)]
    data = saved(format, *frames, duration=DURATIONS, loop=3, **options)
    assert timing(assert_mirrored(data, least))[:-1] == DURATIONS


def test_a_webp_that_is_lossless_in_any_frame_is_saved_without_loss() -> None:
    frames = [photo(size=(40, 30)), drawing(0)]
    data = saved("WEBP", *frames, quality=50, allow_mixed=True)
    assert data.index(b"VP8 ") < data.index(b"VP8L")
    assert_mirrored(data)


# ---- mirror: metadata ------------------------------------------------------


def camera_exif(orientation: int) -> bytes:
    """EXIF data such as a camera writes, with sub-directories and a maker note."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Box"
    exif[ExifTags.Base.Copyright] = "somebody"
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


def camera_tags(data: bytes) -> list[object]:
    """The EXIF data of a file, without tags for how its pixels are stored."""
    exif = opened(data).getexif()
    directories = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    makers = exif.get(ExifTags.Base.Make), exif.get(ExifTags.Base.Copyright)
    return [*makers, *map(dict, directories)]


def directory(
    entries: Sequence[tuple[int, int, int, int]], order: str = "<", following: int = 0
) -> bytes:
    """A TIFF or EXIF directory: (tag, type, count, value or its offset) an entry."""
    body = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    count = struct.pack(order + "H", len(entries))
    return count + body + struct.pack(order + "I", following)


@table("orientation", ORIENTATIONS)
@table(
    ("format", "options", "least"),
    [
        ("JPEG", {"quality": 90, "subsampling": 0}, 45),
        ("JPEG", {"quality": 90, "subsampling": 2}, 45),
        ("PNG", {}, math.inf),
        ("WEBP", {"lossless": True}, math.inf),
        ("TIFF", {}, math.inf),
        ("AVIF", {"quality": 85}, 38),
    ],
)
def test_an_image_is_transposed_as_its_exif_orientation_says(
    format: str, options: Options, least: float, orientation: int
) -> None:
    data = saved(format, photo(size=(96, 64)), exif=camera_exif(orientation), **options)
    result = assert_mirrored(data, least)
    assert ORIENTATION not in opened(result).getexif()


@table("orientation", [1, 6])
@table("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_other_exif_data_is_kept(format: str, orientation: int) -> None:
    data = saved(format, picture("RGB"), exif=camera_exif(orientation))
    result = mirror(data)
    assert camera_tags(result) == camera_tags(data)
    assert camera_tags(result)[0] == "Box"


def stored_exif(order: str) -> bytes:
    """EXIF data with a maker note of 25 bytes and a thumbnail, in that byte order."""
    thumbnail, note = b"\xff\xd8\xff\xd9", b"a note that is 25 bytes.."
    upright = 6 if order == "<" else 6 << 16
    main = [(ORIENTATION, 3, 1, upright), (ExifTags.IFD.Exif, 4, 1, 38)]
    exif = {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order]
    exif += directory(main, order, following=81)
    exif += directory([(ExifTags.Base.MakerNote, 7, len(note), 56)], order) + note
    exif += directory([(0x201, 4, 1, 111), (0x202, 4, 1, len(thumbnail))], order)
    return exif + thumbnail


@table("order", ["<", ">"])
def test_a_maker_note_keeps_its_offset_and_type(order: str) -> None:
    """Maker notes contain offsets into the EXIF data that only the maker knows."""
    exif = stored_exif(order)
    result = mirror(saved("JPEG", picture("RGB"), exif=b"Exif\0\0" + exif))
    kept = opened(result).info["exif"].removeprefix(b"Exif\0\0")
    assert kept[38:] == exif[38:]
    assert kept[8:10] == struct.pack(order + "H", 1)


@table("order", ["<", ">"])
def test_the_unmirrored_thumbnail_is_dropped(order: str) -> None:
    data = saved("JPEG", picture("RGB"), exif=b"Exif\0\0" + stored_exif(order))
    assert opened(data).getexif().get_ifd(ExifTags.IFD.IFD1)
    assert not opened(mirror(data)).getexif().get_ifd(ExifTags.IFD.IFD1)


def test_exif_data_with_only_the_orientation_is_dropped() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    assert "exif" not in opened(mirror(saved("PNG", picture("RGB"), exif=exif))).info


@pytest.mark.filterwarnings("ignore")
@table("format", ["JPEG", "PNG", "WEBP"])
@table(
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
def test_unreadable_exif_data_is_ignored(exif: bytes, format: str) -> None:
    mark = b"Exif\0\0" if format == "JPEG" else b""
    plain = saved(format, picture("RGB"), lossless=True)
    data = saved(format, picture("RGB"), lossless=True, exif=mark + exif)
    assert pixels(shown(mirror(data))[0]) == pixels(shown(mirror(plain))[0])


ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@table(
    ("format", "key", "value"),
    [
        *((f, "icc_profile", ICC) for f in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")),
        *((f, "dpi", (300, 300)) for f in ("JPEG", "PNG", "TIFF", "BMP")),
        ("JPEG", "comment", b"a comment"),
    ],
)
def test_profile_dpi_and_comment_are_kept(format: str, key: str, value: object) -> None:
    data = saved(format, picture("RGB"), **{key: value})
    assert opened(mirror(data)).info[key] == pytest.approx(value, abs=0.1)


@table("iptc", [b"\x1c\x02\x5a\0\6Berlin", b"\x1c\x02\x5a\0\3Ulm"])
def test_a_jpeg_keeps_its_iptc_data_but_no_other_photoshop_data(iptc: bytes) -> None:
    blocks = b"Photoshop 3.0\0"
    for number, data in {0x040C: b"thumbnail", 0x0404: iptc}.items():
        blocks += struct.pack(">4sHHI", b"8BIM", number, 0, len(data))
        blocks += data + bytes(len(data) % 2)
    segment = b"\xff\xed" + struct.pack(">H", len(blocks) + 2) + blocks
    result = mirror(saved("JPEG", picture("RGB"), extra=segment))
    assert opened(result).info["photoshop"] == {0x0404: iptc}


def test_a_compressed_tiff_keeps_its_exif_data() -> None:
    """Pillow cannot write such a file, so these pixels are relabelled as PackBits."""
    literal_run = Image.frombytes("L", (129, 1), bytes([127, *range(128)]))
    data = saved("TIFF", literal_run, exif=camera_exif(1))
    data = relabelled(data, (256, 4, 1, 129), (256, 4, 1, 128))  # ImageWidth
    data = relabelled(data, (259, 3, 1, 1), (259, 3, 1, 32773))  # Compression
    assert opened(data).info["compression"] == "packbits"
    assert camera_tags(assert_mirrored(data)) == camera_tags(data)


@table("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}])
def test_each_page_of_a_tiff_has_its_own_tags_and_orientation(options: Options) -> None:
    pages = []
    for number, orientation in enumerate([6, 1, 3]):
        tags = {ExifTags.Base.PageName: f"page {number}", ORIENTATION: orientation}
        pages.append((picture("RGB", seed=number), {"tiffinfo": tags, **options}))
    result = assert_mirrored(tiff_of(pages))
    assert [page.size for page in shown(result)] == [SIZE[::-1], SIZE, SIZE]
    with Image.open(io.BytesIO(result)) as image:
        for number in range(3):
            image.seek(number)
            assert image.getexif()[ExifTags.Base.PageName] == f"page {number}"


@pytest.mark.filterwarnings("ignore")
@table("compression", ["raw", "tiff_lzw"])
@table(
    ("tag", "value", "stored", "wrong"),  # a type and a count each
    [
        (ExifTags.Base.Software, "ABC", (2, 4), (3, 1)),
        (ExifTags.Base.IPTCNAA, b"\x1c\x02\x5a\0\6Berlin\0", (7, 12), (4, 3)),
    ],
)
def test_a_tiff_loses_a_tag_only_if_its_type_is_wrong(
    tag: int,
    value: object,
    stored: tuple[int, int],
    wrong: tuple[int, int],
    compression: str,
) -> None:
    """Pillow reads only the first number of text stored as numbers."""
    tags = {tag: value, ExifTags.Base.Make: "Box"}
    data = saved("TIFF", picture("RGB"), compression=compression, tiffinfo=tags)
    assert opened(assert_mirrored(data)).getexif()[tag] == value
    data = relabelled(data, (tag, *stored), (tag, *wrong))
    result = opened(assert_mirrored(data)).getexif()
    assert tag not in result
    assert result[ExifTags.Base.Make] == "Box"


XMP = (
    b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Make="Box" %s/></rdf:RDF>'
    b'</x:xmpmeta><?xpacket end="w"?>'
)
TURNED = XMP % b'tiff:Orientation="6"'


def with_xmp(format: str, xmp: bytes, orientation: int = 0) -> bytes:
    options: Options = {"exif": Image.Exif()}
    if orientation:
        options["exif"][ORIENTATION] = orientation
    if format == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif format == "TIFF":
        options["exif"][ExifTags.Base.XMLPacket] = xmp
    else:
        options |= {"xmp": xmp, "lossless": True}
    return saved(format, picture("RGB"), **options)


@table("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@table(
    ("before", "after"),
    [
        (b"", b""),
        (b'tiff:Orientation="6"', b""),
        (b"tiff:Orientation = '6'", b""),
        (
            b"><tiff:Orientation>6</tiff:Orientation></rdf:Description><rdf:x",
            b"></rdf:Description><rdf:x",
        ),
    ],
)
def test_other_xmp_data_is_kept(before: bytes, after: bytes, format: str) -> None:
    result = opened(mirror(with_xmp(format, XMP % before, orientation=6)))
    assert result.info["xmp"] == XMP % after
    assert result.size == SIZE[::-1]


def png_with_xmp(chunk_type: bytes, text: bytes) -> bytes:
    chunk = chunk_type, b"XML:com.adobe.xmp\0" + text
    return with_chunk(saved("PNG", picture("RGB")), chunk)


@table(
    "data",
    [
        *(with_xmp(format, TURNED) for format in ("PNG", "WEBP", "TIFF")),
        png_with_xmp(b"tEXt", TURNED),
        png_with_xmp(b"zTXt", b"\0" + zlib.compress(TURNED)),
        png_with_xmp(b"iTXt", b"\1\0\0\0" + zlib.compress(TURNED)),
        png_with_xmp(b"iTXt", b"\0\0en\0\0" + TURNED),
    ],
)
def test_an_image_is_transposed_as_its_xmp_orientation_says(data: bytes) -> None:
    result = opened(assert_mirrored(data))
    assert result.info["xmp"] == XMP % b""
    assert result.size == SIZE[::-1]


@table("orientation", [3, 6])
@table("before", [b"IDAT", b"IEND"])
@table("stored", ["tEXt", "zTXt", "raw"])
def test_exif_data_in_a_text_chunk_is_obeyed(
    stored: str, before: bytes, orientation: int
) -> None:
    exif = camera_exif(orientation)
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    keyword = b"Raw profile type exif\0"
    chunk = {
        "tEXt": (b"tEXt", keyword + text),
        "zTXt": (b"zTXt", keyword + b"\0" + zlib.compress(text)),
        "raw": (b"tEXt", b"exif\0" + exif),
    }[stored]
    data = with_chunk(saved("PNG", picture("RGB")), chunk, before)
    result = assert_mirrored(data)
    assert not {b"tEXt", b"zTXt"} & dict(png_chunks(result)).keys()
    assert camera_tags(result) == camera_tags(data)
    assert ORIENTATION not in opened(result).getexif()


# ---- mirror: what is no image ----------------------------------------------


@table(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html><title>404</title>", "starts with b'<!DOCTYPE html><"),
        (b"Not\r\n\x1b[31mfound", r"starts with b'Not\r\n\x1b[31mfound'"),
        ("Datei nicht gefunden ☃".encode() * 9, "starts with b'Datei nicht gefu'"),
        (bytes(12), "starts with b'\\x00"),
    ],
)
def test_a_non_image_is_refused_with_its_first_bytes(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match="not an image") as caught:
        mirror(data)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert isinstance(caught.value, ValueError)


@table("format", ["EPS", "ICO", "TGA", "PCX", "SGI", "DDS", "PDF"])
def test_formats_unsafe_for_untrusted_data_are_refused(format: str) -> None:
    with pytest.raises(ImageError, match="not an image that can be mirrored"):
        mirror(saved(format, picture("RGB", (16, 16))))


def test_a_lack_of_file_descriptors_is_not_blamed_on_the_image() -> None:
    """Pillow imports most of its plugins when they are first needed."""
    program = (
        "import errno, os, resource, sys, mirror_images\n"
        "data = sys.stdin.buffer.read()\n"
        "lowest = os.dup(0)\n"
        "os.close(lowest)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))\n"
        "try:\n"
        "    mirror_images.mirror(data)\n"
        "except OSError as error:\n"
        "    print(errno.errorcode[error.errno])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=saved("PNG", picture("RGB")),
        cwd=SCRIPT.parent,
        capture_output=True,
        check=True,
    )
    assert result.stdout.strip() == b"EMFILE"


@pytest.mark.filterwarnings("ignore")
@table("part", [0.3, 0.9])
@table("sample", IMAGES)
def test_a_truncated_image_is_refused(sample: str, part: float) -> None:
    data = IMAGES[sample]
    if sample == "mpo":  # only its first photo matters
        data = data[: len(data) // 3]
    with pytest.raises(ImageError) as caught:
        mirror(data[: int(len(data) * part)])
    message = str(caught.value)
    assert message.startswith(("a damaged", "not an image that can be mirrored: it"))
    assert "unpack" not in message
    assert "index" not in message


def mirror_within(limit: int, data: bytes) -> bytes:
    """Mirror an image while Pillow accepts that many pixels."""
    with MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", limit / 2)
        return mirror(data)


@table("sample", IMAGES)
def test_an_image_of_more_pixels_than_pillow_accepts_is_refused(sample: str) -> None:
    data = IMAGES[sample]
    width, height = opened(data).size
    with pytest.raises(ImageError, match=f"more than {width * height - 1:,} pix"):
        mirror_within(width * height - 1, data)


def replaced(data: bytes, chunk_type: bytes, body: bytes | None = None) -> bytes:
    """A PNG with the last chunk of a type replaced, or without it."""
    chunks = png_chunks(data)
    last = max(n for n, (found, _) in enumerate(chunks) if found == chunk_type)
    chunks[last : last + 1] = [] if body is None else [(chunk_type, body)]
    return png_file(chunks)


FIVE_FRAMES = [picture("RGB", (40, 30), number) for number in range(5)]
ANIMATIONS = {f: saved(f, *FIVE_FRAMES) for f in ("GIF", "WEBP", "AVIF", "TIFF", "PNG")}
ANIMATIONS |= {
    "GIF beyond its screen": gif_of(*[gif_frame(0, 0, 40, 30)] * 5, size=(1, 1)),
    "PNG that hides its frames": replaced(ANIMATIONS["PNG"], b"acTL"),
}


@table("data", ANIMATIONS.values(), ids=ANIMATIONS)
def test_the_limit_applies_to_all_frames_together(data: bytes) -> None:
    mirror_within(40 * 30 * 5, data)
    with pytest.raises(ImageError, match="more than 5,999 pixels in all frames"):
        mirror_within(40 * 30 * 5 - 1, data)


def test_an_image_may_have_as_many_pixels_as_pillow_accepts_by_default() -> None:
    assert Image.MAX_IMAGE_PIXELS
    assert mirror_images.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def png_header(size: tuple[int, int], depth: int = 8) -> Chunk:
    return b"IHDR", struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0)


def short_png(depth: int) -> bytes:
    """A PNG that promises more than it holds."""
    samples = b"IDAT", zlib.compress(bytes(99))
    return png_file([png_header((9000, 9000), depth), samples, (b"IEND", b"")])


def with_wrong_checksum(chunk_type: bytes) -> bytes:
    data = bytearray(saved("PNG", picture("P"), picture("P").rotate(180)))
    at = data.index(chunk_type)
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length] ^= 1
    return bytes(data)


def with_last_frame_at(width: int, height: int, left: int, top: int) -> bytes:
    body = dict(png_chunks(apng()))[b"fcTL"]  # the last
    box = struct.pack(">4I", width, height, left, top)
    return replaced(apng(), b"fcTL", body[:4] + box + body[20:])


STILL_PNG = saved("PNG", picture("RGB"))
UNREAD = "not an image that can be mirrored"
BEYOND = "a frame extends beyond its edges"


@table(
    ("reason", "data"),
    [
        ("out of order", with_chunk(STILL_PNG, png_header(SIZE))),
        ("out of order", with_chunk(STILL_PNG, png_header((12, 10)))),
        ("unknown chunk b'ABCD'", with_chunk(STILL_PNG, (b"ABCD", b""))),
        ("missing or out of order", replaced(apng(), b"IDAT")),
        ("missing or out of order", replaced(apng(), b"fdAT")),
        ("frames are missing", replaced(apng(), b"fcTL")),
        ("frames are missing", replaced(apng(), b"acTL", struct.pack(">II", 1, 0))),
        ("truncated", short_png(8)),
        ("truncated", short_png(16)),
        ("wrong checksum in b'IDAT'", with_wrong_checksum(b"IDAT")),
        ("wrong checksum in b'fdAT'", with_wrong_checksum(b"fdAT")),
        *((UNREAD, with_wrong_checksum(name)) for name in (b"IHDR", b"PLTE", b"fcTL")),
        (BEYOND, with_last_frame_at(40, 30, 1, 0)),
        (BEYOND, with_last_frame_at(40, 30, 0, 1)),
        (BEYOND, with_last_frame_at(41, 30, 0, 0)),
        (BEYOND, with_last_frame_at(2**31, 2**31, 0, 0)),
        (BEYOND, with_last_frame_at(40, 30, 2**32 - 1, 0)),
        ("truncated", with_last_frame_at(39, 30, 0, 0)),
        (UNREAD, with_last_frame_at(0, 0, 0, 0)),
    ],
)
def test_a_damaged_png_is_refused(reason: str, data: bytes) -> None:
    with pytest.raises(ImageError, match=reason):
        mirror(data)


@table("size", [(0, 0), (0, 5), (5, 0)])
def test_a_gif_frame_without_pixels_does_no_harm(size: tuple[int, int]) -> None:
    empty = b"," + struct.pack("<HHHHB", 2, 1, *size, 0) + b"\x08\x02\x00\x03\0"
    data = gif_of(gif_frame(*SCREEN), empty)
    with contextlib.suppress(ImageError):
        first = shown(mirror(data))[0]
        assert pixels(first) == pixels(seen_in_a_mirror(data)[0])


def test_a_tiff_whose_directories_form_a_loop_ends() -> None:
    data = bytearray(saved("TIFF", picture("L")))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    (frame,) = shown(mirror(bytes(data)))
    assert pixels(frame) == pixels(ImageOps.mirror(picture("L")))


def test_the_number_of_pages_of_a_tiff_is_limited(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_images, "MAX_PAGES", 2)
    assert_mirrored(saved("TIFF", picture("L"), picture("L")))
    with pytest.raises(ImageError, match="more than 2 pages"):
        mirror(saved("TIFF", picture("L"), picture("L"), picture("L")))


def tiff_16_bit(mode: str) -> bytes:
    """A TIFF with 8 bits per channel, relabelled as half as wide, with 16 bits."""
    data = saved("TIFF", picture(mode, (6, 2)))
    depths = b"\x08\0" * len(mode)
    assert data.count(depths) == 1
    data = data.replace(depths, b"\x10\0" * len(mode))
    return relabelled(data, (256, 4, 1, 6), (256, 4, 1, 3))


def jpeg2000_16_bit() -> bytes:
    data = bytearray(saved("JPEG2000", picture("RGB"), no_jp2=True))
    for component in range(3):  # the depth in the SIZ marker, less one
        assert data[42 + 3 * component] == 7
        data[42 + 3 * component] = 15
    return bytes(data)


@table(
    "data",
    [
        b"P6 1 1 65535\n\0\1\0\2\0\3",
        b"P6 1 1 4095\n\0\1\0\2\0\3",
        b"P3 1 1 1000\n1 2 3\n",
        tiff_16_bit("RGB"),
        tiff_16_bit("CMYK"),
        jpeg2000_16_bit(),
    ],
)
def test_depth_that_would_be_lost_is_refused(data: bytes) -> None:
    assert opened(data).mode in ("RGB", "CMYK")
    with pytest.raises(ImageError, match="16 bits per channel"):
        mirror(data)


# ---- the chain -------------------------------------------------------------


class Result(NamedTuple):
    status: int
    output: str
    error: str
    report: dict[str, dict[str, Any]]  # its lines by name


class Service(http.server.ThreadingHTTPServer):
    """An image service in memory, with a log.

    `images` are listed; uploads are added to them under their names as sent. `routes`
    are a test's own responses, by method and path. `mirror` calls main() with the URL
    and other arguments.
    """

    mirror: Callable[..., Result]

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ServiceHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/images/"
        self.images: dict[str, bytes] = {}
        self.routes: dict[str, Callable[[ServiceHandler], None]] = {}
        self.requests: list[str] = []
        self.headers: list[email.message.Message] = []
        self.clients: set[object] = set()

    def downloads(self) -> list[str]:
        """The names of the images requested, as they were sent, sorted."""
        found = [re.match("GET /images/(.+)", request) for request in self.requests]
        return sorted(match[1] for match in found if match)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client disconnected


class ServiceHandler(http.server.BaseHTTPRequestHandler):
    server: Service
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # sends a response in one piece

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        self.server.requests.append(request)
        self.server.headers.append(self.headers)
        self.server.clients.add(self.client_address)
        self.server.routes.get(request, ServiceHandler.serve_image)(self)

    do_POST = do_GET

    def serve_image(self) -> None:
        images = self.server.images
        name = urllib.parse.unquote(self.path.partition("?")[0][len("/images/") :])
        if self.command == "POST":
            pattern = rb'; filename="(.*?)".*?\r\n\r\n(.*)\r\n--'
            form = re.search(pattern, self.body, re.DOTALL)
            assert form
            images[form[1].decode()] = form[2]
            self.respond(200, b"saved")
        elif name:
            self.respond(200, images[name])
        else:
            self.respond(200, "\n".join(images).encode())

    def respond(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service(tmp_path: Path, capfd: Capture) -> Iterator[Service]:
    def call(*options: str) -> Result:
        report = tmp_path / "report"
        report.write_text("")
        arguments = [server.url, "--retries", "0", "--report", str(report), *options]
        try:
            status: Any = mirror_images.main(arguments)
        except SystemExit as exit:  # argparse
            status = exit.code
        return Result(status, *capfd.readouterr(), read_report(report))

    with Service() as server:
        server.mirror = call
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield server
        server.shutdown()


PNG = saved("PNG", picture("RGB"))


def test_every_image_of_the_list_is_mirrored_and_uploaded(service: Service) -> None:
    formats = {"a.jpg": "JPEG", "b.png": "PNG", "c.gif": "GIF", "d.webp": "WEBP"}
    originals = {name: saved(format, photo()) for name, format in formats.items()}
    service.images |= originals
    result = service.mirror()
    assert result.status == 0
    assert result.output.startswith("4 mirrored, 0 failed, 0 skipped, ")
    results = {"mirrored_" + name: mirror(data) for name, data in originals.items()}
    assert service.images == originals | results


def test_the_run_does_not_start_without_a_list(service: Service) -> None:
    service.routes["GET /images/"] = lambda handler: handler.respond(404, b"no list")
    status, output, error, _ = service.mirror()
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.endswith("404 Not Found: no list\n")
    assert service.requests == ["GET /images/"]


HOSTILE = [
    *("..", ".", "../secret.png", "a/b.png", "/etc/passwd", "a\\b.png", "..\\c.png"),
    *("http://example.com/a.png", "//example.com/a.png", "tab\there.png"),
    *("nul\0.png", "escape\x1b[2J.png", "c1\x85.png", "cr\rin.png"),
]


def test_hostile_names_fail_and_are_never_requested(service: Service) -> None:
    service.images |= dict.fromkeys([*HOSTILE, "good.png"], PNG)
    result = service.mirror()
    assert result.status == 1
    assert service.downloads() == ["good.png"]
    assert result.report.pop("good.png")["status"] == "mirrored"
    assert set(result.report) == set(HOSTILE)
    outcomes = {(line["status"], line["attempts"]) for line in result.report.values()}
    assert outcomes == {("failed", 0)}
    assert all(line.isprintable() for line in result.error.splitlines())


def test_every_other_name_arrives_unchanged(service: Service) -> None:
    names = [
        *("with space.png", "ünïcode ☃.png", "50%.png", "%2e%2e.png", "a%2Fb.png"),
        *("what?.png", "one#two.png", "a&b=c;d.png", "'.png", "+.png", "...png"),
        *(" leading.png", "a:b.png", "http:c.png", "[x].png", "~.png", "-v.png"),
    ]
    service.images |= dict.fromkeys(names, PNG)
    assert service.mirror().status == 0
    assert set(service.images) == {*names, *("mirrored_" + name for name in names)}


@table("path", ["/images/", "/images"])
@table("query", ["", "?a=1&b=%2F/"])
def test_the_url_is_used_as_given(service: Service, path: str, query: str) -> None:
    service.images["a.png"] = PNG
    service.url = service.url.removesuffix("/images/") + path + query
    assert service.mirror().status == 0
    assert service.requests == [
        f"GET {path}{query}",
        f"GET /images/a.png{query}",
        f"POST {path}{query}",
    ]


def test_the_url_may_come_from_the_environment(
    service: Service, monkeypatch: MonkeyPatch
) -> None:
    service.images["a.png"] = PNG
    monkeypatch.setenv("IMAGES_URL", service.url)
    assert mirror_images.main([]) == 0
    assert set(service.images) == {"a.png", "mirrored_a.png"}


def test_headers_are_sent_with_each_request(service: Service) -> None:
    service.images["a.png"] = PNG
    assert service.mirror("--header", "X-Key: 7").status == 0
    assert [headers["X-Key"] for headers in service.headers] == ["7", "7", "7"]


def test_each_chain_has_one_connection(service: Service) -> None:
    service.images |= {f"{number}.png": PNG for number in range(12)}
    assert service.mirror("--chains", "3").status == 0
    assert len(service.clients) <= 3


def test_a_long_list_does_not_mean_many_tasks(
    service: Service, monkeypatch: MonkeyPatch
) -> None:
    tasks = []

    async def get(client: Client, name: str, *_: object) -> bytes:
        await asyncio.sleep(0)  # lets all others begin
        tasks.append(len(asyncio.all_tasks()))
        raise ImageError("enough")

    monkeypatch.setattr(Client, "get", get)
    service.images |= dict.fromkeys(map(str, range(1000)), b"")
    assert service.mirror("--chains", "5", "-q").status == 1
    assert len(tasks) == 1000
    assert max(tasks) == 1 + 5


# ---- resuming --------------------------------------------------------------


@table(
    ("images", "options", "downloads", "uploads"),
    [
        ("a mirrored_a b", [], "b", "mirrored_b"),
        ("a mirrored_a", ["--again"], "a", "mirrored_a"),
        ("a mirrored_a", ["--prefix=x-"], "a mirrored_a", "x-a x-mirrored_a"),
        ("a mirrored_a", ["--prefix="], "a mirrored_a", "a mirrored_a"),
        # A name is stored as it was sent, with its quotation marks escaped.
        ('a"b mirrored_a%22b', [], "", ""),
        ('a%22b mirrored_a"b', [], "", ""),
        ('a"b', [], "a%22b", "mirrored_a%22b"),
    ],
)
def test_images_already_mirrored_are_skipped_except_with_again(
    service: Service,
    images: str,
    options: list[str],
    downloads: str,
    uploads: str,
) -> None:
    service.images |= dict.fromkeys(images.split(), PNG)
    assert service.mirror(*options).status == 0
    assert service.downloads() == downloads.split()
    results = {name for name, data in service.images.items() if data == mirror(PNG)}
    assert results == set(uploads.split())


def test_the_second_of_two_results_with_one_name_fails(service: Service) -> None:
    service.images |= {'a"b.png': PNG, "a%22b.png": PNG}
    result = service.mirror()
    assert result.status == 1
    errors = {name: line["error"] for name, line in result.report.items()}
    reason = 'its result would replace that of a"b.png'
    assert errors == {'a"b.png': None, "a%22b.png": reason}
    assert len(service.downloads()) == 1


def test_shards_are_disjoint_and_complete(service: Service) -> None:
    names = [f"{number}.png" for number in range(9)]
    service.images |= dict.fromkeys(names, PNG)
    shards = []
    for shard in ("1/2", "2/2"):
        service.requests.clear()
        assert service.mirror("--again", "--shard", shard).status == 0
        shards.append(service.downloads())
    assert all(shards)
    assert sorted(itertools.chain(*shards)) == names


def test_a_second_run_does_only_what_remains(service: Service) -> None:
    service.images |= {"a.png": PNG, "b.png": b"broken"}
    assert service.mirror().status == 1
    service.images["b.png"] = PNG
    for downloads in (["b.png"], []):
        service.requests.clear()
        assert service.mirror().status == 0
        assert service.downloads() == downloads


# ---- failures and the report -----------------------------------------------


def test_one_bad_image_never_stops_the_others(service: Service) -> None:
    service.images |= {f"{number}.png": PNG for number in range(6)}
    service.images |= {"2.png": b"<html>oops</html>", "4.png": b""}
    service.routes["GET /images/5.png"] = lambda handler: handler.respond(404, b"gone")
    result = service.mirror("--chains", "2")
    assert result.status == 1
    assert result.output.startswith("3 mirrored, 3 failed, 0 skipped, ")
    errors = {name: line["error"] for name, line in result.report.items()}
    assert [name for name in sorted(errors) if errors[name]] == [
        "2.png",
        "4.png",
        "5.png",
    ]
    assert "not an image" in errors["2.png"]
    assert errors["5.png"] == "404 Not Found: gone"
    # Downloads count even if they could not be mirrored.
    page = result.report["2.png"]
    assert (page["bytes_in"], page["bytes_out"]) == (17, 0)


def test_the_report_has_a_line_for_each_image(service: Service) -> None:
    service.images |= {"a.png": PNG, "b.png": PNG, "mirrored_b.png": PNG}
    lines = service.mirror().report
    assert set(lines) == {"a.png", "b.png"}
    assert lines["a.png"].pop("seconds") > 0
    assert lines["a.png"] == {
        "name": "a.png",
        "status": "mirrored",
        "bytes_in": len(PNG),
        "bytes_out": len(service.images["mirrored_a.png"]),
        "attempts": 2,
        "error": None,
    }
    assert lines["b.png"]["status"] == "skipped"
    assert lines["b.png"]["error"] == "already mirrored"


@pytest.mark.usefixtures("waits")
def test_attempts_count_the_retries_of_download_and_upload(service: Service) -> None:
    def busy_once(handler: ServiceHandler) -> None:
        del service.routes[f"{handler.command} {handler.path}"]
        handler.respond(503, b"busy")

    service.images["a.png"] = PNG
    service.routes["GET /images/a.png"] = busy_once
    service.routes["POST /images/"] = busy_once
    assert service.mirror("--retries", "1").report["a.png"]["attempts"] == 4


def test_a_download_is_cut_off_where_it_exceeds_max_bytes(service: Service) -> None:
    sent = []

    def pour(handler: ServiceHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:  # until the client closes
            handler.wfile.write(bytes(10**6))
            sent.append(10**6)

    service.images |= {"endless.png": b"", "small.png": PNG}
    service.routes["GET /images/endless.png"] = pour
    report = service.mirror("--max-bytes", "2MB").report
    errors = {name: line["error"] for name, line in report.items()}
    assert errors == {"endless.png": "larger than 2.0 MB", "small.png": None}
    assert sum(sent) < 10**8


def test_an_image_of_more_than_max_pixels_fails(service: Service) -> None:
    pixels = SIZE[0] * SIZE[1]
    large = saved("PNG", picture("RGB", (SIZE[0] + 1, SIZE[1])))
    service.images |= {"a.png": PNG, "large.png": large}
    lines = service.mirror("--max-pixels", str(pixels)).report
    assert lines["a.png"]["status"] == "mirrored"
    assert lines["large.png"]["error"] == f"more than {pixels} pixels"


def test_max_pixels_replaces_pillows_limit_in_the_workers(
    service: Service, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    samples = ("jpeg", "gif", "png", "tiff", "tiff lzw", "webp")
    service.images |= {name: IMAGES[name] for name in samples}
    assert service.mirror().status == 0


# ---- options ---------------------------------------------------------------


@table(
    ("text", "size"),
    [
        *(("1", 1), ("500000", 500_000), ("64MB", 64_000_000), ("64mb", 64_000_000)),
        *(("10 kB", 10_000), ("2KiB", 2048), ("2g", 2 * 10**9)),
        ("1.5GB", 1_500_000_000),
    ],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert mirror_images.byte_count(text) == size


BAD_SIZES = ["0", "-1", "many", "1TB", "", "1e9", "0.1"]
BAD_PREFIXES = ["../", "a/", "\\", "new\nline"]


@table(
    ("options", "message"),
    [
        *(([f"--max-bytes={size}"], "is not a number of bytes") for size in BAD_SIZES),
        *((["--prefix", text], "contains a slash, a backsl") for text in BAD_PREFIXES),
        (["--max-pixels", "0"], "is not an integer from 1"),
        (["--chains", "0"], "is not an integer from 1"),
        (["--serve"], "expected one argument"),
        (["--serve", "folder"], "give a URL or --serve, not both"),
        (["--port", "8000"], "--port needs --serve"),
        (["--port", "65536", "--serve", "folder"], "is not an integer from 0 to 65535"),
    ],
)
def test_unusable_options_are_refused_before_any_request(
    options: list[str], message: str, service: Service
) -> None:
    status, output, error, _ = service.mirror(*options)
    assert (status, output) == (2, "")
    assert message in error.splitlines()[-1]
    assert service.requests == []


# ---- worker processes ------------------------------------------------------

# A replaced `mirror` reaches a worker only through fork.
forks = pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked")

WorkWith = Callable[[Callable[[bytes], bytes]], None]


@pytest.fixture
def work_with(monkeypatch: MonkeyPatch) -> WorkWith:
    """Replace what workers do with the bytes of an image."""

    def replace(function: Callable[[bytes], bytes]) -> None:
        monkeypatch.setattr(mirror_images, "mirror", lambda data, *_: function(data))

    return replace


@forks
@table(
    ("fault", "error"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the worker process died (SIGS"),
        (lambda: os._exit(3), "the worker process died (exit status 3"),
        (lambda: os._exit(0), "the worker process died (exit status 0"),
        (lambda: os.open("/missing", os.O_RDONLY), "No such file or directory"),
        (lambda: time.sleep(60), "mirroring took more than "),
    ],
)
def test_only_the_image_that_ends_or_blocks_its_worker_fails(
    fault: Callable[[], object],
    error: str,
    service: Service,
    work_with: WorkWith,
    monkeypatch: MonkeyPatch,
) -> None:
    def work(data: bytes) -> bytes:
        if data == b"bad":
            fault()
        return data

    work_with(work)
    monkeypatch.setattr(mirror_images, "WORKERS", 2)
    monkeypatch.setattr(mirror_images, "IMAGE_TIMEOUT_SECONDS", 0.5)
    bad, good = ["0", "2"], ["1", "3", "4", "5"]
    service.images |= {name: b"bad" if name in bad else b"good" for name in "012345"}
    lines = service.mirror("-q").report
    assert all(lines[name]["error"].startswith(error) for name in bad)
    assert all(lines[name]["bytes_in"] == len("bad") for name in bad)
    assert all(lines[name]["status"] == "mirrored" for name in good)
    assert multiprocessing.active_children() == []


@forks
def test_an_image_is_not_blamed_for_a_worker_that_was_killed_before_it(
    service: Service, work_with: WorkWith
) -> None:
    work_with(lambda data: str(os.getpid()).encode())

    def kill_worker(handler: ServiceHandler) -> None:
        del service.routes["POST /images/"]
        (worker,) = multiprocessing.active_children()
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        handler.respond(200, b"saved")

    service.images |= {"a.png": b"a", "b.png": b"b"}
    service.routes["POST /images/"] = kill_worker
    assert service.mirror("--chains", "1").status == 0
    assert "mirrored_b.png" in service.images


def deliver_at_once(service: Service, count: int) -> None:
    """Let the service deliver no image until `count` of them are requested."""
    all_requested = threading.Barrier(count)

    def deliver(handler: ServiceHandler) -> None:
        all_requested.wait(PATIENCE)
        handler.serve_image()

    for name in list(service.images)[:count]:
        service.routes[f"GET /images/{name}"] = deliver


@forks
def test_pixel_work_runs_in_worker_processes_up_to_their_limit(
    service: Service, work_with: WorkWith, monkeypatch: MonkeyPatch
) -> None:
    work_with(lambda data: str(os.getpid()).encode())
    monkeypatch.setattr(mirror_images, "WORKERS", 2)
    service.images |= {f"{number}.png": b"" for number in range(8)}
    deliver_at_once(service, 8)
    assert service.mirror("--chains", "8").status == 0
    workers = set(service.images.values()) - {b""}
    assert str(os.getpid()).encode() not in workers
    assert 1 <= len(workers) <= 2


@forks
def test_a_large_image_passes_both_ways(service: Service, work_with: WorkWith) -> None:
    work_with(lambda data: data[::-1])
    service.images["a.png"] = bytes(range(256)) * (1 << 15)
    assert service.mirror().status == 0
    assert service.images["mirrored_a.png"] == service.images["a.png"][::-1]


@forks
def test_a_worker_inherits_no_connection(service: Service, work_with: WorkWith) -> None:
    def open_sockets(data: bytes) -> bytes:
        paths = list(Path("/proc/self/fd").iterdir())
        links = [os.readlink(path) for path in paths if path.is_symlink()]
        return str(sum(link.startswith("socket:") for link in links)).encode()

    work_with(open_sockets)
    service.images |= {f"{number}.png": b"pixels" for number in range(8)}
    assert service.mirror().status == 0
    assert set(service.images.values()) == {b"pixels", b"1"}  # to its parent


@forks
def test_library_output_is_discarded(service: Service, work_with: WorkWith) -> None:
    def work(data: bytes) -> bytes:
        os.write(1, b"noise")
        os.write(2, b"TIFFReadDirectory: Warning, noise")
        return data

    work_with(work)
    service.images["a.png"] = b"pixels"
    result = service.mirror()
    assert result.status == 0
    assert "noise" not in result.output + result.error


@forks
def test_a_workers_memory_is_limited(service: Service, work_with: WorkWith) -> None:
    work_with(lambda data: str(resource.getrlimit(resource.RLIMIT_AS)[0]).encode())
    service.images["a.png"] = b"pixels"
    assert service.mirror().status == 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < int(service.images["mirrored_a.png"]) < memory + 2**30


def test_workers_may_be_spawned(service: Service, monkeypatch: MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(mirror_images, "PROCESSES", context)
    service.images["a.png"] = PNG
    assert service.mirror().status == 0
    assert service.images["mirrored_a.png"] == mirror(PNG)


# The script, with Python code in place of the pixel work. SIGINT may be ignored by
# whatever started the tests, and children inherit that.
LAUNCHER = """
import os, resource, signal, sys, time
import mirror_images
from mirror_images import mirror
signal.signal(signal.SIGINT, signal.default_int_handler)
{first}
def work(data, *_):
    {work}
    return data
mirror_images.mirror = work
raise SystemExit(mirror_images.main(sys.argv[1:]))
"""


def run_process(
    service: Service, *options: str | Path, work: str = "pass", first: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run the script in its own process group."""
    launcher = LAUNCHER.format(work=work, first=first)
    return subprocess.run(
        [sys.executable, "-c", launcher, service.url, *options],
        check=False,
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=PATIENCE,
    )


@forks
@table(
    ("kill", "exit_status"),
    [
        # As a terminal does, if somebody leans on Ctrl-C
        ("[os.killpg(0, signal.SIGINT) for _ in range(99)]", 130),
        ("os.killpg(0, signal.SIGTERM)", 143),  # as systemd and Slurm do
        ("os.kill(os.getppid(), signal.SIGTERM)", 143),
    ],
)
def test_a_signal_ends_the_run_at_once_although_a_worker_is_busy(
    service: Service, kill: str, exit_status: int, tmp_path: Path
) -> None:
    # The workers are in the script's process group.
    group = tmp_path / "group"
    work = f"open({str(group)!r}, 'w').write(str(os.getpgid(0)))"
    work += f"; data == b'b' and ({kill}, time.sleep(60))"
    service.images |= {"a.png": b"a", "b.png": b"b", "c.png": b"c"}
    process = run_process(service, "--chains", "1", work=work)
    assert process.returncode == exit_status
    assert process.stdout.startswith("1 mirrored, 0 failed, 0 skipped, 2 not tried, ")
    assert process.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(int(group.read_text()), 0)  # no worker is left


@forks
def test_a_second_ctrl_c_does_not_keep_workers_from_being_killed(
    service: Service,
) -> None:
    again = "signal.raise_signal(signal.SIGINT), kill(worker)"
    first = "kill = mirror_images.Worker.kill"
    first += f"; mirror_images.Worker.kill = lambda worker: ({again})[1]"
    service.images["a.png"] = PNG
    work = "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    process = run_process(service, work=work, first=first)
    assert (process.returncode, process.stderr) == (130, "")
    assert process.stdout.startswith("0 mirrored, 0 failed, 0 skipped, 1 not tried, ")


@forks
def test_a_worker_does_not_outlive_its_parent(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "worker"
    work = f"open({str(path)!r}, 'w').write(str(os.getpid()))"
    work += "; os.kill(os.getppid(), signal.SIGKILL)"
    service.images["a.png"] = b"a"
    assert run_process(service, work=work).returncode == -signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):  # it has gone
        worker = os.pidfd_open(int(path.read_text()))
        assert select.select([worker], [], [], PATIENCE)[0]


SMALL_MEMORY = """
def limit_memory():
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 60_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
mirror_images.limit_memory = limit_memory
"""


@forks
def test_a_lack_of_memory_fails_one_image(service: Service, tmp_path: Path) -> None:
    report = tmp_path / "report"
    bomb = saved("AVIF", Image.new("L", (3000, 2500)), speed=10)
    assert len(bomb) < 1000
    service.images |= {"bomb.avif": bomb, "a.png": PNG, "b.png": PNG}
    options = "--chains", "1", "--report", report
    work = "data = mirror(data)"
    process = run_process(service, *options, work=work, first=SMALL_MEMORY)
    assert process.stdout.startswith("2 mirrored, 1 failed, "), process.stderr
    assert read_report(report)["bomb.avif"]["error"]


@forks
def test_chains_respect_a_low_limit_on_open_files(service: Service) -> None:
    service.images |= {f"{number}.png": b"pixels" for number in range(64)}
    deliver_at_once(service, 21)
    first = "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    process = run_process(service, "--chains", "64", first=first)
    assert process.stdout.startswith("64 mirrored, 0 failed, "), process.stderr


# ---- without a URL ---------------------------------------------------------

Samples = tuple[dict[str, bytes], str]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The files after a run without a URL by name, and what it printed."""
    parent = tmp_path_factory.mktemp("samples")
    with MonkeyPatch.context() as patch, io.StringIO() as output:
        patch.setattr("tempfile.tempdir", str(parent))
        with contextlib.redirect_stdout(output):
            assert mirror_images.main([]) == 0
        files = {path.name: path.read_bytes() for path in parent.glob("*/*")}
        return files, output.getvalue()


def test_without_a_url_the_chain_runs_on_an_embedded_server(samples: Samples) -> None:
    files, output = samples
    pattern = (
        r"No URL .* at http://127.0.0.1:\d+/images/ has 5 samples.\n5 mirrored, .*\n"
    )
    pattern += r".* are in (.*)\nSide by side: \1/side_by_side.png\n"
    assert re.fullmatch(pattern, output)
    assert opened(files["side_by_side.png"]).width == 520


def test_samples_are_mirrored_though_nobody_reads_the_output(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, mirror_images.__file__],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert (result.returncode, result.stderr) == (0, b"")
    assert list(tmp_path.glob("*/side_by_side.png"))


def test_the_samples_are_asymmetric_and_really_mirrored(samples: Samples) -> None:
    files, _ = samples
    results = [name for name in files if name.startswith("mirrored_")]
    for result in results:
        data = files[result.removeprefix("mirrored_")]
        frames = shown(files[result]), seen_in_a_mirror(data), shown(data)
        for three in zip(*frames, strict=True):
            frame, expected, original = (image.convert("RGBA") for image in three)
            assert decibels(frame, expected) >= 38
            assert decibels(frame, original) < 20
    formats = {opened(files[name]).format for name in results}
    assert formats == {"JPEG", "PNG", "GIF", "WEBP"}


def test_the_samples_have_an_orientation_transparency_and_motion(
    samples: Samples,
) -> None:
    files, _ = samples
    assert opened(files["portrait.jpg"]).getexif()[ORIENTATION] == 6
    assert opened(files["transparent.png"]).mode == "RGBA"
    assert len(shown(files["moving.gif"])) > 1


def test_side_by_side_shows_only_what_was_mirrored(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert mirror_images.main(["--prefix", "", "--shard", "2/3"]) == 0
    (path,) = tmp_path.glob("*/side_by_side.png")
    sheet = opened(path.read_bytes())
    middle, height = sheet.width // 2, sheet.height
    halves = (
        sheet.crop((0, 0, middle, height)),
        sheet.crop((middle, 0, sheet.width, height)),
    )
    difference = ImageChops.difference(*halves)
    rows = [difference.crop((0, y, middle, y + 1)).getbbox() for y in range(height)]
    equal = [len(list(group)) for box, group in itertools.groupby(rows) if not box]
    assert max(equal) < 100  # a sample beside itself would be higher


def test_side_by_side_shows_the_original_at_the_left_and_its_mirror_at_the_right() -> (
    None
):
    red, blue = (255, 0, 0), (0, 0, 255)
    image = Image.new("RGB", (200, 100), red)
    image.paste(blue, (100, 0, 200, 100))
    original, result = saved("PNG", image), saved("PNG", ImageOps.mirror(image))
    sheet = mirror_images.side_by_side([{"a.png": original, "mirrored_a.png": result}])
    row = [sheet.getpixel((x, 75)) for x in range(sheet.width)]
    runs = [colour for colour, _ in itertools.groupby(row)]
    shown = [colour for colour in runs if colour in (red, blue)]
    assert shown == [red, blue, blue, red]


# ---- the embedded server ---------------------------------------------------


FORM = "Content-Type: multipart/form-data; boundary=edge"


def form_headers(body: bytes, content_type: str = FORM) -> tuple[str, str]:
    return content_type, f"Content-Length: {len(body)}"


class Served:
    """A folder and the URL at which it is served."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        address = urllib.parse.urlsplit(url)
        self.address = address.hostname or "", address.port or 0

    def connect(self) -> socket.socket:
        patience = 20.0  # seconds, fewer than the server's own
        return socket.create_connection(self.address, patience)

    def exchange(self, sent: bytes, *, end: bool = False) -> bytes:
        """Send bytes; return everything that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(sent)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def ask(
        self, line: str, *headers: str, body: bytes = b""
    ) -> tuple[int, str, bytes]:
        """Send one request; return the status, the headers and the body received."""
        received = self.exchange(request_bytes(line, *headers, body=body))
        head, _, content = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode(), content

    def post(self, body: bytes, content_type: str = FORM) -> int:
        """Send a form; return the status of the response, which has some text."""
        headers = form_headers(body, content_type)
        status, _, content = self.ask("POST /images/", *headers, body=body)
        assert content.strip()
        return status

    def listed(self) -> list[str]:
        return self.ask("GET /images/")[2].decode().splitlines()

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture(scope="module")
def image_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageServer]:
    server = ImageServer(tmp_path_factory.mktemp("around") / "served")
    with server.running():
        yield server


@pytest.fixture
def served(image_server: ImageServer) -> Iterator[Served]:
    """An empty folder."""
    image_server.folder.mkdir()
    yield Served(image_server.folder, image_server.url)
    shutil.rmtree(image_server.folder)


def request_bytes(line: str, *headers: str, body: bytes = b"") -> bytes:
    """A request after which the connection is closed, from localhost by default."""
    lines = [f"{line} HTTP/1.1", *headers, "Connection: close", "", ""]
    if not any(header.startswith("Host:") for header in headers):
        lines.insert(1, "Host: localhost")
    return "\r\n".join(lines).encode() + body


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form: (parameters of Content-Disposition, content) for each part."""
    body = b""
    for parameters, data in parts:
        body += b"--edge\r\nContent-Disposition: form-data; "
        body += parameters.encode("utf-8", "surrogateescape") + b"\r\n"
        body += b"Content-Type: image/png\r\n\r\n" + data + b"\r\n"
    return body + b"--edge--\r\n"


UPLOAD = form(('name="file"; filename="a.png"', b"content"))


def test_the_server_lists_the_images_of_the_folder_as_text(served: Served) -> None:
    names = "b.png", "a.jpg", "ü ☃.webp", "notes.txt", ".hidden.png", "a\n.png"
    write(served.folder, *names, "not-utf-8-\udcff.png", "folder.png/in.png")
    served.folder.joinpath("loop.png").symlink_to("loop.png")
    for path in ("/images/", "/images", "/images/?page=1"):
        status, head, content = served.ask(f"GET {path}")
        assert (status, content.decode()) == (200, "a.jpg\nb.png\nü ☃.webp\n")
        assert "\r\nContent-Type: text/plain; charset=utf-8" in head


@table("content", [b"content", b"", bytes(3_000_000)])
@table("name", ["a.png", "ü ☃.png", "50%.png"])
def test_an_image_is_sent_by_name(served: Served, name: str, content: bytes) -> None:
    write(served.folder, name, content=content)
    path = "/images/" + urllib.parse.quote(name, safe="")
    status, head, received = served.ask(f"GET {path}")
    assert (status, received) == (200, content)
    assert "\r\nContent-Type: image/png" in head
    assert f"\r\nContent-Length: {len(content)}" in head


@table("path", ["", "a.png", "missing.png"])
def test_head_responds_like_get_but_without_a_body(served: Served, path: str) -> None:
    write(served.folder, "a.png")
    get_status, _, content = served.ask(f"GET /images/{path}")
    status, head, body = served.ask(f"HEAD /images/{path}")
    assert (status, body) == (get_status, b"")
    assert f"\r\nContent-Length: {len(content)}" in head


@table(
    "path",
    [
        *("/", "/imagesx", "/secret.png", "/images/missing.png", "/images/folder.png"),
        *("/images/../secret.png", "/images/%2e%2e%2fsecret.png", "/images/.."),
        *("/images/..%5csecret.png", "/images/.", "/images/%2fetc%2fpasswd"),
        *("/images//etc/passwd", "/images/a%00.png", "/images/.hidden.png"),
        *("/images/%ff.png", "http://localhost/images/", "/images/" + "x" * 256),
        "/images/pipe.png",
    ],
)
def test_any_other_path_is_not_found(served: Served, path: str) -> None:
    write(served.folder, "folder.png/in.png", ".hidden.png", "../secret.png")
    os.mkfifo(served.folder / "pipe.png")
    status, _, content = served.ask(f"GET {path}")
    assert status == 404
    assert b"pixels" not in content


@table(
    "content",
    [
        *(b"", b"\r\n", b"\r\n\r\n", b"\n--edge\n", b"\r\n--edg"),
        *(b"\r\n--\r\n--\r\n", b"\r" * 70_000, bytes(range(256)) * 300),
    ],
)
def test_content_arrives_byte_for_byte(served: Served, content: bytes) -> None:
    assert served.post(form(('filename="a.png"', content))) == 200
    assert served.contents() == {"a.png": content}


@table(
    ("parameters", "name"),
    [
        ('filename="with space.png"', "with space.png"),
        ('filename="ü ☃.png"', "ü ☃.png"),
        ('filename="quo%22te.png"', 'quo"te.png'),
        (r'filename="quo\"te.png"', 'quo"te.png'),
        ('filename="line%0D%0Abreak.png"', "line\r\nbreak.png"),
        ('filename="x%2f..%2fy%.png"', "x%2f..%2fy%.png"),
        ("FileName=plain.png; x=y", "plain.png"),
        ('name="filename=x.png"; filename="real.png"', "real.png"),
        ("filename=\"a filename*=utf-8''b.png\"", "a filename*=utf-8''b.png"),
        ("filename*=UTF-8''%e2%98%83%20a.png", "☃ a.png"),
        ("filename=\"a.png\"; filename*=utf-8''%e2%98%83.png", "☃.png"),
        ('filename="latin-\udce9.png"', "latin-\udce9.png"),
    ],
)
def test_a_file_name_may_be_escaped(served: Served, parameters: str, name: str) -> None:
    assert served.post(form((parameters, b"content"))) == 200
    assert list(served.contents()) == [name]


def test_all_files_of_a_form_are_saved_but_no_other_field(served: Served) -> None:
    write(served.folder, "a.png", content=b"old")
    parts = [('name="title"', b"not a file"), ('filename="a.png"', b"first")]
    parts += [('name="x"', b""), ('filename="b.png"', b"second")]
    assert served.post(b"preamble\r\n" + form(*parts) + b"epilogue") == 200
    assert served.contents() == {"a.png": b"first", "b.png": b"second"}


@table(
    "parameters",
    [
        *('filename=""', 'filename="."', 'filename=".."', 'filename="../x.png"'),
        *('filename="a/b.png"', 'filename="/x.png"', 'filename="a\\b.png"'),
        *('filename="C:\\\\x.png"', 'filename="\0.png"', "filename=.hidden.png"),
        *("filename*=utf-8''..%2Fx.png", "filename*=utf-8''%2Ehidden.png"),
        "filename*=utf-8''not-utf-8-%FF.png",
    ],
)
def test_an_unsafe_name_fails_the_whole_form(served: Served, parameters: str) -> None:
    before = sorted(served.folder.parent.rglob("*"))
    body = form(('filename="good.png"', b"x"), (parameters, b"content"))
    assert served.post(body) == 400
    assert sorted(served.folder.parent.rglob("*")) == before


@table("name", ["x" * 252 + ".png", "ü" * 126 + ".png"])
def test_a_name_that_is_too_long_is_called_so(served: Served, name: str) -> None:
    body = form((f'filename="{name}"', b"content"))
    status, _, message = served.ask("POST /images/", *form_headers(body), body=body)
    assert (status, message) == (507, b"cannot be saved: File name too long\n")
    assert served.contents() == {}


TYPE = "Content-Type: multipart/form-data"


@table(
    ("content_type", "body"),
    [
        *((FORM, b""), (FORM, b"no form at all"), (FORM, b"--edge--\r\n")),
        (FORM, b"--edge\r\nContent-Disposition: form-data; filename=a.png"),
        *((FORM, UPLOAD[5:]), (FORM, UPLOAD[:-12])),
        (FORM, form(('name="title"', b"no file"))),
        (FORM, form(('filename="a.png"', b"--edge is no content"))),
        (FORM, form(*[("filename=a.png", b"x")] * 2000)),
        *((TYPE, UPLOAD), (f'{TYPE}; boundary=""', UPLOAD)),
        (f"{TYPE}; boundary=other", UPLOAD),
        (f"{TYPE}; boundary*=utf-8''%E2%98%83", UPLOAD),
        (f"{TYPE}; boundary*=no-such''%FF", UPLOAD),
    ],
)
def test_a_form_without_a_file_is_refused(
    served: Served, content_type: str, body: bytes
) -> None:
    assert served.post(body, content_type) == 400
    assert served.contents() == {}


LENGTH = f"Content-Length: {len(UPLOAD)}"


@table(
    ("status", "line", "headers"),
    [
        (404, "POST /images/a.png", [FORM, LENGTH]),
        (415, "POST /images/", ["Content-Type: image/png", LENGTH]),
        (415, "POST /images/", ["Content-Disposition: form-data", LENGTH]),
        (411, "POST /images/", [FORM]),
        (411, "POST /images/", [FORM, "Transfer-Encoding: chunked"]),
        (411, "POST /images/", [FORM, "Transfer-Encoding: x, chunked", LENGTH]),
        (411, "POST /images/", [FORM, "Content-Length: -1"]),
        (411, "POST /images/", [FORM, "Content-Length: 1e3"]),
        (411, "POST /images/", [FORM, "Content-Length: 5, 5"]),
        (411, "POST /images/", [FORM, "Content-Length: " + "9" * 5000]),
        (413, "POST /images/", [FORM, "Content-Length: " + "9" * 18]),
        (413, "POST /images/", [FORM, f"Content-Length: {64 * 2**20 + 1}"]),
    ],
)
def test_a_post_is_refused_whatever_its_body_holds(
    served: Served, status: int, line: str, headers: list[str]
) -> None:
    assert served.ask(line, *headers, body=UPLOAD)[0] == status
    assert served.contents() == {}


def test_a_client_that_sends_too_much_can_read_the_response(served: Served) -> None:
    # More than sockets buffer, so that the connection would break if nobody read it.
    assert served.post(form(('filename="a.png"', bytes(64 * 2**20)))) == 413


@table("share", [0.0, 0.5, 0.99])
def test_an_upload_that_breaks_off_leaves_nothing(served: Served, share: float) -> None:
    body = form(('filename="a.png"', bytes(90_000)), ('filename="b.png"', b"y"))
    sent = body[: int(len(body) * share)]
    request = request_bytes("POST /images/", *form_headers(body), body=sent)
    served.exchange(request, end=True)
    assert served.contents() == {}


def test_an_upload_appears_only_when_complete(served: Served) -> None:
    write(served.folder, "a.png", content=b"old")
    body = form(('filename="a.png"', b"new"), ('filename="b.png"', bytes(90_000)))
    request = request_bytes("POST /images/", *form_headers(body), body=body)
    with served.connect() as connection:
        connection.sendall(request[:80_000])
        assert served.listed() == ["a.png"]
        assert served.ask("GET /images/a.png")[2] == b"old"
        connection.sendall(request[80_000:])
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
    assert served.listed() == ["a.png", "b.png"]
    assert served.contents() == {"a.png": b"new", "b.png": bytes(90_000)}


def test_an_image_cannot_replace_a_folder(served: Served) -> None:
    served.folder.joinpath("a.png").mkdir()
    assert served.post(UPLOAD) == 507
    assert [path.name for path in served.folder.iterdir()] == ["a.png"]
    assert served.folder.joinpath("a.png").is_dir()


def test_a_full_disk_is_reported_and_leaves_nothing_behind(served: Served) -> None:
    write(served.folder, "a.png", content=b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert served.post(form(('filename="a.png"', bytes(30_000)))) == 507
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert served.contents() == {"a.png": b"old"}


def test_servers_starting_on_one_folder_disturb_no_upload(served: Served) -> None:
    body = form(('filename="a.png"', bytes(2_000_000)))
    statuses = []

    def upload() -> None:
        for _ in range(20):
            statuses.append(served.post(body))

    uploads = threading.Thread(target=upload)
    uploads.start()
    while uploads.is_alive():
        ImageServer(served.folder).server_close()
    assert statuses == [200] * 20


HERE = "Host: localhost:{port}"


@table("method", ["GET", "POST"])
@table(
    ("status", "headers"),
    [
        (200, ["Host: 127.0.0.1:{port}"]),
        (200, ["Host: localhost"]),
        (200, ["Host: [::1]:{port}"]),
        (200, [HERE, "Origin: http://localhost:{port}"]),
        (403, ["Host: evil.example:{port}"]),
        (403, ["Host: localhost.evil.example"]),
        (403, ["Host: 192.168.0.1:{port}"]),
        (403, ["Host:"]),
        (403, [HERE, "Origin: http://localhost:1"]),
        (403, [HERE, "Origin: https://localhost:{port}"]),
        (403, [HERE, "Origin: null"]),
        (403, ["Host: evil.example:{port}", "Origin: http://evil.example:{port}"]),
    ],
)
def test_requests_are_served_unless_another_sites_page_sent_them(
    served: Served, status: int, headers: list[str], method: str
) -> None:
    write(served.folder, "there.png")
    path = "/images/there.png" if method == "GET" else "/images/"
    sent = [header.format(port=served.address[1]) for header in headers]
    sent += form_headers(UPLOAD)
    found, _, content = served.ask(f"{method} {path}", *sent, body=UPLOAD)
    assert found == status
    allowed = status == 200
    assert (b"pixels" in content) == (allowed and method == "GET")
    assert ("a.png" in served.contents()) == (allowed and method == "POST")


def test_a_client_that_asks_first_is_told_to_continue(served: Served) -> None:
    headers = *form_headers(UPLOAD), "Expect: 100-continue"
    status, _, rest = served.ask("POST /images/", *headers, body=UPLOAD)
    assert status == 100
    assert rest.startswith(b"HTTP/1.1 200 OK")
    assert served.contents() == {"a.png": b"content"}


def test_a_connection_serves_many_requests(served: Served) -> None:
    write(served.folder, "empty.png", content=b"")
    requests = [
        request_bytes("POST /images/", *form_headers(UPLOAD), body=UPLOAD),
        request_bytes("GET /images/empty.png"),
        request_bytes("GET /images/a.png"),
    ]
    kept_alive = b"".join(requests).replace(b"Connection: close\r\n", b"")
    received = served.exchange(kept_alive + requests[-1])
    assert received.count(b"HTTP/1.1 200 OK") == 4
    assert received.count(b"content") == 2


GET = b"GET /images/ HTTP/1.1\r\n"
LOCAL = b"Host: localhost\r\n\r\n"


@table(
    ("status", "sent"),
    [
        (None, b""),
        (400, b"garbage\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99)),  # TLS
        (400, GET + LOCAL + bytes(99)),
        (403, GET + b":\r\n \r\n\0: \0\r\nx\r\n  y\r\n\r\n"),
        (403, b"POST /images/ HTTP/1.1\r\nHost: local"),
        (404, b"GET /images/a\0b HTTP/1.1\r\n" + LOCAL),
        (414, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"),
        (431, GET + b"X: y\r\n" * 5000 + b"\r\n"),
        (501, b"DELETE /images/a.png HTTP/1.1\r\n" + LOCAL),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ],
)
def test_garbage_gets_an_error_and_does_not_harm_the_server(
    served: Served, capfd: Capture, status: int | None, sent: bytes
) -> None:
    received = served.exchange(sent, end=True)
    statuses = re.findall(rb"^HTTP/1\.1 ([0-9]+)", received, re.MULTILINE)
    assert status is None or int(statuses[-1]) == status
    assert served.post(UPLOAD) == 200
    assert served.contents() == {"a.png": b"content"}
    assert capfd.readouterr().err == ""


BAD_NAME = form(("filename=<i>/&.png", b""))


@table(
    ("sent", "message"),
    [
        (b"GET <i> & HTTP/1.1\r\n\r\n", "Bad request syntax ('GET <i> & HTTP/1.1')"),
        (
            request_bytes("POST /images/", *form_headers(BAD_NAME), body=BAD_NAME),
            "not a valid image name: '<i>/&.png'",
        ),
    ],
)
def test_an_error_is_plain_text(served: Served, sent: bytes, message: str) -> None:
    head, _, body = served.exchange(sent).partition(b"\r\n\r\n")
    assert b"\r\nContent-Type: text/plain; charset=utf-8\r\n" in head
    assert body.decode() == message + "\n"


def test_hundreds_of_idle_clients_block_no_one(served: Served, capfd: Capture) -> None:
    request = request_bytes("POST /images/", FORM, "Content-Length: 50000000")
    with contextlib.ExitStack() as stack:
        for number in range(200):
            connection = stack.enter_context(served.connect())
            # It will end with an RST.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(request[:number])
        assert served.post(UPLOAD) == 200
    assert served.listed() == ["a.png"]
    assert capfd.readouterr().err == ""


def test_a_client_that_stops_sending_is_disconnected(
    served: Served, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageHandler, "timeout", 0.1)
    headers = FORM, "Content-Length: 5000"
    # This returns, although the body has no end.
    served.exchange(request_bytes("POST /images/", *headers, body=UPLOAD))
    assert served.contents() == {}


# ---- --serve ---------------------------------------------------------------


@contextlib.contextmanager
def serving(
    folder: Path, *options: str
) -> Iterator[tuple[Served, "subprocess.Popen[str]"]]:
    """Run `--serve` in a process of its own."""
    arguments = [str(folder), "--port", "0", *options]
    with running_script("mirror_images.py", "--serve", *arguments) as process:
        assert process.stdout
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:[0-9]+/images/", line)
        assert url
        yield Served(folder, url[0]), process


def test_a_killed_server_leaves_whole_images_only(tmp_path: Path) -> None:
    images = {f"{number}.png": bytes([number]) * 4_000_000 for number in range(4)}
    with serving(tmp_path) as (served, process):

        def upload(name: str) -> None:
            body = form((f'filename="{name}"', images[name]))
            request = request_bytes("POST /images/", *form_headers(body), body=body)
            with contextlib.suppress(OSError):
                while served.exchange(request):
                    pass

        uploads = [threading.Thread(target=upload, args=(name,)) for name in images]
        for thread in uploads:
            thread.start()
        while len(served.listed()) < len(uploads):
            pass
        process.kill()
        for thread in uploads:
            thread.join()
    saved = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    assert saved == images


@table(
    ("end", "options", "status", "printed"),
    [(signal.SIGINT, [], 0, "\n"), (signal.SIGTERM, ["-v"], 143, "")],
)
def test_serve_runs_until_it_is_interrupted_or_terminated_and_v_logs_requests(
    tmp_path: Path, end: signal.Signals, options: list[str], status: int, printed: str
) -> None:
    with serving(tmp_path / "new" / "folder", *options) as (served, process):
        assert served.post(UPLOAD) == 200
        process.send_signal(end)
        output, error = process.communicate(timeout=PATIENCE)
    # A line break, so that the shell's prompt does not end up behind ^C.
    assert (process.returncode, output) == (status, printed)
    log = r'INFO 127\.0\.0\.1 "POST /images/ HTTP/1\.1" 200 -\n' if options else ""
    assert re.fullmatch(log, error)


def test_a_port_in_use_gives_status_2(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status = mirror_images.main(["--serve", str(tmp_path), "--port", port])
    output, error = capsys.readouterr()
    assert (status, output) == (2, "")
    reason = f"{tmp_path} on port {port}: Address already in use"
    assert error == f"mirror_images.py: error: cannot serve {reason}\n"


def test_a_file_cannot_be_served_as_a_folder(tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path, "file")
    assert mirror_images.main(["--serve", str(tmp_path / "file"), "--port", "0"]) == 2
    output, error = capsys.readouterr()
    assert (output, error.count("\n")) == ("", 1)
    assert error.startswith(
        f"mirror_images.py: error: cannot serve {tmp_path / 'file'}"
    )
