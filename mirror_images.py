# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx~=0.28.1", "Pillow~=13.0", "sniffio~=1.3"]
# ///
"""Mirror all images of a server left-to-right: list, download, mirror, upload.

    python mirror_images.py [URL] [--chains N] [--prefix TEXT] [--report FILE] ...
    python mirror_images.py --serve FOLDER [--port N]

`GET URL` answers with a list of names, plain text, one a line; `GET URL/NAME` with an
image; `POST URL` saves one. Many download -> mirror -> upload chains run at once on
one event loop; the pixel work runs in threads. Without a URL, all of this happens on
an embedded server with sample pictures, so that there is something to look at.

For other code: `mirror(data: bytes) -> bytes` is the pixel work alone.

Exit status: 0 everything was mirrored, 1 some images failed, 2 it could not run,
130 interrupted.
"""

import argparse
import asyncio
import codecs
import contextlib
import email.message
import http
import http.server
import io
import itertools
import logging
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from PIL import (
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    JpegImagePlugin,
    UnidentifiedImageError,
)

from upload_images import (
    Batch,
    Connection,
    Failure,
    Outcome,
    Parser,
    Server,
    Trouble,
    add_shared_options,
    console,
    file_chunks,
    folder_path,
    guarded,
    http_url,
    image_list,
    in_shard,
    is_image,
    media_type,
    printable,
    recorded,
    run_batch,
    run_chains,
    say,
    server_at,
    whole_number,
)

logger = logging.getLogger(__name__)

# Safe to open from a stranger. Not EPS, for one: Pillow runs Ghostscript on it.
# MPO is opened by the JPEG plugin.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# Against the true flip of a photo: 40 dB or more, at 1.5 times the size of quality 80.
LOSSY_QUALITY = 90
MAX_PAGES = 1000  # of a TIFF: Pillow takes time with the square of their number
STRIP = 1 << 20  # pixels of a PNG that are filtered and compressed together
IPTC = 0x0404  # number of an image resource (Adobe Photoshop File Formats)
PROCESSORS = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count() or 1
)


class ImageError(ValueError):
    """These bytes cannot be mirrored; the text says why."""


# ---- chains ----------------------------------------------------------------


class Mirroring:
    """What the download -> mirror -> upload chains of a run share."""

    def __init__(self, server: Server, prefix: str, max_bytes: int) -> None:
        self.server = server
        self.prefix = prefix
        self.max_bytes = max_bytes
        # Each image holds its decoded pixels meanwhile: no more of them than can be
        # worked on.
        self.processors = asyncio.Semaphore(PROCESSORS)

    async def chain(self, connection: Connection, name: str) -> Outcome:
        """Download one image, mirror it, upload the result.

        What goes wrong with it stands in the outcome.
        """
        outcome = Outcome(name, "mirrored", {"bytes_in": 0, "bytes_out": 0})
        with recorded(outcome, connection):
            check_name(name)
            url = image_url(self.server.url, name)
            _, data = await connection.get(url, self.max_bytes)
            async with self.processors:
                try:
                    result = await asyncio.to_thread(mirror, data)
                except ImageError as error:
                    raise Failure(str(error)) from error
            name = self.prefix + name
            await connection.post(name, len(result), lambda: [result])
            outcome.sizes = {"bytes_in": len(data), "bytes_out": len(result)}
        return outcome


def check_name(name: str) -> None:
    """Raise Failure for a name that could lead anywhere but to an image of the list."""
    if name in (".", "..") or "/" in name or "\\" in name:
        raise Failure("the list should give names, not paths or URLs")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise Failure("the name has control characters in it")


def image_url(url: str, name: str) -> str:
    """The URL of the image `name` under `url`, whose query string stays."""
    base, query, parameters = url.partition("?")
    quoted = urllib.parse.quote(name, safe="")
    return f"{base.removesuffix('/')}/{quoted}{query}{parameters}"


async def mirror_all(
    server: Server, arguments: argparse.Namespace, batch: Batch
) -> None:
    """Mirror what the server's list shows as not yet mirrored; count it in `batch`."""
    prefix = arguments.prefix
    names = await image_list(server)
    done: set[str] = set()
    if prefix:
        done = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        names = [name for name in names if not name.startswith(prefix)]
    names = [name for name in names if in_shard(name, arguments.shard)]
    if arguments.again:
        done = set()
    batch.total = len(names)
    for name in names:
        if name in done:
            sizes = {"bytes_in": 0, "bytes_out": 0}
            batch.finish(Outcome(name, "skipped", sizes, error="already mirrored"))
    left = [name for name in names if name not in done]
    work = Mirroring(server, prefix, arguments.max_bytes)
    # Python's own executor has no more than 32 threads; some look up host names.
    threads = ThreadPoolExecutor(PROCESSORS + 4)
    asyncio.get_running_loop().set_default_executor(threads)
    await run_chains(server, min(arguments.chains, len(left)), left, work.chain, batch)


# ---- pixels ----------------------------------------------------------------


