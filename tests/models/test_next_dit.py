"""What the network is (sizes, start) and what it must not depend on (padding, neighbours)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models import attention, embed, next_dit, rope
from lumina_jax.models.blocks import TransformerBlock, modulate, modulation
from lumina_jax.models.next_dit import NextDiTConfig
from lumina_jax.models.stack import stack_blocks
from lumina_jax.types import ImageTokens

TOY = NextDiTConfig(
    dim=48, num_layers=2, num_refiner_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=96,
    axes_dims=(4, 4, 4), in_channels=4, cap_feat_dim=16, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    """Every parameter random: at the start too much of it is zero to see anything."""
    leaves, tree = jax.tree.flatten(next_dit.abstract_params(TOY))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draw)


@pytest.fixture(scope="module")
def forward():
    return jax.jit(next_dit.make_forward(TOY))


def inputs(lengths=(9, 3), size=(8, 12), slots=12, image_slots=24, seed=1):
    """Pictures, times, captions; features in padded slots are large on purpose."""
    keys = jax.random.split(jax.random.key(seed), 3)
    latents = jax.random.normal(keys[0], (len(lengths), *size, TOY.in_channels))
    t = jax.random.uniform(keys[1], (len(lengths),))
    feats = jax.random.normal(keys[2], (len(lengths), 32, TOY.cap_feat_dim))
    mask = jnp.arange(slots)[None, :] < jnp.asarray(lengths)[:, None]
    feats = jnp.pad(feats, ((0, 0), (0, max(slots - 32, 0)), (0, 0)), constant_values=50.0)[
        :, :slots
    ]
    feats = jnp.where(mask[..., None], feats, 50.0)
    return embed.patchify(latents, TOY.patch_size, image_slots), t, feats, mask


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Official totals less their norm_final, which nothing reads.
        ("2b", 2_609_771_456 - 2304),
        ("3b", 3_734_828_912 - 2592),
        ("4b", 4_792_618_496 - 2880),
        ("7b", 8_247_662_336 - 3840),
    ],
)
def test_presets_have_the_parameters_of_the_official_models(name, count):
    leaves = jax.tree.leaves(next_dit.abstract_params(NextDiTConfig.preset(name)))
    assert sum(leaf.size for leaf in leaves) == count


@pytest.mark.parametrize(("tokens", "teraflops"), [(256, 6.903), (4096, 71.49)])
def test_flops_of_a_training_step(tokens, teraflops):
    """Counted by hand for 2b: a third of these is one forward pass with 256 caption tokens."""
    flops = 3 * next_dit.forward_flops(NextDiTConfig.preset("2b"), tokens, 256)
    assert flops / 1e12 == pytest.approx(teraflops, rel=1e-3)


def test_flops_equal_those_of_the_compiled_program():
    """XLA's own count of a small model without padding; elementwise work is all the difference."""
    cfg = dataclasses.replace(
        TOY, dim=384, hidden_dim=1536, axes_dims=(32, 32, 32), num_layers=1, num_refiner_layers=1
    )
    shapes = jax.eval_shape(lambda: inputs(image_slots=24, slots=8, lengths=(8,)))
    compiled = jax.jit(next_dit.make_forward(cfg)).lower(next_dit.abstract_params(cfg), *shapes)
    counted = compiled.compile().cost_analysis()["flops"]
    rotations = (
        2 * 96 * 3 * (4 + 2) * 96 * (24 + 8) / 3
    )  # partners by matrix product, in each block
    assert counted == pytest.approx(next_dit.forward_flops(cfg, 24, 8) + rotations, rel=0.03)


def test_a_fresh_model_outputs_exactly_zero():
    params = next_dit.init_params(TOY, jax.random.key(0))
    velocity = jax.jit(next_dit.make_forward(TOY))(params, *inputs())
    np.testing.assert_array_equal(velocity, 0)


@pytest.mark.parametrize("modulated", [True, False])
def test_a_fresh_block_is_the_identity_only_where_it_is_modulated(modulated):
    block = TransformerBlock(TOY, modulated=modulated, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, TOY.dim))
    freqs = rope.frequencies(jnp.zeros((2, 5, 3), jnp.int32), TOY.axes_dims, TOY.rope_theta)
    modulation = block.modulation(jnp.ones((2, TOY.cond_dim))) if modulated else None
    out = block(x, jnp.ones((2, 5), jnp.int32), freqs, modulation)
    assert np.array_equal(out, x) == modulated


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1)])
def test_modulations_of_all_layers_equal_those_of_each(sizes):
    """Their kernels stay split by rows, and what the devices make of them is summed."""
    maps = stack_blocks(lambda rngs: modulation(TOY, 4, rngs=rngs), 3, rngs=nnx.Rngs(0))
    graphdef = nnx.graphdef(maps)
    kernel = jax.random.normal(jax.random.key(1), maps.kernel.shape)
    bias = jax.random.normal(jax.random.key(2), maps.bias.shape)
    cond = jax.random.normal(jax.random.key(3), (8, TOY.cond_dim))

    def loss(kernel, bias, cond):
        maps = nnx.merge(graphdef, {"kernel": kernel, "bias": bias})
        out = modulate(maps, cond)
        return jnp.sum(jnp.sin(out)), out

    def plain(kernel, bias, cond):
        out = jnp.stack([nnx.silu(cond) @ k + b[None] for k, b in zip(kernel, bias, strict=True)])
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True)(kernel, bias, cond)
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)))
    with jax.set_mesh(mesh):
        split = sharding.named(mesh, (None, "cond", "modulation"))
        found = jax.jit(grad)(jax.device_put(kernel, split), bias, cond)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected
    )


