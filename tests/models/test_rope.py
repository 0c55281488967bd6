"""Rotations against complex numbers, and what they must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np

from lumina_jax.models import rope

AXES_DIMS, THETA = (32, 32, 32), 10000.0


def test_rotation_is_multiplication_by_a_complex_phase():
    """Adjacent features are the real and imaginary part; angles in float64, as the reference."""
    positions = np.random.default_rng(0).integers(0, 500, (2, 7, 3))
    x = jax.random.normal(jax.random.key(0), (2, 4, 7, 96))
    rotated = rope.rotate(x, rope.frequencies(jnp.asarray(positions), AXES_DIMS, THETA))

    rates = THETA ** (-np.arange(0, 32, 2) / 32)
    angles = (positions[..., None] * rates).reshape(2, 1, 7, 48)
    pairs = np.asarray(x, np.float64)
    expected = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * np.exp(1j * angles)
    # Angles reach 500; float32 holds those to 3e-5.
    np.testing.assert_allclose(rotated[..., ::2], expected.real, atol=2e-4)
    np.testing.assert_allclose(rotated[..., 1::2], expected.imag, atol=2e-4)


def test_position_zero_does_not_rotate():
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, 96))
    freqs = rope.frequencies(jnp.zeros((1, 3, 3), jnp.int32), AXES_DIMS, THETA)
    np.testing.assert_array_equal(rope.rotate(x, freqs), x)


def test_scores_depend_on_differences_of_positions_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 2, 5, 96))
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 20, (1, 5, 3)))

    def scores(positions):
        freqs = rope.frequencies(positions, AXES_DIMS, THETA)
        return jnp.einsum("bhtd,bhsd->bhts", rope.rotate(q, freqs), rope.rotate(k, freqs))

    shifted = positions + jnp.array([[[7, 3, 11]]])
    np.testing.assert_allclose(scores(positions), scores(shifted), atol=1e-4)


def test_a_picture_begins_where_its_own_caption_ends():
    cap_mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    rows = jnp.array([[0, 0, 1], [0, 1, 2]])
    columns = jnp.array([[0, 1, 0], [0, 0, 0]])
    caption, image = rope.caption_ids(cap_mask), rope.image_ids(cap_mask, rows, columns)
    np.testing.assert_array_equal(caption[0], [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    np.testing.assert_array_equal(image[0], [[3, 0, 0], [3, 0, 1], [3, 1, 0]])
    np.testing.assert_array_equal(image[1], [[1, 0, 0], [1, 1, 0], [1, 2, 0]])
