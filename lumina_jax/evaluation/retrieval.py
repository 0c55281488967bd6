"""Does a sampled picture show what its prompt asks for? On a small data set that can be counted.

A sample is right when, of all training pictures, the one nearest to it (mean squared error) is the
one whose caption was its prompt. A model that ignores prompts is right once in as many times as
there are pictures.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image


def nearest(
    samples: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    size: int,
) -> Int[np.ndarray, " samples"]:
    """The index of the picture nearest to each sample.

    All are stretched to squares of `size` pixels first, so that a picture's shape gives no hint.
    """
    points, targets = _flatten(samples, size), _flatten(pictures, size)
    distances = (
        np.sum(points**2, axis=1)[:, None]
        + np.sum(targets**2, axis=1)[None]
        - 2 * points @ targets.T
    )
    return np.argmin(distances, axis=1)


def _flatten(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: int) -> Float[np.ndarray, "n d"]:
    squares = [
        Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images
    ]
    return np.stack([np.asarray(square, np.float64).ravel() / 255 for square in squares])
