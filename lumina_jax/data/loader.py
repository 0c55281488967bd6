"""The loader: the global batch of step k is a function of (seed, k) and of nothing else.

    step k -> a bucket, and how many batches of it there were before: j
    (bucket, j) -> the rows j*B to (j+1)*B of the bucket's endless stream
    row -> (dataset, record), from a shuffle of each dataset and a mixture by weight
    (bucket, j) -> random numbers of each row, which choose its caption

Of these rows process p of n reads and decodes only its own contiguous share, so that

    jax.make_array_from_process_local_data(sharding, batch["images"])

assembles the same global batch, row by row, on any number of processes. Every process meets the
same bucket at the same step, and one integer, the step, is the whole state of the data.

Records can be held out: the last ones of each bucket, which then belong to no row.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, Int32
from ml_dtypes import bfloat16

from lumina_jax.data import images, order, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import CaptionPolicy, describe_pairs
from lumina_jax.data.records import CACHES, REMAKE, Manifest, Record, Records, Split
from lumina_jax.errors import InputError
from lumina_jax.untrusted import MAX_WIDTH, is_finite, is_whole

Tokenize = Callable[..., tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]]

_BATCHES_AT_ONCE = 64  # whose order is computed together, which costs hardly more than of one
_PAUSES = (0.1, 1.0, 10.0)  # seconds, before a store is asked again
_NUM_BATCHES = 2**48  # of a bucket: for ever, but few enough for Grain to add up


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A part of the mixture.

    Args:
        directory: where a manifest.json is.
        weight: its share of the rows, relative to the other datasets'; by default the number of its
            records.
        system_prompt: the name of the text before its captions, where it is not the policy's.
    """

    directory: str
    weight: float | None = None
    system_prompt: str | None = None


