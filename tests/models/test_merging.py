"""Tokens that say the same: found, merged, and told apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax.models import merging
from lumina_jax.models.embed import patchify
from lumina_jax.models.next_dit import Merging, NextDiTConfig, abstract_params, make_stages


def groups_of(x, **kind):
    return merging.find_groups(x, **{"height": 4, "width": 6, "ratio": 0.5} | kind)


def test_equal_tokens_are_merged_before_all_others():
    """A flat sky above, all different below: the sky goes first, wherever it is."""
    x = jax.random.normal(jax.random.key(0), (1, 3 + 24, 8))
    x = x.at[:, 3:15].set(jax.random.normal(jax.random.key(1), (8,)))
    groups = groups_of(x, ratio=9 / 24)
    gone = set(range(27)) - set(groups.kept[0].tolist())
    # Of the sky's twelve the first tokens of its three cells stay.
    assert gone == set(range(3, 15)) - {3, 5, 7}
    assert groups.kept[0, :3].tolist() == [0, 1, 2]


def test_a_group_is_the_mean_of_its_tokens_and_all_tokens_are_in_one():
    x = jax.random.normal(jax.random.key(0), (2, 24, 8))
    groups = groups_of(x)
    merged = merging.merge(groups, x)
    assert merged.shape == (2, 12, 8)
    assert groups.size.sum(axis=1).tolist() == [24, 24]
    for row in range(2):
        for place in range(12):
            members = np.flatnonzero(groups.group[row] == place)
            assert groups.kept[row, place] in members
            np.testing.assert_allclose(merged[row, place], x[row, members].mean(0), atol=1e-6)


def test_what_nothing_changed_is_restored_to_the_bit():
    x = jax.random.normal(jax.random.key(0), (2, 5 + 24, 8))
    groups = groups_of(x, ratio=0.7)
    merged = merging.merge(groups, x)
    np.testing.assert_array_equal(merging.restore(groups, x, merged, merged), x)


def test_every_token_gets_what_its_group_became():
    x = jax.random.normal(jax.random.key(0), (1, 24, 8))
    groups = groups_of(x)
    merged = merging.merge(groups, x)
    added = jnp.arange(12.0)[None, :, None] * jnp.ones((1, 1, 8))
    found = merging.restore(groups, x, merged, merged + added) - x
    np.testing.assert_allclose(found[0, :, 0], groups.group[0], atol=1e-5)


@pytest.mark.parametrize(("height", "width", "most"), [(4, 6, 18), (3, 5, 9), (1, 4, 2), (1, 1, 0)])
def test_one_token_of_a_cell_stays(height, width, most):
    assert merging.num_merged(height, width, 0.99) == most
    x = jax.random.normal(jax.random.key(0), (1, height * width, 8))
    groups = groups_of(x, height=height, width=width, ratio=0.99)
    assert groups.kept.shape[1] == height * width - most


MODEL = NextDiTConfig(
    dim=32, num_layers=4, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=2, cap_feat_dim=8, dtype="float32",
)  # fmt: skip


def velocity(latents, chosen):
    """Of a random network, with the pieces that a sampler calls."""
    leaves, tree = jax.tree.flatten(abstract_params(MODEL))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params, stages = jax.tree.unflatten(tree, params), make_stages(MODEL)
    batch, height, width, _ = latents.shape
    feats = jax.random.normal(jax.random.key(2), (batch, 3, 8))
    mask = jnp.ones((batch, 3), bool)

    @jax.jit
    def run(latents):
        rows, columns = height // 2, width // 2
        image = patchify(latents, 2, rows * columns)
        caption = stages.refine(params, feats, mask)
        joined = stages.join(params, image, jnp.full(batch, 0.5), caption, mask)
        x = stages.attend(params, joined, rows, columns, chosen)
        return stages.predict(params, x, joined, 3)

    return run(latents)


@pytest.mark.slow
def test_merging_nothing_is_the_plain_network():
    latents = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    np.testing.assert_allclose(
        velocity(latents, Merging(0.0, 1, 3)), velocity(latents, None), atol=1e-5
    )


def test_merging_more_of_a_picture_changes_it_more():
    latents = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    plain = velocity(latents, None)
    errors = [
        float(jnp.abs(velocity(latents, Merging(*kind)) - plain).mean() / jnp.abs(plain).mean())
        for kind in ((0.25, 2, 3), (0.5, 1, 3), (0.75, 0, 4))
    ]
    assert 0 < errors[0] < errors[1] < errors[2]
