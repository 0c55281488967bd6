"""Whole pictures: `diffusers.Lumina2Pipeline` and ours, from the same folder and the same noise.

A tiny pipeline with random weights is saved by diffusers and loaded by both programs: tokenizer,
Gemma-2, transformer, scheduler and VAE.
"""

import itertools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from lumina_jax import system_prompts  # noqa: E402
from lumina_jax.errors import InputError  # noqa: E402
from lumina_jax.sampling.pipeline import Pipeline  # noqa: E402
from tests import tiny_lumina2  # noqa: E402

pytestmark = pytest.mark.parity

PROMPTS = [
    "a dog",
    "",
    "一只狗坐在红色的雨伞下, and a rather long description of the umbrella follows",
    "ein Hund",
]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Four levels: diffusers' pipeline takes a VAE of eight pixels a latent for granted.
    path = tmp_path_factory.mktemp("lumina2") / "theirs"
    return tiny_lumina2.save(path, vae_channels=(8, 8, 16, 16))


@pytest.fixture(scope="module")
def ours(folder):
    return Pipeline.from_diffusers(str(folder), dtype="float32")


def load_theirs(folder):
    pipeline = diffusers.Lumina2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder)


def noise(num, height, width):
    return (
        np.random.default_rng(7).normal(size=(num, height // 8, width // 8, 4)).astype(np.float32)
    )


def draw_theirs(pipeline, prompts, latents, *, negative, truncation, renorm, **settings):
    with torch.no_grad():
        return pipeline(
            prompts,
            negative_prompt=negative,
            height=latents.shape[1] * 8,
            width=latents.shape[2] * 8,
            num_inference_steps=STEPS,
            cfg_trunc_ratio=truncation,
            cfg_normalization=renorm,
            latents=torch.permute(torch.as_tensor(latents), (0, 3, 1, 2)),
            output_type="np",
            **settings,
        ).images


def draw_ours(pipeline, prompts, latents, *, negative, truncation, renorm, **settings):
    return pipeline(
        prompts,
        negative_prompt=negative,
        height=latents.shape[1] * 8,
        width=latents.shape[2] * 8,
        num_steps=STEPS,
        guidance_truncation=truncation,
        guidance_renorm=float(renorm),
        latents=latents,
        output="float",
        **settings,
    )


def psnr(a, b):
    return -10 * np.log10(np.mean(np.square(a.astype(np.float64) - b)))


# The first alone takes as long to compile as it should; the others are the rest of the square.
CASES = [
    (4, (48, 80), 0.25, True, "blurry, 低质量"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (1, (64, 64), 1.0, True, None),
            (1, (64, 64), 0.25, False, None),
            (1, (80, 48), 0.25, True, "blurry"),
            (1, (64, 64), 1.0, False, "blurry"),
            (4, (64, 64), 0.25, True, None),
            (4, (64, 64), 1.0, False, None),
            (4, (80, 48), 0.25, False, "blurry"),
            (4, (80, 48), 1.0, True, "blurry"),
        ]
    ),
]


@pytest.mark.parametrize(("num", "size", "truncation", "renorm", "negative"), CASES)
def test_pictures_equal_those_of_diffusers(ours, theirs, num, size, truncation, renorm, negative):
    prompts, latents = PROMPTS[:num], noise(num, *size)
    settings = {"negative": negative and [negative] * num, "truncation": truncation}
    expected = draw_theirs(theirs, prompts, latents, renorm=renorm, **settings)
    found = draw_ours(ours, prompts, latents, renorm=renorm, **settings)
    assert expected.std() > 0.05  # a picture, not a plain colour
    assert psnr(found, expected) >= 50
    print(f"{num} x {size}, {truncation=}, {renorm=}: {psnr(found, expected):.1f} dB")
    # Guidance matters here, or agreement would say little.
    other = draw_ours(ours, prompts, latents, renorm=renorm, guidance_scale=1.01, **settings)
    assert psnr(other, expected) < psnr(found, expected) - 10


SETTINGS = {"negative": ["blurry"] * 4, "truncation": 0.25, "renorm": True}


def test_four_pictures_of_one_prompt_equal_those_of_diffusers(ours, theirs):
    latents = noise(4, 48, 80)
    settings = SETTINGS | {"guidance_scale": 2.0}
    theirs_settings = settings | {"negative": "blurry"}
    expected = draw_theirs(theirs, "a dog", latents, num_images_per_prompt=4, **theirs_settings)
    found = draw_ours(ours, ["a dog"] * 4, latents, **settings)
    assert psnr(found, expected) >= 50


def test_the_folder_we_write_loads_in_diffusers_and_here(ours, theirs, tmp_path):
    ours.save_diffusers(str(tmp_path / "ours"))
    latents = noise(4, 48, 80)
    expected = draw_theirs(theirs, PROMPTS, latents, **SETTINGS)
    again = load_theirs(tmp_path / "ours")
    np.testing.assert_array_equal(draw_theirs(again, PROMPTS, latents, **SETTINGS), expected)
    for name, value in theirs.transformer.state_dict().items():
        np.testing.assert_array_equal(again.transformer.state_dict()[name], value)
    found = Pipeline.from_diffusers(str(tmp_path / "ours"), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, found.params, ours.params)
    assert found.size == ours.size
    assert psnr(draw_ours(found, PROMPTS, latents, **SETTINGS), expected) >= 50
    with pytest.raises(InputError, match="has files already"):
        ours.save_diffusers(str(tmp_path / "ours"))


def draw_officially(theirs, prompts, negatives, latents, *, points, scale, alpha, limit, shift):
    """The official sampler after its formulas, around the networks of diffusers.

    Midpoint rule on a shifted grid; guidance while t < alpha, the conditional velocity alone after
    it; the norm of a picture's guided velocity at most `limit` times the conditional one, 0 for no
    such limit. A negative prompt that is not empty has the system prompt in front.
    """
    start = system_prompts.SYSTEM_PROMPTS["real"]

    def features(texts):
        texts = [text and start + text for text in texts]
        tokens = theirs.tokenizer(texts, padding=True, return_tensors="pt")
        hidden = theirs.text_encoder(**tokens, output_hidden_states=True).hidden_states[-2]
        return {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": tokens["attention_mask"].bool(),
        }

    def network(x, t, caption):
        return theirs.transformer(x, t.expand(len(x)), **caption, return_dict=False)[0]

    def velocity(x, t):
        conditional = network(x, t, caption)
        if t >= alpha:
            return conditional
        unconditional = network(x, t, negative)
        guided = unconditional + scale * (conditional - unconditional)
        if limit:
            norms = [torch.linalg.vector_norm(v, dim=(1, 2, 3)) for v in (conditional, guided)]
            factor = torch.where(norms[1] >= limit * norms[0], limit * norms[0] / norms[1], 1.0)
            guided = guided * factor[:, None, None, None]
        return guided

    with torch.no_grad():
        caption, negative = features(prompts), features(negatives)
        x = torch.permute(torch.as_tensor(latents), (0, 3, 1, 2))
        tau = torch.linspace(0, 1, points)
        times = tau / (tau + shift - shift * tau)
        for t, after in itertools.pairwise(times):
            step = after - t
            middle = x + step / 2 * velocity(x, t)
            x = x + step * velocity(middle, t + step / 2)
        images = theirs.vae.decode(x / 0.3611 + 0.1159).sample
    return torch.permute((images / 2 + 0.5).clamp(0, 1), (0, 2, 3, 1)).numpy()


@pytest.mark.parametrize(
    ("num", "size", "alpha", "limit", "negative"),
    [
        (4, (48, 80), 0.25, 1.0, "blurry"),
        pytest.param(1, (64, 64), 1.0, 1.0, "", marks=pytest.mark.slow),
        pytest.param(4, (64, 64), 0.25, 0.0, "", marks=pytest.mark.slow),
        pytest.param(1, (80, 48), 0.25, 0.5, "blurry", marks=pytest.mark.slow),
    ],
)
def test_pictures_equal_the_official_sampler(ours, theirs, num, size, alpha, limit, negative):
    prompts, negatives, latents = PROMPTS[:num], [negative] * num, noise(num, *size)
    prompts = [text or "a cat" for text in prompts]  # no system prompt before an empty one there
    expected = draw_officially(
        theirs,
        prompts,
        negatives,
        latents,
        points=5,
        scale=4.0,
        alpha=alpha,
        limit=limit,
        shift=6.0,
    )
    found = ours(
        prompts,
        negative_prompt=negatives,
        height=size[0],
        width=size[1],
        latents=latents,
        num_steps=5,
        guidance_scale=4.0,
        guidance_truncation=alpha,
        guidance_renorm=limit,
        semantics="official",
        solver="midpoint",
        time_shift=6.0,
        output="float",
    )
    assert expected.std() > 0.05
    assert psnr(found, expected) >= 50
    print(f"{num} x {size}, {alpha=}, {limit=}: {psnr(found, expected):.1f} dB")


@pytest.mark.slow
def test_bfloat16_draws_nearly_the_same_picture(folder, ours):
    half = Pipeline.from_diffusers(str(folder))
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype("bfloat16")}
    latents = noise(1, 64, 64)
    settings = {"negative": None, "truncation": 1.0, "renorm": False, "guidance_scale": 1.0}
    exact = draw_ours(ours, ["a dog"], latents, **settings)
    assert psnr(draw_ours(half, ["a dog"], latents, **settings), exact) > 20


