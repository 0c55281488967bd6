"""Captions are found by the id of their picture, in whatever piece they are."""

import gzip
import json
import pickle

import numpy as np
import pytest

from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import Excluded, Merge, Piece, Row, Table, Written
from lumina_jax.data.captions import Caption
from lumina_jax.errors import InputError
from lumina_jax.unicap.report import Counts
from tests.small_data import caption_row, make_caption_table

LONG, TAGS = Caption("A dog.", "long", "en"), Caption("狗，草地", "tags", "zh")
FULL = Row(
    "dogs/1.jpg",
    (Written(*LONG, "qwen", "2", 1), Written(*TAGS, "qwen", "2", 0)),
    (Excluded("short", "en", "loop", "dog dog dog", "dog dog dog dog"),),
    None,
    (("short", "en", "loop"),),
    (1210, 640),
)
FAULTY = Row("dogs/2.jpg", fault=("truncated", "at byte 7"))


@pytest.fixture
def counted(monkeypatch):
    """The pieces that are read from now on."""
    found, read = [], caption_table._read_lines

    def read_and_count(directory, piece):
        found.append(piece)
        return read(directory, piece)

    monkeypatch.setattr(caption_table, "_read_lines", read_and_count)
    return found


def spread(num_pieces: int, num_rows: int) -> list[list[Row]]:
    """Pieces of so many rows each, of pictures 0, 1, 2, ..."""
    return [
        [caption_row(f"{piece * num_rows + row}") for row in range(num_rows)]
        for piece in range(num_pieces)
    ]


def test_rows_are_read_as_they_were_written(tmp_path):
    piece = Piece(12, 3)
    caption_table.write_rows(tmp_path, piece, [FULL, FAULTY])
    (path,) = tmp_path.iterdir()
    assert path.name == "captions-000012-0003.jsonl.gz"
    assert caption_table.read_rows(tmp_path, piece) == [FULL, FAULTY]
    before = path.read_bytes()
    caption_table.write_rows(tmp_path, piece, iter([FULL, FAULTY]))
    assert path.read_bytes() == before


def test_pieces_are_in_the_order_of_the_source_and_other_files_are_none(tmp_path):
    pieces = [Piece(0, 0), Piece(0, 10), Piece(2, 0), Piece(1_000_000, 10_000)]
    for piece in pieces[::-1]:
        caption_table.write_rows(tmp_path, piece, [])
    for name in ("captions-1-x.jsonl.gz", "captions-000001-0000.jsonl", "part-000000.json"):
        (tmp_path / name).write_bytes(b"")
    assert caption_table.pieces(tmp_path) == pieces


def test_captions_are_found_by_the_id_of_their_picture(tmp_path):
    table = make_caption_table(tmp_path, [FULL, FAULTY], *spread(3, 5))
    found = table.find(["14", "dogs/1.jpg", "0", "dogs/2.jpg", "15", "14"])
    told = [(Caption(f"{n}, told at length", "long", "en"),) for n in (0, 14)]
    assert found == [told[1], (LONG, TAGS), told[0], (), (), told[1]]
    assert table.find([]) == []
    assert [row.id for row in table.rows()] == [FULL.id, FAULTY.id, *map(str, range(15))]
    assert table.settings == {"model": "a model"}
    assert table.summary["num_pictures"] == 17


def test_of_rows_with_the_same_id_the_first_with_a_caption_counts(tmp_path):
    captions = [Caption(f"{n}", "long", "en") for n in range(3)]
    rows = [caption_row("a", caption) for caption in captions]
    table = make_caption_table(tmp_path, [Row("a"), rows[1], rows[2]], [rows[0]])
    assert table.find(["a"]) == [(captions[1],)]


def test_ids_whose_digests_share_their_first_half_are_told_apart(tmp_path, monkeypatch):
    digests = caption_table._digests
    monkeypatch.setattr(
        caption_table, "_digests", lambda ids: digests(ids) * np.array([0, 1], np.uint64)
    )
    table = make_caption_table(tmp_path, *spread(2, 4))
    assert [len(found) for found in table.find(["7", "8", "0"])] == [1, 0, 1]


def test_a_piece_is_read_once_for_pictures_in_the_order_of_the_source(tmp_path, counted):
    table = make_caption_table(tmp_path, *spread(100, 4))
    counted.clear()
    for first in range(0, 400, 3):  # as the records of a bucket lie: here and there
        assert all(table.find([f"{n}" for n in range(first, min(first + 3, 400))]))
    assert len(counted) == len(set(counted)) == 100


def test_a_table_sent_to_a_worker_is_small_and_finds_the_same(tmp_path):
    table = make_caption_table(tmp_path, *spread(50, 4))
    content = pickle.dumps(table)
    assert len(content) < 1000
    assert pickle.loads(content).find(["77"]) == table.find(["77"])


def test_a_table_without_rows_finds_nothing(tmp_path):
    table = make_caption_table(tmp_path)
    assert table.find(["a"]) == [()]
    assert list(table.rows()) == []


def test_the_fingerprint_follows_the_captions_alone(tmp_path):
    def fingerprint(name, *rows):
        return make_caption_table(tmp_path / name, rows).fingerprint

    first = fingerprint("first", FULL, FAULTY)
    assert fingerprint("same", FULL, FAULTY) == first
    assert fingerprint("asked again", FULL._replace(rejected=(), tokens=(1, 1)), FAULTY) == first
    assert fingerprint("no fault", FULL) == first
    for name, row in (
        ("id", FULL._replace(id="dogs/3.jpg")),
        ("text", FULL._replace(captions=(FULL.captions[0]._replace(text="A cat."),))),
        ("fewer", FULL._replace(captions=FULL.captions[:1])),
    ):
        assert fingerprint(name, row, FAULTY) != first


