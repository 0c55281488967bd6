"""Pictures of any source with captions that lie elsewhere."""

import io
import json
import tarfile

import pytest

from lumina_jax.data import caption_table, prepare
from lumina_jax.data.caption_table import Merge
from lumina_jax.data.captions import Caption
from lumina_jax.data.prepare import make_targets
from lumina_jax.data.sources import make_source
from lumina_jax.data.sources.base import Source
from lumina_jax.data.sources.captioned import WithTable
from lumina_jax.data.sources.openmoji import OpenMojiSource
from lumina_jax.errors import InputError
from tests.small_data import ListSource, caption_row, make_caption_table, picture


def tar(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


BESIDE = Caption("beside it", "long", "en")
TOLD = Caption("told", "long", "en")


def write(store, png, kind: str) -> tuple[str, list[str]]:
    """Three pictures, of which the first has a caption; returns where, and their ids."""
    pictures = {f"{name}.png": png(n) for n, name in enumerate("abc")}
    rows = [{"path": name} for name in pictures]
    rows[0]["prompt"] = BESIDE.text
    if kind == "folder":
        return store.put({**pictures, "a.txt": BESIDE.text}), list(pictures)
    if kind == "json":
        lines = "\n".join(map(json.dumps, rows))
        return store.put({**pictures, "rows.jsonl": lines}) + "/rows.jsonl", list(pictures)
    members = {"a.txt": BESIDE.text.encode(), **pictures}
    return store.put({"0.tar": tar(members)}), [f"0.tar/{name}" for name in "abc"]


@pytest.mark.parametrize("kind", ["folder", "json", "webdataset"])
def test_captions_of_a_table_replace_those_beside_the_pictures_or_are_added(
    store, png, read_all, tmp_path, kind
):
    path, ids = write(store, png, kind)
    plain, bare = (make_source(kind, path, needs_captions=needs) for needs in (True, False))
    assert [item.fault and item.fault.reason for item in read_all(plain)] == [
        None, "no caption", "no caption",
    ]  # fmt: skip
    assert [(i.id, i.image, i.captions, i.fault) for i in read_all(bare)] == [
        (id, png(n), () if n else (BESIDE,), None) for n, id in enumerate(ids)
    ]

    table = make_caption_table(tmp_path / "captions", [caption_row(id, TOLD) for id in ids[:2]])
    replaced, added = (
        read_all(WithTable(bare, Merge((table,), mode))) for mode in ("replace", "add")
    )
    assert [item.captions for item in replaced] == [(TOLD,), (TOLD,), ()]
    assert [item.captions for item in added] == [(BESIDE, TOLD), (TOLD,), ()]
    for items, detail in ((replaced, "no table has it"), (added, "neither it nor a table has one")):
        assert [item.image for item in items] == [png(0), png(1), None]
        assert (items[2].fault.reason, items[2].fault.detail) == ("no caption", detail)


def test_what_the_source_rejects_stays_rejected_for_its_own_reason(store, png, read_all, tmp_path):
    path = store.put({"a.png": png(), "a.txt": b"\xff", "b.txt": "alone", "c.doc": "?"})
    bare = make_source("folder", path, needs_captions=False)
    table = make_caption_table(tmp_path / "t", [caption_row(id) for id in ("a.png", "b.txt")])
    items = read_all(WithTable(bare, Merge((table,))))
    assert {item.id: item.fault.reason for item in items} == {
        "a.png": "bad caption",
        "b.txt": "no picture",
        "c.doc": "not a picture",
    }


def test_drawings_take_captions_of_a_table(tmp_path):
    table = make_caption_table(tmp_path, [caption_row("1F436", TOLD)])
    source = WithTable(OpenMojiSource("🐶🐱"), Merge((table,)))
    assert isinstance(source, Source)
    (part,) = source.parts()
    assert {item.id: item.captions for item in source.read(part)} == {
        "1F431": (),
        "1F436": (TOLD,),
    }
    assert (source.name, source.license) == ("openmoji", "CC BY-SA 4.0")
    assert "OpenMoji" in source.attribution


def test_a_piece_is_read_once_for_a_source_in_the_order_of_the_table(tmp_path, monkeypatch):
    ids = [f"{n}" for n in range(300)]
    rows = [caption_row(id) for id in ids]
    table = make_caption_table(tmp_path, *(rows[i : i + 3] for i in range(0, 300, 3)))
    read, pieces = caption_table._read_lines, []

    def read_and_count(directory, piece):
        pieces.append(piece)
        return read(directory, piece)

    monkeypatch.setattr(caption_table, "_read_lines", read_and_count)
    source = ListSource(tuple(picture(id, (4, 4)) for id in ids))
    captioned = WithTable(source, Merge((table,)))
    items = [item for part in captioned.parts() for item in captioned.read(part)]
    assert [item.captions for item in items] == [(rows[n].captions[0].caption,) for n in range(300)]
    assert len(pieces) == len(set(pieces)) == 100


def test_a_dataset_made_with_other_captions_is_refused(tmp_path):
    source = ListSource((picture("a"), picture("b")))
    tables = [
        make_caption_table(tmp_path / text, [caption_row("a", Caption(text, "long", "en"))])
        for text in ("one", "two")
    ]
    targets = make_targets(tmp_path / "d", [32], 4)

    def make(source, **options):
        return prepare.prepare(source, tmp_path / "d", targets, **options)

    report = make(WithTable(source, Merge((tables[0],))))
    assert (report.written, report.rejected) == ((1,), ({"no caption": 1},))
    assert make(WithTable(source, Merge((tables[0],)))) == report
    for other, message in (
        (WithTable(source, Merge((tables[1],))), "caption_tables is"),
        (
            WithTable(source, Merge((tables[0],), "add")),
            "caption_mode is 'replace' there",
        ),
        (source, "caption_mode is 'replace' there and None here"),
    ):
        with pytest.raises(InputError, match=message):
            make(other)
    assert make(source, overwrite=True).written == (2,)
