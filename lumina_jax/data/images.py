"""Pictures out of bytes: any file that a crawl may hold, and the ones that we stored ourselves.

A file is what its first bytes say, whatever its name or its server claimed. Only the raster formats
in `FORMATS` are read, so that no other decoder ever meets downloaded bytes. What cannot be taken is
`Rejected` with one of the `REASONS`; the pixels of a picture with too many are never allocated.

JPEG is decoded by simplejpeg with libjpeg's warnings as errors. The pixels are those of Pillow, but
Pillow is silent where data are missing or damaged and leaves grey or smeared blocks. Damage that
still decodes cannot be seen: some flipped bits of a JPEG, nearly all of a WebP, AVIF, GIF, BMP or
TIFF, which have no checksum. PNG has one.
"""

import functools
import io
import re
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # about 1 GB while it is decoded

EMPTY = "empty file"
NOT_A_PICTURE = "not a picture"
UNSUPPORTED = "unsupported format"
TRUNCATED = "truncated"
DAMAGED = "damaged"
TOO_MANY_PIXELS = "too many pixels"
REASONS = {
    EMPTY: "no bytes at all",
    NOT_A_PICTURE: "something else, such as an error page, a video or a drawing (SVG, PDF)",
    UNSUPPORTED: "a picture of another format, or of numbers that are no colours",
    TRUNCATED: "the end of the file is missing",
    DAMAGED: "a picture that its decoder finds fault with",
    TOO_MANY_PIXELS: "more pixels than allowed, or more work than so many need",
}

# By Pillow's name: how a file begins.
FORMATS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "AVIF": rb".{4}ftyp(avif|avis|(mif1|msf1).{4}(.{4}){0,8}?avif)",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM.{4}\0{4}",
}
_OTHER_FORMATS = {
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "Photoshop": rb"8BPS",
    "icon": rb"\0\0[\x01\x02]\0",
}
_NO_PICTURES = {
    "video": rb".{4}(ftyp|moov)|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|\0\0\x01[\xb3\xba]",
    "audio": rb"ID3|OggS|fLaC|RIFF.{4}WAVE",
    "archive": rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!",
    "PDF": rb"%PDF",
    "PostScript": rb"%!PS",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?<svg",
    "HTML": rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?<(!doctype html|html|head|body|script)",
    "XML": rb"(\xef\xbb\xbf)?\s*<\?xml",
    "JSON": rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}\d]",
    "text": rb"(\xef\xbb\xbf)?[\s\x20-\x7e]+$",
    "zeros": rb"\0+$",
}
_NUM_SNIFFED = 512  # bytes that tell what a file is

# The value of EXIF's orientation, and what makes such a picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

# Of a JPEG whose pixels are all there. The last is of a sampling that the TurboJPEG API lacks.
_HARMLESS = re.compile(
    "Unknown Adobe color transform|unknown JFIF revision|Invalid SOS parameters|bad ICC marker"
    "|Could not determine subsampling"
)
# A progressive JPEG may come in any number of scans, each a few bytes and a pass over all pixels.
# Encoders write about ten.
_MAX_SCANNED = 200  # times max_pixels

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

# Pillow warns of odd metadata. Nothing follows from it, and there would be millions of lines. Set
# once: warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Rejected(Exception):
    """Why a picture is not taken.

    Args:
        reason: a few plain words that can be counted, one of `REASONS` where `decode` raises it.
        detail: of this one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the picture of a file, upright, in sRGB, with what is transparent on white.

    Of an animation or of several pages it is the first. Metadata are left behind. Pillow's limit
    of 179 million pixels stays, whatever `max_pixels` says.
    """
    name = sniff(content)
    try:
        opened = Image.open(io.BytesIO(content), formats=[name])
        if _is_too_large(opened, content, max_pixels):
            raise Rejected(TOO_MANY_PIXELS, f"{name} of {opened.width} x {opened.height}")
        image = _load_jpeg(opened, content) if name == "JPEG" else opened
        image.load()
        return to_rgb(_upright(image, opened), opened.info.get("icc_profile"))
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(TOO_MANY_PIXELS, f"{name}: {error}") from error
    except Exception as error:  # what a decoder raises on damaged bytes is anything
        is_cut = "truncated" in str(error).lower() or _is_cut(content, name)
        # Of a header that it cannot read Pillow only says where the bytes are in memory.
        fault = "cannot be identified" if isinstance(error, UnidentifiedImageError) else error
        raise Rejected(TRUNCATED if is_cut else DAMAGED, f"{name}: {fault}") from error