def test_finishing_again_writes_the_same(tmp_path):
    make_caption_table(tmp_path, *spread(3, 5))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    caption_table.finish(tmp_path, Counts())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_table_made_again_in_the_same_place_is_read_anew(tmp_path):
    old = make_caption_table(tmp_path, [caption_row("a", LONG)])
    assert old.find(["a"]) == [(LONG,)]
    new = make_caption_table(tmp_path, [caption_row("b", TAGS), caption_row("a", TAGS)])
    assert new.find(["a", "b"]) == [(TAGS,), (TAGS,)]


def test_what_is_no_complete_table_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="is no table of captions: make one with tools/caption"):
        Table.load(tmp_path)
    with pytest.raises(InputError, match="is no table of captions"):
        Table.load(tmp_path / "nowhere")
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(InputError, match=r"not finished: give the tools/caption.py command again"):
        Table.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "table.json is damaged .* Make the table again"),
        ('{"format": 1}', r"table.json is damaged \(KeyError"),
        ('{"format": 1, "fingerprint": 7, "summary": {}}', "table.json is damaged"),
        ('{"format": 2}', "table.json has format 2; this version reads 1. Make the table again"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, message):
    make_caption_table(tmp_path, [FULL])
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Table.load(tmp_path)


def line(**changes) -> bytes:
    """The full row as it is on the disk, with some of its keys replaced."""
    content = {
        "id": "a", "captions": [], "excluded": [], "rejected": [], "tokens": [0, 0], "fault": None,
    }  # fmt: skip
    return json.dumps(content | changes).encode()


def packed(content):
    return gzip.compress(content, mtime=0)  # the name of a test is made of it, and stays the same


@pytest.mark.parametrize(
    "content",
    [
        b"not compressed",
        packed(line())[:-9],
        packed(line()[:-9]),
        packed(b"{}"),
        packed(b"[]"),
        packed(line(id=7)),
        packed(line(captions=[{"text": "A dog."}])),
        packed(line(captions=[FULL.captions[0]._replace(kind="poem")._asdict()])),
        packed(line(captions=[FULL.captions[0]._replace(language=None)._asdict()])),
        packed(line(tokens=["many", 1])),
    ],
)
def test_a_damaged_piece_is_named(tmp_path, content):
    (tmp_path / Piece(3, 1).name).write_bytes(content)
    with pytest.raises(InputError, match=r"captions-000003-0001.jsonl.gz is damaged .* Delete it"):
        caption_table.read_rows(tmp_path, Piece(3, 1))


def test_a_piece_that_is_not_the_one_of_the_index_is_named(tmp_path):
    table = make_caption_table(tmp_path, *spread(2, 3))
    caption_table.write_rows(tmp_path, Piece(0, 1), [caption_row("5"), caption_row("4")])
    with pytest.raises(InputError, match=r"captions-000000-0001.*'5' is where '3' was"):
        table.find(["3"])
    with pytest.raises(InputError, match=r"captions-000000-0001.jsonl.gz is damaged \(IndexError"):
        table.find(["5"])
    assert all(table.find(["0"]))


def test_a_damaged_index_is_refused(tmp_path):
    for name in ("ids.npy", "places.npy", "pieces.npy"):
        table = make_caption_table(tmp_path / name, [caption_row(name)])
        path = tmp_path / name / name
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(InputError, match=r"The index of .* is damaged .* Make the table again"):
            table.find([name])
    table = make_caption_table(tmp_path / "shape", [caption_row("shape")])
    np.save(tmp_path / "shape" / "ids.npy", np.zeros((5, 2), np.uint64))
    with pytest.raises(InputError, match=r"is damaged \(shapes \(5, 2\), \(1, 2\) and \(1, 2\)\)"):
        table.find(["shape"])


def test_tables_replace_the_captions_of_a_picture_or_are_added_to_them(tmp_path):
    short = Caption("dog", "short", "en")
    first = make_caption_table(tmp_path / "first", [caption_row("a", LONG), caption_row("b", TAGS)])
    second = make_caption_table(tmp_path / "second", [caption_row("a", TAGS, LONG)])
    own = [(short, LONG), (short,), (short,)]
    assert Merge((first, second)).captions("abc", own) == [(LONG, TAGS), (TAGS,), ()]
    assert Merge((second, first), "add").captions("abc", own) == [
        (short, LONG, TAGS),
        (short, TAGS),
        (short,),
    ]
    assert Merge((first, second), "add").settings() == {
        "caption_mode": "add",
        "caption_tables": [first.fingerprint, second.fingerprint],
    }


def test_a_merge_needs_tables_and_a_mode_that_exists(tmp_path):
    table = make_caption_table(tmp_path, [FULL])
    with pytest.raises(InputError, match=r"Caption tables \(\): need one or more, each once"):
        Merge(())
    with pytest.raises(InputError, match="need one or more, each once"):
        Merge((table, table))
    with pytest.raises(InputError, match="Caption mode 'mix'; needed: replace or add"):
        Merge((table,), "mix")


def test_a_table_in_a_bucket_is_the_table_on_a_disk(bucket, tmp_path, counted):
    here = make_caption_table(tmp_path, *spread(6, 4))
    there = make_caption_table(f"{bucket}/captions", *spread(6, 4))
    assert there.fingerprint == here.fingerprint
    counted.clear()
    ids = [f"{n}" for n in range(0, 25, 3)]
    assert there.find(ids) == here.find(ids)
    assert len(counted) == 2 * 6
    assert list(there.rows()) == list(here.rows())
