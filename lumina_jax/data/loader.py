"""The loader: the global batch of step k is a function of (seed, k) and of nothing else.

Each bucket is an endless shuffled stream of rows. Batch j of a bucket is its rows j*B to (j+1)*B,
of which process p of n reads and decodes only its own contiguous share, so that

    jax.make_array_from_process_local_data(sharding, batch["images"])

assembles the same global batch, row by row, on any number of processes. The batches of all buckets
are then mixed in proportion to their records: every process meets the same bucket at the same step,
and one integer, the step, is the whole state of the data.
"""

import functools
import io
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import Caption, CaptionPolicy, describe_pairs
from lumina_jax.data.records import CACHES, REMAKE, CapFeatsCache, Manifest, Split
from lumina_jax.errors import InputError

Tokenize = Callable[[Sequence[str]], tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]]


class Loader:
    """Batches of a dataset directory, by step.

    A batch is this process's share of a global batch: `images` uint8 [b, H, W, 3], `token_ids`
    int32 [b, S], `token_mask` bool [b, S], `ids` (the records' ids, objects [b]) and `captions`
    (a list of b texts). With cached features there are `latents` bfloat16 [b, h, w, C] in the place
    of `images`, and `cap_feats` bfloat16 [b, S, F] in that of `token_ids`; the rows and their
    captions are the same.

    Args:
        directory: where a manifest.json is.
        batch_size: of the global batch.
        tokenize: texts -> (token_ids, token_mask). It is called from several threads at once.
        buckets: the buckets to train on; () takes all that have records.
        features: the cached features to read: "latents", "cap_feats" or both.
        num_threads: batches that are made at the same time.
        prefetch: batches that wait in memory.
        process_index, process_count: of which share this is; by default those of JAX.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        batch_size: int,
        seed: int,
        tokenize: Tokenize,
        policy: CaptionPolicy | None = None,
        buckets: Sequence[Bucket] = (),
        features: Sequence[str] = (),
        num_threads: int = 4,
        prefetch: int = 8,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
        if batch_size < 1 or batch_size % process_count:
            below = batch_size - batch_size % process_count
            nearest = [str(n) for n in (below, below + process_count) if n > 0]
            raise InputError(
                f"batch_size={batch_size} cannot be shared by {process_count} processes; nearest: "
                f"{' and '.join(nearest)}."
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} of process_count={process_count}")
        if num_threads < 1 or prefetch < 1:
            raise InputError(
                f"num_threads={num_threads} and prefetch={prefetch} must be 1 or more."
            )
        if seed < 0:
            raise InputError(f"seed={seed} must be zero or more.")
        policy = policy or CaptionPolicy()
        self.manifest = Manifest.load(directory)
        _check_features(self.manifest, features, directory)
        splits = _select_splits(self.manifest, buckets, directory)
        _check_captions(splits, policy)
        self.buckets = tuple(split.bucket for split in splits)
        self._undecodable = _Undecodable()
        # Grain's own defaults are meant for single records: they would hold 500 whole batches.
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch
        )
        open_split = _opener(directory, splits, self._undecodable, self.manifest, features)
        take_captions = functools.partial(_tokens, tokenize)
        if "cap_feats" in features:
            take_captions = functools.partial(_cap_feats, self.manifest.cache["cap_feats"])
        local_size = batch_size // process_count

        def choose_caption(picture: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
            captions = picture["captions"]
            chosen = policy.choose(captions, rng)
            row = picture | {"caption": policy.text(captions, chosen)}
            if "cap_feats" in picture:
                row["cap_feats"] = None if chosen is None else picture["cap_feats"][chosen]
            return row

        def batches_of(split: Split) -> grain.MapDataset:
            # Each bucket has a seed of its own, which does not depend on the other buckets.
            entropy = [seed, split.bucket.width, split.bucket.height]
            rows = (
                grain.MapDataset.source(open_split(split))
                .seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                .shuffle()
                .repeat()
                # Before the rows are shared out: its generator is seeded by the global row.
                .random_map(choose_caption)
            )
            rows = _ProcessRows(rows, batch_size, process_index, process_count)
            # Rows never end, so nothing is dropped; without it Grain rounds their number up, past
            # the largest that Python's len() can return.
            return rows.batch(
                local_size, drop_remainder=True, batch_fn=lambda rows: _batch(rows, take_captions)
            )

        self._batches = grain.MapDataset.mix(
            [batches_of(split) for split in splits], [split.num_records for split in splits]
        )

    @property
    def num_replaced(self) -> int:
        """The rows so far, prefetched ones too, whose record could not be decoded."""
        return self._undecodable.num_replaced

    def batch_at(self, step: int) -> dict[str, Any]:
        """Returns this process's rows of the global batch of a step."""
        _check_step(step)
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the batches of start_step, start_step + 1, ...; threads prepare the next ones."""
        _check_step(start_step)
        return self._iterate(start_step)

    def _iterate(self, start_step: int) -> Iterator[dict[str, Any]]:
        batches = iter(self._batches[start_step:].to_iter_dataset(self._read_options))
        try:
            yield from batches
        finally:
            batches.close()


def read_pictures(directory: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Yields every picture once, in the order of the shards: `id`, `image` and `captions`."""
    manifest = Manifest.load(directory)
    splits = _select_splits(manifest, (), directory)
    open_split = _opener(directory, splits, _Undecodable(), manifest)
    for split in splits:
        pictures = open_split(split)
        yield from (pictures[index] for index in range(len(pictures)))