class Loader:
    """Batches of a mixture of datasets, by step.

    A batch is this process's share of a global batch: `images` uint8 [b, H, W, 3], `token_ids`
    int32 [b, S], `token_mask` bool [b, S], `ids` (the records' ids, objects [b]) and `captions`
    (a list of b texts). With cached features there are `latents` bfloat16 [b, h, w, C] in the place
    of `images`, and `cap_feats` bfloat16 [b, S, F] in that of `token_ids`; the rows and their
    captions are the same.

    Args:
        datasets: to mix.
        batch_size: of the global batch.
        tokenize: texts, and S if there are `text_slots` -> (token_ids, token_mask). It is called
            from several threads at once.
        policy: chooses captions.
        buckets: the buckets to train on; () takes all that have records.
        features: the cached features to read: "latents", "cap_feats" or both.
        text_slots: S for each caption kind. Then all rows of a batch have captions of one kind,
            where they have any of it, and texts are cut to its slots. Without, S is what `tokenize`
            gives.
        num_threads: batches that are made at the same time.
        prefetch: batches that wait in memory.
        held_out: records that are held out, of each bucket of a dataset as many as its share of the
            rows, but never all.
        trains: whether there are batches by step; without, all of a bucket may be held out.
        process_index, process_count: of which share this is; by default those of JAX.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        batch_size: int,
        seed: int,
        tokenize: Tokenize,
        policy: CaptionPolicy | None = None,
        buckets: Sequence[Bucket] = (),
        features: Sequence[str] = (),
        text_slots: Mapping[str, int] | None = None,
        num_threads: int = 4,
        prefetch: int = 8,
        held_out: int = 0,
        trains: bool = True,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
        _check_share(batch_size, process_index, process_count)
        _check_numbers(seed, num_threads, prefetch)
        policy = policy or CaptionPolicy()
        self.text_slots = dict(text_slots or {})
        _check_datasets(datasets)
        self.manifests = tuple(Manifest.load(dataset.directory) for dataset in datasets)
        chosen = _choose_splits(self.manifests, buckets, datasets)
        for dataset, manifest, splits in zip(datasets, self.manifests, chosen, strict=True):
            _check_features(manifest, features, policy, dataset.directory)
            records.check_complete(dataset.directory, splits.values())
            _check_captions(splits.values(), policy, dataset.directory)
        policy = policy.among(
            pair
            for splits in chosen
            for split in splits.values()
            for caption_set in split.caption_sets
            for pair in caption_set.pairs
        )
        _check_text_slots(self.text_slots, policy)

        counts = [sum(split.num_records for split in splits.values()) for splits in chosen]
        weights = [
            count if dataset.weight is None else dataset.weight
            for dataset, count in zip(datasets, counts, strict=True)
        ]
        self.shares = tuple(weight / sum(weights) for weight in weights)
        # Of all rows, those of a bucket that come from each dataset.
        shares: dict[Bucket, dict[int, float]] = {}
        for number, splits in enumerate(chosen):
            if self.shares[number] > 0:
                for bucket, split in splits.items():
                    share = self.shares[number] * split.num_records / counts[number]
                    shares.setdefault(bucket, {})[number] = share
        self.buckets = tuple(sorted(shares))
        self._process_index, self._process_count = process_index, process_count
        # Of each bucket of a dataset: the records to train on, and those held out.
        places, held_places = _hold_out(held_out, shares, chosen, leave=int(trains))
        self.num_held_out = held_out
        self.num_features_cut = 0  # cached features that `text_slots` made shorter
        self._has_cap_feats = "cap_feats" in features
        self._tokenize, self._lock = tokenize, threading.Lock()
        self._undecodable = _Undecodable()

        def batches_of(bucket: Bucket) -> grain.MapDataset:
            return grain.MapDataset.source(
                _BucketBatches(
                    bucket,
                    {
                        number: _Pictures(
                            datasets[number].directory,
                            chosen[number][bucket],
                            self.manifests[number],
                            features,
                            self._undecodable,
                            places[bucket, number],
                        )
                        for number in shares[bucket]
                    },
                    shares[bucket],
                    policies=policies,
                    one_kind=bool(self.text_slots),
                    seed=seed,
                    batch_size=batch_size,
                    process_index=process_index,
                    process_count=process_count,
                    finish=self._cap_feats if self._has_cap_feats else self._tokens,
                )
            )

        policies = [
            dataclasses.replace(policy, system_prompt=dataset.system_prompt)
            if dataset.system_prompt
            else policy
            for dataset in datasets
        ]
        left_out = _Undecodable("it is left out")
        self._held_out = [
            _HeldOut(
                number,
                _Pictures(
                    datasets[number].directory,
                    chosen[number][bucket],
                    self.manifests[number],
                    features,
                    left_out,
                    numbers,
                ),
                dataclasses.replace(policies[number], dropout=0.0),
            )
            for (bucket, number), numbers in held_places.items()
            if numbers
        ]
        self._batches = grain.MapDataset.mix(
            [batches_of(bucket) for bucket in self.buckets],
            [sum(shares[bucket].values()) for bucket in self.buckets],
        )
        # Grain's own defaults are meant for single records: they would hold 500 whole batches.
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch
        )

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of a picture or a caption, with the shares and what is held out."""
        if len(self.manifests) == 1 and not self.num_held_out:
            return self.manifests[0].fingerprint
        content: list = [
            [m.fingerprint, s] for m, s in zip(self.manifests, self.shares, strict=True)
        ]
        if self.num_held_out:
            content.append([[str(h.bucket), h.dataset, len(h.pictures)] for h in self._held_out])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

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

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of all held-out records, once, always in one order.

        A batch is as one to train on, of `batch_size` rows over all processes, and besides has
        `index` int32 [b], the number of a record among all that are held out. No caption is
        dropped, and which it is depends on neither seed nor step; texts have the most slots of any
        kind. A row that only fills up a batch, or whose record cannot be decoded, has index -1.
        """
        _check_share(batch_size, self._process_index, self._process_count)
        source = _HeldOutBatches(
            self._held_out,
            batch_size=batch_size,
            process_index=self._process_index,
            process_count=self._process_count,
            finish=self._cap_feats if self._has_cap_feats else self._tokens,
            kind=max(self.text_slots, key=self.text_slots.__getitem__, default=""),
        )
        return iter(grain.MapDataset.source(source).to_iter_dataset(self._read_options))

    def _tokens(self, rows: Sequence["_Row"], kind: str) -> dict[str, np.ndarray]:
        slots = [self.text_slots[kind]] if self.text_slots else []
        token_ids, token_mask = self._tokenize([row.text for row in rows], *slots)
        return {
            "token_ids": np.asarray(token_ids, np.int32),
            "token_mask": np.asarray(token_mask, np.bool_),
        }

    def _cap_feats(self, rows: Sequence["_Row"], kind: str) -> dict[str, np.ndarray]:
        """Pads the stored features on the right, as they were when they were made."""
        cache = self.manifests[0].cache["cap_feats"]
        slots = self.text_slots.get(kind, cache.max_tokens)
        cap_feats = np.zeros((len(rows), slots, cache.feature_dim), bfloat16)
        token_mask = np.zeros((len(rows), slots), np.bool_)
        num_cut = 0
        for index, row in enumerate(rows):
            content = None if row.chosen is None else row.record.cap_feats[row.chosen]
            stored = self.manifests[row.dataset].cache["cap_feats"].decode(content)
            num_cut += len(stored) > slots
            stored = stored[:slots]
            cap_feats[index, : len(stored)] = stored
            token_mask[index, : len(stored)] = True
        with self._lock:
            self.num_features_cut += num_cut
        return {"cap_feats": cap_feats, "token_mask": token_mask}


class _Row(NamedTuple):
    """A record and the caption that was chosen for it; None for a dropped one."""

    dataset: int
    record: Record | None
    chosen: int | None
    text: str


class _BucketBatches:
    """The batches of one bucket, by number; threads may share it.

    Args:
        pictures: of the datasets that have any, by their number.
        shares: of these, in the rows.
        policies: of all datasets.
        one_kind: whether the captions of a batch are of one kind.
        finish: what stands for the texts in the batch, given the rows and their kind.
    """

    def __init__(
        self,
        bucket: Bucket,
        pictures: Mapping[int, "_Pictures"],
        shares: Mapping[int, float],
        *,
        policies: Sequence[CaptionPolicy],
        one_kind: bool,
        seed: int,
        batch_size: int,
        process_index: int,
        process_count: int,
        finish: Callable[[Sequence[_Row], str], dict[str, np.ndarray]],
    ):
        self._pictures, self._policies, self._one_kind = pictures, policies, one_kind
        self._finish = finish
        self._batch_size = batch_size
        local_size = batch_size // process_count
        self._local = slice(process_index * local_size, (process_index + 1) * local_size)
        self._entropy = [seed, bucket.width, bucket.height]
        self._shares = [shares[number] for number in pictures]
        self._block = functools.lru_cache(maxsize=16)(self._make_block)

    def __len__(self) -> int:
        return _NUM_BATCHES

    def __getitem__(self, number: int) -> dict[str, Any]:
        block, batch = divmod(number, _BATCHES_AT_ONCE)
        streams, indices, draws, kinds = (values[batch] for values in self._block(block))
        kind, draws = self._policies[0].draw_kind(kinds), draws.tolist()

        pixels = next(iter(self._pictures.values())).empty(len(indices))
        rows: list[Any] = [None] * len(indices)
        for stream, (dataset, pictures) in enumerate(self._pictures.items()):
            mine = np.flatnonzero(streams == stream).tolist()
            found = pictures.read(indices[mine].tolist(), [pixels[row] for row in mine])
            policy = self._policies[dataset]
            for row, record in zip(mine, found, strict=True):
                captions = record.captions
                chosen = policy.choose(captions, draws[row], kind if self._one_kind else None)
                text = policy.text(captions, chosen, draws[row])
                rows[row] = _Row(dataset, record, chosen, text)
        return {
            next(iter(self._pictures.values())).feature: pixels,
            **self._finish(rows, kind),
            "ids": np.array([row.record.id for row in rows], object),
            "captions": [row.text for row in rows],
        }

    def _make_block(self, block: int) -> tuple[np.ndarray, ...]:
        """What decides so many batches.

        Of each local row: the stream, the record there, random numbers. Of each batch: one more.
        """
        batches = block * _BATCHES_AT_ONCE + np.arange(_BATCHES_AT_ONCE)
        rows = batches[:, None] * self._batch_size + np.arange(self._batch_size)[self._local]
        streams, places = order.mixed(rows.ravel(), self._shares)
        indices = np.empty_like(places)
        for stream, (dataset, pictures) in enumerate(self._pictures.items()):
            mine = streams == stream
            # Two data sets of one size must not have the same order.
            seed = self._seed("records", dataset)
            indices[mine] = order.shuffled(places[mine], len(pictures), seed)
        draws = order.uniforms(rows.ravel(), CaptionPolicy.NUM_DRAWS, self._seed("captions"))
        kinds = order.uniforms(batches, 1, self._seed("kinds"))
        return (
            streams.reshape(rows.shape),
            indices.reshape(rows.shape),
            draws.reshape(*rows.shape, -1),
            kinds[:, 0],
        )

    def _seed(self, *purpose: str | int) -> int:
        return _hash([*self._entropy, *purpose])


def _hash(content: Sequence[str | int]) -> int:
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:8], "little")


class _HeldOut(NamedTuple):
    """The held-out records of one bucket of a dataset, and what chooses their captions."""

    dataset: int
    pictures: "_Pictures"
    policy: CaptionPolicy

    @property
    def bucket(self) -> Bucket:
        return self.pictures.bucket


class _HeldOutBatches:
    """The batches of all held-out records, each of one bucket; threads may share it.

    Args:
        parts: the records, in their order.
        kind: of captions, whose text slots all texts have.
        batch_size, process_index, process_count, finish: as of `_BucketBatches`.
    """

    def __init__(
        self,
        parts: Sequence[_HeldOut],
        *,
        batch_size: int,
        process_index: int,
        process_count: int,
        finish: Callable[[Sequence[_Row], str], dict[str, np.ndarray]],
        kind: str,
    ):
        self._finish, self._kind = finish, kind
        self._local_size = batch_size // process_count
        # Of each batch the records of all processes: (part, place in it, number among all).
        records, self._batches = itertools.count(), []
        for _, group in itertools.groupby(parts, key=lambda part: part.bucket):
            rows = [
                (part, place, next(records))
                for part in group
                for place in range(len(part.pictures))
            ]
            for start in range(0, len(rows), batch_size):
                first = start + process_index * self._local_size
                self._batches.append(
                    (rows[0][0], rows[first : min(first + self._local_size, start + batch_size)])
                )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        any_part, mine = self._batches[number]
        pixels = any_part.pictures.empty(self._local_size)
        pixels[...] = 0
        rows = [_Row(any_part.dataset, None, None, "")] * self._local_size
        index = np.full(self._local_size, -1, np.int32)
        for row, (part, place, record_number) in enumerate(mine):
            if (record := part.pictures.decode(place, pixels[row])) is None:
                pixels[row] = 0  # half a picture may have been decoded
                continue
            seed = [part.bucket.width, part.bucket.height, "held_out", part.dataset]
            (draws,) = order.uniforms(
                np.array([place]), CaptionPolicy.NUM_DRAWS, _hash(seed)
            ).tolist()
            chosen = part.policy.choose(record.captions, draws)
            text = part.policy.text(record.captions, chosen, draws)
            rows[row] = _Row(part.dataset, record, chosen, text)
            index[row] = record_number
        return {
            any_part.pictures.feature: pixels,
            **self._finish(rows, self._kind),
            "ids": np.array([row.record.id if row.record else "" for row in rows], object),
            "captions": [row.text for row in rows],
            "index": index,
        }


class _Undecodable:
    """Counts the rows that had to be replaced and logs each bad record once; threads share it."""

    def __init__(self, remedy: str = "the next one takes its place"):
        self.num_replaced = 0
        self._remedy = remedy
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, bucket: Bucket, error: Exception) -> None:
        with self._lock:
            self.num_replaced += 1
            if name in self._names:
                return
            self._names.add(name)
        logging.warning(
            "%s of bucket %s cannot be decoded (%s: %s); %s.",
            name,
            bucket,
            type(error).__name__,
            error,
            self._remedy,
        )


class _Pictures:
    """Decoded records of one bucket of a dataset, by index; threads may share it.

    Args:
        places: which records of the split these are; all by default.
    """

    def __init__(
        self,
        directory: str,
        split: Split,
        manifest: Manifest,
        features: Sequence[str],
        undecodable: _Undecodable,
        places: range | None = None,
    ):
        self._records, self.bucket = Records(directory, split), split.bucket
        self._places = range(split.num_records) if places is None else places
        self._latents = manifest.cache["latents"] if "latents" in features else None
        self._cap_feats = manifest.cache["cap_feats"] if "cap_feats" in features else None
        self._undecodable = undecodable

    def __len__(self) -> int:
        return len(self._places)

    @property
    def feature(self) -> str:
        """The name of these arrays in a batch."""
        return "images" if self._latents is None else "latents"

    def empty(self, size: int) -> np.ndarray:
        """Room for the pictures of a batch, or for their latents."""
        width, height = self.bucket.width, self.bucket.height
        if self._latents is None:
            return np.empty((size, height, width, 3), np.uint8)
        scale = self._latents.downscale
        return np.empty((size, height // scale, width // scale, self._latents.channels), bfloat16)

    def read(self, indices: Sequence[int], out: Sequence[np.ndarray]) -> list[Record]:
        """Decodes these records into arrays, and returns them, or those that replace them."""
        try:
            places = [self._places[index] for index in indices]
            contents: Sequence[bytes | None] = self._records.read(places)
        except Exception:  # which of them it was, `_decode` finds out
            contents = [None] * len(indices)
        return [
            self._decode(index, content, pixels)
            for index, content, pixels in zip(indices, contents, out, strict=True)
        ]

    def _decode(self, index: int, content: bytes | None, out: np.ndarray) -> Record:
        for _ in range(len(self)):
            if record := self.decode(index, out, content):
                return record
            index, content = (index + 1) % len(self), None
        raise InputError(
            f"None of the {len(self)} records of bucket {self.bucket} can be decoded. {REMAKE}"
        )

    def decode(self, index: int, out: np.ndarray, content: bytes | None = None) -> Record | None:
        """Decodes a record into an array; None, counted and logged, if it is damaged."""
        record = None
        try:
            record = Record(self._read_one(self._places[index]) if content is None else content)
            if self._latents is None:
                images.decode_stored(record.image, out)
            else:
                out[...] = self._latents.decode(record.latents, self.bucket)
            if self._cap_feats is not None:
                self._cap_feats.check(record)
            return record
        except InputError:
            raise
        except Exception as error:  # what a decoder raises on damaged bytes is anything
            name = f"number {self._places[index]}" if record is None else record.id
            self._undecodable.add(f"Record {name}", self.bucket, error)
            return None

    def _read_one(self, place: int) -> bytes:
        """Reads a record of its own.

        Only one that is damaged may be replaced: what the network or the machine did to this
        process alone must not choose another row here than elsewhere.
        """
        for seconds in (*_PAUSES, None) if self._records.remote else (None,):
            try:
                return self._records[place]
            except images.Rejected:
                raise
            except Exception as error:
                if seconds is None:
                    raise InputError(
                        f"{self._records.shard_of(place)} cannot be read ({error}), and could when "
                        "the run began. Put it back, or mend the storage, and start again."
                    ) from error
                logging.warning("Reading again in %g s, after: %s", seconds, error)
                time.sleep(seconds)
        raise AssertionError("the last attempt returns or raises")


def read_pictures(directory: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Yields every sound picture once, in the order of the shards: `id`, `image`, `captions`."""
    manifest = Manifest.load(directory)
    splits = [split for split in manifest.splits if split.num_records]
    records.check_complete(directory, splits)
    for split in splits:
        pictures = _Pictures(
            os.fspath(directory), split, manifest, (), _Undecodable("it is left out")
        )
        for index in range(len(pictures)):
            (image,) = pictures.empty(1)
            if record := pictures.decode(index, image):
                yield {"id": record.id, "image": image, "captions": list(record.captions)}


