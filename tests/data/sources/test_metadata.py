import math

import pytest

from lumina_jax.data.captions import Caption
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources import make_source
from lumina_jax.data.sources.metadata import CaptionedSource, scores_of
from lumina_jax.errors import InputError


def captions_of(metadata, *keys: str) -> list[tuple[str, str, str]]:
    found = CaptionedSource("x", captions=keys).captions_of(metadata)
    return [(caption.text, caption.kind, caption.language) for caption in found]


def test_known_keys_hold_captions():
    for key in ("prompt", "caption", "text", "super_high_quality_caption", "captions", "long"):
        assert captions_of({key: " a dog\n"}) == [("a dog", "long", "en")]
    assert captions_of({"medium": "1", "short_zh": "2", "tags_de": ["3", " 4 ", ""]}) == [
        ("1", "medium", "en"),
        ("2", "short", "zh"),
        ("3, 4", "tags", "de"),
    ]


def test_a_list_holds_several_captions():
    assert captions_of({"prompt": ["one", "two", "", "one", None]}) == [
        ("one", "long", "en"),
        ("two", "long", "en"),
    ]
    given = [{"text": "eins", "kind": "short", "language": "de"}, {"text": "two", "id": 7}]
    assert captions_of({"captions": given}) == [("eins", "short", "de"), ("two", "long", "en")]


def test_other_keys_hold_none():
    for key in ("title", "long_", "long_zh_2", "giant_zh", "tags_ENG", "alt"):
        with pytest.raises(Rejected, match="no caption: keys given: "):
            captions_of({key: "a dog"})
    with pytest.raises(Rejected, match="no caption: keys given: none"):
        captions_of({})


def test_a_number_under_a_known_name_is_a_score():
    place = {"long": 13.4, "caption": "Berlin", "tags": 3, "short": True}
    assert captions_of(place) == [("Berlin", "long", "en")]
    assert scores_of(place) == {"long": 13.4, "tags": 3.0}


def test_given_keys_replace_the_known_ones():
    row = {"alt": "1", "prompt": "2", "wd14": ["3", "4"], "text": "5"}
    assert captions_of(row, "wd14:tags", "alt::zh", "text:short:de", "not_here") == [
        ("1", "long", "zh"),
        ("3, 4", "tags", "en"),
        ("5", "short", "de"),
    ]
    with pytest.raises(Rejected, match="bad caption: alt: needed text, got 5"):
        captions_of({"alt": 5}, "alt")


def test_captions_are_not_needed_where_pictures_are_to_be_captioned():
    source = CaptionedSource("x", needs_captions=False)
    assert source.captions_of({"alt": "1"}) == ()
    assert source.captions_of({"prompt": "2"}) == (Caption("2", "long", "en"),)
    with pytest.raises(Rejected, match="bad caption: prompt: needed text, got 5"):
        CaptionedSource("x", captions=("prompt",), needs_captions=False).captions_of({"prompt": 5})
    # The pictures that are taken are the same, so datasets that are there stay as they are.
    assert source.settings() == CaptionedSource("x").settings()
    assert "needs_captions" not in source.settings()


def test_scores_are_the_finite_numbers():
    row = {"a": 1, "b": 0.5, "c": "2", "d": None, "e": math.nan, "f": -math.inf, "g": True}
    assert scores_of(row | {"h": 10**400, "i": [1]}) == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="giant"), "kind 'giant' is none of long, medium, short, tags"),
        (dict(language="eng"), "language 'eng' is not two small letters"),
        (dict(captions=("a:giant",)), "'a:giant': kind 'giant' is none of"),
        (dict(captions=("a::English",)), "'a::English': language 'English' is not"),
        (dict(captions=("a", "a:tags")), "'a' is given twice"),
        (dict(captions=(":tags",)), "':tags' is not key, key:kind or key:kind:language"),
        (dict(captions=("a:tags:en:x",)), "'a:tags:en:x' is not key, key:kind or"),
        (dict(root="x"), "kind folder has no option root; it has captions, kind, language"),
    ],
)
def test_wrong_options_are_refused_at_the_door(options, message):
    with pytest.raises(InputError, match=message):
        make_source("folder", "x", **options)


def test_a_source_needs_a_kind_and_a_path():
    with pytest.raises(InputError, match="No source is called 'zip'; choose one of: folder, json"):
        make_source("zip", "x")
    with pytest.raises(InputError, match="The source has no path"):
        make_source("folder", "")