def decode_stored(content: bytes, out: UInt8[np.ndarray, "H W 3"]) -> None:
    """Decodes a prepared picture into its place; it must have exactly that size.

    Anything else raises, a JPEG that is cut off too: ValueError, or what Pillow raises.
    """
    if content[:2] == b"\xff\xd8":
        shape = simplejpeg.decode_jpeg(content, buffer=out).shape
    else:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
            shape = (image.height, image.width, 3)
            if shape == out.shape:
                out[...] = np.asarray(image.convert("RGB"))
    if shape != out.shape:
        raise ValueError(f"the picture is {shape[1]}x{shape[0]}, not {out.shape[1]}x{out.shape[0]}")


def to_rgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Returns a picture of any mode in RGB, with what is transparent on white, without metadata.

    With the ICC profile of its colours they become those of sRGB; one that does not fit is ignored.
    """
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off what is above 255, the colour that is transparent too.
        values = np.asarray(image).astype(np.uint32)
        scaled = ((values * 255 + 32767) // 65535).astype(np.uint8)
        scaled[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(scaled)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # of NaN neither is true
            raise Rejected(UNSUPPORTED, "floats that are not all between 0 and 1")
        image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    elif image.mode in ("I", "LAB", "HSV"):
        raise Rejected(UNSUPPORTED, f"pixels of Pillow's mode {image.mode}")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if profile else None
    if transform is not None:
        image = transform.apply(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    # Pillow would write the profile and more of it into the next file.
    image.info.clear()
    return image


def sniff(content: bytes) -> str:
    """Returns which of the `FORMATS` a file is of; raises `Rejected` for every other."""
    if not content:
        raise Rejected(EMPTY)
    head = content[:_NUM_SNIFFED]
    for names in (FORMATS, _OTHER_FORMATS, _NO_PICTURES):
        for name, pattern in names.items():
            if re.match(pattern, head, re.DOTALL):
                if names is FORMATS:
                    return name
                raise Rejected(UNSUPPORTED if names is _OTHER_FORMATS else NOT_A_PICTURE, name)
    raise Rejected(NOT_A_PICTURE, f"unknown, begins with {head[:8].hex(' ')}")


def _is_too_large(image: Image.Image, content: bytes, max_pixels: int) -> bool:
    num_pixels = image.width * image.height
    num_scans = content.count(b"\xff\xda") if "progressive" in image.info else 1
    return num_pixels > max_pixels or num_pixels * num_scans > _MAX_SCANNED * max_pixels


def _load_jpeg(image: Image.Image, content: bytes) -> Image.Image:
    """Decodes strictly; the size and mode are those that Pillow found in the header."""
    colors = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    try:
        shape = simplejpeg.decode_jpeg(content, colors, buffer=pixels).shape
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            image.load()
            return image
        raise
    if shape != pixels.shape:
        raise ValueError("its headers give two sizes")
    if image.mode == "CMYK":
        pixels = 255 - pixels  # Adobe stores how much of the ink is missing, and so does everybody
    return Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels, image.mode)


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turns a picture as its metadata say; in some formats they stand behind the pixels."""
    try:
        orientation = opened.getexif().get(_ORIENTATION)
    except Exception:  # broken metadata of a sound picture raises anything
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


@functools.lru_cache(maxsize=16)  # a few profiles are in nearly all pictures that have one
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return None
        return ImageCms.ImageCmsTransform(source, _SRGB, mode, "RGB")
    except (OSError, ValueError):  # broken, or of colours that the picture does not have
        return None


def _is_cut(content: bytes, name: str) -> bool:
    """Tells a file that lacks its end, once it could not be decoded."""
    if name == "JPEG":  # a thumbnail in front has an end of its own
        return content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda")
    if name == "PNG":
        return b"IEND" not in content
    if name == "WEBP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if name == "TIFF":  # the directory often stands at the end
        order = "little" if content[:2] == b"II" else "big"
        return int.from_bytes(content[4:8], order) + 2 > len(content)
    if name == "AVIF":  # boxes, one after another
        end = 0
        while (size := int.from_bytes(content[end : end + 4], "big")) > 0:
            end += size
        return end > len(content)
    return False
