"""Learning rate, decay and average, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import optim
from lumina_jax.errors import InputError

CONFIG = optim.OptimConfig(
    learning_rate=1e-3, warmup_steps=10, schedule="cosine", b1=0.9, b2=0.95, eps=1e-15,
    weight_decay=0.1, grad_clip=1.0, ema_decay=0.99,
)  # fmt: skip


def test_the_rate_rises_to_its_peak_then_falls_to_zero():
    rate = optim.learning_rate(CONFIG, num_steps=110)
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [1e-4, 1e-3, 1e-3], rtol=1e-5)
    assert float(rate(60)) == pytest.approx(5e-4)
    assert float(rate(110)) == pytest.approx(0, abs=1e-9)


def test_a_constant_rate_without_warmup_is_constant():
    config = dataclasses.replace(CONFIG, schedule="constant", warmup_steps=0)
    rate = optim.learning_rate(config, num_steps=100)
    assert [float(rate(step)) for step in (0, 50, 1000)] == pytest.approx([1e-3] * 3)


def test_decay_shrinks_kernels_alone():
    params = {
        "linear": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    }
    optimizer = optim.make_optimizer(dataclasses.replace(CONFIG, warmup_steps=0), num_steps=100)
    zeros = {
        "linear": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.zeros(2)},
    }
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["linear"]["kernel"], -1e-3 * 0.1, rtol=1e-5)
    np.testing.assert_array_equal(updates["linear"]["bias"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_a_large_gradient_is_clipped_and_a_small_one_is_not():
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    optimizer = optim.make_optimizer(config, num_steps=100)
    params = {"linear": {"kernel": jnp.zeros((2,))}}

    def first_moment(gradient):
        grads = {"linear": {"kernel": jnp.array(gradient)}}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        return np.asarray(state[1][0].mu["linear"]["kernel"]) / 0.1

    np.testing.assert_allclose(first_moment([30.0, 40.0]), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(first_moment([0.3, 0.4]), [0.3, 0.4], rtol=1e-5)


def test_the_average_forgets_its_start_then_follows_slowly():
    one, two = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    early = optim.update_ema(one, two, jnp.int32(0), 0.99)
    late = optim.update_ema(one, two, jnp.int32(10_000), 0.99)
    assert [float(early["w"][0]), float(late["w"][0])] == pytest.approx([0.9, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule='linear' is not one of constant, cosine"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 and grad_clip=1.0 must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)
