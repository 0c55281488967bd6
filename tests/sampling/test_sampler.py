"""The loop on fields with a known answer, and the numbers that both reference programs give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.errors import InputError
from lumina_jax.models.embed import patchify
from lumina_jax.sampling import guidance, sampler
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.sampling.solvers import euler


def make_config(**changes):
    defaults = dict(
        num_steps=51, guidance_scale=4.0, guidance_truncation=0.25, guidance_renorm=1.0,
        semantics="official", solver="euler", time_shift=6.0,
    )  # fmt: skip
    return SamplerConfig(**{**defaults, **changes})


def test_euler_is_exact_on_the_straight_path():
    """Oracle 7: with the true velocity any number of intervals returns the data."""
    data, noise = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    for intervals in (1, 7):
        times = jnp.asarray(make_config(num_steps=intervals + 1).times(), jnp.float32)
        found = euler(lambda x, t: data - noise, noise, times)
        np.testing.assert_allclose(found, data, atol=2e-6)


def test_euler_converges_at_first_order():
    """On dx/dt = x the end is e times the start; halving the intervals halves the error."""
    start = jnp.ones((1, 1, 1, 1))
    errors = [
        abs(float(euler(lambda x, t: x, start, jnp.linspace(0, 1, n + 1))[0, 0, 0, 0]) - np.e)
        for n in (50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.03)


def test_time_grid_equals_the_published_values():
    """Oracle 6: fifty Euler intervals at shift 6."""
    times = make_config().times()
    np.testing.assert_allclose(times[:3], [0, 0.0034, 0.0069], atol=5e-5)
    np.testing.assert_allclose(times[-4:], [0.723, 0.800, 0.891, 1], atol=1e-3)


def test_both_semantics_walk_the_same_grid():
    """Diffusers' sigma_i = linspace(1, 1/N, N), shifted, with a last zero; t = 1 - sigma."""
    sigma = np.linspace(1, 1 / 50, 50)
    sigma = np.append(6 * sigma / (1 + 5 * sigma), 0)
    theirs = make_config(semantics="diffusers", num_steps=50).times()
    np.testing.assert_allclose(theirs, 1 - sigma, atol=1e-12)
    np.testing.assert_array_equal(theirs, make_config().times())


@pytest.mark.parametrize(
    ("changes", "guided"),
    [
        ({}, 34),  # official, 50 intervals
        ({"guidance_truncation": 1.0}, 50),
        ({"guidance_truncation": 0.0}, 0),
        ({"guidance_scale": 1.0}, 0),
        ({"semantics": "diffusers", "num_steps": 50}, 12),
        ({"semantics": "diffusers", "num_steps": 50, "guidance_truncation": 1.0}, 50),
    ],
)
def test_intervals_with_guidance(changes, guided):
    """Oracle 9."""
    assert make_config(**changes).num_guided() == guided