def open_records(
    directory: epath.PathLike, splits: Sequence[Split], names: Collection[str] = ()
) -> Callable[[Split], "Records"]:
    """Returns a function from a split to its records; `names` are the features to read, () all."""
    builder = _open(directory, splits)
    names = names or tuple(builder.info.features)
    features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in names})

    def open_split(split: Split) -> Records:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return Records(builder.as_data_source(split.name, deserialize_method=raw), features)

    return open_split


class Records:
    """The records of a split as they are stored, by index: what is encoded stays in its bytes."""

    def __init__(self, source: Sequence[Any], features: tfds.features.FeaturesDict):
        self._source, self._features = source, features
        skip = tfds.decode.SkipDecoding()
        self._decoders = {name: skip for name in features if name == "image"}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # The features that are not asked for stay in the bytes of the record.
        return self._features.deserialize_example_np(self._source[index], decoders=self._decoders)


def captions_of(record: Mapping[str, Any]) -> list[Caption]:
    """Returns the captions of a stored record."""
    columns = (record["captions"][name] for name in ("text", "kind", "language"))
    return [Caption(*(text.decode() for text in row)) for row in zip(*columns, strict=True)]


def decode_image(content: bytes, bucket: Bucket) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of a stored record's image."""
    with Image.open(io.BytesIO(content)) as image:
        if image.size != (bucket.width, bucket.height):
            raise ValueError(f"the picture is {image.width}x{image.height}")
        return np.array(image.convert("RGB"))


def _opener(
    directory: epath.PathLike,
    splits: Sequence[Split],
    undecodable: "_Undecodable",
    manifest: Manifest,
    features: Collection[str] = (),
) -> Callable[[Split], "_Pictures"]:
    """Returns a function from a split to its decoded pictures, or to their cached latents."""
    picture = "latents" if "latents" in features else "image"
    decode = manifest.cache["latents"].decode if picture == "latents" else decode_image
    names = dict.fromkeys(("id", "captions", picture, *features))
    open_split = open_records(directory, splits, names)
    return lambda split: _Pictures(open_split(split), split.bucket, picture, decode, undecodable)


class _ProcessRows(grain.MapDataset):
    """The rows of one process: its contiguous share of each global batch.

    Grain's slice would deal rows out in turn, and the assembled batch would have another order for
    every number of processes.
    """

    def __init__(self, rows: grain.MapDataset, batch_size: int, index: int, count: int):
        super().__init__(rows)
        self._batch_size, self._local_size = batch_size, batch_size // count
        self._offset = index * self._local_size
        self._length = len(rows) // batch_size * self._local_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local_size)
        return self._parent[batch * self._batch_size + self._offset + row]


class _Undecodable:
    """Counts the rows that had to be replaced and logs each bad record once; threads share it."""

    def __init__(self):
        self.num_replaced = 0
        self._ids: set[str] = set()
        self._lock = threading.Lock()

    def add(self, record_id: str, bucket: Bucket, error: Exception) -> None:
        with self._lock:
            self.num_replaced += 1
            if record_id in self._ids:
                return
            self._ids.add(record_id)
        logging.warning(
            "Record %s of bucket %s cannot be decoded (%s: %s); the next one takes its place.",
            record_id,
            bucket,
            type(error).__name__,
            error,
        )


class _Pictures:
    """The decoded records of one bucket, by index; threads may share it.

    Args:
        records: with the features `id`, `captions`, that of the picture, and others.
        bucket: of all of them.
        picture: the feature that is decoded, `image` or `latents`.
        decode: it, given the bytes and the bucket.
        undecodable: counts the failures.
    """

    def __init__(
        self,
        records: Records,
        bucket: Bucket,
        picture: str,
        decode: Callable[[bytes, Bucket], np.ndarray],
        undecodable: _Undecodable,
    ):
        self._records, self._bucket, self._undecodable = records, bucket, undecodable
        self._picture, self._decode = picture, decode

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            record = self._records[(index + offset) % len(self)]
            record_id = record["id"].decode()
            try:
                picture = self._decode(record[self._picture], self._bucket)
            except Exception as error:  # what a decoder raises on damaged bytes is anything
                self._undecodable.add(record_id, self._bucket, error)
                continue
            captions = captions_of(record)
            return {**record, "id": record_id, self._picture: picture, "captions": captions}
        raise InputError(
            f"None of the {len(self)} records of bucket {self._bucket} can be decoded. {REMAKE}"
        )


