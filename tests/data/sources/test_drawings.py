"""What is said of a drawing is what is in it."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lumina_jax.data.sources import drawings, openmoji
from lumina_jax.data.sources.openmoji import OpenMojiSource

ROOT = pathlib.Path(__file__).parents[3]
EMOJIS = "🐶🍎🏠🇫🇷🎈🍾🌵🚲➖❤️"


def draw(width, height, *shapes):
    """An RGBA drawing: (kind of ImageDraw, its box, colour) one over another."""
    image = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(image)
    for kind, box, colour in shapes:
        getattr(pen, kind)(box, fill=drawings.COLOURS[colour][1])
    return image


def texts(image, language="en", name="thing"):
    captions = drawings.describe(image, {"en": name, "zh": "东西"})
    return {caption.kind: caption.text for caption in captions if caption.language == language}


DISC_AND_BAR = draw(
    128, 128, ("ellipse", (0, 0, 50, 50), "red"), ("rectangle", (0, 100, 127, 127), "blue")
)


def test_oklab_is_that_of_its_author():
    pixels = np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], np.uint8)
    expected = [[1, 0, 0], [0.6280, 0.2249, 0.1258], [0.4520, -0.0325, -0.3115]]
    np.testing.assert_allclose(drawings.oklab(pixels), expected, atol=2e-4)


def test_every_colour_is_called_by_its_own_name_and_so_is_one_near_it():
    for name, (_, code) in drawings.COLOURS.items():
        colour = np.frombuffer(bytes.fromhex(code[1:]), np.uint8).astype(int)
        for change in (-4, 0, 4):
            near = tuple(np.clip(colour + change, 0, 255).tolist())
            facts = drawings.measure(Image.new("RGBA", (64, 64), (*near, 255)))
            assert list(facts.colours) == [name]
            assert facts.colours[name] > 0.98


def test_a_disc_and_a_bar_are_measured():
    facts = drawings.measure(DISC_AND_BAR)
    disc, bar = np.pi * 25.5**2, 28 * 128
    assert list(facts.colours) == ["blue", "red"]
    assert facts.colours["red"] == pytest.approx(disc / (disc + bar), rel=0.03)
    assert facts.filled == pytest.approx((disc + bar) / 128**2, rel=0.03)
    assert [(p.place, p.form) for p in facts.patches["red"]] == [("top left", "round")]
    assert [(p.place, p.form) for p in facts.patches["blue"]] == [("across bottom", "rectangle")]
    assert facts.bands[0] == ("red", "red", "blue")
    assert facts.num_pieces == 2
    assert facts.outlined == 0


def test_the_sentences_say_what_was_measured():
    text = texts(DISC_AND_BAR)
    assert "“thing”" in text["long"]
    assert re.search(r"blue (is|forms) a rectangle across the bottom", text["long"])
    assert re.search(r"red (is|forms) a round patch in the upper left", text["long"])
    assert "red, red and blue" in text["long"]
    assert re.search(r"no black outline|No black line", text["long"])
    assert "two pieces" in text["long"]
    assert text["medium"] == (
        "The emoji “thing”: mostly blue, with some red, no outlines, about as wide as tall."
    )
    assert text["tags"] == (
        "thing, blue, red, no outlines, square, emoji, flat drawing, white background"
    )
    chinese = texts(DISC_AND_BAR, "zh")
    assert "以蓝色为主，还有一些红色" in chinese["long"]
    assert chinese["tags"].startswith("东西，蓝色，红色，无轮廓线，方形构图")


def test_black_that_is_thin_is_an_outline_and_thick_black_is_a_colour():
    outlined = draw(
        128, 128, ("ellipse", (0, 0, 127, 127), "black"), ("ellipse", (6, 6, 121, 121), "yellow")
    )
    facts = drawings.measure(outlined)
    assert list(facts.colours) == ["yellow"]
    assert facts.outlined > 0.95
    assert [(p.place, p.form) for p in facts.patches["yellow"]] == [("all over", "round")]
    solid = drawings.measure(draw(128, 128, ("rectangle", (0, 0, 127, 127), "black")))
    assert list(solid.colours) == ["black"]
    assert solid.outlined < 0.05


def test_a_drawing_of_lines_has_no_colour_and_says_so():
    lines = draw(128, 128, *(("rectangle", (0, y, 127, y + 4), "black") for y in (0, 60, 123)))
    assert drawings.measure(lines).colours == {}
    assert re.search(r"black lines (alone|and no filled colour)", texts(lines)["long"])
    assert texts(lines)["medium"].startswith("The emoji “thing”: black lines, ")


def test_a_mirror_image_is_told_from_one_that_is_none():
    left = ("rectangle", (0, 0, 63, 63), "green")
    assert (
        drawings.measure(draw(128, 64, left, ("rectangle", (64, 0, 127, 63), "green"))).mirrored
        == 1
    )
    assert (
        drawings.measure(draw(128, 64, left, ("rectangle", (64, 0, 127, 63), "pink"))).mirrored
        < 0.1
    )


def test_an_edge_between_two_colours_is_no_third_one():
    """Between yellow and dark blue lie greens and greys, which the drawing does not have."""
    large = draw(
        1024, 1024, ("rectangle", (0, 0, 1023, 1023), "dark blue"),
        ("ellipse", (100, 100, 900, 900), "yellow"),
    )  # fmt: skip
    smooth = large.resize((128, 128), Image.Resampling.BICUBIC)
    assert set(drawings.measure(smooth).colours) == {"yellow", "dark blue"}
    labels, _ = drawings._labels(smooth)
    others = ~np.isin(labels, [drawings.NAMES.index(name) for name in ("yellow", "dark blue")])
    assert others.mean() < 0.004  # several times as many without looking at neighbours


def test_both_languages_say_the_same_things():
    def shape(words):
        return {
            key: set(value) if isinstance(value, dict) else isinstance(value, tuple)
            for key, value in words.items()
        }

    english, chinese = drawings._WORDS.values()
    assert shape(english) == shape(chinese)
    for key, sentences in english.items():
        if isinstance(sentences, tuple):
            fields = [
                {frozenset(re.findall(r"{\w*}", text)) for text in words[key]}
                for words in (english, chinese)
            ]
            assert fields[0] == fields[1], key


def test_captions_of_real_drawings_are_long_enough_and_all_differ():
    source = OpenMojiSource(EMOJIS, 32, describe=True)
    items = [item for part in source.parts() for item in source.read(part)]
    found = {}
    for item in items:
        names = {c.language: c.text for c in item.captions if c.kind == "short"}
        for caption in item.captions:
            found.setdefault((caption.kind, caption.language), []).append(caption.text)
            if caption.language in ("en", "zh"):
                assert names[caption.language] in caption.text
    for language in ("en", "zh"):
        for kind in ("long", "medium", "tags"):
            assert len(set(found[kind, language])) == len(items) == 10
    assert all(40 <= len(text.split()) <= 105 for text in found["long", "en"])
    assert all(8 <= len(text.split()) <= 30 for text in found["medium", "en"])


def test_of_the_french_flag_the_order_of_its_colours_is_said():
    (item,) = (openmoji.draw(e, 32, describe=True) for e in openmoji.select("🇫🇷"))
    (text,) = (c.text for c in item.captions if (c.kind, c.language) == ("long", "en"))
    assert "From left to right the main colours are dark blue, white and red." in text


def test_descriptions_are_added_only_when_asked_for_and_are_the_same_each_time():
    (dog,) = openmoji.select("🐶")
    plain, first, second = (openmoji.draw(dog, 32, describe=d) for d in (False, True, True))
    assert plain.captions == dog.captions
    assert first.captions == second.captions
    assert first.captions[: len(dog.captions)] == dog.captions
    assert len(first.captions) == len(dog.captions) + 6
    assert plain.image.tobytes() == first.image.tobytes()


def test_a_described_source_is_another_one_and_a_plain_one_is_what_it_was():
    assert OpenMojiSource("🐶").settings() == {"emojis": "🐶"}
    assert OpenMojiSource("🐶", describe=True).settings() == {"emojis": "🐶", "describe": True}
    assert OpenMojiSource(describe=True).settings() == {"emojis": "all", "describe": True}


def test_only_drawings_are_described(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/prepare_data.py", "folder", f"--input={tmp_path}/in",
         f"--output={tmp_path}/out", "--describe"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--describe is of the source openmoji, not of folder." in done.stderr
