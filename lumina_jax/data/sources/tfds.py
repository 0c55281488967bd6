"""Data sets of TensorFlow Datasets, prepared as ArrayRecord, and those of this project.

They are read without TensorFlow. The pictures keep their encoded bytes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from lumina_jax.data.images import Rejected
from lumina_jax.data.records import MANIFEST, Manifest
from lumina_jax.data.sources.base import Item, Part
from lumina_jax.data.sources.metadata import CaptionedSource, faulty, make_item
from lumina_jax.errors import InputError
from lumina_jax.untrusted import read_json

RECORDS_PER_PART = 1000
_RECORDS_AT_ONCE = 16  # read together: one at a time is tens of times slower


@dataclasses.dataclass(frozen=True)
class TfdsSource(CaptionedSource):
    """Pictures in a directory that TFDS has prepared.

    The id of one is its feature `id` where that is text, else `<split>:<record>`.

    Args:
        split: as TFDS knows it; by default `train`, and all splits of a data set of this project.
        image: the feature of the pictures; by default `image`, or the only one that is an image.
    """

    split: str = ""
    image: str = ""

    name: ClassVar[str] = "tfds"

    def __post_init__(self):
        super().__post_init__()
        if self._is_ours():
            manifest = Manifest.load(self.path)
            for field in ("license", "attribution"):
                # They stay with the pictures, through any number of preparations.
                object.__setattr__(self, field, getattr(self, field) or getattr(manifest, field))

    def parts(self) -> list[Part]:
        builder = self._open()
        splits = [self.split] if self.split else self._default_splits(builder)
        self._features(builder)
        parts = []
        for split in splits:
            try:
                num_records = builder.info.splits[split].num_examples
                if num_records:
                    _records(builder, split)
            except NotImplementedError as error:
                raise InputError(
                    f"{self.path} holds {builder.info.file_format.value} files, which only "
                    "TensorFlow reads. Prepare it again with file_format='array_record'."
                ) from error
            except (KeyError, ValueError) as error:
                raise InputError(f"{self.path}, split {split}: {error}") from error
            parts += [
                Part(self.path, start, min(start + RECORDS_PER_PART, num_records), (split,))
                for start in range(0, num_records, RECORDS_PER_PART)
            ]
        if not parts:
            raise InputError(f"{self.path} holds no record in {', '.join(splits)}.")
        return parts

    def read(self, part: Part) -> Iterator[Item]:
        builder = self._open()
        (split,) = part.names
        image, features = self._features(builder)
        records = _records(builder, split)
        for start in range(part.start, part.stop, _RECORDS_AT_ONCE):
            indices = range(start, min(start + _RECORDS_AT_ONCE, part.stop))
            for index, content in zip(indices, _read(records, indices), strict=True):
                yield self._item(f"{split}:{index}", content, image, features)

    def _item(
        self,
        name: str,
        content: bytes | Rejected,
        image: str,
        features: tfds.features.FeaturesDict,
    ) -> Item:
        try:
            if isinstance(content, Rejected):
                raise content
            skip = tfds.decode.SkipDecoding()
            record = features.deserialize_example_np(content, decoders={image: skip})
            if isinstance(record.get("id"), bytes):
                name = record["id"].decode(errors="backslashreplace")
            picture = record.pop(image)
            if not picture:
                raise Rejected("no picture", f"feature {image} is empty")
            metadata = {key: _plain(value) for key, value in record.items()}
            return make_item(name, picture, self.captions_of(metadata), metadata)
        except Rejected as fault:
            return faulty(name, fault)

    def _open(self) -> tfds.core.DatasetBuilder:
        """Opens the directory, and checks that all of its files are there."""
        path = epath.Path(self.path)
        present = {file.name for file in path.iterdir()} if path.is_dir() else set()
        if missing := {"dataset_info.json", "features.json"} - present:
            raise InputError(
                f"{self.path} is not a data set that TFDS has prepared: it has no "
                f"{' and no '.join(sorted(missing))}. Give the directory of one version, such as "
                ".../coco_captions/2014/1.1.0."
            )
        _check_features(path / "features.json")
        builder = tfds.builder_from_directory(path)
        named = {name for split in builder.info.splits.values() for name in split.filenames}
        if missing := sorted(named - present):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise InputError(f"{self.path} lacks {', '.join(missing[:3])}{more}. Copy it in full.")
        return builder

    def _default_splits(self, builder: tfds.core.DatasetBuilder) -> list[str]:
        # A data set of this project has a split for each bucket.
        return sorted(builder.info.splits) if self._is_ours() else ["train"]

    def _is_ours(self) -> bool:
        return (epath.Path(self.path) / MANIFEST).exists()

    def _features(
        self, builder: tfds.core.DatasetBuilder
    ) -> tuple[str, tfds.features.FeaturesDict]:
        """Returns the feature of the pictures, and all that are needed."""
        features = builder.info.features
        images = [n for n, feature in features.items() if isinstance(feature, tfds.features.Image)]
        image = self.image or ("image" if "image" in images or len(images) != 1 else images[0])
        captions = self.caption_keys(features)
        wanted = [given.partition(":")[0] for given in self.captions]
        missing = [name for name in wanted if name not in features]
        missing += [image] if image not in images else []
        if missing or (self.needs_captions and not captions):
            raise InputError(
                f"{self.path} has no feature {', '.join(missing) or 'of captions'}; it has "
                f"{', '.join(features)}, of which images: {', '.join(images) or 'none'}. Name the "
                "features: image=... and captions=key:kind:language."
            )
        needed = [n for n, feature in features.items() if n == "id" or _is_number(feature)]
        return image, tfds.features.FeaturesDict(
            {name: features[name] for name in dict.fromkeys([image, *captions, *needed])}
        )


def _check_features(file: epath.Path) -> None:
    """Refuses features of other packages: TFDS imports the module that the file names."""
    waiting: list[Any] = [read_json(file, "Copy it again.")]
    while waiting:
        value = waiting.pop()
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            if key in ("type", "pythonClassName", "python_class_name") and isinstance(child, str):
                if not child.startswith("tensorflow_datasets.core.features."):
                    raise InputError(
                        f"{file} has a feature of the class {child!r:.200}, which would be "
                        "imported; needed: features of TFDS itself. Prepare the data without it."
                    )
            elif isinstance(child, dict | list):
                waiting.append(child)


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[Any]:
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _read(records: Sequence[Any], indices: Sequence[int]) -> list[bytes | Rejected]:
    """Returns the bytes of records; a damaged one costs itself, not those that it is read with."""
    try:
        return list(records.__getitems__(indices))
    except (RuntimeError, ValueError) as error:
        if len(indices) == 1:
            return [Rejected("damaged record", str(error))]
        return [content for index in indices for content in _read(records, [index])]


def _is_number(feature: tfds.features.FeatureConnector) -> bool:
    return feature.shape == () and np.issubdtype(feature.np_dtype, np.number)


def _plain(value: Any) -> Any:
    """Returns a value of TFDS as JSON would hold it; a sequence of mappings comes as columns."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise Rejected("bad caption", str(error)) from error
    if isinstance(value, Mapping):
        columns = [_plain(column) for column in value.values()]
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list) else value
