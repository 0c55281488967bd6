"""Every config says only what differs from base.py, and what it says can be built."""

import importlib

import pytest

from configs import base
from lumina_jax import optim, system_prompts
from lumina_jax.models.next_dit import NextDiTConfig
from lumina_jax.sampling.sampler import SamplerConfig


def keys(config):
    flat = config.to_dict(preserve_field_references=False)
    return {(section, key) for section, value in flat.items() for key in _inner(value)}


def _inner(value):
    return value if isinstance(value, dict) else (None,)


@pytest.mark.parametrize("name", ["tiny", "tiny_latent", "stage1", "stage2", "stage3"])
def test_a_config_is_base_with_other_values(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert keys(config) == keys(base.get_config())
    changes = {key: value for key, value in config.model.items() if value is not None}
    NextDiTConfig.preset(changes.pop("preset"), **changes)
    optim.OptimConfig(**config.optim)
    sampling = config.sampling.to_dict()
    for key in ("height", "width"):
        assert sampling.pop(key) == config.data.resolution
    for prompt in (config.data.system_prompt, sampling.pop("system_prompt")):
        system_prompts.prefixed("", prompt)
    SamplerConfig(**sampling)


def test_the_stages_are_those_of_the_paper():
    """Table 3: pixels, steps, batch; the second loss from stage 2 on."""
    found = []
    for name in ("stage1", "stage2", "stage3"):
        config = importlib.import_module(f"configs.{name}").get_config()
        train = config.train
        found.append((config.data.resolution, train.num_steps, train.batch_size))
        assert config.optim.learning_rate == 2e-4
        assert bool(config.flow.auxiliary_weight) == (name != "stage1")
        assert (config.text_encoder.kind, config.autoencoder.kind) == ("gemma2", "vae")
    assert found == [(256, 144_000, 1024), (1024, 40_000, 512), (1024, 15_000, 512)]
