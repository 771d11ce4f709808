# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx~=0.28.1", "Pillow~=13.0", "sniffio~=1.3"]
# ///
"""Mirror all images on a server left-to-right: list, download, mirror, upload.

    python mirror_images.py [URL] [--chains N] [--prefix TEXT] [--report FILE] ...
    python mirror_images.py --serve FOLDER [--port N]

`GET URL` returns a list of names as plain text, one per line; `GET URL/NAME` returns an
image; `POST URL` saves one. Many download -> mirror -> upload chains run at once on
one event loop; the pixel work is done by worker processes. Without a URL, the script
runs on an embedded server with sample pictures.

From other code, call `mirror(data: bytes) -> bytes` for the pixel work alone.

Needs upload_images.py beside it, for HTTP, retries, progress and report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import email.message
import email.utils
import http.server
import io
import itertools
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import (
    AvifImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    JpegImagePlugin,
    TiffTags,
    UnidentifiedImageError,
)

from upload_images import (
    FatalError,
    ImageError,
    Outcome,
    Run,
    form_escape,
    integer,
    media_type,
    print_line,
    run_images,
    run_main,
)

__all__ = ["ImageError", "mirror"]  # for other code

logger = logging.getLogger(__name__)

# Safe to open if untrusted; EPS is not, as Pillow runs Ghostscript on it.
# MPO is opened by the JPEG plugin.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
# 41 dB or more against the true flip of a photo; 1.3 times the size of quality 80
LOSSY_QUALITY = 90
MAX_PIXELS = 178_956_970  # of all frames: what Pillow accepts by default
MAX_PAGES = 1000  # of a TIFF: Pillow's time is quadratic in their number
STRIP = 1 << 20  # pixels of a PNG that are filtered and compressed at a time
IPTC = 0x0404  # number of an image resource (Adobe Photoshop File Formats)
PROCESSORS = (
    len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count() or 1
)
# One more, so that no processor waits for the event loop to hand it the next image.
WORKERS = PROCESSORS + 1
IMAGE_TIMEOUT_SECONDS = 300.0  # for mirroring one
# In a worker, libraries reserve more address space than they use.
RESERVED_ADDRESS_SPACE = 1 << 30  # bytes


# ---- what the script does --------------------------------------------------


async def mirror_all(run: Run, arguments: argparse.Namespace) -> None:
    """Mirror the images in the server's list that are not mirrored yet."""
    prefix: str = arguments.prefix
    listed = await run.client.list()
    # Servers store names as sent, so two with the same escaped form are the same.
    stored = {form_escape(name): name for name in reversed(listed)}
    names = []
    for name in filter(run.in_shard, listed):
        if prefix and name.startswith(prefix):
            continue
        if prefix and form_escape(prefix + name) in stored and not arguments.again:
            run.record(Outcome(name, "skipped", error="already mirrored"))
        else:
            names.append(name)

    async def mirror_one(outcome: Outcome) -> None:
        name = outcome.name
        check_name(name)
        if (first := stored[form_escape(name)]) != name:
            raise ImageError(f"its result would replace that of {first}")
        data = await run.client.get(name, arguments.max_bytes, outcome)
        result = await workers.mirror(data)
        await run.client.post(prefix + name, io.BytesIO(result), outcome)

    async with Workers(arguments.max_pixels) as workers:
        await run.chains(names, mirror_one, arguments.chains)


def check_name(name: str) -> None:
    """Raise ImageError for a name that could lead to something other than an image."""
    if name in (".", "..") or "/" in name or "\\" in name:
        raise ImageError("the list should contain names, not paths or URLs")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise ImageError("the name contains control characters")


# ---- worker processes ------------------------------------------------------

# fork starts a worker in 5 ms, spawn in 500, but fork is unsafe outside Linux.
if sys.platform == "linux":
    PROCESSES = multiprocessing.get_context("fork")
else:
    PROCESSES = multiprocessing.get_context("spawn")


class Workers:
    """A pool of processes for the pixel work.

    If an image crashes its process, exhausts its memory or takes too long, only that
    image fails and only that process is replaced. (A ProcessPoolExecutor would break
    as a whole.)
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.permits = asyncio.Semaphore(WORKERS)
        self.idle: list[Worker] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for worker in self.idle:
            worker.kill()

    async def mirror(self, data: bytes) -> bytes:
        """Call `mirror` in a worker process; ImageError if it fails in any way."""
        async with self.permits:
            while self.idle and not self.idle[-1].process.is_alive():
                self.idle.pop().kill()  # it was killed after its last image
            if not self.idle:
                self.idle.append(await Worker.start(self.max_pixels))
            worker = self.idle.pop()
            try:
                async with asyncio.timeout(IMAGE_TIMEOUT_SECONDS):
                    success, result = await worker.mirror(data)
            except TimeoutError as error:
                worker.kill()
                message = f"mirroring took more than {IMAGE_TIMEOUT_SECONDS:.0f} s"
                raise ImageError(message) from error
            except (EOFError, ConnectionError) as error:
                message = f"the worker process died ({worker.kill()}; out of memory?)"
                raise ImageError(message) from error
            except BaseException:
                worker.kill()
                raise
            self.idle.append(worker)
        if not success:
            raise ImageError(result.decode())
        return result


@dataclasses.dataclass
class Worker:
    """A process that mirrors one image at a time.

    Request: the size, then the image. Response: whether it succeeded, the size, then
    the mirrored image or the reason.
    """

    process: multiprocessing.process.BaseProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, max_pixels: int) -> Worker:
        ours, theirs = socket.socketpair()
        streams = await asyncio.open_connection(sock=ours)
        arguments = (theirs, max_pixels)
        process = PROCESSES.Process(target=serve_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return cls(process, *streams)

    async def mirror(self, data: bytes) -> tuple[bool, bytes]:
        self.writer.write(struct.pack("<Q", len(data)) + data)
        success, size = struct.unpack("<?Q", await self.reader.readexactly(9))
        return success, await self.reader.readexactly(size)

    def kill(self) -> str:
        """Kill the process; return how it ended."""
        self.writer.close()
        self.process.kill()
        self.process.join()
        status = self.process.exitcode or 0
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def serve_worker(connection: socket.socket, max_pixels: int) -> None:
    """Mirror one image after another, until the parent process goes away."""
    signal.set_wakeup_fd(-1)  # undo the parent's setting
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard_stream in (0, 1, 2):  # libtiff prints warnings
        os.dup2(null, standard_stream)
    if PROCESSES.get_start_method() == "fork":
        # Otherwise the parent's connections would stay open as long as this process.
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    limit_memory()
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
    # Keep 16 MB for the next image instead of returning them to the system
    # (https://pillow.readthedocs.io/en/stable/reference/block_allocator.html).
    Image.core.set_blocks_max(16)  # type: ignore[attr-defined]
    # Each libavif thread reserves address space: 64 take 1.9 GB, one takes 0.25.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with connection.makefile("rwb") as pipe:
        while header := pipe.read(8):
            data = pipe.read(*struct.unpack("<Q", header))
            try:
                success, result = True, mirror(data)
            except (ImageError, OSError) as error:
                text = getattr(error, "strerror", None) or str(error)
                success, result = False, text.encode("utf-8", "replace")
            pipe.write(struct.pack("<?Q", success, len(result)))
            pipe.write(result)
            pipe.flush()


def limit_memory() -> None:
    """Limit this worker to its share of the machine's or container's memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        limit = memory // WORKERS + RESERVED_ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ---- pixels ----------------------------------------------------------------


