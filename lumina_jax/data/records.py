"""Records on disk: one TFDS split of ArrayRecord shards per bucket, and a manifest beside them.

A dataset directory holds

    manifest.json                                what is here; written last: it means "complete"
    dataset_info.json, features.json             TFDS's own description
    pictures-train_1024x1024.array_record-...    the records of one bucket, resized already

TensorFlow is not needed to write or to read it, and any TFDS tool can open it:
`tfds.builder_from_directory(directory).as_data_source("train_1024x1024")`.

A record may also hold what frozen networks made of it: `latents` of the picture, and `cap_feats`,
one for each caption. They are bytes of bfloat16, whose shapes the manifest gives; see `CACHES`.
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import pickle
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import BFloat16
from PIL import Image

from lumina_jax import files
from lumina_jax.data import buckets as bucket_lib
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import KINDS, Caption
from lumina_jax.errors import InputError
from lumina_jax.version import __version__

MANIFEST = "manifest.json"
# Raise it when a dataset written before can no longer be read.
FORMAT = 1
# Small pictures are stored without loss: at these sizes JPEG artefacts are a visible share of them.
MAX_PNG_RESOLUTION = 128


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as its source gives it, before it is fitted into a bucket."""

    id: str
    image: Image.Image
    captions: tuple[Caption, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a dataset is made of; `options` are the settings that only its source knows."""

    source: str
    buckets: tuple[Bucket, ...]
    resolution: int
    pixels_per_token: int
    license: str
    attribution: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Checks the buckets against the token budget that the model gives to a resolution."""
        side, budget = self.pixels_per_token, num_tokens(self.resolution, self.pixels_per_token)
        faults = []
        for bucket in self.buckets:
            if bucket.width % side or bucket.height % side:
                faults.append(f"{bucket} is not a multiple of {side} pixels")
            elif (bucket.width // side) * (bucket.height // side) > budget:
                faults.append(f"{bucket} holds more than {budget} tokens")
        if faults:
            raise InputError(
                f"Buckets do not fit resolution {self.resolution} with {side} pixels per token: "
                f"{'; '.join(faults)}. Change the buckets, the resolution or the pixels per token."
            )
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            raise InputError(
                f"Buckets {', '.join(map(str, self.buckets)) or '()'}: need one or more, each once."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Returns what must be equal for a finished dataset to be used again."""
        return {
            "source": self.source,
            "buckets": sorted(map(str, self.buckets)),
            "resolution": self.resolution,
            "pixels_per_token": self.pixels_per_token,
            **self.options,
        }


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """The records of a split that have captions of the same kinds and languages."""

    pairs: tuple[tuple[str, str], ...]  # (kind, language)
    num_records: int
    example: str  # the id of one of them


@dataclasses.dataclass(frozen=True)
class Split:
    bucket: Bucket
    num_records: int
    caption_sets: tuple[CaptionSet, ...]

    @property
    def name(self) -> str:
        return f"train_{self.bucket}"


@dataclasses.dataclass(frozen=True)
class LatentsCache:
    """Latents of the stored pictures: bfloat16 [height / downscale, width / downscale, channels].

    A picture that could not be decoded has no bytes, so that it is replaced when it is met, as it
    would be without a cache.
    """

    fingerprint: str  # of the autoencoder
    downscale: int
    channels: int

    def decode(self, content: bytes, bucket: Bucket) -> BFloat16[np.ndarray, "h w C"]:
        height, width = bucket.height // self.downscale, bucket.width // self.downscale
        return np.frombuffer(content, jnp.bfloat16).reshape(height, width, self.channels)


@dataclasses.dataclass(frozen=True)
class CapFeatsCache:
    """Features of each caption, in the order of the captions: bfloat16 [num_tokens, feature_dim].

    Only slots with a token are stored; they are the first of the `max_tokens` of a batch.
    """

    fingerprint: str  # of the text encoder
    system_prompt: str  # the name of what stood before each caption
    max_tokens: int
    feature_dim: int
    num_truncated: int  # captions that were cut to `max_tokens`
    empty: str  # base64 of the features of "", which stands for a dropped caption

    @classmethod
    def with_empty(cls, empty: BFloat16[np.ndarray, "n F"], **settings: Any) -> "CapFeatsCache":
        return cls(empty=base64.b64encode(empty.tobytes()).decode(), **settings)

    def decode(self, content: bytes | None) -> BFloat16[np.ndarray, "n F"]:
        """The features of a caption, given their bytes; those of "" without."""
        content = base64.b64decode(self.empty) if content is None else content
        return np.frombuffer(content, jnp.bfloat16).reshape(-1, self.feature_dim)


CACHES = {"latents": LatentsCache, "cap_feats": CapFeatsCache}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a dataset directory holds.

    Its fingerprint changes with any byte of a picture or a caption, and with what made the caches.
    """

    splits: tuple[Split, ...]
    settings: Mapping[str, Any]
    license: str
    attribution: str
    fingerprint: str
    version: str = __version__  # of the code that wrote it
    cache: Mapping[str, LatentsCache | CapFeatsCache] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.settings["source"]

    @property
    def resolution(self) -> int:
        return self.settings["resolution"]

    @property
    def pixels_per_token(self) -> int:
        return self.settings["pixels_per_token"]

    @property
    def num_records(self) -> int:
        return sum(split.num_records for split in self.splits)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({kind for kind, _ in self._pairs()}))

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({language for _, language in self._pairs()}))

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for split in self.splits:
            for caption_set in split.caption_sets:
                yield from caption_set.pairs

    def save(self, directory: epath.PathLike) -> None:
        """Writes aside and renames, so that a manifest is whole or absent."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "license": self.license,
            "attribution": self.attribution,
            "settings": dict(self.settings),
            "num_records": self.num_records,
            "kinds": self.kinds,
            "languages": self.languages,
            "splits": [
                {
                    "name": split.name,
                    "width": split.bucket.width,
                    "height": split.bucket.height,
                    "num_records": split.num_records,
                    "caption_sets": [
                        {
                            "captions": [f"{kind}/{language}" for kind, language in c.pairs],
                            "num_records": c.num_records,
                            "example": c.example,
                        }
                        for c in split.caption_sets
                    ],
                }
                for split in self.splits
            ],
            "cache": {
                name: {"dtype": "bfloat16", **dataclasses.asdict(cache)}
                for name, cache in self.cache.items()
            },
        }
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        files.write(epath.Path(directory) / MANIFEST, text)

    @classmethod
    def load(cls, directory: epath.PathLike) -> "Manifest":
        path = epath.Path(directory) / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{directory} is not a finished dataset: it has no {MANIFEST}. Make one with "
                f"tools/prepare_data.py --output={directory}; its --help shows how."
            ) from None
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}). {REMAKE}") from error
        try:
            if content["format"] != FORMAT:
                raise InputError(
                    f"{path} has format {content['format']}, written by lumina_jax "
                    f"{content['version']}; this is {__version__}, which reads format {FORMAT}. "
                    f"{REMAKE}"
                )
            splits = [
                Split(
                    bucket=Bucket(split["width"], split["height"]),
                    num_records=split["num_records"],
                    caption_sets=tuple(
                        CaptionSet(
                            pairs=tuple(tuple(pair.split("/", 1)) for pair in c["captions"]),
                            num_records=c["num_records"],
                            example=c["example"],
                        )
                        for c in split["caption_sets"]
                    ),
                )
                for split in content["splits"]
            ]
            cache = {
                name: CACHES[name](**{key: value for key, value in made.items() if key != "dtype"})
                for name, made in content.get("cache", {}).items()  # younger than the format
            }
            names = ("settings", "license", "attribution", "fingerprint", "version")
            given = {name: content[name] for name in names}
            return cls(splits=tuple(splits), cache=cache, **given)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}). {REMAKE}") from error


REMAKE = "Make the dataset again with tools/prepare_data.py and --overwrite."


def num_tokens(resolution: int, pixels_per_token: int) -> int:
    """Returns the token budget of a resolution: that of its square picture."""
    if resolution < 1 or pixels_per_token < 1 or resolution % pixels_per_token:
        raise InputError(
            f"Resolution {resolution} is not a multiple of {pixels_per_token} pixels per token."
        )
    return (resolution // pixels_per_token) ** 2


def features(cached: Collection[str] = ()) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record; the image stays in the bytes it was encoded to.

    Cached features are bytes too: as tensors of varying shape TFDS would store them by values and
    row lengths, and rebuild those of every caption for the one that is wanted.
    """
    content = tfds.features.Tensor(shape=(), dtype=np.object_)
    caches = {"latents": content, "cap_feats": tfds.features.Sequence(content)}
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "source": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(
                {
                    "text": tfds.features.Text(),
                    "kind": tfds.features.Text(),
                    "language": tfds.features.Text(),
                }
            ),
            # Of the original: the bucket says how large the stored picture is.
            "height": np.int32,
            "width": np.int32,
            **{name: caches[name] for name in cached},
        }
    )


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Captioned pictures, resized into buckets."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS finds this by a package that it does not declare among its own (importlib_resources).
    code_path = epath.Path(__file__)

    def __init__(
        self,
        *,
        splits: Mapping[str, Iterable[tuple]],
        license: str,
        cached: Collection[str],
        **kwargs: Any,
    ):
        self._splits, self._license, self._cached = splits, license, cached
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features(self._cached),
            description=self.__doc__,
            license=self._license,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the pictures are on this machine already
        return dict(self._splits)

    def _generate_examples(self):
        raise NotImplementedError("_split_generators gives the examples themselves")


