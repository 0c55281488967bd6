"""One step of training: a pure function from a train state and a batch to the next state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lumina_jax import flow, optim, sharding
from lumina_jax.types import Batch, ImageTokens

NUM_TIME_BINS = 20


class TrainState(NamedTuple):
    """Everything that a step changes. Parameters, average and moments are nested dicts."""

    step: Array
    params: Any
    ema: Any
    opt_state: Any


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # A copy of its own: the state is donated, and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def make_train_step(
    forward: Callable,
    optimizer: optax.GradientTransformation,
    *,
    time_distribution: str,
    time_shift: float,
    auxiliary_weight: float = 0.0,
    auxiliary_shift: float = 1.0,
    num_microbatches: int = 1,
    ema_decay: float,
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, dict]]:
    """Returns `step(state, batch, key) -> (state, metrics)`, ready for `jax.jit`.

    Args:
      forward: forward(params, images, times, cap_feats, cap_mask) -> velocities, of several
        pictures of each caption (`next_dit.make_forward_many`).
      optimizer: From lumina_jax.optim.
      time_distribution: Of the times trained at; see lumina_jax.flow.
      time_shift: Shift of those times.
      auxiliary_weight: Of the loss on the pooled pictures (paper equation 4); 0 leaves it out.
      auxiliary_shift: Shift of the times of that loss.
      num_microbatches: Into how many parts the batch goes through the model, one after another.
      ema_decay: Of the averaged weights.

    The draws of a step depend on `key` and the step's number alone, and the gradient is the mean
    over the whole batch, so neither the mesh nor `num_microbatches` changes what is learned.

    A step whose loss or gradient is not finite is not applied: parameters, average and moments stay
    as they were, while the step's number and the schedule of the learning rate go on, and with them
    the data and the draws. `metrics["applied"]` is then 0.
    """

    def loss_fn(params, microbatch):
        conditions, noised, times = microbatch
        points = tuple(image._replace(tokens=x_t) for image, x_t, _ in noised)
        velocities = forward(params, points, times, *conditions)
        losses = tuple(
            flow.loss(velocity, image.tokens, noise, image.mask)
            for velocity, (image, _, noise) in zip(velocities, noised, strict=True)
        )
        weights = (1.0, auxiliary_weight)[: len(losses)]
        total = sum(w * jnp.mean(each) for w, each in zip(weights, losses, strict=True))
        return total, losses

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradient(params, examples):
        """The mean gradient over microbatches, and the loss of each picture."""
        if num_microbatches == 1:
            return grad_fn(params, examples)

        def accumulate(total, microbatch):
            grads, losses = grad_fn(params, microbatch)
            return jax.tree.map(lambda a, b: a + b / num_microbatches, total, grads), losses

        zeros = jax.tree.map(jnp.zeros_like, params)
        microbatches = jax.tree.map(lambda x: split_batch(x, num_microbatches), examples)
        grads, losses = jax.lax.scan(accumulate, zeros, microbatches)
        return grads, jax.tree.map(join_batch, losses)

    def step(state, batch, key):
        main_key, auxiliary_key = jax.random.split(jax.random.fold_in(key, state.step))
        pictures = [corrupt(batch.image, main_key, time_distribution, time_shift)]
        if auxiliary_weight:
            pictures.append(
                corrupt(batch.pooled, auxiliary_key, time_distribution, auxiliary_shift)
            )
        noised, times = zip(*pictures, strict=True)

        conditions = (batch.cap_feats, batch.cap_mask)
        grads, losses = gradient(state.params, (conditions, noised, times))
        grad_norm = optax.tree.norm(grads)
        # Of each picture: which of them it was can be said only here.
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, losses))
        applied = jnp.isfinite(grad_norm) & jnp.all(finite)
        state = update(state, grads, applied, optimizer, ema_decay=ema_decay)

        metrics = {"grad_norm": grad_norm, "applied": applied, "finite": finite}
        for name, each, t in zip(("loss", "auxiliary_loss"), losses, times, strict=False):
            metrics |= {name: jnp.mean(each)} | time_bins(name, each, t)
        return state, metrics

    return step


def update(
    state: TrainState,
    grads: Any,
    applied: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
) -> TrainState:
    """The next state; where not `applied`, only the step and the schedule have gone on."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optim.update_ema(state.ema, params, state.step, ema_decay)

    def choose(new, old):
        # A schedule counts steps, as the data do, and not updates.
        return new if optim.is_schedule(new) else jnp.where(applied, new, old)

    new = (params, ema, opt_state)
    chosen = jax.tree.map(choose, new, state[1:], is_leaf=optim.is_schedule)
    return TrainState(state.step + 1, *chosen)


def corrupt(
    image: ImageTokens, key: PRNGKeyArray, distribution: str, shift: float
) -> tuple[tuple[ImageTokens, Array, Array], Float[Array, " B"]]:
    """Draws noise and times: ((pictures, their points on the path, noise), times)."""
    time_key, noise_key = jax.random.split(key)
    t = flow.sample_times(time_key, len(image.tokens), distribution=distribution, shift=shift)
    noise = jax.random.normal(noise_key, image.tokens.shape)
    noise = sharding.constrain(noise, ("act_batch",))
    return (image, flow.interpolate(image.tokens, noise, t), noise), t


def split_batch(x: Array, num: int) -> Array:
    """[B, ...] to [num, B / num, ...], every `num`-th example in one part: no shard has to move."""
    return jnp.swapaxes(x.reshape(-1, num, *x.shape[1:]), 0, 1)


def join_batch(x: Array) -> Array:
    """Undoes `split_batch`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def time_bins(name: str, losses: Float[Array, " B"], t: Float[Array, " B"]) -> dict[str, Array]:
    """Sum and count of the losses in equal bins of t; metrics.py divides, over many steps."""
    index = jnp.clip((t * NUM_TIME_BINS).astype(jnp.int32), 0, NUM_TIME_BINS - 1)
    # Compared, not scattered: a v6e would give a scatter to its SparseCores.
    inside = index[:, None] == jnp.arange(NUM_TIME_BINS)[None]
    return {
        f"{name}_bins_sum": jnp.sum(jnp.where(inside, losses[:, None], 0.0), axis=0),
        f"{name}_bins_count": jnp.sum(inside, axis=0, dtype=jnp.float32),
    }