def _batch(rows: Sequence[dict[str, Any]], take_captions: Callable) -> dict[str, Any]:
    pictures = {
        plural: np.stack([row[name] for row in rows])
        for name, plural in (("image", "images"), ("latents", "latents"))
        if name in rows[0]
    }
    return {
        **pictures,
        **take_captions(rows),
        "ids": np.array([row["id"] for row in rows], object),
        "captions": [row["caption"] for row in rows],
    }


def _tokens(tokenize: Tokenize, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    token_ids, token_mask = tokenize([row["caption"] for row in rows])
    return {
        "token_ids": np.asarray(token_ids, np.int32),
        "token_mask": np.asarray(token_mask, np.bool_),
    }


def _cap_feats(cache: CapFeatsCache, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Pads the stored features on the right, as they were when they were made."""
    cap_feats = np.zeros((len(rows), cache.max_tokens, cache.feature_dim), jnp.bfloat16)
    token_mask = np.zeros((len(rows), cache.max_tokens), np.bool_)
    for index, row in enumerate(rows):
        stored = cache.decode(row["cap_feats"])
        cap_feats[index, : len(stored)] = stored
        token_mask[index, : len(stored)] = True
    return {"cap_feats": cap_feats, "token_mask": token_mask}


def _check_features(manifest: Manifest, features: Sequence[str], directory: epath.PathLike) -> None:
    if isinstance(features, str) or set(features) - set(CACHES):
        raise InputError(f"Cached features {features!r} are not a tuple of {' and '.join(CACHES)}.")
    if missing := [name for name in features if name not in manifest.cache]:
        raise InputError(
            f"{directory} has no cached {' and '.join(missing)}; it has "
            f"{' and '.join(manifest.cache) or 'none'}. Make a dataset that does with "
            f"tools/cache_features.py --features={','.join(features)}, or leave them out of "
            f"data.cached."
        )


def _select_splits(
    manifest: Manifest, buckets: Sequence[Bucket], directory: epath.PathLike
) -> list[Split]:
    """Returns the splits to train on, in the order of their size whatever the order asked for."""
    by_bucket = {split.bucket: split for split in manifest.splits}
    wanted = sorted(set(buckets) or by_bucket)
    if missing := [bucket for bucket in wanted if bucket not in by_bucket]:
        has = ", ".join(f"{split.bucket} ({split.num_records})" for split in manifest.splits)
        raise InputError(
            f"{directory} has no bucket {', '.join(map(str, missing))}; it has (records) {has}. "
            "Choose among these, or make a dataset with the bucket: tools/prepare_data.py "
            "--buckets."
        )
    if empty := [str(bucket) for bucket in wanted if not by_bucket[bucket].num_records]:
        logging.info("Left out, because they have no records: buckets %s.", ", ".join(empty))
    splits = [by_bucket[bucket] for bucket in wanted if by_bucket[bucket].num_records]
    if not splits:
        raise InputError(
            f"The buckets {', '.join(map(str, wanted))} of {directory} have no records. Choose "
            "others, or add pictures."
        )
    return splits


def _open(directory: epath.PathLike, splits: Sequence[Split]) -> tfds.core.DatasetBuilder:
    """Opens the shards, and checks that all of them are there and hold what the manifest says."""
    present = {path.name for path in epath.Path(directory).iterdir()}
    faults = sorted({"dataset_info.json", "features.json"} - present)
    if not faults:
        builder = tfds.builder_from_directory(directory)
        for split in splits:
            if (info := builder.info.splits.get(split.name)) is None:
                faults.append(f"split {split.name}")
            elif info.num_examples != split.num_records:
                faults.append(f"{split.num_records - info.num_examples} records of {split.name}")
            else:
                faults.extend(sorted(set(info.filenames) - present))
    if faults:
        raise InputError(f"{directory} lacks {', '.join(faults)}. Copy it again in full. {REMAKE}")
    return builder


def _check_captions(splits: Sequence[Split], policy: CaptionPolicy) -> None:
    """Raises now what would otherwise stop the run when it meets the first such record."""
    without = [
        caption_set
        for split in splits
        for caption_set in split.caption_sets
        if not any(policy.allows(kind, language) for kind, language in caption_set.pairs)
    ]
    if without:
        num_without = sum(caption_set.num_records for caption_set in without)
        has = describe_pairs(pair for caption_set in without for pair in caption_set.pairs)
        raise InputError(
            f"{num_without} of {sum(split.num_records for split in splits)} records (one is "
            f"{without[0].example!r}) have {has}; {policy} allows none of them. Allow one of these "
            "kinds and languages, or caption the records."
        )


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step={step} is negative; the first step is 0")
