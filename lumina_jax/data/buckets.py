"""Buckets: the few picture sizes of a resolution, and how a picture of any shape gets into one.

Every bucket of a resolution holds nearly the same number of tokens, so one token budget serves all
aspect ratios (256 tokens at 256 px, 1024 at 512 px, 4096 at 1024 px, with 16 x 16 pixels a token).
Sizes are written WIDTHxHEIGHT everywhere, as in the official code; arrays are [height, width, 3].
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from PIL import Image

from lumina_jax.errors import InputError


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A picture size in pixels; its text form is "60x36", width first."""

    width: int
    height: int

    def __post_init__(self):
        if self.width < 1 or self.height < 1:
            raise InputError(f"Bucket {self} has a side below one pixel. Both must be 1 or more.")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(text).strip(), re.ASCII)
        if match is None:
            raise InputError(
                f"Bucket {text!r} is not a size in pixels. Write width x height, such as 60x36."
            )
        return cls(int(match[1]), int(match[2]))


def bucket_sizes(
    num_tokens: int, pixels_per_token: int = 16, max_ratio: float = 4.0
) -> tuple[Bucket, ...]:
    """Returns the official bucket list of a token budget, the widest first.

    Walks the edge of the budget from a flat row to a tall column, one token at a time. Both sides,
    halved, must be even: the auxiliary loss pools the latents by four and cuts the pooled latents
    into patches of two by two.
    """
    buckets = []
    columns, rows = num_tokens, 1
    while columns > 0:
        ratio = max(columns, rows) / min(columns, rows)
        if ratio <= max_ratio and (columns // 2) % 2 == 0 and (rows // 2) % 2 == 0:
            buckets.append(Bucket(columns * pixels_per_token, rows * pixels_per_token))
        if columns * (rows + 1) <= num_tokens:
            rows += 1
        else:
            columns -= 1
    if not buckets:
        raise InputError(
            f"No bucket fits a budget of {num_tokens} tokens of {pixels_per_token} x "
            f"{pixels_per_token} pixels. Take a larger resolution or fewer pixels per token, or "
            "name the buckets."
        )
    return tuple(buckets)


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Returns the bucket that keeps most of a picture; of equals, the larger (width, height)."""

    def kept(bucket: Bucket) -> float:
        scales = bucket.width / width, bucket.height / height
        return min(scales) / max(scales)

    return max(buckets, key=lambda bucket: (kept(bucket), bucket))


def resize_and_crop(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Returns the centre of an RGB picture at exactly the bucket's size.

    Every step goes across first, then down, as Pillow itself did when upstream used it. Pillow 13
    chooses the order by the shape of the picture, and with it how the pixels are rounded.
    """
    # Halving by box first: bicubic alone would skip pixels when it shrinks by more than two.
    while image.width >= 2 * bucket.width and image.height >= 2 * bucket.height:
        image = _halve(image)
    scale = max(bucket.width / image.width, bucket.height / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - bucket.width) // 2, (height - bucket.height) // 2
    return image.crop((left, top, left + bucket.width, top + bucket.height))


def pad_to_fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Returns the whole of an RGB picture at exactly the bucket's size, with white on two sides."""
    width = max(image.width, math.ceil(image.height * bucket.width / bucket.height))
    height = max(image.height, math.ceil(image.width * bucket.height / bucket.width))
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return resize_and_crop(canvas, bucket)


def _halve(image: Image.Image) -> Image.Image:
    """Does what resize by box does, bit for bit, and where a side is even three times as fast."""
    for across, down in ((2, 1), (1, 2)):
        if image.width % across or image.height % down:
            size = image.width // across, image.height // down
            image = image.resize(size, Image.Resampling.BOX)
        else:
            image = image.reduce((across, down))
    return image