def find(directory: epath.PathLike) -> Manifest | None:
    """Returns the manifest of a finished dataset, None where nothing is yet."""
    directory = epath.Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not directory.is_dir() or not (directory / MANIFEST).exists():
        raise InputError(
            f"{directory} holds files but no {MANIFEST}: an unfinished dataset, or something else. "
            "Choose another directory, or replace an unfinished dataset with --overwrite."
        )
    return Manifest.load(directory)


def build(
    directory: epath.PathLike,
    recipe: Recipe,
    pictures: Iterable[Picture],
    fit: Callable[[Image.Image, Bucket], Image.Image] = bucket_lib.resize_and_crop,
    *,
    overwrite: bool = False,
) -> Manifest:
    """Writes the dataset and returns its manifest; one that is finished already is left as it is.

    Pictures are taken one at a time, fitted and spooled to local disk bucket by bucket, then
    written as shards.
    """
    if overwrite:
        check_replaceable(directory)
    elif (manifest := find(directory)) is not None:
        _check_settings(manifest, recipe, directory)
        return manifest
    with tempfile.TemporaryDirectory() as spool_directory:
        spools = {
            bucket: _Spool(pathlib.Path(spool_directory) / str(bucket), recipe.source)
            for bucket in sorted(recipe.buckets)
        }
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            for spool in spools.values():
                stack.enter_context(spool)
            for picture in pictures:
                bucket = bucket_lib.choose_bucket(*picture.image.size, recipe.buckets)
                image = encode(fit(picture.image, bucket), recipe.resolution)
                spools[bucket].append(picture, image)
                captions = [dataclasses.astuple(caption) for caption in picture.captions]
                digest.update(json.dumps([str(bucket), picture.id, captions]).encode())
                digest.update(hashlib.sha256(image).digest())
        splits = tuple(spool.split(bucket) for bucket, spool in spools.items())
        if not any(split.num_records for split in splits):
            raise InputError(f"{recipe.source} gave no picture; there is nothing to write.")
        manifest = Manifest(
            splits, recipe.settings, recipe.license, recipe.attribution, digest.hexdigest()
        )
        write(directory, {split: spools[split.bucket] for split in splits}, recipe.license)
    manifest.save(directory)
    return manifest