def mirror(data: bytes) -> bytes:
    """Mirror an image file left-to-right, as a viewer shows it.

    The result has the same format. EXIF or XMP orientation is applied first and its tag
    removed. Other metadata is kept, except an EXIF thumbnail, which would show the
    image unmirrored. All frames of an animation and all pages of a TIFF are mirrored;
    an MPO photo becomes the JPEG that viewers show.

    Lossless images stay exact. JPEG, lossy WebP and AVIF are decoded and encoded again.
    A JPEG keeps its quantisation tables and subsampling: on photos 45 dB or more against
    the true flip (median 54). If the mirrored side is not a multiple of the block size, 8
    or 16 pixels, the block boundaries move: 35 dB or more (median 39).

    Pillow's limit, twice `Image.MAX_IMAGE_PIXELS` pixels, applies to all frames or pages
    together.

    Raises ImageError if `data` is not an image in one of FORMATS, is damaged, exceeds
    that limit or MAX_PAGES, or cannot be written back without loss of bit depth.
    Raises OSError only if the system lacks resources, such as file descriptors (EMFILE).
    """
    try:
        with open_image(data, FORMATS) as image:
            return MIRROR_FUNCTIONS[image.format or ""](image, data)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        start = f"it starts with {data[:16]!r}" if data else "it is empty (0 bytes)"
        raise ImageError(f"not an image that can be mirrored: {start}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {pixel_limit():,} pixels") from error
    except (IndexError, EOFError, struct.error) as error:
        raise ImageError("a damaged image: bytes are missing") from error
    except MemoryError as error:
        raise ImageError("too large for this machine's memory") from error
    except Exception as error:  # Pillow raises all sorts for bad data
        if isinstance(error, OSError) and error.errno is not None:
            raise  # Pillow imports plugins when first needed
        reason = str(error) or type(error).__name__
        raise ImageError(f"a damaged or unsupported image: {reason}") from error


def open_image(data: bytes, formats: list[str]) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=formats)


def pixel_limit() -> int:
    """The most pixels that Pillow accepts."""
    return int(2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize))


