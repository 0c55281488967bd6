"""Pictures in a folder: what is inside them, which are done, and by which weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.sampling import pictures
from lumina_jax.sampling.pipeline import _sums_of_bits
from tests.sampling.small_pipeline import make_pipeline

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
METADATA = {
    "index": 3,
    "prompt": "红苹果, um „Apfel“\nüber zwei Zeilen",
    "seed": 7,
    "sampling": {"num_steps": 5, "merge_steps": (0.0, 1.0)},
    "checkpoint": {"name": "tiny", "step": 20, "weights": "ema"},
    "fingerprint": "0123456789abcdef",
    "version": "1",
}


def write(folder, **changes):
    metadata = {**METADATA, **changes}
    path = folder / pictures.file_name(metadata["index"], metadata["prompt"])
    pictures.write_picture(path, Image.fromarray(PIXELS), metadata)
    return path


def test_file_names_sort_and_tell_the_prompt():
    assert pictures.file_name(3, "a dog/cat: #1") == "0003_a_dog_cat_1.png"
    assert pictures.file_name(12, "红苹果") == "0012_红苹果.png"
    assert len(pictures.file_name(0, "x" * 300)) < 60
    assert pictures.panel_name("0003_dog.png", "upper_left") == "0003_dog.upper_left.png"


def test_a_picture_keeps_its_pixels_and_metadata(tmp_path):
    path = write(tmp_path)
    np.testing.assert_array_equal(pictures.read_pixels(path), PIXELS)
    found = pictures.read_metadata(path)
    assert found["prompt"] == METADATA["prompt"]
    assert found["sampling"] == {"num_steps": 5, "merge_steps": [0.0, 1.0]}


def test_other_programs_can_read_the_prompt(tmp_path):
    with Image.open(write(tmp_path)) as image:
        assert image.info["Description"] == METADATA["prompt"]
        assert image.info["Software"].startswith("lumina_jax ")


def test_pictures_of_other_programs_have_no_metadata(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.png", "b.png"):
        with pytest.raises(InputError, match="holds no settings of lumina_jax"):
            pictures.read_metadata(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        pictures.read_metadata(tmp_path / "c.png")


def test_what_decides_no_pixel_makes_no_difference(tmp_path):
    write(tmp_path, version="2", batch=[8, 1], checkpoint={"name": "moved", "step": 20})
    assert pictures.survey(tmp_path, {3: METADATA}) == pictures.Found({3}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed: 8 there, 7 now"),
        ({"sampling": {"num_steps": 6, "merge_steps": (0, 1)}}, "num_steps: 6 there, 5 now"),
        ({"image": "ab"}, "image: 'ab' there, None now"),
        (
            {"fingerprint": "f" * 16, "checkpoint": {"name": "tiny", "step": 10}},
            "weights: tiny 10 (ffffffff) there, tiny 20 ema (01234567) now",
        ),
    ],
)
def test_a_picture_that_is_not_the_one_wanted_is_told_by_what_differs(tmp_path, change, message):
    path = write(tmp_path, **change)
    assert pictures.survey(tmp_path, {3: METADATA}) == pictures.Found(set(), {path: message})


def test_settings_that_a_picture_does_not_know_had_their_defaults(tmp_path):
    path = write(tmp_path)
    known = {**METADATA["sampling"], "merge_ratio": 0.0, "cache_coefficients": (3.0, 2.0)}
    assert pictures.survey(tmp_path, {3: {**METADATA, "sampling": known}}).finished == {3}
    known["merge_ratio"] = 0.5
    assert pictures.survey(tmp_path, {3: {**METADATA, "sampling": known}}).differing == {
        path: "merge_ratio: 0.0 there, 0.5 now"
    }


def test_another_prompt_at_the_same_index_is_another_picture(tmp_path):
    path = write(tmp_path, prompt="pear")
    found = pictures.survey(tmp_path, {3: METADATA})
    assert not found.finished
    assert "prompt: 'pear' there" in found.differing[path]


def test_pictures_of_other_indices_and_other_files_are_left_alone(tmp_path):
    write(tmp_path, index=4)
    Image.fromarray(PIXELS).save(tmp_path / "contact_sheet.png")
    assert pictures.survey(tmp_path, {3: METADATA}) == pictures.Found(set(), {})
    assert pictures.survey(tmp_path / "none", {3: METADATA}) == pictures.Found(set(), {})


def test_a_panel_alone_does_not_finish_its_picture(tmp_path):
    path = write(tmp_path)
    path.rename(tmp_path / pictures.panel_name(path.name, "upper_left"))
    assert pictures.survey(tmp_path, {3: METADATA}) == pictures.Found(set(), {})


def test_one_process_at_a_time_draws_into_a_folder(tmp_path):
    with (
        pictures.sole_writer(tmp_path / "out"),
        pytest.raises(InputError, match="Another process is drawing into"),
        pictures.sole_writer(tmp_path / "out"),
    ):
        pass
    with pictures.sole_writer(tmp_path / "out"):
        pass


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    path = write(tmp_path)
    (tmp_path / f".{path.name}.{'0' * 32}").write_bytes(b"half")
    (tmp_path / ".mine").touch()
    with pictures.sole_writer(tmp_path):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {path.name, ".mine", ".lock"}


def test_the_fingerprint_is_of_the_numbers_not_of_where_they_lie():
    pipeline = make_pipeline()
    found = pipeline.fingerprint()
    assert make_pipeline(replica=2, data=2, model=2).fingerprint() == found
    kernel = pipeline.params["x_embedder"]["kernel"]
    pipeline.params["x_embedder"]["kernel"] = kernel.at[3, 5].add(1e-6)
    assert pipeline.fingerprint() != found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_changed_bit_and_any_exchange_of_two_numbers_change_the_sums(dtype):
    sums = jax.jit(_sums_of_bits)
    numbers = jax.random.normal(jax.random.key(0), (3, 4)).astype(dtype)
    found = {tuple(sums(numbers).tolist())}
    bits = np.asarray(jax.lax.bitcast_convert_type(numbers, f"uint{8 * numbers.itemsize}"))
    for place in np.ndindex(3, 4):
        for bit in (0, 8 * numbers.itemsize - 1):
            changed = bits.copy()
            changed[place] ^= 1 << bit
            found.add(tuple(sums(jax.lax.bitcast_convert_type(changed, numbers.dtype)).tolist()))
    for first in range(12):
        for second in range(first):
            order = np.arange(12)
            order[[first, second]] = second, first
            exchanged = jnp.asarray(numbers).ravel()[order].reshape(3, 4)
            found.add(tuple(sums(exchanged).tolist()))
    assert len(found) == 1 + 2 * 12 + 66
