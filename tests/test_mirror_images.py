"""Tests of mirror_images.py: the pixels, the chains, the embedded server.

Every image is drawn here: small, without any symmetry, and the same at every run.
What a viewer shows of a file is what Pillow's exif_transpose makes of it.
"""

import contextlib
import http.client
import io
import itertools
import json
import math
import os
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
from mirror_images import ImageError, ImageHandler, ImageServer, mirror

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
    draw.rectangle((4 + 5 * number, 3 + number, 10 + 5 * number, 7), "#e03010")
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
    data = saved(photo("CMYK"), "JPEG", quality=90)
    # An Adobe marker (Adobe TN 5116) whose transform says YCCK.
    marker = b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0"
    at = data.index(marker) + len(marker)
    assert_close(data[:at] + b"\2" + data[at + 1 :], 38)


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
    pixels = [[(0,), (1,), (2,)], [(2,), (2,), (0,)]]
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
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run.append)
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", run.append)
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
