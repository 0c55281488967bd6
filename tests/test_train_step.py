"""One step against the same step written out, and the ways of running it that must agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lumina_jax import flow
from lumina_jax.models import embed
from lumina_jax.train_step import (
    NUM_TIME_BINS,
    init_state,
    join_batch,
    make_train_step,
    split_batch,
)
from lumina_jax.types import Batch, ImageTokens

KEY = jax.random.key(7)


def forward(params, images, times, cap_feats, cap_mask):
    """A network of two numbers that listens to picture, time and caption."""
    caption = jnp.mean(cap_feats * cap_mask[..., None], axis=(1, 2))
    return tuple(
        params["a"] * image.tokens + params["b"] * (t + caption)[:, None, None]
        for image, t in zip(images, times, strict=True)
    )


def make_batch(num=8):
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (num, 16, 16, 2))
    image = embed.patchify(latents, 2, 64)
    # Pictures of different size: the mask is not the same for all.
    image = image._replace(
        mask=image.mask & (jnp.arange(64)[None] < 32 + 4 * jnp.arange(num)[:, None])
    )
    pooled = embed.patchify(embed.pool_latents(latents), 2, 4)
    cap_feats = jax.random.normal(keys[1], (num, 3, 5))
    return Batch(image, pooled, cap_feats, jnp.ones((num, 3), bool))


def run_step(batch=None, state=None, **changes):
    optimizer = optax.sgd(0.1)
    settings = dict(time_distribution="logit_normal", time_shift=2.0, ema_decay=0.5)
    step = jax.jit(make_train_step(forward, optimizer, **{**settings, **changes}))
    state = state or init_state({"a": jnp.ones(()), "b": jnp.ones(())}, optimizer)
    return step(state, batch or make_batch(), KEY)


def test_a_step_is_the_gradient_of_the_loss_at_its_own_draws():
    batch = make_batch()
    state, metrics = run_step(batch)
    time_key, noise_key = jax.random.split(jax.random.split(jax.random.fold_in(KEY, 0))[0])
    t = flow.sample_times(time_key, 8, distribution="logit_normal", shift=2.0)
    noise = jax.random.normal(noise_key, batch.image.tokens.shape)

    def loss(params):
        x_t = (1 - t)[:, None, None] * noise + t[:, None, None] * batch.image.tokens
        image = ImageTokens(x_t, *batch.image[1:])
        (velocity,) = forward(params, (image,), (t,), batch.cap_feats, batch.cap_mask)
        error = jnp.mean((velocity - (batch.image.tokens - noise)) ** 2, axis=-1)
        return jnp.mean(jnp.sum(error * batch.image.mask, 1) / batch.image.mask.sum(1))

    value, grads = jax.value_and_grad(loss)({"a": jnp.ones(()), "b": jnp.ones(())})
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    np.testing.assert_allclose(state.params["a"], 1 - 0.1 * grads["a"], rtol=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize("num", [2, 4, 8])
@pytest.mark.parametrize("auxiliary_weight", [0.0, 1.0])
def test_microbatches_do_not_change_the_step(num, auxiliary_weight):
    whole, expected = run_step(auxiliary_weight=auxiliary_weight)
    parts, found = run_step(auxiliary_weight=auxiliary_weight, num_microbatches=num)
    np.testing.assert_allclose(parts.params["a"], whole.params["a"], rtol=1e-5)
    np.testing.assert_allclose(parts.params["b"], whole.params["b"], rtol=1e-5)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


def test_microbatches_keep_the_order_of_the_batch():
    x = jnp.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(join_batch(split_batch(x, 3)), x)


def test_the_auxiliary_loss_sees_the_pooled_picture_with_draws_of_its_own():
    _, without = run_step()
    state, metrics = run_step(auxiliary_weight=1.0, auxiliary_shift=1.5)
    np.testing.assert_allclose(metrics["loss"], without["loss"], rtol=1e-6)
    assert float(metrics["auxiliary_loss"]) != pytest.approx(float(metrics["loss"]), rel=1e-3)
    twice, _ = run_step(auxiliary_weight=2.0, auxiliary_shift=1.5)
    once, _ = run_step()
    # SGD is linear in the gradient: weight 2 moves twice as far as weight 1 from weight 0.
    np.testing.assert_allclose(
        twice.params["a"] - once.params["a"], 2 * (state.params["a"] - once.params["a"]), rtol=1e-4
    )


def test_each_step_draws_anew():
    state, first = run_step()
    _, second = run_step(state=state._replace(params={"a": jnp.ones(()), "b": jnp.ones(())}))
    assert float(first["loss"]) != float(second["loss"])


def test_time_bins_add_up_to_the_loss():
    _, metrics = run_step()
    assert metrics["loss_bins_count"].shape == (NUM_TIME_BINS,)
    assert float(metrics["loss_bins_count"].sum()) == 8
    assert float(metrics["loss_bins_sum"].sum() / 8) == pytest.approx(
        float(metrics["loss"]), rel=1e-5
    )


def test_the_average_follows_the_parameters():
    state, _ = run_step()
    # At the first step the decay is 1 / 10.
    np.testing.assert_allclose(state.ema["a"], 0.1 * 1.0 + 0.9 * state.params["a"], rtol=1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_step_without_a_finite_loss_is_not_applied(number, num_microbatches):
    """Parameters, average and moments stay; step and schedule go on; the picture is named."""
    optimizer = optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(optax.constant_schedule(0.1))
    )
    step = jax.jit(
        make_train_step(
            forward, optimizer, time_distribution="logit_normal", time_shift=2.0, ema_decay=0.5,
            num_microbatches=num_microbatches,
        )
    )  # fmt: skip
    batch = make_batch()
    before, _ = step(init_state({"a": jnp.ones(()), "b": jnp.ones(())}, optimizer), batch, KEY)
    tokens = batch.image.tokens.at[5, 0, 0].set(number)
    after, metrics = step(before, batch._replace(image=batch.image._replace(tokens=tokens)), KEY)
    assert not metrics["applied"]
    np.testing.assert_array_equal(np.flatnonzero(~metrics["finite"]), [5])
    (adam, schedule), (adam_before, schedule_before) = after.opt_state, before.opt_state
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.ema, adam),
        (before.params, before.ema, adam_before),
    )
    assert int(schedule.count) == int(schedule_before.count) + 1
    assert (int(before.step), int(after.step)) == (1, 2)
