"""The loop on fields with a known answer, and the numbers that both reference programs give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from lumina_jax.errors import InputError
from lumina_jax.models.embed import patchify
from lumina_jax.sampling import guidance, sampler
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.sampling.solvers import SOLVERS, evaluations
from tests.sampling.networks import whole

NUM_TOKENS = 4  # matters to the grid only where the shift is that of the resolution


def make_config(**changes):
    defaults = dict(
        num_steps=51, guidance_scale=4.0, guidance_truncation=0.25, guidance_renorm=1.0,
        semantics="official", solver="euler", time_shift=6.0,
    )  # fmt: skip
    return SamplerConfig(**{**defaults, **changes})


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_times_of_a_solver_never_fall(solver):
    """Where guidance ends is counted from the first evaluation."""
    times, _ = evaluations(solver, make_config().times(NUM_TOKENS))
    assert (np.diff(times) >= 0).all()


def test_time_grid_equals_the_published_values():
    """Oracle 6: fifty Euler intervals at shift 6."""
    times = make_config().times(NUM_TOKENS)
    np.testing.assert_allclose(times[:3], [0, 0.0034, 0.0069], atol=5e-5)
    np.testing.assert_allclose(times[-4:], [0.723, 0.800, 0.891, 1], atol=1e-3)


def test_both_semantics_walk_the_same_grid():
    """Diffusers' sigma_i = linspace(1, 1/N, N), shifted, with a last zero; t = 1 - sigma."""
    sigma = np.linspace(1, 1 / 50, 50)
    sigma = np.append(6 * sigma / (1 + 5 * sigma), 0)
    theirs = make_config(semantics="diffusers", num_steps=50).times(NUM_TOKENS)
    np.testing.assert_allclose(theirs, 1 - sigma, atol=1e-12)
    np.testing.assert_array_equal(theirs, make_config().times(NUM_TOKENS))


def run(path, stages, params, latents, caption, negative, **given):
    """The latents, with prompts and negative prompts in one batch as long as there is guidance."""
    captions = [caption]
    if path.program.num_guided:
        captions = [tuple(jnp.concatenate(pair) for pair in zip(caption, negative, strict=True))]
    draw = functools.partial(sampler.sample, stages, patch_size=2, program=path.program, **given)
    latents, _ = jax.jit(draw)(params, latents, captions, path.numbers)
    return latents


DEMO = {"solver": "midpoint", "num_steps": 18}
DIFFUSERS = {"semantics": "diffusers", "num_steps": 50}


@pytest.mark.parametrize(
    ("changes", "guided", "evaluated"),
    [
        ({}, 34, 50),
        ({"guidance_truncation": 1.0}, 50, 50),
        ({"guidance_truncation": 0.0}, 0, 50),
        ({"guidance_scale": 1.0}, 0, 50),
        (DEMO, 23, 34),  # the twelfth interval is guided at its start only
        ({**DEMO, "guidance_truncation": 1.0}, 34, 34),
        ({"solver": "dpm", "num_steps": 20}, 14, 20),
        (DIFFUSERS, 12, 50),
        ({**DIFFUSERS, "guidance_truncation": 1.0}, 50, 50),
        ({**DIFFUSERS, "solver": "midpoint"}, 24, 100),  # whole intervals
    ],
)
def test_truncation_saves_forward_passes(changes, guided, evaluated):
    """Oracle 9, counted where the network runs: a guided evaluation takes two pictures."""
    sizes = []

    def forward(params, image, t, cap_feats, cap_mask):
        io_callback(lambda x: sizes.append(len(x)), None, image.tokens)
        return params * image.tokens

    latents = jnp.ones((1, 4, 4, 2))
    caption = (jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
    path = make_config(**changes).path(NUM_TOKENS, 1)
    run(path, whole(forward), 0.1, latents, caption, caption)
    jax.effects_barrier()
    assert (sizes.count(2), len(sizes)) == (guided, evaluated)
    assert (path.program.num_guided, path.num_evaluations) == (guided, evaluated)


def test_guidance_ends_before_the_evaluation_at_the_truncation():
    """Two thirds of the way the shifted time is 0.25 exactly, and 0.25 < 0.25 is false."""
    assert make_config(num_steps=31).times(NUM_TOKENS)[20] == pytest.approx(0.25, abs=1e-15)
    assert make_config(num_steps=31).path(NUM_TOKENS, 1).program.num_guided == 20


def test_diffusers_guides_the_interval_that_reaches_the_fraction():
    """Theirs asks (i + 1) / n > fraction; 0.29 * 100 would be rounded down to 28."""
    config = make_config(semantics="diffusers", num_steps=100, guidance_truncation=0.29)
    assert config.path(NUM_TOKENS, 1).program.num_guided == 29


def draw(config, params=0.3):
    """A network that listens to its caption alone: velocity = mean of the features."""

    def forward(params, image, t, cap_feats, cap_mask):
        return params * image.tokens + jnp.mean(cap_feats, axis=(1, 2))[:, None, None]

    latents = jax.random.normal(jax.random.key(0), (3, 4, 6, 2))
    mask = jnp.ones((3, 2), bool)
    caption = (jnp.arange(6.0).reshape(3, 2, 1), mask)
    negative = (-jnp.ones((3, 2, 1)), mask)
    return run(config.path(6, 1), whole(forward), params, latents, caption, negative)


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
        ({"solver": "dopri5"}, "solver='dopri5' is not one of euler, midpoint, heun, rk4, dpm"),
        ({"time_shift": -1.0}, "time_shift=-1.0 must be positive"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1"),
        ({"guidance_truncation": -1.0}, "must not be negative"),
        ({"cache_order": 2}, "cache_order=2 is neither 0 nor 1"),
        ({"cache_coefficients": ()}, "cache_coefficients is empty"),
        ({"merge_steps": (float("nan"), 1.0)}, r"merge_steps=.* must be numbers"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number"),
        ({"num_steps": 10**9}, "num_steps=1000000000 is more than 10,000"),
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
    run(make_config(num_steps=3).path(6, 1), whole(forward), None, latents, caption, caption)
    assert shapes[0] == ((2, 6, 8), (2, 6))
    assert patchify(latents, 2, 6).columns[0].tolist() == [0, 1, 2, 0, 1, 2]
