"""One call from prompts to pictures: what it takes, what it refuses, what does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import Pixels
from lumina_jax.models.next_dit import NextDiTConfig, abstract_params
from lumina_jax.sampling import pipeline as pipeline_module
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.sampler import SamplerConfig

MODEL = NextDiTConfig(
    dim=32, num_layers=1, num_refiner_layers=1, num_heads=4, num_kv_heads=2, hidden_dim=64,
    axes_dims=(4, 2, 2), in_channels=3, patch_size=4, cap_feat_dim=8, dtype="float32",
)  # fmt: skip
DEFAULTS = SamplerConfig(
    num_steps=5, guidance_scale=3.0, guidance_truncation=0.6, guidance_renorm=1.0,
    semantics="official", solver="euler", time_shift=2.0,
)  # fmt: skip


class Letters:
    """A text encoder whose features are its letters."""

    feature_dim, max_tokens, num_truncated = 8, 6, 0

    def load_params(self, mesh):
        return jax.device_put(
            jax.random.normal(jax.random.key(5), (256, 8)), sharding.named(mesh, ())
        )

    def fingerprint(self):
        return "letters"

    def tokenize(self, captions):
        ids = np.zeros((len(captions), 6), np.int32)
        for row, text in zip(ids, captions, strict=True):
            content = b"\x01" + text.encode()
            self.num_truncated += len(content) > 6
            row[: len(content[:6])] = list(content[:6])
        return ids, ids > 0

    def encode(self, params, token_ids, token_mask):
        return params[token_ids] * token_mask[..., None]


def make_pipeline(**mesh):
    leaves, tree = jax.tree.flatten(abstract_params(MODEL))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, params)
    devices = jax.devices() if mesh else jax.devices()[:1]
    mesh = sharding.make_mesh(**{"replica": 1, "data": 1, "model": 1, **mesh}, devices=devices)
    return Pipeline(
        MODEL,
        jax.device_put(params, sharding.tree_shardings(params, mesh)),
        text_encoder=Letters(),
        autoencoder=Pixels(),
        defaults=DEFAULTS,
        size=(16, 16),
        system_prompt="empty",
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def test_a_picture_for_each_prompt_in_every_kind_of_output(pipeline):
    pictures = pipeline(["cat", "dog"])
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    numbers = pipeline(["cat", "dog"], output="float")
    assert numbers.shape == (2, 16, 16, 3)
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    whole = pipeline(["cat", "dog"], output="uint8")
    np.testing.assert_array_equal(whole, np.round(numbers * 255))
    np.testing.assert_array_equal(np.asarray(pictures[1]), whole[1])


def test_one_string_is_one_prompt(pipeline):
    assert len(pipeline("cat")) == 1


def test_height_comes_before_width(pipeline):
    assert pipeline("cat", height=8, width=24, output="uint8").shape == (1, 8, 24, 3)


def test_a_seed_gives_the_same_picture_whatever_its_batch(pipeline):
    alone = pipeline("dog", seed=12, output="float")
    among = pipeline(["cat", "cow", "dog"], seed=10, output="float")
    np.testing.assert_allclose(among[2:], alone, atol=1e-5)
    listed = pipeline(["dog", "cat"], seed=[12, 3], output="float")
    np.testing.assert_allclose(listed[:1], alone, atol=1e-5)


def test_prompt_seed_and_every_setting_matter(pipeline):
    plain = pipeline("cat", output="float")
    for change in (
        {"seed": 1}, {"negative_prompt": "dog"}, {"num_steps": 6}, {"guidance_scale": 5.0},
        {"guidance_renorm": 0.5}, {"semantics": "diffusers"}, {"time_shift": 2.5},
        {"latents": np.ones((1, 16, 16, 3))},
    ):  # fmt: skip
        assert np.abs(pipeline("cat", output="float", **change) - plain).max() > 1e-3, change
    assert np.abs(pipeline("dog", output="float") - plain).max() > 1e-3


def test_given_latents_replace_the_noise(pipeline):
    noise = jax.random.normal(jax.random.key(4), (16, 16, 3))[None]
    np.testing.assert_array_equal(
        pipeline("cat", latents=noise, seed=9, output="float"),
        pipeline("cat", seed=4, output="float"),
    )


@pytest.mark.parametrize("mesh", [{"data": 8}, {"replica": 2, "data": 2, "model": 2}])
def test_a_mesh_draws_the_same_pictures(pipeline, mesh):
    prompts = ["cat", "dog", "cow"]  # fewer than the mesh has parts
    found = make_pipeline(**mesh)(prompts, output="float")
    np.testing.assert_allclose(found, pipeline(prompts, output="float"), atol=1e-4)


def test_slots_that_no_prompt_of_a_call_needs_are_left_out(pipeline, monkeypatch):
    expected = pipeline(["cat", ""], output="float")
    monkeypatch.setattr(pipeline_module, "SLOTS_STEP", 4)
    ids, mask = pipeline._tokenize(["cat", ""])  # four tokens and one, of six slots
    assert ids.shape == mask.shape == (2, 4)
    assert pipeline._tokenize(["horse"])[0].shape == (1, 6)
    np.testing.assert_allclose(pipeline(["cat", ""], output="float"), expected, atol=1e-5)


def test_parts_that_do_not_belong_together_are_refused(pipeline):
    class Wide(Letters):
        feature_dim = 9

    with pytest.raises(InputError, match=r"This text encoder gives 9 numbers .* takes 8"):
        Pipeline(
            MODEL,
            pipeline.params,
            text_encoder=Wide(),
            autoencoder=Pixels(),
            defaults=DEFAULTS,
            size=(16, 16),
            system_prompt="empty",
            mesh=pipeline.mesh,
        )


def test_the_same_call_does_not_compile_again(pipeline):
    """Neither for other prompts and seeds, nor for other strengths of guidance."""
    pipeline(["a", "b"], negative_prompt="y")
    before = len(pipeline.draw.programs)
    pipeline(["c", "d"], seed=8, negative_prompt="x", guidance_scale=2.5, guidance_renorm=0.9)
    assert len(pipeline.draw.programs) == before


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        ([], {}, "No prompt was given"),
        (
            ["a"],
            {"height": 18},
            "height=18 is not a multiple of 4 pixels.*nearest that are: 16 and 20",
        ),
        (["a"], {"height": 0}, "height=0 is not a multiple"),
        (["a"], {"width": 2}, "width=2 is not a multiple of 4 pixels.*nearest that are: 4 and 8"),
        (["a"], {"output": "jpeg"}, "output='jpeg' is not one of pil, uint8, float"),
        (["a"], {"solver": "rk9"}, "solver='rk9' is not one of euler"),
        (["a"], {"seed": [1, 2]}, r"seed has 2 entries for 1 prompt\(s\)"),
        (["a"], {"seed": -1}, "seed -1 is not between 0 and 4294967295"),
        (["a", "b"], {"negative_prompt": ["c"]}, "negative_prompt has 1 entries for 2"),
        (["a"], {"latents": jnp.ones((2, 16, 16, 3))}, r"latents have shape \(2, 16, 16, 3\)"),
    ],
)
def test_bad_input_is_refused(pipeline, prompts, given, message):
    with pytest.raises(InputError, match=message):
        pipeline(prompts, **given)