def write(
    directory: epath.PathLike,
    examples: Mapping[Split, Iterable[tuple[str, dict[str, Any]]]],
    license: str,
    cached: Collection[str] = (),
) -> None:
    """Writes shards beside the directory and moves them into its place, where a dataset may be.

    The dataset is finished when the caller saves its manifest there.

    Args:
        directory: of the dataset.
        examples: of each split, (key, example); asked for one split after another.
        license: of the pictures.
        cached: the names in `CACHES` that every example has.
    """
    directory = epath.Path(directory)
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex}"
    try:
        tfds.disable_progress_bar()  # a bar per shard; the caller shows one for the pictures
        builder = Pictures(
            # TFDS refuses a split without records; the manifest still lists it.
            splits={split.name: made for split, made in examples.items() if split.num_records},
            license=license,
            cached=cached,
            data_dir=aside,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it is doing
            builder.download_and_prepare()
        if directory.exists():
            # The manifest goes first: a directory half removed must not look complete.
            (directory / MANIFEST).unlink(missing_ok=True)
            directory.rmtree()
        epath.Path(builder.data_path).rename(directory)
    finally:
        aside.rmtree(missing_ok=True)


def encode(image: Image.Image, resolution: int) -> bytes:
    content = io.BytesIO()
    if resolution <= MAX_PNG_RESOLUTION:
        image.save(content, format="PNG")
    else:
        image.save(content, format="JPEG", quality=95)
    return content.getvalue()


class _Spool:
    """The records of one bucket in a local file: too many for memory, and TFDS wants them by split.

    Written once inside `with`, then iterated as the (key, example) pairs that TFDS takes.
    """

    def __init__(self, path: pathlib.Path, source: str):
        self._path, self._source = path, source
        self._num_records = 0
        self._counts: collections.Counter = collections.Counter()
        self._examples: dict[tuple, str] = {}

    def __enter__(self):
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *error):
        self._file.close()

    def append(self, picture: Picture, image: bytes) -> None:
        if unknown := {c.kind for c in picture.captions} - set(KINDS):
            raise ValueError(f"{picture.id}: caption kinds {unknown} are not among {KINDS}")
        example = {
            "id": picture.id,
            "source": self._source,
            "image": image,
            "captions": [dataclasses.asdict(caption) for caption in picture.captions],
            "height": picture.image.height,
            "width": picture.image.width,
        }
        pickle.dump(example, self._file)
        pairs = tuple(sorted({(c.kind, c.language) for c in picture.captions}))
        self._num_records += 1
        self._counts[pairs] += 1
        self._examples.setdefault(pairs, picture.id)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._path.open("rb") as file:
            for _ in range(self._num_records):
                example = pickle.load(file)
                yield example["id"], {**example, "image": io.BytesIO(example["image"])}

    def split(self, bucket: Bucket) -> Split:
        caption_sets = tuple(
            CaptionSet(pairs, self._counts[pairs], self._examples[pairs])
            for pairs in sorted(self._counts)
        )
        return Split(bucket, self._num_records, caption_sets)


def _check_settings(manifest: Manifest, recipe: Recipe, directory: epath.PathLike) -> None:
    wanted = recipe.settings
    differences = [
        f"{name} is {manifest.settings.get(name)!r} there and {wanted.get(name)!r} here"
        for name in sorted(wanted.keys() | manifest.settings.keys())
        if wanted.get(name) != manifest.settings.get(name)
    ]
    if differences:
        raise InputError(
            f"{directory} holds another dataset: {'; '.join(differences)}. Choose another "
            "directory, ask for the same settings, or replace it with --overwrite."
        )


def check_replaceable(directory: epath.PathLike) -> None:
    """Refuses to remove a directory that does not look like a dataset."""
    directory = epath.Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or not any(
        (directory / name).exists() for name in (MANIFEST, "dataset_info.json")
    ):
        raise InputError(
            f"{directory} is not a dataset (no {MANIFEST}, no dataset_info.json), so --overwrite "
            "does not remove it. Choose another directory, or remove it yourself."
        )