def check_size(size: tuple[int, int], before: int = 0) -> int:
    """Raise ImageError for a decompression bomb.

    `before` is the number of pixels in the frames before this one; the result is that
    number for the next frame. Frames are counted as they are read, because an animation
    may lie about their size and number.
    """
    pixels = size[0] * size[1]
    if before:  # even the smallest frame takes time
        pixels = max(pixels, pixel_limit() // 40_000)
    if before + pixels > pixel_limit():
        frames = " in all frames" if before else ""
        raise ImageError(f"more than {pixel_limit():,} pixels{frames}")
    return before + pixels


# EXIF orientation -> how to transpose the stored pixels to mirror the upright image;
# None if they already are the mirror image of what viewers show.
TRANSPOSITIONS = {
    1: Image.Transpose.FLIP_LEFT_RIGHT,
    2: None,
    3: Image.Transpose.FLIP_TOP_BOTTOM,
    4: Image.Transpose.ROTATE_180,
    5: Image.Transpose.ROTATE_270,
    6: Image.Transpose.TRANSPOSE,
    7: Image.Transpose.ROTATE_90,
    8: Image.Transpose.TRANSVERSE,
}
SWAPS_AXES = (5, 6, 7, 8)
ORIENTATION = ExifTags.Base.Orientation


def transpose(image: Image.Image, orientation: int) -> Image.Image:
    """`image`, stored in the given EXIF orientation, made upright and mirrored."""
    method = TRANSPOSITIONS[orientation]
    return image.copy() if method is None else image.transpose(method)


def orientation_of(image: Image.Image) -> int:
    """The orientation (1 to 8) that viewers apply: that of the EXIF data, or of XMP."""
    orientation = 1
    with contextlib.suppress(Exception):  # viewers ignore unreadable EXIF data
        orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in TRANSPOSITIONS else 1


def clean_exif(exif: bytes | None) -> bytes | None:
    """EXIF data without orientation and thumbnail, which is not mirrored; None if none.

    Nothing else is changed or moved, because a maker note may contain offsets that only
    the maker knows. (Exif 2.32, section 4.6.2: a directory is a count, 12 bytes an entry,
    and the offset of the next directory, the thumbnail's.)
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


def encoded(pixels: Image.Image, image: Image.Image, **options: Any) -> bytes:
    """`pixels` in the format of `image`, with the metadata that Pillow can write.

    Options that are None are left to Pillow.
    """
    format = "JPEG" if image.format == "MPO" else str(image.format)
    exif = clean_exif(image.info.get("exif"))
    options = {
        "dpi": image.info.get("dpi"),
        "icc_profile": image.info.get("icc_profile"),
        "exif": b"Exif\0\0" + exif if exif and format == "JPEG" else exif,
        "xmp": clean_xmp(image.info.get("xmp")),
        **options,
    }
    file = io.BytesIO()
    given = {key: value for key, value in options.items() if value is not None}
    pixels.save(file, format, **given)
    return file.getvalue()


def mirror_still(image: ImageFile.ImageFile, **options: Any) -> bytes:
    image.load()  # some metadata comes after the pixels
    return encoded(transpose(image, orientation_of(image)), image, **options)


def mirror_jpeg(image: ImageFile.ImageFile, data: bytes) -> bytes:
    """Mirror a JPEG (ITU-T T.81); encode it with its own tables and subsampling."""
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    tables = image.quantization
    factors: list[tuple[int, ...]] = [layer[1:3] for layer in image.layer]
    if image.mode == "CMYK":
        # YCCK is written as CMYK, where a chroma table would ruin a colour.
        tables = {0: tables[image.layer[0][3]]}
    if orientation_of(image) in SWAPS_AXES:  # swap the frequencies, too
        order = [8 * (n % 8) + n // 8 for n in range(64)]
        tables = {key: [table[n] for n in order] for key, table in tables.items()}
        factors = [factor[::-1] for factor in factors]
    subsampling = -1  # greyscale and CMYK have none
    if image.mode == "RGB":
        key: Any = sum(factors, ())
        # 4:4:4, which loses nothing, where Pillow cannot write the original's
        subsampling = JpegImagePlugin.samplings.get(key, 0)
    return mirror_still(
        image,
        extra=iptc_segment(image.info.get("photoshop", {}).get(IPTC)),
        qtables=tables,
        subsampling=subsampling,
        progressive=bool(image.info.get("progressive")),
        keep_rgb=image.mode == "RGB" and image.info.get("adobe_transform") == 0,
    )


def iptc_segment(iptc: bytes | None) -> bytes | None:
    """A JPEG's APP13 segment with IPTC data (captions, rights); None if there is none.

    Photoshop's other resources are dropped: a thumbnail, for one, is not mirrored.
    """
    if not iptc:
        return None
    block = struct.pack(">4sHHI", b"8BIM", IPTC, 0, len(iptc)) + iptc
    body = b"Photoshop 3.0\0" + block + bytes(len(iptc) % 2)
    return b"\xff\xed" + struct.pack(">H", len(body) + 2) + body


def mirror_bmp(image: ImageFile.ImageFile, data: bytes) -> bytes:
    if image.mode != "RGBA":
        return mirror_still(image)
    # Pillow writes no alpha channel, so move only the pixels, 4 bytes each.
    start, header_size = struct.unpack_from("<II", data, 10)
    if start < 14 + max(header_size, 52):  # 52: the shortest, with its masks
        raise ImageError("a damaged BMP: its pixels overlap its header")
    end = start + 4 * image.width * image.height
    pixels = Image.frombytes("RGBA", image.size, data[start:end])
    return data[:start] + transpose(pixels, 1).tobytes() + data[end:]


def mirror_jpeg2000(image: ImageFile.ImageFile, data: bytes) -> bytes:
    start = data.find(b"\xff\x4f\xff\x51")  # of the codestream (ITU-T T.800, A.5.1)
    (components,) = struct.unpack_from(">H", data, start + 40)
    depths = data[start + 42 : start + 42 + 3 * components : 3]  # less one, and a sign
    if image.mode != "I;16" and any(depth & 127 > 7 for depth in depths):
        raise ImageError("JPEG 2000 with 16 bits per channel: some would be lost")
    return mirror_still(image, no_jp2=start == 0)


def mirror_ppm(image: ImageFile.ImageFile, data: bytes) -> bytes:
    arguments = image.tile[0].args  # a raw mode, or a raw mode and the maximum value
    if image.mode == "RGB" and isinstance(arguments, tuple) and arguments[1] > 255:
        raise ImageError("PPM with 16 bits per channel: some would be lost")
    return mirror_still(image)


def mirror_frames(image: ImageFile.ImageFile, **options: Any) -> bytes:
    """Mirror every frame of a WebP or AVIF image."""
    frames, starts, pixels = [], [], 0
    for number in range(getattr(image, "n_frames", 1)):
        pixels = check_size(image.size, pixels)
        image.seek(number)
        image.load()
        frames.append(transpose(image, orientation_of(image)))
        starts.append(image.info.get("timestamp", 0))
    # Differences of starts, so that rounding errors do not add up.
    ends = [*starts[1:], starts[-1] + image.info.get("duration", 0)]
    return encoded(
        frames[0],
        image,
        save_all=True,
        append_images=frames[1:],
        duration=[end - start for start, end in zip(starts, ends, strict=True)],
        loop=image.info.get("loop"),
        background=image.info.get("background"),
        **options,
    )


def mirror_avif(image: ImageFile.ImageFile, data: bytes) -> bytes:
    options = {} if image.mode == "L" else {"subsampling": "4:4:4"}
    return mirror_frames(image, quality=LOSSY_QUALITY, **options)


def mirror_webp(image: ImageFile.ImageFile, data: bytes) -> bytes:
    if is_lossless_webp(data):
        return mirror_frames(image, lossless=True, exact=True)
    return mirror_frames(image, quality=LOSSY_QUALITY)


def is_lossless_webp(data: bytes) -> bool:
    """Whether the bitstream of any frame is VP8L (RFC 9649, section 2)."""
    at = 12
    while at + 8 <= len(data):
        chunk_type, size = struct.unpack_from("<4sI", data, at)
        if chunk_type == b"VP8L":
            return True
        # A frame of an animation has its own chunks, after 16 bytes.
        at += 8 + (16 if chunk_type == b"ANMF" else size + size % 2)
    return False


# Not those that describe how the pixels are stored: Pillow writes them.
TIFF_TAGS = {
    *(ExifTags.Base.DocumentName, ExifTags.Base.ImageDescription, ExifTags.Base.Make),
    *(ExifTags.Base.Model, ExifTags.Base.XResolution, ExifTags.Base.YResolution),
    *(ExifTags.Base.ResolutionUnit, ExifTags.Base.Software, ExifTags.Base.DateTime),
    *(ExifTags.Base.Artist, ExifTags.Base.Copyright, ExifTags.Base.XMLPacket),
    *(ExifTags.Base.PageName, ExifTags.Base.PageNumber, ExifTags.Base.IPTCNAA),
    *(ExifTags.Base.ImageResources, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo),
}


def mirror_tiff(image: ImageFile.ImageFile, data: bytes) -> bytes:
    """Mirror every page of a TIFF (TIFF 6.0), each with its own tags."""
    pages: list[Image.Image] = []
    pixels = 0
    # Not n_frames, which reads all directories, however many, before the first page.
    for number in itertools.count():
        try:
            image.seek(number)
        except EOFError:
            break
        if number == MAX_PAGES:
            raise ImageError(f"a TIFF with more than {MAX_PAGES} pages")
        pixels = check_size(image.size, pixels)
        if image.mode in ("RGB", "RGBA", "CMYK") and ";16" in str(image.tile):
            raise ImageError("TIFF with 16 bits per channel: some would be lost")
        image.load()  # Pillow applies the orientation
        pages.append(transpose(image, 1))
        pages[-1].encoderinfo = tiff_options(image)
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    return file.getvalue()


def tiff_options(image: ImageFile.ImageFile) -> dict[str, Any]:
    """Options for saving the current page of a TIFF with its tags."""
    types = {TiffTags.ASCII: str, TiffTags.BYTE: bytes, TiffTags.UNDEFINED: bytes}
    tags = image.getexif()
    for tag in list(tags):
        # If the type is wrong, Pillow reads only the first number of some tags, and
        # cannot write others.
        expected = types.get(TiffTags.lookup(tag).type or 0, object)
        if tag not in TIFF_TAGS or not isinstance(tags[tag], expected):
            del tags[tag]
    if xmp := clean_xmp(tags.pop(ExifTags.Base.XMLPacket, None)):
        tags[ExifTags.Base.XMLPacket] = xmp
    tags.bigtiff = False  # Pillow cannot read such tags back
    # As bytes, because all pages share one object.
    options: dict[str, Any] = {"exif": tags.tobytes()}
    if ExifTags.IFD.Exif in tags or ExifTags.IFD.GPSInfo in tags:
        # Through libtiff, Pillow cannot write a directory inside another.
        options["compression"] = "raw"
    elif image.info.get("compression") == "jpeg":
        options["quality"] = 95
    return options


def mirror_gif(image: ImageFile.ImageFile, data: bytes) -> bytes:
    """Mirror a GIF frame by frame (GIF89a): only pixels and positions change.

    Pillow would draw every frame in full and choose a new palette, which loses colours.
    """
    (width,) = struct.unpack_from("<H", data, 6)
    out = bytearray(data[: 13 + gif_table_size(data[10])])
    pixels = 0
    for start, end, block_type in gif_blocks(data):
        if block_type == GIF_FRAME:
            left, top, w, h, flags = struct.unpack_from("<HHHHB", data, start + 1)
            check_size((max(width, left + w), top + h))
            if not pixels:  # viewers enlarge the screen to fit the first frame
                width = max(width, left + w)
                struct.pack_into("<H", out, 6, width)
            pixels = check_size((w, h), pixels)
            visible = min(w, width - left)  # they crop later frames
            if visible > 0:
                left = width - left - visible
            else:  # entirely off the screen
                visible = w
            table_end = start + 10 + gif_table_size(flags)
            # The pixels are written without interlacing.
            out += struct.pack(
                "<BHHHHB", block_type, left, top, visible, h, flags & ~64
            )
            out += data[start + 10 : table_end]
            out += mirror_gif_pixels(w, h, visible, flags & 64, data[table_end:end])
        else:
            # Pillow reads too far if an extension is empty after its identifier.
            identifier = 1 + data[start + 2] if data[start + 1] == 0xFF else 0
            if end - start > 3 + identifier:
                out += data[start:end]
    return bytes(out + b";")


GIF_EXTENSION, GIF_FRAME, GIF_END = b"!,;"


def gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and type of each block after the header of a GIF."""
    start = 13 + gif_table_size(data[10])
    while start < len(data) and data[start] != GIF_END:
        block_type = data[start]
        if block_type == GIF_EXTENSION:
            end = start + 2
        elif block_type == GIF_FRAME:
            end = start + 11 + gif_table_size(data[start + 9])
        else:  # padding that some programs write
            start += 1
            continue
        while data[end]:
            end += 1 + data[end]
        yield start, end + 1, block_type
        start = end + 1


def gif_table_size(flags: int) -> int:
    """The size in bytes of the colour table that a descriptor's flags announce."""
    return 3 << 1 + (flags & 7) if flags & 128 else 0


def mirror_gif_pixels(
    width: int, height: int, visible: int, interlace: int, lzw: bytes
) -> bytes:
    """Mirror the `visible` left part of a frame's image data: LZW, in sub-blocks."""
    screen = struct.pack("<6sHH3x", b"GIF89a", width, height)
    frame = struct.pack("<B4xHHB", GIF_FRAME, width, height, interlace)
    with open_image(screen + frame + lzw + b";", ["GIF"]) as image:
        mirrored = transpose(image, 1)
    if visible < width:
        mirrored = mirrored.crop((width - visible, 0, width, height))
    descriptor, *blocks = GifImagePlugin.getdata(mirrored)
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
# Chunks that stay valid when the pixels move, besides those whose names say so
PNG_KEPT = {
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"tRNS", b"bKGD"),
    *(b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"mDCV", b"cLLI"),
    *(b"hIST", b"sPLT", b"tIME"),
}


