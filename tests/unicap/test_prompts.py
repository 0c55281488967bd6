"""Prompts are files that a person edits, and every mistake in them is told."""

import shutil

import pytest

from lumina_jax.errors import InputError
from lumina_jax.unicap import languages
from lumina_jax.unicap.prompts import BUILT_IN, load_prompts


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(BUILT_IN, tmp_path / "mine")


def test_each_language_is_asked_in_its_own_words_and_any_other_by_name():
    prompts = load_prompts()
    assert "in English" in prompts.look("long", "en")
    assert "请完整地描述" in prompts.look("long", "zh")
    assert "in Korean" in prompts.look("long", "ko")
    assert "{" not in "".join(prompts.look(kind, "ko") for kind in ("long", "medium", "short"))


def test_braces_of_a_caption_stay_as_they_are():
    asked = load_prompts().translate("medium", "zh", 'A sign that says "{from} {caption}"', "en")
    assert asked.endswith('A sign that says "{from} {caption}"')
    assert "从English逐句翻译" in asked


def test_the_version_changes_with_any_file(folder):
    before = load_prompts(folder).version
    assert before.startswith("mine-")
    assert load_prompts(folder).version == before
    path = folder / "zh.toml"
    path.write_text(path.read_text().replace("完整地", "仔细地"))
    assert load_prompts(folder).version != before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("[look]", "[lok]"), r"\[lok\] is unknown"),
        (("[look]", "[lok]"), r"\[look\] is missing"),
        (("tags = [3, 40]", "tags = [40, 3]"), r"length.tags is not \[least, most\]"),
        (("{caption}", "{captoin}"), "condense.medium does not say {caption}"),
        (("Answer with the description alone.", "{colour}"), "look.long has {colour}"),
        (("[look]", "[look"), "Expected"),
        (("sorry|", "(?i)sorry|"), "no regular expression"),
        (('"n/?a\\\\b",', '"(n/?a)?",'), "finds something in every answer"),
        (("{caption}", "{Caption}"), "condense.medium does not say {caption}"),
        (("(sorry", "((sorry"), "answers.refusals has .* no regular expression"),
        (("[condense]", "[condense]\nlong = 'x {caption}'"), "condense.long is unknown"),
    ],
)
def test_a_mistake_is_told_with_its_place(folder, change, told):
    path = folder / "en.toml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(InputError, match=told):
        load_prompts(folder)


def test_a_folder_needs_a_file_for_other_languages_and_no_unknown_ones(folder):
    (folder / "other.toml").rename(folder / "klingon.toml")
    with pytest.raises(InputError, match=r"no other.toml, klingon.toml is of no language"):
        load_prompts(folder)
    with pytest.raises(InputError, match="are not there"):
        load_prompts(folder / "nothing")


def test_languages_are_told_by_names_and_unknown_ones_refused():
    assert languages.name("pt") == "Portuguese"
    with pytest.raises(InputError, match="Languages tlh are not known; the languages are af, ar"):
        languages.check(["en", "tlh"])


def test_the_names_of_emojis_in_fourteen_languages_are_taken_for_no_other_language():
    """26,852 short texts; the first figures were 6 of them, with São Tomé and Liechtenstein."""
    from lumina_jax.data.sources.openmoji import LANGUAGES, select

    texts = [caption for emoji in select() for caption in emoji.captions]
    wrong = [c for c in texts if languages.other_language(c.text, c.language, LANGUAGES)]
    assert len(texts) > 20_000
    assert len(wrong) <= 6, wrong[:20]