def test_truncation_saves_forward_passes_in_the_compiled_program():
    """34 intervals of two forwards and 16 of one: 84 pictures through the model, not 100."""
    seen = []

    def forward(params, image, t, cap_feats, cap_mask):
        jax.debug.callback(lambda x: seen.append(len(x)), image.tokens)
        return params * image.tokens

    latents = jnp.ones((1, 4, 4, 2))
    caption = (jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
    config = make_config()
    run = jax.jit(sampler.sample, static_argnums=0, static_argnames=("patch_size", "program"))
    run(
        forward, 0.1, latents, caption, caption, config.numbers(),
        patch_size=2, program=config.program(),
    )  # fmt: skip
    jax.effects_barrier()
    assert sum(seen) == 84


def draw(config, params=0.3):
    """A network that listens to its caption alone: velocity = mean of the features."""

    def forward(params, image, t, cap_feats, cap_mask):
        return params * image.tokens + jnp.mean(cap_feats, axis=(1, 2))[:, None, None]

    latents = jax.random.normal(jax.random.key(0), (3, 4, 6, 2))
    mask = jnp.ones((3, 2), bool)
    caption = (jnp.arange(6.0).reshape(3, 2, 1), mask)
    negative = (-jnp.ones((3, 2, 1)), mask)
    return jax.jit(
        functools.partial(sampler.sample, forward, patch_size=2, program=config.program())
    )(params, latents, caption, negative, config.numbers())


def test_without_guidance_the_negative_prompt_does_not_matter():
    scale_one = draw(make_config(guidance_scale=1.0))
    truncated = draw(make_config(guidance_truncation=0.0))
    np.testing.assert_array_equal(scale_one, truncated)


def test_guidance_leads_away_from_the_negative_prompt():
    guided = draw(make_config(guidance_renorm=0.0, guidance_truncation=1.0))
    plain = draw(make_config(guidance_scale=1.0))
    assert (guided > plain).all()


@pytest.fixture
def velocities():
    """A conditional and an unconditional velocity for a batch of four pictures."""
    pair = jax.random.normal(jax.random.key(0), (2, 4, 6, 8, 3))
    return pair * jnp.array([1.0, 3.0])[:, None, None, None, None]


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_renorm_at_scale_one_changes_nothing(velocities, semantics):
    """Oracle 10."""
    found = guidance.guide(*velocities, scale=1.0, renorm=1.0, semantics=semantics)
    np.testing.assert_allclose(found, velocities[0], rtol=1e-4, atol=1e-5)


def test_official_renorm_clips_the_norm_of_each_picture(velocities):
    conditional, unconditional = velocities
    # The first picture's guided norm stays below the bound, the others' do not.
    unconditional = unconditional.at[0].set(1.5 * conditional[0])
    plain = guidance.guide(conditional, unconditional, scale=2.0, renorm=None, semantics="official")
    found = guidance.guide(conditional, unconditional, scale=2.0, renorm=1.0, semantics="official")
    norm = lambda x: np.sqrt(np.sum(np.square(x), axis=(1, 2, 3)))  # noqa: E731
    np.testing.assert_allclose(norm(found)[1:], norm(conditional)[1:], rtol=1e-5)
    np.testing.assert_array_equal(found[0], plain[0])
    assert (norm(found) <= norm(plain) * (1 + 1e-6)).all()


def test_diffusers_renorm_gives_every_row_the_conditional_norm(velocities):
    """As written there: torch.norm(..., dim=-1, keepdim=True) on NCHW, shrinking and growing."""
    torch = pytest.importorskip("torch")
    conditional, unconditional = (
        torch.from_numpy(np.array(v)).permute(0, 3, 1, 2) for v in velocities
    )
    combined = unconditional + 4.0 * (conditional - unconditional)
    ratio = torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(
        combined, dim=-1, keepdim=True
    )
    expected = (combined * ratio).permute(0, 2, 3, 1).numpy()
    found = guidance.guide(*velocities, scale=4.0, renorm=1.0, semantics="diffusers")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_renorm_of_a_zero_velocity_is_zero(semantics):
    zero = jnp.zeros((1, 2, 2, 1))
    found = guidance.guide(zero, zero, scale=4.0, renorm=1.0, semantics=semantics)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1}, "num_steps=1 leaves no interval.*at least 2 with official"),
        ({"num_steps": 0, "semantics": "diffusers"}, "at least 1 with diffusers"),
        ({"semantics": "comfy"}, "'comfy' is not one of official, diffusers"),
        ({"solver": "heun"}, "solver='heun' is not one of euler"),
        ({"time_shift": 0.0}, "time_shift=0.0 must be positive"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1"),
        ({"guidance_truncation": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)


def test_the_loop_sees_the_picture_as_tokens_of_its_shape():
    """Rows and columns of a wide picture reach the network."""
    shapes = []

    def forward(params, image, t, cap_feats, cap_mask):
        shapes.append((image.tokens.shape, image.rows.shape))
        return image.tokens

    latents = jnp.zeros((1, 4, 6, 2))
    caption = (jnp.ones((1, 2, 1)), jnp.ones((1, 2), bool))
    config = make_config(num_steps=3)
    jax.jit(functools.partial(sampler.sample, forward, patch_size=2, program=config.program()))(
        None, latents, caption, caption, config.numbers()
    )
    assert shapes[0] == ((2, 6, 8), (2, 6))
    assert patchify(latents, 2, 6).columns[0].tolist() == [0, 1, 2, 0, 1, 2]