def mirror(data: bytes) -> bytes:
    """Mirror an image file left-to-right: what a viewer shows of it, seen in a mirror.

    The result has the same format. EXIF orientation is applied first and its tag
    dropped; the other metadata stay (an EXIF thumbnail goes: it would show the image
    unmirrored). GIF and PNG stay exact, every frame of an animation too; JPEG keeps
    its quantisation tables and subsampling, 45 to 60 dB against the true flip (34 to 46
    where the width is no multiple of a block, 8 or 16 pixels, so that the blocks fall
    elsewhere); WebP stays lossless if it was. Pages of a TIFF and frames of an animated
    WebP or AVIF are all mirrored. An MPO photo becomes the JPEG that viewers show.

    Raises ImageError, and nothing else, if `data` is no image in one of FORMATS, is
    damaged, too large (Pillow's MAX_IMAGE_PIXELS; twice that for all frames together;
    MAX_PAGES of a TIFF) or cannot be written back without loss of depth.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size)
            kind = image.format or ""
            return ENCODERS[kind](image, data)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not an image that can be mirrored, but {what_is(data)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"too large an image: {error}") from error
    except (IndexError, EOFError, struct.error) as error:
        raise ImageError("a damaged image: there are bytes missing") from error
    except MemoryError as error:
        raise ImageError("too large an image for this machine's memory") from error
    except Exception as error:  # Pillow has no common class for what bad bytes do to it
        reason = str(error) or type(error).__name__
        raise ImageError(
            f"a damaged image, or one of an unusual kind: {reason}"
        ) from error


def check_size(size: tuple[int, int], before: int = 0) -> int:
    """Raise ImageError for a decompression bomb.

    `before` is the number of pixels in the frames before it; what comes back is that
    number for the next frame. The frames themselves are counted, for what an animation
    says of its size and their number may be untrue.
    """
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize
    pixels = size[0] * size[1]
    if pixels > limit:
        raise ImageError(f"too large an image: {pixels} pixels, the limit is {limit}")
    pixels = max(pixels, limit // 20_000)  # the smallest frame takes its time, too
    if before + pixels > 2 * limit:
        words = f"more than {2 * limit} pixels in all its frames"
        raise ImageError(f"too large an animation: {words}")
    return before + pixels


def what_is(data: bytes) -> str:
    """What `data`, which is no image in one of FORMATS, seems to be."""
    start = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, words in {
        b"<!doctype html": "an HTML page",
        b"<html": "an HTML page",
        b"<svg": "an SVG drawing",
        b"<?xml": "an XML or SVG document",
        b"%pdf": "a PDF document",
        b"%!ps": "an EPS or PostScript document",
        b"\xc5\xd0\xd3\xc6": "an EPS or PostScript document",
        b"pk\3\4": "a ZIP archive",
        b"\x1f\x8b": "gzip data",
        b"\x89png": "a damaged PNG image",
        b"\xff\xd8\xff": "a damaged JPEG image",
        b"gif8": "a damaged GIF image",
        b"ii*\0": "a damaged TIFF image, or one of an unusual kind",
        b"mm\0*": "a damaged TIFF image, or one of an unusual kind",
        b"{": "JSON",
        b"[": "JSON",
    }.items():
        if start.lower().startswith(beginning):
            return words
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("latin-1")
        if brand in ("avif", "avis"):
            return "a damaged AVIF image"
        return f"a '{printable(brand)}' file (HEIC, or a film?)"
    if not data:
        return "nothing at all (0 bytes)"
    with contextlib.suppress(UnicodeDecodeError):
        # Not decode(): the end may have cut a character in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
        if not re.search(r"[\0-\x08\x0e-\x1f\x7f]", text):
            return f"text that begins '{' '.join(text[:40].split())}'"
    first = data[:8].hex(" ")
    return f"{len(data)} bytes of an unknown or damaged format ({first} …)"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Save `image` with Pillow; what is None in `options` is left to Pillow."""
    options = {key: value for key, value in options.items() if value is not None}
    # Other encoders gain nothing by a file, and that of JPEG 2000 hangs on a full disk.
    with scratch_file() if kind == "JPEG" else io.BytesIO() as file:
        try:
            image.save(file, kind, **options)
        except OSError as error:
            raise ImageError(f"the result cannot be written: {error}") from error
        file.seek(0)
        result = file.read()
    if kind == "JPEG" and not result.endswith(b"\xff\xd9"):  # ITU-T T.81: EOI
        # Pillow takes a write that was cut short for a whole one.
        raise ImageError("the result cannot be written: is the disk full?")
    return result


def scratch_file() -> BinaryIO:
    """A real file that has no name, in memory where the system has such a thing.

    Pillow releases the GIL while it encodes a JPEG into a file descriptor, but not
    into a BytesIO: two threads reach 1.9 times the speed of one, instead of 1.3.
    """
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("mirror"), "w+b")
    return tempfile.TemporaryFile()


# EXIF orientation -> how to turn the stored pixels so that viewers' image is mirrored;
# None where they already are the mirror image of what viewers show.
TURNS = {
    2: None,
    3: Image.Transpose.FLIP_TOP_BOTTOM,
    4: Image.Transpose.ROTATE_180,
    5: Image.Transpose.ROTATE_270,
    6: Image.Transpose.TRANSPOSE,
    7: Image.Transpose.ROTATE_90,
    8: Image.Transpose.TRANSVERSE,
}
ORIENTATION = ExifTags.Base.Orientation


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """`image`, stored in an EXIF orientation (1 to 8), upright and mirrored."""
    method = TURNS.get(orientation, Image.Transpose.FLIP_LEFT_RIGHT)
    return image.copy() if method is None else image.transpose(method)


def orientation_of(image: Image.Image) -> int:
    """The orientation that viewers turn `image` by; EXIF says it, or else XMP."""
    orientation = 1
    with contextlib.suppress(Exception):  # viewers ignore unreadable EXIF data, too
        orientation = image.getexif().get(ORIENTATION, 1)
    return orientation


def clean_exif(exif: bytes | None) -> bytes | None:
    """EXIF data without orientation and thumbnail, which is not mirrored; None if none.

    All else stays as it is and where it is: the offsets in a maker's note are known to
    nobody but the maker. (Exif 2.32, section 4.6.2; a directory is a count, 12 bytes an
    entry, and where the next directory is: the thumbnail's.)
    """
    exif = re.sub(b"^(Exif\0\0)+", b"", exif or b"")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack(order + "H", exif[start : start + 2] or b"\0\0")
    end = start + 2 + 12 * count
    entries = [exif[at : at + 12] for at in range(start + 2, end, 12)]
    tag = struct.pack(order + "H", ORIENTATION)
    kept = [entry for entry in entries if not entry.startswith(tag)]
    if not kept or end > len(exif):
        return None
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept)
    rest = exif[end + 4 :]
    return exif[:start] + directory.ljust(end + 4 - start, b"\0") + rest


def clean_xmp(xmp: bytes | None) -> bytes | None:
    """XMP data without orientation; None if none."""
    attribute = rb"""tiff:Orientation\s*=\s*["'][^"']*["']"""
    element = rb"<tiff:Orientation>[^<]*</tiff:Orientation>"
    return re.sub(attribute + b"|" + element, b"", xmp) if xmp else None


