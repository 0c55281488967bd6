import importlib.util
import pathlib

import pytest

from lumina_jax.errors import InputError
from lumina_jax.system_prompts import SYSTEM_PROMPTS, dual_panel, prefixed


def test_the_caption_follows_the_prompt_and_one_blank():
    assert prefixed("a dog", "base") == (
        "You are an assistant designed to generate high-quality images based on user prompts. "
        "<Prompt Start> a dog"
    )
    assert prefixed("a dog", "empty") == "a dog"
    for name, text in SYSTEM_PROMPTS.items():
        assert name == "empty" or text.endswith(". <Prompt Start> ")
        assert "  " not in text


def test_the_default_prompt_of_diffusers_is_the_one_called_real():
    spec = importlib.util.find_spec("diffusers")  # read, not imported: that takes seconds
    if spec is None:
        pytest.skip("diffusers is not installed")
    path = pathlib.Path(spec.origin).parent / "pipelines/lumina2/pipeline_lumina2.py"
    source = path.read_text()
    assert f'"{SYSTEM_PROMPTS["real"].removesuffix(" <Prompt Start> ")}"' in source
    assert 'system_prompt + " <Prompt Start> " + p' in source


def test_the_two_panels_lie_opposite_each_other():
    assert dual_panel() == (
        "Generate a dual-panel image where the <lower half> displays a <depth map>, while the "
        "<upper half> retains the original image for direct visual comparison. <Prompt Start> "
    )
    assert "<right half> displays a <pose map>, while the <left half> retains" in dual_panel(
        "pose map", "right half"
    )
    with pytest.raises(InputError, match="half='middle' is not one of lower half, upper half"):
        dual_panel(half="middle")


def test_an_unknown_prompt_lists_those_there_are():
    with pytest.raises(InputError, match="called 'reel'; choose one of: base, real, align, aesth"):
        prefixed("a dog", "reel")
