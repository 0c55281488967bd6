"""One call from prompts to pictures: what it takes, what it refuses, what does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lumina_jax import sharding
from lumina_jax.errors import InputError
from lumina_jax.frozen.autoencoder import Pixels
from lumina_jax.sampling import pipeline as pipeline_module
from lumina_jax.sampling.pipeline import Pipeline
from tests.sampling.small_pipeline import DEFAULTS, MODEL, Letters, make_pipeline, save_run


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


def test_each_branch_has_the_slots_that_its_own_prompts_need(pipeline, monkeypatch):
    """The empty prompt needs one; all of them, as many as the longest, draw the same picture."""
    shapes = []

    def texts(pairs, guided, parallel, cached):
        found = type(pipeline)._texts(pipeline, pairs, guided, parallel, cached)
        shapes.append([ids.shape for ids, _ in found])
        return found

    monkeypatch.setattr(pipeline, "_texts", texts)
    monkeypatch.setattr(pipeline_module, "SLOTS_STEP", 4)
    apart = pipeline(["cat", "co"], output="float")
    pipeline(["cat"], negative_prompt="horse", output="float")
    pipeline(["cat"], negative_prompt="dog", output="float")
    pipeline(["horses"], guidance_scale=1.0, output="float")
    assert shapes == [[(2, 4), (2, 1)], [(1, 4), (1, 6)], [(2, 4)], [(1, 6)]]
    monkeypatch.setattr(pipeline_module, "caption_slots", lambda num: 6)
    together = pipeline(["cat", "co"], output="float")
    assert shapes[-1] == [(4, 6)]
    np.testing.assert_allclose(apart, together, atol=1e-5)


@pytest.mark.slow
def test_prompt_and_negative_prompt_are_halves_of_the_devices():
    """Two devices and one picture: each has one branch, and none draws a picture too many."""
    mesh = sharding.make_mesh(replica=1, data=2, model=1, devices=jax.devices()[:2])
    pair = make_pipeline()
    pair.mesh, pair.params = mesh, jax.device_put(pair.params, sharding.named(mesh, ()))
    halves = Pipeline(
        MODEL, pair.params, text_encoder=Letters(), autoencoder=Pixels(), defaults=DEFAULTS,
        size=(16, 16), system_prompt="empty", mesh=mesh,
    )  # fmt: skip
    rows = []
    encode = Letters.encode
    halves._text_encoder.encode = lambda params, ids, mask: (
        rows.append(ids.shape),
        encode(halves._text_encoder, params, ids, mask),
    )[1]
    for prompts in (["cat"], ["cat", "dog", "cow"]):
        for cache in ({}, {"cache_threshold": 0.1}):
            found = halves(prompts, output="float", **cache)
            expected = make_pipeline()(prompts, output="float", **cache)
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [shape[0] for shape in rows] == [2, 2, 6, 6]


START = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_a_picture_drawn_over_another_is_nearer_to_it_the_less_of_the_path_is_walked(pipeline):
    distances = [
        np.abs(
            pipeline("cat", image=START, strength=part, num_steps=21, output="float") - START / 255
        ).mean()
        for part in (0.05, 0.3, 0.6)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.7 * distances[-1]


def test_the_whole_path_leaves_nothing_of_the_picture_that_it_began_from(pipeline):
    found = pipeline("cat", image=START, strength=1.0, output="float")
    np.testing.assert_array_equal(found, pipeline("cat", output="float"))


def test_a_part_of_the_path_begins_at_the_noise_of_its_time():
    """By hand: the last two intervals of four, from (1 - t) noise + t latents."""
    path = DEFAULTS.path(16, 1, strength=0.5)
    grid = DEFAULTS.times(16)
    np.testing.assert_allclose(path.numbers.times, grid[2:4], rtol=1e-6)
    assert path.numbers.begin == np.float32(grid[2])
    assert path.program.num_guided == sum(grid[2:4] < DEFAULTS.guidance_truncation)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dpm"])
def test_repainting_keeps_every_pixel_outside_the_mask(pipeline, solver):
    mask = np.zeros((16, 16), bool)
    mask[3:9, 5:] = True
    found = pipeline(["cat", "dog"], image=START, mask=mask, solver=solver, output="uint8")
    for picture in found:
        np.testing.assert_array_equal(picture[~mask], START[~mask])
        assert (picture[mask] != START[mask]).mean() > 0.9


def test_what_is_repainted_sees_what_is_kept(pipeline):
    """Another surrounding, another inside; and a mask of everything is no mask."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    inside = [
        pipeline("cat", image=image, mask=mask, output="float")[0, 4:12, 4:12]
        for image in (START, 255 - START)
    ]
    assert np.abs(inside[0] - inside[1]).max() > 1e-3
    everything = np.full_like(mask, 255)
    found = pipeline("cat", image=START, mask=everything, output="float")
    np.testing.assert_allclose(found, pipeline("cat", output="float"), atol=1e-6)


