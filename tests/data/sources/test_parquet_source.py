import io
import os
import sys

import pytest

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import parquet
from lumina_jax.data.sources.parquet import ParquetSource
from lumina_jax.errors import InputError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def table(columns: dict, schema=None, **options) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), content, **options)
    return content.getvalue()


def test_pictures_are_bytes_or_what_hugging_face_writes(store, png, read_all):
    captions = ["A dog.", "A cat."]
    path = store.put(
        {
            "plain.parquet": table({"jpg": [png(1), png(2)], "caption": captions}),
            "hub.parquet": table(
                {
                    "image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": "2.png"}],
                    "caption": captions,
                }
            ),
            "path.parquet": table({"image_path": ["1.png", "2.png"], "caption": captions}),
            "1.png": png(1),
            "2.png": png(2),
        }
    )
    items = read_all(ParquetSource(path))
    names = ("hub", "path", "plain")
    assert [item.id for item in items] == [f"{n}.parquet:{row}" for n in names for row in (0, 1)]
    assert [item.image for item in items] == [png(1), png(2)] * 3
    assert [item.captions[0].text for item in items] == captions * 3


def test_captions_and_scores_are_columns(store, png, read_all):
    columns = {
        "image": [png()],
        "text": ["a dog"],
        "tags": [["dog", "lawn"]],
        "captions": [[{"text": "ein Hund", "kind": "short", "language": "de"}]],
        "score": [5],
        "ratio": [float("nan")],
        "safe": [True],
        "embedding": [[0.5, 0.5]],
    }
    path = store.put({"a.parquet": table(columns)})
    (item,) = read_all(ParquetSource(path))
    assert item.captions == (
        Caption("a dog", "long", "en"),
        Caption("dog, lawn", "tags", "en"),
        Caption("ein Hund", "short", "de"),
    )
    assert item.scores == {"score": 5.0}


def test_given_columns_are_the_only_ones(store, png, read_all):
    columns = {"image": [b"not this"], "cover": [png()], "text": ["not this"], "alt": ["a dog"]}
    path = store.put({"a.parquet": table(columns)})
    (item,) = read_all(ParquetSource(path, image="cover", captions=("alt:short:fr",)))
    assert item.image == png()
    assert item.captions == (Caption("a dog", "short", "fr"),)


def test_small_row_groups_make_a_part_together_and_rows_are_counted_through(
    store, png, read_all, monkeypatch
):
    monkeypatch.setattr(parquet, "ROWS_PER_PART", 30)
    columns = {"image": [png(i) for i in range(50)], "text": [str(i) for i in range(50)]}
    path = store.put({"a.parquet": table(columns, row_group_size=20)})
    source = ParquetSource(path)
    assert [(part.start, part.stop) for part in source.parts()] == [(0, 2), (2, 3)]
    items = read_all(source)
    assert [item.id for item in items] == [f"a.parquet:{i}" for i in range(50)]
    assert [item.captions[0].text for item in items] == columns["text"]
    assert [item.image for item in items] == columns["image"]


def test_a_row_that_cannot_be_taken_is_said(store, png, read_all):
    columns = {
        "image": [None, b"", png(), png()],
        "text": ["no picture", "no bytes", None, "good"],
    }
    path = store.put({"a.parquet": table(columns)})
    items = read_all(ParquetSource(path))
    reasons = [item.fault and item.fault.reason for item in items]
    assert reasons == ["no picture", "no picture", "no caption", None]
    path = store.put({"b.parquet": table({"url": ["nowhere.png", None], "text": ["a", "b"]})})
    items = read_all(ParquetSource(f"{path}/b.parquet", root=f"{path}/there"))
    assert [item.fault.reason for item in items] == ["not found", "no picture"]


def test_a_text_that_is_no_unicode_costs_its_own_row(store, png, read_all):
    texts = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())
    path = store.put({"a.parquet": table({"image": [png()] * 3, "text": texts})})
    items = read_all(ParquetSource(path))
    assert [item.fault and item.fault.reason for item in items] == [None, "bad caption", None]


def test_every_row_of_a_damaged_row_group_is_said(store, read_all):
    columns = {"image": [os.urandom(1000) for _ in range(40)], "text": ["x"] * 40}
    content = bytearray(table(columns, row_group_size=20))
    content[4:40] = b"x" * 36
    items = read_all(ParquetSource(store.put({"a.parquet": bytes(content)})))
    assert [item.id for item in items] == [f"a.parquet:{i}" for i in range(40)]
    reasons = [item.fault and item.fault.reason for item in items]
    assert reasons == ["damaged row group"] * 20 + [None] * 20


def test_a_store_that_fails_is_no_damage(store, png, monkeypatch):
    columns = {"image": [png()], "text": ["x"]}
    source = ParquetSource(store.put({"a.parquet": table(columns)}))
    (part,) = source.parts()
    open_file = parquet._open

    class Gone:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def read(self, size):
            raise OSError("the network is gone")

    def open_then_fail(stream, path):
        opened = open_file(stream, path)
        stream._file = Gone(stream._file)
        return opened

    monkeypatch.setattr(parquet, "_open", open_then_fail)
    with pytest.raises(OSError, match="the network is gone"):
        list(source.read(part))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [1]}, {}, "a.parquet has no column image; it has a. Name the columns: image="),
        ({"image": [b""]}, {}, "a.parquet has no column of captions; it has image"),
        (
            {"image": [b""], "text": [""]},
            {"captions": ("txt", "alt")},
            "no column txt, alt; it has image, text",
        ),
        ({"image": [b""], "text": [""]}, {"image": "img"}, "no column img; it has image, text"),
        ({"image": [[1]], "text": [""]}, {}, r"image is list<.*int64>; pictures are bytes, paths"),
        ({"image": [], "text": []}, {}, "holds no row"),
    ],
)
def test_columns_that_are_not_there_are_refused(store, columns, options, message):
    schema = pa.schema({"image": pa.binary(), "text": pa.string()}) if "row" in message else None
    path = store.put({"a.parquet": table(columns, schema=schema, row_group_size=1)})
    with pytest.raises(InputError, match=message):
        ParquetSource(path, **options).parts()


def test_a_column_of_captions_is_not_needed_where_pictures_are_to_be_captioned(
    store, png, read_all
):
    bare = table({"jpg": [png(1), png(2)]})
    path = store.put({"a.parquet": bare, "b.parquet": table({"jpg": [png(3)], "text": [""]})})
    items = read_all(ParquetSource(path, needs_captions=False))
    assert [(item.image, item.captions, item.fault) for item in items] == [
        (png(n), (), None) for n in (1, 2, 3)
    ]
    with pytest.raises(InputError, match="has no column alt; it has jpg"):
        ParquetSource(path, captions=("alt",), needs_captions=False).parts()


def test_half_a_file_is_refused(store, png):
    whole = table({"image": [png()], "text": ["x"]})
    for content in (b"", whole[:-20]):
        path = store.put({"a.parquet": content})
        with pytest.raises(InputError, match=r"a\.parquet is not a whole Parquet file: .*again"):
            ParquetSource(path).parts()


def test_a_missing_package_says_how_to_install_it(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # makes its import fail
    path = store.put({"a.parquet": b""})
    with pytest.raises(InputError, match=r"'pyarrow' .*pip install 'lumina-jax\[prepare\]'"):
        ParquetSource(path).parts()
