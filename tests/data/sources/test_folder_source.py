import json
import pickle

import fsspec
import pytest

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import folder, make_source
from lumina_jax.data.sources.base import Source
from lumina_jax.data.sources.folder import FolderSource
from lumina_jax.errors import InputError


def faults(items) -> dict[str, str]:
    return {item.id: item.fault.reason for item in items if item.fault}


def test_pictures_have_the_captions_beside_them(store, png, read_all):
    path = store.put(
        {
            "a.png": png(1),
            "a.txt": "A dog.\n\n  A dog on a lawn. \n",
            "below/b.JPG": png(2),
            "below/b.json": json.dumps({"long": "A cat.", "tags": ["cat", "sofa"], "score": 5}),
            "below/b.caption": "Another cat.",
        }
    )
    a, b = read_all(FolderSource(path))
    assert (a.id, a.image, a.fault) == ("a.png", png(1), None)
    assert a.captions == (
        Caption("A dog.", "long", "en"),
        Caption("A dog on a lawn.", "long", "en"),
    )
    assert (b.id, b.image) == ("below/b.JPG", png(2))
    assert set(b.captions) == {
        Caption("A cat.", "long", "en"),
        Caption("cat, sofa", "tags", "en"),
        Caption("Another cat.", "long", "en"),
    }
    assert b.scores == {"score": 5.0}


def test_the_name_of_a_text_file_says_kind_and_language(store, png, read_all):
    files = {"x.txt": "1", "x.tags.txt": "2", "x.zh.txt": "3", "x.short.de.TXT": "4"}
    path = store.put({"x.png": png(), **files})
    (item,) = read_all(FolderSource(path, kind="medium", language="fr"))
    assert sorted(item.captions, key=lambda caption: caption.text) == [
        Caption("1", "medium", "fr"),
        Caption("2", "tags", "fr"),
        Caption("3", "medium", "zh"),
        Caption("4", "short", "de"),
    ]


def test_a_caption_goes_with_the_longest_name(store, png, read_all):
    path = store.put({"x.png": png(1), "x.zh.png": png(2), "x.txt": "one", "x.zh.txt": "two"})
    texts = {item.id: [c.text for c in item.captions] for item in read_all(FolderSource(path))}
    assert texts == {"x.png": ["one"], "x.zh.png": ["two"]}


def test_pictures_of_one_name_share_their_captions(store, png, read_all):
    path = store.put({"x.png": png(1), "x.webp": png(2), "x.txt": "both"})
    assert [(i.id, i.captions[0].text) for i in read_all(FolderSource(path))] == [
        ("x.png", "both"),
        ("x.webp", "both"),
    ]


def test_every_file_is_accounted_for_but_hidden_ones(store, png, read_all):
    path = store.put(
        {
            "good.png": png(),
            "good.txt": "fine",
            "alone.png": png(),
            "empty.png": png(),
            "empty.txt": " \n",
            "lost.txt": "a caption without its picture",
            "lost.json": "{}",
            "x.npz": "latents",
            "README": "hello",
            ".hidden/x.png": png(),
            "sub/._x.png": "of a Mac",
            "sub/Thumbs.db": "of Windows",
        }
    )
    items = read_all(FolderSource(path))
    assert faults(items) == {
        "README": "not a picture",
        "alone.png": "no caption",
        "empty.png": "no caption",
        "lost.json": "no picture",
        "lost.txt": "no picture",
        "x.npz": "not a picture",
    }
    assert [item.id for item in items if not item.fault] == ["good.png"]


