"""The autoencoder: its sizes, what it refuses, and that saving memory changes no result."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import vae
from lumina_jax.models.vae import VAEConfig

TOY = VAEConfig(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4,
    scaling_factor=0.4, shift_factor=0.1, dtype="float32",
)  # fmt: skip
FLUX = VAEConfig.preset("flux")


@pytest.fixture(scope="module")
def params():
    """Every parameter random, biases and scales too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), vae.abstract_params(TOY)
    )


def images(num=2, height=8, width=12):
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, size=(num, height, width, 3)).astype(np.float32)


latents = functools.partial(images, height=4, width=6)


@functools.cache
def compiled(function, cfg=TOY):
    """One program for all tests."""
    return jax.jit(lambda *args: function(cfg, *args))


def encode_both_ways(cfg, params, images):
    return vae.encode(cfg, params, images), *vae.encode_moments(cfg, params, images)


encode, decode = compiled(encode_both_ways), compiled(vae.decode)


def assert_close(found, expected, relative):
    atol = relative * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_flux_has_the_parameters_of_the_released_autoencoder():
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part))
        for name, part in vae.abstract_params(FLUX).items()
    }
    assert counts == {"encoder": 34_274_208, "decoder": 49_545_475}


def test_flops_are_those_that_xla_counts():
    """XLA leaves out the products with padding, and counts what is not a product besides."""
    cfg = dataclasses.replace(TOY, block_out_channels=(32, 64), latent_channels=16)
    params = vae.abstract_params(cfg)

    def count(function, *shape):
        lowered = jax.jit(lambda p, x: function(cfg, p, x)).lower(
            params, jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        return lowered.cost_analysis()["flops"]

    counted = count(vae.encode, 1, 64, 96, 3), count(vae.decode, 1, 32, 48, 16)
    assert counted == pytest.approx(vae.forward_flops(cfg, 64, 96), rel=0.05)


def test_a_latent_is_a_square_of_pixels_and_sides_may_differ(params):
    assert jax.eval_shape(encode, params, images(height=8, width=12))[0].shape == (2, 4, 6, 3)
    assert jax.eval_shape(decode, params, latents(height=4, width=6)).shape == (2, 8, 12, 3)
    assert (TOY.downscale, FLUX.downscale) == (2, 8)


def test_the_likeliest_latents_are_the_mean_shifted_and_scaled(params):
    found, mean, _ = encode(params, images())
    assert_close(found, (mean - 0.1) * 0.4, 1e-6)


def test_a_key_draws_around_the_mean_with_the_predicted_deviation(params):
    _, mean, logvar = encode(params, images())
    key = jax.random.key(3)
    expected = mean + np.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    assert_close(jax.jit(vae.draw)(mean, logvar, key), expected, 1e-6)


def test_the_log_variance_is_kept_within_bounds(params):
    *_, logvar = encode(jax.tree.map(lambda x: 50 * x, params), images())
    assert (logvar.min(), logvar.max()) == (-30, 20)


@pytest.mark.parametrize("most", [24 * 7, 24, 1])
def test_attention_over_parts_of_the_queries_is_the_same(monkeypatch, most):
    """24 tokens; 24 * 7 scores at a time need four parts."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 24, 8)).astype(np.float32)
    expected = jax.jit(vae.attend)(q, k, v)
    monkeypatch.setattr(vae, "SCORES_AT_ONCE", most)
    found = jax.jit(lambda *args: vae.attend(*args))(q, k, v)
    assert_close(found, expected, 1e-6)


def test_queries_that_parts_do_not_divide_are_filled_up(monkeypatch):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 23, 8)).astype(np.float32)
    expected = jax.jit(vae.attend)(q, k, v)
    monkeypatch.setattr(vae, "SCORES_AT_ONCE", 23 * 5)
    assert_close(jax.jit(lambda *args: vae.attend(*args))(q, k, v), expected, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize(
    ("num", "most", "largest"), [(6, 6, 6), (6, 5, 3), (6, 2, 2), (5, 4, 1), (3, 0, 1), (1, 0, 1)]
)
def test_equal_parts_as_large_as_there_is_room_for(monkeypatch, num, most, largest, sizes):
    """`most` pictures fit; a prime number goes whole or one by one. No mesh of four splits them."""
    seen = []

    def network(x):
        seen.append(len(x))
        return 2 * x

    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 24 * most)
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)), devices=devices)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: vae.a_few_at_a_time(network, x, 24))(latents(num))
    np.testing.assert_array_equal(found, 2 * latents(num))
    assert set(seen) == {largest}


def test_little_memory_on_a_mesh_gives_the_same_and_pictures_stay_where_they_are(
    params, monkeypatch
):
    """16 pictures, one at a time on each of 8 devices, 4 queries at a time; nothing travels."""
    expected = decode(params, latents(16))
    monkeypatch.setattr(vae, "PIXELS_AT_ONCE", 96)
    monkeypatch.setattr(vae, "SCORES_AT_ONCE", 100)
    mesh = sharding.make_mesh(replica=2, data=4, model=1)
    split = sharding.named(mesh, ("act_batch",))
    shardings = sharding.tree_shardings(params, mesh, sharding.VAE_RULES)
    inputs = jax.device_put((params, latents(16)), (shardings, split))
    with jax.set_mesh(mesh):
        function = jax.jit(lambda *args: vae.decode(TOY, *args), out_shardings=split)
        program = function.lower(*inputs).compile()
    assert_close(program(*inputs), expected, 1e-5)
    text = program.as_text()
    assert "while(" in text
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


def test_bfloat16_stays_near_float32(params):
    half = compiled(vae.decode, dataclasses.replace(TOY, dtype="bfloat16"))(params, latents())
    assert half.dtype == jnp.float32
    assert_close(half, decode(params, latents()), 0.05)


@pytest.mark.parametrize("name", vae.PRESETS)
def test_a_config_survives_json(name):
    cfg = VAEConfig.preset(name)
    assert VAEConfig.from_json(cfg.to_json()) == cfg
    assert VAEConfig.from_json(cfg.to_json(), dtype="float32").dtype == "float32"


def test_all_that_is_not_supported_is_said_at_once():
    config = FLUX.to_json() | {
        "use_quant_conv": True,
        "act_fn": "relu",
        "up_block_types": ["UpDecoderBlock2D"] * 3 + ["AttnUpDecoderBlock2D"],
        "latents_mean": [0.0] * 16,
    }
    with pytest.raises(InputError, match="not supported: ") as error:
        VAEConfig.from_json(config)
    for name in ("use_quant_conv is True, needed False", "act_fn is 'relu', needed 'silu'",
                 "up_block_types is", "latents_mean is"):  # fmt: skip
        assert name in str(error.value)


def test_a_key_that_is_missing_means_what_it_means_to_diffusers():
    config = FLUX.to_json()
    del config["use_quant_conv"], config["use_post_quant_conv"]
    with pytest.raises(InputError, match=r"use_quant_conv is True.*use_post_quant_conv is True"):
        VAEConfig.from_json(config)
    config = FLUX.to_json() | {"shift_factor": None}
    del config["scaling_factor"]
    cfg = VAEConfig.from_json(config)
    assert (cfg.scaling_factor, cfg.shift_factor) == (0.18215, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 0}, "layers_per_block=0 must be at least 1"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (8, 18)}, r"\(8, 18\) must be multiples of norm_num_groups=4"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 must be positive"),
        ({"dtype": "float16"}, "dtype='float16' is not one of float32, bfloat16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TOY, **changes)


def test_unknown_preset_is_refused():
    with pytest.raises(InputError, match="'sdxl' is not one of tiny, flux"):
        VAEConfig.preset("sdxl")


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": 3}, {"block_out_channels": [8] * 99}, {"norm_num_groups": 0},
        {"block_out_channels": ["8"]}, {"block_out_channels": [2**40]}, {"layers_per_block": 10**9},
        {"latent_channels": 2.5}, {"scaling_factor": float("nan")}, {"scaling_factor": "x"},
        {"scaling_factor": 10**400}, {"shift_factor": float("inf")}, {"down_block_types": 1},
        {"mid_block_add_attention": "no"},
    ],
)  # fmt: skip
def test_a_config_that_no_autoencoder_has_is_refused_before_anything_is_made(change):
    config = VAEConfig.preset("tiny").to_json()
    VAEConfig.from_json(config)
    with pytest.raises(InputError, match=r"is damaged|cannot be made|not supported"):
        VAEConfig.from_json(config | change)
