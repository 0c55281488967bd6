"""The parts of the command that need no model."""

import pytest
from PIL import Image

from lumina_jax import sample
from lumina_jax.errors import InputError


def test_prompts_of_flags_come_before_those_of_the_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("苹果\n\n  two words  \n")
    assert sample.read_prompts(["a"], str(path)) == ["a", "苹果", "two words"]


def test_no_prompt_and_no_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="No prompt was given"):
        sample.read_prompts([], None)
    with pytest.raises(InputError, match=r"prompts_file=.* does not exist"):
        sample.read_prompts([], str(tmp_path / "none.txt"))


def test_file_names_sort_and_tell_the_prompt():
    assert sample.file_name(3, "a dog/cat: #1") == "0003_a_dog_cat_1.png"
    assert sample.file_name(12, "红苹果") == "0012_红苹果.png"
    assert len(sample.file_name(0, "x" * 300)) < 60


def test_every_batch_has_the_same_size_and_every_prompt_its_seed():
    calls = []

    def pipeline(prompts, seed):
        calls.append((prompts, seed))
        return [Image.new("RGB", (1, 1), (seed + i, 0, 0)) for i in range(len(prompts))]

    images = sample.draw(pipeline, list("abcde"), batch_size=2, seed=10)
    assert calls == [(["a", "b"], 10), (["c", "d"], 12), (["e", "e"], 14)]
    assert [image.getpixel((0, 0))[0] for image in images] == [10, 11, 12, 13, 14]
