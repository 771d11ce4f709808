"""Feed `mirror` with damaged images: bytes that decode come back, or an ImageError.

    python tests/fuzz_mirror.py [SEED [CASES]]

Ends with status 0 and a line of counts, or at the first case that is neither: standard
output ends with its seed and number, and a case depends on nothing else.
"""

import collections
import io
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mirror_images

MEMORY = 1 << 30  # bytes of address space more than at the start
SECONDS = 20.0  # for one case; it takes milliseconds, but machines have hiccups
PIXELS = 1 << 20  # the limit of each image
PNG = mirror_images.PNG_SIGNATURE


def saved(format: str, *frames: Image.Image, **options: Any) -> bytes:
    """An image file in that format; an animation of `frames` if there are several."""
    first, *more = [frame.copy() for frame in frames]  # saving leaves settings behind
    if more:
        options |= {"save_all": True, "append_images": more}
    file = io.BytesIO()
    first.save(file, format, **options)
    return file.getvalue()


def images() -> dict[str, bytes]:
    """A small image of every format and variant that `mirror` takes."""
    colour = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    colour.putpixel((1, 2), (200, 30, 90))
    frames = [colour, colour.rotate(90), colour.rotate(180)]
    alpha = colour.convert("RGBA")
    alpha.putalpha(colour.getchannel(0))
    exif = Image.Exif()
    exif[mirror_images.ORIENTATION] = 6
    palette = colour.quantize(13)
    cmyk, grey, bits = (colour.convert(mode) for mode in ("CMYK", "L", "1"))
    deep = Image.new("I;16", (24, 16), 4660)
    rows = b"".join(b"\0" + bytes(range(24 * 6)) for _ in range(16))
    deep_png = (
        PNG
        + mirror_images.png_chunk(b"IHDR", struct.pack(">IIBB3x", 24, 16, 16, 2))
        + mirror_images.png_chunk(b"IDAT", zlib.compress(rows))
        + mirror_images.png_chunk(b"IEND", b"")
    )
    text = PngImagePlugin.PngInfo()  # as ImageMagick writes EXIF data
    text.add_text("Raw profile type exif", f"\nexif\n40\n{exif.tobytes().hex()}", True)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    bmp = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 122)
    bmp += struct.pack("<IiiHHII16x", 108, 24, 16, 1, 32, 3, 0) + masks + bytes(52)
    return {
        "jpeg": saved("JPEG", colour, exif=exif),
        "jpeg progressive": saved("JPEG", colour, progressive=True, subsampling=2),
        "jpeg cmyk": saved("JPEG", cmyk),
        "jpeg grey": saved("JPEG", grey, dpi=(72, 72), comment=b"grey"),
        "mpo": saved("MPO", *frames),
        "png": saved("PNG", alpha, exif=exif),
        "png text": saved("PNG", colour, pnginfo=text),
        "png palette": saved("PNG", palette, transparency=3),
        "png bits": saved("PNG", bits),
        "png 16": saved("PNG", deep),
        "png rgb 16": deep_png,
        "apng": saved("PNG", *frames, duration=40),
        "gif": saved("GIF", palette, transparency=3),
        "gif animation": saved("GIF", *frames, duration=40, loop=0),
        "webp": saved("WEBP", colour, exif=exif),
        "webp lossless": saved("WEBP", alpha, lossless=True),
        "webp animation": saved("WEBP", *frames, duration=40),
        "tiff": saved("TIFF", colour, exif=exif),
        "tiff lzw": saved("TIFF", alpha, compression="tiff_lzw"),
        "tiff deflate": saved("TIFF", grey, compression="tiff_adobe_deflate"),
        "tiff jpeg": saved("TIFF", colour, compression="jpeg"),
        "tiff fax": saved("TIFF", bits, compression="group4"),
        "tiff pages": saved("TIFF", *frames),
        "tiff 16": saved("TIFF", deep),
        "bmp": saved("BMP", colour),
        "bmp alpha": bmp + alpha.tobytes(),
        "bmp palette": saved("BMP", palette),
        "ppm": saved("PPM", colour),
        "pgm": saved("PPM", deep),
        "pbm": saved("PPM", bits),
        "ppm plain": b"P3 2 2 9 1 2 3 4 5 6 7 8 9 0 1 2",
        "pfm": saved("PPM", grey.convert("F")),
        "jp2": saved("JPEG2000", colour),
        "j2k": saved("JPEG2000", grey, no_jp2=True),
        "avif": saved("AVIF", colour, exif=exif),
        "avif animation": saved("AVIF", *frames, duration=40),
    }


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def bits_flipped(data: bytes, rng: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def pieces_swapped(data: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def piece_repeated(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] * rng.choice((1, 2, 50)) + data[b:]


def piece_lost(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[min(b, a + 40) :]


def number_absurd(data: bytes, rng: random.Random) -> bytes:
    value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
    form = rng.choice(("<H", ">H", "<I", ">I"))
    number = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
    at = rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))
    return data[:at] + number + data[at + len(number) :]


def chunks_shuffled(data: bytes, rng: random.Random) -> bytes:
    """Of a PNG: chunks swapped, repeated or left out."""
    chunks = png_chunks(data)
    if len(chunks) > 1:
        one, other = rng.randrange(len(chunks)), rng.randrange(len(chunks))
        chunks[one : one + 1] = rng.choice(([], [chunks[other]], [chunks[one]] * 2))
    return PNG + b"".join(mirror_images.png_chunk(*chunk) for chunk in chunks)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """As many chunks as there are, whatever their checksums."""
    chunks, at = [], len(PNG)
    while at + 8 <= len(data):
        length, chunk_type = struct.unpack_from(">I4s", data, at)
        chunks.append((chunk_type, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    truncated,
    bits_flipped,
    bits_flipped,
    pieces_swapped,
    piece_repeated,
    piece_lost,
    number_absurd,
    number_absurd,
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        png = data.startswith(PNG)
        mutation = rng.choice([*MUTATIONS, *[chunks_shuffled] * (4 * png)])
        data = mutation(data, rng) or b"\0"
        if png and rng.random() < 0.8:
            # With checksums that are right again, it is no longer turned away by them.
            chunks = png_chunks(data)
            data = PNG + b"".join(mirror_images.png_chunk(*chunk) for chunk in chunks)
    return data


def case(originals: list[bytes], seed: int, number: int) -> bytes:
    rng = random.Random(f"{seed} {number}")
    data = damaged(rng.choice(originals), rng)
    if rng.random() < 0.05:  # the beginning of one image, the end of another
        other = rng.choice(originals)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    return data


def check(data: bytes) -> str:
    """What became of `data`: "mirrored" or "refused"; an AssertionError if neither."""
    try:
        result = mirror_images.mirror(data)
    except mirror_images.ImageError as error:
        assert str(error).isprintable() and str(error)
        return "refused"
    with Image.open(io.BytesIO(result), formats=mirror_images.FORMATS) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
    return "mirrored"


def fuzz(seed: int, cases: int, memory: int = MEMORY) -> int:
    """Check that many cases; return the exit status."""
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow accepts twice as many
    originals = list(images().values())
    for data in originals:
        assert check(data) == "mirrored"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: collections.Counter[str] = collections.Counter()
    for number in range(cases):
        print(seed, number, end="\r", flush=True)
        data = case(originals, seed, number)
        start = time.process_time()
        counts[check(data)] += 1
        spent = time.process_time() - start
        assert spent < SECONDS, f"case {number} took {spent:.1f} s"
    print(f"{counts['mirrored']} mirrored, {counts['refused']} refused")
    return 0


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    raise SystemExit(fuzz(*(numbers or [0]), *([] if len(numbers) > 1 else [10_000])))