def _hold_out(
    num: int,
    shares: Mapping[Bucket, Mapping[int, float]],
    chosen: Sequence[Mapping[Bucket, Split]],
    *,
    leave: int,
) -> tuple[dict[tuple[Bucket, int], range], dict[tuple[Bucket, int], range]]:
    """Splits the records of each (bucket, dataset) into those to train on, and the last ones.

    At least `leave` of each stay.
    """
    parts = {(b, d): share for b in sorted(shares) for d, share in sorted(shares[b].items())}
    sizes = [chosen[dataset][bucket].num_records for bucket, dataset in parts]
    most = [size - leave for size in sizes]
    if not 0 <= num <= sum(most):
        raise InputError(
            f"{num} records cannot be held out of {sum(sizes)} in {len(sizes)} bucket(s)"
            f"{', of each of which one is to be trained on' if leave else ''}. Give "
            f"config.validation.num_records of 0 to {sum(most)}."
        )
    counts = order.apportioned(num, list(parts.values()), most)
    kept = [range(size - count) for size, count in zip(sizes, counts, strict=True)]
    held = [range(size - count, size) for size, count in zip(sizes, counts, strict=True)]
    return dict(zip(parts, kept, strict=True)), dict(zip(parts, held, strict=True))


def _check_share(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        below = batch_size - batch_size % process_count
        nearest = [str(n) for n in (below, below + process_count) if n > 0]
        raise InputError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; nearest: "
            f"{' and '.join(nearest)}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of process_count={process_count}")


