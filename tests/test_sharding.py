"""Every parameter has a rule, every rule a parameter; a mesh that does not fit is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from lumina_jax.train_step import init_state

RELEASED = NextDiTConfig.preset("2b")


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in sharding.PARAM_RULES])
def test_every_rule_decides_for_a_parameter(pattern):
    first_match = {
        next(p for p, _ in sharding.PARAM_RULES if re.search(p, path))
        for path in paths(abstract_params(RELEASED))
    }
    assert pattern in first_match


def test_every_parameter_has_a_rule_of_its_rank():
    for path, leaf in paths(abstract_params(RELEASED)).items():
        assert len(sharding.param_axes(path, leaf.ndim)) == leaf.ndim


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(
        ValueError, match=r"No sharding rule matches the parameter 'new/thing'.*rank 2"
    ):
        sharding.param_axes("new/thing", ndim=2)


def test_average_and_moments_are_placed_like_their_parameter():
    mesh = sharding.make_mesh(replica=2, data=2, model=2)
    state = jax.eval_shape(
        lambda p: init_state(p, optax.chain(optax.clip(1.0), optax.adamw(1e-3))),
        abstract_params(RELEASED),
    )
    placed = paths(sharding.tree_shardings(state, mesh))
    for path, expected in paths(sharding.tree_shardings(state.params, mesh)).items():
        copies = [s for name, s in placed.items() if name.endswith("/" + path)]
        assert len(copies) == 4  # params, ema, first and second moment
        assert all(s.spec == expected.spec for s in copies)


def test_no_large_array_is_left_whole():
    """Over 32 x 1 devices every kernel of the released model is split."""
    for path, leaf in paths(abstract_params(RELEASED)).items():
        if leaf.size > 1_000_000:
            assert "data" in str(sharding.spec(sharding.param_axes(path, leaf.ndim))), path


def test_heads_split_over_model_and_width_over_data():
    axes = sharding.param_axes("layers/attention/q/kernel", ndim=4)
    assert sharding.spec(axes) == P(None, "data", "model", None)


def test_of_the_feed_forward_its_own_width_is_split_by_both():
    """The one dim that 32 devices cut into whole tiles (docs/performance.md)."""
    for name, expected in (
        ("gate", P(None, None, ("model", "data"))),
        ("down", P(None, ("model", "data"), None)),
    ):
        axes = sharding.param_axes(f"layers/feed_forward/{name}/kernel", ndim=3)
        assert sharding.spec(axes) == expected


def test_what_is_gathered_stays_split_by_model():
    mesh = sharding.make_mesh(replica=2, data=2, model=2)
    cfg = NextDiTConfig.preset("tiny")
    with jax.set_mesh(mesh):
        whole = jax.jit(sharding.gather)(
            jax.tree.map(lambda x: jnp.ones(x.shape), abstract_params(cfg)["layers"])
        )
    assert whole["feed_forward"]["gate"]["kernel"].sharding.spec == P(None, None, "model")
    assert whole["feed_forward"]["down"]["kernel"].sharding.spec == P(None, "model")
    assert whole["attention"]["q"]["kernel"].sharding.spec == P(None, None, "model")


def test_tokens_are_whole_inside_a_sublayer_and_split_around_it_gradients_too():
    mesh = sharding.make_mesh(replica=1, data=2, model=2, devices=jax.devices()[:4])
    x = jnp.arange(2 * 6 * 4, dtype=jnp.float32).reshape(2, 6, 4)

    def loss(x):
        inside = sharding.gather_tokens(sharding.split_tokens(x))
        return jnp.sum(jnp.sin(inside)), inside

    with jax.set_mesh(mesh):
        gradient, inside = jax.jit(jax.grad(loss, has_aux=True))(x)
        around = jax.jit(sharding.split_tokens)(x)
    assert around.sharding.shard_shape(x.shape) == (1, 3, 4)
    assert inside.sharding.shard_shape(x.shape) == (1, 6, 4)
    assert gradient.sharding.shard_shape(x.shape) == (1, 3, 4)
    np.testing.assert_array_equal(inside, x)
    np.testing.assert_allclose(gradient, np.cos(x), rtol=1e-6)


def test_tokens_that_the_mesh_cannot_split_evenly_are_split_unevenly():
    mesh = sharding.make_mesh(replica=1, data=1, model=4, devices=jax.devices()[:4])
    x = jnp.ones((2, 7, 4))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.gather_tokens(sharding.split_tokens(x) * 2))(x)
    np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((-1, 4, 1), (2, 4, 1)),
        ((1, 1, 8), (1, 1, 8)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)))
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize(
    "sizes", [(1, 4, 1), (1, -1, 3), (-1, -1, 1), (0, 8, 1), (3, 3, 1), (1, 8, -2)]
)
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(sizes):
    with pytest.raises(InputError, match="8 devices at hand") as caught:
        sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)))
    proposed = [int(n) for n in re.findall(r"--config\.mesh\.\w+=(\d+)", str(caught.value))]
    sharding.make_mesh(**dict(zip(sharding.MESH_AXES, proposed, strict=True)))


def test_a_model_that_the_mesh_cannot_split_is_refused():
    mesh = sharding.make_mesh(replica=1, data=1, model=8)
    cfg = NextDiTConfig.preset("tiny")
    with pytest.raises(InputError, match=r"kv_heads=2 over model=8.*heads=4 over model=8"):
        sharding.tree_shardings(abstract_params(cfg), mesh)
