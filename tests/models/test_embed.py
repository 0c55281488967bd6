"""Latents to tokens and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.models import embed


def test_unpatchify_undoes_patchify():
    latents = jax.random.normal(jax.random.key(0), (2, 6, 10, 3))
    image = embed.patchify(latents, 2, 20)
    np.testing.assert_array_equal(embed.unpatchify(image.tokens, 2, 6, 10), latents)


def test_inside_a_token_the_channel_runs_fastest_and_the_row_slowest():
    """As the reference cuts: feature (row * 2 + column) * C + channel."""
    latents = jnp.arange(2 * 2 * 3, dtype=jnp.float32).reshape(1, 2, 2, 3)
    tokens = embed.patchify(latents, 2, 1).tokens
    np.testing.assert_array_equal(tokens[0, 0], np.arange(12))


def test_tokens_know_their_row_and_column_and_padding_is_masked():
    image = embed.patchify(jnp.ones((1, 4, 6, 1)), 2, 8)
    np.testing.assert_array_equal(image.rows[0, :6], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(image.columns[0, :6], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(image.mask[0], [True] * 6 + [False] * 2)
    np.testing.assert_array_equal(image.tokens[0, 6:], 0)


@pytest.mark.parametrize("shape", [(5, 4), (8, 8)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="do not cut into at most 8 patches of 2 x 2"):
        embed.patchify(jnp.ones((1, *shape, 1)), 2, 8)


def test_pooling_averages_windows_and_drops_the_rest():
    latents = jnp.arange(5 * 9, dtype=jnp.float32).reshape(1, 5, 9, 1)
    pooled = embed.pool_latents(latents)
    expected = np.arange(45).reshape(5, 9)
    np.testing.assert_allclose(
        pooled[0, :, :, 0], [[expected[:4, :4].mean(), expected[:4, 4:8].mean()]]
    )