def _check_numbers(seed: int, num_threads: int, prefetch: int) -> None:
    if num_threads < 1 or prefetch < 1:
        raise InputError(f"num_threads={num_threads} and prefetch={prefetch} must be 1 or more.")
    if seed < 0:
        raise InputError(f"seed={seed} must be zero or more.")


def _check_datasets(datasets: Sequence[Dataset]) -> None:
    if not datasets:
        raise InputError("No dataset is named. Make one with tools/prepare_data.py.")
    weights = [dataset.weight for dataset in datasets]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        without = ", ".join(d.directory for d in datasets if d.weight is None)
        raise InputError(
            f"Some datasets have a weight, and {without} have none. Give one to each, or to none: "
            "then each record is as likely as the others."
        )
    if given and (not all(is_finite(w) and w >= 0 for w in given) or not sum(given) > 0):
        raise InputError(f"Dataset weights {given} must be zero or more, and one above zero.")


def _check_text_slots(text_slots: Mapping[str, int], policy: CaptionPolicy) -> None:
    if not text_slots:
        return
    kinds = [kind for kind, weight in policy.kinds.items() if weight > 0]
    if missing := [kind for kind in kinds if kind not in text_slots]:
        raise InputError(
            f"text_slots {dict(text_slots)} name no slots for {', '.join(missing)} captions, which "
            "the caption policy takes. Add them."
        )
    if not all(is_whole(slots, 1, MAX_WIDTH) for slots in text_slots.values()):
        raise InputError(f"text_slots {dict(text_slots)} must be 1 or more, and whole.")