def test_what_cannot_be_read_beside_a_picture_is_said(store, png, read_all):
    names = ("broken", "list", "latin", "number", "kind", "half", "deep")
    path = store.put(
        {f"{name}.png": png() for name in names}
        | {
            "broken.json": '{"caption": ',
            "list.json": '["a dog"]',
            "latin.txt": "caf\xe9".encode("latin-1"),
            "number.json": '{"captions": [5]}',
            "kind.json": '{"captions": [{"text": "x", "kind": "giant", "language": "English"}]}',
            "half.json": r'{"caption": "\ud83d"}',
            "deep.json": "[" * 100_000,
        }
    )
    items = read_all(FolderSource(path))
    assert faults(items) == {
        "broken.png": "broken JSON",
        "list.png": "broken JSON",
        "deep.png": "broken JSON",
        "latin.png": "bad caption",
        "number.png": "bad caption",
        "kind.png": "bad caption",
        "half.png": "bad caption",
    }
    details = {item.id: item.fault.detail for item in items}
    assert "needed an object, got ['a dog']" in details["list.png"]
    assert "not UTF-8" in details["latin.png"]
    assert "needed text, got 5" in details["number.png"]
    assert "kind 'giant' is none of long, medium" in details["kind.png"]
    assert "language 'English' is not two small letters" in details["kind.png"]


def test_a_mark_of_windows_is_no_part_of_the_caption(store, png, read_all):
    path = store.put({"x.png": png(), "x.txt": "\ufeffA dog.\r\nA cat.\r\n"})
    (item,) = read_all(FolderSource(path))
    assert [caption.text for caption in item.captions] == ["A dog.", "A cat."]


def test_parts_do_not_separate_pictures_from_their_captions(store, png, read_all, monkeypatch):
    names = [f"{i:03}" for i in range(25)]
    path = store.put({f"{n}.png": png() for n in names} | {f"{n}.zh.txt": n for n in names})
    whole = read_all(FolderSource(path))
    monkeypatch.setattr(folder, "GROUPS_PER_PART", 4)
    source = FolderSource(path)
    assert len(source.parts()) == 7
    assert read_all(source) == whole
    assert [(i.id, i.captions[0].text) for i in whole] == [(f"{n}.png", n) for n in names]


def test_a_file_that_went_away_is_a_fault(store, png):
    path = store.put({"x.png": png(), "x.txt": "1", "y.png": png(), "y.txt": "2"})
    source = FolderSource(path)
    (part,) = source.parts()
    for name in ("x.png", "y.txt"):
        fsspec.open(f"{path}/{name}").fs.rm(f"{path}/{name}")
    assert faults(source.read(part)) == {"x.png": "not found", "y.png": "not found"}


def test_a_broken_link_is_a_fault(tmp_path, png, read_all):
    (tmp_path / "x.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "x.txt").write_text("a dog")
    (tmp_path / "y.png").write_bytes(png())
    assert faults(read_all(FolderSource(str(tmp_path)))) == {
        "x.png": "not found",
        "y.png": "no caption",
    }


def test_a_name_that_is_no_unicode_can_still_be_written(tmp_path, png, read_all):
    (tmp_path / "caf\udce9.png").write_bytes(png())
    (tmp_path / "caf\udce9.txt").write_text("a dog")
    (item,) = read_all(FolderSource(str(tmp_path)))
    assert item.id.encode() == rb"caf\udce9.png"
    assert item.image == png()


def test_a_file_too_large_is_a_fault(store, png, read_all, monkeypatch):
    monkeypatch.setattr("lumina_jax.data.sources.reading.MAX_BYTES", len(png()) - 1)
    (item,) = read_all(FolderSource(store.put({"x.png": png(), "x.txt": "a dog"})))
    assert item.fault.reason == "too large"


def test_a_folder_without_pictures_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        FolderSource(str(tmp_path / "nowhere")).parts()
    with pytest.raises(InputError, match=r"holds no picture among 1 files.*jpg, jxl, png"):
        FolderSource(store.put({"a.txt": "x"})).parts()


def test_a_source_can_be_sent_to_a_worker_and_written_as_json(store, png):
    source = make_source("folder", store.put({"x.png": png()}), license="CC0", captions=("a:tags",))
    assert isinstance(source, Source)
    assert pickle.loads(pickle.dumps(source)) == source
    assert json.loads(json.dumps(source.settings())) == source.settings()
    assert source.settings()["captions"] == ["a:tags"]
    assert "license" not in source.settings()
    assert source.license == "CC0"
