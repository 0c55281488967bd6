import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import tfds as tfds_source
from lumina_jax.data.sources.tfds import TfdsSource
from lumina_jax.errors import InputError

NUM_RECORDS = 30


class Coco(tfds.core.GeneratorBasedBuilder):
    """The features of COCO captions, and others that a data set may have."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)

    def __init__(self, *, png, **kwargs):
        self._png = png
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "image/id": np.int64,
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
            "title": tfds.features.Text(),
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(num_classes=3),
            "score": np.float32,
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(NUM_RECORDS), "val": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": self._png(i),
                    "image/id": i,
                    "captions": [{"id": 0, "text": f"{i}"}, {"id": 1, "text": f"again {i}"}],
                    "title": f"title {i}",
                    "tags": ["a", "b"] if i else [],
                    "label": 2,
                    "score": 0.5,
                    "boxes": np.zeros((2, 4), np.float32),
                },
            )


@pytest.fixture(scope="module")
def coco(tmp_path_factory, png) -> str:
    builder = Coco(png=png, data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return str(builder.data_path)


def test_coco_captions_are_read_with_the_bytes_of_their_pictures(coco, png, read_all):
    items = read_all(TfdsSource(coco))
    assert [item.id for item in items] == [f"train:{i}" for i in range(NUM_RECORDS)]
    numbers = [int(item.scores["image/id"]) for item in items]
    assert sorted(numbers) == list(range(NUM_RECORDS))
    for i, item in zip(numbers, items, strict=True):
        assert item.image == png(i)
        tags = (Caption("a, b", "tags", "en"),) if i else ()
        texts = (Caption(f"{i}", "long", "en"), Caption(f"again {i}", "long", "en"))
        assert set(item.captions) == {*texts, *tags}
        assert item.scores == {"image/id": float(i), "label": 2.0, "score": 0.5}


def test_features_and_split_can_be_given(coco, read_all):
    (item,) = read_all(TfdsSource(coco, split="val", image="image", captions=("title:short:de",)))
    assert item.id == "val:0"
    assert item.captions == (Caption("title 0", "short", "de"),)
    assert len(read_all(TfdsSource(coco, split="train[10:20]"))) == 10


class Bare(Coco):
    """Pictures alone."""

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image})
        )

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": self._png(i)}


def test_a_feature_of_captions_is_not_needed_where_pictures_are_to_be_captioned(
    tmp_path, png, read_all
):
    builder = Bare(png=png, data_dir=tmp_path)
    builder.download_and_prepare()
    with pytest.raises(InputError, match="has no feature of captions; it has image"):
        TfdsSource(str(builder.data_path)).parts()
    items = read_all(TfdsSource(str(builder.data_path), needs_captions=False))
    assert sorted(item.image for item in items) == sorted(png(i) for i in range(NUM_RECORDS))
    assert {(item.captions, item.fault) for item in items} == {((), None)}


def test_parts_are_slices(coco, read_all, monkeypatch):
    whole = read_all(TfdsSource(coco))
    monkeypatch.setattr(tfds_source, "RECORDS_PER_PART", 7)
    assert [(p.start, p.stop) for p in TfdsSource(coco).parts()] == [
        (0, 7),
        (7, 14),
        (14, 21),
        (21, 28),
        (28, 30),
    ]
    assert read_all(TfdsSource(coco)) == whole


def test_a_dataset_of_this_project_is_read_in_all_its_splits(dataset, read_all):
    items = read_all(TfdsSource(str(dataset)))
    assert not any(item.fault for item in items)
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert len({item.id for item in items}) == manifest["num_records"]
    assert len(TfdsSource(str(dataset)).parts()) == len(manifest["splits"]) > 1
    (dog,) = (item for item in items if item.id == "1F436")
    assert Caption("dog face", "short", "en") in dog.captions
    assert len(dog.captions) == 14


def test_damaged_records_are_said_and_the_others_are_read(tmp_path, coco, png, read_all):
    copy = tmp_path / "copy"
    shutil.copytree(coco, copy)
    (shard,) = copy.glob("*train*")
    content = bytearray(shard.read_bytes())
    content[4000:4010] = b"x" * 10
    shard.write_bytes(content)
    items = read_all(TfdsSource(str(copy)))
    assert [item.id for item in items] == [f"train:{i}" for i in range(NUM_RECORDS)]
    assert [item.fault.reason for item in items if item.fault] == ["damaged record"]


def test_a_folder_that_tfds_did_not_prepare_is_refused(tmp_path, coco):
    with pytest.raises(InputError, match=r"no dataset_info.json and no features.json\. Give the"):
        TfdsSource(str(tmp_path)).parts()
    with pytest.raises(InputError, match="nowhere is not a data set that TFDS has prepared"):
        TfdsSource(str(tmp_path / "nowhere")).parts()
    copy = tmp_path / "copy"
    shutil.copytree(coco, copy)
    for shard in copy.glob("*train*"):
        shard.unlink()
    with pytest.raises(InputError, match=r"copy lacks coco-train.array_record-00000\S+\. Copy it"):
        TfdsSource(str(copy)).parts()


def test_files_that_need_tensorflow_are_refused(tmp_path, coco):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in map(epath.Path(coco).joinpath, ("dataset_info.json", "features.json")):
        text = path.read_text().replace("array_record", "tfrecord")
        (copy / path.name).write_text(text.replace("ARRAY_RECORD", "tfrecord"))
    for split in ("train", "val"):
        (copy / f"coco-{split}.tfrecord-00000-of-00001").touch()
    with pytest.raises(InputError, match="copy holds tfrecord files, which only TensorFlow reads"):
        TfdsSource(str(copy)).parts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(captions=("text",)), "has no feature text; it has .*title.*of which images: image"),
        (dict(image="title"), "has no feature title; it has"),
        (dict(split="test"), "split test: Unknown split 'test'"),
        (dict(split="train[:0]"), r"holds no record in train\[:0\]"),
    ],
)
def test_features_and_splits_that_are_not_there_are_refused(coco, options, message):
    with pytest.raises(InputError, match=message):
        TfdsSource(coco, **options).parts()


def test_a_feature_whose_class_would_be_imported_is_refused(tmp_path, coco, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(coco, copy)
    (tmp_path / "hostile.py").write_text("raise SystemError('this was executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = copy / "features.json"
    path.write_text(
        path.read_text().replace(
            "tensorflow_datasets.core.features.text_feature.Text", "hostile.Text"
        )
    )
    with pytest.raises(InputError, match=r"has a feature of the class 'hostile\.Text'"):
        TfdsSource(str(copy)).parts()
    path.write_text("[1]")
    with pytest.raises(InputError, match="is damaged"):
        TfdsSource(str(copy)).parts()