def mirror_still(image: Image.Image, **options: Any) -> bytes:
    """Mirror the current frame, with the metadata that Pillow can write."""
    image.load()  # some metadata come behind the pixels
    info = image.info
    return encoded(
        turn(image, orientation_of(image)),
        "JPEG" if image.format == "MPO" else str(image.format),
        **{
            "dpi": info.get("dpi"),
            "icc_profile": info.get("icc_profile"),
            "exif": clean_exif(info.get("exif")),
            "xmp": clean_xmp(info.get("xmp")),
            **options,
        },
    )


def mirror_jpeg(image: Image.Image, data: bytes) -> bytes:
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    tables, sampling = image.quantization, JpegImagePlugin.get_sampling(image)
    if image.mode == "CMYK":
        # YCCK comes back as CMYK, where a table for chroma would ruin a colour.
        tables = {0: tables[image.layer[0][3]]}
    elif image.mode == "RGB" and sampling < 0:
        sampling = 0  # one that Pillow cannot write; 4:4:4 loses nothing
    exif = clean_exif(image.info.get("exif"))
    return mirror_still(
        image,
        exif=exif and b"Exif\0\0" + exif,
        extra=iptc_segment(image.info.get("photoshop", {}).get(IPTC)),
        qtables=tables,
        subsampling=sampling,
        progressive=bool(image.info.get("progressive")),
        keep_rgb=image.mode == "RGB" and image.info.get("adobe_transform") == 0,
    )


def mirror_bmp(image: Image.Image, data: bytes) -> bytes:
    if image.mode != "RGBA":
        return mirror_still(image)
    # Pillow writes no alpha channel. Only the pixels change places, 4 bytes each.
    (start,) = struct.unpack_from("<I", data, 10)
    end = start + 4 * image.width * image.height
    pixels = Image.frombytes("RGBA", image.size, data[start:end])
    return data[:start] + turn(pixels, 1).tobytes() + data[end:]


def iptc_segment(iptc: bytes | None) -> bytes | None:
    """The segment of a JPEG that holds IPTC data: captions, rights; None if none.

    Photoshop's other resources stay behind; a thumbnail, for one, is not mirrored.
    """
    if not iptc:
        return None
    block = struct.pack(">4sHHI", b"8BIM", IPTC, 0, len(iptc)) + iptc
    body = b"Photoshop 3.0\0" + block + bytes(len(iptc) % 2)
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


def mirror_jpeg2000(image: Image.Image, data: bytes) -> bytes:
    start = data.find(b"\xff\x4f\xff\x51")  # of the codestream (ITU-T T.800, A.5.1)
    (components,) = struct.unpack_from(">H", data, start + 40)
    depths = data[start + 42 : start + 42 + 3 * components : 3]  # less one, and a sign
    if image.mode != "I;16" and any(depth & 127 > 7 for depth in depths):
        raise ImageError("a JPEG 2000 image with 16 bits a channel: it would lose some")
    return mirror_still(image, no_jp2=start == 0)


def mirror_ppm(image: Image.Image, data: bytes) -> bytes:
    assert isinstance(image, ImageFile.ImageFile)
    arguments = image.tile[0].args  # a raw mode, or one and the largest value
    if image.mode == "RGB" and isinstance(arguments, tuple) and arguments[1] > 255:
        raise ImageError("a PPM image with 16 bits a channel: it would lose some")
    return mirror_still(image)


def mirror_frames(image: Image.Image, **options: Any) -> bytes:
    """Mirror every frame of a WebP or AVIF image."""
    frames, starts, pixels = [], [], 0
    for number in range(getattr(image, "n_frames", 1)):
        pixels = check_size(image.size, pixels)
        image.seek(number)
        image.load()
        frames.append(turn(image, orientation_of(image)))
        starts.append(image.info.get("timestamp", 0))
    if len(frames) == 1:
        return mirror_still(image, **options)
    # Differences, so that what rounding takes from one frame the next one gets.
    ends = [*starts[1:], starts[-1] + image.info.get("duration", 0)]
    info = image.info
    return encoded(
        frames[0],
        str(image.format),
        save_all=True,
        append_images=frames[1:],
        duration=[end - start for start, end in zip(starts, ends, strict=True)],
        loop=info.get("loop"),
        background=info.get("background"),
        icc_profile=info.get("icc_profile"),
        exif=clean_exif(info.get("exif")),
        xmp=clean_xmp(info.get("xmp")),
        **options,
    )


def mirror_avif(image: Image.Image, data: bytes) -> bytes:
    subsampling = None if image.mode == "L" else "4:4:4"
    return mirror_frames(image, quality=LOSSY_QUALITY, subsampling=subsampling)


def mirror_webp(image: Image.Image, data: bytes) -> bytes:
    if is_lossless_webp(data):
        return mirror_frames(image, lossless=True, exact=True)
    return mirror_frames(image, quality=LOSSY_QUALITY)


def is_lossless_webp(data: bytes) -> bool:
    """Whether the bitstream of any frame is VP8L (RFC 9649, section 2)."""
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"VP8L":
            return True
        # A frame of an animation holds chunks of its own behind 16 bytes.
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)
    return False