def mirror_png(image: ImageFile.ImageFile, data: bytes) -> bytes:
    """Mirror a PNG frame by frame (PNG 3rd edition): only pixels and positions change.

    Pillow would reduce 16-bit colour to 8 bits and lose most chunks.
    """
    everything = list(png_chunks(data))
    metadata = [chunk for chunk in everything if is_png_metadata(*chunk)]
    chunks = [chunk for chunk in everything if not is_png_metadata(*chunk)]
    check_png_order(chunks)
    orientation, clean_metadata = png_metadata(metadata)
    header = chunks[0][1]
    canvas = struct.unpack(">II", header[:8])
    upright = canvas[::-1] if orientation in SWAPS_AXES else canvas
    size = canvas  # of the frame whose pixels come next
    sequence = 0  # number of the next animation chunk that has one
    count = 0  # of pixels
    out = bytearray(PNG_SIGNATURE)  # with bytes, a million chunks would take hours
    interlace = b"\0"  # none
    out += png_chunk(b"IHDR", struct.pack(">II", *upright) + header[8:12] + interlace)
    out += clean_metadata
    for chunk_type, group in itertools.groupby(chunks[1:], lambda chunk: chunk[0]):
        bodies = [body for _, body in group]
        if chunk_type in (b"IDAT", b"fdAT"):
            number = struct.pack(">I", sequence) if chunk_type == b"fdAT" else b""
            sequence += len(number) // 4
            pixels = b"".join(body[len(number) :] for body in bodies)
            count = check_size(size, count)
            frame_header = struct.pack(">II", *size) + header[8:]
            bodies = [number + mirror_png_pixels(frame_header, pixels, orientation)]
        for body in bodies:
            if chunk_type == b"fcTL":
                w, h, x, y = struct.unpack(">4I", body[4:20])
                size = w, h
                if x + w > canvas[0] or y + h > canvas[1]:
                    raise ImageError("a damaged PNG: a frame extends beyond its edges")
                x, y, w, h = mirrored_box((x, y, w, h), canvas, orientation)
                body = struct.pack(">5I", sequence, w, h, x, y) + body[20:]
                sequence += 1
            out += png_chunk(chunk_type, body)
    return bytes(out)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG that stay valid when its pixels move, as (type, data)."""
    chunk_type, at = b"", len(PNG_SIGNATURE)
    while chunk_type != b"IEND":
        length, chunk_type = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        at += 12 + length
        if chunk_type in PNG_KEPT or chunk_type[3:].islower():  # 5.4: safe to copy
            if checksum == zlib.crc32(chunk_type + body):
                yield chunk_type, body
            elif chunk_type[:1].isupper() or chunk_type in (b"fcTL", b"fdAT"):
                raise ImageError(f"a damaged PNG: wrong checksum in {chunk_type!r}")
        elif chunk_type[:1].isupper():  # section 13.2: critical
            raise ImageError(f"a damaged or unusual PNG: unknown chunk {chunk_type!r}")


def check_png_order(chunks: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise ImageError unless the header and all frames are there, in order (5.6)."""
    letters = {b"IHDR": "H", b"IDAT": "D", b"fcTL": "C", b"fdAT": "F"}
    order = "".join(letters.get(chunk_type, "") for chunk_type, _ in chunks)
    announced = [body[:4] for chunk_type, body in chunks if chunk_type == b"acTL"]
    frames = struct.pack(">I", order.count("C"))
    if chunks[0][0] != b"IHDR" or not re.fullmatch("HC?D+(CF+)*", order):
        raise ImageError("a damaged PNG: chunks are missing or out of order")
    if announced not in ([], [frames]):
        raise ImageError("a damaged PNG: frames are missing")


