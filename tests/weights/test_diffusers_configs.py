"""The configs of a pipeline of others: taken when they are sound, refused in words when not."""

import json

import pytest

from lumina_jax.errors import InputError
from lumina_jax.weights import diffusers

SOUND = {
    "model_index.json": {"_class_name": "Lumina2Pipeline"},
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0,
    },
    "transformer/config.json": {"sample_size": 128},
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
    "text_encoder/config.json": {},
    "tokenizer/tokenizer.json": {},
}  # fmt: skip


@pytest.fixture
def pipeline(tmp_path):
    for name, content in SOUND.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_a_sound_pipeline_says_how_it_samples(pipeline):
    folder = diffusers.open_folder(str(pipeline))
    found = diffusers.sampling_section(folder)
    assert found == {"time_shift": 6.0, "height": 1024, "width": 1024}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("transformer/config.json", {"sample_size": None}),
        ("transformer/config.json", {"sample_size": 10**30}),
        ("transformer/config.json", {"sample_size": "128"}),
        ("vae/config.json", {"block_out_channels": 4}),
        ("vae/config.json", {"block_out_channels": [1] * 1000}),
        ("scheduler/scheduler_config.json", {"shift": float("nan")}),
        ("scheduler/scheduler_config.json", {"shift": [6]}),
    ],
)
def test_a_config_of_odd_values_is_refused(pipeline, file, change):
    (pipeline / file).write_text(json.dumps(SOUND[file] | change))
    with pytest.raises(InputError, match=r"are damaged: .* Download all of the pipeline"):
        diffusers.sampling_section(diffusers.open_folder(str(pipeline)))


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\\xff"])
def test_a_config_that_is_no_json_object_is_refused(pipeline, file, text):
    (pipeline / file).write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        diffusers.sampling_section(diffusers.open_folder(str(pipeline)))
