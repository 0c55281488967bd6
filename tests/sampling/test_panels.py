"""Cutting pictures into their panels."""

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.sampling import panels
from lumina_jax.system_prompts import SYSTEM_PROMPTS, dual_panel

# Four colours, as the quarters of a picture of 4 x 6 pixels.
QUARTERS = np.kron(np.array([[1, 2], [3, 4]], np.uint8), np.ones((2, 3), np.uint8))
PICTURE = np.stack([QUARTERS] * 3, axis=-1)


def colours(panel):
    return sorted(set(np.asarray(panel)[..., 0].ravel().tolist()))


@pytest.mark.parametrize("make", [np.asarray, Image.fromarray])
def test_a_grid_is_cut_row_by_row(make):
    four = panels.cut_grid(make(PICTURE))
    assert [colours(panel) for panel in four] == [[1], [2], [3], [4]]
    assert {np.asarray(panel).shape for panel in four} == {(2, 3, 3)}


@pytest.mark.parametrize("make", [np.asarray, Image.fromarray])
@pytest.mark.parametrize(
    ("half", "condition"),
    [
        ("upper half", [1, 2]), ("lower half", [3, 4]),
        ("left half", [1, 3]), ("right half", [2, 4]),
    ],
)  # fmt: skip
def test_the_condition_is_in_the_half_that_was_named(make, half, condition):
    picture, found = panels.cut_dual(make(PICTURE), half)
    assert colours(found) == condition
    assert colours(picture) == sorted({1, 2, 3, 4} - set(condition))


@pytest.mark.parametrize("half", panels.HALVES)
def test_the_system_prompt_says_how_a_picture_is_cut(half):
    found = panels.cut(PICTURE, dual_panel("depth map", half))
    assert list(found) == ["picture", "condition"]
    np.testing.assert_array_equal(found["condition"], panels.cut_dual(PICTURE, half)[1])
    assert tuple(panels.cut(PICTURE, SYSTEM_PROMPTS["4grid"])) == panels.GRID


def test_a_system_prompt_for_one_picture_has_no_panels():
    with pytest.raises(InputError, match="asks for one picture, which has no panels"):
        panels.cut(PICTURE, SYSTEM_PROMPTS["real"])


def test_sides_that_cannot_be_halved_are_refused():
    with pytest.raises(InputError, match=r"3 x 6 pixels .* no two equal halves along its height"):
        panels.cut_grid(PICTURE[:3])
    with pytest.raises(InputError, match="no two equal halves along its width"):
        panels.cut_dual(Image.fromarray(PICTURE[:, :5]), "left half")


def test_an_unknown_half_is_refused():
    with pytest.raises(InputError, match="half='top' is not one of upper half, lower half"):
        panels.cut_dual(PICTURE, "top")