# Not the tags that say how the pixels are stored: those are for Pillow to write.
TIFF_TAGS = {
    *(ExifTags.Base.DocumentName, ExifTags.Base.ImageDescription, ExifTags.Base.Make),
    *(ExifTags.Base.Model, ExifTags.Base.XResolution, ExifTags.Base.YResolution),
    *(ExifTags.Base.ResolutionUnit, ExifTags.Base.Software, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.XMLPacket),
    *(ExifTags.Base.PageName, ExifTags.Base.PageNumber, ExifTags.Base.IPTCNAA),
    *(ExifTags.Base.ImageResources, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}


def mirror_tiff(image: Image.Image, data: bytes) -> bytes:
    assert isinstance(image, ImageFile.ImageFile)
    if getattr(image, "n_frames", 1) > MAX_PAGES:
        raise ImageError(f"a TIFF of more than {MAX_PAGES} pages")
    pages, pixels = [], 0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        pixels = check_size(image.size, pixels)
        if image.mode in ("RGB", "RGBA", "CMYK") and ";16" in str(image.tile):
            raise ImageError("a TIFF with 16 bits a channel: it would lose 8 of them")
        image.load()  # turns the pixels upright
        page = turn(image, 1)
        tags = image.getexif()
        for tag in set(tags) - TIFF_TAGS:
            del tags[tag]
        for tag in (ExifTags.Base.IPTCNAA, ExifTags.Base.ImageResources):
            # Where a TIFF says that they are numbers, Pillow reads the first alone.
            if not isinstance(tags.get(tag, b""), bytes):
                del tags[tag]
        if xmp := clean_xmp(tags.pop(ExifTags.Base.XMLPacket, None)):
            tags[ExifTags.Base.XMLPacket] = xmp
        page.encoderinfo = {"exif": tags}
        if ExifTags.IFD.Exif in tags or ExifTags.IFD.GPSInfo in tags:
            # Pillow cannot have libtiff write a directory inside of another.
            page.encoderinfo["compression"] = "raw"
        elif image.info.get("compression") == "jpeg":
            page.encoderinfo["quality"] = 95
        pages.append(page)
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def mirror_gif(image: Image.Image, data: bytes) -> bytes:
    """Mirror a GIF frame by frame (GIF89a): only pixels and positions change.

    Pillow would draw every frame in full and look for a new palette, with a loss.
    """
    # A frame may reach beyond the screen; viewers make it larger then.
    width, height = struct.unpack_from("<HH", data, 6)
    for start, _, kind in gif_blocks(data):
        if kind == GIF_FRAME:
            left, top, w, h = struct.unpack_from("<4H", data, start + 1)
            width, height = max(width, left + w), max(height, top + h)
    check_size((width, height))
    out = bytearray(data[: 13 + gif_table_size(data[10])])
    struct.pack_into("<H", out, 6, width)
    pixels = 0
    for start, end, kind in gif_blocks(data):
        if kind == GIF_FRAME:
            left, top, w, h, flags = struct.unpack_from("<HHHHB", data, start + 1)
            pixels = check_size((w, h), pixels)
            table_end = start + 10 + gif_table_size(flags)
            # The pixels are not written interlaced, whatever they were.
            out += struct.pack(
                "<BHHHHB", kind, width - left - w, top, w, h, flags & ~64
            )
            out += data[start + 10 : table_end]
            out += mirror_gif_pixels(w, h, flags & 64, data[table_end:end])
        elif end - start > 3:  # Pillow reads too far where an extension is empty
            out += data[start:end]
    return bytes(out + b";")


GIF_EXTENSION, GIF_FRAME, GIF_END = b"!,;"


def gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and kind of each block behind the header of a GIF."""
    start = 13 + gif_table_size(data[10])
    while start < len(data) and data[start] != GIF_END:
        kind = data[start]
        if kind == GIF_EXTENSION:
            end = start + 2
        elif kind == GIF_FRAME:
            end = start + 11 + gif_table_size(data[start + 9])
        else:  # padding that some programs leave behind
            start += 1
            continue
        while data[end]:
            end += 1 + data[end]
        yield start, end + 1, kind
        start = end + 1


def gif_table_size(flags: int) -> int:
    """Bytes of the colour table that a descriptor with these flags announces."""
    return 3 << 1 + (flags & 7) if flags & 128 else 0


def mirror_gif_pixels(width: int, height: int, interlace: int, lzw: bytes) -> bytes:
    """Mirror a frame's table-based image data: LZW code size, sub-blocks."""
    screen = struct.pack("<6sHH3x", b"GIF89a", width, height)
    frame = struct.pack("<B4xHHB", GIF_FRAME, width, height, interlace)
    with Image.open(io.BytesIO(screen + frame + lzw + b";"), formats=["GIF"]) as image:
        descriptor, *blocks = GifImagePlugin.getdata(turn(image, 1))
    return b"".join([descriptor, *blocks])[len(frame) :]


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# (bit depth, colour type) -> Pillow's raw mode for rows as PNG stores them
PNG_ROWS = {
    (1, 0): "1",
    (2, 0): "L;2",
    (4, 0): "L;4",
    (8, 0): "L",
    (16, 0): "I;16B",
    (1, 3): "P;1",
    (2, 3): "P;2",
    (4, 3): "P;4",
    (8, 3): "P",
    (8, 2): "RGB",
    (8, 4): "LA",
    (8, 6): "RGBA",
}
# Chunks that stay true when the pixels move, beside those whose names say so.
PNG_KEPT = {
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"bKGD"),
    *(b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"mDCV", b"cLLI"),
    *(b"hIST", b"sPLT", b"tIME"),
}
XMP_KEYWORD = b"XML:com.adobe.xmp\0\0"  # and that it is not compressed


