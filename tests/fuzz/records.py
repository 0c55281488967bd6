"""The record reader: what a data set holds, from the bytes of a picture to the manifest."""

import contextlib
import gzip
import io
import json
import pathlib
import sys
import tarfile

import numpy as np
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from lumina_jax.data import caption_table, images, records, statistics
from lumina_jax.data.captions import KINDS, Caption
from lumina_jax.data.loader import Dataset, Loader
from lumina_jax.data.records import Manifest, Record, Records
from lumina_jax.data.sources import make_source
from lumina_jax.frozen.use import UniversalSentenceEncoder
from lumina_jax.unicap.report import Counts
from tests.fuzz import mutations
from tests.small_data import make_dataset, picture

sys.path.append(str(pathlib.Path(__file__).parents[1] / "data"))
import broken

NAME = "pictures-train_32x32.array_record-00000-of-00001"
_CACHES = {"latents": bytes(8 * 8 * 4 * 2), "cap_feats": [bytes(2 * 3 * 2)]}
_FEATURES = (
    "id", "source", "image", "width", "height", "captions/text", "captions/kind",
    "captions/language", "latents", "cap_feats", "other",
)  # fmt: skip
_CARD = broken.card((90, 90, 0)).resize((32, 32))
_PICTURES = [
    broken.save(_CARD, "PNG"),
    broken.save(_CARD, "JPEG"),
    broken.save(_CARD, "WEBP", lossless=True),
    broken.save(_CARD.convert("P"), "PNG"),
    broken.save(_CARD, "JPEG", progressive=True),
]


def _sound(image: bytes = _PICTURES[0]) -> bytes:
    captions = [Caption("a card", "short", "en")]
    content = records.serialize(id="x", source="list", image=image, captions=captions, size=(9, 9))
    return Record(content).with_caches(**_CACHES)


def _with_features(edits) -> bytes:
    """A record whose features are of other kinds, or have other values."""
    example = tf_example_pb2.Example.FromString(_sound())
    for name, content in edits:
        feature = example.features.feature[name]
        feature.Clear()
        for value in content:
            if isinstance(value, bytes):
                feature.bytes_list.value.append(value)
            elif isinstance(value, int):
                feature.int64_list.value.append(value)
            else:
                feature.float_list.value.append(value)
    return example.SerializeToString()


_CONTENT = st.one_of(
    st.lists(st.binary(max_size=300), max_size=3),
    st.lists(
        st.sampled_from((b"short", b"long", b"en", b"tags", b"a, b", b"", b"\xff")), max_size=3
    ),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.lists(st.floats(width=32), max_size=2),
    st.lists(mutations.files(_PICTURES), max_size=2),
)
EXAMPLES = st.one_of(
    st.builds(
        _with_features,
        st.lists(st.tuples(st.sampled_from(_FEATURES), _CONTENT), min_size=1, max_size=4),
    ),
    st.builds(_sound, mutations.files(_PICTURES)),
    mutations.files([_sound(image) for image in _PICTURES]),
)


def _cached(directory: pathlib.Path) -> Manifest:
    """Makes the manifest say that the records have features."""
    manifest = Manifest.load(directory)
    empty = np.zeros((2, 3), np.float16).view(records.bfloat16)
    cap_feats = records.CapFeatsCache.with_empty(
        empty, fingerprint="", system_prompt="base", max_tokens=4, feature_dim=3, num_truncated=0
    )
    cache = {"latents": records.LatentsCache("", 4, 4), "cap_feats": cap_feats}
    made = records.dataclasses.replace(manifest, cache=cache)
    made.save(directory)
    return made


def _loader(directory: pathlib.Path, *features: str) -> Loader:
    encoder = UniversalSentenceEncoder(max_tokens=4)
    return Loader(
        [Dataset(str(directory))], batch_size=2, seed=0, tokenize=encoder.tokenize,
        features=features, num_threads=1, prefetch=1, process_index=0, process_count=1,
    )  # fmt: skip


def example(folder: pathlib.Path):
    """A record: two rows of a batch, of which one is sound, with features and without."""
    make_dataset(folder, [picture("a"), picture("b")])
    _cached(folder)
    loaders = [_loader(folder), _loader(folder, "latents", "cap_feats")]
    sound = _sound()

    def check(content: bytes) -> None:
        def read(self, places):
            return [content if place else sound for place in places]

        Records.read = read
        for loader in loaders:
            batch = loader.batch_at(0)
            assert all(isinstance(name, str) for name in batch["ids"])
        record = Record(content)
        for name in ("source", "image", "size", "latents", "cap_feats"):
            getattr(record, name)

    return EXAMPLES, check, sound


def shard(folder: pathlib.Path):
    """A file of records, with its manifest."""
    make_dataset(folder, [picture(letter) for letter in "abc"])
    split = Manifest.load(folder).splits[0]
    path = folder / NAME
    whole = path.read_bytes()
    # Nearly all of the file is room that is not used; damage where something is.
    used = [i for i in range(0, len(whole), 16) if any(whole[i : i + 16])]

    def damaged(parts, cut):
        content = bytearray(whole)
        for at, data in parts:
            start = used[at % len(used)] + at % 16
            content[start : start + len(data)] = data
        return bytes(content[:cut]) if cut < 2**17 else bytes(content)

    contents = st.builds(
        damaged,
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), max_size=4),
        st.one_of(st.just(2**17), st.just(2**17), st.integers(0, 2**17)),
    )

    def check(content: bytes) -> None:
        path.write_bytes(content)
        loader = _loader(folder)
        loader.batch_at(0)
        list(statistics.read_some(folder, split, range(split.num_records)))

    return contents, check, whole


