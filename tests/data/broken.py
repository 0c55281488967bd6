"""Awkward and broken files made on purpose, with what is to become of each.

Every file that can be read shows the same card, 64 x 48 pixels of four plain quarters. Its last
quarter has a colour of its own, so that no two files hold the same picture.
"""

import dataclasses
import io
import pathlib
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from lumina_jax.data import images

SIZE = (64, 48)
RED, GREEN, BLUE = (200, 40, 40), (40, 180, 60), (50, 60, 200)
WHITE = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What becomes of a file: the colours of its quarters, row by row, or why it is rejected."""

    colors: tuple[tuple[int, int, int], ...] = ()
    reason: str | None = None
    detail: str = ""  # a part of what is said about it
    size: tuple[int, int] = SIZE
    tolerance: int = 6  # JPEG and conversions between colour spaces are not exact


def make_broken(folder: pathlib.Path) -> dict[str, Expected]:
    """Writes all files and returns what is expected of each, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, content, outcome in (*accepted(), *rejected()):
        (folder / name).write_bytes(content)
        expected[name] = outcome
    return expected


def accepted() -> Iterator[tuple[str, bytes, Expected]]:
    """Files that hold a whole picture, however odd."""
    lasts = iter([(250 - 4 * i, 230 - 3 * i, 30 + 4 * i) for i in range(60)])

    def each(name: str, make, colors=(RED, GREEN, BLUE), **expected):
        last = next(lasts)
        return name, make(card(last)), Expected((*colors, last), **expected)

    for value, method in enumerate((None, *images._UPRIGHT.values()), 1):
        yield each(
            f"orientation_{value}.jpg", lambda im, v=value, m=method: turned(im, m, "JPEG", v)
        )
    rotate = Image.Transpose.ROTATE_90
    for format in ("PNG", "WEBP", "TIFF"):
        yield each(
            f"orientation_6.{format.lower()}",
            lambda im, f=format: turned(
                im, rotate, f, 6, **({"lossless": True} if f == "WEBP" else {})
            ),
        )
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12\0\x03\xff\xff\xff\xff\0\6"
    yield each("orientation_broken.jpg", lambda im: save(im, "JPEG", exif=exif))
    exif = Image.Exif()
    exif[images._ORIENTATION] = 77
    yield each("orientation_77.jpg", lambda im: save(im, "JPEG", exif=exif))

    clear = (WHITE, GREEN, BLUE)
    yield each("clear.png", lambda im: save(see_through(im), "PNG"), clear)
    yield each("clear.webp", lambda im: save(see_through(im), "WEBP", lossless=True), clear)
    yield each("clear.gif", lambda im: save(see_through(im), "GIF"), clear)
    yield each("clear_palette.png", lambda im: save(see_through(im).quantize(8), "PNG"), clear)
    yield each("clear_color.png", lambda im: save(im, "PNG", transparency=RED), clear, tolerance=0)
    half = ((227, 147, 147), GREEN, BLUE)
    yield each("half_clear.png", lambda im: save(see_through(im, 128), "PNG"), half, tolerance=1)

    grays = [(value,) * 3 for value in (88, 124, 73)]
    for name, make in {
        "gray.jpg": lambda im: save(im.convert("L"), "JPEG"),
        "gray_16.png": lambda im: save(sixteen_bits(im), "PNG"),
        "gray_16.tif": lambda im: save(sixteen_bits(im), "TIFF"),
        "gray_16_big.tif": lambda im: save(sixteen_bits(im, ">u2"), "TIFF"),
        "gray_float.tif": lambda im: save(floats(im), "TIFF"),
    }.items():
        content = make(card(last := next(lasts)))
        gray = round(0.299 * last[0] + 0.587 * last[1] + 0.114 * last[2])
        yield name, content, Expected((*grays, (gray,) * 3), tolerance=3)
    content = sixteen_bits(card(last := next(lasts)))
    content = save(content, "PNG", transparency=88 * 257)
    gray = round(0.299 * last[0] + 0.587 * last[1] + 0.114 * last[2])
    yield "clear_gray_16.png", content, Expected((WHITE, *grays[1:], (gray,) * 3), tolerance=1)
    bits = (WHITE, (0, 0, 0), (0, 0, 0), WHITE)
    one_bit = card(WHITE).getchannel("R").point(lambda value: 255 * (value > 100), "1")
    yield "bits.png", save(one_bit, "PNG"), Expected(bits, tolerance=0)
    content = save(one_bit, "TIFF", compression="group4")
    yield "bits.tif", content, Expected(bits, tolerance=0)

    yield each("palette.png", lambda im: save(im.quantize(8), "PNG"))
    yield each("rgb_16.png", lambda im: png_16(im), tolerance=1)
    yield each("plain.bmp", lambda im: save(im, "BMP"), tolerance=0)
    yield each("plain.avif", lambda im: save(im, "AVIF", quality=90))
    yield each("packed.tif", lambda im: save(im, "TIFF", compression="tiff_lzw"), tolerance=0)
    yield each("progressive.jpg", lambda im: save(im, "JPEG", progressive=True))
    yield each("cmyk.jpg", lambda im: save(im.convert("CMYK"), "JPEG"))
    yield each("ycck.jpg", ycck)
    for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        yield each(
            f"many.{format.lower()}",
            lambda im, f=format: save(
                im, f, save_all=True, append_images=[im.rotate(90), im.rotate(180)]
            ),
            tolerance=9,  # of lossy WebP
        )
    yield each("really_a.png", lambda im: save(im, "JPEG"))
    yield each("trailing.jpg", lambda im: save(im, "JPEG") + b"<!-- cached -->" * 50)
    yield each("thumbnail.jpg", with_thumbnail)
    swapped = swapped_profile()
    yield each("profile.jpg", lambda im: save(swap(im), "JPEG", icc_profile=swapped))
    yield each("profile.png", lambda im: save(swap(im), "PNG", icc_profile=swapped), tolerance=1)
    yield each("profile_broken.jpg", lambda im: save(im, "JPEG", icc_profile=swapped[:200]))
    yield each("profile_of_gray.jpg", lambda im: save(im, "JPEG", icc_profile=cmyk_profile()))
    cmyk = card((1, 2, 3)).convert("CMYK")
    yield "profile_cmyk.jpg", save(cmyk, "JPEG", icc_profile=cmyk_profile()), Expected((WHITE,) * 4)
    middle = ((128, 128, 128),) * 4
    yield "odd_sampling.jpg", odd_sampling(), Expected(middle, size=(72, 48), tolerance=0)


