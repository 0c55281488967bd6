"""Our sampler against the official one, written out in NumPy, one picture at a time.

The official program asks for a batch of one (its clip is a Python `if` on the norm), integrates
with the fixed-grid solvers of torchdiffeq, and decides about guidance inside the network's call.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.models.embed import patchify, unpatchify
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params, make_forward, make_stages
from lumina_jax.sampling import sampler
from lumina_jax.sampling.sampler import SamplerConfig
from tests.sampling.networks import whole

DEMO = dict(
    num_steps=18, guidance_scale=4.0, guidance_truncation=0.25, guidance_renorm=1.0,
    semantics="official", solver="midpoint", time_shift=6.0,
)  # fmt: skip


def official(network, x, config):
    """One picture, with network(pictures, t, captions); caption 0 is the prompt, 1 the negative."""

    def velocity(x, t):
        if not t < config.guidance_truncation:
            return network(x[None], t, [0])[0]
        conditional, unconditional = network(np.stack([x, x]), t, [0, 1])
        guided = unconditional + config.guidance_scale * (conditional - unconditional)
        if config.guidance_renorm > 0:
            limit = np.linalg.norm(conditional.ravel()) * config.guidance_renorm
            norm = np.linalg.norm(guided.ravel())
            if norm >= limit:
                guided = guided * (limit / norm)
        return guided

    tau = np.linspace(0, 1, config.num_steps)
    s = config.time_shift
    grid = tau / (tau + s - s * tau)
    for t0, t1 in itertools.pairwise(grid):
        dt = t1 - t0
        if config.solver == "euler":
            x = x + dt * velocity(x, t0)
        else:
            x = x + dt * velocity(x + dt / 2 * velocity(x, t0), t0 + dt / 2)
    return x


def mlp(xp, weights, tokens, rows, columns, t, captions):
    """Two layers that hear a pixel, its place, the whole picture, the time and the caption."""
    place = xp.stack([rows, columns, 0 * rows + t[:, None]], axis=-1) @ weights["place"]
    whole = (tokens.mean(axis=1) + captions) @ weights["whole"]
    hidden = xp.tanh(tokens @ weights["pixel"] + place + whole[:, None])
    return hidden @ weights["out"]


def forward(weights, image, t, cap_feats, cap_mask):
    captions = jnp.sum(cap_feats * cap_mask[..., None], axis=1)
    rows, columns = (axis.astype(jnp.float32) for axis in (image.rows, image.columns))
    return mlp(jnp, weights, image.tokens, rows, columns, t, captions)


@pytest.fixture(scope="module")
def mlp_weights():
    rng = np.random.default_rng(0)
    shapes = {"place": (3, 16), "whole": (3, 16), "pixel": (3, 16), "out": (16, 3)}
    scales = {"place": 0.4, "whole": 1.5, "pixel": 0.7, "out": 0.7}
    return {name: scales[name] * rng.normal(size=shape) for name, shape in shapes.items()}


def make_inputs(batch, height, width, channels, features, seed=1):
    """Noise, and features with mask of the prompts and of the negative prompts."""
    rng = np.random.default_rng(seed)
    mask = np.arange(4) < rng.integers(1, 5, (2, batch, 1))
    feats = rng.normal(size=(2, batch, 4, features))
    return rng.normal(size=(batch, height, width, channels)), feats, mask


@functools.partial(jax.jit, static_argnums=0, static_argnames=("patch_size", "program"))
def sample(stages, *inputs, **program):
    return sampler.sample(stages, *inputs, **program)[0]


def ours(stages, params, latents, feats, mask, config, *, patch_size, together=True):
    params, latents, feats = jax.tree.map(np.float32, (params, latents, feats))
    captions = (
        [tuple(map(np.concatenate, (feats, mask)))]
        if together
        else [*zip(feats, mask, strict=True)]
    )
    path = config.path(latents[0].size // latents.shape[-1] // patch_size**2, num_layers=1)
    if not path.program.num_guided:
        captions = [(feats[0], mask[0])]
    return sample(
        stages, params, latents, captions, path.numbers,
        patch_size=patch_size, program=path.program,
    )  # fmt: skip


def official_mlp(weights, latents, feats, mask, config):
    height, width, channels = latents.shape[1:]
    rows, columns = np.indices((height, width)).reshape(2, 1, -1)
    captions = np.sum(feats * mask[..., None], axis=2)
    pictures = []
    for index, noise in enumerate(latents):

        def network(x, t, which, index=index):
            place = (np.repeat(axis, len(x), axis=0) for axis in (rows, columns))
            tokens = x.reshape(len(x), -1, channels)
            t = np.full(len(x), t)
            return mlp(np, weights, tokens, *place, t, captions[which, index]).reshape(x.shape)

        pictures.append(official(network, noise, config))
    return np.stack(pictures)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 6)])
@pytest.mark.parametrize("renorm", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("truncation", [0.25, 1.0])
def test_the_picture_is_the_official_one(mlp_weights, shape, renorm, truncation):
    config = SamplerConfig(**DEMO | {"guidance_renorm": renorm, "guidance_truncation": truncation})
    inputs = make_inputs(*shape, channels=3, features=3)
    expected = official_mlp(mlp_weights, *inputs, config)
    found = ours(whole(forward), mlp_weights, *inputs, config, patch_size=1)
    assert relative_error(found, expected) < 1e-5


def test_euler_draws_the_official_picture_too(mlp_weights):
    config = SamplerConfig(**DEMO | {"solver": "euler", "num_steps": 51})
    inputs = make_inputs(2, 4, 6, channels=3, features=3)
    expected = official_mlp(mlp_weights, *inputs, config)
    found = ours(whole(forward), mlp_weights, *inputs, config, patch_size=1)
    assert relative_error(found, expected) < 1e-5


def test_no_setting_could_be_missed_at_that_precision(mlp_weights):
    """Each moves this network's picture by a hundred times the tolerance at least.

    Truncation 0.28 guides one evaluation more: the second one of the interval in which 0.25 falls.
    """
    inputs = make_inputs(4, 4, 4, channels=3, features=3)
    plain = official_mlp(mlp_weights, *inputs, SamplerConfig(**DEMO))
    for change in (
        {"guidance_scale": 3.9}, {"guidance_renorm": 0.0}, {"guidance_renorm": 0.9},
        {"time_shift": 5.0}, {"num_steps": 12}, {"solver": "euler"}, {"guidance_truncation": 1.0},
        {"guidance_truncation": 0.28},
    ):  # fmt: skip
        changed = official_mlp(mlp_weights, *inputs, SamplerConfig(**DEMO | change))
        assert relative_error(changed, plain) > 1e-3, change


@pytest.mark.slow  # compiles the network three times
def test_the_real_network_draws_the_official_picture():
    model = NextDiTConfig(
        dim=32, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64,
        axes_dims=(4, 2, 2), in_channels=3, patch_size=2, cap_feat_dim=8, dtype="float32",
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(abstract_params(model))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, params)
    config = SamplerConfig(**DEMO)
    latents, feats, mask = make_inputs(2, 8, 12, channels=3, features=8)
    next_dit = make_forward(model)

    @jax.jit
    def evaluate(x, t, cap_feats, cap_mask):
        tokens = next_dit(params, patchify(x, 2, 24), t, cap_feats, cap_mask)
        return unpatchify(tokens, 2, 8, 12)

    expected = []
    for index, noise in enumerate(latents):

        def network(x, t, which, index=index):
            # Always two pictures, for one program; alone, a picture has company that is dropped.
            x, t, features = map(np.float32, (np.resize(x, (2, *x.shape[1:])), [t, t], feats))
            velocity = evaluate(x, t, features[:, index], mask[:, index])
            return np.asarray(velocity[: len(which)], np.float64)

        expected.append(official(network, noise, config))
    found = ours(make_stages(model), params, latents, feats, mask, config, patch_size=2)
    assert relative_error(found, np.stack(expected)) < 1e-5
