"""Every config says only what differs from base.py, and what it says can be built."""

import importlib

import jax
import pytest

from configs import base
from lumina_jax import optim, sharding, system_prompts
from lumina_jax.models.next_dit import NextDiTConfig
from lumina_jax.sampling.sampler import SamplerConfig
from lumina_jax.train import caption_policy, check_batch_size

STAGES = ("stage1", "stage2", "stage3")


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def make_mesh(config, num_devices):
    """Of so many devices, which are all the same one: only its shape is asked for."""
    return sharding.make_mesh(**config.mesh, devices=jax.devices()[:1] * num_devices)


def keys(config):
    flat = config.to_dict(preserve_field_references=False)
    return {(section, key) for section, value in flat.items() for key in _inner(value)}


def _inner(value):
    return value if isinstance(value, dict) else (None,)


@pytest.mark.parametrize("name", ["tiny", "tiny_latent", *STAGES, "finetune"])
def test_a_config_is_base_with_other_values(name):
    config = load(name)
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
    for name in STAGES:
        config = load(name)
        train = config.train
        found.append((config.data.resolution, train.num_steps, train.batch_size))
        assert config.optim.learning_rate == 2e-4
        assert bool(config.flow.auxiliary_weight) == (name != "stage1")
        assert (config.text_encoder.kind, config.autoencoder.kind) == ("gemma2", "vae")
    assert found == [(256, 144_000, 1024), (1024, 40_000, 512), (1024, 15_000, 512)]


@pytest.mark.parametrize("name", [*STAGES, "finetune"])
def test_what_the_paper_leaves_open_is_as_in_the_released_program(name):
    """Where we choose otherwise, the config says so: warm-up and the average."""
    config = load(name)
    found = {key: config.optim[key] for key in ("b1", "b2", "eps", "weight_decay", "grad_clip")}
    assert found == {"b1": 0.9, "b2": 0.95, "eps": 1e-15, "weight_decay": 0.0, "grad_clip": 2.0}
    assert config.optim.schedule == "constant"
    assert (config.flow.time_distribution, config.flow.time_shift) == ("logit_normal", None)
    assert config.data.caption_dropout == 0.1
    assert config.data.system_prompt == "base"
    caption_policy(config.data)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(("num_devices", "replica"), [(256, 8), (64, 2)])
def test_a_stage_fits_the_topologies_that_it_names(name, num_devices, replica):
    config = load(name)
    if config.mesh.replica != replica:
        page = importlib.import_module(f"configs.{name}").__doc__
        assert f"--config.mesh.replica={replica}" in page
        config.mesh.replica = replica
    check_batch_size(config, make_mesh(config, num_devices))
    assert NextDiTConfig.preset("2b").dim // config.mesh.data % 8 == 0  # whole tiles


def test_each_stage_draws_noise_of_its_own_and_begins_from_the_average():
    configs = [load(name) for name in (*STAGES, "finetune")]
    assert len({config.seed for config in configs}) == 4
    for config in configs[1:]:
        train = config.train
        assert (train.init_weights, train.init_optimizer) == ("ema", "fresh")


def test_text_slots_are_of_all_kinds_and_for_small_pictures_alone():
    slots, *others = (load(name).data for name in (*STAGES, "finetune"))
    assert slots.text_slots.keys() == slots.kinds.keys()
    assert max(slots.text_slots.values()) == load("stage1").text_encoder.max_tokens
    mean = sum(slots.kinds[kind] * slots.text_slots[kind] for kind in slots.kinds)
    assert mean == pytest.approx(160)  # as stage1.py says
    assert not any(data.text_slots for data in others)


@pytest.mark.parametrize("num_devices", [8, 16])
def test_fine_tuning_starts_from_the_released_weights_on_eight_or_sixteen_devices(num_devices):
    config = load("finetune")
    assert config.train.init_from == config.text_encoder.path == "Alpha-VLLM/Lumina-Image-2.0"
    assert (config.data.resolution, config.flow.auxiliary_weight) == (1024, 1.0)
    assert (config.mesh.replica, config.mesh.data, config.mesh.model) == (1, -1, 1)
    check_batch_size(config, make_mesh(config, num_devices))
