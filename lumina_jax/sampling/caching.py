"""Cache reuse: the layers are skipped while what they would add has hardly changed.

The layers turn the joined sequence x into x + residual. While the sequence that enters them moves
little, so does the residual, and the one of an earlier evaluation is added again (TeaCache, Liu et
al., arXiv 2411.19108). How far it has moved is read off what the first layer attends with:

    distance = mean |input - input before| / mean |input before|
    expected = expected + max(0, polynomial(distance))       the change of the residual, about
    expected >= threshold, or told to:  run the layers, expected = 0;  otherwise reuse

What is added again is the last residual, or the line through the last two, as far as the time has
gone since: the first order of TaylorSeer (Liu et al., arXiv 2503.06923).

Each branch of guidance and each picture of a batch has a state of its own and gets the numbers that
it would get alone; the layers are really skipped where no picture of a call needs them.

Axes: B rows of a branch, T tokens, D model width, E evaluations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Policy(NamedTuple):
    """When the layers run. Arrays under jit, so that another policy needs no other program.

    Attributes:
      forced: Evaluations in which they run whatever has moved.
      threshold: Expected change of the residual from which on they run.
      coefficients: From the distance to the change that it makes, the highest power first.
      extrapolate: 1 follows the line through the last two residuals, 0 adds the last one.
    """

    forced: Bool[Array, " E"]
    threshold: Float[Array, ""]
    coefficients: Float[Array, " P"]
    extrapolate: Float[Array, ""]


class Cache(NamedTuple):
    """The state of a branch between evaluations.

    Attributes:
      expected: Change of the residual since it was computed.
      first_input: Of the evaluation before.
      residuals: The last one computed, and the one computed before it.
      times: Of both.
    """

    expected: Float[Array, " B"]
    first_input: Float[Array, "B T D"]
    residuals: tuple[Float[Array, "B T D"], Float[Array, "B T D"]]
    times: tuple[Float[Array, " B"], Float[Array, " B"]]


class Record(NamedTuple):
    """What happened in one evaluation, for each row.

    Attributes:
      computed: Whether it got a residual of its own.
      distance: How far the first layer's input had moved.
      change: Of the residual since the one in the cache, measured as the distance is; 0 if reused.
    """

    computed: Bool[Array, " B"]
    distance: Float[Array, " B"]
    change: Float[Array, " B"]


def empty(x: jax.ShapeDtypeStruct | Float[Array, "B T D"]) -> Cache:
    """For sequences like x; the first evaluation must be forced."""
    zeros, none = jnp.zeros(x.shape, x.dtype), jnp.zeros(x.shape[0])
    return Cache(none, zeros, (zeros, zeros), (none, none))


def reuse(
    layers: Callable[[], Float[Array, "B T D"]],
    x: Float[Array, "B T D"],
    first_input: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    t: Float[Array, ""],
    cache: Cache,
    policy: Policy,
) -> tuple[Float[Array, "B T D"], Cache, Record]:
    """The sequence after the layers, run or reused.

    Args:
      layers: Runs them on x.
      x: What enters them.
      first_input: What the first of them attends with.
      segment_ids: 1 at tokens, 0 at padding, which does not count.
      t: Of this evaluation.
      cache: Of the evaluations before.
      policy: With `forced` of this evaluation.
    """
    distance = _relative(first_input, cache.first_input, segment_ids)
    # Beyond its range a fitted polynomial may fall below zero; nothing ever moves back.
    expected = cache.expected + jnp.maximum(jnp.polyval(policy.coefficients, distance), 0)
    computed = policy.forced | (expected >= policy.threshold)

    last, before = cache.times
    # Two residuals of one time, as at the joint of two intervals, have no line through them.
    ahead = jnp.where(last > before, (t - last) / jnp.where(last > before, last - before, 1), 0)
    ahead = (policy.extrapolate * ahead)[:, None, None]

    def reused(x, residual, before):
        follow = ahead * (residual.astype(jnp.float32) - before.astype(jnp.float32))
        return x + residual + follow.astype(x.dtype)

    def run(x, residual, before):
        after, mine = layers(), computed[:, None, None]
        found = after - x
        change = _relative(found, residual, segment_ids)
        return (
            # Not x + (after - x), which is rounded once more.
            jnp.where(mine, after, reused(x, residual, before)),
            (jnp.where(mine, found, residual), jnp.where(mine, residual, before)),
            jnp.where(computed, change, 0),
        )

    def skip(x, residual, before):
        return reused(x, residual, before), (residual, before), jnp.zeros_like(distance)

    after, residuals, change = jax.lax.cond(jnp.any(computed), run, skip, x, *cache.residuals)
    # Before the first residual there was none, at the same time as it.
    first = distance == 0
    times = (
        jnp.where(computed, t, last),
        jnp.where(computed, jnp.where(first, t, last), before),
    )
    cache = Cache(jnp.where(computed, 0, expected), first_input, residuals, times)
    return after, cache, Record(computed, distance, change)


def _relative(x, before, segment_ids):
    """Mean |x - before| / mean |before| over the tokens of each row; 0 where there is nothing."""
    real = (segment_ids > 0)[..., None]

    def total(values):
        return jnp.sum(jnp.where(real, jnp.abs(values.astype(jnp.float32)), 0), axis=(1, 2))

    was = total(before)
    # The difference too in float32: of two close numbers bfloat16 keeps none.
    moved = total(x.astype(jnp.float32) - before.astype(jnp.float32))
    return moved / jnp.where(was > 0, was, 1) * (was > 0)
