"""The path, its velocity, its times and its loss, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import flow
from lumina_jax.errors import InputError


def logit(t):
    return np.log(t) - np.log1p(-t)


def test_the_path_runs_from_noise_to_data_at_constant_velocity():
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    t = jnp.array([0.0, 0.25, 1.0])
    x_t = flow.interpolate(latents, noise, t)
    np.testing.assert_array_equal(x_t[0], noise[0])
    np.testing.assert_allclose(x_t[1], noise[1] + 0.25 * (latents - noise)[1], rtol=1e-6)
    np.testing.assert_array_equal(x_t[2], latents[2])


def test_shift_lowers_the_logit_by_the_log_of_the_shift():
    t = jnp.linspace(0.01, 0.99, 50)
    shifted = flow.shift_times(t, 3.0)
    np.testing.assert_allclose(
        logit(shifted), logit(np.asarray(t)) - np.log(3), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(flow.shift_times(jnp.array([0.0, 1.0]), 6.0), [0, 1])


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15), (16384, 3.23)])
def test_resolution_shift_equals_the_official_line(tokens, mu):
    assert np.log(flow.resolution_shift(tokens)) == pytest.approx(mu)


def test_logit_normal_times_are_a_shifted_sigmoid_of_a_normal():
    t = flow.sample_times(
        jax.random.key(0), 100_000, distribution="logit_normal", shift=np.exp(0.5)
    )
    x = logit(np.asarray(t, np.float64))
    assert x.mean() == pytest.approx(-0.5, abs=0.02)
    assert x.std() == pytest.approx(1, abs=0.02)


def test_uniform_times_are_uniform():
    t = np.asarray(flow.sample_times(jax.random.key(0), 100_000, distribution="uniform", shift=1.0))
    np.testing.assert_allclose(np.histogram(t, 10, (0, 1))[0] / len(t), 0.1, atol=0.01)


def test_unknown_distribution_is_refused():
    with pytest.raises(InputError, match="'cosine' is not one of logit_normal, uniform"):
        flow.sample_times(jax.random.key(0), 2, distribution="cosine", shift=1.0)


def test_the_loss_of_a_picture_is_the_mean_over_its_own_tokens():
    """A picture of two tokens weighs as much as one of four, and padding weighs nothing."""
    latents = jnp.zeros((2, 4, 3))
    noise = jnp.zeros((2, 4, 3))
    velocity = jnp.ones((2, 4, 3)).at[1, :2].set(2.0)
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    velocity = jnp.where(mask[..., None], velocity, 1e3)
    np.testing.assert_allclose(flow.loss(velocity, latents, noise, mask), [1, 4])


def test_the_true_velocity_has_no_loss():
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    losses = flow.loss(latents - noise, latents, noise, jnp.ones((3, 5), bool))
    np.testing.assert_array_equal(losses, 0)
