"""Pictures that hold several: cut into their panels.

    four = cut_grid(picture)                              # system prompt "4grid"
    picture, depth_map = cut_dual(picture, "lower half")  # system_prompts.dual_panel

A picture is one of Pillow or an array uint8 [H, W, 3], and so are its panels.
"""

import numpy as np
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.system_prompts import SYSTEM_PROMPTS

Picture = Image.Image | np.ndarray

GRID = ("upper_left", "upper_right", "lower_left", "lower_right")
# Along which axis of the array a half lies, and whether it comes first or second.
HALVES = {
    "upper half": (0, 0),
    "lower half": (0, 1),
    "left half": (1, 0),
    "right half": (1, 1),
}


def cut_grid(picture: Picture) -> list[Picture]:
    """The four pictures of a 2 x 2 grid, in the order of GRID."""
    return [side for half in _split(picture, 0) for side in _split(half, 1)]


def cut_dual(picture: Picture, half: str = "lower half") -> tuple[Picture, Picture]:
    """The picture, and its condition, which is seen in this half."""
    if half not in HALVES:
        raise InputError(f"half={half!r} is not one of {', '.join(HALVES)}.")
    axis, which = HALVES[half]
    panels = _split(picture, axis)
    return panels[1 - which], panels[which]


def cut(picture: Picture, system_prompt: str) -> dict[str, Picture]:
    """The panels that the text of a system prompt asks for, by their names."""
    if system_prompt == SYSTEM_PROMPTS["4grid"]:
        return dict(zip(GRID, cut_grid(picture), strict=True))
    for half in HALVES:
        if f"the <{half}> displays" in system_prompt:
            return dict(zip(("picture", "condition"), cut_dual(picture, half), strict=True))
    raise InputError(
        f"The system prompt {system_prompt!r} asks for one picture, which has no panels. Those of "
        f"'4grid' and of dual_panel ask for several."
    )


def _split(picture, axis):
    """Both halves along the height, axis 0, or the width, axis 1."""
    is_array = isinstance(picture, np.ndarray)
    size = picture.shape[:2] if is_array else picture.size[::-1]
    if size[axis] % 2:
        raise InputError(
            f"A picture of {size[0]} x {size[1]} pixels (height x width) has no two equal halves "
            f"along its {('height', 'width')[axis]}. Draw it with an even one."
        )
    if is_array:
        return np.split(picture, 2, axis=axis)
    height, width = size
    if axis == 0:
        boxes = ((0, 0, width, height // 2), (0, height // 2, width, height))
    else:
        boxes = ((0, 0, width // 2, height), (width // 2, 0, width, height))
    return [picture.crop(box) for box in boxes]