def test_pillow_pictures_are_taken_too(pipeline):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12] = 255
    arrays = pipeline("cat", image=START, mask=mask, output="uint8")
    pictures = pipeline(
        "cat", image=Image.fromarray(START), mask=Image.fromarray(mask), output="uint8"
    )
    np.testing.assert_array_equal(arrays, pictures)


def test_a_preview_shows_every_evaluation_and_ends_at_the_picture(pipeline):
    seen = []
    watched = pipeline(
        ["cat", "dog"], preview=lambda *shown: seen.append(shown), output="uint8", num_steps=6
    )
    np.testing.assert_array_equal(watched, pipeline(["cat", "dog"], output="uint8", num_steps=6))
    assert sorted(done for done, _, _ in seen) == [1, 2, 3, 4, 5]
    assert {total for _, total, _ in seen} == {5}
    assert {images.shape for _, _, images in seen} == {(2, 16, 16, 3)}
    last = max(seen, key=lambda shown: shown[0])[2]
    np.testing.assert_array_equal(last, watched)  # the data that the last velocity predicts


def test_the_trace_tells_what_each_picture_computed(pipeline):
    images, trace = pipeline(
        ["cat", "dog"], cache_interval=2, trace=True, output="float", num_steps=6
    )
    assert images.shape == (2, 16, 16, 3)
    expected = np.array([True, False, True, False, True])[:, None].repeat(2, axis=1)
    np.testing.assert_array_equal(trace.conditional.computed, expected)
    assert len(trace.unconditional.computed) < 5
    assert pipeline("cat", trace=True)[1] is None


@pytest.mark.slow
def test_every_acceleration_is_a_setting_of_the_call(pipeline):
    plain = pipeline("cat", output="float", num_steps=9)
    for change in (
        {"cache_threshold": 0.5}, {"cache_interval": 3}, {"merge_ratio": 0.5},
        {"merge_ratio": 0.5, "merge_steps": (0.5, 1.0), "cache_interval": 2}, {"solver": "dpm"},
        {"time_shift": 0.0},
    ):  # fmt: skip
        found = pipeline("cat", output="float", num_steps=9, **change)
        assert np.isfinite(found).all()
        assert np.abs(found - plain).max() > 1e-4, change


@pytest.mark.slow
def test_larger_pictures_are_stretched_only_where_asked_and_only_if_larger(pipeline):
    settings = {"rope_scaling": "time_aware", "proportional_attention": True}
    small = pipeline("cat", output="float")
    np.testing.assert_array_equal(pipeline("cat", output="float", **settings), small)
    large = {"height": 32, "width": 48, "output": "float"}
    plain = pipeline("cat", **large)
    for name, value in settings.items():
        assert np.abs(pipeline("cat", **large, **{name: value}) - plain).max() > 1e-4, name


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


def test_what_only_the_other_kind_of_checkpoint_takes_is_refused(tmp_path):
    save_run(
        tmp_path / "run", side=16, num_steps=2, max_tokens=8, dim=32, num_kv_heads=4,
        hidden_dim=64, axes_dims=(4, 2, 2),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"^dtype=float32: that is for a diffusers pipeline"):
        Pipeline.open(str(tmp_path / "run"), dtype="float32")
    with pytest.raises(InputError, match=r"^step=3, weights=ema: that is for the workdir of a run"):
        Pipeline.open(str(tmp_path), step=3, weights="ema")
    opened = Pipeline.open(str(tmp_path / "run"), weights="ema")
    assert (opened.size, opened.defaults.num_steps) == ((16, 16), 2)


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
        (["a"], {"steps": 3}, "No sampling setting is called 'steps'. Did you mean num_steps"),
        (["a"], {"strength": 0.5}, "strength=0.5 is given, and no image"),
        (["a"], {"image": START, "strength": 0.0}, "strength=0.0 must be above 0"),
        (["a"], {"mask": START[..., 0]}, "A mask is given, and no image"),
        (["a"], {"image": START[:8]}, r"image is uint8 \(8, 16, 3\); needed: uint8, 16 x 16"),
        (["a"], {"image": [START, START]}, r"image has 2 entries for 1 prompt"),
        (["a"], {"image": START / 255}, "image is float64"),
        (["a"], {"cache_interval": 2, "cache_threshold": 1.0}, "two ways to choose"),
        (["a"], {"merge_ratio": 0.9}, "merge_ratio=0.9 is not between 0 and 0.75"),
        (["a"], {"merge_steps": (0.5, 0.2)}, "merge_steps=.* must be two fractions"),
        (["a"], {"rope_scaling": "yarn"}, "rope_scaling='yarn' is not one of none, time_aware"),
        (["a"], {"latents": jnp.ones((2, 16, 16, 3))}, r"latents have shape \(2, 16, 16, 3\)"),
    ],
)
def test_bad_input_is_refused(pipeline, prompts, given, message):
    with pytest.raises(InputError, match=message):
        pipeline(prompts, **given)