def test_settings_come_from_the_folder(ours):
    assert (ours.defaults.num_steps, ours.defaults.time_shift) == (30, 6.0)
    assert ours.defaults.semantics == "diffusers"
    assert ours.size == (32, 32)  # sample_size 4, eight pixels a latent
    assert ours.system_prompt == "real"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "is a 'FluxPipeline'; needed"),
        (
            {"scheduler/scheduler_config.json": '{"_class_name": "DDIMScheduler"}'},
            "The scheduler of .* is DDIMScheduler",
        ),
        (
            {
                "scheduler/scheduler_config.json": '{"_class_name": '
                '"FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": true}'
            },
            "with use_karras_sigmas=True; needed",
        ),
        ({"model_index.json": None}, "is no diffusers pipeline"),
        ({"vae": None}, "lacks vae"),
    ],
)
def test_a_folder_of_something_else_is_refused(folder, tmp_path, change, message):
    for source in folder.rglob("*"):
        target = tmp_path / source.relative_to(folder)
        if source.is_dir():
            target.mkdir()
        else:
            target.symlink_to(source)
    for name, content in change.items():
        path = tmp_path / name
        if path.is_dir():
            path.rename(tmp_path / "elsewhere")
        else:
            path.unlink()
        if content is not None:
            path.write_text(content)
    with pytest.raises(InputError, match=message):
        Pipeline.from_diffusers(str(tmp_path))
