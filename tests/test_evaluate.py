"""Which prompts are chosen, and that samples stand beside their prompts."""

import numpy as np
import pytest

from lumina_jax import evaluate
from lumina_jax.data.captions import Caption
from lumina_jax.errors import InputError


def make_pictures(shapes=((4, 4), (4, 8), (8, 4))):
    return [
        {
            "id": str(index),
            "image": np.zeros((*shape, 3), np.uint8),
            "captions": [Caption(f"{index} {lang}", "short", lang) for lang in ("en", "de")],
        }
        for index, shape in enumerate(shapes)
    ]


def test_no_picture_comes_twice_before_all_came_once_and_languages_take_turns():
    chosen = evaluate.choose_prompts(make_pictures(), ["de", "en"], 6, seed=0)
    assert sorted(index for index, _ in chosen[:3]) == [0, 1, 2]
    assert [caption.language for _, caption in chosen] == ["de", "en"] * 3
    assert all(caption.text.startswith(str(index)) for index, caption in chosen)


def test_a_picture_without_the_language_is_named():
    with pytest.raises(InputError, match="has no caption in fr"):
        evaluate.choose_prompts(make_pictures(), ["fr"], 1, seed=0)


def test_each_sample_has_the_shape_of_its_picture_and_stands_at_its_prompt():
    pictures = make_pictures()
    chosen = evaluate.choose_prompts(pictures, ["en"], 5, seed=1)

    def pipeline(prompts, *, height, width, seed, output):
        """Writes its prompt's number and its seed into the picture."""
        values = [(int(prompt[0]), number, 0) for prompt, number in zip(prompts, seed, strict=True)]
        return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])

    samples = evaluate.draw(pipeline, pictures, chosen, batch_size=2, seed=40)
    for number, ((index, _), sample) in enumerate(zip(chosen, samples, strict=True)):
        assert sample.shape == pictures[index]["image"].shape
        assert sample[0, 0].tolist() == [index, 40 + number, 0]