def rejected() -> Iterator[tuple[str, bytes, Expected]]:
    """Files that hold no picture, or not all of one."""

    def each(name: str, content: bytes, reason: str, detail: str = ""):
        return name, content, Expected(reason=reason, detail=detail)

    yield each("empty.jpg", b"", images.EMPTY)
    for name, content, detail in (
        ("page.jpg", b"\n <!DOCTYPE html>\n<html><title>404</title></html>", "HTML"),
        ("page_xml.jpg", b'\xef\xbb\xbf<?xml version="1.0"?><html></html>', "HTML"),
        ("answer.png", b'{"error": "not found"}', "JSON"),
        ("denied.png", b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML"),
        ("drawing.svg", b'<?xml version="1.0"?>\n<svg width="9" height="9"></svg>', "SVG"),
        ("paper.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF"),
        ("figure.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        ("film.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video"),
        ("film.webm", b"\x1aE\xdf\xa3\x9fB\x86\x81\1", "video"),
        ("song.mp3", b"ID3\4\0\0\0\0\0\x23TSSE", "audio"),
        ("all.zip", b"PK\3\4\x14\0\0\0\x08\0", "archive"),
        ("message.jpg", b"Hotlinking is not allowed.\r\n", "text"),
        ("zeros.jpg", bytes(4096), "zeros"),
        ("noise.jpg", b"\x91\x02\xf3\x44\x05", "unknown, begins with 91 02 f3 44 05"),
    ):
        yield each(name, content, images.NOT_A_PICTURE, detail)
    for name, content, detail in (
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        ("new.jxl", b"\xff\x0a\xfa\x1f", "JPEG XL"),
        ("scan.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        ("layers.psd", b"8BPS\0\1\0\0\0\0\0\0\0\3", "Photoshop"),
        ("favicon.ico", save(card(WHITE), "ICO"), "icon"),
        ("heights.tif", save(Image.new("I", SIZE, 70000), "TIFF"), "mode I"),
        ("infrared.tif", save(Image.new("F", SIZE, 300.0), "TIFF"), "not all between 0 and 1"),
        ("not_a_number.tif", save(Image.new("F", SIZE, np.nan), "TIFF"), "not all between 0"),
    ):
        yield each(name, content, images.UNSUPPORTED, detail)

    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    jpeg, png = save(noisy, "JPEG"), save(noisy, "PNG")
    middle = len(jpeg) // 2
    yield each("cut.jpg", jpeg[:middle], images.TRUNCATED, "JPEG")
    yield each("cut_in_header.jpg", jpeg[:100], images.TRUNCATED, "JPEG: Truncated File Read")
    yield each("cut_after_thumbnail.jpg", with_thumbnail(noisy)[:-999], images.TRUNCATED)
    yield each("cut_progressive.jpg", save(noisy, "JPEG", progressive=True)[:-99], images.TRUNCATED)
    for format in ("PNG", "GIF", "BMP", "WEBP", "AVIF", "TIFF"):
        content = save(noisy, format)
        name = f"cut.{format.lower()}"
        yield each(name, content[: len(content) // 2], images.TRUNCATED, format)
    yield each(
        "cut_packed.tif", save(noisy, "TIFF", compression="tiff_lzw")[:999], images.TRUNCATED
    )

    # Pillow reads all of these but the last four without a word.
    yield each("cut_and_ended.jpg", jpeg[:middle] + b"\xff\xd9", images.DAMAGED, "premature end")
    zeroed = jpeg[:middle] + bytes(40) + jpeg[middle + 40 :]
    yield each("zeroed.jpg", zeroed, images.DAMAGED, "Corrupt JPEG data")
    yield each("too_tall.jpg", resized(jpeg, 64, 480), images.DAMAGED, "premature end")
    yield each("too_flat.jpg", resized(jpeg, 64, 16), images.DAMAGED, "extraneous bytes")
    damaged_cmyk = save(noisy.convert("CMYK"), "JPEG")[:middle] + b"\xff\xd9"
    yield each("cut_and_ended_cmyk.jpg", damaged_cmyk, images.DAMAGED, "premature end")
    yield each("bad_checksum.png", png[:29] + b"ABCD" + png[33:], images.DAMAGED, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    yield each("flipped.png", bytes(flipped), images.DAMAGED, "PNG")
    yield each("no_pixels.png", png_of(0, 0, b""), images.DAMAGED, "PNG")
    yield each(
        "short_frame.jpg", jpeg.replace(b"\xff\xc0\0\x11", b"\xff\xc0\0\x0e"), images.DAMAGED
    )

    many = images.TOO_MANY_PIXELS
    yield each("bomb.png", png_of(60000, 60000, bytes(1000)), many, "PNG")
    yield each("small_bomb.png", png_of(10001, 10000, bytes(1000)), many, "PNG of 10001 x 10000")
    yield each("bomb.jpg", resized(jpeg, 65500, 65500), many, "JPEG")
    yield each(
        "bomb.gif",
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + bytes(3)
        + b","
        + struct.pack("<4H", 0, 0, 65535, 65535)
        + b"\0\2\0;",
        many,
        "GIF",
    )
    webp = save(noisy, "WEBP", lossless=True)
    yield each(
        "bomb.webp", webp[:21] + struct.pack("<I", 16383 | 16383 << 14) + webp[25:], many, "WEBP"
    )


def card(last: tuple[int, int, int]) -> Image.Image:
    """The picture that all readable files show."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32], pixels[24:, 32:] = RED, GREEN, BLUE, last
    return Image.fromarray(pixels)


def save(image: Image.Image, format: str, **options) -> bytes:
    content = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} | options if format == "JPEG" else options
    image.save(content, format, **options)
    return content.getvalue()


def turned(image: Image.Image, method, format: str, orientation: int, **options) -> bytes:
    """A picture lying on its side, whose metadata say so."""
    exif = Image.Exif()
    exif[images._ORIENTATION] = orientation
    # What undoes each of them: two rotations undo each other, the others themselves.
    rotations = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270
    if method in rotations and format == "JPEG":
        method = rotations[1 - rotations.index(method)]
    return save(image if method is None else image.transpose(method), format, exif=exif, **options)


def see_through(image: Image.Image, alpha: int = 0) -> Image.Image:
    """The red quarter is transparent; the bytes below it stay red."""
    mask = Image.new("L", SIZE, 255)
    mask.paste(alpha, (0, 0, 32, 24))
    image = image.copy()
    image.putalpha(mask)
    return image


def sixteen_bits(image: Image.Image, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 257).astype(dtype))


def floats(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)


def ycck(image: Image.Image) -> bytes:
    return simplejpeg.encode_jpeg(
        255 - np.asarray(image.convert("CMYK")), colorspace="CMYK", quality=95
    )


def with_thumbnail(image: Image.Image) -> bytes:
    """As cameras do it: a small JPEG, with an end of its own, before the large one."""
    small = save(image.resize((8, 6)), "JPEG")
    segment = b"\xff\xe5" + struct.pack(">H", len(small) + 2) + small
    content = save(image, "JPEG")
    return content[:2] + segment + content[2:]


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header lies about its size."""
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def odd_sampling() -> bytes:
    """A grey JPEG with three columns of brightness for each of colour.

    Pillow cannot write it and TurboJPEG not read it. Each of its blocks is the six bits 001010: no
    change of brightness, no detail.
    """
    content = save(Image.new("RGB", (72, 48), (128, 128, 128)), "JPEG")
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    factors = b"\1\x31\0\2\x11\0\3\x11\0"
    header = content[: frame + 10] + factors + content[frame + 19 : scan]
    blocks = "001010" * (5 * 3 * 6)
    bits = blocks + "1" * (-len(blocks) % 8)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    scan_header = b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0"
    return header + scan_header + data + b"\xff\xd9"


def png_of(width: int, height: int, data: bytes, bits: int = 8) -> bytes:
    """An RGB PNG whose pixels are the given bytes, whether they are enough or not."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def png_16(image: Image.Image) -> bytes:
    """16 bits a colour, which Pillow cannot write."""
    rows = (np.asarray(image).astype(np.uint16) * 257).astype(">u2")
    return png_of(*image.size, b"".join(b"\0" + row.tobytes() for row in rows), bits=16)


def swap(image: Image.Image) -> Image.Image:
    """Red as green, and green as red."""
    red, green, blue = image.split()
    return Image.merge("RGB", (green, red, blue))


def swapped_profile() -> bytes:
    """An ICC profile that takes red for green and green for red."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in (b"rXYZ", b"...."), (b"gXYZ", b"rXYZ"), (b"....", b"gXYZ"):
        content = content.replace(old, new)
    return content.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def cmyk_profile() -> bytes:
    """An ICC profile whose printer has black ink only: cyan, magenta and yellow stay white."""
    identity = bytes(range(256))
    white_black = bytes([255, 128, 128, 0, 128, 128])  # L*, a*, b*
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2)
    table += struct.pack(">9i", *(65536 * (i in (0, 4, 8)) for i in range(9)))
    table += identity * 4 + white_black * 2**3 + identity * 3
    text = b"desc" + struct.pack(">4xI", 5) + b"mono\0" + bytes(78 + 11)
    d50 = 63190, 65536, 54061
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *d50)
    tags, data = b"", b""
    start = 128 + 4 + 3 * 12
    for name, content in ((b"desc", text), (b"wtpt", white), (b"A2B0", table)):
        content += bytes(-len(content) % 4)
        tags += struct.pack(">4sII", name, start + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s", start + len(data), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab "
    )
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *d50) + bytes(48)
    assert len(header) == 128
    return header + struct.pack(">I", 3) + tags + data