def test_q_k_and_v_start_as_parts_of_one_xavier_matrix():
    """Bound sqrt(6 / (2304 + 3840)) = 0.03125 in 2b, for the three alike."""
    params = next_dit.init_params(TOY, jax.random.key(0))
    bound = np.sqrt(6 / (48 + (4 + 2 * 2) * 12))
    for name in "qkv":
        kernel = params["layers"]["attention"][name]["kernel"]
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("slots", [32, 128, 256])
def test_padding_the_caption_does_not_change_the_velocity(forward, params, slots):
    expected = forward(params, *inputs())
    np.testing.assert_allclose(forward(params, *inputs(slots=slots)), expected, atol=2e-5)


def test_padding_the_picture_does_not_change_the_velocity(forward, params):
    expected = forward(params, *inputs())
    padded = forward(params, *inputs(image_slots=40))
    np.testing.assert_allclose(padded[:, :24], expected, atol=2e-5)


def test_a_kernel_that_knows_lengths_alone_gives_the_same(params, monkeypatch):
    """As cuDNN: before the layers, padding of caption and of picture goes behind both."""

    def lengths_alone(q, k, v, segment_ids):
        prefix = jnp.arange(q.shape[2])[None] < segment_ids.sum(axis=1)[:, None]
        return attention._xla(q, k, v, prefix.astype(jnp.int32))

    image, t, feats, mask = inputs(slots=16, image_slots=32)
    results = []
    for name in ("xla", "cudnn"):
        monkeypatch.setitem(attention._FUNCTIONS, "cudnn", lengths_alone)
        for module in (attention, next_dit):
            monkeypatch.setattr(module, "choose", lambda *_, name=name: name)
        velocity = jax.jit(next_dit.make_forward(TOY))(params, image, t, feats, mask)
        results.append(jnp.where(image.mask[..., None], velocity, 0))
    np.testing.assert_allclose(*results, atol=2e-5)


def test_neighbours_of_other_shapes_do_not_change_the_velocity(forward, params):
    image, t, feats, mask = inputs()
    alone = forward(params, ImageTokens(*(x[:1] for x in image)), t[:1], feats[:1], mask[:1])
    other, *_ = inputs(size=(4, 6), seed=7)
    mixed = ImageTokens(
        *(jnp.concatenate([x[:1], y[1:]]) for x, y in zip(image, other, strict=True))
    )
    together = forward(params, mixed, t, feats, mask)
    np.testing.assert_allclose(together[:1], alone, atol=2e-5)


def test_only_differences_of_the_caption_axis_matter(forward, params, monkeypatch):
    """Adding a constant to every first position, of caption and picture, changes nothing."""
    expected = forward(params, *inputs())
    shift = jnp.array([13, 0, 0])[None, None]
    for name in ("caption_ids", "image_ids"):
        plain = getattr(rope, name)
        monkeypatch.setattr(rope, name, lambda *args, plain=plain: plain(*args) + shift)
    moved = jax.jit(next_dit.make_forward(TOY))(params, *inputs())
    np.testing.assert_allclose(moved, expected, atol=5e-5)


def test_transposing_the_picture_does_not_transpose_the_velocity(forward, params):
    """Rows and columns are different axes."""
    image, t, feats, mask = inputs(size=(8, 8), image_slots=16)
    latents = embed.unpatchify(image.tokens, 2, 8, 8)
    turned = embed.patchify(jnp.swapaxes(latents, 1, 2), 2, 16)
    straight = embed.unpatchify(forward(params, image, t, feats, mask), 2, 8, 8)
    crossed = embed.unpatchify(forward(params, turned, t, feats, mask), 2, 8, 8)
    assert np.abs(np.swapaxes(crossed, 1, 2) - straight).max() > 0.01


@pytest.mark.slow
def test_recomputation_does_not_change_the_gradient(params):
    def gradient(cfg):
        def loss(params):
            return jnp.mean(next_dit.make_forward(cfg)(params, *inputs()) ** 2)

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(dataclasses.replace(TOY, remat="none"))
    for remat in ("dots", "names", "attention", "full"):
        found = gradient(dataclasses.replace(TOY, remat=remat))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, found
        )


def test_bfloat16_stays_near_float32(params):
    image, *rest = inputs()
    expected = jax.jit(next_dit.make_forward(TOY))(params, image, *rest)
    half = jax.jit(next_dit.make_forward(dataclasses.replace(TOY, dtype="bfloat16")))
    velocity = half(params, image, *rest)
    assert velocity.dtype == jnp.float32
    assert np.abs(velocity - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 50}, "dim=50 is not a multiple of num_heads=4; the nearest that are: 48 and 52"),
        ({"axes_dims": (4, 4, 2)}, r"sum to 10, not to dim / num_heads = 12"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"remat": "some"}, "remat='some' is not one of full, attention, offload, names, dots"),
        ({"dtype": "float16"}, "dtype='float16' is not one of"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"axes_dims": (3, 4, 5)}, "must be three even numbers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TOY, **changes)


def test_unknown_preset_is_refused():
    with pytest.raises(InputError, match="'5b' is not one of tiny, 2b, 3b, 4b, 7b"):
        NextDiTConfig.preset("5b")


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 0}, {"num_kv_heads": 0}, {"num_layers": 10**9}, {"dim": -128},
        {"patch_size": 0}, {"hidden_dim": 2**40}, {"axes_dims": (8, 12)}, {"norm_eps": 0.0},
    ],
)  # fmt: skip
def test_sizes_that_no_network_has_are_refused_before_they_are_divided_by(change):
    with pytest.raises(InputError, match=r"config\.model: "):
        NextDiTConfig.preset("tiny", **change)
