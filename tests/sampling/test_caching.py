"""What is reused, when, and that nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.models.next_dit import make_stages
from lumina_jax.sampling import caching, sampler
from lumina_jax.sampling.sampler import SamplerConfig
from tests.sampling import small_pipeline

MODEL = dataclasses.replace(small_pipeline.MODEL, num_layers=3, patch_size=2)
BASE = dict(
    num_steps=9, guidance_scale=3.0, guidance_truncation=0.4, guidance_renorm=1.0,
    semantics="official", solver="euler", time_shift=2.0,
)  # fmt: skip


@functools.cache
def params():
    return jax.tree.map(jnp.asarray, small_pipeline.random_params(MODEL))


@functools.cache
def compiled(program, together):
    draw = functools.partial(sampler.sample, make_stages(MODEL), patch_size=2, program=program)

    def run(params, noise, captions, numbers):
        if together and program.num_guided:
            captions = [jax.tree.map(lambda *pair: jnp.concatenate(pair), *captions)]
        if not program.num_guided:
            captions = captions[:1]
        return draw(params, noise, captions, numbers)

    return jax.jit(run)


def draw(changes, batch=3, together=False, rows=slice(None)):
    keys = jax.random.split(jax.random.key(1), 3)
    noise = jax.random.normal(keys[0], (batch, 8, 8, 3))
    lengths = jnp.arange(batch)[:, None] % 3 + 1
    feats = jax.random.normal(keys[1], (batch, 4, 8))
    mask = jnp.arange(4)[None] < lengths
    negative = jax.random.normal(keys[2], (batch, 4, 8)), jnp.arange(4)[None] < jnp.ones((batch, 1))
    path = SamplerConfig(**BASE | changes).path(16, MODEL.num_layers)
    args = jax.tree.map(lambda x: x[rows], (noise, [(feats, mask), negative]))
    latents, trace = compiled(path.program, together)(params(), *args, path.numbers)
    return np.asarray(latents), trace


@pytest.mark.parametrize(
    ("solver", "together"),
    [
        ("midpoint", False),
        pytest.param("euler", True, marks=pytest.mark.slow),
        pytest.param("dpm", False, marks=pytest.mark.slow),
    ],
)
def test_a_cache_that_is_never_used_changes_nothing(solver, together):
    """Threshold zero as nearly as it is on: the layers run each time, and no bit differs."""
    expected, none = draw({"solver": solver}, together=together)
    found, trace = draw({"solver": solver, "cache_threshold": 1e-30}, together=together)
    assert none is None
    assert trace.conditional.computed.all()
    np.testing.assert_array_equal(found, expected)


def test_the_first_and_the_last_evaluation_are_computed_and_the_rest_is_not():
    _, trace = draw({"cache_threshold": 1e9})
    expected = np.zeros((8, 3), bool)
    expected[[0, -1]] = True
    np.testing.assert_array_equal(trace.conditional.computed, expected)
    assert trace.unconditional.computed.sum() == 3  # once for each picture: guidance ends before


def test_a_fixed_interval_computes_every_nth_evaluation_of_every_picture():
    _, trace = draw({"cache_interval": 3})
    np.testing.assert_array_equal(
        trace.conditional.computed[:, 0], [True, False, False, True, False, False, True, True]
    )
    assert (trace.conditional.computed == trace.conditional.computed[:, :1]).all()


def test_the_layers_really_run_only_when_a_picture_needs_them():
    """Counted where they run, for each branch: three evaluations of eight, one of them guided."""
    runs = []
    stages = make_stages(MODEL)

    def attend(params, joined, *rest):
        jax.debug.callback(lambda: runs.append(1))
        return stages.attend(params, joined, *rest)

    path = SamplerConfig(**BASE | {"cache_interval": 5}).path(16, MODEL.num_layers)
    feats, mask = jnp.ones((1, 2, 8)), jnp.ones((1, 2), bool)
    run = functools.partial(
        sampler.sample, stages._replace(attend=attend), patch_size=2, program=path.program
    )
    captions = [(feats, mask), (0 * feats, mask)]
    _, trace = jax.jit(run)(params(), jnp.ones((1, 8, 8, 3)), captions, path.numbers)
    jax.effects_barrier()
    computed = sum(int(record.computed.sum()) for record in trace)
    assert len(runs) == computed == 3 + 1


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_picture_is_the_same_whatever_its_neighbours_need(together):
    """Some compute where others reuse, and each gets what it gets alone."""
    changes = {"cache_threshold": 0.25, "num_steps": 17}
    latents, trace = draw(changes, batch=5, together=together)
    computed = np.asarray(trace.conditional.computed)
    assert 0.1 < computed[1:-1].mean() < 0.9
    assert (computed != computed[:, :1]).any()
    for row in range(5):
        alone, own = draw(changes, batch=5, together=together, rows=slice(row, row + 1))
        np.testing.assert_array_equal(own.conditional.computed[:, 0], computed[:, row])
        np.testing.assert_allclose(alone[0], latents[row], atol=1e-4)


def test_padding_of_a_caption_does_not_count():
    """The distance is over tokens, so more empty slots change no decision."""
    x, before = jax.random.normal(jax.random.key(0), (2, 1, 6, 4))
    segments = jnp.array([[1, 1, 0, 0, 1, 1]])
    padded = [jnp.where(segments[..., None] > 0, y, 100 * i) for i, y in enumerate((x, before))]
    expected = np.abs(x - before)[:, [0, 1, 4, 5]].sum() / np.abs(before)[:, [0, 1, 4, 5]].sum()
    np.testing.assert_allclose(caching._relative(*padded, segments), expected[None], rtol=1e-6)


def test_reuse_is_what_teacache_does():
    """Against its rule written out, one picture, with a polynomial that falls below zero."""
    rng = np.random.default_rng(0)
    inputs = np.cumsum(rng.normal(size=(12, 1, 4, 3)), axis=0).astype(np.float32)
    xs = rng.normal(size=(12, 1, 4, 3)).astype(np.float32)
    after = rng.normal(size=(12, 1, 4, 3)).astype(np.float32)
    coefficients, threshold = (2.0, -0.5, 0.02), 0.4
    forced = [True] + [False] * 10 + [True]

    expected, computed = [], []
    total, previous, residual = 0.0, None, None
    for now, m, x, y in zip(forced, inputs, xs, after, strict=True):
        if previous is not None:
            distance = np.abs(m - previous).mean() / np.abs(previous).mean()
            total += max(np.polyval(coefficients, distance), 0)
        if run := now or total >= threshold:
            total, residual = 0.0, y - x
        computed.append(run)
        expected.append(x + residual)
        previous = m

    cache, segments = caching.empty(jnp.asarray(xs[0])), jnp.ones((1, 4), jnp.int32)
    policy = caching.Policy(None, jnp.float32(threshold), jnp.asarray(coefficients), jnp.float32(0))
    found = []
    for index, now in enumerate(forced):
        x, cache, record = caching.reuse(
            lambda index=index: jnp.asarray(after[index]), jnp.asarray(xs[index]),
            jnp.asarray(inputs[index]), segments, jnp.float32(index), cache,
            policy._replace(forced=jnp.bool_(now)),
        )  # fmt: skip
        found.append((x, record.computed[0]))
    assert 3 < sum(computed) < 10
    assert [bool(run) for _, run in found] == computed
    np.testing.assert_allclose([x for x, _ in found], expected, atol=1e-5)


def test_a_residual_that_grows_evenly_is_followed_without_an_error():
    """At uneven times, two rows that compute at different ones; the first line needs two points."""
    times = np.array([0.0, 0.1, 0.25, 0.3, 0.6, 0.61, 1.0], np.float32)
    forced = np.array([[1, 1], [0, 1], [1, 0], [0, 0], [0, 1], [0, 0], [0, 0]], bool)
    start, slope = jax.random.normal(jax.random.key(0), (2, 2, 4, 3))
    cache, segments = caching.empty(start), jnp.ones((2, 4), jnp.int32)
    policy = caching.Policy(None, jnp.float32(np.inf), jnp.array([1.0, 0.0]), jnp.float32(1))
    for index, (t, now) in enumerate(zip(times, forced, strict=True)):
        x = jax.random.normal(jax.random.key(index), (2, 4, 3))
        residual = start + t * slope
        found, cache, record = caching.reuse(
            lambda x=x, residual=residual: x + residual, x, x, segments, jnp.float32(t), cache,
            policy._replace(forced=jnp.asarray(now)),
        )  # fmt: skip
        np.testing.assert_array_equal(record.computed, now)
        known = np.array([forced[: index + 1, row].sum() > 1 or now[row] for row in range(2)])
        np.testing.assert_allclose(found[known], (x + residual)[known], atol=1e-5)
    np.testing.assert_allclose(cache.times, [[0.25, 0.6], [0.0, 0.1]])


def test_following_the_line_costs_less_of_the_picture_than_adding_the_last_residual():
    expected, _ = draw({"num_steps": 33})
    errors = [
        np.abs(
            draw({"num_steps": 33, "cache_interval": 2, "cache_order": order})[0] - expected
        ).mean()
        for order in (0, 1)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_reuse_costs_little_of_the_picture_and_more_with_a_higher_threshold():
    expected, _ = draw({"num_steps": 33})
    errors, shares = [], []
    for threshold in (0.1, 0.4, 1.6):
        found, trace = draw({"num_steps": 33, "cache_threshold": threshold})
        errors.append(np.abs(found - expected).mean() / np.abs(expected).mean())
        shares.append(float(trace.conditional.computed.mean()))
    assert errors == sorted(errors)
    assert shares == sorted(shares, reverse=True)
    assert errors[0] < 0.1