def _check_features(
    manifest: Manifest, features: Sequence[str], policy: CaptionPolicy, directory: str
) -> None:
    if isinstance(features, str) or set(features) - set(CACHES):
        raise InputError(f"Cached features {features!r} are not a tuple of {' and '.join(CACHES)}.")
    if missing := [name for name in features if name not in manifest.cache]:
        raise InputError(
            f"{directory} has no cached {' and '.join(missing)}; it has "
            f"{' and '.join(manifest.cache) or 'none'}. Make a dataset that does with "
            f"tools/cache_features.py --features={','.join(features)}, or leave them out of "
            f"data.cached."
        )
    if "cap_feats" in features and (policy.shuffle_tags or policy.dropout_keeps_system_prompt):
        raise InputError(
            "Cached cap_feats are of whole captions and of the empty text: tags cannot be shuffled "
            "(data.shuffle_tags) and a dropped caption cannot keep its system prompt "
            "(data.dropout_keeps_system_prompt). Switch these off, or leave cap_feats out of "
            "data.cached."
        )


def _choose_splits(
    manifests: Sequence[Manifest], buckets: Sequence[Bucket], datasets: Sequence[Dataset]
) -> list[dict[Bucket, Split]]:
    """Returns the splits with records to train on, of each dataset."""
    directories = ", ".join(dataset.directory for dataset in datasets)
    counts = collections.Counter()
    for manifest in manifests:
        counts.update({split.bucket: split.num_records for split in manifest.splits})
    wanted = sorted(set(buckets) or counts)
    if missing := [bucket for bucket in wanted if bucket not in counts]:
        has = ", ".join(f"{bucket} ({count})" for bucket, count in sorted(counts.items()))
        raise InputError(
            f"{directories} has no bucket {', '.join(map(str, missing))}; it has (records) {has}. "
            "Choose among these, or make a dataset with the bucket: tools/prepare_data.py "
            "--buckets."
        )
    if empty := [str(bucket) for bucket in wanted if not counts[bucket]]:
        logging.info("Left out, because they have no records: buckets %s.", ", ".join(empty))
    chosen = [
        {s.bucket: s for s in manifest.splits if s.bucket in wanted and s.num_records}
        for manifest in manifests
    ]
    for dataset, splits in zip(datasets, chosen, strict=True):
        if not splits:
            raise InputError(
                f"The buckets {', '.join(map(str, wanted))} of {dataset.directory} have no "
                "records. Choose others, or add pictures."
            )
    return chosen


def _check_captions(splits: Iterable[Split], policy: CaptionPolicy, directory: str) -> None:
    """Raises now what would otherwise stop the run when it meets the first such record."""
    splits = list(splits)
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
            f"{num_without} of {sum(split.num_records for split in splits)} records of {directory} "
            f"(one is {without[0].example!r}) have {has}; {policy} allows none of them. Allow one "
            "of these kinds and languages, or caption the records."
        )


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step={step} is negative; the first step is 0")