def png_chunk(chunk_type: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(chunk_type + body)
    return (
        struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", checksum)
    )


def is_png_metadata(chunk_type: bytes, body: bytes) -> bool:
    """Whether Pillow reads EXIF or XMP data, which may state an orientation, from it."""
    if chunk_type not in (b"tEXt", b"zTXt", b"iTXt"):
        return chunk_type == b"eXIf"
    keyword = body.partition(b"\0")[0]
    # The latter is ImageMagick's, with EXIF data as hexadecimal digits.
    known = keyword in (b"XML:com.adobe.xmp", b"Raw profile type exif")
    return known or (chunk_type, keyword) == (b"tEXt", b"exif")


def png_metadata(chunks: Iterable[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """The orientation stated in chunks of EXIF and XMP data, and the chunks without it.

    Pillow reads them in all their forms. They are put before the pixel of a tiny PNG,
    because in the original they may come after the pixels.
    """
    if not chunks:
        return 1, b""
    found = b"".join(png_chunk(*chunk) for chunk in chunks)
    header = png_chunk(b"IHDR", struct.pack(">IIB4x", 1, 1, 8))
    pixel = png_chunk(b"IDAT", zlib.compress(bytes(2))) + png_chunk(b"IEND", b"")
    with open_image(PNG_SIGNATURE + header + found + pixel, ["PNG"]) as image:
        orientation, info = orientation_of(image), image.info
    exif = info.get("exif", b"")
    with contextlib.suppress(ValueError):
        text = info.get("Raw profile type exif", "")
        exif = exif or bytes.fromhex("".join(text.split("\n")[3:]))
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp", "").encode("latin-1")
    out = b""
    if exif := clean_exif(exif):
        out += png_chunk(b"eXIf", exif)
    if xmp := clean_xmp(xmp):
        out += png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    return orientation, out


def mirrored_box(
    box: tuple[int, int, int, int], canvas: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where `transpose` moves the part (left, top, width, height) of a canvas."""
    (x, y, w, h), (width, height) = box, canvas
    if orientation in SWAPS_AXES:
        x, y, w, h, width, height = y, x, h, w, height, width
    if orientation not in (2, 3, 6, 7):
        x = width - x - w
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    return x, y, w, h


def mirror_png_pixels(header: bytes, compressed: bytes, orientation: int) -> bytes:
    """Mirror one frame: `header` is its IHDR, `compressed` its image data."""
    file = PNG_SIGNATURE + png_chunk(b"IHDR", header)
    file += png_chunk(b"IDAT", compressed) + png_chunk(b"IEND", b"")

    def mirrored(unpack: str | None = None) -> Image.Image:
        with open_image(file, ["PNG"]) as image:
            if unpack:
                image.tile = [image.tile[0]._replace(args=unpack)]
            return transpose(image, orientation)

    depth, colour = header[8], header[9]
    if depth == 16 and colour in (2, 6):
        # Pillow has no such mode: the high bytes make one image, the low ones another.
        mode = "RGB" if colour == 2 else "RGBA"
        planes = [mirrored(f"{mode};16B"), mirrored(f"{mode};16L")]
    elif depth == 16 and colour == 4:
        mode = "RGBA"  # a pixel has as many bytes
        planes = [mirrored(mode)]
    else:
        mode = PNG_ROWS[depth, colour]
        planes = [mirrored()]
    # Up: 2 to 10 % larger than choosing a filter for each row, as Pillow's encoder
    # does, but in half the time.
    filter_type = 2 if depth >= 8 and colour != 3 else 0
    width, height = planes[0].size
    step = max(1, STRIP // width)
    compressor = zlib.compressobj(5)  # 1 % larger than 6, but in two thirds of the time
    out = bytearray()
    for top in range(0, height, step):
        count = min(step, height - top)
        rows = bytearray()
        for number, plane in enumerate(planes):
            # With the row above it, which is all zeros for the first row (section 9.1).
            strip = Image.new(plane.mode, (width, count + 1))
            strip.paste(plane, (0, 1 - top))
            samples = strip.tobytes("raw", mode)
            rows = rows or bytearray(len(samples) * len(planes))
            rows[number :: len(planes)] = samples
        stride = len(rows) // (count + 1)
        filtered = Image.frombytes("L", (stride, count), bytes(rows[stride:]))
        if filter_type:
            above = Image.frombytes("L", (stride, count), bytes(rows[:-stride]))
            filtered = ImageChops.subtract_modulo(filtered, above)
        framed = Image.new("L", (stride + 1, count), filter_type)
        framed.paste(filtered, (1, 0))
        out += compressor.compress(framed.tobytes())
    return bytes(out + compressor.flush())


MIRROR_FUNCTIONS = {
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
MAX_UPLOAD_SIZE = 1 << 26  # bytes of a request body, which is held in memory: 64 MiB
MAX_PARTS = 1000  # of a form


class ImageServer(http.server.ThreadingHTTPServer):
    """An image service over a folder: GET lists and sends images, POST saves them.

    It listens on 127.0.0.1, on any free port if `port` is 0. Each connection has its own
    thread, so a slow client blocks no other.
    """

    request_queue_size = 1024  # connections that have not been accepted yet

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ImageHandler)
        self.folder = folder

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATH}"

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread while the block runs; yield the URL."""
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            self.shutdown()
            self.server_close()

    def names(self) -> list[str]:
        """The images in the folder whose names fit on a line of UTF-8 text, sorted."""
        return sorted(
            name
            for name in os.listdir(self.folder)
            if media_type(name).startswith("image/")
            and is_safe_name(name)
            and not re.search("[\r\n\ud800-\udfff]", name)
            and (self.folder / name).is_file()
        )

    def save(self, name: str, content: memoryview) -> None:
        """Save an image whole or not at all."""
        temporary = self.folder / f".upload-{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_bytes(content)
            temporary.replace(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def handle_error(self, request: object, client_address: object) -> None:
        logger.info("connection lost: %s", sys.exception())

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, after reading the rest of the request for up to 2 seconds.

        Otherwise it would be reset, and the client might never read the response.
        """
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(2.0)
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and request.recv(1 << 18):
                pass
        self.close_request(request)


class ImageHandler(http.server.BaseHTTPRequestHandler):
    """The requests of one connection."""

    server: ImageServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # HTTP/0.9 responses have no status
    timeout = 30.0  # seconds without a byte
    # Nagle's algorithm would hold the body back until the headers are acknowledged,
    # which takes 40 ms.
    disable_nagle_algorithm = True

    def parse_request(self) -> bool:
        """Parse a request; refuse it if another web site's page may have sent it.

        A foreign Origin means a form or script on that site; a foreign Host means DNS
        rebinding.
        """
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        local = re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?", host)
        if local and origin in (None, f"http://{host}"):
            return True
        message = "the Host is not localhost, or the Origin is another site"
        self.send_error(403, explain=message)
        return False

    def do_GET(self) -> None:
        """Send the list of images, or one of them."""
        path = self.path.partition("?")[0]
        if path in (PATH, PATH.rstrip("/")):
            names = self.server.names()
            return self.respond(200, "".join(f"{name}\n" for name in names))
        name = urllib.parse.unquote(path.removeprefix(PATH))
        image = self.server.folder / name
        content = None
        if path.startswith(PATH) and is_safe_name(name):
            with contextlib.suppress(OSError):
                # Opening a named pipe would block.
                content = image.read_bytes() if image.is_file() else None
        if content is None:
            message = f"not found, or not readable; {PATH} lists the images"
            return self.send_error(404, explain=message)
        return self.respond(200, content, media_type(name))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Save all files of a form."""
        header = self.headers.get("Content-Length", "")
        length = int(header) if re.fullmatch("[0-9]{1,18}", header) else None
        if self.path.partition("?")[0] not in (PATH, PATH.rstrip("/")):
            self.send_error(404, explain=f"POST images to {PATH}")
        elif "Transfer-Encoding" in self.headers or length is None:
            self.send_error(411, explain="send a Content-Length, not a chunked body")
        elif length > MAX_UPLOAD_SIZE:
            self.send_error(413, explain=f"the limit is {MAX_UPLOAD_SIZE >> 20} MiB")
        elif self.headers.get_content_type() != "multipart/form-data":
            self.send_error(415, explain="send images as multipart/form-data")
        else:
            self.save_form(self.rfile.read(length))

    def save_form(self, body: bytes) -> None:
        try:
            files = form_files(body, self.headers.get_boundary(""))
            for name, content in files.items():
                self.server.save(name, content)
        except ValueError as error:
            self.send_error(400, explain=str(error))
        except OSError as error:
            self.send_error(507, explain=f"cannot be saved: {error.strerror}")
        else:
            self.respond(200, f"saved {', '.join(files)}\n")

    def respond(
        self, status: int, body: str | bytes, content_type: str | None = None
    ) -> None:
        if isinstance(body, str):
            body = body.encode("utf-8", "surrogateescape")
        self.send_response(status)
        self.send_header("Content-Type", content_type or "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":  # in pieces, as the time-out applies to each write
            shutil.copyfileobj(io.BytesIO(body), self.wfile, 1 << 18)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Send an error as plain text."""
        self.close_connection = True  # the request's body may not have been read
        text = explain or message or http.HTTPStatus(code).phrase
        self.respond(code, f"{text}\n")

    def log_message(self, format: str, *args: object) -> None:
        logger.info("%s %s", self.client_address[0], format % args)


def is_safe_name(name: str) -> bool:
    """Whether `name` stays in the folder, and is not that of a hidden file."""
    return bool(re.fullmatch(r"[^./\\\0][^/\\\0]*", name))


def form_files(body: bytes, boundary: str) -> dict[str, memoryview]:
    """The content of each file in a form (RFC 7578), by name.

    Raises ValueError if the form is malformed, has no file or has an unsafe name.
    """
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    parts = body.split(delimiter, MAX_PARTS)
    if not boundary or not parts.pop().startswith(b"--"):
        raise ValueError("the form is incomplete, or has too many parts")
    if parts and not parts[0].startswith(delimiter[2:]):
        del parts[0]  # the preamble
    files = {}
    for part in parts:
        head_end = part.find(b"\r\n\r\n")
        if head_end < 0:
            raise ValueError("the headers of a part are incomplete")
        name = file_name(part[:head_end])
        if name is not None:
            if not is_safe_name(name):
                raise ValueError(f"not a valid image name: {name!r}")
            files[name] = memoryview(part)[head_end + 4 :]
    if not files:
        raise ValueError("the form has no file")
    return files


def file_name(headers: bytes) -> str | None:
    """The filename in the headers of a part; None if it has none.

    It may be escaped as browsers do it (WHATWG HTML, section 4.10.21.8), with
    backslashes (RFC 2183), or extended (RFC 8187). ValueError if that cannot be decoded.
    """
    disposition = re.search(rb"(?im)^content-disposition:(.*)", headers)
    if not disposition:
        return None
    message = email.message.Message()
    message["Content-Disposition"] = disposition[1].decode("latin-1")
    parameters: dict[str, Any] = dict(message.get_params([], "Content-Disposition"))
    value = parameters.get("filename")
    if value is None:
        return None
    if isinstance(value, tuple):  # extended
        return str(email.utils.collapse_rfc2231_value(value, errors="strict"))
    name: str = value.encode("latin-1").decode("utf-8", "surrogateescape")
    return name.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


def serve(folder: Path, port: int) -> int:
    """Run the embedded server until Ctrl-C (exit status 0) or SIGTERM (143)."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        server = ImageServer(folder, port)
    except OSError as error:
        message = f"cannot serve {folder} on port {port}: {error.strerror}"
        raise FatalError(message) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with server:
        what = f"{folder}, a new folder," if new else folder
        print_line(f"Serving {what} at {server.url} - press Ctrl-C to stop", sys.stdout)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_line("", sys.stdout)  # the shell's prompt goes below ^C
    return 0


# ---- without a server: sample pictures -------------------------------------


def draw_samples(folder: Path) -> None:
    """Write sample pictures in which left and right are obvious."""
    sunset = draw_sample((360, 240), "sky")
    sunset.save(folder / "photo.jpg", quality=90)
    # As a camera held upright stores it: a quarter turn counter-clockwise, and a tag.
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
    """An arrow to the right on a slope, under a sun that moves from left to right."""
    scale = 4  # drawn larger, then reduced, for smooth edges
    width, height = size[0] * scale, size[1] * scale
    image = Image.new("RGBA", (width, height))
    if background:
        ramp = Image.linear_gradient("L").resize((width, height))
        image = ImageOps.colorize(ramp, "#1b4f8f", "#f7b267").convert("RGBA")
    draw = ImageDraw.Draw(image)
    x, y, r = width * (0.1 + 0.8 * moment), height * 0.25, height * 0.1
    draw.ellipse((x - r, y - r, x + r, y + r), "#ffd23f")
    slope = [(0, 0.45 * height), (width, 0.85 * height), (width, height), (0, height)]
    draw.polygon(slope, "#2e6f40")
    shaft = (0.15 * width, 0.83 * height, 0.7 * width, 0.9 * height)
    draw.rectangle(shaft, "#f4f1de")
    head = [(0.66, 0.76), (0.9, 0.865), (0.66, 0.97)]
    draw.polygon([(a * width, b * height) for a, b in head], "#f4f1de")
    font = ImageFont.load_default(height * 0.17)
    draw.text((0.07 * width, 0.56 * height), "LEFT", "white", font)
    small = image.resize(size, Image.Resampling.LANCZOS)
    return small.convert("RGB") if background else small


def side_by_side(pairs: Iterable[dict[str, bytes]]) -> Image.Image:
    """A picture of images next to their mirror images, as viewers show them."""
    rows = list(pairs)
    sheet = Image.new("RGB", (520, 200 * len(rows)), "#808080")
    draw = ImageDraw.Draw(sheet)
    for row, pair in enumerate(rows):
        for column, (name, data) in enumerate(pair.items()):
            left, top = 10 + 260 * column, 200 * row
            draw.text((left, top + 8), name, "white")
            image = as_shown(data)
            sheet.paste(image, (left, top + 25), image)
    return sheet


def as_shown(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        shown = ImageOps.exif_transpose(image).convert("RGBA")
    shown.thumbnail((240, 160))
    return shown


def mirror_samples(arguments: argparse.Namespace) -> int:
    """Run the whole chain on an embedded server with sample pictures."""
    folder = Path(tempfile.mkdtemp(prefix="mirror_images_"))
    draw_samples(folder)
    samples = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    with ImageServer(folder).running() as url:
        arguments.url = url
        what = f"an embedded server at {url} has {len(samples)} samples"
        print_line(f"No URL given: {what}.", sys.stdout)
        status = run_images("mirrored", arguments, mirror_all)
    results = {name: folder / (arguments.prefix + name) for name in samples}
    pairs = [
        {name: samples[name], f"mirrored: {path.name}": path.read_bytes()}
        for name, path in results.items()
        if path.exists() and path.read_bytes() != samples[name]
    ]
    print_line(f"The originals and their mirror images are in {folder}", sys.stdout)
    if pairs and status == 0:
        sheet = folder / "side_by_side.png"
        side_by_side(pairs).save(sheet)
        print_line(f"Side by side: {sheet}", sys.stdout)
    return status


# ---- the command line ------------------------------------------------------


def byte_count(text: str) -> int:
    """Argument type: a number of bytes, such as 500000, 64MB or 1.5GB."""
    pattern = r"([0-9]{1,18}(?:\.[0-9]+)?) ?([kmg]?)(i?)b?"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    value = 0
    if match:
        power = " kmg".index(match[2].lower() or " ")
        value = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if value < 1:
        message = f"{text!r} is not a number of bytes, such as 64MB"
        raise argparse.ArgumentTypeError(message)
    return value


def name_prefix(text: str) -> str:
    """Argument type: the prefix of the results' names."""
    try:
        check_name(text + "x")
    except ImageError as error:
        message = f"{text!r} contains a slash, a backslash or a control character"
        raise argparse.ArgumentTypeError(message) from error
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with the arguments `argv`; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="mirror_images.py",
        description="Mirror all images on a server left-to-right. Without a URL or "
        "$IMAGES_URL, use an embedded server with sample pictures.",
    )
    add = parser.add_argument
    text = "where images are listed and POSTed; each is at URL/NAME"
    add("url", nargs="?", metavar="URL", help=text)
    text = "prefix of the results' names (default: mirrored_; '' overwrites)"
    add("--prefix", type=name_prefix, default="mirrored_", metavar="TEXT", help=text)
    text = "chains to run at the same time (default: 16)"
    add("--chains", type=integer(1), default=16, metavar="N", help=text)
    text = "mirror even the images that are already mirrored"
    add("--again", action="store_true", help=text)
    text = "largest image to download (default: 256MB)"
    add("--max-bytes", type=byte_count, default="256MB", metavar="SIZE", help=text)
    text = (
        f"largest image to decode (default: {MAX_PIXELS}); a JPEG takes about 8 bytes of "
        "memory per pixel, WebP 42, AVIF and JPEG 2000 45"
    )
    add("--max-pixels", type=integer(1), default=MAX_PIXELS, metavar="N", help=text)
    text = "run the embedded server instead"
    add("--serve", type=Path, metavar="FOLDER", help=text)
    text = "where --serve listens (default: 8000; 0: any free port)"
    add("--port", type=integer(0, 65535), metavar="N", help=text)

    def script(arguments: argparse.Namespace) -> int:
        if arguments.serve and arguments.url:
            raise FatalError("give a URL or --serve, not both")
        if arguments.port is not None and not arguments.serve:
            raise FatalError("--port needs --serve")
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        Image.init()  # loads all plugins now: later, too many files may be open
        if arguments.serve:
            port = 8000 if arguments.port is None else arguments.port
            return serve(arguments.serve, port)
        if arguments.url or os.environ.get("IMAGES_URL"):
            return run_images("mirrored", arguments, mirror_all)
        return mirror_samples(arguments)

    return run_main(parser, argv, script)


if __name__ == "__main__":
    raise SystemExit(main())