def mirror_png(image: Image.Image, data: bytes) -> bytes:
    """Mirror a PNG frame by frame (PNG 3rd edition): only pixels and positions change.

    Pillow would reduce 16-bit colour to 8 bits and lose most chunks.
    """
    chunks = list(png_chunks(data))
    check_png_frames(chunks)
    orientation = png_orientation(chunks)
    header = chunks[0][1]
    canvas = struct.unpack(">II", header[:8])
    size = canvas  # of the frame whose pixels come next
    sequence = 0  # number of the next animation chunk that has one
    count = 0  # of pixels
    out = bytearray(PNG_SIGNATURE)  # a million chunks added to bytes would take hours
    for kind, group in itertools.groupby(chunks, lambda chunk: chunk[0]):
        bodies = [body for _, body in group]
        if kind in (b"IDAT", b"fdAT"):
            number = struct.pack(">I", sequence) if kind == b"fdAT" else b""
            sequence += len(number) // 4
            pixels = b"".join(body[len(number) :] for body in bodies)
            count = check_size(size, count)
            frame_header = struct.pack(">II", *size) + header[8:]
            bodies = [number + mirror_png_pixels(frame_header, pixels, orientation)]
        for body in bodies:
            if kind == b"IHDR":
                _, _, *turned = turned_box((0, 0, *canvas), canvas, orientation)
                body = struct.pack(">II", *turned) + body[8:12] + b"\0"  # no interlace
            elif kind == b"fcTL":
                w, h, x, y = struct.unpack(">4I", body[4:20])
                size = w, h
                if x + w > canvas[0] or y + h > canvas[1]:
                    raise ImageError("a damaged PNG: a frame beyond its edges")
                x, y, w, h = turned_box((x, y, w, h), canvas, orientation)
                body = struct.pack(">5I", sequence, w, h, x, y) + body[20:]
                sequence += 1
            elif kind == b"eXIf":
                body = clean_exif(body) or b""
            elif kind == b"iTXt" and body.startswith(XMP_KEYWORD):
                body = clean_xmp(body) or b""
            if body or kind == b"IEND":
                out += png_chunk(kind, body)
    return bytes(out)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG that stay true when its pixels move, as (type, data)."""
    kind, at = b"", len(PNG_SIGNATURE)
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        at += 12 + length
        if kind in PNG_KEPT or kind[3:].islower():  # section 5.4: safe to copy
            if checksum == zlib.crc32(kind + body):
                yield kind, body
            elif kind[:1].isupper() or kind in (b"fcTL", b"fdAT"):
                raise ImageError(f"a damaged PNG: wrong checksum of {kind!r}")
        elif kind[:1].isupper():  # section 13.2: critical
            raise ImageError(f"a damaged or unusual PNG: it has a chunk {kind!r}")


def check_png_frames(chunks: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ImageError unless all frames are there, in order (section 5.6)."""
    letters = {b"IDAT": "D", b"fcTL": "C", b"fdAT": "F"}
    order = "".join(letters.get(kind, "") for kind, _ in chunks)
    announced = [body[:4] for kind, body in chunks if kind == b"acTL"]
    frames = struct.pack(">I", order.count("C"))
    if not re.fullmatch("C?D+(CF+)*", order) or announced not in ([], [frames]):
        raise ImageError("a damaged PNG: there are frames missing or out of order")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_orientation(chunks: Iterable[tuple[bytes, bytes]]) -> int:
    """The orientation of a PNG; the chunks that say it may come behind the pixels."""
    image = Image.new("1", (1, 1))
    for kind, body in chunks:
        if kind == b"iTXt" and body.startswith(XMP_KEYWORD):
            image.info["xmp"] = body
        elif kind == b"eXIf":
            image.info["exif"] = body
    return orientation_of(image)


