"""A run from cached features: the same data, no frozen program, nearly the same losses."""

import jax
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import make_autoencoder
from lumina_jax.frozen.cache import cache_features
from lumina_jax.frozen.text_encoder import make_text_encoder
from lumina_jax.train import Trainer


@pytest.fixture
def cached(config, tmp_path):
    """The config of a run that reads both features of a data set made for it."""
    config.data.buckets = ("32x32",)
    directory = tmp_path / "cached"
    cache_features(
        config.data.directory,
        directory,
        text_encoder=make_text_encoder(**config.text_encoder),
        autoencoder=make_autoencoder(**config.autoencoder),
        system_prompt=config.data.system_prompt,
        mesh=sharding.make_mesh(replica=1, data=1, model=1, devices=jax.devices()[:1]),
        batch_size=32,
    )
    cached = config.copy_and_resolve_references()
    cached.data.update(directory=str(directory), cached=("latents", "cap_feats"))
    return cached


def test_a_run_from_cached_features_learns_what_a_run_without_learns(config, cached, tmp_path):
    plain, quick = Trainer(config, str(tmp_path / "a")), Trainer(cached, str(tmp_path / "b"))
    (state, _), (quick_state, _) = plain.init_state(), quick.init_state()
    with jax.set_mesh(plain.mesh):
        for index in range(3):
            batch = plain.encode(plain.loader.batch_at(index), index)
            found = quick.encode(quick.loader.batch_at(index), index)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(batch), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-5)
            # One compiled step serves both: neither its state nor its batch looks different.
            state, metrics = plain.step(state, batch, jax.random.key(0))
            quick_state, quick_metrics = plain.step(quick_state, found, jax.random.key(0))
            np.testing.assert_allclose(quick_metrics["loss"], metrics["loss"], rtol=1e-3)
    assert len(plain.step.programs) == 1
    weights = {"text_params", "autoencoder_params"}  # cached properties, there once they are read
    assert weights <= set(vars(plain.pipeline))
    assert not weights & set(vars(quick.pipeline))
    plain.checkpointer.close()
    quick.checkpointer.close()


def test_a_run_refuses_what_another_encoder_made(cached, tmp_path):
    cached.text_encoder.max_tokens = 12
    with pytest.raises(InputError, match=r"max_tokens=8', and this run's is .* max_tokens=12'"):
        Trainer(cached, str(tmp_path / "run"))


def test_a_run_refuses_a_data_set_without_the_features(config, tmp_path):
    config.data.cached = ("latents",)
    with pytest.raises(InputError, match=r"has no cached latents; it has none. Make .* --features"):
        Trainer(config, str(tmp_path))