def manifest(folder: pathlib.Path):
    """manifest.json, up to a batch of what it describes."""
    make_dataset(folder, [picture("a"), picture("b")])
    path = folder / records.MANIFEST
    seeds = [json.loads(path.read_text())]
    _cached(folder)
    seeds.append(json.loads(path.read_text()))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = Manifest.load(folder)
        assert found.kinds is not None
        assert found.num_records >= 0
        assert found.source is not None
        assert found.resolution * found.pixels_per_token > 0
        for split in found.splits:
            for shard in split.shards:
                assert (folder / shard.name).parent == folder
        _loader(folder).batch_at(0)

    return mutations.json_files(seeds), check, json.dumps(seeds[1]).encode()


def raw_picture(folder: pathlib.Path):
    """A file that a crawl may hold, through the decoder of `tools/prepare_data.py`."""
    seeds = [content for _, content, _ in (*broken.accepted(), *broken.rejected())]
    seeds = [content for content in seeds if len(content) < 20_000]

    def check(content: bytes) -> None:
        image = images.decode(content, max_pixels=2**22)
        assert image.mode == "RGB"

    return mutations.files(seeds), check, _PICTURES[0]


def archive(folder: pathlib.Path):
    """A tar file of WebDataset."""
    path = folder / "a.tar"
    seeds = []
    for mode, kind in (("w", None), ("w:gz", None), ("w", "pax"), ("w", "gnu")):
        _write_tar(path, mode, kind)
        seeds.append(path.read_bytes())
    return mutations.files(seeds), _read_source(path, "webdataset"), seeds[0]


def _write_tar(path: pathlib.Path, mode: str, kind: str | None) -> None:
    formats = {None: tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
    long = "folder/" * 20 if kind else ""
    with tarfile.open(path, mode, format=formats[kind]) as file:
        for name, content in (("a.png", _PICTURES[0]), ("a.json", b'{"prompt": "x"}')):
            member = tarfile.TarInfo(f"{long}é{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def json_lines(folder: pathlib.Path):
    """A list of pictures and captions."""
    (folder / "a.png").write_bytes(_PICTURES[0])
    seeds = [
        {"image_path": "a.png", "prompt": "A card."},
        {"file_name": "a.png", "captions": [{"text": "x", "kind": "tags", "language": "en"}]},
        {"image": "a.png", "tags": ["a", "b"], "score": 1.5, "long_zh": "猫"},
    ]
    check = _read_source(folder / "list.jsonl", "json")
    return mutations.json_files(seeds), check, json.dumps(seeds[0]).encode()


def _read_source(path: pathlib.Path, kind: str):
    source = make_source(kind, str(path))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for part in source.parts():
            for item in source.read(part):
                assert item.fault is not None or item.captions
                json.dumps([item.id, str(item.fault)], ensure_ascii=False)
                if isinstance(item.image, bytes) and item.fault is None:
                    with contextlib.suppress(images.Rejected):
                        images.decode(item.image, max_pixels=2**22)

    return check


def caption_table_piece(folder: pathlib.Path):
    """A table of captions: a row of it, read as all rows are and looked up by its id."""
    written = caption_table.Written("A card.", "long", "en", "model", "1-0", 0)
    excluded = caption_table.Excluded("tags", "zh", "loop", "card", "card, card")
    row = caption_table.Row("x", (written,), (excluded,), None, (("tags", "zh", "loop"),), (9, 4))
    piece = caption_table.Piece(0, 0)
    (folder / caption_table.SETTINGS).write_text("{}")
    rows, index = [row, caption_table.Row("y", fault=("lost", "y"))], caption_table.PartIndex()
    caption_table.write_rows(folder, piece, rows)
    index.add(rows)
    index.save(folder, 0, Counts())
    caption_table.finish(folder, Counts())
    path = folder / piece.name
    lines = gzip.decompress(path.read_bytes()).splitlines()

    def check(content: bytes) -> None:
        path.write_bytes(content if content[:2] == b"\x1f\x8b" else gzip.compress(content))
        caption_table._kept_lines.cache_clear()
        (captions,) = caption_table.Table.load(folder).find(["x"])
        for caption in captions:
            assert caption.kind in KINDS
            caption.text.encode()
        for found in caption_table.read_rows(folder, piece):
            json.dumps(found, ensure_ascii=False).encode()

    seeds = mutations.json_files([json.loads(line) for line in lines])
    return st.one_of(seeds, mutations.files([path.read_bytes()])), check, lines[0]


TARGETS = {
    "example": (example, 8), "manifest": (manifest, 3), "shard": (shard, 3),
    "raw_picture": (raw_picture, 4), "archive": (archive, 2), "json_lines": (json_lines, 2),
    "caption_table": (caption_table_piece, 2),
}  # fmt: skip