def turned_box(
    box: tuple[int, int, int, int], canvas: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where `turn` moves the part (left, top, width, height) of a canvas."""
    (x, y, w, h), (width, height) = box, canvas
    if orientation in (5, 6, 7, 8):
        x, y, w, h, width, height = y, x, h, w, height, width
    if orientation not in (2, 3, 6, 7):
        x = width - x - w
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    return x, y, w, h


def mirror_png_pixels(header: bytes, compressed: bytes, orientation: int) -> bytes:
    """Turn and mirror one frame: `header` is its IHDR, `compressed` its image data."""
    file = PNG_SIGNATURE + png_chunk(b"IHDR", header)
    file += png_chunk(b"IDAT", compressed) + png_chunk(b"IEND", b"")

    def turned(unpack: str | None = None) -> Image.Image:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if unpack:
                assert isinstance(image, ImageFile.ImageFile)
                image.tile = [image.tile[0]._replace(args=unpack)]
            return turn(image, orientation)

    depth, colour = header[8], header[9]
    if depth == 16 and colour in (2, 6):
        # Pillow has no such mode: the high bytes make one image, the low ones another.
        mode = "RGB" if colour == 2 else "RGBA"
        planes = [turned(f"{mode};16B"), turned(f"{mode};16L")]
    elif depth == 16 and colour == 4:
        mode = "RGBA"  # a pixel has as many bytes
        planes = [turned(mode)]
    else:
        mode = PNG_ROWS[depth, colour]
        planes = [turned()]
    # Up: 2 to 10 % larger than choosing a filter for each row as Pillow does, in half
    # the time; and unlike Pillow's encoder, zlib releases the GIL.
    filter_type = 2 if depth >= 8 and colour != 3 else 0
    width, height = planes[0].size
    step = max(1, STRIP // width)
    above = b""
    compressor = zlib.compressobj()
    out = bytearray()
    for top in range(0, height, step):
        strip = (0, top, width, min(top + step, height))
        rows = bytearray()
        for number, plane in enumerate(planes):
            samples = plane.crop(strip).tobytes("raw", mode)
            rows = rows or bytearray(len(samples) * len(planes))
            rows[number :: len(planes)] = samples
        count = strip[3] - top
        stride = len(rows) // count
        filtered = Image.frombytes("L", (stride, count), bytes(rows))
        if filter_type:
            shifted = (above or bytes(stride)) + rows[:-stride]
            above = bytes(rows[-stride:])
            filtered = ImageChops.subtract_modulo(
                filtered, Image.frombytes("L", (stride, count), bytes(shifted))
            )
        framed = Image.new("L", (stride + 1, count), filter_type)
        framed.paste(filtered, (1, 0))
        out += compressor.compress(framed.tobytes())
    return bytes(out + compressor.flush())


ENCODERS = {
    "AVIF": mirror_avif,
    "BMP": mirror_bmp,
    "GIF": mirror_gif,
    "JPEG": mirror_jpeg,
    "JPEG2000": mirror_jpeg2000,
    "MPO": mirror_jpeg,
    "PNG": mirror_png,
    "PPM": mirror_ppm,
    "TIFF": mirror_tiff,
    "WEBP": mirror_webp,
}


# ---- the embedded server ---------------------------------------------------

PATH = "/images/"
LIMIT = 1 << 28  # bytes of an upload: 256 MiB
HEAD_LIMIT = 1 << 14  # bytes of the headers of a part
BLOCK = 1 << 18
UNFINISHED = ".upload-"  # beginning of the names of uploads that are under way


class Refusal(Exception):
    """A request that is answered with an error status and a sentence."""

    def __init__(self, status: http.HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


class ImageServer(http.server.ThreadingHTTPServer):
    """An image service over a folder: GET lists and delivers, POST saves.

    A thread for each connection; a slow or broken client keeps only its own.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # connections that have not been accepted yet

    def __init__(self, folder: Path, port: int = 0, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        super().__init__(("127.0.0.1", port), ImageHandler)
        for leftover in folder.glob(f"{UNFINISHED}*"):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATH}"

    def handle_error(self, request: object, client_address: object) -> None:
        logger.info("a connection broke: %s", sys.exception())

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread while the block runs; give it the URL."""
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            self.shutdown()
            self.server_close()


class ImageHandler(http.server.BaseHTTPRequestHandler):
    server: ImageServer
    protocol_version = "HTTP/1.1"
    server_version = "mirror_images"
    timeout = 30.0  # seconds without a byte
    # Headers and body are written one after the other; Nagle's algorithm would hold
    # the body back until the headers are acknowledged, which takes 40 ms.
    disable_nagle_algorithm = True
    wbufsize = BLOCK  # so that a small image leaves in one piece with its headers

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends the body
        return proceed

    def do_GET(self) -> None:
        self.answer(self.deliver)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(self.receive)

    def answer(self, work: Callable[[], None]) -> None:
        """Run `work`; answer with an error if it fails."""
        self.head_sent = False
        try:
            work()
        except Refusal as refusal:
            self.refuse(refusal.status, str(refusal))
        except ConnectionError as error:
            self.close_connection = True
            logger.info("%s: %s", self.client_address[0], error)
        except TimeoutError:
            self.refuse(http.HTTPStatus.REQUEST_TIMEOUT, "the body came too slowly")
        except OSError as error:
            status, verb = http.HTTPStatus.INSUFFICIENT_STORAGE, "saved"
            if self.command != "POST":
                status, verb = http.HTTPStatus.FORBIDDEN, "read"
            self.refuse(status, f"cannot be {verb}: {error.strerror}")
        except Failure as failure:  # a file that was changed while it was sent
            self.refuse(http.HTTPStatus.CONFLICT, str(failure))

    def refuse(self, status: http.HTTPStatus, words: str) -> None:
        """Answer with an error; read on for a while, or the client might miss it."""
        self.close_connection = True
        if self.head_sent:  # what is said now would be taken for a part of the body
            logger.info("%s: %s", self.client_address[0], words)
            return
        with contextlib.suppress(OSError):
            self.send_text(status, words + "\n")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 2.0
            self.connection.settimeout(2.0)
            while self.rfile.read1(BLOCK) and time.monotonic() < deadline:
                pass

    def send_text(self, status: http.HTTPStatus, text: str) -> None:
        self.send_body(status, "text/plain; charset=utf-8", text.encode())

    def send_body(self, status: http.HTTPStatus, kind: str, body: bytes) -> None:
        self.send_head(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: http.HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.head_sent = True

    def log_message(self, format: str, *args: object) -> None:
        logger.info("%s %s", self.client_address[0], printable(format % args))

    def deliver(self) -> None:
        """Answer with the list of images, or with one of them."""
        path = self.path.partition("?")[0]
        if path in (PATH, PATH.rstrip("/")):
            with os.scandir(self.server.folder) as entries:
                names = sorted(e.name for e in entries if is_listed(e))
            text = "".join(f"{name}\n" for name in names)
            kind = "text/plain; charset=utf-8"
            body = text.encode("utf-8", "surrogateescape")
            return self.send_body(http.HTTPStatus.OK, kind, body)
        if not path.startswith(PATH):
            raise Refusal(http.HTTPStatus.NOT_FOUND, f"the images are at {PATH}")
        name = urllib.parse.unquote(path.removeprefix(PATH), errors="surrogateescape")
        image = self.server.folder / checked_name(name)
        if not image.is_file():
            raise Refusal(http.HTTPStatus.NOT_FOUND, f"there is no image {name!r}")
        with image.open("rb") as file:
            kind = media_type(name)
            size = os.fstat(file.fileno()).st_size
            self.send_head(http.HTTPStatus.OK, kind, size)
            if self.command != "HEAD":
                for chunk in file_chunks(file, size):
                    self.wfile.write(chunk)
        return None

    def receive(self) -> None:
        """Save the images in the body of a POST, each whole or not at all."""
        if self.path.partition("?")[0] not in (PATH, PATH.rstrip("/")):
            raise Refusal(http.HTTPStatus.NOT_FOUND, f"POST images to {PATH}")
        body = Body(self.rfile, self.body_length())
        kind = email.message.Message()
        kind["Content-Type"] = self.headers.get("Content-Type", "")
        saved: dict[Path, Path] = {}
        try:
            if kind.get_content_type() == "multipart/form-data":
                boundary = kind.get_boundary("").encode("latin-1", "replace")
                for name in body.parts(boundary):
                    self.save(name, body.until(b"\r\n--" + boundary), saved)
            else:
                disposition = self.headers.get("Content-Disposition", "")
                given = file_name(disposition.encode("latin-1"))
                if given is None:
                    words = "send multipart/form-data, or a Content-Disposition header"
                    words += " with the filename"
                    raise Refusal(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, words)
                self.save(given, body.rest(), saved)
            if not saved:
                words = "there is no file in the form"
                raise Refusal(http.HTTPStatus.BAD_REQUEST, words)
            for unfinished, path in saved.items():
                unfinished.replace(path)
        finally:
            for unfinished in saved:
                unfinished.unlink(missing_ok=True)
        names = ", ".join(printable(path.name) for path in saved.values())
        self.send_text(http.HTTPStatus.OK, f"saved {names}\n")

    def body_length(self) -> int:
        if "Transfer-Encoding" in self.headers:
            words = "send the body with a Content-Length, not chunked"
            raise Refusal(http.HTTPStatus.LENGTH_REQUIRED, words)
        length = self.headers.get("Content-Length")
        if length is None:
            words = "a POST needs a Content-Length"
            raise Refusal(http.HTTPStatus.LENGTH_REQUIRED, words)
        if not re.fullmatch("[0-9]{1,18}", length):
            words = f"no Content-Length: {length[:20]!r}"
            raise Refusal(http.HTTPStatus.BAD_REQUEST, words)
        if int(length) > self.server.limit:
            words = f"the limit is {self.server.limit} bytes"
            raise Refusal(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, words)
        return int(length)

    def save(
        self, name: str, content: Iterable[bytes], saved: dict[Path, Path]
    ) -> None:
        """Write `content` to an unfinished file and note in `saved` what it becomes."""
        path = self.server.folder / checked_name(name)
        if path.is_dir():
            raise Refusal(http.HTTPStatus.CONFLICT, f"{name!r} is a folder")
        unfinished = self.server.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        saved[unfinished] = path
        with unfinished.open("xb") as file:
            for block in content:
                file.write(block)


def is_listed(entry: os.DirEntry[str]) -> bool:
    """Whether the list shows a file; a name that is no line of UTF-8 text it cannot."""
    with contextlib.suppress(OSError):  # a link to itself is no file
        return (
            is_image(entry.name)
            and not entry.name.startswith(UNFINISHED)
            and not re.search("[\n\ud800-\udfff]", entry.name)
            and entry.is_file()
        )
    return False


def checked_name(name: str) -> str:
    """`name` if it is that of a file in the folder; else a Refusal."""
    length = len(name.encode("utf-8", "surrogatepass"))
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name) or length > 255:
        raise Refusal(
            http.HTTPStatus.BAD_REQUEST, f"no name for an image: {name[:80]!r}"
        )
    if name.startswith(UNFINISHED):
        words = f"names must not begin with {UNFINISHED}"
        raise Refusal(http.HTTPStatus.BAD_REQUEST, words)
    return name


def file_name(disposition: bytes) -> str | None:
    """The filename of a Content-Disposition header's value, None if it has none.

    As browsers escape it in forms (WHATWG HTML), with backslashes (RFC 2183), or
    extended (RFC 8187).
    """
    parameter = rb';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s"]*))'
    values = {
        key.lower(): quoted or token
        for key, quoted, token in re.findall(parameter, disposition)
    }
    extended = values.get(b"filename*", b"")
    if extended.lower().startswith(b"utf-8''"):
        return urllib.parse.unquote(extended[7:].decode("latin-1"))
    if b"filename" not in values:
        return None
    name = re.sub(rb'\\(["\\])', rb"\1", values[b"filename"])
    for escaped, character in {b"%22": b'"', b"%0D": b"\r", b"%0A": b"\n"}.items():
        name = name.replace(escaped, character)
    return name.decode("utf-8", "surrogateescape")


class Body:
    """The body of a request: `length` bytes, read in blocks."""

    def __init__(self, file: io.BufferedIOBase, length: int) -> None:
        self.file = file
        self.left = length
        self.buffer = b""

    def read(self) -> bytes:
        """Up to BLOCK bytes; b"" at the end."""
        block = self.file.read1(min(BLOCK, self.left))
        self.left -= len(block)
        if self.left and not block:
            raise ConnectionError("the client went away in mid-body")
        return block

    def rest(self) -> Iterator[bytes]:
        while block := self.read():
            yield block

    def until(self, delimiter: bytes) -> Iterator[bytes]:
        """What comes before `delimiter`, which is read too."""
        while (at := self.buffer.find(delimiter)) < 0:
            # What may be the beginning of the delimiter stays in the buffer.
            ready = max(0, len(self.buffer) - len(delimiter) + 1)
            if ready:
                yield self.buffer[:ready]
            block = self.read()
            if not block:
                words = "the form ends too early"
                raise Refusal(http.HTTPStatus.BAD_REQUEST, words)
            self.buffer = self.buffer[ready:] + block
        yield self.buffer[:at]
        self.buffer = self.buffer[at + len(delimiter) :]

    def line(self) -> bytes:
        """The next line, without its end."""
        line = b""
        for part in self.until(b"\r\n"):
            line += part
            if len(line) > HEAD_LIMIT:
                raise Refusal(
                    http.HTTPStatus.BAD_REQUEST, "a line of a form is too long"
                )
        return line

    def at_end(self) -> bool:
        """Whether the delimiter that was just read is the last one."""
        while len(self.buffer) < 2 and (block := self.read()):
            self.buffer += block
        return self.buffer.startswith(b"--")

    def parts(self, boundary: bytes) -> Iterator[str]:
        """The file name of each part of a form (RFC 7578) that has one.

        Before it asks for the next one, the caller reads until the delimiter.
        """
        if not boundary:
            raise Refusal(http.HTTPStatus.BAD_REQUEST, "the form names no boundary")
        self.buffer = b"\r\n"  # what belongs to the first delimiter, too
        delimiter = b"\r\n--" + boundary
        for _ in self.until(delimiter):
            pass
        while not self.at_end():
            self.line()  # the delimiter's own
            name = None
            for _ in range(100):
                line = self.line()
                if not line:
                    break
                if line.lower().startswith(b"content-disposition:"):
                    name = file_name(line)
            else:
                words = "a part of the form has too many headers"
                raise Refusal(http.HTTPStatus.BAD_REQUEST, words)
            if name is None:
                for _ in self.until(delimiter):
                    pass
            else:
                yield name
        for _ in self.rest():
            pass


def serve(folder: Path, port: int, verbosity: int) -> int:
    """Run the embedded server until Ctrl-C."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "not a folder" if folder.exists() else error.strerror
        raise Trouble(f"cannot serve {folder}: {reason}") from error
    try:
        server = ImageServer(folder, port)
    except OSError as error:
        hint = "choose another one with --port"
        message = f"cannot listen at port {port}: {error.strerror}; {hint}"
        raise Trouble(message) from error
    with console(verbosity), server:
        what = f"{folder}, a new folder," if new else folder
        say(f"Serving {what} at {server.url} - Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


# ---- without a server: sample pictures -------------------------------------


def draw_samples(folder: Path) -> None:
    """Write sample pictures in which a person sees at once what is left and right."""
    sunset = draw_sample((360, 240), "sky")
    sunset.save(folder / "photo.jpg", quality=90)
    # Stored as a camera held upright does: a quarter turn counter-clockwise, and a tag.
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[ExifTags.Base.Software] = "mirror_images.py"
    portrait = draw_sample((240, 360), "sky").transpose(Image.Transpose.ROTATE_90)
    portrait.save(folder / "portrait.jpg", quality=90, exif=exif)
    draw_sample((360, 240), None).save(folder / "transparent.png")
    frames = [draw_sample((240, 160), "sky", step / 12) for step in range(12)]
    frames[0].save(
        folder / "moving.gif",
        save_all=True,
        append_images=frames[1:],
        duration=100,
        loop=0,
    )
    draw_sample((360, 240), "sky", 0.7).save(folder / "drawing.webp", lossless=True)


def draw_sample(
    size: tuple[int, int], background: str | None, moment: float = 0.3
) -> Image.Image:
    """An arrow to the right under a sun that is at the left in the morning."""
    scale = 4  # drawn larger and then reduced, for smooth edges
    width, height = size[0] * scale, size[1] * scale
    image = Image.new("RGBA", (width, height))
    if background:
        ramp = Image.linear_gradient("L").resize((width, height))
        image = ImageOps.colorize(ramp, "#1b4f8f", "#f7b267").convert("RGBA")
    draw = ImageDraw.Draw(image)
    x, y, r = width * (0.1 + 0.8 * moment), height * 0.25, height * 0.1
    draw.ellipse((x - r, y - r, x + r, y + r), "#ffd23f")
    hills = [
        (0, 0.55),
        (0.25, 0.45),
        (0.55, 0.75),
        (0.8, 0.7),
        (1, 0.8),
        (1, 1),
        (0, 1),
    ]
    draw.polygon([(a * width, b * height) for a, b in hills], "#2e6f40")
    shaft = (0.15 * width, 0.83 * height, 0.7 * width, 0.9 * height)
    draw.rectangle(shaft, "#f4f1de")
    head = [(0.66, 0.76), (0.9, 0.865), (0.66, 0.97)]
    draw.polygon([(a * width, b * height) for a, b in head], "#f4f1de")
    font = ImageFont.load_default(height * 0.17)
    draw.text((0.07 * width, 0.56 * height), "LEFT", "white", font)
    small = image.resize(size, Image.Resampling.LANCZOS)
    return small.convert("RGB") if background else small


def side_by_side(pairs: Iterable[dict[str, bytes]]) -> Image.Image:
    """A picture of images beside their mirror images, as viewers show them."""
    rows = [[(name, as_shown(data)) for name, data in pair.items()] for pair in pairs]
    heights = [max(image.height for _, image in row) + 40 for row in rows]
    sheet = Image.new("RGB", (520, sum(heights)), "#808080")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for left, (name, image) in zip((10, 270), row, strict=True):
            draw.text((left, top + 8), name, "white")
            sheet.paste(image, (left, top + 25), image)
        top += height
    return sheet


def as_shown(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        shown = ImageOps.exif_transpose(image).convert("RGBA")
    shown.thumbnail((240, 240))
    return shown


def mirror_samples(arguments: argparse.Namespace) -> int:
    """Run the whole chain on an embedded server with sample pictures."""
    folder = Path(tempfile.mkdtemp(prefix="mirror_images_"))
    draw_samples(folder)
    samples = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    with ImageServer(folder).running() as url:
        say(
            f"No URL was given: an embedded server at {url} has {len(samples)} samples."
        )
        status = run(url, arguments)
    results = {name: folder / (arguments.prefix + name) for name in samples}
    pairs = [
        {name: samples[name], f"mirrored: {path.name}": path.read_bytes()}
        for name, path in results.items()
        if path.exists()
    ]
    say(f"The originals and their mirror images are in {folder}")
    if pairs and status == 0:
        sheet = folder / "side_by_side.png"
        side_by_side(pairs).save(sheet)
        say(f"To look at: {sheet}")
    return status


# ---- the command line ------------------------------------------------------


def byte_count(text: str) -> int:
    """Argument type: a number of bytes, such as 500000, 64MB or 1.5GB."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?([kMG]?)(i?)B?", text)
    value = 0
    if match:
        power = " kMG".index(match[2] or " ")
        value = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if value < 1:
        message = f"{text!r} is not a number of bytes, such as 64MB"
        raise argparse.ArgumentTypeError(message)
    return value


def port_number(text: str) -> int:
    """Argument type: a TCP port, 0 for any that is free."""
    value = whole_number(0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; the last is 65535")
    return value


def name_prefix(text: str) -> str:
    """Argument type: the beginning of the results' names."""
    try:
        check_name(text + "x")
    except Failure as failure:
        raise argparse.ArgumentTypeError(f"{text!r}: {failure}") from failure
    return text


def run(url: str, arguments: argparse.Namespace) -> int:
    server = server_at(url, arguments)
    return run_batch(
        "mirrored", arguments, lambda batch: mirror_all(server, arguments, batch)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with the arguments `argv`; return its exit status."""
    return guarded("mirror_images.py", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        description="Mirror all images of a server left-to-right.",
        epilog="Without a URL, and without $IMAGES_URL, the script shows what it does "
        "on an embedded server with sample pictures.",
    )
    add = parser.add_argument
    add(
        "url",
        type=http_url,
        nargs="?",
        default=os.environ.get("IMAGES_URL") or None,
        metavar="URL",
        help="where to list and POST images; their names are joined under it",
    )
    add(
        "--prefix",
        type=name_prefix,
        default="mirrored_",
        metavar="TEXT",
        help="beginning of the results' names (default: mirrored_; '' overwrites)",
    )
    add(
        "--chains",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="images under way at once (default: 16)",
    )
    add("--again", action="store_true", help="mirror what is mirrored already, too")
    add(
        "--max-bytes",
        type=byte_count,
        default="256MB",
        metavar="SIZE",
        help="largest image to download (default: 256MB)",
    )
    add(
        "--serve",
        type=folder_path,
        metavar="FOLDER",
        help="run the embedded server instead",
    )
    add(
        "--port",
        type=port_number,
        default=8000,
        metavar="N",
        help="where --serve listens (default: 8000; 0: any free port)",
    )
    add_shared_options(parser)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Pillow's, about odd metadata
    if arguments.serve is not None:
        return serve(arguments.serve, arguments.port, arguments.verbosity)
    if arguments.url is None:
        return mirror_samples(arguments)
    return run(arguments.url, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
