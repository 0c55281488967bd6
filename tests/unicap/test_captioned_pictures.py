"""The pictures of a table: opened again from its settings, or a few of them first."""

import json

import pytest

from lumina_jax.data.sources.folder import FolderSource
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError
from lumina_jax.unicap.pictures import Pilot, describe_source, open_source


def test_the_source_is_the_one_that_the_settings_name(tmp_path):
    made = OpenMojiSource("🐶🍎", 48)
    emojis = describe_source(made)
    assert open_source(emojis).parts() == made.parts()
    folder = FolderSource("gone", captions=("text:long:en",), needs_captions=False)
    named = json.loads(json.dumps(describe_source(folder)))
    assert open_source(named) == folder
    assert open_source(named, str(tmp_path)).path == str(tmp_path)


def test_the_parts_of_a_pilot_are_those_of_the_pilot():
    source = OpenMojiSource("all", 48)
    opened = open_source(json.loads(json.dumps(describe_source(Pilot(source, 2)))))
    (part,) = opened.parts()
    parts = source.parts()
    wanted = [next(iter(source.read(parts[number]))).id for number in (0, len(parts) // 2)]
    assert [item.id for item in opened.read(part)] == wanted


def test_settings_that_name_no_source_are_refused():
    emojis = describe_source(OpenMojiSource("🐶", 48))
    for wrong in (
        {}, {"kind": "folder"}, {"kind": "folder", "path": "x", "options": 3},
        {"kind": [], "path": "x", "options": {}}, {**emojis, "options": {}},
        {**emojis, "options": {"emojis": "🐶", "pilot": -1}},
    ):  # fmt: skip
        with pytest.raises(InputError, match="do not say what it was made of"):
            open_source(wrong)
